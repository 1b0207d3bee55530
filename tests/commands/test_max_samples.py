"""``prepare --max-samples``: so many rows of each DATA argument, from all over it, the same ones again, and said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gemma_tune.data.reading.sources import find_sources, read_blocks
from gemma_tune.prepare import passes
from support.command import invoke, write_rows
from support.hub import LoopbackHub
from support.prepared import DATA, alpaca, contents, prepared, questions, read, report, row

COUNT, MOST = 200, 20


def numbered(count: int = COUNT, name: str = "q") -> list[dict[str, Any]]:
    return [alpaca(f"{name}{n}", f"answer {n}") for n in range(count)]


def numbers(side: str = "train", name: str = "q") -> list[int]:
    return [int(question.removeprefix(name)) for question in questions(side) if question.startswith(name)]


def said(done: dict[str, Any]) -> str:
    return " ".join(done["err"].split())


# --- which rows

def _json(path: Path) -> None:
    path.write_text(json.dumps(numbered(), indent=1))


def _wrapped(path: Path) -> None:
    path.write_text(json.dumps({"name": "set", "data": numbered()}))


def _csv(path: Path) -> None:
    path.write_text("instruction,output\n" + "".join(f"q{n},answer {n}\n" for n in range(COUNT)))


def _gz(path: Path) -> None:
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, numbered())).encode()))


def _parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(numbered()), path, row_group_size=70)


def _arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as f, pa.ipc.new_stream(f, pa.Table.from_pylist(numbered()).schema) as writer:
        writer.write_table(pa.Table.from_pylist(numbered()), max_chunksize=33)


def _folder(path: Path) -> None:
    path.mkdir()
    for n, part in enumerate((numbered()[:50], numbered()[50:51], numbered()[51:])):
        write_rows(path / f"part-{n}.jsonl", part)


KINDS = {"a.jsonl": lambda path: write_rows(path, numbered()), "a.json": _json, "wrapped.json": _wrapped, "a.csv": _csv,
         "a.jsonl.gz": _gz, "a.parquet": _parquet, "a.arrow": _arrow, "folder": _folder}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(passes, "_BLOCK", 700)


@pytest.mark.parametrize("name", KINDS)
def test_so_many_rows_are_drawn_from_all_over_it_whatever_it_is(prepare, small_blocks, name):
    KINDS[name](Path(name))
    done = prepare(name, "--max-samples", MOST, "--valid", 0)
    drawn = numbers()
    assert len(drawn) == MOST == len(set(drawn)) and drawn == sorted(drawn), "the order of the source is kept"
    assert min(drawn) < COUNT // 4 and max(drawn) > COUNT * 3 // 4
    assert f"{name}: 20 of 200 rows drawn (--max-samples 20)" in said(done)
    assert report()["drawn"] == done["summary"]["drawn"] == [{"data": name, "rows": MOST, "of": COUNT}]
    write_rows(Path("same.jsonl"), numbered())
    prepare("same.jsonl", "--max-samples", MOST, "--valid", 0)
    assert numbers() == drawn, "which rows they are depends on where they stand alone"


@pytest.mark.parametrize("name", KINDS)
def test_blocks_know_how_many_rows_they_have(name):
    KINDS[name](Path(name))
    for size in (100, 1 << 20):
        blocks = [block for source in find_sources([name], Path("keep")) for block in read_blocks(source, size)]
        assert [block.count() for block in blocks] == [len(list(block.rows())) for block in blocks]
        assert sum(block.count() for block in blocks) == COUNT


def test_standard_input_and_a_dataset_of_the_hub(prepare, tmp_path, monkeypatch):
    write_rows(Path("a.jsonl"), numbered())
    prepare("a.jsonl", "--max-samples", MOST, "--valid", 0)
    drawn = numbers()
    done = prepare("-", "--max-samples", MOST, "--valid", 0, stdin=Path("a.jsonl").read_text())
    assert numbers() == drawn and "<stdin>: 20 of 200 rows drawn" in said(done)
    with LoopbackHub() as hub:
        hub.isolate(monkeypatch, tmp_path / "home")
        hub.isolate_datasets(monkeypatch, tmp_path / "home")
        (tmp_path / "repo" / "data").mkdir(parents=True)
        write_rows(tmp_path / "repo" / "data" / "train.jsonl", numbered())
        hub.add_repo("datasets/org/large", tmp_path / "repo")
        done = prepare("hf:org/large", "--max-samples", MOST, "--valid", 0)
        assert numbers() == drawn and "hf:org/large: 20 of 200 rows drawn" in said(done)
        assert done["summary"]["drawn"] == [{"data": "hf:org/large", "rows": MOST, "of": COUNT}]


def test_of_each_argument_so_many_and_a_small_one_stays_whole(prepare):
    write_rows(Path("large.jsonl"), numbered())
    write_rows(Path("small.jsonl"), numbered(5, "small "))
    _folder(Path("folder"))
    for path in Path("folder").iterdir():
        path.write_text(path.read_text().replace('"q', '"f'))
    done = prepare("large.jsonl", "small.jsonl", "folder", "--max-samples", MOST, "--valid", 0)
    assert [len(numbers(name=name)) for name in ("q", "small ", "f")] == [MOST, 5, MOST]
    assert done["err"].count("drawn (") == 2 and "small.jsonl:" not in done["err"], "of a small one there is nothing to say"
    assert report()["drawn"] == [{"data": "large.jsonl", "rows": MOST, "of": COUNT}, {"data": "small.jsonl", "rows": 5, "of": 5},
                                 {"data": "folder", "rows": MOST, "of": COUNT}]
    assert [file["rows"] for file in report()["files"]][:2] == [MOST, 5] and sum(
        file["rows"] for file in report()["files"]) == 2 * MOST + 5
    drawn = numbers()
    prepare("small.jsonl", "large.jsonl", "--max-samples", MOST, "--valid", 0)
    assert numbers() == drawn, "what is named beside it does not matter"


def test_a_larger_number_keeps_the_rows_of_a_smaller_one_and_a_seed_draws_others(prepare):
    write_rows(Path("a.jsonl"), numbered())
    found = {}
    for most, seed in ((10, 42), (40, 42), (10, 7), (COUNT, 42), (10 ** 9, 42)):
        done = prepare("a.jsonl", "--max-samples", most, "--seed", seed, "--valid", 0)
        found[most, seed] = numbers()
        assert ("drawn" in done["err"]) == (most < COUNT)
    assert set(found[10, 42]) < set(found[40, 42]) and found[10, 42] != found[10, 7]
    assert found[COUNT, 42] == found[10 ** 9, 42] == list(range(COUNT)), "with more than there are nothing is said, or left out"
    write_rows(Path("b.jsonl"), numbered(COUNT + 20))
    prepare("b.jsonl", "--max-samples", 40, "--valid", 0)
    assert len(set(found[40, 42]) - set(numbers())) <= 10, "rows behind the others move few of them"


def test_several_processes_draw_the_same(prepare, small_blocks, monkeypatch):
    write_rows(Path("a.jsonl"), numbered())
    prepare("a.jsonl", "--max-samples", MOST)
    one = contents(DATA)
    monkeypatch.setattr(passes, "_processes", lambda *_: 2)
    prepare("a.jsonl", "--max-samples", MOST, "--force")
    assert contents(DATA) == one


def test_a_name_that_a_file_for_validation_has_too_is_that_of_the_data(prepare):
    for folder in ("train", "held"):
        Path(folder).mkdir()
        write_rows(Path(folder, "a.jsonl"), numbered(COUNT, folder))
    done = prepare("train/a.jsonl", "--max-samples", f"a.jsonl={MOST}", "--valid", "held/a.jsonl")
    assert done["summary"]["drawn"] == [{"data": "a.jsonl", "rows": MOST, "of": COUNT}]


# --- what comes after it

def test_only_rows_that_are_drawn_are_checked(prepare):
    bad = [{"bad": n} for n in range(COUNT)]
    write_rows(Path("a.jsonl"), [value for pair in zip(numbered(), bad) for value in pair])
    done = prepare("a.jsonl", "--max-samples", MOST, "--valid", 0)
    summary = done["summary"]
    assert summary["rows"] == MOST and 0 < summary["rejected_rows"] < MOST and summary["train_rows"] == MOST - summary["rejected_rows"]
    for rejected in read("rejected"):
        assert rejected["line"] % 2 == 0 and rejected["row"] == bad[rejected["line"] // 2 - 1], "its line is that of the file"


def test_duplicates_and_the_split_are_those_of_the_drawn_rows(prepare):
    write_rows(Path("a.jsonl"), numbered(30) * 10)
    summary = prepare("a.jsonl", "--max-samples", 100, "--valid", 10)["summary"]
    assert (summary["rows"], summary["valid_rows"]) == (100, 10)
    assert summary["duplicate_rows"] == 90 - summary["train_rows"] > 60


def test_a_validation_file_is_taken_whole(prepare):
    write_rows(Path("a.jsonl"), numbered())
    write_rows(Path("held-out.jsonl"), numbered(50, "held "))
    done = prepare("a.jsonl", "--max-samples", MOST, "--valid", "held-out.jsonl")
    assert len(numbers("valid", "held ")) == 50 and len(numbers()) == MOST
    assert done["summary"]["drawn"] == [{"data": "a.jsonl", "rows": MOST, "of": COUNT}]


def test_pairs_and_texts(prepare):
    write_rows(Path("pairs.jsonl"), [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(COUNT)])
    summary = prepare("pairs.jsonl", "--max-samples", MOST)["summary"]
    assert (summary["kind"], summary["rows"], summary["sequences"]) == ("pairs", MOST, 2 * MOST)
    Path("notes").mkdir()
    for n in range(30):
        Path(f"notes/{n:02}.md").write_text(f"Note {n}.")
    prepare("notes", "--format", "text", "--max-samples", 10, "--valid", 0)
    texts = [value["text"] for value in read("train")]
    assert len(texts) == 10 and texts == sorted(texts, key=lambda text: int(text[5:-1]))


# --- again

def test_another_number_prepares_anew_and_so_does_none(tiny):
    write_rows(Path("a.jsonl"), numbered())

    def again(*args: object, code: int = 0) -> dict[str, Any]:
        result = invoke("prepare", *args, "--model", tiny, "--json")
        assert result.code == code, result.err
        return result.json | {"err": result.err}

    assert again("a.jsonl", "--max-samples", 10)["status"] == "done"
    for args in (("a.jsonl", "--max-samples", 10), ()):
        done = again(*args)
        assert (done["status"], done["summary"]["rows"]) == ("up-to-date", 10)
    assert "settings as before: max_samples 10" in said(done)
    done = again("--max-samples", 30)
    assert (done["status"], done["summary"]["rows"]) == ("done", 30) and "max_samples: 10 -> 30" in said(done)
    status = invoke("status", "--run", "runs/tiny-gemma")
    assert "30 of 200 rows of a.jsonl drawn" in " ".join(status.err.split())
    done = again("a.jsonl")
    assert (done["status"], done["summary"]["rows"]) == ("done", COUNT) and "max_samples: 30 -> not set" in said(done)
    assert done["summary"]["drawn"] == report()["drawn"] == []
    assert "drawn" not in invoke("status", "--run", "runs/tiny-gemma").err


@pytest.mark.parametrize("value", ["0", "-1", "0.5", "many", "20%", "a.jsonl=0", "a.jsonl=-1", "a.jsonl=120%", "a.jsonl=",
                                   "a.jsonl=5,a.jsonl=6", "=5"])
def test_what_is_no_number_of_rows_is_refused(cli, tiny, value):
    write_rows(Path("a.jsonl"), [row()])
    for command in ("prepare", "run"):
        result = cli(command, "a.jsonl", "--model", tiny, f"--max-samples={value}")
        assert result.code == 2 and "Hint" in result.err and not Path("runs").exists()
        assert "max_samples: " in result.err


def test_the_manifest_tells_no_directories(tiny, tmp_path):
    (tmp_path / "private").mkdir()
    path = write_rows(tmp_path / "private" / "a.jsonl", numbered())
    done = prepared(tiny, path, "--max-samples", 10)
    assert done["summary"]["drawn"] == [{"data": "a.jsonl", "rows": 10, "of": COUNT}]
    assert f"{path}: 10 of 200 rows drawn" in said(done), "the message tells which of several files of one name it is"


# --- of one DATA, and by shares

def three() -> None:
    write_rows(Path("mine.jsonl"), numbered(80, "m"))
    write_rows(Path("general.jsonl"), numbered(500, "g"))
    write_rows(Path("more.jsonl"), numbered(30, "x"))


@pytest.mark.parametrize(("most", "taken"), [
    ("general.jsonl=15", (80, 15, 30)), ("25,general.jsonl=300", (25, 300, 25)), ("general.jsonl=15,mine.jsonl=7", (7, 15, 30)),
    ("general.jsonl=20%", (80, 28, 30)), ("25,general.jsonl=50%", (25, 50, 25)), ("general.jsonl=12.5%,mine.jsonl=40", (40, 10, 30)),
    ("general.jsonl=50%,mine.jsonl=40%,more.jsonl=10%", (80, 100, 20)), ("./general.jsonl=15", (80, 15, 30))])
def test_so_many_of_one_or_its_share_of_all_that_are_taken(prepare, most, taken):
    three()
    done = prepare("mine.jsonl", "general.jsonl", "more.jsonl", "--max-samples", most, "--valid", 0)
    drawn = {part["data"]: (part["rows"], part["of"]) for part in done["summary"]["drawn"]}
    assert drawn == {"mine.jsonl": (taken[0], 80), "general.jsonl": (taken[1], 500), "more.jsonl": (taken[2], 30)}
    assert tuple(len(numbers(name=name)) for name in "mgx") == taken, "what is reported is what is there"
    first = numbers(name="g")
    prepare("general.jsonl", "--max-samples", taken[1], "--valid", 0)
    assert numbers(name="g") == first, "the same rows, whatever stands beside them"


def test_a_share_that_cannot_be_had_is_said(prepare):
    three()
    done = prepare("mine.jsonl", "more.jsonl", "--max-samples", "more.jsonl=60%", "--valid", 0)
    assert "more.jsonl: all of its 30 rows make 27.3% of what is taken, less than the share of 60%" in said(done)


def test_names_are_kept_without_directories_and_mean_the_same_again(tiny, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_rows(tmp_path / folder / "a.jsonl", numbered(60, folder))
    args = [tmp_path / "one" / "a.jsonl", tmp_path / "two" / "a.jsonl", "example:pairs", "--take", "chosen",
            "--max-samples", "two/a.jsonl=5", "--max-samples", "example:pairs=3", "--valid", "0"]
    done = prepared(tiny, *args)
    assert [part["rows"] for part in done["summary"]["drawn"]] == [60, 5, 3]
    recorded = json.loads(Path("runs/tiny-gemma/manifest.json").read_text())["stages"]["prepare"]["config"]["max_samples"]
    assert recorded == {"value": "two/a.jsonl=5,pairs.jsonl=3", "from": "flag"}
    again = invoke("prepare", "--model", tiny, "--json")
    assert again.json["status"] == "up-to-date", again.err
    again = invoke("prepare", "--model", tiny, "--json", "--force")
    assert [part["rows"] for part in again.json["summary"]["drawn"]] == [60, 5, 3], again.err


def test_shares_are_recorded_to_their_last_digit(tiny):
    three()
    thirds = "mine.jsonl=33.333333%,general.jsonl=33.333333%,more.jsonl=33.333334%"
    done = prepared(tiny, "mine.jsonl", "general.jsonl", "more.jsonl", "--max-samples", thirds, "--valid", "0")
    assert [part["rows"] for part in done["summary"]["drawn"]] == [30, 30, 30] and thirds in said(done)
    again = invoke("prepare", "--model", tiny, "--json", "--force")
    assert again.code == 0 and again.json["summary"]["drawn"] == done["summary"]["drawn"], again.err


def test_standard_input_by_its_name(tiny):
    three()
    args = ("prepare", "mine.jsonl", "-", "--model", tiny, "--max-samples", "-=20%", "--valid", "0", "--json")
    done = invoke(*args, stdin=Path("general.jsonl").read_text())
    assert [part["rows"] for part in done.json["summary"]["drawn"]] == [80, 20], done.err
    again = invoke("prepare", "--model", tiny, "--json", "--force")
    assert [part["rows"] for part in again.json["summary"]["drawn"]] == [80, 20], again.err


@pytest.mark.parametrize(("most", "reason"), [
    ("genral.jsonl=5", "genral.jsonl is not among the DATA; did you mean `general.jsonl`?"),
    ("general.jsonl=60%,mine.jsonl=40%", "the shares of all DATA are 100% together"),
    ("general.jsonl=60%,mine.jsonl=20%,more.jsonl=10%", "the shares of all DATA are 100% together"),
    ("a.jsonl=5", "a.jsonl may be one/a.jsonl or two/a.jsonl")])
def test_names_that_mean_nothing_and_shares_that_do_not_go_together(cli, tiny, most, reason):
    three()
    for folder in (Path("one"), Path("two")):
        folder.mkdir()
        write_rows(folder / "a.jsonl", numbered(60, folder.name))
    data = ["mine.jsonl", "general.jsonl", "more.jsonl", *(["one/a.jsonl", "two/a.jsonl"] if "a.jsonl may" in reason else [])]
    result = cli("prepare", *data, "--model", tiny, "--max-samples", most)
    assert result.code == 2 and reason in " ".join(result.err.split()) and "Hint" in result.err


def test_settings_in_a_file(prepare):
    three()
    Path("s.yaml").write_text("prepare:\n  max_samples: general.jsonl=20%\n")
    done = prepare("mine.jsonl", "general.jsonl", "--config", "s.yaml", "--valid", 0)
    assert [part["rows"] for part in done["summary"]["drawn"]] == [80, 20]
    Path("s.yaml").write_text("prepare:\n  max_samples: 10\n")
    done = prepare("mine.jsonl", "general.jsonl", "--config", "s.yaml", "--valid", 0)
    assert [part["rows"] for part in done["summary"]["drawn"]] == [10, 10]
