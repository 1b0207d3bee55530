"""The eye of Gemma 3: a SigLIP tower, whose patches are averaged into fewer tokens and projected."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.gguf.architectures.gemma import ACTIVATION, differing
from gemma_tune.gguf.architectures.parts import complete, refuse
from gemma_tune.gguf.projectors.parts import (
    VISION,
    Projector,
    TowerTensor,
    add_vision,
    gemmas_source,
    name_of,
    processor_settings,
    three_numbers,
    unusual_pictures,
)

_HEAD = "vision_tower.head."  # SigLIP's own, which Gemma does without
_USUAL_SCALE = 4  # patches to a token's side, for which older llama.cpp has no key


def gemma3(config: Mapping[str, Any], checkpoint: Path) -> Projector:
    """The projector of a Gemma 3 of 4B, 12B or 27B.

    Raises:
        UserError: settings that llama.cpp has no key for.
    """
    whole, settings = complete(config, checkpoint / "config.json"), processor_settings(checkpoint)
    refuse(checkpoint / "config.json", _problems(whole, settings))
    colours = three_numbers(settings, "image_mean", 0.5), three_numbers(settings, "image_std", 0.5)

    def metadata(writer: gguf.GGUFWriter) -> None:
        vision = whole.vision_config
        writer.add_clip_projector_type(gguf.VisionProjectorType.GEMMA3)
        add_vision(writer, whole.get_text_config(), vision, colours, image_size=vision.image_size,
                   eps=vision.layer_norm_eps)
        writer.add_vision_use_gelu(True)
        if (scale := _scale(whole)) != _USUAL_SCALE:
            writer.add_vision_projector_scale_factor(scale)

    return Projector((VISION,), _tensors(whole), metadata, _source)


MAKERS = {"gemma3": gemma3}


def _problems(whole: Any, settings: Mapping[str, Any]) -> list[str]:
    vision = whole.vision_config
    if vision.model_type != "siglip_vision_model":
        return [f"vision_config is a {vision.model_type} and llama.cpp computes a SigLIP"]
    found = [f"vision_config.{problem}" for problem in differing(vision, hidden_act=ACTIVATION, num_channels=3)]
    side, tokens = vision.image_size // vision.patch_size, isqrt(whole.mm_tokens_per_image)
    if not tokens or tokens ** 2 != whole.mm_tokens_per_image or side % tokens or vision.image_size % vision.patch_size:
        found.append(f"the {side} patches of {vision.patch_size} to a side of vision_config.image_size "
                     f"{vision.image_size} are not averaged into a square of mm_tokens_per_image, "
                     f"{whole.mm_tokens_per_image}")
    return found + unusual_pictures(
        settings, do_normalize=True, do_pan_and_scan=False, image_seq_length=whole.mm_tokens_per_image)


def _scale(whole: Any) -> int:
    """Patches to a token's side."""
    return whole.vision_config.image_size // whole.vision_config.patch_size // isqrt(whole.mm_tokens_per_image)


def _source(name: str) -> str | None:
    """Repositories put the tower's parts one level deeper than Transformers 5 does."""
    source = gemmas_source(name)
    source = source and source.replace("vision_tower.vision_model.", "vision_tower.", 1)
    return None if source and source.startswith(_HEAD) else source


def _tensors(whole: Any) -> tuple[TowerTensor, ...]:
    vision = whole.vision_config
    hidden, text, patch = vision.hidden_size, whole.get_text_config().hidden_size, vision.patch_size

    def tensor(source: str, kind: str, *shape: int) -> TowerTensor:
        """``kind``: ``weight`` or ``bias``."""
        name = name_of(f"vision_tower.vision_model.{source}")
        return TowerTensor(f"{name}.{kind}", f"vision_tower.{source}.{kind}", shape, exact="embeddings" in source)

    def both(source: str, *shape: int) -> tuple[TowerTensor, TowerTensor]:
        return tensor(source, "weight", *shape), tensor(source, "bias", shape[0])

    first = (*both("embeddings.patch_embedding", hidden, vision.num_channels, patch, patch),
             tensor("embeddings.position_embedding", "weight", (vision.image_size // patch) ** 2, hidden))
    layers = (part for i in range(vision.num_hidden_layers) for source, shape in _layer(vision).items()
              for part in both(f"encoder.layers.{i}.{source}", *shape))
    return (*first, *layers, *both("post_layernorm", hidden),
            TowerTensor("mm.soft_emb_norm.weight", "multi_modal_projector.mm_soft_emb_norm.weight", (hidden,),
                        lambda values: values + 1),
            TowerTensor("mm.input_projection.weight", "multi_modal_projector.mm_input_projection_weight",
                        (hidden, text)))


def _layer(vision: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    return {"layer_norm1": (hidden,), **{f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")},
            "layer_norm2": (hidden,), "mlp.fc1": (inner, hidden), "mlp.fc2": (hidden, inner)}
