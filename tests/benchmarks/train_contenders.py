"""The processes of ``train_speed.py``: each trains, or measures, by itself and leaves its figures in a JSON file.

``python train_contenders.py NAME JOB.json [CLI ARGUMENTS…]``; the job names its files, see ``job`` in train_speed.py.
Everything heavy is imported inside the functions: a child begins with the memory peak of its parent, which imports this
module.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import step_clock

from gemma_tune.base.machine import settle_threads

RANK, ALPHA, DROPOUT, LEARNING_RATE, WARMUP, SEED = 16, 32, 0.0, 2e-4, 0.05, 42
FULL_RATE = 2e-5  # of all weights
IGNORE_INDEX = -100
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


def cli(job: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """This project's command line, in this process so that the GPU's peak of memory can be read from it."""
    settle_threads()  # as the command line does; watching imports torch before it can
    seen = step_clock.watch(job["profile"]) if arguments[0] == "train" else None
    sys.argv = ["gemma-tune", *arguments]
    try:
        runpy.run_module("gemma_tune", run_name="__main__")
    except SystemExit as e:
        if e.code:
            raise
    return {"steps_seen": seen.figures()} if seen else {}


def shape(job: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of a shape; the tokenizer of a folder or a tiny one."""
    from shapes import make_checkpoint

    tokenizer = Path(job["tokenizer"]) if job["tokenizer"] else None
    return {"checkpoint": str(make_checkpoint(job["shape"], Path(job["output"]), tokenizer))}


def rate_of(job: dict[str, Any]) -> float:
    """The learning rate of all contenders."""
    return FULL_RATE if job["full"] else LEARNING_RATE


def measure_limit(job: dict[str, Any]) -> dict[str, Any]:
    """The machine, the compute type, and the least seconds for an epoch: learning our labels, and learning all tokens."""
    import torch
    from matrix_limit import limit, measure_rates, shapes_of
    from transformers import AutoConfig, AutoModelForCausalLM

    from gemma_tune.base.listener import Listener
    from gemma_tune.encoding.tokens import lengths_of, open_tokens
    from gemma_tune.models.placement import choose_placement
    from gemma_tune.models.source import locate

    checkpoint = locate(job["model"], None, Listener()).path
    placement = choose_placement("auto")
    with torch.device("meta"):
        shapes = shapes_of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)),
                           None if job["full"] else RANK)
    lengths = [int(n) for n in lengths_of(open_tokens(Path(job["tokens"])))]
    rates = measure_rates(shapes, placement.device, placement.dtype)
    # Of each sequence all tokens but the first can be learned.
    whole = sum(lengths) - len(lengths)
    return {"checkpoint": str(checkpoint.resolve()), "device": placement.device, "dtype": placement.short,
            "gpu": torch.cuda.get_device_name() if placement.device == "cuda" else None,
            "threads": torch.get_num_threads(), "versions": {name: version(name) for name in PACKAGES},
            "rates_gflops": {f"{i} x {o}": rate / 1e9 for (i, o), rate in rates.items()},
            "trained_only": limit(shapes, rates, lengths, job["trained"]), "all_tokens": limit(shapes, rates, lengths, whole)}


def trl(job: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer on the conversations with TRL's defaults: fp32 weights under bf16 autocast, activation checkpointing,
    loss on all tokens, random order. The schedule and LoRA are those of all contenders."""
    from datasets import Dataset

    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    return _train_with_trl(job, Dataset.from_list([{"messages": json.loads(line)["messages"]} for line in lines]))


def trl_best(job: dict[str, Any]) -> dict[str, Any]:
    """SFTTrainer with the settings that make it fastest here: bf16 weights, activations kept, our labels, rows of
    similar length together, a fused optimiser; on a GPU Liger's kernels, or those of ``kernels``, where installed."""
    from datasets import Dataset

    from gemma_tune.encoding.tokens import open_tokens

    model_settings: dict[str, Any] = {"dtype": "bfloat16" if job["dtype"] == "bf16" else "float32"}
    settings: dict[str, Any] = {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    if job["device"] == "cuda":
        settings["optim"] = "adamw_torch_fused"
        if find_spec("liger_kernel"):
            settings["use_liger_kernel"] = True
        elif find_spec("kernels"):
            model_settings["use_kernels"] = True
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].tolist()}
            for row in open_tokens(Path(job["tokens"]))]
    return _train_with_trl(job, Dataset.from_list(rows), model_init_kwargs=model_settings, **settings)


