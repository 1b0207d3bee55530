"""Losses of a loaded model against plain cross-entropy of its own logits, in batches and one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma_tune.answers.sight import _TAKEN, SEEN, beside, see
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.tokenizer import load_tokenizer
from gemma_tune.measure import likelihood
from gemma_tune.measure.likelihood import batches, negative_log_likelihoods, wanted_of
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from support.gemmas import make_family
from support.seeing import make_picture
from support.towers import make_seer
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


@pytest.mark.parametrize("family", ["mistral3", "gemma4-small", "gemma4-large", "qwen3.5"])
def test_rows_with_pictures_are_predicted_as_by_the_model_that_looks_itself(tmp_path, family):
    """In one batch with a row of text alone, by what was seen before."""
    folder = make_seer(family, tmp_path / "model").folder
    if family.startswith("gemma4"):  # whose random tower knows no more than 40 places to a side
        path = folder / "processor_config.json"
        path.write_text(path.read_text().replace('"max_soft_tokens": 280', '"max_soft_tokens": 70'))
    tokenizer = load_tokenizer(folder)
    eye = eye_of(folder, tokenizer, tmp_path / "pictures")
    names = [Path(make_picture(eye.folder, n)).name for n in range(2)]
    model = load_model(folder, Placement("cpu", torch.float32, "test"), sight="towers").eval()
    data, theirs = [], []
    for own in (names, [], names[:1]):
        text = eye.shown("".join(f"one {eye.place} two" for _ in own) + " three four", own)
        ids = np.array(tokenizer(text, add_special_tokens=False).input_ids)
        labels = np.where(np.arange(len(ids)) >= len(ids) - 3, ids, -100)
        data.append({"input_ids": ids, "labels": labels, "pictures": own})
        shown = [{key: value for key, value in eye.inputs(name).items() if key in _TAKEN} for name in own]
        inputs = {key: torch.cat([one[key] for one in shown]) for key in shown[0]} if own else {}
        marks = {eye.marks: torch.from_numpy(ids == eye.soft_id)[None].long()} if own and eye.marks else {}
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(ids)[None], **inputs, **marks).logits[0, -4:-1]
        theirs.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(ids[-3:]), reduction="sum").item())
    seen = {name: see(model, eye, name) for name in names}
    blind = load_model(folder, Placement("cpu", torch.float32, "test"), sight="features")
    found = negative_log_likelihoods(blind, wanted_of(data), beside=partial(beside, seen, eye))
    assert found == pytest.approx(theirs, rel=1e-4)
    other = {name: {**features, SEEN: -features[SEEN]} for name, features in seen.items()}
    moved = negative_log_likelihoods(blind, wanted_of(data), beside=partial(beside, other, eye)) - found
    assert abs(moved[0]) > 1e-3 < abs(moved[2]) and moved[1] == pytest.approx(0, abs=1e-4)
