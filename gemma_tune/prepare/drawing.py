"""``--max-samples``: which rows of each DATA argument are taken, where it has more than that.

They are drawn before anything is checked, so that trying a recipe on a part of a large data set costs what the part
costs: the other rows are counted, and neither checked nor tokenised. Counting reads each file once more, which keeps
the memory small however many are drawn, and their number exact.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, last_name, near
from gemma_tune.config.most_rows import Most, as_text
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


def draw(sources: Sequence[Source], most: Mapping[str | None, Most], seed: int, size: int,
         listener: Listener) -> Drawing:
    """Draw at most so many rows of each DATA argument, each with the same chance.

    Which rows an argument's are depends on the seed and on its own rows alone, whatever is named beside it; a larger
    number takes all rows that a smaller one takes, and rows that are added behind the others move few of them.

    Args:
        sources: those of an argument stand together.
        most: see ``config.most_rows``; where it is empty, nothing is drawn.
        size: see :func:`read_blocks`.

    Raises:
        UserError: a source cannot be read, what is named in ``most`` is none of the arguments, or a description asks
            for more rows than there are.
    """
    limits = limits_of(sources, most)
    if not any(limits.values()):
        return Drawing()
    counts = list(_counted(sources, size, listener))
    groups = [list(group) for _, group in groupby(range(len(sources)), lambda n: sources[n].argument)]
    asked = [limits[sources[numbers[0]].argument] for numbers in groups]
    has = [sum(counts[n] for n in numbers) for numbers in groups]
    _refuse_repeats([sources[numbers[0]] for numbers in groups], has, asked,
                    {meant(name, sources) for name in most if name is not None})
    takes = numbers_of(asked, has)
    positions, arguments = {}, []
    for numbers, limit, rows, take in zip(groups, asked, has, takes, strict=True):
        arguments.append(Drawn(_called(sources[numbers[0]].argument), take, rows))
        described = sources[numbers[0]].described
        _tell(arguments[-1], limit, sum(takes), most, described.samples if described else None, listener)
        if take == rows:
            continue
        taken, first = _smallest(np.random.default_rng(seed).random(rows), take), 0
        for n in numbers:
            here = slice(*np.searchsorted(taken, (first, first + counts[n])))
            positions[sources[n].path] = taken[here] - first
            first += counts[n]
    return Drawing(positions, tuple(arguments))


def limits_of(sources: Sequence[Source], most: Mapping[str | None, Most]) -> dict[str, Most | None]:
    """What is asked for of each DATA argument, by its name; None where all of it is taken.

    Raises:
        UserError: a name is that of none of them, or of several; or shares leave no room for the others.
    """
    limits: dict[str, Most | None] = {}
    for source in sources:
        each = [rows for rows in (most.get(None), source.described and source.described.samples) if rows]
        limits[source.argument] = min(each, default=None)
    for name, limit in most.items():
        if name is not None:
            limits[meant(name, sources)] = limit
    shares = [limit for limit in limits.values() if isinstance(limit, Fraction)]
    if shares and (sum(shares) == 1) != (len(shares) == len(limits)):
        raise UserError("--max-samples: the shares of all DATA are 100% together, and those of some are less",
                        "write a share of one of two, such as general.jsonl=20%: the other makes the rest")
    return limits


def meant(name: str, sources: Sequence[Source]) -> str:
    """The DATA argument that has a name, or whose path ends with it, or whose entry in a description is called so.

    Raises:
        UserError: there is none, or there are several.
    """
    paths: dict[str, list[Path]] = {}
    for source in sources:
        paths.setdefault(source.argument, []).append(source.path)
    if name in paths:
        return name
    end = _parts(name)
    ends = {argument for argument, files in paths.items()
            if any(parts[-len(end):] == end for parts in _called_as(argument, files))}
    entries = [(source.described.name, source.argument) for source in sources if source.described]
    ends |= {argument for entry, argument in entries if entry == name}
    if len(ends) == 1:
        return ends.pop()
    there = ", ".join(map(_called, paths))
    if ends:
        raise UserError(f"--max-samples: {name} may be {' or '.join(sorted(ends))}", "write more of its path")
    meant_by = near(name, [*map(last_name, paths), *(entry for entry, _ in entries)])
    raise UserError(f"--max-samples: {name} is not among the DATA{meant_by}", f"name one of {there}, or its last part")


def _called_as(argument: str, files: Sequence[Path]) -> list[tuple[str, ...]]:
    """The parts of an argument's path; and those of its file, where it is one: standard input and a built-in example
    are called otherwise, and recorded as that."""
    return [_parts(argument), *(path.parts for path in files if len(files) == 1)]


def _parts(name: str) -> tuple[str, ...]:
    return Path(os.path.expanduser(name)).parts


def numbers_of(limits: Sequence[Most | None], rows: Sequence[int]) -> list[int]:
    """How many rows are taken of each, where shares are of all that are taken together.

    >>> numbers_of([None, Fraction(1, 5)], [800, 10_000]), numbers_of([Fraction(4, 5), Fraction(1, 5)], [1000, 100])
    ([800, 200], [400, 100])
    """
    others = sum(has if limit is None else min(has, limit) for limit, has in zip(limits, rows, strict=True)
                 if not isinstance(limit, Fraction))
    left = 1 - sum(limit for limit in limits if isinstance(limit, Fraction))
    whole = Fraction(others) / left if left else min(has / limit for limit, has in zip(limits, rows, strict=True))
    return [has if limit is None else min(has, max(1, round(limit * whole)) if isinstance(limit, Fraction) else limit)
            for limit, has in zip(limits, rows, strict=True)]


def _tell(drawn: Drawn, limit: Most | None, whole: int, most: Mapping[str | None, Most], samples: int | None,
          listener: Listener) -> None:
    """What is drawn, and why it is that.

    Args:
        samples: number that a description of the data asks for.
    """
    if samples and samples == limit:
        if drawn.rows < drawn.of:
            listener.note(f"{drawn} (`num_samples` of its description)")
        return
    if isinstance(limit, Fraction) and drawn.rows == drawn.of and drawn.rows + 1 < limit * whole:
        listener.warn(f"{drawn.data}: all of its {counted(drawn.of, 'row')} make {drawn.rows / whole:.1%} of what is "
                      f"taken, less than the share of {float(limit):.0%}")
    elif drawn.rows < drawn.of:
        listener.note(f"{drawn} (--max-samples {as_text(most.items())})")


def _refuse_repeats(firsts: Sequence[Source], has: Sequence[int], asked: Sequence[Most | None],
                    named: Collection[str]) -> None:
    """Refuse descriptions that ask for more rows than there are: LLaMA-Factory takes some of these several times.

    Args:
        firsts: the first source of each DATA argument.
        named: the arguments that --max-samples names.
    """
    problems, instead = [], []
    for source, rows, limit in zip(firsts, has, asked, strict=True):
        entry, name = source.described, _called(source.argument)
        if entry and source.argument not in named and limit == entry.samples is not None and limit > rows:
            problems.append(f"{name}: the entry `{entry.name}` of {entry.file} asks for {limit:,} samples of its "
                            f"{counted(rows, 'row')} (`num_samples`), and no row is taken twice")
            instead.append(f"{name}={rows}")
    if problems:
        once = shell.quote(",".join(instead))
        raise UserError("; ".join(problems), f"lower that number, or take each row once: --max-samples {once}; for "
                        "these to weigh more, take less of others: --max-samples OTHER=20%")


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
