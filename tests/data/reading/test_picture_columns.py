"""Pictures in tables: as `datasets`' Image feature and others have them, and what stays binary data."""

from __future__ import annotations

import base64
import csv
import json
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from gemma_tune.base.listener import Listener
from gemma_tune.base.pictures import BLUE, RED, as_text, square
from gemma_tune.data.conversations.formats import Formats
from gemma_tune.data.conversations.pictures import pictures_in
from gemma_tune.data.reading.folders import data_files
from gemma_tune.data.reading.sources import read_blocks, source_of
from support.hub import LoopbackHub

PNG, OTHER = square(RED), square(BLUE)
FEATURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def rows_of(name):
    """Rows as a worker process would see them."""
    return [row for block in read_blocks(source_of(Path(name))) for row in pickle.loads(pickle.dumps(block)).rows()]


def pictures(name):
    """The pictures of each row that is learned from a file."""
    examples = [Formats().example_of(row) for row in rows_of(name)]
    assert all(example.unread == () for example in examples)
    return [pictures_in(example.messages) for example in examples]


def at_0(*refs):
    return [{"at": 0, **ref} for ref in refs]


@pytest.mark.parametrize("write", [parquet.write_table, feather.write_feather])
@pytest.mark.parametrize("kind", [FEATURE, pa.struct({"bytes": pa.large_binary(), "path": pa.null()}), pa.struct({"bytes": pa.binary()})])
def test_the_image_feature(write, kind):
    named = {"path": "a.png"} if kind == FEATURE else {}
    images = pa.array([{"bytes": PNG, **named}, None, {"bytes": OTHER}], kind)
    table = pa.table({"question": ["What?"] * 3, "answer": ["A cat."] * 3, "image": images})
    name = "rows.parquet" if write is parquet.write_table else "rows.arrow"
    write(table, name)
    assert pictures(name) == [at_0({"base64": as_text(PNG)}), [], at_0({"base64": as_text(OTHER)})]


def test_lists_of_the_image_feature_and_paths_alone():
    images = pa.array([[{"bytes": PNG}, {"path": "b.png"}], [], None], pa.list_(FEATURE))
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    parquet.write_table(pa.table({"messages": [turns] * 3, "images": images}), "rows.parquet")
    assert pictures("rows.parquet") == [at_0({"base64": as_text(PNG)}, {"path": "b.png"}), [], []]


