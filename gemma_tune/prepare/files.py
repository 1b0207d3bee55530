"""The files that ``prepare`` writes, its second pass over the rows, and the figures about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.base.files import json_bytes, write_json
from gemma_tune.base.words import counted, opening
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.encoding.origins import write_origins
from gemma_tune.encoding.tokens import TokenWriter
from gemma_tune.prepare.drawing import Drawing
from gemma_tune.prepare.findings import Findings
from gemma_tune.prepare.noticed import Rejected
from gemma_tune.prepare.pictures import UsedPictures
from gemma_tune.prepare.selection import Columns, Selection
from gemma_tune.prepare.spool import Batch, Spool
from gemma_tune.prepare.statistics import KEPT, Measured, Statistics
from gemma_tune.run.directory import PICTURES
from gemma_tune.run.manifest import JUDGED

SIDES = ("train", "valid")
_GROUPS = 5  # examples of prompts with several answers


@dataclass(frozen=True)
class Decided:
    """All rows after the first pass, and what was decided about each of them.

    Args:
        ends: of each text whose end is kept aside the number of its own row, and of that with the end.
    """

    spool: Spool
    drawing: Drawing
    findings: Findings
    columns: Columns
    selection: Selection
    ends: Sequence[tuple[int, int]] = ()

    @property
    def are_texts(self) -> bool:
        """Whether all rows that are used are plain texts."""
        return bool((self.columns.text[self.selection.kept] > 0).all())

    def counted(self, batch: Batch) -> np.ndarray:
        """The rows that the figures are about: those that are used, and those that are only too long for it. A text
        that is divided is one row, and its parts, which stand behind all others, are none."""
        rows, parts = slice(batch.first, batch.first + batch.size), len(self.columns.line) - 2 * len(self.ends)
        counted = self.selection.kept[rows] | self.selection.ends[rows] | ~self.columns.usable[rows]
        return counted & (np.arange(rows.start, rows.stop) < parts)


class _Outputs:
    """The open files of rows and of tokens, by side."""

    def __init__(self, folder: Path, opened: ExitStack, pictures: UsedPictures):
        (folder / "tokens").mkdir()
        self.lines = {side: opened.enter_context((folder / f"{side}.jsonl").open("wb")) for side in SIDES}
        self.tokens = {side: opened.enter_context(TokenWriter(folder / "tokens" / f"{side}.arrow")) for side in SIDES}
        self.duplicates = opened.enter_context((folder / "duplicates.jsonl").open("wb"))
        self.pictures = pictures
        self.of_texts = 0  # learned tokens of plain texts

    def total(self, name: str) -> int:
        """The sum of a count of both sides' tokens."""
        return sum(getattr(writer, name) for writer in self.tokens.values())


