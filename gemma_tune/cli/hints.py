"""Commands that a message proposes, on the run that this command works on.

Most messages are made where nobody knows of runs: in an adapter's reader, in a look at logits. Copied as it stands, a
command that names none would work on the newest run.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_tune.base import shell

# A command that works on a run, and names neither that nor a model up to its end.
_OPEN = re.compile(r"gemma-tune (prepare|train|tune|chat|eval|merge|export-ollama|run|status)(?![\w-])"
                   r"(?!(?:(?!gemma-tune )[^;`\n])* (?:--run|-r|--model|-m|--help)\b)")
_BEGIN = ("prepare", "run")  # a run, which no record tells the model of
_named: dict[str, tuple[str, ...]] = {}


def about(run: str | None = None, begun_as: Sequence[str] = ()) -> None:
    """Remember which run this command works on.

    Args:
        run: its directory; None where nothing names it.
        begun_as: the options that name it and its model, where it is not there yet.
    """
    _named.clear()
    if run is not None:
        _named.update(dict.fromkeys(_BEGIN, tuple(begun_as)) if begun_as else {})
        _named[""] = ("--run", run)


def in_run(text: str) -> str:
    """A text with the run in each command that names neither a run nor a model."""
    def named(found: re.Match[str]) -> str:
        return shell.join(["gemma-tune", found[1], *_named.get(found[1], _named.get("", ()))])

    return _OPEN.sub(named, text)
