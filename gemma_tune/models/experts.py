"""A layer's experts as products that can be watched: what each expert's matrices are multiplied with.

Transformers computes all experts of a layer in one module, with one parameter of all gates and one of all that leads
out of them. Here each tensor of the checkpoint is a module of its own, which is given its inputs as a linear layer is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from gemma_tune.base.tensors import StoredTensor
from gemma_tune.gguf.architectures.experts import in_model

# What a product does → the parameter of Transformers' module that it is, and which half of it.
_PARTS = {"gate_up": ("gate_up_proj", None), "gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1),
          "down": ("down_proj", None)}


class ExpertProduct(torch.nn.Module):
    """The product with one matrix of each expert; without memory until it is filled.

    Args:
        source: what the checkpoint calls the tensor, without an expert's number.
        matrices: (rows, columns) of each expert.
        shared: whether all experts get the same inputs, so that a column means the same to each of them.
    """

    def __init__(self, source: str, matrices: Sequence[StoredTensor], shared: bool):
        super().__init__()
        self.source, self.matrices, self.shared = source, matrices, shared
        self.weight = self._empty("meta", torch.float32)

    def _empty(self, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Parameter:
        shape = (len(self.matrices), *self.matrices[0].shape)
        return torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

    def fill(self, device: torch.device, dtype: torch.dtype, values: Callable[[StoredTensor], torch.Tensor]) -> None:
        """Read the weights, one expert's at a time."""
        self.weight = self._empty(device, dtype)
        for own, stored in zip(self.weight, self.matrices, strict=True):
            own.copy_(values(stored))

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Inputs (some, columns), each times the matrices of its experts (some, used): (some · used, rows)."""
        used, experts = experts.shape[1], experts.flatten()
        order = experts.argsort(stable=True)
        parts = x[order // used].split(experts.bincount(minlength=len(self.weight)).tolist())
        out = torch.cat([part @ weight.T for part, weight in zip(parts, self.weight, strict=True) if len(part)])
        return out[order.argsort()]


class Experts(torch.nn.Module):
    """What a layer's experts make of its states, in place of Transformers' module.

    Args:
        act: between the products.
        products: by what they do: ``gate_up``, or ``gate`` and ``up``; and ``down``, the last.
    """

    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], products: Mapping[str, ExpertProduct]):
        super().__init__()
        self.act_fn = act
        self.products = torch.nn.ModuleDict(products)

    def forward(self, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """States (tokens, hidden size), with the experts of each token and how much each counts, (tokens, used)."""
        gates = [product(states, chosen) for part, product in self.products.items() if part != "down"]
        gate, up = torch.cat(gates, dim=-1).chunk(2, dim=-1)
        out = self.products["down"](self.act_fn(gate) * up, chosen.reshape(-1, 1)) * weights.reshape(-1, 1)
        return out.view(*chosen.shape, -1).sum(1).to(states.dtype)


def watch(model: torch.nn.Module, matrices: Mapping[str, Sequence[StoredTensor]],
          canonical: Callable[[str], str]) -> None:
    """Put :class:`Experts` in the place of a model's own.

    Args:
        matrices: of each expert, by what the checkpoint calls them all.
        canonical: a parameter's name → the checkpoint's, where they differ.
    """
    sources = {in_model(source): source for source in matrices}
    for prefix, module in list(model.named_modules()):
        own = {part: sources.get((canonical(f"{prefix}.{name}"), half)) for part, (name, half) in _PARTS.items()}
        if own["down"]:
            model.set_submodule(prefix, Experts(module.act_fn, {
                part: ExpertProduct(source, matrices[source], part != "down")
                for part, source in own.items() if source}))
