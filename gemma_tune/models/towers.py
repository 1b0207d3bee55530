"""Models of text, pictures and sounds without what sees and hears, which no text reaches: hundreds of megabytes less to
read and to hold, and Gemma 3n runs without the package that its eye is from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from gemma_tune.base.machine import keeping_garbage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_EYE, _EAR = "vision_config", "audio_config"


def without_towers(config: PreTrainedConfig, sees: bool = False) -> AbstractContextManager[None]:
    """Models that transformers makes of ``config`` meanwhile have an empty module in the place of each tower.

    The names of all other modules stay as they are, and so those of an adapter for the whole model. Families with a
    class of their own for the text model leave their towers out by themselves.

    Args:
        sees: whether the tower for pictures stays.
    """
    return _without(config, (_EAR,) if sees else (_EYE, _EAR))


def without_text(config: PreTrainedConfig) -> AbstractContextManager[None]:
    """The same for all but the tower for pictures, and what lies between it and the text model."""
    return _without(config, ("text_config", _EAR))


@contextmanager
def _without(config: PreTrainedConfig, names: Sequence[str]) -> Iterator[None]:
    """An empty module in the place of each part whose settings ``config`` has under one of these names."""
    with keeping_garbage():
        from torch import nn
        from transformers import AutoModel, PreTrainedModel
    parts = {type(part) for name in names if (part := getattr(config, name, None)) is not None}

    def absent(made: Any) -> Any:
        def make(kind: type, config: PreTrainedConfig, *args: Any, **settings: Any) -> Any:
            return nn.Module() if type(config) in parts else made(kind, config, *args, **settings)

        return classmethod(make)

    by_itself = vars(PreTrainedModel)["_from_config"]
    # A family asks the one or the other for its parts. The first is inherited, so hidden and found again.
    AutoModel.from_config = absent(AutoModel.from_config.__func__)
    PreTrainedModel._from_config = absent(by_itself.__func__)
    try:
        yield
    finally:
        del AutoModel.from_config
        PreTrainedModel._from_config = by_itself


def auto_class(model_type: str, sees: bool = False) -> Any:
    """Transformers' class that loads a family to write text, by ``model_type`` of its config.json; of those that run
    with their towers only, the class for pictures and text.

    Args:
        sees: whether that is wanted of others as well.
    """
    with keeping_garbage():
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
        from transformers.models.auto import modeling_auto as auto

    only_whole = (model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
                  and model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return AutoModelForImageTextToText if only_whole or sees else AutoModelForCausalLM
