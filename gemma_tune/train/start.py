"""``--from-adapter``: where the adapter lies that a training starts from, and the settings that it brings along."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, replacing_directory
from gemma_tune.base.fingerprints import fingerprint
from gemma_tune.config.settings import as_flags, in_words
from gemma_tune.config.stages import AUTO, OF_ADAPTERS, TrainConfig
from gemma_tune.hub.access import MODEL_ID
from gemma_tune.lora.files import Adapter, read_adapter
from gemma_tune.lora.start import FILES, misfit, other_tokens, settings_of, untrainable
from gemma_tune.models.source import split_revision
from gemma_tune.run.session import Session
from gemma_tune.run.stage import locked, other_settings
from gemma_tune.train.method import usual_rate

PREFERENCES = ("dpo", "kto", "orpo", "grpo")  # what comes after answers were learned, or in place of it
NONE = "none"  # starts from zero again, where an adapter was named before
_HUB = "hf:"
_INPUT = "from_adapter"
_ORIGIN = "adapter"  # of settings that it brings along
_KINDS = {True: "all weights", False: "LoRA"}
_FOUR_BIT = re.compile(r"(-unsloth)?-bnb-4bit$")


def with_start(session: Session, waiting: Mapping[str, Any] | None,
               writes: bool = True, go_on: bool = False) -> tuple[Session, dict[str, Path]]:
    """The session with what the adapter that it starts from brings along, and that adapter's files as inputs.

    Without ``--from-adapter`` it is the one of the interrupted training, or of the run's last one. A training that
    learns preferences goes on from the adapter that has learned answers. Of the run's own adapter, which the new one
    will replace, it keeps a copy and starts from that; repeated, it starts from the same copy.

    Args:
        waiting: settings of an interrupted training.
        writes: whether the copy may be made; else the adapter itself is looked at.
        go_on: the finished training goes on, so that the adapter is what that one began with.

    Raises:
        UserError: it cannot be had, is no adapter that can be trained on, or settings that were given contradict it.
    """
    if session.config.from_adapter == NONE:
        return _but(session, from_adapter=None), {}
    start = _start(session, waiting, writes)
    if start is None:
        return session, {}
    adapter = read_adapter(start.folder)
    has = settings_of(adapter)
    if "dropout" in session.given and "dropout" in has:  # which says nothing of what the adapter computes
        has["dropout"] = session.config.dropout
    brought = _none_of_others(session.config) | has
    asked = _contradictions(session, brought)
    new = session.settings_of("prepare").get("new_tokens", ())
    if problems := [*asked.values(), *_other_base(session, adapter), *untrainable(adapter),
                    *other_tokens(adapter, new)]:
        raise _with_shapes(session, adapter, problems, asked)
    full, session = _rate_is_for_all(session), _but(session, from_adapter=start.kept, **brought)
    began, as_before = ("the training began with", "") if go_on or waiting else (
        "starting from", "" if start.named else ", as before")
    session.listener.note(f"{began} the adapter {start.kept}{as_before}: {in_words(has)}")
    if not waiting and session.config.full != full:
        session = _with_usual_rate(session)
    if start.again and not go_on:
        _refuse_twice(session)
    return session, {f"{_INPUT}_{name.split('.')[0]}": start.folder / name for name in FILES}


class _Start(NamedTuple):
    """The adapter that a training starts from.

    Attributes:
        kept: what the manifest calls it.
        named: whether it is one that is named now, or the run's own, and not the last training's.
        again: whether the run's own is named, and the last training learned from the same data with a copy of the one
            before: that copy is meant.
    """

    folder: Path
    kept: str
    named: bool = True
    again: bool = False


def _start(session: Session, waiting: Mapping[str, Any] | None, writes: bool) -> _Start | None:
    """Which one it is, see :func:`with_start`; None where the training starts from the base."""
    named = session.config.from_adapter
    before = (waiting or session.settings_of("train")).get("from_adapter")
    own = _is_the_run_s(session, named) if named else not waiting and _learned_answers(session)
    again = bool(own and named) and not (waiting or session.force) and _began_with_copy(session, before)
    if own and not again:
        return _Start(*_own(session, writes))
    if again:
        named = before
    if not (named or before) or not (named or waiting) and _is_own(session, before):
        return None
    return _Start(*_located(session, named or before), named=bool(named), again=again)


def _none_of_others(config: TrainConfig) -> dict[str, Any]:
    """What is set back where an adapter does not have it: what it does not train is not trained."""
    usual = TrainConfig()
    return {name: none for name in ("full", *OF_ADAPTERS) if getattr(config, name) != (none := getattr(usual, name))}


def _rate_is_for_all(session: Session) -> bool:
    """Whether the learning rate is one for all weights, before an adapter decides what is trained."""
    kept = "learning_rate" in session.resolved.given  # of the last training
    return bool(session.settings_of("train").get("full", False) if kept else session.config.full)


def _with_usual_rate(session: Session) -> Session:
    """With the learning rate of what the adapter trains, all weights or LoRA; one that is given now stays."""
    if "learning_rate" in session.given:
        return session
    rate, origin = usual_rate(session, session.config.method), "family" if session.config.method == "sft" else "method"
    session.listener.note(f"learning rate {rate:g}, the usual one for {_KINDS[session.config.full]}")
    return replace(session, resolved=session.resolved.but({"learning_rate": rate}, {"learning_rate": {"from": origin}}))


def _learned_answers(session: Session) -> bool:
    """Whether the run has an adapter that learned answers, which a training of preferences goes on from."""
    record = session.manifest.stages.get("train")
    return (session.config.method in ("dpo", "kto", "grpo") and record is not None and session.run.adapter.is_dir()
            and record["base"] == session.model.fingerprint and _last_method(session) == "sft")


def _last_method(session: Session) -> str:
    """That of the run's last training; answers where its record does not say."""
    method = session.settings_of("train").get("method", AUTO)
    return "sft" if method == AUTO else method


