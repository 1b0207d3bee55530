"""Modules whose weights are trained as a whole: PEFT's ``modules_to_save``; all of the text model with ``--full``.

What PEFT keeps of such a module is the base's own one and a copy that is trained, so the base is still there to compare
with. ``torch`` is imported inside functions.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted, nearest
from gemma_tune.lora.experts import count_of
from gemma_tune.lora.layers import TOWERS, leaf_of, left_out

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

LINEAR, EMBEDDING, VECTORS = "linear", "embedding", "vectors"
NEVER_PACKED = ("prediction_coefs", "correction_coefs")  # Gemma 3n writes into these weights
_FEW = 0.01  # share of a model's weights that --full may leave as they were, such as those of a convolution


def kind_of(module: Module) -> str | None:
    """How a module computes, so far as its weights can be trained as a whole: a product with a matrix, a row that is
    looked up, or something with vectors such as a norm; None for any other."""
    import torch

    own = [p for p in module.parameters(recurse=False)]
    if not own or next(module.children(), None) is not None:
        return None
    if isinstance(module, torch.nn.Embedding):
        return EMBEDDING if len(inspect.signature(type(module).forward).parameters) == 2 else None
    if isinstance(module, torch.nn.Linear):
        return LINEAR if type(module).forward is torch.nn.Linear.forward else None
    return VECTORS if all(p.ndim == 1 and p.is_floating_point() for p in own) else None


def trainable_modules(model: PreTrainedModel) -> dict[str, Module]:
    """The modules of the text model that can be trained as a whole, by full name; a head that is the embedding goes by
    that one's name alone. What the model reads past a module, it would read past its copy as well."""
    out = left_out(model)
    tied = model.get_output_embeddings() if is_tied(model) else None
    return {name: module for name, module in _holders(model)
            if kind_of(module) and module is not tied and name not in out}


def _holders(model: PreTrainedModel) -> Iterator[tuple[str, Module]]:
    """Modules of the text model with weights of their own."""
    return ((name, module) for name, module in model.named_modules()
            if not TOWERS.search(name) and next(module.parameters(recurse=False), None) is not None)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(words, "weight", None)


def whole_modules(model: PreTrainedModel, wanted: Sequence[str], four_bit: bool = False) -> list[str]:
    """Full names of the modules whose last name is wanted.

    Args:
        four_bit: the model's linear layers get 4 bits when it is loaded.

    Raises:
        UserError: names that match nothing, with the names that there are, or modules that are not trained as a whole.
    """
    if not wanted:
        return []
    there = trainable_modules(model)
    packed = {leaf_of(name) for name in there if four_bit and _gets_four_bits(model, name)}
    leaves = sorted({leaf_of(name) for name in there})
    wanted = [*dict.fromkeys(_as_one(model, name) for name in wanted)]
    said, unknown = [], [name for name in wanted if name not in leaves]
    if refused := [name for name in wanted if name in packed]:
        said.append(f"linear layers, which --qlora keeps in 4 bits and LoRA adapts: {', '.join(refused)}")
    if unknown:
        guess = "".join(f" (did you mean {name}?)" for name in nearest(unknown[0], leaves))
        held = {leaf_of(name) for name, _ in _holders(model)}
        what = "what is not trained as a whole here" if {*unknown} <= held else "what the model does not have"
        said.append(f"{what}: {', '.join(unknown)}{guess}")
    if said:
        beside = " beside --qlora" if packed else ""
        raise UserError(f"--modules-to-save names {'; and '.join(said)}", "modules that can be trained as a whole"
                        f"{beside} are {', '.join(name for name in leaves if name not in packed)}")
    return [name for name in there if leaf_of(name) in wanted]


def _gets_four_bits(model: PreTrainedModel, name: str) -> bool:
    module = model.get_submodule(name)
    return (kind_of(module) == LINEAR and module is not model.get_output_embeddings()
            and leaf_of(name) not in NEVER_PACKED)


def _as_one(model: PreTrainedModel, wanted: str) -> str:
    """The embedding's last name where the head is wanted, which is the same tensor."""
    modules = dict(model.named_modules())
    head, words = (next((leaf_of(name) for name, module in modules.items() if module is end), wanted)
                   for end in (model.get_output_embeddings(), model.get_input_embeddings()))
    return words if is_tied(model) and wanted == head else wanted


def all_modules(model: PreTrainedModel) -> list[str]:
    """Full names of all modules of the text model, for ``--full``.

    Raises:
        UserError: much of the model would stay as it was.
    """
    there, left = trainable_modules(model), left_whole(model)
    count = sum(left.values())
    if count > _FEW * (count + sum(p.numel() for module in there.values() for p in module.parameters())):
        what = "its experts are" if count_of(model) else f"{max(left, key=left.__getitem__)} and others are"
        raise UserError(f"--full does not train all of this model ({model.config.model_type}): {what} not among what "
                        "is trained as a whole here", "train an adapter: leave --full out")
    return [*there]


def left_whole(model: PreTrainedModel) -> dict[str, int]:
    """Weights of the text model that ``--full`` leaves as they were: how many, by the last name of their module."""
    known = {id(p) for module in trainable_modules(model).values() for p in module.parameters()}
    left: dict[str, int] = {}
    for name, module in _holders(model):
        count = sum(p.numel() for p in module.parameters(recurse=False) if id(p) not in known)
        if count:
            left[leaf_of(name)] = left.get(leaf_of(name), 0) + count
    return left


def said_of_left(model: PreTrainedModel) -> list[str]:
    """What to say of them."""
    return [f"{name} stays as it is ({counted(count, 'weight')}): it is none of the kinds that are trained as a whole"
            for name, count in left_whole(model).items()]


def copies_in(model: Any) -> dict[str, tuple[Module, Module]]:
    """Of a PEFT model, the base's module and the copy of it that is trained, by the name of the module."""
    from peft.utils.other import ModulesToSaveWrapper

    return {name.removeprefix("base_model.model."): (module.original_module, module.modules_to_save[adapter])
            for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)
            for adapter in module.active_adapters[:1] if adapter in module.modules_to_save}


def each_once(copies: Mapping[str, tuple[Module, Module]]) -> dict[str, tuple[Module, Module]]:
    """What :func:`copies_in` found without a head that is the embedding."""
    found: dict[int, str] = {}
    for name, (_, module) in copies.items():
        found.setdefault(id(next(module.parameters())), name)
    return {name: copies[name] for name in found.values()}


@contextmanager
def head_once(model: Any) -> Iterator[None]:
    """PEFT saves and loads a head that is the embedding as that alone while the context lasts."""
    copies = copies_in(model)
    heads = [model.get_submodule(f"base_model.model.{name}") for name in copies.keys() - each_once(copies).keys()]
    adapters = [head._adapters for head in heads]
    for head in heads:
        head._adapters = set()
    try:
        yield
    finally:
        for head, known in zip(heads, adapters):
            head._adapters = known


def put_back(model: Any) -> None:
    """The base's own modules in the place of the copies: PEFT's ``unload`` would leave the trained ones."""
    for name, (base, _) in copies_in(model).items():
        holder, _, last = f"base_model.model.{name}".rpartition(".")
        setattr(model.get_submodule(holder), last, base)
