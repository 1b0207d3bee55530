"""``status``: the manifest compared with what lies on the disk. Of a run that was copied it keeps the time stamps.

It answers at once for any size of model: what is large is not read, and where its time stamp alone is another one than
recorded, that is said instead.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.fingerprints import CHECKPOINT_FILES, fingerprint, size_and_stamp
from gemma_tune.base.listener import Listener
from gemma_tune.base.refusals import require_readable
from gemma_tune.cli.run_figures import BestSoFar, best_so_far, disk_usage, stage_lines
from gemma_tune.models.source import cached_copies
from gemma_tune.models.whole import refuse_damaged_copy
from gemma_tune.run.base_model import base_moved, refuse_other_id
from gemma_tune.run.directory import RunDir, command, describe, find_run, no_run
from gemma_tune.run.earlier_exports import gone, remark, summary_now
from gemma_tune.run.lock import Lock, finish_killed
from gemma_tune.run.manifest import STAGES, Manifest
from gemma_tune.run.prepared import NOTHING_HELD_OUT, nothing_held_out
from gemma_tune.run.state import OUTSIDE, Look, State, keep_stamps, state_of
from gemma_tune.run.stopped import has_other_rows, unfinished, whole
from gemma_tune.run.unrecorded import current_manifest
from gemma_tune.train.checkpoints import command_to_finish, command_to_start_anew
from gemma_tune.train.tuning import read_tuning

_LARGE = 64_000_000  # bytes from which on a file is not read for its time stamp alone


@dataclass(frozen=True)
class StageFigures:
    """What the manifest has of a stage: ``lines`` for people, ``summary`` for programs, bytes of its artifacts by path.
    """

    lines: list[str] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunStatus:
    """A run's stages: ``rows`` are (stage, state, ended, artifacts); ``earlier`` is what earlier exports left, and
    ``gone`` the format that was recommended of them and is gone, with the command that makes it again.

    ``next_step`` is a command; where none helps it is None, and ``note`` says what to do. ``base_damage`` is what is
    wrong with the base model in a cache, as far as that was looked for; ``figures`` are by stage; ``best`` is that of
    the recorded training, the lowest validation loss or the highest reward; ``size`` counts the bytes of the run
    directory; ``unread`` names large artifacts whose time stamps are others than recorded; ``unused`` has the sizes, in
    bytes, of copies of adapters that trainings started from and nothing refers to any more, by name, and
    ``unused_sight`` that of
    the file with which what an earlier export made saw, where nothing names it any more; ``seen`` counts the bytes of
    what was seen in pictures, which can be deleted at any time.
    """

    root: Path
    model: str
    rows: list[tuple[str, str, str, str]]
    next_step: str | None
    in_use_by: str | None = None
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    base_damage: UserError | None = None
    figures: Mapping[str, StageFigures] = field(default_factory=dict)
    best: BestSoFar | None = None
    size: int = 0
    unread: tuple[str, ...] = ()
    note: str | None = None
    gone: Mapping[str, str] = field(default_factory=dict)
    unused: Mapping[str, int] = field(default_factory=dict)
    unused_sight: Mapping[str, int] = field(default_factory=dict)
    seen: int = 0

    @property
    def damaged(self) -> bool:
        """Whether a stage's artifact or the base model is not what was recorded."""
        return self.base_damage is not None or any(state.startswith("damaged") for _, state, _, _ in self.rows)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"run": str(self.root), "model": self.model, "next": self.next_step, "note": self.note,
                "in_use_by": self.in_use_by,
                "earlier_exports": self.earlier, "gone_exports": self.gone,
                "base_damage": self.base_damage.message if self.base_damage else None,
                "best": {"step": self.best.step, f"eval_{self.best.what}": self.best.value} if self.best else None,
                "bytes": self.size, "unread": list(self.unread), "unused_adapters": self.unused,
                "unused_sight": self.unused_sight,
                "seen_bytes": self.seen,
                "stages": {stage: {"state": state, "ended": ended, "summary": self.figures[stage].summary,
                                   "bytes": sum(self.figures[stage].sizes.values()),
                                   "outputs": self.figures[stage].sizes} for stage, state, ended, _ in self.rows}}


