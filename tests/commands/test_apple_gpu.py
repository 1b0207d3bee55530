"""Commands on a double of Apple's GPU, which has the operators that PyTorch has for it, and no float64."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from support import apple_gpu
from support.command import rows, write_rows
from support.llamas import save_random, tokenizer_with_turns
from support.models import make_model

pytestmark = pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available() or not shutil.which("g++"),
                                reason="compiled by g++ on Linux, beside no other GPU")
FLAGS = ("--max-steps", 4, "--rank", 4, "--learning-rate", 5e-3, "--samples", 0, "--json", "--quiet")
PAIRS = [{"prompt": f"Say number {n}.", "chosen": f"{n}.", "rejected": f"Well, {n} it is, or so."} for n in range(12)]


@pytest.fixture(scope="module")
def mac(tmp_path_factory):
    with contextlib.closing(apple_gpu.Mac(apple_gpu.build(tmp_path_factory.mktemp("apple")))) as mac:
        yield mac


def test_the_double_refuses_what_a_mac_refuses(mac):
    """Of four lines the first one is computed; the others are an operator without a kernel, float64 and two devices."""
    said = mac.prints("""
import torch
x = torch.arange(12.0, device="mps").view(3, 4).requires_grad_()
for work in (lambda: (x.T[1] @ x).sum().backward() or x.grad.tolist(), lambda: torch.segment_reduce(x[0], "sum", lengths=x[0].long()),
             lambda: x.double(), lambda: x @ torch.ones(4, 4)):
    try:
        print(work())
    except Exception as e:
        print(type(e).__name__, str(e).splitlines()[0])
""")
    x = torch.arange(12.0).view(3, 4).requires_grad_()
    (x.T[1] @ x).sum().backward()
    assert said[0] == str(x.grad.tolist())
    assert said[1].startswith("NotImplementedError The operator 'aten::segment_reduce'")
    assert said[2].startswith("TypeError") and "float64" in said[2]
    assert said[3].startswith("RuntimeError") and "same device" in said[3]


@pytest.fixture
def prepared(cli, tmp_path):
    """Runs `sft` and `pairs`, in which a window is shorter than the rows, and `experts`."""
    model = make_model(tmp_path / "base", sliding_window=16, num_hidden_layers=2,
                       layer_types=["sliding_attention", "full_attention"])
    tokenizer = tokenizer_with_turns()
    mixture = Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        eos_token_id=tokenizer.eos_token_id))
    save_random(mixture, tokenizer, tmp_path / "mixture")
    for name, data, base in (("sft", rows(16), model), ("pairs", PAIRS, model), ("experts", rows(16), tmp_path / "mixture")):
        assert cli("prepare", write_rows(tmp_path / f"{name}.jsonl", data), "--model", base, "--run", name).code == 0


def test_training_and_answering_need_what_is_there(mac, prepared):
    """Adapters of each kind, checkpoints of activations, each way to learn from pairs, experts; answers one by one and in
    batches."""
    commands = [("train", "--run", "sft", *FLAGS),  # in bf16, which is chosen there
                ("train", "--run", "sft", "--force", "--dora", "--activation-checkpointing", *FLAGS),
                ("train", "--run", "sft", "--force", "--rslora", "--dropout", 0.1, "--dtype", "fp16",
                 "--modules-to-save", "norm", *FLAGS),
                ("chat", "--run", "sft", "--prompt", "Say number 3.", "-n", 8, "--json"),
                ("chat", "--run", "sft", "--prompt", "Say number 3.", "-n", 8, "--temperature", 0.8, "--top-k", 5,
                 "--top-p", 0.9, "--repetition-penalty", 1.1, "--compare"),
                ("eval", "--run", "sft", "--max-new-tokens", 4, "--json", "--quiet"),
                ("merge", "--run", "sft", "--json", "--quiet"),
                *(("train", "--run", "pairs", "--force", "--method", method, *FLAGS) for method in ("dpo", "orpo", "kto")),
                ("train", "--run", "experts", "--target-modules", "all,experts", *FLAGS),
                ("chat", "--run", "experts", "--prompt", "Say number 3.", "-n", 8, "--json")]
    found = mac.results(commands)
    for command, result in zip(commands, found):
        assert result["code"] == 0, (command, result["err"])
    assert '"device": "mps"' in found[0]["out"] and '"dtype": "bf16"' in found[0]["out"]
    assert not steps_as_one("sft"), "the last training there was in fp16"
    assert steps_as_one("experts")


def steps_as_one(run: str) -> bool:
    """Whether the step of AdamW was that of all weights at once."""
    saved = torch.load(next(Path(run, "training_checkpoints").glob("checkpoint-*/optimizer.pt")), "cpu", weights_only=True)
    return bool(saved["param_groups"][0]["fused"])


def test_a_training_goes_on_there_with_the_masks_that_it_would_have_had(mac, prepared):
    shutil.copytree("sft", "whole")
    steady = ("--schedule", "constant", "--warmup", 0, "--dropout", 0.3)
    commands = [("train", "--run", "sft", *FLAGS, *steady, "--max-steps", 2),
                ("train", "--run", "sft", "--continue", "--max-steps", 4, "--quiet"),
                ("train", "--run", "whole", *FLAGS, *steady)]
    for command, result in zip(commands, mac.results(commands)):
        assert result["code"] == 0, (command, result["err"])
    sft, whole = (Path(run, "base_lora_adapter", "adapter_model.safetensors").read_bytes() for run in ("sft", "whole"))
    assert sft == whole


def test_the_time_of_the_longest_batch_is_told_when_it_is_done(mac, prepared):
    """What is computed there is only begun when Python goes on."""
    code = f"""
from unittest import mock
from support.command import invoke
with mock.patch("torch.mps.synchronize") as wait:
    assert invoke("train", "--run", "sft", *{FLAGS}, "--max-steps", 1).code == 0
print(wait.call_count)
"""
    assert mac.prints(code)[-1] == "1"


def test_it_learns_there_what_it_learns_on_a_cpu(cli, mac, prepared, monkeypatch):
    command = ("train", "--run", "sft", "--dtype", "fp32", *FLAGS)
    [there] = mac.results([command])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    here = cli(*command, "--force").json["summary"]
    summary = json.loads(there["out"])["summary"]
    assert (summary["device"], here["device"]) == ("mps", "cpu")
    for name in ("eval_loss_before", "eval_loss_after", "adapter_norm"):
        assert summary[name] == pytest.approx(here[name], rel=1e-3), name
    assert Path("sft/base_lora_adapter/adapter_model.safetensors").exists() and not steps_as_one("sft")
