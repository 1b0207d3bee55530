"""From a row of any known format to an example: a conversation, or a text for continued training.

``layouts``, ``glaive`` and ``preference`` know the formats, ``turns`` and ``tools`` what a conversation is, and
``unnamed`` what to do about a row that has none of them. Here is decided which format a row has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from gemma_tune.base import strict_json
from gemma_tune.base.shell import of_posix
from gemma_tune.data.conversations import described, layouts, marks, pictures, preference, shapes, tools, unread
from gemma_tune.data.conversations.gemini import gemini, is_gemini
from gemma_tune.data.conversations.glaive import glaive, is_chat
from gemma_tune.data.conversations.indexed import is_vertex
from gemma_tune.data.conversations.logs import is_logged
from gemma_tune.data.conversations.names import Names
from gemma_tune.data.conversations.problems import Problem, RowError, damaged, kind, python_list
from gemma_tune.data.conversations.rendered import is_marked, is_rendered, rendered, with_prompt_apart
from gemma_tune.data.conversations.shaped import Shaped, without
from gemma_tune.data.conversations.turns import Turn, conversation
from gemma_tune.data.conversations.unnamed import found_columns, is_beside_text, no_object, unnamed, with_reference
from gemma_tune.data.reading.rows import Description, Row

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Example:
    """What is learned from one row. Of ``messages`` and ``text`` exactly one is there.

    Attributes:
        format: one of ``config.FORMATS``.
        messages: turns as ``turns`` describes them.
        tools: OpenAI's schemas, None where the row has none.
        text: for continued training, as the row has it.
        rejected: of a pair, the turns that ``messages`` would have in place of its answer.
        good: of a judged answer, whether it is a good one.
        unread: what the row has beside that, and nobody reads.
        mended: what was done about turns that did not alternate, of the keys of ``uneven.IN_WORDS``.
        usual: the columns that are taken for the question and the answer by their usual names alone.
    """

    format: str
    messages: list[Turn] | None
    tools: list[dict[str, Any]] | None
    text: str | None
    unread: tuple[unread.Unread, ...] = field(default=(), compare=False)
    rejected: list[Turn] | None = None
    good: bool | None = None
    mended: tuple[str, ...] = field(default=(), compare=False)
    usual: tuple[str, ...] = field(default=(), compare=False)

    def as_row(self) -> dict[str, Any]:
        """What is encoded of it: ``{"messages": […], "tools": […]}`` or ``{"text": "…"}``, as in train.jsonl.

        A pair also has ``rejected``, a judged answer ``kto_tag``.
        """
        if self.messages is None:
            return {"text": self.text}
        row: dict[str, Any] = {"messages": self.messages}
        if self.rejected is not None:
            row["rejected"] = self.rejected
        if self.good is not None:
            row[marks.MARK] = self.good
        return row | ({"tools": self.tools} if self.tools else {})


_REQUIRED = ("user", "assistant", "turns")  # what a row of named columns cannot lack

# How each format is recognised: from a row and its columns that are not empty. The first that fits is taken.
_HAS: dict[str, Callable[[Fields, Collection[str]], bool]] = {
    "preference": preference.is_preference,
    "messages": lambda row, keys: "messages" in keys and not is_logged(row),
    "sharegpt": lambda row, keys: ("conversations" in keys or is_chat(row.get("chat"))
                                   or isinstance(layouts.turn_list(row.get("conversation")), list)
                                   or python_list("", row.get("conversation"), turns=True) is not None),
    "gemini": lambda row, keys: is_gemini(row) and not is_vertex(row),
    # The instruction may be null where the input says it all.
    "alpaca": lambda row, keys: "instruction" in row and ("output" in keys or "response" in keys),
    "prompt-completion": lambda row, keys: "prompt" in keys and "completion" in keys,
    "rendered": lambda row, keys: "text" in keys and is_rendered(row["text"]),
    "text": lambda row, keys: "text" in keys,
}
_REASONS = {
    "preference": "`chosen` and `rejected` or another pair of answers, or one answer with a mark of good or bad",
    "messages": "a list `messages`, or the turns of UltraChat, BELLE, MOSS or a program's export, or the calls of xLAM",
    "sharegpt": "a list `conversations`, or Glaive's text `chat`",
    "gemini": "a list `contents` with `parts`",
    "alpaca": "`instruction` and `output`, or Dolly's `response`, or what Firefly, ms-swift and SQuAD call them",
    "prompt-completion": "`prompt` and `completion`, or the usual names of a question and its answer alone, "
                         "or turns as `input` with their `output`, or a request with its answer",
    "rendered": "a `text` that a chat template wrote, or that names who speaks: its turns are learned in the model's "
                "own template, and --format text keeps it as it is",
    "text": "`text` and no column of questions or answers; a file of plain text is one such row",
}
_READERS: dict[str, Callable[[Fields, list[Problem]], layouts.Draft]] = {
    "preference": preference.chosen,
    "messages": layouts.messages,
    "sharegpt": lambda row, problems: (glaive if is_chat(row.get("chat")) and row.get("conversations") is None
                                       else layouts.sharegpt)(row, problems),
    "gemini": gemini,
    "alpaca": layouts.alpaca,
    "prompt-completion": lambda row, problems: layouts.prompt_completion(with_prompt_apart(row), problems),
    "rendered": rendered,
}


class Formats:
    """Reads rows of the named format, or finds the format of each row by itself."""

    def __init__(self, name: str | None = None, columns: Mapping[str, str] | None = None, take: str | None = None,
                 roles: Mapping[str, str] | None = None, turn_keys: Mapping[str, str] | None = None,
                 mends: bool = False):
        """
        Args:
            name: one of ``config.FORMATS``; None finds the format row by row.
            columns: names of the columns by role: ``{"user": "question", "assistant": "answer"}``. Rows that have
                none of them may have another format, unless ``name`` says otherwise.
            take: ``chosen`` makes plain conversations of the better answers of preference rows, ``pairs`` refuses all
                other rows.
            roles: role by the name that turns have for it: ``{"bot": "assistant"}``.
            turn_keys: the keys of turns: ``{"role": "speaker", "content": "utterance"}``.
            mends: whether turns that do not alternate are made so.
        """
        self.name, self.columns, self.take, self.mends = name, dict(columns or {}), take, mends
        self._names = Names(roles or {}, turn_keys or {}, self.columns.get("turns"))

    @cached_property
    def _unnamed(self) -> dict[str | None, Formats]:
        """By their formats, what reads rows of which no option says more."""
        return {name: Formats(name, take=self.take, mends=self.mends) for name in ("text", None)}

    def describe(self, format: str) -> str:
        """A format with the reason for which a row is taken to have it."""
        reason = _REASONS.get(format) or " and ".join(f"`{name}`" for name in self.columns.values())
        return f"{format} (rows have {reason})"

    def example_of(self, row: Row) -> Example:
        """The checked example of a row as it stands in a file.

        Raises:
            RowError: everything for which it cannot be learned from, or that it could not be read.
        """
        if row.error:
            code = "broken_json" if row.error.startswith("not valid JSON") else "broken_row"
            repairs = (of_posix(how) for what, how in _REPAIRS.items() if what in row.error)
            raise RowError([Problem(code, row.error, next(repairs, "repair the line, or leave it out"))])
        if row.described is not None:
            return self._described(row.value, row.described)
        own = pictures.columns_of_folder(row.file, row.value)
        if not own or not {*own.values()}.isdisjoint(self.columns.values()):
            return self.example(row.value)
        try:
            return self.example({name: row.value[column] for name, column in own.items()}
                                | without(row.value, *own.values()))
        except RowError as error:
            raise shapes.called(error, own) from None

    def _described(self, value: Any, description: Description) -> Example:
        """The checked example of a row that is read as an entry says, whatever the others are."""
        formats = self._unnamed["text" if described.is_text(description) else None]
        value, own, _ = described.as_described(value, description)
        try:
            return formats.example(value)
        except RowError as error:
            raise shapes.called(error, own) from None

    def example(self, value: Any) -> Example:
        """The checked example of one row.

        Raises:
            RowError: everything for which it cannot be learned from.
        """
        if layouts.is_conversation(value):
            value = {"messages": value}
        if not isinstance(value, dict):
            raise RowError([no_object(value)])
        if self.columns.get("turns") not in value and (problem := shapes.by_columns(value)):
            raise RowError([problem])
        value, own, usual = self._shaped(value)
        try:
            example = self._read(value)
            return replace(example, usual=tuple(own.values())) if usual else example
        except RowError as error:
            if not own:
                raise
            raise shapes.called(error, own) from None

    def _shaped(self, row: Fields) -> Shaped:
        """The row in a known format, where it has a shape of its own. Whether it may have one is looked at where it
        seems so, as few rows do."""
        as_it_is = Shaped(row, {})
        if self.name is not None:
            return as_it_is
        try:
            found = shapes.shaped(row)
        except RowError:
            if self._may_be_shaped(row):
                raise
            return as_it_is
        return found if found.own and self._may_be_shaped(row) else as_it_is

    def _may_be_shaped(self, row: Fields) -> bool:
        """Whether neither an option nor the row's own columns say how it is read; BELLE's conversations look like
        Alpaca's rows."""
        named = any(name in row for name in self.columns.values())
        return not named and _among(row, _filled(row)) in (None, "alpaca")

    def _read(self, value: Fields) -> Example:
        """The checked example of a row in a known format."""
        value = self._names.applied(self._as_pair(value))
        if self.name in (None, "preference") and (problem := marks.unclear(value)):
            raise RowError([problem])
        format = self._format(value)
        if format == "text" and self.take != "pairs":
            return _text(value, self.name is not None)
        if self.take == "pairs" and (format != "preference" or marks.is_good(value) is not None):
            raise RowError([Problem("no_pair", "it has no better and worse answer, and --take pairs takes nothing else",
                                    "give it a file and a run of its own, without --take pairs")])
        problems: list[Problem] = []
        if format == "preference" and self.take != "chosen":
            return self._preference(value, problems)
        if format == "columns":
            draft = layouts.columns(value, self.columns, problems)
            if value.get(marks.MARK) is not None:
                problems.append(Problem("preference", f"`{marks.MARK}` marks good and bad answers, which named columns "
                                                      "would not tell apart",
                                        "call the columns `prompt` and `completion`, or leave the mark out"))
        else:
            draft = _READERS[format](value, problems)
        mended: list[str] = []
        messages = self._turns(draft, problems, mended, self._pictures(value, format, problems))
        declared = None if draft.tools is None else tools.declarations(draft.tools, problems)
        if problems:
            problems = with_reference(problems, value) if format == "messages" else problems
            raise RowError(_with_the_text_kept(problems, format, value))
        return Example(format, messages, declared or None, None,
                       unread.of_row(value, format, self.columns, draft.messages), mended=tuple(mended))

    def _turns(self, draft: layouts.Draft, problems: list[Problem], mended: list[str],
               shown: pictures.Column | None = None) -> list[Turn]:
        """The checked turns of a draft; ``mended`` takes what was done about those that do not alternate."""
        return conversation(draft.messages, problems, draft.key, mended=mended if self.mends else None, pictures=shown)

    def _pictures(self, row: Fields, format: str, problems: list[Problem]) -> pictures.Column | None:
        """The pictures in the row's columns; few rows have such."""
        named = self.columns.get("images") if format == "columns" else None
        if named is None and pictures.MEDIA.isdisjoint(row):
            return None
        if named is not None and named not in row and (others := [key for key in row if pictures.seems_one(row[key])]):
            problems.append(Problem("missing_column", f"the column `{named}` is missing, and `{others[0]}` has a "
                                                      "picture", "correct --columns, or leave the row out"))
        return pictures.beside("", row, problems, named)

    def _as_pair(self, row: Fields) -> Fields:
        """With the columns of a pair under the names that are known, where ``--columns`` names them; a prompt that is
        text is what the user says then, and no other column is part of it."""
        if "chosen" not in self.columns:
            return row
        known = {self.columns[role]: "prompt" if role == "user" else role for role in self.columns}
        named = {known.get(key, key): value for key, value in row.items() if key in known or key not in known.values()}
        text = layouts.turn_list(named.get("prompt"))
        if not isinstance(text, str) or python_list("", text, turns=True):
            return named
        return {**named, "prompt": [layouts.user(text)]}

    def _preference(self, value: Fields, problems: list[Problem]) -> Example:
        """A pair, or a judged answer."""
        rejected, good = None, marks.is_good(value)
        draft = preference.better(value, problems)
        mended: list[str] = []
        messages = self._turns(draft, problems, mended, self._pictures(value, "preference", problems))
        if good is not None:
            messages = preference.with_answer_alone(messages, preference.last_answer(messages))
        else:
            others: list[Problem] = []
            other = preference.worse(value, others)
            worse = self._turns(other, others, mended, self._pictures(value, "preference", others))
            problems += filter(None, [marks.tied(value)])
            problems = preference.of_either(problems, draft.key, others, other.key)
            if not problems and (pair := preference.pair_of(messages, worse, problems)):
                messages, rejected = pair
        declared = None if draft.tools is None else tools.declarations(draft.tools, problems)
        if not problems:
            problems += preference.answers_with_pictures(messages, rejected)
        if problems:
            raise RowError(_with_the_text_kept(list(dict.fromkeys(problems)), "preference", value))
        return Example("preference", messages, declared or None, None,
                       unread.of_row(value, "preference", self.columns, draft.messages), rejected, good,
                       tuple(dict.fromkeys(mended)))

    def _format(self, row: Fields) -> str:
        if self.name == "columns":
            return "columns"
        if self.name is not None:
            if not _HAS[self.name](row, row.keys()):
                raise RowError([Problem("unknown_format", f"not a row of the format `{self.name}`, which has "
                                                          f"{_REASONS[self.name]}; {found_columns(row)}",
                                        "leave --format out to have the format of each row found")])
            return self.name
        if "chosen" not in self.columns and any(
                column in row for role, column in self.columns.items() if role in _REQUIRED):
            return "columns"
        format = _detected(row)
        if format is not None:
            return format
        if self.columns and "chosen" not in self.columns:
            return "columns"
        raise RowError([unnamed(row, _is_known)])


