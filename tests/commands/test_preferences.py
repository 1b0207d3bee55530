"""``train`` on pairs and judged answers: what it reaches, that it goes on bit for bit, and what it starts from."""

from __future__ import annotations

import itertools
import json
import math
import shlex
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.base.words import small_size
from gemma_tune.cli.status import describe_run
from gemma_tune.encoding.tokens import lengths_of, liked, open_tokens, trained_of
from gemma_tune.train import reference
from gemma_tune.train.preference import PreferenceTrainer
from gemma_tune.train.preference_loss import PreferenceLoss
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.units import Units
from support.command import MANIFEST_SCHEMA, copied_run, invoke, write_rows
from support.training import adapter_bytes, stop_at, stopped_at

FLAGS = ("--epochs", 4, "--rank", 4, "--dtype", "fp32", "--learning-rate", 5e-3, "--samples", 0)
SHORT = (*FLAGS, "--epochs", 1)  # three steps, the last of them on what is left of the pairs
RUN = Path("runs/tiny-gemma")
WORDS = ("market", "share", "profit", "price", "value", "rate", "loss", "bank", "fund", "risk", "tax", "cost", "gain", "debt")


def pairs(count: int = 14) -> list[dict]:
    """The chosen answer is short, the rejected one is not."""
    return [{"prompt": f"What is a {word}?", "chosen": f"It is a {word}.",
             "rejected": f"Well, about a {word} " + "one could say many things, " * (1 + n % 3)}
            for n, word in enumerate(WORDS[:count])]


def judged() -> list[dict]:
    return [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs() for side in ("chosen", "rejected")]


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory) -> Path:
    """A run of pairs; copy it, do not change it."""
    place = tmp_path_factory.mktemp("pairs")
    done = invoke("prepare", write_rows(place / "pairs.jsonl", pairs()), "--model", tiny, "--valid", 4, "--run", place / RUN)
    assert done.code == 0, done.err
    return place / RUN


@pytest.fixture
def prepared(prepared_once, tiny, tmp_path) -> Path:
    """Such a run of one's own."""
    copied_run(prepared_once, tmp_path, tiny, "pairs.jsonl")
    return RUN


