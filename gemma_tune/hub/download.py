"""Models from the Hugging Face Hub: one commit, only the files that are needed, every kind of failure told apart.

The files go into Hugging Face's own cache, so that a model is stored once for every tool. Tokens come from Hugging
Face's own mechanisms (``HF_TOKEN``, the login file); they are neither stored nor quoted here. ``huggingface_hub`` is
imported inside functions, because ``gemma-tune --help`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.base import shell
from gemma_tune.base.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, VOCABULARY
from gemma_tune.base.files import put_in_place, unfinished
from gemma_tune.base.strict_json import object_in
from gemma_tune.base.words import gigabytes
from gemma_tune.hub.access import (
    COMMIT,
    DISABLED,
    HubError,
    HubModel,
    Request,
    explained,
    hub_error,
    offline_wanted,
    patiently,
    quietly,
    request_for,
    token_for,
)

Progress = Callable[[str, int, int], None]

# Lower-case patterns for names at the top of a repository; its folders hold other formats (onnx/, original/, …), but
# for the one with further chat templates.
_WANTED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *VOCABULARY,
           "tokenizer*.json", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
           "*processor_config.json", "license*", "licence*", "notice*", "use_policy*", "readme.md")
# Pickles and Python files run code when they are loaded; "consolidated" holds the same weights a second time.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_NEVER = (*_PICKLED, "*.py", "*.onnx", "*.gguf", "consolidated*", "adapter_*")
_TEMPLATES = "additional_chat_templates"
_INDEX = "model.safetensors.index.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def fetch_model(model_id: str, revision: str | None = None, *, weights: bool = True,
                on_progress: Progress | None = None) -> HubModel:
    """Bring a model's files into the local cache, all of one commit.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, a whole copy in the cache is used. A commit that is whole in the
    cache is returned without asking anybody.

    Args:
        model_id: ``organisation/name``, or an old id without organisation.
        revision: a branch, a tag or a full commit; by default the newest commit of ``main``.
        weights: False leaves the weights where they are, and counts a copy without them as whole.
        on_progress: called with a file's name, the bytes that arrived and the bytes in all, and finally with both
            equal; it may be called from another thread.

    Raises:
        HubError: the model cannot be had; ``kind`` says why.
    """
    return _fetch(request_for(model_id, revision), _MODEL, weights, on_progress)


def fetch_adapter(adapter_id: str, revision: str | None, *, on_progress: Progress) -> HubModel:
    """The same of a PEFT adapter: its settings and its weights, and nothing else that its repository holds.

    Raises:
        HubError: it cannot be had, or is no PEFT adapter.
    """
    return _fetch(request_for(adapter_id, revision), _ADAPTER, True, on_progress)


@dataclass(frozen=True)
class _Kind:
    """What is fetched.

    Attributes:
        called: in messages.
        wants: whether a file of the repository is needed, by its name.
        fault: why a repository of that id with these files is of no use; None if it is.
        missing: what a snapshot lacks to be whole, with or without weights; empty when it is.
    """

    called: str
    wants: Callable[[str], bool]
    fault: Callable[[str, list[str]], str | None]
    missing: Callable[[Path, bool], list[str]]


def _fetch(request: Request, kind: _Kind, weights: bool, on_progress: Progress | None) -> HubModel:
    revision = request.revision
    # The weights come last: where they are, the rest is. Without them only the Hub knows what else there is.
    if revision and COMMIT.fullmatch(revision) and not kind.missing(request.snapshot(revision), True):
        return request.model(revision, from_cache=True)
    if variable := offline_wanted():
        return _from_cache(request, hub_error("forbidden", request, variable), kind, weights)
    with quietly():
        request = replace(request, token=token_for(request))
        try:
            commit, files = explained(request, lambda: _look_up(request, kind))
        except HubError as failure:
            if failure.kind in ("offline", "server"):
                return _from_cache(request, failure, kind, weights)
            raise
        files = [file for file in files if weights or not file.is_weights]
        explained(request, lambda: _download(request, commit, files, on_progress or (lambda *_: None)))
    if lacking := kind.missing(request.snapshot(commit), weights):
        raise hub_error("bad repo", request, f"at {commit[:12]} is not a whole {kind.called}, it lacks "
                                             f"{', '.join(lacking)}")
    if weights or not _serves(request, kind):
        _remember(request, commit)
    return request.model(commit)


# ---- the Hub ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _File:
    """One file of the repository: its size (0 where the endpoint does not tell) and its name in the cache's blobs."""

    name: str
    size: int
    blob: str | None

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(".safetensors")


