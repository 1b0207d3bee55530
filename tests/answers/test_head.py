"""The output head in parts: its logits are those of the whole, and what it is not made for is left as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemma_tune.answers.head import ENTRIES, MOST, head_in_parts

needs_mkl = pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="products in parts are for MKL")


def model_with(head: torch.nn.Module) -> SimpleNamespace:
    return SimpleNamespace(get_output_embeddings=lambda: head)


@needs_mkl
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, MOST), (MOST, 1), (MOST + 1, 1), (3, 2), ()])
def test_logits_are_those_of_the_whole_head(shape, monkeypatch):
    torch.manual_seed(0)
    head, states = torch.nn.Linear(24, 2 * ENTRIES + 7, bias=False), torch.randn(*shape, 24)
    parts, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, out: parts.append(out.shape[1]) or product(*args, out=out))
    with torch.inference_mode():
        expected = head(states)
        with head_in_parts(model_with(head)):
            found = head(states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert parts == ([ENTRIES, ENTRIES, 7] if 1 < states.shape[:-1].numel() <= MOST else [])
    assert "forward" not in vars(head)


@needs_mkl
def test_gradients_go_through_the_whole_head():
    head, states = torch.nn.Linear(24, 2 * ENTRIES, bias=False), torch.randn(2, 24, requires_grad=True)
    with head_in_parts(model_with(head)):
        head(states).sum().backward()
    assert states.grad.abs().sum() > 0


@pytest.mark.parametrize("head", [
    torch.nn.Linear(8, 2 * ENTRIES), torch.nn.Linear(8, ENTRIES, bias=False),
    torch.nn.Linear(8, 2 * ENTRIES, bias=False, dtype=torch.bfloat16), None], ids=["bias", "small", "bf16", "none"])
def test_another_head_is_left_as_it_is(head):
    with head_in_parts(model_with(head)):
        assert head is None or "forward" not in vars(head)
