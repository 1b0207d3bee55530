"""``--report-to``: which programs can be told how a training goes, by transformers' own list; no heavy import."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted, first_line, near
from gemma_tune.encoding.tokenizer import quiet_libraries


def require(names: Sequence[str]) -> None:
    """Whether all of them can be reported to here, before anything is done.

    Raises:
        UserError: transformers knows no such program, or what it needs is not installed; all of them together.
    """
    if not names:
        return
    quiet_libraries()  # before their import
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    known, there = list(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    problems, packages = [], []
    for name in names:
        if name not in known:
            problems.append(f"--report-to {name}: there is no such program{near(name, known)}")
        elif name not in there:
            # The list of what is there lacks some; each says by itself what it lacks.
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except (RuntimeError, ImportError) as e:
                problems.append(f"--report-to {name}: {first_line(e)}")
                packages += _packages(name, str(e))
    if problems:
        hint = (f"install what is missing: pip install {shlex.join(packages)}" if packages else
                f"those that there are: none, {', '.join(sorted(known))}")
        if len(problems) == 1:
            raise UserError(problems[0], hint)
        raise UserError(f"{counted(len(problems), 'program')} cannot be reported to", hint, problems)


def _packages(name: str, message: str) -> list[str]:
    """What to install, as an integration says it; where it names no command, the package is called as it is."""
    named = re.findall(r"pip install ([\w.=<>~\[\]-]*[\w\]])", message)
    return named or ([name.replace("_", "-")] if "installed" in message else [])
