"""The loss inside the model's forward pass: neighbours, families with other heads, TRL's head beside ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from gemma_tune.models.towers import without_towers
from gemma_tune.train.batches import collate, pieces
from gemma_tune.train.loss import IGNORE_INDEX
from gemma_tune.train.summed_loss import _weight, install_summed_loss
from gemma_tune.train.trainer import GemmaTrainer
from support.command import QUICK
from support.models import make_tokenizer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
             max_position_embeddings=256, initializer_range=0.3, pad_token_id=0, eos_token_id=1, bos_token_id=2)


def small(family: str, vocabulary: int = 99, **changes) -> torch.nn.Module:
    """A tiny random model of a family in fp32."""
    import transformers

    text = "Text" if family == "Gemma3" else ""
    settings = SMALL | {"vocab_size": vocabulary} | changes
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}{text}Config")(**settings))


def conversations() -> list[dict]:
    """Rows of several lengths, in which about half of the tokens are learned."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in (23, 5, 14, 9):
        ids = torch.randint(3, 99, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.5, ids, IGNORE_INDEX)
        labels[0], labels[-1] = IGNORE_INDEX, ids[-1]
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def frozen_head(model: torch.nn.Module) -> torch.nn.Parameter:
    """Only one weight of the first layer is learned, which is where a neighbour would show."""
    model.requires_grad_(False)
    return model.model.layers[0].self_attn.v_proj.weight.requires_grad_()


def loss_and_gradient(model, weight, batch) -> tuple[torch.Tensor, torch.Tensor]:
    weight.grad = None
    loss = GemmaTrainer._summed_loss(model, batch)
    loss.backward()
    return loss.detach(), weight.grad


@pytest.mark.parametrize(("family", "changes"), [("Gemma3", {"sliding_window": 6, "layer_types": [
    "sliding_attention", "full_attention"]}), ("Llama", {})], ids=str)
def test_a_conversation_does_not_depend_on_its_neighbours(family, changes):
    model = small(family, **changes)
    weight = frozen_head(model)
    install_summed_loss(model)
    rows = conversations()
    alone = [loss_and_gradient(model, weight, collate([row])) for row in rows]
    together, gradient = loss_and_gradient(model, weight, collate(rows))
    assert together.item() == pytest.approx(sum(loss.item() for loss, _ in alone), rel=1e-6)
    expected = sum(gradient for _, gradient in alone)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    # One row's own gradient, with the others present but not learned.
    for n, (loss, own) in enumerate(alone):
        batch = collate(rows)
        batch["labels"][[m for m in range(len(rows)) if m != n]] = IGNORE_INDEX
        with_others, gradient = loss_and_gradient(model, weight, batch)
        assert with_others.item() == pytest.approx(loss.item(), rel=1e-6)
        assert (gradient - own).norm() < 1e-5 * own.norm()
    in_pieces = [loss_and_gradient(model, weight, part) for part in pieces(collate(rows), 3)]
    assert sum(loss.item() for loss, _ in in_pieces) == pytest.approx(together.item(), rel=1e-6)


def test_the_loss_is_that_of_the_models_own_logits():
    model = small("Gemma3", sliding_window=6)
    rows = conversations()
    expected = 0.0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1].double()
        expected += torch.nn.functional.cross_entropy(
            logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORE_INDEX, reduction="sum").item()
    weight = frozen_head(model)
    install_summed_loss(model)
    assert loss_and_gradient(model, weight, collate(rows))[0].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_of_shards_it_is_the_head_that_the_model_has(tied):
    """Whatever the configuration of its text part says."""
    config = transformers.Gemma3Config(text_config={"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                                    "num_attention_heads": 2, "head_dim": 8}, tie_word_embeddings=False)
    with without_towers(config):
        model = transformers.Gemma3ForConditionalGeneration(config)
    model.config.tie_word_embeddings, model.config.text_config.tie_word_embeddings = tied, not tied
    words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    words.full_tensor, head.full_tensor = lambda: "words", lambda: "head"  # as sharded tensors have
    assert _weight(model) == ("words" if tied else "head")


def test_without_labels_the_forward_pass_is_the_models_own():
    model = small("Llama").requires_grad_(False)
    ids = torch.randint(3, 99, (2, 7))
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    install_summed_loss(model)
    after = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert torch.equal(after.logits, before) and after.loss is None
    assert GemmaTrainer._summed_loss(model, {"input_ids": ids, "labels": ids}).item() == pytest.approx(
        12 * model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape == (2, 9)


# ---- through the command line ----------------------------------------------------------------------------------------

def checkpoint(folder: Path, family: str, **changes) -> Path:
    """A model of another family that speaks Gemma's tokens and template."""
    from gemma_tune.encoding.chat_format import family_template

    folder.mkdir()
    size = make_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": family_template("gemma3_text")}))
    model = small(family, size, **changes)
    if (bias := getattr(model.get_output_embeddings(), "bias", None)) is not None:
        torch.nn.init.normal_(bias, std=0.02)  # too little for the loss to tell
    model.save_pretrained(folder)
    return folder


def plain_loss(model: Path, run: Path) -> float:
    """The mean loss of the validation row by plain transformers."""
    from transformers import AutoModelForCausalLM

    from gemma_tune.encoding.tokens import open_tokens

    [tokens] = run.rglob("valid.arrow")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    total = count = 0
    for row in open_tokens(tokens):
        labels = torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            logits = base(torch.tensor(row["input_ids"])[None]).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        count += (labels != IGNORE_INDEX).sum().item()
    return total / count


@pytest.mark.parametrize(("family", "changes"), [
    ("Gemma2", {"final_logit_softcapping": 3.0}), ("Granite", {"logits_scaling": 4.0}), ("Cohere", {"logit_scale": 0.25})],
    ids=str)
def test_families_with_capped_or_scaled_logits_are_trained_on_their_own_loss(cli, data, tmp_path, family, changes):
    model = checkpoint(tmp_path / "other", family, **changes)
    assert cli("prepare", data, "--model", model).code == 0
    result = cli("train", *QUICK, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["eval_loss_before"] == pytest.approx(plain_loss(model, Path("runs/other")), rel=1e-5)


def test_a_head_with_a_bias_is_refused_before_training(cli, data, tmp_path, monkeypatch):
    """Also where it is so small that the loss of one row does not tell."""
    from gemma_tune.train.trainer import GemmaTrainer

    steps = []
    monkeypatch.setattr(GemmaTrainer, "training_step", lambda self, *args: steps.append(args))
    model = checkpoint(tmp_path / "biased", "Phi")
    assert cli("prepare", data, "--model", model).code == 0
    result = cli("train", *QUICK)
    assert result.code == 2
    assert "(phi) adds a bias to its logits" in result.err and "Hint: use a model of another family" in result.err
    assert not steps and not list(Path("runs/biased").glob("*adapter*"))


@pytest.mark.parametrize(("family", "changes"), [("Gemma2", {"final_logit_softcapping": 3.0}), ("Cohere", {"logit_scale": 0.25}), ("Llama", {})],
                         ids=["capped", "scaled", "plain"])
def test_a_temperature_divides_what_the_model_makes_of_its_logits(family, changes):
    model = small(family, **changes).eval().requires_grad_(False)
    install_summed_loss(model)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        expected = -(model(ids).logits[0, :-1] / 0.6).log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        given = {"input_ids": ids, "positions": torch.arange(9), "targets": ids[0, 1:], "each": True}
        assert torch.allclose(model(**given, temperature=0.6)["losses"], expected, rtol=1e-5)
        assert not torch.allclose(model(**given)["losses"], expected, rtol=1e-2)
