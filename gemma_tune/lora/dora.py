"""DoRA layers: the length of each row of the adapted weight is learned by itself (Liu et al. 2024, arXiv 2402.09353).

``y = g (W x + s B A x)`` with ``g = m / ||W + s B A||``, the norm taken of each row, and constant for the gradient
(section 4.3 there).

PEFT's own forward pass multiplies B A out in fp32 for the norm, in every layer, at every step and for every token that
is generated; it starts from norms rounded to the type of W, so that a fresh adapter is not quite the base model; and it
loads a trained m into that type. Only what is computed changes here: adapters are saved and loaded by plain PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose


class Dora(DoraLinearVariant):
    """The forward pass of one layer.

    Dropout is on the input of A alone. PEFT, like the authors' code, drops it in (g - 1) W x too, for which x goes
    through W a second time; on average both are the same.

    Args:
        squares: ||w||^2 of each row of W (out,), fp32, for an adapter that changes.
        gain: g (out,), fp32, for one that does not.
    """

    def __init__(self, *, squares: torch.Tensor | None = None, gain: torch.Tensor | None = None):
        self.squares, self.gain = squares, gain

    def forward(self, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any
                ) -> torch.Tensor:
        """Args: x (…, in); result (…, out), what the base layer gave. Returns (…, out) in result's type."""
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scale, bias, narrow = module.scaling[active_adapter], module.get_base_layer().bias, result.dtype
        inner = torch.nn.functional.linear(module.lora_dropout[active_adapter](x.to(narrow)), a.to(narrow))
        out = (result if bias is None else result - bias).reshape(-1, result.shape[-1])
        out = torch.addmm(out, inner.reshape(-1, inner.shape[-1]), (b * scale).to(narrow).t()).view(result.shape)
        gain = self.gain
        if gain is None:
            gain = module.lora_magnitude_vector[active_adapter].weight / self._norm(module, a, b, scale, narrow)
        # g itself is close to 1, where bf16 has steps of 0.4 to 0.8 %: too coarse for what is learned.
        out = torch.addcmul(out, out, (gain - 1).to(narrow))
        return out if bias is None else out + bias

    @torch.no_grad()
    def _norm(self, module: Any, a: torch.Tensor, b: torch.Tensor, scale: float, narrow: torch.dtype) -> torch.Tensor:
        """||w + s d|| of each row, d = b A, (out,) fp32: ||w||^2 + s b·(2 A w + s A A^T b), without a matrix like W."""
        base = module.get_base_layer()
        along = base(a.to(narrow))  # (r, out): A W^T, whatever form W has
        along = along.float() if base.bias is None else (along - base.bias).float()
        mixed = 2 * along.t() + scale * (b @ (a @ a.t()))
        return (self.squares.to(b.device) + scale * (b * mixed).sum(1)).clamp_(min=0).sqrt_()


def start_from_base(model: torch.nn.Module) -> int:
    """Let an untrained adapter's DoRA layers compute as above and begin as the base model; returns how many there are.

    Args:
        model: a PEFT model whose B are zero still.
    """
    count = 0
    for layer, name in _layers(model):
        squares = _weight(layer).square().sum(1)
        layer.lora_magnitude_vector[name].weight.data.copy_(squares.sqrt())
        _install(layer, name, Dora(squares=squares))
        count += 1
    return count


def settle(model: torch.nn.Module) -> None:
    """Compute g once in each DoRA layer of a trained adapter, which was loaded in fp32; A and B get the type of W, but
    for one of packed numbers."""
    with torch.no_grad():
        for layer, name in _layers(model):
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            norm = torch.linalg.vector_norm(_weight(layer) + layer.scaling[name] * (b @ a), dim=1)
            _install(layer, name, Dora(gain=layer.lora_magnitude_vector[name].weight.detach() / norm))
            if (dtype := layer.get_base_layer().weight.dtype).is_floating_point:
                layer.lora_A[name].to(dtype)
                layer.lora_B[name].to(dtype)


def _layers(model: torch.nn.Module) -> Iterator[tuple[Any, str]]:
    """Linear DoRA layers with the name of their adapter; embeddings are PEFT's to compute."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            yield from ((layer, name) for name, kind in layer.lora_variant.items()
                        if isinstance(kind, DoraLinearVariant) and name in layer.lora_A)


def _weight(layer: Any) -> torch.Tensor:
    """W (out, in) in fp32; of a 4-bit layer, what it computes with. GPT-2's layers have it the other way round."""
    return transpose(dequantize_module_weight(layer.get_base_layer()).detach().float(), layer.fan_in_fan_out)


def _install(layer: Any, name: str, variant: Dora) -> None:
    layer.lora_variant[name] = variant
    layer.cast_input_dtype_enabled = False  # x stays in the type that it is multiplied in
