"""Prompts and whole conversations from a file or a pipe, and their answers in batches, in the order of the input."""

from __future__ import annotations

import os
import queue
import re
import stat
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import next_of
from gemma_tune.base.strict_json import loads, reason
from gemma_tune.base.words import as_text
from gemma_tune.chat.conversation import Conversation
from gemma_tune.chat.pictures import Shown
from gemma_tune.chat.voice import Voice
from gemma_tune.data.conversations import layouts
from gemma_tune.data.conversations.layouts import SYSTEMS
from gemma_tune.data.conversations.pictures import COLUMNS, beside
from gemma_tune.data.conversations.problems import Problem, damaged, in_words
from gemma_tune.data.conversations.tools import declarations
from gemma_tune.data.conversations.turns import Turn, conversation

_HEAD = 4096  # bytes in which a file that is no text shows it
WINDOW = 256  # prompts that are sorted by length and answered before the next are looked at
_BESIDE_MESSAGES = (*SYSTEMS, "tools", "functions")
_READ = ("id", "prompt", "messages", *COLUMNS, *_BESIDE_MESSAGES)
_SHAPE = 'a line is {"messages": […]} or {"prompt": "…"}'
_PIPED = "pipe prompts into the command, one on each line, or give one with --prompt"


@dataclass(frozen=True)
class Asked:
    """One line of input.

    Args:
        where: file and line, for people.
        prompt: what was asked; None for a whole conversation.
        messages: the turns, without the chat's own system prompt.
        given: a whole conversation as it stands in the row.
        named: ``id`` of the row, if it has one, and its columns of pictures.
        unread: names of what else the row has.
        problem: why it cannot be asked.
    """

    where: str
    prompt: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    named: dict[str, Any] = field(default_factory=dict)
    problem: UserError | None = None
    unread: tuple[str, ...] = ()
    given: Any = None

    @property
    def echo(self) -> dict[str, Any]:
        """What a program finds its question by."""
        return self.named | ({"prompt": self.prompt} if self.prompt is not None
                             else {} if self.given is None else {"messages": self.given})


Result = Answer | UserError


def read(lines: Iterable[str], called: str, rows_only: bool = False, shown: Shown | None = None,
         folder: Path = Path()) -> Iterator[Asked]:
    """Lines that are not blank: each a prompt, or a JSON object with ``messages`` or ``prompt``.

    Args:
        called: the file, as people are told.
        rows_only: every line is such an object, as in a .jsonl file; elsewhere a line that is none is a prompt.
        shown: takes the pictures of the rows, whose paths begin at ``folder``.

    Raises:
        UserError: the input cannot be read at all.
    """
    keep_bytes(lines)
    encoding = getattr(lines, "encoding", None)
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{called}:{number}"
            try:
                text = as_text(line, where, encoding).rstrip("\r\n")
                text = text.removeprefix("\ufeff") if number == 1 else text  # with which Windows' programs begin
                if text.strip():
                    yield _with_pictures(_asked(text, where, rows_only), shown or Shown(), folder)
            except UserError as e:
                yield Asked(where, problem=e)
    except OSError as e:  # it is a directory, or a terminal that has gone
        raise UserError(f"{called} cannot be read: {e.strerror or e}", _PIPED) from e


def keep_bytes(lines: Iterable[str]) -> None:
    """Have what cannot be decoded kept in each line, to be told where it is: else it would take the others with it."""
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="surrogateescape")


_MEANT = re.compile(rf'\s*\{{\s*"(?:{"|".join(_READ)})"\s*:')  # the beginning of a row


def _asked(line: str, where: str, rows_only: bool) -> Asked:
    if "\0" in line:
        raise UserError(f"{where}: it holds a NUL character, so it is no text", "name a file of text: --input FILE")
    row: Any = None
    try:
        row = loads(line) if rows_only or line.lstrip().startswith("{") else None
    except (ValueError, RecursionError) as e:
        if rows_only or _MEANT.match(line):  # a row that was cut off, say, is no prompt
            raise UserError(f"{where}: not JSON: {reason(e)}", _SHAPE) from e
    if isinstance(row, dict):
        return _of_row(row, where)
    if rows_only:
        raise UserError(f"{where}: no object with messages or a prompt",
                        f"{_SHAPE}; prompts as plain lines go into a .txt file")
    return Asked(where, line, [{"role": "user", "content": line}])


