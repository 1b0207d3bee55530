"""What a training did to the model: how far its adapter moved, and how far the logits did."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma_tune.encoding.eye import PICTURES
from gemma_tune.lora.token_rows import rows_in
from gemma_tune.lora.whole import copies_in, each_once
from gemma_tune.models.placement import wide
from gemma_tune.train.attention import AS_MASKED
from gemma_tune.train.base_weights import BLOCK, BaseWeights
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.undoing import plain_forward

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer

ROWS = 4  # that base and tuned logits are compared on
_POSITIONS, _BEFORE = 16, 112  # learned tokens of each, and tokens that the model sees before them


@dataclass(frozen=True)
class Moved:
    """How far an adapter is from where it began.

    Attributes:
        layers: that it adapts.
        still: names of those whose weight is what it was.
        norm: of the change of all adapted weights together (Frobenius).
    """

    layers: int
    still: tuple[str, ...]
    norm: float


class AdapterStart:
    """An adapter as it is before the first step. B is zero as a rule, and then nothing of it has to be kept.

    Args:
        model: a PEFT model.
        base: where the base's own weights are that its modules began with; None where they stay in memory.
    """

    @torch.no_grad()
    def __init__(self, model: Any, base: BaseWeights | None = None):
        self._base = base or BaseWeights(model)
        self._parts = {name: _copies(layer) if _factors(layer)[1].any() else None for name, layer in _layers(model)}
        self._whole = {name: _start_of(base, module) for name, (base, module) in each_once(copies_in(model)).items()}
        self._rows = {name: part.rows.detach().cpu().clone() for name, part in rows_in(model).items()}
        self._lengths = {name: length.detach().cpu().clone() for name, layer in _layers(model)
                         if (length := _length(layer)) is not None}

    @torch.no_grad()
    def moved(self, model: Any) -> Moved:
        """How far the adapter of the same model has moved since."""
        layers = dict(_layers(model))
        changes = [*((name, _squared_change(layer, self._parts.get(name))) for name, layer in layers.items()),
                   *self._changes_of_copies(model),
                   *((name, float(torch.linalg.vector_norm(part.rows.detach().cpu() - self._rows[name]).square()))
                     for name, part in rows_in(model).items())]
        still = [name for name, change in changes
                 if not change and not (name in layers and self._longer(name, layers[name]))]
        return Moved(len(changes), tuple(still), math.sqrt(sum(change for _, change in changes)))

    def _changes_of_copies(self, model: Any) -> Iterator[tuple[str, float]]:
        """Of each module that is trained as a whole."""
        for name, (base, module) in each_once(copies_in(model)).items():
            if began := self._whole.get(name):
                blocks = (weight.split(BLOCK) for weight in began)
            else:
                blocks = map(self._base.blocks, base.parameters(recurse=False))
            yield name, _squared_distance(module, blocks)

    def _longer(self, name: str, layer: Any) -> bool:
        """Whether the lengths that DoRA learns of the rows of a weight are others now."""
        before, now = self._lengths.get(name), _length(layer)
        return before is not None and now is not None and not torch.equal(before, now.detach().cpu())


def _weights(module: Any) -> list[torch.Tensor]:
    """As they are computed with and saved: of one that is trained as a whole rounded."""
    whole = getattr(module, "whole", None)
    return [whole.narrow(name) if whole else p.detach() for name, p in module.named_parameters(recurse=False)]


def _start_of(base: Any, module: Any) -> list[torch.Tensor] | None:
    """The weights of a module that is trained as a whole; None where they are the base's, which stay there."""
    same = all(map(torch.equal, _weights(base), _weights(module)))
    return None if same else [p.cpu().clone() for p in _weights(module)]


def _squared_distance(module: Any, before: Iterable[Iterable[torch.Tensor]]) -> float:
    """A block of rows at a time: a vocabulary's embedding in fp32 is as large as the rest of a small model.

    Args:
        before: of each weight the blocks as they were.
    """
    return sum(float(torch.linalg.vector_norm(part.float() - like.to(part.device).float()).square())
               for now, was in zip(_weights(module), before) for part, like in zip(now.split(BLOCK), was))


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name.removeprefix("base_model.model."), layer) for name, layer in model.named_modules()
            if isinstance(layer, LoraLayer) and layer.active_adapters and layer.active_adapters[0] in layer.lora_A)


