"""Writes a merged Gemma 3 text checkpoint as one GGUF file of its final type; memory use doesn't grow with the model.

Everything is planned and checked first (config, vocabulary, every tensor's name, shape and type, disk space), so that
what is wrong is reported at once and before a byte is written. The tensors then stream, some rows at a time, from
safetensors into a file beside the target, which is renamed over it at the very end.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import LlamaFileType as FileType

from gemma_tune.errors import UserError, WorkFailed
from gemma_tune.gguf_tokenizer import SentencePieceVocab, add_tokenizer, load_sentencepiece_vocab

ARCHITECTURE = "Gemma3ForCausalLM"
CHUNK_ELEMENTS = 4 * 1024 * 1024  # rows read at a time: 16 MiB as float32, and a few times that while quantising
SWA_PERIOD = 6  # every sixth layer attends to everything; older llama.cpp and Ollama have this number built in
METADATA_MARGIN = 1024 * 1024  # bytes allowed for metadata besides the vocabulary
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True)
class Quant:
    """What a `--quant` name means: the type of matrices, that of the embedding and an untied head, the file's mark."""

    matrix: Type
    embedding: Type
    file_type: FileType


# In Gemma the embedding is the output head as well, so its error reaches every logit directly, with no later layer to
# average it out. It keeps eight bits where the other matrices have four; llama.cpp's own Q4_K_M of Gemma 3 does so too.
_QUANTS = {
    "f16": Quant(Type.F16, Type.F16, FileType.MOSTLY_F16),
    "bf16": Quant(Type.BF16, Type.BF16, FileType.MOSTLY_BF16),
    "q8_0": Quant(Type.Q8_0, Type.Q8_0, FileType.MOSTLY_Q8_0),
    "q4_0": Quant(Type.Q4_0, Type.Q8_0, FileType.MOSTLY_Q4_0),
}
QUANTS = tuple(_QUANTS)

# The largest magnitude a type can hold. Blocks keep a float16 scale: largest/127 for Q8_0, largest/8 for Q4_0.
_F16_MAX = 65504.0
_BF16_MAX = float.fromhex("0x1.FEp127")
_LARGEST = {Type.F32: math.inf, Type.BF16: _BF16_MAX, Type.F16: _F16_MAX,
            Type.Q8_0: 127 * _F16_MAX, Type.Q4_0: 8 * _F16_MAX}  # fmt: skip

_MODEL_KEYS = {
    "max_position_embeddings": gguf.GGUFWriter.add_context_length,
    "hidden_size": gguf.GGUFWriter.add_embedding_length,
    "num_hidden_layers": gguf.GGUFWriter.add_block_count,
    "intermediate_size": gguf.GGUFWriter.add_feed_forward_length,
    "num_attention_heads": gguf.GGUFWriter.add_head_count,
    "num_key_value_heads": gguf.GGUFWriter.add_head_count_kv,
    "rms_norm_eps": gguf.GGUFWriter.add_layer_norm_rms_eps,
    "head_dim": gguf.GGUFWriter.add_key_length,
    "sliding_window": gguf.GGUFWriter.add_sliding_window,
}
_SAMPLING = {
    "temperature": (gguf.GGUFWriter.add_sampling_temp, float),
    "top_k": (gguf.GGUFWriter.add_sampling_top_k, int),
    "top_p": (gguf.GGUFWriter.add_sampling_top_p, float),
    "min_p": (gguf.GGUFWriter.add_sampling_min_p, float),
    "repetition_penalty": (gguf.GGUFWriter.add_sampling_penalty_repeat, float),
}


