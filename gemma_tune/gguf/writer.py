"""Writes a merged checkpoint as one GGUF file of its final type; memory use doesn't grow with the model.

Everything is planned and checked first (config, vocabulary, every tensor's name, shape and type, disk space), so that
what is wrong is reported at once and before a byte is written. The tensors then stream, some rows at a time, from
safetensors into a file beside the target, which is renamed over it at the very end.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.checkpoint import generation_settings, read_config
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.files import replacing
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.tensors import READABLE, StoredTensor, open_tensors
from gemma_tune.base.words import gigabytes
from gemma_tune.gguf.architectures.experts import in_model
from gemma_tune.gguf.architectures.parts import Architecture, TensorSpec
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.compensated import Rounded, Rounding
from gemma_tune.gguf.experts import PACKED, Member, Source, by_rows, experts_of, together
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import (
    FILE_TYPES,
    LARGEST,
    QUANTS,
    TypeChoice,
    choose_types,
    llama_quantize,
    nbytes,
    needs_llama_quantize,
    quantise,
)
from gemma_tune.gguf.vocabulary import load_vocabulary
from gemma_tune.gguf.vocabulary.parts import Vocabulary, write_vocabulary

CHUNK_ELEMENTS = 4 * 1024 * 1024  # rows read at a time: 16 MiB as float32, and a few times that while quantising
CALIBRATED_ELEMENTS = 4 * CHUNK_ELEMENTS  # column by column, so that many rows at a time save most of the steps
_OF_PHI3 = ("<s>", "</s>", "<unk>", "<|endoftext|>")
METADATA_MARGIN = 1024 * 1024  # bytes allowed for metadata besides the vocabulary

_SAMPLING = {
    "temperature": (gguf.GGUFWriter.add_sampling_temp, float),
    "top_k": (gguf.GGUFWriter.add_sampling_top_k, int),
    "top_p": (gguf.GGUFWriter.add_sampling_top_p, float),
    "min_p": (gguf.GGUFWriter.add_sampling_min_p, float),
    "repetition_penalty": (gguf.GGUFWriter.add_sampling_penalty_repeat, float),
    "penalty_last_n": (gguf.GGUFWriter.add_sampling_penalty_last_n, int),
}


@dataclass(frozen=True)
class GgufSummary:
    """What was written.

    Args:
        path: the finished file.
        size_bytes: its size.
        quant: the name from `QUANTS` that was asked for.
        tensor_types: GGML type name → number of tensors.
        fallbacks: (tensor, reason) for each matrix whose rows do not fit the type that was asked for.
        calibrated: tensor → what became of it, for those that were rounded by what they are multiplied with.
    """

    path: Path
    size_bytes: int
    quant: str
    tensor_types: dict[str, int]
    fallbacks: tuple[tuple[str, str], ...]
    calibrated: Mapping[str, Rounded] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor on its way into the file.

    Args:
        spec: its names, shape, and what happens to its values.
        stored: where the checkpoint holds it; None where the values are in ``spec``.
        choice: GGML type to write.
        rounding: by what its matrix is multiplied with, where that is known; else every weight to the nearest value.
    """

    spec: TensorSpec
    stored: Source | None
    choice: TypeChoice
    rounding: Rounding | None = None

    @property
    def nbytes(self) -> int:
        """Size in the GGUF, in bytes. `GGUFWriter` asks for it."""
        return nbytes(self.choice.type, self.spec.shape)

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes; the package's own lazy arrays do the same."""
        for data in self._encoded():
            # Not the array's own tofile(): that doesn't say why writing failed.
            file.write(np.ascontiguousarray(data).data)

    def _encoded(self) -> Iterator[np.ndarray]:
        kind = self.choice.type
        changed = self.spec.change and self.spec.change.one_way
        if self.rounding and not changed and (inputs := self.rounding.knows(self.spec.source, kind)):
            each = self.spec.shape[-2]
            return self.rounding.rounded(self.spec.name, self.chunks(CALIBRATED_ELEMENTS), kind, inputs, each)
        return (quantise(rows, kind) for rows in self.chunks())

    def chunks(self, elements: int | None = None) -> Iterator[np.ndarray]:
        """Yield the values as float32 arrays, one of shape (length,) or several of (some rows, columns).

        Args:
            elements: about how many of a matrix at a time; None for ``CHUNK_ELEMENTS``.

        Raises:
            UserError: a value is NaN, infinite, or too large for the type.
        """
        spec = self.spec
        if self.stored is None:
            assert spec.values is not None
            yield spec.values
            return
        step = spec.rows_at_a_time(elements or CHUNK_ELEMENTS)
        for start in range(0, spec.rows, step):
            rows = self.stored.rows(start, start + step)
            rows = spec.change.forward(rows) if spec.change else rows
            self._check_values(rows)
            yield rows

    def _check_values(self, rows: np.ndarray) -> None:
        largest, type = largest_magnitude(rows, self.spec.source), self.choice.type
        if largest > LARGEST[type]:
            hint = "Export with --quant bf16."
            raise UserError(f"The checkpoint's {self.spec.source} holds {largest:g}, too large for {type.name}.", hint)


