"""A model in Ollama is asked a question, to see that it loads, answers and stops, and what prompt it gets.

Sources: Ollama's `api/types.go` and `server/routes.go` (/api/show, /api/chat: a model that can think is asked to,
unless the request says otherwise; `_debug_render_only`; `truncate`, which older servers ignore).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.pictures import as_text
from gemma_tune.ollama.server import PATIENCE, Refused, Server, check_status, client_of, json_field, talking_to
from gemma_tune.ollama.template import FAMILIES, OllamaChat

Turn = Mapping[str, Any]


def capabilities(server: Server, name: str, timeout: float = 30.0) -> frozenset[str]:
    """What the server takes the model to be able to do, such as "thinking"; nothing from servers that do not tell.

    Raises:
        WorkFailed: no such model, no answer, or an error from the server.
    """
    shown = json_field(_post(server, "/api/show", {"model": name}, timeout, f"show {name}").content, "capabilities")
    return frozenset(word for word in shown if isinstance(word, str)) if isinstance(shown, list) else frozenset()


def generate_check(server: Server, name: str, messages: Sequence[Turn], timeout: float, num_predict: int = 256, *,
                   chat: OllamaChat | None = None) -> dict[str, Any]:
    """One greedy answer of the model, the same each time.

    Args:
        messages: what comes before the answer.
        timeout: seconds without a byte; the server first loads the model.
        num_predict: most tokens of the answer.
        chat: what the model was made with: its markers are looked for in the answer, and it is asked to think or not as
            in training.

    Returns:
        answer; done_reason ("stop": it ended by itself; "length": it was cut); prompt_eval_count and eval_count in
        tokens; seconds in all and load_seconds of them for loading. What the server does not tell is None.

    Raises:
        WorkFailed: no answer in time, an empty one, one with a turn's marker in it, or an error from the server.
    """
    request = _request(server, name, messages, chat, num_predict)
    content = _post(server, "/api/chat", request, timeout, f"answer with {name}").content
    message = _message(content)
    answer, counts = message["content"], ("done_reason", "prompt_eval_count", "eval_count")
    _check_answer(name, answer, bool(message.get("thinking")), chat)
    return {"answer": answer, **{key: json_field(content, key) for key in counts},
            "seconds": _seconds(json_field(content, "total_duration")),
            "load_seconds": _seconds(json_field(content, "load_duration"))}


def rendered_prompt(server: Server, name: str, messages: Sequence[Turn], timeout: float = PATIENCE, *,
                    chat: OllamaChat | None = None, think: bool | None = None, tools: Sequence[Turn] | None = None,
                    num_ctx: int | None = None) -> str | None:
    """The prompt that the server makes of the messages; it may begin with the text of BOS.

    None from servers that ignore the question (they answer instead, with one token).

    Args:
        chat, think: what the model was made with, or, where that is known, what requests say of thinking.
        tools: on offer.
        num_ctx: room for the prompt and a token, where the model's own context is shorter.

    Raises:
        Refused: the server does not take such a conversation.
        WorkFailed: no answer in time, or an error from the server.
    """
    request = _request(server, name, messages, chat, 1, think) | {"_debug_render_only": True}
    _take_whole(request, tools, num_ctx)
    content = _post(server, "/api/chat", request, timeout, f"lay out a prompt for {name}").content
    debug = json_field(content, "_debug_info")
    text = debug.get("rendered_template") if isinstance(debug, dict) else None
    return text if isinstance(text, str) else None


def prompt_tokens(server: Server, name: str, messages: Sequence[Turn], timeout: float = PATIENCE, *,
                  think: bool | None = None, tools: Sequence[Turn] | None = None,
                  num_ctx: int | None = None) -> int | None:
    """How many tokens the server says that it read of a prompt; arguments as for :func:`rendered_prompt`.

    It answers with one token, as none at all means as many as it likes in some versions. None where it says nothing.

    Raises:
        Refused, WorkFailed: as there.
    """
    request = _request(server, name, messages, None, 1, think)
    _take_whole(request, tools, num_ctx)
    content = _post(server, "/api/chat", request, timeout, f"read a prompt with {name}").content
    count = json_field(content, "prompt_eval_count")
    return count if isinstance(count, int) and count > 0 else None


def picture_answer(server: Server, name: str, picture: bytes, question: str, timeout: float = PATIENCE, *,
                   chat: OllamaChat | None = None, num_predict: int = 64) -> str:
    """What the model says to a question about a picture, which can be nothing; one greedy answer.

    Args:
        picture: a PNG or JPEG file.
        timeout, chat, num_predict: as for :func:`generate_check`.

    Raises:
        Refused: the server does not give this model pictures.
        WorkFailed: no answer in time, or an error from the server.
    """
    request = _request(server, name, [{"role": "user", "content": question, "images": [picture]}], chat, num_predict)
    return _message(_post(server, "/api/chat", request, timeout, f"show {name} a picture").content)["content"]


def thinking_of(server: Server, name: str, chat: OllamaChat) -> bool | None:
    """What requests to the model have to say of thinking, so that it is asked as in training; None for nothing.

    Raises:
        WorkFailed: as :func:`capabilities`.
    """
    return chat.think if chat.think is not None and "thinking" in capabilities(server, name) else None


def _request(server: Server, name: str, messages: Sequence[Turn], chat: OllamaChat | None,
             num_predict: int, think: bool | None = None) -> dict[str, Any]:
    options = {"temperature": 0, "seed": 0, "num_predict": num_predict}
    request = {"model": name, "messages": [as_sent(turn) for turn in messages], "stream": False, "options": options}
    if think is None and chat is not None:
        think = thinking_of(server, name, chat)
    return request if think is None else request | {"think": think}


def _take_whole(request: dict[str, Any], tools: Sequence[Turn] | None, num_ctx: int | None) -> None:
    """Add what a request says whose prompt is compared: the server is to leave nothing of it out."""
    request["truncate"] = False
    request |= {"tools": list(tools)} if tools else {}
    request["options"] |= {"num_ctx": num_ctx} if num_ctx else {}


def as_sent(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as Ollama takes it, which has names of its own for reasoning and for the tool that answers; its ``images``
    are PNG or JPEG files."""
    sent: dict[str, Any] = {"role": turn["role"], "content": turn.get("content") or ""}
    if turn.get("images"):
        sent["images"] = [as_text(picture) for picture in turn["images"]]
    if turn.get("reasoning_content"):
        sent["thinking"] = turn["reasoning_content"]
    if turn.get("tool_calls"):
        sent["tool_calls"] = [{key: call[key] for key in ("id", "function") if key in call}
                              for call in turn["tool_calls"]]
    names = {"name": "tool_name", "tool_call_id": "tool_call_id"}
    return sent | {theirs: turn[ours] for ours, theirs in names.items() if turn["role"] == "tool" and turn.get(ours)}


