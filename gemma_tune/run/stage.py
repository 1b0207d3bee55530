"""What every stage shares: up to date or not, stale inputs, the record written last.

A stage is a function that gets a :class:`Session` and returns a :class:`Finished`. Whether it has to run at all is
decided here from the manifest: same inputs, same settings and an intact output mean that it is up to date.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, put_in_place, remove
from gemma_tune.base.secrets import redacted
from gemma_tune.config.settings import StageConfig, asks_more, plain, same_result, value_in_words
from gemma_tune.run.base_model import refuse_other_model
from gemma_tune.run.directory import RunDir, command, describe, now
from gemma_tune.run.lock import Lock
from gemma_tune.run.manifest import STAGES, Manifest, read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.state import NEEDS, OUTSIDE, require_inputs, require_unharmed, state_of


@dataclass(frozen=True)
class Finished:
    """What a stage made.

    Args:
        outputs: paths by name.
        summary: the figures worth keeping.
        fresh: of each artifact that is to be replaced, where its successor lies until it is recorded.
        settings: as the manifest has them, in place of what was asked for: those of earlier checks that still hold.
    """

    outputs: Mapping[str, Path]
    summary: dict[str, Any]
    fresh: Mapping[Path, Path] = field(default_factory=dict)
    settings: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def lies_at(self, path: Path) -> Path:
        """Where an output lies now."""
        return next((made / path.relative_to(target) for target, made in self.fresh.items()
                     if path.is_relative_to(target)), path)


@dataclass(frozen=True)
class StageReport:
    """The outcome for the caller: ``status`` is ``done`` or ``up-to-date``."""

    stage: str
    status: str
    run: Path
    summary: dict[str, Any]
    artifacts: dict[str, str]
    seconds: float


def run_stage(session: Session, stage: str, work: Callable[[Session], Finished],
              extra_inputs: Mapping[str, Path] | None = None,
              unfinished: Callable[[Manifest], bool] = lambda manifest: False,
              elsewhere: Mapping[str, Path] | None = None,
              long_work: Callable[[Mapping[str, Any]], str | None] = lambda summary: None,
              instead: str | None = None) -> StageReport:
    """Run one stage under the run's lock, unless its result is up to date, and record it.

    Args:
        work: does the work; what it makes takes its place when all of it is whole, and announced (``run.unrecorded``).
        extra_inputs: files from outside the run, fingerprinted like the others.
        elsewhere: inputs from outside the run, in place of what another stage makes under the same name.
        unfinished: whether an interrupted repetition of this stage waits to be finished, so that it is not up to date.
        long_work: from a result's figures, how long it took in words, if that is too long to replace it unasked.
        instead: a command that would go on from such a result.

    Raises:
        UserError: missing input, run in use, no permission, a result that is not replaced unasked; and whatever
            ``work`` raises; an input whose content changed, though size and time stamp did not.
    """
    assert stage in STAGES
    run = session.run
    with locked(session, stage), os_errors(run.root):
        # Read again under the lock: another command may have finished since the session was opened.
        manifest = read_manifest(run.root) or session.manifest
        refuse_other_model(run.root, manifest.model, session.model)
        # An updated record (same model, perhaps another place) replaces the one on the disk.
        moved = manifest.model != session.manifest.model
        manifest.model = session.manifest.model
        stamped = copy.deepcopy(manifest.stages)
        outside = dict(elsewhere or {})
        inputs = require_inputs(run, manifest, stage, *outside)
        session = replace(session, manifest=manifest, inputs=inputs | outside)
        _warn_of_stale_inputs(session, {maker for name, (maker, _) in NEEDS[stage].items() if name in inputs})
        named = {f"{OUTSIDE}{name}": path for name, path in outside.items()}
        fingerprints = _fingerprints(session, {**inputs, **named, **(extra_inputs or {})}, stage)
        if session.force:
            _note_other_settings(session, stage)
        elif not unfinished(manifest) and (kept := _up_to_date(session, stage, fingerprints, long_work, instead)):
            if moved or manifest.stages != stamped:
                manifest.save(run)
            return kept
        started, clock = now(), time.monotonic()
        for maker, output in (NEEDS[stage][name] for name in inputs):
            require_unharmed(run, manifest, stage, maker, output)
        finished = work(session)
        with nothing_left_of(finished):
            manifest.stages[stage] = _record(session, finished, started, fingerprints)
            manifest.announce(run)
        put_results(run, manifest, finished.fresh)
    return _report(session, stage, "done", time.monotonic() - clock)


def _record(session: Session, finished: Finished, started: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says of a result."""
    return {
        "status": "done", "started": started, "ended": now(), "base": session.model.fingerprint,
        "config": {**session.resolved.record(), **finished.settings}, "inputs": inputs,
        "outputs": {name: describe(session.run, path, lies_at=finished.lies_at(path))
                    for name, path in finished.outputs.items()},
        "summary": redacted(finished.summary),
    }


@contextlib.contextmanager
def locked(session: Session, stage: str) -> Iterator[None]:
    """Own the run's lock; what an earlier owner left unfinished is said.

    Raises:
        UserError: the run is in use, or cannot be written.
    """
    with Lock(session.run.root, stage) as lock:
        lock.tell(session.listener)
        yield


