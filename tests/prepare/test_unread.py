"""Counts of what is not read, put together from blocks."""

from __future__ import annotations

import pickle

from gemma_tune.data.conversations.unread import Unread
from gemma_tune.prepare.unread import MOST_NAMES, UnreadCounts


def counted(*rows):
    counts = UnreadCounts()
    for row in rows:
        counts.count([Unread(*item) for item in row])
    return pickle.loads(pickle.dumps(counts))


def test_blocks_together_count_what_one_count_does():
    rows = [[("column", "label", n % 2), ("column", "lang", "en"), ("key", "name", "x")] for n in range(10)]
    rows[3].append(("key", "name", "y"))  # a second turn of the same row
    whole, parts = counted(*rows), UnreadCounts()
    for row in rows:
        parts.add(counted(row))
    assert whole.as_list() == parts.as_list() == [
        {"where": "column", "name": "label", "rows": 10, "values": "several"},
        {"where": "column", "name": "lang", "rows": 10, "values": "one"},
        {"where": "key", "name": "name", "rows": 10, "values": "several"}]


def test_names_are_bounded_and_can_be_written():
    counts = counted(*[[("column", f"{n}", n)] for n in range(500)])
    counts.add(counted(*[[("column", f"later {n}", n)] for n in range(100)]))
    assert len(counts.found) == MOST_NAMES and counts.others == {"column": 550}
    assert counts.as_list()[-1] == {"where": "column", "name": None, "rows": 550, "values": "several"}
    [odd] = counted([("column", "\ud800" + "x" * 500, ["\ud800"])]).as_list()
    assert odd["name"].startswith("?x") and len(odd["name"]) < 70
