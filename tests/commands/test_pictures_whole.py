"""A person's pictures, from a file of rows to answers of the merged model, each stage as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
from PIL import Image
from safetensors.torch import load_file

from support.command import MANIFEST_SCHEMA, write_rows

RUN = Path("runs/seer")
COLOURS = {"red": (230, 20, 20), "blue": (20, 20, 230)}
LEARNING = ("--epochs", 12, "--rank", 8, "--dtype", "fp32", "--learning-rate", 1e-2, "--batch-size", 4)


def rows_of_squares(folder: Path, count: int = 24) -> list[dict]:
    """As LLaMA-Factory has them: squares in two colours, one question, and answers that only the picture tells."""
    (folder / "squares").mkdir()
    rows = []
    for n in range(count):
        name, colour = [*COLOURS.items()][n % 2]
        Image.new("RGB", (40 + n, 50), tuple(min(255, part + n) for part in colour)).save(folder / "squares" / f"{n}.png")
        rows.append({"conversations": [{"from": "human", "value": "<image>Which colour?"}, {"from": "gpt", "value": f"It is {name}."}],
                     "images": [f"squares/{n}.png"]})
    return rows


def test_from_rows_to_the_answers_of_the_merged_model(cli, seer, tmp_path):
    shutil.copytree(seer, tmp_path / "seer")
    data = write_rows(tmp_path / "rows.jsonl", rows_of_squares(tmp_path))
    for args in (("prepare", data, "--model", "seer", "--valid", 0.25), ("train", *LEARNING), ("merge", "--dtype", "fp32")):
        result = cli(*args)
        assert result.code == 0, result.err
    jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)
    lines = [json.loads(line) for line in (RUN / "data/train.jsonl").read_text().splitlines()]
    named = [picture["file"] for line in lines for turn in line["messages"] for picture in turn.get("pictures", ())]
    assert len(named) == len(lines) and all((RUN / "data" / name).is_file() for name in named)
    assert not any("vision" in name or "projector" in name for name in load_file(
        next(RUN.glob("*_lora_adapter")) / "adapter_model.safetensors")), "what sees is left alone"
    for which in ("adapter", "merged"):
        for name, number in (("red", 0), ("blue", 1)):
            asked = cli("chat", "--use", which, "--dtype", "fp32", "--image", f"squares/{number}.png", "--prompt", "Which colour?",
                        "--json", "--temperature", 0)
            assert asked.code == 0 and asked.json["answer"].strip() == f"It is {name}.", asked.err
