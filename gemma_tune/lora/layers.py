"""Which layers of a model LoRA adapts. ``torch`` and ``peft`` are imported inside functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import nearest
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.experts import ASKED, adaptable, count_of, not_adapted_of, routers

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

# Towers that a text fine-tune must not touch, by the names transformers gives them.
TOWERS = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|multimodal|embed_vision|embed_audio)")


# Linear layers whose product alone is not what their model computes with: transformers reads the weight itself, past
# whatever an adapter adds (Gemma3nTextAltUp in training).
_READ_BESIDE = ("correction_coefs",)
# Mamba's kernels read the weight of this layer, past an adapter: PEFT refuses it of most (tuners_utils), and of the
# last three transformers hands it to a fused kernel in training.
_OF_MAMBA = "out_proj"
_ALL = "all"
_CHOOSES = "chooses the experts, and is left as it was trained (--target-modules can name it)"
_MAMBAS = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h", "bamba", "granitemoehybrid", "zamba2")


def target_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt: those of the text model but for what chooses experts, or the ones whose
    last name is wanted; none where experts alone are.

    Raises:
        UserError: names that match nothing, with the names there are, or that cannot be adapted.
    """
    if (wanted := _of_layers(wanted)) is None:
        return []
    out = left_out(model)
    linear = _linear(model) - out.keys()
    leaves = sorted(set(map(leaf_of, linear)))
    reasons = _by_leaf(out)
    if refused := [w for w in wanted if w in reasons and w not in leaves]:
        raise UserError(f"--target-modules: {'; '.join(f'{w} {reasons[w]}' for w in refused)}",
                        f"layers that can be adapted are {', '.join(leaves)}")
    if unknown := [w for w in wanted if w not in leaves]:
        guess = "".join(f" (did you mean {name}?)" for name in nearest(unknown[0], leaves))
        raise UserError(f"--target-modules names what the model does not have: {', '.join(unknown)}{guess}",
                        f"its linear layers are {', '.join(leaves)}"
                        + (f"; its experts are not among them: {_of_experts(model)}" if count_of(model) else ""))
    unasked = linear - routers(model)
    chosen = sorted(name for name in linear if leaf_of(name) in wanted) if wanted else sorted(unasked)
    if not chosen:
        raise UserError("the model has no linear layer that LoRA could adapt", "use another model")
    return chosen


def _of_layers(wanted: Sequence[str]) -> list[str] | None:
    """The last names of linear layers among those that are wanted, none for all of them; None where experts alone are.
    """
    if {*wanted} == {ASKED}:
        return None
    return [] if _ALL in wanted else [name for name in wanted if name != ASKED]


def target_parameters(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the parameters of experts to adapt: all of them where they are wanted, else none.

    Raises:
        UserError: the model has none, or none that can be adapted.
    """
    if ASKED not in wanted:
        return []
    if found := adaptable(model):
        return found
    leave = f"leave {ASKED} out of --target-modules"
    if not count_of(model):
        raise UserError(f"--target-modules names {ASKED}, and this model has none", leave)
    kind = model.config.model_type
    raise UserError(f"--target-modules names {ASKED}, and this model ({kind}) keeps them in a way of its own, "
                    "to which LoRA is not added here", f"{leave}: the other layers are adapted")


def _of_experts(model: PreTrainedModel) -> str:
    return f"`{ASKED}` names these" if adaptable(model) else "these are not adapted here"


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """Full names of linear layers of the text model that are not adapted, and why, as the end of a sentence."""
    linear = sorted(_linear(model))
    mamba = getattr(getattr(model, "config", None), "model_type", None) in _MAMBAS
    one_of_each = {leaf_of(name): name for name in linear}  # PEFT looks at the last name alone
    experts = {leaf for leaf, name in one_of_each.items() if _taken_for_experts(model, name)}
    named = _of_experts(model) if experts else ""
    found = {}
    for name in linear:
        leaf = leaf_of(name)
        if _has_a_way_of_its_own(model.get_submodule(name)):
            found[name] = "is a layer of its own kind, to which LoRA cannot be added"
        elif leaf in _READ_BESIDE:
            found[name] = "is read past an adapter by the model, so that nothing would be learned there"
        elif mamba and leaf == _OF_MAMBA:
            found[name] = "is read past an adapter by Mamba's kernels, so that nothing would be learned there"
        elif leaf in experts:
            found[name] = f"is what PEFT calls the fused experts of such a model; {named}"
    return found


def not_adapted(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """What to say of the layers that are left out, each last name once.

    Args:
        wanted: the last names that were asked for; none means all.
    """
    experts = ASKED in wanted
    if (wanted := _of_layers(wanted)) is None:
        return []
    out = left_out(model) | ({} if wanted else dict.fromkeys(sorted(routers(model)), _CHOOSES))
    there, not_there = Counter(map(leaf_of, _linear(model))), Counter(map(leaf_of, out))
    said = []
    for leaf, reason in _by_leaf(out).items():
        places = "" if not_there[leaf] == there[leaf] else f" in {not_there[leaf]} of {there[leaf]} places"
        if not wanted or leaf in wanted:
            said.append(f"{leaf} is not adapted{places}: it {reason}")
    return [*said, *filter(None, [] if experts else [not_adapted_of(model)])]


def _by_leaf(out: Mapping[str, str]) -> dict[str, str]:
    return {leaf_of(name): reason for name, reason in out.items()}


def _linear(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers of the text model, but for its head."""
    import torch

    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and not TOWERS.search(name)}


def leaf_of(name: str) -> str:
    """The last name of a module."""
    return name.rsplit(".", 1)[-1]


def _has_a_way_of_its_own(module: Any) -> bool:
    """Whether a model's own class of linear layers computes something else, such as a router that also chooses."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and "forward" in vars(kind)


def _taken_for_experts(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT would adapt other parameters in the place of a layer of this name.

    For adapters of Transformers 4, in which experts were layers, it takes names such as ``gate_proj`` in mixtures of
    experts for the fused tensors of Transformers 5, also where a layer of that name is beside them.
    """
    from peft import LoraConfig

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # of a PEFT that does so no more
        return False
    config = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # of fused tensors it wants all parts named
        return True
    return set(config.target_modules or ()) != {name}


def described_adapter(config: TrainConfig) -> str:
    """Kind, rank and scale of an adapter in a few words, or that there is none."""
    if config.full:
        return "full fine-tuning"
    kind = "DoRA" if config.dora else "LoRA"
    formula = "alpha / sqrt(r)" if config.rslora else "alpha / r"
    return f"{kind} of rank {config.rank}, scaled by {formula} = {config.scale:.4g}"


def trained_weights(model: PeftModel) -> dict[str, Tensor]:
    """All that is trained, each tensor once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def saved_weights(model: PeftModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes: a tensor under each of its names, on the CPU. By itself it would ask for the
    base model too, which may be in shards; and tensors that are parts of one it would copy where they are."""
    import torch

    return {name: torch.from_numpy(p.detach().cpu().numpy())
            for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
