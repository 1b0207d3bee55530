"""Attention in blocks against PyTorch's own: values, gradients, windows, shared key heads."""

from __future__ import annotations

import pytest
import torch

from gemma_tune.train import attention as module
from gemma_tune.train.attention import CausalAttention, causal_attention_or


def tensors(heads: int, key_heads: int, length: int, width: int = 8, dtype=torch.float64, batch: int = 2):
    """q, k, v as a model makes them: (batch, heads, length, d), a transposed view of (batch, length, heads, d)."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, n, width, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
            .requires_grad_() for n in (heads, key_heads, key_heads)]


def reference(q, k, v, scale, window):
    """Output (batch, length, heads, d) and gradients of its square sum, by PyTorch in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (distance >= 0) & (distance < (window or q.shape[2]))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    out.square().sum().backward()
    return out.transpose(1, 2), (q.grad, k.grad, v.grad)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 1), (4, 4), (6, 2)])
@pytest.mark.parametrize(("length", "window"), [(1, None), (7, None), (8, None), (21, None), (21, 5), (21, 8), (21, 1), (21, 40)])
def test_values_and_gradients_equal_plain_attention(monkeypatch, heads, key_heads, length, window):
    monkeypatch.setattr(module, "BLOCK", 8)
    inputs = tensors(heads, key_heads, length)
    out = CausalAttention.apply(*inputs, 0.3, window)
    out.square().sum().backward()
    expected, gradients = reference(*inputs, 0.3, window)
    assert torch.allclose(out, expected, atol=1e-12)
    for tensor, gradient in zip(inputs, gradients):
        assert torch.allclose(tensor.grad, gradient, atol=1e-10)


def test_bf16_is_about_as_exact_as_pytorch():
    inputs = tensors(4, 1, 300, width=64, dtype=torch.bfloat16)
    expected, gradients = reference(*inputs, 0.125, None)
    errors = {}
    for name in ("ours", "theirs"):
        for tensor in inputs:
            tensor.grad = None
        out = (CausalAttention.apply(*inputs, 0.125, None) if name == "ours" else
               torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, scale=0.125, enable_gqa=True)
               .transpose(1, 2))
        out.square().sum().backward()
        pairs = [(out, expected), *((t.grad, g) for t, g in zip(inputs, gradients))]
        errors[name] = [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]
    assert max(errors["ours"]) < min(0.02, 2 * max(errors["theirs"])), errors


class Module(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(("given", "ours"), [
    (dict(), True), (dict(sliding_window=4), True), (dict(attention_mask=torch.ones(1, 1, 9, 9).bool()), False),
    (dict(attention_mask=torch.ones(1, 1, 9, 9).bool(), sliding_window=4), True), (dict(dropout=0.1), False),
    (dict(attention_mask=torch.ones(1, 1, 9, 9).bool(), sliding_window=4, as_masked=True), False),
    (dict(is_causal=False), False), (dict(position_bias=torch.ones(1)), False), (dict(s_aux=torch.ones(1)), False)])
def test_only_what_it_means_the_same_for_is_replaced(given, ours):
    q, k, v = tensors(4, 1, 9)
    given = {"attention_mask": None, "scaling": 0.3, **given}
    out, _ = causal_attention_or(lambda *args, **kwargs: ("theirs", None))(Module(), q, k, v, **given)
    assert isinstance(out, str) != ours
    if ours:
        window = given["sliding_window"] if given["attention_mask"] is not None else None
        assert torch.allclose(out, reference(q, k, v, 0.3, window)[0], atol=1e-12)


def test_one_new_token_is_left_to_pytorch():
    q, k, v = tensors(4, 1, 9)
    wrapped = causal_attention_or(lambda *args, **kwargs: ("theirs", None))
    assert wrapped(Module(), q[:, :, -1:], k, v, None)[0] == "theirs"
