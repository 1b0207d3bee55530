"""Rows of new tokens in training: where they begin, and their gradients, against PEFT's own and plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model

from gemma_tune.base.errors import UserError
from gemma_tune.lora.targets import with_whole
from gemma_tune.lora.token_rows import rows_in
from gemma_tune.train.summed_loss import install_summed_loss
from gemma_tune.train.token_rows import forget, new_tokens

TEXTS = {7: [20, 21, 22], 5: [30], 90: [31, 20]}
SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             head_dim=16, initializer_range=0.3, pad_token_id=0, bos_token_id=2, eos_token_id=1, max_position_embeddings=64)
MODELS = {"gemma 3, which scales and caps": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**SIZES, final_logit_softcapping=8.0)),
          "llama, untied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**SIZES)),
          "granite, tied, which divides logits": lambda: T.GraniteForCausalLM(
              T.GraniteConfig(**{name: size for name, size in SIZES.items() if name != "head_dim"}, logits_scaling=4.0, tie_word_embeddings=True))}


def base(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(3)
    return MODELS[kind]().to(dtype)


def learning(model: Any) -> tuple[Any, Any]:
    """The model with LoRA and learned rows, and what is to be forgotten with them."""
    tokens = new_tokens(model, TEXTS, with_whole(model, [], [], []))
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    return tuned, tokens.begin(tuned)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (2, 9), positions that predict a learned token, and these tokens; one only fills up."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(8, 90, (2, 9), generator=generator)
    ids[0, 2], ids[0, 5], ids[1, 4], ids[1, 8] = 7, 7, 5, 90
    positions = torch.tensor([1, 3, 4, 5, 12, 13, 16, 16])
    targets = ids.flatten()[positions + 1].clone()
    targets[-1] = -100
    return ids, positions, targets


def theirs(kind: str, temperature: float) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by PEFT's own layers and plain cross-entropy, from the same start."""
    model = base(kind)
    ends = {"embed_tokens": [*TEXTS]} | ({} if model.config.tie_word_embeddings else {"lm_head": [*TEXTS]})
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ends), autocast_adapter_dtype=False)
    rows = {name: p for name, p in tuned.named_parameters() if "trainable_tokens_delta" in name}
    with torch.no_grad():
        for name, parameter in rows.items():
            weight = (model.lm_head if "lm_head" in name else model.model.embed_tokens).token_adapter.base_layer.weight
            parameter.copy_(torch.stack([weight[old].mean(0) for old in TEXTS.values()]))
    ids, positions, targets = batch()
    logits = tuned(input_ids=ids).logits.flatten(0, 1)[positions] / temperature
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad for name, p in rows.items()}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_pefts_own_rows(kind, temperature):
    model = base(kind)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned, _ = learning(model)
    install_summed_loss(model)
    ids, positions, targets = batch()
    loss = tuned(input_ids=ids, positions=positions, targets=targets, temperature=temperature)["loss"]
    loss.backward()
    expected_loss, expected = theirs(kind, temperature)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6)  # masters are fp32
    own = {name: p.grad for name, p in tuned.named_parameters() if "trainable_tokens_delta" in name}
    assert own.keys() == expected.keys() and len(own) == (1 if model.config.tie_word_embeddings else 2)
    for name, grad in own.items():
        assert grad.abs().max() > 1e-3
        torch.testing.assert_close(grad.double(), expected[name], rtol=1e-4, atol=3e-5)
    others = [i for i in range(96) if i not in TEXTS]
    for name, weight in model.named_parameters():
        if name in frozen and "embed_tokens" in name:
            assert torch.equal(weight[others], frozen[name][others]) and weight.grad is None


@pytest.mark.parametrize("kind", MODELS)
def test_a_row_begins_as_the_mean_and_learns_by_itself(kind):
    model = base(kind, torch.bfloat16)
    before = model.get_input_embeddings().weight.detach().clone()
    tuned, hooks = learning(model)
    install_summed_loss(model)
    [*parts] = rows_in(tuned).values()
    assert torch.equal(parts[0].rows[0], before[[20, 21, 22]].float().mean(0)) and parts[0].rows.dtype == torch.float32
    trained = [part.rows for part in parts]
    ids, positions, targets = batch()
    optimizer, losses = torch.optim.AdamW(trained, lr=0.05), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = tuned(input_ids=ids, positions=positions, targets=targets)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model(input_ids=ids)  # a pass has the rows as they are now
    weight = model.get_input_embeddings().weight.detach()
    assert torch.equal(weight[[*TEXTS]], trained[0].detach().bfloat16())
    with tuned.disable_adapter():  # as before the first step
        assert torch.equal(model.get_input_embeddings().weight[7], before[[20, 21, 22]].float().mean(0).bfloat16())
    assert torch.equal(model.get_input_embeddings().weight[[*TEXTS]], trained[0].detach().bfloat16())
    forget(tuned, hooks)
    assert not rows_in(tuned) and not model.get_input_embeddings()._forward_hooks


def test_a_token_that_is_sure_has_a_gradient():
    """The share of the right token is softmax - 1, which is nothing in bf16 where the model is sure."""
    from gemma_tune.train.token_rows import _Written

    hidden, weight = torch.ones(1, 4, dtype=torch.bfloat16), torch.zeros(3, 4, dtype=torch.bfloat16)
    weight[1] = 2.5
    rows = weight[1:2].float().requires_grad_()
    loss = torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), torch.tensor([1]), reduction="none")
    _Written.apply(loss, rows, hidden, weight, torch.tensor([1]), torch.tensor([1]), None, 1.0).sum().backward()
    expected = torch.expm1(-loss)
    assert expected.abs() < 1e-4 and torch.allclose(rows.grad, expected.expand(1, 4), rtol=1e-2)


def test_embedding_and_head_are_whole_together():
    model = base("llama, untied")
    whole = with_whole(model, [], [], ["model.embed_tokens"])
    with pytest.raises(UserError, match="embed_tokens alone") as caught:
        new_tokens(model, TEXTS, whole)
    assert "--modules-to-save embed_tokens,lm_head" in caught.value.hint
    assert new_tokens(model, TEXTS, with_whole(model, [], [], ["model.embed_tokens", "lm_head"])).whole
    assert new_tokens(model, {}, whole) is None
