"""What is thought before an answer: under a key of its own, among the parts of a content, or inside the text."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from gemma_tune.data.conversations.parts import THOUGHTS
from gemma_tune.data.conversations.problems import Problem, damaged, kind

Turn = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
THINK = "<think>", "</think>"
_ENDED = re.compile(rf"^{THINK[1]}[ \t\r]*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)


def reasoning(where: str, message: Turn, turn: Turn, problems: list[Problem]) -> None:
    """Put what is thought under a key of its own into a turn; what is wrong with it is added to ``problems``."""
    for key in REASONING:
        text = message.get(key)
        if text is None or isinstance(text, bool):  # some programs note here whether there was any
            continue
        if not isinstance(text, str):
            problems.append(Problem("not_text", f"`{key}` of {where} is {kind(text)}, not text", "make it a string"))
        elif damaged(text):
            problems.append(Problem("broken_text", f"`{key}` of {where} contains damaged characters",
                                    "export the text as UTF-8 again"))
        elif text.strip():
            turn["reasoning_content"] = text
            return


def is_begun_by_prompt(said: str) -> bool:
    """Whether a thought ends, on a line of its own, that does not begin: models say that whose prompt has begun it.

    Inside a block of code the mark is what the text is about.
    """
    if THINK[1] not in said or THINK[0] in said or said.count(THINK[1]) > 1:
        return False
    end = _ENDED.search(said)
    return end is not None and len(_FENCE.findall(said, 0, end.start())) % 2 == 0


def reasoning_once(number: int, turn: Turn, problems: list[Problem]) -> None:
    """Take reasoning out of what is said that has a key of its own as well, as interfaces often answer it."""
    inside, end, said = turn["content"].lstrip().removeprefix(THINK[0]).partition(THINK[1])
    if end and inside.strip() in ("", turn["reasoning_content"].strip()):  # an empty one stands for none
        turn["content"] = said.lstrip("\r\n")
    else:
        problems.append(Problem("reasoning", f"turn {number} has reasoning under a key of its own, and another one in "
                                             f"its text ({THINK[0]})", "keep one of them"))


def without_thoughts(where: str, parts: list[Any], turn: Turn, problems: list[Problem]) -> list[Any]:
    """The parts of a content but for the thoughts in front, which become the turn's reasoning; templates write that
    before what is said, so that a thought behind a text would change its place."""
    thoughts = [*takewhile(lambda part: isinstance(part, dict) and part.get("type") in THOUGHTS, parts)]
    texts = [part.get("thinking", part.get("value")) for part in thoughts]
    if not texts or not all(isinstance(text, str) for text in texts):
        return parts
    text = "\n".join(texts)
    if turn.get("reasoning_content", text) != text:
        problems.append(Problem("reasoning", f"{where} has reasoning under a key of its own, and another one among the "
                                             "parts of its content", "keep one of them"))
    reasoning(where, {"reasoning_content": text}, turn, problems)
    return parts[len(thoughts):]