@dataclass(frozen=True)
class GgufSummary:
    """What was written.

    Args:
        path: the finished file.
        size_bytes: its size.
        quant: the name from `QUANTS` that was asked for.
        tensor_count: tensors in the file.
        tensor_types: GGML type name → number of tensors.
        fallbacks: (tensor, reason) for each matrix that could not take its type and is F16 instead.
    """

    path: Path
    size_bytes: int
    quant: str
    tensor_count: int
    tensor_types: dict[str, int]
    fallbacks: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor on its way: where it is read from, and its name and type in the GGUF.

    Args:
        source: name in the checkpoint.
        reader: the open safetensors file that holds it.
        name: name in the GGUF.
        shape: (length,) or (rows, columns), as in the checkpoint.
        type: GGML type to write.
        fallback: why it isn't the type asked for; "" when it is.
    """

    source: str
    reader: Any
    name: str
    shape: tuple[int, ...]
    type: Type
    fallback: str = ""

    @property
    def nbytes(self) -> int:
        """Size in the GGUF, in bytes. `GGUFWriter` asks for it."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block * size

    def tofile(self, file: BinaryIO) -> None:
        """Write the tensor's bytes. With `nbytes` this is all that `GGUFWriter.write_tensor_data` wants of an array;
        the package's own lazy arrays do the same."""
        for rows in self.chunks():
            with np.errstate(all="ignore"):  # 1/scale of an all but zero block overflows; the block decodes to zeros
                data = gguf.quants.quantize(rows, self.type)
            data.tofile(file)

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield the values as float32 arrays, one of shape (length,) or several of (some rows, columns).

        Raises:
            UserError: a value is NaN, infinite, or too large for the type.
        """
        data = self.reader.get_slice(self.source)
        step = self.shape[0] if len(self.shape) == 1 else max(1, CHUNK_ELEMENTS // self.shape[1])
        for start in range(0, self.shape[0], step):
            rows = data[start : start + step].float().numpy()  # by way of torch: numpy has no bfloat16
            if self.source.endswith("norm.weight"):
                rows = rows + np.float32(1)  # Gemma 3 scales by 1 + weight, llama.cpp by the stored weight
            self._check_values(rows)
            yield rows

    def _check_values(self, rows: np.ndarray) -> None:
        largest = float(max(rows.max(), -rows.min()))  # NaN wins both
        if not math.isfinite(largest):
            hint = "Training diverged or the merge went wrong: train again with a lower learning rate."
            raise UserError(f"The checkpoint's {self.source} holds NaN or infinite values.", hint)
        if largest > _LARGEST[self.type]:
            hint = "Export with --quant bf16."
            raise UserError(f"The checkpoint's {self.source} holds {largest:g}, too large for {self.type.name}.", hint)


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
) -> GgufSummary:
    """Write `checkpoint` as the GGUF file `out`.

    Args:
        checkpoint: a Hugging Face folder of a Gemma 3 text model: config.json, safetensors in one or several files,
            tokenizer.model, and tokenizer.json or tokenizer_config.json with the added tokens.
        out: the file to write; an earlier one is replaced only when the new one is whole.
        quant: one of `QUANTS`.
        name: the model's name for people.
        chat_template: Jinja text for the file; none is written when None.
        eot_token_id: id of the token that ends a turn, so that generation stops there.
        sampling: defaults for generation, named as in generation_config.json.
        on_tensor: called after each tensor with how many are done, how many there are, and its name.

    Raises:
        UserError: the checkpoint or an argument can't be used; everything found before writing is listed together.
        WorkFailed: not enough disk space, or writing failed. `out` is then as it was.
    """
    sampling = sampling or {}
    _check_arguments(quant, sampling)
    config = _read_config(checkpoint)
    vocab = load_sentencepiece_vocab(checkpoint, config["vocab_size"])
    if eot_token_id is not None and not 0 <= eot_token_id < len(vocab.tokens):
        hint = "Use a tokenizer and a model that belong together."
        raise UserError(f"The end-of-turn token {eot_token_id} is not one of the {len(vocab.tokens)} tokens.", hint)
    with _replacing(out) as partial, ExitStack() as stack:
        plan = _plan(config, _open_tensors(checkpoint, stack), _QUANTS[quant], checkpoint)
        _check_space(out.parent, plan, vocab)
        writer = gguf.GGUFWriter(partial, "gemma3")
        stack.callback(writer.close)
        _add_tensor_infos(writer, plan)  # before the metadata, which counts parameters
        _add_model(writer, config, name, _QUANTS[quant].file_type)
        for key, value in sampling.items():
            add, number = _SAMPLING[key]
            add(writer, number(value))
        add_tokenizer(writer, vocab, chat_template, eot_token_id)
        _write_file(writer, plan, on_tensor)
    types = dict(Counter(t.type.name for t in plan))
    fallbacks = tuple((t.name, t.fallback) for t in plan if t.fallback)
    return GgufSummary(out, out.stat().st_size, quant, len(plan), types, fallbacks)


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Lend a path beside `out`; what was written there becomes `out` when all went well, and is removed when not."""
    partial = out.with_name(out.name + ".partial")  # the same each time, so that a killed run leaves one at most
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, out)
        _sync_folder(out.parent)
    except OSError as error:
        hint = "Check free space and permissions there, then run the command again."
        raise WorkFailed(f"Writing {out} failed: {error.strerror or error}.", hint) from error
    finally:
        partial.unlink(missing_ok=True)


