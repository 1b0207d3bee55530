"""``manifest.json``, the contract between the stages: what it names is whole. It is never written in part.

It holds no absolute path and no token, and a run can be moved.

The manifest that names a new result is written before the result takes its place, as ``.next-manifest.json``, and takes
its own place after it. So a full disk is noticed while nothing has changed yet; and what a kill leaves in between is
taken up by the next command (see ``run.unrecorded``).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from gemma_tune import __version__
from gemma_tune.base import shell
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import os_errors, put_in_place, write_json
from gemma_tune.base.strict_json import NoObject, object_in
from gemma_tune.base.versions import library_versions
from gemma_tune.base.words import _UNSAFE, shown
from gemma_tune.config.settings import converted, misfit, types_of
from gemma_tune.config.stages import CONFIGS
from gemma_tune.run.directory import RunDir

SCHEMA = 1
KINDS = CONVERSATIONS, PAIRS, JUDGED = "conversations", "pairs", "judged"  # of prepared rows
STAGES = ("prepare", "train", "eval", "merge", "export-ollama")
_DIGESTS = ("sha256", "stamp")
# Settings that every result was made with, and that are read without looking whether they are there. Without `data`, a
# run would pass for one of the built-in example.
_SETTINGS = {"prepare": ("data", "valid"), "train": ("learning_rate", "rank", "alpha")}
# What stages, `status` and the summary at the end read of figures that were recorded before.
_TABLES = {"quants": ("bytes", "ollama_name"), "earlier": ("bytes", "stale")}
_NUMBERS = ("longest", "max_length", "tool_rows", "text_rows", "eval_loss_before", "eval_loss_after",
            "train_loss_first", "train_loss_last", "kept_step", "tokens_per_second", "training_seconds", "bytes",
            "perplexity", "divergence", "same_token", "f16_perplexity", "general_perplexity", "f16_general_perplexity",
            "steps", "rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows", "tokens", "trained_tokens",
            "check_same_answers", "check_prompts", "check_same_tokens", "check_divergence", "check_adapter_effect",
            "steps_before", "counted_after", "eval_accuracy_after", "eval_margin_after", "merged_tensors",
            "eval_reward_before", "eval_reward_after", "train_reward_first", "train_reward_last",
            "questions", "base_ended", "tuned_ended", "base_in_form", "tuned_in_form", "batch_size", "effective_batch",
            "micro_batch", "trainable_parameters", "check_answer_tokens", "check_max_logprob_difference", "gguf_bytes",
            "check_largest_error", "largest_error", "kl", "general_kl", "agreement", "general_agreement",
            "picture_rows", "pictures", "picture_bytes", "picture_tokens")
# Of all figures those that are never null where they are named.
_KNOWN = ("steps", "steps_before", "counted_after", "rows", "train_rows", "valid_rows", "trained_tokens", "bytes",
          "perplexity", "f16_perplexity", "general_perplexity", "f16_general_perplexity", "ollama_name", "picture_rows",
          "pictures")
_TEXTS = ("training_id", "method", "device", "dtype", "quant", "ollama_name", "file", "merged", "loses",
          "recommended", "sha256", "stamp", "train_sequences_sha256", "told_sha256", "text_alone")
_LISTS = ("earlier_trainings",)
_DRAWN = {"data": str, "rows": int, "of": int}  # what `drawn` has of each DATA of ``prepare``
_SIGHT = {"file": str, "bytes": int, "senses": list}  # what `projector` has of what an exported model sees with
_LARGEST = 1e300


@dataclass
class Manifest:
    """What ``manifest.json`` holds; ``tests/support/manifest.schema.json`` is its exact form."""

    model: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def model_name(self) -> str:
        return self.model["name"]

    @property
    def kind(self) -> str:
        """What the prepared rows are."""
        return self.stages.get("prepare", {"summary": {}})["summary"].get("kind", CONVERSATIONS)

    @property
    def finished_training(self) -> str | None:
        """Id of the training that finished last."""
        return self.stages.get("train", {"summary": {}})["summary"].get("training_id")

    @property
    def finished_trainings(self) -> tuple[str, ...]:
        """Ids of the training that finished last, see ``checkpoints.Training``, and of those that it went on from."""
        summary = self.stages.get("train", {"summary": {}})["summary"]
        return tuple(filter(None, (summary.get("training_id"), *summary.get("earlier_trainings", ()))))

    def save(self, run: RunDir) -> None:
        """Write the manifest atomically."""
        self._write(run, run.manifest)

    def announce(self, run: RunDir) -> None:
        """Write what the manifest will be when new results have taken their place, and :meth:`settle` is called."""
        self._write(run, run.next_manifest)

    @staticmethod
    def settle(run: RunDir) -> None:
        """Make the manifest that was announced the run's."""
        put_in_place(run.next_manifest, run.manifest)

    def _write(self, run: RunDir, path: Path) -> None:
        content = {"schema": SCHEMA, "gemma_tune": __version__, "model": self.model, "stages": self.stages,
                   "libraries": library_versions()}
        if problems := list(_problems(content)):
            raise WorkFailed(f"{path} is not written: it could not be read again", "please report this; what was "
                             "finished before is untouched", problems)
        with os_errors(run.root):
            write_json(path, content)


