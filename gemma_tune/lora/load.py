"""A trained adapter on a loaded base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import importing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, adapter: Path) -> Any:
    """Put a trained adapter on a loaded base model, ready to answer.

    Raises:
        UserError: the adapter is missing, damaged, or does not fit this model.
    """
    from safetensors import SafetensorError

    with importing():
        from peft import PeftModel

    from gemma_tune.lora.dora import settle, uses_dora

    try:
        dora = uses_dora(adapter)
        tuned = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=dora).eval()
        if dora:
            settle(tuned)
        return tuned
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        raise UserError(f"the adapter {adapter} does not fit this base model: {str(e).splitlines()[0]}",
                        "train again: gemma-tune train --force") from e
