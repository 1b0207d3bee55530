"""The comparison of base and tuned model as rows of texts: for report.md, report.html and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FEW_ROWS = 20  # below which an interval from resampled rows is rough
LEGEND = ("In brackets 95 % intervals, by drawing the rows anew 2,000 times, for the difference the same rows of both "
          "models. chrF is sacrebleu's, 0 to 100.")


@dataclass(frozen=True)
class Measure:
    """How a figure is called and read.

    Args:
        zh: its name in Chinese.
        kind: ``plain``, ``share`` (0 to 1, shown in percent), ``score`` (0 to 100) or ``length`` (whole numbers).
        better: 1 where more is better, -1 where less is, 0 where it depends.
    """

    name: str
    zh: str
    kind: str
    better: int


MEASURES: dict[str, Measure] = {
    "loss": Measure("loss per learned token, nats", "损失（每个学习的 token，nat）", "plain", -1),
    "perplexity": Measure("perplexity, learned tokens", "学习的 token 的困惑度", "plain", -1),
    "preferred": Measure("better answer is likelier", "较好回答概率更高的比例", "share", 1),
    "preferred_per_token": Measure("the same per token", "同上（按每个 token 平均）", "share", 1),
    "margin": Measure("margin of log p, nats", "较好与较差回答的对数概率之差（nat）", "plain", 1),
    "better_log_probability": Measure("log p of better, nats", "较好回答的对数概率（nat）", "plain", 1),
    "worse_log_probability": Measure("log p of worse, nats", "较差回答的对数概率（nat）", "plain", -1),
    "reward": Measure("reward of an answer", "回答的奖励", "plain", 1),
    "exact_match": Measure("answers that are the row's own", "与数据中答案完全一致", "share", 1),
    "chrf": Measure("chrF against the row's own answer", "与数据中答案的 chrF", "score", 1),
    "in_form": Measure("answers in the example's form", "符合示例格式的回答", "share", 1),
    "ended": Measure("answers that end by themselves", "自行结束的回答", "share", 1),
    "repeats": Measure("answers that end in a loop", "陷入重复的回答", "share", -1),
    "length": Measure("length of an answer, tokens", "回答长度（token）", "length", 0),
    "general_loss": Measure("loss on general text", "通用文本上的损失", "plain", -1),
    "general_perplexity": Measure("perplexity of general text", "通用文本的困惑度", "plain", -1),
}
_PARTS = "rewards/"  # before the name of each of several rewards
BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


def known_measures(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The measures of a summary of ``eval``, in their order, as far as they are whole."""
    found = summary.get("measures")
    if not isinstance(found, Mapping):
        return {}
    parts = [name for name in found if str(name).startswith(_PARTS)]
    names = [name for known in MEASURES for name in (known, *(parts if known == "reward" else ()))]
    return {name: found[name] for name in names if name in found and _is_whole(found[name])}


def measure_of(name: str, found: Mapping[str, Any]) -> Measure:
    """How a figure is called and read; one of several rewards by its own name, and as its weight has it."""
    if not name.startswith(_PARTS):
        return MEASURES[name]
    own, weight = name.removeprefix(_PARTS), found.get("weight", 1)
    return Measure(f"the reward {own} alone", f"仅奖励 {own}", "plain",
                   -1 if isinstance(weight, int | float) and weight < 0 else 1)


def rough_rows(summary: Mapping[str, Any]) -> int | None:
    """Rows of the measure that has the fewest, where they are so few that its interval is rough; None where none is."""
    fewest = min((found["rows"] for found in known_measures(summary).values()), default=FEW_ROWS)
    return fewest if fewest < FEW_ROWS else None


def _is_whole(found: Any) -> bool:
    return isinstance(found, Mapping) and isinstance(found.get("rows"), int) and all(
        isinstance(found.get(part), list) and len(found[part]) == 3 and isinstance(found[part][0], int | float)
        and all(isinstance(v, int | float | None) for v in found[part]) for part in ("base", "tuned", "difference"))


def number(value: float, kind: str) -> str:
    """A figure of a measure as people read it.

    >>> number(0.25, "share"), number(3.14159, "plain"), number(1234.5, "plain"), number(12.4, "length")
    ('25 %', '3.142', '1,234', '12')
    """
    if kind == "share":
        return f"{100 * value:.0f} %"
    if kind == "length":
        return f"{value:,.0f}"
    if kind == "score":
        return f"{value:.1f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 1000 else f"{value:,.0f}"


def signed(value: float, kind: str) -> str:
    """A difference, with its sign: ``+25 %``."""
    text = number(abs(value), kind)
    return text if text.strip("0. %") == "" else f"{'-' if value < 0 else '+'}{text}"


def with_interval(parts: list[float | None], kind: str, write: Any = number) -> str:
    """``value [low, high]``; of a single row the value alone."""
    value, low, high = parts
    if low is None or high is None:
        return write(value, kind)
    return f"{write(value, kind)} [{write(low, kind)}, {write(high, kind)}]"


def verdict(name: str, found: Mapping[str, Any]) -> str:
    """Whether the tuned model is better, as far as the interval of the difference tells; "" where it cannot."""
    _, low, high = found["difference"]
    better = measure_of(name, found).better
    if low is None or high is None:
        return ""
    if low <= 0 <= high:
        return UNCLEAR
    if not better:
        return "longer" if low > 0 else "shorter"
    return BETTER if (low > 0) == (better > 0) else WORSE


def measure_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Name, rows, base, tuned, difference and what that says, for each measure."""
    rows = []
    for name, found in known_measures(summary).items():
        measure = measure_of(name, found)
        rows.append((measure.name, f"{found['rows']:,}", with_interval(found["base"], measure.kind),
                     with_interval(found["tuned"], measure.kind),
                     with_interval(found["difference"], measure.kind, signed), verdict(name, found)))
    return rows


def short_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The same for a terminal of 80 columns: the interval of the difference alone, and ``unclear``."""
    return [(name, base.split(" [")[0], tuned.split(" [")[0], difference, "unclear" if said == UNCLEAR else said)
            for name, _, base, tuned, difference, said in measure_rows(summary)]


def reward_of(answered: Mapping[str, Any], side: str) -> str:
    """What an answer of answers.json is worth, in words; "" where it was not scored.

    >>> reward_of({"tuned_reward": 0.5}, "tuned"), reward_of({}, "base")
    ('reward 0.5', '')
    """
    value = answered.get(f"{side}_reward")
    return f"reward {value:.3g}" if isinstance(value, int | float) else ""


def task_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Task, metric, base, tuned and difference, for each figure of lm-evaluation-harness."""
    rows = []
    tasks = summary.get("tasks")
    for task, figures in tasks.items() if isinstance(tasks, Mapping) else ():
        for metric, sides in figures.items():
            (base, base_error), (tuned, tuned_error) = sides["base"], sides["tuned"]
            rows.append((task, metric, _with_error(base, base_error), _with_error(tuned, tuned_error),
                         signed(tuned - base, "plain")))
    return rows


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
