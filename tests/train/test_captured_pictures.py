"""Pieces with pictures in captured steps: each family computes what its eager step does, waits for nothing, and a replay
reads the pictures of its own piece."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from answers.test_eyes import pictures, seers  # noqa: F401 - fixtures
from peft import get_peft_model
from train.test_captured import nothing_of_the_cpu, on_gpu, the_same_and_none_waits, weights
from train.test_looking import ALL, FP32, Rows, of  # noqa: F401 - a fixture

from gemma_tune.config.stages import TrainConfig
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.models.load import load_model
from gemma_tune.train.batches import collate
from gemma_tune.train.buckets import Bucket, Buckets, Costs
from gemma_tune.train.captured import CapturedSteps
from gemma_tune.train.captured_pictures import LearnedPictures
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.whole import train_whole
from support.graphs import install
from support.listener import Said


def body_of(rows: Rows, model) -> LearnedPictures:
    return LearnedPictures(model, SimpleNamespace(names=["0.png"], eye=rows.eye, seen=rows.seen))


def parts_of(rows: Rows) -> list[dict]:
    """Pieces with other pictures at the same places, with others at other places, with fewer of them, and of one row."""
    text = rows.row(words="no picture, and few words")
    return [collate(some) for some in (
        [rows.row("0.png", "1.png"), text, rows.row("2.png", words="one")],
        [rows.row("1.png", "0.png"), text, rows.row("1.png", words="one")],
        [text, rows.row("2.png"), rows.row(words="one two")],
        [rows.row("1.png", words="one two three four five six")])]


def bucket_of(body: LearnedPictures, parts: list[dict], room: int = 8) -> Bucket:
    rows, length, positions, seen = np.max([body.shape(part) for part in parts], 0).tolist()
    return Bucket(rows + 1, length + room, positions + room, -(-seen // 8) * 8 + room)


def eagerly(rows: Rows, model, part: dict, gradients: Gradients) -> tuple[float, torch.Tensor]:
    gradients.clear()
    loss = GemmaTrainer._summed_loss(model, rows.with_sight(part, gradients.device))
    loss.backward()
    return loss.item(), gradients.as_one.clone()


def all_weights(rows: Rows):
    """The model as ``train --full`` has it."""
    config, base = TrainConfig(full=True), load_model(rows.folder, FP32, sight="features")
    model = get_peft_model(base, lora_config(config, targets_of(base, config))).train()
    train_whole(model)
    install_summed_loss(model.get_base_model())
    return model


@pytest.mark.parametrize(("family", "made"), [*((family, Rows.tuned) for family in ALL),
                                              *((family, all_weights) for family in ("gemma3", "gemma4-small", "qwen3_vl"))])
def test_replays_teach_what_the_eager_steps_do(of, family, made, monkeypatch):  # noqa: F811
    """All pieces in one shape, captured with the first of them; the loss alone as well, as in an evaluation."""
    rows = of(family)
    model = made(rows)
    body, parts, said = body_of(rows, model), parts_of(rows), Said()
    shapes = np.repeat([[*np.max([body.shape(part) for part in parts], 0)]], 4, 0)
    gradients = Gradients(weights(model), fixed=True)
    captures = install(monkeypatch)
    with fast_layers(model):
        expected = [eagerly(rows, model, part, gradients) for part in parts]
        assert len({round(loss, 4) for loss, _ in expected}) == len(parts)
        steps = CapturedSteps(body, gradients, Buckets(shapes, Costs(1, 1)), said)
        alone = CapturedSteps(body, gradients, Buckets(shapes, Costs(1, 1)), said, steps.pool, backward=False)
        monkeypatch.setattr("gemma_tune.train.buckets.WIDER", 99.0)  # one row goes into the shape of three
        for _ in range(2):
            for part, (loss, gradient) in zip(parts, expected, strict=True):
                gradients.clear()
                assert steps.run(part, 0.5), said.notes
                assert gradients.loss.item() == pytest.approx(loss / 2, rel=1e-5)
                assert (gradients.as_one - gradient / 2).norm() < 1e-4 * gradient.norm() != 0
                gradients.clear()
                assert alone.run(part, 1.0), said.notes
                assert gradients.loss.item() == pytest.approx(loss, rel=1e-5) and not gradients.as_one.any()
    assert len(captures.order) == len(steps) + len(alone) == 2 and not said.notes


@pytest.mark.parametrize("family", ALL)
def test_a_step_needs_no_number_and_nothing_of_the_cpu(of, family):  # noqa: F811
    rows = of(family)
    model = rows.tuned()
    body = body_of(rows, model)
    bucket = bucket_of(body, parts_of(rows))
    assert len(nothing_of_the_cpu(body, model, bucket, body.size(bucket))) > 300


@pytest.mark.parametrize("family", ALL)
def test_pieces_of_a_bucket_are_the_same_operations_and_none_waits(of, family):  # noqa: F811
    rows = of(family)
    model = rows.tuned()
    body, parts = body_of(rows, model), parts_of(rows)
    the_same_and_none_waits(body, model, parts, bucket_of(body, parts))


# ---- on a GPU --------------------------------------------------------------------------------------------------------

@on_gpu
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_gradients_are_those_of_the_eager_step(of, family, dtype, monkeypatch):  # noqa: F811
    rows = of(family)
    model = rows.tuned().to("cuda", dtype)
    for parameter in weights(model).values():
        parameter.data = parameter.data.float()
    body, parts, said = body_of(rows, model), parts_of(rows), Said()
    monkeypatch.setattr("gemma_tune.train.buckets.WIDER", 99.0)
    shapes = np.repeat([[*np.max([body.shape(part) for part in parts], 0)]], 4, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    gradients = Gradients(weights(model), fixed=True)
    with fast_layers(model):
        expected = [eagerly(rows, model, part, gradients) for part in parts]
        steps = CapturedSteps(body, gradients, Buckets(shapes, Costs(1, 1)), said)
        for turn in (0, 1):
            for part, (loss, gradient) in zip(parts, expected, strict=True):
                gradients.clear()
                torch.cuda.set_sync_debug_mode("error" if turn else "default")
                try:
                    ran = steps.run(part, 1.0)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                if not ran and dtype == torch.float32:  # PyTorch's attention with a mask could not be captured (torch 2.11)
                    assert len(said.notes) == 1 and "one kernel at a time" in said.notes[0]
                    return
                assert ran, said.notes
                assert gradients.loss.item() == pytest.approx(loss, rel=tolerance)
                assert (gradients.as_one - gradient).norm() < tolerance * gradient.norm()
    assert len(steps) == 1 and not said.notes
