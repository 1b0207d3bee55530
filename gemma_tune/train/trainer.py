"""TRL's SFTTrainer with our loss, our batches and our evaluation, that finds its own way when memory runs out.

TRL's own LM head computes entropy and accuracy over the whole vocabulary for every position; on a CPU that is four
fifths of a step. Overriding ``compute_loss`` in a subclass is the way TRL's documentation recommends.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd.graph import increment_version
from transformers import Trainer
from trl import SFTTrainer

from gemma_tune.base.files import os_errors, remove
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import free_unused, is_out_of_memory
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.lora.layers import saved_weights
from gemma_tune.lora.whole import head_once, put_back
from gemma_tune.train import processes
from gemma_tune.train.adamw import AdamWAsOne
from gemma_tune.train.base_weights import BaseWeights
from gemma_tune.train.batches import (
    LengthGroupedBatches,
    Share,
    SortedBatches,
    collate,
    loader,
    pieces,
    trained_count,
    trained_positions,
)
from gemma_tune.train.captured import CapturedSteps
from gemma_tune.train.checkpoints import Training, seal
from gemma_tune.train.culprits import RowNames, by_number, not_finite_step
from gemma_tune.train.first_batch import FirstBatch
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.kernels import not_compiled
from gemma_tune.train.late import LateFigures
from gemma_tune.train.looking import Shown
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.token_rows import NewTokens, forget
from gemma_tune.train.whole import train_whole

T = TypeVar("T")
MOST_FREED = 4  # times after which capturing anew takes longer than it saves
MOST_OVERFLOWS = 20  # steps in a row that the loss scaler of fp16 may skip
_WAYS = ("fused", "foreach", "capturable")  # of computing the same step
_OF_APPLE = "rng_state_mps.pth"  # random state of Apple's GPU, in a checkpoint


class GemmaTrainer(FirstBatch, SFTTrainer):
    """SFTTrainer on precomputed ids and labels; the loss is summed over trained tokens with one normaliser.

    Args:
        training: what the checkpoints belong to.
        lengths: tokens of each training sequence, and of each validation sequence.
        trained: how many tokens of each of them are learned, or count in the validation loss.
        micro_batch: rows that go through the model at once; a batch is worked on in such pieces.
        rate: the learning rate of a step, from 0 on, as a share of the peak.
        row_names: how an error names training sequences, by their numbers.
        shown: pictures of the training, where it has any.
        tokens: new tokens, where there are any.
    """

    def __init__(self, *args: Any, training: Training, lengths: tuple[Sequence[int], Sequence[int]],
                 trained: tuple[Sequence[int], Sequence[int]], micro_batch: int, listener: Listener,
                 rate: Callable[[int], float], row_names: RowNames = by_number, shown: Shown | None = None,
                 tokens: NewTokens | None = None, **kwargs: Any):
        self.sharded = _stay_in_shards(kwargs["model"])
        super().__init__(*args, **kwargs)
        # Gradients are summed over the processes once a step, see Gradients; DDP would do so while they are computed,
        # which a captured step cannot wait for.
        prepare = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.accelerator.prepare_model = lambda *args, **kwargs: self._settled(prepare(*args, **kwargs))
        self.whole, self.base = train_whole(self.model), BaseWeights(self.model)  # its own are made wide
        self.tokens, self._token_hooks = tokens, tokens.begin(self.model) if tokens else ()
        for parameter in self._trainable():  # TRL makes those of a 4-bit base bf16, in which small steps are lost
            parameter.data = parameter.data.float()
        self.training, self.lengths, self.micro_batch, self.listener = training, lengths, micro_batch, listener
        self.rate, self.trained, self.row_names, self.shown = rate, trained, row_names, shown
        self.tokens_seen = 0  # of all processes, in the steps of this command
        self.in_step, self.compiled = self.sharded, False
        on_gpu = self.accelerator.device.type == "cuda"
        # In fp16 the loss scaler looks at the gradients and decides by itself, which takes its time.
        self.waits = not on_gpu or self.args.fp16
        # On a CPU, too, gradients of whole models are better not made anew in each step. Apple's GPU has no kernel for
        # their norms, where they are one tensor.
        one = on_gpu or self.accelerator.device.type == "cpu" and bool(self.whole)
        self.gradients = Gradients({name: p for name, p in self.model.named_parameters() if p.requires_grad}, fixed=one)
        self.captured: CapturedSteps | None = None
        self.captured_evaluation: CapturedSteps | None = None
        self.freed = 0  # times that the memory of captured steps was needed
        self.refresh_adapters: Callable[[], None] = lambda: None  # see FastLayers
        self.figures = LateFigures(self.accelerator.device)
        self.overflows = 0  # steps in a row, in fp16
        self._bad = torch.zeros((), device=self.accelerator.device)  # 1 where the step must not be taken
        self._facts: dict[str, Any] = {"tokens": 0, "trained": 1, "rows": []}
        self.model.zero_grad = lambda set_to_none=True: self.gradients.clear()
        processes.same_everywhere([p.data for p in self._trainable()])
        install_summed_loss(self.causal_lm)

    collate = staticmethod(collate)  # rows of the training as a batch
    split = staticmethod(pieces)  # which goes through the model in pieces

    @staticmethod
    def learned_in(batch: dict[str, Any]) -> int:
        """What the loss of a step with this batch alone is a mean over: its trained tokens."""
        return trained_count(batch["labels"])

    @property
    def causal_lm(self) -> Any:
        """The base model, without PEFT and wrappers."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    def _settled(self, model: Any) -> Any:
        """The model, after it was prepared, which may have moved its weights."""
        self.gradients.settle()
        return model

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def begin_anew(self) -> None:
        """Give the modules that are trained as a whole the weights that they began with."""
        self.base.begin_anew()
        if self.tokens and self.tokens.whole:
            self.tokens.begin_anew(self.model)

    def take_off(self) -> None:
        """Have the base's own modules in the model again, before PEFT takes off its layers."""
        self.base.stay()
        put_back(self.model)
        forget(self.model, self._token_hooks)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Round the weights as they are now, where captured steps read them rounded."""
        self.refresh_adapters()
        self.whole.refresh()

    def _get_num_items_in_batch(self, batch_samples, device):
        """The number of tokens that all processes learn in the step that begins with these batches of this one."""
        if not batch_samples:
            return None
        self.refresh()
        first = batch_samples[0]
        self._facts = {"tokens": first["step_tokens"], "trained": first["step_trained"], "rows": first["step_rows"]}
        return first["step_trained"]

    def floating_point_ops(self, inputs):
        """None are counted: the library would walk through all modules in each step."""
        return 0

    @staticmethod
    def _summed_loss(model, inputs) -> torch.Tensor:
        """In nats, through the wrapped model, whose hooks gather weights."""
        positions, targets = trained_positions(inputs["labels"])
        ids, positions, targets = (t.to(model.device, non_blocking=True)
                                   for t in (inputs["input_ids"], positions, targets))
        seen = {"seen": inputs["seen"]} if "seen" in inputs else {}
        return model(input_ids=ids, positions=positions, targets=targets, **seen)["loss"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of one batch on the CPU, in pieces that fit the memory.

        Loss and gradient are added to ``self.gradients``, as shares of the mean over the tokens of the whole step.

        Raises:
            RuntimeError: out of memory with a single row, or with several processes, which must stay in step.
        """
        if not model.training:  # it would walk through all modules in each step
            model.train()
        rows = len(inputs["lengths"])
        earlier = self.gradients.saved() if self.gradients.begun and self._divisible(rows) else None
        sums = [place.clone() for place in self.sums()]
        while True:
            self.gradients.begun = True
            try:
                self._piecewise_step(model, inputs, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e) or not self._divisible(rows):
                    raise
            # Outside the handler, whose traceback keeps the activations alive.
            self.gradients.restore(earlier)
            self._restore_sums(sums)
            self._without_captured()
            self._halve_micro_batch(rows)
        return self._bad.detach()  # the library adds up what is returned; nobody looks at it

    @property
    def _holds_captured(self) -> bool:
        """Whether there are graphs, which hold memory."""
        return any((self.captured, self.captured_evaluation))

    def _without_captured(self) -> None:
        """Free captured steps, which are made for as many rows at once as did not fit."""
        if self._holds_captured:
            self.forget_captured()
            self.listener.note("steps go one kernel at a time from now on")
        self.capture_no_more()

    def _divisible(self, rows: int) -> bool:
        """Whether a batch of so many rows could go through the model in smaller pieces than now."""
        return min(self.micro_batch, rows) > 1 and not self.in_step

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What these rows add to the mean cross-entropy in nats over the trained tokens of the step (fp32 scalar)."""
        if return_outputs:
            raise NotImplementedError("the logits are never built; evaluate() needs the loss alone")
        return self._summed_loss(model, inputs) / max(1, num_items_in_batch)

    def _piecewise_step(self, model, inputs, count: int) -> None:
        for part in self._pieces(inputs):
            if not self.replayed(self.captured, part, *self.weights(count)):
                self.with_room(functools.partial(self._eager_step, model, part, count))

    def _eager_step(self, model, part, count: int) -> None:
        part = self.with_sight(part)
        # What is compiled does not know the masks of pictures, and would be compiled anew for them.
        with not_compiled(self.model) if self.compiled and "seen" in part else contextlib.nullcontext():
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, part, num_items_in_batch=count)
            self.accelerator.backward(loss)
        self.gradients.loss += loss.detach()

    @staticmethod
    def replayed(captured: CapturedSteps | None, part: dict[str, Any], *weights: float) -> bool:
        """Whether a captured step has worked on the piece."""
        return captured is not None and captured.run(part, *weights)

    def with_room(self, work: Callable[[], T]) -> T:
        """Work on a piece that is too rare to be captured, and add to gradients and sums. Where the memory that
        captured steps hold is what it lacks, that is freed; they are captured anew when they come again."""
        if not self._holds_captured:
            return work()
        earlier = None
        try:
            earlier = self.gradients.saved(), [place.clone() for place in self.sums()]
            return work()
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        # Outside the handler, whose traceback keeps the activations alive.
        if earlier is not None:  # else there was no memory for the copy, and nothing was added
            self.gradients.restore(earlier[0])
            self._restore_sums(earlier[1])
            earlier = None
        gc.collect()
        self.forget_captured()
        self.freed += 1
        if self.freed < MOST_FREED:
            self.listener.note("a rare batch needed the memory of captured steps; they are captured anew")
        else:
            self.capture_no_more()
            self.listener.note(f"rare batches needed the memory of captured steps {self.freed} times: from now on none "
                               "is captured")
        return work()

    def sums(self) -> Sequence[torch.Tensor]:
        """What pieces add to beside the gradients."""
        return ()

    def _restore_sums(self, values: Sequence[torch.Tensor]) -> None:
        for place, value in zip(self.sums(), values):
            place.copy_(value)

    def weights(self, count: int) -> tuple[float, ...]:
        """Factors on the sums of a captured piece, see :class:`gemma_tune.train.captured.Body`."""
        return (1 / max(1, count),)

    def _pieces(self, batch: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
        parts = list(self.split(batch, self.micro_batch))
        if self.sharded:  # in each pass the processes gather every layer from each other, so all make as many
            parts += [self.collate([])] * (processes.most(len(parts)) - len(parts))
        return iter(parts)

    def with_sight(self, part: dict[str, Any]) -> dict[str, Any]:
        """A piece with what is seen in its pictures, as ``seen``; one without any is left as it is. It is put where the
        model computes piece by piece: of a whole batch it may not fit there."""
        if PICTURES not in part:
            return part
        assert self.shown is not None
        return part | {"seen": self.shown.inputs(part["input_ids"], part[PICTURES], self.accelerator.device)}

    def _halve_micro_batch(self, rows: int) -> None:
        free_unused(self.accelerator.device.type)
        before = min(self.micro_batch, rows)  # the last batch of an epoch can have fewer
        self.micro_batch = before // 2
        self.listener.warn(f"out of memory with {before} {self.pieces} at once: going on with {self.micro_batch}; a "
                           "step still learns from the same ones")

    def _clip_grad_norm(self, model):
        return self._finish_gradients(self.args.max_grad_norm)

    def _get_grad_norm(self, model, grad_norm=None):
        return self._finish_gradients(math.inf) if grad_norm is None else grad_norm

    def _finish_gradients(self, most: float) -> torch.Tensor:
        """Sum the gradients over the processes, keep a step away from the weights that is not finite, and clip.

        Raises:
            WorkFailed: it is not, where the device is waited for anyway.
        """
        self.gradients.sum_over_processes()
        if self.args.fp16:  # after it: a process whose own gradients are finite must skip the step as well
            self.accelerator.unscale_gradients()
        norms = self.gradients.norms()
        norm = torch.linalg.vector_norm(norms)
        self._facts |= {"step": self.state.global_step + 1, "learning_rate": self._get_learning_rate()}
        self.figures.add(self._facts, self.gradients.loss, norm, norms, self.measures())
        if self.waits:
            self._refuse_not_finite(self._facts, self.gradients.loss.item(), norms.tolist())
        else:
            self._bad.copy_(~(norm + self.gradients.loss).isfinite())
        if math.isfinite(most):
            self.gradients.clip(norm, most)
        return norm

    def measures(self) -> torch.Tensor | None:
        """What is to be known of a step beside its loss (k,); see :meth:`named`."""
        return None

    def named(self, measures: Sequence[float]) -> dict[str, float]:
        """What the log has of :meth:`measures`, by name."""
        return {}

    def begin_steps(self) -> None:
        """Called once, before the first evaluation: find out what is needed of the model as it is before its steps."""

    def forget_moments(self) -> None:
        """Free what the optimiser knows, after the last step, or before a training of the same weights begins anew."""
        if isinstance(self.optimizer, AdamWAsOne):
            self.optimizer.forget()
        elif self.optimizer is not None:
            self.optimizer.state.clear()
        self.optimizer = None

    def _refuse_not_finite(self, facts: dict[str, Any], loss: float, norms: list[float]) -> None:
        bad = [name for name, norm in zip(self.gradients.computed, norms) if not math.isfinite(norm)]
        # In fp16 the loss scaler finds its factor by skipping steps that overflow; only many in a row mean trouble.
        self.overflows = self.overflows + 1 if bad else 0
        if not math.isfinite(loss) or bad and (not self.args.fp16 or self.overflows > MOST_OVERFLOWS):
            raise not_finite_step(self, facts, loss, bad)

    def create_optimizer(self, model=None):
        """The library's; on a GPU one of all weights at once, which leaves them alone where ``_bad`` says so, so that
        nobody waits for it."""
        if self.optimizer is None:
            made = super().create_optimizer(model)
            self.optimizer = made if self.waits else AdamWAsOne(made.param_groups, self.gradients, self._bad)
            self.optimizer.register_load_state_dict_pre_hook(_in_own_way)
            # A fused step does not count as a change by itself, and what was rounded would pass for new.
            self.optimizer.register_step_post_hook(lambda *_: increment_version(self.gradients.weights))
        return self.optimizer

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
                                 learning_rate=None):
        self._facts["epoch"] = self.state.epoch
        control = self.control
        self.log_figures(control.should_evaluate or control.should_save or control.should_training_stop)
        control.should_log = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time,
                                         learning_rate)

    def log_figures(self, everything: bool) -> None:
        """Log the steps whose figures have arrived.

        Raises:
            WorkFailed: gradient or loss of one of them is not finite; it has not reached the weights.
        """
        for found in self.figures.read(everything):
            if not self.waits:
                self._refuse_not_finite(found.facts, found.loss, found.norms)
            self.tokens_seen += found.facts["tokens"]
            logged = {name: fact for name, fact in found.facts.items() if name != "rows"}
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logged | {
                "loss": found.loss, "grad_norm": found.norm, **self.named(found.more)})

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss over all trained tokens of the validation rows.

        The trainer's own evaluation averages the means of batches, in which a token of a short answer counts more.
        """
        batches = SortedBatches(self.lengths[1], self._share(accumulation=1))
        losses, count = [], 0
        self.refresh()
        self.gradients.clear()
        with self.evaluating():
            for batch in loader(self.eval_dataset, batches, self.accelerator):
                for part in self._pieces(batch):
                    if not self.replayed(self.captured_evaluation, part, 1.0):
                        losses.append(self.with_room(functools.partial(self._eager_loss, part)))
                    count += trained_count(part["labels"])
        losses.append(self.gradients.loss)  # of what was captured
        total = sum(torch.stack(losses).tolist())  # read once: a GPU works on meanwhile
        self.gradients.clear()
        total, count = map(sum, zip(*processes.gathered((total, count))))
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eager_loss(self, part: dict[str, Any]) -> torch.Tensor:
        return self._summed_loss(self.model, self.with_sight(part))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute without dropout, gradients and compiled layers while the context lasts."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), not_compiled(self.model) if self.compiled else contextlib.nullcontext():
                yield
        finally:
            self.model.train(was_training)

    # ---- data, log, checkpoints --------------------------------------------------------------------------------------

    def _share(self, accumulation: int) -> Share:
        return Share(self.args.per_device_train_batch_size, accumulation, self.accelerator.num_processes,
                     self.accelerator.process_index)

    def _sampler(self) -> LengthGroupedBatches:
        return LengthGroupedBatches(self.lengths[0], self._share(self.args.gradient_accumulation_steps), self.args.seed,
                                    self.trained[0])

    def get_train_dataloader(self):
        """Batches of rows of similar length, each row once per epoch."""
        return loader(self.train_dataset, self._sampler(), self.accelerator, self.collate)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The rate of each step as planned; the library's own schedules begin with a step that learns nothing."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The library's. Rates, and the steps that are evaluated and saved, stay those of this training, which may go
        on otherwise than the checkpoint's did."""
        rates = list(self.lr_scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.state.compute_steps(self.args, self.state.max_steps)
        self.lr_scheduler.base_lrs = rates
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["initial_lr"], group["lr"] = rate, rate * self.rate(self.lr_scheduler.last_epoch)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _save(self, output_dir=None, state_dict=None):
        with head_once(self.model):
            Trainer._save(self, output_dir, saved_weights(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with head_once(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_rng_state(self, output_dir):
        """The library's, which passes over Apple's GPU."""
        super()._save_rng_state(output_dir)
        if self.accelerator.device.type == "mps":
            torch.save(torch.mps.get_rng_state(), Path(output_dir) / _OF_APPLE)

    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        # A checkpoint of another device has none.
        if checkpoint and self.accelerator.device.type == "mps" and (kept := Path(checkpoint) / _OF_APPLE).exists():
            torch.mps.set_rng_state(torch.load(kept, weights_only=True))

    def _save_checkpoint(self, model, trial):
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with os_errors(checkpoint):
                # Past TRL's version, which also writes a model card into the checkpoint directory.
                Trainer._save_checkpoint(self, model, trial)
                processes.wait_for_all()  # each has written its random state
                if processes.is_main():
                    seal(checkpoint, replace(self.training, micro_batch=self.micro_batch))
        except BaseException:
            if processes.is_main():  # half of one would keep a full disk full
                remove(checkpoint)
            raise


def _in_own_way(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
    """What is loaded, to be computed as this optimiser does: a checkpoint of another device says how it was done there.
    """
    groups = [{**theirs, **{name: ours[name] for name in _WAYS if name in ours}}
              for theirs, ours in zip(loaded["param_groups"], optimizer.param_groups, strict=True)]
    return loaded | {"param_groups": groups}


def _stay_in_shards(model: Any) -> bool:
    """Whether each process holds a part of the base model; the Trainer may then treat it like any frozen model.

    It would refuse to save an optimiser for such a model, because it thinks of trained shards. Only the adapter is
    trained here, and that is whole.
    """
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return False
    model._is_distributed_loading_by_transformers = False
    return True
