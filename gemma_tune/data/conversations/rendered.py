"""Conversations that a chat template has written down already, as one text in a column ``text``.

Public datasets come in the form that one model or one script wants: ``<s>[INST] … [/INST] … </s>``, ChatML, Llama 3's
and Gemma's turns, ``### Human: … ### Assistant: …``, Alpaca's prompt. As plain text, each token of them would be
learned, the questions too, in a form that the model is never asked in. So they are taken apart, and written by the
template of the model that is trained. Only a text that is such a conversation from its first to its last character is
one. Texts that only name the speakers are in ``spoken``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from gemma_tune.data.conversations.layouts import Draft, with_system
from gemma_tune.data.conversations.problems import Problem
from gemma_tune.data.conversations.spoken import may_be_spoken, spoken, transcript

_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
          "model": "assistant", "gpt": "assistant"}
_START = re.compile(r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<｜begin▁of▁sentence｜>|\[gMASK\]<sop>)?\s*")
_ENDS = ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>")
_END = f"(?:{'|'.join(map(re.escape, _ENDS))})"
# Turns that begin and end with marks: the role, and what is said. The last one may lack its end.
_MARKED = [re.compile(rf"(?s:{begin}(?P<text>.*?)(?:{end}\s*|\Z))") for begin, end in (
    (r"<\|im_start\|>(?P<role>\w+)(?:\n|<\|im_sep\|>)", r"<\|im_end\|>"),  # ChatML
    (r"<\|start_header_id\|>(?P<role>\w+)<\|end_header_id\|>\n*", r"<\|eot_id\|>"),  # Llama 3
    (r"<\|header_start\|>(?P<role>\w+)<\|header_end\|>\n*", r"<\|eot\|>"),  # Llama 4
    (r"<start_of_turn>(?P<role>\w+)\n", "<end_of_turn>"),  # Gemma 1 to 3
    (r"<\|turn>(?P<role>\w+)\n", r"<turn\|>"),  # Gemma 4
    (r"<\|(?P<role>system|user|assistant)\|>\n?", rf"(?:<\|end\|>|{_END}|(?=<\|(?:system|user|assistant)\|>))"),  # Phi
)]
_INST = re.compile(rf"(?s:\[INST\](?P<asked>.*?)\[/INST\](?P<said>.*?)(?:(?:{_END}\s*)?(?:<s>\s*)?(?=\[INST\])|\Z))")
_SYS = re.compile(r"(?s:\s*<<SYS>>(?P<system>.*?)<</SYS>>(?P<asked>.*))")
_ASKS = "<｜User｜>"  # a text before it is the system's
_DEEPSEEK = re.compile(r"<｜(User|Assistant)｜>")
# Titles of a script's own, and the role that each is.
_TITLES = {"System": "system", **dict.fromkeys(("Human", "User", "Instruction", "Question"), "user"),
           **dict.fromkeys(("Input", "Context"), "more"),
           **dict.fromkeys(("Assistant", "Response", "Answer", "Output"), "assistant")}
_TITLE = re.compile(rf"### ?({'|'.join(_TITLES)}):")
# What Alpaca's script puts before each instruction; it is no part of it.
_PREFACE = re.compile(r"\s*Below is an instruction that describes a task[^#]{0,200}\Z")
# A conversation has none of these in what is said; with them it has tools, which are not taken apart.
_TOOLS = ("<tool_call>", "<tool_response>", "[TOOL_CALLS]", "<|python_tag|>", "<|tool_call>", "<tools>")

_BEGINNINGS = ("<|", "<start_of_turn>", "[INST]", "###", "Below is an instruction")

Turns = list[dict[str, Any]]


def is_rendered(text: Any) -> bool:
    """Whether a text is a conversation that a template wrote."""
    return isinstance(text, str) and _turns(text) is not None


def is_marked(text: str) -> bool:
    """Whether a conversation has a template's marks, by which it is one for certain; others name who speaks."""
    return text.startswith(_BEGINNINGS, _START.match(text).end()) or _ASKS in text


