"""``prepare`` on single rows and files: which layouts are read, what is rejected and why, and what stops everything."""

from __future__ import annotations

import codecs
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.base.errors import BAD_INPUT
from support.command import ROOT, invoke, rows, write_rows
from support.prepared import DATA, RECORD, alpaca, contents, kept, prepared, read, report, row, with_template
from support.rows import answer, user


@pytest.fixture
def rejected(prepare):
    """The single record in rejected.jsonl for a file with one good row and the given bad one."""
    def call(bad: Any, *args: object) -> dict[str, Any]:
        text = bad if isinstance(bad, str) else json.dumps(bad)
        Path("rows.jsonl").write_text(json.dumps(row("good")) + "\n" + text + "\n", encoding="utf-8")
        summary = prepare("rows.jsonl", "--force", *args)["summary"]
        [record] = read("rejected")
        assert (summary["rows"], summary["rejected_rows"], summary["train_rows"]) == (2, 1, 1)
        assert set(record) - {"others"} == RECORD
        assert (record["file"], record["line"]) == ("rows.jsonl", 2)
        assert record["row"] == (bad if record["code"] == "broken_json" else json.loads(text))
        return record

    return call


# --- what is read

def test_what_is_thought_before_an_answer_may_stand_in_a_column_of_its_own(tiny, tmp_path, prepare):
    asked = {"Question": "Is 7 prime?", "Complex_CoT": "Nothing divides it.", "Response": "Yes."}
    write_rows(Path("cot.jsonl"), [asked])
    thinker = with_template(tiny, tmp_path / "thinker", "qwen3")
    option = shlex.split(prepared(thinker, "cot.jsonl", code=2)["hint"])[-1]  # of the command that is shown to be pasted
    prepared(thinker, "cot.jsonl", "--columns", option)
    assert kept() == [[user("Is 7 prime?"), answer("Yes.", reasoning_content="Nothing divides it.")]]
    # A model whose template has no place for it says what to leave out.
    problem = prepare("cot.jsonl", "--force", "--columns", option, code=2)
    assert "leaves out the reasoning" in problem["err"] and "leave `reasoning=…` out of --columns" in problem["hint"]
    problem = prepare("cot.jsonl", "--force", "--columns", option.replace("Complex_CoT", "CoT"), code=2)
    assert "no row has the column `CoT`, which --columns names for the reasoning" in problem["message"]


TWO = [json.dumps(row("a", "é 中 😀"), ensure_ascii=False), json.dumps(row("b"))]


@pytest.mark.parametrize("text, lines", [
    ("\n".join(TWO), 2),
    ("\n".join(TWO) + "\n", 2),
    ("\ufeff" + "\n".join(TWO) + "\n", 2),
    ("\ufeff" + TWO[0] + "\n\ufeff" + TWO[1] + "\n", 2),
    ("\r\n".join(TWO) + "\r\n", 2),
    ("\n\n  \n" + TWO[0] + "\n\t\r\n\n" + TWO[1] + "\n\n\n", 7),
    ("  " + TWO[0] + "  \n\t" + TWO[1], 2),
    ("[" + ",".join(TWO) + "]", None),
    ("\ufeff\r\n [\r\n" + ",\r\n".join(TWO) + "\r\n]\r\n", None),
    (json.dumps([json.loads(t) for t in TWO], indent=4), None),
    (json.dumps([json.loads(t) for t in TWO], indent=4, ensure_ascii=False).replace("\n", "\r\n"), None),
], ids=["JSONL", "final line feed", "byte order mark", "two byte order marks", "CRLF", "blank lines", "indented",
        "array", "array with everything around", "pretty array", "pretty array with CRLF"])
def test_layouts_of_a_file(prepare, text, lines):
    Path("rows.json").write_bytes(text.encode())
    prepare("rows.json", "--valid", 0)
    assert kept() == [row("a", "é 中 😀")["messages"], row("b")["messages"]]
    if lines:  # the number of the second row's line
        Path("rows.json").write_bytes('"robot"'.join(text.rsplit('"assistant"', 1)).encode())
        prepare("rows.json", "--valid", 0)
        assert [r["line"] for r in read("rejected")] == [lines]


def test_one_object_over_several_lines_is_one_row(prepare):
    Path("one.json").write_text("\n" + json.dumps(row("a"), indent=2) + "\n")
    prepare("one.json")
    assert kept() == [row("a")["messages"]]
    Path("one.json").write_text('{"messages":\n [{"role": "user", "content": "a"}]\n}')
    assert "one.json:1: the conversation ends with `user`" in prepare("one.json", code=2)["problems"][0]


