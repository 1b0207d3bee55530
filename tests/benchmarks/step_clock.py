"""What a training with transformers' Trainer does in its steps: when each ended, what it read, and the GPU's work in a few.

:func:`watch` adds a callback to every Trainer that this process makes later, so the program that trains needs no change;
it serves this project's command line, TRL and Unsloth alike. Nothing here waits for the GPU, but for the end of training
and the few steps that are profiled, which are the last ones and count nowhere else.
"""

from __future__ import annotations

import functools
import statistics
import sys
import time
from typing import Any

PROFILED = 3  # steps
AT_SPEED = 1.3  # a step that takes so many times as long as the later ones is not at speed


class Steps:
    """What was seen of one training: ``ends`` in seconds since it began, ``real`` and ``positions`` of its batches."""

    def __init__(self, profiled: int):
        self.profiled = profiled
        self.imported = time.perf_counter()
        self.seconds: list[float] = []  # of each step that is not profiled, with waiting for its rows
        self.counts: list[tuple[Any, int]] = []  # of each step: tokens without padding (maybe a tensor), and with it
        self.began = self.last = self.imported
        self.first_step: float | None = None  # from watch(), so with imports and loading, to the end of the first step
        self.gpu: dict[str, Any] = {}

    def read(self, batches: list[Any]) -> None:
        """Count the batches of the step that begins, without waiting for the device."""
        real, positions = 0, 0
        for batch in batches:
            if "input_ids" not in batch:  # pairs, whose sequences become tensors piece by piece
                real = real + batch["lengths"].sum()
                positions += int(batch["lengths"].sum())
                continue
            ids = batch["input_ids"]
            positions += ids.numel()
            if "lengths" in batch:
                real = real + batch["lengths"].sum()
            elif "attention_mask" in batch:
                real = real + (batch["attention_mask"] != 0).sum()
            else:
                real = real + ids.numel()  # several rows in one, without padding
        self.counts.append((real, positions))

    def ended(self) -> None:
        """A step ended."""
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        if self.first_step is None:
            self.first_step = now - self.imported

    def settle(self) -> None:
        """Wait for the GPU; what it still had to do belongs to the last step."""
        if memory() and self.seconds:
            sys.modules["torch"].cuda.synchronize()
            self.seconds[-1] += time.perf_counter() - self.last
            self.last = time.perf_counter()

    def skip(self) -> None:
        """What passed since the last step (evaluating, saving) is none of the next one's time."""
        self.last = time.perf_counter()

    def figures(self) -> dict[str, Any]:
        """See :func:`figures`; and of the profiled steps the GPU's share and kernels."""
        counts = [(int(real), positions) for real, positions in self.counts]
        return figures(self.seconds, [real for real, _ in counts]) | {
            "first_step_after": self.first_step, "step_seconds": self.seconds,
            "step_tokens": [real for real, _ in counts][:len(self.seconds)],
            "padding": 1 - sum(r for r, _ in counts) / max(1, sum(p for _, p in counts)), **self.gpu}


def figures(seconds: list[float], tokens: list[int]) -> dict[str, Any]:
    """Steady speed and warm-up from the seconds and the tokens (without padding) of a training's steps.

    Returns:
        ``steady_tokens_per_second`` over the steps after warm-up; ``warmup_steps``, the first ones up to where three in
        a row take at most :data:`AT_SPEED` times the median second per token of the later half; ``warmup_seconds`` those
        took. Without steps nothing.
    """
    tokens = tokens[:len(seconds)]
    if not seconds or len(tokens) < len(seconds):
        return {}
    pace = [s / max(1, t) for s, t in zip(seconds, tokens)]
    usual = statistics.median(pace[len(pace) // 2:])
    slow = [p > AT_SPEED * usual for p in pace]
    warmup = next((n for n in range(len(slow)) if not any(slow[n:n + 3])), len(slow) - 1)
    warmup = max(warmup, min(1, len(slow) - 1))  # the first step is never counted as steady
    return {"steady_tokens_per_second": sum(tokens[warmup:]) / sum(seconds[warmup:]), "warmup_steps": warmup,
            "warmup_seconds": sum(seconds[:warmup])}


def watch(profile: bool) -> Steps:
    """Watch the Trainers that are made from now on; ``profile`` the last steps of the training on its GPU."""
    import transformers.trainer as library
    from transformers import TrainerCallback

    seen = Steps(PROFILED if profile else 0)

    class Clock(TrainerCallback):
        """Tells ``seen``; the library makes it for each Trainer."""

        profiler: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.seconds, seen.counts = [], []
            _count_batches(library.Trainer, seen)  # only here: Unsloth puts a method of its own there until now
            seen.last = time.perf_counter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if seen.profiled and self.profiler is None and state.global_step == max(1, state.max_steps - seen.profiled):
                seen.settle()
                self.profiler = _started()
                self.before, self.since = state.global_step, time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.profiler is None:
                seen.ended()
            elif state.global_step == state.max_steps:
                seen.gpu = _work(self.profiler, state.global_step - self.before, self.since)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.profiler is None:
                seen.settle()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.skip()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.skip()

    library.DEFAULT_CALLBACKS.append(Clock)
    return seen


def _count_batches(trainer: Any, seen: Steps) -> None:
    """Let ``seen`` read the batches of each step of a Trainer class, once."""
    inner = trainer.get_batch_samples
    if getattr(inner, "read_by", None) is seen:
        return

    @functools.wraps(inner)
    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = inner(self, *args, **kwargs)
        seen.read(answer[0])
        return answer

    get_batch_samples.read_by = seen
    trainer.get_batch_samples = get_batch_samples


def _started() -> Any:
    """A running profiler of the GPU's kernels; False where there is none to be had."""
    import torch

    try:
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        profiler.start()
        torch.cuda.synchronize()
    except Exception as e:  # it is one figure of many; the training goes on
        print(f"no profile: {e}", file=sys.stderr)
        return False
    return profiler


def _work(profiler: Any, steps: int, since: float) -> dict[str, Any]:
    """Kernels per step, and the share of the time in which at least one ran."""
    import torch

    torch.cuda.synchronize()
    seconds = time.perf_counter() - since
    if not profiler:
        return {"profiled_steps": steps}
    try:
        profiler.stop()
        spans = [(e.time_range.start, e.time_range.end) for e in profiler.events()
                 if e.device_type == torch.autograd.DeviceType.CUDA and not e.name.startswith(("Mem", "ProfilerStep"))]
    except Exception as e:
        print(f"no profile: {e}", file=sys.stderr)
        return {"profiled_steps": steps}
    return {"profiled_steps": steps, "kernels_per_step": len(spans) / steps, "gpu_busy": covered(spans) / 1e6 / seconds,
            "gpu_seconds_per_step": covered(spans) / 1e6 / steps, "profiled_step_seconds": seconds / steps}


def covered(spans: list[tuple[float, float]]) -> float:
    """The length that intervals cover together; where they overlap, it counts once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def memory() -> dict[str, int]:
    """The peaks of what PyTorch's tensors took on the GPU and of what it reserved there, in bytes; nothing without one."""
    torch = sys.modules.get("torch")
    if not torch or not torch.cuda.is_available():
        return {}
    return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": torch.cuda.max_memory_reserved()}
