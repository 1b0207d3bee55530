"""A PEFT adapter folder, read into a description: which layer changes by how much, and which tensors are replaced.

Nothing but headers and adapter_config.json is read here. What the names of the tensors mean is in PEFT's
``utils/save_and_load.py`` (``get_peft_model_state_dict``) and ``utils/other.py`` (``ModulesToSaveWrapper``):

- ``<layer>.lora_A.weight``, ``lora_B.weight``, ``lora_magnitude_vector``: LoRA and DoRA of a linear layer;
- the same of ``<module>.base_layer`` and ``<module>``, a layer's experts: of their parameters, see
  :mod:`gemma_tune.lora.experts`, with A (experts x r, in) and B (out, r x experts), an r after the other;
- ``<layer>.lora_embedding_A``, ``lora_embedding_B``: of an embedding;
- ``<layer>.base_layer.weight``, and embeddings without any such part: the base's own tensor as it was in training;
- ``<module>.token_adapter.trainable_tokens_delta``: rows of an embedding or a head (n, d), whose numbers are in
  ``trainable_token_indices``; not a difference, in spite of the name;
- any other name that ``modules_to_save`` covers: a tensor that was trained as a whole;
- ``<module>.original_module.weight`` and ``<module>.modules_to_save.weight``, which ``save_embedding_layers`` writes of
  such a module: the base's own tensor, and the trained one once more, which PEFT does not read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.tensors import READABLE, StoredTensor, read_header
from gemma_tune.base.words import counted
from gemma_tune.lora.config import CONFIG, WEIGHTS, how_to_renew, read_config, usable_config
from gemma_tune.lora.experts import ASKED, PARAMETERS
from gemma_tune.lora.patterns import ending, refuse_endless

_PREFIX = "base_model.model."
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
          "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude"}
_EMBEDDINGS = ("embed_tokens", "wte", "lm_head")
_ROWS = ".token_adapter.trainable_tokens_delta"
_AROUND = re.compile(r"(\.base_layer)+$")
_WRAPPED = re.compile(r"\.(base_layer|original_module|modules_to_save)\.")

@dataclass(frozen=True)
class Lora:
    """What is learned about one layer: W (out, in) becomes W + s B A, with DoRA m / ||W + s B A|| of it, by rows.

    Attributes:
        a: A (r, in), or of an embedding (r, entries).
        b: B (out, r), or of an embedding (width, r).
        scale: s.
        magnitude: DoRA's m (out,).
        embedding: the layer is an embedding, whose weight is stored as (in, out) = (entries, width).
        experts: W is (experts, out, in), and each expert has an A and a B, which ``a`` and ``b`` hold together; 0 where
            it is a matrix.
    """

    a: StoredTensor
    b: StoredTensor
    scale: float
    magnitude: StoredTensor | None = None
    embedding: bool = False
    experts: int = 0

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0] // (self.experts or 1)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def numbers(self) -> int:
        """How many there are of it."""
        return sum(math.prod(tensor.shape) for tensor in (self.a, self.b, self.magnitude) if tensor)


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Attributes:
        layers: by the name of the layer in the trained model, without PEFT's prefix; of experts, of the parameter.
        copies: tensors that were trained as a whole (``modules_to_save``), by name.
        base_tensors: the base's tensors that came with the adapter, by name; one of ``copies`` may be there too, as it
            was before.
        config: adapter_config.json, see :func:`gemma_tune.lora.config.usable_config`.
    """

    folder: Path
    layers: dict[str, Lora]
    copies: dict[str, StoredTensor]
    base_tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    rows: dict[str, tuple[list[int], StoredTensor]] = field(default_factory=dict)

    @property
    def base_id(self) -> str | None:
        """The model that it was trained on, as PEFT recorded it."""
        return self.config.get("base_model_name_or_path")

    @property
    def transposed(self) -> bool:
        """Linear layers are stored as (in, out), as GPT-2's ``Conv1D`` does."""
        return bool(self.config.get("fan_in_fan_out"))


def how_to_name_base(folder: Path) -> str:
    """What to type where an adapter's base model cannot be told from the adapter."""
    return f"name it: gemma-tune merge --adapter {shell.quote(str(folder))} --base ID"


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
    config = usable_config(folder)
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise UserError(f"{folder} holds pickled weights, which can run code when they are read",
                        "load it with PEFT where you trust it, and save it with save_pretrained, which writes "
                        f"{WEIGHTS}")
    try:
        tensors = {tensor.name: tensor for tensor in read_header(folder / WEIGHTS)}
    except UserError as e:
        raise UserError(f"the adapter {folder} cannot be read: {e.message}", how_to_renew(folder)) from e
    rows = _rows(folder, tensors, config)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(_ROWS)}
    parts, copies, base_tensors = _sorted(folder, tensors, config)
    parameters = {layer: name for layer in parts if (name := _parameter(layer, config))}
    parts = {parameters.get(layer, layer): found for layer, found in parts.items()}
    refuse_endless(folder, config, parts)
    stacked = {*parameters.values()}
    layers = {layer: _layer(folder, layer, found, config, layer in stacked) for layer, found in parts.items()}
    if not layers and not copies and not rows:
        raise UserError(f"{folder} adapts no layer", how_to_renew(folder))
    return Adapter(folder, layers, copies, base_tensors, config, rows)


