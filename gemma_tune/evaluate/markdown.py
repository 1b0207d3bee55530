"""report.md: the comparison of base and tuned model as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.answers.prompts import headline, shown
from gemma_tune.base.words import counted
from gemma_tune.config.rewards import in_words
from gemma_tune.encoding.eye import PICTURES, pictures_of
from gemma_tune.report.tables import FEW_ROWS, LEGEND, measure_rows, reward_of, rough_rows, task_rows
from gemma_tune.run.session import Session

_FENCE = re.compile(r"\s*(`{3,}(?!.*`)|~{3,})(.*)")  # of code; with backticks behind it, that is code within the line


def report(session: Session, summary: dict[str, Any]) -> str:
    """The comparison as Markdown.

    Args:
        summary: of the stage, with the ``answers`` as answers.json keeps them.
    """
    total = summary["questions"]
    lines = [f"# {session.model.name}: before and after"]
    if total:
        lines += ["", "| | base | tuned |", "|---|---|---|",
                  f"| answers that end by themselves | {summary['base_ended']}/{total} "
                  f"| {summary['tuned_ended']}/{total} |"]
    if "base_in_form" in summary:
        judged = summary["measures"]["in_form"]["rows"]
        lines += [f"| answers in the example's form | {summary['base_in_form']}/{judged} "
                  f"| {summary['tuned_in_form']}/{judged} |", "", samples.FORM_DESCRIPTION]
    lines += [*_measures(session, summary), *_tasks(summary)]
    if total:
        lines += ["", f"Held-out prompts, answered greedily with at most {session.config.max_new_tokens} tokens."]
    for n, item in enumerate(summary["answers"], start=1):
        lines += ["", f"## {n}. {_without_tags(headline(item['prompt']))}"]
        if item.get("tools"):
            lines += ["", f"*tools on offer*: {', '.join(f'`{name}`' for name in item['tools'])}"]
        for turn in item["prompt"]:
            lines += ["", f"*{turn['role']}*", "", *_quoted(_with_pictures(session, turn))]
        for which in ("base", "tuned"):
            cut = "" if item[f"{which}_ended"] else "cut off at the limit"
            said = ", ".join(filter(None, (cut, reward_of(item, which))))
            lines += ["", f"**{which}**{f' ({said})' if said else ''}", "", *_quoted(item[which])]
        if "reference" in item:
            lines += ["", "**the row's own answer**", "", *_quoted(item["reference"])]
    return "\n".join(lines) + "\n"


def _measures(session: Session, summary: dict[str, Any]) -> list[str]:
    rows = measure_rows(summary)
    if not rows:
        return []
    lines = ["", "| | rows | base | tuned | difference | |", "|---|---|---|---|---|---|",
             *(f"| {' | '.join(row)} |" for row in rows)]
    file = session.config.data_file
    where = f"rows of `{Path(file).name}`" if file else "validation rows"
    said = f"On {counted(summary['rows'], 'row')} of {summary['rows_there']:,} ({where}). {LEGEND}"
    if "reward" in summary["measures"]:
        said += f" Answers are scored by {in_words(session.config.reward)}."
    return [*lines, "", said + (f" Fewer than {FEW_ROWS} rows give rough intervals." if rough_rows(summary) else "")]


def _tasks(summary: dict[str, Any]) -> list[str]:
    rows: Sequence[Sequence[str]] = task_rows(summary)
    if not rows:
        return []
    return ["", "lm-evaluation-harness, each figure with its standard error:", "",
            "| task | metric | base | tuned | difference |", "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows)]


def _quoted(text: str) -> list[str]:
    """Lines of a Markdown quotation: a heading or an open code fence in a text ends with it. HTML shows as it is."""
    lines, fence = [], ""  # that is open
    for line in text.splitlines() if text.strip() else ["(nothing)"]:
        if found := _FENCE.match(line):
            mark, rest = found.groups()
            if not fence:
                fence = mark
            elif mark.startswith(fence) and not rest.strip():  # another in the code does not end it
                fence = ""
        lines.append(f"> {line if fence else _without_tags(line)}")
    return lines


def _with_pictures(session: Session, turn: Mapping[str, Any]) -> str:
    """A turn's text below its pictures, which lie in the run as the report does."""
    pictures = [_picture(session, name) for name in pictures_of([turn])]
    return "\n\n".join([*pictures, *filter(None, [shown(turn)])])


def _picture(session: Session, name: str) -> str:
    folder = session.run.evaluated / PICTURES if session.config.data_file else session.run.pictures
    return f"![{name}]({session.run.relative(folder / name)})"


def _without_tags(line: str) -> str:
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", line)
