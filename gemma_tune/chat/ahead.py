"""Loading who answers while the first question is typed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from gemma_tune.chat.voice import Voice


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
        except BaseException as e:  # noqa: BLE001 - for whoever waits
            self._found.set_exception(e)

    @property
    def going_on(self) -> bool:
        """Whether it is still being loaded."""
        return not self._found.done()

    @property
    def failure(self) -> BaseException | None:
        """Why it could not be loaded; None also while it is not known."""
        return None if self.going_on else self._found.exception()

    def wait(self) -> Voice:
        """The voice, when it is loaded.

        Raises:
            UserError: it cannot be loaded.
        """
        return self._found.result()
