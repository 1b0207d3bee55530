"""Which settings of ``train`` reach the lowest held-out loss for the same tokens: the table behind its defaults.

Run it from the repository: ``python tests/benchmarks/recipes.py DATA --model MODEL --only PATTERN… --results FILE``. DATA is
a ``.json`` array or a ``.jsonl`` file of conversations; its first rows are learned, the next ones are held out. Each recipe is
one training in a process of its own, with the same rows, labels and evaluation. What is done already stands in FILE
(JSON lines, one for each recipe, with its settings and its losses by tokens) and is not done again, so that
a long comparison can be stopped and goes on. ``--table`` trains nothing and shows what FILE holds.

``reference`` is LLaMA-Factory's published LoRA recipe (rank 8, alpha 16, 1e-4, cosine with a tenth of warm-up, batch 8, three
epochs) by PEFT and PyTorch alone. All others are this project's ``train`` with options, and where a recipe
needs what it does not offer, with a patch in recipe_child.py. Losses are in nats per learned token.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from train_speed import read_rows

from gemma_tune.base.words import model_name
from gemma_tune.encoding.tokens import lengths_of, open_tokens

HERE = Path(__file__).resolve().parent
SEED = 42
LLAMA_FACTORY = {"rank": 8, "alpha": 16, "learning_rate": 1e-4, "batch_size": 8, "epochs": 3, "warmup": 0.1}


@dataclass(frozen=True)
class Recipe:
    """What one training does.

    Attributes:
        settings: options of ``train`` that differ from its defaults, by their names in a settings file.
        changes: what its options do not offer, see recipe_child.py.
        plain: whether it is the reference.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    plain: bool = False


def recipes(epochs: float) -> list[Recipe]:
    """All that can be compared, each with so many epochs unless it says otherwise.

    What is varied stands beside the same training with ``rank`` 16, ``alpha`` 32, batch 4 and the rate in its name.
    """
    def ours(name: str, rate: float, changes: dict[str, Any] | None = None, **settings: Any) -> Recipe:
        return Recipe(name, {"learning_rate": rate, "epochs": epochs} | settings, changes or {})

    found = [Recipe("reference", plain=True),
             ours("reference-by-train", 1e-4, rank=8, alpha=16, batch_size=8, warmup=0.1, epochs=3)]
    for rate in (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3):
        found += [ours(f"rate-{rate:g}", rate),
                  ours(f"three-epochs-{rate:g}", rate, epochs=3),  # the tokens of the reference
                  ours(f"rank-8-{rate:g}", rate, rank=8, alpha=16),
                  ours(f"rank-64-{rate:g}", rate, rank=64, alpha=128),
                  ours(f"rank-64-rslora-{rate:g}", rate, rank=64, alpha=32, rslora=True),
                  ours(f"rank-128-{rate:g}", rate, rank=128, alpha=256),
                  ours(f"batch-1-{rate:g}", rate, batch_size=1),
                  ours(f"batch-2-{rate:g}", rate, batch_size=2),
                  ours(f"batch-8-{rate:g}", rate, batch_size=8),
                  ours(f"batch-16-{rate:g}", rate, batch_size=16),
                  ours(f"dora-{rate:g}", rate, dora=True),
                  ours(f"dropout-0.1-{rate:g}", rate, dropout=0.1),
                  ours(f"decay-0.1-{rate:g}", rate, weight_decay=0.1),
                  ours(f"linear-{rate:g}", rate, schedule="linear"),
                  ours(f"constant-{rate:g}", rate, schedule="constant"),
                  ours(f"no-warmup-{rate:g}", rate, warmup=0.0),
                  ours(f"warmup-0.2-{rate:g}", rate, warmup=0.2),
                  ours(f"no-clip-{rate:g}", rate, clip=0.0),
                  ours(f"muon-{rate:g}", rate, {"optimizer": "muon"}),
                  ours(f"beta2-0.95-{rate:g}", rate, {"betas": [0.9, 0.95]}),
                  *(ours(f"plus-{plus}-{rate:g}", rate, {"plus": plus}) for plus in (4, 16)),
                  *(ours(f"{init}-{rate:g}", rate, {"init": init})
                    for init in ("eva", "orthogonal", "pissa", "olora", "gaussian")),
                  ours(f"eva-plus-4-{rate:g}", rate, {"init": "eva", "plus": 4}),
                  ours(f"seed-7-{rate:g}", rate, seed=7)]
    return found


