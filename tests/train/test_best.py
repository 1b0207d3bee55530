"""The adapter with the lowest validation loss is kept, and a training ends where it does not get lower."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.base.listener import Listener
from gemma_tune.train.best import Best
from gemma_tune.train.callbacks import MetricsLog
from gemma_tune.train.verdict import REWARD
from support.command import Result, copied_run, invoke, rows, write_rows
from support.listener import Said

RUN = Path("runs/tiny-gemma")
ADAPTER = RUN / "tiny-gemma_lora_adapter" / "adapter_model.safetensors"
# So few rows, seen so often and at such a rate, are learned by heart: the validation loss rises before the end.
BY_HEART = ("--max-steps", 18, "--rank", 8, "--dtype", "fp32", "--learning-rate", 2e-2, "--schedule", "constant", "--warmup", 0,
            "--eval-steps", 2, "--save-steps", 2, "--batch-size", 4, "--samples", 0)


def metrics() -> list[dict]:
    return [json.loads(line) for line in (RUN / "logs" / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def prepared_once(tiny, tmp_path_factory) -> Path:
    """A run that is prepared; copy it, do not change it."""
    place = tmp_path_factory.mktemp("prepared")
    done = invoke("prepare", write_rows(place / "rows.jsonl", rows(14)), "--model", tiny, "--run", place / RUN)
    assert done.code == 0, done.err
    return place / RUN


@pytest.fixture(scope="module")
def learned_once(prepared_once, tiny, tmp_path_factory) -> tuple[Path, Result]:
    """Such a run that is trained, to be copied, and what the command said."""
    run = copied_run(prepared_once, tmp_path_factory.mktemp("learned"), tiny)
    done = invoke("train", *BY_HEART, "--run", run, "--json")
    assert done.code == 0, done.err
    return run, done


@pytest.fixture
def prepared(prepared_once, tiny, tmp_path) -> None:
    """A prepared run of one's own."""
    copied_run(prepared_once, tmp_path, tiny)


@pytest.fixture
def learned(learned_once, tiny, tmp_path) -> Result:
    """A trained run of one's own."""
    copied_run(learned_once[0], tmp_path, tiny)
    return learned_once[1]


def lowest() -> tuple[int, dict[int, float]]:
    losses = {r["step"]: r["eval_loss"] for r in metrics() if "eval_loss" in r}
    return min((step for step in losses if step), key=losses.__getitem__), losses


def test_the_best_adapter_stays_and_the_last_where_that_is_asked_for(cli, learned):
    best, losses = lowest()
    last = max(losses)
    assert 0 < best < last, "the case itself: it learns by heart"
    summary = learned.json["summary"]
    assert summary["kept_step"] == best and summary["eval_loss_after"] == losses[best] and summary["steps"] == last
    assert f"the weights are those of step {best} of {last}" in learned.err
    assert re.search(r"the validation loss is .* after step [0-9]+, and was lowest after step [0-9]+", learned.err)
    kept = load_file(ADAPTER)
    final = cli("train", *BY_HEART, "--keep", "last", "--force", "--json")
    assert final.json["summary"]["kept_step"] == last and final.json["summary"]["eval_loss_after"] == losses[last]
    assert any(not torch.equal(value, kept[name]) for name, value in load_file(ADAPTER).items())


def test_it_is_the_adapter_of_that_step(cli, learned):
    best, kept = learned.json["summary"]["kept_step"], load_file(ADAPTER)
    result = cli("train", *BY_HEART, "--max-steps", best, "--keep", "last", "--force", "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["steps"] == best
    ended = load_file(ADAPTER)
    assert all(torch.equal(ended[name], value) for name, value in kept.items())


def test_early_stopping_ends_and_says_so(cli, prepared):
    flags = (*BY_HEART, "--max-steps", 40, "--early-stopping", 2)
    result = cli("train", *flags, "--json")
    assert result.code == 0, result.err
    best, losses = lowest()
    assert sorted(losses)[-3] == best == result.json["summary"]["kept_step"], "two evaluations later"
    assert result.json["summary"]["steps"] == max(losses) == best + 4
    assert "--early-stopping 2: the training ends after step" in result.err
    assert "up to date" in cli("train", *flags).err


def test_an_interrupted_training_has_its_best_from_before(cli, learned, monkeypatch):
    (best, _), expected = lowest(), load_file(ADAPTER)
    plain = MetricsLog.on_evaluate

    def stopping(self, args, state, control, metrics=None, **kwargs):
        plain(self, args, state, control, metrics, **kwargs)
        if state.global_step == best + 2:  # looked at when the next step ends
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "on_evaluate", stopping)
    assert cli("train", *BY_HEART, "--force").code == 130
    monkeypatch.setattr(MetricsLog, "on_evaluate", plain)
    result = cli("train", *BY_HEART, "--json")
    assert result.code == 0 and result.json["summary"]["resumed_from_step"] > best + 2, result.err
    assert result.json["summary"]["kept_step"] == best == learned.json["summary"]["kept_step"]
    assert all(torch.equal(value, expected[name]) for name, value in load_file(ADAPTER).items())


