"""Runs whose prepared rows have pictures."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from gemma_tune.answers.generation import BROKEN
from gemma_tune.answers.sight import _TAKEN
from gemma_tune.base.fingerprints import fingerprint
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import eye_of, pictures_of
from gemma_tune.encoding.sequences import Encoder
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.encoding.tokens import TokenWriter
from gemma_tune.lora.load import add_adapter
from support.command import QUICK, invoke, rows, write_rows
from support.models import make_seeing
from support.towers import make_seer

SIDE = 56  # pixels, as many as the small Gemma sees


def make_picture(folder: Path, seed: int) -> str:
    """A PNG file of noise under the name that ``prepare`` gives it, as rows have that."""
    folder.mkdir(exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "new.png")
    name = hashlib.sha256((folder / "new.png").read_bytes()).hexdigest() + ".png"
    (folder / "new.png").rename(folder / name)
    return f"pictures/{name}"


TEMPLATE = ("{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
            "{{ p.text if p.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' }}{% endfor %}{% endif %}<done>"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")  # for Qwen


def trained_seer(family: str, place: Path) -> Path:
    """A run up to the adapter with six validation rows, of text alone; its model is ``models/seer`` beside it."""
    model, run = place / "models" / "seer", place / "runs" / "seer"
    if family == "gemma3":
        make_seeing(model)
    else:
        make_seer(family, model)
        (model / "chat_template.jinja").write_text(TEMPLATE)
    for args in (("prepare", write_rows(place / "rows.jsonl", rows()), "--model", model, "--valid", 6),
                 ("train", *QUICK[:-1], 3e-2, "--keep", "last", "--samples", 0)):
        result = invoke(*args, "--run", run)
        assert result.code == 0, result.err
    return run


def format_that_sees(model: Path, run: Path) -> ChatFormat:
    chat = load_format(model, json.loads((model / "config.json").read_text())["model_type"])
    chat.eye = eye_of(model, chat.tokenizer, run / "data" / "pictures")
    return chat


def show_pictures(run: Path, model: Path, which: Callable[[int], int]) -> dict[str, list[dict[str, Any]]]:
    """Put pictures into the prepared rows of a run, with their tokens, as if it had been prepared and trained so.

    Args:
        which: how many the n-th row of a side has.

    Returns:
        The rows by side.
    """
    chat, found = format_that_sees(model, run), {}
    manifest = json.loads((run / "manifest.json").read_text())
    for side in ("train", "valid"):
        path = run / "data" / f"{side}.jsonl"
        prepared = found[side] = [json.loads(line) for line in path.read_text().splitlines()]
        for n, row in enumerate(prepared):
            turn = next(turn for turn in row["messages"] if turn["role"] == "user")
            if count := which(n):
                folder, seed = run / "data" / "pictures", 100 * len(found) + 10 * n
                turn["pictures"] = [{"at": at, "file": make_picture(folder, seed + at)} for at in range(count)]
        write_rows(path, prepared)
        with TokenWriter(run / "data" / "tokens" / f"{side}.arrow") as writer:
            for outcome in Encoder(chat, 8192).encode(prepared):
                writer.add([(s.ids, s.spans.reshape(-1), " ".join(name for name, _ in s.pictures)) for s in outcome.kept])
    for stage, kind in (("prepare", "outputs"), ("train", "inputs")):
        for name, entry in manifest["stages"].get(stage, {kind: {}})[kind].items():
            if name in ("train_rows", "valid_rows", "tokens"):
                entry |= fingerprint(run / entry["path"])
    (run / "manifest.json").write_text(json.dumps(manifest))
    return found


def generated(model: Any, chat: ChatFormat, prompt: list[dict[str, Any]], tokens: int) -> tuple[str, Any]:
    """What transformers' own ``generate`` answers, greedily, where the model looks at the pictures itself; and the logits
    (tokens, vocabulary)."""
    ids, eye = torch.tensor([chat.prompt_ids(prompt)]), chat.eye
    shown = [eye.inputs(name) for name in pictures_of(prompt)]
    inputs = {key: torch.cat([one[key] for one in shown]) for key in _TAKEN if shown and key in shown[0]}
    if shown:
        inputs[eye.marks] = (ids == eye.soft_id).long()
    with torch.no_grad():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                             eos_token_id=chat.stop_ids, pad_token_id=chat.stop_ids[0], return_dict_in_generate=True,
                             output_logits=True, **inputs)
    written = itertools.takewhile(lambda token: token not in chat.stop_ids, out.sequences[0, ids.shape[1]:].tolist())
    return chat.said(chat.decoded([*written])).rstrip(BROKEN), torch.cat(out.logits)


class Looking:
    """Base and tuned model of a run as transformers has them, which look at the pictures themselves."""

    def __init__(self, model: Path, run: Path):
        self.chat = format_that_sees(model, run)
        base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self.tuned = add_adapter(base, next(run.glob("*_lora_adapter")))

    def answers(self, prompt: list[dict[str, Any]], tokens: int) -> list[str]:
        """Of both."""
        with self.tuned.disable_adapter():
            base = generated(self.tuned, self.chat, prompt, tokens)[0]
        return [base, generated(self.tuned, self.chat, prompt, tokens)[0]]
