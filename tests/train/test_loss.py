"""The fused loss against plain cross-entropy in float64: value, gradient, memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_tune.train import loss as module
from gemma_tune.train.batches import trained_positions
from gemma_tune.train.loss import IGNORE_INDEX

VOCABULARY, WIDTH = 211, 24


def rows_cross_entropy(*tensors, **how):
    """The product's loss of rows, summed as training sums it."""
    return module.rows_cross_entropy(*tensors, **how).sum()


def batch(rows: int = 3, length: int = 9, *, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Hidden states, head and labels; about half of the positions are trained, the first token of a row never."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (rows, length), generator=generator)
    labels[torch.rand(rows, length, generator=generator) < 0.5] = IGNORE_INDEX
    labels[:, 0] = 5  # a label at position 0 has no position before it: it must not count
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), labels


def linear_cross_entropy(hidden, weight, labels, **how):
    """The product's loss of whole rows (batch, length), as training puts its parts together."""
    positions, targets = trained_positions(labels)
    return rows_cross_entropy(hidden.flatten(0, 1).index_select(0, positions), weight, targets, **how)


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


@pytest.mark.parametrize("rows", [0, 1, 636, 956, 1024])
def test_rows_of_logits_begin_at_aligned_addresses(rows):
    width = module._chunk_width(module.CHUNK, rows)
    assert width % module.ALIGNED == 0 and width * rows <= module.CHUNK < (width + module.ALIGNED) * max(1, rows)


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


def trained_head(dtype, softcap, scale):
    """A head that is trained: loss, gradient of the hidden states, and of the fp32 head; the same in float64."""
    hidden, weight, labels = batch(dtype=dtype)
    head = weight.to(torch.promote_types(dtype, torch.float32)).clone().requires_grad_()
    total = linear_cross_entropy(hidden, weight, labels, softcap=softcap, scale=scale, trained=head)
    (total / 3).backward()
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = scale * (exact[0][:, :-1] @ exact[1].t())
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX,
                                                 reduction="sum")
    (expected / 3).backward()
    return (total, hidden.grad, head.grad), (expected, exact[0].grad, exact[1].grad)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("chunk", [1, 4096, 1 << 21])
def test_the_gradient_of_a_trained_head_equals_plain_cross_entropy(monkeypatch, dtype, softcap, chunk):
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "ROW_BLOCK", 7)
    (total, *gradients), (expected, *wanted) = trained_head(dtype, softcap, 0.5)
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    assert total.item() == pytest.approx(expected.item(), rel=value_tolerance)
    assert gradients[0].dtype == dtype and gradients[1].dtype == torch.promote_types(dtype, torch.float32)
    for found, exact in zip(gradients, wanted):
        assert relative_error(found, exact) < gradient_tolerance


def test_the_gradient_of_a_trained_head_is_added_to_what_is_there():
    hidden, weight, labels = batch()
    head = weight.clone().requires_grad_()
    linear_cross_entropy(hidden, weight, labels, trained=head).backward()
    place, once = head.grad, head.grad.clone()
    linear_cross_entropy(hidden, weight, labels, trained=head).backward()
    assert head.grad is place and torch.allclose(place, 2 * once)


def test_a_chunk_for_a_trained_head_fits_a_gpu_as_the_logits_of_a_frozen_one_do():
    """By shapes: for each logit four numbers in fp32 at most, such as its exponent and its slope, are there at once."""
    hidden, weight = (torch.empty(rows, 8, dtype=torch.bfloat16, device="meta") for rows in (1000, 262_144))
    chunks = [logits for _, _, logits in module._chunks_of_logits(hidden, weight, 4.0, 1.0)]
    assert sum(logits.shape[1] for logits in chunks) == len(weight) and 0.9 < 16 * chunks[0].numel() / module.LOGITS <= 1


def test_rows_of_a_trained_head_go_in_blocks(monkeypatch):
    """A product for few columns and very many rows adds to all rows for each of them."""
    hidden, weight, targets, _ = filled_up(torch.float32)
    found, theirs = [], module._chunks_of_logits
    monkeypatch.setattr(module, "ROW_BLOCK", 5)
    monkeypatch.setattr(module, "_chunks_of_logits", lambda rows, *more: found.append(len(rows)) or theirs(rows, *more))
    rows_cross_entropy(hidden, weight, targets, trained=weight.clone().requires_grad_()).sum().backward()
    assert max(found) == 5 and sum(found) == 2 * len(targets)


def test_rows_that_fill_up_say_nothing_to_a_trained_head():
    hidden, weight, targets, _ = filled_up(torch.float64)
    head = weight.clone().requires_grad_()
    rows_cross_entropy(hidden, weight, targets, softcap=4.0, scale=0.5, trained=head).backward()
    kept = targets != IGNORE_INDEX
    alone, again = hidden.detach()[kept].requires_grad_(), weight.clone().requires_grad_()
    rows_cross_entropy(alone, weight, targets[kept], softcap=4.0, scale=0.5, trained=again).backward()
    assert torch.allclose(head.grad, again.grad) and not hidden.grad[~kept].any()
    assert torch.allclose(hidden.grad[kept], alone.grad)


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
    monkeypatch.setattr(module, "CHUNK", 256 * 320)
    generator = torch.Generator().manual_seed(0)
    rows, length, vocabulary = 4, 257, 4096
    hidden = torch.randn(rows, length, 8, generator=generator).to(dtype).requires_grad_(with_grad)
    weight = torch.randn(vocabulary, 8, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (rows, length), generator=generator)
    with Allocations() as seen:
        total = linear_cross_entropy(hidden, weight, labels)
        if with_grad:
            total.backward()
    chunks = 4 * math.ceil(vocabulary / 320)
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


