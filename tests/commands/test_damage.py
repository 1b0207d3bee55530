"""Damaged models, adapters and runs: whatever became of a file, one message, one hint, exit code 2.

The functions that read a file are called themselves, so that many kinds of damage take little time.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from support.command import QUICK
from support.damage import DEEP, edited, flipped, in_header, lost, refused
from support.merging import remember

ADAPTER = "tiny-gemma_lora_adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def base(tiny, tmp_path) -> Path:
    """A base model of one's own."""
    return Path(shutil.copytree(tiny, tmp_path / "models" / "tiny-gemma"))


@pytest.fixture
def adapter(trained_once, tmp_path) -> Path:
    """An adapter of one's own."""
    return Path(shutil.copytree(trained_once / ADAPTER, tmp_path / "adapter"))


def place():
    from gemma_tune.models.placement import Placement

    return Placement("cpu", torch.float32, "test")


def changed(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def said(result, code: int, *texts: str) -> None:
    assert result.code == code, result.err
    words = " ".join(result.err.split())
    assert words.count("Error:") == words.count("Hint:") == 1 and "unexpected" not in words, words
    assert all(text in words for text in texts), words


# --- any damage, by functions that read ------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "least"), [(edited, 4), (flipped, 7)])
def test_config_json(base, damage, least):
    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.models.source import locate
    from gemma_tune.train.shape import shape_of

    def read() -> None:
        assert isinstance(locate(str(base), None, Listener()).config["model_type"], str)
        shape_of(base, TrainConfig(), torch.float32)

    assert refused(base / "config.json", damage, read, 12) >= least


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("damage", [edited, flipped])
def test_tokenizer_files(base, name, damage):
    from gemma_tune.encoding.tokenizer import load_format

    count = refused(base / name, damage, lambda: load_format(base, "gemma3_text"), 10)
    assert count >= (0 if name == "generation_config.json" else 2)  # a tokenizer says what ends a turn as well


@pytest.mark.parametrize(("name", "damage", "least"), [
    (CONFIG, edited, 6), (CONFIG, flipped, 12), (WEIGHTS, in_header(edited), 25), (WEIGHTS, in_header(flipped), 25)])
def test_adapters(adapter, name, damage, least):
    from gemma_tune.lora.files import named_base, read_adapter

    assert refused(adapter / name, damage, lambda: (named_base(adapter), read_adapter(adapter)), 30) >= least


def test_adapters_on_a_model(adapter, tiny):
    """What is read and does not fit: PEFT has as many exceptions as settings."""
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model

    model = load_model(tiny, place())
    assert refused(adapter / CONFIG, edited, lambda: add_adapter(model, adapter).unload(), 8) >= 2


def test_manifests(trained):
    from gemma_tune.cli.run_tables import show_status
    from gemma_tune.cli.runs import list_runs
    from gemma_tune.cli.status import describe_run
    from gemma_tune.merge.card import model_card
    from gemma_tune.report.page import write_report
    from gemma_tune.run.session import open_session
    from gemma_tune.train.going_on import as_before, as_finished, continuation

    def read() -> None:
        show_status(describe_run(str(trained), None))
        list_runs(trained.parent)
        session, *_ = as_before(open_session("train", trained, epochs=9), go_on=True, writes=False)
        write_report(session.run)
        model_card(session, {})
        continuation(as_finished(session), 11)

    assert refused(trained / "manifest.json", edited, read, 20) >= 6
    assert refused(trained / "manifest.json", flipped, read, 10) >= 4
    assert refused(trained / "manifest.json", lost, read, 40) >= 10


@pytest.mark.parametrize(("figure", "change"), [("steps", {}), ("device", {"device": None})])
def test_a_finished_training_whose_record_is_not_whole_does_not_go_on(cli, trained, figure, change):
    record = json.loads((trained / "manifest.json").read_text())
    del record["stages"]["train"]["summary"][figure]
    record["stages"]["train"]["summary"] |= change
    expected = f"does not have {figure} of the finished training any more"
    (trained / "manifest.json").write_text(json.dumps(record))
    said(cli("train", "--continue", "--epochs", 2, "--run", trained), 2, expected, "--continue out to start anew")
    longer = cli("train", "--max-steps", 9, "--dry-run", "--run", trained)
    assert longer.code == 0 and "to go on from the end" not in longer.err, longer.err


def test_a_comparison_whose_record_is_not_whole(cli, trained):
    """Up to date it is shown as far as it goes; answers that the manifest does not name are given again."""
    ask = ("eval", "--questions", 1, "--max-new-tokens", 2, "--run", trained, "--json")
    assert cli(*ask).code == 0
    good = json.loads((trained / "manifest.json").read_text())
    for part, key, status in (("summary", "rows", "up-to-date"), ("summary", "measures", "up-to-date"),
                              ("outputs", "answers", "done")):
        record = json.loads(json.dumps(good))
        del record["stages"]["eval"][part][key]
        (trained / "manifest.json").write_text(json.dumps(record))
        result = cli(*ask)
        assert (result.code, result.json["status"]) == (0, status), result.err
    assert "`eval` runs again: the manifest does not name its answers" in result.err


def test_an_export_whose_record_is_not_whole(export, merged):
    assert export("--quant", "q8_0", "--no-create").code == 0
    good = json.loads((merged / "manifest.json").read_text())
    for part, key in (("summary", "quant"), ("summary", "quants"), ("outputs", "modelfile")):
        record = json.loads(json.dumps(good))
        del record["stages"]["export-ollama"][part][key]
        (merged / "manifest.json").write_text(json.dumps(record))
        said(export("--no-create"), 2, "does not have the figures of each file of the last export", "--force")
    del good["stages"]["export-ollama"]["outputs"]["gguf"]
    (merged / "manifest.json").write_text(json.dumps(good))
    assert "runs again: the manifest does not name its gguf" in export("--no-create").err


def test_gguf_headers(tiny, tmp_path):
    from gemma_tune.gguf.reader import GgufFile, read_gguf_metadata
    from gemma_tune.gguf.writer import write_gguf
    from gemma_tune.models.from_gguf import refuse_damage

    path = tmp_path / "tiny.gguf"
    write_gguf(tiny, path, "f16", name="tiny", eot_token_id=None, chat_template=None)
    end = min(tensor.offset for tensor in GgufFile(path).tensors.values())

    def damage(data, chance):
        return flipped(data[:end], chance) + data[end:]

    assert refused(path, damage, lambda: (refuse_damage(GgufFile(path)), read_gguf_metadata(path)), 30) >= 8


# --- what was seen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"[]", b"null", DEEP, b'{"model_type": "gemma3_text", "text_config": 5}',
                                     b"\xff", b'{"model_type": "gemma3_text", "hidden_size": ' + b"9" * 400 + b"}"])
