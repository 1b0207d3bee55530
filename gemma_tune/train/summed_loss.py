"""The summed loss inside the model's own forward pass, so that wrappers (DDP, FSDP) see one call and one output."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from gemma_tune.base.errors import UserError
from gemma_tune.models.load import after_product
from gemma_tune.train.kernels import unsharded
from gemma_tune.train.loss import IGNORE_INDEX, linear_cross_entropy

_ROWS = 1024  # positions on which two heads are timed against each other
_TRL_CHUNK = 32_768  # TRL's own choice


def install_summed_loss(causal_lm: Any) -> str:
    """Make ``model(input_ids=…, labels=…)`` return ``{"loss": sum in nats}``; without labels nothing changes.

    On a CPU the head is ours. On another device both ours and TRL's (Triton) are timed on random positions, and the
    faster is taken.

    Args:
        causal_lm: the base model, whose forward TRL has patched.

    Returns:
        ``gemma-tune`` or ``trl``.

    Raises:
        UserError: the head adds a bias, which the loss here does not know.
    """
    if getattr(causal_lm.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"this model ({causal_lm.config.model_type}) adds a bias to its logits, which gemma-tune does "
                        "not know", "use a model of another family, such as Gemma, Llama or Qwen")
    theirs = causal_lm.forward
    head = _ours
    if causal_lm.device.type != "cpu" and hasattr(causal_lm.get_output_embeddings(), "weight"):
        head = _faster(causal_lm)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None or kwargs.get("fused_lm_head"):
            return theirs(*args, labels=labels, **kwargs)
        return {"loss": head(self, kwargs["input_ids"], labels)}

    causal_lm.forward = MethodType(forward, causal_lm)
    return "trl" if head is _trl else "gemma-tune"


def _ours(causal_lm: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    hidden = _hidden(causal_lm, input_ids)
    weight = _weight(causal_lm)
    # Under autocast the last norm may hand on fp32.
    return linear_cross_entropy(hidden.to(weight.dtype), weight, labels, **after_product(causal_lm))


def _hidden(causal_lm: Any, input_ids: torch.Tensor) -> torch.Tensor:
    # Rows are padded on the right, where a causal model never looks from a trained position. Without a mask attention
    # takes its fastest path.
    return causal_lm.get_decoder()(input_ids=input_ids, attention_mask=None, use_cache=False).last_hidden_state


def _weight(causal_lm: Any) -> torch.Tensor:
    """The whole head (vocabulary, d). As the input embedding too, FSDP has gathered it for the forward pass already."""
    weight = causal_lm.get_output_embeddings().weight
    if hasattr(weight, "full_tensor") and causal_lm.config.get_text_config().tie_word_embeddings:
        weight = causal_lm.get_input_embeddings().weight
    return unsharded(weight)


def _trl(causal_lm: Any, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _trl_head(causal_lm, _hidden(causal_lm, input_ids)[:, :-1], labels[:, 1:])


def _trl_head(causal_lm: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed loss by TRL's chunked kernel; hidden (rows, length, d), targets (rows, length)."""
    from trl.kernels import ChunkedLogProbFunction

    kept = targets != IGNORE_INDEX
    after = after_product(causal_lm)
    found = ChunkedLogProbFunction.apply(hidden[kept], _weight(causal_lm), None, targets[kept], 1.0, _TRL_CHUNK,
                                         after["softcap"], after["scale"], ("log_probs",))
    return -found[0].sum()


def _faster(causal_lm: Any) -> Callable[..., torch.Tensor]:
    weight = _weight(causal_lm)
    hidden = torch.randn(1, _ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype, requires_grad=True)
    labels = torch.randint(weight.shape[0], (1, _ROWS), device=weight.device)

    def ours() -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, **after_product(causal_lm))

    def theirs() -> torch.Tensor:
        return _trl_head(causal_lm, hidden[:, :-1], labels[:, 1:])

    try:
        return _trl if _seconds(theirs) < _seconds(ours) else _ours
    except (ImportError, RuntimeError, TypeError):  # no Triton for this device, or another TRL
        return _ours


def _seconds(head: Callable[[], torch.Tensor], repeats: int = 3) -> float:
    """Best time of forward and backward pass, after one that may compile."""
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        head().backward()
        torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - began)
    return best
