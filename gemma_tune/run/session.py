"""A run opened for one stage: its model, its settings, its record. No command line is needed::

    prepare(open_session("prepare", model="demo", data=["chats.jsonl"]))
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, near
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
from gemma_tune.config.stages import CONFIGS
from gemma_tune.models.source import BaseModel, split_revision
from gemma_tune.run.base_model import directory_of, is_quantised, model_and_manifest, named_model, naming, own_run
from gemma_tune.run.directory import RunDir, of_its_run
from gemma_tune.run.foreign import refuse_occupied
from gemma_tune.run.lock import finish_killed
from gemma_tune.run.manifest import CONVERSATIONS, Manifest

# Stages that look at a model's configuration and tokenizer before they ask for its weights, if they do at all:
# `prepare` needs none, and `train` looks first whether it has the memory for them.
_WITHOUT_WEIGHTS = ("prepare", "train")


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


def open_session(stage: str, run: str | Path | None = None, *, model: str | Path | None = None,
                 revision: str | None = None, config: Mapping[str, Any] | str | Path | None = None,
                 listener: Listener | None = None, force: bool = False, **settings: Any) -> Session:
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
    run, model, revision = run or content.get("run"), model or content.get("model"), revision or content.get("revision")
    model = os.fspath(model) if model else None
    # Settings are checked before a model is looked for, which can mean a download.
    named = named_model(resolve(cls, settings, content.get(stage)).config, run, model, revision)
    starts = stage == "prepare" or bool(named.adapter)
    root = directory_of(run, own_run(named.base, bool(named.adapter)) or named.model, starts)
    listener.note(f"run: {root}")
    finish_killed(root, listener)
    of_run = bool(named.base) and not is_quantised(root, listener)  # the base is the run's model
    if of_run:
        named = named.with_base_as_model()
    elif named.base and named.revision:
        settings |= {"base": f"{split_revision(named.base)[0]}@{named.revision}"}
        named = replace(named, revision=None)
    with naming(named.adapter if named.by_adapter else None, "--base" if of_run else None):
        base, manifest = model_and_manifest(root, named.model, named.revision, starts, listener,
                                            weights=stage not in _WITHOUT_WEIGHTS)
    if not (root / "manifest.json").exists():
        refuse_occupied(RunDir(root, base.name), stage)
    resolved, given = _settings(stage, settings, content.get(stage) or {}, base, manifest, listener)
    if of_run:
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
    of_method = stage == "train" and resolved.config.method != "sft" and (
        manifest.kind != CONVERSATIONS or resolved.config.method == "grpo")
    for name, reason in zip(family, reasons):
        if resolved.origins[name] == "family" and not of_method:  # preferences and rewards have defaults of their own
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
