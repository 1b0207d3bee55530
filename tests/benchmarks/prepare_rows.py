"""How fast ``prepare`` is and how much memory it takes, beside ``datasets.load_dataset("json")`` and a tokenizer map.

Both read the same file, render the same chat template and tokenise with the same tokenizer, in as many processes as
there are cores. ``prepare`` also checks every row, finds duplicates, splits, labels and writes its report. Run it from
the repository: ``python tests/benchmarks/prepare_rows.py --rows 1000000``.

Memory is the sum over the process and its children of what each holds for itself plus its share of what they share
(PSS), sampled every 0.2 s; Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gemma_tune import samples

BASELINE = """
import sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
data, checkpoint, processes, cache = sys.argv[1:]
began = time.perf_counter()
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
tokenizer.chat_template = open(sys.argv[0].replace(".py", ".jinja")).read()
rows = load_dataset("json", data_files=data, split="train", cache_dir=cache)

def encode(batch):
    return tokenizer.apply_chat_template(batch["messages"], tokenize=True, return_dict=True)

encoded = rows.map(encode, batched=True, num_proc=int(processes), remove_columns=rows.column_names)
print(len(encoded), time.perf_counter() - began)
"""


def write_rows(path: Path, count: int, seed: int = 1) -> None:
    """Conversations of about 1 kB, put together from the sentences of the built-in example; no two are equal."""
    texts = [m["content"] for line in samples.training_path().read_text(encoding="utf-8").splitlines()
             for m in json.loads(line)["messages"]]
    sentences = sorted({s.strip() for text in texts for s in re.split(r"(?<=[.?!])\s+|(?<=[。？！])|\n", text) if s.strip()})
    chooser = random.Random(seed)
    with open(path, "w", encoding="utf-8") as f:
        for n in range(count):
            question = f"{n}. " + " ".join(chooser.choices(sentences, k=5))
            answer = " ".join(chooser.choices(sentences, k=11))
            f.write(json.dumps({"messages": [{"role": "user", "content": question},
                                             {"role": "assistant", "content": answer}]}, ensure_ascii=False) + "\n")


def measured(command: list[str], environment: dict[str, str], log: Path) -> tuple[float, float]:
    """Seconds, and the peak of memory in bytes, of a command and its children."""
    began, peak = time.perf_counter(), 0
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, sum(_pss(pid) for pid in _family(process.pid)))
            time.sleep(0.2)
    if process.returncode:
        sys.exit(f"{command[:4]} failed:\n{log.read_text(errors='replace')[-3000:]}")
    return time.perf_counter() - began, peak


def _family(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(p for child in children for p in _family(int(child)))]


def _pss(pid: int) -> int:
    try:
        return int(re.search(r"^Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)[1]) * 1024
    except (OSError, TypeError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--folder", help="where to work (default: a temporary directory, deleted at the end)")
    parser.add_argument("--only", choices=("prepare", "datasets"))
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    data, run = folder / f"rows-{options.rows}.jsonl", folder / "run"
    if not data.exists():
        write_rows(data, options.rows)
    size = data.stat().st_size
    print(f"{options.rows:,} rows, {size / 1e6:,.0f} MB, {os.cpu_count()} cores")

    from gemma_tune.base.listener import Listener
    from gemma_tune.encoding.tokenizer import load_format
    from gemma_tune.models.source import locate

    model = locate(options.model, None, Listener())  # makes the demo's checkpoint before anything is measured
    (folder / "baseline.py").write_text(BASELINE)
    (folder / "baseline.jinja").write_text(load_format(model.path, model.config["model_type"]).template)
    cache = folder / "datasets"
    commands = {
        "prepare": [sys.executable, "-m", "gemma_tune", "prepare", str(data), "--model", options.model,
                    "--run", str(run), "--force"],
        "datasets": [sys.executable, str(folder / "baseline.py"), str(data), str(model.path), str(os.cpu_count()),
                     str(cache)]}
    for name, command in commands.items():
        if options.only in (None, name):
            shutil.rmtree(cache, ignore_errors=True)
            shutil.rmtree(run, ignore_errors=True)
            environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
            seconds, peak = measured(command, environment, folder / f"{name}.log")
            print(f"{name:10} {seconds:8.1f} s  {options.rows / seconds:8,.0f} rows/s  {size / seconds / 1e6:6.1f} MB/s  "
                  f"peak {peak / 1e6:6,.0f} MB", flush=True)
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
