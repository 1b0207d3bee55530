"""Defaults that differ by model family, each with the reason that is printed before work starts."""

from __future__ import annotations

from typing import Any


def family_defaults(model_type: str, section: str) -> tuple[dict[str, Any], list[str]]:
    """Settings of a stage for a family (``model_type`` of config.json), and why."""
    if section != "train":
        return {}, []
    if model_type.startswith("gemma4"):
        return {"learning_rate": 5e-5}, ["learning rate 5e-05: Google's own for Gemma 4 with LoRA, where 2e-4 is rough"]
    return {"learning_rate": 2e-4}, ["learning rate 0.0002: what Google, Unsloth and Axolotl use for LoRA on every "
                                     "linear layer of a small chat model"]
