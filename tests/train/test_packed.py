"""Rows one after the other in captured steps: the same gradients, nothing of a number or the CPU, and when they are packed.

PyTorch's kernel for such rows needs a GPU; here a plain one stands in its place, with the same arguments and results.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands.test_preferences import log
from torch.utils._python_dispatch import TorchDispatchMode
from train.test_captured import KINDS, Told, adapted, nothing_of_the_cpu, on_gpu, the_same_and_none_waits, weights
from train.test_captured_units import Uncaptured
from train.test_summed_loss import conversations, small

from gemma_tune.train import attention, cuda_attention, kernels, packed
from gemma_tune.train.batches import collate, pieces, trained_count
from gemma_tune.train.buckets import Bucket, Buckets, Costs
from gemma_tune.train.captured import CapturedSteps
from gemma_tune.train.cuda_attention import fastest_attention_or
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.packed import PackedTokens, packed_shapes, unpackable
from gemma_tune.train.trainer import GemmaTrainer
from support.command import write_rows

SDPA = [kind for kind in KINDS if "capped" not in kind]


def plain_varlen(query, key, value, begins, begins_k, longest, longest_k, *, scale, window_size, enable_gqa=False):
    """What ``varlen_attn`` computes: (tokens, heads, d), rows that see nothing of each other."""
    assert begins is begins_k and longest == longest_k and window_size[1] == 0 and begins.dtype == torch.int32
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    place = torch.arange(len(query))
    row = torch.searchsorted(begins[1:].long(), place, right=True)
    distance = place[:, None] - place
    seen = (row[:, None] == row) & (distance >= 0)
    if window_size[0] >= 0:
        seen &= distance <= window_size[0]
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Attention as it is chosen on a GPU, with a kernel for packed rows that a CPU can run."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)

    def attention_or(theirs):
        with_ends, without = fastest_attention_or(theirs), attention.causal_attention_or(theirs)
        return lambda *args, **how: (without if cuda_attention._ends is None else with_ends)(*args, **how)

    monkeypatch.setattr(kernels, "causal_attention_or", attention_or)


def bucket_for(body: PackedTokens, part, room: int = 0) -> Bucket:
    rows, length, positions = body.shape(part)
    return Bucket(rows, length + room, positions + room)


@pytest.mark.parametrize("kind", SDPA)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_packed_rows_teach_what_padded_ones_do(as_on_a_gpu, kind, count):
    model, part = adapted(kind), collate(conversations()[:count])
    gradients = Gradients(weights(model), fixed=True)
    body, factors = PackedTokens(model, rows=4), torch.tensor([0.25, 0.0])
    with fast_layers(model):
        (GemmaTrainer._summed_loss(model, part) * 0.25).backward()
        expected = gradients._flat.clone()
        assert expected.norm() > 0
        for room in (0, 11):
            gradients.clear()
            bucket = bucket_for(body, part, room)
            body.loss(body.filled(part, bucket), bucket, factors).backward()
            assert (gradients._flat - expected).norm() < 1e-5 * expected.norm()
    assert cuda_attention._ends is None


def test_rows_in_which_everything_is_learned(as_on_a_gpu):
    """The first token of a row is predicted by none: not by the last one of the row before."""
    model = adapted("llama")
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in conversations()]
    part, body = collate(rows), PackedTokens(model, rows=len(rows))
    bucket = bucket_for(body, part)
    assert bucket.positions == sum(len(row["input_ids"]) - 1 for row in rows) == trained_count(part["labels"])
    with fast_layers(model):
        expected = GemmaTrainer._summed_loss(model, part)
        assert body.loss(body.filled(part, bucket), bucket, torch.ones(2)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_row_is_a_row_of_the_kernel_and_none_is_empty():
    part = collate(conversations()[:2])
    body = PackedTokens(None, rows=5)
    for room in (0, 1, 40):
        bucket = bucket_for(body, part, room)
        ends = body._split(body.filled(part, bucket), bucket)[-1].tolist()
        lengths = part["lengths"].tolist()
        assert ends[:3] == [0, lengths[0], sum(lengths)] and ends[-1] == bucket.length
        assert all(size > 0 for size in np.diff(ends)) and len(ends) == 6


@pytest.mark.parametrize("kind", SDPA)
def test_a_packed_step_needs_no_number_and_nothing_of_the_cpu(kind, monkeypatch):
    monkeypatch.setattr(kernels, "causal_attention_or", fastest_attention_or)
    model, part = adapted(kind), collate(conversations())
    body = PackedTokens(model, rows=6)
    bucket = bucket_for(body, part, room=3)
    names = nothing_of_the_cpu(body, model, bucket, body.filled(part, bucket).shape)
    assert any("varlen_attn_backward" in name for name in names)


def test_two_packed_batches_are_the_same_operations_and_none_waits(as_on_a_gpu):
    model = adapted("llama")
    body, rows = PackedTokens(model, rows=4), conversations()
    parts = [collate(rows[:4]), collate(rows[1:3])]
    bucket = Bucket(*np.max([body.shape(part) for part in parts], 0).tolist())
    the_same_and_none_waits(body, model, parts, bucket)


def test_shapes_are_those_of_the_pieces():
    rows = conversations()
    lengths = np.array([len(row["input_ids"]) for row in rows])
    trained = np.array([sum(label != -100 for label in row["labels"][1:]) for row in rows])
    batches = [np.array([0, 1, 2]), np.array([3]), np.array([], int)]
    body = PackedTokens(None, rows=2)
    real = [body.shape(part) for batch in batches[:2] for part in pieces(collate([rows[n] for n in batch]), 2)]
    assert packed_shapes(batches, lengths, trained, 2).tolist() == [list(shape) for shape in real]


def test_attention_that_is_more_than_causal_is_not_packed():
    kind = SDPA[0]
    model, part = adapted(kind), collate(conversations())
    body = PackedTokens(model, rows=4)
    bucket = bucket_for(body, part)
    with fast_layers(model):
        cuda = fastest_attention_or(None)
        q = torch.zeros(1, 2, 6, 8)
        with cuda_attention.packed_rows(torch.tensor([0, 6], dtype=torch.int32)), pytest.raises(RuntimeError, match="more than causal"):
            cuda(torch.nn.Module(), q, q, q, None, softcap=5.0)
    assert bucket.rows == 1 and cuda_attention._ends is None


def test_models_whose_tokens_meet_outside_of_attention_are_left_alone():
    assert not unpackable(small("Gemma3")) and not unpackable(small("Llama"))
    assert "eager" in unpackable(small("Gemma2", attn_implementation="eager"))
    from transformers import AutoModelForCausalLM, FalconH1Config, Lfm2Config

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    with torch.device("meta"):
        for config in (Lfm2Config(**sizes, layer_types=["conv", "full_attention"]), FalconH1Config(**sizes, mamba_d_ssm=32, mamba_n_heads=2)):
            assert unpackable(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")), config.model_type


# ---- in a training ---------------------------------------------------------------------------------------------------

class Timed(Uncaptured):
    """Says that packed rows take some share of what padded ones do for each token."""

    share = 1.0
    packed = 0  # pieces that ran packed

    def run(self, part, *given):
        Timed.packed += isinstance(self.body, PackedTokens)
        return super().run(part, *given)

    def seconds_of(self, part, *given, times=5):
        bucket = self.buckets.find(*self.body.shape(part))
        return bucket.rows * bucket.length * (Timed.share if isinstance(self.body, PackedTokens) else 1.0)

    def forget(self):
        self.forgotten = True


@pytest.fixture
def uneven(tmp_path):
    """Few rows, one in four of them long: padding adds much in batches of four."""
    rows = [{"messages": [{"role": "user", "content": f"{n} ?"}, {"role": "assistant", "content": "word " * (60 if n % 4 == 0 else 2 + n % 5)}]}
            for n in range(24)]
    return write_rows(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def captured_here(monkeypatch, as_on_a_gpu):
    from gemma_tune.train import first_batch

    monkeypatch.setattr(first_batch.FirstBatch, "_why_not_captured", lambda self: None)
    for module in (first_batch, packed):
        monkeypatch.setattr(module, "CapturedSteps", Timed)


TRAIN = ("train", "--epochs", 3, "--rank", 4, "--dtype", "fp32", "--learning-rate", 5e-3, "--samples", 0, "--batch-size", 8, "--force")


@pytest.mark.parametrize(("share", "taken"), [(1.0, True), (3.0, False)])
def test_rows_are_packed_where_that_is_faster(cli, tiny, uneven, captured_here, monkeypatch, share, taken):
    assert cli("prepare", uneven, "--model", tiny, "--valid", 4).code == 0
    monkeypatch.setattr(packed, "PADDED_TOO_MUCH", 1e9)
    padded = cli(*TRAIN)
    assert padded.code == 0 and "packed" not in padded.err, padded.err
    expected = log()
    monkeypatch.setattr(packed, "PADDED_TOO_MUCH", 0.15)
    monkeypatch.setattr(Timed, "share", share)
    monkeypatch.setattr(Timed, "packed", 0)
    result = cli(*TRAIN)
    assert (Timed.packed > 1) == taken, "one piece is packed to try it"
    assert result.code == 0 and f"rows are {'packed' if taken else 'not packed'}: padding" in result.err, result.err
    for was, now in zip(expected, log(), strict=True):
        assert now["loss" if "loss" in now else "eval_loss"] == pytest.approx(was["loss" if "loss" in was else "eval_loss"], rel=1e-3)


def test_packing_that_teaches_something_else_is_not_taken(cli, tiny, uneven, captured_here, monkeypatch):
    """A kernel that lets rows see each other."""
    def leaking(query, key, value, begins, *more, **how):
        ends = torch.tensor([0, len(query)], dtype=torch.int32)
        return plain_varlen(query, key, value, ends, ends, *more[1:], **how)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", leaking)
    assert cli("prepare", uneven, "--model", tiny, "--valid", 4).code == 0
    monkeypatch.setattr(Timed, "share", 0.1)
    result = cli(*TRAIN)
    assert result.code == 0 and "rows are not packed: their gradients would differ by" in result.err
    assert "steps are captured in" in result.err


class Copies(TorchDispatchMode):
    """Counts the new tensors of a size."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() == self.size and func._schema.returns[0].alias_info is None:
            self.made.append(str(func))
        return out


