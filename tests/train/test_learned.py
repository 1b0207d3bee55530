"""A training that did nothing is an error with its likely cause; a small one that did something is none."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.effect import LogitChange, Moved
from gemma_tune.train.learned import _tell
from gemma_tune.train.verdict import changes, first_loss, is_harm, likely_cause, rose, without_effect
from support.command import QUICK
from support.listener import Said
from support.training import adapter_bytes

FLAGS = ("--epochs", 1, "--rank", 4, "--dtype", "fp32", "--json")
ALL_STILL, MOVED = Moved(2, ("q", "v"), 0.0), Moved(2, (), 0.5)
SAME, BARELY, OTHER = LogitChange(0.0, 0.0), LogitChange(1e-12, 1e-7), LogitChange(0.1, 2.0)


def test_a_training_that_changed_nothing_is_an_error_and_leaves_the_earlier_adapter(cli, trained):
    before, manifest = adapter_bytes(trained), (trained / "manifest.json").read_bytes()
    result = cli("train", *FLAGS, "--learning-rate", 1e-8, "--force")
    assert result.code == 1, result.err
    error = result.json["error"]
    assert error["message"].startswith("the training changed nothing: ")
    assert "base and trained model say the same (divergence" in error["message"]
    assert "a learning rate of 1e-08 is too small" in error["message"] and "--learning-rate 0.0002" in error["hint"]
    assert error["message"].endswith("the earlier adapter stays in runs/tiny-gemma/tiny-gemma_lora_adapter")
    assert adapter_bytes(trained) == before and (trained / "manifest.json").read_bytes() == manifest
    assert [p.name for p in (trained / "training_checkpoints").glob("checkpoint-*")] == ["checkpoint-3"], "the earlier one's"
    assert cli("train", *QUICK, "--json").json["status"] == "up-to-date"


def test_one_step_is_a_training_and_what_it_did_is_said(cli, trained):
    result = cli("train", *FLAGS, "--learning-rate", 1e-4, "--max-steps", 1, "--force")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert summary["steps"] == 1 and summary["adapter_norm"] > 0 and summary["divergence_from_base"] > 0
    [said] = [line for line in result.err.splitlines() if "learned:" in line]
    log = [json.loads(line) for line in (trained / "logs" / "metrics.jsonl").read_text().splitlines()]
    evals = [r["eval_loss"] for r in log if "eval_loss" in r]
    assert "14 of 14 adapted layers changed" in said
    assert f"validation loss {evals[0]:.4g} before, {evals[-1]:.4g} after" in said
    assert f"{summary['divergence_from_base']:.3g} nats per token" in said


def test_layers_that_no_gradient_reaches_are_named(cli, tiny, data, tmp_path):
    """What the first layer's MLP gives is so large here that the norm behind it makes nothing of it."""
    base = shutil.copytree(tiny, tmp_path / "large")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.pre_feedforward_layernorm.weight"].fill_(1e16)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert cli("prepare", data, "--model", base).code == 0
    result = cli("train", *FLAGS, "--learning-rate", 1e-3)
    assert result.code == 0, result.err
    assert result.json["summary"]["unchanged_layers"] == 3 and "learned: 11 of 14 adapted layers changed" in result.err
    assert "no gradient reached them: model.layers.0.mlp." in result.err


def test_a_model_that_computes_no_numbers_any_more_is_worse(cli, trained, monkeypatch):
    """After the last step nothing else would show it where there are no validation rows."""
    before = adapter_bytes(trained)
    monkeypatch.setattr("gemma_tune.train.learned.logit_change", lambda *_: LogitChange(float("nan"), float("nan")))
    result = cli("train", *FLAGS, "--learning-rate", 1e-3, "--force")
    assert result.code == 1 and "what it computes now is not finite" in result.json["error"]["message"]
    assert (trained / "tiny-gemma_lora_adapter_worse").is_dir() and adapter_bytes(trained) == before


