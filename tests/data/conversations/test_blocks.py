"""Rows as Anthropic's interface has them: parts that are calls, results and thoughts, and schemas under its own name."""

from __future__ import annotations

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user

SCHEMA = {"type": "object", "properties": {"of": {"type": "string"}}}
TOOL = {"name": "rate", "description": "Look.", "input_schema": SCHEMA}
DECLARED = [{"type": "function", "function": {"name": "rate", "description": "Look.", "parameters": SCHEMA}}]


def text(said):
    return {"type": "text", "text": said}


def use(name, of="USD"):
    return {"type": "tool_use", "id": name, "name": "rate", "input": {"of": of}}


def result(name, content, **more):
    return {"type": "tool_result", "tool_use_id": name, "content": content, **more}


def call(name, of="USD"):
    return {"id": name, "type": "function", "function": {"name": "rate", "arguments": {"of": of}}}


def tool(name, content):
    return {"role": "tool", "content": content, "tool_call_id": name, "name": "rate"}


THOUGHT = {"type": "thinking", "thinking": "Two of them.", "signature": "x"}
ASKED = [user("Rates?"), answer([THOUGHT, text("Look:"), use("a"), use("b", "EUR")])]
RESULTS = user([result("b", [text("1.1")]), result("a", "1")])
TURNS = [*ASKED, RESULTS, answer([text("1 and 1.1.")])]
READ = [user("Rates?"), answer("Look:", tool_calls=[call("a"), call("b", "EUR")], reasoning_content="Two of them."),
        tool("a", "1"), tool("b", "1.1"), answer("1 and 1.1.")]


@pytest.mark.parametrize(("row", "columns"), [
    ({"messages": TURNS}, {}), ({"talk": TURNS}, {"turns": "talk"}), ({"prompt": TURNS[:3], "completion": TURNS[3:]}, {})])
def test_calls_and_results_have_their_own_places(row, columns):
    example = Formats(columns=columns).example({**row, "tools": [TOOL], "system": [text("Be brief."), text("Always.")]})
    wanted = [{"role": "system", "content": "Be brief.\nAlways."}, *READ]
    if "prompt" in row:
        wanted[2] = wanted[2] | {"train": False}
    assert example.messages == wanted and example.tools == DECLARED and example.unread == ()


def test_a_pair_has_calls_as_well():
    row = {"prompt": "Rate?", "chosen": [answer([use("a")])], "rejected": [answer([use("a", "EUR")])], "tools": [TOOL]}
    example = Formats().example(row)
    assert example.messages[-1]["tool_calls"] == [call("a")] and example.rejected == [answer(tool_calls=[call("a", "EUR")])]


def test_that_a_call_failed_is_said_to_be_left_out():
    turns = [*ASKED[:1], answer([use("a")]), user([result("a", None, is_error=True)]), answer("No.")]
    example = Formats().example({"messages": turns})
    assert example.messages[2] == tool("a", "") and [one.name for one in example.unread] == ["is_error"]


@pytest.mark.parametrize("schema", [{"inputSchema": SCHEMA}, {"input_schema": SCHEMA, "parameters": None}, {"parameters": SCHEMA}])
def test_the_schema_of_a_tool_under_other_names(schema):
    tools = [{"type": "function", "function": {"name": "rate", "description": "Look.", **schema}}]
    assert Formats().example({"messages": [user("q"), answer("a")], "tools": tools}).tools == DECLARED


@pytest.mark.parametrize(("turns", "reason"), [
    ([user("Rate?"), answer([use("a"), text("Wait.")]), user([result("a", "1")]), answer("1")], "whose part 1 is 'tool_use'"),
    ([*ASKED, user([text("Here:"), result("a", "1")]), answer("1")], "whose part 2 is 'tool_result'"),
    ([*ASKED, user([result("a", "1"), result("b", "2"), text("And?")]), answer("1")], "turn 5 is `user` where `assistant`"),
    ([*ASKED, user([result("a", [{"type": "image"}]), result("b", "2")]), answer("1")], "whose part 1 is a picture, and the turn is the tool's"),
    ([*ASKED, user([result("a", "1")]), answer("1")], "the tool call 'b' of turn 2 has no result"),
    ([user([result("a", "1")]), answer("1")], "the result of a tool that was not called"),
    ([user("q"), answer([use("a"), {"type": ["text"]}])], "whose part 1 is 'tool_use'"),
    ([user("q"), answer([{"type": "tool_use", "id": "a", "input": {}}])], "has no function name")])
def test_what_has_no_place_is_refused(turns, reason):
    with pytest.raises(RowError) as caught:
        Formats().example({"messages": turns})
    assert reason in caught.value.problems[0].reason


def test_a_system_prompt_with_more_than_text_is_refused():
    with pytest.raises(RowError, match="`system` is a list"):
        Formats().example({"messages": [user("q"), answer("a")], "system": [text("s"), {"type": "image"}]})
