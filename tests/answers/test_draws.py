"""Tokens that are drawn by given numbers: the same in every batch and on both ways, and as often as the model says."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from gemma_tune.answers import decoders, decoding
from gemma_tune.answers.draws import drawn_tokens
from gemma_tune.answers.generation import answer_of, greedy_continuations
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement

PROMPTS = [list(range(40, 75)), [50, 61, 72], list(range(90, 102)), [50, 61, 72]]
MOST = 12


@pytest.fixture
def model(talkative):
    return load_model(talkative, Placement("cpu", torch.float32, "test")).eval()


@pytest.fixture(scope="module")
def chat(talkative):
    return load_format(talkative, "gemma3_text")


@pytest.fixture(params=["generate", "loop"])
def way(request, monkeypatch):
    """As on a CPU, or the loop that a GPU takes, without capture."""
    if request.param == "loop":
        monkeypatch.setattr(decoding, "pays", lambda model: model not in decoders._given_up and not decoding.unknown(model))
    return request.param


def numbers(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((rows, MOST)))


def by_hand(model, chat, prompt: list[int], own: torch.Tensor, temperature: float = 1.0) -> list[int]:
    """Token by token, from the probabilities of the whole sequence."""
    ids = list(prompt)
    for number in own:
        with torch.no_grad():
            sums = model(torch.tensor([ids])).logits[0, -1].double().div(temperature).softmax(-1).cumsum(-1)
        ids.append(int((sums <= number * sums[-1]).sum()))
        if ids[-1] in chat.stop_ids:
            break
    return ids[len(prompt):]


def test_tokens_are_those_that_the_numbers_mean_whatever_else_is_in_the_batch(model, chat, way, monkeypatch):
    given, read, theirs = numbers(len(PROMPTS)), [], model.forward

    def forward(input_ids=None, **more):
        read.extend([len(input_ids)] if input_ids.shape[1] > 1 else [])
        return theirs(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "forward", functools.wraps(theirs)(forward))
    together = drawn_tokens(model, chat, PROMPTS, given, MOST)
    assert read == [3 if way == "generate" else 4], "the prompt that is there twice is read once"
    assert together == [by_hand(model, chat, prompt, own) for prompt, own in zip(PROMPTS, given)]
    assert together[1] != together[3], "the same prompt with other numbers"
    for row in (0, 3):
        assert drawn_tokens(model, chat, [PROMPTS[row]], given[row:row + 1], MOST) == [together[row]]
    assert model not in decoders._given_up


def test_a_temperature_makes_them_likelier_or_less_likely(model, chat, way):
    given, greedy = numbers(len(PROMPTS)), drawn_tokens(model, chat, PROMPTS, None, MOST)
    plain = drawn_tokens(model, chat, PROMPTS, given, MOST)
    for temperature in (0.5, 2.0):
        drawn = drawn_tokens(model, chat, PROMPTS, given, MOST, temperature)
        assert drawn != plain and drawn == [by_hand(model, chat, prompt, own, temperature) for prompt, own in zip(PROMPTS, given)]
    assert drawn_tokens(model, chat, PROMPTS, given, MOST, 1e-4) == greedy == drawn_tokens(model, chat, PROMPTS, None, MOST, 2.0)


def test_an_answer_has_the_token_that_ends_it_and_nothing_behind(model, chat, way, monkeypatch):
    given = numbers(4, seed=1)
    free = drawn_tokens(model, chat, PROMPTS, given, MOST)
    assert all(len(ids) == MOST for ids in free)
    monkeypatch.setattr(type(chat), "stop_ids", property(lambda self: [free[0][4]]))
    stopped = drawn_tokens(model, chat, PROMPTS, given, MOST)
    assert stopped[0] == free[0][:free[0].index(free[0][4]) + 1]
    for cut, whole in zip(stopped, free):
        assert cut == whole[:len(cut)] and free[0][4] not in cut[:-1]


def test_the_model_s_own_settings_take_no_part(model, chat, way):
    given = numbers(4, seed=2)
    plain = drawn_tokens(model, chat, PROMPTS, given, MOST)
    theirs = model.generation_config
    theirs.update(repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True, no_repeat_ngram_size=1, suppress_tokens=[plain[0][0]])
    assert drawn_tokens(model, chat, PROMPTS, given, MOST) == plain
    assert model.generation_config is theirs


def test_each_token_comes_as_often_as_the_model_says(model, chat):
    rows, prompt = 3000, [50, 61, 72]
    given = torch.from_numpy(np.random.default_rng(3).random((rows, 1)))
    found = np.bincount([ids[0] for ids in drawn_tokens(model, chat, [prompt] * rows, given, 1)], minlength=model.config.vocab_size)
    with torch.no_grad():
        expected = rows * model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    often = expected >= 5
    assert often.sum() > 5 and not found[expected < 1e-9].any()
    assert (np.abs(found - expected)[often] < 5 * np.sqrt(expected[often])).all()


def test_without_numbers_it_is_the_likeliest(model, chat, way):
    found = drawn_tokens(model, chat, PROMPTS, None, MOST)
    said = greedy_continuations(model, chat, PROMPTS, MOST)
    assert [len(ids) for ids in found] == [answer.tokens for answer in said]
    assert [answer_of(chat, ids).text for ids in found] == [answer.text for answer in said]


def test_weights_that_changed_are_read_anew(model, chat, way):
    """A single prompt's keys are known from the last answer elsewhere; here they are those of other weights."""
    first = drawn_tokens(model, chat, PROMPTS[:1], None, MOST)
    with torch.no_grad():
        for weight in model.get_decoder().layers.parameters():
            weight.mul_(-0.7)
    changed = drawn_tokens(model, chat, PROMPTS[:1], None, MOST)
    decoders.forget(model)
    assert changed == drawn_tokens(model, chat, PROMPTS[:1], None, MOST) != first
