"""``prepare`` a second time, in several processes, and when it fails: the same bytes, or the old ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemma_tune import samples
from gemma_tune.base.errors import WORK_FAILED
from gemma_tune.prepare import passes as module
from gemma_tune.prepare import stage
from gemma_tune.prepare.judge import Judge
from support.command import invoke, rows, write_rows
from support.prepared import (
    DATA,
    SIDES,
    alpaca,
    contents,
    prepared,
    questions,
    read,
    report,
    row,
    sequences,
    talk,
    with_template,
)


def again(*args: object) -> dict[str, Any]:
    """``prepare`` with nothing but what is given, not even a limit on rejected rows."""
    result = invoke("prepare", *args, "--run", "runs/tiny-gemma", "--json")
    assert result.code == 0, result.err
    return result.json | {"err": result.err}


def settings() -> dict[str, Any]:
    """What the manifest says that ``prepare`` was told."""
    recorded = json.loads((DATA.parent / "manifest.json").read_text())["stages"]["prepare"]["config"]
    return {name: entry["value"] for name, entry in recorded.items()}


# --- again

def test_the_same_rows_give_the_same_bytes(prepare):
    path = write_rows(Path("rows.jsonl"), [*rows(9), rows(1)[0], {"bad": "é\u2028"}])
    prepare(path)
    before = contents(DATA)
    assert prepare(path)["status"] == "up-to-date"
    assert prepare(path, "--force")["status"] == "done"
    assert contents(DATA) == before


def test_without_data_everything_stays_as_it_was_said_before(prepare, tiny, monkeypatch):
    Path("given").mkdir()
    write_rows(Path("given/rows.jsonl"), [{"q": f"Q{n}", "a": "word " * n} for n in range(1, 21)])
    write_rows(Path("given/held.jsonl"), [row("held")])
    prepare("given/rows.jsonl", "--columns", "user=q,assistant=a", "--valid", "given/held.jsonl", "--max-length", 64,
            "--on-long", "split", "--seed", 5)
    before, told = contents(DATA), settings()
    assert report()["rejected_rows"] > 0 and questions("valid") == ["held"]
    done = again()
    assert done["status"] == "up-to-date"
    assert f"data: {os.path.normpath('given/rows.jsonl')}, as before; name files to use others" in done["err"]
    assert all(f"{name} " in done["err"].split("settings as before: ")[1].splitlines()[0] for name in (
        "columns", "valid", "max_length", "on_long", "seed", "max_rejected"))
    assert "near_threshold" not in done["err"], "only what was said"
    assert again("--force")["status"] == "done"
    assert (contents(DATA), settings()) == (before, told)
    # What is said now wins, and is what counts the next time.
    assert again("--max-length", 512)["summary"]["rejected_rows"] == 0
    assert settings() == told | {"max_length": 512}
    assert again("--valid", 4)["summary"]["valid_rows"] == 4
    assert settings() == told | {"max_length": 512, "valid": 4.0}
    # Elsewhere, and from another directory, the same files are found.
    Path("moved").mkdir()
    for name in ("given", "runs"):
        shutil.move(name, f"moved/{name}")
    monkeypatch.chdir("moved/given")
    assert invoke("prepare", "--run", "../runs/tiny-gemma", "--model", tiny, "--json").json["status"] == "up-to-date"


def test_naming_data_begins_with_the_defaults(prepare):
    write_rows(Path("rows.jsonl"), rows(20))
    prepare("rows.jsonl", "--valid", 5, "--max-length", 99)
    assert again("rows.jsonl")["status"] == "done"
    assert (settings()["valid"], settings()["max_length"], settings()["max_rejected"]) == (0.1, 2048, 0.2)


def test_rows_that_were_added_are_read_the_next_time(prepare):
    Path("folder").mkdir()
    write_rows(Path("folder/a.jsonl"), rows(3))
    prepare("folder", "--valid", 0)
    write_rows(Path("folder/b.jsonl"), [row("new")])
    done = again()
    assert (done["status"], done["summary"]["train_rows"]) == ("done", 4)
    write_rows(Path("folder/b.jsonl"), [row("newer")])
    assert again()["status"] == "done" and questions()[-1] == "newer"


@pytest.mark.parametrize("named", [samples.training_path(), "example:finance"])
def test_our_own_examples_are_found_again(prepare, named):
    assert prepare(named, "--valid", 3)["summary"]["valid_rows"] == 3
    assert settings()["data"] == ["gemma_tune:samples/finance.jsonl"]
    assert again()["status"] == "up-to-date"


def test_of_standard_input_and_other_copies_each_is_recorded_as_itself(prepare):
    """Files beside the copy of standard input, such as the lock file of a dataset, are not taken for it."""
    prepare("-", "--valid", 0, stdin=json.dumps(row("a")))
    [copy] = settings()["data"]
    assert copy.startswith("inputs/stdin-")
    write_rows(DATA.parent / "inputs" / "other.jsonl", [row("b")])
    prepare("-", "runs/tiny-gemma/inputs/other.jsonl", "--valid", 0, stdin=json.dumps(row("a")))
    assert settings()["data"] == [copy, "inputs/other.jsonl"]


# --- several processes

def varied() -> list[Any]:
    """Rows of every fate."""
    return [*rows(60), *(alpaca(f"do {n}", "x " * n) for n in range(1, 41)), *rows(5), talk(60), *({"bad": n} for n in range(9)),
            *(row(f"q{n % 7}", f"answer {n}") for n in range(30)), row("a\x07"), *({"text": f"text {n}"} for n in range(9))]


@pytest.fixture
def two_processes(monkeypatch):
    """Small blocks and two processes, whatever the data's size; a list of what ``_processes`` was asked."""
    asked = []
    monkeypatch.setattr(module, "_SEVERAL_PROCESSES", 0)
    monkeypatch.setattr(module, "_processes", lambda *args: asked.append(args) or 2)
    monkeypatch.setattr(module, "_BLOCK", 800)
    return asked


