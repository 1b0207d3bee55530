"""Defaults that differ by model family and size, each with the reason that is printed before work starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Parameters below which SmolLM2-135M speaks for others. It and Gemma 3 270M were measured: tests/benchmarks/recipes.py.
SMALL = 1_000_000_000
# Of an adapter's learning rate, what all weights learn with: Schulman et al. 2025, "LoRA Without Regret", found the
# best one of LoRA to be about ten times as high, whatever the model.
OF_ALL_WEIGHTS = 0.1
GRPO_RATE, GRPO_RATE_OF_ALL_WEIGHTS = 1e-5, 1e-6  # the second as TRL's GRPOTrainer has it


def family_defaults(config: Mapping[str, Any], section: str) -> tuple[dict[str, Any], list[str]]:
    """Settings of a stage for a model, and why.

    Args:
        config: config.json of the base model.
    """
    if section != "train":
        return {}, []
    family = str(config.get("model_type"))
    if family.startswith("gemma4"):
        return {"learning_rate": 5e-5}, ["learning rate 5e-05: Google's own for Gemma 4 with LoRA, where 2e-4 is rough"]
    if family.startswith("gemma"):
        return {"learning_rate": 2e-4}, ["learning rate 0.0002: Google's own for Gemma with LoRA; of those measured on "
                                         "Gemma 3 270M, higher ones gain little and overfit sooner"]
    if parameters(config) < SMALL:
        return {"learning_rate": 4e-4}, ["learning rate 0.0004: below a billion parameters, 2e-4 learned less from "
                                         "the same rows (measured on SmolLM2-135M)"]
    return {"learning_rate": 2e-4}, ["learning rate 0.0002: what Google, Unsloth and Axolotl use for LoRA on every "
                                     "linear layer of a chat model"]


def full_defaults(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same for a training of all weights."""
    rate = family_defaults(config, "train")[0]["learning_rate"] * OF_ALL_WEIGHTS
    return {"learning_rate": rate}, [f"learning rate {rate:g}: a tenth of an adapter's, as all weights move at once"]


def preference_defaults(method: str, full: bool = False) -> tuple[dict[str, Any], str]:
    """Settings of a training that learns preferences, or from rewards, and why: for a model of any size."""
    if method == "grpo":
        return ({"learning_rate": GRPO_RATE_OF_ALL_WEIGHTS if full else GRPO_RATE},
                "TRL's own for grpo" if full else "a step of grpo learns from the luck of a few answers, which takes "
                                                  "less; it is ten times TRL's 1e-6 for all weights")
    return ({"learning_rate": 5e-5 * (OF_ALL_WEIGHTS if full else 1)},
            f"{method} moves a model away from what it knows, which takes less than teaching it answers")


def parameters(config: Mapping[str, Any]) -> float:
    """About how many weights the text model of a config.json has, its embedding counted once.

    Four square matrices for attention and three for the gated MLP in each layer; infinite where the file does not say.
    """
    text = config.get("text_config") or config
    sizes = [text.get(name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")]
    if isinstance(sizes[1], list) and sizes[1]:  # of each layer
        sizes[1] = max(sizes[1])
    if not all(isinstance(size, int) for size in sizes):
        return float("inf")
    hidden, inner, layers, vocabulary = sizes
    return layers * (4 * hidden * hidden + 3 * hidden * inner) + vocabulary * hidden