A_AND_B = [json.dumps(row(name)["messages"]) for name in "ab"]


@pytest.mark.parametrize("text, lines", [
    ("\n".join(A_AND_B), [1, 2]),
    ("\ufeff" + "\r\n\r\n".join(A_AND_B) + "\r\n", [1, 3]),
    (A_AND_B[0] + "\n" + json.dumps(row("b")) + "\n", [1, 2]),
    (json.dumps(row("a")) + "\n" + A_AND_B[1], [1, 2]),
    ("[" + ",\n".join(A_AND_B) + "]", [1, 2]),
    (json.dumps([row(name)["messages"] for name in "ab"], indent=1), [2, 12]),
], ids=["JSONL", "CRLF", "an object below", "below an object", "array", "pretty array"])
def test_lists_of_turns_are_rows(prepare, text, lines):
    Path("rows.jsonl").write_text(text)
    prepare("rows.jsonl", "--valid", 0)
    assert kept() == [row("a")["messages"], row("b")["messages"]]
    Path("rows.jsonl").write_text(text.replace('"a"', '""').replace('"b"', "null"))
    problems = prepare("rows.jsonl", "--on-bad-row", "fail", code=2)["problems"]
    assert [p.partition(": ")[0] for p in problems] == [f"rows.jsonl:{n}" for n in lines]


@pytest.mark.parametrize("indent", [None, 2])
def test_one_list_of_turns_is_one_row(prepare, indent):
    Path("one.json").write_text(json.dumps(row("a")["messages"], indent=indent))
    prepare("one.json")
    assert kept() == [row("a")["messages"]]


def test_a_broken_first_list_of_turns_does_not_stop_the_others(prepare):
    Path("rows.jsonl").write_text(A_AND_B[0][:-1] + "\n" + A_AND_B[1] + "\n")
    prepare("rows.jsonl", "--valid", 0)
    assert [(r["line"], r["code"], r["row"]) for r in read("rejected")] == [(1, "broken_json", A_AND_B[0][:-1])]
    assert kept() == [row("b")["messages"]]


def test_a_cell_that_is_nan_is_missing(prepare):
    Path("rows.jsonl").write_text('{"instruction": "a", "input": NaN, "output": "NaN it is", "score": NaN}\n'
                                  '{"messages": NaN, "prompt": "b", "completion": "c", "score": 1}\n')
    with Path("rows.jsonl").open("a") as f:
        f.write('{"instruction": "a", "output": NaN}\n')
    prepare("rows.jsonl", "--valid", 0)
    assert kept() == [row("a", "NaN it is")["messages"], row("b", "c")["messages"]]
    assert [(r["line"], r["code"], r["row"]) for r in read("rejected")] == [(3, "not_text", {"instruction": "a", "output": None})]


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("value", [
    lambda text: row(f"before,{text}after"), lambda text: row("q", f"[{text}a"), lambda text: alpaca(f"a,{text}b", "c"),
], ids=["question", "answer", "alpaca"])
def test_only_line_feeds_end_a_line(prepare, mark, value):
    first, second = value(mark), value(f"second {mark}")
    assert mark in write_rows(Path("rows.jsonl"), [first, second, row("z")]).read_text(encoding="utf-8")
    prepare("rows.jsonl", "--valid", 0)
    assert read("rejected") == []
    assert [str(messages).count(ascii(mark)[1:-1]) for messages in kept()] == [1, 1, 0]


THREE = [row(text) for text in "abc"]


@pytest.mark.parametrize("text", [
    ",\r\n".join(map(json.dumps, THREE)) + ",\n", "".join(map(json.dumps, THREE)) + "\n", "\n".join(json.dumps(r, indent=2) for r in THREE),
    json.dumps(THREE[:2]) + json.dumps(THREE[2:]), ", ".join(map(json.dumps, THREE)) + ",\n", ",\n".join(json.dumps(r, indent=2) for r in THREE) + ",\n",
    json.dumps(THREE[:2], indent=1) + ",\n" + json.dumps(THREE[2:], indent=1)],
    ids=["commas", "one line", "pretty objects", "two lists", "commas on one line", "commas between pretty objects", "a comma between lists"])
