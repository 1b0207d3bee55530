"""Damaged files: every artifact, every file of the model and of the cache, and then every command."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.lab import STAGES, Lab
from support.damage import flip_bit

# What the manifest has no digest of: what people work on, what only errors name, logs, and what is left of a training
# that has ended.
_UNCOUNTED = ("rejected.jsonl", "duplicates.jsonl", "report.json", "report.md", "report.html", "metrics.jsonl", "loss.png",
              "samples.jsonl", "origins.npy", "train.yaml")


def _flip(path: Path, random_: random.Random) -> str:
    at, bit = random_.randrange(path.stat().st_size), random_.randrange(8)
    flip_bit(path, at, bit)
    return f"bit {bit} of byte {at} flipped, time stamp kept"


def _flip_near_the_start(path: Path, random_: random.Random) -> str:
    at, bit = random_.randrange(min(400, path.stat().st_size)), random_.randrange(8)
    flip_bit(path, at, bit)
    return f"bit {bit} of byte {at} flipped, time stamp kept"


def _noise(path: Path, random_: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at = random_.randrange(len(data))
    part = random_.randbytes(min(64, len(data) - at))
    if part == data[at:at + len(part)]:
        return _flip(path, random_)
    data[at:at + len(part)] = part
    path.write_bytes(data)
    return f"{len(part)} bytes of noise from byte {at} on"


def _cut(path: Path, random_: random.Random) -> str:
    size = random_.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def _zero(path: Path, random_: random.Random) -> str:
    """What a file system leaves of a file whose blocks were not written before the power went."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return "all zeros, time stamp kept"


def _remove(path: Path, _: random.Random) -> str:
    path.unlink()
    return "removed"


_HARMS: tuple[Callable[[Path, random.Random], str], ...] = (
    _flip, _flip, _flip_near_the_start, _flip_near_the_start, _noise, _cut, _zero, _remove)


def build(lab: Lab) -> None:
    """A run on a GGUF, whose checkpoint lies in the cache."""
    gguf = lab.work / "small.gguf"
    shutil.copy(next((lab.states / "whole" / "ollama").glob("*.gguf")), gguf)
    lab.restore("nothing")
    for args in (("prepare", str(lab.data), "--model", str(gguf)), ("train", "--max-steps", "2", "--rank", "4")):
        if fault := lab.do(*args, "--run", str(lab.run)).fault(0):
            raise RuntimeError(fault)
    shutil.copytree(lab.run, lab.states / "from-gguf")
    shutil.copytree(lab.cache, lab.work / "whole-cache")


def damage(lab: Lab, random_: random.Random, number: int) -> Iterator[tuple[str, str | None]]:
    """One damaged file, and what each command makes of it."""
    kind = ("artifact", "artifact", "model", "cache", "artifact", "manifest")[number % 6]
    lab.restore("from-gguf" if kind == "cache" else "whole")
    spare = lab.work / "spare"
    shutil.rmtree(spare, ignore_errors=True)
    model = lab.cache if kind == "cache" else lab.model
    shutil.copytree(model, spare)
    try:
        path = random_.choice(list(_candidates(lab, kind)))
        harm = random_.choice(_HARMS if path.stat().st_size else (_remove,))
        where = path.relative_to(lab.work).as_posix()
        done = f"{where}: {harm(path, random_)}"
        yield f"{done}; status --verify", _unnoticed(lab, kind, path)
        for args in random_.sample(_commands(lab, kind), 4):
            ended = lab.do(*args, "--run", str(lab.run))
            yield f"{done}; {args[0]}", ended.fault(0, 1, 2)
    finally:
        shutil.rmtree(model)
        shutil.copytree(spare, model)


def _candidates(lab: Lab, kind: str) -> Iterator[Path]:
    if kind == "manifest":
        yield lab.run / "manifest.json"
    elif kind == "model":
        yield from lab.members()
    elif kind == "cache":
        yield from sorted(path for path in lab.cache.rglob("*") if path.is_file() and path.suffix != ".lock")
    else:
        yield from sorted(path for path in lab.run.rglob("*")
                          if path.is_file() and path.name != "manifest.json" and not path.name.startswith("."))


def _commands(lab: Lab, kind: str) -> list[list[str]]:
    """Some that read, and some that make everything anew."""
    stages = [lab.arguments(stage) for stage in STAGES] if kind != "cache" else []
    forced = [["train", "--force", "--max-steps", "1", "--rank", "4"], ["merge", "--force", "--no-check"],
              ["prepare", "--force"]]
    forced += [["export-ollama", "--force", "--no-verify", "--no-measure"]] if kind != "cache" else []
    ask = ["chat", "--prompt", "Hello", "--max-new-tokens", "3"]
    reading = [["status"], ask, [*ask, "--base"], [*ask, "--merged"], ["eval", "--questions", "2"],
               ["train", "--dry-run"], ["merge"]]
    return [_without_run(args) for args in stages] + forced + reading


def _without_run(args: list[str]) -> list[str]:
    at = args.index("--run")
    return args[:at] + args[at + 2:]


def _unnoticed(lab: Lab, kind: str, path: Path) -> str | None:
    """What is wrong with the answer of ``status --verify``: that all is well, where a file with a digest is not."""
    looked = lab.do("status", "--run", str(lab.run), "--json", "--verify")
    if fault := looked.fault(0, 1, 2):
        return fault
    parts = path.relative_to(lab.work).parts
    if kind == "manifest" or looked.code == 2 or path.name in _UNCOUNTED or "training_checkpoints" in parts or (
            "logs" in parts):
        return None
    if kind == "cache" and path.name == "complete.json":  # then it is made again
        return None
    try:
        answer = json.loads(looked.out)
        states = {stage: item["state"] for stage, item in answer["stages"].items()}
    except (ValueError, KeyError):
        return "`status --verify --json` gives no JSON"
    well = all(state in ("done", "missing") for state in states.values())
    return f"`status --verify` says {states}" if well and not answer["base_damage"] else None
