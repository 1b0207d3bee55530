"""Directories as they really are: saved datasets, snapshots of the Hub, links, pointers, and files without rows."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from gemma_tune.base.errors import BAD_INPUT, UserError
from gemma_tune.base.listener import Listener
from gemma_tune.data.reading.names import How
from gemma_tune.data.reading.sources import Row, find_sources, read_blocks, source_of
from support.command import rows, write_rows
from support.listener import Said

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"
TABLE = pa.table({"n": list(range(25)), "messages": [[{"role": "user", "content": f"q{n}"}] for n in range(25)]})
VALUES = TABLE.to_pylist()


def found(*names: str, said: Listener | None = None, **how: Any) -> list[str]:
    return [source.name for source in find_sources(names, Path("keep"), said, **how)]


def refused(*names: str) -> UserError:
    with pytest.raises(UserError) as caught:
        [values(name) for name in found(*names)]
    assert caught.value.hint and caught.value.exit_code == BAD_INPUT
    return caught.value


def rows_of(name: str, how: How) -> Iterator[Row]:
    [source] = find_sources([name], Path("keep"), how=how)
    return (row for block in read_blocks(source) for row in block.rows())


def values(name: str, size: int = 1 << 20) -> list[Any]:
    return [row.value for block in read_blocks(source_of(Path(name)), size) for row in block.rows()]


def touch(*names: str, text: str = '{"a": 1}') -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)


def arrow(name: str, table: pa.Table = TABLE, kind: Any = pa.ipc.new_stream) -> Path:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    with kind(name, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    return Path(name)


def saved(folder: str, files: int = 1, **state: Any) -> None:
    """A dataset as ``save_to_disk`` writes it."""
    names = [f"data-{n:05}-of-{files:05}.arrow" for n in range(files)]
    for name in names:
        arrow(f"{folder}/{name}")
    Path(folder, "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    Path(folder, "dataset_info.json").write_text("{}")
    arrow(f"{folder}/cache-1234.arrow")


# --- Arrow

@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_files_and_streams(kind, monkeypatch):
    path = arrow("rows.arrow", kind=kind)
    for size in (1, 200, 1 << 20):
        assert values("rows.arrow", size) == VALUES
    blocks = [(block.first, block.done) for block in read_blocks(source_of(path), 200)]
    assert len(blocks) == 5 and blocks[-1][1] == 1.0 and blocks == sorted(blocks)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    [source] = find_sources(["-"], Path("keep"))
    assert source.kind == "arrow" and source.path.suffix == ".arrow"
    Path("rows.arrow").rename("rows.jsonl")
    assert "let its name end in .arrow" in refused("rows.jsonl").hint


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("damage", [lambda b: b[:-60], lambda b: b"", lambda b: b"no arrow at all", lambda b: b[:100]])
def test_arrow_that_is_damaged(kind, damage):
    path = arrow("bad.arrow", kind=kind)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="^bad.arrow is not an Arrow file, or damaged: .+"):
        values("bad.arrow")


def test_arrow_without_rows_and_compressed():
    arrow("none.arrow", TABLE.slice(0, 0))
    with pytest.raises(UserError, match="(?m)^none.arrow is empty$"):
        values("none.arrow")
    import gzip

    Path("rows.arrow.gz").write_bytes(gzip.compress(arrow("rows.arrow").read_bytes()))
    assert values("rows.arrow.gz") == VALUES


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text there")
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "arrow"])
def test_a_file_whose_name_is_no_text_is_read(cli, tiny, ending):
    from pyarrow import parquet

    table = pa.table({"q": [f"q{n}" for n in range(9)], "a": [f"a{n}" for n in range(9)]})
    if ending == "arrow":
        arrow("x", table)
    elif ending == "parquet":
        parquet.write_table(table, "x")
    elif ending == "csv":
        Path("x").write_text("q,a\n" + "".join(f"q{n},a{n}\n" for n in range(9)))
    else:
        write_rows(Path("x"), table.to_pylist())
    name = os.fsdecode(b"caf\xe9." + ending.encode())
    os.rename("x", name)
    for named in (name, "."):
        done = cli("prepare", named, "--columns", "user=q,assistant=a", "--model", tiny, "--run", "run", "--json", "--force")
        assert done.code == 0, done.err
        assert done.json["summary"]["rows"] == 9


# --- saved datasets

def test_what_datasets_has_saved_is_read_as_its_rows(cli, tiny):
    import datasets

    datasets.Dataset.from_list(rows(30)).save_to_disk("saved", num_shards=2)
    done = cli("prepare", "saved", "--model", tiny, "--json")
    assert done.code == 0, done.err
    assert (done.json["summary"]["rows"], done.json["summary"]["rejected_rows"]) == (30, 0)
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(rows(12)), "test": datasets.Dataset.from_list(rows(30)[20:])})
    both.save_to_disk("both")
    done = cli("prepare", "both", "--valid", "both/test", "--run", "r", "--model", tiny, "--json")
    assert done.code == 0, done.err
    assert (done.json["summary"]["train_rows"], done.json["summary"]["valid_rows"]) == (12, 10)
    assert "not trained on" in done.err and "test/data-00000-of-00001.arrow" in done.err


def test_a_saved_dataset_is_its_own_files_alone():
    saved("data/one", files=2)
    said = Said()
    assert found("data", said=said) == ["data/one/data-00000-of-00002.arrow", "data/one/data-00001-of-00002.arrow"]
    assert said.notes == ["data: 2 data files"]
    assert found("data/one/*") == found("data")
    for name in ("data/one/state.json", "data/one/dataset_info.json", "data/one/cache-1234.arrow"):
        error = refused(name)
        assert error.message == f"{name} describes a dataset and holds none of its rows"
        assert error.hint == "name its directory, data/one, or its data files"
    Path("data/one/data-00001-of-00002.arrow").unlink()
    assert refused("data").message == "there is no file data/one/data-00001-of-00002.arrow"
    saved("old", _indices_data_files=[{"filename": "indices.arrow"}])
    assert "with an index of its rows" in refused("old").message and "flatten_indices" in refused("old").hint


def test_a_state_json_of_somebody_else_is_data():
    touch("data/state.json", "data/rows.jsonl")
    assert found("data") == ["data/rows.jsonl", "data/state.json"]


# --- snapshots and splits

def test_a_downloaded_dataset_is_its_training_files():
    touch("d/README.md", "d/dataset_infos.json", "d/data/train-00000-of-00002.jsonl", "d/data/train-00001-of-00002.jsonl",
          "d/data/test-00000-of-00001.jsonl", "d/data/validation-00000-of-00001.jsonl", "d/.cache/huggingface/train.jsonl")
    said = Said()
    training = ["d/data/train-00000-of-00002.jsonl", "d/data/train-00001-of-00002.jsonl"]
    assert found("d", said=said) == training
    assert said.notes == ["d: 2 data files; 2 others passed over (.md, dataset_infos.json)"]
    [warning] = said.warnings
    assert "not trained on" in warning
    assert "data/test-00000-of-00001.jsonl, data/validation-00000-of-00001.jsonl" in warning and "--valid" in warning
    assert found("d", held_out=True) == ["d/data/validation-00000-of-00001.jsonl"]
    assert found("d/data/test-*") == ["d/data/test-00000-of-00001.jsonl"], "asked for"


@pytest.mark.parametrize(("names", "training", "validation"), [
    (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"]),
    (["chats.jsonl", "my_eval.jsonl"], ["chats.jsonl"], ["my_eval.jsonl"]),
    (["train/a.jsonl", "dev/a.jsonl", "test/a.jsonl"], ["train/a.jsonl"], ["dev/a.jsonl"]),
    (["train/test cases.jsonl", "TEST/x.jsonl"], ["train/test cases.jsonl"], ["TEST/x.jsonl"]),
    (["test.jsonl", "sub/test-2.jsonl"], ["sub/test-2.jsonl", "test.jsonl"], ["sub/test-2.jsonl", "test.jsonl"]),
    (["latest.jsonl", "contest.jsonl", "developers.jsonl"], None, None),
    (["train.jsonl", "more.jsonl"], None, None)])
def test_files_for_tests_are_not_learned_unasked(names, training, validation):
    touch(*(f"d/{name}" for name in names))
    assert found("d") == [f"d/{name}" for name in training or sorted(names)]
    assert found("d", held_out=True) == [f"d/{name}" for name in validation or sorted(names)]


def test_a_directory_may_have_nothing_for_training():
    touch("d/test.jsonl", "d/dev.jsonl")
    assert refused("d").message == "d has no files for training, only for test and validation"


def test_a_directory_below_one_that_is_called_test_is_no_test():
    touch("test/rows.jsonl", "test/more.jsonl")
    assert len(found("test")) == 2


def test_the_data_of_a_run_is_its_rows_not_their_tokens(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny).code == 0
    assert Path("runs/tiny-gemma/data/tokens/train.arrow").exists()
    names = found("runs/tiny-gemma/data")
    assert "runs/tiny-gemma/data/train.jsonl" in names and not [name for name in names if name.endswith(".arrow")]


# --- links

def test_directories_behind_links_are_followed_once():
    touch("real/a.jsonl", "real/deep/b.jsonl", "data/c.jsonl", ".hidden/e.jsonl")
    os.symlink("../real", "data/link")
    os.symlink("../real/deep", "data/again")
    os.symlink("..", "real/up")  # to a directory above what is searched
    os.symlink("../data", "real/round")
    os.symlink("self", "data/self")
    os.symlink("../.hidden", "data/seen")
    assert sorted(os.path.realpath(name) for name in found("data")) == sorted(
        os.path.realpath(name) for name in ("data/c.jsonl", "real/a.jsonl", "real/deep/b.jsonl", ".hidden/e.jsonl"))
    assert len(found("data")) == 4
    os.symlink("data", "whole")
    assert len(found("whole")) == 4


def test_a_link_that_leads_nowhere_is_said():
    touch("data/a.jsonl")
    os.symlink("gone.jsonl", "data/b.jsonl")
    assert refused("data").message == "there is no file data/b.jsonl"


# --- no rows

def test_git_lfs_pointers_are_told_from_data(monkeypatch):
    names = ["d/a.jsonl", "d/b.parquet", "d/c.csv.gz", "d/e.arrow"]
    Path("d").mkdir()
    for name in names:
        Path(name).write_bytes(POINTER)
    error = refused("d")
    assert error.message == "4 data sources cannot be read"
    assert error.problems[0].startswith("d/a.jsonl is a Git LFS pointer, which only says where the file is (fetch the file itself: `git lfs pull`")
    assert "git lfs pull" in refused(names[1]).hint
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(POINTER)))
    assert refused("-").message.startswith("standard input is a Git LFS pointer")
    assert not list(Path("keep").glob("*"))


@pytest.mark.parametrize("text", ["Once upon a time.\nThe end.\n", "\n# Notes\n\n- one, two\n", "- {\"a\": 1}\n"])
def test_plain_text_is_told_from_rows(text):
    touch("book", "book.txt", "book.md", text=text)
    error = refused("book")
    assert error.message == "book is plain text, and has no rows"
    assert all(way in error.hint for way in (".txt or .md", "--format text", '{"text": "…"}', "--delimiter"))
    for name, how in (("book.txt", How()), ("book.md", How()), ("book", How(format="text"))):
        assert [row.value for row in rows_of(name, how)] == [{"text": text}]
    [source] = find_sources(["book.txt"], Path("keep"), how=How(format="messages"))
    with pytest.raises(UserError, match="is plain text, and has no rows"):
        list(read_blocks(source))


@pytest.mark.parametrize(("text", "sign", "name_of"), [
    ("How are you?\tFine, thanks.\nAnd you?\tFine.\nBye.\tBye.\n", "\t", "tabs"), ("question,answer\nWhy, oh why?\n1,2\n", ",", ","),
    ("q;a\n1;2\n3;4\n", ";", ";")])
def test_what_may_be_a_table_is_not_taken_for_a_text(text, sign, name_of):
    touch("d/rows.txt", text=text)
    for name in ("d/rows.txt", "d"):
        error = refused(name)
        assert error.message.startswith(f"d/rows.txt may be a table: each of its first lines has as many {name_of} as the others")
        assert "`prepare` takes it as it is with --delimiter or with --format text" in error.hint, "what eval reads has neither"
    assert [row.value for row in rows_of("d/rows.txt", How(format="text"))] == [{"text": text}]
    assert len([*rows_of("d/rows.txt", How(sign))]) == 2


WECHAT = "".join(f"2024-03-0{n} 12:30:11 {'客服' if n % 2 else '张三'}\n第{n}句。\n\n" for n in range(1, 5))
WHATSAPP = "".join(f"12/0{n}/24, 10:15 - {'Ann' if n % 2 else 'Bob Lee'}: So: {n}?\n" for n in range(1, 5))


@pytest.mark.parametrize("text", [WECHAT, WHATSAPP, "[12/01/24, 10:15:30 AM] Ann: Hi\n[12/01/24, 10:16:02 AM] Bob: Yes?\n"
                                  "[12/01/24, 10:17:00 AM] Ann: No.\n"])
def test_a_chat_is_not_taken_for_a_text(text):
    touch("a.txt", text=text)
    error = refused("a.txt")
    assert error.message == "a.txt seems to be a chat: its lines say who says something, and when" and "--format text" in error.hint
    assert [row.value for row in rows_of("a.txt", How(format="text"))] == [{"text": text}]


@pytest.mark.parametrize("text", ["2024-03-01 12:30 Woke up.\n2024-03-02 09:10 Walked.\n2024-03-03 10:00 Slept.\n",
                                  "2024-03-01 12:30 Ann: Hi\n2024-03-02 09:10 Bob: Yes?\n", "At 12:30 Ann: Hi\n" * 3,
                                  "2024-03-01 12:30 Bus\n2024-03-02 09:10 Train\n" * 3, "2024-03-01 12:30 5.3\n2024-03-01 12:40 5.4\n" * 3,
                                  "2024-03-01 12:30:01 INFO: on\n2024-03-01 12:30:01  WARNING: off\n" * 3,
                                  "2024-03-01 12:30:01 host cron[1]: on\n2024-03-01 12:30:01 host sshd[2]: off\n" * 3,
                                  "[2024-03-01 12:30:01] [INFO] a: on\n[2024-03-01 12:30:01] [WARN] b: off\n" * 3])
def test_a_diary_and_a_log_are_no_chat(text):
    touch("empty.txt", text="")
    assert not [*rows_of("empty.txt", How())]
    touch("a.txt", text=text)
    assert [row.value for row in rows_of("a.txt", How())] == [{"text": text}]


@pytest.mark.parametrize("text", ["Roses are red, violets blue,\nsugar is sweet, and so on,\nand on, and on,\n", "a,b\n1,2\n",
                                  "\ttabs before\n\ta line\n\tare code\n", '{"a": 1}, and so on\n{"a": 1}\nplain\n'])
def test_sentences_are_no_table(text):
    touch("a.txt", text=text)
    assert [row.value for row in rows_of("a.txt", How())] == [{"text": text}]


def test_texts_beside_data_are_left_to_be_named():
    touch("d/a.jsonl")
    touch("d/README.md", "d/notes.txt", "only/b.md", "only/LICENSE.txt", "about/README.md", text="Words.\n")
    said = Said()
    assert found("d", "only", said=said) == ["d/a.jsonl", "only/b.md"]
    assert said.notes == ["d: 1 data file; 2 others passed over (.md, .txt); texts beside data are learned where they are "
                          "named, such as d/notes.txt", "only: 1 data file; 1 other passed over (.txt)"]
    said = Said()
    assert found("d", said=said, how=How(format="messages")) == ["d/a.jsonl"]
    assert said.notes == ["d: 1 data file; 2 others passed over (.md, .txt)"], "of that format a text holds none, named or not"
    assert found("d/*") == ["d/a.jsonl"] and found("d/*.md") == ["d/README.md"]
    assert found("d", "d/notes.txt") == ["d/a.jsonl", "d/notes.txt"]
    assert found("d", how=How(format="text")) == ["d/README.md", "d/a.jsonl", "d/notes.txt"]
    assert ".txt or .md" in refused("about").hint


def test_rows_in_a_file_of_another_name_are_rows():
    write_rows(Path("rows.txt"), rows(3))
    assert values("rows.txt") == rows(3)
    touch("mixed.txt", text='a comment\n{"a": 1}\n')
    assert values("mixed.txt") == ["a comment", {"a": 1}]


def test_standard_input_may_be_plain_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Once upon a time.\n")))
    [source] = find_sources(["-"], Path("keep"))
    with pytest.raises(UserError, match="(?m)^<stdin> is plain text, and has no rows$"):
        list(read_blocks(source))


def test_what_prepare_left_out_is_no_data_also_beside_no_manifest(cli, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("work").mkdir()
    bad = write_rows(Path("work/chats.jsonl"), [{"nothing": 1}] * 3)
    assert cli("prepare", bad, "--model", tiny, "--run", "work/run").code == 2
    left = Path("work/run/rejected.jsonl")
    assert left.stat().st_size and not (left.parent / "manifest.json").exists()
    said = Said()
    assert found("work", said=said) == ["work/chats.jsonl"] and "rejected.jsonl" in " ".join(said.notes)
    # Repaired rows under that name are data, and so is the file where it is named.
    write_rows(Path("work/rejected.jsonl"), [{"messages": []}])
    assert found("work") == ["work/chats.jsonl", "work/rejected.jsonl"]


def test_the_report_of_a_runs_data_is_none_of_its_rows(cli, tiny, data):
    assert cli("prepare", data, "--model", tiny, "--run", "run").code == 0
    Path("run/data").rename("data")
    said = Said()
    assert found("data", said=said) == ["data/train.jsonl"] and "report.json" in " ".join(said.notes)
    assert found("data", held_out=True) == ["data/valid.jsonl"]
    Path("data/report.json").write_text(json.dumps(rows(3)))  # of another program, which has rows in it
    assert found("data") == ["data/report.json", "data/train.jsonl"]


def test_rows_that_are_refused_for_another_reason_leave_no_list_of_bad_ones(cli, tiny, tmp_path):
    good = write_rows(tmp_path / "one.jsonl", rows(1))
    assert cli("prepare", good, "--model", tiny, "--valid", 5, "--run", "run").code == 2
    assert not Path("run/rejected.jsonl").exists()


CARD = """---
license: mit
configs:
- config_name: en
  data_files:
  - split: train
    path: data/en-*.jsonl
  - split: held_out_test
    path: [data/last.jsonl]