def test_memory_that_runs_out_at_the_end_loses_no_adapter(cli, trained, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr("gemma_tune.train.learned.logit_change", full)
    result = cli("train", *FLAGS, "--learning-rate", 1e-3, "--force")
    assert result.code == 0 and "there is no memory to compare the logits" in result.err
    assert result.json["summary"]["divergence_from_base"] is None


def test_what_is_known_already_is_no_error_but_said(cli, trained, monkeypatch):
    """Here everything below 100 nats is taken for known, of which no rate can learn more."""
    monkeypatch.setattr("gemma_tune.train.learned.KNOWN", 100.0)
    result = cli("train", *FLAGS, "--learning-rate", 0, "--force")
    assert result.code == 0, result.err
    assert "the data were known before the first step: the loss was 8.3 from the beginning" in result.err
    assert result.json["summary"]["unchanged_layers"] == 14


# --- the verdict

def losses(*values: float, grad_norm: float = 1.0) -> list[dict]:
    return [{"step": n, "loss": loss, "grad_norm": grad_norm} for n, loss in enumerate(values, start=1)]


@pytest.mark.parametrize(("moved", "change", "records", "what"), [
    (ALL_STILL, OTHER, losses(2, 1), "nothing that was trained has other weights"), (ALL_STILL, None, [], "nothing that was trained"),
    (MOVED, SAME, losses(2, 1), "the same logits"), (MOVED, BARELY, losses(2, 2), "say the same"),
    (MOVED, BARELY, [{"step": 0, "eval_loss": 2}, *losses(2), {"step": 1, "eval_loss": 1.9}], None),
    (MOVED, BARELY, losses(2, 1.9), "say the same"), (MOVED, OTHER, losses(2, 2), None), (MOVED, None, losses(2, 2), None),
    (Moved(2, ("q",), 0.1), OTHER, losses(2, 1), None), (MOVED, BARELY, losses(2), "say the same")])
def test_only_what_did_nothing_is_refused(moved, change, records, what):
    found = without_effect(moved, change, records)
    assert (found is None) == (what is None) and (what or "") in (found or "")


@pytest.mark.parametrize(("settings", "records", "tokens", "cause", "hint"), [
    ({"learning_rate": 0.0}, losses(2), 9, "the learning rate is 0", "--learning-rate 0.0002"),
    ({}, losses(0.0), 0, "no token of the data is learned", "--preview"),
    ({}, losses(2, 2, grad_norm=0.0), 9, "the gradient was zero in every step", "--target-modules all"),
    ({"full": True}, losses(2, 2, grad_norm=0.0), 9, "the gradient was zero in every step", "--dtype fp32"),
    ({"alpha": 1e-5}, losses(2), 9, "the adapter is scaled by 6e-07", "--alpha"),
    ({"learning_rate": 1e-9}, losses(2), 9, "a learning rate of 1e-09 is too small", "--learning-rate 0.0002"),
    ({"dtype": "fp16"}, losses(2), 9, "the first steps are skipped", "--dtype bf16"),
    ({}, losses(2), 9, "1 step at a learning rate of 0.0002 did not suffice", "--epochs")])
def test_the_likely_cause(settings, records, tokens, cause, hint):
    config = TrainConfig(**{"learning_rate": 2e-4} | settings)
    found = likely_cause(config, records, len(records), tokens, 2e-4)
    assert cause in found[0] and hint in found[1]


def test_the_first_loss_is_the_training_s():
    assert first_loss([{"step": 0, "eval_loss": 1.0}, *losses(3, 2)]) == 3
    assert first_loss([]) == float("inf")


def steps_of(epoch: int, *values: float) -> list[dict]:
    """Records of a training whose epochs have so many steps."""
    return [{"step": n, "epoch": round(n / epoch, 4), "loss": loss} for n, loss in enumerate(values, start=1)]


@pytest.mark.parametrize(("records", "told"), [
    (steps_of(100, 1.0, 2.4, 1.2, 2.0, 1.5, 2.6, 1.4, 2.2), False), (steps_of(100, *[3.0] * 4, *[2.0] * 4), True),
    (steps_of(2, 1.6, 3.3, 1.5, 3.1), True)])
def test_a_training_loss_of_a_few_steps_is_told_where_it_is_more_than_chance(records, told):
    """As after a short --continue, which would seem to have made the model worse."""
    said = Said()
    moved = SimpleNamespace(layers=1, still=[], norm=1.0)
    _tell(SimpleNamespace(listener=said, config=TrainConfig()), moved, None, records)
    assert ("training loss" in "".join(map(str, said.notes))) == told
    [found] = changes(records)
    assert found.by_chance != told


@pytest.mark.parametrize(("records", "harm"), [
    (steps_of(2, 1.6, 3.3), False),  # other rows, so they say nothing
    (steps_of(8, *[2.0] * 3, *[6.0] * 4), False),  # too few steps for two averages, and no epoch is over
    (steps_of(100, *[2.0] * 4, *[4.0] * 4), True),
    (steps_of(100, 1.0, 4.0, 1.0, 2.0, 1.0, 6.0, 2.0, 5.0), False),  # no more than the steps differ among themselves
    (steps_of(2, 1.6, 3.3, 1.5, 3.1), False), (steps_of(2, 1.6, 3.3, 4.6, 6.3), True),  # the same rows in each epoch
    (steps_of(1, 2.0, 2.5), True), (steps_of(1, 2.0, 2.3), False),
    (steps_of(100, *[2.0] * 50, *[4.0] * 50), True), (steps_of(100, *[2.0] * 7, float("nan")), True),
    ([{"step": 0, "eval_loss": 2.0}, *steps_of(2, 3.3, 1.6), {"step": 2, "eval_loss": 2.2}], True)])
def test_only_what_chance_does_not_explain_is_harm(records, harm):
    found = rose(records)
    assert (found is not None and is_harm(found)) == harm


def rewards(*pairs: tuple[int, float], prompts: int = 64, spread: float = 0.5) -> list[dict]:
    return [{"step": step, "eval_reward": value, "eval_reward_std": spread, "eval_prompts": prompts} for step, value in pairs]


@pytest.mark.parametrize(("records", "harm", "figures"), [
    (rewards((0, 0.5), (9, 0.2)), True, "validation reward 0.5 before, 0.2 after"), (rewards((0, 0.5), (9, 0.4)), False, "0.4 after"),
    (rewards((0, 0.5), (9, 0.4), prompts=4000), True, "0.4 after"), (rewards((0, 0.5), (9, 0.5)), None, ""), (rewards((0, 0.5), (9, 0.9)), None, ""),
    *((rewards((0, 1.0), (9, 0.0), prompts=prompts, spread=0.0), prompts > 5, "1 before, 0 after") for prompts in (1, 2, 3, 4, 5, 6, 20)),
    (rewards((0, 1.0), (9, 0.9), prompts=10, spread=0.3), False, "0.9 after"),
    (rewards((0, 0.5), (9, 0.49), prompts=4000, spread=0.0), True, "0.49 after"),
    ([{"step": n, "epoch": n, "loss": 0.0, "reward": 0.9 if n < 6 else 0.1} for n in range(1, 13)], True, "training reward 0.9 before, 0.1 after")])
def test_a_reward_that_falls_by_more_than_chance_is_harm(records, harm, figures):
    found = rose(records)
    assert (found and is_harm(found)) == harm and (not found or figures in found.figures)


def test_a_training_loss_is_told_where_both_sides_have_the_same_rows_or_enough_steps():
    assert changes(steps_of(2, 1.6, 3.3)) == [] and changes(losses(*[2.0] * 7)) == []
    [found] = changes(steps_of(3, 3.0, 2.0, 1.0, 2.0, 1.5, 1.0, 1.0, 0.5, 0.0))
    assert (found.before, found.after, found.same_rows) == (2.0, 0.5, True)
    [found] = changes(losses(*[3.0] * 4, *[1.0] * 4))
    assert (found.before, found.after, found.same_rows) == (3.0, 1.0, False)
    # The long rows of 4 nats together in one step, or with a short one of 1 each: the same of 8 + 2 rows.
    [found] = changes([{"step": n, "epoch": n / 2, "loss": loss, "tokens": tokens} for n, loss, tokens in (
        (1, 4.0, 200), (2, 1.0, 220), (3, 3.7273, 330), (4, 3.7273, 440))])
    assert found.before == pytest.approx(3.7273, abs=1e-4) == found.after
