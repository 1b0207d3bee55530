"""What a multimodal model sees and hears with: llama.cpp's mmproj, one file beside those of all number formats.

A training leaves that part of a model as the base has it. So the file stays from one export to the next, as long as it
would be the same: it has settings of the processor in it beside the weights.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import NEW, fresh_path, remove
from gemma_tune.base.pictures import BLUE, QUESTION, RED, square
from gemma_tune.base.words import counted, gigabytes, size_text
from gemma_tune.export.files import ExportSource
from gemma_tune.export.senses import senses_of, taken
from gemma_tune.gguf.engine import Engine
from gemma_tune.gguf.llama_cpp import engine_name, find_engine
from gemma_tune.gguf.projectors.check import check_projector
from gemma_tune.gguf.projectors.parts import VISION
from gemma_tune.gguf.projectors.writer import write_projector
from gemma_tune.models.placement import OVERHEAD, USABLE, available
from gemma_tune.run.directory import describe
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import settings_then

UNCHECKED = "pictures: "  # begins what is said where they were not checked
_FOUND = ("engine", "pictures_apart", "row_tokens", "row_same")  # figures that come from showing pictures
CONTEXT = 2048  # tokens: a picture is up to 280 of them
_QUICK = 60.0  # seconds for a picture up to which a second one is shown


@dataclass(frozen=True)
class Sight:
    """The file of a run.

    Args:
        path: its place.
        made: where it lies now, if it was written anew.
        figures: what the manifest has of it.
        unchecked: why llama.cpp was not shown a picture; empty if it was.
    """

    path: Path
    made: Path | None
    figures: Mapping[str, Any]
    unchecked: str = ""

    @property
    def lies_at(self) -> Path:
        """Where it can be read now."""
        return self.made or self.path

    @property
    def for_new_files(self) -> Sight:
        """Without what was found out beside GGUF files that are others now."""
        return replace(self, figures={name: value for name, value in self.figures.items() if name not in _FOUND})

    def discard(self) -> None:
        """Remove it, if it was written anew."""
        if self.made:
            remove(self.made)


def lacks_sight(session: Session, manifest: Manifest) -> bool:
    """Whether the last export is of a version that could not write such a file, and now there would be one."""
    record = manifest.stages.get("export-ollama")
    return (record is not None and "projector" not in record["outputs"]
            and settings_then(record, type(session.config))["vision"]  # what is asked for since then is told as such
            and senses_of(session.run.merged, session.config.vision)[0] is not None)


def sight_of(session: Session, source: ExportSource) -> Sight | None:
    """The file, written; that of the last export where it is the same one; None for a model without.

    Raises:
        UserError: weights that cannot be written.
        WorkFailed: no space, or the file does not hold the merged model's weights.
    """
    projector, path, listener = source.projector, session.run.projector, session.listener
    if projector is None:
        return None
    made = fresh_path(path)
    progress = partial(listener.progress, f"writing what {taken(projector.senses)} are read by")
    try:
        written = write_projector(projector, source.merged, made, name=source.name,
                                  on_progress=lambda done, total, _: progress(done, total))
        if figures := _of_the_same(session, made):
            remove(made)
            return Sight(path, None, figures)
        error, tensor = check_projector(projector, source.merged, made)
    except BaseException as e:
        remove(made)
        if isinstance(e, UserError):
            e.reword(e.message, "; ".join(filter(None, ((e.hint or "").rstrip("."), "--no-vision leaves it out"))))
        raise
    for name, reason in written.fallbacks:
        listener.note(f"{path.name}: {name}: {reason}")
    listener.note(f"{path.name}, {size_text(written.size_bytes)}: with it the exported model takes "
                  f"{taken(projector.senses)}, as the base model does")
    return Sight(path, made, {"file": path.name, "bytes": written.size_bytes, "senses": list(projector.senses),
                              "tensor_types": dict(written.tensor_types), "largest_error": error,
                              "largest_error_tensor": tensor})


def _of_the_same(session: Session, made: Path) -> Mapping[str, Any] | None:
    """What the manifest has of the last export's file, where what was made is the same, and that still lies there."""
    run, record = session.run, session.manifest.stages.get("export-ollama", {})
    item, figures = record.get("outputs", {}).get("projector"), record.get("summary", {}).get("projector")
    if session.force or not item or not figures:
        return None
    with contextlib.suppress(OSError):  # read whole, both: bits can change on a disk
        if all(describe(run, path)["sha256"] == item["sha256"] for path in (made, run.projector)):
            return figures
    return None