def test_a_config_json_that_describes_no_model(cli, base, data, content):
    (base / "config.json").write_bytes(content)
    said(cli("prepare", data, "--model", base), 2, f"{base / 'config.json'}", "download the model again")


def test_weights_that_do_not_fit_config_json(base):
    from gemma_tune.models.load import load_model

    changed(base / "config.json", intermediate_size=96)
    with pytest.raises(UserError, match="cannot be loaded|does not fit") as e:
        load_model(base, place())
    assert "again" in e.value.hint


@pytest.mark.parametrize("values", [{"lora_alpha": 10**399}, {"lora_alpha": 1e308}, {"target_modules": 5}, {"r": -4},
                                    {"target_modules": "("}, {"layers_to_transform": "x"}, {"use_dora": "no"}])
def test_settings_of_an_adapter_that_cannot_be(cli, trained, values):
    changed(trained / ADAPTER / CONFIG, **values)
    remember(trained)
    for command in (["merge", "--no-check"], ["chat", "--prompt", "hi"]):
        said(cli(*command, "--run", trained), 2, CONFIG, f"{next(iter(values))}: ", "train again")


def test_an_adapter_whose_header_is_nested_without_end(cli, trained):
    (trained / ADAPTER / WEIGHTS).write_bytes(len(DEEP).to_bytes(8, "little") + DEEP)
    remember(trained)
    said(cli("merge", "--run", trained), 2, WEIGHTS, "nested too deeply")


def test_a_path_that_the_system_refuses(cli, trained, monkeypatch):
    """As for folders without rights, which root has everywhere."""
    from gemma_tune.models import source

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), f"{path}/model.safetensors")

    monkeypatch.setattr(source, "fingerprint", refuse)
    said(cli("prepare", "--run", trained), 2, "model.safetensors cannot be used: Permission denied", "permissions")
    said(cli("prepare", "--model", "a/" + "b" * 5000), 2, "too long a name to call files after")


def test_chat_with_closed_standard_input(trained, monkeypatch, capsys):
    from gemma_tune.cli.commands import app

    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit) as left:
        app(["chat", "--run", str(trained)])
    assert left.value.code == 2
    assert "standard input is closed" in capsys.readouterr().err


# --- nothing of an adapter or a model is imported ------------------------------------------------------------------


def test_no_setting_of_an_adapter_names_a_module_to_import(adapter, tiny, tmp_path, monkeypatch):
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model

    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron" / "core.py").write_text("raise SystemExit('this was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    changed(adapter / CONFIG, megatron_core="megatron.core", megatron_config={"num_layers": 1},
            auto_mapping={"base_model_class": "Evil", "parent_library": "megatron.core"}, task_type="megatron.core",
            eva_config={"rho": 1}, loftq_config={"loftq_bits": 4}, runtime_config={"ephemeral_gpu_offload": True})
    add_adapter(load_model(tiny, place()), adapter)
    assert not [name for name in sys.modules if name.startswith("megatron")]


