"""The turns of a chat: what stands around each kind of message, and what Ollama makes of messages with it.

Sources: Ollama's `template/template.go` (`.System` joins all system messages, `.Messages` holds them as well,
neighbours of one role are merged, and a template that uses `.Messages` needs no `.Response`) and Go's text/template. A
TEMPLATE never holds the BOS token: the tokenizer adds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma_tune.ollama.probe import Messages
from gemma_tune.ollama.thought import Thought
from gemma_tune.ollama.tool_turns import Tools, ToolTurns


@dataclass(frozen=True)
class Turns:
    """The surroundings (before, after) of each kind of turn.

    Args:
        user, assistant, system: around a message; system is None where the template has no such turn.
        later_system: around a system message that is not the first message, where that is something else.
        fold: around the system text inside the first user turn, where that is its place.
        fold_first: the project joins `system`, a blank line and the user's text *before* the template sees (and trims)
            them, since the template refuses system messages or leaves them out.
        fold_last: whether that is the last user's turn, as in newer templates of Mistral, instead of the first one.
        fold_whole: whether the system text with its surroundings and the user's text lose white space as one text, as
            in Llama 2's template.
        first: what stands before the text of the first user's turn where no system text is folded into it.
        opening: what stands first if the template sees no system message in front.
        skips_empty: whether an empty system message is as none.
        prompt: what asks for the answer.
        unthinking: what asks for one without thinking, where a request can choose.
        trims: roles whose content loses the white space around it.
        tools: what is written where there are tools; None where they have no place.
        thought: how reasoning is written; None where it has no place.
    """

    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system: tuple[str, str] | None = None
    fold: tuple[str, str] | None = None
    fold_first: bool = False
    fold_last: bool = False
    fold_whole: bool = False
    first: str = ""
    opening: str = ""
    later_system: tuple[str, str] | None = None
    default_system: str | None = None
    skips_empty: bool = False
    trims: frozenset[str] = frozenset()
    unthinking: str | None = None
    tools: ToolTurns | None = None
    thought: Thought | None = None

    def render(self, messages: Messages, tools: Tools | None = None, think: bool = True) -> str:
        """What Ollama makes of the messages with the TEMPLATE of these turns; tests hold the two together."""
        if self.default_system and messages[0]["role"] != "system":  # Ollama puts the model's SYSTEM in front
            messages = [{"role": "system", "content": self.default_system}, *messages]
        offered = tools if self.tools else None
        roles = [message["role"] for message in messages]
        asked = [n for n, role in enumerate(roles) if role == "user"]
        parts = [self._start(messages, offered)]
        for n, message in enumerate(messages):
            parts.append(self._between(roles[n - 1] if n else "", roles[n]))
            if roles[n] == "user":
                inside = self._inside(messages, n == asked[0], n == asked[-1])
                parts.append(self._asked(message, inside, offered if n == asked[0] else None))
            elif roles[n] == "assistant":
                parts.append(self._answer(message, not asked or n > asked[-1]).join(self.assistant))
            elif roles[n] == "tool" and self.tools:
                parts.append(self.tools.answered(self._trimmed("tool", message["content"])))
            elif roles[n] == "system" and self.system and self._counts(message):
                parts.append(self._trimmed("system", message["content"]).join(self._around_system(n, offered)))
        prompt = self.prompt if think or self.unthinking is None else self.unthinking
        return "".join([*parts, self._between(roles[-1], ""), prompt])

    def _counts(self, message: dict[str, Any]) -> bool:
        """Whether a message is a system message that the template takes for one."""
        return message["role"] == "system" and bool(message["content"] or not self.skips_empty)

    def _start(self, messages: Messages, offered: Tools | None) -> str:
        if not self.fold_first and any(map(self._counts, messages if self.skips_empty else messages[:1])):
            return ""
        return self.tools.listed(self.tools.opening, offered) if offered else self.opening

    def _between(self, before: str, role: str) -> str:
        """What ends and begins a row of results."""
        if not self.tools or before == role or "tool" not in (before, role):
            return ""
        return self.tools.group[0 if role == "tool" else 1]

    def _inside(self, messages: Messages, first: bool, last: bool) -> str:
        """What stands inside a user's turn before its text: the system text, with what is around it."""
        systems = [message["content"] for message in messages if self._counts(message)]
        if not self.fold or not systems:
            return self.first if first else ""
        system = "\n\n".join(systems)
        if not self.fold_whole:
            system = self._trimmed("system", system)
        return system.join(self.fold) if (last if self.fold_last else first) else ""

    def _asked(self, message: dict[str, Any], inside: str, offered: Tools | None) -> str:
        before, text = self.user[0], message["content"]
        content = self._trimmed("user", inside + text) if self.fold_whole else inside + self._trimmed("user", text)
        if offered:
            before = self.tools.listed(self.tools.user, offered)
        return before + content + self.user[1]

    def _around_system(self, n: int, offered: Tools | None) -> tuple[str, str]:
        if n == 0 and offered:
            before, after = (self.tools.listed(text, offered) for text in self.tools.system)
            return before, after
        return self.later_system if n and self.later_system else self.system

    def _answer(self, message: dict[str, Any], unanswered: bool) -> str:
        """What stands in an assistant's turn: reasoning, text and calls."""
        text = self._trimmed("assistant", message["content"])
        thought = self.thought.written(message.get("reasoning_content"), unanswered) if self.thought else ""
        if calls := message.get("tool_calls") if self.tools else None:
            beside = self.tools.beside
            text = text + beside if message["content"] and beside is not None else self.tools.alone
            text += self.tools.calls(calls)
        return thought + text

    def _trimmed(self, role: str, text: str) -> str:
        return text.strip() if role in self.trims else text
