"""Projectors of the models whose pictures and sounds llama.cpp takes as they do.

A projector is made from a checkpoint's ``config.json`` and the settings of its processor. What llama.cpp would load and
then compute differently is refused here, before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import counted
from gemma_tune.gguf.projectors.parts import Maker, Projector

_TOWERS = re.compile(r"(^|\.)(vision|visual|image|audio|speech|whisper|multi_?modal|embed_(vision|audio)|mm_)")


class LeftOver(UserError):
    """Parts of what sees or hears that no configuration describes."""


def _is_text_alone(config: Mapping[str, Any]) -> bool:
    """Whether transformers knows the family, and as one of text."""
    with keeping_garbage():
        from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    return kind in CONFIG_MAPPING and not CONFIG_MAPPING[kind].sub_configs


def projector_of(checkpoint: Path) -> Projector | None:
    """What turns pictures and sounds into embeddings in the model of the folder ``checkpoint``; None where it has
    nothing to see or hear with.

    Raises:
        LeftOver: it has parts of that, and a configuration of a text model.
        UserError: it has, and that cannot be written here, or llama.cpp would compute it differently; a damaged
            checkpoint.
    """
    from gemma_tune.gguf.projectors import gemma3, gemma4, gemma4_unified, mistral3, qwen35

    makers: dict[str, Maker] = {**gemma3.MAKERS, **gemma4.MAKERS, **gemma4_unified.MAKERS,
                               **qwen35.MAKERS, **mistral3.MAKERS}
    config, towers = read_config(checkpoint), [name for name in open_tensors(checkpoint) if _TOWERS.search(name)]
    if not towers:
        return None
    maker = makers.get(config.get("model_type", ""))
    if maker is None and _is_text_alone(config):
        stay = f"{'stays' if len(towers) == 1 else 'stay'} in {checkpoint}"
        raise LeftOver(f"{counted(len(towers), 'tensor')} of what sees or hears, such as {towers[0]}, {stay}, whose "
                       "config.json describes a model of text alone.")
    if maker is None:
        found = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "the model"
        raise UserError(f"What {found} in {checkpoint} sees or hears with cannot be written as GGUF here.",
                        "llama.cpp's converter may: convert_hf_to_gguf.py CHECKPOINT --mmproj")
    try:
        return maker(config, checkpoint)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # sizes of another kind than numbers
        raise UserError(f"{checkpoint} describes nothing that sees or hears: {error}.",
                        "Copy config.json and the processor's settings again from the base model.") from error
