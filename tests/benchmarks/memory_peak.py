"""What a training really takes in memory, beside what ``train --dry-run`` says before.

Each case is a training of two steps in a process of its own, on rows of one length; its peak is the largest resident
set that the system recorded. Run it from the repository:
``python tests/benchmarks/memory_peak.py --model demo 4x200 1x800 1x800c`` (rows x tokens, ``c`` recomputes
activations); ``--full`` trains all weights. An error of +10 % means that the estimate is that much too high. Linux and macOS.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = ["margin", "cash", "debt", "growth", "price", "share", "yield", "cost"]


def write_rows(path: Path, rows: int, words: int) -> None:
    """Conversations with answers of so many words; no two are equal."""
    with open(path, "w", encoding="utf-8") as f:
        for n in range(2 * rows):
            answer = " ".join(WORDS[(n + k) % len(WORDS)] for k in range(words))
            f.write(json.dumps({"messages": [{"role": "user", "content": f"Number {n}?"},
                                             {"role": "assistant", "content": answer}]}) + "\n")


def run(*arguments: object) -> tuple[str, int]:
    """Standard output of a gemma-tune command, and the peak of its resident set in bytes."""
    process = subprocess.Popen([sys.executable, "-m", "gemma_tune", *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(err)
    return out, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--full", action="store_true", help="all weights instead of an adapter")
    parser.add_argument("cases", nargs="+")
    options = parser.parse_args()
    for case in options.cases:
        rows, words = map(int, case.rstrip("c").split("x"))
        with tempfile.TemporaryDirectory() as folder:
            data, place = Path(folder) / "rows.jsonl", Path(folder) / "run"
            write_rows(data, rows, words)
            run("prepare", data, "--model", options.model, "--run", place, "--valid", "0", "--max-length", 4 * words)
            flags = ["train", "--run", place, "--batch-size", rows, "--micro-batch", rows, "--dtype", options.dtype,
                     "--max-steps", 2, "--json", "--quiet", *["--full"] * options.full,
                     "--activation-checkpointing" if case.endswith("c") else "--no-activation-checkpointing"]
            planned = json.loads(run(*flags, "--dry-run")[0])
            _, peak = run(*flags)
        need = planned["memory"]["total"]
        print(f"{case:8} longest {planned['longest']:5}  estimate {need / 1e9:6.2f} GB  measured {peak / 1e9:6.2f} GB  "
              f"error {need / peak - 1:+.0%}   {planned['memory']}", flush=True)


if __name__ == "__main__":
    main()
