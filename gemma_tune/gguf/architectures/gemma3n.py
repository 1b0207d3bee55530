"""Gemma 3n: four streams of hidden states that predict and correct each other, per-layer embeddings, keys and values
that later layers share. llama.cpp has most of its sizes built in, so that only the released ones can be written.

It divides by one value less where it takes the deviation of a feed-forward part: of 8,192 values that is 0.006 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures.gemma import ACTIVATION, EMBEDDING, HEAD, differing, named, parts_of, unread_keys
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec, complete, refuse

PER_LAYER = "model.embed_tokens_per_layer.weight"
OWN_KEYS = 20  # layers with keys and values of their own
_STREAMS, _PERIOD = 4, 5  # of hidden states; every fifth layer attends to everything
_CAP = 30.0  # of logits; there is a key for it, which llama.cpp does not read here
_SPARSE = [0.95] * 10  # which share of the feed-forward part is switched off, in the first layers


def gemma3n(config: Mapping[str, Any], path: Path) -> Architecture:
    """A Gemma 3n, text only or the text part of a multimodal model.

    Raises:
        UserError: settings that llama.cpp has no key for.
    """
    whole = complete(config, path)
    text = whole.get_text_config()
    refuse(path, _problems(text))
    return Architecture("gemma3n", _tensors(text), lambda writer: _add(text, writer), "sentencepiece", text.vocab_size,
                        text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
                        tied=whole.tie_word_embeddings, streams=_STREAMS, **parts_of(whole, text))


MAKERS = {"gemma3n": gemma3n, "gemma3n_text": gemma3n}


def _problems(text: Any) -> list[str]:
    found = differing(text, attention_bias=False, hidden_activation=ACTIVATION, altup_num_inputs=_STREAMS,
                      altup_active_idx=0, altup_correct_scale=True, hidden_size_per_layer_input=256, laurel_rank=64,
                      final_logit_softcapping=_CAP)
    layers = text.num_hidden_layers
    if layers - text.num_kv_shared_layers != OWN_KEYS:
        found.append(f"{layers - text.num_kv_shared_layers} layers have keys and values of their own and llama.cpp "
                     f"computes with {OWN_KEYS}")
    if text.layer_types != [f"{'sliding' if (i + 1) % _PERIOD else 'full'}_attention" for i in range(layers)]:
        found.append(f"layer_types isn't {_PERIOD - 1} sliding layers and then a full one, over and over")
    if list(text.activation_sparsity_pattern) != _SPARSE + [0.0] * (layers - len(_SPARSE)):
        found.append(f"activation_sparsity_pattern isn't {_SPARSE[0]} in the first {len(_SPARSE)} layers, and 0 behind")
    if len(set(text.intermediate_size)) > 1:
        found.append("intermediate_size isn't the same in all layers")
    for kind, rope in text.rope_parameters.items():
        if rope["rope_type"] != "default":
            found.append(f"rope type {rope['rope_type']!r} of {kind} is not 'default'")
    return found


def _add(text: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(list(text.intermediate_size))
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_rope_freq_base(text.rope_parameters["full_attention"]["rope_theta"])
    writer.add_rope_freq_base_swa(text.rope_parameters["sliding_attention"]["rope_theta"])
    writer.add_final_logit_softcapping(text.final_logit_softcapping)
    writer.add_sliding_window(text.sliding_window)
    writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in text.layer_types])
    writer.add_shared_kv_layers(text.num_kv_shared_layers)
    writer.add_altup_active_idx(text.altup_active_idx)
    writer.add_altup_num_inputs(text.altup_num_inputs)
    writer.add_embedding_length_per_layer_input(text.hidden_size_per_layer_input)
    # How many standard deviations above the mean what is switched on lies; 0 % are below minus infinity.
    writer.add_activation_sparsity_scale([NormalDist().inv_cdf(share) if share else -np.inf
                                          for share in text.activation_sparsity_pattern])


def _shapes(text: Any) -> dict[str, tuple[int, ...]]:
    """Source → shape of every tensor, in the order in which they are written."""
    hidden, small = text.hidden_size, text.hidden_size_per_layer_input * text.num_hidden_layers
    others = (text.altup_num_inputs - 1, hidden, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (text.vocab_size, hidden), PER_LAYER: (text.vocab_size, small),
        "model.altup_projections.weight": others, "model.altup_unembed_projections.weight": others,
        "model.per_layer_model_projection.weight": (small, hidden),
        "model.per_layer_projection_norm.weight": (text.hidden_size_per_layer_input,),
    }  # fmt: skip
    block = _block(text)
    for i in range(text.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (text.vocab_size, hidden)}


def _block(text: Any) -> dict[str, tuple[int, ...]]:
    hidden, small, streams = text.hidden_size, text.hidden_size_per_layer_input, text.altup_num_inputs
    dim, inner, rank = text.head_dim, text.intermediate_size[0], text.laurel_rank
    queries, keys = text.num_attention_heads * dim, text.num_key_value_heads * dim
    weights = {
        "altup.correction_coefs": (streams, streams), "altup.prediction_coefs": (streams * streams, streams),
        "altup.modality_router": (streams, hidden), "altup.router_norm": (hidden,), "input_layernorm": (hidden,),
        "laurel.linear_left": (rank, hidden), "laurel.linear_right": (hidden, rank),
        "laurel.post_laurel_norm": (hidden,), "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,), "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "post_feedforward_layernorm": (hidden,),
        "per_layer_input_gate": (small, hidden), "per_layer_projection": (hidden, small),
        "post_per_layer_input_norm": (hidden,),
    }  # fmt: skip
    return {"altup.correct_output_scale": (hidden,), **{f"{part}.weight": shape for part, shape in weights.items()}}


def _tensors(text: Any) -> tuple[TensorSpec, ...]:
    """With what llama.cpp reads and a checkpoint can lack: rows of the tokens for pictures and sounds, which have no
    per-layer embedding, and keys and values that nothing multiplies with."""
    beyond, unread = max(0, text.vocab_size - text.vocab_size_per_layer_input), unread_keys(text)
    specs = named(gguf.MODEL_ARCH.GEMMA3N, text, _shapes(text), None)
    specs = [replace(spec, zero_rows=beyond) if spec.source == PER_LAYER else spec for spec in specs]
    return tuple(replace(spec, values=np.broadcast_to(np.float32(0), spec.shape)) if spec.source in unread else spec
                 for spec in specs)
