"""What is left of web pages in texts: HTML's names for characters, and its tags.

Either can be what a text is about, so rows with them are counted and the first is shown; none is refused for them.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from html.entities import html5
from typing import Any

from gemma_tune.encoding.sequences import PreparedRow

ENTITIES, TAGS = "entities", "tags"
_PATTERNS = {
    ENTITIES: re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6}|(?P<name>[A-Za-z][A-Za-z0-9]{1,31}));"),
    TAGS: re.compile(r"</?(?:a|b|blockquote|br|center|div|em|font|h[1-6]|hr|i|img|li|ol|p|span|strong|sub|sup|table|"
                     r"tbody|td|th|thead|tr|ul)(?:\s{1,9}[\w:-]{1,30}\s?=[^<>]{0,300}|\s{0,9}/?)>", re.IGNORECASE)}
_SIGN = {ENTITIES: "&", TAGS: "<"}  # without which there is none: looking for it costs next to nothing
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)
# Words of a row that is about such signs, or holds a whole page.
_ABOUT = re.compile(r"\b(?:x?html5?|xml|css|svg|jsx|markup|entity|entities|escap(?:e|ed|es|ing)|tags?|doctype)\b|"
                    r"网页|标签|转义|实体", re.IGNORECASE)
_AROUND = 16  # characters that are shown on either side


@dataclass
class NoticedMarkup:
    """Rows with what is left of web pages, by kind, and where the first of each stands, with what it says."""

    rows: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def look_at(self, place: str, example: PreparedRow) -> None:
        """Look through what is said in a row; calls of tools and what they answer are for programs."""
        said = _said(example)
        for kind, pattern in _PATTERNS.items():
            texts = [text for text in said if _SIGN[kind] in text]
            found = next(filter(None, (_in_prose(pattern, text) for text in texts)), None)
            if found and not any(map(_ABOUT.search, said)):
                self.rows[kind] += 1
                self.first.setdefault(kind, f"{place}: {found}")

    def add(self, later: NoticedMarkup) -> None:
        """Put together with what was noticed in later rows."""
        self.rows.update(later.rows)
        self.first = later.first | self.first

    def as_dict(self) -> dict[str, Any]:
        """For data/report.json: of each kind ``rows`` and ``first``, ``file:line: what it says``."""
        return {kind: {"rows": self.rows[kind], "first": self.first.get(kind, "")} for kind in _PATTERNS}


def _said(example: PreparedRow) -> list[str]:
    if "text" in example:
        return [example["text"]]
    turns = (*example["messages"], *example.get("rejected", ()))
    return [turn["content"] for turn in turns if turn["role"] != "tool"]


def _in_prose(pattern: re.Pattern[str], text: str) -> str | None:
    """The first find outside code, with what stands around it, on one line."""
    if _first(pattern, text) is None:
        return None
    prose = _CODE.sub("`", text)
    found = _first(pattern, prose)
    return found and " ".join(prose[max(0, found.start() - _AROUND):found.start() + 2 * _AROUND].split())


def _first(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    return next((found for found in pattern.finditer(text)
                 if not (name := found.groupdict().get("name")) or f"{name};" in html5), None)
