"""On a terminal, one line that says what is being loaded; it goes before anything else is shown."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from rich.live import Live
from rich.spinner import Spinner

from gemma_tune.base.loading import in_progress, told_of_ends
from gemma_tune.cli import live, screen

LOOKS_EVERY = 0.1  # seconds
_still = threading.Event()  # something else has the line's place


def is_watched() -> bool:
    """Whether people want to see what is being loaded."""
    return bool(screen.hides)


def loading_text(what: str) -> str:
    """What is shown of it."""
    return f"loading {what}"


def moving(what: str) -> Spinner:
    """What says that ``what`` is being loaded."""
    return Spinner("dots" if screen.has_blocks() else "line", text=loading_text(what), style="cyan")


@contextlib.contextmanager
def keeping_still() -> Iterator[None]:
    """No line while this lasts: something else has the terminal, and says it itself."""
    _still.set()
    screen.clear_the_way()
    try:
        yield
    finally:
        _still.clear()


class _Line:
    """The line, drawn by a thread: it looks what is loaded, as an import does not tell that it begins."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._live: Live | None = None
        self._said = ""

    def look(self) -> None:
        """Show, change or hide the line."""
        what = in_progress()
        with self._lock:
            if self._over.is_set() or what is None or _still.is_set() or live.is_shown():
                self.hide()
            elif what != self._said:
                self._say(what)

    def _say(self, what: str) -> None:
        self._said = what
        spinner = moving(what)
        if self._live is None:
            # What goes to standard output is a result, and stays there.
            self._live = Live(spinner, console=screen.err, transient=True, refresh_per_second=8, redirect_stdout=False,
                              redirect_stderr=False)
            self._live.start(refresh=True)
        else:
            self._live.update(spinner)

    def hide(self) -> None:
        """Take the line away, now."""
        with self._lock:
            self._said = ""
            if self._live is not None:
                shown, self._live = self._live, None
                with contextlib.suppress(OSError):  # the terminal has gone
                    shown.stop()

    def watch(self) -> None:
        while not self._over.wait(LOOKS_EVERY):
            with contextlib.suppress(OSError):
                self.look()

    def end(self) -> None:
        self._over.set()
        self.hide()


@contextlib.contextmanager
def saying_what_is_loaded(quiet: bool = False) -> Iterator[None]:
    """Show what is being loaded while this lasts; nothing where nobody watches, or with ``quiet``."""
    if quiet or not screen.is_live():
        yield
        return
    line = _Line()
    thread = threading.Thread(target=line.watch, name="what is loaded", daemon=True)
    screen.hides.append(line.hide)
    with told_of_ends(line.hide):
        thread.start()
        try:
            yield
        finally:
            line.end()
            screen.hides.remove(line.hide)
            thread.join(timeout=1)
