"""Tools and reasoning in a TEMPLATE, as Go renders it, beside Transformers' own rendering of the Jinja template."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from gemma_tune.encoding.thinking import ended, settled, with_thinking
from gemma_tune.ollama import go_template
from gemma_tune.ollama.capabilities import tell_capabilities
from gemma_tune.ollama.client import Server, create_model
from gemma_tune.ollama.go_text import go_json
from gemma_tune.ollama.kept import NOTE, is_kept, kept
from gemma_tune.ollama.template import OllamaChat, about_tools, chat_for
from support.listener import Said
from support.ollama import LoopbackOllama
from support.templates import SMOLLM2, TOOLS, assistant, call, result, system, trl_template, user


def hugging_face(template: str, messages: list[dict], tools: list[dict] | None = None, **more: bool) -> str:
    [text], _ = render_jinja_template([messages], tools=tools, chat_template=template, add_generation_prompt=True,
                                      bos_token="<bos>", **more)
    return text.removeprefix("<bos>")


def tool(name: str, description: str, properties: dict, required: list[str]) -> dict:
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


MANY = [
    *TOOLS,
    tool("today", "", {}, []) | {"function": {"name": "today", "parameters": {"type": "object", "properties": {}}}},
    tool("plan", 'Plans <b>&amp;</b> "trips",\nas {said}: [here].', {
        "days": {"type": "array", "items": {"type": "integer"}, "description": "用数字。"},
        "how": {"type": ["string", "null"], "enum": ["by train", "par avion\u2028"]}}, ["days", "how"]),
]
LONG = call("plan", days=[1, 2, 3], how='<a href="x">\\ & 巴黎</a>', more={"a": {"b": [None, True, 1.5, "{}, []: "]}})
ONE_CALL = [user("Weather in Paris?"), call("weather", city="Paris"), result('{"c": 22, "sky": "<clear>"}')]
SEVERAL = call("weather", city="Paris")
SEVERAL["tool_calls"] += call("today")["tool_calls"]
CHATS = {
    "tools": [user(" Hi {{ a }}\n")],
    "system": [system("Be brief.\n\n简短。"), user("Hi"), assistant("Hello."), user("Well?")],
    "empty system": [system(""), user("Hi")],
    "a call": ONE_CALL,
    "its answer": [system("S"), *ONE_CALL, assistant("22 °C."), user("And tomorrow?"), LONG, result("rain")],
    "two results": [user("Both?"), SEVERAL, result("22"), result("Friday"), assistant("Done."), user("Thanks")],
    "call after call": [*ONE_CALL, call("today"), result("")],
}
WITH_TEXT = {"text and a call": [user("Weather?"), call("weather", "I look.", city="X"), result("1")]}


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}CALLS<|im_end|>\n{% endfor %}ASK"
LISTED = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chatml(calls: str, listed: str = LISTED) -> str:
    each = "{% for c in m.tool_calls or [] %}" + calls + "{% endfor %}"
    return listed + CHATML.replace("CALLS", each).replace("ASK", ASK)


AFTER_A_RESULT = "{% if messages[-1].role == 'tool' %}!{% endif %}"
CALLS = '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>'
# Functions alone, a level of JSON on each line, before a system message; and a call between braces of its own.
BARE = chatml(CALLS, "{% if tools %}<|im_start|>tools\n{% for t in tools %}{{ t.function | tojson(indent=2) }}"
                     "{% if not loop.last %};\n{% endif %}{% endfor %}<|im_end|>\n{% endif %}")
BRACED = chatml("{% raw %}{{% endraw %}{{ c.function.name }}: {{ c.function.arguments | tojson }}}")


@pytest.mark.parametrize(("template", "chats", "refuses"), [
    *((trl_template(name), CHATS | WITH_TEXT, ()) for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl")),
    (trl_template("llama3_1"), CHATS, ("two results",)), (BARE, CHATS | WITH_TEXT, ()), (BRACED, CHATS | WITH_TEXT, ()),
], ids=["qwen 2.5", "qwen 3", "qwen 3 2507", "qwen 3 vl", "llama 3.1", "bare", "braced"])
def test_go_renders_tools_as_transformers_does(template, chats, refuses, go_cache):
    chat = chat_for(template)
    assert "tools" in chat.capabilities and about_tools(chat, 3) == NOTE
    asked = [(case, messages, tools) for case, messages in chats.items() if case not in refuses
             for tools in (MANY, TOOLS, None)]
    got = go_template.render(chat.template, [m for _, m, _ in asked], chat.default_system, tools=[t for *_, t in asked])
    for (case, messages, tools), text in zip(asked, got, strict=True):
        assert is_kept(messages, tools), case
        assert text == hugging_face(template, messages, tools), (case, tools)


@pytest.mark.parametrize("indent", [None, 4])
def test_go_writes_json_as_python_does(indent, go_cache):
    """Every sign that JSON has a form for, and texts longer than what is looked at together."""
    values = ["", {}, [], [[]], {"a": {}}, "<>&\u2028\u2029\x00\x1f\x7f\b\f\n\r\t\"\\/\\u003c",
              "中文，" * 30 + "é🙂" * 20, {"x": [1, -2.5, None, True, {"y": ["a, b: {c}", ["d"]]}]}, "w " * 60 + "\\" * 7 + '"']
    template = go_json("j", indent) + '\n{{- range .Messages }}{{ template "j" .Content }}{{ end }}'
    compact = [json.dumps(v, ensure_ascii=False, separators=(",", ":")).translate(
        {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}) for v in values]
    got = go_template.render(template, [[user(text)] for text in compact])
    assert got == [json.dumps(v, ensure_ascii=False, indent=indent) for v in values]


def test_what_ollama_changes_in_tools_is_known(go_cache):
    """Keys in an order of their own, ones that its API does not know, numbers that are whole."""
    strange = [{"type": "function", "function": {"parameters": {"required": ["z"], "properties": {
        "z": {"description": "last", "type": "number", "default": 1, "minimum": 0},
        "a": {"enum": ["x"], "type": ["string"]},
        "o": {"type": "object", "properties": {"q": {"title": "Q", "type": "string"}}}},
        "type": "object", "additionalProperties": False}, "name": "f", "strict": True}},
        tool("g", "", {}, []) | {"function": {"name": "g", "description": "", "parameters": {"type": "object"}}}]
    messages = [user("q"), call("f", z=2.0, a={"y": 1, "b": [{"d": 1, "c": 2}]}), result("r")]
    template = trl_template("qwen3")
    chat = chat_for(template)
    [text] = go_template.render(chat.template, [messages], tools=[strange])
    assert not is_kept(messages, strange) and text != hugging_face(template, messages, strange)
    assert text == hugging_face(template, *kept(messages, strange))
    assert is_kept(*kept(messages, strange))


# --- reasoning

REASONED = [
    [user("a"), assistant("b", reasoning_content="Earlier."), user("c")],
    [user("a"), call("weather", reasoning="Let me\n\nlook.", city="X"), result("1")],
    [user("a"), call("weather", "I look.", reasoning="\nHm.\n", city="X"), result("1"), call("today", reasoning="So."),
     result("2")],
    [user("a"), call("weather", reasoning="Gone.", city="X"), result("1"), assistant("b", reasoning_content="Too."),
     user("c")],
]


@pytest.mark.parametrize(("think", "said"), [
    (None, {}), (True, {"enable_thinking": True}), (False, {"enable_thinking": False})])
def test_reasoning_is_kept_where_the_template_keeps_it_and_a_request_chooses(think, said, go_cache):
    template = trl_template("qwen3")
    chat = chat_for(template)
    assert chat.capabilities == {"tools", "thinking"} and chat.notes == ()
    got = go_template.render(chat.template, REASONED, tools=[TOOLS] * len(REASONED), think=think)
    assert got == [hugging_face(template, messages, TOOLS, **said) for messages in REASONED]
    assert "Let me\n\nlook." in got[1] and not any("Earlier." in text or "Gone." in text for text in got)


@pytest.mark.parametrize(("name", "switches"), [
    ("qwen3_6", True), ("qwen3_5_think_training", True), ("qwen3_8", False), ("lfm2_2_5", False)])
def test_reasoning_has_its_place_also_where_tools_have_none(name, switches, go_cache):
    """In every turn, below the last question, or an empty one where there is none."""
    template = trl_template(name)
    chat = chat_for(template)
    assert chat.capabilities == {"thinking"} and ("turn thinking off" in "".join(chat.notes)) == (name == "qwen3_8")
    chats = [REASONED[0], [system("S"), user("a"), assistant("b"), user("c")], [user("a")]]
    for think in (None, False) if switches else (None,):
        said = {} if think is None else {"enable_thinking": think}
        got = go_template.render(chat.template, chats, think=think)
        assert got == [hugging_face(template, messages, **said) for messages in chats]


def test_a_model_that_begins_its_thoughts_itself_has_marks_by_which_they_are_found(go_cache):
    """DeepSeek R1's later template takes thoughts out of earlier answers, and asks for none."""
    template = trl_template("deepseek_r1_distill").replace("<｜Assistant｜><think>\\n'}}", "<｜Assistant｜>'}}")
    chat = chat_for(template)
    assert chat.capabilities == {"thinking"}
    talk = [user("a"), {**assistant("b"), "reasoning_content": "hm"}, user("d")]
    [text] = go_template.render(chat.template, [talk])
    assert text == hugging_face(template, talk) and text.endswith("<｜User｜>d<｜Assistant｜>") and "hm" not in text