def _check_arguments(quant: str, sampling: Mapping[str, float]) -> None:
    if quant not in _QUANTS:
        raise UserError(f"Unknown quantisation {quant!r}.", f"Choose one of: {', '.join(QUANTS)}.")
    unknown = [key for key in sampling if key not in _SAMPLING]
    if unknown:
        raise UserError(f"Unknown sampling settings: {', '.join(unknown)}.", f"Known: {', '.join(_SAMPLING)}.")


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """Read config.json; refuse what llama.cpp would load and then compute differently."""
    path = checkpoint / "config.json"
    hint = "Point to a folder that holds a whole Hugging Face checkpoint."
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.", hint) from error
    architectures = config.get("architectures") or []
    if config.get("model_type") != "gemma3_text" or architectures not in ([], [ARCHITECTURE]):
        found = ", ".join(architectures) or config.get("model_type") or "none"
        hint = "Use llama.cpp's convert_hf_to_gguf.py for this model."
        raise UserError(f"{path} describes the architecture {found}; only {ARCHITECTURE} can be written as GGUF.", hint)
    problems = [f"{path}: {key} is missing" for key in ("vocab_size", *_MODEL_KEYS) if config.get(key) is None]
    if not problems:
        problems = [f"{path}: {text}" for text in _config_differences(config)]
    if problems:
        raise UserError(f"{path} can't be expressed as a Gemma 3 GGUF.", hint, problems)
    return config


def _config_differences(config: dict[str, Any]) -> list[str]:
    """Settings that llama.cpp has no key for and computes in one way only."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    # llama.cpp knows the 27B model by its 62 layers and scales its attention by the hidden size.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == 62 else head_dim
    fixed = {"query_pre_attn_scalar": scalar, "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": None,
             "final_logit_softcapping": None, "use_bidirectional_attention": False, "attention_bias": False,
             "sliding_window_pattern": SWA_PERIOD}  # fmt: skip
    found = [f"{key} is {config[key]!r} and llama.cpp computes with {value!r}"
             for key, value in fixed.items() if config.get(key, value) not in (value, None)]  # fmt: skip
    pattern = [f"{'sliding' if (i + 1) % SWA_PERIOD else 'full'}_attention" for i in range(layers)]
    if config.get("layer_types", pattern) != pattern:
        found.append(f"layer_types isn't {SWA_PERIOD - 1} sliding layers and then a full one, over and over")
    rope = _rope(config)
    if rope["kind"] != "default" and not (rope["kind"] == "linear" and rope["factor"]):
        found.append(f"rope type {rope['kind']!r} with factor {rope['factor']!r} is not one that Gemma 3 uses")
    return found


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary embedding: theta, local (theta of sliding layers), kind, factor; from the keys of Transformers 5, or 4."""
    new = config.get("rope_parameters") or {}
    full = new.get("full_attention", new) or config.get("rope_scaling") or {}
    local = new.get("sliding_attention") or {}
    return {
        "theta": float(full.get("rope_theta", config.get("rope_theta", 1_000_000.0))),
        "local": float(local.get("rope_theta", config.get("rope_local_base_freq", 10_000.0))),
        "kind": full.get("rope_type", full.get("type", "default")),
        "factor": full.get("factor"),
    }


