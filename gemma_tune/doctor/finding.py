"""What a check found: works, is worth a look, or is broken, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import first_line

OK, LOOK, BROKEN = "ok", "look", "broken"


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was tried, such as ``training step, cpu bf16``.
        state: ``ok``; ``look``, which limits something and stops nothing that is needed; or ``broken``.
        found: in words, with figures.
        mend: a command or what to do; empty where nothing has to be done.
        raised: the exception behind it, for ``--debug``.
    """

    check: str
    state: str
    found: str
    mend: str = ""
    raised: BaseException | None = field(default=None, repr=False, compare=False)

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; texts that come from elsewhere can quote an address with its password."""
        return {name: redact(getattr(self, name)) for name in ("check", "state", "found", "mend")}


Check = Callable[[], Iterable[Finding]]


def tried(name: str, check: Check, state: str = BROKEN) -> Iterator[Finding]:
    """What ``check`` finds; a check that fails itself is a finding, and the next one goes on.

    Args:
        name: of the finding where the check fails.
        state: of that finding.
    """
    try:
        yield from check()
    except UserError as e:
        yield Finding(name, state, e.message, e.hint or "", e)
    except Exception as e:  # noqa: BLE001 - libraries that are broken raise whatever they like
        yield Finding(name, state, f"{type(e).__name__}: {first_line(e)}",
                      "gemma-tune doctor --debug shows where", e)
