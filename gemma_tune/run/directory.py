"""The run directory: where each artifact lies. All names follow the model's name."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import PACKAGE, seen_from
from gemma_tune.base.fingerprints import fingerprint
from gemma_tune.base.words import model_name, nearest

RUNS = Path("runs")
NEXT_MANIFEST = ".next-manifest.json"
PICTURES = "pictures"  # the directory in data/, and the beginning of their names in its rows
_FINISHED = "finished-"  # before a training's id, see RunDir.finished
# What commands make in a run directory, its ollama/ and its inputs/: patterns of names, as the lock knows no model's.
MADE = ("manifest.json", NEXT_MANIFEST, ".lock-owner.json", "data", "*_lora_adapter", "*_lora_adapter_worse",
        "*_sft_adapter", "*_start_adapter_*", "*_lora_merged", "adapter-*", "report.md", "report.html", "answers.json",
        "train.yaml", "tune.yaml", "tune.json", "seen", "evaluated")
MADE_FOR_OLLAMA = ("*.gguf*", "Modelfile*", "report.md", "*_lora_merged")
PIPED = ("stdin*",)


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. All names follow the model's name."""

    root: Path
    model_name: str

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def next_manifest(self) -> Path:
        """What the manifest will be when the results that it names have taken their place."""
        return self.root / NEXT_MANIFEST

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
    def chat_template(self) -> Path:
        """The chat template that the data was prepared with, where one was named."""
        return self.data / "chat_template.jinja"

    @property
    def tokens(self) -> Path:
        """Directory of the token sequences, see ``encoding.tokens``."""
        return self.data / "tokens"

    @property
    def pictures(self) -> Path:
        """The pictures that the rows name, each as ``<sha256 of its bytes>.<ending>``; only there where they name
        some."""
        return self.data / PICTURES

    @property
    def picture_files(self) -> Path:
        """Where the rows' pictures were looked for, see ``run.pictures``."""
        return self.data / "picture_files.json"

    @property
    def seen(self) -> Path:
        """What the model saw in these pictures, see ``answers.sight``. It can be deleted at any time: a training
        looks at them again."""
        return self.root / "seen"

    @property
    def evaluated(self) -> Path:
        """Of the rows that ``eval --data`` names: a directory of the pictures that were asked about, and where all were
        looked for, named as in ``data/``; only there where they name or hold some."""
        return self.root / "evaluated"

    @property
    def inputs(self) -> Path:
        """What was read from standard input, and the commits of hub datasets."""
        return self.root / "inputs"

    @property
    def checkpoints(self) -> Path:
        return self.root / "training_checkpoints"

    def finished(self, training: str | None) -> Path | None:
        """Where checkpoint and logs of the finished training with this id lie while another one takes its place; None
        without an id."""
        return self.checkpoints / f"{_FINISHED}{training}" if training and training.isalnum() else None

    def log_of(self, training: str | None) -> Path:
        """The log of the finished training with this id."""
        aside = self.finished(training)
        return log if aside and (log := aside / self.metrics.name).is_file() else self.metrics

    @property
    def adapter(self) -> Path:
        return self.root / f"{self.model_name}_lora_adapter"

    @property
    def worse_adapter(self) -> Path:
        """The adapter of a training that raised the loss; no stage reads it."""
        return self.root / f"{self.model_name}_lora_adapter_worse"

    @property
    def sft_adapter(self) -> Path:
        """The adapter that a preference training went on from, which was the run's before."""
        return self.root / f"{self.model_name}_sft_adapter"

    def start_adapter(self, content: str) -> Path:
        """A copy of an adapter of the run that a training went on from and replaced; ``content`` is its sha256."""
        return self.root / f"{self.model_name}_start_adapter_{content[:12]}"

    def start_adapters(self) -> list[Path]:
        """All such copies."""
        return sorted(self.root.glob(f"{self.model_name}_start_adapter_*"))

    @property
    def reference(self) -> Path:
        """Log-probabilities that preference trainings compare with."""
        return self.root / "logs" / "reference.safetensors"

    @property
    def train_settings(self) -> Path:
        """Every setting of the training that finished last, as a file for ``--config``."""
        return self.root / "train.yaml"

    @property
    def tune_settings(self) -> Path:
        """The settings that won in ``tune``, as a file for ``--config``."""
        return self.root / "tune.yaml"

    @property
    def tuning(self) -> Path:
        """What ``tune`` has tried so far."""
        return self.root / "tune.json"

    @property
    def tune_plot(self) -> Path:
        return self.root / "logs" / "tune.png"

    @property
    def merged(self) -> Path:
        return self.root / f"{self.model_name}_lora_merged"

    @property
    def ollama(self) -> Path:
        return self.root / "ollama"

    @property
    def projector(self) -> Path:
        """What an exported model sees with. Programs know it by the beginning of its name."""
        return self.ollama / f"mmproj-{self.model_name}-f16.gguf"

    @property
    def metrics(self) -> Path:
        return self.root / "logs" / "metrics.jsonl"

    @property
    def failed_log(self) -> Path:
        """The log of a training that failed, where the run has one that finished."""
        return self.root / "logs" / "failed.jsonl"

    @property
    def samples(self) -> Path:
        """Answers to a few prompts at each evaluation of the training."""
        return self.root / "logs" / "samples.jsonl"

    @property
    def rollouts(self) -> Path:
        """Answers that a training from rewards sampled, a group of each step, and what they were worth."""
        return self.root / "logs" / "rollouts.jsonl"

    @property
    def plot(self) -> Path:
        return self.root / "logs" / "loss.png"

    @property
    def report(self) -> Path:
        return self.root / "report.md"

    @property
    def html_report(self) -> Path:
        """Everything about the run, for people; made anew from the rest at any time, so the manifest does not name
        it."""
        return self.root / "report.html"

    @property
    def answers(self) -> Path:
        """The prompts and answers of the report, for programs."""
        return self.root / "answers.json"

    def relative(self, path: Path) -> str:
        """``path`` as the manifest keeps it: relative to the run, if there is a way from it, with forward slashes; our
        own data by name."""
        if path.is_relative_to(PACKAGE):
            return f"gemma_tune:{path.relative_to(PACKAGE).as_posix()}"
        here, root = path.absolute(), self.root.absolute()
        if not here.is_relative_to(root):
            # A `..` after a symbolic link leads to the parent of what it points to, so both must be real paths.
            here, root = path.resolve(), self.root.resolve()
        return Path(seen_from(root, here)).as_posix()

    def found(self, name: str) -> str:
        """What :meth:`relative` made of a path, as one names it from the current directory; ``hf:`` names stay."""
        if name.startswith("gemma_tune:"):
            return f"{PACKAGE / name.removeprefix('gemma_tune:')}"
        return name if name.startswith("hf:") else seen_from(".", os.path.normpath(self.root.resolve() / name))


