"""Several processes as one training: which one this is, how they agree, and how they end together.

``accelerate launch``, ``torchrun`` and ``--num-processes`` start the same command several times and say in the
environment which process is which. The main one, rank 0, does what a single process does: it prints, decides, holds the
run's lock and writes. The others wait for its decision and compute their share. Whatever ends one of them ends all,
with one message.

Waiting for a decision and passing on an error go through the key-value store by which the processes found each other:
unlike a collective operation it has no time limit, and it still works when a process has left.

No heavy import: ``gemma-tune --help`` loads this module.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.models.placement import best_device, unserved_gpu

if TYPE_CHECKING:
    from gemma_tune.config.stages import TrainConfig

# How long a process waits in a collective operation for one that is busy with something else, such as a checkpoint.
PATIENCE = dt.timedelta(minutes=30)
GRACE = 30.0  # seconds that the others get to end after one has
LAUNCHER = "GEMMA_TUNE_LAUNCHER"  # holds the process id of the command that started this one as one of several
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
             "MASTER_PORT", LAUNCHER)

T = TypeVar("T")
_store: Any = None  # torch.distributed.Store while this process takes part in a training of several
_settled = threading.Event()  # what this process shows in the end is known


@dataclass(frozen=True)
class Place:
    """Which of how many processes this is, on all machines and on this one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def place() -> Place:
    """This process's place, as ``accelerate launch``, ``torchrun`` and :mod:`gemma_tune.train.launch` tell it."""
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return Place()
    count = int(os.environ["WORLD_SIZE"])
    return Place(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", 0)),
                 int(os.environ.get("LOCAL_WORLD_SIZE", count)))


def is_main() -> bool:
    """Whether this process prints, decides and writes."""
    return place().rank == 0


def forget() -> None:
    """Be an ordinary single process from now on, whoever started it, with gemma-tune's own settings.

    ``accelerate launch`` also passes on its configuration file (mixed precision, FSDP), which would change what is
    computed.
    """
    forget_accelerate()
    for name in [n for n in os.environ if n in _LAUNCHER or n.startswith("TORCHELASTIC_")]:
        del os.environ[name]


def forget_accelerate() -> None:
    """Drop what accelerate's own configuration says: the type, the strategy and the device are options here."""
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def join(show: Callable[[UserError], None]) -> None:
    """Meet the other processes; each takes the GPU with its local number, or a part of the CPU.

    Args:
        show: shows another process's problem if this one hangs because of it.

    Raises:
        UserError: more processes than GPUs, GPUs that cannot work together here, or one that PyTorch has no code for.
    """
    global _store
    import torch
    from torch import distributed

    if LAUNCHER in os.environ:
        threading.Thread(target=_end_with, args=(int(os.environ[LAUNCHER]),), daemon=True).start()
    here, on_gpus = place(), best_device() == "cuda"
    if on_gpus:
        if here.local_count > torch.cuda.device_count():
            raise UserError(f"{here.local_count} processes were asked for, and there are {torch.cuda.device_count()} "
                            "GPUs; each process needs its own", f"use --num-processes {torch.cuda.device_count()}")
        if not distributed.is_nccl_available():
            raise UserError("this PyTorch has no NCCL, by which several GPUs work together; on Windows none has",
                            "leave --num-processes out, which trains on one GPU, or train under WSL or Linux")
        torch.cuda.set_device(here.local_rank)
        if problem := unserved_gpu():
            raise UserError(problem, "train with the other GPUs: name their numbers in CUDA_VISIBLE_DEVICES, and give "
                                     "--num-processes how many they are")
    elif torch.backends.mps.is_available():
        raise UserError("Apple's GPU is a single one, and several processes cannot share it",
                        "leave --num-processes out")
    forget_accelerate()
    # gloo beside NCCL: small agreements stay on the CPU and do not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    store, rank, count = next(distributed.rendezvous("env://", timeout=PATIENCE))
    distributed.init_process_group(backend, store=distributed.PrefixStore("group", store), rank=rank,
                                   world_size=count, timeout=PATIENCE)
    _store = distributed.PrefixStore("gemma-tune", store)
    if rank == 0:
        threading.Thread(target=_watch, args=(show,), daemon=True).start()


def refuse_another_number(config: TrainConfig) -> None:
    """Whether the training is one of as many processes as there are.

    Raises:
        UserError: it is not, or a model is to be divided among one.
    """
    here = place().count
    if config.num_processes != here:
        raise UserError(f"{config.num_processes} processes were asked for, and this is one of {here}",
                        "start them: gemma-tune train --num-processes N, or accelerate launch -m gemma_tune train")
    if config.strategy == "fsdp" and here == 1:
        raise UserError("--strategy fsdp divides the model among several processes, and this is one",
                        "add --num-processes N, or leave --strategy out")


def joined() -> bool:
    """Whether this process takes part in a training of several."""
    return _store is not None


# ---- agreement -------------------------------------------------------------------------------------------------------

def begin() -> None:
    """On the main process: there is work, which the others may get ready for."""
    if joined():
        _store.set("begun", "")


