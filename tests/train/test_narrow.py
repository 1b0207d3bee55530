"""Trainings whose base keeps its weights in bf16 and computes in fp32: the adapters of fp32, bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma_tune.config.stages import TrainConfig
from gemma_tune.models import narrow, placement
from gemma_tune.models.narrow import Narrow
from gemma_tune.train import job, memory
from gemma_tune.train.memory import USABLE, estimate
from gemma_tune.train.shape import shape_of
from support.command import invoke, rows, write_rows
from support.narrow import without_instructions
from support.training import adapter_bytes, stop_at

STEPS = ("--rank", 4, "--learning-rate", 1e-2, "--epochs", 2, "--samples", 0)
LEAST = ("--activation-checkpointing", "--micro-batch", 1)
RUN = Path("runs/tiny-gemma")


@pytest.fixture
def prepared(tiny, tmp_path, monkeypatch):
    """A run on such a CPU, whose products are with whole weights: of pieces the library might add up otherwise."""
    without_instructions(monkeypatch)
    monkeypatch.setattr(narrow, "FEW", 0)
    for module in (narrow, placement, memory):
        monkeypatch.setattr(module, "PLACE", 1 << 15)
    assert invoke("prepare", write_rows(tmp_path / "rows.jsonl", rows()), "--model", tiny).code == 0


def trained(*flags: object) -> dict:
    result = invoke("train", *STEPS, *flags, "--json")
    assert result.code == 0, result.err
    return {"summary": result.json["summary"], "adapter": adapter_bytes(RUN), "err": result.err}


@pytest.mark.parametrize("flags", [(), ("--dora", "--dropout", 0.1), LEAST, ("--qlora",)], ids=str)
def test_the_adapter_is_that_of_fp32(prepared, flags):
    if "--qlora" in flags:
        pytest.importorskip("bitsandbytes")
    kept, wide = trained("--dtype", "bf16", *flags), trained("--dtype", "fp32", *flags, "--force")
    assert kept["adapter"] == wide["adapter"]
    assert (kept["summary"]["dtype"], wide["summary"]["dtype"]) == ("bf16", "fp32")
    assert "computing in bf16 on cpu, as asked: weights in bf16 and products in fp32" in kept["err"]
    assert kept["summary"]["eval_loss_after"] == wide["summary"]["eval_loss_after"]


def test_of_rewards_as_well(prepared):
    flags = ("--method", "grpo", "--reward", "chrf", "--answers", 4, "--max-new-tokens", 6, "--max-steps", 3)
    assert trained(*flags, "--dtype", "bf16")["adapter"] == trained(*flags, "--dtype", "fp32", "--force")["adapter"]


def kinds_of_weights(monkeypatch) -> list[set[type]]:
    """Of each model that is loaded for a training."""
    from gemma_tune.train import stage

    seen, theirs = [], stage.load_model

    def load(*args, **how):
        model = theirs(*args, **how)
        seen.append({type(p) for p in model.parameters() if p.ndim > 1})
        return model

    monkeypatch.setattr(stage, "load_model", load)
    return seen


def needs(dtype: str) -> int:
    """Bytes that the least training needs."""
    return invoke("train", *STEPS, *LEAST, "--dtype", dtype, "--dry-run", "--json").json["memory"]["total"]


def test_it_is_taken_where_fp32_does_not_fit(cli, prepared, monkeypatch):
    wide, kept = needs("fp32"), needs("bf16")
    assert kept < wide
    expected, seen = trained("--dtype", "fp32", *LEAST)["adapter"], kinds_of_weights(monkeypatch)
    monkeypatch.setattr(job, "available", lambda device: int(wide / USABLE) + 1)
    assert trained("--dtype", "auto", "--force")["summary"]["dtype"] == "fp32"
    monkeypatch.setattr(job, "available", lambda device: int((wide + kept) / 2 / USABLE))
    planned = cli("train", *STEPS, "--force", "--dry-run", "--json")
    assert planned.json["dtype"] == "bf16" and planned.json["fits"]
    says = "bf16 on the CPU, as fp32 does not fit the memory: weights in bf16 and products in fp32"
    assert says in " ".join(planned.json["notes"]) and says in " ".join(planned.err.split())
    found = trained("--force")
    assert found["adapter"] == expected and found["summary"]["dtype"] == "bf16" and says in found["err"]
    assert seen == [{torch.nn.Parameter}, {Narrow}]
    refused = cli("train", *STEPS, "--dtype", "fp32", "--force")
    assert refused.code == 2 and "and " in refused.err and "are available" in refused.err
    monkeypatch.setattr(job, "available", lambda device: int(kept / USABLE) - 10_000)
    refused = cli("train", *STEPS, "--force")
    assert refused.code == 2 and "this training needs about" in refused.err


def test_a_training_that_is_interrupted_goes_on_so(cli, prepared, monkeypatch):
    """Also where there is more memory by then."""
    wide, kept = needs("fp32"), needs("bf16")
    whole = RUN.with_name("whole")
    shutil.copytree(RUN, whole)
    monkeypatch.setattr(job, "available", lambda device: int((wide + kept) / 2 / USABLE))
    assert cli("train", *STEPS, "--run", whole).code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert cli("train", *STEPS, "--run", RUN).code == 130
    monkeypatch.setattr(job, "available", lambda device: 10 * wide)
    seen = kinds_of_weights(monkeypatch)
    resumed = cli("train", *STEPS, "--run", RUN, "--json")
    assert resumed.code == 0 and "bf16 on cpu, as the training began" in resumed.err, resumed.err
    assert (resumed.json["summary"]["dtype"], resumed.json["summary"]["resumed_from_step"]) == ("bf16", 2)
    assert adapter_bytes(RUN) == adapter_bytes(whole) and seen == [{Narrow}]
    again = cli("train", *STEPS[:-4], "--epochs", 3, "--samples", 0, "--continue", "--run", RUN, "--json")
    assert again.code == 0 and again.json["summary"]["dtype"] == "bf16" and seen == [{Narrow}] * 2


@pytest.mark.parametrize("flags", [("--full", "--learning-rate", 1e-4), ("--modules-to-save", "embed_tokens")], ids=str)
def test_weights_that_are_trained_are_no_such(cli, prepared, monkeypatch, flags):
    seen = kinds_of_weights(monkeypatch)
    result = cli("train", *(STEPS[2:] if "--full" in flags else STEPS), "--dtype", "bf16", *flags, "--json")
    assert result.code == 0, result.err
    assert seen == [{torch.nn.Parameter}] and result.json["summary"]["dtype"] == "bf16"
    assert "fp32 is many times as fast" in result.err


def test_the_estimate_of_such_weights(tiny, monkeypatch):
    monkeypatch.setattr(narrow, "LEAST", 1)
    monkeypatch.setattr(memory, "PLACE", 1000)
    config = TrainConfig(rank=4)
    wide = shape_of(tiny, config, torch.float32)
    kept = shape_of(tiny, config, torch.float32, narrow=True)
    vectors = sum(p.numel() for p in wide.model.get_base_model().parameters() if p.ndim == 1)
    assert 0 < vectors < 1000 and kept.large == kept.parameters - vectors and replace(kept, narrow=False) == replace(
        wide, kept=kept.kept)
    found, four_bit, plain = (estimate(shape, 1, 64, checkpointing=False, four_bit=packed, device="cpu")
                              for shape, packed in ((kept, False), (kept, True), (wide, False)))
    assert found.weights == 2 * kept.large + 4 * vectors + 4 * 1000
    assert replace(found, weights=0) == replace(plain, weights=0)
    assert four_bit.weights == pytest.approx(4.127 / 8 * kept.linear + 2 * (kept.large - kept.linear) + 4 * vectors
                                             + 4 * (1000 + 64 * 128), abs=2)


def test_answers_of_the_tuned_model_and_its_check(cli, prepared, monkeypatch):
    """Where fp32 does not fit, `eval`, `chat` and the merge's check say the same as where it does."""
    trained("--dtype", "fp32")
    Path("asked.jsonl").write_text('{"prompt": "Say number 3."}\n')
    commands = (("eval", "--max-new-tokens", 4), ("chat", "--use", "adapter", "--input", "asked.jsonl", "-n", 4), ("merge",))
    seen, found = [], []
    theirs = narrow.keep_narrow
    monkeypatch.setattr(narrow, "keep_narrow", lambda *args: seen.append(args) or theirs(*args))
    for tight in (False, True):
        if tight:
            monkeypatch.setattr(placement, "_need", lambda chosen, *rest: 0 if chosen.stored else 1e18)
        found.append([])
        for command in commands:
            result = cli(*command, *(["--force"] if tight and command[0] != "chat" else []), "--json")
            assert result.code == 0, result.err
            found[-1].append(result)
        assert len(seen) == (4 if tight else 0)  # a merge loads two
    (eval_wide, chat_wide, merge_wide), (eval_kept, chat_kept, merge_kept) = found
    assert "weights in bf16 and products in fp32" in chat_kept.err and "fp32 on the CPU" in chat_wide.err
    assert json.loads(chat_kept.out.splitlines()[0]).get("answer") == json.loads(chat_wide.out.splitlines()[0]).get("answer")
    for name in ("check_divergence", "check_adapter_effect"):
        assert merge_kept.json["summary"][name] == pytest.approx(merge_wide.json["summary"][name], rel=1e-3, abs=1e-7)
    for name in ("loss", "general_loss"):
        before, after = (result.json["summary"]["measures"][name]["tuned"][0] for result in (eval_wide, eval_kept))
        assert after == pytest.approx(before, rel=1e-5)
