"""report.html: one file that shows a run to people, on a phone as well, without a network, in English and Chinese.

Texts of data and models are escaped by the template engine; a content security policy in the page allows no script but
its own, whose hash it names, and nothing from elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, write_atomic
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import size_text, span, without_commands
from gemma_tune.report.contents import contents
from gemma_tune.run.directory import RunDir, no_run, now
from gemma_tune.run.manifest import read_manifest

_FOLDER = Path(__file__).parent / "templates"


def write_report(run: RunDir) -> Path:
    """Write the run's report.html from what its manifest and files say now.

    Raises:
        UserError: there is no run, it is damaged, or it cannot be written.
    """
    manifest = read_manifest(run.root)
    if manifest is None:
        raise no_run(run.root)
    page = as_html({**contents(run, manifest), "made": now(), "version": __version__})
    with os_errors(run.root):
        write_atomic(run.html_report, page.encode("utf-8", "backslashreplace"))
    return run.html_report


def renew_report(root: Path) -> None:
    """Make the report.html that a run has anew, after a stage that it tells of; without one nothing happens.

    Where it cannot be written the old one stays, which says when it was made: no reason to fail what was done.
    """
    with contextlib.suppress(UserError):
        manifest = read_manifest(root)
        if manifest and (run := RunDir(root, manifest.model_name)).html_report.exists():
            write_report(run)


def as_html(values: dict[str, Any]) -> str:
    """The page.

    Args:
        values: as :func:`gemma_tune.report.contents.contents` gives them, with ``made`` and ``version``.
    """
    script = (_FOLDER / "report.js").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    style = (_FOLDER / "report.css").read_text(encoding="utf-8")
    return _template().render(**values, script=script, script_hash=digest, style=style)


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """What stands in double braces: control characters made visible, and no access tokens."""
        return without_commands(redact(value)) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, finalize=shown)
    environment.filters |= {"size": size_text, "span": span, "percent": lambda share: f"{100 * share:+.2f} %",
                            "count": lambda value: f"{value:,}"}
    return environment.get_template("report.html")
