"""What a script relies on: exit codes, one JSON object, standard output that is full or closed, and names as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import visible
from gemma_tune.cli import screen
from gemma_tune.config.settings import resolve, types_of
from gemma_tune.config.stages import CONFIGS
from gemma_tune.run.session import open_session
from support.command import ROOT, rows, write_rows

ESCAPE = "\x1b[2J\x9b31m\u202e"
SEEN = "\\x1b[2J\\x9b31m\\u202e"


@pytest.fixture
def with_stdout(monkeypatch):
    """The command line with another standard output, as a shell gives it: exit code and what stderr got."""
    def run(output, *args: object) -> tuple[int, str]:
        from gemma_tune.cli.commands import app

        said = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(said), pytest.raises(SystemExit) as left:
            app([str(a) for a in args], prog_name="gemma-tune")
        return left.value.code or 0, said.getvalue()
    return run


# ---- Ctrl-C before a command has begun ----------------------------------------------------------------------------

@pytest.mark.parametrize(("module", "content"), [
    ("queue.py", "raise KeyboardInterrupt\n"),  # among the first that are imported
    ("sitecustomize.py", "import typing\n\ndef get_type_hints(*args, **options):\n    raise KeyboardInterrupt\n\n"
                         "typing.get_type_hints = get_type_hints\n")])  # with which Typer makes the options
def test_ctrl_c_while_the_command_line_is_being_made_shows_no_traceback(tmp_path, module, content):
    (tmp_path / module).write_text(content)
    done = subprocess.run([sys.executable, "-m", "gemma_tune", "status"], capture_output=True, text=True, timeout=60, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(os.name != "posix", reason="a process sends itself the signal")
@pytest.mark.parametrize(("handler", "code"), [("default_int_handler", -signal.SIGINT), ("SIG_IGN", 0)])  # as in a script's background
def test_ctrl_c_while_libraries_put_away_what_they_have_shows_no_traceback(tmp_path, handler, code):
    (tmp_path / "sitecustomize.py").write_text(
        f"import atexit, os, signal, time\n\nsignal.signal(signal.SIGINT, signal.{handler})\n\n@atexit.register\ndef put_away():\n"
        f"    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep({5 if code else 0})\n")
    done = subprocess.run([sys.executable, "-m", "gemma_tune", "--version"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert (done.returncode, done.stderr) == (code, "") and done.stdout.startswith("gemma-tune "), done.stderr


# ---- standard output -------------------------------------------------------------------------------------------------

COMMANDS = (["status", "--json"], ["chat", "--prompt", "x", "--base", "-n", 2], ["chat", "--prompt", "x", "--json", "-n", 2],
            ["merge", "--run", "nowhere", "--json"], ["train", "--no-such", "--json"], ["--version"], ["merge", "--help"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize("args", COMMANDS, ids=lambda args: " ".join(map(str, args)))
def test_a_full_disk_behind_standard_output(with_stdout, trained, args):
    with open("/dev/full", "w") as full:
        code, said = with_stdout(full, *args)
    assert code == (2 if "nowhere" in args or "--no-such" in args else 1)
    assert "Traceback" not in said and "unexpected" not in said
    assert said.count("Error:") == 1 and ("No space left" in said) == (code == 1)


@pytest.mark.parametrize("args", COMMANDS[:-1], ids=lambda args: " ".join(map(str, args)))
def test_a_closed_standard_output(with_stdout, trained, args, monkeypatch):
    monkeypatch.setattr("gemma_tune.chat.conversation.open_conversation", lambda *a: pytest.fail("it began"))
    code, said = with_stdout(None, *args)
    assert code == (2 if "--no-such" in args else 1) and said.count("Error:") == 1
    assert "Traceback" not in said and ("standard output cannot be written" in said) == (code == 1)


def test_commands_without_a_result_on_standard_output_do_without_it(with_stdout, trained):
    assert with_stdout(None, "status")[0] == 0 and with_stdout(None, "merge", "--no-check")[0] == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no full device")
@pytest.mark.parametrize(("args", "code", "key"), [(["status"], 0, "run"), (["merge", "--run", "no", "--debug"], 2, "error")])
def test_a_log_on_a_full_disk_loses_no_result(trained, args, code, key):
    from gemma_tune.cli.commands import app

    result = io.StringIO()
    with (open("/dev/full", "wb", buffering=0) as full, contextlib.redirect_stdout(result),
          contextlib.redirect_stderr(io.TextIOWrapper(full, write_through=True)), pytest.raises(SystemExit) as left):
        app([*args, "--json"], prog_name="gemma-tune")
    assert (left.value.code or 0) == code and key in json.loads(result.getvalue())
    with contextlib.redirect_stderr(io.StringIO()) as later:
        screen.err.print("later")
    assert later.getvalue() == "later\n"


def test_a_reader_that_has_gone(with_stdout, trained):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        assert with_stdout(gone, "chat", "--prompt", "x", "-n", 2, "--quiet")[0] == 1
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        code, said = with_stdout(gone, "status", "--json")
    assert code == 1 and "Error" not in said and "Traceback" not in said


def test_a_file_does_not_get_the_number_of_a_closed_stream(tmp_path):
    code = ("import os, sys\nfrom gemma_tune.base.machine import occupy_standard_streams\nos.close(1)\nos.close(0)\n"
            "occupy_standard_streams()\nassert os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY) > 2")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ---- errors ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("args", "text"), [
    (["train", "--rank", "many"], "Invalid value for '--rank'"), (["nonsense"], "nonsense"), (["train", "--no-such"], "--no-such"),
    (["train", "--rank"], "--rank"), (["status", "extra"], "extra")])
def test_wrong_usage_as_json(cli, args, text):
    result = cli(*args, "--json") if args != ["train", "--rank"] else cli("train", "--json", "--rank")
    error = result.json["error"]
    assert result.code == 2 == error["exit_code"] and text in error["message"] and not error["problems"]
    assert error["hint"] == f"see `{'gemma-tune' if args == ['nonsense'] else f'gemma-tune {args[0]}'} --help`"
    plain = cli(*args)
    assert plain.code == 2 and plain.out == "" and plain.err.count("Error:") == plain.err.count("Hint:") == 1


@pytest.mark.parametrize("args", [["merge", "--run", "nowhere"], ["train", "--rank", 0]])
def test_debug_changes_neither_exit_code_nor_json(cli, trained, args):
    plain, debug = cli(*args, "--json"), cli(*args, "--json", "--debug")
    assert (debug.code, debug.json) == (plain.code, plain.json) and debug.code == 2
    assert "Traceback" in debug.err and "UserError" in debug.err
    assert debug.err.splitlines()[-2:] == plain.err.splitlines()[-2:]


def test_no_arguments_are_a_call_for_help(cli):
    result = cli()
    assert result.code == 2 and "Usage:" in result.out + result.err and "Error" not in result.err


# ---- empty texts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("command", "option", "text"), [
    ("prepare", "--run", ""), ("prepare", "--config", ""), ("prepare", "--columns", ""),
    ("chat", "--model", ""), ("status", "--run", " "), ("merge", "--push", ""),
    ("merge", "--revision", ""), ("run", "--quant", ",")])
def test_an_empty_text_is_not_the_default(cli, tmp_path, command, option, text):
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "manifest.json").write_text("{}")  # what the default would be
    error = cli(command, option, text, "--json").json["error"]
    said = " ".join([error["message"], *error["problems"]])
    assert error["exit_code"] == 2 and error["hint"] and "damaged" not in said
    assert option == "--config" or f"{option}: is empty" in said or f"{option.lstrip('-')}: is empty" in said, said


def test_no_setting_takes_an_empty_text_but_those_in_which_it_means_something():
    taken = set()
    for config in CONFIGS.values():
        for name in (f.name for f in dataclasses.fields(config)):
            if "str" in str(types_of(config)[name]) and name != "data":  # files have a check of their own
                try:
                    resolve(config, {name: ""})
                    taken.add((config.section, name))
                except UserError as e:
                    assert e.problems[0].startswith(f"{name}: "), e.problems
    assert taken == {("chat", "system"), ("export-ollama", "system")}


def test_an_empty_text_in_a_settings_file_and_from_python(cli, tiny):
    Path("a.yaml").write_text("model: ''\nrun: ' '\nmerge: {push: ''}\nexport-ollama: {quant: '', system: ''}\n")
    assert cli("prepare", "--config", "a.yaml", "--json").json["error"]["problems"] == [
        "model: is empty", "run: is empty", "merge.push: is empty", "export-ollama.quant: is empty"]
    for settings in ({"model": ""}, {"model": tiny, "revision": ""}, {"model": tiny, "valid": ""}):
        with pytest.raises(UserError, match="is empty|cannot be used"):
            open_session("prepare", **{k: str(v) for k, v in settings.items()})


# ---- names that move the cursor --------------------------------------------------------------------------------------

def test_escape_sequences_in_names_are_made_visible(cli, tiny, tmp_path):
    data = write_rows(tmp_path / f"a{ESCAPE}.jsonl", [*rows(), {"messages": [{"role": ESCAPE, "content": "x"}]}])
    run = tmp_path / f"r{ESCAPE}\r"
    done = cli("prepare", data, "--model", tiny, "--run", run, "--json", "--preview", 1)
    assert done.code == 0 and f"r{SEEN}\\r" in done.err and f"a{SEEN}.jsonl:13" in done.err
    status = cli("status", "--run", run, "--json")
    assert done.json["run"] == status.json["run"] == str(run)
    usage = cli("train", f"--{ESCAPE}", "--json")
    lost = cli("merge", "--run", run, "--debug", "--json")
    assert SEEN in usage.err and SEEN in lost.err
    for result in (done, status, usage, lost):
        printed = (result.err + result.out).replace("\n", "")
        assert visible(printed) == printed
    Path(run, "manifest.json").write_text(Path(run, "manifest.json").read_text().replace('"prepare"', '"pre\\u001b[2J"'))
    assert "stages.pre\\x1b[2J: there is no such stage" in cli("status", "--run", run).err


def test_escape_sequences_in_what_a_server_says(capsys):
    from gemma_tune.cli.console import ConsoleListener

    listener = ConsoleListener()
    listener.warn(f"w {ESCAPE}")
    listener.note(f"n {ESCAPE}")
    listener.grid(f"t {ESCAPE}", [[f"h {ESCAPE}"], [f"c {ESCAPE}[red]"]])
    listener.progress(f"p {ESCAPE}", 1, 1)
    assert capsys.readouterr().err.count(SEEN) == 6


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_cannot_command_the_terminal_and_is_left_alone_elsewhere(monkeypatch, terminal):
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    screen.answer(f"a\n\tb {ESCAPE}")
    assert stdout.getvalue() == ("a\n\tb \\x1b[2J\\x9b31m\u202e" if terminal else f"a\n\tb {ESCAPE}")


@pytest.mark.parametrize("as_json", [True, False])
def test_an_answer_goes_through_there_and_stands_in_json_as_it_is(monkeypatch, as_json):
    from gemma_tune.answers.generation import Answer
    from gemma_tune.chat.pictures import Shown
    from gemma_tune.cli.chat import scripts

    secret = f"{ESCAPE} hf_{'a1' * 10}"
    voice = SimpleNamespace(batch=lambda asked, config: [Answer(secret, 3, True) for _ in asked], which="m")
    conversation = SimpleNamespace(voice=voice, which="m", config=SimpleNamespace(seed=None), system=None,
                                   comparing=False, shown=Shown())
    stdout = io.StringIO()
    monkeypatch.setattr(stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    Path("asked.jsonl").write_text(json.dumps({"prompt": secret}) + "\n" + json.dumps({"prompt": "b"}) + "\n")
    scripts.all_of(conversation, "asked.jsonl", as_json)
    written = stdout.getvalue()
    if as_json:
        assert json.loads(written.splitlines()[0]) == {"tokens": 3, "ended": True, "model": "m", "prompt": secret,
                                                       "answer": secret, "where": "asked.jsonl:1"}
    assert "\x1b" not in written and "hf_a1" in written


def test_the_shell_completes_commands_and_options(monkeypatch):
    """`--install-completion` puts a call like this into the shell's settings."""
    environment = {**os.environ, "_GEMMA_TUNE_COMPLETE": "complete_bash", "COMP_WORDS": "gemma-tune chat --comp",
                   "COMP_CWORD": "2"}
    start = "import sys; sys.argv = ['gemma-tune']; from gemma_tune.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", start], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["--compare"])


