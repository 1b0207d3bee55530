"""Conversations as programs to chat with export them: what they show is read, without thoughts and what tools do.

What was read beside a question, such as a file, is not there, or not as the model read it: the row is rejected.
"""

from __future__ import annotations

from typing import Any

from gemma_tune.data.conversations.problems import Problem, RowError, quoted
from gemma_tune.data.conversations.shaped import Fields, Shaped, without

_SHOWN = ("text", "multimodal_text")  # of ChatGPT's types of content


def chatgpt(row: Fields) -> Shaped | None:
    """A conversation as ChatGPT exports it: all versions of all messages, of which the last one's path is shown."""
    nodes, name = row["mapping"], row["current_node"]
    if not isinstance(nodes, dict):
        return None
    path: list[dict[str, Any]] = []
    while isinstance(name, str) and isinstance(node := nodes.get(name), dict) and len(path) < len(nodes):
        path.append(node)
        name = node.get("parent")
    turns = [turn for node in reversed(path) if (turn := _message(node.get("message"))) is not None]
    return _shown(without(row, "mapping", "current_node"), "mapping", turns)


def _message(message: Any) -> dict[str, Any] | None:
    """The turn of a message; None of what is not shown, or is said to a tool. Pictures stay among its parts."""
    if not isinstance(message, dict):
        return None
    role, content = _of(message, "author").get("role"), _of(message, "content")
    hidden = _of(message, "metadata").get("is_visually_hidden_from_conversation")
    if role not in ("user", "assistant") or message.get("recipient", "all") != "all" or hidden or (
            content.get("content_type") not in _SHOWN):
        return None
    _no_files(_of(message, "metadata").get("attachments"))
    parts = content.get("parts")
    text = isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    said = "".join(parts) if text else parts
    return None if said in ("", None) else {"role": role, "content": said}


def claude(row: Fields) -> Shaped | None:
    """A conversation as Claude exports it."""
    messages = row["chat_messages"]
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "sender" in one for one in messages):
        return None
    for one in messages:
        _no_files([*(one.get("attachments") or ()), *(one.get("files") or one.get("files_v2") or ())])
    turns = [{"role": one["sender"], "content": said} for one in messages if (said := _text(one)) != ""]
    return _shown(without(row, "chat_messages"), "chat_messages", turns)


def _text(message: dict[str, Any]) -> Any:
    """What a message shows: its parts of text, with an empty line where a thought or a tool was between them. Its
    `text` has a sentence about what cannot be shown in place of those."""
    parts = message.get("content")
    if not isinstance(parts, list) or not parts:
        return message.get("text") or ""
    pieces = [""]
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if isinstance(text, str):
            pieces[-1] += text
        else:
            pieces.append("")
    return "\n\n".join(filter(str.strip, pieces))


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
    told = row.get("systemInstruction")
    if isinstance(told, dict) and isinstance(told.get("text"), str) and told["text"].strip():
        turns.insert(0, {"role": "system", "content": told["text"]})
    return _shown(without(row, "chunkedPrompt", "systemInstruction"), "chunkedPrompt", turns)


def _shown(row: Fields, own: str, turns: list[dict[str, Any]]) -> Shaped:
    if not turns:
        raise RowError([Problem("no_messages", f"`{own}` shows no message", "leave the row out")])
    return Shaped({**row, "messages": turns}, {"messages": own})


def _of(value: dict[str, Any], name: str) -> dict[str, Any]:
    found = value.get(name)
    return found if isinstance(found, dict) else {}


def takeout(row: Fields) -> None:
    """A question to Gemini as Google Takeout lists it."""
    raise RowError([Problem("unknown_format", "this is a question to Gemini as Google Takeout lists them, each by "
                                              "itself and with its answer as HTML",
                            "write `title` without its first word as `prompt`, and what `safeHtmlItem` says, as text, "
                            "as `completion`")])
