"""One training of ``recipes.py``, in a process of its own: ``train`` with what a recipe changes, or plain PEFT.

``python recipe_child.py JOB.json [CLI ARGUMENTS…]``. With ``"plain"`` in the job it is PEFT and PyTorch alone, without
this project's trainer; else the command line runs, with ``"changes"``, what its options do not offer:

- ``init``: how the adapter begins, one of PEFT's names, or ``eva``: A holds the first right singular vectors of what
  the layer reads (Paischer et al. 2024, with the same rank everywhere), B is zero;
- ``optimizer``: ``muon`` (torch.optim.Muon with AdamW's step size), or ``adamw`` with other ``betas``;
- ``plus``: B's learning rate is so many times A's (Hayou et al. 2024).
"""

from __future__ import annotations

import json
import math
import random
import runpy
import sys
from pathlib import Path
from typing import Any

from train_contenders import IGNORE_INDEX, summed_loss

from gemma_tune.base.machine import settle_threads

EVA_ROWS = 48  # as many tell the directions of the small models' inputs well: their widths are below 2,100


def change(changes: dict[str, Any]) -> None:
    """Make ``train`` of this process do what its options do not offer."""
    import torch

    from gemma_tune.train import job, trainer

    ours, make = trainer.GemmaTrainer, job.lora_config

    def lora_config(*arguments: Any, **patterns: Any) -> Any:
        made = make(*arguments, **patterns)
        if changes.get("init", "eva") != "eva":
            made.init_lora_weights = changes["init"]
        return made

    def create_optimizer(self: Any, model: Any = None) -> Any:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        rate, plus = self.args.learning_rate, changes.get("plus", 1)
        groups = [{"params": [p for name, p in named if "lora_B" not in name], "lr": rate},
                  {"params": [p for name, p in named if "lora_B" in name], "lr": rate * plus}]
        if changes.get("optimizer") == "muon":
            self.optimizer = torch.optim.Muon(groups, lr=rate, weight_decay=self.args.weight_decay,
                                              adjust_lr_fn="match_rms_adamw")
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=self.args.weight_decay,
                                               betas=tuple(changes.get("betas", (0.9, 0.999))))
        return self.optimizer

    begin = ours.__init__

    def begin_with_eva(self: Any, *arguments: Any, **settings: Any) -> None:
        begin(self, *arguments, **settings)
        start_from_inputs(self)

    job.lora_config, ours.create_optimizer = lora_config, create_optimizer
    if changes.get("init") == "eva":
        ours.__init__ = begin_with_eva


def start_from_inputs(trainer: Any) -> None:
    """A of each layer becomes the first right singular vectors of the layer's inputs on some training rows."""
    import torch
    from peft.tuners.lora import Linear

    from gemma_tune.train.batches import collate

    layers = {name: module for name, module in trainer.model.named_modules() if isinstance(module, Linear)}
    squares = {name: torch.zeros(module.in_features, module.in_features) for name, module in layers.items()}

    def add(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            x = inputs[0].detach().flatten(0, -2).float()
            squares[name] += x.T @ x
        return hook

    hooks = [module.register_forward_hook(add(name)) for name, module in layers.items()]
    with trainer.evaluating():
        for row in trainer.train_dataset.select(range(min(EVA_ROWS, len(trainer.train_dataset)))):
            trainer._summed_loss(trainer.model, collate([row]))
    for hook in hooks:
        hook.remove()
    for name, module in layers.items():
        vectors = torch.linalg.eigh(squares[name].double()).eigenvectors.float()
        weight = module.lora_A["default"].weight
        weight.data = vectors[:, -weight.shape[0]:].flip(1).T.contiguous().to(weight.dtype)


def plain(job: dict[str, Any]) -> None:
    """LLaMA-Factory's LoRA recipe by PEFT and PyTorch alone: whole logits, plain cross-entropy, shuffled rows.

    Writes lines like those of ``logs/metrics.jsonl``.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup, set_seed

    from gemma_tune.base.listener import Listener
    from gemma_tune.encoding.tokens import open_tokens
    from gemma_tune.lora.layers import target_modules
    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import choose_placement
    from gemma_tune.models.source import locate

    rows, held_out = (open_tokens(Path(job[name])) for name in ("tokens", "held_out"))
    recipe = job["plain"]
    model = load_model(locate(job["model"], None, Listener()).path, choose_placement("auto"))
    set_seed(job["seed"])
    model = get_peft_model(model, LoraConfig(r=recipe["rank"], lora_alpha=recipe["alpha"], task_type="CAUSAL_LM",
                                             target_modules=target_modules(model, ()))).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=recipe["learning_rate"], weight_decay=0.0)
    per_epoch = math.ceil(len(rows) / recipe["batch_size"])
    steps = round(per_epoch * recipe["epochs"])
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(recipe["warmup"] * steps), steps)
    order, tokens = random.Random(job["seed"]), 0
    with open(job["log"], "w", encoding="utf-8", buffering=1) as log:
        for step in range(steps + 1):
            if step % job["eval_steps"] == 0 or step == steps:
                loss = held_out_loss(model, held_out)
                log.write(json.dumps({"step": step, "eval_loss": loss}) + "\n")
            if step == steps:
                break
            if step % per_epoch == 0:
                numbers = order.sample(range(len(rows)), len(rows))
            first = step % per_epoch * recipe["batch_size"]
            batch = [rows[n] for n in numbers[first:first + recipe["batch_size"]]]
            count = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in batch)
            total = 0.0
            for row in batch:  # one by one, so that their logits fit into memory
                loss = summed_loss(model, row) / count
                loss.backward()
                total += loss.item()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens += sum(len(row["input_ids"]) for row in batch)
            log.write(json.dumps({"step": step + 1, "loss": total, "tokens": tokens}) + "\n")


def held_out_loss(model: Any, rows: Any) -> float:
    """In nats per learned token."""
    import torch

    model.eval()
    count = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    with torch.no_grad():
        total = sum(summed_loss(model, row).item() for row in rows)
    model.train()
    return total / count


def main() -> None:
    job, arguments = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2:]
    settle_threads()
    if "plain" in job:
        plain(job)
        return
    if job["changes"]:
        change(job["changes"])
    sys.argv = ["gemma-tune", *arguments]
    runpy.run_module("gemma_tune", run_name="__main__")


if __name__ == "__main__":
    main()