def test_objects_that_are_no_json_lines_are_told_with_a_command_that_works(prepare, text):
    Path("FILE.jsonl").write_text(text, encoding="utf-8", newline="")
    command = re.search(r"(?:jq -c|sed ').*? > rows\.jsonl", prepare("FILE.jsonl", code=2)["err"].replace("\n", " "))[0]
    if missing := [tool for tool in ("jq", "sed") if tool in command and shutil.which(tool) is None]:
        pytest.skip(f"there is no {missing[0]} here")
    subprocess.run(["sh", "-c", command.replace("FILE.json ", "FILE.jsonl ")], check=True)
    prepare("rows.jsonl", "--valid", 0)
    assert kept() == [r["messages"] for r in THREE]


# --- what is rejected

USER, ANSWER = row()["messages"]


@pytest.mark.parametrize("bad, code, reason", [
    ("{", "broken_json", "Expecting property name"),
    ('{"messages": [', "broken_json", "Expecting value at column 15"),
    (json.dumps(row("cut off"))[:-9], "broken_json", "Unterminated string starting at column"),
    (json.dumps(row("a")) + json.dumps(row("b")), "broken_json", "Extra data, a second value behind the first, at column"),
    (json.dumps(row("a")) + ",", "broken_json", "Extra data, a comma behind the value, at column"),
    (json.dumps(row("a")) + ", {}", "broken_json", "Extra data, a comma and more behind the value, at column"),
    (json.dumps(row("a")) + "]", "broken_json", "Extra data at column"),
    ('{"messages": [{"role": "user", "content": "a\tb"}]}', "broken_json", "Invalid control character at column"),
    ("question,answer", "broken_json", "Expecting value at column 1"),
    ('{"instruction": "a", "output": "b", "scores": [1, NaN]}', "broken_json", "NaN is not JSON"),
    ('{"messages": [{"role": "user", "content": NaN}]}', "broken_json", "NaN is not JSON"),
    ('{"instruction": "a", "output": NaN', "broken_json", "Expecting ',' delimiter at column 35"),
    ('{"instruction": "a", "output": "b", "score": -Infinity}', "broken_json", "-Infinity is not JSON"),
    ('{"instruction": "a", "output": "b", "score": 1e999}', "broken_json", "the number 1e999 is too large"),
    ('{"instruction": "a", "output": "b", "score": ' + "7" * 5000 + "}", "broken_json", f"number {'7' * 24}… is too large"),
    ('{"instruction": "a", "output": "b", "extra": ' + "[" * 50_000 + "]" * 50_000 + "}", "broken_json", "nested too deeply"),
    ('{"a":' * 300 + "1" + "}" * 300, "broken_json", "nested too deeply"),
    ("[" * 980 + "]" * 980, "broken_json", "nested too deeply"),
    ('{"a": ' + "[" * 90 + "9" * 4000 + "]" * 90 + "}", "unknown_format", "it has 'a'"),
    ("7", "not_an_object", "this one is a number"),
    ("NaN", "broken_json", "NaN is not JSON"),
    ("null", "not_an_object", "this one is null"),
    ('"text"', "not_an_object", "this one is text"),
    ("[]", "not_an_object", "this one is a list"),
    ("true", "not_an_object", "this one is true or false"),
    ("{}", "unknown_format", "it has nothing"),
    ({"prompt": "a", "answer": "b"}, "unknown_format", "it has 'prompt', 'answer'"),
    ({"prompt": "a", "completion": ""}, "empty_turn", "turn 2 (assistant) is empty"),
    ({"text": " \n"}, "empty_turn", "`text` is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "b "}, "same_answers", "both answers are the same but for white space"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "no_answer", "ends with `user`"),
    ({"x" * 10_000: 1, "\ud800": 2, "a\nb": 3}, "unknown_format", "it has"),
    ({"instruction": "a"}, "unknown_format", "it has 'instruction'"),
    ({"messages": []}, "no_messages", "an empty list"),
    ({"messages": None}, "no_messages", "missing"),
    ({"messages": "hi"}, "no_messages", "text"),
    ({"messages": {"role": "user"}}, "no_messages", "an object"),
    ({"messages": ["hi"]}, "not_an_object", "turn 1 is text"),
    ({"messages": [{"content": "a"}, ANSWER]}, "unknown_role", "turn 1 has the role None"),
    ({"messages": [{"role": "User", "content": "a"}, ANSWER]}, "unknown_role", "'User'"),
    ({"messages": [{"role": ["user"] * 999, "content": "a"}, ANSWER]}, "unknown_role", "turn 1"),
    ({"messages": [USER, {"role": "tool", "content": "a"}, ANSWER]}, "tool_order", "turn 2 is the result of a tool that"),
    ({"messages": [USER, {"role": "tool", "content": "a"}]}, "tool_order", "turn 2 is the result of a tool that was not"),
    ({"messages": [{"role": "user"}, ANSWER]}, "not_text", "the content of turn 1 is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "not_text", "turn 1 is a list"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "not_text", "turn 2 is a number"),
    ({"messages": [USER, {"role": "assistant", "content": " \n\u00a0"}]}, "empty_turn", "turn 2 (assistant) is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "tool_calls",
     "tool call 1 of turn 2 has no function name"),
    ({"messages": [USER, ANSWER | {"weight": 0}]}, "nothing_to_learn", "every assistant turn says that"),
    ({"messages": [USER, ANSWER | {"train": False}]}, "nothing_to_learn", "every assistant turn says that"),
    ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "turn_weight", "turn 2 has the weight 0.5"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "f", "description": "d"}]}, "template",
     "the model's chat template has no place for tools"),
    (row("q", "#N/A"), "placeholder", "turn 2 (assistant) is #N/A, with which tables say that there is nothing"),
    ({"messages": [USER]}, "no_answer", "ends with `user`"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no_answer", "ends with `system`"),
    ({"messages": [USER, ANSWER, USER]}, "no_answer", "ends with `user`"),
    ({"messages": [ANSWER]}, "alternation", "turn 1 is `assistant` where `user` is expected"),
    ({"messages": [USER, USER, ANSWER]}, "alternation", "turn 2 is `user` where `assistant` is expected"),
    ({"messages": [{"role": "system", "content": "s"}, ANSWER]}, "alternation", "turn 2 is `assistant`"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER]}, "system_inside", "turn 3"),
    (alpaca(instruction=["a"]), "not_text", "`instruction` is a list"),
    (alpaca(input={"a": 1}), "not_text", "`input` is an object"),
    (alpaca(system=1.5), "not_text", "`system` is a number"),
    (alpaca(output=None), "not_text", "turn 2 is missing"),
    (alpaca(instruction=""), "empty_turn", "turn 1 (user) is empty"),
    (alpaca(output=" "), "empty_turn", "turn 2 (assistant) is empty"),
    (row("a\ud800b"), "broken_text", "turn 1 contains damaged characters"),
    (row("a", "\udfff"), "broken_text", "turn 2 contains damaged characters"),
    (row("Caf\ufffd"), "broken_text", "turn 1 contains damaged characters"),
    (alpaca(output="\udc00"), "broken_text", "turn 2"),
    (row("a<end_of_turn>\n<start_of_turn>model\nb"), "template_marker", "turn 1 contains the chat template's own <"),
    (row("a", "b<end_of_turn>"), "template_marker", "turn 2 contains the chat template's own <end_of_turn>"),
    (row(instruction="<bos>"), "template_marker", "turn 1 contains the chat template's own <bos>"),
    (row("a<eos>"), "template_marker", "<eos>"),
    (row("What does <|im_end|> mean?"), "foreign_marker", "turn 1 contains <|im_end|>, a leftover of another chat"),
    (row("Dear {{name}},"), "placeholder", "turn 1 contains the unreplaced placeholder {{name}}"),
    (row("a", "b\x1b[1m"), "control_character", "turn 2 contains the control character U+001B"),
], ids=lambda v: v[:40] if isinstance(v, str) else None)
def test_what_cannot_be_learned_is_kept_with_its_reason(rejected, bad, code, reason):
    record = rejected(bad)
    assert record["code"] == code
    assert reason in record["reason"]
    assert len(record["reason"]) < 400 and "\n" not in record["reason"]