def _with_pictures(asked: Asked, shown: Shown, folder: Path) -> Asked:
    """A question whose turns say where their pictures lie."""
    if asked.problem is not None:
        return asked
    try:
        return replace(asked, messages=[shown.resolved(turn, folder) for turn in asked.messages])
    except UserError as e:
        return replace(asked, messages=[], problem=UserError(f"{asked.where}: {e.message}", e.hint))


def _of_row(row: dict[str, Any], where: str) -> Asked:
    """A JSON object; one that is no prompt and no conversation has its problem, and keeps its ``id``."""
    named = {key: row[key] for key in ("id", *COLUMNS) if key in row}
    try:
        return _question_in(row, where, named)
    except UserError as e:
        return Asked(where, named=named, problem=e)


def _question_in(row: dict[str, Any], where: str, named: dict[str, Any]) -> Asked:
    """What a row asks. What stands in it and would not be asked is no matter to pass over.

    Raises:
        UserError: it is no prompt and no conversation.
    """
    others = tuple(key for key in row if key not in _READ)
    if ("messages" in row) == ("prompt" in row):
        both = "both messages and a prompt" if "messages" in row else "neither messages nor a prompt"
        raise UserError(f"{where}: the object has {both}", _SHAPE)
    if isinstance(row.get("prompt"), list) and "messages" not in row:  # as `prepare` takes it
        row = {"messages" if key == "prompt" else key: value for key, value in row.items()}
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"].strip():
            fault = "empty" if isinstance(row["prompt"], str) else "no text"
            raise UserError(f"{where}: the prompt is {fault}", _SHAPE)
        if damaged(row["prompt"]):
            raise UserError(f"{where}: the prompt contains damaged characters", "export the text as UTF-8 again")
        if unread := [name for name in _BESIDE_MESSAGES if row.get(name)]:
            raise UserError(f"{where}: {' and '.join(unread)} beside a prompt would not be asked",
                            'write a conversation: {"messages": [{"role": "system", …}, …], "tools": […]}')
        return Asked(where, row["prompt"], _prompt_in(row, where), named=named, unread=others)
    turns, tools = _conversation_in(row, where)
    return Asked(where, messages=turns, tools=tools, named=named, unread=others, given=row["messages"])


def _prompt_in(row: dict[str, Any], where: str) -> list[Turn]:
    """The turn of a prompt, with the pictures beside it, where there are some, as `prepare` has them.

    Raises:
        UserError: they are none.
    """
    turns: list[Turn] = [{"role": "user", "content": row["prompt"]}]
    problems: list[Problem] = []
    if shown := beside("", row, problems):
        turns = conversation(turns, problems, answered=False, pictures=shown)
    _refuse(problems, where)
    return turns


def _conversation_in(row: dict[str, Any], where: str) -> tuple[list[Turn], list[Turn] | None]:
    """Turns and tools of a row as ``prepare`` reads those it learns, so that a model is asked what it was trained on.

    Raises:
        UserError: they are no conversation, or nobody asks.
    """
    problems: list[Problem] = []
    draft = layouts.messages(row, problems)
    tools = declarations(draft.tools, problems)
    turns = conversation(draft.messages, problems, answered=False, pictures=beside("", row, problems))
    _refuse(problems, where)
    if turns[-1]["role"] not in ("user", "tool"):
        ends = "an answer" if turns[-1]["role"] == "assistant" else "the system's turn"
        raise UserError(f"{where}: its messages end with {ends}, so there is nothing to answer",
                        "end them with the user's turn")
    return turns, tools


