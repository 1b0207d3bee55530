"""What a report tells, read from a run directory: whatever is missing or damaged there is left out.

Nothing of it is trusted: the manifest may have been changed by hand, and texts are of anybody.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.words import last_name
from gemma_tune.config.settings import as_flags
from gemma_tune.config.stages import CONFIGS, DEFAULT_MODEL
from gemma_tune.report import charts, tables
from gemma_tune.run.directory import RunDir
from gemma_tune.run.earlier_exports import still_good, summary_now
from gemma_tune.run.manifest import STAGES, Manifest
from gemma_tune.run.state import prepared_since, superseded

_MOST_ANSWERS = 100  # that are shown; the others are in answers.json
_LONGEST = 20_000  # characters of a text
_SENSES = {"vision": ("pictures", "图片"), "audio": ("sounds", "声音")}  # what a model takes, in both languages
_OF_THE_PLACE = ("push", "private", "host")  # settings of a machine or an account, which make no other result


def contents(run: RunDir, manifest: Manifest) -> dict[str, Any]:
    """Everything that the page's template asks for, by name."""
    old = superseded(manifest)  # what they tell is of another adapter than the one that the page is about
    summaries = {name: stage["summary"] for name, stage in manifest.stages.items() if name not in old}
    if "export-ollama" in summaries:
        summaries["export-ollama"] = summary_now(run, manifest)
    settings = {name: {key: entry.get("value") for key, entry in stage["config"].items()}
                for name, stage in manifest.stages.items()}
    answers = _answers(run, summaries)
    newer = prepared_since(manifest)
    return {
        "model": manifest.model, "summary": {name: summaries.get(name, {}) for name in STAGES},
        "settings": {name: settings.get(name, {}) for name in STAGES},
        "data": None if newer else _data(run), "newer_data": newer, "curves": _curves(run, summaries.get("train", {})),
        "measures": _measures(summaries.get("eval", {})), "task_rows": _tasks(summaries.get("eval", {})),
        "few_rows": tables.FEW_ROWS, "answers": answers[:_MOST_ANSWERS], "more_answers": answers[_MOST_ANSWERS:],
        "formats": _formats(summaries.get("export-ollama", {})), "parity": _parity(summaries.get("export-ollama", {})),
        "sight": _sight(summaries.get("export-ollama", {})),
        "text_alone": f"{summaries.get('export-ollama', {}).get('text_alone') or ''}",
        "seconds": {name: _seconds(stage) for name, stage in manifest.stages.items()},
        "start": last_name(f"{settings.get('train', {}).get('from_adapter') or ''}"), "superseded": old,
        "commands": [] if newer else _commands(manifest, settings),
    }


# --- files of the run

def _json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def _data(run: RunDir) -> dict[str, Any] | None:
    """data/report.json with the names of files alone: where they lie is this machine's matter."""
    found = _json(run.data_report)
    if not isinstance(found, Mapping):
        return None
    with _whatever_is_there():
        before = found["before_the_limit"]
        return {
            **{key: int(found[key]) for key in ("rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows",
                                                "tokens", "trained_tokens")},
            **{key: {str(name): int(rows) for name, rows in found[key].items()}
               for key in ("rejected_by_reason", "formats")},
            "kind": f"{found.get('kind')}",
            "drawn": [{"name": last_name(part["data"]), "rows": int(part["rows"]), "of": int(part["of"])}
                      for part in found.get("drawn", ()) if part["rows"] < part["of"]],
            "ends": len(found.get("ends_held_out", ())),
            "files": [last_name(item["file"]) for item in found["files"]],
            "longest": int(before["length"]["longest"]),
            "chart": charts.lengths_chart(before["histogram"])}
    return None


@contextlib.contextmanager
def _whatever_is_there() -> Iterator[None]:
    """A part of the report whose figures are not as this version writes them is left out."""
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError,
                             OverflowError):
        yield


def _curves(run: RunDir, trained: Mapping[str, Any]) -> Any:
    losses, evals = [], []
    what = "reward" if trained.get("method") == "grpo" else "loss"
    with contextlib.suppress(OSError, UnicodeDecodeError), open(
            run.log_of(trained.get("training_id")), encoding="utf-8") as lines:
        for line in lines:
            with _whatever_is_there():
                record = json.loads(line)
                step = float(record["step"])
                for points, key in ((losses, what), (evals, f"eval_{what}")):
                    if math.isfinite(record.get(key, math.nan)):
                        points.append((step, float(record[key])))
    with _whatever_is_there():
        shift = trained.get("counted_after", 0)  # of a training whose log has its own steps alone
        parts = [[(step + shift, loss) for step, loss in points] for points in (losses, evals)]
        return charts.loss_chart(*parts, trained.get("kept_step"), what)
    return None


