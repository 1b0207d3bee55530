"""Which rows rounding is calibrated by: the training's or a file's as the run lays them out, and general text."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gemma_tune import samples
from gemma_tune.base.errors import BAD_INPUT, UserError
from gemma_tune.data import usable
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.export import calibration_file
from gemma_tune.export.calibration_rows import LONGEST, calibration_rows, sample
from gemma_tune.export.quant_loss import validation_rows
from gemma_tune.measure.general import calibration_rows_of, measuring_rows_of
from gemma_tune.run.prepared import prepared_as
from gemma_tune.run.session import open_session
from support.command import write_rows
from support.picture_files import prepared_row, shown

QUESTION, ANSWER = "Which way is north?", "Where the moss grows."
CHAT = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
CALIBRATE = ("export-ollama", "--no-verify", "--no-measure", "--quant", "f16")


@pytest.fixture
def chat(tiny):
    return load_format(tiny, "gemma3_text")


@pytest.fixture
def rows_of(trained, chat):
    """Ids of the rows to calibrate by, the general ones apart, and what is said of them."""
    def call(file: object = "rows", **prepared: Any) -> tuple[list[list[int]], list[list[int]], str]:
        session = open_session("export-ollama", trained, calibration=str(file))
        for name, value in prepared.items():
            session.manifest.stages["prepare"]["config"][name] = {"value": value, "from": "flag"}
        found, said = calibration_rows(session, SimpleNamespace(chat=chat))
        passages = [row["input_ids"].tolist() for row in calibration_rows_of(chat)]
        found = [row.tolist() for row in found]
        return [row for row in found if row not in passages], [row for row in found if row in passages], said
    return call


def refusal(rows_of, file: object, **prepared: Any) -> UserError:
    with pytest.raises(UserError) as raised:
        rows_of(file, **prepared)
    assert raised.value.exit_code == BAD_INPUT and raised.value.hint
    return raised.value


def test_training_rows_have_general_text_among_them(rows_of, trained):
    own, general, said = rows_of()
    expected = [list(row["input_ids"]) for row in open_tokens(trained / "data" / "tokens" / "train.arrow")]
    assert sorted(own) == sorted(expected)
    size, more = (sum(map(len, rows)) for rows in (own, general))
    assert len(general) == len(samples.general_calibration()) and more > size
    assert said == f"{size} tokens of the training rows and {more:,} of general text"


FILES = {
    "chats.jsonl": json.dumps(CHAT),
    "alpaca.json": json.dumps([{"instruction": QUESTION, "input": "", "output": ANSWER}]),
    "sharegpt.jsonl": json.dumps({"conversations": [{"from": "human", "value": QUESTION},
                                                    {"from": "gpt", "value": ANSWER}]}),
    "table.csv": f"ask,reply\n{QUESTION},{ANSWER}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_as_prepare_reads_it_and_laid_out_by_the_runs_template(rows_of, chat, name):
    Path(name).write_text(FILES[name], encoding="utf-8")
    own, general, said = rows_of(name, columns=["user=ask", "assistant=reply"])
    [expected] = [encoded.ids.tolist() for encoded in chat.encode(CHAT["messages"])]
    assert own == [expected] and general
    assert said.startswith(f"{len(expected)} tokens of {name} and ")


def test_of_rows_with_pictures_the_text_is_taken(rows_of, chat):
    """Whether the model sees does not matter, nor whether the pictures are there."""
    asked = [shown("gone.png", b"GIF89a", question=QUESTION, answer=ANSWER), prepared_row("b.png", question=QUESTION, answer=ANSWER)]
    write_rows(Path("seen.jsonl"), asked)
    own, _, said = rows_of("seen.jsonl")
    [expected] = [encoded.ids.tolist() for encoded in chat.encode(CHAT["messages"])]
    assert own == [expected] * 2
    assert said.startswith(f"{2 * len(expected)} tokens of seen.jsonl, without pictures, and ")
    write_rows(Path("text.jsonl"), [CHAT])
    assert "pictures" not in rows_of("text.jsonl")[2]


@pytest.mark.parametrize("name", ["long.txt.gz", "long.md.gz"])
def test_plain_text_is_taken_in_pieces(rows_of, chat, monkeypatch, name):
    monkeypatch.setattr(usable, "_PASSAGE", 100)
    text = "".join(f"Line {n} of a long text.\n" for n in range(12))
    with gzip.open(name, "wt", encoding="utf-8") as file:
        file.write(text)
    own, _, said = rows_of(name)
    assert len(own) == -(-len(text) // 100)
    parts = {chat.tokenizer.decode(row, skip_special_tokens=True) for row in own}
    assert parts == {text[start:start + 100] for start in range(0, len(text), 100)}
    assert f"of {name} and" in said


def test_rows_come_from_all_over_a_long_file(rows_of, monkeypatch):
    monkeypatch.setattr(calibration_file, "_MOST_ROWS", 8)
    Path("many.jsonl").write_text("".join(json.dumps({"text": f"number {n} " * 3}) + "\n" for n in range(200)))
    own, _, _ = rows_of("many.jsonl")
    assert len(own) == 8
    rows = usable.sampled((SimpleNamespace(line=n) for n in range(200)), 64)
    assert min(row.line for row in rows) < 100 < max(row.line for row in rows)


@pytest.mark.parametrize(("bad", "said"), [(1, "1 row"), (2, "2 rows")], ids=["fewer", "just as many as allowed"])
def test_a_few_rows_that_cannot_be_used_are_left_out_and_said(trained, chat, monkeypatch, bad, said):
    assert prepared_as(open_session("export-ollama", trained)).max_rejected == 0.2
    Path("some.jsonl").write_text("\n".join([json.dumps(CHAT)] * (10 - bad) + ['{"messages": 3}'] * bad))
    session = open_session("export-ollama", trained, calibration="some.jsonl")
    warned: list[str] = []
    monkeypatch.setattr(session.listener, "warn", warned.append)
    assert len(calibration_file.file_rows(session, chat)[0]) == 10 - bad
    [warning] = warned
    assert warning.startswith(f"{said} of some.jsonl cannot be used to calibrate by; the first is some.jsonl:{11 - bad}: ")


@pytest.mark.parametrize(("name", "content", "message", "problem"), [
    ("bad.jsonl", json.dumps(CHAT) + '\n{"messages": 3}\n{"instruction": }\n', "2 of 3 rows of bad.jsonl cannot be used",
     "bad.jsonl:3: "),
    ("marks.txt", "A text with <end_of_turn> in it.", "1 of 1 row of marks.txt cannot be used", "marks.txt:1: "),
    ("empty.txt", " \n", "empty.txt holds no rows", None),
    ("zip.txt", "PK\x03\x04\0\0", "zip.txt", None),
    ("rows.log", "# Only words", "rows.log is plain text", None)])
def test_a_file_that_cannot_be_used_is_refused_with_its_lines(rows_of, name, content, message, problem):
    Path(name).write_text(content)
    refused = refusal(rows_of, name)
    assert message in refused.message
    assert problem is None or any(found.startswith(problem) for found in refused.problems)


def test_general_text_is_all_predicted_but_the_first_token(chat):
    from gemma_tune.measure.likelihood import wanted_of

    rows = measuring_rows_of(chat)
    assert all(row["input_ids"][0] == chat.tokenizer.bos_token_id for row in rows)
    wanted = wanted_of(rows)
    assert [one.labels.tolist() for one in wanted] == [
        chat.tokenizer(text, add_special_tokens=False).input_ids for text in samples.general_measuring()]


def test_rows_are_sampled_from_all_over_the_data_and_are_bounded():
    data = [{"input_ids": np.full(100, n)} for n in range(500)]
    found = sample(data, 1050)
    assert sum(map(len, found)) == 1050 and len(found) == 11
    numbers = {int(row[0]) for row in found}
    assert len(numbers) == 11 and max(numbers) > 250 and min(numbers) < 250
    assert [len(row) for row in sample([{"input_ids": np.arange(5000)}])] == [LONGEST]
    assert sample(data, 0) == []


def test_an_export_is_up_to_date_as_long_as_the_files_content_is_the_same(cli, merged, tmp_path, monkeypatch):
    rows = tmp_path / "more.jsonl"
    rows.write_text(json.dumps(CHAT))
    first = cli(*CALIBRATE, "--calibration", "more.jsonl", "--json")
    assert first.code == 0, first.err
    assert "--calibration is not used: none of these formats has eight bits or fewer" in first.err
    record = json.loads((merged / "manifest.json").read_text())["stages"]["export-ollama"]
    assert record["config"]["calibration"] == {"value": "../../more.jsonl", "from": "flag"}
    assert record["inputs"]["calibration_0"]["path"] == "../../more.jsonl"
    assert cli(*CALIBRATE, "--calibration", rows, "--json").json["status"] == "up-to-date"
    os.chdir(merged)  # named before, relative to the run
    assert cli(*CALIBRATE, "--run", ".", "--json").json["status"] == "up-to-date"
    rows.write_text(json.dumps({"text": "Other words."}))
    again = cli(*CALIBRATE, "--run", ".", "--json")
    assert again.json["status"] == "done" and "more.jsonl was changed" in again.err
    back = cli(*CALIBRATE, "--run", ".", "--calibration", "rows", "--json")
    assert back.json["status"] == "done" and "calibration: ../../more.jsonl -> rows" in back.err


def test_a_file_of_an_earlier_export_that_is_gone(cli, merged, tmp_path):
    rows = tmp_path / "more.jsonl"
    rows.write_text(json.dumps(CHAT))
    export = (*CALIBRATE[:-1], "q4_0")
    first = cli(*export, "--calibration", "more.jsonl", "--json")
    assert first.code == 0, first.err
    assert re.search(r"rounding is calibrated on \d+ tokens of more.jsonl and [\d,]+ of general text", first.err)
    rows.unlink()
    result = cli(*export, "--json")
    assert result.code == BAD_INPUT
    error = result.json["error"]
    assert error["message"].startswith("the rows that were calibrated by before: there is no file more.jsonl")
    assert "--calibration rows" in error["hint"]
    assert (merged / "ollama" / "tiny-gemma-q4_0.gguf").is_file()


@pytest.mark.parametrize(("options", "message", "hint"), [
    (("--calibration", "nowhere.jsonl"), "there is no file nowhere.jsonl", "check"),
    (("--calibration", "-"), "--calibration reads no standard input", "save them to a file"),
    (("--calibration", ""), "--calibration: is empty", "leave --calibration out"),
    (("--calibration", "x.txt", "--no-calibration"), "--calibration and --no-calibration exclude each other", "leave one")])
def test_what_calibration_cannot_be(cli, trained, options, message, hint):
    result = cli(*CALIBRATE, *options, "--json")
    assert result.code == BAD_INPUT, result.err
    assert message in result.json["error"]["message"] and hint in result.json["error"]["hint"]


def test_run_looks_for_the_file_before_any_training(cli, data, tiny):
    Path("settings.yaml").write_text("export-ollama: {calibration: nowhere.jsonl}\n")
    result = cli("run", data, "--model", tiny, "--config", "settings.yaml", "--json")
    assert result.code == BAD_INPUT and "there is no file nowhere.jsonl" in result.err
    assert not Path("runs").exists()


# --- answers that are compared or judged

ASKED = [{"role": "user", "content": QUESTION}]


def test_rejected_and_bad_answers_are_neither_calibrated_by_nor_measured_on(cli, tiny, chat, tmp_path):
    """Of a run of pairs, and of one of judged answers, and of files of them."""
    def answered(text: str) -> list[int]:
        return [int(n) for n in chat.encode([*ASKED, {"role": "assistant", "content": text}])[0].ids]

    pairs = [{"prompt": QUESTION, "chosen": f"Up {n}.", "rejected": f"Down {n}."} for n in range(6)]
    judged = [{"prompt": QUESTION, "completion": row[side], "label": side == "chosen"}
              for row in pairs for side in ("chosen", "rejected")]
    liked = {tuple(answered(row["chosen"])) for row in pairs}
    for name, rows in (("pairs", pairs), ("judged", judged)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        held = tmp_path / f"{name}-held.jsonl"
        held.write_text("\n".join(json.dumps(row | {"prompt": QUESTION + "?"}) for row in rows))
        run = Path("runs") / name
        assert cli("prepare", file, "--valid", held, "--model", tiny, "--run", run).code == 0
        for source in ("rows", str(file)):
            session = open_session("export-ollama", run, calibration=source)
            found, said = calibration_rows(session, SimpleNamespace(chat=chat))
            general = [tuple(row["input_ids"].tolist()) for row in calibration_rows_of(chat)]
            assert {ids for row in found if (ids := tuple(row.tolist())) not in general} == liked, (name, source)
        measured, reason = validation_rows(session)
        assert reason == "" and len(measured) == 6, name
        assert all("Up" in chat.tokenizer.decode(row["input_ids"]) for row in measured)


def test_a_run_of_bad_answers_alone(cli, tiny, chat, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"{QUESTION} {n}", "completion": "Down.", "label": False})
                              for n in range(6)))
    run = Path("runs/bad")
    assert cli("prepare", file, "--valid", 2, "--model", tiny, "--run", run).code == 0
    session = open_session("export-ollama", run, calibration="rows")
    found, said = calibration_rows(session, SimpleNamespace(chat=chat))
    assert said.endswith("of general text alone: all training answers of the run are marked as bad ones")
    assert validation_rows(session) == (None, "all validation answers of the run are marked as bad ones")
    session = open_session("export-ollama", run, calibration=str(file))
    with pytest.raises(UserError, match="marked as bad ones") as raised:
        calibration_rows(session, SimpleNamespace(chat=chat))
    assert "--calibration rows" in raised.value.hint
