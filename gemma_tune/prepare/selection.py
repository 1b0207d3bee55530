"""Which rows are kept, and on which side: decided from a few numbers of every row, when all of them are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np

from gemma_tune.prepare.ends import are_few, have_an_end
from gemma_tune.prepare.opposites import opposites
from gemma_tune.prepare.split import choose_valid, fewest_valid, most_valid


@dataclass
class Columns:
    """What is kept in memory of each usable or too long row, in the order of the input.

    Args:
        conversation: 128-bit hashes, shape (rows, 2), uint64.
        prompt: 64-bit hashes of the seed and everything but the answers, uint64.
        source: index of the file, int32.
        line: int64.
        usable: False for a row that is too long.
        held_out: True for rows of files that were named for validation.
        text: tokens of a plain text, int32; 0 for a conversation.
    """

    conversation: np.ndarray
    prompt: np.ndarray
    source: np.ndarray
    line: np.ndarray
    usable: np.ndarray
    held_out: np.ndarray
    text: np.ndarray

    def and_more(self, later: Columns) -> Columns:
        """These rows and those behind them."""
        return Columns(*(np.concatenate([getattr(self, f.name), getattr(later, f.name)]) for f in fields(self)))


class Gathered:
    """Collects :class:`Columns` block by block."""

    def __init__(self) -> None:
        self._parts: list[tuple[np.ndarray, ...]] = []

    def add(self, conversation: np.ndarray, prompt: np.ndarray, source: int, line: np.ndarray, usable: np.ndarray,
            held_out: bool, text: np.ndarray) -> None:
        """The rows of one block."""
        rows = len(line)
        # Copies: the arrays of a block are views of its whole memory.
        self._parts.append((conversation.copy(), prompt.copy(), np.full(rows, source, np.int32), line.copy(),
                            usable.copy(), np.full(rows, held_out), text.copy()))

    def columns(self) -> Columns:
        """All rows."""
        if not self._parts:
            empty = np.zeros(0, np.int64)
            return Columns(np.zeros((0, 2), np.uint64), empty.astype(np.uint64), empty, empty, empty.astype(bool),
                           empty.astype(bool), empty.astype(np.int32))
        columns = Columns(*(np.concatenate(part) for part in zip(*self._parts)))
        self._parts = []
        return columns


@dataclass
class Selection:
    """The decision about every row of :class:`Columns`.

    Args:
        same_as: index of the earlier row that a dropped one repeats, -1 for the others (int64).
        near: True where it is only nearly the same.
        valid: True for validation; only meaningful where :attr:`kept`.
        kept: True for rows in train.jsonl or valid.jsonl.
        ends: True for kept texts that are to be divided: the beginning is learned, and the end for validation.
        conflicts: groups of kept rows (indices) with the same prompt and different answers.
        asked_on_both_sides: kept training rows whose prompt is also one of validation.
        opposites: groups of kept rows (indices) that contradict each other.
    """

    same_as: np.ndarray
    near: np.ndarray
    valid: np.ndarray
    kept: np.ndarray
    ends: np.ndarray
    conflicts: list[np.ndarray] = field(default_factory=list)
    asked_on_both_sides: int = 0
    opposites: list[np.ndarray] = field(default_factory=list)

    def with_ends(self) -> Selection:
        """Where the beginning and the end of each text of :attr:`ends` stand, in turn, behind all other rows: these are
        used in its place."""
        parts = 2 * int(self.ends.sum())
        new = np.ones(parts, bool)
        return replace(self, same_as=np.append(self.same_as, np.full(parts, -1, np.int64)),
                       near=np.append(self.near, ~new), kept=np.append(self.kept & ~self.ends, new),
                       valid=np.append(self.valid, np.arange(parts) % 2 == 1), ends=np.append(self.ends, ~new))


def select(columns: Columns, valid: float, keep_duplicates: bool,
           nearly: Callable[[np.ndarray], np.ndarray] | None = None, by_default: bool = False) -> Selection:
    """Duplicates, the split and prompts that repeat.

    Args:
        valid: share or number of validation rows; without effect if some rows are held out by file. Of plain texts and
            of conversations the share is taken of each, so that neither is left out of either side by chance; of a few
            texts it is taken of their ends.
        keep_duplicates: keep exact repetitions.
        nearly: from a mask of rows to the index of the earlier row that each nearly repeats, -1 for none.
        by_default: nobody chose the share, so that it gives more than it says of a few rows.
    """
    rows = len(columns.line)
    same_as = np.full(rows, -1, np.int64)
    if not keep_duplicates:
        same_as[columns.usable] = _first_of_same(columns.conversation, columns.usable)
    near = np.zeros(rows, bool)
    if nearly is not None:
        found = nearly(columns.usable & (same_as < 0))
        near = found >= 0
        # Exact repetitions of a row that is left out for its own likeness repeat the same earlier row as it does.
        repeats = np.flatnonzero(same_as >= 0)
        repeats = repeats[near[same_as[repeats]]]
        same_as[repeats] = found[same_as[repeats]]
        same_as[near] = found[near]
    kept = columns.usable & (same_as < 0)
    side, ends = columns.held_out.copy(), np.zeros(rows, bool)
    if not side.any():
        texts = kept & (columns.text > 0)
        if valid < 1 and are_few(len(np.unique(columns.prompt[texts])), valid):
            ends = texts & have_an_end(columns.text, valid)
        whole = (kept & ~texts, texts & ~ends.any()) if valid < 1 else (kept,)
        for some in whole if valid else ():
            side[some] = _chosen(columns.prompt[some], valid, by_default)
    both = np.isin(columns.prompt[kept & ~side], columns.prompt[kept & side])
    return Selection(same_as, near, side, kept, ends, _conflicts(columns, kept), int(both.sum()),
                     [np.flatnonzero(kept)[group] for group in opposites(columns.conversation[kept])])


def _chosen(prompt: np.ndarray, valid: float, by_default: bool) -> np.ndarray:
    rows = len(prompt)
    return choose_valid(prompt, valid, *((fewest_valid(rows), most_valid(rows)) if by_default else (0, None)))


def _first_of_same(conversation: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Of each usable row the index of the first usable row with the same hash, -1 for the first itself."""
    at = np.flatnonzero(usable)
    chosen = conversation[at]
    order = np.lexsort((at, chosen[:, 1], chosen[:, 0]))
    ordered = chosen[order]
    begins = np.ones(len(at), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = at[order][begins][np.cumsum(begins) - 1] if len(at) else at
    result = np.empty(len(at), np.int64)
    result[order] = np.where(begins, -1, firsts)
    return result


def _conflicts(columns: Columns, kept: np.ndarray) -> list[np.ndarray]:
    at = np.flatnonzero(kept)
    order = at[np.lexsort((at, columns.prompt[at]))]
    prompts, said = columns.prompt[order], columns.conversation[order]
    edges = np.r_[0, np.flatnonzero(prompts[1:] != prompts[:-1]) + 1, len(at)]
    # Within a prompt's rows, some answer differs from the next one unless all are the same.
    differs = np.flatnonzero((prompts[1:] == prompts[:-1]) & (said[1:] != said[:-1]).any(axis=1))
    found = np.unique(np.searchsorted(edges, differs, side="right")).tolist()
    groups = [order[edges[n - 1]:edges[n]] for n in found]
    return sorted(groups, key=lambda g: g[0])  # those that come first are named as examples