def _is_the_run_s(session: Session, named: str) -> bool:
    """Whether it is the run's own adapter that is named."""
    place = next((path for path in _places(session, named) if path.is_dir()), None)
    return place is not None and place.resolve() == session.run.adapter.resolve()


def _began_with_copy(session: Session, before: str | None) -> bool:
    """Whether the last training learned from the same data by the same method, and began with a copy of the adapter
    that the run had then: the same command once more is no other training."""
    record, run = session.manifest.stages.get("train"), session.run
    copies = {run.relative(path) for path in (run.sft_adapter, *run.start_adapters())}
    return (record is not None and before in copies and _same_data(session, record)
            and session.settings_of("train").get("method") == session.config.method)


def _refuse_twice(session: Session) -> None:
    """Where the run's own adapter has learned from these data already, other settings can mean several things.

    Raises:
        UserError: settings are others than then.
    """
    record, run = session.manifest.stages["train"], session.run
    if changed := other_settings(record, session.config):
        raise UserError(f"{run.adapter} has learned from these data already, and other settings are asked for now "
                        f"({'; '.join(changed)})",
                        "to go on from its end: --continue with more --epochs; to learn them anew from "
                        f"{session.config.from_adapter}, where it began: leave --from-adapter out; to learn them a "
                        "second time: --force")


def _same_data(session: Session, record: Mapping[str, Any]) -> bool:
    prepared, learned = session.manifest.stages.get("prepare"), record["inputs"].get("tokens", {}).get("sha256")
    return bool(prepared and prepared["outputs"]["tokens"]["sha256"] == learned)


