"""``eval`` through the real command line: base and tuned answers to held-out prompts, in report.md."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune import samples
from gemma_tune.answers.generation import greedy_continuations
from gemma_tune.answers.prompts import Prompt
from gemma_tune.cli import console
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.evaluate import rows as rows_module
from gemma_tune.evaluate.markdown import report
from gemma_tune.evaluate.rows import nothing_to_measure
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.run.manifest import read_manifest
from gemma_tune.run.state import superseded
from support.answering import greedy_answers
from support.command import QUICK, rows, write_rows

FP32 = ("--dtype", "fp32")


def held_out(run: Path) -> list[dict]:
    """The validation rows of a run."""
    return [json.loads(line) for line in (run / "data" / "valid.jsonl").read_text(encoding="utf-8").splitlines()]


def test_base_and_tuned_answers_stand_side_by_side(cli, fluent):
    result = cli("eval", "--max-new-tokens", 22, "--json", *FP32)
    assert result.code == 0, result.err
    summary = result.json["summary"]
    [question] = [row["messages"][:-1] for row in held_out(fluent)]
    [answer] = summary["answers"]
    assert summary["questions"] == 1
    assert answer["prompt"] == question
    assert answer["tuned"].startswith("The number is ")
    assert (answer["tuned_ended"], summary["tuned_ended"]) == (True, 1)
    assert summary["base_ended"] == int(answer["base_ended"])
    assert answer["base"] not in ("", answer["tuned"])
    assert "base_in_form" not in summary, "the form of the built-in example is asked of that example alone"
    for shown in ("base", "tuned", question[0]["content"], "The number is", "next: gemma-tune merge"):
        assert shown in result.err


@pytest.mark.parametrize(("limit", "ended"), [(40, True), (5, False)])
def test_the_report_says_it_all(cli, fluent, limit, ended):
    assert cli("eval", "--max-new-tokens", limit, *FP32).code == 0
    manifest = json.loads((fluent / "manifest.json").read_text())
    summary = manifest["stages"]["eval"]["summary"]
    text = (fluent / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# talkative: before and after"
    assert f"| answers that end by themselves | {summary['base_ended']}/1 | {int(ended)}/1 |" in lines
    assert f"at most {limit} tokens" in text
    [answer] = json.loads((fluent / "answers.json").read_text(encoding="utf-8"))
    assert f"## 1. {answer['prompt'][0]['content']}" in lines
    assert f"> {answer['tuned']}" in lines
    assert ("**tuned**" if ended else "**tuned** (cut off at the limit)") in lines
    assert ("**base**" if answer["base_ended"] else "**base** (cut off at the limit)") in lines
    assert manifest["stages"]["eval"]["outputs"]["report"]["path"] == "report.md"
    assert manifest["stages"]["eval"]["outputs"]["answers"]["path"] == "answers.json"
    for text in (answer["tuned"], answer["base"], answer["prompt"][0]["content"]):
        assert json.dumps(text)[1:-1] not in (fluent / "manifest.json").read_text(), "the manifest holds figures alone"
    assert str(fluent.parent) not in text, "no path of this machine"


@pytest.fixture
def many(cli, fluent, tmp_path) -> Path:
    """A run whose adapter fits, with six validation rows (prepared again, so the adapter is stale)."""
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--run", fluent, "--valid", 6)
    assert result.code == 0, result.err
    assert len(held_out(fluent)) == 6
    return fluent


def test_base_answers_are_the_untuned_models_own(cli, many, talkative):
    result = cli("eval", "--max-new-tokens", 8, "--json", "--run", many, *FP32)
    assert result.code == 0, result.err
    assert "the result of `train` is stale" in result.err
    prompts = [row["messages"][:-1] for row in held_out(many)]
    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    expected = greedy_answers(model, load_format(talkative, "gemma3_text"), prompts, 8)
    answers = result.json["summary"]["answers"]
    assert [a["prompt"] for a in answers] == prompts
    assert [(a["base"], a["base_ended"]) for a in answers] == [(e.text, e.ended) for e in expected]
    assert len({a["base"] for a in answers}) > 2, "answers that are all the same would prove little"
    assert {a["tuned"][:5] for a in answers} == {"The n"}


def test_questions_limits_how_many_are_asked_and_another_number_asks_again(cli, many):
    first = cli("eval", "--questions", 2, "--max-new-tokens", 2, "--json", "--run", many, *FP32)
    assert first.json["summary"]["questions"] == len(first.json["summary"]["answers"]) == 2
    again = cli("eval", "--questions", 4, "--max-new-tokens", 2, "--json", "--run", many, *FP32)
    assert (again.json["status"], again.json["summary"]["questions"]) == ("done", 4)
    assert "`eval` runs again" in again.err
    assert (many / "report.md").read_text().count("\n## ") == 4
    more = cli("eval", "--questions", 100, "--max-new-tokens", 2, "--json", "--run", many, *FP32)
    assert more.json["summary"]["questions"] == 6, "no more than there are"


def test_batches_give_what_single_prompts_give(cli, many, monkeypatch):
    import gemma_tune.evaluate.compare as module

    together = cli("eval", "--max-new-tokens", 6, "--json", "--run", many, *FP32).json["summary"]
    monkeypatch.setattr(module, "BATCH", 4)
    apart = cli("eval", "--max-new-tokens", 6, "--json", "--run", many, "--force", *FP32).json["summary"]
    assert apart == together
    assert [a["prompt"] for a in apart["answers"]] == [row["messages"][:-1] for row in held_out(many)], "in their order"


def test_losses_are_those_that_the_training_measured_on_the_same_rows(cli, fluent):
    """Another code, other batches; the training's first evaluation is of the base model, its best of the adapter."""
    train = json.loads((fluent / "manifest.json").read_text())["stages"]["train"]["summary"]
    result = cli("eval", "--max-new-tokens", 2, "--json", *FP32)
    assert result.code == 0, result.err
    measures = result.json["summary"]["measures"]
    assert measures["loss"]["base"][0] == pytest.approx(train["eval_loss_before"], rel=1e-4)
    assert measures["loss"]["tuned"][0] == pytest.approx(train["eval_loss_after"], rel=1e-4)
    assert measures["perplexity"]["tuned"][0] == pytest.approx(np.exp(train["eval_loss_after"]), rel=1e-4)
    assert measures["loss"]["base"][1:] == [None, None], "of one row there is no interval"
    assert "the tuned model predicts general text worse than the base: perplexity" in result.err, "it learned by heart"


