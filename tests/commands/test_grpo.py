"""``train --method grpo``: what it reaches, that it goes on bit for bit, what it starts from, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import torch
from train.test_processes import python

from gemma_tune.answers import draws
from gemma_tune.train.grpo import RewardTrainer
from gemma_tune.train.rollouts import Rollouts
from support.command import MANIFEST_SCHEMA, copied_run, invoke, rows, write_rows
from support.training import adapter_bytes, stopped_at

RUN = Path("runs/tiny-gemma")
# Half of the tiny model's answers have an "a" before it has learned anything.
ANY = ("--method", "grpo", "--max-new-tokens", 8, "--answers", 4, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-2, "--samples", 0)
GRPO = (*ANY, "--reward", "regex:a")


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory) -> Path:
    """A run of conversations; copy it, do not change it."""
    place = tmp_path_factory.mktemp("rewards")
    done = invoke("prepare", write_rows(place / "rows.jsonl", rows(16)), "--model", tiny, "--valid", 4, "--run", place / RUN)
    assert done.code == 0, done.err
    return place / RUN


@pytest.fixture
def prepared(prepared_once, tiny, tmp_path) -> Path:
    """Such a run of one's own."""
    copied_run(prepared_once, tmp_path, tiny)
    return RUN


def lines(name: str, run: Path = RUN) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / name).read_text().splitlines()]


def steps(run: Path = RUN) -> list[dict]:
    return [record for record in lines("metrics.jsonl", run) if "loss" in record]


def test_the_reward_rises_and_every_command_goes_on_from_there(cli, prepared):
    result = cli("train", *GRPO, "--answers", 8, "--max-steps", 24, "--eval-steps", 8, "--json")
    assert result.code == 0, result.err
    records = steps()
    assert records[0]["reward"] < 0.3 and sum(r["reward"] for r in records[-4:]) / 4 > 0.8
    summary = result.json["summary"]
    evaluated = {record["step"]: record["eval_reward"] for record in lines("metrics.jsonl") if "eval_reward" in record}
    assert evaluated.keys() == {0, 8, 16, 24} and evaluated[0] < 0.5 < evaluated[24]
    assert summary["eval_reward_before"] == evaluated[0] and summary["eval_reward_after"] == max(evaluated.values())
    assert evaluated[summary["kept_step"]] == max(evaluated.values()) and summary["eval_loss_after"] is None
    for record in records:
        assert record["rewards/regex/mean"] == record["reward"] and 0 <= record["frac_reward_zero_std"] <= 1
        assert 1 <= record["completions/mean_length"] <= 8 and record["reward_std"] >= 0 and abs(record["loss"]) < 1e-5
        assert 0 <= record["completions/clipped_ratio"] <= 1
    groups = lines("rollouts.jsonl")
    assert [group["step"] for group in groups] == [*range(1, 25)]
    for group in groups:
        assert len(group["answers"]) == 8 and group["begins"].startswith("Say number") and group["reference"].startswith("The number is")
        assert all(one["reward"] == one["scores"]["regex"] == float("a" in one["answer"]) for one in group["answers"])
        assert abs(sum(one["advantage"] for one in group["answers"])) < 1e-6
    assert "% of the groups had one reward" in result.err and "validation reward" in result.err and "validation loss" not in result.err
    jsonschema.validate(json.loads((prepared / "manifest.json").read_text()), MANIFEST_SCHEMA)
    assert cli("train").err.count("is up to date")
    shown = " ".join(cli("status").err.split())
    assert f"validation reward {evaluated[0]:.3f} to {max(evaluated.values()):.3f}" in shown
    assert cli("chat", "--prompt", "Say number 3.", "--max-new-tokens", 4).code == 0
    assert cli("eval", "--questions", 1, "--max-new-tokens", 4).code == 0
    page = (prepared / "report.html").read_text()
    assert "validation reward, before → after" in page and "regex:a" in page and "reward by step" in page
    assert cli("merge", "--no-check").code == 0
    assert "from rewards of its own answers (GRPO)" in (prepared / "tiny-gemma_lora_merged" / "README.md").read_text()
    assert cli("export-ollama", "--quant", "q8_0", "--no-verify", "--no-measure", "--no-calibration").code == 0


