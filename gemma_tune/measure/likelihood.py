"""How well a loaded model predicts tokens: their negative log-likelihood, in nats.

Sequences of similar length go through the model together, padded on the right. The whole logits are never built: the
head is given the positions that predict something, some at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_tune.base.finite import not_finite
from gemma_tune.encoding.labels import IGNORE_INDEX
from gemma_tune.models.load import after_product
from gemma_tune.models.placement import wide

if TYPE_CHECKING:
    import torch

_LOGITS = 1 << 25  # made at a time: 128 MB in fp32
_TOKENS = 2048  # of a batch, with its padding
# How far the head's logits may be from the model's own, in nats; bf16 rounds logits of 30 to 0.1.
_SAME = 0.3


@dataclass(frozen=True)
class Wanted:
    """Tokens of one sequence to predict: its ids (1, length), the positions that predict them, the tokens themselves,
    and the names of the pictures that stand among the ids."""

    ids: np.ndarray
    at: np.ndarray
    labels: np.ndarray
    pictures: tuple[str, ...] = ()


# What a model is given beside ids (rows, length), where these have pictures, by the names of those of each row; see
# ``answers.sight.beside``.
Beside = Callable[["torch.Tensor", Sequence[Sequence[str]]], Mapping[str, Any]]


def wanted_of(rows: Iterable[Mapping[str, Any]], limit: int | None = None) -> list[Wanted]:
    """What is to be predicted of rows, taken in their order.

    Each token is predicted where the one before it stands, a row's first nowhere.

    Args:
        rows: mappings with ``input_ids``, ``labels`` (-100 where nothing is learned) and perhaps ``pictures``, such as
            validation rows.
        limit: at most so many tokens.
    """
    found, left = [], sys.maxsize if limit is None else limit
    for row in rows:
        ids, labels = (np.asarray(row[key], np.int64) for key in ("input_ids", "labels"))
        at = np.flatnonzero(labels[1:] != IGNORE_INDEX)[:left]
        if len(at):
            found.append(Wanted(ids[None, :at[-1] + 1], at, labels[at + 1], tuple(row.get("pictures", ()))))
            left -= len(at)
        if not left:
            break
    return found


def negative_log_likelihoods(model: Any, sequences: Sequence[Wanted],
                             on_progress: Callable[[int], None] | None = None,
                             beside: Beside | None = None) -> np.ndarray:
    """The sum over each sequence's wanted tokens, in nats: float64 of shape (sequences,).

    Args:
        model: as transformers or PEFT loaded it, with its adapter switched on or off.
        on_progress: called after each batch with how many tokens, read ones included, are done.
        beside: shows the model the pictures of sequences that have any.

    Raises:
        UserError: what the model computes is not finite, which is no figure.
    """
    import torch

    found = np.zeros(len(sequences))
    if not sequences:
        return found
    model.eval()
    with torch.inference_mode():
        shortest = min(sequences, key=lambda wanted: wanted.ids.shape[1])
        through_head = _head_is_all(model, shortest)
        done = 0
        for batch in batches([wanted.ids.shape[1] for wanted in sequences], _TOKENS if through_head else 1):
            rows = [sequences[n] for n in batch]
            states = _states(model, rows, beside) if through_head else _own_logits(model, rows[0], beside)
            nats = _summed(model, states, rows, through_head)
            if not np.isfinite(nats).all():
                raise not_finite(model)
            found[batch] = nats
            done += sum(row.ids.shape[1] for row in rows)
            if on_progress:
                on_progress(done)
    return found


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Numbers of sequences that go together: of similar length, and so many tokens with their padding at most.

    The longest come first, so that memory that does not suffice shows at once. A sequence that is longer stands alone.
    """
    found: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= tokens:
            found[-1].append(n)
        else:
            found.append([n])
    return found


