"""The loss of answers that were sampled, and its gradient, against TRL's trainer; advantages, and what is learned of a step."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from train.test_preference_loss import adapted, gradients, moved, same, tokenizer  # noqa: F401 - a fixture
from trl.trainer.utils import nanstd

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.grpo import RewardTrainer, pieces_of_answers
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.memory import choose, estimate, sampled_at_once
from gemma_tune.train.policy_loss import PolicyLoss, WeightsBefore
from gemma_tune.train.rollouts import Rollout, advantages, numbers_of, to_learn
from gemma_tune.train.shape import shape_of
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.token_losses import TokenLosses

GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [0.2, 0.7, -3.0, 0.1]]


def rollouts(seed: int = 0) -> list[Rollout]:
    """Prompts of several lengths, with answers of several lengths."""
    draw = np.random.default_rng(seed)
    found = []
    for number, rewards in enumerate(GROUPS):
        prompt = draw.integers(3, 90, 3 + 4 * number).tolist()
        answers = [draw.integers(3, 90, size).tolist() for size in draw.integers(1, 9, len(rewards))]
        found.append(Rollout({"prompt": prompt, "number": number}, answers, np.ones(len(rewards), bool), np.zeros((len(rewards), 0)),
                             np.array(rewards), [""] * len(rewards), ""))
    return found


def theirs(trainer, found: list[Rollout]) -> tuple[float, dict[str, torch.Tensor], float]:
    """By TRL's loss, of all answers in one batch, those of tied groups among them; with its own figure of the divergence."""
    pairs = [(one.item["prompt"], ids) for one in found for ids in one.answers]
    widths = max(len(prompt) for prompt, _ in pairs), max(len(ids) for _, ids in pairs)
    batch = {name: torch.zeros(len(pairs), width, dtype=torch.long) for name, width in (
        ("prompt_ids", widths[0]), ("prompt_mask", widths[0]), ("completion_ids", widths[1]), ("completion_mask", widths[1]))}
    for n, (prompt, ids) in enumerate(pairs):
        batch["prompt_ids"][n, widths[0] - len(prompt):] = torch.tensor(prompt)
        batch["prompt_mask"][n, widths[0] - len(prompt):] = 1
        batch["completion_ids"][n, :len(ids)], batch["completion_mask"][n, :len(ids)] = torch.tensor(ids), 1
    rewards = torch.tensor(GROUPS, dtype=torch.float32)
    spread = nanstd(rewards, dim=1)[:, None]
    scale = spread + 1e-4 if trainer.scale_rewards == "group" else 1
    batch["advantages"] = ((rewards - rewards.mean(1, keepdim=True)) / scale).flatten()
    batch["num_items_in_batch"] = batch["completion_mask"].sum()
    trainer.current_gradient_accumulation_steps = 1
    if trainer.beta:
        ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"completion_{name}"]], 1) for name in ("ids", "mask"))
        with trainer.model.disable_adapter(), torch.no_grad():
            batch["ref_per_token_logps"] = trainer._get_per_token_logps_and_entropies(trainer.model.eval(), ids, mask, widths[1])[0]
    loss = trainer._compute_loss(trainer.model.train(), batch)
    loss.backward()
    return loss.item(), gradients(trainer.model), (trainer._metrics["train"]["kl"] or [0.0])[-1]


@pytest.mark.parametrize(("beta", "temperature", "scaled"), [(0.0, 1.0, "group"), (0.3, 1.0, "group"), (0.3, 0.7, "none")])
@pytest.mark.parametrize(("pieces", "way"), [(100, "shared"), (100, "similar lengths"), (100, "one batch"), (3, "shared"), (1, "similar lengths")])
def test_the_loss_is_that_of_trl(tokenizer, tmp_path, monkeypatch, pieces, way, beta, temperature, scaled):  # noqa: F811
    from trl import GRPOConfig, GRPOTrainer

    found = [dataclasses.replace(one, scaled=scaled == "group") for one in rollouts()]
    trainer = GRPOTrainer(model=adapted(tokenizer), reward_funcs=lambda **row: [0.0], processing_class=tokenizer, args=GRPOConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4,
        gradient_checkpointing=False, beta=beta, temperature=temperature, scale_rewards=scaled), train_dataset=Dataset.from_dict({"prompt": ["a", "b", "c", "d"]}))
    moved(trainer.model)
    *expected, divergence = theirs(trainer, found)

    model = adapted(tokenizer)
    before = WeightsBefore(p for p in model.parameters() if p.requires_grad)
    moved(model).train()
    install_summed_loss(model.get_base_model())
    tokens = sum(len(ids) for one in found for ids in one.answers)
    token_losses, shared, total = TokenLosses(torch.device("cpu"), way == "one batch", None, temperature), [], 0.0
    token_losses.shares = way == "shared"
    theirs_too = token_losses._shared
    monkeypatch.setattr(token_losses, "_shared", lambda *given: shared.append(given[2]) or theirs_too(*given))
    policy = PolicyLoss(token_losses, beta)
    policy.before = before
    with fast_layers(model):
        for part in pieces_of_answers(to_learn(found, tied=bool(beta)), pieces):
            loss = RewardTrainer.compute_loss(SimpleNamespace(policy=policy), model, part, num_items_in_batch=tokens)
            loss.backward()
            total += loss.item()
    if not beta:
        assert shared == {(100, "shared"): [[4, 4]], (3, "shared"): [[3], [1, 2], [2]]}.get((pieces, way), [])
    assert policy.divergence.item() / tokens == pytest.approx(divergence, rel=1e-4) and (divergence > 1e-3) == bool(beta)
    same((total, gradients(model)), tuple(expected))


