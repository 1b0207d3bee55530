"""Whose run it is: the model that a command names, the run that it leads to, and that both belong together."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.checkpoint import ADAPTER_CONFIG, what_else
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.words import model_name
from gemma_tune.config.settings import StageConfig
from gemma_tune.config.stages import DEFAULT_MODEL, MergeConfig
from gemma_tune.lora.files import how_to_name_base, named_base
from gemma_tune.models.nearby import is_path
from gemma_tune.models.quantised import quantisation
from gemma_tune.models.source import BaseModel, locate, recorded_id, split_revision
from gemma_tune.run.directory import RUNS, find_run, no_run
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.unrecorded import current_manifest

_DEMO = re.compile(r"; `--model demo` needs no \w+")  # in hints of the Hub: no adapter is made for that model


@dataclass(frozen=True)
class Named:
    """The model that a command names.

    Args:
        model, revision: None leaves them to the run.
        adapter: one that was trained elsewhere: its run may begin with a merge.
        by_adapter: whether that alone names the model.
        base: what ``merge`` is to add the adapter to, where no model is named.
    """

    model: str | None
    revision: str | None
    adapter: str | None = None
    by_adapter: bool = False
    base: str | None = None

    def with_base_as_model(self) -> Named:
        """The same, as --model would name the base."""
        assert self.base is not None
        model, revision = split_revision(self.base)
        return replace(self, model=model, revision=self.revision or revision)


def named_model(config: StageConfig, run: str | Path | None, model: str | None, revision: str | None) -> Named:
    """What is named by ``--model``, or by the settings of ``merge``.

    Raises:
        UserError: the adapter alone could name the model, and does not.
    """
    if not isinstance(config, MergeConfig):
        return Named(model, revision)
    adapter = config.adapter
    if adapter and not (model or config.base):
        found, revision = _base_of(Path(os.path.expanduser(adapter)), run, revision)
        return Named(found, revision, adapter, by_adapter=found is not None)
    return Named(model, revision, adapter, base=None if model else config.base)


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
def naming(adapter: str | None, option: str | None) -> Iterator[None]:
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


def directory_of(run: str | Path | None, model_id: str | None, starts: bool) -> Path:
    """The run that is named, or that of the model, or the newest one; ``starts`` says that it need not be there yet."""
    if starts and not run and not model_id and not list(RUNS.glob("*/manifest.json")):
        model_id = DEFAULT_MODEL
    return find_run(run, model_id)


def own_run(into: str | None, outside: bool) -> str | None:
    """The base that is merged into, where it is also what its run is called after."""
    name = into and split_revision(into)[0]
    return name if name and (outside or (find_run(None, name) / "manifest.json").is_file()) else None


def is_quantised(root: Path, listener: Listener) -> bool:
    """Whether the run at ``root`` has a quantised model, which nothing is merged into."""
    manifest = current_manifest(root)
    if manifest is None or (path := manifest.model.get("path")) and not os.path.exists(root / path):
        return False
    recorded = manifest.model
    found = locate(recorded_id(recorded, root), recorded["revision"], listener, recorded, weights=False)
    return quantisation(found.config) is not None


def model_and_manifest(root: Path, wanted: str | None, revision: str | None, starts: bool, listener: Listener, *,
                       weights: bool) -> tuple[BaseModel, Manifest]:
    """The run's model, located, and its manifest with that model in it.

    Args:
        wanted, revision: what is named; None takes the run's own.
        starts: whether the run need not be there yet.
        weights: whether the model's weights are needed.

    Raises:
        UserError: there is no such run or model, or the run is another model's.
    """
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
        own = next(filter(_is_run, (folder, folder.parent)), None)
        hint = f"name that one: --run {shell.quote(str(own))}" if own else ""
        said = "is one" if own == folder else "lies in one"
        if (folder / ADAPTER_CONFIG).is_file():
            said = f"is an adapter{' of one' if own else ''}"
            hint = "; or, as ".join(filter(None, [hint, what_else(folder)]))
        if hint:
            return UserError(f"{root} is not a run yet, and {wanted} {said}", hint)
    return no_run(root, *(("--model", wanted) if wanted else ()))


def _is_run(root: Path) -> bool:
    """Whether a directory is a run; other programs have manifests of this name as well."""
    try:
        return current_manifest(root) is not None
    except UserError:
        return False


def base_moved(root: Path, recorded: Mapping[str, Any]) -> UserError | None:
    """What to say where a base model that is a file or directory does not lie where the run has it."""
    if not recorded.get("path") or os.path.exists(root / recorded["path"]):
        return None
    return UserError(f"the base model of {root} is not at {os.path.normpath(root.resolve() / recorded['path'])}, "
                     "where the run looks for it: one of the two was moved",
                     f"name its place with --model DIR/{Path(recorded['path']).name}; all commands but `chat` keep it "
                     "for the next ones")


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
