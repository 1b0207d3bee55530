"""The files that ``prepare`` writes, its second pass over the rows, and the figures about them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.files import json_bytes, write_json
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.encoding.tokens import TokenWriter
from gemma_tune.prepare.judge import TOO_LONG, Judged, Noticed, Rejected
from gemma_tune.prepare.selection import Columns, Selection
from gemma_tune.prepare.spool import Batch, Spool
from gemma_tune.prepare.statistics import Measured, Statistics, opening

SIDES = ("train", "valid")
_EXAMPLES = 200  # rejected rows kept in memory, to be named in messages
_TOO_LONG = 20  # the same of those that are too long
_GROUPS = 5  # examples of prompts with several answers


@dataclass
class Findings:
    """What the first pass found out about the rows that are not used, and about all of them."""

    rows: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, str] = field(default_factory=dict)
    examples: list[Rejected] = field(default_factory=list)
    too_long: list[Rejected] = field(default_factory=list)
    by_source: Counter[int] = field(default_factory=Counter)
    noticed: Noticed = field(default_factory=Noticed)

    def add(self, judged: Judged, source: int, usable: int) -> None:
        """Count a block of which so many rows are usable."""
        rows = usable + len(judged.rejected)
        self.rows += rows
        self.by_source[source] += rows
        self.rejected += len(judged.rejected)
        self.noticed.add(judged.noticed)
        for item in judged.rejected:
            self.reasons[item.code] += 1
            self.first_of.setdefault(item.code, item.place)
        self.examples += judged.rejected[:_EXAMPLES - len(self.examples)]
        self.too_long += [r for r in judged.rejected if r.code == TOO_LONG][:_TOO_LONG - len(self.too_long)]


class DataFiles:
    """Writes into a new data directory; a context manager.

    Args:
        folder: the directory.
        names: of the files that rows come from, by number.
    """

    def __init__(self, folder: Path, names: Sequence[str]):
        self._folder, self._names, self._open = folder, names, ExitStack()
        self._rejected = self._open.enter_context((folder / "rejected.jsonl").open("wb"))

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def reject(self, rejected: Sequence[Rejected]) -> None:
        """Add rows to rejected.jsonl."""
        self._rejected.writelines(json_bytes(item.record()) for item in rejected)

    def keep_rejected(self, path: Path) -> None:
        """Copy rejected.jsonl to a place that outlives a failure, for the rows to be repaired."""
        self._rejected.flush()
        shutil.copyfile(self._rejected.name, path)

    def long_rows(self, spool: Spool, config: PrepareConfig) -> str | None:
        """What the limit of the length costs, before anything else is decided about the rows."""
        statistics = Statistics()
        for batch in spool.read():
            statistics.add(_measured(batch, self._names[batch.source]))
        return statistics.long_message(config.max_length, "drop")

    def write(self, spool: Spool, columns: Columns, selection: Selection, findings: Findings, config: PrepareConfig,
              advance: Callable[[int], None]) -> dict[str, Any]:
        """The second pass: every usable row goes into its file, and training's sequences into theirs.

        Args:
            advance: called with the number of rows that are done.

        Returns:
            The content of data/report.json.
        """
        (self._folder / "tokens").mkdir()
        statistics, lost = Statistics(), 0
        with ExitStack() as stack:
            lines = {side: stack.enter_context(open(self._folder / f"{side}.jsonl", "wb")) for side in SIDES}
            tokens = {side: stack.enter_context(TokenWriter(self._folder / "tokens" / f"{side}.arrow"))
                      for side in SIDES}
            duplicates = stack.enter_context(open(self._folder / "duplicates.jsonl", "wb"))
            for batch in spool.read():
                self._write_batch(batch, columns, selection, lines, tokens, duplicates)
                lost += int(_lost(batch)[selection.kept[batch.first:batch.first + batch.size]].sum())
                statistics.add(_measured(batch, self._names[batch.source]), _counted(batch, columns, selection))
                advance(batch.first + batch.size)
        report = self._report(columns, selection, findings, statistics, tokens, config) | {"left_out_answers": lost}
        write_json(self._folder / "report.json", report)
        return report

    def _write_batch(self, batch: Batch, columns: Columns, selection: Selection, lines, tokens, duplicates) -> None:
        texts, sequences = batch.bytes_of("text"), batch.sequences()
        for n in range(batch.size):
            at = batch.first + n
            if selection.kept[at]:
                side = SIDES[int(selection.valid[at])]
                lines[side].write(texts[n])
                tokens[side].add(sequences[n])
            elif columns.usable[at]:
                duplicates.write(json_bytes({
                    **self._place(columns, at), "same_as": self._named(columns, selection.same_as[at]),
                    "kind": "near" if selection.near[at] else "exact", "row": json.loads(texts[n])}))

    def _place(self, columns: Columns, at: int) -> dict[str, Any]:
        return {"file": self._names[columns.source[at]], "line": int(columns.line[at])}

    def _named(self, columns: Columns, at: int) -> str:
        return "{file}:{line}".format(**self._place(columns, at))

    def _report(self, columns: Columns, selection: Selection, findings: Findings, statistics: Statistics,
                tokens: dict[str, TokenWriter], config: PrepareConfig) -> dict[str, Any]:
        dropped = selection.same_as >= 0
        conflicts = selection.conflicts
        before = statistics.as_dict(config.max_length, config.on_long)
        trained = sum(t.trained for t in tokens.values())
        if before["long"]["message"] and config.on_long == "split":
            before["long"]["message"] = _divided(before, findings.reasons[TOO_LONG], trained)
        return {
            "rows": findings.rows, "train_rows": tokens["train"].rows, "valid_rows": tokens["valid"].rows,
            "rejected_rows": findings.rejected, "duplicate_rows": int(dropped.sum()),
            "near_duplicate_rows": int(selection.near.sum()),
            "files": [{"file": name, "rows": findings.by_source[n]} for n, name in enumerate(self._names)],
            "formats": dict(findings.noticed.formats),
            "rejected_by_reason": dict(findings.reasons), "first_rejected": findings.first_of,
            "prompts_with_several_answers": {
                "prompts": len(conflicts), "rows": sum(map(len, conflicts)),
                "examples": [[self._named(columns, at) for at in group[:3]] for group in conflicts[:_GROUPS]]},
            "rows_of_several_sequences": {"rows": findings.noticed.rewritten, "first": findings.noticed.difference},
            "asked_on_both_sides": selection.asked_on_both_sides,
            "sequences": sum(t.sequences for t in tokens.values()), "tokens": sum(t.tokens for t in tokens.values()),
            "trained_tokens": trained, "before_the_limit": before,
        }


def _divided(before: dict[str, Any], rejected: int, trained: int) -> str:
    """What became of longer rows that were to be divided: some may have no part that fits."""
    long = before["long"]
    lost = 1 - trained / max(1, before["trained_tokens"])
    divided = long["rows"] - rejected
    said = (f"{long['rows']:,} rows are longer than {long['max_length']:,} tokens: {divided:,} divided, "
            f"{rejected:,} rejected; {100 * lost:.1f} % of the trained tokens are lost")
    return f"{said}; --max-length {long['suggestion']} keeps 99 %" if lost > 0.01 else said


def _counted(batch: Batch, columns: Columns, selection: Selection) -> np.ndarray:
    """The rows that the figures are about: those that are used, and those that are only too long for it."""
    rows = slice(batch.first, batch.first + batch.size)
    return selection.kept[rows] | ~columns.usable[rows]


def _lost(batch: Batch) -> np.ndarray:
    """Of each row the number of learned stretches of which nothing is kept."""
    def per_row(name: str) -> np.ndarray:
        counts, at = batch.lists(name)
        return np.diff(np.append(0, np.cumsum(counts, dtype=np.int64))[at])

    return np.maximum(per_row("full_counts") - per_row("counts"), 0)


def _measured(batch: Batch, name: str) -> Measured:
    lengths, lengths_at = batch.lists("full_lengths")
    spans, spans_at = batch.lists("full_spans")
    rows = np.arange(batch.size)
    return Measured(
        lengths=lengths.astype(np.int64), sequence_rows=np.repeat(rows, np.diff(lengths_at)),
        spans=spans.astype(np.int64).reshape(-1, 2), span_rows=np.repeat(rows, np.diff(spans_at) // 2),
        turns=np.maximum(batch.numbers("turns"), 1).astype(np.int64), lines=batch.numbers("line"),
        scripts=batch.numbers("script").astype(np.uint8), files=[name] * batch.size,
        openings=_Openings(batch.bytes_of("text")))


class _Openings(Sequence):
    """The first characters of each row; worked out for the few that are looked at."""

    def __init__(self, lines: Sequence[bytes]):
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, n: int) -> str:
        example = json.loads(self._lines[n])
        return opening(example["text"] if "text" in example else example["messages"][0]["content"])
