"""Which rows make a step, in what order, and how they become tensors: nothing is wasted on padding or sent twice.

Rows of similar length go together, so little of a batch is padding. Packing several rows into one, with a mask that
keeps them apart, was measured on a CPU with Gemma 3 270M: 4 rows of 110 to 480 tokens took 17 to 31 % longer than
padded, as attention computes blocks that the mask throws away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.encoding.eye import PICTURES
from gemma_tune.train.loss import IGNORE_INDEX

_GROUP = 50  # steps whose rows are sorted by length together: similar lengths, and yet another mixture each epoch


@dataclass(frozen=True)
class Share:
    """What one process does of each step.

    Args:
        batch: rows of one forward pass.
        accumulation: forward passes per step.
        processes: how many there are.
        rank: which one this is.
    """

    batch: int
    accumulation: int = 1
    processes: int = 1
    rank: int = 0

    @property
    def step(self) -> int:
        """Rows per optimiser step, of all processes together."""
        return self.batch * self.accumulation * self.processes

    def batches(self, rows: np.ndarray) -> Iterator[list[int]]:
        """This process's forward passes of a step with these rows; some may be empty, their number is everyone's."""
        mine = rows[self.rank::self.processes]  # in turn, so that all get similar lengths
        for n in range(-(-len(rows) // (self.batch * self.processes))):
            yield mine[n * self.batch:(n + 1) * self.batch].tolist()


class Batch(list[Any]):
    """Rows of one forward pass, as numbers or as what they hold, with what the whole step learns from, which all its
    processes so know by themselves.

    Attributes:
        tokens: of all rows of the step, without padding.
        trained: those of them that are learned.
        step: the numbers of all rows of the step.
    """

    def __init__(self, rows: Sequence[Any], tokens: int = 0, trained: int = 0, step: Sequence[int] = ()):
        super().__init__(rows)
        self.tokens, self.trained, self.step = tokens, trained, step


class LengthGroupedBatches(torch.utils.data.Sampler[list[int]]):
    """Rows of similar length together, in an order that depends on the seed and the epoch alone.

    Steps are formed from whole effective batches, so neither accumulation nor the number of processes changes what a
    step learns from. The global random state is not used: a resumed epoch has the order that it had before. The first
    step of the training gets the longest rows.

    Args:
        lengths: tokens of each row.
        share: what this process does of a step.
        seed: of the order.
        trained: how many tokens of each row are learned; where it is not given, all but the first.
    """

    def __init__(self, lengths: Sequence[int], share: Share, seed: int, trained: Sequence[int] | None = None):
        self.lengths, self.share, self.seed, self.epoch = np.asarray(lengths), share, seed, 0
        self.trained = np.maximum(self.lengths - 1, 0) if trained is None else np.asarray(trained)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    @property
    def batch_size(self) -> int:
        """Rows of one forward pass; the data loader's owner asks."""
        return self.share.batch

    def __len__(self) -> int:
        whole, rest = divmod(len(self.lengths), self.share.step)
        return whole * self.share.accumulation + -(-rest // (self.share.batch * self.share.processes))

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self.steps():
            about = int(self.lengths[rows].sum()), int(self.trained[rows].sum()), rows.tolist()
            for batch in self.share.batches(rows):
                yield Batch(batch, *about)

    def steps(self) -> list[np.ndarray]:
        """The epoch's steps, each as its rows, longest first."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        size = self.share.step
        steps = []
        # A group begins only where a whole step is left, so the longest row of all is in a whole step of its group.
        starts = range(0, max(1, len(order) - size + 1), _GROUP * size)
        for start, end in zip(starts, [*starts[1:], len(order)]):
            group = order[start:end]
            group = group[np.argsort(-self.lengths[group], kind="stable")]
            steps += [group[n:n + size] for n in range(0, len(group), size)]
        # An incomplete step stays last: moved forward, it would shift the borders of all later steps.
        rest = [steps.pop()] if len(steps[-1]) < size else []
        steps = [steps[n] for n in torch.randperm(len(steps), generator=generator).tolist()] + rest
        if self.epoch == 0:
            whole = len(steps) - len(rest) or 1
            longest = max(range(whole), key=lambda n: self.lengths[steps[n]].max())
            steps[0], steps[longest] = steps[longest], steps[0]
        return steps


class SortedBatches(torch.utils.data.Sampler[list[int]]):
    """Every row once, longest first, for evaluation."""

    def __init__(self, lengths: Sequence[int], share: Share):
        self.order, self.share = np.argsort(-np.asarray(lengths), kind="stable"), share

    def __len__(self) -> int:
        return -(-len(self.order) // self.share.step)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.order), self.share.step):
            yield from self.share.batches(self.order[start:start + self.share.step])


class Rows(torch.utils.data.Dataset):
    """A dataset that can be asked for no rows at all, which is what a process without a share of the last step does."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, rows: list[int]) -> Batch:
        many = getattr(self.dataset, "__getitems__", None)
        found = many(list(rows)) if many and rows else [self.dataset[row] for row in rows]
        return Batch(found, rows.tokens, rows.trained, rows.step) if isinstance(rows, Batch) else Batch(found)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Padded on the right to the longest of these rows.

    Returns:
        ``input_ids`` and ``labels`` (rows, length) int64, ``lengths`` (rows,) int64. Padding is token 0, which no
        trained position sees: attention is causal, and labels are ``IGNORE_INDEX`` there. No rows give one token
        that is not trained, for a process that takes part in a step without a row of its own. Of rows that a loader
        fetched also ``step_tokens``, ``step_trained`` and ``step_rows`` of the whole step, see :class:`Batch`, and
        where any row has some, ``pictures``: the names of those of each row.
    """
    sizes = [len(row["input_ids"]) for row in rows] or [0]
    ids = torch.zeros(len(sizes), max(1, *sizes), dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for n, row in enumerate(rows):
        ids[n, :sizes[n]] = torch.as_tensor(row["input_ids"])
        labels[n, :sizes[n]] = torch.as_tensor(row["labels"])
    batch = {"input_ids": ids, "labels": labels, "lengths": torch.tensor(sizes)} | _shown([
        row.get(PICTURES, ()) for row in rows])
    if isinstance(rows, Batch):
        batch |= {"step_tokens": rows.tokens, "step_trained": rows.trained, "step_rows": rows.step}
    return batch


def _shown(names: Sequence[Sequence[str]]) -> dict[str, Any]:
    return {PICTURES: names} if any(names) else {}


def pieces(batch: dict[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of at most ``rows`` rows, each without the padding that it does not need."""
    for start in range(0, len(batch["lengths"]), rows):
        part = {name: batch[name][start:start + rows] for name in ("input_ids", "labels", "lengths")}
        longest = max(1, int(part["lengths"].max()))
        shown = _shown(batch[PICTURES][start:start + rows]) if PICTURES in batch else {}
        yield part | {name: part[name][:, :longest] for name in ("input_ids", "labels")} | shown


def trained_count(labels: torch.Tensor) -> int:
    """How many tokens of ``labels`` (rows, length) are trained; on a GPU this would wait for it."""
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def trained_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which hidden states predict a trained token, and which token that is.

    How many there are depends on the labels, so on a GPU this would wait for it: the labels stay on the CPU.

    Args:
        labels: (rows, length) int64, ``IGNORE_INDEX`` where nothing is learned.

    Returns:
        Positions in the flattened (rows x length), each before that of its label, and the labels there; both int64.
    """
    rows, before = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    return rows * labels.shape[1] + before, labels[rows, before + 1]


def loader(dataset: Any, batches: torch.utils.data.Sampler, accelerator: Any,
           collate: Callable[[Any], dict[str, Any]] = collate) -> Any:
    """A data loader that leaves batches on the CPU, where their sizes can be read without waiting for a GPU.

    accelerate must not shard it: the sampler knows the processes. What an iteration draws (a seed for workers) comes
    from a generator of its own, so that the numbers of dropout do not depend on how often is evaluated.
    """
    from accelerate.data_loader import prepare_data_loader

    plain = torch.utils.data.DataLoader(Rows(dataset), batch_sampler=batches, collate_fn=collate,
                                        generator=torch.Generator())
    return prepare_data_loader(plain, device=accelerator.device, num_processes=1, process_index=0, put_on_device=False)