def test_every_setting_of_peft_is_known():
    """A new version's new ones have to be looked at: what they compute, and whether they name something to import."""
    import dataclasses

    from peft import LoraConfig

    from gemma_tune.lora.config import _OTHER_KINDS, _OURS, COMPUTES

    refused = {"peft_type", "bias", *_OTHER_KINDS}
    only_names = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"}
    only_training = {"inference_mode", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
                     "lora_ga_config", "velora_config", "runtime_config", "qalora_group_size"}
    imports = {"megatron_config", "megatron_core"}
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= {*COMPUTES, *_OURS, *refused, *only_names,
                                                               *only_training, *imports}
    assert not {*COMPUTES, *_OURS} & (refused | only_names | only_training | imports)


def test_a_model_with_an_adapter_in_its_folder(cli, base, data, adapter):
    """Transformers would add it, with its own reading of adapter_config.json."""
    shutil.copy(adapter / CONFIG, base)
    shutil.copy(adapter / WEIGHTS, base)
    said(cli("prepare", data, "--model", base), 2, "a model and an adapter", "merge")


@pytest.mark.parametrize("part", ["config", "text_config"])
def test_a_quantiser_that_would_be_imported(cli, base, data, part):
    """Also of the text part of a multimodal model, whose own is the one that Transformers takes."""
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    changed(base / "config.json", **(quantised if part == "config" else {"text_config": quantised}))
    said(cli("prepare", data, "--model", base), 2, "is quantised (gptq)")


def test_code_beside_a_model_is_not_run(base):
    from gemma_tune.models.load import load_model

    (base / "evil.py").write_text("raise SystemExit('this was imported')")
    changed(base / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            model_type="evil")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(base, place())


# --- numbers that are none --------------------------------------------------------------------------------------------


def spoiled(path: Path, part: str) -> None:
    tensors = load_file(path)
    name = next(name for name in tensors if part in name)
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_base_with_nan_is_not_of_another_family(cli, base, data):
    spoiled(base / "model.safetensors", "down_proj")
    assert cli("prepare", data, "--model", base, "--run", "run").code == 0
    said(cli("train", *QUICK, "--run", "run"), 2, "the base model holds infinities or no numbers (NaN) in 1 tensor",
         "mlp.down_proj", "download the model again")
    for more in ([], ["--temperature", 1]):
        said(cli("chat", "--base", "--prompt", "hi", "--run", "run", *more), 2, "the base model holds", "down_proj")


def test_an_adapter_with_nan(cli, trained):
    spoiled(trained / ADAPTER / WEIGHTS, "lora_B")
    remember(trained)
    for command in (["chat", "--prompt", "hi"], ["eval"]):
        said(cli(*command, "--run", trained), 2, "the adapter holds infinities or no numbers", "lora_B")


def test_an_alpha_without_bounds(cli, trained):
    said(cli("train", "--alpha", 1e308, "--run", trained), 2, "alpha: 1e+308 is above the largest possible 1e+06")


def test_what_was_made_from_stale_data_is_not_made_again_each_time(cli, trained, data):
    """Its own inputs are the same, so its result would be too; what renews it is named."""
    stages = {"train": (), "merge": ("--no-check",), "export-ollama": ("--quant", "f16", "--no-verify", "--no-measure")}
    for stage in ("merge", "export-ollama"):
        assert cli(stage, *stages[stage]).code == 0
    data.write_text(data.read_text() + json.dumps({"messages": [{"role": "user", "content": "Say number 77."},
                                                                {"role": "assistant", "content": "77"}]}) + "\n")
    assert "stale" in cli("status", "--json").json["stages"]["train"]["state"]
    for stage, named in (("train", "renew it: gemma-tune prepare"), ("merge", "renew it, begin with: gemma-tune prepare"),
                         ("export-ollama", "renew it, begin with: gemma-tune prepare")):
        result = cli(stage, *stages[stage], "--json")
        assert result.json["status"] == "up-to-date", result.err
        assert named in result.err and "is stale" in result.err
    assert cli("prepare").code == 0
    assert "runs again" in cli("train").err
    assert "renew it: gemma-tune merge" in cli("export-ollama").err


def test_the_hint_for_a_damaged_manifest_names_its_run_and_model(cli, trained, tiny, data):
    """By itself `prepare` would begin a run of the default model."""
    path = trained / "manifest.json"
    path.write_text(path.read_text()[:-20])
    result = cli("status", "--run", trained)
    assert result.code == 2
    assert f"gemma-tune prepare DATA --run {trained} --model {os.path.normpath(tiny)}" in result.err
    assert cli("prepare", data, "--run", trained.with_name("x"), "--model", os.path.normpath(tiny)).code == 0
    commit = "0123456789abcdef0123456789abcdef01234567"
    path.write_text(f'{{"model": {{"id": "org/name", "name": "name", "source": "hub", "revision": "{commit}", "path": null')
    assert f"--model org/name@{commit}" in cli("status", "--run", trained).err
    path.write_text("{")
    assert "--model MODEL" in cli("status", "--run", trained).err