def test_a_damaged_file_leaves_the_last_adapter_and_is_told(cli, prepared, monkeypatch):
    plain = Best.restore

    def damaged(self, last):
        data = bytearray(self.path.read_bytes())
        data[-5] ^= 1
        self.path.write_bytes(data)
        return plain(self, last)

    monkeypatch.setattr(Best, "restore", damaged)
    result = cli("train", *BY_HEART, "--json")
    assert result.code == 0 and "cannot be read from" in result.err
    assert result.json["summary"]["kept_step"] == max(lowest()[1])


def of(folder: Path, training: str = "a", **how) -> Best:
    return Best(folder, training, Listener(), **{"keeps": True, "patience": 0} | how)


def evaluate(best: Best, step: int, loss: float):
    control = SimpleNamespace(should_training_stop=False)
    return best.on_evaluate(None, SimpleNamespace(global_step=step, max_steps=100), control, {"eval_loss": loss})


class Adapter(torch.nn.Linear):
    """Enough of a model for its trained weights to be read and written."""

    def set(self, value: float) -> None:
        torch.nn.init.constant_(self.weight, value)


def test_no_number_is_never_the_best_and_another_trainings_file_does_not_count(tmp_path):
    model = Adapter(3, 2, bias=False)
    best = of(tmp_path, patience=2)
    best.trainer = SimpleNamespace(model=model)
    for step, (loss, value) in enumerate([(2.0, 0), (1.0, 1), (float("nan"), 2), (1.5, 3)]):
        model.set(value)
        control = evaluate(best, step, loss)
    assert control.should_training_stop
    assert best.restore(3) == 1 and torch.equal(model.weight, torch.ones(2, 3))
    assert of(tmp_path)._kept == (1, 1.0)
    assert of(tmp_path, "b")._kept is None
    last = of(tmp_path, keeps=False)
    assert last.restore(3) == 3


def test_of_two_that_are_as_good_the_earlier_stays(tmp_path):
    model = Adapter(3, 2, bias=False)
    best = of(tmp_path, patience=1)
    best.trainer = SimpleNamespace(model=model)
    for step in (1, 2):
        model.set(step)
        control = evaluate(best, step, 1.0)
    assert best.restore(2) == 1 and torch.equal(model.weight, torch.ones(2, 3))
    assert control.should_training_stop, "the second was not lower"


def test_a_loss_is_said_to_have_been_lower_only_where_it_was(tmp_path):
    best = Best(tmp_path, "a", said := Said(), keeps=False, patience=0)
    for step, loss in enumerate([3.0, 2.0, 1.0]):
        evaluate(best, step, loss)
    assert not said.notes, "each was lower than all before it"
    evaluate(best, 3, 1.5)
    assert said.notes == ["the validation loss is 1.5 after step 3, and was lowest after step 2: 1"]


def rewarded(best: Best, step: int, reward: float):
    control = SimpleNamespace(should_training_stop=False)
    return best.on_evaluate(None, SimpleNamespace(global_step=step, max_steps=100), control, {"eval_reward": reward})


@pytest.mark.parametrize(("rewards", "kept", "stops"), [
    ([0.5, 1.0, 1.0, 1.0], 3, True), ([0.5, 0.5, 0.5], 2, True), ([0.5, 1.0, 0.5, 1.0], 3, True), ([0.5, 1.0, 0.5], 1, False),
    ([0.0, 0.1 + 0.2, 0.3], 2, False), ([0.0, 0.0, 0.5], 2, False)])
def test_of_equal_rewards_the_later_stays_and_stopping_is_strict(tmp_path, rewards, kept, stops):
    """Also where the training was interrupted after any evaluation."""
    for interrupted in range(len(rewards) + 1):
        folder, model = tmp_path / str(interrupted), Adapter(3, 2, bias=False)
        best = Best(folder, "a", said := Said(), keeps=True, patience=2, measure=REWARD)
        for step, reward in enumerate(rewards):
            if step == interrupted:
                earlier = [{"step": n, "eval_reward": value} for n, value in enumerate(rewards[:step])]
                best = Best(folder, "a", said, keeps=True, patience=2, measure=REWARD, earlier=earlier)
            best.trainer = SimpleNamespace(model=model)
            model.set(step)
            rewarded(best, step, reward)
        last = len(rewards) - 1
        assert best.restore(last) == kept and torch.equal(model.weight, torch.full((2, 3), float(kept)))
        assert best.exhausted == stops, interrupted
        falls = [note for note in said.notes if "and was highest" in note]
        assert bool(falls) == any(reward < max(rewards[:n]) - 1e-9 for n, reward in enumerate(rewards) if n), said.notes


def test_a_reward_that_stayed_is_not_said_to_have_risen(tmp_path):
    best = Best(tmp_path, "a", Said(), keeps=False, patience=0, measure=REWARD)
    for step, reward in enumerate([0.5, 0.5]):
        rewarded(best, step, reward)
    assert best.described(1, 1, "--max-steps") is None
    rewarded(best, 2, 0.75)
    assert "highest at the end, 0.75 instead of 0.5" in best.described(2, 2, "--max-steps")
