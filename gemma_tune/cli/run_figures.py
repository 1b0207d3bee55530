"""A run in figures: what each stage came to, in words, and how much room it takes on the disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.base.words import counted, last_name, size_text, span
from gemma_tune.cli.formats import format_lines
from gemma_tune.cli.screen import figure
from gemma_tune.report.tables import known_measures
from gemma_tune.run.manifest import JUDGED, PAIRS

_LONGEST_LOG = 50_000_000  # bytes of logs/metrics.jsonl that are looked through for the best step
EXAMPLE = "the built-in example"


def stage_lines(stage: str, summary: Mapping[str, Any]) -> list[str]:
    """What a stage's recorded figures say, a few words to a line; empty where there are none."""
    return [line for line in _LINES[stage](summary) if line]


def _prepared(s: Mapping[str, Any]) -> Iterator[str]:
    if None not in (s.get("train_rows"), s.get("valid_rows")):
        what = {PAIRS: " pairs", JUDGED: " judged answers"}.get(s.get("kind", ""), "")
        yield f"{s['train_rows']:,}{what} for training, {s['valid_rows']:,} for validation"
    yield from (f"{d['rows']:,} of {d['of']:,} rows of {d['data']} drawn" for d in s.get("drawn") or ()
                if d["rows"] < d["of"])
    left = [f"{s[key]:,} {what}" for key, what in (("rejected_rows", "rejected"), ("duplicate_rows", "duplicates"))
            if s.get(key)]
    yield ", ".join(left)
    if s.get("picture_rows"):
        yield f"{counted(s['picture_rows'], 'row')} with {counted(s.get('pictures') or 0, 'picture')}"
    if s.get("trained_tokens") is not None:
        yield f"{s['trained_tokens']:,} tokens that are learned"


def _trained(s: Mapping[str, Any]) -> Iterator[str]:
    yield loss_of(s)
    if s.get("method", "sft") != "sft" and s.get("eval_margin_after") is not None:
        share = [f"{s['eval_accuracy_after']:.0%} of the validation pairs won"] if "eval_accuracy_after" in s else []
        yield ", ".join([f"{s['method']}", *share, f"margin {s['eval_margin_after']:+.3g}"])
    if None not in (s.get("kept_step"), s.get("steps")):
        yield f"the weights are those of step {s['kept_step']:,} of {s['steps']:,}"
    speed = [f"{s['tokens_per_second']:,.0f} tokens/s"] if s.get("tokens_per_second") else []
    took = [span(s["training_seconds"])] if s.get("training_seconds") else []
    where = [f"{s['dtype']} on {s['device']}"] if s.get("dtype") and s.get("device") else []
    yield ", ".join([*took, *speed, *where])


def _evaluated(s: Mapping[str, Any]) -> Iterator[str]:
    if {"questions", "base_ended", "tuned_ended"} <= s.keys():
        yield f"answers that end: base {s['base_ended']}, tuned {s['tuned_ended']} of {s['questions']}"
    if reward := known_measures(s).get("reward"):
        yield f"reward of an answer: base {reward['base'][0]:.3f}, tuned {reward['tuned'][0]:.3f}"


def _merged(s: Mapping[str, Any]) -> Iterator[str]:
    if s.get("merged_tensors") is not None:
        yield counted(s["merged_tensors"], "tensor") + " merged"
    if s.get("check_same_tokens") is not None:
        yield f"same likeliest tokens: {figure('check_same_tokens', s['check_same_tokens'])}"
    elif s.get("check_skipped"):
        yield f"not checked: {s['check_skipped']}"


def _exported(s: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"{quant}: {text}" for quant, text in format_lines(s))
    if sight := s.get("projector"):
        yield f"{' and '.join(sight['senses'])}: {size_text(sight['bytes'])} for all of these"
    elif s.get("text_alone"):
        yield "takes text alone, which its base model does not"


_LINES = {"prepare": _prepared, "train": _trained, "eval": _evaluated, "merge": _merged, "export-ollama": _exported}


def loss_of(summary: Mapping[str, Any]) -> str:
    """Validation loss before and after a training, without validation rows the training loss; of a training from
    rewards these; empty if unknown."""
    what = "reward" if summary.get("method") == "grpo" else "loss"
    for kind, first, last in (("validation", f"eval_{what}_before", f"eval_{what}_after"),
                              ("training", f"train_{what}_first", f"train_{what}_last")):
        if None not in (summary.get(first), summary.get(last)):
            return f"{kind} {what} {summary[first]:.3f} to {summary[last]:.3f}"
    return ""


class BestSoFar(NamedTuple):
    """The lowest validation loss of a training, or the highest validation ``reward``."""

    step: int
    value: float
    what: str = "loss"

    @property
    def named(self) -> str:
        """What it is, for people."""
        return f"{'highest' if self.what == 'reward' else 'lowest'} validation {self.what}"


def best_so_far(log: Path, last: float = math.inf) -> BestSoFar | None:
    """That of the log of a training up to its ``last`` step; None where there is none."""
    best: tuple[float, int] | None = None
    what = "loss"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        if log.stat().st_size > _LONGEST_LOG:
            return None
        with log.open(encoding="utf-8") as lines:
            for record in (json.loads(line) for line in lines if '"eval_loss"' in line or '"eval_reward"' in line):
                what = "reward" if "eval_reward" in record else "loss"
                sign = -1 if what == "reward" else 1  # also of steps: of equal rewards the latest is kept
                value = record[f"eval_{what}"] * sign
                if math.isfinite(value) and record["step"] <= last:
                    best = min(best or (math.inf, 0), (value, sign * record["step"]))
    sign = -1 if what == "reward" else 1
    return BestSoFar(sign * best[1], sign * best[0], what) if best else None


def data_of(record: Mapping[str, Any]) -> str:
    """What a run was prepared from, by its names alone."""
    names = record.get("config", {}).get("data", {}).get("value") or []
    if not names:
        return EXAMPLE
    first = last_name(names[0])
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def disk_usage(folder: Path) -> int:
    """Bytes of the files below a directory; links are not followed, and what cannot be read is not counted."""
    total = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                total += disk_usage(Path(entry.path)) if entry.is_dir(follow_symlinks=False) else (
                    entry.stat(follow_symlinks=False).st_size)
    return total
