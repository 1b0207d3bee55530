"""Models from the Hugging Face Hub: one commit, only the files that are needed, every kind of failure told apart.

The files go into Hugging Face's own cache, so that a model is stored once for every tool. Tokens come from Hugging
Face's own mechanisms (``HF_TOKEN``, the login file); they are neither stored nor quoted here. ``huggingface_hub`` is
imported inside functions, because ``gemma-tune --help`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gemma_tune import __version__
from gemma_tune.errors import WORK_FAILED, UserError

Progress = Callable[[str, int, int], None]
T = TypeVar("T")

# Lower-case patterns for names at the top of a repository; its folders hold other formats (onnx/, original/, …).
_VOCABULARY = ("tokenizer.json", "tokenizer.model*", "*.model", "vocab*", "*.tiktoken", "tekken.json")
_WANTED = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", *_VOCABULARY,
           "tokenizer*.json", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template.*",
           "*processor_config.json", "license*", "licence*", "notice*", "use_policy*", "readme.md")
# Pickles and Python files run code when they are loaded; "consolidated" holds the same weights a second time.
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
_NEVER = (*_PICKLED, "*.py", "*.onnx", "*.gguf", "consolidated*", "adapter_*")
_INDEX = "model.safetensors.index.json"

_KNOWN = ["google/gemma-" + name for name in (
    "3-270m", "3-270m-it", *(f"3-{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("it", "pt")),
    *(f"{size}{kind}" for size in ("2-2b", "2-9b", "2-27b", "2b", "7b", "3n-E2B", "3n-E4B", "4-E2B", "4-E4B", "4-12B",
                                   "4-26B-A4B", "4-31B") for kind in ("-it", "")))]
_ID = re.compile(r"(?!.*(--|\.\.))(?=.{1,96}$)\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BAD_REVISION = re.compile(r"[\s\\:*?\[~^\x00-\x1f]|\.\.|^/|/$|^$")
_SECRET = re.compile(r"hf_(?:oauth|jwt)_[\w.-]+|hf_[A-Za-z0-9]{16,}|api_org_\w{16,}|(?<=[Bb]earer )\S+"
                     r"|(?<=://)[^/\s@]+(?=@)")
_WAITS = (1.0, 2.0, 4.0)  # seconds before the Hub is asked again after an answer that passes
_PASSING = (500, 502, 503, 504)


@dataclass(frozen=True)
class HubModel:
    """A model in the local cache.

    Attributes:
        id: the id as it was asked for.
        revision: the full commit that every file belongs to.
        path: the snapshot's folder.
        from_cache: the Hub was not asked, or could not be: it may know a newer commit of the branch.
    """

    id: str
    revision: str
    path: str
    from_cache: bool = False


class HubError(UserError):
    """The model cannot be had; nothing in it contains a token.

    Attributes:
        kind: ``bad_id``, ``no_token``, ``bad_token``, ``licence``, ``token_scope``, ``not_found``,
            ``revision_not_found``, ``offline``, ``disk_full``, ``server``, ``bad_repo`` or ``cache``.
        detail: the library's exception in its own words, for ``--debug``.
    """

    def __init__(self, kind: str, message: str, hint: str, detail: str = ""):
        super().__init__(redact(message), redact(hint))
        self.kind, self.detail = kind, redact(detail)
        if kind in ("offline", "disk_full", "server"):  # nothing was wrong with the input
            self.exit_code = WORK_FAILED


def fetch_model(model_id: str, revision: str | None = None, *, on_progress: Progress | None = None) -> HubModel:
    """Bring a model's files into the local cache, all of one commit.

    Without a connection, or with ``HF_HUB_OFFLINE=1``, a whole copy in the cache is used. A commit that is whole in the
    cache is returned without asking anybody.

    Args:
        model_id: ``organisation/name``, or an old id without organisation.
        revision: a branch, a tag or a full commit; by default the newest commit of ``main``.
        on_progress: called with a file's name, the bytes that arrived and the bytes in all, and finally with both
            equal; it may be called from another thread.

    Raises:
        HubError: the model cannot be had; ``kind`` says why.
    """
    request = _request(model_id, revision)
    if revision and _COMMIT.fullmatch(revision) and not _missing(request.snapshot(revision)):
        return request.model(revision, from_cache=True)
    if variable := _offline_wanted():
        return _from_cache(request, _failure("forbidden", request, variable))
    with _quiet():
        request = replace(request, token=_token(request))
        try:
            commit, files = _explained(request, lambda: _look_up(request))
        except HubError as failure:
            if failure.kind in ("offline", "server"):
                return _from_cache(request, failure)
            raise
        _explained(request, lambda: _download(request, commit, files, on_progress or (lambda *_: None)))
    if lacking := _missing(request.snapshot(commit)):
        raise _failure("bad repo", request, f"at {commit[:12]} is not a whole model, it lacks {', '.join(lacking)}")
    _remember(request, commit)
    return request.model(commit)


def redact(text: str) -> str:
    """Replace tokens, and passwords inside links, by ``<token>``."""
    for token in _known_tokens():
        text = text.replace(token, "<token>")
    return _SECRET.sub("<token>", text)


# ---- what is asked for -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Request:
    """One call's id and revision, where it is sent, and as whom."""

    id: str
    revision: str | None
    endpoint: str
    cache: Path
    token: str | None = field(default=None, repr=False)

    @property
    def folder(self) -> Path:
        return self.cache / ("models--" + self.id.replace("/", "--"))

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def model(self, commit: str, *, from_cache: bool = False) -> HubModel:
        return HubModel(self.id, commit, str(self.snapshot(commit)), from_cache)


