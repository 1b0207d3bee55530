"""What happens before a training's first step: faster layers, checked; the longest batch, tried; steps, captured."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gemma_tune.base.at_most import TookTooLong, at_most
from gemma_tune.base.capturing import grouped_products_wait
from gemma_tune.base.errors import UserError
from gemma_tune.base.finite import not_finite
from gemma_tune.base.words import first_line, span
from gemma_tune.lora.experts import count_of
from gemma_tune.train import processes
from gemma_tune.train.batches import SortedBatches
from gemma_tune.train.buckets import Buckets, costs_of, pieces_of, shapes_of_pieces
from gemma_tune.train.captured import Body, CapturedSteps, LearnedTokens, Pool
from gemma_tune.train.captured_pictures import LearnedPictures
from gemma_tune.train.kernels import compiled_layers, fast_layers, worth_compiling
from gemma_tune.train.packed import packed_if_faster
from gemma_tune.train.products import kernels_fault

MOST_STEPS = 20_000  # of a training whose shapes are looked at; more of them say nothing new


def longest_compiling(training: float) -> float:
    """Seconds that compiling may take for a training of so many without it: a quarter, which is about what compiled
    layers save, but at least one minute and at most ten."""
    return min(600.0, max(60.0, training / 4))


class FirstBatch:
    """The part of :class:`gemma_tune.train.trainer.GemmaTrainer` that is done when its first step begins.

    Attributes:
        longest_seconds: that the longest batch took.
    """

    longest_seconds = 0.0
    probed = "the longest batch"  # what is tried before the first step
    pieces = "conversations"  # what goes through the model at once

    def expected_seconds(self) -> float:
        """Seconds that all steps will take, as the longest batch took them."""
        return self.longest_seconds * self._longest_batches_worth()

    @contextlib.contextmanager
    def fast(self, compiled: bool = False, captured: bool | None = None) -> Iterator[None]:
        """Faster layers in place of the library's, checked against the model's own logits, and the longest batch tried.

        Args:
            compiled: try ``torch.compile`` too, and keep it if it is faster.
            captured: capture the steps; None does so on a CUDA GPU, where they can be.

        Raises:
            UserError: the model's head does something that the loss here does not know; training it would be wrong.
        """
        ids = self._sample()
        theirs = self._loss_by_logits(ids)
        with contextlib.ExitStack() as layers:
            self.refresh_adapters = layers.enter_context(fast_layers(self.model)).refresh
            self._compare(ids, theirs)
            self._tell_without_kernels()
            if self.args.activation_checkpointing:  # train() would, but the probe comes before it
                self.model.activation_checkpointing_enable()
            self.longest_seconds = self.probe()
            self.listener.note(f"{self.probed} takes {self.longest_seconds:.1f} s")
            wanted, why_not = captured is not False, self._why_not_captured()
            if compiled and wanted and not why_not:
                self.listener.note("--compile is left out: steps are captured here, which takes seconds instead of "
                                   "minutes; with --no-cuda-graphs it is tried")
                compiled = False
            if compiled and not self._compile(layers):
                self.refresh_adapters = layers.enter_context(fast_layers(self.model)).refresh
            self.micro_batch = processes.least(self.micro_batch)
            # Memory that runs out later does so in one process, while the others wait for its gradients.
            self.in_step = self.accelerator.num_processes > 1
            if wanted and not why_not and not self.compiled:
                self._capture()
            elif why_not and (captured or wanted and self.accelerator.device.type == "cuda"):
                self.listener.note(f"steps are not captured: {why_not}")
            try:
                yield
            finally:
                self.forget_captured()

    def forget_captured(self) -> None:
        """Free the memory of captured steps, which what comes after the training can use."""
        for steps in (self.captured, self.captured_evaluation):
            for some in steps.each() if steps is not None else ():
                if some:  # it has captured any
                    some.forget()

    def capture_no_more(self) -> None:
        """Let all steps go one kernel at a time from now on."""
        self.captured = self.captured_evaluation = None

    def _tell_without_kernels(self) -> None:
        device = self.accelerator.device
        if device.type == "cuda" and (fault := kernels_fault(device)):
            self.listener.note(f"layers go one operation at a time, as Triton's kernels do not run here: {fault}")

    def _why_not_captured(self) -> str | None:
        """What stands against CUDA graphs here."""
        if self.accelerator.device.type != "cuda":
            return "CUDA graphs need a CUDA GPU"
        if self.args.fp16:
            return "in fp16 the loss scaler has to look at each step's gradients"
        if count_of(self.causal_lm) and grouped_products_wait(self.accelerator.device, self.causal_lm.dtype):
            return ("PyTorch's products by expert wait for the GPU here: they are one kernel in bf16 on compute "
                    "capability 9 and 10")
        if any("dynamic" in str(getattr(m, "rope_type", "")) for m in self.causal_lm.modules()):
            return "the model's rotations depend on how long rows are"
        return "with --strategy fsdp the processes gather weights within a step" if self.sharded else None

    def _capture(self) -> None:
        """Capture the steps from now on, where a GPU would wait for them to be started otherwise."""
        shapes, tokens = self._shapes()
        buckets = Buckets(shapes, costs_of(self.causal_lm))
        steps = CapturedSteps(self.body(), self.gradients, buckets, self.listener)
        pictured = self._capture_pictures(steps.pool)
        if not buckets.counts and pictured is None:
            return
        self.captured, pool = steps, steps.pool
        # Its backward pass keeps what evaluations need not. Packing is tried in that memory as well.
        pool.first = max((some for some in (steps, pictured) if some is not None and some.buckets.counts),
                         key=lambda some: some.buckets.largest.rows * some.buckets.largest.length)
        if buckets.counts:
            padding, by_itself = buckets.fit(shapes, tokens)
            packed = packed_if_faster(self, steps, tokens, padding)
            if packed is None:
                self.listener.note(buckets.described(padding, by_itself, len(shapes)))
            else:
                self.captured = packed
                pool.first = packed if pool.first is steps else pictured
        self.captured.beside = pictured
        self._capture_evaluations()

    def _capture_pictures(self, pool: Pool) -> CapturedSteps | None:
        """Steps of pieces with pictures; None where none of them is to be captured."""
        if (body := self.body_of_pictures()) is None:
            return None
        shapes, tokens = self._shapes(pictured=True)
        buckets = Buckets(shapes, costs_of(self.causal_lm))
        if not buckets.counts:
            return None
        self.listener.note(buckets.described(*buckets.fit(shapes, tokens), len(shapes), body.what))
        return CapturedSteps(body, self.gradients, buckets, self.listener, pool)

    def body(self, evaluating: bool = False) -> Body:
        """What a captured step computes, or a captured pass of an evaluation."""
        return LearnedTokens(self.model)

    def body_of_pictures(self) -> Body | None:
        """As :meth:`body`, of pieces with pictures; None where these go one kernel at a time."""
        return LearnedPictures(self.model, self.shown) if self.shown is not None else None

    def sizes(self, side: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Sequences of each row of the training (0) or the validation (1); tokens of its longest, and trained ones."""
        return 1, np.asarray(self.lengths[side]), np.asarray(self.trained[side])

    def _capture_evaluations(self) -> None:
        """Capture the validation's forward passes as well, which come again in each evaluation."""
        if self.eval_dataset is None:
            return
        evaluations = 2 + self.args.max_steps // max(1, int(self.args.eval_steps or self.args.max_steps))

        def captured(body: Body, pictured: bool) -> CapturedSteps:
            batches = self._those(SortedBatches(self.lengths[1], self._share(accumulation=1)), 1, pictured)
            shapes = np.repeat(self._shapes_of(batches, 1, pictured), evaluations, axis=0)
            return CapturedSteps(body, self.gradients, Buckets(shapes, costs_of(self.causal_lm)), self.listener,
                                 self.captured.pool, backward=False)

        self.captured_evaluation = captured(self.body(evaluating=True), False)
        if (body := self.body_of_pictures()) is not None:
            self.captured_evaluation.beside = captured(body, True)

    def _shapes(self, pictured: bool = False) -> tuple[np.ndarray, int]:
        """Of this process's pieces, see ``shapes_of_pieces``, and the tokens of all of them."""
        batches, lengths = self.batches(pictured), np.asarray(self.lengths[0])
        tokens = sum(int(lengths[batch].sum()) for batch in batches)
        return self._shapes_of(batches, 0, pictured), tokens

    def _shapes_of(self, batches: Iterable[Sequence[int]], side: int, pictured: bool) -> np.ndarray:
        parts = self.shown.parts[side] if pictured else None
        return shapes_of_pieces(batches, *self.sizes(side), self.micro_batch, parts)

    def batches(self, pictured: bool = False) -> list[Sequence[int]]:
        """The rows of this process's forward passes of the whole training, or of as many steps as are looked at, as far
        as they have no pictures; or those others."""
        share = self._sampler().share
        steps = itertools.islice(self._steps(), min(self.args.max_steps, MOST_STEPS))
        return self._those([batch for rows in steps for batch in share.batches(rows)], 0, pictured)

    def _those(self, batches: Iterable[Sequence[int]], side: int, pictured: bool) -> list[Sequence[int]]:
        """Of batches of the training (0) or the validation (1) the pieces that have pictures, or those that have none.
        """
        if self.shown is None:
            return list(batches)
        has = self.pictured(side)
        return [part for part in pieces_of(batches, self.micro_batch) if has[part].any() == pictured]

    def pictured(self, side: int) -> np.ndarray:
        """Which rows of the training (0) or the validation (1) have pictures (bool)."""
        return self.shown.pictured[side]

    def _steps(self) -> Iterator[np.ndarray]:
        """The rows of each step of all processes together, epoch by epoch without end."""
        sampler = self._sampler()
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield from sampler.steps()

    def _compile(self, layers: contextlib.ExitStack) -> bool:
        """Put compiled layers in place of the fast ones; False, with nothing in place, where that does not help."""
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InductorError, InvalidCxxCompiler

        if not hasattr(self.causal_lm.get_decoder(), "layers"):
            layers.close()
            self.listener.warn("--compile does not know this model's layers, going on without it")
            return False
        before, micro_batch = self.probe(), self.micro_batch
        layers.close()
        try:
            if self.accelerator.device.type == "cpu":
                get_cpp_compiler()  # it would be missed only after the layers have been traced
            bound = longest_compiling(before * self._longest_batches_worth())
            self.listener.note(f"compiling the model's layers, which can take some minutes ({span(bound)} at most)")
            layers.enter_context(compiled_layers(self.model))
            self.compiled = True  # pieces with pictures go by themselves, as they will in the steps
            with at_most(bound):
                compiling = self.probe()
            after = self.probe()
        except TookTooLong:
            self.compiled = False
            torch._dynamo.reset()
            self.gradients.clear()
            self.listener.warn(f"--compile was not done after {span(bound)}, going on without it: more is not worth it "
                               f"for a training of about {span(before * self._longest_batches_worth())}")
        except (TorchDynamoException, InductorError, InvalidCxxCompiler) as e:
            self.compiled = False
            self.listener.warn(f"--compile does not work here, going on without it: {first_line(e)}")
        else:
            self.compiled, sentence = worth_compiling(before, after, compiling, self._longest_batches_worth())
            self.listener.note(sentence)
        if not self.compiled:
            layers.close()
            self.micro_batch = micro_batch
        return self.compiled

    def _longest_batches_worth(self) -> float:
        """The whole training in batches as long as the longest."""
        longest = sum(self.lengths[0][row] for row in next(iter(self._sampler())))
        epochs = self.args.max_steps * self._share(self.args.gradient_accumulation_steps).step / len(self.lengths[0])
        return float(sum(self.lengths[0]) * epochs / longest / self.accelerator.num_processes)

    def _sample(self) -> torch.Tensor:
        """The beginning of the shortest row (1, length), of a row with pictures that of its text."""
        shortest = int(min(range(len(self.lengths[0])), key=self.lengths[0].__getitem__))
        ids = torch.as_tensor(self.train_dataset[shortest]["input_ids"])
        text = ids if self.shown is None else ids[ids != self.shown.eye.soft_id]
        return text[:48].to(self.causal_lm.device)[None]

    def _loss_by_logits(self, ids: torch.Tensor) -> float:
        with self.evaluating():
            logits = self.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()

    def _compare(self, ids: torch.Tensor, theirs: float, tolerance: float = 0.02) -> None:
        with self.evaluating():
            ours = self._summed_loss(self.model, {"input_ids": ids, "labels": ids}).item()
        count = max(1, ids.shape[1] - 1)
        if not (math.isfinite(ours) and math.isfinite(theirs)):
            raise not_finite(self.model)
        if not abs(ours - theirs) <= tolerance * (abs(theirs) + count):
            raise UserError(f"this model ({self.causal_lm.config.model_type}) computes its logits in a way that "
                            f"gemma-tune does not know: loss {ours / count:.3f} here, {theirs / count:.3f} by the "
                            "model itself", "use a model of another family, such as Gemma, Llama or Qwen")

    def probe(self) -> float:
        """Forward and backward pass of the longest batch, before anything else takes time; returns its seconds.

        Memory that does not suffice shows here, and the micro-batch becomes one that fits.
        """
        batch = self.collate([self.train_dataset[int(row)] for row in next(iter(self._sampler()))])
        return self.timed(batch, self.learned_in(batch))

    def timed(self, batch: dict[str, Any], learned: int) -> float:
        """Seconds of a forward and backward pass of a batch, which learns so many tokens, and leaves nothing behind."""
        began = time.perf_counter()
        device = self.accelerator.device
        on_gpu = device.type != "cpu"
        self.gradients.clear()
        with torch.random.fork_rng([device] if on_gpu else []):
            self.training_step(self.model, batch, learned)
        if on_gpu:
            torch.get_device_module(device).synchronize()
        seconds = time.perf_counter() - began
        self.gradients.clear()
        return seconds
