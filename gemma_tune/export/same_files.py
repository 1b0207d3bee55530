"""Files of the last export that would be written again as they are: what Ollama alone is told stands beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.config.settings import asks_more, same_result
from gemma_tune.config.stages import ExportConfig
from gemma_tune.export.files import WRITTEN, ExportSource, sampling_metadata
from gemma_tune.export.sight import Sight
from gemma_tune.export.target import parse_parameters, with_sampling
from gemma_tune.run.directory import describe
from gemma_tune.run.session import Session
from gemma_tune.run.state import state_of

STAGE = "export-ollama"
# Settings that leave a GGUF as it is. Of the parameters, a file holds those of sampling, which are compared by
# themselves; the number formats are compared by what they came to.
_BESIDE = ("name", "system", "num_ctx", "parameter", "quant", "size", "vision", *same_result(ExportConfig))
_CHECKS = ("measure", "verify")


@dataclass(frozen=True)
class SameFiles:
    """What can stay of the last export.

    Attributes:
        files: the GGUF of each number format.
        figures: what the manifest has of each.
        summary: all of the export's summary.
        checked: whether they have been compared with the merged model as far as it is asked for now.
        settings: what the manifest has of the settings by which more was compared than is asked for now.
    """

    files: Mapping[str, Path]
    figures: Mapping[str, dict[str, Any]]
    summary: Mapping[str, Any]
    checked: bool
    settings: Mapping[str, dict[str, Any]]

    @property
    def written(self) -> dict[str, dict[str, Any]]:
        """Of the figures those that were there before any comparison."""
        return {quant: {name: item[name] for name in WRITTEN if name in item} for quant, item in self.figures.items()}

    def sees_as(self, sight: Sight | None, source: ExportSource) -> bool:
        """Whether pictures are read as the last export has it."""
        return ((sight.made is None and dict(sight.figures) if sight else None) == self.summary.get("projector")
                and source.text_alone == self.summary.get("text_alone", ""))


def same_files(session: Session, source: ExportSource, quants: Iterable[str]) -> SameFiles | None:
    """The files of the last export in the order of ``quants``, if these with the settings of now would give the same
    ones."""
    record = session.manifest.stages.get(STAGE)
    if session.force or record is None:
        return None
    figures = record["summary"].get("quants", {})
    now, before = session.config.as_dict(), session.settings_of(STAGE)
    others = {name for name, value in now.items() if name not in before or before[name] != value}
    if {*figures} != {*quants} or others - {*_BESIDE, *_CHECKS}:
        return None
    if _sampling(source, before["parameter"]) != _sampling(source, now["parameter"]):
        return None
    # Read whole: bits that changed on the disk would be recorded as those of the export. What the model sees with is
    # made and compared by itself, see `export.sight`.
    if state_of(session.run, session.manifest, STAGE,
                lambda run, path, item: dict(item) if path == run.projector else describe(run, path),
                upstream=False).status != "done":
        return None
    config = type(session.config)
    unchecked = [name for name in others & {*_CHECKS} if asks_more(config, name, before[name], now[name])]
    kept = {name: record["config"][name] for name in others & {*_CHECKS}
            if asks_more(config, name, now[name], before[name])}
    figures = {quant: figures[quant] for quant in quants}
    files = {quant: session.run.ollama / item["file"] for quant, item in figures.items()}
    # A report that is gone is made with what is found out for it.
    told = all((session.run.root / item["path"]).exists() for name, item in record["outputs"].items()
               if name != "projector")
    return SameFiles(files, figures, record["summary"], told and not unchecked, kept)


def _sampling(source: ExportSource, parameters: Iterable[str]) -> dict[str, float]:
    return sampling_metadata(with_sampling(source.merged, parse_parameters(tuple(parameters))))