def test_other_rows_are_read_checked_and_remembered(cli, fluent, tmp_path):
    others = [{"question": f"Say number {n}.", "answer": f"The number is {n}, no more."} for n in range(5)]
    write_rows(tmp_path / "others.jsonl", [{"messages": [{"role": role, "content": row[key]} for role, key in
                                                         (("user", "question"), ("assistant", "answer"))]}
                                           for row in others] + [{"messages": 3}])
    args = ("eval", "--max-new-tokens", 30, "--json", *FP32)
    result = cli(*args, "--data", "others.jsonl", "--questions", 3)
    assert result.code == 0, result.err
    assert "1 row of others.jsonl cannot be used to measure on; the first is others.jsonl:6: " in result.err
    known = [text for text in result.json["warnings"] if "what is measured on them is not held out" in text]
    assert known == ["the training had 4 of 5 rows itself: what is measured on them is not held out"], result.err
    summary = result.json["summary"]
    assert (summary["rows"], summary["rows_there"], summary["questions"]) == (5, 6, 3)
    asked = [answer["prompt"][0]["content"] for answer in summary["answers"]]
    assert asked == ["Say number 0.", "Say number 2.", "Say number 4."]
    right = [a["tuned"].strip() == a["reference"] == f"The number is {n}, no more." and a["tuned_ended"]
             for a, n in zip(summary["answers"], (0, 2, 4))]
    assert summary["measures"]["exact_match"]["tuned"][0] == pytest.approx(sum(right) / 3) and any(right)
    assert summary["measures"]["exact_match"]["base"][0] == 0
    assert summary["measures"]["chrf"]["difference"][1] > 0
    assert "these rows worse" not in result.err
    write_rows(tmp_path / "strange.jsonl", [{"messages": [{"role": "user", "content": f"Say number {n}."},
                                                          {"role": "assistant", "content": "".join(chr(33 + (n * 37 + k * 11) % 90) for k in range(90))}]} for n in range(5)])
    strange = cli("eval", "--max-new-tokens", 2, "--json", *FP32, "--data", "strange.jsonl")
    assert any("the tuned model predicts these rows worse than the base: loss " in text for text in strange.json["warnings"])
    assert cli(*args, "--data", "others.jsonl", "--questions", 3).code == 0
    assert "(rows of `others.jsonl`)" in (fluent / "report.md").read_text() and "the row's own answer" in (fluent / "report.md").read_text()
    assert str(tmp_path) not in (fluent / "manifest.json").read_text()
    assert cli(*args).json["status"] == "up-to-date", "the file is remembered"
    back = cli(*args, "--data", "valid")
    assert (back.json["status"], back.json["summary"]["rows_there"]) == ("done", 1)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("gone.jsonl", None, "gone.jsonl"), ("-", None, "--data reads no standard input"),
    ("bad.jsonl", '{"messages": 3}\n', "1 of 1 row of bad.jsonl cannot be used to measure on")])
