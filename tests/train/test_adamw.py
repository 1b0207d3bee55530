"""AdamW of weights that are one tensor: PyTorch's results and checkpoints, and one kernel."""

from __future__ import annotations

import io
import weakref

import pytest
import torch

from gemma_tune.train.adamw import AdamWAsOne
from gemma_tune.train.gradients import Gradients

SIZES = (3, 5), (70,), (2, 2), (64, 9)
SETTINGS = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1, "fused": True}


class Steps:
    """An optimiser of some weights, and the same numbers as gradients for each of its kind."""

    def __init__(self, as_one: bool, groups=lambda weights: [{"params": weights}], **settings):
        drawn = torch.Generator().manual_seed(0)
        self.weights = [torch.nn.Parameter(torch.randn(size, generator=drawn)) for size in SIZES]
        self.bad = torch.zeros(())
        self.gradients = Gradients({str(n): w for n, w in enumerate(self.weights)}, fixed=as_one)
        self.optimizer = torch.optim.AdamW(groups(self.weights), **(SETTINGS | settings))
        if as_one:
            self.optimizer = AdamWAsOne(self.optimizer.param_groups, self.gradients, self.bad)
        elif settings.get("fused", True):
            self.optimizer.found_inf = self.bad

    def take(self, steps, without: tuple[int, ...] = (), bad: bool = False) -> None:
        for step in steps:
            drawn = torch.Generator().manual_seed(step)
            self.gradients.clear()
            for n, weight in enumerate(self.weights):
                gradient = torch.randn(weight.shape, generator=drawn) * 10.0 ** (step % 3 - 1)
                if n in without:
                    continue
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
                weight.grad += gradient
            self.bad.fill_(float(bad))
            for group in self.optimizer.param_groups:
                group["lr"] = 0.01 / (1 + step)
            self.optimizer.step()

    def weigh_as(self, other: Steps) -> None:
        with torch.no_grad():
            for ours, theirs in zip(self.weights, other.weights):
                ours.copy_(theirs)

    def saved(self) -> dict:
        """What a checkpoint holds of the optimiser, through a file."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def same(found: Steps, expected: Steps) -> None:
    for ours, theirs in zip(found.weights, expected.weights):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-8)
    ours, theirs = found.saved(), expected.saved()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for number, state in theirs["state"].items():
        assert state.keys() == ours["state"][number].keys()
        for name, value in state.items():
            assert torch.allclose(ours["state"][number][name], value, rtol=1e-6, atol=1e-8), (number, name)


@pytest.fixture
def at_once(monkeypatch) -> list[int]:
    """How many tensors each fused step was given."""
    found, theirs = [], torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda weights, *args, **how: found.append(len(weights)) or theirs(weights, *args, **how))
    return found


def test_steps_are_torchs_and_one_tensor(at_once):
    found, expected = Steps(True), Steps(False)
    found.take(range(3))
    assert at_once == [1, 1, 1]
    expected.take(range(3))
    same(found, expected)
    before = [w.clone() for w in found.weights]
    for steps in (found, expected):
        steps.take([3], bad=True)
    assert all(torch.equal(w, b) for w, b in zip(found.weights, before)), "a step that is not finite reached the weights"
    same(found, expected)
    for steps in (found, expected):
        steps.take([4])
    assert not torch.equal(found.weights[0], before[0])
    same(found, expected)


@pytest.mark.parametrize("fused", [True, False])
def test_checkpoints_are_read_both_ways(fused, at_once):
    """One of an AdamW of many tensors, as a CPU writes it, goes on as one tensor; and back."""
    ways = {"fused": fused}
    expected, before = Steps(False, **ways), Steps(False, **ways)
    expected.take(range(6))
    before.take(range(2))
    found = Steps(True)
    found.weigh_as(before)
    found.take([0])  # what was before does not count
    found.weigh_as(before)
    found.optimizer.load_state_dict(before.saved() | {"param_groups": found.saved()["param_groups"]})
    at_once.clear()
    found.take([2, 3])
    assert at_once == [1, 1]
    after = Steps(False, **ways)
    after.weigh_as(found)
    after.optimizer.load_state_dict(found.saved() | {"param_groups": after.saved()["param_groups"]})
    assert {float(state["step"]) for state in after.saved()["state"].values()} == {4}
    after.take([4, 5])
    same(after, expected)


def test_of_what_is_loaded_nothing_is_twice_on_the_device(monkeypatch):
    """Of all weights each moment takes four bytes for a weight."""
    before, expected, found = Steps(False), Steps(False), Steps(True)
    before.take(range(2))
    expected.take(range(3))
    found.optimizer.load_state_dict(before.saved())
    found.weigh_as(before)
    loaded = [[weakref.ref(state[name]) for state in found.optimizer.state.values()] for name in ("exp_avg", "exp_avg_sq")]
    left, room = [], found.gradients.room
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self.clone())  # as of another device
    monkeypatch.setattr(found.gradients, "room", lambda: left.append([sum(r() is not None for r in refs) for refs in loaded]) or room())
    found.take([2])
    assert left == [[0, 4], [0, 0]]
    monkeypatch.undo()
    same(found, expected)


def three_steps(found: Steps, expected: Steps, at_once: list[int], tensors: int) -> None:
    found.take(range(3))
    assert set(at_once) == {tensors}
    expected.take(range(3))
    same(found, expected)


@pytest.mark.parametrize("groups, tensors", [
    (lambda w: [{"params": w[:2]}, {"params": w[2:], "weight_decay": 0.0}], 2),
    (lambda w: [{"params": w[1::2]}, {"params": w[::2]}], 1)], ids=["that decay otherwise", "that differ in nothing"])
def test_groups_of_weights_are_a_tensor_each_where_they_differ(at_once, groups, tensors):
    three_steps(Steps(True, groups), Steps(False, groups), at_once, tensors)


def test_weights_that_were_moved_are_steps_of_their_own(at_once):
    found = Steps(True)
    found.weights[1].data = found.weights[1].data.clone()
    three_steps(found, Steps(False), at_once, 4)


def test_weights_that_had_no_gradient_before_have_fewer_steps(at_once):
    """As of a layer that took no part in the steps of a CPU."""
    before, expected = Steps(False), Steps(False)
    for steps in (before, expected):
        steps.take(range(2), without=(1,))
    found = Steps(True)
    found.weigh_as(before)
    found.optimizer.load_state_dict(before.saved())
    at_once.clear()
    for steps in (found, expected):
        steps.take([2, 3])
    same(found, expected)
    assert {float(state["step"]) for state in found.saved()["state"].values()} == {2, 4}
