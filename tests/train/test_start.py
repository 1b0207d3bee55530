"""``--from-adapter``: a training that starts from an adapter of plain PEFT is exactly where that is."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.command import write_rows
from support.models import make_model
from support.training import adapter_bytes, by_hand, plain_loss, stopped_at

RUN = Path("runs/tiny-gemma")
ADAPTER = RUN / "tiny-gemma_lora_adapter"
FLAGS = ("--dtype", "fp32", "--learning-rate", 1e-3, "--epochs", 1)


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Of the losses: it takes a good part of so small a training."""
    monkeypatch.setattr("gemma_tune.train.stage.plot", lambda *_: None)


@pytest.fixture
def prepared(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    return RUN


def made(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter as plain PEFT saves it, far from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"} | settings))
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=generator)
        elif "magnitude" in name or "modules_to_save" in name:
            p.data.mul_(1.1)
    model.save_pretrained(folder)
    return folder


def loss_of(base: Path, adapter: Path, run: Path) -> float:
    """On the validation rows, with transformers and PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    total, count = plain_loss(model, by_hand(run, "valid"))
    return total / count


def first_loss(run: Path = RUN) -> float:
    return json.loads((run / "logs" / "metrics.jsonl").read_text().splitlines()[0])["eval_loss"]


EVERYTHING = {"use_dora": True, "use_rslora": True, "target_modules": r".*\.1\..*(q|v|up)_proj",
              "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"up_proj": 3}}


def test_it_begins_where_the_adapter_is(cli, prepared, tiny, tmp_path, monkeypatch):
    """The first loss is PEFT's own; at a rate of zero nothing moves, which is refused."""
    monkeypatch.setattr("gemma_tune.train.learned.clear", lambda checkpoints: None)
    given = made(tiny, tmp_path / "given", **EVERYTHING)
    expected, tensors = loss_of(tiny, given, prepared), load_file(given / "adapter_model.safetensors")
    result = cli("train", "--from-adapter", given, "--dtype", "fp32", "--learning-rate", 0, "--max-steps", 2)
    assert "starting from the adapter ../../given: rank 4, alpha 6, rslora True, dora True" in result.err
    assert result.code == 1 and "changed nothing" in result.err and not (prepared / ADAPTER.name).exists()
    assert first_loss() == pytest.approx(expected, rel=2e-5)
    after = load_file(prepared / "training_checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert after.keys() == tensors.keys()
    assert all(torch.equal(after[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("whole", [{"modules_to_save": ["norm"]}, {"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]},
                                   {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
                                   {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}], ids=str)
def test_it_begins_where_its_whole_modules_are(cli, prepared, tiny, tmp_path, whole):
    given = made(tiny, tmp_path / "given", **whole)
    result = cli("train", "--from-adapter", given, *FLAGS, "--max-steps", 1, "--samples", 0, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["eval_loss_before"] == pytest.approx(loss_of(tiny, given, prepared), rel=2e-5)
    assert loss_of(tiny, ADAPTER, prepared) == pytest.approx(result.json["summary"]["eval_loss_after"], rel=2e-5)


@pytest.mark.parametrize(("tied", "whole", "said"), [
    (True, {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens was trained with embedding and head apart from each other"),
    (True, {"modules_to_save": ["lm_head"]}, "lm_head was trained with embedding and head apart from each other"),
    (True, {"modules_to_save": ["embed_tokens", "lm_head"]}, "lm_head was trained with embedding and head apart from each other"),
    (False, {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
     "model.embed_tokens was trained with embedding and head as one tensor, and they are two")], ids=str)
def test_a_head_that_is_the_embedding_in_one_of_both_alone_is_refused(cli, data, tmp_path, tied, whole, said):
    """Unsloth trains both apart, and PEFT by itself the one that is named: that is no training of the base as it is."""
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    assert cli("prepare", data, "--model", base).code == 0
    refused = cli("train", "--from-adapter", made(base, tmp_path / "given", **whole), *FLAGS)
    assert refused.code == 2 and said in refused.err, refused.err


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_learning_rate_suits_what_the_adapter_trains(cli, tiny, tmp_path, method):
    """All weights learn with a tenth; a rate that was given for them stays, also where the training goes on."""
    pairs = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"No {n}, never."} for n in range(12)]
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs), "--model", tiny).code == 0
    flags, default = ("--max-steps", 1, "--samples", 0), {"sft": 2e-5, "dpo": 5e-6}[method]
    assert cli("train", "--full", "--method", "sft", *flags).code == 0
    full, lora = shutil.copytree(ADAPTER, tmp_path / "full"), made(tiny, tmp_path / "lora")

    def rate(*more: object) -> float:
        result = cli("train", "--dry-run", "--json", "--method", method, *flags, *more)
        assert result.code == 0, result.err
        return result.json["learning_rate"]

    assert cli("train", "--from-adapter", "none", "--no-full", "--method", "sft", "--rank", 8, "--learning-rate", 1e-3, *flags).code == 0
    assert rate("--from-adapter", full) == pytest.approx(default) and rate("--from-adapter", full, "--lr", 0.1) == 0.1
    trained = cli("train", "--from-adapter", full, "--lr", 1e-4, "--method", method, *flags)
    assert trained.code == 0 and "starting from the adapter ../../full: full True\n" in trained.err, trained.err
    assert rate() == rate("--continue", "--max-steps", 2) == 1e-4
    assert rate("--from-adapter", lora) == pytest.approx(10 * default)


def test_the_same_command_on_the_run_s_own_weights_is_no_other_training(cli, prepared, tmp_path):
    flags = ("--max-steps", 1, "--samples", 0, "--dtype", "fp32")
    assert cli("train", "--full", *flags).code == 0
    full = shutil.copytree(ADAPTER, tmp_path / "full")
    assert cli("train", "--no-full", *flags).code == 0
    for place in (full, ADAPTER):
        assert cli("train", "--from-adapter", place, *flags).code == 0
    again = cli("train", "--from-adapter", ADAPTER, *flags, "--json")
    assert again.code == 0 and again.json["status"] == "up-to-date", again.err


@pytest.mark.parametrize(("kept", "asked", "said", "leave"), [
    ("full", ("--rank", 8), "rank: rank 8 was asked for, and the adapter holds all weights", "leave --rank out"),
    ("full", ("--no-full",), "full: full False was asked for, and the adapter holds all weights", "leave --no-full out"),
    ("lora", ("--full",), "full: full True was asked for, and the adapter holds LoRA", "leave --full out"),
    ("lora", ("--modules-to-save", "norm"), "modules_to_save norm was asked for, and the adapter has modules_to_save none",
     "leave --modules-to-save out")])
def test_all_weights_and_lora_do_not_go_on_from_one_another(cli, prepared, tiny, tmp_path, kept, asked, said, leave):
    place = made(tiny, tmp_path / "lora")
    if kept == "full":
        assert cli("train", "--full", *FLAGS, "--max-steps", 1).code == 0
        place = shutil.copytree(ADAPTER, tmp_path / "full")
    result = cli("train", "--from-adapter", place, *asked, "--dry-run")
    assert result.code == 2 and said in result.err and leave in result.err, result.err


def test_what_was_trained_further_is_an_adapter_for_plain_peft(cli, prepared, tiny, tmp_path):
    """Also where it is on some layers alone: their short names would mean others too."""
    given = made(tiny, tmp_path / "given", **EVERYTHING)
    result = cli("train", "--from-adapter", given, *FLAGS, "--json")
    assert result.code == 0, result.err
    summary, before = result.json["summary"], loss_of(tiny, given, prepared)
    assert summary["eval_loss_after"] < summary["eval_loss_before"] == pytest.approx(before, rel=2e-5)
    assert loss_of(tiny, ADAPTER, prepared) == pytest.approx(summary["eval_loss_after"], rel=2e-5)
    old, new = (load_file(folder / "adapter_model.safetensors") for folder in (given, ADAPTER))
    assert {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in old.items()}
    assert all(not torch.equal(new[name], t) for name, t in old.items())
    targets = json.loads((ADAPTER / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 3 and all(".layers.1." in name for name in targets)
    record = json.loads((prepared / "manifest.json").read_text())["stages"]["train"]
    assert record["config"]["from_adapter"] == {"value": "../../given", "from": "flag"}
    assert record["config"]["rank"] == {"value": 4, "from": "adapter"}
    assert record["inputs"]["outside_from_adapter_adapter_model"]["path"] == "../../given/adapter_model.safetensors"


def test_layers_are_found_under_the_names_of_a_multimodal_model(tiny, tmp_path):
    """Which transformers gives them where the whole model was loaded; their weights go to the same places."""
    from gemma_tune.lora.files import read_adapter
    from gemma_tune.lora.start import weights_of
    from gemma_tune.train.shape import adapted_layers

    given = made(tiny, tmp_path / "given")
    plain = read_adapter(given)
    expected = weights_of(plain, adapted_layers(tiny, plain))
    tensors = load_file(given / "adapter_model.safetensors")
    for names in ("language_model.model.", "model.language_model."):
        save_file({name.replace("base_model.model.model.", f"base_model.model.{names}"): t
                   for name, t in tensors.items()}, given / "adapter_model.safetensors")
        renamed = read_adapter(given)
        assert all(layer.startswith(names) for layer in renamed.layers)
        found = weights_of(renamed, adapted_layers(tiny, renamed))
        assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_the_content_counts_and_the_choice_stays(cli, prepared, tiny, tmp_path):
    given = made(tiny, tmp_path / "given")
    assert cli("train", "--from-adapter", given, *FLAGS).code == 0
    first = adapter_bytes(prepared)
    again = cli("train", "--json")
    assert (again.code, again.json["status"]) == (0, "up-to-date"), again.err
    shutil.copytree(given, tmp_path / "moved")
    assert cli("train", "--from-adapter", tmp_path / "moved", "--json").json["status"] == "up-to-date"
    tensors = load_file(given / "adapter_model.safetensors")
    save_file({name: t * 1.5 for name, t in tensors.items()}, given / "adapter_model.safetensors")
    changed = cli("train", "--from-adapter", given, "--json")
    assert changed.json["status"] == "done" and adapter_bytes(prepared) != first
    assert changed.json["summary"]["eval_loss_before"] == pytest.approx(loss_of(tiny, given, prepared), rel=2e-5)
    plain, zero = cli("train", "--dry-run"), cli("train", "--from-adapter", "none", "--dry-run")
    assert "starting from the adapter ../../given, as before: rank 4" in plain.err and plain.code == 0
    assert "starting from" not in zero.err and zero.code == 0


def test_an_interrupted_one_goes_on_by_itself(cli, prepared, tiny, tmp_path, monkeypatch):
    given = made(tiny, tmp_path / "given")
    flags = ("--from-adapter", given, *FLAGS, "--epochs", 2)
    assert cli("train", *flags).code == 0
    expected = adapter_bytes(prepared)
    stopped = stopped_at(2, monkeypatch, *flags, "--force")
    assert f"--from-adapter {given.relative_to(tmp_path)}" in stopped.err
    result = cli("train", "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 2, result.err
    assert adapter_bytes(prepared) == expected


def test_the_change_that_is_told_is_from_the_start_also_where_a_checkpoint_goes_on(cli, prepared, tiny, tmp_path):
    given = made(tiny, tmp_path / "given")
    assert cli("train", "--from-adapter", given, *FLAGS, "--schedule", "constant").code == 0
    result = cli("train", "--continue", "--epochs", 2, "--json")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (given, ADAPTER))
    changes = [1.5 * (after[name.replace("lora_A", "lora_B")] @ after[name] - before[name.replace("lora_A", "lora_B")] @ before[name])
               for name in before if "lora_A" in name]  # alpha / r is 1.5
    moved = torch.cat([change.flatten() for change in changes]).norm().item()
    assert result.json["summary"]["adapter_norm"] == pytest.approx(moved, rel=1e-3)


def test_all_that_does_not_fit_is_told_before_any_work(cli, prepared, tiny, tmp_path):
    given = made(tiny, tmp_path / "given", target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    tensors = load_file(given / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    save_file(tensors | {name: torch.zeros(4, 63)}, given / "adapter_model.safetensors")
    result = cli("train", "--from-adapter", given, "--rank", 8, "--json")
    assert result.code == 2
    problems = result.json["error"]["problems"]
    assert problems[0] == "rank: rank 8 was asked for, and the adapter has rank 4"
    assert any("embed_tokens is an embedding" in problem for problem in problems)
    assert any("q_proj has the shape (64, 64) in the base, (64, 63) in the adapter" in problem for problem in problems)
    assert not (prepared / "logs").exists() and not (prepared / "training_checkpoints").exists()


def test_a_rank_that_contradicts_the_adapter_is_told_with_what_works(cli, prepared, tiny, tmp_path):
    """Without --from-adapter the run starts from the same one as before, so leaving it out would change nothing."""
    assert cli("train", "--from-adapter", made(tiny, tmp_path / "given"), *FLAGS).code == 0
    refused = cli("train", "--rank", 8, "--alpha", 9, *FLAGS)
    assert refused.code == 2 and "no training can start here from the adapter given\n" in refused.err
    assert "leave --rank, --alpha out, as the adapter brings them along, or from zero: --from-adapter none" in refused.err
    assert cli("train", *FLAGS, "--dry-run").code == 0
    assert cli("train", "--rank", 8, "--alpha", 9, "--from-adapter", "none", *FLAGS, "--dry-run").code == 0


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere", "there is no directory nowhere"), ("a/b/c", "there is no directory a/b/c"),
    ("runs/tiny-gemma/training_checkpoints", "is this run's own, and the training would replace it")])
def test_places_that_cannot_be(cli, trained, name, said):
    result = cli("train", "--from-adapter", name)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err


def test_one_of_another_base_is_refused_by_its_name(trained, tiny, tmp_path):
    from dataclasses import replace

    from gemma_tune.base.errors import UserError
    from gemma_tune.run.session import open_session
    from gemma_tune.train.start import with_start

    given = made(tiny, tmp_path / "given")
    config = json.loads((given / "adapter_config.json").read_text())
    session = open_session("train", trained, from_adapter=str(given))
    for ours, theirs, refused in (("google/gemma-3-270m-it", "google/gemma-3-270m", True),
                                  ("google/gemma-3-270m-it", "unsloth/gemma-3-270m-it-unsloth-bnb-4bit", False)):
        (given / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": theirs}))
        of_hub = replace(session, model=replace(session.model, id=ours, source="hub"))
        if refused:
            with pytest.raises(UserError) as raised:
                with_start(of_hub, None)
            assert list(raised.value.problems) == [f"it was trained on {theirs}, and this run's model is {ours}"]
        else:
            assert with_start(of_hub, None)[0].config.rank == 4


@pytest.mark.parametrize(("asked", "brought", "agrees"), [
    ((), ("q_proj",), True), (("all",), ("experts", "q_proj"), True), (("all", "experts"), ("experts", "q_proj"), True),
    (("all", "experts"), ("q_proj",), False), (("experts",), ("experts", "q_proj"), False), (("q_proj", "experts"), ("experts", "q_proj"), True)])
def test_all_layers_leave_the_choice_to_the_adapter_and_experts_do_not(asked, brought, agrees):
    from gemma_tune.config.stages import TrainConfig
    from gemma_tune.train.start import _agrees

    assert _agrees(TrainConfig(target_modules=asked), "target_modules", brought) == agrees


def test_from_the_hub(cli, prepared, tiny, tmp_path, monkeypatch):
    """Two files of one commit, which is recorded; afterwards nobody is asked."""
    from support.hub import LoopbackHub

    given = made(tiny, tmp_path / "given")
    with LoopbackHub() as hub:
        hub.isolate(monkeypatch, tmp_path)
        commit = hub.add_repo("somebody/analyst", given)
        hub.add_repo("somebody/model", tiny)
        result = cli("train", "--from-adapter", "somebody/analyst", *FLAGS, "--json")
        assert result.code == 0, result.err
        assert result.json["summary"]["eval_loss_before"] == pytest.approx(loss_of(tiny, given, prepared), rel=2e-5)
        config = json.loads((prepared / "manifest.json").read_text())["stages"]["train"]["config"]
        assert config["from_adapter"]["value"] == f"hf:somebody/analyst@{commit}"
        fetched = [path.rsplit("/", 1)[-1] for path in hub.paths("GET") if "/resolve/" in path]
        assert set(fetched) <= {"adapter_config.json", "adapter_model.safetensors"}
        count = len(hub.requests)
        assert cli("train", "--json").json["status"] == "up-to-date" and len(hub.requests) == count
        wrong = cli("train", "--from-adapter", "somebody/model")
        assert wrong.code == 2 and "is no PEFT adapter: it has no adapter_config.json" in wrong.err


def test_one_that_is_damaged_is_named(cli, prepared, tiny, tmp_path):
    """Cut short before any work; numbers that are none before the first step."""
    given = made(tiny, tmp_path / "given")
    weights = given / "adapter_model.safetensors"
    tensors = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-9])
    cut = cli("train", "--from-adapter", given, *FLAGS)
    assert cut.code == 2 and "given cannot be read" in cut.err and "adapter_model.safetensors" in cut.err
    save_file({name: t.clone().fill_(float("nan")) for name, t in tensors.items()}, weights)
    refused = cli("train", "--from-adapter", given, *FLAGS)
    assert refused.code == 2 and "the adapter holds infinities or no numbers (NaN) in 8 tensors" in refused.err
    assert not list(prepared.glob("training_checkpoints/*")) and not ADAPTER.exists()


def test_of_a_run_that_was_copied_elsewhere_the_place_is_said(cli, prepared, tiny, tmp_path):
    """From its settings file, and from what its last training was asked."""
    made(tiny, tmp_path / "given")
    assert cli("train", *FLAGS, "--max-steps", 1, "--from-adapter", "given").code == 0
    copy = tmp_path / "deep" / "er" / "still" / "copy"
    shutil.copytree(prepared, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"]["path"] = os.path.relpath(tiny, copy)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    place = tmp_path / "deep" / "er" / "given"
    for flags in (("--config", copy / "train.yaml"), ("--run", copy)):
        missing = cli("train", *flags, "--force", "--json")
        assert missing.code == 2, missing.err
        error = missing.json["error"]
        assert f"there is no directory {place}: the adapter that the training starts from is ../../given, relative to the run" in error["message"]
        assert "--from-adapter PATH" in error["hint"]
        assert cli("train", *flags, "--from-adapter", tmp_path / "given", "--dry-run").code == 0
