"""Pairs and judged answers in captured steps, see :mod:`gemma_tune.train.captured`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.train.batches import collate
from gemma_tune.train.buckets import Bucket
from gemma_tune.train.captured import RowsBeside, filled, inputs_of, size_of
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.objectives import Answers
from gemma_tune.train.preference_loss import PreferenceLoss
from gemma_tune.train.token_losses import by_answer, has_pictures


@dataclass
class LearnedUnits(RowsBeside):
    """The loss of units: the first weight for what compares answers, the second for the tokens of good ones. A
    :class:`gemma_tune.train.captured.Body`.

    Args:
        model: with its adapter.
        per_unit: sequences of a unit.
        sums: (len(SUMS),) to which those of each piece are added.
    """

    model: Any
    preference: PreferenceLoss
    per_unit: int
    sums: torch.Tensor

    def takes(self, part: Mapping[str, Any]) -> bool:
        return not has_pictures(_rows(part))

    def shape(self, part: Mapping[str, Any]) -> tuple[int, int, int]:
        rows = _rows(part)
        learned = sum(int((np.asarray(row["labels"])[1:] != IGNORE_INDEX).sum()) for row in rows)
        return len(rows), max(len(row["input_ids"]) for row in rows), learned

    def size(self, bucket: Bucket) -> int:
        return size_of(bucket) + 2 * bucket.rows + bucket.rows // self.per_unit

    def filled(self, part: Mapping[str, Any], bucket: Bucket) -> torch.Tensor:
        """Ids, positions and targets as for tokens; then bits of fp32: the reference's log-probability of each answer,
        1 for each good one, and 1 for each unit that is there."""
        units = part["units"]
        numbers = torch.zeros(2 * bucket.rows + bucket.rows // self.per_unit)
        reference, good, there = self._numbers(numbers, bucket)
        reference[:self.per_unit * len(units)] = torch.tensor([r for unit in units for r in unit["reference"]])
        good[:self.per_unit * len(units)] = torch.tensor([float(g) for unit in units for g in unit["good"]])
        there[:len(units)] = 1
        return torch.cat([filled(collate(_rows(part)), bucket), numbers.view(torch.int32)])

    def loss(self, flat: torch.Tensor, bucket: Bucket, weights: torch.Tensor) -> torch.Tensor:
        tokens = size_of(bucket)
        ids, positions, targets = inputs_of(flat[:tokens], bucket)
        reference, good, there = self._numbers(flat[tokens:].view(torch.float32), bucket)
        losses = self.model(input_ids=ids, positions=positions, targets=targets, each=True)["losses"]
        logps, learned = by_answer(losses, positions // bucket.length, (targets != IGNORE_INDEX).long(), bucket.rows)
        found = self.preference.of_answers(Answers(logps, reference, learned), good.bool(), there.bool())
        self.sums += found.sums
        return found.compared * weights[0] + found.imitated * weights[1]

    def _numbers(self, numbers: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, ...]:
        return numbers.split([bucket.rows, bucket.rows, bucket.rows // self.per_unit])


def _rows(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for unit in part["units"] for row in unit["sequences"]]