def test_several_processes_write_the_same_bytes(prepare, two_processes, monkeypatch):
    parents = []
    real = Judge.__call__
    monkeypatch.setattr(Judge, "__call__", lambda self, block: parents.append(os.getpid()) or real(self, block))
    write_rows(Path("a.jsonl"), [*varied(), *({**row(f"m{n}", "b"), "mood": n % 3} for n in range(9))])  # unread, varying
    Path("b.json").write_text(json.dumps(varied()[:30], indent=2))
    args = ("a.jsonl", "b.json", "--max-length", 128, "--near-duplicates", "--force")
    prepare(*args)
    assert two_processes and not parents, "the work is done in other processes"
    assert (DATA / "train.jsonl").stat().st_size > 4000
    several = contents(DATA)
    monkeypatch.setattr(module, "_processes", lambda *_: 1)
    prepare(*args)
    assert len(parents) > 10
    assert contents(DATA) == several


def test_small_data_is_checked_in_this_process(tmp_path):
    from gemma_tune.data.reading.rows import Source

    def source(size: int | None) -> Source:
        return Source("a", tmp_path, "csv", size)

    assert module._processes([source(1000)], 1000) == 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert module._processes([source(1 << 30)], 1 << 30) == cores
    assert module._processes([source(10), source(None)], 10) == cores, "of a dataset on the Hub the size is not known"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="has no such signal")
def test_a_process_that_is_killed(prepare, two_processes, monkeypatch):
    prepare(write_rows(Path("before.jsonl"), rows(4)))
    before = contents(DATA.parent)
    parent = os.getpid()

    def die(self: Any, block: Any) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Judge, "__call__", die)
    error = prepare(write_rows(Path("rows.jsonl"), varied()), code=WORK_FAILED)
    assert error["message"] == "a process that prepares rows was killed, perhaps because memory ran out"
    assert "run the same command again" in error["hint"]
    assert contents(DATA.parent) == before
    assert not list(DATA.parent.glob(".new-*")) and not list(DATA.parent.glob(".old-*"))


