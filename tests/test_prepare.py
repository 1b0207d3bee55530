"""``prepare`` on every kind of input: what is read, what is rejected and why, how it is split, and what stays whole."""

from __future__ import annotations

import codecs
import io
import json
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke, rows, write_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_tune.errors import BAD_INPUT
Good = split = None

# The same examples every time. To look for more, raise max_examples and leave derandomize out.
same_examples = settings(derandomize=True, database=None, deadline=None, max_examples=60, suppress_health_check=[
    HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

DATA = Path("runs/tiny-gemma/data")
SIDES = ("train", "valid", "rejected")


def row(question: str = "What is a bond?", answer: str = "A loan.", system: str | None = None) -> dict[str, Any]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def alpaca(instruction: Any = "Add.", output: Any = "3", **more: Any) -> dict[str, Any]:
    return {"instruction": instruction, "output": output, **more}


def read(side: str, folder: Path = DATA) -> list[Any]:
    """Rows of one of the three files; reading is strict JSON."""
    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (folder / f"{side}.jsonl").read_bytes().decode("utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def kept() -> list[list[dict[str, str]]]:
    """The conversations for training and validation together."""
    return [record["messages"] for side in ("train", "valid") for record in read(side)]


@pytest.fixture
def prepare(cli, tiny):
    """``prepare`` on the tiny model, with no limit on rejected rows; the JSON result of a success."""
    def call(*args: object, code: int = 0) -> dict[str, Any]:
        if "--max-rejected" not in args:
            args = (*args, "--max-rejected", 1)
        result = cli("prepare", *args, "--model", tiny, "--json")
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        if code == 0:
            summary = result.json["summary"]
            counts = {side: len(read(side)) for side in SIDES}
            assert summary["rows"] == sum(counts.values())
            assert {side: summary[f"{side}_rows"] for side in SIDES} == counts
            assert summary["rejected_by_reason"] == Counter(r["code"] for r in read("rejected"))
            return result.json | {"err": result.err}
        return result.json["error"] | {"err": result.err}

    return call


@pytest.fixture
def rejected(prepare):
    """The single record in rejected.jsonl for a file with one good row and the given bad one."""
    def call(bad: Any, *args: object) -> dict[str, Any]:
        text = bad if isinstance(bad, str) else json.dumps(bad)
        Path("rows.jsonl").write_text(json.dumps(row("good")) + "\n" + text + "\n", encoding="utf-8")
        summary = prepare("rows.jsonl", "--force", *args)["summary"]
        [record] = read("rejected")
        assert (summary["rows"], summary["rejected_rows"], summary["train_rows"]) == (2, 1, 1)
        assert set(record) == {"file", "line", "code", "reason", "fix", "row"}
        assert (record["file"], record["line"]) == ("rows.jsonl", 2)
        assert record["reason"] and record["fix"]
        assert record["row"] == (bad if record["code"] == "broken_json" else json.loads(text))
        return record

    return call


# --- what is read

def test_conversations_come_out_as_they_went_in(prepare):
    several = {"messages": [*row()["messages"], {"role": "user", "content": "And a share?"},
                            {"role": "assistant", "content": "A part of a firm."}], "id": 7}
    done = prepare(write_rows(Path("rows.jsonl"), [several, *rows(3)]), "--valid", 0)
    assert read("train") == [{"messages": several["messages"]}, *rows(3)]
    assert read("valid") == read("rejected") == []
    assert done["summary"]["turns"] == 4 + 3 * 2
    assert (done["stage"], done["status"], done["run"]) == ("prepare", "done", "runs/tiny-gemma")
    assert done["artifacts"] == {f"{side}_rows": str(DATA / f"{side}.jsonl") for side in SIDES}
    assert done["next"] == ["gemma-tune train --run runs/tiny-gemma"]


def test_figures_about_the_tokens(prepare):
    done = prepare(write_rows(Path("rows.jsonl"), [row(answer="word " * n) for n in (1, 2, 40)]))["summary"]
    assert done["shortest"] < done["longest"] == done["p99"]
    assert done["shortest"] <= done["p50"] <= done["p90"] <= done["p99"]
    assert 0 < done["trained_tokens"] < done["tokens"] <= 3 * done["longest"]
    assert done["max_length"] == 2048


@pytest.mark.parametrize("value, question, system", [
    (alpaca(), "Add.", None),
    (alpaca(input="1 and 2"), "Add.\n\n1 and 2", None),
    (alpaca(input=""), "Add.", None),
    (alpaca(input=None, system=None), "Add.", None),
    (alpaca(input="  \n"), "Add.", None),
    (alpaca(system="Be brief."), "Add.", "Be brief."),
    (alpaca(input="1 and 2", system=" Be brief. "), "Add.\n\n1 and 2", "Be brief."),
    (alpaca("", input="1 and 2"), "1 and 2", None),
    (alpaca(None, input="1 and 2"), "1 and 2", None),
    (alpaca(" Add. ", " 3 ", source="web"), "Add.", None),
])
def test_alpaca_rows_become_conversations(prepare, value, question, system):
    prepare(write_rows(Path("rows.jsonl"), [value]))
    assert kept() == [row(question, "3", system)["messages"]]


def test_both_formats_in_one_file(prepare):
    prepare(write_rows(Path("rows.jsonl"), [row("a"), alpaca("b"), row("c")]), "--valid", 0)
    assert [m[0]["content"] for m in kept()] == ["a", "b", "c"]


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


def test_a_file_with_one_row(prepare):
    summary = prepare(write_rows(Path("rows.jsonl"), [row()]))["summary"]
    assert (summary["train_rows"], summary["valid_rows"]) == (1, 0)


def test_several_files_are_read_in_order(prepare):
    write_rows(Path("one.jsonl"), [row("a"), {"bad": 1}])
    Path("two.json").write_text(json.dumps([row("b"), 7], indent=1))
    prepare("one.jsonl", "two.json", "--valid", 0)
    assert [m[0]["content"] for m in kept()] == ["a", "b"]
    assert [(r["file"], r["line"]) for r in read("rejected")] == [("one.jsonl", 2), ("two.json", 14)]


def test_a_system_message_is_folded_where_the_template_has_none(prepare, tiny, cli):
    """The tiny model gets Gemma's template, which has no system role: its text opens the first user turn."""
    prepare(write_rows(Path("rows.jsonl"), [row(), row(system="Answer as a banker would.")]), "--valid", 0)
    from gemma_tune.models import load_format

    chat = load_format(tiny, "gemma3_text")
    plain, folded = (chat.tokenizer.decode(chat.encode(messages).ids) for messages in kept())
    assert kept()[1][0] == {"role": "system", "content": "Answer as a banker would."}
    assert folded == plain.replace("user\nWhat", "user\nAnswer as a banker would.\n\nWhat")
    assert "system" not in folded


# --- what is rejected

USER, ANSWER = row()["messages"]


@pytest.mark.parametrize("bad, code, reason", [
    ("{", "broken_json", "Expecting property name"),
    ('{"messages": [', "broken_json", "Expecting value at column 15"),
    (json.dumps(row("cut off"))[:-9], "broken_json", "Unterminated string starting at column"),
    (json.dumps(row("a")) + json.dumps(row("b")), "broken_json", "Extra data at column"),
    ('{"messages": [{"role": "user", "content": "a\tb"}]}', "broken_json", "Invalid control character at column"),
    ("question,answer", "broken_json", "Expecting value at column 1"),
    ('{"instruction": "a", "output": NaN}', "broken_json", "NaN is not JSON"),
    ('{"instruction": "a", "output": "b", "score": -Infinity}', "broken_json", "-Infinity is not JSON"),
    ('{"instruction": "a", "output": "b", "score": 1e999}', "broken_json", "the number 1e999 is too large"),
    ('{"instruction": "a", "output": "b", "score": ' + "7" * 5000 + "}", "broken_json", f"number {'7' * 24}… is too large"),
    ('{"instruction": "a", "output": "b", "extra": ' + "[" * 50_000 + "]" * 50_000 + "}", "broken_json", "nested too deeply"),
    ('{"a":' * 300 + "1" + "}" * 300, "broken_json", "nested too deeply"),
    ("[" * 980 + "]" * 980, "broken_json", "nested too deeply"),
    ('{"a": ' + "[" * 90 + "9" * 4000 + "]" * 90 + "}", "unknown_format", "it has 'a'"),
    ("7", "not_an_object", "this one is a number"),
    ("null", "not_an_object", "this one is missing"),
    ('"text"', "not_an_object", "this one is text"),
    ("[]", "not_an_object", "this one is a list"),
    ("true", "not_an_object", "this one is true or false"),
    ("{}", "unknown_format", "it has nothing"),
    ({"prompt": "a", "completion": "b"}, "unknown_format", "it has 'prompt', 'completion'"),
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
    ({"messages": [USER, {"role": "tool", "content": "a"}]}, "unknown_role", "turn 2 has the role 'tool'"),
    ({"messages": [{"role": "user"}, ANSWER]}, "not_text", "the content of turn 1 is missing"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]}, "not_text", "turn 1 is a list"),
    ({"messages": [USER, {"role": "assistant", "content": 3}]}, "not_text", "turn 2 is a number"),
    ({"messages": [USER, {"role": "assistant", "content": " \n\u00a0"}]}, "empty_turn", "turn 2 (assistant) is empty"),
    ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]}, "tool_calls", "turn 2"),
    ({"messages": [{"role": "system", "content": ""}, USER, ANSWER]}, "empty_turn", "turn 1 (system) is empty"),
    ({"messages": [USER]}, "no_answer", "ends with `user`"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no_answer", "ends with `system`"),
    ({"messages": [USER, ANSWER, USER]}, "no_answer", "ends with `user`"),
    ({"messages": [ANSWER]}, "alternation", "turn 1 is `assistant` where `user` is expected"),
    ({"messages": [USER, USER, ANSWER]}, "alternation", "turn 2 is `user` where `assistant` is expected"),
    ({"messages": [{"role": "system", "content": "s"}, ANSWER]}, "alternation", "turn 2 is `assistant`"),
    ({"messages": [USER, ANSWER, {"role": "system", "content": "s"}, USER, ANSWER]}, "system_inside", "turn 3"),
    (alpaca(instruction=["a"]), "not_text", "`instruction` is a list"),
    (alpaca(input={"a": 1}), "not_text", "`input` is an object"),
    (alpaca(system=1), "not_text", "`system` is a number"),
    (alpaca(output=None), "not_text", "turn 2 is missing"),
    (alpaca(instruction=""), "empty_turn", "turn 1 (user) is empty"),
    (alpaca(output=" "), "empty_turn", "turn 2 (assistant) is empty"),
    (row("a\ud800b"), "broken_text", "turn 1 contains damaged characters"),
    (row("a", "\udfff"), "broken_text", "turn 2 contains damaged characters"),
    (row("Caf\ufffd"), "broken_text", "turn 1 contains damaged characters"),
    (alpaca(output="\udc00"), "broken_text", "turn 2"),
    (row("a<end_of_turn>\n<start_of_turn>model\nb"), "template_marker", "turn 1 contains the chat template's own <"),
    (row("a", "b<end_of_turn>"), "template_marker", "turn 2 contains the chat template's own <end_of_turn>"),
    (row(system="<bos>"), "template_marker", "turn 1 contains the chat template's own <bos>"),
    (row("a<eos>"), "template_marker", "<eos>"),
    (row("good"), "duplicate", "the same conversation as rows.jsonl:1"),
    (row("  good\n", "A loan. "), "duplicate", "the same conversation as rows.jsonl:1"),
], ids=lambda v: v[:40] if isinstance(v, str) else None)
def test_what_cannot_be_learned_is_kept_with_its_reason(rejected, bad, code, reason):
    record = rejected(bad)
    assert record["code"] == code
    assert reason in record["reason"]
    assert len(record["reason"]) < 400 and "\n" not in record["reason"]


