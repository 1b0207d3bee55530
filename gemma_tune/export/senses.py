"""Whether the exported model is to take pictures and sounds as its base does, and what is said where it cannot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemma_tune.base.errors import UserError
from gemma_tune.gguf.architectures.parts import NotInLlamaCpp
from gemma_tune.gguf.projectors.parts import AUDIO, VISION, Projector
from gemma_tune.gguf.projectors.registry import LeftOver, projector_of

_TAKES = {VISION: "pictures", AUDIO: "sounds"}


def taken(senses: Iterable[str]) -> str:
    """What a model takes beside text: ``pictures``, or ``pictures and sounds``."""
    return " and ".join(_TAKES[sense] for sense in senses)


def senses_of(merged: Path, wanted: bool) -> tuple[Projector | None, str]:
    """What is written of what a merged model sees and hears with.

    Returns:
        That, and empty; or None, and what is to be said: empty for a model that takes text alone by itself.
    """
    alone = "what is exported takes text alone, though the merged model takes "
    try:
        projector = projector_of(merged)
    except LeftOver as e:
        return None, f"what is exported takes text alone: {e.message.rstrip('.')}".replace(f"{merged}", merged.name)
    except UserError as e:  # also where the weights cannot be read, which is told with those of the text
        hint = None if isinstance(e, NotInLlamaCpp) else e.hint  # that of a whole model
        reasons = "; ".join(text.rstrip(".") for text in (e.message, *e.problems, hint) if text)
        return None, f"{alone}more: {reasons}".replace(f"{merged}", merged.name)  # it is recorded, for any place
    if projector and not wanted:
        return None, f"{alone}{taken(projector.senses)}: --no-vision"
    return projector, ""
