"""Conversations as programs to chat with export them: what they show is read, without thoughts and what tools do, and
one version of what was said anew. What is left out is counted.

What was read beside a question, such as a file, is not there, or not as the model read it: the row is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_tune.data.conversations.parts import NO_TEXT
from gemma_tune.data.conversations.problems import Problem, RowError, quoted
from gemma_tune.data.conversations.shaped import Fields, Shaped, without

_SHOWN = ("text", "multimodal_text")  # of ChatGPT's types of content
_HIDDEN, _VERSIONS = "thoughts, tools and what else is not shown", "other versions"  # that are left out


def chatgpt(row: Fields) -> Shaped | None:
    """A conversation as ChatGPT exports it: all versions of all messages, of which the last one's path is shown."""
    nodes = row["mapping"]
    if not isinstance(nodes, dict):
        return None
    path = _path(nodes, row["current_node"], "parent")
    said = [(message, _message(message)) for node in path if isinstance(message := node.get("message"), dict)]
    left = {_HIDDEN: sum(turn is None and _says(message) for message, turn in said), _VERSIONS: len(nodes) - len(path)}
    return _shown(without(row, "mapping", "current_node"), "mapping", [turn for _, turn in said if turn], left)


def _path(nodes: dict[str, Any], name: Any, parent: str) -> list[dict[str, Any]]:
    """The nodes from the first one to that of the name, each of them under a key the name of the one before."""
    path: list[dict[str, Any]] = []
    while isinstance(name, str) and isinstance(node := nodes.get(name), dict) and len(path) < len(nodes):
        path.append(node)
        name = node.get(parent)
    return path[::-1]


def _message(message: dict[str, Any]) -> dict[str, Any] | None:
    """The turn of a message; None of what is not shown, or is said to a tool. Pictures stay among its parts."""
    role, content = _of(message, "author").get("role"), _of(message, "content")
    hidden = _of(message, "metadata").get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or message.get("recipient") not in (None, "all") or hidden or (
            content.get("content_type") not in _SHOWN):
        return None
    _no_files(_of(message, "metadata").get("attachments"))
    parts = content.get("parts")
    text = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    said = "".join(parts) if text else parts
    return None if said in ("", None) else {"role": role, "content": said}


def _says(message: dict[str, Any]) -> bool:
    return any(value not in (None, "", [], [""]) for key, value in _of(message, "content").items()
               if key != "content_type")


def claude(row: Fields) -> Shaped | None:
    """A conversation as Claude exports it: also questions and answers in whose place others were put. Of those each
    message names the one before, and the last message of all is what is shown, where nothing else is said."""
    messages = row["chat_messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "sender" in one for one in messages):
        return None
    path, nodes = messages, {one["uuid"]: one for one in messages if isinstance(one.get("uuid"), str)}
    if messages and len(nodes) == len(messages) and all("parent_message_uuid" in one for one in messages):
        path = (_path(nodes, row.get("current_leaf_message_uuid"), "parent_message_uuid")
                or _path(nodes, messages[-1]["uuid"], "parent_message_uuid"))
    for one in path:
        for name in ("attachments", "files", "files_v2"):
            _no_files(one.get(name))
    turns = [{"role": one["sender"], "content": said} for one in path if (said := _text(one)) != ""]
    hidden = sum(_part(part) is None for one in path for part in _parts(one))
    return _shown(without(row, "chat_messages", "current_leaf_message_uuid"), "chat_messages", turns,
                  {_HIDDEN: hidden, _VERSIONS: len(messages) - len(path)})


def _text(message: dict[str, Any]) -> Any:
    """What a message shows: its parts of text, with an empty line where a thought or a tool was between them. Its
    `text` has a sentence about what cannot be shown in place of those. Pictures stay among its parts."""
    parts = _parts(message)
    if not parts:
        return message.get("text") or ""
    if any(isinstance(part, dict) and part.get("type") in NO_TEXT for part in parts):
        return parts
    pieces = [""]
    for text in map(_part, parts):
        if text is None:
            pieces.append("")
        else:
            pieces[-1] += text
    return "\n\n".join(filter(str.strip, pieces))


def _parts(message: dict[str, Any]) -> list[Any]:
    """The parts of a message, but for those that only count tokens."""
    parts = message.get("content")
    return [part for part in parts if not isinstance(part, dict) or part.get("type") != "token_budget"] if isinstance(
        parts, list) else []


def _part(part: Any) -> str | None:
    """The text of a part that is one."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _no_files(files: Any) -> None:
    """Nothing, where a message has no files.

    Raises:
        RowError: it has some.
    """
    if files:
        first = files[0] if isinstance(files, list) else files
        name = first.get("file_name", first.get("name")) if isinstance(first, dict) else None
        raise RowError([Problem("not_text", f"a message has a file ({quoted(name)}), which was read with it and is not "
                                            "in what it says", "leave the row out")])


def ai_studio(row: Fields) -> Shaped | None:
    """A prompt as Google's AI Studio saves it."""
    chunks = row["chunkedPrompt"].get("chunks") if isinstance(row["chunkedPrompt"], dict) else None
    if not isinstance(chunks, list) or not all(isinstance(chunk, dict) for chunk in chunks):
        return None
    turns = [{"role": chunk.get("role"), "content": chunk.get("text")} for chunk in chunks
             if not chunk.get("isThought")]
    told = _of(row, "systemInstruction")
    if system := told.get("text") or told.get("parts"):
        turns.insert(0, {"role": "system", "content": system})
    return _shown(without(row, "chunkedPrompt", *(["systemInstruction"] if system else [])), "chunkedPrompt", turns,
                  {_HIDDEN: sum(bool(chunk.get("isThought")) for chunk in chunks)})


def _shown(row: Fields, own: str, turns: list[dict[str, Any]], left: Mapping[str, int]) -> Shaped:
    """The turns as ``messages``; what is left out stays as columns that nobody reads, so that it is reported."""
    if not turns:
        raise RowError([Problem("no_messages", f"`{own}` shows no message", "leave the row out")])
    unread = {f"{own} ({what})": number for what, number in left.items() if number}
    return Shaped({**row, **unread, "messages": turns}, {"messages": own})


def _of(value: Fields, name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def takeout(row: Fields) -> None:
    """A question to Gemini as Google Takeout lists it."""
    raise RowError([Problem("unknown_format", "this is a question to Gemini as Google Takeout lists them, each by "
                                              "itself and with its answer as HTML",
                            "write `title` without its first word as `prompt`, and what `safeHtmlItem` says, as text, "
                            "as `completion`")])
