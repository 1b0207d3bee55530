"""The memory of captured steps, with a double of PyTorch's captures that keeps count of pools, and runs out of memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from train.test_summed_loss import small

from gemma_tune.train.buckets import Bucket, Buckets, Costs
from gemma_tune.train.captured import MOST_TOO_LARGE, CapturedSteps, LearnedTokens, Pool
from gemma_tune.train.first_batch import FirstBatch
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.loss import IGNORE_INDEX
from support.graphs import Captures, install
from support.listener import Said

LENGTHS = 16, 32, 64


class Body(LearnedTokens):
    """Captures nothing of a model; ``limit`` is the longest shape for which there is memory, ``wrong`` is called in captures.

    Attributes:
        made: lengths that were tried, in their order.
    """

    def __init__(self, limit: int = 1000, wrong: Any = None):
        super().__init__(torch.nn.Module())
        self.limit, self.wrong, self.made = limit, wrong, []

    def prepare(self, bucket: Bucket) -> None:
        self.made.append(bucket.length)

    def loss(self, flat, bucket, weights):
        if self.wrong:
            self.wrong(flat)
        if bucket.length > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.zeros((), requires_grad=True)


def part(length: int) -> dict:
    labels = torch.full((2, length), IGNORE_INDEX)
    labels[:, 4:8] = 7
    return {"input_ids": torch.ones(2, length, dtype=torch.long), "labels": labels, "lengths": torch.full((2,), length)}


@pytest.fixture
def cuda(monkeypatch) -> Captures:
    return install(monkeypatch)


def steps_of(body: Body, pool: Pool | None = None, lengths=LENGTHS, **how) -> tuple[CapturedSteps, Said]:
    shapes = np.repeat([(2, length, 8) for length in lengths], 4, 0)
    gradients, said = Gradients({"w": torch.nn.Parameter(torch.zeros(2))}, fixed=True), Said()
    return CapturedSteps(body, gradients, Buckets(shapes, Costs(1, 1)), said, pool, **how), said


def test_the_largest_shape_is_captured_first_and_once(cuda):
    body = Body()
    steps, said = steps_of(body)
    assert all(steps.run(part(length), 1.0) for length in (16, 32, 16, 64, 64))
    assert body.made == [64, 16, 32] and len(steps) == len(steps.pool) == 3 and set(cuda.order) == {1}
    assert not said.notes


def test_all_shapes_read_from_one_place(cuda):
    """What is seen in pictures is megabytes, and no two graphs run at the same time."""
    steps, _ = steps_of(Body())
    assert all(steps.run(part(length), 1.0) for length in LENGTHS)
    inputs = [captured.inputs for captured in steps._graphs.values()]
    assert len({place.data_ptr() for place in inputs}) == 1 and len({len(place) for place in inputs}) == len(LENGTHS)
    steps.forget()
    assert steps.run(part(16), 1.0)


def test_where_the_first_ones_cannot_be_captured_others_begin_with_their_largest(cuda):
    broken, _ = steps_of(Body(wrong=lambda flat: flat.sum().item()))
    broken.pool.first = broken
    body = Body()
    steps, _ = steps_of(body, broken.pool)
    assert steps.run(part(16), 1.0) and body.made == [64, 16]


def test_an_evaluation_that_comes_first_lets_the_training_take_its_memory_before(cuda):
    training, evaluating = Body(), Body()
    steps, _ = steps_of(training)
    steps.pool.first = steps
    evaluation, _ = steps_of(evaluating, steps.pool, lengths=(24, 128), backward=False)
    assert evaluation.run(part(24), 1.0)
    assert training.made == [64] and evaluating.made == [24] and len(steps.pool) == 2


def test_what_was_forgotten_is_captured_anew_in_a_pool_of_its_own(cuda):
    body = Body()
    steps, said = steps_of(body)
    evaluation, _ = steps_of(Body(), steps.pool, backward=False)
    assert steps.run(part(16), 1.0) and evaluation.run(part(16), 1.0)
    evaluation.forget()
    assert evaluation.run(part(32), 1.0) and set(cuda.order) == {1}, "the training's graphs keep the pool"
    evaluation.forget()
    steps.forget()
    assert len(steps) == len(steps.pool) == 0 and not sum(cuda.pools.values())
    assert steps.run(part(16), 1.0) and evaluation.run(part(16), 1.0)
    assert cuda.order[-2:] == [2, 2] and not said.notes


def test_a_shape_without_memory_goes_its_own_way_and_the_others_stay(cuda):
    body = Body(limit=32)
    steps, said = steps_of(body)
    assert [steps.run(part(length), 1.0) for length in (16, 32, 64, 64, 16)] == [True, True, False, False, True]
    assert body.made == [64, 16, 32]
    assert said.notes == ["2 x 64 tokens do not fit the memory as a captured step, and go their own way"]


def test_where_several_shapes_find_no_memory_nothing_is_captured_any_more(cuda):
    body = Body(limit=8)
    steps, said = steps_of(body, lengths=(16, 24, 32, 48, 64))
    assert not any(steps.run(part(length), 1.0) for length in (64, 16, 24, 32, 48, 16))
    assert len(body.made) == MOST_TOO_LARGE == len(said.notes) and "go one kernel at a time" in said.notes[-1]
    assert not len(steps.pool)


def looks(flat: torch.Tensor) -> None:
    flat.sum().item()


def is_unknown(flat: torch.Tensor) -> None:
    raise ValueError("no such kernel")


@pytest.mark.parametrize(("wrong", "said"), [(looks, "when stream is capturing"), (is_unknown, "no such kernel")])
def test_what_cannot_be_captured_is_tried_once(cuda, wrong, said):
    """Nothing is kept of it, neither where CUDA breaks the capture off nor where Python does; memory can be given back."""
    body = Body(wrong=wrong)
    steps, told = steps_of(body)
    assert not any(steps.run(part(length), 1.0) for length in (16, 32, 64))
    assert body.made == [64] and len(told.notes) == 1 and said in told.notes[0]
    torch.cuda.empty_cache()
    assert not cuda.underway and not sum(cuda.pools.values())


def test_what_was_captured_stays_where_another_capture_is_broken_off(cuda):
    body = Body()
    steps, _ = steps_of(body)
    others, _ = steps_of(Body(wrong=looks), steps.pool)
    assert steps.run(part(16), 1.0) and not others.run(part(16), 1.0)
    assert len(steps.pool) == sum(cuda.pools.values()) == 2
    evaluation, _ = steps_of(Body(), steps.pool, backward=False)
    for _ in range(2):  # into a pool that PyTorch has not closed, which it gives up with its last graph
        assert evaluation.run(part(16), 1.0)
        evaluation.forget()
    assert cuda.order == [1, 1, 2, 3] and len(steps.pool) == 2
    assert steps.run(part(32), 1.0) and sum(cuda.pools.values()) == 3


def trainer_of(model) -> SimpleNamespace:
    return SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cuda")), args=SimpleNamespace(fp16=False),
                           causal_lm=model, sharded=False)


@pytest.mark.parametrize(("rope", "told"), [({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, True),
                                            ({"rope_type": "default", "rope_theta": 1e4}, False)])
def test_rotations_that_look_at_the_lengths_are_not_tried(rope, told):
    model = small("Llama", rope_parameters=rope, max_position_embeddings=64)
    trainer = trainer_of(model)
    assert bool(FirstBatch._why_not_captured(trainer)) == told


@pytest.mark.parametrize(("dtype", "told"), [(torch.float32, "wait for the GPU here"), (torch.bfloat16, None)])
def test_experts_whose_products_wait_are_not_tried(monkeypatch, dtype, told):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = small("Qwen3Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32).to(dtype)
    trainer = trainer_of(model)
    assert told in FirstBatch._why_not_captured(trainer) if told else FirstBatch._why_not_captured(trainer) is None
