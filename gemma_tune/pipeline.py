"""``run``: every stage in order on one run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from gemma_tune import console
from gemma_tune.cli_session import open_session
from gemma_tune.config import CONFIGS, load_yaml
from gemma_tune.evaluate import evaluate, nothing_to_ask
from gemma_tune.export import ExportReport, check_target, export
from gemma_tune.merge import merge
from gemma_tune.prepare import prepare
from gemma_tune.settings import resolve
from gemma_tune.stage import StageReport
from gemma_tune.train import train

_ORDER = {"prepare": prepare, "train": train, "eval": evaluate, "merge": merge, "export-ollama": export}


def run_pipeline(ctx: typer.Context) -> tuple[dict[str, StageReport], ExportReport]:
    """Run what is not up to date; the reports by stage, and what became of the model in Ollama."""
    _check_all_settings(ctx.params)
    reports: dict[str, StageReport] = {}
    done: Any = None
    for number, (name, stage) in enumerate(_ORDER.items(), start=1):
        console.err.rule(f"[bold]{number}/{len(_ORDER)} {name}", align="left")
        session = open_session(ctx, name, starts=name == "prepare")
        if name == "eval" and (reason := nothing_to_ask(session)):
            session.listener.note(f"skipped: {reason}")
            continue
        try:
            done = stage(session)
        finally:
            session.listener.close()
        reports[name] = done.stage if isinstance(done, ExportReport) else done
        console.stage_result(reports[name], ctx.params["quiet"])
        # Later stages work on the run that the first one found, also when it was not named.
        ctx.params["run"] = str(reports[name].run)
    return reports, done


def _check_all_settings(params: Mapping[str, Any]) -> None:
    """Refuse at once what a later stage would refuse after an hour of training."""
    content = load_yaml(params["config"]) if params.get("config") else {}
    settings = {name: resolve(CONFIGS[name], params, content.get(name)).config for name in _ORDER}
    check_target(settings["export-ollama"], "any")