def _look_up(request: Request, kind: _Kind) -> tuple[str, list[_File]]:
    """Ask once which commit the revision is and which files it has; everything after is pinned to that commit."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=request.endpoint, library_name="gemma-tune", library_version=__version__)
    info = patiently(lambda: api.model_info(request.id, revision=request.revision, files_metadata=True,
                                            timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if not COMMIT.fullmatch(info.sha or ""):
        raise hub_error("no hub", request, "its answer names no commit")
    if info.disabled:
        raise hub_error("bad repo", request, DISABLED)
    files = [_File(one.rfilename, (one.lfs.size if one.lfs else one.size) or 0,
                   one.lfs.sha256 if one.lfs else one.blob_id) for one in info.siblings or ()]
    if fault := kind.fault(request.id, [file.name for file in files]):
        raise hub_error("bad repo", request, fault)
    return info.sha, sorted((file for file in files if kind.wants(file.name)), key=lambda file: file.name)


def _is_wanted(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    return last.endswith(".jinja") if folder == _TEMPLATES else (
        not folder and _matches(name, _WANTED) and not _matches(name, _NEVER))


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _fault(model_id: str, names: list[str]) -> str | None:
    """Why a repository with these files cannot be trained, known before anything large is downloaded."""
    if any(_is_wanted(name) and name.endswith(".safetensors") for name in names):
        return None if "config.json" in names else "has no config.json, so it is not a Hugging Face model"
    if ADAPTER_CONFIG in names:
        return ("is a LoRA adapter: --model takes the model that it was made for, and `train --from-adapter "
                f"{model_id}` goes on from it")
    if any(_matches(name, _PICKLED) for name in names):
        return "has its weights only as pickle files (.bin, .pt, …), which can run code when they are loaded; " \
               "gemma-tune reads safetensors only"
    if gguf := [name for name in names if _matches(name, ("*.gguf",))]:
        return (f"has only GGUF files: `hf download {model_id} {shell.quote(gguf[0])} --local-dir .` brings one here, "
                "for --model FILE")
    return "has no safetensors weights"


def _download(request: Request, commit: str, files: list[_File], on_progress: Progress) -> None:
    """Small files first: a refused licence shows at once, and weights that are there prove the rest is there too.

    One file at a time, in this thread, so that Ctrl-C stops at once; the library parallelises within large files.
    """
    from huggingface_hub import hf_hub_download

    weights = [file for file in files if file.is_weights]
    for file in [file for file in files if file not in weights] + weights:
        if file in weights[:1]:
            _check_room(request, commit, weights)
        path = patiently(partial(
            hf_hub_download, request.id, file.name, revision=commit, endpoint=request.endpoint, cache_dir=request.cache,
            library_name="gemma-tune", library_version=__version__, tqdm_class=_reporter(file, on_progress)))
        on_progress(file.name, os.path.getsize(path), os.path.getsize(path))


def _reporter(file: _File, on_progress: Progress) -> type:
    """A class to take the place of tqdm's: the library feeds it bytes, and it prints nothing."""

    class Reporter(contextlib.nullcontext):
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any):
            super().__init__(self)
            self.n, self.total = initial, total or file.size

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            if self.total:  # 0 where nobody told the size
                on_progress(file.name, min(self.n, self.total), self.total)

        def ignore(self, *_: Any, **__: Any) -> None:
            """Looks, and bytes on the wire, which compression makes differ from the file's."""

        update_transfer = set_postfix_str = set_transfer_postfix_str = refresh = close = ignore

    return Reporter


def _check_room(request: Request, commit: str, files: list[_File]) -> None:
    need = sum(file.size for file in files if not (request.snapshot(commit) / file.name).exists()
               and not (file.blob and (request.folder / "blobs" / file.blob).exists()))
    where = next(folder for folder in (request.cache, *request.cache.parents) if folder.exists())
    if need > (free := shutil.disk_usage(where).free):
        raise hub_error("disk full", request, f"{gigabytes(need)} to download, {gigabytes(free)} free")


