"""Commands to paste: what a shell makes of them are the words that were meant."""

from __future__ import annotations

import shlex
from types import SimpleNamespace

import pytest

from gemma_tune.base import shell


def test_a_posix_shell_gets_the_words_back():
    words = ["gemma-tune", "train", "--run", "my runs/it's 运行", "--quant", "q8_0,q4_0", r"a\b$c"]
    assert shlex.split(shell.join(words)) == words


def test_what_only_a_posix_shell_takes_is_said_to_be_for_one_on_windows(monkeypatch):
    command = "jq -c '.[]' FILE.json > rows.jsonl"
    assert shell.of_posix(command) == command
    monkeypatch.setattr(shell, "os", SimpleNamespace(name="nt"))
    assert shell.of_posix(command) == f"{command} (in Git Bash)"


@pytest.mark.parametrize("word, shown", [
    (r"runs\gemma", r"runs\gemma"), (r"D:\模型\gemma-3.gguf", r"D:\模型\gemma-3.gguf"), ("user=问题", "user=问题"),
    (r"my runs\it's", '"my runs\\it\'s"'), ("q8_0,q4_0", '"q8_0,q4_0"'), ("a&b", '"a&b"'), ("", '""'),
    ("a $b", "'a $b'"), ('{"a": "it\'s"}', """'{"a": "it''s"}'""")])
def test_on_windows_cmd_and_powershell_take_it_for_one_word(monkeypatch, word, shown):
    """Single quotes are signs like others to cmd.exe, and a backslash needs none to either."""
    monkeypatch.setattr(shell, "os", SimpleNamespace(name="nt"))
    assert shell.quote(word) == shown
    assert shell.join(["gemma-tune", word]) == f"gemma-tune {shown}"
