"""Several processes as one training: two of them over gloo, started by the command itself and by accelerate."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.config.stages import TrainConfig
from gemma_tune.train import launch, processes
from support.command import MANIFEST_SCHEMA, Result, invoke, rows, write_rows

# 27 rows of different lengths in steps of 4: one process gets more of the last step than the other, in more pieces.
SETTINGS = ("--epochs", "2", "--rank", "4", "--dtype", "fp32", "--learning-rate", "1e-3", "--batch-size", "2",
            "--micro-batch", "1")
STEPS = 14
ALONE = (*SETTINGS, "--accumulation", "2")
TOGETHER = (*SETTINGS, "--num-processes", "2")

# What happens to a process in its fourth step.
EVENT = """
import os, signal, time
if os.environ.get("RANK") == "{rank}":
    import gemma_tune.train.callbacks

    def event(self, args, state, control, **kwargs):
        if state.global_step == 3:
            {what}
    gemma_tune.train.callbacks.StopRequest.on_step_begin = event
"""


def python(*args: object, **environment: object) -> Result:
    """Run a module in a process of its own, as one does from a shell."""
    done = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, timeout=200,
                          env=os.environ | {n: str(v) for n, v in environment.items()}, stdin=subprocess.DEVNULL)
    return Result(done.returncode, done.stdout, done.stderr)


def accelerate(*args: object, **env: str) -> Result:
    """``accelerate launch -m gemma_tune`` as two processes, with settings of accelerate that must not count.

    ``--multi_gpu`` only means that there are several: without it accelerate starts one process on a CPU.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return python("accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
                  "--mixed_precision", "bf16", "--dynamo_backend", "no", "--main_process_port", port,
                  "-m", "gemma_tune", *args, **env)


@pytest.fixture(scope="session")
def prepared_once(tiny, tmp_path_factory) -> Path:
    """A directory with a prepared run, ``prepared``; the trained ones below lie beside it."""
    place = tmp_path_factory.mktemp("processes")
    records = rows(30)
    for n, row in enumerate(records):
        row["messages"][0]["content"] += " please" * (n % 9)
    write_rows(place / "rows.jsonl", records[:27])
    write_rows(place / "valid.jsonl", records[27:])
    done = invoke("prepare", place / "rows.jsonl", "--valid", place / "valid.jsonl", "--model", tiny,
                  "--run", place / "prepared")
    assert done.code == 0, done.err
    return place


def run_in(place: Path, name: str) -> Path:
    return shutil.copytree(place / "prepared", place / name)


@pytest.fixture(scope="session")
def alone(prepared_once) -> Path:
    """Trained by one process: this one."""
    run = run_in(prepared_once, "alone")
    done = invoke("train", "--run", run, *ALONE)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="session")
def together(prepared_once) -> tuple[Path, Result]:
    """Trained by two processes: the run, and what the command said."""
    run = run_in(prepared_once, "together")
    done = python("gemma_tune", "train", "--run", run, *TOGETHER, "--json")
    assert done.code == 0, done.err
    return run, done


@pytest.fixture
def run(prepared_once, tmp_path) -> Path:
    """A prepared run of one's own."""
    return shutil.copytree(prepared_once / "prepared", prepared_once / tmp_path.name)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(next(run.glob("*_lora_adapter")) / "adapter_model.safetensors")


def assert_same_training(run: Path, other: Path) -> None:
    """Every step saw the same rows and gave the same loss, and the adapter is the same, but for rounding."""
    ours, theirs = records(run), records(other)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    assert sum("loss" in r for r in ours) == STEPS
    for a, b in zip(ours, theirs):
        for name in {"loss", "eval_loss", "grad_norm"} & a.keys():
            assert a[name] == pytest.approx(b[name], rel=1e-5), a
        assert a.get("tokens") == b.get("tokens")
        assert a.get("learning_rate") == b.get("learning_rate")
    ours, theirs = adapter(run), adapter(other)
    assert ours.keys() == theirs.keys()
    assert max(t.abs().max() for t in ours.values()) > 1e-2
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


def error_of(result: Result) -> dict:
    """The one error that a command shows to programs, and to people the same."""
    error = result.json["error"]
    assert re.findall(r"^Error: (.*)", result.err, re.M) == [error["message"]]
    assert "Traceback" not in result.err
    assert result.code == error["exit_code"]
    return error


# ---- the same training -----------------------------------------------------------------------------------------------

def test_two_processes_learn_what_one_with_twice_the_accumulation_does(together, alone):
    run, done = together
    assert_same_training(run, alone)
    assert done.json["summary"]["effective_batch"] == 4
    assert done.err.count("computing in") == done.err.count("train: done") == 1


