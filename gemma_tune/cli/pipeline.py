"""``run``: every stage in order on one run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import typer

from gemma_tune.cli import console, screen
from gemma_tune.cli.session import open_session
from gemma_tune.config.settings import as_flags, resolve
from gemma_tune.config.stages import CONFIGS, TrainConfig, load_yaml
from gemma_tune.evaluate.stage import evaluate, nothing_to_ask
from gemma_tune.export.stage import ExportReport, check_target, export
from gemma_tune.merge.stage import merge
from gemma_tune.prepare.stage import prepare
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport
from gemma_tune.train.launch import launch
from gemma_tune.train.stage import train

_ORDER = {"prepare": prepare, "train": train, "eval": evaluate, "merge": merge, "export-ollama": export}


def run_pipeline(ctx: typer.Context) -> tuple[dict[str, StageReport], ExportReport]:
    """Run what is not up to date; the reports by stage, and what became of the model in Ollama."""
    _check_all_settings(ctx.params)
    reports: dict[str, StageReport] = {}
    done: Any = None
    for number, (name, stage) in enumerate(_ORDER.items(), start=1):
        screen.err.rule(f"[bold]{number}/{len(_ORDER)} {name}", align="left")
        session = open_session(ctx, name, starts=name == "prepare")
        if name == "eval" and (reason := nothing_to_ask(session)):
            session.listener.note(f"skipped: {reason}")
            continue
        try:
            if name == "train" and session.config.num_processes > 1:
                _train_in_processes(ctx, session)
                session = replace(open_session(ctx, name), force=False)  # with its result, which is up to date
            done = stage(session)
        finally:
            session.listener.close()
        reports[name] = done.stage if isinstance(done, ExportReport) else done
        console.stage_result(reports[name], ctx.params["quiet"])
        # Later stages work on the run that the first one found, also when it was not named.
        ctx.params["run"] = str(reports[name].run)
    return reports, done


def _train_in_processes(ctx: typer.Context, session: Session) -> None:
    """`train` as a command of its own, with the same settings; its result is up to date afterwards.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    params = ctx.params
    given = {f.name: params.get(f.name) for f in fields(TrainConfig)}
    arguments = ["train", "--run", str(session.run.root), *as_flags(TrainConfig, given, defaults=True)]
    arguments += ["--config", str(params["config"])] if params.get("config") else []
    arguments += [f"--{name}" for name in ("force", "quiet", "debug") if params[name]]
    code = launch(session.config.num_processes, arguments)
    if code and params["json"]:
        screen.result_json({"error": {"message": "`train` did not finish", "hint": "it said why on standard error",
                                       "problems": [], "exit_code": code}})
    if code:
        raise typer.Exit(code)


def _check_all_settings(params: Mapping[str, Any]) -> None:
    """Refuse at once what a later stage would refuse after an hour of training."""
    content = load_yaml(params["config"]) if params.get("config") else {}
    settings = {name: resolve(CONFIGS[name], params, content.get(name)).config for name in _ORDER}
    check_target(settings["export-ollama"], "any")
