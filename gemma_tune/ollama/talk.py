"""A conversation with a model in Ollama, piece by piece.

Sources: Ollama's `api/types.go` and `server/routes.go` (/api/chat streams JSON lines, the last of them with counts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.base.errors import WorkFailed
from gemma_tune.ollama.server import PATIENCE, Refused, Server, check_status, client_of, json_field, talking_to


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
         tools: Sequence[Any] | None = None) -> Iterator[dict[str, Any]]:
    """The parts of one answer: each with ``message``, the last with ``done`` and what was counted.

    Closing the iterator ends the answer.

    Raises:
        Refused: an error from the server, also in the middle of its answer.
        WorkFailed: the connection breaks, or no byte comes for minutes.
    """
    sent = [{"role": turn["role"], "content": turn.get("content") or ""} for turn in messages]
    request = {"model": name, "messages": sent, "stream": True, "options": dict(options)}
    request |= {"tools": list(tools)} if tools else {}
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
