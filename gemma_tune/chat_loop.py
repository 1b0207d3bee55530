"""The interactive side of ``chat``: reading lines, commands that begin with a slash, and interruptions."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator

from gemma_tune import console
from gemma_tune.chat import Conversation, answers
from gemma_tune.errors import UserError

HELP = ("/reset  forget the conversation      /system TEXT  new system prompt (and forget; no TEXT removes it)\n"
        "/help   this help                    /exit or Ctrl-D  leave      Ctrl-C  stop the answer")


def interactive(conversation: Conversation) -> None:
    """Ask and answer until the user leaves. Ctrl-C stops an answer, or clears the line being typed."""
    with contextlib.suppress(ImportError):  # Windows' console edits lines by itself
        import readline  # noqa: F401 - its import gives input() line editing and history
    console.err.print(f"{conversation.which}\n{HELP}", markup=False, style="dim")
    while True:
        try:
            line = _read_line().strip()
        except KeyboardInterrupt:
            console.err.print("\n(Ctrl-D or /exit leaves)", style="dim")
            continue
        except EOFError:
            console.err.print()
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
    console.err.print("\n> ", end="", markup=False)
    return input()


def _command(conversation: Conversation, line: str) -> bool:
    """Obey a slash command; False means leave."""
    name, _, rest = line.partition(" ")
    if name in ("/exit", "/quit", "/bye"):
        return False
    if name == "/reset":
        conversation.reset()
        console.err.print("(the conversation starts anew)", style="dim")
    elif name == "/system":
        conversation.reset(rest.strip())
        console.err.print(f"(system prompt: {conversation.system or 'none'})", markup=False, style="dim")
    else:
        unknown = "" if name in ("/help", "/?") else f"(there is no {name})\n"
        console.err.print(unknown + HELP, markup=False, style="dim")
    return True


def _exchange(conversation: Conversation, line: str) -> None:
    """One question and its answer. Ctrl-C ends the answer, which is kept as far as it came."""
    try:
        stream = conversation.ask(line)
        try:
            for piece in stream:
                console.piece(piece)
        except KeyboardInterrupt:
            stream.stop()
        console.result("")
        conversation.keep(line, stream.finish())
    except KeyboardInterrupt:  # a second one, while the last token is still being computed
        console.err.print("(stopped; this answer is not kept)", style="dim")
    except UserError as e:
        console.error(e)


def one_by_one(conversation: Conversation, prompts: Iterable[str], as_json: bool) -> None:
    """Answer prompts independently of each other; Ctrl-C ends all of it.

    Raises:
        UserError: a prompt that does not fit into the model's context, or is not UTF-8 text.
    """
    for prompt, stream in answers(conversation, _text(prompts)):
        try:
            for piece in stream:
                if not as_json:
                    console.piece(piece)
        except BaseException:  # also a closed pipe; the interpreter must not end while a thread is inside torch
            stream.stop()
            stream.finish()
            raise
        answer = stream.finish()
        if as_json:
            console.result_json({"prompt": prompt, "answer": answer.text, "tokens": answer.tokens,
                                 "ended": answer.ended, "model": conversation.which})
        else:
            console.result("")


def _text(lines: Iterable[str]) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not {e.encoding} text (byte {e.start} of a part of it)",
                        "save the prompts as UTF-8") from e