def test_no_more_than_two_gradients_are_there_to_be_compared(cli, tiny, uneven, captured_here, monkeypatch):
    """Of all weights each has four bytes for a weight; the optimiser, which will have eight, has none yet."""
    found, tried = [], packed.packed_if_faster

    def watched(trainer, *given):
        with Copies(sum(weight.numel() for weight in trainer.gradients.weights)) as copies:
            result = tried(trainer, *given)
        found.append(copies.made)
        return result

    monkeypatch.setattr("gemma_tune.train.first_batch.packed_if_faster", watched)
    assert cli("prepare", uneven, "--model", tiny, "--valid", 4).code == 0
    result = cli(*TRAIN)
    assert result.code == 0 and "rows are packed: padding" in result.err
    assert [len(made) for made in found] == [2], found


def test_gradients_that_are_not_finite_are_not_the_same(cli, tiny, uneven, captured_here, monkeypatch):
    def spoiled(*args, **how):
        return plain_varlen(*args, **how) * float("nan")

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", spoiled)
    assert cli("prepare", uneven, "--model", tiny, "--valid", 4).code == 0
    monkeypatch.setattr(Timed, "share", 0.1)
    result = cli(*TRAIN)
    assert result.code == 0 and "rows are packed" not in result.err


def test_with_dropout_or_a_mask_too_large_nothing_is_tried(cli, tiny, uneven, captured_here, monkeypatch):
    assert cli("prepare", uneven, "--model", tiny, "--valid", 4).code == 0
    assert "packed" not in cli(*TRAIN, "--dropout", 0.1).err
    monkeypatch.setattr(packed, "LONGEST_MASK", 50)
    assert "packed" not in cli(*TRAIN).err


