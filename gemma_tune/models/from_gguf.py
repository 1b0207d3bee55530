"""A base model that comes as a GGUF: what Transformers' loader of such files leaves out or gets wrong, put right.

What can't be put right is refused: the model would train, but as another model than the one in the file.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import struct
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

from gguf import Keys

from gemma_tune.base.cache import cache_dir, cache_errors
from gemma_tune.base.checkpoint import unfit_keys
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import lend, replacing_directory, write_json
from gemma_tune.base.listener import Listener
from gemma_tune.base.machine import is_out_of_memory
from gemma_tune.base.words import first_line, model_name
from gemma_tune.encoding.tokenizer import quiet_libraries
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.vocabulary.bpe import set_pre_tokenizer
from gemma_tune.gguf.vocabulary.parts import SPACE
from gemma_tune.gguf.vocabulary.runs import runs_in_gguf
from gemma_tune.models.whole import COMPLETE, conversion, refuse_damaged_copy, seal

_DIVISORS = "rope_freqs.weight"  # of Llama 3.1's frequencies
_BLOCK = re.compile(r"blk\.(\d+)\.")
_SIZES = ("context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count")
_SHOWN = 20  # problems
_STRINGS = [9, 8]  # GGUF's types: an array of strings
WHOLE = "copy or download the file again"
REPOSITORY = "name the model's Hugging Face repository instead of its GGUF file"


# What other files than models say they are (`general.type`, in older ones the architecture), and what to name instead.
_ITS_MODEL = "name the model's own file, which is another one"
_OTHERS = {
    "mmproj": ("a projector of pictures or sounds", _ITS_MODEL), "clip": ("a projector of pictures", _ITS_MODEL),
    "adapter": ("a LoRA adapter", "name the model that it was made for; an adapter to go on from is one of PEFT's: "
                                  "gemma-tune train --from-adapter DIR"),
    "imatrix": ("statistics to quantise by", _ITS_MODEL), "vocab": ("a vocabulary alone", _ITS_MODEL),
}
# Mixtures of experts that Transformers' loader takes for dense models, or stops at.
_NOT_LOADED = {"llama": "Mixtral", "gpt-oss": "GPT-OSS", "gemma4": "Gemma 4 with experts"}


def refuse_other_kinds(file: GgufFile) -> None:
    """Refuse a file that says that it is no model, or none that the loader reads, or that says nothing.

    Raises:
        UserError: what it is.
    """
    says = [file.metadata.get(key) for key in (Keys.General.TYPE, Keys.General.ARCHITECTURE)]
    if not isinstance(says[1], str):
        raise UserError(f"{file.path} does not say which model it is ({Keys.General.ARCHITECTURE} is missing)",
                        f"{WHOLE}; or {REPOSITORY}")
    if other := next((kind for kind in says if kind in _OTHERS), None if file.tensors else "vocab"):
        what, instead = _OTHERS[other]
        raise UserError(f"{file.path} holds no model, but {what}", instead)
    if says[1] in _NOT_LOADED and file.metadata.get(f"{says[1]}.expert_count"):
        raise UserError(f"{file.path} holds a mixture of experts ({_NOT_LOADED[says[1]]}), which Transformers does not "
                        "load from a GGUF", REPOSITORY)


def refuse_damage(file: GgufFile) -> None:
    """Refuse a file whose numbers do not fit its tensors: the loader makes up what it does not find.

    Raises:
        UserError: all that is wrong with it.
    """
    prefix, problems = file.metadata.get("general.architecture"), []
    for name in _SIZES:
        value = file.metadata.get(f"{prefix}.{name}")
        if isinstance(value, int) and value < 1 or isinstance(value, (float, str)):
            problems.append(f"{prefix}.{name} is {value!r}")
    blocks = {int(found[1]) for name in file.tensors if (found := _BLOCK.match(name))}
    count = file.metadata.get(f"{prefix}.block_count")
    if isinstance(count, int) and count >= 1 and (blocks != set(range(len(blocks))) or len(blocks) != count):
        problems.append(f"{prefix}.block_count is {count}, and there are tensors of {len(blocks)} blocks"
                        + (f", the last of them number {max(blocks)}" if blocks else ""))
    if problems:
        raise UserError(f"{file.path} is damaged: its numbers do not fit its tensors", WHOLE, problems)


def refuse_what_is_left_out(model: Any, info: Mapping[str, Any], file: GgufFile) -> None:
    """Refuse a model that the loader gave random weights for want of tensors, or a file with tensors that it dropped.

    Args:
        info: what the loader says of its loading.

    Raises:
        UserError: all those tensors.
    """
    problems = [f"{kind}: {key}" for kind, key in unfit_keys(info)]
    problems += [f"not read: {name}" for name in _unread(model, file)]
    if problems:
        more = len(problems) - _SHOWN
        raise UserError(f"{file.path} does not hold the tensors of a whole model of its kind ({problems[0]})",
                        f"{WHOLE}; or {REPOSITORY}", problems[:_SHOWN] + ([f"… and {more} more"] if more > 0 else []))


def _unread(model: Any, file: GgufFile) -> list[str]:
    """Tensors that nothing of the model was made from; of a family that is not known here, biases alone are counted."""
    try:
        architecture = architecture_of(model.config.to_dict(), file.path)
    except UserError:
        biases = [name for name in file.tensors if name.endswith(".bias")]
        return biases if len(biases) > sum(name.endswith(".bias") for name, _ in model.named_parameters()) else []
    known = {spec.name for spec in architecture.tensors} | {_DIVISORS}
    return [name for name in file.tensors if name not in known]


def mend(model: Any, tokenizer: Any, file: GgufFile) -> None:
    """Correct a model's configuration and its tokenizer, as Transformers loaded them from a file.

    Raises:
        UserError: the file holds what the loader left out.
    """
    if model.config.model_type == "gemma3_text":
        # A GGUF does not hold this number: llama.cpp derives it (its 27B, the model of 62 layers, is the exception),
        # while the loader leaves its own default.
        text = model.config
        text.query_pre_attn_scalar = (text.hidden_size // text.num_attention_heads if text.num_hidden_layers == 62
                                      else text.head_dim)
    _stretch_rotations(model.config, file)
    _cut_words(tokenizer, file)
    _find_runs(tokenizer, file)


def _stretch_rotations(config: Any, file: GgufFile) -> None:
    """The loader drops how a rotary embedding was stretched for long contexts. Linearly is one number.

    As llama.cpp does, a file that has the number alone is taken for that, and one without it is not stretched.
    """
    prefix = f"{file.metadata['general.architecture']}.rope"
    rope = (config.rope_parameters or {}) if hasattr(config, "rope_parameters") else {}
    full = rope.get("full_attention", rope)
    kind = file.metadata.get(f"{prefix}.scaling.type", "linear")
    kind = "llama3" if _DIVISORS in file.tensors and config.model_type in ("llama", "mistral") else kind
    # The second is what it was called before.
    factor = file.metadata.get(f"{prefix}.scaling.factor", file.metadata.get(f"{prefix}.scale_linear")) or 1.0
    if kind == "none" or full.get("rope_type") == kind or kind == "linear" and factor == 1:
        return
    if kind != "linear" or not full:
        raise UserError(f"{file.path} stretches its rotary embedding by {kind!r}, which Transformers' loader drops",
                        REPOSITORY)
    full |= {"rope_type": kind, "factor": factor}


def _cut_words(tokenizer: Any, file: GgufFile) -> None:
    """The loader cuts words as GPT-2 does where it doesn't know llama.cpp's name, as of SmolLM2's."""
    if file.metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    name, backend = file.metadata.get("tokenizer.ggml.pre", "default"), tokenizer.backend_tokenizer
    if not set_pre_tokenizer(backend, name) and type(backend.pre_tokenizer).__name__ == "ByteLevel":
        raise UserError(f"{file.path} cuts text into words by {name!r}, which is not known here", REPOSITORY)


