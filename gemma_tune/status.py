"""``status``: the manifest compared with what lies on the disk. Reads only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.checkpoints import whole
from gemma_tune.errors import UserError
from gemma_tune.run_dir import STAGES, RunDir, find_run, read_manifest
from gemma_tune.stage import State, state_of


@dataclass(frozen=True)
class RunStatus:
    """A run's stages: ``rows`` are (stage, state, ended, artifacts)."""

    root: Path
    model: str
    rows: list[tuple[str, str, str, str]]
    next_step: str

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"run": str(self.root), "model": self.model, "next": self.next_step,
                "stages": {stage: {"state": state, "ended": ended} for stage, state, ended, _ in self.rows}}


def describe_run(run: str | None, model_id: str | None) -> RunStatus:
    """State of every stage, and the next command.

    Raises:
        UserError: no run there, or a damaged manifest.
    """
    root = find_run(run, model_id)
    manifest = read_manifest(root)
    if manifest is None:
        raise UserError(f"{root} is not a run yet: it has no manifest.json",
                        f"start it: gemma-tune prepare YOUR.jsonl --run {root}")
    paths = RunDir(root, manifest.model_name)
    rows, next_step = [], f"gemma-tune chat --run {root}"
    for stage in reversed(STAGES):
        state = _interrupted(paths, manifest) if stage == "train" else None
        state = state or state_of(paths, manifest, stage)
        record = manifest.stages.get(stage, {})
        where = ", ".join(item["path"] for item in record.get("outputs", {}).values())
        shown = f"{state.status}: {state.reason}" if state.reason else state.status
        rows.append((stage, shown, record.get("ended", "")[:16].replace("T", " "), where))
        if state.status != "done":
            next_step = f"gemma-tune {stage} --run {root}"
    return RunStatus(root, manifest.model["id"], rows[::-1], next_step)


def _interrupted(run: RunDir, manifest: Any) -> State | None:
    """Checkpoints of a training that has no record yet."""
    checkpoints = whole(run.checkpoints)
    if "train" in manifest.stages or not checkpoints:
        return None
    return State("interrupted", f"{checkpoints[-1].name} is saved; the same train command goes on from there")
