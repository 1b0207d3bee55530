"""The fused loss against plain cross-entropy in float64: value, gradient, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_tune.train import loss as module
from gemma_tune.train.loss import IGNORE_INDEX, linear_cross_entropy

VOCABULARY, WIDTH = 211, 24


def batch(rows: int = 3, length: int = 9, *, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Hidden states, head and labels; about half of the positions are trained, the first token of a row never."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.5] = IGNORE_INDEX
    labels[:, 0] = 5  # a label at position 0 has no position before it: it must not count
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), labels


def reference(hidden, weight, labels, softcap=None, scale=1.0):
    """Summed loss and gradient by autograd through the whole logits, in float64."""
    hidden = hidden.detach().double().requires_grad_()
    logits = scale * (hidden[:, :-1] @ weight.double().t())
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    total.backward()
    return total.detach(), hidden.grad


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance of two gradients against the length of the expected one."""
    return ((got.double() - expected).norm() / expected.norm()).item()


# bf16 keeps 8 bits: one rounding is off by up to 0.4 %, independent ones average to less. A wrong formula (a missing
# softcap derivative, a shifted label, an unscaled gradient) is off by 10 % and more.
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-6, 1e-6), torch.bfloat16: (3e-3, 6e-3)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_value_and_gradient_equal_plain_cross_entropy(dtype, softcap, scale):
    hidden, weight, labels = batch(dtype=dtype)
    expected, expected_gradient = reference(hidden, weight, labels, softcap, scale)
    total = linear_cross_entropy(hidden, weight, labels, softcap=softcap, scale=scale)
    total.backward()
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.item() == pytest.approx(expected.item(), rel=value_tolerance)
    assert hidden.grad.dtype == dtype
    assert relative_error(hidden.grad, expected_gradient) < gradient_tolerance


@pytest.mark.parametrize("change", [dict(softcap=None), dict(scale=1.0), dict(softcap=5.0)])
def test_the_tolerances_tell_formulas_apart(change):
    hidden, weight, labels = batch(dtype=torch.bfloat16)
    right, right_gradient = reference(hidden, weight, labels, softcap=4.0, scale=0.5)
    wrong, wrong_gradient = reference(hidden, weight, labels, **{"softcap": 4.0, "scale": 0.5, **change})
    value_tolerance, gradient_tolerance = TOLERANCES[torch.bfloat16]
    assert abs(wrong / right - 1) > 3 * value_tolerance
    assert relative_error(wrong_gradient, right_gradient) > 3 * gradient_tolerance


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_bf16_logits_are_rounded_once_and_the_softmax_is_fp32(softcap):
    hidden, weight, labels = batch(dtype=torch.bfloat16)
    logits = (hidden.detach()[:, :-1] @ weight.t()).double()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    total = linear_cross_entropy(hidden, weight, labels, softcap=softcap)
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradcheck(softcap):
    hidden, weight, labels = batch(rows=2, length=4)
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, labels, softcap=softcap, scale=0.5), (hidden,))


@pytest.mark.parametrize("row_block", [1, 4, 256])
@pytest.mark.parametrize("chunk", [1, 500, 1 << 21])
def test_blocks_and_chunks_of_any_size_give_the_same(monkeypatch, row_block, chunk):
    monkeypatch.setattr(module, "ROW_BLOCK", row_block)
    monkeypatch.setattr(module, "CHUNK", chunk)
    hidden, weight, labels = batch()
    assert (labels[:, 1:] != IGNORE_INDEX).sum() % 4 != 0, "the last block must be shorter than the others"
    expected, expected_gradient = reference(hidden, weight, labels, softcap=4.0, scale=0.5)
    total = linear_cross_entropy(hidden, weight, labels, softcap=4.0, scale=0.5)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(hidden.grad, expected_gradient) < 1e-12


def test_more_rows_than_one_block():
    hidden, weight, labels = batch(rows=4, length=1101, dtype=torch.float32)
    assert (labels[:, 1:] != IGNORE_INDEX).sum() > 2 * module.ROW_BLOCK
    expected, expected_gradient = reference(hidden, weight, labels)
    total = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(hidden.grad, expected_gradient) < 1e-6


def test_positions_that_are_not_trained_get_no_gradient():
    hidden, weight, labels = batch()
    linear_cross_entropy(hidden, weight, labels).backward()
    trained = torch.zeros(labels.shape, dtype=torch.bool)
    trained[:, :-1] = labels[:, 1:] != IGNORE_INDEX
    assert hidden.grad[trained].abs().sum(dim=-1).min() > 0
    assert not hidden.grad[~trained].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_trained_is_zero_and_backward_works(dtype):
    hidden, weight, labels = batch(dtype=dtype)
    labels[:, 1:] = IGNORE_INDEX
    total = linear_cross_entropy(hidden, weight, labels)
    assert total.item() == 0.0
    total.backward()
    assert hidden.grad.shape == hidden.shape
    assert not hidden.grad.any()