@pytest.mark.parametrize("more", [(), ("--beta", 0.5)], ids=["plain", "beta"])
def test_an_interrupted_training_goes_on_to_the_same_adapter(cli, prepared, monkeypatch, more):
    whole = shutil.copytree(prepared, prepared.with_name("whole"))
    flags = (*GRPO, "--max-steps", 6, "--save-steps", 2, "--dropout", 0.1, *more)
    assert cli("train", *flags, "--run", whole).code == 0
    stopped_at(3, monkeypatch, *flags, "--run", prepared)
    result = cli("train", "--run", prepared, "--json")  # all as it was
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 3, result.err
    assert adapter_bytes(prepared) == adapter_bytes(whole), "bit for bit"
    assert lines("rollouts.jsonl", prepared) == lines("rollouts.jsonl", whole)


def test_how_it_is_worked_on_changes_nothing(cli, prepared, monkeypatch):
    """Pieces, accumulation, recomputed activations, fewer answers sampled at once, memory that runs out: the same answers."""
    def trained(*flags: object) -> tuple[list, list, str]:
        result = cli("train", *GRPO, "--max-steps", 3, "--batch-size", 4, *flags, "--force")
        assert result.code == 0, result.err
        return [one["answers"] for one in lines("rollouts.jsonl")], [r["grad_norm"] for r in steps()], result.err

    answers, norms, _ = trained()
    tried = []

    def failing(model, chat, encoded, *more):
        tried.append(len(encoded))
        if len(encoded) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return draws.drawn_tokens(model, chat, encoded, *more)

    for flags in (("--micro-batch", 3), ("--epochs", 4), ("--batch-size", 2, "--accumulation", 2, "--activation-checkpointing")):
        with monkeypatch.context() as patch:
            if "--epochs" in flags:
                patch.setattr("gemma_tune.train.rollouts.drawn_tokens", failing)
            others, theirs, said = trained(*flags)
        if "--accumulation" not in flags:  # whose first prompt of a step is another
            assert [[a["answer"] for a in group] for group in others] == [[a["answer"] for a in group] for group in answers], flags
        assert theirs == pytest.approx(norms, rel=1e-3), flags
        if "--epochs" in flags:
            assert "out of memory while 16 answers were sampled at once: going on with 8" in said and tried[-1] <= 5


