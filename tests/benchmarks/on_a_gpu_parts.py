"""The parts of ``on_a_gpu.py``: what each runs, the figures it keeps, and what has to hold on a GPU."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DEMO_SHAPE = "gemma3-270m"
WORDS = ["margin", "cash", "debt", "growth", "price", "share", "yield", "cost", "rate", "bond", "loss", "stock"]
TESTS = ("tests/train", "tests/answers", "tests/models", "tests/benchmarks")
SEEN = ("steady_tokens_per_second", "warmup_steps", "warmup_seconds", "gpu_busy", "kernels_per_step", "gpu_seconds_per_step",
        "padding", "first_step_after")
CAPTURED = re.compile(r"steps (?:with pictures )?are captured in|rows are packed")
NOT_CAPTURED = re.compile(r".*(?:cannot be captured|are not captured|one operation at a time|do not fit the memory as a captured).*")


class Failed(Exception):
    """A process of a part ended with an error; ``args`` are the message, and what it printed to both streams."""

    def __str__(self) -> str:
        return str(self.args[0])


class TooLong(Exception):
    """A part was not done when its time was over."""


class LeftOut(Exception):
    """A part needs what is not here."""


@dataclass
class Training:
    """What ``train`` said: its summary, its notes, and what step_clock.py saw of it."""

    summary: dict[str, Any]
    notes: str
    seen: dict[str, Any]

    @property
    def figures(self) -> dict[str, Any]:
        names = ("tokens_per_second", "training_seconds", "startup_seconds", "eval_loss_after")
        return ({name: self.summary[name] for name in names if self.summary.get(name) is not None}
                | {name: self.seen["steps_seen"][name] for name in SEEN if self.seen["steps_seen"].get(name) is not None}
                | {name: self.seen[name] for name in ("peak_gpu_bytes", "peak_reserved_bytes") if name in self.seen}
                | {"said": re.findall(r"(?m)^. ((?:steps|rows|layers|ready|memory)\b.*)", self.notes)})


@dataclass
class Bench:
    """What a part is given.

    Attributes:
        work: a folder for models and runs.
        small: on a tiny model, whatever machine it is.
        machine: what there is, see ``MACHINE`` in on_a_gpu.py.
        figures: what the part has found so far.
        checks: what has to hold, by name.
    """

    work: Path
    options: argparse.Namespace
    small: bool = False
    machine: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, bool] = field(default_factory=dict)

    def run(self, command: list[Any], log: str = "", **environment: str) -> tuple[str, str]:
        raise NotImplementedError

    @property
    def on_gpu(self) -> bool:
        """Whether what has to hold on a GPU has to hold here."""
        return self.machine["cuda"] and not self.small

    @property
    def model(self) -> str:
        """The demo; where its package is not installed, its shape with random weights; in a small way a tiny one."""
        if not self.small and self.machine["demo"]:
            return "demo"
        folder = self.work / ("tiny" if self.small else DEMO_SHAPE)
        if not (folder / "config.json").is_file():
            made = ("from support.models import make_model; make_model(Path(sys.argv[1]))" if self.small else
                    "from shapes import make_checkpoint; make_checkpoint(sys.argv[2], Path(sys.argv[1]), *map(Path, sys.argv[3:]))")
            self.run([sys.executable, "-c", f"import sys; from pathlib import Path; sys.path.insert(0, {str(HERE)!r}); {made}", folder,
                      *([] if self.small else [DEMO_SHAPE, *filter(None, [self.options.tokenizer])])], folder.name)
        return str(folder)

    @property
    def tokens_of_a_word(self) -> int:
        """Of the words that rows are made of: the tiny tokenizer takes them apart."""
        whole = not self.small and (self.machine["demo"] or self.options.tokenizer)
        return 1 if whole else 8 if self.small else 5

    def prepared(self, kind: str, *flags: object) -> Path:
        """A run with rows of a kind: ``usual``, ``uneven`` or ``long``, or ``example:…``."""
        run = self.work / f"run-{kind.replace(':', '-')}"
        if not (run / "data/tokens/train.arrow").is_file():
            data = kind if kind.startswith("example:") else self.rows(kind)
            self.run([sys.executable, "-m", "gemma_tune", "prepare", data, "--model", self.model, "--run", run, "--force",
                      "--duplicates", "keep", *flags], f"prepare-{run.name}")
        return run

    def rows(self, kind: str, count: int = 0) -> Path:
        """A file of so many conversations, of about 170 tokens unless the kind says otherwise."""
        if kind == "usual" and self.options.data:
            return Path(self.options.data).resolve()
        count, path = count or (24 if self.small else 480), self.work / f"{kind}-{count}.jsonl"
        scale = self.tokens_of_a_word
        lengths = {"usual": lambda n: (40 + 37 * n % 160) // scale, "uneven": lambda n: (900 if n % 20 == 0 else 12 + n % 9) // scale,
                   "long": lambda n: (620 + n % 40) // scale}[kind]
        with open(path, "w", encoding="utf-8") as file:
            for n in range(count):
                words = " ".join(WORDS[(7 * n + k * (1 + n % 5)) % len(WORDS)] for k in range(2 + lengths(n)))
                file.write(json.dumps({"messages": [{"role": "user", "content": f"Number {n}: what moved?"},
                                                    {"role": "assistant", "content": f"{words} ({n})"}]}) + "\n")
        return path

    def train(self, run: Path, *flags: object, log: str = "train", **environment: str) -> Training:
        """``train`` in a process of its own, which is watched."""
        job, result = self.work / "job.json", self.work / "result.json"
        job.write_text(json.dumps({"result": str(result), "profile": self.on_gpu}))
        small = ("--rank", 4, "--batch-size", 4) if self.small else ()
        out, err = self.run([sys.executable, HERE / "train_contenders.py", "cli", job, "train", "--run", run, "--json", "--samples",
                             0, *small, *flags], log, **environment)
        return Training(json.loads(out)["summary"], err, json.loads(result.read_text()))

    def found(self, training: Training, name: str = "") -> Training:
        """Keep the figures of a training, and on a GPU expect that its steps are captured."""
        self.figures |= {f"{name} {key}".strip(): value for key, value in training.figures.items()}
        if self.on_gpu:
            self.expect(f"{name} steps are captured".strip(), bool(CAPTURED.search(training.notes)))
            self.expect(f"{name} nothing falls back".strip(), not (said := NOT_CAPTURED.findall(training.notes)), said)
        return training

    def expect(self, what: str, holds: bool, found: Any = None) -> None:
        """Something has to hold; what was found instead is kept."""
        self.checks[what] = bool(holds)
        if not holds and found is not None:
            self.figures[f"{what}: instead"] = found


def rows_with_pictures(folder: Path, count: int) -> Path:
    """A file of so many questions about a picture each, of noise; in each answer are 5 to 24 words."""
    from support.shown import noise

    folder.mkdir(exist_ok=True)
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
        for n in range(count):
            noise(n, (96, 64)).save(folder / f"{n}.png")
            answer = " ".join(WORDS[(7 * n + k * (1 + n % 5)) % len(WORDS)] for k in range(5 + 7 * n % 20))
            file.write(json.dumps({"images": [f"{n}.png"], "messages": [
                {"role": "user", "content": f"<image>Number {n}: what is it?"}, {"role": "assistant", "content": answer}]}) + "\n")
    return folder / "rows.jsonl"


# ---- parts -----------------------------------------------------------------------------------------------------------

def train(bench: Bench) -> None:
    """Also what comes first: a cold start, with no kernel compiled before."""
    run, cache = bench.prepared("usual", "--valid", 8 if bench.small else 48), bench.work / "triton"
    shutil.rmtree(cache, ignore_errors=True)
    cold = bench.found(bench.train(run, "--epochs", 1, "--force", TRITON_CACHE_DIR=str(cache)))
    bench.figures["seconds to the first step, cold, without imports"] = without_imports(cold)
    warm = bench.train(run, "--epochs", 1, "--force", log="warm", TRITON_CACHE_DIR=str(cache))
    bench.figures |= {"seconds to the first step, warm, without imports": without_imports(warm),
                      "warm startup_seconds": warm.summary["startup_seconds"]}
    bench.expect("the first step comes within 15 s, cold", without_imports(cold) <= 15)


def without_imports(training: Training) -> float:
    """From the end of the imports to the first step, with the first evaluation."""
    return round(sum(seconds for part, seconds in training.summary["startup_seconds"].items() if part != "libraries"), 2)


def tests(bench: Bench) -> None:
    """Those alone that are left out without a GPU, or without something else."""
    pytest(bench, "-m", "skipif")


def suite(bench: Bench) -> None:
    pytest(bench)


def pytest(bench: Bench, *flags: str) -> None:
    """Its counts, what was skipped and why, and that nothing failed."""
    chosen = ["tests/train/test_buckets.py", "tests/train/test_fused.py"] if bench.small else [
        *TESTS, "--ignore=tests/benchmarks/test_on_a_gpu.py"]
    several = ["-n", "8"] if bench.machine["cores"] >= 8 else []
    try:
        out, _ = bench.run([sys.executable, "-m", "pytest", "-q", "-rsfE", "-p", "no:cacheprovider", *flags, *several, *chosen])
    except Failed as e:
        if not re.search(r"\d+ (failed|errors?)\b", e.args[1]):
            raise
        out = e.args[1]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", out.splitlines()[-1])}
    bench.figures |= counts | {"skipped because": sorted(set(re.findall(r"(?m)^SKIPPED \[\d+\] \S+: (.*)", out)))}
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", out)
    bench.expect("all tests pass", not failed and not {"failed", "error", "errors"} & counts.keys(), failed)
    if bench.on_gpu:
        without = [why for why in bench.figures["skipped because"] if re.search(r"needs a (CUDA )?GPU|no GPU", why)]
        bench.expect("no test lacks a GPU", not without, without)


def preferences(bench: Bench) -> None:
    run = bench.prepared("example:pairs", *(("--max-samples", 24) if bench.small else ()))
    for method in ("kto",) if bench.small else ("dpo", "kto"):
        bench.found(bench.train(run, "--method", method, "--epochs", 1, "--force", log=method), method)


def uneven(bench: Bench) -> None:
    """Rows of very different lengths, which are packed where that is faster."""
    training = bench.found(bench.train(bench.prepared("uneven", "--valid", 0), "--epochs", 1, "--force"))
    if bench.on_gpu:
        bench.expect("packing was tried", "packed" in training.notes)


def loss(bench: Bench) -> None:
    """The same training, captured and one kernel at a time."""
    run = bench.prepared("usual", "--valid", 8 if bench.small else 48)
    losses = {}
    for name, flags in (("captured", ()), ("eager", ("--no-cuda-graphs",)), ("captured, dropout", ("--dropout", 0.1)),
                        ("eager, dropout", ("--dropout", 0.1, "--no-cuda-graphs"))):
        summary = bench.train(run, "--epochs", 1, "--force", *flags, log=name.replace(", ", "-")).summary
        losses[name] = summary["eval_loss_after"]
        bench.figures |= {f"{name} held-out loss": losses[name], f"{name} tokens/s": summary["tokens_per_second"]}
    bench.expect("held-out loss is within 0.5 % of the eager one",
                 abs(losses["captured"] / losses["eager"] - 1) <= 0.005)
    bench.expect("with dropout within 2 %", abs(losses["captured, dropout"] / losses["eager, dropout"] - 1) <= 0.02)


def pictures(bench: Bench) -> None:
    """A Gemma 3 of random weights that sees, its text model as large as the 270M's: steps on pictures, captured and one kernel
    at a time."""
    folder, run = bench.work / "seeing", bench.work / "run-pictures"
    shape = "" if bench.small else (", side=224, parts=64, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, "
                                    "num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, initializer_range=0.02")
    if not (folder / "config.json").is_file():
        bench.run([sys.executable, "-c", "import sys; from pathlib import Path; from support.models import make_seeing; "
                   f"make_seeing(Path(sys.argv[1]){shape})", folder], "seeing")
    rows = rows_with_pictures(bench.work / "pictures", 24 if bench.small else 480)
    bench.run([sys.executable, "-m", "gemma_tune", "prepare", rows, "--model", folder, "--run", run, "--force", "--valid",
               8 if bench.small else 48, "--duplicates", "keep"], "prepare-pictures")
    captured = bench.found(bench.train(run, "--epochs", 2, "--force", log="captured"), "captured")
    eager = bench.train(run, "--epochs", 2, "--force", "--no-cuda-graphs", log="eager")
    bench.figures |= {f"eager {name}": value for name, value in eager.figures.items()}
    bench.expect("held-out loss is within 0.5 % of the eager one",
                 abs(captured.summary["eval_loss_after"] / eager.summary["eval_loss_after"] - 1) <= 0.005)
    name = "steady_tokens_per_second"
    if bench.on_gpu:
        bench.figures["times the eager tokens/s"] = ratio = captured.figures[name] / eager.figures[name]
        bench.expect("captured steps are faster", ratio > 1)


def chat(bench: Bench) -> None:
    run = bench.prepared("usual", "--valid", 8 if bench.small else 48)
    if not list(run.glob("*_lora_adapter/adapter_config.json")):
        bench.train(run, "--epochs", 1, "--force")
    turns, tokens = (3, 4) if bench.small else (20, 48)
    out, _ = bench.run([sys.executable, HERE / "chat_turns.py", "--run", run, "--turns", turns, "--tokens", tokens], "turns")
    found = json.loads(out.splitlines()[-1])
    bench.figures |= found
    bench.expect("every turn was answered", all(len(found[name]["first"]) == turns for name in ("base", "adapter")))
    if bench.on_gpu:
        bench.expect("decoding is captured", not found["not_captured"] and found["captured"] > 0)
        bench.expect("memory stays within 1.5 times that of the fifth turn", found["reserved"][-1] <= 1.5 * found["reserved"][4])


def memory(bench: Bench) -> None:
    """Beside what was planned; reserved after a resumed run; and fp32 with a window that is captured."""
    run = bench.prepared("usual", "--valid", 8 if bench.small else 48)
    out, _ = bench.run([sys.executable, "-m", "gemma_tune", "train", "--run", run, "--epochs", 1, "--force", "--dry-run",
                        "--json"], "plan")
    planned = json.loads(out)["memory"]["total"]
    first = bench.found(bench.train(run, "--epochs", 1, "--force", log="first"), "first")
    resumed = bench.found(bench.train(run, "--epochs", 2, "--continue", log="resumed"), "resumed")
    wide = bench.found(bench.train(bench.prepared("long", "--valid", 0, "--max-length", 1024), "--dtype", "fp32", "--max-steps", 12,
                                   "--batch-size", 2, "--force", log="fp32"), "fp32, windows")
    bench.figures["planned bytes"] = planned
    if bench.on_gpu:
        bench.expect("no more is reserved than was planned", first.seen["peak_reserved_bytes"] <= planned)
        bench.expect("a resumed run reserves no more than 1.1 times as much",
                     resumed.seen["peak_reserved_bytes"] <= 1.1 * first.seen["peak_reserved_bytes"])
        bench.expect("fp32 takes less than the GPU has", wide.seen["peak_reserved_bytes"] < bench.machine["memory"][0])


def speed(bench: Bench, batch: int, *flags: object, shape: str = "gemma3-4b", log: str = "", rows: int = 0) -> dict[str, Any]:
    """train_speed.py on a shape with random weights, or on the tiny model: its figures of all contenders."""
    rows, result = rows or (8 if bench.small else 30 * batch), bench.work / f"speed-{log or shape}.json"
    model = ["--model", bench.model] if bench.small else [
        "--shape", shape, "--checkpoint", bench.work / shape,
        *(["--tokenizer", bench.options.tokenizer] if bench.options.tokenizer else [])]
    data = bench.rows("usual", rows + 8)
    folder = bench.work / f"speed-{log or shape}"
    shutil.rmtree(folder, ignore_errors=True)
    _, said = bench.run([sys.executable, HERE / "train_speed.py", data, *model, "--rows", rows, "--valid-rows", 8, "--batch-size",
               min(batch, 4) if bench.small else batch, "--json", result, "--folder", folder, *flags], log)
    found = json.loads(result.read_text())
    if "ours" not in found["contenders"]:  # train_speed.py goes on with the others
        raise Failed(f"ours was left out: {said[-2000:]}")
    for name, contender in found["contenders"].items():
        seen = contender["steps_seen"]
        bench.figures |= {f"{name} {key}": seen[key] for key in (*SEEN, "peak_gpu_bytes", "peak_reserved_bytes") if key in seen}
        bench.figures |= {f"{name} tokens/s": contender["tokens_per_second"], f"{name} of the matrix limit": contender["share_of_limit"]}
        if "steady_tokens_per_second" in seen:
            bench.figures[f"{name} of the matrix limit, steady"] = (
                seen["steady_tokens_per_second"] * found["limit"]["trained_only"]["seconds"] / found["tokens"])
    return found


def large(bench: Bench) -> None:
    """The 4B at 32 rows for each step, in bf16 and then in 4 bits."""
    speed(bench, 32, "--with", "ours", "--no-held-out", log="bf16")
    plain = dict(bench.figures)
    if not bench.on_gpu:
        return
    bench.expect("60 % of the matrix limit, steady", plain.get("ours of the matrix limit, steady", 0) >= 0.6)
    bench.figures = {}
    try:
        speed(bench, 32, "--with", "ours", "--no-held-out", "--qlora", log="qlora")
    finally:
        four = {f"qlora {name}": value for name, value in bench.figures.items()}
        bench.figures = plain | four
    name = "ours steady_tokens_per_second"
    bench.figures["qlora: times the seconds of bf16"] = ratio = plain[name] / four[f"qlora {name}"]
    bench.expect("QLoRA takes at most 1.3 times as long as bf16", ratio <= 1.3)


def full(bench: Bench) -> None:
    """All weights of the 270M, captured, one kernel at a time, and by TRL."""
    found = speed(bench, 8, "--full", "--with", "ours,trl-best" if bench.small else "ours,ours-eager,trl-best", shape="gemma3-270m",
                  log="full")["contenders"]
    if not bench.on_gpu:
        return
    captured, eager = (found[name]["steps_seen"]["steady_tokens_per_second"] for name in ("ours", "ours-eager"))
    bench.expect("captured steps are faster", captured > eager)
    losses = [found[name]["held_out_loss"] for name in ("ours", "ours-eager")]
    bench.expect("the held-out losses are within 0.5 %", abs(losses[0] / losses[1] - 1) < 0.005)


def gpus(bench: Bench) -> None:
    count = 2 if bench.small else len(bench.machine["gpus"])
    if count < 2 or bench.machine["cuda"] and len(bench.machine["gpus"]) < 2:
        raise LeftOut("there is one GPU")
    run = bench.prepared("usual", "--valid", 8 if bench.small else 48)
    out, err = bench.run([sys.executable, "-m", "gemma_tune", "train", "--run", run, "--json", "--samples", 0, "--epochs", 1,
                          "--num-processes", count, "--batch-size", 2 if bench.small else 4, "--force"], "several")
    summary = json.loads(out)["summary"]
    bench.figures |= {name: summary[name] for name in ("tokens_per_second", "eval_loss_after", "steps")}
    if bench.on_gpu:
        bench.expect("steps are captured", bool(CAPTURED.search(err)) and not NOT_CAPTURED.search(err))


def contender(bench: Bench) -> None:
    if not bench.options.contender:
        raise LeftOut("no --contender was given")
    given = [word for command in bench.options.contender for word in ("--contender", command)]
    found = speed(bench, 8, "--with", "ours", "--no-held-out", *given, shape="gemma3-270m", rows=0 if bench.small else 480)
    ours = found["contenders"]["ours"]["steps_seen"].get("steady_tokens_per_second", 0)
    for name in (command.partition("=")[0] for command in bench.options.contender):
        theirs = found["contenders"].get(name)
        bench.expect(f"{name} was measured", theirs is not None)
        if theirs and (pace := theirs["steps_seen"].get("steady_tokens_per_second")):
            bench.figures[f"times {name}'s tokens/s"] = ours / pace
            bench.expect(f"4 times {name}'s tokens/s", bench.small or ours >= 4 * pace)


@dataclass(frozen=True)
class Part:
    """A part: its bound in seconds, and with how many it is begun; a start alone takes a process ten seconds or more there."""

    name: str
    about: str
    measure: Callable[[Bench], None]
    seconds: float
    least: float = 60.0


PARTS = (
    Part("train", "train --model demo --epochs 1, cold and warm", train, 260, 120),
    Part("tests", "the tests that need a GPU", tests, 240, 120),
    Part("loss", "held-out loss, captured and one kernel at a time", loss, 300, 150),
    Part("preferences", "train --method dpo, and kto", preferences, 200, 100),
    Part("uneven", "rows of very uneven lengths", uneven, 120),
    Part("pictures", "steps on pictures, captured and one kernel at a time", pictures, 240, 120),
    Part("chat", "20 turns with base and tuned model", chat, 200, 100),
    Part("memory", "planned, reserved, resumed; fp32 with windows", memory, 300, 150),
    Part("large", "the 4B at 32 rows, bf16 and QLoRA, against the matrix limit", large, 500, 200),
    Part("full", "train --full, captured and one kernel at a time, beside TRL", full, 300, 150),
    Part("gpus", "several GPUs", gpus, 150, 90),
    Part("suite", "all tests of training, answers, models and benchmarks", suite, 550, 250),
    Part("contender", "other programs on the same rows", contender, 550, 250),
)