def test_rows_that_cannot_be_used_are_refused_and_the_last_report_stays(cli, fluent, tmp_path, name, content, message):
    args = ("eval", "--max-new-tokens", 2, "--json", *FP32)
    assert cli(*args).code == 0
    before = (fluent / "report.md").read_bytes(), (fluent / "manifest.json").read_bytes()
    if content:
        (tmp_path / name).write_text(content)
    result = cli(*args, "--data", name)
    assert result.code == 2
    assert message in result.json["error"]["message"]
    assert ((fluent / "report.md").read_bytes(), (fluent / "manifest.json").read_bytes()) == before


def test_of_many_rows_a_sample_is_measured_and_said(cli, many):
    args = ("eval", "--max-new-tokens", 2, "--json", "--run", many, *FP32)
    some = cli(*args, "--limit", 3)
    assert some.code == 0, some.err
    assert (some.json["summary"]["rows"], some.json["summary"]["rows_there"]) == (3, 6)
    assert "3 of 6 rows are measured; --limit 0 takes all" in some.err
    other = cli(*args, "--limit", 3, "--seed", 1)
    assert other.json["summary"]["measures"]["loss"]["base"] != some.json["summary"]["measures"]["loss"]["base"]
    everything = cli(*args, "--limit", 0)
    assert everything.json["summary"]["rows"] == 6
    low, high = everything.json["summary"]["measures"]["loss"]["base"][1:]
    assert low < everything.json["summary"]["measures"]["loss"]["base"][0] < high


def test_the_page_is_written_also_where_all_is_up_to_date(cli, fluent):
    args = ("eval", "--max-new-tokens", 2, "--json", *FP32)
    first = cli(*args)
    page = Path(first.json["artifacts"]["html_report"])
    assert "Base against tuned" in page.read_text(encoding="utf-8")
    page.unlink()
    again = cli(*args)
    assert again.json["status"] == "up-to-date" and page.exists()
    assert "base against tuned" in again.err


def test_the_same_again_is_up_to_date(cli, fluent):
    args = ("eval", "--max-new-tokens", 5, "--json", *FP32)
    first, again = cli(*args), cli(*args)
    assert (first.json["status"], again.json["status"]) == ("done", "up-to-date")
    assert again.json["summary"] == first.json["summary"]
    (fluent / "report.md").unlink()
    assert cli(*args).json["status"] == "done"
    assert (fluent / "report.md").exists()


