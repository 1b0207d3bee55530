"""Rows with pictures: where these are found, what becomes of those that cannot be used, and what a run keeps of them."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from gemma_tune.data.conversations import kept_pictures as module
from gemma_tune.prepare import passes
from support.command import MANIFEST_SCHEMA, invoke, rows, write_rows
from support.models import make_seeing
from support.picture_files import as_bytes, drawn, moving, name_of, prepared_row, save, shown, turned
from support.prepared import DATA, contents, read, report

RUN = DATA.parent


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> Path:
    return make_seeing(tmp_path_factory.mktemp("seeing") / "tiny-gemma")


@pytest.fixture
def learn(seeing):
    """``prepare`` these rows: the JSON result or error, and ``err``. A manifest has its exact form."""
    def learn(*args: object, code: int = 0, stdin: str | None = None) -> dict[str, Any]:
        result = invoke("prepare", *args, "--model", seeing, "--valid", 0, "--json", stdin=stdin)
        assert result.code == code, result.err
        assert "Traceback" not in result.err
        if code == 0:
            jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)
        return (result.json if code == 0 else result.json["error"]) | {"err": result.err}

    return learn


def kept() -> set[str]:
    """The pictures of the run."""
    return {path.name for path in (DATA / "pictures").iterdir()}


def status(*flags: str) -> Any:
    done = invoke("status", "--run", RUN, "--json", *flags)
    return done.json["stages"]["prepare"]["state"], done.code


# --- what is kept

def test_pictures_are_kept_as_they_were_under_the_hash_of_their_bytes(learn):
    files = {"img/a.png": as_bytes(drawn()), "img/b.jpg": turned(), "c.webp": as_bytes(drawn(1), "WEBP"), "d.gif": as_bytes(drawn(2), "GIF"),
             "e.png": as_bytes(drawn(3), "BMP")}
    for path, content in files.items():
        save(Path("data") / path, content)
    inside = as_bytes(drawn(4), "TIFF")
    write_rows(Path("data/rows.jsonl"), [shown(path, question=f"What is {path}?") for path in files] + [shown(inside, "img/a.png")])
    done = learn("data/rows.jsonl")
    endings = dict(zip(files, (".png", ".jpg", ".webp", ".gif", ".bmp"), strict=True))
    names = {path: name_of(content, endings[path]) for path, content in files.items()} | {"inside": name_of(inside, ".tif")}
    assert {path.name: path.read_bytes() for path in (DATA / "pictures").iterdir()} == {
        names[path]: content for path, content in (files | {"inside": inside}).items()}
    assert read("train") == [*(prepared_row(names[path], question=f"What is {path}?") for path in files),
                             prepared_row(names["inside"], names["img/a.png"])]
    size = sum(map(len, (*files.values(), inside)))
    figures = {"picture_rows": 6, "pictures": 6, "picture_bytes": size, "picture_tokens": 28}
    assert figures.items() <= report().items() and figures.items() <= done["summary"].items()
    assert done["artifacts"]["pictures"] == str(DATA / "pictures")
    assert "rows with pictures" in done["err"] and "6 rows with 6 pictures" in invoke("status", "--run", RUN).err


def test_text_alone_leaves_no_trace_of_pictures(learn):
    write_rows(Path("rows.jsonl"), rows(3))
    done = learn("rows.jsonl")
    assert not (DATA / "pictures").exists() and "pictures" not in done["artifacts"]
    assert not [name for name in (*report(), *done["summary"]) if "picture" in name]


def test_only_those_of_rows_that_are_used_stay(learn):
    for name in ("a", "long", "bad"):
        save(f"{name}.png")
    save("broken.png", b"no picture")
    write_rows(Path("rows.jsonl"), [shown("a.png"), shown("a.png"), shown("long.png", answer="word " * 200),
                                    shown("bad.png", "broken.png"), *rows(4)])
    learn("rows.jsonl", "--max-length", 100, "--max-rejected", 0.5)
    assert kept() == {name_of(Path("a.png").read_bytes())}
    assert [record["row"]["messages"][0]["content"][0] for record in read("rejected")] == [
        {"type": "image", "path": "long.png"}, {"type": "image", "path": "bad.png"}], "rows are kept as they were"
    assert read("rejected")[0]["fix"].endswith("or shorten the conversation, or make its pictures smaller or fewer")
    assert [record["row"] for record in read("duplicates")] == [prepared_row(*kept())]
    write_rows(Path("rows.jsonl"), rows(4))
    learn("rows.jsonl")
    assert not (DATA / "pictures").exists()


def test_several_processes_keep_a_picture_once(learn, monkeypatch):
    monkeypatch.setattr(passes, "_processes", lambda sources, total: 3)
    monkeypatch.setattr(passes, "_BLOCK", 500)
    for n in range(4):
        save(f"{n}.png", as_bytes(drawn(n)))
    write_rows(Path("rows.jsonl"), [shown(f"{n % 4}.png", question=f"What is {n}?") for n in range(60)])
    assert learn("rows.jsonl")["summary"]["picture_rows"] == 60
    assert kept() == {name_of(as_bytes(drawn(n))) for n in range(4)}


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_picture_in_the_place_of_data_says_how_it_is_named_in_a_row(learn, format):
    """By a row that is learned as soon as it is written."""
    save("img/a.png", as_bytes(drawn(), format))
    refused = learn("img/a.png", code=2)
    assert refused["message"].startswith("img/a.png")
    said, row = refused["hint"].split(": {", 1)
    assert said == "it is a picture: write what is asked about it into a .jsonl file beside it, a line each"
    Path("img/rows.jsonl").write_text("{" + row + "\n")
    assert learn("img/rows.jsonl")["summary"]["pictures"] == 1


def test_a_picture_is_decoded_once(learn, monkeypatch):
    looked, plain = [], module.examined
    monkeypatch.setattr(module, "examined", lambda content: looked.append(content) or plain(content))
    save("a.png", as_bytes(drawn(1)))
    save("same.png", as_bytes(drawn(1)))
    save("broken.png", b"no picture")
    write_rows(Path("rows.jsonl"), [shown(name, question=f"{n} and {name}?") for n in range(3) for name in ("a.png", "same.png", "broken.png")]
               + [shown(as_bytes(drawn(1)))])
    learn("rows.jsonl", "--max-rejected", 0.5)
    assert looked == [as_bytes(drawn(1)), b"no picture"]
    assert {record["reason"] for record in read("rejected")} == {
        "the picture 'broken.png' of turn 1 is text, and no PNG, JPEG, WebP, GIF, BMP or TIFF"}


# --- what cannot be used

def test_each_fault_is_told_with_the_path_as_written(learn):
    Path("img").mkdir()
    save("cut.jpg", turned()[:300])
    save("page.png", b"<!DOCTYPE html>")
    faults = {"gone.png": ("no_picture", "is not below the working directory"), "img": ("picture", "is a folder"),
              "cut.jpg": ("picture", "is damaged, or cut off"), "./page.png": ("picture", "is a web page")}
    save("good.png")
    write_rows(Path("rows.jsonl"), [*map(shown, faults), shown("good.png"), shown("gone.png", "cut.jpg"),
                                    {"messages": [{"role": "user", "content": [{"type": "image", "base64": "AAAAA"}, {"type": "text", "text": "?"}]},
                                                  {"role": "assistant", "content": "!"}]}])
    learn("rows.jsonl", "--max-rejected", 0.9)
    found = read("rejected")
    for record, (path, (code, said)) in zip(found, faults.items()):
        assert record["code"] == code and record["reason"].startswith(f"the picture {path!r} of turn 1 {said}"), record
    assert [len(record.get("others", ())) for record in found] == [0, 0, 0, 0, 1, 0]
    assert found[-1]["reason"].startswith("the picture of turn 1 is not Base64")
    assert report()["first_rejected"] == {"no_picture": "rows.jsonl:1", "picture": "rows.jsonl:2"}


def test_a_folder_that_is_not_there_ends_in_one_hint(learn):
    write_rows(Path("rows.jsonl"), [shown(f"img/{n}.png") for n in range(30)])
    error = learn("rows.jsonl", code=2)
    assert error["problems"][0] == "none of the 30 pictures that rows name is below the working directory"
    assert error["hint"] == "name the folder in which their paths begin: --pictures DIR"
    save("here/data/img/0.png")
    Path("here/data/train").mkdir()
    shutil.move("rows.jsonl", "here/data/train/rows.jsonl")
    error = learn("here/data/train/rows.jsonl", code=2)
    assert error["hint"] == "name the folder in which their paths begin: --pictures here/data"
    assert (RUN / "rejected.jsonl").exists()


def test_the_same_is_told_where_few_rows_have_pictures(learn):
    write_rows(Path("rows.jsonl"), [*rows(12), shown("a.png")])
    assert "the only picture that a row names is not below the working directory; name the folder" in learn("rows.jsonl")["err"]
    write_rows(Path("rows.jsonl"), [*rows(12), shown("a.png"), *(shown(f"{n}.png") for n in range(5))])
    error = learn("rows.jsonl", code=2)
    assert error["hint"] == "name the folder in which their paths begin: --pictures DIR"


def test_where_some_are_there_each_is_named(learn):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png"), shown("b.png"), shown("c.png")])
    error = learn("rows.jsonl", code=2)
    assert not [line for line in error["problems"] if "none of" in line] and "--max-rejected" in error["hint"]


def test_a_model_that_takes_text_alone(tiny):
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    failed = invoke("prepare", "rows.jsonl", "--model", tiny, "--json")
    assert failed.code == 2 and "the row has a picture, and tiny-gemma takes text alone" in failed.json["error"]["problems"][0]
    assert "google/gemma-3-4b-it" in failed.json["error"]["hint"]
    write_rows(Path("rows.jsonl"), [shown("a.png"), *rows(5)])
    assert invoke("prepare", "rows.jsonl", "--model", tiny, "--json").json["summary"]["rejected_by_reason"] == {"pictures": 1}


def test_a_model_of_which_a_file_is_missing(seeing):
    shutil.copytree(seeing, "blind", ignore=shutil.ignore_patterns("preprocessor_config.json"))
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    failed = invoke("prepare", "rows.jsonl", "--model", "blind")
    assert failed.code == 2 and "the row has a picture, and nothing can be learned from it with blind: its folder has no preprocessor_config.json" in failed.err


def test_animations_are_told_once(learn):
    save("a.gif", moving())
    save("b.webp", moving("WEBP"))
    save("c.png")
    write_rows(Path("rows.jsonl"), [shown("c.png"), *(shown("a.gif", "b.webp", question=f"{n}?") for n in range(3))])
    said = learn("rows.jsonl")["err"]
    assert said.count("of several frames") == 1
    assert "3 rows have a picture of several frames or pages, of which the model is shown the first; the first such row is rows.jsonl:2" in said


# --- where they lie

def test_a_folder_that_is_named_is_found_again(learn):
    content = save("pictures of mine/img/a.png")
    write_rows(Path("rows.jsonl"), [shown("img/a.png")])
    assert "--pictures" in learn("rows.jsonl", code=2)["hint"]
    learn("rows.jsonl", "--pictures", "pictures of mine")
    assert kept() == {name_of(content)}
    recorded = json.loads((RUN / "manifest.json").read_text())["stages"]["prepare"]["config"]["pictures"]
    assert recorded == {"value": "../../pictures of mine", "from": "flag"}
    again = invoke("prepare", "--run", RUN, "--force", "--json")
    assert again.code == 0 and "settings as before: " in again.err and "pictures pictures of mine" in again.err
    assert invoke("prepare", "--run", RUN, "--json").json["status"] == "up-to-date"
    shutil.rmtree("pictures of mine")
    gone = invoke("prepare", "--run", RUN, "--json")
    assert gone.json["status"] == "up-to-date" and "pictures of mine is gone; what was prepared from it stays" in gone.err
    assert "pictures of mine, is not there" in learn("rows.jsonl", "--pictures", "pictures of mine", code=2)["message"]


def test_a_settings_file_names_the_folder_too(seeing):
    content = save("mine/a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    Path("s.yaml").write_text("prepare: {pictures: mine, valid: 0}\n")
    assert invoke("prepare", "rows.jsonl", "--model", seeing, "--config", "s.yaml").code == 0
    assert kept() == {name_of(content)}


def test_paths_of_standard_input_begin_where_the_command_runs(learn):
    content = save("img/a.png")
    learn("-", stdin=json.dumps(shown("img/a.png")) + "\n")
    assert kept() == {name_of(content)}
    assert invoke("prepare", "--run", RUN, "--force").code == 0, "from the run's own copy"
    assert kept() == {name_of(content)}


def test_what_was_put_right_is_noticed(learn):
    """The same rows and settings, and other files that they name."""
    kinds = [shown(f"{name}.png", question=f"{name}?") for name in ("here", "missing", "broken", "gone")]
    first = {name: save(f"data/{name}.png") for name in ("here", "gone")}
    save("data/broken.png", b"none")
    write_rows(Path("data/rows.jsonl"), kinds)
    prepare = ("data/rows.jsonl", "--max-rejected", 0.5)
    learn(*prepare)
    assert learn(*prepare)["status"] == "up-to-date" and len(kept()) == 2
    missing = save("data/missing.png")
    done = learn(*prepare)
    assert done["status"] == "done" and "`prepare` runs again: 1 picture was put there, or changed, since: data/missing.png" in done["err"]
    assert learn(*prepare)["status"] == "up-to-date"
    for name in ("broken", "here"):
        save(f"data/{name}.png", as_bytes(drawn(50, (51, 20 + len(name)))))
    os.remove("data/gone.png")
    assert "2 pictures were put there, or changed, since, such as data/" in (done := learn(*prepare, code=0))["err"]
    assert kept() == {name_of(missing), *(name_of(as_bytes(drawn(50, (51, 20 + n)))) for n in (4, 6))}
    save("data/gone.png", first["gone"])
    learn(*prepare)
    assert len(kept()) == 4
    os.remove("data/gone.png")
    assert learn(*prepare)["status"] == "up-to-date", "the run has what is gone"
    assert "data/gone.png" not in (DATA / "picture_files.json").read_text() and "../../data" in (DATA / "picture_files.json").read_text()


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"folders": 3}', b'{"folders": ["a"], "files": [[7, "b", 1, 2]]}',
                                    b'{"folders": [null], "files": []}', b'{"folders": ["a"], "files": [[0, null, 1, 2]]}', b"\xff"])
def test_a_damaged_list_of_them_is_passed_over(learn, damage):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    learn("rows.jsonl")
    (DATA / "picture_files.json").write_bytes(damage)
    assert learn("rows.jsonl")["status"] == "up-to-date"


# --- which rows are the same

def test_the_same_question_about_other_pictures_is_another_row(learn):
    for n in range(3):
        save(f"{n}.png", as_bytes(drawn(n)))
    save("copy.png", as_bytes(drawn(0)))
    words = "What is shown in this picture, in one short sentence of simple words, please?"
    write_rows(Path("rows.jsonl"), [shown("0.png", question=words), shown("1.png", question=words), shown("copy.png", question=words),
                                    shown("0.png", "1.png", question=words), shown("1.png", "0.png", question=words),
                                    shown("1.png", question=f"{words}!"), shown("2.png", question=words)])
    learn("rows.jsonl")
    assert [(record["line"], record["same_as"]) for record in read("duplicates")] == [(3, "rows.jsonl:1")]
    learn("rows.jsonl", "--near-duplicates")
    assert [(record["line"], record["same_as"], record["kind"]) for record in read("duplicates")] == [
        (3, "rows.jsonl:1", "exact"), (6, "rows.jsonl:2", "near")]


def test_the_same_question_about_the_same_picture_stays_on_one_side(learn, seeing):
    for n in range(12):
        save(f"{n}.png", as_bytes(drawn(n)))
    write_rows(Path("rows.jsonl"), [shown(f"{n}.png", answer=f"A dot, {m}.") for n in range(12) for m in range(3)])
    assert invoke("prepare", "rows.jsonl", "--model", seeing, "--valid", 0.3).code == 0
    sides = [{row["messages"][0]["pictures"][0]["file"] for row in read(side)} for side in ("train", "valid")]
    assert all(sides) and not sides[0] & sides[1] and report()["pictures_on_both_sides"] == 0
    assert report()["asked_on_both_sides"] == 0


def test_a_picture_on_both_sides_is_told(learn, seeing):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png", question=f"What is {n}?") for n in range(12)])
    said = invoke("prepare", "rows.jsonl", "--model", seeing, "--valid", 0.3)
    assert "1 picture is in training and validation rows" in said.err and report()["pictures_on_both_sides"] == 1


def test_white_space_around_a_question_makes_no_other_one(learn):
    """Gemma's template leaves it out; the picture stands at the same place of what it writes."""
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png", question="What?"), shown("a.png", question="  What? ")])
    learn("rows.jsonl")
    assert len(read("duplicates")) == 1