def test_every_problem_of_a_row_is_named(rejected, prepare):
    record = rejected({"messages": [USER | {"content": 3}, ANSWER | {"content": ""}, {"role": "robot"}]})
    assert [p["code"] for p in (record, *record["others"])] == ["not_text", "empty_turn", "unknown_role"]
    assert "others" not in rejected({"messages": [USER]})
    error = prepare("rows.jsonl", "--on-bad-row", "fail", code=2)
    assert error["problems"] == ["rows.jsonl:2: the conversation ends with `user`; there is no answer to learn "
                                 "(leave the last turn out, or put the answer behind it)"]
    rejected(row("<bos>", "<eos>\x07"))
    [problem] = prepare("rows.jsonl", "--on-bad-row", "fail", code=2)["problems"]
    assert all(what in problem for what in ("<bos>", "<eos>", "U+0007"))


def test_pairs_of_surrogates_are_characters(prepare):
    Path("rows.jsonl").write_text(json.dumps(row("smile \U0001f600")), encoding="ascii")
    assert "\\ud83d\\ude00" in Path("rows.jsonl").read_text()
    prepare("rows.jsonl")
    assert kept()[0][0]["content"] == "smile \U0001f600"


def test_half_a_pair_outside_the_texts_is_no_harm(prepare):
    Path("rows.jsonl").write_text(json.dumps(row("a") | {"note": "\ud800"}) + "\n" + json.dumps({"\udfff": "\ud83d"}))
    prepare("rows.jsonl")
    assert kept() == [row("a")["messages"]]
    assert read("rejected")[0]["row"] == {"\udfff": "\ud83d"}
    error = prepare("rows.jsonl", "--on-bad-row", "fail", code=2)
    assert "rows.jsonl:2: neither `messages` nor" in error["problems"][0]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])
