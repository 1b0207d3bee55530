"""The eye of Mistral Small 3 and Ministral 3: Pixtral's transformer, whose patches are merged.

A picture's rows end in a token, whose embedding llama.cpp takes from the projector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf

from gemma_tune.base.errors import UserError
from gemma_tune.base.strict_json import object_in
from gemma_tune.gguf.architectures.gemma import EMBEDDING, canonical, differing
from gemma_tune.gguf.architectures.llama import neighbours
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
    uneven,
    unusual_pictures,
)

_BREAK = "[IMG_BREAK]"
_EPS = 1e-5  # of the tower's norms; llama.cpp takes it for the projector's norm too
_ACTIVATIONS = {"silu": gguf.GGUFWriter.add_vision_use_silu, "gelu": gguf.GGUFWriter.add_vision_use_gelu}


def mistral3(config: Mapping[str, Any], checkpoint: Path) -> Projector:
    """The projector of a Mistral Small 3 or a Ministral 3.

    Raises:
        UserError: settings that llama.cpp has no key for, nothing said of the colours, or no token that ends a row.
    """
    whole, settings = complete(config, checkpoint / "config.json"), processor_settings(checkpoint)
    refuse(checkpoint / "config.json", _problems(whole, settings))
    colours = three_numbers(settings, "image_mean"), three_numbers(settings, "image_std")
    vision = whole.vision_config

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_clip_projector_type(gguf.VisionProjectorType.PIXTRAL)
        add_vision(writer, whole.get_text_config(), vision, colours, image_size=vision.image_size, eps=_EPS)
        _ACTIVATIONS[vision.hidden_act](writer, True)
        writer.add_vision_spatial_merge_size(whole.spatial_merge_size)

    return Projector((VISION,), tuple(_tensors(whole, _end_of_row(checkpoint))), metadata, _source)


MAKERS = {"mistral3": mistral3}


def _problems(whole: Any, settings: Mapping[str, Any]) -> list[str]:
    vision, text = whole.vision_config, whole.get_text_config()
    if vision.model_type != "pixtral":
        return [f"vision_config is a {vision.model_type} and llama.cpp computes a Pixtral"]
    found = [f"vision_config.{problem}" for problem in [*differing(vision, num_channels=3),
                                                        *uneven(vision, "image_size", "patch_size")]]
    if vision.hidden_act not in _ACTIVATIONS:
        found.append(f"vision_config.hidden_act is {vision.hidden_act!r} and llama.cpp knows {', '.join(_ACTIVATIONS)}")
    if vision.rope_parameters != {"rope_type": "axial", "rope_theta": 10_000.0}:
        found.append(f"vision_config.rope_parameters are {vision.rope_parameters!r} and llama.cpp rotates axially with "
                     "theta 10000")
    found += [f"text_config.{problem}" for problem in differing(text, rms_norm_eps=_EPS)]
    return [*found, *differing(whole, projector_hidden_act="gelu", vision_feature_layer=-1),
            *unusual_pictures(settings, do_normalize=True)]


def _end_of_row(checkpoint: Path) -> int:
    """The id of the token behind each row of a picture but the last.

    Raises:
        UserError: the tokenizer has none, or cannot be read.
    """
    path = checkpoint / "tokenizer.json"
    try:
        found = [token["id"] for token in object_in(path)["added_tokens"] if token["content"] == _BREAK]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read: {error}", "Copy it again from the base model.") from error
    if not found:
        raise UserError(f"{path} has no {_BREAK}, which a picture's rows end in.", "Copy it again from the base model.")
    return found[0]


def _source(name: str) -> str | None:
    return EMBEDDING if canonical(name) == EMBEDDING else gemmas_source(name)


def _tensors(whole: Any, end_of_row: int) -> Iterator[TowerTensor]:
    vision, text = whole.vision_config, whole.get_text_config()
    hidden, patch, merged = vision.hidden_size, vision.patch_size, vision.hidden_size * whole.spatial_merge_size ** 2
    pairs = neighbours(vision.head_dim).forward

    def tensor(module: str, *shape: int) -> TowerTensor:
        turned = module.endswith((".q_proj", ".k_proj"))
        spec = TowerTensor(f"{name_of(module)}.weight", f"{module}.weight", shape)
        return replace(spec, change=pairs) if turned else spec

    yield tensor("vision_tower.patch_conv", hidden, vision.num_channels, patch, patch)
    yield tensor("vision_tower.ln_pre", hidden)
    for i in range(vision.num_hidden_layers):
        for part, shape in _layer(vision).items():
            yield tensor(f"vision_tower.transformer.layers.{i}.{part}", *shape)
    yield tensor("multi_modal_projector.norm", hidden)
    yield tensor("multi_modal_projector.patch_merger.merging_layer", hidden, merged)
    for number, columns in ((1, hidden), (2, text.hidden_size)):
        for kind, shape in (("weight", (text.hidden_size, columns)), ("bias", (text.hidden_size,))):
            if kind == "weight" or whole.multimodal_projector_bias:
                yield TowerTensor(f"mm.{number}.{kind}", f"multi_modal_projector.linear_{number}.{kind}", shape)
    yield TowerTensor("v.token_embd.img_break", EMBEDDING, (text.vocab_size, text.hidden_size), row=end_of_row)


def _layer(vision: Any) -> dict[str, tuple[int, ...]]:
    hidden, inner = vision.hidden_size, vision.intermediate_size
    return {"attention_norm": (hidden,), **{f"attention.{part}_proj": (hidden, hidden) for part in "qkvo"},
            "ffn_norm": (hidden,), "feed_forward.gate_proj": (inner, hidden), "feed_forward.up_proj": (inner, hidden),
            "feed_forward.down_proj": (hidden, inner)}
