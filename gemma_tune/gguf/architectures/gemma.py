"""Gemma 1, 2 and 3: tensors and metadata in GGUF, and the settings that llama.cpp computes in one way only."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.gguf.architectures.parts import PLUS_ONE, Architecture, Change, TensorSpec, add_sizes, complete, refuse

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ACTIVATION = "gelu_pytorch_tanh"
THETA = 10_000.0  # what llama.cpp rotates by when a file has no rope.freq_base
# Their layers alternate like this: older llama.cpp and Ollama have the number built in, and there is no key for it.
SWA_PERIOD = {"gemma2": 2, "gemma3": 6}
# llama.cpp knows the largest model by its layers, and scales its attention by the hidden size instead of head_dim.
_SCALED_BY_HIDDEN_SIZE = {"gemma2": 46, "gemma3": 62}
# Where a repository holds more than the text model: its text part under either name, and the other parts.
_TEXT_PART = re.compile(r"model\.language_model\.|language_model\.model\.|language_model\.(?=lm_head\.)")
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|audio_tower|multi_modal_projector|vision_embedder|embed_vision|embed_audio)\.")


def gemma1(config: Mapping[str, Any], path: Path) -> Architecture:
    """The first Gemma, and CodeGemma.

    Raises:
        UserError: settings that llama.cpp has no key for, here and in the other makers.
    """
    return _make("gemma", complete(config, path), path, _rope_problems, _add_rope)


def gemma2(config: Mapping[str, Any], path: Path) -> Architecture:
    """Gemma 2, with its capped logits."""
    def add(text: Any, writer: gguf.GGUFWriter) -> None:
        _add_rope(text, writer)
        writer.add_attn_logit_softcapping(text.attn_logit_softcapping)
        writer.add_final_logit_softcapping(text.final_logit_softcapping)
        writer.add_sliding_window(text.sliding_window)

    def problems(text: Any) -> list[str]:
        uncapped = [f"{key} is {getattr(text, key)!r} and llama.cpp always caps"
                    for key in ("attn_logit_softcapping", "final_logit_softcapping") if not getattr(text, key)]
        return [*_rope_problems(text), *_sliding_problems("gemma2", text), *_scalar_problems("gemma2", text), *uncapped]

    return _make("gemma2", complete(config, path), path, problems, add)


def gemma3(config: Mapping[str, Any], path: Path) -> Architecture:
    """Gemma 3, text only or the text part of a multimodal model."""
    def add(text: Any, writer: gguf.GGUFWriter) -> None:
        full, sliding = text.rope_parameters["full_attention"], text.rope_parameters["sliding_attention"]
        writer.add_sliding_window(text.sliding_window)
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_rope_freq_base_swa(sliding["rope_theta"])
        if full["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(full["factor"]))

    def problems(text: Any) -> list[str]:
        full, sliding = text.rope_parameters["full_attention"], text.rope_parameters["sliding_attention"]
        found = [*_sliding_problems("gemma3", text), *_scalar_problems("gemma3", text),
                 *differing(text, attn_logit_softcapping=None, final_logit_softcapping=None)]
        if full["rope_type"] != "default" and not (full["rope_type"] == "linear" and full.get("factor")):
            found.append(f"rope type {full['rope_type']!r} with factor {full.get('factor')!r} is not one that Gemma 3 "
                         "uses")
        if sliding["rope_type"] != "default":
            found.append(f"rope type {sliding['rope_type']!r} of the sliding layers is not one that Gemma 3 uses")
        return found

    return _make("gemma3", complete(config, path), path, problems, add)


MAKERS = {"gemma": gemma1, "gemma2": gemma2, "gemma3_text": gemma3, "gemma3": gemma3}


def _make(name: str, whole: Any, path: Path, problems: Callable[[Any], list[str]],
          add: Callable[[Any, gguf.GGUFWriter], None]) -> Architecture:
    """An architecture of `name`; `problems` finds what llama.cpp would compute differently, `add` adds the keys that
    not all have."""
    text = whole.get_text_config()
    activation = "hidden_act" if name == "gemma" else "hidden_activation"
    refuse(path, [*differing(text, attention_bias=False, use_bidirectional_attention=False, **{activation: ACTIVATION}),
                  *problems(text)])

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_context_length(text.max_position_embeddings)
        add_sizes(writer, text)
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
        add(text, writer)

    tensors = named(gguf.MODEL_ARCH[name.upper()], text, _shapes(name, text), PLUS_ONE)
    return Architecture(name, tensors, metadata, "sentencepiece", text.vocab_size, text.num_hidden_layers,
                        text.num_attention_heads, text.num_key_value_heads, tied=whole.tie_word_embeddings,
                        own_head=name == "gemma3", **parts_of(whole, text))


def parts_of(whole: Any, text: Any) -> dict[str, Any]:
    """How to tell the text model's tensors in a checkpoint of ``whole``, for `Architecture`."""
    return {"left_out": is_other_part} | ({} if whole is text else {"canonical": canonical})


