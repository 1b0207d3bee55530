"""Asking the Hugging Face Hub: what is asked for and as whom, patience, and every kind of failure told apart.

Tokens come from Hugging Face's own mechanisms (``HF_TOKEN``, the login file); they are neither stored nor quoted here.
``huggingface_hub`` is imported inside functions, because ``gemma-tune --help`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from gemma_tune.base import shell
from gemma_tune.base.errors import WORK_FAILED, UserError
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import nearest

T = TypeVar("T")
_KNOWN = ["google/gemma-" + name for name in (
    "3-270m", "3-270m-it", *(f"3-{size}-{kind}" for size in ("1b", "4b", "12b", "27b") for kind in ("it", "pt")),
    *(f"{size}{kind}" for size in ("2-2b", "2-9b", "2-27b", "2b", "7b", "3n-E2B", "3n-E4B", "4-E2B", "4-E4B", "4-12B",
                                   "4-26B-A4B", "4-31B") for kind in ("-it", "")))]
MODEL_ID = re.compile(r"(?!.*(--|\.\.))(?=.{1,96}$)\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
_BAD_REVISION = re.compile(r"[\s\\:*?\[~^\x00-\x1f]|\.\.|^/|/$|^$")
_WAITS = (1.0, 2.0, 4.0)  # seconds before the Hub is asked again after an answer that passes
_PASSING = (500, 502, 503, 504)
DISABLED = "was disabled by its owner or by Hugging Face"


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
            ``revision_not_found``, ``offline``, ``disk_full``, ``quota``, ``server``, ``bad_repo`` or ``cache``.
        detail: the library's exception in its own words, for ``--debug``.
        unseen: nobody has said that there is such a repository; the name may have been meant otherwise.
    """

    def __init__(self, kind: str, message: str, hint: str, detail: str = "", *, unseen: bool = False):
        super().__init__(message, hint)
        self.kind, self.detail, self.unseen = kind, redact(detail), unseen
        if kind in ("offline", "disk_full", "quota", "server"):  # nothing was wrong with the input
            self.exit_code = WORK_FAILED


# ---- what is asked for -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Request:
    """One call's id and revision, where it is sent, and as whom; and failures that it words in its own way."""

    id: str
    revision: str | None
    endpoint: str
    cache: Path
    token: str | None = field(default=None, repr=False)
    failures: Mapping[str, tuple[str, str, str]] = field(default_factory=dict, repr=False)

    @property
    def folder(self) -> Path:
        return self.cache / ("models--" + self.id.replace("/", "--"))

    def snapshot(self, commit: str) -> Path:
        return self.folder / "snapshots" / commit

    def model(self, commit: str, *, from_cache: bool = False) -> HubModel:
        return HubModel(self.id, commit, str(self.snapshot(commit)), from_cache)


def request_for(model_id: str, revision: str | None) -> Request:
    request = to_hub(model_id, revision)
    if not MODEL_ID.fullmatch(model_id):
        raise hub_error("bad id", request, _instead(model_id))
    if revision is not None and _BAD_REVISION.search(revision):
        raise hub_error("bad revision", request)
    return request


def to_hub(repo_id: str, revision: str | None = None,
           failures: Mapping[str, tuple[str, str, str]] | None = None) -> Request:
    """A request to the hub of now, as nobody yet, whatever its id looks like."""
    from huggingface_hub import constants

    # The library reads HF_ENDPOINT when it is imported, which may be long before; ours is the value of now.
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT or "https://huggingface.co").rstrip("/")
    cache = Path(os.path.expanduser(constants.HF_HUB_CACHE))
    request = Request(repo_id, revision, endpoint, cache, failures=failures or {})
    require_home(request, cache)
    if not re.match(r"https?://[^/\s]+", endpoint):
        raise hub_error("bad endpoint", request)
    return request


def require_home(request: Request, cache: Path) -> None:
    """Refuse a cache in a home directory that is not known: the library would make one called ``~`` right here.

    Raises:
        HubError: it lies in one.
    """
    if str(cache).startswith("~"):
        raise hub_error("no home", request, str(cache))


def _instead(text: str) -> str:
    """What to write for what is no id."""
    name, _, revision = text.partition("@")
    if revision and MODEL_ID.fullmatch(name):
        return f"a revision is named by itself: --model {name} --revision {revision}"
    # In a web address, as data of the Hub are named, as a folder of its cache is called.
    found = (re.fullmatch(r"hf:([\w.-]+/[\w.-]+)", text) or re.fullmatch(r"models--([\w.-]+?--[\w.-]+)", text)
             or "ollama.com/" not in text and re.match(r"(?:https?://)?[^/\s]+\.[a-z]+/([\w.-]+/[\w.-]+)", text))
    if found:
        return f"use the id alone: `--model {found[1].replace('--', '/')}`"
    ways = [_near(text) or f"{_ID}; a local model is its folder's path"]
    ways += [_OF_OLLAMA.format(shell.quote(text))] if ":" in text and "://" not in text else []
    return " otherwise ".join(ways) if ways[0].endswith("?") else "; ".join(ways)


