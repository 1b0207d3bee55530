"""LoRA of experts on the tokens that go through them: ``y = W x + s B A x``, with W, A and B of each token's expert.

PEFT's own forward pass adds s B A to the matrices of all experts, in every layer, at every step and for every token
that is generated; in training it also keeps the sums of all layers, and makes gradients as large. The products here are
those that the tokens need, grouped by expert as transformers groups those with W. Only what is computed changes:
adapters are saved and loaded by plain PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from gemma_tune.lora.experts import is_known

_ALIGNED = 8  # numbers of a row that grouped products ask for, of any type


def install(model: torch.nn.Module) -> int:
    """Let the adapted experts of a PEFT model compute as above; returns how many layers of them there are.

    Args:
        model: with one adapter; experts of other kinds are left to PEFT.
    """
    inner = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    outermost = [module for module in model.modules() if isinstance(module, ParamWrapper) and id(module) not in inner
                 and is_known(module.get_base_layer())]
    for module in outermost:
        module.forward = partial(_forward, module)
    return len(outermost)


def factors_of(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (experts, r, in), B (experts, out, r) and s of an adapted parameter: views of how PEFT has them."""
    name, count = wrapper.active_adapters[0], wrapper.num_experts
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    return (a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count).permute(2, 0, 1), wrapper.scaling[name])


def _forward(outermost: Any, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
    """In place of the module's.

    Args:
        x: (tokens, d).
        top_k_index: the experts of each token (tokens, k).
        top_k_weights: what the answer of each counts (tokens, k).
    """
    if outermost.disable_adapters or outermost.merged:
        return ParamWrapper.forward(outermost, x, top_k_index, top_k_weights)
    from transformers.integrations.moe import _grouped_linear

    experts, factors = outermost.get_base_layer(), {w.parameter_name: factors_of(w) for w in _wrappers(outermost)}
    chosen, order = torch.sort(top_k_index.reshape(-1))
    ends = torch.searchsorted(chosen, torch.arange(experts.num_experts, device=x.device), right=True, out_int32=True)

    def product(parameter: str, rows: torch.Tensor) -> torch.Tensor:
        out = _grouped_linear(rows, getattr(experts, parameter), ends)
        return out.add_(_low_rank(rows.to(out.dtype), ends, *factors[parameter])) if parameter in factors else out

    answers = product("down_proj", experts._apply_gate(product("gate_up_proj", x[order // top_k_index.shape[1]])))
    answers = answers * top_k_weights.reshape(-1)[order].unsqueeze(1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return answers[back].view(*top_k_index.shape, -1).sum(1).to(x.dtype)


def _wrappers(module: Any) -> Iterator[Any]:
    """Of one layer's experts, each around the next."""
    while isinstance(module, ParamWrapper):
        yield module
        module = module.base_layer


def _low_rank(rows: torch.Tensor, ends: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """``s B A x`` of rows (n, in) sorted by expert, (n, out); ``ends`` (experts,) are where each one's rows end."""
    from transformers.integrations.moe import _grouped_linear

    missing = -a.shape[1] % _ALIGNED
    a = torch.nn.functional.pad(a.to(rows.dtype), (0, 0, 0, missing))
    b = torch.nn.functional.pad((b * scale).to(rows.dtype), (0, missing)).contiguous()
    return _grouped_linear(_grouped_linear(rows, a, ends), b, ends)
