"""Unsloth as a contender of ``train_speed.py``, in an environment of its own; see "Training" in README.md beside it.

``python contender_unsloth.py ROWS.jsonl CHECKPOINT ADAPTER``: LoRA on every linear layer in bf16 (or on 4 bits), no
activation checkpointing, the assistant's turns learned, with the schedule of the other contenders, which comes in the
environment (``TRAIN_SPEED``). Prints its figures as the last line.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

# Read when the library is imported. Its compiled code would go into the working directory.
os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

import unsloth  # noqa: E402, I001  (before the libraries that it changes)
from unsloth.chat_templates import train_on_responses_only  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import step_clock  # noqa: E402
import train_contenders as common  # noqa: E402


def main() -> None:
    rows_path, checkpoint, adapter = sys.argv[1:]
    job = json.loads(os.environ["TRAIN_SPEED"])
    steps_seen = step_clock.watch(profile=job["profile"])
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        checkpoint, max_seq_length=4096, load_in_4bit=job["qlora"], dtype=None, use_gradient_checkpointing=False,
        use_exact_model_name=True)
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=common.RANK, lora_alpha=common.ALPHA, lora_dropout=common.DROPOUT, random_state=common.SEED,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=False)
    rows = [json.loads(line)["messages"] for line in Path(rows_path).read_text(encoding="utf-8").splitlines()]
    # The trainer puts the first token itself.
    bos = tokenizer.bos_token or ""
    texts = [tokenizer.apply_chat_template(row, tokenize=False).removeprefix(bos) for row in rows]
    steps = -(-len(rows) // job["batch_size"]) * job["epochs"]
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict({"text": texts}),
        args=SFTConfig(
            output_dir=adapter, per_device_train_batch_size=job["batch_size"], num_train_epochs=job["epochs"],
            learning_rate=common.LEARNING_RATE, lr_scheduler_type="cosine", warmup_steps=round(common.WARMUP * steps),
            seed=common.SEED, dataset_text_field="text", max_length=4096, bf16=True, report_to=[], logging_steps=1,
            save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused", weight_decay=0.0,
            train_sampling_strategy="group_by_length"))
    trainer = train_on_responses_only(
        trainer, instruction_part="<start_of_turn>user\n", response_part="<start_of_turn>model\n")
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    model.save_pretrained(adapter)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    print(json.dumps({"seconds": seconds, "rows": len(rows), "train_loss": sum(losses) / len(losses), "adapter": adapter,
                      "steps_seen": steps_seen.figures(), **step_clock.memory()}))


if __name__ == "__main__":
    main()
