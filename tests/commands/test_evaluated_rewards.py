"""``eval`` of a run that learned from rewards, and ``eval --reward``: what base and tuned answers are worth, side by side."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import jsonschema
import pytest
from commands.test_grpo import GRPO, RUN, prepared_once  # noqa: F401 - a fixture

from gemma_tune.answers.prompts import Prompt
from gemma_tune.config.rewards import read
from gemma_tune.evaluate import stage as evaluate_stage
from gemma_tune.evaluate.rewards import Rewards
from gemma_tune.evaluate.rows import Question
from gemma_tune.rewards.scores import Scorer
from support.command import MANIFEST_SCHEMA, copied_run, invoke, rows, write_rows

FP32 = ("--dtype", "fp32")


@pytest.fixture(scope="module")
def rewarded_once(prepared_once) -> Path:  # noqa: F811
    """A run that learned to say "a"; copy it, do not change it."""
    run = shutil.copytree(prepared_once, prepared_once.with_name("rewarded"))
    done = invoke("train", *GRPO, "--answers", 8, "--max-steps", 12, "--eval-steps", 12, "--run", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def rewarded(rewarded_once, tiny, tmp_path) -> Path:
    copied_run(rewarded_once, tmp_path, tiny)
    return (tmp_path / "runs" / "rewarded").rename(tmp_path / RUN)


def recorded(run: Path = RUN) -> dict:
    manifest = json.loads((run / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    return manifest["stages"]["eval"]


def test_rewards_are_those_of_the_training_and_come_to_what_it_found(cli, rewarded):
    trained = json.loads((rewarded / "manifest.json").read_text())["stages"]["train"]["summary"]
    result = cli("eval", "--json", *FP32)
    assert result.code == 0, result.err
    measures, answers = (result.json["summary"][name] for name in ("measures", "answers"))
    reward = measures["reward"]
    assert (reward["base"][0], reward["tuned"][0]) == pytest.approx((trained["eval_reward_before"], trained["eval_reward_after"]))
    assert reward["base"][0] < reward["tuned"][0] and reward["rows"] == len(answers) == 4
    assert reward["difference"][0] == pytest.approx(reward["tuned"][0] - reward["base"][0]) and reward["difference"][1] is not None
    assert not any(name.startswith("rewards/") for name in measures), "one reward is told once"
    for answer in answers:
        assert all(answer[f"{side}_reward"] == float("a" in answer[side]) for side in ("base", "tuned"))
    settings = {name: entry for name, entry in recorded()["config"].items() if entry["from"] == "method"}
    assert settings == {"reward": {"value": ["regex:a"], "from": "method"}, "max_new_tokens": {"value": 8, "from": "method"}}
    assert "as in the training: reward regex:a" in result.err and "reward of an answer" in result.err and "(reward 1)" in result.err
    assert "is up to date" in cli("eval", *FP32).err
    report = (rewarded / "report.md").read_text()
    assert "| reward of an answer | 4 |" in report and "**tuned** (cut off at the limit, reward 1)" in report
    assert "Answers are scored by the pattern `a`." in report
    page = (rewarded / "report.html").read_text()
    assert "回答的奖励" in page and "reward of an answer" in page and "reward 1" in page
    assert f"reward of an answer: base {reward['base'][0]:.3f}, tuned {reward['tuned'][0]:.3f}" in " ".join(cli("status").err.split())


def test_other_rewards_are_told_one_by_one_and_kept_until_others_are_named(cli, rewarded, tmp_path):
    other = write_rows(tmp_path / "others.jsonl", rows(9)[4:])
    result = cli("eval", "--reward", "ended=0.5,regex=-1:a", "--data", other, "--json", *FP32)
    assert result.code == 0, result.err
    measures, answers = (result.json["summary"][name] for name in ("measures", "answers"))
    assert measures["rewards/regex"]["weight"] == -1 and measures["rewards/ended"]["weight"] == 0.5 and measures["reward"]["rows"] == 5
    for side in ("base", "tuned"):
        assert measures["reward"][side][0] == pytest.approx(0.5 * measures["rewards/ended"][side][0] - measures["rewards/regex"][side][0])
        assert [answer[f"{side}_reward"] for answer in answers] == [
            0.5 * answer[f"{side}_ended"] - ("a" in answer[side]) for answer in answers]
    assert "the reward regex alone" in result.err and "the tuned model's answers earn less than the base's" in result.err
    assert recorded()["config"]["max_new_tokens"] == {"value": 8, "from": "method"}, "answers are as long as in the training"
    assert "settings as before: data" in (again := cli("eval", *FP32)).err and "is up to date" in again.err
    back = cli("eval", "--reward", "train", "--data", "valid", "--json", *FP32)
    assert back.code == 0 and recorded()["config"]["reward"]["value"] == ["regex:a"], back.err
    without = cli("eval", "--reward", "none", "--json", *FP32)
    assert without.code == 0 and "reward" not in without.json["summary"]["measures"], without.err
    assert not any("base_reward" in answer for answer in without.json["summary"]["answers"])
    assert recorded()["config"]["max_new_tokens"] == {"value": 128, "from": "default"}
    assert "is up to date" in cli("eval", *FP32).err


@pytest.mark.parametrize(("written", "said"), [
    ("exakt", "is not one of exact"), ("none,exact", "`none` stands alone"), ("exact,train", "`train` stands alone"),
    ("command:no-such-program", "there is no program no-such-program")])
def test_rewards_that_cannot_be_used(cli, rewarded, written, said):
    result = cli("eval", "--reward", written)
    assert result.code == 2 and said in result.err and not (rewarded / "report.md").exists(), result.err


def test_a_program_that_fails_leaves_the_earlier_result(cli, rewarded, monkeypatch):
    assert cli("eval", "--reward", "exact", *FP32).code == 0
    before = {name: (rewarded / name).read_bytes() for name in ("manifest.json", "report.md", "answers.json", "report.html")}
    program = Path("score.py")
    flags = ("eval", "--reward", f'command:"{sys.executable}" score.py', *FP32)
    program.write_text("import sys\nfor n, line in enumerate(sys.stdin): print(n if n < 3 else 'many', flush=True)")
    late = cli(*flags)
    assert late.code == 1 and "wrote 'many', which is no finite number" in late.err and "--reward none" in late.err, late.err
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_stage, "base_that_sees", lambda *_: pytest.fail("a model was loaded"))
        program.write_text("print('ready')")
        soon = cli(*flags)
        program.unlink()
        missing = cli(*flags)
    assert soon.code == 1 and "wrote 'ready'" in soon.err and "Traceback" not in soon.err, soon.err
    assert missing.code == 1 and "No such file" in missing.err and "checkpoint" not in missing.err, missing.err
    assert {name: (rewarded / name).read_bytes() for name in before} == before
    program.write_text("import sys\nfor line in sys.stdin: print(0.25, flush=True)")
    result = cli(*flags, "--json")
    assert result.code == 0 and result.json["summary"]["measures"]["reward"]["tuned"] == [0.25] * 3, result.err
    assert "reward_score.py" in recorded()["inputs"] and "is up to date" in cli(*flags).err
    program.write_text("import sys\nfor line in sys.stdin: print(0.75, flush=True)")
    assert "`eval` runs again: score.py was changed" in cli(*flags).err


def test_rewards_of_a_run_that_learned_answers(cli, fluent):
    result = cli("eval", "--reward", "contains,chrf", "--json", *FP32)
    assert result.code == 0, result.err
    measures = result.json["summary"]["measures"]
    assert measures["rewards/chrf"]["tuned"][0] == pytest.approx(measures["chrf"]["tuned"][0] / 100)
    assert measures["reward"]["tuned"][0] > measures["reward"]["base"][0]


def test_answers_that_are_asked_for_and_not_scored_are_told(cli, fluent, tmp_path):
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"The number {n} is not said."} for n in range(3)])
    none = cli("eval", "--data", texts, "--reward", "ended", *FP32)
    assert none.code == 0 and "--reward scores nothing: there is no question to answer" in none.err, none.err
    nothing = cli("eval", "--data", "valid", "--reward", "train", "--max-new-tokens", 4, *FP32)
    assert nothing.code == 0 and "answers are not scored: the training learned from no rewards; --reward exact" in nothing.err
    assert "rewards" not in cli("eval", *FP32).err, "nobody asks now"


def test_questions_without_an_answer_of_their_own_are_told():
    known, own = Question(Prompt([]), "2", "2"), Question(Prompt([]))

    def left_out(reward: str, *questions: Question) -> str | None:
        with Scorer(read([reward])) as scorer:
            return Rewards(scorer, questions, None).left_out()

    assert left_out("exact", known, own, own).startswith("--reward scores the answers to 1 of 3 prompts: the others have no answer of their own")
    assert "to 0 of 1 prompt:" in left_out("number", own)
    assert left_out("exact", known) is left_out("ended", known, own) is None


def test_what_a_limit_cut_for_the_training_is_compared_with_as_a_whole(cli, tiny, tmp_path):
    long = [{"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} is " + "said " * 40 + "so"}]}
            for n in range(8)]
    data = write_rows(tmp_path / "long.jsonl", long)
    for args in (("prepare", data, "--model", tiny, "--valid", 2, "--max-length", 40, "--on-long", "truncate", "--run", RUN),
                 ("train", "--rank", 4, "--max-steps", 1, "--samples", 0, *FP32)):
        assert cli(*args).code == 0, args
    program = tmp_path / "score.py"
    program.write_text("import json, sys\nfor line in sys.stdin: print(len(json.loads(line)['reference']), flush=True)")
    result = cli("eval", "--reward", f'command:"{sys.executable}" score.py', "--max-new-tokens", 2, "--json", *FP32)
    assert result.code == 0, result.err
    assert result.json["summary"]["measures"]["reward"]["base"][0] == len(long[0]["messages"][1]["content"])