# ---- the cache -------------------------------------------------------------------------------------------------------

def _missing(snapshot: Path, weights: bool = True) -> list[str]:
    if not snapshot.is_dir():
        return ["everything"]
    names = {path.name for path in snapshot.iterdir() if path.is_file()}  # false for a link whose target is gone
    lacking = [] if "config.json" in names else ["config.json"]
    if not any(_matches(name, VOCABULARY) for name in names):
        lacking.append("the tokenizer")
    if not weights or "model.safetensors" in names:
        return lacking
    if _INDEX in names:
        return lacking + sorted(_shards(snapshot / _INDEX) - names)
    return lacking + ([] if any(_is_wanted(name) and name.endswith(".safetensors") for name in names) else ["weights"])


def _adapter_fault(_: str, names: list[str]) -> str | None:
    if ADAPTER_CONFIG not in names:
        return f"is no PEFT adapter: it has no {ADAPTER_CONFIG}"
    if ADAPTER_WEIGHTS in names:
        return None
    pickled = any(_matches(name, _PICKLED) for name in names)
    return ("has its adapter only as a pickle file, which can run code when it is loaded; gemma-tune reads safetensors "
            "only" if pickled else f"has no {ADAPTER_WEIGHTS}")


def _shards(index: Path) -> set[str]:
    try:
        return set(object_in(index)["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {f"a readable {index.name}"}


def _from_cache(request: Request, failure: HubError, kind: _Kind, weights: bool) -> HubModel:
    """The cached copy, because the Hub cannot be asked; without a whole one, the failure, and what the copy lacks.

    One with weights is preferred also where they are not needed yet: later they will be.
    """
    commits = [commit for commit in _cached_commits(request) if request.snapshot(commit).is_dir()]
    for needed in (True, weights):
        for commit in commits:
            if not kind.missing(request.snapshot(commit), needed):
                return request.model(commit, from_cache=True)
    if commits and failure.kind == "offline":
        lacking = ", ".join(kind.missing(request.snapshot(commits[0]), weights))
        raise HubError("offline", f"{failure.message}; the copy in the cache, of commit {commits[0][:12]}, is not "
                       f"whole: it lacks {lacking}", str(failure.hint), failure.detail)
    raise failure


def _serves(request: Request, kind: _Kind) -> bool:
    """Whether the branch or tag is known, with a whole model, for work without a connection."""
    try:
        commit = _ref(request).read_text(encoding="utf-8").strip()
    except OSError:
        return False
    return COMMIT.fullmatch(commit) is not None and not kind.missing(request.snapshot(commit), True)


def _ref(request: Request) -> Path:
    """The file that says which commit the branch or tag was when it was last asked for."""
    return request.folder / "refs" / (request.revision or "main")


def _cached_commits(request: Request) -> list[str]:
    """The commits that could serve the request: the one asked for or, when none was, ``main``'s and the newest."""
    commits = []
    if request.revision and COMMIT.fullmatch(request.revision):
        commits.append(request.revision)
    with contextlib.suppress(OSError):
        commits.append(_ref(request).read_text(encoding="utf-8").strip())
    if request.revision is None:
        folders = sorted((request.folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        commits += [folder.name for folder in folders]
    return [commit for commit in commits if COMMIT.fullmatch(commit)]


def _remember(request: Request, commit: str) -> None:
    """Record what a branch or tag was, for work without a connection; only now, so that it names a whole snapshot."""
    ref = _ref(request)
    if request.revision == commit:
        return
    with contextlib.suppress(OSError):  # a read-only cache works just as well online
        ref.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(ref.with_name(f"{ref.name}.{os.getpid()}.tmp")) as new:  # others use the cache, too
            new.write_text(commit, encoding="utf-8")
            put_in_place(new, ref)


_MODEL = _Kind("model", _is_wanted, _fault, _missing)
_ADAPTER = _Kind("adapter", _ADAPTER_FILES.__contains__, _adapter_fault, lambda snapshot, weights: [
    name for name in _ADAPTER_FILES if not (snapshot / name).is_file()])
