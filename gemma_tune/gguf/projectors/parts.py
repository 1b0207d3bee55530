"""What a projector is described with, llama.cpp's mmproj: it makes a text model's embeddings of pictures and sounds.

Towers are small beside the text model, so each of their tensors is read, changed and written as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.base.strict_json import object_in

ARCHITECTURE = "clip"  # what llama.cpp calls every one of them
VISION, AUDIO = "vision", "audio"
# A Gemma's parts beside the text model, under the names of repositories and under those of Transformers 5.
_OF_TOWERS = re.compile(
    r"(?:model\.)?((?:vision_tower|audio_tower|multi_modal_projector|vision_embedder|embed_vision|embed_audio)\..+)")
_LAYER = re.compile(r"(?:(?<=layers\.)|(?<=blocks\.))\d+(?=\.)")
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 2)  # of a layer like all others, and of two convolutions
_RESCALED = 1 / 255  # what llama.cpp multiplies a picture's bytes by


def as_it_is(values: np.ndarray) -> np.ndarray:
    """No change."""
    return values


@dataclass(frozen=True)
class TowerTensor:
    """One tensor of a projector.

    Args:
        name: in the GGUF.
        source: in the checkpoint, see ``Projector.source_of``.
        stored: its shape there.
        change: float32 values of that shape → as they are in the GGUF.
        exact: written in float32, although it is no vector.
        row: of the checkpoint's matrix this one alone; None for all.
    """

    name: str
    source: str
    stored: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray] = as_it_is
    exact: bool = False
    row: int | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """In the GGUF."""
        return self.change(np.broadcast_to(np.float32(0), self.stored[self.row is not None:])).shape


@dataclass(frozen=True)
class Projector:
    """What the mmproj of one model holds.

    Args:
        senses: ``vision``, ``audio`` or both.
        tensors: in the order in which they are written.
        metadata: adds the projector's own keys to a writer.
        source_of: a tensor's name in the checkpoint → the ``source`` that stands for it; None for what is no part of a
            tower, or a part that nothing reads.
        differs: what llama.cpp does otherwise than the model and no key changes, one sentence each.
    """

    senses: tuple[str, ...]
    tensors: tuple[TowerTensor, ...]
    metadata: Callable[[gguf.GGUFWriter], None]
    source_of: Callable[[str], str | None]
    differs: tuple[str, ...] = ()


# config.json, the folder that it lies in → what its towers are written as.
Maker = Callable[[Mapping[str, Any], Path], Projector]


def name_of(module: str) -> str:
    """What llama.cpp's ``gguf`` package calls a module of a tower, by the name that its converter has for it."""
    found = _LAYER.search(module)
    name = _NAMES.get_name(_LAYER.sub("0", module))
    return name.replace("blk.0.", f"blk.{found[0]}.") if found else name


def gemmas_source(name: str) -> str | None:
    """``Projector.source_of`` for every Gemma: without ``model.`` in front."""
    found = _OF_TOWERS.fullmatch(name)
    return found[1] if found else None


def processor_settings(checkpoint: Path, part: str = "image_processor") -> dict[str, Any]:
    """How a checkpoint's pictures, or its sounds, are prepared, by processor_config.json or else
    preprocessor_config.json; empty without either: Transformers' defaults then count.

    Args:
        part: of processor_config.json.

    Raises:
        UserError: a file that cannot be read.
    """
    settings: dict[str, Any] = {}
    for path in (checkpoint / "preprocessor_config.json", checkpoint / "processor_config.json"):
        try:
            found = object_in(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise UserError(f"{path} can't be read: {error}", "Copy it again from the base model.") from error
        settings |= found | (found.get(part) or {})
    return settings


def unusual_pictures(settings: Mapping[str, Any], **fixed: Any) -> list[str]:
    """What llama.cpp would do otherwise with a picture.

    Args:
        settings: see :func:`processor_settings`.
        fixed: further settings, and what llama.cpp takes each for.
    """
    return unusual("image processor", settings, do_rescale=True, rescale_factor=_RESCALED, **fixed)


def unusual(what: str, settings: Mapping[str, Any], **fixed: Any) -> list[str]:
    """Settings of ``what`` prepares pictures or sounds, where llama.cpp does it in another way."""
    return [f"{key} of the {what} is {found!r} and llama.cpp computes with {value!r}"
            for key, value in fixed.items() if (found := settings.get(key)) not in (None, value)]


def uneven(vision: Any, *keys: str) -> list[str]:
    """Sizes of squares, which can be given as two numbers."""
    return [f"{key} is {getattr(vision, key)!r} and llama.cpp takes one number"
            for key in keys if not isinstance(getattr(vision, key), int)]


def three_numbers(settings: Mapping[str, Any], key: str, usual: float | None = None) -> list[float]:
    """The mean, or deviation, of each colour; ``usual`` where the settings don't say.

    Raises:
        UserError: something else, or nothing where nothing is usual.
    """
    found = settings.get(key)
    values = [usual] * 3 if found is None and usual is not None else found
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values)):
        raise UserError(f"{key} of the image processor is {found!r} and no list of three numbers.",
                        "Put the preprocessor_config.json that the base model came with into its folder, and merge "
                        "again: gemma-tune merge --force.")
    return [float(value) for value in values]


def add_vision(writer: gguf.GGUFWriter, text: Any, vision: Any, colours: tuple[list[float], list[float]], *,
               image_size: int, eps: float) -> None:
    """Write what every eye has.

    Args:
        text, vision: configurations.
        colours: mean and deviation of each.
        eps: of its norms.
    """
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(text.hidden_size)
    writer.add_vision_image_size(image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(vision.num_hidden_layers)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(eps)
    writer.add_vision_image_mean(colours[0])
    writer.add_vision_image_std(colours[1])


def add_audio(writer: gguf.GGUFWriter, text: Any, *, hidden: int, inner: int, layers: int, heads: int, bins: int,
              eps: float) -> None:
    """Write what every ear has.

    Args:
        text: configuration.
        bins: of a spectrum.
        eps: of its norms.
    """
    writer.add_clip_has_audio_encoder(True)
    writer.add_audio_projection_dim(text.hidden_size)
    writer.add_audio_embedding_length(hidden)
    writer.add_audio_feed_forward_length(inner)
    writer.add_audio_block_count(layers)
    writer.add_audio_head_count(heads)
    writer.add_audio_num_mel_bins(bins)
    writer.add_audio_attention_layernorm_eps(eps)


def clipped(name: str, source: str, shape: tuple[int, ...], bounded: bool) -> Iterator[TowerTensor]:
    """A linear layer of Gemma 4: its matrix, and where it is ``bounded`` what its inputs and outputs are clipped at.

    Args:
        name, source: without what their last parts are called.
    """
    yield TowerTensor(f"{name}.weight", f"{source}.linear.weight", shape)
    for bound in ("input_min", "input_max", "output_min", "output_max") if bounded else ():
        yield TowerTensor(f"{name}.{bound}", f"{source}.{bound}", (), _finite)


def _finite(bound: np.ndarray) -> np.ndarray:
    """One number; infinity clips nothing."""
    endless = np.finfo(np.float32).max
    return bound.reshape(1).clip(-endless, endless)
