"""What people see of the data: the report and the preview, on a terminal and in a file."""

from __future__ import annotations

import numpy as np
import pytest
from rich.text import Text

from gemma_tune.cli import console
from gemma_tune.cli import data_report as console_data
from gemma_tune.prepare.statistics import Measured, Statistics
from support.screen import Screen, written


@pytest.fixture
def screen(monkeypatch):
    return Screen(monkeypatch)


def report(lengths=None, name="data/rows.jsonl", opening="What is a [bold]bond[/bold]?", **more):
    lengths = np.array(lengths if lengths is not None else [*range(100, 900), *[5000] * 30])
    rows = np.arange(len(lengths))
    found = Statistics()
    found.add(Measured(lengths, rows, np.stack([lengths // 2, lengths], 1), rows, np.full(len(rows), 2), rows + 1,
                       (rows % 10 == 0).astype(np.uint8), [name] * len(rows), [opening] * len(rows)))
    return {
        "rows": 1234, "train_rows": 700, "valid_rows": 100, "rejected_rows": 34, "duplicate_rows": 400,
        "near_duplicate_rows": 0, "sequences": 800, "tokens": found.tokens, "trained_tokens": found.trained_tokens,
        "rejected_by_reason": {"alternation": 4, "too_long": 30}, "first_rejected": {"too_long": f"{name}:801"},
        "prompts_with_several_answers": {"prompts": 3, "rows": 7, "examples": [["a.jsonl:3", "a.jsonl:9"]]},
        "before_the_limit": found.as_dict(2048, "drop"), **more}


def test_the_report_in_a_file_has_one_line_for_each_thing(screen):
    out = screen()
    console.ConsoleListener().data_report(report())
    lines = [" ".join(line.split()) for line in written(out).splitlines()]
    assert "rows 1,234" in lines and "duplicates, left out 400" in lines
    assert not any("near-duplicates" in line or "sequences" in line for line in lines)  # nothing to say of them
    assert "! 30 rows (27 % of the trained tokens) are longer than 2,048 tokens and left out; --max-length 5056 keeps all" in lines
    assert "writing systems: Latin 90 %, Han 10 %" in lines
    assert "longest 5,000 data/rows.jsonl:801" in lines and "shortest 100 data/rows.jsonl:1" in lines
    assert "What is a [bold]bond[/bold]?" in lines
    assert lines.index("rejected 30 too_long, first data/rows.jsonl:801") + 1 == lines.index("4 alternation")
    assert "3 prompts have several answers, in 7 rows, such as a.jsonl:3 and a.jsonl:9; all of them are kept" in lines
    assert "\x1b" not in written(out)


def test_long_places_are_whole_in_a_file_and_folded_on_a_terminal(screen):
    name = "data/" + "directory/" * 12 + "rows.jsonl"
    out = screen()
    console_data.data_report(report(name=name))
    assert f"{name}:801" in written(out)
    out = screen(terminal=True, color_system=None)
    console_data.data_report(report(name=name, opening="债券" * 40))
    shown = written(out)
    assert max(Text(line).cell_len for line in shown.splitlines()) <= 80
    assert f"{name}:801" in "".join(shown.split()) and "…" in shown


def test_the_histogram_is_drawn_to_scale(screen):
    out = screen()
    console_data.data_report(report([10] * 64 + [40] * 32 + [70] * 1 + [90] * 2))
    bars = [line for line in written(out).splitlines() if "█" in line or "▏" in line or " - " in line]
    drawn = {int(line.split()[-1]): line.count("█") for line in bars}
    assert drawn[64] == 32 and drawn[32] == 16
    [one] = [line for line in bars if line.endswith(" 1")]
    assert "▌" in one  # half a cell
    empty = [line for line in bars if line.endswith(" 0")]
    assert empty and not any(c in "".join(empty) for c in "▏█")


def test_a_single_row_among_many_is_still_seen(screen):
    out = screen()
    console_data.data_report(report([*[10] * 5000, *[40] * 5000, 90]))
    assert [line for line in written(out).splitlines() if line.endswith("▏ 1")]


def test_the_bin_of_the_limit_is_marked(screen):
    found = report([*range(100, 4000)])
    out = screen()
    console_data.data_report(found)
    [line] = [line for line in written(out).splitlines() if "← --max-length" in line]
    low, high = (int(n.replace(",", "")) for n in line.split("█")[0].split("-"))
    assert low <= 2048 <= high


def test_an_ascii_terminal_gets_ascii_bars(screen):
    out = screen(encoding="ascii")
    console_data.data_report(report([10, 20, 20, 3000]))
    assert "#" * 32 + " " in written(out) and "\\u" not in written(out)


@pytest.mark.parametrize("lengths", [[], [7]])
def test_few_rows_are_no_trouble(screen, lengths):
    out = screen()
    console_data.data_report(report(lengths, prompts_with_several_answers={"prompts": 0, "rows": 0, "examples": []},
                                    rejected_by_reason={}))
    assert ("tokens per row" in written(out)) == bool(lengths)
    assert "first" not in written(out) and "several" not in written(out)


def test_a_second_script_in_few_rows_is_not_mentioned(screen):
    found = report()
    found["before_the_limit"]["scripts"] = {"Latin": 0.995, "Han": 0.005}
    out = screen()
    console_data.data_report(found)
    assert "writing systems" not in written(out)


def test_quiet_shows_no_report(screen):
    out = screen()
    console.ConsoleListener(quiet=True).data_report(report())
    assert written(out) == ""


# --- preview

PIECES = [("<bos>user\nHi [red]you[/red]\n", False), ("Hello!<end>", True), ("", True), ("\n", False)]


def test_in_a_file_learned_text_is_in_brackets(screen):
    out = screen()
    console_data.preview([PIECES])
    assert written(out).splitlines()[1:] == ["── sequence 1", "<bos>user", "Hi [red]you[/red]", "⟦Hello!<end>⟧", ""]


def test_on_a_terminal_learned_text_is_green_and_the_rest_dim(screen):
    out = screen(terminal=True)
    console_data.preview([PIECES])
    shown = written(out)
    assert "\x1b[32mHello!<end>\x1b[0m" in shown and "\x1b[2mHi [red]you[/red]\x1b[0m" in shown
    assert "⟦" not in shown and "sequence 1" in shown


@pytest.mark.parametrize("how", [{"no_color": True}, {"environment": {"NO_COLOR": "1"}}, {"color_system": None},
                                 {"environment": {"TERM": "dumb"}}])
def test_a_terminal_without_colour_gets_brackets(screen, how):
    out = screen(terminal=True, **how)
    console_data.preview([PIECES])
    assert "⟦Hello!<end>⟧" in written(out)


def test_text_cannot_move_the_cursor_or_turn_around(screen):
    out = screen(terminal=True)
    console_data.preview([[("a\x1b[2Jb\rc\x07\u202ed\ud800\x85", True)]])
    shown = written(out)
    assert "a\\x1b[2Jb\\rc\\x07\\u202ed\\ud800\\x85" in shown
    assert "\x1b[2J" not in shown and "\r" not in shown and "\x07" not in shown


def test_lines_are_not_rewrapped(screen):
    text = "word " * 60 + "\n  indented   twice\n"
    out = screen(terminal=True, color_system=None)
    console_data.preview([[(text, False)]])
    assert text in written(out)


def test_answers_side_by_side_are_headed_by_the_question_and_its_pictures(screen):
    out = screen()
    question = {"role": "user", "content": "What is [it]?", "pictures": [{"at": 0, "file": f"pictures/{'a' * 64}.png"}]}
    answer = {"base": "A cat.", "base_ended": True, "tuned": "A dog.", "tuned_ended": False}
    console.comparison([answer | {"prompt": [question]}, answer | {"prompt": [{"role": "user", "content": "Why?"}]}])
    text = written(out)
    assert "What is [it]? (aaaaaaaa….png) ─" in text and " Why? ─" in text and "A dog. …(cut off)" in text
