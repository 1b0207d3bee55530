"""Answers at each evaluation: they are the model's, take little time, and change nothing of the training."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from train.test_looking import FP32, adapted

from gemma_tune.answers import generation
from gemma_tune.answers.prompts import Prompt
from gemma_tune.answers.sight import Seen
from gemma_tune.base.checkpoint import read_config
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.models.load import load_model
from gemma_tune.train import samples
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from support import seers
from support.command import copied_run, invoke, rows, write_rows
from support.listener import Said
from support.seeing import generated
from support.training import stopped_at

FLAGS = ("--max-steps", 2, "--eval-steps", 1, "--save-steps", 3, "--rank", 8, "--dtype", "fp32", "--learning-rate", 3e-2, "--keep",
         "last", "--json")


@pytest.fixture(scope="module")
def answered_once(talkative, tmp_path_factory):
    """A run trained so long that answers are a small part of it, and what was said."""
    place = tmp_path_factory.mktemp("answered")
    run, data = place / "runs" / "talkative", write_rows(place / "rows.jsonl", rows(14))
    assert invoke("prepare", data, "--model", talkative, "--run", run).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "SHARE", 1000.0)
        patch.setattr(samples, "MOST_TOKENS", 12)
        result = invoke("train", *FLAGS, "--dropout", 0.3, "--run", run)
    assert result.code == 0, result.err
    return run, result.err


@pytest.fixture
def answered(answered_once, talkative, tmp_path) -> Path:
    """The same as a run of one's own."""
    return copied_run(answered_once[0], tmp_path, talkative)


@pytest.fixture
def affordable(monkeypatch):
    monkeypatch.setattr(samples, "SHARE", 1000.0)
    monkeypatch.setattr(samples, "MOST_TOKENS", 4)


def asked(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "logs" / "samples.jsonl").read_text().splitlines()]


def evaluated(run: Path) -> list[int]:
    log = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [r["step"] for r in log if "eval_loss" in r]


def adapter(run: Path) -> bytes:
    return (run / "talkative_lora_adapter" / "adapter_model.safetensors").read_bytes()


def plain_answer(model, tokenizer, question: str) -> str:
    ids = tokenizer(f"<bos><start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n",
                    add_special_tokens=False, return_tensors="pt").input_ids
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=stops,
                         max_new_tokens=12, pad_token_id=0)[0, ids.shape[1]:]
    return tokenizer.decode(out, skip_special_tokens=True)


def test_answers_are_those_of_the_base_and_the_trained_model(answered_once, talkative):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, said = answered_once
    found = asked(run)
    assert evaluated(run) == [0, 1, 2]
    assert [(r["step"], r["prompt"]) for r in found] == [(step, n) for step in (0, 1, 2) for n in (0, 1)]
    held_out = [json.loads(line)["messages"][0]["content"] for line in (run / "data" / "valid.jsonl").read_text().splitlines()]
    assert [r["begins"] for r in found[:1]] == held_out[:1]
    tokenizer = AutoTokenizer.from_pretrained(run / "talkative_lora_adapter")
    model = AutoModelForCausalLM.from_pretrained(talkative, dtype=torch.float32)

    def as_plain(records: list[dict]) -> None:
        for record in records:
            answer = plain_answer(model, tokenizer, record["begins"])
            assert record["answer"].rstrip("\ufffd") == answer.rstrip("\ufffd"), "but for half a character"

    as_plain(found[:2])
    model = PeftModel.from_pretrained(model, run / "talkative_lora_adapter")
    as_plain(found[4:])
    assert [r["answer"] for r in found[:2]] != [r["answer"] for r in found[4:]]
    assert f"before the first step, “{held_out[0]}”: " in said and f"after step 1, “{held_out[0]}”: " in said
    assert f"“{held_out[0]}” – base model: " in said and " – trained: " in said


def test_the_adapter_is_the_same_bit_for_bit_without(cli, answered):
    """Dropout draws the same random numbers. There is no time for answers here, and that is said."""
    expected = adapter(answered)
    result = cli("train", *FLAGS, "--dropout", 0.3, "--force")
    assert result.code == 0, result.err
    assert adapter(answered) == expected
    assert not (answered / "logs" / "samples.jsonl").exists()
    assert "no sample answers: they would take more than 4% of the training's time" in result.err


def test_so_it_is_with_dora_on_a_base_of_4_bits_and_recomputed_activations(cli, answered, affordable):
    found = []
    for count in (1, 0):
        result = cli("train", *FLAGS, "--dora", "--qlora", "--activation-checkpointing", "--samples", count, "--force")
        assert result.code == 0, result.err
        found.append((adapter(answered), result.json["summary"]["eval_loss_after"]))
        assert (answered / "logs" / "samples.jsonl").exists() == bool(count)
    assert found[0] == found[1]


