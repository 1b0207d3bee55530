"""Small helpers of those who put something else in a layer's place for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch


def unsharded(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a weight that FSDP keeps in shards; all processes have to ask for it."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def set_until(undo: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    """Set an attribute until ``undo`` is closed."""
    own = vars(owner)
    undo.callback(partial(setattr, owner, name, own[name]) if name in own else partial(delattr, owner, name))
    setattr(owner, name, value)


@contextlib.contextmanager
def plain_forward(model: Any, **more: Any) -> Iterator[None]:
    """The forward pass of the model's own class while the context lasts, in place of what training put there: it gives
    logits, and its signature tells ``generate`` what it takes.

    Args:
        more: what it is given besides, each time.
    """
    with contextlib.ExitStack() as undo:
        set_until(undo, model, "forward", partial(type(model).forward, model, **more))
        yield
