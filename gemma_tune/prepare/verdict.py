"""What ``prepare`` says about the rows, and when it refuses to go on with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemma_tune.base import shell
from gemma_tune.base.checkpoint import context_length
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, near
from gemma_tune.config.settings import value_in_words
from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.problems import in_words
from gemma_tune.data.conversations.uneven import IN_WORDS
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.ollama.template import layout_of, tools_are_lost
from gemma_tune.prepare.ends import MOST, SHORTEST, are_few
from gemma_tune.prepare.files import DataFiles, Decided
from gemma_tune.prepare.findings import Findings
from gemma_tune.prepare.judge import SPLIT, Judge
from gemma_tune.prepare.markup import ENTITIES, TAGS
from gemma_tune.prepare.noticed import Noticed
from gemma_tune.prepare.selection import Selection
from gemma_tune.prepare.split import FEWEST
from gemma_tune.run.manifest import CONVERSATIONS, JUDGED, PAIRS
from gemma_tune.run.session import Session

_HOW = ("format", "columns", "roles", "turn_keys", "take")  # settings of how rows are read
_PREFERENCE = {"chosen", "rejected", "label"}  # columns of rows that are read as preferences, whatever they are called
_MARKUP = {ENTITIES: "names for characters", TAGS: "tags"}
SHOWN = 10  # rejected rows that are printed; all are in rejected.jsonl
NAMED = 20  # faults that a failure names


def explain(judge: Judge, noticed: Noticed, config: PrepareConfig, listener: Listener) -> None:
    """How the rows were read, and what the chat template makes of them."""
    template = judge.chat.template
    for name, rows in noticed.formats.most_common():
        listener.note(f"format: {judge.formats.describe(name)}: {counted(rows, 'row')}")
    for (question, answer), rows in noticed.usual.items():
        listener.note(f"`{question}` is taken for the question and `{answer}` for the answer to learn, as nothing else "
                      f"is in {counted(rows, 'row')}; --columns user=…,assistant=… says otherwise")
    by_names = {"columns", *(["preference"] if _PREFERENCE & {*config.column_names} else [])}
    if config.column_names and noticed.formats and by_names.isdisjoint(noticed.formats):
        named = ", ".join(f"`{name}`" for name in config.column_names.values())
        listener.warn(f"--columns names {named}, and no row is read by that: a row that has none of the columns of "
                      "questions and answers is read by its own format")
    if noticed.folded:
        listener.note(f"the chat template has no place for a system message: in {counted(noticed.folded, 'row')} it is "
                      "put before the first user turn")
    for done, rows in noticed.mended.items():
        listener.note(f"in {counted(rows, 'row')} {IN_WORDS[done]}")
    if noticed.rewritten:
        listener.note(f"{counted(noticed.rewritten, 'row becomes', 'rows become')} several sequences, so that each "
                      f"answer is learned after the prompt that it will have: {noticed.difference}")
    if noticed.trimmed:
        listener.note(f"in {counted(noticed.trimmed, 'row')} the chat template leaves out white space at the beginning "
                      f"or end of a text, such as an indent; the first is {noticed.first_trimmed}")
    if noticed.padded:
        listener.note(f"in {counted(noticed.padded, 'row')} a text begins or ends with white space, which the chat "
                      "template keeps and the model reads or learns")
    if noticed.unanswered:
        listener.note(f"in {counted(noticed.unanswered, 'row')} a tool is called and the user goes on without its "
                      f"result, which is learned so; the first is {noticed.first_unanswered}: if what the user says "
                      "there is the result, give that turn the role `tool`")
    for kind, rows in noticed.markup.rows.items():
        listener.note(f"in {counted(rows, 'row')} a text has HTML's {_MARKUP[kind]} outside code, as web pages leave "
                      f"them, which are learned as they stand; the first is {noticed.markup.first[kind]}")
    if seen := noticed.pictures.moving:
        listener.note(f"{counted(seen, 'row has', 'rows have')} a picture of several frames or pages, of which the "
                      f"model is shown the first; the first such row is {noticed.pictures.first_moving}")
    if noticed.kinds[PAIRS] and config.on_long == "split":
        listener.note("a pair cannot be divided: one that is too long is left out, as with --on-long drop")
    if "strftime_now" in template:
        listener.warn("the chat template writes today's date into every prompt; on another day prompts differ from "
                      "what is learned")
    if noticed.reasoning and config.thinking == "auto" and "enable_thinking" in template:
        listener.note(f"{counted(noticed.reasoning, 'row holds', 'rows hold')} reasoning; --thinking on asks for it in "
                      "every prompt")
    if noticed.unthought:
        have = counted(noticed.unthought, "row has", "rows have")
        listener.note(f"the model's prompt begins a thought, and {have} an answer without reasoning: it is learned "
                      "behind an empty thought")
    if noticed.tools and (lost := _lost_in_ollama(judge.chat, noticed.tools)):
        listener.warn(lost)


def _lost_in_ollama(chat: ChatFormat, rows: int) -> str | None:
    """What `export-ollama` will say of rows with tools."""
    try:
        return tools_are_lost(layout_of(chat), rows)
    except UserError:  # the template cannot be exported at all, which is another matter
        return None


@contextmanager
def kept_when_refused(files: DataFiles, session: Session) -> Iterator[None]:
    """If the rows are refused, what is wrong with each stays in a file of the run, for them to be repaired; and it is
    told how rows of this run were read before, as that does not hold for data that are named anew."""
    try:
        yield
    except UserError as e:
        files.keep_rejected(session.run.refused_rows)
        if options := _read_before(session):
            e.reword(e.message, f"{e.hint}; before, this run's data were read with {options}")
        raise


def _read_before(session: Session) -> str:
    """Options by which the run's rows were read the last time, and are not now."""
    before = session.settings_of("prepare")
    free = {name: before.get(name) for name in _HOW if session.resolved.origins[name] == "default"}
    return " ".join(f"--{name.replace('_', '-')} {shell.quote(value_in_words(value))}"
                    for name, value in free.items() if value)


