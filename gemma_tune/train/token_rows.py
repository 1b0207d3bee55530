"""New tokens in training: where their rows of embedding and head begin, and their gradients.

A row begins as the mean of the rows that the token's text had before, of which the model knows something; what it had
itself, an unused one, would be far from all that the model has seen. Of the matrices, which are frozen, only these rows
have a gradient: of the embedding where the token is read, and of the head for every learned position,

    d loss / d W_j = (softmax(z)_j - [y = j]) h,   softmax(z)_j = exp(z_j - z_y - loss),   z = h W^T

so that the loss that was computed anyway stands for the sum over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gemma_tune.base.errors import UserError
from gemma_tune.lora.targets import Targets
from gemma_tune.lora.token_rows import NAME, TokenRows, rows_in, take_off
from gemma_tune.lora.whole import copies_in, each_once, is_tied
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.products import wide_product


@dataclass(frozen=True)
class NewTokens:
    """What of a model new tokens are.

    Args:
        texts: by the id of each, the ids that its text had before.
        modules: names in the base model of the embedding and, where it is another tensor, of the head.
        whole: these are trained as a whole, and nothing of them apart.
    """

    texts: Mapping[int, Sequence[int]]
    modules: tuple[str, ...]
    whole: bool

    def begin(self, model: Any) -> list[torch.utils.hooks.RemovableHandle]:
        """Have the rows in a PEFT model as they begin, and let them learn.

        Returns:
            What is to be removed with them.
        """
        if self.whole:
            self.begin_anew(model)
            return []
        base, leaves = model.get_base_model(), {}
        for name in self.modules:
            module = base.get_submodule(name)
            start = self._starts(module.weight)
            setattr(module, NAME, TokenRows(module, [*self.texts], start, without=start))
            leaves[_short(base, name)] = [*self.texts]
        model.peft_config["default"].trainable_token_indices = leaves
        words, parts = base.get_submodule(self.modules[0]), [*rows_in(model).values()]
        return [words.register_forward_pre_hook(lambda *_: _show(parts)),
                words.register_forward_hook(_Reading(words, len(words.weight)))]

    @torch.no_grad()
    def begin_anew(self, model: Any) -> None:
        """The same of modules that are trained as a whole, which have the base's rows."""
        index = torch.tensor([*self.texts])
        for name, (_, module) in each_once(copies_in(model)).items():
            if name in self.modules:
                weight = module.weight
                weight.index_copy_(0, index.to(weight.device), self._starts(weight).to(weight.dtype))

    @torch.no_grad()
    def _starts(self, weight: torch.Tensor) -> torch.Tensor:
        """(n, d) in fp32."""
        return torch.stack([weight[torch.tensor([*old], device=weight.device)].float().mean(0)
                            for old in self.texts.values()])


def new_tokens(model: Any, texts: Mapping[int, Sequence[int]], targets: Targets) -> NewTokens | None:
    """What is to be learned of new tokens; None where there are none.

    Args:
        model: the base.
        texts: as of :class:`NewTokens`.

    Raises:
        UserError: one of embedding and head is trained as a whole, and the other is another tensor and is not.
    """
    if not texts:
        return None
    ends = {name: module for name, module in model.named_modules() if module is model.get_input_embeddings()}
    if not is_tied(model):
        ends |= {name: module for name, module in model.named_modules() if module is model.get_output_embeddings()}
    among = [name for name in ends if name in targets.whole]
    if among and len(among) < len(ends):
        both = ",".join(name.rsplit(".", 1)[-1] for name in ends)
        raise UserError(f"--modules-to-save names {among[0].rsplit('.', 1)[-1]} alone, and new tokens have a row in "
                        "embedding and head, which are two tensors in this model",
                        f"name both, --modules-to-save {both}, or neither: the rows of new tokens are learned anyway")
    return NewTokens(texts, tuple(ends), bool(among))


def forget(model: Any, hooks: Sequence[Any]) -> None:
    """Take off what :meth:`NewTokens.begin` has put on."""
    for hook in hooks:
        hook.remove()
    take_off(model)


