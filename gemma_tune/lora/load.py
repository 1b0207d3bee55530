"""PEFT's import, and a trained adapter on a loaded base model."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.loading import loading
from gemma_tune.base.machine import is_out_of_memory, keeping_garbage
from gemma_tune.base.words import first_line
from gemma_tune.lora.config import NAMING, for_peft, how_to_renew
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.patterns import refuse_endless

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gemma_tune.lora.files import Adapter

_OF_TEXT, _WITH_SIGHT = "model.", "model.language_model."


def import_peft() -> None:
    """Import PEFT in three quarters of the time: without torch's compiler, until something is to be compiled."""
    with keeping_garbage(), _compiling_at_the_first_call():
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


@loading("the adapter")
def add_adapter(model: PreTrainedModel, adapter: Path, vocabulary: int | None = None) -> Any:
    """Put a trained adapter on a loaded base model, ready to answer.

    Args:
        vocabulary: entries that the adapter was trained with, where the base has another number.

    Raises:
        UserError: the adapter is missing, damaged, may not be read, or does not fit this model.
    """
    described = read_adapter(adapter)
    config, renames = _as_named_in(model, described)
    refuse_endless(adapter, config, (name for name, _ in model.named_modules()))
    import_peft()
    from peft import LoraConfig, PeftModel

    from gemma_tune.lora.dora import settle
    from gemma_tune.lora.routed import install

    dora = bool(config.get("use_dora"))
    try:
        if vocabulary:
            _resize(model, vocabulary)
        tuned = PeftModel.from_pretrained(model, str(adapter), config=LoraConfig(**for_peft(config)),
                                          autocast_adapter_dtype=dora, **renames).eval()
    except Exception as e:  # noqa: BLE001 - in as many ways as settings and tensors can miss a model
        if is_out_of_memory(e):
            raise
        raise UserError(f"the adapter {adapter} does not fit this base model: {first_line(e)}",
                        how_to_renew(adapter)) from e
    if dora:
        settle(tuned)
    install(tuned)
    return tuned


def _as_named_in(model: PreTrainedModel, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """An adapter's settings with the layers' names in this model, and how PEFT is to rename its tensors.

    Families with a class of their own for text alone (Qwen 3.5) call the same layers otherwise in the class that also
    takes pictures, and an adapter is for both, whichever it was trained on.
    """
    config = adapter.config
    inside = any(layer.startswith(_WITH_SIGHT) for layer in adapter.layers)
    if inside == hasattr(getattr(model, "model", None), "language_model"):
        return config, {}
    old, new = (_WITH_SIGHT, _OF_TEXT) if inside else (_OF_TEXT, _WITH_SIGHT)
    if not any(layer.startswith(old) for layer in adapter.layers):
        return config, {}

    def renamed(names: Any) -> Any:
        if isinstance(names, dict):
            return {renamed(name): value for name, value in names.items()}
        if isinstance(names, list):
            return [renamed(name) for name in names]
        return new + names.removeprefix(old) if isinstance(names, str) and names.startswith(old) else names

    changed = {key: renamed(config[key]) for key in NAMING if key in config}
    return config | changed, {"key_mapping": {f"^{re.escape(old)}": new}}


def _resize(model: PreTrainedModel, vocabulary: int) -> None:
    """Give embedding and head so many entries; new ones are zero until an adapter brings its own."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            module.weight[before:] = 0
