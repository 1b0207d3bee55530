"""Whether a training did what it is for: the loss has to be lower after it than before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A validation loss is of the same rows before and after, but of few rows it says little about others: 5 % or 0.05 nats.
VALIDATION_MARGIN = 0.05
# Training losses are of other rows in each step.
TRAINING_MARGIN = 0.5
_MOST = 10  # steps whose training losses are averaged


@dataclass(frozen=True)
class Worse:
    """A loss that rose.

    Attributes:
        what: which loss.
        before: in nats per trained token; ``after``, too.
        best: step and validation loss of the lowest one in between that is below ``before``; None if there is none.
    """

    what: str
    before: float
    after: float
    best: tuple[int, float] | None = None

    @property
    def figures(self) -> str:
        """Both losses, for a message."""
        return f"{self.what} loss {self.before:.4g} before, {self.after:.4g} after"


def rose(records: Sequence[Mapping[str, Any]]) -> Worse | None:
    """The loss that is higher at the end of a training than before it, also by what may be chance; else None.

    Args:
        records: of the log, those before an interruption included.
    """
    evals = {r["step"]: r["eval_loss"] for r in records if "eval_loss" in r}
    if len(evals) > 1 and 0 in evals:
        last = max(evals)
        step = min(evals, key=evals.__getitem__)
        best = (step, evals[step]) if step not in (0, last) else None
        found = Worse("validation", evals[0], evals[last], best)
    else:  # no validation rows, or the first records are lost
        losses = [r["loss"] for r in records if "loss" in r]
        some = max(1, min(_MOST, len(losses) // 4))
        if len(losses) < 2:
            return None
        found = Worse("training", sum(losses[:some]) / some, sum(losses[-some:]) / some)
    return None if found.after <= found.before else found  # also where it is no number


def is_harm(found: Worse) -> bool:
    """Whether a loss rose by more than chance explains."""
    margin = VALIDATION_MARGIN if found.what == "validation" else TRAINING_MARGIN
    return not found.after <= found.before + margin * max(1.0, found.before)


def advice(found: Worse, learning_rate: float, steps: int) -> str:
    """What to change before training again."""
    if found.best:
        step, loss = found.best
        return (f"the loss was lowest after step {step} of {steps} ({loss:.4g}): train shorter with --max-steps "
                f"{step}, or with a lower --learning-rate than {learning_rate:g}")
    return f"train again with a lower --learning-rate, such as {learning_rate / 10:.1g} instead of {learning_rate:g}"
