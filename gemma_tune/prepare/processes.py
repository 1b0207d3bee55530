"""Blocks of rows are judged in this process or in several, which end when nobody waits for them any more."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.machine import ending_signals, held
from gemma_tune.data.reading.sources import Block
from gemma_tune.prepare.judge import Judge, Judged

T = TypeVar("T")
_AHEAD = 2  # blocks for each process that wait or are being worked on

_judge: Judge | None = None  # of this process; children that are forked inherit it, with the tokenizer in its memory


def judged_blocks(blocks: Iterable[tuple[T, Block]], judge: Judge, processes: int) -> Iterator[tuple[T, Block, Judged]]:
    """Every block, with what it came with and its results, in order. Reading stays at most a few blocks ahead.

    Raises:
        WorkFailed: a process was killed, which is what happens when memory runs out.
    """
    if processes < 2:
        for origin, block in blocks:
            yield origin, block, judge(block)
        return
    global _judge
    _judge = judge
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores already
    gc.collect()
    gc.freeze()  # or the children's garbage collectors would write to, and so copy, all memory that they share
    try:
        with _one_interrupt(), _pool(processes, judge) as pool:
            waiting: deque[tuple[T, Block, Any]] = deque()
            for origin, block in blocks:
                with held(ending_signals()):  # Python ignores what a handler raises while it forks
                    future = pool.submit(_work, block)
                waiting.append((origin, block, future))
                if len(waiting) >= processes * _AHEAD:
                    yield _next(waiting)
            while waiting:
                yield _next(waiting)
    except BrokenProcessPool as e:
        raise WorkFailed("a process that prepares rows was killed, perhaps because memory ran out",
                         "close other programs and run the same command again") from e
    finally:
        gc.unfreeze()
        _judge = None


@contextlib.contextmanager
def _pool(processes: int, judge: Judge) -> Iterator[ProcessPoolExecutor]:
    """Child processes, which end at once when their work is for nobody any more."""
    pool = ProcessPoolExecutor(processes, mp_context=_context(), initializer=_begin, initargs=_arguments(judge))
    try:
        yield pool
    except BaseException:  # Ctrl-C, or whoever takes the results has stopped
        for child in multiprocessing.active_children():
            child.kill()
        # One that is killed while it sends its rows leaves the pool's thread waiting for the rest, as long as anybody
        # could still write there: this process itself.
        with contextlib.suppress(AttributeError, OSError):
            pool._result_queue._writer.close()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _one_interrupt() -> Iterator[None]:
    """The first Ctrl-C ends the work; a second one would leave the pool waiting for its children for ever."""
    pressed = False

    def receive(number: int, frame: Any) -> None:
        nonlocal pressed
        if not pressed:
            pressed = True
            raise KeyboardInterrupt

    # Python gives signals to the main thread only; whoever has a way of their own to deal with them keeps it.
    if threading.current_thread() is not threading.main_thread() or (
            signal.getsignal(signal.SIGINT) is not signal.default_int_handler):
        yield
        return
    signal.signal(signal.SIGINT, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _next(waiting: deque[tuple[T, Block, Any]]) -> tuple[T, Block, Judged]:
    origin, block, future = waiting.popleft()
    return origin, block, future.result()


def _context() -> Any:
    return multiprocessing.get_context("fork" if may_fork() else "spawn")


def _arguments(judge: Judge) -> tuple[Any, ...]:
    return (None,) if may_fork() else (judge,)


def may_fork() -> bool:
    """Whether children can share the loaded tokenizer instead of loading it again.

    Forking copies no threads, but what they had locked: a process that has met others for a training has some. On macOS
    and Windows it is unsafe or unknown.
    """
    distributed = sys.modules.get("torch.distributed")  # `prepare` itself does not import it
    met = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return sys.platform == "linux" and not met


def _begin(judge: Judge | None) -> None:
    """Start of a child process. Ctrl-C is for the parent, which ends its children."""
    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ending = ending_signals()
    for number in set(ending) - {signal.SIGINT}:
        signal.signal(number, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):  # which they were forked with, see `held`
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ending)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if judge is not None:
        _judge = judge


def _end_with_parent() -> None:
    """A parent that is killed cannot end its children, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work(block: Block) -> Judged:
    assert _judge is not None
    return _judge(block)