def test_what_looks_like_a_marker_of_another_template_is_text(prepare):
    prepare(write_rows(Path("rows.jsonl"), [row("What does <|im_end|> or <b>bold</b> or [INST] mean?")]))
    assert "<|im_end|>" in kept()[0][0]["content"]


def test_a_row_that_is_too_long_is_rejected_with_its_length(rejected, prepare):
    long = row("long", "word " * 60)
    record = rejected(long, "--max-length", 80)
    assert record["code"] == "too_long"
    length = int(re.match(r"(\d+) tokens are more than --max-length 80", record["reason"])[1])
    assert record["fix"] == f"use --max-length {length}, or shorten the conversation"
    assert prepare("rows.jsonl", "--max-length", length)["summary"]["longest"] == length
    assert prepare("rows.jsonl", "--max-length", length - 1)["summary"]["rejected_by_reason"] == {"too_long": 1}


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
    from gemma_tune.console import result_json

    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr("sys.stdout", stream)
    for value in ({"file": "\udcff.jsonl"}, {"file": "数据 é"}):
        result_json(value)
        assert json.loads(stream.buffer.getvalue().decode(encoding).splitlines()[-1]) == value
    assert ("数据".encode() in stream.buffer.getvalue()) == (encoding == "utf-8")


def test_many_rejected_rows_are_summed_up(prepare):
    bad = [{"n": n} for n in range(14)] + [row("a")] * 2 + ["text"]
    done = prepare(write_rows(Path("rows.jsonl"), [row("a"), *bad]))
    assert done["summary"]["rejected_by_reason"] == {"unknown_format": 14, "duplicate": 2, "not_an_object": 1}
    assert done["err"].count("! rejected rows.jsonl:") == 10
    assert "… and 7 more, all in runs/tiny-gemma/data/rejected.jsonl" in done["err"]
    assert [r["line"] for r in read("rejected")] == list(range(2, 19))


