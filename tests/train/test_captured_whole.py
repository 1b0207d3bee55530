"""Whole trainings as a GPU does them: captured and replayed steps, gradients at fixed places, figures that are read late,
a fused optimiser that leaves steps out, and rounded copies of the adapter. What a GPU computes is done by a double.

The device stays the CPU, so all that is decided by its name has to be decided otherwise here. Answers that begin alike go as one
on a CPU alone, by an attention that is not the one of a GPU: where it was, pieces that are not captured learned from each other.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import optimizer
from commands.test_preferences import log
from train.test_captured_units import same_figures, trained_eagerly

from gemma_tune.train import ahead, captured, cuda_attention, elementwise, first_batch, job, kernels, trainer
from gemma_tune.train import fused as fused_kernels
from gemma_tune.train.adamw import AdamWAsOne
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.late import LateFigures
from gemma_tune.train.token_losses import TokenLosses
from support import graphs
from support.command import copied_run, invoke
from support.graphs import Captures, Graph


class Late(LateFigures):
    """One step late, without an event that a GPU would tell of."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._wait_for = 0

    def read(self, everything: bool = False):
        self._wait_for = 1
        try:
            return super().read(everything)
        finally:
            self._wait_for = 0


@pytest.fixture
def as_on_a_gpu(monkeypatch) -> Captures:
    """Trainings as on a GPU, from here on."""
    return computes_as_on_a_gpu(monkeypatch)


def computes_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Captures:
    found = graphs.install(monkeypatch)
    made, arguments, losses = trainer.GemmaTrainer.__init__, job._arguments, TokenLosses.__init__

    def init(self, *args, **how):
        made(self, *args, **how)
        self.waits, self.figures = False, Late(torch.device("cpu"))
        self.gradients = Gradients({name: p for name, p in self.model.named_parameters() if p.requires_grad}, True)

    def fused(*args, **how):
        made = arguments(*args, **how)
        made.optim = "adamw_torch_fused"
        return made

    # Kernels are compiled ahead on the meta device, and attention is what is fastest for the layers that were met.
    monkeypatch.setattr(ahead, "has_kernels", lambda device: True)
    monkeypatch.setattr(fused_kernels, "_launch", lambda *args, **how: None)
    monkeypatch.setattr(kernels, "causal_attention_or", cuda_attention.fastest_attention_or)
    monkeypatch.setattr(cuda_attention, "_has_graphs", lambda device: True)
    monkeypatch.setattr(cuda_attention, "_milliseconds", lambda run: run() and 1.0)
    for name in ("_chosen", "_met"):
        monkeypatch.setattr(cuda_attention, name, {})
    operations = SimpleNamespace(RMSNorm=elementwise.RMSNorm, Rotation=elementwise.Rotation)
    monkeypatch.setattr(kernels, "_operations", lambda device: operations)
    monkeypatch.setattr(trainer.GemmaTrainer, "__init__", init)
    monkeypatch.setattr(TokenLosses, "__init__", lambda self, device, at_once, *more, **how: losses(self, device, True, *more, **how))
    monkeypatch.setattr(job, "_arguments", fused)
    monkeypatch.setattr(first_batch.FirstBatch, "_why_not_captured", lambda self: None)
    return found


SFT = "--method", "sft"
Eager = tuple[Path, tuple]  # a run that was trained as it is without a GPU, and the command that did


@pytest.fixture(scope="module")
def eager_once(tiny, tmp_path_factory) -> Eager:
    """Copy the run, do not change it."""
    place = tmp_path_factory.mktemp("eager")
    run = place / "runs" / "tiny-gemma"
    return run, trained_eagerly(lambda *args: invoke(*args, "--run", run), tiny, place, 4, SFT)


def longer(command: tuple, epochs: int) -> tuple:
    """The command with which its training goes on."""
    return "train", "--continue", *(word for word in command[1:] if word != "--force"), "--epochs", epochs


@pytest.fixture(scope="module")
def longer_once(eager_once, tiny, tmp_path_factory) -> list[dict]:
    """What is logged where that training goes on as it began."""
    run = copied_run(eager_once[0], tmp_path_factory.mktemp("longer"), tiny, "pairs.jsonl")
    assert invoke(*longer(eager_once[1], 6), "--run", run).code == 0
    return log(run)


@pytest.fixture
def eager(eager_once, tiny, tmp_path) -> tuple:
    """The command of such a run, which lies here."""
    copied_run(eager_once[0], tmp_path, tiny, "pairs.jsonl")
    return eager_once[1]


@pytest.mark.parametrize("flags", [SFT, (), ("--method", "kto"), (*SFT, "--qlora"), (*SFT, "--activation-checkpointing"),
                                   (*SFT, "--dora")], ids=["sft", "dpo", "kto", "qlora", "recomputed", "dora"])
