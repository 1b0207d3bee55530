"""A checkpoint becomes a model: the only ``from_pretrained`` of weights that compute."""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gemma_tune.base.checkpoint import read_config, unfit_keys
from gemma_tune.base.errors import UserError
from gemma_tune.base.loading import loading
from gemma_tune.base.machine import is_out_of_memory, keeping_garbage, no_memory
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.words import first_line
from gemma_tune.encoding.tokenizer import quiet_libraries
from gemma_tune.lora.config import refuse_embedded_adapter
from gemma_tune.lora.layers import TOWERS
from gemma_tune.lora.whole import NEVER_PACKED
from gemma_tune.models.placement import Placement
from gemma_tune.models.quantised import has_packed_experts, in_four_bits, quantisation, refuse_untrainable
from gemma_tune.models.towers import auto_class, without_text, without_towers
from gemma_tune.models.whole import remedy

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SHOWN = 20  # problems
Sight = Literal["none", "features", "towers"]


def needs_eager_attention(model_type: str) -> bool:
    """Gemma 2 caps its attention logits, which SDPA cannot do; what GPT-OSS and others do beside it, neither."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type, ""), None)
    return model_type == "gemma2" or not getattr(family, "_supports_sdpa", True)


def attention_of(model_type: str, towers: bool) -> str | dict[str, str]:
    """What computes the attention of the text model; towers have theirs, Gemma 4's ear one without SDPA."""
    kind = "eager" if needs_eager_attention(model_type) else "sdpa"
    return {"text_config": kind} if towers else kind


# How a package is named by the errors of transformers, and by Python's.
_PACKAGES = tuple(map(re.compile, (r"pip install (?:-U |--upgrade )?['\"]?([\w-]+)", r"requires the (\S+) library",
                                   r"No module named '(\w+)")))


def missing_package(error: ImportError, *, four_bit: bool = False) -> str:
    """How to install what a model needs.

    Args:
        four_bit: the weights were to be quantised for it, by --qlora.
    """
    found = (pattern.search(str(error)) for pattern in _PACKAGES)
    package = next((match[1] for match in found if match), "bitsandbytes" if four_bit else None)
    if package == "bitsandbytes":
        without = " without --qlora" if four_bit else ""
        return f"pip install bitsandbytes (Linux and Windows), or take the 16-bit model{without}"
    return f"pip install {package}" if package else "install what it names, or repair it: gemma-tune doctor looks at it"


def with_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which says where its layers are: Llama 4's text model calls itself its decoder."""
    inner = getattr(model, "model", None)
    if model.get_decoder() is model and hasattr(inner, "layers"):
        model.get_decoder = types.MethodType(lambda self: self.model, model)  # unlike a function, of a copy its own
    return model


@loading("the weights")
def load_model(checkpoint: Path, placement: Placement, *, four_bit: bool = False, shards: int = 1,
               sight: Sight = "none") -> PreTrainedModel:
    """Load a checkpoint for computing; every weight must be there and none may be left over.

    Args:
        shards: processes that read and hold a part each (FSDP2); all of them have to call this.
        sight: ``features`` for a model that takes what was seen in pictures, ``towers`` for one that looks at them.

    Raises:
        UserError: missing or unexpected tensors, an unknown architecture, unreadable files, weights that are quantised
            by another method than bitsandbytes, an adapter in the same folder.
    """
    require_readable(checkpoint)
    config = read_config(checkpoint)
    refuse_untrainable(str(checkpoint), config)
    refuse_embedded_adapter(checkpoint)
    quiet_libraries()
    with keeping_garbage():
        from transformers import AutoConfig

        from gemma_tune.models.cutoffs import with_cutoffs
        from gemma_tune.models.narrow import keep_narrow, loading_narrow
    extra = _where_and_how(config, placement, four_bit, shards)
    attention = attention_of(config.get("model_type", ""), towers=isinstance(config.get("text_config"), dict))
    try:
        whole = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        with without_towers(whole, sees=sight == "towers"), loading_narrow(placement.stored):
            model, info = auto_class(whole.model_type, sees=sight != "none").from_pretrained(
                checkpoint, dtype=placement.dtype, attn_implementation=attention, local_files_only=True,
                trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told below, by their names and shapes
                **extra)
        if not four_bit and shards == 1:
            model = model.to(placement.device)
        _settle(model, config, placement)
        if placement.stored:
            keep_narrow(model, placement.stored)
        with_cutoffs(with_decoder(model))
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_row_after_row)
    except ImportError as e:
        raise UserError(f"this needs a package that is not installed: {first_line(e)}",
                        missing_package(e, four_bit=four_bit)) from e
    except Exception as e:  # noqa: BLE001 - in as many ways as configuration and weights can miss each other
        if is_out_of_memory(e):
            packed = four_bit or quantisation(config) or has_packed_experts(config) or placement.device == "mps"
            smaller = "" if packed else "; train --qlora keeps it in 4 bits"
            raise no_memory(e, f"close other programs, or take a smaller model{smaller}") from e
        raise UserError(f"{checkpoint} cannot be loaded: {first_line(e)}",
                        remedy(checkpoint) or "check that the checkpoint is whole; download it again if not") from e
    _refuse_unfit(checkpoint, info)
    return model