_OWN_LINE = "give each value a line of its own, in all lines with "
_REPAIRS = {
    strict_json.COMMA: "leave out the comma, in all lines with sed 's/,[[:space:]]*$//' FILE.jsonl > rows.jsonl",
    strict_json.MORE: f"{_OWN_LINE}sed 's/,*[[:space:]]*$//; s/.*/[&]/' FILE.jsonl | jq -c '.[]' > rows.jsonl",
    strict_json.SECOND: f"{_OWN_LINE}jq -c . FILE.jsonl > rows.jsonl",
    strict_json.SINGLE: "write it as JSON, in all lines with python -c 'import ast, json, sys; [print(json.dumps("
                        "ast.literal_eval(line))) for line in sys.stdin if line.strip()]' < FILE.jsonl > rows.jsonl",
    strict_json.COMMENT: "leave comments out; lines of nothing else, with sed -E '/^[[:space:]]*(#|\\/\\/|\\/\\*)/d' "
                         "FILE.jsonl > rows.jsonl",
    strict_json.WIDE: 'around names and texts write " for “ and ”, : for ： and , for ，; within texts they may stay'}


def _detected(row: Fields) -> str | None:
    # Where rows of several formats share a table, the columns of the others are there and empty.
    return _among(row, _filled(row)) or _among(row, row.keys())


