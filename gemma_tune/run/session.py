"""A run opened for one stage: its model, its settings, its record; without a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.base.listener import Listener
from gemma_tune.config.settings import Resolved
from gemma_tune.models.source import BaseModel
from gemma_tune.run.directory import RunDir
from gemma_tune.run.manifest import Manifest


@dataclass(frozen=True)
class Session:
    """Everything a stage works with: the run, the base model, its settings, the inputs and the listener."""

    run: RunDir
    model: BaseModel
    resolved: Resolved
    listener: Listener
    manifest: Manifest
    inputs: Mapping[str, Path] = field(default_factory=dict)
    force: bool = False

    @property
    def config(self) -> Any:
        """The stage's settings."""
        return self.resolved.config

    def settings_of(self, stage: str) -> dict[str, Any]:
        """Recorded settings of an earlier stage by name, without their origins."""
        record = self.manifest.stages.get(stage, {"config": {}})
        return {name: entry["value"] for name, entry in record["config"].items()}
