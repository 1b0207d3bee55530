"""An adapter that a training starts from: which settings it brings, whether it can be trained on here, its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file
from gemma_tune.base.tensors import StoredTensor
from gemma_tune.lora.config import CONFIG, WEIGHTS
from gemma_tune.lora.experts import ASKED, adaptable, module_of, routers
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.layers import TOWERS, left_out, target_modules, trained_weights
from gemma_tune.lora.names import found_among

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

FILES = (CONFIG, WEIGHTS)
_MOST = 20  # problems that are listed


def digest_of(folder: Path) -> str:
    """What the start of a training depends on, as hex digests of both files; of one that is missing it is empty."""
    return " ".join(sha256_file(folder / name) if (folder / name).is_file() else "" for name in FILES)


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """Settings of ``train`` that say what an adapter computes, and its dropout, by the names of the options."""
    config = adapter.config
    return {"rank": config["r"], "alpha": float(config["lora_alpha"]),
            "rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora")),
            "target_modules": tuple(sorted({ASKED if lora.experts else layer.rsplit(".", 1)[-1]
                                            for layer, lora in adapter.layers.items()})),
            "dropout": float(config["lora_dropout"])}


def untrainable(adapter: Adapter) -> Iterator[str]:
    """What an adapter holds that is not trained here."""
    yield from (f"{layer} is an embedding, whose LoRA is not trained here"
                for layer, lora in adapter.layers.items() if lora.embedding)
    yield from (f"{name} was trained as a whole (modules_to_save)" for name in adapter.copies)
    yield from (f"{name} came with the adapter, as of a base whose vocabulary was changed"
                for name in adapter.base_tensors if name not in adapter.copies)


def names_in(model: PreTrainedModel, adapter: Adapter) -> dict[str, str]:
    """What the model calls each layer of an adapter.

    Args:
        model: may be on the meta device.

    Raises:
        UserError: the model has no such layer, has it in another shape, or it is none that is trained here; all of
            them are listed.
    """
    parameters = {name: model.get_parameter(name) for name in adaptable(model)}
    named = dict(model.named_modules()) | parameters
    trainable, out = {*target_modules(model, ()), *routers(model), *parameters}, left_out(model)
    names, problems = {}, []
    for layer, lora in adapter.layers.items():
        found = found_among(named, layer)
        there: Any = named.get(found or "")
        if lora.experts and found not in parameters:
            problems.append(f"{layer} is none of experts that can be adapted in the base model")
        elif found is None and not TOWERS.search(layer):  # which are not loaded
            problems.append(f"{layer} is not in the base model")
        elif found in out:
            problems.append(f"{layer} {out[found]}")
        elif found not in trainable:
            problems.append(f"{layer} is no linear layer of the text model's blocks, which alone are trained here")
        elif (shape := _shape(there)) != (own := (lora.experts, *lora.shape) if lora.experts else lora.shape):
            problems.append(f"{layer} has the shape {shape} in the base, {own} in the adapter")
        else:
            names[layer] = found
    if problems:
        raise misfit(adapter, problems)
    return names


def _shape(there: Any) -> tuple[int, ...]:
    """Of the weight of a layer, or of a parameter."""
    return (there.out_features, there.in_features) if hasattr(there, "out_features") else tuple(there.shape)


def apart(adapter: Adapter, names: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Sorted names of what :func:`names_in` found: of layers, and of parameters of experts."""
    return (sorted(names[layer] for layer, lora in adapter.layers.items() if not lora.experts),
            sorted(names[layer] for layer, lora in adapter.layers.items() if lora.experts))


def misfit(adapter: Adapter, problems: list[str],
           instead: str = "start from one that was trained on this model's linear layers") -> UserError:
    """The error that lists why no training can start from an adapter here; ``instead`` is what can be done."""
    more = [f"… and {len(problems) - _MOST} more"] if len(problems) > _MOST else []
    return UserError(f"no training can start here from the adapter {adapter.folder}",
                     f"{instead}, or from zero: --from-adapter none", problems[:_MOST] + more)


def patterns_of(adapter: Adapter, names: Mapping[str, str]) -> dict[str, Any]:
    """PEFT's ``rank_pattern`` and ``alpha_pattern`` for layers whose rank or alpha is not what the others have.

    The adapter's own patterns are for the names that its layers had where it was trained.
    """
    settings = settings_of(adapter)
    ranks = {names[layer]: lora.rank for layer, lora in adapter.layers.items()}
    alphas = {names[layer]: lora.scale * (rank ** 0.5 if settings["rslora"] else rank)
              for (layer, lora), rank in zip(adapter.layers.items(), ranks.values())}
    return {"rank_pattern": {name: rank for name, rank in ranks.items() if rank != settings["rank"]},
            "alpha_pattern": {name: _plain(alpha) for name, alpha in alphas.items()
                              if abs(alpha - settings["alpha"]) > 1e-6 * abs(settings["alpha"])}}


def _plain(alpha: float) -> float:
    """Without what multiplying and dividing by a rank has added."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha


def weights_of(adapter: Adapter, names: Mapping[str, str]) -> dict[str, Tensor]:
    """An adapter's tensors, as stored, by the names that a PEFT model's parameters have."""
    from safetensors import safe_open

    with safe_open(adapter.folder / WEIGHTS, framework="pt") as file:
        def read(stored: StoredTensor) -> Tensor:
            return file.get_tensor(stored.name)

        found, adapted = {}, {*names.values()}
        for layer, lora in adapter.layers.items():
            start = f"base_model.model.{module_of(names[layer], adapted) if lora.experts else names[layer]}"
            found[f"{start}.lora_A.default.weight"] = read(lora.a)
            found[f"{start}.lora_B.default.weight"] = read(lora.b)
            if lora.magnitude:
                found[f"{start}.lora_magnitude_vector.default.weight"] = read(lora.magnitude)
    return found


def load_start(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Give the trained parameters of a PEFT model, which are exactly these, other values."""
    own = trained_weights(model)
    assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())[:4]
    for name, value in own.items():
        value.copy_(weights[name])
