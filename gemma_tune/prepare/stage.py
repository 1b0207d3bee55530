"""``prepare``: the user's rows become checked conversations and their tokens, split into training and validation.

Every input row (with --max-samples, every one that is drawn) ends up in exactly one of train.jsonl, valid.jsonl,
rejected.jsonl and duplicates.jsonl, or with its beginning in the first and its end in the second (see ``ends``);
nothing is cut or dropped in silence. Two passes with constant memory (see ``passes``) do it. The files are replaced
together.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune import samples
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import fresh_path, new_directory
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import last_name
from gemma_tune.config.most_rows import as_text
from gemma_tune.config.settings import as_before, in_words
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.picture_files import require_folder
from gemma_tune.data.reading.dataset_info import file_of
from gemma_tune.data.reading.names import TEXT_FORMAT, how_of
from gemma_tune.data.reading.rows import TEXT
from gemma_tune.data.reading.sources import STDIN, Source, built_in, find_sources
from gemma_tune.encoding.chat_format import ChatFormat, NoTemplate
from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.labels import IGNORE_INDEX
from gemma_tune.encoding.templates import COMPLETION, NAMED, OWN, named_template
from gemma_tune.encoding.tokenizer import load_format, named_tokenizer, read_template
from gemma_tune.encoding.tokens import answers_of, encoding_key, open_tokens
from gemma_tune.gguf.architectures.parts import CONVERTER
from gemma_tune.models.known import known_config, other_task
from gemma_tune.models.quantised import quantisation, refuse_untrainable, sixteen_bit
from gemma_tune.prepare.drawing import limits_of, meant
from gemma_tune.prepare.judge import Judge
from gemma_tune.prepare.new_tokens import tell_of_new, warn_of_unseen, with_new_tokens
from gemma_tune.prepare.passes import passes
from gemma_tune.prepare.verdict import explain, kept_when_refused, refuse, refuse_empty_sides, warn
from gemma_tune.run.directory import PICTURES, command, describe
from gemma_tune.run.exportable import refuse_unexportable
from gemma_tune.run.foreign import refuse_foreign_in_data, refuse_inside_data
from gemma_tune.run.manifest import JUDGED, PAIRS, read_manifest
from gemma_tune.run.pictures import blind, keep_tried, kept_in, others_now
from gemma_tune.run.session import Session
from gemma_tune.run.stage import Finished, StageReport, as_recorded, locked, nothing_left_of, run_stage
from gemma_tune.run.state import NEEDS, state_of
from gemma_tune.run.stopped import SEQUENCES, has_other_rows, rows_of, unfinished, whole

_ANSWERS = {PAIRS: {1: "chosen", -1: "rejected"}, JUDGED: {1: "good", -1: "bad"}}  # names of the marks, for people


def prepare(session: Session, preview: int = 0, *, foretell: Callable[[Session, ChatFormat], None] | None = None,
            trains: bool = False, go_on: bool = False) -> StageReport:
    """Check, encode, split and write the data.

    Args:
        preview: show so many of the prepared sequences to the listener, also if all was up to date.
        foretell: called with the tokenizer and its chat template before any row is read, in place of saying what an
            export will refuse.
        trains: for a training that follows at once, so that one that was interrupted would go on with them.
        go_on: for a finished training that is to go on (``--continue``), which it does with its own data alone.

    Raises:
        UserError: unreadable files, more bad rows than allowed, or other data than a training goes on with; earlier
            data stays as it is.
    """
    session.require("prepare")
    _refuse_base(session)
    if kept := _without_its_files(session):
        if preview:
            _preview(session, preview, kept.summary.get("kind"), session.settings_of("prepare").get("new_tokens", ()))
        return kept
    session = with_new_tokens(_with_template(_as_before(session)))
    require_folder(session.config.pictures)
    sources, held_out = _sources(session)
    limits_of(sources, session.config.most_rows)
    anew = session.force
    named, template = session.config.chat_template, named_template(session.config.chat_template)
    session = replace(session, resolved=replace(session.resolved, config=_relative(session, sources, held_out)))
    refuse_inside_data(session.run, (source.path for source in sources + held_out))
    inputs = {f"data_{n}": source.path for n, source in enumerate(sources)}
    inputs |= {f"valid_{n}": source.path for n, source in enumerate(held_out)}
    described = {source.described.file for source in sources + held_out if source.described}
    inputs |= {f"description_{n}": path for n, path in enumerate(sorted(described))}
    if template and named not in NAMED:
        read_template(template)
        inputs["chat_template"] = template
    recorded = session.manifest.stages.get("prepare")
    if recorded and recorded["summary"].get("encoding") != encoding_key(recorded["base"]):
        session.listener.note("`prepare` runs again: other versions of the code or its libraries made the tokens")
        session = replace(session, force=True)
    elif recorded and (others := others_now(session.run, session.run.picture_files)):
        session.listener.note(f"`prepare` runs again: {others}")
        session = replace(session, force=True)

    def work(s: Session) -> Finished:
        made = _prepare(s, sources, held_out, template, foretell or _foretell_export)
        with nothing_left_of(made):
            if go_on:
                _refuse_other_than_learned(s, made)
            elif trains and not anew:
                _refuse_other_than_begun(s, made)
        return made

    report = run_stage(session, "prepare", work, inputs)
    _warn_of_stopped(session)
    if preview:
        _preview(session, preview, report.summary.get("kind"), session.config.new_tokens)
    return report


def chat_format(session: Session) -> ChatFormat:
    """What :func:`prepare` would make of this session's conversations; nothing is said or written.

    Raises:
        UserError: as of :func:`gemma_tune.encoding.tokenizer.load_format`, or transformers does not run the model.
    """
    known_config(session.model.path)
    session = with_new_tokens(_with_template(_as_before(replace(session, listener=Listener()))))
    try:
        return _loaded(session, named_template(session.config.chat_template))
    except NoTemplate:  # which is for `prepare` to refuse, unless all of the data is plain text
        return _loaded(session, named_template(COMPLETION))


def _loaded(session: Session, template: Path | None) -> ChatFormat:
    config = session.config
    return load_format(session.model.path, session.model.config["model_type"], config.thinking, template,
                       config.new_tokens)


def _warn_of_stopped(session: Session) -> None:
    """A training that was stopped goes on with the data that it began with alone."""
    run, manifest = session.run, read_manifest(session.run.root) or session.manifest
    marker = unfinished(run.checkpoints, manifest.finished_trainings)
    if marker and has_other_rows(run, manifest, marker):
        saved = whole(run.checkpoints)[-1].name
        session.listener.warn(f"a training that was stopped ({saved}) cannot go on with these data: prepare those that "
                              f"it began with to finish it, or start anew, as {command('status', run.root)} says")


def _refuse_base(session: Session) -> None:
    """What is known of a quantised base before any work.

    Raises:
        UserError: it cannot be trained on.
    """
    model = session.model
    if method := quantisation(model.config):
        refuse_untrainable(model.id, model.config, original := sixteen_bit(model))
        session.listener.warn(f"{model.id} is quantised ({method}): LoRA can be trained on it, but is merged into the "
                              f"16-bit model that it was made from: `gemma-tune merge --base {original or 'ID'}`")


# --- which data

def _as_before(session: Session) -> Session:
    """Preparing again without naming data means the same data in the same way, but for what is said now."""
    before = session.manifest.stages.get("prepare", {"config": {}})["config"]
    if session.config.data or not before:
        return session
    changes = as_before(session.resolved, before)
    changes["data"] = tuple(session.run.found(name) for name in before["data"]["value"])
    if isinstance(changes.get("valid"), str):
        changes["valid"] = session.run.found(changes["valid"])
    if template := changes.get("chat_template"):
        changes["chat_template"] = _found(session, template)
    if pictures := changes.get("pictures"):
        changes["pictures"] = session.run.found(pictures)
    if changes["data"]:
        session.listener.note(f"data: {', '.join(changes['data'])}, as before; name files to use others")
    if others := {name: value for name, value in changes.items() if name != "data"}:
        session.listener.note(f"settings as before: {in_words(others)}")
    return replace(session, resolved=session.resolved.but(changes, before))


def _with_template(session: Session) -> Session:
    """The chat template belongs to the model, and stays when other data are named."""
    record = session.manifest.stages.get("prepare", {"config": {}})["config"]
    before = session.settings_of("prepare").get("chat_template")
    if session.config.chat_template == OWN:
        return replace(session, resolved=session.resolved.but({"chat_template": None}, record))
    if not before or "chat_template" in session.given or not session.config.data:
        return session
    session.listener.note(f"chat template: {before}, as before; --chat-template {OWN} is the model's")
    return replace(session, resolved=session.resolved.but({"chat_template": _found(session, before)}, record))


def _found(session: Session, template: str) -> str:
    """A chat template that was recorded, as one names it now: where its file is gone, the run's own copy."""
    if template in NAMED:
        return template
    place, copy = session.run.found(template), session.run.chat_template
    return str(copy) if copy.exists() and not os.path.exists(place) else place


