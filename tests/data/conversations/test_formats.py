"""Rows in the shapes in which data sets are published, and what becomes of everything that is wrong with a row."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.base import shell
from gemma_tune.config import preparation as config
from gemma_tune.data.conversations import formats
from gemma_tune.data.conversations.formats import Example, Formats
from gemma_tune.data.conversations.problems import MOST_PROBLEMS, Problem, RowError
from gemma_tune.data.reading.rows import Description, Row
from gemma_tune.data.reading.sources import read_blocks, source_of
from support.rows import ALPACA, GLAIVE, OPENAI_TOOLS, SHAREGPT, WEATHER, answer, user

same_examples = settings(derandomize=True, database=None, deadline=None, max_examples=400,
                         suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def called(name: str, arguments: dict[str, Any], id: str | None = None) -> dict[str, Any]:
    return ({"id": id} if id else {}) | {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, name: str, **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content, "name": name, **more}


def read(row: Any, name: str | None = None, **how: Any) -> Example:
    """The example of a row; reading must not change the row, and the result must be JSON in UTF-8."""
    before = copy.deepcopy(row)
    example = Formats(name, **how).example(row)
    assert row == before
    json.dumps([example.messages, example.tools, example.text], ensure_ascii=False, allow_nan=False).encode()
    return example


def messages(row: Any, *args: Any, **how: Any) -> list[dict[str, Any]]:
    return read(row, *args, **how).messages


def problems(row: Any, *args: Any, **how: Any) -> list[tuple[str, str]]:
    with pytest.raises(RowError) as caught:
        read(row, *args, **how)
    assert all(isinstance(p, Problem) and p.code and p.reason and p.fix and "\n" not in p.reason and len(p.reason) < 400
               for p in caught.value.problems)
    assert (caught.value.code, str(caught.value), caught.value.fix) == (
        caught.value.problems[0].code, caught.value.problems[0].reason, caught.value.problems[0].fix)
    return [(p.code, p.reason) for p in caught.value.problems]


def codes(row: Any, *args: Any, **how: Any) -> list[str]:
    return [code for code, _ in problems(row, *args, **how)]


# --- published shapes


def test_openai_with_tools():
    example = read(OPENAI_TOOLS)
    weather = "get_current_weather"
    assert example.format == "messages" and example.tools == [WEATHER] and example.text is None
    assert example.messages == [
        user("What is the weather in San Francisco and Paris?"),
        answer(tool_calls=[called(weather, {"location": "San Francisco, USA", "format": "celsius"}, "call_1"),
                           called(weather, {"location": "Paris", "format": "celsius"}, "call_2")]),
        result("21.0", weather, tool_call_id="call_1"), result("17.0", weather, tool_call_id="call_2"),
        answer("It is 21 degrees in San Francisco, and 17 in Paris.")]


def test_openai_functions_of_the_first_kind():
    row = {"messages": [
        user("Weather in Boston?"),
        {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": "{\"city\": \"Boston\"}"}},
        {"role": "function", "name": "weather", "content": "{\"degrees\": 3}"}, answer("3 degrees.")],
        "functions": [{"name": "weather", "parameters": {"type": "object", "properties": {}}}]}
    example = read(row)
    assert example.messages == [user("Weather in Boston?"), answer(tool_calls=[called("weather", {"city": "Boston"})]),
                                result('{"degrees": 3}', "weather"), answer("3 degrees.")]
    assert example.tools == [{"type": "function", "function": row["functions"][0]}]


def test_openai_weights():
    row = {"messages": [
        system("Marv is a factual chatbot that is also sarcastic."), user("What's the capital of France?"),
        answer("Paris", weight=0), user("Can you be more sarcastic?"),
        answer("Paris, as if everyone doesn't know that already.", weight=1)]}
    assert [turn.get("train") for turn in messages(row)] == [None, None, False, None, None]
    assert all("weight" not in turn for turn in messages(row))


@pytest.mark.parametrize("mark, train", [
    ({"train": False}, False), ({"train": True}, None), ({"train": None, "weight": None}, None), ({"weight": 0.0}, False),
    ({"weight": 1.0}, None), ({"weight": 0, "train": True}, False), ({"weight": 1, "train": False}, False)])
def test_a_turn_says_whether_it_is_learned(mark, train):
    assert messages({"messages": [user("a"), answer("b", **mark), user("c"), answer("d")]})[1].get("train") is train


@pytest.mark.parametrize("mark", [{"weight": 0.5}, {"weight": "0"}, {"weight": float("nan")}, {"train": "false"}, {"train": 0}])
def test_a_turn_that_is_learned_in_part_is_refused(mark):
    assert codes({"messages": [user("a"), answer("b", **mark)]}) == ["turn_weight"]


def test_marks_on_other_turns_mean_nothing():
    assert messages({"messages": [user("a", weight=0.5, train="x"), answer("b")]}) == [user("a"), answer("b")]


def test_nothing_to_learn():
    assert problems({"messages": [user("a"), answer("b", train=False)]}) == [
        ("nothing_to_learn", "every assistant turn says that it is not to be learned")]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_kept(key):
    assert messages({"messages": [user("2+2?"), answer("4", **{key: " 2 and 2 make 4.\n"})]})[1] == answer(
        "4", reasoning_content=" 2 and 2 make 4.\n")
    assert messages({"messages": [user("2+2?"), answer("4", **{key: " "})]})[1] == answer("4")
    assert messages({"messages": [user("2+2?"), answer("4", **{key: True})]})[1] == answer("4")
    assert codes({"messages": [user("2+2?"), answer("4", **{key: ["a"]})]}) == ["not_text"]
    assert codes({"messages": [user("2+2?"), answer("4", **{key: "\ufffd"})]}) == ["broken_text"]


@pytest.mark.parametrize("content", [
    [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
    [{"type": "input_text", "text": "one"}, {"text": "two"}]])
def test_parts_of_text_stand_one_below_the_other(content):
    assert messages({"messages": [user(content), answer("b")]})[0] == user("one\ntwo")
    assert messages({"messages": [system(content), USER, answer("b")]})[0] == system("one\ntwo")
    assert messages({"messages": [USER, CALL, RESULT | {"content": content}, ANSWER]})[2]["content"] == "one\ntwo"


def test_parts_of_an_answer_are_pieces_of_one_text():
    """As Anthropic's citations divide it; templates that read parts write nothing between them."""
    said = [{"type": "text", "text": "By the report, "}, {"type": "text", "text": "it rose", "citations": [{}]}, {"type": "text", "text": "."}]
    assert messages({"messages": [USER, answer(said)]})[1] == answer("By the report, it rose.")
    rows = {"prompt": [USER], "chosen": [answer(said)], "rejected": "No."}, {"prompt": [USER], "completion": [answer(said)]}
    for row in rows:
        assert read(row).messages[1] == answer("By the report, it rose.")


TWO_TEXTS = ["Good", "Bad"]


@pytest.mark.parametrize("row, where", [
    ({"instruction": "Say", "input": "", "output": TWO_TEXTS}, "`output`"),
    ({"instruction": TWO_TEXTS, "output": "Good"}, "`instruction`"),
    ({"instruction": "Say", "context": TWO_TEXTS, "response": TWO_TEXTS}, "`context`"),
    ({"instruction": "Say", "response": TWO_TEXTS}, "`response`"),
    ({"instruction": "Say", "output": "Good", "system": TWO_TEXTS}, "`system`"),
    ({"instruction": "Say", "output": "Good", "history": [["a", TWO_TEXTS]]}, "an answer in `history`"),
    ({"instruction": "Say", "output": "Good", "history": [[TWO_TEXTS, "b"]]}, "a question in `history`"),
    ({"conversations": [{"from": "human", "value": "Say"}, {"from": "gpt", "value": TWO_TEXTS}]}, "the content of turn 2"),
    ({"messages": [user("Say"), answer(TWO_TEXTS)]}, "the content of turn 2"),
    ({"prompt": "Say", "completion": TWO_TEXTS}, "`completion`"),
    ({"prompt": TWO_TEXTS, "completion": "Good"}, "`prompt`"),
    ({"prompt": "Say", "chosen": TWO_TEXTS, "rejected": ["Worse", "Worst"]}, "`chosen`"),
    ({"prompt": TWO_TEXTS, "chosen": "Good", "rejected": "Bad"}, "`prompt`"),
    ({"prompt": "Say", "completion": TWO_TEXTS, "label": True}, "`completion`"),
    ({"question": "Say", "answer": TWO_TEXTS}, "`answer`"),
    ({"question": TWO_TEXTS, "answer": "Good"}, "`question`"),
])
@pytest.mark.parametrize("take", [None, "chosen"])
def test_several_texts_in_the_place_of_one_are_refused(row, where, take):
    columns = {"user": "question", "assistant": "answer"}
    found = problems(row, columns=columns, take=take)
    assert found[0] == ("not_text", f"{where} is a list of 2 texts, and only one can be meant")


@pytest.mark.parametrize("content", [["one"], [{"type": "text", "text": "one"}, "two"]])
def test_a_bare_text_is_no_part(content):
    [(code, reason)] = problems({"messages": [user(content), answer("b")]})
    assert (code, reason) == ("not_text", f"the content of turn 1 is a list whose part {len(content)} is a bare text")


@pytest.mark.parametrize("thought", [
    {"type": "thinking", "thinking": "c", "signature": "Er"}, {"type": "reasoning", "value": "c"}], ids=["Anthropic", "LLaMA-Factory"])
def test_thoughts_among_the_parts_are_reasoning(thought):
    said = {"type": "text", "value" if "value" in thought else "text": "b"}
    expected = [user("a"), answer("b", reasoning_content="c")]
    assert messages({"messages": [user("a"), answer([thought, said], loss_weight=1.0)]}) == expected
    assert messages({"messages": [user("a"), answer([thought, said], reasoning="c")]}) == expected
    assert codes({"messages": [user("a"), answer([thought, said], reasoning="d")]}) == ["reasoning"]
    assert codes({"messages": [user("a"), answer([thought])]}) == ["empty_turn"]
    assert codes({"messages": [user("a"), answer([said, thought])]}) == ["not_text"], "it would be learned in another order"
    assert codes({"messages": [user([thought, said]), answer("b")]}) == ["not_text"], "a user does not think here"


