"""What can be wrong with a row, in a form for programs (code) and for people (reason and fix)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.base.words import counted, shortened

MOST_PROBLEMS = 20  # of one row; a conversation of a thousand broken turns needs no thousand sentences
_LONGEST = 300  # characters of a reason: a name in a row can be as long as the row
_SAID = 5  # reasons of one row that a message has


@dataclass(frozen=True)
class Problem:
    """One reason why a row cannot be used: ``code`` for programs, ``reason`` for people, ``fix`` a suggestion.

    A reason that quotes too much of the row is shortened in the middle.
    """

    code: str
    reason: str
    fix: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", shortened(self.reason, _LONGEST))


class RowError(Exception):
    """A row that cannot be used: at least one problem, in the order of the row. It survives pickling."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = tuple(problems)[:MOST_PROBLEMS]
        super().__init__(self.problems)

    @property
    def code(self) -> str:
        """Code of the first problem."""
        return self.problems[0].code

    @property
    def fix(self) -> str:
        """Suggestion for the first problem."""
        return self.problems[0].fix

    def __str__(self) -> str:
        return self.problems[0].reason


def in_words(problems: Sequence[Problem], with_fixes: bool = False) -> str:
    """What is wrong with a row, as the end of a message: the first problems, and how many more there are."""
    said = [f"{p.reason} ({p.fix})" if with_fixes else p.reason for p in problems[:_SAID]]
    more = len(problems) - _SAID
    return "; ".join([*said, f"and {counted(more, 'more problem')}"] if more > 0 else said)


# White space, and characters that take no place on a screen: such a text says nothing.
_INVISIBLE = re.compile("[\\s\u00ad\u034f\u061c\u115f\u1160\u180e\u200b-\u200f\u2060-\u2064\u2800\u3164\ufeff\uffa0]*")


def blank(text: str) -> bool:
    """Whether there is nothing to see in a text."""
    return not text.strip() or _INVISIBLE.fullmatch(text) is not None


def quoted(value: Any, limit: int = 40) -> str:
    """Something from a row that fits into a message, on one line."""
    # The repr of a huge text is huge: cut before as well as after.
    text = repr(value[:limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def kind(value: Any) -> str:
    """What a JSON value is, in a word."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
             type(None): "missing"}
    return names.get(type(value), type(value).__name__)


def several(where: str, value: Any) -> Problem | None:
    """The problem of a list of plain texts where one text is expected: which of them is meant, nobody can tell."""
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(text, str) for text in value):
        return None
    return Problem("not_text", f"{where} is a list of {len(value)} texts, and only one can be meant",
                   "keep one of them; make a better and a worse answer the columns `chosen` and `rejected`")


_PYTHON = re.compile(r"\s*(?:array\(\s*)?(?:\[\s*)?[\[{]\s*'")
_TURNS_OF_PYTHON = re.compile(r"\s*(?:array\(\s*)?\[\s*\{\s*'(?:role|from|content|value)'\s*:")


def python_list(where: str, text: Any, *, turns: bool = False) -> Problem | None:
    """The problem of a text that is a list or an object as Python shows it, which data frames write into a CSV file.

    Args:
        turns: only a list of turns is meant; other texts may well begin so.
    """
    if not isinstance(text, str) or not (_TURNS_OF_PYTHON if turns else _PYTHON).match(text):
        return None
    return Problem("not_json", f"{where} is text as Python shows a list, in single quotes, which is not JSON",
                   "write the column with json.dumps before the table is saved, or save it as Parquet or JSON Lines")


def damaged(text: str) -> bool:
    """Whether a text holds a replacement character or half a surrogate pair."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return "\ufffd" in text
