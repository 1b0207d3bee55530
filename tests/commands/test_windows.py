"""Whole commands under Windows' rules, see ``support.windows``."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from support.command import ROOT, rows, write_rows
from support.windows import CODE_PAGE, OTHER_DRIVE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the double looks into /proc")


def started(*commands: list[object], **more: str) -> subprocess.Popen:
    """Commands that run one after the other, with output in the code page of Chinese Windows."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PYTHONIOENCODING": CODE_PAGE,
           "PYTHONUTF8": "0", "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "ignore::EncodingWarning",
           "OMP_NUM_THREADS": "1", **more}
    texts = json.dumps([[str(word) for word in command] for command in commands])
    return subprocess.Popen([sys.executable, "-m", "support.windows", texts], env=env, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ran(*commands: list[object], stdin: bytes = b"", **more: str) -> tuple[bytes, str]:
    """What they wrote; all of them ended well."""
    with started(*commands, **more) as process:
        out, err = process.communicate(stdin)
    text = err.decode(CODE_PAGE)
    assert process.returncode == 0, text
    assert not re.search(r"held:|unexpected|Traceback|EncodingWarning", text), text
    return out, text


def test_every_stage_obeys_the_rules_for_files(tiny, tmp_path):
    """Also where each replaces what an earlier command in the same process has read, and a training goes on."""
    write_rows(tmp_path / "rows.jsonl", [*rows(), {"messages": [
        {"role": "user", "content": "毛利率？"}, {"role": "assistant", "content": "是的：✓ 😀"}]}])
    settings = tmp_path / "settings.yaml"
    settings.write_bytes("train:  # 毛利率\n  max_steps: 12\n  rank: 4\n  dtype: fp32\n  learning_rate: 0.001\n  save_steps: 1\n"
                         "  eval_steps: 3\n  keep_checkpoints: 2\n  samples: 0\n".replace("\n", "\r\n").encode())
    train = ["train", "--config", settings]
    with started(["prepare", "rows.jsonl", "--model", tiny], train) as process:
        said = ""
        for line in process.stderr:
            said += line.decode(CODE_PAGE)
            if "step 3: validation loss" in said:
                process.send_signal(signal.SIGINT)
                break
        said += process.communicate()[1].decode(CODE_PAGE)
    assert process.returncode == 130 and "unexpected" not in said, said
    run = Path("runs/tiny-gemma")
    assert len([*(run / "training_checkpoints").glob("checkpoint-*")]) == 2, "the others could be removed"
    out, more = ran(
        train, ["train", "--continue", "--max-steps", 14], ["merge"], ["merge", "--force"],
        ["eval", "--questions", 1, "--max-new-tokens", 4], ["export-ollama", "--quant", "f16", "--no-measure"],
        ["export-ollama", "--quant", "f16", "--no-measure", "--force"],
        ["chat", "--prompt", "毛利率？😀", "--max-new-tokens", 4, "--json"], ["chat", "--max-new-tokens", 4, "--json"],
        ["prepare", "rows.jsonl", "--valid", 2, "--model", tiny, "--force"], [*train, "--max-steps", 3], ["status"],
        stdin='{"prompt": "毛利率？"}\r\n现金流\r\n'.encode())
    assert "where an earlier training stopped" in more
    said = [json.loads(line) for line in out.splitlines() if line.startswith(b'{"')]  # as UTF-8, which JSON is
    assert [answer["prompt"] for answer in said] == ["毛利率？😀", "毛利率？", "现金流"]
    assert not [*run.rglob(".new-*"), *run.rglob(".old-*"), *run.rglob("*.partial")]


def test_model_and_data_can_lie_on_other_drives_than_the_run(tiny, tmp_path, monkeypatch):
    drive = tmp_path / "d"
    shutil.copytree(tiny, drive / "tiny-gemma")
    write_rows(drive / "rows.jsonl", rows())
    monkeypatch.setenv(OTHER_DRIVE, str(drive))
    run = tmp_path / "my run"
    _, said = ran(["prepare", "d/rows.jsonl", "--model", "d/tiny-gemma", "--run", "my run"],
                  ["prepare", "--valid", 2, "--run", "my run"], ["cd", drive], ["prepare", "--run", run, "--force"])
    assert 'next: gemma-tune train --run "my run"' in said, "quotes that cmd.exe knows, too"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["model"]["path"] == str(drive / "tiny-gemma")


def script(text: str, **more: Any) -> subprocess.Popen:
    """A program that begins under Windows' rules."""
    return subprocess.Popen([sys.executable, "-c", f"from support import windows\nwindows.install()\n{text}"],
                            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


CHILD = """
import os, sys
from pathlib import Path
from gemma_tune.gguf import engine
engine.find_engine = lambda: "xllamacpp 1"
engine.child_command = lambda *_: [sys.executable, "-c", "print('{\\"address\\": \\"http://127.0.0.1:9\\"}', flush=True); input()"]
for talking in (True, False):
    with engine.Engine(Path("model.gguf"), 64, talking=talking) as one:
        assert (os.getpgid(one._process.pid) != os.getpgid(0)) == talking
"""
WAITING = """
import time
from gemma_tune.answers import stream
from gemma_tune.chat import scripts
def never():
    time.sleep(300)
    yield
print("ready", flush=True)
"""
SCANNED = """
import threading
from pathlib import Path
from gemma_tune.base import files
from gemma_tune.base.errors import UserError, WorkFailed
target, folder = Path("target"), Path("folder")
folder.mkdir()
(folder / "file").write_bytes(b"old")
target.write_bytes(b"old")
scanned = [target.open("rb"), (folder / "file").open("rb")]
threading.Timer(0.3, lambda: [one.close() for one in scanned]).start()
files.write_atomic(target, b"new")
with files.replacing_directory(folder) as fresh:
    (fresh / "file").write_bytes(b"new")
assert target.read_bytes() == (folder / "file").read_bytes() == b"new"
files._SCANNED = 0.1
def renewed():
    with files.replacing_directory(folder) as fresh:
        (fresh / "file").write_bytes(b"newer")
for held, renew in ((target, lambda: files.write_atomic(target, b"newer")), (folder / "file", renewed)):
    with held.open("rb"):
        try:
            with files.os_errors(Path(".")):
                renew()
        except WorkFailed as e:
            assert e.message == f"{held.parts[0]} is open in another program" and "close what has it open" in e.hint, e.message
        else:
            raise AssertionError
    assert held.read_bytes() == b"new" and len([*Path(".").iterdir()]) == 2
files.os.access = lambda path, mode: path != "read-only"
Path("read-only").touch()
for onto in ("folder", "read-only"):  # of which it says the same
    denied = PermissionError(13, "Access is denied", ".new-" + onto, None, onto)
    denied.winerror = 5
    try:
        with files.os_errors(Path(".")):
            raise denied
    except UserError as e:
        assert e.message.startswith("no permission to write"), e.message
"""
TOGETHER = """
import subprocess, sys
from gemma_tune.train import launch
start = "import time, sys\\ntry:\\n print(flush=True)\\n time.sleep(60)\\nexcept KeyboardInterrupt: sys.exit(130)"
workers = launch._Workers([launch.subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE) for _ in range(2)])
assert all(process.stdout.readline() for process in workers.processes)
with workers.signals_passed_on():
    print("ready", flush=True)
    assert workers.wait() == [130, 130] and workers.signals == 1
"""


def test_a_file_that_another_program_has_open_for_moments_is_waited_for():
    with script(SCANNED) as process:
        assert process.wait() == 0, process.stderr.read().decode()


def test_ctrl_c_does_not_reach_the_engine_that_a_chat_talks_to():
    with script(CHILD) as process:
        assert process.wait() == 0, process.stderr.read().decode()


@pytest.mark.parametrize("waits", ["next(scripts.windows(never(), whole=False))", "next(iter(stream.Pieces(None)))"])
def test_ctrl_c_ends_waiting_for_another_program_and_for_the_first_token(waits):
    with script(WAITING + waits) as process:
        assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            said = process.communicate(timeout=20)[1].decode()
        finally:
            process.kill()
    assert said.splitlines()[-1] == "KeyboardInterrupt", said


def test_ctrl_c_is_not_passed_on_to_processes_that_the_console_tells_itself():
    with script(TOGETHER, start_new_session=True) as process:
        assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait() == 0, process.stderr.read().decode()


@pytest.mark.parametrize("words", [["export-ollama", "--quant", "q8_0", "q4_k_m"], ["train", "--target-modules", "q_proj", "k_proj"],
                                   ["prepare", "rows.jsonl", "--columns", "user=q", "assistant=a"]])
def test_of_a_value_that_powershell_took_apart_is_said_how_it_stays_whole(data, words):
    with started(words) as process:
        said = process.communicate()[1].decode(CODE_PAGE)
    assert process.returncode == 2 and "in PowerShell a value with a comma stands in quotes" in said, said


NO_READER = """
import errno, io, sys
class Closed(io.StringIO):
    def write(self, text):
        raise OSError(errno.EINVAL, "Invalid argument")
sys.stdout = Closed()
from gemma_tune.cli.commands import app
sys.argv[1:] = """


@pytest.mark.parametrize("words", [["runs", "--json"], ["--help"]])
def test_a_reader_that_has_seen_enough_is_no_fault(words):
    """As ``more`` that is left, whose pipe Windows' Python calls an invalid argument."""
    with script(f"{NO_READER}{words}\napp()") as process:
        assert b"Error" not in process.communicate()[1] and process.returncode == 1


@pytest.mark.parametrize("run", ["aux", "what?"])
def test_a_name_that_no_directory_can_have_is_said(tiny, data, run):
    with started(["prepare", data, "--model", tiny, "--run", run]) as process:
        said = process.communicate()[1].decode(CODE_PAGE)
    assert process.returncode == 2 and f"Error: {run} cannot be used: The filename, " in said, said


HELD = """
import os
os.mkdir("folder")
file = open("folder/file", "w+b")
file.write(b"content")
file.flush()
open("other", "w", encoding="utf-8").close()
def refused(what, *paths):
    try:
        what(*paths)
    except OSError as e:
        return e.winerror
assert refused(os.replace, "other", "folder/file") == refused(os.rename, "folder", "moved") == 5
assert refused(os.unlink, "folder/file") == refused(os.replace, "folder/file", "new") == 32
import mmap
mapped = mmap.mmap(file.fileno(), 0)
file.close()
assert refused(os.unlink, "folder/file") == 32
mapped.close()
assert refused(os.rename, "other", "folder/file") == 183 and refused(os.symlink, "other", "link") == 1314
assert refused(open, "aux.txt", "wb") == refused(os.mkdir, "a:b") == refused(os.mkdir, "a.") == 123
assert refused(os.open, "folder", os.O_RDONLY) == 5
os.replace("other", "folder/file")
"""


def test_the_double_refuses_what_windows_refuses(tmp_path):
    with script(HELD) as process:
        assert process.wait() == 0, process.stderr.read().decode()