def _show(parts: Sequence[TokenRows]) -> None:
    """Have in the matrices what the last step made of the rows: before each pass, also of a captured step."""
    for part in parts:
        part.show()


def _short(base: Any, name: str) -> str:
    """The last name of a module, by which PEFT finds it, where it finds no other by that."""
    last = name.rsplit(".", 1)[-1]
    return last if sum(other.endswith(last) for other, _ in base.named_modules()) == 1 else name


# ---- gradients -------------------------------------------------------------------------------------------------------

class _Reading:
    """Gives rows their gradient where their tokens are read: a hook of the embedding's forward pass."""

    def __init__(self, embedding: torch.nn.Module, entries: int):
        self._part = part = getattr(embedding, NAME)
        device = part.index.device
        self._places = torch.full((entries,), len(part.ids), device=device)  # of rows; of others behind them
        self._places[part.index] = torch.arange(len(part.ids), device=device)

    def __call__(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() or self._part.disable_adapters:
            return out
        # Gemma 3 multiplies what it looks up, in the module itself.
        scale = getattr(module, "embed_scale", 1.0)
        factor = scale.to(out.dtype) if torch.is_tensor(scale) else scale
        return _Read.apply(out, self._part.rows, self._places[args[0]].reshape(-1), factor)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, rows, places, factor):
        """Args: out (…, d) what was looked up; rows (n, d); places (tokens,) of their rows, n of any other."""
        ctx.save_for_backward(places)
        ctx.factor, ctx.count, ctx.dtype = factor, len(rows), rows.dtype
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        each = grad.reshape(len(places), -1).to(ctx.dtype) * ctx.factor
        # Its size does not depend on which tokens there are, so that the step can be captured.
        to_rows = each.new_zeros(ctx.count + 1, each.shape[1]).index_add_(0, places, each)[:-1]
        return grad if ctx.needs_input_grad[0] else None, to_rows, None, None


def with_rows(losses: torch.Tensor, hidden: torch.Tensor, causal_lm: Any, targets: torch.Tensor, *,
              softcap: float | None = None, scale: float = 1.0) -> torch.Tensor:
    """Losses whose gradient goes to the learned rows of the head as well; as they are, where it has none.

    Args:
        losses: (n,) of rows ``hidden`` (n, d) in the head's type, as :func:`gemma_tune.train.loss.rows_cross_entropy`
            gives them, for the same ``targets``, ``softcap`` and ``scale``.
        causal_lm: the base model.
    """
    head, words = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    part = getattr(words if is_tied(causal_lm) else head, NAME, None)
    if part is None or not torch.is_grad_enabled() or part.disable_adapters:
        return losses
    return _Written.apply(losses, part.rows, hidden.detach(), head.weight, part.index, targets, softcap, scale)


class _Written(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses, rows, hidden, weight, index, targets, softcap, scale):
        """Args: rows (k, d); index (k,) of them in weight (vocabulary, d); targets (n,)."""
        left_out = (targets == IGNORE_INDEX).unsqueeze(1)
        hidden = hidden.masked_fill(left_out, 0)  # a row that only fills up may hold anything
        # Rounded as the logits of the loss were.
        own = (hidden.float() * weight.index_select(0, targets.clamp(min=0)).float()).sum(1, keepdim=True)
        z, own = (_capped(logits.to(hidden.dtype).to(losses.dtype), softcap, scale)
                  for logits in (hidden @ weight.index_select(0, index).t(), own))
        loss = losses.detach().unsqueeze(1)
        share = torch.where(targets.unsqueeze(1) == index, torch.expm1(-loss), (z - own - loss).exp())
        if softcap:
            share = share * (1 - (z / softcap).square())
        ctx.save_for_backward(hidden, share.mul(scale).masked_fill(left_out, 0))
        ctx.dtype = rows.dtype
        return losses.view_as(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, share = ctx.saved_tensors
        to_rows = wide_product((share * grad.unsqueeze(1)).to(hidden.dtype).t(), hidden).to(ctx.dtype)
        return grad, to_rows, None, None, None, None, None, None


def _capped(logits: torch.Tensor, softcap: float | None, scale: float) -> torch.Tensor:
    logits = logits * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits
