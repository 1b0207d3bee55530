"""What a chat template makes of the white space around a text: some trim every turn, some only an answer's line breaks.

It is read off a render of a marker word in the place of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gemma_tune.encoding.labels import FormatError
from gemma_tune.encoding.left_out import CALL, QUESTION, RESULT

REASONING = "reasoning"  # beside the roles, the place of a text in a conversation
_WORD = "Zmargin"
_Turns = Sequence[dict[str, Any]]


def divided(text: str) -> tuple[str, str, str]:
    """A text as the white space before it, the text, and the white space behind it; blank ones are one or the other."""
    core = text.strip()
    start = len(text) - len(text.lstrip())
    return text[:start], core, text[start + len(core):]


def written_margins(render: Callable[[_Turns, bool], str], place: str, before: str, after: str) -> tuple[str, str]:
    """Of the white space before and behind a text, what the template writes; all of it where that cannot be told.

    Args:
        render: messages and whether to end where the assistant begins → text.
        place: a role, or ``REASONING``.
    """
    try:
        plain, padded = (render(*_talk(place, text)) for text in (_WORD, f"{before}{_WORD}{after}"))
    except FormatError:
        return before, after
    if plain.count(_WORD) != 1 or padded.count(_WORD) != 1:
        return before, after
    (head, tail), (padded_head, padded_tail) = plain.split(_WORD), padded.split(_WORD)
    if not padded_head.startswith(head) or not padded_tail.endswith(tail):
        return before, after
    return padded_head[len(head):], padded_tail[:len(padded_tail) - len(tail)]


def _talk(place: str, text: str) -> tuple[list[dict[str, Any]], bool]:
    said = {"role": place, "content": text}
    if place == "system":
        return [said, QUESTION], True
    if place == "user":
        return [said], True
    if place == "tool":
        return [QUESTION, CALL, {**RESULT, "content": text}], True
    if place == REASONING:
        return [QUESTION, {"role": "assistant", "content": "a", "reasoning_content": text}], False
    return [QUESTION, said], False
