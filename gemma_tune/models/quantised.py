"""Checkpoints whose weights have fewer than 16 bits: what can be done with them, and which 16-bit model they are of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gemma_tune.base.errors import UserError
from gemma_tune.models.licence import card_header

if TYPE_CHECKING:
    from gemma_tune.base.tensors import StoredTensor
    from gemma_tune.models.source import BaseModel

BITSANDBYTES = "bitsandbytes"  # the one method whose layers LoRA is trained on here
_PACKED = "mxfp4"
_BITSANDBYTES_NAME = re.compile(r"(-unsloth)?-bnb-[48]bit$", re.IGNORECASE)  # as repositories of such models end
_UNSLOTH = "unsloth/"  # has each of them in 16 bits too, under the name without that ending


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method by which a checkpoint was quantised, by its config.json, such as ``gptq``; None if it was not, as for
    GPT-OSS, of which the experts alone are packed (:func:`has_packed_experts`).

    Of a multimodal model the text model's own counts as well: Transformers takes it, and imports what it names.
    """
    found = _settings(config)
    if has_packed_experts(config):
        return None
    if not found:
        return "mlx" if config.get("quantization") else None
    if not isinstance(found, Mapping):
        return str(found)
    return str(found.get("quant_method") or ("mlx" if "group_size" in found else BITSANDBYTES))


def has_packed_experts(config: Mapping[str, Any]) -> bool:
    """Whether experts are in MXFP4, as in the released GPT-OSS, and all else in 16 bits. They are unpacked without loss
    where the model computes; a merged checkpoint has them as they are."""
    found = _settings(config)
    return isinstance(found, Mapping) and found.get("quant_method") == _PACKED


def parameter_count(tensors: Iterable[StoredTensor]) -> int:
    """How many numbers tensors are in memory, where packed experts are unpacked: each byte of their blocks has two."""
    from gemma_tune.gguf.experts import PACKED

    return sum(math.prod(tensor.shape) * (2 if tensor.dtype == "U8" and tensor.name.endswith(PACKED[0]) else 1)
               for tensor in tensors)


def in_four_bits(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's linear layers are those of ``--qlora`` already."""
    return quantisation(config) == BITSANDBYTES and not _settings(config).get("load_in_8bit")


def _settings(config: Mapping[str, Any]) -> Any:
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def sixteen_bit(model: BaseModel) -> str | None:
    """The 16-bit model that a quantised one was made from, by its name or its model card; None where neither tells."""
    named = card_header(model.path).get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    named = model.id if model.id.startswith(_UNSLOTH) or not isinstance(named, str) or "/" not in named else named
    original = _BITSANDBYTES_NAME.sub("", named)
    return original if original != model.id else None


def refuse_untrainable(name: str, config: Mapping[str, Any], original: str | None = None) -> None:
    """Refuse what LoRA is not trained on here.

    Args:
        name: of the model, for people.
        original: the 16-bit model that it was made from, if that is known.

    Raises:
        UserError: quantised by another method than bitsandbytes.
    """
    method = quantisation(config)
    if method and method != BITSANDBYTES:
        raise UserError(f"{name} is quantised ({method}), and gemma-tune trains on 16-bit weights or on those of "
                        "bitsandbytes", f"take the 16-bit model that it was made from: --model {original or 'ID'}; "
                                        "`train --qlora` then keeps it in 4 bits")
