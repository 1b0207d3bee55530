"""The eye of Gemma 4, and its ear where it has one: transformers of their own, whose linear layers clip what goes in
and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.base.errors import UserError
from gemma_tune.gguf.architectures.gemma import ACTIVATION, differing
from gemma_tune.gguf.architectures.parts import complete, refuse
from gemma_tune.gguf.projectors import gemma4_audio
from gemma_tune.gguf.projectors.parts import (
    AUDIO,
    VISION,
    Projector,
    TowerTensor,
    add_vision,
    clipped,
    gemmas_source,
    name_of,
    processor_settings,
    three_numbers,
    unusual_pictures,
)

UNUSED_SIZE = 224  # of pictures, which have any here; llama.cpp wants the key
POOLED = 3  # patches to a token's side, for which older llama.cpp has no key
MOST_TOKENS = 280  # of a picture
_BOTH_WAYS = "vision"  # use_bidirectional_attention of the large ones; the small ones' is null
_LOOKS_AHEAD = ("the tokens of a picture see each other in llama.cpp, as in larger models of this family; in this one "
                "each sees those before it alone")


def gemma4(config: Mapping[str, Any], checkpoint: Path) -> Projector:
    """The projector of a Gemma 4: E2B, E4B, 26B-A4B or 31B.

    Raises:
        UserError: settings that llama.cpp has no key for.
    """
    whole, settings = seeing(config, checkpoint / "config.json"), processor_settings(checkpoint)
    vision, audio, text = whole.vision_config, whole.audio_config, whole.get_text_config()
    heard = gemma4_audio.problems(audio, checkpoint) if audio else []
    refuse(checkpoint / "config.json", [*_problems(vision, settings), *heard])

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_clip_vision_projector_type(gguf.VisionProjectorType.GEMMA4V)
        add_vision(writer, text, vision, colours(settings), image_size=UNUSED_SIZE, eps=vision.rms_norm_eps)
        writer.add_vision_use_gelu(True)  # the converter leaves it out, and llama.cpp then takes a coarser GELU
        if vision.pooling_kernel_size != POOLED:
            writer.add_vision_projector_scale_factor(vision.pooling_kernel_size)
        if audio:
            gemma4_audio.add(writer, text, audio)

    tensors = (*_tensors(vision, text), *(gemma4_audio.tensors(audio, text) if audio else ()))
    return Projector((VISION, AUDIO) if audio else (VISION,), tensors, metadata, gemmas_source, ahead(text))


MAKERS = {"gemma4": gemma4}


def seeing(config: Mapping[str, Any], path: Path) -> Any:
    """``config`` as Transformers reads it.

    Raises:
        UserError: it has no eye.
    """
    whole = complete(config, path)
    if whole.vision_config is None:
        raise UserError(f"{path} describes a Gemma 4 that hears and does not see, which llama.cpp knows none of.",
                        "Merge again from the original base model.")
    return whole


def ahead(text: Any) -> tuple[str, ...]:
    """``Projector.differs``, by how the text model's attention reads a picture."""
    return () if text.use_bidirectional_attention == _BOTH_WAYS else (_LOOKS_AHEAD,)


def colours(settings: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and deviation of each colour; by default the model takes them as they are."""
    settings = settings if settings.get("do_normalize") else {}
    return three_numbers(settings, "image_mean", 0.0), three_numbers(settings, "image_std", 1.0)


def sizes_of_pictures(vision: Any) -> dict[str, int]:
    """What the image processor and the model have to agree on, and how large a picture becomes."""
    return {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size,
            "max_soft_tokens": MOST_TOKENS}


def _problems(vision: Any, settings: Mapping[str, Any]) -> list[str]:
    found = differing(vision, hidden_activation=ACTIVATION, num_key_value_heads=vision.num_attention_heads,
                      head_dim=vision.hidden_size // vision.num_attention_heads)
    if vision.rope_parameters != {"rope_type": "axial", "rope_theta": 100.0}:
        found.append(f"rope_parameters are {vision.rope_parameters!r} and llama.cpp rotates axially with theta 100")
    return [*(f"vision_config.{problem}" for problem in found),
            *unusual_pictures(settings, **sizes_of_pictures(vision))]


def _tensors(vision: Any, text: Any) -> Iterator[TowerTensor]:
    hidden, patch = vision.hidden_size, vision.patch_size
    yield TowerTensor("v.patch_embd.weight", "vision_tower.patch_embedder.input_proj.weight", (hidden, 3 * patch ** 2),
                      lambda values: values.reshape(-1, patch, patch, 3).transpose(0, 3, 1, 2))
    yield TowerTensor("v.position_embd.weight", "vision_tower.patch_embedder.position_embedding_table",
                      (2, vision.position_embedding_size, hidden), exact=True)
    for i in range(vision.num_hidden_layers):
        for part, shape in _layer(vision).items():
            name = name_of(f"vision_model.model.layers.{i}.{part}")
            source = f"vision_tower.encoder.layers.{i}.{part}"
            yield from ([TowerTensor(f"{name}.weight", f"{source}.weight", shape)] if len(shape) == 1 else
                        clipped(name, source, shape, vision.use_clipped_linears))
    if vision.standardize:
        for part in ("std_bias", "std_scale"):
            yield TowerTensor(f"v.{part}", f"vision_tower.{part}", (hidden,))
    yield TowerTensor("mm.input_projection.weight", "embed_vision.embedding_projection.weight",
                      (text.hidden_size, hidden))


def _layer(vision: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner, dim = vision.hidden_size, vision.intermediate_size, vision.head_dim
    return {
        "input_layernorm": (hidden,),
        **{f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "o")},
        "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,), "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "post_feedforward_layernorm": (hidden,),
    }  # fmt: skip
