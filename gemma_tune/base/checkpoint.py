"""What lies beside the weights of a Hugging Face checkpoint: config.json and the settings of generation; an adapter's
files by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import unreadable
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import shown

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's
# Lower-case patterns for the files that a tokenizer cannot be without: it has one of them at least.
VOCABULARY = ("tokenizer.json", "tokenizer.model*", "*.model", "vocab*", "*.tiktoken", "tekken.json")
_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim", "vocab_size",
           "max_position_embeddings", "n_positions")
_BY_LAYER = ("intermediate_size",)  # which can be a list of one for each layer: Gemma 3n
_NAMED = 3  # models that a hint names
_LARGEST = 1 << 40  # no model has as many of anything; PyTorch counts in 64 bits

MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_experts", "num_local_experts",
           "encoder_layers", "decoder_layers")


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory.

    Raises:
        UserError: it is missing, is no JSON object, has values that describe nothing, or names layers without end.
    """
    path = checkpoint / "config.json"
    try:
        config = object_in(path)
    except FileNotFoundError as e:
        raise UserError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json",
                        what_else(checkpoint)) from e
    except PermissionError as e:
        raise unreadable(path) from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} can't be read: {e}", "download the model again") from e
    if problems := list(_unusable(config)):
        raise UserError(f"{path} describes no model", "download the model again", problems)
    if problems := list(_endless(config)):
        raise UserError(f"{path} describes no model that there can be", "download the model again", problems)
    return config


def _unusable(config: Mapping[str, Any]) -> Iterator[str]:
    """Values that are used here and cannot be."""
    for name, value in config.items():
        if name.endswith("_config") and value is not None and not isinstance(value, dict):
            yield f"{name}: {shown(value)} is no object"
    for part, values in (("", config), ("text_config.", config.get("text_config") or {})):
        for name in _COUNTS if isinstance(values, dict) else ():
            value = values.get(name)
            counts = value if isinstance(value, list) and name in _BY_LAYER else [value]
            if value is not None and not all(map(_is_count, counts)):
                yield f"{part}{name}: {shown(value)} is no count"


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _endless(config: Mapping[str, Any], within: str = "") -> Iterator[str]:
    """Numbers of layers, which are made one by one before anybody looks at the weights, that no model has."""
    for name, value in config.items():
        if isinstance(value, dict) and not within:
            yield from _endless(value, f"{name}.")
        elif name in _LAYERS and isinstance(value, (int, float)) and value > MOST_LAYERS:
            yield f"{within}{name} is {value:,}"


def what_else(folder: Path) -> str:
    """What to do with a directory that is taken for a checkpoint."""
    name = shell.quote(str(folder))
    if (folder / ADAPTER_CONFIG).is_file():
        return (f"it is an adapter: `gemma-tune merge --adapter {name}` makes a whole model of it and its base; to "
                f"train it further: `gemma-tune train DATA --model {_base_of(folder)} --from-adapter {name}`")
    if (folder / "manifest.json").is_file():
        return f"it is a run: `gemma-tune status --run {name}` shows how it goes on, and where its models are"
    # Of a folder in Hugging Face's cache, the model is in snapshots/.
    inside = [*sorted(folder.glob("*/config.json")), *sorted(folder.glob("snapshots/*/config.json"))]
    if inside:
        names = [shell.quote(str(path.parent)) for path in inside[:_NAMED]]
        return f"name the model in it: --model {' or '.join(names)}{' or another' if inside[_NAMED:] else ''}"
    return "name a directory that has config.json, *.safetensors and tokenizer files"


def _base_of(adapter: Path) -> str:
    """What an adapter's configuration calls its base, as one types it; BASE where it does not say."""
    try:
        base = object_in(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    except (OSError, ValueError):
        base = None
    return shell.quote(base) if base and isinstance(base, str) else "BASE"


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens that a model's context holds, by its config.json; of a multimodal one the text model's; 0 if unsaid."""
    text = config.get("text_config") or config
    return text.get("max_position_embeddings") or text.get("n_positions") or 0


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Entries of a model's vocabulary, by its config.json; of a multimodal one the text model's; None if unsaid."""
    return (config.get("text_config") or config).get("vocab_size")


def generation_settings(checkpoint: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint directory; empty where there is none.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    path = checkpoint / "generation_config.json"
    try:
        return object_in(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} holds no settings that can be read: {e}", "copy it again from the base model") from e


def unfit_keys(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``missing``, ``unexpected`` or ``mismatched``, and the tensor, from what Transformers says of its loading."""
    return [(kind, key) for kind in ("missing", "unexpected", "mismatched")
            for key in sorted(map(_key, info[f"{kind}_keys"]))]


def _key(entry: str | tuple[str, Any, Any]) -> str:
    """A tensor's name; of one that does not fit, with both shapes."""
    if isinstance(entry, str):
        return entry
    name, stored, wanted = entry
    return f"{name} has shape {tuple(stored)}, config.json asks for {tuple(wanted)}"