def test_without_validation_rows_the_hint_says_how_to_get_some(cli, trained, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows()), "--run", trained, "--valid", 0).code == 0
    result = cli("eval", "--run", trained, "--json")
    assert result.code == 2
    assert "no validation rows" in result.json["error"]["message"]
    assert "--valid 0.1" in result.json["error"]["hint"]
    assert not (trained / "report.md").exists()


def test_status_proposes_no_comparison_without_rows_for_one(cli, trained, tmp_path):
    assert cli("eval", "--run", trained, "--max-new-tokens", 4).code == 0
    files = write_rows(tmp_path / "rows.jsonl", rows()), write_rows(tmp_path / "held-out.jsonl", rows(14)[12:])
    assert cli("prepare", files[0], "--run", trained, "--valid", 0).code == 0
    assert cli("train", "--run", trained, *QUICK).code == 0
    status = cli("status", "--run", trained, "--json").json
    assert status["stages"]["eval"]["state"].startswith("stale: the run has no validation rows to compare on; ")
    assert status["next"] == f"gemma-tune merge --run {trained}"
    assert cli("eval", "--run", trained, "--data", files[1], "--max-new-tokens", 4).code == 0
    assert cli("train", "--run", trained, *QUICK, "--seed", 7).code == 0
    again = cli("status", "--run", trained, "--json").json["next"]
    assert again == f"gemma-tune eval --run {trained}", "on the rows that were named"


def test_without_an_adapter_the_command_to_make_it_is_named(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    result = cli("eval")
    assert (result.code, result.out) == (2, "")
    assert "`eval` needs what `train` makes" in result.err
    assert "gemma-tune train --run runs/tiny-gemma" in result.err


def test_an_adapter_from_elsewhere_is_compared_on_rows_that_are_named(cli, fluent, talkative, tmp_path):
    away = shutil.copytree(fluent / "talkative_lora_adapter", tmp_path / "away")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):  # as many programs save one
        (away / name).unlink(missing_ok=True)
    there = tmp_path / "there"
    assert cli("merge", "--adapter", away, "--base", talkative, "--run", there, "--no-check").code == 0
    result = cli("eval", "--run", there)
    assert result.code == 2 and "merges an adapter that was trained elsewhere, and has no rows to compare on" in result.err
    assert f"gemma-tune eval --run {there} --data FILE" in result.err and "gemma-tune prepare" not in result.err
    args = ("--data", write_rows(tmp_path / "held-out.jsonl", rows(14)[12:]), "--max-new-tokens", 3, "--json", *FP32)
    own, found = (cli("eval", *args, "--run", run).json["summary"] for run in (fluent, there))
    assert found["measures"] == own["measures"] and found["answers"] == own["answers"]
    assert cli("eval", "--run", there, "--json").json["status"] == "up-to-date"
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows()), "--run", there).code == 0
    time.sleep(1.1)  # the manifest's times are in seconds
    assert cli("train", "--run", there, *QUICK).code == 0
    state = cli("status", "--run", there, "--json").json["stages"]["eval"]["state"]
    assert state == "stale: it is of an adapter from elsewhere, and the run has trained one of its own since"
    assert cli("eval", *args, "--run", there).json["summary"]["measures"] != own["measures"], "of the run's own adapter now"


