"""``eval`` through the real command line: base and tuned answers to held-out prompts, in report.md."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import rows, write_rows

from gemma_tune import samples
from gemma_tune.evaluate import held_out_prompts, report
from gemma_tune.generation import greedy_answers
from gemma_tune.models import Placement, load_format, load_model

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
    for shown in ("base", "tuned", "Say number 10.", "The number is", "next: gemma-tune merge"):
        assert shown in result.err


@pytest.mark.parametrize(("limit", "ended"), [(40, True), (5, False)])
def test_the_report_says_it_all(cli, fluent, limit, ended):
    assert cli("eval", "--max-new-tokens", limit, *FP32).code == 0
    manifest = json.loads((fluent / "manifest.json").read_text())
    train, summary = (manifest["stages"][s]["summary"] for s in ("train", "eval"))
    text = (fluent / "report.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# talkative: before and after"
    assert f"| validation loss | {train['eval_loss_before']:.4f} | {train['eval_loss_after']:.4f} |" in lines
    assert f"| answers that end by themselves | {summary['base_ended']}/1 | {int(ended)}/1 |" in lines
    assert f"at most {limit} tokens" in text
    assert "## 1. Say number 10." in lines
    [answer] = summary["answers"]
    assert f"> {answer['tuned']}" in lines
    assert ("**tuned**" if ended else "**tuned** (cut off at the limit)") in lines
    assert ("**base**" if answer["base_ended"] else "**base** (cut off at the limit)") in lines
    assert manifest["stages"]["eval"]["outputs"]["report"]["path"] == "report.md"
    assert str(fluent.parent) not in text, "no path of this machine"


@pytest.fixture
def many(cli, fluent, tmp_path) -> Path:
    """A run whose adapter fits, with six validation rows (prepared again, so the adapter is stale)."""
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--run", fluent, "--valid", 0.5)
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
    import gemma_tune.evaluate as module

    together = cli("eval", "--max-new-tokens", 6, "--json", "--run", many, *FP32).json["summary"]
    monkeypatch.setattr(module, "BATCH", 4)
    apart = cli("eval", "--max-new-tokens", 6, "--json", "--run", many, "--force", *FP32).json["summary"]
    assert apart == together


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


def test_without_an_adapter_the_command_to_make_it_is_named(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    result = cli("eval")
    assert (result.code, result.out) == (2, "")
    assert "`eval` needs what `train` makes" in result.err
    assert "gemma-tune train --run runs/tiny-gemma" in result.err


def test_the_built_in_example_is_asked_its_own_held_out_questions_and_judged(cli, trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["stages"]["prepare"]["config"]["data"]["value"] = []
    (trained / "manifest.json").write_text(json.dumps(manifest))
    result = cli("eval", "--questions", 2, "--max-new-tokens", 2, "--json", *FP32)
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert [a["prompt"] for a in summary["answers"]] == [q["messages"] for q in samples.heldout_questions()[:2]]
    assert (summary["base_in_form"], summary["tuned_in_form"]) == (0, 0)
    text = (trained / "report.md").read_text(encoding="utf-8")
    assert "| answers in the example's form | 0/2 | 0/2 |" in text
    assert samples.FORM_DESCRIPTION in text


def test_a_prompt_is_everything_before_the_last_answer(tmp_path):
    turns = [{"role": role, "content": f"{n}\u2028{role}"}
             for n, role in enumerate(("system", "user", "assistant", "user", "assistant"))]
    notes: list[str] = []
    session = SimpleNamespace(config=SimpleNamespace(questions=5), settings_of=lambda stage: {"data": ["x.jsonl"]},
                              inputs={"valid_rows": write_rows(tmp_path / "v.jsonl", [{"messages": turns}] * 2)},
                              listener=SimpleNamespace(note=notes.append))
    assert held_out_prompts(session) == ([turns[:4]] * 2, None)
    assert "2 held-out prompts" in notes[0]


def test_text_in_the_report_cannot_break_it():
    """Answers and prompts may hold headings, open code fences, or nothing."""
    session = SimpleNamespace(model=SimpleNamespace(name="m"), config=SimpleNamespace(max_new_tokens=9),
                              manifest=SimpleNamespace(stages={"train": {"summary": {}}}))
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "\n# A\n```python\nx"}]
    answer = {"prompt": prompt, "base": "", "base_ended": True, "tuned": "## B\n\n```", "tuned_ended": False}
    text = report(session, {"questions": 1, "base_ended": 1, "tuned_ended": 0, "answers": [answer]})
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# m: before and after", "## 1. # A"]
    assert not [line for line in text.splitlines() if line.startswith("```")]
    assert "> (nothing)" in text and "> Be brief." in text and "> ## B\n> \n> ```" in text
    assert "validation loss" not in text, "there was none to report"
