"""Which rows base and tuned model are compared on: validation rows, or a file's, laid out as in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_tune import samples
from gemma_tune.answers.prompts import Prompt, prompt_of
from gemma_tune.answers.thoughts import said
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted
from gemma_tune.data.usable import sampled
from gemma_tune.encoding.chat_format import ChatFormat, Encoded, FormatError
from gemma_tune.encoding.sequences import Encoder, Outcome, PreparedRow
from gemma_tune.encoding.tokens import digest, digests_of, open_tokens
from gemma_tune.evaluate.pictures import shown_in_file, tell_of_unread
from gemma_tune.evaluate.preferences import Preferences, better_of, preferences_of, wanted_of_sequence
from gemma_tune.measure.likelihood import Wanted
from gemma_tune.run.directory import command
from gemma_tune.run.pictures import unreadable
from gemma_tune.run.prepared import HOW_ROWS_ARE_LAID_OUT, NOTHING_HELD_OUT, is_example, prepared_as
from gemma_tune.run.prompts import prompt_limit
from gemma_tune.run.row_file import RowFile
from gemma_tune.run.session import Session

FILE = RowFile("data", use="measure on", used="measured on", own="take the validation rows: --data valid",
               again="an evaluation")
_ALL = 1 << 40
_PART_ASIDE = 4  # no more than one row in so many is proposed to be kept aside


@dataclass(frozen=True)
class Question:
    """What both models answer.

    Args:
        prompt: everything before the answer.
        reference: the answer that the row has, as the model would write it; None where none is known.
        final: the same without what was thought before it.
        judged: whether its answer is to have the form that the built-in example teaches.
    """

    prompt: Prompt
    reference: str | None = None
    final: str | None = None
    judged: bool = False


@dataclass(frozen=True)
class Chosen:
    """The rows to compare on.

    Args:
        sequences: what is predicted, and ``row_of`` (n,), the number of the row that each belongs to; of a single text
            its pieces count as rows, or chance would have nothing to draw.
        rows: how many rows are measured, and ``there``, how many there are.
        questions: those that are answered.
        preferences: better and worse answers, of rows that hold such; of these ``sequences`` are the better ones.
    """

    sequences: list[Wanted]
    row_of: np.ndarray
    rows: int
    there: int
    questions: list[Question]
    preferences: Preferences | None = None

    @property
    def pictures(self) -> list[str]:
        """Names of the files of all pictures in what is predicted and asked, each once."""
        predicted = [*self.sequences, *(self.preferences.sequences if self.preferences else [])]
        asked = [question.prompt for question in self.questions]
        return [*dict.fromkeys(name for one in (*predicted, *asked) for name in one.pictures)]


def nothing_to_measure(session: Session) -> str | None:
    """Why a prepared run has nothing to compare base and tuned model on; None if it has something."""
    if session.config.data_file or is_example(session.manifest) or (
            next(_lines(session.run.valid_rows), None) is not None):
        return None
    return NOTHING_HELD_OUT


def choose(session: Session, chat: ChatFormat) -> Chosen:
    """Rows to measure on, and which of them are asked.

    Raises:
        UserError: there are none, or a file of them cannot be used.
    """
    config = session.config
    if reason := nothing_to_measure(session):
        raise UserError(reason, "prepare again with --valid 0.1, or name rows with --data FILE")
    encoder = Encoder(chat, **{name: getattr(prepared_as(session, HOW_ROWS_ARE_LAID_OUT), name)
                               for name in HOW_ROWS_ARE_LAID_OUT})
    limit = config.limit or _ALL
    examples, there = (_of_file if config.data_file else _of_run)(session, encoder, limit)
    preferences = _preferences(session, encoder, examples)
    rows = _fitting(session, _laid_out(session, examples, encoder))
    if there > limit:
        session.listener.note(f"{len(examples):,} of {there:,} rows are measured; --limit 0 takes all")
    if config.data_file:
        _tell_trained(session, rows)
    sequences, row_of = [], []
    for n, (_, outcome) in enumerate(rows):
        for wanted in map(wanted_of_sequence, outcome.kept):
            if wanted is not None:
                sequences.append(wanted)
                row_of.append(n)
    questions = _questions(session, chat, rows, limited=there > limit)
    if not (sequences or questions or preferences and preferences.sequences):
        raise UserError("nothing in the rows can be predicted or asked", "name others with --data FILE")
    measured = len(examples) if preferences else len(set(row_of))
    if len(rows) == 1 and "text" in rows[0][0]:
        row_of = [*range(len(sequences))]
    return Chosen(sequences, np.array(row_of, np.int64), measured, there, questions, preferences)


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        yield from (line for line in lines if line.strip())


def _of_run(session: Session, encoder: Encoder, limit: int) -> tuple[list[PreparedRow], int]:
    """Validation rows: `prepare` has checked them."""
    there = 0

    def read() -> Iterator[tuple[int, str]]:
        nonlocal there
        for line in _lines(session.inputs["valid_rows"]):
            there += 1
            yield there, line

    return [json.loads(line) for _, line in sorted(sampled(read(), limit, session.config.seed))], there


def _of_file(session: Session, encoder: Encoder, limit: int) -> tuple[list[PreparedRow], int]:
    with shown_in_file(session, encoder.chat) as showing:
        rows, there = FILE.rows(session, session.config.data_file, encoder, limit, showing, session.config.seed)
    if encoder.chat.eye is not None:
        tell_of_unread(session, [one.unread for one in rows])
    rows.sort(key=lambda one: (one.row.file, one.row.line))
    return [one.example for one in rows], there


def _laid_out(session: Session, examples: Sequence[PreparedRow], encoder: Encoder) -> list[tuple[PreparedRow, Outcome]]:
    """Conversations with their sequences; of pairs with the better answer, of judged answers the good ones."""
    found = [row for row in map(better_of, examples) if row is not None]
    try:
        outcomes = encoder.encode(found)
    except OSError as e:
        raise unreadable(session.run, e) from e
    if failed := next((outcome for outcome in outcomes if isinstance(outcome, FormatError)), None):
        raise UserError(f"a validation row cannot be rendered: {failed}", "prepare and train again") from failed
    return list(zip(found, outcomes, strict=True))


def _preferences(session: Session, encoder: Encoder, examples: Sequence[PreparedRow]) -> Preferences | None:
    found = preferences_of(examples, encoder)
    if found and found.left_out:
        told = counted(found.left_out, "row of preferences is", "rows of preferences are")
        session.listener.warn(f"{told} left out where answers are compared: an answer is longer than the training's "
                              f"limit of {encoder.max_length:,} tokens")
    return found


def _fitting(session: Session, rows: list[tuple[PreparedRow, Outcome]]) -> list[tuple[PreparedRow, Outcome]]:
    """Rows that are longer than those of the training count as such, and are told."""
    if longer := sum(not outcome.kept for _, outcome in rows):
        session.listener.warn(f"{counted(longer, 'row is', 'rows are')} longer than the training's limit of "
                              f"{prepared_as(session, HOW_ROWS_ARE_LAID_OUT).max_length} tokens; their loss is "
                              "left out")
    return rows


def _questions(session: Session, chat: ChatFormat, rows: Sequence[tuple[PreparedRow, Outcome]],
               limited: bool = False) -> list[Question]:
    """Prompts of the rows, from all over them, as long as those in training; of the example its own before them.

    Args:
        limited: whether there are more rows than were asked for, which is why there are so few prompts.
    """
    count = session.config.questions
    chats = [(example, outcome) for example, outcome in rows if "messages" in example]
    if texts := len(rows) - len(chats):
        told = counted(texts, "row of plain text has no question to ask: its loss alone is",
                       "rows of plain text have no question to ask: their loss alone is")
        session.listener.note(f"{told} measured")
    if len(chats) > count:
        chats = [chats[n] for n in np.linspace(0, len(chats) - 1, count).round().astype(int)]
    found = [_question(chat, example, outcome) for example, outcome in chats]
    if is_example(session.manifest) and not session.config.data_file:
        own = [Question(Prompt(q["messages"]), judged=True) for q in samples.heldout_questions()][:count]
        found = [*own, *(replace(question, judged=True) for question in found)]
    elif chats and len(chats) < count and not (session.config.data_file or texts or limited):
        there = counted(len(chats), "held-out prompt")
        session.listener.note(f"the run has {there}{_more_aside(session, count, len(chats))}")
    return _short_enough(session, chat, found)


def _tell_trained(session: Session, rows: Sequence[tuple[PreparedRow, Outcome]]) -> None:
    """Rows that were learned say little about others."""
    path = session.run.tokens / "train.arrow"
    learned = digests_of(open_tokens(path)) if path.is_file() else set()
    if known := sum(any(_digest(sequence) in learned for sequence in outcome.full) for _, outcome in rows):
        session.listener.warn(f"the training had {known:,} of {counted(len(rows), 'row')} itself: what is measured on "
                              "them is not held out")


def _digest(sequence: Encoded) -> bytes:
    return digest(sequence.ids, [name for name, _ in sequence.pictures])


def _more_aside(session: Session, wanted: int, there: int) -> str:
    """The command that keeps more rows aside, where there are enough: training needs most of them."""
    total = session.manifest.stages["prepare"]["summary"].get("rows") or 0
    more = min(wanted, total // _PART_ASIDE)
    if isinstance(session.settings_of("prepare").get("valid"), str) or more <= there:
        return ""
    return f"; {command('prepare', session.run.root, '--valid', str(more))} keeps more aside, to train anew"


def _question(chat: ChatFormat, example: PreparedRow, outcome: Outcome) -> Question:
    reference = reference_of(chat, outcome)
    return Question(prompt_of(example), reference, None if reference is None else _final_of(chat, outcome))


def reference_of(chat: ChatFormat, outcome: Outcome) -> str | None:
    """The last answer of a row, whole and decoded as a model's answer is; None where nothing ends it."""
    _, ids = _last_answer(outcome)
    return chat.said(chat.decoded(ids[:-1])) if ids and ids[-1] in chat.stop_ids else None


