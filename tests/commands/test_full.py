"""--full and --modules-to-save: trained, resumed, loaded, compared with a training by PyTorch alone, merged and served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from commands.test_families import make
from safetensors.torch import load_file
from train.test_start import made

from gemma_tune.lora.layers import TOWERS
from support.command import MANIFEST_SCHEMA, rows, write_rows
from support.gemmas import FAMILIES, make_family
from support.merging import merged_tensors, peft_merge
from support.models import make_model
from support.training import adapter_bytes, by_hand, plain_loss, stopped_at

RUN = Path("runs/tiny-gemma")
ADAPTER = RUN / "tiny-gemma_lora_adapter"
LEARN = ("--epochs", 3, "--learning-rate", 3e-3, "--dtype", "fp32", "--json")


@pytest.fixture
def prepared(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    return RUN


def config() -> dict:
    return json.loads((ADAPTER / "adapter_config.json").read_text())


def changed(tiny: Path) -> set[str]:
    base = load_file(tiny / "model.safetensors")
    return {name for name, tensor in merged_tensors(RUN).items() if not torch.equal(tensor, base[name])}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_weights_are_trained_loaded_and_merged(cli, prepared, tiny, dtype):
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    result = cli("train", *LEARN, "--dtype", dtype, "--full")
    assert result.code == 0, result.err
    assert "full fine-tuning, 28 modules as a whole" in result.err and "28 of 28 modules changed" in result.err
    summary = result.json["summary"]
    assert summary["eval_loss_after"] < 0.9 * summary["eval_loss_before"]
    base = load_file(tiny / "model.safetensors")
    assert summary["trainable_parameters"] == sum(tensor.numel() for tensor in base.values())
    assert config()["target_modules"] == "dummy-target-modules" and {"embed_tokens", "norm"} < {*config()["modules_to_save"]}
    jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)

    tuned = add_adapter(load_model(tiny, choose_placement(dtype)), ADAPTER)
    total, count = plain_loss(tuned, by_hand(prepared, "valid"))
    assert total / count == pytest.approx(summary["eval_loss_after"], rel=1e-5 if dtype == "fp32" else 5e-3)
    with tuned.disable_adapter():
        total, count = plain_loss(tuned, by_hand(prepared, "valid"))
    assert total / count == pytest.approx(summary["eval_loss_before"], rel=1e-5 if dtype == "fp32" else 5e-3)

    assert cli("eval", "--questions", 1, "--max-new-tokens", 2).code == 0
    page = (RUN / "report.html").read_text()
    assert "all weights, no adapter" in page and "LoRA" not in page

    merged = cli("merge", "--json")
    assert merged.code == 0, merged.err
    assert merged.json["summary"]["check_divergence"] < 1e-3
    expected = peft_merge(tiny, ADAPTER)
    for name, tensor in merged_tensors(RUN).items():
        assert torch.equal(tensor, expected[name]), name
    assert changed(tiny) == base.keys(), "a head of its own is not written: it stays the embedding"
    assert "full fine-tuning" in (RUN / "tiny-gemma_lora_merged" / "README.md").read_text()


def test_the_steps_are_those_of_adamw_on_the_whole_model(cli, prepared, tiny):
    """By plain autograd and PyTorch's own optimiser, in fp64, on the same batches."""
    from transformers import AutoModelForCausalLM

    flags = ("--full", "--batch-size", 64, "--max-steps", 2, "--schedule", "constant", "--warmup", 0, "--clip", 1e6,
             "--learning-rate", 1e-3, "--dtype", "fp32", "--keep", "last", "--samples", 0)
    assert cli("train", *flags).code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rows = by_hand(prepared, "train")
    assert len(rows) <= 64
    for _ in range(2):
        total = sum(torch.nn.functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], torch.tensor(labels[1:]),
                                                      ignore_index=-100, reduction="sum") for ids, labels in rows)
        (total / sum(label != -100 for _, labels in rows for label in labels[1:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, base = load_file(ADAPTER / "adapter_model.safetensors"), load_file(tiny / "model.safetensors")
    for name, weight in model.state_dict().items():
        got = ours[f"base_model.model.{name}"].double()
        start = base["model.embed_tokens.weight" if name == "lm_head.weight" else name].double()
        # Adam's first steps go by the sign of the gradient, and hardly by its size: where it is next to nothing, rounding
        # decides.
        apart = (got - weight).abs() > 1e-5
        assert apart.double().mean() < 2e-3, name
        assert (got - start).abs().max() < 2.1e-3, name


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_each_evaluation_is_of_the_weights_as_they_are(cli, tiny, data, tmp_path, monkeypatch, method):
    """Also in a captured step, which reads what was rounded last, and cannot look whether that is old."""
    from gemma_tune.train.adapters import NarrowCopies

    rows = [{"prompt": f"What is a {n}?", "chosen": f"It is a {n}.", "rejected": f"Well, many say {n}"} for n in range(10)]
    file = data if method == "sft" else write_rows(tmp_path / "pairs.jsonl", rows)
    assert cli("prepare", file, "--model", tiny, "--valid", 3).code == 0
    flags = ("--full", "--max-steps", 4, "--eval-steps", 1, "--learning-rate", 1e-3, "--dtype", "bf16", "--keep", "last", "--samples", 0)
    plain = NarrowCopies.of

    def as_replayed(self, index, dtype):
        return self._copies[dtype][index] if dtype in self._copies else plain(self, index, dtype)

    def always_new(self, index, dtype):
        plain(self, index, dtype).copy_(self._weights[index].detach())
        return self._copies[dtype][index]

    logged = []
    for way in (always_new, plain, as_replayed):
        monkeypatch.setattr(NarrowCopies, "of", way)
        assert cli("train", *flags, "--force").code == 0
        lines = map(json.loads, (RUN / "logs/metrics.jsonl").read_text().splitlines())
        logged.append([record[name] for record in lines for name in ("loss", "eval_loss") if name in record])
    assert logged[0] == logged[1] == logged[2] and len({*logged[0]}) > 7


def test_what_a_single_step_did_is_seen_without_validation_rows(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny, "--valid", 0).code == 0
    result = cli("train", "--full", "--max-steps", 1, "--learning-rate", 1e-3, "--dtype", "bf16", "--samples", 0, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["divergence_from_base"] > 1e-3


def test_what_has_changed_is_told_of_what_is_saved(cli, tiny, data, tmp_path):
    """A step may be less than bf16 holds of a weight."""
    from safetensors.torch import save_file

    model = shutil.copytree(tiny, tmp_path / "tiny-gemma")
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1.5 if "norm" in name else tensor for name, tensor in weights.items()}, model / "model.safetensors",
              {"format": "pt"})
    assert cli("prepare", data, "--model", model).code == 0
    result = cli("train", "--full", "--max-steps", 2, "--learning-rate", 1e-5, "--dtype", "bf16", "--samples", 0, "--json")
    assert result.code == 0, result.err
    base, saved = load_file(model / "model.safetensors"), load_file(ADAPTER / "adapter_model.safetensors")
    changes = {name: saved[f"base_model.model.{name}"].double() - tensor.double() for name, tensor in base.items()}
    still = [name for name, change in changes.items() if not change.any()]
    assert 0 < len(still) < 28, "the case itself"
    assert f"{28 - len(still)} of 28 modules changed" in result.err and result.json["summary"]["unchanged_layers"] == len(still)
    assert "modules that did not change, as no gradient reached them, or they moved by less than their type holds: " in result.err
    norm = sum(change.square().sum() for change in changes.values()) ** 0.5
    assert result.json["summary"]["adapter_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_nothing_is_copied_to_be_saved(cli, prepared, monkeypatch):
    """PEFT copies what is a part of another tensor, as all weights are. Where the head is the embedding, a checkpoint has that
    once, and what the training leaves behind twice, as plain PEFT asks for both."""
    from peft import peft_model

    from gemma_tune.train.trainer import GemmaTrainer

    save, file, there, copied = GemmaTrainer._save, peft_model.safe_save_file, set(), []

    def saving(self, *given):
        there.update(p.data_ptr() for p in self._trainable())
        return save(self, *given)

    monkeypatch.setattr(GemmaTrainer, "_save", saving)
    monkeypatch.setattr(peft_model, "safe_save_file", lambda tensors, *given, **how: copied.append(
        [name for name, tensor in tensors.items() if tensor.data_ptr() not in there]) or file(tensors, *given, **how))
    assert cli("train", *LEARN, "--full").code == 0
    *checkpoints, left = copied
    assert len(checkpoints) > 1 and not any(checkpoints) and len(left) == 1, copied


def test_a_checkpoint_has_a_head_that_is_the_embedding_once_and_is_an_adapter_as_any(cli, prepared, tiny):
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    assert cli("train", *LEARN, "--full", "--keep", "last").code == 0
    checkpoint = max((RUN / "training_checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    once, twice = (load_file(place / "adapter_model.safetensors") for place in (checkpoint, ADAPTER))
    assert twice.keys() - once.keys() == {"base_model.model.lm_head.weight"} and len(once) == 28
    assert all(torch.equal(once[name], twice[name]) for name in once)
    logits = []
    for place in (checkpoint, ADAPTER):
        with torch.no_grad():
            logits.append(add_adapter(load_model(tiny, choose_placement("fp32")), place)(torch.arange(5, 25)[None]).logits)
    assert torch.equal(*logits)
    merged = []
    for place in (ADAPTER, checkpoint):
        assert cli("merge", "--adapter", place, "--base", tiny, "--no-check", "--force").code == 0
        merged.append(merged_tensors(RUN))
    assert "lm_head.weight" not in merged[1] and merged[0].keys() == merged[1].keys()
    assert all(torch.equal(tensor, merged[1][name]) for name, tensor in merged[0].items())


@pytest.mark.parametrize("flags", [("--full",), ("--modules-to-save", "embed_tokens,norm", "--rank", 4)], ids=["full", "some"])
def test_interrupted_it_goes_on_to_the_same_weights(cli, prepared, monkeypatch, flags):
    assert cli("train", *LEARN, *flags).code == 0
    expected = adapter_bytes(prepared)
    stopped_at(5, monkeypatch, *LEARN, *flags, "--force")
    resumed = cli("train", *LEARN)
    assert resumed.code == 0, resumed.err
    assert resumed.json["summary"]["resumed_from_step"] == 5
    assert adapter_bytes(prepared) == expected


def watched(monkeypatch) -> list[list[str]]:
    """Which of the base's own weights, but for vectors, are in memory in each step of trainings from here on."""
    from gemma_tune.lora.whole import copies_in
    from gemma_tune.train.trainer import GemmaTrainer

    step, found = GemmaTrainer.training_step, []

    def looked_at(self, *given, **how):
        found.append([name for name, (base, _) in copies_in(self.model).items() if any(p.ndim > 1 for p in base.parameters())])
        return step(self, *given, **how)

    monkeypatch.setattr(GemmaTrainer, "training_step", looked_at)
    return found


@pytest.mark.parametrize("flags", [("--full",), ("--modules-to-save", "embed_tokens,o_proj,norm", "--rank", 4)], ids=["full", "some"])
def test_the_base_is_on_the_disk_while_steps_are_made_and_all_is_as_if_it_were_not(cli, prepared, monkeypatch, flags):
    from gemma_tune.train import learned
    from gemma_tune.train.base_weights import BaseWeights

    def trained(dtype: str) -> tuple:
        result = cli("train", *LEARN, "--dtype", dtype, "--samples", 2, "--force", *flags)
        assert result.code == 0, result.err
        answers = [{**json.loads(line), "seconds": 0} for line in Path(RUN, "logs", "samples.jsonl").read_text().splitlines()]
        summary = result.json["summary"]
        return adapter_bytes(prepared), answers, *(summary[name] for name in ("divergence_from_base", "adapter_norm", "eval_loss_after"))

    in_steps, moments, compare = watched(monkeypatch), [], learned.logit_change
    monkeypatch.setattr(learned, "logit_change", lambda trainer, rows: moments.append(trainer.optimizer) or compare(trainer, rows))
    monkeypatch.setattr("gemma_tune.train.samples.SHARE", 1000.0)  # of so short a training there is no time for answers
    found = {dtype: trained(dtype) for dtype in ("fp32", "bf16")}
    assert len(in_steps) > 10 and not any(in_steps)
    assert moments == [None, None], "which have left room for it"
    monkeypatch.setattr(BaseWeights, "rest", lambda self, checkpoint: None)
    assert found == {dtype: trained(dtype) for dtype in found} and in_steps[-1]


def test_modules_beside_an_adapter(cli, prepared, tiny):
    result = cli("train", *LEARN, "--modules-to-save", "embed_tokens,input_layernorm", "--rank", 4)
    assert result.code == 0, result.err
    assert "LoRA of rank 4, scaled by alpha / r = 8, on 14 linear layers (" in result.err
    assert ", and 3 modules as a whole (embed_tokens, input_layernorm)" in result.err
    assert "learned: 17 of 17 adapted layers and modules changed" in result.err
    merged = cli("merge", "--json")
    assert merged.code == 0 and merged.json["summary"]["check_divergence"] < 1e-3, merged.err
    expected = peft_merge(tiny, ADAPTER)
    for name, tensor in merged_tensors(RUN).items():
        assert torch.equal(tensor, expected[name]), name
    assert len(changed(tiny)) == 14 + 3
    assert config()["modules_to_save"] == ["embed_tokens", "input_layernorm", "lm_head"] and config()["ensure_weight_tying"]


def test_a_linear_layer_as_a_whole_has_no_adapter(cli, prepared, tiny):
    result = cli("train", *LEARN, "--modules-to-save", "o_proj", "--rank", 4)
    assert result.code == 0 and "on 12 linear layers" in result.err, result.err
    assert cli("merge").code == 0
    weights = load_file(ADAPTER / "adapter_model.safetensors")
    assert not any("o_proj.lora" in name for name in weights) and sum("o_proj" in name for name in weights) == 2


def test_a_head_of_its_own_is_trained(cli, data, tmp_path):
    untied = make_model(tmp_path / "untied", tie_word_embeddings=False)
    assert cli("prepare", data, "--model", untied, "--run", "runs/untied").code == 0
    result = cli("train", *LEARN, "--full", "--run", "runs/untied")
    assert result.code == 0 and "29 of 29 modules changed" in result.err, result.err
    assert cli("merge", "--run", "runs/untied", "--json").json["summary"]["check_divergence"] < 1e-3


def test_preferences_go_on_from_what_all_weights_have_learned(cli, tiny, tmp_path):
    rows = [{"prompt": f"What is a {word}?", "chosen": f"It is a {word}.", "rejected": f"Well, many say a {word} is a {word}"}
            for word in ("market", "share", "profit", "price", "value", "rate", "loss", "bank", "fund", "risk")]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    assert cli("prepare", pairs, "--model", tiny, "--valid", 3).code == 0
    learned = cli("train", *LEARN, "--full", "--method", "sft")
    assert learned.code == 0, learned.err
    preferred = cli("train", "--method", "dpo", "--epochs", 3, "--learning-rate", 1e-3, "--dtype", "fp32", "--json")
    assert preferred.code == 0, preferred.err
    assert "the run's adapter has learned answers" in preferred.err
    assert preferred.json["summary"]["eval_loss_before"] == pytest.approx(0.6931, abs=1e-4), "the reference is what it begins with"
    assert preferred.json["summary"]["eval_loss_after"] < 0.6
    assert preferred.json["summary"]["trainable_parameters"] == learned.json["summary"]["trainable_parameters"]
    assert cli("merge", "--json").json["summary"]["check_divergence"] < 1e-3


def test_an_adapter_with_whole_modules_is_trained_further(cli, prepared, tiny):
    assert cli("train", *LEARN, "--modules-to-save", "embed_tokens", "--rank", 4).code == 0
    before = load_file(ADAPTER / "adapter_model.safetensors")
    again = cli("train", "--from-adapter", ADAPTER, "--epochs", 1, "--learning-rate", 1e-3, "--dtype", "fp32", "--json")
    assert again.code == 0, again.err
    after = load_file(ADAPTER / "adapter_model.safetensors")
    assert after.keys() == before.keys() and not any(torch.equal(after[name], before[name]) for name in after)
    assert cli("merge", "--json").json["summary"]["check_divergence"] < 1e-3


def test_two_processes_learn_what_one_does(cli, prepared):
    flags = ("--full", "--max-steps", 2, "--learning-rate", 1e-3, "--dtype", "fp32", "--samples", 0, "--keep", "last", "--schedule",
             "constant", "--warmup", 0)
    assert cli("train", *flags, "--batch-size", 4).code == 0
    one = load_file(ADAPTER / "adapter_model.safetensors")
    both = cli("train", *flags, "--batch-size", 2, "--num-processes", 2, "--force")
    assert both.code == 0, both.err
    for name, weight in load_file(ADAPTER / "adapter_model.safetensors").items():
        assert ((weight - one[name]).abs() > 1e-5).double().mean() < 5e-3, name


def test_another_kind_of_training_leaves_the_other_s_settings_behind(cli, prepared):
    assert cli("train", "--rank", 4, "--learning-rate", 1e-3, "--max-steps", 1).code == 0
    full = cli("train", "--full", "--max-steps", 1, "--json")
    assert full.code == 0, full.err
    assert "learning rate 2e-05: a tenth of an adapter's" in full.err and "rank" not in full.err.split("settings as before", 1)[-1][:60]
    settings = json.loads((RUN / "manifest.json").read_text())["stages"]["train"]["config"]
    assert settings["learning_rate"]["value"] == pytest.approx(2e-5) and settings["rank"]["value"] == 16
    kept = cli("train", "--max-steps", 2)
    assert kept.code == 0 and "full fine-tuning" in kept.err, "as before"
    still = cli("train", "--no-dora", "--dropout", 0, "--modules-to-save", "none", "--dry-run")
    assert still.code == 0 and "settings as before: full True" in still.err, "what asks for nothing is no adapter's"
    for flags in (("--qlora",), ("--target-modules", "all")):
        lora = cli("train", *flags, "--dry-run")
        assert lora.code == 0 and "learning rate 0.0002" in lora.err and "tokens/s in the last training" not in lora.err, lora.err
    lora = cli("train", "--rank", 8, "--max-steps", 1)
    assert lora.code == 0 and "LoRA of rank 8" in lora.err, lora.err
    assert "tokens/s in the last training" not in cli("train", "--full", "--dry-run").err


@pytest.mark.parametrize(("stopped", "now", "rate"), [(("--rank", 8), ("--full",), 2e-5), (("--full",), ("--rank", 8), 2e-4)])
def test_an_interrupted_training_of_the_other_kind_is_not_mixed_with_this_one(cli, prepared, monkeypatch, stopped, now, rate):
    stopped_at(3, monkeypatch, "--samples", 0, *stopped)
    refused = cli("train", "--samples", 0, *now)
    assert refused.code == 2 and "holds an interrupted training with other settings" in refused.err, refused.err
    anew = cli("train", "--samples", 0, "--max-steps", 1, "--force", *now)
    assert anew.code == 0, anew.err
    settings = json.loads((RUN / "manifest.json").read_text())["stages"]["train"]["config"]
    assert settings["learning_rate"]["value"] == pytest.approx(rate)


@pytest.mark.parametrize("name", ["qwen3.5 with an eye", "gemma 4 with an ear", "gemma 3n with an eye", "mistral small 3.2",
                                  "gemma4-unified"])
def test_all_weights_of_a_family(cli, tmp_path, monkeypatch, name):
    """The text model's; what sees and hears is in the merged model as it was. In bf16 on every machine: what four steps in
    fp32 change is in part less than the checkpoint's own type can tell."""
    model, in_steps = tmp_path / "model", watched(monkeypatch)
    make_family(name, model) if name in FAMILIES else make(name, model)
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", model),
                 ("train", "--full", "--max-steps", 4, "--learning-rate", 1e-3, "--keep", "last", "--samples", 0,
                  "--dtype", "bf16"),
                 ("eval", "--max-new-tokens", 3), ("merge",)):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
    assert len(in_steps) >= 4 and not any(in_steps), "the checkpoint's names lead to all of the model's"
    assert result.json["summary"]["check_divergence"] < 1e-3 < result.json["summary"]["check_adapter_effect"]
    before, after = ({name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
                     for folder in (model, Path(result.json["artifacts"]["merged"])))
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if TOWERS.search(name)} <= same
    text = {name for name in before if not TOWERS.search(name)}
    assert len(text & same) < 0.2 * len(text), sorted(text & same)


def test_it_answers_in_the_form_of_its_model_that_sees(cli, tmp_path):
    """Which names layers otherwise than the text model that was trained."""
    from gemma_tune.lora.load import add_adapter
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement

    model, run = tmp_path / "model", tmp_path / "run"
    make("qwen3.5 with an eye", model)
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", model),
                 ("train", "--full", "--max-steps", 2, "--learning-rate", 1e-3, "--dtype", "fp32", "--samples", 0)):
        result = cli(*args, "--run", run)
        assert result.code == 0, result.err
    answers = {}
    for sight in ("none", "towers"):
        tuned = add_adapter(load_model(model, choose_placement("fp32"), sight=sight), run / "model_lora_adapter")
        with torch.no_grad():
            answers[type(tuned.get_base_model())] = tuned(torch.arange(5, 25)[None]).logits
            with tuned.disable_adapter():
                base = tuned(torch.arange(5, 25)[None]).logits
    text, sees = answers.values()
    assert torch.allclose(text, sees, atol=1e-4) and not torch.allclose(sees, base, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen 3 with experts", "mamba 2", "dense granite hybrid"])
def test_a_model_of_which_much_would_stay_is_refused(cli, tmp_path, name):
    make(name, tmp_path / "model")
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", tmp_path / "model").code == 0
    result = cli("train", "--full")
    assert result.code == 2 and "--full does not train all of this model" in result.err, result.err
    assert "train an adapter: leave --full out" in result.err


@pytest.mark.parametrize(("flags", "said"), [
    (("--full", "--rank", 8), "rank: belongs to an adapter, and --full trains none"),
    (("--full", "--qlora"), "full: does not go together with qlora"),
    (("--full", "--compile"), "full: does not go together with compile"),
    (("--full", "--strategy", "fsdp", "--num-processes", 2), "full: does not go together with strategy fsdp"),
    (("--full", "--modules-to-save", "norm"), "modules_to_save: belongs to an adapter"),
    (("--modules-to-save", "q_proj", "--target-modules", "q_proj"), "modules_to_save: q_proj is in --target-modules, too"),
    (("--modules-to-save", "embed_token"), "names what the model does not have: embed_token (did you mean embed_tokens?)")])
def test_what_does_not_go_together_is_named(cli, prepared, flags, said):
    result = cli("train", *flags)
    assert result.code == 2 and said in result.err, result.err
    assert "Traceback" not in result.err and not ADAPTER.exists()


def test_linear_layers_that_get_4_bits_are_refused_before_anything_is_loaded(cli, prepared, monkeypatch):
    """With what else is wrong."""
    monkeypatch.setattr("gemma_tune.train.stage.with_weights", lambda *_: pytest.fail("weights were asked for"))
    for more in ((), ("--dry-run",)):
        result = cli("train", "--qlora", "--modules-to-save", "o_proj,nomr,up_proj", "--target-modules", "q_prj", *more)
        assert result.code == 2, result.err
        for said in ("--modules-to-save names linear layers, which --qlora keeps in 4 bits and LoRA adapts: o_proj, up_proj; and "
                     "what the model does not have: nomr (did you mean norm?)", "--target-modules names what the model does not have: q_prj",
                     "modules that can be trained as a whole beside --qlora are embed_tokens, input_layernorm"):
            assert said in " ".join(result.err.split()), result.err
    assert cli("train", "--qlora", "--modules-to-save", "embed_tokens,norm", "--dry-run").code == 0


def test_the_card_of_modules_from_elsewhere_names_them(cli, tiny, tmp_path):
    given = made(tiny, tmp_path / "given", target_modules="dummy-target-modules", modules_to_save=["norm"])
    result = cli("merge", "--adapter", given, "--base", tiny, "--no-check", "--run", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    card = Path(result.json["artifacts"]["merged"], "README.md").read_text()
    assert "none, but whole `norm`" in card and "with its own weights trained" in card and "full fine-tuning" not in card


def test_all_stages_in_one_go(cli, data, tiny):
    Path("settings.yaml").write_text("train: {samples: 0}\nexport-ollama: {verify: false, measure: false}\n")
    flags = ("--full", "--max-steps", 2, "--learning-rate", 1e-3, "--questions", 1, "--config", "settings.yaml")
    result = cli("run", data, "--model", tiny, *flags, "--json")
    assert result.code == 0, result.err
    assert result.json["stages"]["train"]["summary"]["trainable_parameters"] > 100_000 and config()["modules_to_save"]
    assert result.json["stages"]["merge"]["summary"]["check_divergence"] < 1e-3
    card = Path(result.json["stages"]["merge"]["artifacts"]["merged"], "README.md").read_text()
    assert "none: full fine-tuning" in card and "LoRA" not in card
    assert cli("run", *flags, "--json").json["status"] == "up-to-date"


def test_a_dry_run_tells_of_it(cli, prepared):
    result = cli("train", "--full", "--dry-run")
    assert result.code == 0 and "learning rate 2e-05" in result.err, result.err
    lora = cli("train", "--dry-run")
    assert lora.code == 0