class Comparison:
    """A folder with a prepared run, and the trainings in it."""

    def __init__(self, folder: Path, options: argparse.Namespace):
        self.folder, self.options, self.data = folder, options, digest(options)
        self.prepared, self.run = folder / "prepared", folder / "run"

    def prepare(self) -> None:
        """Make the rows and a run of them."""
        files = [self.folder / f"{name}.jsonl" for name in ("train", "held-out")]
        for path, rows in zip(files, read_rows(self.options)):
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        self._gemma_tune("prepare", files[0], "--valid", files[1], "--model", self.options.model, "--run", self.prepared)
        manifest = json.loads((self.prepared / "manifest.json").read_text(encoding="utf-8"))
        self.summary = manifest["stages"]["prepare"]["summary"]
        self.tokens = int(lengths_of(open_tokens(self.prepared / "data/tokens/train.arrow")).sum())

    def train(self, recipe: Recipe) -> dict[str, Any]:
        """Train, in a run of its own: the next training of a run keeps what is said of one. The record, or the failure."""
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.prepared, self.run)
        job = {"changes": recipe.changes, "seed": SEED, "log": str(self.run / "logs/metrics.jsonl")}
        rows, plain = self.summary["train_rows"], LLAMA_FACTORY if recipe.plain else None
        said = plain or recipe.settings
        steps = round(-(-rows // said.get("batch_size", 4)) * said["epochs"])
        every = -(-steps // self.options.evaluations)
        if plain:
            job |= {"plain": plain, "eval_steps": every, "model": self.options.model,
                    "log": str(self.folder / "plain.jsonl"), "tokens": str(self.run / "data/tokens/train.arrow"),
                    "held_out": str(self.run / "data/tokens/valid.arrow")}
        path = self.folder / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        settings = {"seed": SEED, "eval_steps": every, "samples": 0, "keep": "last"} | recipe.settings
        command = [] if plain else ["train", "--run", self.run, "--force", *as_options(settings)]
        done = self._child([HERE / "recipe_child.py", path, *command], recipe.name)
        lines = Path(job["log"]).read_text(encoding="utf-8").splitlines() if Path(job["log"]).is_file() else []
        record = {"model": model_name(self.options.model), "data": self.data, **asdict(recipe), "settings": plain or recipe.settings,
                  "date": date.today().isoformat(), "rows": self.options.rows, "train_rows": rows, "tokens": self.tokens,
                  "losses": by_tokens(map(json.loads, lines)), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
        return record if done.returncode == 0 and record["losses"] else record | {"failed": done.stdout[-400:]}

    def _gemma_tune(self, *arguments: object) -> None:
        done = self._child(["-m", "gemma_tune", *arguments], str(arguments[0]))
        if done.returncode:
            sys.exit(f"{arguments[0]} failed:\n{done.stdout[-2000:]}")

    def _child(self, arguments: list[object], name: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, encoding="utf-8", errors="replace")
        (self.folder / f"{name}.log").write_text(done.stdout, encoding="utf-8")
        return done


def as_options(settings: dict[str, Any]) -> list[str]:
    """Settings as the command line takes them."""
    found = []
    for name, value in settings.items():
        option = "--" + name.replace("_", "-")
        found += [option] if value is True else [option, str(value)]
    return found


def by_tokens(records: Any) -> list[tuple[int, float]]:
    """Training tokens seen, and the held-out loss there, from the lines of a log."""
    tokens, found = 0, []
    for record in records:
        tokens = record.get("tokens", tokens)
        if "eval_loss" in record:
            found.append((tokens, record["eval_loss"]))
    return found


def digest(options: argparse.Namespace) -> str:
    """What tells the rows of a comparison from others."""
    text = json.dumps(read_rows(options), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_results(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The records of a model on these rows, by recipe; the last one of each counts. Without DATA those of any rows."""
    path, model = options.results, model_name(options.model)
    data = digest(options) if options.data else None
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {r["name"]: r for r in map(json.loads, lines)
            if r["model"] == model and data in (None, r["data"]) and not r.get("failed")}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown, the lowest last loss first; losses by epochs of the same rows."""
    epochs = sorted({round(tokens / r["tokens"], 1) for r in results.values() for tokens, _ in r["losses"]})
    lines = ["| recipe | settings | " + " | ".join(f"{epoch:g}" for epoch in epochs) + " |",
             "|---|---|" + "---|" * len(epochs)]
    for name, r in sorted(results.items(), key=lambda item: item[1]["losses"][-1][1]):
        losses = {round(tokens / r["tokens"], 1): loss for tokens, loss in r["losses"]}
        settings = ", ".join(f"{key} {value}" for key, value in {**r["settings"], **r["changes"]}.items())
        lines.append(f"| {name} | {settings} | " + " | ".join(f"{losses[e]:.4f}" if e in losses else "" for e in epochs) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare settings of train by the held-out loss they reach.")
    parser.add_argument("data", nargs="?", help="a .json array or a .jsonl file of conversations")
    parser.add_argument("--model", default="demo", help="as for gemma-tune (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="rows that are learned (default: %(default)s)")
    parser.add_argument("--valid-rows", type=int, default=96, help="rows that are held out (default: %(default)s)")
    parser.add_argument("--epochs", type=float, default=1.5, help="of each recipe but the reference (default: %(default)s)")
    parser.add_argument("--evaluations", type=int, default=3, help="of each training, beside that of the base model "
                                                                    "(default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="names of recipes, like 'rate-*'")
    parser.add_argument("--results", type=Path, default=HERE / "recipes.jsonl",
                        help="default: that of the repository")
    parser.add_argument("--table", action="store_true", help="show the results, and train nothing")
    options = parser.parse_args()
    if not options.table and options.data is None:
        parser.error("DATA is missing")
    return options


def main() -> None:
    options = parse()
    if not options.table:
        named = {r.name: r for r in recipes(options.epochs)}
        chosen = [named[name] for pattern in options.only for name in fnmatch.filter(named, pattern)]
        missing = [r for r in dict.fromkeys(r.name for r in chosen) if r not in read_results(options)]
        with tempfile.TemporaryDirectory(prefix="recipes-") as folder:
            comparison = Comparison(Path(folder), options)
            if missing:
                comparison.prepare()
            for number, name in enumerate(missing, 1):
                print(f"{number} of {len(missing)}: {name}", file=sys.stderr, flush=True)
                record = comparison.train(named[name])
                with open(options.results, "a", encoding="utf-8") as f:
                    f.write(json.dumps(record) + "\n")
                said = record.get("failed") or " ".join(f"{loss:.4f}" for _, loss in record["losses"])
                print(f"    {said}", file=sys.stderr, flush=True)
    print(table(read_results(options)))


if __name__ == "__main__":
    main()
