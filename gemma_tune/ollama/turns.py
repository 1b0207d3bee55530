"""The turns of a chat: what stands around each kind of message, and what Ollama makes of messages with it.

Sources: Ollama's `template/template.go` (`.System` joins all system messages, `.Messages` holds them as well,
neighbours of one role are merged, and a template that uses `.Messages` needs no `.Response`) and Go's text/template. A
TEMPLATE never holds the BOS token: the tokenizer adds it.
"""

from __future__ import annotations

from dataclasses import dataclass

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
            them, since the template refuses system messages.
        opening: what stands first if there is no system message in front.
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
        systems = [m["content"] for m in messages if m["role"] == "system" and (m["content"] or not self.skips_empty)]
        folded = "\n\n".join(systems) if systems and self.fold else None
        last_asked = max((n for n, m in enumerate(messages) if m["role"] == "user"), default=-1)
        parts, before = [], ""
        if not systems if self.skips_empty else messages[0]["role"] != "system":
            parts.append(self.tools.listed(self.tools.opening, offered) if offered else self.opening)
        for n, message in enumerate(messages):
            role = message["role"]
            if self.tools and before == "tool" != role:
                parts.append(self.tools.group[1])
            if role == "user":
                around, content = self.user, self._trimmed("user", message["content"])
                if folded is not None:
                    content, folded = self._folded(folded, message["content"]), None
                if offered and "user" not in (m["role"] for m in messages[:n]):
                    around = self.tools.listed(self.tools.user, offered), self.user[1]
                parts.append(content.join(around))
            elif role == "assistant":
                parts.append(self._answer(message, n > last_asked).join(self.assistant))
            elif role == "tool" and self.tools:
                parts.append("" if before == "tool" else self.tools.group[0])
                parts.append(self.tools.answered(self._trimmed("tool", message["content"])))
            elif role == "system" and self.system and (message["content"] or not self.skips_empty):
                around = self.later_system if n and self.later_system else self.system
                if offered and n == 0:
                    around = [self.tools.listed(text, offered) for text in self.tools.system]
                parts.append(self._trimmed("system", message["content"]).join(around))
            before = role
        parts.append(self.tools.group[1] if self.tools and before == "tool" else "")
        return "".join([*parts, self.prompt if think or self.unthinking is None else self.unthinking])

    def _folded(self, system: str, content: str) -> str:
        if self.fold_first:
            return self._trimmed("user", system + self.fold[1] + content)
        return self._trimmed("system", system).join(self.fold) + self._trimmed("user", content)

    def _answer(self, message: dict, unanswered: bool) -> str:
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