def _without_its_files(session: Session) -> StageReport | None:
    """What was prepared, where the same is wanted again and the files that it came from are gone, as in a run that was
    taken elsewhere; None if anything else is asked for, or would come out."""
    record = session.manifest.stages.get("prepare")
    if record is None or session.given or session.force:
        return None
    before = session.settings_of("prepare")
    named = (*before["data"], before["valid"], before.get("chat_template"), before.get("pictures"))
    places = [session.run.found(name) for name in named if isinstance(name, str) and not name.startswith("hf:")
              and name not in NAMED]
    gone = [place for place in map(file_of, places) if not os.path.exists(place)]
    same = record["summary"].get("encoding") == encoding_key(record["base"])
    if not gone or not same or state_of(session.run, session.manifest, "prepare").status != "done":
        return None
    session.listener.warn(f"{', '.join(gone)} {'is' if len(gone) == 1 else 'are'} gone; what was prepared from "
                          f"{'it' if len(gone) == 1 else 'them'} stays as it is")
    return as_recorded(session, "prepare")


def _sources(session: Session) -> tuple[list[Source], list[Source]]:
    """The data, and what is named for validation."""
    config, run, listener = session.config, session.run, session.listener
    names = list(config.data) or [str(samples.training_path())]
    if config.valid == STDIN and STDIN in names:
        raise UserError("standard input is named for training and for validation", "save one of them to a file")
    valid = [config.valid] if isinstance(config.valid, str) else []
    how = how_of(config)
    # What is piped is copied into the run, which nobody else may work on meanwhile.
    with locked(session, "prepare") if STDIN in (*names, *valid) else contextlib.nullcontext():
        sources, held_out = (find_sources(some, run.inputs, listener, how, some is valid) for some in (names, valid))
    known = {source.path.resolve() for source in sources}
    if twice := [source.name for source in held_out if source.path.resolve() in known]:
        raise UserError(f"{', '.join(twice)} is named for training and for validation",
                        "leave it out of one, or keep a share aside: --valid 0.1")
    return sources, held_out