# --- the run

def test_a_picture_that_was_changed_or_lost_is_found(learn):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    learn("rows.jsonl")
    [picture] = (DATA / "pictures").iterdir()
    assert status() == status("--verify") == ("done", 0)
    content, times = picture.read_bytes(), picture.stat()
    picture.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(picture, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert status() == ("done", 0), "the same name, size and time stamp"
    assert status("--verify") == ("damaged: data/pictures was changed", 1)
    picture.unlink()
    assert status() == ("damaged: data/pictures was changed", 0)
    failed = invoke("train", "--run", RUN)
    assert failed.code == 2 and "data/pictures was changed" in failed.err
    shutil.rmtree(DATA / "pictures")
    assert status() == ("damaged: data/pictures is gone", 0)
    assert "`prepare` runs again: data/pictures is gone" in learn("rows.jsonl")["err"]
    assert status("--verify") == ("done", 0)


def test_a_run_that_was_copied_has_its_pictures(learn):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    learn("rows.jsonl")
    shutil.copytree(RUN, "copy", copy_function=shutil.copyfile)  # with time stamps of its own
    done = invoke("status", "--run", "copy", "--verify", "--json")
    assert done.code == 0 and done.json["stages"]["prepare"]["state"] == "done"


def test_pictures_that_somebody_put_there_are_not_removed(learn):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    learn("rows.jsonl")
    save(DATA / "pictures/mine.png")
    error = learn("rows.jsonl", "--force", code=2)
    assert "pictures/mine.png" in error["message"] and (DATA / "pictures/mine.png").exists()


def test_a_full_disk_leaves_the_earlier_data_whole(learn, monkeypatch):
    for n in range(3):
        save(f"{n}.png", as_bytes(drawn(n)))
    write_rows(Path("rows.jsonl"), [shown("0.png")])
    learn("rows.jsonl")
    before, plain = contents(RUN), Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if ".new-data" in path.parts and "pictures" in path.parts:
            plain(path, content[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(passes, "_processes", lambda sources, total: 2)
    write_rows(Path("rows.jsonl"), [shown(f"{n}.png") for n in range(3)])
    error = learn("rows.jsonl", code=1)
    assert "the disk is full" in error["message"] and "what was finished before is untouched" in error["hint"]
    assert contents(RUN) == before


# --- what the model gets

def test_the_tokens_of_pictures_are_counted(learn):
    """Of the rows that are used alone; the model has four for each picture."""
    save("a.png", as_bytes(drawn(1)))
    save("b.png", as_bytes(drawn(2)))
    write_rows(Path("rows.jsonl"), [shown("a.png"), shown("a.png", "b.png"), shown("a.png"), *rows(2)])
    done = learn("rows.jsonl")
    assert done["summary"]["picture_tokens"] == report()["picture_tokens"] == 12
    assert "tokens of pictures" in done["err"]


def test_what_is_parted_from_its_picture_is_told(learn):
    """Questions about a picture of an earlier turn, which a division leaves without it."""
    save("a.png")
    row = shown("a.png", answer="A dot. " + "word " * 5)
    later = [{"role": "user", "content": "And its colour?"}, {"role": "assistant", "content": "Yellow. " + "word " * 5}]
    write_rows(Path("rows.jsonl"), [{"messages": [*row["messages"], *later, *later]}, *rows(3)])
    divided = learn("rows.jsonl", "--max-length", 80, "--on-long", "split")
    assert divided["summary"]["sequences"] == 6
    assert "2 parts of divided rows are learned without pictures that stand before them: a larger --max-length" in divided["err"]
    for how in (("--max-length", 80, "--on-long", "truncate"), ("--on-long", "split")):
        assert "without pictures" not in learn("rows.jsonl", *how)["err"]


def test_a_picture_in_a_column_that_nobody_reads_is_told(learn, tiny):
    held = {"base64": base64.b64encode(as_bytes(drawn())).decode()}
    asked = [row | {"photo": held if n else [held], "source": "scan.png"} for n, row in enumerate(rows(4))]
    write_rows(Path("rows.jsonl"), [*asked[:3], asked[3] | {"photo": {"base64": "", "path": "a.png"}}])
    assert "3 rows hold a picture in `photo`, which is not read: call it `image`" in learn("rows.jsonl")["err"]
    assert learn("rows.jsonl", "--columns", "turns=messages,images=photo", "--max-rejected", 0.3)["summary"]["picture_rows"] == 3
    blind = invoke("prepare", "rows.jsonl", "--model", tiny, "--run", "blind")
    assert blind.code == 0 and "hold a picture" not in blind.err, "which that model could not learn"


def test_a_preview_shows_where_pictures_stand(learn):
    save("a.png")
    write_rows(Path("rows.jsonl"), [shown("a.png")])
    said = learn("rows.jsonl", "--preview", 1)["err"]
    assert "<start_of_image><image_soft_token> x 4<end_of_image>" in said and "What is this?<end_of_turn>" in said
    assert "⟦A dot.<end_of_turn>⟧" in said


@pytest.mark.skipif(sys.platform != "linux", reason="others start processes more slowly")
@pytest.mark.parametrize("sees", [True, False])
def test_small_files_with_pictures_are_much_work(seeing, tiny, monkeypatch, sees):
    """Each is decoded, which takes a thousand times as long as to read its path."""
    asked, plain = [], passes._processes
    monkeypatch.setattr(passes, "_processes", lambda sources, total: asked.append(plain(sources, total)) or 1)
    monkeypatch.setattr(passes, "cores", lambda: 4)
    done = []
    monkeypatch.setattr("gemma_tune.cli.console.ConsoleListener.progress", lambda self, task, *numbers: done.append(task))
    write_rows(Path("rows.jsonl"), [{"messages": [{"role": "user", "content": f"{n} {'word ' * 300}"}, {"role": "assistant", "content": "!"}]}
                                    for n in range(200)])
    assert invoke("prepare", "rows.jsonl", "--model", seeing if sees else tiny, "--max-length", 4096).code == 0
    assert asked == [4 if sees else 1] and (done.count("checking rows") > 10) == sees
