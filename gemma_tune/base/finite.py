"""Where logits or a loss are not finite: whose numbers that comes from."""

from __future__ import annotations

import math
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted

_OF_ADAPTER = "lora_"


def refuse_not_finite(logits: Any, model: Any) -> None:
    """Refuse logits (…, vocabulary) that are NaN, or infinite upwards, as whatever is made of them means nothing.

    Args:
        model: that made them; looked through only if they are not finite.

    Raises:
        UserError: they are not; it names the weights that hold such numbers, or says that none does.
    """
    if not math.isfinite(logits.max().item()):  # one pass; a NaN anywhere is the largest
        raise not_finite(model)


def not_finite(model: Any) -> UserError:
    """What to say of a model whose results are not finite."""
    if found := weights_not_finite(model):
        return found
    dtype = str(getattr(model, "dtype", "")).removeprefix("torch.")
    return UserError(f"what the model computes in {dtype or 'this type'} is not finite, though its weights are: "
                     "they do not fit together, or an adapter is scaled too high",
                     "compute with --dtype fp32; if that does not help, train again with a lower --alpha and "
                     "--learning-rate")


def weights_not_finite(model: Any) -> UserError | None:
    """What to say of a model with weights that are not finite, the adapter's first; None if all of them are."""
    import torch

    bad = [name for name, p in model.named_parameters()
           if p.dtype.is_floating_point and not bool(torch.isfinite(p.detach()).all())]
    if not bad:
        return None
    adapter = [name for name in bad if _OF_ADAPTER in name]
    found = adapter or bad
    what = f"{'the adapter' if adapter else 'the base model'} holds infinities or no numbers (NaN)"
    return UserError(f"{what} in {counted(len(found), 'tensor')}, the first of them {found[0]}",
                     "train again with a lower --learning-rate: gemma-tune train --force; or copy the adapter again"
                     if adapter else "download the model again, or name another with --model")
