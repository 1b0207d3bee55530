"""A checkpoint's or an adapter's tokenizer, with its chat template."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.checkpoint import VOCABULARY, generation_settings, read_config, vocabulary_of
from gemma_tune.base.errors import UserError
from gemma_tune.base.loading import loading
from gemma_tune.base.machine import keeping_garbage
from gemma_tune.base.refusals import require_readable
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import near, nearest
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.new_tokens import name_tokens
from gemma_tune.encoding.templates import NAMED, shown

_TEMPLATES = (f"gemma-tune prepare --chat-template takes {', '.join(NAMED)}, or a file with a Jinja template, such as "
              "a chat_template.jinja")

_OF_GO = re.compile(r"\{\{-?\s*(?:(?:if|range|with|else|end|define|template)\b|[.$][A-Za-z])")


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


def load_format(checkpoint: Path, model_type: str, thinking: str = "auto", template: Path | None = None,
                new_tokens: Sequence[str] = ()) -> ChatFormat:
    """The tokenizer of a checkpoint or adapter directory with its chat template.

    Args:
        thinking: ``on`` and ``off`` are written into the template, ``auto`` leaves it as it is: an adapter's holds
            what it was trained with.
        template: a Jinja file in the place of the checkpoint's own template.
        new_tokens: names for unused entries of a base model's vocabulary, see :mod:`gemma_tune.encoding.new_tokens`; an
            adapter's tokenizer has them.

    Raises:
        UserError: no tokenizer there, a file that cannot be read, no chat template for it, one that cannot switch
            thinking on, or new tokens that cannot be named.
    """
    named = () if template is None else (read_template(template), shown(template))
    (tokenizer, new), stop_ids = named_tokenizer(checkpoint, new_tokens, *named[:1]), _stop_ids(checkpoint)
    chat = ChatFormat(tokenizer, model_type, stop_ids, thinking, *named)
    chat.new_tokens = new
    if (checkpoint / "config.json").exists():  # an adapter has none
        chat.eye = eye_of(checkpoint, tokenizer)
    return chat


def named_tokenizer(checkpoint: Path, new_tokens: Sequence[str], template: str = "",
                    ) -> tuple[Any, dict[int, list[int]]]:
    """A tokenizer with names for unused entries, and what :func:`gemma_tune.encoding.new_tokens.name_tokens` tells.

    Raises:
        UserError: as there, and as of :func:`load_tokenizer`.
    """
    tokenizer = load_tokenizer(checkpoint)
    if not new_tokens:
        return tokenizer, {}
    entries = vocabulary_of(read_config(checkpoint)) or len(tokenizer)
    return tokenizer, name_tokens(tokenizer, new_tokens, entries, template)


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
        raise UserError(f"the chat template {path} cannot be read: {why}{_meant(path)}", _TEMPLATES) from e
    if "{" not in text:
        raise UserError(f"{path} is no chat template: there is no Jinja in it", _TEMPLATES)
    if "{%" not in text and _OF_GO.search(text):
        raise UserError(f"{path} is no Jinja, but a template of Go's, as Ollama has them", _TEMPLATES)
    with contextlib.suppress(ValueError, RecursionError):
        inside = "chat_template" in json.loads(text)
        name = shell.quote(str(path))
        raise UserError(f"{path} is JSON, and no chat template" + (", though it holds one" if inside else ""),
                        "save that by itself: " + shell.of_posix(f"jq -r .chat_template {name} > chat_template.jinja")
                        if inside else _TEMPLATES)
    return text


def _meant(path: Path) -> str:
    """The end of a message about a template that cannot be read: a name of ours, or a file beside it or in it."""
    if path.is_dir():
        inside = sorted(path.glob("*.jinja"))
        return f"; did you mean {inside[0]}?" if inside else ""
    beside = {file.name: str(file) for file in path.parent.glob("*.jinja")}
    return near(path.name.lower(), NAMED) or "".join(f"; did you mean {beside[name]}?"
                                                     for name in nearest(path.name, beside))


@loading("the tokenizer")
def load_tokenizer(checkpoint: Path) -> Any:
    """The tokenizer of a checkpoint or adapter directory.

    Raises:
        UserError: there is none that can be loaded.
    """
    require_readable(checkpoint)
    # Without any, transformers makes one of its own for some families, which knows no words.
    if checkpoint.is_dir() and not any(fnmatchcase(path.name.lower(), pattern) for path in checkpoint.iterdir()
                                       for pattern in VOCABULARY):
        raise UserError(f"{checkpoint} has no tokenizer: neither tokenizer.json nor another file of a vocabulary",
                        "copy the tokenizer files of the base model into it")
    with keeping_garbage():
        from transformers import AutoTokenizer

        quiet_libraries()
    try:
        with keeping_garbage():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # noqa: BLE001 - the tokenizers library raises nothing more particular for a damaged file
        raise UserError(f"{checkpoint} has no tokenizer that can be loaded: {_broken(checkpoint) or e}",
                        "copy the tokenizer files of the base model into it") from e
    # Where its files lie on this machine would be saved with it.
    for name, value in [*tokenizer.init_kwargs.items()]:
        if name.endswith("_file") and isinstance(value, str):
            del tokenizer.init_kwargs[name]
    return tokenizer


def _broken(checkpoint: Path) -> str:
    """Which file of a tokenizer is no JSON object, and why; empty where each is one."""
    for path in sorted({*checkpoint.glob("*token*.json"), *checkpoint.glob("vocab.json")}):
        try:
            object_in(path)
        except (OSError, ValueError) as e:
            return f"{path.name}: {e}"
    return ""


def _stop_ids(checkpoint: Path) -> list[int]:
    """``eos_token_id`` of a checkpoint's generation settings, where it has any."""
    try:
        ids = generation_settings(checkpoint).get("eos_token_id")
    except UserError:  # the template and the tokenizer say what ends a turn as well
        return []
    return [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