def describe_run(run: str | None, model_id: str | None, verify: bool = False,
                 listener: Listener | None = None) -> RunStatus:
    """State of every stage, and the next command.

    Args:
        verify: read every file instead of comparing sizes and time stamps.
        listener: hears of a command that was killed, whose result is put in place and recorded now.

    What is large and has another time stamp, but the size that was recorded, as in a run that was copied, counts as the
    same without ``verify``; a stage that takes it reads it.

    Raises:
        UserError: no run there, or a damaged manifest.
    """
    root, manifest = _run_there(run, model_id, listener or Listener())
    paths = RunDir(root, manifest.model_name)
    unread: dict[str, None] = {}
    _notice_changed_base(root, manifest.model, verify, unread)
    look = _read_once() if verify else _read_small(unread)
    best, exported = _best(paths, manifest), summary_now(paths, manifest)
    earlier = exported.get("earlier", {})
    found = {stage: _stage(paths, manifest, stage, look) for stage in reversed(STAGES)}
    records = {stage: manifest.stages.get(stage, {}) for stage in STAGES}
    rows = [(stage, found[stage].shown, records[stage].get("ended", "")[:16].replace("T", " "),
             _where(paths, stage, records[stage], earlier)) for stage in STAGES]
    next_step, note = _next(paths, manifest, found)
    keep_stamps(paths, manifest)
    owner = Lock.owner_of(root)
    if owner:
        next_step, note = None, f"wait for {owner}"
    return RunStatus(
        root, manifest.model["id"], rows, next_step, owner, earlier,
        base_damage=_damage_in_cache(manifest.model) if verify else None,
        figures={stage: _figures(paths, stage, record | ({"summary": exported} if stage == "export-ollama" else {}),
                                 found[stage].state, best) for stage, record in records.items()},
        best=best, size=disk_usage(root), unread=tuple(unread), note=note, gone=gone(paths, manifest),
        unused={} if owner else _unused_adapters(paths, manifest),
        unused_sight={} if owner else _unused_sight(paths, manifest),
        seen=0 if owner or not paths.seen.is_dir() else disk_usage(paths.seen))


def _run_there(run: str | None, model_id: str | None, listener: Listener) -> tuple[Path, Manifest]:
    """The run that is named, or the only one there, with what it has recorded."""
    root = find_run(run, model_id)
    finish_killed(root, listener)
    manifest = current_manifest(root)
    if manifest is None:
        raise no_run(root, *(("--model", model_id) if model_id else ()))
    if run and model_id:
        refuse_other_id(root, manifest.model, model_id)
    return root, manifest


@dataclass(frozen=True)
class _Stage:
    """How a stage stands: with ``resume`` an interrupted training goes on; ``nothing_to_do`` says that an evaluation
    has nothing to measure on."""

    state: State
    resume: str | None = None
    nothing_to_do: bool = False

    @property
    def shown(self) -> str:
        return f"{self.state.status}: {self.state.reason}" if self.state.reason else self.state.status


def _stage(run: RunDir, manifest: Manifest, stage: str, look: Look) -> _Stage:
    if stage == "train" and (interrupted := _interrupted(run, manifest, look)):
        return interrupted
    state = state_of(run, manifest, stage, look)
    if stage == "eval" and state.status in ("missing", "stale") and nothing_held_out(manifest):
        return _Stage(State(state.status, f"{NOTHING_HELD_OUT}; `eval --data FILE` takes others"), nothing_to_do=True)
    return _Stage(state)


