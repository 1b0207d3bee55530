"""Commands that are killed, and commands that get Ctrl-C: the same command goes on, to the same artifacts."""

from __future__ import annotations

import os
import random
import signal
import time

from faults.lab import TRIED, Lab, on_rename

QUICKLY = 2.0  # seconds in which a command ends after Ctrl-C


def kill(lab: Lab, random_: random.Random, number: int) -> tuple[str, str | None]:
    """One SIGKILL: at a random moment, or right before or after a rename, where an artifact takes another's place."""
    stage = TRIED[number % len(TRIED)]
    state = lab.a_state(stage, random_)
    lab.restore(state)
    args = lab.arguments(stage)
    if random_.random() < 0.5 and lab.renames[stage]:
        at, before = random_.randint(1, lab.renames[stage]), random_.random() < 0.5
        what = f"{'before' if before else 'after'} rename {at} of {lab.renames[stage]}"

        def first() -> None:
            on_rename(lambda n, early: (n, early) == (at, before) and os.kill(os.getpid(), signal.SIGKILL))

        ended = lab.start(args, first).wait()
    else:
        moment = random_.uniform(0, 1.05 * lab.seconds[stage])
        what = f"after {moment:.2f} s"
        process = lab.start(args)
        process.ended_within(moment)
        os.killpg(process.pid, signal.SIGKILL)
        ended = process.wait()
    what = f"{stage} on {state} killed {what}"
    if ended.code not in (0, -signal.SIGKILL):
        return what, ended.fault(0)
    found = lab.states_now("--verify") if lab.run.exists() and (lab.run / "manifest.json").exists() else {}
    if found is None:
        return what, "`status --verify` has no answer"
    if damaged := {name: text for name, text in found.items() if text.startswith("damaged")}:
        later = lab.go_on(stage)
        return what, f"`status --verify` says {damaged}; {later or 'the same command mends it'}"
    return what, lab.go_on(stage)


def interrupt(lab: Lab, random_: random.Random, number: int) -> tuple[str, str | None]:
    """One Ctrl-C, which the whole process group of a terminal gets."""
    stage = TRIED[number % len(TRIED)]
    state = lab.a_state(stage, random_)
    lab.restore(state)
    # A program with its start, where imports take most of the time, and a forked one, for what comes after them.
    begin, longest = ((lab.start_program, lab.seconds[f"{stage}, started"]) if number // len(TRIED) % 2 == 0 else
                      (lab.start, lab.seconds[stage]))
    moment = random_.uniform(0.1, longest)
    what = f"{stage} on {state} stopped by Ctrl-C after {moment:.2f} s of {longest:.2f}"
    process = begin(lab.arguments(stage))
    if not process.ended_within(moment):
        os.killpg(process.pid, signal.SIGINT)
    began = time.monotonic()
    ended = process.wait()
    took = time.monotonic() - began
    # By the signal itself, which shells call 130 as well, where it came when the work was done and Python left.
    problem = ended.fault(0, 130, -signal.SIGINT)
    if not problem and took > QUICKLY:
        problem = f"it ended only {took:.1f} s after Ctrl-C"
    if not problem and _group_lives(process.pid):
        problem = "a child of it still runs"
    return what, problem or lab.go_on(stage)


def measure_programs(lab: Lab) -> None:
    """How long each command takes with its start."""
    for stage in TRIED:
        lab.restore(f"before-{stage}")
        lab.seconds[f"{stage}, started"] = lab.start_program(lab.arguments(stage)).wait().seconds


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
