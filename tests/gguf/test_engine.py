"""What llama.cpp replies, as it is read."""

from __future__ import annotations

import math

from gemma_tune.gguf.engine import Engine


def test_a_token_that_cannot_come_has_no_number_in_json(monkeypatch):
    engine = object.__new__(Engine)
    told = [{"id": 7, "logprob": -0.5}, {"id": 8, "logprob": None}]
    monkeypatch.setattr(Engine, "tokenize", lambda *_, **__: [3])
    monkeypatch.setattr(Engine, "_post", lambda *_, **__: {"choices": [{"logprobs": {"content": [{"top_logprobs": told}]}}]})
    assert engine.look(b"", "What is this?") == {7: -0.5, 8: -math.inf}