def _next(run: RunDir, manifest: Manifest, found: Mapping[str, _Stage]) -> tuple[str | None, str | None]:
    """The next command, or what to do where none helps."""
    # What was merged from an adapter that was trained elsewhere needs none of the stages before.
    outside = any(name.startswith(OUTSIDE) for name in manifest.stages.get("merge", {"inputs": {}})["inputs"])
    needed = STAGES[STAGES.index("merge"):] if outside and "train" not in manifest.stages else STAGES
    stage = next((stage for stage in needed if found[stage].state.status != "done" and not found[stage].nothing_to_do),
                 None)
    if stage is None:
        step = command("chat", run.root, *(["--merged"] if needed != STAGES else []))
    elif found[stage].resume:
        step = found[stage].resume
    elif note := _right_to_read(run.root, manifest.stages.get(stage, {})):
        return None, note
    else:
        step = command(stage, run.root, *_tuned(run, manifest, stage))
    if moved := base_moved(run.root, manifest.model):
        return None, f"{moved.message}; with its place: {step} --model DIR/{Path(manifest.model['path']).name}"
    return step, None


def _where(run: RunDir, stage: str, record: Mapping[str, Any], earlier: Mapping[str, Mapping[str, Any]]) -> str:
    """What a stage's result is made of."""
    where = ", ".join(item["path"] for item in record.get("outputs", {}).values())
    if stage == "train":
        where += _settings_files(run, record)
    if stage == "export-ollama":
        where += "".join(f"; from an earlier export: ollama/{item['file']}{' (stale)' if remark(item) else ''}"
                         for item in earlier.values())
    return where


def _best(run: RunDir, manifest: Manifest) -> BestSoFar | None:
    """That of the training that is recorded; of one that has not ended where there is none."""
    summary = manifest.stages.get("train", {"summary": {}})["summary"]
    shift = summary.get("counted_after") or 0  # of a training whose log has its own steps alone
    best = best_so_far(run.log_of(manifest.finished_training), (summary.get("steps") or math.inf) - shift)
    return best._replace(step=best.step + shift) if best else None


def _figures(run: RunDir, stage: str, record: Mapping[str, Any], state: State,
             best: BestSoFar | None) -> StageFigures:
    """For people and programs; ``best`` is of the recorded training."""
    summary = record.get("summary", {})
    lines = stage_lines(stage, summary)
    if stage == "train" and summary and best and best.step != summary.get("kept_step", best.step) and (
            best.value != summary.get(f"eval_{best.what}_after")):
        lines.append(f"{best.named}: {best.value:.3f} at step {best.step:,}")
    if state.status == "interrupted" and (so_far := best_so_far(run.metrics)):
        lines.append(f"{so_far.named} so far: {so_far.value:.3f} at step {so_far.step:,}")
    sizes = {item["path"]: item["bytes"] for item in record.get("outputs", {}).values()
             if isinstance(item.get("bytes"), int)}
    return StageFigures(lines, summary, sizes)


def _unused_adapters(run: RunDir, manifest: Manifest) -> dict[str, int]:
    """Copies of the run's adapters that trainings started from, of which no result and no interrupted training is made
    any more: name and size in bytes. They are somebody's to delete: what they learned is nowhere else.

    While a command works on the run, nobody knows: a training that has not saved yet is named by nothing.
    """
    waiting = unfinished(run.checkpoints, manifest.finished_trainings)
    named = {waiting["settings"].get("from_adapter")} if waiting else set()
    for record in manifest.stages.values():
        named |= {item["path"].split("/")[0] for item in record["inputs"].values()}
    return {copy.name: disk_usage(copy) for copy in (run.sft_adapter, *run.start_adapters())
            if copy.is_dir() and copy.name not in named}


def _unused_sight(run: RunDir, manifest: Manifest) -> dict[str, int]:
    """What an exported model saw with, by name and size in bytes, where neither the last export nor the Modelfile of an
    earlier one names it."""
    record = manifest.stages.get("export-ollama")
    if record is None or "projector" in record["outputs"] or not run.projector.is_file():
        return {}
    told = (path.read_text(encoding="utf-8", errors="replace") for path in run.ollama.glob("Modelfile*"))
    if any(f"FROM ./{run.projector.name}" in text.splitlines() for text in told):
        return {}
    return {run.relative(run.projector): run.projector.stat().st_size}


