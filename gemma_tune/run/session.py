"""A run opened for one stage: its model, its settings, its record. No command line is needed::

    prepare(open_session("prepare", model="demo", data=["chats.jsonl"]))
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.checkpoint import ADAPTER_CONFIG, what_else
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.words import counted, model_name, near
from gemma_tune.config.families import family_defaults, full_defaults
from gemma_tune.config.habits import meant_in_file
from gemma_tune.config.settings import (
    Resolved,
    StageConfig,
    as_before,
    converted,
    in_words,
    refuse_no_names,
    resolve,
    types_of,
)
from gemma_tune.config.settings_file import load_yaml
from gemma_tune.config.stages import CONFIGS, DEFAULT_MODEL
from gemma_tune.lora.files import how_to_name_base, named_base
from gemma_tune.models.nearby import is_path
from gemma_tune.models.quantised import quantisation
from gemma_tune.models.source import BaseModel, locate, recorded_id, split_revision
from gemma_tune.run.directory import RUNS, RunDir, find_run, no_run, of_its_run
from gemma_tune.run.foreign import refuse_occupied
from gemma_tune.run.lock import finish_killed
from gemma_tune.run.manifest import CONVERSATIONS, Manifest
from gemma_tune.run.unrecorded import current_manifest

# Stages that look at a model's configuration and tokenizer before they ask for its weights, if they do at all:
# `prepare` needs none, and `train` looks first whether it has the memory for them.
_WITHOUT_WEIGHTS = ("prepare", "train")

_DEMO = re.compile(r"; `--model demo` needs no \w+")  # in hints of the Hub: no adapter is made for that model


@dataclass(frozen=True)
class Session:
    """Everything a stage works with: the run, the base model, its settings, the inputs and the listener.

    ``base`` is the 16-bit model that an adapter is merged into, where the run's own is quantised; ``given`` names the
    settings that were given now, and not taken from the run's last result.
    """

    run: RunDir
    model: BaseModel
    resolved: Resolved
    listener: Listener
    manifest: Manifest
    inputs: Mapping[str, Path] = field(default_factory=dict)
    force: bool = False
    base: BaseModel | None = None
    given: Collection[str] = ()

    @property
    def config(self) -> Any:
        """The stage's settings."""
        return self.resolved.config

    def require(self, stage: str) -> None:
        """Whether it was opened for a stage.

        Raises:
            UserError: it was opened for another one, whose settings it has.
        """
        opened = type(self.config).section
        if opened != stage:
            raise UserError(f"this session was opened for `{opened}`, and this is `{stage}`",
                            f'open another one: open_session("{stage}", "{self.run.root}")')

    def chat_template(self) -> Path | None:
        """The chat template that the run's data was prepared with, where it is not the model's own."""
        named = "chat_template" in self.manifest.stages.get("prepare", {"outputs": {}})["outputs"]
        return self.run.chat_template if named else None

    def settings_of(self, stage: str) -> dict[str, Any]:
        """Recorded settings of an earlier stage by name, without their origins."""
        record = self.manifest.stages.get(stage, {"config": {}})
        return {name: entry["value"] for name, entry in record["config"].items()}


def open_session(stage: str, run: str | Path | None = None, *, model: str | None = None, revision: str | None = None,
                 config: Mapping[str, Any] | str | Path | None = None, listener: Listener | None = None,
                 force: bool = False, **settings: Any) -> Session:
    """Find the run, its model and the settings of a stage; those that are not given are as they were given before.

    Args:
        stage: as in the manifest, such as ``export-ollama``; or ``chat``.
        run: its directory; by default the run of ``model``, else the newest one under ``runs/``.
        model: id, directory, ``.gguf`` file or ``demo``; by default the run's own.
        config: a YAML file of settings, or what :func:`gemma_tune.config.settings_file.load_yaml` read from one.
        listener: hears what the stage has to say; by default nobody does.
        force: run even if the result is up to date.
        settings: of the stage, by the names of its command's options; None counts as not given.

    Raises:
        UserError: no such stage or run, another model's run, settings that there are not or that cannot be used.
    """
    if stage not in CONFIGS:
        raise UserError(f"there is no stage {stage!r}{near(stage, CONFIGS)}", f"there are {', '.join(CONFIGS)}")
    listener = listener or Listener()
    content = config or {}
    if isinstance(config, str | Path):
        content = of_its_run(load_yaml(Path(config)), Path(config), run, model)
    cls = CONFIGS[stage]
    _refuse_unknown(cls, settings)
    refuse_no_names({"run": run, "model": model, "revision": revision})
    # Settings are checked before a model is looked for, which can mean a download.
    asked = resolve(cls, settings, content.get(stage)).config
    wanted, revision = model or content.get("model"), revision or content.get("revision")
    outside = getattr(asked, "adapter", None)  # an adapter that was trained elsewhere: its run may begin with a merge
    trained_on = None
    if outside and not (wanted or asked.base):
        trained_on, revision = _base_of(Path(os.path.expanduser(outside)), run or content.get("run"), revision)
        wanted = trained_on
    starts = stage == "prepare" or bool(outside)
    into = asked.base if stage == "merge" and not (model or content.get("model")) else None
    root = _run_directory(run or content.get("run"), _own_run(into, bool(outside)) or wanted, starts)
    listener.note(f"run: {root}")
    finish_killed(root, listener)
    apart = into is not None and _is_quantised(root, listener)
    if into and not apart:  # it is the run's model, as --model would name it
        wanted, named = split_revision(into)
        revision = revision or named
    elif into and revision:
        settings, revision = settings | {"base": f"{split_revision(into)[0]}@{revision}"}, None
    with _naming(outside if trained_on else None, "--base" if into and not apart else None):
        base, manifest = _model_and_manifest(root, wanted, revision, starts, listener,
                                             weights=stage not in _WITHOUT_WEIGHTS)
    if not (root / "manifest.json").exists():
        refuse_occupied(RunDir(root, base.name), stage)
    resolved, given = _settings(stage, settings, content.get(stage) or {}, base, manifest, listener)
    if into and not apart:
        resolved = replace(resolved, config=replace(resolved.config, base=None))
    if stage == "train" and (wanted_data := content.get("prepare")):
        _tell_of_other_data(wanted_data, manifest, listener)
    return Session(RunDir(root, manifest.model_name), base, resolved, listener, manifest, force=force, given=given)