_Tensors = dict[str, StoredTensor]


def _rows(folder: Path, tensors: _Tensors, config: Mapping[str, Any]) -> dict[str, tuple[list[int], StoredTensor]]:
    """Rows of embedding and head that were trained by themselves, by module.

    Raises:
        UserError: they are not those that ``trainable_token_indices`` names.
    """
    indices = config.get("trainable_token_indices") or {}
    found = {}
    for name, tensor in tensors.items():
        if not name.endswith(_ROWS):
            continue
        module = name.removeprefix(_PREFIX).removesuffix(_ROWS)
        ids = indices if isinstance(indices, list) else next(
            (some for end, some in indices.items() if module.endswith(end)), [])
        if len(tensor.shape) != 2 or tensor.shape[0] != len(ids) or tensor.dtype not in READABLE:
            raise UserError(f"{folder}: {name} has the shape {tensor.shape}, and {CONFIG} names {len(ids)} tokens",
                            how_to_renew(folder))
        found[module] = ids, tensor
    if indices and not found:
        raise UserError(f"{folder} lacks the rows of the tokens that {CONFIG} names", how_to_renew(folder))
    return found


def _sorted(folder: Path, tensors: _Tensors,
            config: Mapping[str, Any]) -> tuple[dict[str, _Tensors], _Tensors, _Tensors]:
    """The tensors of an adapter's file by what they are: parts of layers, by layer; whole copies of modules; tensors of
    the base model that lie beside them.

    Raises:
        UserError: some are none of these.
    """
    saved = list(config.get("modules_to_save") or ())
    if config.get("ensure_weight_tying") and any(module.endswith(_EMBEDDINGS) for module in saved):
        saved += _EMBEDDINGS  # PEFT adds the others without naming them
    kinds = {"a", "b", "magnitude"} if config.get("use_dora") else {"a", "b"}
    parts: dict[str, _Tensors] = {}
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
    return parts, copies, base_tensors


def _parameter(module: str, config: Mapping[str, Any]) -> str | None:
    """The parameter of experts that an adapter's module stands for; None for a layer.

    PEFT puts a module around them for each parameter, in the order in which they are there: the first is innermost.
    """
    experts = _AROUND.sub("", module)
    if not experts.endswith(f".{ASKED}"):
        return None
    targets = config.get("target_parameters") or ()
    there = [name for name in PARAMETERS if f".{experts}.{name}".endswith(tuple(f".{target}" for target in targets))]
    depth = (len(module) - len(experts)) // len(".base_layer")
    return f"{experts}.{there[-1 - depth]}" if depth < len(there) else None


def _is_saved(name: str, modules: Sequence[str]) -> bool:
    """Whether ``modules_to_save`` covers a tensor: by the end of the name of a module that holds it."""
    pieces = name.split(".")
    holders = [".".join(pieces[:n]) for n in range(1, len(pieces))]
    return any(holder.endswith(module) for holder in holders for module in modules)


def _layer(folder: Path, layer: str, found: Mapping[str, StoredTensor], config: Mapping[str, Any],
           stacked: bool = False) -> Lora:
    embedding = any("embedding" in part for part in found)
    names = ["lora_embedding_A", "lora_embedding_B"] if embedding else ["lora_A.weight", "lora_B.weight"]
    lost = [name for name in names if name not in found]
    if config.get("use_dora") and not any(_PARTS[part] == "magnitude" for part in found):
        lost.append("lora_magnitude_vector")
    if lost:
        raise UserError(f"{folder} lacks {_PREFIX}{layer}.{lost[0]}", how_to_renew(folder))
    a, b = (found[name] for name in names)
    magnitude = next((t for part, t in found.items() if _PARTS[part] == "magnitude"), None)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise UserError(f"{folder}: {layer} has factors of the shapes {a.shape} and {b.shape}, which give no matrix",
                        "only adapters of linear layers and embeddings are merged; see PEFT's merge_and_unload")
    rank = _own(config, "rank_pattern", layer, config["r"])
    experts = a.shape[0] // rank if stacked and rank else 0
    if rank * (experts or 1) != a.shape[0]:
        raise UserError(f"{folder}: {CONFIG} gives {layer} the rank {rank}, and its factors have {a.shape[0]}",
                        how_to_renew(folder))
    if magnitude and magnitude.shape != (b.shape[0],):
        raise UserError(f"{folder}: the lengths of {layer} have the shape {magnitude.shape}, not {(b.shape[0],)}",
                        how_to_renew(folder))
    return Lora(a, b, _scale(config, layer, rank), magnitude, embedding, experts)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """s of a layer."""
    alpha = _own(config, "alpha_pattern", layer, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _own(config: Mapping[str, Any], patterns: str, layer: str, others: Any) -> Any:
    """What PEFT's ``rank_pattern`` or ``alpha_pattern`` gives a layer, else what the others have.

    The first pattern counts that is the end of the layer's name, from a dot on (``get_pattern_key`` in its
    ``utils/other.py``).
    """
    return next((value for pattern, value in (config.get(patterns) or {}).items()
                 if re.match(ending(pattern), layer)), others)
