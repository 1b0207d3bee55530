"""An adapter that a training starts from: which settings it brings, whether it can be trained on here, its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.tensors import StoredTensor
from gemma_tune.base.words import counted, shown
from gemma_tune.lora.config import CONFIG, WEIGHTS
from gemma_tune.lora.experts import ASKED, adaptable, module_of, routers
from gemma_tune.lora.files import Adapter
from gemma_tune.lora.layers import TOWERS, left_out, target_modules, trained_weights
from gemma_tune.lora.names import found_among
from gemma_tune.lora.targets import Targets, with_whole
from gemma_tune.lora.whole import all_modules, is_tied, trainable_modules

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedModel

FILES = (CONFIG, WEIGHTS)
_HEADS = ("lm_head", "embed_out")
_WORDS = ("embed_tokens.weight", "wte.weight")
_MOST = 20  # problems that are listed


def digest_of(folder: Path) -> str:
    """What the start of a training depends on, as hex digests of both files; of one that is missing it is empty."""
    return " ".join(sha256_file(folder / name) if (folder / name).is_file() else "" for name in FILES)


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """Settings of ``train`` that say what an adapter computes, and its dropout, by the names of the options."""
    config = adapter.config
    if not adapter.layers:
        return {"full": True}
    whole = tuple(sorted({module.rsplit(".", 1)[-1] for module in modules_of(adapter)}))
    return {"rank": config["r"], "alpha": float(config["lora_alpha"]),
            "rslora": bool(config.get("use_rslora")), "dora": bool(config.get("use_dora")),
            "target_modules": tuple(sorted({ASKED if lora.experts else layer.rsplit(".", 1)[-1]
                                            for layer, lora in adapter.layers.items()})),
            "dropout": float(config["lora_dropout"])} | ({"modules_to_save": whole} if whole else {})


def modules_of(adapter: Adapter) -> list[str]:
    """Names of the modules that an adapter holds as a whole; a head that is the embedding goes by that one's name."""
    modules = [*dict.fromkeys(name.rpartition(".")[0] for name in adapter.copies)]
    tied = adapter.config.get("ensure_weight_tying") and len(modules) > 1
    return [module for module in modules if not (tied and module.endswith(_HEADS))]


def untrainable(adapter: Adapter) -> Iterator[str]:
    """What an adapter holds that is not trained here."""
    yield from (f"{layer} is an embedding, whose LoRA is not trained here"
                for layer, lora in adapter.layers.items() if lora.embedding)
    yield from (f"{name} came with the adapter, as of a base whose vocabulary was changed"
                for name in adapter.base_tensors if name not in adapter.copies)


def other_tokens(adapter: Adapter, new: Collection[Any]) -> Iterator[str]:
    """How the tokens whose rows an adapter has differ from the new tokens of a run.

    Args:
        new: their ids, or where these are not known yet their names.
    """
    each = [{*ids} for ids, _ in adapter.rows.values()]
    own = set().union(*each)
    ids = {i for i in new if isinstance(i, int)}
    if own and not new:
        yield f"it has rows of {counted(len(own), 'new token')}, and the run was prepared without --new-tokens"
    elif new and not own and not any(name.endswith(_WORDS) for name in adapter.copies):
        yield "it has no rows of new tokens, which the run was prepared with (--new-tokens)"
    elif own and (len(own) != len(new) or ids and ids != own):
        yield (f"it has rows of {counted(len(own), 'new token')} ({_some(own)}), and those of the run are others "
               f"({_some(new)})")
    elif any(some != own for some in each):
        yield f"its {' and '.join(adapter.rows)} have rows of different tokens"


def refuse_other_tokens(adapter: Adapter, new: Mapping[int, str]) -> None:
    """Whether an adapter's rows are those of new tokens of these ids and names.

    Raises:
        UserError: they are others.
    """
    if problems := [*other_tokens(adapter, new)] or [*_other_names(adapter, new)]:
        raise misfit(adapter, problems)


def _other_names(adapter: Adapter, new: Mapping[int, str]) -> Iterator[str]:
    """Ids that are called otherwise by the tokenizer beside an adapter, where there is one: what a row has learned to
    mean is not what it would stand for."""
    try:
        added = object_in(adapter.folder / "tokenizer.json").get("added_tokens", ())
    except (OSError, ValueError):
        return
    theirs = {entry["id"]: entry["content"] for entry in added}
    for i, name in new.items():
        before = theirs.get(i, name)
        if before != name and (adapter.rows or before in new.values()):
            yield f"its token {i} is {shown(before)}, and the run's is {shown(name)}: --new-tokens has an order"


