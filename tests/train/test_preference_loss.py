"""Losses of preferences, and their gradients, against TRL's trainers on the same tokens in fp32."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from train.test_summed_loss import small
from transformers import AutoTokenizer

from gemma_tune.config.stages import TrainConfig
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.objectives import Answers, orpo_loss
from gemma_tune.train.preference_loss import PreferenceLoss
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.units import PAIR, Units
from support.models import make_tokenizer

PROMPTS = ["what is this", "a much longer question about that", "why", "and now something else"]
CHOSEN = [" a short answer", " yes", " because of the other thing that is there", " this"]
REJECTED = [" no", " a longer answer that says less than it could", " why not", " that and those"]
TOLERANCE = 1e-5


def adapted(tokenizer):
    """A tiny model in fp32 with a new adapter, which is zero."""
    model = small("Gemma3", len(tokenizer), sliding_window=16, layer_types=["sliding_attention", "full_attention"])
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    return moved(model, 0.0)


def moved(model, size: float = 0.1):
    """Let the adapter be another than before the first step."""
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_A.default" in name or "lora_B.default" in name:
            weight.data = torch.randn_like(weight) * (size if "lora_B" in name else 0.3)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    model.zero_grad()
    return found


def same(ours: tuple, theirs: tuple) -> None:
    """The same loss, and the same gradient of the same weights, by its norm."""
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE, abs=TOLERANCE)
    assert ours[1].keys() == theirs[1].keys() and theirs[1]
    got, expected = (torch.cat([found[name].flatten() for name in theirs[1]]) for found in (ours[1], theirs[1]))
    assert (got - expected).norm() <= TOLERANCE * expected.norm()


class Sequences:
    """What ``open_tokens`` gives, of rows in memory."""

    def __init__(self, rows: list[tuple[list[int], int, int]]):
        """Args: ids, where the answer begins, and 1 or -1 for each."""
        import pyarrow as pa

        self.rows = [{"input_ids": np.array(ids), "labels": np.array([IGNORE_INDEX] * start + ids[start:])}
                     for ids, start, _ in rows]
        self.data = pa.table({"input_ids": pa.array([ids for ids, _, _ in rows], pa.list_(pa.int32())),
                              "spans": pa.array([[start, len(ids)] for ids, start, _ in rows], pa.list_(pa.int32())),
                              "answer": pa.array([mark for _, _, mark in rows], pa.int8())})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict:
        return self.rows[number]


def sequences_of(batch, mask: str, marks: list[int], order: list[int]) -> Sequences:
    """TRL's batch as our sequences: what it pads is left out."""
    rows = []
    for n in order:
        kept = batch["attention_mask"][n].bool()
        ids, answer = batch["input_ids"][n][kept].tolist(), batch[mask][n][kept].bool().tolist()
        rows.append((ids, answer.index(True), marks[n]))
    return Sequences(rows)


def ours(model, units: Units, settings: TrainConfig, at_once: bool = False):
    """Loss and gradient by our head, with the reference that it computes itself."""
    install_summed_loss(model.get_base_model())
    loss = PreferenceLoss(settings, torch.device("cpu"), at_once)
    everything = units.__getitems__(range(len(units)))
    with torch.no_grad():
        rows = [row for unit in everything for row in unit["sequences"]]
        units.reference = loss.log_probabilities(model, rows)[0].numpy()
        if units.mismatched:
            logps, _ = loss.log_probabilities(model, [unit["mismatch"] for unit in everything])
            units.mismatch_reference = logps.numpy()
    everything = units.__getitems__(range(len(units)))
    moved(model)
    if units.mismatched:
        with torch.no_grad():
            now, _ = loss.log_probabilities(model, [unit["mismatch"] for unit in everything])
        loss.divergence = (now - torch.from_numpy(units.mismatch_reference)).mean().clamp(min=0)
    found = loss.of(model, everything)
    total = found.compared / len(units) + loss.imitation * found.imitated / max(1, int(units.liked.sum()))
    total.backward()
    return total.item(), gradients(model)


