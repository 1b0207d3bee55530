"""``--help``: groups, the width of the terminal, nothing cut and no paragraph broken in the middle."""

from __future__ import annotations

import re

import pytest
import typer

from gemma_tune.cli.commands import app
from gemma_tune.cli.help_page import GROUPS
from gemma_tune.config.stages import DEFAULT_MODEL

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_fits_and_nothing_is_lost(cli, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", str(width))
    text = cli(name, "--help").out
    long = [line for line in text.splitlines() if len(line) > width and not line.startswith("Example:")]
    assert not [line for line in long if " " in line.strip()]
    words = " ".join(text.split())
    for param in COMMANDS[name].params:
        assert all(opt in words for opt in (*param.opts, *param.secondary_opts) if opt.startswith("--"))
        assert " ".join((param.help or "").replace("\\[", "[").split()) in words, param.name


@pytest.mark.parametrize("name", COMMANDS)
def test_paragraphs_are_wrapped_anew(cli, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    about = cli(name, "--help").out.split("\n\n")[1:3]
    for paragraph in about:
        lines = paragraph.splitlines()
        for line, after in zip(lines, lines[1:]):
            assert len(line) + 1 + len(after.split()[0]) > 80, f"broken before its end: {line!r}"


def test_options_stand_in_their_groups(cli):
    text = cli("train", "--help").out
    places = [text.index(f"\n{title}\n") for title in (GROUPS["common"], GROUPS["speed"], GROUPS["advanced"])]
    assert places == sorted(places)
    for flag, after, before in (("--epochs", places[0], places[1]), ("--qlora", places[1], places[2]),
                                ("--warmup", places[2], len(text))):
        assert after < text.index(f"  {flag}" if flag != "--epochs" else "-e, --epochs") < before
    assert f"\n{GROUPS['data']}\n" in cli("prepare", "--help").out


def test_every_group_is_one_that_there_is():
    for name, command in COMMANDS.items():
        for param in command.params:
            assert getattr(param, "rich_help_panel", None) in (None, *GROUPS), (name, param.name)


def test_the_program_lists_its_commands(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = cli("--help").out
    for name in COMMANDS:
        assert re.search(rf"(?m)^  {name}  +\S", text)
    assert "\nJust to see it: gemma-tune run --model demo\n" in text


@pytest.mark.parametrize("name", ["tune", "chat", "eval", "export-ollama", "status"])
def test_a_command_that_begins_no_run_promises_no_model_without_one(cli, name):
    assert DEFAULT_MODEL not in cli(name, "--help").out
    assert "there is no run under runs/ yet" in cli(name, *(["--prompt", "hi"] if name == "chat" else [])).err


def test_a_run_says_what_is_answered_without_leaning_on_another_option(cli):
    assert "How many held-out rows the base and the tuned model answer." in " ".join(cli("run", "--help").out.split())
