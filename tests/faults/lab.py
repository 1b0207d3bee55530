"""Where faults are tried: a tiny model, a run that nothing disturbed, and commands as child processes.

A child is forked from this process, which has the libraries loaded: a command then takes a second instead of eight, and
a kill at a random moment meets its work instead of its imports. Ctrl-C is tried on freshly started programs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma_tune.base.fingerprints import CHECKPOINT_FILES
from gemma_tune.base.machine import settle_threads
from support.command import rows, write_rows

STAGES = ("prepare", "train", "merge", "export-ollama")
# What is not a stage of the chain: `train --continue` on a training that has ended, and `tune`.
SIDE = ("continue", "tune")
TRIED = (*STAGES, *SIDE)
PATIENCE = 120.0  # seconds after which a command hangs
# The last resort of the command line, and Python's own.
OURS = re.compile(r"Traceback \(most recent|\bunexpected [A-Z]\w*:")
_ARTIFACTS = ("data", "tiny-gemma_lora_adapter", "tiny-gemma_lora_merged", "ollama", "tune.yaml")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``code`` is negative where a signal ended it, None where it had to be stopped."""

    args: Sequence[str]
    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def command(self) -> str:
        return " ".join(["gemma-tune", *self.args])

    def fault(self, *codes: int) -> str | None:
        """What is wrong with it, if it should have ended with one of ``codes`` and its errors be messages."""
        said = self.err.strip().splitlines() or ["nothing was said"]
        if self.code is None:
            return f"`{self.command}` hangs"
        if found := OURS.search(self.err):
            line = next(line for line in said if found[0][:20] in line)
            return f"`{self.command}` ended with {self.code}: {line.strip()} … {said[-1].strip()}"
        if self.code not in codes:
            return f"`{self.command}` ended with {self.code}: {next((x for x in said if 'rror' in x), said[-1]).strip()}"
        return None


