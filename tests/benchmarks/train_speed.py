"""How fast ``train`` is and how much memory it takes, beside TRL and other programs on the same rows.

Run it from the repository: ``python tests/benchmarks/train_speed.py DATA``, where DATA is a ``.json`` array or a
``.jsonl`` file of conversations; its first rows are learned, the next ones are held out. Every contender runs in a
process of its own, one after the other, with the same LoRA, batch size, schedule and seed:

- ``ours``: ``prepare`` and ``train`` through the command line;
- ``trl``: SFTTrainer with TRL's defaults; it learns all tokens, the others the assistant's turns only;
- ``trl-best``: SFTTrainer with the settings that make it fastest here, and our labels;
- ``fp32``: the same training as ours in fp32 by PEFT and PyTorch alone, for its held-out loss only;
- each ``--contender NAME=COMMAND``. It gets three arguments, the rows (JSONL with ``messages``), the checkpoint, and a
  directory for its adapter; in the environment ``TRAIN_SPEED`` has the settings as JSON. Its last line is ``{"seconds",
  "rows", "peak_rss_bytes" or "peak_gpu_bytes", "train_loss"}``, and ``"adapter"`` where it wrote one. Of a program
  with transformers' Trainer, step_clock.py also gives ``"steps_seen"``; others may say how many of the seconds were
  ``"warmup_seconds"``. contender_unsloth.py is such a program.

Speed counts the seconds in training steps; "whole command" also starting, loading, preparing the rows and saving. Real
tokens are those without padding, the same for all (TRL's defaults add one at the end of each conversation). Peak memory
is the training process's resident set, on a GPU what PyTorch allocated there. The training loss is the mean over the
steps; the contenders batch and label differently, so only the held-out loss compares: the same program computes it for
every adapter, in fp32. Warm-up, the first steps until speed is steady, is reported apart (see step_clock.py), on a GPU with
the share of the time in which it works, and its kernels, in the last three steps. The matrix limit is explained in
matrix_limit.py. ``--neighbours N`` keeps N other processes busy meanwhile, as on a machine that others work on too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import train_contenders as common
from shapes import SHAPES
from train_report import compare, say, summarised, table

CONTENDERS = ("ours", "trl", "trl-best", "fp32")
OURS = {"ours": [], "ours-eager": ["--no-cuda-graphs"]}  # the second is asked for by its name, on a GPU


class Failed(SystemExit):
    """A process that is measured ended with an error; as an exit it ends the benchmark, unless somebody goes on."""


class Work:
    """A folder with the rows, and the processes that are measured on them."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options, self.model = folder, options, options.model
        self.job: dict[str, Any] = {"model": options.model, "batch_size": options.batch_size, "epochs": options.epochs,
                                     "qlora": options.qlora, "full": options.full, "profile": False}

    def prepare(self) -> dict[str, Any]:
        """Split DATA, prepare both sides, measure the machine. The figures that hold for all contenders."""
        for name, rows in zip(("train", "held-out"), read_rows(self.options)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (self.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        if self.options.shape:
            say(f"shape: {self.options.shape} with random weights")
            kept = Path(self.options.checkpoint or self.folder / "checkpoint").resolve()
            self.model = self.child("shape", shape=self.options.shape, output=str(kept),
                                    tokenizer=self.options.tokenizer)["figures"]["checkpoint"]
            self.job["model"] = self.model
        self.cli("prepare", "held-out")  # the first one also makes the demo's checkpoint, before anything is measured
        self.preparation = self.cli("prepare", "train")
        summary = self.preparation["summary"]
        self.job |= {"rows": str(self.folder / "run-train/data/train.jsonl"), "trained": summary["trained_tokens"],
                     "tokens": str(self.folder / "run-train/data/tokens/train.arrow"),
                     "held_out": str(self.folder / "run-held-out/data/tokens/train.arrow")}
        say("limit: measuring the speed of matrix products")
        limit = self.child("limit")["figures"]
        self.job |= {name: limit[name] for name in ("checkpoint", "device", "dtype")}
        self.job["profile"] = self.job["device"] == "cuda"
        return {"rows": summary["train_rows"], "tokens": summary["tokens"], "trained_tokens": summary["trained_tokens"],
                "machine": machine(limit), "limit": limit}

    def run(self, name: str) -> dict[str, Any]:
        """Train once: seconds, tokens, losses, memory (bytes), where the adapter is."""
        say(f"{name}: training (load {os.getloadavg()[0]:.1f}); its output is in {self.folder / name}.log")
        if name in OURS:
            return self._ours(name)
        output = self.folder / f"adapter-{name}"
        shutil.rmtree(output, ignore_errors=True)
        if name in self.options.commands:
            command = [*shlex.split(self.options.commands[name]), self.job["rows"], self.job["checkpoint"], str(output)]
            done = self.measured(command, name)
            figures = answer(done["stdout"], name)
            peak = figures.get("peak_gpu_bytes") or figures["peak_rss_bytes"]
            return {"wall_seconds": done["wall_seconds"], "peak_bytes": peak} | figures
        done = self.child(name, output=str(output))
        return done["figures"] | {"adapter": str(output)} | {key: done[key] for key in ("wall_seconds", "peak_bytes")}

    def _ours(self, name: str) -> dict[str, Any]:
        lora = ["--rank", common.RANK, "--alpha", common.ALPHA, "--dropout", common.DROPOUT]
        done = self.cli("train", "train", *OURS[name], "--epochs", self.options.epochs, "--batch-size", self.options.batch_size,
                        *(["--full"] if self.options.full else lora), "--learning-rate", common.rate_of(self.job), "--schedule", "cosine", "--warmup", common.WARMUP, "--seed", common.SEED,
                        *(["--qlora"] if self.options.qlora else []), log=name)
        summary, run = done["summary"], self.folder / "run-train"
        lines = (run / "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [record["loss"] for record in map(json.loads, lines) if "loss" in record]
        if summary["dtype"] != self.job["dtype"]:
            say(f"ours: it computed in {summary['dtype']}, while the limit was measured in {self.job['dtype']}")
        seen = done["figures"].get("steps_seen", {})
        if said := re.findall(r"padding adds (\d+) ?%", (self.folder / f"{name}.log").read_text(encoding="utf-8")):
            # Padding to a shape that was captured comes after the batches that were counted.
            seen["padding"] = max(seen.get("padding", 0), 1 - 1 / (1 + int(said[-1]) / 100))
        adapter = self.folder / f"adapter-{name}"  # the next training of ours would replace the run's
        shutil.copytree(run / done["artifacts"]["adapter"], adapter, dirs_exist_ok=True)
        return done["figures"] | {"steps_seen": seen} | {
                "seconds": summary["training_seconds"], "steps": summary["steps"], "losses": losses, "summary": summary,
                "wall_seconds": self.preparation["wall_seconds"] + done["wall_seconds"],
                "peak_bytes": done["peak_bytes"], "adapter": str(adapter)}

    def cli(self, command: str, side: str, *arguments: object, log: str | None = None) -> dict[str, Any]:
        """One of our commands on the run of one side: its JSON, seconds and memory."""
        if command == "prepare":
            arguments = (self.folder / f"{side}.jsonl", "--model", self.model, "--valid", 0, "--duplicates", "keep")
        done = self.child("cli", command, *arguments, "--run", self.folder / f"run-{side}", "--json", "--force",
                          log=log or f"prepare-{side}")
        return json.loads(done["stdout"]) | done

    def child(self, name: str, *arguments: object, log: str | None = None, **more: Any) -> dict[str, Any]:
        """Run one job of train_contenders.py; ``figures`` is what it found."""
        path, result = self.folder / f"{log or name}-job.json", self.folder / f"{log or name}-result.json"
        path.write_text(json.dumps(self.job | more | {"result": str(result)}), encoding="utf-8")
        done = self.measured([sys.executable, common.__file__, name, str(path), *map(str, arguments)], log or name)
        figures = json.loads(result.read_text(encoding="utf-8"))
        on_gpu = self.job.get("device") == "cuda"
        return done | {"figures": figures, "peak_bytes": figures["peak_gpu_bytes"] if on_gpu else done["peak_bytes"]}

    def measured(self, command: list[str], log: str) -> dict[str, Any]:
        """Run a command; its seconds, its peak of resident memory in bytes, its standard output."""
        out, err = self.folder / f"{log}.out", self.folder / f"{log}.log"
        began = time.perf_counter()
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            # Its own peak, not that of its children: a sampled sum would slow down what is measured, and training is
            # one process.
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr,
                                       env=os.environ | {"TOKENIZERS_PARALLELISM": "false",
                                                         "TRAIN_SPEED": json.dumps(self.job)})
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise Failed(f"{shlex.join(command)} failed:\n{(out.read_text() + err.read_text())[-3000:]}")
        unit = 1 if sys.platform == "darwin" else 1024
        return {"wall_seconds": time.perf_counter() - began, "peak_bytes": usage.ru_maxrss * unit, "stdout": out.read_text()}


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """So many processes that take all the time that they get."""
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def answer(output: str, name: str) -> dict[str, Any]:
    """The figures in the last line of a contender's standard output."""
    lines = output.strip().splitlines()
    try:
        figures = json.loads(lines[-1])
        missing = {"seconds", "rows", "train_loss"} - set(figures)
    except (IndexError, ValueError, TypeError):
        sys.exit(f"{name}: its last line is no JSON object: {lines[-1] if lines else '(nothing)'}")
    if missing or not {"peak_rss_bytes", "peak_gpu_bytes"} & set(figures):
        sys.exit(f"{name}: its last line has no {', '.join(sorted(missing)) or 'peak_rss_bytes or peak_gpu_bytes'}")
    return figures


def read_rows(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """The first rows of DATA, and the next ones."""
    text = Path(options.data).read_text(encoding="utf-8")
    array = text.lstrip().startswith("[")
    rows = json.loads(text) if array else [json.loads(line) for line in text.splitlines() if line.strip()]
    wanted = options.rows + options.valid_rows
    if len(rows) < wanted:
        sys.exit(f"{options.data} has {len(rows)} rows, and --rows and --valid-rows ask for {wanted}")
    return rows[:options.rows], rows[options.rows:wanted]


def machine(limit: dict[str, Any]) -> dict[str, Any]:
    """What the figures were measured on."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.M)[1]
    except (OSError, TypeError):
        cpu = platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.platform(), "python": platform.python_version(),
            **{name: limit[name] for name in ("device", "dtype", "gpu", "threads", "versions")}}


def parse() -> argparse.Namespace:
    """The options; refused are contenders that do not exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--valid-rows", type=int, default=64, help="the rows after those, held out")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--with", dest="contenders", default=",".join(CONTENDERS), help="default: %(default)s")
    parser.add_argument("--contender", metavar="NAME=COMMAND", action="append", default=[],
                        help="another program, such as llama-factory or unsloth; may be given several times")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a released model's shape, instead of --model")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for --shape: a Gemma 3 tokenizer (default: a tiny one)")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="where the model of --shape is kept for the next run")
    parser.add_argument("--qlora", action="store_true", help="with the base in 4 bits")
    parser.add_argument("--full", action="store_true", help="train all weights instead of LoRA")
    parser.add_argument("--max-steps", type=int, help="take so few rows that an epoch has at most so many steps")
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes beside each contender")
    parser.add_argument("--no-held-out", dest="held_out", action="store_false",
                        help="without the held-out losses, which take as long as loading the model twice in fp32")
    parser.add_argument("--repeats", type=int, default=1, help="speeds are medians of so many rounds")
    parser.add_argument("--json", metavar="FILE", help="where all figures go")
    parser.add_argument("--folder", help="where to work (default: a temporary directory, deleted at the end)")
    options = parser.parse_args()
    options.commands = {}
    for given in options.contender:
        name, sign, command = given.partition("=")
        if not (sign and re.fullmatch(r"[\w.-]+", name) and shlex.split(command)) or name in CONTENDERS:
            parser.error(f"--contender {given}: give it as NAME=COMMAND, with a name that is not {', '.join(CONTENDERS)}")
        options.commands[name] = command
    options.contenders = [*filter(None, options.contenders.split(",")), *options.commands]
    if unknown := set(options.contenders) - {*CONTENDERS, *OURS, *options.commands}:
        parser.error(f"there is no contender {', '.join(sorted(unknown))}; there are {', '.join(CONTENDERS)}")
    if options.max_steps:
        options.rows = min(options.rows, options.max_steps * options.batch_size)
    if options.shape:
        options.model = f"random weights, {options.shape}"
    return options


def main() -> None:
    options = parse()
    folder = Path(options.folder or tempfile.mkdtemp()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    work = Work(folder, options)
    facts = work.prepare()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.contenders}
    for round_number in range(options.repeats):
        for name in options.contenders:
            if name != "fp32" or round_number == 0:  # only its loss is wanted
                try:
                    with busy_neighbours(options.neighbours):
                        runs[name].append(work.run(name))
                except Failed as e:  # one program's failure does not lose what was measured of the others
                    say(f"{name}: left out, {e}")
                    continue
                steady = runs[name][-1].get("steps_seen", {}).get("steady_tokens_per_second")
                say(f"{name}: {runs[name][-1]['wall_seconds']:.0f} s" + (f", {steady:,.0f} tokens/s" if steady else ""))
    contenders = {name: summarised(done, name, facts, options.epochs) for name, done in runs.items() if done}
    if options.held_out:
        say("judge: computing the held-out losses")
        work.job["adapters"] = {name: c["adapter"] for name, c in contenders.items() if c["adapter"]}
        facts["held_out"] = work.child("judge")["figures"]["losses"]
        for name in work.job["adapters"]:
            contenders[name]["held_out_loss"] = facts["held_out"][name]
    if options.json:
        Path(options.json).write_text(json.dumps(facts | {"settings": vars(options), "contenders": contenders}, indent=2))
    print(table(facts, contenders, options))
    compare(contenders)
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