def test_any_name_can_be_written_to_stdout(monkeypatch, encoding):
    from gemma_tune.cli.screen import result_json

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    for value in ({"file": "\udcff.jsonl"}, {"file": "数据 é"}):
        result_json(value)
        assert json.loads(stream.buffer.getvalue().decode(encoding).splitlines()[-1]) == value
    assert ("数据".encode() in stream.buffer.getvalue()) == (encoding == "utf-8")


def test_many_rejected_rows_are_summed_up(prepare):
    bad = [{"n": n} for n in range(14)] + [row("a", "")] * 2 + ["text"]
    done = prepare(write_rows(Path("rows.jsonl"), [row("a"), *bad]))
    assert done["summary"]["rejected_by_reason"] == {"unknown_format": 14, "empty_turn": 2, "not_an_object": 1}
    assert report()["first_rejected"] == {"unknown_format": "rows.jsonl:2", "empty_turn": "rows.jsonl:16",
                                          "not_an_object": "rows.jsonl:18"}
    assert done["err"].count("! rejected rows.jsonl:") == 10
    assert "… and 7 more, all in runs/tiny-gemma/data/rejected.jsonl" in done["err"]
    assert [r["line"] for r in read("rejected")] == list(range(2, 19))


def test_lines_of_an_array_are_those_where_its_elements_begin(prepare):
    text = '\n[\n  {"messages": [\n    {"role": "user"}\n  ]},\n\n  7, 8,\n' + json.dumps(row("a")) + ', {\n"x": 1},\n[\n]\n]\n'
    Path("rows.json").write_text(text)
    prepare("rows.json")
    assert [(r["line"], r["row"]) for r in read("rejected")] == [
        (3, {"messages": [{"role": "user"}]}), (7, 7), (7, 8), (8, {"x": 1}), (10, [])]


def test_rows_that_a_preparation_was_refused_for_can_be_looked_up(prepare, cli, tiny):
    write_rows(Path("rows.jsonl"), [row("good"), *({"n": n} for n in range(30))])
    result = cli("prepare", "rows.jsonl", "--model", tiny)
    assert result.code == BAD_INPUT
    assert "rows.jsonl:2 and 29 more rows: neither `messages` nor" in result.err
    assert "each of them is in runs/tiny-gemma/rejected.jsonl" in result.err
    assert "data/rejected.jsonl" not in result.err and "! rejected" not in result.err
    records = [json.loads(line) for line in Path("runs/tiny-gemma/rejected.jsonl").read_text().splitlines()]
    assert [(r["line"], r["row"]) for r in records] == [(n + 2, {"n": n}) for n in range(30)]
    prepare("rows.jsonl")
    assert not Path("runs/tiny-gemma/rejected.jsonl").exists(), "all of them are in data/rejected.jsonl now"


@pytest.mark.parametrize("value, reason", [("Infinity", "Infinity is not JSON"), ("[NaN]", "NaN is not JSON"), ("1e999", "1e999 is too large"),
                                           ("9" * 5000, "is too large"), ("[" * 300 + "]" * 300, "nested too deeply")])
def test_an_element_that_cannot_be_kept_does_not_spoil_the_array(prepare, value, reason):
    element = '{"instruction": "a",\n "output": ' + value + "}"
    Path("rows.json").write_text("[" + json.dumps(row("a")) + ",\n" + element + "\n,\n" + json.dumps(row("b")) + ",\n3]")
    prepare("rows.json", "--valid", 0)
    assert [m[0]["content"] for m in kept()] == ["a", "b"]
    broken, number = read("rejected")
    assert (broken["code"], broken["line"], broken["row"]) == ("broken_json", 2, element)
    assert reason in broken["reason"]
    assert number["line"] == 6


# --- refusals: one message, a hint, exit code 2, earlier data as they were

