"""Prepared runs whose rows show pictures."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from support.command import invoke, rows, write_rows

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 40, 230), "white": (250, 250, 250)}


def kept(run: Path, picture: Image.Image) -> str:
    """A picture's file in the run's data, by the hash of its bytes; its name."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    name = f"{hashlib.sha256(file.getvalue()).hexdigest()}.png"
    (run / "data" / "pictures").mkdir(exist_ok=True)
    (run / "data" / "pictures" / name).write_bytes(file.getvalue())
    return name


def noise(seed: int, size: tuple[int, int] = (60, 44)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def plain(colour: str, seed: int = 0) -> Image.Image:
    """One colour, nearly."""
    dirt = np.random.default_rng(seed).integers(-12, 13, (44, 60, 3))
    return Image.fromarray((np.array(COLOURS[colour]) + dirt).clip(0, 255).astype(np.uint8))


def row(answer: str, *names: str, question: str = "Which colour is it?") -> dict[str, Any]:
    """A question about pictures, which stand before it; none is a question of text."""
    turn: dict[str, Any] = {"role": "user", "content": question}
    if names:
        turn["pictures"] = [{"at": 0, "file": f"pictures/{name}"} for name in names]
    return {"messages": [turn, {"role": "assistant", "content": answer}]}


def begun(model: Path, run: Path) -> Path:
    """A run of rows of text alone, to which :func:`prepare` gives others."""
    run.parent.mkdir(parents=True, exist_ok=True)
    done = invoke("prepare", write_rows(run.parent / "rows.jsonl", rows(6)), "--model", model, "--valid", 2, "--run", run)
    assert done.code == 0, done.err
    return run


def prepare(model: Path, run: Path, train: Sequence[dict[str, Any]], valid: Sequence[dict[str, Any]]) -> Path:
    """Give a run these rows, as ``prepare`` would write them, in this order."""
    from gemma_tune.encoding.sequences import Encoder
    from gemma_tune.encoding.tokenizer import load_format
    from gemma_tune.encoding.tokens import TokenWriter
    from gemma_tune.run.directory import RunDir, describe
    from gemma_tune.run.manifest import read_manifest
    from gemma_tune.run.stopped import SEQUENCES, rows_of

    manifest = read_manifest(run)
    paths = RunDir(run, manifest.model_name)
    chat = load_format(model, json.loads((model / "config.json").read_text())["model_type"])
    chat.eye.folder = paths.pictures
    for side, records in (("train", train), ("valid", valid)):
        write_rows(paths.data / f"{side}.jsonl", list(records))
        with TokenWriter(paths.tokens / f"{side}.arrow") as writer:
            for outcome in Encoder(chat, 2048).encode(list(records)):
                writer.add([(found.ids, found.spans.reshape(-1), " ".join(name for name, _ in found.pictures))
                            for found in outcome.kept])
    outputs = manifest.stages["prepare"]["outputs"]
    manifest.stages["prepare"]["summary"][SEQUENCES] = rows_of(paths.tokens)
    for name, path in (("train_rows", paths.train_rows), ("valid_rows", paths.valid_rows), ("tokens", paths.tokens)):
        outputs[name] = describe(paths, path)
    manifest.save(paths)
    return run
