"""A run whose model is in few bits: said before any work, trained, and merged into the 16-bit model that is named."""

from __future__ import annotations

import json
import ntpath
import posixpath
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.command import QUICK, copied_run, invoke, rows, write_rows
from support.merging import peft_merge
from support.models import make_model

NAME = "tiny-gemma-bnb-4bit"
RUN = Path("runs") / NAME
MERGED = RUN / f"{NAME}_lora_merged"


@pytest.fixture(scope="module")
def four_bit(tiny, tmp_path_factory) -> Path:
    """The tiny model as bitsandbytes writes it in 4 bits."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("quantised") / NAME)
    (folder / "model.safetensors").unlink()
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, quantization_config=how).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantised_once(four_bit, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("four-bit")
    data = write_rows(place / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", four_bit), ("train", *QUICK)):
        result = invoke(*args, "--run", place / RUN)
        assert result.code == 0, result.err
    return place / RUN


@pytest.fixture
def run(quantised_once, tmp_path, four_bit) -> Path:
    return copied_run(quantised_once, tmp_path, four_bit)


def as_hub_model(folder: Path, card: str, model_id: str, **config) -> object:
    from gemma_tune.models.source import BaseModel

    folder.mkdir()
    (folder / "README.md").write_text(card)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", **config}))
    return BaseModel(model_id, "name", "hub", folder, "c" * 40, "", {})


@pytest.mark.parametrize(("model_id", "card", "original"), [
    ("unsloth/gemma-3-270m-it-unsloth-bnb-4bit", "---\nbase_model: google/gemma-3-270m-it\n---", "unsloth/gemma-3-270m-it"),
    ("me/gemma-bnb-4bit", "---\nbase_model:\n- google/gemma-3-270m-it\n---", "google/gemma-3-270m-it"),
    ("me/gemma-bnb-4bit", "---\nbase_model: unsloth/gemma-3-1b-it-bnb-4bit\n---", "unsloth/gemma-3-1b-it"),
    ("me/gemma-bnb-4bit", "no header", "me/gemma"), ("me/gemma-AWQ", "", None),
    ("me/gemma-AWQ", "---\nbase_model: google/gemma-3-270m-it\n---", "google/gemma-3-270m-it")])
def test_the_16_bit_model_is_named_where_something_tells(tmp_path, model_id, card, original):
    from gemma_tune.models.quantised import sixteen_bit

    assert sixteen_bit(as_hub_model(tmp_path / "model", card, model_id)) == original


def test_all_weights_are_those_of_16_bits(cli, run, tiny):
    refused = cli("train", "--full")
    assert refused.code == 2 and "this model is quantised (bitsandbytes)" in refused.err, refused.err
    assert "leave --full out" in refused.err and "qlora" not in refused.err
    whole = cli("train", *QUICK, "--modules-to-save", "embed_tokens", "--force", "--samples", 0)
    assert whole.code == 0, whole.err
    assert cli("merge", "--base", tiny).code == 0
    expected, ours = peft_merge(tiny, run / f"{NAME}_lora_adapter"), load_file(MERGED / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.items())
    named = cli("train", "--modules-to-save", "q_proj", "--force")
    assert named.code == 2 and "names what is not trained as a whole here: q_proj" in named.err, named.err


@pytest.mark.parametrize(("config", "method"), [
    ({}, None), ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
    ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"), ({"quantization": {"bits": 4}}, "mlx"),
    ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4, "group_size": 64}}, "mlx")])
def test_the_method_is_read(config, method):
    from gemma_tune.models.quantised import quantisation

    assert quantisation(config) == method


@pytest.mark.parametrize("config", [{"quantization_config": {"quant_method": "gptq"}},
                                    {"quantization_config": {"quant_method": "awq"}}, {"quantization": {"bits": 4}}])
def test_what_cannot_be_trained_on_is_refused_before_any_work(cli, trained, tiny, tmp_path, data, config):
    base = shutil.copytree(tiny, tmp_path / "quantised")
    (base / "README.md").write_text("---\nbase_model: google/gemma-3-270m-it\n---\n")
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
    result = cli("prepare", data, "--model", base)
    assert result.code == 2
    assert "quantised is quantised (" in result.err and "--model google/gemma-3-270m-it" in result.err
    assert not Path("runs/quantised/data").exists()
    from gemma_tune.base.errors import UserError
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    with pytest.raises(UserError, match="trains on 16-bit weights") as raised:
        load_model(base, choose_placement("fp32"))
    assert "bitsandbytes (Linux" not in raised.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_it_computes_in_the_type_that_was_chosen(four_bit, dtype):
    """A GPU without bf16 trains in fp32 on what was stored in bf16."""
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import Placement

    model = load_model(four_bit, Placement("cpu", dtype, ""))
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14 and {p.dtype for p in model.parameters()} == {torch.uint8, dtype}
    seen = []
    for layer in layers:
        layer.register_forward_hook(lambda module, given, out: seen.extend([given[0].dtype, module.compute_dtype, out.dtype]))
    ids = torch.arange(3, 30)[None]
    logits = model(input_ids=ids).logits
    assert set(seen) == {dtype} == {logits.dtype} and {layer.weight.quant_state.dtype for layer in layers} == {dtype}
    exact = load_model(four_bit, Placement("cpu", torch.float32, ""))(input_ids=ids).logits
    assert (logits.float() - exact).norm() < 0.03 * exact.norm()


def test_prepare_says_what_merge_will_need(cli, four_bit, data):
    result = cli("prepare", data, "--model", four_bit)
    assert result.code == 0, result.err
    assert f"{NAME} is quantised (bitsandbytes)" in result.err and "gemma-tune merge --run runs/tiny-gemma-bnb-4bit --base tiny-gemma" in result.err


def test_the_next_step_of_a_training_names_the_base(run, four_bit, cli):
    from gemma_tune.merge.base import next_step
    from gemma_tune.run.session import open_session

    session = open_session("train", run)
    assert next_step(session) == f"gemma-tune merge --run {run} --base tiny-gemma"
    session.manifest.stages["merge"] = {"config": {"base": {"value": "somewhere", "from": "flag"}}, "outputs": {}, "inputs": {},
                                          "base": "another"}
    assert next_step(session) == f"gemma-tune merge --run {run}"


def test_run_asks_for_the_base_before_it_trains(cli, four_bit, data):
    result = cli("run", data, "--model", four_bit)
    assert result.code == 2
    assert "`run` would have nothing to merge into" in result.err and "merge:" in result.err
    assert not (RUN / "training_checkpoints").exists()


def test_merged_into_the_base_that_is_named(cli, run, tiny):
    from transformers import AutoModelForCausalLM

    refused = cli("merge")
    assert refused.code == 2 and f"gemma-tune merge --run {RUN} --base tiny-gemma" in refused.err
    result = cli("merge", "--base", tiny, "--json")
    assert result.code == 0, result.err
    assert result.json["run"] == str(RUN)
    assert f"base: tiny-gemma, in 16 bits; the adapter was trained on {NAME}" in result.err
    assert "is not the same" not in result.err
    assert result.json["summary"]["check_divergence"] < 5e-3
    expected = peft_merge(tiny, run / f"{NAME}_lora_adapter")
    ours = load_file(MERGED / "model.safetensors")
    assert ours.keys() == load_file(tiny / "model.safetensors").keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, expected[name]), name
    assert "quantization_config" not in json.loads((MERGED / "config.json").read_text())
    _, info = AutoModelForCausalLM.from_pretrained(MERGED, output_loading_info=True)
    assert not any(info.values()), info
    card = (MERGED / "README.md").read_text()
    assert "| Base model | `tiny-gemma`" in card and f"trained on `{NAME}`" in card
    assert cli("status", "--json").json["stages"]["merge"]["state"] == "done"


def test_the_base_is_recorded_and_taken_again(cli, run, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "elsewhere/tiny-gemma")
    assert cli("merge", "--base", base, "--no-check").code == 0
    record = json.loads((RUN / "manifest.json").read_text())
    assert record["model"]["id"] == NAME
    merge = record["stages"]["merge"]
    assert merge["config"]["base"] == {"value": "../../elsewhere/tiny-gemma", "from": "flag"}
    assert merge["inputs"]["outside_base"]["path"] == "../../elsewhere/tiny-gemma"
    for flags in ([], ["--base", base]):
        again = cli("merge", "--no-check", "--json", *flags)
        assert again.json["status"] == "up-to-date", again.err
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert cli("status", "--json").json["stages"]["merge"]["state"] == "stale: tiny-gemma was changed"
    assert cli("merge", "--no-check", "--json").json["status"] == "done"
    shutil.rmtree(base)
    gone = cli("merge", "--no-check")
    assert gone.code == 2 and "there is no directory" in gone.err


def test_another_model_is_no_base(cli, run, tmp_path):
    other = make_model(tmp_path / "bigger", hidden_size=96, vocab_size=500)
    result = cli("merge", "--run", run, "--base", other)
    assert result.code == 2
    assert f"bigger is not the model that {NAME} was made from" in result.err
    assert "hidden_size is 96, not 64" in result.err and "vocab_size is 500" in result.err
    assert not MERGED.exists()


def test_another_version_of_the_model_is_told_of(cli, run, tiny, tmp_path):
    other = shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    changed = {name: tensor + 1 if tensor.ndim == 1 else tensor for name, tensor in weights.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    result = cli("merge", "--run", run, "--base", other, "--no-check")
    assert result.code == 0, result.err
    assert "is not the same in other" in result.err


def test_a_quantised_base_is_none(cli, run, four_bit):
    result = cli("merge", "--base", four_bit)
    assert result.code == 2 and "merging into it would round the result again" in result.err


def test_an_unquantised_run_has_its_base(cli, trained, tiny, tmp_path):
    other = make_model(tmp_path / "other")
    result = cli("merge", "--run", trained, "--model", tiny, "--base", other)
    assert result.code == 2 and "is not quantised: it is the base itself" in result.err


@pytest.mark.parametrize(("paths", "found", "named"), [
    (posixpath, "elsewhere/base", "./elsewhere/base"), (posixpath, "../base", "./../base"),
    (ntpath, "elsewhere\\base", ".\\elsewhere\\base"), (ntpath, "D:\\models\\base", "D:\\models\\base")])
def test_a_base_on_another_drive_is_found_again_by_its_whole_path(monkeypatch, paths, found, named):
    from types import SimpleNamespace

    from gemma_tune.merge import base

    manifest = SimpleNamespace(stages={"merge": {"inputs": {base.INPUT: {"path": "as the manifest has it"}}}})
    session = SimpleNamespace(config=SimpleNamespace(base=None), manifest=manifest, run=SimpleNamespace(found=lambda path: found),
                              settings_of=lambda stage: {"base": "as the manifest has it"})
    monkeypatch.setattr(base, "os", SimpleNamespace(path=paths))
    assert base._named(session) == (named, None)


def test_a_base_of_the_hub_is_taken_again_at_its_commit(tmp_path):
    from types import SimpleNamespace

    from gemma_tune.merge.base import _named
    from gemma_tune.models.source import split_revision

    manifest = SimpleNamespace(stages={"merge": {"inputs": {}}})
    session = SimpleNamespace(config=SimpleNamespace(base=None), manifest=manifest,
                              settings_of=lambda stage: {"base": f"org/base@{'c' * 40}"})
    assert _named(session) == ("org/base", "c" * 40)
    (tmp_path / "base@v2").mkdir()
    assert split_revision(str(tmp_path / "base@v2")) == (str(tmp_path / "base@v2"), None)
