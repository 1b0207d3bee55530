"""The figures of the data, compared with counting position by position."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.base.words import opening
from gemma_tune.prepare import statistics
from gemma_tune.prepare.scripts import SCRIPTS, script_of
from gemma_tune.prepare.statistics import Cut, Measured, Statistics

Row = list[tuple[int, list[tuple[int, int]]]]  # sequences: length and learned ranges


@st.composite
def sequences(draw) -> tuple[int, list[tuple[int, int]]]:
    length = draw(st.integers(1, 300))
    edges = sorted(draw(st.sets(st.integers(0, length), min_size=2, max_size=6)))
    return length, list(zip(edges[::2], edges[1::2]))


ROWS = st.lists(st.lists(sequences(), min_size=1, max_size=3), min_size=1, max_size=25)


def measured(rows: list[Row], scripts=None, files=None) -> Measured:
    flat = [(n, length, spans) for n, row in enumerate(rows) for length, spans in row]
    spans = [(n, *span) for n, _, of in flat for span in of]
    return Measured(
        lengths=np.array([length for _, length, _ in flat], np.int64), sequence_rows=np.array([n for n, _, _ in flat]),
        spans=np.array([s[1:] for s in spans], np.int64).reshape(-1, 2),
        span_rows=np.array([s[0] for s in spans], np.int64), turns=np.full(len(rows), 2),
        lines=np.arange(1, len(rows) + 1), scripts=np.array(scripts or [0] * len(rows), np.uint8),
        files=files or ["a.jsonl"] * len(rows), openings=[f"opening {n}" for n in range(len(rows))])


def collected(rows: list[Row], block: int = 1000) -> Statistics:
    result = Statistics()
    for n in range(0, len(rows), block):
        result.add(measured(rows[n:n + block]))
    return result


def simple(lengths: list[int]) -> list[Row]:
    """Rows of one sequence whose second half is learned."""
    return [[(length, [(length // 2, length)])] for length in lengths]


def longest(row: Row) -> int:
    return max(length for length, _ in row)


def learned(row: Row, positions=range(10**6)) -> int:
    return sum(len(range(max(a, positions.start), min(b, positions.stop))) for _, spans in row for a, b in spans)


# --- what a limit cuts off

@given(ROWS, st.integers(0, 320), st.integers(1, 30))
@settings(max_examples=150, deadline=None)
def test_a_cut_is_counted_exactly(rows, limit, block):
    over = [row for row in rows if longest(row) > limit]
    assert collected(rows, block).cut(limit) == Cut(
        limit, rows=len(over), row_tokens=sum(map(learned, over)),
        tokens=sum(learned(row, range(limit, 10**6)) for row in rows),
        ends=sum(max(b for _, spans in row for _, b in spans) > limit for row in rows))


@given(ROWS)
@settings(max_examples=100, deadline=None)
def test_the_suggestion_is_the_smallest_multiple_that_keeps_enough(rows):
    found, total = collected(rows), sum(map(learned, rows))

    def smallest(kept):
        return next(limit for limit in range(64, 1000, 64) if 100 * kept(limit) >= 99 * total)

    assert found.suggestion("truncate") == smallest(lambda limit: sum(learned(r, range(limit)) for r in rows))
    expected = smallest(lambda limit: sum(learned(r) for r in rows if longest(r) <= limit))
    assert found.suggestion("drop") == found.suggestion("split") == found.suggestion("fail") == expected


def test_the_suggestion_reaches_the_token_that_counts():
    assert [collected([[(n, [(0, n)])]]).suggestion("truncate") for n in (64, 65)] == [64, 128]


def test_a_limit_beyond_everything_cuts_nothing():
    assert collected(simple([10, 20])).cut(5000) == Cut(5000, 0, 0, 0, 0)


# --- figures

@given(ROWS, st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_the_figures_are_those_of_a_plain_count(rows, block):
    found = collected(rows, block)
    lengths = sorted(map(longest, rows))
    assert (found.rows, found.turns, found.sequences) == (len(rows), 2 * len(rows), sum(map(len, rows)))
    assert found.tokens == sum(length for row in rows for length, _ in row)
    assert found.trained_tokens == sum(map(learned, rows))
    for p in (50, 90, 95, 99):
        assert found.percentile(p) == lengths[min(len(lengths) - 1, len(lengths) * p // 100)]
    report = found.as_dict(128, "drop")
    assert report["length"]["mean"] == pytest.approx(np.mean(lengths))
    assert (report["length"]["shortest"], report["length"]["longest"]) == (lengths[0], lengths[-1])
    assert json.loads(json.dumps(report)) == report


@given(ROWS, st.data())
@settings(max_examples=60, deadline=None)
def test_rows_that_are_not_kept_count_nowhere(rows, data):
    keep = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    found = Statistics()
    found.add(measured(rows), np.array(keep))
    expected = collected([row for row, kept in zip(rows, keep) if kept]).as_dict(100, "drop")
    report = found.as_dict(100, "drop")
    for name in ("longest_rows", "shortest_rows"):  # their lines and openings are others
        assert [e["tokens"] for e in report.pop(name)] == [e["tokens"] for e in expected.pop(name)]
    assert report == expected


@given(st.lists(st.one_of(st.integers(1, 60), st.integers(1, 3000)), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_histogram_holds_every_row_once(lengths):
    bins = collected(simple(lengths)).histogram()
    assert 1 <= len(bins) <= 14
    for item in bins:
        assert item["rows"] == sum(item["from"] <= length <= item["to"] for length in lengths)
    assert [b["from"] for b in bins[1:]] == [b["to"] + 1 for b in bins[:-1]]
    assert sum(b["rows"] for b in bins) == len(lengths)
    assert len({b["to"] - b["from"] for b in bins[:-1]}) <= 1


@pytest.mark.parametrize("few", [range(100, 400), range(100, 400, 15)])
def test_one_far_row_does_not_flatten_the_histogram(few):
    bins = collected(simple([*few, 50_000])).histogram()
    assert len(bins) >= 8 and max(b["rows"] for b in bins) < 80
    assert bins[-1]["to"] == 50_000


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_longest_and_the_shortest_rows_are_named_the_first_ones_first(lengths, block):
    found = Statistics()
    for start in range(0, len(lengths), block):
        part = simple(lengths[start:start + block])
        found.add(measured(part, files=[f"f{start + n}" for n in range(len(part))]))
    report = found.as_dict(64, "drop")
    order = sorted(range(len(lengths)), key=lambda n: (lengths[n], n))
    assert [(e["tokens"], e["file"]) for e in report["shortest_rows"]] == [(lengths[n], f"f{n}") for n in order[:3]]
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    assert [(e["tokens"], e["file"]) for e in report["longest_rows"]] == [(lengths[n], f"f{n}") for n in order[:3]]


def test_an_opening_is_one_line_of_80_characters():
    assert opening("  What is\n\na bond?\t") == "What is a bond?"
    assert opening("x" * 500) == "x" * 80


def test_without_rows_the_report_is_empty_but_whole():
    report = Statistics().as_dict(2048, "drop")
    assert report["rows"] == 0 and report["histogram"] == [] and report["long"]["message"] is None
    assert report.keys() == collected(simple([5])).as_dict(2048, "drop").keys()


def test_a_giant_sequence_takes_bounded_memory(monkeypatch):
    monkeypatch.setattr(statistics, "FURTHEST", 5000)
    found = collected(simple([100, 10**9]))
    counts = [v.values for v in vars(found).values() if isinstance(v, statistics._Counts)]
    assert len(counts) == 4 and max(map(len, counts)) <= 5001
    assert found.cut(2048).rows == 1 and found.as_dict(2048, "drop")["length"]["longest"] == 10**9
    assert found.histogram()[-1]["rows"] == 1


def test_a_million_rows_cost_a_few_seconds_at_most():
    block = measured(simple(np.random.default_rng(0).integers(50, 2000, 1000).tolist()))
    found = Statistics()
    start = time.process_time()
    for _ in range(50):
        found.add(block)
    assert (time.process_time() - start) / 50_000 < 5e-6


# --- the sentence on long rows

MANY = simple([100] * 88 + [3000] * 12)


@pytest.mark.parametrize(("on_long", "expected"), [
    ("drop", "12 rows (80 % of the trained tokens) are longer than 2,048 tokens and left out; "
             "--max-length 3008 keeps all"),
    ("split", "12 rows (80 % of the trained tokens) are longer than 2,048 tokens and divided; "
              "--max-length 3008 keeps all"),
    ("truncate", "12 rows lose 51 % of the trained tokens at 2,048 tokens, and 12 of them the end of the last answer; "
                 "--max-length 3008 keeps all"),
    ("fail", "12 rows (80 % of the trained tokens) are longer than 2,048 tokens and refused; the longest has 3,000"),
])
def test_the_sentence_says_what_happens_and_what_would_do(on_long, expected):
    assert collected(MANY).long_message(2048, on_long) == expected


def test_a_few_rows_that_are_far_longer_do_not_speak_for_all():
    rows = simple([130] * 55 + [80_000])
    for on_long, what in (("drop", "left out"), ("split", "divided")):
        assert collected(rows).long_message(64, on_long).endswith(
            f"and {what}; --max-length 80000 keeps all, and --max-length 192 keeps 95 % of the rows")
    assert collected(rows).long_message(2048, "drop").endswith("left out; --max-length 80000 keeps all")
    assert collected(simple([130] * 55 + [400])).long_message(64, "drop").endswith("; --max-length 448 keeps all")


def test_the_sentence_on_a_single_row():
    rows = simple([500] * 999 + [3000])
    assert collected(rows).long_message(2048, "drop") == \
        "1 row (0.6 % of the trained tokens) is longer than 2,048 tokens and left out; the longest has 3,000"
    unlearned = [*simple([500] * 9), [(3000, [(10, 20)])]]
    assert collected(unlearned).long_message(2048, "truncate") == \
        "1 row loses none of the trained tokens at 2,048 tokens; the longest has 3,000"
    assert collected(rows).long_message(3000, "drop") is None


def test_the_report_tells_cuts_at_common_limits():
    report = collected(MANY).as_dict(2000, "drop")
    assert [item["max_length"] for item in report["limits"]] == [256, 512, 1024, 2000, 2048]
    assert report["limits"][3] == {"max_length": 2000, "rows": 12, "row_tokens": 18000, "tokens": 12000, "ends": 12}
    assert report["long"] | {"message": ""} == report["limits"][3] | {"on_long": "drop", "suggestion": 3008,
                                                                     "message": ""}


# --- writing systems

@pytest.mark.parametrize(("text", "name"), [
    ("What is a bond?", "Latin"), ("Größe, façade, Übung", "Latin"), ("什么是债券？", "Han"),
    ("債券とは何ですか。東京の会社", "Kana"), ("カタカナ", "Kana"), ("Что такое облигация?", "Cyrillic"),
    ("ما هو السند؟", "Arabic"), ("채권이란 무엇입니까?", "Hangul"), ("बांड क्या है?", "Devanagari"),
    ("Τι είναι ομόλογο;", "other"), ("𠀀𠀁𠀂", "Han"), ("1 + 1 = 2", "no letters"), ("", "no letters"),
    ("😀😀", "no letters"), ("\ud800", "no letters"), ("Python 是一种广泛使用的解释型、高级和通用的编程语言", "Han"),
    ("The word 债券 means bond", "Latin"),
])
def test_the_script_is_that_of_most_letters(text, name):
    assert SCRIPTS[script_of(text)] == name


def test_only_the_beginning_of_a_long_text_is_looked_at():
    assert SCRIPTS[script_of("a" * 2000 + "债" * 5000)] == "Latin"


def test_scripts_are_shares_of_rows_with_letters():
    found = Statistics()
    codes = [script_of(t) for t in ("bond", "stock", "fund", "债券", "42")]
    found.add(measured(simple([10] * 5), scripts=codes))
    assert found.scripts() == {"Latin": 0.75, "Han": 0.25}
    assert list(found.scripts()) == ["Latin", "Han"]
    alone = Statistics()
    alone.add(measured(simple([10] * 2), scripts=[script_of("bond"), script_of("42")]))
    assert alone.scripts() == {}


def test_looking_at_the_script_is_fast():
    texts = ["The quick brown fox jumps over the lazy dog. " * 30, "Съешь же ещё этих мягких булок. " * 40]
    for text in texts:
        script_of(text)
    start = time.process_time()
    for _ in range(500):
        for text in texts:
            script_of(text)
    assert (time.process_time() - start) / 1000 < 100e-6