# ---- rows that were picked already -----------------------------------------------------------------------------------

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


def filled_up(dtype: torch.dtype, device: str = "cpu"):
    """Rows with targets, between them rows that only fill up, whose numbers must not matter."""
    hidden, weight, labels = batch(rows=2, length=36, dtype=dtype)
    rows, targets = hidden.detach()[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    rows[torch.nonzero(targets == IGNORE_INDEX)[0]] = torch.inf
    return rows.to(device).requires_grad_(), weight.to(device), targets.to(device), reference(hidden, weight, labels, 4.0, 0.5)


@pytest.fixture
def kernel(monkeypatch):
    """The way of a GPU on a CPU, with Triton's interpreter."""
    pytest.importorskip("triton")
    from support.triton_cpu import interpreted

    monkeypatch.setattr(module, "_by_chunks", module.by_kernel(interpreted("gemma_tune.train.fused").cross_entropy_))


def check_rows(dtype, device="cpu", tolerance=None):
    hidden, weight, targets, (expected, expected_gradient) = filled_up(dtype, device)
    total = rows_cross_entropy(hidden, weight, targets, softcap=4.0, scale=0.5)
    (total / 3).backward()
    value_tolerance, gradient_tolerance = TOLERANCES[dtype]
    kept = (targets != IGNORE_INDEX).cpu()
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and hidden.grad.dtype == dtype
    assert total.item() == pytest.approx(expected.item(), rel=value_tolerance)
    gradient = hidden.grad.cpu()
    assert not gradient[~kept].any() and 0 < kept.sum() < len(kept)
    expected_gradient = expected_gradient[:, :-1].flatten(0, 1)[kept] / 3
    assert relative_error(gradient[kept], expected_gradient) < (tolerance or gradient_tolerance)
    with torch.no_grad():
        assert torch.equal(rows_cross_entropy(hidden, weight, targets, softcap=4.0, scale=0.5), total)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_rows_that_fill_up_count_nothing(dtype, device):
    check_rows(dtype, device)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_the_way_of_a_gpu_gives_the_same(kernel, monkeypatch, dtype):
    monkeypatch.setattr(module, "LOGITS", 64 * VOCABULARY * dtype.itemsize)
    assert [len(part) for part in filled_up(dtype)[0].split(module._rows_at_a_time(70, VOCABULARY, dtype.itemsize))] == [64, 6]
    # The softcap's derivative is taken in fp32 of the interpreter's cut-off numbers.
    check_rows(dtype, tolerance=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_nothing_trained_the_way_of_a_gpu(kernel):
    test_nothing_trained_is_zero_and_backward_works(torch.float32)


@pytest.mark.parametrize("rows", [0, 1, 64, 500, 512, 513, 1025, 6144])
def test_blocks_of_logits_are_bounded_and_of_about_one_size(rows):
    size = module._rows_at_a_time(rows, 262_144, 2)
    assert size % 64 == 0 and size * 262_144 * 2 <= module.LOGITS
    sizes = [len(part) for part in torch.empty(rows, 0).split(size)]
    assert len(sizes) == max(1, math.ceil(rows / 512)) and max(sizes) - min(sizes) <= 64 * len(sizes)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_sure_target_keeps_its_gradient_in_bf16(device):
    """softmax_y - 1 is -4e-4 here; from a bf16 softmax_y it would be 0 or -4e-3."""
    hidden = torch.ones(1, 8, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(32, 8, dtype=torch.bfloat16, device=device)
    weight[5] = 1.4
    hidden.requires_grad_()
    rows_cross_entropy(hidden, weight, torch.tensor([5], device=device)).backward()
    expected = reference(torch.stack([hidden, hidden], 1).cpu(), weight.cpu(), torch.tensor([[0, 5]]))[1][0, :1]
    assert relative_error(hidden.grad.cpu(), expected) < 5e-3


def test_no_size_depends_on_the_data():
    """Fake tensors have no numbers: a size that came from one, or a number that Python asks for, is an error."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        hidden = torch.empty(7, 8, dtype=torch.bfloat16, requires_grad=True)
        total = rows_cross_entropy(hidden, torch.empty(50, 8, dtype=torch.bfloat16), torch.empty(7, dtype=torch.long),
                                   softcap=4.0, scale=0.5)
        total.backward()
        assert total.shape == () and hidden.grad.shape == hidden.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_in_a_cuda_graph():
    """Captured on other targets, which are then written in place."""
    hidden, weight, labels = batch(rows=1, length=41, dtype=torch.bfloat16)
    expected, gradient = reference(hidden, weight, labels, 4.0, 0.5)
    rows, head = hidden.detach()[0, :-1].cuda().requires_grad_(), weight.cuda()
    rows.grad, targets = torch.zeros_like(rows), torch.full((40,), 3, device="cuda")

    def step():
        total = rows_cross_entropy(rows, head, targets, softcap=4.0, scale=0.5)
        total.backward()
        return total.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = step()
    rows.grad.zero_()
    targets.copy_(labels[0, 1:])
    graph.replay()
    assert total.item() == pytest.approx(expected.item(), rel=3e-3)
    assert relative_error(rows.grad.cpu(), gradient[0, :-1]) < 6e-3
