"""Who answers in a chat: what was asked for, else what is there and fastest."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import near, size_in_bytes
from gemma_tune.config.habits import number_format
from gemma_tune.config.stages import QUANTS
from gemma_tune.gguf.llama_cpp import INSTALL_HINT, find_engine
from gemma_tune.run.directory import command, describe
from gemma_tune.run.earlier_exports import of_this_model, still_good, summary_now
from gemma_tune.run.session import Session
from gemma_tune.run.state import State, require_output, require_unharmed, state_of

# Name -> stage that makes it, its output there, and what it is called.
MADE_BY = {"adapter": ("train", "adapter", "trained adapter"), "merged": ("merge", "merged", "merged model"),
           "gguf": ("export-ollama", "gguf", "GGUF file"), "ollama": ("export-ollama", "gguf", "model in Ollama")}


@dataclass(frozen=True)
class Choice:
    """A name of ``--use``, and why it was taken where nobody asked for it."""

    name: str
    reason: str = ""


def choose(session: Session, tuned: bool = False) -> Choice:
    """Who answers.

    Args:
        tuned: somebody with what was learned, even if the base model was asked for.

    Raises:
        UserError: nothing of the run can answer; the hint is the command that makes something.
    """
    wanted = session.config.wanted
    if wanted and not (tuned and wanted == "base"):
        require(session, wanted)
        return Choice(wanted)
    stages, export, loses = session.manifest.stages, _fast_export(session), _loses(session)
    if export is not None and export.status == "done" and not loses:
        return Choice("gguf", "the GGUF is up to date, and llama.cpp is the fastest on a CPU, so it answers; the "
                              "adapter as it was trained: --use adapter")
    if "train" not in stages and "merge" in stages:
        require(session, "merged")
        return Choice("merged", "this run has no training of its own, so the merged model answers")
    require(session, "adapter")
    if export is not None and export.status == "done":
        return Choice("adapter", f"the GGUF {loses}, so the adapter answers; to ask it all the same: --use gguf")
    return Choice("adapter", "" if export is None else (
        f"the GGUF is {export.status} ({export.reason}), so the adapter answers; "
        f"{command('export-ollama', session.run.root)} makes it again"))


def require(session: Session, name: str) -> None:
    """Find out that what ``name`` needs is there and whole.

    Raises:
        UserError: it is not; the hint is the command that makes it.
    """
    if name == "base":
        return
    run, manifest = session.run, session.manifest
    stage, output, called = MADE_BY[name]
    state = state_of(run, manifest, stage)
    if state.status == "missing":
        raise UserError(f"{run.root} has no {called} yet",
                        f"{command(stage, run.root)}, or chat with the base model: --base")
    require_output(run, manifest, "chat", stage, output)
    if name == "adapter":  # it is small; gigabytes are not read twice for a question
        require_unharmed(run, manifest, "chat", stage, output)
    if name == "gguf" and find_engine() is None:
        raise UserError("a GGUF file needs a llama.cpp engine, and none is installed",
                        f"{INSTALL_HINT}; or --use {without_gguf(session)}")
    if state.status == "stale":
        session.listener.warn(f"the result of `{stage}` is stale: {state.reason}")


def exported(session: Session) -> Path:
    """The GGUF file of ``--quant``, else the one that the export recommends; where it does not, the first.

    Raises:
        UserError: there is none of that format, or not as it was exported.
    """
    record = session.manifest.stages["export-ollama"]
    figures_of(session)  # refuses a format that there is not
    quant = session.config.quant or _best_format(session)
    if quant in (earlier := _earlier(session)):
        return _unharmed(session, earlier[quant])
    own = f"gguf_{quant}"  # of the format to take it is `gguf` alone
    return require_output(session.run, session.manifest, "chat", "export-ollama",
                          own if own in record["outputs"] else "gguf")


def figures_of(session: Session) -> Mapping[str, Any]:
    """What the manifest has of the number format of ``--quant``; of the whole export where none is named.

    Raises:
        UserError: neither the last export made one of that format, nor is an earlier one of the same merged model.
    """
    summary, quant = _summary(session), session.config.quant
    if quant is None:
        return summary
    there: Mapping[str, Mapping[str, Any]] = summary.get("quants", {})
    if quant in (earlier := _earlier(session)):
        return earlier[quant]
    if quant not in there:
        made = f"the last export of {session.run.root} made no {quant}, but {', '.join(there)}"
        if quant in QUANTS:
            formats = ",".join([*(label for label in there if label in QUANTS), quant])
            raise UserError(made, f"make it: {command('export-ollama', session.run.root, '--quant', formats)}")
        if size_in_bytes(quant):  # of a file that was made for a size
            raise UserError(made, f"make it: {command('export-ollama', session.run.root, '--size', quant.upper())}")
        raise UserError(f"{made}{near(number_format(quant), QUANTS)}", f"formats that there are: {', '.join(QUANTS)}")
    return there[quant]


def _earlier(session: Session) -> Mapping[str, Mapping[str, Any]]:
    """By number format, the files of earlier exports that can answer as those of the last one."""
    summary = _summary(session)
    quants: Mapping[str, Mapping[str, Any]] = summary.get("quants", {})
    if session.config.use != "ollama":  # what Ollama is told is no matter of other engines
        return of_this_model(summary.get("earlier", {}))
    found = still_good(summary.get("earlier", {}))
    taken = {figures["ollama_name"] for figures in quants.values()}  # a later export's model has the name by now
    return {quant: item for quant, item in found.items() if item.get("ollama_name", "") not in {*taken, ""}}


def _unharmed(session: Session, item: Mapping[str, Any]) -> Path:
    """The file of an earlier export.

    Raises:
        UserError: it is another one by now.
    """
    path = session.run.ollama / item["file"]
    if {"sha256", "stamp"} <= item.keys() and describe(session.run, path, item)["sha256"] != item["sha256"]:
        raise UserError(f"`chat` cannot use {path}: it was changed since it was exported",
                        f"make it again: {command('export-ollama', session.run.root, '--force')}")
    return path


def _best_format(session: Session) -> str | None:
    summary = _summary(session)
    best: str | None = summary.get("recommended")
    return best if best in {**summary.get("quants", {}), **_earlier(session)} else summary.get("quant")


def _summary(session: Session) -> Mapping[str, Any]:
    return summary_now(session.run, session.manifest)


def _loses(session: Session) -> str:
    """What the file that :func:`exported` gives was measured to lose, in words; empty for nothing, or no export."""
    found: str = _summary(session).get("quants", {}).get(_best_format(session), {}).get("loses", "")
    return found


def without_gguf(session: Session) -> str:
    """Who of the run's can answer in place of its GGUF."""
    return "adapter" if "train" in session.manifest.stages else "merged"


def _fast_export(session: Session) -> State | None:
    """The export whose GGUF is the fastest to answer, if it is up to date; None where it would not be, or there is
    none."""
    if session.config.dtype != "auto" or "export-ollama" not in session.manifest.stages or _may_have_gpu():
        return None  # a type is one of transformers' settings
    return state_of(session.run, session.manifest, "export-ollama") if find_engine() is not None else None


def _may_have_gpu() -> bool:
    """Whether it is worth a second of importing PyTorch to hear of a GPU, and there is one."""
    signs = (sys.platform == "darwin", os.path.exists("/proc/driver/nvidia"), os.path.exists("/dev/kfd"),
             os.path.exists("/dev/dxg"), shutil.which("nvidia-smi") is not None)
    if not any(signs):
        return False
    from gemma_tune.models.placement import best_device

    return best_device() != "cpu"
