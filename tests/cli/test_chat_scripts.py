"""What is said of questions without an answer."""

from __future__ import annotations

from gemma_tune.base.errors import UserError
from gemma_tune.cli.chat.scripts import _Problems


def test_each_is_named_with_its_line_and_those_left_out_are_counted(capsys):
    problems = _Problems()
    problems.asked, problems.cut = 27, [4, 4]
    problems.failed = [("q.jsonl:1", UserError("q.jsonl:1: the prompt is no text", "write a text")),
                       *((f"q.jsonl:{n}", UserError("the chat template refuses it", "another hint")) for n in range(2, 26))]
    failure = problems.failure()
    assert failure.message == "25 of 27 prompts could not be answered; the others were" and failure.hint == "write a text; another hint"
    assert failure.problems[:2] == ("q.jsonl:1: the prompt is no text", "q.jsonl:2: the chat template refuses it")
    assert len(failure.problems) == 21 and failure.problems[-1] == "and 5 more"
    problems.tell_cut()
    assert "2 of 2 answers are cut off" in capsys.readouterr().err
