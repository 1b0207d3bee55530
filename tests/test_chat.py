"""``chat`` through the real command line, and in a real terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import rows, write_rows

from gemma_tune import chat as chat_module
from gemma_tune import chat_loop, console
from gemma_tune.chat import Conversation
from gemma_tune.errors import UserError
from gemma_tune.generation import Answer, Stream, greedy_answers
from gemma_tune.models import Placement, load_format, load_model

QUESTION, ANSWER = "Say number 3.", "The number is 3, no more."
FP32 = ("--dtype", "fp32")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# --- one prompt -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_on_stdout_and_nothing_else_is_there(cli, fluent):
    result = cli("chat", "--prompt", QUESTION, *FP32)
    assert result.code == 0, result.err
    assert result.out == f"{ANSWER}\n"
    assert "run: runs/talkative" in result.err
    assert "talkative, tuned, computing in fp32" in result.err


def test_a_prompt_with_json_is_one_object(cli, fluent):
    result = cli("chat", "--prompt", f" {QUESTION}\n", "--json", *FP32)
    assert result.code == 0, result.err
    tokens = len(load_format(fluent / "talkative_lora_adapter", "gemma3_text").tokenizer.tokenize(ANSWER))
    assert result.json == {"prompt": QUESTION, "answer": ANSWER, "tokens": tokens, "ended": True,
                           "model": "talkative, tuned"}
    cut = cli("chat", "--prompt", QUESTION, "--json", "--max-new-tokens", 3, *FP32).json
    assert (cut["tokens"], cut["ended"]) == (3, False)
    assert ANSWER.startswith(cut["answer"]) and cut["answer"] != ANSWER


def test_quiet_leaves_the_answer_alone(cli, fluent):
    result = cli("chat", "--prompt", QUESTION, "--quiet", *FP32)
    assert (result.out, result.err) == (f"{ANSWER}\n", "")


def test_an_empty_prompt_is_an_error(cli, fluent):
    result = cli("chat", "--prompt", "  ")
    assert result.code == 2
    assert "--prompt has no text" in result.err


# --- standard input -------------------------------------------------------------------------------------------------


def test_every_line_of_stdin_gets_its_own_answer(cli, fluent):
    result = cli("chat", *FP32, stdin="Say number 3.\r\n\n   \nSay number 7.\nSay number 3.")
    assert result.code == 0, result.err
    assert result.out.splitlines() == [ANSWER, "The number is 7, no more.", ANSWER]


def test_with_json_stdin_gives_one_object_per_prompt(cli, fluent):
    result = cli("chat", "--json", *FP32, stdin="Say number 3.\n\nSay number 7.\n")
    found = [json.loads(line) for line in result.out.splitlines()]
    assert [(f["prompt"], f["answer"]) for f in found] == [
        ("Say number 3.", ANSWER), ("Say number 7.", "The number is 7, no more.")]
    assert all(f["ended"] for f in found)


def test_nothing_on_stdin_gives_nothing(cli, fluent):
    result = cli("chat", *FP32, stdin="")
    assert (result.code, result.out) == (0, "")


def test_a_prompt_beyond_the_context_is_an_error_and_earlier_answers_stand(cli, fluent):
    result = cli("chat", *FP32, stdin=f"{QUESTION}\n{'fox ' * 2000}\n")
    assert result.code == 2
    assert result.out == f"{ANSWER}\n"
    assert "the model's context ends at 1024" in result.err


# --- which model ----------------------------------------------------------------------------------------------------


def test_base_gives_the_untuned_models_answer(cli, fluent, talkative):
    chat = load_format(talkative, "gemma3_text")
    import torch

    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    prompts = [row["messages"][0]["content"] for row in rows()]
    expected = greedy_answers(model, chat, [[user(p)] for p in prompts], 6)
    # A random model also writes broken bytes, which a stream cannot take back as the batch's decoding does.
    whole = {p: a.text for p, a in zip(prompts, expected) if "\ufffd" not in a.text and a.text}
    assert len(set(whole.values())) > 2
    result = cli("chat", "--base", "--json", "--max-new-tokens", 6, *FP32, stdin="\n".join(whole))
    found = [json.loads(line) for line in result.out.splitlines()]
    assert {f["prompt"]: f["answer"] for f in found} == whole
    assert {f["model"] for f in found} == {"talkative, the base model"}
    tuned = cli("chat", "--json", "--max-new-tokens", 6, *FP32, stdin="\n".join(whole))
    assert all(json.loads(line)["answer"].startswith("The n") for line in tuned.out.splitlines())


def test_merged_answers_as_base_plus_adapter(cli, fluent):
    missing = cli("chat", "--merged", "--prompt", QUESTION)
    assert missing.code == 2
    assert "no merged model yet" in missing.err
    assert "gemma-tune merge --run runs/talkative" in missing.err
    assert cli("merge").code == 0
    result = cli("chat", "--merged", "--prompt", QUESTION, "--json", *FP32)
    assert result.code == 0, result.err
    assert result.json["answer"] == ANSWER
    assert result.json["model"] == "talkative, tuned and merged"


def test_base_and_merged_exclude_each_other(cli, fluent):
    result = cli("chat", "--base", "--merged", "--prompt", QUESTION, "--json")
    assert result.code == 2
    assert "--base and --merged exclude each other" in result.json["error"]["message"]


@pytest.fixture
def untrained(cli, talkative, tmp_path) -> Path:
    """A run that is prepared, but not trained."""
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", rows()), "--model", talkative)
    assert result.code == 0, result.err
    return Path("runs/talkative")


def test_without_an_adapter_the_command_to_make_it_is_named(cli, untrained):
    result = cli("chat", "--prompt", QUESTION)
    assert (result.code, result.out) == (2, "")
    assert "runs/talkative has no trained adapter yet" in result.err
    assert "gemma-tune train --run runs/talkative" in result.err
    base = cli("chat", "--base", "--prompt", QUESTION, "--max-new-tokens", 2, *FP32)
    assert base.code == 0, base.err


def test_a_damaged_adapter_is_not_used(cli, fluent):
    weights = fluent / "talkative_lora_adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    result = cli("chat", "--prompt", QUESTION)
    assert (result.code, result.out) == (2, "")
    assert "was changed" in result.err
    assert "gemma-tune train" in result.err and "--force" in result.err


def test_a_stale_adapter_still_answers_with_a_warning(cli, fluent, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "more.jsonl", rows(20)), "--run", fluent).code == 0
    result = cli("chat", "--run", fluent, "--prompt", QUESTION, *FP32)
    assert (result.code, result.out) == (0, f"{ANSWER}\n")
    assert "the result of `train` is stale" in result.err


# --- sampling and system prompt ---------------------------------------------------------------------------------------


def test_a_seed_repeats_the_answers(cli, fluent):
    def sampled(*extra) -> str:
        result = cli("chat", "--base", "--temperature", 1, "--max-new-tokens", 12, *extra, *FP32, stdin="a\nb\n")
        assert result.code == 0, result.err
        return result.out

    assert sampled("--seed", 5) == sampled("--seed", 5)
    assert sampled("--seed", 5) != sampled("--seed", 6)
    assert sampled() != sampled()


def test_temperature_zero_needs_no_seed(cli, fluent):
    answers = {cli("chat", "--base", "--temperature", 0, "--max-new-tokens", 12, "--prompt", "a", *FP32).out
               for _ in range(2)}
    assert len(answers) == 1


class Recorded(Stream):
    """A stream that notes what it is asked."""

    asked: list = []

    def __init__(self, model, chat, messages, *rest):
        self.asked.append(list(messages))
        super().__init__(model, chat, messages, *rest)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Conversations that the model is asked to continue."""
    monkeypatch.setattr(Recorded, "asked", [])
    monkeypatch.setattr(chat_module, "Stream", Recorded)
    return Recorded.asked


