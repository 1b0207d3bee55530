"""Settings written as a file are read back as they were, whatever they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.config.settings import resolve
from gemma_tune.config.settings_file import load_yaml, settings_file
from gemma_tune.config.stages import CONFIGS, TrainConfig, TuneConfig

EXTREME = [
    {"rank": 1024, "alpha": 1e-6, "learning_rate": 1.2345678901234567e-05, "epochs": 100_000.0, "seed": 2**32 - 1},
    {"learning_rate": 0.1 + 0.2, "warmup": 1 / 3, "weight_decay": 1e22, "clip": 0.0, "dropout": 5e-324},
    {"batch_size": "auto", "target_modules": ("q_proj", "no", "1e-4", "a: b", "#x"), "qlora": True, "dtype": "bf16"},
    {}]


@pytest.mark.parametrize("values", EXTREME)
def test_what_is_written_is_read(values):
    config = TrainConfig(**values)
    Path("s.yaml").write_text(settings_file("train", config.as_dict(), {}, []))
    assert resolve(TrainConfig, {}, load_yaml(Path("s.yaml"))["train"]).config == config


def test_every_section_is_read_back():
    for section, cls in CONFIGS.items():
        values = {f.name: f.default for f in dataclasses.fields(cls)}
        Path("s.yaml").write_text(settings_file(section, values, dict.fromkeys(values, "default"), ["about"]))
        assert resolve(cls, {}, load_yaml(Path("s.yaml"))[section]).config == cls()


def test_comments_end_with_their_line():
    text = settings_file("train", {"rank": 3}, {"rank": "given\nrank: 5"}, ["a model\nrun: elsewhere", "\x1b[2J"])
    Path("s.yaml").write_text(text)
    assert load_yaml(Path("s.yaml")) == {"train": {"rank": 3}}
    assert text.splitlines() == ["# a model run: elsewhere", "# \\x1b[2J", "train:", "  rank: 3  # given rank: 5"]


@pytest.mark.parametrize(("given", "rates", "ranks"), [
    ({"learning_rates": "1e-4, 2e-4", "ranks": "8,16"}, (1e-4, 2e-4), (8, 16)),
    ({"learning_rates": [1e-4, "2e-4"], "ranks": [8, 16]}, (1e-4, 2e-4), (8, 16)),
    ({"learning_rates": 1, "ranks": 8}, (1.0,), (8,))])
def test_numbers_come_as_a_list_or_with_commas(given, rates, ranks):
    config = resolve(TuneConfig, {}, given).config
    assert (config.learning_rates, config.ranks) == (rates, ranks)
    assert all(type(rate) is float for rate in config.learning_rates)


def test_what_is_no_number_in_a_list_is_named():
    with pytest.raises(UserError) as raised:
        resolve(TuneConfig, {"learning_rates": "1e-4,fast", "ranks": "8,2.5"})
    assert raised.value.problems == ("learning_rates: expected a list of numbers, found 'fast' in it",
                                     "ranks: expected a list of whole numbers, found '2.5' in it")


def test_a_number_in_a_list_that_is_too_large_for_anything_is_one_all_the_same():
    with pytest.raises(UserError) as raised:
        resolve(TuneConfig, {"ranks": "8,99999999999999999999"})
    assert raised.value.problems == ("ranks: 99999999999999999999 is above the largest possible 1024",)


@pytest.mark.parametrize(("text", "word"), [("off", "off"), ("on", "on"), ("false", "off"), ("'off'", "off"), ("auto", "auto")])
def test_on_and_off_need_no_quotes(tmp_path, text, word):
    (tmp_path / "s.yaml").write_text(f"prepare:\n  thinking: {text}\ntrain:\n")
    assert load_yaml(tmp_path / "s.yaml")["prepare"] == {"thinking": word}


def test_true_is_no_word_where_a_setting_has_others(tmp_path):
    (tmp_path / "s.yaml").write_text("train:\n  keep: true\n")
    with pytest.raises(UserError) as e:
        load_yaml(tmp_path / "s.yaml")
    assert e.value.problems == ("train.keep: expected text, found True",)
