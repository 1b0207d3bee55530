"""General text as token ids, for what a model knew before it was trained: one half to round by, one to measure on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gemma_tune import samples


def calibration_ids(tokenizer: Any) -> list[np.ndarray]:
    """Ids of each passage to round by: int64 (length,)."""
    return _ids(tokenizer, samples.general_calibration())


def measuring_rows(tokenizer: Any) -> list[dict[str, np.ndarray]]:
    """The passages to measure on, as rows of ``quant_loss``: every token is predicted but the first of each."""
    return [{"input_ids": ids, "labels": ids} for ids in _ids(tokenizer, samples.general_measuring())]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """With what the tokenizer puts before a text by itself, such as a BOS."""
    return [np.asarray(ids, np.int64) for ids in tokenizer(list(texts)).input_ids]
