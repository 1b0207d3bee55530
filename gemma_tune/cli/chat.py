"""The interactive side of ``chat``: reading lines, commands that begin with a slash, and interruptions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted
from gemma_tune.chat.conversation import Conversation, answers
from gemma_tune.cli import console, screen

HELP = ("/reset  forget the conversation      /system TEXT  new system prompt (and forget; no TEXT removes it)\n"
        "/fix TEXT  put TEXT in place of the last answer; no TEXT: several lines, up to one with a dot alone\n"
        "/save [FILE]  keep the conversation as training data\n"
        "/help   this help                    /exit or Ctrl-D  leave      Ctrl-C  stop the answer")


def interactive(conversation: Conversation) -> None:
    """Ask and answer until the user leaves. Ctrl-C stops an answer, or clears the line being typed."""
    with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
        import readline  # noqa: F401 - its import gives input() line editing and history
    screen.err.print(f"{conversation.which}\n{HELP}", markup=False, style="dim")
    while True:
        try:
            line = _read_line().strip()
        except KeyboardInterrupt:
            screen.err.print("\n(Ctrl-D or /exit leaves)", style="dim")
            continue
        except EOFError:
            screen.err.print()
            return
        if line.startswith("/"):
            if not _command(conversation, line):
                return
        elif line:
            _exchange(conversation, line)


def _read_line() -> str:
    """A line from the terminal. input() writes its prompt to stdout, which holds answers alone when it is a file."""
    if sys.stdout.isatty():
        return input("\n> ")
    screen.err.print("\n> ", end="", markup=False)
    return input()


def _command(conversation: Conversation, line: str) -> bool:
    """Obey a slash command; False means leave."""
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/reset":
        conversation.reset()
        _say("(the conversation starts anew)")
    elif name == "/system":
        conversation.reset(rest.strip())
        _say(f"(system prompt: {conversation.system or 'none'})")
    elif name in ("/fix", "/save"):
        try:
            (_fix if name == "/fix" else _save)(conversation, rest.strip())
        except UserError as e:
            screen.error(e)
    else:
        unknown = "" if name in ("/help", "/?") else f"(there is no {name})\n"
        _say(unknown + HELP)
    return True


def _say(text: str) -> None:
    screen.err.print(text, markup=False, style="dim")


def _fix(conversation: Conversation, text: str) -> None:
    if conversation.turns and not text:
        _say("(the right answer; a line with a dot alone ends it, Ctrl-C leaves the answer as it is)")
        try:
            text = _several_lines()
        except KeyboardInterrupt:
            _say("\n(the answer stays as it is)")
            return
    conversation.correct(text)
    _say("(the answer is replaced)")


def _several_lines() -> str:
    lines = []
    with contextlib.suppress(EOFError):
        while (line := _read_line()) != ".":
            lines.append(line)
    return "\n".join(lines)


def _save(conversation: Conversation, name: str) -> None:
    path, changed = conversation.save(name)
    _say(f"({'saved in' if changed else 'already in'} {path})")
    if conversation.cut:
        cut = counted(conversation.cut, "answer was cut off and is", "answers were cut off and are")
        _say(f"({cut} not learned; /fix TEXT mends the last one)")
    console.what_next([conversation.saves.command_to_prepare(path)])


def _exchange(conversation: Conversation, line: str) -> None:
    """One question and its answer. Ctrl-C ends the answer, which is kept as far as it came."""
    try:
        stream, stopped = conversation.ask(line), False
        try:
            for piece in stream:
                screen.piece(piece)
        except KeyboardInterrupt:
            stopped = True
            stream.stop()
        screen.result("")
        answer = stream.finish()
        conversation.keep(line, answer)
        if not (answer.ended or stopped):
            _say(_cut_off(answer.tokens))
    except KeyboardInterrupt:  # a second one, while the last token is still being computed
        screen.err.print("(stopped; this answer is not kept)", style="dim")
    except UserError as e:
        screen.error(e)


def one_by_one(conversation: Conversation, prompts: Iterable[str], as_json: bool) -> None:
    """Answer prompts independently of each other; Ctrl-C ends all of it.

    Raises:
        UserError: a prompt that does not fit into the model's context, or is not UTF-8 text.
    """
    for prompt, stream in answers(conversation, _text(prompts)):
        try:
            for piece in stream:
                if not as_json:
                    screen.piece(piece)
        except BaseException:  # also a closed pipe; the interpreter must not end while a thread is inside torch
            stream.stop()
            stream.finish()
            raise
        answer = stream.finish()
        if as_json:
            screen.result_json({"prompt": prompt, "answer": answer.text, "tokens": answer.tokens,
                                 "ended": answer.ended, "model": conversation.which})
        else:
            screen.result("")
            if screen.err.is_terminal and not answer.ended:
                _say(_cut_off(answer.tokens))


def _cut_off(tokens: int) -> str:
    return (f"(the answer is cut off after {counted(tokens, 'token')}, the limit; --max-new-tokens N sets another, as "
            "far as the model's context goes)")


def _text(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not {e.encoding} text (byte {e.start} of a part of it)",
                        "save the prompts as UTF-8") from e