def test_lines_of_an_array_are_those_where_its_elements_begin(prepare):
    text = '\n[\n  {"messages": [\n    {"role": "user"}\n  ]},\n\n  7, 8,\n' + json.dumps(row("a")) + ', {\n"x": 1},\n[\n]\n]\n'
    Path("rows.json").write_text(text)
    prepare("rows.json")
    assert [(r["line"], r["row"]) for r in read("rejected")] == [
        (3, {"messages": [{"role": "user"}]}), (7, 7), (7, 8), (8, {"x": 1}), (10, [])]


@pytest.mark.parametrize("value, reason", [("NaN", "NaN is not JSON"), ("1e999", "1e999 is too large"),
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
    before = {p.name: p.read_bytes() for p in DATA.parent.rglob("*") if p.is_file()}

    def call(*args: object) -> dict[str, Any]:
        error = prepare(*args, code=BAD_INPUT)
        assert error["exit_code"] == BAD_INPUT
        assert error["hint"]
        assert error["err"].count("Error:") == error["err"].count("Hint:") == 1
        assert {p.name: p.read_bytes() for p in DATA.parent.rglob("*") if p.is_file()} == before
        return error

    return call


def test_missing_files_are_named_together(refused):
    assert refused("none.jsonl")["message"] == "there is no file none.jsonl"
    Path("folder").mkdir()
    error = refused("none.jsonl", "before.jsonl", "folder", "none/at/all.json", "x" * 300)
    assert error["message"] == "4 data files cannot be read"
    assert error["problems"] == ["there is no file none.jsonl", "folder is a directory; name the files in it",
                                 "there is no file none/at/all.json", f"there is no file {'x' * 300}"]


def test_a_directory_is_refused_before_its_files_are_read(refused, monkeypatch):
    Path("folder").mkdir()
    write_rows(Path("folder/rows.jsonl"), rows(2))
    from gemma_tune import files

    really = files.sha256_file
    monkeypatch.setattr(files, "sha256_file",
                        lambda p: pytest.fail("read") if p.name == "rows.jsonl" else really(p))
    assert refused("folder")["message"] == "folder is a directory; name the files in it"
    assert "is a directory" in refused("")["message"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes among files")
def test_a_pipe_is_refused(refused):
    os.mkfifo("pipe")
    assert refused("pipe")["message"] == "pipe is not a regular file; save its content to a file first"


def test_a_file_without_permission_is_refused(refused, monkeypatch):
    """The superuser may read everything, so the answer is simulated."""
    monkeypatch.setattr("gemma_tune.prepare.os.access", lambda path, mode: path.name != "before.jsonl")
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
    (json.dumps(row()).encode("utf-16"), "bad.jsonl is UTF-16 text, not UTF-8"),
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
    (b'\n{\n "a": NaN\n}', "bad.jsonl:2: not valid JSON: NaN is not JSON"),
    (b'{"data": {\n"x": 1\n}}', "none of the 1 rows can be used"),
    (b'"just text"', "none of the 1 rows can be used"),
    (b"question,answer\na,b\n", "none of the 2 rows can be used"),
], ids=lambda v: ascii(v)[:40] if isinstance(v, bytes) else None)
def test_files_that_hold_no_rows(refused, content, message):
    Path("bad.jsonl").write_bytes(content)
    error = refused("bad.jsonl")
    assert error["message"].startswith(message)
    if message.startswith("none"):
        assert error["problems"][0].startswith("bad.jsonl:1: ")
    else:  # a file of which nothing can be read stops the others as well
        assert refused("before.jsonl", "bad.jsonl")["message"] == error["message"]


def test_a_broken_first_row_does_not_make_the_file_a_document(prepare):
    for broken in ('{"instruction": "a",', '{"instruction": [', '{"messages": [{', '{"n": ' + "1" * 5000 + "}",
                   '{"a":' * 2000, '{"x": NaN}'):
        Path("rows.jsonl").write_text(broken + "\n" + json.dumps(row("b")) + "\n")
        prepare("rows.jsonl")
        assert [(r["line"], r["code"], r["row"]) for r in read("rejected")] == [(1, "broken_json", broken)]
        assert kept() == [row("b")["messages"]]


def test_more_bad_rows_than_allowed(refused, prepare):
    write_rows(Path("rows.jsonl"), [*rows(71), *({"bad": n} for n in range(29))])
    error = refused("rows.jsonl", "--max-rejected", 0.2)
    assert error["message"] == "29 of 100 rows cannot be used, more than the 20 % allowed"
    assert "--max-rejected 1" in error["hint"]
    assert error["problems"][0].startswith("rows.jsonl:72: neither `messages` nor")
    assert error["problems"][20:] == ["… and 9 more"]
    assert "the 0.5 % allowed" in refused("rows.jsonl", "--max-rejected", 0.005)["message"]
    assert "the 28.9 % allowed" in refused("rows.jsonl", "--max-rejected", 0.289)["message"]
    # Exactly the share that is allowed is allowed; 0.29 * 100 is less than 29 in floating point.
    assert prepare("rows.jsonl", "--max-rejected", 0.29)["summary"]["rejected_rows"] == 29


def test_no_bad_row_at_all_is_allowed(refused, prepare):
    write_rows(Path("rows.jsonl"), [*rows(50), {"bad": 1}])
    assert "1 of 51 rows cannot be used" in refused("rows.jsonl", "--max-rejected", 0)["message"]


def test_repeated_rows_are_not_errors(prepare):
    write_rows(Path("rows.jsonl"), [row("a")] * 9)
    done = prepare("rows.jsonl", "--max-rejected", 0, "--on-bad-row", "fail")
    assert done["summary"]["rejected_by_reason"] == {"duplicate": 8}


def test_a_bad_row_stops_where_that_is_asked(refused):
    write_rows(Path("rows.jsonl"), [*rows(20), {"bad": 1}, row("a", "<eos>")])
    error = refused("rows.jsonl", "--on-bad-row", "fail")
    assert error["message"] == "2 of 22 rows cannot be used"
    assert [p.split(": ")[0] for p in error["problems"]] == ["rows.jsonl:21", "rows.jsonl:22"]
    assert "--on-bad-row reject" in error["hint"]


# --- the split

def divide(values: list[dict[str, Any]], share: float = 0.3, seed: int = 1) -> tuple[list[Any], list[Any]]:
    train, valid = split([Good(None, value["messages"], None) for value in values], share, seed)
    return [g.messages for g in train], [g.messages for g in valid]


def test_the_split_is_the_same_every_time_and_in_any_order(prepare):
    values = rows(40)
    train, valid = divide(values)
    assert divide(values) == (train, valid)
    assert len(valid) == 12
    assert [m for m in (v["messages"] for v in values) if m in valid] == valid, "in the order of the file"
    shuffled = random.Random(3).sample(values, len(values))
    assert sorted(map(str, divide(shuffled)[1])) == sorted(map(str, valid))
    assert divide(values, seed=2)[1] != valid
    for order in (values, shuffled):
        prepare(write_rows(Path("rows.jsonl"), order), "--valid", 0.3, "--seed", 1)
        assert sorted(str(r["messages"]) for r in read("valid")) == sorted(map(str, valid))


def test_more_rows_move_few_of_those_that_were_there():
    before, after = divide(rows(100), 0.1)[1], divide(rows(110), 0.1)[1]
    assert len([m for m in before if m in after]) >= 8


@same_examples
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5)), min_size=1, max_size=40),
       st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.9]), st.integers(0, 3))
