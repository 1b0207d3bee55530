"""Pairs and marks in the shapes that people have them: what is read, what is said not to be, and what is asked about."""

from __future__ import annotations

import shlex

import pytest

from gemma_tune.config.stages import PrepareConfig
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.problems import RowError
from support.command import write_rows

ASKED = [{"role": "user", "content": "q"}]
WHOLE = [*ASKED, {"role": "assistant", "content": "c"}]
PAIR = {"chosen": "c", "rejected": "r"}


def read(row, **how):
    example = Formats(**how).example(row)
    return ([turn["content"] for turn in example.messages], example.rejected and [turn["content"] for turn in example.rejected],
            example.good, [item.name for item in example.unread])


def problem(row, **how):
    with pytest.raises(RowError) as caught:
        Formats(**how).example(row)
    return caught.value.problems[0]


@pytest.mark.parametrize(("row", "turns", "unread"), [
    ({"prompt": "q", "history": [["a", "b"]]}, ["a", "b", "q"], []),
    ({"prompt": ASKED, "history": [["a", "b"]]}, ["a", "b", "q"], []),
    ({"prompt": "q", "input": "more"}, ["q\n\nmore"], []), ({"input": "q"}, ["q"], []),
    ({"instruction": "q", "input": "more", "chat_history": [["a", "b"]]}, ["a", "b", "q\n\nmore"], []),
    ({"prompt": "other", "instruction": "q"}, ["q"], ["prompt"]), ({"question": "q", "query": "other"}, ["q"], ["query"]),
    # A whole conversation beside: its answer stands in a column of its own, or the text is the question.
    ({"prompt": "q", "messages": WHOLE}, ["q"], []), ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]}, ["q"], []),
    ({"prompt": "q", "messages": [*WHOLE[:1], {"role": "assistant", "content": "else"}]}, ["q"], ["messages"])])
def test_the_prompt_of_a_pair_is_all_that_the_row_has_of_it(row, turns, unread):
    assert read(row | PAIR) == ([*turns, "c"], ["r"], None, unread)
    if not any(name in row for name in ("messages", "conversations", "instruction")):
        marked = {"completion": "c", "label": False} if "prompt" in row else {"answer": "c", "kto_tag": 0}
        assert read(row | marked) == ([*turns, "c"], None, False, unread)


def test_what_repeats_the_conversation_is_read_and_what_contradicts_it_is_not():
    whole = {"chosen": WHOLE, "rejected": [*ASKED, {"role": "assistant", "content": "r"}]}
    assert read(whole | {"prompt": "q"}) == read(whole | {"prompt": ASKED}) == (["q", "c"], ["r"], None, [])
    assert read(whole | {"prompt": "else"}) == (["q", "c"], ["r"], None, ["prompt"])
    assert read({"prompt": "q", **PAIR, "completion": "x", "label": False, "kto_tag": False})[3] == ["completion", "label", "kto_tag"]
    assert read({"prompt": "q", "chosen": ["c"], "rejected": ["r"]}) == (["q", "c"], ["r"], None, [])


@pytest.mark.parametrize("row", [
    {"question": "q", "response": "c", "kto_tag": True}, {"query": "q", "answer": "c", "kto_tag": 1},
    {"instruction": "q", "output": "c", "label": True}, {"instruction": "q", "response": "c", "kto_tag": "true"},
    {"instruction": "q", "input": "", "output": "c", "kto_tag": True}, {"messages": WHOLE, "label": True}])
def test_one_answer_with_a_mark(row):
    assert read(row) == (["q", "c"], None, True, [])


@pytest.mark.parametrize("value", [-1, "-1", "好", "差", "Good", "bad", "yes", "no", "正确"])
@pytest.mark.parametrize(("row", "format"), [({"prompt": "q", "completion": "c"}, "prompt-completion"),
                                             ({"messages": WHOLE}, "messages"), ({"instruction": "q", "output": "c"}, "alpaca")])
def test_a_mark_that_cannot_be_read_is_asked_about(value, row, format):
    """Without it a bad answer would be learned like a good one."""
    row = row | {"label": value}
    for how in ({}, {"take": "chosen"}, {"name": "preference"}):
        found = problem(row, **how)
        assert found.code == "preference" and f"`label` is {value!r} beside an answer" in found.reason
        assert f"--format {format} learns every answer" in found.fix
    assert read(row, name=format) == (["q", "c"], None, None, ["label"])
    assert "`kto_tag` is" in problem(row | {"kto_tag": value}).reason


@pytest.mark.parametrize("value", ["finance", 3, 0.5, "positive sentiment", None, [1], {"a": 1}])
def test_a_class_is_no_mark(value):
    row = {"prompt": "q", "completion": "c", "label": value}
    assert read(row) == (["q", "c"], None, None, ["label"] if value is not None else [])


def test_marks_that_contradict_each_other():
    row = {"prompt": "q", "completion": "c", "label": True, "kto_tag": False}
    assert "`kto_tag` and `label` contradict each other" in problem(row).reason
    assert read(row | {"kto_tag": True})[:3] == (["q", "c"], None, True)


def test_hh_in_chinese():
    pair = {side: f"\n\n人类：你好\n\n助手：{said}" for side, said in (("chosen", "您好"), ("rejected", "哼"))}
    assert read(pair) == (["你好", "您好"], ["哼"], None, [])


@pytest.mark.parametrize("row", [
    {"问题": "q", "好的回答": "c", "坏的回答": "r"}, {"prompt": "q", "chosen_response": "c", "rejected_response": "r"},
    {"question": "q", "response_good": "c", "response_bad": "r", "id": 3}, {"query": "q", "winner": "c", "loser": "r"}])
def test_pairs_under_other_names_are_named(row):
    fix = problem(row).fix
    use, option, named = shlex.split(fix)
    assert (use, option) == ("use", "--columns") and ",chosen=" in named and ",rejected=" in named
    columns = PrepareConfig(columns=tuple(named.split(","))).column_names
    assert read(row, columns=columns)[:3] == (["q", "c"], ["r"], None)
    assert "neither" in problem({"other": 1}, columns=columns).reason
    assert read({"messages": WHOLE}, columns=columns)[0] == ["q", "c"], "rows of another format"


def test_columns_of_pairs_that_lack_one(cli, tiny, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"q": f"q{n}", "c": f"c{n}", "r": f"r{n}"} for n in range(8)])
    for columns in ("user=q,chosen=c", "user=q,chosen=c,rejected=r,assistant=c", "chosen=c,rejected=r,turns=q"):
        refused = cli("prepare", data, "--model", tiny, "--columns", columns)
        assert refused.code == 2 and "pairs need `user=…`, `chosen=…` and `rejected=…`" in refused.err, refused.err
    done = cli("prepare", data, "--model", tiny, "--columns", "user=q,chosen=c,rejected=r", "--json")
    assert done.code == 0 and done.json["summary"]["kind"] == "pairs", done.err


def test_named_columns_do_not_hide_a_mark():
    row = {"instruction": "q", "output": "c", "kto_tag": False}
    assert "`kto_tag` marks good and bad answers" in problem(row, columns={"user": "instruction", "assistant": "output"}).reason
