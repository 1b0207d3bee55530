"""``prepare``: the user's rows become checked conversations, split into training and validation.

Every input row ends up in exactly one of train.jsonl, valid.jsonl and rejected.jsonl; nothing is cut or dropped in
silence. The three files are replaced together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune import samples
from gemma_tune.chat_format import ChatFormat, Encoded, FormatError
from gemma_tune.data.formats import RowError, conversation
from gemma_tune.data.sources import Row, read_rows
from gemma_tune.errors import UserError
from gemma_tune.files import json_bytes, replacing_directory
from gemma_tune.models import load_format
from gemma_tune.stage import Finished, Session, StageReport, run_stage

SHOWN = 10  # problems printed; the rest is in rejected.jsonl


@dataclass(frozen=True)
class Good:
    """A usable row: its conversation and its encoding."""

    row: Row
    messages: list[dict[str, str]]
    encoded: Encoded


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used, and why."""

    row: Row
    code: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.row.file}:{self.row.line}: {self.reason}"

    def record(self) -> dict[str, Any]:
        """As it is kept in rejected.jsonl: nothing of the row is lost."""
        return {"file": self.row.file, "line": self.row.line, "code": self.code, "reason": self.reason,
                "fix": self.fix, "row": self.row.value}


def prepare(session: Session) -> StageReport:
    """Check, split and write the data.

    Raises:
        UserError: unreadable files, or more bad rows than allowed; earlier data stays as it is.
    """
    names = session.config.data or _recorded_names(session)
    files = source_files(names)
    # The manifest keeps paths relative to the run, so that both can be moved together.
    kept = tuple(session.run.relative(path) for path in files) if names else ()
    session = replace(session, resolved=replace(session.resolved, config=replace(session.config, data=kept)))
    return run_stage(session, "prepare", lambda s: _prepare(s, files),
                     {f"data_{n}": path for n, path in enumerate(files)})


def _recorded_names(session: Session) -> list[str]:
    """The files that this run was prepared from; preparing again without naming any means the same ones."""
    root = session.run.root.resolve()
    names = [os.path.relpath(os.path.normpath(root / name)) for name in session.settings_of("prepare").get("data", [])]
    if names:
        session.listener.note(f"data: {', '.join(names)}, as before; name files to use others")
    return names


def source_files(names: Sequence[str]) -> list[Path]:
    """Paths of the data; without names, the built-in example.

    Raises:
        UserError: every name that is not a file to read, all together.
    """
    if not names:
        return [samples.training_path()]
    paths = [Path(os.path.expanduser(name)) for name in names]
    problems = [problem for path in paths if (problem := _unreadable(path))]
    if problems:
        raise UserError(problems[0] if len(problems) == 1 else f"{len(problems)} data files cannot be read",
                        "check the paths; `gemma-tune prepare --help` shows an example",
                        problems if len(problems) > 1 else ())
    return paths


def _unreadable(path: Path) -> str | None:
    """Why a path is not a file to read. Asked before anything is hashed: a directory can be a whole disk."""
    if not os.path.exists(path):
        return f"there is no file {path}"
    if os.path.isdir(path):
        return f"{path} is a directory; name the files in it"
    if not os.path.isfile(path):  # a pipe could be read only once
        return f"{path} is not a regular file; save its content to a file first"
    return None if os.access(path, os.R_OK) else f"no permission to read {path}"


def _prepare(session: Session, files: Sequence[Path]) -> Finished:
    config = session.config
    chat = load_format(session.model.path, session.model.config["model_type"])
    session.listener.note(f"chat template: {chat.template_origin}; an answer ends with {chat.terminator}")
    good: list[Good] = []
    bad: list[Bad] = []
    for item in _judged(files, chat, config.max_length):
        (good if isinstance(item, Good) else bad).append(item)
    _refuse_too_many_bad(good, bad, config)
    for item in bad[:SHOWN]:
        session.listener.warn(f"rejected {item}")
    if len(bad) > SHOWN:
        session.listener.warn(f"… and {len(bad) - SHOWN} more, all in {session.run.rejected_rows}")
    train, valid = split(good, config.valid, config.seed)
    _write(session, train, valid, bad)
    summary = _summary(train, valid, bad, config.max_length)
    return Finished({"train_rows": session.run.train_rows, "valid_rows": session.run.valid_rows,
                     "rejected_rows": session.run.rejected_rows}, summary)


def _judged(files: Sequence[Path], chat: ChatFormat, max_length: int) -> Iterator[Good | Bad]:
    seen: dict[str, Row] = {}
    for path in files:
        for row in read_rows(path):
            try:
                if row.error:
                    raise RowError("broken_json", row.error, "repair the line, or leave it out")
                messages = conversation(row.value)
                _refuse_markers(messages, chat)
                _refuse_repeats(messages, row, seen)
                yield Good(row, messages, _encoded(messages, chat, max_length))
            except RowError as e:
                yield Bad(row, e.code, str(e), e.fix)


