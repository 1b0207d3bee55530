"""Whether a training did what it is for: the loss has to be lower after it than before, or the reward higher."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma_tune.base.words import counted

if TYPE_CHECKING:
    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.train.effect import LogitChange, Moved

# A validation loss is of the same rows before and after, but of few rows it says little about others: 5 % or 0.05 nats.
VALIDATION_MARGIN = 0.05
# Training losses are of other rows in each step: they speak where each side averages over some steps, and differs by
# more than they do among themselves. Of whole epochs they have the same rows, in other company.
TRAINING_MARGIN, EPOCHS_MARGIN = 0.5, 0.2
_FEWEST, _MOST = 4, 10  # steps whose training losses are averaged
_ERRORS = 3.0  # standard errors that chance seldom makes
LEAST_REWARD = 1e-6  # what two equal means of rewards may differ by
KNOWN = 0.01  # nats per token: what a model knows so well leaves nothing to learn
# A divergence in nats per token, and a part of the loss, below which nobody will see a difference.
NEGLIGIBLE, NEGLIGIBLE_LOSS = 1e-10, 1e-5
SMALLEST_SCALE = 1e-4
_LEVEL = ".9g"  # digits of a mean of rewards that say something
MOST_SKIPPED = 20  # steps after which the loss scaler of fp16 has found its factor


@dataclass(frozen=True)
class Measure:
    """What a training's weights are judged by. Here and in ``best`` the lowest is the best, so a reward counts with its
    sign turned.

    Attributes:
        key: what records of the log call it.
        name: what people do.
        sign: of what counts.
        best, better: what the best value is, and one that is better than another.
        later: whether the later one of equal values is the better one. Rewards are often the same while the model still
            learns; two losses hardly ever are.
    """

    key: str
    name: str
    sign: int
    best: str
    better: str
    later: bool = False

    def level(self, value: float) -> float:
        """A value as it is compared, less what summing rewards in another order makes of it; infinite for no number."""
        return math.inf if not math.isfinite(value) else float(f"{value:{_LEVEL}}") if self.later else value

    def lowest(self, values: Mapping[int, float]) -> int:
        """The step of the best of some values."""
        return min(values, key=lambda step: (self.level(values[step]), -step if self.later else step))

    def shown(self, value: float) -> str:
        """The figure as it is."""
        return f"{self.sign * value:.4g}"


LOSS = Measure("eval_loss", "loss", 1, "lowest", "lower")
REWARD = Measure("eval_reward", "reward", -1, "highest", "higher", later=True)


def measure_of(config: TrainConfig) -> Measure:
    """That of a method."""
    return REWARD if config.method == "grpo" else LOSS


@dataclass(frozen=True)
class LossChange:
    """A loss, or a reward with its sign turned, before and after a training.

    Attributes:
        what: which loss.
        before: in nats per trained token; ``after``, too.
        best: step and validation loss of the lowest one in between that is below ``before``; None if there is none.
        same_rows: whether both are of the same rows.
        error: standard error of the difference, where they are not; of rewards always.
        measure: what it is.
    """

    what: str
    before: float
    after: float
    best: tuple[int, float] | None = None
    same_rows: bool = True
    error: float = 0.0
    measure: Measure = LOSS

    @property
    def by_chance(self) -> bool:
        """Whether both are of other rows, and so few of them that they may differ as much where nothing changed."""
        return not self.same_rows and abs(self.after - self.before) <= _ERRORS * self.error

    @property
    def figures(self) -> str:
        """Both, for a message."""
        before, after = map(self.measure.shown, (self.before, self.after))
        return f"{self.what} {self.measure.name} {before} before, {after} after"


def validation_losses(records: Sequence[Mapping[str, Any]], measure: Measure = LOSS) -> dict[int, float]:
    """By step, of the log's records; step 0 is before the first one. Of rewards with their sign turned."""
    return {record["step"]: measure.sign * record[measure.key] for record in records if measure.key in record}


