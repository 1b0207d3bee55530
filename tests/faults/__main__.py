"""Kills, Ctrl-C, full disks, damage and bad input, many of each, on real commands: ``make faults``.

Every try has a number and draws from a generator of its own, so that it can be repeated alone::

    PYTHONPATH=tests python -m faults --seed 1 --only kill --try 7
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from faults import damage, disk, inputs, stops
from faults.lab import Lab, load_libraries

PARTS = ("kill", "ctrl-c", "disk", "damage", "input")
Result = tuple[str, "str | None"]


def tries(part: str, lab: Lab, seed: int, numbers: range | None, times: int) -> Iterator[tuple[int, Result]]:
    """(number, (what was done, what was wrong with the answer or None)) of each try of a part."""
    if part == "input":
        inputs.write(lab)
        known = inputs.cases()
        for number in numbers or range(len(known)):
            yield number, known[number](lab)
        return
    mounted = part == "disk" and disk.can_mount(lab)
    if part == "disk":
        print("  disk: on a tmpfs" if mounted else "  disk: no tmpfs can be mounted here, so RLIMIT_FSIZE limits files")
    if part == "ctrl-c":
        stops.measure_programs(lab)
    if part == "damage":
        damage.build(lab)
    for number in numbers or range(times):
        own = random.Random(f"{seed}:{part}:{number}")
        if part == "damage":
            yield from ((number, result) for result in damage.damage(lab, own, number))
        elif part == "disk":
            yield number, disk.full(lab, own, number, mounted)
        else:
            yield number, (stops.kill if part == "kill" else stops.interrupt)(lab, own, number)


def main() -> int:
    """Try, print the table; 1 if anything was not as expected."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=24, help="tries of each part; of damage so many files")
    parser.add_argument("--seed", type=int, default=None, help="by default another one each time; it is printed")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; can be repeated")
    parser.add_argument("--try", dest="number", type=int, help="this try alone")
    parser.add_argument("--keep", action="store_true", help="leave the working directory")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(100_000) if options.seed is None else options.seed
    work = Path(tempfile.mkdtemp(prefix="gemma-tune-faults-"))
    print(f"seed {seed}, in {work}", flush=True)
    load_libraries()
    lab = Lab(work)
    lab.build()
    numbers = None if options.number is None else range(options.number, options.number + 1)
    table, others = [], []
    for part in options.only or PARTS:
        began, count, wrong = time.monotonic(), 0, 0
        for number, (what, problem) in tries(part, lab, seed, numbers, options.times):
            count += 1
            if problem:
                wrong += 1
                others.append((part, number, what, problem))
                print(f"  {part} {number}: {what}\n    {problem}", flush=True)
        table.append((part, count, count - wrong, wrong, time.monotonic() - began))
        print(f"{part}: {count - wrong} of {count} as expected", flush=True)
    print(f"\n{'part':10}{'tries':>8}{'as expected':>14}{'others':>8}{'seconds':>10}")
    for part, count, good, wrong, seconds in table:
        print(f"{part:10}{count:8}{good:14}{wrong:8}{seconds:10.0f}")
    for part, number, what, problem in others:
        print(f"\n{part} {number}: {what}\n  {problem}\n  again: PYTHONPATH=tests {sys.executable} -m faults "
              f"--seed {seed} --only {part} --try {number}")
    if options.keep:
        print(f"\nleft in {work}")
    else:
        shutil.rmtree(work, ignore_errors=True)
    return 1 if others else 0


if __name__ == "__main__":
    sys.exit(main())
