"""What a training made, and what it should make, without our own code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from gemma_tune.base.errors import INTERRUPTED
from support.command import Result, invoke


def adapter_bytes(run: Path) -> bytes:
    return (run / "tiny-gemma_lora_adapter" / "adapter_model.safetensors").read_bytes()


def by_hand(run: Path, side: str) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the prepared rows, of one question each, without our own code."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / json.loads((run / "manifest.json").read_text())["model"]["path"])
    sequences = []
    for line in (run / "data" / f"{side}.jsonl").read_text().splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        prompt, learned = (tokenizer(text, add_special_tokens=False).input_ids for text in (
            f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n", f"{answer}<end_of_turn>"))
        sequences.append((prompt + learned, [-100] * len(prompt) + learned))
    return sequences


def plain_loss(model, sequences: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Sum in nats, and number of learned tokens."""
    total = count = 0
    for ids, labels in sequences:
        labels = torch.tensor(labels[1:])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        count += (labels != -100).sum().item()
    return total, count


def stop_at(monkeypatch, step: int) -> None:
    """As if Ctrl-C came during this step."""
    from gemma_tune.train.callbacks import StopRequest

    plain = StopRequest.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        self.requested = self.requested or state.global_step == step
        return plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopRequest, "on_step_end", on_step_end)


def stopped_at(step: int, monkeypatch, *flags: object) -> Result:
    """``train`` with these flags, as if Ctrl-C came during this step."""
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        result = invoke("train", *flags)
    assert result.code == INTERRUPTED, result.err
    return result
