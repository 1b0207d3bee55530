"""``chat`` through the real command line, and in a real terminal."""

from __future__ import annotations

import codecs
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Gemma3ForCausalLM

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Stream
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Held, Listener
from gemma_tune.base.machine import Terminated
from gemma_tune.chat import local
from gemma_tune.chat.ahead import Ahead
from gemma_tune.chat.conversation import Conversation
from gemma_tune.chat.saves import Saves
from gemma_tune.chat.scripts import open_input, read
from gemma_tune.cli import screen
from gemma_tune.cli.chat import loop, typing
from gemma_tune.config.stages import ChatConfig
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.run.directory import RunDir
from support.answering import greedy_answers
from support.command import rows, write_rows

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
    assert result.json == {"prompt": f" {QUESTION}", "answer": ANSWER, "tokens": tokens, "ended": True,
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


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_bytes_of_a_locale_without_them_are_read_as_utf8(encoding):
    lines = io.TextIOWrapper(io.BytesIO("café 今\r\nplain\n".encode()), encoding=encoding)
    assert [asked.prompt for asked in read(lines, "standard input")] == ["café 今", "plain"]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_in_a_file_the_place_of_such_a_byte_is_counted_as_it_lies_there(tmp_path, mark):
    path = tmp_path / "asked.txt"
    path.write_bytes(mark + b"Say 1.\ncaf\xe9\n")
    lines, called, _ = open_input(str(path))
    with lines:
        asked = list(read(lines, called))
    assert asked[0].prompt == "Say 1.", "without the mark"
    assert asked[1].problem.message == f"{path}:2: not UTF-8 text (byte 0xe9) at offset 3"


def test_a_line_that_is_no_text_is_named_and_the_others_are_answered(cli, fluent):
    result = cli("chat", *FP32, stdin=f"{QUESTION}\n\ncaf\xe9\n{QUESTION}\n".encode("latin-1"))
    assert (result.code, result.out) == (1, f"{ANSWER}\n{ANSWER}\n")
    assert "Error: 1 of 3 prompts could not be answered; the others were" in result.err
    assert "- standard input:3: not UTF-8 text (byte 0xe9) at offset 3" in result.err
    assert "iconv" in result.err and "unexpected" not in result.err


BYTE = "caf\udce9"  # as Python gives an argument with the byte 0xe9


@pytest.mark.parametrize(("args", "named"), [
    (("chat", "--prompt", BYTE), "--prompt"), (("chat", "--base", "-p", "x", "--system", BYTE), "--system"),
    (("chat", "-p", "x", "--run", BYTE), "--run"), (("prepare", "--run", BYTE), "--run"), (("train", "--run", BYTE), "--run"),
    (("prepare", "--model", BYTE), "--model"), (("prepare", "--columns", f"user={BYTE},assistant=a"), "--columns"),
    (("merge", "--adapter", BYTE), "--adapter"), (("export-ollama", "--parameter", "x=1", "--parameter", BYTE), "--parameter"),
    (("status", "--run", BYTE), "--run"), (("chat", "-p", "x", "--config", BYTE), "--config")])
def test_arguments_that_are_no_text_are_named(cli, fluent, args, named):
    result = cli(*args)
    assert (result.code, result.out) == (2, "")
    assert f"Error: {named}: not UTF-8 text (byte 0xe9) at offset" in result.err
    assert "Hint:" in result.err and "unexpected" not in result.err


def test_all_arguments_that_are_no_text_are_named_together(cli, fluent, monkeypatch):
    monkeypatch.setenv("GEMMA_TUNE_RUN", BYTE)
    result = cli("chat", "--prompt", BYTE, "--json")
    assert result.code == 2
    assert result.json["error"]["message"] == "2 arguments are not UTF-8 text"
    assert [p.split(":")[0] for p in result.json["error"]["problems"]] == ["GEMMA_TUNE_RUN", "--prompt"]


def test_arguments_typed_in_a_locale_without_their_characters_are_text(cli, fluent, asked, monkeypatch):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    typed = "café".encode().decode("ascii", "surrogateescape")
    result = cli("chat", "--base", "--prompt", typed, "--system", typed, "--json", "-n", 2, *FP32)
    assert result.code == 0, result.err
    assert asked == [[{"role": "system", "content": "café"}, user("café")]]
    assert result.json["prompt"] == "café"


def test_nothing_on_stdin_gives_nothing(cli, fluent):
    result = cli("chat", *FP32, stdin="")
    assert (result.code, result.out) == (0, "") and "! standard input has no prompts" in result.err


def test_a_prompt_beyond_the_context_is_an_error_and_the_others_are_answered(cli, fluent):
    stdin = f"{QUESTION}\n{'fox ' * 2000}\nSay number 7.\n"
    result = cli("chat", *FP32, stdin=stdin)
    assert result.code == 1
    assert result.out == f"{ANSWER}\nThe number is 7, no more.\n"
    assert "the model's context ends at 1024" in result.err
    result = cli("chat", "--json", *FP32, stdin=stdin)
    found = [json.loads(line) for line in result.out.splitlines()]
    assert (result.code, [f.get("answer") for f in found]) == (1, [ANSWER, None, "The number is 7, no more."])
    assert found[1]["where"] == "standard input:2" and found[1]["prompt"].startswith("fox fox")
    assert "the model's context ends at 1024" in found[1]["error"]["message"]
    alone = cli("chat", "--prompt", "fox " * 2000, "--json", *FP32)
    assert alone.code == 2 and "context ends at 1024" in alone.json["error"]["message"]


# --- which model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "where"), [(("chat", "--prompt", "a"), "generate"), (("chat", "--prompt", "a"), "to"),
                                                (("eval", "--force"), "generate")], ids=["answer", "weights", "eval"])
