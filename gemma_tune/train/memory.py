"""Whether a training fits the memory, known before its weights are loaded or downloaded.

:func:`estimate` says what a step needs, ``available`` of :mod:`gemma_tune.models.placement` what there is, and
:func:`choose` finds how many rows go through the model at once. What a step learns from does not depend on
that: a batch is worked on in pieces, whose gradients are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil

from gemma_tune.answers.lengths import MOST_ROWS
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, first_line, gigabytes
from gemma_tune.config.stages import TrainConfig
from gemma_tune.models.placement import OVERHEAD, PLACE, USABLE, best_device
from gemma_tune.models.quantised import has_packed_experts, quantisation
from gemma_tune.train.method import piece_name
from gemma_tune.train.shape import ModelShape

# NF4 with double quantisation: 4 bits and 0.127 bits of scales for a number.
NF4_BYTES = (4 + 0.127) / 8
# What lives beside what is kept while the gradient goes through one layer, for each token: so many numbers of the
# widest linear layer in the compute type (measured 1.7 to 2.4, in bf16 and fp32, Gemma 3 and Llama), or so many bytes
# for each number of a norm, which computes in fp32 (measured 14).
WORKING_LINEAR, WORKING_NORM = 2.5, 16
# The loss holds a chunk of the logits of a block of rows, never all of them; see ``loss``.
LOGITS = 64_000_000
LOGITS_ON_GPU = 270_000_000
# Memory that is free but in pieces too small for what comes next. Resident sets on Linux (glibc) were up to 0.1 GB
# larger than the sum of all tensors without it, for each 0.4 GB of activations.
FRAGMENTATION = 1.25
DRAWN = 24  # bytes for each answer and each token of the vocabulary: logits twice, probabilities, their sums in fp64
_LITTLE = 0.25  # of the weights, so that what --qlora saves is no way out
TOKENIZER = 950  # on a CPU, bytes of the tokenizer for each entry of its vocabulary


@dataclass(frozen=True)
class Memory:
    """What a training needs, in bytes; the fields say where it goes, see :func:`estimate`."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    overhead: int
    sampling: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class BatchChoice:
    """How a batch goes through the model.

    Attributes:
        micro_batch: rows at once; a divisor of the batch size unless the user said otherwise.
        checkpointing: activations are recomputed in the backward pass.
        memory: what that needs with the longest rows.
        available: bytes that there are.
        fits: ``memory`` is within the share of ``available`` that may be used.
        reason: why so, in words.
        per_row: sequences of each row; a pair has two.
        four_bit: the base is in 4 bits,
        in_linear: and so much of it at most: those of the weights that are in linear layers, which experts are not.
        full: all weights are trained, which have to stay as they are.
    """

    micro_batch: int
    checkpointing: bool
    memory: Memory
    available: int
    fits: bool
    reason: str
    per_row: int = 1
    four_bit: bool = False
    in_linear: float = 1.0
    full: bool = False


