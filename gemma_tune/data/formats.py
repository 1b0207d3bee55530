"""From a row in a known format to a conversation: a list of ``{"role", "content"}`` with stripped outer white space."""

from __future__ import annotations

from typing import Any

ROLES = ("system", "user", "assistant")


class RowError(Exception):
    """Why a row cannot be used: ``code`` for programs, the text for people, ``fix`` a suggestion."""

    def __init__(self, code: str, text: str, fix: str):
        super().__init__(text)
        self.code, self.fix = code, fix


def conversation(value: Any) -> list[dict[str, str]]:
    """The checked conversation of one row.

    Formats: ``messages`` (OpenAI), and Alpaca's ``instruction``/``input``/``output`` with an optional ``system``.

    Raises:
        RowError: for anything that cannot be learned from.
    """
    if not isinstance(value, dict):
        raise RowError("not_an_object", f"a row is a JSON object, this one is {_kind(value)}",
                       'write {"messages": […]} on the line')
    if "messages" in value:
        messages = value["messages"]
    elif "instruction" in value and "output" in value:
        messages = _alpaca(value)
    else:
        found = ", ".join(_quoted(key) for key in list(value)[:6]) or "nothing"
        raise RowError("unknown_format", f"neither `messages` nor `instruction` and `output`; it has {found}",
                       "rename the columns to `messages`, or to `instruction`, `input`, `output`")
    return _checked(messages)


def _alpaca(row: dict[str, Any]) -> list[Any]:
    for key in ("instruction", "input", "output", "system"):
        if row.get(key) is not None and not isinstance(row[key], str):
            raise RowError("not_text", f"`{key}` is {_kind(row[key])}, not text", f"make `{key}` a string")
    extra = (row.get("input") or "").strip()
    question = (row["instruction"] or "").strip() + (f"\n\n{extra}" if extra else "")
    system = (row.get("system") or "").strip()
    return ([{"role": "system", "content": system}] if system else []) + [
        {"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]


def _checked(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise RowError("no_messages", f"`messages` is {'an empty list' if messages == [] else _kind(messages)}, "
                                      "not a list of turns", 'write [{"role": "user", "content": "…"}, …]')
    turns = [_turn(number, message) for number, message in enumerate(messages, start=1)]
    roles = [turn["role"] for turn in turns]
    dialogue = roles[1:] if roles[0] == "system" else roles
    if "system" in dialogue:
        raise RowError("system_inside", f"turn {roles.index('system', 1) + 1} is a system message; "
                                        "it can only be the first", "move it to the front")
    for number, (role, expected) in enumerate(zip(dialogue, ("user", "assistant") * len(dialogue)),
                                              start=len(roles) - len(dialogue) + 1):
        if role != expected:
            raise RowError("alternation", f"turn {number} is `{role}` where `{expected}` is expected; roles alternate "
                                          "and begin with `user`", "join neighbouring turns of the same role")
    if roles[-1] != "assistant":
        raise RowError("no_answer", f"the conversation ends with `{roles[-1]}`; there is no answer to learn",
                       "end it with an assistant turn")
    return turns


def _turn(number: int, message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RowError("not_an_object", f"turn {number} is {_kind(message)}, not an object",
                       'write {"role": "user", "content": "…"}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError("unknown_role", f"turn {number} has the role {_quoted(role)}; known are {', '.join(ROLES)}",
                       "rename the role")
    if message.get("weight", 1) != 1 or message.get("train", True) is not True:
        raise RowError("turn_weight", f"turn {number} asks to be left out of training, which is not possible yet",
                       "end the conversation before it, or remove `weight` and `train` to learn every answer")
    if message.get("tool_calls"):
        raise RowError("tool_calls", f"turn {number} calls tools, which cannot be trained yet",
                       "leave the row out, or write the call as text")
    if not isinstance(content, str):
        raise RowError("not_text", f"the content of turn {number} is {_kind(content)}, not text", "make it a string")
    if not content.strip():
        raise RowError("empty_turn", f"turn {number} ({role}) is empty", "fill it or leave the row out")
    if "\ufffd" in content or any(0xD800 <= ord(c) <= 0xDFFF for c in content):
        raise RowError("broken_text", f"turn {number} contains damaged characters", "export the text as UTF-8 again")
    return {"role": role, "content": content.strip()}


def _quoted(value: Any, limit: int = 40) -> str:
    """Something from a row that fits into a message, on one line."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
             type(None): "missing"}
    return names.get(type(value), type(value).__name__)
