"""Tool calls inside what the assistant says, as Hermes and Qwen write them."""

from __future__ import annotations

import json
import time

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user

TOOLS = [{"type": "function", "function": {"name": "rate", "parameters": {"type": "object", "properties": {}}}}]
ASKED = {"from": "human", "value": "The rate?"}
SAID = {"from": "gpt", "value": "It is 2."}


def call(of="USD"):
    return {"type": "function", "function": {"name": "rate", "arguments": {"of": of, "now": True}}}


def result(text, **more):
    return {"role": "tool", "content": text, "name": "rate"} | more


def read(*turns, **row):
    return Formats().example({"conversations": [ASKED, *turns], **row})


def gpt(text):
    return {"from": "gpt", "value": text}


def tool(text):
    return {"from": "tool", "value": text}


AS_JSON = '<tool_call>\n{"name": "rate", "arguments": {"of": "USD", "now": true}}\n</tool_call>'
AS_PYTHON = "<tool_call>\n{'arguments': {'of': 'USD', 'now': True}, 'name': 'rate'}\n</tool_call>"


@pytest.mark.parametrize("called", [AS_JSON, AS_PYTHON, AS_JSON + "\n"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), None])
def test_a_call_and_its_result(called, tools):
    example = read(gpt(called), tool("<tool_response>\n2\n</tool_response>\n"), SAID, tools=tools)
    assert example.messages == [user("The rate?"), answer(tool_calls=[call()]), result("2"), answer("It is 2.")]
    assert example.tools == (TOOLS if tools else None) and example.unread == ()


def test_several_calls_below_a_thought():
    both = f"<think>\nLook.\n</think>\n\n{AS_JSON}\n{AS_JSON.replace('USD', 'EUR')}"
    results = "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>"
    expected = [user("The rate?"), answer("<think>\nLook.\n</think>", tool_calls=[call(), call("EUR")]), result("1"), result("2"),
                answer("It is 2.")]
    assert read(gpt(both), tool(results), SAID, tools=TOOLS).messages == expected
    # As Qwen's template writes it, results are the user's.
    turns = [user("The rate?"), answer(both), user(results), answer("It is 2.")]
    assert Formats().example({"messages": turns, "tools": TOOLS}).messages == expected


def test_a_call_may_end_the_conversation():
    assert read(gpt(AS_PYTHON), tools=TOOLS).messages[1] == answer(tool_calls=[call()])


@pytest.mark.parametrize("said", [AS_JSON + " and so on", "<tool_call> is a mark", f"`{AS_JSON}`"])
def test_a_text_about_such_marks_stays_one(said):
    assert read(gpt(said), tools=TOOLS).messages[1] == answer(said)


def test_without_tools_it_is_text():
    turns = [gpt(AS_JSON), {"from": "human", "value": "<tool_response>\n2\n</tool_response>"}, SAID]
    assert [turn["content"] for turn in read(*turns).messages[1:]] == [turn["value"] for turn in turns]


def test_what_a_user_quotes_stays_theirs():
    quoted = {"from": "human", "value": "<tool_response>\n2\n</tool_response>"}
    assert read(SAID, quoted, SAID, tools=TOOLS).messages[2] == user(quoted["value"])


def test_a_call_that_cannot_be_read_says_so():
    for text in ("{name: rate}", "{'name': 'rate', 'arguments': {'of': {1, 2}}}", '{"name": "rate", "arguments": {"of": "a" "b"}}',
                 "[" * 100_000, "{'name': " * 100_000, "{'name': 'rate', 'arguments': " + "{'a': " * 150 + "1" + "}" * 151):
        with pytest.raises(RowError, match="tool call 1 of turn 2 is text that is not JSON: "):
            read(gpt(f"<tool_call>\n{text}\n</tool_call>"), tool("2"), SAID, tools=TOOLS)


def test_a_call_that_has_a_key_twice_is_not_read_as_one_of_python():
    twice = '{"name": "rate", "arguments": {"of": "USD", "of": "EUR"}}'
    with pytest.raises(RowError, match="tool call 1 of turn 2 is text that is not JSON: .*'of'"):
        read(gpt(f"<tool_call>\n{twice}\n</tool_call>"), tools=TOOLS)


def test_what_python_shows_is_as_json_has_it(recwarn):
    said = r"<tool_call>{'name': 'rate', 'arguments': {'of': ('a', '\d'), 'no': None, 'in': {1: 2.5}}}</tool_call>"
    [made] = read(gpt(said), tools=TOOLS).messages[1]["tool_calls"]
    assert made["function"]["arguments"] == {"of": ["a", "\\d"], "no": None, "in": {"1": 2.5}} and not recwarn.list


def test_many_marks_take_no_time():
    began = time.monotonic()
    read(gpt(f"{AS_JSON}\n" * 10_000 + "end"), tools=TOOLS)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("row", "columns"), [
    ({"talk": [user("The rate?"), answer(AS_JSON)]}, {"turns": "talk"}), ({"prompt": "The rate?", "completion": AS_JSON}, {}),
    ({"prompt": [user("The rate?")], "completion": [answer(AS_PYTHON)]}, {})])
def test_calls_in_other_formats(row, columns):
    example = Formats(columns=columns).example({**row, "tools": TOOLS})
    assert example.messages == [user("The rate?"), answer(tool_calls=[call()])]
    assert example.tools == TOOLS and example.unread == ()


def test_what_looks_like_a_call_stays_a_text_where_there_are_no_tools():
    assert Formats().example({"prompt": "The rate?", "completion": AS_JSON}).messages[1] == answer(AS_JSON)


def test_calls_in_pairs():
    other = AS_JSON.replace("USD", "EUR")
    example = Formats().example({"prompt": "The rate?", "chosen": AS_JSON, "rejected": other, "tools": TOOLS})
    assert example.messages[-1] == answer(tool_calls=[call()]) and example.rejected == [answer(tool_calls=[call("EUR")])]


@pytest.mark.parametrize("rejected", ["rejected", "rejected_response"])
@pytest.mark.parametrize("listed", [False, True])
def test_calls_in_pairs_of_whole_conversations(rejected, listed):
    other = AS_JSON.replace("USD", "EUR")
    row = {"messages": [user("The rate?"), answer(AS_JSON)], rejected: [answer(other)] if listed else other, "tools": TOOLS}
    example = Formats().example(row)
    assert example.messages[-1] == answer(tool_calls=[call()]) and example.rejected == [answer(tool_calls=[call("EUR")])]
    results = user("<tool_response>1</tool_response>")
    example = Formats().example(row | {"messages": [*row["messages"], results, answer("1")], rejected: [answer("2")] if listed else "2"})
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1]["train"] is False and example.rejected == [answer("2")], "and all before the answers is their prompt"
