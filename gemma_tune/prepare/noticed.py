"""What is found out about a block of rows: those that cannot be used and why, and what is said about all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.data.conversations.kept_pictures import NoticedPictures
from gemma_tune.data.conversations.problems import Problem, in_words
from gemma_tune.data.reading.sources import Row
from gemma_tune.encoding.sequences import MARK, PreparedRow
from gemma_tune.prepare.markup import NoticedMarkup
from gemma_tune.prepare.unread import UnreadCounts
from gemma_tune.run.manifest import CONVERSATIONS, JUDGED, PAIRS

TOO_LONG = "too_long"


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and every problem it has."""

    row: Row
    problems: tuple[Problem, ...]

    @property
    def code(self) -> str:
        """The first problem's code."""
        return self.problems[0].code

    @property
    def is_too_long(self) -> bool:
        """Whether nothing is wrong with the row but its length."""
        return self.code == TOO_LONG

    @property
    def place(self) -> str:
        return f"{self.row.file}:{self.row.line}"

    def __str__(self) -> str:
        return f"{self.place}: {in_words(self.problems)}"

    def record(self) -> dict[str, Any]:
        """As it is kept in rejected.jsonl: nothing of the row is lost."""
        first, *others = self.problems
        more = {"others": [vars(p) for p in others]} if others else {}
        return {"file": self.row.file, "line": self.row.line, **vars(first), **more, "row": self.row.value}


@dataclass
class Noticed:
    """What is said about rows beside what is wrong with some.

    Args:
        formats: number of rows by format.
        folded: rows whose system message had to go into the first user turn.
        reasoning: rows with reasoning in them.
        mended: rows whose turns were made to alternate, by what was done.
        unthought: rows with an answer that has none where the prompt begins some.
        tools: rows with tools, calls of them or their results, which the template has a place for.
        unanswered: rows with a call behind which the user goes on, without a result; ``first_unanswered`` is where the
            first of them is.
        rewritten: rows of several sequences, as the template writes their earlier turns in another way later.
        difference: what that way is, in the first of them.
        padded: rows with white space around a text that the template writes.
        trimmed: rows with white space around a text that the template leaves out, or a part of it.
        first_trimmed: where the first of these is.
        named: rows that have the column which ``--columns`` names for a role that a row may lack, by role.
        columns: what the first row of that format has.
        unread: columns and keys of the rows that nobody reads.
        usual: rows by the columns that are taken for question and answer by their names.
        kinds: rows by what is learned from them, see :func:`kind_of`, and where the first of each stands.
        pictures: those that rows name or hold.
        markup: what is left of web pages in texts.
    """

    formats: Counter[str] = field(default_factory=Counter)
    folded: int = 0
    reasoning: int = 0
    unthought: int = 0
    mended: Counter[str] = field(default_factory=Counter)
    tools: int = 0
    unanswered: int = 0
    first_unanswered: str = ""
    rewritten: int = 0
    difference: str = ""
    padded: int = 0
    trimmed: int = 0
    first_trimmed: str = ""
    named: Counter[str] = field(default_factory=Counter)
    columns: list[str] = field(default_factory=list)
    unread: UnreadCounts = field(default_factory=UnreadCounts)
    usual: Counter[tuple[str, ...]] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    first_of_kind: dict[str, str] = field(default_factory=dict)
    pictures: NoticedPictures = field(default_factory=NoticedPictures)
    markup: NoticedMarkup = field(default_factory=NoticedMarkup)

    def add(self, later: Noticed) -> None:
        """Put together with what was noticed about later rows."""
        self.formats.update(later.formats)
        self.folded += later.folded
        self.reasoning += later.reasoning
        self.unthought += later.unthought
        self.mended.update(later.mended)
        self.tools += later.tools
        self.unanswered += later.unanswered
        self.first_unanswered = self.first_unanswered or later.first_unanswered
        self.rewritten += later.rewritten
        self.difference = self.difference or later.difference
        self.padded += later.padded
        self.trimmed += later.trimmed
        self.first_trimmed = self.first_trimmed or later.first_trimmed
        self.named.update(later.named)
        self.columns = self.columns or later.columns
        self.unread.add(later.unread)
        self.usual.update(later.usual)
        self.kinds.update(later.kinds)
        self.first_of_kind = later.first_of_kind | self.first_of_kind
        self.pictures.add(later.pictures)
        self.markup.add(later.markup)


@dataclass
class Judged:
    """The results of one block.

    Args:
        kept: usable rows and those that are too long, as bytes of an Arrow batch (see ``spool``); None if there are
            none.
        rejected: all others, and the too long ones.
    """

    kept: bytes | None
    rejected: list[Rejected]
    noticed: Noticed = field(default_factory=Noticed)


def kind_of(example: PreparedRow) -> str:
    """What is learned from a row: an answer, which of two is better, or whether one is good."""
    return PAIRS if "rejected" in example else JUDGED if MARK in example else CONVERSATIONS