def _relative(session: Session, sources: Sequence[Source], held_out: Sequence[Source]) -> PrepareConfig:
    """Settings with names relative to the run, so that both can be moved together."""
    copy = next((source.path for source in (*sources, *held_out) if source.name == "<stdin>"), None)

    def kept(name: str) -> str:
        if name.startswith("hf:"):
            return name
        return session.run.relative(copy if name == "-" and copy else Path(os.path.expanduser(built_in(name))))

    config = session.config
    data, most = tuple(map(kept, config.data)), config.max_samples
    if isinstance(most, str):
        arguments = {kept(source.argument) for source in sources}
        most = as_text((name and _end_of(kept(meant(name, sources)), arguments), rows)
                       for name, rows in config.most_rows.items())
    valid = kept(config.valid) if isinstance(config.valid, str) else config.valid
    template = config.chat_template
    if template and template not in NAMED:
        template = session.run.relative(named_template(template))
    pictures = session.run.relative(Path(os.path.expanduser(config.pictures))) if config.pictures else None
    return replace(config, data=data, valid=valid, max_samples=most, chat_template=template, pictures=pictures)


def _end_of(name: str, names: Collection[str]) -> str:
    """As much of the end of a path as none of the others has."""
    parts = Path(name).parts
    ends = (parts[-length:] for length in range(1, len(parts)))
    alone = (end for end in ends if sum(Path(other).parts[-len(end):] == end for other in names) == 1)
    return str(Path(*next(alone, parts)))