def test_the_same_prompt_never_lies_on_both_sides(pairs, share, seed):
    values = [row(question, f"answer {n}") for question, n in pairs]
    train, valid = divide(values, share, seed)
    assert Counter(map(str, train + valid)) == Counter(str(v["messages"]) for v in values)
    prompts = [{messages[0]["content"] for messages in side} for side in (train, valid)]
    assert not prompts[0] & prompts[1]
    assert train
    assert bool(valid) == (share > 0 and len({question for question, _ in pairs}) > 1)
    sizes = Counter(question for question, _ in pairs)
    assert len(valid) <= max(share * len(values) + 0.5, min(sizes.values()))


def test_a_prompt_with_most_of_the_rows_is_not_validation():
    values = [row("often", f"answer {n}") for n in range(95)] + [row(f"rare {n}") for n in range(5)]
    for seed in range(20):
        train, valid = divide(values, 0.05, seed)
        assert len(valid) == 5 and len(train) == 95


def test_system_prompts_and_earlier_turns_belong_to_the_prompt():
    values = [row("q", f"answer {n}", system=f"s{n}") for n in range(20)]
    train, valid = divide(values, 0.25)
    assert (len(train), len(valid)) == (15, 5)


def test_a_share_of_zero_gives_an_empty_file(prepare):
    assert prepare(write_rows(Path("rows.jsonl"), rows(5)), "--valid", 0)["summary"]["valid_rows"] == 0
    assert (DATA / "valid.jsonl").read_bytes() == b""
    assert (DATA / "rejected.jsonl").read_bytes() == b""


