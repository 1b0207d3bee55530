"""Gemma 3n's sparse layers: what transformers computes, without a number that a GPU is sent."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from gemma_tune.models.cutoffs import with_cutoffs
from support.another_device import computing_there, there
from support.gemmas import FAMILIES


def sparse_layers(model) -> list:
    return [module for module in model.modules() if getattr(module, "activation_sparsity", 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_cut_off_and_its_gradient_are_theirs(dtype):
    model = with_cutoffs(FAMILIES["gemma3n"](99))
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layer in sparse_layers(model):
        found = []
        for function in (layer._gaussian_topk, partial(type(layer)._gaussian_topk, layer)):
            given = x.clone().requires_grad_()
            function(given).square().sum().backward()
            found.append((function(x), given.grad))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found)) and 0 < found[0][0].count_nonzero() < x.numel() / 4


def test_nothing_is_made_on_the_cpu():
    layer = sparse_layers(FAMILIES["gemma3n"](99))[0]
    found = []
    for change in (lambda layer: layer, with_cutoffs):
        changed = change(layer)
        with computing_there() as operations:
            changed._gaussian_topk(there((3, 16)))
        found.append(operations.elsewhere)
    assert found == [["tensor"], []]


def test_a_layer_that_cuts_off_elsewhere_is_left_alone(monkeypatch):
    layer = sparse_layers(FAMILIES["gemma3n"](99))[0]
    monkeypatch.setattr(type(layer), "_gaussian_topk", lambda self, x: x - x.mean(-1, keepdim=True))
    assert "_gaussian_topk" not in vars(with_cutoffs(layer))
