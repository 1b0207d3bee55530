"""adapter_config.json of a PEFT adapter: read, checked, and what of it PEFT gets to see.

PEFT takes whatever stands in that file for its own settings, some of which name modules that it imports
(``megatron_core``, with ``megatron_config``) or classes (``auto_mapping``). An adapter is data: PEFT is given the
settings that say what a LoRA adapter computes (``COMPUTES``), and no others.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.checkpoint import ADAPTER_CONFIG as CONFIG
from gemma_tune.base.checkpoint import ADAPTER_WEIGHTS as WEIGHTS  # noqa: F401 - of the same files, for who reads both
from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import unreadable
from gemma_tune.base.special import refuse_special
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import shown
from gemma_tune.lora.experts import PARAMETERS
from gemma_tune.lora.patterns import ending

_MLX = "adapters.safetensors"  # what mlx-lm calls its adapters, beside an adapter_config.json of its own
# Settings of PEFT's LoRA that change what an adapter computes in a way that is not merged here.
_OTHER_KINDS = ("lora_bias", "layer_replication", "alora_invocation_tokens", "arrow_config",
                "kasa_config", "monteclora_config", "use_bdlora", "use_qalora")
# Starting values that PEFT also subtracts from the base weights, each time it loads the adapter.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
_LARGEST = 3.4e38  # of fp32, in which is merged


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


def _list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(map(kind, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _names(value: Any) -> bool:
    return _list_of(value, _text)


def _pattern_or_names(value: Any) -> bool:
    return _text(value) or _names(value)


# PEFT's, of what says how much an adapter changes; of all else it is nothing, or no.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}
# What PEFT is given, besides that this is LoRA of a causal language model: whether a value can be used, and what is
# wrong with it.
COMPUTES = {
    "r": (lambda v: _whole(v) and v > 0, "is no rank"), "lora_alpha": (_number, "is no number that fp32 holds"),
    "lora_dropout": (lambda v: _number(v) and 0 <= v <= 1, "is no share"),
    "use_rslora": (_flag, "is neither true nor false"), "use_dora": (_flag, "is neither true nor false"),
    "fan_in_fan_out": (_flag, "is neither true nor false"), "ensure_weight_tying": (_flag, "is neither true nor false"),
    "target_modules": (_pattern_or_names, "is neither a list of names nor a pattern"),
    "exclude_modules": (_pattern_or_names, "is neither a list of names nor a pattern"),
    "target_parameters": (_names, "is no list of names"), "modules_to_save": (_names, "is no list of names"),
    "layers_to_transform": (lambda v: _whole(v) or _list_of(v, _whole), "is no list of numbers"),
    "layers_pattern": (_pattern_or_names, "is no list of names"),
    "rank_pattern": (lambda v: _numbers_by_name(v, _whole), "does not give numbers to names of layers"),
    "alpha_pattern": (lambda v: _numbers_by_name(v, _number), "does not give numbers to names of layers"),
}
# What is put on a model here, see ``lora.token_rows``, and not by PEFT.
_OURS = {"trainable_token_indices": (lambda v: _ids(v), "are no numbers of tokens, each once")}
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _ids(value: Any) -> bool:
    """Numbers of tokens, each once; by module, or of the embedding alone."""
    some = [*value.values()] if isinstance(value, dict) else [value]
    return all(_list_of(ids, _whole) and ids and len({*ids}) == len(ids) for ids in some)


def _numbers_by_name(value: Any, kind: Any) -> bool:
    return isinstance(value, dict) and all(map(kind, value.values()))


def how_to_renew(folder: Path) -> str:
    """What to do about a damaged adapter: one in a run is trained again, one from elsewhere only fetched again."""
    again = "copy the adapter here again"
    if not (folder.parent / "manifest.json").is_file():
        return again
    return f"train again: gemma-tune train --run {shell.quote(str(folder.parent))} --force; or {again}"


def require_folder(folder: Path) -> None:
    """An adapter is named by its directory.

    Raises:
        UserError: there is none; a file of one has it in the hint.
    """
    if folder.is_file() and (folder.parent / CONFIG).is_file():
        raise UserError(f"there is no directory {folder}: it is a file of an adapter",
                        f"name the adapter: {shell.quote(str(folder.parent))}")
    if not folder.is_dir():
        raise UserError(f"there is no directory {folder}", "name a PEFT adapter's directory with --adapter; one of the "
                                                           "Hub is downloaded first: hf download NAME --local-dir DIR")


def read_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder.

    Raises:
        UserError: missing or damaged.
    """
    path = folder / CONFIG
    require_folder(folder)
    refuse_special(folder)
    try:
        config = object_in(path)
    except (FileNotFoundError, NotADirectoryError) as e:
        inside = sorted(folder.glob(f"*_lora_adapter/{CONFIG}"))  # of a run
        raise UserError(f"{folder} is not a PEFT adapter: it has no {CONFIG}",
                        f"name the adapter in it: {shell.quote(str(inside[0].parent))}" if inside else
                        f"name a directory that has {CONFIG} and {WEIGHTS}") from e
    except PermissionError as e:
        raise unreadable(path) from e
    except (OSError, ValueError) as e:
        raise UserError(f"the adapter {folder} cannot be read: {CONFIG}: {e}", how_to_renew(folder)) from e
    _refuse_mlx(folder, config)
    return config


