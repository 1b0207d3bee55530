"""What is said beside the answers: on stderr, quietly."""

from __future__ import annotations

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.words import counted
from gemma_tune.cli import screen


def say(text: str, style: str = "dim") -> None:
    """A remark, wrapped at words on a terminal."""
    screen.prose(screen.Text(text, style=style))


def say_place(text: str) -> None:
    """A remark with a path in it, which stays in one piece, to be copied."""
    screen.err.print(screen.Text(text, style="dim"), soft_wrap=True)


def cut_off(tokens: int, way: str = "--max-new-tokens N") -> str:
    """What to say of an answer that reached its limit; ``way`` sets another."""
    return (f"(the answer is cut off after {counted(tokens, 'token')}, the limit; {way} sets another, as far as the "
            "model's context goes)")


def figures(stream: Streaming, answer: Answer, context: int | None) -> str:
    """The quiet line after an answer: how fast it came, and how full the context is.

    Tokens per second are those after the first, by the time that they took.
    """
    parts = []
    if stream.first is not None and stream.seconds is not None:
        rest = stream.seconds - stream.first
        if answer.tokens > 1 and rest > 0:
            parts.append(f"{(answer.tokens - 1) / rest:.1f} tokens/s")
        parts.append(f"first token after {stream.first:.2f} s")
    if (used := in_context(stream, answer)) is not None:
        parts.append(f"{used:,}{f' of {context:,}' if context else ''} tokens in context")
    return f"({' · '.join(parts)})" if parts else ""


def in_context(stream: Streaming, answer: Answer) -> int | None:
    """Tokens of the conversation with this answer."""
    return None if stream.prompt_tokens is None else stream.prompt_tokens + answer.tokens