def test_a_gpu_without_the_memory_is_told_by_options_that_there_are(cli, fluent, monkeypatch, command, where):
    """A model that --qlora trained on it may not fit in 16 bits."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(Gemma3ForCausalLM, where, full)
    result = cli(*command)
    assert result.code == 2 and "Error: out of memory: CUDA out of memory" in result.err, result.err
    hint = result.err.split("Hint: ")[1]
    assert "CUDA_VISIBLE_DEVICES=-1" in hint and "--micro-batch" not in hint and "--debug" not in hint


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


def test_without_a_training_the_merged_model_answers(cli, fluent, talkative, tmp_path):
    """A run that began with `merge --adapter`."""
    away = fluent.rename(tmp_path / "away") / "talkative_lora_adapter"
    assert cli("merge", "--adapter", away, "--base", talkative, "--run", "other", "--no-check").code == 0
    result = cli("chat", "--run", "other", "--prompt", QUESTION, "--json", *FP32)
    assert result.code == 0, result.err
    assert "no training of its own, so the merged model answers" in result.err
    assert (result.json["answer"], result.json["model"]) == (ANSWER, "talkative, tuned and merged")


def test_base_and_merged_exclude_each_other(cli, fluent):
    result = cli("chat", "--base", "--merged", "--prompt", QUESTION, "--json")
    assert result.code == 2
    assert "--base and --merged exclude each other" in result.json["error"]["problems"][0]


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
    assert result.err.count("the result of `train` is stale") == 1


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

    def __init__(self, model, chat, messages, *rest, **more):
        self.asked.append(list(messages))
        super().__init__(model, chat, messages, *rest, **more)


@pytest.fixture
def asked(monkeypatch) -> list:
    """Conversations that the model is asked to continue."""
    monkeypatch.setattr(Recorded, "asked", [])
    monkeypatch.setattr(local, "Stream", Recorded)
    return Recorded.asked


def test_a_system_prompt_reaches_the_model(cli, fluent, asked):
    def answer(*extra) -> str:
        # with a seed, lines of a pipe are answered one by one
        result = cli("chat", "--base", "--max-new-tokens", 12, "--seed", 1, *extra, *FP32, stdin="a\nb\n")
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
def conversation(talkative, asked) -> Conversation:
    """With the base model, whose answers are a few tokens long, in a run prepared from rows.jsonl."""
    import torch

    model = load_model(talkative, Placement("cpu", torch.float32, "test")).eval()
    Path("runs/m").mkdir(parents=True)
    voice = local.LocalVoice("base", "test", model, load_format(talkative, "gemma3_text"))
    return Conversation(voice, ChatConfig(max_new_tokens=4, temperature=0.0),
                        Saves(RunDir(Path("runs/m"), "m"), {"data": ["../../rows.jsonl"], "valid": 0.1}))


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

    first, seconds, prompt_tokens = 0.5, 2.5, 10

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

        def read(self):
            line = next(typed)
            if isinstance(line, BaseException):
                raise line
            return line

        def ask(self, text, voice=None):
            stream = next(prepared)
            if isinstance(stream, BaseException):
                raise stream
            return stream

        monkeypatch.setattr(typing.Plain, "read", read)
        monkeypatch.setattr(typing.Plain, "line", read)
        monkeypatch.setattr(Conversation, "ask", ask)
        loop.interactive(conversation, typing.typist(), Held(Listener()))
        return capsys.readouterr()

    return run


def test_ctrl_c_keeps_the_answer_as_far_as_it_came(talk, conversation):
    stream = Spoken(["half", KeyboardInterrupt()])
    out, _ = talk("one", "two", streams=[stream, Spoken(["whole"])])
    assert out == "half\nwhole\n"
    assert stream.stopped
    assert [m["content"] for m in conversation.messages] == ["one", "half", "two", "whole"]


@pytest.mark.parametrize("pieces, said", [([KeyboardInterrupt()], "stopped before its first word"), ([], "answered with nothing")])
def test_a_question_without_an_answer_does_not_vanish_silently(talk, conversation, pieces, said):
    _, err = talk("one", "/history", streams=[Spoken(pieces)])
    assert f"({'the model ' if 'nothing' in said else ''}{said}; the question is not kept)" in err
    assert conversation.messages == [] and "nothing was said yet" in err


def test_an_answer_whose_bytes_are_no_text_is_no_pair_and_not_saved(talk, conversation):
    _, err = talk("one", "/save", "/fix whole", "/save", streams=[Spoken(["half \ufffd"])])
    assert "answer 1 has bytes that are no characters (U+FFFD)" in err
    assert "(an answer has bytes that are no characters (U+FFFD), so there is no pair to learn from)" in err
    assert Path("runs/m/saved.jsonl").is_file() and not Path("runs/m/saved-pairs.jsonl").exists()


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


def test_the_help_keeps_its_columns_where_a_line_is_long(talk, monkeypatch):
    monkeypatch.setattr(screen.err, "width", 60)
    _, err = talk("/help")
    lines = [line for line in err[err.index("/help  "):].splitlines() if line.strip()]
    assert "/set [NAME VALUE]" in err and "/compare [TEXT|on|off]" in err
    assert len(lines) > 18 and all(line.startswith(("/", "Enter", "Ctrl-C", " " * 22)) for line in lines), err
    assert max(map(len, lines)) <= 60


def test_questions_that_begin_with_a_slash(talk, conversation):
    """A path, a comment of code, what a space stands before, and more than a word that is no command's name."""
    asked = ["/etc/passwd holds what?", "// what does this do?\nf(x);", "/* and this */", " /nope is a word", "/etc is what?",
             "/I think so/ is regex", "/opt\nis what?", " /undo", "\t/exit"]
    talk(*asked, streams=[Spoken(["a"]) for _ in asked])
    assert [turn["content"] for turn in conversation.turns[::2]] == asked