def _near(text: str) -> str:
    """``did you mean …`` for a misspelt Gemma id; empty when nothing is near or the id is a known one."""
    names = {name.lower(): known for known in _KNOWN for name in (known, known.split("/")[1])}
    wanted = re.sub(r"gemma(?=\d)", "gemma-", re.sub(r"[:_\s]", "-", text.lower()))  # Ollama writes gemma3:1b
    longer = [name for name in names if name == wanted or name.startswith(wanted + "-")]
    near = dict.fromkeys(names[name] for name in (longer or nearest(wanted, names, 4, 0.8))[:2])
    return "" if text in _KNOWN or not near else f"did you mean {' or '.join(near)}?"


def offline_wanted() -> str | None:
    """The variable that forbids the network, as it is now or as it was when the library was imported."""
    from huggingface_hub import constants, is_offline_mode

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            return name
    return "HF_HUB_OFFLINE" if is_offline_mode() else None


def token_for(request: Request) -> str | None:
    """The token that the library will send; one that no header can carry is refused, or httpx would quote it."""
    from huggingface_hub.utils import get_token_to_send

    token = get_token_to_send(None)
    if token and token[0] == token[-1] and token[0] in "'\"":
        raise hub_error("bad token", request, "it stands in quotes, which are a part of it")
    if token and not re.fullmatch(r"[!-~]+", token):
        raise hub_error("bad token", request, "it contains spaces or characters that no token has")
    return token


def patiently(call: Callable[[], T]) -> T:
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
def quietly() -> Iterator[None]:
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


# ---- failures --------------------------------------------------------------------------------------------------------

_LOGIN = "log in with `hf auth login` or set HF_TOKEN; `--model demo` needs no account"
_AGAIN = "run the same command again: files that are complete are kept"
_ID = "an id is organisation/name, like google/gemma-3-270m-it"
_OF_OLLAMA = "of a model in Ollama, `ollama show --modelfile {}` names the GGUF file, which --model takes"
CORRECT_CERTIFICATES = "correct or unset SSL_CERT_FILE and SSL_CERT_DIR: without them those of certifi are taken"
_FAILURES = {  # case: kind, message, hint
    "bad endpoint": ("offline", "HF_ENDPOINT is not a web address: {endpoint}",
                     "write it like https://huggingface.co, or unset HF_ENDPOINT"),
    "bad id": ("bad_id", "{id!r} is not a model id", "{why}"),
    "bad revision": ("revision_not_found", "{revision!r} cannot be a revision of {id}",
                     "give a branch, a tag or a full commit, or leave it away for `main`"),
    "no revision": ("revision_not_found", "{id} has no revision {revision!r}",
                    "choose one from {page}/tree/main, or leave it away for `main`"),
    "gated": ("no_token", "{id} is gated: it needs an account that accepted its licence, and no token is set",
              f"{{unread}}accept the licence at {{page}}, then {_LOGIN}"),
    "not visible": ("no_token", "{id} cannot be seen without a login: it is gated, private or misspelt",
                    f"{{near}}{{unread}}check {{page}}, then {_LOGIN}"),
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
    "certificates": ("offline", "{endpoint} cannot be asked for {id}: {why}", CORRECT_CERTIFICATES),
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
    "no home": ("cache", "there is no place for {id}: the home directory in {why} is not known",
                "set HF_HOME to a directory for what comes from the Hub"),
    "bad repo": ("bad_repo", "{id} {why}", "choose another model, or see {page}"),
}

# As people and other programs call a token, but the library does not.
_UNREAD = ("HUGGINGFACE_TOKEN", "HUGGINGFACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN", "HUGGINGFACE_API_KEY",
           "HF_API_TOKEN", "HF_API_KEY", "HUGGING_FACE_TOKEN", "HF_ACCESS_TOKEN")
_UNSEEN = ("bad id", "not visible", "not found", "forbidden", "unreachable")


def hub_error(case: str, request: Request, why: str = "") -> HubError:
    """Fill in a case's message and hint."""
    kind, message, hint = request.failures.get(case) or _FAILURES[case]
    variable = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)), None)
    near = _near(request.id)
    bare = "" if near or "/" in request.id else f"{_ID}; {_OF_OLLAMA.format(request.id)}; else "
    words = {
        "id": request.id, "revision": request.revision or "main", "endpoint": request.endpoint, "why": why,
        "page": f"{request.endpoint}/{request.id}", "cache": request.cache, "origin": variable or "the login",
        "near": f"{near} otherwise " if near else bare, "unread": _unread(),
        "remedy": f"correct or unset {variable}, which wins over the login" if variable else
                  "run `hf auth login --force`",
        "mirror": "HF_ENDPOINT is set: check it" if os.environ.get("HF_ENDPOINT") else
                  f"where {request.endpoint} is blocked, set HF_ENDPOINT to a mirror that you trust",
    }
    return HubError(kind, message.format(**words), hint.format(**words), unseen=case in _UNSEEN)


