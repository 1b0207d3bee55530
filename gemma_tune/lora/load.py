"""PEFT's import, and a trained adapter on a loaded base model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import importing
from gemma_tune.base.refusals import require_readable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def import_peft() -> None:
    """Import PEFT in three quarters of the time: without torch's compiler, until something is to be compiled."""
    with importing(), _compiling_at_the_first_call():
        import peft  # noqa: F401


@contextlib.contextmanager
def _compiling_at_the_first_call() -> Iterator[None]:
    """bitsandbytes, which comes with PEFT, hands functions to ``torch.compile``: that loads the whole compiler."""
    import torch

    compiled = torch.compile

    def later(function: Callable | None = None, **options: Any) -> Callable:
        if function is None:
            return functools.partial(later, **options)
        made = functools.cache(lambda: compiled(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: made()(*args, **kwargs))

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = compiled


def add_adapter(model: PreTrainedModel, adapter: Path, vocabulary: int | None = None) -> Any:
    """Put a trained adapter on a loaded base model, ready to answer.

    Args:
        vocabulary: entries that the adapter was trained with, where the base has another number.

    Raises:
        UserError: the adapter is missing, damaged, may not be read, or does not fit this model.
    """
    from safetensors import SafetensorError

    require_readable(adapter)
    import_peft()
    from peft import PeftModel

    from gemma_tune.lora.dora import settle, uses_dora

    try:
        if vocabulary:
            _resize(model, vocabulary)
        dora = uses_dora(adapter)
        tuned = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=dora).eval()
        if dora:
            settle(tuned)
        return tuned
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        raise UserError(f"the adapter {adapter} does not fit this base model: {str(e).splitlines()[0]}",
                        "train again: gemma-tune train --force") from e


def _resize(model: PreTrainedModel, vocabulary: int) -> None:
    """Give embedding and head so many entries; new ones are zero until an adapter brings its own."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            module.weight[before:] = 0
