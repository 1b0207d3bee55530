"""Leftovers of templates, placeholders and control characters: found where they are, and only where they are."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.config import preparation as config
from gemma_tune.data.conversations.checks import FOREIGN, TextChecks
from gemma_tune.data.conversations.formats import Example, Formats

same_examples = settings(derandomize=True, database=None, deadline=None, max_examples=300)

# Of Gemma 3, Gemma 4, Llama 2, DeepSeek and Mistral, and some that do not look like tags.
OWN = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<turn|>", '<|"|>', "<s>", "</s>", "<unused7>", "[multimodal]", "[INST]",
       "<｜end▁of▁sentence｜>", "<<SYS>>", "@@", "<[pad]>", "<two words>", "<" + "x" * 70 + ">", "\n", " "]


def example(text: str = "b", **row: Any) -> Example:
    return Formats().example({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}], **row})


def found(text: str | Example, own=OWN, allow=()) -> list[tuple[str, str]]:
    problems = TextChecks(own, allow).problems(text if isinstance(text, Example) else example(text))
    assert all(p.fix and "\n" not in p.reason for p in problems)
    return [(p.code, p.reason) for p in problems]


def codes(text: str | Example, **how: Any) -> list[str]:
    return [code for code, _ in found(text, **how)]


@pytest.mark.parametrize("marker", [marker for marker in OWN if marker.strip()])
@pytest.mark.parametrize("around", ["{}", "a{}b", "<{}>", "[{}]", "<a{}", "<<{}", "{}>", "a < b {} c > d", "[see {}", "`{}`", "<b>{}</b>", "{}{}"])
def test_own_markers_are_found_wherever_they_stand(marker, around):
    text = around.replace("{}", marker)
    problems = TextChecks(OWN, config.ALLOWABLE).problems(example(text))
    assert [p.code for p in problems] == ["template_marker"], text
    assert problems[0].reason.startswith("turn 2 contains the chat template's own ") and marker in problems[0].reason
    assert marker in problems[0].fix


def test_the_message_names_a_few_markers():
    assert found("<bos> <eos> <bos>") == [("template_marker", "turn 2 contains the chat template's own <bos>, <eos>")]
    assert found("<bos> <eos> <s> </s> [INST]")[0][1].endswith("own <bos>, <eos>, <s> and 2 more")


@pytest.mark.parametrize("marker", [*sorted(FOREIGN), "<<SYS>>", "<</SYS>>", "<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|eot_id|>", "<|assistant|>",
                                    "<|START_OF_TURN_TOKEN|>", "<|start|>", "<|end|>"])
def test_markers_of_other_templates_are_found(marker):
    assert found(f"see {marker}.", own=[]) == [("foreign_marker", f"turn 2 contains {marker}, a leftover of another chat template")]
    assert codes(f"a{marker}{marker}b", own=[]) == codes(f"<{marker}>", own=[]) == ["foreign_marker"]
    assert codes(marker, own=[marker]) == ["template_marker"]
    assert codes(marker, own=[], allow=["foreign_marker"]) == []
    assert codes(marker, own=[marker], allow=["foreign_marker"]) == ["template_marker"]


@pytest.mark.parametrize("text", [
    "a <b>bold</b> word", "<s>struck</s>", "if a<b and c>d: x[i] = y[j]", "List<String> m = new Map<K,V>()", "x |> f <| y", "f <$> g <|> h",
    "[1] and [INSTALL] and [inst]", "<p>[link](url)</p>", "<-> <= >= << >> <>", "1 <|2|> 3", "<||>", "<pad> <unk> [MASK] <mask>", "＜bos＞", "<BOS> <Bos>",
    "#include <vector>", "<think>hm</think>", "<tool_call>{}</tool_call>", "Array[int]", "<|", "[" * 5000, "<" * 5000 + ">" * 5000])
def test_what_only_looks_like_a_marker(text):
    assert found(text, own=["<bos>"]) == []


@pytest.mark.parametrize("text, names", [
    ("Hi {{name}}, welcome.", "{{name}}"), ("Dear {{ customer.first_name }}!", "{{ customer.first_name }}"),
    ("See {{Order Number}} and {{Order Number}} at {{Website URL}}.", "{{Order Number}}, {{Website URL}}"),
    ("{{company-name}}", "{{company-name}}"), ("Subject: {{subject}}\n\nHello", "{{subject}}"), ("({{name}})", "{{name}}"),
    ("```\n{{code}}\n```\nHi {{name}}", "{{name}}"), ("你好，{{name}}。", "{{name}}"),
    ("<b>{{x1}}</b>\nHi {{name}}", "{{name}}"), ("<b>x</b> " + "word " * 60 + "Hi {{name}}", "{{name}}")])
def test_placeholders_are_found(text, names):
    assert found(text) == [("placeholder", f"turn 2 contains the unreplaced placeholder {names}")]
    assert found(text, allow=["placeholder"]) == []


@pytest.mark.parametrize("text", [
    "Use `{{name}}` here", "```\nHi {{name}}\n```", "~~~\nHi {{name}}", "```jinja\n{{name}} without an end", r"\frac{{ab}}{{cd}}", "x^{{ab}} + y_{{cd}}",
    "$ {{ab}} $", r"\text {{ab}}", "<p>{{ name }}</p>", '<div :style="{{ style }}">', "{% if a %}{{ name }}{% endif %}", "style={{color}}", "f'{{{name}}}'",
    "In Jinja you write {{ name }}.", "A Vue component shows {{ message }}", "Replace the placeholder {{name}} with yours.", "{{}}", "{{ }}", "{{1}}", "{{x}}",
    "{{a|b}}", "{{.Values.name}}", "{{ f(x) }}", "{ {name} }", "{{name}", "{{\"a\": 1}}", "{{name}};", "${HOME}/bin", "{name}", "[Your Name]", "f{{name}}", "{{" * 5000])
def test_what_is_source_text_or_a_formula(text):
    assert found(text) == []


def test_a_question_about_templates_covers_its_answer():
    row = {"instruction": "How do I print a variable in Handlebars?", "output": "Write {{ variable }}."}
    assert found(Formats().example(row)) == []
    assert codes(Formats().example(row | {"instruction": "How do I print a variable?"})) == ["placeholder"]


@pytest.mark.parametrize("character", [chr(c) for c in [*range(0x20), *range(0x7f, 0xa0)]])
def test_control_characters(character):
    text = f"a{character}b"
    if character in "\t\n\r\x85":
        assert found(text) == []
    else:
        assert found(text) == [("control_character", f"turn 2 contains the control character U+{ord(character):04X}")]
    assert found(text, allow=["control_character"]) == []


@pytest.mark.parametrize("text", ["a\u00a0b\u2028c\u200bd\u00ad\ufeffe", "é中😀\U000e0041", "a\u202eb", "x\ty\r\nz"])
def test_other_characters_that_do_not_print_are_text(text):
    assert found(text) == []


def test_all_findings_of_a_row_in_their_order():
    row = {"messages": [{"role": "user", "content": "<bos>\n<|im_end|> {{name}} \x07"}, {"role": "assistant", "content": "\x08"}]}
    assert found(Formats().example(row)) == [
        ("template_marker", "turn 1 contains the chat template's own <bos>"),
        ("foreign_marker", "turn 1 contains <|im_end|>, a leftover of another chat template"),
        ("placeholder", "turn 1 contains the unreplaced placeholder {{name}}"),
        ("control_character", "turn 1 contains the control character U+0007"),
        ("control_character", "turn 2 contains the control character U+0008")]


BAD = '<|"|>'


@pytest.mark.parametrize("row, where", [
    ({"text": BAD}, "`text`"),
    ({"messages": [{"role": "system", "content": BAD}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "turn 1"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning": BAD}]}, "the reasoning of turn 2"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": [{"y": BAD}]}}]}]},
     "a tool call of turn 2"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {BAD: 1}}]}]}, "a tool call of turn 2"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]},
                   {"role": "tool", "content": BAD}, {"role": "assistant", "content": "b"}]}, "turn 3"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]},
                   {"role": "tool", "name": BAD, "content": ""}, {"role": "assistant", "content": "b"}]}, "the tool name of turn 3"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "f", "description": BAD}]}, "tool 1"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [{"name": "g"}, {
        "name": "f", "parameters": {"properties": {BAD: {}}}}]}, "tool 2"),
])
def test_everything_that_the_model_reads_is_looked_at(row, where):
    assert found(Formats().example(row)) == [("template_marker", f"{where} contains the chat template's own {BAD}")]


def test_the_codes_that_can_be_allowed_are_those_of_the_settings():
    text = "<bos>\n<|im_end|> {{name}} \x07"
    assert {code for code in codes(text)} == {"template_marker", *config.ALLOWABLE} - {"undeclared_tool"}
    assert codes(text, allow=config.ALLOWABLE) == ["template_marker"]


@pytest.mark.parametrize(("name", "reason"), [("get_wether", "turn 2 calls get_wether, which `tools` does not declare; did you mean `get_weather`?"),
                                              ("zzz", "turn 2 calls zzz, which `tools` does not declare"), ("get_weather", None)])
def test_calls_of_tools_that_are_not_declared(name, reason):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": {}}}]}
    row = {"messages": [{"role": "user", "content": "a"}, call], "tools": [{"name": "get_weather", "parameters": {}}]}
    expected = [("undeclared_tool", reason)] if reason else []
    assert found(Formats().example(row)) == expected
    assert found(Formats().example(row), allow=["undeclared_tool"]) == []
    assert found(Formats().example({"messages": row["messages"]})) == [], "a row that declares none may call what everybody knows"


@pytest.mark.parametrize("text", ["#N/A", " nan", "#REF!\n", "<NA>"])
def test_what_a_table_writes_for_nothing_is_no_answer(text):
    assert codes(text, own=[]) == ["placeholder"] and codes(text, own=[], allow=["placeholder"]) == []
    assert codes(f"It is {text}", own=[]) == codes("None", own=[]) == codes("nano", own=[]) == []


@pytest.mark.parametrize(("text", "marker"), [("<image>\nWhat is this?", "<image>"), ("What is this?\n<image>", "<image>"), ("<video>", "<video>"), ("<image>Who is it?", "<image>"), ("<audio> is an element", None), ("<image> tag", None),
                                              ("Use <image> in SVG", None), ("<image>.svg", None), ("`<image>`", None)])
def test_places_of_pictures_are_found(text, marker):
    for problem in TextChecks([]).problems(example(text)) if marker else ():
        fix = "give the row `images`, or leave it out" if marker == "<image>" else "leave the row out, as text and pictures alone are learned"
        assert problem.fix == f"{fix}; or use --allow foreign_marker if it is meant to be there"
    assert found(text, own=[]) == ([("foreign_marker", f"turn 2 contains {marker}, the place of something that is not text")] if marker else [])


pieces = st.lists(st.sampled_from([*OWN, "<", ">", "[", "]", "|", "a", " ", "<|", "|>", "<a>", "<<", ">>", "\n"]) | st.text(max_size=2), max_size=8)


@same_examples
@given(pieces=pieces)
def test_own_markers_are_found_exactly_where_a_search_finds_them(pieces):
    text = "".join(pieces).strip() or "x"
    if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
        return
    expected = any(marker in text for marker in OWN if marker.strip())
    assert codes(json_safe(text), allow=config.ALLOWABLE) == (["template_marker"] if expected else [])


def json_safe(text: str) -> Example:
    return Example("messages", [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}], None, None)


@pytest.mark.parametrize("text", [
    "<" * 500_000, "[a" * 250_000, "{{" * 250_000, "{{a " * 100_000, "`" * 500_000, "```" * 100_000, "{{ab}} " * 70_000, "<a{{ab}}" * 60_000,
    "$" * 200_000 + "{{ab}}", "\\{{ab}}" * 50_000, "; " * 100_000 + "{{ab}}", "{{" + "a" * 500_000, " " * 500_000 + "{{ab}}", "\x07" * 100_000])
def test_no_text_takes_long(text):
    checks = TextChecks([f"<unused{n}>" for n in range(6242)])
    start = time.process_time()
    checks.problems(json_safe(text))
    assert time.process_time() - start < 2


def test_ordinary_text_is_checked_at_full_speed():
    """With the 6,242 special tokens of a Gemma; measured at 4 µs per kB, the limit leaves room for a busy machine."""
    checks = TextChecks([f"<unused{n}>" for n in range(6242)])
    ordinary = [json_safe(json.dumps({"n": n, "text": "An ordinary answer, with <b>tags</b>, a[i] and numbers.\n" * 18})) for n in range(500)]
    start = time.process_time()
    assert not any(checks.problems(one) for one in ordinary)
    assert (time.process_time() - start) / len(ordinary) < 200e-6