# --- the two passes

def _prepare(session: Session, sources: Sequence[Source], held_out: Sequence[Source], template: Path | None,
             foretell: Callable[[Session, ChatFormat], None]) -> Finished:
    config, run, listener = session.config, session.run, session.listener
    refuse_foreign_in_data(run)
    saved_as = other_task(known_config(session.model.path))
    try:
        chat = _loaded(session, template)
    except NoTemplate:
        if not _is_all_text(config, [*sources, *held_out]):
            raise
        config, template = replace(config, format=TEXT_FORMAT), named_template(COMPLETION)
        chat = _loaded(session, template)
        chat.template_origin = (f"`{COMPLETION}`, as {session.model.id} has none and plain text needs none: a prompt "
                                "is continued as it stands, also in `chat` and in Ollama")
    _tell_of_model(session, chat, saved_as)
    foretell(session, chat)
    pictures = kept_in(fresh_path(run.data) / PICTURES, session, chat, [*sources, *held_out], config.pictures)
    judge = Judge(chat, config, pictures, blind(session, chat))
    with new_directory(run.data) as folder, passes(session, sources, held_out, judge, folder) as work:
        work.check()
        explain(judge, work.findings.noticed, config, listener)
        with kept_when_refused(work.files, session):
            refuse(work.findings, config, run.refused_rows, work.long_rows)
        decided = work.decide()
        refuse_empty_sides(decided.selection, config, bool(held_out), decided.are_texts)
        report, tools = work.write(decided), work.findings.noticed.tools
        sequences = rows_of(folder / run.tokens.name)
        keep_tried(run, folder / run.picture_files.name, work.findings.noticed.pictures.tried)
        if template:
            shutil.copyfile(template, folder / run.chat_template.name)
    run.refused_rows.unlink(missing_ok=True)
    warn(session, decided, report)
    warn_of_unseen(listener, chat, folder / run.tokens.name)
    listener.data_report(report)
    outputs = {"train_rows": run.train_rows, "valid_rows": run.valid_rows, "tokens": run.tokens,
               "rejected_rows": run.rejected_rows, "duplicate_rows": run.duplicate_rows,
               "data_report": run.data_report, **({"chat_template": run.chat_template} if template else {}),
               **({"pictures": run.pictures} if "pictures" in report else {})}
    return Finished(outputs, _summary(report) | {"tool_rows": tools, "text_rows": report["formats"].get("text", 0),
                                                 SEQUENCES: sequences,
                                                 "encoding": encoding_key(session.model.fingerprint)},
                    {run.data: folder})


def _refuse_other_than_learned(session: Session, made: Finished) -> None:
    run, learned = session.run, session.manifest.stages.get("train", {"inputs": {}})["inputs"]
    for name, (_, output) in NEEDS["train"].items():
        path = made.outputs[output]
        if name in learned and describe(run, path, lies_at=made.lies_at(path))["sha256"] != learned[name]["sha256"]:
            raise UserError("--continue goes on with the rows that the finished training learned, and these are others",
                            "leave DATA out to go on; or leave --continue out, and learn these")


def _refuse_other_than_begun(session: Session, made: Finished) -> None:
    run, manifest = session.run, session.manifest
    marker = unfinished(run.checkpoints, manifest.finished_trainings)
    if marker and made.summary[SEQUENCES] != marker["rows"]:
        back = ", once those that it began with are prepared again" if has_other_rows(run, manifest, marker) else ""
        saved, finish = whole(run.checkpoints)[-1].name, command("train", run.root)
        raise UserError(f"an interrupted training waits ({saved}), and cannot go on with these rows, which are others "
                        "than it began with; nothing is replaced",
                        f"to finish it{back}: {finish}; to give it up and learn these: --force")


