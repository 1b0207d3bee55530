"""Whether the installed transformers runs a checkpoint's model: known from its config.json, before any weight is
read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.encoding.tokenizer import quiet_libraries
from gemma_tune.models.load import missing_package
from gemma_tune.models.towers import auto_class

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LONGEST = 300  # characters of what transformers says
_OTHERS = "use a model of another family, such as Gemma, Llama or Qwen"


def known_config(checkpoint: Path) -> PretrainedConfig:
    """config.json as transformers reads it.

    Raises:
        UserError: a family that it does not know, or has no causal language model of; values that do not go together.
    """
    with keeping_garbage():
        from transformers import CONFIG_MAPPING, AutoConfig, __version__

    quiet_libraries()
    path, said = checkpoint / "config.json", read_config(checkpoint)
    family = said.get("model_type")
    if family not in CONFIG_MAPPING:
        own = "; it needs code of its own (auto_map), which is not run" if said.get("auto_map") else ""
        raise UserError(f"{path}: transformers {__version__} does not know models of the family {family}{own}",
                        f"if it is a new one: pip install --upgrade transformers; else {_OTHERS}")
    try:
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except ImportError as e:
        raise needs_package(path, e) from e
    except Exception as e:  # noqa: BLE001 - in as many ways as its values can miss each other
        raise no_model(path, e) from e
    if type(config) not in auto_class(config.model_type)._model_mapping:
        raise UserError(f"{path}: transformers has no causal language model of the family {family}, so it cannot be "
                        "trained here", _OTHERS)
    return config


def needs_package(path: Path, error: ImportError) -> UserError:
    """The error for a configuration whose model needs what is not installed."""
    return UserError(f"{path} describes a model that needs a package: {_said(error)}", missing_package(error))


def no_model(path: Path, error: Exception) -> UserError:
    """The error for a configuration that no model can be made of."""
    return UserError(f"{path} describes no model that can be trained: {_said(error)}",
                     "use a causal language model that the installed transformers knows, or: pip install --upgrade "
                     "transformers")


def other_task(config: PretrainedConfig) -> str | None:
    """The class that a checkpoint's model was saved as, where that writes no text, as for embeddings; else None."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    saved = getattr(config, "architectures", None) or []
    writes = any(name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or name.endswith("ForConditionalGeneration")
                 or "CausalLM" in name for name in saved)
    return None if writes or not saved else saved[0]


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:_LONGEST]
