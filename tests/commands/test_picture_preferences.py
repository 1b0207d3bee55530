"""``train`` on pairs and judged answers whose questions show pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from support.command import write_rows
from support.shown import COLOURS, plain

RUN = Path("runs/seer")
FLAGS = ("--dtype", "fp32", "--rank", 8, "--learning-rate", 5e-3, "--epochs", 6, "--samples", 0, "--batch-size", 4)


@pytest.fixture
def rows(seer, tmp_path) -> list[tuple[dict, str, str]]:
    """Questions for a colour, the answer, and another one; the pictures lie where the rows say."""
    shutil.copytree(seer, tmp_path / "seer")
    made = []
    for n in range(6):
        for at, colour in enumerate(COLOURS):
            plain(colour, n).save(tmp_path / f"{colour}{n}.png")
            wrong = [*COLOURS][(at + 1 + n % 3) % 4]
            made.append(({"images": [f"{colour}{n}.png"]}, colour, wrong))
    return made


def pairs(rows) -> list[dict]:
    return [shown | {"prompt": "<image>Which colour is it?", "chosen": good, "rejected": bad} for shown, good, bad in rows]


def judged(rows) -> list[dict]:
    return [shown | {"prompt": "<image>Which colour is it?", "completion": answer, "label": answer is good}
            for shown, good, bad in rows for answer in (good, bad)]


@pytest.fixture
def prepared(cli, tmp_path):
    def prepare(records: list[dict]) -> None:
        text = [{key: value for key, value in records[n].items() if key != "images"} | {"prompt": f"What is {n}?"} for n in (0, 1, 2)]
        result = cli("prepare", write_rows(tmp_path / "rows.jsonl", records + text), "--model", "seer", "--valid", 0.2)
        assert result.code == 0, result.err

    return prepare


def by_pixels(side: str) -> list[float]:
    """Log-probabilities of the prepared answers, by transformers' own model from the pictures themselves."""
    chat = load_format(Path("seer"), "gemma3")
    chat.eye.folder = RUN / "data/pictures"
    model = load_model(Path("seer"), choose_placement("fp32"), sight="towers").eval()
    found = []
    for row in open_tokens(RUN / f"data/tokens/{side}.arrow"):
        ids, labels = torch.as_tensor(row["input_ids"])[None], torch.as_tensor(row["labels"])[None]
        shown = {"pixel_values": torch.cat([chat.eye.inputs(name)["pixel_values"] for name in row["pictures"]])} if row[
            "pictures"] else {}
        with torch.no_grad():
            logits = model(input_ids=ids, token_type_ids=(ids == chat.eye.soft_id).long(), **shown).logits
        logps = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        found.append(float(logps[labels[0, 1:] != -100].sum()))
    return found


@pytest.mark.parametrize("method", ["dpo", "orpo", "kto"])
def test_the_better_answer_comes_to_depend_on_the_picture(cli, rows, prepared, method):
    prepared(judged(rows) if method == "kto" else pairs(rows))
    result = cli("train", *FLAGS, "--method", method, "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert summary["pictures"] == 24
    assert summary["eval_loss_after"] < 0.8 * summary["eval_loss_before"]
    log = [json.loads(line) for line in (RUN / "logs/metrics.jsonl").read_text().splitlines()]
    if method != "kto":
        assert [line for line in log if "eval_rewards/accuracies" in line][-1]["eval_rewards/accuracies"] >= 0.7
    if method != "orpo":
        kept = load_file(RUN / "logs/reference.safetensors")
        for side in ("train", "valid"):
            np.testing.assert_allclose(kept[side], by_pixels(side), rtol=1e-4, atol=1e-3)


def test_a_picture_inside_what_is_compared(cli, rows, tmp_path):
    """What both answers are said to is the same."""
    [_, good, bad], turn = rows[0], {"role": "user", "content": [{"type": "image", "image": "red0.png"}, {"type": "text", "text": "And?"}]}
    later = [{"role": "assistant", "content": good, "train": True}, turn, {"role": "assistant", "content": good, "train": True}]
    record = {"prompt": [{"role": "user", "content": "Hello"}], "chosen": later, "rejected": [{"role": "assistant", "content": bad}]}
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", [record]), "--model", "seer")
    assert result.code == 2 and "a picture stands inside the answer that is compared" in " ".join(result.err.split())


def test_eval_looks_at_what_stands_before_bad_answers_alone(cli, rows, tmp_path):
    good, bad = judged(rows)[:30:2], judged(rows)[31::2]
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", good), "--valid", write_rows(tmp_path / "valid.jsonl", bad),
                 "--model", "seer")
    assert result.code == 0, result.err
    result = cli("train", *FLAGS[:-4], "--max-steps", 2, "--samples", 0, "--method", "kto")
    assert result.code == 0, result.err
    shutil.rmtree(RUN / "seen")
    result = cli("eval", "--dtype", "fp32", "--json")
    assert result.code == 0, result.err
    [base, _] = [result.json["summary"]["measures"]["worse_log_probability"][side][0] for side in ("base", "tuned")]
    np.testing.assert_allclose(base, np.mean(by_pixels("valid")), rtol=1e-4)
