"""What Gemma 4 12B sees and hears with: no towers, but a layer or two that pieces of pictures and sounds go through as
they are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures.gemma import differing
from gemma_tune.gguf.architectures.parts import refuse
from gemma_tune.gguf.projectors.gemma4 import POOLED, UNUSED_SIZE, ahead, colours, seeing, sizes_of_pictures
from gemma_tune.gguf.projectors.gemma4_audio import BINS
from gemma_tune.gguf.projectors.parts import (
    AUDIO,
    VISION,
    Projector,
    TowerTensor,
    add_audio,
    add_vision,
    as_it_is,
    gemmas_source,
    processor_settings,
    unusual,
    unusual_pictures,
)

EAR, EYE = "gemma4ua", "gemma4uv"  # llama.cpp's names, which older versions of its Python package lack
_HEARD = 640  # numbers of a waveform that become one token; llama.cpp has it built in
_COLOURS = 3
_NAMES = {"patch_ln1": "v.patch_norm.1", "patch_dense": "v.patch_embd", "patch_ln2": "v.patch_norm.2",
          "pos_norm": "v.patch_norm.3"}


def gemma4_unified(config: Mapping[str, Any], checkpoint: Path) -> Projector:
    """The projector of a Gemma 4 12B.

    Raises:
        UserError: settings that llama.cpp has no key for.
    """
    whole, settings = seeing(config, checkpoint / "config.json"), processor_settings(checkpoint)
    vision, audio, text = whole.vision_config, whole.audio_config, whole.get_text_config()
    refuse(checkpoint / "config.json", [*unusual_pictures(settings, **sizes_of_pictures(vision)),
                                        *(_unheard(audio, checkpoint) if audio else ())])

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_clip_vision_projector_type(EYE)
        tower = SimpleNamespace(patch_size=vision.patch_size, hidden_size=vision.mm_embed_dim, intermediate_size=0,
                                num_hidden_layers=0, num_attention_heads=0)
        add_vision(writer, text, tower, colours(settings), image_size=UNUSED_SIZE, eps=vision.rms_norm_eps)
        if vision.pooling_kernel_size != POOLED:
            writer.add_vision_projector_scale_factor(vision.pooling_kernel_size)
        if audio:
            writer.add_clip_audio_projector_type(EAR)
            add_audio(writer, text, hidden=audio.audio_embed_dim, inner=0, layers=0, heads=0, bins=BINS,
                      eps=audio.rms_norm_eps)

    return Projector((VISION, AUDIO) if audio else (VISION,), tuple(_tensors(vision, audio, text)), metadata, _source,
                     ahead(text))


MAKERS = {"gemma4_unified": gemma4_unified}


def _unheard(audio: Any, checkpoint: Path) -> list[str]:
    """What llama.cpp would do otherwise with a sound."""
    settings = processor_settings(checkpoint, "feature_extractor")
    return [*(f"audio_config.{problem}" for problem in differing(audio, audio_embed_dim=_HEARD)),
            *unusual("feature extractor", settings, sampling_rate=16_000, audio_samples_per_token=_HEARD)]


def _source(name: str) -> str | None:
    """As repositories name them; the running model has all in one module."""
    source = gemmas_source(name)
    source = source and source.replace("embed_vision.multimodal_embedder.", "embed_vision.")
    return source and re.sub(r"^embed_vision\.(?=patch_|pos_)", "vision_embedder.", source)


def _tensors(vision: Any, audio: Any, text: Any) -> Iterator[TowerTensor]:
    side, wide = vision.model_patch_size, vision.mm_embed_dim
    patch = _COLOURS * side ** 2

    def by_colour(values: np.ndarray) -> np.ndarray:
        """All of a patch's numbers in the last dimension: of all colours' for each pixel → of all pixels' for each
        colour."""
        return np.moveaxis(values.reshape(-1, side * side, _COLOURS), -1, -2).reshape(values.shape)

    def tensor(part: str, kind: str, *shape: int, change: Callable[[np.ndarray], np.ndarray] = by_colour
               ) -> TowerTensor:
        return TowerTensor(f"{_NAMES[part]}.{kind}", f"vision_embedder.{part}.{kind}", shape, change)

    yield from (tensor("patch_ln1", kind, patch) for kind in ("weight", "bias"))
    yield tensor("patch_dense", "weight", wide, patch)
    for part, kind in (("patch_dense", "bias"), *product(("patch_ln2", "pos_norm"), ("weight", "bias"))):
        yield tensor(part, kind, wide, change=as_it_is)
    yield TowerTensor("v.position_embd.weight", "vision_embedder.pos_embedding", (vision.mm_posemb_size, 2, wide),
                      lambda values: values.transpose(1, 0, 2), exact=True)
    yield TowerTensor("mm.input_projection.weight", "embed_vision.embedding_projection.weight",
                      (text.hidden_size, vision.output_proj_dims))
    if audio:
        yield TowerTensor("mm.a.input_projection.weight", "embed_audio.embedding_projection.weight",
                          (text.hidden_size, audio.audio_embed_dim))
