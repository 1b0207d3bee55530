"""What the answers of base and tuned model are worth, by the rewards that the training learned from, or by others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemma_tune.answers.generation import Answer, prompt_ids
from gemma_tune.answers.thoughts import said
from gemma_tune.base.words import counted
from gemma_tune.config.answering import NO_REWARD, EvalConfig
from gemma_tune.config.rewards import ALONE, VALIDATED, Reward, read
from gemma_tune.config.settings import in_words as settings_in_words
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.evaluate.rows import Question
from gemma_tune.measure.intervals import compare
from gemma_tune.rewards.scores import Scored, Scorer
from gemma_tune.run.session import Session

THEN = "or leave rewards out: --reward none"  # where a program is missing or failed


def rewards_of(config: EvalConfig) -> list[Reward]:
    """What answers are to be scored by."""
    return [] if config.reward == NO_REWARD else read(config.reward)


def with_training_s(session: Session) -> Session:
    """Where the training learned from rewards and answers are scored, the session with as many and as long answers as
    the training was evaluated with, unless others were asked for, and with its rewards, where none are named."""
    learned, config = session.settings_of("train"), session.config
    if config.reward == NO_REWARD:
        return session
    if learned.get("method") != "grpo" or not learned.get("reward"):
        if "reward" in session.given and not config.reward:
            session.listener.warn("answers are not scored: the training learned from no rewards; --reward exact, or "
                                  "another one, names what they are scored by")
        return session
    rows = VALIDATED if config.data_file else session.manifest.stages["prepare"]["summary"].get("valid_rows", 0)
    usual = {"questions": max(config.questions, min(VALIDATED, rows)), "max_new_tokens": learned["max_new_tokens"]}
    values = {name: value for name, value in usual.items()
              if name not in session.resolved.given and value != getattr(config, name)}
    if not config.reward:
        values = {"reward": tuple(learned["reward"]), **values}
    if values:
        session.listener.note(f"as in the training: {settings_in_words(values)}")
    return replace(session, resolved=session.resolved.but(values, {name: {"from": "method"} for name in values}))


class Rewards:
    """Scores answers to some questions: those that have an answer of the row's own, where a reward needs one.

    A program is tried at once on the row's own answer, so that one that does not work fails before any model answers.

    Args:
        scorer: what answers are worth; it belongs to the caller.

    Raises:
        WorkFailed: a program did not say what an answer is worth.
    """

    def __init__(self, scorer: Scorer, questions: Sequence[Question], chat: ChatFormat):
        self._scorer, self._chat, self._asked = scorer, chat, len(questions)
        alone = all(reward.kind in (*ALONE, "regex") for reward in scorer.rewards)
        self.questions = {n: question for n, question in enumerate(questions)
                          if alone or question.final is not None}
        if first := next((one for one in self.questions.values() if one.final is not None), None):
            scorer.scores([_scored(first, first.final, True)])

    def left_out(self) -> str | None:
        """What to tell of questions whose answers are not scored; None if all are."""
        if not self._asked:
            return "--reward scores nothing: there is no question to answer"
        if len(self.questions) == self._asked:
            return None
        return (f"--reward scores the answers to {len(self.questions)} of {counted(self._asked, 'prompt')}: the others "
                "have no answer of their own that it could compare with")

    def measures(self, given: dict[str, list[Answer]], seed: int) -> tuple[dict[str, Any], dict[int, dict[str, float]]]:
        """Rewards of base and tuned answers, as measures by name; and of each question, by its number, the rewards of
        both answers, as answers.json has them.

        Args:
            given: answers to all questions, by the model.

        Raises:
            WorkFailed: see :meth:`gemma_tune.rewards.scores.Scorer.scores`.
        """
        if not self.questions:
            return {}, {}
        ids = {n: prompt_ids(self._chat, one.prompt.messages, one.prompt.tools) for n, one in self.questions.items()}
        scores = {side: self._scorer.scores([
            _scored(one, said(self._chat, ids[n], answers[n].ids), answers[n].ended)
            for n, one in self.questions.items()]) for side, answers in given.items()}
        sums = {side: found @ self._scorer.weights for side, found in scores.items()}
        columns = {f"rewards/{reward.name}": n for n, reward in enumerate(self._scorer.rewards)}
        found: dict[str, Any] = {"reward": compare(sums["base"], sums["tuned"], seed=seed).as_json()}
        if len(columns) > 1 or self._scorer.weights[0] != 1:
            found |= {name: compare(scores["base"][:, n], scores["tuned"][:, n], seed=seed).as_json()
                      | {"weight": float(self._scorer.weights[n])} for name, n in columns.items()}
        each = {n: {f"{side}_reward": float(values[row]) for side, values in sums.items()}
                for row, n in enumerate(self.questions)}
        return found, each


def _scored(question: Question, answer: str, ended: bool) -> Scored:
    return Scored(question.prompt.messages, answer, question.final or "", ended, question.prompt.tools)