@pytest.mark.parametrize("write", [json.dumps, str])
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_as_texts_are_not_what_is_said(write, key):
    assert codes({key: [write(USER), write(ANSWER)]}) == ["not_an_object"] * 2
    assert messages({key: ['{"a": 1}', "It is an object."]}) == [user('{"a": 1}'), answer("It is an object.")]


def test_several_texts_that_a_tool_returns_are_its_result():
    assert messages({"messages": [USER, CALL, RESULT | {"content": ["a", "é"]}, ANSWER]})[2]["content"] == '["a", "é"]'


@pytest.mark.parametrize("part", [{"type": "audio_url", "audio_url": {"url": "x"}}, {"type": "refusal", "refusal": "no"},
                                  {"type": "text"}, 7, None, []])
def test_parts_that_are_not_text_are_refused(part):
    [(code, reason)] = problems({"messages": [user([{"type": "text", "text": "look"}, part]), answer("b")]})
    assert code == "not_text" and "the content of turn 1 is a list whose part 2 is" in reason


@pytest.mark.parametrize("name, role", [("developer", "system"), ("human", "user"), ("model", "assistant"),
                                        ("gpt", "assistant"), (" user", None), ("ASSISTANT ", None)])
def test_names_of_roles(name, role):
    turns = [{"role": name, "content": "x"}, user("a"), answer("b")]
    with pytest.raises(RowError) as caught:
        Formats().example({"messages": turns if role != "system" else [*turns, turns[0]]})
    if role is None:
        assert caught.value.code == "unknown_role" and caught.value.fix == f"write `{name.strip().lower()}`"
    else:
        assert caught.value.code == {"system": "system_inside"}.get(role, "alternation")
        assert f"turn {4 if role == 'system' else 1 if role == 'assistant' else 2} is" in str(caught.value)


def test_alpaca():
    assert read(ALPACA) == Example("alpaca", [user("Identify the odd one out.\n\nTwitter, Instagram, Telegram"),
                                              answer("Telegram")], None, None)


def test_alpaca_with_history_and_system():
    row = {"instruction": "And in winter?", "input": "", "output": "Cold.", "system": "Be brief.",
           "history": [["Weather in Oslo?", "Mild."], ["In spring?", "Wet."]]}
    expected = [system("Be brief."), user("Weather in Oslo?"), answer("Mild."), user("In spring?"), answer("Wet."),
                user("And in winter?"), answer("Cold.")]
    assert messages(row) == messages(row | {"history": json.dumps(row["history"])}) == expected
    assert messages(row | {"history": None})[1:] == messages(row | {"history": []})[1:] == expected[-2:]
    assert codes(row | {"history": [["only one"]]}) == codes(row | {"history": "before"}) == ["not_text"]
    assert codes(row | {"history": [["a", ""]]}) == ["empty_turn"]


def test_dolly():
    row = {"instruction": "When did Virgin Australia start operating?", "category": "closed_qa",
           "context": "Virgin Australia commenced services on 31 August 2000.", "response": "On 31 August 2000."}
    assert read(row) == Example("alpaca", [user(f"{row['instruction']}\n\n{row['context']}"), answer(row["response"])],
                                None, None)
    assert messages(row | {"context": ""})[0] == user(row["instruction"])


def test_sharegpt():
    expected = [user("Summarise this."), answer("It is short."), user("Thanks"), answer("You're welcome!")]
    assert read(SHAREGPT) == Example("sharegpt", expected, None, None)
    assert messages({"conversation": SHAREGPT["conversations"]}) == expected
    assert messages({"conversations": json.dumps(SHAREGPT["conversations"])}) == expected
    assert messages({"conversations": expected}) == expected
    assert messages(SHAREGPT | {"system": "Be kind."}) == [system("Be kind."), *expected]
    own = {"from": "system", "value": "Be kind. "}
    assert messages({"conversations": [own, *SHAREGPT["conversations"]], "system": "Be kind."})[0] == system("Be kind. ")
    assert codes({"conversations": [own, *SHAREGPT["conversations"]], "system": "Be cruel."}) == ["system_inside"]


@pytest.mark.parametrize("bot", ["gpt", "assistant", "chatgpt", "bing", "bard", "model"])
def test_sharegpts_names(bot):
    assert messages({"conversations": [{"from": "user", "value": "a"}, {"from": bot, "value": "b"}]}) == [user("a"), answer("b")]


@pytest.mark.parametrize("call", [
    '{"name": "get_rate", "arguments": {"from": "USD"}}', {"name": "get_rate", "arguments": '{"from": "USD"}'},
    '[{"name": "get_rate", "arguments": {"from": "USD"}}]'])
