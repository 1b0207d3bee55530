"""An adapter for another form of its model: that for text alone or that which sees, which name layers otherwise."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_tune.base.tensors import StoredTensor
from gemma_tune.lora.config import CONFIG, WEIGHTS
from gemma_tune.lora.experts import adaptable, module_of
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.names import found_among
from gemma_tune.lora.targets import NO_LAYER
from gemma_tune.lora.whole import is_tied


def with_head(adapter: Adapter, base: Any) -> Adapter:
    """An adapter with its head, which PEFT asks for also where it is the embedding: a training's checkpoint has that
    tensor once. Any other adapter is itself."""
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    if not adapter.config.get("ensure_weight_tying") or not is_tied(base):
        return adapter
    words, head = (next(name for name, module in base.named_modules() if module is end) for end in ends)
    held = {found_among((words, head), name.rpartition(".")[0]): tensor for name, tensor in adapter.copies.items()}
    if words not in held or head in held:
        return adapter
    return replace(adapter, copies=adapter.copies | {f"{head}.weight": held[words]})


def running_names(adapter: Adapter, base: Any) -> dict[str, str]:
    """Modules of an adapter of another form of the model, and what the running base calls them, where that differs.

    Transformers runs some multimodal repositories as their text model alone where no pictures are to be seen (Qwen
    3.5), others whole (Gemma 3): so the names on the disk do not tell.
    """
    there = {name for name, _ in base.named_modules()} | {*adaptable(base)}
    modules = {*adapter.layers, *(name.rpartition(".")[0] for name in (*adapter.copies, *adapter.base_tensors))}
    found = {module: found_among(there, module) for module in modules}
    return {module: name for module, name in found.items() if name not in (None, module)}


def renamed_adapter(adapter: Adapter, names: Mapping[str, str], folder: Path) -> Path:
    """Write an adapter whose names are those of another form of its model, as PEFT finds layers by their names.

    Args:
        names: of modules, in the adapter and in the base; those that are the same are left out.
        folder: to write into; it is empty.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    layers = {names.get(layer, layer): lora for layer, lora in adapter.layers.items()}
    tensors: dict[str, StoredTensor] = {}
    parameters = [layer for layer, lora in layers.items() if lora.experts]
    for layer, lora in layers.items():
        layer = module_of(layer, parameters) if lora.experts else layer
        kind, end = ("lora_embedding_", "") if lora.embedding else ("lora_", ".weight")
        tensors |= {f"{layer}.{kind}A{end}": lora.a, f"{layer}.{kind}B{end}": lora.b}
        tensors |= {f"{layer}.lora_magnitude_vector": lora.magnitude} if lora.magnitude else {}
    # Of a tensor that is there as it was and as it became, PEFT needs the latter.
    own = {name: tensor for name, tensor in adapter.base_tensors.items() if name not in adapter.copies}
    for name, tensor in (adapter.copies | own).items():
        module, _, last = name.rpartition(".")
        module = names.get(module, module)
        inner = ".base_layer" if name in adapter.base_tensors and module in layers else ""
        tensors[f"{module}{inner}.{last}"] = tensor
    root = adapter.config.get("use_rslora")
    ranks = {layer: lora.rank for layer, lora in layers.items()}
    config = adapter.config | {
        "target_modules": [layer for layer in layers if layer not in parameters] if layers else NO_LAYER,
        "target_parameters": parameters or None,
        "layers_to_transform": None, "layers_pattern": None, "exclude_modules": None,
        "rank_pattern": {re.escape(layer): rank for layer, rank in ranks.items()},
        "alpha_pattern": {re.escape(layer): lora.scale * (ranks[layer] ** 0.5 if root else ranks[layer])
                          for layer, lora in layers.items()},
        "trainable_token_indices": None,  # which PEFT does not put on the model, see ``token_rows``
        "modules_to_save": [names.get(m, m) for m in {name.rpartition(".")[0] for name in adapter.copies}] or None}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        times = Counter(tensor.name for tensor in tensors.values())
        read = {f"base_model.model.{name}": file.get_tensor(tensor.name) for name, tensor in tensors.items()}
        save_file({name: found.clone() if times[tensor.name] > 1 else found
                   for (name, found), tensor in zip(read.items(), tensors.values())}, folder / WEIGHTS)
    return folder
