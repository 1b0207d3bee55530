"""``--max-samples``: which rows of each DATA argument are taken, where it has more than that.

They are drawn before anything is checked, so that trying a recipe on a part of a large data set costs what the part
costs: the other rows are counted, and neither checked nor tokenised. Counting reads each file once more, which keeps
the memory small however many are drawn, and their number exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.data.reading.rows import PIPED, Block, PickedBlock
from gemma_tune.data.reading.sources import STDIN, Source, as_typed, read_blocks


@dataclass(frozen=True)
class Drawn:
    """What became of one DATA argument.

    Args:
        data: its name, as people gave it.
        rows: how many of its rows are taken.
        of: how many it has.
    """

    data: str
    rows: int
    of: int

    def __str__(self) -> str:
        return f"{self.data}: {self.rows:,} of {counted(self.of, 'row')} drawn"


@dataclass(frozen=True)
class Drawing:
    """Which rows are taken.

    Args:
        positions: by the path of a source, the positions of its rows, from 0 on and in rising order; a source that is
            not among them is taken whole.
        arguments: what was drawn of each DATA argument; empty where nobody asked for it.
    """

    positions: dict[Path, np.ndarray] = field(default_factory=dict)
    arguments: tuple[Drawn, ...] = ()

    def of(self, source: Source, blocks: Iterable[Block]) -> Iterator[Block]:
        """The blocks of a source, with those of their rows that are taken; those without any are left out."""
        positions, first = self.positions.get(source.path), 0
        for block in blocks:
            if positions is None:
                yield block
                continue
            after = first + block.count()
            at = positions[slice(*np.searchsorted(positions, (first, after)))] - first
            if len(at):
                yield PickedBlock(block.file, block.done, block, tuple(at.tolist()))
            first = after

    def as_list(self) -> list[dict[str, Any]]:
        """For data/report.json and the manifest."""
        return [asdict(drawn) for drawn in self.arguments]


def draw(sources: Sequence[Source], most: int | None, seed: int, size: int, listener: Listener) -> Drawing:
    """Draw at most so many rows of each DATA argument, each with the same chance.

    What is drawn of an argument depends on the seed and on its own rows alone, whatever is named beside it; a larger
    number takes all rows that a smaller one takes, and rows that are added behind the others move few of them.

    Args:
        sources: those of an argument stand together.
        most: None draws nothing.
        size: see :func:`read_blocks`.

    Raises:
        UserError: a source cannot be read.
    """
    if most is None:
        return Drawing()
    counts = list(_counted(sources, size, listener))
    positions, arguments = {}, []
    for argument, group in groupby(range(len(sources)), lambda n: sources[n].argument):
        numbers = list(group)
        rows = sum(counts[n] for n in numbers)
        arguments.append(Drawn(_called(argument), min(rows, most), rows))
        if rows <= most:
            continue
        listener.note(f"{arguments[-1]} (--max-samples {most})")
        taken, first = _smallest(np.random.default_rng(seed).random(rows), most), 0
        for n in numbers:
            here = slice(*np.searchsorted(taken, (first, first + counts[n])))
            positions[sources[n].path] = taken[here] - first
            first += counts[n]
    return Drawing(positions, tuple(arguments))


def _called(argument: str) -> str:
    return PIPED if argument == STDIN else as_typed(argument)


def _counted(sources: Sequence[Source], size: int, listener: Listener) -> Iterator[int]:
    """The number of each source's rows."""
    total, before = sum(source.size or 0 for source in sources), 0
    for source in sources:
        rows = 0
        for block in read_blocks(source, size):  # how it is read, its rows are told with
            rows += block.count()
            listener.progress("counting rows", round(before + block.done * (source.size or 0)), total)
        before += source.size or 0
        yield rows


def _smallest(keys: np.ndarray, number: int) -> np.ndarray:
    """Positions of so many smallest keys, in rising order."""
    return np.sort(np.argpartition(keys, number)[:number])