@loading("what the model sees with")
def load_towers(checkpoint: Path, placement: Placement) -> PreTrainedModel:
    """What a checkpoint looks at pictures with, for ``answers.sight.see``: alone, but for one that is in 4 bits.

    Raises:
        UserError: missing tensors, unreadable files.
    """
    require_readable(checkpoint)
    config = read_config(checkpoint)
    if in_four_bits(config):  # which of its layers are, it says by their names in the whole model
        return load_model(checkpoint, placement, sight="towers").eval()
    quiet_libraries()
    with keeping_garbage():
        from transformers import AutoConfig, AutoModel
    extra = _where_and_how(config, placement, four_bit=False, shards=1)
    try:
        whole = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
        with without_text(whole):
            model, info = AutoModel.from_pretrained(
                checkpoint, dtype=placement.dtype, attn_implementation=attention_of(whole.model_type, towers=True),
                local_files_only=True, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True,
                **extra)
        model = model.to(placement.device).eval()
    except Exception as e:  # noqa: BLE001 - as of load_model
        if is_out_of_memory(e):
            raise no_memory(e, "close other programs, or take a smaller model") from e
        raise UserError(f"what {checkpoint} sees with cannot be loaded: {first_line(e)}",
                        remedy(checkpoint) or "check that the checkpoint is whole; download it again if not") from e
    _refuse_unfit(checkpoint, info, whole=False)  # the text model is left over
    return model


def _where_and_how(config: Mapping[str, Any], placement: Placement, four_bit: bool, shards: int) -> dict[str, Any]:
    """What ``from_pretrained`` is told of the device, of four bits and of shards."""
    extra: dict[str, Any] = {}
    if has_packed_experts(config):
        from transformers import Mxfp4Config

        extra["quantization_config"] = Mxfp4Config(dequantize=True)
    if four_bit:
        from transformers import BitsAndBytesConfig

        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=placement.dtype,
            **({"llm_int8_skip_modules": ["lm_head", *NEVER_PACKED]}  # the head never is by itself
               if config.get("model_type", "").startswith("gemma3n") else {}))
    if shards > 1:
        from transformers.distributed import DistributedConfig

        extra["distributed_config"] = DistributedConfig(fsdp_size=shards)
    if placement.device == "cuda" and not four_bit and shards == 1:
        # The weights go straight to the GPU. With one device for all, nothing is hooked onto the model. The name alone
        # becomes the GPU of this process; in a mapping it would be the first one for the threads that load.
        extra["device_map"] = placement.device
    if placement.device == "cpu" and (four_bit or in_four_bits(config)):  # else they go to a GPU, if there is any
        extra["device_map"] = {"": "cpu"}
    return extra


def _refuse_unfit(checkpoint: Path, info: Mapping[str, Any], whole: bool = True) -> None:
    """Refuse weights that are missing, left over or of another shape, as ``from_pretrained`` tells them.

    Args:
        whole: all of the text model was loaded; towers may be left over.

    Raises:
        UserError: the first of them, and how many more.
    """
    unfit = [(kind, key) for kind, key in unfit_keys(info)
             if not (kind == "unexpected" and (TOWERS.search(key) or not whole))]
    if problems := [f"{kind} keys: {key}" for kind, key in unfit]:
        more = [f"… and {len(problems) - _SHOWN:,} more"] if problems[_SHOWN:] else []
        raise UserError(f"{checkpoint} does not fit its config.json", remedy(checkpoint) or "download the model again",
                        problems[:_SHOWN] + more)


def _settle(model: PreTrainedModel, config: Mapping[str, Any], placement: Placement) -> None:
    """Let 4-bit weights, where there are any, stay as they are and compute in the placement's type."""
    if in_four_bits(config):
        _compute_in(model, placement.dtype)
    # On some CPUs bitsandbytes packs 4-bit weights anew when they first answer without a gradient (AVX512): a layout
    # without a backward pass, whose return rounds the scales.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _compute_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """transformers leaves a checkpoint that is in 4 bits in the types that it was stored in, whatever is asked for."""
    import torch

    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            state.dtype = dtype
        elif parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = dtype


def _row_after_row(head: Any, states: tuple[Any, ...]) -> tuple[Any, ...]:
    """The states of the last positions, cut out of those of the whole prompt, as a tensor of their own.

    PyTorch multiplies a cut-out batch with a frozen weight (an adapter freezes the base) as a batch of matrices, and
    copies the weight for each row of the batch first: 335 MB a row for the head of Gemma 3 270M, the largest weight.
    """
    import torch

    return tuple(part.clone(memory_format=torch.contiguous_format) if _cut_out(part) else part for part in states)


def _cut_out(tensor: Any) -> bool:
    """Whether a dimension's stride skips something; unlike ``is_contiguous``, of a dimension of one as well."""
    return any(tensor.stride(n) != tensor.stride(n + 1) * tensor.shape[n + 1] for n in range(tensor.ndim - 1))


def after_product(causal_lm: Any) -> dict[str, Any]:
    """What the family does to the logits; what else a head may do is found by ``GemmaTrainer.fast``."""
    text = causal_lm.config.get_text_config()
    # Granite divides its logits, Cohere multiplies them.
    scale = (getattr(text, "logit_scale", None) or 1.0) / (getattr(text, "logits_scaling", None) or 1.0)
    cap = getattr(text, "final_logit_softcapping", None) or getattr(text, "logits_soft_cap", None)  # RecurrentGemma's
    return {"scale": scale, "softcap": cap}
