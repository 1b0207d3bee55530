"""Counts of the columns and keys that nobody reads: how many rows have each, and whether it always says the same.

The counts of a block cross process borders and are put together, so they are small whatever the rows hold: a bounded
number of names, and of each a number and the hash of its first value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.data.conversations.unread import Unread

MOST_NAMES = 50  # that are told apart; rows of a map keyed by numbers or dates have as many names as they like
_LONGEST = 60  # characters of a name
Place = tuple[str, str]  # "column" or "key", and its name


@dataclass
class _Count:
    rows: int
    value: bytes
    several: bool = False


@dataclass
class UnreadCounts:
    """Args:
        found: by place; those that were met first.
        others: rows with names beyond that, summed over the names, by "column" or "key".
    """

    found: dict[Place, _Count] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def count(self, row: Iterable[Unread]) -> None:
        """Count what one row has."""
        seen: set[Place] = set()  # a key that several turns have is one row's
        for where, name, value in row:
            place = (where, name)
            count = self.found.get(place)
            if count is None:
                if len(self.found) >= MOST_NAMES:
                    if place not in seen:
                        self.others[where] = self.others.get(where, 0) + 1
                    seen.add(place)
                    continue
                count = self.found[place] = _Count(0, _digest(value))
            elif not count.several:
                count.several = _digest(value) != count.value
            count.rows += place not in seen
            seen.add(place)

    def add(self, later: UnreadCounts) -> None:
        """Put together with the counts of later rows."""
        for place, count in later.found.items():
            if place in self.found:
                mine = self.found[place]
                mine.rows += count.rows
                mine.several |= count.several or count.value != mine.value
            elif len(self.found) < MOST_NAMES:
                self.found[place] = _Count(count.rows, count.value, count.several)
            else:
                self.others[place[0]] = self.others.get(place[0], 0) + count.rows
        for where, rows in later.others.items():
            self.others[where] = self.others.get(where, 0) + rows

    def as_list(self) -> list[dict[str, Any]]:
        """For data/report.json: the most frequent first; a name of None stands for all further ones."""
        listed = sorted(self.found.items(), key=lambda item: -item[1].rows)
        return [{"where": where, "name": _shown(name), "rows": count.rows,
                 "values": "several" if count.several else "one"} for (where, name), count in listed] + [
            {"where": where, "name": None, "rows": rows, "values": "several"} for where, rows in self.others.items()]


def _digest(value: Any) -> bytes:
    """A hash that is the same in every process."""
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _shown(name: Any) -> str:
    text = str(name).encode("utf-8", "replace").decode()
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
