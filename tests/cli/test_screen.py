"""Figures as people read them, and help."""

from __future__ import annotations

import pytest

from gemma_tune.base.words import counted, span
from gemma_tune.cli.screen import figure


@pytest.mark.parametrize("command", [(), *((name,) for name in (
    "prepare", "train", "chat", "eval", "merge", "export-ollama", "run", "status", "runs", "doctor"))])
def test_every_command_knows_h(cli, command):
    short, long = cli(*command, "-h"), cli(*command, "--help")
    assert short.code == 0 and short.out == long.out != ""


def test_a_share_is_shown_as_one():
    assert [figure("check_same_tokens", share) for share in (1.0, 0.9987, 0.0)] == ["100 %", "99.87 %", "0 %"]


def test_one_is_no_plural():
    assert [counted(n, "row") for n in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
    assert [span(seconds) for seconds in (42, 600, 9000)] == ["42 s", "10 min", "2.5 h"]
