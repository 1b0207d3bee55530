"""Qwen 3.5 and 3.6 (of multimodal repositories the text model) in GGUF: most layers have linear attention.

Such a layer has a state of its own for each of its value heads (Gated DeltaNet, arXiv 2412.06464). Where several of
them share a key head, llama.cpp expects them in another order: the first of each key head, then the second of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures import experts
from gemma_tune.gguf.architectures.gemma import EMBEDDING, HEAD, canonical, differing, unknown_rope
from gemma_tune.gguf.architectures.parts import (
    FLAT,
    PLUS_ONE,
    SIZES,
    Architecture,
    Change,
    TensorSpec,
    add_sizes,
    complete,
    refuse,
)

_LINEAR, _FULL = "linear_attention", "full_attention"
_SECTIONS = [11, 11, 10]  # of a rotation in space; in a text all of them turn alike
# Where pictures are seen, and what guesses several tokens ahead, which no answer depends on.
_OTHER_PARTS = ("model.visual.", "visual.", "mtp.", "model.mtp.")


def _make(config: Mapping[str, Any], path: Path) -> Architecture:
    """Raises:
        UserError: settings that llama.cpp has no key for and computes differently.
    """
    whole = complete(config, path)
    text = whole.get_text_config()
    refuse(path, _problems(text))
    arch = gguf.MODEL_ARCH.QWEN35MOE if _count(text) else gguf.MODEL_ARCH.QWEN35
    return Architecture(gguf.MODEL_ARCH_NAMES[arch], _tensors(arch, text), partial(_metadata, text), "bpe",
                        text.vocab_size, text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads,
                        tied=whole.tie_word_embeddings, canonical=canonical,
                        left_out=lambda name: name.startswith(_OTHER_PARTS), experts=_count(text),
                        experts_used=getattr(text, "num_experts_per_tok", 0))


MAKERS = dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _make)


def _count(text: Any) -> int:
    """Experts of a layer; 0 in a dense model."""
    return getattr(text, "num_experts", 0)


def _problems(text: Any) -> list[str]:
    pattern = [_FULL if (n + 1) % _interval(text) == 0 else _LINEAR for n in range(text.num_hidden_layers)]
    found = differing(text, hidden_act="silu", attention_bias=False)
    if list(text.layer_types) != pattern:
        found.append("layer_types isn't linear layers and then a full one, over and over")
    if text.linear_key_head_dim != text.linear_value_head_dim:
        found.append(f"linear_value_head_dim is {text.linear_value_head_dim} and llama.cpp computes with that of keys, "
                     f"{text.linear_key_head_dim}")
    return found + unknown_rope(text.rope_parameters, "default")


def _interval(text: Any) -> int:
    """The number of the first layer with full attention, which every so-manieth is."""
    return list(text.layer_types).index(_FULL) + 1 if _FULL in text.layer_types else text.num_hidden_layers + 1


def _tensors(arch: gguf.MODEL_ARCH, text: Any) -> tuple[TensorSpec, ...]:
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)
    hidden = text.hidden_size
    found = [(EMBEDDING, (text.vocab_size, hidden), None), ("model.norm.weight", (hidden,), PLUS_ONE)]
    for n, kind in enumerate(text.layer_types):
        parts = _both(text) | (_linear(text) if kind == _LINEAR else _full(text))
        found += [(f"model.layers.{n}.{part}", shape, change) for part, (shape, change) in parts.items()]
    found.append((HEAD, (text.vocab_size, hidden), None))
    # The table of names knows the bias of the time step as Mamba has it.
    known = [source.replace(".dt_bias", ".dt_proj.bias") for source, _, _ in found]
    return tuple(TensorSpec(names.get_name(name, (".weight", ".bias")), shape, source, change,
                            tied_to=EMBEDDING if source == HEAD else None)
                 for name, (source, shape, change) in zip(known, found))


_Parts = dict[str, tuple[tuple[int, ...], Change | None]]


def _both(text: Any) -> _Parts:
    norms: _Parts = {f"{norm}.weight": ((text.hidden_size,), PLUS_ONE)
                     for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes = experts.qwen35_moe(text) if _count(text) else _dense(text)
    return norms | {part: (shape, None) for part, shape in shapes.items()}


def _dense(text: Any) -> experts.Shapes:
    hidden, inner = text.hidden_size, text.intermediate_size
    return {"mlp.gate_proj.weight": (inner, hidden), "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner)}


def _full(text: Any) -> _Parts:
    """Attention, whose q holds a gate for each head as well."""
    hidden, dim = text.hidden_size, text.head_dim
    queries, keys = text.num_attention_heads * dim, text.num_key_value_heads * dim
    return {"self_attn.q_proj.weight": ((2 * queries, hidden), None), "self_attn.k_proj.weight": ((keys, hidden), None),
            "self_attn.v_proj.weight": ((keys, hidden), None), "self_attn.o_proj.weight": ((hidden, queries), None),
            "self_attn.q_norm.weight": ((dim,), PLUS_ONE), "self_attn.k_norm.weight": ((dim,), PLUS_ONE)}


def _linear(text: Any) -> _Parts:
    hidden, dim, heads = text.hidden_size, text.linear_value_head_dim, text.linear_num_value_heads
    keys, values = text.linear_num_key_heads * text.linear_key_head_dim, heads * dim
    order = _Order(text.linear_num_key_heads, heads)
    mixed = 2 * keys + values
    return {f"linear_attn.{part}": found for part, found in {
        "in_proj_qkv.weight": ((mixed, hidden), order.rows(dim, 2 * keys)),
        "in_proj_z.weight": ((values, hidden), order.rows(dim)),
        "in_proj_b.weight": ((heads, hidden), order.rows(1)), "in_proj_a.weight": ((heads, hidden), order.rows(1)),
        "conv1d.weight": ((mixed, text.linear_conv_kernel_dim), order.kernels(dim, 2 * keys)),
        "A_log": ((heads,), order.decay()), "dt_bias": ((heads,), order.rows(1)), "norm.weight": ((dim,), None),
        "out_proj.weight": ((hidden, values), order.columns(dim))}.items()}


class _Order:
    """The order of the value heads in llama.cpp: of all key heads the first, then the second …

    Args:
        keys, values: heads.
    """

    def __init__(self, keys: int, values: int):
        self._of_key = np.arange(values).reshape(keys, -1)
        self._same = keys == values

    def _indices(self, dim: int, before: int = 0) -> np.ndarray:
        """int (before + values * dim,): where each row comes from; the first ``before`` stay."""
        heads = self._of_key.T.reshape(-1, 1) * dim + np.arange(dim)
        return np.concatenate([np.arange(before), before + heads.reshape(-1)])

    def rows(self, dim: int, before: int = 0) -> Change | None:
        """Of heads of ``dim`` rows, behind ``before`` other rows."""
        if self._same:
            return None
        taken = self._indices(dim, before)
        back = np.argsort(taken)
        return Change(lambda values: values[taken], lambda values: values[back], rows=len(taken))

    def columns(self, dim: int) -> Change | None:
        """Of heads of ``dim`` columns."""
        if self._same:
            return None
        taken = self._indices(dim)
        back = np.argsort(taken)
        return Change(lambda values: values[:, taken], lambda values: values[:, back], one_way=True)

    def kernels(self, dim: int, before: int) -> Change:
        """Of a convolution, (rows, 1, width) in the checkpoint and (rows, width) in the GGUF."""
        if self._same:
            return FLAT
        taken = self._indices(dim, before)
        back = np.argsort(taken)
        return Change(lambda values: values.reshape(len(values), -1)[taken],
                      lambda values: values[back].reshape(len(values), 1, -1), rows=len(taken), one_way=True)

    def decay(self) -> Change:
        """Of what each head forgets: a logarithm in the checkpoint, the negative number in the GGUF."""
        taken = self._of_key.T.reshape(-1)
        back = np.argsort(taken)
        return Change(lambda values: -np.exp(values[taken].astype(np.float64)).astype(np.float32),
                      lambda values: np.log(-values)[back], one_way=True)


def _metadata(text: Any, writer: gguf.GGUFWriter) -> None:
    writer.add_context_length(text.max_position_embeddings)
    # Of experts, that of a dense part need not be said.
    add_sizes(writer, text, [key for key in SIZES if getattr(text, key, None) is not None])
    if _count(text):
        experts.add_qwen35_moe(text, writer)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    rope = text.rope_parameters
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_rope_dimension_count(int(text.head_dim * rope.get("partial_rotary_factor", 0.25)))
    writer.add_rope_dimension_sections([*(rope.get("mrope_section") or _SECTIONS), 0])
    writer.add_full_attention_interval(_interval(text))
    writer.add_ssm_conv_kernel(text.linear_conv_kernel_dim)
    writer.add_ssm_state_size(text.linear_key_head_dim)
    writer.add_ssm_group_count(text.linear_num_key_heads)
    writer.add_ssm_time_step_rank(text.linear_num_value_heads)
    writer.add_ssm_inner_size(text.linear_value_head_dim * text.linear_num_value_heads)
