"""Writes a merged checkpoint as one GGUF file of its final type; memory use doesn't grow with the model.

Everything is planned and checked first (config, vocabulary, every tensor's name, shape and type, disk space), so that
what is wrong is reported at once and before a byte is written. The tensors then stream, some rows at a time, from
safetensors into a file beside the target, which is renamed over it at the very end.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
from gguf import GGMLQuantizationType as Type

from gemma_tune.base.checkpoint import generation_settings, read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.tensors import open_tensors
from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.compensated import Rounding
from gemma_tune.gguf.planned import GgufSummary, OnTensor, add_format, add_general, write_planned
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.tensors import planned_tensors
from gemma_tune.gguf.types import QUANTS, choose_types, llama_quantize, needs_llama_quantize
from gemma_tune.gguf.vocabulary import load_vocabulary
from gemma_tune.gguf.vocabulary.parts import Vocabulary, write_vocabulary

_OF_PHI3 = ("<s>", "</s>", "<unk>", "<|endoftext|>")

_SAMPLING = {
    "temperature": (gguf.GGUFWriter.add_sampling_temp, float),
    "top_k": (gguf.GGUFWriter.add_sampling_top_k, int),
    "top_p": (gguf.GGUFWriter.add_sampling_top_p, float),
    "min_p": (gguf.GGUFWriter.add_sampling_min_p, float),
    "repetition_penalty": (gguf.GGUFWriter.add_sampling_penalty_repeat, float),
    "penalty_last_n": (gguf.GGUFWriter.add_sampling_penalty_last_n, int),
}


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
    on_tensor: OnTensor | None = None,
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
        on_tensor: called after each tensor.
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
    _check_end(eot_token_id, vocab)
    if needs_llama_quantize(quant, [(spec.name, spec.shape) for spec in model.tensors], model):
        return _with_llama_quantize(checkpoint, out, quant, name=name, chat_template=chat_template,
                                    eot_token_id=eot_token_id, sampling=sampling, on_tensor=on_tensor, parts=parts)
    plan = planned_tensors(model, checkpoint, quant, types or {}, rounding)

    def metadata(writer: gguf.GGUFWriter) -> None:
        add_general(writer, _safe_name(name, model, vocab))
        model.metadata(writer)
        add_format(writer, quant)
        _add_generation(writer, sampling, checkpoint)
        write_vocabulary(writer, vocab, chat_template, eot_token_id)

    return write_planned(out, model.name, plan, quant, metadata, room=vocabulary_bytes(vocab), on_tensor=on_tensor,
                         calibrated=rounding.done if rounding else None)


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


def _check_end(token: int | None, vocab: Vocabulary) -> None:
    if token is not None and not 0 <= token < len(vocab.tokens):
        hint = "Use a tokenizer and a model that belong together."
        raise UserError(f"The end-of-turn token {token} is not one of the {len(vocab.tokens)} tokens.", hint)


def _add_generation(writer: gguf.GGUFWriter, sampling: Mapping[str, float], checkpoint: Path) -> None:
    """How tokens are chosen, and which never are by generation_config.json, as in Gemma 4 those of pictures."""
    for key, value in sampling.items():
        add, number = _SAMPLING[key]
        add(writer, number(value))
    if suppressed := generation_settings(checkpoint).get("suppress_tokens"):
        writer.add_array("tokenizer.ggml.suppress_tokens", list(suppressed))


def _safe_name(name: str, model: Architecture, vocab: Vocabulary) -> str:
    """A name by which llama.cpp knows what the special tokens do: of a model that is called Phi-3 they take the white
    space behind them, and it does not load one that lacks any of them (``llama-vocab.cpp``)."""
    called = re.search(r"phi-?3", name, re.IGNORECASE)
    if called and not set(_OF_PHI3) <= set(vocab.tokens):
        return re.sub(r"(?i)phi-?3", "Phi 3", name)
    return f"{name} (Phi-3)" if model.name == "phi3" and vocab.model == "llama" and not called else name


def vocabulary_bytes(vocabulary: Vocabulary) -> int:
    """Bytes of a file's arrays of tokens and merges: a length of 8 bytes and the text, a score and a type of 4 each."""
    return (sum(len(text.encode()) + 16 for text in vocabulary.tokens)
            + sum(len(pair.encode()) + 8 for pair in vocabulary.merges or ()))
