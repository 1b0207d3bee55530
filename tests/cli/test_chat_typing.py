"""The conversation in a real terminal with its line editor, Markdown and commands; a stand-in answers at once."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals are not for Windows")

import pty  # noqa: E402
import termios  # noqa: E402
import tty  # noqa: E402

from gemma_tune.cli.chat import typing  # noqa: E402
from support.command import ROOT  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # a busy machine takes long for many short steps
ESCAPES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class Terminal:
    """A chat that a test types into."""

    def __init__(self, *, term: str = "xterm-256color", width: int = 100, **environment: str):
        before = os.environ.get("PYTHONPATH")
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        paths = [str(ROOT), str(ROOT / "tests"), *([before] if before else [])]
        self.child = pexpect.spawn(
            sys.executable, ["-m", "support.talking"], encoding="utf-8", timeout=240, dimensions=(30, width),
            env={**inherited, "TERM": term, "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONPATH": os.pathsep.join(paths), **environment})
        self.child.delaybeforesend = 0.05
        self.seen: list[str] = []
        self.child.logfile_read = self
        self.expect("Ctrl-D leaves")
        self.prompted()

    def write(self, text: str) -> None:
        self.seen.append(text)

    def flush(self) -> None:
        pass

    def expect(self, text: str) -> None:
        self.child.expect_exact(text)

    def prompted(self) -> None:
        self.child.expect(r"\x1b\[\?2004h|\n> ")  # the editor is ready; the dumb prompt

    def type(self, text: str, *answers: str) -> None:
        """A line with Enter, and what is expected to appear in this order."""
        self.child.send(text)
        time.sleep(0.1)
        self.child.send("\r")
        for answer in answers:
            self.expect(answer)

    def close_terminal(self) -> None:
        """As when its window is closed: the system tells the chat by SIGHUP."""
        self.child.ptyproc.fileobj.close()

    def leave(self) -> str:
        """Everything that was on the terminal, without escape sequences."""
        self.type("/exit", "closed")
        self.child.read()
        self.child.wait()
        assert (self.child.exitstatus, self.child.signalstatus) == (0, None)
        return ESCAPES.sub("", "".join(self.seen))


@pytest.fixture
def terminal():
    """A function that starts a chat; what is left of it is ended."""
    started: list[Terminal] = []

    def start(**settings) -> Terminal:
        started.append(Terminal(**settings))
        return started[-1]

    yield start
    for one in started:
        one.child.close(force=True)


def test_retry_undo_fix_save_history_export(terminal, tmp_path):
    chat = terminal()
    chat.type("first 今天天气", "tuned says first 今天天气", "first token after", "of 100 tokens in context)")
    chat.type("second", "tuned says second", "in context)")
    chat.type("/retry", "(again: second)", "tuned says second", "in context)")
    chat.type("/undo", "(taken back: second; 1 exchange left)")
    chat.type("/history", "you:", "first 今天天气", "model:", "tuned says first 今天天气")
    chat.type("/fix 很好。", "(the answer is replaced)")
    chat.type("/save", "(saved in run/saved.jsonl)")
    chat.type("/export talk.md", "(written to talk.md)")
    chat.type("/export talk.md", "talk.md is there already")
    chat.type("/undo", "0 exchanges left)")
    chat.type("/undo", "there is nothing to take back yet")
    chat.leave()
    turns = [{"role": "user", "content": "first 今天天气"}, {"role": "assistant", "content": "很好。"}]
    assert [json.loads(line) for line in Path("run/saved.jsonl").read_text("utf-8").splitlines()] == [{"messages": turns}]
    assert "## You\n\nfirst 今天天气\n\n## Model\n\n很好。" in Path("talk.md").read_text("utf-8")


def test_a_paste_of_several_lines_is_one_question(terminal):
    chat = terminal()
    chat.child.send("\x1b[200~line one\nline two\n\nline four\x1b[201~")
    time.sleep(0.3)
    chat.type("", "tuned says line one", "line four", "in context)")
    chat.type("by hand\\")
    chat.type("and on", "tuned says by hand", "and on", "in context)")
    chat.child.send("alt\x1b\renter")
    chat.type("", "tuned says alt", "enter", "in context)")
    chat.type("/export talk.jsonl", "written")
    chat.leave()
    asked = [turn["content"] for turn in json.loads(Path("talk.jsonl").read_text())["messages"] if turn["role"] == "user"]
    assert asked == ["line one\nline two\n\nline four", "by hand\nand on", "alt\nenter"]


def test_lines_that_are_pasted_into_a_dumb_terminal_are_one_question(terminal):
    chat = terminal(term="dumb")
    chat.child.send("line one\nline two\n")
    chat.expect("tuned says line one")
    chat.expect("line two")
    chat.expect("in context)")
    chat.prompted()
    chat.child.send("/export talk.jsonl\n")
    chat.expect("(written to talk.jsonl)")
    shown = chat.leave()
    assert json.loads(Path("talk.jsonl").read_text())["messages"][0]["content"] == "line one\nline two"
    assert "\x1b" not in shown


def test_base_and_tuned_side_by_side(terminal):
    chat = terminal()
    chat.type("/compare what now", "base model", "tuned model", "base says what now", "tuned says what now", "in context)")
    chat.type("/compare", "(again: what now)", "in context)", "in context)")
    chat.type("/history", "what now", "tuned says what now")
    chat.type("/compare on", "(every question is answered by base and tuned model")
    chat.type("again", "base says again", "tuned says again", "in context)", "in context)")
    chat.type("/compare off", "(one answers again)")
    chat.type("/base", "(base model answers)")
    chat.type("now", "base says now", "in context)")
    chat.type("/tuned", "(tuned model answers)")
    shown = chat.leave()
    assert any("base says what now" in line and "tuned says what now" in line for line in shown.splitlines())


def test_the_better_one_of_two_is_chosen(terminal):
    chat = terminal()
    chat.type("/better 1", "nothing was asked yet")
    chat.type("/compare which", "tuned says which", "(/better base or /better tuned keeps which one is better)")
    chat.prompted()
    chat.child.send("/bett")
    chat.expect("after /retry, which answer is better")  # the menu
    chat.child.send("\t")
    time.sleep(0.5)
    chat.type(" base", "(the base model's answer stays in the conversation)",
              "(1 pair of this question in run/saved-pairs.jsonl)")
    chat.type("/retry", "tuned says which", "(that was answer 2; /better 1")
    chat.type("/better 3", "which answer is better: 1 or 2?")
    chat.type("/fix It is this.", "(the answer is replaced)", "(2 pairs of this question in")
    chat.type("/save", "(saved in run/saved.jsonl)", "(2 pairs of a better and a worse answer in",
              "next: ", "gemma-tune prepare --run run run/saved-pairs.jsonl")
    chat.leave()
    pairs = [json.loads(line) for line in Path("run/saved-pairs.jsonl").read_text().splitlines()]
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in pairs] == [
        ("base says which", "tuned says which"), ("It is this.", "tuned says which")]


def test_one_below_the_other_where_there_is_no_room(terminal):
    chat = terminal(width=60)
    chat.type("/compare what now", "base model:", "base says what now", "tuned model:", "tuned says what now", "in context)")
    chat.leave()


def test_ctrl_c_stops_an_answer_and_what_is_typed_meanwhile_waits(terminal):
    chat = terminal(TALKING_PAUSE="0.2")
    chat.type("word " * 200, "tuned says word word")
    chat.child.send("typed ahead")
    time.sleep(0.6)
    mark = len(chat.seen)
    time.sleep(0.6)
    chat.child.sendintr()
    chat.expect("in context)")
    assert "typed" not in "".join(chat.seen[mark:]), "it is not mixed into the answer"
    chat.type("/undo", "(taken back: word word")
    chat.type("one two three four five", "tuned says")
    chat.child.send("typed ahead")
    chat.expect("in context)")
    chat.expect("typed ahead")  # in the next question
    chat.type("", "tuned says typed ahead", "in context)")
    shown = chat.leave()
    assert "tuned says one two three four five\r\n" in shown


def test_the_first_question_is_typed_while_the_model_is_loaded(terminal):
    chat = terminal(TALKING_LOADS="2")
    chat.expect("· a model of words, which computes nothing")  # above the prompt
    chat.expect("loading the weights")
    moves = len(chat.seen)
    time.sleep(0.5)
    chat.child.expect(r"[\u2801-\u28ff]")
    assert len(set(re.findall(r"[\u2801-\u28ff]", "".join(chat.seen[:moves + 9])))) > 1, "it moves"
    chat.child.send("/set top_k 5")
    chat.type("", "(top_k: 5)")  # which needs no model
    chat.prompted()
    chat.type("early", "loading the weights", "tuned says early", "in context)")
    chat.type("later", "tuned says later", "in context)")
    shown = chat.leave()
    assert shown.count("a model of words") == 1
    assert "loading" not in shown[shown.index("tuned says early"):]


def test_who_leaves_before_the_model_is_loaded_does_not_wait(terminal):
    chat = terminal(TALKING_LOADS="200")
    chat.type("early")
    time.sleep(0.5)
    chat.child.sendintr()  # the question, and not the loading
    chat.expect("(stopped; this answer is not kept)")
    chat.prompted()
    began = time.monotonic()
    chat.child.sendeof()
    chat.child.expect(pexpect.EOF)
    chat.child.wait()
    assert (chat.child.exitstatus, chat.child.signalstatus) == (0, None)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_that_cannot_be_loaded_ends_the_chat(terminal, asked):
    chat = terminal(TALKING_LOADS="1.5", TALKING_FAILS="the weights are damaged")
    if asked:
        chat.type("early")
    chat.expect("Error: ")
    chat.expect("the weights are damaged")
    chat.child.expect(pexpect.EOF)
    chat.child.wait()
    assert (chat.child.exitstatus, chat.child.signalstatus) == (2, None)
    shown = "".join(chat.seen)
    assert shown.count("the weights are damaged") == 1 and "load another one" in shown and "Traceback" not in shown


def test_lines_that_are_pasted_during_an_answer_are_one_question(terminal):
    chat = terminal(TALKING_PAUSE="0.2")
    chat.type("one two three four", "tuned says")
    chat.child.send("line one\rline two\rline three")
    chat.expect("in context)")
    chat.expect("line two")  # in the editor
    time.sleep(0.5)
    chat.type("", "tuned says line one", "in context)")
    chat.type("and so on for long", "tuned says")
    chat.child.send("line four\rline five")
    chat.expect("in context)")
    chat.expect("line five")
    time.sleep(0.5)
    chat.type("", "tuned says line four", "in context)")
    chat.type("five six seven", "tuned says")
    chat.child.send("next\r")  # one line is sent, as it was meant
    chat.expect("tuned says next")
    chat.expect("in context)")
    chat.type("/export talk.jsonl", "written")
    chat.leave()
    asked = [turn["content"] for turn in json.loads(Path("talk.jsonl").read_text())["messages"] if turn["role"] == "user"]
    assert asked == ["one two three four", "line one\nline two\nline three", "and so on for long", "line four\nline five",
                     "five six seven", "next"]


@pytest.mark.parametrize("sent", [False, True])
def test_a_terminal_that_is_closed_ends_the_chat_without_waiting_for_the_model(terminal, sent):
    chat = terminal(TALKING_LOADS="60")
    if sent:
        chat.child.send("early\r")
        chat.expect("\x1b[?2004l")  # the editor has sent it
    time.sleep(0.5)
    begun = time.monotonic()
    chat.close_terminal()
    chat.child.wait()
    assert (chat.child.exitstatus, chat.child.signalstatus) == (130, None)
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("markdown", ["on", "off"])
def test_a_terminal_that_is_closed_during_an_answer_ends_the_chat(terminal, markdown):
    chat = terminal(TALKING_PAUSE="0.3")
    chat.type(f"/set markdown {markdown}", f"(markdown: {markdown})")
    chat.type("word " * 50, "tuned says word word")
    chat.close_terminal()
    chat.child.wait()
    assert (chat.child.exitstatus, chat.child.signalstatus) == (130, None)


def test_ctrl_d_during_an_answer_leaves_after_it(terminal):
    chat = terminal(TALKING_PAUSE="0.2")
    chat.type("one two three four", "tuned says")
    chat.child.sendeof()
    chat.expect("in context)")
    chat.expect("closed")
    chat.child.expect(pexpect.EOF)
    chat.child.wait()
    assert (chat.child.exitstatus, chat.child.signalstatus) == (0, None)


def test_a_wrong_command_does_not_hide_that_the_model_cannot_be_loaded(terminal):
    chat = terminal(TALKING_LOADS="1", TALKING_FAILS="the weights are damaged")
    chat.child.send("/set nonsense 3\r" * 40)
    chat.child.expect(pexpect.EOF)
    chat.child.wait()
    shown = "".join(chat.seen)
    assert (chat.child.exitstatus, chat.child.signalstatus) == (2, None)
    assert shown.count("the weights are damaged") == 1


def test_ctrl_c_and_unknown_commands_do_not_leave(terminal):
    chat = terminal()
    chat.child.send("half a line\x03")
    chat.expect("(Ctrl-D or /exit leaves)")
    chat.type("/retyr", "(there is no /retyr; did you mean `/retry`? A space before it makes it a question)")
    chat.type("/help", "/system TEXT", "/export [FILE]")
    chat.type("/set", "temperature  the model's own", "seed  random")
    chat.type("/set top_k 5", "(top_k: 5)")
    chat.type("/set top_p 7", "1 setting of `chat` cannot be used", "top_p: 7")
    chat.type("/set markdown off", "(markdown: off)")
    chat.type("*as* it is", "tuned says *as* it is")
    chat.type("/set markdown on", "(markdown: on)")
    chat.type("*as* it is", "tuned says \x1b[3mas")
    chat.leave()


def test_a_context_that_is_nearly_full_is_said(terminal):
    chat = terminal()
    for number in range(5):
        chat.type(f"question {number}", "in context)")
    chat.expect("tokens of context left: /undo takes a turn back, /reset starts anew")
    chat.type("/reset", "(the conversation starts anew)")
    shown = chat.leave()
    assert shown.count("of context left") == 1


def test_pictures_are_named_completed_and_dragged_into_the_terminal(terminal, tmp_path):
    from support.seers import write_pictures

    folder = tmp_path / "my pictures"
    folder.mkdir()
    write_pictures(folder)
    (folder / "0 notes.txt").write_text("no picture")
    chat = terminal()
    chat.child.send(f"/image {folder}/0")
    time.sleep(0.5)
    chat.child.send("\t")
    time.sleep(0.5)
    chat.type("", "shown with the next question: ", "0.png")
    chat.type(f"'{folder}/1.png'", "shown with the next question: ", "1.png")  # as terminals write a file that is dragged
    chat.type("what is it", "tuned says what is it and sees 0.png and sees 1.png", "in context)")
    chat.type("and now", "tuned says and now", "in context)")
    chat.type("/image none.png", "there is no picture none.png")
    assert "notes.txt" not in chat.leave()


def test_commands_are_completed_and_questions_come_back(terminal, tmp_path):
    chat = terminal()
    chat.child.send("/expo")
    chat.expect("write it to a file")  # the menu
    chat.child.send("\t")
    time.sleep(0.5)
    chat.type(" talk.md", "there is no conversation to export yet")
    chat.type("remember me", "tuned says remember me", "in context)")
    chat.type("my hf_" + "a1" * 17, "in context)")
    chat.leave()
    history = tmp_path / "cache" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert "remember me" in history.read_text() and "hf_" not in history.read_text()
    chat = terminal()
    chat.child.send("\x1b[A\x1b[A")  # past /exit
    chat.type("", "tuned says remember me", "in context)")
    chat.leave()


def test_markdown_is_rendered_and_long_answers_are_printed_once(terminal):
    chat = terminal(TALKING_PAUSE="0.002")
    text = " ".join(f"w{n}" for n in range(300))
    chat.type(f"**bold** {text}", "in context)")
    shown = chat.leave()
    last = shown[shown.rindex("tuned says bold"):]
    assert "**bold**" not in last
    for n in range(300):
        assert last.count(f"w{n} ") + last.count(f"w{n}\r\n") >= 1, n
    for line in last.splitlines():
        assert len(line) <= 100


@pytest.fixture
def keyboard(monkeypatch, tmp_path):
    """What types into this process's standard input, that, and the modes of a terminal without an editor."""
    from prompt_toolkit.application import create_app_session

    keys, there = pty.openpty()
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path))
    with open(there, encoding="utf-8") as stdin, open(keys, "wb", buffering=0) as typed:
        monkeypatch.setattr(sys, "stdin", stdin)
        with create_app_session():
            yield typed, stdin, termios.tcgetattr(stdin)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("read", "as_keys", "as_lines", "later", "question"), [
    ("", "/reset\r", "", "", "/reset"), ("", "fox\x15/reset\r", "", "", "/reset"), ("", "ab", "", "c\r", "abc"),
    ("", "ab", "cd\n", "", "abcd"), ("ab", "", "cd\n", "", "abcd"), ("ab", "cd", "é\n", "", "abcdé"), ("", "", "ab\n", "", "ab"),
    ("ab\r", "", "cd\n", "", "ab")])
def test_what_is_typed_while_the_editor_closes_is_neither_lost_nor_sent_too_early(keyboard, read, as_keys, as_lines, later, question):
    """Keys that it has read and those that it has not, then lines of a terminal without an editor, and what comes when it is back."""
    from prompt_toolkit.input.typeahead import get_typeahead, store_typeahead
    from prompt_toolkit.input.vt100_parser import Vt100Parser

    typed, stdin, modes = keyboard
    editor, pressed = typing.Editor(), []
    Vt100Parser(pressed.append).feed(read)
    store_typeahead(editor._session.input, pressed)
    tty.setraw(stdin, termios.TCSANOW)
    typed.write(as_keys.encode())
    time.sleep(0.1)
    termios.tcsetattr(stdin, termios.TCSANOW, modes)
    typed.write(as_lines.encode())
    timer = threading.Timer(1, typed.write, [later.encode()])
    timer.start()
    found = editor.read()
    timer.join()
    assert found == question
    left = get_typeahead(editor._session.input)
    assert ("".join(key.data for key in left) == "cd\n") == read.endswith("\r")
