"""What a layer of an adapter is called in the base model, where the two were loaded in different ways.

Checkpoints name some tensors otherwise than the running model does, by which an adapter names its layers. The renames
are those of transformers' ``conversion_mapping.py`` for multimodal models (``llava``, which Gemma 3 and PaliGemma use):
``language_model.model.X`` on the disk is ``model.language_model.X`` in memory.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator

from gemma_tune.lora.experts import PARTS

_RENAMES = ((r"^language_model\.lm_head\.", "lm_head."), (r"^language_model\.(model\.)?", "model.language_model."),
            (r"^multi_modal_projector\.", "model.multi_modal_projector."),
            # Repositories, and versions of transformers before 5, put the tower's parts one level deeper.
            (r"^(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."))


def running_name(stored: str) -> str:
    """What the running model calls a tensor or layer of a checkpoint."""
    for pattern, new in _RENAMES:
        name, count = re.subn(pattern, new, stored)
        if count:
            return name
    return stored


def found_among(there: Container[str], name: str) -> str | None:
    """What a base calls an adapter's tensor or layer; None where it has none.

    Args:
        there: the names of the base, as :func:`running_name` gives them.
    """
    return next((candidate for candidate in _candidates(running_name(name)) if candidate in there), None)


def found_experts(there: Container[str], parameter: str, count: int) -> list[tuple[str, int | None, int, int]]:
    """What a base calls the parts of a parameter of experts, each with the expert that it is of, and which part of how
    many below one another it is of that one's matrix; nothing where it has none.

    Args:
        there: the names of the base, as :func:`running_name` gives them.
        parameter: full name.
        count: how many experts there are.

    Returns:
        One name, and None for the expert, where all of them are in one tensor.
    """
    for candidate in _candidates(running_name(parameter)):
        if candidate in there:
            return [(candidate, None, 0, 1)]
        module, _, last = candidate.rpartition(".")
        for place in (module, module.replace(".mlp.", ".block_sparse_moe.")):  # Mixtral's on the disk
            for parts in PARTS[last]:
                names = [(f"{place}.{expert}.{part}.weight", expert, number, len(parts))
                         for expert in range(count) for number, part in enumerate(parts)]
                if all(name in there for name, *_ in names):
                    return names
    return []


def _candidates(name: str) -> Iterator[str]:
    """Names that the base may have for an adapter's tensor or layer, the likeliest first."""
    yield name
    # The text part of a multimodal model was adapted by itself, or the other way round.
    if name.startswith("model.language_model."):
        yield name.replace("model.language_model.", "model.", 1)
    elif name.startswith("model."):
        yield name.replace("model.", "model.language_model.", 1)
        yield name.replace("model.", "backbone.", 1)  # Nemotron-H on the disk
    # Some repositories, as GPT-2's, leave out the name that all layers have in common.
    yield re.sub(r"^(transformer|model)\.", "", name)
