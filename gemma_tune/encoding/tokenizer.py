"""A checkpoint's or an adapter's tokenizer, with its chat template."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from gemma_tune.base.checkpoint import generation_settings
from gemma_tune.base.errors import UserError
from gemma_tune.base.loading import loading
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.words import near
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.templates import NAMED

_TEMPLATES = (f"gemma-tune prepare --chat-template takes {', '.join(NAMED)}, or a file with a Jinja template, such as "
              "a chat_template.jinja")


def quiet_libraries() -> None:
    """Keep the libraries' own bars and start-up remarks away from people; errors still arrive as exceptions."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("bitsandbytes", "transformers", "trl", "peft", "accelerate", "torch", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    # Deprecations inside the libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|trl|accelerate)\b")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def load_format(checkpoint: Path, model_type: str, thinking: str = "auto", template: Path | None = None) -> ChatFormat:
    """The tokenizer of a checkpoint or adapter directory with its chat template.

    Args:
        thinking: ``on`` and ``off`` are written into the template, ``auto`` leaves it as it is: an adapter's holds
            what it was trained with.
        template: a Jinja file in the place of the checkpoint's own template.

    Raises:
        UserError: no tokenizer there, a file that cannot be read, no chat template for it, or one that cannot switch
            thinking on.
    """
    own = None if template is None else read_template(template)
    return ChatFormat(load_tokenizer(checkpoint), model_type, _stop_ids(checkpoint), thinking, own)


def read_template(path: Path) -> str:
    """The text of a file with a chat template.

    Raises:
        UserError: it cannot be read, or is no template.
    """
    require_readable(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or "it is no text"
        meant = near(path.name.lower(), NAMED)
        raise UserError(f"the chat template {path} cannot be read: {why}{meant}", _TEMPLATES) from e
    if "{" not in text:
        raise UserError(f"{path} is no chat template: there is no Jinja in it", _TEMPLATES)
    return text


@loading("the tokenizer")
def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint or adapter directory.

    Raises:
        UserError: there is none that can be loaded.
    """
    require_readable(checkpoint)
    with keeping_garbage():
        from transformers import AutoTokenizer

        quiet_libraries()
    try:
        with keeping_garbage():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001 - the tokenizers library raises nothing more particular for a damaged file
        raise UserError(f"{checkpoint} has no tokenizer that can be loaded: {e}",
                        "copy the tokenizer files of the base model into it") from e
    # Where its files lie on this machine would be saved with it.
    for name, value in [*tokenizer.init_kwargs.items()]:
        if name.endswith("_file") and isinstance(value, str):
            del tokenizer.init_kwargs[name]
    return tokenizer


def _stop_ids(checkpoint: Path) -> list[int]:
    """``eos_token_id`` of a checkpoint's generation settings, where it has any."""
    try:
        ids = generation_settings(checkpoint).get("eos_token_id")
    except UserError:  # the template and the tokenizer say what ends a turn as well
        return []
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
