"""Where the time before the first step goes."""

from __future__ import annotations

import time

from gemma_tune.base.words import span


class Startup:
    """Seconds of the parts of a training's start, in order, from now on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, part: str) -> None:
        """A part ends now; the next one begins."""
        now = time.perf_counter()
        self.seconds[part] = round(self.seconds.get(part, 0.0) + now - self._last, 2)
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all parts so far."""
        return sum(self.seconds.values())

    def described(self) -> str:
        """All parts in one line."""
        parts = ", ".join(f"{part} {_shown(seconds)}" for part, seconds in self.seconds.items())
        return f"ready for the first step after {_shown(self.total)}: {parts}"


def _shown(seconds: float) -> str:
    """To a tenth, as many parts are shorter than a second, and together would seem to be longer than all."""
    return f"{seconds:.1f} s" if seconds < 90 else span(seconds)