class Process:
    """A command that runs, in a process group of its own; its output goes to files."""

    def __init__(self, args: Sequence[str], start: Callable[[int, int], int], place: Path):
        self.args, self._place, self._began = args, place, time.monotonic()
        with open(place / "out", "wb") as out, open(place / "err", "wb") as err:
            self.pid = start(out.fileno(), err.fileno())

    def wait(self, seconds: float = PATIENCE) -> Outcome:
        end, ended = time.monotonic() + seconds, 0
        while not ended and time.monotonic() < end:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            time.sleep(0 if ended else 0.005)
        took = time.monotonic() - self._began
        if not ended:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        said = [(self._place / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        return Outcome(self.args, os.waitstatus_to_exitcode(status) if ended else None, *said, took)

    def ended_within(self, seconds: float) -> bool:
        """Wait for its end, but leave its status to :meth:`wait`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return True
            time.sleep(0.01)
        return False


class Lab:
    """The model, the states of a run to begin from, and what it has to come to.

    Args:
        work: an empty directory.
    """

    def __init__(self, work: Path):
        self.work, self.model, self.cache = work, work / "model" / "tiny-gemma", work / "cache"
        self.states, self.run = work / "states", work / "tries" / "run"
        self.seconds: dict[str, float] = {}
        self.renames: dict[str, int] = {}
        for folder in (self.states, self.run.parent, work / "output"):
            folder.mkdir(parents=True)
        self.data = write_rows(work / "rows.jsonl", rows(40))
        os.environ |= {"GEMMA_TUNE_CACHE": str(self.cache), "OLLAMA_HOST": "127.0.0.1:9", "NO_COLOR": "1",
                       "COLUMNS": "400", "TOKENIZERS_PARALLELISM": "false"}
        for name in ("GEMMA_TUNE_RUN", "HF_TOKEN"):
            os.environ.pop(name, None)
        os.environ["HF_HUB_OFFLINE"] = "1"
        # A shell starts what runs in its background with Ctrl-C ignored, which programs inherit.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._settings = {
            "prepare": [str(self.data), "--model", str(self.model), "--valid", "0.2"],
            "train": ["--epochs", "2", "--rank", "4", "--dtype", "fp32", "--learning-rate", "1e-3", "--save-steps", "3"],
            "merge": ["--dtype", "bf16", "--no-check"],
            "export-ollama": ["--quant", "q8_0", "--num-ctx", "512", "--no-verify", "--no-measure", "--no-create"],
            # So long that all candidates are tried, whatever the machine does meanwhile.
            "tune": ["--epochs", "2", "--ranks", "4", "--dtype", "fp32", "--learning-rates", "1e-3,4e-3,1e-2", "--minutes",
                     "30"]}
        training = self._settings["train"]
        self._settings["continue"] = ["--continue", "--epochs", "3", *training[2:]]

    # --- commands -----------------------------------------------------------------------------------------------------

    def arguments(self, stage: str, other: bool = False) -> list[str]:
        """The command of a stage, or of what is beside them, on the run of the tries; ``other`` with another value of
        one of its settings."""
        changes = {"0.2": "0.3", "1e-3": "5e-4", "bf16": "fp32", "512": "256", "1e-3,4e-3,1e-2": "1e-3,4e-3"} if other else {}
        name = "train" if stage == "continue" else stage
        return [name, *(changes.get(word, word) for word in self._settings[stage]), "--run", str(self.run)]

    def start(self, args: Sequence[str], first: Callable[[], None] = lambda: None, cwd: Path | None = None) -> Process:
        """Fork a child that is the command; ``first`` is called in it."""
        def fork(out: int, err: int) -> int:
            pid = os.fork()
            if pid:
                return pid
            code = 70
            try:
                os.setsid()
                signal.signal(signal.SIGINT, signal.default_int_handler)
                null = os.open(os.devnull, os.O_RDONLY)
                for ours, theirs in ((null, 0), (out, 1), (err, 2)):
                    os.dup2(ours, theirs)
                os.chdir(cwd or self.work)
                first()
                code = _run(args)
            finally:
                os._exit(code)
        return Process(args, fork, self.work / "output")

    def start_program(self, args: Sequence[str]) -> Process:
        """The command as a shell would start it."""
        def begin(out: int, err: int) -> int:
            return subprocess.Popen([sys.executable, "-m", "gemma_tune", *args], stdin=subprocess.DEVNULL, stdout=out,
                                    stderr=err, cwd=self.work, start_new_session=True).pid
        return Process(args, begin, self.work / "output")

    def do(self, *args: str, first: Callable[[], None] = lambda: None, cwd: Path | None = None) -> Outcome:
        return self.start(args, first, cwd).wait()

    # --- states -------------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Make the model, the states, and the run that nothing disturbed. Raises RuntimeError if that fails."""
        pid = os.fork()
        if not pid:
            from support.models import make_model

            make_model(self.model)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError("the tiny model could not be made")
        for stage in STAGES:
            self._keep(f"before-{stage}")
            self._finish(stage, other=True)
            self._keep(f"other-{stage}")
            self.restore(f"before-{stage}")
            self._measure(stage)
        self._keep("whole")
        for side, begun in zip(SIDE, ("merge", "train")):
            self.restore(f"before-{begun}")
            self._keep(f"before-{side}")
            self._measure(side)
            self._keep(f"whole-{side}")
        self.restore("before-tune")  # other candidates were tried before
        self._finish("tune", other=True)
        self._keep("other-tune")

    def _keep(self, name: str) -> None:
        if self.run.exists():
            shutil.copytree(self.run, self.states / name)

    def _finish(self, stage: str, other: bool = False) -> Outcome:
        done = self.do(*self.arguments(stage, other))
        if fault := done.fault(0):
            raise RuntimeError(f"{fault}\n{done.err}")
        return done

    def _measure(self, stage: str) -> None:
        count = self.work / "renames"
        count.write_bytes(b"")
        done = self.do(*self.arguments(stage), first=lambda: on_rename(lambda n, before: before and _add(count)))
        if fault := done.fault(0):
            raise RuntimeError(f"{fault}\n{done.err}")
        self.seconds[stage], self.renames[stage] = done.seconds, count.stat().st_size

    def restore(self, state: str) -> None:
        """Begin from a state; from nothing where there was no run yet."""
        if self.run.is_mount():
            for path in self.run.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            shutil.rmtree(self.run, ignore_errors=True)
        if (self.states / state).exists():
            shutil.copytree(self.states / state, self.run, dirs_exist_ok=True)

    def a_state(self, stage: str, random_: random.Random) -> str:
        """A state that a command can begin from; to continue, settings stay what they were."""
        return f"{random_.choice(('before',) if stage == 'continue' else ('before', 'other'))}-{stage}"

    def go_on(self, stage: str) -> str | None:
        """The same command and those after it; what is wrong if they do not come to what an undisturbed run does."""
        for name in STAGES[STAGES.index(stage):] if stage in STAGES else (stage,):
            if fault := self.do(*self.arguments(name)).fault(0):
                return f"afterwards {fault}"
        if different := self.different(stage):
            return f"afterwards these differ from an undisturbed run's: {', '.join(different)}"
        left = [path.name for path in self.run.rglob(".*") if path.name.startswith((".new-", ".old-"))]
        return f"left behind: {', '.join(left)}" if left else self.verified(stage)

    def different(self, stage: str = STAGES[0]) -> list[str]:
        """Artifacts that are not, byte for byte, those of the undisturbed run."""
        one, two = contents(self.states / (f"whole-{stage}" if stage in SIDE else "whole")), contents(self.run)
        return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))

    def states_now(self, *flags: str) -> Mapping[str, str] | None:
        """What ``status`` says of each stage; None where it cannot."""
        looked = self.do("status", "--run", str(self.run), "--json", *flags)
        with contextlib.suppress(ValueError, KeyError):
            return {stage: item["state"] for stage, item in json.loads(looked.out)["stages"].items()}
        return None

    def verified(self, stage: str = STAGES[0]) -> str | None:
        expected = {"tune": ("prepare",), "continue": ("prepare", "train")}.get(stage, STAGES)
        states = self.states_now("--verify")
        odd = {name: state for name, state in (states or {}).items() if name in expected and state != "done"}
        return f"`status --verify` says {odd or 'nothing'}" if odd or states is None else None

    def members(self) -> Iterator[Path]:
        """Files of the base model that count."""
        yield from sorted(path for path in self.model.iterdir() if any(map(path.match, CHECKPOINT_FILES)))


