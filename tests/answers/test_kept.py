"""Keys and values kept between turns: the logits are those of a prompt that is read from its beginning."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from gemma_tune.answers import kept as module
from gemma_tune.answers.kept import KeptTurns
from gemma_tune.answers.stream import Stream
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.models import make_model

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
WINDOW = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Layers of both kinds, whose window is much shorter than the conversations here."""
    return make_model(tmp_path_factory.mktemp("models") / "windowed", tie_word_embeddings=False, sliding_window=WINDOW,
                      num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)


@pytest.fixture(scope="module")
def model(checkpoint):
    """In fp64, so that what remains is the order of sums and no other difference."""
    return load_model(checkpoint, Placement("cpu", torch.float64, "test")).eval()


@pytest.fixture(scope="module")
def chat(checkpoint):
    return load_format(checkpoint, "gemma3_text")


def read(model, kept: KeptTurns, ids: list[int], after: int = 3) -> torch.Tensor:
    """Logits (1 + after, vocabulary) of a prompt's end and of greedy steps after it, through the kept cache."""
    with torch.inference_mode():
        cache = kept.cache_for(model, ids)
        rows, written = [], list(ids)
        unread = written[kept.reused:]
        for _ in range(1 + after):
            rows.append(model(input_ids=torch.tensor([unread]), past_key_values=cache, use_cache=True).logits[0, -1])
            unread = [int(rows[-1].argmax())]
            written += unread
        kept.keep(cache, written)
    return torch.stack(rows)


def anew(model, ids: list[int], after: int = 3) -> torch.Tensor:
    """The same logits without any cache."""
    with torch.inference_mode():
        rows, written = [], list(ids)
        for _ in range(1 + after):
            rows.append(model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1])
            written.append(int(rows[-1].argmax()))
    return torch.stack(rows)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=0, atol=1e-10)


def test_turns_cuts_and_changes_give_the_logits_of_a_prompt_read_anew(model):
    draw = random.Random(0)
    kept, ids = KeptTurns(), [draw.randrange(5, 400) for _ in range(3)]
    reused = 0
    for _ in range(60):
        kind = draw.choice(["longer", "longer", "cut", "changed", "same"])
        if kind == "cut":
            ids = ids[:draw.randrange(1, len(ids) + 1)]
        elif kind == "changed":
            place = draw.randrange(len(ids))
            ids = [*ids[:place], draw.randrange(5, 400), *ids[place + 1:]]
        if kind != "same":
            ids = ids + [draw.randrange(5, 400) for _ in range(draw.choice([1, 2, WINDOW, 3 * WINDOW]))]
        assert same(read(model, kept, ids), anew(model, ids)), kind
        assert kept.reused < len(ids), "the logits of the last token are computed"
        reused += kept.reused
    assert len(ids) > 5 * WINDOW and reused > 1000


def test_a_cut_in_a_window_that_has_slid_is_exact_where_a_plain_cache_refuses_it(model):
    from transformers.cache_utils import DynamicCache

    ids = list(range(10, 60))
    with torch.inference_mode():
        plain = DynamicCache(config=model.config)
        model(input_ids=torch.tensor([ids]), past_key_values=plain, use_cache=True)
        with pytest.raises(RuntimeError, match="sliding"):
            plain.crop(-20)
    kept = KeptTurns()
    read(model, kept, ids)
    assert same(read(model, kept, [*ids[:30], 7]), anew(model, [*ids[:30], 7]))
    assert kept.reused == 30


def test_a_cut_further_back_than_what_is_kept_reads_anew(model, monkeypatch):
    monkeypatch.setattr(module, "PAST", 4)
    monkeypatch.setattr(module, "_GROWTH", 1)
    kept, ids = KeptTurns(), list(range(10, 90))
    for end in range(20, 80, 6):  # several times, so that what lies far back is dropped
        read(model, kept, ids[:end])
    assert same(read(model, kept, [*ids[:12], 7]), anew(model, [*ids[:12], 7]))
    assert kept.reused == 0
    assert same(read(model, kept, [*ids[:12], 7, 8]), anew(model, [*ids[:12], 7, 8]))
    assert kept.reused == 13, "and goes on from there"