def test_a_prompt_that_begins_to_think_has_marks_by_which_the_end_is_found(go_cache):
    template = trl_template("deepseek_r1_distill")
    chat = chat_for(template)
    assert chat.capabilities == {"thinking"}
    [text] = go_template.render(chat.template, [REASONED[0]])
    assert text == hugging_face(template, REASONED[0]) and text.endswith("<think>\n")


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_prompts_of_models_that_always_think_say_what_training_chose(thinking, opens, go_cache):
    template = trl_template("deepseek_r1_distill")
    template = template if opens else template.replace("<｜Assistant｜><think>\\n'}}", "<｜Assistant｜>'}}")
    chosen = ended(template, thinking, hugging_face(template, [user("a")]), True)
    chat = chat_for(chosen)
    assert chat.capabilities == ({"thinking"} if thinking == "on" else set())
    assert chat.think == (None if thinking == "on" else False) and settled(chosen, chat.think) == chosen
    for talk in ([user("a")], [user("a"), assistant("b"), user("d")]):
        [text] = go_template.render(chat.template, [talk])
        assert text == hugging_face(chosen, talk) and text.endswith("<think>\n" if thinking == "on" else "<think>\n\n</think>\n\n")


def test_a_system_message_between_turns(go_cache):
    """Llama 3.1 has its dates in the first one alone."""
    template = trl_template("llama3_1")
    chats = [[*first, user("a"), assistant("b"), system("Now in French."), user("c")] for first in ([system("S")], [])]
    got = go_template.render(chat_for(template).template, chats)
    assert got == [hugging_face(template, messages) for messages in chats]


