"""One GGUF file of the merged model: by our own writer, or by llama.cpp's converter for other architectures."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Type

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import lend
from gemma_tune.base.listener import Listener
from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import counted
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.export.senses import senses_of
from gemma_tune.export.target import Target, target_for
from gemma_tune.gguf.architectures.parts import Architecture, NotInLlamaCpp
from gemma_tune.gguf.check import worst_error
from gemma_tune.gguf.compensated import Rounding
from gemma_tune.gguf.converter import OUTTYPES, convert_with
from gemma_tune.gguf.projectors.parts import Projector
from gemma_tune.gguf.template import gguf_template
from gemma_tune.gguf.types import llama_quantize
from gemma_tune.gguf.writer import Parts, parts_of, write_gguf
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import place
from gemma_tune.models.quantised import parameter_count
from gemma_tune.run.session import Session


@dataclass(frozen=True)
class ExportSource:
    """What every file of an export is made from, and what Ollama is told: decided once.

    Args:
        merged: the merged checkpoint.
        name: the model's name for people.
        parts: of the GGUF files; None where ``converter``, a llama.cpp checkout, writes them.
        projector: what the model sees and hears with; None where that is not written.
        text_alone: what is to be said of that where the model has it.
    """

    merged: Path
    name: str
    chat: ChatFormat
    target: Target
    parts: Parts | None
    converter: Path | None = None
    projector: Projector | None = None
    text_alone: str = ""

    @property
    def architecture(self) -> Architecture | None:
        """The model's tensors and metadata; None where the converter alone knows them."""
        return self.parts and self.parts.architecture

    @property
    def limits(self) -> tuple[str, ...]:
        """What Ollama does otherwise than the training, one sentence each."""
        return (*self.target.chat.notes, *(self.projector.differs if self.projector else ()))

    @property
    def template(self) -> str:
        """The chat template that goes into the files."""
        return gguf_template(self.chat, self.target.chat.think)


def source_of(session: Session) -> ExportSource:
    """What an export of the run's merged model is made from.

    Raises:
        UserError: an architecture or a tokenizer that cannot be written here, and no converter is named; or what
            Ollama cannot be told.
    """
    merged, config = session.run.merged, session.config
    chat = load_format(merged, session.model.config["model_type"])
    converter = None if config.converter is None else Path(config.converter)
    parts = _parts(merged, converter)
    if parts is not None:
        parts = replace(parts, vocabulary=replace(parts.vocabulary, add_bos=_adds_bos(parts, chat)))
    target = target_for(session, merged, chat, parts and parts.architecture.context)
    return ExportSource(merged, f"{session.run.model_name}-tuned", chat, target, parts, converter,
                        *senses_of(merged, config.vision))


def _adds_bos(parts: Parts, chat: ChatFormat) -> bool:
    """Whether llama.cpp and Ollama are to put BOS before a prompt: also where the template alone writes it, which they
    leave to the tokenizer; not where each turn begins with one, which are the template's."""
    bos = chat.tokenizer.bos_token_id
    begins = bos is not None and chat.prompt_ids([{"role": "user", "content": "a"}])[:1] == [bos]
    return (parts.vocabulary.add_bos or begins) and not chat.turns_begin_with_bos


def _parts(merged: Path, converter: Path | None) -> Parts | None:
    """None where the converter that was named has to write the files."""
    try:
        return parts_of(merged)
    except NotInLlamaCpp:  # which no converter can do anything about
        raise
    except UserError:
        if converter is None:
            raise
        return None


def load_merged(merged: Path, beside: int) -> tuple[Any | None, str]:
    """The merged model, or None and why not: a process that takes too much memory is killed without a word.

    Args:
        beside: bytes that are needed at the same time.
    """
    placement, lacking = place(parameter_count(open_tensors(merged).values()), beside)
    return (load_model(merged, placement), "") if placement else (None, lacking)


# What `write_file` finds out about a file.
WRITTEN = ("bytes", "tensor_types", "largest_error", "largest_error_tensor", "calibrated_matrices", "converter")


def write_file(source: ExportSource, out: Path, quant: str, listener: Listener,
               rounding: Rounding | None = None, types: Mapping[str, Type] | None = None) -> dict[str, Any]:
    """Write ``out`` in a number format and compare it with the checkpoint; its figures for the manifest.

    Args:
        rounding: how matrices of few bits are rounded, if not each weight by itself.
        types: of some matrices, in place of those of the format.

    Raises:
        UserError: a checkpoint that cannot be written.
        WorkFailed: no space, or the file does not hold the checkpoint's weights.
    """
    if source.parts is None:
        _convert(source, out, quant, listener)
        return {"bytes": out.stat().st_size, "converter": "llama.cpp"}
    progress = functools.partial(listener.progress, f"writing {quant}")
    written = write_gguf(source.merged, out, quant, name=source.name, chat_template=source.template,
                         eot_token_id=source.chat.terminator_id, sampling=sampling_metadata(source.target.parameters),
                         on_tensor=lambda done, total, _: progress(done, total), parts=source.parts, rounding=rounding,
                         types=types)
    for reason, count in Counter(reason for _, reason in written.fallbacks).items():
        listener.note(f"{quant}: {counted(count, 'matrix', 'matrices')}: {reason}")
    error, tensor = worst_error(source.merged, out, source.parts.architecture, written.calibrated)
    return {"bytes": written.size_bytes, "tensor_types": written.tensor_types, "largest_error": error,
            "largest_error_tensor": tensor, "calibrated_matrices": len(written.calibrated)}


def sampling_metadata(parameters: Mapping[str, Any]) -> dict[str, float]:
    """Those of Ollama's parameters that a GGUF has keys of its own for, by these."""
    names = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
             "repeat_penalty": "repetition_penalty", "repeat_last_n": "penalty_last_n"}
    return {ours: parameters[theirs] for theirs, ours in names.items() if theirs in parameters}


def _convert(source: ExportSource, out: Path, quant: str, listener: Listener) -> None:
    """By the converter, and llama.cpp's quantiser where the converter has no such format."""
    assert source.converter is not None
    with _with_template(source, out.parent) as checkpoint:
        if quant in OUTTYPES:
            return convert_with(source.converter, checkpoint, out, quant, listener)
        wide = out.with_name(f"{out.name}.bf16")
        try:
            convert_with(source.converter, checkpoint, wide, "bf16", listener)
            llama_quantize(wide, out, quant)
        finally:
            wide.unlink(missing_ok=True)


@contextmanager
def _with_template(source: ExportSource, folder: Path) -> Iterator[Path]:
    """The checkpoint with the chat template of :attr:`ExportSource.template`, which the converter reads from there."""
    merged, name = source.merged, "chat_template.jinja"
    if (merged / name).is_file() and (merged / name).read_text(encoding="utf-8") == source.template:
        yield merged
        return
    view = folder / f".new-{merged.name}"
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    try:
        for path in merged.iterdir():
            if path.is_file() and path.name != name:
                lend(path, view / path.name)
        (view / name).write_text(source.template, encoding="utf-8")
        yield view
    finally:
        shutil.rmtree(view, ignore_errors=True)
