"""What was asked for: from parsed options to a stage's session, and from its result to what is shown."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.cli import console, hints, screen
from gemma_tune.cli.options import with_refusals
from gemma_tune.config.settings import resolve
from gemma_tune.config.settings_file import load_yaml
from gemma_tune.config.stages import CONFIGS
from gemma_tune.run.directory import RunDir, find_run, of_its_run
from gemma_tune.run.stopped import unfinished
from gemma_tune.run.unrecorded import current_manifest
from gemma_tune.train import processes

if TYPE_CHECKING:
    from gemma_tune.run.session import Session

# Options of `run` that are settings of one stage, though another has some of that name: `eval` follows the training.
_OF_RUN = {"data": "prepare", "pictures": "prepare", "reward": "train"}


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        options: of the command, by name; None where one was not given.
        file: what the ``--config`` file holds.
        arguments: the command as it was typed.
    """

    options: Mapping[str, Any]
    file: Mapping[str, Any]
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, ctx: typer.Context) -> Request:
        """The request of a command that Typer parsed.

        Raises:
            UserError: a ``--config`` file that cannot be used.
        """
        config, run, model = (ctx.params.get(name) for name in ("config", "run", "model"))
        file = of_its_run(load_yaml(Path(config)), Path(config), run, model) if config else {}
        request = cls(with_refusals(ctx.params), file, tuple(ctx.meta["arguments"]))
        if request.names:
            request.hint_at(find_run(*map(request.names.get, ("run", "model"))))
        return request

    @property
    def names(self) -> dict[str, str]:
        """The run, and the model, as far as they are named."""
        named = {name: self.options.get(name) or self.file.get(name) for name in ("run", "model")}
        return {name: str(value) for name, value in named.items() if value}

    def hint_at(self, root: Path) -> None:
        """Let the commands that messages propose be about the run at ``root``."""
        begun = (root / "manifest.json").exists()
        hints.about(str(root), () if begun else [text for name, value in self.names.items()
                                                 for text in (f"--{name}", value)])

    def but(self, **options: Any) -> Request:
        """The same request with other options."""
        return dataclasses.replace(self, options={**self.options, **options})

    def given(self, stage: str) -> dict[str, Any]:
        """The options that are settings of ``stage``; those of `run` can be another stage's alone."""
        of_run = "columns" in self.options
        return {f.name: self.options[f.name] for f in dataclasses.fields(CONFIGS[stage]) if f.name in self.options
                and not (of_run and _OF_RUN.get(f.name, stage) != stage)}

    def settings(self, stage: str) -> Any:
        """The settings of ``stage``, as far as they are known before its model.

        Raises:
            UserError: settings that cannot be used.
        """
        return resolve(CONFIGS[stage], self.given(stage), self.file.get(stage)).config

    def open(self, stage: str, **settings: Any) -> Session:
        """The session of a stage; ``settings``, if there are any, in place of the command's options.

        Raises:
            UserError: see :func:`gemma_tune.run.session.open_session`.
        """
        from gemma_tune.run.session import open_session

        asked = settings or self.given(stage)
        if stage == "prepare":
            _require_data(resolve(CONFIGS[stage], asked, self.file.get(stage)).config)
        options = self.options
        session = open_session(stage, options.get("run"), model=options.get("model"), revision=options.get("revision"),
                               config=self.file, listener=console.ConsoleListener(options["quiet"]),
                               force=bool(options.get("force")), **asked)
        self.hint_at(session.run.root)
        return session

    def run(self, stage: str, work: Callable[[Session], Any], **settings: Any) -> Any:
        """Open the session, run the stage, and end its live display whatever happens."""
        session = self.open(stage, **settings)
        try:
            return work(session)
        finally:
            session.listener.close()


def _require_data(config: Any) -> None:
    """See :func:`gemma_tune.data.reading.sources.require_files`."""
    from gemma_tune.data.conversations.picture_files import require_folder
    from gemma_tune.data.reading.names import how_of
    from gemma_tune.data.reading.sources import require_files

    require_folder(config.pictures)
    require_files(config.data, [config.valid] if isinstance(config.valid, str) else (),
                  how_of(config))


