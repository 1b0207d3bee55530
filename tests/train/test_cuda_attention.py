"""Attention by whichever kernel is fastest for a shape: which ones count, and what is computed."""

from __future__ import annotations

import pytest
import torch
from train.test_captured import adapted

from gemma_tune.train import cuda_attention as attention
from gemma_tune.train.attention import Span, within
from gemma_tune.train.cuda_attention import CANDIDATES, Kind, Shape, choose, choose_for, fastest_attention_or
from gemma_tune.train.kernels import fast_layers
from support.graphs import install

MILLISECONDS = attention._milliseconds
CPU = torch.device("cpu")
PLAIN = Shape(2, 4, 2, 24, 16, 16, torch.float32, None, CPU)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(attention, "_chosen", {})
    monkeypatch.setattr(attention, "_met", {})
    if not torch.cuda.is_available():
        monkeypatch.setattr(attention, "_milliseconds", lambda run: run() and 1.0)


@pytest.mark.parametrize("window", [None, 7])
def test_a_candidate_counts_if_it_agrees_with_plain_attention(monkeypatch, window):
    right, tried = CANDIDATES["math"], []

    def other(q, k, v, scale, window):
        tried.append("off")
        return right(q, k, v, scale * 1.5, window)

    def missing(*args):
        raise RuntimeError("No available kernel.\nAborting execution.")

    monkeypatch.setattr(attention, "CANDIDATES", {"cudnn": missing, "flash": other, "varlen": other, "math": right})
    found = choose(PLAIN._replace(window=window), 0.25)
    assert found.name == "math" and isinstance(found.measured["math"], float) and tried
    assert found.measured["cudnn"] == "No available kernel." and "off by" in found.measured["varlen" if window else "flash"]
    assert choose(PLAIN._replace(window=window), 0.25) is found, "once for a shape"


def test_slow_candidates_are_not_tried_where_a_fast_one_works(monkeypatch):
    def never(*args):
        raise AssertionError("it was tried")

    monkeypatch.setattr(attention, "CANDIDATES", {"cudnn": CANDIDATES["math"], "flash": CANDIDATES["math"],
                                                  "varlen": never, "efficient": never, "math": never})
    assert set(choose(PLAIN, 0.25).measured) == {"cudnn", "flash"}


@pytest.mark.parametrize(("window", "chosen"), [(7, "math"), (None, "efficient")])
def test_a_candidate_with_a_mask_counts_if_it_can_be_captured(monkeypatch, window, chosen):
    """One that looks at a number is left out, and what PyTorch keeps of its capture with it; the next one is tried."""
    captures, math = install(monkeypatch), CANDIDATES["math"]

    def looks(q, k, v, scale, window):
        return math(q, k, v, scale * float(q.sum().item() < 1e9), window)

    monkeypatch.setattr(attention, "_has_graphs", lambda device: True)
    monkeypatch.setattr(attention, "CANDIDATES", {"efficient": looks, "math": math})
    found = choose(PLAIN._replace(window=window), 0.25)
    assert found.name == chosen
    assert not window or "not permitted when stream is capturing" in found.measured["efficient"]
    torch.cuda.empty_cache()
    assert not captures.underway and not sum(captures.pools.values())


def test_no_candidate_is_no_choice(monkeypatch):
    def broken(*args):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "CANDIDATES", {"cudnn": broken, "math": broken})
    assert choose(PLAIN, 0.25).name is None


@pytest.mark.parametrize(("calling", "waits"), [(0.002, 0.002 * 5 * 1.5), (3.0, 0.2)], ids=["slow kernel", "call that waits"])
def test_a_gpu_is_kept_waiting_for_python_and_never_for_long(monkeypatch, calling, waits):
    """The kernel takes a second; Windows gives up a GPU that computes one for two."""
    now, slept, slow = [0.0], [], [0.0]

    def run():
        now[0] += calling
        slow[0] += 1.0  # of the GPU

    def synchronize():
        now[0] += slow[0]
        slow[0] = 0.0

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = slow[0]

        def synchronize(self):
            synchronize()

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(attention.time, "perf_counter", lambda: now[0])
    for name, double in (("synchronize", synchronize), ("Event", Event), ("_sleep", slept.append)):
        monkeypatch.setattr(torch.cuda, name, double)
    assert MILLISECONDS(run) == pytest.approx(1000)
    assert slept == [pytest.approx(waits * 2e9, abs=1)]


class Module:
    is_causal = True


def inputs(shape: Shape) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape.batch, heads, shape.length, shape.width) for heads in (shape.heads, shape.key_heads, shape.key_heads)]


@pytest.mark.parametrize("window", [None, 7, 99])
def test_layers_that_were_met_attend_by_the_choice_for_their_rows(monkeypatch, window):
    """Chosen at the next power of two, used for the real length; a window that hides nothing is none."""
    asked, served = [], []

    def theirs(module, q, k, v, mask, **kwargs):
        served.append(q.shape)
        return q.transpose(1, 2), None

    def math(q, k, v, scale, window):
        asked.append((q.shape[2], window))
        return CANDIDATES["math"](q, k, v, scale, window)

    monkeypatch.setattr(attention, "CANDIDATES", {"cudnn": math})
    call, (q, k, v) = fastest_attention_or(theirs), inputs(PLAIN)
    mask = attention._window_mask(24, window, CPU) if window and window < 24 else None
    given = {"scaling": 0.25, "sliding_window": window}
    call(Module(), q, k, v, mask, **given)
    assert served == [q.shape], "nothing was chosen yet"
    choose_for(2, 24)
    assert {length for length, _ in asked} == {64}
    out, _ = call(Module(), q, k, v, mask, **given)
    assert len(served) == 1 and asked[-1] == (24, window if mask is not None else None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=0.25, enable_gqa=True)
    assert torch.allclose(out, expected.transpose(1, 2), atol=1e-5)
    assert set(attention._met) == {Kind(4, 2, 16, 16, torch.float32, window, CPU)}


@pytest.mark.parametrize("other", [{"dropout": 0.1}, {"softcap": 5.0}, {"is_causal": False}])
def test_what_means_something_else_is_left_to_transformers(other):
    call = fastest_attention_or(lambda *args, **kwargs: ("theirs", None))
    assert call(Module(), *inputs(PLAIN), None, **other)[0] == "theirs" and not attention._met


def test_parts_of_a_row_that_it_does_not_know_are_refused():
    """The check of whether answers can share their prompt tolerates what bf16 rounds, and a tiny model that hardly attends."""
    call = fastest_attention_or(lambda *args, **kwargs: ("theirs", None))
    with within([Span(slice(0, 24), (slice(0, 24),))]), pytest.raises(RuntimeError, match="cannot share a beginning"):
        call(Module(), *inputs(PLAIN), None)
    assert call(Module(), *inputs(PLAIN), None)[0] == "theirs"


def test_layers_are_those_of_the_model_that_is_trained():
    """Whose kinds of attention need not be what the next model's training can do, such as packing rows."""
    model = adapted("gemma3")
    with fast_layers(model, torch.device("cuda")):
        model(input_ids=torch.ones(1, 12, dtype=torch.long))
        assert {kind.window for kind in attention._met} == {8, None}
    assert not attention._met
