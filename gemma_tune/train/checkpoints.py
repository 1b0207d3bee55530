"""Training checkpoints that can be trusted: a marker with hashes is written last; resuming takes the newest whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import follow_umask, remove, sha256_file, write_json
from gemma_tune.base.listener import Listener
from gemma_tune.config.settings import as_flags, same_result
from gemma_tune.config.stages import AUTO, TrainConfig
from gemma_tune.run.directory import RunDir, command, set_aside_in
from gemma_tune.run.stopped import MARKER, checkpoints_in, read_marker, step_of, whole
from gemma_tune.train.method import learns_from

BEST = "best.safetensors"  # beside the checkpoints, see train/best.py
KEEP = TrainConfig.keep_checkpoints
# Settings that change how a training is computed, not what is learned; dtype's is kept with the training.
_WAYS = ("dtype", *same_result(TrainConfig))


@dataclass(frozen=True)
class Training:
    """One training, however often it is interrupted.

    Args:
        id: a random name; the manifest keeps that of the training that finished last, and its ``earlier``.
        key: hex digest of what its result depends on, see :func:`training_key`.
        settings: of ``train``, for the command that finishes it.
        compute: device and type, such as ``cpu bf16``.
        micro_batch: conversations that go through the model at once; 0 where nobody has chosen yet. Sums in another
            order are rounded differently, so a resumed training keeps it.
        earlier: ids of the finished trainings that it goes on from.
        steps_before: steps of theirs that its own are counted after: none where it has their checkpoint, all where it
            has only their adapter.
        rows: fingerprint of the sequences that it learns from, see ``stopped.rows_of``.
        before: of the finished trainings that it goes on from: ``steps``; and where its own are counted after theirs,
            the other figures that are of all steps.
        asked: settings that somebody gave; the others follow from data, model and machine, and what finishes it leaves
            them to these.
    """

    id: str
    key: str
    settings: Mapping[str, Any]
    compute: str
    micro_batch: int = 0
    earlier: tuple[str, ...] = ()
    steps_before: int = 0
    rows: str = ""
    before: Mapping[str, Any] = field(default_factory=dict)
    asked: tuple[str, ...] = ()

    @classmethod
    def of(cls, marker: Mapping[str, Any], key: str, settings: Mapping[str, Any]) -> Training:
        """The one whose checkpoint has this marker, as it goes on."""
        return cls(marker["id"], key, settings, marker["compute"], marker["micro_batch"], tuple(marker["earlier"]),
                   marker["steps_before"], marker["rows"], marker["before"])

    def of_all_steps(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """A summary's figures of its own steps as those of all, and what the manifest keeps of a training that goes on
        from finished ones."""
        if not self.earlier:
            return dict(summary)
        before, shift = self.before, self.steps_before
        steps = {name: summary[name] + shift for name in ("steps", "kept_step", "resumed_from_step")}
        sums = {name: round(summary[name] + (before.get(name) or 0), 1) for name in ("tokens", "training_seconds")}
        firsts = ("eval_loss_before", "eval_reward_before", "train_loss_first", "train_reward_first")
        first = {name: before[name] for name in firsts if before.get(name) is not None}
        speed = {"tokens_per_second": round(sums["tokens"] / sums["training_seconds"], 1)
                 } if before.get("training_seconds") and before.get("tokens") else {}
        return {**summary, **steps, **sums, **first, **speed, "earlier_trainings": [*self.earlier],
                "steps_before": before.get("steps", shift), "counted_after": shift}


def training_key(base: str, rows: str, template: str, settings: Mapping[str, Any], start: str | None) -> str:
    """What a checkpoint depends on: base model, training rows, chat template and settings, as one hex digest.

    And on the content of the adapter that it starts from, ``start``, if there is one.

    Not on ``dtype``: with ``auto`` a probe decides, and a resumed training stays with what was chosen first. Not on how
    a batch is worked on either, so that a training that ran out of memory can go on in smaller pieces.
    """
    kept = {name: value for name, value in settings.items() if name not in _WAYS}
    parts = {"base": base, "rows": rows, "template": template, "settings": kept} | ({"start": start} if start else {})
    content = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def seal(checkpoint: Path, training: Training) -> None:
    """Declare a checkpoint whole. The pickled trainer arguments go: nothing reads them, and pickles can run code."""
    (checkpoint / "training_args.bin").unlink(missing_ok=True)
    follow_umask(checkpoint)
    hashes = {p.name: sha256_file(p) for p in sorted(checkpoint.iterdir()) if p.is_file() and p.name != MARKER}
    write_json(checkpoint / MARKER, {**asdict(training), "files": hashes})


def rotate(folder: Path, keep: int = KEEP, best: int | None = None) -> None:
    """Delete all but the newest whole checkpoints; called after a new one has been sealed.

    Args:
        keep: how many stay.
        best: the step whose checkpoint, if there is one, stays in the place of the oldest of them; but the newest does
            in any case.
    """
    found = whole(folder)
    kept = found[-keep:]
    if keep > 1 and (spared := [p for p in found if step_of(p) == best and p not in kept]):
        kept = [*spared, *kept[1:]]
    for old in found:
        if old not in kept:
            shutil.rmtree(old, ignore_errors=True)


def find_resumable(folder: Path, key: str, finished: Collection[str], settings: Mapping[str, Any],
                   listener: Listener, otherwise: str = "the training starts anew") -> Path | None:
    """The checkpoint that an interrupted training goes on from, or None to start anew.

    Damaged checkpoints are passed over in favour of an older whole one.

    Args:
        finished: ids of trainings that the manifest records as done; their checkpoints are not resumed.
        listener: is warned of damaged checkpoints, and of what follows from them.
        otherwise: what follows where none is whole.

    Raises:
        UserError: an interrupted training with other settings or data is there.
    """
    others, damaged, found = [], [], None
    for checkpoint in reversed(checkpoints_in(folder)):
        marker = read_marker(checkpoint)
        if marker and marker["id"] in finished:
            continue
        if marker and marker["key"] != key:
            others.append(marker)
        elif damage := _damage(checkpoint, marker):
            damaged.append(f"{checkpoint.name}: {damage}")
        else:
            found = checkpoint
            break
    if damaged and (found or not others):
        listener.warn(f"damaged checkpoints are passed over ({'; '.join(damaged)}): "
                      + (f"the training goes on from {found.name}" if found else otherwise))
    if others and not found:
        before = others[0]["settings"]
        changed = "; ".join(difference(before, settings))
        finish = (f"finish it: {command_to_finish(folder, before, others[0]['asked'])}, or start anew with --force"
                  if changed else "prepare the data as it was before to finish it, or start anew with --force")
        raise UserError(f"{folder} holds an interrupted training with other settings or data "
                        f"({changed or 'the data, the base model or gemma-tune changed'})", finish)
    return found


def last_of(folder: Path, trainings: Collection[str], listener: Listener) -> Path | None:
    """The newest whole checkpoint of these trainings; None where there is none any more. Damaged ones are told of."""
    aside = [path for place in set_aside_in(folder) for path in whole(place)]
    for checkpoint in sorted([*whole(folder), *aside], key=step_of, reverse=True):
        marker = read_marker(checkpoint)
        if marker is None or marker["id"] not in trainings:
            continue
        if not (damage := _damage(checkpoint, marker)):
            return checkpoint
        listener.warn(f"a damaged checkpoint is passed over ({checkpoint.name}: {damage})")
    return None


def _damage(checkpoint: Path, marker: Mapping[str, Any] | None) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    if marker is None:
        return f"{MARKER} cannot be read" if (checkpoint / MARKER).exists() else "it was not saved to its end"
    for name, sha in marker["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is gone"
        if sha256_file(checkpoint / name) != sha:
            return f"{name} was changed"
    return None


def command_to_finish(folder: Path, settings: Mapping[str, Any], asked: Collection[str]) -> str:
    """The command line of an interrupted training, whose checkpoints lie in ``folder``.

    Args:
        asked: see :class:`Training`. A setting that is named here counts as given from then on, also for other data.
    """
    settings = {name: value for name, value in settings.items() if name in asked}
    if start := settings.get("from_adapter"):
        settings = {**settings, "from_adapter": RunDir(folder.parent, "").found(start)}
    return command("train", folder.parent, *as_flags(TrainConfig, settings))


def command_to_start_anew(run: RunDir, marker: Mapping[str, Any], kind: str) -> str:
    """The command line that trains on the data of now, of this kind, with an interrupted training's settings as far as
    its method can learn from them."""
    if not learns_from(marker["settings"].get("method", AUTO), kind):
        return command("train", run.root, "--force")
    return f"{command_to_finish(run.checkpoints, marker['settings'], marker['asked'])} --force"


def learned_from_other_rows(run: RunDir, marker: Mapping[str, Any], kind: str) -> UserError:
    """What to say to a training that should go on where the data changed."""
    return UserError(f"{run.checkpoints} holds an interrupted training on other data than are prepared now: it cannot "
                     "go on with these", "prepare the data as it was before to finish it, or start anew: "
                                         + command_to_start_anew(run, marker, kind))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], but: Collection[str] = ()) -> list[str]:
    """Settings of two trainings that make what they learn differ, without those named in ``but``."""
    return [f"{name}: {old[name]} then, {new.get(name)} now" for name in old
            if name not in _WAYS and name not in but and old[name] != new.get(name)]


def clear(folder: Path, after: Path | None = None) -> None:
    """Remove all checkpoints, whole or not; or those that are newer than ``after``, which a training goes on from.

    Such are damaged: they would be kept in place of whole ones, and PEFT would read the card of one when it saves the
    same step again. With all of them goes the best adapter that they had.
    """
    if after is None:
        remove(folder / BEST)
    for checkpoint in folder.glob("checkpoint-*") if after is None else checkpoints_in(folder):
        if after is None or step_of(checkpoint) > step_of(after):
            remove(checkpoint)
