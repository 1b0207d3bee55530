"""Reasoning in a chat template: what stands around it, and in which turns it is kept.

What Ollama reads in turn (`thinking/template.go`): a model can think where `.Thinking` stands inside the range over
`.Messages`; the texts at both ends of the branch that it stands in are its tags, by which it is found in answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from gemma_tune.ollama.probe import FIRST, REPLY, SECOND, Jinja, Unlike, message, split, without

_THOUGHT = "Zthought"


@dataclass(frozen=True)
class Thought:
    """Reasoning before an assistant's text.

    Args:
        around: what stands before and after it.
        always: kept in every turn; else only in those below the last user's message, where tools are called.
        trims: white space around it that is left out.
    """

    around: tuple[str, str]
    always: bool
    trims: str


def read_thought(jinja: Jinja, turns: Any) -> Thought | None:
    """How the template writes reasoning; None where it has no place for it.

    Args:
        turns: the :class:`gemma_tune.ollama.turns.Turns`.
    """
    asked, answer = message("user", FIRST), message("assistant", REPLY)
    try:
        last = jinja([asked, _thinking(answer, _THOUGHT)], False)
        before, after, _ = split(without(split(last, FIRST)[1], turns.user[1]), _THOUGHT, REPLY)
        before = without(before, turns.assistant[0])
        earlier = jinja([asked, _thinking(answer, _THOUGHT), message("user", SECOND)])
        padded = [jinja([asked, _thinking(answer, f"{around}{_THOUGHT}{around}")], False) for around in ("\n", " \n ")]
    except (TemplateError, Unlike):
        return None
    if not before.strip() or not after.strip():
        return None
    trims = " \n" if padded[1] == last else "\n" if padded[0] == last else ""
    return Thought((before, after), _THOUGHT in earlier, trims)


def _thinking(turn: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**turn, "reasoning_content": thought, "thinking": thought}