def is_other_part(name: str) -> bool:
    """Whether a tensor is of what sees or hears. Checkpoints have some left over whose configuration, since they were
    taken apart, describes the text model alone; transformers passes them over as well."""
    return _OTHER_PARTS.match(name) is not None


def canonical(name: str) -> str:
    """A tensor's name in a multimodal checkpoint → in a text model: ``model.layers…`` or ``lm_head.weight``."""
    head = name.endswith("lm_head.weight")
    return _TEXT_PART.sub("" if head else "model.", name, count=1) if _TEXT_PART.match(name) else name


def differing(text: Any, **fixed: Any) -> list[str]:
    """Settings that llama.cpp has no key for and computes in one way only, where they differ from it."""
    return [f"{key} is {found!r} and llama.cpp computes with {value!r}" for key, value in fixed.items()
            if (found := getattr(text, key, value)) != value and (found or value)]


def unknown_rope(rope: Mapping[str, Any], *known: str) -> list[str]:
    """A rotation that is stretched in another way than those that llama.cpp computes for this model."""
    kind = rope["rope_type"]
    return [] if kind in known else [f"rope type {kind!r} is not one that llama.cpp computes for this model"]


def unusual_heads(text: Any) -> list[str]:
    """Heads of another length than llama.cpp works out from the hidden size, where it reads no key for it."""
    usual = text.hidden_size // text.num_attention_heads
    return [] if getattr(text, "head_dim", None) is None else differing(text, head_dim=usual)


def unread_keys(text: Any) -> frozenset[str]:
    """Keys and values of the layers that use an earlier layer's, of Gemma 3n and 4: the original files hold them, and
    nothing reads them."""
    own = text.num_hidden_layers - text.num_kv_shared_layers
    return frozenset(f"model.layers.{i}.self_attn.{part}.weight" for i in range(own, text.num_hidden_layers)
                     for part in ("k_proj", "v_proj", "k_norm"))


def _sliding_problems(name: str, text: Any) -> list[str]:
    """Whether every so-manieth layer attends to everything and the others to a window."""
    period = SWA_PERIOD[name]
    pattern = [f"{'full' if (i + 1) % period == 0 else 'sliding'}_attention" for i in range(text.num_hidden_layers)]
    found = [] if text.layer_types == pattern else [
        f"layer_types isn't {period - 1} sliding layers and then a full one, over and over"]
    return found if text.sliding_window else [*found, "sliding_window is missing"]


def _scalar_problems(name: str, text: Any) -> list[str]:
    largest = text.num_hidden_layers == _SCALED_BY_HIDDEN_SIZE[name]
    return differing(text, query_pre_attn_scalar=text.hidden_size // text.num_attention_heads if largest
                     else text.head_dim)


def _rope_problems(text: Any) -> list[str]:
    kind = text.rope_parameters["rope_type"]
    return [] if kind == "default" else [f"rope type {kind!r} is not one that this model uses"]


def _add_rope(text: Any, writer: gguf.GGUFWriter) -> None:
    if text.rope_parameters["rope_theta"] != THETA:
        writer.add_rope_freq_base(text.rope_parameters["rope_theta"])


def _shapes(name: str, text: Any) -> dict[str, tuple[int, ...]]:
    """Source → shape of every tensor, in the order in which they are written."""
    hidden, inner, dim = text.hidden_size, text.intermediate_size, text.head_dim
    queries, keys = text.num_attention_heads * dim, text.num_key_value_heads * dim
    sandwich = name != "gemma"  # norms on both sides of attention and feed-forward
    block = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        **({"self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,)} if name == "gemma3" else {}),
        "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,),
        **({"pre_feedforward_layernorm": (hidden,)} if sandwich else {}),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        **({"post_feedforward_layernorm": (hidden,)} if sandwich else {}),
    }  # fmt: skip
    return in_layers(text, block)


def in_layers(text: Any, block: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Source → shape of every tensor of a model whose layers are all alike: ``block`` has the weights of one."""
    hidden = text.hidden_size
    return {
        EMBEDDING: (text.vocab_size, hidden),
        **{f"model.layers.{i}.{part}.weight": shape
           for i in range(text.num_hidden_layers) for part, shape in block.items()},
        "model.norm.weight": (hidden,),
        HEAD: (text.vocab_size, hidden),
    }


def named(arch: gguf.MODEL_ARCH, text: Any, shapes: Mapping[str, tuple[int, ...]], norm: Change | None,
          optional: Callable[[str], bool] = lambda source: False) -> tuple[TensorSpec, ...]:
    """A spec for each source, under llama.cpp's names, from its ``gguf`` package; ``norm`` is what changes norms."""
    names = gguf.get_tensor_name_map(arch, text.num_hidden_layers)

    def name(source: str) -> str:
        if source == HEAD:  # the map lacks it where llama.cpp has no head but the embedding
            return gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.OUTPUT] + ".weight"
        return names.get_name(source.removesuffix(".weight") + ".weight", (".weight",))

    return tuple(TensorSpec(name(source), shape, source, norm if source.endswith("norm.weight") else None,
                            tied_to=EMBEDDING if source == HEAD else None, optional=optional(source))
                 for source, shape in shapes.items())
