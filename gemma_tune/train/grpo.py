"""Learning from rewards: the training steps of GRPO, with the batches, kernels and checkpoints of any other training.

A step samples a group of answers for each of its prompts, scores them, and makes those likelier that are better than
their group's mean. The loss is TRL's by default (``loss_type="dapo"``, ``beta=0``; Yu et al. 2025,
https://arxiv.org/abs/2503.14476, eq. 12): minus the advantages of all sampled tokens times their ratios, over the
number of these tokens, without a Kullback-Leibler term. With ``beta`` there is one, against the model as it was before
its first step: that one's log-probabilities are computed in each step, as the answers are new. Answers that were cut
off at their limit take part as they are, as with TRL's ``mask_truncated_completions=False``.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from gemma_tune.answers.thoughts import said
from gemma_tune.base.files import os_errors
from gemma_tune.base.words import counted, opening
from gemma_tune.config.rewards import VALIDATED
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.rewards.last_number import last_number
from gemma_tune.rewards.scores import Scorer
from gemma_tune.run.session import Session
from gemma_tune.train import processes
from gemma_tune.train.callbacks import write_last
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.policy_loss import PolicyLoss, WeightsBefore
from gemma_tune.train.preference import without_dropout
from gemma_tune.train.prompts import Prompts, collate_prompts
from gemma_tune.train.rollouts import Rollout, Rollouts, to_learn
from gemma_tune.train.token_losses import TokenLosses
from gemma_tune.train.trainer import GemmaTrainer

SILENT = 5  # steps in a row without two different rewards in any group after which that is told


def pieces_of_answers(batch: dict[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of at most ``rows`` answers."""
    for start in range(0, len(batch["lengths"]), rows):
        yield {name: batch[name][start:start + rows] for name in ("rows", "groups", "lengths", "advantages")}