class Noted:
    """Of an event of Apple's GPU what `generate` uses."""

    def __init__(self, **kwargs):
        pass

    def record(self):
        pass

    synchronize = record


@pytest.mark.parametrize("prompt", [3, 30])  # shorter than the window and longer
def test_a_step_too_many_as_on_apples_gpu_leaves_nothing_behind(model, monkeypatch, prompt):
    """There `generate` looks for the end of an answer a step late, and takes that step back."""
    from transformers.generation import utils

    draw = random.Random(2)
    ids = [draw.randrange(5, 400) for _ in range(prompt)]
    stop = int(anew(model, ids)[2].argmax())
    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(lambda device, cache, *_, **__: cache.is_croppable))
    monkeypatch.setattr(torch, "Event", Noted)
    steps, kept = [], KeptTurns()
    with torch.inference_mode():
        cache = kept.cache_for(model, ids)
        hook = model.register_forward_hook(lambda *_: steps.append(1))
        written = model.generate(input_ids=torch.tensor([ids]), past_key_values=cache, max_new_tokens=20, eos_token_id=stop,
                                 pad_token_id=0, **GREEDY)[0].tolist()
        hook.remove()
    kept.keep(cache, written)
    assert written[-1] == stop and len(steps) == len(written) - prompt + 1, "a step more than tokens"
    longer = [*written, 7, 8, 9]
    assert same(read(model, kept, longer), anew(model, longer))
    assert kept.reused == len(written) - 1


def test_the_window_keeps_no_more_than_it_may(model, monkeypatch):
    monkeypatch.setattr(module, "PAST", 16)
    kept, ids = KeptTurns(), [random.Random(1).randrange(5, 400) for _ in range(900)]
    for end in range(10, 900, 10):
        read(model, kept, ids[:end], after=0)
    sliding, full = kept._cache.layers[:2]
    assert full.keys.shape[-2] == 890 and sliding.cumulative_length == 890
    assert sliding._buffers.keys.shape[-2] < 400
    assert same(read(model, kept, ids), anew(model, ids))


def test_a_stream_reads_only_what_is_new(model, chat):
    kept = KeptTurns()
    messages = [{"role": "user", "content": "seven wizards box quietly " * 3}]
    for _ in range(4):
        stream = Stream(model, chat, messages, 12, GREEDY, kept=kept)
        assert "".join(stream) == "".join(Stream(model, chat, messages, 12, GREEDY)) == stream.finish().text
        messages = [*messages, {"role": "assistant", "content": stream.finish().text},
                    {"role": "user", "content": "Say fox."}]
    assert stream.prompt_tokens > 100 and kept.reused > stream.prompt_tokens / 2
    assert 0 < stream.first <= stream.seconds


def test_what_failed_is_not_gone_on_from(model, chat, monkeypatch):
    kept = KeptTurns()
    Stream(model, chat, [{"role": "user", "content": "a"}], 5, GREEDY, kept=kept).finish()
    assert kept.ids
    with monkeypatch.context() as patched:
        patched.setattr(model, "generate", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            Stream(model, chat, [{"role": "user", "content": "a"}], 5, GREEDY, kept=kept).finish()
    assert not kept.ids
    question = [{"role": "user", "content": "b"}]
    assert (Stream(model, chat, question, 5, GREEDY, kept=kept).finish()
            == Stream(model, chat, question, 5, GREEDY).finish())


@pytest.mark.parametrize("kinds", [["full_attention", "linear_attention"], ["chunked_attention"] * 2])
def test_layers_that_cannot_be_cut_are_left_to_generate(model, kinds):
    config = model.config.__class__(**{**model.config.to_dict(), "num_hidden_layers": 2, "layer_types": None})
    config.layer_types, config.attention_chunk_size = kinds, 8

    other = SimpleNamespace(config=config, generation_config=model.generation_config,
                            _supports_default_dynamic_cache=lambda: True)
    assert KeptTurns().cache_for(other, [1, 2, 3]) is None
    other.config = model.config
    assert KeptTurns().cache_for(other, [1, 2, 3]) is not None
    other._supports_default_dynamic_cache = lambda: False
    assert KeptTurns().cache_for(other, [1, 2, 3]) is None
