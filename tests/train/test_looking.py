"""Rows with pictures are learned: the loss and its gradient are those of the whole model that looks at them itself."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch
from answers.test_eyes import _OF_PICTURES, FAMILIES, pictures, seers  # noqa: F401 - fixtures
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from gemma_tune.answers.sight import Seen, beside
from gemma_tune.config.stages import TrainConfig
from gemma_tune.encoding.eye import PICTURES, eye_of
from gemma_tune.encoding.tokenizer import load_tokenizer
from gemma_tune.encoding.tokens import TokenWriter, open_tokens, those
from gemma_tune.lora.layers import TOWERS, target_modules
from gemma_tune.lora.targets import lora_config, targets_of
from gemma_tune.lora.whole import left_whole
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement
from gemma_tune.train.batches import collate, pieces
from gemma_tune.train.effect import _logits, _seen
from gemma_tune.train.first_batch import FirstBatch
from gemma_tune.train.kernels import fast_layers
from gemma_tune.train.looking import Shown, tower_bytes
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from gemma_tune.train.whole import train_whole
from support.gemmas import randomise

FP32 = Placement("cpu", torch.float32, "test")


def adapted(model, dropout: float = 0.0):
    """With an adapter that does something, the same for models that call their layers the same."""
    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=target_modules(model, ())))
    generator = torch.Generator().manual_seed(2)
    for _, parameter in sorted((n, p) for n, p in tuned.named_parameters() if p.requires_grad):
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return tuned.train()


class Rows:
    """Rows of a family, some with pictures, and its models: ``tuned`` learns from what was seen, ``whole`` looks."""

    def __init__(self, folder, place):
        self.tokenizer, self.folder = load_tokenizer(folder), folder
        self.eye = eye_of(folder, self.tokenizer, place)
        self.seen = Seen(place / "seen", self.eye, "fingerprint", "float32")
        self.whole = load_model(folder, FP32, sight="towers").eval()
        for name in ("0.png", "1.png", "2.png"):
            self.seen.look(self.whole, name)

    def row(self, *names: str, words: str = "one two three") -> dict:
        text = self.eye.shown("".join(f"one {self.eye.place} two" for _ in names) + words, names)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-5:] = ids[-5:]
        return {"input_ids": ids, "labels": labels, PICTURES: list(names)}

    def batch(self, rows: list[dict]) -> dict:
        return self.with_sight(collate(rows))

    def with_sight(self, made: dict, device: torch.device | None = None) -> dict:
        if PICTURES not in made:
            return made
        return made | {"seen": beside(self.seen, self.eye, made["input_ids"], made[PICTURES], device)}

    def tuned(self, **how):
        model = adapted(load_model(self.folder, FP32, sight="features"), **how)
        install_summed_loss(model.get_base_model())
        return model


def make_qwen_vl(model_type: str, like: Path, folder: Path) -> Path:
    """A random Qwen VL with the tokenizer of a Qwen 3.5; what the third one sees is added behind early layers, too."""
    config = json.loads((like / "config.json").read_text())
    text = dict(vocab_size=config["text_config"]["vocab_size"], hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=None,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]})
    eye = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, out_hidden_size=64)
    eye |= (dict(num_position_embeddings=64, deepstack_visual_indexes=[0, 1]) if model_type == "qwen3_vl"
            else dict(fullatt_block_indexes=[1], window_size=32))
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    kind = CONFIG_MAPPING[model_type]
    torch.manual_seed(0)
    network = AutoModelForImageTextToText.from_config(kind(text_config=text, vision_config=eye, **{
        name: config[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}))
    randomise(network, False)
    network.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def of(seers, pictures, tmp_path):  # noqa: F811
    def rows(family: str) -> Rows:
        return Rows(make_qwen_vl(family, seers("qwen3.5"), tmp_path / family) if family.endswith("_vl") else seers(family), pictures)

    return rows


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for p in model.parameters():
        p.grad = None
    return found


def learned(model, batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = GemmaTrainer._summed_loss(model, batch)
    loss.backward()
    return loss.item(), gradients(model)


def looked_at(whole, rows: Rows, row: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Five times the loss of a row with one picture by the model that looks at it itself, and the gradients."""
    ids = row["input_ids"][None]
    marks = {rows.eye.marks: (ids == rows.eye.soft_id).long()} if rows.eye.marks else {}
    shown = {key: value for key, value in rows.eye.inputs("0.png").items() if key in _OF_PICTURES}
    theirs = whole(input_ids=ids, labels=row["labels"][None], attention_mask=torch.ones_like(ids), **marks, **shown).loss
    (theirs * 5).backward()
    return 5 * theirs.item(), gradients(whole)


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    a, b = (torch.cat([found[name].flatten() for name in sorted(found)]) for found in (got, expected))
    assert (a - b).norm() < tolerance * b.norm() and b.norm() > 0


