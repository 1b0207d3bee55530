"""A command that a message proposes is about the run that the message is about, also where that is not the newest."""

from __future__ import annotations

import shutil

import pytest

from gemma_tune.cli import hints
from support.command import rows, write_rows


@pytest.fixture
def elsewhere(trained, tmp_path):
    """A run that no command works on unless it is named; runs/tiny-gemma is there as well."""
    return shutil.copytree(trained, tmp_path / "my runs" / "二")


@pytest.mark.parametrize(("text", "named"), [
    ("train again: gemma-tune train --force; or copy it", "train again: gemma-tune train --run 'my run' --force; or copy it"),
    ("`gemma-tune chat` answers", "`gemma-tune chat --run 'my run'` answers"),
    ("gemma-tune prepare DATA, then gemma-tune train", "gemma-tune prepare --run 'my run' DATA, then gemma-tune train --run 'my run'"),
    ("first gemma-tune prepare X, then gemma-tune train --run other",
     "first gemma-tune prepare --run 'my run' X, then gemma-tune train --run other"),
])
def test_the_run_is_named_in_each_command_that_names_none(text, named):
    hints.about("my run")
    assert hints.in_run(text) == named
    hints.about()
    assert hints.in_run(text) == text


@pytest.mark.parametrize("text", [
    "start it: gemma-tune prepare YOUR.jsonl --run runs/other", "`gemma-tune prepare --model FUSED` trains on from there",
    "see `gemma-tune train --help`", "gemma-tune doctor --debug shows where", "gemma-tune runs lists them",
    "upgrade gemma-tune, or start another run"])
def test_other_commands_stay(text):
    hints.about("my run")
    assert hints.in_run(text) == text
    hints.about()


def test_a_damaged_adapter(cli, elsewhere):
    adapter = elsewhere / "tiny-gemma_lora_adapter"
    write_rows(adapter / "adapter_config.json", [{"peft_type": "LORA", "r": -4}])
    assert f"gemma-tune train --run '{elsewhere}' --force" in cli("merge", "--run", elsewhere).err
    from_it = cli("merge", "--adapter", adapter, "--run", "runs/tiny-gemma", "--json")
    assert f"gemma-tune train --run '{elsewhere}' --force" in from_it.json["error"]["hint"]


def test_a_damaged_adapter_from_elsewhere_is_not_to_be_trained_again(cli, trained, tmp_path):
    outside = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "outside")
    write_rows(outside / "adapter_config.json", [{"peft_type": "LORA", "r": -4}])
    result = cli("merge", "--adapter", outside, "--run", trained)
    assert result.code == 2
    assert "copy the adapter here again" in result.err
    assert "train again" not in result.err


def test_a_prepare_that_begins_a_run_proposes_it_with_its_model(cli, tiny):
    result = cli("prepare", "-", "--model", tiny, "--run", "my run", stdin="")
    assert f"`gemma-tune prepare --run 'my run' --model {tiny} - < rows.jsonl`" in result.err


def test_a_warning_names_the_run_too(cli, elsewhere, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("prepare:\n  max_length: 77\n")
    result = cli("train", "--run", elsewhere, "--config", settings, "--json")
    wanted = f"gemma-tune prepare --run '{elsewhere}' --config FILE"
    assert wanted in result.err
    assert any(wanted in warning for warning in result.json["warnings"])


def test_the_plan_of_data_that_are_not_prepared(cli, trained, tmp_path):
    data = write_rows(tmp_path / "my rows.jsonl", rows())
    result = cli("train", data, "--dry-run", "--run", trained)
    assert f"gemma-tune prepare --run {trained} '{data}'" in result.err


def test_a_prompt_without_text(cli, trained):
    assert f'gemma-tune chat --run {trained} --prompt "…"' in cli("chat", "--run", trained, "--prompt", " ").err
