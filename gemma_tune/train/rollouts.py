"""Answers that a model in training samples, and what they teach by their rewards.

Group relative policy optimisation (Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1): an answer's
advantage is how far its reward is above the mean of the answers to the same prompt, in their standard deviations.
Answers come from the model as it is in the step that learns from them, so the ratio of the probability now to that when
they were sampled is 1, and the clipping of that ratio has no effect; its gradient is that of the log-probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_tune.answers import decoders
from gemma_tune.answers.draws import drawn_tokens
from gemma_tune.answers.generation import context_of
from gemma_tune.answers.lengths import MOST_ROWS, by_length
from gemma_tune.answers.thoughts import said
from gemma_tune.base.machine import free_unused, is_out_of_memory
from gemma_tune.config.stages import TrainConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.rewards.scores import Scored, Scorer
from gemma_tune.train.attention import AS_MASKED
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.prompts import Prompts
from gemma_tune.train.undoing import plain_forward

if TYPE_CHECKING:
    from gemma_tune.train.trainer import GemmaTrainer

_TINY = 1e-4  # added to a standard deviation, as in TRL's GRPOTrainer


@dataclass(frozen=True)
class Rollout:
    """A prompt with the answers that were sampled for it.

    Attributes:
        item: of :class:`gemma_tune.train.prompts.Prompts`.
        answers: token ids of each, with the token that ended it where the model did.
        ended: bool for each.
        scores: (answers, rewards), without weights.
        rewards: (answers,) their sums by weight.
        texts: what each says; ``reference``, what the row does.
        scaled: whether advantages are in standard deviations of the rewards.
    """

    item: dict[str, Any]
    answers: list[list[int]]
    ended: np.ndarray
    scores: np.ndarray
    rewards: np.ndarray
    texts: list[str]
    reference: str
    scaled: bool = True

    @property
    def advantages(self) -> np.ndarray:
        """Of each answer (answers,), float64; zeros where all rewards are the same, which says nothing."""
        return advantages(self.rewards, self.scaled)

    @property
    def tied(self) -> bool:
        """Whether all rewards are the same."""
        return not self.advantages.any()


def advantages(rewards: np.ndarray, scaled: bool = True) -> np.ndarray:
    """``(r - mean) / (std + 1e-4)`` of one group's rewards (answers,), with the standard deviation of a sample; else
    ``r - mean``, which Liu et al. 2025 (https://arxiv.org/abs/2503.20783) propose: so hard and easy prompts count no
    more than others."""
    if len(rewards) < 2 or np.ptp(rewards) <= 1e-8 * np.abs(rewards).max(initial=1e-8):
        return np.zeros(len(rewards))
    return (rewards - rewards.mean()) / (rewards.std(ddof=1) + _TINY if scaled else 1.0)


def numbers_of(seed: int, step: int, prompt: int, answers: int, tokens: int) -> np.ndarray:
    """What a group's tokens are drawn with (answers, tokens), float64: by seed, step and prompt alone."""
    return np.random.default_rng([seed, step, prompt]).random((answers, tokens))


class Rollouts:
    """Has a model in training answer prompts, and scores what it says.

    Args:
        chat: with the tokenizer that the answers are read by.
        settings: of the training: how long answers can be, what they are sampled by, and what their advantages are.

    Attributes:
        at_once: rows of a batch; fewer once memory ran out.
    """

    def __init__(self, trainer: GemmaTrainer, chat: ChatFormat, scorer: Scorer, settings: TrainConfig):
        self.trainer, self.chat, self.scorer, self.at_once = trainer, chat, scorer, MOST_ROWS
        self.most, self._temperature = settings.max_new_tokens, settings.temperature
        self._scaled = settings.scale_rewards == "group"

    def sampled(self, prompts: Prompts, items: Sequence[dict[str, Any]], seed: int, step: int, group: int,
                ) -> list[Rollout]:
        """A group of answers to each prompt, drawn by chance."""
        draws = [numbers_of(seed, step, item["number"], group, self.most) for item in items]
        numbers = torch.from_numpy(np.concatenate(draws)) if draws else None
        return self._answered(prompts, items, numbers, group)

    def greedy(self, prompts: Prompts, items: Sequence[dict[str, Any]]) -> list[Rollout]:
        """The likeliest answer to each prompt."""
        return self._answered(prompts, items, None, 1)

    def _answered(self, prompts: Prompts, items: Sequence[dict[str, Any]], numbers: torch.Tensor | None, group: int,
                  ) -> list[Rollout]:
        encoded = [item["prompt"] for item in items for _ in range(group)]
        tokens = self._tokens(encoded, numbers)
        found = [self._said(item, tokens[n * group:(n + 1) * group]) for n, item in enumerate(items)]
        return self._with_scores(prompts, found)

    def _said(self, item: dict[str, Any], answers: list[list[int]]) -> Rollout:
        """The answers as texts, which are not scored yet."""
        ended = np.array([bool(ids) and ids[-1] in self.chat.stop_ids for ids in answers])
        none = np.zeros((len(answers), 0))
        return Rollout(item, answers, ended, none, none, [said(self.chat, item["prompt"], ids) for ids in answers],
                       said(self.chat, item["prompt"], item["reference"]), self._scaled)

    def _with_scores(self, prompts: Prompts, found: Sequence[Rollout]) -> list[Rollout]:
        """All of a step at once, as a program may take several at a time."""
        asked = []
        for one in found:
            prompt = prompts.asked(one.item["number"])
            asked += [Scored(prompt.messages, text, one.reference, bool(ended), prompt.tools)
                      for text, ended in zip(one.texts, one.ended)]
        scores = self.scorer.scores(asked)
        rewards = scores @ self.scorer.weights
        ends = np.cumsum([len(one.answers) for one in found])
        parts = [slice(end - len(one.answers), end) for one, end in zip(found, ends)]
        return [replace(one, scores=scores[part], rewards=rewards[part]) for one, part in zip(found, parts)]

    def _tokens(self, encoded: Sequence[Sequence[int]], numbers: torch.Tensor | None) -> list[list[int]]:
        """What the model writes after each of these prompts, in batches of similar lengths."""
        lengths = {n: len(ids) for n, ids in enumerate(encoded)}
        found: dict[int, list[int]] = {}
        while len(found) < len(encoded):
            left = {n: length for n, length in lengths.items() if n not in found}
            batch = by_length(left, self.most, context_of(self.trainer.causal_lm), lambda _: self.at_once)[0]
            try:
                answers = self._batch([encoded[n] for n in batch], None if numbers is None else numbers[batch])
                found |= dict(zip(batch, answers, strict=True))
                continue
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e) or len(batch) == 1:
                    raise
            # Outside the handler, whose traceback keeps what was computed alive.
            self._halve(len(batch))
        return [found[n] for n in range(len(encoded))]

    def _batch(self, encoded: Sequence[Sequence[int]], numbers: torch.Tensor | None) -> list[list[int]]:
        model = self.trainer.causal_lm
        # The attention of training does not know padding on the left.
        with self.trainer.evaluating(), plain_forward(model, **{AS_MASKED: True}):
            return drawn_tokens(model, self.chat, encoded, numbers, self.most, self._temperature)

    def _halve(self, rows: int) -> None:
        self.forget()
        self.at_once = rows // 2
        self.trainer.listener.warn(f"out of memory while {rows} answers were sampled at once: going on with "
                                   f"{self.at_once}")

    def forget(self) -> None:
        """Free the memory of what sampling keeps from step to step."""
        decoders.forget(self.trainer.causal_lm)
        free_unused(self.trainer.accelerator.device.type)


