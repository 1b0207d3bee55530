"""Tool calls as Python calls functions, with the functions in the system prompt (ToolACE) or in the row (LFM2)."""

import json
from dataclasses import replace

import pytest

from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.encoding.chat_format import ChatFormat
from support.command import write_rows
from support.rows import answer, user
from support.templates import CHATML, GEMMA_4, LLAMA_3_1, byte_tokenizer, gemma_tokenizer, learned, trl_template

TOOLS = [{"name": "Market Trends API", "description": "Trends [1].", "parameters": {
    "type": "dict", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}}, {"name": "newAddress", "parameters": {}},
    {"name": "new", "description": "Begins as another one does."}]
ROLE = ("You are an expert in composing functions. You are given a question and a set of possible functions.\n"
        "If none of the function can be used, point it out.")
TOLD = (f"{ROLE}\nYou should only return the function call in tools call sections.\nHere is a list of functions in JSON format that you can "
        f"invoke:\n{json.dumps(TOOLS)}. \nShould you decide to return the function call(s). \nPut it in the format of "
        "[func1(params_name=params_value, params_name2=params_value2...), func2(params)]\n\nNO other text MUST be included. \n")
LLAMA = (f"{ROLE}\nIf you decide to invoke any of the function(s), you MUST put it in the format of [func_name1(params_name1=params_value1, "
         "params_name2=params_value2...), func_name2(params)]\nYou SHOULD NOT include any other text in the response.\n\n"
         f"Here is a list of functions in JSON format that you can invoke.\n\n{json.dumps(TOOLS, indent=2)}\n")
ASKED = {"from": "user", "value": "Q?"}


def system(text):
    return {"role": "system", "content": text}


def said(text, who="assistant"):
    return {"from": who, "value": text}


def read(*turns, row=None, **options):
    return Formats(**options).example({"system": TOLD} | (row or {}) | {"conversations": [ASKED, *turns]})


def called(*calls):
    return answer(tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls])


@pytest.mark.parametrize("prompt", [TOLD, LLAMA])
def test_calls_results_and_functions_are_read_as_what_they_are(prompt):
    text = """[Market Trends API(kind="A, (x", from='it\\'s'), newAddress(a=-1.5, b=[1, {"k": true}], c=(None, false), d=True), new()]"""
    results = [{"name": "Market Trends API", "results": {"é": 1}}, {"name": "newAddress", "results": "ok"}, {"name": "new", "results": None}]
    example = read(said(text), said(json.dumps(results), "tool"), said("Done."), row={"system": prompt})
    assert example.messages == [
        system(ROLE), user("Q?"),
        called(("Market Trends API", {"kind": "A, (x", "from": "it's"}),
               ("newAddress", {"a": -1.5, "b": [1, {"k": True}], "c": [None, False], "d": True}), ("new", {})),
        *({"role": "tool", "name": name, "content": content} for name, content in (
            ("Market Trends API", '{"é": 1}'), ("newAddress", "ok"), ("new", "null"))), answer("Done.")]
    assert [tool["function"]["name"] for tool in example.tools] == ["Market Trends API", "newAddress", "new"]
    assert example.tools[0]["function"]["parameters"]["type"] == "object" and not example.unread


def test_an_answer_without_a_call_has_the_same_tools():
    example = read(said("None of them can be used."))
    assert example.messages == [system(ROLE), user("Q?"), answer("None of them can be used.")] and len(example.tools) == 3
    turn = {"messages": [system(TOLD), user("Q?"), answer("[new()]")]}
    assert Formats().example(turn).messages == [system(ROLE), user("Q?"), called(("new", {}))]
    alone = json.dumps(TOOLS) + " Put it in the format of [func1(params_name=params_value...)]"
    assert read(said("[new()]"), row={"system": alone}).messages == [user("Q?"), called(("new", {}))], "nothing is left of the prompt"


def test_results_of_another_form_stay_one_text():
    for text in ('[{"name": "new", "results": 1}]', "It rains.", '[{"name": "newAddress", "results": 1, "x": 2}]'):
        assert read(said("[newAddress()]"), said(text, "tool"), said("Done.")).messages[3]["content"] == text


