"""Defaults by model family and size."""

from __future__ import annotations

import pytest

from gemma_tune.config.families import family_defaults, parameters

GEMMA3_270M = {"model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
               "vocab_size": 262_144}
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "vocab_size": 49_152}
LLAMA_1B = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "vocab_size": 128_256}


@pytest.mark.parametrize(("config", "rate", "reason"), [
    (GEMMA3_270M, 2e-4, "overfit sooner"), (SMOLLM2, 4e-4, "below a billion"), (LLAMA_1B, 2e-4, "Google, Unsloth"),
    ({"model_type": "llava", "text_config": SMOLLM2}, 4e-4, "below a billion"),
    (GEMMA3_270M | {"model_type": "gemma4_text"}, 5e-5, "Gemma 4"), ({"model_type": "odd"}, 2e-4, "Google, Unsloth")])
def test_the_learning_rate_follows_family_and_size(config, rate, reason):
    settings, [said] = family_defaults(config, "train")
    assert settings == {"learning_rate": rate}
    assert f"learning rate {rate:g}: " in said and reason in said
    assert family_defaults(config, "merge") == ({}, [])


def test_parameters_are_counted_as_the_models_say():
    assert parameters(GEMMA3_270M) == pytest.approx(268e6, rel=0.01)
    assert parameters(LLAMA_1B) == pytest.approx(1.24e9, rel=0.1)