def contents(run: Path) -> dict[str, bytes]:
    """Artifacts of a run by their names in it."""
    return {path.relative_to(run).as_posix(): path.read_bytes() for name in _ARTIFACTS
            for path in sorted((run / name, *(run / name).rglob("*"))) if path.is_file()}


def on_rename(hook: Callable[[int, bool], object]) -> None:
    """Call ``hook`` with its number, from 1 on, and whether it comes yet, before and after each rename of this process."""
    number = 0

    def hooked(plain: Callable[..., None]) -> Callable[..., None]:
        def rename(*args: object, **more: object) -> None:
            nonlocal number
            number += 1
            hook(number, True)
            plain(*args, **more)
            hook(number, False)
        return rename

    os.rename, os.replace = hooked(os.rename), hooked(os.replace)


def _add(count: Path) -> None:
    with open(count, "ab") as f:
        f.write(b".")


def _run(args: Sequence[str]) -> int:
    from gemma_tune.cli.commands import app

    code = 0
    try:
        app(prog_name="gemma-tune", args=list(args))
    except SystemExit as e:
        code = 1 if isinstance(e.code, str) else e.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def load_libraries() -> None:
    """All that commands import, once for all children."""
    # Read when torch is loaded: two threads of a child would wait for each other, spinning, on a machine that is busy.
    os.environ["OMP_NUM_THREADS"] = "1"
    settle_threads()
    import datasets  # noqa: F401
    import transformers.models.gemma3.modeling_gemma3  # noqa: F401

    import gemma_tune.api
    import gemma_tune.cli.commands
    import gemma_tune.train.job
    import gemma_tune.train.stage

    gemma_tune.train.job.load_libraries()