def test_parts_of_a_table_have_all_keys_of_each_other():
    """As TRL's and the Hub's tables have turns: Arrow gives every part each key."""
    parts = [{"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "A cat.", "index": None}]}]
    parquet.write_table(pa.table({"messages": [turns], "images": pa.array([[{"bytes": PNG}]], pa.list_(FEATURE))}), "rows.parquet")
    assert pictures("rows.parquet") == [at_0({"base64": as_text(PNG)})]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_a_column_of_bytes_is_a_picture_where_they_begin_as_one(kind):
    files = {"png": PNG, "jpg": b"\xff\xd8\xff\xe0" + bytes(30), "gif": b"GIF89a\x01\0\x01\0\x80\xff", "webp": b"RIFF\x24\xff\0\0WEBPVP8 ",
             "bmp": b"BM\x3a\0\0\0\0\0\0\0\x36", "tif": b"MM\0*\0\0\0\x08"}  # the last of which could be text, too
    table = pa.table({"question": ["What?"] * 6, "answer": ["A cat."] * 6, "image": pa.array([*files.values()], kind)})
    feather.write_feather(table, "rows.arrow")
    assert [base64.b64decode(found["base64"]) for [found] in pictures("rows.arrow")] == [*files.values()]


def test_other_bytes_do_not_become_readable():
    others = {"wav": b"RIFF\x24\xff\0\0WAVEfmt ", "pdf": b"%PDF-1.4\xff\xfe", "odd": b"BMW\xff", "text": b"GIF89a is a format"}
    table = pa.table({"text": ["a"] * 4, "raw": pa.array([*others.values()]), "sound": pa.array([{"bytes": others["wav"], "path": "a.wav"}] * 4)})
    parquet.write_table(table, "rows.parquet")
    assert [row.value["raw"] for row in rows_of("rows.parquet")] == [
        {"not text": f"{len(others[name])} bytes of binary data"} for name in ("wav", "pdf", "odd")] + ["GIF89a is a format"]
    assert rows_of("rows.parquet")[0].value["sound"] == {"not text": f"{len(others['wav'])} bytes of binary data"}
    parquet.write_table(pa.table({"question": ["What?"], "answer": ["x"], "image": [others["pdf"]]}), "rows.parquet")
    with pytest.raises(Exception, match="`image` is 10 bytes of binary data, and none of a picture's"):
        pictures("rows.parquet")


def test_what_datasets_writes(tmp_path):
    import datasets

    (tmp_path / "a.png").write_bytes(PNG)
    features = datasets.Features({"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")})
    rows = {"image": [{"bytes": PNG, "path": None}, {"bytes": None, "path": str(tmp_path / "a.png")}, None],
            "question": ["What?"] * 3, "answer": ["Red."] * 3}
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet("rows.parquet")  # which leaves files where they are
    assert pictures("rows.parquet") == [at_0({"base64": as_text(PNG)}), at_0({"path": str(tmp_path / "a.png")}), []]
    table.save_to_disk("saved")  # which takes them into the table
    [saved] = data_files(Path("saved"), Path("keep"), Listener())
    assert pictures(saved) == [at_0({"base64": as_text(PNG)})] * 2 + [[]]


def test_a_dataset_of_the_hub(monkeypatch, tmp_path):
    from gemma_tune.data.reading.sources import find_sources

    folder = tmp_path / "repo"
    folder.mkdir()
    parquet.write_table(pa.table({"question": ["What?"], "answer": ["Red."], "image": pa.array([{"bytes": PNG, "path": "a.png"}], FEATURE)}),
                        folder / "train.parquet")
    (folder / "README.md").write_text("---\ndataset_info:\n  features:\n  - name: question\n    dtype: string\n  - name: answer\n"
                                      "    dtype: string\n  - name: image\n    dtype: image\n---\n")
    with LoopbackHub() as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        hub.isolate_datasets(monkeypatch, tmp_path / "home")
        hub.add_repo("datasets/org/seen", folder)
        [source] = find_sources(["hf:org/seen"], Path("keep"))
        [row] = [row for block in read_blocks(source) for row in block.rows()]
    assert pictures_in(Formats().example_of(row).messages) == at_0({"base64": as_text(PNG)})


def test_an_image_folder():
    """`datasets` reads such a directory by its metadata; the files beside it are no data."""
    folder = Path("photos")
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    row = {"file_name": "a.png", "question": "What?", "answer": "Red."}
    for name in ("metadata.jsonl", "metadata.csv"):
        with open(folder / name, "w", newline="") as f:
            if name.endswith(".csv"):
                csv.writer(f).writerows([row, row.values()])
            else:
                f.write(json.dumps(row))
        [found] = data_files(folder, Path("keep"), Listener())
        assert found.name == name and pictures(found) == [at_0({"path": "a.png"})]
        found.unlink()


def test_cells_of_a_table_that_is_text():
    with open("rows.csv", "w", newline="") as f:
        csv.writer(f).writerows([("prompt", "completion", "images"), ("What?", "A cat.", '["a.png", "b.png"]'), ("<image>\nWhat?", "A cat.", "a.png"),
                                 ("What?", "A cat.", ""), ("What?", "A cat.", "[]")])
    assert pictures("rows.csv") == [at_0({"path": "a.png"}, {"path": "b.png"}), at_0({"path": "a.png"}), [], []]


def test_a_picture_of_several_megabytes_in_a_line():
    data = base64.b64encode(PNG[:33] + bytes(6 << 20)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    turns = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A cat."}]
    Path("rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert pictures("rows.jsonl") == [at_0({"base64": data})]
