"""Conversations as logs have them, whose turns do not alternate: made so where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.data.conversations.problems import blank

Turn = dict[str, Any]
JOINED, OPENING, UNANSWERED = "joined", "opening", "unanswered"
# What was done, as a report counts it in rows.
IN_WORDS = {
    JOINED: "neighbouring turns of one role became one, with a blank line between them",
    OPENING: "what the assistant said before the first question was left out",
    UNANSWERED: "what the user said after the last answer was left out",
}
_BETWEEN = "\n\n"


def evened(turns: Sequence[Turn], numbers: Sequence[int]) -> tuple[list[Turn], list[int], tuple[str, ...]]:
    """The turns alternating as far as that can be had without making anything up.

    Neighbours of which one is learned and the other is not stay as they are, and so does one with a thought of its own.

    Args:
        numbers: of the turns in their row.

    Returns:
        turns, their numbers, and what was done, of the keys of ``IN_WORDS``.
    """
    left = list(zip(turns, numbers, strict=True))
    done = []
    head = [pair for pair in left[:1] if pair[0]["role"] == "system"]
    rest = left[len(head):]
    if rest and any(turn["role"] == "user" for turn, _ in rest):
        first = next(n for n, (turn, _) in enumerate(rest) if turn["role"] == "user")
        if first and all(turn["role"] == "assistant" and "tool_calls" not in turn for turn, _ in rest[:first]):
            rest, done = rest[first:], [OPENING]
    if any(turn["role"] == "assistant" for turn, _ in rest):
        while rest[-1][0]["role"] == "user":
            rest.pop()
            done.append(UNANSWERED)
    joined: list[tuple[Turn, int]] = []
    for turn, number in rest:
        if joined and _belong_together(joined[-1][0], turn):
            joined[-1] = (_as_one(joined[-1][0], turn), number)
            done.append(JOINED)
        else:
            joined.append((turn, number))
    kept = [*head, *joined]
    return [turn for turn, _ in kept], [number for _, number in kept], tuple(dict.fromkeys(done))


def _belong_together(before: Turn, turn: Turn) -> bool:
    plain = "tool_calls" not in before  # behind which its results are awaited
    return (plain and before["role"] == turn["role"] in ("user", "assistant")
            and before.get("train") == turn.get("train") and "reasoning_content" not in turn)


def _as_one(before: Turn, turn: Turn) -> Turn:
    texts = [text for text in (before["content"], turn["content"]) if not blank(text)]
    calls = {"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {}
    return before | {"content": _BETWEEN.join(texts)} | calls
