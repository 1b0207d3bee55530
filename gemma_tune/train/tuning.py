"""What ``tune`` has tried, as ``tune.json`` keeps it: after each candidate, so that what was tried is never lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.base.files import os_errors, write_json
from gemma_tune.base.strict_json import object_in
from gemma_tune.run.directory import now
from gemma_tune.train.halving import Candidate

SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """A candidate's training.

    Attributes:
        loss: of the validation sequences, in nats per trained token; None where it or a gradient was not finite, which
            ``reason`` then says.
    """

    learning_rate: float
    rank: int
    steps: int
    loss: float | None
    seconds: float
    reason: str = ""

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.learning_rate, self.rank)


@dataclass(frozen=True)
class Begun:
    """A rung that was begun: its candidates, each trained for so many steps."""

    steps: int
    candidates: list[Candidate]


@dataclass
class Tuning:
    """A search.

    Attributes:
        key: of data, model and settings, without what is tried.
        minutes, candidates: what was asked for.
        base_loss: of the base model, which has to be undercut.
        whole: steps of the whole training.
        setup, spent: seconds before the first trial, and in trials; what goes on does not pay for its setup again.
        ended: whether there is nothing more to try.
        base, tokens: fingerprints of the base model and of the prepared data.
        saved: when it was written last.
    """

    key: str
    minutes: float
    candidates: list[Candidate]
    base_loss: float = math.inf
    rungs: list[Begun] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    whole: int = 0
    setup: float = 0.0
    spent: float = 0.0
    ended: bool = False
    base: str = ""
    tokens: str = ""
    saved: str = ""

    @property
    def of_all_weights(self) -> bool:
        """Whether it is for a training of all weights, and not of an adapter."""
        return not any(candidate.rank for candidate in self.candidates)

    def add(self, trial: Trial) -> None:
        """Another candidate was tried."""
        self.trials.append(trial)
        self.spent += trial.seconds

    def find(self, candidate: Candidate, steps: int) -> Trial | None:
        """What came of it, if it was tried."""
        return next((t for t in self.trials if t.candidate == candidate and t.steps == steps), None)

    def tried(self, rung: Begun) -> list[Trial]:
        """The trials of a rung so far, in its order."""
        return [trial for candidate in rung.candidates if (trial := self.find(candidate, rung.steps))]

    def diverged(self, trial: Trial) -> bool:
        """Whether a candidate made the model worse than it was, or nothing of it."""
        return trial.loss is None or not trial.loss < self.base_loss

    def ranking(self, rung: Begun) -> list[Trial]:
        """The trials of a rung that lowered the loss, the best first; of equals the one nearest to those of `train`."""
        good = [trial for trial in self.tried(rung) if not self.diverged(trial)]
        return sorted(good, key=lambda trial: (trial.loss, self.candidates.index(trial.candidate)))

    @property
    def decided(self) -> tuple[Begun, list[Trial]] | None:
        """The last rung that can be judged by, and its trials, the best first: one that was tried whole, or of the
        first one at least two. None where there is no such rung, or nothing that lowered the loss."""
        out = {trial.candidate for trial in self.trials if self.diverged(trial)}
        for number, rung in reversed(list(enumerate(self.rungs))):
            tried = self.tried(rung)
            if len(tried) < len(rung.candidates) and not (number == 0 and len(tried) > 1):
                continue
            if found := [trial for trial in self.ranking(rung) if trial.candidate not in out]:
                return rung, found
        return None

    def save(self, path: Path) -> None:
        """Write it atomically."""
        self.saved = now()
        with os_errors(path):
            write_json(path, {"schema": SCHEMA, **asdict(self),
                              "base_loss": self.base_loss if math.isfinite(self.base_loss) else None})


def read_tuning(path: Path) -> Tuning | None:
    """What :meth:`Tuning.save` wrote; None where there is none, or none that can be used."""
    try:
        content = object_in(path)
        if content["schema"] != SCHEMA:
            return None
        base = content["base_loss"]
        return Tuning(str(content["key"]), float(content["minutes"]), _candidates(content["candidates"]),
                      math.inf if base is None else float(base),
                      [Begun(int(rung["steps"]), _candidates(rung["candidates"])) for rung in content["rungs"]],
                      [_trial(trial) for trial in content["trials"]], int(content["whole"]),
                      float(content["setup"]), float(content["spent"]), content["ended"] is True,
                      *(str(content[name]) for name in ("base", "tokens", "saved")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _candidates(values: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    return [Candidate(float(value["learning_rate"]), int(value["rank"])) for value in values]


def _trial(value: Mapping[str, Any]) -> Trial:
    loss = value["loss"]
    return Trial(float(value["learning_rate"]), int(value["rank"]), int(value["steps"]),
                 None if loss is None else float(loss), float(value["seconds"]), str(value["reason"]))