def _final_of(chat: ChatFormat, outcome: Outcome) -> str:
    """The same without what was thought before it, as answers are scored."""
    return said(chat, *_last_answer(outcome))


def _last_answer(outcome: Outcome) -> tuple[list[int], list[int]]:
    """The ids before the last answer of a row, and those of it."""
    sequence = outcome.full[-1]
    start, end = sequence.spans[-1]
    ids = [int(n) for n in sequence.ids[:end]]
    return ids[:start], ids[start:]


def _short_enough(session: Session, chat: ChatFormat, questions: Sequence[Question]) -> list[Question]:
    """Prompts as long as those in training, with room for an answer."""
    limit = prompt_limit(session, session.config.max_new_tokens)
    try:
        fitted = [question.prompt.fitted(chat, limit) for question in questions]
    except FormatError as e:
        raise UserError(f"a held-out prompt cannot be rendered: {e}", "prepare and train again") from e
    kept = [replace(question, prompt=prompt) for question, prompt in zip(questions, fitted) if prompt]
    if questions and not kept:
        raise UserError(f"the {len(questions)} held-out prompts are all longer than {limit} tokens",
                        "ask about more of them with --questions")
    if longer := len(fitted) - len(kept):
        session.listener.note(f"{counted(longer, 'held-out prompt is', 'held-out prompts are')} left out: longer than "
                              f"{limit} tokens")
    if parts := sum(len(p.messages) < len(q.prompt.messages) for p, q in zip(fitted, questions) if p):
        asked = counted(parts, "held-out prompt is asked without its first turns",
                        "held-out prompts are asked without their first turns")
        session.listener.note(f"{asked}: longer than {limit} tokens with them")
    return kept
