"""What happens around training steps: the log, guards against bad numbers, and a clean way to stop."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.train import processes

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer


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
        self.first_step = resumed_step
        self.records = list(earlier)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)
        self.seconds_before = max((r.get("training_seconds", 0.0) for r in self.records), default=0.0)
        if processes.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(r) + "\n" for r in self.records), encoding="utf-8")

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.busy += time.perf_counter() - self._began

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        done = max(1, state.global_step - self.first_step)
        self._add({"step": state.global_step, "steps": state.max_steps, "epoch": round(logs["epoch"], 4),
                   "loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "learning_rate": logs["learning_rate"],
                   "tokens": self.tokens, "training_seconds": round(self.seconds_before + self.busy, 3),
                   "tokens_per_second": round(self.tokens_per_second, 1),
                   "seconds_left": round(self.busy / done * (state.max_steps - state.global_step), 1)})

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._add({"step": state.global_step, "steps": state.max_steps, "eval_loss": metrics["eval_loss"]})

    @property
    def tokens(self) -> int:
        """Real tokens (no padding) of all training steps, those before an interruption included."""
        return self.tokens_before + (self.trainer.tokens_of_all if self.trainer else 0)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens (no padding) of all processes per second spent in training steps of this command."""
        return self.trainer.tokens_of_all / self.busy if self.busy and self.trainer else 0.0

    def _add(self, record: dict[str, Any]) -> None:
        record = {name: float(v) if isinstance(v, torch.Tensor) else v for name, v in record.items()}
        self.records.append(record)
        if processes.is_main():
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        self.listener.metrics(record)


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


class FiniteGuard(TrainerCallback):
    """Stops before the optimiser sees a gradient that is not finite: the trained state stays the last good one."""

    in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
        if processes.any_of(bool(bad)):  # a process may hold only a part of each gradient
            bad = sorted({name for names in processes.gathered(bad) for name in names})
        # In fp16 the loss scaler finds its factor by skipping steps that overflow; only many in a row mean trouble.
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad and (not args.fp16 or self.in_a_row > 20):
            raise WorkFailed(f"the gradient of {len(bad)} tensors is not finite at step {state.global_step + 1} "
                             f"({bad[0]}, …)", "train again with --force and a lower --learning-rate or --clip "
                                               "0.3, or with --dtype fp32; checkpoints before it are kept")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and not math.isfinite(logs.get("loss", 0.0)):
            raise WorkFailed(f"the loss is {logs['loss']} at step {state.global_step}",
                             "train again with --force and a lower --learning-rate, or with --dtype fp32")


def _finite(grad: torch.Tensor) -> bool:
    """Of what this process holds."""
    return bool(torch.isfinite(grad.to_local() if hasattr(grad, "to_local") else grad).all())


class StopRequest(TrainerCallback):
    """First Ctrl-C or SIGTERM: save at the step's end and leave, all processes together. A second one stops at once."""

    def __init__(self, listener: Listener):
        self.listener, self.requested = listener, False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only; a trainer in another thread is stopped by its owner.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.listener.warn("stopping after this step and saving it; press Ctrl-C again to stop at once")

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = processes.any_of(self.requested)
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control
