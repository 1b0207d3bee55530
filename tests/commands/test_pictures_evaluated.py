"""``eval`` on rows with pictures: the losses are those of the model that looks at them itself."""

from __future__ import annotations

import base64
import copy
import functools
import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from gemma_tune.answers.generation import BROKEN
from gemma_tune.answers.sight import _TAKEN
from gemma_tune.data.conversations.problems import RowError
from gemma_tune.data.reading.rows import HUB, Row, Source
from gemma_tune.encoding.eye import pictures_of
from gemma_tune.evaluate import sight
from gemma_tune.evaluate.pictures import shown_in_file
from gemma_tune.lora.load import add_adapter
from gemma_tune.run.session import open_session
from support.command import MANIFEST_SCHEMA, copied_run, write_rows
from support.command import rows as texts
from support.picture_files import as_bytes, drawn, name_of, save, shown
from support.seeing import Looking, format_that_sees, show_pictures, trained_seer

FP32 = ("--dtype", "fp32", "--max-new-tokens", 3)
FAMILIES = ("gemma3", "qwen3.5")


@pytest.fixture(scope="session")
def trained_seers(tmp_path_factory):
    """Runs up to the adapter, with text alone, by family."""
    return functools.cache(lambda name: trained_seer(name, tmp_path_factory.mktemp("evaluated")))


@pytest.fixture
def seer(trained_seers, tmp_path):
    """A copy of such a run, and its model; copied to where the test is."""
    def of(name: str) -> tuple[Path, Path]:
        once = trained_seers(name)
        model = once.parents[1] / "models" / "seer"
        return copied_run(once, tmp_path, model), model

    return of


def own_losses(model: Path, run: Path, found: list[dict]) -> list[float]:
    """Nats per learned token of base and tuned model, as transformers' own model has them of the pictures themselves."""
    chat = format_that_sees(model, run)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    totals, count = [0.0, 0.0], 0
    tuned = add_adapter(base, run / "seer_lora_adapter")
    for row in found:
        [sequence] = chat.encode(row["messages"])
        ids, labels = torch.tensor(sequence.ids)[None].long(), torch.tensor(sequence.labels)[None]
        shown = [chat.eye.inputs(name) for name, _ in sequence.pictures]
        inputs = {key: torch.cat([one[key] for one in shown]) for key in _TAKEN if shown and key in shown[0]}
        marks = {chat.eye.marks: (ids == chat.eye.soft_id).long()} if shown else {}
        with torch.no_grad():
            for n, how in enumerate((tuned.disable_adapter, torch.no_grad)):
                with how():
                    logits = tuned(input_ids=ids, **inputs, **marks).logits
                totals[n] += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return [total / count for total in totals]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_model_that_looks_itself(cli, seer, family):
    run, model = seer(family)
    rows = show_pictures(run, model, lambda n: n % 3)["valid"]
    result = cli("eval", "--json", "--dtype", "fp32", "--max-new-tokens", 12)
    assert result.code == 0, result.err
    found, looking = result.json["summary"]["answers"], Looking(model, run)
    assert [answer["prompt"] for answer in found] == [row["messages"][:-1] for row in rows]
    for answer in found:
        expected = looking.answers(answer["prompt"], 12)
        assert [answer[side].rstrip(BROKEN) for side in ("base", "tuned")] == expected
    assert any(answer["base"] != answer["tuned"] for answer in found)
    shown = [answer for answer in found if pictures_of(answer["prompt"])]
    others = [[{key: value for key, value in turn.items() if key != "pictures"} | {"pictures": other["prompt"][0]["pictures"]}
               for turn in answer["prompt"]] for answer, other in zip(shown, [*shown[1:], shown[0]])]
    assert any(looking.answers(other, 12)[1] != answer["tuned"].rstrip(BROKEN) for answer, other in zip(shown, others)), "the picture matters"
    report, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    for answer in shown:
        names = pictures_of(answer["prompt"])
        said = "".join(f"> ![{name}](data/pictures/{name})\n> \n" for name in names)
        assert f"*user*\n\n{said}> {answer['prompt'][0]['content']}\n" in report and (run / "data" / "pictures" / names[0]).is_file()
        assert ", ".join(f"{name[:8]}….png" for name in names) in page
    assert "no question to ask" not in result.err and "not asked" not in result.err


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_model_that_looks_itself(cli, seer, family):
    run, model = seer(family)
    before = cli("eval", "--json", *FP32).json["summary"]["measures"]["loss"]
    shown = show_pictures(run, model, lambda n: n % 3)
    result = cli("eval", "--json", *FP32)
    assert result.code == 0, result.err
    measured = result.json["summary"]["measures"]["loss"]
    expected = own_losses(model, run, shown["valid"])
    assert np.allclose([measured["base"][0], measured["tuned"][0]], expected, rtol=1e-4)
    assert abs(expected[1] - expected[0]) > 0.1 and abs(measured["base"][0] - before["base"][0]) > 1e-3, "both matter"
    assert measured["rows"] == result.json["summary"]["rows"] == 6


