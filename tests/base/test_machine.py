"""What a process may use, and how it imports large libraries."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.base import machine
from gemma_tune.base.machine import cores, is_out_of_memory, keeping_garbage, settle_threads


def imported(name: str, tmp_path, monkeypatch) -> None:
    (tmp_path / f"{name}.py").write_text("import gc\nlooked_for = gc.isenabled()\nkept = [[n] for n in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__(name)


def test_garbage_is_not_looked_for_during_an_import_and_not_among_it_afterwards(tmp_path, monkeypatch):
    before = gc.get_freeze_count()
    with keeping_garbage():
        imported("a_large_library", tmp_path, monkeypatch)
    assert sys.modules["a_large_library"].looked_for is False
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + 1000


def test_where_everything_is_imported_already_garbage_stays_garbage():
    import json  # noqa: F401

    before = gc.get_freeze_count()
    with keeping_garbage():
        import json  # noqa: F401, F811
    assert gc.get_freeze_count() <= before  # fewer where something that was frozen earlier has gone meanwhile


def test_a_failed_import_leaves_garbage_collection_on():
    with pytest.raises(ImportError), keeping_garbage():
        import no_such_library  # noqa: F401
    assert gc.isenabled()


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with keeping_garbage():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def control_group(root: Path, group: str, files: dict[str, str]) -> None:
    (root / group).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / group / name).write_text(text)


@pytest.mark.parametrize(("listed", "groups", "quota"), [
    ("0::/", {".": {"cpu.max": "150000 100000\n"}}, 1.5),
    ("0::/", {".": {"cpu.max": "max 100000\n"}}, None),
    ("0::/user/job", {"user": {"cpu.max": "200000 100000\n"}, "user/job": {"cpu.max": "max 100000\n"}}, 2.0),
    ("0::/outside/of/it", {".": {"cpu.max": "300000 100000\n"}}, 3.0),
    ("4:memory:/x\n3:cpu,cpuacct:/x", {"cpu,cpuacct/x": {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}}, 0.5),
    ("3:cpu,cpuacct:/x", {"cpu/x": {"cpu.cfs_quota_us": "50000\n", "cpu.cfs_period_us": "100000\n"}}, 0.5),
    ("broken\n0::/", {".": {"cpu.max": "150000 100000\n"}}, 1.5),
    ("3:cpu,cpuacct:/x", {"cpu,cpuacct/x": {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}}, None),
    ("2:memory:/x", {".": {"cpu.max": "100000 100000\n"}}, None),
])
def test_the_quota_of_the_control_groups(tmp_path, listed, groups, quota):
    (tmp_path / "listed").write_text(listed + "\n")
    for group, files in groups.items():
        control_group(tmp_path / "root", group, files)
    assert machine._quota(tmp_path / "listed", tmp_path / "root") == quota
    assert machine._quota(tmp_path / "none", tmp_path / "root") is None


@pytest.fixture
def settled(monkeypatch) -> dict[str, str]:
    found = {}
    monkeypatch.setattr(machine, "settled", found)
    return found


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (0.5, 1), (3.9, 3), (64.0, 8)])
def test_cores_are_those_there_is_time_for(monkeypatch, settled, quota, expected):
    monkeypatch.setattr(machine, "_allowed", lambda: 8)
    monkeypatch.setattr(machine, "_quota", lambda: quota)
    assert cores() == expected
    environment = {}
    settle_threads(environment)
    assert environment.get("OMP_NUM_THREADS") == (str(expected) if expected < 8 else None)
    assert environment["GOMP_SPINCOUNT"] == "1000" and settled == environment


def test_what_a_user_has_set_stays(monkeypatch, settled):
    monkeypatch.setattr(machine, "_quota", lambda: 1.0)
    monkeypatch.setattr(machine, "_allowed", lambda: 4)
    for asked in ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "7"}, {"GOMP_SPINCOUNT": "0", "OMP_NUM_THREADS": "7"}):
        environment = dict(asked)
        settle_threads(environment)
        assert environment == asked and not settled


def test_threads_are_settled_before_torch_is_there():
    code = ("import os, sys, gemma_tune.__main__ as m; import gemma_tune.base.machine as b; before = b.settle_threads\n"
            "def look(): before(); print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)\n"
            "b.settle_threads = look; sys.argv = ['gemma-tune', '--version']; m.main()")
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1000 False")


def test_a_tokenizer_is_loaded_without_looking_for_garbage(talkative, monkeypatch):
    from transformers import AutoTokenizer

    from gemma_tune.encoding.tokenizer import load_tokenizer

    load, looked_for = AutoTokenizer.from_pretrained, []
    monkeypatch.setattr(AutoTokenizer, "from_pretrained",
                        lambda *args, **more: looked_for.append(gc.isenabled()) or load(*args, **more))
    assert load_tokenizer(talkative).vocab_size
    assert looked_for == [False] and gc.isenabled()


@pytest.mark.parametrize(("message", "ran_out"), [
    ("MPS backend out of memory (MPS allocated: 8.00 GiB, other allocations: 1.00 GiB, max allowed: 9.07 GiB)", True),
    ("Invalid buffer size: 19.45 GiB", True), ("Placeholder storage has not been allocated on MPS device!", False)])
def test_of_what_apples_gpu_says_lack_of_memory_is_known(message, ran_out):
    assert is_out_of_memory(RuntimeError(message)) is ran_out
