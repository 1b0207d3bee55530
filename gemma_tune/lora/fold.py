"""An adapter folded into the weights of a model in memory, which then computes as fast as its base model.

W' = W + s (B A), as :mod:`gemma_tune.merge.weights` writes it: in fp32, rounded once to the type of W.
"""

from __future__ import annotations

from typing import Any

from gemma_tune.lora.experts import is_known


def fold(model: Any) -> Any | None:
    """The base model with the adapter in its weights; None, and nothing has changed, where that cannot be exact.

    That is where a layer is quantised or kept narrower than it computes, is shared with another (a head with the
    embedding), has something else than A and B, or where these are not finite, of which the adapter's own errors tell.

    Args:
        model: a PEFT model with one adapter, which is not to be used any more.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    from gemma_tune.lora.token_rows import TokenRows, take_off

    whole = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    if not all(isinstance(module, TokenRows) for module in whole):  # else they are modules of its own
        return None
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]  # experts' around one another
    shared = _shared(model)
    if not layers or not all(_is_plain(layer, shared) for layer in layers):
        return None
    with torch.no_grad():
        for layer in layers:
            _fold_into(_weight(layer), layer)
    take_off(model)
    return model.unload()


def _is_plain(layer: Any, shared: set[int]) -> bool:
    import torch
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import ParamWrapper

    if type(layer) not in (Linear, ParamWrapper) or layer.merged or layer.disable_adapters:
        return False
    base, names = layer.get_base_layer(), layer.active_adapters
    return ((is_known(base) if type(layer) is ParamWrapper else type(base) is torch.nn.Linear)
            and type(_weight(layer)) is torch.nn.Parameter and len(names) == 1 and names[0] in layer.lora_A
            and _weight(layer).dtype.is_floating_point and _weight(layer).data_ptr() not in shared
            and not layer.lora_bias.get(names[0], False) and not getattr(layer, "fan_in_fan_out", False)
            and names[0] not in layer.lora_variant and _stays_finite(layer, names[0]))


def _stays_finite(layer: Any, name: str) -> bool:
    """Whether no number of s B A can be too large for the type of W; not so where one of them is not finite."""
    import torch

    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    rank = len(a) // getattr(layer, "num_experts", 1)
    most = abs(layer.scaling[name]) * rank * a.abs().max().item() * b.abs().max().item()
    return most < torch.finfo(_weight(layer).dtype).max / 2  # a NaN is not less than anything


def _weight(layer: Any) -> Any:
    """W (out, in), or (experts, out, in)."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def _fold_into(weight: Any, layer: Any) -> None:
    """Make W' of W, one matrix at a time."""
    from gemma_tune.lora.routed import factors_of

    name = layer.active_adapters[0]
    if weight.ndim == 3:
        a, b, scale = factors_of(layer)
    else:
        weight, a, b = weight[None], layer.lora_A[name].weight[None], layer.lora_B[name].weight[None]
        scale = layer.scaling[name]
    for own, one_a, one_b in zip(weight, a, b):
        own.copy_(own.float().add_(one_b.float() @ one_a.float(), alpha=scale))


def _shared(model: Any) -> set[int]:
    """Where weights lie that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if parameter.data_ptr() in seen else seen).add(parameter.data_ptr())
    return shared
