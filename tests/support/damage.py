"""Damage of files, the same each time: edits by somebody's hand, flipped bits, files that were cut short."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError

DEEP = b'{"a":' * 200_000 + b"1" + b"}" * 200_000
_VALUES = (None, True, 0, -1, 5, 1.5, "", "x", [], {}, [1], {"a": 1}, 10**400, float("nan"), 1e308, "../../x", "/etc/x",
           [[]], "\ud800", "\0")


def _places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    if at:
        yield at
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value[:3])
        for key, item in inner:
            yield from _places(item, (*at, key))


def edited(data: bytes, chance: random.Random) -> bytes:
    """JSON with a value, or two, that is gone or another one."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2))):
        *way, last = chance.choice(list(_places(value)))
        holder = value
        for key in way:
            holder = holder[key]
        if chance.random() < 0.25:
            del holder[last]
        else:
            holder[last] = copy.deepcopy(chance.choice(_VALUES))
    return json.dumps(value).encode()


def lost(data: bytes, chance: random.Random) -> bytes:
    """A manifest in which something that a stage recorded is gone, or null."""
    value = json.loads(data)
    record = chance.choice([*value["stages"].values()])
    part = record[chance.choice(("config", "summary", "summary", "inputs", "outputs"))]
    key = chance.choice([*part])
    if chance.random() < 0.5:
        del part[key]
    elif isinstance(part[key], dict) and part[key]:
        part[key][chance.choice([*part[key]])] = None
    else:
        part[key] = None
    return json.dumps(value).encode()


def flipped(data: bytes, chance: random.Random) -> bytes:
    """Bytes of which up to three bits are others, or that end too early."""
    if chance.random() < 0.2:
        return data[:chance.randrange(len(data))]
    damaged = bytearray(data)
    for _ in range(chance.choice((1, 1, 3))):
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def in_header(damage: Callable[[bytes, random.Random], bytes]) -> Callable[[bytes, random.Random], bytes]:
    """The same damage to the header of a safetensors file."""
    def damaged(data: bytes, chance: random.Random) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = damage(data[8:end], chance)
        length = len(header).to_bytes(8, "little") if chance.random() < 0.9 else data[:8]
        return length + header + data[end:]

    return damaged


def refused(path: Path, damage: Callable[[bytes, random.Random], bytes], read: Callable[[], Any], cases: int) -> int:
    """Damage a file in so many ways; each is read or refused with a message and a hint, whoever reads it.

    Returns:
        How many were refused; anything else that is raised ends the test, and the seed is its number.
    """
    good, count = path.read_bytes(), 0
    for seed in range(cases):
        path.write_bytes(damage(good, random.Random(seed)))
        try:
            read()
        except UserError as e:
            assert e.exit_code == 2 and e.message and e.hint, (seed, e)
            count += 1
        except Exception as e:
            raise AssertionError(f"case {seed} of {path.name}") from e
    path.write_bytes(good)
    read()
    return count


def flip_bit(path: Path, at: int = -1, bit: int = 0) -> None:
    """Change one bit of a file (``at``: the byte's index), and leave its size and time stamp as they were."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
