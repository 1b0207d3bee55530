"""Places of pictures in texts: ``<image>``, as LLaVA, LLaMA-Factory and ms-swift have it, and parts that name no file.

They take the pictures of a column in order. Where there is no place, the pictures stand in front of the first question,
as TRL has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gemma_tune.base.words import counted
from gemma_tune.data.conversations.pictures import COLUMNS, OWN, Column, Picture, holds, is_part, is_place, pictures_in
from gemma_tune.data.conversations.problems import Problem

PLACE = "<image>"
# Lines of nothing else, with the line break that belongs to each; or a place inside a line.
_PLACES = re.compile(rf"(?P<lines>^(?:[ \t]*(?:{PLACE}[ \t]*)+(?:\r?\n|\Z))+)|{PLACE}", re.MULTILINE)

Turn = Mapping[str, Any]


def apart(text: str) -> tuple[str, list[int]]:
    """A text without the places of pictures, and the characters of what is left before which they were."""
    left, places, end = "", [], 0
    for found in _PLACES.finditer(text):
        left += text[end:found.start()]
        end = found.end()
        if found["lines"] and end == len(text) and not found[0].endswith("\n"):
            left = left.removesuffix("\n").removesuffix("\r")  # no line is left behind this one
        places += [len(left)] * found[0].count(PLACE)
    return left + text[end:], places


class Supply:
    """The pictures of a column on their way to the places in turns."""

    def __init__(self, column: Column, asked: Mapping[int, Turn], others: Mapping[int, Turn]):
        """
        Args:
            asked: the user's turns by their numbers.
            others: all other turns that are objects.
        """
        self._column, self._others = column, others
        self._own = any(map(_has_own, asked.values()))
        has_places = any(map(_has_place, asked.values()))
        self._first = None if has_places or self._own else next(iter(asked), None)
        self._places = 0
        self.is_short = False  # there was a place, and no picture for it
        self._taken: set[int] = set()

    def in_front(self, number: int) -> list[Picture]:
        """The pictures that stand before all that a turn says."""
        if number != self._first:
            return []
        self._taken = {*range(len(self._column.pictures))}
        return self._column.pictures

    def next(self, index: Any = None) -> Picture | None:
        """The picture for the next place, or the one of that number, from 0 on; None where there is none."""
        number = index if type(index) is int else self._places
        self._places += 1
        if not 0 <= number < len(self._column.pictures):
            self.is_short = True
            return None
        self._taken.add(number)
        return self._column.pictures[number]

    def unfit(self, turns: Sequence[Turn]) -> Problem | None:
        """What is wrong with the number of places.

        Args:
            turns: what became of all turns.
        """
        where, pictures = self._column
        if self._own and not self._places:  # which the column may but repeat
            same = [{key: value for key, value in picture.items() if key != "at"} for picture in pictures_in(turns)]
            return None if same == pictures else Problem(
                "picture", f"{where} has other pictures than the turns", "keep one of both")
        if len(self._taken) == len(pictures) and (self._first is not None or self._places == len(pictures)):
            return None
        there = f"{where} has {counted(len(pictures), 'picture')}, and what the user says has "
        there += f"{counted(self._places, 'place')} for one ({PLACE})"
        elsewhere = next((number for number, turn in self._others.items() if _has_place(turn)), None)
        return Problem("picture", there + (f"; turn {elsewhere} has one, and is not the user's" if elsewhere else ""),
                       "give each picture its place in a user's turn; or leave all places out, and they stand in front "
                       "of the first question")


def said_by(turn: Turn) -> Any:
    """What a turn says, under either key."""
    return turn.get("value") if turn.get("content") is None else turn["content"]


def _has_place(turn: Turn) -> bool:
    content = said_by(turn)
    parts = content if isinstance(content, list) else [{"text": content}]
    return any(is_place(part) or isinstance(part, dict) and any(
        isinstance(part.get(key), str) and PLACE in part[key] for key in ("text", "value")) for part in parts)


def _has_own(turn: Turn) -> bool:
    """Whether a turn has pictures by itself."""
    content = said_by(turn)
    return any(holds(turn.get(key)) for key in (OWN, *COLUMNS)) or isinstance(content, list) and any(
        is_part(part) and not is_place(part) for part in content)
