"""What a model sees is computed once and given to it without its towers: the answers are the same."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gemma_tune.answers import sight
from gemma_tune.answers.sight import SEEN, Seen, beside, inputs_beside, see
from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.tokenizer import load_tokenizer
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from support.models import make_seeing
from support.towers import make_seer

FAMILIES = ("gemma3", "qwen3.5", "mistral3", "gemma4-small", "gemma4-large")
_OF_PICTURES = ("pixel_values", "image_position_ids", "image_sizes", "image_grid_thw")


@pytest.fixture(scope="session")
def seers(tmp_path_factory):
    """Random models by family, made when they are asked for."""
    @functools.cache
    def of(name: str) -> Path:
        folder = tmp_path_factory.mktemp("seers") / name
        if name == "gemma3":
            make_seeing(folder)
        else:
            make_seer(name, folder)
        if name.startswith("gemma4"):  # whose random tower knows no more than 40 places to a side
            path = folder / "processor_config.json"
            path.write_text(path.read_text().replace('"max_soft_tokens": 280', '"max_soft_tokens": 70'))
        return folder

    return of


@pytest.fixture
def pictures(tmp_path) -> Path:
    noise = np.random.default_rng(0)
    for n, (width, height) in enumerate(((60, 44), (30, 62), (48, 48))):
        Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    return tmp_path


def ids_of(tokenizer, eye, names: list[str]) -> torch.Tensor:
    text = eye.shown("".join(f"one {eye.place} two" for _ in names), names)
    return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_to_the_picture_itself(seers, pictures, family):
    folder = seers(family)
    tokenizer = load_tokenizer(folder)
    eye = eye_of(folder, tokenizer, pictures)
    placement = choose_placement("fp32")
    model = load_model(folder, placement, sight="towers").eval()
    features = see(model, eye, "0.png")
    ids = ids_of(tokenizer, eye, ["0.png"])
    marks = {eye.marks: (ids == eye.soft_id).long()} if eye.marks else {}
    with torch.no_grad():
        shown = {key: value for key, value in eye.inputs("0.png").items() if key in _OF_PICTURES}
        theirs = model(input_ids=ids, **marks, **shown).logits
        blank = model(input_ids=ids, **inputs_beside(eye, ids, [{**features, SEEN: features[SEEN] * 0}])).logits
        assert not torch.allclose(theirs, blank, atol=1e-2), "the picture matters"
        blind = load_model(folder, placement, sight="features").eval()
        for other in (model, blind):
            assert torch.equal(other(input_ids=ids, **inputs_beside(eye, ids, [features])).logits, theirs)
    assert sum(p.numel() for p in blind.parameters()) < sum(
        p.numel() for p in load_model(folder, placement, sight="towers").parameters())


def test_rows_of_several_pictures(seers, pictures):
    """In a batch, whose rows have two, one and no picture, each row is as alone."""
    folder = seers("gemma3")
    tokenizer, placement = load_tokenizer(folder), choose_placement("fp32")
    eye = eye_of(folder, tokenizer, pictures)
    seen = Seen(pictures / "seen", eye, "fingerprint", "float32")
    names = [["0.png", "1.png"], ["2.png"], []]
    assert seen.lacks(["0.png", "1.png", "2.png"]) == ["0.png", "1.png", "2.png"]
    towers = load_model(folder, placement, sight="towers").eval()
    for n, name in enumerate(("0.png", "1.png", "2.png"), start=1):
        seen.look(towers, name)
        assert seen.lacks(["0.png", "1.png", "2.png"]) == ["0.png", "1.png", "2.png"][n:]
    model = load_model(folder, placement, sight="features").eval()
    rows = [ids_of(tokenizer, eye, row) if row else torch.tensor([tokenizer("no picture").input_ids]) for row in names]
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (0, length - row.shape[1])) for row in rows])
    with torch.no_grad():
        together = model(input_ids=ids, **beside(seen, eye, ids, names)).logits
        for n, row in enumerate(rows):
            alone = model(input_ids=row, **beside(seen, eye, row, names[n:n + 1])).logits
            torch.testing.assert_close(together[n, :row.shape[1]], alone[0], rtol=1e-4, atol=1e-4)


def test_features_that_do_not_fit_are_refused(seers, pictures):
    folder = seers("gemma3")
    tokenizer = load_tokenizer(folder)
    eye = eye_of(folder, tokenizer, pictures)
    ids = ids_of(tokenizer, eye, ["0.png", "1.png"])
    with pytest.raises(ValueError, match="8 tokens stand for pictures with 4 features"):
        inputs_beside(eye, ids, [{SEEN: torch.zeros(4, 64)}])


def test_other_settings_are_other_features(seers, pictures, tmp_path, monkeypatch):
    import shutil

    folder = shutil.copytree(seers("gemma3"), tmp_path / "copy")
    eye = eye_of(folder, load_tokenizer(folder), pictures)
    first = Seen(tmp_path, eye, "a", "float32").folder
    assert first != Seen(tmp_path, eye, "b", "float32").folder != Seen(tmp_path, eye, "b", "bfloat16").folder
    with monkeypatch.context() as newer:
        newer.setattr(sight, "library_versions", lambda: {"transformers": "99.0"})
        assert Seen(tmp_path, eye, "a", "float32").folder != first
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.25] * 3}))
    assert Seen(tmp_path, eye, "a", "float32").folder != first
