"""``--batch-size auto``: how many conversations a step should learn from, by how many there are."""

from __future__ import annotations

from dataclasses import replace

from gemma_tune.base.words import counted
from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.method import row_name
from gemma_tune.train.plan import total_steps

# On an H100 a step of Gemma 3 270M with 8 rows works the GPU for 8 ms, hardly more than with 4; from 32 rows on its
# matrix units are busy. A CPU is as fast per token with few rows.
MOST = {"cuda": 32, "mps": 16, "cpu": 8}
# Fewer steps than this learn little, however many rows each of them sees.
LEAST_STEPS = 100


def proposed(rows: int, config: TrainConfig, device: str) -> tuple[int, str]:
    """The largest power of two that leaves enough steps, and the sentence that says why.

    Args:
        rows: what a method learns from, one by one: sequences, pairs or judged answers.
        config: whose batch size is not looked at; accumulation, processes and epochs are.
        device: ``cpu``, ``cuda`` or ``mps``.
    """
    size = MOST[device]
    while size > 1 and _steps(rows, config, size) < LEAST_STEPS:
        size //= 2
    steps = counted(_steps(rows, config, size), "step")
    return size, (f"batch size {size}: proposed, as {counted(rows, row_name(config))} then make {steps}"
                  + ("" if size == MOST[device] else f", and fewer than {LEAST_STEPS} learn little"))


def _steps(rows: int, config: TrainConfig, size: int) -> int:
    return total_steps(rows, replace(config, batch_size=size, micro_batch=None, max_steps=0))