def _request(model_id: str, revision: str | None) -> _Request:
    from huggingface_hub import constants

    # The library reads HF_ENDPOINT when it is imported, which may be long before; ours is the value of now.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or "https://huggingface.co").rstrip("/")
    request = _Request(model_id, revision, endpoint, Path(constants.HF_HUB_CACHE).expanduser())
    if not re.match(r"https?://[^/\s]+", endpoint):
        raise _failure("bad endpoint", request)
    if not _ID.fullmatch(model_id):
        link = re.match(r"(?:https?://)?[^/\s]+\.[a-z]+/([\w.-]+/[\w.-]+)", model_id)
        raise _failure("bad id", request, f"use the id alone: `--model {link[1]}`" if link else _near(model_id) or
                       "an id is organisation/name, like google/gemma-3-270m-it; a local model is its folder's path")
    if revision is not None and _BAD_REVISION.search(revision):
        raise _failure("bad revision", request)
    return request


def _near(text: str) -> str:
    """``did you mean …`` for a misspelt Gemma id; empty when nothing is near or the id is a known one."""
    names = {name.lower(): known for known in _KNOWN for name in (known, known.split("/")[1])}
    wanted = re.sub(r"gemma(?=\d)", "gemma-", re.sub(r"[:_\s]", "-", text.lower()))  # Ollama writes gemma3:1b
    longer = [name for name in names if name == wanted or name.startswith(wanted + "-")]
    near = dict.fromkeys(names[name] for name in (longer or difflib.get_close_matches(wanted, names, 4, 0.8))[:2])
    return "" if text in _KNOWN or not near else f"did you mean {' or '.join(near)}?"


def _offline_wanted() -> str | None:
    """The variable that forbids the network, as it is now or as it was when the library was imported."""
    from huggingface_hub import constants, is_offline_mode

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return name
    return "HF_HUB_OFFLINE" if is_offline_mode() else None


def _token(request: _Request) -> str | None:
    """The token that the library will send; one that no header can carry is refused, or httpx would quote it."""
    from huggingface_hub.utils import get_token_to_send

    token = get_token_to_send(None)
    if token and not re.fullmatch(r"[!-~]+", token):
        raise _failure("bad token", request, "it contains spaces or characters that no token has")
    return token