def test_pictures_are_looked_at_once(cli, seer, monkeypatch):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    loaded, load, load_towers = [], sight.load_model, sight.load_towers
    monkeypatch.setattr(sight, "load_model", lambda *args, **more: loaded.append(more.get("sight")) or load(*args, **more))
    monkeypatch.setattr(sight, "load_towers", lambda *args: loaded.append("towers") or load_towers(*args))
    first = cli("eval", "--json", *FP32)
    assert first.code == 0, first.err
    again = cli("eval", "--json", "--force", *FP32)
    assert loaded == ["towers", "features", "features"]
    assert first.json["summary"] == again.json["summary"]
    assert first.json["summary"]["questions"] == len(first.json["summary"]["answers"]) == 6
    assert len([*(run / "seen").rglob("*.safetensors")]) == 6
    assert "loss" in (run / "report.md").read_text() and (run / "report.html").is_file()
    assert cli("status").code == 0 and cli("eval", *FP32, "--json").json["status"] == "up-to-date"


def test_a_picture_that_is_gone(cli, seer):
    run, model = seer("gemma3")
    row = show_pictures(run, model, lambda n: 1)["valid"][0]
    gone = run / "data" / row["messages"][0]["pictures"][0]["file"]
    gone.unlink()
    result = cli("eval", *FP32)
    said = " ".join(result.err.split())
    assert result.code == 2 and f"runs/seer/data/pictures/{gone.name} is gone, and prepared rows show it" in said, said
    assert "prepare --run runs/seer --force" in said and "Traceback" not in said


def test_what_was_seen_that_is_damaged(cli, seer):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    assert cli("eval", *FP32).code == 0
    for path in (run / "seen").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    result = cli("eval", "--force", *FP32)
    assert result.code == 2 and "what was seen in pictures cannot be read from" in result.err, result.err
    assert "seer/seen, and repeat the command: they are looked at again" in " ".join(result.err.split())
    shutil.rmtree(run / "seen")
    assert cli("eval", "--force", *FP32).code == 0


def test_a_picture_whose_size_alone_can_be_read(cli, seer):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    for path in (run / "data" / "pictures").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    result = cli("eval", *FP32)
    said = " ".join(result.err.split())
    assert result.code == 2 and "prepare --run runs/seer --force" in said, said
    names = [path.name for path in (run / "data" / "pictures").iterdir()]
    assert any(f"a picture cannot be read: runs/seer/data/pictures/{name}: " in said for name in names), said


def test_what_is_predicted_has_its_pictures_with_a_head_that_does_more(seer, monkeypatch, cli):
    """Where the logits are not those of decoder and head alone, each row goes through the whole model."""
    from gemma_tune.measure import likelihood

    run, model = seer("gemma3")
    shown = show_pictures(run, model, lambda n: 1)
    monkeypatch.setattr(likelihood, "_head_is_all", lambda *_: False)
    measured = cli("eval", "--json", *FP32).json["summary"]["measures"]["loss"]
    assert np.allclose([measured["base"][0], measured["tuned"][0]], own_losses(model, run, shown["valid"]), rtol=1e-4)