def test_they_leave_one_manifest_and_one_adapter(together):
    import jsonschema

    run, _ = together
    manifest = json.loads((run / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    assert manifest["stages"]["train"]["config"]["num_processes"] == {"value": 2, "from": "flag"}
    assert len(list(run.glob("*_lora_adapter*"))) == 1
    assert not (run / ".lock-owner.json").exists()
    newest = run / "training_checkpoints" / f"checkpoint-{STEPS}"
    sealed = json.loads((newest / "complete.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "optimizer.pt", "adapter_model.safetensors"} <= sealed.keys()


def test_a_finished_training_is_up_to_date_for_all(together, forks):
    run, first = together
    done = forks.run("train", "--run", run, *TOGETHER, "--json")
    assert (done.code, done.json["status"]) == (0, "up-to-date")
    assert done.json["summary"] == first.json["summary"]


def test_accelerate_launch_works_by_itself_and_its_settings_do_not_count(run, alone):
    done = accelerate("train", "--run", run, *SETTINGS, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["effective_batch"] == 4
    assert_same_training(run, alone)


def test_fsdp_learns_what_one_process_does(run, alone, forks):
    done = forks.run("train", "--run", run, *TOGETHER, "--strategy", "fsdp", "--json")
    assert done.code == 0, done.err
    assert_same_training(run, alone)


def test_the_whole_path_trains_in_processes(tiny, tmp_path, forks):
    (tmp_path / "settings.yaml").write_text("train: {num_processes: 2, epochs: 3, max_steps: 3, dtype: fp32}\n"
                                            "export-ollama: {verify: false, measure: false}")
    data = write_rows(tmp_path / "rows.jsonl", rows(8))
    done = forks.run("run", data, "--model", tiny, "--run", tmp_path / "run", "--config", tmp_path / "settings.yaml",
                     "--max-steps", 2, "--questions", 1, "--json")
    assert done.code == 0, done.err
    assert done.json["stages"]["train"]["summary"]["steps"] == 2
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["stages"]["train"]["config"]["num_processes"] == {"value": 2, "from": "file"}


# ---- the end ---------------------------------------------------------------------------------------------------------

def happens(what: str, rank: int = 1) -> dict[str, str]:
    """The environment in which ``what`` happens to that process in its fourth step."""
    return {"AT_THE_START": EVENT.format(what=what, rank=rank)}


def test_bad_input_is_said_once(tmp_path, forks):
    done = forks.run("train", "--run", tmp_path / "none", "--num-processes", 2, "--json")
    assert error_of(done)["exit_code"] == 2
    assert "is not a run yet" in done.err


def test_a_refusal_after_they_met_keeps_its_exit_code(run, forks):
    """At an interpreter's usual end a thread of the main process that asks the store brings it down with SIGABRT, at times; here
    what aborts stands at that end, always."""
    abort = "import atexit, os\nif os.environ.get('RANK') == '0':\n    atexit.register(os.abort)"
    done = forks.run("train", "--run", run, *TOGETHER, "--target-modules", "nothing", "--json", AT_THE_START=abort)
    assert (done.code, error_of(done)["exit_code"]) == (2, 2)
    assert "killed" not in done.err


def test_before_they_meet_the_main_process_speaks_for_what_is_the_same_for_all(monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    usage, own = UserError("more processes than GPUs"), WorkFailed("its GPU does not answer")
    assert processes.settle(usage) is None
    assert processes.settle(own) is own
    monkeypatch.setenv("RANK", "0")
    assert processes.settle(usage) is usage


def test_wrong_usage_under_accelerate_is_said_once(tmp_path):
    """Also where the main process is the slower one: torchrun ends all when the first has failed."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(6)\n")
    done = accelerate("train", "--no-such-option", PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    assert done.code != 0
    assert done.err.count("--no-such-option") == 1 or done.err.count("No such option") == 1


def test_other_commands_under_accelerate_run_once(prepared_once):
    done = accelerate("status", "--run", prepared_once / "prepared", "--json")
    assert done.code == 0, done.err
    assert done.json["run"].endswith("prepared")


@pytest.mark.parametrize("what, message", [
    ("raise ValueError('planted')", "unexpected ValueError: planted"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "another process of this training ended without a word"),
])
def test_what_ends_one_process_ends_all_with_one_message(run, forks, what, message):
    done = forks.run("train", "--run", run, *TOGETHER, "--json", **happens(what))
    assert error_of(done)["message"] == message
    assert done.code == 1
    assert not list(run.glob("*_lora_adapter"))


def test_the_main_process_gone_is_said_by_the_launcher(run, forks):
    done = forks.run("train", "--run", run, *TOGETHER, "--json", **happens("os.kill(os.getpid(), signal.SIGKILL)", rank=0))
    assert "main process of the training was killed" in error_of(done)["message"]
    assert done.code == 1


@pytest.mark.parametrize("who", ["os.getpid()", "os.getppid()"], ids=["one", "all"])
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_signal_stops_all_after_the_same_step_and_training_goes_on_from_there(run, together, forks, who):
    stopped = forks.run("train", "--run", run, *TOGETHER, "--json",
                        **happens(f"os.kill({who}, signal.{signal.SIGTERM.name}); time.sleep(1)"))
    assert error_of(stopped)["exit_code"] == 130
    assert f"stopped at step 4 of {STEPS}" in stopped.err
    assert (run / "training_checkpoints" / "checkpoint-4" / "complete.json").exists()
    if who == "os.getpid()":  # once is enough
        done = forks.run("train", "--run", run, *TOGETHER, "--json")
        assert done.json["summary"]["resumed_from_step"] == 4
        whole = adapter(together[0])
        assert all(torch.equal(tensor, whole[name]) for name, tensor in adapter(run).items())


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_command_that_is_killed_takes_its_processes_along(run, forks):
    """They save what they learned first, as on SIGTERM, and leave no lock; the same command goes on from there."""
    killed = forks.run("train", "--run", run, *TOGETHER, **happens("os.kill(os.getppid(), signal.SIGKILL); time.sleep(2)"))
    assert killed.code == -signal.SIGKILL
    checkpoints = [p.parent.name for p in run.glob("training_checkpoints/*/complete.json")]
    assert "checkpoint-4" in checkpoints and f"checkpoint-{STEPS}" not in checkpoints
    assert not (run / ".lock-owner.json").exists()
    assert not list(run.glob("*_lora_adapter"))


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_the_second_ctrl_c_ends_a_process_that_does_not_hear_the_first(monkeypatch):
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(flush=True); time.sleep(300)"
    processes = [subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) for _ in range(2)]
    assert all(process.stdout.readline() for process in processes)
    monkeypatch.setattr(launch, "AT_ONCE", 0.2)
    workers = launch._Workers(processes)
    with workers.signals_passed_on():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert workers.wait() == [-signal.SIGKILL] * 2


# ---- what cannot be --------------------------------------------------------------------------------------------------

def test_fsdp_needs_several_processes(prepared_once, cli):
    done = cli("train", "--run", prepared_once / "prepared", "--strategy", "fsdp")
    assert done.code == 2
    assert "--num-processes" in done.err


@pytest.mark.parametrize("setting", ["qlora", "dora", "compile"])
def test_fsdp_refuses_what_needs_the_whole_weights(setting):
    """With the other settings, before any data is prepared or planned for."""
    with pytest.raises(UserError) as e:
        TrainConfig(num_processes=2, strategy="fsdp", **{setting: True})
    assert f"fsdp does not go together with {setting}" in e.value.problems[0]


def test_more_processes_than_gpus(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="there are 2 GPUs"):
        processes.join(print)


def test_gpus_that_cannot_work_together(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)  # as in PyTorch for Windows
    with pytest.raises(UserError, match="this PyTorch has no NCCL") as raised:
        processes.join(print)
    assert "WSL" in raised.value.hint


def test_a_second_gpu_for_which_pytorch_has_no_code(monkeypatch):
    """The first one serves; the process that gets the other says so before anything is loaded."""
    current = []
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": current.append,
                        "get_device_capability": lambda: (6, 1) if current == [1] else (9, 0),
                        "get_device_name": lambda: "GTX 1080", "get_arch_list": lambda: ["sm_75", "sm_90"]}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *args, **kwargs: pytest.fail("it met the others"))
    with pytest.raises(UserError, match="the GTX 1080 is not used") as raised:
        processes.join(print)
    assert "CUDA_VISIBLE_DEVICES" in raised.value.hint


def test_one_process_takes_one_gpu_of_several_and_says_so(prepared_once, run, cli, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 0) or 2))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    done = cli("train", "--run", run, *SETTINGS, "--max-steps", 1)
    assert done.code == 0, done.err
    assert "one GPU of 2" in done.err and "--num-processes 2" in done.err


def test_more_processes_than_the_machine_can_use_are_not_started(monkeypatch):
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("one was started"))
    with pytest.raises(UserError, match="--num-processes 4000 is more than this machine has processors for") as error:
        launch.launch(4000, ["train"])
    assert "use at most" in error.value.hint


def test_each_process_gets_its_part_of_the_processors(monkeypatch):
    """What the launcher settled for itself is not for each of them; what the user asked for is."""
    monkeypatch.setattr(launch, "cores", lambda: 6)
    monkeypatch.setattr(launch, "settled", {"OMP_NUM_THREADS": "6", "GOMP_SPINCOUNT": "1000"})
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert launch._environment(1, 3, 5)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setattr(launch, "settled", {})
    assert launch._environment(1, 3, 5)["OMP_NUM_THREADS"] == "6"
