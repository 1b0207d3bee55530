"""``doctor`` as people see it: a line for each finding as it is made, and what mends it below."""

from __future__ import annotations

import traceback
from typing import Any

import typer

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.cli import console, screen
from gemma_tune.cli.screen import Text

_MARKS = {"ok": ("ok    ", "green"), "look": ("look  ", "yellow"), "broken": ("BROKEN", "bold red")}
_NAMES = 18  # columns


def show(model: str | None, revision: str | None, json: bool, debug: bool) -> None:
    """Examine, show, and write the findings as one JSON object where that is asked for.

    Raises:
        typer.Exit: something is broken, with exit code 1.
    """
    from gemma_tune.doctor.examination import examine

    listener: Listener = console.ConsoleListener()
    findings = []
    try:
        for finding in examine(model, revision, listener):
            findings.append(finding)
            screen.clear_the_way()
            _line(finding)
            if debug and finding.raised is not None:
                screen.err.print("".join(traceback.format_exception(finding.raised)), markup=False)
    finally:
        listener.close()
    broken = [finding for finding in findings if finding.state == "broken"]
    what = f"training {model}" if model else "training here"
    if broken:
        screen.prose(Text(f"{counted(len(broken), 'thing')} that {what} needs {'is' if len(broken) == 1 else 'are'} "
                          "broken; what mends it stands below each", style="bold red"))
    else:
        screen.prose(Text(f"nothing that {what} needs is broken", style="bold green"))
    if json:
        screen.result_json({"ok": not broken, "model": model, "checks": [finding.as_json() for finding in findings]})
    if broken:
        raise typer.Exit(WorkFailed.exit_code)


def _line(finding: Any) -> None:
    mark, style = _MARKS[finding.state]
    screen.prose(Text.assemble((mark, style), f" {finding.check:<{_NAMES}} {finding.found}"))
    if finding.mend:
        screen.prose(Text.assemble(f"{' ' * (len(mark) + 1)}", ("to mend it: ", "cyan"), finding.mend))
