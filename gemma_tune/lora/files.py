"""A PEFT adapter folder, read into a description: which layer changes by how much, and which tensors are replaced.

Nothing but headers and adapter_config.json is read here. What the names of the tensors mean is in PEFT's
``utils/save_and_load.py`` (``get_peft_model_state_dict``) and ``utils/other.py`` (``ModulesToSaveWrapper``):

- ``<layer>.lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``: LoRA and DoRA of a linear layer;
- ``<layer>.lora_embedding_A``, ``lora_embedding_B``: of an embedding;
- ``<layer>.base_layer.weight``, and embeddings without any such part: the base's own tensor as it was in training;
- any other name that ``modules_to_save`` covers: a tensor that was trained as a whole;
- ``<module>.original_module.weight`` and ``<module>.modules_to_save.weight``, which ``save_embedding_layers`` writes of
  such a module: the base's own tensor, and the trained one once more, which PEFT does not read.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import require_readable, unreadable
from gemma_tune.base.tensors import READABLE, StoredTensor, read_header
from gemma_tune.base.words import counted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_AGAIN = "train again: gemma-tune train --force; or copy the adapter here again"
# Settings of PEFT's LoRA that change what an adapter computes in a way that is not merged here.
_OTHER_KINDS = ("lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
                "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora",
                "use_qalora")
# Starting values that PEFT also subtracts from the base weights, each time it loads the adapter.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
          "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}
_EMBEDDINGS = ("embed_tokens", "wte", "lm_head")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save)\.")
_MLX = "adapters.safetensors"  # what mlx-lm calls its adapters, beside an adapter_config.json of its own


@dataclass(frozen=True)
class Lora:
    """What is learned about one layer: W (out, in) becomes W + s B A, with DoRA m / ||W + s B A|| of it, by rows.

    Attributes:
        a: A (r, in), or of an embedding (r, entries).
        b: B (out, r), or of an embedding (width, r).
        scale: s.
        magnitude: DoRA's m (out,).
        embedding: the layer is an embedding, whose weight is stored as (in, out) = (entries, width).
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Attributes:
        layers: by the name of the layer in the trained model, without PEFT's prefix.
        copies: tensors that were trained as a whole (``modules_to_save``), by name.
        base_tensors: the base's tensors that came with the adapter, by name; one of ``copies`` may be there too, as it
            was before.
        config: adapter_config.json.
    """

    folder: Path
    layers: dict[str, Lora]
    copies: dict[str, StoredTensor]
    base_tensors: dict[str, StoredTensor]
    config: dict[str, Any]

    @property
    def base_id(self) -> str | None:
        """The model that it was trained on, as PEFT recorded it."""
        return self.config.get("base_model_name_or_path")

    @property
    def transposed(self) -> bool:
        """Linear layers are stored as (in, out), as GPT-2's ``Conv1D`` does."""
        return bool(self.config.get("fan_in_fan_out"))


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "name a PEFT adapter's directory with --adapter; one of the "
                                                           "Hub is downloaded first: hf download NAME --local-dir DIR")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{folder} is not a PEFT adapter: it has no {CONFIG}",
                        f"name a directory that has {CONFIG} and {WEIGHTS}") from e
    except PermissionError as e:
        raise unreadable(path) from e
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"the adapter {folder} cannot be read: {CONFIG}: {e}", _AGAIN) from e
    _refuse_mlx(folder, config)
    return config


def _refuse_mlx(folder: Path, config: Mapping[str, Any]) -> None:
    """Adapters of mlx-lm lie in a file of the same name, with other settings and other tensors.

    Raises:
        UserError: it is one.
    """
    of_mlx = {"fine_tune_type", "lora_parameters"} & config.keys() or (folder / _MLX).exists()
    if config.get("peft_type") or not of_mlx:
        return
    trained_on = config["model"] if isinstance(config.get("model"), str) else "MODEL"
    fuse = shlex.join(["mlx_lm.fuse", "--model", trained_on, "--adapter-path", str(folder), "--save-path", "FUSED"])
    raise UserError(f"{folder} is an adapter of mlx-lm ({_MLX}), and merge takes those of PEFT ({WEIGHTS})",
                    f"make a whole model of it with mlx-lm: {fuse} (--dequantize if that model is quantised); "
                    "llama.cpp's convert_hf_to_gguf.py turns FUSED into a GGUF for Ollama, and `gemma-tune prepare "
                    "--model FUSED` trains on from there")


def how_to_name_base(folder: Path) -> str:
    """What to type where an adapter's base model cannot be told from the adapter."""
    return f"name it: gemma-tune merge --adapter {shlex.quote(str(folder))} --base ID"


def named_base(folder: Path) -> tuple[str | None, str | None]:
    """The base model that an adapter was trained on, and its revision; None where the adapter does not say.

    Raises:
        UserError: no adapter there; a base that is not on this machine.
    """
    config = read_config(folder)
    base = config.get("base_model_name_or_path")
    name_it = how_to_name_base(folder)
    if not isinstance(base, str) or not base:
        return None, None
    looks_local = (Path(base).is_absolute() or base.startswith((".", "~")) or base.count("/") > 1
                   or base.endswith(".gguf"))
    if looks_local and not os.path.exists(os.path.expanduser(base)):
        raise UserError(f"the adapter {folder} was trained on {base}, which is not here", name_it)
    revision = config.get("revision")
    return base, revision if isinstance(revision, str) else None


