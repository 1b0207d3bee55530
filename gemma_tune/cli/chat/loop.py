"""The conversation on a terminal: questions, answers as they come, and interruptions."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.errors import INTERRUPTED, UserError
from gemma_tune.base.listener import Held
from gemma_tune.base.machine import Terminated, end_at_once
from gemma_tune.base.words import counted
from gemma_tune.chat.conversation import Conversation, open_conversation
from gemma_tune.chat.pictures import are_pictures
from gemma_tune.chat.preferences import COMPARED
from gemma_tune.chat.voice import Voice
from gemma_tune.cli import screen
from gemma_tune.cli.chat import markdown, typing
from gemma_tune.cli.chat.commands import is_command, obey, show
from gemma_tune.cli.chat.say import cut_off, figures, in_context, say
from gemma_tune.cli.spinner import keeping_still
from gemma_tune.gguf.engine import end_all
from gemma_tune.run.session import Session

_COLUMNS = 80  # cells of a terminal from which on two answers find room beside each other


def converse(session: Session, pictures: Sequence[Path] = ()) -> None:
    """Ask and answer until the user leaves; where there is a line editor, the model is loaded while one types.

    Args:
        pictures: shown with the first question.

    Raises:
        UserError: nothing that can answer, damaged or missing files.
    """
    typist, said = typing.typist(), Held(session.listener)
    if not (ahead := isinstance(typist, typing.Editor)):
        said.let_go()
    try:
        conversation = open_conversation(dataclasses.replace(session, listener=said), ahead=ahead, talking=True)
    finally:
        said.tell()
    interactive(conversation, typist, said, pictures)


def interactive(conversation: Conversation, typist: typing.Plain | typing.Editor, said: Held,
                pictures: Sequence[Path] = ()) -> None:
    """Ask and answer until the user leaves. Ctrl-C stops an answer, or clears the line being typed.

    Args:
        said: hears what is said of models that are loaded, in whatever thread.
        pictures: shown with the first question.

    Raises:
        UserError: the model cannot be loaded.
    """
    talk = Talk(conversation, typist, said)
    say("/help lists commands, Ctrl-C stops an answer, Ctrl-D leaves")
    try:
        try:
            if pictures:
                talk.somebody_answers()
                show(talk, pictures)
            talk.run()
        except Terminated:
            _leave_the_load(conversation, INTERRUPTED)
            raise
        _leave_the_load(conversation, 0)
        if (ahead := conversation.ahead) is not None:
            said.tell()
            if ahead.failure is not None:
                raise ahead.failure
    finally:
        conversation.close()


def _leave_the_load(conversation: Conversation, code: int) -> None:
    """End the process, with this exit code, where a model is being loaded: nobody waits for it any more."""
    ahead = conversation.ahead
    if ahead is None or not ahead.going_on:
        return
    end_all()
    conversation.shown.close()
    with keeping_still():  # the line of what is loaded hides the cursor
        if code:
            with contextlib.suppress(OSError, screen.OutputLost):  # the terminal has gone
                say("(stopped)")
        end_at_once(code)


class Talk:
    """A conversation with somebody at the keyboard."""

    def __init__(self, conversation: Conversation, typist: typing.Plain | typing.Editor, said: Held):
        self.conversation = conversation
        self.markdown = True
        self.left = False
        self._typist, self._said = typist, said

    def run(self) -> None:
        """Until the user leaves."""
        while not self.left:
            try:
                line = self._read()
                if is_command(line):
                    obey(self, line)
                elif are_pictures(line):  # dragged into the terminal
                    obey(self, f"/image {line}")
                elif line.strip():
                    self.answer(line)
            except UserError as e:
                self._refuse(e)
            except KeyboardInterrupt:
                say("\n(Ctrl-D or /exit leaves)")
            except EOFError:
                screen.err.print()
                return

    def _read(self) -> str:
        """What is typed next, which can be while the model is being loaded."""
        ahead = self.conversation.ahead
        if ahead is not None and ahead.going_on and isinstance(self._typist, typing.Editor):
            return self._typist.read_meanwhile(ahead, self._said)
        self._said.let_go()
        if ahead is not None and ahead.failure is not None:
            raise ahead.failure
        return self._typist.read()

    def _refuse(self, problem: UserError) -> None:
        """Say why something cannot be done, and go on, unless there is nobody to answer."""
        failure = self.conversation.ahead and self.conversation.ahead.failure
        if problem is not failure:
            screen.error(problem)
        if failure:
            raise failure

    def several_lines(self) -> str:
        """Lines as they are, up to one with a dot alone."""
        return typing.several_lines(self._typist)

    def answer(self, question: str) -> bool:
        """Answer a question, by both models where they are compared."""
        return self.compare(question) if self.conversation.comparing else self.exchange(question)

    def exchange(self, question: str) -> bool:
        """One question and its answer. Ctrl-C ends the answer, which is kept as far as it came."""
        conversation = self.conversation
        with self._stopping():
            self.somebody_answers()
            stream = conversation.ask(question)
            answer, stopped = _written(stream, markdown.writer(self.markdown))
            kept = conversation.keep(question, answer)
            if not kept:
                say("(stopped before its first word; the question is not kept)" if stopped else
                    "(the model answered with nothing; the question is not kept)")
            self._tell(stream, answer, conversation.voice, stopped)
            return kept
        return False

    def compare(self, question: str, *, keep: bool = True) -> bool:
        """The answers of base and tuned model; the tuned one's becomes part of the conversation."""
        conversation, number = self.conversation, len(self.conversation.turns) // 2
        with self._stopping():
            self.somebody_answers()
            voices = conversation.pair()
            if sys.stdout.isatty() and screen.is_live() and markdown.out().width >= _COLUMNS:
                found = self._side_by_side(question, voices)
            else:
                found = self._one_below_the_other(question, voices)
            if len(found) < len(voices):
                say("(stopped; nothing of it is kept)")
                return False
            for voice, (stream, answer, stopped) in zip(voices, found):
                say(f"{voice.which}: ")
                self._tell(stream, answer, voice, stopped)
            kept = keep and conversation.keep(question, found[-1][1])
            if keep and not kept:
                say("(the tuned model answered with nothing; the question is not kept)")
            if conversation.offer(dict(zip(COMPARED, (answer for _, answer, _ in found))), number):
                say("(/better base or /better tuned keeps which one is better)")
            return kept
        return False

    def somebody_answers(self) -> None:
        """Wait for the model, and show what was said of it.

        Raises:
            UserError: it cannot be loaded.
        """
        if self.conversation.ahead is not None:
            with typing.nothing_shown():
                self.conversation.ahead.wait()
        self._said.let_go()

    def _one_below_the_other(self, question: str, voices: tuple[Voice, ...]) -> list[tuple[Streaming, Answer, bool]]:
        found = []
        for voice in voices:
            say(f"{voice.which}:")
            stream = self.conversation.ask(question, voice)
            found.append((stream, *_written(stream, markdown.writer(self.markdown))))
            if found[-1][2]:
                break
        return found

    def _side_by_side(self, question: str, voices: tuple[Voice, ...]) -> list[tuple[Streaming, Answer, bool]]:
        """In two columns; while they come, as much of them as the screen has room for."""
        columns = _Columns([voice.which for voice in voices], self.markdown)
        found = []
        with columns:
            for number, voice in enumerate(voices):
                stream = self.conversation.ask(question, voice)
                found.append((stream, *_written(stream, columns.column(number))))
                if found[-1][2]:
                    break
        return found

    def _tell(self, stream: Streaming, answer: Answer, voice: Voice, stopped: bool) -> None:
        """What is to be known of an answer: why it ends, how fast it was, how full the context is."""
        if not (answer.ended or stopped):
            say(cut_off(answer.tokens, "/set max_new_tokens N"))
        if screen.err.is_terminal and (line := figures(stream, answer, voice.context)):
            say(line)
        used = in_context(stream, answer)
        if used is not None and (left := self.conversation.room(used)) is not None:
            say(f"! {counted(left, 'token')} of context left: /undo takes a turn back, /reset starts anew", "yellow")

    @contextlib.contextmanager
    def _stopping(self) -> Any:
        """Ctrl-C while a last token is still computed, and what is wrong with a question, end the exchange alone."""
        try:
            with typing.nothing_shown():
                yield
        except KeyboardInterrupt:
            say("(stopped; this answer is not kept)")
        except UserError as e:
            self._refuse(e)


