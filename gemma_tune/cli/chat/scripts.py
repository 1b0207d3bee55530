"""Answers for scripts: one after the other on standard output, as text or as JSON objects."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import counted
from gemma_tune.chat.conversation import Conversation
from gemma_tune.chat.scripts import Asked, answered, is_file, open_input, read, standard_input, started, windows
from gemma_tune.cli import screen
from gemma_tune.cli.chat import markdown
from gemma_tune.cli.chat.loop import end
from gemma_tune.cli.chat.say import cut_off, say


def one_prompt(conversation: Conversation, prompt: str, as_json: bool, pictures: Sequence[Path] = ()) -> None:
    """Answer what ``--prompt`` asks about the pictures of ``--image``.

    Raises:
        UserError: it cannot be answered.
    """
    text = prompt.rstrip("\r\n")
    for path in pictures:
        conversation.show(path)
    named = {"images": [str(path) for path in pictures]} if pictures else {}
    asked = Asked("--prompt", text, [conversation.question(text)], named=named)
    problems = _Problems()
    _answer(conversation, [[asked]], as_json, problems, alone=True)
    problems.tell_cut()


def all_of(conversation: Conversation, name: str | None, as_json: bool) -> None:
    """Answer every prompt and conversation of a file or of standard input, in order; Ctrl-C ends all of it.

    Args:
        name: the file; None or ``-`` is standard input.

    Raises:
        UserError: the input cannot be read.
        WorkFailed: some of it could not be answered; everything else was.
    """
    problems = _Problems()
    with contextlib.ExitStack() as stack:
        if name in (None, "-"):
            lines, called, rows_only, whole = standard_input(), "standard input", False, is_file(sys.stdin)
        else:
            lines, called, rows_only = open_input(name)
            stack.enter_context(lines)
            whole = True
        folder = Path() if name in (None, "-") else Path(called).parent
        groups = windows(read(lines, called, rows_only, conversation.shown, folder), whole)
        _answer(conversation, groups, as_json, problems, one_by_one=conversation.config.seed is not None and not whole)
    problems.tell_cut()
    problems.tell_unread()
    if not problems.asked:
        say(f"! {called} has no prompts: there is nothing to answer", "yellow")
    if failed := problems.failure():
        if not as_json:
            raise failed
        screen.error(failed)  # on standard output each question has its object already
        raise typer.Exit(failed.exit_code)


_TOLD, _HINTS = 20, 3  # questions without an answer that are named, and what to do about them
_NAMED = 6  # names of what is not read
# Settings as other programs call them in a row.
_OPTIONS = {**{name: name for name in ("temperature", "top_p", "top_k", "repetition_penalty", "seed",
                                       "max_new_tokens")},
            "max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens",
            "repeat_penalty": "repetition_penalty"}


class _Problems:
    """What became of the questions."""

    def __init__(self) -> None:
        self.asked = 0
        self.cut: list[int] = []  # tokens of the answers that reached the limit
        self.failed: list[tuple[str, UserError]] = []  # where each was asked
        self.unread: Counter[str] = Counter()  # what rows have beside the question, and nobody reads

    def tell_cut(self) -> None:
        """Say that answers were cut off: nobody sees it in a file."""
        if self.asked == 1 and self.cut:
            say(cut_off(self.cut[0]))
        elif self.cut:
            answers = counted(self.asked - len(self.failed), "answer")
            say(f"! {len(self.cut):,} of {answers} {'is' if len(self.cut) == 1 else 'are'} cut off at the limit; "
                "--max-new-tokens N sets another", "yellow")

    def tell_unread(self) -> None:
        """Say what the rows have in vain: a temperature there is not that of the answer."""
        if not self.unread:
            return
        names = [f"{name} ({counted(rows, 'row')})" for name, rows in self.unread.most_common(_NAMED)]
        names += ["others"] if len(self.unread) > _NAMED else []
        options = dict.fromkeys(f"--{name.replace('_', '-')}" for name in map(_OPTIONS.get, self.unread) if name)
        say(f"! not read of the rows: {', '.join(names)}"
            + (f"; for all of them together there is {', '.join(options)}" if options else ""), "yellow")

    def failure(self) -> WorkFailed | None:
        """What to say of the questions without an answer."""
        if not self.failed:
            return None
        of = f"{len(self.failed):,} of {counted(self.asked, 'prompt')} could not be answered"
        others = "" if len(self.failed) == self.asked else "; the others were"
        told = [error.message if error.message.startswith(where) else f"{where}: {error.message}"
                for where, error in self.failed[:_TOLD]]
        more = len(self.failed) - len(told)
        hints = list(dict.fromkeys(filter(None, (error.hint for _, error in self.failed))))
        return WorkFailed(of + others, "; ".join(hints[:_HINTS]) or None,
                          [*told, *([f"and {more:,} more"] if more else [])])


def _answer(conversation: Conversation, groups: Iterable[list[Asked]], as_json: bool, problems: _Problems, *,
            one_by_one: bool = False, alone: bool = False) -> None:
    before: Sequence[dict[str, Any]] = ()
    for asked, found, base in _found(conversation, groups, one_by_one):
        conversation.shown.forget(before)
        before = asked.messages
        problems.asked += 1
        problems.unread.update(asked.unread)
        try:
            if isinstance(found, UserError):
                raise found
            answer = _shown(found, conversation.which, base, as_json)
        except UserError as e:
            if alone:
                raise
            problems.failed.append((asked.where, e))
            if as_json:
                screen.result_json({"error": screen.error_json(e), "where": asked.where}, verbatim=asked.echo)
            continue
        if not answer.ended:
            problems.cut.append(answer.tokens)
        if as_json:
            fields = _fields(answer, conversation.which) | ({} if alone else {"where": asked.where})
            more = {"base": _fields(base[1], base[0]) | {"answer": base[1].text}} if base else {}
            screen.result_json(fields, verbatim={**asked.echo, "answer": answer.text, **more})
    conversation.shown.forget(before)


def _found(conversation: Conversation, groups: Iterable[list[Asked]], one_by_one: bool
           ) -> Iterator[tuple[Asked, Answer | Streaming | UserError, tuple[str, Answer] | None]]:
    """Questions with what became of them, and where both are compared, with who the base model is and its answer.

    That is whole before the tuned model begins: they are one model, in one state at a time.
    """
    if not conversation.comparing:
        yield from ((asked, found, None) for asked, found in answered(conversation, groups, one_by_one))
        return
    base, _ = conversation.pair()
    for asked in (one for group in groups for one in group):
        first = asked.problem or started(conversation, asked, base)
        try:
            if isinstance(first, UserError):
                raise first
            with _ending(first):
                answer = first.finish()
        except UserError as e:
            yield asked, e, None
        else:
            yield asked, started(conversation, asked), (base.which, answer)


def _fields(answer: Answer, which: str) -> dict[str, Any]:
    return {"tokens": answer.tokens, "ended": answer.ended, "model": which}


def _shown(found: Answer | Streaming, which: str, base: tuple[str, Answer] | None, as_json: bool) -> Answer:
    """The answer, which is on standard output unless it goes into an object."""
    if base and not as_json:
        screen.answer(f"[{base[0]}]\n{base[1].text}\n\n[{which}]\n")
    if isinstance(found, Answer):
        if not as_json:
            screen.answer(found.text)
            screen.result("")
        return found
    with _ending(found):
        if as_json:
            return found.finish()
        with markdown.writer(markdown=False) as writer:
            for piece in found:
                writer.piece(piece)
    return found.finish()


@contextlib.contextmanager
def _ending(stream: Streaming) -> Iterator[None]:
    """Whatever happens to the reader, also a closed pipe, ends the answer."""
    try:
        yield
    except BaseException:
        end(stream)
        raise
