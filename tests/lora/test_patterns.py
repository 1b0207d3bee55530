"""Patterns in an adapter: those that would be searched for ever are refused, others are not."""

import json
import shutil
import time

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.lora import patterns
from gemma_tune.lora.files import read_adapter

NAMES = [f"model.layers.{n}.self_attn.{part}_proj" for n in range(30) for part in "qkvo"]
ENDLESS = r"([a-z._0-9]+)+[A-Z]"


@pytest.mark.parametrize("config, setting", [
    ({"target_modules": ENDLESS}, "target_modules"), ({"exclude_modules": ENDLESS}, "exclude_modules"),
    ({"layers_pattern": [f"{ENDLESS}"]}, "layers_pattern"), ({"rank_pattern": {"q_proj": 4, ENDLESS: 4}}, "rank_pattern"),
    ({"target_modules": r".*\.q_proj", "alpha_pattern": {ENDLESS: 4}}, "alpha_pattern"),
    ({"target_modules": "x*" * 2000}, "target_modules"),
], ids=["target", "exclude", "layers", "rank", "alpha", "long"])
def test_a_search_without_end(config, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(UserError, match=f"the search for {setting} ") as error:
        patterns.refuse_endless(tmp_path, config, NAMES)
    assert time.monotonic() - start < 2 and "adapter_config.json" in error.value.hint


@pytest.mark.parametrize("config", [
    {"target_modules": r".*\.layers\.(1|2[0-9]*)\..*(q|v)_proj"}, {"target_modules": ["q_proj", ENDLESS]},
    {"target_modules": "all-linear", "rank_pattern": {r"layers\.[0-9]+\..*q_proj": 4}}, {"target_modules": "(*"}, {},
], ids=str)
def test_patterns_whose_search_ends(config, tmp_path):
    patterns.refuse_endless(tmp_path, config, NAMES)


def test_an_adapter_is_refused_before_its_patterns_are_searched(trained_once, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    adapter = tmp_path / "adapter"
    shutil.copytree(next(trained_once.glob("*_lora_adapter")), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"rank_pattern": {ENDLESS: 4}}))
    with pytest.raises(UserError, match="the search for rank_pattern .* does not end"):
        read_adapter(adapter)
