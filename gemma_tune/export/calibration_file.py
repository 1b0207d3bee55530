"""The file that ``export-ollama --calibration`` names: rows of any format that ``prepare`` reads, or plain text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted
from gemma_tune.config.settings import converted, types_of
from gemma_tune.config.stages import MOST_TOKENS, PrepareConfig
from gemma_tune.data.conversations.checks import TextChecks
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.reading.hub_rows import PREFIX
from gemma_tune.data.reading.rows import JSON
from gemma_tune.data.reading.sources import STDIN, Row, Source, find_sources, read_blocks
from gemma_tune.data.reading.text import TextFile, compression
from gemma_tune.encoding.chat_format import ChatFormat, FormatError
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.run.session import Session

_MOST_ROWS = 4096  # that are looked at, from all over a file
_PASSAGE = 8192  # characters of plain text that are taken as one row
_SHOWN = 20  # faults that a failure names


def with_file(session: Session) -> tuple[Session, dict[str, Path]]:
    """The session with the name of its calibration file as the manifest keeps it; the files behind it, by input name.

    Raises:
        UserError: there is no such file.
    """
    named = session.config.calibration_file
    if named is None:
        return session, {}
    sources = _sources(session, Listener())
    kept = named if named.startswith(PREFIX) else session.run.relative(Path(os.path.expanduser(named_file(session))))
    resolved = replace(session.resolved, config=replace(session.config, calibration=kept))
    return (replace(session, resolved=resolved, given=set(session.given) - {"calibration"}),
            {f"calibration_{n}": source.path for n, source in enumerate(sources)})


def named_file(session: Session) -> str:
    """The file's name from here: what was given is one, what the manifest has is relative to the run."""
    named = session.config.calibration_file
    return named if "calibration" in session.given else session.run.found(named)


def _sources(session: Session, listener: Listener) -> list[Source]:
    name = named_file(session)
    try:
        require_file(name)
        return find_sources([name], session.run.inputs, listener, _prepared_as(session).delimiter_sign)
    except UserError as e:
        if "calibration" in session.given:
            raise
        raise UserError(f"the rows that were calibrated by before: {e.message}",
                        "name others with --calibration FILE, or take those of the training: --calibration rows") from e


def require_file(name: str | None) -> None:
    """What can be known of ``--calibration`` without a run.

    Raises:
        UserError: there is no such file.
    """
    if name == STDIN:
        raise UserError("--calibration reads no standard input, as an export that is repeated reads the rows again",
                        "save them to a file, and name that")
    if name and not name.startswith(PREFIX):  # the Hub is asked when the rows are needed
        find_sources([name], Path())


def _prepared_as(session: Session) -> PrepareConfig:
    """The settings that the run's data was prepared with, as far as they say how rows are read."""
    kinds, before = types_of(PrepareConfig), session.settings_of("prepare")
    names = ("columns", "roles", "turn_keys", "delimiter", "take", "allow", "max_rejected")
    return PrepareConfig(**{name: converted(kinds[name], before[name]) for name in names if name in before})


def file_rows(session: Session, chat: ChatFormat) -> list[Mapping[str, np.ndarray]]:
    """Rows of the session's calibration file as ``input_ids``, laid out by the run's chat template.

    Of a long file some are looked at, from all over it.

    Raises:
        UserError: it cannot be read, or more of its rows cannot be used than ``prepare`` allowed.
    """
    config = _prepared_as(session)
    rows = _some(row for source in _sources(session, session.listener) for row in _rows_of(source, session))
    found, faults = _encoded(rows, chat, config)
    name = named_file(session)
    if not found or len(faults) / len(rows) > config.max_rejected:
        shown = [*faults[:_SHOWN], *([f"… and {len(faults) - _SHOWN:,} more"] if len(faults) > _SHOWN else [])]
        raise UserError(f"{len(faults):,} of {counted(len(rows), 'row')} of {name} cannot be used to calibrate by"
                        if rows else f"{name} holds no rows to calibrate by",
                        "correct them, or take those of the training: --calibration rows", shown)
    if faults:
        session.listener.warn(f"{counted(len(faults), 'row')} of {name} cannot be used to calibrate by; the first is "
                              f"{faults[0]}")
    return found


def _rows_of(source: Source, session: Session) -> Iterator[Row]:
    if source.kind == JSON and _is_text(source.path):
        line = 1
        for piece in TextFile(source, _PASSAGE):
            if piece.strip():
                yield Row(source.name, line, {"text": piece})
            line += piece.count("\n")
        return
    for block in read_blocks(source, listener=session.listener):
        yield from block.rows()


def _is_text(path: Path) -> bool:
    return (path.with_suffix("") if compression(path) else path).suffix.lower() == ".txt"


def _some(rows: Iterable[Row]) -> list[Row]:
    """At most so many rows, each with the same chance."""
    kept: list[Row] = []
    random = np.random.default_rng(0)
    for n, row in enumerate(rows):
        if n < _MOST_ROWS:
            kept.append(row)
        elif (at := int(random.integers(n + 1))) < _MOST_ROWS:
            kept[at] = row
    return kept


def _encoded(rows: Sequence[Row], chat: ChatFormat,
             config: PrepareConfig) -> tuple[list[Mapping[str, np.ndarray]], list[str]]:
    """Sequences of the rows, and what is wrong with the others, a line for each."""
    formats = Formats(None, config.column_names, config.take, config.role_names, config.key_names)
    checks = TextChecks(chat.markers, config.allow)
    found, faults, good, examples = [], [], [], []
    for row in rows:
        try:
            example = formats.example_of(row)
            if problems := checks.problems(example):
                raise RowError(problems)
        except RowError as e:
            faults.append(f"{row.file}:{row.line}: {'; '.join(f'{p.reason} ({p.fix})' for p in e.problems)}")
        else:
            examples.append(example.as_row())
            good.append(row)
    for row, outcome in zip(good, Encoder(chat, MOST_TOKENS).encode(examples), strict=True):
        if isinstance(outcome, FormatError):
            faults.append(f"{row.file}:{row.line}: {outcome}")
        else:
            found += [{"input_ids": sequence.ids} for sequence in outcome.full]
    return found, faults