def read_adapter(folder: Path) -> Adapter:
    """Describe an adapter.

    Raises:
        UserError: damaged, incomplete, or of a kind that is not merged here; every tensor that has no meaning here is
            listed.
    """
    require_readable(folder)
    config = read_config(folder)
    _refuse_other_kinds(folder, config)
    if problems := list(_unusable(config)):
        raise UserError(f"{folder} cannot be read: {CONFIG} has values that make no sense", _AGAIN, problems)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder} holds pickled weights, which can run code when they are read",
                        "load it with PEFT where you trust it, and save it with save_pretrained, which writes "
                        f"{WEIGHTS}")
    try:
        tensors = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS)}
    except UserError as e:
        raise UserError(f"the adapter {folder} cannot be read: {e.message}", _AGAIN) from e
    saved = list(config.get("modules_to_save") or ())
    if config.get("ensure_weight_tying") and any(module.endswith(_EMBEDDINGS) for module in saved):
        saved += _EMBEDDINGS  # PEFT adds the others without naming them
    kinds = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    parts: dict[str, dict[str, StoredTensor]] = {}
    copies, base_tensors, rest = {}, {}, []
    for stored, tensor in tensors.items():
        name = stored.removeprefix(_PREFIX)
        part = next((p for p, kind in _PARTS.items() if name.endswith(f".{p}") and kind in kinds), None)
        if tensor.dtype not in READABLE:
            rest.append(f"{stored}: {tensor.dtype}")
        elif name == stored:  # PEFT leaves out what does not begin as it should, without an error
            rest.append(stored)
        elif part:
            parts.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
        elif wrapped := _WRAPPED.search(name):
            plain = name.replace(wrapped[0], ".")
            if wrapped[1] != "modules_to_save":
                base_tensors[plain] = tensor
            elif _PREFIX + plain not in tensors:
                rest.append(stored)
        elif _is_saved(name, saved):
            copies[name] = tensor
        elif name.rpartition(".")[0].endswith(_EMBEDDINGS):
            base_tensors[name] = tensor
        else:
            rest.append(stored)
    if rest:
        raise UserError(f"{folder} holds {counted(len(rest), 'tensor')} that merge does not know",
                        "save it with PEFT's save_pretrained, which names a layer's tensors "
                        f"{_PREFIX}<layer>.lora_A.weight and lora_B.weight, and leaves out tensors of other names",
                        sorted(rest)[:20])
    layers = {layer: _layer(folder, layer, found, config) for layer, found in parts.items()}
    if not layers and not copies:
        raise UserError(f"{folder} adapts no layer", _AGAIN)
    return Adapter(folder, layers, copies, base_tensors, config)


def _unusable(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are used here and whose values cannot be."""
    saved, alpha = config.get("modules_to_save") or [], config.get("lora_alpha", 8)
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        yield f"modules_to_save: {saved!r} is no list of names"
    if not _is_number(alpha):
        yield f"lora_alpha: {alpha!r} is no number"
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            yield f"{name}: {patterns!r} does not give numbers to names of layers"
            continue
        for pattern in patterns:
            try:
                re.compile(_ending(pattern))
            except re.error as e:
                yield f"{name}: {pattern!r} is no pattern: {e}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_saved(name: str, modules: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` covers a tensor: by the end of the name of a module that holds it."""
    pieces = name.split(".")
    holders = [".".join(pieces[:n]) for n in range(1, len(pieces))]
    return any(holder.endswith(module) for holder in holders for module in modules)


def _layer(folder: Path, layer: str, found: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Lora:
    embedding = any("embedding" in part for part in found)
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
    lost = [name for name in names if name not in found]
    if config.get("use_dora") and not any(_PARTS[part] == "magnitude" for part in found):
        lost.append("lora_magnitude_vector")
    if lost:
        raise UserError(f"{folder} lacks {_PREFIX}{layer}.{lost[0]}", _AGAIN)
    a, b = (found[name] for name in names)
    magnitude = next((t for part, t in found.items() if _PARTS[part] == "magnitude"), None)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UserError(f"{folder}: {layer} has factors of the shapes {a.shape} and {b.shape}, which give no matrix",
                        "only adapters of linear layers and embeddings are merged; see PEFT's merge_and_unload")
    if (rank := _own(config, "rank_pattern", layer, config.get("r", a.shape[0]))) != a.shape[0]:
        raise UserError(f"{folder}: {CONFIG} gives {layer} the rank {rank}, and its factors have {a.shape[0]}", _AGAIN)
    if magnitude and magnitude.shape != (b.shape[0],):
        raise UserError(f"{folder}: the lengths of {layer} have the shape {magnitude.shape}, not {(b.shape[0],)}",
                        _AGAIN)
    return Lora(a, b, _scale(config, layer, a.shape[0]), magnitude, embedding)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """s of a layer."""
    alpha = _own(config, "alpha_pattern", layer, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _own(config: Mapping[str, Any], patterns: str, layer: str, others: Any) -> Any:
    """What PEFT's ``rank_pattern`` or ``alpha_pattern`` gives a layer, else what the others have.

    The first pattern counts that is the end of the layer's name, from a dot on (``get_pattern_key`` in its
    ``utils/other.py``).
    """
    return next((value for pattern, value in (config.get(patterns) or {}).items()
                 if re.match(_ending(pattern), layer)), others)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    expected = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(_OTHER_KINDS)
    other = [f"{k}: {config[k]!r}" for k, v in expected.items() if config.get(k) and config[k] != v]
    if other:
        raise UserError(f"{folder} is a kind of adapter that gemma-tune does not merge",
                        "merge it with PEFT's merge_and_unload", other)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(f"{folder} was started in a way that changes the base weights as well "
                        f"(init_lora_weights: {start!r})",
                        "convert it with PEFT first: save_pretrained(…, path_initial_model_for_weight_conversion=…)")