def _settings(stage: str, settings: Mapping[str, Any], section: Mapping[str, Any], base: BaseModel, manifest: Manifest,
              listener: Listener) -> tuple[Resolved, set[str]]:
    """The settings of a stage, and the names of those that are given now.

    Args:
        section: the stage's part of the settings file.
    """
    family, reasons = family_defaults(base.config, stage)
    resolved = resolve(CONFIGS[stage], settings, section, family)
    preferences = stage == "train" and resolved.config.method != "sft" and manifest.kind != CONVERSATIONS
    before = manifest.stages.get(stage, {"config": {}})["config"]
    given = resolved.given | {*section}  # null in a file asks for the default, and not for before
    outdone = resolved.config.outdone(given, before)
    kept = {name: value for name, value in as_before(resolved, before).items() if name not in given | outdone}
    if stage != "prepare" and kept:  # its settings belong to the data, see there
        listener.note(f"settings as before: {in_words(kept)}")
        resolved = resolved.but(kept, before)
    if stage == "train" and resolved.config.full:
        family, reasons = full_defaults(base.config)
        free = {name: value for name, value in family.items() if resolved.origins[name] in ("default", "family")}
        resolved = resolved.but(free, {name: {"from": "family"} for name in free})
    if stage == "train" and resolved.origins["learning_rate"] == "file" and (
            section.get("full") not in (None, resolved.config.full)):
        of, usually = ("LoRA", "all weights learn with a tenth of it") if resolved.config.full else (
            "all weights", "LoRA learns with ten times as much")
        listener.warn(f"the learning rate {resolved.config.learning_rate:g} of the settings file is one for {of}: "
                      f"{usually}")
    for name, reason in zip(family, reasons):
        if resolved.origins[name] == "family" and not preferences:  # which have defaults of their own
            listener.note(reason)
    return resolved, given


def _tell_of_other_data(given: Mapping[str, Any], manifest: Manifest, listener: Listener) -> None:
    """Warn of settings below ``prepare:`` of a file that differ from those of the data that there are. Files are
    compared by their names, as their places are recorded in another way."""
    before = manifest.stages.get("prepare", {}).get("config", {})
    try:
        wanted, kinds = resolve(CONFIGS["prepare"], {}, given).config, types_of(CONFIGS["prepare"])
    except UserError:  # what does not go together is for `prepare` to say
        return

    def plain(name: str, value: Any) -> Any:
        return [os.path.basename(path) for path in value] if name == "data" else value

    if other := [name for name in given if given[name] is not None and name in before and plain(
            name, getattr(wanted, name)) != plain(name, converted(kinds[name], before[name]["value"]))]:
        listener.warn(f"`prepare:` of the settings file is not what was prepared ({', '.join(other)}), and this does "
                      "not prepare: for that, gemma-tune prepare --config FILE")


def _base_of(adapter: Path, run: str | Path | None, revision: str | None) -> tuple[str | None, str | None]:
    """The base model that an adapter from elsewhere names, and its revision; None leaves it to the run.

    Raises:
        UserError: neither the adapter nor the run has one.
    """
    base, named = named_base(adapter)
    if base is None and (run is None or current_manifest(Path(run).expanduser()) is None):
        raise UserError(f"the adapter {adapter} does not say which model it was trained on", how_to_name_base(adapter))
    return base, revision or named


@contextlib.contextmanager
def _naming(adapter: str | None, option: str | None) -> Iterator[None]:
    """Where a model cannot be had that only ``adapter`` named, or another option than --model, say so."""
    try:
        yield
    except UserError as e:
        if e.hint and (adapter is not None or option):
            e.reword(e.message, _DEMO.sub("", e.hint))
        if adapter is not None:
            e.reword(f"the base model that the adapter {adapter} names: {e.message}",
                     f"{e.hint}; or {how_to_name_base(Path(adapter))}")
        elif option and e.hint:
            e.reword(e.message, e.hint.replace("--model", option))
        raise