class Planned(Protocol):
    """A tensor with what writes its bytes. `GGUFWriter.write_tensor_data` wants no more of an array."""

    @property
    def spec(self) -> Any: ...  # with a name, and the shape in the file

    @property
    def choice(self) -> TypeChoice: ...

    @property
    def nbytes(self) -> int: ...

    def tofile(self, file: BinaryIO) -> None: ...


@dataclass(frozen=True)
class Parts:
    """What every GGUF file of a checkpoint has in common, whatever its number format."""

    architecture: Architecture
    vocabulary: Vocabulary


@keeping_garbage()
def parts_of(checkpoint: Path, tokenizer: Any = None) -> Parts:
    """Read a checkpoint's configuration and its tokenizer.

    Args:
        tokenizer: that of the checkpoint as Transformers loads it, where it is there already.

    Raises:
        UserError: a model or a tokenizer that cannot be written as GGUF here, or that is damaged.
    """
    architecture = architecture_of(read_config(checkpoint), checkpoint / "config.json")
    return Parts(architecture, load_vocabulary(architecture, checkpoint, tokenizer))


def write_gguf(
    checkpoint: Path,
    out: Path,
    quant: str,
    *,
    name: str,
    chat_template: str | None,
    eot_token_id: int | None,
    sampling: Mapping[str, float] | None = None,
    on_tensor: Callable[[int, int, str], None] | None = None,
    parts: Parts | None = None,
    rounding: Rounding | None = None,
    types: Mapping[str, Type] | None = None,
) -> GgufSummary:
    """Write `checkpoint` as the GGUF file `out`.

    Args:
        checkpoint: a Hugging Face folder of a model that `architecture_of` knows: config.json, safetensors in one or
            several files, and the tokenizer's files.
        out: the file to write; an earlier one is replaced only when the new one is whole.
        quant: one of `QUANTS`.
        name: the model's name for people.
        chat_template: Jinja text for the file; none is written when None.
        eot_token_id: id of the token that ends a turn, so that generation stops there.
        sampling: defaults for generation, named as in generation_config.json.
        on_tensor: called after each tensor with how many are done, how many there are, and its name.
        parts: what :func:`parts_of` made of the checkpoint, where several files are written.
        rounding: how matrices of few bits are rounded, if not each weight by itself.
        types: of some matrices, by their names in the file, in place of what ``quant`` gives them.

    Raises:
        UserError: the checkpoint or an argument can't be used; everything found before writing is listed together.
        WorkFailed: not enough disk space, or writing failed. `out` is then as it was.
    """
    sampling = sampling or {}
    _check_arguments(quant, sampling)
    parts = parts or parts_of(checkpoint)
    model, vocab = parts.architecture, parts.vocabulary
    if eot_token_id is not None and not 0 <= eot_token_id < len(vocab.tokens):
        hint = "Use a tokenizer and a model that belong together."
        raise UserError(f"The end-of-turn token {eot_token_id} is not one of the {len(vocab.tokens)} tokens.", hint)
    if needs_llama_quantize(quant, [(spec.name, spec.shape) for spec in model.tensors], model):
        return _with_llama_quantize(checkpoint, out, quant, name=name, chat_template=chat_template,
                                    eot_token_id=eot_token_id, sampling=sampling, on_tensor=on_tensor, parts=parts)
    with replacing(out) as partial, ExitStack() as stack:
        plan = [replace(tensor, rounding=rounding) for tensor in _plan(model, checkpoint, quant, types or {})]
        require_space(out.parent, sum(padded(t.nbytes) for t in plan) + vocabulary_bytes(vocab) + METADATA_MARGIN)
        writer = gguf.GGUFWriter(partial, model.name)
        stack.callback(writer.close)
        add_tensor_infos(writer, plan)  # before the metadata, which counts parameters
        add_general(writer, _safe_name(name, model, vocab))
        model.metadata(writer)
        writer.add_file_type(FILE_TYPES[quant])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in sampling.items():
            add, number = _SAMPLING[key]
            add(writer, number(value))
        if suppressed := _suppressed(checkpoint):
            writer.add_array("tokenizer.ggml.suppress_tokens", suppressed)
        write_vocabulary(writer, vocab, chat_template, eot_token_id)
        write_file(writer, plan, on_tensor)
    types = dict(Counter(t.choice.type.name for t in plan))
    fallbacks = tuple((t.spec.name, t.choice.fallback) for t in plan if t.choice.fallback)
    return GgufSummary(out, out.stat().st_size, quant, types, fallbacks, rounding.done if rounding else {})