def test_memory_that_runs_out_in_learning_is_said_of_answers(cli, prepared, monkeypatch):
    plain, tried = RewardTrainer.compute_loss, []

    def failing(self, model, inputs, *more, **named):
        tried.append(len(inputs["lengths"]))
        if "rows" in inputs and tried[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return plain(self, model, inputs, *more, **named)

    monkeypatch.setattr(RewardTrainer, "probe", lambda self: 0.1)
    monkeypatch.setattr(RewardTrainer, "compute_loss", failing)
    result = cli("train", *GRPO, "--max-steps", 3, "--batch-size", 4, "--micro-batch", 16)
    assert result.code == 0 and max(tried) > 2, result.err
    assert "answers at once: going on with" in result.err and "conversations at once" not in result.err


def test_one_learning_rate_alone_is_explained(cli, prepared):
    said = cli("train", *GRPO, "--dry-run").err
    assert "Google's own" not in said and "learning_rate" not in said
    free = [flag for n, flag in enumerate(GRPO) if "--learning-rate" not in GRPO[max(0, n - 1):n + 1]]
    said = cli("train", *free, "--dry-run").err
    assert "learning_rate 1e-05: a step of grpo" in said and "Google's own" not in said


def test_two_processes_learn_what_one_does(prepared):
    alone = shutil.copytree(prepared, prepared.with_name("alone"))
    flags = (*GRPO, "--max-steps", 3, "--beta", 0.1)
    done = invoke("train", *flags, "--run", alone, "--batch-size", 4)
    assert done.code == 0, done.err
    together = python("gemma_tune", "train", *flags, "--run", prepared, "--batch-size", 2, "--num-processes", 2)
    assert together.code == 0, together.err
    for one, other in zip(steps(alone), steps(prepared), strict=True):
        for name in ("reward", "reward_std", "completions/mean_length", "frac_reward_zero_std", "tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-6), name
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3) and (one["kl"] > 0) == (one["step"] > 1)
    first, second = ([r["eval_reward"] for r in lines("metrics.jsonl", run) if "eval_reward" in r] for run in (alone, prepared))
    assert first == pytest.approx(second)


def test_beta_holds_the_model_to_where_it_began(cli, prepared):
    sft = ("--method", "sft", "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-2, "--max-steps", 2, "--samples", 0)
    assert cli("train", *sft).code == 0
    far = {}
    for beta in (0.001, 10):
        result = cli("train", *GRPO, "--max-steps", 6, "--beta", beta, "--force")
        assert result.code == 0 and "tiny-gemma_sft_adapter" in result.err and f"beta {beta:g}" in result.err, result.err
        far[beta] = [record["kl"] for record in steps()]
        assert far[beta][0] == 0 < far[beta][-1], "of the adapter that it began with"
    assert max(far[10]) < max(far[0.001]) / 3
    assert " KL " in result.err


def test_it_goes_on_from_what_learned_answers_and_from_its_end(cli, prepared):
    assert cli("train", *ANY[2:], "--method", "sft").code == 2, "answers belong to grpo"
    sft = ("--method", "sft", "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-2, "--max-steps", 2, "--samples", 0)
    assert cli("train", *sft).code == 0
    answers = adapter_bytes(prepared)
    result = cli("train", *ANY, "--reward", "chrf", "--max-steps", 2)
    assert result.code == 0 and "the run's adapter has learned answers, and is what is trained on" in result.err
    assert (prepared / "tiny-gemma_sft_adapter" / "adapter_model.safetensors").read_bytes() == answers != adapter_bytes(prepared)
    longer = cli("train", "--continue", "--max-steps", 4, "--json")
    assert longer.code == 0 and longer.json["summary"]["steps"] == 4, longer.err
    assert [record["step"] for record in steps()] == [1, 2, 3, 4] == [group["step"] for group in lines("rollouts.jsonl")]
    again = cli("train", *sft)
    assert again.code == 0 and "what the last training learned (grpo) is replaced" in again.err, "and its rewards are not kept"
    assert adapter_bytes(prepared) == answers


def test_rewards_that_never_differ_are_an_error_with_their_cause(cli, prepared):
    result = cli("train", *ANY, "--reward", "regex:no such words", "--max-steps", 6, "--json")
    assert result.code == 1, result.err
    error = result.json["error"]
    assert "no group of answers ever had two different rewards" in error["message"] and "0 to 0 in all steps" in error["message"]
    assert "logs/rollouts.jsonl" in error["hint"]
    assert "in 5 steps in a row all answers to a prompt had the same reward (now 0 on average)" in result.err
    assert not (prepared / "tiny-gemma_lora_adapter").exists()


def evaluated_as(patch: pytest.MonkeyPatch, reward: Callable[[int], float]) -> None:
    """Have each of the likeliest answers be worth so much after a step."""
    greedy = Rollouts.greedy

    def given(self, prompts, items):
        for one in (found := greedy(self, prompts, items)):
            one.rewards[:] = reward(self.trainer.state.global_step)
        return found

    patch.setattr(Rollouts, "greedy", given)


def test_early_stopping_of_rewards_that_stay_keeps_the_last_and_is_not_gone_on_from(cli, prepared, monkeypatch):
    evaluated_as(monkeypatch, lambda step: 0.5 if step < 3 else 0.75)
    flags = (*GRPO, "--max-steps", 20, "--eval-steps", 1, "--save-steps", 1, "--early-stopping", 3)
    result = cli("train", *flags, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["steps"] == result.json["summary"]["kept_step"] == 6, "three after that of step 3"
    assert "so many times in a row the validation reward was not higher" in result.err and "and was highest" not in result.err
    longer = cli("train", "--continue", "--max-steps", 30)
    assert longer.code == 2 and "--early-stopping 3 has ended the finished training" in longer.err
    assert cli("train", "--continue", "--max-steps", 30, "--early-stopping", 5).code == 0
    assert max(record["step"] for record in steps()) == 8


def test_a_reward_that_falls_keeps_the_adapter_apart(cli, prepared, monkeypatch):
    """As if the answers of the trained model were worth less: a weight of the other sign where the likeliest are scored."""
    evaluated_as(monkeypatch, lambda step: 0.1 if step else 0.9)
    few = cli("train", *GRPO, "--max-steps", 2)
    assert few.code == 0 and "did not raise the reward: validation reward 0.9 before, 0.1 after; so much can be chance" in few.err, "of 4 prompts"
    shutil.rmtree(prepared / "tiny-gemma_lora_adapter")
    assert cli("prepare", "--valid", 8).code == 0
    result = cli("train", *GRPO, "--max-steps", 2)
    assert result.code == 1 and "the training made the model worse: validation reward 0.9 before, 0.1 after" in result.err
    assert (prepared / "tiny-gemma_lora_adapter_worse").is_dir() and not (prepared / "tiny-gemma_lora_adapter").exists()


def test_a_program_scores_a_training_and_its_failure_ends_it(cli, prepared, tmp_path, monkeypatch):
    program = Path("score.py")
    text = ("import json, sys\nfor n, line in enumerate(sys.stdin):\n    one = json.loads(line)\n"
            "    assert one['prompt'][-1]['content'].startswith('Say number') and one['reference'].startswith('The number')\n"
            "    print(len(one['answer']){}, flush=True)\n")
    program.write_text(text.format(""))
    flags = (*ANY, "--reward", f'command:"{sys.executable}" score.py', "--max-steps", 2, "--save-steps", 1)
    assert cli("train", *flags).code == 0
    assert steps()[0]["rewards/command/mean"] == steps()[0]["reward"] > 0
    manifest = json.loads((prepared / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    assert [name for name in manifest["stages"]["train"]["inputs"] if name.startswith("reward")] == ["reward_score.py"], "and not the interpreter"
    monkeypatch.chdir(tmp_path.parent)
    assert "up to date" in cli("train", "--run", tmp_path / RUN).err, "from another place"
    monkeypatch.chdir(tmp_path)
    assert "up to date" in cli("train").err and cli("status").code == 0
    program.write_text(text.format(" * 2"))
    assert "stale" in cli("status").err
    again = cli("train")
    assert again.code == 0 and "`train` runs again: score.py was changed" in again.err and "up to date" in cli("train").err
    program.write_text(text.format(" if n < 8 else 'many'"))
    failed = cli("train", *flags, "--force")
    assert failed.code == 1 and "wrote 'many', which is no finite number; it was given {" in failed.err and "Traceback" not in failed.err
    gone = cli("train", *ANY, "--reward", "command:no-such-program", "--force")
    assert gone.code == 2 and "there is no program no-such-program" in gone.err


@pytest.mark.parametrize(("flags", "said"), [
    (("--method", "grpo"), "--method grpo learns from rewards, and no --reward says what answers are worth"),
    (("--reward", "exact"), "reward: belongs to --method grpo, and not to sft"),
    (("--method", "sft", "--answers", 4), "answers: belongs to --method grpo, and not to sft"),
    (("--method", "grpo", "--reward", "exakt,regex:("), "2 settings of `train` cannot be used"),
    (("--method", "grpo", "--reward", "exact", "--beta", 0.1, "--full"), "beta: of grpo does not go together with full"),
    (("--method", "grpo", "--reward", "exact", "--beta", 0.1, "--modules-to-save", "embed_tokens"), "does not go together with modules_to_save"),
    (("--method", "sft", "--beta", 0.1), "beta: belongs to --method dpo or orpo or kto or grpo, and not to sft"),
    (("--method", "grpo", "--reward", "exact", "--temperature", 0), "temperature: 0 is below the least possible 0.01"),
    (("--method", "dpo", "--beta", 0), "beta: 0 is below the least possible 0.0001 of dpo"),
    (("--method", "grpo", "--reward", "exact", "--compile"), "grpo does not go together with compile"),
    (("--method", "grpo", "--reward", "exact", "--strategy", "fsdp"), "grpo does not go together with strategy fsdp"),
    (("--method", "grpo", "--reward", "exact", "--micro-batch", 33), "micro_batch: 33 is more than the batch size, 4 x 8 answers")])
def test_settings_that_do_not_go_together(cli, prepared, flags, said):
    result = cli("train", *flags)
    assert result.code == 2 and said in result.err, result.err
    assert not (prepared / "logs").exists()


def test_what_it_cannot_learn_from(cli, tiny, prepared, tmp_path):
    settings = Path("settings.yaml")
    settings.write_text("train:\n  reward: exact\n")
    tuned = cli("tune", "--method", "grpo", "--minutes", 1, "--config", settings)
    assert tuned.code == 2 and "--method grpo has none" in tuned.err
    texts = [{"text": f"Something about number {n}, and more of it."} for n in range(4)]
    assert cli("prepare", write_rows(tmp_path / "mixed.jsonl", rows(6) + texts), "--model", tiny, "--valid", 0, "--run", "runs/mixed").code == 0
    result = cli("train", *GRPO, "--run", "runs/mixed")
    assert result.code == 2 and "4 rows are plain text without a prompt" in result.err
    pairs = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"no {n}"} for n in range(6)]
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs), "--model", tiny, "--run", "runs/pairs").code == 0
    result = cli("train", *GRPO, "--run", "runs/pairs")
    assert result.code == 2 and "learns from the prompts of conversations, and the prepared rows are pairs" in result.err
    assert "CONVERSATIONS.jsonl" in result.err


def test_the_plan_tells_what_is_sampled_and_the_most_time(cli, prepared):
    planned = cli("train", *GRPO, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert (planned.json["answers"], planned.json["answer_tokens"], planned.json["micro_batch"]) == (4, 8, 16)
    assert planned.json["seconds"] > 0 and "if every answer had all 8 tokens" in planned.json["basis"]
    assert not (prepared / "logs").exists()
    shown = " ".join(cli("train", *GRPO, "--dry-run").err.split())
    assert "4 answers of up to 8 tokens to each, sampled when its turn comes" in shown and "at most about" in shown
    longer = cli("train", *GRPO, "--max-new-tokens", 400, "--dry-run", "--json").json
    assert longer["seconds"] > planned.json["seconds"] and longer["memory"]["total"] > planned.json["memory"]["total"]


def test_numbers_that_no_reference_has_are_told(cli, tiny, tmp_path):
    records = rows(8)
    for n, record in enumerate(records[:3]):
        record["messages"][1]["content"] = "none " * (n + 1)
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", records), "--model", tiny, "--valid", 0).code == 0
    result = cli("train", *ANY, "--reward", "number", "--reward", "regex=2:a{1,3}", "--max-steps", 1)
    assert "rewards: number, the pattern `a{1,3}` with the weight 2" in " ".join(result.err.split())
    assert "--reward number: 3 answers of 8 have no number" in result.err, result.err
    assert {"rewards/number/mean", "rewards/regex/mean"} <= steps()[0].keys()
