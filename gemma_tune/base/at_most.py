"""A bound on the time of something that cannot be asked to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class TookTooLong(BaseException):
    """Not an ``Exception``: what is interrupted would take it for one of its own and go on."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt what runs in the context after so many seconds.

    By an alarm of the system, which Python has on Linux and macOS and gives to the main thread; elsewhere nothing is
    interrupted.

    Raises:
        TookTooLong: it was.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: object) -> None:
        raise TookTooLong

    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm is due a little later
            signal.setitimer(signal.ITIMER_REAL, left, interval)