def test_a_row_of_one_token_trains_nothing():
    hidden, weight, labels = batch(length=1)
    total = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    assert total.item() == 0.0
    assert not hidden.grad.any()


def test_large_logits_stay_finite():
    hidden, weight, labels = batch(dtype=torch.float32)
    expected, expected_gradient = reference(hidden, weight * 1e4, labels)
    total = linear_cross_entropy(hidden, weight * 1e4, labels)
    total.backward()
    assert math.isfinite(total.item())
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert relative_error(hidden.grad, expected_gradient) < 1e-5


def test_without_gradient_only_the_value_is_computed():
    hidden, weight, labels = batch()
    expected, _ = reference(hidden, weight, labels, softcap=4.0)
    with Allocations() as seen, torch.no_grad():
        total = linear_cross_entropy(hidden, weight, labels, softcap=4.0)
    assert not total.requires_grad
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert seen.products == 1, "the second product is the gradient's"
    assert hidden.requires_grad and hidden.grad is None


def test_a_head_that_would_be_trained_is_refused():
    hidden, weight, labels = batch()
    with pytest.raises(ValueError, match="frozen head"):
        linear_cross_entropy(hidden, weight.requires_grad_(), labels)


def test_a_second_derivative_is_refused_instead_of_wrong():
    hidden, weight, labels = batch()
    [gradient] = torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accumulated_micro_batches_equal_one_big_batch(dtype):
    hidden, weight, labels = batch(rows=6, length=23, dtype=dtype)
    count = (labels[:, 1:] != IGNORE_INDEX).sum()
    (linear_cross_entropy(hidden, weight, labels) / count).backward()
    whole, hidden.grad = hidden.grad, None
    for n in range(0, 6, 2):
        rows = slice(n, n + 2)
        (linear_cross_entropy(hidden[rows], weight, labels[rows]) / count).backward()
    assert torch.allclose(hidden.grad.double(), whole.double(), rtol=TOLERANCES[dtype][1], atol=0)
    assert len({(labels[n:n + 2, 1:] != IGNORE_INDEX).sum().item() for n in range(0, 6, 2)}) > 1, \
        "equal counts would not tell one normaliser from the mean of means"


def test_the_normaliser_is_not_rounded_to_bf16():
    """1 / 37 as bf16 is 0.02698, not 0.02703: the whole gradient would be off by 0.16 %, every step by another share."""
    hidden, weight, labels = batch(rows=8, length=40, dtype=torch.bfloat16)
    linear_cross_entropy(hidden, weight, labels).backward()
    summed, hidden.grad = hidden.grad.double(), None
    (linear_cross_entropy(hidden, weight, labels) / 37).backward()
    ratio = (hidden.grad.double() * summed).sum() / summed.square().sum()
    assert ratio.item() == pytest.approx(1 / 37, rel=2e-4)


class Allocations(TorchDispatchMode):
    """Largest tensor that any operation makes, in elements, and the number of matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_grad", [True, False])
def test_the_logits_of_a_batch_are_never_built(monkeypatch, dtype, with_grad):
    monkeypatch.setattr(module, "ROW_BLOCK", 256)
    monkeypatch.setattr(module, "CHUNK", 256 * 300)
    generator = torch.Generator().manual_seed(0)
    rows, length, vocabulary = 4, 257, 4096
    hidden = torch.randn(rows, length, 8, generator=generator).to(dtype).requires_grad_(with_grad)
    weight = torch.randn(vocabulary, 8, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    with Allocations() as seen:
        total = linear_cross_entropy(hidden, weight, labels)
        if with_grad:
            total.backward()
    chunks = 4 * math.ceil(vocabulary / 300)
    assert seen.products == chunks * (1 + with_grad), "each chunk of logits is made once, and used once for the gradient"
    assert seen.largest == module.CHUNK
    with Allocations() as plain:
        reference(hidden, weight, labels)
    assert plain.largest >= rows * (length - 1) * vocabulary, "the plain way does build them"


def test_the_sizes_that_are_used_bound_the_memory():
    """Whatever the vocabulary."""
    hidden, weight, labels = batch(rows=1, length=1026, dtype=torch.bfloat16)
    weight = weight.repeat(32, 1)
    labels[:, 1:] = labels[:, 1:].clamp(min=0)
    with Allocations() as seen:
        linear_cross_entropy(hidden, weight, labels).backward()
    assert module.CHUNK // 2 < seen.largest <= module.CHUNK < 1025 * len(weight)