def _is_known(row: Fields) -> bool:
    """Whether a row that stands inside another one has a known format, or a shape that is known."""
    try:
        return _detected(row) is not None or bool(shapes.shaped(row).own)
    except RowError:  # of which can be said what to do about it
        return True


def _filled(row: Fields) -> set[str]:
    return {key for key, value in row.items() if value is not None}


def _among(row: Fields, keys: Collection[str]) -> str | None:
    """The format that a row has by these of its columns."""
    return next((format for format, has in _HAS.items() if has(row, keys) and _is_meant(format, row, keys)), None)


def _is_meant(format: str, row: Fields, keys: Collection[str]) -> bool:
    """Whether a text is all there is to learn: nothing beside it may be its answer, or it is a conversation for
    certain."""
    if format == "rendered":
        return is_marked(row["text"]) or not is_beside_text({*keys}.difference(layouts.SYSTEMS))
    return format != "text" or not is_beside_text(keys)


def _with_the_text_kept(problems: list[Problem], format: str, row: Fields) -> list[Problem]:
    """The problems with the way out for a text that was taken apart, and may be meant as it stands."""
    if format == "rendered":
        return [replace(problem, fix=f"{problem.fix}; or keep the text as it is with --format text")
                for problem in problems]
    how = None
    if format == "prompt-completion" and with_prompt_apart(row) is not row:
        how = "with --columns user=…,assistant=…"
    elif format == "preference" and preference.is_apart(row):
        how = "with --columns user=…,chosen=…,rejected=…" if marks.filled_pair(row) else (
            'as [{"role": "user", "content": "…"}]')
    return problems if how is None else [
        replace(problem, fix=f"{problem.fix}; or keep the prompt as it is {how}")
        if problem.code in ("alternation", "system_inside") else problem for problem in problems]


def _text(row: Fields, alone: bool) -> Example:
    """A text for continued training.

    Args:
        alone: whether it was said that nothing else is learned, whatever stands beside it.
    """
    text = row["text"]
    if not alone and (shown := [name for name in pictures.COLUMNS if pictures.holds(row.get(name))]):
        raise RowError([pictures.unasked(shown[0], "text")])
    if not isinstance(text, str):
        raise RowError([Problem("not_text", f"`text` is {kind(text)}, not text", "make `text` a string")])
    if not text.strip():
        raise RowError([Problem("empty_turn", "`text` is empty", "fill it or leave the row out")])
    if damaged(text):
        raise RowError([Problem("broken_text", "`text` contains damaged characters", "export the text as UTF-8 again")])
    return Example("text", None, None, text, unread.of_row(row, "text", {}))