def in_processes(request: Request) -> Request:
    """``train --num-processes N``: the same command as N processes, unless this is one of them.

    Returns:
        The request with as many processes as were launched.

    Raises:
        UserError: settings that cannot be used.
        typer.Exit: the processes have ended; with their exit code.
    """
    from gemma_tune.train.launch import launch
    from gemma_tune.train.report_to import require

    settings = request.settings("train")
    require(settings.report_to)  # before data is prepared, or processes are started
    wanted = settings.num_processes
    if not processes.joined():
        if request.options["num_processes"] is None and "num_processes" not in (request.file.get("train") or {}):
            wanted = _processes_before(request)
            if wanted > 1:
                console.ConsoleListener(request.options["quiet"]).note(
                    f"{wanted} processes on this machine, as many as before; --num-processes sets another number")
        if wanted > 1:
            raise typer.Exit(launch(wanted, request.arguments))
        return request
    there = processes.place().count
    if request.options["num_processes"] not in (None, there):
        raise UserError(f"--num-processes {wanted} was asked for, and {there} processes were launched",
                        "leave --num-processes out where accelerate launch or torchrun starts them")
    return request if wanted == there else request.but(num_processes=there)


def _processes_before(request: Request) -> int:
    """How many processes trained the run before, or began to; 1 where that is not known."""
    options = {name: request.options.get(name) or request.file.get(name) for name in ("run", "model")}
    if waiting := waiting_training(options):
        return waiting["settings"].get("num_processes", 1)
    with contextlib.suppress(UserError):
        manifest = current_manifest(find_run(options["run"], options["model"]))
        settings = manifest.stages.get("train", {"config": {}})["config"] if manifest else {}
        return settings.get("num_processes", {"value": 1})["value"]
    return 1


def waiting_training(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Marker of an interrupted training in the run that a command names; None also where there is no such run."""
    with contextlib.suppress(UserError):
        root = find_run(params.get("run"), params.get("model"))
        if manifest := current_manifest(root):
            return unfinished(RunDir(root, manifest.model_name).checkpoints, manifest.finished_trainings)
    return None


def finish(request: Request, report: Any, next_steps: tuple[str, ...] = (), others: Any = None,
           **extra: Any) -> None:
    """Show a stage's result to people, and as JSON to programs.

    Args:
        others: how other programs take an exported file, a :class:`gemma_tune.export.deploy.Elsewhere`.
        extra: further fields of the JSON.
    """
    console.stage_result(report, request.options["quiet"], next_steps, extra.get("advice"), others)
    if request.options["json"]:
        screen.result_json(as_json(report) | extra | {"next": list(next_steps), "warnings": list(screen.warnings)})


def as_json(report: Any) -> dict[str, Any]:
    """A stage's report for ``--json``."""
    return {"stage": report.stage, "status": report.status, "run": str(report.run), "summary": report.summary,
            "artifacts": report.artifacts}


def show_plan(request: Request, plan: Callable[[Session], Any]) -> None:
    """``train --dry-run``: the plan as a table, or as JSON.

    Raises:
        UserError: DATA was named, which would have to be prepared, and that writes.
    """
    if request.options["data"]:
        raise UserError("--dry-run plans the training of what is prepared, and prepares nothing itself",
                        f"prepare it first: gemma-tune prepare {shell.join(request.options['data'])}")
    planned, run = request.run("train", lambda session: (plan(session), session.run.root))
    if not (request.options["quiet"] and request.options["json"]):
        console.plan(planned)
    if request.options["json"]:
        screen.result_json({"stage": "train", "status": "planned", "run": str(run), **planned.as_json(),
                            "warnings": list(screen.warnings)})


def prepare_first(request: Request, go_on: bool) -> tuple[Request, dict[str, Any]]:
    """``train DATA``: prepare the data.

    Args:
        go_on: ``--continue``.

    Returns:
        The request for the run that the data belongs to, and what the command's own JSON says of the preparation.

    Raises:
        UserError: settings of either stage that cannot be used, and whatever ``prepare`` raises.
    """
    from gemma_tune.config.rewards import read
    from gemma_tune.prepare.stage import prepare
    from gemma_tune.rewards.program import refuse_missing

    refuse_missing(read(request.settings("train").reward))  # before the data is read, which can take long
    # Options of the same name, such as --seed, are about the training.
    report = request.run("prepare", lambda session: prepare(session, trains=True, go_on=go_on),
                         data=request.options["data"])
    console.stage_result(report, request.options["quiet"])
    return request.but(run=str(report.run)), {"prepare": as_json(report)}
