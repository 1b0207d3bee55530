"""Triton kernels against plain PyTorch in float64: compiled on a GPU, where there is one, and interpreted on a CPU."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from support.triton_cpu import interpreted

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of exp() of a large number

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
# bf16 keeps 8 bits: results are rounded once, so they are off by 0.2 % on average; the interpreter cuts off instead.
TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (6e-3, 3e-3), torch.float16: (1e-3, 5e-4)}


@pytest.fixture(params=DEVICES)
def fused(request):
    """The module, with the device that its kernels run on in ``device``."""
    if request.param == "cpu":
        module = interpreted("gemma_tune.train.fused")
    else:
        from gemma_tune.train import fused as module
    module.device = request.param
    return module


def tolerance(fused, dtype: torch.dtype) -> float:
    return TOLERANCES[dtype][fused.device == "cuda"]


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    got, expected = got.double().cpu(), expected.double().cpu()
    return ((got - expected).norm() / expected.norm()).item()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def compared(ours, theirs, inputs: list[torch.Tensor], dtype: torch.dtype, device: str, layout=lambda x: x):
    """Errors of value and gradients against ``theirs`` in float64 on what was rounded to ``dtype``, and our result.

    Args:
        layout: makes views of the inputs, so that gradients are those of the view's base.
    """
    given = [x.to(dtype).to(device).requires_grad_() for x in inputs]
    exact = [x.detach().double().cpu().requires_grad_() for x in given]
    out, expected = ours(*map(layout, given)), theirs(*map(layout, exact))
    above = randn(*expected.shape, seed=9).to(out.dtype)
    out.backward(above.to(device))
    expected.backward(above.double())
    assert out.shape == expected.shape and all(g.grad.dtype == dtype for g in given)
    return [relative(out, expected), *(relative(g.grad, e.grad) for g, e in zip(given, exact))], out


def heads(x: torch.Tensor) -> torch.Tensor:
    """Queries as attention has them: (batch, heads, length, d), a view of (batch, length, heads, d)."""
    return x.transpose(1, 2)


def part(x: torch.Tensor) -> torch.Tensor:
    """Some heads of a wider projection: rows that do not follow each other in memory."""
    return x[:, :, :2].transpose(1, 2)


LAYOUTS = {"rows": lambda x: x, "heads": heads, "part": part, "even": lambda x: x[..., ::2],
           "flat": lambda x: x.flatten(0, 2), "five": lambda x: x[None]}


def norm(x, weight, eps=1e-3):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm(fused, dtype, layout):
    layout = LAYOUTS[layout]
    inputs = [0.1 * randn(2, 3, 4, 24)]  # small, so that eps counts
    weight = randn(layout(inputs[0]).shape[-1], seed=1).float()
    errors, out = compared(lambda x: fused.RMSNorm.apply(x, weight.to(fused.device), 1e-3),
                           lambda x: norm(x, weight.double()), inputs, dtype, fused.device, layout)
    assert out.dtype == dtype and max(errors) < tolerance(fused, dtype), errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_that_is_trained(fused, layout):
    layout = LAYOUTS[layout]
    x = 0.1 * randn(2, 3, 4, 24)
    weight = randn(layout(x).shape[-1], seed=1).float()
    errors, _ = compared(lambda x, w: fused.RMSNorm.apply(layout(x), w, 1e-3), lambda x, w: norm(layout(x), w), [x, weight.double()],
                         torch.float32, fused.device)
    assert max(errors) < tolerance(fused, torch.float32), errors


def test_results_keep_the_layout_of_heads(fused):
    x = heads(randn(2, 5, 3, 8).float().to(fused.device))
    angles = torch.ones(1, 1, 5, 8, device=fused.device)
    for out in (fused.RMSNorm.apply(x, torch.ones(8, device=fused.device), 1e-6),
                fused.Rotation.apply(x, angles, angles)):
        assert out.stride() == x.stride() and out.transpose(1, 2).is_contiguous()


def test_norm_of_more_rows_than_one_program_has_and_of_a_wide_row(fused):
    for shape in ((37, 8), (1, 4099)):
        weight = torch.ones(shape[-1], device=fused.device)
        errors, _ = compared(lambda x: fused.RMSNorm.apply(x, weight, 1e-6),  # noqa: B023
                             lambda x: norm(x, 1.0, 1e-6), [randn(*shape)], torch.float32, fused.device)
        assert max(errors) < 2e-6


def test_gradcheck(fused):
    """The derivatives themselves: kernels compute in float64 where that is asked for."""
    generator = torch.Generator().manual_seed(0)
    x, up, cos, sin = (torch.randn(1, 2, 4, dtype=torch.float64, generator=generator).to(fused.device) for _ in range(4))
    x, up = x.requires_grad_(), up.requires_grad_()
    gradcheck = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    assert gradcheck(lambda x: fused.RMSNorm.apply(x, cos[0, 0], 0.1), (x,))
    assert gradcheck(lambda x: fused.Rotation.apply(x, cos, sin), (x,))
    for kind in ("gelu_tanh", "gelu", "silu"):
        assert gradcheck(lambda *both: fused.GatedActivation.apply(*both, kind), (x, up))  # noqa: B023


def turned(x, cos, sin):
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("layout", "angles"), [(heads, (2, 1, 3, 24)), (part, (1, 1, 3, 24)), (lambda x: x, (2, 3, 1, 24))],
                         ids=["heads", "part", "length first"])
def test_rotation(fused, dtype, layout, angles):
    cos, sin = (randn(*angles, seed=n).to(dtype) for n in (1, 2))
    errors, out = compared(lambda x: fused.Rotation.apply(x, cos.to(fused.device), sin.to(fused.device)),
                           lambda x: turned(x, cos.double(), sin.double()), [randn(2, 3, 4, 24)], dtype, fused.device, layout)
    assert out.dtype == dtype and max(errors) < tolerance(fused, dtype), errors


def test_rotation_gives_the_wider_type(fused):
    x, angles = (torch.ones(1, 1, 2, 4, device=fused.device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert fused.Rotation.apply(x, angles, angles).dtype == torch.float32


@pytest.mark.parametrize("width", [4, 1, 16])
def test_angles_of_another_width_are_refused(fused, width):
    x, angles = torch.ones(1, 1, 2, 8, device=fused.device), torch.ones(1, 1, 2, width, device=fused.device)
    with pytest.raises((ValueError, RuntimeError)):
        fused.Rotation.apply(x, angles, angles)


PLAIN = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "gelu": F.gelu, "silu": F.silu}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("turned_around", [False, True])
def test_gated_activation(fused, dtype, kind, turned_around):
    errors, out = compared(lambda gate, up: fused.GatedActivation.apply(gate, up, kind),
                           lambda gate, up: PLAIN[kind](gate) * up, [3 * randn(3, 700), randn(3, 700, seed=1)], dtype,
                           fused.device, (lambda x: x.t()) if turned_around else lambda x: x)
    assert out.dtype == dtype and max(errors) < tolerance(fused, dtype), errors


@pytest.mark.parametrize("kind", PLAIN)
def test_large_gates_stay_finite(fused, kind):
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=fused.device).requires_grad_()
    out = fused.GatedActivation.apply(gate, torch.ones_like(gate).requires_grad_(), kind)
    out.sum().backward()
    assert out.tolist() == pytest.approx([0, 0, 0, 100, 1e4])
    assert gate.grad.tolist() == pytest.approx([0, 0, 0.5, 1, 1])


def entropy(logits, targets, softcap, scale):
    logits = scale * logits
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (4.0, 0.5)])
@pytest.mark.parametrize(("vocabulary", "block"), [(100, 8192), (128, 32), (150, 64)])
def test_cross_entropy(monkeypatch, fused, dtype, softcap, scale, vocabulary, block):
    monkeypatch.setattr(fused, "_VOCABULARY_BLOCK", block)
    buffer = (4 * randn(5, vocabulary + 24)).to(dtype).to(fused.device)
    logits = buffer[:4, :vocabulary]
    targets = torch.tensor([3, -100, vocabulary - 1, 50], device=fused.device)
    exact = logits.detach().double().cpu().requires_grad_()
    expected = entropy(exact, targets.cpu(), softcap, scale)
    expected.sum().backward()
    before = buffer.clone()
    loss, own = fused.cross_entropy_(logits, targets, softcap, scale, -100, with_grad=False)
    assert own is None and torch.equal(buffer, before)
    again, own = fused.cross_entropy_(logits, targets, softcap, scale, -100, with_grad=True)
    assert torch.equal(again, loss) and loss.dtype == own.dtype == torch.float32
    assert relative(loss, expected) < 1e-6 and loss[1] == own[1] == 0
    assert torch.equal(buffer[4:], before[4:]) and torch.equal(buffer[:, vocabulary:], before[:, vocabulary:])
    gradient = logits.double().cpu()
    assert not gradient[1].any() and not gradient[[0, 2, 3], targets.cpu()[[0, 2, 3]]].any()
    gradient[[0, 2, 3], targets.cpu()[[0, 2, 3]]] = own.cpu().double()[[0, 2, 3]]
    assert relative(gradient, exact.grad) < tolerance(fused, dtype)


def test_a_target_that_the_model_is_sure_of_keeps_its_gradient(fused):
    logits = torch.zeros(1, 64, dtype=torch.bfloat16, device=fused.device)
    logits[0, 5] = 14.0
    loss, own = fused.cross_entropy_(logits, torch.tensor([5], device=fused.device), None, 1.0, -100, with_grad=True)
    assert own.item() == pytest.approx(-63 / (63 + 1202604.284), rel=1e-2) and 1 + own.bfloat16().item() != 1 + own.item()
    assert loss.item() == pytest.approx(63 / 1202604.284, rel=1e-2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss(fused, bad):
    logits = torch.zeros(2, 64, device=fused.device)
    logits[1, 7] = bad
    loss, _ = fused.cross_entropy_(logits, torch.tensor([5, 5], device=fused.device), None, 1.0, -100, with_grad=True)
    assert loss[0].isfinite() and not loss[1].isfinite()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_beyond_two_to_the_31st_logit():
    """Needs 5 GB: the last row of 8,300 times 262,144 logits lies beyond what 32 bits can address."""
    from gemma_tune.train import fused

    logits = torch.zeros(8300, 262_144, dtype=torch.bfloat16, device="cuda")
    targets = torch.full((8300,), 262_143, device="cuda")
    loss, own = fused.cross_entropy_(logits, targets, None, 1.0, -100, with_grad=True)
    expected = torch.log(torch.tensor(262_144.0))
    assert torch.allclose(loss.cpu(), expected.expand(8300), atol=1e-4)
    assert torch.allclose(own.cpu(), torch.tensor(1 / 262_144 - 1).expand(8300))
    assert logits[-1, :-1].float().sum().item() == pytest.approx(1, rel=0.01) and logits[-1, -1] == 0
