"""Experts in a step from one token to the next, which is to be captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gemma_tune.base.capturing import grouped_products_wait

_GROUPED, _BY_TOKEN = "grouped_mm", "batched_mm"  # as transformers calls them


@contextlib.contextmanager
def by_token(base: Any, rows: int) -> Iterator[None]:
    """Let a single token take the matrices of its experts while the context lasts, where products by expert would have
    the GPU waited for. Those of many tokens, which are copied for each, could be more than all there are.

    Args:
        base: the model of transformers.
    """
    text = base.config.get_text_config()
    was = getattr(text, "_experts_implementation", None)
    if was != _GROUPED or rows != 1 or not grouped_products_wait(base.device, base.dtype):
        yield
        return
    text._experts_implementation = _BY_TOKEN
    try:
        yield
    finally:
        text._experts_implementation = was