def test_what_cannot_be_captured_packed_is_padded_again():
    class Runs:
        def run(self, part, *weights):
            return (part, weights)

    steps = CapturedSteps.__new__(CapturedSteps)
    steps._broken, steps.instead, steps.body = True, None, SimpleNamespace(takes=lambda part: True)
    assert steps.run("part", 1.0) is False
    steps.instead = Runs()
    assert steps.run("part", 1.0) == ("part", (1.0,))


# ---- on a GPU --------------------------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("kind", SDPA)
def test_captured_packed_gradients_are_those_of_the_padded_step(kind):
    model, told = adapted(kind, "cuda", dtype=torch.bfloat16), Told()
    rows = conversations()
    parts = [collate(rows), collate(rows[1:]), collate(rows[:2])]
    body = PackedTokens(model, rows=len(rows))
    with fast_layers(model):
        gradients = Gradients(weights(model), fixed=True)
        for part in parts:
            (GemmaTrainer._summed_loss(model, part) / 5).backward()
        expected = gradients._flat[:-1].clone()
        steps = CapturedSteps(body, gradients, Buckets(np.repeat([body.shape(part) for part in parts], 4, 0), Costs(1, 1)), told)
        for _ in range(2):
            gradients.clear()
            assert all(steps.run(part, 1 / 5) for part in parts), told.notes
            torch.cuda.synchronize()
            assert (gradients._flat[:-1] - expected).norm() < 3e-2 * expected.norm()
        assert steps.seconds_of(parts[0], 1.0) > 0

