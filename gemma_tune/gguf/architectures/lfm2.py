"""LFM2 and LFM2.5 (dense) in GGUF: most layers are short convolutions, with a gate before and behind."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.gguf.architectures.gemma import EMBEDDING, HEAD, differing, unknown_rope, unusual_heads
from gemma_tune.gguf.architectures.parts import FLAT, Architecture, Change, TensorSpec, add_sizes, complete, refuse

_ARCH = gguf.MODEL_ARCH.LFM2
_CONVOLUTION = "conv"


def _make(config: Mapping[str, Any], path: Path) -> Architecture:
    """Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    heads = whole.num_attention_heads
    dim = whole.hidden_size // heads
    refuse(path, [*differing(whole, conv_bias=False), *unusual_heads(whole),
                  *unknown_rope(whole.rope_parameters, "default")])
    return Architecture(gguf.MODEL_ARCH_NAMES[_ARCH], _tensors(whole, dim), partial(_metadata, whole), "bpe",
                        whole.vocab_size, whole.num_hidden_layers, heads, whole.num_key_value_heads,
                        tied=whole.tie_word_embeddings)


MAKERS = {"lfm2": _make}


def _inner(config: Any) -> int:
    """The width of the MLP, which the configuration's number is adjusted to."""
    if not config.block_auto_adjust_ff_dim:
        return config.intermediate_size
    width = int(config.block_ffn_dim_multiplier * int(2 * config.intermediate_size / 3))
    return config.block_multiple_of * -(-width // config.block_multiple_of)


def _tensors(config: Any, dim: int) -> tuple[TensorSpec, ...]:
    names = gguf.get_tensor_name_map(_ARCH, config.num_hidden_layers)
    hidden, inner = config.hidden_size, _inner(config)
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    both = {"operator_norm": (hidden,), "ffn_norm": (hidden,), "feed_forward.w1": (inner, hidden),
            "feed_forward.w3": (inner, hidden), "feed_forward.w2": (hidden, inner)}
    mixing = {"conv.conv": (hidden, config.conv_L_cache), "conv.in_proj": (3 * hidden, hidden),
              "conv.out_proj": (hidden, hidden)}
    attending = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
                 "self_attn.v_proj": (keys, hidden), "self_attn.out_proj": (hidden, queries),
                 "self_attn.q_layernorm": (dim,), "self_attn.k_layernorm": (dim,)}
    shapes = {EMBEDDING: (config.vocab_size, hidden), "model.embedding_norm.weight": (hidden,),
              HEAD: (config.vocab_size, hidden)}
    for n, kind in enumerate(config.layer_types):
        parts = both | (mixing if kind == _CONVOLUTION else attending)
        shapes |= {f"model.layers.{n}.{part}.weight": shape for part, shape in parts.items()}
    return tuple(TensorSpec(names.get_name(source, (".weight",)), shape, source, _change(source),
                            tied_to=EMBEDDING if source == HEAD else None) for source, shape in shapes.items())


def _change(source: str) -> Change | None:
    return FLAT if source.endswith("conv.conv.weight") else None


def _metadata(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    add_sizes(writer, config, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    writer.add_feed_forward_length(_inner(config))
    # No keys of heads where a layer is a convolution: that is how they are told apart.
    writer.add_head_count_kv([0 if kind == _CONVOLUTION else config.num_key_value_heads for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_shortconv_l_cache(config.conv_L_cache)