def read_manifest(root: Path, name: str = "manifest.json") -> Manifest | None:
    """What the run's manifest file says, or None where there is none; ``run.unrecorded`` knows what came after it.

    Raises:
        UserError: a manifest that cannot be read, is damaged, or was written by a newer version.
    """
    path = root / name
    try:
        content = object_in(path)
    except FileNotFoundError:
        return None
    except NotADirectoryError as e:
        own = root.parent if root.name == name else "DIR"
        raise UserError(f"{root} is not a directory", f"name a run directory with --run {shell.quote(str(own))}") from e
    except PermissionError as e:
        raise UserError(f"no permission to read {path}", "change its permissions, or use another --run DIR") from e
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "name a run directory with --run DIR") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}:{e.lineno} is damaged: {e.msg} at column {e.colno}", _rebuild_hint(path)) from e
    except NoObject as e:
        raise UserError(f"{path} is damaged: it has no schema number", _rebuild_hint(path)) from e
    except ValueError as e:  # not UTF-8, a number without end, brackets without end
        raise UserError(f"{path} is damaged: it is not JSON as gemma-tune writes it", _rebuild_hint(path)) from e
    schema = content.get("schema")
    if type(schema) is not int or schema < 1:
        raise UserError(f"{path} is damaged: it has no schema number", _rebuild_hint(path))
    if schema > SCHEMA:
        raise UserError(f"{path} has schema {schema}; this gemma-tune {__version__} knows {SCHEMA}",
                        "upgrade gemma-tune, or start another run with --run DIR")
    problems = list(_problems(content))
    if problems:
        raise UserError(f"{path} is damaged", _rebuild_hint(path), problems)
    return Manifest(content["model"], content["stages"])


def _rebuild_hint(path: Path) -> str:
    begin = shell.join(["gemma-tune", "prepare", "DATA", "--run", str(path.parent), "--model", _model_in(path)])
    move = shell.join(["mv", str(path), f"{path}.damaged"])
    return (f"move it away ({move}) and run the stages again, with the same model and data: {begin}; the artifacts "
            "beside it are untouched")