def _train_with_trl(job: dict[str, Any], rows: Any, model_init_kwargs: dict[str, Any] | None = None,
                    **settings: Any) -> dict[str, Any]:
    import torch
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        """Seconds in training steps, as this project's own summary counts them."""

        seconds = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds += time.perf_counter() - self.began
            print(f"step {state.global_step} of {state.max_steps}: {self.seconds:.1f} s", file=sys.stderr, flush=True)

    clock, seen = Clock(), step_clock.watch(job["profile"])
    if job["qlora"]:
        model_init_kwargs = (model_init_kwargs or {}) | {"quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16)}
    steps = -(-len(rows) // job["batch_size"]) * job["epochs"]
    lora = None if job["full"] else LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear",
                                               task_type="CAUSAL_LM")
    arguments = SFTConfig(
        output_dir=job["output"], per_device_train_batch_size=job["batch_size"], num_train_epochs=job["epochs"],
        learning_rate=rate_of(job), lr_scheduler_type="cosine", warmup_steps=round(WARMUP * steps), seed=SEED,
        max_length=None, use_cpu=job["device"] == "cpu", report_to=[], logging_steps=1, save_strategy="no",
        disable_tqdm=True, model_init_kwargs=model_init_kwargs, **settings)
    trainer = SFTTrainer(model=job["checkpoint"], args=arguments, train_dataset=rows, peft_config=lora,
                         processing_class=_tokenizer(job), callbacks=[clock])
    trainer.train()
    trainer.model.save_pretrained(job["output"])
    learned = [label != IGNORE_INDEX for row in trainer.train_dataset for label in row.get("labels", row["input_ids"])[1:]]
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"seconds": clock.seconds, "rows": len(rows), "steps": trainer.state.global_step, "trained_tokens": sum(learned),
            "tokens": sum(len(row["input_ids"]) for row in trainer.train_dataset), "losses": losses,
            "steps_seen": seen.figures()}


def _tokenizer(job: dict[str, Any]) -> Any:
    """The checkpoint's tokenizer with the chat template that this project trains with."""
    from gemma_tune.base.checkpoint import read_config
    from gemma_tune.encoding.tokenizer import load_format

    checkpoint = Path(job["checkpoint"])
    return load_format(checkpoint, read_config(checkpoint)["model_type"]).tokenizer


def fp32(job: dict[str, Any]) -> dict[str, Any]:
    """The same training in fp32 by PEFT and PyTorch alone, for its held-out loss: whole logits, plain cross-entropy."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import get_cosine_schedule_with_warmup, set_seed

    from gemma_tune.encoding.tokens import lengths_of, open_tokens
    from gemma_tune.lora.layers import target_modules
    from gemma_tune.train.batches import LengthGroupedBatches, Share

    rows, size = open_tokens(Path(job["tokens"])), job["batch_size"]
    model = _base_in_fp32(job)
    set_seed(SEED)
    if not job["full"]:
        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, task_type="CAUSAL_LM",
                                                 target_modules=target_modules(model, ())))
    model.train()
    order = LengthGroupedBatches(lengths_of(rows), Share(size), SEED)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate_of(job), weight_decay=0.0)
    steps = -(-len(rows) // size) * job["epochs"]
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    losses = []
    for epoch in range(job["epochs"]):
        order.set_epoch(epoch)
        for indices in order.steps():
            batch = [rows[int(n)] for n in indices]
            count = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in batch)
            losses.append(0.0)
            for row in batch:  # one by one, so that their logits fit into memory
                loss = summed_loss(model, row) / count
                loss.backward()
                losses[-1] += loss.item()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            print(f"step {len(losses)} of {steps}: loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
    model.save_pretrained(job["output"])
    return {"losses": losses, "rows": len(rows), "steps": steps}


def judge(job: dict[str, Any]) -> dict[str, Any]:
    """The loss in nats per trained token of the held-out rows: the base model's, and with each adapter on it, in fp32."""
    import torch
    from peft import PeftModel

    from gemma_tune.encoding.tokens import open_tokens

    rows = open_tokens(Path(job["held_out"]))
    count = sum(int((row["labels"][1:] != IGNORE_INDEX).sum()) for row in rows)
    losses = {}
    for name, adapter in {"base": None, **job["adapters"]}.items():
        whole = adapter and (Path(adapter) / "config.json").exists()  # a model, and no adapter
        model = _base_in_fp32(job | ({"checkpoint": adapter} if whole else {}))
        if adapter and not whole:
            model = PeftModel.from_pretrained(model, adapter)
        model.eval()
        with torch.no_grad():
            losses[name] = sum(summed_loss(model, row).item() for row in rows) / count
        print(f"{name}: {losses[name]:.4f}", file=sys.stderr, flush=True)
    return {"losses": losses, "rows": len(rows), "trained_tokens": count}


def _base_in_fp32(job: dict[str, Any]) -> Any:
    import torch

    from gemma_tune.models.load import load_model
    from gemma_tune.models.placement import Placement

    return load_model(Path(job["checkpoint"]), Placement(job["device"], torch.float32, "the reference"))


def summed_loss(model: Any, row: dict[str, Any]) -> Any:
    """Cross-entropy in nats, summed over the trained tokens of one sequence."""
    import torch

    ids, labels = (torch.as_tensor(row[name], device=model.device) for name in ("input_ids", "labels"))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")


JOBS = {"cli": cli, "shape": shape, "limit": measure_limit, "trl": trl, "trl-best": trl_best, "fp32": fp32, "judge": judge}


def main() -> None:
    name, path, *arguments = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    result = JOBS[name](job, *arguments) | step_clock.memory()
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
