"""The file that ``export-ollama --calibration`` names: rows of any format that ``prepare`` reads, or plain text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.config.stages import MOST_TOKENS
from gemma_tune.data.reading.rows import Row
from gemma_tune.data.usable import Turns
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.encoding.sequences import Encoder, liked_of
from gemma_tune.run.row_file import RowFile
from gemma_tune.run.session import Session

_MOST_ROWS = 4096  # that are looked at, from all over a file
_FILE = RowFile("calibration", use="calibrate by", used="calibrated by",
                own="take those of the training: --calibration rows", again="an export")


def with_file(session: Session) -> tuple[Session, dict[str, Path]]:
    """The session with the name of its calibration file as the manifest keeps it; the files behind it, by input name.

    Raises:
        UserError: there is no such file.
    """
    return _FILE.with_file(session, session.config.calibration_file)


def named_file(session: Session) -> str:
    """The file's name from here: what was given is one, what the manifest has is relative to the run."""
    return _FILE.found(session, session.config.calibration_file)


def require_file(name: str | None) -> None:
    """What can be known of ``--calibration`` without a run.

    Raises:
        UserError: there is no such file.
    """
    _FILE.require(name)


def file_rows(session: Session, chat: ChatFormat) -> tuple[list[Mapping[str, np.ndarray]], bool]:
    """Rows of the session's calibration file as ``input_ids``, laid out by the run's chat template.

    Of a long file some are looked at, from all over it; of pairs the chosen answers, of judged ones the good; of rows
    with pictures the text.

    Returns:
        The rows, and whether some have pictures.

    Raises:
        UserError: it cannot be read, or more of its rows cannot be used than ``prepare`` allowed.
    """
    without = []

    def text_of(row: Row, turns: Turns) -> Turns:
        without.append(row)
        return [{key: value for key, value in turn.items() if key != PICTURES} for turn in turns]

    rows, _ = _FILE.rows(session, session.config.calibration_file, Encoder(chat, MOST_TOKENS), _MOST_ROWS,
                         lambda sources: text_of)
    found = [{"input_ids": s.ids} for row in rows for s in liked_of(row.example, row.outcome.full)]
    if not found:
        raise UserError(f"all answers in {named_file(session)} are marked as bad ones, and nothing else is there to "
                        "calibrate by", f"name a file that holds good ones, or {_FILE.own}")
    return found, bool(without)
