"""``--num-processes N``: the same command N times on this machine, as one training.

The processes get what ``accelerate launch`` and ``torchrun`` give theirs, and accelerate finds its place by it.
``accelerate launch`` itself starts one process where there is no GPU, reads a configuration of its own, kills a
training that needs more than half a minute to save after Ctrl-C, and turns every exit code into 1 with a traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from gemma_tune.base.errors import INTERRUPTED, UserError, WorkFailed
from gemma_tune.base.machine import cores, ending_signals, settled
from gemma_tune.train.processes import GRACE, LAUNCHER

_MOST_GPUS = 16  # of one machine; a process more than there are GPUs is refused by what knows them
AT_ONCE = 1.5  # seconds that all get after the second Ctrl-C, which one that waits for another's numbers does not hear


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``gemma-tune`` with ``arguments`` as ``count`` processes and wait for them.

    Ctrl-C, SIGTERM and SIGHUP reach each, once; the second one ends them at once.

    Returns:
        The main process's exit code, or another's if only that failed.

    Raises:
        UserError: more processes than this machine can have any use for; none is started.
        WorkFailed: the main process was killed, and could not say anything.
    """
    if count > (most := max(cores(), _MOST_GPUS)):
        raise UserError(f"--num-processes {count} is more than this machine has processors for ({cores()})",
                        f"use at most {most}; the processes of several machines are started by accelerate launch or "
                        "torchrun")
    workers = _Workers([subprocess.Popen(
        [sys.executable, "-m", "gemma_tune", *arguments], env=_environment(rank, count, port),
        stdin=None if rank == 0 else subprocess.DEVNULL,
        # A process group of its own: the terminal's Ctrl-C would otherwise reach the processes a second time.
        process_group=0 if os.name == "posix" else None)
        for port in [_free_port()] for rank in range(count)])
    with workers.signals_passed_on():
        codes = workers.wait()
    if codes[0] < 0 and not workers.signals:
        raise WorkFailed(f"the main process of the training was killed (signal {-codes[0]})",
                         "perhaps memory ran out: --micro-batch 1 needs less; the same command goes on")
    code = next((c for c in codes if c), 0)
    return INTERRUPTED if code < 0 else code


class _Workers:
    def __init__(self, processes: list[subprocess.Popen]):
        self.processes, self.signals = processes, 0

    @contextlib.contextmanager
    def signals_passed_on(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # Python gives signals to the main thread only
            yield
            return
        earlier = {number: signal.signal(number, self._pass_on) for number in ending_signals()}
        try:
            yield
        finally:
            for number, handler in earlier.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: object) -> None:
        self.signals += 1
        for process in self.processes if os.name == "posix" else ():  # Windows' console has told them itself
            with contextlib.suppress(OSError):
                process.send_signal(number)

    def wait(self) -> list[int]:
        """Exit codes by rank; whoever goes on long after the main process, or after one that failed, is killed."""
        deadline, hurried = None, False
        while running := [p for p in self.processes if p.poll() is None]:
            codes = [p.returncode for p in self.processes]
            if deadline is None and (codes[0] is not None or any(codes)):
                deadline = time.monotonic() + GRACE
            if self.signals > 1 and not hurried:
                hurried, deadline = True, time.monotonic() + AT_ONCE
            if deadline is not None and time.monotonic() > deadline:
                for process in running:
                    process.kill()
            time.sleep(0.05)
        return [p.returncode for p in self.processes]


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, LAUNCHER: os.getpid()}
    # PyTorch would give each process all cores, and the operating system's remarks on sockets are not for people.
    defaults = {"OMP_NUM_THREADS": max(1, cores() // count), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform == "linux":  # nothing from outside this machine has to do with it
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    asked = {name: value for name, value in os.environ.items() if name not in settled}
    return {n: str(v) for n, v in defaults.items()} | asked | {n: str(v) for n, v in there.items()}


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
