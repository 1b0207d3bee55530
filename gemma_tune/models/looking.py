"""Pictures that are shown while a model answers: looked at when their features are first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.answers.sight import Features, see
from gemma_tune.encoding.eye import Eye
from gemma_tune.models.load import load_towers
from gemma_tune.models.placement import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = 512 << 20  # bytes of features that stay: of hundreds of Gemma's pictures, or of a few large ones of a Qwen's


class Looking:
    """Features of pictures by name; the towers are loaded for the first of them.

    Args:
        checkpoint: the one whose towers look.
        eye: what knows where the pictures lie.
    """

    def __init__(self, checkpoint: Path, eye: Eye, placement: Placement):
        self.checkpoint, self.eye, self.placement = checkpoint, eye, placement
        self._towers: PreTrainedModel | None = None
        self._seen: dict[str, Features] = {}  # the last used ones last

    def __getitem__(self, name: str) -> Features:
        """Features of a picture.

        Raises:
            UserError: the towers cannot be loaded.
        """
        self._seen[name] = found = self._seen.pop(name, None) or self._see(name)
        while len(self._seen) > 1 and sum(map(_size, self._seen.values())) > _KEPT:
            del self._seen[next(iter(self._seen))]
        return found

    def _see(self, name: str) -> Features:
        if self._towers is None:
            self._towers = load_towers(self.checkpoint, self.placement)
        return see(self._towers, self.eye, name)


def _size(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features.values())
