"""What a training is going to do, for people who watch it begin: what was decided, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gemma_tune.base.words import counted
from gemma_tune.config.settings import NOT_GIVEN
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.layers import described_adapter
from gemma_tune.run.session import Session
from gemma_tune.train.memory import BatchChoice
from gemma_tune.train.method import row_name
from gemma_tune.train.plan import Sizes, described_steps, total_steps, warmup_steps
from gemma_tune.train.shape import ModelShape

_FALLS = {"cosine": "falls along a cosine", "linear": "falls in a line", "constant": "stays"}


def overview(session: Session, shape: ModelShape, choice: BatchChoice, sizes: Sequence[Sizes],
             checkpoint: Path | None) -> dict[str, str]:
    """Lines with their names; what was told as a detail before, such as the device, is not among them.

    Args:
        sizes: of the training's rows, and of the validation's.
        checkpoint: what the training goes on from.
    """
    config, (train, valid) = session.config, sizes
    rows = len(train)
    warmup = warmup_steps(total_steps(rows, config), config)
    data = counted(rows, row_name(config))
    lines = {
        "model": f"{session.model.id}, {_rounded(shape.parameters)} parameters",
        "data": (f"{data} of up to {train.lengths.max():,} tokens" if config.method == "grpo" else
                 f"{data} of up to {train.lengths.max():,} tokens, {train.lengths.sum():,} in all, "
                 f"{train.trained.sum():,} learned") + f"; {len(valid) or 'none'} to validate with",
        "weights" if config.full else "adapter":
            f"{described_adapter(config)}, {_layers(shape)}: {_rounded(shape.adapter)} parameters",
        "batch": _batch(config, choice, session.resolved.origins["batch_size"] in NOT_GIVEN),
        **({} if config.method == "sft" else {"method": _method(config)}),
        "steps": described_steps(rows, config),
        "learning rate": (f"it rises to {config.learning_rate:g} in {counted(warmup, 'step')}" if warmup else
                          f"{config.learning_rate:g} from the first step on")
                         + f", then {_FALLS.get(config.schedule, config.schedule)}",
    }
    return lines | ({"goes on from": checkpoint.name} if checkpoint else {})


def sampled(config: TrainConfig) -> str:
    """What GRPO samples for a prompt."""
    return f"{config.answers} answers of up to {config.max_new_tokens:,} tokens"


def _layers(shape: ModelShape) -> str:
    places = [counted(shape.adapted, "linear layer")] * bool(shape.adapted)
    places += [f"{counted(shape.experts, 'tensor')} of experts"] * bool(shape.experts)
    whole = [f"{counted(shape.modules, 'module')} as a whole"] * bool(shape.modules)
    return ", and ".join([f"on {' and '.join(places)}"] * bool(places) + whole)


def _method(config: TrainConfig) -> str:
    if config.method == "grpo":
        return f"GRPO, {sampled(config)} to each prompt{f', beta {config.strength:g}' if config.strength else ''}"
    loss = f", loss {config.dpo_loss}" if config.dpo_loss != "sigmoid" else ""
    weight = f", weight of the chosen answers' own loss {config.sft_weight:g}" if config.sft_weight else ""
    return f"{config.method.upper()}{loss}, beta {config.strength:g}{weight}"


def _batch(config: TrainConfig, choice: BatchChoice, by_default: bool) -> str:
    """What a step learns from, and how much of it is worked on at once and why."""
    factors = [f"{number} {what}" for number, what in ((config.accumulation, "batches"),
                                                       (config.num_processes, "processes")) if number > 1]
    product = f" ({' x '.join([str(config.batch_size), *factors])})" if factors else ""
    default = ", the default" if by_default else ""
    return (f"{counted(config.effective_batch, row_name(config))} a step{product}{default}; "
            f"{choice.micro_batch}{' answers' if config.method == 'grpo' else ''} at once ({choice.reason})")


def _rounded(number: int) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if number >= 0.9995 * size:  # which three figures make a whole one of
            return f"{number / size:.3g} {name}"
    return f"{number:,}"
