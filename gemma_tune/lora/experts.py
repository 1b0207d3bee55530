"""Mixtures of experts: what of them is left as it was. ``torch`` is imported inside functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.nn import Parameter
    from transformers import PreTrainedModel

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")


def count_of(model: PreTrainedModel) -> int:
    """How many experts a layer has to choose from; 0 in a dense model."""
    config = model.config.get_text_config() if hasattr(getattr(model, "config", None), "get_text_config") else None
    count = next((found for name in _COUNTS if (found := getattr(config, name, None))), 0)
    return count if count > 1 else 0


def routers(model: PreTrainedModel) -> set[str]:
    """Full names of the linear layers that choose the experts.

    What they were trained to choose stays, as is usual in fine-tuning: a few rows of data can send all tokens to a few
    experts, and those learn nothing here. Most families compute the choice in a module that is no linear layer anyway.
    """
    import torch

    count = count_of(model)
    return {name for name, module in model.named_modules() if count and isinstance(module, torch.nn.Linear)
            and module.out_features == count and not {"router", "gate"}.isdisjoint(name.split("."))}


def _of_experts(model: PreTrainedModel) -> list[Parameter]:
    """Matrices of all experts of a layer together, (experts, rows, columns), to which LoRA is not added here."""
    count = count_of(model)
    return [p for p in model.parameters() if count and p.ndim == 3 and len(p) == count]


def not_adapted_of(model: PreTrainedModel) -> str:
    """What to say of the experts; "" where there are none."""
    if not (numbers := sum(p.numel() for p in _of_experts(model))):
        return ""
    share = numbers / sum(p.numel() for p in model.parameters())
    return (f"the {count_of(model)} experts of each layer, {share:.0%} of the weights, are not adapted: LoRA is on the "
            "layers that every token goes through")
