"""The run directory: where each artifact lies, and ``manifest.json``, the contract between the stages.

The manifest is written last and atomically, so whatever it names is whole. It holds no absolute path and no token,
and a run can be moved.
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.errors import UserError
from gemma_tune.files import fingerprint, os_errors, recover, write_json

SCHEMA = 1
RUNS = Path("runs")
STAGES = ("prepare", "train", "eval", "merge", "export-ollama")
# The libraries that decide what a stage computes.
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "safetensors", "gguf")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. All names follow the model's name."""

    root: Path
    model_name: str

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def train_rows(self) -> Path:
        return self.data / "train.jsonl"

    @property
    def valid_rows(self) -> Path:
        return self.data / "valid.jsonl"

    @property
    def rejected_rows(self) -> Path:
        return self.data / "rejected.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "training_checkpoints"

    @property
    def adapter(self) -> Path:
        return self.root / f"{self.model_name}_lora_adapter"

    @property
    def merged(self) -> Path:
        return self.root / f"{self.model_name}_lora_merged"

    @property
    def ollama(self) -> Path:
        return self.root / "ollama"

    @property
    def metrics(self) -> Path:
        return self.root / "logs" / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.root / "logs" / "loss.png"

    @property
    def report(self) -> Path:
        return self.root / "report.md"

    def relative(self, path: Path) -> str:
        """``path`` as the manifest keeps it: relative to the run, with forward slashes; our own data by name."""
        package = Path(__file__).parent
        if path.is_relative_to(package):
            return f"gemma_tune:{path.relative_to(package).as_posix()}"
        return Path(os.path.relpath(path.absolute(), self.root.absolute())).as_posix()


@dataclass
class Manifest:
    """What ``manifest.json`` holds; see ``manifest_schema.json`` for its exact form."""

    model: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        return self.model["name"]

    def save(self, run: RunDir) -> None:
        """Write the manifest atomically."""
        with os_errors(run.root):
            write_json(run.manifest, {"schema": SCHEMA, "gemma_tune": __version__, "model": self.model,
                                      "stages": self.stages, "libraries": library_versions()})


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that decide what a stage computes."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def model_name(model_id: str) -> str:
    """The name that paths follow: the last part of a hub id, a directory or a .gguf file.

    >>> model_name("google/gemma-3-270m-it")
    'gemma-3-270m-it'
    """
    last = re.split(r"[/\\]", model_id.rstrip("/\\"))[-1]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last.removesuffix(".gguf")).strip("-.")
    if not name:
        raise UserError(f"{model_id!r} has no name to call the run after", "name a model such as "
                                                                           "google/gemma-3-270m-it with --model")
    return name


def find_run(run: str | None, model_id: str | None) -> Path:
    """The run that a command works on: --run, else runs/<name of --model>, else the newest run.

    Raises:
        UserError: if nothing is named and there is no run yet.
    """
    if run:
        return Path(run)
    if model_id:
        return RUNS / model_name(model_id)
    runs = sorted(RUNS.glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run under {RUNS}/ yet", "start one: gemma-tune prepare YOUR.jsonl "
                                                              "--model google/gemma-3-270m-it")
    return runs[-1].parent


def read_manifest(root: Path) -> Manifest | None:
    """The run's manifest, or None where there is none yet.

    Raises:
        UserError: a manifest that cannot be read, is damaged, or was written by a newer version.
    """
    path = root / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except NotADirectoryError as e:
        raise UserError(f"{root} is not a directory", "name a run directory with --run DIR") from e
    except PermissionError as e:
        raise UserError(f"no permission to read {path}", "change its permissions, or use another --run DIR") from e
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        line = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line} is damaged: {e.__class__.__name__}", _rebuild_hint(path)) from e
    if not isinstance(content, dict) or not isinstance(content.get("schema"), int):
        raise UserError(f"{path} is damaged: it has no schema number", _rebuild_hint(path))
    if content["schema"] > SCHEMA:
        raise UserError(f"{path} has schema {content['schema']}; this gemma-tune {__version__} knows {SCHEMA}",
                        "upgrade: pip install -U gemma-tune, or start another run with --run DIR")
    problems = list(_problems(content))
    if problems:
        raise UserError(f"{path} is damaged", _rebuild_hint(path), problems)
    return Manifest(content["model"], content["stages"])


def _rebuild_hint(path: Path) -> str:
    return (f"move it away (mv {path} {path}.damaged) and run the stages again from `gemma-tune prepare`; "
            "the artifacts beside it are untouched")


def _problems(content: Mapping[str, Any]):
    model = content.get("model")
    if not isinstance(model, dict) or not all(isinstance(model.get(k), str) for k in ("id", "name", "source")):
        yield "model: id, name or source is missing"
    elif model_name(model["name"]) != model["name"]:
        yield f"model: name {model['name']!r} is not one that gemma-tune gives"
    stages = content.get("stages")
    if not isinstance(stages, dict):
        yield "stages: missing"
        return
    for name, stage in stages.items():
        if not isinstance(stage, dict) or not all(
                isinstance(stage.get(k), dict) for k in ("config", "inputs", "outputs", "summary")):
            yield f"stages.{name}: config, inputs, outputs or summary is missing"
            continue
        for part in ("inputs", "outputs"):
            for key, item in stage[part].items():
                if not isinstance(item, dict) or not all(isinstance(item.get(k), str) for k in ("path", "sha256")):
                    yield f"stages.{name}.{part}.{key}: path or sha256 is missing"
                elif part == "outputs" and not _stays_inside(item["path"]):
                    yield f"stages.{name}.{part}.{key}: {item['path']} leaves the run directory"


def _stays_inside(path: str) -> bool:
    """Whether a recorded artifact path stays inside the run; a manifest from elsewhere must not point outside."""
    return not os.path.isabs(path) and ".." not in Path(path).parts


def now() -> str:
    """Current time, UTC, ISO 8601 with seconds."""
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")


class Lock:
    """One writer at a time. The operating system drops the lock with its owner, so a dead owner's is taken over."""

    def __init__(self, root: Path, stage: str):
        self.root, self.stage = root, stage
        self.owner = root / ".lock-owner.json"

    def __enter__(self) -> Lock:
        from filelock import FileLock, Timeout

        with os_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.root / ".lock", timeout=0)
            try:
                self._lock.acquire()
            except Timeout as e:
                raise UserError(f"{self.root} is in use by {self._describe_owner()}",
                                "wait until it has finished, or work on another run with --run DIR") from e
            try:
                write_json(self.owner, {"pid": os.getpid(), "stage": self.stage, "since": now()})
                self.restored = recover(self.root)
            except BaseException:
                self._lock.release()
                raise
        return self

    def _describe_owner(self) -> str:
        try:
            owner = json.loads(self.owner.read_text())
            return f"process {owner['pid']} ({owner['stage']}, since {owner['since']})"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def __exit__(self, *_: object) -> None:
        self.owner.unlink(missing_ok=True)
        self._lock.release()


def describe(run: RunDir, path: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Path and fingerprint of an input or output, as the manifest keeps it."""
    return {"path": run.relative(path), **fingerprint(path, dict(known) if known else None)}
