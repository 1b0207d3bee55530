"""The merged model goes to the Hugging Face Hub, with its card."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune import __version__
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.hub import push as hub
from gemma_tune.hub.push import Parcel, names_in

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

_MAKE = "gemma-tune merge"
# What loading a model reads, in lower case. Left in a repository by an earlier push, such a file would be read beside
# this model's, or instead of them: a model.safetensors wins over an index and its shards.
_LOADED = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*", "tokenizer*", "*_tokens*.json", "vocab*",
           "merges.txt", "chat_template*", "generation_config.json", "*processor_config.json")


def check_push(repo_id: str, *, private: bool = False) -> None:
    """Whether :func:`push_folder` could push to ``repo_id``, see :func:`hub.push.check_push`."""
    hub.check_push(repo_id, _MAKE, _unfit, private=private)


def push_folder(folder: Path, repo_id: str, listener: Listener, *, private: bool = True) -> str:
    """Upload a model's files, see :func:`hub.push.push`; those of an earlier model, which loading would read as well,
    leave the repository.

    Args:
        folder: the merged model; hidden files, links and ``manifest.json`` in it are left out.

    Raises:
        HubError: refused, or broken off; the same call continues where it stopped.
        UserError: the folder holds no model.
    """
    from gemma_tune.merge.card import card_in_repository

    files = _files(folder)
    # It may have been written before anybody thought of a push, or for another repository.
    card = files["README.md"].read_text(encoding="utf-8") if "README.md" in files else None
    return hub.push(Parcel(
        _MAKE, f"Model merged by gemma-tune {__version__}", files, _unfit,
        lambda info: [name for name in names_in(info) if _is_loaded(name)],
        None if card is None else lambda info: card_in_repository(card, info.id)), repo_id, listener, private=private)


def _unfit(info: ModelInfo) -> str | None:
    names = names_in(info)
    if "adapter_config.json" in names:
        return "holds an adapter, which loading would add to the merged model once more"
    if "params" in names and any(name.endswith(".gguf") for name in names):  # of `export-ollama --push`
        return "holds GGUF files with what Ollama is told of them, whose model card the merged one's would replace"
    return None


def _is_loaded(name: str) -> bool:
    return name.startswith("additional_chat_templates/") or (
        any(fnmatchcase(name.lower(), pattern) for pattern in _LOADED) and "/" not in name)


def _files(folder: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository.

    Raises:
        UserError: it is not a model's folder.
    """
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")
             if path.is_file() and not path.is_symlink()}
    files = {name: path for name, path in found.items()
             if name != "manifest.json" and not any(part.startswith(".") for part in name.split("/"))}
    if "config.json" not in files or not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder} holds no model to push", "make it again: gemma-tune merge --force")
    return files