class _Columns:
    """Answers in columns."""

    def __init__(self, titles: list[str], rendered: bool):
        self._titles, self._rendered = titles, rendered
        self.texts = [""] * len(titles)
        self._out = markdown.out()
        self._live = markdown.drawn_by_hand(self._out)
        self._clock = markdown.Clock()

    def __enter__(self) -> _Columns:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.update("", refresh=False)
        self._live.stop()
        self._out.print(self._table(None))

    def column(self, number: int) -> _Column:
        """What writes into one of them."""
        return _Column(self, number)

    def draw(self) -> None:
        """Show how far they are."""
        if self._clock.due():
            self._live.update(self._table(max(1, self._out.height - 5)), refresh=True)

    def _table(self, room: int | None) -> Table:
        table = Table(expand=True, show_lines=False)
        for title in self._titles:
            table.add_column(screen.Text(title), ratio=1, overflow="fold")
        shown = [markdown.Answer(text) if self._rendered else markdown.plain(text) for text in self.texts]
        table.add_row(*(one if room is None else markdown.Tail(one, room) for one in shown))
        return table


class _Column:
    def __init__(self, columns: _Columns, number: int):
        self._columns, self._number = columns, number

    def __enter__(self) -> _Column:
        return self

    def __exit__(self, *_: object) -> None:
        self._columns.draw()

    def piece(self, text: str) -> None:
        self._columns.texts[self._number] += markdown.without_commands(text)
        self._columns.draw()


def _written(stream: Streaming, writer: Any) -> tuple[Answer, bool]:
    """Write an answer as it comes; the whole of it, and whether Ctrl-C ended it."""
    stopped = False
    try:
        with writer:
            try:
                for piece in stream:
                    writer.piece(piece)
            except KeyboardInterrupt:
                stopped = True
                stream.stop()
    except BaseException:  # stdout takes no more
        end(stream)
        raise
    return stream.finish(), stopped


def end(stream: Any) -> None:
    """End an answer that nobody reads; the interpreter must not end while a thread is inside torch."""
    stream.stop()
    with contextlib.suppress(Exception):
        stream.finish()
