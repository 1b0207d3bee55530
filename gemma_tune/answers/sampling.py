"""How a model's tokens are drawn: what was chosen, else its own generation settings, completed as transformers does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What `generate` takes for a setting that neither the model nor the user has
# (transformers.GenerationConfig._get_default_generation_params); a server has other defaults of its own.
_UNSET = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
CHOOSABLE = ("temperature", "top_p", "top_k", "repetition_penalty")


def sampling_arguments(model: Any, chosen: Mapping[str, float | None]) -> dict[str, Any]:
    """Arguments for ``generate``: what was chosen, else the model's own generation settings.

    A model that is greedy by itself samples as soon as a temperature, top_p or top_k is chosen for it.

    Args:
        chosen: temperature, top_p, top_k, repetition_penalty; None or a missing name means the model's own.
    """
    return arguments_of(vars(model.generation_config), chosen)


def arguments_of(own: Mapping[str, Any], chosen: Mapping[str, float | None]) -> dict[str, Any]:
    """The same from what a generation_config.json says; what stands there for None is left to it.

    Returns:
        ``do_sample``, ``temperature``, ``top_p``, ``top_k`` and, where there are such, ``repetition_penalty`` and
        ``min_p``.
    """
    values = {name: own.get(name) if chosen.get(name) is None else chosen[name] for name in CHOOSABLE}
    asked = any(chosen.get(name) is not None for name in ("temperature", "top_p", "top_k"))
    arguments: dict[str, Any] = {}
    if values["repetition_penalty"]:
        arguments["repetition_penalty"] = float(values["repetition_penalty"])
    if values["temperature"] == 0 or not (own.get("do_sample") or asked):
        # Greedy ignores these; unset them so that transformers does not warn about the model's own.
        return arguments | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if own.get("min_p"):
        arguments["min_p"] = float(own["min_p"])
    return arguments | {"do_sample": True} | {name: value if values[name] is None else values[name]
                                              for name, value in _UNSET.items()}
