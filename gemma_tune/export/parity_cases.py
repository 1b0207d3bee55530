"""Conversations that show where a template or a tokenizer goes its own way: turns, white space, scripts, code.

Of some it is known that llama.cpp goes its own way with some models. They are compared like the others, so that the
difference is seen, and seen to end; it is not the fault of an export.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gemma_tune.answers.prompts import Prompt
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.export.parity_report import COLUMNS, KNOWN, LLAMA_CPP, OLLAMA, Check
from gemma_tune.gguf.vocabulary.runs import looks_for_spaces

_CODE = 'def mean(xs):\n\t"""Of xs."""\n\tif not xs:\n\t\treturn {}  # {{ empty }}\n\n\n    return sum(xs) / len(xs)\n'
_EMOJI = "👩‍👩‍👧 🇩🇪🇯🇵 👍🏽 ✌️ 1️⃣ 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🙂"

Messages = Sequence[Mapping[str, Any]]

SPACES = "40 spaces in a row"

# The first text of each is the system message, then user and assistant in turn; the last is the user's.
_TALKS: dict[str, tuple[str | None, ...]] = {
    "no system": (None, "Hi"),
    "system": ("Answer briefly.", "What is cash flow?"),
    "several turns": (None, "one", "two", "three", "four", "five"),
    "system, several turns": ("Be brief.\n\nBe kind.", "one", "two", "three"),
    "padded white space": (None, " \n  hi\t", "\n\n yes  \n", "\t so, what? \n\n"),
    "padded system": ("\n S \n\n", "\n  hi "),
    "emoji": (_EMOJI, f"What is {_EMOJI}?", _EMOJI, "👩🏾‍🚀"),
    "Chinese": ("请用中文回答。", "什么是自由现金流？", "经营现金流减去资本支出。", "谢谢，再见！"),
    "code": (None, f"What is wrong here?\n\n```python\n{_CODE}```", f"```python\n{_CODE}```\n",
             'C:\\temp\\n "x" <b>&amp;</b>'),
    "other scripts": (None, "Ünïcødé नमस्ते สวัสดี مرحبا שלום Привет 안녕하세요 こんにちは 1,234.50 €"),
    "accents apart": (None, "cafe\u0301 man\u0303ana"),
    "padded wide spaces": (None, "\u3000\u3000什么？\u00a0"),
    SPACES: (None, f"a{' ' * 40}b"),
    "runs of white space": (None, "a" + "\n" * 40 + "b" + "\t" * 35 + "c\r\n\r\n \n\n\t  \t\t\n" + " " * 7 + "d"),
    "other digits": (None, "½ cup, point ①, x²"),
}


class Limit(NamedTuple):
    """The columns in which a conversation may differ, and why."""

    columns: tuple[str, ...]
    reason: str


LIMITS = {
    "padded wide spaces": Limit((LLAMA_CPP,), "llama.cpp's template engine trims ASCII white space only"),
    "accents apart": Limit(COLUMNS, "llama.cpp does not put letters and accents together (NFC) as this tokenizer does"),
    SPACES: Limit(COLUMNS,
                  "this file's vocabulary looks for spaces in the text, which Hugging Face's tokenizer merges"),
    "other digits": Limit(COLUMNS, "llama.cpp takes digits such as ½ apart from the space before them"),
}
_EDGES = Limit(COLUMNS,
               "this tokenizer takes the white space beside its special tokens with them, which llama.cpp keeps")


def limit_of(name: str, messages: Messages, chat: ChatFormat, ggufs: Iterable[Path]) -> Limit | None:
    """What may differ in these files of a conversation; None where it has to be equal.

    Args:
        name: of a built-in conversation, or any other.
    """
    if _loses_edges(chat, messages):
        return _EDGES
    if name == SPACES and not any(map(looks_for_spaces, ggufs)):
        return None
    return LIMITS.get(name)


def _loses_edges(chat: ChatFormat, messages: Messages) -> bool:
    """Whether the tokenizer takes white space at the edge of a text for a part of the special token beside it (Phi-4's,
    of tokens that can do so)."""
    special = [token for token in chat.tokenizer.added_tokens_decoder.values() if token.special]
    padded = any((turn.get("content") or "") != (turn.get("content") or "").strip() for turn in messages)
    return padded and any(token.lstrip or token.rstrip for token in special)


def known(limit: Limit | None, detail: str, *, in_text: bool) -> Check | None:
    """The check of a prompt that an Ollama server makes otherwise, if that is a limit of llama.cpp, which it may run.

    Args:
        in_text: the text is another, and not the number of tokens alone.
    """
    of_templates = limit is not None and OLLAMA not in limit.columns  # else of the tokenizer
    return Check(KNOWN, f"{limit.reason} ({detail})") if limit and in_text == of_templates else None


def built_in() -> dict[str, Prompt]:
    """The conversations by name, each ending with a question."""
    return {name: Prompt(_messages(*texts)) for name, texts in _TALKS.items()}


def _messages(system: str | None, *texts: str | None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[n % 2], "content": text or ""} for n, text in enumerate(texts)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]
