"""The command line as a function, and rows for it."""

from __future__ import annotations

import functools
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # of the repository
MANIFEST_SCHEMA = json.loads((Path(__file__).parent / "manifest.schema.json").read_text())
# Those that a manifest has of every result of a stage.
SETTINGS = {stage: {name: {"value": value, "from": "default"} for name, value in settings.items()} for stage, settings in {
    "prepare": {"data": ["rows.jsonl"], "valid": 0.1}, "train": {"learning_rate": 2e-4, "rank": 16, "alpha": 32.0}}.items()}
QUICK = ("--epochs", 1, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-3)


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON object."""
        [line] = self.out.splitlines()
        return json.loads(line)


def invoke(*args: object, stdin: str | bytes | None = None) -> Result:
    """Run the real command line in this process."""
    import typer.testing

    from gemma_tune.cli.commands import app

    # Made of the functions' signatures once, as in a program, and not for every call.
    if not hasattr(typer.testing._get_command, "cache_info"):
        typer.testing._get_command = functools.cache(typer.testing._get_command)
    result = typer.testing.CliRunner().invoke(app, [str(a) for a in args], input=stdin)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Short conversations that differ."""
    return [{"messages": [{"role": "user", "content": f"Say number {n}."},
                          {"role": "assistant", "content": f"The number is {n}, no more."}]} for n in range(count)]


def write_rows(path: Path, records: list[Any]) -> Path:
    """Write JSONL."""
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return path


def copied_run(once: Path, tmp_path: Path, model: Path, data: str = "rows.jsonl") -> Path:
    """A copy of a run, and of the data beside it, in a test's own directory."""
    run = tmp_path / "runs" / once.name
    shutil.copytree(once, run)
    shutil.copy2(once.parent.parent / data, tmp_path)
    # The copy lies elsewhere, so the recorded relative path of the base model leads nowhere: name it once.
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["model"]["path"] = os.path.relpath(model, run)
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run
