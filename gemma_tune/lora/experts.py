"""Mixtures of experts: which can be adapted, and what is left as it was. ``torch`` is imported inside functions.

Transformers keeps a layer's experts in two parameters (experts, rows, columns), which PEFT adapts with
``target_parameters``: every expert has an A and a B of its own, and those of a parameter lie in two matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module, Parameter
    from transformers import PreTrainedModel

ASKED = "experts"  # what --target-modules calls them
# In the order in which their modules have them: PEFT puts the adapter of the first around the module, and those of the
# others around that.
PARAMETERS = ("gate_up_proj", "down_proj")
# What checkpoints call the parts of each where every expert has matrices of its own; what is one below the other in
# memory, in that order.
PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# How such a module computes, as transformers' ``use_experts_implementation`` writes it there: y = W2 (f(W1 x)), with
# the matrices as those of linear layers.
_KIND = {"has_gate": True, "has_bias": False, "has_post_expert_norm": False, "is_transposed": False,
         "is_concatenated": True}


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


def chosen_of(model: PreTrainedModel) -> int:
    """How many experts a token goes through."""
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), count_of(model))


def share_of(model: PreTrainedModel) -> float:
    """The share of the experts that a token goes through; all of it in a dense model."""
    count = count_of(model)
    return chosen_of(model) / count if count else 1.0


def adaptable(model: PreTrainedModel) -> list[str]:
    """Full names of the parameters of experts to which LoRA can be added; none of a family that keeps them in a way of
    its own, in memory or on the disk."""
    if not count_of(model) or not _stored_as_known(model):
        return []
    return [f"{name}.{parameter}" for name, module in model.named_modules()
            if name.endswith(f".{ASKED}") and is_known(module) for parameter in PARAMETERS]


def module_of(parameter: str, adapted: Any) -> str:
    """What PEFT calls the module that holds the A and B of a parameter, without its prefix.

    Args:
        adapted: full names of all parameters that are adapted.
    """
    module, _, name = parameter.rpartition(".")
    around = PARAMETERS[PARAMETERS.index(name) + 1:]
    return module + ".base_layer" * sum(f"{module}.{other}" in adapted for other in around)


def is_known(module: Module) -> bool:
    """Whether a module's parameters are those of experts to which LoRA is added here."""
    return all(getattr(module, name, None) is value for name, value in _KIND.items()) and all(
        getattr(getattr(module, name, None), "ndim", 0) == 3 for name in PARAMETERS)


def _stored_as_known(model: PreTrainedModel) -> bool:
    """Whether checkpoints have the experts as they are in memory, or each expert's matrices by themselves."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    for change in get_model_conversion_mapping(model) or ():
        changed = {name for name in PARAMETERS for target in change.target_patterns if name in target}
        leaves = tuple(source.removesuffix(".weight").rsplit(".", 1)[-1] for source in change.source_patterns)
        if any(leaves not in PARTS[name] for name in changed):
            return False
    return True


def _of_experts(model: PreTrainedModel) -> Iterator[tuple[str, Parameter]]:
    """Matrices of all experts of a layer together, (experts, rows, columns), with their names."""
    count = count_of(model)
    return ((name, p) for name, p in model.named_parameters() if count and p.ndim == 3 and len(p) == count)


def not_adapted_of(model: PreTrainedModel) -> str:
    """What to say of the experts; "" where there are none."""
    if not (numbers := sum(p.numel() for _, p in _of_experts(model))):
        return ""
    share = numbers / sum(p.numel() for p in model.parameters())
    way = f"; --target-modules all,{ASKED} adapts them too" if adaptable(model) else ""
    return (f"the {count_of(model)} experts of each layer, {share:.0%} of the weights, are not adapted: LoRA is on the "
            f"layers that every token goes through{way}")
