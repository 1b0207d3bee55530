"""Rows of new tokens in weights that are kept in bf16, where what computes is fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from gemma_tune.lora.token_rows import TokenRows
from gemma_tune.models.narrow import Narrow, Place
from support.command import invoke, write_rows
from support.merging import merged_tensors
from support.models import make_model
from support.narrow import without_instructions

NEW = ("<plan>", "<label_7>")
RUN = Path("runs/tiny-gemma")
STEPS = ("--max-steps", 3, "--learning-rate", 5e-3, "--rank", 4, "--samples", 0, "--json")
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def done(*args: object):
    result = invoke(*args)
    assert result.code == 0, result.err
    return result


@pytest.fixture(scope="session")
def unused(tmp_path_factory) -> Path:
    """A tiny Gemma with unused entries in its vocabulary."""
    return make_model(tmp_path_factory.mktemp("narrow") / "tiny-gemma", more=tuple(f"<unused{n}>" for n in range(4)))


@pytest.fixture
def prepared(unused, tmp_path, monkeypatch):
    without_instructions(monkeypatch)
    talks = [{"messages": [{"role": "user", "content": f"Say {n}, <plan> please."},
                           {"role": "assistant", "content": f"<label_7> It is {n}. <plan>"}]} for n in range(12)]
    done("prepare", write_rows(tmp_path / "rows.jsonl", talks), "--model", unused, "--new-tokens", ",".join(NEW))


def rows_of() -> torch.Tensor:
    return load_file(RUN / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")[ROWS]


@pytest.mark.parametrize("flags", [(), ("--dora",), ("--activation-checkpointing", "--micro-batch", 1), ("--qlora",)], ids=str)
def test_they_learn_as_in_fp32(prepared, flags):
    """But for their rounding: what is read and multiplied is in 16 bits, as is all of such a weight."""
    if "--qlora" in flags:
        pytest.importorskip("bitsandbytes")
    kept = done("train", *STEPS, "--dtype", "bf16", *flags)
    assert "weights in bf16 and products in fp32" in kept.err
    narrow = rows_of()
    done("train", *STEPS, "--dtype", "fp32", *flags, "--force")
    torch.testing.assert_close(narrow, rows_of(), rtol=0, atol=2e-3)


@pytest.mark.parametrize("more", [(), ("--beta", 0.1, "--temperature", 1.5)], ids=str)
def test_they_learn_from_rewards(prepared, unused, more):
    done("train", *STEPS, "--method", "grpo", "--reward", "regex:a", "--answers", 8, "--max-new-tokens", 12, "--dtype", "bf16", *more)
    base = load_file(unused / "model.safetensors")["model.embed_tokens.weight"].float()
    start = torch.stack([base[AutoTokenizer.from_pretrained(unused)(name, add_special_tokens=False).input_ids].mean(0) for name in NEW])
    moved = (rows_of() - start).abs().amax(1)
    assert (moved > 1e-4).all() and (moved < 3.1 * 5e-3).all()  # three of Adam's steps at most
    if more:  # the model before has the rows that it began with
        divergences = [step["kl"] for line in (RUN / "logs/metrics.jsonl").read_text().splitlines() if "kl" in (step := json.loads(line))]
        assert abs(divergences[0]) < 1e-6 < divergences[-1]


def test_what_answers_and_is_merged_has_them(prepared):
    done("train", *STEPS, "--dtype", "bf16")
    Path("asked.jsonl").write_text('{"prompt": "Say 3, <plan> please."}\n')
    for use in ("adapter", "base"):
        done("chat", "--use", use, "--dtype", "bf16", "--input", "asked.jsonl", "-n", 4)
    done("eval", "--max-new-tokens", 4, "--quiet")
    done("merge")
    assert torch.equal(merged_tensors(RUN)["model.embed_tokens.weight"][6:8], rows_of().bfloat16())


def test_rows_alone_are_written_and_rounded():
    kept = torch.randn(9, 4).bfloat16()
    before, module = kept.clone(), torch.nn.Embedding(9, 4)
    module.weight = torch.nn.Parameter(Narrow(kept, Place()), False)
    learned = torch.randn(2, 4)
    rows = TokenRows(module, [7, 3], learned)
    assert torch.equal(kept[[7, 3]], learned.bfloat16()) and torch.equal(kept[:3], before[:3])
    with torch.inference_mode():
        rows.enable_adapters(False)
    assert torch.equal(kept, before)
