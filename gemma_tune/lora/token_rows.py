"""Rows of embedding and head that are learned beside LoRA, those of some tokens: PEFT's ``trainable_token_indices``.

PEFT's own layer makes a copy of the whole matrix, with these rows in it, whenever the embedding or the head is used:
for each token of an answer some hundred megabytes. Here the rows lie in the base's matrix itself, and those that it had
come back while the adapter is switched off. Adapters are saved, loaded and merged by plain PEFT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.lora.config import how_to_renew
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.names import found_among
from gemma_tune.lora.whole import is_tied

if TYPE_CHECKING:
    from peft import PeftModel

NAME = "token_adapter"  # of the part of an embedding that has its rows, as PEFT calls it
_OF_PEFT = "trainable_tokens_delta"  # the rows themselves, in spite of the name
_ADAPTER = "default"


class TokenRows(AuxiliaryTrainingWrapper):
    """Rows of the weight of an embedding or a head, of which it becomes a part.

    Args:
        module: whose weight (entries, d) is changed in its place; a head may have the same one.
        ids: of the rows.
        rows: (n, d), which become fp32.
        without: rows (n, d) for as long as adapters are switched off; those that are there, if None.
    """

    def __init__(self, module: torch.nn.Module, ids: Sequence[int], rows: torch.Tensor,
                 without: torch.Tensor | None = None):
        torch.nn.Module.__init__(self)
        self._active_adapter, self._disable_adapters, self._adapters = [_ADAPTER], False, {_ADAPTER}
        self._around, self.ids = [module], [*ids]  # no module of this one's own, which would be in itself
        weight = module.weight.data
        index = torch.tensor(self.ids, device=weight.device)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("without", weight[index] if without is None else without.to(weight), persistent=False)
        self.trainable_tokens_delta = torch.nn.ParameterDict({
            _ADAPTER: torch.nn.Parameter(rows.to(weight.device, torch.float32, copy=True))})
        self.show()

    @property
    def original_module(self) -> torch.nn.Module:
        """What it is a part of."""
        return self._around[0]

    @property
    def rows(self) -> torch.nn.Parameter:
        """(n, d) in fp32, as they are learned."""
        return self.trainable_tokens_delta[_ADAPTER]

    @torch.no_grad()
    def show(self) -> None:
        """Have the rows in the matrix that are to be computed with now, rounded to its type."""
        rows = self.without if self._disable_adapters else self.rows
        weight = self.original_module.weight.data
        weight.index_copy_(0, self.index, rows.to(weight.dtype))

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's switch."""
        super().enable_adapters(enabled)
        self.show()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """There is one."""

    def _get_available_adapters(self) -> set[str]:
        return self._adapters

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What PEFT saves of it."""
        return {_OF_PEFT: state_dict[f"{_OF_PEFT}.{adapter_name}"]}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Where PEFT puts what it loads."""
        return {_OF_PEFT: f"{_OF_PEFT}.{adapter_name}"}


def rows_in(model: torch.nn.Module) -> dict[str, TokenRows]:
    """By the names of their modules in the base model."""
    return {name.removeprefix("base_model.model.").removesuffix(f".{NAME}"): module
            for name, module in model.named_modules() if isinstance(module, TokenRows)}


def install(model: PeftModel, adapter: Adapter) -> None:
    """Put an adapter's rows on the base of a PEFT model, ready to answer.

    Raises:
        UserError: they do not fit.
    """
    base = model.get_base_model()
    modules = dict(base.named_modules())
    for name, (ids, tensor) in adapter.rows.items():
        module = modules.get(found_among(modules, name) or "")
        if is_tied(base) and module is base.get_output_embeddings():
            raise UserError(f"the adapter {adapter.folder} has rows of {name} alone, which is the embedding in this "
                            "model", "merge it, where the two become apart: gemma-tune merge --no-check --adapter "
                            f"{shell.quote(str(adapter.folder))}")
        shape = getattr(getattr(module, "weight", None), "shape", None)
        if shape is None or len(shape) != 2 or shape[1] != tensor.shape[1] or max(ids) >= shape[0]:
            raise UserError(f"the adapter {adapter.folder} does not fit this base model: it has rows of {name}, which "
                            "the base does not have", how_to_renew(adapter.folder))
        setattr(module, NAME, TokenRows(module, ids, torch.from_numpy(tensor.rows())).requires_grad_(False))


def take_off(model: torch.nn.Module) -> None:
    """Leave the rows in the matrices, as part of the base."""
    for part in rows_in(model).values():
        delattr(part.original_module, NAME)
