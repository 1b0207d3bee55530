"""What a file's name says about its content."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.reading.rows import ARROW, CSV, JSON, PARQUET, TEXT, TSV
from gemma_tune.data.reading.text import compression

KINDS = {".jsonl": JSON, ".ndjson": JSON, ".json": JSON, ".csv": CSV, ".tsv": TSV, ".parquet": PARQUET, ".arrow": ARROW}
_TEXTS = (".txt", ".md", ".text")
AS_TEXT = ("plain text is learned from files that are named .txt or .md, each as one text, unless another --format is "
           'named; under other names with --format text, if all of the data is text, or as rows such as {"text": "…"}, '
           "one on each line of a .jsonl file; a table in a .txt file is read with --delimiter")
SAVED, DICT = "state.json", "dataset_dict.json"  # what `save_to_disk` writes beside a dataset, and beside its splits
# Files that describe a dataset, in its repository or beside what `datasets` has saved.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", DICT)
TEXT_FORMAT = "text"  # of the rows, where all of the data is plain text
_ABOUT = ("readme", "license", "licence")  # how texts begin that lie beside data to describe it

# What `prepare` leaves out, and why; also beside no manifest, where it refused the rows.
LEFT_OUT = ("rejected.jsonl", "duplicates.jsonl")
_RECORD = re.compile(rb'\{"file": ?".*?", ?"line": ?\d+, ?"(?:code|same_as)": ?"')
REPORT = "report.json"  # of a run's data, which stands beside its rows
_REPORTED = re.compile(rb'\{\s*"rows": ?\d+,\s*"train_rows": ?\d+')
_OPENING = 10_000  # bytes of a line that show what it is


class How(NamedTuple):
    """What people have said of the files.

    Args:
        delimiter: the sign between the columns of a table; what has no known ending then is one.
        encoding: of a text, by a name that Python has for it.
        format: of the rows (``--format``). Where it is open, or that of plain text, a file that is named as a text is
            one, if it does not begin with JSON.
        read_by: the options that say how rows are read, beside which no description of them counts.
    """

    delimiter: str | None = None
    encoding: str | None = None
    format: str | None = None
    read_by: tuple[str, ...] = ()

    @property
    def all_text(self) -> bool:
        """Whether all of the data is plain text."""
        return self.format == TEXT_FORMAT


UNSAID = How()


def how_of(config: PrepareConfig) -> How:
    """What the settings of `prepare` say of the files."""
    named = {"--format": config.format, "--columns": config.columns, "--roles": config.roles,
             "--turn-keys": config.turn_keys}
    return How(config.delimiter_sign, config.encoding, config.format, tuple(name for name in named if named[name]))


def kind_of(path: Path, how: How = UNSAID) -> str | None:
    """The kind of source that a name promises; None for one that promises none."""
    if is_text(path) and not how.delimiter and how.format in (None, TEXT_FORMAT):
        return TEXT
    return KINDS.get(_ending(path))


def is_text(path: Path) -> bool:
    """Whether a file has the name of a plain text, packed or not."""
    return _ending(path) in _TEXTS


def data_among(paths: Sequence[Path], how: How) -> list[Path]:
    """The data among files that were found together. Where some hold rows, a text is most likely about them, and is
    left alone unless all of the data is to be text."""
    named = [path for path in paths if kind_of(path, how) and not describes_data(path)]
    if how.all_text:
        return named
    return [path for path in named if not is_text(path)] or [path for path in named if not is_about_data(path)]


def is_about_data(path: Path) -> bool:
    """Whether a text has the name of one that describes what lies beside it."""
    return path.name.lower().startswith(_ABOUT)


def _ending(path: Path) -> str:
    return (path.with_suffix("") if compression(path) else path).suffix.lower()


def describes_data(path: Path) -> bool:
    """Whether a file is about a dataset, and holds none of its rows."""
    if path.name in LEFT_OUT:
        first = _opening(path, one_line=True)
        return first is not None and (not first or _RECORD.match(first) is not None)
    if path.name == REPORT:
        return _REPORTED.match(_opening(path) or b"") is not None
    if path.name == SAVED:
        return path.with_name("dataset_info.json").exists()
    return path.name in _DESCRIPTIONS or path.name.startswith("cache-") and path.suffix == ".arrow"


def _opening(path: Path, one_line: bool = False) -> bytes | None:
    """How a file begins; None where it cannot be read, which whoever takes it will say."""
    try:
        with open(path, "rb") as f:
            return f.readline(_OPENING) if one_line else f.read(_OPENING)
    except OSError:
        return None