def estimate(shape: ModelShape, micro_batch: int, longest: int, *, checkpointing: bool, four_bit: bool,
             device: str, shards: int = 1, gradients: int = 1, sampled: int = 0, copies: int = 0) -> Memory:
    """Peak memory of a training step of one process, in bytes.

    - weights: every number in the compute type; with ``four_bit`` those of linear layers take 4.127 bits, and the
      largest of them is unpacked while it is used. Those that are kept narrow (:attr:`ModelShape.narrow`) take 2 bytes,
      and there is one place where they are widened. In ``shards`` each process has its part, the whole head, and two
      layers: the one in use and the next.
    - adapter, gradients, optimizer: fp32, and AdamW's two moments: 4 + 4 + 8 bytes for each trained number. Of modules
      that are trained as a whole there is a rounded copy as well, to compute with, where that is not fp32, and none of
      the base's own; where they began as an adapter has them, that stays on the CPU in the compute type.
    - activations: what autograd keeps, measured on shapes (:attr:`ModelShape.kept`), and the holes between. With
      ``checkpointing`` the inputs of all layers (tokens x hidden size each), and what one layer keeps.
    - sampling: of answers that a training from rewards samples, the keys and values of as many as are sampled at once,
      and what their next tokens are drawn from: logits, probabilities and their sums in fp64. A CUDA GPU keeps them for
      the next step, of two sizes; elsewhere they are gone when the step learns, so that only what they need beyond its
      activations counts.
    - working: the greatest of the loss's chunk of logits, the gradients inside a linear layer, and those inside a
      norm, which never exist together.

    Captured steps need no more: their graphs share one pool, which holds what the largest shape does, and the step that
    is tried first has given its memory back by then. Measured on an H100 with 8 x 707 tokens, bf16 and rank 16: 5.0 GB
    reserved for Gemma 3 270M where this says 5.0, 30.9 GB for a 4B where it says 35.7.

    Args:
        micro_batch: sequences at once.
        longest: tokens of the longest one.
        device: ``cpu``, ``cuda`` or ``mps``.
        shards: processes that share the weights among them.
        gradients: how often those are there at once.
        sampled: answers that are sampled at once.
        copies: of the adapter, that are there beside it.
    """
    tokens = micro_batch * longest
    kept = shape.kept(micro_batch, longest)
    if checkpointing:
        kept = min(kept, shape.layers * tokens * shape.hidden * shape.item + kept // shape.layers)
    weights = (shape.parameters - shape.resting) * shape.item
    if shards > 1:
        weights = weights // shards + shape.head * shape.item + 2 * weights // shape.layers
    if four_bit:
        weights -= round(shape.linear * (shape.item - NF4_BYTES)) - shape.hidden * shape.widest * shape.item
    if shape.narrow:
        narrow = max(0, shape.large - shape.linear) if four_bit else shape.large
        place = min(PLACE, max(shape.head, shape.hidden * shape.widest))
        weights -= narrow * (shape.item - 2) - place * shape.item
    logits = LOGITS_ON_GPU if device == "cuda" else LOGITS
    working = max(logits, round(WORKING_LINEAR * tokens * shape.widest * shape.item),
                  WORKING_NORM * tokens * shape.hidden)
    overhead = OVERHEAD[device] + (TOKENIZER * shape.head // shape.hidden if device == "cpu" else 0)
    rounded = shape.whole * shape.item if shape.item < 4 else 0
    begun = shape.begun * shape.item if device == "cpu" else 0
    activations = round(FRAGMENTATION * kept)
    sampling = _sampling(shape, sampled, longest, device, activations + working)
    adapter = 4 * shape.adapter * (1 + copies) + rounded + begun
    return Memory(weights=weights, adapter=adapter, gradients=4 * shape.adapter * gradients,
                  optimizer=8 * shape.adapter, activations=activations, working=working,
                  overhead=overhead, sampling=sampling)


def _sampling(shape: ModelShape, rows: int, longest: int, device: str, learning: int) -> int:
    """See :func:`estimate`; ``learning`` is what the step needs after it, in bytes."""
    places = 1 << (longest - 1).bit_length() if device == "cuda" else longest  # of a cache of fixed size
    cache = rows * places * shape.cached * shape.item
    drawing = rows * DRAWN * shape.head // shape.hidden
    return 2 * cache + drawing if device == "cuda" else max(0, round(FRAGMENTATION * (cache + drawing)) - learning)


def choose(shape: ModelShape, config: TrainConfig, longest: int, device: str, room: int,
           per_row: int = 1) -> BatchChoice:
    """The most rows at once that fit; activations are recomputed only if not even one fits otherwise.

    Args:
        config: ``micro_batch`` and ``activation_checkpointing`` are kept where the user set them; ``qlora`` also
            stands for a checkpoint that is in 4 bits.
        longest: tokens of the longest sequence.
        room: bytes that there are.
        per_row: sequences of each row; a pair has two.
    """
    asked = config.micro_batch is not None or config.activation_checkpointing is not None
    first = None
    for checkpointing, micro_batch in _candidates(config):
        memory = estimate(shape, micro_batch * per_row, longest, checkpointing=checkpointing, four_bit=config.qlora,
                          device=device, shards=config.shards, sampled=sampled_at_once(config),
                          gradients=_gradients_at_once(config, micro_batch, device), copies=_copies(config))
        choice = BatchChoice(micro_batch, checkpointing, memory, room, memory.total <= USABLE * room, "",
                             per_row, config.qlora, shape.linear / shape.parameters, config.full)
        first = first or choice
        if choice.fits:
            break
    reason = "as asked" if asked else "they fit" if choice is first else (
        f"{counted(first.micro_batch, piece_name(config))} would need {gigabytes(first.memory.total)}")
    return replace(choice, reason=reason)


def sampled_at_once(config: TrainConfig) -> int:
    """Answers that a training from rewards samples in one batch; 0 of others."""
    return min(MOST_ROWS, config.learned_at_once) if config.method == "grpo" else 0


def _copies(config: TrainConfig) -> int:
    """Two where the adapter of before takes its place now and then: that, and the one of now meanwhile."""
    return 2 if config.method == "grpo" and config.strength else 0


def _gradients_at_once(config: TrainConfig, micro_batch: int, device: str) -> int:
    """Twice where those of a step's earlier batches are kept for a batch that finds no memory, or where processes sum
    theirs, which at fixed places needs no copy."""
    if config.num_processes > 1:
        return 2 if device == "cpu" and not config.whole else 1
    return 2 if config.accumulation > 1 and micro_batch > 1 else 1


def _candidates(config: TrainConfig) -> Iterator[tuple[bool, int]]:
    """Checkpointing and micro-batch in the order of preference, the fastest first."""
    sizes = [config.micro_batch] if config.micro_batch else [
        n for n in range(config.learned_at_once, 0, -1) if config.learned_at_once % n == 0]
    modes = [False, True] if config.activation_checkpointing is None else [config.activation_checkpointing]
    return ((checkpointing, size) for checkpointing in modes for size in sizes)


def refuse_what_does_not_fit(choice: BatchChoice, config: TrainConfig, longest: int, listener: Listener) -> None:
    """A CPU reports no lack of memory: the system kills the process. So it is refused before anything is loaded.

    Whoever set the least there is, ``--micro-batch 1 --activation-checkpointing``, is only warned.

    Raises:
        UserError: it does not fit; the hint says what helps.
    """
    if choice.fits:
        return
    memory = choice.memory
    each = f"{choice.per_row} x {longest:,}" if choice.per_row > 1 else f"{longest:,}"
    says = (f"this training needs about {gigabytes(memory.total)} of memory with "
            f"{counted(choice.micro_batch, piece_name(config))} of {each} tokens at once, and "
            f"{gigabytes(choice.available)} are available")
    if config.micro_batch == 1 and config.activation_checkpointing:
        listener.warn(f"{says}; it may be killed")
        return
    raise UserError(says, _what_helps(choice, config, longest))


def refuse_four_bits(config: TrainConfig, device: str, base: Mapping[str, Any]) -> None:
    """Before any work: ``--qlora`` where it does not compute, and ``--full`` where there are no weights to train.

    Args:
        base: config.json of the base model.

    Raises:
        UserError: on Apple's GPU, where transformers loads bitsandbytes' layers onto the CPU; of a model that is packed
            already; all weights of one that is quantised.
    """
    if config.full and (method := quantisation(base)):
        raise UserError(f"--full trains the weights themselves, and this model is quantised ({method})",
                        "prepare with the 16-bit model that it was made from; or train an adapter: leave --full out")
    if config.qlora and has_packed_experts(base):
        raise UserError("this model's experts have four bits already, and nothing else of it gets them",
                        "leave --qlora out")
    if config.qlora and device == "mps":
        raise UserError("--qlora does not go with Apple's GPU: transformers puts bitsandbytes' 4-bit layers on the CPU "
                        "there", "leave --qlora out; --micro-batch 1 --activation-checkpointing saves memory, and so "
                                 "does a smaller model")


def out_of_memory(error: Exception, choice: BatchChoice, micro_batch: int) -> UserError:
    """The error for a step that found no memory; its hint names what is not done yet.

    Args:
        micro_batch: rows that went through the model at once.
    """
    ways = ["--micro-batch 1"] if micro_batch > 1 else []
    ways += [] if choice.checkpointing else ["--activation-checkpointing"]
    ways += ["--qlora"] if _can_be_packed(choice) else []
    ways += ["an adapter instead of --full"] if choice.full else []
    return UserError(f"out of memory: {first_line(error)}",
                     f"use {', '.join(ways)}, or a smaller model" if ways else "use a smaller model")


def _can_be_packed(choice: BatchChoice) -> bool:
    """Whether ``--qlora`` would make the weights much smaller than they are."""
    return not (choice.four_bit or choice.full) and choice.in_linear > _LITTLE and best_device() != "mps"


def _what_helps(choice: BatchChoice, config: TrainConfig, longest: int) -> str:
    memory, room = choice.memory, USABLE * choice.available
    fixed = memory.total - memory.activations - memory.working
    ways = ["fewer --answers or --max-new-tokens"] if config.method == "grpo" else []
    if config.micro_batch not in (None, 1) or config.activation_checkpointing is False:
        ways.append("leave --micro-batch and --activation-checkpointing to be chosen")
    if choice.full:
        ways.append("train an adapter: leave --full out")
    if memory.weights > memory.total / 4 and _can_be_packed(choice):
        ways.append("--qlora keeps the weights in 4 bits")
    if fixed + LOGITS < room and memory.activations + memory.working > 2 * LOGITS:
        shorter = max(64, int(longest * (room - fixed) / (memory.activations + memory.working)) // 64 * 64)
        ways.append(f"prepare again with --max-length {shorter}")
    ways.append("a smaller model, or more memory, and other programs closed")
    return "; or ".join(ways) + "; --micro-batch 1 --activation-checkpointing tries it all the same"


def in_use(device: str) -> dict[str, int]:
    """Bytes that this process has, for the log: on a GPU those of tensors, now and at most; else its resident set.

    A GPU is not waited for.
    """
    if device == "cuda":
        import torch

        return {"memory_bytes": torch.cuda.memory_allocated(), "peak_memory_bytes": torch.cuda.max_memory_allocated()}
    return {"memory_bytes": psutil.Process().memory_info().rss}


def described(choice: BatchChoice, longest: int) -> str:
    """The choice in one line."""
    memory = choice.memory
    adapter = memory.adapter + memory.gradients + memory.optimizer
    at_once = choice.micro_batch * choice.per_row
    recomputed = ", recomputed in the backward pass" if choice.checkpointing else ""
    little = choice.four_bit and choice.in_linear < _LITTLE
    packed = f", of which {choice.in_linear:.0%} are in 4 bits" if little else ""
    sampling = f", sampling {gigabytes(memory.sampling)} more" if memory.sampling else ""
    return (f"memory: about {gigabytes(memory.total)} of {gigabytes(choice.available)} available (weights "
            f"{gigabytes(memory.weights)}{packed}, trained weights and optimiser {gigabytes(adapter)}, activations "
            f"{gigabytes(memory.activations + memory.working)} with {at_once} x {longest:,} tokens at once"
            f"{recomputed}{sampling}, libraries {gigabytes(memory.overhead)})")

