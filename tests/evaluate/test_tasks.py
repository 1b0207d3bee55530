"""``eval --tasks``: what is said without lm-evaluation-harness, and the harness itself where it is installed."""

from __future__ import annotations

import importlib.util
import json

import pytest

from gemma_tune.evaluate.tasks import _figures, compared

INSTALLED = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(INSTALLED, reason="lm-evaluation-harness is installed")
def test_without_the_harness_it_is_said_before_any_work_how_to_get_it(cli, trained):
    result = cli("eval", "--tasks", "arc_easy", "--json")
    assert result.code == 2
    assert "lm-evaluation-harness, which is not installed" in result.json["error"]["message"]
    assert "pip install lm-eval" in result.json["error"]["hint"]
    assert not (trained / "report.md").exists()


def test_the_harness_s_figures_are_put_side_by_side():
    base = _figures({"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.02, "acc_norm,none": 0.5,
                     "acc_norm_stderr,none": "N/A", "exact,strict": 1, "name": "x", "nan,none": float("nan")})
    assert base == {"acc": [0.25, 0.02], "acc_norm": [0.5, None], "exact (strict)": [1.0, None]}
    found = compared({"base": {"arc": base, "gone": base}, "tuned": {"arc": {"acc": [0.3, 0.02]}}})
    assert found == {"arc": {"acc": {"base": [0.25, 0.02], "tuned": [0.3, 0.02]}}, "gone": {}}


TASK = """
task: numbers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(not INSTALLED, reason="lm-evaluation-harness is not installed: pip install lm-eval")
def test_a_task_of_one_s_own_runs_on_both_models(cli, fluent, tmp_path):
    rows = [{"question": f"<start_of_turn>user\nSay number {n}.<end_of_turn>\n<start_of_turn>model\n",
             "choices": [f"The number is {n}, no more.", f"fox dog lazy {n}"], "answer": 0} for n in range(6)]
    data = tmp_path / "numbers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "numbers.yaml").write_text(TASK.format(data=data))
    result = cli("eval", "--tasks", tmp_path / "numbers.yaml", "--max-new-tokens", 4, "--json", "--dtype", "fp32")
    assert result.code == 0, result.err
    accuracy = result.json["summary"]["tasks"]["numbers"]["acc"]
    assert accuracy["tuned"][0] == 1.0 and accuracy["base"][1] is not None
    assert "| numbers | acc |" in (fluent / "report.md").read_text()
    again = cli("eval", "--max-new-tokens", 4, "--json", "--dtype", "fp32")
    assert again.json["status"] == "up-to-date", "the file is remembered, relative to the run"
    assert str(tmp_path) not in (fluent / "manifest.json").read_text()
    unknown = cli("eval", "--tasks", "arc_esay", "--json")
    assert unknown.code == 2 and "arc_easy" in unknown.json["error"]["message"]
