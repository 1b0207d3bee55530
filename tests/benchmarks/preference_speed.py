"""How fast ``train --method dpo`` is and how much memory it takes, beside TRL's DPOTrainer on the same pairs.

Run it from the repository: ``python tests/benchmarks/preference_speed.py DATA``, where DATA is a ``.json`` array or a
``.jsonl`` file of conversations in Alpaca's or OpenAI's form. Of each row its answer is the chosen one, and that of another
row the rejected one, which is as long as answers are: for speed nothing else matters. Each side trains in a process of its
own, one after the other, with the same LoRA, batch size, schedule, seed and, token by token, the same pairs.

TRL runs with what makes it fastest here: bf16 weights, activations kept, the reference's log-probabilities computed
beforehand. Speed counts the seconds in training steps but the first, "whole command" everything: starting, loading, the
reference, saving. Peak memory is the process's resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from train_contenders import ALPHA, RANK, SEED
from train_speed import read_rows

SETTINGS = {"beta": 0.1, "learning_rate": 5e-5}
_NAMES = {"ours": "gemma-tune", "trl": "TRL, tuned"}


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pair of each row: its own answer, and that of the row half of them further on."""
    found = []
    for n, row in enumerate(rows):
        other = rows[(n + len(rows) // 2) % len(rows)]
        if _answer(row) != _answer(other):
            found.append({"prompt": _prompt(row), "chosen": [{"role": "assistant", "content": _answer(row)}],
                          "rejected": [{"role": "assistant", "content": _answer(other)}]})
    return found


def _prompt(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" in row:
        return row["messages"][:-1]
    text = "\n\n".join(filter(str.strip, (row["instruction"], row.get("input") or "")))
    return [{"role": "user", "content": text}]


def _answer(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"] if "messages" in row else row["output"]


def ours(job: dict[str, Any]) -> dict[str, Any]:
    """The command line, in a process of its own."""
    run = Path(job["run"])
    command = ["train", "--run", run, "--method", "dpo", "--epochs", 1, "--batch-size", job["batch_size"], "--rank", RANK,
               "--alpha", ALPHA, "--learning-rate", SETTINGS["learning_rate"], "--beta", SETTINGS["beta"], "--seed", SEED,
               "--keep", "last", "--samples", 0, "--force", "--json"]
    done = measured([sys.executable, "-m", "gemma_tune", *map(str, command)])
    lines = [json.loads(line) for line in (run / "logs/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    return done | {"ends": [line["training_seconds"] for line in steps], "losses": [line["loss"] for line in steps]}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """This file again, as a child that trains with TRL."""
    path = Path(job["folder"]) / "trl.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = measured([sys.executable, __file__, "--child", str(path)])
    return done | json.loads((Path(job["folder"]) / "trl-result.json").read_text(encoding="utf-8"))


def trl_child(job: dict[str, Any]) -> None:
    """Train with DPOTrainer on our tokens."""
    from gemma_tune.base.machine import settle_threads

    settle_threads()
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from gemma_tune.encoding.tokens import open_tokens

    class Clock(TrainerCallback):
        """When steps begin and end."""

        began, ends = None, []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = self.began or time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(time.perf_counter() - self.began)
            print(f"step {state.global_step} of {state.max_steps}: {self.ends[-1]:.1f} s", file=sys.stderr, flush=True)

    class OnTokens(DPOTrainer):
        """Takes the tokens as they are."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

    def split(row: dict[str, Any]) -> tuple[list[int], list[int]]:
        start = int((row["labels"] != -100).argmax())
        return row["input_ids"][:start].tolist(), row["input_ids"][start:].tolist()

    sequences = open_tokens(Path(job["run"]) / "data/tokens/train.arrow")
    rows = []
    for n in range(0, len(sequences), 2):
        (prompt, chosen), (_, rejected) = split(sequences[n]), split(sequences[n + 1])
        rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    clock = Clock()
    arguments = DPOConfig(
        output_dir=str(Path(job["folder"]) / "trl-output"), per_device_train_batch_size=job["batch_size"],
        per_device_eval_batch_size=job["batch_size"], num_train_epochs=1, learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="cosine", beta=SETTINGS["beta"], seed=SEED, max_length=None, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, bf16=False,
        precompute_ref_log_probs=True, model_init_kwargs={"dtype": "bfloat16" if job["dtype"] == "bf16" else "float32"})
    trainer = OnTokens(
        model=job["checkpoint"], args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["checkpoint"]), callbacks=[clock],
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    trainer.model.save_pretrained(job["folder"] + "/trl-adapter")
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    result = {"ends": clock.ends, "losses": losses}
    (Path(job["folder"]) / "trl-result.json").write_text(json.dumps(result), encoding="utf-8")


def measured(command: list[str]) -> dict[str, Any]:
    """Seconds and peak of resident memory in bytes of a command, which must succeed."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{text[-3000:]}")
    return {"wall": time.perf_counter() - began, "peak": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}


def steady(figures: dict[str, Any], batch: int, count: int) -> float:
    """Pairs per second in all steps but the first, which is slower everywhere."""
    first, last = figures["ends"][0], figures["ends"][-1]
    return (count - batch) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", nargs="?")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--valid-rows", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        trl_child(json.loads(Path(options.child).read_text(encoding="utf-8")))
        return
    folder = Path(tempfile.mkdtemp())
    run = folder / "run"
    made = pairs(read_rows(options)[0])
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in made), encoding="utf-8")
    measured([sys.executable, "-m", "gemma_tune", "prepare", str(folder / "pairs.jsonl"), "--model", options.model, "--run",
              str(run), "--valid", "0"])
    job = {"run": str(run), "folder": str(folder), "batch_size": options.batch_size}
    from gemma_tune.base.listener import Listener
    from gemma_tune.models.source import locate

    job["checkpoint"] = str(locate(options.model, None, Listener()).path.resolve())
    found = {"ours": ours(job)}
    summary = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["stages"]
    job["dtype"] = summary["train"]["summary"]["dtype"]
    count, tokens = summary["prepare"]["summary"]["train_rows"], summary["prepare"]["summary"]["tokens"]
    found["trl"] = trl(job)
    print(f"{count} pairs ({tokens:,} tokens), batches of {options.batch_size}, one epoch, {job['dtype']}, model "
          f"`{options.model}`, {os.cpu_count()} cores\n")
    print("| | pairs/s | peak memory | whole command | loss of the first and the last step |\n|---|---|---|---|---|")
    for name, figures in found.items():
        print(f"| {_NAMES[name]} | {steady(figures, options.batch_size, count):.3f} | {figures['peak'] / 1e9:.2f} GB | "
              f"{figures['wall']:.0f} s | {figures['losses'][0]:.4f}, {figures['losses'][-1]:.4f} |")
    speed = steady(found["ours"], options.batch_size, count) / steady(found["trl"], options.batch_size, count)
    print(f"\n{speed:.1f} times TRL's pairs/s (to reach: 6), {found['ours']['peak'] / found['trl']['peak']:.0%} of its peak "
          "memory (to reach: 50 %)")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
