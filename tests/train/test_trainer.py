"""The training loop: batches in pieces, memory that runs out, the longest batch tried first."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_tune.train.gradients import Gradients
from gemma_tune.train.trainer import GemmaTrainer
from support.command import rows, write_rows

FLAGS = ("--epochs", 1, "--rank", 4, "--dtype", "fp32", "--learning-rate", 1e-3, "--eval-steps", 100)
RUN = Path("runs/tiny-gemma")


@pytest.fixture
def prepared(cli, tiny, tmp_path):
    """Conversations of different lengths."""
    records = rows(13)
    for n, record in enumerate(records):
        record["messages"][1]["content"] += " And so on." * (n % 4)
    assert cli("prepare", write_rows(tmp_path / "rows.jsonl", records), "--model", tiny).code == 0
    return RUN


@pytest.fixture
def trained(cli, prepared):
    """Train anew: losses of the steps, adapter, and what was said."""
    def train(*flags: object) -> tuple[list[float], dict[str, torch.Tensor], str]:
        result = cli("train", *FLAGS, *flags, "--force")
        assert result.code == 0, result.err
        log = [json.loads(line) for line in (RUN / "logs" / "metrics.jsonl").read_text().splitlines()]
        adapter = load_file(RUN / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")
        return [r["loss"] for r in log if "loss" in r], adapter, result.err

    return train


def same(got: tuple, expected: tuple, tolerance: float = 1e-5) -> None:
    """The same loss in each step, and the same adapter but for the order of additions."""
    assert got[0] == pytest.approx(expected[0], rel=tolerance)
    assert got[1].keys() == expected[1].keys()
    flat = [torch.cat([adapter[name].flatten() for name in sorted(adapter)]) for adapter in (got[1], expected[1])]
    assert (flat[0] - flat[1]).norm() < tolerance * flat[1].norm()


def test_pieces_of_a_batch_teach_the_same(trained):
    whole = trained("--micro-batch", 4)
    assert len(whole[0]) == 3
    for size in (1, 3):
        same(trained("--micro-batch", size), whole)


class Memory:
    """Memory for some rows at a time: the forward or the backward pass of more runs out of it."""

    def __init__(self, monkeypatch, rows: int, *, where: str = "forward", error: str = "cuda", after: int = 0):
        self.rows, self.where, self.error, self.left = rows, where, error, after
        self.failures, self.sizes = 0, []
        plain = GemmaTrainer._summed_loss

        def summed_loss(model, inputs):
            size = len(inputs["labels"])
            if not model.training:
                return plain(model, inputs)
            self.sizes.append(size)
            full = size > self.rows and self.left <= 0
            self.left -= 1
            if full and self.where == "forward":
                self.run_out()
            if full:
                # The adapter's first matrix comes last in the backward pass: others have their gradient by then. An embedding that
                # is trained, too, adds to its own by itself, first as the head.
                words = {id(p) for p in model.get_input_embeddings().parameters()}
                first = next(p for p in model.parameters() if p.requires_grad and id(p) not in words)
                handle = first.register_hook(lambda grad: (handle.remove(), self.run_out()))
            return plain(model, inputs)

        monkeypatch.setattr(GemmaTrainer, "_summed_loss", staticmethod(summed_loss))

    def run_out(self):
        self.failures += 1
        if self.error == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        if self.error == "python":
            raise MemoryError
        torch.empty(1 << 60)  # the CPU allocator's own error


ALL = ("--full", "--rank", 16)


@pytest.mark.parametrize(("accumulation", "cases", "kind"), [
    (1, [("forward", "cuda"), ("backward", "cpu")], ()), (2, [("forward", "python"), ("backward", "cuda")], ()),
    (1, [("backward", "cpu")], ALL), (2, [("backward", "cuda")], ALL)], ids=["1", "2", "1 all weights", "2 all weights"])
def test_memory_that_runs_out_halves_the_piece_and_nothing_else(trained, monkeypatch, accumulation, cases, kind):
    flags = ("--batch-size", 4, "--accumulation", accumulation, *kind)
    copies, saved = [], Gradients.saved
    monkeypatch.setattr(Gradients, "saved", lambda self: copies.append(self) or saved(self))
    expected = trained(*flags, "--micro-batch", 2)
    assert bool(copies) == (accumulation > 1), "of all weights a copy is large: only where there is something to lose"
    for where, error in cases:
        # Not in the first batch, which is tried before training, but within a step: with accumulation, after one batch
        # of the step has left its gradient, which must neither be lost nor be counted twice.
        with monkeypatch.context() as patch:
            memory = Memory(patch, 2, where=where, error=error, after=2)
            got = trained(*flags)
        assert memory.failures == 1 and memory.sizes[:3] == [4, 4, 4] and set(memory.sizes[3:]) <= {1, 2}
        same(got, expected)
        assert "out of memory with 4 conversations at once: going on with 2; a step still learns from the same" in got[2]


def test_memory_that_runs_out_twice_in_a_step_loses_none_of_its_batches(trained, monkeypatch):
    """First beside captured steps, which are freed, and in the next batch where there is nothing to free."""
    flags, batches, failed = ("--batch-size", 4, "--accumulation", 2), [], []
    expected = trained(*flags, "--micro-batch", 2)
    step, eager = GemmaTrainer.training_step, GemmaTrainer._eager_step

    def failing(self, model, part, count):
        eager(self, model, part, count)
        if len(batches) == 2 and not failed or len(batches) == 3 and len(part["lengths"]) > 2:  # the first one is tried before
            failed.append(len(batches))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    monkeypatch.setattr(GemmaTrainer, "_holds_captured", property(lambda self: len(batches) == 2))
    monkeypatch.setattr(GemmaTrainer, "training_step", lambda self, *given: batches.append(1) or step(self, *given))
    monkeypatch.setattr(GemmaTrainer, "_eager_step", failing)
    got = trained(*flags)
    assert failed == [2, 3] and "a rare batch needed the memory of captured steps" in got[2]
    same(got, expected)


def test_the_first_batch_shows_what_fits(trained, monkeypatch):
    expected = trained("--micro-batch", 1)
    memory = Memory(monkeypatch, 1)
    got = trained()
    assert memory.sizes[:3] == [4, 2, 1] and set(memory.sizes[3:]) == {1}
    assert got[2].index("going on with 2") < got[2].index("going on with 1") < got[2].index("validation loss")
    assert got[0] == expected[0]
    assert all(torch.equal(got[1][name], expected[1][name]) for name in expected[1]), "bit for bit"


@pytest.mark.parametrize(("where", "error", "said"), [("backward", "cpu", "allocate memory"), ("forward", "python", "MemoryError")])
def test_not_even_one_conversation_fits(cli, prepared, monkeypatch, where, error, said):
    memory = Memory(monkeypatch, 0, where=where, error=error)
    result = cli("train", *FLAGS)
    assert result.code == 2, result.err
    assert memory.sizes == [4, 2, 1]
    assert "Error: out of memory: " in result.err and said in result.err
    assert "Hint: use --activation-checkpointing, --qlora, or a smaller model\n" in result.err, "one at once was tried"
    assert not (RUN / "tiny-gemma_lora_adapter").exists()


def test_other_errors_are_not_taken_for_a_lack_of_memory(cli, prepared, monkeypatch):
    memory = Memory(monkeypatch, 2)

    def run_out():
        raise RuntimeError("shapes cannot be multiplied")

    memory.run_out = run_out
    result = cli("train", *FLAGS)
    assert result.code == 1
    assert memory.sizes == [4]
    assert "shapes cannot be multiplied" in result.err and "out of memory" not in result.err


def test_the_longest_batch_is_tried_first_and_leaves_nothing_behind(cli, prepared, monkeypatch):
    probe, evaluate, step = GemmaTrainer.probe, GemmaTrainer.evaluate, GemmaTrainer.training_step
    events, trainers = [], []

    def state(trainer) -> tuple:
        weights = torch.cat([p.detach().flatten() for p in trainer._trainable()])
        return torch.get_rng_state(), weights.clone()

    def probed(self):
        before = state(self)
        events.append("probe")
        trainers.append(self)
        seconds = probe(self)
        assert all(torch.equal(a, b) for a, b in zip(state(self), before))
        assert all(p.grad is None for p in self.model.parameters())
        assert self.optimizer is None and self.tokens_seen == 0 and self.state.global_step == 0
        events.append("probed")
        return seconds

    def stepped(self, model, inputs, count=None):
        events.append(tuple(inputs["lengths"].tolist()))
        return step(self, model, inputs, count)

    monkeypatch.setattr(GemmaTrainer, "probe", probed)
    monkeypatch.setattr(GemmaTrainer, "training_step", stepped)
    monkeypatch.setattr(GemmaTrainer, "evaluate", lambda self, *args, **kwargs: (
        events.append("evaluate"), evaluate(self, *args, **kwargs))[1])
    result = cli("train", *FLAGS, "--dropout", 0.3)
    assert result.code == 0, result.err
    assert events[0] == "probe" and events[2:4] == ["probed", "evaluate"]
    longest = sorted(trainers[0].lengths[0].tolist(), reverse=True)[:4]
    assert sorted(events[1], reverse=True) == sorted(events[4], reverse=True) == longest
    assert "the longest batch takes" in result.err


# --- what an interrupted training goes on with

def test_a_resumed_training_keeps_its_micro_batch_unless_told_otherwise(cli, prepared, monkeypatch):
    """Also where the memory would now allow another one: sums in another order are rounded differently."""
    from gemma_tune.train import job
    from gemma_tune.train import stage as train
    from gemma_tune.train.callbacks import StopRequest

    flags = ("--epochs", 2, "--rank", 4, "--dtype", "fp32")
    roomy = job.available
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "on_step_begin", lambda self, args, state, control, **_: (
            setattr(self, "requested", state.global_step + 1 == 2)))
        patch.setattr(train, "fit", _with_micro_batch(train.fit, 2))
        assert cli("train", *flags).code == 130
    resumed = cli("train", *flags, "--json")
    assert resumed.code == 0, resumed.err
    assert job.available is roomy
    summary = resumed.json["summary"]
    assert (summary["resumed_from_step"], summary["micro_batch"]) == (2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "on_step_begin", lambda self, args, state, control, **_: (
            setattr(self, "requested", state.global_step + 1 == 2)))
        assert cli("train", *flags, "--force").code == 130
    smaller = cli("train", *flags, "--micro-batch", 1, "--json")
    assert smaller.code == 0, smaller.err
    assert (smaller.json["summary"]["resumed_from_step"], smaller.json["summary"]["micro_batch"]) == (2, 1)


def _with_micro_batch(fit, rows: int):
    from dataclasses import replace

    def chosen(*args):
        placement, shape, choice = fit(*args)
        return placement, shape, replace(choice, micro_batch=rows)

    return chosen


# --- --compile

@pytest.mark.parametrize(("before", "after", "batches", "kept", "says"), [
    (2.0, 1.0, 100, True, "even after 60 such batches, and this training is worth 100; it pays"),
    (2.0, 1.0, 10, True, "even after 60 such batches, and this training is worth 10; it does not pay"),
    (2.0, 2.0, 1e9, False, "did not help")])
def test_the_break_even_of_compiling(before, after, batches, kept, says):
    from gemma_tune.train.kernels import worth_compiling

    answer, sentence = worth_compiling(before, after, 60.0, batches)
    assert answer is kept and says in sentence


def test_compiled_layers_learn_the_same(cli, prepared, monkeypatch):
    """Whatever is faster on this machine: the compiled layers are kept here, and are plain ones afterwards."""
    from torch._dynamo.utils import counters

    from gemma_tune.train import first_batch

    torch._dynamo.reset()
    counters.clear()
    compiled, worth = [], first_batch.worth_compiling
    # Traced and split into forward and backward pass, but not translated to C++, which takes a minute.
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kwargs: plain(self, backend="aot_eager", **kwargs))
    monkeypatch.setattr(first_batch, "worth_compiling", lambda before, after, compiling, batches: (
        compiled.append(worth(before, after, compiling, batches)) or (True, "compiled layers are kept")))
    losses = []
    for flags in ((), ("--compile",)):
        result = cli("train", "--epochs", 1, "--rank", 4, "--dtype", "fp32", "--lr", 1e-2, "--force", "--json", *flags)
        assert result.code == 0, result.err
        losses.append(result.json["summary"]["eval_loss_after"])
    assert compiled and "compiled layers are kept" in result.err
    # All layers share what is compiled, with and without a mask for padding; more is compiled for no layer's sake.
    assert counters["stats"]["unique_graphs"] == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_probe_recomputes_activations_where_the_training_does(cli, prepared, monkeypatch):
    probed, plain = [], GemmaTrainer.probe
    monkeypatch.setattr(GemmaTrainer, "probe", lambda self: (
        probed.append(self.causal_lm.is_activation_checkpointing) or plain(self)))
    for flag in ("--activation-checkpointing", "--no-activation-checkpointing"):
        assert cli("train", *FLAGS, flag, "--force").code == 0
    assert probed == [True, False]


def test_without_a_compiler_the_training_goes_on(cli, prepared, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # Its own way to change settings: what else changes one leaves it deleted, for all tests that come after.
    with inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        result = cli("train", "--epochs", 1, "--rank", 4, "--dtype", "fp32", "--compile")
    assert result.code == 0, result.err
    assert "--compile does not work here, going on without it" in result.err


def test_compiling_that_takes_too_long_is_given_up(cli, prepared, monkeypatch):
    from gemma_tune.train import first_batch

    probes, plain = [], GemmaTrainer.probe

    def probe(self):
        probes.append(self.model.get_base_model().get_decoder().layers[0]._compiled_call_impl is not None)
        if probes[-1]:
            time.sleep(60)  # as a compiler does that this waits for
        return plain(self)

    monkeypatch.setattr(GemmaTrainer, "probe", probe)
    monkeypatch.setattr(first_batch, "longest_compiling", lambda training: 0.2)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "c++")  # it is never started
    began = time.monotonic()
    result = cli("train", *FLAGS, "--compile")
    assert result.code == 0, result.err
    assert "--compile was not done after 1 s, going on without it" in result.err
    assert probes == [False, False, True] and time.monotonic() - began < 50


@pytest.mark.parametrize(("training", "bound"), [(10, 60), (1_000, 250), (100_000, 600)])
def test_the_bound_follows_from_what_the_training_takes(training, bound):
    from gemma_tune.train.first_batch import longest_compiling

    assert longest_compiling(training) == bound