def trainer_of(kind, config, model, tokenizer, dataset, tmp_path, **settings):
    arguments = config(output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False,
                       per_device_train_batch_size=len(dataset), max_length=None, gradient_checkpointing=False,
                       **settings)
    return kind(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


PAIRS = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
DPO = {"sigmoid": ({}, {}), "a larger beta": ({"beta": 0.7}, {"beta": 0.7}),
       "ipo": ({"loss_type": ["ipo"], "beta": 0.2}, {"dpo_loss": "ipo", "beta": 0.2}),
       "with the answers' own loss": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]},
                                      {"sft_weight": 0.3})}


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("theirs", "settings"), DPO.values(), ids=DPO)
def test_dpo_is_that_of_trl(tokenizer, tmp_path, theirs, settings, at_once):
    from trl import DPOConfig, DPOTrainer

    model = adapted(tokenizer)
    trainer = trainer_of(DPOTrainer, DPOConfig, model, tokenizer, Dataset.from_dict(PAIRS), tmp_path, **theirs)
    batch = next(iter(trainer.get_train_dataloader()))
    moved(trainer.model).train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected = loss.item(), gradients(model)
    count = len(PROMPTS)
    order = [n + part * count for n in range(count) for part in range(PAIR)]
    rows = sequences_of(batch, "completion_mask", [1] * count + [-1] * count, order)
    same(ours(adapted(tokenizer), Units(rows, PAIR), TrainConfig(method="dpo", **settings), at_once), expected)


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_kto_is_that_of_trl(tokenizer, tmp_path, beta):
    from trl import KTOConfig, KTOTrainer

    marks = [1, -1, -1, 1]
    dataset = Dataset.from_dict({"prompt": PROMPTS, "completion": CHOSEN, "label": [mark > 0 for mark in marks]})
    model = adapted(tokenizer)
    trainer = trainer_of(KTOTrainer, KTOConfig, model, tokenizer, dataset, tmp_path, beta=beta, undesirable_weight=1.3)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(marks))])
    moved(trainer.model).train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    expected = loss.item(), gradients(model)
    units = Units(sequences_of(batch, "completion_mask", marks, range(len(marks))), 1, mismatched=True)
    units.shift, units.longest = -1, 10_000  # TRL's other answer is that of the row before
    same(ours(adapted(tokenizer), units, TrainConfig(method="kto", beta=beta, bad_weight=1.3)), expected)


def test_orpo_is_that_of_trl(tokenizer, tmp_path):
    """TRL's also learns the prompts, which is left out here: they are one token, which nothing predicts."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    pairs = PAIRS | {"prompt": [tokenizer.bos_token] * len(PROMPTS)}
    model = adapted(tokenizer)
    trainer = trainer_of(ORPOTrainer, ORPOConfig, model, tokenizer, Dataset.from_dict(pairs), tmp_path, beta=0.2,
                         remove_unused_columns=False)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(PROMPTS))])
    moved(trainer.model).train()
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    expected = loss.item(), gradients(model)
    rows = []
    for n in range(len(PROMPTS)):
        for side, mark in (("chosen", 1), ("rejected", -1)):
            kept = batch[f"{side}_attention_mask"][n].bool()
            rows.append((batch[f"{side}_input_ids"][n][kept].tolist(), 1, mark))
    same(ours(adapted(tokenizer), Units(Sequences(rows), PAIR), TrainConfig(method="orpo", beta=0.2)), expected)


def test_orpo_of_answers_that_are_certain_is_finite():
    now = torch.zeros(2, 1, requires_grad=True)
    sure, other = (Answers(one, torch.zeros(1), torch.full((1,), 3)) for one in (now[0], now[1] - 6))
    loss = orpo_loss(sure, other, 0.2) + orpo_loss(other, sure, 0.2)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(now.grad).all()


def test_smoothing_is_the_mean_of_both_directions(tokenizer):
    ids = [[2, *range(5, 5 + n)] for n in (4, 6)]
    rows, turned = ([(ids[a], 2, 1), (ids[b], 2, -1)] for a, b in ((0, 1), (1, 0)))

    def loss(rows, **settings):
        return ours(adapted(tokenizer), Units(Sequences(rows), PAIR), TrainConfig(method="dpo", **settings))

    one, other, both = loss(rows), loss(turned), loss(rows, label_smoothing=0.2)
    mixed = {name: 0.8 * one[1][name] + 0.2 * other[1][name] for name in one[1]}
    same(both, (0.8 * one[0] + 0.2 * other[0], mixed))


def test_whole_logits_never_exist(tokenizer):
    """No tensor of the step has as many numbers as sequences x tokens x vocabulary, but for the head itself."""
    from torch.utils._python_dispatch import TorchDispatchMode

    ids = [[2, *range(5, 5 + n)] for n in (40, 44, 37, 41)]
    units = Units(Sequences([(row, 10, mark) for row, mark in zip(ids, (1, -1, 1, -1))]), PAIR)
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            with contextlib.suppress(AttributeError):
                sizes.append(result.shape)
            return result

    model = adapted(tokenizer)
    with Watch():
        ours(model, units, TrainConfig(method="dpo"))
    vocabulary = model.get_base_model().config.vocab_size
    assert sizes and not [size for size in sizes if len(size) == 3 and size[-1] == vocabulary]


def test_a_model_with_dropout_of_its_own_is_compared_without():
    """OPT's layers keep numbers, GPT-2's are layers, Falcon's ask the configuration; what the user asked for the adapter
    stays."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config, OPTConfig

    from gemma_tune.train.preference import without_dropout

    ids = torch.arange(3, 30)[None]
    for config, layers in ((OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                                      word_embed_proj_dim=32), ["q_proj"]),
                           (GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=2), ["c_attn"]),
                           (FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                         attention_dropout=0.3, hidden_dropout=0.3), ["query_key_value"])):
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, lora_dropout=0.1, target_modules=layers))
        with torch.no_grad():
            expected = model.eval()(ids).logits
            model.train()
            assert not torch.equal(model(ids).logits, expected)
            without_dropout(model.get_base_model())
            assert torch.equal(model(ids).logits, expected), "an adapter that has learned nothing yet adds nothing"
        assert {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")} == {0.1}
