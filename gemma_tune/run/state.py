"""What the manifest says of results, compared with what lies on the disk; and what a stage needs of those before it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import require_readable
from gemma_tune.run.directory import RunDir, command, describe
from gemma_tune.run.lock import Lock
from gemma_tune.run.manifest import STAGES, Manifest, read_manifest

# What a stage reads that another stage makes: input name -> (stage, its output).
NEEDS: dict[str, dict[str, tuple[str, str]]] = {
    "prepare": {},
    "train": {"train_rows": ("prepare", "train_rows"), "valid_rows": ("prepare", "valid_rows"),
              "tokens": ("prepare", "tokens")},
    "eval": {"valid_rows": ("prepare", "valid_rows"), "adapter": ("train", "adapter")},
    "merge": {"adapter": ("train", "adapter")},
    "export-ollama": {"merged": ("merge", "merged")},
}
OUTSIDE = "outside_"  # before the name of an input that comes from outside the run instead of from another stage

# Outputs that no stage reads and people work on: rejected rows are there to be repaired, settings to be changed.
FOR_PEOPLE = ("rejected_rows", "duplicate_rows", "data_report", "export_report", "training_settings")

# What is read of a result that no other stage is made from.
_READ_ALONE = {"eval": {"answers"}, "export-ollama": {"gguf"}}

Look = Callable[[RunDir, Path, Mapping[str, Any]], dict[str, Any]]  # what lies there, see ``run.directory.describe``


@dataclass(frozen=True)
class State:
    """A stage in the manifest: ``missing``, ``done``, ``stale`` (an input changed) or ``damaged``, and why."""

    status: str
    reason: str = ""


def state_of(run: RunDir, manifest: Manifest, stage: str, look: Look = describe, *, upstream: bool = True) -> State:
    """Compare what the manifest says of a stage with what lies on the disk.

    Args:
        upstream: a result is stale as well if one that it was made from is; else only if that is another one by now.
        look: what lies there now, from the run, the path and what the manifest says of it; as a rule a file is not read
            whose size and time stamp are as they were.
    """
    record = manifest.stages.get(stage)
    if record is None:
        return State("missing")
    if damage := _damage(run, stage, record["outputs"], look):
        return State("damaged", damage)
    if record["base"] != manifest.model["fingerprint"]:
        return State("stale", "the base model changed")
    for name, item in record["inputs"].items():
        maker = NEEDS[stage].get(name)
        if maker:
            current = manifest.stages.get(maker[0], {}).get("outputs", {}).get(maker[1])
            if current is None or current["sha256"] != item["sha256"]:
                return State("stale", f"`{maker[0]}` has run again with another result since")
            made_from = state_of(run, manifest, maker[0], look) if upstream else State("done")
            if made_from.status != "done":
                return State("stale", f"`{maker[0]}` is {made_from.status}: {made_from.reason}")
        elif os.path.exists(path := run.root / item["path"]) and (change := _change(run, path, item, look)):
            return State("stale", f"{path.name} {change}")
    if overtaken := _overtaken(manifest, stage):
        return State("stale", overtaken)
    return State("done")


def _overtaken(manifest: Manifest, stage: str) -> str | None:
    """Why a result about an adapter from elsewhere is not about the run's adapter any more: one that was trained here,
    or another one from elsewhere, was made or merged since; None where it still is."""
    record, trained, merged = (manifest.stages.get(name, {}) for name in (stage, "train", "merge"))
    if (own := record.get("inputs", {}).get(f"{OUTSIDE}adapter")) is None:
        return None
    if trained.get("ended", "") > record["ended"]:
        return "it is of an adapter from elsewhere, and the run has trained one of its own since"
    now = merged.get("inputs", {}).get(f"{OUTSIDE}adapter")
    return "`merge` has merged another adapter since" if now and now["sha256"] != own["sha256"] else None


def superseded(manifest: Manifest) -> list[str]:
    """Stages whose results are about an adapter or a merged model that another one has taken the place of since; by the
    manifest alone."""
    found: list[str] = []
    for stage in STAGES:
        if _overtaken(manifest, stage):
            found.append(stage)
        for name, item in manifest.stages.get(stage, {"inputs": {}})["inputs"].items():
            maker, output = NEEDS[stage].get(name, ("", ""))
            if maker not in ("train", "merge") or stage in found:
                continue
            made = manifest.stages.get(maker, {}).get("outputs", {}).get(output)
            if maker in found or made is None or made["sha256"] != item["sha256"]:
                found.append(stage)
    return found


def prepared_since(manifest: Manifest) -> bool:
    """Whether the data that lie there are others than the last training learned from; by the manifest alone."""
    learned = manifest.stages.get("train", {}).get("inputs", {})
    there = manifest.stages.get("prepare", {}).get("outputs", {})
    return bool(there) and any(name in learned and there.get(output, {}).get("sha256") != learned[name]["sha256"]
                               for name, (_, output) in NEEDS["train"].items())


def _damage(run: RunDir, stage: str, outputs: Mapping[str, Any], look: Look) -> str | None:
    read_by_others = {output for needs in NEEDS.values() for maker, output in needs.values() if maker == stage}
    if unnamed := sorted((read_by_others | _READ_ALONE.get(stage, set())) - outputs.keys()):
        return f"the manifest does not name its {', '.join(unnamed)}"
    for name, item in outputs.items():
        path = run.root / item["path"]
        if name in FOR_PEOPLE:
            continue
        if change := _change(run, path, item, look):
            return f"{item['path']} {change}"
    return None


def _change(run: RunDir, path: Path, item: dict[str, Any], look: Look) -> str | None:
    """What became of a file or directory that the manifest describes as ``item``; None if it is the same."""
    try:
        found = look(run, path, item)
    except FileNotFoundError:
        return "is gone"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    if found["sha256"] != item["sha256"]:
        return "was changed"
    item["stamp"] = found["stamp"]  # a copy has other time stamps; whoever saves the manifest keeps them
    return None


def require_inputs(run: RunDir, manifest: Manifest, stage: str, *without: str) -> dict[str, Path]:
    """Paths of the artifacts that ``stage`` reads, but for those in ``without``.

    Raises:
        UserError: one is missing or damaged; the hint is the command that makes it.
    """
    return {name: require_output(run, manifest, stage, maker, output)
            for name, (maker, output) in NEEDS[stage].items() if name not in without}


def require_output(run: RunDir, manifest: Manifest, stage: str, maker: str, output: str) -> Path:
    """Path of the artifact ``output`` of the stage ``maker``, for use in ``stage``; a stale one is good enough.

    Raises:
        UserError: it is missing, damaged, or was made from another base model; the hint is the command that makes it.
            Or it may not be read.
    """
    state = state_of(run, manifest, maker)
    make_it = command(maker, run.root)
    if state.status == "missing":
        named = command("prepare YOUR.jsonl", run.root) if maker == "prepare" else make_it  # not the example's
        raise UserError(f"`{stage}` needs what `{maker}` makes, and {run.root} does not have it yet",
                        f"run it first: {named}")
    if state.status == "damaged":
        for item in manifest.stages[maker]["outputs"].values():
            require_readable(run.root / item["path"])
        raise UserError(f"`{stage}` cannot use the result of `{maker}`: {state.reason}",
                        f"make it again: {make_it} --force")
    if maker != "prepare" and manifest.stages[maker]["base"] != manifest.model["fingerprint"]:
        raise UserError(f"the result of `{maker}` belongs to another base model than {manifest.model['id']} is now",
                        f"train for this one: {command('train', run.root, '--force')}")
    return run.root / manifest.stages[maker]["outputs"][output]["path"]


def require_unharmed(run: RunDir, manifest: Manifest, stage: str, maker: str, output: str) -> None:
    """Read the artifact ``output`` of the stage ``maker``, before ``stage`` makes something of it or gives it away.

    :func:`state_of` trusts sizes and time stamps, which bits that changed on the disk leave as they were.

    Raises:
        UserError: its content is another than ``maker`` made; the hint is the command that makes it again.
    """
    item = manifest.stages[maker]["outputs"][output]
    if change := _change(run, run.root / item["path"], item, lambda run, path, _: describe(run, path)):
        raise UserError(f"`{stage}` cannot use the result of `{maker}`: {item['path']} {change}",
                        f"make it again: {command(maker, run.root, '--force')}")


def keep_stamps(run: RunDir, manifest: Manifest) -> None:
    """Record the time stamps that files were found to have: a run that was copied is read whole only once.

    For commands that change nothing else. While another one works on the run, or where it cannot be written, nothing
    happens: the files are read again the next time.
    """
    found = dict(_stamped(manifest))
    with contextlib.suppress(UserError, OSError):
        if not _restamp(read_manifest(run.root), found):
            return
        with Lock(run.root, "status"):
            current = read_manifest(run.root)  # again: another command may have finished in between
            if _restamp(current, found):
                current.save(run)


def _restamp(manifest: Manifest | None, found: Mapping[tuple[str, ...], Mapping[str, Any]]) -> bool:
    """Give ``manifest`` the time stamps in ``found`` of what is the same otherwise; whether any is another."""
    changed = False
    for key, item in _stamped(manifest) if manifest else ():
        other = found.get(key, item)
        if other["sha256"] == item["sha256"] and other["stamp"] != item["stamp"]:
            item["stamp"], changed = other["stamp"], True
    return changed


def _stamped(manifest: Manifest) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Everything that the manifest has a time stamp of, by its place in it."""
    if manifest.model["files"]:
        yield ("model",), manifest.model["files"]
    for stage, record in manifest.stages.items():
        for part in ("inputs", "outputs"):
            yield from (((stage, part, name), item) for name, item in record[part].items())
