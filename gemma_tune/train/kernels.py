"""Layers of the training's forward and backward pass without the passes over memory that plain autograd makes.

A small model's step is limited by memory as much as by products. Plain PEFT casts every activation to the adapter's
fp32 and multiplies there; RMSNorm and the rotary embedding are a dozen elementwise operations each, whose results
autograd keeps. Each is one autograd function here, with its derivative written out: in PyTorch's operations for a CPU
(``elementwise``), as Triton kernels for a GPU (``fused``).

Nothing is replaced on trust: a norm, a rotation or a gate of another family is left as it is unless the function here
gives the same result on random input, see :func:`fast_layers`. Weights stay where they are, so the adapter is saved and
loaded by plain PEFT.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gemma_tune.train import elementwise
from gemma_tune.train.adapters import dense_weight, replace_adapters
from gemma_tune.train.attention import causal_attention_or
from gemma_tune.train.cuda_attention import fastest_attention_or, forget_layers
from gemma_tune.train.products import has_kernels
from gemma_tune.train.undoing import set_until
from gemma_tune.train.unpacking import Room


class FastLayers(dict[str, int]):
    """How many layers of each kind were replaced."""

    refresh: Callable[[], None]
    """To be called after an optimiser step before a captured step is replayed: what was copied of the adapters is
    copied again. Steps that are not captured see to it themselves."""


@contextlib.contextmanager
def fast_layers(model: torch.nn.Module, of: torch.device | None = None) -> Iterator[FastLayers]:
    """Compute with the functions above while the context lasts; afterwards the model is as it was.

    Args:
        model: a PEFT model whose base is frozen.
        of: the device whose functions are taken, if not the one that the model is on.

    Yields:
        How many layers of each kind were replaced, and how to refresh what is kept of the adapters.
    """
    device = of or next((p.device for p in model.parameters()), torch.device("cpu"))
    operations = _operations(device)
    with contextlib.ExitStack() as undo:
        adapters, copies = replace_adapters(model, undo, narrow=operations is not elementwise)
        counts = FastLayers(adapters=adapters, norms=elementwise.replace_norms(model, undo, operations),
                            rotations=elementwise.replace_rotations(model, undo, operations),
                            gates=elementwise.replace_gates(model, undo, operations))
        counts.refresh = copies.refresh
        _replace_attention(undo, device)
        yield counts


def _operations(device: torch.device) -> Any:
    """The module whose RMSNorm, Rotation and GatedActivation are used on a device."""
    if not has_kernels(device):
        return elementwise
    from gemma_tune.train import fused

    return fused


@contextlib.contextmanager
def compiled_layers(model: torch.nn.Module) -> Iterator[None]:
    """Compile the decoder's layers with ``torch.compile`` while the context lasts; the first steps then take long.

    The layers share one compilation per kind, which is why each is compiled by itself. Norms and rotations stay as
    they are, since the compiler fuses them; adapters multiply in the compute type, as in ``adapters.LoraLinear``. What
    goes into the first layer takes part in the backward pass as what goes into the others does, since the first would
    be compiled a second time otherwise.
    """
    from peft.tuners.lora import LoraLayer

    with contextlib.ExitStack() as undo:
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and dense_weight(layer, Room()) is not None:
                undo.callback(setattr, layer, "__class__", type(layer))
                layer.__class__ = _seen_through(type(layer))
        for layer in _decoder_layers(model):
            undo.callback(setattr, layer, "_compiled_call_impl", None)
            layer.compile(dynamic=True)
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, ids, out: out.requires_grad_() if torch.is_grad_enabled() else out)
        undo.callback(hook.remove)
        yield


@contextlib.contextmanager
def not_compiled(model: torch.nn.Module) -> Iterator[None]:
    """In place of compiled layers the fast ones while the context lasts, as for a validation.

    Without gradients each layer would be compiled once more, and torch gives up after eight times.
    """
    layers = [(layer, layer._compiled_call_impl) for layer in _decoder_layers(model)]
    with contextlib.ExitStack() as undo:
        for layer, compiled in layers:
            undo.callback(setattr, layer, "_compiled_call_impl", compiled)
            layer._compiled_call_impl = None
        undo.enter_context(fast_layers(model))
        yield


def _decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.get_base_model().get_decoder().layers


def worth_compiling(before: float, after: float, compiling: float, batches: float) -> tuple[bool, str]:
    """Whether to go on with compiled layers, and the sentence that says why.

    What was spent on compiling is spent, so faster layers are kept also where they will not make up for it.

    Args:
        before, after: seconds of one and the same batch without and with compiled layers.
        compiling: seconds of the first batch with them.
        batches: how many such batches the training is worth.
    """
    if after >= before:
        return False, (f"compiling took {compiling:.0f} s and did not help ({after:.2f} s instead of {before:.2f} s "
                       "for the longest batch): going on without it")
    even = compiling / (before - after)
    verdict = "it pays" if even < batches else "it does not pay: leave --compile out next time"
    return True, (f"compiling took {compiling:.0f} s and saves {before - after:.2f} of {before:.2f} s on the longest "
                  f"batch: even after {even:,.0f} such batches, and this training is worth {batches:,.0f}; {verdict}")


@functools.cache
def _seen_through(kind: type) -> type:
    """PEFT's kind of layer with the same in operations that a compiler can see through.

    A class and no function for each layer: by that the compiler would tell the layers apart and compile every one.
    """
    class SeenThrough(kind):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.disable_adapters or self.merged or args or kwargs:
                return kind.forward(self, x, *args, **kwargs)
            name = self.active_adapters[0]
            a, b = self.lora_A[name].weight.to(x.dtype), (self.lora_B[name].weight * self.scaling[name]).to(x.dtype)
            linear = torch.nn.functional.linear
            return self.get_base_layer()(x) + linear(linear(self.lora_dropout[name](x), a), b)

    return SeenThrough


def _replace_attention(undo: contextlib.ExitStack, device: torch.device) -> None:
    from transformers import masking_utils
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    # Rows are never packed here; to find that out, the library would wait for the GPU, or make a mask in a capture.
    set_until(undo, masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    theirs = FUNCTIONS["sdpa"]
    undo.callback(FUNCTIONS.__setitem__, "sdpa", theirs)
    undo.callback(forget_layers)
    FUNCTIONS["sdpa"] = (fastest_attention_or if device.type == "cuda" else causal_attention_or)(theirs)
