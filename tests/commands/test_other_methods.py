"""One method after another in a run: what was asked for of the one before is neither kept nor refused."""

from __future__ import annotations

import json

import pytest
from commands.test_grpo import ANY, RUN, prepared, prepared_once, steps  # noqa: F401 - fixtures

from support.command import rows, write_rows

GRPO = (*ANY, "--reward", "chrf")  # which hardly ever says the same of two answers
SHORT = (*ANY[6:], "--max-steps", 1)
PAIRS = [{"prompt": f"Say {n}.", "chosen": f"The number {n}.", "rejected": f"No {n}."} for n in range(12)]


def recorded(stage: str = "train") -> dict[str, tuple]:
    config = json.loads((RUN / "manifest.json").read_text())["stages"][stage]["config"]
    return {name: (entry["value"], entry["from"]) for name, entry in config.items()}


@pytest.fixture
def data(cli, tmp_path):
    """A function that prepares pairs, or conversations, in the run."""
    files = {"pairs": write_rows(tmp_path / "pairs.jsonl", PAIRS), "chats": write_rows(tmp_path / "chats.jsonl", rows(12))}
    return lambda name: cli("prepare", files[name], "--run", RUN, "--valid", 2).code == 0


def test_answers_after_rewards_and_rewards_after_answers(cli, prepared):  # noqa: F811
    own = ("--beta", 0.5, "--temperature", 0.8, "--scale-rewards", "none")
    assert cli("train", *GRPO, *own, "--max-steps", 2).code == 0
    assert recorded()["temperature"] == (0.8, "flag") and recorded()["scale_rewards"] == ("none", "flag")
    again = cli("train", "--max-steps", 3)
    assert again.code == 0 and recorded()["beta"] == (0.5, "flag") and "kl" in steps()[-1], "the same method keeps them"
    whole = cli("train", "--full", "--dry-run")
    assert whole.code == 2 and "leave that out, or set beta to 0" in whole.err, "it is kept from before: leaving it out would not help"
    assert cli("train", "--full", "--beta", 0, "--dry-run").code == 0
    refused = cli("train", "--method", "sft", "--temperature", 0.8)
    assert refused.code == 2 and "temperature: belongs to --method grpo, and not to sft" in refused.err
    after = cli("train", "--method", "sft")
    assert after.code == 0, after.err
    for name, usual in {"reward": [], "beta": None, "temperature": 1.0, "scale_rewards": "group", "answers": 8}.items():
        assert recorded()[name] == (usual, "default"), name
    assert cli("train", "--method", "grpo", "--reward", "chrf", "--max-new-tokens", 4).code == 0
    assert recorded()["beta"] == (None, "default") and "kl" not in steps()[-1]


def test_conversations_after_pairs(cli, prepared, data):  # noqa: F811
    own = ("--beta", 0.2, "--dpo-loss", "ipo")
    assert data("pairs") and cli("train", *SHORT, *own).code == 0 and recorded()["method"] == ("dpo", "data")
    assert data("chats")
    plain = cli("train")
    assert plain.code == 0 and "dpo_loss ipo, beta 0.2: of the training before, and left out, as sft has no such thing" in " ".join(
        plain.err.replace("\n", " ").split()), plain.err
    assert (recorded()["method"], recorded()["beta"], recorded()["dpo_loss"]) == (
        ("sft", "data"), (None, "default"), ("sigmoid", "default"))
    assert data("pairs") and cli("train", *own).code == 0 and cli("train", "--method", "kto").code == 0
    assert recorded()["beta"] == (0.2, "flag"), "which means the same there"
    assert data("chats") and cli("train", *GRPO, "--max-steps", 1).code == 0
    assert recorded()["beta"] == (None, "default"), "and not for rewards"
    assert data("pairs")
    back = cli("train", "--method", "dpo")
    assert back.code == 0 and recorded()["reward"] == ([], "default"), back.err
    auto = cli("train", "--method", "auto")
    assert auto.code == 0, auto.err


def test_all_stages_from_rewards(cli, tiny, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("prepare: {valid: 4}\ntrain: {max_new_tokens: 8, answers: 4, dtype: fp32, samples: 0}\n"
                        "export-ollama: {verify: false, measure: false, calibration: false}\n")
    data = write_rows(tmp_path / "rows.jsonl", rows(12))
    result = cli("run", data, "--model", tiny, "--method", "grpo", "--reward", "chrf", "--reward", "regex=0.5:a,b", "--rank", 4,
                 "--max-steps", 1, "--quant", "q8_0", "--config", settings, "--run", RUN)
    assert result.code == 0, result.err
    rewards = ["chrf", "regex=0.5:a,b"]
    assert recorded()["method"] == ("grpo", "flag") and recorded()["reward"] == (rewards, "flag")
    assert recorded("eval")["reward"] == (rewards, "method") and recorded("eval")["max_new_tokens"] == (8, "method")
    assert "reward of an answer" in result.err.partition("summary")[2]


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_program_that_is_missing_is_told_before_anything_is_prepared(cli, tiny, tmp_path, command):
    data = write_rows(tmp_path / "rows.jsonl", rows(12))
    result = cli(command, data, "--model", tiny, "--method", "grpo", "--reward", "command:no-such-program", "--run", RUN)
    assert result.code == 2 and "there is no program no-such-program" in result.err and not RUN.exists(), result.err
