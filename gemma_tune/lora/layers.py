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


def target_modules(model: PreTrainedModel, wanted: Sequence[str]) -> list[str]:
    """Full names of the linear layers to adapt: those of the text model, or the ones whose last name is wanted.

    Raises:
        UserError: names that match nothing, with the names there are.
    """
    import torch

    head = model.get_output_embeddings()
    linear = {name for name, module in model.named_modules()
              if isinstance(module, torch.nn.Linear) and module is not head and not TOWERS.search(name)}
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    if unknown := [w for w in wanted if w not in leaves]:
        guess = "".join(f" (did you mean {name}?)" for name in nearest(unknown[0], leaves))
        raise UserError(f"--target-modules names what the model does not have: {', '.join(unknown)}{guess}",
                        f"its linear layers are {', '.join(leaves)}")
    chosen = sorted(name for name in linear if not wanted or name.rsplit(".", 1)[-1] in wanted)
    if not chosen:
        raise UserError("the model has no linear layer that LoRA could adapt", "use another model")
    return chosen


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
