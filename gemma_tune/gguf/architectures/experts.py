"""Feed-forward parts of experts, of which a router chooses some for each token: tensors and metadata in GGUF."""

from __future__ import annotations

from typing import Any

import gguf

from gemma_tune.gguf.architectures.gemma import differing
from gemma_tune.gguf.architectures.parts import TensorSpec

Shapes = dict[str, tuple[int, ...]]  # by name within a layer
# Of matrices that checkpoints have for each expert, Transformers makes two tensors of all: what each is part of.
_JOINED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", None),
           "w1": ("gate_up_proj", 0), "w3": ("gate_up_proj", 1), "w2": ("down_proj", None),
           "gate_proj_bias": ("gate_up_proj_bias", 0), "up_proj_bias": ("gate_up_proj_bias", 1)}


def in_model(source: str) -> tuple[str, int | None]:
    """What Transformers' model calls the tensor that a checkpoint's one is, or is a part of, and which half it is."""
    source = source.replace(".block_sparse_moe.", ".mlp.")
    experts, _, part = source.removesuffix(".weight").rpartition(".")
    if experts.endswith(".experts") and part in _JOINED:
        joined, half = _JOINED[part]
        return f"{experts}.{joined}", half
    return source, None


def columns_of(half: int | None) -> slice:
    """The columns of a tensor of both halves that are those of one, where they take turns; of one alone, all."""
    return slice(None) if half is None else slice(half, None, 2)


def add_experts(writer: gguf.GGUFWriter, count: int, used: int, width: int | None) -> None:
    """How many there are, how many each token meets, and how wide they are, where that is said apart."""
    writer.add_expert_count(count)
    writer.add_expert_used_count(used)
    if width is not None:
        writer.add_expert_feed_forward_length(width)


# ---- Qwen 3 ---------------------------------------------------------------------------------------------------------


def qwen3_moe(config: Any) -> Shapes:
    hidden, count, inner = config.hidden_size, config.num_experts, config.moe_intermediate_size
    return {"mlp.gate.weight": (count, hidden), "mlp.experts.gate_proj.weight": (count, inner, hidden),
            "mlp.experts.up_proj.weight": (count, inner, hidden),
            "mlp.experts.down_proj.weight": (count, hidden, inner)}


def qwen3_moe_problems(config: Any) -> list[str]:
    """llama.cpp expects experts in every layer, and lets the weights of those that are chosen add up to one."""
    dense = [] if not config.mlp_only_layers else [f"mlp_only_layers are {config.mlp_only_layers}"]
    return [*dense, *differing(config, decoder_sparse_step=1, norm_topk_prob=True)]


def add_qwen3_moe(config: Any, writer: gguf.GGUFWriter) -> None:
    add_experts(writer, config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size)


# ---- Qwen 3.5 -------------------------------------------------------------------------------------------------------


def qwen35_moe(config: Any) -> Shapes:
    """With an expert besides that every token meets, as much as a gate of its own says."""
    hidden, inner = config.hidden_size, config.shared_expert_intermediate_size
    shared = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    return {**qwen3_moe(config), "mlp.shared_expert_gate.weight": (1, hidden),
            **{f"mlp.shared_expert.{part}.weight": shape for part, shape in shared.items()}}


def add_qwen35_moe(config: Any, writer: gguf.GGUFWriter) -> None:
    add_qwen3_moe(config, writer)
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


# ---- Mixtral --------------------------------------------------------------------------------------------------------


def mixtral(config: Any) -> Shapes:
    hidden, count, inner = config.hidden_size, config.num_local_experts, config.intermediate_size
    parts = {"gate": (count, hidden), "experts.w1": (count, inner, hidden), "experts.w2": (count, hidden, inner),
             "experts.w3": (count, inner, hidden)}
    return {f"block_sparse_moe.{part}.weight": shape for part, shape in parts.items()}


def add_mixtral(config: Any, writer: gguf.GGUFWriter) -> None:
    add_experts(writer, config.num_local_experts, config.num_experts_per_tok, None)


# ---- Gemma 4 --------------------------------------------------------------------------------------------------------


def count_of_gemma4(text: Any) -> int:
    """How many a layer has beside its dense part; 0 in a dense model."""
    return text.num_experts if getattr(text, "enable_moe_block", False) else 0


def gemma4(text: Any) -> Shapes:
    """What a layer of a Gemma 4 with experts has besides, of a dense one nothing."""
    count = count_of_gemma4(text)
    if not count:
        return {}
    hidden, inner = text.hidden_size, text.moe_intermediate_size
    norms = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
    return {"router.proj.weight": (count, hidden), "experts.gate_up_proj": (count, 2 * inner, hidden),
            "experts.down_proj": (count, hidden, inner), **{f"{norm}.weight": (hidden,) for norm in norms}}


def scales_of_gemma4(text: Any) -> tuple[TensorSpec, ...]:
    """What the router multiplies its input with, and each expert's output; the table of names lacks them."""
    count, names = count_of_gemma4(text), gguf.TENSOR_NAMES
    parts = {"router.scale": (gguf.MODEL_TENSOR.FFN_GATE_INP, text.hidden_size),
             "router.per_expert_scale": (gguf.MODEL_TENSOR.FFN_DOWN_EXP, count)}
    return tuple(TensorSpec(f"{names[tensor].format(bid=n)}.scale", (size,), f"model.layers.{n}.{source}")
                 for n in range(text.num_hidden_layers if count else 0) for source, (tensor, size) in parts.items())


def add_gemma4(text: Any, writer: gguf.GGUFWriter) -> None:
    if count := count_of_gemma4(text):
        add_experts(writer, count, text.top_k_experts, text.moe_intermediate_size)
