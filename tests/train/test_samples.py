"""Answers at each evaluation: they are the model's, take little time, and change nothing of the training."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from gemma_tune.train import samples
from support.command import rows, write_rows
from support.training import stop_at

RUN = Path("runs/talkative")
ADAPTER = RUN / "talkative_lora_adapter" / "adapter_model.safetensors"
FLAGS = ("--epochs", 2, "--rank", 8, "--dtype", "fp32", "--learning-rate", 1e-2, "--keep", "last", "--json")


@pytest.fixture
def prepared(cli, talkative, tmp_path):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(14)), "--model", talkative).code == 0


@pytest.fixture
def affordable(monkeypatch):
    """A training that is so long that answers are a small part of it."""
    monkeypatch.setattr(samples, "SHARE", 1000.0)


def asked() -> list[dict]:
    return [json.loads(line) for line in (RUN / "logs" / "samples.jsonl").read_text().splitlines()]


def evaluated() -> list[int]:
    log = [json.loads(line) for line in (RUN / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in log if "eval_loss" in r]


def plain_answer(model, question: str) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RUN / "talkative_lora_adapter")
    ids = tokenizer(f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
                    add_special_tokens=False, return_tensors="pt").input_ids
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=stops,
                         max_new_tokens=samples.MOST_TOKENS, pad_token_id=0)[0, ids.shape[1]:]
    return tokenizer.decode(out, skip_special_tokens=True)


def test_answers_at_each_evaluation_are_those_of_base_and_trained_model(cli, prepared, talkative, affordable):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    result = cli("train", *FLAGS)
    assert result.code == 0, result.err
    assert [(r["step"], r["prompt"]) for r in asked()] == [(step, n) for step in evaluated() for n in (0, 1)]
    assert evaluated()[0] == 0 and len(evaluated()) == 3
    held_out = [json.loads(line)["messages"][0]["content"] for line in (RUN / "data" / "valid.jsonl").read_text().splitlines()]
    assert [r["begins"] for r in asked()[:1]] == held_out[:1] and asked()[1]["begins"] not in held_out
    base = AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32)
    for record in asked()[:2]:
        assert record["answer"] == plain_answer(base, record["begins"]) and record["tokens"] > 0
    tuned = PeftModel.from_pretrained(base, RUN / "talkative_lora_adapter")
    last = asked()[-2:]
    for record in last:
        assert record["answer"] == plain_answer(tuned, record["begins"])
    assert [r["answer"] for r in last] != [r["answer"] for r in asked()[:2]]
    assert f"before the first step, “{held_out[0]}”: " in result.err
    assert f"“{held_out[0]}” – base model: " in result.err and " – trained: " in result.err


@pytest.mark.parametrize("more", [("--dropout", 0.3), ("--qlora",), ("--activation-checkpointing",), ("--dora", "--dropout", 0.1)],
                         ids=lambda more: more[0])
def test_the_adapter_is_the_same_bit_for_bit_with_and_without(cli, prepared, affordable, more):
    found = []
    for count in (2, 0):
        result = cli("train", *FLAGS, *more, "--samples", count, "--force")
        assert result.code == 0, result.err
        found.append((ADAPTER.read_bytes(), result.json["summary"]["eval_loss_after"]))
        assert (RUN / "logs" / "samples.jsonl").exists() == bool(count)
    assert found[0] == found[1]


def test_without_validation_rows_the_base_and_the_trained_model_answer(cli, talkative, tmp_path, affordable):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(6)), "--model", talkative, "--valid", 0).code == 0
    assert cli("train", *FLAGS, "--samples", 3).code == 0
    assert [(r["step"], r["prompt"], r["begins"]) for r in asked()] == [
        (step, n, f"Say number {n}.") for step in (0, 4) for n in range(3)]


def test_the_kept_adapter_s_answers_are_compared(cli, prepared, affordable, monkeypatch):
    from gemma_tune.train.best import Best

    monkeypatch.setattr(Best, "_keep", lambda self, step, loss, plain=Best._keep: plain(self, step, loss) if step < 5 else None)
    result = cli("train", *(flag for flag in FLAGS if flag not in ("--keep", "last")))
    assert result.code == 0, result.err
    assert result.json["summary"]["kept_step"] == 4 and " – after step 4: " in result.err


def test_what_would_take_too_long_is_left_out_and_said(cli, prepared):
    result = cli("train", *FLAGS)
    assert result.code == 0, result.err
    assert not (RUN / "logs" / "samples.jsonl").exists()
    assert "no sample answers: they would take more than 4% of the training's time" in result.err


def test_an_answer_is_cut_off_at_its_time(cli, prepared, monkeypatch):
    """What it may take follows from what the steps take: the rest of the answer is left out."""
    plain, began = samples.greedy_continuations, time.perf_counter()

    def slow(model, *args):
        step = model.forward

        def waiting(*args, **kwargs):
            time.sleep(0.01)
            return step(*args, **kwargs)

        model.forward = waiting
        return plain(model, *args)

    monkeypatch.setattr(samples, "LEAST", 0.02)
    monkeypatch.setattr(samples.Samples, "_affordable", lambda self, step, parts: 0.05 * self.count)
    monkeypatch.setattr(samples, "greedy_continuations", slow)
    assert cli("train", *FLAGS, "--samples", 1).code == 0
    assert time.perf_counter() - began < 20
    assert all(r["seconds"] < 1 and 0 < r["tokens"] <= 6 and not r["ended"] for r in asked())


def test_answers_that_fail_do_not_end_the_training(cli, prepared, affordable, monkeypatch):
    assert cli("train", *FLAGS, "--samples", 0).code == 0
    expected = ADAPTER.read_bytes()

    def fails(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(samples, "greedy_continuations", fails)
    result = cli("train", *FLAGS, "--force")
    assert result.code == 0, result.err
    assert result.err.count("no sample answers from now on: CUDA out of memory") == 1
    assert ADAPTER.read_bytes() == expected


def test_a_resumed_training_has_each_answer_once(cli, prepared, affordable, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        assert cli("train", *FLAGS).code == 130
    before = asked()
    assert cli("train", *FLAGS).code == 0
    assert asked()[:len(before)] == before
    assert [(r["step"], r["prompt"]) for r in asked()] == [(step, n) for step in evaluated() for n in (0, 1)]


# --- how the time is divided

class Steps:
    """A training of 100 steps with evaluations every 25 of them, 1 s each."""

    sharded, eval_dataset = False, object()
    args = type("Args", (), {"max_steps": 100, "eval_steps": 25})
    accelerator = type("Accelerator", (), {"device": torch.device("cpu")})

    @staticmethod
    def expected_seconds() -> float:
        return 100.0


@pytest.fixture
def asking(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from gemma_tune.base.listener import Listener

    def make(busy: float = 0.0):
        session = SimpleNamespace(run=SimpleNamespace(samples=tmp_path / "samples.jsonl"), listener=Listener())
        made = samples.Samples(session, None, 2, SimpleNamespace(busy=busy, first_step=0))
        made.trainer = Steps()
        return made

    return make


def test_the_time_is_divided_among_all_evaluations(asking):
    share = samples.SHARE
    assert asking()._affordable(0, None) == pytest.approx(share * 100 / 5, rel=0.05)
    assert asking(50)._affordable(50, None) == pytest.approx(share * 50 / 3, rel=0.05), "what steps took says more"
    spent = asking(50)
    spent.seconds = share * 50
    assert spent._affordable(50, None) < samples.LEAST
