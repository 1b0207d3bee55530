"""Bad input of every kind: message, hint, exit code, no traceback, and nothing lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.command import QUICK, rows, write_rows


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".lock")}


def check(result, code: int, *texts: str) -> None:
    """One message and one hint on stderr, nothing on stdout, no traceback."""
    assert result.code == code, result.err
    said = " ".join(result.err.split())
    starts = [line.split(" ")[0] for line in result.err.splitlines()]
    assert starts.count("Error:") == 1 and starts.count("Hint:") == 1, said
    assert "Traceback" not in said and result.out == ""
    for text in texts:
        assert text in said, (text, said)


GOOD = rows(12)
BAD_DATA = {
    "missing file": (None, ["there is no file rows.jsonl"]),
    "empty file": (b"", ["rows.jsonl is empty"]),
    "white space": (b" \n\n", ["rows.jsonl is empty"]),
    "binary": (b"\x89PNG\r\n\x1a\n\0\0\0", ["rows.jsonl is a binary file"]),
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), ["rows.jsonl:1: not UTF-8 text (byte 0xe9)"]),
    "broken JSON": (b'{"messages": [\n{"role": "user"}\n', ["rows.jsonl:"]),
    "broken array": (b'[{"messages": []},\n {"messages": [}\n]', ["rows.jsonl:2: not valid JSON"]),
    "all rows wrong": (b'{"a": 1}\n{"b": 2}\n', ["none of the 2 rows can be used", "rows.jsonl:1:", "rows.jsonl:2:"]),
    "wrong roles": (json.dumps({"messages": [{"role": "robot", "content": "hi"}]}).encode(),
                    ["rows.jsonl:1: turn 1 has the role 'robot'"]),
    "a directory": ("directory", ["rows.jsonl is a directory"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(cli, trained, case):
    content, texts = BAD_DATA[case]
    path = Path("rows.jsonl")
    path.unlink()
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before = snapshot(trained)
    check(cli("prepare", "rows.jsonl", "--run", trained), 2, *texts)
    after = snapshot(trained)
    after.pop("rejected.jsonl", None)  # the rows that were refused, to be looked up
    assert after == before, "a failed preparation must leave the run as it is"


def test_a_traceback_repeats_neither_hint_nor_problems(cli, tiny):
    Path("rows.jsonl").write_text('{"a": 1}\n{"b": 2}\n')
    result = cli("prepare", "rows.jsonl", "--model", tiny, "--debug")
    assert result.code == 2 and "Traceback" in result.err
    assert result.err.count("Hint:") == result.err.count("rows.jsonl:1:") == result.err.count("rows.jsonl:2:") == 1, result.err


def test_a_broken_line_is_rejected_with_its_number_and_kept(cli, tiny):
    lines = [json.dumps(r) for r in GOOD]
    lines[4] = '{"messages": [{"role": "user", "content": "oops"'
    Path("rows.jsonl").write_text("\n".join(lines))
    result = cli("prepare", "rows.jsonl", "--model", tiny, "--json")
    assert result.code == 0, result.err
    assert "rejected rows.jsonl:5: not valid JSON" in result.err
    [rejected] = map(json.loads, Path("runs/tiny-gemma/data/rejected.jsonl").read_text().splitlines())
    assert (rejected["line"], rejected["row"]) == (5, lines[4])


def test_several_problems_are_reported_together(cli, tiny):
    write_rows(Path("rows.jsonl"), [*GOOD[:2], {"x": 1}, {"messages": []}, {"messages": [{"role": "user", "content": ""}]}])
    result = cli("prepare", "rows.jsonl", "--model", tiny)
    check(result, 2, "3 of 5 rows cannot be used", "rows.jsonl:3:", "rows.jsonl:4:", "rows.jsonl:5:", "--max-rejected")


LONG = "revenue rose twenty percent " * 400
CALLED = {"id": "1", "type": "function", "function": {"name": LONG, "arguments": "{}"}}
LONG_ROWS = {
    "a function's name": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "messages": [
        {"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALLED]},
        {"role": "tool", "tool_call_id": "1", "content": "r"}, {"role": "assistant", "content": "b"}]},
        ["rows.jsonl:1: turn 2 calls revenue rose", "which `tools` does not declare"]),
    "many turns": ({"messages": [{"role": f"robot{n}", "content": LONG} for n in range(30)]},
                   ["rows.jsonl:1: turn 1 has the role 'robot0'", "; and 15 more problems"]),
}


@pytest.mark.parametrize("case", LONG_ROWS)
def test_an_error_about_a_long_row_fills_no_screen(cli, trained, case):
    row, texts = LONG_ROWS[case]
    write_rows(Path("rows.jsonl"), [row])
    for args in (("prepare", "rows.jsonl"), ("eval", "--data", "rows.jsonl")):
        result = cli(*args, "--run", trained)
        check(result, 2, *texts)
        assert max(map(len, result.err.splitlines())) < 800


def test_an_error_about_a_long_setting_or_argument_fills_no_screen(cli, trained):
    Path("some.yaml").write_text(f"train:\n  {LONG[:900]}: 1\n")
    for args, said in ((("train", "--config", "some.yaml"), "train.revenue rose"), (("prepare", LONG), "there is no file revenue rose")):
        result = cli(*args, "--run", trained)
        check(result, 2, said, "…")
        assert len(result.err) < 1500


@pytest.mark.parametrize("args", [["train"], ["chat", "--prompt", "x"], ["eval"], ["merge"], ["export-ollama"], ["status"]])
def test_there_is_no_run(cli, args):
    check(cli(*args), 2, "there is no run under runs/", "gemma-tune prepare")
    check(cli(*args, "--run", "nowhere"), 2, "nowhere is not a run yet", "gemma-tune prepare")
    assert not Path("nowhere").exists()
    Path("runs/chats").mkdir(parents=True)
    Path("runs/chats/manifest.json").write_text("{}")
    check(cli(*args, "--run", "runs/chat"), 2, "did you mean --run runs/chats? Else start it: gemma-tune prepare")


@pytest.mark.parametrize(("args", "message"), [
    (["prepare", "x.jsonl", "--epochs", 3], "No such option: --epochs; `train`, `tune`, `run` have it"),
    (["doctor", "--model"], "Option '--model' requires an argument\n"),
    (["train", "--epoch", 3], "--epochs"), (["merge", "--nothing-like-it"], "No such option: --nothing-like-it"),
    (["train", "--max-shard-size", 3], "--max-shard-size; `merge` has it"),
    (["chat", "hello"], "extra argument(s) (hello); a question to answer goes behind --prompt, in quotes")])
def test_arguments_of_another_command(cli, args, message):
    result = cli(*args)
    assert result.code == 2 and message in result.err, result.err


@pytest.mark.parametrize(("stage", "needs"), [("eval", "train"), ("merge", "train"), ("export-ollama", "merge")])
def test_missing_stages_name_the_command(cli, tiny, data, stage, needs):
    assert cli("prepare", data, "--model", tiny).code == 0
    check(cli(stage), 2, f"`{stage}` needs what `{needs}` makes", f"gemma-tune {needs} --run runs/tiny-gemma")


@pytest.mark.parametrize(("content", "texts"), [
    ("{", ["is damaged", "mv "]), ("[]", ["is damaged"]), ('{"schema": 1}', ["is damaged"]),
    ('{"schema": 99}', ["has schema 99", "upgrade gemma-tune"]), ("\x00", ["is damaged"]),
])
def test_manifests_that_cannot_be_used(cli, trained, content, texts):
    (trained / "manifest.json").write_text(content)
    before = snapshot(trained)
    for args in (["train", *QUICK], ["status"], ["prepare"], ["chat", "--prompt", "x"]):
        check(cli(*args, "--run", trained), 2, *texts)
    assert snapshot(trained) == before


def test_a_manifest_must_not_point_outside_the_run(cli, trained):
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["stages"]["train"]["outputs"]["adapter"]["path"] = "../../secret"
    (trained / "manifest.json").write_text(json.dumps(manifest))
    check(cli("merge", "--run", trained), 2, "../../secret leaves the run directory")


def test_a_run_in_use_by_another_process(cli, trained):
    script = ("import sys, time; from pathlib import Path; from gemma_tune.run.lock import Lock\n"
              "with Lock(Path(sys.argv[1]), 'train'):\n    print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(trained)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        before = snapshot(trained)
        check(cli("merge", "--run", trained), 2, f"is in use by process {holder.pid} (train, since", "--run DIR")
        assert snapshot(trained) == before
        assert cli("merge", "--run", trained, "--json").json["error"]["kind"] == "in_use"
        status = cli("status", "--run", trained, "--json").json
        assert status["next"] is None
        assert status["in_use_by"].startswith(f"process {holder.pid} (train, since")
    finally:
        holder.kill()
        holder.wait()
    assert cli("train", *QUICK, "--run", trained).code == 0, "a dead owner's lock is taken over"


def test_no_rights_to_write(tiny, data):
    """As a user without rights: root may write everywhere, so the command runs as nobody where it can."""
    place = Path("locked")
    place.mkdir()
    place.chmod(0o555)
    script = ("import os, sys\n"
              "if os.getuid() == 0:\n"
              "    os.setgid(65534); os.setuid(65534)\n"
              "from gemma_tune.cli.commands import app\n"
              "app(sys.argv[1:], prog_name='gemma-tune')")
    for parent in [*tiny.parents, *data.resolve().parents]:
        if parent.stat().st_uid == os.getuid() and parent != Path("/") and str(parent).startswith("/tmp/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    for path in [tiny, *tiny.iterdir()]:
        path.chmod(path.stat().st_mode | 0o055 if path.is_dir() else 0o644)
    done = subprocess.run([sys.executable, "-c", script, "prepare", data, "--model", tiny, "--run", place / "run"],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(place)})
    if "ModuleNotFoundError" in done.stderr or "Permission denied: '/root" in done.stderr:
        pytest.skip("an unprivileged user cannot read this Python installation")
    assert done.returncode == 2, done.stderr
    assert "no permission to write" in done.stderr and "--run DIR" in done.stderr and "Traceback" not in done.stderr


def test_a_file_where_the_run_should_be(cli, tiny, data):
    Path("occupied").write_text("mine")
    check(cli("prepare", data, "--model", tiny, "--run", "occupied"), 2, "occupied", "--run")
    assert Path("occupied").read_text() == "mine"


def test_settings_out_of_range_are_reported_together(cli, trained):
    check(cli("train", "--rank", 0, "--dropout", 2, "--schedule", "cosin", "--run", trained), 2, "3 settings",
          "rank: 0 is below", "dropout: 2 is above", "'cosin' is not one of", "did you mean `cosine`")


def test_errors_as_json(cli, trained):
    result = cli("train", "--rank", 0, "--json", "--run", trained)
    assert result.code == 2
    error = result.json["error"]
    assert error["exit_code"] == 2 and error["problems"] == ["rank: 0 is below the least possible 1"]
    assert error["message"] and error["hint"]


def test_debug_shows_the_traceback(trained):
    done = subprocess.run([sys.executable, "-m", "gemma_tune", "merge", "--run", "nowhere", "--debug"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "UserError" in done.stderr


def test_unexpected_failures_are_reported_as_such(cli, trained, monkeypatch):
    from gemma_tune.merge import stage as merge

    def broken(*args):
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(merge, "read_adapter", broken)
    check(cli("merge", "--run", trained), 1, "unexpected RuntimeError: a fault of ours", "--debug")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_scheduler_that_ends_a_stage_leaves_what_ctrl_c_leaves(cli, trained, monkeypatch, number):
    import gemma_tune.merge.stage as merge

    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    monkeypatch.setattr(merge, "read_adapter", lambda *args, **kwargs: signal.raise_signal(number))
    result = cli("merge", "--run", trained, "--json")
    assert result.code == 130
    assert result.json["error"]["kind"] == "interrupted" and "stopped" in result.err
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    assert signal.getsignal(number) is signal.SIG_DFL, "as before"


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_that_nohup_has_ignored_stays_so(cli, trained, monkeypatch):
    import gemma_tune.merge.stage as merge

    def hung_up(*args, **kwargs):
        signal.raise_signal(signal.SIGHUP)
        return read(*args, **kwargs)

    read = merge.read_adapter
    monkeypatch.setattr(merge, "read_adapter", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli("merge", "--run", trained).code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_that_a_library_makes_an_error_of_is_ctrl_c(cli, trained, monkeypatch):
    import gemma_tune.merge.stage as merge

    def swallowing(*args, **kwargs):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    monkeypatch.setattr(merge, "read_adapter", swallowing)
    result = cli("merge", "--run", trained)
    assert result.code == 130
    assert "stopped" in result.err and "unexpected" not in result.err


@pytest.mark.parametrize("args", [["train", "--rank", "many"], ["nonsense"], ["train", "--no-such-option"]])
def test_wrong_usage_is_exit_code_2(cli, args):
    result = cli(*args)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_killed_at_any_moment_the_manifest_names_nothing_half_written(tiny, data, cli, forks):
    """Kill the pipeline at growing delays, in which no library is imported; what the manifest names must exist and be what it
    says."""
    from gemma_tune.run.directory import RunDir
    from gemma_tune.run.manifest import read_manifest
    from gemma_tune.run.state import state_of

    Path("quick.yaml").write_text("train: {rank: 4, dtype: fp32}\neval: {questions: 1, max_new_tokens: 2}\n"
                                  "export-ollama: {verify: false, measure: false}\n")
    root = Path("runs/tiny-gemma")
    for delay in (0.5, 1.0, 1.75, 2.5):
        process = forks.start("run", data, "--model", tiny, "--epochs", 1, "--config", "quick.yaml", "--force")
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # on a fast machine it has ended
            os.kill(process, signal.SIGKILL)
        forks.result()
        manifest = read_manifest(root)
        for stage in manifest.stages if manifest else ():
            # A new artifact may be in place before its record: whole, but not the one recorded.
            state = state_of(RunDir(root, "tiny-gemma"), manifest, stage)
            assert state.status in ("done", "stale") or "was changed" in state.reason, (delay, stage, state)
    result = cli("run", data, "--model", tiny, "--epochs", 1, "--config", "quick.yaml", "--json")
    assert result.code == 0, result.err
    assert {s["state"] for s in cli("status", "--json").json["stages"].values()} == {"done"}


@pytest.mark.parametrize("inside, hint", [("data", "name that one: --run {}"), ("manifest.json", "name a run directory with --run {}")])
def test_a_path_inside_a_run_leads_to_it(cli, trained, inside, hint):
    for command in ("status", "train"):
        check(cli(command, "--run", trained / inside), 2, hint.format(trained))


def test_what_lies_beside_another_program_s_manifest_is_in_no_run(cli, tmp_path):
    """Web pages that can be installed have one, and so do extensions of browsers."""
    (tmp_path / "manifest.json").write_text('{"name": "Page", "icons": []}')
    check(cli("status", "--run", "mine"), 2, "start it: gemma-tune prepare YOUR.jsonl --run mine")


def test_a_model_without_a_run_is_named_in_the_command_that_begins_one(cli):
    for command in ("status", "tune"):
        check(cli(command, "--model", "org/new"), 2, "start it: gemma-tune prepare YOUR.jsonl --run runs/new --model org/new")


@pytest.mark.parametrize("args, said", [(("--epochs", "x"), "'--epochs' / '-e': expected a number, found 'x'"),
                                        (("-e=x",), "expected a number, found 'x'"), (("--rank=1.5",), "expected a whole number, found '1.5'"),
                                        (("--epochs", 3, "--epochs", "x"), "expected a number, found 'x'"),
                                        (("--epochs", 3, "-e", "x", "--rank", 4), "expected a number, found 'x'")])
def test_what_is_no_number_is_quoted(cli, args, said):
    check(cli("train", *args), 2, said)


def test_a_directory_of_runs_that_is_named_empty(cli):
    check(cli("runs", ""), 2, "DIR: is empty")


@pytest.mark.parametrize("option", ["--model", "--run", "--config"])
def test_an_empty_name_is_no_wish_for_the_default(cli, data, option):
    """As of a shell's variable that is not set."""
    result = cli("prepare", data, option, "", "--json")
    assert result.code == 2
    assert result.json["error"]["message"] == f"{option}: is empty"
    assert not Path("runs").exists()
