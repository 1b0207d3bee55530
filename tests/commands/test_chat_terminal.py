"""``chat`` in a real terminal, with the line editor and Markdown: pexpect types and reads."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

QUESTION, ANSWER = "Say number 3.", "The number is 3, no more."


@pytest.fixture
def terminal(tmp_path, request):
    """A function: start ``gemma-tune chat`` with these options in a pseudo-terminal with an editor; with ``fresh`` in an
    interpreter that has yet to import the libraries."""
    pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals are not for Windows")
    started = []

    def start(*options, history="", fresh=False):
        if history:
            (tmp_path / "c").mkdir()
            (tmp_path / "c" / "chat_history").write_text(history)
        changed = {"COLUMNS": None, "LINES": None, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color",
                   "GEMMA_TUNE_CACHE": str(tmp_path / "c"), "PROMPT_TOOLKIT_NO_CPR": "1"}
        command = ("chat", *map(str, options), "--dtype", "fp32")
        if fresh:
            environment = {name: value for name, value in {**os.environ, **changed}.items() if value is not None}
            child = pexpect.spawn(sys.executable, ["-m", "gemma_tune", *command], env=environment, timeout=290,
                                  encoding="utf-8", codec_errors="replace", dimensions=(40, 100))
        else:
            child = request.getfixturevalue("forks").terminal(*command, timeout=290, dimensions=(40, 100), **changed)
        started.append(child)
        child.expect_exact("/help")
        child.expect_exact("\x1b[?2004h")  # the editor is ready
        return child

    yield start
    for child in started:
        child.close(force=True)


def enter(child, text: str) -> None:
    child.send(text)
    child.send("\r")


def left(child) -> None:
    enter(child, "/exit")
    child.read()
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)


@pytest.mark.parametrize("at", ["loading", "the prompt", "an answer"])
def test_sigterm_ends_the_chat_and_not_an_answer_alone(terminal, fluent, at):
    child = terminal("--run", fluent, "--base", "-n", 3, fresh=at == "loading")
    if at != "loading":
        enter(child, QUESTION)
        child.expect_exact("cut off after 3 tokens")
    if at == "an answer":
        enter(child, "/set max_new_tokens 90000")
        enter(child, QUESTION)
        child.expect_exact("\x1b[?2004l")
        time.sleep(3)
    if at == "the prompt":
        child.expect_exact("\x1b[?2004h")
        time.sleep(0.5)
    child.kill(signal.SIGTERM)
    rest = child.read()
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (130, None)
    assert ("stopped" in rest or at == "loading") and "Traceback" not in rest
    assert "\x1b[?2004l" in rest or at != "the prompt", "the terminal is as it was"


@pytest.mark.parametrize("waits", [0, 0.1])
def test_sigterm_amid_the_work_of_the_prompt(terminal, fluent, waits):
    """Of the line editor, while it reads its history, of which there is much."""
    history = "".join(f"\n# 2026-11-01 10:00:00\n+question {number}\n" for number in range(200_000))
    child = terminal("--run", fluent, "--base", history=history)
    time.sleep(waits)
    child.kill(signal.SIGTERM)
    rest = child.read()
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (130, None)
    assert "Traceback" not in rest and "Unhandled" not in rest and "Press ENTER" not in rest
    assert "\x1b[?2004l" in rest, "the terminal is as it was"


@pytest.mark.timeout(900)
def test_a_conversation_with_all_that_can_be_done_in_it(terminal, fluent):
    child = terminal("--run", fluent)
    enter(child, QUESTION)
    child.expect_exact(ANSWER)
    child.expect(r"first token after [\d.]+ s · \d+ of 1,024 tokens in context\)")
    enter(child, "/retry")
    child.expect_exact(f"(again: {QUESTION})")
    child.expect_exact(ANSWER)
    child.expect_exact("in context)")
    enter(child, "/undo")
    child.expect_exact(f"(taken back: {QUESTION}; 0 exchanges left)")
    # a paste of several lines is one question, and it is not sent before Enter
    child.send("\x1b[200~What is\nit?\x1b[201~")
    time.sleep(0.5)
    enter(child, "")
    child.expect_exact("in context)")
    enter(child, "/history")
    child.expect_exact("you:")
    child.expect(r"What is\s+it\?")
    child.expect_exact("model:")
    enter(child, "/reset")
    child.expect_exact("(the conversation starts anew)")
    enter(child, "Say 今天天气 5.")
    child.expect_exact("in context)")
    enter(child, "/fix 很好。")
    child.expect_exact("(the answer is replaced)")
    child.expect_exact("saved-pairs.jsonl)")
    enter(child, "/save")
    child.expect_exact("saved.jsonl")
    child.expect(r"gemma-tune prepare .*saved-pairs\.jsonl\r")
    enter(child, "/set temperature 0.9")
    child.expect_exact("(temperature: 0.9)")
    for setting in ("max_new_tokens 6", "seed 3"):  # a tiny model's long answers at random hold bytes that are no text
        enter(child, f"/set {setting}")
        child.expect_exact(f"({setting.replace(' ', ': ')})")
    enter(child, "/retry")
    child.expect_exact("(that was answer 2; /better 1")
    enter(child, "/better 1")
    child.expect_exact("(answer 1 stays in the conversation)")
    enter(child, "/export talk.md")
    child.expect_exact("(written to talk.md)")
    enter(child, "/set temperature 0")
    child.expect_exact("(temperature: 0.0)")
    enter(child, "/reset")
    child.expect_exact("starts anew")
    enter(child, f"/compare {QUESTION}")
    child.expect_exact("talkative, the base model")
    child.expect_exact("talkative, tuned: ")
    child.expect_exact("in context)")
    enter(child, "/base")
    child.expect_exact("(talkative, the base model answers)")
    enter(child, "/tuned")
    child.expect_exact("(talkative, tuned answers)")
    enter(child, "/nope")
    child.expect_exact("(there is no /nope")
    left(child)
    [row] = [json.loads(line) for line in (fluent / "saved.jsonl").read_text(encoding="utf-8").splitlines()]
    assert row == {"messages": [{"role": "user", "content": "Say 今天天气 5."}, {"role": "assistant", "content": "很好。"}]}
    pairs = [json.loads(line) for line in (fluent / "saved-pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [pair["prompt"] for pair in pairs] == [row["messages"][:1]] * 2
    assert [pair["chosen"] for pair in pairs] == [row["messages"][1:]] * 2
    assert pairs[0]["rejected"] != pairs[1]["rejected"]
    assert "Say 今天天气 5." in Path("talk.md").read_text(encoding="utf-8")
    assert "What is" in (fluent.parent.parent / "c" / "chat_history").read_text()


@pytest.mark.timeout(900)
def test_what_is_typed_during_an_answer_waits_and_ctrl_c_stops_it(terminal, fluent):
    child = terminal("--run", fluent, "--base", "-n", 3)
    enter(child, QUESTION)
    child.expect_exact("cut off after 3 tokens")  # the model is loaded
    enter(child, "/set max_new_tokens 90000")
    child.expect_exact("(max_new_tokens: 90000)")
    child.expect_exact("\x1b[?2004h")
    enter(child, "fox")
    child.expect_exact("\x1b[?2004l")
    child.expect_exact("\x1b[2K")  # what there is of the answer is drawn again
    child.send("/history")  # without Enter
    time.sleep(0.3)
    child.sendintr()
    child.expect_exact("\x1b[?2004h")
    shown = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", child.before)
    assert "tokens/s" in shown and "cut off" not in shown, "the answer had begun, and was stopped"
    assert "/history" not in shown, "typed text mixed into the answer"
    enter(child, "/reset")  # no end of a command that begins with what was typed before
    child.expect_exact("starts anew")
    left(child)