def changes(records: Sequence[Mapping[str, Any]]) -> list[LossChange]:
    """Validation loss and training loss before and after, that of them first that says most; those that are known.

    Args:
        records: of the log, those before an interruption included.
    """
    found = []
    measure = REWARD if any("reward" in record or REWARD.key in record for record in records) else LOSS
    evals = validation_losses(records, measure)
    if len(evals) > 1 and 0 in evals:  # else there are no validation rows, or the first records are lost
        last = max(evals)
        step = min(evals, key=evals.__getitem__)
        best = (step, evals[step]) if step not in (0, last) else None
        found.append(LossChange("validation", evals[0], evals[last], best, measure=measure,
                                error=_error_of_rewards(records, 0, last)))
    steps = [r for r in records if "loss" in r]
    if (some := _averaged(steps)) is not None:
        losses, tokens = [r["loss"] for r in steps], _tokens_of(steps)
        if measure is REWARD:  # each step has as many answers
            losses, tokens = [-r["reward"] for r in steps], [1] * len(steps)
        sides = [sum(loss * n for loss, n in zip(losses[part], tokens[part])) / sum(tokens[part])
                 for part in (slice(some), slice(-some, None))]
        found.append(LossChange("training", *sides, same_rows=some % _epoch_of(steps) == 0,
                                error=_error_of(losses[:some], losses[-some:]), measure=measure))
    return found


def _error_of_rewards(records: Sequence[Mapping[str, Any]], *steps: int) -> float:
    """Standard error of the difference of the mean validation rewards after two steps, as if they were of other
    prompts; 0 where they are none.

    Both are taken for samples of one kind, whose variance is that of all their rewards together. So few prompts that
    all have the same reward on each side have a spread as well: of fewer than 5 no fall is more than chance.
    """
    sides = [record for step in steps for record in records if record["step"] == step and REWARD.key in record]
    counts = [max(1, record.get("eval_prompts", 1)) for record in sides]
    if len(sides) < 2:
        return 0.0
    within = sum((count - 1) * side.get("eval_reward_std", 0.0) ** 2 for count, side in zip(counts, sides))
    between = (sides[0][REWARD.key] - sides[1][REWARD.key]) ** 2 / sum(1 / count for count in counts)
    return math.sqrt((within + between) / (sum(counts) - 1) * sum(1 / count for count in counts))