def _factors(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from gemma_tune.lora.routed import factors_of

    if hasattr(layer, "num_experts"):
        a, b, _ = factors_of(layer)
    else:
        name = layer.active_adapters[0]
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return a.detach(), b.detach()


def _copies(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _factors(layer)
    return a.cpu().clone(), b.cpu().clone()


def _length(layer: Any) -> torch.Tensor | None:
    vectors = layer.lora_magnitude_vector
    name = layer.active_adapters[0]
    return vectors[name].weight if name in vectors else None


def _squared_change(layer: Any, before: tuple[torch.Tensor, torch.Tensor] | None) -> float:
    """Squared norm of ``s (B A - B0 A0)``, without a matrix as large as the weight: the trace of products of width r.

    Args:
        before: A0 (r, in) and B0 (out, r), or None where B0 is zero; of each expert, where it has experts.
    """
    a, b = _factors(layer)
    if before is not None:
        a0, b0 = (part.to(a.device) for part in before)
        if torch.equal(a, a0) and torch.equal(b, b0):
            return 0.0  # and not what is left of the difference of two large sums
        a, b = torch.cat([a, a0], dim=-2), torch.cat([b, -b0], dim=-1)
    # Wide: where B0 is not zero, large numbers go against each other here.
    a, b = wide(a), wide(b)
    scale = layer.scaling[layer.active_adapters[0]]
    return scale ** 2 * max(0.0, float(((b.mT @ b) * (a @ a.mT)).sum()))


@dataclass(frozen=True)
class LogitChange:
    """How the logits of a tuned model differ from those of its base.

    Attributes:
        divergence: Kullback-Leibler divergence of the tuned from the base model, nats per token, on average; no number
            where what the tuned model computes is none.
        largest: difference of any logit; likewise.
    """

    divergence: float
    largest: float


def logit_change(trainer: GemmaTrainer, dataset: Any) -> LogitChange | None:
    """Compare the logits with the adapter switched off and on, at the first learned tokens of a few rows.

    Args:
        dataset: sequences of ``input_ids`` and ``labels``.

    Returns:
        None where no token is learned.
    """
    apart, largest = [], []
    with trainer.base.in_memory():
        for row in range(min(ROWS, len(dataset))):
            ids, predicted = _beginning(dataset[row])
            if not predicted:
                continue
            try:
                seen = _seen(trainer, ids, dataset[row].get(PICTURES, ()))
            except ValueError:  # some of its pictures come later
                continue
            base, tuned = _logits(trainer, ids, predicted, seen)
            apart.append(divergence(base, tuned))
            largest.append(torch.where(base.isfinite(), tuned - base, 0.0).abs().max())
    if not apart:
        return None
    return LogitChange(float(torch.cat(apart).mean()), float(torch.stack(largest).max()))


def divergence(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence (positions,) of tuned from base logits (positions, vocabulary), in nats and fp64.

    Tokens that the base model rules out, with a logit of minus infinity, take no part; what is no number stays so.
    """
    p, q = tuned.double().log_softmax(-1), base.double().log_softmax(-1)
    return torch.where(base.isfinite(), p.exp() * (p - q), 0.0).sum(-1).clamp(min=0)


def _beginning(row: dict[str, Any]) -> tuple[list[int], int]:
    """Ids up to the first learned tokens of a sequence, and how many of them, at the end, are predicted by others."""
    learned = [n for n, label in enumerate(row["labels"]) if n and label != IGNORE_INDEX]
    if not learned:
        return [], 0
    end = next((n for n in range(learned[0], min(learned[0] + _POSITIONS, len(row["labels"])))
                if row["labels"][n] == IGNORE_INDEX), min(learned[0] + _POSITIONS, len(row["labels"])))
    start = 0 if row.get(PICTURES) else max(0, learned[0] - _BEFORE)
    return [int(n) for n in row["input_ids"][start:end - 1]], end - learned[0]


def _seen(trainer: GemmaTrainer, ids: Sequence[int], pictures: Sequence[str]) -> dict[str, Any]:
    """What the model is given because of the pictures among these ids.

    Raises:
        ValueError: their tokens are not all there.
    """
    if not pictures or trainer.shown is None:
        return {}
    inputs = trainer.shown.inputs(torch.tensor([ids]), [pictures], trainer.causal_lm.device)
    return inputs | {AS_MASKED: True}


def _logits(trainer: GemmaTrainer, ids: Sequence[int], last: int,
            seen: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the base and of the tuned model, at the last positions (last, vocabulary), in fp32 on the CPU."""
    model = trainer.causal_lm
    given = torch.tensor([ids], device=model.device)
    with trainer.evaluating(), plain_forward(model):
        less = {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

        def of_these() -> torch.Tensor:
            out = model(input_ids=given, attention_mask=torch.ones_like(given), use_cache=False, **less, **seen)
            return out.logits[0, -last:].float().cpu()

        with trainer.model.disable_adapter():
            base = of_these()
        return base, of_these()