def _model_in(path: Path) -> str:
    """The model that a damaged manifest was of, as far as its text still tells."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "MODEL"
    said = {key: found[1] for key in ("path", "id", "revision")
            if (found := re.search(rf'"model":\s*\{{[^{{}}]*?"{key}":\s*"([^"\\]+)"', text))}
    if "path" in said:  # a model of this machine is called by its place, from the run
        return os.path.normpath(path.parent / said["path"])
    # Of a hub's, the commit: the newest one would be another model.
    return "@".join(said[key] for key in ("id", "revision") if key in said) if "id" in said else "MODEL"


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """What the code relies on and ``content`` does not have."""
    yield from _model_problems(content.get("model"))
    stages = content.get("stages")
    if not isinstance(stages, dict):
        yield "stages: missing"
        return
    for name, stage in stages.items():
        if name not in STAGES:
            yield f"stages.{name}: there is no such stage"
        elif not isinstance(stage, dict) or not _has(stage, dict, "config", "inputs", "outputs", "summary"):
            yield f"stages.{name}: config, inputs, outputs or summary is missing"
        elif not _has(stage, str, "base", "started", "ended"):
            yield f"stages.{name}: base, started or ended is missing"
        else:
            yield from (f"stages.{name}.{problem}" for problem in _stage_problems(name, stage))


def _model_problems(model: Any) -> Iterator[str]:
    if not isinstance(model, dict) or not _has(model, str, "id", "name", "source", "fingerprint"):
        yield "model: id, name, source or fingerprint is missing"
    elif re.sub(_UNSAFE, "-", model["name"]).strip("-.") != model["name"] or not model["name"]:
        yield f"model: name {model['name']!r} is not one that gemma-tune gives"
    elif not isinstance(model.get("files"), dict) or model["files"] and not _has(model["files"], str, *_DIGESTS):
        yield "model: files has no sha256 or no stamp"
    elif not all(isinstance(model.get(key, False), str | None) for key in ("revision", "path")):
        yield "model: revision or path is missing"
    elif not all(_is_name(model[key] or "") for key in ("id", "revision", "path")):
        yield "model: id, revision or path is no name"


def _stage_problems(name: str, stage: Mapping[str, Any]) -> Iterator[str]:
    yield from _setting_problems(name, stage["config"])
    yield from _figure_problems("summary", stage["summary"])
    for part in ("inputs", "outputs"):
        for key, item in stage[part].items():
            if not isinstance(item, dict) or not _has(item, str, "path", *_DIGESTS):
                yield f"{part}.{key}: path, sha256 or stamp is missing"
            elif not _is_name(item["path"]):
                yield f"{part}.{key}: {item['path']!r} is no path"
            elif part == "outputs" and not _stays_inside(item["path"]):
                yield f"{part}.{key}: {item['path']} leaves the run directory"


def _setting_problems(stage: str, config: Mapping[str, Any]) -> Iterator[str]:
    """Settings whose values another type would have; their limits are judged where they are used again."""
    settings, kinds = {f.name: f for f in fields(CONFIGS[stage])}, types_of(CONFIGS[stage])
    always = _SETTINGS.get(stage, ())
    for key, entry in {**dict.fromkeys(always), **config}.items():
        if not isinstance(entry, dict) or "value" not in entry or key in always and entry["value"] is None:
            yield f"config.{key}: value is missing"
        elif not isinstance(entry.get("from"), str):
            yield f"config.{key}: from is missing"
        elif key in settings:
            value = converted(kinds[key], entry["value"])
            if problem := misfit(settings[key], kinds[key], value):
                yield f"config.{problem}"
            elif not all(map(_is_name, value if isinstance(value, tuple) else (value,))):
                yield f"config.{key}: {shown(value)} is no text that can be used"


def _figure_problems(place: str, figures: Mapping[str, Any]) -> Iterator[str]:
    """Figures that are read again and are none; of number formats, each has some of its own."""
    for key, value in figures.items():
        if key in _TABLES and not (isinstance(value, dict) and all(isinstance(v, dict) for v in value.values())):
            yield f"{place}.{key}: {shown(value)} is no table of number formats"
        elif key in _TABLES:
            for name, row in value.items():
                yield from (f"{place}.{key}.{name}.{figure}: missing" for figure in _TABLES[key] if figure not in row)
                yield from _figure_problems(f"{place}.{key}.{name}", row)
        elif key in _NUMBERS and not _is_number(value) and (value is not None or key in _KNOWN):
            yield f"{place}.{key}: {shown(value)} is no number"
        elif key in _LISTS and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            yield f"{place}.{key}: {shown(value)} is no list of texts"
        elif key == "drawn" and not (isinstance(value, list) and all(map(_is_drawn, value))):
            yield f"{place}.{key}: {shown(value)} is no list of what was drawn"
        elif key == "projector" and not (isinstance(value, dict) and _is_sight(value)):
            yield f"{place}.{key}: {shown(value)} is nothing to see with"
        elif key == "kind" and value not in KINDS:
            yield f"{place}.{key}: {shown(value)} is none of {', '.join(KINDS)}"
        elif key in _TEXTS and not isinstance(value, str if key in _KNOWN else str | None):
            yield f"{place}.{key}: {shown(value)} is no text"


def _is_drawn(value: Any) -> bool:
    return isinstance(value, dict) and all(_has(value, kind, key) for key, kind in _DRAWN.items())


def _is_sight(value: Mapping[str, Any]) -> bool:
    return (all(_has(value, kind, key) for key, kind in _SIGHT.items())
            and all(sense in ("vision", "audio") for sense in value["senses"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < _LARGEST


def _is_name(value: Any) -> bool:
    """Whether a text can be handed to the system; anything else can."""
    if not isinstance(value, str):
        return True
    try:
        return b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        return False


def _has(record: Mapping[str, Any], kind: type, *keys: str) -> bool:
    return all(isinstance(record.get(key), kind) for key in keys)


def _stays_inside(path: str) -> bool:
    """Whether a recorded artifact path stays inside the run; a manifest from elsewhere must not point outside."""
    forms = PurePosixPath(path), PureWindowsPath(path)
    return all(form.parts and not form.anchor and ".." not in form.parts for form in forms)
