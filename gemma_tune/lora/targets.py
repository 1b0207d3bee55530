"""What of a model a training changes: layers and experts with LoRA, and modules as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.layers import not_adapted, target_modules, target_parameters
from gemma_tune.lora.whole import all_modules, is_tied, said_of_left, whole_modules

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

# PEFT's own name for no layer at all (``DUMMY_TARGET_MODULES``); an empty list would be an error.
NO_LAYER = "dummy-target-modules"


@dataclass(frozen=True)
class Targets:
    """Full names of what is trained.

    Attributes:
        layers: linear layers that get LoRA.
        parameters: of experts, that get LoRA.
        whole: modules whose weights are trained themselves; of head and embedding that are one tensor, the embedding.
        tied: these are one, and are trained.
    """

    layers: list[str]
    parameters: list[str]
    whole: list[str]
    tied: bool


def targets_of(model: PreTrainedModel, config: TrainConfig) -> Targets:
    """What the settings of a training name.

    Raises:
        UserError: the model does not have that, or it cannot be trained here; all of it together.
    """
    if config.full:
        return with_whole(model, [], [], all_modules(model))
    whole, layers, parameters = _all_found(
        partial(whole_modules, model, config.modules_to_save, config.qlora),
        partial(target_modules, model, config.target_modules), partial(target_parameters, model, config.target_modules))
    return with_whole(model, [name for name in layers if name not in whole], parameters, whole)


def _all_found(*ways: Callable[[], list[str]]) -> list[list[str]]:
    """What each finds.

    Raises:
        UserError: what one of them says, or several.
    """
    found, problems = [], []
    for find in ways:
        try:
            found.append(find())
        except UserError as e:
            problems.append(e)
    if problems:
        raise problems[0] if len(problems) == 1 else UserError(
            "the model cannot be trained so", "; ".join(dict.fromkeys(e.hint for e in problems if e.hint)),
            [e.message for e in problems])
    return found


def with_whole(model: PreTrainedModel, layers: list[str], parameters: list[str], whole: list[str]) -> Targets:
    """These targets of a model."""
    return Targets(layers, parameters, whole, is_tied(model) and any(
        model.get_submodule(name) is model.get_input_embeddings() for name in whole))


def said_of_rest(model: PreTrainedModel, config: TrainConfig) -> list[str]:
    """What to say of what is not trained, and may be expected to be."""
    return said_of_left(model) if config.full else not_adapted(model, config.target_modules)


def named_layers(layers: Sequence[str], parameters: Sequence[str]) -> list[str] | str:
    """PEFT's ``target_modules`` of an adapter on these layers, and on these parameters of experts."""
    return [*layers] if layers or parameters else NO_LAYER


def lora_config(config: TrainConfig, targets: Targets, **patterns: Any) -> LoraConfig:
    """PEFT's settings of a training; ``patterns`` are ranks and alphas of single layers."""
    from peft import LoraConfig

    return LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_rslora=config.rslora,
                      use_dora=config.dora, target_modules=named_layers(targets.layers, targets.parameters),
                      target_parameters=targets.parameters or None,
                      modules_to_save=targets.whole or None, ensure_weight_tying=targets.tied,
                      task_type="CAUSAL_LM", **patterns)

