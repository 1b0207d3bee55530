"""Which layers of a model LoRA adapts. ``torch`` and ``peft`` are imported inside functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import nearest
from gemma_tune.config.stages import TrainConfig

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

# Towers that a text fine-tune must not touch, by the names transformers gives them.
TOWERS = re.compile(r"(^|\.)(vision|audio|multi_modal|multimodal|embed_vision|embed_audio)")


# Linear layers whose product alone is not what their model computes with: transformers reads the weight itself, past
# whatever an adapter adds (Gemma3nTextAltUp in training).
_READ_BESIDE = ("correction_coefs",)
# PEFT refuses these of models with Mamba layers, whose kernels read the weights (tuners_utils).
_OF_MAMBA, _MAMBAS = ("out_proj", "conv1d"), ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def target_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt: those of the text model, or the ones whose last name is wanted.

    Raises:
        UserError: names that match nothing, with the names there are, or that cannot be adapted.
    """
    linear, out = _linear(model), left_out(model)
    leaves = sorted({_leaf(name) for name in linear} - out.keys())
    if refused := [w for w in wanted if w in out]:
        raise UserError(f"--target-modules: {'; '.join(f'{w} {out[w]}' for w in refused)}",
                        f"layers that can be adapted are {', '.join(leaves)}")
    if unknown := [w for w in wanted if w not in leaves]:
        guess = "".join(f" (did you mean {name}?)" for name in nearest(unknown[0], leaves))
        raise UserError(f"--target-modules names what the model does not have: {', '.join(unknown)}{guess}",
                        f"its linear layers are {', '.join(leaves)}")
    linear = {name for name in linear if _leaf(name) not in out}
    chosen = sorted(name for name in linear if not wanted or _leaf(name) in wanted)
    if not chosen:
        raise UserError("the model has no linear layer that LoRA could adapt", "use another model")
    return chosen


def left_out(model: PreTrainedModel) -> dict[str, str]:
    """Last names of linear layers of the text model that are not adapted, and why, as the end of a sentence."""
    leaves = {_leaf(name): name for name in sorted(_linear(model))}
    mamba = _OF_MAMBA if getattr(getattr(model, "config", None), "model_type", None) in _MAMBAS else ()
    found = {}
    for leaf, name in leaves.items():
        if _has_a_way_of_its_own(model.get_submodule(name)):
            found[leaf] = "is a layer of its own kind, to which LoRA cannot be added"
        elif leaf in _READ_BESIDE:
            found[leaf] = "is read past an adapter by the model, so that nothing would be learned there"
        elif leaf in mamba:
            found[leaf] = "is read past an adapter by Mamba's kernels, so PEFT refuses it"
        elif _taken_for_experts(model, name):
            found[leaf] = "is what PEFT calls the fused experts of such a model, which are not adapted here"
    return found


def _linear(model: PreTrainedModel) -> set[str]:
    """Names of the linear layers of the text model, but for its head."""
    import torch

    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and not TOWERS.search(name)}


def _leaf(name: str) -> str:
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


def lora_config(config: TrainConfig, chosen: Sequence[str], **patterns: Any) -> LoraConfig:
    """PEFT's settings of an adapter on the layers ``chosen``; ``patterns`` are ranks and alphas of single ones."""
    from peft import LoraConfig

    return LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
                      use_dora=config.dora, target_modules=list(chosen), task_type="CAUSAL_LM", **patterns)


def described_adapter(config: TrainConfig) -> str:
    """Kind, rank and scale of an adapter in a few words."""
    kind = "DoRA" if config.dora else "LoRA"
    formula = "alpha / sqrt(r)" if config.rslora else "alpha / r"
    return f"{kind} of rank {config.rank}, scaled by {formula} = {config.scale:.4g}"


def trained_weights(model: PeftModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes. By itself it would ask for the base model too, which may be in shards."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