def warn_of_what_is_replaced(session: Session) -> None:
    """What the last training learned takes part in no other one, unless it is named, and that one takes its place:
    where preferences were learned, and where they are learned now, as `dpo` goes on from answers and `orpo` does not.
    """
    record = session.manifest.stages.get("train")
    method = _last_method(session)
    preferences = [name for name in (method, session.config.method) if name in PREFERENCES]
    if record is None or not preferences or "from_adapter" in session.given or _learned_answers(session):
        return
    if _same_data(session, record) and method == session.config.method:
        return
    start, adapter = session.config.from_adapter, session.run.adapter
    session.listener.warn(f"what the last training learned ({method}) is replaced: this one ({session.config.method}) "
                          f"starts from {start or 'the base model'}; to go on from it instead: --from-adapter "
                          f"{shell.quote(str(adapter))}")


def _own(session: Session, writes: bool) -> tuple[Path, str]:
    """A copy of the run's adapter, which the training will replace."""
    run, content = session.run, fingerprint(session.run.adapter)["sha256"]
    answers = _learned_answers(session)
    copy = run.sft_adapter if answers else run.start_adapter(content)
    kept = run.relative(copy)
    if not writes:
        return run.adapter, kept
    with locked(session, "train"), os_errors(run.root):
        if not copy.is_dir() or fingerprint(copy)["sha256"] != content:
            with replacing_directory(copy) as folder:
                shutil.copytree(run.adapter, folder, dirs_exist_ok=True)
    learned = " has learned answers, and" if answers else ""
    session.listener.note(f"the run's adapter{learned} is what is trained on; a copy stays in {kept}")
    return copy, kept


def _is_own(session: Session, before: str) -> bool:
    """Whether the last training started from such a copy, and this one begins with the base again."""
    return session.config.method in ("sft", "orpo") and before == session.run.relative(session.run.sft_adapter)


def start_folder(session: Session) -> Path | None:
    """Where the adapter lies that the session's training starts from."""
    files = [path for name, path in session.inputs.items() if name.startswith(_INPUT)]
    return files[0].parent if files else None


def _but(session: Session, from_adapter: str | None, **brought: Any) -> Session:
    origins = {name: {"from": _ORIGIN} for name in brought if name not in session.given}
    return replace(session, resolved=session.resolved.but({"from_adapter": from_adapter, **brought}, origins))


def _located(session: Session, named: str) -> tuple[Path, str]:
    """Its directory, and what the manifest calls it: a path relative to the run, or ``hf:ID@COMMIT``."""
    for path in _places(session, named):
        if path.is_dir():
            if inside := sorted(path.glob("*_lora_adapter/adapter_config.json")):
                raise UserError(f"{path} is a run, and no adapter",
                                f"name the adapter in it: --from-adapter {shell.quote(str(inside[0].parent))}")
            _refuse_replaced(session, path)
            return path, session.run.relative(path)
    if named == session.run.relative(session.run.sft_adapter):
        raise UserError(f"{session.run.sft_adapter} is gone: the run's adapter that learned answers, from which this "
                        "training starts", "put it back from a copy, or name one with --from-adapter; `none` starts "
                                           "from the base model, without what it learned")
    name, revision = split_revision(named.removeprefix(_HUB))
    if not named.startswith(_HUB) and (name.count("/") != 1 or name.startswith((".", "~", "/"))
                                       or not MODEL_ID.fullmatch(name)):
        raise _no_directory(session, named)
    from gemma_tune.hub.download import fetch_adapter

    found = fetch_adapter(name, revision, on_progress=session.listener.progress)
    return Path(found.path), f"{_HUB}{found.id}@{found.revision}"


def _places(session: Session, named: str) -> tuple[Path, Path]:
    """Where it can lie: from here, or as a manifest, or a file of settings made from it, has it."""
    return Path(os.path.expanduser(named)), Path(session.run.found(named))