def test_a_system_prompt_reaches_the_model(cli, fluent, asked):
    def answer(*extra) -> str:
        result = cli("chat", "--base", "--max-new-tokens", 12, *extra, *FP32, stdin="a\nb\n")
        assert result.code == 0, result.err
        return result.out

    with_system, without = answer("--system", "Be brief."), answer()
    system = {"role": "system", "content": "Be brief."}
    assert asked == [[system, user("a")], [system, user("b")], [user("a")], [user("b")]], "each line starts anew"
    assert with_system != without


def test_settings_come_from_a_file_too(cli, fluent, asked):
    Path("settings.yaml").write_text("chat: {system: Be kind., max_new_tokens: 2, dtype: fp32}\n")
    result = cli("chat", "--config", "settings.yaml", "--prompt", "a", "--json")
    assert result.json["tokens"] <= 2
    assert asked == [[{"role": "system", "content": "Be kind."}, user("a")]]


def test_settings_out_of_range_are_refused_before_anything_is_loaded(cli, fluent):
    result = cli("chat", "--prompt", "a", "--temperature", -1, "--top-p", 2)
    assert (result.code, result.out) == (2, "")
    assert "temperature" in result.err and "top_p" in result.err


# --- the conversation -------------------------------------------------------------------------------------------------


@pytest.fixture
def conversation(fluent_once, talkative, asked) -> Conversation:
    """With the base model, whose answers are a few tokens long."""
    import torch

    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    return Conversation(model, load_format(talkative, "gemma3_text"), "test", 4,
                        {"do_sample": False, "temperature": None, "top_p": None, "top_k": None})