def test_a_comparison_of_an_adapter_from_elsewhere_is_stale_once_another_one_is_merged(cli, fluent, talkative, tmp_path):
    first, there = shutil.copytree(fluent / "talkative_lora_adapter", tmp_path / "first"), tmp_path / "there"
    second = shutil.copytree(first, tmp_path / "second")
    weights = load_file(second / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, second / "adapter_model.safetensors", {"format": "pt"})
    merge = ("merge", "--base", talkative, "--run", there, "--no-check", "--adapter")
    assert cli(*merge, first).code == 0
    args = ("--data", write_rows(tmp_path / "held-out.jsonl", rows(14)[12:]), "--max-new-tokens", 3, *FP32)
    assert cli("eval", *args, "--run", there).code == 0
    assert cli("status", "--run", there, "--json").json["stages"]["eval"]["state"] == "done"
    assert cli(*merge, second).code == 0
    state = cli("status", "--run", there, "--json").json["stages"]["eval"]["state"]
    assert state == "stale: `merge` has merged another adapter since"
    assert superseded(read_manifest(there)) == ["eval"], "report.html does not show it as of this adapter"
    assert cli("eval", "--run", there, "--json").json["status"] == "done"
    assert cli("status", "--run", there, "--json").json["stages"]["eval"]["state"] == "done"
    assert cli(*merge, first).code == 0
    assert cli("status", "--run", there, "--json").json["stages"]["eval"]["state"].startswith("stale: ")


def test_of_an_adapter_from_elsewhere_that_is_gone_the_place_is_named(cli, fluent, talkative, tmp_path):
    away, there = shutil.copytree(fluent / "talkative_lora_adapter", tmp_path / "away"), tmp_path / "there"
    assert cli("merge", "--adapter", away, "--base", talkative, "--run", there, "--no-check").code == 0
    shutil.rmtree(away)
    result = cli("eval", "--run", there, "--data", write_rows(tmp_path / "held-out.jsonl", rows(2)))
    assert result.code == 2 and f"gemma-tune merge --run {there} --adapter DIR" in result.err, result.err


def test_of_a_merged_adapter_from_elsewhere_that_is_gone_the_merge_is_named(cli, fluent, talkative, tmp_path):
    away, there = shutil.copytree(fluent / "talkative_lora_adapter", tmp_path / "away"), tmp_path / "there"
    assert cli("merge", "--adapter", away, "--base", talkative, "--run", there, "--no-check").code == 0
    shutil.rmtree(there / "talkative_lora_merged")
    for command in (("eval", "--data", write_rows(tmp_path / "held-out.jsonl", rows(2))), ("chat", "--prompt", "Hello")):
        result = cli(*command, "--run", there)
        assert result.code == 2
        assert f"`{command[0]}` cannot use the result of `merge`: talkative_lora_merged is gone" in result.err, result.err
        assert f"make it again: gemma-tune merge --run {there} --force" in result.err


