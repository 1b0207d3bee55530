"""Gemini's rows."""

from __future__ import annotations

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.rows import answer, user


def part(text):
    return {"parts": [{"text": text}]}


SKY = [{"role": "user", **part("Sky?")}, {"role": "model", **part("Blue.")}]
DECLARED = {"name": "weather", "description": "Weather", "parameters": {"type": "object", "properties": {}}}


def read(**row):
    return Formats().example(row)


@pytest.mark.parametrize("key", ["systemInstruction", "system_instruction"])
def test_contents_and_the_system_instruction(key):
    for said in (part("Be brief."), {"role": "system", **part("Be brief.")}, "Be brief."):
        example = read(contents=SKY, **{key: said})
        assert example.format == "gemini" and example.unread == ()
        assert example.messages == [{"role": "system", "content": "Be brief."}, user("Sky?"), answer("Blue.")]


def test_parts_of_a_text_are_one_text():
    contents = [SKY[0], {"role": "model", "parts": [{"text": "Hm.", "thought": True}, {"text": "Bl"}, {"text": "ue.", "inlineData": None}],
                         "loss": True, "score": 3}]
    example = read(contents=contents)
    assert example.messages[1] == answer("Blue.", reasoning_content="Hm.")
    assert [(item.where, item.name) for item in example.unread] == [("key", "score")]


@pytest.mark.parametrize("call, response", [("functionCall", "functionResponse"), ("function_call", "function_response")])
def test_function_calls(call, response):
    example = read(contents=[
        {"role": "user", **part("Weather in Oslo and Rome?")},
        {"role": "model", "parts": [{call: {"name": "weather", "args": {"city": "Oslo"}}}, {call: {"name": "weather", "args": {"city": "Rome"}}}]},
        {"role": "function", "parts": [{response: {"name": "weather", "response": {"t": 3}}}, {response: {"name": "weather", "response": {"t": 20}}}]},
        {"role": "model", **part("3 and 20.")}], tools=[{"functionDeclarations": [DECLARED]}])
    assert example.tools == [{"type": "function", "function": DECLARED}]
    assert [turn["role"] for turn in example.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [c["function"] for c in example.messages[1]["tool_calls"]] == [
        {"name": "weather", "arguments": {"city": city}} for city in ("Oslo", "Rome")]
    assert example.messages[2] == {"role": "tool", "name": "weather", "content": '{"t": 3}'}


@pytest.mark.parametrize("parts, reason", [
    ([{"inlineData": {"mimeType": "image/png", "data": "…"}}], "a part of `contents` 1 is text that is not base64: '…'"),
    ([{"text": "Look"}, {"fileData": {"fileUri": "gs://x"}}], "a part of `contents` 1 is at an address, and nothing is downloaded: 'gs://x'"),
    ([{"inlineData": {"mimeType": "video/mp4", "data": "AAAA"}}], "a part of `contents` 1 is 'video/mp4', and beside text"),
    ([{"executableCode": {"code": "1"}}], "is 'executableCode'"), ([7], "is a number"), (None, "are missing, not a list"),
    ([{"functionResponse": {"response": {}}}], "has no name")])
def test_what_is_no_text_is_refused_by_name(parts, reason):
    with pytest.raises(RowError) as caught:
        read(contents=[{"role": "user", "parts": parts}, SKY[1]])
    assert any(reason in problem.reason for problem in caught.value.problems)