def test_json_is_the_same_content_without_characters_that_act(capsys):
    content = {"a": ESCAPE + "é\n\ud800", ESCAPE: [ESCAPE]}
    screen.result_json(content)
    out = capsys.readouterr().out
    assert json.loads(out) == content and out.isascii() and visible(out) == out
    screen.result_json({"a": "é 分"})
    assert "é 分" in capsys.readouterr().out


def test_tools_that_the_template_has_no_place_for_are_refused(cli, fluent):
    rows = [{"messages": [{"role": "user", "content": "Say number 3."}], "tools": [{"type": "function", "function": {"name": "look"}}]},
            {"messages": [{"role": "user", "content": "Say number 3."}]}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = cli("chat", "--run", fluent, "--input", "rows.jsonl", "--json", "--dtype", "fp32")
    refused, answered = map(json.loads, result.out.splitlines())
    assert result.code == 1 and "no place for tools and leaves them out" in refused["error"]["message"]
    assert answered["answer"] == "The number is 3, no more."


@pytest.mark.parametrize("content, said", [(b"ab\0cd\n", "is no text file"), (b"", "is empty")])
def test_files_that_hold_no_prompts_are_refused_before_a_model_is_loaded(cli, fluent, content, said):
    Path("prompts.txt").write_bytes(content)
    result = cli("chat", "--run", fluent, "--input", "prompts.txt")
    assert result.code == 2 and f"prompts.txt {said}" in result.err and "computing in" not in result.err


def test_a_lone_carriage_return_is_no_end_of_line(cli, fluent):
    Path("prompts.txt").write_bytes(b"Say number 3.\rSay number 4.\n")
    result = cli("chat", "--run", fluent, "--input", "prompts.txt", "--json", "--dtype", "fp32")
    assert [json.loads(line)["prompt"] for line in result.out.splitlines()] == ["Say number 3.\rSay number 4."]


def test_warnings_are_in_the_object_and_only_those_of_this_command(cli, tiny, tmp_path):
    """As is what kind of error it was, and which command it is that was asked for."""
    long = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b " * 60}]}, *rows(8)]
    data = write_rows(tmp_path / "rows.jsonl", long)
    done = cli("prepare", data, "--model", tiny, "--max-length", 60, "--json")
    assert done.code == 0 and any("76 tokens are more than --max-length 60" in text for text in done.json["warnings"]), done.err
    assert all(f"! {text[:30]}" in done.err for text in done.json["warnings"])
    assert cli("prepare", "--json").json["warnings"] == []
    refused = cli("prepare", "nowhere.jsonl", "--json").json["error"]
    assert refused["kind"] == "bad_input" and refused["exit_code"] == 2