@pytest.mark.parametrize(("line", "meant"), [("/hlep", "/help"), ("/hlep me", "/help"), ("/sytem Be brief.", "/system"),
                                             ("/fx\nthe right answer", "/fix"), ("/sa talk.jsonl", "/save"), ("/etc", "/set")])
def test_what_is_nearly_a_command_is_not_asked(talk, conversation, line, meant):
    _, err = talk(line)
    name = line.split()[0]
    assert f"(there is no {name}; did you mean `{meant}`? A space before it makes it a question)" in " ".join(err.split())
    assert not conversation.turns


def test_slash_commands(talk, conversation):
    conversation.keep("one", Answer("1", 1, True))
    _, err = talk("/reset", "/system  Be [bold] brief. ", "/nope", "/xyzzy", "/help", "", "   ", KeyboardInterrupt())
    assert conversation.messages == [{"role": "system", "content": "Be [bold] brief."}]
    assert "(the conversation starts anew)" in err
    assert "(system prompt: Be [bold] brief.)" in err
    assert "(there is no /nope" in err
    assert "(there is no /xyzzy; /help lists what there is; with a space before it, it is a question)" in " ".join(err.split())
    assert err.count("forget the conversation") == 1, "for /help"
    assert "(Ctrl-D or /exit leaves)" in err
    talk("/system")
    assert conversation.messages == []


# --- /fix and /save ---------------------------------------------------------------------------------------------------

SAVED = Path("runs/m/saved.jsonl")


def saved(path: Path = SAVED) -> list:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_save_keeps_the_conversation_with_its_system_prompt_and_shows_the_command(talk):
    _, err = talk("/system Be brief.", "one", "two", "/save", streams=[Spoken(["first"]), Spoken(["今天 second\n"])])
    assert saved() == [{"messages": [{"role": "system", "content": "Be brief."},
                                     *turns("one", "first", "two", "今天 second\n")]}]
    assert "(saved in runs/m/saved.jsonl)" in err
    assert "next: gemma-tune prepare --run runs/m rows.jsonl runs/m/saved.jsonl\n" in err


def test_an_answers_indent_is_part_of_the_conversation(talk, conversation):
    talk("  one", "/save", streams=[Spoken(["    return", " 1\n"])])
    assert saved() == [{"messages": turns("  one", "    return 1\n")}]
    talk("two", streams=[Spoken([" ", "\n"])])
    assert len(conversation.turns) == 2, "white space alone is no answer"


def test_saving_twice_writes_once(talk):
    _, err = talk("one", "/save", "/save", streams=[Spoken(["first"])])
    assert saved() == [{"messages": turns("one", "first")}]
    assert err.count("(saved in") == err.count("(already in") == 1
    _, err = talk("/reset", "one", "/save", streams=[Spoken(["first"])])
    assert len(saved()) == 1, "also not when it was saved in another conversation"
    assert "(already in" in err


def test_a_conversation_that_goes_on_or_is_corrected_takes_its_own_place(talk):
    SAVED.write_text(json.dumps({"messages": turns("older", "row")}) + "\n")
    talk("one", "/save", "two", "/save", "/fix better", "/save", "/reset", "one", "/save",
         streams=[Spoken(["first"]), Spoken(["second"]), Spoken(["again"])])
    assert [row["messages"] for row in saved()] == [
        turns("older", "row"), turns("one", "first", "two", "better"), turns("one", "again")]


