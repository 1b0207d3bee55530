"""MiniCPM 3 in GGUF: queries, and keys with values, come from a few numbers each (multi-head latent attention).

llama.cpp norms those with the layers' rms_norm_eps, transformers with 1e-6: of released models, whose is 1e-5, a
small difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.gguf.architectures.gemma import THETA, differing, in_layers, named, unknown_rope
from gemma_tune.gguf.architectures.llama import tokenizer_kind
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec, add_sizes, complete, refuse
from gemma_tune.gguf.architectures.phi3 import divisors

_ARCH = gguf.MODEL_ARCH.MINICPM3


def _make(config: Mapping[str, Any], path: Path) -> Architecture:
    """Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    heads = whole.num_attention_heads
    fixed = {"hidden_act": "silu", "attention_bias": False, "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256,
             "v_head_dim": whole.hidden_size // heads, "num_key_value_heads": heads}
    refuse(path, [*differing(whole, **fixed), *_problems(whole)])
    return Architecture(gguf.MODEL_ARCH_NAMES[_ARCH], _tensors(whole), partial(_metadata, whole),
                        tokenizer_kind(path.parent), whole.vocab_size, whole.num_hidden_layers, heads, heads,
                        tied=whole.tie_word_embeddings)


MAKERS = {"minicpm3": _make}


def _problems(config: Any) -> list[str]:
    rope = config.rope_parameters
    found = [] if config.q_lora_rank else ["q_lora_rank is missing"]
    found += unknown_rope(rope, "default", "longrope")
    original = rope.get("original_max_position_embeddings", config.max_position_embeddings)
    if rope["rope_type"] == "longrope" and (original != config.max_position_embeddings or rope.get("attention_factor")):
        found.append("the rotation is stretched beyond original_max_position_embeddings, for which there is no key")
    return found


def _tensors(config: Any) -> tuple[TensorSpec, ...]:
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    rotated, plain = config.qk_rope_head_dim, config.qk_nope_head_dim
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_a_proj": (config.q_lora_rank, hidden), "self_attn.q_a_layernorm": (config.q_lora_rank,),
        "self_attn.q_b_proj": (heads * (plain + rotated), config.q_lora_rank),
        "self_attn.kv_a_proj_with_mqa": (config.kv_lora_rank + rotated, hidden),
        "self_attn.kv_a_layernorm": (config.kv_lora_rank,),
        "self_attn.kv_b_proj": (heads * (plain + config.v_head_dim), config.kv_lora_rank),
        "self_attn.o_proj": (hidden, heads * config.v_head_dim), "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return (*divisors(config.rope_parameters), *named(_ARCH, config, in_layers(config, block), None))


def _metadata(config: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(config.max_position_embeddings)
    add_sizes(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    if (theta := config.rope_parameters["rope_theta"]) != THETA:
        writer.add_rope_freq_base(float(theta))