class DataFiles:
    """Writes into a new data directory; a context manager.

    Args:
        folder: the directory.
        names: of the files that rows come from, by number.
        soft: see :class:`UsedPictures`.
    """

    def __init__(self, folder: Path, names: Sequence[str], soft: int | None):
        self._folder, self._names, self._soft, self._open = folder, names, soft, ExitStack()
        self._rejected = self._open.enter_context((folder / "rejected.jsonl").open("wb"))

    def __enter__(self) -> DataFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def reject(self, rejected: Sequence[Rejected]) -> None:
        """Add rows to rejected.jsonl."""
        self._rejected.writelines(json_bytes(item.record()) for item in rejected)

    def keep_rejected(self, path: Path) -> None:
        """Copy rejected.jsonl to a place that outlives a failure, for the rows to be repaired, if there are any."""
        self._rejected.flush()
        if self._rejected.tell():
            shutil.copyfile(self._rejected.name, path)

    def long_rows(self, spool: Spool, config: PrepareConfig) -> str | None:
        """What the limit of the length costs, before anything else is decided about the rows."""
        statistics = Statistics()
        for batch in spool.read():
            statistics.add(_measured(batch, self._names[batch.source]))
        return statistics.long_message(config.max_length, "drop")

    def write(self, decided: Decided, config: PrepareConfig, advance: Callable[[int], None]) -> dict[str, Any]:
        """The second pass: every usable row goes into its file, and training's sequences into theirs.

        Args:
            advance: called with the number of rows that are done.

        Returns:
            The content of data/report.json.
        """
        statistics, kept, lost = Statistics(), Statistics(), 0
        pictures = UsedPictures(self._folder / PICTURES, self._soft)
        with ExitStack() as opened:
            outputs = _Outputs(self._folder, opened, pictures)
            for batch in decided.spool.read():
                self._write_batch(batch, decided, outputs)
                used = decided.selection.kept[batch.first:batch.first + batch.size]
                lost += int(_lost(batch)[used].sum())
                statistics.add(_measured(batch, self._names[batch.source]), decided.counted(batch))
                kept.add(_measured(batch, self._names[batch.source], of=""), used)
                advance(batch.first + batch.size)
        columns, selection = decided.columns, decided.selection
        for_training = selection.kept & ~selection.valid
        write_origins(self._folder, columns.source[for_training], columns.line[for_training])
        report = self._report(decided, statistics, outputs, config) | {
            "left_out_answers": lost, "turns": kept.turns, "length": kept.length, **pictures.settled()}
        write_json(self._folder / "report.json", report)
        return report

    def _write_batch(self, batch: Batch, decided: Decided, outputs: _Outputs) -> None:
        texts, sequences, answers = batch.bytes_of("text"), batch.sequences(), batch.bytes_of("answers")
        columns, selection = decided.columns, decided.selection
        for n in range(batch.size):
            at = batch.first + n
            if selection.kept[at]:
                side = SIDES[int(selection.valid[at])]
                outputs.lines[side].write(texts[n])
                outputs.tokens[side].add(sequences[n], answers[n])
                outputs.pictures.add(side, texts[n], sequences[n])
                if columns.text[at]:
                    outputs.of_texts += sum(int(spans[1::2].sum() - spans[::2].sum()) for _, spans, _ in sequences[n])
            elif selection.same_as[at] >= 0:
                outputs.duplicates.write(json_bytes({
                    **self._place(columns, at), "same_as": self._named(columns, selection.same_as[at]),
                    "kind": "near" if selection.near[at] else "exact", "row": json.loads(texts[n])}))

    def _place(self, columns: Columns, at: int) -> dict[str, Any]:
        return {"file": self._names[columns.source[at]], "line": int(columns.line[at])}

    def _named(self, columns: Columns, at: int) -> str:
        return "{file}:{line}".format(**self._place(columns, at))

    def _groups(self, columns: Columns, groups: Sequence[np.ndarray]) -> dict[str, Any]:
        """How many rows are in groups, and where those of the first ones stand."""
        return {"rows": sum(map(len, groups)),
                "examples": [[self._named(columns, at) for at in group[:3]] for group in groups[:_GROUPS]]}

    def _report(self, decided: Decided, statistics: Statistics, outputs: _Outputs,
                config: PrepareConfig) -> dict[str, Any]:
        findings, columns, selection = decided.findings, decided.columns, decided.selection
        dropped, conflicts, tokens = selection.same_as >= 0, selection.conflicts, outputs.tokens
        before, trained = statistics.as_dict(config.max_length, config.on_long), outputs.total("trained")
        if before["long"]["message"] and config.on_long == "split":
            before["long"]["message"] = _divided(before, findings.long, trained)
        return {
            "rows": findings.rows, "train_rows": tokens["train"].rows, "valid_rows": tokens["valid"].rows,
            "rejected_rows": findings.rejected, "duplicate_rows": int(dropped.sum()),
            "near_duplicate_rows": int(selection.near.sum()),
            "drawn": decided.drawing.as_list(),
            "files": [{"file": name, "rows": findings.by_source[n]} for n, name in enumerate(self._names)],
            "formats": dict(findings.noticed.formats), "kind": findings.kind,
            **({"marks": {name: outputs.total(name) for name in ("good", "bad")}} if findings.kind == JUDGED else {}),
            "unread": findings.noticed.unread.as_list(),
            "rejected_by_reason": dict(findings.reasons), "first_rejected": findings.first_of,
            "prompts_with_several_answers": {"prompts": len(conflicts), **self._groups(columns, conflicts)},
            "contradictions": self._groups(columns, selection.opposites),
            "rows_of_several_sequences": {"rows": findings.noticed.rewritten, "first": findings.noticed.difference},
            "calls_without_result": {"rows": findings.noticed.unanswered, "first": findings.noticed.first_unanswered},
            "white_space_left_out": {"rows": findings.noticed.trimmed, "first": findings.noticed.first_trimmed},
            "markup": findings.noticed.markup.as_dict(),
            "asked_on_both_sides": selection.asked_on_both_sides,
            "ends_held_out": [{**self._place(columns, own), "from_line": int(columns.line[end])}
                              for own, end in decided.ends],
            "sequences": outputs.total("sequences"), "tokens": outputs.total("tokens"),
            "trained_tokens": trained, "trained_tokens_of_texts": outputs.of_texts, "before_the_limit": before,
        }


def _divided(before: dict[str, Any], rejected: int, trained: int) -> str:
    """What became of longer rows that were to be divided: some may have no part that fits."""
    long = before["long"]
    lost = 1 - trained / max(1, before["trained_tokens"])
    divided = long["rows"] - rejected
    said = (f"{counted(long['rows'], 'row is', 'rows are')} longer than {long['max_length']:,} tokens: {divided:,} "
            f"divided, {rejected:,} rejected; {100 * lost:.1f} % of the trained tokens are lost")
    kept = "all" if long["suggestion"] >= before["length"]["longest"] else f"{KEPT} %"
    return f"{said}; --max-length {long['suggestion']} keeps {kept}" if lost > 0.01 else said


def _lost(batch: Batch) -> np.ndarray:
    """Of each row the number of learned stretches of which nothing is kept."""
    def per_row(name: str) -> np.ndarray:
        counts, at = batch.lists(name)
        return np.diff(np.append(0, np.cumsum(counts, dtype=np.int64))[at])

    return np.maximum(per_row("full_counts") - per_row("counts"), 0)


def _measured(batch: Batch, name: str, of: str = "full_") -> Measured:
    """The figures of a batch's rows: without a limit, or, ``of`` nothing, of what is kept of them."""
    lengths, lengths_at = batch.lists(f"{of}lengths")
    spans, spans_at = batch.lists(f"{of}spans")
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
