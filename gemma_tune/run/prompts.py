"""Held-out prompts of a run, to ask or to compare with: as long as those in training, with room for an answer."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from gemma_tune.answers.prompts import Prompt, first_fitting
from gemma_tune.base.checkpoint import context_length
from gemma_tune.run.session import Session

if TYPE_CHECKING:
    from gemma_tune.encoding.chat_format import ChatFormat

_UNKNOWN_CONTEXT = 4096  # of a model that does not say; every model that is trained here has as much


def prompt_limit(session: Session, answer_tokens: int) -> int:
    """Tokens that a prompt may have: no more than in training, and an answer fits into the context after it.

    An answer gets half of a short context at the most.
    """
    context = context_length(session.model.config) or _UNKNOWN_CONTEXT
    return min(session.settings_of("prepare").get("max_length", context),
               context - min(answer_tokens, context // 2))


def held_out(session: Session, chat: ChatFormat, count: int, answer_tokens: int, most: int | None = None,
             seen: Collection[str] = ()) -> list[Prompt]:
    """The first prompts of the run's rows that fit: those that training has not seen, then those that it has.

    Args:
        count: at most so many.
        most: tokens of a prompt, where long ones would take too long; not of one with pictures, as a single picture can
            have more.
        seen: names of the pictures that who asks can show; prompts with others are left out.
    """
    rows = (session.run.valid_rows, session.run.train_rows)
    return first_fitting(rows, chat, prompt_limit(session, answer_tokens), count, most, seen)
