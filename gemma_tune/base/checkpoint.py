"""What lies beside the weights of a Hugging Face checkpoint: config.json and the settings of generation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.refusals import unreadable


def read_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint directory.

    Raises:
        UserError: it is missing, or is no JSON object.
    """
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} can't be read: {checkpoint} is not a Hugging Face checkpoint: it has no config.json",
                        "name a directory that has config.json, *.safetensors and tokenizer files") from e
    except PermissionError as e:
        raise unreadable(path) from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path} can't be read: {e}", "download the model again") from e
    if not isinstance(config, dict):
        raise UserError(f"{path} describes no model", "download the model again")
    return config


def context_length(config: Mapping[str, Any]) -> int:
    """Tokens that a model's context holds, by its config.json; of a multimodal one the text model's; 0 if unsaid."""
    text = config.get("text_config") or config
    return text.get("max_position_embeddings") or text.get("n_positions") or 0


def generation_settings(checkpoint: Path) -> dict[str, Any]:
    """generation_config.json of a checkpoint directory; empty where there is none.

    Raises:
        UserError: it cannot be read, or is no JSON object.
    """
    path = checkpoint / "generation_config.json"
    try:
        own = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as e:
        raise UserError(f"{path} is not valid JSON: {e}", "copy it again from the base model") from e
    if not isinstance(own, dict):
        raise UserError(f"{path} holds no settings", "copy it again from the base model")
    return own


def unfit_keys(info: Mapping[str, Any]) -> list[tuple[str, str]]:
    """``missing``, ``unexpected`` or ``mismatched``, and the tensor, from what Transformers says of its loading."""
    return [(kind, key) for kind in ("missing", "unexpected", "mismatched")
            for key in sorted(map(str, info[f"{kind}_keys"]))]