def _post(server: Server, path: str, request: Mapping[str, Any], timeout: float, doing: str) -> httpx.Response:
    """The answer to a request that is not streamed. An error can come inside HTTP 200."""
    with client_of(server.url, timeout) as client, talking_to(server.url):
        response = client.post(path, json=request)
    check_status(response, doing)
    if error := json_field(response.content, "error"):
        raise Refused(doing, str(error))
    return response


def _message(content: bytes) -> dict[str, Any]:
    """The message of an answer; its content is a text."""
    message = json_field(content, "message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise WorkFailed(f"Ollama answered something that is not a message: {content[:200]!r}")
    return message


def _check_answer(name: str, answer: str, thought: bool, chat: OllamaChat | None) -> None:
    if not answer.strip():
        what = "only thought, and answered nothing" if thought else "answered nothing"
        raise WorkFailed(f"{name} {what} in Ollama",
                         "See whether `gemma-tune chat` gets an answer from the same model. If it does, update Ollama "
                         "and run the same command again; if not, the training is at fault.")
    opening = {family: mark for mark, family, _ in FAMILIES}
    marks = (*chat.stops, opening.get(chat.family)) if chat is not None else ()
    if mark := next((mark for mark in marks if mark and mark in answer), None):
        raise WorkFailed(f"{name} does not stop at the end of its turn in Ollama: its answer has {mark!r} in it",
                         f"`ollama show {name} --parameters` should list it as a stop. If it does, look for {mark!r} "
                         "inside the answers of the data; if not, update Ollama and run the same command again.")


def _seconds(nanoseconds: object) -> float | None:
    return nanoseconds / 1e9 if isinstance(nanoseconds, int) else None
