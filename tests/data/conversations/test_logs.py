"""Requests and answers of models' interfaces, as logs and batches have them."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.command import write_rows
from support.rows import answer, user

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
ASKED = [user("Hi"), answer("Hello"), user("Sky?")]
READ = [user("Hi"), answer("Hello", train=False), user("Sky?"), answer("Blue.")]
REQUEST = {"model": "m", "messages": ASKED}


def said(content="Blue.", stopped="stop", **more):
    return {"choices": [{"index": 0, "message": answer(content, **more), "finish_reason": stopped}]}


CLAUDE = {"id": "x", "type": "message", "role": "assistant", "content": [{"type": "text", "text": "Blue."}], "stop_reason": "end_turn"}


@pytest.mark.parametrize(("row", "unread"), [
    ({"messages": ASKED, "response": said(), "call_type": "completion"}, ["call_type"]),
    ({"request": REQUEST, "response": said()}, ["request.model"]),
    ({"request": {"body": REQUEST}, "response": {"status_code": 200, "body": said() | {"id": "x"}}}, ["request.model", "response.id"]),
    ({"custom_id": "1", "body": REQUEST, "response": {"body": said()}}, ["custom_id", "body.model"]),
    ({"input": REQUEST, "output": answer("Blue.")}, ["input.model"]), ({"input": ASKED, "output": said()}, []),
    ({"inputs": {"messages": ASKED}, "outputs": said(refusal=None)}, []),
    ({"request": {"messages": ASKED}, "response": CLAUDE}, ["response.id", "response.type", "response.stop_reason"])])
def test_the_answer_is_learned_and_the_request_is_its_prompt(row, unread):
    example = Formats().example(row)
    assert example.messages == READ and [one.name for one in example.unread] == unread


def test_the_tools_and_the_system_prompt_of_a_request():
    called = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    row = {"request": {"messages": [user("Sky?")], "system": "Be brief.", "tools": TOOLS}, "response": said(None, "tool_calls", tool_calls=[called])}
    example = Formats().example(row)
    assert example.tools == TOOLS and example.unread == () and example.messages == [
        {"role": "system", "content": "Be brief."}, user("Sky?"),
        answer(tool_calls=[called | {"function": {"name": "look", "arguments": {}}}])]


def test_columns_beside_a_request_that_has_the_same_are_said_to_be_left_out():
    row = {"request": {"messages": ASKED, "system": "s", "tools": TOOLS}, "response": said(), "tools": TOOLS, "prompt": "v2", "system": "t"}
    example = Formats().example(row)
    assert example.messages == [{"role": "system", "content": "s"}, *READ] and example.tools == TOOLS
    assert [(one.name, one.value) for one in example.unread] == [("system (beside request)", "t"), ("prompt (beside request)", "v2")]


@pytest.mark.parametrize(("row", "reason"), [
    ({"messages": ASKED, "response": said(stopped="length")}, "the answer in `response` stopped before its end, for 'length'"),
    ({"request": REQUEST, "response": CLAUDE | {"stop_reason": "max_tokens"}}, "before its end, for 'max_tokens'"),
    ({"request": REQUEST, "response": {"choices": said()["choices"] * 2}}, "`response` holds 2 answers"),
    ({"request": REQUEST, "response": None}, "`request` has no answer"), ({"messages": ASKED, "response": "x"}, "ends with `user`"),
    ({"request": REQUEST, "response": said(" ")}, "turn 4 (assistant) is empty")])
def test_what_is_no_whole_answer_is_refused(row, reason):
    with pytest.raises(RowError) as caught:
        Formats().example(row)
    assert reason in caught.value.problems[0].reason


@pytest.mark.parametrize("response", [said("Red."), "x", None])
def test_a_conversation_that_has_its_answer_already_is_what_it_is(response):
    example = Formats().example({"messages": [*ASKED, answer("Blue.")], "response": response})
    assert example.format == "messages" and example.messages[-1] == answer("Blue.")


@pytest.mark.parametrize("output", ["Blue.", answer("Blue."), [answer("Blue.")], said()])
def test_empty_columns_of_other_rows_take_no_answer_away(output):
    """As tables have them whose rows are of several kinds."""
    assert Formats().example({"input": ASKED, "output": output, "request": None, "response": None}).messages == READ


@pytest.mark.parametrize("beside", [{"choices": 3}, {"choices": {"a": {}}}, {"choices": [{"text": "x"}]}, {"message": "Red."}])
def test_a_message_with_what_looks_like_an_answer_of_openai_is_itself(beside):
    example = Formats().example({"request": {"messages": ASKED}, "response": answer("Blue.", **beside)})
    assert example.messages == READ


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_both_halves_of_a_batch_are_told_with_a_command_that_works(tmp_path):
    asked = [{"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": REQUEST} for name in "ab"]
    results = [{"id": "r", "custom_id": "b", "response": {"status_code": 200, "body": said()}, "error": None}]
    write_rows(tmp_path / "INPUT.jsonl", asked)
    write_rows(tmp_path / "OUTPUT.jsonl", results)
    commands = set()
    for row in (asked[0], results[0]):
        with pytest.raises(RowError, match="half of a batch") as caught:
            Formats().example(row)
        commands.add(caught.value.fix.partition("with ")[2])
    [command] = commands
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True)
    failed, good = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert Formats().example(good).messages == READ
    with pytest.raises(RowError, match="`request` has no answer"):
        Formats().example(failed)


def test_runs_and_data_sets_of_langsmith():
    sky = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue."}]
    run = Formats().example({"run_type": "llm", "inputs": {"messages": sky[:1]}, "outputs": {"messages": sky[1:]}})
    assert run.messages == sky and not run.usual
    example = Formats().example({"inputs": {"question": "Sky?"}, "outputs": {"output": "Blue."}, "metadata": {}})
    assert example.messages == sky and example.usual == ("inputs.question", "outputs.output")
    for inputs, outputs in (({"a": "b", "c": "d"}, {"e": "f"}), ({"a": "b"}, {"e": ["f"]}), ({}, {}), ("a", "b")):
        with pytest.raises(RowError):
            Formats().example({"inputs": inputs, "outputs": outputs})
    with pytest.raises(RowError):
        Formats().example({"inputs": {"messages": sky[:1]}, "outputs": {"messages": [*sky[1:], sky[1]]}})


def test_the_system_prompt_of_bedrock():
    row = {"system": [{"text": "Be"}, {"text": "brief."}], "messages": [{"role": "user", "content": [{"text": "Sky?"}]},
                                                                        {"role": "assistant", "content": [{"text": "Blue."}]}]}
    assert [turn["content"] for turn in Formats().example(row).messages] == ["Be\nbrief.", "Sky?", "Blue."]
