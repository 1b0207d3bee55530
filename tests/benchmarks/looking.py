"""What it saves to look at a picture once, and not in each step.

A Gemma 3 of random weights with the SigLIP of the 4B (896 pixels to a side), and of its text model the widths and two layers,
learns one row with a picture, in fp32 on one thread: for some epochs with what was seen in it, and for one step with looking at
it in that step. Prints one JSON object with CPU seconds; ``--small`` tries the script. ``python tests/benchmarks/looking.py``,
from the repository.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `support`, where tests find it by themselves

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

from gemma_tune.answers.sight import inputs_beside, see
from gemma_tune.encoding.eye import Eye, eye_of
from gemma_tune.lora.layers import target_modules
from gemma_tune.train.batches import collate
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from support.models import PICTURES, make_tokenizer
from support.shown import noise

TEXT = dict(vocab_size=262_208, hidden_size=2560, intermediate_size=10_240, num_hidden_layers=2, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, query_pre_attn_scalar=256, sliding_window=1024)
TOWER = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14)
SMALL = dict(TEXT, vocab_size=600, hidden_size=64, intermediate_size=96, head_dim=32), dict(
    TOWER, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def made(folder: Path, small: bool) -> tuple[Any, Eye, dict[str, Any]]:
    """The model with an adapter on it, its eye, and a batch of one row with a picture."""
    text, tower = SMALL if small else (TEXT, TOWER)
    side, tokens = (112, 4) if small else (896, 256)
    make_tokenizer(folder, PICTURES)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    begin, end, soft = tokenizer.convert_tokens_to_ids(PICTURES)
    config = Gemma3Config(text_config=text, vision_config=tower | {"image_size": side}, mm_tokens_per_image=tokens,
                          boi_token_index=begin, eoi_token_index=end, image_token_index=soft)
    config.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": tokens, "size": {"height": side, "width": side}}))
    noise(1, (1200, 800)).save(folder / "0.png")
    eye = eye_of(folder, tokenizer, folder)
    assert eye is not None
    written = eye.shown(f"Which colour? {eye.place}", ["0.png"])
    ids = torch.tensor(tokenizer(f"{written} red it is", add_special_tokens=False).input_ids)
    labels = torch.where(torch.arange(len(ids)) < len(ids) - 4, -100, ids)
    model = Gemma3ForConditionalGeneration(config)
    tuned = get_peft_model(model, LoraConfig(r=16, target_modules=target_modules(model, ()))).train()
    install_summed_loss(tuned.get_base_model())
    return tuned, eye, collate([{"input_ids": ids, "labels": labels, "pictures": ["0.png"]}])


def seconds(work: Callable[[], Any]) -> float:
    """Of the processor's time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(epochs: int, small: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        tuned, eye, batch = made(Path(folder), small)
        base, kept = tuned.get_base_model(), {}
        looking = seconds(lambda: kept.update(see(base.eval(), eye, "0.png")))

        def step(features: dict[str, torch.Tensor]) -> None:
            seen = inputs_beside(eye, batch["input_ids"], [features])
            GemmaTrainer._summed_loss(tuned.train(), batch | {"seen": seen}).backward()

        with fast_layers(tuned):
            step(kept)  # what the first step alone has to do
            steps = seconds(lambda: [step(kept) for _ in range(epochs)])
            each = seconds(lambda: step(see(base, eye, "0.png")))
    once, always = looking + steps, epochs * each
    return {"tokens": batch["input_ids"].shape[1], "epochs": epochs, "looking_once": round(looking, 2), "step": round(steps / epochs, 2),
            "step_with_looking": round(each, 2), "once": round(once, 2), "always": round(always, 2), "ratio": round(always / once, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model")
    args = parser.parse_args()
    print(json.dumps(measure(args.epochs, args.small)))


if __name__ == "__main__":
    main()