def test_two_prompts_are_enough_for_both_sides(prepare):
    for share in (0.01, 0.9):
        summary = prepare(write_rows(Path("rows.jsonl"), rows(2)), "--valid", share)["summary"]
        assert (summary["train_rows"], summary["valid_rows"]) == (1, 1)


def test_the_same_rows_give_the_same_bytes(prepare):
    path = write_rows(Path("rows.jsonl"), [*rows(9), {"bad": "é\u2028"}])
    prepare(path)
    before = {side: (DATA / f"{side}.jsonl").read_bytes() for side in SIDES}
    assert prepare(path)["status"] == "up-to-date"
    assert prepare(path, "--force")["status"] == "done"
    assert {side: (DATA / f"{side}.jsonl").read_bytes() for side in SIDES} == before


# --- any input at all

texts = st.one_of(st.sampled_from(["hi", " ", "", "<end_of_turn>", "a\u2028b", "\ufffd", "\ud800", "0"]), st.text(max_size=8))
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                      max_leaves=6)
turns = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]) | values,
                               "content": texts | values})
conversations = st.one_of(
    st.builds(row, st.text(min_size=1, max_size=5), st.text(min_size=1, max_size=5), st.none() | texts),
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=4) | values}),
    st.fixed_dictionaries({"instruction": texts | values, "output": texts | values},
                          optional={"input": texts | values, "system": values, "more": values}))