def log(run: Path = RUN) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path = RUN) -> torch.Tensor:
    weights = load_file(run / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.mark.parametrize("flags", [(), ("--dpo-loss", "ipo"), ("--label-smoothing", 0.1), ("--sft-weight", 0.5), ("--method", "orpo"),
                                   ("--method", "kto")], ids=["dpo", "ipo", "smoothed", "rpo", "orpo", "kto"])
def test_held_out_pairs_come_into_order(cli, prepared, flags):
    result = cli("train", *FLAGS, *flags, "--json")
    assert result.code == 0, result.err
    first, last = (record for record in (log()[0], log()[-1]))
    assert first["step"] == 0 and last["eval_loss"] < first["eval_loss"]
    if "kto" not in flags:
        assert last["eval_rewards/accuracies"] == 1.0, "each held-out pair"
        assert result.json["summary"]["eval_accuracy_after"] == 1.0
        assert "100% prefer the chosen answer" in result.err
    assert last["eval_rewards/margins"] > first["eval_rewards/margins"]
    assert last["eval_rewards/margins"] == pytest.approx(last["eval_rewards/chosen"] - last["eval_rewards/rejected"], rel=1e-4)
    manifest = json.loads((RUN / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    method = flags[1] if "--method" in flags else "dpo"
    assert manifest["stages"]["train"]["config"]["method"] == {"value": method, "from": "flag" if "--method" in flags else "data"}
    assert manifest["stages"]["train"]["summary"]["method"] == method
    if not flags:
        assert first["eval_loss"] == pytest.approx(math.log(2), rel=1e-5), "at the start the model is its reference"
        assert "method dpo: the data are pairs" in result.err
        assert cli("train").err.count("is up to date")
        assert cli("status", "--json").json["stages"]["train"]["state"] == "done"


@pytest.mark.parametrize(("flags", "shares"), [((), True), (("--method", "orpo"), True), (("--dropout", 0.1), True),
                                               (("--activation-checkpointing",), False), (("--method", "kto"), False)],
                         ids=["dpo", "orpo", "dropout", "checkpointing", "kto"])
def test_a_prompt_goes_through_once_and_nothing_else_changes(cli, prepared, monkeypatch, flags, shares):
    theirs, passes = PreferenceLoss._shared, []
    monkeypatch.setattr(PreferenceLoss, "_shared", lambda self, *args: passes.append(1) or theirs(self, *args))
    flags = (*SHORT, *flags)
    assert cli("train", *flags).code == 0
    assert bool(passes) == shares
    found, records = adapter(), log()
    monkeypatch.setattr(PreferenceTrainer, "_can_share", lambda self: False)
    passes.clear()
    assert cli("train", *flags, "--force").code == 0
    assert not passes
    if "--dropout" in flags:  # what is dropped is not the same
        return
    for one, other in zip(records, log(), strict=True):
        for name in {"loss", "eval_loss", "eval_rewards/margins", "eval_logps/chosen", "eval_logps/rejected"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name
    assert (found - adapter()).norm() <= 1e-2 * found.norm()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_an_evaluation_reads_a_batch_when_its_turn_comes(cli, prepared, monkeypatch, method):
    read, computed, ahead = Units.__getitems__, PreferenceTrainer._evaluate_piece, []
    monkeypatch.setattr(Units, "__getitems__", lambda self, units: ahead.append(1) or read(self, units))
    monkeypatch.setattr(PreferenceTrainer, "_evaluate_piece", lambda self, part: ahead.append(-1) or computed(self, part))
    monkeypatch.setattr(PreferenceTrainer, "begin_steps", lambda self: ahead.clear())
    monkeypatch.setattr(PreferenceTrainer, "_measure_divergence", lambda self, batches: None)
    monkeypatch.setattr(GemmaTrainer, "train", lambda self, **how: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli("train", *FLAGS, "--method", method, "--batch-size", 1).code == 130
    assert ahead.count(-1) == {"dpo": 4, "kto": 8}[method]
    assert max(itertools.accumulate(ahead)) <= 2, "the loader reads the next one beside it"


def test_a_training_that_changed_nothing_is_told_the_rate_of_its_method(cli, prepared):
    result = cli("train", *FLAGS[2:6], "--epochs", 1, "--learning-rate", 1e-12, "--json")
    assert result.code == 1 and "a learning rate of 1e-12 is too small" in result.json["error"]["message"], result.err
    assert result.json["error"]["hint"] == "train again with --learning-rate 5e-05"


def test_without_prepared_pairs_the_hint_is_prepare(cli, prepared):
    assert cli("train", *FLAGS[2:6], "--max-steps", 1, "--samples", 0).code == 0
    manifest = json.loads((RUN / "manifest.json").read_text())
    del manifest["stages"]["prepare"]
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    result = cli("train")
    assert result.code == 2 and "gemma-tune prepare" in result.err, result.err


def test_judged_answers_are_learned_by_kto(cli, tiny, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", judged()), "--model", tiny, "--valid", 6).code == 0
    result = cli("train", *FLAGS, "--json")
    assert result.code == 0 and "method kto: the data are answers that are good or bad" in result.err
    assert log()[-1]["eval_rewards/margins"] > 0.1 and "eval_rewards/accuracies" not in log()[-1]
    alone = cli("train", *FLAGS, "--batch-size", 1, "--max-steps", 4, "--force")
    assert alone.code == 0 and "step 1/4" in alone.err
    for record in (record for record in log() if "loss" in record):
        [side] = {name.split("/")[1] for name in record if "/" in name}
        assert side in ("chosen", "rejected") and record[f"logps/{side}"] < 0, "no figures of the side that has no answer"
    assert "eval_rewards/margins" in log()[-1]
    result = cli("train", "--method", "dpo")
    assert result.code == 2 and "learns from two answers to each prompt" in result.err and "--method sft" in result.err


def test_other_methods_on_other_data(cli, tiny, data, prepared, tmp_path):
    result = cli("train", *SHORT, "--method", "sft", "--json")  # of pairs the chosen answers alone
    assert result.code == 0, result.err
    assert "rewards/margins" not in log()[-1] and result.json["summary"]["method"] == "sft"
    assert cli("prepare", data, "--model", tiny, "--run", "runs/chats").code == 0
    for method in ("dpo", "orpo", "kto"):
        result = cli("train", "--method", method, "--run", "runs/chats")
        assert result.code == 2 and "the prepared rows are conversations" in result.err
    for flags, said in ((("--beta", 0.2), "beta: belongs to --method dpo or orpo or kto"), (("--dpo-loss", "ipo"), "dpo_loss"),
                        (("--good-weight", 2), "good_weight: belongs to --method kto")):
        result = cli("train", "--method", "sft", *flags)
        assert result.code == 2 and said in result.err


def test_the_plan_of_pairs_tells_sequences_from_pairs(cli, prepared):
    planned = cli("train", *FLAGS, "--dry-run", "--json").json
    longest = max(len(ids) for ids in open_tokens(RUN / "data" / "tokens" / "train.arrow")["input_ids"])
    assert planned["longest_sequence"] == longest < planned["longest"]
    shown = " ".join(cli("train", *FLAGS, "--dry-run").err.split())
    assert f"of up to {planned['longest']} tokens, both answers together" in shown and f"x {longest} tokens at once" in shown


@pytest.mark.parametrize(("method", "row"), [("dpo", "1 pair of 2 x"), ("kto", "1 answer of")])
def test_memory_that_does_not_suffice_is_said_of_what_is_trained(cli, prepared, monkeypatch, method, row):
    monkeypatch.setattr("gemma_tune.train.job.available", lambda device: 500_000_000)
    longest = max(len(ids) for ids in open_tokens(RUN / "data" / "tokens" / "train.arrow")["input_ids"])
    refused = cli("train", *FLAGS, "--method", method)
    assert refused.code == 2 and f"of memory with {row} {longest} tokens at once" in refused.err


def test_the_time_of_another_method_is_not_that_of_the_last_training(cli, prepared):
    assert cli("train", *FLAGS, "--method", "orpo", "--max-steps", 1).code == 0
    for method, basis in (("orpo", "in the last training"), ("dpo", "matrix product"), ("sft", "matrix product")):
        assert basis in cli("train", *FLAGS, "--method", method, "--dry-run", "--json").json["basis"]


def test_answers_of_which_none_is_bad_are_told(cli, tiny, tmp_path):
    data = write_rows(tmp_path / "good.jsonl", [{"prompt": f"q {n}", "completion": f"a {n}", "label": True} for n in range(8)])
    done = cli("prepare", data, "--model", tiny)
    assert done.code == 0 and "no answer is marked as bad: there is nothing to tell the others from" in done.err
    assert "marked as good or bad: 8 good, 0 bad" in done.err


def test_the_copy_of_the_first_adapter_that_is_gone_is_called_so(cli, trained, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs()), "--run", trained, "--valid", 4).code == 0
    assert cli("train", "--max-steps", 1, "--samples", 0).code == 0
    shutil.rmtree(trained / "tiny-gemma_sft_adapter")
    gone = cli("train", "--max-steps", 2, "--force")
    assert gone.code == 2 and "tiny-gemma_sft_adapter is gone: the run's adapter that learned answers" in gone.err
    other = cli("train", "--from-adapter", trained, "--run", "runs/other", "--model", "nothing")
    assert other.code == 2
    named = cli("train", "--from-adapter", trained, "--force")
    assert named.code == 2 and f"name the adapter in it: --from-adapter {trained}/tiny-gemma_lora_adapter" in named.err


def test_a_base_in_4_bits_is_its_own_reference(cli, prepared):
    result = cli("train", *FLAGS, "--qlora", "--json")
    assert result.code == 0, result.err
    assert log()[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert result.json["summary"]["eval_accuracy_after"] == 1.0


def test_how_it_is_worked_on_changes_nothing(cli, prepared):
    """Pieces, accumulation, activations that are recomputed: the same losses, and nearly the same adapter."""
    def trained(*flags) -> tuple[list[float], torch.Tensor]:
        result = cli("train", *FLAGS, "--max-steps", 4, *flags, "--force")
        assert result.code == 0, result.err
        return [record["loss"] for record in log() if "loss" in record], adapter()

    for method in ("dpo", "kto"):
        losses, whole = trained("--method", method, "--batch-size", 4, "--micro-batch", 4)
        for flags in (("--batch-size", 4, "--micro-batch", 1), ("--batch-size", 4, "--activation-checkpointing"),
                      *([("--batch-size", 2, "--accumulation", 2)] if method == "dpo" else [])):  # KTO's z is of a batch
            others, weights = trained("--method", method, *flags)
            assert others == pytest.approx(losses, rel=1e-4), flags
            assert (weights - whole).norm() < 1e-3 * whole.norm(), flags


def test_an_interrupted_training_goes_on_to_the_same_adapter(cli, prepared, monkeypatch):
    whole = shutil.copytree(prepared, prepared.with_name("whole"))
    flags = (*FLAGS, "--epochs", 2, "--save-steps", 2, "--sft-weight", 0.2)
    assert cli("train", *flags, "--run", whole).code == 0
    stopped_at(5, monkeypatch, *flags, "--run", prepared)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "_computed", lambda *args: pytest.fail("it is known"))
        result = cli("train", "--run", prepared, "--json")  # all as it was
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 5, result.err
    assert "log-probabilities of the reference: as kept" in result.err
    assert adapter_bytes(prepared) == adapter_bytes(whole), "bit for bit"


def test_a_reference_that_is_gone_or_of_something_else_is_computed_again(cli, prepared, monkeypatch):
    flags = (*FLAGS, "--max-steps", 4, "--save-steps", 2)
    stopped_at(3, monkeypatch, *flags)
    kept = (RUN / "logs/reference.safetensors").read_bytes()
    for damage in (None, b"", kept[:-8], kept[:-40] + bytes(40)):
        place = shutil.copytree(RUN, RUN.with_name("other"), dirs_exist_ok=True)
        (place / "logs/reference.safetensors").unlink() if damage is None else (place / "logs/reference.safetensors").write_bytes(damage)
        assert cli("train", "--run", place).code == 0
        if damage is None or len(damage) < len(kept):
            assert (place / "logs/reference.safetensors").read_bytes() == kept, "of the model before its first step"
        shutil.rmtree(place)
    assert cli("train").code == 0
    result = cli("train", *flags, "--method", "kto", "--force")  # which also asks for answers to other prompts
    assert "its log-probabilities are kept" in result.err


def test_it_goes_on_from_what_learned_answers(cli, prepared):
    """In one run: answers first, then which are better. The adapter of the answers stays what DPO starts from."""
    assert cli("train", *SHORT, "--method", "sft").code == 0
    answers = adapter_bytes(prepared)
    result = cli("train", *SHORT, "--method", "dpo", "--learning-rate", 1e-3, "--json")
    assert result.code == 0 and "the run's adapter has learned answers, and is what is trained on" in result.err
    copy = prepared / "tiny-gemma_sft_adapter"
    assert (copy / "adapter_model.safetensors").read_bytes() == answers != adapter_bytes(prepared)
    assert log()[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-5), "the reference is that adapter"
    record = json.loads((prepared / "manifest.json").read_text())["stages"]["train"]
    assert record["config"]["from_adapter"]["value"] == copy.name and any(name.endswith("from_adapter_adapter_model") for name in record["inputs"])
    first = adapter_bytes(prepared)
    # Again, it starts from the same one; and answers are learned from zero again.
    assert cli("train", *SHORT, "--learning-rate", 1e-3, "--force").code == 0
    assert adapter_bytes(prepared) == first and (copy / "adapter_model.safetensors").read_bytes() == answers
    assert cli("train", *SHORT, "--method", "sft", "--force").code == 0
    assert adapter_bytes(prepared) == answers
    result = cli("train", *SHORT, "--method", "dpo", "--from-adapter", "none", "--force")
    assert result.code == 0 and "a copy stays" not in result.err
    for stage in ("merge", "chat"):
        flags = ("--no-check",) if stage == "merge" else ("--prompt", "What is a bank?", "--max-new-tokens", 4)
        assert cli(stage, *flags).code == 0


@pytest.mark.parametrize("as_shown", [False, True], ids=["the same command", "the command that was shown"])
def test_pairs_after_an_interrupted_training_of_answers_are_learned_as_pairs(cli, tiny, data, tmp_path, monkeypatch, as_shown):
    """What followed from the first data, and nobody gave, is not taken for the second."""
    flags = ("--epochs", 2, "--rank", 4, "--dtype", "fp32", "--samples", 0)
    assert cli("prepare", data, "--model", tiny, "--valid", 2).code == 0
    stopped = stopped_at(2, monkeypatch, *flags, "--json")
    shown = stopped.json["error"]["hint"].partition(", or: ")[2]
    assert shown == cli("status", "--json").json["next"] == (
        "gemma-tune train --run runs/tiny-gemma --rank 4 --epochs 2 --dtype fp32 --samples 0")
    result = cli(*(shlex.split(shown)[1:] if as_shown else ("train",)), "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 2, result.err
    config = json.loads((RUN / "manifest.json").read_text())["stages"]["train"]["config"]
    assert (config["rank"], config["epochs"]["from"]) == ({"value": 4, "from": "flag"}, "flag")
    assert (config["method"], config["learning_rate"]["from"]) == ({"value": "sft", "from": "data"}, "family")
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs()), "--valid", 4).code == 0
    plan = cli("train", "--dry-run", "--json")
    assert (plan.json["method"], plan.json["learning_rate"]) == ("dpo", 5e-5), plan.err


def test_a_learning_rate_that_was_given_for_answers_is_a_warning_for_pairs(cli, prepared):
    """It carries over as every setting does, though it is many times what pairs take."""
    assert cli("train", *SHORT, "--method", "sft").code == 0
    said = "the learning rate 0.005 was given for sft, and dpo goes on with it; by default dpo has 5e-05 here: `train --learning-rate 5e-05`"
    kept = cli("train", "--method", "dpo", "--dry-run", "--json")
    assert kept.json["learning_rate"] == 5e-3 and said in kept.json["warnings"], kept.err
    for flags in (("--method", "dpo", "--learning-rate", 5e-3), ("--method", "dpo", "--learning-rate", 5e-5), ()):
        assert "was given for" not in cli("train", *flags, "--dry-run").err, "it is given now, or learns as before"
    assert cli("train", *SHORT, "--method", "dpo").code == 0
    assert "was given for dpo, and sft goes on with it" in cli("train", "--method", "sft", "--dry-run").err
    assert "was given for" not in cli("train", "--method", "orpo", "--dry-run").err


def test_chosen_answers_that_become_less_likely_are_told(cli, prepared):
    result = cli("train", *FLAGS, "--learning-rate", 0.05, "--epochs", 6)
    assert "the chosen answers become less likely" in result.err and "--sft-weight 1 holds them" in result.err
    result = cli("train", *FLAGS, "--method", "kto", "--learning-rate", 0.05, "--epochs", 6, "--force")
    assert "--sft-weight" not in result.err, "which --method kto refuses"


def test_memory_that_runs_out_halves_the_piece(cli, prepared, monkeypatch):
    expected = cli("train", *FLAGS, "--max-steps", 3, "--micro-batch", 2, "--json").json["summary"]
    losses = [record["rewards/margins"] for record in log() if "loss" in record]
    plain, left = GemmaTrainer._piecewise_step, [0, 1, 1]

    def full(self, model, inputs, count):
        plain(self, model, inputs, count)
        if self.micro_batch > 2 and left.pop():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(GemmaTrainer, "_piecewise_step", full)
    result = cli("train", *FLAGS, "--max-steps", 3, "--force", "--json")
    assert result.code == 0 and "going on with 2" in result.err, result.err
    assert [record["rewards/margins"] for record in log() if "loss" in record] == pytest.approx(losses, rel=1e-3)
    assert result.json["summary"]["train_loss_last"] == pytest.approx(expected["train_loss_last"], rel=1e-4)


def test_processes_measure_together_once_for_a_batch(cli, prepared, monkeypatch):
    """KTO's z: where one of them runs out of memory and begins a batch again, the others would not hear of it."""
    step, piecewise, measured, failed = GemmaTrainer.training_step, GemmaTrainer._piecewise_step, [], []
    measure = PreferenceTrainer._measure_divergence

    def full(self, model, inputs, count):
        piecewise(self, model, inputs, count)
        if self.micro_batch > 1:
            failed.append(self.micro_batch)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    def counted(self, *given):
        before = len(measured)
        done = step(self, *given)
        assert len(measured) == before + 1
        return done

    monkeypatch.setattr(GemmaTrainer, "_piecewise_step", full)
    monkeypatch.setattr(GemmaTrainer, "training_step", counted)
    monkeypatch.setattr(PreferenceTrainer, "_measure_divergence", lambda self, *given: measured.append(1) or measure(self, *given))
    result = cli("train", *FLAGS, "--method", "kto", "--max-steps", 3)
    assert result.code == 0 and failed == [4, 2] and len(measured) > 4, result.err


@pytest.mark.parametrize(("method", "strategy"), [("kto", "ddp"), ("dpo", "fsdp")])
def test_two_processes_learn_the_same(cli, prepared, forks, method, strategy):
    together = shutil.copytree(prepared, prepared.with_name("together"))
    flags = [*map(str, (*FLAGS, "--method", method, "--max-steps", 4))]
    accumulation = ("--batch-size", 2, "--accumulation", 2) if method == "dpo" else ("--batch-size", 4)
    assert cli("train", *flags, *accumulation).code == 0
    done = forks.run("train", "--run", together, *flags, "--batch-size", 2, "--num-processes", 2, "--strategy", strategy)
    assert done.code == 0, done.err
    names = ("loss", "eval_loss", "rewards/margins", "eval_rewards/margins", "eval_logps/chosen")
    for one, other in zip(log(), log(together), strict=True):
        assert {n: other[n] for n in names if n in other} == pytest.approx({n: one[n] for n in names if n in one}, rel=1e-3, abs=1e-4)
    assert (adapter(together) - adapter()).norm() < 1e-2 * adapter().norm()


def test_dry_run_shows_pairs_and_writes_nothing(cli, prepared):
    assert cli("train", *SHORT, "--method", "sft").code == 0
    before = sorted(path.as_posix() for path in RUN.rglob("*"))
    result = cli("train", "--method", "dpo", "--dry-run", "--json")
    assert result.code == 0 and result.json["sequences"] == 10 and result.json["steps"] == 3, result.err
    assert sorted(path.as_posix() for path in RUN.rglob("*")) == before


def test_pairs_and_judged_answers_go_all_the_way(cli, tiny, tmp_path):
    """What follows the training takes its prompts and its rows from runs of either kind."""
    for name, rows in (("pairs", pairs()), ("judged", judged())):
        run = Path("runs") / name
        assert cli("prepare", write_rows(tmp_path / f"{name}.jsonl", rows), "--model", tiny, "--valid", 4, "--run", run).code == 0
        assert cli("train", *FLAGS, "--max-steps", 2, "--samples", 1, "--run", run).code == 0
        merged = cli("merge", "--run", run, "--json")
        assert merged.code == 0 and merged.json["summary"]["check_prompts"] == 4, merged.err
        found = cli("export-ollama", "--quant", "q8_0", "--run", run, "--json")
        assert found.code == 0, found.err
        train, valid = (liked(open_tokens(run / f"data/tokens/{side}.arrow")) for side in ("train", "valid"))
        # Chosen and good answers alone.
        assert f"calibrated on {sum(lengths_of(train))} tokens of the training rows" in found.err
        assert f"On {sum(trained_of(valid))} learned tokens of the validation rows" in (run / "ollama/report.md").read_text()
        assert cli("eval", "--run", run, "--questions", 1, "--max-new-tokens", 4).code == 0
        assert cli("status", "--run", run, "--json").json["stages"]["prepare"]["state"] == "done"


def test_what_preferences_were_learned_is_not_replaced_in_silence(cli, prepared, tmp_path):
    """By those of other data, by another method, or by answers; to go on from the adapter it is named."""
    said = "what the last training learned (dpo) is replaced: this one ({}) starts from {}"
    quick = ("--rank", 4, "--dtype", "fp32", "--max-steps", 3, "--samples", 0)
    assert cli("train", *quick, "--method", "sft").code == 0
    own = f"{RUN}/tiny-gemma_lora_adapter"
    [told] = [text for text in cli("train", *quick, "--method", "orpo", "--dry-run", "--json").json["warnings"]
              if "replaced" in text]
    assert told == ("what the last training learned (sft) is replaced: this one (orpo) starts from the base model; "
                    f"to go on from it instead: --from-adapter {own}")
    named = cli("train", *quick, "--method", "orpo", "--dry-run", "--from-adapter", own)
    assert named.code == 0 and "is replaced" not in named.err, named.err
    gone_on = cli("train", *quick, "--method", "auto")
    assert gone_on.code == 0 and "is replaced" not in gone_on.err, "of what answers it learned there is a copy"
    assert "is replaced" not in cli("train", *quick, "--max-steps", 4, "--dry-run").err
    assert said.format("kto", "tiny-gemma_sft_adapter") in cli("train", *quick, "--method", "kto", "--dry-run").err
    assert cli("prepare", write_rows(tmp_path / "judged.jsonl", judged())).code == 0
    [told] = [text for text in cli("train", *quick, "--dry-run", "--json").json["warnings"] if "replaced" in text]
    assert told.startswith(said.format("kto", "tiny-gemma_sft_adapter")), told
    assert told.endswith(f"to go on from it instead: --from-adapter {own}")
    before = adapter_bytes(prepared)
    result = cli("train", *quick, "--from-adapter", own, "--json")
    assert result.code == 0 and not any("replaced" in text for text in result.json["warnings"]), result.err
    [copy] = prepared.glob("tiny-gemma_start_adapter_*")
    assert (copy / "adapter_model.safetensors").read_bytes() == before != adapter_bytes(prepared)


def test_it_goes_on_from_the_run_s_own_adapter_and_keeps_what_that_was(cli, prepared, tmp_path, monkeypatch):
    """The adapter stays whole until the new one is; the manifest names the copy, from which a repetition starts."""
    quick = ("--rank", 4, "--dtype", "fp32", "--max-steps", 3, "--samples", 0, "--save-steps", 1)
    own = ("--from-adapter", prepared / "tiny-gemma_lora_adapter")
    assert cli("train", *quick, "--method", "dpo").code == 0
    first = adapter_bytes(prepared)
    planned = cli("train", *quick, "--method", "dpo", *own, "--dry-run")
    assert planned.code == 0 and not [*prepared.glob("*_start_adapter_*")], planned.err
    stopped = stopped_at(2, monkeypatch, *quick, "--method", "dpo", *own)
    assert adapter_bytes(prepared) == first, stopped.err
    [copy] = prepared.glob("tiny-gemma_start_adapter_*")
    assert f"--from-adapter {copy}" in stopped.err and (copy / "adapter_model.safetensors").read_bytes() == first
    assert cli("merge", "--no-check").code == 0, "the finished adapter is the run's as long as no other is"
    assert cli("status", "--json").json["next"].endswith(f"--from-adapter {copy} --samples 0")
    result = cli("train", *quick, "--method", "dpo", *own, "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] == 2, result.err
    assert log()[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-5), "the reference is what it started from"
    second = adapter_bytes(prepared)
    record = json.loads((prepared / "manifest.json").read_text())["stages"]["train"]
    assert record["config"]["from_adapter"]["value"] == copy.name
    [weights] = [item for item in record["inputs"].values() if item["path"].endswith("adapter_model.safetensors")]
    assert weights["path"] == f"{copy.name}/adapter_model.safetensors"
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"

    assert cli("train", *quick, "--method", "dpo", *own, "--json").json["status"] == "up-to-date"
    refused = cli("train", *quick, "--method", "dpo", *own, "--max-steps", 4)
    assert refused.code == 2 and "has learned from these data already" in refused.err and adapter_bytes(prepared) == second
    assert cli("train", "--continue", *own, "--max-steps", 4).code == 0
    assert cli("train", *quick, "--method", "dpo", "--force").code == 0
    assert adapter_bytes(prepared) == second, "it starts from the copy again"
    assert cli("train", *quick, "--method", "dpo", *own, "--force").code == 0
    third = {(path / "adapter_model.safetensors").read_bytes() for path in prepared.glob("tiny-gemma_start_adapter_*")}
    assert third == {first, second} and adapter_bytes(prepared) not in third
    other = next(path for path in prepared.glob("tiny-gemma_start_adapter_*") if path != copy)
    assert cli("status", "--json").json["unused_adapters"] == {copy.name: size_of(copy)}, "the last training began with the other"
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        told, begin = [], PreferenceTrainer.begin_steps
        patch.setattr(PreferenceTrainer, "begin_steps", lambda self: told.append(describe_run(str(RUN), None)) or begin(self))
        assert cli("train", *quick, "--method", "dpo", "--from-adapter", copy, "--seed", 7).code == 130
    assert [found.unused for found in told] == [{}], "a training that has saved nothing yet began with it"
    assert cli("status", "--json").json["unused_adapters"] == {}, "the one that waits began with it"
    assert cli("train", "--method", "sft", *quick, "--from-adapter", "none", "--force").code == 0
    status = cli("status", "--json")
    assert status.json["unused_adapters"] == {path.name: size_of(path) for path in (copy, other)}
    for path in (copy, other):
        said = f"{path.name} ({small_size(size_of(path))}) is an adapter that a training started from, and nothing refers"
        assert said in cli("status").err


def size_of(folder: Path) -> int:
    """Bytes of what lies in a directory."""
    return sum(path.stat().st_size for path in folder.iterdir())


def test_answers_after_preferences_are_learned_from_the_base_and_that_is_said(cli, prepared, tmp_path):
    quick = ("--rank", 4, "--dtype", "fp32", "--max-steps", 3, "--samples", 0)
    assert cli("train", *quick, "--method", "sft").code == 0
    assert cli("train", *quick, "--method", "auto").code == 0
    answers = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs()]
    assert cli("prepare", write_rows(tmp_path / "answers.jsonl", answers)).code == 0
    [told] = [text for text in cli("train", *quick, "--json").json["warnings"] if "replaced" in text]
    assert "(dpo) is replaced: this one (sft) starts from the base model" in told
