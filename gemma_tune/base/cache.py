"""The cache: where checkpoints made from GGUF files are kept, and what is said where it cannot be used."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.refusals import FULL, refusal

CACHE = "GEMMA_TUNE_CACHE"
_OTHER_CACHE = f"set {CACHE} to a directory for it"


def cache_dir() -> Path:
    """Where checkpoints made from GGUF files are kept: ``GEMMA_TUNE_CACHE``, else the user's cache directory.

    Raises:
        UserError: it would lie in a home directory that is not known.
    """
    configured = os.environ.get(CACHE)
    named = configured or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "gemma-tune")
    path = os.path.expanduser(named)
    if path.startswith("~"):  # no HOME, and a user without an entry in the system's list, as in a container
        raise UserError(f"there is no place for the cache: the home directory in {named} is not known", _OTHER_CACHE)
    return Path(path)


@contextmanager
def cache_errors() -> Iterator[None]:
    """Turn an operating system's refusal while working in the cache into an error that names its variable."""
    try:
        yield
    except Exception as e:
        refused = refusal(e, cache_dir())
        if refused is None:
            raise
        place = refused.filename or cache_dir()
        if refused.errno in (*FULL, errno.EFBIG):
            raise WorkFailed(f"there is no room in the cache: {place}: {refused.strerror}",
                             f"free some space, or {_OTHER_CACHE}") from e
        raise UserError(f"the cache cannot be used: {place}: {refused.strerror or refused}", _OTHER_CACHE) from e
