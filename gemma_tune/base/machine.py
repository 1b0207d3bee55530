"""What this process may use of the machine, and its start: no heavy import."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import NoReturn, TypeVar

from gemma_tune.base.errors import INTERRUPTED, UserError
from gemma_tune.base.words import first_line

# How often a thread of GNU OpenMP looks whether the others are done before it sleeps. By itself it looks as long as
# other programs want the processor: beside two of them on two cores the demo trained at 14 tokens/s, not 222, with
# this at 156, with OMP_WAIT_POLICY=PASSIVE at 144; alone it made 212 to 222 with this, and 219 without.
_SPINS = "1000"
_LOOKS_EVERY = 0.2  # seconds
T = TypeVar("T")

settled: dict[str, str] = {}  # what settle_threads() has put into the environment


def cores() -> int:
    """Processors that this process may use, which can be fewer than there are: in a container, under taskset."""
    return max(1, min(_allowed(), int(_quota() or _allowed())))


def _allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def control_groups(controller: str, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup"),
                   ) -> dict[Path, bool]:
    """The directories of the control groups of this process that have a controller (``cpu``, ``memory``), and whether
    they are of version 1, see ``cgroups(7)``; none on other systems than Linux."""
    try:
        lines = [line.split(":", 2) for line in own.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return {}
    found: dict[Path, bool] = {}
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and controller not in controllers.split(","):
            continue
        # Controllers that lie together are found under all of their names, or under the own one.
        for base in {root / controllers, root / controller} if controllers else {root}:
            group = base / path.lstrip("/")
            # In a container the path can be one outside of it, and its own limits lie at the root.
            found |= dict.fromkeys((folder for folder in (group, *group.parents, base) if folder.is_relative_to(base)),
                                   bool(controllers))
    return found


@functools.cache
def _quota(own: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors' worth of time that the control groups of this process leave it: the least of them; None without any.
    """
    found = [_of_group(folder, version_1) for folder, version_1 in control_groups("cpu", root, own).items()]
    return min((quota for quota in found if quota), default=None)


def _of_group(folder: Path, version_1: bool) -> float | None:
    """From a file with quota and period in microseconds, or, in version 1, one for each."""
    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version_1 else ("cpu.max",)
    try:
        quota, period = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # "max", among others
        return None


def settle_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Have OpenMP's threads sleep instead of taking others' time, and be no more than there is time for.

    To be called before torch is imported. What a user has set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        settled["GOMP_SPINCOUNT"] = _SPINS
    if cores() < _allowed() and "OMP_NUM_THREADS" not in environment:  # it knows the affinity, but no control group
        settled["OMP_NUM_THREADS"] = str(cores())
    environment.update(settled)


@contextlib.contextmanager
def keeping_garbage() -> Iterator[None]:
    """Make a great many objects without looking for garbage among them meanwhile: there is next to none.

    Looking takes a sixth of the time of importing large libraries, and two fifths of that of loading Gemma's tokenizer.
    Nor is it looked for later among what the libraries are made of, which takes 0.3 s each time that a training tidies
    up.
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


def end_at_once(code: int = 0) -> NoReturn:
    """End the process with its work done, or given up, whatever its other threads do.

    At an interpreter's usual end a library's thread that is still in C++ can bring the process down with SIGABRT, and
    then what went well would count as failed.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it takes nothing more, or is none
            stream.flush()
    os._exit(code)


class Terminated(SystemExit):
    """Somebody wants the process to end: no Ctrl-C, by which an answer or a line alone can be meant."""


def ending_signals() -> list[int]:
    """Those by which a user, a job scheduler or a terminal that is closed ends a program. ``nohup`` has the last one
    ignored, which stays so."""
    hang_up = getattr(signal, "SIGHUP", None)
    ignored = hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [hang_up])]


@contextlib.contextmanager
def held(numbers: Iterable[int]) -> Iterator[None]:
    """Let signals wait meanwhile; of what is started, threads and processes begin so. Nothing on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`Terminated`, so that what is half done is put away and said, as on Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread only
        yield
        return

    def end(number: int, frame: object) -> None:
        raise Terminated(INTERRUPTED)

    before = {number: signal.signal(number, end) for number in ending_signals()
              if signal.getsignal(number) is signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def ended_by(end: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Within :func:`terminable`: SIGTERM and SIGHUP call ``end`` and are raised afterwards, not amid a library's work.

    Yields a function that says whether one came.
    """
    came = False

    def note(number: int, frame: object) -> None:
        nonlocal came
        came = True
        end()

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.signal(number, note) for number in ending_signals()
              if number != signal.SIGINT and callable(signal.getsignal(number))}
    try:
        yield lambda: came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            raise Terminated(INTERRUPTED)


@contextlib.contextmanager
def noting_ctrl_c() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C, SIGTERM or SIGHUP came, whoever got it.

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
            return not {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}.isdisjoint(os.read(reads, 4096))
        except BlockingIOError:
            return False

    try:
        yield came
    finally:
        signal.set_wakeup_fd(before)
        os.close(reads)
        os.close(writes)


def next_of(waiting: queue.Queue[T] | queue.SimpleQueue[T]) -> T:
    """What comes next in a queue, however long that takes: Windows hears of Ctrl-C between two waits only."""
    while True:
        with contextlib.suppress(queue.Empty):
            return waiting.get(timeout=_LOOKS_EVERY)


def occupy_standard_streams() -> None:
    """Open what was closed by whoever started this: the next file would get its number, and with it what is printed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


def free_unused(device: str) -> None:
    """Give back the memory of what nobody refers to any more; a CUDA GPU's to other programs as well."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of CUDA, Apple's GPU, the CPU allocator or Python means that memory ran out."""
    # The last is of a tensor that is larger than Metal gives out at once, whatever else there is.
    texts = ("out of memory", "t allocate memory", "Invalid buffer size")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def no_memory(error: BaseException, advice: str) -> UserError:
    """What to say where memory ran out.

    Args:
        advice: what needs less; without the GPU's memory there is the computer's, which is said where it was that.
    """
    without = "; or without the GPU: the same with CUDA_VISIBLE_DEVICES=-1 in the environment"
    return UserError(f"out of memory: {first_line(error)}", advice + (without if "CUDA" in str(error) else ""))
