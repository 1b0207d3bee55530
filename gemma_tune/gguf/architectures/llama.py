"""The Llama type: Llama and SmolLM2, SmolLM3, Mistral, Mixtral and Ministral 3, Qwen 2, 2.5 and 3 (dense, and 3 with
experts), Granite 3, OLMo 2 and 3, EXAONE 4, GLM 4, Hunyuan and ERNIE 4.5 (dense), InternLM 3 and Seed-OSS, as tensors
and metadata in GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.base.strict_json import object_in
from gemma_tune.gguf.architectures import experts
from gemma_tune.gguf.architectures.gemma import (
    EMBEDDING,
    HEAD,
    differing,
    is_other_part,
    parts_of,
    unknown_rope,
    unusual_heads,
)
from gemma_tune.gguf.architectures.parts import (
    Architecture,
    Change,
    TensorSpec,
    add_sizes,
    complete,
    not_written_here,
    refuse,
)


@dataclass(frozen=True)
class _Kind:
    """What sets one member of the type apart from the others.

    Args:
        arch: as llama.cpp knows it.
        permuted: whether rotated pairs are neighbours in llama.cpp's q and k, see :func:`neighbours`.
        biases: the tensors that have a bias, for a configuration.
        fixed: settings that llama.cpp computes in one way only.
        norms_of: what q and k are normed by: each ``head``, all heads together as one ``row``, or nothing.
        normed: what these norms are called.
        norms: of a layer, before or behind attention and MLP.
        fused: whether the MLP's gate and up are one matrix.
        partial: whether llama.cpp is told how much of a head is rotated.
        slides: whether it knows which layers attend to a window alone, and that these rotate without stretching.
        scales: settings with a key of their own, and how it is added.
        problems: what else llama.cpp would compute otherwise.
        experts: shapes of what a layer has in the place of its MLP, and what adds the keys of them.
    """

    arch: gguf.MODEL_ARCH
    permuted: bool = False
    biases: Callable[[Any], tuple[str, ...]] = lambda config: ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    norms_of: str = ""
    normed: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    fused: bool = False
    partial: bool = False
    slides: bool = False
    scales: Mapping[str, Callable[[gguf.GGUFWriter, float], None]] = field(default_factory=dict)
    problems: Callable[[Any], list[str]] = lambda config: []
    experts: tuple[Callable[[Any], experts.Shapes], Callable[[Any, gguf.GGUFWriter], None]] | None = None


_STRETCHED = 256 * 1024  # the context of Hunyuan's stretched models, of which some configurations say less
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def _llama_biases(config: Any) -> tuple[str, ...]:
    attention = (*_QKV, "self_attn.o_proj") if getattr(config, "attention_bias", False) else ()
    return attention + (("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") if getattr(config, "mlp_bias", False) else ())


def _unrotated(config: Any) -> list[str]:
    """SmolLM3: every fourth layer is not rotated, which llama.cpp has built in."""
    every = [int((n + 1) % 4 != 0) for n in range(config.num_hidden_layers)]
    same = [int(bool(rotated)) for rotated in config.no_rope_layers][:config.num_hidden_layers] == every
    found = [] if same else ["no_rope_layers isn't every fourth layer"]
    return [*found, *differing(config, use_sliding_window=False)]


def _mistral3(config: Any) -> list[str]:
    """Small 3.1 and 3.2, and Ministral 3: llama.cpp works the factor of YaRN's attention out of ``mscale_all_dim``, and
    takes ``mscale`` for 1."""
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return ["llama_4_scaling_beta has no place without YaRN"] if rope.get("llama_4_scaling_beta") else []
    missing = [f"{key} is missing" for key in ("mscale_all_dim", "llama_4_scaling_beta") if not rope.get(key)]
    return missing + [f"{key} is {rope.get(key)!r} and llama.cpp computes with {value!r}"
                      for key, value in (("mscale", 1.0), ("attention_factor", None)) if rope.get(key) != value]


def _olmo3(config: Any) -> list[str]:
    """OLMo 3: the layers with a window rotate without stretching, and llama.cpp knows one base for all."""
    rope, base = config.rope_parameters["sliding_attention"], _rope(config)["rope_theta"]
    found = unusual_heads(config) + ([] if config.sliding_window else ["sliding_window is missing"])
    if rope["rope_type"] != "default":
        found.append(f"rope type {rope['rope_type']!r} of the sliding layers is not one that llama.cpp computes")
    return found if rope["rope_theta"] == base else [
        *found, f"rope_theta of the sliding layers is {rope['rope_theta']!r} and llama.cpp computes with {base!r}"]


_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
_GRANITE = {"attention_multiplier": gguf.GGUFWriter.add_attention_scale,
            "embedding_multiplier": gguf.GGUFWriter.add_embedding_scale,
            "residual_multiplier": gguf.GGUFWriter.add_residual_scale,
            "logits_scaling": gguf.GGUFWriter.add_logit_scale}
_KINDS = {
    "llama": _Kind(gguf.MODEL_ARCH.LLAMA, True, _llama_biases),
    "mistral": _Kind(gguf.MODEL_ARCH.LLAMA, True),
    "ministral3": _Kind(gguf.MODEL_ARCH.MISTRAL3, True, problems=_mistral3),
    "qwen2": _Kind(gguf.MODEL_ARCH.QWEN2, biases=lambda config: _QKV),
    "qwen3": _Kind(gguf.MODEL_ARCH.QWEN3, fixed={"attention_bias": False}, norms_of="head"),
    "qwen3_moe": _Kind(gguf.MODEL_ARCH.QWEN3MOE, fixed={"attention_bias": False}, norms_of="head",
                       problems=experts.qwen3_moe_problems, experts=(experts.qwen3_moe, experts.add_qwen3_moe)),
    "mixtral": _Kind(gguf.MODEL_ARCH.LLAMA, True, experts=(experts.mixtral, experts.add_mixtral)),
    "smollm3": _Kind(gguf.MODEL_ARCH.SMOLLM3, True, _llama_biases, problems=_unrotated),
    "granite": _Kind(gguf.MODEL_ARCH.GRANITE, True, _llama_biases, scales=_GRANITE),
    "olmo2": _Kind(gguf.MODEL_ARCH.OLMO2, fixed={"attention_bias": False, "tie_word_embeddings": False},
                   norms_of="row", norms=_BEHIND, problems=unusual_heads),
    "olmo3": _Kind(gguf.MODEL_ARCH.OLMO2, fixed={"attention_bias": False, "tie_word_embeddings": False},
                   norms_of="row", norms=_BEHIND, slides=True, problems=_olmo3),
    "exaone4": _Kind(gguf.MODEL_ARCH.EXAONE4, fixed={"sliding_window": None}, norms_of="head", norms=_BEHIND,
                     problems=unusual_heads),
    "internlm3": _Kind(gguf.MODEL_ARCH.LLAMA, True, _llama_biases),
    "ernie4_5": _Kind(gguf.MODEL_ARCH.ERNIE4_5, fixed={"use_bias": False}),
    "seed_oss": _Kind(gguf.MODEL_ARCH.SEED_OSS, biases=lambda config: _QKV if config.attention_bias else (),
                      fixed={"attention_out_bias": False, "mlp_bias": False}),
    "hunyuan_v1_dense": _Kind(gguf.MODEL_ARCH.HUNYUAN_DENSE, fixed={"attention_bias": False}, norms_of="head",
                              normed=("self_attn.query_layernorm", "self_attn.key_layernorm")),
    "glm4": _Kind(gguf.MODEL_ARCH.GLM4, biases=lambda config: _QKV if config.attention_bias else (), partial=True,
                  norms=("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm",
                         "post_mlp_layernorm"), fused=True),
    "glm": _Kind(gguf.MODEL_ARCH.CHATGLM, biases=lambda config: _QKV if config.attention_bias else (), partial=True,
                 fused=True),
}


def _make(kind: _Kind, config: Mapping[str, Any], path: Path) -> Architecture:
    """A model of one `kind`.

    Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    text = whole.get_text_config()
    heads = text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    refuse(path, [*differing(text, hidden_act="silu", is_causal=True, **kind.fixed), *_rope_problems(kind, text),
                  *kind.problems(text)])
    # The length of a head goes into a key of its own where it is said, or isn't the usual one.
    said = config.get("text_config", config).get("head_dim")
    stated = dim if said or dim * heads != text.hidden_size else None
    # Old checkpoints store what follows from the configuration.
    parts = parts_of(whole, text) | {
        "left_out": lambda name: name.endswith(".rotary_emb.inv_freq") or is_other_part(name)}
    return Architecture(gguf.MODEL_ARCH_NAMES[kind.arch], _tensors(kind, text, dim),
                        partial(_metadata, kind, text, dim, stated), tokenizer_kind(path.parent), text.vocab_size,
                        text.num_hidden_layers, heads, text.num_key_value_heads, tied=whole.tie_word_embeddings,
                        context=shorter_context(text, _context(kind, text)),
                        experts=text.num_local_experts if kind.experts else 0,
                        experts_used=text.num_experts_per_tok if kind.experts else 0, **parts)


