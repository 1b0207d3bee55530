"""Answers as ``eval`` has them made, from conversations instead of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.answers.generation import Answer, greedy_continuations, prompt_ids


def greedy_answers(model: Any, chat: Any, prompts: Sequence[Any], count: int, tools: Sequence[Any] | None = None) -> list[Answer]:
    """Greedy answers to several prompts in one batch, each with its own tools on offer."""
    encoded = [prompt_ids(chat, *asked) for asked in zip(prompts, tools or [None] * len(prompts), strict=True)]
    return greedy_continuations(model, chat, encoded, count)
