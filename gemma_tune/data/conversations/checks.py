"""Texts that are well formed and still would teach something wrong: leftovers of templates, placeholders, controls.

What is looked for is looked for in everything that the model will read or learn: contents, reasoning, tool calls and
the declarations of tools.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import Any

from gemma_tune.base.words import near
from gemma_tune.data.conversations.formats import Example
from gemma_tune.data.conversations.places import PLACE
from gemma_tune.data.conversations.problems import Problem

_FOREIGN = """
    <start_of_turn> <end_of_turn> <bos> <eos> <start_of_image> <end_of_image> <image_soft_token>
    <|turn> <turn|> <|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|tool> <tool|>
    <BOS_TOKEN> <EOS_TOKEN> <｜User｜> <｜Assistant｜> <｜begin▁of▁sentence｜> <｜end▁of▁sentence｜>
    <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜> <｜tool▁sep｜>
    [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] [TOOL_CONTENT]
    [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [gMASK] <functioncall> <eoh> <eoa> <eot>
"""
FOREIGN = frozenset(_FOREIGN.split())
_OF_LLAMA_2 = ("<<SYS>>", "<</SYS>>")
# All others that are written like <|im_end|>: there are hundreds, and nothing else looks like them.
_PIPES = re.compile(r"<\|[A-Za-z][A-Za-z0-9_]{1,40}\|>\Z")
# What a special token nearly always looks like; a run of such candidates is cheaper than thousands of searches. The
# part between the brackets excludes both kinds, so that no candidate can hide another one inside it.
_TAG = re.compile(r"<[^\s<>\[\]]{1,60}>|\[[^\s<>\[\]]{1,60}\]")
# Next line (U+0085) is white space that some programs end lines with; the other controls are never meant.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
# {{name}}, {{ user.name }}, {{Order Number}}; behind a letter, brace or backslash it is LaTeX or code.
_PLACEHOLDER = re.compile(r"(?<![\w\\{}^_$=])\{\{ ?[A-Za-z_]\w{1,40}(?:[ .-]\w{1,40}){0,4} ?\}\}(?!\})")
# What spreadsheets and data frames write where there is nothing, or a formula that failed; as a whole answer.
_NOTHING = frozenset(("#N/A", "#REF!", "#VALUE!", "#NAME?", "#DIV/0!", "#NUM!", "#NULL!", "nan", "NaN", "<NA>", "NaT"))
# Where a picture goes that is not there, as LLaMA-Factory and LLaVA have it: at the beginning or the end of a text.
_PICTURE = re.compile(r"\A\s*(?:<image>(?! ?(?:tag|element))(?=[\s\w]|\Z)|<(?:video|audio)>(?=\n|\Z))|"
                      r"(?<=\n)<(?:image|video|audio)>\s*\Z")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
# A line with these is source text of a template or a formula; a text with these words is about templates.
_SOURCE_LINE = re.compile(r"</?[A-Za-z][^<>\n]*>|\{%|\\[A-Za-z]|[;{]\s{0,9}$|\$[^$\n]*\$")
_ABOUT_TEMPLATES = re.compile(r"\b(?:jinja2?|handlebars|mustache|vue(?:\.?js)?|angular(?:js)?|liquid|django|twig|"
                              r"helm|ansible|nunjucks|go templates?|template engine|placeholders?|f-strings?)\b",
                              re.IGNORECASE)
_NEAR = 200  # characters of a line that are looked at on either side
_LOOKED_AT = 50  # placeholders of a text; if the first of so many are source text, it is one
_SHOWN = 3  # findings of one kind that a message names


class TextChecks:
    """Finds what must not be in a text. Made once, used on a million rows."""

    def __init__(self, own_markers: Collection[str], allow: Collection[str] = (), new_tokens: Collection[str] = ()):
        """
        Args:
            own_markers: the special tokens of the model's tokenizer; they are never let through, since the tokenizer
                reads them as the control tokens that they are.
            allow: codes of findings that are no problem: foreign_marker, placeholder, control_character,
                undeclared_tool.
            new_tokens: words that look like markers of others, and are to be learned.
        """
        self._own = frozenset(marker for marker in own_markers if marker.strip())
        self._odd = sorted(marker for marker in self._own if not _TAG.fullmatch(marker))  # hardly ever any
        self._new = frozenset(new_tokens)
        self._foreign = "foreign_marker" not in allow
        self._placeholders = "placeholder" not in allow
        self._controls = "control_character" not in allow
        self._undeclared = "undeclared_tool" not in allow

    def problems(self, example: Example) -> list[Problem]:
        """Everything that is wrong with the texts of an example, in their order."""
        found: list[Problem] = []
        for where, text in _texts(example):
            self._markers(where, text, found)
            if self._placeholders and "{{" in text and (names := _placeholders(text, example)):
                found.append(Problem("placeholder", f"{where} contains the unreplaced placeholder {_list(names)}",
                                     "fill it in, or use --allow placeholder if it is meant to be there"))
            # A text of nothing but printable characters has no controls, and is told apart faster.
            if self._controls and not text.isprintable() and (codes := _CONTROL.findall(text)):
                names = [f"U+{ord(code):04X}" for code in codes]
                found.append(Problem("control_character", f"{where} contains the control character {_list(names)}",
                                     "remove it, or use --allow control_character"))
        if self._placeholders:
            found += _nothing(example)
        if self._undeclared and example.tools:
            found += _undeclared(example)
        return found

    def _markers(self, where: str, text: str, found: list[Problem]) -> None:
        own = [marker for marker in self._odd if marker in text]
        foreign = []
        if "<" in text or "[" in text:
            for tag in _TAG.findall(text):
                if tag in self._own:
                    own.append(tag)
                elif self._foreign and (tag in FOREIGN or _PIPES.match(tag)) and tag not in self._new:
                    foreign.append(tag)
            if self._foreign and "SYS>>" in text:
                foreign += [marker for marker in _OF_LLAMA_2 if marker in text and marker not in self._own]
        if own:
            found.append(Problem("template_marker", f"{where} contains the chat template's own {_list(own)}",
                                 f"remove {_list(own)} from the text"))
        if self._foreign and "<" in text and (picture := _PICTURE.search(text)):
            what = "give the row `images`, or leave it out" if PLACE in picture[0] else (
                "leave the row out, as text and pictures alone are learned")
            fix = f"{what}; or use --allow foreign_marker if it is meant to be there"
            found.append(Problem("foreign_marker", f"{where} contains {picture[0].strip()}, the place of something "
                                                   "that is not text", fix))
        if foreign:
            found.append(Problem("foreign_marker", f"{where} contains {_list(foreign)}, a leftover of another chat "
                                                   "template", f"remove {_list(foreign)} from the text, or use --allow "
                                                               "foreign_marker if it is meant to be there"))


def _nothing(example: Example) -> list[Problem]:
    """Turns that are what a table writes for a cell without anything in it."""
    return [Problem("placeholder", f"{where} ({turn['role']}) is {turn['content'].strip()}, with which tables say that "
                                   "there is nothing", "fill it in or leave the row out; or use --allow placeholder if "
                                                       "it is meant to be there")
            for where, turn in _numbered(example.messages or (), "")
            if len(turn["content"]) < 12 and turn["role"] != "tool" and turn["content"].strip() in _NOTHING]


def _undeclared(example: Example) -> list[Problem]:
    """Calls of tools that the row does not declare, though it declares some."""
    known = {tool["function"]["name"].strip() for tool in example.tools or ()}
    found = []
    for where, turn in (*_numbered(example.messages or (), ""), *_numbered(example.rejected or (), _WORSE)):
        called = [call["function"]["name"] for call in turn.get("tool_calls", ())]
        if names := [name for name in called if name not in known]:
            found.append(Problem("undeclared_tool", f"{where} calls {_list(names)}, which `tools` does not "
                                                    f"declare{near(names[0], known)}",
                                 "correct the name or declare it, or use --allow undeclared_tool if it is meant to be "
                                 "so"))
    return found


def _list(names: Collection[str]) -> str:
    """Findings without repeats, the first few of them."""
    distinct = list(dict.fromkeys(names))
    return ", ".join(distinct[:_SHOWN]) + (f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else "")


def _placeholders(text: str, example: Example) -> list[str]:
    prose = _CODE.sub("`", text)
    names = [match[0] for match in islice(_PLACEHOLDER.finditer(prose), _LOOKED_AT)
             if not _SOURCE_LINE.search(_line(prose, match.start()))]
    if names and any(_ABOUT_TEMPLATES.search(other) for _, other in _texts(example)):
        return []
    return names


def _line(text: str, position: int) -> str:
    """The line around a position, as much of a long one as can matter."""
    before, after = text[max(0, position - _NEAR):position], text[position:position + _NEAR]
    return before.rpartition("\n")[2] + after.partition("\n")[0]


def _texts(example: Example) -> Iterator[tuple[str, str]]:
    """Every text of an example with the words for its place."""
    if example.text is not None:
        yield "`text`", example.text
    yield from _of_turns(example.messages or (), "")
    yield from _of_turns(example.rejected or (), _WORSE)
    for number, tool in enumerate(example.tools or (), start=1):
        for text in _strings(tool["function"]):
            yield f"tool {number}", text


_WORSE = " of the rejected answer"


def _numbered(turns: Sequence[Any], of: str) -> Iterator[tuple[str, Any]]:
    """Turns with the words for their places."""
    return ((f"turn {number}{of}", turn) for number, turn in enumerate(turns, start=1))


def _of_turns(turns: Sequence[Any], of: str) -> Iterator[tuple[str, str]]:
    for where, turn in _numbered(turns, of):
        yield where, turn["content"]
        if len(turn) == 2:
            continue
        if "reasoning_content" in turn:
            yield f"the reasoning of {where}", turn["reasoning_content"]
        if "name" in turn:
            yield f"the tool name of {where}", turn["name"]
        for call in turn.get("tool_calls", ()):
            for text in _strings(call):
                yield f"a tool call of {where}", text


def _strings(value: Any) -> Iterator[str]:
    """The texts inside a JSON value, names of its keys included."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*reversed(list(value.values())), *value]
        elif isinstance(value, list):
            waiting += reversed(value)
