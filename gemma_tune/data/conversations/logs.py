"""What was asked of a model's interface and what it answered, as logs and files of batches have both.

The request is a column ``request``, ``body``, ``input`` or ``inputs``, perhaps with a ``body`` of its own, or the row's
own ``messages``; the answer is OpenAI's object with ``choices``, one message, or LangSmith's list of one, in
``response``, ``output`` or ``outputs``. LangSmith's data sets have an object of one text for each of both.
"""

from __future__ import annotations

from typing import Any

from gemma_tune.base.shell import of_posix
from gemma_tune.data.conversations.layouts import is_conversation, turn_list
from gemma_tune.data.conversations.problems import Problem, RowError, quoted
from gemma_tune.data.conversations.shaped import Fields, Shaped, without
from gemma_tune.data.conversations.turns import role_of

_ASKED = ("request", "body", "input", "inputs")
_SAID = ("response", "output", "outputs")
_CUT = ("length", "max_tokens", "content_filter")  # why an answer ends before its end
_OF_REQUEST = ("system", "tools", "functions")


def is_logged(row: Fields) -> bool:
    """Whether turns that lack their answer stand beside one as an interface gives it."""
    if "response" not in row:
        return False
    turns = turn_list(row.get("messages"))
    return is_conversation(turns) and isinstance(turns[-1], dict) and role_of(turns[-1]) != "assistant" and (
        _answer(row["response"]) is not None)


def logged(row: Fields) -> Shaped | None:
    """A request and its one answer as a prompt and its completion.

    Raises:
        RowError: there are several answers, or it was cut off.
    """
    asked = next((name for name in _ASKED if _request(row.get(name)) is not None), None)
    request = _request(row[asked]) if asked else row if is_logged(row) else None
    said = next((name for name in _SAID if _answer(row.get(name)) is not None), None)
    if asked and "response" in row and all(row.get(name) is None for name in _SAID):
        raise RowError([Problem("no_answer", f"`{asked}` has no answer: `response` is empty", "leave the row out")])
    if request is None or said is None:
        return None
    answer = _answer(row[said])
    turn = _turn(said, answer)
    known = {name: request[name] for name in _OF_REQUEST if asked and request.get(name) is not None}
    beside = [(asked, without(request, "messages", *_OF_REQUEST) if asked else {}),
              (said, without(answer, "choices", *turn))]
    unread = {f"{column}.{name}": value for column, others in beside for name, value in others.items()}
    own = {"prompt": asked or "messages", "completion": said}
    known |= {"prompt": request["messages"], "completion": [turn]}
    unread |= {f"{name} (beside {own['prompt']})": row[name] for name in known if row.get(name) not in (
        None, known[name])}  # so that they are reported
    return Shaped(without(row, *own.values()) | unread | known, own)


def _inside(value: Any) -> Any:
    return value["body"] if isinstance(value, dict) and isinstance(value.get("body"), dict) else value


def _request(value: Any) -> Fields | None:
    """A request with its turns, if it is one; a list of turns is one, too."""
    value = _inside(value)
    value = {"messages": value} if is_conversation(turn_list(value)) else value
    return value if isinstance(value, dict) and is_conversation(turn_list(value.get("messages"))) else None


def _answer(value: Any) -> Fields | None:
    """OpenAI's answer, or a message, as Anthropic's is, if it is one."""
    value = _inside(value)
    if not isinstance(value, dict):
        return None
    alone = value.get("messages")
    if isinstance(alone, list) and len(alone) == 1 and isinstance(alone[0], dict):
        value = alone[0]
    return value if _choices(value) or value.get("role") == "assistant" else None


def _choices(answer: Fields) -> list[Fields]:
    """What OpenAI's answer holds; nothing of another one."""
    choices = answer.get("choices")
    chat = isinstance(choices, list) and all(
        isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices)
    return choices if chat else []


def _turn(said: str, answer: Fields) -> Fields:
    """The assistant's turn in an answer."""
    choices = _choices(answer) or [answer]
    if len(choices) > 1:
        raise RowError([Problem("not_text", f"`{said}` holds {len(choices)} answers (`choices`), and only one can be "
                                            "meant", "keep one of them")])
    [choice] = choices
    reason = choice.get("finish_reason") or choice.get("stop_reason")
    if reason in _CUT:
        raise RowError([Problem("no_answer", f"the answer in `{said}` stopped before its end, for {quoted(reason)}",
                                "leave the row out")])
    turn = answer if choice is answer else choice["message"]
    # Anthropic's message has figures beside what it says.
    return {"role": "assistant", "content": turn.get("content")} if "stop_reason" in turn else turn


def texts(row: Fields) -> Shaped | None:
    """A question and an answer that are the only texts of ``inputs`` and ``outputs``."""
    own: dict[str, str] = {}
    said: dict[str, str] = {}
    for name, column in (("prompt", "inputs"), ("completion", "outputs")):
        value = row[column]
        if not isinstance(value, dict) or len(value) != 1 or not isinstance(text := next(iter(value.values())), str):
            return None
        own[name], said[name] = f"{column}.{next(iter(value))}", text
    if any(row.get(name) is not None for name in ("prompt", "completion", "context", "passage", "history")):
        return None
    return Shaped(without(row, "inputs", "outputs") | said, own, usual=True)


_JOINED = ("jq -cn --slurpfile asked INPUT.jsonl --slurpfile said OUTPUT.jsonl 'INDEX($said[]; .custom_id) as $of | "
           "$asked[] | {custom_id, request: .body, response: $of[.custom_id].response.body}' > rows.jsonl")


def half_of_batch(row: Fields) -> None:
    """The requests of a batch, or its results.

    Raises:
        RowError: it is one of them, with the command that puts both together.
    """
    asked, said = _request(row.get("body")) is not None, _answer(row.get("response")) is not None
    if asked != said:
        there, other = ("the request", "its answer") if asked else ("the answer", "its request")
        raise RowError([Problem("unknown_format", f"the row is half of a batch: it has {there}, and {other} is in the "
                                                  "other file under the same `custom_id`",
                                f"put both together with {of_posix(_JOINED)}")])
