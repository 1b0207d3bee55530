"""The two passes of ``prepare`` over the rows, and what they share.

The first checks and encodes every row, in several processes where there is much to do; the second, which knows all
rows, writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.machine import cores
from gemma_tune.data.reading.rows import TEXT
from gemma_tune.data.reading.sources import Row, Source, read_blocks
from gemma_tune.prepare.drawing import Drawing, draw
from gemma_tune.prepare.ends import divided
from gemma_tune.prepare.files import DataFiles, Decided
from gemma_tune.prepare.findings import Findings
from gemma_tune.prepare.judge import Judge
from gemma_tune.prepare.near import NearIndex
from gemma_tune.prepare.noticed import Judged
from gemma_tune.prepare.processes import judged_blocks, may_fork
from gemma_tune.prepare.selection import Columns, Gathered, select
from gemma_tune.prepare.spool import Batch, Spool
from gemma_tune.run.session import Session

_SEVERAL_PROCESSES = 4_000_000  # bytes of input from which starting processes pays
_MOST_PROCESSES = 8  # one process reads and writes for all of them, and each takes memory
_PICTURED = 16  # times the work that a small file's bytes tell, where its rows may name pictures: each is decoded
_BLOCK = 1 << 18  # bytes of input that are worked on together; several processes hold a few dozen times that


@dataclass(frozen=True)
class Passes:
    """One preparation at work: where rows come from, where they go, and what is known about them.

    Args:
        sources: the files of the rows; those that are held out for validation come first, so that a training row that
            repeats one of theirs is the duplicate.
        held_out: number of the files that are held out.
        spool: the rows between the passes.
        drawing: which rows are taken at all.
        gathered: a few numbers of each row of the spool.
        findings: about all rows.
    """

    session: Session
    sources: Sequence[Source]
    held_out: int
    judge: Judge
    files: DataFiles
    spool: Spool
    drawing: Drawing
    gathered: Gathered = field(default_factory=Gathered)
    findings: Findings = field(default_factory=Findings)

    def check(self) -> None:
        """The first pass: every row that is taken is checked, encoded and counted."""
        before = np.cumsum([0, *(source.size or 0 for source in self.sources)])
        total = int(before[-1])
        weight = _PICTURED if self.judge.pictures is not None and total < _SEVERAL_PROCESSES else 1
        blocks = ((number, block) for number, source in enumerate(self.sources)
                  for block in self.drawing.of(source, read_blocks(source, _BLOCK // weight, self.session.listener)))
        processes = _processes(self.sources, total * (weight if may_fork() else 1))
        for number, block, judged in judged_blocks(blocks, self.judge, processes):
            done = before[number] + block.done * (before[number + 1] - before[number])
            self.session.listener.progress("checking rows", round(done), total)
            self._take(judged, number)

    def _take(self, judged: Judged, source: int) -> None:
        self.files.reject(judged.rejected)
        usable = 0 if judged.kept is None else self._gather(self.spool.add(judged.kept, source), source)
        self.findings.add(judged, source, usable, source < self.held_out)

    def _gather(self, batch: Batch, source: int) -> int:
        """Keep the numbers of a batch's rows. Returns how many of them are usable."""
        usable = np.diff(batch.lists("lengths")[1]) > 0
        self.gathered.add(batch.hashes(), batch.numbers("prompt"), source, batch.numbers("line"), usable,
                          source < self.held_out, _text_tokens(batch))
        return int(usable.sum())

    def long_rows(self) -> str | None:
        """What the limit of the length costs, before anything else is decided about the rows."""
        return self.files.long_rows(self.spool, self.session.config)

    def decide(self) -> Decided:
        """Which rows are kept, and on which side. Of texts whose end is kept aside, both parts become rows."""
        config, columns = self.session.config, self.gathered.columns()
        selection = select(columns, 0.0 if self.held_out else config.valid, config.duplicates == "keep",
                           self._nearly if config.near_duplicates else None,
                           self.session.resolved.origins["valid"] == "default")
        if not selection.ends.any():
            return Decided(self.spool, self.drawing, self.findings, columns, selection)
        ends = self._divide(columns, np.flatnonzero(selection.ends))
        columns, selection = columns.and_more(self.gathered.columns()), selection.with_ends()
        return Decided(self.spool, self.drawing, self.findings, columns, selection, ends)

    def _divide(self, columns: Columns, whole: np.ndarray) -> list[tuple[int, int]]:
        """Add the beginning and the end of each of these rows, which are texts, as rows behind all others.

        Returns:
            Of each the number of its own row and of its end's.
        """
        ends = []
        for own, text in zip(whole.tolist(), [*self._texts(whole)], strict=True):
            number, line = int(columns.source[own]), int(columns.line[own])
            source, parts = self.sources[number], divided(text, self.session.config.valid)
            below = line + parts[0].count("\n") if source.kind == TEXT else line
            rows = [Row(source.name, at, {"text": part}) for at, part in zip((line, below), parts, strict=True)]
            self._gather(self.spool.add(self.judge.texts(rows), number), number)
            ends.append((own, self.spool.size - 1))
        return ends

    def _texts(self, rows: np.ndarray) -> Iterator[str]:
        """The texts of these rows, in their order."""
        for batch in self.spool.read():
            if len(at := rows[(rows >= batch.first) & (rows < batch.first + batch.size)] - batch.first):
                lines = batch.bytes_of("text")
                yield from (json.loads(lines[n])["text"] for n in at)

    def _nearly(self, candidates: np.ndarray) -> np.ndarray:
        """Looks for near-duplicates with the signatures in the spool, see :func:`selection.select`."""
        found = np.full(len(candidates), -1, np.int64)
        index = NearIndex(self.session.config.near_threshold)
        for batch in self.spool.read():
            at = np.flatnonzero(candidates[batch.first:batch.first + batch.size])
            signatures = batch.bytes_of("signature")
            if len(at):
                rows = np.stack([np.frombuffer(signatures[n], np.uint8) for n in at])
                found[batch.first + at] = index.earlier(batch.first + at, rows)
        return found

    def write(self, decided: Decided) -> dict[str, Any]:
        """The second pass: every row goes into its file. Returns the content of data/report.json."""
        return self.files.write(decided, self.session.config, lambda rows: self.session.listener.progress(
            "writing rows", rows, self.spool.size))


def _text_tokens(batch: Batch) -> np.ndarray:
    """Of each row the tokens of a plain text (int32), which is one sequence; 0 of a conversation."""
    lengths, at = batch.lists("full_lengths")
    return np.where(batch.numbers("turns") == 0, lengths[at[:-1]], 0)


def _processes(sources: Sequence[Source], total: int) -> int:
    """How many processes check rows: one where there is little to do."""
    if total < _SEVERAL_PROCESSES and all(source.size is not None for source in sources):
        return 1
    return min(cores(), _MOST_PROCESSES)


@contextmanager
def passes(session: Session, sources: Sequence[Source], held_out: Sequence[Source], judge: Judge,
           folder: Path) -> Iterator[Passes]:
    """Lend the passes over these rows into a new directory of data; what lies between the two is deleted after it."""
    ordered, config = [*held_out, *sources], session.config
    drawing = draw(sources, config.most_rows, config.seed, _BLOCK, session.listener)
    eye = judge.chat.eye
    with DataFiles(folder, [source.name for source in ordered], eye and eye.soft_id) as files:
        spool = Spool(folder / "spool")
        try:
            yield Passes(session, ordered, len(held_out), judge, files, spool, drawing)
        finally:
            spool.close()