def test_a_training_that_is_replayed_is_the_same(cli, tiny, tmp_path, request, monkeypatch, flags):
    """An evaluation comes before the first step, and has the training's largest shape captured. The optimiser is given one
    tensor in each step. In two epochs of pairs some pieces are too rare to be captured, and go between replays."""
    command = request.getfixturevalue("eager") if flags == SFT else trained_eagerly(cli, tiny, tmp_path, 2, flags)
    expected = log()
    assert expected[0]["step"] == 0
    request.getfixturevalue("as_on_a_gpu")
    at_once, fused, packages = [], torch._fused_adamw_, []
    monkeypatch.setattr(optimizer, "is_lomo_available", lambda: packages.append(1))  # which looks through the disk
    monkeypatch.setattr(torch, "_fused_adamw_", lambda weights, *args, **how: at_once.append(len(weights)) or fused(weights, *args, **how))
    result = cli(*command)
    assert result.code == 0, result.err
    assert "cannot be captured" not in result.err and Graph.replays > 10
    found = log()
    assert at_once == [1] * found[-1]["step"] and not packages
    same_figures(expected, found)


def test_a_training_that_goes_on_is_the_same(cli, eager, longer_once, as_on_a_gpu):
    """What is loaded from a checkpoint goes where captured steps read it: weights, and the state of the optimiser."""
    assert cli(*eager).code == 0
    before = len(as_on_a_gpu.order)
    result = cli(*longer(eager, 6))
    assert result.code == 0, result.err
    assert "cannot be captured" not in result.err and len(as_on_a_gpu.order) > before
    same_figures(longer_once, log())


def test_a_training_goes_on_on_another_device(cli, eager, longer_once):
    """A checkpoint says how its optimiser computed, which is not how it is done there."""
    with pytest.MonkeyPatch.context() as there:
        computes_as_on_a_gpu(there)
        result = cli(*longer(eager, 6))
        assert result.code == 0, result.err
        assert "cannot be captured" not in result.err and Graph.replays
        same_figures(longer_once, log())
    assert cli(*longer(eager, 8)).code == 0
    found = torch.load(f"runs/tiny-gemma/training_checkpoints/checkpoint-{log()[-1]['step']}/optimizer.pt")
    assert not found["param_groups"][0]["fused"] and {float(s["step"]) for s in found["state"].values()} == {log()[-1]["step"]}


def test_a_step_has_its_dropout_and_an_evaluation_none(cli, tiny, data, as_on_a_gpu, monkeypatch):
    made, learns = captured.CapturedSteps._made, []
    monkeypatch.setattr(captured.CapturedSteps, "_made", lambda self, bucket: learns.append(self.backward) or made(self, bucket))
    assert cli("prepare", data, "--model", tiny, "--valid", 4).code == 0
    assert cli("train", "--epochs", 4, "--rank", 4, "--dtype", "fp32", "--dropout", 0.2, "--samples", 0).code == 0
    assert set(learns) == {True, False}
    assert [any("bernoulli" in name for name in names) for names in as_on_a_gpu.names] == learns


def test_a_training_whose_steps_cannot_be_captured_is_the_same(cli, eager, as_on_a_gpu, monkeypatch):
    """Something in the model looks at a number, which CUDA breaks a capture off for."""
    expected = log()
    loss = captured.LearnedTokens.loss
    monkeypatch.setattr(captured.LearnedTokens, "loss", lambda *args: loss(*args) * float(args[1].sum().item() > 0))
    result = cli(*eager)
    assert result.code == 0, result.err
    assert result.err.count("steps cannot be captured here and go one kernel at a time") == 2  # learning, and evaluating
    assert not Graph.replays
    same_figures(expected, log())


def test_a_step_that_is_not_finite_does_not_reach_the_weights(cli, eager, as_on_a_gpu, monkeypatch):
    """It is found out when the next one is done, which so began with good weights."""
    plain, trained = trainer.GemmaTrainer.compute_loss, []

    def poisoned(self, model, *args, **kwargs):
        loss = plain(self, model, *args, **kwargs)
        if model.training and self.state.global_step == 2:
            trained.append(self)
            return loss * float("nan")
        return loss

    monkeypatch.setattr(trainer.GemmaTrainer, "compute_loss", poisoned)
    result = cli(*eager, "--no-cuda-graphs", "--eval-steps", 100, "--save-steps", 100)
    assert result.code == 1 and "not finite at step 3" in result.err, result.err
    assert trained[0].state.global_step == 4 and isinstance(trained[0].optimizer, AdamWAsOne)
    assert all(weight.isfinite().all() for weight in trained[0].gradients.weights)
    assert {float(state["step"]) for state in trained[0].optimizer.state_dict()["state"].values()} == {3}
