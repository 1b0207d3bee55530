"""Preference training: DPO, IPO, ORPO and KTO with the batches, kernels and checkpoints of any other training."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.batches import SortedBatches, collate, loader
from gemma_tune.train.buckets import Buckets, costs_of, shapes_of_pieces
from gemma_tune.train.captured import CapturedSteps, LearnedTokens
from gemma_tune.train.captured_units import LearnedUnits
from gemma_tune.train.preference_loss import SUMS, PreferenceLoss
from gemma_tune.train.reference import look_up
from gemma_tune.train.shared_prompts import worth_sharing
from gemma_tune.train.token_losses import has_pictures
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.units import PAIR, Units, collate_units, pieces_of

LESS_LIKELY = 0.1  # nats per token that chosen answers may lose before it is told
_LOOKED_AT = 64  # pairs among which one is looked for whose answers share a prompt


def without_dropout(base: torch.nn.Module) -> None:
    """Switch a model's own dropout off, not an adapter's: what is compared with a reference is not left to chance.

    GPT-2 and OPT have some, as layers or as numbers that layers keep; TRL does the same (``disable_dropout``).
    """
    adapters = {layer for module in base.modules() for layer in getattr(module, "lora_dropout", {}).values()}
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout) and module not in adapters:
            module.p = 0.0
    for holder in (*base.modules(), base.config.get_text_config(), base.config):  # some ask their configuration
        for name, value in list(vars(holder).items()):
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(holder, name, 0.0)


class PreferenceTrainer(GemmaTrainer):
    """:class:`GemmaTrainer` on pairs or judged answers, see :class:`gemma_tune.train.units.Units`.

    Args:
        units: of the training, and of the validation.
        session: with the settings of ``train``: ``method`` and what belongs to it.
        reference_key: what the reference's log-probabilities depend on.
    """

    collate = staticmethod(collate_units)
    split = staticmethod(pieces_of)

    def __init__(self, *args: Any, units: tuple[Units, Units], session: Session,
                 reference_key: Mapping[str, Any], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.session, self.settings, self.reference_key = session, session.config, reference_key
        self.train_dataset = units[0]
        self.eval_dataset = units[1] if len(units[1]) else None
        self.liked = units[0].liked
        # A GPU likes few launches, and processes with parts of the model make as many passes as each other.
        self.preference = PreferenceLoss(session.config, self.accelerator.device,
                                         at_once=self.sharded or self.accelerator.device.type != "cpu",
                                         shown=self.shown)
        # Captured steps add to them where they are.
        self._sums, self._evaluated = (torch.zeros(len(SUMS), device=self.accelerator.device) for _ in range(2))
        self.captured_divergence: CapturedSteps | None = None
        self._ratios = torch.zeros((), device=self.accelerator.device)  # log-ratios of answers to other prompts
        self._measured = False  # whether that is known for the batch that is worked on
        self._mean = 1, 1  # units of the step, and tokens of good answers in it
        self._first: float | None = None  # log-probability of a chosen answer's token before the first step
        self._told = False
        without_dropout(self.causal_lm)

    @staticmethod
    def learned_in(batch: dict[str, Any]) -> int:
        """The units of the batch."""
        return len(batch["units"])

    def begin_steps(self) -> None:
        """Compute the reference's log-probabilities, or read those that an earlier training has kept."""
        if self.settings.method != "orpo":
            look_up(self, self.session, self.reference_key)

    def body(self, evaluating: bool = False) -> LearnedUnits:
        """See :meth:`gemma_tune.train.first_batch.FirstBatch.body`."""
        sums = self._evaluated if evaluating else self._sums
        return LearnedUnits(self.model, self.preference, self.train_dataset.size, sums)

    def body_of_pictures(self) -> None:
        """None: units with pictures go one kernel at a time."""

    def sizes(self, side: int) -> tuple[int, np.ndarray, np.ndarray]:
        """See :meth:`gemma_tune.train.first_batch.FirstBatch.sizes`."""
        units = self.eval_dataset if side else self.train_dataset
        return (units.size, units.sizes.reshape(-1, units.size).max(1), units.trained.reshape(-1, units.size).sum(1))

    def pictured(self, side: int) -> np.ndarray:
        """See :meth:`gemma_tune.train.first_batch.FirstBatch.pictured`; of units."""
        return super().pictured(side).reshape(-1, self.train_dataset.size).any(1)

    def with_sight(self, part: dict[str, Any]) -> dict[str, Any]:
        """Units that have pictures, marked as such: what is seen in them is read when they go through the model."""
        shown = any(has_pictures(unit["sequences"]) for unit in part["units"])
        return part | {"seen": True} if shown else part

    # ---- before the first step ---------------------------------------------------------------------------------------

    def _compare(self, *args: Any, **kwargs: Any) -> None:
        super()._compare(*args, **kwargs)
        self.preference.shares = self._can_share()

    def _compile(self, layers: Any) -> bool:
        self.preference.shares, could = False, self.preference.shares  # operations on parts of rows are not compiled
        compiled = super()._compile(layers)
        self.preference.shares = could and not compiled
        return compiled

    def _can_share(self) -> bool:
        """Whether the model makes the same of two answers where their prompt goes through once."""
        units = (self.train_dataset[n]["sequences"] for n in range(min(_LOOKED_AT, len(self.train_dataset))))
        rows = next((rows for rows in units if len(rows) == PAIR and worth_sharing(rows, [PAIR])
                     and not has_pictures(rows)), None)
        return self.preference.can_share(self, rows)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        """The number of units that all processes learn from in the step."""
        if super()._get_num_items_in_batch(batch_samples, device) is None:
            return None
        rows = self._facts["rows"]
        self._mean = len(rows), max(1, int(self.liked[rows].sum()))
        self._sums.zero_()
        return len(rows)

    def _capture(self) -> None:
        """KTO's z as well, which each step measures anew."""
        super()._capture()
        if self.captured is not None and self.settings.method == "kto":
            shapes = shapes_of_pieces(self.batches(), 1, *self.train_dataset.mismatch_sizes, self.micro_batch)
            self.captured_divergence = CapturedSteps(
                LearnedTokens(self.model), self.gradients, Buckets(shapes, costs_of(self.causal_lm)), self.listener,
                self.captured.pool, backward=False, into=self._ratios)

    def forget_captured(self) -> None:
        super().forget_captured()
        if self.captured_divergence:
            self.captured_divergence.forget()

    def capture_no_more(self) -> None:
        super().capture_no_more()
        self.captured_divergence = None

    def weights(self, count: int) -> tuple[float, ...]:
        """Of what compares answers, and of the tokens of good ones."""
        return 1 / max(1, count), self.preference.imitation / self._mean[1]

    def training_step(self, model, inputs, num_items_in_batch=None):
        """See :meth:`GemmaTrainer.training_step`."""
        self._measured = False
        return super().training_step(model, inputs, num_items_in_batch)

    def _piecewise_step(self, model, inputs, count: int) -> None:
        # Once for a batch: where this one runs out of memory and tries again, other processes may not, and they measure
        # together.
        if self.settings.method == "kto" and not self._measured:
            with self.evaluating():
                self._measure_divergence([inputs])
            self._measured = True
        super()._piecewise_step(model, inputs, count)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What these units add to the loss of the step (fp32 scalar)."""
        found = self.preference.of(model, inputs["units"])
        self._sums += found.sums
        loss = found.compared / max(1, num_items_in_batch)
        weight = self.preference.imitation
        return loss + weight * found.imitated / self._mean[1] if weight else loss

    def _measure_divergence(self, batches: Any) -> None:
        """KTO's z of all units in these batches of all processes: the mean log-ratio of answers to other prompts, or 0
        where that is below."""
        count = 0
        self._ratios.zero_()
        for batch in batches:
            for part in self._pieces(batch):
                rows = [unit["mismatch"] for unit in part["units"]]
                if self.captured_divergence is None or not self.captured_divergence.run(collate(rows), -1.0):
                    self.with_room(functools.partial(self._measure_piece, rows))
                self._ratios -= sum(unit["mismatch_reference"] for unit in part["units"])
                count += len(rows)
        total = torch.stack([self._ratios, torch.full_like(self._ratios, count)])
        if processes.joined():
            torch.distributed.all_reduce(total)
        self.preference.divergence.copy_((total[0] / total[1].clamp(min=1)).clamp(min=0))  # where captured steps read

    def _measure_piece(self, rows: Sequence[Any]) -> None:
        self._ratios += self.preference.log_probabilities(self.model, rows)[0].sum()

    def sums(self) -> Sequence[torch.Tensor]:
        """See :meth:`GemmaTrainer.with_room`."""
        return self._sums, self._evaluated, self._ratios

    # ---- figures -----------------------------------------------------------------------------------------------------

    def measures(self) -> torch.Tensor:
        """The sums of the step, of all processes."""
        sums = self._sums.clone()
        if processes.joined():
            torch.distributed.all_reduce(sums)
        return sums

    def named(self, measures: Sequence[float]) -> dict[str, float]:
        """Rewards and log-probabilities, means over answers, by the names that TRL has for them; those of no answer,
        where a step has judged answers of one side alone, are left out."""
        of = dict(zip(SUMS, measures))
        named = {f"{figure}s/{name}": of[f"{side}_{figure}"] / of[side] for figure in ("reward", "logp")
                 for side, name in (("good", "chosen"), ("bad", "rejected")) if of[side]}
        if of["good"] and of["bad"]:
            named["rewards/margins"] = named["rewards/chosen"] - named["rewards/rejected"]
        if self.train_dataset.size == PAIR:
            named["rewards/accuracies"] = of["won"] / max(1, of["units"])
        return named

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Mean loss, rewards and log-probabilities of the validation units."""
        batches = loader(self.eval_dataset, SortedBatches(self.lengths[1], self._share(accumulation=1)),
                         self.accelerator, self.collate)
        self.refresh()
        self.gradients.clear()
        self._evaluated.zero_()
        with self.evaluating():
            if self.settings.method == "kto":
                self._measure_divergence(batches)
            for batch in batches:
                for part in self._pieces(batch):
                    if not self.replayed(self.captured_evaluation, part, 1.0, 1.0):
                        self.with_room(functools.partial(self._evaluate_piece, part))
        self.gradients.clear()
        sums = [sum(shares) for shares in zip(*processes.gathered(self._evaluated.tolist()))]
        of = dict(zip(SUMS, sums))
        metrics = {f"{metric_key_prefix}_loss": of["compared"] / max(1, of["units"])
                   + self.preference.imitation * of["imitated"] / max(1, of["good_tokens"]),
                   **{f"{metric_key_prefix}_{name}": value for name, value in self.named(sums).items()}}
        self._tell(of["good_logp"] / max(1, of["good_tokens"]))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_piece(self, part: dict[str, Any]) -> None:
        self._evaluated += self.preference.of(self.model, part["units"]).sums

    def _tell(self, chosen: float) -> None:
        """Warn once where chosen answers become less likely: what replaces them may be neither of both."""
        if self._first is None and self.state.global_step == 0:
            self._first = chosen
        if self._told or self._first is None or chosen > self._first - LESS_LIKELY:
            return
        self._told = True
        ways = ["a lower --learning-rate", "a larger --beta"]
        if self.settings.method == "dpo":  # the only one that has such a weight
            ways.insert(0, "a larger --sft-weight" if self.preference.imitation else "--sft-weight 1")
        self.listener.warn(f"the chosen answers become less likely: {chosen:.2f} nats per token now, {self._first:.2f} "
                           f"before the first step, as the rejected ones fall faster; {ways[0]} holds them, and so "
                           f"does {', or '.join(ways[1:])}")