def test_without_validation_rows_the_base_and_the_trained_model_answer(cli, talkative, tmp_path, affordable):
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", rows(6)), "--model", talkative, "--valid", 0).code == 0
    done = cli("train", *FLAGS, "--samples", 3)
    assert done.code == 0, done.err
    assert [(r["step"], r["prompt"], r["begins"]) for r in asked(Path("runs/talkative"))] == [
        (step, n, f"Say number {n}.") for step in (0, 2) for n in range(3)]


def test_the_kept_adapter_is_asked_and_compared(cli, answered, affordable, monkeypatch):
    """Also if there was no time for it before."""
    from gemma_tune.train.best import Best

    plain = Best.keep
    monkeypatch.setattr(Best, "keep", lambda self, step, *more: plain(self, step, *more) if step < 2 else None)
    monkeypatch.setattr(samples.Samples, "_affordable", lambda self, step, parts: 1000.0 if parts else 0.0)
    result = cli("train", *FLAGS, "--keep", "best", "--samples", 1, "--force")
    assert result.code == 0, result.err
    assert result.json["summary"]["kept_step"] == 1 and " – after step 1: " in result.err
    assert [r["step"] for r in asked(answered)] == [0, 1]


def test_answers_that_fail_do_not_end_the_training(cli, answered, affordable, monkeypatch):
    expected = adapter(answered)

    def fails(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(samples, "greedy_continuations", fails)
    result = cli("train", *FLAGS, "--dropout", 0.3, "--force")
    assert result.code == 0, result.err
    assert result.err.count("no sample answers from now on: CUDA out of memory") == 1
    assert adapter(answered) == expected


def test_a_resumed_training_has_each_answer_once(cli, answered, affordable, monkeypatch):
    stopped_at(1, monkeypatch, *FLAGS, "--samples", 1, "--force")
    before = asked(answered)
    assert cli("train", *FLAGS, "--samples", 1).code == 0
    assert [r["step"] for r in before] == [0, 1] and asked(answered)[:2] == before
    assert [r["step"] for r in asked(answered)] == [0, 1, 2]


def test_the_base_model_is_not_compared_with_itself(asking):
    """Where a training that goes on has lowered no loss, the adapter of before stays."""
    made = asking()
    made.session.listener = said = Said()
    made.records = [{"step": step, "prompt": n, "begins": "q", "answer": "a", "ended": True} for step in (0, 4) for n in range(2)]
    made.compare(0, 4)
    assert not said.notes
    made.compare(4, 4)
    assert said.notes == ["“q” – base model: a – trained: a"] * 2


# --- pictures

@pytest.mark.parametrize("family", ["gemma3", "qwen3.5", "gemma4-small"])
@pytest.mark.parametrize("base", [True, False], ids=["base", "trained"])
def test_a_picture_is_seen_through_the_layers_of_the_training(family, base, tmp_path, monkeypatch):
    """As by transformers' own pass over pixels: parts of a picture see each other, though layers are replaced."""
    folder = seers.make(family, tmp_path / "seer")
    chat = load_format(folder, read_config(folder)["model_type"])
    chat.eye.folder = seers.write_pictures(tmp_path)
    whole = load_model(folder, FP32, sight="towers").eval()
    seen = Seen(tmp_path / "seen", chat.eye, "fingerprint", "float32")
    for name in ("0.png", "2.png"):
        seen.look(whole, name)
    tuned, whole = adapted(load_model(folder, FP32, sight="features")), adapted(whole).eval()
    install_summed_loss(tuned.get_base_model())
    asking = samples.Samples(SimpleNamespace(run=SimpleNamespace(samples=None)), chat, 1, None)
    asking.trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")), model=tuned, compiled=False,
                                     causal_lm=tuned.get_base_model(), shown=SimpleNamespace(seen=seen))
    asking.trainer.evaluating = MethodType(GemmaTrainer.evaluating, asking.trainer)
    logits = []
    monkeypatch.setattr(generation, "refuse_not_finite", lambda scores, model: logits.append(scores.clone()))
    turns = [seers.asked("what is it", "0.png", "2.png")]
    with fast_layers(tuned):
        asking._answer(Prompt(turns), 1000.0, base)
    with whole.disable_adapter() if base else nullcontext():
        _, theirs = generated(whole, chat, turns, samples.MOST_TOKENS)
    assert len(logits) > 1
    torch.testing.assert_close(torch.cat(logits), theirs, rtol=1e-4, atol=1e-3)


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
