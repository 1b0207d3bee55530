"""Models of text, pictures and sounds without what sees and hears, which no text reaches: hundreds of megabytes less to
read and to hold, and Gemma 3n runs without the package that its eye is from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_OF_TOWERS = ("vision_config", "audio_config")


@contextmanager
def without_towers(config: PreTrainedConfig) -> Iterator[None]:
    """Models that transformers makes of ``config`` meanwhile have an empty module in the place of each tower.

    The names of all other modules stay as they are, and so those of an adapter for the whole model. Families with a
    class of their own for the text model leave their towers out by themselves.
    """
    from torch import nn
    from transformers import AutoModel

    towers = {type(part) for name in _OF_TOWERS if (part := getattr(config, name, None)) is not None}
    made = AutoModel.from_config

    def from_config(config: PreTrainedConfig, *args: Any, **settings: Any) -> Any:
        return nn.Module() if type(config) in towers else made(config, *args, **settings)

    AutoModel.from_config = from_config
    try:
        yield
    finally:
        del AutoModel.from_config  # and with it what hid the inherited one