def _known_tokens() -> Iterator[str]:
    """Tokens of this machine that could get into a text; replacing a very short one would shred the text instead."""
    found = [os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        from huggingface_hub import constants

        found.append(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8"))
    return (token.strip() for token in found if token and len(token.strip()) >= 5)


# ---- the Hub ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _File:
    """One file of the repository: its size (0 where the endpoint does not tell) and its name in the cache's blobs."""

    name: str
    size: int
    blob: str | None


def _look_up(request: _Request) -> tuple[str, list[_File]]:
    """Ask once which commit the revision is and which files it has; everything after is pinned to that commit."""
    from huggingface_hub import HfApi, constants

    api = HfApi(endpoint=request.endpoint, library_name="gemma-tune", library_version=__version__)
    info = _patiently(lambda: api.model_info(request.id, revision=request.revision, files_metadata=True,
                                             timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if not _COMMIT.fullmatch(info.sha or ""):
        raise _failure("no hub", request, "its answer names no commit")
    if info.disabled:
        raise _failure("bad repo", request, "was disabled by its owner or by Hugging Face")
    files = [_File(one.rfilename, (one.lfs.size if one.lfs else one.size) or 0,
                   one.lfs.sha256 if one.lfs else one.blob_id) for one in info.siblings or ()]
    if fault := _fault([file.name for file in files]):
        raise _failure("bad repo", request, fault)
    return info.sha, sorted((file for file in files if _is_wanted(file.name)), key=lambda file: file.name)


def _is_wanted(name: str) -> bool:
    return "/" not in name and _matches(name, _WANTED) and not _matches(name, _NEVER)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _fault(names: list[str]) -> str | None:
    """Why a repository with these files cannot be trained, known before anything large is downloaded."""
    if any(_is_wanted(name) and name.endswith(".safetensors") for name in names):
        return None if "config.json" in names else "has no config.json, so it is not a Hugging Face model"
    if "adapter_config.json" in names:
        return "is a LoRA adapter; `--model` takes the model that it was made for"
    if any(_matches(name, _PICKLED) for name in names):
        return "has its weights only as pickle files (.bin, .pt, …), which can run code when they are loaded; " \
               "gemma-tune reads safetensors only"
    if any(_matches(name, ("*.gguf",)) for name in names):
        return "has only GGUF files; `--model FILE.gguf` takes one that you downloaded"
    return "has no safetensors weights"


def _download(request: _Request, commit: str, files: list[_File], on_progress: Progress) -> None:
    """Small files first: a refused licence shows at once, and weights that are there prove the rest is there too.

    One file at a time, in this thread, so that Ctrl-C stops at once; the library parallelises within large files.
    """
    from huggingface_hub import hf_hub_download

    weights = [file for file in files if file.name.endswith(".safetensors")]
    for file in [file for file in files if file not in weights] + weights:
        if file in weights[:1]:
            _check_room(request, commit, weights)
        path = _patiently(partial(
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


def _check_room(request: _Request, commit: str, files: list[_File]) -> None:
    need = sum(file.size for file in files if not (request.snapshot(commit) / file.name).exists()
               and not (file.blob and (request.folder / "blobs" / file.blob).exists()))
    where = next(folder for folder in (request.cache, *request.cache.parents) if folder.exists())
    if need > (free := shutil.disk_usage(where).free):
        raise _failure("disk full", request, f"{need / 1e9:.2f} GB to download, {free / 1e9:.2f} GB free")


def _patiently(call: Callable[[], T]) -> T:
    """Call again after 5xx answers, which pass; every other failure is for good."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in _WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in _PASSING:
                raise
        time.sleep(wait)
    return call()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's log lines and warnings off the terminal."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hub_logging.set_verbosity(before)


# ---- the cache -------------------------------------------------------------------------------------------------------

def _missing(snapshot: Path) -> list[str]:
    """What a snapshot lacks to be whole; empty when it is."""
    if not snapshot.is_dir():
        return ["everything"]
    names = {path.name for path in snapshot.iterdir() if path.is_file()}  # false for a link whose target is gone
    lacking = [] if "config.json" in names else ["config.json"]
    if not any(_matches(name, _VOCABULARY) for name in names):
        lacking.append("the tokenizer")
    if "model.safetensors" in names:
        return lacking
    if _INDEX in names:
        return lacking + sorted(_shards(snapshot / _INDEX) - names)
    return lacking + ([] if any(_is_wanted(name) and name.endswith(".safetensors") for name in names) else ["weights"])


def _shards(index: Path) -> set[str]:
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {f"a readable {index.name}"}


def _from_cache(request: _Request, failure: HubError) -> HubModel:
    """The cached copy, because the Hub cannot be asked; without a whole one, the failure, and what the copy lacks."""
    commits = [commit for commit in _cached_commits(request) if request.snapshot(commit).is_dir()]
    for commit in commits:
        if not _missing(request.snapshot(commit)):
            return request.model(commit, from_cache=True)
    if commits and failure.kind == "offline":
        lacking = ", ".join(_missing(request.snapshot(commits[0])))
        raise HubError("offline", f"{failure.message}; the copy in the cache, of commit {commits[0][:12]}, is not "
                       f"whole: it lacks {lacking}", str(failure.hint), failure.detail)
    raise failure


def _cached_commits(request: _Request) -> list[str]:
    """The commits that could serve the request: the one asked for or, when none was, ``main``'s and the newest."""
    commits = []
    if request.revision and _COMMIT.fullmatch(request.revision):
        commits.append(request.revision)
    with contextlib.suppress(OSError):
        commits.append((request.folder / "refs" / (request.revision or "main")).read_text(encoding="utf-8").strip())
    if request.revision is None:
        folders = sorted((request.folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
        commits += [folder.name for folder in folders]
    return [commit for commit in commits if _COMMIT.fullmatch(commit)]


def _remember(request: _Request, commit: str) -> None:
    """Record what a branch or tag was, for work without a connection; only now, so that it names a whole snapshot."""
    ref = request.folder / "refs" / (request.revision or "main")
    if request.revision == commit:
        return
    with contextlib.suppress(OSError):  # a read-only cache works just as well online
        ref.parent.mkdir(parents=True, exist_ok=True)
        new = ref.with_name(f"{ref.name}.{os.getpid()}.tmp")
        new.write_text(commit, encoding="utf-8")
        new.replace(ref)


# ---- failures --------------------------------------------------------------------------------------------------------

_LOGIN = "log in with `hf auth login` or set HF_TOKEN; `--model demo` needs no account"
_AGAIN = "run the same command again: files that are complete are kept"
_FAILURES = {  # case: kind, message, hint
    "bad endpoint": ("offline", "HF_ENDPOINT is not a web address: {endpoint}",
                     "write it like https://huggingface.co, or unset HF_ENDPOINT"),
    "bad id": ("bad_id", "{id!r} is not a model id", "{why}"),
    "bad revision": ("revision_not_found", "{revision!r} cannot be a revision of {id}",
                     "give a branch, a tag or a full commit, or leave it away for `main`"),
    "no revision": ("revision_not_found", "{id} has no revision {revision!r}",
                    "choose one from {page}/tree/main, or leave it away for `main`"),
    "gated": ("no_token", "{id} is gated: it needs an account that accepted its licence, and no token is set",
              f"accept the licence at {{page}}, then {_LOGIN}"),
    "not visible": ("no_token", "{id} cannot be seen without a login: it is gated, private or misspelt",
                    f"{{near}}check {{page}}, then {_LOGIN}"),
    "bad token": ("bad_token", "the Hugging Face token of {origin} is not valid, so {id} cannot be had: {why}",
                  "{remedy}; tokens are made at {endpoint}/settings/tokens"),
    "licence": ("licence", "{id} needs its licence accepted by the account that the token belongs to",
                "open {page}, accept the licence and run the same command again; `hf auth whoami` shows the account"),
    "scope": ("token_scope", "the token may not read {id}: {why}",
              "edit the token at {endpoint}/settings/tokens and allow `Read access to contents of all public gated "
              "repos you can access`, or use one of type Read"),
    "not found": ("not_found", "{id} does not exist at {endpoint}, or the token's account may not see it",
                  "{near}check the spelling at {page}"),
    "forbidden": ("offline", "{id} cannot be had from the cache, and {why} forbids to download it",
                  "unset {why} and run once with a connection; `--model demo` needs no network"),
    "unreachable": ("offline", "{id} could not be downloaded: {endpoint} cannot be reached ({why})",
                    f"check the connection and {_AGAIN}; {{mirror}}; `--model demo` needs no network"),
    "no hub": ("server", "{endpoint} does not answer like a Hugging Face Hub: {why}",
               "check HF_ENDPOINT, the proxy, and whether this network wants a login page first"),
    "too many": ("server", "{endpoint} gets too many requests from here to send {id}",
                 "wait a few minutes; logging in with `hf auth login` raises the limit"),
    "server": ("server", "{endpoint} answered {why} for {id}",
               f"wait a little and {_AGAIN}; see https://status.huggingface.co"),
    "incomplete": ("server", "{id} could not be downloaded whole: {why}", _AGAIN),
    "disk full": ("disk_full", "no room for {id} in {cache}: {why}",
                  "free some space (`hf cache rm` removes old models), or set HF_HOME to a larger disk"),
    "cache": ("cache", "{id} cannot be stored in {cache}: {why}",
              "make the folder writable, or set HF_HOME to one that is"),
    "bad repo": ("bad_repo", "{id} {why}", "choose another model, or see {page}"),
}


def _failure(case: str, request: _Request, why: str = "") -> HubError:
    """Fill in a case's message and hint."""
    kind, message, hint = _FAILURES[case]
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    near = _near(request.id)
    words = {
        "id": request.id, "revision": request.revision or "main", "endpoint": request.endpoint, "why": why,
        "page": f"{request.endpoint}/{request.id}", "cache": request.cache, "origin": variable or "the login",
        "near": f"{near} otherwise " if near else "",
        "remedy": f"correct or unset {variable}, which wins over the login" if variable else
                  "run `hf auth login --force`",
        "mirror": "HF_ENDPOINT is set: check it" if os.environ.get("HF_ENDPOINT") else
                  f"where {request.endpoint} is blocked, set HF_ENDPOINT to a mirror that you trust",
    }
    return HubError(kind, message.format(**words), hint.format(**words))


def _explained(request: _Request, work: Callable[[], T]) -> T:
    """Do the work and turn the library's exceptions into ours."""
    try:
        return work()
    except HubError:
        raise
    except Exception as error:
        failure = _explain(error, request)
        if failure is None:
            raise
        failure.detail = redact(f"{type(error).__name__}: {error}")
        raise failure from None  # theirs may quote what was sent, with the token in it


def _explain(error: BaseException, request: _Request) -> HubError | None:
    """What an exception of the library means; None for one that only a bug explains."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the library wraps what went wrong into "not in the cache either"
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, request)
    code, text = getattr(error, "errno", None), _line(str(error)) or type(error).__name__
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", None)) and code or "no space left" in text.lower():
        return _failure("disk full", request, "writing failed")
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return _failure("unreachable", request, text)
    if isinstance(error, (errors.FileMetadataError, json.JSONDecodeError)):
        return _failure("no hub", request, text)
    if code is not None:
        return _failure("cache", request, os.strerror(code))
    # What arrived has the wrong size, or hf_xet failed, which raises these two without a number.
    return _failure("incomplete", request, text) if isinstance(error, (OSError, RuntimeError)) else None


def _refused(error: Any, request: _Request) -> HubError:
    """The Hub answered with an error: status, ``X-Error-Code`` and text together say which one."""
    headers, status = error.response.headers, error.response.status_code
    code, text = headers.get("X-Error-Code"), _line(headers.get("X-Error-Message") or error.server_message or "")
    if code == "RevisionNotFound":
        return _failure("no revision", request)
    if "resource is disabled" in text:
        return _failure("bad repo", request, "was disabled by its owner or by Hugging Face")
    if code == "EntryNotFound":
        return _failure("bad repo", request, f"lists a file that it does not have: {text}")
    if status == 401 and request.token is None:
        return _failure("gated" if code == "GatedRepo" else "not visible", request)
    if status == 401 and ("credentials" in text or "expired" in text or not _is_valid(request)):
        return _failure("bad token", request, text or "it was refused")
    if status == 403 and ("fine-grained" in text or code != "GatedRepo") and request.token:
        return _failure("scope", request, text or "403 Forbidden")
    if code == "GatedRepo":
        return _failure("licence" if request.token else "gated", request)
    if status in (401, 404):
        return _failure("not found", request)
    return _failure("too many" if status == 429 else "server", request, f"{status} {text}".strip())


def _is_valid(request: _Request) -> bool:
    """Whether the Hub knows the token: a gated file gets the same 401 for a wrong token as for none."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi(endpoint=request.endpoint).whoami(request.token)
    except errors.HfHubHTTPError as error:
        return error.response.status_code != 401
    except errors.HTTPError:
        return False
    return True


def _line(text: str) -> str:
    """A server's text, fit for one line of a message: no control characters, no length without end."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]