def _text_of_mistral3(config: Mapping[str, Any], path: Path) -> Architecture:
    """The text part of a repository with pictures, which may be of the older type as well."""
    kind = complete(config, path).get_text_config().model_type
    if kind not in ("mistral", "ministral3"):
        raise not_written_here(path, f"a Mistral 3 with {kind}")
    return _make(_KINDS["ministral3"], config, path)


MAKERS = {**{model_type: partial(_make, kind) for model_type, kind in _KINDS.items()}, "mistral3": _text_of_mistral3}


def tokenizer_kind(checkpoint: Path) -> str:
    """The kind of vocabulary: Llama 2 and the first Mistrals have SentencePiece's, whose BPE falls back to bytes."""
    try:
        model = dict(object_in(checkpoint / "tokenizer.json")["model"])
    except (OSError, ValueError, KeyError, TypeError):  # whoever reads the vocabulary says what is wrong
        return "sentencepiece-llama" if (checkpoint / "tokenizer.model").is_file() else "bpe"
    return "sentencepiece-llama" if model.get("byte_fallback") else "bpe"


def neighbours(dim: int) -> Change:
    """The order of rows in q and k: Transformers rotates row i of a head with row i + dim/2, llama.cpp's ``llama``
    the rows 2i and 2i + 1. (Meta's own weights are in the second order.)"""
    def forward(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 2, dim // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

    def backward(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, dim // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)

    return Change(forward, backward, rows=dim)


def _tensors(kind: _Kind, config: Any, dim: int) -> tuple[TensorSpec, ...]:
    """Every tensor, in the order in which they are written."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * dim, config.num_key_value_heads * dim
    normed = {"head": (dim, dim), "row": (queries, keys)}.get(kind.norms_of, ())
    block = {
        **dict.fromkeys(kind.norms, (hidden,)),
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries),
        **{part: (size,) for part, size in zip(kind.normed, normed)},
        **_mlp(kind, hidden, inner),
    }  # fmt: skip
    parts = {f"{part}.weight": shape for part, shape in block.items()}
    parts |= kind.experts[0](config) if kind.experts else {}
    parts |= {f"{part}.bias": block[part][:1] for part in kind.biases(config)}
    shapes = {
        EMBEDDING: (config.vocab_size, hidden),
        **{f"model.layers.{i}.{part}": shape for i in range(config.num_hidden_layers) for part, shape in parts.items()},
        "model.norm.weight": (hidden,),
        HEAD: (config.vocab_size, hidden),
    }
    names, change = gguf.get_tensor_name_map(kind.arch, config.num_hidden_layers), neighbours(dim)
    specs = tuple(TensorSpec(names.get_name(source, (".weight", ".bias")), shape, source,
                             change if kind.permuted and (".q_proj." in source or ".k_proj." in source) else None,
                             tied_to=EMBEDDING if source == HEAD else None)
                  for source, shape in shapes.items())
    if _rope(config)["rope_type"] != "llama3":
        return specs
    return (TensorSpec("rope_freqs.weight", (dim // 2,), values=_llama3_divisors(_rope(config), dim)), *specs)


def _mlp(kind: _Kind, hidden: int, inner: int) -> dict[str, tuple[int, int]]:
    """The matrices of an MLP; a kind with experts says itself what it has in its place."""
    if kind.experts:
        return {}
    gates = {"gate_up_proj": 2 * inner} if kind.fused else {"gate_proj": inner, "up_proj": inner}
    return {**{f"mlp.{part}": (rows, hidden) for part, rows in gates.items()}, "mlp.down_proj": (hidden, inner)}


def _rope(config: Any) -> Mapping[str, Any]:
    """How the layers rotate that attend to everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def _alpha(kind: _Kind, config: Any) -> float | None:
    """What Hunyuan's base of the rotation is stretched by, once for all lengths: it calls that dynamic."""
    rope = _rope(config)
    return rope.get("alpha") if kind.arch == gguf.MODEL_ARCH.HUNYUAN_DENSE and rope["rope_type"] == "dynamic" else None


def _llama3_divisors(rope: Mapping[str, Any], dim: int) -> np.ndarray:
    """What Llama 3.1 divides each of its dim/2 frequencies by: 1 for short waves, `factor` for long ones, and between
    the two a mean of the frequencies, weighted by how many waves fit the original context.

    As in Meta's ``apply_scaling`` (llama-models, models/llama3/model.py) and Transformers' ``llama3`` rope type.

    Returns:
        float32 (dim/2,).
    """
    steps = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    length = np.float32(2 * math.pi) * np.float32(rope["rope_theta"]) ** steps  # of the wave, in tokens
    factor, low, high = (np.float32(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = np.float32(rope["original_max_position_embeddings"])
    part = (original / length - low) / (high - low)
    divisors = 1 / ((1 - part) / factor + part)
    return np.where(length < original / high, 1, np.where(length > original / low, factor, divisors)).astype(np.float32)


def _rope_problems(kind: _Kind, config: Any) -> list[str]:
    rope = _rope(config)
    # llama.cpp reads the divisors of Llama 3.1 for some architectures only.
    divided = ["llama3"] if kind.arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.EXAONE4) else []
    found = [] if _alpha(kind, config) else unknown_rope(rope, "default", "linear", "yarn", *divided)
    fixed = ({} if kind.partial else {"partial_rotary_factor": 1}) | {"truncate": True, "beta_fast": 32, "beta_slow": 1}
    return found + [f"{key} is {rope[key]!r} and llama.cpp computes with {value!r}" for key, value in fixed.items()
                    if rope.get(key) not in (None, value)]


def context_length(config: Any) -> int:
    """The longest context that llama.cpp computes as Transformers does: it knows no sliding window for these models,
    and within the window there is no difference."""
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "sliding_window", None) and (kinds is None or "sliding_attention" in kinds)
    return min(config.max_position_embeddings, config.sliding_window) if slides else config.max_position_embeddings


def _context(kind: _Kind, config: Any) -> int:
    return config.max_position_embeddings if kind.slides else context_length(config)


def shorter_context(config: Any, known: int) -> int | None:
    """The context that llama.cpp computes as Transformers does, where that is shorter than the model's own."""
    return known if known < config.max_position_embeddings else None


def _metadata(kind: _Kind, config: Any, dim: int, stated_dim: int | None, writer: gguf.GGUFWriter) -> None:
    alpha = _alpha(kind, config)
    writer.add_context_length(_STRETCHED if alpha else _context(kind, config))
    add_sizes(writer, config)
    if stated_dim is not None:
        writer.add_key_length(stated_dim)
        writer.add_value_length(stated_dim)
    if kind.permuted or kind.arch == gguf.MODEL_ARCH.EXAONE4:
        writer.add_vocab_size(config.vocab_size)
    if kind.permuted or kind.partial:
        writer.add_rope_dimension_count(int(dim * _rope(config).get("partial_rotary_factor", 1.0)))
    for key, add in kind.scales.items():
        add(writer, float(getattr(config, key)))
    if kind.slides:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([each == "sliding_attention" for each in config.layer_types])
        writer.add_rope_freq_base_swa(float(config.rope_parameters["sliding_attention"]["rope_theta"]))
    if kind.experts:
        kind.experts[1](config, writer)
    rope = _rope(config)
    writer.add_rope_freq_base(float(rope["rope_theta"]) * (alpha ** (dim / (dim - 2)) if alpha else 1))
    if alpha:
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_factor(1.0)
        writer.add_rope_scaling_orig_ctx_len(_STRETCHED)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        _add_yarn(kind, rope, config.max_position_embeddings, writer)


def _add_yarn(kind: _Kind, rope: Mapping[str, Any], max_positions: int, writer: gguf.GGUFWriter) -> None:
    original = rope["original_max_position_embeddings"]
    factor = float(rope["factor"] or max_positions / original)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original)
    attention = _attention_factor(rope, factor)
    if kind.arch == gguf.MODEL_ARCH.MISTRAL3:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    elif attention is not None:
        # llama.cpp multiplies the factor of the paper by this one, Transformers puts its own in the place of it.
        writer.add_rope_scaling_attn_factors(attention / _mscale(factor))


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float | None:
    """What scales the rotated q and k, where it isn't YaRN's own 0.1 ln(factor) + 1 (arXiv 2309.00071, eq. 22)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _mscale(factor, rope["mscale"]) / _mscale(factor, rope["mscale_all_dim"])
    return None


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
