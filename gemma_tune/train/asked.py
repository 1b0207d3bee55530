"""What a training from rewards asks: of each conversation everything before its last learned answer. No torch here."""

from __future__ import annotations

from typing import Any

import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted
from gemma_tune.encoding.tokens import pictured, those
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session


def starts_of(sequences: Any) -> np.ndarray:
    """Tokens before the last learned range of each sequence (int64), without reading them."""
    chunks = [np.zeros(0, np.int64)]
    for column in sequences.data.column("spans").chunks:
        ends = np.cumsum(column.value_lengths().to_numpy())
        chunks.append(column.flatten().to_numpy().astype(np.int64)[ends - 2])
    return np.concatenate(chunks)


def rows_of(sequences: Any) -> np.ndarray:
    """The line of its file, from 0, that each sequence is of (int64)."""
    chunks = [np.zeros(0, np.int64), *(chunk.to_numpy() for chunk in sequences.data.column("row").chunks)]
    return np.concatenate(chunks).astype(np.int64)


def prompts_in(sequences: Any, session: Session) -> Any:
    """The last sequence of each row, as a dataset of the same kind: its last answer is what is sampled anew.

    Raises:
        UserError: rows with pictures, or of plain text.
    """
    rows = rows_of(sequences)
    again = command("prepare", session.run.root, "OTHER.jsonl")
    if shown := len(np.unique(rows[pictured(sequences)])):
        raise UserError(f"--method grpo learns from text alone, and {counted(shown, 'row has', 'rows have')} pictures",
                        f"prepare rows without any: {again}; or train with --method sft")
    if texts := len(np.unique(rows[starts_of(sequences) <= 1])):
        raise UserError(f"--method grpo asks the model, and {counted(texts, 'row is', 'rows are')} plain text without "
                        "a prompt", f"prepare conversations: {again}; or train with --method sft")
    return those(sequences, np.append(rows[1:] != rows[:-1], True)[:len(rows)])
