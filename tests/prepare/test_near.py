"""Near-duplicates: signatures against the exact Jaccard index, the index against comparing everything."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.prepare import near
from gemma_tune.prepare.near import CHAIN, SIZE, NearIndex, signature, similarity

WORDS = [f"word{n}" for n in range(5000)]


def alike(a: str, b: str) -> float:
    return float(similarity(signature([a]), signature([b])))


def text_pair(jaccard: float, size: int, rng: random.Random) -> tuple[str, str, float]:
    """Two texts of which about so many word triples are shared, and the exact index of their triples."""
    words = [rng.choice(WORDS) for _ in range(size)]
    other = list(words)
    changes = round(size * (1 - jaccard) / (1 + jaccard) / 3)
    for n in rng.sample(range(0, size, 3), min(changes, len(range(0, size, 3)))):
        other[n] = rng.choice(WORDS)
    triples = [{tuple(w[n:n + 3]) for n in range(len(w) - 2)} for w in (words, other)]
    return " ".join(words), " ".join(other), len(triples[0] & triples[1]) / len(triples[0] | triples[1])


@pytest.mark.parametrize("jaccard", [0.5, 0.7, 0.85, 0.95])
def test_the_estimate_is_the_jaccard_index_of_word_triples(jaccard):
    rng = random.Random(1)
    errors = []
    for _ in range(60):
        a, b, exact = text_pair(jaccard, 200, rng)
        errors.append(alike(a, b) - exact)
    assert abs(np.mean(errors)) < 0.02  # not biased
    assert np.std(errors) < 1.5 * np.sqrt(jaccard * (1 - jaccard) / SIZE)


def test_unrelated_texts_are_not_alike():
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=100)) for _ in range(40)]
    signatures = np.stack([signature([t]) for t in texts])
    values = similarity(signatures[:, None], signatures)[~np.eye(40, dtype=bool)]
    assert values.max() < 0.1 and 0 < values.mean() < 0.02  # one byte in 256 agrees by chance


def test_case_punctuation_and_white_space_make_no_difference():
    assert alike("What is a bond? It pays interest.", "what is  a bond\nIt pays: interest!") == 1
    assert alike("What is a bond?", "What is a stock?") < 1


def test_each_character_of_chinese_and_japanese_is_a_word():
    a = "债券是一种有价证券，是社会各类经济主体为筹集资金而向债券投资者出具的、承诺按一定利率定期支付利息的凭证。"
    assert 0.6 < alike(a, a.replace("社会", "国家")) < 1
    assert alike(a, "今日はとても良い天気ですから、公園へ散歩に行きませんか。") < 0.1
    assert alike("東京タワーへ行きました", "東京タワーへ行きます") > 0.3


@pytest.mark.parametrize("text", ["", "?!", "yes", "thank you", "😀", "\ud800"])
def test_texts_of_a_word_or_less_are_only_like_themselves(text):
    others = ["", "?!", "yes", "thank you", "😀", "\ud800", "no", "thank them"]
    assert [t for t in others if alike(t, text) > 0.5] == [text]


def test_different_words_are_never_alike():
    signatures = np.stack([signature([word]) for word in WORDS[:600]])
    values = similarity(signatures[:, None], signatures)[~np.eye(600, dtype=bool)]
    assert values.max() < 0.2


def test_short_texts_count_beside_long_ones():
    long = " ".join(WORDS[:8])
    assert similarity(signature([long, "yes"]), signature([long, "no"])) < 1


def test_signatures_are_the_same_in_every_process():
    code = "from gemma_tune.prepare.near import signature; print(signature(['What is a bond?', '债券']).tobytes().hex())"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = signature(["What is a bond?", "债券"])
    assert ours.dtype == np.uint8 and ours.shape == (SIZE,)
    assert theirs.stdout.strip() == ours.tobytes().hex()


def test_a_long_text_is_worked_on_in_parts(monkeypatch):
    text = " ".join(WORDS)
    whole = signature([text])
    monkeypatch.setattr(near, "_PART", 2000)
    assert similarity(signature([text]), whole) > 0.95  # but for the triples at the cuts


def test_the_memory_of_words_is_bounded(monkeypatch):
    monkeypatch.setattr(near, "_hashes", near._WordHashes())
    monkeypatch.setattr(near._WordHashes, "most", 100)
    first = signature([" ".join(WORDS[:1000])])
    assert len(near._hashes) <= 100
    assert np.array_equal(first, signature([" ".join(WORDS[:1000])]))


# --- the index

def compared(signatures: np.ndarray, threshold: float) -> list[int]:
    """For each row the first earlier kept one that is similar enough, else -1: by comparing all."""
    kept: list[int] = []
    result = []
    for n, one in enumerate(signatures):
        found = next((k for k in kept if similarity(one, signatures[k]) >= threshold), -1)
        result.append(found)
        if found < 0:
            kept.append(n)
    return result


def variants(rng: np.random.Generator, rows: int, origins: int, changed: int) -> np.ndarray:
    """Signatures that differ from a few origins in up to ``changed`` bytes, as those of similar texts do."""
    base = rng.integers(0, 256, (origins, SIZE), dtype=np.uint8)
    result = base[rng.integers(0, origins, rows)]
    for row in result:
        at = rng.choice(SIZE, rng.integers(0, changed + 1), replace=False)
        row[at] = rng.integers(0, 256, len(at))
    return result


@given(st.integers(0, 2**32), st.sampled_from([0.76, 0.8, 0.85, 0.9, 0.99, 1.0]), st.integers(1, 150), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_the_index_finds_what_comparing_everything_finds(seed, threshold, rows, origins):
    signatures = variants(np.random.default_rng(seed), rows, origins, 40)
    index = NearIndex(threshold)
    found = index.earlier(np.arange(rows), signatures)
    assert found.tolist() == compared(signatures, threshold)
    assert len(index) == (found < 0).sum()


def one(index: NearIndex, key: int, signature: np.ndarray) -> int:
    """A block of one."""
    return int(index.earlier(np.array([key]), signature[np.newaxis])[0])


@given(st.integers(0, 2**32), st.lists(st.integers(1, 90), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_blocks_of_any_size_give_the_same(seed, sizes):
    signatures = variants(np.random.default_rng(seed), sum(sizes), 8, 30)
    keys = np.arange(sum(sizes)) + 1000
    expected = NearIndex(0.85).earlier(keys, signatures)
    index, at, found = NearIndex(0.85), 0, []
    for size in sizes:
        found += index.earlier(keys[at:at + size], signatures[at:at + size]).tolist()
        at += size
    assert found == expected.tolist()
    single = NearIndex(0.85)
    assert [one(single, int(k), s) for k, s in zip(keys, signatures)] == found


@pytest.mark.parametrize("threshold", [0.76, 0.8, 0.85, 0.9, 0.95])
def test_a_pair_that_is_just_similar_enough_is_found_wherever_it_differs(threshold):
    index = NearIndex(threshold)
    origin = np.zeros(SIZE, dtype=np.uint8)
    other = origin.copy()
    differing = SIZE - int(np.ceil(threshold * SIZE))
    other[:differing * index._width:index._width] = 1  # one byte in each of as many bands
    assert other.sum() == differing
    assert [one(index, 0, origin), one(index, 1, other)] == [-1, 0]


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7])
def test_low_thresholds_miss_few(threshold):
    rng = np.random.default_rng(3)
    mismatches = round(SIZE * (1 - threshold)) - 6
    pairs = rng.integers(0, 256, (400, SIZE), dtype=np.uint8)
    index = NearIndex(threshold)
    assert (index.earlier(np.arange(400), pairs) == -1).all()
    for row in pairs:
        at = rng.choice(SIZE, mismatches, replace=False)
        row[at] += 1
    found = index.earlier(np.arange(400, 800), pairs)
    assert set(found[found >= 0] - np.flatnonzero(found >= 0)) == {0}  # each finds its own origin
    assert (found >= 0).mean() > 0.9


def test_the_index_grows_and_forgets_nothing():
    rng = np.random.default_rng(4)
    rows = rng.integers(0, 256, (5000, SIZE), dtype=np.uint8)
    index = NearIndex(0.85)
    assert (index.earlier(np.arange(5000), rows) == -1).all() and len(index) == 5000
    again = rows.copy()
    again[:, ::8] ^= 1  # 16 of 128 bytes, one at least in most bands
    assert index.earlier(np.arange(5000, 10_000), again).tolist() == list(range(5000))


def test_a_row_like_a_dropped_one_alone_is_kept():
    a = np.zeros(SIZE, dtype=np.uint8)
    b, c = a.copy(), a.copy()
    b[:12] = 1
    c[:24] = 1
    index = NearIndex(0.85)
    assert [one(index, n, s) for n, s in enumerate((a, b, c))] == [-1, 0, -1]


def test_very_many_rows_with_an_equal_band_stay_affordable():
    rng = np.random.default_rng(5)
    rows = rng.integers(0, 256, (3 * CHAIN, SIZE), dtype=np.uint8)
    rows[:, :6] = 7  # the first band at 0.85
    index = NearIndex(0.85)
    assert (index.earlier(np.arange(len(rows)), rows) == -1).all()
    assert index.earlier(np.array([999]), rows[:1]).tolist() == [0]  # by its other bands


def test_the_index_takes_half_a_kilobyte_for_a_row():
    index = NearIndex(0.85)
    index.earlier(np.arange(20_000), np.random.default_rng(6).integers(0, 256, (20_000, SIZE), dtype=np.uint8))
    taken = sum(v.nbytes for v in vars(index).values() if isinstance(v, np.ndarray))
    assert taken / len(index) < 1024  # up to twice what it says after growing


def test_importing_it_does_not_load_datasketch():
    code = "import sys, gemma_tune.prepare.near; sys.exit('datasketch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