@pytest.mark.parametrize(("choice", "capabilities"), [("on", {"tools", "thinking"}), ("off", {"tools"})])
def test_what_training_chose_stands_whatever_a_request_says(choice, capabilities, go_cache):
    template = with_thinking(trl_template("qwen3"), choice)
    chat = chat_for(template)
    assert chat.capabilities == capabilities and chat.notes == ()
    for think in (True, False):
        assert go_template.render(chat.template, [[user("a")]], think=think) == [hugging_face(template, [user("a")])]


# --- what Ollama reads in a TEMPLATE


@pytest.mark.parametrize(("name", "tag"), [("qwen2_5", "<tool_call>"), ("qwen3", "<tool_call>"), ("llama3_1", "")])
def test_the_words_by_which_ollama_finds_calls_stand_where_it_looks(name, tag):
    """`tools/template.go`: the first text inside the first `if` on `.ToolCalls`, as far as a brace."""
    template = chat_for(trl_template(name)).template
    asks = r"\{\{ (?:else )?if ([^}]*\.ToolCalls[^}]*) \}\}(?:\{\{ range [^}]*\}\})?([^{]*)"
    [(condition, first)] = re.findall(asks, template)
    assert (condition, first.strip()) == (".ToolCalls", tag)
    assert 'eq .Role "tool"' in template, "else an Ollama from 0.31 on takes the template in the GGUF instead"