def _open_tensors(checkpoint: Path, stack: ExitStack) -> dict[str, Any]:
    """Open every safetensors file (mapped, not loaded): tensor name → the open file that holds it."""
    from safetensors import SafetensorError, safe_open

    single, index = checkpoint / "model.safetensors", checkpoint / "model.safetensors.index.json"
    listed = {} if single.is_file() else _read_index(index)
    readers, problems = {}, []
    for path in [checkpoint / shard for shard in sorted(set(listed.values()))] or [single]:
        try:
            reader = stack.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            problems.append(f"{path} can't be read: {error}")
            continue
        names = set(reader.keys())
        expected = {name for name, shard in listed.items() if checkpoint / shard == path} if listed else names
        problems += [f"{path} lacks {name}, which {index.name} says it holds" for name in sorted(expected - names)]
        problems += [f"{path} holds {name}, which {index.name} doesn't list there" for name in sorted(names - expected)]
        readers.update((name, reader) for name in names)
    if problems:
        raise UserError(f"The weights in {checkpoint} are not whole.", "Merge or download the model again.", problems)
    return readers


def _read_index(index: Path) -> dict[str, str]:
    """Read the list of a sharded checkpoint: tensor name → file name."""
    if not index.is_file():
        hint = "Point to a merged checkpoint in safetensors format: `gemma-tune merge` makes one."
        raise UserError(f"{index.parent} holds neither model.safetensors nor {index.name}.", hint)
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a list of weights: {error}.", "Merge or download the model again.") from error


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Gemma 3 text model: name in the checkpoint → shape, in the order in which they are written."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    block = {
        "input_layernorm": (hidden,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.q_norm": (dim,), "self_attn.k_norm": (dim,),
        "self_attn.o_proj": (hidden, queries), "post_attention_layernorm": (hidden,),
        "pre_feedforward_layernorm": (hidden,), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "post_feedforward_layernorm": (hidden,),
    }  # fmt: skip
    layers = range(config["num_hidden_layers"])
    return {
        EMBEDDING: (config["vocab_size"], hidden),
        **{f"model.layers.{i}.{part}.weight": shape for i in layers for part, shape in block.items()},
        "model.norm.weight": (hidden,),
        HEAD: (config["vocab_size"], hidden),
    }


def _plan(config: dict[str, Any], readers: dict[str, Any], quant: Quant, checkpoint: Path) -> list[PlannedTensor]:
    """Give every tensor its name and type in the GGUF; all that is missing, unknown or misshapen is one UserError."""
    shapes = _expected_shapes(config)
    if HEAD not in readers and config.get("tie_word_embeddings", True):
        del shapes[HEAD]
    problems = [f"{name} is missing" for name in shapes if name not in readers]
    problems += [f"{name} is not a tensor of this model" for name in sorted(readers) if name not in shapes]
    for name in shapes.keys() & readers.keys():
        data = readers[name].get_slice(name)
        if (found := tuple(data.get_shape())) != shapes[name]:
            problems.append(f"{name} has shape {found}, config.json asks for {shapes[name]}")
        if data.get_dtype() not in ("F32", "F16", "BF16", "F64"):
            problems.append(f"{name} is {data.get_dtype()}, which can't be exported: merge into a 16-bit base")
    if problems:
        hint = "Merge again from the original base model."
        raise UserError(f"The weights in {checkpoint} don't fit its config.json.", hint, sorted(problems))
    if HEAD in shapes and _same(readers[HEAD], readers[EMBEDDING]):
        del shapes[HEAD]  # tied: llama.cpp uses the embedding when the file has no output.weight
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config["num_hidden_layers"])
    return [_plan_tensor(source, readers[source], names.get_name(source, (".weight",)), shape, quant)
            for source, shape in shapes.items()]  # fmt: skip