def test_the_second_prompt_contains_the_first_turn(conversation, asked):
    first = conversation.ask("one").finish()
    assert conversation.turns == [], "only what is kept belongs to the conversation"
    conversation.keep("one", Answer("first answer", 3, True))
    conversation.ask("two").finish()
    assert asked == [[user("one")],
                     [user("one"), {"role": "assistant", "content": "first answer"}, user("two")]]
    assert first.tokens == 4


def test_an_empty_answer_is_not_kept(conversation):
    conversation.keep("one", Answer("", 0, True))
    assert conversation.messages == []


def test_reset_forgets_the_turns_and_keeps_the_system_prompt(conversation):
    conversation.reset("Be brief.")
    conversation.keep("one", Answer("1", 1, True))
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    conversation.keep("one", Answer("1", 1, True))
    conversation.reset("")
    assert conversation.messages == []


# --- the interactive loop, with a stand-in for the terminal ------------------------------------------------------------


class Spoken:
    """A stream of given pieces; an exception among them is raised in its place, and ``late`` by ``finish``."""

    def __init__(self, pieces, late=None):
        self.pieces, self.late, self.stopped = pieces, late, False

    def __iter__(self):
        for piece in self.pieces:
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def stop(self):
        self.stopped = True

    def finish(self):
        if self.late:
            raise self.late
        return Answer("".join(p for p in self.pieces if isinstance(p, str)), 1, not self.stopped)


@pytest.fixture
def talk(monkeypatch, capsys, conversation):
    """A function: type these lines (an exception is what the key press raises); gives stdout and stderr."""

    def run(*lines, streams=()):
        typed, prepared = iter([*lines, EOFError()]), iter(streams)

        def read():
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        def ask(self, text):
            stream = next(prepared)
            if isinstance(stream, BaseException):
                raise stream
            return stream

        monkeypatch.setattr(chat_loop, "_read_line", read)
        monkeypatch.setattr(Conversation, "ask", ask)
        chat_loop.interactive(conversation)
        return capsys.readouterr()

    return run


def test_ctrl_c_keeps_the_answer_as_far_as_it_came(talk, conversation):
    stream = Spoken(["half", KeyboardInterrupt()])
    out, _ = talk("one", "two", streams=[stream, Spoken(["whole"])])
    assert out == "half\nwhole\n"
    assert stream.stopped
    assert [m["content"] for m in conversation.messages] == ["one", "half", "two", "whole"]


def test_a_second_ctrl_c_does_not_leave_either(talk, conversation):
    out, err = talk("one", "two", streams=[Spoken(["half", KeyboardInterrupt()], KeyboardInterrupt()),
                                           Spoken(["whole"])])
    assert out == "half\nwhole\n"
    assert "not kept" in err
    assert [m["content"] for m in conversation.messages] == ["two", "whole"]


def test_a_conversation_that_is_too_long_is_said_and_the_loop_goes_on(talk, conversation):
    out, err = talk("one", "/reset", "two", streams=[UserError("too long", "start with /reset"), Spoken(["whole"])])
    assert out == "whole\n"
    assert "Error: too long" in err and "Hint: start with /reset" in err