def _own_run(into: str | None, outside: bool) -> str | None:
    """The base that is merged into, where it is also what its run is called after."""
    name = into and split_revision(into)[0]
    return name if name and (outside or (find_run(None, name) / "manifest.json").is_file()) else None


def _is_quantised(root: Path, listener: Listener) -> bool:
    """Whether the run at ``root`` has a quantised model, which nothing is merged into."""
    manifest = current_manifest(root)
    if manifest is None or (path := manifest.model.get("path")) and not os.path.exists(root / path):
        return False
    recorded = manifest.model
    found = locate(recorded_id(recorded, root), recorded["revision"], listener, recorded, weights=False)
    return quantisation(found.config) is not None


def _refuse_unknown(cls: type[StageConfig], settings: Mapping[str, Any]) -> None:
    known = [f.name for f in fields(cls)]
    if problems := [f"{name}: there is no such setting{_otherwise(name, cls.section) or near(name, known)}"
                    for name in settings if name not in known]:
        raise UserError(f"{counted(len(problems), 'setting')} of `{cls.section}` cannot be used",
                        f"see `gemma-tune {cls.section} --help` for what settings there are", problems)


def _otherwise(name: str, stage: str) -> str:
    """The end of a sentence on a setting that another program calls so, with what it is here."""
    here = meant_in_file(name)
    return f"; {here.replace(f' below `{stage}:`', '')}" if here else ""


def base_moved(root: Path, recorded: Mapping[str, Any]) -> UserError | None:
    """What to say where a base model that is a file or directory does not lie where the run has it."""
    if not recorded.get("path") or os.path.exists(root / recorded["path"]):
        return None
    return UserError(f"the base model of {root} is not at {os.path.normpath(root.resolve() / recorded['path'])}, "
                     "where the run looks for it: one of the two was moved",
                     f"name its place with --model DIR/{Path(recorded['path']).name}; all commands but `chat` keep it "
                     "for the next ones")


def _run_directory(run: str | Path | None, model_id: str | None, starts: bool) -> Path:
    if starts and not run and not model_id and not list(RUNS.glob("*/manifest.json")):
        model_id = DEFAULT_MODEL
    return find_run(run, model_id)


def _model_and_manifest(root: Path, wanted: str | None, revision: str | None, starts: bool, listener: Listener, *,
                        weights: bool) -> tuple[BaseModel, Manifest]:
    manifest = current_manifest(root)
    if manifest is None:
        if not starts:
            raise _no_run(root, wanted)
        model = locate(wanted or DEFAULT_MODEL, revision, listener, weights=weights)
        return model, Manifest(model.record(root))
    recorded = manifest.model
    if wanted == recorded["id"] and recorded.get("path") and not os.path.exists(wanted):
        wanted = None  # by its name alone: the run knows the place
    if not wanted and (moved := base_moved(root, recorded)):
        require_readable(root / recorded["path"])
        raise moved
    if wanted:
        refuse_other_id(root, recorded, wanted)
    model = locate(wanted or recorded_id(recorded, root), revision or recorded["revision"], listener, recorded,
                   weights=weights)
    refuse_other_model(root, recorded, model)
    if model.fingerprint != recorded["fingerprint"]:
        listener.warn(f"the base model {model.id} has changed since this run began; what was made from it is stale")
    manifest.model = model.record(root)
    return model, manifest


def _no_run(root: Path, wanted: str | None) -> UserError:
    """What to say where there is no run; also of models that are none to begin one with, as they came of another."""
    if wanted:
        folder = Path(os.path.expanduser(wanted))
        if (folder / ADAPTER_CONFIG).is_file():
            return UserError(f"{root} is not a run yet, and {wanted} is an adapter", what_else(folder))
        if (folder.parent / "manifest.json").is_file():
            return UserError(f"{root} is not a run yet, and {wanted} lies in one",
                             f"name that one: --run {shell.quote(str(folder.parent))}")
    return no_run(root, *(("--model", wanted) if wanted else ()))


def refuse_other_model(root: Path, recorded: Mapping[str, Any], model: BaseModel) -> None:
    """A run belongs to one model.

    Raises:
        UserError: the run is recorded as another model's.
    """
    if (recorded["id"], recorded["source"]) != (model.id, model.source):
        raise _of_another(root, recorded["id"], model.id)


def refuse_other_id(root: Path, recorded: Mapping[str, Any], wanted: str) -> None:
    """The same for a ``--model`` that is no path, before it is looked for on the hub.

    Raises:
        UserError: the run is recorded as another model's.
    """
    name = split_revision(wanted)[0]
    path = Path(os.path.expanduser(name))
    if not (is_path(name) or "://" in name or os.path.exists(path) or name == recorded["id"]):
        raise _of_another(root, recorded["id"], name)


def _of_another(root: Path, own: str, other: str) -> UserError:
    return UserError(f"{root} is a run of {own}, not of {other}: its adapter fits that model alone",
                     f"leave --model out, or begin another run with `prepare`: --run {RUNS / model_name(other)}-2")