def test_what_somebody_else_wrote_is_never_replaced(talk, conversation):
    talk("one", "/save", streams=[Spoken(["first"])])
    with open(SAVED, "a") as f:
        f.write(json.dumps({"messages": turns("by", "hand")}))  # an editor may leave out the last line feed
    talk("two", "/save", "/save other.jsonl", "/save", streams=[Spoken(["second"])])
    assert [row["messages"] for row in saved()] == [
        turns("one", "first"), turns("by", "hand"), turns("one", "first", "two", "second")]
    assert saved(Path("other.jsonl")) == saved()[2:]


def test_a_saved_answer_that_was_edited_by_hand_stays(talk):
    talk("one", "/save", streams=[Spoken(["first"])])
    SAVED.write_text(SAVED.read_text().replace("first", "FIRST"))
    talk("two", "/save", streams=[Spoken(["second"])])
    assert [row["messages"] for row in saved()] == [turns("one", "FIRST"), turns("one", "first", "two", "second")]


def test_save_to_a_named_file(talk, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    _, err = talk("one", "/save  ~/my chats.jsonl ", streams=[Spoken(["first"])])
    assert saved(Path("home/my chats.jsonl")) == [{"messages": turns("one", "first")}]
    assert "prepare --run runs/m rows.jsonl '" in err, "quoted for a shell"
    assert not SAVED.exists()


def test_fix_replaces_the_last_answer_and_the_model_sees_it(talk, conversation):
    talk("one", "two", "/fix  The right one. ", streams=[Spoken(["first"]), Spoken(["wrong"])])
    assert conversation.messages == turns("one", "first", "two", "The right one.")
    talk("/fix", "Line [one].", "", "  line two", "", ".", "/save")
    assert conversation.turns[-1]["content"] == "Line [one].\n\n  line two"
    assert saved() == [{"messages": conversation.messages}]
    talk("/fix", "    def f():", "\treturn 1", ".")
    assert conversation.turns[-1]["content"] == "    def f():\n\treturn 1", "the first line has its indent"
    _, err = talk("/fix", "half", KeyboardInterrupt(), "/fix", "whole", EOFError())
    assert "(the answer stays as it is)" in err
    assert conversation.turns[-1]["content"] == "whole", "the end of the input ends the text"
    _, err = talk("/fix", ".")
    assert "the right answer has no text" in err
    assert conversation.turns[-1]["content"] == "whole"


def test_without_a_turn_there_is_nothing_to_fix_or_to_save(talk):
    out, err = talk("/fix better", "/fix", "/save", "one", "/reset", "/save", "two",
                    streams=[Spoken(["first"]), Spoken(["second"])])
    assert out == "first\nsecond\n", "the chat goes on"
    assert err.count("Error: there is no answer to correct yet") == 2
    assert err.count("Error: there is no answer to save yet") == 2
    assert not SAVED.exists()


def test_an_answer_that_was_cut_off_is_not_learned(talk, conversation):
    half = Spoken(["half", KeyboardInterrupt()])
    _, err = talk("one", "/save", streams=[half])
    assert "every answer was cut off" in err and "/fix" in err
    assert not SAVED.exists()
    _, err = talk("two", "/save", streams=[Spoken(["whole"])])
    assert [turn.get("train", True) for turn in saved()[0]["messages"]] == [True, False, True, True]
    assert "(1 answer was cut off and is not learned" in err
    _, err = talk("/reset", "one", "/fix whole now", "/save", streams=[Spoken(["half", KeyboardInterrupt()])])
    assert saved()[1] == {"messages": turns("one", "whole now")}
    assert "cut off" not in err.replace("/fix", "")


@pytest.mark.parametrize(("name", "content"), [
    ("array.json", b'[{"messages": []},\n {"messages": []}\n]\n'), ("array.jsonl", b'[{"messages": []}]'),
    ("object.json", b'{"data": [\n]}'), ("table.csv", b"question,answer\na,b\n"), ("rows.gz", b"\x1f\x8b\x08\0\n\xff"),
    ("rows.jsonl", '{"a": "é"}'.encode("utf-16")), ("number.jsonl", b"1\n"), ("blank.json", b'[{"messages": []}]\n\n'),
    ("blank.csv", b"question,answer\na,b\n \n")])
def test_a_file_of_another_kind_is_left_as_it_is(talk, name, content):
    Path(name).write_bytes(content)
    out, err = talk("one", f"/save {name}", "two", streams=[Spoken(["first"]), Spoken(["second"])])
    assert Path(name).read_bytes() == content
    assert f"Error: {name} is not a JSON Lines file" in err and "Hint: name another file" in err
    assert out == "first\nsecond\n"


def test_places_that_cannot_be_written_are_said(talk):
    Path("folder").mkdir()
    Path("file").write_text("")
    out, err = talk("one", "/save folder", "/save nowhere/x.jsonl", "/save file/x.jsonl", "/save /dev/null", "two",
                    streams=[Spoken(["first"]), Spoken(["second"])])
    for problem in ("folder is not a file", "nowhere/x.jsonl cannot be written: No such file or directory",
                    "file/x.jsonl cannot be written: Not a directory", "/dev/null is not a file"):
        assert f"Error: {problem}" in err
    assert out == "first\nsecond\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file")
