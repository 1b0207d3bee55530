"""The list of what is measured on a GPU, run in a small way: all of it but the figures is the same without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_tune.train.batches import LengthGroupedBatches, Share
from gemma_tune.train.buckets import Buckets, Costs, shapes_of_pieces
from gemma_tune.train.packed import PADDED_TOO_MUCH

sys.path.insert(0, str(Path(__file__).parent))

import on_a_gpu  # noqa: E402
import on_a_gpu_parts  # noqa: E402
from on_a_gpu_parts import Bench, Failed, Part, Training, speed  # noqa: E402


@pytest.fixture
def results(tmp_path):
    """Run parts: the exit status, and the line of each part that was begun."""
    def run(parts, *more) -> tuple[int, dict[str, dict]]:
        status = on_a_gpu.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--small",
                                "--parts", ",".join(part.name for part in parts), *more])
        return status, lines(tmp_path / "out")

    return run


def lines(out: Path) -> dict[str, dict]:
    found = map(json.loads, (out / "results.jsonl").read_text().splitlines())
    return {line["part"]: line for line in found if line["part"] != "machine"}


@pytest.mark.timeout(600)
def test_parts_are_measured_one_after_the_other(tmp_path):
    """As on a machine where nothing is installed: in a process of its own, to which nobody says where modules are."""
    command = [sys.executable, on_a_gpu.__file__, "--out", tmp_path / "out", "--work", tmp_path / "work", "--small",
               "--parts", "preferences,pictures,chat,contender"]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, capture_output=True, text=True,
                          env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"})
    found = lines(tmp_path / "out")
    assert done.returncode == 0, (found, done.stderr)
    assert {name: line["status"] for name, line in found.items()} == {
        "preferences": "measured", "pictures": "measured", "chat": "measured", "contender": "left out"}
    assert found["pictures"]["figures"].keys() >= {"captured tokens_per_second", "eager tokens_per_second"}
    assert found["preferences"]["figures"]["kto tokens_per_second"] > 0
    assert len(found["chat"]["figures"]["base"]["first"]) == 3 and found["chat"]["checks"]["every turn was answered"]
    said = (tmp_path / "out/summary.txt").read_text()
    assert said.index("preferences: measured") < said.index("contender: left out") and "in a small way" in said


def test_what_fails_or_does_not_end_is_written_down_and_the_others_go_on(results, tmp_path, monkeypatch, capsys):
    def python(code: str):
        return lambda bench: bench.run([sys.executable, "-c", code])

    def misses(bench: Bench) -> None:
        bench.figures["speed"] = 12
        bench.expect("is fast", False, "slow")

    parts = [Part("wrong", "", python("import sys; sys.exit('no such kernel')"), 30),
             Part("slow", "", python("import os, time; os.fork(); time.sleep(60)"), 1.0),
             Part("odd", "", lambda bench: bench.figures["none"], 30), Part("short", "", misses, 30),
             Part("last", "", lambda bench: bench.expect("holds", True), 30)]
    monkeypatch.setattr(on_a_gpu, "PARTS", parts)
    began = time.monotonic()
    status, found = results(parts)
    assert status == 1 and time.monotonic() - began < 40
    assert {name: line["status"] for name, line in found.items()} == {
        "wrong": "failed", "slow": "too long", "odd": "failed", "short": "missed", "last": "measured"}
    assert "no such kernel" in found["wrong"]["why"] and "KeyError" in found["odd"]["why"]
    assert found["short"]["figures"] == {"speed": 12, "is fast: instead": "slow"}
    assert "MISSED is fast" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "summary.txt", "logs.tar.gz"}
    with tarfile.open(tmp_path / "out/logs.tar.gz") as logs:
        assert logs.extractfile("logs/wrong.err").read() == b"no such kernel\n"


def test_what_the_time_does_not_suffice_for_is_named(results, monkeypatch, capsys):
    parts = [Part("one", "", lambda bench: time.sleep(1), 30), Part("two", "", lambda bench: None, 30)]
    monkeypatch.setattr(on_a_gpu, "PARTS", parts)
    monkeypatch.setattr(on_a_gpu, "GIVE_UP", 1000.0)
    status, found = results(parts)
    assert status == 0 and not found and "no time was left for: --parts one,two" in capsys.readouterr().out


def test_uneven_rows_are_padded_so_much_that_packing_is_tried(tmp_path):
    path = Bench(tmp_path, None, machine={"demo": True}).rows("uneven")
    words = [len(json.loads(line)["messages"][1]["content"].split()) for line in path.read_text().splitlines()]
    lengths, trained = np.array(words) + 20, np.array(words)  # a Gemma has a token for each of these words
    batches = [batch for rows in LengthGroupedBatches(lengths, Share(4), 42).steps() for batch in Share(4).batches(rows)]
    shapes = shapes_of_pieces(batches, 1, lengths, trained, 4)
    padding, by_itself = Buckets(shapes, Costs(1e8, 1.6e8)).fit(shapes, int(lengths.sum()))
    assert padding > 1.3 * PADDED_TOO_MUCH and not by_itself


@pytest.mark.parametrize(("installed", "tokenizer", "words"), [(True, None, 77), (False, None, 15), (False, "gemma", 77)])
def test_without_the_demo_its_shape_takes_its_place(tmp_path, installed, tokenizer, words):
    """Rows are as long with a tokenizer that takes their words apart."""
    bench, asked = Bench(tmp_path, SimpleNamespace(tokenizer=tokenizer, data=None), machine={"demo": installed}), []
    bench.run = lambda command, log="": asked.append([str(word) for word in command]) or ("", "")
    assert bench.model == ("demo" if installed else str(tmp_path / "gemma3-270m"))
    assert [command[3:] for command in asked] == ([] if installed else [[bench.model, "gemma3-270m", *filter(None, [tokenizer])]])
    answer = json.loads(bench.rows("usual").read_text().splitlines()[1])["messages"][1]["content"]
    assert len(answer.removesuffix(" (1)").split()) == 2 + words


WRONG = {"def test_it():\n    assert False": "test_wrong.py::test_it", "import no_such_module": "test_wrong.py"}


@pytest.mark.parametrize("wrong", ["", *WRONG])
def test_tests_that_fail_are_named(tmp_path, wrong):
    (tmp_path / "test_right.py").write_text("def test_it():\n    pass")
    (tmp_path / "test_wrong.py").write_text(wrong)
    bench = Bench(tmp_path, None, small=True, machine={"cores": 2, "cuda": False})

    def run(command):
        words = [word for word in map(str, command) if not word.startswith("tests/")]
        done = subprocess.run([*words, "."], cwd=tmp_path, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"exit status {done.returncode}", done.stdout, done.stderr)
        return done.stdout, done.stderr

    bench.run = run
    on_a_gpu_parts.suite(bench)
    assert bench.checks == {"all tests pass": not wrong}
    assert bench.figures.get("all tests pass: instead") == ([WRONG[wrong]] if wrong else None)


def test_why_a_training_was_left_out_is_told(tmp_path):
    """train_speed.py ends well without it."""
    bench = Bench(tmp_path, SimpleNamespace(tokenizer=None, data=None), small=True, machine={"demo": True})
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").touch()

    def run(command, log=""):
        Path(command[command.index("--json") + 1]).write_text('{"contenders": {}}')
        return "", "ours: left out, no such kernel"

    bench.run = run
    with pytest.raises(Failed, match="no such kernel"):
        speed(bench, 8)


@pytest.mark.parametrize(("notes", "held"), [
    ("· steps are captured in 3 shapes of up to 48 tokens; padding adds 9%", [True, True]),
    ("· rows are packed: padding 1% instead of 30%, in 80% of the time", [True, True]),
    ("· steps with pictures are captured in 1 shape of up to 96 tokens; padding adds 9%", [True, True]),
    ("· steps are captured in 3 shapes\n· steps with pictures cannot be captured here and go one kernel at a time: no", [True, False]),
    ("· steps are captured in 3 shapes\n· steps cannot be captured here and go one kernel at a time: no", [True, False]),
    ("· layers go one operation at a time, as Triton's kernels do not run here: x\n· steps are captured in 1 shape", [True, False]),
    ("· steps are not captured: in fp16 the loss scaler has to look", [False, False])])
def test_a_training_on_a_gpu_has_to_be_captured(tmp_path, notes, held):
    bench = Bench(tmp_path, None, machine={"cuda": True})
    bench.found(Training({}, notes, {"steps_seen": {}}), "x")
    assert list(bench.checks.values()) == held


@pytest.mark.parametrize(("wrong", "said"), [(["--parts", "train,none"], "no part none"),
                                             (["--contender", "a=b"] * 3, "two contenders")])
def test_what_cannot_be_asked_for(tmp_path, capsys, wrong, said):
    with pytest.raises(SystemExit):
        on_a_gpu.parse(["--out", str(tmp_path), *wrong])
    assert said in capsys.readouterr().err
