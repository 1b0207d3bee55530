"""The line that says what is being loaded: it names what, and is gone before anything else is written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from gemma_tune.base.loading import in_progress, loading
from gemma_tune.cli import screen, spinner
from support.command import ROOT
from support.screen import Screen, on_screen, written


@pytest.fixture
def console(monkeypatch):
    return Screen(monkeypatch)


def wait_for(text: str, file) -> None:
    until = time.monotonic() + 10
    while text not in written(file):
        assert time.monotonic() < until, written(file)
        time.sleep(0.02)


def test_what_is_loaded_is_named_and_the_line_goes(console, capsys):
    file = console(terminal=True)
    with spinner.saying_what_is_loaded():
        with loading("the weights"):
            wait_for("loading the weights", file)
            with loading("the adapter"):
                wait_for("loading the adapter", file)
        assert in_progress() is None
        shown = written(file)
        assert "loading" not in "".join(on_screen(shown)), "gone when the loading ends, not some time later"
        screen.result("42")
    assert capsys.readouterr().out == "42\n"
    assert written(file) == shown and shown.endswith("\x1b[?25h") or "\x1b[?25h" in shown, "the cursor is back"


def test_modules_that_other_threads_import_meanwhile_are_no_error(monkeypatch):
    class Growing(dict):
        def items(self):
            for pair in super().items():
                self[f"one of {len(self) + 1}"] = None
                yield pair

    monkeypatch.setattr("gemma_tune.base.loading.sys", SimpleNamespace(modules=Growing(a=None, b=None)))
    assert in_progress() is None


def test_a_result_takes_the_line_away_first(console):
    file = console(terminal=True)
    with spinner.saying_what_is_loaded(), loading("the weights"):
        wait_for("loading the weights", file)
        screen.clear_the_way()
        assert "loading" not in "".join(on_screen(written(file)))


@pytest.mark.parametrize("terminal, quiet", [(False, False), (True, True)])
def test_nothing_moves_where_nobody_watches(console, terminal, quiet):
    file = console(terminal=terminal)
    with spinner.saying_what_is_loaded(quiet), loading("the weights"):
        time.sleep(3 * spinner.LOOKS_EVERY)
    assert written(file) == ""


def test_libraries_are_named_while_they_are_imported(tmp_path):
    """A stand-in for torch, as the real one takes another time on each machine."""
    (tmp_path / "torch.py").write_text("from gemma_tune.base.loading import in_progress\nseen = in_progress()\n")
    done = subprocess.run([sys.executable, "-c", "import torch; from gemma_tune.base.loading import in_progress; "
                           "print(torch.seen, in_progress())"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=True)
    assert done.stdout.split() == ["torch", "None"]


@pytest.mark.skipif(os.name != "posix", reason="a terminal of its own")
def test_on_a_real_terminal_it_shows_within_half_a_second_of_the_import(tmp_path):
    import pexpect

    (tmp_path / "torch.py").write_text("import time\ntime.sleep(2)\nraise KeyboardInterrupt\n")
    (tmp_path / "row.jsonl").write_text("{}\n")
    child = pexpect.spawn(sys.executable, ["-c", "import time; t = time.monotonic(); import gemma_tune.cli.invocation as s\n"
                                           "from gemma_tune.cli.spinner import saying_what_is_loaded\n"
                                           "print('begins', flush=True)\n"
                                           "with saying_what_is_loaded():\n"
                                           "    try:\n        import torch\n    except KeyboardInterrupt:\n"
                                           "        pass\nprint('over', flush=True)"],
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TERM": "xterm"},
                          encoding="utf-8", timeout=60, dimensions=(24, 80))
    child.expect("begins")
    began = time.monotonic()
    child.expect("loading torch")
    assert time.monotonic() - began < 1.5, "half a second, and what a busy machine adds"
    child.expect("over")
    assert re.search("\x1b\\[\\?25h", child.before), "the cursor is shown again"
    child.close()
