"""General text as token ids, for what a model knew before it was trained: one half to round by, one to measure on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_tune import samples
from gemma_tune.encoding.chat_format import ChatFormat


def calibration_rows_of(chat: ChatFormat) -> list[dict[str, np.ndarray]]:
    """The passages to round by, as rows with ``input_ids``."""
    return [{"input_ids": ids} for ids in _ids(chat, samples.general_calibration())]


def measuring_rows_of(chat: ChatFormat) -> list[dict[str, np.ndarray]]:
    """The passages to measure on, as rows of ``likelihood``: every token is predicted but the first of each."""
    return [{"input_ids": ids, "labels": ids} for ids in _ids(chat, samples.general_measuring())]


def _ids(chat: ChatFormat, texts: Sequence[str]) -> list[np.ndarray]:
    """As a plain text is trained on, behind a BOS where the model has one, but without an end: int32 (length,)."""
    end = chat.tokenizer.eos_token_id
    return [encoded.ids[:-1] if encoded.ids[-1] == end else encoded.ids for encoded in chat.encode_texts(texts)]
