"""Pairs and marks in the shapes that people have them: what is read, what is said not to be, and what is asked about."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess

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


@pytest.mark.parametrize("row", [{"messages": WHOLE}, {"指令": "q", "输出": "c"}, {"instruction": "q", "output": "c"}])
def test_a_mark_in_chinese_is_one(row):
    assert read(row | {"标签": True}) == (["q", "c"], None, True, [])
    assert read(row | {"标签": False}) == (["q", "c"], None, False, [])
    assert "`标签` is '差' beside an answer" in problem(row | {"标签": "差"}).reason
    assert "`标签` is '差' beside an answer" in problem(row | {"label": None, "标签": "差"}).reason
    assert read(row | {"标签": "金融"}) == (["q", "c"], None, None, ["标签"])


@pytest.mark.parametrize(("empty", "mark"), [("label", "标签"), ("标签", "label")])
def test_an_empty_mark_leaves_the_other_one(empty, mark):
    row = {"prompt": "q", "completion": "c", empty: None}
    assert [read(row | {mark: value}) for value in (1, 0)] == [(["q", "c"], None, True, []), (["q", "c"], None, False, [])]
    assert Formats(take="chosen").example(row | {mark: 1}).messages[-1]["content"] == "c"


@pytest.mark.parametrize(("mark", "value"), [("label", "good"), ("label", 0), ("label", "false"), ("标签", "差"), ("标签", True),
                                             ("评价", "差"), ("是否正确", "否"), ("is_good", False)])
def test_columns_that_have_to_be_named_do_not_hide_a_mark_beside_them(mark, value):
    """The command that names question and answer alone would have bad answers learned like good ones."""
    found = problem({"问题": "q", "答案": "c", mark: value})
    assert found.reason.endswith(f"; `{mark}` may say which answers are good")
    assert found.fix == ("to learn that, call the columns `prompt`, `completion` and `label`, with true and false; "
                         f"--columns 'user=问题,assistant=答案' learns every answer, whatever its `{mark}`")
    assert read({"prompt": "q", "completion": "c", "label": True})[2] is True


@pytest.mark.parametrize("beside", [{"score": 1}, {"topic": "金融"}, {"label": 3}, {"good": None}])
def test_columns_that_mark_nothing_leave_the_command(beside):
    assert problem({"问题": "q", "答案": "c", "x": "y", **beside}).fix == "use --columns 'user=问题,assistant=答案'"


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


TURN = [{"role": "user", "content": "q"}]
CONTEXT = {"context": TURN, "response1": "c", "response2": "r"}
SHP = {"history": "q", "human_ref_A": "c", "human_ref_B": "r"}
SAFE = {"prompt": "q", "response_0": "c", "response_1": "r"}
ARENA = {"conversation_a": WHOLE, "conversation_b": [*ASKED, {"role": "assistant", "content": "r"}]}
VOTES = {"prompt": '["a", "q"]', "response_a": '["b", "c"]', "response_b": '["b", "r"]'}


def votes(a, b, tie):
    return {"winner_model_a": a, "winner_model_b": b, "winner_tie": tie}


@pytest.mark.parametrize(("row", "first", "second"), [
    (CONTEXT, {"overall_preference": -1}, {"overall_preference": 3}), (CONTEXT, {"overall_preference": "-3"}, {"overall_preference": 1.0}),
    (SHP, {"labels": 1}, {"labels": 0}), (SAFE, {"better_response_id": 0}, {"better_response_id": 1}),
    (SAFE, {"safer_response_id": "0", "better_response_id": None}, {"safer_response_id": 1, "better_response_id": 1}),
    (ARENA, {"winner": "model_a"}, {"winner": "model_b"})])
def test_the_column_that_says_which_of_two_answers_is_better(row, first, second):
    assert read(row | first | {"id": 7}) == (["q", "c"], ["r"], None, ["id"])
    assert read(row | second) == (["q", "r"], ["c"], None, [])
    assert Formats(take="chosen").example(row | second).messages[-1]["content"] == "r"


def test_the_scores_of_vertex():
    def said(text):
        return {"role": "model", "parts": [{"text": text}]}

    row = {"systemInstruction": {"parts": [{"text": "Be."}]}, "contents": [{"role": "user", "parts": [{"text": "q"}]}, said("b"),
                                                                           {"role": "user", "parts": [{"text": "q2"}]}],
           "completions": [{"score": 0.0, "completion": said("r")}, {"score": 1.0, "completion": said("c")}], "id": 7}
    assert read(row) == (["Be.", "q", "b", "q2", "c"], ["r"], None, ["id"])
    tie = [one | {"score": 1} for one in row["completions"]]
    assert "`score` is [1, 1]: neither answer is the better one" in problem(row | {"completions": tie}).reason
    unclear = [one | {"score": None} for one in row["completions"]]
    assert "`score` is [None, None], which names neither" in problem(row | {"completions": unclear}).reason
    picture = [{"score": n, "completion": {"role": "model", "parts": [{"inlineData": {}}]}} for n in range(2)]
    assert "names no file and holds none" in problem(row | {"completions": picture}).reason
    unclear[0]["score"], unclear[1]["score"] = float("nan"), 1.0
    assert "which names neither" in problem(row | {"completions": unclear}).reason


@pytest.mark.parametrize("beside", [3, [], [{"score": 1}], None])
def test_a_conversation_of_gemini_beside_completions_of_another_kind_is_read(beside):
    row = {"contents": [{"role": role, "parts": [{"text": role}]} for role in ("user", "model")], "completions": beside}
    for formats in (Formats(), Formats("gemini")):
        assert [turn["content"] for turn in formats.example(row).messages] == ["user", "model"]


def test_the_votes_on_whole_conversations_in_text():
    assert read(VOTES | votes(1, 0, 0)) == (["a", "b", "q", "c"], ["r"], None, [])
    assert read(VOTES | votes("0", "1", "0")) == (["a", "b", "q", "r"], ["c"], None, [])
    assert "`winner_tie` is 1: neither" in problem(VOTES | votes(0, 0, 1)).reason


@pytest.mark.parametrize(("row", "reason"), [
    (CONTEXT | {"overall_preference": 0}, "`overall_preference` is 0: neither answer is the better one"),
    (CONTEXT | {"overall_preference": None}, "`overall_preference` is None, which names neither"),
    (CONTEXT | {"overall_preference": 0.5}, "`overall_preference` is 0.5, which names neither"),
    (SHP | {"labels": 2}, "`labels` is 2, which names neither"), (SHP | {"labels": 10**400}, "which names neither"), (SAFE | {"better_response_id": True}, "`better_response_id` is True, which"),
    (ARENA | {"winner": "tie (bothbad)"}, "`winner` is 'tie (bothbad)': neither"), (ARENA | {"winner": ["x"]}, "`winner` is ['x'], which"),
    (PAIR | {"prompt": "q", "score_chosen": 7.0, "score_rejected": 7}, "`score_chosen` is 7.0 and `score_rejected` is 7, so that the one is not"),
    (PAIR | {"prompt": "q", "chosen_score": "4.5", "rejected_score": "4.50"}, "`chosen_score` is 4.5 and `rejected_score` is 4.50, so"),
    (PAIR | {"prompt": "q", "chosen_rating": 1, "rejected_rating": 2}, "is 2, so that the one is not the better answer")])
def test_a_tie_is_no_pair(row, reason):
    found = problem(row)
    assert found.code == "preference" and reason in found.reason


def test_scores_of_a_pair_in_the_order_of_its_answers_or_of_no_pair():
    scored = PAIR | {"prompt": "q", "score_chosen": 7.5, "score_rejected": 7}
    assert read(scored)[:2] == (["q", "c"], ["r"])
    for score in (None, float("nan"), "nan", "", "low", [7.5]):
        assert read(scored | {"score_rejected": score})[:2] == (["q", "c"], ["r"]), "which is no figure"
    assert Formats(take="chosen").example(scored | {"score_rejected": 7.5}).messages[-1]["content"] == "c"


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("numbers", [(0, 1), ("0", "1"), (0.0, 1.0)])
def test_two_criteria_that_disagree_are_told_with_a_command_that_works(tmp_path, numbers):
    row = SAFE | dict(zip(("better_response_id", "safer_response_id"), numbers, strict=True))
    found = problem(row)
    assert "name different responses" in found.reason
    command, _, other = found.fix.partition(": ")[2].partition(", or with ")
    assert other == "better_response_id in its place"
    write_rows(tmp_path / "FILE.jsonl", [row])
    for name, wanted in (("safer_response_id", "r"), ("better_response_id", "c")):
        subprocess.run(["sh", "-c", command.replace("safer_response_id", name)], cwd=tmp_path, check=True)
        [pair] = map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines())
        assert read(pair)[0] == ["q", wanted]


def test_a_problem_of_such_a_pair_has_the_columns_own_name():
    assert "`human_ref_B`" in problem(SHP | {"labels": 1, "human_ref_B": ""}).reason


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize("names", [("output_1", "output_2"), ("response_a", "response_b"), ("answer0", "answer1")])
def test_two_answers_beside_which_nothing_known_says_which_is_better(tmp_path, names):
    row = {"instruction": "q", names[0]: "c", names[1]: "r", "preference": 1}
    found = problem(row)
    assert f"which of them is better has to be said; it has 'instruction', '{names[0]}'" in found.reason
    command, _, means = found.fix.partition(", where .WHICH == 1 stands for ")
    assert means == f"what is true if `{names[0]}` is the better one"
    write_rows(tmp_path / "FILE.json", [row, row | {"preference": 2}])
    subprocess.run(["sh", "-c", command.replace("WHICH", "preference")], cwd=tmp_path, check=True)
    assert [read(json.loads(line))[:2] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()] == [
        (["q", "c"], ["r"]), (["q", "r"], ["c"])]


@pytest.mark.parametrize("row", [{"prompt": "q", "response_a": "c"}, {"response_a": "c", "response_b": "r"}, {"prompt": "q", "part_1": "c", "part_2": "r"}])
def test_what_only_looks_like_two_answers(row):
    assert "which of them is better" not in problem(row).reason
