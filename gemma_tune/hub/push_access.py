"""As whom a model is pushed to the Hub, whether that account may write there, and what a failure is called then.

Tokens and the ways of telling failures apart are those of ``hub.access``; what only an upload meets is added here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_tune import __version__
from gemma_tune.hub.access import Request, explained, hub_error, offline_wanted, one_line, patiently, to_hub, token_for

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_NO_STORAGE = (402, 403, 413)  # the Hub's statuses where an account's storage is used up

_TOKENS = "{endpoint}/settings/tokens"
_AGAIN = "run the same command again: finished stages are kept, and so are files that the Hub has"
_FAILURES = {  # as in hub.access: case: kind, message, hint, in which MAKE is the command that makes the files
    "bad id": ("bad_id", "{id!r} cannot be a repository on the Hub",
               "write account/name, of letters, digits, `-`, `_` and `.`: --push my-account/my-model"),
    "no token": ("no_token", "nothing can be pushed to {id}: no Hugging Face token is set",
                 f"make one of type Write at {_TOKENS}, then `hf auth login`, or set HF_TOKEN"),
    "bad token": ("bad_token", "the Hugging Face token of {origin} is not valid, so nothing is pushed to {id}: {why}",
                  f"{{remedy}}; tokens are made at {_TOKENS}"),
    "scope": ("token_scope", "the Hugging Face token of {origin} cannot write to {id}: {why}",
              f"use a token that may write there ({_TOKENS}; {{remedy}}), or push to another account; "
              "`hf auth whoami` shows the account"),
    "not found": ("not_found", "{id} is not a model repository at {endpoint}, or the token's account may not see it",
                  "push to another name"),
    "forbidden": ("offline", "nothing can be pushed to {id}: {why} forbids to use the network",
                  "unset {why} and run the same command again"),
    "unreachable": ("offline", "{id} could not be pushed to: {endpoint} cannot be reached ({why})",
                    f"check the connection and {_AGAIN}; {{mirror}}"),
    "too many": ("server", "{endpoint} gets too many requests from here to take {id}",
                 f"wait a few minutes and {_AGAIN}"),
    "server": ("server", "{endpoint} answered {why} when {id} was pushed to",
               f"wait a little and {_AGAIN}; see https://status.huggingface.co"),
    "incomplete": ("server", "the push to {id} broke off: {why}", _AGAIN),
    "xet": ("server", "the upload to {id} through Xet broke off: {why}",
            f"{_AGAIN}; where Xet cannot be reached, with HF_HUB_DISABLE_XET=1 in the environment"),
    "quota": ("quota", "{id} has no room for this model: {why}",
              "free or buy storage at {endpoint}/settings/billing, or push to another account"),
    "refused": ("server", "{endpoint} does not take the files for {id}: {why}",
                "make them again: MAKE --force --push {id}; if that changes nothing, please report it"),
    "cache": ("cache", "the model for {id} cannot be read: {why}", "make it again with `MAKE --force`"),
    "public": ("bad_repo", "{id} exists and everybody can see it, and this push is to be private",
               "add --public to publish the model there, or push to another name"),
    "bad repo": ("bad_repo", "{id} {why}", "push to another name"),
}


def push_request(repo_id: str, make: str) -> Request:
    """A request to push to ``account/name``, with the token that will be sent.

    Args:
        make: the command that makes what is pushed, such as ``gemma-tune merge``, for hints.

    Raises:
        HubError: there is no such name, no token, or the network is forbidden; nobody was asked yet.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    request = to_hub(repo_id, failures={case: (kind, message, hint.replace("MAKE", make))
                                        for case, (kind, message, hint) in _FAILURES.items()})
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise hub_error("bad id", request) from None
    if "/" not in repo_id:
        raise hub_error("bad id", request)
    if variable := offline_wanted():
        raise hub_error("forbidden", request, variable)
    request = replace(request, token=token_for(request))
    if request.token is None:
        raise hub_error("no token", request)
    return request


def api_for(request: Request) -> HfApi:
    """The library's interface to the request's hub, as the owner of its token."""
    from huggingface_hub import HfApi

    return HfApi(request.endpoint, request.token, library_name="gemma-tune", library_version=__version__)


def missing_right(who: Mapping[str, Any], repo_id: str) -> str | None:
    """Why an account or its token cannot write to a repository, by what ``whoami`` tells; None if nothing forbids it.

    A token is of type Read or Write, or fine-grained: then it has permissions for accounts or single repositories.
    """
    account = repo_id.split("/")[0]
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return "it is of type Read"
    scopes = (token.get("fineGrained") or {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        writable = {scope["entity"].get("name", account).lower() for scope in scopes
                    if any(right.startswith("repo.") and right.endswith("write") for right in scope["permissions"])}
        return None if {account.lower(), repo_id.lower()} & writable else "it is fine-grained, without that right"
    if account.lower() == who["name"].lower() or "orgs" not in who:
        return None
    roles = {org["name"].lower(): org.get("roleInOrg") for org in who["orgs"]}
    if account.lower() not in roles:
        return f"its account, {who['name']}, is no member of {account}"
    # In a resource group of the organisation a member can have another role, which is not told.
    if roles[account.lower()] == "read":
        return f"its account, {who['name']}, may only read in {account}"
    return None


def uses_xet() -> bool:
    """Whether the library uploads through Xet; otherwise over plain HTTP."""
    from huggingface_hub import constants
    from huggingface_hub.utils import is_package_available

    return not constants.HF_HUB_DISABLE_XET and is_package_available("hf_xet")


def ask(request: Request, work: Callable[[], T]) -> T:
    """Do something at the Hub, patiently, and turn the library's exceptions into ours.

    Raises:
        HubError: it failed; ``kind`` says why.
    """
    return explained(request, lambda: _told(request, lambda: patiently(work)))


def _told(request: Request, work: Callable[[], T]) -> T:
    """Tell apart what only an upload meets."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return work()
    except HfHubHTTPError as error:
        text = one_line(error.response.headers.get("X-Error-Message") or error.server_message or "")
        if error.response.status_code in _NO_STORAGE and "storage" in text.lower():
            raise hub_error("quota", request, text) from None
        if error.response.status_code == 400:
            raise hub_error("refused", request, one_line(error.server_message or text)) from None
        raise
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # the storage does not want a file
        raise hub_error("refused", request, one_line(str(error))) from None
    except (RuntimeError, OSError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else None  # what went wrong with one file
        if isinstance(cause, HfHubHTTPError):  # the storage's answer, which says nothing about our token
            raise hub_error("incomplete", request, f"the storage answered {cause.response.status_code}") from None
        if cause is None and getattr(error, "errno", None) is None and uses_xet():
            raise hub_error("xet", request, one_line(str(error))) from None
        raise cause or error from None