def begun() -> bool:
    """On another process: whether there is work, as soon as the main one knows."""
    while not (there := _store.check(["begun"])) and not _store.check(["verdict"]):
        time.sleep(0.05)
    return there


def share(value: Any) -> None:
    """On the main process: let the others begin, with ``value``, which must be picklable."""
    if joined():
        _store.set("verdict", "work")
        _broadcast(value)


def received() -> Any:
    """On another process: what the main one shared, or None if it ends without work for the others."""
    while not _store.check(["verdict"]):
        time.sleep(0.1)
    return _broadcast(None) if _store.get("verdict") == b"work" else None


def _broadcast(value: Any) -> Any:
    import torch

    content = [value]
    torch.distributed.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]


def gathered(value: T) -> list[T]:
    """The value of every process, by rank; one for a single process."""
    if not joined():
        return [value]
    import torch

    values: list[Any] = [None] * place().count
    torch.distributed.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether it is true in any process."""
    return bool(_reduced(int(flag), "MAX"))


def least(value: int) -> int:
    """The smallest of all processes' values."""
    return _reduced(value, "MIN")


def most(value: int) -> int:
    """The largest of all processes' values."""
    return _reduced(value, "MAX")


def _reduced(value: int, how: str) -> int:
    if not joined():
        return value
    import torch

    tensor = torch.tensor(value, dtype=torch.int64)
    torch.distributed.all_reduce(tensor, getattr(torch.distributed.ReduceOp, how))
    return int(tensor)


def same_everywhere(tensors: Sequence[Any]) -> None:
    """Give all processes the main one's values of tensors of one type and device."""
    if not joined():
        return
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    torch.distributed.broadcast(flat, src=0)
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def wait_for_all() -> None:
    """Go on when every process has come here."""
    most(0)


# ---- the end ---------------------------------------------------------------------------------------------------------

def leave() -> None:
    """Part from the others after work that went well, or that the main process found not necessary."""
    global _store
    if not joined():
        return
    import torch

    here = place()
    if here.rank == 0 and not _store.check(["verdict"]):
        _store.set("verdict", "end")
    torch.distributed.destroy_process_group()
    _store.set(f"left {here.rank}", "")
    if here.rank == 0:  # the store ends with this process, so it goes last
        # Longer than a moment: where nothing is left to do, the others may still be importing.
        _until(lambda: _store.check([f"left {rank}" for rank in range(here.count)]), GRACE)
    _store = None


def settle(problem: UserError) -> UserError | None:
    """Tell the other processes that this one fails.

    Returns:
        The problem to show here: another process's if this one only lost its connection to it; None where another
        process shows it.
    """
    if not joined():  # wrong usage is the same everywhere; what only this one lacks is not
        return problem if is_main() or isinstance(problem, WorkFailed) else None
    try:
        return _settle_main(problem) if is_main() else _settle_other(problem)
    except RuntimeError:  # the store went away with the main process, which had its say or was killed
        return problem if is_main() else None


def let_the_main_one_speak() -> None:
    """Before this process fails: torchrun ends all of them when the first has failed, which must not be one that is
    silent. It ends this one, too, as soon as the main one has said what is wrong."""
    if not is_main() and not joined() and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(GRACE)


def _settle_main(problem: UserError) -> UserError:
    """Ending is enough to tell the others."""
    if _lost(problem):
        problem = _of_another() if _until(lambda: _store.check(["failed"]), 3) else WorkFailed(
            "another process of this training ended without a word",
            "perhaps memory ran out and the system killed it: --micro-batch 1 needs less")
    _settled.set()
    return problem


def _settle_other(problem: UserError) -> UserError | None:
    if _lost(problem):
        return None
    _store.set("failed", json.dumps({"message": problem.message, "hint": problem.hint, "exit_code": problem.exit_code,
                                     "problems": list(problem.problems)}))
    # Not before the main one knows: it may learn of this process's end first, and of its reason never.
    return None if _until(lambda: _store.check(["told"]), 15) else problem


def _of_another() -> UserError:
    values = json.loads(_store.get("failed"))
    problem = WorkFailed(values["message"], values["hint"], values["problems"])
    problem.exit_code = values["exit_code"]
    return problem


def _watch(show: Callable[[UserError], None]) -> None:
    """On the main process, in a thread: end it with another's problem, even if a GPU waits for the other forever."""
    store = _store
    with contextlib.suppress(RuntimeError):  # the store is gone: the launcher has ended it
        while joined() and not store.check(["failed"]):
            time.sleep(0.5)
        if joined():
            store.set("told", "")
            if not _settled.wait(10):
                show(_of_another())
                os._exit(_of_another().exit_code)


def _end_with(launcher: int) -> None:
    """In a thread: when the command that started this process is killed, stop as on SIGTERM: with what was learned."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(launcher)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def _lost(problem: UserError) -> bool:
    """Whether a problem only says that another process is gone."""
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe")
    cause = problem.__cause__
    return isinstance(cause, RuntimeError) and any(sign in str(cause) for sign in signs)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait until it holds, no longer than that; whether it does."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met
