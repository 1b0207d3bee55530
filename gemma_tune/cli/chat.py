"""The interactive side of ``chat``: reading lines, commands that begin with a slash, and interruptions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import as_text, counted
from gemma_tune.chat.conversation import Conversation, answers
from gemma_tune.cli import console, screen

HELP = ("/reset  forget the conversation      /system TEXT  new system prompt (and forget; no TEXT removes it)\n"
        "/fix TEXT  put TEXT in place of the last answer; no TEXT: lines as they are, up to one with a dot alone\n"
        "/save [FILE]  keep the conversation as training data\n"
        "/help   this help                    /exit or Ctrl-D  leave      Ctrl-C  stop the answer")


def interactive(conversation: Conversation) -> None:
    """Ask and answer until the user leaves. Ctrl-C stops an answer, or clears the line being typed."""
    with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
        import readline  # its import gives input() line editing and history

        for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # or the C locale takes é for two keys
            readline.parse_and_bind(f"set {setting}")
    screen.err.print(f"{conversation.which}\n{HELP}", markup=False, style="dim")
    _keep_bytes(sys.stdin)
    while True:
        try:
            line = _read_line()
        except UserError as e:
            screen.error(e)
            continue
        except KeyboardInterrupt:
            screen.err.print("\n(Ctrl-D or /exit leaves)", style="dim")
            continue
        except EOFError:
            screen.err.print()
            return
        if line.lstrip().startswith("/"):
            if not _command(conversation, line.lstrip()):
                return
        elif line.strip():
            _exchange(conversation, line)


def _read_line() -> str:
    """A line from the terminal. input() writes its prompt to stdout, which holds answers alone when it is a file.

    Raises:
        UserError: it is no text.
    """
    if sys.stdout.isatty():
        line = input("\n> ")
    else:
        screen.err.print("\n> ", end="", markup=False)
        line = input()
    return as_text(line, "what was typed", sys.stdin.encoding)


def _keep_bytes(lines: Iterable[str]) -> None:
    """Have what cannot be decoded kept in each line, to be told where it is: else it would take the others with it."""
    if hasattr(lines, "reconfigure"):
        lines.reconfigure(errors="surrogateescape")


def _command(conversation: Conversation, line: str) -> bool:
    """Obey a slash command; False means leave."""
    name, _, rest = line.partition(" ")
    name = name.rstrip()
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
        while True:
            try:
                if (line := _read_line()) == ".":
                    break
                lines.append(line)
            except UserError as e:  # the other lines stay
                screen.error(e)
    return "\n".join(lines).strip("\n")


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
                screen.answer(piece)
        except KeyboardInterrupt:
            stopped = True
            stream.stop()
        except BaseException:  # stdout takes no more
            _end(stream)
            raise
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
                    screen.answer(piece)
        except BaseException:  # also a closed pipe
            _end(stream)
            raise
        answer = stream.finish()
        if as_json:
            screen.result_json({"tokens": answer.tokens, "ended": answer.ended, "model": conversation.which},
                               verbatim={"prompt": prompt, "answer": answer.text})
        else:
            screen.result("")
            if screen.err.is_terminal and not answer.ended:
                _say(_cut_off(answer.tokens))


def _end(stream: Any) -> None:
    """End an answer that nobody reads; the interpreter must not end while a thread is inside torch."""
    stream.stop()
    stream.finish()


def _cut_off(tokens: int) -> str:
    return (f"(the answer is cut off after {counted(tokens, 'token')}, the limit; --max-new-tokens N sets another, as "
            "far as the model's context goes)")


def _text(lines: Iterable[str]) -> Iterator[str]:
    _keep_bytes(lines)
    encoding = getattr(lines, "encoding", None)
    try:
        for number, line in enumerate(lines, start=1):
            yield as_text(line, f"standard input:{number}", encoding)
    except OSError as e:  # it is a directory, or a terminal that has gone
        raise UserError(f"standard input cannot be read: {e.strerror or e}",
                        "pipe prompts into the command, one on each line, or give one with --prompt") from e
