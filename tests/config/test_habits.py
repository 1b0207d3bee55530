"""Settings as other programs call them: what is said of them is true of the commands there are."""

from __future__ import annotations

import dataclasses
import re

import pytest

from gemma_tune.config import habits
from gemma_tune.config.stages import CONFIGS

OF = {stage: {f.name for f in dataclasses.fields(cls)} for stage, cls in CONFIGS.items()}


def test_every_option_that_is_named_is_one():
    for sentence in habits._MEANT.values():
        for stage in ("prepare", "train"):
            for name in re.findall(f"gemma-tune {stage} --([a-z-]+)", sentence):
                assert name.replace("-", "_") in OF[stage] | {"model", "run", "force", "continue"}, sentence


def test_no_name_is_taken_for_one_of_another_program_that_is_an_option_here():
    known = {name for fields in OF.values() for name in fields} - {"learning_rate", "max_length", "epochs"}
    assert not {name for name in habits._MEANT if name in known and name not in habits._MEANT[name].replace("-", "_")} - {
        "data", "adapter"}


@pytest.mark.parametrize("steps", ["1", "100"])
def test_steps_are_no_share(cli, steps):
    result = cli("train", "--warmup", steps)
    assert result.code == 2 and f"{steps} is above the largest possible 0.9; it is a share of the steps" in " ".join(
        result.err.split()).replace(".0 is", " is")


@pytest.mark.parametrize(("typed", "said"), [
    ("--lora_target", "here it is --target-modules"), ("--per-device-train-batch-size", "here it is --batch-size, times --accumulation"),
    ("--micro_batch_size", "here it is --batch-size, times --accumulation"), ("--enable_thinking", "gemma-tune prepare --thinking on, or off"),
    ("--train_type", "here it is --full for all weights; else an adapter is trained"), ("--resume_from_checkpoint", "the same command goes on where a training was stopped"),
    ("--desirable_weight", "here it is --good-weight"), ("--kto_undesirable_weight", "here it is --bad-weight"),
    ("--custom_dataset_info", "here it is gemma-tune prepare DATA, the files themselves, with --columns"), ("--split_dataset_ratio", "here it is gemma-tune prepare --valid"),
    ("--load_in_4bit", "here it is --qlora"), ("--bf16", "here it is --dtype bf16"), ("--cutoff_len", "gemma-tune prepare --max-length"),
    ("--model_name_or_path", "here it is --model"), ("--packing", "a GPU packs them"), ("--warmup_steps", "here it is --warmup, a share of the steps"),
    ("--train-on-inputs", "answers are learned, and prompts never"), ("--additional_target", "here it is --modules-to-save"),
    ("--full_finetuning", "here it is --full"), ("--add_tokens", "here it is gemma-tune prepare --new-tokens, which take unused entries"), ("--resize_vocab", "gemma-tune prepare --new-tokens names unused entries"),
    ("--data", "files of data are named without an option"), ("--deepspeed", "--strategy fsdp"),
    ("--push-to-hub-gguf", "here it is gemma-tune export-ollama --push")])
def test_a_habit_is_answered(cli, typed, said):
    result = cli("train", typed, "8")
    assert result.code == 2 and said in " ".join(result.err.split())


def test_a_file_of_another_program_says_what_its_settings_are_here(cli, tmp_path):
    (tmp_path / "lf.yaml").write_text("model_name_or_path: a/b\nlora_rank: 8\ncutoff_len: 2048\ntrain:\n  lr: 1e-4\n  rank: 4\n")
    said = " ".join(cli("train", "--config", tmp_path / "lf.yaml").err.split())
    for nothing in ("", "null", "''"):  # with which Axolotl trains all weights
        (tmp_path / "axolotl.yaml").write_text(f"adapter: {nothing}\n")
        assert "`full: true` below `train:`" in " ".join(cli("train", "--config", tmp_path / "axolotl.yaml").err.split())
    (tmp_path / "axolotl.yaml").write_text("adapter: qlora\n")
    assert "`qlora: true` below `train:`" in " ".join(cli("train", "--config", tmp_path / "axolotl.yaml").err.split())
    for text in ("lora_rank: unknown section; here it is `rank` below `train:`", "model_name_or_path: unknown section; here it is `model`",
                 "cutoff_len: unknown section; here it is `max_length` below `prepare:`",
                 "train.lr: unknown setting; here it is `learning_rate` below `train:`"):
        assert text in said


@pytest.mark.parametrize(("command", "said"), [
    ("sft", "here it is gemma-tune train"), ("dpo", "here it is gemma-tune train --method dpo"), ("fuse", "here it is gemma-tune merge"),
    ("export", "here it is gemma-tune merge, and gemma-tune export-ollama for GGUF"), ("merge-lora", "here it is gemma-tune merge"),
    ("web-ui", "here it is gemma-tune export-ollama, and Ollama serves the model")])
def test_a_command_of_another_program_is_answered(cli, command, said):
    result = cli(command, "old.yaml")
    assert result.code == 2 and " ".join(result.err.split()) == f"Error: No such command '{command}'; {said} Hint: see `gemma-tune --help`"


def test_commands_that_are_named_are_there(cli):
    from gemma_tune.cli.commands import app

    here = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    for sentence in habits._COMMANDS:
        assert {*re.findall("gemma-tune ([a-z-]+)", sentence)} <= here, sentence
    assert not here & {name for theirs in habits._COMMANDS.values() for name in theirs.split()}
    assert "Did you mean" in cli("preprare").err and "No such command 'nobody'\n" in cli("nobody").err


def test_all_linear_layers_have_another_name_here(cli):
    result = cli("train", "--target-modules", "all-linear")
    assert result.code == 2 and "target_modules: `all-linear` of PEFT is `all` here" in " ".join(result.err.split())


def test_an_option_is_named_with_its_command_where_it_is_another_s(cli):
    for command, typed, said in (("prepare", "--lora_rank", "here it is gemma-tune train --rank"), ("run", "--lora_rank", "here it is --rank"),
                                 ("prepare", "--cutoff_len", "here it is --max-length"), ("chat", "--temp", "here it is --temperature"),
                                 ("merge", "--adapter_name_or_path", "here it is gemma-tune train --from-adapter")):
        assert f"No such option: {typed}; {said}" in " ".join(cli(command, typed, "8").err.split())


@pytest.mark.parametrize(("name", "said"), [
    ("enable_thinking", "here it is `thinking: on` below `prepare:`, or off"), ("bf16", "here it is `dtype: bf16` below `train:`"),
    ("datasets", "here it is `data` below `prepare:`"), ("output_dir", "here it is `run`"), ("model_revision", "here it is `revision`"), ("nobody_s", None)])
def test_a_setting_is_named_as_a_file_has_it(name, said):
    assert habits.meant_in_file(name) == said


def test_a_step_of_another_program_is_one_of_the_same_size_here():
    from gemma_tune.config.stages import TrainConfig

    theirs = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    ours = {habits.meant(name).split("--")[1].split(",")[0].replace("-", "_"): value for name, value in theirs.items()}
    assert TrainConfig(**ours).effective_batch == 16