@pytest.mark.parametrize("as_text", [False, True])
def test_sharegpt_with_tools(call, as_text):
    tools = [{"name": "get_rate", "description": "Rates", "parameters": {"type": "object", "properties": {}}}]
    example = read({"conversations": [
        {"from": "human", "value": "The rate of the dollar?"}, {"from": "function_call", "value": call},
        {"from": "observation", "value": '{"rate": 0.85}'}, {"from": "gpt", "value": "0.85"}],
        "system": "Convert.", "tools": json.dumps(tools) if as_text else tools})
    assert example.tools == [{"type": "function", "function": tools[0]}]
    assert example.messages == [system("Convert."), user("The rate of the dollar?"),
                                answer(tool_calls=[called("get_rate", {"from": "USD"})]),
                                result('{"rate": 0.85}', "get_rate"), answer("0.85")]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_tools_may_stand_on_the_system_turn(key):
    tools, others = ([{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("get_rate", "other"))
    turns = [user("The rate?"), answer(tool_calls=[called("get_rate", {})]), {"role": "tool", "content": "2"}, answer("Two.")]
    for said, before in (("Convert.", [system("Convert.")]), ("", [])):  # GLM-4 and MiniMind have them there, below no text, too
        for declared in (tools, json.dumps(tools)):
            for row in ({}, {"tools": None}, {"tools": []}):
                example = read(row | {key: [{"role": "system", "content": said, "tools": declared}, *turns]})
                assert example.tools == tools and example.messages[:-4] == before and not example.unread
    example = read({"tools": others, key: [system("Convert.") | {"tools": tools}, *turns]})
    assert example.tools == others and [one.name for one in example.unread] == ["tools"]
    assert codes({key: [system("Convert.") | {"tools": "[{"}, *turns]}) == ["tools"]


def test_sharegpts_call_belongs_to_what_is_said_before_it():
    call = {"from": "function_call", "value": '{"name": "get_rate", "arguments": {"from": "USD"}}'}
    turns = [{"from": "human", "value": "The rate?"}, {"from": "gpt", "value": "Let me look."}, call,
             {"from": "observation", "value": "0.85"}, {"from": "gpt", "value": "0.85"}]
    expected = [user("The rate?"), answer("Let me look.", tool_calls=[called("get_rate", {"from": "USD"})]),
                result("0.85", "get_rate"), answer("0.85")]
    assert messages({"conversations": turns}) == expected
    assert messages({"messages": [{"role": t["from"], "content": t["value"]} for t in turns]}) == expected
    assert messages({"conversations": [*turns[:3]]}) == expected[:2]
    # Numbers are those of the row; what is learned in part, or no turn of its own, is not joined.
    assert problems({"conversations": [*turns[:4], turns[0]]})[0] == (
        "alternation", "turn 5 is `user` where `assistant` is expected; roles alternate and begin with `user`")
    assert codes({"conversations": [turns[0], turns[1] | {"train": False}, *turns[2:]]})[0] == "alternation"
    assert messages({"conversations": [turns[0], turns[1] | {"train": False}, call | {"train": False}, *turns[3:]]})[1]["train"] is False
    assert codes({"conversations": [turns[0], call, call, *turns[3:]]}) == ["tool_order"]


def test_sharegpts_calls_below_each_other_are_one_turn_where_each_has_its_result():
    def call(city):
        return {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": city}})}

    def seen(text):
        return {"from": "observation", "value": text}

    cities = ("Oslo", "Rome", "Kyiv")
    question, end = {"from": "human", "value": "Where is it warm?"}, {"from": "gpt", "value": "Rome."}
    calls = [called("weather", {"city": city}) for city in cities]
    expected = [user("Where is it warm?"), answer(tool_calls=calls), *(result(t, "weather") for t in "123"), answer("Rome.")]
    assert messages({"conversations": [question, *map(call, cities), *map(seen, "123"), end]}) == expected
    said = [question, {"from": "gpt", "value": "Hm."}, *map(call, cities), *map(seen, "123"), end]
    assert messages({"conversations": said}) == [expected[0], answer("Hm.", tool_calls=calls), *expected[2:]]
    one_by_one = messages({"conversations": [question, call("Oslo"), seen("1"), call("Rome"), seen("2"), end]})
    assert [len(turn.get("tool_calls", ())) for turn in one_by_one] == [0, 1, 0, 1, 0, 0]
    for results in ("12", "1234"):  # which call has none, or two, nobody can tell
        assert codes({"conversations": [question, *map(call, cities), *map(seen, results), end]})[0] == "tool_order"
    unlearned = [question, call("Oslo"), call("Rome") | {"train": False}, *map(seen, "12"), end]
    assert codes({"conversations": unlearned})[0] == "tool_order"


def test_geminis_schema_types_become_those_of_json_schema():
    schema = {"type": "OBJECT", "properties": {"type": {"type": "STRING", "enum": ["STRING"]}, "n": {"type": "ARRAY", "items": {"type": "NUMBER"}},
                                               "either": {"anyOf": [{"type": "NULL"}, {"type": "integer"}]}}, "example": {"type": "STRING"}}
    expected = {"type": "object", "properties": {"type": {"type": "string", "enum": ["STRING"]}, "n": {"type": "array", "items": {"type": "number"}},
                                                 "either": {"anyOf": [{"type": "null"}, {"type": "integer"}]}}, "example": {"type": "STRING"}}
    for tools in ([{"name": "f", "parameters": schema}], [{"type": "function", "function": {"name": "f", "parameters": json.dumps(schema)}}]):
        row = {"messages": [user("a"), answer("b")], "tools": tools}
        assert read(row).tools == [{"type": "function", "function": {"name": "f", "parameters": expected}}]


def test_glaive():
    row = GLAIVE | {"chat": GLAIVE["chat"].replace(" USER: is not my name.", "")}
    example = read(row)
    assert example.format == "sharegpt"
    assert [tool["function"]["name"] for tool in example.tools] == ["get_exchange_rate", "get_time"]
    assert example.messages == [
        system("You are a helpful assistant with access to the following functions. Use them if required"),
        user("Can you book a flight for me?"), answer("I can only get rates."),
        user("What about\n1. dollars and\n2. Bob's euros?"),
        answer("Let me look.", tool_calls=[called("get_exchange_rate", {"base_currency": "USD", "note": "Bob's"})]),
        result('{"rate": 0.85}', "get_exchange_rate"), answer("It is 0.85.\n\nAnything else?")]
    assert codes(GLAIVE)[0] == "alternation"  # a speaker's name inside a text cannot be told from a turn


@pytest.mark.parametrize("call, arguments", [
    ('{"name": "now", "arguments": \'{}\'}', {}), ('{"name": "now", "arguments": {"zone": "UTC"}}', {"zone": "UTC"}),
    ('{"name": "now"}', {}), ('{"name": "now", "arguments": \'{"a": "it\'s"}\'}', {"a": "it's"}),
    ('{"name": "now", "arguments": \'{"a": "C:\\\\\'s"}\'}', {"a": "C:\\'s"})])
def test_glaives_ways_to_call(call, arguments):
    row = {"system": "SYSTEM: You are helpful, with {braces}.", "chat": f"USER: Time?\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>"}
    assert read(row).messages == [system("You are helpful, with {braces}."), user("Time?"), answer(tool_calls=[called("now", arguments)])]
    assert read(row).tools is None


def test_glaives_system_text_that_is_not_only_declarations():
    for text in ('Use {"name": "f"} and then stop.', 'Use {"name": "f"} {', 'Answer as {"json": true}'):
        example = read({"system": f"SYSTEM: {text}", "chat": "USER: a\n\n\nASSISTANT: b <|endoftext|>"})
        assert (example.messages[0], example.tools) == (system(text), None)


@pytest.mark.parametrize("call", ["{", "", "now()", '{"name": "now", "arguments": \'{"a": }\'}'])
def test_glaives_broken_calls(call):
    code, = codes({"chat": f"USER: Time?\n\n\nASSISTANT: <functioncall> {call} <|endoftext|>"})
    assert code in ("tool_arguments", "tool_calls")


PROMPT, COMPLETION = [system("Be brief."), user("Sky?")], [answer("Blue.")]


def test_prompt_and_completion():
    assert read({"prompt": "Sky? ", "completion": " Blue."}) == Example("prompt-completion", [user("Sky? "), answer(" Blue.")], None, None)
    for prompt in (PROMPT, json.dumps(PROMPT)):
        for completion in (COMPLETION, json.dumps(COMPLETION), "Blue."):
            assert messages({"prompt": prompt, "completion": completion}) == [*PROMPT, *COMPLETION]
    row = {"prompt": [user("Weather?")], "completion": [answer(tool_calls=[{"name": "weather", "arguments": {}}])], "tools": [WEATHER]}
    assert read(row).tools == [WEATHER]
    assert messages(row)[1] == answer(tool_calls=[called("weather", {})])
    assert messages({"system": "Be brief.", "prompt": "Sky?", "completion": "Blue."}) == [*PROMPT, *COMPLETION]


def test_answers_inside_a_prompt_are_not_learned():
    said = [user("a"), answer("b"), user("c")]
    assert messages({"prompt": said, "completion": "d"}) == [user("a"), answer("b", train=False), user("c"), answer("d")]
    named = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    assert messages({"prompt": named, "completion": [answer("d")]})[1] == answer("b", train=False)
    said[1] = answer("b", weight=1)
    assert messages({"prompt": said, "completion": "d"})[1] == answer("b")


@pytest.mark.parametrize("text", ["[1, 2, 3]", '[{"name": "Bob"}]', "[]", "[INST", '{"role": "user"}'])
def test_texts_that_are_json_stay_texts(text):
    assert messages({"prompt": text, "completion": text}) == [user(text), answer(text)]


@pytest.mark.parametrize("row, given", [
    ({"question": "2+2?", "answer": "4", "hint": "x"}, "user=question,assistant=answer"),
    ({"id": 1, "Question": "2+2?", "Answer": "4", "Choices": ["3", "4"]}, "user=Question,assistant=Answer"),
    ({"system_prompt": "", "question": "2+2?", "response": "4"}, "user=question,assistant=response,system=system_prompt"),
    ({"prompt": "2+2?", "response": "4", "prompt_id": 3}, "user=prompt,assistant=response"),
    ({"query": "2+2?", "completion": "4", "source": "x"}, "user=query,assistant=completion"),
    ({"input": "2+2?", "output": "4"}, "user=input,assistant=output"),
    ({"input": "2+2?", "content": "4", "reasoning_content": "Count."}, "user=input,assistant=content,reasoning=reasoning_content"),
    ({"inputs": "2+2?", "targets": "4", "language": "eng"}, "user=inputs,assistant=targets"),
    ({"article": "2+2?", "highlights": "4", "id": "x"}, "user=article,assistant=highlights"),
    ({"Question": "2+2?", "Complex_CoT": "Count.", "Response": "4"}, "user=Question,assistant=Response,reasoning=Complex_CoT"),
])
def test_columns_are_suggested_and_work(row, given):
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert caught.value.code == "unknown_format" and caught.value.fix == f"use --columns {given}"
    assert "neither `messages` nor `instruction` and `output`" in str(caught.value)
    columns = config.PrepareConfig(columns=tuple(given.split(","))).column_names
    assert read(row, columns=columns).format == "columns"
    texts = [row[columns[role]].strip() for role in ("system", "user", "assistant") if role in columns]
    assert [turn["content"] for turn in messages(row, columns=columns)] == [text for text in texts if text]


QA = {"user": "question", "assistant": "answer", "system": "persona"}


@pytest.mark.parametrize("row, found", [
    ({"question": "a"}, [("missing_column", "the column `answer` is missing; the row has `question`")]),
    ({"question": " ", "answer": None}, [("empty_turn", "the column `question` is empty"), ("empty_turn", "the column `answer` is empty")]),
    ({"question": "a", "answer": 4.5}, [("not_text", "`answer` is a number, not text, and there are several ways to write it "
                                                     "(5, 5.0, 5.00)")]),
    ({"question": "a", "answer": False}, [("not_text", "`answer` is true or false, not text, and there are several ways to "
                                                       "write it (true, True, yes)")]),
    ({"question": "a", "answer": "b", "persona": []}, [("not_text", "`persona` is a list, not text")]),
    ({"question": "a", "answer": "\ufffd"}, [("broken_text", "turn 2 contains damaged characters")]),
])
@pytest.mark.parametrize("name", [None, "columns"])
def test_named_columns_that_cannot_be_used(row, found, name):
    assert problems(row, name, columns=QA) == found


@pytest.mark.parametrize("row", [
    {"prompt": "c", "completion": "d"}, {"question": "c", "answer": "d"}, {"instruction": "c", "output": "d"},
    {"prompt": "c", "chosen": "d", "rejected": "e"}], ids=["completion", "columns", "alpaca", "pair"])
def test_earlier_turns_of_a_row_stay_its_own(row):
    row |= {"history": [user("a"), answer("b")]}
    as_it_was = repr(row)
    first, again = (read(row, columns=QA if "question" in row else None).messages for _ in range(2))
    assert first == again and [turn["content"] for turn in first] == ["a", "b", "c", "d"] and repr(row) == as_it_was


def test_named_columns():
    assert messages({"question": "a", "answer": "b", "persona": "c"}, columns=QA) == [system("c"), user("a"), answer("b")]
    assert messages({"question": "a", "answer": "b", "persona": " "}, columns=QA) == [user("a"), answer("b")]
    past = {"question": "c", "answer": "d", "history": [["a", "b"]], "tools": "hammer"}
    assert messages(past, columns=QA) == [user("a"), answer("b"), user("c"), answer("d")]
    thought = QA | {"reasoning": "cot"}
    assert messages({"question": "a", "answer": "b", "cot": "c"}, columns=thought) == [user("a"), answer("b", reasoning_content="c")]
    assert messages({"question": "a", "answer": "<think>\nc\n</think>\nb", "cot": "c"}, columns=thought)[1] == answer(
        "b", reasoning_content="c"), "an answer that repeats it has it once"
    for missing in ({}, {"cot": None}, {"cot": " "}):
        assert messages({"question": "a", "answer": "b"} | missing, columns=thought) == [user("a"), answer("b")]
    assert codes({"question": "a", "answer": "b", "cot": ["c", "d"]}, columns=thought) == ["not_text"]
    # Other formats in other files go on working, unless only the columns are asked for.
    assert read(SHAREGPT, columns=QA).format == "sharegpt"
    assert codes(SHAREGPT, "columns", columns=QA) == ["missing_column"] * 2
    assert codes({"other": 1}, columns=QA) == ["missing_column"] * 2
    assert read(OPENAI_TOOLS | {"persona": "x"}, columns=QA).format == "messages"
    # What is named wins over what would be found.
    assert messages(ALPACA, columns={"user": "input", "assistant": "output"}) == [user(ALPACA["input"]), answer("Telegram")]


@pytest.mark.parametrize("row, turns", [
    ({"instruction": 2, "input": 3, "output": 0}, [user("2\n\n3"), answer("0")]),
    ({"prompt": 7, "completion": 10**30}, [user("7"), answer(f"1{'0' * 30}")]),
    ({"question": "2+2?", "answer": 4, "persona": 0}, [system("0"), user("2+2?"), answer("4")]),
    ({"instruction": "c", "output": 4, "history": [[1, -2]]}, [user("1"), answer("-2"), user("c"), answer("4")]),
])
def test_whole_numbers_are_the_texts_that_a_csv_file_has(row, turns):
    assert messages(row, columns=QA) == turns


def test_columns_of_whole_numbers_are_suggested():
    with pytest.raises(RowError) as caught:
        read({"question": "2+2?", "answer": 4})
    assert caught.value.fix == "use --columns user=question,assistant=answer"


@pytest.mark.parametrize("text, reason", [
    ('[{"role": "user", "content": "a"}, {"role"', "`messages` is text that is not JSON: Expecting ':' delimiter at column 43"),
    ('["a"]', "`messages` is text, not a list of turns")])
def test_turns_as_a_text_that_is_broken(text, reason):
    [(_, found)] = problems({"messages": text})
    assert found == reason


def test_a_system_text_that_is_false_is_not_overlooked():
    assert codes(ALPACA | {"system": False}) == codes(ALPACA | {"system": 0.5}) == ["not_text"]


@pytest.mark.parametrize("text", ["    return 1\n", "\tx", "\u3000什么？\u00a0"])
def test_white_space_around_a_text_is_kept(text):
    turns = [system(text), user(text), answer(text)]
    assert messages({"messages": turns}) == turns
    assert messages({"conversations": [{"from": t["role"], "value": text} for t in turns]}) == turns
    assert messages({"system": text, "instruction": text, "input": "", "output": text}) == turns
    assert messages({"system": text, "instruction": " ", "input": text, "output": text}) == turns
    assert messages({"system": text, "prompt": text, "completion": text}) == turns
    assert messages({"persona": text, "question": text, "answer": text}, columns=QA) == turns
    assert messages({"system": text, "prompt": text, "chosen": text, "rejected": "x"}, take="chosen") == turns
    for blank in (" ", "\n\u3000"):
        assert codes({"messages": [*turns[:2], answer(blank)]}) == ["empty_turn"]
        assert codes({"question": "a", "answer": blank}, columns=QA) == ["empty_turn"]
        assert messages({"system": blank, "prompt": text, "completion": text}) == turns[1:]


def test_text():
    assert read({"text": " Once upon a time.\n", "meta": {"url": "x"}, "title": "Tale"}) == Example("text", None, None, " Once upon a time.\n")
    assert read(ALPACA, "text").text == ALPACA["text"]
    assert codes({"text": " \n"}) == ["empty_turn"]
    assert codes({"text": 7}) == codes({"text": None}) == ["not_text"]
    assert codes({"text": "a\ud800"}) == ["broken_text"]


# As pandas writes a column of lists, or of numpy's arrays, into a CSV file.
SHOWN_BY_PYTHON = [str(PROMPT + COMPLETION), f"array({PROMPT + COMPLETION}, dtype=object)",
                   "[{'role': 'user', 'content': \"it's\"}\n {'role': 'assistant', 'content': 'b'}]"]


@pytest.mark.parametrize("row, where", [
    ({"messages": ...}, "`messages`"), ({"conversations": ...}, "`conversations`"), ({"conversation": ...}, "`conversation`"),
    ({"prompt": ..., "completion": "b"}, "`prompt`"), ({"prompt": "a", "completion": ...}, "`completion`"),
    ({"prompt": "a", "chosen": ..., "rejected": ...}, "`chosen`"), ({"question": ..., "answer": "b"}, "`question`"),
    ({"instruction": "a", "output": "b", "history": ...}, "`history`"),
])
@pytest.mark.parametrize("shown", SHOWN_BY_PYTHON)
def test_turns_as_python_shows_them_are_no_text(row, where, shown):
    row = {key: shown if value is ... else value for key, value in row.items()}
    with pytest.raises(RowError) as caught:
        read(row, columns=QA, take="chosen")
    [problem] = caught.value.problems
    assert problem.code == "not_json" and problem.reason.startswith(f"{where} is text as Python shows a list")
    assert "json.dumps" in problem.fix


def test_tools_and_calls_as_python_shows_them():
    assert codes({"messages": [USER, ANSWER], "tools": str([WEATHER])}) == ["not_json"]
    assert codes({"messages": [USER, answer(tool_calls=str(CALL["tool_calls"]))]}) == ["not_json"]
    text = "{'name': 'Bob'} is a dict, and [{'a': 1}] a list"
    assert messages({"prompt": text, "completion": text[21:]}) == [user(text), answer(text[21:])]


def test_a_list_of_turns_alone_is_a_row():
    turns = [user("a"), answer("b")]
    assert read(turns) == read(turns, "messages") == Example("messages", turns, None, None)
    assert messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == turns
    assert problems([USER, "x"]) == [("not_an_object", "turn 2 is text, not an object")]
    assert codes([]) == codes(["a"]) == codes([{"content": "a"}]) == ["not_an_object"]


GEMINI = {"contents": [{"role": "user", "parts": [{"text": "Sky?"}]}, {"role": "model", "parts": [{"text": "Blue."}]}]}
DPO = {"prompt": "Sky?", "chosen": "Blue.", "rejected": "Green."}
HH = {"chosen": "\n\nHuman: Are you\n\nawake?\n\nAssistant: Yes.\n\nHuman: Good.\n\nAssistant: Indeed.",
      "rejected": "\n\nHuman: Are you\n\nawake?\n\nAssistant: Yes.\n\nHuman: Good.\n\nAssistant: Go away."}
OPENAI_DPO = {"input": {"messages": [user("Hello, how cold is it?")], "tools": [WEATHER], "parallel_tool_calls": True},
              "preferred_output": [answer("Three degrees.")], "non_preferred_output": [answer("Cold.")]}
ULTRA = {"prompt": "Sky?", "chosen": [user("Sky?"), answer("Blue.")], "rejected": [user("Sky?"), answer("Green.")],
         "messages": [user("Sky?"), answer("Blue.")], "score_chosen": 8.0}


@pytest.mark.parametrize("row, turns", [
    (DPO, [user("Sky?"), answer("Blue.")]),
    (DPO | {"system": "Be brief."}, [system("Be brief."), user("Sky?"), answer("Blue.")]),
    (HH, [user("Are you\n\nawake?"), answer("Yes."), user("Good."), answer("Indeed.")]),
    ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Hello!", "rejected": " Bye!"}, [user("Hi"), answer("Hello!")]),
    (OPENAI_DPO, [user("Hello, how cold is it?"), answer("Three degrees.")]),
    (ULTRA, [user("Sky?"), answer("Blue.")]),
    (ULTRA | {"prompt": [system("Be brief."), user("Sky?")], "chosen": [system("Be brief."), user("Sky?"), answer("Blue.")]},
     [system("Be brief."), user("Sky?"), answer("Blue.")]),
    ({"prompt": [user("Sky?")], "chosen": [answer("Blue.")], "rejected": [answer("Green.")]}, [user("Sky?"), answer("Blue.")]),
    ({"conversations": [{"from": "human", "value": "Sky?"}], "chosen": {"from": "gpt", "value": "Blue."},
      "rejected": {"from": "gpt", "value": "Green."}}, [user("Sky?"), answer("Blue.")]),
    ({"instruction": "Colour?", "input": "Sky", "chosen": "Blue.", "rejected": "Green."}, [user("Colour?\n\nSky"), answer("Blue.")]),
    ({"question": "Sky?", "chosen": "Blue.", "rejected": "Green.", "system": ""}, [user("Sky?"), answer("Blue.")]),
    ({"prompt": "Sky?", "completion": "Blue.", "label": True}, [user("Sky?"), answer("Blue.")]),
], ids=["DPO", "system", "HH", "HH with a prompt", "OpenAI", "UltraFeedback", "whole", "lists", "ShareGPT", "Alpaca", "question", "KTO"])
def test_preferences_are_pairs_or_their_better_answer_is_taken(row, turns):
    example = read(row, take="chosen")
    assert (example.format, example.messages, example.rejected, example.good) == ("preference", turns, None, None)
    assert example.tools == ([WEATHER] if row is OPENAI_DPO else None)
    if "label" in row:
        assert codes(row, take="pairs") == ["no_pair"]
    for example in (read(row), read(row, "preference"), *([] if "label" in row else [read(row, take="pairs")])):
        # Nothing but the answer is learned.
        assert example.messages == [t | {"train": False} if t["role"] == "assistant" else t for t in turns[:-1]] + turns[-1:]
        if "label" in row:
            assert (example.rejected, example.good) == (None, True)
        else:
            worse = {"Blue.": "Green.", "Indeed.": "Go away.", "Hello!": "Bye!", "Three degrees.": "Cold."}
            assert (example.rejected, example.good) == ([answer(worse[turns[-1]["content"]])], None)
        assert example.tools == ([WEATHER] if row is OPENAI_DPO else None)
        assert read(example.as_row()) == example, "as it is prepared, it can be prepared again"


def test_a_bad_answer_is_kept_as_one():
    for row in ({"prompt": "Sky?", "completion": "Green.", "label": False},
                {"prompt": "Sky?", "completion": "Green.", "label": "False"},
                {"prompt": "Sky?", "completion": "Green.", "label": 0}, {"prompt": "Sky?", "completion": "Green.", "label": "0"},
                {"messages": [user("Sky?"), answer("Green.")], "kto_tag": 0},
                {"messages": [user("Sky?"), answer("Green.")], "kto_tag": False},
                {"messages": [user("Sky?"), answer("Green.")], "label": False},
                {"instruction": "Sky?", "input": "", "output": "Green.", "kto_tag": False},
                {"conversations": [{"from": "human", "value": "Sky?"}, {"from": "gpt", "value": "Green."}], "kto_tag": False}):
        example = read(row)
        assert (example.messages, example.good) == ([user("Sky?"), answer("Green.")], False)
        assert example.as_row() == {"messages": example.messages, "kto_tag": False}
        assert codes(row, take="chosen") == ["preference"], "never learned as an answer to give"
    row = {"messages": [user("Sky?"), answer("Green.")], "label": False}
    assert read(row, "messages").good is None, "where --format says what it is"
    for label in (0, "negative", None):  # classes of anything
        assert read(row | {"label": label}).format == "messages"
    for label, good in ((1, True), ("1", True), (1.0, True), (2, None), ("3", None)):
        assert read({"prompt": "Sky?", "completion": "Blue.", "label": label}).good is good


def found(row: Any) -> tuple[Problem, ...]:
    with pytest.raises(RowError) as raised:
        read(row)
    return raised.value.problems


@pytest.mark.parametrize(("row", "fix"), [
    ({"指令": "a", "背景": "b", "回答": "c"}, "use --columns 'user=指令,assistant=回答,context=背景'"),
    ({"问题（必填）": "a", "答案": "b"}, "use --columns 'user=问题（必填）,assistant=答案'"),
    ({"序号": "1", "客户问题": "a", "标准回复": "b", "分类": "c"}, "use --columns 'user=客户问题,assistant=标准回复'"),
    ({"User Question": "a", "best_reply": "b"}, "use --columns 'user=User Question,assistant=best_reply'"),
    ({"text_input": "a", "output": "b"}, "use --columns user=text_input,assistant=output"),
    ({"inputs_pretokenized": "a", "targets_pretokenized": "b", "inputs": [1], "targets": [2]},
     "use --columns user=inputs_pretokenized,assistant=targets_pretokenized"),
    ({"department": "x", "title": "t", "ask": "a", "answer": "b"}, "use --columns user=ask,assistant=answer"),
    ({"ｑｕｅｓｔｉｏｎ ": "a", "answer": "b"}, "use --columns 'user=ｑｕｅｓｔｉｏｎ ,assistant=answer'"),
    ({"dialog": [{"speaker": "customer", "text": "hi"}, {"speaker": "agent", "text": "yo"}]},
     "use --columns turns=dialog --turn-keys role=speaker,content=text, and --roles for roles of other names"),
    ({"segments": [{"label": False, "text": "Q"}, {"label": True, "text": "A"}]}, 'write them as turns: {"messages": [{"role": "user", '
     '"content": "…"}, …]}, where "train": false keeps one from being learned')])
def test_columns_of_other_names_get_the_whole_command(row, fix):
    [problem] = found(row)
    assert problem.code == "unknown_format" and problem.fix == fix


@pytest.mark.parametrize("row, alone", [
    ({"message_id": "1", "parent_id": None, "text": "Sky?", "role": "prompter", "lang": "en"}, True),  # OpenAssistant's trees
    ({"speaker": "Ann", "text": "Sky?"}, True), ({"conversation_id": 7, "role": "user", "content": "Sky?"}, False),
    ({"role": "user", "content": "Sky?", "user": "ann"}, False), ({"sender": "Ann", "text": "Sky?"}, True),
    ({"id": 1, "is_sender": 0, "talker": "ann", "msg": "Sky?"}, False), ({"发言人": "Ann", "内容": "Sky?"}, False)])
def test_a_row_that_is_one_turn_is_not_learned_as_a_text_of_its_own(row, alone):
    [problem] = found(row)
    assert "it seems to be one turn of a conversation" in problem.reason and "into one row" in problem.fix
    assert ("--format text" in problem.fix) == alone
    if alone:
        assert read(row, "text").text == "Sky?" and read({**row, "role": None, "speaker": None, "sender": None}).format == "text"


GOOD = '{"prompt": "Sky?", "completion": "Blue."}\n'


@pytest.mark.parametrize("text", [f"// mine\n{GOOD}  # more\n", f"/* mine */\n{GOOD}", "{'prompt': 'Sky?', 'completion': \"Blue.\", 'n': None}\n" * 2])
def test_lines_that_are_no_json_are_told_with_a_command_that_works(text, tmp_path):
    (tmp_path / "FILE.jsonl").write_text(text, encoding="utf-8")
    rows = [row for block in read_blocks(source_of(tmp_path / "FILE.jsonl")) for row in block.rows()]
    with pytest.raises(RowError) as caught:
        Formats().example_of(rows[0])
    assert caught.value.code == "broken_json"
    subprocess.run(["sh", "-c", caught.value.fix.partition("with ")[2]], cwd=tmp_path, check=True)
    for line in (tmp_path / "rows.jsonl").read_text().splitlines():
        assert messages(json.loads(line)) == [user("Sky?"), answer("Blue.")]


def test_messages_of_slack_are_no_texts_of_their_own():
    row = {"type": "message", "user": "U1", "text": "Sky?", "ts": "1.5"}
    [problem] = found(row)
    assert "with `user` and `text` it seems to be one turn" in problem.reason and read(row, "text").text == "Sky?"
    assert read({"text": "Sky?", "user": "U1"}).format == "text"


def test_who_speaks_and_what_is_said_under_other_keys_is_told():
    said = {"id": "1", "type": "Default", "content": "Sky?", "author": {"id": "7", "name": "Ann"}}
    problem, *_ = found({"messages": [said]})
    assert "`author.name` says who speaks" in problem.reason and "write `author.name` of each turn as its `role`" in problem.fix
    problem, *_ = found({"messages": [{"role": "user", "text": "Sky?"}, answer("Blue.")]})
    assert problem.fix == "if `text` has it, name that: --turn-keys content=text"
    assert messages({"messages": [{"role": "user", "text": "Sky?"}, answer("Blue.")]}, turn_keys={"content": "text"})[0] == user("Sky?")


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("row", [
    {"prompt": "Sky?", "answers": [{"answer": "Red.", "rank": 2.0}, {"answer": "Blue.", "rank": 1.0}, {"answer": "No.", "rank": 3.0}]},
    {"instruction": "Sky?", "completions": [{"response": text, "overall_score": score} for text, score in (("No.", 1), ("Blue.", 9), ("Red.", 3))]},
    {"qid": 1, "question": "Sky?", "answers": [{"text": "No.", "pm_score": 0}, {"text": "Blue.", "pm_score": 5}]}])
def test_answers_with_ranks_are_told_with_a_command_that_makes_pairs(row, tmp_path):
    [problem] = found(row)
    assert "holds several answers to" in problem.reason
    (tmp_path / "FILE.json").write_text(json.dumps([row, row]), encoding="utf-8")
    subprocess.run(["sh", "-c", problem.fix.partition("pair: ")[2]], cwd=tmp_path, check=True)
    pair, _ = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
    assert read(pair).messages == [user("Sky?"), answer("Blue.")] and read(pair).rejected == [answer("No.")]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_questions_as_names_are_told_with_a_command_that_works(tmp_path):
    row = {f"What is {n}?": f"It is {n}." for n in range(4)}
    [problem] = found(row)
    assert "its 4 names are sentences" in problem.reason
    (tmp_path / "FILE.json").write_text(json.dumps(row), encoding="utf-8")
    subprocess.run(["sh", "-c", problem.fix.partition("rows: ")[2]], cwd=tmp_path, check=True)
    first, *_ = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert messages(first) == [user("What is 0?"), answer("It is 0.")]
    assert "its 3 names" not in str(found(dict(list(row.items())[:3]))), "which may be the first row of a table"


def test_rows_inside_others_are_known_by_their_usual_names():
    [problem] = found({"category": "c", "items": [{"q": "a", "a": "b"}]})
    assert "`items` holds rows, not turns" in problem.reason
    [problem] = found({"chat": {"question": "a", "answer": "b"}, "tags": ["x"]})
    assert "further inside, in `chat`" in problem.reason


def test_names_that_are_the_first_row_of_the_data_are_told():
    [problem] = found({"What is 3 plus 11?": "What is 3 plus 12?", "3 plus 11 is 14.": "3 plus 12 is 15."})
    assert "put a line with names above it" in problem.fix


@pytest.mark.parametrize("names", [("What is a bond?", "A loan."), ("什么是债券？", "债券是一种借款凭证。")])
def test_so_are_short_sentences_and_those_of_languages_without_spaces(names):
    [problem] = found(dict.fromkeys(names, "x"))
    assert "put a line with names above it" in problem.fix
    for columns in (("Frage", "Antwort (de)"), ("No.", "Titel", "Qty.")):
        [problem] = found(dict.fromkeys(columns, "x"))
        assert "above it" not in problem.fix


def test_on_windows_commands_are_such_as_work_there(monkeypatch):
    """Its shells take neither filters of jq in quotes nor, PowerShell, a comma without them."""
    monkeypatch.setattr(shell, "os", SimpleNamespace(name="nt"))
    inside = {"row": {"messages": [user("a"), answer("b")]}}, {"message_tree_id": "a", "prompt": {"replies": []}}
    two = {"prompt": "a", "response_1": "b", "response_2": "c"}
    for row in (*inside, two, {"paragraphs": [{"context": "a", "qas": []}]}, {"data": {"train": [{"q": "a", "r": "b"}]}}):
        [problem] = found(row)
        assert re.search(r"jq -c '.+' \w+\.jsonl? > (rows|pairs)\.jsonl \(in Git Bash\)", problem.fix), problem.fix
    for value in ([{"speaker": "a", "utterance": "b"}], [{"role": "Kunde", "content": "a"}, {"role": "Laden", "content": "b"}]):
        [problem, *_] = found({"messages": value})
        assert re.search(r'--(turn-keys|roles) "\w+=\w+,\w+=\w+"', problem.fix), problem.fix


def test_rows_further_inside_an_object_are_told_with_the_command():
    [problem] = found({"version": "1", "data": {"train": [{"q": "a", "r": "b"}], "test": [{"q": "a", "r": "b"}]}})
    assert "further inside, in `data.train[]`" in problem.reason
    assert "jq -c '(arrays[], objects).data.train[]' FILE.json > rows.jsonl" in problem.fix
    [problem] = found({"id": 1, "record": {"messages": [user("a"), answer("b")]}})
    assert "jq -c '(arrays[], objects).record' FILE.json > rows.jsonl" in problem.fix
    [problem] = found({"title": "a", "meta": {"tags": [{"name": "b"}]}})
    assert "if they are what is to be learned" in problem.fix, "nobody knows what these are"
    for inside in ({"it's": [{"q": "a"}], "numbers": [1]}, {"turns": [user("a"), answer("b")]}):
        [problem] = found({"data": inside})
        assert "jq" not in problem.fix


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_rows_under_names_of_their_own_are_told_with_a_command_that_works(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    (tmp_path / "FILE.json").write_text(json.dumps(dict(zip(("id-1", "id-2"), rows, strict=True)), indent=1), encoding="utf-8")
    [problem] = found(json.loads((tmp_path / "FILE.json").read_text()))
    assert "they seem to be rows" in problem.reason
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == rows
    [problem] = found({"prompt": {"a": 1}, "reply": {"b": 1}})
    assert "jq" not in problem.fix


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("layout", ["array", "lines", "object"])
def test_the_command_for_rows_further_inside_works_on_every_layout_of_a_file(tmp_path, layout):
    rows = [{"record": {"messages": [user(text), answer("b")]}} for text in "ac"][:1 if layout == "object" else 2]
    text = json.dumps(rows, indent=1) if layout == "array" else "\n".join(map(json.dumps, rows))
    (tmp_path / "FILE.json").write_text(text, encoding="utf-8")
    [problem] = found(rows[0])
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [row["record"] for row in rows]


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("name", ["train", "train-data", "训练"])
def test_lists_of_rows_are_told_with_a_command_that_works(tmp_path, name):
    rows = [{"instruction": text, "output": "b"} for text in "ac"]
    (tmp_path / "FILE.json").write_text(json.dumps({name: rows, "info": "x"}), encoding="utf-8")
    [problem] = found({name: rows, "info": "x"})
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    assert [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == rows


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("layout", ["array", "lines"])
@pytest.mark.parametrize(("row", "seems"), [(["a", "b"], "a question and its answer"), (["a", "b", "c", "d"], "questions with their answers")])
def test_lists_of_questions_and_answers_are_told_with_a_command_that_works(tmp_path, layout, row, seems):
    text = json.dumps([row, row], indent=1) if layout == "array" else f"{json.dumps(row)}\n" * 2
    (tmp_path / "FILE.json").write_text(text, encoding="utf-8")
    [problem] = found(row)
    assert (problem.code, problem.reason) == ("not_an_object", f"a row is a JSON object, this one is a list of {len(row)} texts")
    assert problem.fix.startswith(f"if they are {seems}, ")
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [messages(row) for row in written] == [[user("a"), answer("b"), user("c"), answer("d")][:len(row)]] * 2


@pytest.mark.parametrize("row", [[], ["a"], ["a", "b", "c"], ["a", 1], [["a", "b"]], [{"content": "a"}]])
def test_other_lists_are_not_taken_for_such(row):
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert "jq" not in caught.value.fix


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_what_a_grader_compares_with_is_told_with_a_command_that_makes_it_the_answer(tmp_path):
    row = {"messages": [user("a")], "reference_answer": "b"}
    (tmp_path / "FILE.json").write_text(json.dumps(row), encoding="utf-8")
    [problem] = found(row)
    assert problem.code == "no_answer" and "`reference_answer` is what a grader compares answers with" in problem.reason
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    assert messages(json.loads((tmp_path / "rows.jsonl").read_text())) == [user("a"), answer("b")]
    [problem] = found(row | {"reference_answer": {"price": 4}})
    assert "jq" not in problem.fix and problem.fix.startswith("it is an object: ")
    [problem] = found({"messages": [user("a")]})
    assert problem.fix == "leave the last turn out, or put the answer behind it"


def test_no_command_has_a_name_that_the_shell_would_run():
    for name in ("a;ls", "a|ls", "$(ls)", "a`ls`", "a&ls", "a>b"):
        for inside in ({"instruction": "a", "output": "b"}, {"speaker": "a", "text": "b"}):
            [problem] = found({name: [inside]})
            assert name not in problem.fix
        [problem] = found({"messages": [{"role": name, "content": "a"}, answer("b")]})
        assert name not in problem.fix


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_an_answer_beside_its_turns_is_told_with_a_command_that_works(tmp_path):
    row = {"context": [user("a"), answer("b"), user("c")], "response": "d", "score": 3}
    (tmp_path / "FILE.json").write_text(json.dumps([row]), encoding="utf-8")
    [problem] = found(row)
    assert "`context` holds turns that end with the user's, and `response` seems to be the answer" in problem.reason
    subprocess.run(["sh", "-c", problem.fix[problem.fix.index("jq "):]], cwd=tmp_path, check=True)
    [written] = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert messages(written) == [user("a"), answer("b", train=False), user("c"), answer("d")]
    [problem] = found({"prompt": [user("a")], "reward": 1})
    assert "jq" not in problem.fix and "put the answer behind the turns" in problem.fix
    [problem] = found({"prompt": [user("a")], "reference_answer": "b"})
    assert problem.fix.endswith("{prompt: .prompt, completion: .reference_answer}' FILE.json > rows.jsonl")
    [problem] = found({"question": "a", "reference_answer": "b"})
    assert problem.fix == "use --columns user=question,assistant=reference_answer"
    [problem] = found({"talk": [user("a"), answer("b")], "response": "c"})
    assert problem.fix == "if `talk` holds the turns, use --columns turns=talk"


def test_a_sound_is_not_asked_to_become_a_text():
    for part in ({"type": "video_url", "video_url": {"url": "x"}}, {"type": "input_audio", "input_audio": {}}):
        [problem] = found({"messages": [{"role": "user", "content": [part]}, answer("b")]})
        assert "text and pictures alone are learned" in problem.fix


def test_parts_of_tools_and_of_no_known_type_say_what_to_write():
    for part, fix in (({"type": "server_tool_use", "id": "t", "name": "f", "input": {}}, "write a call as `tool_calls`"),
                      ({"type": "tool_result", "tool_use_id": "t", "content": "r"}, "a turn of the role `tool`"),
                      ({"type": "tool_call", "value": "{}"}, "write a call as `tool_calls`"),
                      ({"type": "thinking", "thinking": [{"type": "text", "text": "c"}]}, "write a thought as `reasoning_content`"),
                      ({"type": ["text"], "text": "a"}, "write each part as"), ({"type": {}}, "write each part as")):
        [problem] = found({"messages": [user("a"), {"role": "assistant", "content": [{"type": "text", "text": "b"}, part]}]})
        assert problem.code == "not_text" and fix in problem.fix


def test_answers_of_several_turns():
    prompt, calls = [user("a"), answer("b"), user("c")], [CALL, RESULT, answer("d")]
    example = read({"chosen": [*prompt, *calls], "rejected": [*prompt, answer("e"), user("f"), answer("g")], "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]})
    assert [turn.get("train", True) for turn in example.messages if turn["role"] == "assistant"] == [False, True, True]
    assert len(example.messages) == 6 and example.rejected == [answer("e"), user("f"), answer("g")]


@pytest.mark.parametrize("row, code, reason", [
    (DPO | {"rejected": "Blue."}, "same_answers", "both answers are the same"),
    (DPO | {"rejected": " Blue.\n"}, "same_answers", "both answers are the same but for white space"),
    (DPO | {"chosen": "Dark  blue.", "rejected": "Dark blue."}, "same_answers", "both answers are the same but for white space"),
    ({"chosen": [user("a"), answer("b")], "rejected": [user("c"), answer("b")]}, "preference",
     "the two answers are to different prompts: after 0 turns that both have, the `user` says something else"),
    ({"chosen": [user("a"), answer("b")], "rejected": [user("a"), answer("b"), user("c"), answer("d")]}, "preference",
     "one of the two conversations is the beginning of the other, so they are no two answers to the same prompt"),
    (DPO | {"rejected": " "}, "empty_turn", None), (DPO | {"rejected": None}, "no_messages", None),
    ({"chosen": "Blue.", "rejected": "Green."}, "no_messages", None)])
def test_what_is_no_pair(row, code, reason):
    [(found, said), *_] = problems(row)
    assert found == code and reason in (None, said)


def test_what_is_wrong_with_one_answer_says_with_which():
    assert problems(DPO | {"rejected": " "}) == [("empty_turn", "the conversation with `rejected`: turn 2 (assistant) is empty")]
    assert problems(DPO | {"chosen": ""}) == [("empty_turn", "the conversation with `chosen`: turn 2 (assistant) is empty")]
    assert problems(DPO | {"prompt": " "}) == [("empty_turn", "turn 1 (user) is empty")], "once, of what both share"


def test_pairs_alone():
    assert codes({"messages": [user("a"), answer("b")]}, take="pairs") == ["no_pair"]
    assert codes({"text": "a"}, take="pairs") == ["no_pair"]


def test_preferences_that_cannot_be_taken():
    assert codes({"prompt": "Sky?", "completion": "Green.", "label": False}, take="chosen") == ["preference"]
    assert codes({"chosen": "Blue.", "rejected": "Green."}, take="chosen") == ["no_messages"]
    assert codes(DPO | {"chosen": None}, take="chosen") == ["no_messages"]
    assert codes(DPO | {"chosen": 7.5}, take="chosen") == ["not_text"]
    assert codes(DPO | {"chosen": " "}, take="chosen") == ["empty_turn"]
    assert read(ULTRA, "messages").messages == ULTRA["messages"]


# --- which format

@pytest.mark.parametrize("row, name", [
    (OPENAI_TOOLS, "messages"), (ALPACA, "alpaca"), (SHAREGPT, "sharegpt"), ({"prompt": "a", "completion": "b"}, "prompt-completion"),
    ({"text": "a"}, "text"), ({"messages": None, "conversations": None, "text": "a"}, "text"),
    ({"messages": None, "prompt": None, "completion": None, "instruction": "a", "input": None, "output": "b"}, "alpaca"),
    ({"messages": [user("a"), answer("b")], "text": "a b", "chosen": None, "rejected": None}, "messages"),
    ({"instruction": None, "input": "a", "output": "b"}, "alpaca"),
    ({"text": "a", "conversation": "free text"}, None), ({"text": "a", "answer": "b"}, None), ({"chat": "hello"}, None), ({}, None),
])
def test_detection(row, name):
    if name is None:
        assert codes(row) == ["unknown_format"]
        return
    assert read(row).format == name == read(row, name).format
    assert Formats().describe(name).startswith(f"{name} (rows have ")


def test_every_format_of_the_settings_is_known():
    rows = {"messages": OPENAI_TOOLS, "alpaca": ALPACA, "sharegpt": SHAREGPT, "prompt-completion": {"prompt": "a", "completion": "b"},
            "columns": {"question": "a", "answer": "b"}, "gemini": GEMINI, "rendered": {"text": "### Human: a ### Assistant: b"},
            "text": {"text": "a"}, "preference": DPO}
    assert set(rows) == set(config.FORMATS)
    for name, row in rows.items():
        formats = Formats(name, QA if name == "columns" else {}, "chosen")
        assert formats.example(row).format == name
        for other in rows.values():
            if other is not row and name != "columns" and other is not ALPACA and (name != "text" or "text" not in other):
                with pytest.raises(RowError, match=f"not a row of the format `{name}`"):
                    formats.example(other)
    assert Formats().describe("messages") == ("messages (rows have a list `messages`, or the turns of UltraChat, BELLE, MOSS or a "
                                              "program's export, or the calls of xLAM)")
    assert Formats(columns=QA).describe("columns") == "columns (rows have `question` and `answer` and `persona`)"


@pytest.mark.parametrize(("row", "turns"), [
    ({"messages": [user("Sky?"), answer("Blue.")], "rejected_response": "Green."}, [answer("Green.")]),
    ({"messages": [user("Sky?"), answer("Blue.")], "rejected_messages": [user("Sky?"), answer("Green.")]}, [answer("Green.")]),
    ({"query": "Sky?", "response": "Blue.", "rejected_response": "Green."}, [answer("Green.")])])
def test_ms_swifts_pairs(row, turns):
    example = read(row)
    assert example.format == "preference" and example.messages == [user("Sky?"), answer("Blue.")]
    assert example.rejected == turns and not example.unread


def test_ms_swifts_tool_calls():
    row = {"tools": json.dumps([WEATHER]), "messages": [
        user("Cold?"), {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Oslo"}}'},
        {"role": "tool_call", "content": '{"name": "weather", "arguments": {"city": "Rome"}}'},
        {"role": "tool_response", "content": "-5"}, {"role": "tool_response", "content": "9"}, answer("In Oslo.")]}
    assert messages(row) == [user("Cold?"), answer(tool_calls=[called("weather", {"city": "Oslo"}), called("weather", {"city": "Rome"})]),
                             result("-5", "weather"), result("9", "weather"), answer("In Oslo.")]


@pytest.mark.parametrize("said", ["<think>\nso\n</think>\n\nyes", "yes", "<think></think>\nyes"])
def test_reasoning_that_is_there_twice_is_learned_once(said):
    assert messages({"messages": [USER, answer(said, reasoning_content="so")]})[1] == answer("yes", reasoning_content="so")


@pytest.mark.parametrize("said", ["<think>other</think>yes", "<think>so yes"])
def test_reasoning_that_is_there_twice_and_differs_is_refused(said):
    [(code, reason)] = problems({"messages": [USER, answer(said, reasoning_content="so")]})
    assert code == "reasoning" and reason.startswith("turn 2 has reasoning under a key of its own, and another one in its text")


def test_a_thought_that_the_prompt_began_has_its_beginning():
    for said in ("c\n</think>\n\nb", "c\nd\n</think> \nb", "c\r\n</think>\r\n\r\nb", "c\n```\nd\n```\n</think>\nb"):
        assert messages({"messages": [user("a"), answer(said)]}) == [user("a"), answer(f"<think>\n{said}")]
    assert messages({"messages": [user("a"), answer("c\n</think>\n\nb", reasoning="c")]})[1]["content"] == "c\n</think>\n\nb"
    for said in ("`</think>` ends it.", "c</think>b", "</think> is a tag,\n</think>\ntoo", "<think>\nc\n</think>\nb",
                 "It ends:\n```\n</think>\n```\n", "1. It ends:\n   ~~~text\n</think>\n   ~~~"):
        assert messages({"messages": [user("a"), answer(said)]})[1]["content"] == said
    assert messages({"messages": [user("c\n</think>\nb"), answer("b")]})[0]["content"] == "c\n</think>\nb"


def test_a_thought_that_was_cut_off_is_no_answer():
    [(code, reason)] = problems({"messages": [USER, answer("<think>\nOkay, so first let me")]})
    assert (code, reason) == ("reasoning", "turn 2 begins a thought (<think>) that does not end")
    assert messages({"messages": [USER, answer("<think>so</think>b")]})[1] == answer("<think>so</think>b")
    assert messages({"messages": [user("<think> what is that?"), ANSWER]})[0] == user("<think> what is that?")


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \n", "\u3164", "\u2060\u00ad"])
def test_a_text_in_which_there_is_nothing_to_see_is_empty(text):
    assert problems({"messages": [USER, answer(text)]}) == [("empty_turn", "turn 2 (assistant) is empty")]
    assert messages({"messages": [USER, answer(text + "b")]})[1] == answer(text + "b")
    assert messages({"messages": [system(text), USER, ANSWER]}) == [USER, ANSWER]


@pytest.mark.parametrize(("turns", "fix"), [
    ([system("a"), system("b")], "join it with the first one"), ([user("a"), answer("b"), system("c"), user("d"), answer("e")], "move it to the front"),
    ([user("a"), answer("b"), user("thanks")], "leave the last turn out, or put the answer behind it; --on-uneven mend does so")])
def test_what_to_do_about_turns_out_of_place(turns, fix):
    with pytest.raises(RowError) as caught:
        read({"messages": turns})
    assert fix in [problem.fix for problem in caught.value.problems]


# --- what is wrong with rows

USER, ANSWER = user("a"), answer("b")
CALL = answer(tool_calls=[called("f", {}, "1")])
RESULT = {"role": "tool", "content": "7", "tool_call_id": "1"}


@pytest.mark.parametrize("row, found", [
    (7, [("not_an_object", "a row is a JSON object, this one is a number")]),
    ({"messages": []}, [("no_messages", "`messages` is an empty list, not a list of turns")]),
    ({"messages": "hi"}, [("no_messages", "`messages` is text, not a list of turns")]),
    ({"conversations": {}}, [("no_messages", "`conversations` is an object, not a list of turns")]),
    ({"messages": [USER]}, [("no_answer", "the conversation ends with `user`; there is no answer to learn")]),
    ({"messages": [ANSWER]}, [("alternation", "turn 1 is `assistant` where `user` is expected; roles alternate and begin with `user`")]),
    ({"messages": [USER, USER]}, [("alternation", "turn 2 is `user` where `assistant` is expected; roles alternate and begin with `user`"),
                                  ("no_answer", "the conversation ends with `user`; there is no answer to learn")]),
    ({"messages": [USER, ANSWER, ANSWER]}, [("alternation", "turn 3 is `assistant` where `user` is expected; roles alternate and begin with `user`")]),
    ({"messages": [USER, ANSWER, system("s"), USER, ANSWER]}, [("system_inside", "turn 3 is a system message; it can only be the first")]),
    ({"messages": [user(" "), {"role": "assistant"}]}, [("empty_turn", "turn 1 (user) is empty"), ("not_text", "the content of turn 2 is missing, not text")]),
    ({"messages": ["x", {"role": "bot", "content": ""}]}, [("not_an_object", "turn 1 is text, not an object"),
                                                          ("unknown_role", "turn 2 has the role 'bot'; known are system, user, assistant, tool")]),
    ({"instruction": ["a"], "input": {}, "output": None}, [("not_text", "`instruction` is a list, not text"), ("not_text", "`input` is an object, not text"),
                                                          ("not_text", "the content of turn 2 is missing, not text")]),
])
def test_all_problems_of_a_row(row, found):
    assert problems(row) == found


def test_problems_of_a_row_do_not_go_on_for_ever():
    assert len(problems({"messages": [user(" ")] * 1000})) == MOST_PROBLEMS


@pytest.mark.parametrize("turns, reason", [
    ([USER, RESULT, ANSWER], "turn 2 is the result of a tool that was not called before it"),
    ([USER, ANSWER, RESULT, ANSWER], "turn 3 is the result of a tool that was not called before it"),
    ([USER, answer('[Look Up(at=1), f(b="x")]'), RESULT, ANSWER],
     "turn 3 is the result of a tool that is called in the text before it, as Python calls functions: '[Look Up(at=1), f(b=\"x\")]'"),
    ([USER, answer("See [1](x)."), RESULT, ANSWER], "turn 3 is the result of a tool that was not called before it"),
    ([USER, CALL, user(' {"t": 20}'), ANSWER], "turn 3 is `user` and says JSON, as the result of the tool call in turn 2 would"),
    ([USER, CALL, user('[{"t": 20}]'), ANSWER], "turn 3 is `user` and says JSON, as the result of the tool call in turn 2 would"),
    ([USER, CALL, ANSWER], "turn 3 is `assistant` where the result of the tool call in turn 2 is expected"),
    ([USER, CALL, RESULT | {"tool_call_id": "2"}, ANSWER], "turn 3 answers the tool call '2', which turn 2 does not make"),
    ([USER, answer(tool_calls=[called("f", {}, "1"), called("g", {}, "2")]), RESULT, ANSWER], "the tool call '2' of turn 2 has no result"),
    ([user("a", tool_calls=CALL["tool_calls"]), ANSWER], "turn 1 is `user` and calls tools; only `assistant` can"),
    ([USER, answer("b", tool_responses=[{"name": "f", "response": 1}])], "turn 2 carries `tool_responses`"),
])
def test_order_of_tool_turns(turns, reason):
    found = problems({"messages": turns})
    assert found[0] == ("tool_order", reason)


@pytest.mark.parametrize("turns", [
    [USER, CALL], [USER, CALL, USER, ANSWER], [USER, CALL, user("{ and [ are brackets"), ANSWER],
    [USER, ANSWER, user("[1]"), ANSWER], [USER, CALL, RESULT, ANSWER], [USER, CALL, RESULT, CALL, RESULT, ANSWER, USER, ANSWER],
    [USER, answer("Let me see.", tool_calls=CALL["tool_calls"]), RESULT | {"content": ""}, ANSWER],
    [USER, answer(tool_calls=[called("f", {}), called("g", {})]), {"role": "tool", "content": "7"}, ANSWER],
    [USER, answer(tool_calls=[called("f", {}, "1"), called("g", {})]), RESULT, ANSWER],
])
def test_tool_turns_in_order(turns):
    assert [turn["role"] for turn in messages({"messages": turns})] == [turn["role"] for turn in turns]


def test_results_are_named_by_id_then_by_position():
    made = answer(tool_calls=[called("f", {}, "1"), called("g", {}, "2")])
    several = [USER, made, RESULT | {"tool_call_id": "2"}, RESULT, ANSWER, USER, made,
               {"role": "tool", "content": "x"}, {"role": "tool", "content": "y", "name": "own"}, {"role": "tool", "content": "z"}, ANSWER]
    assert [turn.get("name") for turn in messages({"messages": several}) if turn["role"] == "tool"] == ["f", "g", "f", "own", None]


def test_ollama_names_the_tool_of_a_result():
    made = answer(tool_calls=[called("f", {}), called("g", {})])
    turns = [user("a"), made, *({"role": "tool", "tool_name": name, "content": name.upper()} for name in "gf"), answer("b")]
    example = read({"messages": turns})
    assert [(turn["name"], turn["content"]) for turn in example.messages[2:4]] == [("g", "G"), ("f", "F")] and not example.unread
    turns[2]["name"] = "f"
    example = read({"messages": turns})
    assert example.messages[2]["name"] == "f" and [one.name for one in example.unread] == ["tool_name"]


def test_what_a_tool_returns_may_be_an_object():
    assert messages({"messages": [USER, CALL, RESULT | {"content": {"é": 1}}, ANSWER]})[2]["content"] == '{"é": 1}'


@pytest.mark.parametrize("arguments, code", [
    ('{"a": 1', "tool_arguments"), ("[1]", "tool_arguments"), ([1], "tool_arguments"), ("7", "tool_arguments"), ("NaN", "tool_arguments"),
    ('{"a": NaN}', "tool_arguments"), ('{"a": 1e999}', "tool_arguments"), ('{"a": ' + "9" * 5000 + "}", "tool_arguments"),
    ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "tool_arguments"), ('{"a":' * 100_000, "tool_arguments"),
    ('{"a": ' + "[" * 120 + "]" * 120 + "}", "tool_arguments"), ({"a": float("inf")}, "tool_arguments"), ({"a": b"x"}, "tool_arguments"),
    ({"a": "\ud800"}, "broken_text"), ({"\ufffd": 1}, "broken_text"), ('{"a": "\\ud800"}', "broken_text"), (False, "tool_arguments")])
def test_arguments_that_are_not_json(arguments, code):
    [(found, reason)] = problems({"messages": [USER, answer(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])]})
    assert found == code and "tool call 1 of turn 2" in reason


def test_a_damaged_name_of_a_tool():
    assert codes({"messages": [USER, answer(tool_calls=[{"name": "f\ud800"}])]}) == ["broken_text"]


@pytest.mark.parametrize("arguments", ["", " ", None, {}, "{}"])
def test_calls_without_arguments(arguments):
    turn = answer(tool_calls=[{"id": 7, "function": {"name": " f ", "arguments": arguments}}, {"name": "g"},
                              {"name": "h", "parameters": {"x": 1}}])
    assert messages({"messages": [USER, turn]})[1]["tool_calls"] == [called("f", {}, "7"), called("g", {}), called("h", {"x": 1})]


@pytest.mark.parametrize("made", [[{"id": 1}], ["f"], [{"function": {"name": ""}}], [{"function": {"name": 7}}], 7, True, [None], [[]],
                                  [{"type": "custom", "custom": {"name": "f", "input": "x"}}]])
def test_calls_that_call_nothing(made):
    assert codes({"messages": [USER, answer(tool_calls=made)]}) == ["tool_calls"]


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]", {}])
def test_rows_without_tools(tools):
    assert read({"messages": [USER, ANSWER], "tools": tools}).tools is None


@pytest.mark.parametrize("tools", [
    [WEATHER], WEATHER, [WEATHER["function"]], [WEATHER["function"] | {"type": "function"}], json.dumps([WEATHER]), [json.dumps(WEATHER)],
    [{"type": "function", "function": WEATHER["function"] | {"parameters": json.dumps(WEATHER["function"]["parameters"])}}]])
def test_ways_to_declare_tools(tools):
    assert read({"messages": [USER, ANSWER], "tools": tools}).tools == [WEATHER]


@pytest.mark.parametrize("tools", ["hammer", "[1", 7, [7], [{}], [{"name": 3}], [{"name": "f", "parameters": []}], ["x"], True,
                                   [{"name": "f", "parameters": "{"}], [{"name": "\ud800"}], [{"name": "f", "strict": float("nan")}]])
def test_tools_that_declare_nothing(tools):
    assert codes({"messages": [USER, ANSWER], "tools": tools}) == ["tools"]


def test_problems_travel_between_processes():
    with pytest.raises(RowError) as caught:
        Formats().example({"messages": [USER, USER]})
    copied = copy.copy(caught.value)  # by the protocol by which a worker process hands it back
    assert type(copied) is RowError and copied.problems == caught.value.problems and str(copied) == str(caught.value)


# --- any row at all

NAMES = ("messages conversations conversation chat system tools functions instruction input output context response history prompt "
        "completion text chosen rejected preferred_output non_preferred_output label question answer images image pictures role from content value "
        "tool_calls function_call function name arguments id tool_call_id weight train reasoning type")
KEYS = NAMES.split()
texts = st.one_of(st.sampled_from(["hi", "", " ", "\ud800", "{}", "[]", "[{\"role\": 1}]", "{\"name\": \"f\"}", "USER: a\n\nASSISTANT: b",
                                   "USER: a ASSISTANT: <functioncall> {\"name\": \"f\", \"arguments\": '{}'}", "SYSTEM: x - {\"name\": \"f\"}",
                                   "\n\nHuman: a\n\nAssistant: b", "function_call", "user", "assistant", "tool", "text"]), st.text(max_size=6))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | texts, inner, max_size=4),
                      max_leaves=12)
tool_calls = st.lists(st.fixed_dictionaries({}, optional={"id": scalars, "name": texts, "arguments": values,
                                                          "function": st.fixed_dictionaries({"name": texts, "arguments": values})}), max_size=2)
turns = st.fixed_dictionaries({}, optional={
    "role": st.sampled_from(["system", "user", "assistant", "tool", "function_call"]), "from": st.sampled_from(["human", "gpt", "function_call"]),
    "content": st.text(min_size=1, max_size=4) | values, "value": texts, "tool_calls": tool_calls | values, "tool_call_id": scalars,
    "name": scalars, "weight": scalars, "train": scalars, "reasoning_content": scalars})
alternating = st.builds(lambda pairs: [turn for q, a in pairs for turn in (user(q), answer(a))],
                        st.lists(st.tuples(st.text(min_size=1, max_size=4), st.text(min_size=1, max_size=4)), max_size=3))
lists = st.lists(turns, max_size=4) | alternating
rows = st.one_of(values, st.dictionaries(st.sampled_from(KEYS), values | lists, max_size=6),
                 st.builds(lambda key, found, more: more | {key: found}, st.sampled_from(["messages", "conversations", "prompt", "chosen"]),
                           lists, st.dictionaries(st.sampled_from(KEYS), values, max_size=3)))
ways = st.builds(Formats, st.none() | st.sampled_from(config.FORMATS), st.just({"user": "question", "assistant": "answer"}) | st.just({}) |
                 st.just(QA), st.sampled_from([None, "chosen"])).filter(lambda f: f.name != "columns" or f.columns)


@same_examples
@given(row=rows, formats=ways)
def test_any_row_is_an_example_or_an_error(row, formats):
    as_it_was = repr(row)
    try:
        example = formats.example(row)
    except RowError as e:
        assert 1 <= len(e.problems) <= MOST_PROBLEMS
        return
    finally:
        assert repr(row) == as_it_was
    assert example.format in config.FORMATS and (example.text is None) != (example.messages is None)
    json.dumps([example.messages, example.tools], ensure_ascii=False, allow_nan=False).encode()
    if example.messages is None:
        return
    roles = [turn["role"] for turn in example.messages]
    assert roles[-1] == "assistant" and roles[0] in ("system", "user") and "system" not in roles[1:]
    for before, turn in zip([None, *example.messages], example.messages):
        assert set(turn) <= {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "train"}
        assert isinstance(turn["content"], str)
        assert turn["content"].strip() or turn["role"] == "tool" or turn["tool_calls"]
        assert turn.get("train", False) is False and all(isinstance(c["function"]["arguments"], dict) for c in turn.get("tool_calls", ()))
        role = before["role"] if before else None
        assert turn["role"] in {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "tool": ("tool", "assistant"),
                                "assistant": ("tool", "user") if "tool_calls" in (before or {}) else ("user",)}[role]
    assert any("train" not in turn for turn in example.messages if turn["role"] == "assistant")


@same_examples
@given(found=lists, key=st.sampled_from(["messages", "conversations"]))
def test_nothing_of_an_answer_is_lost(found, key):
    try:
        read_turns = Formats().example({key: found}).messages
    except RowError:
        return
    joined = [n for n, turn in enumerate(found) if n and "function_call" in (turn.get("role"), turn.get("from"))
              and (found[n - 1].get("role") or found[n - 1].get("from")) in ("assistant", "gpt")]
    found = [turn for n, turn in enumerate(found) if n + 1 not in joined]
    assert len(read_turns) == len(found)
    for before, after in zip(found, read_turns):
        said = before.get("content") if before.get("content") is not None else before.get("value")
        if isinstance(said, str) and "function_call" not in (before.get("role"), before.get("from")):
            assert after["content"] == said
        if after["role"] == "assistant":
            assert len(after.get("tool_calls", ())) == len(before.get("tool_calls") or ()) or "function_call" in (before.get("role"), before.get("from"))
            reasoning = before.get("reasoning_content")
            assert after.get("reasoning_content", "") == (reasoning if isinstance(reasoning, str) and reasoning.strip() else "")


def test_rows_that_an_entry_describes_share_what_reads_them(monkeypatch):
    entry = Description("mine", Path("dataset_info.json"), "alpaca", (("prompt", "q"), ("response", "a")), ())
    text = replace(entry, columns=(("prompt", "q"),))
    reader, made = Formats(), []
    monkeypatch.setattr(formats, "Formats", lambda *args, **named: made.append(args) or Formats(*args, **named))
    for n in range(5):
        row = Row("rows.jsonl", n, {"q": "Sky?", "a": "Blue."}, described=entry)
        assert reader.example_of(row).messages == [user("Sky?"), answer("Blue.")]
        assert reader.example_of(replace(row, described=text)).text == "Sky?"
    assert len(made) == 2
