"""The run's ``inputs/``: copies of what was piped, and the commits of datasets. Written before the run is locked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import NEW, os_errors, remove


@contextmanager
def writing_inputs(keep: Path) -> Iterator[None]:
    """Let this process alone write into ``keep``; what a killed one left there half written is removed first.

    Raises:
        UserError: another process does at this moment, or the system refuses.
    """
    with os_errors(keep):
        keep.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(keep / ".lock", timeout=0):
                _sweep(keep)
                yield
        except Timeout as e:
            raise UserError(f"another command writes into {keep}, perhaps from its standard input",
                            "wait until it has finished, or work on another run with --run DIR") from e


def sweep_inputs(keep: Path) -> None:
    """Remove what a killed process left half written in ``keep``, unless one is writing there now."""
    if not any(keep.glob(f"{NEW}*")):
        return
    try:
        with FileLock(keep / ".lock", timeout=0):
            _sweep(keep)
    except Timeout:
        pass


def _sweep(keep: Path) -> None:
    for pattern in ("stdin*", "hf-*"):  # no other names are made there
        for leftover in keep.glob(f"{NEW}{pattern}"):
            remove(leftover)