def to_learn(found: Sequence[Rollout], tied: bool) -> dict[str, Any]:
    """Answers as rows of a training batch, group by group, those with the longest first.

    Args:
        tied: whether groups take part whose rewards are all the same, which have no gradient by them.

    Returns:
        ``rows``: ``input_ids`` and ``labels`` (length,) int64 of each answer behind its prompt; ``groups``, a number
        for each that those to the same prompt share; ``lengths`` (rows,) int64, and ``advantages`` (rows,) fp32.
        Without any answer to learn from a row that teaches nothing.
    """
    rows, groups, advantages = [], [], []
    for one in sorted(found, key=lambda one: -len(one.item["prompt"]) - max(map(len, one.answers))):
        if one.tied and not tied:
            continue
        prompt = np.asarray(one.item["prompt"], np.int64)
        for ids in one.answers:
            answer = np.asarray(ids, np.int64)
            rows.append({"input_ids": np.concatenate([prompt, answer]),
                         "labels": np.concatenate([np.full(len(prompt), IGNORE_INDEX), answer])})
        groups += [one.item["number"]] * len(one.answers)
        advantages += one.advantages.tolist()
    if not rows:
        rows = [{"input_ids": np.zeros(1, np.int64), "labels": np.full(1, IGNORE_INDEX)}]
        groups, advantages = [0], [0.0]
    return {"rows": rows, "groups": groups, "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
            "advantages": torch.tensor(advantages, dtype=torch.float32)}