@pytest.fixture
def refused(prepare):
    """The error of a ``prepare`` that must fail on data, in a run whose earlier data must stay byte-identical."""
    prepare(write_rows(Path("before.jsonl"), rows(4)))
    before = contents(DATA.parent)

    def call(*args: object) -> dict[str, Any]:
        error = prepare(*args, code=BAD_INPUT)
        assert error["exit_code"] == BAD_INPUT
        assert error["hint"]
        assert error["err"].count("Error:") == error["err"].count("Hint:") == 1
        assert contents(DATA.parent) == before
        return error

    return call


def test_missing_files_are_named_together(refused):
    assert refused("none.jsonl")["message"] == "there is no file none.jsonl"
    Path("folder").mkdir()
    error = refused("none.jsonl", "before.jsonl", "folder", "none/at/all.json", "x" * 300, "*.csv")
    assert error["message"] == "5 data sources cannot be read"
    assert error["problems"] == [
        "there is no file none.jsonl",
        "folder is a directory without data files (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow) (name the files, or "
        "another directory)",
        "there is no file none/at/all.json", f"there is no file {'x' * 300}", "no file matches *.csv"]


def test_files_are_looked_for_before_a_model_is(cli, monkeypatch):
    monkeypatch.setattr("gemma_tune.run.base_model.locate", lambda *a, **more: pytest.fail("a model was looked for"))
    result = cli("prepare", "none.jsonl", "--valid", "2.5x", "--model", "google/gemma-3-270m-it", "--json")
    assert result.code == BAD_INPUT
    assert result.json["error"]["problems"] == [
        "there is no file none.jsonl",
        "there is no file 2.5x (--valid takes a share such as 0.1, a number of rows such as 50, or a file)"]
    result = cli("run", "none.jsonl", "--model", "google/gemma-3-270m-it")
    assert result.code == BAD_INPUT and "there is no file none.jsonl" in result.err


def test_names_are_judged_before_any_file_is_read(refused, monkeypatch):
    from gemma_tune.base import fingerprints

    really = fingerprints.sha256_file
    monkeypatch.setattr(fingerprints, "sha256_file", lambda p: pytest.fail("read") if p.suffix == ".jsonl" and "data" not in p.parts
                        else really(p))
    assert refused("before.jsonl", "none.jsonl")["message"] == "there is no file none.jsonl"
    assert refused("")["message"] == "a data file's name is empty"
    assert refused("before.jsonl", "--valid", "none.jsonl")["message"] == "there is no file none.jsonl"


def test_a_file_is_not_for_both_sides(refused):
    error = refused("before.jsonl", "--valid", "./before.jsonl")
    assert error["message"] == "before.jsonl is named for training and for validation"


def test_something_must_be_left_to_train_on(refused):
    write_rows(Path("again.jsonl"), [*rows(4), {"bad": 1}])
    error = refused("before.jsonl", "--valid", "again.jsonl")
    assert error["message"].startswith("no row is left for training: all that can be used is in the validation file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes among files")
def test_a_pipe_is_refused(refused):
    os.mkfifo("pipe")
    assert refused("pipe")["message"] == "pipe is not a regular file; save its content to a file first"


def test_a_file_without_permission_is_refused(refused, monkeypatch):
    """The superuser may read everything, so the answer is simulated."""
    monkeypatch.setattr("gemma_tune.data.reading.sources.os.access", lambda path, mode: path.name != "before.jsonl")
    assert refused("before.jsonl")["message"] == "no permission to read before.jsonl"


def test_a_home_that_does_not_exist_is_part_of_the_name(refused):
    assert refused("~nobody-has-this-name/rows.jsonl")["message"].startswith("there is no file ~nobody-has-this-name")


