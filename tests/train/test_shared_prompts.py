"""Pairs whose prompt goes through the model once: attention, log-probabilities, gradients, and when it is not done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from train.test_attention import Module, tensors
from train.test_preference_loss import gradients, moved
from train.test_summed_loss import small

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train import attention, shared_prompts
from gemma_tune.train.attention import CausalAttention, Span, causal_attention_or, within
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.preference_loss import PreferenceLoss
from gemma_tune.train.shared_prompts import alike, shared_rows, worth_sharing
from gemma_tune.train.summed_loss import install_summed_loss

# Two pairs: prompt of 5, answers of 6 and 4 tokens; no prompt, answers of 3 and 3.
SPANS = [Span(slice(0, 11), (slice(0, 11),)), Span(slice(11, 15), (slice(0, 5), slice(11, 15))),
         Span(slice(15, 18), (slice(15, 18),)), Span(slice(18, 21), (slice(18, 21),))]
PLACES = [*range(11), *range(5, 9), *range(3), *range(3)]
ROWS = [{"ids": [*range(3, 13)], "start": 4}, {"ids": [3, 4, 5, 6, 40, 41], "start": 4},
        {"ids": [9, 8, 7, 6, 5, 4, 3, 30, 31, 32], "start": 7}, {"ids": [9, 8, 7, 6, 5, 4, 3, 30, 31, 33, 34], "start": 7},
        {"ids": [20, 21, 22], "start": 1}, {"ids": [20, 21, 22], "start": 1}]


def row(ids: list[int], start: int) -> dict:
    return {"input_ids": np.array(ids), "labels": np.array([IGNORE_INDEX] * start + ids[start:])}


def reference(q, k, v, window):
    """By PyTorch in float64, with a mask of what each query sees; output, and gradients of its square sum."""
    q, k, v = (t.detach().double().requires_grad_() for t in (q, k, v))
    seen = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
    for queries, pieces in SPANS:
        for place in range(queries.start, queries.stop):
            for piece in pieces:
                for key in range(piece.start, piece.stop):
                    distance = PLACES[place] - PLACES[key]
                    seen[place, key] |= key <= place and 0 <= distance < (window or 99)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=0.3, enable_gqa=True)
    out.square().sum().backward()
    return out.transpose(1, 2), (q.grad, k.grad, v.grad)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 40])
@pytest.mark.parametrize("block", [2, 3, 256])
def test_parts_of_a_row_see_what_they_should(monkeypatch, block, window):
    monkeypatch.setattr(attention, "BLOCK", block)
    inputs = tensors(4, 2, 21)
    out = CausalAttention.apply(*inputs, 0.3, window, SPANS)
    out.square().sum().backward()
    expected, expected_gradients = reference(*inputs, window)
    assert torch.allclose(out, expected, atol=1e-12)
    for tensor, gradient in zip(inputs, expected_gradients):
        assert torch.allclose(tensor.grad, gradient, atol=1e-10)


def test_attention_that_is_more_than_causal_is_refused_within_parts():
    q, k, v = tensors(4, 1, 21)
    wrapped = causal_attention_or(lambda *args, **kwargs: ("theirs", None))
    with within(SPANS), pytest.raises(RuntimeError, match="more than causal"):
        wrapped(Module(), q, k, v, None, softcap=30.0)
    assert wrapped(Module(), q, k, v, None, softcap=30.0)[0] == "theirs"


pieces = st.lists(st.integers(3, 60), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(3, 60), max_size=6), st.lists(pieces, min_size=1, max_size=4)), min_size=1,
                max_size=5), st.integers(1, 30))
def test_rows_hold_every_token_once_and_every_learned_one_for_its_sequence(groups, long):
    rows = [row(prompt + answer, len(prompt)) for prompt, answers in groups for answer in answers]
    sizes = [len(answers) for _, answers in groups]
    before, shared_prompts.LONG = shared_prompts.LONG, long
    try:
        made = [*shared_rows(rows, sizes)]
    finally:
        shared_prompts.LONG = before
    found = {n: [] for n in range(len(rows))}
    for one in made:
        ids, places = one.input_ids[0].tolist(), one.places[0].tolist()
        covered = sorted(place for span in one.spans for place in range(span.queries.start, span.queries.stop))
        assert covered == [*range(len(ids))] == [*range(len(places))]
        context = {}  # of each place, the tokens that it sees
        for queries, keys in one.spans:
            seen = [place for piece in keys for place in range(piece.start, piece.stop)]
            for place in range(queries.start, queries.stop):
                context[place] = [ids[p] for p in seen[:seen.index(place) + 1]]
                assert places[place] == len(context[place]) - 1
        for number, where, target in zip(one.sequence.tolist(), one.positions.tolist(), one.targets.tolist()):
            found[number].append((context[where], target))
    for number, own in enumerate(rows):
        ids, labels = own["input_ids"].tolist(), own["labels"].tolist()
        assert found[number] == [(ids[:n], labels[n]) for n in range(1, len(ids)) if labels[n] != IGNORE_INDEX]
    firsts = [sum(sizes[:n]) for n in range(len(sizes))]
    common = sum(alike(rows[first]["input_ids"], rows[first + n]["input_ids"]) for first, size in zip(firsts, sizes) for n in range(1, size))
    assert sum(one.input_ids.shape[1] for one in made) == sum(len(own["input_ids"]) for own in rows) - common


@pytest.mark.parametrize("kind", ["Gemma3", "Llama", "Qwen2"])
@pytest.mark.parametrize("long", [1, 1024])
def test_losses_and_gradients_are_those_of_sequences_apart(monkeypatch, kind, long):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(shared_prompts, "LONG", long)
    more = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]} if kind == "Gemma3" else {}
    model = small(kind, 64, **more)
    model = moved(get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")))
    install_summed_loss(model.get_base_model())
    rows = [row(**one) for one in ROWS]
    assert worth_sharing(rows, [2] * (len(rows) // 2))
    units = [{"sequences": rows[n:n + 2], "good": [True, False], "reference": [-3.0, -4.0]} for n in range(0, 6, 2)]
    with fast_layers(model):
        found = []
        for shares in (False, True):
            loss = PreferenceLoss(TrainConfig(method="dpo", sft_weight=0.3), torch.device("cpu"), at_once=False)
            loss.shares = shares
            passes = []
            with monkeypatch.context() as patch:
                patch.setattr(loss, "_shared", lambda *args, theirs=loss._shared, passes=passes: passes.append(1) or theirs(*args))
                piece = loss.of(model, units)
            assert bool(passes) == shares
            (piece.compared + 0.1 * piece.imitated).backward()
            found.append((piece.sums, gradients(model)))
    (sums, expected), (shared, got) = found
    assert torch.allclose(shared, sums, rtol=1e-5)
    one, other = (torch.cat([each[name].flatten() for name in expected]) for each in (expected, got))
    assert one.norm() > 0 and (other - one).norm() < 1e-5 * one.norm()


def test_sequences_that_have_nothing_in_common_go_apart():
    assert not worth_sharing([], []) and not worth_sharing([row([3, 4, 5], 1)], [])
    assert not worth_sharing([row([3, *range(10, 40)], 1), row([3, *range(20, 50)], 1)], [2])
    assert worth_sharing([row([3, 4, 5, 6], 2), row([3, 4, 9], 2)], [2])