def test_a_process_that_has_met_others_does_not_fork():
    """`train DATA` prepares in a process that has threads already when several train together."""
    script = ("import torch.distributed as d; from gemma_tune.prepare import processes; print(processes._context().get_start_method());"
              "d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1);"
              "print(processes._context().get_start_method(), processes._arguments('judge'))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["fork", "spawn ('judge',)"], done.stderr


WAITING = """
import os, time
from gemma_tune.prepare.processes import judged_blocks

class Waits:
    def __call__(self, block):
        open(f"{os.getpid()}.pid", "w").close()
        time.sleep(300)

list(judged_blocks([(n, n) for n in range(2)], Waits(), 2))
"""


def waiting_processes(workplace) -> tuple[subprocess.Popen, list[int]]:
    """A process that waits for two of its own, and their ids; they are busy for five minutes."""
    parent = subprocess.Popen([sys.executable, "-c", WAITING], stderr=subprocess.PIPE)
    for _ in range(600):
        if len(children := [int(path.stem) for path in workplace.glob("*.pid")]) == 2:
            break
        time.sleep(0.1)
    assert len(children) == 2
    return parent, children


def still_there(children: list[int]) -> list[int]:
    """Those of the processes that do not end within ten seconds."""
    for _ in range(100):
        if not (left := [pid for pid in children if Path(f"/proc/{pid}").exists()]):
            break
        time.sleep(0.1)
    return left


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_their_parent(workplace):
    """A parent that is killed cannot end them itself."""
    parent, children = waiting_processes(workplace)
    parent.kill()
    parent.communicate()
    assert not still_there(children)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("pause", [0, 0.02, 0.3])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_ctrl_c_ends_them_at_once_however_often_it_is_pressed(workplace, times, pause):
    parent, children = waiting_processes(workplace)
    for _ in range(times):
        parent.send_signal(signal.SIGINT)
        time.sleep(pause)
    _, err = parent.communicate(timeout=60)
    assert b"KeyboardInterrupt" in err
    assert not still_there(children)


TERMINATED_WHILE_FORKING = """
import os, signal
from gemma_tune.base.machine import Terminated, terminable
from gemma_tune.prepare import processes

sent = []
def send():
    if not sent:
        sent.append(os.kill(os.getpid(), signal.SIGNAL))

if __name__ == "__main__":
    os.register_at_fork(after_in_parent=send)
    try:
        with terminable():
            list(processes.judged_blocks([(n, n) for n in range(50)], str, 2))
        print("went on")
    except (KeyboardInterrupt, Terminated) as e:
        print("ended", type(e).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked")
@pytest.mark.parametrize(("number", "said"), [("SIGTERM", "ended Terminated"), ("SIGINT", "ended KeyboardInterrupt")])
def test_a_signal_that_comes_while_children_are_made_is_not_lost(tmp_path, number, said):
    """What a handler raises inside a fork is ignored by Python."""
    (tmp_path / "stopped.py").write_text(TERMINATED_WHILE_FORKING.replace("SIGNAL", number))
    done = subprocess.run([sys.executable, "stopped.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.strip() == said, done.stderr


INTERRUPTED_WHILE_RECEIVING = """
import multiprocessing, sys, threading, time
from gemma_tune.prepare import processes

def rows(size):
    return b"x" * size

def receives():
    frames = sys._current_frames()
    for thread in threading.enumerate():
        frame = frames.get(thread.ident)
        while frame is not None and thread is not threading.main_thread():
            if frame.f_code.co_name == "_recv":
                return True
            frame = frame.f_back
    return False

if __name__ == "__main__":
    try:
        with processes._pool(2, None) as pool:
            sent = [pool.submit(rows, 200_000_000) for _ in range(4)]
            while not receives():
                time.sleep(0.001)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        print("ended", multiprocessing.active_children())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked")
def test_children_that_are_stopped_while_they_send_rows_leave_nobody_waiting(tmp_path):
    """The rest of what they sent never comes."""
    (tmp_path / "stopped.py").write_text(INTERRUPTED_WHILE_RECEIVING)
    done = subprocess.run([sys.executable, "stopped.py"], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "ended []\n", done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_breaks_off_leaves_the_old_data(prepare, two_processes, monkeypatch, processes):
    monkeypatch.setattr(module, "_processes", lambda *_: processes)
    prepare(write_rows(Path("before.jsonl"), rows(4)))
    before = contents(DATA.parent)
    text = json.dumps(varied(), indent=1)
    Path("broken.json").write_text(text[:-300])
    assert "not valid JSON" in prepare("before.jsonl", "broken.json", code=2)["message"]
    assert contents(DATA.parent) == before
    assert not list(DATA.parent.glob(".new-*"))


def test_a_fault_of_ours_is_reported_and_leaves_the_old_data(prepare, monkeypatch):
    prepare(write_rows(Path("before.jsonl"), rows(4)))
    before = contents(DATA.parent)
    monkeypatch.setattr(module, "select", lambda *_: 1 // 0)
    error = prepare(write_rows(Path("rows.jsonl"), rows(9)), code=WORK_FAILED)
    assert error["message"].startswith("unexpected ZeroDivisionError") and "--debug" in error["hint"]
    assert contents(DATA.parent) == before


# --- what is shown

def test_preview_shows_what_is_learned(prepare):
    write_rows(Path("rows.jsonl"), [talk(1, 2), row("What is [bold]?", "[bold]A[/bold]"), row("last")])
    preview = prepare("rows.jsonl", "--valid", 0, "--preview", 2)["err"]
    assert "── sequence 1\n<bos><start_of_turn>user\nq0<end_of_turn>\n<start_of_turn>model\n⟦word end 0<end_of_turn>⟧\n" \
           "<start_of_turn>user\nq1<end_of_turn>\n<start_of_turn>model\n⟦word word end 1<end_of_turn>⟧\n" in preview
    assert "── sequence 2\n" in preview and "⟦[bold]A[/bold]<end_of_turn>⟧" in preview and "last" not in preview.split("──")[2]
    assert "⟦" not in prepare("rows.jsonl", "--valid", 0)["err"]
    done = again("--preview", 99, "--quiet")
    assert done["status"] == "up-to-date" and "── sequence 3\n" in done["err"], "also without preparing again"


def test_the_report_has_what_is_documented(prepare):
    prepare(write_rows(Path("rows.jsonl"), varied()), "--max-length", 128)
    assert report().keys() == {
        "rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows", "near_duplicate_rows", "drawn", "files", "formats",
        "kind", "rejected_by_reason", "first_rejected", "prompts_with_several_answers", "contradictions", "asked_on_both_sides", "ends_held_out",
        "sequences", "tokens", "trained_tokens", "trained_tokens_of_texts", "left_out_answers", "unread", "calls_without_result",
        "white_space_left_out", "markup", "rows_of_several_sequences",
        "before_the_limit", "turns", "length"}
    assert report()["before_the_limit"].keys() == {
        "rows", "sequences", "turns", "tokens", "trained_tokens", "length", "histogram", "limits", "long", "scripts",
        "longest_rows", "shortest_rows"}
    assert report()["files"] == [{"file": "rows.jsonl", "rows": len(varied())}]
    assert report()["formats"] == {"messages": 97, "alpaca": 40, "text": 9}
    assert report()["first_rejected"] == {r["code"]: f"rows.jsonl:{r['line']}" for r in reversed(read("rejected"))}
    assert report()["before_the_limit"]["longest_rows"][0]["file"] == "rows.jsonl"


def test_the_figures_in_the_manifest_are_those_of_the_report(prepare):
    summary = prepare(write_rows(Path("rows.jsonl"), varied()))["summary"]
    figures = report()
    same = ("rows", "train_rows", "valid_rows", "rejected_rows", "duplicate_rows", "rejected_by_reason", "sequences",
            "tokens", "trained_tokens")
    assert {name: summary[name] for name in same} == {name: figures[name] for name in same}
    for told, source in ((summary, figures), (summary["before_the_limit"], figures["before_the_limit"])):
        assert told["turns"] == source["turns"]
        assert all(told[name] == source["length"][name] for name in ("shortest", "longest", "p50", "p90", "p99"))


def test_rows_that_were_left_out_are_in_the_figures_before_the_limit_alone(prepare):
    long = row("long", "word " * 200)
    summary = prepare(write_rows(Path("rows.jsonl"), [*(row(f"number {n}") for n in range(9)), long]),
                      "--max-length", 128, "--max-rejected", 1)["summary"]
    before = summary["before_the_limit"]
    assert summary["rejected_by_reason"] == {"too_long": 1}
    kept = [len(s.ids) for side in ("train", "valid") for s in sequences(side)]
    assert summary["longest"] == summary["p99"] == max(kept) < 128 < before["longest"] == before["p99"]
    assert (summary["turns"], before["turns"]) == (18, 20)
    assert summary["tokens"] == sum(kept)


# --- tokens depend on more than the rows

def test_tokens_of_other_versions_are_made_again(prepare, monkeypatch):
    write_rows(Path("rows.jsonl"), rows(4))
    prepare("rows.jsonl")
    other = {**prepare("rows.jsonl")["summary"]["encoding"], "tokenizers": "0.0.1"}
    monkeypatch.setattr(stage, "encoding_key", lambda _: other)
    done = prepare("rows.jsonl")
    assert done["status"] == "done" and "other versions of the code or its libraries made the tokens" in done["err"]
    assert done["summary"]["encoding"] == other
    assert prepare("rows.jsonl")["status"] == "up-to-date"
    (DATA / "tokens" / "train.arrow").write_bytes(b"")
    assert prepare("rows.jsonl")["status"] == "done" and len(sequences()) + len(sequences("valid")) == 4


def test_another_template_makes_other_tokens(tiny, tmp_path):
    model = with_template(tiny, tmp_path / "models")
    write_rows(Path("rows.jsonl"), rows(4))
    prepared(model, "rows.jsonl", "--valid", 0)
    before = [s.ids for s in sequences()]
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("You are Qwen, created by Alibaba Cloud. You are a helpful", "You are a kind"))
    done = prepared(model, "rows.jsonl", "--valid", 0)
    assert done["status"] == "done" and [s.ids for s in sequences()] != before
    assert {side: len(read(side)) for side in SIDES} == {"train": 4, "valid": 0, "rejected": 0, "duplicates": 0}


def test_a_run_whose_data_files_are_gone_is_prepared_all_the_same(cli, tiny, data):
    """It was taken elsewhere, or is kept without them; what asks for something else needs them."""
    assert cli("prepare", data, "--model", tiny, "--valid", 0.2).code == 0
    before = contents(DATA.parent)
    data.unlink()
    result = cli("prepare", "--json")
    assert (result.code, result.json["status"]) == (0, "up-to-date"), result.err
    assert "rows.jsonl is gone; what was prepared from it stays as it is" in result.err
    assert contents(DATA.parent) == before
    for more in (("--max-length", 100), ("--force",), (data,)):
        assert "there is no file" in cli("prepare", *more).err
    assert cli("train", "--epochs", 1, "--rank", 4).code == 0
