"""What is found out about a result after it was recorded, such as what a server makes of it, is added to its record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_tune.base.files import fresh_path, os_errors
from gemma_tune.base.secrets import redacted
from gemma_tune.run.directory import RunDir, describe
from gemma_tune.run.manifest import Manifest, read_manifest
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, locked, nothing_left_of, put_results


def result_id(manifest: Manifest, stage: str) -> tuple[str, ...]:
    """What tells a stage's result from every other one of it: when it was made, and of what."""
    record = manifest.stages[stage]
    return record["started"], record["ended"], *sorted(item["sha256"] for item in record["inputs"].values())


def amend(session: Session, report: StageReport, result: tuple[str, ...], figures: Mapping[str, Any],
          texts: Mapping[str, str]) -> StageReport:
    """Record further figures of a result, with texts for people that tell of them.

    Args:
        result: the :func:`result_id` that the figures are about; nothing is written if the run has another by now.
        figures: for the summary, in the place of those of the same names.
        texts: contents of outputs that no stage reads, by their names.

    Returns:
        The report with the figures.

    Raises:
        UserError: the run is in use, or cannot be written.
    """
    run, stage = session.run, report.stage
    with locked(session, stage), os_errors(run.root):
        manifest = read_manifest(run.root)
        if manifest is not None and stage in manifest.stages and result_id(manifest, stage) == result:
            _amend(run, manifest, stage, redacted(dict(figures)), texts)
    return replace(report, summary={**report.summary, **figures})


def _amend(run: RunDir, manifest: Manifest, stage: str, figures: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    record = manifest.stages[stage]
    paths = {name: run.root / record["outputs"][name]["path"] for name in texts}
    there = {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}
    if record["summary"] | figures == record["summary"] and there == {name: t.encode() for name, t in texts.items()}:
        return
    fresh = {path: fresh_path(path) for path in paths.values()}
    with nothing_left_of(Finished({}, {}, fresh)):
        for name, path in paths.items():
            fresh[path].write_bytes(texts[name].encode())
            record["outputs"][name] = describe(run, path, lies_at=fresh[path])
        record["summary"] |= figures
        manifest.announce(run)
    put_results(run, manifest, fresh)
