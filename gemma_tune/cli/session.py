"""From parsed options to a stage's session, and from a stage's errors to an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from gemma_tune.base.errors import Interrupted, UserError, WorkFailed
from gemma_tune.cli import console, screen
from gemma_tune.config.settings import resolve
from gemma_tune.config.stages import CONFIGS, DEFAULT_MODEL, load_yaml
from gemma_tune.run.directory import RUNS, RunDir, find_run
from gemma_tune.run.manifest import read_manifest
from gemma_tune.train import processes

if TYPE_CHECKING:
    from gemma_tune.models.source import BaseModel
    from gemma_tune.run.session import Session


class Commands(TyperGroup):
    """The command line; where ``accelerate launch`` runs it several times, one process speaks for all."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not processes.is_main():
            screen.mute()
        return super().main(*args, **kwargs)


class Command(TyperCommand):
    """A command whose errors are a message, a hint and an exit code instead of a traceback."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["arguments"] = [self.name, *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        unexpected = None
        try:
            if not self._takes_part(ctx):
                return None
            result = super().invoke(ctx)
            processes.leave()
            return result
        except UserError as e:
            problem = e
        except KeyboardInterrupt:
            problem = Interrupted("stopped", "run the same command again; finished stages are kept")
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader of stdout has seen enough, as `| head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(WorkFailed.exit_code) from None
        except Exception as e:  # noqa: BLE001 - the last resort: a fault of ours is reported as one
            if type(e).__module__.startswith(("click", "typer")):
                raise
            unexpected = e
            problem = WorkFailed(f"unexpected {type(e).__name__}: {e}",
                                 "repeat with --debug and report the traceback; finished stages are kept")
            problem.__cause__ = e
        shown = processes.settle(problem)
        if shown is None:  # another process shows it
            raise typer.Exit(problem.exit_code)
        screen.unmute()
        if ctx.params.get("debug"):
            raise unexpected if unexpected is not None and shown is problem else shown
        _show(shown, ctx.params)
        raise typer.Exit(shown.exit_code)

    def _takes_part(self, ctx: Any) -> bool:
        """Whether this process runs the command itself: only `train` is a matter of several, led by the main one."""
        here = processes.place()
        together = here.count > 1 and self.name == "train" and not ctx.params["dry_run"]
        if together:
            processes.join(lambda problem: _show(problem, ctx.params))
        elif here.rank == 0:
            processes.forget()
        if together and here.rank:
            from gemma_tune.train.stage import follow

            follow()
            processes.leave()
        return here.rank == 0


def _show(problem: UserError, params: Mapping[str, Any]) -> None:
    if params.get("json"):
        screen.result_json({"error": {"message": problem.message, "hint": problem.hint,
                                       "problems": list(problem.problems), "exit_code": problem.exit_code}})
    screen.error(problem)


def start_processes(ctx: typer.Context) -> None:
    """``train --num-processes N``: the same command as N processes, unless this is one of them.

    Raises:
        UserError: settings that cannot be used.
        typer.Exit: the processes have ended; with their exit code.
    """
    from gemma_tune.train.launch import launch

    params = ctx.params
    content = load_yaml(params["config"]) if params.get("config") else {}
    wanted = resolve(CONFIGS["train"], params, content.get("train")).config.num_processes
    if not processes.joined():
        if wanted > 1:
            raise typer.Exit(launch(wanted, ctx.meta["arguments"]))
        return
    there = processes.place().count
    if params["num_processes"] not in (None, there):
        raise UserError(f"--num-processes {wanted} was asked for, and {there} processes were launched",
                        "leave --num-processes out where accelerate launch or torchrun starts them")
    if wanted != there:
        params["num_processes"] = there


def open_session(ctx: typer.Context, section: str, *, starts: bool = False,
                 flags: Mapping[str, Any] | None = None) -> Session:
    """Find the run, its model and the stage's settings.

    Args:
        starts: whether the stage may begin a new run.
        flags: the stage's settings on the command line; by default every option of the command that has its name.

    Raises:
        UserError: no such run, another model's run, settings that cannot be used.
    """
    from gemma_tune.config.families import family_defaults
    from gemma_tune.run.session import Session

    params = ctx.params
    flags = params if flags is None else flags
    listener = console.ConsoleListener(params["quiet"])
    content = load_yaml(params["config"]) if params.get("config") else {}
    # Settings are checked before a model is looked for, which can mean a download.
    resolve(CONFIGS[section], flags, content.get(section))
    wanted = params.get("model") or content.get("model")
    root = _run_directory(params.get("run") or content.get("run"), wanted, starts)
    listener.note(f"run: {root}")
    # `prepare` needs no weights, and `train` looks whether it has the memory for them before it asks for them.
    model, manifest = _model_and_manifest(root, wanted, params.get("revision") or content.get("revision"), starts,
                                          listener, weights=section not in ("prepare", "train"))
    family, reasons = family_defaults(model.config["model_type"], section)
    resolved = resolve(CONFIGS[section], flags, content.get(section), family)
    for name, reason in zip(family, reasons):
        if resolved.origins[name] == "family":
            listener.note(reason)
    return Session(RunDir(root, manifest.model_name), model, resolved, listener, manifest,
                   force=bool(params.get("force")))


def _run_directory(run: str | None, model_id: str | None, starts: bool) -> Path:
    if starts and not run and not model_id and not list(RUNS.glob("*/manifest.json")):
        model_id = DEFAULT_MODEL
    return find_run(run, model_id)


def _model_and_manifest(root: Path, wanted: str | None, revision: str | None, starts: bool, listener: Any, *,
                        weights: bool):
    from gemma_tune.models.source import locate, recorded_id
    from gemma_tune.run.manifest import Manifest

    manifest = read_manifest(root)
    if manifest is None:
        if not starts:
            raise UserError(f"{root} is not a run yet: it has no manifest.json",
                            f"start it: gemma-tune prepare YOUR.jsonl --run {root}"
                            + (f" --model {wanted}" if wanted else ""))
        model = locate(wanted or DEFAULT_MODEL, revision, listener, weights=weights)
        return model, Manifest(model.record(root))
    recorded = manifest.model
    if not wanted and recorded.get("path") and not (root / recorded["path"]).exists():
        raise UserError(f"the base model of {root} is not where it was: {os.path.normpath(root / recorded['path'])}",
                        f"name its place once with --model DIR/{Path(recorded['path']).name}")
    model = locate(wanted or recorded_id(recorded, root), revision or recorded["revision"], listener, recorded,
                   weights=weights)
    _refuse_other_model(root, recorded, model, wanted)
    if model.fingerprint != recorded["fingerprint"]:
        listener.warn(f"the base model {model.id} has changed since this run began; what was made from it is stale")
    manifest.model = model.record(root)
    return model, manifest


def _refuse_other_model(root: Path, recorded: Mapping[str, Any], model: BaseModel, wanted: str | None) -> None:
    if (recorded["id"], recorded["source"]) != (model.id, model.source):
        raise UserError(f"{root} is a run of {recorded['id']}, not of {wanted}: its adapter fits that model alone",
                        f"leave --model out, or use another run: --run {RUNS / model.name}-2")


def finish(ctx: typer.Context, report: Any, next_steps: tuple[str, ...] = (), **extra: Any) -> None:
    """Show a stage's result to people, and as JSON to programs."""
    console.stage_result(report, ctx.params["quiet"], next_steps, extra.get("advice"), extra.get("elsewhere", ()))
    if ctx.params["json"]:
        screen.result_json(as_json(report) | extra | {"next": list(next_steps)})