@contextlib.contextmanager
def nothing_left_of(finished: Finished) -> Iterator[None]:
    """Remove what was made if it cannot be recorded."""
    try:
        yield
    except BaseException:
        for made in finished.fresh.values():
            remove(made)
        raise


def put_results(run: RunDir, manifest: Manifest, fresh: Mapping[Path, Path]) -> None:
    """Let what was made take its place, and its record after it."""
    try:
        for target, made in fresh.items():
            put_in_place(made, target)
        manifest.settle(run)
    except OSError:
        if all(made.exists() for made in fresh.values()):  # nothing has changed yet
            for path in (run.next_manifest, *fresh.values()):
                remove(path)
            raise
        with os_errors(run.root, "the new result is whole, and the next command on this run records it"):
            raise


def _warn_of_stale_inputs(session: Session, makers: set[str]) -> None:
    for maker in makers:
        state = state_of(session.run, session.manifest, maker)
        if state.status == "stale":
            first = _first_stale(session.run, session.manifest, maker)
            session.listener.warn(f"the result of `{maker}` is stale ({state.reason}); to renew it"
                                  f"{', begin with' if first != maker else ''}: {command(first, session.run.root)}")


def _first_stale(run: RunDir, manifest: Manifest, stage: str) -> str:
    """Of a stage and those that it was made from the first one that has to run again."""
    made_from = {maker for name, (maker, _) in NEEDS[stage].items() if name in manifest.stages[stage]["inputs"]}
    earlier = [maker for maker in STAGES if maker in made_from
               and state_of(run, manifest, maker).status not in ("done", "missing")]
    return _first_stale(run, manifest, earlier[0]) if earlier else stage


def _fingerprints(session: Session, inputs: Mapping[str, Path], stage: str) -> dict[str, Any]:
    known = session.manifest.stages.get(stage, {"inputs": {}})["inputs"]
    return {name: describe(session.run, path, known.get(name)) for name, path in inputs.items()}


def _note_other_settings(session: Session, stage: str) -> None:
    record = session.manifest.stages.get(stage)
    if record and (changed := other_settings(record, session.config)):
        session.listener.note(f"`{stage}` runs with other settings than before: {'; '.join(changed)}")


def _up_to_date(session: Session, stage: str, inputs: Mapping[str, Any],
                long_work: Callable[[Mapping[str, Any]], str | None], instead: str | None) -> StageReport | None:
    record = session.manifest.stages.get(stage)
    if record is None:
        return None
    # What is stale before it was told already; of the same inputs comes the same result.
    state = state_of(session.run, session.manifest, stage, upstream=False)
    settings, others = other_settings(record, session.config), _other_files(record, inputs)
    if state.status == "done" and not settings and not others:
        session.listener.note(f"`{stage}` is up to date; --force runs it again")
        record["inputs"] = dict(inputs)  # with the time stamps that they have now
        return as_recorded(session, stage)
    changed = "; ".join([*settings, *(["other input files"] if others else [])])
    session.listener.note(f"`{stage}` runs again: {state.reason or changed}")
    # Made from other data, a result is replaced as it always is; only for its settings it need not be.
    if state.status == "done" and not others and (took := long_work(record["summary"])):
        _ask_to_replace(session, stage, took, changed, instead)
    return None


def _ask_to_replace(session: Session, stage: str, took: str, changed: str, instead: str | None) -> None:
    if not session.listener.confirm(f"the result of `{stage}` took {took}; replace it ({changed})?"):
        raise UserError(f"the result of `{stage}` took {took}, and is not replaced unasked by one with other settings "
                        f"({changed})", f"{f'go on from it: {instead}; or ' if instead else ''}add --force to replace "
                                      "it, or leave it and work on another run: --run DIR")


def settings_then(record: Mapping[str, Any], cls: type[StageConfig]) -> dict[str, Any]:
    """All settings that a result was made with, by name; one that the record does not have was at its default."""
    return {f.name: plain(f.default) for f in fields(cls)} | {
        name: entry["value"] for name, entry in record["config"].items()}


def other_settings(record: Mapping[str, Any], config: StageConfig) -> list[str]:
    """What a result was made with and is asked for otherwise now, as ``name: old -> new``."""
    old = settings_then(record, type(config))
    return [f"{name}: {value_in_words(old[name])} -> {value_in_words(value)}"
            for name, value in config.as_dict().items()
            if name not in same_result(type(config)) and old[name] != value
            and not (old[name] == "auto" and record["summary"].get(name) == value)  # which it came to
            and asks_more(type(config), name, old[name], value)]


def _other_files(record: Mapping[str, Any], inputs: Mapping[str, Any]) -> bool:
    return ({name: item["sha256"] for name, item in record["inputs"].items()}
            != {name: item["sha256"] for name, item in inputs.items()})


def as_recorded(session: Session, stage: str) -> StageReport:
    """The report of a result that is there."""
    return _report(session, stage, "up-to-date", 0.0)


def _report(session: Session, stage: str, status: str, seconds: float) -> StageReport:
    record = session.manifest.stages[stage]
    artifacts = {name: str(session.run.root / item["path"]) for name, item in record["outputs"].items()}
    return StageReport(stage, status, session.run.root, record["summary"], artifacts, seconds)
