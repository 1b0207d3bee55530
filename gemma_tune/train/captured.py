"""Steps that are captured once and replayed: one CUDA graph of forward and backward pass for each shape of a batch.

A small model's step is thousands of kernels of a few microseconds, and Python takes ten times as long to start them as
the GPU to run them. A captured step is started by one call. For that nothing in it may depend on the data: pieces are
padded to one of a few shapes (:mod:`gemma_tune.train.buckets`), inputs are copied to where the graph reads them, and
gradients are added where it saw them (:mod:`gemma_tune.train.gradients`). The optimiser's step comes after it as ever.

All graphs share one pool of memory, as no two of them run at the same time.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gemma_tune.base.capturing import capturing, is_closed
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.base.words import first_line
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.train.batches import trained_count, trained_positions
from gemma_tune.train.buckets import Bucket, Buckets
from gemma_tune.train.cuda_attention import choose_for
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.loss import IGNORE_INDEX

MOST_TOO_LARGE = 3  # shapes without memory, after which no other is tried


class Body(Protocol):
    """What a captured step computes, of numbers that are copied to the device in one go.

    Attributes:
        model: that computes it.
        what: a name for such steps.
    """

    model: Any
    what: str

    def takes(self, part: Mapping[str, Any]) -> bool:
        """Whether it is for a piece like this one."""

    def shape(self, part: Mapping[str, Any]) -> tuple[int, ...]:
        """Rows of a piece on the CPU, tokens of the longest, trained positions, and perhaps tokens of pictures: what a
        bucket has to hold."""

    def size(self, bucket: Bucket) -> int:
        """How many numbers :meth:`filled` gives."""

    def filled(self, part: Mapping[str, Any], bucket: Bucket) -> torch.Tensor:
        """A piece padded to a bucket's shape (size,) int32, on the CPU."""

    def prepare(self, bucket: Bucket) -> None:
        """Decide what cannot be decided in a capture."""

    def loss(self, flat: torch.Tensor, bucket: Bucket, weights: torch.Tensor) -> torch.Tensor:
        """What the piece adds to the loss of the step (fp32 scalar), of what :meth:`filled` made, on the device.

        Args:
            weights: (2,) factors, see :meth:`CapturedSteps.run`. All are read from where they stand then.
        """


class OfText:
    """Of a :class:`Body` that takes no pictures."""

    what = "steps"

    def takes(self, part: Mapping[str, Any]) -> bool:
        return PICTURES not in part


class RowsBeside(OfText):
    """Of a :class:`Body` whose rows are padded to one length: which attention that takes."""

    def prepare(self, bucket: Bucket) -> None:
        choose_for(bucket.rows, bucket.length)


@dataclass
class LearnedTokens(RowsBeside):
    """The loss of tokens: sums in nats, times the first weight. A :class:`Body`."""

    model: Any

    def shape(self, part: Mapping[str, Any]) -> tuple[int, int, int]:
        return (*part["input_ids"].shape, trained_count(part["labels"]))

    def size(self, bucket: Bucket) -> int:
        return size_of(bucket)

    def filled(self, part: Mapping[str, Any], bucket: Bucket) -> torch.Tensor:
        return filled(part, bucket)

    def loss(self, flat: torch.Tensor, bucket: Bucket, weights: torch.Tensor) -> torch.Tensor:
        ids, positions, targets = inputs_of(flat, bucket)
        return self.model(input_ids=ids, positions=positions, targets=targets)["loss"] * weights[0]


def size_of(bucket: Bucket) -> int:
    """How many numbers :func:`filled` gives."""
    return bucket.rows * bucket.length + 2 * bucket.positions