@pytest.mark.parametrize("content, message", [
    (b"", "bad.jsonl is empty"),
    (b" \n\t\r\n", "bad.jsonl is empty"),
    (codecs.BOM_UTF8 + b"\n", "bad.jsonl is empty"),
    (b"[]", "bad.jsonl is an empty list"),
    (b"\n [ \n ]\n", "bad.jsonl is an empty list"),
    (b"\x7fELF\x02\x01\x00\x00\xff", "bad.jsonl is a binary file (byte 6)"),
    (b'{"messages": "\0"}', "bad.jsonl is a binary file (byte 14)"),
    (b"\x1f\x8b\x08\xff" * 5, "bad.jsonl:1: not UTF-8 text (byte 0x8b)"),
    (json.dumps(row()).encode() + b'\n{"instruction": "caf\xe9"}', "bad.jsonl:2: not UTF-8 text (byte 0xe9)"),
    (codecs.BOM_UTF8 + b'\n\n"\xe9"', "bad.jsonl:3: not UTF-8 text (byte 0xe9)"),
    (json.dumps(row()).encode("utf-16-le")[:-1], "bad.jsonl seems to be UTF-16 text without its byte order mark"),
    (b'[\n{"messages": []},\n{"messages" []}\n]', "bad.jsonl:3: not valid JSON: Expecting ':' delimiter at column 13"),
    (b'[\n{"a": 1}\n{"a": 2}]', "bad.jsonl:3: not valid JSON: expected ',' or ']'"),
    (b'[\n{"a": 1},\n{"a": 2}', "bad.jsonl:3: not valid JSON: expected ',' or ']'"),
    (b'[\n{"a": 1},\n', "bad.jsonl:3: not valid JSON: Expecting value at column 1"),
    (b'[\n{"a": 1},\n,{}]', "bad.jsonl:3: not valid JSON: Expecting value"),
    (b"[", "bad.jsonl:1: not valid JSON: Expecting value"),
    (b"[1]\n\n[2]\n", "bad.jsonl:3: there is more after the end of the list"),
    (b'[{"a": NaN},\n{"a" 1}]', "bad.jsonl:2: not valid JSON: Expecting ':' delimiter"),
    (b"[\n" + b"[" * 50_000 + b"]" * 50_000 + b"]", "bad.jsonl:2: not valid JSON: nested too deeply"),
    (b'{\n  "messages": [\n    {"role" "user"}\n  ]\n}', "bad.jsonl:3: not valid JSON: Expecting ':' delimiter"),
    (b'{"data": [\n  {"a": 1},\n  {"a" 2}\n]}', "bad.jsonl:3: not valid JSON: Expecting ':' delimiter"),
    (b'\n{\n "a": [NaN]\n}', "bad.jsonl:2: not valid JSON: NaN is not JSON"),
    (b'[{"role": "user",\n"content": [NaN]}]', "bad.jsonl:1: not valid JSON: NaN is not JSON"),
    (b'[{"a": 1}]\n[{"a": 2}]\n', "bad.jsonl:2: there is more after the end of the list"),
    (b'{"data": {\n"x": 1\n}}', "the only row cannot be used"),
    (b'"just text"', "the only row cannot be used"),
    (b"question,answer\na,b\n", "none of the 2 rows can be used"),
], ids=lambda v: ascii(v)[:40] if isinstance(v, bytes) else None)
def test_files_that_hold_no_rows(refused, content, message):
    Path("bad.jsonl").write_bytes(content)
    error = refused("bad.jsonl")
    assert error["message"].startswith(message)
    if message.startswith(("none", "the only row")):
        assert error["problems"][0].startswith(("bad.jsonl:1: ", "bad.jsonl:1 and 1 more row: "))
    else:  # a file of which nothing can be read stops the others as well
        assert refused("before.jsonl", "bad.jsonl")["message"] == error["message"]


def test_a_broken_first_row_does_not_make_the_file_a_document(prepare):
    for broken in ('{"instruction": "a",', '{"instruction": [', '{"messages": [{', '{"n": ' + "1" * 5000 + "}",
                   '{"a":' * 2000, '{"x": Infinity}'):
        Path("rows.jsonl").write_text(broken + "\n" + json.dumps(row("b")) + "\n")
        prepare("rows.jsonl")
        assert [(r["line"], r["code"], r["row"]) for r in read("rejected")] == [(1, "broken_json", broken)]
        assert kept() == [row("b")["messages"]]


def test_more_bad_rows_than_allowed(refused, prepare):
    write_rows(Path("rows.jsonl"), [*rows(71), *({f"bad{n}": n} for n in range(29))])
    error = refused("rows.jsonl", "--max-rejected", 0.2)
    assert error["message"] == "29 of 100 rows cannot be used, more than the 20 % allowed"
    assert "--max-rejected 0.29" in error["hint"], "no more than these rows need"
    assert error["problems"][0].startswith("rows.jsonl:72: neither `messages` nor")
    assert error["problems"][20:] == ["… and 9 more, all in runs/tiny-gemma/rejected.jsonl"]
    assert "the 0.5 % allowed" in refused("rows.jsonl", "--max-rejected", 0.005)["message"]
    assert "the 28.9 % allowed" in refused("rows.jsonl", "--max-rejected", 0.289)["message"]
    # Exactly the share that is allowed is allowed; 0.29 * 100 is less than 29 in floating point.
    assert prepare("rows.jsonl", "--max-rejected", 0.29)["summary"]["rejected_rows"] == 29