def test_a_question_is_shown_its_picture_where_its_answer_is_too_long_to_be_predicted(cli, seer):
    run, model = seer("gemma3")
    path = run / "data" / "valid.jsonl"
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["messages"][-1]["content"] = "And so on. " * 1000
    write_rows(path, [first, *others])
    row = show_pictures(run, model, lambda n: n == 0)["valid"][0]
    result = cli("eval", "--json", "--dtype", "fp32", "--max-new-tokens", 12)
    assert result.code == 0, result.err
    first = result.json["summary"]["answers"][0]
    assert first["prompt"] == row["messages"][:-1] and result.json["summary"]["rows"] == 5
    assert [first[side].rstrip(BROKEN) for side in ("base", "tuned")] == Looking(model, run).answers(first["prompt"], 12)


# ---- a file that --data names ----------------------------------------------------------------------------------------

def put_aside(run: Path, rows: list[dict], folder: Path) -> list[dict]:
    """The rows as somebody else would write them, with their pictures in a folder: by a path, the odd ones inside."""
    found = copy.deepcopy(rows)
    for n, turn in enumerate(turn for row in found for turn in row["messages"] if "pictures" in turn):
        parts, start = [], 0
        for picture in turn.pop("pictures"):
            content = (run / "data" / picture["file"]).read_bytes()
            inside = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}
            save(folder / f"{n}-{picture['at']}.png", content)
            parts += [{"type": "text", "text": turn["content"][start:picture["at"]]}] if picture["at"] > start else []
            parts.append(inside if n % 2 else {"type": "image", "path": f"{n}-{picture['at']}.png"})
            start = picture["at"]
        turn["content"] = [*parts, {"type": "text", "text": turn["content"][start:]}]
    return found


def test_a_file_is_measured_and_asked_as_the_same_rows_of_the_run_are(cli, seer, tmp_path, monkeypatch):
    run, model = seer("gemma3")
    rows = show_pictures(run, model, lambda n: n % 3)["valid"]
    write_rows(tmp_path / "held" / "out.jsonl", put_aside(run, rows, tmp_path / "held"))
    own = cli("eval", "--json", *FP32)
    assert own.code == 0, own.err
    before = {path: path.stat().st_mtime_ns for path in (run / "data").rglob("*")}
    monkeypatch.setattr(sight, "load_towers", lambda *_: pytest.fail("they were looked at already"))
    of_file = cli("eval", "--data", tmp_path / "held" / "out.jsonl", "--json", *FP32)
    assert of_file.code == 0, of_file.err
    assert of_file.json["summary"] == own.json["summary"]
    assert {path: path.stat().st_mtime_ns for path in (run / "data").rglob("*")} == before
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    names = {name for row in rows for name in pictures_of(row["messages"])}
    assert {path.name for path in (run / "evaluated" / "pictures").iterdir()} == names and len(names) == 6
    report = (run / "report.md").read_text()
    assert all(f"![{name}](evaluated/pictures/{name})" in report for name in names)
    jsonschema.validate(json.loads((run / "manifest.json").read_text()), MANIFEST_SCHEMA)
    assert cli("eval", "--json", *FP32).json["status"] == "up-to-date"
    assert cli("eval", "--data", "valid", *FP32).code == 0
    assert not (run / "evaluated").exists() and "(data/pictures/" in (run / "report.md").read_text()


def held_out(*rows: dict) -> Path:
    return write_rows(Path("held/out.jsonl"), [*rows, *texts(2)])


def test_pictures_of_a_file_are_kept_as_far_as_they_are_asked_about(cli, seer):
    run, _ = seer("gemma3")
    contents = [save(f"held/{n}.png", as_bytes(drawn(n))) for n in range(4)]
    held_out(*(shown(f"{n}.png", question=f"What is {n}?") for n in range(4)))
    result = cli("eval", "--data", "held/out.jsonl", "--questions", 2, "--json", *FP32)
    assert result.code == 0 and result.json["summary"]["rows"] == 6, result.err
    assert [path.name for path in (run / "evaluated" / "pictures").iterdir()] == [name_of(contents[0])]
    assert len([*(run / "seen").rglob("*.safetensors")]) == 4, "all are looked at"
    assert cli("eval", "--data", write_rows(Path("text.jsonl"), texts(3)), *FP32).code == 0
    assert not (run / "evaluated").exists()