lines = st.one_of(conversations.map(json.dumps), values.map(json.dumps),
                  st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=["Cs"]), max_size=12))


@same_examples
@given(content=st.lists(lines, max_size=6), array=st.booleans(), newline=st.sampled_from(["\n", "\r\n"]))
def test_every_row_ends_up_in_exactly_one_file(tiny, content, array, newline):
    text = "[" + f",{newline}".join(content) + "]" if array else newline.join([*content, ""])
    Path("any.jsonl").write_bytes(text.encode())
    result = invoke("prepare", "any.jsonl", "--model", tiny, "--run", "any", "--max-rejected", 1, "--json", "--force")
    assert result.code in (0, BAD_INPUT), result.err
    if result.code == BAD_INPUT:
        assert result.json["error"]["hint"]
        return
    summary = result.json["summary"]
    sides = {side: read(side, Path("any/data")) for side in SIDES}
    assert {side: summary[f"{side}_rows"] for side in SIDES} == {side: len(found) for side, found in sides.items()}
    if array:
        assert summary["rows"] == sum(map(len, sides.values()))
        return
    numbers = [n for n, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1) if line.strip()]
    assert summary["rows"] == len(numbers)
    rejected = [record["line"] for record in sides["rejected"]]
    assert len(set(rejected)) == len(rejected) and set(rejected) <= set(numbers)
    for record in sides["rejected"]:
        line = text.removeprefix("\ufeff").split("\n")[record["line"] - 1]
        if record["code"] == "broken_json":
            assert record["row"] == line.rstrip("\r")
        else:
            assert record["row"] == json.loads(line.removeprefix("\ufeff"))
    for record in (*sides["train"], *sides["valid"]):
        assert record["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_a_turn_that_asks_not_to_be_learned_is_not_learned_in_silence(cli, tiny, tmp_path, mark):
    marked = rows(1)[0]
    marked["messages"][1] |= mark
    path = write_rows(tmp_path / "weights.jsonl", [*rows(12)[1:], marked])
    assert cli("prepare", path, "--model", tiny).code == 0
    [rejected] = map(json.loads, Path("runs/tiny-gemma/data/rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["code"]) == (12, "turn_weight")


def test_rejected_rows_may_be_edited(cli, tiny, tmp_path):
    path = write_rows(tmp_path / "some.jsonl", [*rows(12), {"messages": []}])
    assert cli("prepare", path, "--model", tiny).code == 0
    Path("runs/tiny-gemma/data/rejected.jsonl").write_text("repaired")
    assert cli("status", "--json").json["stages"]["prepare"]["state"] == "done"
