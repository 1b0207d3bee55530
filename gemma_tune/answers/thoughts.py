"""The text of an answer without what was thought before it, whatever the family marks thoughts with."""

from __future__ import annotations

from collections.abc import Sequence

from gemma_tune.answers.generation import answer_of
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.thinking import apart, opened_thought

_TAIL = 16  # tokens of a prompt's end, in which it can open a thought
_THOUGHT, _SAID = "<think>", "</think>"
# Tokens around a thought, which nothing else is written with: of Gemma 4, Mistral and Seed-OSS; of R1, Qwen and others
# where they are special tokens, which no text shows.
_AROUND = (("<|channel>", "<channel|>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"), (_THOUGHT, _SAID))
_HARMONY = ("<|channel|>", "<|message|>", "<|end|>")  # GPT-OSS's, by which several messages are an answer
_ANALYSIS = "analysis"


def said(chat: ChatFormat, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """The text of an answer, with its outer white space taken away, and what was thought before it left out: of a
    thought that did not end nothing is left."""
    tail, stops, around = prompt[-_TAIL:], {*chat.stop_ids}, _around(chat)
    end = next((n for n, token in enumerate(answer) if token in stops), len(answer))
    ids = _without_analysis(chat, answer[:end])
    for begin, over in around.values():
        ids = _outside(ids, begin, over, _opened(tail, begin, over))
    text = answer_of(chat, ids).text
    if _THOUGHT in around:
        return text.strip()
    opened = opened_thought(chat.tokenizer.decode([*tail])).startswith(_THOUGHT)
    content = apart({"role": "assistant", "content": text}, opened)["content"]
    unended = content == text and (opened or text.lstrip().startswith(_THOUGHT)) and _SAID not in text
    return "" if unended else content.strip()


def _around(chat: ChatFormat) -> dict[str, tuple[int, int]]:
    """The ids around a thought, by what begins it, of the marks that are tokens of this model."""
    found = {begin: (_id(chat, begin), _id(chat, over)) for begin, over in _AROUND}
    return {mark: ids for mark, ids in found.items() if None not in ids and (mark != _THOUGHT or mark in chat.markers)}


def _id(chat: ChatFormat, mark: str) -> int | None:
    """The one token that a mark is, if it is one."""
    found = chat.tokenizer.convert_tokens_to_ids(mark)
    return None if found == chat.tokenizer.unk_token_id else found


def _opened(tail: Sequence[int], begin: int, over: int) -> bool:
    """Whether the last of both marks in the prompt's end is the one that begins a thought."""
    return next((token == begin for token in reversed(tail) if token in (begin, over)), False)


def _outside(ids: Sequence[int], begin: int, over: int, inside: bool) -> list[int]:
    """What is not between these tokens, wherever they are: so Gemma 4's template takes thoughts out of a turn.

    Args:
        inside: whether it begins within a thought.
    """
    found = []
    for token in ids:
        if token == begin:
            inside = True
        elif token == over and inside:
            inside = False
        elif not inside:
            found.append(token)
    return found


def _without_analysis(chat: ChatFormat, ids: Sequence[int]) -> Sequence[int]:
    """The messages of an answer of GPT-OSS but those of the analysis channel; nothing where no other one begins."""
    channel, message, end = (_id(chat, mark) for mark in _HARMONY)
    if None in (channel, message, end) or channel not in ids:
        return ids
    found: list[int] = []
    for part in _parts(ids, end):
        header = part[:part.index(message)] if message in part else part
        name = header[header.index(channel) + 1:] if channel in header else header
        if message in part and not chat.tokenizer.decode([*name]).strip().startswith(_ANALYSIS):
            found += part
    return found


def _parts(ids: Sequence[int], end: int) -> list[list[int]]:
    """The ids, divided behind each of these tokens."""
    found: list[list[int]] = [[]]
    for token in ids:
        found[-1].append(token)
        if token == end:
            found.append([])
    return found
