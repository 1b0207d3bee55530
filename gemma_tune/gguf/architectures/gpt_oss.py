"""GPT-OSS in GGUF: every layer of experts, with biases, and each head with a sink that takes some of its attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.gguf.architectures.experts import add_experts
from gemma_tune.gguf.architectures.gemma import EMBEDDING, HEAD, differing, unknown_rope
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec, add_sizes, complete, refuse

_ARCH = gguf.MODEL_ARCH.GPT_OSS
# Of these the checkpoint has the matrices turned round, and gate and up in one.
_TURNED = tuple(f"mlp.experts.{part}" for part in
                ("gate_proj.weight", "up_proj.weight", "down_proj.weight", "gate_proj_bias", "up_proj_bias"))


def _make(config: Mapping[str, Any], path: Path) -> Architecture:
    """Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    refuse(path, [*differing(whole, attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0), *_problems(whole)])
    return Architecture(gguf.MODEL_ARCH_NAMES[_ARCH], _tensors(whole), partial(_metadata, whole), "bpe",
                        whole.vocab_size, whole.num_hidden_layers, whole.num_attention_heads,
                        whole.num_key_value_heads, tied=whole.tie_word_embeddings, experts=whole.num_local_experts,
                        experts_used=whole.num_experts_per_tok, made_in="mxfp4")


MAKERS = {"gpt_oss": _make}


def _problems(config: Any) -> list[str]:
    """llama.cpp lets the layers slide in turns. Where the stretching of the rotation begins and ends it takes whole
    pairs of rows, as if ``truncate`` were set: the released models do not set it, and everyone runs them so."""
    pattern = [f"{'full' if n % 2 else 'sliding'}_attention" for n in range(config.num_hidden_layers)]
    found = [] if config.layer_types == pattern else ["layer_types isn't a sliding layer and then a full one, in turns"]
    found += [] if config.sliding_window else ["sliding_window is missing"]
    found += unknown_rope(config.rope_parameters, "default", *["yarn"] * bool(config.rope_parameters.get("factor")))
    fixed = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "partial_rotary_factor": 1.0}
    return found + [f"{key} is {config.rope_parameters[key]!r} and llama.cpp computes without"
                    for key, value in fixed.items() if config.rope_parameters.get(key) not in (None, value)]


def _tensors(config: Any) -> tuple[TensorSpec, ...]:
    names = gguf.get_tensor_name_map(_ARCH, config.num_hidden_layers)
    shapes = {EMBEDDING: (config.vocab_size, config.hidden_size),
              **{f"model.layers.{n}.{part}": shape for n in range(config.num_hidden_layers)
                 for part, shape in _layer(config).items()},
              "model.norm.weight": (config.hidden_size,), HEAD: (config.vocab_size, config.hidden_size)}
    return tuple(TensorSpec(_name(names, source), shape, source, tied_to=EMBEDDING if source == HEAD else None,
                            turned=source.endswith(_TURNED)) for source, shape in shapes.items())


def _layer(config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes as in the GGUF."""
    hidden, inner, count = config.hidden_size, config.intermediate_size, config.num_local_experts
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    linear = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
              "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries), "mlp.router": (count, hidden)}
    experts = {"gate_proj": (count, inner, hidden), "up_proj": (count, inner, hidden),
               "down_proj": (count, hidden, inner)}
    return {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,),
            "self_attn.sinks": (config.num_attention_heads,),
            **{f"{part}.weight": shape for part, shape in linear.items()},
            **{f"{part}.bias": shape[:1] for part, shape in linear.items()},
            **{f"mlp.experts.{part}.weight": shape for part, shape in experts.items()},
            **{f"mlp.experts.{part}_bias": shape[:2] for part, shape in experts.items()}}


def _name(names: gguf.TensorNameMap, source: str) -> str | None:
    if source.endswith(".sinks"):
        source += ".weight"
    return names.get_name(source.replace("_proj_bias", "_proj.bias"), (".weight", ".bias"))


def _metadata(config: Any, writer: gguf.GGUFWriter) -> None:
    rope = config.rope_parameters
    writer.add_context_length(config.max_position_embeddings)
    add_sizes(writer, config)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_sliding_window(config.sliding_window)
    add_experts(writer, config.num_local_experts, config.num_experts_per_tok, config.intermediate_size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                         ("beta_slow", writer.add_rope_scaling_yarn_beta_slow)):
            if rope.get(key) is not None:
                add(float(rope[key]))
