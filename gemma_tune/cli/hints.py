"""Commands that a message proposes, on the run that this command works on.

Most messages are made where nobody knows of runs: in an adapter's reader, in a look at logits. Copied as it stands, a
command that names none would work on the newest run.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

# A command that works on a run, and names neither that nor a model up to its end.
_OPEN = re.compile(r"gemma-tune (?:prepare|train|tune|chat|eval|merge|export-ollama|run|status)(?![\w-])"
                   r"(?!(?:(?!gemma-tune )[^;`\n])* (?:--run|-r|--model|-m|--help)\b)")
_named: list[str] = []


def about(flags: Sequence[str] = ()) -> None:
    """Remember how the run of this command is named, such as ``--run DIR``; nothing, where it is not named."""
    _named[:] = flags


def in_run(text: str) -> str:
    """A text with the run in each command that names neither a run nor a model."""
    return _OPEN.sub(lambda found: " ".join([found[0], *map(shlex.quote, _named)]), text)
