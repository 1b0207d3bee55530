"""The interactive side of ``chat``: reading lines, commands that begin with a slash, and interruptions."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from gemma_tune import console
from gemma_tune.chat import Conversation, answers
from gemma_tune.errors import UserError
from gemma_tune.generation import Answer, Stream

HELP = ("/reset  forget the conversation      /system TEXT  new system prompt (and forget; no TEXT removes it)\n"
        "/help   this help                    /exit or Ctrl-D  leave      Ctrl-C  stop the answer")


def interactive(conversation: Conversation) -> None:
    """Ask and answer until the user leaves. Ctrl-C stops an answer, or clears the line being typed."""
    try:
        import readline  # noqa: F401 - its import gives input() line editing and history
    except ImportError:  # Windows' console edits lines by itself
        pass
    console.err.print(f"{conversation.which}\n{HELP}", markup=False, style="dim")
    while True:
        try:
            line = input("\n> ").strip()
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
        console.err.print(HELP, markup=False, style="dim")
    return True


def _exchange(conversation: Conversation, line: str) -> None:
    try:
        answer = show(conversation.ask(line))
        conversation.keep(line, answer)
    except UserError as e:
        console.error(e)


def show(stream: Stream) -> Answer:
    """Write an answer to stdout as it comes; Ctrl-C ends the answer, which is kept as far as it came."""
    try:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        stream.stop()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return stream.finish()


def one_by_one(conversation: Conversation, prompts: Iterable[str], as_json: bool) -> int:
    """Answer prompts independently of each other; returns how many."""
    count = 0
    for prompt, stream in answers(conversation, iter(prompts)):
        count += 1
        if not as_json:
            show(stream)
            continue
        for _ in stream:
            pass
        answer = stream.finish()
        console.result_json({"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "ended": answer.ended,
                             "model": conversation.which})
    return count