def _some(tokens: Collection[Any]) -> str:
    return ", ".join(map(str, islice(sorted(tokens), 5))) + (", …" if len(tokens) > 5 else "")


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
    whole = trainable_modules(model) if adapter.copies else {}
    for module in modules_of(adapter):
        if problem := _whole_problem(model, whole, adapter, module, found := found_among(named, module)):
            problems.append(problem)
        else:
            names[module] = found
    rows = {module: found_among(named, module) for module in adapter.rows}
    if rows and (problem := _problem_of_rows(model, rows)):
        problems.append(problem)
    names |= {module: found for module, found in rows.items() if found}
    if not (adapter.layers or problems) and (left := {*all_modules(model)} - {*names.values()}):
        problems.append(f"{counted(len(left), 'module')} of the base are not among those that it trained, such as "
                        f"{min(left)}")
    if problems:
        raise misfit(adapter, problems)
    return names


def _problem_of_rows(model: PreTrainedModel, found: Mapping[str, str | None]) -> str | None:
    """What keeps rows of new tokens from being trained further.

    Args:
        found: by the modules that an adapter has rows of, what the model calls them.
    """
    if lost := [module for module, name in found.items() if name is None]:
        return f"{lost[0]} is not in the base model"
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [name for name, module in model.named_modules() if module is words or module is head and not is_tied(model)]
    if {*found.values()} == {*ends}:
        return None
    return f"it has rows of new tokens in {' and '.join(found)}, and the base has them in {' and '.join(ends)}"


def _whole_problem(model: PreTrainedModel, trainable: Mapping[str, Module], adapter: Adapter, module: str,
                   found: str | None) -> str | None:
    """What keeps a module that was trained as a whole from being trained further as ``found``.

    Args:
        trainable: see :func:`gemma_tune.lora.whole.trainable_modules`.
    """
    if found is None:
        return f"{module} is not in the base model"
    ties = bool(adapter.config.get("ensure_weight_tying"))
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if model.get_submodule(found) in ends and is_tied(model) != ties:
        how, are = ("as one tensor", "two") if ties else ("apart from each other", "one tensor")
        return (f"{module} was trained with embedding and head {how}, and they are {are} in the base: "
                "`gemma-tune merge --adapter` makes a model of both")
    if found not in trainable:
        return f"{module} was trained as a whole, and is none of the modules that are trained so here"
    own = {name.rpartition(".")[2]: tensor.shape for name, tensor in adapter.copies.items()
           if name.rpartition(".")[0] == module}
    shapes = {name: tuple(p.shape) for name, p in trainable[found].named_parameters()}
    return None if own == shapes else f"{module} has the shapes {shapes} in the base, {own} in the adapter"


def _shape(there: Any) -> tuple[int, ...]:
    """Of the weight of a layer, or of a parameter."""
    return (there.out_features, there.in_features) if hasattr(there, "out_features") else tuple(there.shape)


def targets_from(model: PreTrainedModel, adapter: Adapter, names: Mapping[str, str]) -> Targets:
    """What of the model the adapter changes, as :func:`names_in` found it."""
    return with_whole(model, sorted(names[layer] for layer, lora in adapter.layers.items() if not lora.experts),
                      sorted(names[layer] for layer, lora in adapter.layers.items() if lora.experts),
                      [names[module] for module in modules_of(adapter)])


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
    if not adapter.layers:
        return {}
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
        for name, stored in adapter.copies.items():
            module, _, last = name.rpartition(".")
            if module in names:
                found[f"base_model.model.{names[module]}.modules_to_save.default.{last}"] = read(stored)
        for module, (ids, stored) in adapter.rows.items():  # which are in the order of their ids here
            found[f"base_model.model.{names[module]}.token_adapter.trainable_tokens_delta.default"] = read(stored)[
                sorted(range(len(ids)), key=ids.__getitem__)]
    return found


def load_start(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Give the trained parameters of a PEFT model, which are exactly these, other values."""
    own = trained_weights(model)
    assert own.keys() == weights.keys(), sorted(own.keys() ^ weights.keys())[:4]
    for name, value in own.items():
        value.copy_(weights[name])
