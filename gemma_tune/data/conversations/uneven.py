"""Conversations as logs have them, whose turns do not alternate: made so where that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemma_tune.data.conversations.pictures import OWN, Picture
from gemma_tune.data.conversations.problems import blank

Turn = dict[str, Any]
Numbered = tuple[Turn, int]  # a turn, and its number in the row
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
    pairs = list(zip(turns, numbers, strict=True))
    head = [pair for pair in pairs[:1] if pair[0]["role"] == "system"]
    kept, done = pairs[len(head):], []
    for name, step in _STEPS.items():
        changed = step(kept)
        if len(changed) < len(kept):
            kept, done = changed, [*done, name]
    kept = [*head, *kept]
    return [turn for turn, _ in kept], [number for _, number in kept], tuple(done)


def _without_opening(turns: list[Numbered]) -> list[Numbered]:
    first = next((n for n, (turn, _) in enumerate(turns) if turn["role"] == "user"), 0)
    said = all(turn["role"] == "assistant" and "tool_calls" not in turn for turn, _ in turns[:first])
    return turns[first:] if said else turns


def _without_unanswered(turns: list[Numbered]) -> list[Numbered]:
    last = max((n for n, (turn, _) in enumerate(turns) if turn["role"] != "user"), default=-1)
    answered = any(turn["role"] == "assistant" for turn, _ in turns)
    return turns[:last + 1] if answered else turns


def _joined(turns: list[Numbered]) -> list[Numbered]:
    kept: list[Numbered] = []
    for turn, number in turns:
        if kept and _belong_together(kept[-1][0], turn):
            kept[-1] = (_as_one(kept[-1][0], turn), number)
        else:
            kept.append((turn, number))
    return kept


_STEPS = {OPENING: _without_opening, UNANSWERED: _without_unanswered, JOINED: _joined}  # in this order


def _belong_together(before: Turn, turn: Turn) -> bool:
    plain = "tool_calls" not in before  # behind which its results are awaited
    return (plain and before["role"] == turn["role"] in ("user", "assistant")
            and before.get("train") == turn.get("train") and "reasoning_content" not in turn)


def _as_one(before: Turn, turn: Turn) -> Turn:
    first, second = ("" if blank(one["content"]) else one["content"] for one in (before, turn))
    between = _BETWEEN if first and second else ""
    calls = {"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {}
    pictures = _pictures(before, 0) + _pictures(turn, len(first + between))
    return before | {"content": first + between + second} | calls | ({OWN: pictures} if pictures else {})


def _pictures(turn: Turn, begin: int) -> list[Picture]:
    """The pictures of a turn whose text, if it has one, begins at that character."""
    return [{**one, "at": begin + (0 if blank(turn["content"]) else one["at"])} for one in turn.get(OWN, ())]
