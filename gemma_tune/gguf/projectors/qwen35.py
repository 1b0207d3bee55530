"""The eye of Qwen 3.5 and 3.6: a transformer whose patches are merged by four."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
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
    name_of,
    processor_settings,
    three_numbers,
    uneven,
    unusual_pictures,
)

_TOWER = re.compile(r"(?:model\.)?(visual\..+)")
_MERGED, _FRAMES = 2, 2  # patches to a token's side; pictures of a film that are seen as one
_EPS = 1e-6  # of norms, a constant of the tower


def qwen35(config: Mapping[str, Any], checkpoint: Path) -> Projector:
    """The projector of a Qwen 3.5, dense or with experts.

    Raises:
        UserError: settings that llama.cpp has no key for; no mean or deviation of the colours, of which Transformers'
            defaults are another model's.
    """
    whole, settings = complete(config, checkpoint / "config.json"), processor_settings(checkpoint)
    vision, text = whole.vision_config, whole.get_text_config()
    refuse(checkpoint / "config.json", _problems(vision, text, settings))
    colours = three_numbers(settings, "image_mean"), three_numbers(settings, "image_std")

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
        add_vision(writer, text, vision, colours, eps=_EPS,
                   image_size=isqrt(vision.num_position_embeddings) * vision.patch_size)
        writer.add_vision_use_gelu(True)
        writer.add_vision_spatial_merge_size(vision.spatial_merge_size)
        writer.add_vision_is_deepstack_layers([False] * vision.num_hidden_layers)

    return Projector((VISION,), tuple(_tensors(vision)), metadata, _source)


MAKERS = dict.fromkeys(("qwen3_5", "qwen3_5_moe"), qwen35)


def _problems(vision: Any, text: Any, settings: Mapping[str, Any]) -> list[str]:
    found = differing(vision, hidden_act=ACTIVATION, in_channels=3, spatial_merge_size=_MERGED,
                      temporal_patch_size=_FRAMES, out_hidden_size=text.hidden_size,
                      num_position_embeddings=isqrt(vision.num_position_embeddings) ** 2)
    found += uneven(vision, "patch_size")
    if vision.rope_parameters != {"rope_type": "axial", "rope_theta": 10_000.0}:
        found.append(f"rope_parameters are {vision.rope_parameters!r} and llama.cpp rotates axially with theta 10000")
    return [*(f"vision_config.{problem}" for problem in found),
            *unusual_pictures(settings, do_normalize=True, patch_size=vision.patch_size, merge_size=_MERGED,
                              temporal_patch_size=_FRAMES)]


def _source(name: str) -> str | None:
    found = _TOWER.fullmatch(name)
    return found[1] if found else None


def _tensors(vision: Any) -> Iterator[TowerTensor]:
    hidden, side, merged = vision.hidden_size, vision.patch_size, vision.hidden_size * _MERGED ** 2
    kernels = (hidden, vision.in_channels, _FRAMES, side, side)
    for suffix, frame in (("", 0), (".1", 1)):  # a picture is a film of two alike
        yield TowerTensor(f"v.patch_embd.weight{suffix}", "visual.patch_embed.proj.weight", kernels,
                          lambda values, frame=frame: values[:, :, frame])
    yield TowerTensor("v.patch_embd.bias", "visual.patch_embed.proj.bias", (hidden,))
    yield TowerTensor("v.position_embd.weight", "visual.pos_embed.weight", (vision.num_position_embeddings, hidden),
                      exact=True)
    for i in range(vision.num_hidden_layers):
        for part, shape in _layer(vision).items():
            yield from _both(name_of(f"visual.blocks.{i}.{part}"), f"visual.blocks.{i}.{part}", shape)
    yield from _both("v.post_ln", "visual.merger.norm", (hidden,))
    yield from _both("mm.0", "visual.merger.linear_fc1", (merged, merged))
    yield from _both("mm.2", "visual.merger.linear_fc2", (vision.out_hidden_size, merged))


def _both(name: str, source: str, shape: tuple[int, ...]) -> Iterator[TowerTensor]:
    yield TowerTensor(f"{name}.weight", f"{source}.weight", shape)
    yield TowerTensor(f"{name}.bias", f"{source}.bias", shape[:1])


def _layer(vision: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    return {"norm1": (hidden,), "attn.qkv": (3 * hidden, hidden), "attn.proj": (hidden, hidden), "norm2": (hidden,),
            "mlp.linear_fc1": (inner, hidden), "mlp.linear_fc2": (hidden, inner)}