def _settings_files(run: RunDir, record: Mapping[str, Any]) -> str:
    """The files for ``--config`` that the record does not name: of a training that has not ended, and of `tune`."""
    named = [item["path"] for item in record.get("outputs", {}).values()]
    found = [path.name for path in (run.train_settings, run.tune_settings)
             if run.relative(path) not in named and path.is_file()]
    return ", ".join([*([""] if named and found else []), *found])


def _damage_in_cache(model: Mapping[str, Any]) -> UserError | None:
    try:
        for copy in cached_copies(model):
            refuse_damaged_copy(copy, weights=True)
    except UserError as e:
        return e
    return None


def _tuned(run: RunDir, manifest: Manifest, stage: str) -> tuple[str, ...]:
    """The settings for a training that `tune` found, where they are about what would be trained now, and no training
    has been made since, whose own settings are the next one's."""
    if stage != "train" or not run.tune_settings.is_file() or (tuning := read_tuning(run.tuning)) is None:
        return ()
    tokens = manifest.stages.get("prepare", {}).get("outputs", {}).get("tokens", {}).get("sha256")
    trained = manifest.stages.get("train", {}).get("started", "")
    fits = (tuning.base, tuning.tokens) == (manifest.model["fingerprint"], tokens) and trained < tuning.saved
    return ("--config", str(run.tune_settings)) if fits else ()


def _right_to_read(root: Path, record: Mapping[str, Any]) -> str | None:
    """What to do before anything else where a stage's result may not be read."""
    try:
        for item in record.get("outputs", {}).values():
            require_readable(root / item["path"])
    except UserError as e:
        return e.hint
    return None


def _read_small(unread: dict[str, None]) -> Look:
    """As ``describe``, but what is large is not read where its size is as recorded; ``unread`` gets its name."""
    def look(run: RunDir, path: Path, item: Mapping[str, Any]) -> dict[str, Any]:
        if _is_unread(path, item, (), path.name):
            unread[item["path"]] = None
            return dict(item)
        return describe(run, path, item)

    return look


def _is_unread(path: Path, item: Mapping[str, Any], patterns: tuple[str, ...], name: str | None = None) -> bool:
    """Whether only reading it would tell if something large is what ``item`` describes."""
    size, stamp = size_and_stamp(path, patterns, name)
    return stamp != item["stamp"] and size == item.get("bytes") and size > _LARGE


def _read_once() -> Look:
    """As ``describe``, but every file is read, and once: a stage is also looked at for each of those after it."""
    read = functools.cache(describe)
    return lambda run, path, item: read(run, path)


def _interrupted(run: RunDir, manifest: Manifest, look: Look) -> _Stage | None:
    """A training that was stopped after the last one that is recorded, and the command that finishes it, or starts anew
    where it cannot be finished."""
    marker = unfinished(run.checkpoints, manifest.finished_trainings)
    if marker is None:
        return None
    saved = f"{whole(run.checkpoints)[-1].name} is saved"
    if has_other_rows(run, manifest, marker, look):
        return _Stage(State("interrupted", f"{saved}, of other data than are prepared now: it cannot go on with these"),
                      command_to_start_anew(run, marker, manifest.kind))
    return _Stage(State("interrupted", saved), command_to_finish(run.checkpoints, marker["settings"], marker["asked"]))


def _notice_changed_base(root: Path, model: dict[str, Any], verify: bool, unread: dict[str, None]) -> None:
    """Take the base model's fingerprint as it is on the disk now, so that what was made from another one is stale."""
    path = root / model["path"] if model.get("path") else None
    if path is not None and os.path.exists(path):
        if not verify and model["files"] and _is_unread(path, model["files"], CHECKPOINT_FILES):
            unread[model["id"]] = None
            return
        model["files"] = fingerprint(path, None if verify else model["files"], CHECKPOINT_FILES)
        model["fingerprint"] = model["files"]["sha256"]
