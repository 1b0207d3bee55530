"""Gemini's ``contents``: turns of parts, with function calls and their responses as parts among them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gemma_tune.data.conversations.layouts import Draft, with_system
from gemma_tune.data.conversations.pictures import OWN, reference
from gemma_tune.data.conversations.problems import Problem, kind, quoted

_CALL = ("functionCall", "function_call")
_RESPONSE = ("functionResponse", "function_response")
_ROLES = {None: "user", "model": "assistant", "function": "user"}
_DATA = ("inlineData", "inline_data", "fileData", "file_data")
_BESIDE = ("thought", "thoughtSignature", "thought_signature")  # what stands beside the content of a part


def is_gemini(row: Mapping[str, Any]) -> bool:
    """Whether ``contents`` is a list of turns with parts."""
    contents = row.get("contents")
    return isinstance(contents, list) and any(isinstance(turn, dict) and "parts" in turn for turn in contents)


def gemini(row: Mapping[str, Any], problems: list[Problem]) -> Draft:
    """``contents``, ``systemInstruction``, and ``tools`` with ``functionDeclarations``."""
    turns: list[Any] = []
    for number, content in enumerate(row["contents"], start=1):
        turns += _turns(f"`contents` {number}", content, problems) if isinstance(content, dict) else [content]
    key = "systemInstruction" if row.get("systemInstruction") is not None else "system_instruction"
    said = row.get(key)
    if said is not None:
        parts = said.get("parts") if isinstance(said, dict) else said
        texts, others = _parted(f"`{key}`", parts, problems)
        if others:
            problems.append(Problem("not_text", f"`{key}` has more than text", "leave only text in it"))
        if OWN in texts:
            problems.append(Problem("picture", f"`{key}` has a picture", "pictures are learned in turns of the user "
                                                                          "alone: move it there, or leave the row out"))
        if texts["content"]:
            turns.insert(0, {"role": "system", "content": texts["content"]})
    return Draft(with_system(turns, row, problems), "contents", _tools(row.get("tools")))


def _turns(where: str, content: Mapping[str, Any], problems: list[Problem]) -> list[dict[str, Any]]:
    """The turns of one content: results of functions are turns of their own."""
    role = content.get("role")
    role = _ROLES.get(role, role) if isinstance(role, str) or role is None else role
    texts, others = _parted(where, content.get("parts"), problems)
    calls = [part for key, part in others if key in _CALL]
    results = [_result(where, part, problems) for key, part in others if key in _RESPONSE]
    more = {key: value for key, value in content.items() if key not in ("role", "parts")}
    turn = {**more, "role": role, **texts}
    if calls:
        turn["tool_calls"] = calls
    said = texts["content"] or OWN in texts or calls or not results
    return [*results, turn] if said else results


def _parted(where: str, parts: Any, problems: list[Problem]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The texts of parts (what is said, what is thought) with the pictures in what is said, as a turn has them that was
    prepared; and the calls and responses by their key."""
    said, thought, others, pictures = [], [], [], []
    parts = [parts] if isinstance(parts, (str, dict)) else parts
    if not isinstance(parts, list):
        problems.append(Problem("not_text", f"the parts of {where} are {kind(parts)}, not a list",
                                'write [{"text": "…"}]'))
        parts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        filled = [key for key, value in part.items() if value is not None and key not in _BESIDE] if isinstance(
            part, dict) else []
        if len(filled) > 1 and part.get("text") == "":  # a table has every key in every row
            filled.remove("text")
        if filled == ["text"] and isinstance(part["text"], str):
            (thought if part.get("thought") is True else said).append(part["text"])
        elif len(filled) == 1 and filled[0] in _DATA:
            read = reference(f"a part of {where}", part[filled[0]])
            if isinstance(read, Problem):
                problems.append(read)
            else:
                pictures.append({"at": sum(map(len, said)), **read})
        elif len(filled) == 1 and filled[0] in _CALL + _RESPONSE:
            others.append((filled[0], part[filled[0]]))
        else:
            what = next((key for key in filled if key != "text"), None)
            problems.append(Problem("not_text", f"a part of {where} is {kind(part) if what is None else quoted(what)}; "
                                                "only text, pictures and function calls can be learned",
                                    "leave the row out"))
    texts = {"content": "".join(said)} | ({"reasoning_content": "".join(thought)} if thought else {}) | (
        {OWN: pictures} if pictures else {})
    return texts, others


def _result(where: str, part: Any, problems: list[Problem]) -> dict[str, Any]:
    if not isinstance(part, dict) or not isinstance(part.get("name"), str):
        problems.append(Problem("tool_order", f"a function response of {where} has no name",
                                'write {"functionResponse": {"name": "…", "response": {…}}}'))
        return {"role": "tool", "content": ""}
    response = part.get("response")
    try:
        content = response if isinstance(response, str) else json.dumps(response, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        problems.append(Problem("not_text", f"a function response of {where} is not JSON", "write it as JSON"))
        content = ""
    return {"role": "tool", "name": part["name"], "content": content} | (
        {"tool_call_id": part["id"]} if part.get("id") is not None else {})


def _tools(tools: Any) -> Any:
    """The declarations of functions, out of the lists that Gemini keeps them in."""
    if not isinstance(tools, list):
        return tools
    found: list[Any] = []
    for tool in tools:
        declared = None
        if isinstance(tool, dict):
            declared = tool.get("functionDeclarations", tool.get("function_declarations"))
        found += declared if isinstance(declared, list) else [tool]
    return found