def _with_llama_quantize(checkpoint: Path, out: Path, quant: str, *, parts: Parts, **settings: Any) -> GgufSummary:
    """`write_gguf` by way of an unquantised file, which holds every value as it is, and llama.cpp's own program."""
    # Bytes are those of packed experts, whose numbers bf16 holds as well.
    whole = "bf16" if {tensor.dtype for tensor in open_tensors(checkpoint).values()} <= {"BF16", "U8"} else "f32"
    unquantised = out.with_name(out.name + ".unquantised")
    try:
        written = write_gguf(checkpoint, unquantised, whole, parts=parts, **settings)
        llama_quantize(unquantised, out, quant)
    finally:
        unquantised.unlink(missing_ok=True)
    tensors = GgufFile(out, keys=()).tensors
    choices = choose_types(quant, [(name, tensor.shape) for name, tensor in tensors.items()], parts.architecture)
    fallbacks = tuple((name, choice.fallback) for name, choice in zip(tensors, choices) if choice.fallback)
    return replace(written, path=out, size_bytes=out.stat().st_size, quant=quant, fallbacks=fallbacks,
                   tensor_types=dict(Counter(tensor.type.name for tensor in tensors.values())))


def _check_arguments(quant: str, sampling: Mapping[str, float]) -> None:
    if quant not in QUANTS:
        raise UserError(f"Unknown quantisation {quant!r}.", f"Choose one of: {', '.join(QUANTS)}.")
    unknown = [key for key in sampling if key not in _SAMPLING]
    if unknown:
        raise UserError(f"Unknown sampling settings: {', '.join(unknown)}.", f"Known: {', '.join(_SAMPLING)}.")


def _suppressed(checkpoint: Path) -> list[int]:
    """Tokens that generation never gives, by generation_config.json: those for pictures and sounds in Gemma 4."""
    return list(generation_settings(checkpoint).get("suppress_tokens") or ())


def _plan(model: Architecture, checkpoint: Path, quant: str, types: Mapping[str, Type]) -> list[PlannedTensor]:
    """Give every tensor its type."""
    wanted = tensors_of(model, checkpoint)
    choices = choose_types(quant, [(spec.name, spec.shape) for spec, _ in wanted], model)
    return [PlannedTensor(spec, stored, TypeChoice(types[spec.name]) if spec.name in types else choice)
            for (spec, stored), choice in zip(wanted, choices, strict=True)]


def tensors_of(model: Architecture, checkpoint: Path) -> list[tuple[TensorSpec, Source | None]]:
    """What a file of a checkpoint holds, in its order, and where the checkpoint has it.

    Raises:
        UserError: something is missing, unknown or misshapen, or cannot be written; all of it together.
    """
    stored = together({model.canonical(name): tensor for name, tensor in open_tensors(checkpoint).items()
                       if not model.left_out(name)})
    in_one = {spec.source: experts for spec in model.tensors if spec.source and spec.source not in stored
              and (experts := experts_of(stored, spec))}
    used = {f"{in_model(source)[0]}{part}" for source in in_one for part in ("", *PACKED)}
    stored = {name: members for name, members in stored.items() if name not in used} | in_one
    wanted = [spec for spec in model.tensors if spec.source in stored or spec.values is not None
              or not (spec.optional or (spec.tied_to and model.tied))]
    known = {spec.source: spec for spec in wanted if spec.source in stored or spec.values is None}
    problems = [f"{name} is missing" for name in known if name not in stored]
    problems += [f"{stored[name][0].name} is not a tensor of this model" for name in stored if name not in known]
    for name in known.keys() & stored.keys():
        problems += _unfit(stored[name], known[name])
    if problems:
        hint = "Merge again from the original base model."
        raise UserError(f"The weights in {checkpoint} don't fit its config.json.", hint, sorted(problems))
    # Tied: llama.cpp uses the embedding when the file has no output.weight.
    wanted = [spec for spec in wanted if not (spec.tied_to and _same(spec, stored))]
    if not model.own_head and (own := [spec.source for spec in wanted if spec.tied_to]):
        raise UserError(f"{checkpoint}: {own[0]} differs from the embedding, and for {model.name} llama.cpp knows no "
                        "other output head.", "Train without the output head, or with tied embeddings.")
    return [(spec, by_rows(stored[spec.source], spec) if spec.source in stored else None) for spec in wanted]


