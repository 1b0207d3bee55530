"""Prompts that a training from rewards asks, with the answers that their rows have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_tune.answers.prompts import Prompt, prompt_of
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.run.directory import command
from gemma_tune.train.asked import prompt_before, rows_of, starts_of
from gemma_tune.train.batches import Batch, collate


class Prompts(torch.utils.data.Dataset):
    """Prompts with the answers that their rows have.

    An item is a dictionary: ``input_ids`` and ``labels`` of the whole sequence, ``number`` of the prompt in this
    dataset, and ``prompt`` and ``reference``, the ids before and of the answer.

    Args:
        sequences: of :func:`gemma_tune.train.asked.prompts_in`.
        path: of the rows that they were made from.
        divided: what renders prompts, where sequences can be parts of their conversations.
    """

    def __init__(self, sequences: Any, path: Path, divided: ChatFormat | None = None):
        self.sequences, self.path, self.divided = sequences, path, divided
        self.starts, self.rows = starts_of(sequences), rows_of(sequences)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        found = []
        for number in map(int, numbers):
            row, start = self.sequences[number], int(self.starts[number])
            ids = [int(token) for token in row["input_ids"]]
            found.append({"input_ids": row["input_ids"], "labels": row["labels"], "number": number,
                          "prompt": ids[:start], "reference": ids[start:]})
        return found

    def asked(self, number: int) -> Prompt:
        """The prompt's turns, as the model reads them, and the tools on offer.

        Raises:
            UserError: the model does not read a part of the row.
        """
        line = int(self.rows[number])
        with open(self.path, "rb") as lines:
            lines.seek(self._places[line])
            row = json.loads(lines.readline())
        found = prompt_before(row, self.divided, self[number]["prompt"]) if self.divided else prompt_of(row)
        if found is None:
            raise UserError(f"{self.path}:{line + 1} is not what the prepared tokens were made of",
                            f"make them again: {command('prepare', self.path.parents[1])}")
        return found

    @cached_property
    def _places(self) -> np.ndarray:
        """Where each line begins (int64)."""
        with open(self.path, "rb") as lines:
            return np.cumsum([0, *map(len, lines)])


def collate_prompts(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Prompts as a batch: what :func:`gemma_tune.train.batches.collate` makes of their sequences, and ``prompts``, the
    items themselves, for which answers take the place of the sequences."""
    rows = Batch(items, items.tokens, items.trained, items.step) if isinstance(items, Batch) else list(items)
    return collate(rows) | {"prompts": list(items)}
