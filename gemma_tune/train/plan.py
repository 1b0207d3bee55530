"""What a training will do, need and take, before it does: the arithmetic behind ``train --dry-run``."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma_tune.base.words import counted, span
from gemma_tune.config.rewards import VALIDATED
from gemma_tune.config.stages import TrainConfig
from gemma_tune.run.stage import settings_then
from gemma_tune.train.memory import BatchChoice, described, sampled_at_once
from gemma_tune.train.method import row_name
from gemma_tune.train.shape import ModelShape

if TYPE_CHECKING:
    from gemma_tune.models.placement import Placement

# The share of the speed of one large matrix product that a training reaches. Measured 0.59 with Gemma 3 270M, bf16,
# batches of 4 x 130 tokens, on two cores (536 tokens/s where a product reached 0.82 TFLOP/s).
EFFICIENCY = 0.55
_MEASURED = 0.3  # seconds
_ROWS = 1024  # of the product
FEW_STEPS = 10
# What the speed depends on, beside the device, the type and how a batch is worked on.
_OF_SPEED = ("method", "full", "target_modules", "modules_to_save", "dora", "qlora", "num_processes", "strategy",
             "cuda_graphs", "compile", "answers", "max_new_tokens")


@dataclass(frozen=True)
class Sizes:
    """Of what a training, or its validation, counts as rows: sequences, or pairs of them.

    Attributes:
        lengths, trained: tokens of each row, of a pair those of both together, and learned ones (int64).
        longest: tokens of the longest single sequence.
    """

    lengths: np.ndarray
    trained: np.ndarray
    longest: int

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training will do.

    Attributes:
        sequences: number of training sequences.
        exposures: how often each of them is seen, on average.
        tokens_per_epoch: without padding; ``padding`` is the share that padding adds to them.
        pieces: in how many pieces of ``choice.micro_batch`` a batch goes through the model.
        steps_done: those that an earlier part of the training made.
        seconds: estimated time of the other steps and their evaluations; ``basis`` says from what.
        notes: what people should know about these figures.
        row: what each of them is called.
        device: where it is computed; ``dtype`` in which type, as ``--dtype`` names it.
        learning_rate: its peak.
        pictures: what is said of those that rows show; empty where they show none.
        answers: sampled for each prompt, of so many ``answer_tokens`` at most, where it learns from rewards; learned
            tokens and the time are then the most that there can be.
    """

    sequences: int
    longest: int
    steps: int
    steps_per_epoch: int
    warmup_steps: int
    exposures: float
    tokens_per_epoch: int
    trained_tokens_per_epoch: int
    padding: float
    pieces: int
    accumulation: int
    effective_batch: int
    choice: BatchChoice
    seconds: float
    basis: str
    notes: tuple[str, ...]
    row: str = "sequence"
    longest_sequence: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    method: str = "sft"
    learning_rate: float = 0.0
    steps_done: int = 0
    pictures: str = ""
    answers: int = 0
    answer_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """The plan for ``--json``; sizes in bytes."""
        values = asdict(self)
        values.pop("row")
        if not self.pictures:
            del values["pictures"]
        if not self.answers:
            del values["answers"], values["answer_tokens"]
        choice = values.pop("choice")
        memory = choice.pop("memory")
        return {**values, **choice, "memory": {**memory, "total": self.choice.memory.total}}

    def as_table(self) -> dict[str, str]:
        """Figures with their names, for people."""
        memory = described(self.choice, self.longest_sequence).removeprefix("memory: ")
        to_go = f" for the {counted(max(0, self.steps - self.steps_done), 'step')} to go" if self.steps_done else ""
        both = ", both answers together" if self.row == "pair" else ""
        return {
            "data": f"{counted(self.sequences, self.row)} of up to {self.longest:,} tokens{both}; " + (
                f"{self.answers} answers of up to {self.answer_tokens:,} tokens to each, sampled when its turn comes"
                if self.answers else f"{self.tokens_per_epoch:,} in all, {self.trained_tokens_per_epoch:,} learned; "
                                     f"padding adds {self.padding:.0%}"),
            **({"pictures": self.pictures} if self.pictures else {}),
            "steps": f"{self.steps:,} ({self.steps_per_epoch:,} per epoch); each {self.row} is seen "
                     f"{self.exposures:.3g} times",
            "warm-up": f"{counted(self.warmup_steps, 'step')} ({self.warmup_steps / self.steps:.0%})",
            "training": f"{self.method} on {self.device} in {self.dtype}, learning rate {self.learning_rate:g}",
            "batch": f"{self.effective_batch} per step; {self.choice.micro_batch}{' answers' if self.answers else ''} "
                     f"at once ({self.choice.reason})",
            "memory": memory if self.choice.fits else f"does not fit: {memory}",
            "time": f"{'at most ' if self.answers else ''}about {span(self.seconds)}{to_go} ({self.basis})",
        }