# ---- llama.cpp is shown pictures -------------------------------------------------------------------------------------

def shown(session: Session, sight: Sight, ggufs: Collection[Path]) -> Sight:
    """The file with what came of showing llama.cpp a picture or two with it, beside the smallest of the GGUF files.

    An older llama.cpp may know the text model and not what it sees with: that is no reason to lose files that took
    long, unless the check was asked for.

    Raises:
        WorkFailed: it was, and llama.cpp cannot load both, or does not take a picture.
    """
    if session.config.verify is False:
        return sight
    gguf = min(ggufs, key=lambda path: path.stat().st_size)
    if reason := _not_shown(sight, gguf):
        return replace(sight, unchecked=f"{UNCHECKED}{reason}")
    name = gguf.name.removeprefix(NEW)
    # The eye of Gemma 3 takes two minutes of one processor core for any picture.
    session.listener.note(f"showing llama.cpp a picture with {name}, which can take minutes")
    try:
        apart = _apart(sight, gguf)
    except WorkFailed as e:
        refused = f"{sight.path.name} beside {name}: {e.message}"
        update = "update llama.cpp (pip install --upgrade xllamacpp)"
        if session.config.verify:
            raise WorkFailed(refused, f"{update}; --no-verify takes the files unchecked, "
                                      "--no-vision leaves pictures out") from e
        session.listener.warn(f"{refused}. Text is answered as checked; for pictures {update}, then repeat with "
                              "--verify, or leave them out with --no-vision")
        return replace(sight.for_new_files, unchecked=f"{UNCHECKED}{refused}")
    if apart == 0:
        session.listener.warn("llama.cpp begins its answers about two different pictures alike: see whether the base "
                              "model sees")
    return replace(sight, figures={**sight.figures, "engine": engine_name(),
                                   **({} if apart is None else {"pictures_apart": apart})})


def _not_shown(sight: Sight, gguf: Path) -> str:
    """Why llama.cpp cannot be shown a picture; empty if it can."""
    if VISION not in sight.figures["senses"]:
        return "the model takes none"
    if find_engine() is None:
        return "no llama.cpp engine is installed (pip install xllamacpp, then repeat with --verify)"
    need = gguf.stat().st_size + sight.lies_at.stat().st_size + OVERHEAD["cpu"]
    room = available("cpu")
    return "" if need <= USABLE * room else f"it takes {gigabytes(need)} of memory, and {gigabytes(room)} are available"


def _apart(sight: Sight, gguf: Path) -> float | None:
    """How far apart two pictures are, as the largest difference of a token's probability to begin the answer; None
    where a picture takes long, so that only one was shown."""
    with Engine(gguf, CONTEXT, projector=sight.lies_at) as engine:
        began = time.monotonic()
        first = engine.look(square(RED), QUESTION)
        if time.monotonic() - began > _QUICK:
            return None
        second = engine.look(square(BLUE), QUESTION)
    before, behind = ({token: math.exp(logprob) for token, logprob in found.items()} for found in (first, second))
    return max(abs(before.get(token, 0) - behind.get(token, 0)) for token in before.keys() | behind.keys())


# ---- in words --------------------------------------------------------------------------------------------------------

def section(figures: Mapping[str, Any] | None, text_alone: str) -> list[str]:
    """Lines of report.md about pictures; none for a model that takes text alone by itself."""
    if not figures:
        return ["", "## Pictures", "", f"{text_alone[:1].upper()}{text_alone[1:]}."] if text_alone else []
    said = (f"With {figures['file']} ({size_text(figures['bytes'])}) each of these files takes "
            f"{taken(figures['senses'])}, as the base model does.")
    if "engine" in figures:
        said += f" {figures['engine']} answered about a picture."
    if "pictures_apart" in figures:
        said += (" The probabilities with which its answers about a red and a blue one begin differ by up to "
                 f"{figures['pictures_apart']:.1%}.")
    if "row_tokens" in figures:
        said += (f" Its greedy answer to a row with pictures has {counted(figures['row_tokens'], 'token')}, of which "
                 f"the first {figures['row_same']} are those of the merged model in transformers.")
    return ["", "## Pictures", "", said]
