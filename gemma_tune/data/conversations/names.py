"""Names of roles and of keys that the user gives, in place of those that are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_tune.base import shell, strict_json

_LISTS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "preferred",
          "preferred_output", "history", "chat_history", "contents")


@dataclass(frozen=True)
class Names:
    """What ``--roles`` and ``--turn-keys`` say, and the column of turns in ``--columns``.

    Args:
        roles: role by the name that turns have for it: ``{"bot": "assistant"}``.
        keys: the key of turns that holds each: ``{"role": "speaker", "content": "utterance"}``.
        turns: the column that holds the turns, where it is named.
    """

    roles: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    turns: str | None = None

    def applied(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row with turns under the names that are known; the row itself where nothing was named."""
        if not self.roles and not self.keys:
            return row
        return {**row, **{key: self._list(row[key]) for key in (*_LISTS, self.turns) if key in row}}

    def _list(self, value: Any) -> Any:
        found = strict_json.list_in(value)
        turns = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
        return [self._turn(turn) for turn in found] if turns else value

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        named = {key: name for key, name in self.keys.items() if name in turn}
        taken = set(named.values())
        renamed = {key: value for key, value in turn.items() if key not in taken}
        for key, name in named.items():
            if key in renamed and renamed[key] != turn[name]:  # under a name that nobody reads, so that it is reported
                renamed[f"{key} (beside {name})"] = renamed[key]
            renamed[key] = turn[name]
        for key in ("role", "from"):
            if isinstance(name := renamed.get(key), str) and name in self.roles:
                renamed[key] = self.roles[name]
        return renamed


_SPEAKERS = ("speaker", "author", "sender", "who", "type", "name", "user", "agent", "角色", "说话人", "发言人", "身份")
_SAYINGS = ("utterance", "text", "message", "body", "msg", "say", "said", "data", "内容", "文本")
_CLEARLY = frozenset(("speaker", "author", "sender", "who", "role", "from", *_SPEAKERS[-4:]))
# Keys of what is no turn, but a question together with its answer (Firefly, XTuner).
_EXCHANGES = (("human", "assistant"), ("user", "assistant"), ("input", "output"), ("question", "answer"),
              ("prompt", "completion"), ("prompt", "response"), ("instruction", "output"), ("query", "response"),
              ("human", "gpt"), ("user", "bot"), ("问题", "答案"), ("问题", "回答"), ("用户", "助手"))
# What roles are called elsewhere: nobody can be sure of it, so they have to be named.
_PERHAPS = {
    **dict.fromkeys(("prompter", "customer", "client", "caller", "player"), "user"),
    **dict.fromkeys(("用户", "人类", "客户", "顾客", "提问者", "问"), "user"),
    **dict.fromkeys(("bot", "chatbot", "agent", "llm", "answer"), "assistant"),
    **dict.fromkeys(("助手", "助理", "客服", "机器人", "模型", "答"), "assistant"), "系统": "system"}
_MOST_NAMES = 8  # of roles; more are no roles


def suggested_keys(turn: Mapping[str, Any]) -> str | None:
    """What ``--turn-keys`` would be for a turn with unknown keys."""
    role, said = _likely_keys(turn)
    if role is None:
        return None
    return f"role={role}" if said in (None, "content") else f"role={role},content={said}"


def _likely_keys(turn: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The keys of a turn that hold its role, and what is said."""
    texts = [key for key, value in turn.items() if isinstance(key, str) and isinstance(value, str) and _sayable(key)]
    said = "content" if "content" in texts else next((key for key in texts if key.lower() in _SAYINGS), None)
    others = [key for key in texts if key not in (said, "value")]
    role = next((key for key in others if key.lower() in _SPEAKERS), others[0] if others else None)
    return role, said or next((key for key in others if key != role), None)


def spoken_by(turn: Mapping[str, Any]) -> str | None:
    """What ``--turn-keys`` would be where names of both keys say clearly that this is a turn of a dialog."""
    role, said = ((key or "").lower() for key in _likely_keys(turn))
    return suggested_keys(turn) if role in _CLEARLY and said in _SAYINGS else None


def exchange(turn: Mapping[str, Any]) -> tuple[str, str] | None:
    """The keys of a question and of its answer that stand in the place of one turn."""
    return next((keys for keys in _EXCHANGES if all(isinstance(turn.get(key), str) for key in keys)), None)


def suggested_turns(row: Mapping[str, Any]) -> str | None:
    """The column that looks like a list of turns."""
    return next((key for key, value in row.items() if isinstance(key, str) and _sayable(key)
                 and isinstance(value, list) and value and all(map(_says_something, value))), None)


def _says_something(turn: Any) -> bool:
    return isinstance(turn, dict) and any(isinstance(said, str) for said in turn.values())


def speaker_inside(turn: Mapping[str, Any]) -> str | None:
    """Where the name of who speaks is, if that is an object, as in exports of Discord: ``author.name``."""
    return next((f"{key}.{name}" for key in _SPEAKERS if isinstance(turn.get(key), dict) for name in ("role", "name")
                 if isinstance(turn[key].get(name), str)), None)


def suggested_saying(turn: Mapping[str, Any]) -> str | None:
    """The key that seems to hold what a turn says, which has none that is known."""
    return next((key for key in turn if isinstance(turn[key], str) and key.lower() in _SAYINGS), None)


def role_fix(name: str, unknown: Mapping[str, str | None]) -> str:
    """What to do about a role that nobody knows: one option that names all of a conversation's.

    Args:
        unknown: by name the role that it means, where that is known.
    """
    names = {name: role or _PERHAPS.get(name.lower(), "ROLE") for name, role in unknown.items() if _sayable(name)}
    if name not in names or len(names) > _MOST_NAMES:
        return f"write `{unknown[name]}`" if unknown[name] else "rename the role"
    named = shell.quote(",".join(f"{name}={role}" for name, role in names.items()))
    which = ", each ROLE being user, assistant, system or tool" if "=ROLE" in named else ""
    return f"{'name it' if len(names) == 1 else 'name them'} with --roles {named}{which}, or rename the role"


def _sayable(name: str) -> bool:
    """Whether a name can stand on the command line as it is, without a sign that the shell takes for its own."""
    return bool(name) and name.isprintable() and len(name) < 40 and not set(name) & set(",= '\"\\;&|<>()[]{}$`*?!#~%^")
