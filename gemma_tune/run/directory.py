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
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gemma_tune import __version__
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import PACKAGE, fingerprint, os_errors, recover, write_json

SCHEMA = 1
RUNS = Path("runs")
STAGES = ("prepare", "train", "eval", "merge", "export-ollama")
# The libraries that decide what a stage computes.
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "jinja2", "safetensors",
             "gguf")
_UNSAFE = r"[^A-Za-z0-9._-]+"  # what a name in paths must not contain
_DIGESTS = ("sha256", "stamp")


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
    def refused_rows(self) -> Path:
        """Bad rows of a preparation that failed; those of one that succeeded are in the data directory."""
        return self.root / "rejected.jsonl"

    @property
    def duplicate_rows(self) -> Path:
        return self.data / "duplicates.jsonl"

    @property
    def data_report(self) -> Path:
        return self.data / "report.json"

    @property
    def tokens(self) -> Path:
        """Directory of the token sequences, see ``data.tokens``."""
        return self.data / "tokens"

    @property
    def inputs(self) -> Path:
        """What was read from standard input, and the commits of hub datasets."""
        return self.root / "inputs"

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
        if path.is_relative_to(PACKAGE):
            return f"gemma_tune:{path.relative_to(PACKAGE).as_posix()}"
        here, root = path.absolute(), self.root.absolute()
        if not here.is_relative_to(root):
            # A `..` after a symbolic link leads to the parent of what it points to, so both must be real paths.
            here, root = path.resolve(), self.root.resolve()
        return Path(os.path.relpath(here, root)).as_posix()

    def found(self, name: str) -> str:
        """What :meth:`relative` made of a path, as one names it from the current directory; ``hf:`` names stay."""
        if name.startswith("gemma_tune:"):
            return f"{PACKAGE / name.removeprefix('gemma_tune:')}"
        return name if name.startswith("hf:") else os.path.relpath(os.path.normpath(self.root.resolve() / name))


@dataclass
class Manifest:
    """What ``manifest.json`` holds; ``tests/manifest.schema.json`` is its exact form."""

    model: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        return self.model["name"]

    @property
    def finished_training(self) -> str | None:
        """Id of the training that finished last, see ``checkpoints.Training``."""
        return self.stages.get("train", {"summary": {}})["summary"].get("training_id")

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
    name = re.sub(_UNSAFE, "-", last.removesuffix(".gguf")).strip("-.")
    if not name:
        raise UserError(f"{model_id!r} has no name to call the run after: it needs letters or digits of ASCII",
                        "rename it, or name a model such as google/gemma-3-270m-it with --model")
    return name


def find_run(run: str | None, model_id: str | None) -> Path:
    """The run that a command works on: --run, else runs/<name of --model>, else the newest run.

    Raises:
        UserError: if nothing is named and there is no run yet.
    """
    if run:
        return Path(os.path.expanduser(run))
    if model_id:
        directory = Path(os.path.expanduser(model_id))
        # A directory is called by its real name, so that `--model .` works.
        return RUNS / model_name(directory.resolve().name if directory.is_dir() else model_id)
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
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "name a run directory with --run DIR") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno} is damaged: {e.msg} at column {e.colno}", _rebuild_hint(path)) from e
    except (ValueError, RecursionError) as e:  # not UTF-8, a number without end, brackets without end
        raise UserError(f"{path} is damaged: it is not JSON as gemma-tune writes it", _rebuild_hint(path)) from e
    schema = content.get("schema") if isinstance(content, dict) else None
    if type(schema) is not int or schema < 1:
        raise UserError(f"{path} is damaged: it has no schema number", _rebuild_hint(path))
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}; this gemma-tune {__version__} knows {SCHEMA}",
                        "upgrade gemma-tune, or start another run with --run DIR")
    problems = list(_problems(content))
    if problems:
        raise UserError(f"{path} is damaged", _rebuild_hint(path), problems)
    return Manifest(content["model"], content["stages"])


def _rebuild_hint(path: Path) -> str:
    return (f"move it away (mv {path} {path}.damaged) and run the stages again from `gemma-tune prepare`; "
            "the artifacts beside it are untouched")


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What the code relies on and ``content`` does not have."""
    yield from _model_problems(content.get("model"))
    stages = content.get("stages")
    if not isinstance(stages, dict):
        yield "stages: missing"
        return
    for name, stage in stages.items():
        if name not in STAGES:
            yield f"stages.{name}: there is no such stage"
        elif not isinstance(stage, dict) or not _has(stage, dict, "config", "inputs", "outputs", "summary"):
            yield f"stages.{name}: config, inputs, outputs or summary is missing"
        elif not _has(stage, str, "base", "started", "ended"):
            yield f"stages.{name}: base, started or ended is missing"
        else:
            yield from (f"stages.{name}.{problem}" for problem in _stage_problems(stage))


def _model_problems(model: Any) -> Iterator[str]:
    if not isinstance(model, dict) or not _has(model, str, "id", "name", "source", "fingerprint"):
        yield "model: id, name, source or fingerprint is missing"
    elif re.sub(_UNSAFE, "-", model["name"]).strip("-.") != model["name"] or not model["name"]:
        yield f"model: name {model['name']!r} is not one that gemma-tune gives"
    elif not isinstance(model.get("files"), dict) or model["files"] and not _has(model["files"], str, *_DIGESTS):
        yield "model: files has no sha256 or no stamp"
    elif not all(isinstance(model.get(key, False), str | None) for key in ("revision", "path")):
        yield "model: revision or path is missing"


def _stage_problems(stage: Mapping[str, Any]) -> Iterator[str]:
    for key, entry in stage["config"].items():
        if not isinstance(entry, dict) or "value" not in entry:
            yield f"config.{key}: value is missing"
    for part in ("inputs", "outputs"):
        for key, item in stage[part].items():
            if not isinstance(item, dict) or not _has(item, str, "path", *_DIGESTS):
                yield f"{part}.{key}: path, sha256 or stamp is missing"
            elif part == "outputs" and not _stays_inside(item["path"]):
                yield f"{part}.{key}: {item['path']} leaves the run directory"


def _has(record: Mapping[str, Any], kind: type, *keys: str) -> bool:
    return all(isinstance(record.get(key), kind) for key in keys)


def _stays_inside(path: str) -> bool:
    """Whether a recorded artifact path stays inside the run; a manifest from elsewhere must not point outside."""
    forms = PurePosixPath(path), PureWindowsPath(path)
    return all(form.parts and not form.anchor and ".." not in form.parts for form in forms)


def command(stage: str, root: Path, *flags: str) -> str:
    """A command to type, with whatever a shell would split put in quotes."""
    return " ".join(["gemma-tune", stage, "--run", shlex.quote(str(root)), *map(shlex.quote, flags)])


def now() -> str:
    """Current time, UTC, ISO 8601 with seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


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
                self.restored = recover(self.root, RunDir(self.root, "").ollama)
            except BaseException:
                self._lock.release()
                raise
        return self

    @classmethod
    def owner_of(cls, root: Path) -> str | None:
        """Who works on the run at ``root`` now, or None."""
        try:
            pid = json.loads((root / ".lock-owner.json").read_text())["pid"]
            if os.name == "posix":  # elsewhere there is no harmless signal to ask with
                os.kill(pid, 0)
        except PermissionError:
            pass  # alive, and somebody else's
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(root, "")._describe_owner()

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