ALL = (*FAMILIES, "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_it_is_learned_as_by_the_model_that_looks_itself(of, family, recomputed):
    """With our layers and attention in place, against transformers' own pass over pixels, labels included."""
    rows = of(family)
    row = rows.row("0.png")
    whole = adapted(rows.whole)
    theirs, expected = looked_at(whole, rows, row)
    tuned = rows.tuned()
    if recomputed:
        tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with fast_layers(tuned):
        ours, found = learned(tuned, rows.batch([row]))
    assert ours == pytest.approx(theirs, rel=1e-5)
    same(found, expected, 1e-4)
    with fast_layers(tuned):
        other, _ = learned(tuned, rows.batch([row | {PICTURES: ["2.png"]}])) if family == "gemma3" else (None, None)
    assert other is None or abs(other - ours) > 1e-3, "the picture matters"


@pytest.mark.parametrize("family", ALL)
def test_all_weights_learn_it_as_by_the_model_that_looks_itself(of, family):
    """The gradient of each weight of the text model is that of plain autograd on the whole model with its pixels."""
    rows, config = of(family), TrainConfig(full=True)
    row, whole = rows.row("0.png"), rows.whole.requires_grad_()
    theirs, wanted = looked_at(whole, rows, row)
    base = load_model(rows.folder, FP32, sight="features")
    left = left_whole(base)
    tuned = get_peft_model(base, lora_config(config, targets_of(base, config))).train()
    train_whole(tuned)
    install_summed_loss(base)
    with fast_layers(tuned):
        ours, found = learned(tuned, rows.batch([row]))
    assert ours == pytest.approx(theirs, rel=1e-5)
    plain = {name.removeprefix("base_model.model.").replace(".modules_to_save.default", ""): grad for name, grad in found.items()}
    missing = {name for name, grad in wanted.items() if grad is not None and not TOWERS.search(name)} ^ plain.keys()
    assert {name.split(".")[-2] for name in missing} == {*left}
    for name, grad in plain.items():
        assert (grad - wanted[name]).norm() <= 1e-4 * wanted[name].norm() + 1e-7, name


@pytest.mark.parametrize("family", ALL)
def test_rows_of_a_batch_are_as_alone(of, family):
    """Of several pictures, of one and of none, padded to the longest."""
    rows = of(family)
    records = [rows.row("0.png", "1.png"), rows.row(words="no picture, and few words"), rows.row("2.png", words="one")]
    tuned = rows.tuned()
    with fast_layers(tuned):
        alone = [learned(tuned, rows.batch([record])) for record in records]
        loss, found = learned(tuned, rows.batch(records))
    assert loss == pytest.approx(sum(one for one, _ in alone), rel=1e-5)
    same(found, {name: sum(grads[name] for _, grads in alone) for name in found}, 1e-4)
    assert getattr(tuned.get_base_model().model, "rope_deltas", None) is None, "what is answered next begins at its own place"


@pytest.mark.parametrize("family", ["gemma3", "qwen3.5"])
def test_what_a_compiled_training_did_is_told_by_what_the_model_sees(of, family):
    """Compiled layers are set aside for it, and faster ones take their place."""
    rows = of(family)
    record, tuned = rows.row("0.png"), rows.tuned()
    trainer = SimpleNamespace(model=tuned, causal_lm=tuned.get_base_model(), compiled=True, shown=SimpleNamespace(
        inputs=lambda ids, names, device: beside(rows.seen, rows.eye, ids, names, device)))
    trainer.evaluating = MethodType(GemmaTrainer.evaluating, trainer)
    found = _logits(trainer, record["input_ids"].tolist(), 5, _seen(trainer, record["input_ids"].tolist(), ["0.png"]))
    whole, ids = adapted(rows.whole).eval(), record["input_ids"][None]
    marks = {rows.eye.marks: (ids == rows.eye.soft_id).long()}
    shown = {key: value for key, value in rows.eye.inputs("0.png").items() if key in _OF_PICTURES}
    with torch.no_grad():
        with whole.disable_adapter():
            expected = [whole(input_ids=ids, **marks, **shown).logits[0, -5:]]
        expected.append(whole(input_ids=ids, **marks, **shown).logits[0, -5:])
    for got, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", ALL)
def test_what_sees_is_counted_before_it_is_loaded(of, family):
    rows = of(family)
    whole, text = rows.whole, load_model(rows.folder, FP32, sight="none")
    more = sum(p.numel() for p in whole.parameters()) - sum(p.numel() for p in text.parameters())
    small = sum(p.numel() for name, p in text.named_parameters() if TOWERS.search(name))  # a projector that is not left out
    assert tower_bytes(rows.folder, 4) == 4 * (more + small) > 0


def test_pieces_with_pictures_are_planned_by_themselves():
    class Planned(FirstBatch):
        micro_batch = 2
        shown = SimpleNamespace(pictured=(np.array([0, 1, 0, 0, 0, 0], bool), np.array([1, 0], bool)))

    found = Planned()
    assert found._those([[0, 1, 2], [3, 4, 5], []], 0, pictured=False) == [[2], [3, 4], [5]]
    assert found._those([[0, 1, 2], [3, 4, 5], []], 0, pictured=True) == [[0, 1]]
    assert found._those([[1, 0]], 1, pictured=False) == [] and found._those([[1, 0]], 1, pictured=True) == [[1, 0]]
    Planned.shown = None
    assert found._those([[0, 1, 2], []], 0, pictured=False) == [[0, 1, 2], []]


def test_tokens_of_pictures_are_counted_without_reading_rows(tmp_path):
    """Also of those that were picked out of others, and in several blocks."""
    ids = [[5, 9, 9, 1], [1], [9, 9, 9, 9, 2], [3, 9], []]
    with TokenWriter(tmp_path / "t.arrow") as writer:
        for row in ids:
            writer.add([(np.array(row, np.int32), np.zeros(0, np.int32), "a.png" if 9 in row else "")])
            writer._flush()
    whole = open_tokens(tmp_path / "t.arrow")
    some = those(whole, np.array([0, 1, 1, 1, 0], bool))
    shown = Shown(["a.png"], (whole, some), SimpleNamespace(soft_id=9), None, None)
    assert [side.tolist() for side in shown.parts] == [[2, 0, 4, 1, 0], [0, 4, 1]]
    assert [side.tolist() for side in shown.pictured] == [[True, False, True, True, False], [False, True, True]]


def test_what_is_seen_is_read_piece_by_piece():
    read = []
    shown = SimpleNamespace(inputs=lambda ids, names, device: read.append(names) or {})
    trainer = SimpleNamespace(split=pieces, micro_batch=1, sharded=False, shown=shown,
                              accelerator=SimpleNamespace(device=torch.device("cpu")))
    trainer.with_sight = partial(GemmaTrainer.with_sight, trainer)
    words = torch.tensor([1, 2])
    batch = collate([{"input_ids": words, "labels": words, PICTURES: names} for names in (["a"], [], ["b"])])
    for n, part in enumerate(GemmaTrainer._pieces(trainer, batch)):
        assert read == [[["a"]], [["b"]]][:(n + 1) // 2], "not before it is needed"
        part = trainer.with_sight(part)
        assert read == [[["a"]], [["b"]]][:1 + n // 2] and ("seen" in part) == (n != 1)