def rendered(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``text``, a conversation that a template wrote; ``system``."""
    return Draft(with_system(turns_in_text(row["text"]) or [], row, problems), "text")


_ANSWER = "…"  # any
_INDENT = re.compile(r"\n*(\t|  +)")  # of code; a single space stands between a name and what is said


def with_prompt_apart(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of a prompt and its completion with the prompt's turns as a list, where it is written so up to where the
    answer begins; else the row as it is."""
    prompt, completion = row.get("prompt"), row.get("completion")
    found = prompt_apart(prompt, completion) if isinstance(prompt, str) and isinstance(completion, str) else None
    return {**row, "prompt": found[0], "completion": found[1]} if found else row


def prompt_apart(prompt: str, answer: str) -> tuple[Turns, str] | None:
    """The turns of a prompt that is written so up to where the answer begins, and what the answer says without its
    mark of the end; None for any other prompt."""
    *asked, last = _turns(f"{prompt} {_ANSWER}") or [_turn(None, "")]
    if (last["role"], last["content"].strip()) != ("assistant", _ANSWER):
        return None
    *before, found = _turns(prompt + answer) or [_turn(None, "")]
    indent = _INDENT.match(answer)
    said = (found["content"] if before == asked else answer).removeprefix(" ")
    return [dict(turn) for turn in asked], indent[1] + said.lstrip() if indent else said


def turns_in_text(text: str) -> Turns | None:
    """The turns of a conversation that a template wrote, or that names who speaks; None for any other text."""
    found = _turns(text)
    return found and [dict(turn) for turn in found]  # what is found belongs to whoever asks next, too


def turns_beside(text: str, other: Any) -> Turns | None:
    """The same of a text that is compared with another one, by which it is seen where the answer begins."""
    found = turns_in_text(text)
    if not found or is_marked(text) or not isinstance(other, str):
        return found
    turns = transcript(text, other)
    return [_turn(turn["role"], turn["content"]) for turn in turns] if turns else found


def _turns(text: str) -> Turns | None:
    """The turns of a rendered conversation; None if it is none, which is seen from how most texts begin."""
    at = _START.match(text).end()
    marked = text.startswith(_BEGINNINGS, at) or _ASKS in text
    return _read(text, at, marked) if marked or may_be_spoken(text, at) else None


@functools.lru_cache(maxsize=4)  # a row is asked for its format, its turns and its columns, and a pair has two of each
def _read(text: str, at: int, marked: bool) -> Turns | None:
    body = text[at:]
    by_name = functools.partial(_spoken, by_empty_lines=text.startswith("\n\n"))
    for read in (_marked, _llama_2, _deepseek, _titled) if marked else (by_name,):
        if turns := read(body):
            if any(mark in body for mark in _TOOLS):
                return None
            roles = {turn["role"] for turn in turns}
            return turns if {"user", "assistant"} <= roles else None
    return None


def _marked(text: str) -> Turns | None:
    for layout in _MARKED:
        if layout.match(text):
            return _consumed(text, layout, lambda turn: [
                _turn(_ROLES.get(turn["role"].lower()), turn["text"].strip("\n"))])
    return None


def _llama_2(text: str) -> Turns | None:
    def turns(match: re.Match[str]) -> Turns:
        asked, system = match["asked"], []
        if found := _SYS.fullmatch(asked):
            asked, system = found["asked"], [_turn("system", found["system"].strip())]
        return [*system, _turn("user", asked.strip()), _turn("assistant", match["said"].strip())]

    return _consumed(text, _INST, turns) if text.startswith("[INST]") else None


def _consumed(text: str, layout: re.Pattern[str], turns: Callable[[re.Match[str]], Turns]) -> Turns | None:
    """What matches of a layout, one directly behind the other, say; None if they are not all of the text."""
    found, at = [], 0
    while at < len(text):
        match = layout.match(text, at)
        if match is None:
            if not found or _without_ends(text[at:]).strip():
                return None
            break
        found += turns(match)
        at = match.end()
    return None if any(turn["role"] is None for turn in found) else found


def _deepseek(text: str) -> Turns | None:
    before, *pieces = _DEEPSEEK.split(text)
    if not pieces or "<" in before:
        return None
    system = [_turn("system", before.strip())] if before.strip() else []
    return system + [_turn(_ROLES[role.lower()], said) for role, said in zip(pieces[::2], pieces[1::2])]


def _titled(text: str) -> Turns | None:
    """``### Human: … ### Assistant: …`` and the like; what follows ``### Input:`` stands below the question."""
    before, *pieces = _TITLE.split(text)
    if not pieces or before.strip() and not _PREFACE.fullmatch(before):
        return None
    # An answer may have such titles as well: of each role the first one is the script's.
    titles = {_TITLES[title]: title for title in reversed(pieces[::2])}
    found: Turns = []
    for title, said in zip(pieces[::2], pieces[1::2]):
        role = _TITLES[title]
        if title != titles[role] and found:
            found[-1]["content"] += f"### {title}:{said}"
            continue
        if role != "more":
            found.append({"role": role, "content": said})
        elif not found or found[-1]["role"] != "user":
            return None
        elif said.strip():
            found[-1]["content"] = f"{found[-1]['content'].strip()}\n\n{said.strip()}"
    return [_turn(turn["role"], turn["content"].strip()) for turn in found]


def _spoken(text: str, by_empty_lines: bool) -> Turns | None:
    turns = spoken(text, by_empty_lines)
    return turns and [_turn(turn["role"], turn["content"]) for turn in turns]


def _turn(role: str | None, text: str) -> dict[str, Any]:
    return {"role": role, "content": _without_ends(text) if role == "assistant" else text}


def _without_ends(text: str) -> str:
    """A text without what a template puts behind all that is said."""
    while (shorter := text.rstrip()).endswith(_ENDS):
        text = shorter[:-len(next(end for end in _ENDS if shorter.endswith(end)))].rstrip()
    return text
