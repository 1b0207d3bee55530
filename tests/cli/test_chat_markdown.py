"""Answers as they come: Markdown of which nothing is lost, blocks that are printed once, words that are whole."""

from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from gemma_tune.cli.chat import markdown, say
from gemma_tune.cli.chat.markdown import Answer, Tail, Wrapped, finished


def rendered(text: str, width: int = 40) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=False).print(Answer(text))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


@pytest.mark.parametrize("text", [
    "<b>bold</b> and <think>what</think>", "<div>\nhi\n</div>", "a \\(x\\) and \\[y\\] b", "[a]: http://x.org/y",
    "[here](http://x.org/y)", "![alt](http://x.org/p.png)", "one\ntwo\nthree", "x < y && y > z", "snake_case_name",
    "1. one\n2. two", "| a | b |\n|---|---|\n| c1 | d1 |", "```python\nprint(1)\n```", "    indented", "# Head", "结论：好\n依据：对"])
def test_nothing_of_an_answer_is_left_out(text):
    shown = rendered(text)
    for word in text.replace("|---|---|", "").split():
        for part in word.replace("```python", "").replace("```", "").strip("|#").replace("](", " ").split():
            assert part.strip("()[]!.") in shown.replace("\n", " "), shown


def test_lines_of_an_answer_stay_lines():
    assert rendered("Verdict: yes\nWhy: no\n\nEnd").splitlines() == ["Verdict: yes", "Why: no", "", "End"]


def test_headings_begin_at_the_left():
    assert rendered("# Head\n\ntext").splitlines()[0] == "Head"


@pytest.mark.parametrize(("text", "done"), [
    ("a\n\nb", "a\n\n"), ("a\n\n", ""), ("a\nb", ""), ("a\n\nb\n\nc", "a\n\nb\n\n"), ("- a\n\n  more", ""),
    ("```\na\n\nb", ""), ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n"), ("~~~\n```\n\nb", ""),
    ("1. a\n\n    code\n\nend", "1. a\n\n    code\n\n"), ("```\na\n````\n\nb", "```\na\n````\n\n"), ("", "")])
def test_blocks_that_nothing_can_change(text, done):
    assert text[:finished(text)] == done


def test_in_whatever_pieces_it_comes_the_whole_answer_is_printed_once(monkeypatch):
    text = "# Head\n\nOne two\nthree.\n\n- a\n- b\n\n```python\nx = 1\n\ny = 2\n```\n\n今天天气很好 " + "word " * 60 + "\n\nEnd."
    draw = random.Random(0)
    for _ in range(5):
        file = io.StringIO()
        console = Console(file=file, width=50, height=10, force_terminal=False)  # no live region: what is printed
        monkeypatch.setattr(markdown, "out", lambda console=console: console)
        left = text
        with markdown.Rendered() as writer:
            while left:
                size = draw.randrange(1, 30)
                writer.piece(left[:size])
                left = left[size:]
        words = file.getvalue().replace("```python", "").split()
        assert [w for w in words if w not in ("•", "1")] == [w for w in rendered(text, 50).split() if w not in ("•", "1")]
        assert file.getvalue().count("End.") == 1 and file.getvalue().count("x = 1") == 1


def test_what_is_drawn_again_is_no_higher_than_the_screen():
    file = io.StringIO()
    Console(file=file, width=40).print(Tail(Answer("\n".join(f"line {n}" for n in range(50))), 5))
    assert [line.rstrip() for line in file.getvalue().splitlines()] == [f"line {n}" for n in range(45, 50)]


def test_escape_sequences_of_an_answer_are_shown(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(markdown, "out", lambda: Console(file=file, width=50))
    with markdown.Rendered() as writer:
        writer.piece("a \x1b[2J b")
    assert "\\x1b[2J" in file.getvalue() and "\x1b[2J" not in file.getvalue()


@pytest.mark.parametrize("text", ["the quick brown fox jumps over the lazy dog", "a\n  indented line that is long enough",
                                  "x" * 50, "中文没有空格也要能换行，不然会超出边界。", "tabs\tand  two spaces\n\n\nend",
                                  "mixed 中文 and English words here"])
def test_words_are_not_cut_at_the_edge(text, capsys, monkeypatch):
    draw = random.Random(1)
    with Wrapped(20) as writer:
        left = text
        while left:
            size = draw.randrange(1, 6)
            writer.piece(left[:size])
            left = left[size:]
    lines = capsys.readouterr().out.splitlines()
    from rich.cells import cell_len

    assert all(cell_len(line) <= 20 for line in lines), lines
    assert "".join("".join(lines).split()) == "".join(text.split())
    words = [word for word in text.split() if len(word) < 20 and word.isascii()]
    assert all(any(word in line.split() for line in lines) for word in words)


def test_figures_of_an_answer():
    from types import SimpleNamespace

    stream = SimpleNamespace(first=0.25, seconds=2.25, prompt_tokens=100)
    answer = SimpleNamespace(tokens=41)
    assert say.figures(stream, answer, 1024) == (
        "(20.0 tokens/s · first token after 0.25 s · 141 of 1,024 tokens in context)")
    stream = SimpleNamespace(first=None, seconds=0.1, prompt_tokens=None)
    assert say.figures(stream, answer, None) == ""