def test_slash_commands(talk, conversation):
    conversation.keep("one", Answer("1", 1, True))
    _, err = talk("/reset", "/system  Be [bold] brief. ", "/nope x", "/help", "", "   ", KeyboardInterrupt())
    assert conversation.messages == [{"role": "system", "content": "Be [bold] brief."}]
    assert "(the conversation starts anew)" in err
    assert "(system prompt: Be [bold] brief.)" in err
    assert "(there is no /nope)" in err
    assert err.count("/reset  forget the conversation") == 3, "at the start, for /nope and for /help"
    assert "(Ctrl-D or /exit leaves)" in err
    talk("/system")
    assert conversation.messages == []


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye", "/exit now"])
def test_leaving(talk, command):
    assert talk(command, AssertionError("nothing is read any more")).out == ""


def test_the_prompt_sign_goes_to_stderr_when_stdout_is_a_file(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert chat_loop._read_line() == "hello"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "\n> ")


def test_what_stdout_cannot_write_becomes_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    console.piece("Grüße 今\n")
    assert raw.getvalue() == "Grüße ?\n".encode("latin-1")
    console.result_json({"answer": "今"})
    assert json.loads(raw.getvalue().splitlines()[1]) == {"answer": "今"}


def test_stdin_that_is_not_utf8_is_an_error_for_people():
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    with pytest.raises(UserError, match="not utf-8 text"):
        chat_loop.one_by_one(SimpleNamespace(), lines, False)


# --- a real terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal():
    """A function: start ``gemma-tune chat`` with these options in a pseudo-terminal."""
    pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals are not for Windows")
    started = []

    def start(*options, **environment):
        child = pexpect.spawn(sys.executable, ["-m", "gemma_tune", "chat", *map(str, options), *FP32],
                              env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, encoding="utf-8", timeout=90,
                              echo=False, dimensions=(50, 200))
        child.delaybeforesend = 0
        started.append(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def test_a_conversation_in_a_terminal(terminal, fluent):
    child = terminal("--run", fluent, TERM="dumb")
    seen = []
    child.logfile_read = SimpleNamespace(write=seen.append, flush=lambda: None)
    child.expect_exact("talkative, tuned\r\n")
    child.expect_exact("/reset  forget the conversation")
    child.expect_exact("\n> ")
    for number in (3, 7):
        child.sendline(f"Say number {number}.")
        child.expect_exact("The number is ")
        child.expect_exact("\n> ")
        child.sendline("/reset")
        child.expect_exact("(the conversation starts anew)")
        child.expect_exact("\n> ")
    child.sendline(QUESTION)
    child.expect_exact(ANSWER)
    child.expect_exact("\n> ")
    child.sendline("/system Be brief.")
    child.expect_exact("(system prompt: Be brief.)")
    child.expect_exact("\n> ")
    child.sendline("/nope")
    child.expect_exact("(there is no /nope)")
    child.expect_exact("\n> ")
    child.sendintr()
    child.expect_exact("(Ctrl-D or /exit leaves)")
    child.expect_exact("\n> ")
    child.sendeof()
    child.read()
    assert "\x1b" not in "".join(seen)
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)


@pytest.fixture
def endless(cli, talkative, tmp_path) -> Path:
    """A run of a model that never ends an answer and has room for thousands of tokens."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(talkative, tmp_path / "endless"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][[1, 4, 5]] = 0.0  # <eos> and the two turn markers are never the likeliest
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", rows()), "--model", folder)
    assert result.code == 0, result.err
    return tmp_path / "runs" / "endless"


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(terminal, endless):
    child = terminal("--run", endless, "--base", "--max-new-tokens", 90_000, NO_COLOR="", TERM="xterm")
    child.expect_exact("endless, the base model")
    child.expect("\n.*> ")
    for _ in range(2):
        child.sendline("fox")
        child.expect(r"\w{3}")  # it has begun; 90,000 tokens take minutes
        child.sendintr()
        child.expect("\n.*> ", timeout=20)
    child.sendline("/exit")
    child.read()
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_ctrl_c_without_a_terminal_ends_all_answers(endless):
    command = [sys.executable, "-m", "gemma_tune", "chat", "--run", str(endless), "--base", "-n", "90000", *FP32]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as program:
        program.stdin.write(b"fox\nfox\n")
        program.stdin.flush()
        assert program.stdout.read(3)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    assert b"stopped" in err and b"Traceback" not in err