def _refuse_markers(messages: Sequence[dict[str, str]], chat: ChatFormat) -> None:
    """A marker of the template inside a text would end or open a turn in the middle of it."""
    for number, turn in enumerate(messages, start=1):
        for marker in chat.markers:
            if marker in turn["content"]:
                raise RowError("template_marker", f"turn {number} contains the chat template's own {marker}",
                               f"remove {marker} from the text")


def _refuse_repeats(messages: Sequence[dict[str, str]], row: Row, seen: dict[str, Row]) -> None:
    key = _digest(messages)
    if (first := seen.setdefault(key, row)) is not row:
        raise RowError("duplicate", f"the same conversation as {first.file}:{first.line}", "leave it out")


def _encoded(messages: list[dict[str, str]], chat: ChatFormat, max_length: int) -> Encoded:
    try:
        encoded = chat.encode(messages)
    except FormatError as e:
        raise RowError("template", str(e), "change the conversation so that the chat template takes it") from e
    if len(encoded.ids) > max_length:
        raise RowError("too_long", f"{len(encoded.ids)} tokens are more than --max-length {max_length}",
                       f"use --max-length {len(encoded.ids)}, or shorten the conversation")
    return encoded


def _refuse_too_many_bad(good: Sequence[Good], bad: Sequence[Bad], config: Any) -> None:
    total = len(good) + len(bad)
    real = [b for b in bad if b.code != "duplicate"]
    problems = [f"{b} ({b.fix})" for b in real[:20]]
    if len(real) > 20:
        problems.append(f"… and {len(real) - 20} more")
    if real and config.on_bad_row == "fail":
        raise UserError(f"{len(real)} of {total} rows cannot be used", "correct them, or use --on-bad-row reject",
                        problems)
    if not good:
        raise UserError(f"none of the {total} rows can be used", "correct the rows named above", problems)
    if len(real) / total > config.max_rejected:
        allowed = f"{config.max_rejected * 100:g} %"
        raise UserError(f"{len(real)} of {total} rows cannot be used, more than the {allowed} allowed",
                        "correct them, or allow more with --max-rejected 1", problems)


def split(rows: Sequence[Good], share: float, seed: int) -> tuple[list[Good], list[Good]]:
    """Training and validation rows, in the order of the files.

    Rows are ranked by a hash of their prompt and the seed, so the choice does not depend on their order, and rows
    with the same prompt stay on one side. Neither side is empty where there are two prompts and a share above zero.
    """
    groups: dict[str, list[int]] = {}
    for n, row in enumerate(rows):
        prompt = [turn for turn in row.messages if turn["role"] != "assistant"]
        groups.setdefault(_digest([{"seed": str(seed)}, *prompt]), []).append(n)
    chosen: set[int] = set()
    if share > 0 and len(groups) > 1:
        wanted = min(max(1, round(len(rows) * share)), len(rows) - 1)
        ranked = [members for _, members in sorted(groups.items())]
        for members in ranked:
            if len(chosen) + len(members) <= wanted:
                chosen.update(members)
        if not chosen:  # every prompt has more rows than wanted
            chosen.update(min(ranked, key=len))
    return [r for n, r in enumerate(rows) if n not in chosen], [r for n, r in enumerate(rows) if n in chosen]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _write(session: Session, train: Sequence[Good], valid: Sequence[Good], bad: Sequence[Bad]) -> None:
    run = session.run
    with replacing_directory(run.data) as folder:
        for path, records in ((run.train_rows, [{"messages": r.messages} for r in train]),
                              (run.valid_rows, [{"messages": r.messages} for r in valid]),
                              (run.rejected_rows, [b.record() for b in bad])):
            with open(folder / path.name, "wb") as f:
                f.writelines(json_bytes(record) for record in records)


def _summary(train: Sequence[Good], valid: Sequence[Good], bad: Sequence[Bad], max_length: int) -> dict[str, Any]:
    lengths = sorted(len(r.encoded.ids) for r in [*train, *valid])
    percentile = {f"p{p}": lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (50, 90, 99)}
    return {
        "rows": len(train) + len(valid) + len(bad), "train_rows": len(train), "valid_rows": len(valid),
        "rejected_rows": len(bad), "rejected_by_reason": dict(Counter(b.code for b in bad)),
        "turns": sum(len(r.messages) for r in [*train, *valid]),
        "tokens": sum(lengths), "trained_tokens": sum(r.encoded.trained for r in [*train, *valid]),
        "shortest": lengths[0], "longest": lengths[-1], **percentile, "max_length": max_length,
    }
