"""Gemma 4, also with experts: two kinds of layers with head sizes of their own, per-layer embeddings, keys and values
that later layers share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures import experts
from gemma_tune.gguf.architectures.gemma import ACTIVATION, EMBEDDING, HEAD, differing, named, parts_of, unread_keys
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec, complete, refuse

SLIDING, FULL = "sliding_attention", "full_attention"
UNROTATED = 1e30  # divides an angle into nothing: llama.cpp rotates every dimension of a head, each by its own factor


def gemma4(config: Mapping[str, Any], path: Path) -> Architecture:
    """A Gemma 4, text only or the text part of a multimodal model.

    Raises:
        UserError: settings that llama.cpp has no key for.
    """
    whole = complete(config, path)
    text = whole.get_text_config()
    refuse(path, _problems(text))
    weights = named(gguf.MODEL_ARCH.GEMMA4, text, _shapes(text), None, unread_keys(text).__contains__)
    tensors = (_rope_factors(text), *weights, *experts.scales_of_gemma4(text))
    return Architecture("gemma4", tensors, lambda writer: _add(text, writer), "gemma4", text.vocab_size,
                        text.num_hidden_layers, text.num_attention_heads, _dims(text, 0)[1],
                        tied=whole.tie_word_embeddings, experts=experts.count_of_gemma4(text),
                        experts_used=getattr(text, "top_k_experts", None) or 0,
                        **parts_of(whole, text))


MAKERS = dict.fromkeys(("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"), gemma4)


def _problems(text: Any) -> list[str]:
    found = differing(text, attention_bias=False, hidden_activation=ACTIVATION)
    if text.use_bidirectional_attention == "all":
        found.append("use_bidirectional_attention is 'all' and llama.cpp attends to what came before")
    if {SLIDING, FULL} != set(text.layer_types):
        found.append(f"layer_types are {', '.join(sorted(set(text.layer_types)))}: llama.cpp expects both "
                     f"{FULL} and {SLIDING}")
        return found
    rope = text.rope_parameters
    for kind, name in ((SLIDING, "default"), (FULL, "proportional")):
        if rope[kind]["rope_type"] != name:
            found.append(f"rope type {rope[kind]['rope_type']!r} of {kind} is not {name!r}")
        if len({_dims(text, i) for i in _layers(text, kind)}) > 1:
            found.append(f"per_layer_config gives the {kind} layers different sizes")
    # llama.cpp's later layers take keys and values from the last two that have their own.
    own = text.num_hidden_layers - text.num_kv_shared_layers
    if text.num_kv_shared_layers and text.layer_types[max(0, own - 2):own] != [SLIDING, FULL]:
        found.append(f"num_kv_shared_layers is {text.num_kv_shared_layers}, and the two layers before those aren't "
                     f"{SLIDING} and {FULL}")
    if _per_layer(text) and text.vocab_size_per_layer_input != text.vocab_size:
        found.append(f"vocab_size_per_layer_input is {text.vocab_size_per_layer_input} and vocab_size is "
                     f"{text.vocab_size}: llama.cpp expects one")
    return found


def _per_layer(text: Any) -> int:
    """Width of the per-layer embeddings; 0 where there are none."""
    return getattr(text, "hidden_size_per_layer_input", 0) or 0


def _layers(text: Any, kind: str) -> list[int]:
    return [i for i, found in enumerate(text.layer_types) if found == kind]


def _dims(text: Any, layer: int) -> tuple[int, int]:
    """Size of a layer's heads, and how many it has for keys and values."""
    own = text.per_layer_config[layer]
    return own.head_dim, own.num_key_value_heads


def _is_shared(text: Any, layer: int) -> bool:
    return layer >= text.num_hidden_layers - text.num_kv_shared_layers


def _inner(text: Any, layer: int) -> int:
    return text.intermediate_size * (2 if text.use_double_wide_mlp and _is_shared(text, layer) else 1)


def _add(text: Any, writer: gguf.GGUFWriter) -> None:
    full, sliding = (_dims(text, _layers(text, kind)[0]) for kind in (FULL, SLIDING))
    layers = range(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length([_inner(text, i) for i in layers] if text.use_double_wide_mlp
                                   else text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv([_dims(text, i)[1] for i in layers] if full[1] != sliding[1] else full[1])
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(full[0])
    writer.add_value_length(full[0])
    writer.add_key_length_swa(sliding[0])
    writer.add_value_length_swa(sliding[0])
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in text.layer_types])
    writer.add_shared_kv_layers(text.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(_per_layer(text))
    writer.add_rope_freq_base(text.rope_parameters[FULL]["rope_theta"])
    writer.add_rope_freq_base_swa(text.rope_parameters[SLIDING]["rope_theta"])
    writer.add_rope_dimension_count(full[0])
    writer.add_rope_dimension_count_swa(sliding[0])
    experts.add_gemma4(text, writer)
    writer.add_final_logit_softcapping(text.final_logit_softcapping or 0.0)  # llama.cpp caps at 30 without the key


def _rope_factors(text: Any) -> TensorSpec:
    """What the angles of the full layers are divided by, one number for each pair of a head's dimensions.

    Proportional rotation (`_compute_proportional_rope_parameters` in Transformers) turns the first share of the pairs
    only, by angles that follow from the whole head's size.
    """
    rope, dim = text.rope_parameters[FULL], _dims(text, _layers(text, FULL)[0])[0]
    rotated = int(rope.get("partial_rotary_factor", 1.0) * dim // 2)
    factors = [rope.get("factor", 1.0)] * rotated + [UNROTATED] * (dim // 2 - rotated)
    return TensorSpec("rope_freqs.weight", (dim // 2,), values=np.array(factors, np.float32))


def _shapes(text: Any) -> dict[str, tuple[int, ...]]:
    """Source → shape of every tensor, in the order in which they are written."""
    hidden, small, layers = text.hidden_size, _per_layer(text), text.num_hidden_layers
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (text.vocab_size, hidden)}
    if small:
        shapes |= {"model.embed_tokens_per_layer.weight": (text.vocab_size, layers * small),
                   "model.per_layer_model_projection.weight": (layers * small, hidden),
                   "model.per_layer_projection_norm.weight": (small,)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in _block(text, i).items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (text.vocab_size, hidden)}


def _block(text: Any, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, small, inner = text.hidden_size, _per_layer(text), _inner(text, layer)
    dim, kv_heads = _dims(text, layer)
    queries, keys = text.num_attention_heads * dim, kv_heads * dim
    values = {} if text.attention_k_eq_v and text.layer_types[layer] == FULL else {"self_attn.v_proj": (keys, hidden)}
    weights = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        **values, "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,), "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,), "pre_feedforward_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "post_feedforward_layernorm": (hidden,),
        **({"per_layer_input_gate": (small, hidden), "per_layer_projection": (hidden, small),
            "post_per_layer_input_norm": (hidden,)} if small else {}),
    }  # fmt: skip
    return {**{f"{part}.weight": shape for part, shape in weights.items()}, **experts.gemma4(text),
            "layer_scalar": (1,)}