def set_aside_in(checkpoints: Path) -> list[Path]:
    """What lies in a run's checkpoints of finished trainings while others take their place, see
    :meth:`RunDir.finished`."""
    return sorted(checkpoints.glob(f"{_FINISHED}*"))


def no_run(root: Path, *flags: str) -> UserError:
    """What to say of a directory that is no run, to a command that needs one."""
    if _is_run(root.parent):
        return UserError(f"{root} is not a run, but lies in one",
                         f"name that one: --run {shell.quote(str(root.parent))}")
    try:
        runs = [path.parent.name for path in root.parent.glob("*/manifest.json")]
    except OSError:
        runs = []
    meant = "".join(f"did you mean --run {shell.quote(str(root.with_name(name)))}? Else " for name in
                    nearest(root.name, runs))
    return UserError(f"{root} is not a run yet: it has no manifest.json",
                     f"{meant}start it: gemma-tune prepare YOUR.jsonl --run {shell.join([str(root), *flags])}")


def _is_run(root: Path) -> bool:
    """Whether a directory has a run's manifest.json; other programs have files of that name, too."""
    try:
        return b'"gemma_tune"' in (root / "manifest.json").read_bytes()
    except OSError:
        return False


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
        return RUNS / model_name(directory.resolve().name if os.path.isdir(directory) else model_id)
    runs = sorted(RUNS.glob("*/manifest.json"), key=lambda p: p.stat().st_mtime)
    if not runs:
        raise UserError(f"there is no run under {RUNS}/ yet", "start one: gemma-tune prepare YOUR.jsonl "
                                                              "--model google/gemma-3-270m-it")
    return runs[-1].parent


def of_its_run(settings: Mapping[str, Any], path: Path, run: Any, model: Any) -> dict[str, Any]:
    """What a ``--config`` file at ``path`` holds: one that lies in a run directory, as ``train.yaml`` does, is about
    that run, unless another one or a model is named, there or here.

    Args:
        run, model: as they were given to the command; None where they were not.
    """
    named = run or model or settings.get("run") or settings.get("model")
    own = {} if named or not (path.parent / "manifest.json").is_file() else {"run": str(path.parent)}
    return {**settings, **own}


def command(stage: str, root: Path, *flags: str) -> str:
    """A command to type, with whatever a shell would split put in quotes."""
    return " ".join(["gemma-tune", stage, "--run", shell.quote(str(root)), *map(shell.quote, flags)])


def now() -> str:
    """Current time, UTC, ISO 8601 with seconds."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")


def describe(run: RunDir, path: Path, known: Mapping[str, Any] | None = None, lies_at: Path | None = None,
             ) -> dict[str, Any]:
    """Path and fingerprint of an input or output, as the manifest keeps it.

    Args:
        lies_at: where it lies now, if it has not taken its place yet.
    """
    return {"path": run.relative(path), **fingerprint(lies_at or path, dict(known) if known else None, name=path.name)}
