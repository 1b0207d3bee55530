"""PEFT's import."""

from __future__ import annotations

import pytest
import torch

from gemma_tune.lora.load import _compiling_at_the_first_call, import_peft


def test_functions_that_are_compiled_on_import_are_compiled_when_they_are_called(monkeypatch):
    calls = []

    def compiled(function, **options):
        calls.append((function.__name__, options))
        return lambda *args: ("compiled", *args)

    monkeypatch.setattr(torch, "compile", compiled)
    with _compiling_at_the_first_call():
        @torch.compile
        def plain(x): ...

        @torch.compile(dynamic=False)
        def with_options(x): ...

    assert torch.compile is compiled
    assert calls == [], "the compiler would have been loaded"
    assert plain(1) == plain(1) == ("compiled", 1)
    assert with_options(2) == ("compiled", 2)
    assert with_options.__name__ == "with_options"
    assert calls == [("plain", {}), ("with_options", {"dynamic": False})]


def test_the_compiler_comes_back_when_the_import_fails(monkeypatch):
    before = torch.compile
    with pytest.raises(ImportError, match="planted"), _compiling_at_the_first_call():
        raise ImportError("planted")
    assert torch.compile is before


def test_bitsandbytes_computes_after_that():
    import_peft()
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.linspace(-1, 1, 4096).reshape(64, 64)
    packed, state = quantize_4bit(weight, quant_type="nf4")
    assert (dequantize_4bit(packed, state) - weight).abs().max() < 0.2
