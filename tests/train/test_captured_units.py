"""Steps on pairs and judged answers whose shapes do not depend on the data, without a GPU, and captured on one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands.test_preferences import log, pairs
from train.test_captured import Told, adapted, nothing_of_the_cpu, on_gpu, the_same_and_none_waits, weights
from train.test_preference_loss import Sequences

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train import buckets
from gemma_tune.train.buckets import Bucket, Buckets, Costs
from gemma_tune.train.captured import CapturedSteps
from gemma_tune.train.captured_units import LearnedUnits
from gemma_tune.train.gradients import Gradients
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.preference_loss import SUMS, PreferenceLoss
from gemma_tune.train.units import PAIR, Units, collate_units
from support.another_device import THERE
from support.command import copied_run, invoke, write_rows

METHODS = {"dpo": {"method": "dpo"}, "dpo with the answers' own loss": {"method": "dpo", "sft_weight": 0.3},
           "ipo": {"method": "dpo", "dpo_loss": "ipo"}, "smoothed": {"method": "dpo", "label_smoothing": 0.1},
           "orpo": {"method": "orpo"}, "kto": {"method": "kto", "bad_weight": 1.5}}
FACTORS = 0.25, 0.125  # on what compares answers, and on the tokens of good ones


def units_of(size: int) -> Units:
    """Of sequences of 4 to 23 tokens, with a reference that is not theirs."""
    drawn = np.random.default_rng(3)
    rows = [(drawn.integers(3, 60, length).tolist(), length // 3, 1 if n % 2 == 0 else -1)
            for n, length in enumerate((9, 14, 23, 5, 4, 17, 11, 12))]
    units = Units(Sequences(rows), size)
    units.reference = drawn.normal(-40, 5, len(rows)).astype(np.float32)
    return units


def learning(model, settings: dict, device: torch.device | str = "cpu") -> tuple[LearnedUnits, Units]:
    config = TrainConfig(**settings)
    size = 1 if config.method == "kto" else PAIR
    loss = PreferenceLoss(config, torch.device(device), at_once=True)
    loss.divergence.fill_(0.4)
    return LearnedUnits(model, loss, size, torch.zeros(len(SUMS), device=device)), units_of(size)


def part_of(units: Units, numbers) -> dict:
    return collate_units(units.__getitems__(list(numbers)))


def eager(body: LearnedUnits, part: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and sums as a step has them that is not captured."""
    found = body.preference.of(body.model, part["units"])
    return found.compared * FACTORS[0] + found.imitated * FACTORS[1], found.sums


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_units_padded_to_their_bucket_teach_the_same(settings):
    model = adapted("gemma3")
    body, units = learning(model, settings)
    part = part_of(units, range(3))
    gradients = Gradients(weights(model), fixed=True)
    with fast_layers(model):
        loss, sums = eager(body, part)
        loss.backward()
        expected = gradients._flat.clone()
        assert expected.norm() > 0
        exact = Bucket(*body.shape(part))
        for bucket in (exact, Bucket(exact.rows + 2 * body.per_unit, exact.length + 9, exact.positions + 13)):
            gradients.clear()
            body.sums.zero_()
            found = body.loss(body.filled(part, bucket), bucket, torch.tensor(FACTORS))
            found.backward()
            assert found.item() == pytest.approx(loss.item(), rel=1e-5)
            assert body.sums.tolist() == pytest.approx(sums.tolist(), rel=1e-5, abs=1e-5)
            assert (gradients._flat - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_step_of_units_needs_no_number_and_nothing_of_the_cpu(settings):
    model = adapted("gemma3").to(THERE)
    body, units = learning(model, settings, THERE)
    part = part_of(units, range(2))
    bucket = Bucket(*body.shape(part))
    assert len(nothing_of_the_cpu(body, model, bucket, body.filled(part, bucket).shape)) > 500


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_two_batches_of_units_are_the_same_operations_and_none_waits(settings):
    model = adapted("gemma3")
    body, units = learning(model, settings)
    parts = [part_of(units, (0, 2)), part_of(units, (3,))]
    bucket = Bucket(*np.max([body.shape(part) for part in parts], 0).tolist())
    the_same_and_none_waits(body, model, parts, bucket, FACTORS)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_captured_units_teach_what_the_eager_step_does(settings, dtype, monkeypatch):
    monkeypatch.setattr(buckets, "WIDER", 9.0)  # pieces of all sizes go into the few shapes there are
    model, told = adapted("llama", "cuda", dtype=dtype), Told()
    body, units = learning(model, settings, "cuda")
    parts = [part_of(units, range(3)), part_of(units, (3, 0)), part_of(units, (2,))]
    shapes = np.repeat([body.shape(part) for part in parts], 4, 0)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    with fast_layers(model):
        gradients = Gradients(weights(model), fixed=True)
        losses, sums = [], torch.zeros_like(body.sums)
        for part in parts:
            loss, of_part = eager(body, part)
            loss.backward()
            losses.append(loss.item())
            sums += of_part
        expected = gradients._flat.clone()
        steps = CapturedSteps(body, gradients, Buckets(shapes, Costs(1, 1)), told)
        for _ in range(2):  # captured first, then only replayed
            gradients.clear()
            body.sums.zero_()
            assert all(steps.run(part, *FACTORS) for part in parts), told.notes
            torch.cuda.synchronize()
            assert (gradients._flat[:-1] - expected[:-1]).norm() < tolerance * expected.norm()
            assert gradients.loss.item() == pytest.approx(sum(losses), rel=tolerance)
            assert body.sums.tolist() == pytest.approx(sums.tolist(), rel=tolerance, abs=tolerance)
    assert len(steps) and not told.notes


def trained_eagerly(cli, tiny, tmp_path, epochs: int, flags: tuple) -> tuple:
    """Prepare pairs and train on them as it is without a GPU; the command that did."""
    assert cli("prepare", write_rows(tmp_path / "pairs.jsonl", pairs()), "--model", tiny, "--valid", 4).code == 0
    command = ("train", "--epochs", epochs, "--rank", 4, "--dtype", "fp32", "--learning-rate", 5e-3, "--samples", 0, "--batch-size", 2,
               "--accumulation", 2, "--force", *flags)
    assert cli(*command).code == 0
    return command


@pytest.fixture(scope="module")
def eager_once(tiny, tmp_path_factory) -> Callable[..., tuple[Path, tuple]]:
    """A run that was trained so with these flags, and the command that did: each is trained once. Copy it, do not change it."""
    @functools.cache
    def made(*flags: object) -> tuple[Path, tuple]:
        place = tmp_path_factory.mktemp("eager")
        run = place / "runs" / "tiny-gemma"
        return run, trained_eagerly(lambda *args: invoke(*args, "--run", run), tiny, place, 2, flags)

    return made


@pytest.fixture
def eagerly(eager_once, tiny, tmp_path) -> Callable[..., tuple]:
    """The command of such a run, which then lies here."""
    def trained(*flags: object) -> tuple:
        run, command = eager_once(*flags)
        copied_run(run, tmp_path, tiny, "pairs.jsonl")
        return command

    return trained


def capture_with(kind: type, monkeypatch) -> None:
    """Let trainings capture their steps with this double."""
    from gemma_tune.train import first_batch, preference

    monkeypatch.setattr(first_batch.FirstBatch, "_why_not_captured", lambda self: None)
    for module in (first_batch, preference):
        monkeypatch.setattr(module, "CapturedSteps", kind)


def same_figures(expected: list[dict], found: list[dict]) -> None:
    """Losses, gradient norms and the figures of preferences in both logs."""
    for was, now in zip(expected, found, strict=True):
        for name in was:
            if name.endswith("accuracies") and was["step"] < 2:
                continue  # up to the first step no answer is likelier than by the reference, but for the last digit
            if "loss" in name or "/" in name or name == "grad_norm":
                assert now[name] == pytest.approx(was[name], rel=2e-3, abs=2e-3), (name, was, now)


class Uncaptured(CapturedSteps):
    """Runs what would be captured, where there is no GPU, and counts the pieces."""

    ran = 0

    def run(self, part, *given):
        bucket = self.buckets.find(*self.body.shape(part))
        if bucket is None:
            return False
        self._weights[:len(given)] = torch.tensor(given)
        loss = self.body.loss(self.body.filled(part, bucket), bucket, self._weights)
        if self.backward:
            loss.backward()
        self.into += loss.detach()
        Uncaptured.ran += 1
        return True


@pytest.mark.parametrize("flags", [(), ("--sft-weight", 0.5), ("--method", "orpo"), ("--method", "kto"), ("--method", "sft")],
                         ids=["dpo", "rpo", "orpo", "kto", "sft"])
def test_a_training_in_captured_steps_is_the_same(cli, eagerly, monkeypatch, flags):
    """All of it but the graph: buckets, what is copied, weights, accumulation, figures, evaluations."""
    command = eagerly(*flags)
    expected = log()
    capture_with(Uncaptured, monkeypatch)
    Uncaptured.ran = 0
    result = cli(*command)
    assert result.code == 0, result.err
    assert "steps are captured in" in result.err and Uncaptured.ran > 10
    found = log()
    assert [was.keys() for was in expected] == [now.keys() for now in found]
    same_figures(expected, found)


class Kept(Uncaptured):
    """Holds memory once it has run, and leaves every third piece to go its own way."""

    held, freed, turns = False, 0, 0

    def __len__(self):
        return int(self.held)

    def forget(self):
        self.held = False
        Kept.freed += 1

    def run(self, part, *given):
        Kept.turns += 1
        if Kept.turns % 3 == 0:
            return False
        self.held = super().run(part, *given)
        return self.held


@pytest.mark.parametrize(("flags", "times"), [(("--sft-weight", 0.5), 3), (("--method", "kto"), 3), (("--method", "sft"), 3),
                                              (("--method", "sft"), 4)], ids=["rpo", "kto", "sft", "too often"])
def test_a_rare_piece_that_does_not_fit_beside_captured_steps_frees_them(cli, eagerly, monkeypatch, flags, times):
    from gemma_tune.train import trainer

    command = eagerly(*flags)
    expected, failed = log(), []
    plain = trainer.GemmaTrainer.with_room

    def with_room(self, work):
        def failing():
            done = work()  # what it adds must not stay
            if self.captured and self.captured.held and len(failed) < times:
                failed.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return done
        return plain(self, failing)

    capture_with(Kept, monkeypatch)
    monkeypatch.setattr(trainer.GemmaTrainer, "with_room", with_room)
    Kept.freed = Kept.turns = 0
    result = cli(*command)
    assert result.code == 0, result.err
    assert len(failed) == times and Kept.freed >= times and "a rare batch needed the memory of captured steps" in result.err
    assert ("from now on none is captured" in result.err) == (times == 4)
    same_figures(expected, log())


def test_a_copy_of_the_gradients_that_does_not_fit_beside_captured_steps_frees_them(cli, eagerly, monkeypatch):
    """Of all weights it takes four bytes for each."""
    command = eagerly("--method", "sft", "--micro-batch", 1)
    expected, failed, saved = log(), [], Gradients.saved

    def without_memory(self):
        if self.begun and self.computed and len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return saved(self)

    capture_with(Kept, monkeypatch)
    monkeypatch.setattr(Gradients, "saved", without_memory)
    Kept.freed = Kept.turns = 0
    result = cli(*command)
    assert result.code == 0, result.err
    assert len(failed) == 2 and "a rare batch needed the memory of captured steps" in result.err
    same_figures(expected, log())


@pytest.mark.parametrize("flags", [("--sft-weight", 0.5), ("--method", "sft")], ids=["rpo", "sft"])
def test_a_rare_piece_that_does_not_fit_at_all_goes_in_halves(cli, eagerly, monkeypatch, flags):
    from gemma_tune.train import trainer

    command = eagerly(*flags)
    expected, plain = log(), trainer.GemmaTrainer._eager_step

    def eager(self, model, part, count):
        plain(self, model, part, count)  # what it adds must not stay
        if self.captured is not None and len(part["lengths"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    capture_with(Kept, monkeypatch)
    monkeypatch.setattr(trainer.GemmaTrainer, "_eager_step", eager)
    Kept.freed = Kept.turns = 0
    result = cli(*command)
    assert result.code == 0, result.err
    assert "going on with 1; a step still learns from the same ones" in result.err and Kept.freed
    same_figures(expected, log())


def test_the_sizes_of_answers_to_other_prompts_are_known_before_they_are_made():
    units = Units(units_of(1).sequences, 1, mismatched=True)
    made = [unit["mismatch"] for unit in units.__getitems__(range(len(units)))]
    sizes, learned = units.mismatch_sizes
    assert sizes.tolist() == [len(row["input_ids"]) for row in made]
    assert learned.tolist() == [int((row["labels"] != IGNORE_INDEX).sum()) for row in made]
