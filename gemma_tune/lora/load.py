"""PEFT's import, and a trained adapter on a loaded base model."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.loading import loading
from gemma_tune.base.machine import is_out_of_memory, keeping_garbage
from gemma_tune.base.words import first_line
from gemma_tune.lora.config import for_peft, how_to_renew, usable_config
from gemma_tune.lora.files import read_adapter
from gemma_tune.lora.patterns import refuse_endless
from gemma_tune.lora.renamed import renamed_adapter, running_names, with_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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

    The model may be loaded in another form than it was trained in: for text alone, or to see pictures.

    Args:
        vocabulary: entries that the adapter was trained with, where the base has another number.

    Raises:
        UserError: the adapter is missing, damaged, may not be read, or does not fit this model.
    """
    described = read_adapter(adapter)
    refuse_endless(adapter, described.config, (name for name, _ in model.named_modules()))
    whole = with_head(described, model)
    names = running_names(whole, model)
    if not names and whole is described:
        tuned = _added(model, adapter, described.config, adapter, vocabulary)
    else:
        with tempfile.TemporaryDirectory(prefix="gemma-tune-adapter-") as folder:
            renamed = renamed_adapter(whole, names, Path(folder))
            tuned = _added(model, renamed, usable_config(renamed), adapter, vocabulary)
    if described.rows:
        from gemma_tune.lora import token_rows

        token_rows.install(tuned, described)
    return tuned


def _added(model: PreTrainedModel, folder: Path, config: Mapping[str, Any], adapter: Path,
           vocabulary: int | None) -> Any:
    """The same of an adapter whose names are the model's, in ``folder``; ``adapter`` is where it came from."""
    import_peft()
    from peft import LoraConfig, PeftModel

    from gemma_tune.lora.dora import settle
    from gemma_tune.lora.routed import install

    dora = bool(config.get("use_dora"))
    try:
        if vocabulary:
            _resize(model, vocabulary)
        tuned = PeftModel.from_pretrained(model, str(folder), config=LoraConfig(**for_peft(config)),
                                          autocast_adapter_dtype=dora).eval()
    except Exception as e:  # noqa: BLE001 - in as many ways as settings and tensors can miss a model
        if is_out_of_memory(e):
            raise
        raise UserError(f"the adapter {adapter} does not fit this base model: {first_line(e)}",
                        how_to_renew(adapter)) from e
    if dora:
        settle(tuned)
    install(tuned)
    return tuned


def _resize(model: PreTrainedModel, vocabulary: int) -> None:
    """Give embedding and head so many entries; new ones are zero until an adapter brings its own."""
    import torch

    before = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
            module.weight[before:] = 0
