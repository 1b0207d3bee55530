"""A step that is not finite names the rows of its batch, in the words of those whose data they are."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.run.directory import RunDir
from gemma_tune.train.culprits import names_of
from support.command import rows, write_rows
from support.training import adapter_bytes

FLAGS = ("--epochs", 2, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-3, "--batch-size", 4, "--json")
ODD = "Zq? Say a number, please."  # what only one row asks


@pytest.fixture
def odd_rows(tmp_path) -> Path:
    """Rows in a file, of which line 6 alone has the token of the letter Z."""
    records = rows(9)
    records[5]["messages"][0]["content"] = ODD
    return write_rows(tmp_path / "mine.jsonl", records)


@pytest.fixture
def harmed(talkative, tmp_path):
    """A base model whose embedding of one letter is no number: nothing shows that before the row that has it."""
    from transformers import AutoTokenizer

    base = Path(shutil.copytree(talkative, tmp_path / "talkative"))
    weights = load_file(base / "model.safetensors")
    token = AutoTokenizer.from_pretrained(base)("Z", add_special_tokens=False).input_ids[-1]
    weights["model.embed_tokens.weight"][token, 3] = torch.inf
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def error_of(result, code: int = 1) -> dict:
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    return result.json["error"]


def test_a_row_that_meets_a_bad_weight_is_named_with_its_file_and_line(cli, harmed, odd_rows):
    assert cli("prepare", odd_rows, "--model", harmed, "--valid", 0).code == 0
    error = error_of(cli("train", *FLAGS))
    assert error["message"].startswith("the loss is not finite at step ")
    assert "that comes from 1 of the 4 rows of its batch" in error["message"]
    assert "the base model holds infinities or no numbers (NaN) in 1 tensor" in error["message"]
    assert error["problems"] == [f"{odd_rows}:6 (runs/talkative/data/train.jsonl:6): {ODD!r}"]
    assert error["hint"].startswith("download the model again")
    assert not Path("runs/talkative/talkative_lora_adapter").exists()


def test_so_it_is_where_nobody_waits_for_a_step(cli, harmed, odd_rows, monkeypatch):
    """As on a GPU: the figures are looked at a step later, and the optimiser leaves the weights as they are meanwhile."""
    from gemma_tune.train import job, late
    from gemma_tune.train.gradients import Gradients
    from gemma_tune.train.trainer import GemmaTrainer

    arguments, begin = job._arguments, GemmaTrainer.__init__

    def fused(*args):
        made = arguments(*args)
        made.optim = "adamw_torch_fused"
        return made

    def not_waiting(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.waits, self.gradients = False, Gradients(dict(zip(self.gradients.names, self.gradients.weights)), fixed=True)

    monkeypatch.setattr(job, "_arguments", fused)
    monkeypatch.setattr(GemmaTrainer, "__init__", not_waiting)
    monkeypatch.setattr(late.LateFigures, "read", lambda self, everything=False, plain=late.LateFigures.read: (
        plain(self, everything) if everything or len(self._waiting) > 1 else []))
    assert cli("prepare", odd_rows, "--model", harmed, "--valid", 0).code == 0
    error = error_of(cli("train", *FLAGS))
    assert "the loss is not finite at step 1 (nan)" in error["message"]
    assert "that comes from 1 of the 4 rows of its batch" in error["message"]
    assert error["problems"] == [f"{odd_rows}:6 (runs/talkative/data/train.jsonl:6): {ODD!r}"]


def test_steps_that_are_too_large_name_all_rows_of_the_batch(cli, trained):
    """Real steps: each multiplies the adapter by the rate times the decay, until numbers overflow."""
    before = adapter_bytes(trained)
    error = error_of(cli("train", "--epochs", 3, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1, "--warmup", 0,
                         "--weight-decay", 1e12, "--eval-steps", 100, "--force", "--json"))
    assert "not finite at step " in error["message"], error
    assert "with each of the" in error["message"]
    assert 2 < len(error["problems"]) <= 4
    assert all(re.search(r"rows\.jsonl:\d+ .*'Say number \d+\.'$", problem) for problem in error["problems"])
    assert "a lower --learning-rate than 1" in error["hint"]
    assert adapter_bytes(trained) == before


def test_the_rows_are_those_of_the_step(cli, odd_rows, talkative, monkeypatch):
    """All of it, with accumulation too, and in a step in the middle of the training."""
    from gemma_tune.train.trainer import GemmaTrainer

    plain, seen = GemmaTrainer.compute_loss, []

    def poisoned(self, model, inputs, **kwargs):
        loss = plain(self, model, inputs, **kwargs)
        if self.state.global_step == 1 and model.training:
            seen.append(sorted(map(tuple, (ids[:n].tolist() for ids, n in zip(inputs["input_ids"], inputs["lengths"])))))
            return loss * float("nan")
        return loss

    assert cli("prepare", odd_rows, "--model", talkative, "--valid", 0).code == 0
    monkeypatch.setattr(GemmaTrainer, "compute_loss", poisoned)
    error = error_of(cli("train", *FLAGS, "--batch-size", 2, "--accumulation", 2))
    assert "not finite at step 2" in error["message"] and "with each of the 4 rows of its batch" in error["message"]
    lines = [int(re.search(r"train\.jsonl:(\d+)", problem)[1]) for problem in error["problems"]]
    tokens = open_tokens(Path("runs/talkative/data/tokens/train.arrow"))
    assert sorted(tuple(map(int, tokens[line - 1]["input_ids"])) for line in lines) == sorted(seen[0] + seen[1])


# --- how rows are named

def test_names_without_origins_are_lines_of_the_prepared_rows(prepare, tmp_path):
    prepare(write_rows(tmp_path / "rows.jsonl", [{"text": "A plain\ntext."}, *rows(3)]), "--valid", 0)
    run = RunDir(Path("runs/tiny-gemma"), "tiny-gemma")
    named = names_of(run, open_tokens(run.tokens / "train.arrow"))
    assert named([2, 0]) == [f"{tmp_path}/rows.jsonl:3 (runs/tiny-gemma/data/train.jsonl:3): 'Say number 1.'",
                             f"{tmp_path}/rows.jsonl:1 (runs/tiny-gemma/data/train.jsonl:1): 'A plain text.'"]
    (run.data / "origins.npy").unlink()
    assert named([1]) == ["runs/tiny-gemma/data/train.jsonl:2: 'Say number 0.'"]
    run.train_rows.unlink()
    assert named([1]) == ["runs/tiny-gemma/data/train.jsonl:2: ''"]


def test_parts_of_one_conversation_are_one_row(prepare, tmp_path):
    talk = {"messages": [m for r in rows(6) for m in r["messages"]]}
    prepare(write_rows(tmp_path / "rows.jsonl", [talk]), "--valid", 0, "--max-length", 60, "--on-long", "split")
    run = RunDir(Path("runs/tiny-gemma"), "tiny-gemma")
    tokens = open_tokens(run.tokens / "train.arrow")
    assert len(tokens) > 2 and len(names_of(run, tokens)(range(len(tokens)))) == 1
    assert json.loads(run.train_rows.read_text())
