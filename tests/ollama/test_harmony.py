"""GPT-OSS's TEMPLATE for Ollama, rendered by Go itself beside the model's own template."""

from __future__ import annotations

import datetime

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.ollama import go_template
from gemma_tune.ollama.probe import talk
from gemma_tune.ollama.template import chat_for
from support.templates import TOOLS, assistant, call, gpt_oss_tokenizer, result, trl_template, user

CALLED = [user("q"), call("weather", reasoning="r 1", city="Röm <b>"), result('sun "x"\n')]
MANY_TYPES = [{"type": "function", "function": {"name": "many", "description": "All kinds.", "parameters": {
    "type": "object", "required": ["a"], "properties": {
        "a": {"type": "integer", "description": "One {{ a }}."}, "b": {"type": ["string", "null"]}, "c": {"type": "boolean"},
        "d": {"type": "array", "items": {"type": "string"}}, "e": {"type": "array"}, "f": {"type": "string", "enum": ["x", "y"]},
        "g": {"type": "object"}, "h": {}, "i": {"type": "array", "items": {"type": "object"}},
        "j": {"type": "object", "properties": {"k": {"type": "number"}, "l": {"type": "object", "properties": {"m": {"type": "string"}}}}},
        "n": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}, "o": {"type": "array", "items": {
            "type": "object", "properties": {"long": {"type": "string"}, "longer": {"type": "string"}}}}}}}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(("messages", "tools"), [
    (talk("hi"), None), (talk("hi", system="S"), None), (talk(" a\n", "é {{ b }}", "c", "d", "e", system="S\n\nT"), None),
    (talk("x", system=""), None), (talk("hi"), TOOLS), (talk("hi", system="S"), MANY_TYPES),
    (CALLED, TOOLS), ([*CALLED, call("weather", "I look again.", city="Rome"), result("1")], TOOLS), (CALLED, None),
    ([*CALLED, assistant("It is.", reasoning_content="r 2"), user("and?"), call("weather", reasoning="r 3", city="x"), result("1")], TOOLS)])
def test_go_renders_gpt_oss_as_hugging_face_does(messages, tools, go_cache):
    chat = chat_for(trl_template("gptoss"))
    theirs = ChatFormat(gpt_oss_tokenizer(), "gpt_oss").render(messages, prompt=True, tools=tools)
    assert go_template.render(chat.template, [messages], chat.default_system, tools=[tools]) == [theirs]
    assert (chat.family, chat.stops, chat.notes) == ("harmony", ("<|return|>", "<|call|>"), ())
    assert chat.capabilities == {"tools", "thinking"} and not chat.tools_missing


def test_a_request_to_gpt_oss_says_how_much_it_thinks_and_can_begin_the_answer(go_cache):
    template = chat_for(trl_template("gptoss")).template
    plain, high, told = (go_template.render(template, [[user("q")]], think=think)[0] for think in (None, "high", True))
    assert plain == told and high == plain.replace("Reasoning: medium", "Reasoning: high") != plain
    begun = plain + "<|channel|>{}<|message|>"
    assert go_template.render(template, [[user("q"), assistant("a")], [user("q"), assistant("", reasoning_content="r")]]) == [
        begun.format("final") + "a", begun.format("analysis") + "r"], "as Ollama's parser expects it"
    assert go_template.render(template, [[user("q"), assistant("")]]) == [plain], "nothing is begun there"


def test_the_day_of_gpt_oss_is_that_of_the_request():
    day = datetime.date.today().isoformat()
    assert day not in chat_for(trl_template("gptoss")).template
    fixed = chat_for(trl_template("gptoss").replace('strftime_now("%Y-%m-%d")', '"2025-06-28"'))
    assert "Current date: 2025-06-28\n" in fixed.template and fixed.family == "harmony" and not fixed.notes


@pytest.mark.parametrize("change", [("<|end|>\" }}\n            {%- set last", "<|return|>\" }}\n            {%- set last"), ("# Instructions", "# Told"),
                                    ('{{- tool_call.arguments|tojson }}', '{{- "no" }}'), ("any;", "void;")])
def test_what_is_laid_out_otherwise_than_gpt_oss_gets_no_such_template(change):
    assert change[0] in trl_template("gptoss")
    try:
        assert chat_for(trl_template("gptoss").replace(*change)).family == "other"
    except UserError as refused:
        assert "cannot be turned into an Ollama TEMPLATE" in refused.message