def usable_config(folder: Path) -> dict[str, Any]:
    """The same, of an adapter whose settings mean something here; what is missing or null has PEFT's default.

    Raises:
        UserError: missing, damaged, another kind of adapter, or values that cannot be used; all of them are listed.
    """
    config = _DEFAULTS | {name: value for name, value in read_config(folder).items() if value is not None}
    _refuse_other_kinds(folder, config)
    if problems := list(_unusable(config)):
        raise UserError(f"{folder} cannot be read: {CONFIG} has values that make no sense", how_to_renew(folder),
                        problems)
    return config


def for_peft(config: Mapping[str, Any]) -> dict[str, Any]:
    """What PEFT's ``LoraConfig`` is made of: nothing that it would import, and nothing that only trains."""
    return {name: config[name] for name in COMPUTES if name in config} | {"task_type": "CAUSAL_LM"}


def refuse_embedded_adapter(checkpoint: Path) -> None:
    """Refuse a model with an adapter in its own folder: Transformers would add that, with all that PEFT makes of it.

    Raises:
        UserError: there is one.
    """
    if (checkpoint / CONFIG).exists():
        raise UserError(f"{checkpoint} holds a model and an adapter ({CONFIG}), which would be added to it unasked",
                        f"move {CONFIG} and its weights to a directory of their own; to train on both, merge them "
                        "first: gemma-tune merge --adapter DIR")


def _unusable(config: Mapping[str, Any]) -> Iterator[str]:
    """Settings that are used and whose values cannot be."""
    for name, (fits, fault) in {**COMPUTES, **_OURS}.items():
        if name in config and not fits(config[name]):
            yield f"{name}: {shown(config[name])} {fault}"
    for name in _PATTERNS:
        patterns = config.get(name)
        for pattern in patterns if isinstance(patterns, dict) else ():
            if problem := _no_pattern(ending(pattern)):
                yield f"{name}: {shown(pattern)} is no pattern: {problem}"
    for name in ("target_modules", "exclude_modules"):
        if isinstance(config.get(name), str) and (problem := _no_pattern(config[name])):
            yield f"{name}: {shown(config[name])} is no pattern: {problem}"


def _no_pattern(text: str) -> str | None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as e:
        return str(e)
    return None


def _refuse_mlx(folder: Path, config: Mapping[str, Any]) -> None:
    """Adapters of mlx-lm lie in a file of the same name, with other settings and other tensors.

    Raises:
        UserError: it is one.
    """
    of_mlx = {"fine_tune_type", "lora_parameters"} & config.keys() or (folder / _MLX).exists()
    if config.get("peft_type") or not of_mlx:
        return
    trained_on = config["model"] if isinstance(config.get("model"), str) else "MODEL"
    fuse = shell.join(["mlx_lm.fuse", "--model", trained_on, "--adapter-path", str(folder), "--save-path", "FUSED"])
    raise UserError(f"{folder} is an adapter of mlx-lm ({_MLX}), and merge takes those of PEFT ({WEIGHTS})",
                    f"make a whole model of it with mlx-lm: {fuse} (--dequantize if that model is quantised); "
                    "llama.cpp's convert_hf_to_gguf.py turns FUSED into a GGUF for Ollama, and `gemma-tune prepare "
                    "--model FUSED` trains on from there")


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    expected = {"peft_type": "LORA", "bias": "none"} | dict.fromkeys(_OTHER_KINDS)
    other = [f"{k}: {shown(config[k])}" for k, v in expected.items() if config.get(k) and config[k] != v]
    parameters = config.get("target_parameters")
    other += [f"target_parameters: {shown(name)} is none of experts that are kept as {' and '.join(PARAMETERS)}"
              for name in (parameters if isinstance(parameters, list) else ()) if _text(name)
              and name.rsplit(".", 1)[-1] not in PARAMETERS]
    if other:
        raise UserError(f"{folder} is a kind of adapter that gemma-tune does not merge",
                        "merge it with PEFT's merge_and_unload", other)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise UserError(f"{folder} was started in a way that changes the base weights as well "
                        f"(init_lora_weights: {shown(start)})",
                        "convert it with PEFT first: save_pretrained(…, path_initial_model_for_weight_conversion=…)")