def _tell_of_model(session: Session, chat: ChatFormat, saved_as: str | None) -> None:
    """Its chat template, and what may be wrong with either."""
    listener = session.listener
    listener.note(f"chat template: {chat.template_origin}; an answer ends with {chat.terminator}")
    tell_of_new(listener, chat)
    if marks := chat.marks_of_others:
        listener.warn(f"the chat template writes {' and '.join(marks)}, which this model's vocabulary does not have: "
                      "several tokens of text each time")
    if saved_as:
        listener.warn(f"{session.model.id} was saved as a {saved_as}, which writes no text: is it the model that is "
                      "meant?")


def _is_all_text(config: PrepareConfig, sources: Sequence[Source]) -> bool:
    """Whether no conversation can be among the rows."""
    return config.format == TEXT_FORMAT or all(source.kind == TEXT for source in sources)


def _foretell_export(session: Session, chat: ChatFormat) -> None:
    """Say now what would be found out in the end."""
    try:
        refuse_unexportable(session.model, chat)
    except UserError as e:
        why = ": ".join([e.message.rstrip("."), *(["; ".join(e.problems)] if e.problems else [])])
        if e.hint == CONVERTER:
            session.listener.note("for later: `export-ollama` takes this model with llama.cpp's converter alone "
                                  f"(--converter PATH): {why}")
        else:
            mend = f". {e.hint[:1].upper()}{e.hint[1:]}" if e.hint else ""
            session.listener.warn(f"for later: `export-ollama` will not take this model: {why}{mend}")


# --- what is shown

def _preview(session: Session, count: int, kind: str | None, new_tokens: Sequence[str]) -> None:
    """The first training sequences as training sees them, of pairs both: text in pieces, each learned or not."""
    tokenizer, _ = named_tokenizer(session.model.path, new_tokens)
    sequences = open_tokens(session.run.tokens / "train.arrow")
    marks = answers_of(sequences)
    names = _ANSWERS.get(kind, {})
    shown, eye = min(count * (2 if kind == PAIRS else 1), len(sequences)), eye_of(session.model.path, tokenizer)
    rows = []
    for sequence in sequences.select(range(shown)):
        learned = sequence["labels"] != IGNORE_INDEX
        edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(learned)]
        rows.append([(_text(tokenizer, sequence["input_ids"][a:b], eye and eye.soft_id), bool(learned[a]))
                     for a, b in zip(edges, edges[1:])])
    session.listener.preview(rows, [names.get(int(mark), "") for mark in marks[:shown]])


def _text(tokenizer: Any, ids: np.ndarray, soft: int | None) -> str:
    """The text of ids. A token that stands hundreds of times for a picture is shown once, with its number."""
    edges = [0, *(np.flatnonzero(np.diff(ids == soft)) + 1).tolist(), len(ids)]
    return "".join(f"{tokenizer.decode([soft])} x {b - a}" if ids[a] == soft else tokenizer.decode(ids[a:b])
                   for a, b in zip(edges, edges[1:]))


def _lengths(figures: dict[str, Any]) -> dict[str, int]:
    return {"turns": figures["turns"],
            **{name: figures["length"][name] for name in ("shortest", "longest", "p50", "p90", "p99")}}


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of the report that the manifest keeps."""
    names = ("rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows", "rejected_by_reason", "sequences",
             "kind", "tokens", "trained_tokens")
    seen = ("picture_rows", "pictures", "picture_bytes", "picture_tokens")
    before = report["before_the_limit"]
    drawn = [{**part, "data": last_name(part["data"])} for part in report["drawn"]]  # no paths but relative ones
    return {**{name: report[name] for name in names}, **{name: report[name] for name in seen if name in report},
            "drawn": drawn, **_lengths(report),
            "before_the_limit": _lengths(before), "max_length": before["long"]["max_length"]}
