"""Results that a command made and was killed before it could record them: found, and taken up.

A stage announces the manifest that will name its result while all of it lies beside its place, whole and in sync
(``.next-manifest.json``). From then on nothing of it is lost: whoever owns the run's lock next finishes what was begun.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, put_in_place, remove
from gemma_tune.run.directory import NEXT_MANIFEST, RunDir, describe
from gemma_tune.run.manifest import Manifest, read_manifest


def current_manifest(root: Path) -> Manifest | None:
    """The run's manifest, or None where there is none yet.

    Where a result is in its place and its record is not, this is the manifest with that record.

    Raises:
        UserError: a manifest that cannot be read, is damaged, or was written by a newer version.
    """
    recorded = read_manifest(root)
    found = _announced(root, recorded)
    return found[0] if found and not _waiting(found[0], root, found[1]) else recorded


def take_up(root: Path) -> Sequence[str]:
    """Finish what a command that was killed had begun to put in place; only for the owner of the run's lock.

    Returns:
        The stages whose results were taken up.

    Raises:
        UserError: as :func:`current_manifest`. What was announced waits until that manifest is moved away.
    """
    found = _announced(root, read_manifest(root))
    if found is None:
        remove(root / NEXT_MANIFEST)
        return []
    manifest, stages = found
    for target in _waiting(manifest, root, stages):
        put_in_place(fresh_path(target), target)
    manifest.settle(RunDir(root, manifest.model_name))
    return stages


def _announced(root: Path, recorded: Manifest | None) -> tuple[Manifest, list[str]] | None:
    """The manifest that was announced, and the stages that it has other records of, if all their results are whole."""
    try:
        announced = read_manifest(root, NEXT_MANIFEST)
    except UserError:
        return None
    if announced is None:
        return None
    before: Mapping[str, Any] = recorded.stages if recorded else {}
    stages = [stage for stage, record in announced.stages.items() if record != before.get(stage)]
    run = RunDir(root, announced.model_name)
    whole = all(_is_there(run, item) for stage in stages for item in announced.stages[stage]["outputs"].values())
    return (announced, stages) if stages and whole else None


def _is_there(run: RunDir, item: Mapping[str, Any]) -> bool:
    """Whether an output is what its record says, in its place or beside it."""
    path = run.root / item["path"]
    target = _new_artifact(run.root, item["path"])
    lies_at = fresh_path(target) / path.relative_to(target) if target else path
    try:
        return describe(run, path, item, lies_at)["sha256"] == item["sha256"]
    except OSError:
        return False


def _waiting(manifest: Manifest, root: Path, stages: Sequence[str]) -> list[Path]:
    """Artifacts of these stages that lie beside their places."""
    found = [_new_artifact(root, item["path"]) for stage in stages
             for item in manifest.stages[stage]["outputs"].values()]
    return [*dict.fromkeys(target for target in found if target)]


def _new_artifact(root: Path, path: str) -> Path | None:
    """The artifact that an output is, or is a part of, if its successor lies beside it."""
    target = root
    for part in Path(path).parts:
        target /= part
        if fresh_path(target).exists():
            return target
    return None