def logits_of(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) in fp32 of the decoder's last states (n, hidden), as the family ends them."""
    after = after_product(model)
    head = model.get_output_embeddings()
    logits = head(states.to(head.weight.dtype)).float()  # Mamba's last states are fp32
    if after["scale"] != 1:
        logits.mul_(after["scale"])
    if after["softcap"]:
        logits.div_(after["softcap"]).tanh_().mul_(after["softcap"])
    return logits


def to_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of logits (n, vocabulary), which are given away: a CPU writes over them, as to get so much memory anew takes
    twice as long as to work them out."""
    import torch

    return torch.log_softmax(logits, 1, out=logits if logits.device.type == "cpu" else None)


def positions_at_a_time(model: Any) -> int:
    """For how many positions logits are made at once."""
    return max(1, _LOGITS // model.get_output_embeddings().weight.shape[0])


def _head_is_all(model: Any, wanted: Wanted) -> bool:
    """Whether decoder, head and what the family does to logits give the model's own logits; a family may do more."""
    import torch

    ids = torch.from_numpy(wanted.ids[:, :8]).to(model.device)
    try:
        states = model.get_decoder()(input_ids=ids, attention_mask=None, use_cache=False).last_hidden_state[0, -1:]
        found = torch.log_softmax(logits_of(model, states), 1)
    except (AttributeError, NotImplementedError, TypeError):
        return False
    own = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, -1:].float(), 1)
    likeliest = own.topk(min(10, own.shape[1])).indices  # those far from any answer are rounded most
    return bool(((found - own).gather(1, likeliest).abs() < _SAME).all())


def _states(model: Any, rows: Sequence[Wanted], beside: Beside | None) -> list[torch.Tensor]:
    """The decoder's last states at the positions of each row: (n, hidden)."""
    import torch

    width = max(row.ids.shape[1] for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for n, row in enumerate(rows):
        ids[n, :row.ids.shape[1]] = torch.from_numpy(row.ids[0])
        mask[n, :row.ids.shape[1]] = 1
    padded = not bool(mask.all())
    ids, seen = _shown(model, ids, rows, beside)
    inner = _with_sight(model) if seen else model.get_decoder()
    out = inner(input_ids=ids, attention_mask=mask.to(model.device) if padded else None, use_cache=False,
                **seen).last_hidden_state
    return [out[n, torch.from_numpy(row.at).to(model.device)] for n, row in enumerate(rows)]


def _own_logits(model: Any, row: Wanted, beside: Beside | None) -> list[torch.Tensor]:
    import torch

    ids, seen = _shown(model, torch.from_numpy(row.ids), [row], beside)
    return [model(input_ids=ids, use_cache=False, **seen).logits[0, torch.from_numpy(row.at).to(model.device)].float()]


def _shown(model: Any, ids: torch.Tensor, rows: Sequence[Wanted],
           beside: Beside | None) -> tuple[torch.Tensor, Mapping[str, Any]]:
    """Ids where the model is, and what it is given beside them."""
    ids = ids.to(model.device)
    return ids, beside(ids, [row.pictures for row in rows]) if beside else {}


def _with_sight(model: Any) -> Any:
    """The part of a model that puts pictures into what its decoder reads."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


def _summed(model: Any, parts: Sequence[torch.Tensor], rows: Sequence[Wanted], through_head: bool) -> np.ndarray:
    """Sums by row of what stands in ``parts``: states, or logits already."""
    import torch

    step = positions_at_a_time(model)
    # Of all rows together: the fewer positions a product has, the longer each takes.
    together = torch.cat(list(parts))
    labels = torch.from_numpy(np.concatenate([row.labels for row in rows])).to(together.device)
    nats = []
    for start in range(0, len(together), step):
        part = together[start:start + step]
        logits = logits_of(model, part) if through_head else part
        nats.append(-wide(to_log_probabilities(logits).gather(1, labels[start:start + step, None])[:, 0]).cpu())
    ends = np.cumsum([len(row.at) for row in rows])
    return np.add.reduceat(torch.cat(nats).numpy(), [0, *ends[:-1]])