def _answers(run: RunDir, summaries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Prompts with both answers, as answers.json has them."""
    if "eval" not in summaries:
        return []
    found, kept = _json(run.answers), []
    for item in found if isinstance(found, list) else ():
        with _whatever_is_there():
            kept.append({
                "prompt": [_turn(turn) for turn in item["prompt"]],
                "tools": [str(name) for name in item.get("tools") or ()],
                "reference": _cut(item["reference"]) if isinstance(item.get("reference"), str) else None,
                **{side: {"text": _cut(item[side]), "ended": bool(item[f"{side}_ended"]),
                          "reward": tables.reward_of(item, side)} for side in ("base", "tuned")}})
    return kept


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    from gemma_tune.answers.prompts import Prompt, named_shortly, shown

    pictures = named_shortly(Prompt([dict(turn)]).pictures)
    return {"role": str(turn["role"]), "text": _cut(shown(turn)), "pictures": pictures}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} characters more)"


# --- figures of the manifest


def _measures(evaluated: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name, values in tables.known_measures(evaluated).items():
        measure = tables.measure_of(name, values)
        found.append({
            "key": name, "name": measure.name, "zh": measure.zh, "rows": values["rows"],
            "verdict": tables.verdict(name, values), "plot": charts.interval_plot(values["base"], values["tuned"]),
            "base": tables.with_interval(values["base"], measure.kind),
            "tuned": tables.with_interval(values["tuned"], measure.kind),
            "difference": tables.with_interval(values["difference"], measure.kind, tables.signed),
            "short": {side: tables.number(values[side][0], measure.kind) for side in ("base", "tuned")}})
    return found


def _tasks(evaluated: Mapping[str, Any]) -> list[tuple[str, ...]]:
    with _whatever_is_there():
        return tables.task_rows(evaluated)
    return []


def _formats(exported: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = []
    earlier = still_good(exported.get("earlier") or {})  # whose figures of f16 are their own
    for name, item in {**(exported.get("quants") or {}), **earlier}.items():
        row = {"name": name, "bytes": item["bytes"], "loses": item.get("loses")}
        for kind, prefix in (("own", ""), ("general", "general_")):
            with _whatever_is_there():
                row[kind] = item[f"{prefix}perplexity"] / {**exported, **item}[f"f16_{prefix}perplexity"] - 1
        rows.append(row)
    if not rows:
        return None
    with _whatever_is_there():
        return {"rows": rows, "recommended": exported.get("recommended"), "chart": charts.formats_chart(rows)}
    return {"rows": rows, "recommended": None, "chart": None}


def _sight(exported: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file with which the exported model takes pictures and sounds, and what a check of it found."""
    with _whatever_is_there():
        found = exported["projector"]
        apart = found.get("pictures_apart")
        return {"file": f"{found['file']}", "bytes": int(found["bytes"]), "engine": f"{found.get('engine') or ''}",
                "senses": sorted(_SENSES[sense] for sense in found["senses"]),
                "apart": float(apart) if isinstance(apart, int | float) else None}
    return None


def _parity(exported: Mapping[str, Any]) -> dict[str, Any] | None:
    with _whatever_is_there():
        found = exported["parity"]
        names = ("equal", "template_only", "known_limit", "differs")
        greedy = found.get("greedy", {})
        unchecked = greedy.get("not_checked", "")
        return {"engine": found.get("engine"),
                "ids": {str(target): {**{name: int(counts.get(name, 0)) for name in names},
                                      "remarks": [str(remark) for remark in counts.get("remarks", ())]}
                        for target, counts in found["ids"].items()},
                "greedy": {str(name): {key: int(value[key]) for key in ("answers", "whole", "tokens", "leading")}
                           for name, value in ({} if unchecked else greedy).items()},
                "greedy_unchecked": str(unchecked)}
    return None


def _seconds(stage: Mapping[str, Any]) -> float | None:
    with _whatever_is_there():
        begin, end = (dt.datetime.fromisoformat(stage[key]) for key in ("started", "ended"))
        return max(0.0, (end - begin).total_seconds())
    return None


def _commands(manifest: Manifest, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to type, in the run's directory, to make everything again: settings that are not defaults."""
    found = []
    foreign = "train" not in manifest.stages  # an adapter from elsewhere, which is compared once it is merged
    for name in sorted(STAGES, key=lambda name: foreign and name == "eval"):
        if name not in manifest.stages:
            continue
        chosen = {key: value for key, value in settings[name].items()
                  if manifest.stages[name]["config"][key].get("from") not in ("default", "family", "adapter")}
        words = ["gemma-tune", name]
        if name == "prepare":
            words += [f"{one}" for one in settings[name].get("data") or ()]
            model = manifest.model.get("path") or manifest.model["id"]
            words += ["--model", model] if model != DEFAULT_MODEL else []
            revision = manifest.model.get("revision")
            words += ["--revision", revision] if revision else []
        left_out = (*_OF_THE_PLACE, *(["data"] if name == "prepare" else []))
        with _whatever_is_there():
            words += as_flags(CONFIGS[name], {key: value for key, value in chosen.items() if key not in left_out})
        found.append(shell.join([*words, "--run", "."]))
    return found