def _find_runs(tokenizer: Any, file: GgufFile) -> None:
    """The loader looks only for user-defined tokens in the text. In a file that was written here, runs of line ends and
    tabs are normal ones, and those with more characters than the longest would be merged in another way."""
    from tokenizers import AddedToken

    arrays = [file.metadata.get(key) for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.SCORES)]
    lengths = {None if array is None else len(array) for array in arrays}
    if file.metadata.get(Keys.Tokenizer.MODEL) == "llama" and None not in lengths and len(lengths) == 1:
        tokenizer.add_tokens([AddedToken(text, normalized=SPACE in text, special=False)
                              for text, in_text in runs_in_gguf(*arrays).values() if in_text])


CONVERSION = 2  # raised when `_dequantise` gives another result: older cached checkpoints are then not used


def conversions(sha256: str) -> list[Path]:
    """The cached checkpoints of GGUF files of this content, which can have several names."""
    return sorted((cache_dir() / "checkpoints").glob(f"*-{escape(sha256[:16])}-v{CONVERSION}"))


def dequantised(gguf: Path, sha256: str, listener: Listener) -> Path:
    """The bf16 checkpoint of a GGUF file, made once by transformers and kept in the cache.

    The directory appears by a rename when it is whole. SentencePiece vocabularies are written as
    ``tokenizer.model`` too, which every later export needs.

    Raises:
        UserError: the file cannot be used, or the cache; the checkpoint there is damaged, which of its weights only the
            size tells, see ``whole.refuse_rotten``.
        WorkFailed: the cache has no room for it.
    """
    from filelock import FileLock

    target = cache_dir() / "checkpoints" / f"{model_name(gguf.name)}-{sha256[:16]}-v{CONVERSION}"
    with cache_errors():
        if conversion(target):
            refuse_damaged_copy(target, weights=False)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if conversion(target):
                return target
            listener.note(f"dequantising {gguf.name} into a checkpoint, once (half a minute for 270M parameters)")
            with replacing_directory(target) as folder:
                _dequantise(gguf, folder)
                write_json(folder / COMPLETE, {"source": gguf.name, "sha256": sha256, "files": seal(folder)})
    return target


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from gemma_tune.gguf.vocabulary.sentencepiece import sentencepiece_model_from_gguf

    quiet_libraries()
    _know_the_width_of_experts()
    file = GgufFile(gguf)
    refuse_other_kinds(file)
    refuse_damage(file)
    alone = folder / gguf.name  # the loader mixes in the tokenizer files that lie beside a GGUF
    lend(gguf, alone)
    where = {"pretrained_model_name_or_path": alone.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        # The loader's progress bar has no switch; it would fight with ours.
        with contextlib.redirect_stderr(io.StringIO()), read_once():
            model, info = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16,
                ignore_mismatched_sizes=True, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as e:  # noqa: BLE001 - in as many ways as a file's numbers can miss its tensors
        if is_out_of_memory(e):
            raise
        unknown = "is not supported yet" in str(e)
        other = "; of a new family: pip install --upgrade transformers" if unknown else f"; or {WHOLE}"
        raise UserError(f"{gguf} cannot be dequantised: {first_line(e)}", f"{REPOSITORY}{other}") from e
    (folder / gguf.name).unlink(missing_ok=True)
    mend(model, tokenizer, file)
    refuse_what_is_left_out(model, info, file)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (sentencepiece := sentencepiece_model_from_gguf(gguf)) is not None:
        (folder / "tokenizer.model").write_bytes(sentencepiece)


def _know_the_width_of_experts() -> None:
    """Transformers' loader has no name for the key, and takes all of Qwen 3's for those of its 30B-A3B."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    GGUF_CONFIG_MAPPING["qwen3_moe"].setdefault("expert_feed_forward_length", "moe_intermediate_size")


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Transformers' loader reads a file three times, a vocabulary entry at a time, each as a mapped file of its own.

    For the 262,144 entries of Gemma 3 that took a minute; and it makes the same table of tensors' names for every
    module. What is read stays the same.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    open_reader, readers = _reader_class(), {}
    parsed: dict[int, tuple[Any, Any]] = {}  # the part is kept, so that no other one gets its id

    def reader(path: Any) -> gguf.GGUFReader:
        file = Path(path).resolve()  # by a link to it, or by its own name
        if file not in readers:
            readers[file] = open_reader(path)
        return readers[file]

    def parse(value: Any, kinds: Any) -> Any:
        if id(value) not in parsed:
            parsed[id(value)] = value, value.tobytes().decode() if kinds is _STRINGS else plain_parse(value, kinds)
        return parsed[id(value)][1]

    plain_reader, plain_parse, plain_names = gguf.GGUFReader, loader._gguf_parse_value, gguf.get_tensor_name_map
    gguf.GGUFReader, loader._gguf_parse_value = reader, parse
    gguf.get_tensor_name_map = functools.cache(plain_names)
    try:
        yield
    finally:
        gguf.GGUFReader, loader._gguf_parse_value, gguf.get_tensor_name_map = plain_reader, plain_parse, plain_names


def _reader_class() -> type:
    """gguf's reader, which walks an array in one loop instead of a call, and several of numpy's, for every entry."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _build_fields(self, offs: int, count: int) -> int:
            self.data = self.data.view(np.ndarray)
            return super()._build_fields(offs, count)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
            parts, offs, types = [kind, count], orig_offs + 12, [raw_type, int(kind[0])]
            if kind[0] == gguf.GGUFValueType.STRING:
                data, length_at, types = self.data, struct.Struct("<Q").unpack_from, _STRINGS
                for _ in range(int(count[0])):
                    start = offs + 8
                    offs = start + length_at(data, offs)[0]
                    parts.append(data[start:offs])
            elif (number := self.gguf_scalar_to_np.get(kind[0])) is not None:
                numbers = self._get(offs, number, count[0])
                offs += numbers.nbytes
                parts += [[n] for n in numbers.tolist()]
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            return offs - orig_offs, parts, list(range(2, len(parts))), types

    return Reader
