"""``train --method grpo`` on rows that ``prepare`` has cut or divided: what is scored is what the model was asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gemma_tune.answers.prompts import Prompt
from gemma_tune.rewards.scores import Scorer
from gemma_tune.train.rollouts import Rollouts
from support.command import rows, write_rows
from support.llamas import save_opt
from support.prepared import format_of, talk
from support.templates import assistant, user

RUN = Path("runs/tiny-gemma")
GRPO = ("--method", "grpo", "--reward", "regex:a", "--max-new-tokens", 8, "--answers", 4, "--rank", 2, "--dtype", "fp32", "--samples", 0,
        "--max-steps", 2, "--batch-size", 4)
LIMIT = 64


def seen(monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """Of each answer the item that it was sampled for, and what it was scored by."""
    items, scored = [], []
    said, scores = Rollouts._said, Scorer.scores
    monkeypatch.setattr(Rollouts, "_said", lambda self, item, answers: items.extend([item] * len(answers)) or said(self, item, answers))
    monkeypatch.setattr(Scorer, "scores", lambda self, answers: scored.extend(answers) or scores(self, answers))
    return items, scored


def prepared(cli, tiny: Path, how: str, values: list) -> None:
    done = cli("prepare", write_rows(Path("rows.jsonl"), values), "--model", tiny, "--valid", 2, "--max-length", LIMIT, "--on-long", how)
    assert done.code == 0, done.err


@pytest.mark.parametrize("how", ["split", "truncate"])
def test_of_long_rows_the_model_and_the_score_have_the_same_prompt(cli, tiny, monkeypatch, how):
    """First answers that fit, and last ones that fit nowhere, fit alone, or fit with some before."""
    monkeypatch.setattr("gemma_tune.train.grpo.VALIDATED", 64)
    values = [talk(*words, name=f"{n}.", first=first) for n in range(4) for first in (None, f"be {n}")
              for words in ((1, 60), (1, 8, 1), (4, 4, 4, 4, 1))]
    # A question so long that nothing is left of its answer.
    values += [{"messages": [*talk(1, name=f"{n}.")["messages"], user("word " * 60 + "q1"), assistant("end 1")]} for n in range(4, 9)]
    prepared(cli, tiny, how, values)
    items, scored = seen(monkeypatch)
    result = cli("train", *GRPO)
    assert result.code == 0, result.err
    chat, shorter = format_of(tiny), 0
    assert len(items) == len(scored) > 10
    for item, one in zip(items, scored):
        assert Prompt(list(one.messages)).ids(chat) == item["prompt"]
        question = one.messages[-1]["content"].rpartition("q")[2]
        assert one.reference.endswith(f"end {question}"), "the answer to this question"
        shorter += question == "0" or not any("q0" in turn["content"] for turn in one.messages)
    assert shorter, "the case itself"


def test_rows_whose_last_answer_was_cut_are_left_out_and_counted(cli, tiny, monkeypatch):
    prepared(cli, tiny, "truncate", rows(12) + [talk(60, name=f"{n}.") for n in range(5)])
    items, scored = seen(monkeypatch)
    result = cli("train", *GRPO, "--max-steps", 4)
    assert result.err.count("5 rows of 17 are left out: `prepare --on-long truncate` has cut off the end of the answer") == 1, result.err
    assert f"gemma-tune prepare --run {RUN} --max-length {2 * LIMIT}" in result.err
    assert scored and all(one.reference.endswith("no more.") for one in scored)
    assert cli("train", *GRPO, "--dry-run").err.count("5 rows of 17 are left out") == 1


def test_where_all_were_cut_nothing_can_be_learned(cli, tiny):
    prepared(cli, tiny, "truncate", [talk(60, name=f"{n}.") for n in range(6)])
    result = cli("train", *GRPO)
    assert result.code == 2 and "of all 4 `prepare --on-long truncate` has cut the end off" in result.err, result.err
    assert f"--max-length {2 * LIMIT}" in result.err and not (RUN / "logs").exists()


def test_answers_that_the_context_has_no_room_for_are_told_or_refused(cli, tiny, tmp_path):
    prepared(cli, tiny, "drop", rows(8))
    for more in ((), ("--dry-run",)):
        result = cli("train", *GRPO, "--max-new-tokens", 1020, "--batch-size", 1, "--answers", 2, "--max-steps", 1, *more)
        [found] = re.findall(r"with --max-new-tokens ([0-9]+) all have the same room", result.err)
    assert 900 < int(found) < 1020
    assert "all have the same room" not in cli("train", *GRPO, "--max-new-tokens", found, "--dry-run").err
    assert cli("train", *GRPO, "--max-new-tokens", int(found) + 1, "--dry-run").err.count("all have the same room") == 1
    save_opt(tmp_path / "opt")
    of_opt = ("--run", "runs/opt")
    assert cli("prepare", "rows.jsonl", "--model", tmp_path / "opt", "--max-length", 64, *of_opt).code == 0
    result = cli("train", *GRPO, "--max-new-tokens", 60, *of_opt)
    assert result.code == 2 and "do not fit into the 64 positions of this model" in result.err, result.err
    [found] = re.findall(r"Hint: gemma-tune train --run runs/opt --max-new-tokens ([0-9]+)", result.err)
    assert cli("train", *GRPO, "--max-new-tokens", found, *of_opt, "--dry-run").code == 0
    assert cli("train", *GRPO, "--max-new-tokens", int(found) + 1, *of_opt, "--dry-run").code == 2


def test_a_prompt_that_fills_the_context_is_refused(cli, tiny):
    done = cli("prepare", write_rows(Path("rows.jsonl"), [talk(1, name="word " * 600 + f"{n}.") for n in range(6)]), "--model", tiny,
               "--max-length", 4096)
    assert done.code == 0, done.err
    result = cli("train", *GRPO)
    assert result.code == 2 and "nothing is left for an answer" in result.err and "--max-length 1016" in result.err, result.err