def refuse(findings: Findings, config: PrepareConfig, refused: Path, long_rows: Callable[[], str | None]) -> None:
    """Stop if too many rows are bad.

    Args:
        refused: where all of them can be looked up then.
        long_rows: a sentence on what the limit of the length costs.

    Raises:
        UserError: with the first of them.
    """
    bad, total, long = findings.rejected, findings.rows, findings.long
    if long and config.on_long == "fail":
        raise UserError(f"{long:,} of {counted(total, 'row')} are longer than --max-length {config.max_length}",
                        f"use --on-long {'drop' if findings.kind == PAIRS else 'split or drop'}, or a larger "
                        "--max-length",
                        [str(item) for item in findings.long_examples])
    if bad and config.on_bad_row == "fail":
        raise UserError(f"{bad:,} of {counted(total, 'row')} cannot be used",
                        "correct them, or use --on-bad-row reject", _listed(findings, refused))
    # With the others a longer row can be used, and each that is not has its own sentence below.
    problems = [*filter(None, [long_rows() if long and config.on_long == "drop" else None])]
    wider = ""
    if 2 * long > bad:
        divisible = any(SPLIT in item.problems[0].fix for item in findings.long_examples)
        wider = f"use a larger --max-length{SPLIT if divisible else ''}"
    fix = _fix_of_most(findings) or wider or "correct the rows named above"
    if elsewhere := findings.noticed.pictures.elsewhere():
        problems, fix = [*problems, elsewhere[0]], elsewhere[1]
    if bad == total:
        raise UserError("the only row cannot be used" if total == 1 else f"none of the {total:,} rows can be used",
                        fix, [*problems, *_listed(findings, refused)])
    if bad / total > config.max_rejected:
        allowed, needed = f"{config.max_rejected * 100:g} %", _share(bad, total)
        other = wider or (fix if "--" in fix else "correct them")
        hint = f"{other}, or go on without them: --max-rejected {needed:g}"
        if elsewhere or findings.noticed.usual and fix.startswith("use --columns "):  # which all of that table have
            hint = fix
        raise UserError(f"{bad:,} of {counted(total, 'row')} cannot be used, more than the {allowed} allowed", hint,
                        [*problems, *_listed(findings, refused)])
    _refuse_unknown_columns(findings, config)
    _refuse_a_mixture(findings)


def _fix_of_most(findings: Findings) -> str | None:
    """What mends more than half of the rejected rows; None where no single thing does."""
    fixes = Counter(item.problems[0].fix for item in findings.examples)
    fix, rows = fixes.most_common(1)[0] if fixes else ("", 0)
    return fix if 2 * rows > len(findings.examples) else None


def _share(rows: int, total: int) -> float:
    """What --max-rejected has to be for so many rows, all of them at most, to be left out."""
    return math.ceil(100 * min(rows, total) / total) / 100


