"""Passwords and access tokens: where they stand in a text, so that nothing that is printed or recorded shows them."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MARK = "<token>"  # what stands in the place of a secret
_SHAPES = (r"hf_(?:oauth|jwt)_[\w.-]+|hf_[A-Za-z0-9]{16,}|api_org_\w{16,}"  # Hugging Face
           r"|(?<!\w)(?:gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}"  # GitHub, GitLab
           r"|sk-(?=[\w-]*\d)[\w-]{20,}|xox[abeprs]-[\w-]{10,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35})"  # services
           r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*")  # a JSON Web Token
_SECRET = re.compile(
    _SHAPES + r"|(?<=[Bb]earer )(?=\S*\d)\S{8,}"  # a header; in prose, words follow "bearer", which have no digits
    r"|(?<=://)[^/\s]+(?=@)"  # name and password in a link, and a parameter at its end
    r"|(?<=\S)[?&][\w.-]*(?i:token|key|secret|password|passwd|pwd|signature|sig|auth|credentials?)="
    r"(?P<value>[^&#\s'\"<>]+)")


def redact(text: str) -> str:
    """Replace tokens, and the passwords in links, by ``<token>``.

    >>> redact("https://me:word@host/x?token=abc&page=2")
    'https://<token>@host/x?token=<token>&page=2'
    """
    for token in _known_tokens():
        text = text.replace(token, MARK)
    return _SECRET.sub(lambda found: found[0].removesuffix(found["value"] or found[0]) + MARK, text)


def redacted(value: Any) -> Any:
    """What JSON can hold, with :func:`redact` applied to each text in it."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redacted(key): redacted(one) for key, one in value.items()}
    return [redacted(one) for one in value] if isinstance(value, list | tuple) else value


def is_token(text: str) -> bool:
    """Whether a text is an access token and nothing else: what is pasted into the wrong place."""
    return bool(re.fullmatch(_SHAPES, text.strip())) or text.strip() in _known_tokens()


def place_of(address: str) -> str:
    """An address without whatever in it may be secret: a name and password, and the path, which can be a key by itself.

    >>> place_of("https://me:word@host:1/key?token=x"), place_of("127.0.0.1:11434")
    ('https://host:1/…', '127.0.0.1:11434')
    """
    scheme, separator, rest = address.strip().rpartition("://")
    host, *path = re.split(r"[/?#\\]", rest, maxsplit=1)
    if "@" not in host and path and "@" in path[0]:  # a password with a slash in it: where it ends nobody can tell
        return f"{scheme}{separator}…"
    return f"{scheme}{separator}{host.rpartition('@')[2]}" + ("/…" if path and path[0] else "")


def _known_tokens() -> Iterator[str]:
    """Tokens of this machine that could get into a text; replacing a very short one would shred the text instead."""
    found = [os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN")]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found.append(_login().read_text(encoding="utf-8"))
    return (token.strip() for token in found if token and len(token.strip()) >= 8)


def _login() -> Path:
    """Where `hf auth login` keeps the token. The library is not loaded for it: most commands get along without."""
    if constants := sys.modules.get("huggingface_hub.constants"):
        return Path(constants.HF_TOKEN_PATH)
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token")))
