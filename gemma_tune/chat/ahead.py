"""Loading who answers while the first question is typed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat.voice import Voice

_LOOKS_EVERY = 0.2  # seconds


class Ahead:
    """A voice that a thread of its own loads.

    Args:
        load: loads it, and raises UserError where it cannot.
    """

    def __init__(self, load: Callable[[], Voice]):
        self._found: Future[Voice] = Future()
        # A daemon: who leaves before it is loaded need not wait, see `gemma_tune.base.machine.end_at_once`.
        threading.Thread(target=self._run, args=(load,), name="loads the model", daemon=True).start()

    def _run(self, load: Callable[[], Voice]) -> None:
        try:
            self._found.set_result(load())
        except UserError as e:
            self._found.set_exception(e)
        except BaseException as e:  # noqa: BLE001 - for whoever waits, who takes EOFError and its kind for what is typed
            problem = WorkFailed(f"the model cannot be loaded: unexpected {type(e).__name__}: {e}",
                                 "repeat with --debug and report the traceback")
            problem.__cause__ = e
            self._found.set_exception(problem)

    @property
    def going_on(self) -> bool:
        """Whether it is still being loaded."""
        return not self._found.done()

    @property
    def failure(self) -> UserError | None:
        """Why it could not be loaded; None also while it is not known."""
        problem = None if self.going_on else self._found.exception()
        assert problem is None or isinstance(problem, UserError)
        return problem

    def wait(self) -> Voice:
        """The voice, when it is loaded.

        Raises:
            UserError: it cannot be loaded.
        """
        while True:
            with contextlib.suppress(TimeoutError):
                return self._found.result(timeout=_LOOKS_EVERY)  # Windows hears of Ctrl-C between two waits
