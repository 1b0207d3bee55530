"""What this process may use of the machine, and its start: no heavy import."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


def cores() -> int:
    """Processors that this process may run on, which can be fewer than there are: in a container, under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import large libraries without looking for garbage meanwhile: it finds none, and takes a sixth of the time.

    Nor is it looked for among what they are made of later, which takes 0.3 s each time that a training tidies up.
    """
    was_on, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if was_on:
            gc.enable()


@contextlib.contextmanager
def noting_ctrl_c() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C came, whoever got it.

    Libraries that are written in C make errors of their own of Python's: PyTorch a ValueError about a shape.
    """
    if threading.current_thread() is not threading.main_thread() or os.name != "posix":
        yield lambda: False
        return
    reads, writes = os.pipe()
    for end in (reads, writes):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)

    def came() -> bool:
        try:
            return signal.SIGINT in os.read(reads, 4096)
        except BlockingIOError:
            return False

    try:
        yield came
    finally:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)


def occupy_standard_streams() -> None:
    """Open what was closed by whoever started this: the next file would get its number, and with it what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of CUDA, Apple's GPU, the CPU allocator or Python means that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in ("out of memory", "t allocate memory"))