def as_json(report: Any) -> dict[str, Any]:
    """A stage's report for ``--json``."""
    return {"stage": report.stage, "status": report.status, "run": str(report.run), "summary": report.summary,
            "artifacts": report.artifacts}


def run_one(ctx: typer.Context, section: str, stage: Callable[[Session], Any], *, starts: bool = False,
            flags: Mapping[str, Any] | None = None) -> Any:
    """Open the session, run the stage, and end its live display whatever happens."""
    session = open_session(ctx, section, starts=starts, flags=flags)
    try:
        return stage(session)
    finally:
        session.listener.close()


def show_plan(ctx: typer.Context, plan: Callable[[Session], Any]) -> None:
    """``train --dry-run``: the plan as a table, or as JSON.

    Raises:
        UserError: DATA was named, which would have to be prepared, and that writes.
    """
    if ctx.params["data"]:
        raise UserError("--dry-run plans the training of what is prepared, and prepares nothing itself",
                        f"prepare it first: gemma-tune prepare {' '.join(ctx.params['data'])}")
    planned = run_one(ctx, "train", plan)
    if not (ctx.params["quiet"] and ctx.params["json"]):
        console.plan(planned)
    if ctx.params["json"]:
        screen.result_json(planned.as_json())


def prepare_first(ctx: typer.Context) -> dict[str, Any]:
    """``train DATA``: prepare the data, then let the command go on with the run that it belongs to.

    Returns:
        What the command's own JSON says of it.

    Raises:
        UserError: settings of either stage that cannot be used, and whatever ``prepare`` raises.
    """
    from gemma_tune.prepare.stage import prepare

    params = ctx.params
    content = load_yaml(params["config"]) if params.get("config") else {}
    resolve(CONFIGS["train"], params, content.get("train"))  # before the data is read, which can take long
    # Options of the same name, such as --seed, are about the training.
    report = run_one(ctx, "prepare", prepare, starts=True, flags={"data": params["data"]})
    console.stage_result(report, params["quiet"])
    params["run"] = str(report.run)
    return {"prepare": as_json(report)}


def take_adapter(ctx: typer.Context) -> bool:
    """``merge --adapter``: work on the base model that the adapter names, unless another one is named.

    Returns:
        Whether an adapter from elsewhere is named, which can begin a run.

    Raises:
        UserError: settings that cannot be used, no adapter there, or one that names no base.
    """
    from gemma_tune.lora.files import named_base

    params = ctx.params
    content = load_yaml(params["config"]) if params.get("config") else {}
    adapter = resolve(CONFIGS["merge"], params, content.get("merge")).config.adapter
    if adapter and not (params["model"] or content.get("model")):
        params["model"], revision = named_base(Path(adapter).expanduser())
        params["revision"] = params["revision"] or content.get("revision") or revision
    return bool(adapter)


def stdin_is_terminal() -> bool:
    """Whether a person can be asked."""
    return sys.stdin is not None and sys.stdin.isatty()
