"""The adapter's gradients as one tensor or as many: the same sums, norms and clipping; figures that are read late."""

from __future__ import annotations

import math

import pytest
import torch

from gemma_tune.train.gradients import Gradients
from gemma_tune.train.late import LateFigures


@pytest.fixture(params=[True, False], ids=["fixed", "free"])
def gradients(request) -> Gradients:
    torch.manual_seed(0)
    weights = {name: torch.nn.Parameter(torch.randn(size)) for name, size in (("a", (3, 5)), ("b", (70,)), ("c", (2, 2)))}
    return Gradients(weights, request.param)


def backward(gradients: Gradients, factor: float = 1.0) -> list[torch.Tensor]:
    loss = sum((factor * n * weight.square()).sum() for n, weight in enumerate(gradients.weights, 1))
    loss.backward()
    gradients.loss += loss.detach()
    return [2 * factor * n * weight.detach() for n, weight in enumerate(gradients.weights, 1)]


def test_passes_add_up_and_a_step_begins_at_nothing(gradients):
    gradients.clear()
    before = [w.grad.data_ptr() for w in gradients.weights] if gradients.fixed else None
    expected = [a + b for a, b in zip(backward(gradients), backward(gradients, 0.5))]
    assert all(torch.allclose(w.grad, e) for w, e in zip(gradients.weights, expected))
    if gradients.fixed:
        assert [w.grad.data_ptr() for w in gradients.weights] == before, "addresses that a captured step adds to"
    gradients.clear()
    assert gradients.loss == 0 and not any(w.grad is not None and w.grad.any() for w in gradients.weights)


def test_norms_and_clipping_are_torchs(gradients):
    gradients.clear()
    expected = backward(gradients)
    loss, norms = gradients.loss.clone(), gradients.norms()
    assert torch.allclose(norms, torch.stack([e.norm() for e in expected]))
    norm = torch.linalg.vector_norm(norms)
    copies = [torch.nn.Parameter(w.detach().clone()) for w in gradients.weights]
    for most in (float(norm) / 3, float(norm) * 3):
        for copy, e in zip(copies, expected):
            copy.grad = e.clone()
        total = torch.nn.utils.clip_grad_norm_(copies, most)
        gradients.clear()
        backward(gradients)
        gradients.clip(norm, most)
        assert torch.allclose(norm, total)
        assert all(torch.allclose(w.grad, c.grad, rtol=1e-5) for w, c in zip(gradients.weights, copies))
        assert gradients.loss == loss, "the loss is no gradient"


def test_what_was_saved_comes_back(gradients):
    gradients.clear()
    expected = backward(gradients)
    loss, saved = gradients.loss.clone(), gradients.saved()
    backward(gradients, 7.0)
    gradients.restore(saved)
    assert gradients.loss == loss and all(torch.equal(w.grad, e) for w, e in zip(gradients.weights, expected))
    assert gradients.begun, "there is something to lose again"
    gradients.clear()
    empty = gradients.saved()
    backward(gradients)
    gradients.restore(empty)
    assert not any(w.grad is not None and w.grad.any() for w in gradients.weights)


def test_weights_that_were_moved_come_back_to_their_places(gradients):
    """As accelerate does with several processes on a CPU, whose device has another name there."""
    before = [w.detach().clone() for w in gradients.weights]
    for weight in gradients.weights:
        weight.data = weight.data.clone()
        if weight.grad is not None:
            weight.grad.data = weight.grad.data.clone()
    gradients.settle()
    assert all(torch.equal(w, b) for w, b in zip(gradients.weights, before))
    backward(gradients)
    assert gradients.norms().norm() > 0
    if gradients.fixed:
        places = gradients.parts(gradients.weights_as_one), gradients.parts(gradients.as_one)
        for weight, place, grad in zip(gradients.weights, *places):
            assert weight.data_ptr() == place.data_ptr() and weight.grad.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_shows_in_its_weights_norm(gradients, bad):
    gradients.clear()
    backward(gradients)
    gradients.weights[1].grad[3] = bad
    assert torch.isfinite(gradients.norms()).tolist() == [True, False, True]


def test_figures_come_in_order_and_all_in_the_end():
    late = LateFigures(torch.device("cpu"))
    late._wait_for = 1  # as on a GPU
    loss, norms = torch.tensor(2.0), torch.tensor([3.0, 4.0])
    for step in (1, 2, 3):
        late._waiting.append(({"step": step}, torch.cat([(loss * step)[None], norms.norm()[None], norms]), None))
    assert [(f.facts["step"], f.loss) for f in late.read()] == [(1, 2.0), (2, 4.0)]
    [last] = late.read(everything=True)
    assert (last.facts["step"], last.loss, last.norm, last.norms) == (3, 6.0, 5.0, [3.0, 4.0]) and not late.read(True)


def test_figures_outlive_what_they_were_read_from():
    late = LateFigures(torch.device("cpu"))
    loss = torch.tensor(1.5)
    late.add({"step": 1}, loss, torch.tensor(2.0), torch.tensor([2.0]))
    loss.zero_()
    assert [f.loss for f in late.read()] == [1.5]
