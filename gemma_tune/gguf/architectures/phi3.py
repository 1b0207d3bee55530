"""Phi-3, Phi-3.5 and Phi-4 (text models of the ``phi3`` type) in GGUF: q, k and v are one matrix, gate and up one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures.gemma import differing, in_layers, named, unknown_rope, unusual_heads
from gemma_tune.gguf.architectures.llama import context_length, shorter_context, tokenizer_kind
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec, add_sizes, complete, refuse

_ARCH = gguf.MODEL_ARCH.PHI3
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"


def _make(config: Mapping[str, Any], path: Path) -> Architecture:
    """Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    heads, rope = whole.num_attention_heads, whole.rope_parameters
    dim = whole.hidden_size // heads
    refuse(path, [*differing(whole, hidden_act="silu"), *unusual_heads(whole), *_rope_problems(rope)])
    # By how long a context is, llama.cpp takes the short or the long divisors for all of it, Transformers by how long a
    # text is: both take the short ones here.
    known = context_length(whole)
    if rope["rope_type"] == "longrope":
        known = min(known, rope["original_max_position_embeddings"])
    return Architecture(gguf.MODEL_ARCH_NAMES[_ARCH], _tensors(whole, dim), partial(_metadata, whole),
                        tokenizer_kind(path.parent), whole.vocab_size, whole.num_hidden_layers, heads,
                        whole.num_key_value_heads, tied=whole.tie_word_embeddings,
                        context=shorter_context(whole, known))


MAKERS = {"phi3": _make}


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    if rope["rope_type"] == "default":
        return []
    return unknown_rope(rope, "longrope") or [f"{key} is {rope[key]!r}, for which there is no key"
                                              for key in ("attention_factor", "factor") if rope.get(key) is not None]


def _rotated(config: Any) -> int:
    """Numbers of a head that are rotated: three quarters in Phi-4-mini."""
    heads = config.num_attention_heads
    return int(config.rope_parameters.get("partial_rotary_factor", 1.0) * config.hidden_size) // heads


def _tensors(config: Any, dim: int) -> tuple[TensorSpec, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    block = {"input_layernorm": (hidden,), "self_attn.qkv_proj": (queries + 2 * keys, hidden),
             "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,),
             "mlp.gate_up_proj": (2 * inner, hidden), "mlp.down_proj": (hidden, inner)}
    return (*divisors(config.rope_parameters), *named(_ARCH, config, in_layers(config, block), None))


def divisors(rope: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """What the frequencies of the rotation are divided by, in long and in short contexts."""
    if rope["rope_type"] != "longrope":
        return ()
    values = {name: np.array(rope[key], np.float32) for name, key in ((_LONG, "long_factor"), (_SHORT, "short_factor"))}
    return tuple(TensorSpec(name, numbers.shape, values=numbers) for name, numbers in values.items())


def _metadata(config: Any, writer: gguf.GGUFWriter) -> None:
    rope = config.rope_parameters
    most, original = context_length(config), rope.get("original_max_position_embeddings",
                                                      config.original_max_position_embeddings)
    writer.add_context_length(most)
    writer.add_rope_scaling_orig_ctx_len(original)
    add_sizes(writer, config)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(_attention_factor(config.max_position_embeddings / original, original))


def _attention_factor(factor: float, original: int) -> float:
    """What scales the rotated q and k (LongRoPE, arXiv 2402.13753, eq. 3)."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