def _no_directory(session: Session, named: str) -> UserError:
    """What to say of a path where nothing lies: one that a run or its ``train.yaml`` has begins at the run, and leads
    elsewhere when that was copied or moved alone."""
    typed = "from_adapter" in session.given and session.resolved.origins["from_adapter"] == "flag"
    if os.path.isabs(named) or typed:
        return UserError(f"there is no directory {named}", "name a PEFT adapter's directory, or its id at the Hugging "
                                                           "Face Hub, with --from-adapter; `none` starts from zero")
    place = os.path.normpath(session.run.root.resolve() / named)
    return UserError(f"there is no directory {place}: the adapter that the training starts from is {named}, relative "
                     f"to the run {session.run.root}", "name where it lies now: --from-adapter PATH; `none` starts "
                                                       "from zero")


def _refuse_replaced(session: Session, folder: Path) -> None:
    """Checkpoints, which this training will remove, cannot be what it starts from, as an interrupted one needs it."""
    if folder.resolve().is_relative_to(session.run.checkpoints.resolve()):
        raise UserError(f"{folder} is this run's own, and the training would replace it",
                        "to train longer on the same data: --continue with more --epochs; else start from a copy: "
                        f"copy {folder} elsewhere, and name that with --from-adapter")


def _contradictions(session: Session, brought: Mapping[str, Any]) -> dict[str, str]:
    """By the name of the setting."""
    asked = {name: getattr(session.config, name) for name in brought if name in session.given}
    return {name: f"{name}: {in_words({name: value})} was asked for, and the adapter {_has(brought, name)}"
            for name, value in asked.items() if not _agrees(session.config, name, brought[name])}


def _has(brought: Mapping[str, Any], name: str) -> str:
    """What an adapter has in the place of a setting."""
    if name == "full" or brought.get("full"):
        return f"holds {_KINDS[brought.get('full', False)]}"
    return f"has {in_words({name: brought[name]})}"


def _agrees(config: Any, name: str, value: Any) -> bool:
    """Whether an adapter's setting is what was asked for; `all` layers leaves the choice to the adapter."""
    asked = getattr(config, name)
    if name == "target_modules" and (not asked or "all" in asked):
        return {*asked} <= {"all", *value}
    return bool(_plain(asked) == _plain(value))


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, tuple) else value


def _other_base(session: Session, adapter: Adapter) -> list[str]:
    """A base model with another name, as far as names tell; shapes are compared with the model.

    Copies of one model have the same last name (``unsloth/gemma-3-270m-it``), also in 4 bits.
    """
    ours, theirs = session.model.id, adapter.base_id
    if not isinstance(theirs, str) or theirs in ("", ours):
        return []
    if os.path.isdir(theirs) and os.path.samefile(theirs, session.model.path):
        return []
    if session.model.source == "hub" and theirs.count("/") == 1 and not theirs.startswith((".", "/", "~")):
        last = [_FOUR_BIT.sub("", name.rsplit("/", 1)[-1].lower()) for name in (ours, theirs)]
        if last[0] != last[1]:
            return [f"it was trained on {theirs}, and this run's model is {ours}"]
    session.listener.warn(f"the adapter was trained on {theirs}, and goes on with {ours}")
    return []


def _with_shapes(session: Session, adapter: Adapter, problems: list[str], asked: Mapping[str, str]) -> UserError:
    """All that is wrong with an adapter: also what only the model tells, which is made for it without its weights.

    Args:
        asked: those of the problems that come from settings, see :func:`_contradictions`.
    """
    from gemma_tune.train.shape import adapted_layers

    try:
        adapted_layers(session.model.path, adapter)
    except UserError as e:
        problems += [problem for problem in e.problems if not any(problem.split()[0] == p.split()[0] for p in problems)]
    if len(problems) > len(asked):
        return misfit(adapter, problems)
    flags = ", ".join(as_flags(TrainConfig, {name: getattr(session.config, name)}, defaults=True)[0] for name in asked)
    return misfit(adapter, problems, f"leave {flags} out, as the adapter brings "
                                     f"{'it' if len(asked) == 1 else 'them'} along")