def _refuse(problems: list[Problem], where: str) -> None:
    if problems:
        raise UserError(f"{where}: {in_words(problems)}", problems[0].fix)


def open_input(name: str) -> tuple[TextIO, str, bool]:
    """A file of prompts: the open file, its name, and whether each line is an object.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            raise UserError(f"{path} is a directory", "name a file: --input prompts.txt, or rows.jsonl")
        with open(path, "rb") as file:
            if b"\0" in (head := file.read(_HEAD)):
                raise UserError(f"{path} is no text file", "name a file of prompts: --input prompts.txt, or rows.jsonl")
            if not head:
                raise UserError(f"{path} is empty", "write a prompt on each line")
        # Without newline a lone carriage return would be an end of line.
        file = open(path, encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: SIM115 - for the caller
        return file, str(path), path.suffix.lower() == ".jsonl"
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "check the path: --input FILE") from e


def windows(asked: Iterable[Asked], whole: bool) -> Iterator[list[Asked]]:
    """Prompts in groups that are answered together.

    Args:
        whole: all of the input is there, so a group is as long as it may be; else it is what has arrived by now:
            another program may wait for each answer before it asks the next question.
    """
    if whole:
        group: list[Asked] = []
        for one in asked:
            group.append(one)
            if len(group) == WINDOW:
                yield group
                group = []
        if group:
            yield group
        return
    arrived: queue.Queue[Asked | BaseException | None] = queue.Queue(maxsize=4 * WINDOW)
    threading.Thread(target=_fill, args=(arrived, asked), daemon=True).start()
    while True:
        group, item = [], next_of(arrived)
        while isinstance(item, Asked):
            group.append(item)
            if len(group) == WINDOW:
                break
            try:
                item = arrived.get_nowait()
            except queue.Empty:
                break
        if group:
            yield group
        if item is None:
            return
        if isinstance(item, BaseException):
            raise item


def _fill(arrived: queue.Queue, asked: Iterable[Asked]) -> None:
    try:
        for one in asked:
            arrived.put(one)
        arrived.put(None)
    except BaseException as e:  # noqa: BLE001 - raised where they are read
        arrived.put(e)


def standard_input() -> Any:
    """Standard input to be read beside the work: Python cannot end while a thread waits in its own ``sys.stdin``.

    UTF-8, whatever the locale says: with another code page, as in Windows, Python would make other characters of it.
    """
    try:
        number = os.dup(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):  # not a file of the system's
        return sys.stdin
    return open(number, encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: SIM115 - until the end


def is_file(stream: Any) -> bool:
    """Whether a stream is a regular file, which is all there from the beginning."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False


def answered(conversation: Conversation, groups: Iterable[list[Asked]], one_by_one: bool
             ) -> Iterator[tuple[Asked, Result | Streaming]]:
    """Each question with its answer, its error, or the answer in the making, in the order of the questions.

    Args:
        one_by_one: no batches, so that the same seed gives the same answers however the questions arrive.
    """
    for group in groups:
        if len(group) == 1 or one_by_one:
            for one in group:
                yield one, one.problem or started(conversation, one)
            continue
        good = [one for one in group if one.problem is None]
        found = iter(conversation.voice.batch([(whole_of(conversation, one), one.tools) for one in good],
                                              conversation.config))
        for one in group:
            yield one, one.problem or next(found)


def started(conversation: Conversation, one: Asked, voice: Voice | None = None) -> Streaming | UserError:
    """An answer in the making, of the conversation's voice or another; the error where it cannot begin."""
    try:
        return (voice or conversation.voice).ask(whole_of(conversation, one), conversation.config, one.tools)
    except UserError as e:
        return e


def whole_of(conversation: Conversation, one: Asked) -> list[dict[str, Any]]:
    """With the system prompt of the command, unless the conversation has one of its own."""
    own = one.messages[0]["role"] == "system"
    system = [] if own or not conversation.system else [{"role": "system", "content": conversation.system}]
    return [*system, *one.messages]

