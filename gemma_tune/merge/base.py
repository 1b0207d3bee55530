"""The 16-bit base of a merge, where the run's own model is quantised: merging into that would round once more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.lora.names import running_name
from gemma_tune.models.quantised import quantisation, sixteen_bit
from gemma_tune.models.source import BaseModel, locate, split_revision
from gemma_tune.run.directory import command
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.state import OUTSIDE, state_of

INPUT = f"{OUTSIDE}base"  # what the manifest calls such a base among the inputs, if it has files of its own
_SIZES = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size")
_ROUNDING = 0.02  # by which a number may differ that was rounded to 16 bits another way


def with_base(session: Session) -> Session:
    """The session with the model to merge into, and its name as the manifest keeps it.

    A base that was named once is taken again.

    Raises:
        UserError: the run's model is quantised and no base is named, or one that does not have its layers; or a base is
            named beside a model that needs none.
    """
    model, config = session.model, session.config
    if not quantisation(model.config):
        if config.base:
            _refuse_needless(session)
        return session
    named, revision = _named(session)
    base = locate(named, revision, session.listener)
    if quantisation(base.config):
        _refuse(session, base)
    _compare(session, base)
    session.listener.note(f"base: {base.id}, in 16 bits; the adapter was trained on {model.id}")
    kept = f"{base.id}@{base.revision}" if base.revision else named
    kept = session.run.relative(base.origin) if base.origin else kept
    return replace(session, base=base, resolved=replace(session.resolved, config=replace(config, base=kept)))


def require_base(session: Session, named: str | None) -> None:
    """Ask for the 16-bit model before a training whose result is to be merged.

    Args:
        named: the setting ``base`` of the merge to come.

    Raises:
        UserError: the run's model is quantised, and no base is named, now or before; or one is named for another.
    """
    model, method = session.model, quantisation(session.model.config)
    if not method and named:
        _refuse_needless(session)
    if method and not (named or session.settings_of("merge").get("base")):
        original = sixteen_bit(model) or "ID"
        raise UserError(f"{model.id} is quantised ({method}), so `run` would have nothing to merge into",
                        f"take the 16-bit model that it was made from: --model {original}, with --qlora to keep it in "
                        f"4 bits; or name it in a --config file, as `base: {original}` under `merge:`")


def next_step(session: Session) -> str:
    """The command that merges what a run has trained, with the base to name where the run's own model is none; what
    comes after it where that is done."""
    manifest = read_manifest(session.run.root) or session.manifest  # the training has changed it
    if state_of(session.run, manifest, "merge").status == "done":
        return command("export-ollama" if "export-ollama" not in manifest.stages else "chat", session.run.root)
    model, before = session.model, session.settings_of("merge").get("base")
    named = ("--base", sixteen_bit(model) or "ID") if quantisation(model.config) and not before else ()
    return command("merge", session.run.root, *named)


def _refuse_needless(session: Session) -> None:
    raise UserError(f"the model of {session.run.root}, {session.model.id}, is not quantised: it is the base itself",
                    "leave --base out")


def _named(session: Session) -> tuple[str, str | None]:
    """What is to be located as the base, and its revision: what is named now, else what was before."""
    named = session.config.base
    if not named:
        before = session.manifest.stages.get("merge", {"inputs": {}})
        named = session.settings_of("merge").get("base")
        if INPUT in before["inputs"]:
            # By the dot it is no name at the hub; what lies on another drive of Windows has its whole path.
            return os.path.join(".", session.run.found(before["inputs"][INPUT]["path"])), None
        if not named:
            _refuse(session, session.model)
    return split_revision(named)


def _refuse(session: Session, quantised: BaseModel) -> None:
    likely, adapter = sixteen_bit(quantised), session.config.adapter
    flags = ("--adapter", session.run.found(adapter)) if adapter else ()
    raise UserError(f"{quantised.id} is quantised ({quantisation(quantised.config)}), and merging into it would round "
                    "the result again", "name the 16-bit model that it was made from: "
                    f"{command('merge', session.run.root, *flags, '--base', likely or 'ID')}")


def _compare(session: Session, base: BaseModel) -> None:
    """Whether ``base`` is what the run's model was made from, as far as sizes and the numbers tell that both hold.

    Raises:
        UserError: it has other sizes or tensors; all of them are listed.
    """
    model = session.model
    ours, theirs = (_by_running_name(open_tensors(one.path)) for one in (model, base))
    if problems := [*_other_sizes(model.config, base.config), *_other_tensors(ours, theirs)]:
        raise UserError(f"{base.id} is not the model that {model.id} was made from",
                        "name that one, in 16 bits, with --base", problems[:20])
    if _differ(ours, theirs):
        session.listener.warn(f"what {model.id} keeps in 16 bits is not the same in {base.id}: if that is another "
                              "version of the model, the adapter does not fit it")


def _by_running_name(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {running_name(name): tensor for name, tensor in tensors.items()}


def _other_sizes(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    ours, theirs = (config.get("text_config") or config for config in (ours, theirs))
    for key in _SIZES:
        if key in ours and key in theirs and ours[key] != theirs[key]:
            yield f"{key} is {theirs[key]}, not {ours[key]}"


def _other_tensors(ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]) -> Iterator[str]:
    yield from (f"{name} is not in the quantised model" for name in sorted(theirs.keys() - ours.keys()))
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].dtype in READABLE and ours[name].shape != theirs[name].shape:
            yield f"{name} has the shape {theirs[name].shape}, not {ours[name].shape}"


def _differ(ours: Mapping[str, StoredTensor], theirs: Mapping[str, StoredTensor]) -> bool:
    """Whether vectors, which are not quantised, hold other numbers: those of norms, for example."""
    for name, tensor in ours.items():
        other = theirs.get(name)
        if other and len(tensor.shape) == 1 and {tensor.dtype, other.dtype} <= READABLE.keys():
            one, two = tensor.rows(), other.rows()
            if not np.allclose(one, two, rtol=_ROUNDING, atol=_ROUNDING * float(np.abs(two).max(initial=0))):
                return True
    return False