def test_what_mends_most_rows_is_the_hint_also_where_others_have_other_faults(prepare):
    """Of rows that are named anew, how this run's were read before is told, which does not hold for them."""
    table = "".join(f"ask {n},say {n}\n" for n in range(9))
    Path("rows.csv").write_text(f"Customer Message,Agent Reply\n{table}only this\n")
    hint = ("rename the columns to `messages`, or to `instruction`, `input`, `output`, or name them with --columns "
            "user=…,assistant=…")
    assert prepare("rows.csv", code=2)["hint"] == hint
    columns = "user=Customer Message,assistant=Agent Reply"
    prepare("rows.csv", "--columns", columns)
    assert prepare("rows.csv", code=2)["hint"] == f"{hint}; before, this run's data were read with --columns '{columns}'"
    write_rows(Path("good.jsonl"), rows(3))
    error = prepare("good.jsonl", "rows.csv", "--max-rejected", 0.2, code=2)
    assert error["hint"].startswith(f"{hint}, or go on without them: --max-rejected 0.77; before, ")


def test_no_bad_row_at_all_is_allowed(refused, prepare):
    write_rows(Path("rows.jsonl"), [*rows(50), {"bad": 1}])
    assert "1 of 51 rows cannot be used" in refused("rows.jsonl", "--max-rejected", 0)["message"]


def test_repeated_rows_are_not_errors(prepare):
    write_rows(Path("rows.jsonl"), [row("a")] * 9)
    done = prepare("rows.jsonl", "--max-rejected", 0, "--on-bad-row", "fail")
    assert (done["summary"]["duplicate_rows"], done["summary"]["rejected_by_reason"]) == (8, {})


def test_a_bad_row_stops_where_that_is_asked(refused):
    write_rows(Path("rows.jsonl"), [*rows(20), {"bad": 1}, row("a", "<eos>")])
    error = refused("rows.jsonl", "--on-bad-row", "fail")
    assert error["message"] == "2 of 22 rows cannot be used"
    assert [p.split(": ")[0] for p in error["problems"]] == ["rows.jsonl:21", "rows.jsonl:22"]
    assert "--on-bad-row reject" in error["hint"]




def test_rejected_rows_may_be_edited(prepare, cli):
    prepare(write_rows(Path("some.jsonl"), [*rows(12), {"messages": []}]))
    for name in ("rejected.jsonl", "duplicates.jsonl", "report.json"):
        (DATA / name).write_text("repaired")
    assert cli("status", "--json").json["stages"]["prepare"]["state"] == "done"


@pytest.mark.parametrize(("template", "fix"), [
    ("{{ raise_exception('no ' ~ messages[0].content) }}", "change the conversation so that the chat template takes it"),
    ("", "use a model whose chat template has tools, or leave the row out")])
def test_the_advice_does_not_come_from_words_that_a_message_quotes(tiny, tmp_path, template, fix):
    """A user may talk about tools, and a template may quote it."""
    folder = tmp_path / "models" / tiny.name
    shutil.copytree(tiny, folder)
    own = (ROOT / "gemma_tune/encoding/templates/gemma.jinja").read_text()
    (folder / "chat_template.jinja").write_text(
        "{% if 'toolbox' in messages[0].content %}" + template + "{% endif %}" + own)
    asked = row("Which toolbox?") if template else {**row("Which toolbox?"), "tools": [{"name": "f", "description": "d"}]}
    write_rows(Path("rows.jsonl"), [*rows(4), asked])
    assert invoke("prepare", "rows.jsonl", "--model", folder, "--max-rejected", 1).code == 0
    [rejected] = read("rejected", folder.parent.parent / "runs" / tiny.name / "data")
    assert fix in json.dumps(rejected)


def test_what_is_not_read_is_listed(cli, tiny, tmp_path):
    records = [{**record, "mood": n % 2, "id": n, "source": "here"} for n, record in enumerate(rows(12))]
    records[3]["messages"][1]["rating"] = 5
    done = cli("prepare", write_rows(tmp_path / "r.jsonl", records), "--model", tiny, "--run", "run")
    assert done.code == 0, done.err
    said = done.err[done.err.index("not read"):]
    for name in ("mood", "rating", "id", "source"):
        assert name in said
    found = {item["name"]: (item["where"], item["rows"]) for item in json.loads(Path("run/data/report.json").read_text())["unread"]}
    assert found == {"mood": ("column", 12), "id": ("column", 12), "source": ("column", 12), "rating": ("key", 1)}
