"""What a projector is described with, llama.cpp's mmproj: it makes a text model's embeddings of pictures and sounds.

Towers are small beside the text model, so each of their tensors is read, changed and written as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
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
_RESCALED = 1 / 255  # what llama.cpp multiplies a picture's bytes by


@dataclass(frozen=True)
class TowerTensor:
    """One tensor of a projector.

    Args:
        name: in the GGUF.
        source: in the checkpoint, see ``Projector.source_of``.
        stored: its shape there.
        change: float32 values of that shape → as they are in the GGUF.
        exact: written in float32, although it is no vector.
    """

    name: str
    source: str
    stored: tuple[int, ...]
    change: Callable[[np.ndarray], np.ndarray] = lambda values: values
    exact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """In the GGUF."""
        return self.change(np.broadcast_to(np.float32(0), self.stored)).shape


@dataclass(frozen=True)
class Projector:
    """What the mmproj of one model holds.

    Args:
        senses: ``vision``, ``audio`` or both.
        tensors: in the order in which they are written.
        metadata: adds the projector's own keys to a writer.
        source_of: a tensor's name in the checkpoint → the ``source`` that stands for it; None for what is no part of a
            tower, or a part that nothing reads.
    """

    senses: tuple[str, ...]
    tensors: tuple[TowerTensor, ...]
    metadata: Callable[[gguf.GGUFWriter], None]
    source_of: Callable[[str], str | None]


# config.json, the folder that it lies in → what its towers are written as.
Maker = Callable[[Mapping[str, Any], Path], Projector]


def gemmas_source(name: str) -> str | None:
    """``Projector.source_of`` for every Gemma: without ``model.`` in front."""
    found = _OF_TOWERS.fullmatch(name)
    return found[1] if found else None


def picture_settings(checkpoint: Path) -> dict[str, Any]:
    """How a checkpoint's pictures are prepared, by processor_config.json or else preprocessor_config.json; empty
    without either: Transformers' defaults then count.

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
        settings |= found | (found.get("image_processor") or {})
    return settings


def unusual_pictures(settings: Mapping[str, Any], **fixed: Any) -> list[str]:
    """What llama.cpp would do otherwise with a picture.

    Args:
        settings: see :func:`picture_settings`.
        fixed: further settings, and what llama.cpp takes each for.
    """
    fixed = {"do_rescale": True, "do_normalize": True, "rescale_factor": _RESCALED, "do_pan_and_scan": False} | fixed
    return [f"{key} of the image processor is {found!r} and llama.cpp computes with {value!r}"
            for key, value in fixed.items() if (found := settings.get(key)) not in (None, value)]


def three_numbers(settings: Mapping[str, Any], key: str, usual: Iterable[float]) -> list[float]:
    """The mean, or deviation, of each colour.

    Raises:
        UserError: something else.
    """
    found = settings.get(key)
    values = list(usual) if found is None else found
    if not (isinstance(values, list) and len(values) == 3 and all(isinstance(value, (int, float)) for value in values)):
        raise UserError(f"{key} of the image processor is {found!r} and no list of three numbers.",
                        "Copy preprocessor_config.json again from the base model.")
    return [float(value) for value in values]