def test_the_words_by_which_ollama_finds_reasoning_stand_where_it_looks():
    """`thinking/template.go`: the texts at both ends of the branch in which the last `.Thinking` is."""
    template = chat_for(trl_template("qwen3")).template
    inner = re.search(r"\{\{ if and \.Thinking [^}]*\}\}(.*?)\{\{[^{}]*\.Thinking \}\}(.*?)\{\{ end \}\}", template, re.S)
    assert [text.strip() for text in inner.groups()] == ["<think>", "</think>"]


# --- templates whose tools have no place

@pytest.mark.parametrize(("template", "why"), [
    (chatml(CALLS), ""),
    (chatml(CALLS, listed=""), "the template knows no tools"),
    (chatml(CALLS, LISTED.replace("tools | tojson", "tools | map(attribute='function.name') | list")), "tools as JSON"),
    (chatml(CALLS.replace('"name"', '"id": "{{ c.id }}", "name"')), "the ids of calls"),
    (chatml("{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %})"),
     "a name and JSON after it"),
    (chatml(CALLS).replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}"), "names of functions beside"),
    (chatml(CALLS) + AFTER_A_RESULT, "asked for in another way"),
    (chatml(CALLS).replace(ASK, AFTER_A_RESULT + ASK), "a conversation with tools comes out differently"),
    (trl_template("qwen3_6"), "a name and JSON after it"),
    (SMOLLM2, "the template knows no tools"),
])
def test_why_tools_have_no_place(template, why):
    chat = chat_for(template)
    assert why in chat.tools_missing and bool(why) == bool(chat.tools_missing), chat.tools_missing
    assert ("tools" in chat.capabilities) == (not why)
    if why:
        told = about_tools(chat, 2)
        assert told.startswith("2 rows have tools, and the TEMPLATE for Ollama has no place for them yet (")
        assert chat.tools_missing in told and "llama-server --jinja" in told
    assert about_tools(chat, 0) is None


# --- what a server says

PLAIN, TOOLED = OllamaChat("{{ .Messages }}", ()), OllamaChat("{{ .Messages }}{{ .Tools }}", ())
READ = OllamaChat("{{ .Messages }}", (), gguf_capabilities=frozenset({"tools"}))


@pytest.mark.parametrize(("made", "promised", "warned", "noted"), [
    (PLAIN, PLAIN, "", ""), (TOOLED, TOOLED, "", ""),
    (PLAIN, TOOLED, "does not list tools for m, for which its TEMPLATE has a place", ""),
    (TOOLED, READ, "", "it lays chats out with the chat template in the GGUF"),
    (TOOLED, PLAIN, "lists tools for m, which its template does not know", ""),
])
def test_a_server_lists_what_the_template_promises(made, promised, warned, noted, tmp_path: Path):
    gguf, said = tmp_path / "m.gguf", Said()
    gguf.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16))
    with LoopbackOllama() as running:
        server = Server(running.url, running.version)
        create_model(server, "m", gguf, made, {})
        tell_capabilities(server, "m", promised, said)
    assert [warned in text for text in said.warnings] == [True] * bool(warned)
    assert [noted in text for text in said.notes] == [True] * bool(noted)


def test_a_number_that_is_none_of_gos_stays_as_it_is():
    turns = [call("f", a=10 ** 400, b=2 ** 70, c=1.0)]
    [turn], _ = kept(turns, None)
    assert turn["tool_calls"][0]["function"]["arguments"] == {"a": 10 ** 400, "b": 2 ** 70, "c": 1}
    assert not is_kept(turns, None)