@pytest.mark.parametrize("text", ["<|tool_call_start|>[newAddress(id=\"1\")]<|tool_call_end|>", "[newAddress(id='1')]",
                                  "<|python_start|>[newAddress(id='1',)]<|python_end|>", "[ newAddress( id = '1' ) ]"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), TOOLS[1], json.dumps(TOOLS[1]), [{"type": "function", "function": tool} for tool in TOOLS]])
def test_calls_of_tools_that_the_row_declares(text, tools):
    row = {"messages": [user("Q?"), answer(text), {"role": "tool", "content": "1"}, answer("Done.")], "tools": tools}
    assert Formats().example(row).messages[1:3] == [called(("newAddress", {"id": "1"})), {"role": "tool", "content": "1", "name": "newAddress"}]


def test_so_are_those_in_turns_that_are_calls_by_their_role():
    turns = [said("I look."), said("[newAddress(id='1')]", "function_call"), said("1", "observation"), said("Done.")]
    example = Formats().example({"conversations": [ASKED, *turns], "tools": TOOLS})
    assert example.messages[1] == called(("newAddress", {"id": "1"})) | {"content": "I look."} and len(example.messages) == 4


@pytest.mark.parametrize("text", ["{}Now I look.", "Now I look.\n{}"])
def test_what_is_said_beside_the_marks_of_calls_stays_said(text):
    said = text.format("<|tool_call_start|>[new()]<|tool_call_end|>")
    row = {"messages": [user("Q?"), answer(said), {"role": "tool", "content": "1"}, answer("Done.")], "tools": TOOLS}
    assert Formats().example(row).messages[1] == called(("new", {})) | {"content": "Now I look."}
    row["messages"][1] = answer(text.format("<|tool_call_start|>[new()]<|tool_call_end|><|tool_call_start|>[new()]<|tool_call_end|>"))
    with pytest.raises(RowError, match="calls tools as Python calls functions"):
        Formats().example(row)


def test_what_else_a_system_prompt_says_keeps_its_form():
    own = "Rules:\n\n\n    - indented  \n\n    - again"
    listed = f"Here is a list of functions in JSON format that you can invoke: {json.dumps(TOOLS)}. Put it in the format of [func1(params_name=1)]"
    for between in (" ", "\n", "\n\n"):
        example = read(said("[new()]"), row={"system": f"{own}{between}{listed}{between}Be brief."})
        assert example.messages[0] == system(f"{own}{between}Be brief.")


def test_problems_have_the_numbers_that_turns_have_in_the_row():
    alone = json.dumps(TOOLS) + " Put it in the format of [func1(params_name=params_value...)]"
    with pytest.raises(RowError, match="turn 3 calls tools"):
        Formats().example({"messages": [system(alone), user("Q?"), answer("[new(1)]")]})


@pytest.mark.parametrize("text", ["[see (1)]", "[new]", "See [new()]", "[new()] is it.", "new()", "[1](new)"])
def test_other_texts_stay_texts(text):
    row = {"messages": [user("Q?"), answer(text)]}
    assert Formats().example(row | {"tools": TOOLS}).messages == row["messages"]
    assert Formats().example({"messages": [user("Q?"), answer("[new()]")]}).messages[1] == answer("[new()]"), "no tools are declared"


@pytest.mark.parametrize(("text", "reason"), [
    ("[other(a=1)]", "'other' is none of the declared ones"), ("[new(1)]", "in 'new(1)' an argument has no name: '1'"),
    ("[new(a=b)]", "the argument `a` of new is no value: 'b'"), ("[new(a=1, a=2)]", "new has the argument `a` twice"),
    ("[new(a='it's')]", "a text has no end"), ("[new(a={'k': 1, 'k': 2})]", "the argument `a` of new is no value"),
    ("[new(a={1})]", "the argument `a` of new is no value"), ("[new(a=1e999)]", "the argument `a` of new is no value"),
    ("[new(a=[1)]", "a bracket is not closed"), ("[new(a=1), (2)]", "'' is none of the declared ones"),
    ("[new(a=1)(b=2)]", "a bracket is closed that was not opened"), ("[new(**x)]", "in 'new(**x)' an argument has no name"),
    ("[new(a=open('x'))]", "the argument `a` of new is no value"), ("[new(a={1: 2})]", "the argument `a` of new is no value")])
