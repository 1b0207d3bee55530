"""What is being loaded at the moment, for a command line that tells people what they wait for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

# Libraries whose import takes long enough to be waited for.
_LIBRARIES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "bitsandbytes", "xllamacpp")
_open: list[str] = []
_ended: list[Callable[[], None]] = []


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Something is being loaded; also as a decorator of a function that does nothing else.

    >>> with loading("the adapter"):
    ...     in_progress()
    'the adapter'
    """
    _open.append(what)
    try:
        yield
    finally:
        _open.remove(what)
        for tell in _ended:
            tell()


def in_progress() -> str | None:
    """What is being loaded: a library that is being imported in any thread, else what :func:`loading` names last."""
    # A copy is made in one go; a list of the items is not, and imports in other threads change them meanwhile.
    being_imported = {name.partition(".")[0] for name, module in sys.modules.copy().items()
                      if name.partition(".")[0] in _LIBRARIES and _is_being_imported(module)}
    for library in _LIBRARIES:  # torch is imported by each of the others
        if library in being_imported:
            return library
    return _open[-1] if _open else None


def _is_being_imported(module: object) -> bool:
    """As the import system itself marks it, since Python 3.3; asked without a lazy module's own ``__getattr__``."""
    spec = getattr(module, "__dict__", {}).get("__spec__")
    return bool(getattr(spec, "_initializing", False))


@contextlib.contextmanager
def told_of_ends(tell: Callable[[], None]) -> Iterator[None]:
    """Have ``tell`` called, in the thread that loads, when something has been loaded: before anything else is shown."""
    _ended.append(tell)
    try:
        yield
    finally:
        _ended.remove(tell)
