"""What ``tune`` found out: a table, a sentence, a picture, and a settings file for ``train``."""

from __future__ import annotations

import math
from typing import Any

from gemma_tune.base.files import write_atomic
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.config.settings import plain
from gemma_tune.config.settings_file import ORIGINS, settings_file
from gemma_tune.run.directory import RunDir
from gemma_tune.run.session import Session
from gemma_tune.train.results import draw
from gemma_tune.train.tuning import Trial, Tuning

_CLOSE = 0.005  # of a loss: two candidates that differ by less may have changed places by chance


def show(tuning: Tuning, listener: Listener) -> None:
    """Every trial by rungs, the best first, and which of them won."""
    rows = [("rung", "steps", "learning rate", "rank", "validation loss", "seconds", "")]
    decided = tuning.decided
    for number, rung in enumerate(tuning.rungs, start=1):
        ranked = tuning.ranking(rung)
        others = [trial for trial in tuning.tried(rung) if trial not in ranked]
        for trial in [*ranked, *others]:
            rows.append((str(number), f"{trial.steps:,}", f"{trial.learning_rate:g}", f"{trial.rank or '–'}",
                         "–" if trial.loss is None else f"{trial.loss:.4f}", f"{trial.seconds:.1f}",
                         _came(tuning, trial, decided[1][0] if decided else None)))
    listener.grid(f"validation loss by candidate; before training {tuning.base_loss:.4f}", rows)
    if decided:
        for sentence in _sentences(tuning, decided[1]):
            listener.note(sentence)


def _came(tuning: Tuning, trial: Trial, best: Trial | None) -> str:
    if trial.loss is None:
        return f"diverged: {trial.reason}"
    if tuning.diverged(trial):
        above = trial.loss > (1 + _CLOSE) * tuning.base_loss
        return "diverged: above the loss before training" if above else "has not lowered the loss"
    return "best" if trial == best else ""


def _sentences(tuning: Tuning, ranked: list[Trial]) -> list[str]:
    best = ranked[0]
    said = [f"the best is {best.candidate}: validation loss {best.loss:.4f} after {counted(best.steps, 'step')}, "
            f"{tuning.base_loss:.4f} before"]
    if len(ranked) > 1:
        close = ranked[1].loss - best.loss < _CLOSE * best.loss
        said[0] += f"; next is {ranked[1].candidate} with {ranked[1].loss:.4f}" + (", hardly worse" if close else "")
    if 2 * best.steps < tuning.whole:
        said.append(f"that is {best.steps:,} of the {tuning.whole:,} steps of the whole training: a short one likes a "
                    f"higher rate than a long one, so more than --minutes {tuning.minutes:g} tell more")
    rates = sorted({trial.learning_rate for trial in tuning.tried(tuning.rungs[0])})
    if len(rates) > 1 and best.learning_rate in (rates[0], rates[-1]):
        highest = best.learning_rate == rates[-1]
        further = [best.learning_rate * (2.0 ** n if highest else 0.5 ** n) for n in range(3)]
        said.append(f"it has the {'highest' if highest else 'lowest'} learning rate that was tried; to look further: "
                    f"--learning-rates {','.join(f'{rate:.3g}' for rate in further)}")
    return said


def write_results(asked: Session, tuning: Tuning, run: RunDir) -> dict[str, str]:
    """The settings file and the picture, as paths by name; ``tune.json`` is there already.

    Args:
        asked: the training that was tuned; what was given for it is in the file as well.
    """
    decided = tuning.decided
    assert decided
    rung, ranked = decided
    best = ranked[0]
    won = {"full": not best.rank, "learning_rate": best.learning_rate} | ({"rank": best.rank} if best.rank else {})
    values = {name: plain(value) for name, value in asked.config.as_dict().items() if name in asked.resolved.given}
    sources = {name: ORIGINS.get(asked.resolved.origins[name], "given") for name in values}
    tried = len(tuning.tried(tuning.rungs[0]))
    reason = f"the best of {tried}: validation loss {best.loss:.4f}"
    sources |= {"learning_rate": reason, "rank": reason if len({c.rank for c in tuning.candidates}) > 1 else
                sources.get("rank", ORIGINS["default"])}
    about = ["What `gemma-tune tune` found best; to train with it: gemma-tune train --config PATH-OF-THIS-FILE",
             f"{counted(tried, 'candidate')} in {counted(len(tuning.rungs), 'rung')}; "
             f"validation loss {best.loss:.4f} after {counted(rung.steps, 'step')}, {tuning.base_loss:.4f} before"]
    write_atomic(run.tune_settings, settings_file("train", values | won, sources, about).encode())
    _plot(tuning, run)
    return {"settings": str(run.tune_settings), "trials": str(run.tuning), "plot": str(run.tune_plot)}


def _plot(tuning: Tuning, run: RunDir) -> None:
    """Loss over learning rate, a line for each rung and rank."""
    lines: list[tuple[str, str, list[tuple[Any, Any]]]] = []
    several = len({candidate.rank for candidate in tuning.candidates}) > 1
    for number, rung in enumerate(tuning.rungs, start=1):
        for rank in sorted({candidate.rank for candidate in rung.candidates}):
            points = sorted((t.learning_rate, t.loss) for t in tuning.tried(rung)
                            if t.rank == rank and t.loss is not None)
            name = f"rung {number}, {counted(rung.steps, 'step')}" + (f", rank {rank}" if several else "")
            lines.append((name, "o-", points))
    if math.isfinite(tuning.base_loss):
        rates = [candidate.learning_rate for candidate in tuning.candidates]
        lines.append(("before training", "k:", [(min(rates), tuning.base_loss), (max(rates), tuning.base_loss)]))
    run.tune_plot.parent.mkdir(parents=True, exist_ok=True)
    draw(run.tune_plot, lines, "learning rate", "validation loss (nats per trained token)", logarithmic=True)
