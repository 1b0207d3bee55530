"""Conversations in one text, in which names of speakers stand before what is said: ``USER: … ASSISTANT: …``.

Vicuna's training writes turns so, on one line and with ``</s>`` behind each answer; Anthropic's HH and many scripts
write ``Human: … Assistant: …``, ``User: … Assistant: …`` or ``Q: … A: …``, each at the beginning of a line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any

# Names of the user and of the assistant that are used together.
_SPEAKERS = (("USER", "ASSISTANT"), ("User", "Assistant"), ("user", "assistant"), ("Human", "Assistant"),
             ("Human", "AI"), ("用户", "助手"), ("人类", "助手"))
# What stands before a question and its answer in other texts than dialogues, too.
_QUESTIONS = (("Question", "Answer"), ("Q", "A"), ("问题", "答案"), ("问", "答"))
_NAMES = "|".join(sorted({name for pair in (*_SPEAKERS, *_QUESTIONS) for name in pair}, key=len, reverse=True))
# The first speaker; or how a system prompt begins that stands before it. Any other text before it may be a document
# that shows a conversation.
_PREFACE = r"You are\b|(?:A|(?:This|The following|Below) is a) (?:chat|conversation|dialog(?:ue)?)\b"
_SYSTEM = "(?:System|SYSTEM|system|系统)[:：]"
_BEGINS = re.compile(rf"\s*(?:(?:{_NAMES})[:：]|(?P<system>{_SYSTEM})|(?P<preface>{_PREFACE}))")


def _layout(pair: tuple[str, str]) -> re.Pattern[str]:
    # Vicuna's turns go on on the same line.
    before, behind = (r"(?:(?<=\s)|(?<=</s>)|\A)", r"(?=\s|\Z)") if pair[0] == "USER" else (
        r"(?:(?<=\n)|(?<=</s>)|\A)[ \t]*", "")
    return re.compile(rf"{before}({'|'.join(pair)})[:：]{behind}")


# What follows an `A:` that is the first of several to choose from, and stands between the questions of a document.
_CHOICE, _HEADING = re.compile(r"\n[ \t]*B[:：]"), re.compile(r"\n#{1,6} [^\n]*\Z")

_LEAD = re.compile(r"\s*\n|[^\S\n]*")  # before what is said, but for the indent of a line of its own

_LAYOUTS = {pair: _layout(pair) for pair in (*_SPEAKERS, *_QUESTIONS)}
# Anthropic's HH has an empty line before each turn, also the first; names on other lines are part of what is said.
_HH = (("Human", "Assistant"), re.compile(r"(?:\A|\n\n)[ \t]*(Human|Assistant):"))


def may_be_spoken(text: str, at: int) -> bool:
    """Whether a text begins so at a place as such conversations do."""
    return _BEGINS.match(text, at) is not None


def spoken(text: str, by_empty_lines: bool = False) -> list[dict[str, Any]] | None:
    """The turns of such a conversation, without the layout around what is said; None where the text is none.

    Speakers need not take turns, which is judged as of any conversation; questions and answers do.

    Args:
        by_empty_lines: whether one stood before the text, as in HH's.
    """
    begins = _BEGINS.match(text)
    if begins is None:
        return None
    for (user, assistant), layout in (*([_HH] if by_empty_lines else ()), *_LAYOUTS.items()):
        if f"{assistant}:" not in text and f"{assistant}：" not in text:
            continue  # which is found sooner, in a long text, than where its lines begin
        before, *pieces = layout.split(text)
        names = pieces[::2]
        if {user, assistant} != {*names} or (user, assistant) in _QUESTIONS and not (
                _answers_each([user, assistant], pieces)):
            continue
        if before.strip() and not (begins["system"] or begins["preface"]):
            continue
        system = before[begins.end("system"):].strip() if begins["system"] else before.strip()
        return ([{"role": "system", "content": system}] if system else []) + [
            _turn((user, assistant), name, said) for name, said in zip(names, pieces[1::2], strict=True)]
    return None


def transcript(text: str, other: str) -> list[dict[str, Any]] | None:
    """The turns of one of Anthropic's two transcripts, of which the end of what both share tells where the answer
    begins; None where that is not to be seen.

    What follows there is split no further unless speakers take turns in it: an answer may quote ``Assistant:``. Before
    it, empty lines part turns, or where these lead to no answer, any lines do; so these do where empty lines lead to an
    earlier answer, unless one stands before the text, as before each turn of such a transcript.
    """
    by_empty_lines, text, other = text.startswith("\n\n"), text.lstrip(), other.lstrip()
    shared = commonprefix([text, other])
    found = [(layout, begun) for layout in (_HH[1], _LAYOUTS[_HH[0]]) if (begun := [*layout.finditer(shared)])
             and _take_turns(begun) and begun[0].start() == 0 and begun[-1][1] == _HH[0][1]]
    if not found:
        return None
    layout, turns = found[0] if by_empty_lines else max(found, key=lambda one: one[1][-1].end())
    more = [*layout.finditer(text, turns[-1].end())]
    turns += more if _take_turns([*turns, *more]) else []
    ends = [*(turn.start() for turn in turns[1:]), len(text)]
    return [_turn(_HH[0], turn[1], text[turn.end():end]) for turn, end in zip(turns, ends, strict=True)]


def _take_turns(names: Sequence[re.Match[str]]) -> bool:
    """Whether the user asks first and the speakers alternate from there."""
    return all(name[1] == _HH[0][number % 2] for number, name in enumerate(names))


def _turn(pair: tuple[str, str], name: str, said: str) -> dict[str, Any]:
    return {"role": "user" if name == pair[0] else "assistant", "content": said[_LEAD.match(said).end():].rstrip()}


def _answers_each(pair: list[str], pieces: list[str]) -> bool:
    """Whether names, with what each says, are a question and its answer every time, and nothing is between them."""
    names, answers = pieces[::2], [said.strip() for said in pieces[3::4]]
    return names == pair * (len(names) // 2) and not any(map(_HEADING.search, answers[:-1])) and not (
        pair[1] == "A" and any(map(_CHOICE.search, answers)))
