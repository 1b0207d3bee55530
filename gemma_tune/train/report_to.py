"""``--report-to``: which programs can be told how a training goes, by transformers' own list; no heavy import."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gemma_tune.base import shell
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
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    known, there = list(INTEGRATION_TO_CALLBACK), _there()
    problems, packages = [], []
    for name in names:
        if name not in known:
            problems.append(f"--report-to {name}: there is no such program{near(name, known)}")
        elif name not in there:
            # The list of what is there lacks some; each says by itself what it lacks.
            try:
                INTEGRATION_TO_CALLBACK[name]()
            except Exception as e:  # noqa: BLE001 - half of a package can fail in any way
                problems.append(f"--report-to {name}: {first_line(e)}")
                packages += _packages(name, e)
    if problems:
        hint = (f"install what is missing: pip install {shell.join(packages)}" if packages else
                f"those that there are: none, {', '.join(sorted(known))}")
        if len(problems) == 1:
            raise UserError(problems[0], hint)
        raise UserError(f"{counted(len(problems), 'program')} cannot be reported to", hint, problems)


def _there() -> list[str]:
    """What transformers finds here; nothing where one of them is there by half, which it looks at as well."""
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    try:
        return get_available_reporting_integrations()
    except Exception:  # noqa: BLE001 - as above
        return []


def _packages(name: str, problem: Exception) -> list[str]:
    """What to install, as an integration says it; where it names no command, the package is called as it is, and to
    install it again brings what it needs."""
    message = str(problem)
    named = re.findall(r"pip install ([\w.=<>~\[\]-]*[\w\]])", message)
    lacks = "installed" in message or isinstance(problem, ModuleNotFoundError)
    return named or ([name.replace("_", "-")] if lacks else [])
