"""Rows that say the opposite of each other: pairs whose answers change places, and an answer that is good and bad."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemma_tune.base.files import json_bytes
from gemma_tune.encoding.sequences import MARK, PreparedRow, first_learned
from gemma_tune.prepare.near import words

_as_text = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode
# In the second half of a hash: which of two opposites the row is.
_SIDE = np.frombuffer(b"\1" + bytes(7), np.uint64)[0]


def is_turned(row: PreparedRow) -> bool:
    """Which of two opposites a row is. Of pairs the words decide, so that nearly the same pairs are so alike, too."""
    if "rejected" not in row:
        return row.get(MARK) is False
    sides = [_said(turns) for turns in (row["messages"][first_learned(row["messages"]):], row["rejected"])]
    return sides[0] > sides[1]


def conversation_hash(row: PreparedRow, written: bytes) -> bytes:
    """16 bytes, which equal rows have; those of opposites differ in which of both they are, and in nothing else.

    Args:
        written: the row as JSON.
    """
    turned = is_turned(row)
    digest = hashlib.blake2b(json_bytes(_opposite(row)) if turned else written, digest_size=16).digest()
    found = np.frombuffer(digest, np.uint64)
    return np.array([found[0], found[1] | _SIDE if turned else found[1] & ~_SIDE]).tobytes()


def opposites(conversation: np.ndarray) -> list[np.ndarray]:
    """Groups of rows (indices, ascending) that are the same but for which of two opposites each is.

    Args:
        conversation: their hashes, uint64, shape (rows, 2).
    """
    first, second, side = conversation[:, 0], conversation[:, 1] | _SIDE, conversation[:, 1] & _SIDE != 0
    order = np.lexsort((side, second, first))
    same = (first[order][1:] == first[order][:-1]) & (second[order][1:] == second[order][:-1])
    edges = np.r_[0, np.flatnonzero(~same) + 1, len(order)]
    # Within a group those of one side come first: where both are, some row differs from the next one.
    differ = np.flatnonzero(same & (side[order][1:] != side[order][:-1]))
    found = np.unique(np.searchsorted(edges, differ, side="right"))
    return sorted((np.sort(order[edges[n - 1]:edges[n]]) for n in found.tolist()), key=lambda group: group[0])


def beside(turns: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What turns have beside their texts, as text: reasoning and calls."""
    for turn in turns:
        if "reasoning_content" in turn:
            yield turn["reasoning_content"]
        yield from (_as_text(call["function"]) for call in turn.get("tool_calls", ()))


def _said(turns: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    texts = [*(turn["content"] for turn in turns), *beside(turns)]
    return words("\n".join(texts)), texts


def _opposite(row: PreparedRow) -> PreparedRow:
    if "rejected" not in row:
        return {**row, MARK: not row[MARK]}
    begin = first_learned(row["messages"])
    return {**row, "messages": [*row["messages"][:begin], *row["rejected"]], "rejected": row["messages"][begin:]}
