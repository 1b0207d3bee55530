"""TRL's SFTTrainer with our loss, our evaluation, guards against bad numbers, and a clean way to stop.

TRL's own LM head computes entropy and accuracy over the whole vocabulary for every position; on a CPU that is four
fifths of a step. Overriding ``compute_loss`` in a subclass is the way TRL's documentation recommends.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from trl import SFTTrainer

from gemma_tune.checkpoints import Training, rotate, seal
from gemma_tune.errors import UserError, WorkFailed
from gemma_tune.listener import Listener
from gemma_tune.loss import IGNORE_INDEX, linear_cross_entropy


class GemmaTrainer(SFTTrainer):
    """SFTTrainer on precomputed ids and labels; the loss is summed over trained tokens with one normaliser.

    Args:
        training: what the checkpoints belong to.
        lengths: tokens of each training sequence.
    """

    def __init__(self, *args: Any, training: Training, lengths: Sequence[int], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.training, self.lengths = training, lengths
        self.tokens_seen = 0
        # compute_loss divides by the tokens of the whole effective batch, so the trainer must count them and must
        # not divide by the number of accumulation steps again.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy in nats over the trained tokens of the effective batch (fp32 scalar)."""
        if return_outputs:
            raise NotImplementedError("the logits are never built; evaluate() needs the loss alone")
        total, count = self._summed_loss(inputs)
        if self.model.training:
            self.tokens_seen += int(inputs["attention_mask"].sum())
        return total / (count if num_items_in_batch is None else num_items_in_batch).clamp(min=1)

    def _summed_loss(self, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        causal_lm = self.accelerator.unwrap_model(self.model).get_base_model()
        body, head = causal_lm.get_decoder(), causal_lm.get_output_embeddings()
        hidden = body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
                      use_cache=False).last_hidden_state
        text = causal_lm.config.get_text_config()
        # Granite divides its logits, Cohere multiplies them; what else a head may do is found by check_head.
        scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
        total = linear_cross_entropy(hidden, head.weight, inputs["labels"], scale=scale,
                                     softcap=getattr(text, "final_logit_softcapping", None))
        return total, (inputs["labels"][:, 1:] != IGNORE_INDEX).sum()

    def check_head(self, tolerance: float = 0.02) -> None:
        """Compare our loss with the model's own logits on the beginning of one row, before anything is trained.

        Raises:
            UserError: the model's head does something that the loss here does not know; training it would be wrong.
        """
        causal_lm = self.accelerator.unwrap_model(self.model).get_base_model()
        shortest = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        ids = torch.as_tensor(self.train_dataset[shortest]["input_ids"][:48], device=causal_lm.device)[None]
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            ours, count = self._summed_loss({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
            logits = causal_lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
            theirs = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
        self.model.train(was_training)
        if not abs(ours - theirs) <= tolerance * theirs.abs() + 0.02 * count:
            raise UserError(f"this model ({causal_lm.config.model_type}) computes its logits in a way that gemma-tune "
                            f"does not know: loss {ours / count:.3f} here, {theirs / count:.3f} by the model itself",
                            "use a model of another family, such as Gemma, Llama or Qwen")

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss over all trained tokens of the validation rows.

        The trainer's own evaluation averages the means of batches, in which a token of a short answer counts more.
        """
        was_training = self.model.training
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in self.get_eval_dataloader(eval_dataset):
                batch_total, batch_count = self._summed_loss(self._prepare_inputs(batch))
                total, count = total + batch_total.item(), count + batch_count.item()
        self.model.train(was_training)
        metrics = {f"{metric_key_prefix}_loss": total / max(1, count)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log without TRL's metrics of its own head."""
        Trainer.log(self, logs, start_time)

    def _get_train_sampler(self, train_dataset=None):
        batch = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedBatches(self.lengths, batch * self.args.world_size, self.args.seed)

    def _save_checkpoint(self, model, trial):
        # Past TRL's version, which also writes a model card into the checkpoint directory.
        Trainer._save_checkpoint(self, model, trial)
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        seal(checkpoint, self.training)
        rotate(checkpoint.parent)


class LengthGroupedBatches(torch.utils.data.Sampler[int]):
    """Rows of similar length together, in an order that depends on the seed and the epoch alone.

    Steps are formed from whole effective batches, so accumulation does not change what a step learns from. The global
    random state is not used: a resumed epoch has the order that it had before. The first step of the training gets
    the longest rows, so that memory that does not suffice shows at once.

    Args:
        lengths: tokens of each row.
        batch: rows per optimiser step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        groups = [order[n:n + 50 * self.batch] for n in range(0, len(order), 50 * self.batch)]
        steps = []
        for group in groups:
            group.sort(key=self.lengths.__getitem__, reverse=True)
            steps += [group[n:n + self.batch] for n in range(0, len(group), self.batch)]
        # An incomplete batch stays last: moved forward, it would shift the borders of all later steps.
        rest = [steps.pop()] if len(steps[-1]) < self.batch else []
        steps = [steps[n] for n in torch.randperm(len(steps), generator=generator).tolist()] + rest
        if self.epoch == 0:
            whole = len(steps) - len(rest) or 1
            longest = max(range(whole), key=lambda n: max(self.lengths[row] for row in steps[n]))
            steps[0], steps[longest] = steps[longest], steps[0]
        return iter([row for step in steps for row in step])


class MetricsLog(TrainerCallback):
    """Writes logs/metrics.jsonl as training goes and tells the listener; speed excludes evaluation and saving."""

    def __init__(self, path: Path, listener: Listener, resumed_step: int):
        self.path, self.listener = path, listener
        self.trainer: GemmaTrainer | None = None
        self.busy = 0.0  # seconds in training steps
        self.first_step = resumed_step
        self.records = _earlier_records(path, resumed_step)
        self.tokens_before = max((r.get("tokens", 0) for r in self.records), default=0)
        self.seconds_before = max((r.get("training_seconds", 0.0) for r in self.records), default=0.0)
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
        return self.tokens_before + (self.trainer.tokens_seen if self.trainer else 0)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens (no padding) per second spent in training steps of this process."""
        return self.trainer.tokens_seen / self.busy if self.busy and self.trainer else 0.0

    def _add(self, record: dict[str, Any]) -> None:
        record = {name: float(v) if isinstance(v, torch.Tensor) else v for name, v in record.items()}
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
        self.listener.metrics(record)


def _earlier_records(path: Path, resumed_step: int) -> list[dict[str, Any]]:
    """Records up to the checkpoint that training goes on from; later ones will be written again."""
    if resumed_step == 0 or not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line being written when the process was killed
            continue
        if record["step"] <= resumed_step:
            records.append(record)
    return records


class FiniteGuard(TrainerCallback):
    """Stops before the optimiser sees a gradient that is not finite: the trained state stays the last good one."""

    in_a_row = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        bad = [name for name, p in model.named_parameters()
               if p.grad is not None and not torch.isfinite(p.grad).all()]
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


class StopRequest(TrainerCallback):
    """First Ctrl-C or SIGTERM: save at the step's end and leave. A second one stops at once."""

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
        if self.requested:
            control.should_save = control.should_training_stop = True
        return control