def _averaged(steps: Sequence[Mapping[str, Any]]) -> int | None:
    """How many steps at the beginning, and at the end, say how a training went: whole epochs where those are short, as
    they have the same rows; None where there are too few steps for either."""
    some, epoch, most = max(_FEWEST, min(_MOST, len(steps) // 4)), _epoch_of(steps), len(steps) // 2
    if epoch <= min(some, most):
        return min(some, most) // epoch * epoch
    return some if some <= most else None


def _epoch_of(steps: Sequence[Mapping[str, Any]]) -> int:
    """Steps of an epoch; more than there are where it is not known."""
    last = steps[-1] if steps else {}
    return max(1, round(last["step"] / last["epoch"])) if last.get("epoch") else len(steps) + 1


def _tokens_of(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of each step, of which the log has the sum; 1 for each where it does not begin with the first one."""
    sums = [0, *(r.get("tokens", 0) for r in steps)]
    counts = [after - before for before, after in zip(sums, sums[1:])]
    return counts if min(counts) > 0 and steps[0]["step"] == 1 else [1] * len(steps)


def _error_of(*sides: Sequence[float]) -> float:
    """Standard error of the difference of two means (Welch); 0 where it cannot be told."""
    if len(sides[0]) < 2 or not all(math.isfinite(loss) for side in sides for loss in side):
        return 0.0
    return math.sqrt(sum(statistics.variance(side) / len(side) for side in sides))


def rose(records: Sequence[Mapping[str, Any]]) -> LossChange | None:
    """The loss that is higher at the end of a training than before it, also by what may be chance; else None."""
    found = next(iter(changes(records)), None)
    return None if found is None or found.after <= found.before else found  # also where it is no number


def first_loss(records: Sequence[Mapping[str, Any]]) -> float:
    """Of the training, before anything was learned; infinite where it is not known, or says nothing, as that of answers
    with rewards."""
    return next((r["loss"] for r in records if "loss" in r and "reward" not in r), math.inf)


def never_compared(records: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Mean rewards of the steps of a training in which all answers to a prompt always had the same one; None where two
    differed, or there are none."""
    steps = [r for r in records if "frac_reward_zero_std" in r]
    return [r["reward"] for r in steps] if steps and all(r["frac_reward_zero_std"] == 1 for r in steps) else None


def is_harm(found: LossChange) -> bool:
    """Whether a loss rose, or a reward fell, by more than chance explains."""
    if found.measure is REWARD:
        return not found.after <= found.before + max(LEAST_REWARD, _ERRORS * found.error)
    if found.what == "validation":
        margin, by_chance = VALIDATION_MARGIN, 0.0
    else:
        margin, by_chance = (EPOCHS_MARGIN, 0.0) if found.same_rows else (TRAINING_MARGIN, _ERRORS * found.error)
    return not found.after <= found.before + max(margin * max(1.0, found.before), by_chance)


def advice(found: LossChange, learning_rate: float, steps: int) -> str:
    """What to change before training again."""
    if found.best:
        step, loss = found.best
        name, best = found.measure.name, found.measure.best
        return (f"the {name} was {best} after step {step} of {steps} ({found.measure.shown(loss)}): train shorter with "
                "--max-steps "
                f"{step}, or with a lower --learning-rate than {learning_rate:g}")
    return f"train again with a lower --learning-rate, such as {learning_rate / 10:.1g} instead of {learning_rate:g}"


def without_effect(moved: Moved, change: LogitChange | None, records: Sequence[Mapping[str, Any]]) -> str | None:
    """What shows that a training did nothing at all; None if it did something.

    Args:
        change: None where it was not looked at.
    """
    if len(moved.still) == moved.layers:
        return "nothing that was trained has other weights than before"
    if change is None:
        return None
    if change.largest == 0:
        return "base and trained model give the same logits"
    # A training loss falls a little by chance, being of other rows in the end.
    fell = any(loss.after < loss.before * (1 - NEGLIGIBLE_LOSS) for loss in changes(records)
               if loss.what == "validation")
    if change.divergence < NEGLIGIBLE and not fell:
        return f"base and trained model say the same (divergence {change.divergence:.1g} nats per token)"
    return None


def likely_cause(config: TrainConfig, records: Sequence[Mapping[str, Any]], steps: int, trained_tokens: int,
                 usual_rate: float) -> tuple[str, str]:
    """Why a training did nothing, and what to do about it.

    Args:
        trained_tokens: of the training rows.
        usual_rate: the learning rate that the method has by default with this model.
    """
    again = f"train again with --learning-rate {usual_rate:g}"
    norms = [r["grad_norm"] for r in records if r.get("grad_norm") is not None]
    if (rewards := never_compared(records)) is not None:
        return ("no group of answers ever had two different rewards, so that there was nothing to prefer: "
                f"{min(rewards):.3g} to {max(rewards):.3g} in all steps",
                "look at what is rewarded, in logs/rollouts.jsonl: a reward that tells good answers from better ones "
                "is needed, prompts that the model answers well now and then, more --answers, or a training of answers "
                "before (--method sft)")
    if config.learning_rate == 0:
        return "the learning rate is 0", again
    if not trained_tokens:
        return "no token of the data is learned", "see what is learned of it: gemma-tune prepare --preview 3"
    if norms and not any(norms) and config.full:
        return "the gradient was zero in every step", "train again with --dtype fp32"
    if norms and not any(norms):
        return ("the gradient was zero in every step, so the adapted layers take no part in the answers",
                "train again with --target-modules all")
    if config.scale < SMALLEST_SCALE:
        return f"the adapter is scaled by {config.scale:.1g}, which takes away what it learns", "train with --alpha 32"
    if config.learning_rate < usual_rate / 100:
        return f"a learning rate of {config.learning_rate:g} is too small", again
    if config.dtype == "fp16" and steps < MOST_SKIPPED:
        return ("in fp16 the first steps are skipped until none overflows", "train with more steps, or --dtype bf16")
    return (f"{counted(steps, 'step')} at a learning rate of {config.learning_rate:g} did not suffice",
            "train again with more --epochs, or a higher --learning-rate")
