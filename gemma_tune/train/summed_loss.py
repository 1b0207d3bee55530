"""The summed loss inside the model's own forward pass, so that wrappers (DDP, FSDP) see one call and one output."""

from __future__ import annotations

from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch

from gemma_tune.base.errors import UserError
from gemma_tune.models.load import after_product
from gemma_tune.train.attention import AS_MASKED
from gemma_tune.train.loss import rows_cross_entropy
from gemma_tune.train.token_rows import with_rows
from gemma_tune.train.undoing import unsharded


def install_summed_loss(causal_lm: Any) -> None:
    """Make ``model(input_ids=…, positions=…, targets=…)`` return ``{"loss": sum in nats}``; else nothing changes.

    With ``each`` it is ``{"losses": (n,) in nats}``, of each position; ``temperature`` is what logits are divided by.

    ``positions`` (n,) are those of the flattened ``input_ids`` (rows, length) whose hidden state predicts a trained
    token, see ``batches.trained_positions``, ``targets`` (n,) those tokens, or ``IGNORE_INDEX`` where a list was filled
    up: so nothing has a size that depends on the data. ``position_ids`` are those of the model, where tokens are not
    counted from each row's beginning, and ``seen`` what it is given of pictures, see
    ``answers.sight.inputs_beside``, or all that it is given in place of ids (``inputs_embeds`` and others).

    Args:
        causal_lm: the base model, whose forward TRL has patched.

    Raises:
        UserError: the head adds a bias, which the loss here does not know.
    """
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"this model ({causal_lm.config.model_type}) adds a bias to its logits, which gemma-tune does "
                        "not know", "use a model of another family, such as Gemma, Llama or Qwen")
    theirs = causal_lm.forward

    def forward(self, *args: Any, positions: torch.Tensor | None = None, targets: torch.Tensor | None = None,
                each: bool = False, temperature: float = 1.0, seen: Mapping[str, Any] | None = None,
                **kwargs: Any) -> Any:
        if positions is None:
            return theirs(*args, **kwargs)
        ids, places = kwargs["input_ids"], kwargs.get("position_ids")
        hidden = _hidden_of_pictures(self, ids, seen) if seen else _hidden(self, ids, places)
        losses = _losses(self, hidden, positions, targets, temperature)
        return {"losses": losses} if each else {"loss": losses.sum()}

    causal_lm.forward = MethodType(forward, causal_lm)


def _losses(causal_lm: Any, hidden: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor,
            temperature: float) -> torch.Tensor:
    rows = hidden.flatten(0, 1).index_select(0, positions)
    head = causal_lm.get_output_embeddings()
    whole = getattr(head, "whole", None)  # where the head is trained
    weight, trained = (_weight(causal_lm), None) if whole is None else (whole.narrow("weight"), head.weight)
    # What is capped is capped first and divided then, which is the same: c tanh(s u / c) / t, of c / t and s / t.
    factors = {name: value and (value / temperature) for name, value in after_product(causal_lm).items()}
    rows = rows.to(weight.dtype)  # under autocast the last norm may hand on fp32
    losses = rows_cross_entropy(rows, weight, targets, trained=trained, **factors)
    return losses if trained is not None else with_rows(losses, rows, causal_lm, targets, **factors)


def _hidden(causal_lm: Any, input_ids: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    # Rows are padded on the right, where a causal model never looks from a trained position. Without a mask attention
    # takes its fastest path.
    where = {} if places is None else {"position_ids": places}
    return causal_lm.get_decoder()(input_ids=input_ids, attention_mask=None, use_cache=False, **where).last_hidden_state


def _hidden_of_pictures(causal_lm: Any, input_ids: torch.Tensor, seen: Mapping[str, Any]) -> torch.Tensor:
    """By the model around the decoder, which puts pictures in their places and lets their parts see each other; by the
    decoder alone where what is added behind its first layers is in its place already."""
    whole = causal_lm.model
    model = causal_lm.get_decoder() if "deepstack_visual_embeds" in seen else whole
    ids = {} if "inputs_embeds" in seen else {"input_ids": input_ids}
    hidden = model(attention_mask=None, use_cache=False, **ids, **seen, **{AS_MASKED: True})
    if hasattr(whole, "rope_deltas"):
        whole.rope_deltas = None  # by which Qwen's answers to the next prompt would go on from these rows
    return hidden.last_hidden_state


def _weight(causal_lm: Any) -> torch.Tensor:
    """The whole head (vocabulary, d). As the input embedding too, FSDP has gathered it for the forward pass already."""
    weight = causal_lm.get_output_embeddings().weight
    # Whether they are one is said by the model's own configuration, not by that of its text part.
    if hasattr(weight, "full_tensor") and getattr(causal_lm.config, "tie_word_embeddings", False):
        weight = causal_lm.get_input_embeddings().weight
    return unsharded(weight)