- config_name: zh
  data_files: zh/**
- config_name: gone
  data_dir: gone
%s---
# A dataset
"""


def test_of_a_dataset_with_configurations_the_default_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/data/en-0.jsonl", "d/data/en-1.jsonl", "d/data/last.jsonl", "d/zh/a/b.jsonl", "d/other.jsonl")
    touch("d/README.md", text=CARD % "")
    error = refused("d")
    assert "`en` with data/en-0.jsonl, `zh` with zh/a/b.jsonl" in str(error) and error.hint == "name the files of one, such as d/data/en-0.jsonl"
    touch("d/README.md", text=CARD.replace("en\n", "en\n  default: true\n") % "")
    said = Said()
    assert found("d", said=said) == ["d/data/en-0.jsonl", "d/data/en-1.jsonl"]
    assert said.notes == ["d: 2 data files of the configuration `en`, by its README.md; 1 other passed over (.md)"]
    assert "not read, as they are of other configurations (zh): other.jsonl, zh/a/b.jsonl" in said.warnings[0]
    assert "not trained on" in said.warnings[1]
    assert found("d", held_out=True) == ["d/data/last.jsonl"]
    touch("d/README.md", text=CARD.replace("zh\n", "default\n") % "")
    assert found("d") == ["d/zh/a/b.jsonl"]


@pytest.mark.parametrize("card", [
    "# Notes", "---\nconfigs: [\n---\n", "---\n- a\n---\n", "---\nconfigs: en\n---\n", "---\nconfigs:\n- config_name: x\n---\n",
    *(f"---\nx: {value}\nconfigs:\n- config_name: x\n  data_files: a.jsonl\n---\n" for value in (
        '!!int ""', "!!bool no one", "!!timestamp then", "[" * 1500)),
    "---\nconfigs:\n- config_name: x\n  data_files: [/a.jsonl, ../b.jsonl, '**a', '', 7, {split: train}]\n---\n", "---\nlicense: mit\n---\n"])
def test_a_readme_of_anything_else_says_nothing_of_files(card, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/a.jsonl", "d/b.jsonl")
    touch("d/README.md", text=card)
    assert found("d") == ["d/a.jsonl", "d/b.jsonl"]


def test_the_only_configuration_is_read_as_it_names_its_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/x/test-run.jsonl", "d/notes.jsonl")
    touch("d/README.md", text="---\nconfigs:\n- config_name: mine\n  data_dir: x\n---\n")
    said = Said()
    assert found("d", said=said) == ["d/x/test-run.jsonl"] and "of no configuration: notes.jsonl" in said.warnings[0]


def test_of_a_configuration_that_names_a_directory_the_files_name_the_splits(tmp_path, monkeypatch):
    """As `datasets` has it, also that other files stand in that directory, and that all files are of one without any."""
    monkeypatch.chdir(tmp_path)
    touch("d/train/x/train.jsonl", "d/train/x/test.jsonl", "d/last.jsonl")
    touch("d/README.md", text="---\nconfigs:\n- config_name: mine\n  data_dir: train/x\n---\n")
    assert found("d") == ["d/train/x/train.jsonl"] and found("d", held_out=True) == ["d/train/x/test.jsonl"]
    touch("d/README.md", text="---\nconfigs:\n- config_name: mine\n  data_dir: train/x\n  data_files: test.jsonl\n---\n")
    assert found("d") == ["d/train/x/test.jsonl"]
    touch("d/README.md", text="---\nconfigs:\n- config_name: default\n- config_name: last\n  data_files: last.jsonl\n---\n")
    touch("d/a/validation.jsonl")
    assert found("d") == ["d/last.jsonl", "d/train/x/test.jsonl", "d/train/x/train.jsonl"], "the place is called train, and not test"
    touch("d/README.md", text="---\nconfigs:\n- config_name: default\n  data_files: gone\n- config_name: 1\n  data_files: last.jsonl\n"
                              "- config_name: 2\n  data_files: train/x/*\n---\n")
    assert "none of them is the default: `1` with last.jsonl, `2` with train/x/test.jsonl" in str(refused("d"))


def test_a_readme_that_names_itself_a_million_times_takes_no_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch("d/a.jsonl", "d/b.jsonl")
    lists = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10 if n else 'x')}]" for n in range(7))
    touch("d/README.md", text=f"---\n{lists}\nconfigs:\n- config_name: *l6\n  data_files:\n  - split: *l6\n    path: a.jsonl\n---\n")
    said = Said()
    assert found("d", said=said) == ["d/a.jsonl"] and all(len(text) < 200 for text in (*said.notes, *said.warnings))


def test_of_pictures_alone_it_is_told_where_questions_about_them_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("photos/a/1.JPG", "photos/b.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    error = refused("photos")
    row = '{"file_name": "a/1.JPG", "question": "…", "answer": "…"}'
    assert error.message.startswith("photos is a directory without data files")
    assert error.hint == f"write what is asked about its pictures into {Path('photos/metadata.jsonl')}, a line each: {row}"
