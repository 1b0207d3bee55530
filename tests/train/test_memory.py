"""What a training needs in memory and what there is: counted on shapes, chosen from, and refused before any weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.models import placement
from gemma_tune.models.placement import USABLE
from gemma_tune.train import job, kernels
from gemma_tune.train import memory as memory_module
from gemma_tune.train import shape as model_shape
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.memory import choose, estimate, in_use
from gemma_tune.train.shape import ModelShape, shape_of
from support.command import QUICK
from support.gemmas import make_family
from support.hub import LoopbackHub
from support.models import make_model
from support.prepared import same_examples
from support.triton_cpu import interpreted

SMALL = TrainConfig(rank=4)


def real_kept(checkpoint: Path, rows: int, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd really keeps of one forward pass, with the layers of a CPU unless others were put in."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa")
    model = get_peft_model(model, lora_config(SMALL, targets_of(model, SMALL))).train()
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    sizes, alive = {}, []

    def count(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with fast_layers(model), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model.get_base_model().get_decoder()(input_ids=torch.ones(rows, length, dtype=torch.long), use_cache=False)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "length"), [(1, 16), (3, 40), (2, 150)])
def test_what_autograd_keeps_is_counted_without_weights(tiny, tmp_path, dtype, rows, length):
    shutil.copy(tiny / "config.json", tmp_path / "config.json")
    counted = shape_of(tmp_path, SMALL, dtype).kept(rows, length)
    really = real_kept(tiny, rows, length, dtype)
    # Attention's kernels differ in what they keep for a few tokens, and of the mask beyond the window of 64.
    assert really <= counted <= (1.01 if length < 64 else 1.25) * really


def test_what_the_layers_of_a_gpu_keep_is_counted(tiny, monkeypatch):
    """Their kernels are interpreted here; for what is counted none runs."""
    pytest.importorskip("triton")
    plain = shape_of(tiny, SMALL, torch.bfloat16).kept(3, 40)
    monkeypatch.setattr(kernels, "_operations", lambda device: interpreted("gemma_tune.train.fused"))
    counted = shape_of(tiny, SMALL, torch.bfloat16, device="cuda").kept(3, 40)
    really = real_kept(tiny, 3, 40, torch.bfloat16)
    assert really <= counted <= 1.01 * really
    assert counted < 0.95 * plain, "a gated activation keeps its two inputs and nothing else"


def test_several_key_heads(tmp_path):
    model = make_model(tmp_path / "grouped", num_attention_heads=4, num_key_value_heads=2)
    for length in (20, 100):
        counted = shape_of(model, SMALL, torch.bfloat16).kept(2, length)
        assert real_kept(model, 2, length, torch.bfloat16) <= counted <= 1.25 * real_kept(model, 2, length, torch.bfloat16)


@pytest.mark.parametrize("family", ["gemma4-large", "gemma4-small"])
def test_layers_of_two_widths(tmp_path, family):
    """As in Gemma 4, whose configuration has no one width to tell."""
    make_family(family, tmp_path)
    assert shape_of(tmp_path, SMALL, torch.bfloat16).attention == 4 * 32


def test_sizes_are_those_of_the_model(tiny):
    from transformers import AutoModelForCausalLM

    shape = shape_of(tiny, SMALL, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    assert shape.parameters == sum(p.numel() for p in model.parameters()), "tied embeddings count once"
    projections = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert (shape.linear, shape.active) == (2 * projections, 2 * projections)
    assert shape.adapter == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert (shape.adapted, shape.hidden, shape.widest, shape.layers, shape.attention, shape.item) == (14, 64, 128, 2, 64, 2)
    assert shape.head == model.get_output_embeddings().weight.numel()
    some = shape_of(tiny, replace(SMALL, target_modules=("q_proj",)), torch.float32)
    assert (some.adapted, some.adapter, some.item) == (2, 2 * 4 * (64 + 64), 4)


def test_weights_that_are_trained_themselves_are_counted_once(tiny, tmp_path):
    """Also an embedding that is the head."""
    for model, own in ((tiny, 0), (make_model(tmp_path / "untied", tie_word_embeddings=False), 1)):
        shape = shape_of(model, TrainConfig(full=True), torch.bfloat16)
        assert shape.adapter == shape.whole == shape.parameters and shape.adapter_active == 0 and shape.modules == 28 + own
        assert shape.whole_active == shape.active and shape.head_trained
        some = shape_of(model, replace(SMALL, modules_to_save=("embed_tokens", "norm")), torch.bfloat16)
        lora = shape_of(model, SMALL, torch.bfloat16).adapter
        assert some.whole == shape.head + 64 and some.adapter == lora + some.whole and some.adapter_active == lora
        assert some.head_trained == (not own) and some.whole_active == 0 and some.resting == shape.head


@pytest.mark.parametrize(("dtype", "each"), [(torch.bfloat16, 18), (torch.float32, 16)], ids=str)
def test_of_all_weights_the_base_s_own_are_not_in_memory(tiny, dtype, each):
    """But for vectors: fp32 weights, gradients and two moments, and a rounded copy where that is another."""
    shape = shape_of(tiny, TrainConfig(full=True), dtype)
    need = estimate(shape, 1, 8, checkpointing=False, four_bit=False, device="cuda")
    vectors = shape.parameters - shape.resting
    assert 0 < vectors < 1000
    assert need.weights + need.adapter + need.gradients + need.optimizer == each * shape.parameters + dtype.itemsize * vectors
    on_cpu, begun = (estimate(some, 1, 8, checkpointing=False, four_bit=False, device="cpu").total
                     for some in (shape, replace(shape, begun=shape.whole)))
    assert begun - on_cpu == dtype.itemsize * shape.whole, "of an adapter, what was begun with"


def test_a_head_of_its_own_is_not_kept_in_4_bits(talkative):
    shape = shape_of(talkative, SMALL, torch.bfloat16)
    assert shape.parameters - shape.linear > 2 * shape.head
    bits16 = estimate(shape, 1, 8, checkpointing=False, four_bit=False, device="cpu").weights
    bits4 = estimate(shape, 1, 8, checkpointing=False, four_bit=True, device="cpu").weights
    unpacked = 64 * 128 * 2
    assert bits16 == 2 * shape.parameters
    assert bits4 == pytest.approx(2 * (shape.parameters - shape.linear) + 4.127 / 8 * shape.linear + unpacked, abs=2)


def test_the_parts_of_an_estimate(tiny):
    shape = shape_of(tiny, SMALL, torch.bfloat16)
    plain = estimate(shape, 4, 1000, checkpointing=False, four_bit=False, device="cpu")
    assert (plain.adapter, plain.gradients, plain.optimizer) == (4 * shape.adapter, 4 * shape.adapter, 8 * shape.adapter)
    assert plain.activations == round(memory_module.FRAGMENTATION * shape.kept(4, 1000))
    assert plain.total == sum([plain.weights, plain.adapter, plain.gradients, plain.optimizer, plain.activations,
                               plain.working, plain.overhead])
    recomputed = estimate(shape, 4, 1000, checkpointing=True, four_bit=False, device="cpu")
    inputs = 2 * 4000 * 64 * 2  # layers x tokens x hidden x bytes
    assert recomputed.activations == pytest.approx(1.25 * (inputs + shape.kept(4, 1000) / 2), abs=2)
    assert recomputed.total < plain.total


@pytest.mark.parametrize(("settings", "device", "times"), [
    ({}, "cpu", 1), ({"accumulation": 2}, "cpu", 2), ({"accumulation": 2, "micro_batch": 1}, "cuda", 1), ({"num_processes": 2}, "cpu", 2),
    ({"num_processes": 2}, "cuda", 1), ({"accumulation": 2}, "cuda", 2)], ids=str)
def test_gradients_that_are_copied_are_counted_twice(settings, device, times):
    memory = choose(FAKE, TrainConfig(batch_size=2, **settings), 500, device, 10**12).memory
    assert memory.gradients == 4 * times * FAKE.adapter


def test_a_model_whose_code_looks_at_values_gets_a_rough_estimate(tiny, monkeypatch):
    exact = shape_of(tiny, SMALL, torch.bfloat16).kept(2, 40)

    def looks(*_):
        raise NotImplementedError("nonzero on the meta device")

    monkeypatch.setattr(model_shape, "_kept", looks)
    assert exact < shape_of(tiny, SMALL, torch.bfloat16).kept(2, 40) < 3 * exact


@pytest.mark.parametrize(("config", "said"), [
    ({"model_type": "martian"}, "does not know models of the family martian"),
    ({"model_type": "martian", "auto_map": {"AutoConfig": "a.B"}}, "it needs code of its own (auto_map), which is not run"),
    ({"model_type": "llama", "hidden_size": None}, "config.json describes no model that can be trained: Validation error for field 'hidden_size': TypeError"),
    ({"model_type": "clip"}, "transformers has no causal language model of the family clip")])
def test_a_model_that_transformers_does_not_know(tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        shape_of(tmp_path, SMALL, torch.bfloat16)
    assert said in raised.value.message and raised.value.hint


# --- choosing

FAKE = ModelShape(parameters=10**9, linear=8 * 10**8, active=8 * 10**8, adapter=10**7, adapter_active=10**7, adapted=7, experts=0, head=10**8, hidden=2000,
                  widest=8000, layers=20, attention=2000, item=2, kept=lambda rows, length: rows * length * 10**6)


def need(config: TrainConfig, micro_batch: int, checkpointing: bool) -> int:
    copied = config.accumulation > 1 and micro_batch > 1
    return estimate(FAKE, micro_batch, 500, checkpointing=checkpointing, four_bit=config.qlora, device="cpu", gradients=1 + copied).total


@same_examples(300)
@given(st.integers(1, 64), st.integers(1, 4), st.floats(0.1, 60), st.booleans())
def test_the_most_conversations_that_fit_and_recomputing_only_when_needed(batch, accumulation, gigabytes, qlora):
    config = TrainConfig(batch_size=batch, accumulation=accumulation, qlora=qlora)
    room = int(gigabytes * 1e9)
    choice = choose(FAKE, config, 500, "cpu", room)
    pieces = config.batch_size // choice.micro_batch
    assert choice.micro_batch * pieces * accumulation == config.effective_batch
    assert choice.memory.total == need(config, choice.micro_batch, choice.checkpointing)
    divisors = [n for n in range(1, batch + 1) if batch % n == 0]
    plain = [n for n in divisors if need(config, n, False) <= USABLE * room]
    recomputed = [n for n in divisors if need(config, n, True) <= USABLE * room]
    assert choice.fits == bool(plain or recomputed)
    assert choice.checkpointing == (not plain)
    assert choice.micro_batch == max(plain or recomputed or [1])


@pytest.mark.parametrize(("method", "rows"), [("sft", "4 sequences"), ("dpo", "4 pairs"), ("kto", "4 answers")])
def test_why_fewer_go_through_at_once_is_said_of_what_is_trained(method, rows):
    config = TrainConfig(batch_size=4, method=method)
    room = int(need(config, 1, False) / USABLE) + 1
    assert choose(FAKE, config, 500, "cpu", room).reason.startswith(f"{rows} would need ")


@pytest.mark.parametrize(("flag", "stored", "four_bit"), [
    (False, None, False), (True, None, True), (False, {"quant_method": "bitsandbytes", "load_in_4bit": True}, True),
    (False, {"quant_method": "bitsandbytes", "load_in_8bit": True}, False)], ids=str)
def test_a_checkpoint_in_4_bits_is_planned_as_what_it_is(monkeypatch, flag, stored, four_bit):
    """A GPU that holds it and not the 16-bit model: no word of --qlora either."""
    config = TrainConfig(batch_size=1, qlora=flag, activation_checkpointing=False)
    needs = [estimate(FAKE, 1, 500, checkpointing=False, four_bit=packed, device="cuda").total for packed in (True, False)]
    monkeypatch.setattr(job, "shape_of", lambda *_, **__: FAKE)
    monkeypatch.setattr(memory_module, "best_device", lambda: "cuda")
    for text in (False, True):
        monkeypatch.setattr(job, "available", lambda device: sum(needs) / 2 / USABLE)
        found = {"quantization_config": stored} if stored else {}
        session = SimpleNamespace(config=config, model=SimpleNamespace(path=None, config={"text_config": found} if text else found),
                                  settings_of=lambda stage: {})
        choice = job.fit(session, [SimpleNamespace(longest=500)], placement.Placement("cuda", torch.bfloat16, ""))[2]
        assert choice.fits == four_bit and choice.memory.total == needs[not four_bit]
        monkeypatch.setattr(job, "available", lambda device: 10**9)
        choice = job.fit(session, [SimpleNamespace(longest=500)], placement.Placement("cuda", torch.bfloat16, ""))[2]
        assert ("--qlora" in memory_module._what_helps(choice, config, 500)) == (not four_bit)


def test_of_all_weights_none_can_be_packed_and_an_adapter_helps(monkeypatch):
    monkeypatch.setattr(memory_module, "best_device", lambda: "cuda")
    config = TrainConfig(batch_size=1, full=True, activation_checkpointing=False)
    choice = choose(FAKE, config, 500, "cuda", 10**9)
    hint = memory_module._what_helps(choice, config, 500)
    assert "train an adapter: leave --full out" in hint and "--qlora" not in hint
    assert memory_module.out_of_memory(MemoryError(), choice, 1).hint == (
        "use --activation-checkpointing, an adapter instead of --full, or a smaller model")


def test_of_experts_little_is_in_4_bits_and_it_is_said(monkeypatch):
    """They are no linear layers: --qlora is no way out for a model that is mostly of them."""
    monkeypatch.setattr(memory_module, "best_device", lambda: "cuda")
    config = TrainConfig(batch_size=1)
    for linear, helps in ((8 * 10**8, True), (7 * 10**7, False)):
        shape = replace(FAKE, linear=linear)
        choice = choose(shape, config, 500, "cuda", 10**9)
        assert ("--qlora" in memory_module._what_helps(choice, config, 500)) == helps
        ways = ["--micro-batch 1", "--activation-checkpointing", *["--qlora"] * helps, "or a smaller model"]
        choice = replace(choice, checkpointing=False)
        assert memory_module.out_of_memory(MemoryError(), choice, 2).hint == f"use {', '.join(ways)}"
        said = memory_module.described(choose(shape, replace(config, qlora=True), 500, "cuda", 10**9), 500)
        assert (", of which 7% are in 4 bits, trained weights" in said) != helps and "%" not in memory_module.described(choice, 500)


@same_examples(100)
@given(st.integers(1, 8), st.sampled_from([None, True, False]), st.floats(0.1, 60))
def test_what_the_user_set_is_kept(micro_batch, checkpointing, gigabytes):
    config = TrainConfig(batch_size=8, micro_batch=micro_batch, activation_checkpointing=checkpointing)
    choice = choose(FAKE, config, 500, "cpu", int(gigabytes * 1e9))
    assert choice.micro_batch == micro_batch
    assert checkpointing is None or choice.checkpointing == checkpointing


def test_more_at_once_than_a_batch_has_is_refused(cli, trained):
    result = cli("train", "--batch-size", 2, "--micro-batch", 3)
    assert result.code == 2 and "micro_batch: 3 is more than the batch size, 2" in result.err


# --- what there is

def control_groups(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_of_control_groups_of_version_2(tmp_path):
    root = control_groups(tmp_path / "cgroup", {
        "memory.stat": "inactive_file 0\n",
        "a/memory.max": "5000\n", "a/memory.current": "1000\n", "a/memory.stat": "anon 1\ninactive_file 0\n",
        "a/b/memory.max": "3000\n", "a/b/memory.current": "2500\n", "a/b/memory.stat": "inactive_file 700\n",
        "a/b/c/memory.max": "max\n", "a/b/c/memory.current": "2500\n", "a/b/c/memory.stat": "inactive_file 0\n"})
    own = tmp_path / "own"
    own.write_text("0::/a/b/c\n")
    assert min(placement._left_by_groups(root, own)) == 3000 - 2500 + 700
    own.write_text("0::/a\n")
    assert min(placement._left_by_groups(root, own)) == 4000


def test_limits_of_control_groups_of_version_1_and_in_containers(tmp_path):
    root = control_groups(tmp_path / "cgroup", {
        "memory/memory.limit_in_bytes": "9000\n", "memory/memory.usage_in_bytes": "8000\n",
        "memory/memory.stat": "inactive_file 5\ntotal_inactive_file 500\n"})
    own = tmp_path / "own"
    own.write_text("9:name=systemd:/x\n4:cpu,memory:/docker/of/the/host\n0::/\n")
    assert min(placement._left_by_groups(root, own)) == 1500
    (root / "memory").rename(root / "cpu,memory")
    assert min(placement._left_by_groups(root, own)) == 1500, "also where controllers lie together under all of their names"
    own.write_text("of no such form\n4:cpu,memory:/docker\n")
    assert min(placement._left_by_groups(root, own)) == 1500
    own.write_text("4:cpuset:/docker\n")
    assert min(placement._left_by_groups(root, own)) == 2**63
    assert min(placement._left_by_groups(root, tmp_path / "no such file")) == 2**63


def test_what_is_available_here():
    assert 10**8 < placement.available("cpu") < 2**50


# --- refused before anything is loaded

def test_what_does_not_fit_is_refused_before_the_model_is_loaded(cli, tiny, data, monkeypatch):
    assert cli("prepare", data, "--model", tiny).code == 0
    checkpoint = Path("runs/tiny-gemma/training_checkpoints/checkpoint-1")
    checkpoint.mkdir(parents=True)
    monkeypatch.setattr("gemma_tune.train.job.available", lambda device: 500_000_000)
    monkeypatch.setattr("gemma_tune.train.stage.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    result = cli("train", *QUICK, "--force")
    assert result.code == 2
    assert "needs about 0.77 GB of memory with 1 sequence of" in result.err and "0.50 GB are available" in result.err and "Hint: " in result.err
    assert checkpoint.exists(), "what was refused must not have deleted anything"


def test_whoever_set_the_least_there_is_is_only_warned(cli, tiny, data, monkeypatch):
    assert cli("prepare", data, "--model", tiny).code == 0
    monkeypatch.setattr("gemma_tune.train.job.available", lambda device: 500_000_000)
    for flags in (["--micro-batch", 1], ["--activation-checkpointing"]):
        assert cli("train", *QUICK, *flags).code == 2
    result = cli("train", *QUICK, "--micro-batch", 1, "--activation-checkpointing", "--json")
    assert result.code == 0, result.err
    assert "0.50 GB are available; it may be killed" in result.err
    assert (result.json["summary"]["micro_batch"], result.json["summary"]["activation_checkpointing"]) == (1, True)


def test_the_hint_names_a_length_that_fits(cli, tiny, data, monkeypatch):
    config = TrainConfig(batch_size=1)
    choice = choose(FAKE, config, 50_000, "cpu", 8 * 10**9)
    assert not choice.fits
    hint = memory_module._what_helps(choice, config, 50_000)
    shorter = int(hint.split("--max-length ")[1].split(";")[0])
    assert choose(FAKE, config, shorter, "cpu", 8 * 10**9).fits
    assert not choose(FAKE, config, 2 * shorter, "cpu", 8 * 10**9).fits


def test_memory_is_said_before_the_training(cli, trained):
    result = cli("train", *QUICK, "--force")
    assert result.code == 0
    assert "memory: about 0.77 GB of " in result.err and "with 4 x " in result.err


def test_weights_are_downloaded_only_when_they_fit(cli, tiny, data, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_repo("google/tiny-gemma-it", tiny, gated=True)
        hub.isolate(monkeypatch, tmp_path / "home", token=hub.add_token("hf_" + "G" * 34, accepted=["google/tiny-gemma-it"]))
        assert cli("prepare", data, "--model", "google/tiny-gemma-it").code == 0
        with monkeypatch.context() as small:
            small.setattr("gemma_tune.train.job.available", lambda device: 500_000_000)
            assert cli("train", *QUICK).code == 2
            assert cli("train", "--dry-run").code == 0
        assert not hub.paths(containing=".safetensors")
        result = cli("train", *QUICK)
        assert result.code == 0, result.err
        assert hub.paths("GET", ".safetensors")


# --- what there is in use, for the log

def test_the_memory_in_use_is_that_of_this_process():
    import psutil

    found = in_use("cpu")
    assert found.keys() == {"memory_bytes"} and abs(found["memory_bytes"] - psutil.Process().memory_info().rss) < 1e8


def test_the_log_looks_at_the_memory_once_a_second(monkeypatch, tmp_path):
    """Steps of a GPU can take less time than the answer."""
    from gemma_tune.train import callbacks

    now, looks = [0.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(callbacks, "in_use", lambda device: looks.append(device) or {"memory_bytes": len(looks)})
    log = callbacks.MetricsLog(tmp_path / "logs" / "metrics.jsonl", Listener(), 0, [])
    log.trainer = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda")), tokens_seen=4)
    for step in range(1, 11):
        now[0] += 0.3
        log.on_log(None, SimpleNamespace(max_steps=10), None, {"step": step, "epoch": 0.1, "loss": 1.0, "learning_rate": 1.0})
    assert looks == ["cuda"] * 3 and [r["memory_bytes"] for r in log.records] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