def test_calls_that_cannot_be_read_exactly_reject_the_row(text, reason):
    with pytest.raises(RowError) as caught:
        read(said(text), said("1", "tool"), said("Done."))
    [problem] = caught.value.problems
    assert problem.code == "tool_calls" and problem.reason.startswith("turn 3 calls tools as Python calls functions, and ")
    assert reason in problem.reason


def test_of_arguments_without_names_it_is_told_how_the_call_is_written():
    with pytest.raises(RowError) as caught:
        read(said("[newAddress(a=1, 'Paris')]"), said("1", "tool"), said("Done."))
    assert "in \"newAddress(a=1, 'Paris')\" an argument has no name: \"'Paris'\"" in str(caught.value)
    assert caught.value.fix == ("write it with the names of newAddress's parameters, as in newAddress(NAME=VALUE), or the calls as "
                                "`tool_calls`, or leave the row out")


def test_a_call_that_nobody_answered_is_learned_and_so_is_what_comes_behind_it():
    turns = [ASKED, said("[new(a=1)]"), said("And now?", "user"), said("[newAddress()]"), said("Thanks.", "user"), said("Bye.")]
    example = Formats().example({"system": TOLD, "conversations": turns})
    assert example.messages == [system(ROLE), user("Q?"), called(("new", {"a": 1})), user("And now?"), called(("newAddress", {})),
                                user("Thanks."), answer("Bye.")]
    assert Formats().example(example.as_row()) == replace(example, format="messages"), "as it is prepared, it can be prepared again"


@pytest.mark.parametrize(("template", "special", "make", "family"), [
    ("gemma4_v5", GEMMA_4, gemma_tokenizer, "gemma4"), ("qwen2_5", CHATML, byte_tokenizer, "qwen2"),
    ("llama3_1", LLAMA_3_1, byte_tokenizer, "llama")])
def test_such_a_call_and_the_answer_behind_it_are_what_is_learned(template, special, make, family):
    chat = ChatFormat(make(special, trl_template(template)), family)
    example = read(said("[new(a=1)]"), said("And now?", "user"), said("Sun."))
    [[made, last]] = learned(chat, chat.encode(example.messages, example.tools))
    assert "new" in made and "And now?" not in made and last.startswith("Sun.")


def test_a_system_prompt_in_other_words_stays_as_it_is():
    """What else it says of how calls are written would contradict the model's template."""
    prompt = TOLD + "Again, write [func1(params_name=params_value)] and no text."
    assert read(said("[new()]"), row={"system": prompt}).messages == [system(prompt), user("Q?"), answer("[new()]")]
    listed = f"The shops: {json.dumps(TOOLS)}"
    assert read(said("[new()]"), row={"system": listed}).messages[0] == system(listed)


def test_a_template_without_tools_is_told_how_the_calls_stay_text(cli, tiny, tmp_path):
    rows = [{"system": TOLD, "conversations": [said(f"Q{n}?", "user"), said(f"[new(n={n})]")]} for n in range(12)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    refused = cli("prepare", data, "--model", tiny, "--run", "run")
    assert refused.code != 0 and "--columns turns=conversations,system=system keeps the calls and the functions" in refused.err
    done = cli("prepare", data, "--model", tiny, "--run", "run", "--columns", "turns=conversations,system=system")
    assert done.code == 0, done.err
    learned = [json.loads(line) for line in (tmp_path / "run" / "data" / "train.jsonl").read_text().splitlines()]
    assert learned[0]["messages"][0] == system(TOLD) and learned[0]["messages"][2]["content"].startswith("[new(n=")