def _listed(findings: Findings, refused: Path) -> list[str]:
    """Rejected rows with what to do; those with the same fault in one line."""
    groups: dict[str, list[str]] = {}
    for item in findings.examples:
        said = f"{in_words(item.problems)} ({item.problems[0].fix})"
        groups.setdefault(said, []).append(item.place)
    shown = list(groups.items())[:NAMED]
    lines = [f"{places[0]}{_and_more(places)}: {said}" for said, places in shown]
    more = findings.rejected - sum(len(places) for _, places in shown)
    if more:
        return [*lines, f"… and {more:,} more, all in {refused}"]
    return [*lines, f"each of them is in {refused}"] if findings.rejected > len(lines) else lines


def _and_more(places: list[str]) -> str:
    return f" and {counted(len(places) - 1, 'more row')}" if places[1:] else ""


_KINDS = {CONVERSATIONS: ("row to answer like", "rows to answer like"), PAIRS: ("pair of answers", "pairs of answers"),
          JUDGED: ("answer that is good or bad", "answers that are good or bad")}


def _refuse_a_mixture(findings: Findings) -> None:
    """A training learns either to answer, or which of two answers is better."""
    kinds, first = findings.noticed.kinds, findings.noticed.first_of_kind
    if len(kinds) < 2:
        return
    said = [f"{counted(kinds[kind], *names)}, the first at {first[kind]}" for kind, names in _KINDS.items()
            if kinds[kind]]
    if findings.kinds_of[True] and findings.kinds_of[True].isdisjoint(findings.kinds_of[False]):
        raise UserError("the rows for validation are of another kind than those to learn from",
                        "name a file of the same kind with --valid, or keep a share aside: --valid 0.1", said)
    # What is too long is of a kind, and stays out besides.
    without_pairs = findings.rows - kinds[PAIRS] + findings.long
    ways = ["--take chosen learns the better answers together with the other rows"]
    if kinds[JUDGED]:
        most = _share(kinds[JUDGED] + findings.rejected, findings.rows)
        ways[0] = (f"--take chosen --max-rejected {most:g} learns the better answers together with the other rows, but "
                   "for the bad ones")
    if kinds[PAIRS]:
        ways.append(f"--take pairs --max-rejected {_share(without_pairs, findings.rows):g} takes the pairs alone")
    raise UserError("the rows are of several kinds, which are not learned in one training",
                    f"{'; '.join(ways)}; or give each kind a file and a run of its own", said)


_OPTIONAL = {"system": "the system prompt", "context": "the context", "reasoning": "the reasoning",
             "tools": "the tools"}


def _refuse_unknown_columns(findings: Findings, config: PrepareConfig) -> None:
    """A row may lack a system prompt; if all do, its column's name is wrong."""
    noticed = findings.noticed
    for role, what in _OPTIONAL.items():
        name = config.column_names.get(role)
        if name and noticed.formats["columns"] and not noticed.named[role]:
            raise UserError(f"no row has the column `{name}`, which --columns names for {what}"
                            f"{near(name, noticed.columns)}",
                            f"the rows have {', '.join(f'`{c}`' for c in noticed.columns)}")


def refuse_empty_sides(selection: Selection, config: PrepareConfig, held_out: bool, texts: bool) -> None:
    """Stop if nothing is left to train on, or to validate with where that was asked for.

    Args:
        texts: all rows are plain texts.

    Raises:
        UserError: with what to ask for instead.
    """
    train, valid = (int((selection.kept & side).sum()) for side in (~selection.valid, selection.valid))
    if not train:
        raise UserError("no row is left for training: all that can be used is in the validation file as well",
                        "name other rows to train on, or keep a share aside: --valid 0.1")
    if held_out and not valid:
        raise UserError("no row of the validation file can be used",
                        "correct it, or keep a share of the data aside: --valid 0.1")
    if isinstance(config.valid, float) and config.valid >= 1 and config.valid >= train + valid:
        raise UserError(f"--valid {config.valid:,.0f} leaves no row for training: {train + valid:,} can be used",
                        "ask for a share: --valid 0.1 keeps the end of each text aside" if texts else
                        "ask for fewer, or for a share: --valid 0.1")


