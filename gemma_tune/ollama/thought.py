"""Reasoning in a chat template: what stands around it, and in which turns it is kept.

What Ollama reads in turn (`thinking/template.go`): a model can think where `.Thinking` stands inside the range over
`.Messages`; the texts at both ends of the branch that it stands in are its tags, by which it is found in answers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from gemma_tune.encoding.thinking import opened_thought, takes_thoughts_out
from gemma_tune.ollama.probe import FIRST, REPLY, SECOND, Jinja, Unlike, message, split, without

_THOUGHT = "Zthought"
_TAG_AT_END = re.compile(r"<[^<>\n]+>\s*\Z")


@dataclass(frozen=True)
class Thought:
    """Reasoning before an assistant's text.

    Args:
        around: what stands before and after it.
        always: kept in every turn; else only in those below the last user's message, where tools are called.
        trims: white space around it that is left out: "\\n", " \\n" for all, or none.
        empty: whether the same stands around nothing where there is no reasoning.
    """

    around: tuple[str, str]
    always: bool
    trims: str
    empty: bool = False

    def written(self, reasoning: str | None, unanswered: bool) -> str:
        """What stands before the text of a turn.

        Args:
            unanswered: whether the turn is below the last user's message.
        """
        kept = reasoning if reasoning and (self.always or unanswered) else ""
        if self.trims:
            kept = kept.strip("\n" if self.trims == "\n" else None)
        return kept.join(self.around) if kept or self.empty else ""


def with_thought(jinja: Jinja, turns: Any) -> Any:
    """The turns with how the template writes reasoning, as they are where it has no place for it.

    Args:
        turns: :class:`gemma_tune.ollama.turns.Turns`.
    """
    try:
        return _read(jinja, turns)
    except (TemplateError, Unlike):
        return turns


def marks_alone(jinja: Jinja, prompt: str) -> Thought | None:
    """Marks of reasoning for a prompt that begins it, or a template that takes it out of earlier answers, so that
    Ollama finds it in what is answered; no earlier turn is written so."""
    opened = opened_thought(prompt)
    try:
        opened = opened or ("<think>\n" if takes_thoughts_out(lambda turns: jinja(turns, False)) else "")
    except (TemplateError, Unlike):
        return None
    return Thought((opened, "\n</think>\n\n"), False, "") if opened else None


def _read(jinja: Jinja, turns: Any) -> Any:
    asked, answer = message("user", FIRST), message("assistant", REPLY)
    last = jinja([asked, _thinking(answer, _THOUGHT)], False)
    before, after, _ = split(without(split(last, FIRST)[1], turns.user[1]), _THOUGHT, REPLY)
    earlier = jinja([asked, _thinking(answer, _THOUGHT), message("user", SECOND)])
    padded = [jinja([asked, _thinking(answer, f"{around}{_THOUGHT}{around}")], False) for around in ("\n", " \n ")]
    trims = " \n" if padded[1] == last else "\n" if padded[0] == last else ""
    empty = turns.assistant[0] == before + after
    if empty and (tag := _TAG_AT_END.search(before)):
        turns = replace(turns, assistant=(before[:tag.start()], turns.assistant[1]))
    around = without(before, turns.assistant[0]), after
    if not all(text.strip() for text in around):
        raise Unlike("nothing marks reasoning")
    return replace(turns, thought=Thought(around, _THOUGHT in earlier, trims, empty))


def _thinking(turn: dict[str, Any], thought: str) -> dict[str, Any]:
    return {**turn, "reasoning_content": thought, "thinking": thought}