def test_the_built_in_example_is_asked_its_own_held_out_questions_and_judged(cli, trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["stages"]["prepare"]["config"]["data"]["value"] = []
    (trained / "manifest.json").write_text(json.dumps(manifest))
    result = cli("eval", "--questions", 2, "--max-new-tokens", 2, "--json", *FP32)
    assert result.code == 0, result.err
    summary = result.json["summary"]
    own, others = summary["answers"][:2], summary["answers"][2:]
    assert [a["prompt"] for a in own] == [q["messages"] for q in samples.heldout_questions()[:2]]
    assert [a["prompt"] for a in others] == [row["messages"][:-1] for row in held_out(trained)[:2]], "then its rows'"
    assert (summary["base_in_form"], summary["tuned_in_form"]) == (0, 0)
    text = (trained / "report.md").read_text(encoding="utf-8")
    asked = len(summary["answers"])
    assert f"| answers in the example's form | 0/{asked} | 0/{asked} |" in text
    assert summary["measures"]["chrf"]["rows"] == len(others), "its own questions have no answer to compare with"
    assert samples.FORM_DESCRIPTION in text


# --- prompts of rows of every kind ---------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
TOOL_ROW = {"messages": [
    {"role": "user", "content": "Weather in Zürich?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain\n9 °C"}, {"role": "assistant", "content": "It rains."}], "tools": TOOLS}
TEXT_ROW = {"text": "The quick brown fox jumps over the lazy dog."}


@pytest.fixture
def asked_of(tmp_path, monkeypatch):
    """A function: held-out prompts of these validation rows and what was noted; ``.why`` says why there is nothing."""
    monkeypatch.setattr(rows_module, "reference_of", lambda chat, outcome: None)
    monkeypatch.setattr(rows_module, "_short_enough", lambda session, chat, questions: questions)

    def found(*records, count=5):
        notes: list[str] = []
        path = write_rows(tmp_path / "v.jsonl", records)
        manifest = SimpleNamespace(stages={"prepare": {
            "summary": {"rows": 13}, "config": {"data": {"value": ["x.jsonl"], "from": "flag"}}}})
        session = SimpleNamespace(config=SimpleNamespace(questions=count, data_file=None, limit=0), inputs={"valid_rows": path},
                                  settings_of=lambda stage: {}, manifest=manifest,
                                  run=SimpleNamespace(valid_rows=path, root=Path("runs/r")),
                                  listener=SimpleNamespace(note=notes.append))
        found.why = nothing_to_measure(session)
        asked = rows_module._questions(session, None, [(record, None) for record in records])
        return [question.prompt for question in asked], notes

    return found


def test_a_prompt_is_everything_before_the_last_answer(asked_of):
    turns = [{"role": role, "content": f"{n}\u2028{role}"}
             for n, role in enumerate(("system", "user", "assistant", "user", "assistant"))]
    prompts, notes = asked_of({"messages": turns}, {"messages": turns})
    assert (prompts, asked_of.why) == ([Prompt(turns[:4])] * 2, None)
    assert notes[0] == ("the run has 2 held-out prompts; gemma-tune prepare --run runs/r --valid 3 keeps more aside, to train "
                        "anew"), "no more than a fourth of all rows"
    [note] = asked_of({"messages": turns}, count=3)[1]
    assert note.startswith("the run has 1 held-out prompt; gemma-tune prepare")
    assert asked_of(*[{"messages": turns}] * 3)[1] == ["the run has 3 held-out prompts"]


def test_an_answer_that_is_not_learned_is_not_asked_for(asked_of):
    turns = [{"role": role, "content": str(n)} for n, role in enumerate(("user", "assistant") * 3)]
    turns[1]["train"] = turns[5]["train"] = False
    [prompt], *_ = asked_of({"messages": turns})
    assert prompt.messages == [{"role": role, "content": str(n)} for n, role in enumerate(("user", "assistant", "user"))]


def test_tools_and_their_results_belong_to_the_prompt(asked_of):
    [prompt], *_ = asked_of(TOOL_ROW)
    assert prompt == Prompt(TOOL_ROW["messages"][:3], TOOLS)


def test_rows_of_plain_text_are_left_out_with_a_note(asked_of):
    prompts, [note] = asked_of(TEXT_ROW, TOOL_ROW, TEXT_ROW)
    assert prompts == [Prompt(TOOL_ROW["messages"][:3], TOOLS)]
    assert note.startswith("2 rows of plain text have no question to ask")
    assert asked_of.why is None
    prompts, [note] = asked_of(TEXT_ROW)
    assert prompts == [] and "1 row of plain text has no question to ask" in note


def test_of_many_rows_those_that_are_asked_come_from_all_over(asked_of):
    many = [{"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "a"}]} for n in range(101)]
    prompts, notes = asked_of(*many, count=5)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["0", "25", "50", "75", "100"]
    assert notes == []


def test_without_any_row_there_is_nothing_to_measure(asked_of):
    asked_of()
    assert asked_of.why == "the run has no validation rows to compare on"


class Words:
    """A chat format with one token per word, two per message and ten for tools; texts begin with 0 and end with 1."""

    def prompt_ids(self, messages, tools=None):
        return [7] * (10 * bool(tools)) + [9 for m in messages for _ in range(2 + len(m["content"].split()))]

    def encode_text(self, text):
        return SimpleNamespace(ids=np.array([0, *range(5, 5 + len(text.split())), 1], np.int32))


@pytest.mark.parametrize(("words", "expected"), [(1, 1), (2, 2), (8, 5), (61, 31), (62, 32), (1000, 32)])
def test_of_a_text_the_first_half_is_the_prompt_and_32_tokens_at_most(words, expected):
    ids = Prompt([], text="fox " * words).ids(Words())
    assert ids == [0, *range(5, 4 + expected)]
    assert all(type(n) is int for n in ids)


def test_a_conversation_that_is_too_long_is_asked_without_its_first_exchanges():
    turns = [{"role": role, "content": f"{n} b"} for n, role in enumerate(("user", "assistant", "tool", "assistant") * 50)]
    turns.append({"role": "user", "content": "last one"})
    system = [{"role": "system", "content": "be brief"}]
    for first in ([], system):
        whole = Prompt(first + turns)
        full = len(whole.ids(Words()))
        assert whole.fitted(Words(), full) == whole
        lengths = {}
        for limit in range(full):
            fitted = whole.fitted(Words(), limit)
            if fitted is None:
                assert limit < 4 + 4 * len(first)
                continue
            kept = fitted.messages[len(first):]
            assert fitted.messages[:len(first)] == first and kept == turns[-len(kept):] and kept[0]["role"] == "user"
            assert len(fitted.ids(Words())) <= limit < len(fitted.ids(Words())) + 16, "one exchange more does not fit"
            lengths[len(kept)] = True
        assert list(lengths) == list(range(1, 200, 4)), "every number of exchanges, none of them twice apart"


def test_tools_count_and_stay_when_a_prompt_is_shortened():
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    assert Prompt(turns, TOOLS).fitted(Words(), 18) == Prompt(turns[2:], TOOLS)
    assert Prompt(turns, TOOLS).fitted(Words(), 12) is None
    assert Prompt([], text="a " * 99).fitted(Words(), 5).text == "a " * 99


def test_long_prompts_are_shortened_or_left_out_with_a_note(cli, many):
    """`prepare --on-long split` keeps conversations of any length."""
    long = [{"role": role, "content": f"Say number {n}."} for n, role in enumerate(("user", "assistant") * 60)]
    endless = [{"role": "user", "content": "fox " * 2000}, {"role": "assistant", "content": "fox"}]
    valid = many / "data" / "valid.jsonl"
    short = held_out(many)[:1]
    valid.write_text("".join(json.dumps({"messages": m}) + "\n" for m in (long, endless, short[0]["messages"])))
    record(many, "prepare", "valid_rows")
    result = cli("eval", "--max-new-tokens", 4, "--json", "--run", many, *FP32)
    assert result.code == 0, result.err
    first, second = result.json["summary"]["answers"]
    assert 10 < len(first["prompt"]) < 119 and first["prompt"] == long[:-1][-len(first["prompt"]):]
    assert second["prompt"] == short[0]["messages"][:-1]
    assert "1 held-out prompt is left out: longer than" in result.err
    assert "1 held-out prompt is asked without its first turns" in result.err
    valid.write_text(json.dumps({"messages": endless}) + "\n")
    record(many, "prepare", "valid_rows")
    result = cli("eval", "--json", "--run", many, *FP32)
    assert result.code == 2
    assert "are all longer than" in result.json["error"]["message"]


def record(run: Path, stage: str, output: str) -> None:
    """Take an output as it is now for the stage's own."""
    from gemma_tune.base.fingerprints import fingerprint

    manifest = json.loads((run / "manifest.json").read_text())
    entry = manifest["stages"][stage]["outputs"][output]
    entry |= fingerprint(run / entry["path"])
    (run / "manifest.json").write_text(json.dumps(manifest))


# Takes tools, calls and results, with the markers that the tiny tokenizer has.
TEMPLATE = (
    "{{ bos_token }}{% if tools %}<start_of_turn>tools\n{{ tools | tojson }}<end_of_turn>\n{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")


def test_tool_conversations_and_texts_from_prepare_to_the_report(cli, talkative, tmp_path, monkeypatch):
    import gemma_tune.evaluate.compare as module

    asked = []

    def answers(model, chat, encoded, most, **shown):
        asked.append(encoded)
        return greedy_continuations(model, chat, encoded, most, **shown)

    monkeypatch.setattr(module, "greedy_continuations", answers)
    model = Path(shutil.copytree(talkative, tmp_path / "tools"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    train = write_rows(tmp_path / "rows.jsonl", [*rows(8), TOOL_ROW, TEXT_ROW])
    again = json.loads(json.dumps(TOOL_ROW).replace("rain", "snow"))
    valid = write_rows(tmp_path / "valid.jsonl", [{"text": "Seven wizards box quietly."}, again])
    for args in (("prepare", train, "--model", model, "--valid", valid), ("train", *QUICK)):
        result = cli(*args)
        assert result.code == 0, result.err
    result = cli("eval", "--max-new-tokens", 6, "--json", *FP32)
    assert result.code == 0, result.err
    [answer] = result.json["summary"]["answers"]
    assert answer["tools"] == ["weather"]
    assert [turn["role"] for turn in answer["prompt"]] == ["user", "assistant", "tool"]
    assert "1 row of plain text has no question to ask" in result.err
    assert result.json["summary"]["measures"]["loss"]["rows"] == 2, "its loss is measured all the same"
    assert "Weather in Zürich?" in result.err
    lines = (tmp_path / "runs/tools/report.md").read_text(encoding="utf-8").splitlines()
    for line in ("## 1. Weather in Zürich?", "*tools on offer*: `weather`", "*tool*", "> snow", "> 9 °C",
                 '> calls weather({"city": "Zürich"})'):
        assert line in lines
    chat = load_format(model, "gemma3_text")
    assert asked == [[chat.prompt_ids(answer["prompt"], again["tools"])]] * 2, "base and tuned model, both with the tools"


def test_the_comparison_on_the_terminal_takes_turns_of_every_kind(capsys):
    ended = {"base": "a", "base_ended": True, "tuned": "b", "tuned_ended": True}
    console.comparison([{"prompt": TOOL_ROW["messages"][:3], **ended},
                        {"prompt": [{"role": "user", "content": "\n [bold]first[/] \nsecond"}], **ended}])
    shown = capsys.readouterr().err
    assert "Weather in Zürich?" in shown and "[bold]first[/]" in shown and "second" not in shown


def test_text_in_the_report_cannot_break_it():
    """Answers and prompts may hold headings, open code fences, or nothing."""
    session = SimpleNamespace(model=SimpleNamespace(name="m"), config=SimpleNamespace(max_new_tokens=9, data_file=None),
                              manifest=SimpleNamespace(stages={"train": {"summary": {"eval_loss_before": 0.6931, "eval_loss_after": 0.1}}}))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n# A\n```python\nx"}]
    prompt += [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "# rain"}]
    answer = {"prompt": prompt, "tools": ["weather"], "base": "", "base_ended": True, "tuned": "## B\n\n```", "tuned_ended": False}
    text = report(session, {"questions": 1, "base_ended": 1, "tuned_ended": 0, "answers": [answer]})
    assert "0.6931" not in text, "of a training that can have begun with another model than the base, or have another loss"
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# m: before and after", "## 1. # A"]
    assert not [line for line in text.splitlines() if line.startswith("```")]
    assert '*assistant*\n\n> calls weather({"city": "Zürich"})\n\n*tool*\n\n> # rain\n' in text
    assert "> (nothing)" in text and "> Be brief." in text and "> ## B\n> \n> ```" in text