def test_what_was_saved_stays_where_there_is_no_room_for_more(tmp_path):
    import resource

    path = tmp_path / "saved.jsonl"
    saves = Saves(RunDir(tmp_path, "m"), {})
    saves.save(turns("one", "first"))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    longer = [*turns("one", "first"), *turns("two", "second" * 50)]
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
    try:
        with pytest.raises(UserError, match="saved.jsonl cannot be written: File too large"):
            saves.save(longer)
        with pytest.raises(UserError, match="saved.jsonl cannot be written"):
            Saves(saves.run, {}).save(longer)  # of another chat, behind it
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert saves.save(longer) == (path, True) and len(path.read_bytes().splitlines()) == 1


def test_what_another_chat_saves_meanwhile_stays(tmp_path, monkeypatch):
    saves, start_of, path = Saves(RunDir(tmp_path, "m"), {}), Saves._start_of_earlier_state, tmp_path / "saved.jsonl"

    def meanwhile(*args):
        with open(path, "ab") as f:
            f.write(b'{"messages": []}\n')
        return start_of(*args)

    path.write_bytes(b'{"messages": [1]}\n')
    monkeypatch.setattr(Saves, "_start_of_earlier_state", meanwhile)
    assert saves.save(turns("one", "first")) == (path, True)
    assert [len(json.loads(line)["messages"]) for line in path.read_bytes().splitlines()] == [1, 0, 2]


@pytest.mark.parametrize("end", ["\n", "", "\n \n", "\n  "])
def test_a_row_is_a_line_of_its_own_and_saved_once_whatever_a_file_ends_with(tmp_path, end):
    path = tmp_path / "saved.jsonl"
    path.write_text('{"messages": []}' + end)
    for changed in (True, False):
        assert Saves(RunDir(tmp_path, "m"), {}).save(turns("one", "first")) == (path, changed)
    lines = path.read_text().splitlines()
    assert lines[0] == '{"messages": []}' and json.loads(lines[-1]) == {"messages": turns("one", "first")}


@pytest.mark.parametrize(("prepared", "expected"), [
    ({"data": ["../../my rows.jsonl", "hf:org/name:train"]}, ["my rows.jsonl", "hf:org/name:train", "runs/m/saved.jsonl"]),
    ({"data": ["saved.jsonl"]}, ["runs/m/saved.jsonl"]),
    ({"data": ["../../a.csv"], "format": "columns", "columns": ["user=q", "assistant=a"], "valid": "../../v.jsonl",
      "max_length": 512, "seed": 42, "near_duplicates": True},
     ["a.csv", "runs/m/saved.jsonl", "--columns", "user=q,assistant=a", "--valid", "v.jsonl", "--max-length", "512",
      "--near-duplicates"]),
])
def test_the_command_names_the_data_and_the_settings_as_they_were(prepared, expected):
    saves = Saves(RunDir(Path("runs/m"), "m"), prepared)
    command = shlex.split(saves.command_to_prepare(Path("runs/m/saved.jsonl")))
    assert command == ["gemma-tune", "prepare", "--run", "runs/m", *expected]


def test_the_command_names_the_built_in_example_too():
    saves = Saves(RunDir(Path("runs/m"), "m"), {"data": []})
    assert shlex.split(saves.command_to_prepare(Path("x.jsonl")))[-2:] == ["example:finance", "x.jsonl"]
    saves = Saves(RunDir(Path("runs/m"), "m"), {"data": ["gemma_tune:samples/pairs.jsonl"]}, kind="pairs")
    assert shlex.split(saves.command_to_prepare_pairs())[-2:] == ["example:pairs", "runs/m/saved-pairs.jsonl"]