def warn(session: Session, decided: Decided, report: dict[str, Any]) -> None:
    """What is left out, and what to be careful about."""
    listener, findings, asked_twice = session.listener, decided.findings, decided.selection.asked_on_both_sides
    for item in findings.examples[:SHOWN]:
        listener.warn(f"rejected {item}")
    if (more := findings.rejected - SHOWN) > 0:
        listener.warn(f"… and {more:,} more, all in {session.run.rejected_rows}")
    if elsewhere := findings.noticed.pictures.elsewhere():
        listener.warn("; ".join(elsewhere))
    if unread := findings.noticed.pictures.unread:
        name = findings.noticed.pictures.first_unread
        listener.warn(f"{counted(unread, 'row holds', 'rows hold')} a picture in `{name}`, which is not read: call it "
                      f"`image`, or name it with --columns (images={name}), to have it learned")
    if unseen := findings.noticed.pictures.unseen:
        parts = counted(unseen, "part of a divided row is", "parts of divided rows are")
        listener.warn(f"{parts} learned without pictures that stand before {'it' if unseen == 1 else 'them'}: a larger "
                      "--max-length keeps them together, --on-long drop leaves such rows out")
    if both := report.get("pictures_on_both_sides"):
        listener.note(f"{counted(both, 'picture is', 'pictures are')} in training and validation rows, with other "
                      "questions: the validation loss says less about pictures that the model has not seen")
    if asked_twice:
        listener.warn(f"{counted(asked_twice, 'training row asks', 'training rows ask')} what validation rows ask; the "
                      "validation loss will look better than it is")
    if report["left_out_answers"]:
        left_out = counted(report["left_out_answers"], "answer of the rows that are used is",
                           "answers of the rows that are used are")
        listener.warn(f"{left_out} left out: too long to fit into --max-length {session.config.max_length}")
    longest = report["length"]["longest"]
    if (context := context_length(session.model.config)) and longest > context:
        listener.warn(f"there are sequences of up to {longest:,} tokens, and {session.model.id} was made for "
                      f"{context:,}: it can do little or nothing with what comes behind; --max-length {context} limits "
                      "them")
    if ends := report["ends_held_out"]:
        listener.note(_about_ends(ends, session.config.valid))
    elif isinstance(session.config.valid, float) and session.config.valid >= 1 and report["valid_rows"] and (
            are_few(texts := int((decided.columns.text[decided.selection.kept] > 0).sum()), MOST)):
        aside = int((decided.columns.text[decided.selection.kept & decided.selection.valid] > 0).sum())
        listener.note(f"--valid {session.config.valid:g} keeps {aside} of {counted(texts, 'text')} aside, whole; a "
                      "share, such as --valid 0.1, keeps the end of each")
    elif not report["valid_rows"] and session.config.valid:
        listener.warn(f"no rows for validation: {_why_none(decided, session.config.valid)}")
    elif report["valid_rows"] < FEWEST and session.resolved.origins["valid"] == "default":
        listener.note(f"{counted(report['valid_rows'], 'row is', 'rows are')} kept for validation, as there are few: "
                      "its loss says little about others; --valid sets another number")
    if 0 < (learned := report["trained_tokens_of_texts"]) < report["trained_tokens"]:
        listener.note(f"plain text makes {learned / report['trained_tokens']:.0%} of the tokens that are learned, "
                      "conversations the others")
    marks = report.get("marks")
    if report["kind"] == JUDGED and marks and not all(marks.values()):
        missing = next(name for name, rows in marks.items() if not rows)
        listener.warn(f"no answer is marked as {missing}: there is nothing to tell the others from")
    if report["duplicate_rows"]:
        left_out = counted(report["duplicate_rows"], "duplicate is left out; it is",
                           "duplicates are left out; they are")
        listener.note(f"{left_out} listed in {session.run.duplicate_rows}")


def _about_ends(ends: Sequence[Mapping[str, Any]], share: float) -> str:
    """Which parts of texts are kept aside."""
    places = [f"from {end['file']}:{end['from_line']} on" if end["from_line"] > end["line"] else
              f"of {end['file']}:{end['line']}" for end in ends]
    if len(places) == 1:
        return f"no text can be kept aside whole: the last {100 * share:g}% is for validation, {places[0]}"
    return f"there are too few texts to keep one aside whole: the last {100 * share:g}% of each is for validation, " + (
        f"{', '.join(places[:-1])} and {places[-1]}")


def _why_none(decided: Decided, share: float) -> str:
    if share < 1 and decided.are_texts:
        return (f"that needs a second text, or one whose last {100 * share:g}% has {SHORTEST} tokens; a larger share, "
                "or a file, is named with --valid")
    return "that needs two different prompts, or texts, at least"
