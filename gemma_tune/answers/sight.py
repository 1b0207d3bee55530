"""What a model's frozen towers see in pictures, computed once and kept, so that training goes without them.

A picture's features are the same in each epoch, and hundreds of them fit where a tower would lie. transformers' models
take features in the place of pictures (``mm_encoder_outputs``) and do everything else about pictures themselves: which
tokens they replace, which see each other, and where tokens are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_tune.answers.decoders import base_of
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import replacing
from gemma_tune.base.versions import library_versions
from gemma_tune.base.words import first_line
from gemma_tune.encoding.eye import PROCESSORS, Eye

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Features = dict[str, "torch.Tensor"]
SEEN = "features"  # (tokens, hidden size): what replaces the embeddings of a picture's tokens
_DEEP = "deepstack."  # of some families also what is added behind the first layers, by number
GRID = "image_grid_thw"  # an input from which a model reckons where tokens are
_BESIDE = (GRID,)


def see(model: PreTrainedModel, eye: Eye, name: str) -> Features:
    """The features of one picture.

    Args:
        model: its towers, see ``models.load.load_towers``, or one with its towers.
        name: of a file in the eye's folder.

    Returns:
        :data:`SEEN` and, by family, others; on the CPU, in the model's type.
    """
    import torch

    inputs = {key: value.to(model.device) for key, value in eye.inputs(name).items() if hasattr(value, "to")}
    taken = {key: value for key, value in inputs.items() if key in _TAKEN}
    taken["pixel_values"] = taken["pixel_values"].to(model.dtype)
    with torch.no_grad():
        seen = model.base_model.get_image_features(**taken, return_dict=True)
    features = {SEEN: _one(seen.pooler_output)}
    for number, deep in enumerate(getattr(seen, "deepstack_features", None) or ()):
        features[f"{_DEEP}{number}"] = _one(deep)
    features |= {key: inputs[key] for key in _BESIDE if key in inputs}
    return {key: value.to("cpu").contiguous() for key, value in features.items()}


def layers_of(features: Features) -> list[str]:
    """Names of those that take the place of tokens: of the embeddings, and of what is added behind the first layers."""
    return [SEEN, *(key for key in features if key.startswith(_DEEP))]


_TAKEN = ("pixel_values", "image_position_ids", "image_sizes", *_BESIDE)  # of what processors give


def _one(parts: Any) -> torch.Tensor:
    """Features of one picture, which come as one tensor or as several (tokens, hidden size)."""
    import torch

    return (parts if isinstance(parts, torch.Tensor) else torch.cat(list(parts))).flatten(0, -2)


def inputs_beside(eye: Eye, ids: torch.Tensor, pictures: Sequence[Features], device: torch.device | None = None,
                  read: int = 0) -> dict[str, Any]:
    """What a model is given beside ``input_ids`` where these have pictures.

    Args:
        ids: (rows, length) int64. Of those on the CPU no GPU has to be waited for.
        pictures: features of all pictures, from row to row, in order.
        device: where the inputs will lie, if not where ``ids`` do.
        read: tokens of a single row whose keys and values the model has already.

    Raises:
        ValueError: they are not as long as the tokens that stand for them.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device or ids.device, non_blocking=True)

    marks = ids == eye.soft_id
    seen = there(torch.cat([features[SEEN] for features in pictures]))
    if int(marks.sum()) != len(seen):
        raise ValueError(f"{int(marks.sum())} tokens stand for pictures with {len(seen)} features")
    beside: dict[str, Any] = {}
    if len(unread := seen[int(marks[:, :read].sum()):]):
        # Gemma 3 takes one tensor, others a list of those of single pictures.
        whole = unread[None] if eye.config["model_type"] == "gemma3" else [unread]
        output = BaseModelOutputWithPooling(pooler_output=whole)
        if deep := layers_of(pictures[0])[1:]:
            output["deepstack_features"] = [
                [there(torch.cat([features[key] for features in pictures])[-len(unread):])] for key in deep]
        beside["mm_encoder_outputs"] = {"image": output}
    if eye.marks:
        beside[eye.marks] = there(marks.long())
    for key in _BESIDE:
        if key in pictures[0]:
            beside[key] = there(torch.cat([features[key] for features in pictures]))
    return beside


class Seen:
    """Features of pictures in files, by the names of the pictures.

    Args:
        folder: of all features; those that depend on other weights or settings lie in another folder inside.
        eye: what the pictures are prepared with.
        model: fingerprint of the checkpoint.
        dtype: what is computed in, such as ``torch.bfloat16``.
    """

    def __init__(self, folder: Path, eye: Eye, model: str, dtype: Any):
        settings = [(eye.checkpoint / name).read_text(encoding="utf-8") for name in PROCESSORS
                    if (eye.checkpoint / name).exists()]
        version = library_versions()["transformers"]  # which can prepare pictures otherwise
        key = hashlib.sha256(json.dumps([model, f"{dtype}", version, *settings]).encode()).hexdigest()[:16]
        self.eye, self.root, self.folder = eye, folder, folder / key

    def lacks(self, names: Sequence[str]) -> list[str]:
        """Those of which there are no features yet."""
        return [name for name in names if not self._path(name).exists()]

    def look(self, model: PreTrainedModel, name: str) -> None:
        """Compute and keep the features of a picture.

        Raises:
            OSError: it cannot be read.
            WorkFailed: they cannot be written.
        """
        from safetensors.torch import save_file

        features = see(model, self.eye, name)
        with replacing(self._path(name)) as path:
            save_file(features, path)

    def __getitem__(self, name: str) -> Features:
        """Features of a picture that was looked at.

        Raises:
            UserError: they are gone or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError) as e:
            raise UserError(f"what was seen in pictures cannot be read from {self.folder}: {first_line(e)}",
                            f"delete {self.root}, and repeat the command: they are looked at again") from e

    def _path(self, name: str) -> Path:
        return self.folder / f"{Path(name).stem}.safetensors"


class Sights(Protocol):
    """Features by name: :class:`Seen`, a mapping, or what looks when it is asked."""

    def __getitem__(self, name: str, /) -> Features:
        """Features of a picture."""


def beside(seen: Sights | None, eye: Eye | None, ids: torch.Tensor, names: Sequence[Sequence[str]],
           device: torch.device | None = None, read: int = 0) -> dict[str, Any]:
    """As :func:`inputs_beside`, for rows with the names of their pictures; nothing where there is none."""
    pictures = [name for row in names for name in row]
    if not pictures:
        return {}
    assert seen is not None and eye is not None, "pictures need an eye, and what was seen in them"
    return inputs_beside(eye, ids, [seen[name] for name in pictures], device, read)


def told_apart(eye: Eye | None, ids: Sequence[int], names: Sequence[str]) -> list[int | str]:
    """Token ids with the name of its picture in the place of each that stands for a part of one: the ids alone are
    the same for others."""
    if not names:
        return list(ids)
    assert eye is not None
    parts = iter([name for name in names for _ in range(eye.parts(name))])
    return [next(parts) if token == eye.soft_id else token for token in ids]


def reckon_anew(model: Any) -> None:
    """Let a model forget how far its last prompt's pictures moved what stands behind them, as the Qwens remember it:
    the next prompt, which it may have read in a part, can be another one's."""
    inner = getattr(base_of(model), "model", None)
    if getattr(inner, "rope_deltas", None) is not None:
        inner.rope_deltas = None
