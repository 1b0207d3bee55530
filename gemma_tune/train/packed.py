"""Rows one after the other in a captured step, instead of beside each other and padded to the longest.

Attention is told where rows end; nothing else of a decoder looks from one token to another. PyTorch's kernel for such
rows is slower than its best one for rows of one length, so packing is tried only where padding costs much, and kept
where it is faster on this GPU and gives the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gemma_tune.answers.decoding import beside_attention
from gemma_tune.base.listener import Listener
from gemma_tune.train.buckets import Bucket, Buckets, costs_of, pieces_of
from gemma_tune.train.captured import CapturedSteps, LearnedTokens, OfText
from gemma_tune.train.cuda_attention import TOLERANCE, packed_rows, try_packed
from gemma_tune.train.loss import IGNORE_INDEX

PADDED_TOO_MUCH = 0.15  # what padding adds to the tokens of a training
FASTER = 0.97  # of the time with padding that packing may take
LONGEST_MASK = 16_384  # tokens of a packed piece: a mask of all their pairs has 256 MB
_LOOKED_AT = 50  # forward passes of which one is timed


@dataclass
class PackedTokens(OfText):
    """As :class:`gemma_tune.train.captured.LearnedTokens`. Buckets have one row, of all tokens of a piece.

    Args:
        rows: the most of a piece. One with fewer is filled up with rows of padding, of one token at least, as kernels
            need not know rows of none.
    """

    model: Any
    rows: int

    def shape(self, part: Mapping[str, Any]) -> tuple[int, int, int]:
        lengths = part["lengths"]
        return 1, int(lengths.sum()) + self.rows - len(lengths), int(_learned(part).sum())

    def size(self, bucket: Bucket) -> int:
        return 2 * bucket.length + 2 * bucket.positions + self.rows + 1

    def filled(self, part: Mapping[str, Any], bucket: Bucket) -> torch.Tensor:
        """(2 x length + 2 x positions + rows + 1,) int32: ids, their places in their rows, positions, targets, and
        where rows begin and end."""
        lengths, size = part["lengths"], bucket.length
        there = torch.arange(part["input_ids"].shape[1]) < lengths[:, None]
        ids, places, positions, targets, ends = self._split(
            flat := torch.zeros(self.size(bucket), dtype=torch.int32), bucket)
        used = int(lengths.sum())
        ids[:used] = part["input_ids"][there]
        places[:used] = torch.arange(there.shape[1]).expand(there.shape)[there]
        [where] = torch.nonzero(_learned(part)[there], as_tuple=True)
        count = len(where)
        positions[:count], targets[:count] = where - 1, part["labels"][there][where]
        # As in captured.filled: different places, to which nothing is added.
        positions[count:], targets[count:] = torch.arange(bucket.positions - count) % size, IGNORE_INDEX
        ends[1:len(lengths) + 1] = lengths.cumsum(0)
        ends[len(lengths) + 1:] = used + torch.arange(1, self.rows - len(lengths) + 1)
        ends[-1] = size
        return flat

    def prepare(self, bucket: Bucket) -> None:
        """Have the one kernel run that attention is done by: what it loads and refuses is no matter of a capture."""
        try_packed()

    def loss(self, flat: torch.Tensor, bucket: Bucket, weights: torch.Tensor) -> torch.Tensor:
        *inputs, ends = self._split(flat, bucket)
        ids, places, positions, targets = (t.long() for t in inputs)
        with packed_rows(ends):
            return self.model(input_ids=ids[None], position_ids=places[None], positions=positions,
                              targets=targets)["loss"] * weights[0]

    def _split(self, flat: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, ...]:
        return flat.split([bucket.length, bucket.length, bucket.positions, bucket.positions, self.rows + 1])


def _learned(part: Mapping[str, Any]) -> torch.Tensor:
    """Which tokens (rows, length) are learned; the first of a row is predicted by none."""
    learned = part["labels"] != IGNORE_INDEX
    learned[:, 0] = False
    return learned


def packed_shapes(batches: Sequence[Sequence[int]], lengths: np.ndarray, trained: np.ndarray,
                  micro_batch: int) -> np.ndarray:
    """What goes through the model at once, see :func:`gemma_tune.train.buckets.shapes_of_pieces`: (pieces, 3)."""
    found = [(1, lengths[part].sum() + micro_batch - len(part), trained[part].sum())
             for part in map(np.asarray, pieces_of(batches, micro_batch))]
    return np.array(found, np.int64).reshape(-1, 3)


def unpackable(causal_lm: Any) -> str:
    """What stands against packing a model's rows; empty if nothing does."""
    attention = causal_lm.config.get_text_config()._attn_implementation
    if attention != "sdpa":
        return f"{attention} attention"
    if strange := beside_attention(causal_lm):
        return strange
    layers = getattr(causal_lm.get_decoder(), "layers", ())
    if not layers or not all(hasattr(layer, "self_attn") for layer in layers):
        return "layers that are no attention"
    # What has a convolution or a state beside its attention would look from one row into the next.
    mixing = [m for m in causal_lm.get_decoder().modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
    return "convolutions" if mixing else ""


def packed_if_faster(trainer: Any, padded: CapturedSteps, tokens: int, padding: float) -> CapturedSteps | None:
    """Steps of packed rows in place of the padded ones, where they are worth it and the same.

    Args:
        trainer: a :class:`gemma_tune.train.trainer.GemmaTrainer`.
        padded: its captured steps.
        tokens: real ones of the whole training; ``padding`` is what padding adds to them.
    """
    if (padding <= PADDED_TOO_MUCH or not isinstance(padded.body, LearnedTokens)
            or trainer.args.activation_checkpointing or _draws(trainer.model) or unpackable(trainer.causal_lm)):
        return None
    batches = trainer.batches()
    shapes = packed_shapes(batches, *trainer.sizes(0)[1:], trainer.micro_batch)
    # transformers makes a mask of all pairs of tokens where a layer has a window, of which its presence is all we need.
    if int(shapes[:, 1].max(initial=0)) > LONGEST_MASK:
        return None
    steps = CapturedSteps(PackedTokens(trainer.model, trainer.micro_batch), trainer.gradients,
                          Buckets(shapes, costs_of(trainer.causal_lm)), Listener(), padded.pool)
    part = _typical(trainer, batches[:_LOOKED_AT], padded, steps)
    if part is None:
        return None
    before, seconds = _tried(trainer, padded, part)
    if before is None:
        return None
    after, others = _tried(trainer, steps, part)
    # In place: of all weights, gradients take as much as the weights. A number that is not finite compares as false.
    apart = None if after is None else after.sub_(before).norm()
    if apart is None or not apart <= TOLERANCE * before.norm():
        steps.forget()
        if apart is not None:
            trainer.listener.note("rows are not packed: their gradients would differ by "
                                  f"{(apart / before.norm()).item():.1%}")
        return None
    seconds = min(seconds, padded.seconds_of(part, *trainer.weights(1)))  # the first time found everything cold
    trainer.gradients.clear()
    less = steps.buckets.fit(shapes, tokens)[0]
    time_padded = seconds * (1 + padding) / _size(padded, part)
    time_packed = others * (1 + less) / _size(steps, part)
    faster = time_packed < FASTER * time_padded
    trainer.listener.note(f"rows are {'packed' if faster else 'not packed'}: padding {less:.0%} instead of "
                          f"{padding:.0%}, in {time_packed / time_padded:.0%} of the time")
    (padded if faster else steps).forget()
    steps.listener, steps.instead = trainer.listener, padded
    return steps if faster else None


def _draws(model: Any) -> bool:
    """Whether dropout makes two passes differ."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())


def _typical(trainer: Any, batches: Sequence[Sequence[int]], padded: CapturedSteps,
             packed: CapturedSteps) -> Mapping[str, Any] | None:
    """A piece whose padded shape is met most often."""
    found, most = None, 0
    for rows in batches:
        part = trainer.collate([trainer.train_dataset[int(row)] for row in rows[:trainer.micro_batch]])
        bucket = padded.buckets.find(*padded.body.shape(part))
        if bucket and padded.buckets.counts[bucket] > most and packed.buckets.find(*packed.body.shape(part)):
            found, most = part, padded.buckets.counts[bucket]
    return found


def _tried(trainer: Any, steps: CapturedSteps, part: Mapping[str, Any]) -> tuple[torch.Tensor | None, float]:
    """Gradients of a piece, and the seconds of a step with it; no gradients where it cannot be captured."""
    trainer.gradients.clear()
    weights = trainer.weights(1)
    if not steps.run(part, *weights):
        return None, 0.0
    gradients = trainer.gradients.flat()
    seconds = steps.seconds_of(part, *weights)
    trainer.gradients.clear()
    return gradients, seconds


def _size(steps: CapturedSteps, part: Mapping[str, Any]) -> int:
    bucket = steps.buckets.find(*steps.body.shape(part))
    return bucket.rows * bucket.length