def _unread() -> str:
    """The beginning of a hint to log in, where somebody has, in a way that the library does not see."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return "HF_HUB_DISABLE_IMPLICIT_TOKEN keeps the login from being used: unset it; "
    return next((f"{name} is set, and is not read: call it HF_TOKEN; " for name in _UNREAD if os.environ.get(name)), "")


def explained(request: Request, work: Callable[[], T]) -> T:
    """Do the work and turn the library's exceptions into ours."""
    try:
        return work()
    except HubError:
        raise
    except Exception as error:
        failure = explain(error, request)
        if failure is None:
            raise
        failure.detail = redact(f"{type(error).__name__}: {error}")
        raise failure from None  # theirs may quote what was sent, with the token in it


def explain(error: BaseException, request: Request) -> HubError | None:
    """What an exception of the library means; None for one that only a bug explains."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # the library wraps what went wrong into "not in the cache either"
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error, request)
    code, text = getattr(error, "errno", None), one_line(str(error)) or type(error).__name__
    if code in (errno.ENOSPC, getattr(errno, "EDQUOT", None)) and code or "no space left" in text.lower():
        return hub_error("disk full", request, "writing failed")
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return hub_error("unreachable", request, text)
    if isinstance(error, (errors.FileMetadataError, json.JSONDecodeError)):
        return hub_error("no hub", request, text)
    if code is not None and (unread := unreadable_certificates()):
        return hub_error("certificates", request, unread)
    if code is not None:
        return hub_error("cache", request, os.strerror(code))
    # What arrived has the wrong size, or hf_xet failed, which raises these two without a number.
    return hub_error("incomplete", request, text) if isinstance(error, (OSError, RuntimeError)) else None


def unreadable_certificates() -> str | None:
    """What keeps https from working before anything is asked: certificates that cannot be read. None as a rule."""
    import httpx

    try:
        httpx.create_ssl_context()
    except OSError as error:
        name = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
        whose = f"of {name}={os.environ[name]}" if name else "of certifi"
        return f"the certificates {whose} cannot be read ({error.strerror or error})"
    return None


def _refused(error: Any, request: Request) -> HubError:
    """The Hub answered with an error: status, ``X-Error-Code`` and text together say which one."""
    headers, status = error.response.headers, error.response.status_code
    code, text = headers.get("X-Error-Code"), one_line(headers.get("X-Error-Message") or error.server_message or "")
    if code == "RevisionNotFound":
        return hub_error("no revision", request)
    if "resource is disabled" in text:
        return hub_error("bad repo", request, DISABLED)
    if code == "EntryNotFound":
        return hub_error("bad repo", request, f"lists a file that it does not have: {text}")
    if status == 401 and request.token is None:
        return hub_error("gated" if code == "GatedRepo" else "not visible", request)
    if status == 401 and ("credentials" in text or "expired" in text or not _is_valid(request)):
        return hub_error("bad token", request, text or "it was refused")
    if status == 403 and ("fine-grained" in text or code != "GatedRepo") and request.token:
        return hub_error("scope", request, text or "403 Forbidden")
    if code == "GatedRepo":
        return hub_error("licence" if request.token else "gated", request)
    if status in (401, 404):
        return hub_error("not found", request)
    return hub_error("too many" if status == 429 else "server", request, f"{status} {text}".strip())


def _is_valid(request: Request) -> bool:
    """Whether the Hub knows the token: a gated file gets the same 401 for a wrong token as for none."""
    from huggingface_hub import HfApi, errors

    try:
        HfApi(endpoint=request.endpoint).whoami(request.token)
    except errors.HfHubHTTPError as error:
        return error.response.status_code != 401
    except errors.HTTPError:
        return False
    return True


_NOT_A_MODEL = {  # the same failures where no model is asked for
    "unreachable": ("offline", "{endpoint} cannot be reached ({why})",
                    "check the connection; {mirror}; `--model demo` needs no network"),
    "bad token": ("bad_token", "the Hugging Face token of {origin} is not valid: {why}",
                  "{remedy}; tokens are made at {endpoint}/settings/tokens"),
    "too many": ("server", "{endpoint} gets too many requests from here",
                 "wait a few minutes; logging in with `hf auth login` raises the limit"),
    "server": ("server", "{endpoint} answered {why}", "wait a little; see https://status.huggingface.co"),
}


def account() -> tuple[str, str | None]:
    """The Hub's address, and the account that the token belongs to: None where there is no token, and the Hub answers.

    Raises:
        HubError: the Hub cannot be reached or answers otherwise, or the token is not valid.
    """
    from huggingface_hub import HfApi

    request = to_hub("gemma-tune", failures=_NOT_A_MODEL)
    token = token_for(request)
    api = HfApi(endpoint=request.endpoint)
    with quietly():
        if token:
            request = replace(request, token=token)
            return request.endpoint, explained(request, lambda: api.whoami(token)).get("name")
        # What anybody may see. That there is no such model is an answer of the Hub as well.
        try:
            explained(request, lambda: api.model_info(request.id, timeout=10))
        except HubError as failure:
            if failure.kind not in ("no_token", "not_found"):
                raise
    return request.endpoint, None


def one_line(text: str) -> str:
    """A server's text, fit for one line of a message: no token, no control characters, no length without end."""
    return "".join(c for c in " ".join(redact(text).split()) if c.isprintable())[:200]
