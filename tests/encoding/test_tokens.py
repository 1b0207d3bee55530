"""What lies between the rows and training: tokens in Arrow files, rows between two passes, and which rows are kept."""

from __future__ import annotations

import errno
import os
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_tune.base.errors import WorkFailed
from gemma_tune.base.files import os_errors
from gemma_tune.encoding import tokens
from gemma_tune.encoding.labels import Encoded, labels_of
from gemma_tune.encoding.sequences import Outcome
from gemma_tune.encoding.tokens import (
    TokenWriter,
    answers_of,
    encoding_key,
    lengths_of,
    liked,
    open_tokens,
    pictures_in,
)
from gemma_tune.prepare.selection import Columns, Gathered, select
from gemma_tune.prepare.split import choose_valid
from gemma_tune.prepare.spool import Kept, Spool, batch_of

examples = settings(deadline=None, max_examples=60, derandomize=True, database=None)


@st.composite
def encoded(draw) -> Encoded:
    """A sequence with ascending learned ranges, some of which touch."""
    ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12))
    edges = sorted(draw(st.sets(st.integers(0, len(ids)), min_size=2, max_size=6)))
    edges = edges[:len(edges) // 2 * 2]
    pictures = draw(st.lists(st.sampled_from(("a.png", "b.jpg")), max_size=2))
    return Encoded(np.array(ids, np.int32), np.array(edges, np.int32).reshape(-1, 2), tuple((name, 1) for name in pictures))


ROWS = st.lists(st.lists(encoded(), max_size=3), max_size=9)


def flat(row: list[Encoded]) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """As :class:`TokenWriter` takes them."""
    return [(s.ids, s.spans.reshape(-1), " ".join(names(s))) for s in row]


def names(sequence: Encoded) -> list[str]:
    return [name for name, _ in sequence.pictures]


def write(path: Path, rows: list[list[Encoded]]) -> TokenWriter:
    with TokenWriter(path) as writer:
        for row in rows:
            writer.add(flat(row))
    return writer


# --- tokens/*.arrow

@pytest.mark.parametrize("batch", [1, 3, 1_000])
def test_marks_of_answers(tmp_path, batch, monkeypatch):
    """A pair is two sequences of one row, a mark alone goes for all sequences of its row; what is liked is in order."""
    monkeypatch.setattr(tokens, "_BATCH", batch)
    sequences = [Encoded(np.arange(n, n + 4, dtype=np.int32), np.array([[2, 4]], np.int32)) for n in range(7)]
    with TokenWriter(tmp_path / "train.arrow") as writer:
        for row, marks in (([0, 1], (1, -1)), ([2], (0,)), ([3, 4], (-1,)), ([], (1, -1)), ([5], (1,))):
            writer.add(flat([sequences[n] for n in row]), marks)
        writer.add(flat([sequences[6]]))
    found = open_tokens(tmp_path / "train.arrow")
    marks = answers_of(found)
    assert marks.dtype == np.int8 and marks.tolist() == [1, -1, 0, -1, -1, 1, 0]
    good = liked(found)
    assert [int(s["input_ids"][0]) for s in good] == [0, 2, 5, 6]
    assert answers_of(good).tolist() == [1, 0, 1, 0] and lengths_of(good).tolist() == [4] * 4
    assert all((s["labels"] == labels_of(s["input_ids"], np.array([2, 4]))).all() for s in good)
    assert found.data.column("row").to_pylist() == [0, 0, 1, 2, 2, 4, 5]


def test_an_answer_in_several_sequences_is_one(tmp_path):
    sequence = Encoded(np.arange(4, dtype=np.int32), np.array([[2, 4]], np.int32))
    with TokenWriter(tmp_path / "train.arrow") as writer:
        for marks in ((-1,), (1,), (-1,)):
            writer.add(flat([sequence] * 3), marks)
    assert (writer.rows, writer.good, writer.bad, writer.sequences) == (3, 1, 2, 9)


def test_marks_of_nothing(tmp_path):
    with TokenWriter(tmp_path / "valid.arrow"):
        pass
    found = open_tokens(tmp_path / "valid.arrow")
    assert answers_of(found).tolist() == [] and len(liked(found)) == 0


@pytest.mark.parametrize(("batch", "most"), [(1_000, 1_000_000), (3, 1_000_000), (1_000, 10)])
def test_what_is_written_is_what_training_reads(batch, most, monkeypatch):
    """Whatever the batches are: ids, labels, lengths, figures and the line that each sequence comes from."""
    monkeypatch.setattr(tokens, "_BATCH", batch)
    monkeypatch.setattr(tokens, "_MOST_TOKENS", most)

    @given(ROWS)
    @examples
    def check(rows):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "train.arrow"
            writer = write(path, rows)
            dataset = open_tokens(path)
            expected = [s for row in rows for s in row]
            assert len(dataset) == writer.sequences == len(expected)
            assert writer.rows == len(rows)
            assert writer.tokens == sum(len(s.ids) for s in expected) == lengths_of(dataset).sum()
            assert writer.trained == sum(s.trained for s in expected)
            assert lengths_of(dataset).tolist() == [len(s.ids) for s in expected]
            for s, read in zip(expected, dataset, strict=True):
                assert read.keys() == {"input_ids", "labels", "pictures"} and read["pictures"] == names(s)
                assert read["input_ids"].tolist() == s.ids.tolist() and read["labels"].tolist() == s.labels
            if expected:
                together = dataset[:]
                assert [x.tolist() for x in together["labels"]] == [s.labels for s in expected]
            places = pa.ipc.open_stream(path.read_bytes()).read_all().column("row").to_pylist()
            assert places == [n for n, row in enumerate(rows) for _ in row]
            assert pictures_in(dataset) == list(dict.fromkeys(name for s in expected for name in names(s)))

    check()


def test_sequences_are_written_before_many_tokens_wait(tmp_path, monkeypatch):
    """Long sequences must not pile up: a thousand of 100,000 tokens would take 400 MB."""
    monkeypatch.setattr(tokens, "_MOST_TOKENS", 5_000)
    sizes = []
    monkeypatch.setattr(TokenWriter, "_flush", lambda self, plain=TokenWriter._flush: (
        sizes.append(sum(map(len, self._ids))), plain(self)))
    sequence = Encoded(np.arange(2_000, dtype=np.int32), np.array([[1, 2_000]], np.int32))
    write(tmp_path / "train.arrow", [[sequence]] * 10)
    assert max(sizes) <= 7_000
    assert lengths_of(open_tokens(tmp_path / "train.arrow")).tolist() == [2_000] * 10


def test_the_writer_does_not_hold_the_blocks_that_it_gets_views_of(tmp_path):
    block = np.arange(100, dtype=np.int32)
    with TokenWriter(tmp_path / "train.arrow") as writer:
        writer.add([(block[10:20], block[:2], "")])
        block[:] = 7  # as if its memory were used for something else
    assert open_tokens(tmp_path / "train.arrow")[0]["input_ids"].tolist() == list(range(10, 20))


def test_tokens_are_mapped_and_not_loaded(tmp_path):
    """In a process of its own memory, which the file exceeds by far, only what is asked for is read."""
    sequence = Encoded(np.arange(100_000, dtype=np.int32), np.array([[1, 100_000]], np.int32))
    write(tmp_path / "train.arrow", [[sequence]] * 100)
    before = pa.total_allocated_bytes()
    dataset = open_tokens(tmp_path / "train.arrow")
    assert lengths_of(dataset).sum() == 10_000_000
    assert dataset[50]["input_ids"][-1] == 99_999
    assert pa.total_allocated_bytes() - before < 2_000_000 < os.path.getsize(tmp_path / "train.arrow")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_told(tmp_path):
    sequence = Encoded(np.arange(100_000, dtype=np.int32), np.array([[1, 100_000]], np.int32))
    with pytest.raises(WorkFailed, match="the disk is full") as raised, os_errors(tmp_path):
        write(Path("/dev/full"), [[sequence]] * 3)
    assert raised.value.__cause__.errno == errno.ENOSPC


def written(path: Path, *names: str) -> Path:
    """Rows of one sequence each, with these names of pictures, and one of three sequences."""
    with TokenWriter(path) as writer:
        for name in names:
            writer.add([(np.arange(4, dtype=np.int32), np.array([2, 4], np.int32), name)])
        writer.add([(np.arange(4, dtype=np.int32), np.array([2, 4], np.int32), name) for name in ("a.png", "", "b.png")])
    return path


def test_which_sequences_and_rows_have_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH", 2)  # several chunks
    dataset = open_tokens(written(tmp_path / "t.arrow", "", "a.png b.png", ""))
    assert tokens.pictured(dataset).tolist() == [False, True, False, True, False, True] and tokens.pictured_rows(tmp_path / "t.arrow") == 2
    plain = tokens.those(dataset, ~tokens.pictured(dataset))
    assert [row["pictures"] for row in plain] == [[]] * 3 and not tokens.pictured(plain).any()
    assert [row["pictures"] for row in tokens.those(dataset, tokens.pictured(dataset))] == [["a.png", "b.png"], ["a.png"], ["b.png"]]


def test_tokens_of_before_there_were_pictures(tmp_path):
    """What reads those of a run that was prepared then goes on doing so."""
    with pa.OSFile(str(written(tmp_path / "new.arrow", ""))) as file, pa.ipc.open_stream(file) as stream:
        table = stream.read_all().drop_columns(["pictures"])
    with pa.OSFile(str(tmp_path / "old.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    dataset = open_tokens(tmp_path / "old.arrow")
    assert [row["pictures"] for row in dataset] == [[]] * 4 and dataset[0]["labels"].tolist() == [-100, -100, 2, 3]
    assert not tokens.pictured(dataset).any() and tokens.pictured_rows(tmp_path / "old.arrow") == 0 and pictures_in(dataset) == []


def test_labels_of_ranges_that_touch_and_of_none():
    ids = np.array([5, 6, 7, 8])
    assert labels_of(ids, np.array([0, 1, 1, 3])).tolist() == [5, 6, 7, -100]
    assert labels_of(ids, [[3, 4]]).tolist() == [-100, -100, -100, 8]
    assert labels_of(ids, []).tolist() == [-100] * 4
    assert labels_of(ids, []).dtype == np.int64


def test_the_key_follows_model_code_and_libraries(monkeypatch):
    key = encoding_key("base@1")
    assert key == encoding_key("base@1") and key != encoding_key("base@2")
    monkeypatch.setattr(tokens, "library_versions", lambda: {"transformers": "0.1", "tokenizers": "0.1", "jinja2": "1"})
    other = encoding_key("base@1")
    assert {name for name in key if key[name] != other[name]} == {"transformers", "tokenizers", "jinja2"}


def test_every_module_that_makes_tokens_is_part_of_the_key(tmp_path, monkeypatch):
    """A copy of the package, in which one file changes after the other."""
    import shutil

    package = tmp_path / "gemma_tune"
    shutil.copytree(tokens.PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__", "samples"))
    monkeypatch.setattr(tokens, "PACKAGE", package)
    before = encoding_key("base")
    assert before["code"] == encoding_key("base")["code"]
    for name in ("encoding/chat_format.py", "encoding/labels.py", "encoding/thinking.py", "encoding/left_out.py",
                 "encoding/sequences.py", "prepare/judge.py", "data/conversations/turns.py",
                 "data/conversations/layouts.py", "encoding/templates/gemma.jinja"):
        content = (package / name).read_bytes()
        (package / name).write_bytes(content + b"\n")
        assert encoding_key("base")["code"] != before["code"], name
        (package / name).write_bytes(content)
    (package / "cli" / "console.py").write_text("")
    assert encoding_key("base") == before


# --- rows between the passes

KEPT = st.builds(
    Kept, line=st.integers(1, 2**63 - 1), text=st.binary(max_size=20), conversation=st.binary(min_size=16, max_size=16),
    prompt=st.integers(0, 2**64 - 1), turns=st.integers(0, 9), script=st.integers(0, 9), signature=st.binary(max_size=8),
    outcome=st.builds(Outcome, full=st.lists(encoded(), min_size=1, max_size=3), kept=st.lists(encoded(), max_size=3)))


@given(st.lists(st.tuples(st.integers(0, 5), st.lists(KEPT, min_size=1, max_size=5)), max_size=4))
@examples
def test_rows_come_back_from_the_spool(batches):
    """With several sequences, or, as of rows that are too long, with none; twice, and one batch after the other."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder) / "spool")
        try:
            added = [spool.add(batch_of(rows), source) for source, rows in batches]
            assert spool.size == sum(len(rows) for _, rows in batches)
            for read in (added, list(spool.read()), list(spool.read())):
                first = 0
                for (source, rows), batch in zip(batches, read, strict=True):
                    assert (batch.source, batch.first, batch.size) == (source, first, len(rows))
                    check_batch(batch, rows)
                    first += len(rows)
        finally:
            spool.close()
        assert list(Path(folder).iterdir()) == []


def check_batch(batch, rows: list[Kept]) -> None:
    for name in ("line", "prompt", "turns", "script"):
        assert batch.numbers(name).tolist() == [getattr(r, name) for r in rows]
    assert batch.bytes_of("text") == [r.text for r in rows]
    assert batch.bytes_of("signature") == [r.signature for r in rows]
    assert [h.tobytes() for h in batch.hashes()] == [r.conversation for r in rows]
    assert [[(ids.tolist(), spans.tolist(), seen) for ids, spans, seen in row] for row in batch.sequences()] == [
        [(s.ids.tolist(), s.spans.reshape(-1).tolist(), " ".join(names(s))) for s in r.outcome.kept] for r in rows]
    for prefix, sequences in (("", [r.outcome.kept for r in rows]), ("full_", [r.outcome.full for r in rows])):
        assert listed(batch, prefix + "lengths") == [[len(s.ids) for s in row] for row in sequences]
        assert listed(batch, prefix + "counts") == [[len(s.spans) for s in row] for row in sequences]
        assert listed(batch, prefix + "spans") == [[i for s in row for i in s.spans.reshape(-1)] for row in sequences]


def listed(batch, name: str) -> list[list[int]]:
    values, offsets = batch.lists(name)
    return [values[a:b].tolist() for a, b in zip(offsets, offsets[1:])]


def test_from_the_spool_to_the_tokens(tmp_path):
    """What the second pass does with a batch."""
    sequence = Encoded(np.array([4, 5, 6], np.int32), np.array([[1, 3]], np.int32))
    outcomes = [Outcome([sequence], [sequence]), Outcome([sequence], []), Outcome([sequence] * 2, [sequence] * 2)]
    spool = Spool(tmp_path / "spool")
    spool.add(batch_of([Kept(n, b"", bytes(16), 0, 1, 0, b"", outcome) for n, outcome in enumerate(outcomes)]), 0)
    with TokenWriter(tmp_path / "train.arrow") as writer:
        for batch in spool.read():
            for row in batch.sequences():
                writer.add(row)
    spool.close()
    assert (writer.rows, writer.sequences, writer.tokens, writer.trained) == (3, 3, 9, 6)
    assert [r["labels"].tolist() for r in open_tokens(tmp_path / "train.arrow")] == [[-100, 5, 6]] * 3


# --- which rows are kept

@dataclass(frozen=True)
class Row:
    """A row as the selection sees it; rows of a ``kind`` are nearly the same."""

    conversation: tuple[int, int]
    prompt: int
    usable: bool
    kind: int


@st.composite
def sources(draw) -> tuple[list[list[Row]], int]:
    """Rows of some files with few different values, and how many of the files, which come first, are held out."""
    few = st.integers(0, 2)
    row = st.builds(Row, conversation=st.tuples(few, st.sampled_from([0, 2**64 - 1])),
                    prompt=st.sampled_from([0, 1, 2**40, 2**63, 2**64 - 1]), usable=st.sampled_from([True] * 4 + [False]),
                    kind=few)
    files = draw(st.lists(st.lists(row, min_size=1, max_size=6), max_size=4))
    return files, draw(st.integers(0, len(files))) if draw(st.booleans()) else 0


def columns_of(files: list[list[Row]], held_out: int) -> Columns:
    gathered = Gathered()
    for n, rows in enumerate(files):
        gathered.add(np.array([r.conversation for r in rows], np.uint64), np.array([r.prompt for r in rows], np.uint64),
                     n, np.arange(1, len(rows) + 1), np.array([r.usable for r in rows]), n < held_out, np.zeros(len(rows), bool))
    return gathered.columns()


@given(sources(), st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]), st.booleans(), st.booleans())
@settings(examples, max_examples=400)
def test_selection(given_files, valid, keep_duplicates, look_for_near):
    files, held_out = given_files
    rows = [row for file in files for row in file]
    held = [n < held_out for n, file in enumerate(files) for _ in file]
    columns = columns_of(files, held_out)
    assert columns.source.tolist() == [n for n, file in enumerate(files) for _ in file]
    assert columns.line.tolist() == [n + 1 for file in files for n in range(len(file))]

    def nearly(mask: np.ndarray) -> np.ndarray:
        found, first = np.full(len(mask), -1, np.int64), {}
        for n in np.flatnonzero(mask):
            found[n] = first.setdefault(rows[n].kind, n) if rows[n].kind in first else -1
            first.setdefault(rows[n].kind, n)
        return found

    selection = select(columns, valid, keep_duplicates, nearly if look_for_near else None)

    seen: dict = {}
    similar: dict = {}
    kept, exact, near = [], {}, {}
    for n, row in enumerate(rows):
        if not row.usable:
            continue
        if not keep_duplicates and row.conversation in seen:
            exact[n] = seen[row.conversation]
            continue
        seen.setdefault(row.conversation, n)
        if look_for_near and row.kind in similar:
            near[n] = similar[row.kind]
            continue
        similar.setdefault(row.kind, n)
        kept.append(n)
    # What repeats a row that is itself left out as nearly the same points at the row that is kept.
    exact = {n: near.get(first, first) for n, first in exact.items()}
    assert np.flatnonzero(selection.kept).tolist() == kept
    assert {n: int(selection.same_as[n]) for n in np.flatnonzero(selection.same_as >= 0)} == exact | near
    assert np.flatnonzero(selection.near).tolist() == sorted(near)
    assert all(rows[n].usable and earlier < n for n, earlier in (exact | near).items())

    by_prompt = defaultdict(list)
    for n in kept:
        by_prompt[rows[n].prompt].append(n)
    conflicts = [group for group in by_prompt.values() if len({rows[n].conversation for n in group}) > 1]
    assert [group.tolist() for group in selection.conflicts] == conflicts

    side = {n: bool(selection.valid[n]) for n in kept}
    if held_out and any(held):
        assert side == {n: held[n] for n in kept}
    else:
        chosen = choose_valid(np.array([rows[n].prompt for n in kept], np.uint64), valid)
        assert list(side.values()) == chosen.tolist()
        assert selection.asked_on_both_sides == 0
    asked = {rows[n].prompt for n in kept if side[n]}
    assert selection.asked_on_both_sides == sum(not side[n] and rows[n].prompt in asked for n in kept)


def test_a_training_row_that_repeats_a_held_out_one_is_the_duplicate():
    held, other = Row((1, 1), 7, True, 0), Row((2, 2), 7, True, 1)
    selection = select(columns_of([[held], [held, other]], 1), 0.5, False)
    assert (selection.same_as.tolist(), selection.kept.tolist()) == ([-1, 0, -1], [True, False, True])
    assert selection.valid.tolist()[::2] == [True, False]
    assert (selection.asked_on_both_sides, [g.tolist() for g in selection.conflicts]) == (1, [[0, 2]])
    twice = select(columns_of([[held], [held, other]], 1), 0.5, True)
    assert twice.kept.all() and twice.asked_on_both_sides == 2


def test_a_row_that_is_too_long_is_nobodys_original():
    long, short = Row((1, 1), 7, False, 0), Row((1, 1), 7, True, 0)
    selection = select(columns_of([[long, short, short]], 0), 0.0, False)
    assert (selection.same_as.tolist(), selection.kept.tolist()) == ([-1, -1, 1], [False, True, False])


def test_of_no_rows_nothing_is_selected():
    selection = select(Gathered().columns(), 0.5, False, lambda mask: np.full(len(mask), -1, np.int64))
    assert (len(selection.kept), selection.conflicts, selection.asked_on_both_sides) == (0, [], 0)
