"""TRL's SFTTrainer with our loss, our batches and our evaluation, that finds its own way when memory runs out.

TRL's own LM head computes entropy and accuracy over the whole vocabulary for every position; on a CPU that is four
fifths of a step. Overriding ``compute_loss`` in a subclass is the way TRL's documentation recommends.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, remove
from gemma_tune.base.finite import not_finite
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.lora.layers import trained_weights
from gemma_tune.train import processes
from gemma_tune.train.batches import LengthGroupedBatches, Share, SortedBatches, collate, loader, pieces
from gemma_tune.train.checkpoints import Training, rotate, seal
from gemma_tune.train.kernels import compiled_layers, fast_layers, not_compiled, worth_compiling
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.summed_loss import install_summed_loss


class GemmaTrainer(SFTTrainer):
    """SFTTrainer on precomputed ids and labels; the loss is summed over trained tokens with one normaliser.

    Args:
        training: what the checkpoints belong to.
        lengths: tokens of each training sequence, and of each validation sequence.
        micro_batch: rows that go through the model at once; a batch is worked on in such pieces.
        rate: the learning rate of a step, from 0 on, as a share of the peak.
    """

    def __init__(self, *args: Any, training: Training, lengths: tuple[Sequence[int], Sequence[int]],
                 micro_batch: int, listener: Listener, rate: Callable[[int], float], **kwargs: Any):
        self.sharded = _stay_in_shards(kwargs["model"])
        super().__init__(*args, **kwargs)
        for parameter in self._trainable():  # TRL makes those of a 4-bit base bf16, in which small steps are lost
            parameter.data = parameter.data.float()
        self.training, self.lengths, self.micro_batch, self.listener = training, lengths, micro_batch, listener
        self.rate = rate
        self.tokens_seen = self.tokens_of_all = 0  # of this process; of all, when log() was called last
        self.in_step, self.compiled = self.sharded, False
        # compute_loss divides by the tokens of the whole effective batch, so the trainer must count them and must
        # not divide by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        install_summed_loss(self.causal_lm)
        if self.sharded:  # DDP takes care of the adapter, which every process holds whole
            self.model._ddp_params_and_buffers_to_ignore = [
                name for name, p in self.model.named_parameters(remove_duplicate=False) if hasattr(p, "full_tensor")]

    @property
    def causal_lm(self) -> Any:
        """The base model, without PEFT and wrappers."""
        return self.accelerator.unwrap_model(self.model).get_base_model()

    # ---- loss --------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy in nats over the trained tokens of the effective batch (fp32 scalar)."""
        if return_outputs:
            raise NotImplementedError("the logits are never built; evaluate() needs the loss alone")
        total = self._summed_loss(model, inputs)
        if num_items_in_batch is None:
            num_items_in_batch = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()
        # Gradients are averaged over the processes, each of which divides by the tokens of all of them.
        return total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    @staticmethod
    def _summed_loss(model, inputs) -> torch.Tensor:
        """In nats, through the wrapped model, whose hooks gather weights and average gradients."""
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"])["loss"]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of one batch, in pieces that fit the memory.

        Raises:
            RuntimeError: out of memory with a single row, or with several processes, which must stay in step.
        """
        inputs = self._prepare_inputs(inputs)
        rows = len(inputs["lengths"])
        earlier = [p.grad.clone() if self._divisible(rows) and p.grad is not None else None
                   for p in self._trainable()]
        while True:
            try:
                loss = self._piecewise_step(model, inputs, num_items_in_batch)
                break
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e) or not self._divisible(rows):
                    raise
            # Outside the handler, whose traceback keeps the activations alive.
            for parameter, grad in zip(self._trainable(), earlier):
                parameter.grad = None if grad is None else grad.clone()
            self._halve_micro_batch(rows)
        self.tokens_seen += int(inputs["lengths"].sum())
        return loss

    def _divisible(self, rows: int) -> bool:
        """Whether a batch of so many rows could go through the model in smaller pieces than now."""
        return min(self.micro_batch, rows) > 1 and not self.in_step

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _piecewise_step(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        parts = self._pieces(inputs)
        loss = torch.zeros((), device=self.accelerator.device)
        for n, part in enumerate(parts):
            # Only the last piece of a step sends its gradients to the other processes.
            wait = self.accelerator.no_sync(model) if n < len(parts) - 1 else contextlib.nullcontext()
            with wait:
                loss += super().training_step(model, part, num_items_in_batch)
        return loss

    def _pieces(self, batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        parts = list(pieces(batch, self.micro_batch))
        if self.sharded:  # in each pass the processes gather every layer from each other, so all make as many
            parts += [self._prepare_inputs(collate([]))] * (processes.most(len(parts)) - len(parts))
        return parts

    def _halve_micro_batch(self, rows: int) -> None:
        gc.collect()
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        before = min(self.micro_batch, rows)  # the last batch of an epoch can have fewer
        self.micro_batch = before // 2
        self.listener.warn(f"out of memory with {before} conversations at once: going on with {self.micro_batch}; a "
                           "step still learns from the same ones")

    # ---- before the first step ---------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def fast(self, compiled: bool = False) -> Iterator[None]:
        """Faster layers in place of the library's, checked against the model's own logits, and the longest batch tried.

        Args:
            compiled: try ``torch.compile`` too, and keep it if it is faster.

        Raises:
            UserError: the model's head does something that the loss here does not know; training it would be wrong.
        """
        ids = self._sample()
        theirs = self._loss_by_logits(ids)
        with contextlib.ExitStack() as layers:
            layers.enter_context(fast_layers(self.model))
            self._compare(ids, theirs)
            if self.args.activation_checkpointing:  # train() would, but the probe comes before it
                self.model.activation_checkpointing_enable()
            seconds = self.probe()
            self.listener.note(f"the longest batch takes {seconds:.1f} s")
            if compiled and not self._compile(layers):
                layers.enter_context(fast_layers(self.model))
            self.micro_batch = processes.least(self.micro_batch)
            # Memory that runs out later does so in one process, while the others wait for its gradients.
            self.in_step = self.accelerator.num_processes > 1
            yield

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
            self.listener.note("compiling the model's layers, which can take some minutes")
            layers.enter_context(compiled_layers(self.model))
            compiling = self.probe()
            after = self.probe()
        except (TorchDynamoException, InductorError, InvalidCxxCompiler) as e:
            layers.close()
            self.micro_batch = micro_batch
            self.listener.warn(f"--compile does not work here, going on without it: {str(e).strip().splitlines()[0]}")
            return False
        kept, sentence = worth_compiling(before, after, compiling, self._longest_batches_worth())
        self.listener.note(sentence)
        if not kept:
            layers.close()
            self.micro_batch = micro_batch
        self.compiled = kept
        return kept

    def _longest_batches_worth(self) -> float:
        """The whole training in batches as long as the longest."""
        longest = sum(self.lengths[0][row] for row in next(iter(self._sampler())))
        epochs = self.args.max_steps * self._share(self.args.gradient_accumulation_steps).step / len(self.lengths[0])
        return float(sum(self.lengths[0]) * epochs / longest / self.accelerator.num_processes)

    def _sample(self) -> torch.Tensor:
        """The beginning of the shortest row (1, length)."""
        shortest = int(min(range(len(self.lengths[0])), key=self.lengths[0].__getitem__))
        return torch.as_tensor(self.train_dataset[shortest]["input_ids"][:48], device=self.causal_lm.device)[None]

    def _loss_by_logits(self, ids: torch.Tensor) -> float:
        with self._evaluating():
            logits = self.causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            return torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()

    def _compare(self, ids: torch.Tensor, theirs: float, tolerance: float = 0.02) -> None:
        with self._evaluating():
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
        sampler = self._sampler()
        batch = self._prepare_inputs(collate([self.train_dataset[int(row)] for row in next(iter(sampler))]))
        count = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
        began = time.perf_counter()
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.accelerator.no_sync(self.model):
            self.training_step(self.model, batch, count)
        seconds = time.perf_counter() - began
        self.tokens_seen = 0
        self.model.zero_grad(set_to_none=True)
        return seconds

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss over all trained tokens of the validation rows.

        The trainer's own evaluation averages the means of batches, in which a token of a short answer counts more.
        """
        batches = SortedBatches(self.lengths[1], self._share(accumulation=1))
        total, count = 0.0, 0
        with self._evaluating():
            for batch in loader(self.eval_dataset, batches, self.accelerator):
                for part in self._pieces(batch):
                    total += self._summed_loss(self.model, part).item()
                    count += int((part["labels"][:, 1:] != IGNORE_INDEX).sum())
        total, count = map(sum, zip(*processes.gathered((total, count))))
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
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
        return LengthGroupedBatches(self.lengths[0], self._share(self.args.gradient_accumulation_steps), self.args.seed)

    def get_train_dataloader(self):
        """Batches of rows of similar length, each row once per epoch."""
        return loader(self.train_dataset, self._sampler(), self.accelerator)

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The rate of each step as planned; the library's own schedules begin with a step that learns nothing."""
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, self.rate)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without TRL's metrics of its own head."""
        self.tokens_of_all = processes.total(self.tokens_seen)
        Trainer.log(self, logs, start_time)

    def _save(self, output_dir=None, state_dict=None):
        Trainer._save(self, output_dir, trained_weights(self.model))

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
        if processes.is_main():
            rotate(checkpoint.parent)


def _stay_in_shards(model: Any) -> bool:
    """Whether each process holds a part of the base model; the Trainer may then treat it like any frozen model.

    It would refuse to save an optimiser for such a model, because it thinks of trained shards. Only the adapter is
    trained here, and that is whole.
    """
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return False
    model._is_distributed_loading_by_transformers = False
    return True
