"""How the data is shown: the report of ``prepare`` and the preview of what is learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from gemma_tune.base.words import counted
from gemma_tune.cli import screen
from gemma_tune.cli.screen import Text
from gemma_tune.run.manifest import JUDGED, PAIRS

BAR = 32  # cells of the longest bar
_EIGHTHS = "▏▎▍▌▋▊▉█"
# Names of columns and keys that say where a row comes from, not what it says; they are listed in one line.
_BOOKKEEPING = frozenset(("id", "ids", "idx", "index", "uuid", "uid", "guid", "source", "src", "origin", "dataset",
                          "dataset_name", "split", "url", "license", "created_at", "updated_at", "timestamp", "date",
                          "conversation_id", "message_id", "row_id", "sample_id", "_id", "__index_level_0__",
                          "unnamed: 0"))
_FIGURES = ("rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows", "near_duplicate_rows",
            "picture_rows", "pictures", "picture_bytes", "sequences", "tokens", "picture_tokens", "trained_tokens")

_KINDS = {PAIRS: "each row is a pair: a chosen and a rejected answer to the same prompt, a sequence for each",
          JUDGED: "each row is an answer that is marked as good or bad"}


def data_report(report: Mapping[str, Any]) -> None:
    """The content of data/report.json for people; whatever is missing from it is not shown.

    Args:
        report: numbers by name (see ``_FIGURES``); ``before_the_limit``, the figures of ``Statistics.as_dict``;
            ``rejected_by_reason`` (number by code) and ``first_rejected`` ("file:line" by code);
            ``prompts_with_several_answers`` (``prompts``, ``rows``, ``examples``: lists of "file:line");
            ``contradictions`` (``rows``, ``examples``);
            ``kind``, what the rows are: ``conversations``, ``pairs`` or ``judged``;
            ``unread``, columns of rows and keys of turns (``where``, ``name``, ``rows``, ``values``).
    """
    figures = {name: report[name] for name in _FIGURES if report.get(name) or name == "rows" and name in report}
    of_each = 2 if report.get("kind") == PAIRS else 1
    if figures.get("sequences") == of_each * (figures.get("train_rows", 0) + figures.get("valid_rows", 0)):
        figures.pop("sequences", None)  # one for each row, as usual
    screen.err.print(screen.figures_table("data", figures))
    if said := _KINDS.get(report.get("kind", "")):
        marks = ", ".join(f"{rows:,} {name}" for name, rows in report.get("marks", {}).items())
        screen.prose(Text(f"{said}: {marks}" if marks else said))
    lengths = report.get("before_the_limit")
    if lengths and lengths["rows"]:
        _lengths(lengths)
    _rejected(report.get("rejected_by_reason", {}), report.get("first_rejected", {}))
    _unread(report.get("unread", []))
    _several_answers(report.get("prompts_with_several_answers"))
    _contradictions(report.get("contradictions"))


def _lengths(figures: Mapping[str, Any]) -> None:
    length, long = figures["length"], figures["long"]
    screen.err.print(Text("tokens per row", style="italic"))
    for line in _histogram(figures["histogram"], long["max_length"]):
        screen.err.print(line)
    parts = [f"half have at most {length['p50']:,}"]
    parts += [f"{p} % {length[f'p{p}']:,}" for p in (90, 95, 99)]
    screen.prose(Text(f"{', '.join(parts)}, the longest {length['longest']:,}"))
    if long["message"]:
        screen.prose(Text(f"! {long['message']}", style="yellow"))
    if _mixed(figures["scripts"]):
        screen.prose(Text("writing systems: " + ", ".join(
            f"{name} {_share(share)}" for name, share in figures["scripts"].items())))
    _examples("longest", figures["longest_rows"])
    _examples("shortest", figures["shortest_rows"])


def _histogram(bins: Sequence[Mapping[str, int]], max_length: int) -> Iterator[Text]:
    most = max(item["rows"] for item in bins)
    width = max(len(f"{item['to']:,}") for item in bins)
    arrow = "←" if screen.has_blocks() else "<"
    for item in bins:
        inside = item["from"] <= max_length <= item["to"] and item is not bins[-1]
        yield Text.assemble(f"  {item['from']:>{width},} - {item['to']:>{width},}  ",
                            (_bar(item["rows"], most), "cyan"), f" {item['rows']:,}",
                            (f"  {arrow} --max-length" if inside else "", "yellow"))


def _bar(value: int, most: int) -> str:
    """A bar as long as the value in comparison with the most; never empty where there is something."""
    eighths = max(round(8 * BAR * value / most), 1 if value else 0)
    if not screen.has_blocks():
        return "#" * -(-eighths // 8)
    return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _mixed(scripts: Mapping[str, float]) -> bool:
    """Whether a second writing system is more than an accident: in one row of a hundred."""
    return sum(share >= 0.01 for share in scripts.values()) > 1


def _share(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"


def _examples(name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for row in rows:
        lines += [(f"{row['tokens']:,}", Text(f"{row['file']}:{row['line']}")),
                  ("", Text(row["opening"], style="dim", no_wrap=True, overflow="ellipsis"))]
    _list(name, lines)


def _rejected(reasons: Mapping[str, int], first: Mapping[str, str]) -> None:
    _list("rejected", [(f"{rows:,}", Text(code + (f", first {first[code]}" if code in first else "")))
                       for code, rows in sorted(reasons.items(), key=lambda item: -item[1])])


def _unread(found: Sequence[Mapping[str, Any]]) -> None:
    kept = [item for item in found if item["name"] is None or item["name"].lower() in _BOOKKEEPING]
    told = [item for item in found if item not in kept]
    lines = [(f"{item['rows']:,}", Text(f"{item['where']} {item['name']}, {_values(item['values'])}"))
             for item in told]
    lines += [(f"{item['rows']:,}", Text(f"further names of {item['where']}s")) for item in kept if not item["name"]]
    if names := [item["name"] for item in kept if item["name"]]:
        most = max(item["rows"] for item in kept if item["name"])
        lines.append((f"{most:,}", Text(f"bookkeeping: {', '.join(names)}")))
    _list("not read", lines)
    if any(item["where"] == "column" and item["values"] == "several" for item in told):
        screen.prose(Text("a column that is not read is neither learned nor shown to the model; --columns names those "
                          "that should be"))


def _values(values: str) -> str:
    return "the same value in all" if values == "one" else "different values"


def _several_answers(found: Mapping[str, Any] | None) -> None:
    if not found or not found["prompts"]:
        return
    example = f", such as {' and '.join(found['examples'][0])}" if found["examples"] else ""
    prompts = counted(found["prompts"], "prompt has", "prompts have")
    screen.prose(Text(f"{prompts} several answers, in {found['rows']:,} rows{example}; all of them are kept"))


def _contradictions(found: Mapping[str, Any] | None) -> None:
    if found and found["rows"]:
        example = " and ".join(found["examples"][0])
        screen.prose(Text(f"{found['rows']:,} rows contradict each other, such as {example}: what is the better answer "
                          "in one of them, or a good one, is the worse one in another, or bad; all of them are kept"))


def _list(name: str, lines: Sequence[tuple[str, Text]]) -> None:
    """Numbers and what they are about: in columns on a terminal; whole lines in a file, which can be searched."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=8)
    grid.add_column(justify="right", min_width=6)
    grid.add_column(overflow="fold")
    for n, (number, text) in enumerate(lines):
        if screen.err.is_terminal:
            grid.add_row(name if n == 0 else "", number, text)
        else:
            screen.err.print(Text(f"{name if n == 0 else '':8}  {number:>6}  {text.plain}"))
    if grid.row_count:
        screen.err.print(grid)


def preview(rows: Sequence[Sequence[tuple[str, bool]]], names: Sequence[str] = ()) -> None:
    """Rows as the model gets them, with what is learned in green, or in ⟦brackets⟧ where there is no colour.

    Args:
        rows: sequences in pieces of their decoded text, each with whether it is learned.
        names: what the answer of each sequence is, such as ``chosen``; empty where there is nothing to say.
    """
    coloured = screen.err.is_terminal and screen.err.color_system is not None and not screen.err.no_color
    screen.prose(Text.assemble("learned: ", ("green", "green"), "; only read: ", ("dim", "dim")) if coloured
                  else Text("⟦learned⟧, everything else is only read"))
    for n, pieces in enumerate(rows):
        name = f", {names[n]}" if n < len(names) and names[n] else ""
        screen.err.print(Text(f"── sequence {n + 1}{name}", style="bold"))
        screen.err.print(Text.assemble(*(_piece(text, trained, coloured) for text, trained in pieces if text)))


def _piece(text: str, trained: bool, coloured: bool) -> tuple[str, str]:
    if coloured:
        return text, "green" if trained else "dim"
    return (f"⟦{text}⟧" if trained else text), ""
