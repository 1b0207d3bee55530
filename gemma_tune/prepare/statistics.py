"""Figures of the data: lengths, what a limit on them cuts off, writing systems, the longest and the shortest rows.

They are collected while rows stream by. What is kept grows with the longest sequence, not with the number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gemma_tune.base.words import counted
from gemma_tune.prepare.scripts import NO_LETTERS, SCRIPTS

FURTHEST = 1 << 20  # positions that are told apart; what lies further counts as this far (32 MB of counts at most)
_FAR = 3  # times as long as every other row
EXAMPLES = 3  # longest and shortest rows that are kept
BINS = 14
KEPT = 99  # per cent of the trained tokens that a suggested limit keeps
MOST = 95  # per cent of the rows that another one keeps, where the others are far longer
STEP = 64  # suggested limits are multiples of it
PERCENTILES = (50, 90, 95, 99)
WHAT_HAPPENS = {"drop": "left out", "split": "divided", "truncate": "cut", "fail": "refused"}


@dataclass(frozen=True)
class Measured:
    """The figures of a block of rows: arrays, and no texts but their openings.

    Attributes:
        lengths, sequence_rows: int64, shape (sequences,): tokens of each sequence, and the row (from 0) it is of.
        spans, span_rows: int64, shape (spans, 2) and (spans,): learned ranges of positions, and the row they are of.
        turns, lines: int64, shape (rows,): messages of each row (a text counts as one), and where it begins.
        scripts: uint8, shape (rows,): indices of ``scripts.SCRIPTS``, see ``script_of``.
        files: name of each row's file.
        openings: see ``base.words.opening``; only those of the longest and the shortest rows are looked at.
    """

    lengths: np.ndarray
    sequence_rows: np.ndarray
    spans: np.ndarray
    span_rows: np.ndarray
    turns: np.ndarray
    lines: np.ndarray
    scripts: np.ndarray
    files: Sequence[str]
    openings: Sequence[str]


class Cut(NamedTuple):
    """What a limit of ``max_length`` tokens per sequence does to the data.

    Attributes:
        rows: rows that are longer (that have a longer sequence).
        row_tokens: trained tokens of these rows: what is lost when they are left out.
        tokens: trained tokens beyond the limit: what is lost when they are cut.
        ends: rows whose last trained token, the end of an answer, lies beyond it.
    """

    max_length: int
    rows: int
    row_tokens: int
    tokens: int
    ends: int


class _Counts:
    """Whole numbers by position, 0 to ``FURTHEST``; grows with the largest position that was seen."""

    def __init__(self) -> None:
        self.values = np.zeros(1024, dtype=np.int64)

    def add(self, positions: np.ndarray, amounts: np.ndarray | int = 1) -> None:
        if not len(positions):
            return
        positions = np.minimum(positions, FURTHEST)
        largest = int(positions.max())
        if largest >= len(self.values):
            size = min(2 * largest, FURTHEST + 1)
            self.values = np.append(self.values, np.zeros(size - len(self.values), dtype=np.int64))
        np.add.at(self.values, positions, amounts)

    def after(self, position: int) -> int:
        """Sum of what lies after ``position``."""
        return int(self.values[position + 1 :].sum())


class Statistics:
    """Accumulates the figures of usable rows. A row's length is that of its longest sequence."""

    def __init__(self) -> None:
        self.rows = self.sequences = self.turns = self.tokens = self.trained_tokens = 0
        self._total = 0  # sum of the rows' lengths
        self._lengths = _Counts()  # rows by length
        self._tokens = _Counts()  # trained tokens by the length of their row
        self._ends = _Counts()  # rows by the end of their last learned range
        self._changes = _Counts()  # by position: how many learned ranges begin there less how many end
        self._scripts = np.zeros(len(SCRIPTS), dtype=np.int64)
        self._longest: list[tuple[int, str, int, str]] = []  # length, file, line, opening
        self._shortest: list[tuple[int, str, int, str]] = []

    def add(self, block: Measured, keep: np.ndarray | None = None) -> None:
        """Count a block's rows; with ``keep`` (bool, shape (rows,)) only those where it is True."""
        keep = np.ones(len(block.turns), dtype=bool) if keep is None else np.asarray(keep, dtype=bool)
        lengths, of = _kept(block.lengths, block.sequence_rows, keep)
        spans, span_of = _kept(block.spans, block.span_rows, keep)
        longest, ends, trained = np.zeros((3, len(keep)), dtype=np.int64)
        np.maximum.at(longest, of, lengths)
        np.maximum.at(ends, span_of, spans[:, 1])
        np.add.at(trained, span_of, spans[:, 1] - spans[:, 0])
        self.rows += int(keep.sum())
        self.sequences += len(lengths)
        self.turns += int(block.turns[keep].sum())
        self.tokens += int(lengths.sum())
        self.trained_tokens += int(trained.sum())
        self._total += int(longest[keep].sum())
        self._lengths.add(longest[keep])
        self._tokens.add(longest[keep], trained[keep])
        self._ends.add(ends[keep])
        self._changes.add(spans[:, 0])
        self._changes.add(spans[:, 1], -1)
        self._scripts += np.bincount(block.scripts[keep], minlength=len(SCRIPTS))
        self._examples(block, longest, np.flatnonzero(keep))

    def _examples(self, block: Measured, lengths: np.ndarray, rows: np.ndarray) -> None:
        order = rows[np.argsort(lengths[rows], kind="stable")]
        # The longest of equal length are to be the first ones, too: take them from the order of falling length.
        falling = rows[np.argsort(-lengths[rows], kind="stable")]
        self._shortest = sorted(self._shortest + _rows(block, lengths, order), key=lambda e: e[0])[:EXAMPLES]
        self._longest = sorted(self._longest + _rows(block, lengths, falling), key=lambda e: -e[0])[:EXAMPLES]

    def cut(self, max_length: int) -> Cut:
        """What a limit does; exact for limits and sequences up to ``FURTHEST`` tokens."""
        beyond = np.cumsum(self._changes.values)[max_length:].sum()
        return Cut(max_length, self._lengths.after(max_length), self._tokens.after(max_length), int(beyond),
                   self._ends.after(max_length))

    def suggestion(self, on_long: str = "drop") -> int:
        """The smallest multiple of 64 that keeps 99 % of the trained tokens, under this policy for longer rows.

        Where they are cut, that counts what lies before the limit; else, what is in rows that are not longer.
        """
        if on_long == "truncate":  # tokens at position p are kept by a limit of p + 1
            kept = np.append(0, np.cumsum(np.cumsum(self._changes.values)))
        else:
            kept = np.cumsum(self._tokens.values)
        first = int(np.searchsorted(kept, -(-int(kept[-1]) * KEPT // 100)))
        return max(STEP, math.ceil(first / STEP) * STEP)

    @property
    def longest(self) -> int:
        """Length of the longest row; 0 without rows."""
        return self._longest[0][0] if self._longest else 0

    @property
    def shortest(self) -> int:
        """Length of the shortest row; 0 without rows."""
        return self._shortest[0][0] if self._shortest else 0

    @property
    def length(self) -> dict[str, Any]:
        """Tokens per row: ``shortest``, ``mean``, percentiles as ``p50``, and ``longest``."""
        return {"shortest": self.shortest, "mean": self._total / max(1, self.rows),
                **{f"p{p}": self.percentile(p) for p in PERCENTILES}, "longest": self.longest}

    def percentile(self, p: int) -> int:
        """The length that ``p`` % of the rows do not exceed; 0 without rows."""
        return self._length_at(min(self.rows - 1, self.rows * p // 100)) if self.rows else 0

    def _length_at(self, rank: int) -> int:
        return int(np.searchsorted(np.cumsum(self._lengths.values), rank, side="right"))

    def histogram(self) -> list[dict[str, int]]:
        """Rows by length in up to 14 even bins, the last of which takes the longest hundredth, or the longest row of
        few, if that is far away.

        Returns:
            [{"from": tokens, "to": tokens (inclusive), "rows": number}, …], contiguous, in ascending order.
        """
        if not self.rows:
            return []
        shortest, longest = self._length_at(0), self._length_at(self.rows - 1)
        reach = self.percentile(99)
        if self.rows > 2 and reach > _FAR * (others := self._length_at(self.rows - 2)):
            reach = others
        width = _round_width(reach - shortest)
        start = shortest // width * width
        edges = [start + n * width for n in range(BINS)]
        edges = [edge for edge in edges if edge <= longest]
        below = np.append(0, np.cumsum(self._lengths.values))[edges]
        counts = np.diff(np.append(below, self.rows))
        return [{"from": edge, "to": edges[n + 1] - 1 if n + 1 < len(edges) else max(longest, edge + width - 1),
                 "rows": int(counts[n])} for n, edge in enumerate(edges)]

    def scripts(self) -> dict[str, float]:
        """Share of the rows per writing system, largest first; empty where there is only one. Numbers do not count."""
        counts = self._scripts[:NO_LETTERS]
        found = sorted(np.flatnonzero(counts).tolist(), key=lambda n: -counts[n])
        return {SCRIPTS[n]: float(counts[n] / counts.sum()) for n in found} if len(found) > 1 else {}

    def long_message(self, max_length: int, on_long: str) -> str | None:
        """A sentence on the rows that are longer than ``max_length`` tokens, and on the limit that would do."""
        cut = self.cut(max_length)
        if not cut.rows:
            return None
        rows = counted(cut.rows, "row")
        better = self._better(max_length, on_long)
        if on_long == "truncate":
            what = f"{rows} {'loses' if cut.rows == 1 else 'lose'} {self._percent(cut.tokens)} of the trained tokens " \
                   f"at {max_length:,} tokens"
            if cut.ends:
                what += f", and {cut.ends:,} of them the end of the last answer"
            return f"{what}; {better}"
        return f"{rows} ({self._percent(cut.row_tokens)} of the trained tokens) " \
               f"{'is' if cut.rows == 1 else 'are'} longer than {max_length:,} tokens and " \
               f"{WHAT_HAPPENS[on_long]}; {better}"

    def _better(self, max_length: int, on_long: str) -> str:
        suggestion = self.suggestion(on_long)
        if suggestion > max_length and on_long != "fail":
            said = f"--max-length {suggestion} keeps {'all' if suggestion >= self.longest else f'{KEPT} %'}"
            most = math.ceil(self.percentile(MOST) / STEP) * STEP
            few_are_far = max_length < most < suggestion / _FAR and on_long != "truncate"
            return f"{said}, and --max-length {most} keeps {MOST} % of the rows" if few_are_far else said
        return f"the longest has {self.longest:,}"

    def _percent(self, tokens: int) -> str:
        share = 100 * tokens / max(1, self.trained_tokens)
        if share < 0.1:
            return "under 0.1 %" if tokens else "none"
        return f"{share:.0f} %" if share >= 9.95 else f"{share:.1f} %"

    def as_dict(self, max_length: int, on_long: str) -> dict[str, Any]:
        """Plain values for data/report.json.

        Returns:
            ``rows``, ``sequences``, ``turns``, ``tokens``, ``trained_tokens``: numbers, before long rows are treated.
            ``length``: tokens per row: ``shortest``, ``mean``, ``p50``, ``p90``, ``p95``, ``p99``, ``longest``.
            ``histogram``: see :meth:`histogram`.
            ``limits``: a :class:`Cut` as a dictionary for ``max_length`` and for powers of two up to the longest row.
            ``long``: the :class:`Cut` at ``max_length`` with ``on_long``, ``suggestion`` (tokens) and ``message``
            (text or None).
            ``scripts``: see :meth:`scripts`.
            ``longest_rows``, ``shortest_rows``: [{"tokens", "file", "line", "opening"}, …].
        """
        limits = {max_length, *(2**n for n in range(8, 21) if 2**n < self.longest)}
        long = {**self.cut(max_length)._asdict(), "on_long": on_long, "suggestion": self.suggestion(on_long),
                "message": self.long_message(max_length, on_long)}
        return {
            "rows": self.rows, "sequences": self.sequences, "turns": self.turns, "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "length": self.length,
            "histogram": self.histogram(), "limits": [self.cut(n)._asdict() for n in sorted(limits)], "long": long,
            "scripts": self.scripts(), "longest_rows": _examples(self._longest),
            "shortest_rows": _examples(self._shortest),
        }


def _kept(values: np.ndarray, rows: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = keep[rows]
    return values[chosen], rows[chosen]


def _rows(block: Measured, lengths: np.ndarray, order: np.ndarray) -> list[tuple[int, str, int, str]]:
    return [(int(lengths[n]), block.files[n], int(block.lines[n]), block.openings[n]) for n in order[:EXAMPLES]]


def _examples(rows: Sequence[tuple[int, str, int, str]]) -> list[dict[str, Any]]:
    return [{"tokens": tokens, "file": file, "line": line, "opening": opening} for tokens, file, line, opening in rows]


def _round_width(extent: int) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … that covers ``extent`` with one bin to spare at either end."""
    wanted = max(1, math.ceil((extent + 1) / (BINS - 2)))
    power = 1 << (wanted - 1).bit_length()
    return power // 4 * 3 if power >= 4 and power // 4 * 3 >= wanted else power