def _unfit(members: Sequence[Member], spec: TensorSpec) -> list[str]:
    """What is wrong with a tensor in a checkpoint, which can have one for each expert."""
    problems, shape = [], (spec.shape[0] - spec.zero_rows, *spec.shape[1:])
    apart = len(shape) == 3 and len(members[0].shape) < 3
    if apart and len(members) != shape[0]:
        problems.append(f"{members[0].name} is one of {len(members)}, config.json asks for {shape[0]}")
    for found in members:
        expected = shape[1:] if apart else shape
        if _as_matrix(found.shape) != expected:
            problems.append(f"{found.name} has shape {found.shape}, config.json asks for {expected}")
        if found.dtype not in READABLE:
            problems.append(f"{found.name} is {found.dtype}, which can't be exported: merge into a 16-bit base")
    return problems


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without what is 1 between rows and columns, as a convolution's over one channel."""
    return (shape[0], *(n for n in shape[1:-1] if n != 1), *shape[-1:]) if len(shape) > 2 else shape


def _same(spec: TensorSpec, stored: Mapping[str, Sequence[StoredTensor]]) -> bool:
    """Whether an explicit output head equals the embedding, bit for bit after conversion; some rows at a time."""
    one, two = (stored[name][0] for name in (spec.source or "", spec.tied_to or ""))
    rows, step = spec.shape[0], spec.rows_at_a_time(CHUNK_ELEMENTS)
    return all(np.array_equal(one.rows(i, i + step), two.rows(i, i + step)) for i in range(0, rows, step))


def largest_magnitude(values: np.ndarray, source: str | None) -> float:
    """Of a tensor's values, or of some of them.

    Raises:
        UserError: a value is NaN or infinite; ``source`` names the tensor.
    """
    largest = float(max(values.max(), -values.min()))  # NaN wins both
    if not math.isfinite(largest):
        hint = "Training diverged or the merge went wrong: train again with a lower learning rate."
        raise UserError(f"The checkpoint's {source} holds NaN or infinite values.", hint)
    return largest


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start what can't be finished. An earlier file stays until the end, so its space doesn't count.

    Raises:
        WorkFailed: less than ``needed`` bytes are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = "Free some space, choose a smaller --quant, or another folder."
        raise WorkFailed(f"{folder} has {gigabytes(free)} free; the GGUF file takes {gigabytes(needed)}.", hint)


def padded(nbytes: int) -> int:
    """Bytes that a tensor of so many takes in a file."""
    return gguf.GGUFWriter.ggml_pad(nbytes, gguf.GGUF_DEFAULT_ALIGNMENT)


def vocabulary_bytes(vocabulary: Vocabulary) -> int:
    """Bytes of a file's arrays of tokens and merges: a length of 8 bytes and the text, a score and a type of 4 each."""
    return (sum(len(text.encode()) + 16 for text in vocabulary.tokens)
            + sum(len(pair.encode()) + 8 for pair in vocabulary.merges or ()))


def add_tensor_infos(writer: gguf.GGUFWriter, plan: Sequence[Planned]) -> None:
    """Tell a writer which tensors there will be."""
    for tensor in plan:
        # The number type is a formality: with `raw_dtype` given it only says that the shape counts elements.
        writer.add_tensor_info(tensor.spec.name, tensor.spec.shape, np.dtype(np.float32), tensor.nbytes,
                               tensor.choice.type)


def _safe_name(name: str, model: Architecture, vocab: Vocabulary) -> str:
    """A name by which llama.cpp knows what the special tokens do: of a model that is called Phi-3 they take the white
    space behind them, and it does not load one that lacks any of them (``llama-vocab.cpp``)."""
    called = re.search(r"phi-?3", name, re.IGNORECASE)
    if called and not set(_OF_PHI3) <= set(vocab.tokens):
        return re.sub(r"(?i)phi-?3", "Phi 3", name)
    return f"{name} (Phi-3)" if model.name == "phi3" and vocab.model == "llama" and not called else name


def add_general(writer: gguf.GGUFWriter, name: str, kind: str = gguf.GGUFType.MODEL) -> None:
    """Add the `general.*` keys that follow from the name and the number of parameters."""
    counts = writer.get_total_parameter_count()
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, counts[0])
    writer.add_type(kind)
    writer.add_name(name)
    for value, add in ((basename, writer.add_basename), (finetune, writer.add_finetune), (version, writer.add_version)):
        if value:
            add(value)
    writer.add_size_label(size or gguf.size_label(*counts))


def write_file(
    writer: gguf.GGUFWriter, plan: Sequence[Planned], on_tensor: Callable[[int, int, str], None] | None
) -> None:
    """Write header, metadata and tensors to the writer's file, and make sure that they are on the disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(plan, start=1):
        writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # see Planned
        if on_tensor:
            on_tensor(done, len(plan), tensor.spec.name)
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())
