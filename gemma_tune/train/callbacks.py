"""What happens around training steps: the log, and a clean way to stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gemma_tune.base.files import json_bytes, write_atomic
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import ending_signals
from gemma_tune.train import processes
from gemma_tune.train.memory import in_use

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer

_EACH = 1.0  # seconds between two looks at the memory


class MetricsLog(TrainerCallback):
    """Writes logs/metrics.jsonl as training goes and tells the listener; speed excludes evaluation and saving.

    Args:
        path: of the file; of several processes only the main one writes it.
        resumed_step: the step of the checkpoint that training goes on from, 0 without one.
        earlier: records up to that step, see :func:`earlier_records`.
    """

    def __init__(self, path: Path, listener: Listener, resumed_step: int, earlier: Sequence[dict[str, Any]]):
        self.path, self.listener = path, listener
        self.trainer: GemmaTrainer | None = None
        self.busy = 0.0  # seconds in training steps
        self._began: float | None = None  # when the current step did
        self.first_step = resumed_step
        self.records = list(earlier)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)
        self.seconds_before = max((r.get("training_seconds", 0.0) for r in self.records), default=0.0)
        self._begun = False  # until there is something to write, the log is that of the training before
        self._memory: dict[str, int] = {}
        self._looked = -math.inf  # when, for it
        listener.training(self.records)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._began is None:
            self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        # From one step's end to the next one's: collecting the rows in between is part of it.
        now = time.perf_counter()
        self.busy += now - self._began
        self._began = now

    def on_save(self, args, state, control, **kwargs):
        self._began = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        step = logs["step"]
        done = max(1, step - self.first_step)
        self._add({"step": step, "steps": state.max_steps, "epoch": round(logs["epoch"], 4),
                   "loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "learning_rate": logs["learning_rate"],
                   "tokens": self.tokens, "training_seconds": round(self.seconds_before + self.busy, 3),
                   "tokens_per_second": round(self.tokens_per_second, 1),
                   "seconds_left": round(self.busy / done * (state.max_steps - step), 1),
                   **{name: value for name, value in logs.items() if "/" in name or "reward" in name or name == "kl"},
                   **self._memory_in_use()})

    def _memory_in_use(self) -> dict[str, int]:
        now = time.monotonic()
        if now - self._looked > _EACH and self.trainer:  # a captured step can be over before the answer is there
            self._memory, self._looked = in_use(self.trainer.accelerator.device.type), now
        return self._memory

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._began = None
        self._add({"step": state.global_step, "steps": state.max_steps,
                   **{name: value for name, value in metrics.items() if name.startswith("eval_")}})

    @property
    def tokens(self) -> int:
        """Real tokens (no padding) of all training steps, those before an interruption included."""
        return self.tokens_before + (self.trainer.tokens_seen if self.trainer else 0)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens (no padding) of all processes per second spent in training steps of this command."""
        return self.trainer.tokens_seen / self.busy if self.busy and self.trainer else 0.0

    @property
    def overall_speed(self) -> float:
        """The same of all training steps, those before an interruption included, where their time is known."""
        seconds = self.seconds_before + self.busy
        return self.tokens / seconds if seconds and bool(self.tokens_before) == bool(self.seconds_before) else (
            self.tokens_per_second)

    def _add(self, record: dict[str, Any]) -> None:
        record = {name: float(v) if isinstance(v, torch.Tensor) else v for name, v in record.items()}
        self.records.append(record)
        if processes.is_main():
            write_last(self.path, self.records, self._begun)
        self._begun = True
        self.listener.metrics(record)


def write_last(path: Path, records: Sequence[Mapping[str, Any]], begun: bool) -> None:
    """Write the last record behind the others, once the file was begun; before that all of them in one go, in the place
    of a file that has the earlier ones, or is another training's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if begun:
        with open(path, "ab") as f:
            f.write(json_bytes(records[-1]))
    else:
        write_atomic(path, b"".join(map(json_bytes, records)))


def earlier_records(path: Path, resumed_step: int) -> list[dict[str, Any]]:
    """Records up to the checkpoint that training goes on from; later ones will be written again."""
    if resumed_step == 0 or not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= resumed_step:
                records.append(record)
        except (ValueError, TypeError, KeyError):  # the line being written when the process was killed, or damage
            continue
    return records


class StopRequest(TrainerCallback):
    """First Ctrl-C, SIGTERM or SIGHUP: save at the step's end and leave, all processes together; a second one stops at
    once."""

    said = "stopping after this step and saving it; press Ctrl-C again to stop at once"

    def __init__(self, listener: Listener):
        self.listener, self.requested = listener, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; a trainer in another thread is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            for number in ending_signals():
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.listener.warn(self.said)

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = processes.any_of(self.requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control