def filled(part: Mapping[str, torch.Tensor], bucket: Bucket) -> torch.Tensor:
    """A piece padded to a bucket's shape, as one tensor that is sent to the device in one go.

    Args:
        part: ``input_ids`` and ``labels`` (rows, length) on the CPU, not larger than the bucket.

    Returns:
        (rows x length + 2 x positions,) int32: ids, positions, targets, see :func:`inputs_of`. Positions that are
        filled up point to different places, as many gradients of zero added to one would wait for each other.
    """
    rows, length = part["input_ids"].shape
    size = bucket.rows * bucket.length
    flat = torch.zeros(size_of(bucket), dtype=torch.int32)
    flat[:size].view(bucket.rows, bucket.length)[:rows, :length] = part["input_ids"]
    positions, targets = trained_positions(part["labels"])
    count = len(positions)
    wider = positions // length * bucket.length + positions % length
    places, wanted = flat[size:size + bucket.positions], flat[size + bucket.positions:]
    places[:count] = wider
    places[count:] = torch.arange(bucket.positions - count, dtype=torch.int32) % size
    wanted[:count] = targets
    wanted[count:] = IGNORE_INDEX
    return flat


def inputs_of(flat: torch.Tensor, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (rows, length), positions and targets (positions,) of what :func:`filled` made, all int64."""
    size = bucket.rows * bucket.length
    ids, positions, targets = flat.split([size, bucket.positions, bucket.positions])
    return ids.view(bucket.rows, bucket.length).long(), positions.long(), targets.long()


@dataclass
class _Captured:
    graph: Any
    inputs: torch.Tensor
    pool: Any  # what PyTorch knows it by


class Pool:
    """Memory that captured graphs share, of which no two run at the same time.

    A pool in use never gives memory back: what a larger shape needs is taken beside what smaller ones left, not in its
    place. So the largest shape is captured first, and all others find room in what it left.

    Attributes:
        first: the steps that need most of it.
    """

    def __init__(self) -> None:
        self.first: CapturedSteps | None = None
        self._handle: Any = None
        self._held: Counter = Counter()  # graphs by the handle that they were captured with

    def __len__(self) -> int:
        return self._held.total()

    @property
    def handle(self) -> Any:
        """What PyTorch knows it by: another one once it takes nothing more by the last."""
        if self._handle is None or is_closed(self._handle):
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def hold(self, handle: Any) -> None:
        """A graph has been captured into it."""
        self._held[handle] += 1

    def release(self, handles: Iterable[Any]) -> None:
        """The graphs with these handles are gone, or none but one that could not be captured to its end.

        With the last of them PyTorch gives the pool up, and refuses to capture into it again.
        """
        self._held.subtract(handles)
        if not self._held[self._handle]:
            self._handle = None


class CapturedSteps:
    """Forward and backward pass of pieces, replayed where that pays.

    Args:
        body: what they compute.
        gradients: where it adds; also the loss.
        buckets: the training's shapes.
        pool: memory that is shared with other captured steps, none of which runs at the same time.
        backward: False for the loss alone, of an evaluation.
        into: the scalar to which losses are added, if not ``gradients.loss``.

    Attributes:
        seconds: spent on capturing so far.
        instead: what runs pieces where these cannot be captured after all.
        beside: what runs pieces that are not for the body.
    """

    def __init__(self, body: Body, gradients: Gradients, buckets: Buckets, listener: Listener,
                 pool: Pool | None = None, backward: bool = True, into: torch.Tensor | None = None):
        self.body, self.gradients, self.buckets, self.listener, self.backward = (
            body, gradients, buckets, listener, backward)
        self.into = gradients.loss if into is None else into
        self.seconds = 0.0
        self.instead: CapturedSteps | None = None
        self.beside: CapturedSteps | None = None
        self._weights = torch.zeros(2, device=gradients.device)
        self.pool = Pool() if pool is None else pool
        self._graphs: dict[Bucket, _Captured] = {}
        self._inputs: torch.Tensor | None = None  # where all graphs read, one after the other
        self._broken = False
        self._too_large = 0  # shapes that found no memory

    def __len__(self) -> int:
        return len(self._graphs) + sum(len(others) for others in (self.instead, self.beside) if others is not None)

    def each(self) -> Iterator[CapturedSteps]:
        """These, and all that run pieces in their place."""
        yield self
        for others in (self.instead, self.beside):
            if others is not None:
                yield from others.each()

    def run(self, part: Mapping[str, Any], *weights: float) -> bool:
        """Forward and backward pass of a piece; False, with nothing done, where it has to go its own way.

        Args:
            part: on the CPU, as the body takes it.
            weights: factors on its sums: what a trained token counts, 1 / those of the step.
        """
        if not self.body.takes(part):
            return self.beside is not None and self.beside.run(part, *weights)
        if not self._broken and self._ran(part, weights):
            return True
        return self._broken and self.instead is not None and self.instead.run(part, *weights)

    def _ran(self, part: Mapping[str, Any], weights: Sequence[float]) -> bool:
        bucket = self.buckets.find(*self.body.shape(part))
        if bucket is None:
            return False
        for steps in (self.pool.first, self):
            if steps is not None and not len(self.pool):  # nothing is captured yet, or cannot be of the first ones
                steps._capture_largest()
        captured = self._graphs.get(bucket) or self._capture(bucket)
        if captured is None:
            return False
        flat = self.body.filled(part, bucket)
        captured.inputs.copy_(flat.pin_memory(), non_blocking=True)
        for place, weight in zip(self._weights, weights):
            place.fill_(weight)
        captured.graph.replay()
        return True

    def seconds_of(self, part: Mapping[str, Any], *weights: float, times: int = 5) -> float:
        """What running a piece takes that has run before."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            self.run(part, *weights)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / times

    def forget(self) -> None:
        """Free all graphs and their memory; they are captured anew when they are needed."""
        handles = [captured.pool for captured in self._graphs.values()]
        self._graphs.clear()
        self._inputs = None
        self.pool.release(handles)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def _capture_largest(self) -> None:
        if not self._broken and (bucket := self.buckets.largest):
            self._capture(bucket)

    def _capture(self, bucket: Bucket) -> _Captured | None:
        if self._broken or bucket not in self.buckets.counts:
            return None
        began = time.perf_counter()
        try:
            self._graphs[bucket] = self._made(bucket)
        except Exception as e:  # noqa: BLE001 - whatever cannot be captured, or a kernel for it not be made
            problem, no_memory = first_line(e), is_out_of_memory(e)
        else:
            self.pool.hold(self._graphs[bucket].pool)
            return self._graphs[bucket]
        finally:
            self.seconds += time.perf_counter() - began
        # Outside the handler, whose traceback keeps alive what the capture has built up.
        self._give_up(bucket, problem, no_memory)
        return None

    def _made(self, bucket: Bucket) -> _Captured:
        if self._inputs is None:
            size = max(map(self.body.size, self.buckets.counts))
            self._inputs = torch.zeros(size, dtype=torch.int32, device=self.gradients.device)
        inputs = self._inputs[:self.body.size(bucket)].zero_()  # not what another shape was given
        self.body.prepare(bucket)
        pool = self.pool.handle
        with _learning(self.body.model, self.backward), capturing(pool) as graph:
            loss = self.body.loss(inputs, bucket, self._weights)
            if self.backward:
                loss.backward()
            self.into += loss.detach()
        return _Captured(graph, inputs, pool)

    def _give_up(self, bucket: Bucket, problem: str, no_memory: bool) -> None:
        """Leave out a shape for which there is no memory; more than a few of them, or anything else, leaves out all."""
        self._too_large += no_memory
        if no_memory and self._too_large < MOST_TOO_LARGE:
            del self.buckets.counts[bucket]
            self.pool.release(())
            torch.cuda.empty_cache()
            self.listener.note(f"{bucket.rows} x {bucket.length:,} tokens do not fit the memory as a captured step, "
                               "and go their own way")
            return
        self._broken = True
        how = "go one kernel at a time" if self.instead is None else "are padded again"
        self.listener.note(f"{self.body.what} cannot be captured here and {how}: {problem}")
        self.forget()


@contextlib.contextmanager
def _learning(model: Any, learns: bool) -> Iterator[None]:
    """With gradients and dropout, or without both, while the context lasts: an evaluation that comes before the first
    step has the training's largest shape captured."""
    was_training = model.training
    model.train(learns)
    try:
        with torch.set_grad_enabled(learns):
            yield
    finally:
        model.train(was_training)
