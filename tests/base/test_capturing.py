"""Captures that do not come to their end, with the double of CUDA graphs and on a GPU."""

from __future__ import annotations

import contextlib

import pytest
import torch

from gemma_tune.base.capturing import capturing, is_closed
from support.graphs import install


def looks() -> None:
    torch.ones(3).sum().item()


def reads() -> None:
    torch.ones(3).tolist()


def lacks_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def is_interrupted() -> None:
    torch.ones(3).add_(1)
    raise KeyboardInterrupt


@pytest.mark.parametrize(("wrong", "error", "said"), [(looks, RuntimeError, "not permitted when stream is capturing"),
                                                      (reads, RuntimeError, "not permitted when stream is capturing"),
                                                      (lacks_memory, torch.OutOfMemoryError, "out of memory"),
                                                      (is_interrupted, KeyboardInterrupt, "")])
def test_nothing_is_left_and_the_first_reason_is_told(monkeypatch, wrong, error, said):
    captures, pool = install(monkeypatch), torch.cuda.graph_pool_handle()
    x = torch.zeros(2)
    with capturing(pool) as kept:
        x += 1
    for own in (None, pool):
        with pytest.raises(error, match=said), capturing(own):
            wrong()
        torch.cuda.empty_cache()
        assert not captures.underway and {p: n for p, n in captures.pools.items() if n} == {pool: 1}
    kept.replay()
    assert x.tolist() == [1, 1]
    assert is_closed(pool) == (wrong in (looks, reads)), "by CUDA, and not where it is Python that ends it"
    with pytest.raises(RuntimeError, match="already recording") if is_closed(pool) else contextlib.nullcontext(), capturing(pool):
        x += 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_capture_that_cuda_breaks_off_gives_its_memory_back():
    torch.cuda.empty_cache()
    before, y = torch.cuda.memory_reserved(), torch.zeros(4, device="cuda")
    for _ in range(3):
        with pytest.raises(RuntimeError), capturing():
            x = torch.ones(64 << 20, device="cuda")
            x.sum().item()
        del x
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() < before + (64 << 20), "of 256 MB that were taken"
    with capturing() as graph:
        y += torch.rand(4, device="cuda") + 1
    graph.replay()
    assert (y >= 1).all() and torch.rand(3, device="cuda").isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_pool_that_is_closed_keeps_its_graphs_and_another_takes_more():
    y, pool = torch.zeros(4, device="cuda"), torch.cuda.graph_pool_handle()
    with capturing(pool) as kept:
        y += 1
    with pytest.raises(RuntimeError), capturing(pool):
        torch.ones(4, device="cuda").sum().item()
    assert is_closed(pool)
    with capturing(torch.cuda.graph_pool_handle()) as other:
        y += 1
    for graph in (kept, other, kept):
        graph.replay()
    assert y.tolist() == [3.0] * 4
