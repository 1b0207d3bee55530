"""What the first pass of ``prepare`` found out about rows that are not used, and about all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from gemma_tune.prepare.noticed import Judged, Noticed, Rejected
from gemma_tune.run.manifest import CONVERSATIONS

_EXAMPLES = 200  # rejected rows kept in memory, to be named in messages
_LONG_EXAMPLES = 20  # the same of those that are too long


@dataclass
class Findings:
    """Counts, and the first rows of each kind.

    Args:
        rows: all of them, the rejected ones included.
        first_of: by the code of its problem, where the first rejected row stands.
        long: rejected rows that are too long. They are counted here alone, as what is said about them differs from
            what is said about faults.
        by_source: rows by the number of their file.
        kinds_of: what rows are, see :func:`gemma_tune.prepare.noticed.kind_of`, by whether they are held out.
    """

    rows: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, str] = field(default_factory=dict)
    examples: list[Rejected] = field(default_factory=list)
    long: int = 0
    long_examples: list[Rejected] = field(default_factory=list)
    by_source: Counter[int] = field(default_factory=Counter)
    noticed: Noticed = field(default_factory=Noticed)
    kinds_of: dict[bool, set[str]] = field(default_factory=lambda: {False: set(), True: set()})

    @property
    def kind(self) -> str:
        """What the rows are; there is one kind, see ``verdict.refuse``."""
        return next(iter(self.noticed.kinds), CONVERSATIONS)

    def add(self, judged: Judged, source: int, usable: int, held_out: bool) -> None:
        """Count a block of which so many rows are usable."""
        rows = usable + len(judged.rejected)
        self.rows += rows
        self.by_source[source] += rows
        self.rejected += len(judged.rejected)
        self.noticed.add(judged.noticed)
        self.kinds_of[held_out].update(judged.noticed.kinds)
        for item in judged.rejected:
            self.reasons[item.code] += 1
            self.first_of.setdefault(item.code, item.place)
        self.examples += map(_named, judged.rejected[:_EXAMPLES - len(self.examples)])
        long = [item for item in judged.rejected if item.is_too_long]
        self.long += len(long)
        self.long_examples += map(_named, long[:_LONG_EXAMPLES - len(self.long_examples)])


def _named(item: Rejected) -> Rejected:
    """Without the row itself, which can hold pictures of megabytes."""
    return Rejected(replace(item.row, value=None), item.problems)