def test_pictures_of_a_file_that_changed_are_noticed(cli, seer):
    seer("gemma3")
    save("held/a.png", as_bytes(drawn(1)))
    held_out(shown("a.png"))
    first = cli("eval", "--data", "held/out.jsonl", "--json", *FP32)
    assert first.code == 0, first.err
    save("held/a.png", as_bytes(drawn(2)))
    again = cli("eval", "--json", *FP32)
    assert again.json["status"] == "done" and "`eval` runs again: 1 picture was put there, or changed, since" in again.err
    assert again.json["summary"]["measures"]["loss"] != first.json["summary"]["measures"]["loss"]
    assert cli("eval", "--json", *FP32).json["status"] == "up-to-date"
    save("held/a.png", as_bytes(drawn(3)))
    other = cli("eval", "--data", write_rows(Path("text.jsonl"), texts(3)), *FP32)
    assert other.code == 0 and "runs again: data: " in other.err and "put there, or changed" not in other.err, other.err


def test_where_pictures_of_a_file_lie(cli, seer):
    """In the folder that is named, else in that of the data, else beside the file."""
    run, _ = seer("gemma3")
    contents = {folder: save(f"{folder}/a.png", as_bytes(drawn(n))) for n, folder in enumerate(("held", "told", "named"))}
    held_out(shown("a.png"))
    manifest = json.loads((run / "manifest.json").read_text())

    def kept(*flags: str, told: bool = False) -> list[str]:
        result = cli("eval", "--data", "held/out.jsonl", "--force", *flags, *FP32)
        assert result.code == 0, result.err
        said = "1 picture is of told, as `prepare` was told; --pictures DIR looks into another folder first"
        assert (said in " ".join(result.err.split())) is told
        return [path.name for path in (run / "evaluated" / "pictures").iterdir()]

    assert kept() == [name_of(contents["held"])]
    manifest["stages"]["prepare"]["config"]["pictures"] = {"value": "../../told", "from": "flag"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert kept(told=True) == [name_of(contents["told"])]
    assert kept("--pictures", "named") == kept() == [name_of(contents["named"])], "as before"
    assert json.loads((run / "manifest.json").read_text())["stages"]["eval"]["config"]["pictures"]["value"] == "../../named"
    shutil.rmtree("named")
    gone = cli("eval", *FP32)
    assert gone.code == 2 and "the folder of the pictures" in gone.err and "is not there" in gone.err, gone.err
    others = cli("eval", "--data", write_rows(Path("held/others.jsonl"), [shown("a.png"), *texts(2)]), *FP32)
    assert others.code == 0 and "the folder of the pictures, named, is gone: it is not looked into any more" in others.err
    alone = cli("eval", "--data", "valid", "--pictures", "told", *FP32)
    assert alone.code == 2 and "--pictures is for rows of a file" in alone.err and "--data FILE" in alone.err


def test_rows_of_a_file_whose_pictures_cannot_be_used_are_named(cli, seer, monkeypatch):
    run, _ = seer("gemma3")
    save("held/cut.png", as_bytes(drawn())[:60])
    save("held/a.png", b"no picture")
    save("held/large.png", as_bytes(drawn(0, (400, 300))))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    given = [shown(name) for name in ("gone.png", "cut.png", "a.png", "large.png")]
    write_rows(Path("held/out.jsonl"), [shown(as_bytes(drawn(1))), *given])
    result = cli("eval", "--data", "held/out.jsonl", *FP32)
    said = " ".join(result.err.split())
    assert result.code == 2 and "Traceback" not in said and "4 of 5 rows of held/out.jsonl cannot be used to measure on" in said
    for line, what in ((2, "'gone.png' of turn 1 is not below held (put it there, or name the folder that its path begins in: "
                           "--pictures DIR)"), (3, "'cut.png' of turn 1 is damaged"), (4, "'a.png' of turn 1 is text, and no PNG"),
                       (5, "'large.png' of turn 1 is too large to be decoded: it has more than 100,000 pixels")):
        assert f"held/out.jsonl:{line}: the picture {what}" in said
    assert not [path for path in run.iterdir() if "evaluated" in path.name] and not (run / "report.md").exists()


def test_the_folder_of_the_pictures_is_asked_for_where_none_is_found(cli, seer):
    seer("gemma3")
    save("photos/img/a.png")
    Path("photos/held").mkdir()
    write_rows(Path("photos/held/out.jsonl"), [shown("img/a.png")])
    result = cli("eval", "--data", "photos/held/out.jsonl", *FP32)
    said = " ".join(result.err.split())
    assert result.code == 2 and "to measure on: the only picture that a row names is not below photos/held" in said
    assert "Hint: name the folder in which their paths begin: --pictures photos" in said
    assert cli("eval", "--data", "photos/held/out.jsonl", "--pictures", "photos", *FP32).code == 0


def test_what_was_learned_about_another_picture_was_not_learned(cli, seer):
    run, model = seer("gemma3")
    rows = show_pictures(run, model, lambda n: 1)["train"][:4]
    for n, row in enumerate(put_aside(run, rows, Path("held"))[1:], start=1):
        rows[n] = row
    rows = [*put_aside(run, rows[:1], Path("held/other")), *rows[1:]]
    save("held/0-0.png", as_bytes(drawn(5)))  # in place of that of the first row
    result = cli("eval", "--data", write_rows(Path("held/out.jsonl"), rows), *FP32)
    assert "the training had 3 of 4 rows itself" in " ".join(result.err.split()), result.err


def test_columns_of_a_table_have_pictures(cli, seer):
    run, model = seer("gemma3")
    contents = [as_bytes(drawn(n)) for n in range(3)]
    table = pa.table({"image": [{"bytes": content, "path": None} for content in contents],
                      "prompt": [f"<image>What is {n}?" for n in range(3)], "completion": ["A dot."] * 3})
    pq.write_table(table, "held.parquet")
    result = cli("eval", "--data", "held.parquet", "--json", *FP32)
    assert result.code == 0, result.err
    assert [pictures_of(answer["prompt"]) for answer in result.json["summary"]["answers"]] == [[name_of(one)] for one in contents]
    looking = Looking(model, run)
    looking.chat.eye.folder = run / "evaluated" / "pictures"
    for answer in result.json["summary"]["answers"]:
        assert [answer[side].rstrip(BROKEN) for side in ("base", "tuned")] == looking.answers(answer["prompt"], 3)


def test_pictures_that_are_not_read_are_told_of(cli, seer):
    seer("gemma3")
    picture = base64.b64encode(as_bytes(drawn())).decode()
    Path("held").mkdir()
    held_out(*({"messages": row["messages"], "photo": {"base64": picture}} for row in texts(2)))
    result = cli("eval", "--data", "held/out.jsonl", *FP32)
    assert result.code == 0, result.err
    said = "2 rows hold a picture in `photo`, which is not read, and are measured without it: call it `image`"
    assert said in " ".join(result.err.split())


def test_rows_of_the_hub_reach_no_file(seer):
    run, _ = seer("gemma3")
    save("held/a.png")
    session = open_session("eval", run, data="hf:org/name")
    source = Source("hf:org/name:train", Path("held/commit"), HUB)
    chat = format_that_sees(session.model.path, run)
    with shown_in_file(session, chat) as showing:
        show = showing([source])
        row = Row(source.name, 1, {})
        for path in ("a.png", str(Path("held/a.png").absolute())):
            with pytest.raises(RowError) as refused:
                show(row, [{"role": "user", "content": "?", "pictures": [{"at": 0, "path": path}]}])
            assert "rows of the Hub name no files of this machine" in refused.value.problems[0].reason


def test_a_model_that_takes_text_alone(cli, trained):
    save("held/a.png")
    write_rows(Path("held/out.jsonl"), [shown("a.png")])
    result = cli("eval", "--data", "held/out.jsonl")
    said = " ".join(result.err.split())
    assert result.code == 2 and "Traceback" not in said
    assert "held/out.jsonl:1: the row has a picture, and tiny-gemma takes text alone (use a model that sees" in said