def _plan_tensor(source: str, reader: Any, name: str, shape: tuple[int, ...], quant: Quant) -> PlannedTensor:
    """Choose one tensor's type: vectors stay float32, and rows must be whole blocks."""
    if len(shape) == 1:
        return PlannedTensor(source, reader, name, shape, Type.F32)
    wanted = quant.embedding if source in (EMBEDDING, HEAD) else quant.matrix
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    if shape[1] % block == 0:
        return PlannedTensor(source, reader, name, shape, wanted)
    reason = f"rows of {shape[1]} are not a multiple of {wanted.name}'s block of {block}, written as F16"
    return PlannedTensor(source, reader, name, shape, Type.F16, reason)


def _same(head: Any, embedding: Any) -> bool:
    """Whether an explicit output head equals the embedding, bit for bit after conversion; some rows at a time."""
    one, two = head.get_slice(HEAD), embedding.get_slice(EMBEDDING)
    rows, columns = one.get_shape()
    step = max(1, CHUNK_ELEMENTS // columns)
    return all(bool((one[i : i + step].float() == two[i : i + step].float()).all()) for i in range(0, rows, step))


def _check_space(folder: Path, plan: list[PlannedTensor], vocab: SentencePieceVocab) -> None:
    """Refuse to start what can't be finished. An earlier file stays until the end, so its space doesn't count."""
    tensors = sum(gguf.GGUFWriter.ggml_pad(t.nbytes, gguf.GGUF_DEFAULT_ALIGNMENT) for t in plan)
    needed = tensors + sum(len(text.encode()) + 16 for text in vocab.tokens) + METADATA_MARGIN
    free = shutil.disk_usage(folder).free
    if free < needed:
        hint = "Free some space, choose a smaller --quant, or another folder."
        raise WorkFailed(f"{folder} has {free / 1e9:.2f} GB free; the GGUF file takes {needed / 1e9:.2f} GB.", hint)


def _add_tensor_infos(writer: gguf.GGUFWriter, plan: list[PlannedTensor]) -> None:
    for tensor in plan:
        # The number type is a formality: with `raw_dtype` given it only says that the shape counts elements.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.type)


def _add_model(writer: gguf.GGUFWriter, config: dict[str, Any], name: str, file_type: FileType) -> None:
    """Add the `general.*` and `gemma3.*` keys, those that llama.cpp's converter writes."""
    counts = writer.get_total_parameter_count()
    _, _, basename, finetune, version, size = gguf.Metadata.get_model_id_components(name, counts[0])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    for value, add in ((basename, writer.add_basename), (finetune, writer.add_finetune), (version, writer.add_version)):
        if value:
            add(value)
    writer.add_size_label(size or gguf.size_label(*counts))
    for key, add_number in _MODEL_KEYS.items():
        add_number(writer, config[key])
    writer.add_value_length(config["head_dim"])
    rope = _rope(config)
    writer.add_rope_freq_base(rope["theta"])
    writer.add_rope_freq_base_swa(rope["local"])
    if rope["kind"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_file(
    writer: gguf.GGUFWriter, plan: list[PlannedTensor], on_tensor: Callable[[int, int, str], None] | None
) -> None:
    """Write header, metadata and tensors to the writer's file, and make sure that they are on the disk."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, tensor in enumerate(plan, start=1):
        writer.write_tensor_data(tensor)  # type: ignore[arg-type]  # see PlannedTensor.tofile
        if on_tensor:
            on_tensor(done, len(plan), tensor.name)
    writer.flush()
    for file in writer.fout or ():
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; where folders can't be synced (Windows) there is nothing to do."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
