"""Losses of a loaded model against plain cross-entropy of its own logits, in batches and one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma_tune.base.errors import UserError
from gemma_tune.measure import likelihood
from gemma_tune.measure.likelihood import batches, negative_log_likelihoods, wanted_of
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.gemmas import make_family
from support.training import plain_loss


def rows(vocabulary: int, lengths=(30, 7, 19, 30, 3)) -> list[dict]:
    random = np.random.default_rng(4)
    found = []
    for length in lengths:
        ids = random.integers(3, vocabulary, length)
        labels = np.where(np.arange(length) >= length // 2, ids, -100)
        found.append({"input_ids": ids, "labels": labels})
    return found


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny, Placement("cpu", torch.float32, "test")).eval()


def expected(model, data) -> list[float]:
    return [plain_loss(model, [(row["input_ids"].tolist(), row["labels"].tolist())])[0] for row in data]


@pytest.mark.parametrize("tokens", [1, 40, 4096])
def test_batches_give_what_each_row_gives_by_itself(model, monkeypatch, tokens):
    monkeypatch.setattr(likelihood, "_TOKENS", tokens)
    monkeypatch.setattr(likelihood, "_LOGITS", 5 * model.config.vocab_size)  # five positions at a time
    data = rows(model.config.vocab_size)
    seen: list[int] = []
    found = negative_log_likelihoods(model, wanted_of(data), seen.append)
    assert found == pytest.approx(expected(model, data), rel=1e-4)
    assert seen[-1] == sum(wanted.ids.shape[1] for wanted in wanted_of(data)) and seen == sorted(seen)


def test_nothing_wanted_is_nothing(model):
    assert negative_log_likelihoods(model, []).shape == (0,)


@pytest.mark.parametrize("through_head", [True, False])
def test_what_is_not_finite_is_no_loss(tiny, monkeypatch, through_head):
    """A manifest that holds it could not be read again; of plain texts no answer is made that would tell."""
    model = load_model(tiny, Placement("cpu", torch.float32, "test")).eval()
    monkeypatch.setattr(likelihood, "_head_is_all", lambda *_: through_head)
    next(p for name, p in model.named_parameters() if "down_proj" in name).data[0, 0] = float("inf")
    with pytest.raises(UserError, match="the base model holds infinities or no numbers"):
        negative_log_likelihoods(model, wanted_of(rows(model.config.vocab_size)))


@pytest.mark.parametrize("family", ["gemma2"])
def test_capped_logits_are_those_that_the_model_makes(tmp_path, family):
    make_family(family, checkpoint := tmp_path / family)
    model = load_model(checkpoint, Placement("cpu", torch.float32, "test")).eval()
    data = rows(model.config.get_text_config().vocab_size)
    assert negative_log_likelihoods(model, wanted_of(data)) == pytest.approx(expected(model, data), rel=1e-4)


def test_a_head_that_does_more_than_is_known_is_asked_as_a_whole(model, monkeypatch):
    plain = likelihood.logits_of
    monkeypatch.setattr(likelihood, "logits_of", lambda model, states: plain(model, states) * 3)
    data = rows(model.config.vocab_size)
    assert negative_log_likelihoods(model, wanted_of(data)) == pytest.approx(expected(model, data), rel=1e-4)


def test_sequences_of_similar_length_go_together_the_longest_first():
    lengths = [5, 30, 7, 28, 6, 100]
    found = batches(lengths, 60)
    assert found == [[5], [1, 3], [2, 4, 0]]
    assert sorted(n for batch in found for n in batch) == list(range(6))