def test_what_is_saved_is_prepared_with_the_runs_own_data(cli, fluent, talk, conversation):
    conversation.saves = Saves(RunDir(fluent, "talkative"), {"data": ["../../rows.jsonl"], "valid": 0.1})
    _, err = talk("one", "/fix The right answer.", "/save", streams=[Spoken(["wrong"])])
    [command] = [line.partition("next: ")[2] for line in err.splitlines() if "next: " in line]
    assert saved(fluent / "saved-pairs.jsonl") == [pair(turns("one"), "The right answer.", "wrong")]
    result = cli(*shlex.split(command)[1:], "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["rows"] == len(rows()) + 1
    kept = (fluent / "data/train.jsonl").read_text() + (fluent / "data/valid.jsonl").read_text()
    assert json.dumps({"messages": turns("one", "The right answer.")}) in kept
    assert saved(fluent / "saved.jsonl") == [{"messages": turns("one", "The right answer.")}]


# --- pairs of answers: /fix, /retry and /better -----------------------------------------------------------------------

PAIRS = Path("runs/m/saved-pairs.jsonl")


def pair(prompt: list, chosen: str, rejected: str) -> dict:
    return {"prompt": prompt, **{name: [{"role": "assistant", "content": text}]
                                 for name, text in (("chosen", chosen), ("rejected", rejected))}}


def test_fix_keeps_what_the_model_had_said_beside_the_correction(talk):
    _, err = talk("/system Be brief.", "one", "two", "/fix Right.", "/save",
                  streams=[Spoken(["half", KeyboardInterrupt()]), Spoken(["wrong 今"])])
    prompt = [{"role": "system", "content": "Be brief."}, *turns("one", "half", "two")]
    assert saved(PAIRS) == [pair(prompt, "Right.", "wrong 今")], "what is not learned needs no mark in a prompt"
    assert "(1 pair of this question in runs/m/saved-pairs.jsonl)" in err
    assert [turn["content"] for turn in saved()[0]["messages"]] == ["Be brief.", "one", "half", "two", "Right."]
    assert "(1 pair of a better and a worse answer in runs/m/saved-pairs.jsonl)" in err
    assert ("next: gemma-tune prepare --run runs/m rows.jsonl runs/m/saved.jsonl\n"
            "      gemma-tune prepare --run runs/m runs/m/saved-pairs.jsonl\n") in err


def test_a_second_correction_takes_the_place_of_the_first(talk):
    _, err = talk("one", "/fix Rihgt.", "/fix Right.", "/fix  wrong", "/fix Right.", streams=[Spoken(["wrong"])])
    assert saved(PAIRS) == [pair(turns("one"), "Right.", "wrong")]
    assert err.count("so there is no pair to learn from") == 1


def test_a_pair_is_there_once_and_what_others_wrote_stays(talk):
    talk("one", "/fix Right.", streams=[Spoken(["wrong"])])
    with open(PAIRS, "a") as f:
        f.write(json.dumps(pair(turns("by"), "hand", "foot")))  # an editor may leave out the last line feed
    talk("/fix Still right.", "/reset", "one", "/fix Right.", "/undo", streams=[Spoken(["wrong"])])
    assert saved(PAIRS) == [pair(turns("one"), "Right.", "wrong"), pair(turns("by"), "hand", "foot"),
                            pair(turns("one"), "Still right.", "wrong")]


def test_better_keeps_the_choice_and_the_better_answer_goes_on(talk, conversation):
    _, err = talk("one", "/retry", "/better 1", streams=[Spoken(["first"]), Spoken(["second"])])
    assert conversation.messages == turns("one", "first")
    assert saved(PAIRS) == [pair(turns("one"), "first", "second")]
    assert "(that was answer 2; /better 1" in err and "(answer 1 stays in the conversation)" in err
    talk("/better 2")
    assert conversation.messages == turns("one", "second")
    assert saved(PAIRS) == [pair(turns("one"), "second", "first")], "another choice takes the place of the first"
    talk("/retry", "/better 3", "two", "/undo", "/fix best", streams=[Spoken(["third"]), Spoken(["more"])])
    assert saved(PAIRS) == [pair(turns("one"), "third", "first"), pair(turns("one"), "third", "second"),
                            pair(turns("one"), "best", "third")]
    talk("/retry", "/better 2", streams=[Spoken(["fourth"])])
    found = saved(PAIRS)
    assert found[2] == pair(turns("one"), "fourth", "best") and len(found) == 4, "what was said before it stays"
    assert conversation.messages == turns("one", "fourth")


def test_undo_takes_the_pairs_of_the_exchange_with_it(talk):
    talk("one", "/fix Right.", "two", "/fix Right, too.", "/undo", streams=[Spoken(["wrong"]), Spoken(["wrong"])])
    assert saved(PAIRS) == [pair(turns("one"), "Right.", "wrong")]
    talk("/undo")
    assert PAIRS.read_bytes() == b""
    _, err = talk("three", "/save", streams=[Spoken(["answer"])])
    assert "pair" not in err.replace("saved.jsonl", "")


def test_better_needs_a_choice(talk, conversation):
    _, err = talk("/better 1", "one", "/better 1", "/retry", "/better 1", "/retry", "/better x", "/better",
                  streams=[Spoken(["first"]), Spoken(["first "]), Spoken(["second"])])
    assert "nothing was asked yet" in err
    assert err.count("there is one answer to the last question") == 2
    assert "(the same answer again; a higher /set temperature" in err
    assert err.count("which answer is better: 1 or 2?") == 2
    assert not PAIRS.exists() and conversation.messages == turns("one", "second")
    _, err = talk("/retry", "/better 2", streams=[Spoken([KeyboardInterrupt()])])
    assert saved(PAIRS) == [pair(turns("one"), "second", "first ")], "without a new answer the choice is as it was"


def test_an_answer_that_was_cut_off_is_never_the_chosen_one(talk, conversation):
    _, err = talk("one", "/retry", "/better 2", streams=[Spoken(["first"]), Spoken(["half", KeyboardInterrupt()])])
    assert "it was cut off, so no pair is kept" in err and not PAIRS.exists()
    talk("/better 1")
    assert saved(PAIRS) == [pair(turns("one"), "first", "half")]


def test_base_and_tuned_are_chosen_from_after_a_comparison(talk, conversation, monkeypatch):
    monkeypatch.setattr(Conversation, "pair", lambda self: (self.voice, self.voice))
    _, err = talk("/compare one", "/better base", streams=[Spoken(["of base"]), Spoken(["of tuned"])])
    assert "(/better base or /better tuned keeps which one is better)" in err
    assert conversation.messages == turns("one", "of base")
    assert saved(PAIRS) == [pair(turns("one"), "of base", "of tuned")]
    talk("/better 2")
    assert saved(PAIRS) == [pair(turns("one"), "of tuned", "of base")]
    talk("/reset", "two", "/compare", "/better tuned",
         streams=[Spoken(["spoken"]), Spoken(["base"]), Spoken(["tuned"])])
    assert conversation.messages == turns("two", "tuned")
    assert saved(PAIRS)[1:] == [pair(turns("two"), "tuned", "base")]
    _, err = talk("/compare three", "/better base", streams=[Spoken(["same"]), Spoken(["same"])])
    assert "there is one answer" in err and len(saved(PAIRS)) == 2


def test_a_file_of_pairs_that_cannot_be_written_is_said_and_the_correction_stays(talk, conversation):
    PAIRS.write_text("[1,\n2]\n \n")
    _, err = talk("one", "/fix Right.", streams=[Spoken(["wrong"])])
    assert "saved-pairs.jsonl is not a JSON Lines file" in err and PAIRS.read_text() == "[1,\n2]\n \n"
    assert conversation.messages == turns("one", "Right.")
    PAIRS.unlink()
    PAIRS.mkdir()
    _, err = talk("/fix Right again.", "/save")
    assert "saved-pairs.jsonl is not a file, so the pair is not kept" in err and saved()


@pytest.mark.parametrize(("kind", "rows", "pairs"), [
    ("conversations", ["c.csv", "x.jsonl", "--columns", "user=q,assistant=a", "--valid", "v.jsonl", "--seed", "7"],
     ["runs/m/saved-pairs.jsonl", "--seed", "7"]),
    ("pairs", ["c.csv", "x.jsonl", "--columns", "user=q,assistant=a", "--take", "chosen", "--valid", "v.jsonl",
               "--seed", "7"],
     ["c.csv", "runs/m/saved-pairs.jsonl", "--columns", "user=q,assistant=a", "--valid", "v.jsonl", "--seed", "7"])])
def test_each_kind_is_prepared_with_its_own(kind, rows, pairs):
    saves = Saves(RunDir(Path("runs/m"), "m"), {"data": ["../../c.csv"], "columns": ["user=q", "assistant=a"],
                                                "valid": "../../v.jsonl", "seed": 7}, kind)
    found = [shlex.split(line)[4:] for line in (saves.command_to_prepare(Path("x.jsonl")),
                                                saves.command_to_prepare_pairs())]
    assert found == [rows, pairs]


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye", "/exit now"])
def test_leaving(talk, command):
    assert talk(command, AssertionError("nothing is read any more")).out == ""


def test_the_prompt_sign_goes_to_stderr_when_stdout_is_a_file(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    assert typing.Plain().read() == "hello"
    out, err = capsys.readouterr()
    assert (out, err) == ("", "\n> ")


def test_what_stdout_cannot_write_becomes_a_question_mark(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="latin-1"))
    screen.piece("Grüße 今\n")
    assert raw.getvalue() == "Grüße ?\n".encode("latin-1")
    screen.result_json({"answer": "今"})
    assert json.loads(raw.getvalue().splitlines()[1]) == {"answer": "今"}


def test_stdin_that_is_not_utf8_is_an_error_for_people():
    lines = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    [asked] = read(lines, "standard input")
    assert asked.problem.message == "standard input:1: not UTF-8 text (byte 0xe9) at offset 3"


def test_a_typed_line_that_is_no_text_is_said_and_the_chat_goes_on(monkeypatch, capsys, conversation):
    lines = b"caf\xe9\none\n/fix\nfirst line\nsec\xf6nd\nsecond line\n.\n/save caf\xe9.jsonl\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    monkeypatch.setattr(Conversation, "ask", lambda self, text, voice=None: Spoken(["answer"]))
    loop.interactive(conversation, typing.typist(), Held(Listener()))
    out, err = capsys.readouterr()
    assert out == "answer\n"
    assert conversation.messages == turns("one", "first line\nsecond line"), "the other lines stay"
    assert err.count("what was typed: not UTF-8 text") == 3 and "iconv" in err
    assert not list(Path().glob("caf*"))


def test_sigterm_ends_with_its_code_also_when_the_load_ends_meanwhile(monkeypatch, conversation):
    """What says whether it is still going on can say two things in a row."""
    class Ending(Ahead):
        going_on = property(lambda self: next(said))

    def leave(code):
        raise SystemExit(code)

    def ended(self):
        raise Terminated(130)

    monkeypatch.setattr(loop.Talk, "run", ended)
    monkeypatch.setattr(loop, "end_at_once", leave)
    monkeypatch.setattr(loop, "end_all", lambda: None)  # of the tests themselves nothing ends
    for answers in ([True, False, False], [False, False, False]):
        said = iter(answers)
        conversation.answering = Ending(lambda: None)
        with pytest.raises(SystemExit) as left:
            loop.interactive(conversation, typing.typist(), Held(Listener()))
        assert left.value.code == 130


# --- a real terminal ------------------------------------------------------------------------------------------------


@pytest.fixture
def terminal(request):
    """A function: start ``gemma-tune chat`` with these options in a pseudo-terminal; with ``fresh`` in an interpreter of its
    own, which makes of the environment what it does."""
    pexpect = pytest.importorskip("pexpect", reason="pseudo-terminals are not for Windows")
    started = []

    def start(*options, fresh=False, **environment):
        command, environment = ("chat", *map(str, options), *FP32), {"OMP_NUM_THREADS": "1", **environment}
        if fresh:
            child = pexpect.spawn(sys.executable, ["-m", "gemma_tune", *command], env={**os.environ, **environment},
                                  encoding="utf-8", timeout=90, echo=False, dimensions=(50, 200))
        else:
            child = request.getfixturevalue("forks").terminal(*command, timeout=90, echo=False, dimensions=(50, 200), **environment)
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
    child.expect_exact("talkative, tuned, computing in fp32")
    child.expect_exact("/help lists commands")
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
    child.sendline("/save")
    child.expect_exact(f"(saved in {fluent}/saved.jsonl)")
    child.expect_exact("next: gemma-tune prepare --run")
    child.expect_exact("\n> ")
    child.sendline("/system Be brief.")
    child.expect_exact("(system prompt: Be brief.)")
    child.expect_exact("\n> ")
    child.sendline("/nope")
    child.expect_exact("(there is no /nope")
    child.expect_exact("\n> ")
    child.sendintr()
    child.expect_exact("(Ctrl-D or /exit leaves)")
    child.expect_exact("\n> ")
    child.sendeof()
    child.read()
    assert "\x1b" not in "".join(seen)
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    assert saved(fluent / "saved.jsonl") == [{"messages": turns(QUESTION, ANSWER)}]


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_typed_byte_does_not_end_the_chat(terminal, fluent, locale):
    child = terminal("--run", fluent, TERM="dumb", fresh=True, **locale)
    child.expect_exact("/help lists commands")
    child.expect_exact("\n> ")
    time.sleep(0.3)  # the line editor is at work now, which sees every key
    os.write(child.child_fd, b"caf\xe9\n")
    child.expect_exact("Error: what was typed: not UTF-8 text (byte 0xe9) at offset 3")
    child.expect_exact("\n> ")
    child.sendline(QUESTION)
    child.expect_exact("The number is ")
    child.expect_exact("\n> ")
    child.sendline("/system é 今.")
    child.expect_exact("(system prompt: " + ("é 今" if "PYTHONUTF8" not in locale else r"\xe9 \u4eca"))
    child.expect_exact("\n> ")
    child.sendeof()
    child.read()
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
    child = terminal("--run", endless, "--base", "--max-new-tokens", 90_000, TERM="dumb")
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


@pytest.mark.parametrize("prompts", [b"fox\n", b"fox\nfox\n"], ids=["one that streams", "a batch"])
def test_ctrl_c_without_a_terminal_ends_all_answers(endless, prompts):
    command = [sys.executable, "-m", "gemma_tune", "chat", "--run", str(endless), "--base", "-n", "90000", *FP32]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as program:
        program.stdin.write(prompts)
        program.stdin.flush()
        if len(prompts) == 4:
            assert program.stdout.read(3)
        else:  # nothing is written before both are answered
            while b"computing in" not in program.stderr.readline():
                pass
            time.sleep(5)
        program.send_signal(signal.SIGINT)
        _, err = program.communicate(timeout=30)
    assert program.returncode == 130
    assert b"stopped" in err and b"Traceback" not in err


def test_answers_that_reach_the_limit_are_said(cli, fluent):
    result = cli("chat", "--prompt", QUESTION, "--quiet", "-n", 3, *FP32)
    assert (result.code, result.out != "") == (0, True)
    assert "cut off after 3 tokens, the limit; --max-new-tokens N" in result.err
    result = cli("chat", "--json", "--quiet", "-n", 3, *FP32, stdin="Say number 3.\nSay number 7.\n")
    assert "2 of 2 answers are cut off" in result.err and len(result.out.splitlines()) == 2