def steps_per_epoch(rows: int, config: TrainConfig) -> int:
    """Optimiser steps of one pass; rounded up, as the last batch may be smaller."""
    return -(-rows // config.effective_batch)


def total_steps(rows: int, config: TrainConfig) -> int:
    """Optimiser steps of the whole training."""
    return config.max_steps or max(1, round(steps_per_epoch(rows, config) * config.epochs))


def described_steps(rows: int, config: TrainConfig) -> str:
    """How the number of steps comes about."""
    steps, all_steps = total_steps(rows, config), total_steps(rows, replace(config, max_steps=0))
    epochs = f"{config.epochs:g} {'epoch' if config.epochs == 1 else 'epochs'}"
    text = (f"{counted(rows, row_name(config))} x {epochs} in batches of {config.effective_batch}: "
            f"{counted(all_steps, 'step')}")
    if steps > all_steps:
        return f"{text}; --max-steps makes them {steps:,}, {steps / steps_per_epoch(rows, config):.3g} epochs"
    return text if steps == all_steps else f"{text}, of which --max-steps does {steps:,}"


def warmup_steps(steps: int, config: TrainConfig) -> int:
    """Steps in which the learning rate rises."""
    return round(config.warmup * steps)


def rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of a step, as a share of the peak.

    It rises in equal parts from the first step on, has its peak in the step after the warm-up, and then falls towards
    zero, which it would reach after the last step: no step is wasted on a rate of zero.

    Args:
        step: from 0 on.
        steps: of the whole training.
    """
    rising = warmup_steps(steps, config)
    if step < rising:
        return (step + 1) / (rising + 1)
    if config.schedule == "constant":
        return 1.0
    done = (step - rising) / max(1, steps - rising)
    return 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def make_plan(shape: ModelShape, config: TrainConfig, placement: Placement, choice: BatchChoice, train: Sizes,
              valid: Sizes, *, tokens_per_second: float | None = None, notes: Sequence[str] = (),
              steps_done: int = 0, pictures: str = "") -> TrainingPlan:
    """Put the figures together.

    Args:
        tokens_per_second: what an earlier training reached (:func:`speed_of`); else a matrix product is measured (a
            third of a second).
        notes: what else people should know.
        steps_done: of a training that goes on.
        pictures: what is said of those that rows show.
    """
    rows = len(train)
    steps, per_epoch = total_steps(rows, config), steps_per_epoch(rows, config)
    epochs, rest = divmod(steps, per_epoch)
    rewarded = config.method == "grpo"
    batches = [] if rewarded else _pieces(train.lengths, config, choice.micro_batch)
    tokens = int(train.lengths.sum())
    evaluations = _evaluations(steps, per_epoch, valid, config)
    if rewarded:
        seconds, basis = _time_of_rewards(shape, config, placement, choice, steps / per_epoch, train, valid,
                                          evaluations, tokens_per_second)
    else:
        seconds, basis = _time(shape, placement, choice, steps / per_epoch, batches, train, valid, evaluations,
                               tokens_per_second)
    if not tokens_per_second and placement.device != "cpu":  # processes on a CPU share what was measured
        seconds /= config.num_processes
    seconds *= max(0, steps - steps_done) / steps
    return TrainingPlan(
        sequences=rows, longest=int(train.lengths.max()), steps=steps, steps_per_epoch=per_epoch,
        warmup_steps=warmup_steps(steps, config), exposures=epochs + min(1.0, rest * config.effective_batch / rows),
        tokens_per_epoch=tokens, trained_tokens_per_epoch=int(train.trained.sum()),
        padding=sum(n * longest for n, longest in batches) / tokens - 1 if batches else 0.0,
        pieces=-(-config.learned_at_once // choice.micro_batch), accumulation=config.accumulation,
        effective_batch=config.effective_batch, choice=choice, seconds=seconds, basis=basis,
        notes=(*surprises(rows, steps, config), *notes), row=row_name(config),
        longest_sequence=train.longest, device=placement.device, dtype=placement.short, method=config.method,
        learning_rate=config.learning_rate, steps_done=steps_done, pictures=pictures,
        **({"answers": config.answers, "answer_tokens": config.max_new_tokens} if rewarded else {}))


def _pieces(lengths: np.ndarray, config: TrainConfig, micro_batch: int) -> list[tuple[int, int]]:
    """Rows and longest row of everything that goes through the model in the first epoch."""
    from gemma_tune.train.batches import LengthGroupedBatches, Share
    from gemma_tune.train.buckets import pieces_of

    # What several processes do at once, as if it were done one after the other.
    share = Share(config.batch_size, config.accumulation * config.num_processes)
    batches = LengthGroupedBatches(lengths, share, config.seed)
    parts = [lengths[piece] for piece in pieces_of(batches, micro_batch)]
    return [(len(part), int(part.max())) for part in parts]


def _evaluations(steps: int, per_epoch: int, valid: Sizes, config: TrainConfig) -> int:
    """How often the validation rows are looked at: before, every so many steps, and at the end."""
    if not len(valid):
        return 0
    every = config.eval_steps or per_epoch
    return 1 + steps // every + bool(steps % every)


def surprises(rows: int, steps: int, config: TrainConfig) -> list[str]:
    """Where rounding makes something else of the settings than people expect."""
    notes = []
    if steps < FEW_STEPS:
        more = "a larger --max-steps gives" if config.max_steps else "more --epochs, or a smaller --batch-size, give"
        notes.append(f"only {counted(steps, 'step')}: hardly anything will be learned; {more} more")
    if config.learning_rate == 0:
        notes.append("with a learning rate of 0 nothing is learned")
    if config.warmup and not warmup_steps(steps, config):
        notes.append(f"a warm-up of {config.warmup:.0%} of {counted(steps, 'step')} is rounded to none")
    if config.effective_batch > rows:
        notes.append(f"a batch of {config.effective_batch} is more than there is: each step sees all "
                     f"{counted(rows, row_name(config))}")
    return notes


# --- time

def speed_of(last: Mapping[str, Any], config: TrainConfig, placement: Placement, choice: BatchChoice) -> float | None:
    """Tokens per second of an earlier training; None where this one has another speed by its settings.

    Args:
        last: its record in the manifest.
    """
    summary, settings, now = last["summary"], settings_then(last, TrainConfig), config.as_dict()
    ours = {"device": placement.device, "dtype": placement.short, "micro_batch": choice.micro_batch,
            "activation_checkpointing": choice.checkpointing}
    same = all(summary.get(name) == value for name, value in ours.items()) and all(
        settings[name] == now[name] for name in _OF_SPEED)
    return summary.get("tokens_per_second") if same else None


def _time(shape: ModelShape, placement: Placement, choice: BatchChoice, epochs: float,
          batches: Sequence[tuple[int, int]], train: Sizes, valid: Sizes, evaluations: int,
          tokens_per_second: float | None) -> tuple[float, str]:
    """Estimated seconds, and what they are estimated from. An evaluation, which only goes forward, takes half."""
    evaluated = evaluations * valid.lengths.sum() / 2
    tokens = train.lengths.sum()
    if tokens_per_second:
        return (float((epochs * tokens + evaluated) / tokens_per_second),
                f"{tokens_per_second:,.0f} tokens/s in the last training")
    speed = product_speed(shape, placement)
    of_epoch = sum(_operations(shape, choice.checkpointing, n, longest) for n, longest in batches)
    of_epoch += (8 if shape.head_trained else 4) * shape.head * int(train.trained.sum())
    seconds = of_epoch * (epochs + evaluated / tokens) / (speed * EFFICIENCY)
    return float(seconds), f"{EFFICIENCY:.0%} of the {speed / 1e12:.3g} TFLOP/s that a matrix product reaches here"


def _time_of_rewards(shape: ModelShape, config: TrainConfig, placement: Placement, choice: BatchChoice, epochs: float,
                     train: Sizes, valid: Sizes, evaluations: int, tokens_per_second: float | None,
                     ) -> tuple[float, str]:
    """The same of a training from rewards, if every answer had as many tokens as it may.

    A sampled token is multiplied with all weights, in products of as many rows as are sampled at once, whose speed is
    measured as such: it is that of memory. What is learned then goes forward and backward as in any training.
    """
    if_all, length = f"if every answer had all {config.max_new_tokens:,} tokens", config.max_new_tokens
    asked = min(VALIDATED, len(valid))
    checked = evaluations * asked * (float(valid.lengths.mean()) + length) if asked else 0.0
    if tokens_per_second:
        tokens = epochs * config.answers * float((train.lengths + length).sum()) + checked
        return tokens / tokens_per_second, f"{if_all}, at {tokens_per_second:,.0f} tokens/s as in the last training"
    answers = epochs * len(train) * config.answers
    speed, drawing = (product_speed(shape, placement, rows) for rows in (_ROWS, sampled_at_once(config)))
    weights = shape.active + shape.adapter_active
    learned = epochs * config.answers * sum(_operations(shape, choice.checkpointing, 1, int(start) + length)
                                            for start in train.lengths)
    learned += (8 if shape.head_trained else 4) * shape.head * answers * length
    read = 2 * weights * (epochs * config.answers * float(train.lengths.sum()) + checked)
    if config.strength:  # by the model before as well
        read += 2 * answers * (weights * (float(train.lengths.mean()) + length) + shape.head * length)
    sampled = 2 * (weights + shape.head) * length * (answers + evaluations * asked)
    seconds = (learned + read) / (speed * EFFICIENCY) + sampled / (drawing * EFFICIENCY)
    return float(seconds), f"{if_all}, at {EFFICIENCY:.0%} of the speed that matrix products reach here"


def _operations(shape: ModelShape, checkpointing: bool, rows: int, length: int) -> int:
    """Floating-point operations of one batch, head excluded: a multiplication and an addition count as two.

    For each token: 2 for each number of a frozen matrix forward, 2 backward for the gradient of its input, and 2 more
    if the forward pass is repeated; 6 for each number of the adapter, which needs its own gradient too, as do
    matrices that are trained as a whole, for 2 more; a head that is trained makes its logits twice. Attention
    multiplies two matrices forward and five backward, for each pair of tokens.
    """
    tokens = rows * length
    dense = (6 if checkpointing else 4) * shape.active + 6 * shape.adapter_active + 2 * shape.whole_active
    return tokens * (dense + 14 * length * shape.layers * shape.attention)


def product_speed(shape: ModelShape, placement: Placement, rows: int = _ROWS) -> float:
    """Operations per second of matrix products of so many rows and this model's sizes, in its type and on its device,
    measured for about ``_MEASURED`` seconds; other programs that want the processor are there in training, too."""
    import torch

    a = torch.ones(rows, shape.hidden, dtype=placement.dtype, device=placement.device)
    b = torch.ones(shape.hidden, shape.widest, dtype=placement.dtype, device=placement.device)
    (a @ b)[0, 0].item()  # the first product includes choosing and preparing the kernel
    products, start = 0, time.perf_counter()
    while (busy := time.perf_counter() - start) < _MEASURED:
        for _ in range(4):
            c = a @ b
        c[0, 0].item()  # waits for a GPU
        products += 4
    return 2 * a.shape[0] * b.numel() * products / busy
