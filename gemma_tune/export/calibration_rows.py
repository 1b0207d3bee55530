"""Which rows the rounding of an export is calibrated by, as token ids: a file's or the training's, and general text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tune.base.words import counted
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.export.calibration_file import file_rows, named_file
from gemma_tune.export.files import ExportSource
from gemma_tune.export.quant_loss import encoded_rows
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.types import libgguf
from gemma_tune.measure.general import calibration_rows_of
from gemma_tune.run.session import Session

TOKENS = 16_384  # of rows, beside general text
_WHOLE = 8192  # where fewer are asked for,
_PART = 3  # one in so many is of general text at most
LONGEST = 2048  # tokens of one row


def not_calibrated(session: Session, source: ExportSource) -> str:
    """Why the rounding cannot be calibrated whatever rows there are; "" where it can."""
    if session.config.calibration is False:
        return "--no-calibration"
    if source.architecture is None:
        return "the converter writes the file"
    return not_measured(source.architecture)


def not_measured(architecture: Architecture) -> str:
    """Why a model's matrices cannot be measured, whatever its weights are; "" where they can."""
    if any(spec.turned for spec in architecture.tensors):
        return "experts that add biases are not measured"
    return "libgguf is not installed" if libgguf is None else ""


def calibration_rows(session: Session, source: ExportSource, tokens: int = TOKENS) -> tuple[list[np.ndarray], str]:
    """Ids, (length,) each, of the rows to calibrate by, and what they are in words.

    They are rows of the file that ``--calibration`` names, else of the training, and general text, whole however few
    the rows are: beside 600 tokens of rows the demo's q4_0 loses less on either text with all of it than with a share.
    It stands alone where there are no rows, as with an adapter from elsewhere. Of rows with pictures the texts are
    taken: questions and answers of the kind that the model will read and write.

    Args:
        tokens: of rows, at most; of few of them general text is a part.

    Raises:
        UserError: a file of which nothing, or too little, can be used.
    """
    from gemma_tune.encoding.tokens import pictured

    general = [row["input_ids"] for row in calibration_rows_of(source.chat)]
    if tokens < _WHOLE:
        general = shortened(general, tokens // _PART)
        tokens -= sum(map(len, general))
    more = sum(map(len, general))
    if session.config.calibration_file:
        rows, pictures = file_rows(session, source.chat)
        own, of = sample(rows, tokens), f"of {named_file(session)}"
    else:
        trained, reason = encoded_rows(session, "train")
        if trained is None:
            return general, f"{counted(more, 'token')} of general text alone: {reason}"
        own, of = sample(trained, tokens, _of_pictures(source.chat)), "of the training rows"
        pictures = bool(pictured(trained).any())
    if pictures:
        of += ", without pictures,"
    return [*own, *general], f"{counted(sum(map(len, own)), 'token')} {of} and {more:,} of general text"


def _of_pictures(chat: ChatFormat) -> list[int]:
    """Tokens that stand for pictures, or around them."""
    texts = vars(chat.eye.tokens).values() if chat.eye else ()
    return chat.tokenizer.convert_tokens_to_ids([text for text in texts if text])


def sample(rows: Any, tokens: int = TOKENS, without: Sequence[int] = ()) -> list[np.ndarray]:
    """Ids of rows from all over the data, so many tokens together, each row no longer than :data:`LONGEST`.

    Args:
        without: tokens that are left out.
    """
    found, left = [], tokens
    for n in np.random.default_rng(0).permutation(len(rows)):
        if not left:
            break
        ids = np.asarray(rows[int(n)]["input_ids"])
        ids = ids[~np.isin(ids, without)][:min(LONGEST, left)]
        found.append(ids)
        left -= len(ids)
    return found


def shortened(sequences: Sequence[np.ndarray], tokens: int) -> list[np.ndarray]:
    """Some of these ids, so many together."""
    return sample([{"input_ids": ids} for ids in sequences], tokens)
