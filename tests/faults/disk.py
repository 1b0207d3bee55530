"""A disk that fills up: a small tmpfs where one can be mounted, else a limit on the size of files."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator

from faults.lab import TRIED, Lab, contents

ROOM = re.compile(r"disk is full|no room|room for|free|space|larger than its file system|too large", re.IGNORECASE)
_PAGE = 4096


def can_mount(lab: Lab) -> bool:
    """Whether this process may mount a tmpfs."""
    lab.run.mkdir(parents=True, exist_ok=True)
    if not shutil.which("mount") or _call("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(lab.run)):
        return False
    _call("umount", str(lab.run))
    return True


def full(lab: Lab, random_: random.Random, number: int, mounted: bool) -> tuple[str, str | None]:
    """One stage without the room that it needs; then with it."""
    stage = TRIED[number % len(TRIED)]
    state = lab.a_state(stage, random_)
    used, whole = _size(lab, state), _size(lab, "whole")
    limit = used + random_.randint(0, max(whole - used, 1 << 18)) if mounted else random_.randint(0, whole // 4)
    what = f"{stage} on {state} with {limit:,} bytes {'on the disk' if mounted else 'for a file (RLIMIT_FSIZE)'}"
    with _disk(lab, limit) if mounted else contextlib.nullcontext():
        try:
            lab.restore(state)
        except (OSError, shutil.Error):
            return f"{what}: too small for what is there", None
        before = contents(lab.run) if lab.run.exists() else {}
        # Standard output and error are files, too, and are not to be limited: they are small.
        first = (lambda: None) if mounted else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
        ended = lab.do(*lab.arguments(stage), first=first)
        problem = ended.fault(0, 1)
        if not problem and ended.code == 1 and not ROOM.search(ended.err):
            problem = f"`{ended.command}` does not say that there is no room: {ended.err.strip().splitlines()[-1]}"
        if not problem and ended.code == 1:
            now = contents(lab.run) if lab.run.exists() else {}
            if lost := sorted(name for name in before if now.get(name) != before[name]):
                problem = f"what was there is not whole any more: {', '.join(lost)}"
        if mounted:
            _call("mount", "-o", "remount,size=256m", str(lab.run))
        return what, problem or lab.go_on(stage)


@contextlib.contextmanager
def _disk(lab: Lab, size: int) -> Iterator[None]:
    shutil.rmtree(lab.run, ignore_errors=True)
    lab.run.mkdir(parents=True)
    if _call("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(lab.run)):
        raise RuntimeError("a tmpfs cannot be mounted any more")
    try:
        yield
    finally:
        _call("umount", "-l", str(lab.run))


def _size(lab: Lab, state: str) -> int:
    """Bytes that a state takes on a tmpfs, which gives out pages."""
    folder = lab.states / state
    files = [path for path in folder.rglob("*")] if folder.exists() else []
    return sum(-(-os.lstat(path).st_size // _PAGE) * _PAGE + _PAGE for path in files)


def _call(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode
