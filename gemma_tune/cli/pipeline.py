"""``run``: every stage in order on one run directory."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial
from typing import Any

import typer

from gemma_tune.api import IN_ORDER
from gemma_tune.base.errors import INTERRUPTED, WORK_FAILED, Interrupted, UserError, WorkFailed
from gemma_tune.cli import console, screen
from gemma_tune.cli.request import Request
from gemma_tune.config.rewards import read
from gemma_tune.config.settings import as_flags
from gemma_tune.config.stages import ExportConfig, MergeConfig, TrainConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.evaluate.stage import evaluate_alone, nothing_to_measure, require_settings
from gemma_tune.export.calibration_file import require_file
from gemma_tune.export.push import check_push as check_export_push
from gemma_tune.export.stage import ExportReport, check_target, refuse_formats
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.merge.base import require_base
from gemma_tune.merge.push import check_push as check_merge_push
from gemma_tune.prepare.stage import chat_format
from gemma_tune.report.page import write_report
from gemma_tune.rewards.program import refuse_missing
from gemma_tune.run.directory import RunDir, command
from gemma_tune.run.exportable import refuse_unexportable
from gemma_tune.run.session import Session
from gemma_tune.run.stage import StageReport
from gemma_tune.run.state import OUTSIDE
from gemma_tune.run.unrecorded import current_manifest
from gemma_tune.train.launch import launch
from gemma_tune.train.report_to import require


def run_pipeline(request: Request) -> tuple[dict[str, StageReport], ExportReport]:
    """Run what is not up to date; the reports by stage, and what became of the model in Ollama."""
    _check_all_settings(request)
    reports: dict[str, StageReport] = {}
    try:
        done = _run_stages(request, reports)
    except BaseException:
        with contextlib.suppress(Exception):  # what went wrong before matters more
            if "eval" in reports:
                write_page(reports["eval"])
        raise
    shown = "eval" if "eval" in reports else "export-ollama"
    reports[shown] = write_page(reports[shown])  # of everything, now that there is everything
    return reports, replace(done, stage=reports["export-ollama"])


def _run_stages(request: Request, reports: dict[str, StageReport]) -> Any:
    """What the last stage gives; the reports of all are put into ``reports``."""
    done: Any = None
    stages = IN_ORDER | {"eval": evaluate_alone}  # the page is written in the end
    for number, (name, stage) in enumerate(stages.items(), start=1):
        screen.err.rule(f"[bold]{number}/{len(stages)} {name}", align="left")
        session = request.open(name)
        if name == "eval" and (reason := nothing_to_measure(session)):
            session.listener.note(f"skipped: {reason}")
            continue
        if name == "prepare":
            _refuse_outside_adapter(session)
            require_base(session, request.settings("merge").base)
            _refuse_formats(session, request)
            _check_pushes(session.run.model_name, request.settings("merge"), request.settings("export-ollama"))
            stage = partial(stage, foretell=partial(_refuse_unexportable, request), trains=True)
        try:
            if name == "train" and session.config.num_processes > 1:
                _train_in_processes(request, session)
                session = replace(request.open(name), force=False)  # with its result, which is up to date
            done = stage(session)
            if name == "prepare" and done.status == "up-to-date":
                _refuse_unexportable(request, session, None)
        finally:
            session.listener.close()
        reports[name] = done.stage if isinstance(done, ExportReport) else done
        console.stage_result(reports[name], request.options["quiet"])
        # Later stages work on the run that the first one found, also when it was not named.
        request = request.but(run=str(reports[name].run))
    return done


def _refuse_outside_adapter(session: Session) -> None:
    """A run that only merges an adapter from elsewhere is not trained on the example, nor on anything, unasked.

    Raises:
        UserError: it is such a run, and no data were named.
    """
    stages, root = session.manifest.stages, session.run.root
    outside = stages.get("merge", {"inputs": {}})["inputs"].get(f"{OUTSIDE}adapter")
    if outside and "train" not in stages and not session.config.data:
        raise UserError(f"{root} merges an adapter that was trained elsewhere ({session.run.found(outside['path'])}), "
                        "and `run` would train another one in its place",
                        f"to export what is merged: {command('export-ollama', root)}; to train, name DATA")


def _refuse_unexportable(request: Request, session: Session, chat: ChatFormat | None) -> None:
    """A model that cannot be exported in the end is told of before it is trained, unless it was exported before.

    Args:
        chat: None where its tokenizer has not been loaded, which takes seconds of a large vocabulary.

    Raises:
        UserError: see :func:`gemma_tune.run.exportable.refuse_unexportable`.
    """
    if "export-ollama" in session.manifest.stages:
        return
    model, converter = session.model, request.settings("export-ollama").converter
    try:
        refuse_unexportable(model, chat or chat_format(session), converter=converter is not None)
    except UserError as e:
        hint = (e.hint or "").rstrip(".")
        raise UserError(f"`run` ends with an export, which will not take {model.id}: {e.message}",
                        f"{hint}; or the stages before by themselves: gemma-tune prepare DATA, gemma-tune train, "
                        "gemma-tune merge", e.problems) from e


def _refuse_formats(session: Session, request: Request) -> None:
    """Number formats that the export in the end will refuse are told of before the training.

    Raises:
        UserError: see :func:`gemma_tune.export.stage.refuse_formats`.
    """
    model, config = session.model, request.settings("export-ollama")
    if config.labels:
        try:
            architecture = architecture_of(model.config, model.path / "config.json")
        except UserError:  # the converter's, or what is told of before any row is read
            return
        refuse_formats(config, architecture, model.id)


def write_page(report: StageReport) -> StageReport:
    """Write the run's report.html; a stage's report with it among what the stage made."""
    manifest = current_manifest(report.run)
    if manifest is None:  # removed meanwhile
        return report
    page = write_report(RunDir(report.run, manifest.model_name))
    return replace(report, artifacts={**report.artifacts, "html_report": str(page)})


def _train_in_processes(request: Request, session: Session) -> None:
    """`train` as a command of its own, with the same settings; its result is up to date afterwards.

    Raises:
        typer.Exit: it failed, and has said why.
    """
    options = request.options
    arguments = ["train", "--run", str(session.run.root), *as_flags(TrainConfig, request.given("train"), defaults=True)]
    arguments += ["--config", str(options["config"])] if options.get("config") else []
    arguments += [f"--{name}" for name in ("force", "quiet", "debug") if options[name]]
    code = launch(session.config.num_processes, arguments)
    if code and options["json"]:
        kinds = {WORK_FAILED: WorkFailed, INTERRUPTED: Interrupted}
        failed = kinds.get(code, UserError)("`train` did not finish", "it said why on standard error")
        screen.result_json({"error": screen.error_json(failed) | {"exit_code": code}})
    if code:
        raise typer.Exit(code)


def _check_all_settings(request: Request) -> None:
    """Refuse at once what a later stage would refuse after an hour of training."""
    settings = {name: request.settings(name) for name in IN_ORDER}
    require(settings["train"].report_to)
    refuse_missing(read(settings["train"].reward))
    check_target(settings["export-ollama"], "any")
    require_file(settings["export-ollama"].calibration_file)
    require_settings(settings["eval"])


def _check_pushes(model_name: str, merge: MergeConfig, export: ExportConfig) -> None:
    """Refuse repositories at the Hub that a later stage would refuse to push to.

    Raises:
        UserError: both stages are to push to one, or one cannot be pushed to.
    """
    if merge.push and export.push and merge.push.lower() == export.push.lower():
        raise UserError(f"merge and export-ollama are both to push to {merge.push}, and each has a model card",
                        f"give the GGUF files a repository of their own, such as {merge.push}-GGUF")
    if merge.push:
        check_merge_push(merge.push, private=merge.private)
    if export.push:
        check_export_push(export.push, model_name, private=export.private)
