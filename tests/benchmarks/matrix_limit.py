"""The time that a training needs at least: its matrix products, each at the speed measured for its shape.

Counted is what the mathematics asks for, on real tokens without padding, one FLOP being one multiplication or one
addition. Per token and frozen linear layer with P = inputs x outputs parameters: 2 P forward and 2 P for the gradient
with respect to its input; its weights get none, or with --full 2 P as well. Per adapter with p = rank x (inputs + outputs) parameters: 2 p forward,
2 p for its weights, 2 p for its inputs. Per trained token the frozen head: 4 x vocabulary x hidden size, 6 x where it is trained. Per layer of
attention with H heads of width D and n pairs of a query and a key that it sees: 4 H D n forward (two products), 8 H D n
backward (four). Nothing is recomputed. Layers that read the embeddings need no gradient with respect to their input, as
nothing below them learns.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ROWS = 512  # of the products that are measured: about the tokens of a batch of 4 short conversations
# The first layer's projections of the hidden states, by the names that Gemma, Llama, Qwen and most others give them.
_READS_EMBEDDINGS = re.compile(r"(^|\.)layers\.0\.self_attn\.(q|k|v|qkv)_proj$")


@dataclass(frozen=True)
class Shapes:
    """What decides the work of a step.

    ``linear`` counts the adapted layers by (inputs, outputs, whether their input needs a gradient); ``head`` is (hidden
    size, vocabulary); ``windows`` has, for each layer of attention, the keys that a query sees at most, or None;
    ``attention_width`` is query heads x head width, ``rank`` that of LoRA, None where all weights are trained.
    """

    linear: dict[tuple[int, int, bool], int]
    head: tuple[int, int]
    windows: tuple[int | None, ...]
    attention_width: int
    rank: int | None


def shapes_of(model: Any, rank: int | None) -> Shapes:
    """The shapes of a transformers model (which may lie on the meta device) with LoRA on every linear layer, or none."""
    from gemma_tune.lora.layers import target_modules

    linear = Counter((module.in_features, module.out_features, rank is None or not _READS_EMBEDDINGS.search(name))
                     for name in target_modules(model, ()) if (module := model.get_submodule(name)))
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    windows = tuple(text.sliding_window if kind == "sliding_attention" else None for kind in kinds)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shapes(dict(linear), (text.hidden_size, text.vocab_size), windows, text.num_attention_heads * width, rank)


def pairs(length: int, window: int | None) -> int:
    """Pairs of a query and a key in causal attention over ``length`` tokens: each sees itself and what is before it."""
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def linear_flops(inputs: int, outputs: int, rank: int | None, gradient: bool) -> int:
    """FLOPs per token of one frozen layer and its adapter, or of one that is trained, forward and backward."""
    if rank is None:
        return 6 * inputs * outputs
    frozen, adapter = 4 * inputs * outputs, 6 * rank * (inputs + outputs)
    return frozen + adapter - (0 if gradient else 2 * inputs * outputs + 2 * rank * inputs)


def training_flops(shapes: Shapes, lengths: Sequence[int], trained: int) -> dict[str, int]:
    """FLOPs of one pass over sequences of these lengths, ``trained`` of whose tokens are learned, by part."""
    tokens = sum(lengths)
    return {
        "linear": tokens * sum(count * linear_flops(i, o, shapes.rank, gradient)
                               for (i, o, gradient), count in shapes.linear.items()),
        "attention": 12 * shapes.attention_width * sum(count * pairs(length, window) for window, count in
                                                       Counter(shapes.windows).items() for length in lengths),
        "head": (6 if shapes.rank is None else 4) * shapes.head[0] * shapes.head[1] * trained}


def limit(shapes: Shapes, rates: dict[tuple[int, int], float], lengths: Sequence[int], trained: int) -> dict[str, Any]:
    """Seconds of one pass if nothing but its matrix products took time, at the ``rates`` of :func:`measure_rates`.

    An adapter counts at the speed of its layer, and attention at the mean of all layers: their own products, which are
    thinner, are slower, so that this is a lower bound.
    """
    flops, tokens = training_flops(shapes, lengths, trained), sum(lengths)
    linear = tokens * sum(count * linear_flops(i, o, shapes.rank, gradient) / rates[i, o]
                          for (i, o, gradient), count in shapes.linear.items())
    attention = linear * flops["attention"] / flops["linear"]
    seconds = linear + attention + flops["head"] / rates[shapes.head]
    return {"seconds": seconds, "flops": sum(flops.values()), "flops_by_part": flops,
            "gflops_per_second": sum(flops.values()) / seconds / 1e9}


def measure_rates(shapes: Shapes, device: str, dtype: Any) -> dict[tuple[int, int], float]:
    """FLOPs per second of the products with each (inputs, outputs) of the model, forward and backward together."""
    import torch

    rates = {}
    for inputs, outputs in sorted({(i, o) for i, o, _ in shapes.linear} | {shapes.head}):
        weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
        hidden = torch.randn(ROWS, inputs, device=device, dtype=dtype)
        gradient = torch.randn(ROWS, outputs, device=device, dtype=dtype)
        seconds = _best(lambda h=hidden, w=weight: h @ w.t(), device) + _best(lambda g=gradient, w=weight: g @ w, device)
        rates[inputs, outputs] = 4 * ROWS * inputs * outputs / seconds
    return rates


def _best(product: Callable[[], Any], device: str, least: float = 0.3) -> float:
    """Seconds of the fastest call among those of ``least`` seconds, and of at least five."""
    import torch

    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device, lambda: None)
    product()  # the first call includes choosing and preparing the kernel
    wait()
    times: list[float] = []
    while len(times) < 5 or sum(times) < least:
        began = time.perf_counter()
        product()
        wait()
        times.append(time.perf_counter() - began)
    return min(times)