class RewardTrainer(GemmaTrainer):
    """:class:`GemmaTrainer` on answers that the model samples itself.

    Args:
        prompts: of the training, and of the validation.
        session: with the settings of ``train``.
        chat: tokenizer and template.
        scorer: what answers are worth.
        earlier: lines of logs/rollouts.jsonl up to the checkpoint that training goes on from.
    """

    collate = staticmethod(collate_prompts)
    split = staticmethod(pieces_of_answers)
    probed, pieces = "learning from the longest possible answer", "answers"

    def __init__(self, *args: Any, prompts: tuple[Prompts, Prompts], session: Session, chat: ChatFormat,
                 scorer: Scorer, earlier: Sequence[dict[str, Any]] = (), **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.train_dataset, self.eval_dataset = prompts[0], prompts[1] if len(prompts[1]) else None
        self.settings, self.path = session.config, session.run.rollouts
        self.rollouts = Rollouts(self, chat, scorer, session.config)
        self.records, self._begun = list(earlier), False
        token_losses = TokenLosses(self.accelerator.device, at_once=self.accelerator.device.type != "cpu",
                                   temperature=session.config.temperature)
        self.policy = PolicyLoss(token_losses, session.config.strength, self.evaluating)
        self._silent = 0  # steps so far without a reward that differs from others, since there was one
        without_dropout(self.causal_lm)

    # ---- before the first step ---------------------------------------------------------------------------------------

    def begin_steps(self) -> None:
        """Keep what is trained, where it is compared with later; tell what of the data can earn no reward."""
        if self.policy.beta:
            self.policy.before = WeightsBefore(self._trainable())
        if any(reward.kind == "number" for reward in self.rollouts.scorer.rewards) and processes.is_main():
            self._tell_without_number()
        if self.eval_dataset is not None and len(self.eval_dataset) > VALIDATED:
            self.listener.note(f"{VALIDATED} of {len(self.eval_dataset):,} validation prompts, spread over all, are "
                               "answered at each evaluation")

    def _tell_without_number(self) -> None:
        chat = self.rollouts.chat
        without = [n for n in range(len(self.train_dataset)) if last_number(said(
            chat, (item := self.train_dataset[n])["prompt"], item["reference"])) is None]
        if without:
            self.listener.warn(f"--reward number: {counted(len(without), 'answer')} of {len(self.train_dataset):,} "
                               f"have no number, and nothing is worth anything there, the first at "
                               f"{self.row_names(without[:1])[0]}")

    def _compare(self, *args: Any, **kwargs: Any) -> None:
        super()._compare(*args, **kwargs)
        prompt, reference = (np.asarray(self.train_dataset[0][name]) for name in ("prompt", "reference"))
        nothing = np.full(len(prompt), IGNORE_INDEX)
        group = [{"input_ids": np.concatenate([prompt, answer]), "labels": np.concatenate([nothing, answer])}
                 for answer in (reference, reference[::-1], reference[:1])]
        self.policy.token_losses.shares = self.policy.token_losses.can_share(self, group)

    def _why_not_captured(self) -> str | None:
        return "answers that are sampled have other lengths in each step" if (
            self.accelerator.device.type == "cuda") else super()._why_not_captured()

    def expected_seconds(self) -> float:
        """If all answers were as long as possible."""
        answers = self.settings.batch_size * self.settings.accumulation * self.settings.answers
        return self.longest_seconds * answers * self.args.max_steps

    def probe(self) -> float:
        """Learn from answers as long as there can be: as many as go through the model at once, on a CPU, whose memory
        does not show what it lacks, from one. Returns the seconds for each."""
        rows = 1 if self.accelerator.device.type == "cpu" else self.micro_batch
        longest = self.train_dataset[int(self.train_dataset.starts.argmax())]
        answer = [longest["prompt"][0]] * self.settings.max_new_tokens
        rollout = Rollout(longest, [answer] * (rows + 1), np.zeros(rows + 1, bool), np.zeros((rows + 1, 0)),
                          np.arange(rows + 1.0), [""] * (rows + 1), "")
        learned = next(pieces_of_answers(to_learn([rollout], tied=False), rows))
        return self.timed(learned, len(answer)) / rows

    # ---- a step ------------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples, device):
        """Sample and score the step's answers, which take the prompts' places in its batches; the number of tokens that
        all processes have sampled."""
        if super()._get_num_items_in_batch(batch_samples, device) is None:
            return None
        self.callback_handler.on_step_begin(self.args, self.state, self.control)  # sampling is a part of the step
        items = [item for batch in batch_samples for item in batch["prompts"]]
        step = self.training.steps_before + self.state.global_step
        found = self.rollouts.sampled(self.train_dataset, items, self.settings.seed, step, self.settings.answers)
        places = iter(found)
        for batch in batch_samples:
            batch |= to_learn([next(places) for _ in batch["prompts"]], tied=bool(self.policy.beta))
        everywhere = [one for share in processes.gathered([_outcome(one) for one in found]) for one in share]
        figures, tokens, sampled = self._figures(everywhere)
        self._facts |= figures | {"tokens": tokens, "trained": sampled}
        self.policy.divergence.zero_()
        self._keep(found)
        self._tell_silence(everywhere)
        return sampled

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """What these answers add to the loss of the step (fp32 scalar)."""
        # What is looked at without having been sampled is an answer like any other.
        rows = inputs.get("rows", inputs.get("prompts"))
        sizes = [len(list(group)) for _, group in itertools.groupby(inputs.get("groups", range(len(rows))))]
        advantages = inputs.get("advantages", torch.ones(len(rows))).to(model.device, non_blocking=True)
        return self.policy.of(model, rows, sizes, advantages) / max(1, num_items_in_batch)

    def sums(self) -> Sequence[torch.Tensor]:
        """See :meth:`GemmaTrainer.sums`."""
        return (self.policy.divergence,)

    def measures(self) -> torch.Tensor | None:
        """The divergence from the model before, in nats: a mean over the sampled tokens of all processes (1,)."""
        if not self.policy.beta:
            return None
        total = self.policy.divergence.clone()
        if processes.joined():
            torch.distributed.all_reduce(total)
        return total[None] / max(1, self._facts["trained"])

    def named(self, measures: Sequence[float]) -> dict[str, float]:
        """By TRL's name."""
        return dict(zip(("kl",), measures))

    def _halve_micro_batch(self, rows: int) -> None:
        self.rollouts.forget()
        super()._halve_micro_batch(rows)

    # ---- what is told ------------------------------------------------------------------------------------------------

    def _figures(self, found: Sequence[dict[str, Any]]) -> tuple[dict[str, float], int, int]:
        """By the names that TRL's GRPOTrainer has for them, of all processes' prompts; tokens with those of the
        prompts, and sampled ones."""
        rewards, scores = (np.concatenate([one[name] for one in found]) for name in ("rewards", "scores"))
        lengths, ended = (np.concatenate([one[name] for one in found]) for name in ("lengths", "ended"))
        prompts = sum(one["prompt"] * len(one["rewards"]) for one in found)
        spread = float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
        figures = {"reward": float(rewards.mean()), "reward_std": spread,
                   "frac_reward_zero_std": float(np.mean([one["tied"] for one in found])),
                   "completions/mean_length": float(lengths.mean()),
                   "completions/max_length": float(lengths.max()),
                   "completions/clipped_ratio": float(1 - ended.mean())}
        figures |= {f"rewards/{reward.name}/mean": float(scores[:, n].mean())
                    for n, reward in enumerate(self.rollouts.scorer.rewards)}
        return figures, int(prompts + lengths.sum()), int(lengths.sum())

    def _keep(self, found: Sequence[Rollout]) -> None:
        """Write one group of the step to logs/rollouts.jsonl: which answers there were, and what each was worth."""
        if not processes.is_main() or not found:
            return
        step, scorer = self.state.global_step + 1, self.rollouts.scorer
        one = found[step % len(found)]
        asked = self.train_dataset.asked(one.item["number"])
        answers = [{"answer": text, "tokens": len(ids), "ended": bool(ended), "reward": float(reward),
                    "scores": {which.name: float(score) for which, score in zip(scorer.rewards, scores)},
                    "advantage": float(advantage)}
                   for text, ids, ended, reward, scores, advantage in zip(
                       one.texts, one.answers, one.ended, one.rewards, one.scores, one.advantages)]
        self.records.append({"step": step, "line": int(self.train_dataset.rows[one.item["number"]]) + 1,
                             "begins": opening(asked.messages[-1]["content"]), "reference": one.reference,
                             "answers": answers})
        with os_errors(self.path):
            write_last(self.path, self.records, self._begun)
        self._begun = True

    def _tell_silence(self, found: Sequence[dict[str, Any]]) -> None:
        """Warn once where steps teach nothing."""
        self._silent = self._silent + 1 if all(one["tied"] for one in found) else 0
        if self._silent == SILENT:
            rewards = np.concatenate([one["rewards"] for one in found])
            self.listener.warn(f"in {SILENT} steps in a row all answers to a prompt had the same reward (now "
                               f"{rewards.mean():.3g} on average), which teaches nothing: {self.path} has some of "
                               "them; a reward that tells good answers from better ones is needed, or prompts that "
                               "the model answers well now and then")

    # ---- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Rewards of the likeliest answers to validation prompts, which nothing is drawn for."""
        prompts, here = self.eval_dataset, processes.place()
        chosen = np.linspace(0, len(prompts) - 1, min(VALIDATED, len(prompts))).round().astype(int)
        self.refresh()
        found = self.rollouts.greedy(prompts, prompts.__getitems__(chosen[here.rank::here.count]))
        everywhere = [one for share in processes.gathered([_outcome(one) for one in found]) for one in share]
        figures, _, _ = self._figures(everywhere)
        del figures["frac_reward_zero_std"]  # of one answer to each prompt
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}_prompts"] = len(chosen)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @contextlib.contextmanager
    def fast(self, compiled: bool = False, captured: bool | None = None) -> Iterator[None]:
        """See :meth:`gemma_tune.train.first_batch.FirstBatch.fast`; afterwards nothing of sampling is kept."""
        with super().fast(compiled, captured):
            try:
                yield
            finally:
                self.rollouts.forget()


def _outcome(one: Rollout) -> dict[str, Any]:
    """What all processes are to know of a group."""
    return {"prompt": len(one.item["prompt"]), "rewards": one.rewards, "scores": one.scores, "ended": one.ended,
            "lengths": np.array([len(ids) for ids in one.answers]), "tied": one.tied}
