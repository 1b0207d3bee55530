"""What somebody at the keyboard thinks of answers, as pairs to learn from: ``/fix`` and ``/better`` of ``chat``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.answers.generation import BROKEN
from gemma_tune.base.errors import UserError

Turn = dict[str, Any]
COMPARED = ("base", "tuned")


@dataclass
class Opinion:
    """What was said of the answers to one question.

    Args:
        answers: what ``/better`` chooses from, by how it calls them: ``1``, ``2``, …, or ``base`` and ``tuned``.
        better: the one that was chosen.
        rows: its pairs as they were written, see :meth:`gemma_tune.chat.saves.Pairs.put`.
    """

    answers: dict[str, Turn] = field(default_factory=dict)
    better: str | None = None
    rows: list[bytes] = field(default_factory=list)
    _corrected: list[tuple[Turn, Turn]] = field(default_factory=list)  # right and wrong
    _before: list[tuple[Turn, Turn]] = field(default_factory=list)  # of choices among other answers

    def again(self, before: Turn, now: Turn) -> str | None:
        """The same question was answered once more.

        Returns:
            What ``/better`` calls the new answer; None if it is one that is known already.
        """
        if before not in self.answers.values() or COMPARED[0] in self.answers:
            self.offer({"1": before})
        if any(_same(now, known) for known in self.answers.values()):
            return None
        name = str(len(self.answers) + 1)
        self.answers[name] = now
        return name

    def offer(self, answers: Mapping[str, Turn]) -> None:
        """Other answers to choose from; what was chosen among the earlier ones stays said."""
        self._before += self._chosen()
        self.answers, self.better = dict(answers), None

    def choose(self, name: str) -> Turn:
        """Take one of the answers for the better one.

        Raises:
            UserError: there is no such answer.
        """
        names = list(self.answers)
        if name in ("1", "2") and names == list(COMPARED):
            name = names[int(name) - 1]
        if len(names) < 2:
            raise UserError("there is one answer to the last question, so none is better",
                            "/retry answers it again, /compare with base and tuned model")
        if name not in names:
            known = f"{', '.join(names[:-1])} or {names[-1]}"
            raise UserError(f"which answer is better: {known}?", f"/better {names[0]}, for instance")
        self.better = name
        return self.answers[name]

    def correct(self, wrong: Turn, right: Turn) -> bool:
        """A correction took the place of an answer, or of an earlier correction; whether that makes a pair."""
        if self._corrected and self._corrected[-1][0] is wrong:
            wrong = self._corrected.pop()[1]
        self._corrected.append((right, wrong))
        return not _same(right, wrong)

    def pairs(self, prompt: Sequence[Turn]) -> list[dict[str, Any]]:
        """The rows that ``prepare`` reads, each once.

        An answer that was cut off is never the chosen one: it would be learned that it ends there. Answers that differ
        in white space alone are no pair, nor is one whose bytes are no characters, which ``prepare`` refuses.
        """
        asked = [_plain(turn) for turn in prompt]
        found: list[dict[str, Any]] = []
        for better, worse in [*self._before, *self._chosen(), *self._corrected]:
            row = {"prompt": asked, "chosen": [_plain(better)], "rejected": [_plain(worse)]}
            if not (_same(better, worse) or is_cut(better) or is_broken(better) or is_broken(worse) or row in found):
                found.append(row)
        return found

    def _chosen(self) -> list[tuple[Turn, Turn]]:
        if self.better is None:
            return []
        return [(self.answers[self.better], turn) for name, turn in self.answers.items() if name != self.better]


def is_cut(turn: Turn) -> bool:
    """Whether an answer did not end by itself."""
    return turn.get("train") is False


def is_broken(turn: Turn) -> bool:
    """Whether bytes that an answer was made of are no characters."""
    return BROKEN in turn["content"]


def _same(one: Turn, other: Turn) -> bool:
    return one["content"].split() == other["content"].split()


def _plain(turn: Turn) -> Turn:
    """Without the mark that it is not learned: of a prompt nothing is."""
    return {key: value for key, value in turn.items() if key != "train"}