def test_what_was_before_takes_its_place_for_a_moment():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.zeros(2, 2))]
    before = WeightsBefore(weights)
    places = [weight.data_ptr() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight += 5
    version = weights[0]._version
    with pytest.raises(KeyError), before.put_back():
        assert weights[0].tolist() == [1, 1, 1] and not weights[1].any() and weights[0]._version > version
        raise KeyError
    assert weights[0].tolist() == [6, 6, 6] and (weights[1] == 5).all() and [w.data_ptr() for w in weights] == places


def test_advantages_are_told_within_a_group():
    found = advantages(np.array([1.0, 0.0, 0.0, 1.0]))
    assert found.tolist() == pytest.approx([0.8659, -0.8659, -0.8659, 0.8659], abs=1e-3) and abs(found.sum()) < 1e-12
    for rewards in ([0.3] * 8, [0.1 + 0.2, 0.3], [0.0, 0.0], [2.5]):
        assert not advantages(np.array(rewards)).any(), "what differs by rounding alone is the same"
    assert advantages(np.array([1e-3, 0.0])).all(), "a small reward is one"


def test_answers_of_tied_groups_are_not_learned():
    found = rollouts()
    learned = to_learn(found, tied=False)
    assert len(learned["lengths"]) == 8 and found[1].tied
    assert learned["groups"] == [2] * 4 + [0] * 4, "that with the longest first"
    rows = [(one, ids, advantage) for one in (found[2], found[0]) for ids, advantage in zip(one.answers, one.advantages)]
    for row, length, advantage, (one, ids, own) in zip(learned["rows"], learned["lengths"], learned["advantages"], rows, strict=True):
        prompt = one.item["prompt"]
        assert row["input_ids"].tolist() == [*prompt, *ids] and len(row["input_ids"]) == length
        assert row["labels"].tolist() == [IGNORE_INDEX] * len(prompt) + ids and advantage.item() == pytest.approx(own, rel=1e-6)
    nothing = to_learn(found[1:2], tied=False)
    assert nothing["rows"][0]["labels"].tolist() == [IGNORE_INDEX] and nothing["lengths"].tolist() == [1]
    everything = to_learn(found, tied=True)
    assert len(everything["lengths"]) == 12 and sum(not value for value in everything["advantages"].tolist()) == 4


def test_numbers_follow_from_seed_step_and_prompt_alone():
    first = numbers_of(42, 3, 7, 8, 16)
    assert first.shape == (8, 16) and (first == numbers_of(42, 3, 7, 8, 16)).all()
    for other in ((43, 3, 7), (42, 4, 7), (42, 3, 8)):
        assert not (first == numbers_of(*other, 8, 16)).any()
    assert len(np.unique(first)) == first.size


def test_the_plan_counts_what_is_sampled(tiny):
    config = TrainConfig(method="grpo", reward=("exact",), batch_size=4, answers=8, max_new_tokens=200)
    assert sampled_at_once(config) == 32 and config.learned_at_once == 32
    shape = shape_of(tiny, config, torch.float32)
    assert shape.cached == 2 * 2 * 32, "keys and values of two layers, each of one head of 32"
    cache, drawing = 32 * 256 * shape.cached * 4, 32 * 24 * shape.head // shape.hidden
    on_gpu = estimate(shape, 1, 230, checkpointing=False, four_bit=False, device="cuda", sampled=32)
    assert on_gpu.sampling == 2 * cache + drawing
    on_cpu = estimate(shape, 1, 230, checkpointing=False, four_bit=False, device="cpu", sampled=32)
    assert on_cpu.sampling == 0, "less than the step needs when it is gone"
    large = estimate(shape, 1, 100_000, checkpointing=False, four_bit=False, device="cpu", sampled=32)
    assert large.total >= 32 * 100_000 * shape.cached * 4
    compared = choose(shape, dataclasses.replace(config, beta=0.1), 230, "cpu", 10 ** 12).memory
    assert compared.adapter == 3 * choose(shape, config, 230, "cpu", 10 ** 12).memory.adapter, "of before, of now, and the one that changes"
    chosen = choose(shape, config, 230, "cpu", 10 ** 12)
    assert chosen.micro_batch == 32 and 32 % choose(shape, config, 230, "cpu", 900_000_000).micro_batch == 0
