"""A conversation with a model in Ollama, piece by piece.

Sources: Ollama's `api/types.go` and `server/routes.go` (/api/chat streams JSON lines, the last of them with counts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.base.errors import WorkFailed
from gemma_tune.ollama.ask import as_sent
from gemma_tune.ollama.server import PATIENCE, Refused, Server, check_status, client_of, json_field, talking_to

# Around a thought that Ollama sends apart from the answer, in one text with it, as the models write it that Ollama
# takes it out of.
BEFORE, BETWEEN = "<think>\n", "\n</think>\n\n"
_THOUGHT = re.compile(r"\s*<think>\n?(.*?)(?:\n?</think>\s*|\Z)", re.DOTALL)


def show(server: Server, name: str) -> int | None:
    """Tokens of context that a model's parameters give it; None where they do not say.

    Raises:
        Refused: there is no such model (status 404), or another error of the server's.
        WorkFailed: no answer.
    """
    with client_of(server.url, 30.0) as client, talking_to(server.url):
        response = client.post("/api/show", json={"model": name})
    check_status(response, f"show {name}")
    parameters = json_field(response.content, "parameters")
    found = re.search(r"^num_ctx\s+(\d+)", parameters if isinstance(parameters, str) else "", re.MULTILINE)
    return int(found[1]) if found else None


def talk(server: Server, name: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any],
         tools: Sequence[Any] | None = None, think: bool | None = None) -> Iterator[dict[str, Any]]:
    """The parts of one answer: each with ``message``, the last with ``done`` and what was counted.

    Closing the iterator ends the answer.

    Args:
        messages: as in training; a thought that an earlier answer begins with is sent as one.
        think: what the request says of thinking; None for nothing.

    Raises:
        Refused: an error from the server, also in the middle of its answer.
        WorkFailed: the connection breaks, or no byte comes for minutes.
    """
    request = {"model": name, "messages": [as_sent(_with_thought(turn)) for turn in messages], "stream": True,
               "options": dict(options)}
    request |= ({"tools": list(tools)} if tools else {}) | ({} if think is None else {"think": think})
    doing = f"answer with {name}"
    with client_of(server.url, PATIENCE) as client, talking_to(server.url), \
            client.stream("POST", "/api/chat", json=request) as response:
        check_status(response, doing)
        for line in response.iter_lines():
            if not line.strip():
                continue
            try:
                part = json.loads(line)
            except ValueError:
                part = None
            if not isinstance(part, dict):
                raise WorkFailed(f"Ollama answered something that is no part of an answer: {line[:200]!r}")
            if error := part.get("error"):
                raise Refused(doing, str(error))
            yield part
            if part.get("done"):
                return
    raise WorkFailed("Ollama ended its answer before it was whole", "run the same command again")


def texts(parts: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What each part of an answer adds to its text, with the part: thoughts and calls of tools are a part of it."""
    thinking = False
    for part in parts:
        message, text = part.get("message") or {}, ""
        if thought := message.get("thinking"):
            text, thinking = ("" if thinking else BEFORE) + thought, True
        said = message.get("content") or ""
        said += "".join(f"<tool_call>\n{json.dumps(call.get('function'), ensure_ascii=False)}\n</tool_call>\n"
                        for call in message.get("tool_calls") or ())
        if said and thinking:
            said, thinking = BETWEEN + said, False
        yield text + said, part


def _with_thought(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn with the thought that its text begins with under a name of its own."""
    found = _THOUGHT.match(turn.get("content") or "") if turn["role"] == "assistant" else None
    if found is None or turn.get("reasoning_content"):
        return turn
    return {**turn, "reasoning_content": found[1], "content": turn["content"][found.end():]}
