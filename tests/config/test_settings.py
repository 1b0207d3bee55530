"""Settings: precedence and origins, limits and types reported together, the YAML file, and what ``--help`` promises."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.text import Text

from gemma_tune.base import special
from gemma_tune.base.errors import BAD_INPUT, UserError
from gemma_tune.base.words import counted
from gemma_tune.cli.commands import app
from gemma_tune.config.settings import StageConfig, as_flags, resolve, value_in_words
from gemma_tune.config.settings_file import load_yaml
from gemma_tune.config.stages import (
    CONFIGS,
    DEFAULT_MODEL,
    ChatConfig,
    EvalConfig,
    ExportConfig,
    PrepareConfig,
    TrainConfig,
)

FIELDS = [pytest.param(cls, f, id=f"{cls.section}.{f.name}") for cls in CONFIGS.values()
          for f in dataclasses.fields(cls)]
COMMANDS = typer.main.get_command(app).commands
PARAMS = {section: {p.name: p for p in COMMANDS[section].params} for section in CONFIGS}


def kinds(f: dataclasses.Field) -> set[str]:
    """The words of a field's annotation: ``{"float", "None"}``."""
    return set(re.findall(r"\w+", f.type))


def fields_of(kind: str) -> list[Any]:
    return [p for p in FIELDS if kind in kinds(p.values[1])]


def problems(cls: type[StageConfig], **values: Any) -> tuple[str, ...]:
    """What is wrong with these settings; fails if nothing is."""
    with pytest.raises(UserError) as raised:
        resolve(cls, values)
    assert raised.value.exit_code == BAD_INPUT
    assert f"{counted(len(raised.value.problems), 'setting')} of `{cls.section}`" in raised.value.message
    assert f"gemma-tune {cls.section} --help" in raised.value.hint
    return raised.value.problems


def outside(f: dataclasses.Field) -> list[Any]:
    """Values just outside a field's limits and choices."""
    step = 1 if "int" in kinds(f) else 1e-7
    least, most, choices = (f.metadata[k] for k in ("least", "most", "choices"))
    return ([] if least is None else [least - step]) + ([] if most is None else [most + step]) + (
        [f"{''.join(choices)}?"] if choices else [])


def yaml_problems(text: str, path: Path = Path("settings.yaml")) -> tuple[str, ...]:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_yaml(path)
    assert raised.value.exit_code == BAD_INPUT
    assert raised.value.hint
    assert str(path) in raised.value.message
    return raised.value.problems or (raised.value.message,)


# --- precedence

def test_flags_win_over_the_file_over_the_family_over_defaults():
    sources = {"flag": {"rank": 1, "alpha": 1.0, "dropout": 0.1, "warmup": None, "target_modules": ()},
               "file": {"rank": 2, "alpha": 2.0, "epochs": 2.0, "warmup": 0.2},
               "family": {"rank": 3, "epochs": 3.0, "learning_rate": 3e-4, "warmup": 0.3}}
    resolved = resolve(TrainConfig, sources["flag"], sources["file"], sources["family"])
    expected = {"rank": (1, "flag"), "alpha": (1.0, "flag"), "dropout": (0.1, "flag"), "epochs": (2.0, "file"),
                "warmup": (0.2, "file"), "learning_rate": (3e-4, "family"), "seed": (42, "default"),
                "target_modules": ((), "default")}
    assert {name: (getattr(resolved.config, name), resolved.origins[name]) for name in expected} == expected
    assert resolved.record()["rank"] == {"value": 1, "from": "flag"}
    assert set(resolved.record()) == {f.name for f in dataclasses.fields(TrainConfig)}
    json.dumps(resolved.record())


@pytest.mark.parametrize("name, value", [("seed", 0), ("dropout", 0.0), ("max_steps", 0), ("qlora", False)])
def test_a_zero_or_a_no_that_was_given_counts_as_given(name, value):
    resolved = resolve(TrainConfig, {name: value}, {name: 1, "dropout": 0.5, "qlora": True} | {name: 1})
    assert (getattr(resolved.config, name), resolved.origins[name]) == (value, "flag")


def test_unknown_flags_are_not_settings():
    """The command line hands over all of its options, --json and --run among them."""
    assert resolve(TrainConfig, {"json": True, "run": "x"}).config == TrainConfig()


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(TrainConfig, {}).config.rank = 3


def test_whole_numbers_do_for_numbers():
    config = resolve(TrainConfig, {"alpha": 8, "epochs": 2}).config
    assert (config.alpha, config.epochs) == (8.0, 2.0)
    assert type(config.alpha) is type(config.epochs) is float


# --- limits, choices, types

# Values that are allowed only beside other settings.
COLUMNS = ("user=question", "assistant=answer")
BESIDE = {("format", "columns"): {"columns": COLUMNS}}


@pytest.mark.parametrize("cls, f", FIELDS)
def test_limits_are_limits_and_belong_to_the_allowed_values(cls, f):
    for value in outside(f):
        [problem] = problems(cls, **{f.name: value})
        assert problem.startswith(f"{f.name}: ")
        assert re.search("is below the least possible|is above the largest possible|is not one of", problem)
    inside = [f.metadata[k] for k in ("least", "most") if f.metadata[k] is not None] + list(f.metadata["choices"] or ())
    for value in inside:
        beside = BESIDE.get((f.name, value), {})
        found = getattr(resolve(cls, {f.name: value, **beside}).config, f.name)
        assert found == ((value,) if isinstance(f.default, tuple) else value)


def test_every_number_has_a_least_value():
    for cls, f in (p.values for p in fields_of("int") + fields_of("float")):
        assert f.metadata["least"] is not None, f"{cls.section}.{f.name}"


LIMITED = [pytest.param(cls, id=name) for name, cls in CONFIGS.items() if any(map(outside, dataclasses.fields(cls)))]


@pytest.mark.parametrize("cls", LIMITED)
def test_all_problems_are_reported_together(cls, cli):
    bad = {f.name: outside(f)[0] for f in dataclasses.fields(cls) if outside(f)}
    found = problems(cls, **bad)
    assert [p.split(":")[0] for p in found] == list(bad)
    args = [f"{PARAMS[cls.section][name].opts[0]}={value}" for name, value in bad.items()]
    result = cli(cls.section, *args, "--json")
    assert result.code == BAD_INPUT
    assert tuple(result.json["error"]["problems"]) == found
    assert all(f"  - {problem}" in result.err for problem in found)
    assert result.err.count("Error:") == result.err.count("Hint:") == 1
    assert not Path("runs").exists(), "settings are checked first"


NOT_ROLE_AND_COLUMN = "is not of the form ROLE=COLUMN with the roles user, assistant, system"


@pytest.mark.parametrize("settings, expected", [
    ({"valid": 0.95}, ["valid: 0.95 is neither a share up to 0.9, nor a whole number of rows, nor a file"]),
    ({"valid": "0.999"}, ["valid: 0.999 is neither"]),
    ({"valid": 2.5}, ["valid: 2.5 is neither"]),
    ({"format": "columns"}, ["format: `columns` needs --columns user=…,assistant=…"]),
    ({"format": "alpaca", "columns": COLUMNS}, ["columns: they exclude --format alpaca"]),
    ({"columns": "user=question"}, ["columns: both `user=…` and `assistant=…` are needed, or `turns=…`"]),
    ({"columns": "user=问题，assistant=回答"},
     ["columns: both `user=…` and `assistant=…` are needed, or `turns=…`; `，` is not `,`"]),
    ({"columns": "user=Customer", "data": ["Message,assistant=Reply"]},  # as a shell parts what is not in quotes
     ["columns: both `user=…` and `assistant=…` are needed, or `turns=…`; a name with a space stands in quotes"]),
    ({"columns": "assistant=answer,system=s"}, ["columns: both `user=…` and `assistant=…` are needed"]),
    ({"columns": "question,assistant="}, [f"columns: 'question' {NOT_ROLE_AND_COLUMN}",
                                          f"columns: 'assistant=' {NOT_ROLE_AND_COLUMN}"]),
    ({"columns": ("user=a", "assistant=b", "answer=c")}, [f"columns: 'answer=c' {NOT_ROLE_AND_COLUMN}"]),
    ({"allow": "placeholders,broken_json"}, [
        "allow: 'placeholders' is not one of placeholder, control_character, foreign_marker, undeclared_tool; did you mean `placeholder`?",
        "allow: 'broken_json' is not one of"]),
    ({"valid": 0.95, "format": "columns", "allow": "x"}, ["format: `columns`", "allow: 'x'", "valid: 0.95"]),
])
def test_settings_of_prepare_that_do_not_go_together(settings, expected):
    found = problems(CONFIGS["prepare"], **settings)
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected):
        assert problem.startswith(beginning)


@pytest.mark.parametrize("value, expected", [
    (0, 0.0), ("0", 0.0), (0.25, 0.25), ("0.25", 0.25), (".5", 0.5), (0.9, 0.9), (1, 1.0), ("1", 1.0), ("200", 200.0),
    (1e6, 1e6), ("valid.jsonl", "valid.jsonl"), ("2024/valid.jsonl", "2024/valid.jsonl"), ("./200", "./200")])
def test_validation_data_is_a_share_a_number_or_a_file(value, expected):
    for resolved in (resolve(CONFIGS["prepare"], {"valid": value}), resolve(CONFIGS["prepare"], {}, {"valid": value})):
        assert resolved.config.valid == expected
        assert type(resolved.config.valid) is type(expected)


def test_columns_are_a_mapping_from_roles():
    config = resolve(CONFIGS["prepare"], {"columns": "user=q, assistant=a=b,system=s"}).config
    assert config.column_names == {"user": "q", "assistant": "a=b", "system": "s"}
    assert resolve(CONFIGS["prepare"], {}).config.column_names == {}


def test_settings_of_a_file_that_do_not_go_together_are_refused_too(cli):
    Path("s.yaml").write_text("prepare: {valid: 0.95, format: columns}\n")
    result = cli("prepare", "--config", "s.yaml", "--json")
    assert result.code == BAD_INPUT
    assert [p.split(":")[0] for p in result.json["error"]["problems"]] == ["format", "valid"]
    assert not Path("runs").exists()


def test_merge_has_no_limits_but_checks_types():
    assert problems(CONFIGS["merge"], check="yes") == ("check: expected true or false, found 'yes'",)


@pytest.mark.parametrize("cls, f", fields_of("float"))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan", "inf", "-Infinity", 10 ** 400],
                         ids=lambda v: str(v)[:9])
def test_numbers_are_finite(cls, f, value):
    [problem] = problems(cls, **{f.name: value})
    assert problem.startswith(f"{f.name}: ")
    assert len(problem) < 120


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_are_finite_on_the_command_line(cli, value):
    result = cli("train", "--alpha", value, "--epochs", value, "--clip", value, "--lr", value, "--json")
    assert result.code == BAD_INPUT
    assert len(result.json["error"]["problems"]) == 4


@pytest.mark.parametrize("cls, f", FIELDS)
def test_values_of_another_kind_are_refused(cls, f):
    wrong = {"tuple": [3, True, {"a": 1}, [1, 2], ["a", None]], "str": [3, 0.5, True, ["a"]], "bool": [1, 0, "yes", 0.5],
             "int": [True, False, 1.5, "7", [1]], "float": [True, False, "fast", [1.0]],
             "int or tuple": [True, {"a": 1}, [1, 2.5], ["a"], [True], "1.5"],
             "float or tuple": [True, {"a": 1}, ["a"], [1, None], [True], "fast"],
             "int or str": [True, False, 1.5, [1], ["auto"], {"a": 1}],
             "float or str": [True, False, [1.0], ["a"], {"a": 1}], "bool or str": [1, 0.5, ["a"], {"a": 1}]}
    names = {"tuple": "a list", "int or tuple": "a list", "float or tuple": "a list", "str": "text", "bool": "true or false", "int": "a whole number", "float": "a number",
             "int or str": "a whole number or text", "float or str": "a number or text", "bool or str": "text or true or false"}
    kind = "tuple" if kinds(f) == {"tuple", "str"} else " or ".join(sorted(kinds(f) - {"None"}))
    for value in wrong[kind]:
        [problem] = problems(cls, **{f.name: value})
        assert problem.startswith(f"{f.name}: expected {names[kind]}")


def test_a_value_is_quoted_on_one_line_and_in_bounds():
    [problem] = problems(TrainConfig, schedule="a\nb" * 1000)
    assert "\n" not in problem and len(problem) < 200
    assert "cosine, linear, constant" in problem


def test_a_choice_that_is_nearly_right_gets_a_suggestion():
    [problem] = problems(TrainConfig, dtype="bf61")
    for asked, meant in (("iq1_s", ""), ("tq1_0", ""), ("q3_k_xl", "; did you mean `q3_k_l`?"), ("q8", "; did you mean `q8_0`?")):
        [other] = problems(ExportConfig, quant=(asked,))
        assert other.endswith(f"q3_k_s, q2_k, mxfp4{meant}"), "whoever asks for one bit does not want six"
    for asked, meant in (("q4", "q4_k_m"), ("Q4", "q4_k_m"), ("Q4_K_M", "q4_k_m"), ("q4_k", "q4_k_m"), ("4bit", "q4_k_m"), ("int4", "q4_k_m"),
                         ("q5", "q5_k_m"), ("q3", "q3_k_m"), ("3bit", "q3_k_m"), ("q3_k", "q3_k_m"), ("q2", "q2_k"),
                          ("Q6_K", "q6_k"), ("q8", "q8_0"), ("int8", "q8_0"), ("8-bit", "q8_0"), ("fp16", "f16"),
                         ("16", "f16"), ("BF16", "bf16"), ("bfloat16", "bf16"), ("Q5_0", "q5_0")):
        [other] = problems(ExportConfig, quant=(asked,))
        assert other.endswith(f"; did you mean `{meant}`?"), other
    assert problems(TrainConfig, dtype="BF16")[0].endswith("; did you mean `bf16`?")
    assert problem == "dtype: 'bf61' is not one of auto, bf16, fp32, fp16; did you mean `bf16`?"


@pytest.mark.parametrize("value", ["q_proj,v_proj", " q_proj , v_proj,, ", ["q_proj", "v_proj"], ("q_proj", "v_proj")])
def test_names_come_as_a_list_or_with_commas(value):
    assert resolve(TrainConfig, {"target_modules": value}).config.target_modules == ("q_proj", "v_proj")
    assert resolve(TrainConfig, {}, {"target_modules": value}).config.as_dict()["target_modules"] == ["q_proj", "v_proj"]


# --- the YAML file

def test_a_file_with_every_kind_of_value():
    Path("s.yaml").write_text("""
model: google/gemma-3-270m-it
run: runs/mine
train:
  learning_rate: 2e-4
  alpha: 8
  rank: 4
  qlora: yes
  schedule: linear
  target_modules: [q_proj, v_proj]
export-ollama:
  name: my-analyst
chat:
  seed: null
# every setting below is commented out
eval:
merge: {}
""")
    content = load_yaml(Path("s.yaml"))
    assert content["model"] == "google/gemma-3-270m-it"
    resolved = resolve(TrainConfig, {}, content["train"])
    assert resolved.config == TrainConfig(learning_rate=2e-4, alpha=8.0, rank=4, qlora=True, schedule="linear",
                                          target_modules=("q_proj", "v_proj"))
    assert resolved.origins["learning_rate"] == "file"
    for section in ("eval", "merge", "chat"):
        assert resolve(CONFIGS[section], {}, content[section]).config == CONFIGS[section]()


@pytest.mark.parametrize("text", ["2e-4", "2E-4", "2.0e-4", "0.0002", "'2e-4'", "2.e-4"])
def test_every_way_to_write_a_learning_rate(text):
    Path("s.yaml").write_text(f"train:\n  learning_rate: {text}\n")
    assert resolve(TrainConfig, {}, load_yaml(Path("s.yaml"))["train"]).config.learning_rate == 2e-4


@pytest.mark.parametrize("text", ["q_proj, v_proj", "[q_proj, v_proj]", "\n  - q_proj\n  - v_proj"])
def test_target_modules_in_a_file(text):
    Path("s.yaml").write_text(f"train:\n  target_modules: {text}\n")
    config = resolve(TrainConfig, {}, load_yaml(Path("s.yaml"))["train"]).config
    assert config.target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing yet\n", "---\n", "~"])
def test_an_empty_file_sets_nothing(text):
    Path("s.yaml").write_text(text)
    assert load_yaml(Path("s.yaml")) == {}


@pytest.mark.parametrize("text, expected", [
    ("trian: {rank: 4}", ["trian: unknown section; did you mean `train`?"]),
    ("export: {}", ["export: unknown section; did you mean `export-ollama`?"]),
    ("modle: x", ["modle: unknown section; did you mean `model`?"]),
    ("weather: {}", ["weather: unknown section"]),
    ("1: {}", ["1: unknown section"]),
    ("on: {}", ["True: unknown section"]),
    ("~: {}", ["None: unknown section"]),
    ("2020-01-01: {}", ["2020-01-01: unknown section"]),
    ("train: {rnak: 4}", ["train.rnak: unknown setting; did you mean `rank`?"]),
    ("train: {learning-rate: 1}", ["train.learning-rate: unknown setting; did you mean `learning_rate`?"]),
    ("train: {7: 4}", ["train.7: unknown setting"]),
    ("train: {data: x}", ["train.data: unknown setting"]),
    ("train: [rank, 4]", ["train: expected settings below it, found ['rank', 4]"]),
    ("train: fast", ["train: expected settings below it, found 'fast'"]),
    ("model: 7", ["model: expected text, found 7"]),
    ("run:", ["run: expected text, found None"]),
    ("revision: [a]", ["revision: expected text, found ['a']"]),
    ("train: {rank: many}", ["train.rank: expected a whole number, found 'many'"]),
    ("train: {rank: 4.0}", ["train.rank: expected a whole number, found 4.0"]),
    ("train: {rank: true}", ["train.rank: expected a whole number, found True"]),
    ("train: {rank: }", ["train.rank: needs a value"]),
    ("train: {epochs: [1]}", ["train.epochs: expected a number, found [1]"]),
    ("train: {epochs: yes}", ["train.epochs: expected a number, found True"]),
    ("train: {epochs: .nan}", ["train.epochs: nan is not a finite number"]),
    ("train: {alpha: .inf}", ["train.alpha: inf is not a finite number"]),
    ("train: {qlora: 1}", ["train.qlora: expected true or false, found 1"]),
    ("train: {target_modules: [1, q_proj]}", ["train.target_modules: expected a list of text, found 1 in it"]),
    ("prepare: {data: {a: b}}", ["prepare.data: expected a list, found {'a': 'b'}"]),
    ("prepare: {valid: -0.1}", ["prepare.valid: -0.1 is below the least possible 0"]),
    ("prepare: {valid: true}", ["prepare.valid: expected a number or text, found True"]),
    ("prepare: {valid: [valid.jsonl]}", ["prepare.valid: expected a number or text, found ['valid.jsonl']"]),
    ("prepare: {max_rejected: 1.5}", ["prepare.max_rejected: 1.5 is above the largest possible 1"]),
    ("prepare: {columns: {user: q}}", ["prepare.columns: expected a list, found {'user': 'q'}; write NAME=VALUE, with commas "
                                         "between several"]),
    ("prepare: {format: chatml}", ["prepare.format: 'chatml' is not one of messages, alpaca, sharegpt"]),
    ("prepare: {on_long：split: 1}", ["prepare.on_long：split: unknown setting; `：` is not `:`"]),
    ("train:\n  epochs：3", ["train: expected settings below it, found 'epochs：3'; `：` is not `:`"]),
    ("prepare:\n\u3000\u3000data: a.jsonl", ["\u3000\u3000data: unknown section; `\u3000` is not ` `"]),
    ("prepare: {seed: 4294967296}", ["prepare.seed: 4294967296 is above the largest possible 4294967295"]),
    ("export-ollama: {name: no}", ["export-ollama.name: expected text, found False"]),
    ("export-ollama: {quant: q8}", ["export-ollama.quant: 'q8' is not one of f32, bf16, f16, q8_0"]),
    ("train: {rank: 0, epochs: -1}\nprepare: {max_rejected: x}\nfoo: 1",
     ["train.rank: 0 is below", "train.epochs: -1 is below", "prepare.max_rejected: expected a number", "foo: unknown"]),
])
def test_all_problems_of_a_file_are_named_with_suggestions(text, expected):
    found = yaml_problems(text)
    assert len(found) == len(expected)
    for problem, beginning in zip(found, expected):
        assert problem.startswith(beginning)


@pytest.mark.parametrize("text, expected", [
    ("train:\n  rank: [4\n", "settings.yaml:3: not valid YAML"),
    ("train:\n rank: 4\n  alpha: 2\n", "settings.yaml:3: not valid YAML"),
    ("a: b: c", "settings.yaml:1: not valid YAML"),
    ("train:\n\trank: 4", "settings.yaml:2: not valid YAML"),
    ("x: !!python/object/apply:os.system [ls]", "settings.yaml:1: not valid YAML"),
    ("train: {rank: 4}\n---\ntrain: {rank: 5}", "settings.yaml:2: not valid YAML"),
    ("? [a]\n: b", "settings.yaml:1: not valid YAML"),
    ("a: \0", "not valid YAML"),
    ("name: 2024-99-99", "a value that cannot be read"),
    ("a: " + "1" * 5000, "a value that cannot be read"),
    ("[" * 5000, "a value that cannot be read"),
    ("- train\n- rank", "expected sections such as `train:`, found ['train', 'rank']"),
    ("just words", "expected sections such as `train:`, found 'just words'"),
    ("model：demo\ntrain：\n", "expected sections such as `train:`, found 'model：demo train：'; `：` is not `:`"),
    ("prepare:\n  data：a.jsonl\n  valid: 0.1\n", "settings.yaml:3: not valid YAML: mapping values are not allowed here; `：`"),
    ("[]", "expected sections such as `train:`, found []"),
    ("false", "expected sections such as `train:`, found False"),
    ("0", "expected sections such as `train:`, found 0"),
], ids=lambda v: v[:24] if len(v) > 60 else None)
def test_a_file_that_is_no_configuration(text, expected):
    [message] = yaml_problems(text)
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize("text, expected", [
    ("train:\n  rank: 4\n  epochs: 1\n  rank: 8\n", ["settings.yaml:4: `rank` is there twice, first in line 2"]),
    ("train: {rank: 4}\nprepare: {}\n'train':\n  epochs: 1", ["settings.yaml:3: `train` is there twice, first in line 1"]),
    ("model: a\nmodel: b\nmodel: c\ntrain: {rank: 4, rank: 4}", [
        "settings.yaml:2: `model` is there twice, first in line 1", "settings.yaml:3: `model` is there twice, first in line 1",
        "settings.yaml:4: `rank` is there twice, first in line 4"]),
])
def test_a_key_that_is_there_twice(text, expected):
    assert list(yaml_problems(text)) == expected


def test_keys_of_other_places_are_not_twice():
    Path("s.yaml").write_text("train: &mine\n  rank: 4\nprepare: {seed: 1}\nchat: {seed: 1}\n")
    assert load_yaml(Path("s.yaml")) == {"train": {"rank": 4}, "prepare": {"seed": 1}, "chat": {"seed": 1}}


@pytest.mark.parametrize("path", [r"C:\Users\me\model", r"D:\data\gemma", r"C:\xyz", r"C:\uploads"])
def test_a_backslash_in_double_quotes(path):
    Path("s.yaml").write_text(f'train:\n  rank: 4\nmodel: "{path}"\n')
    with pytest.raises(UserError) as caught:
        load_yaml(Path("s.yaml"))
    assert caught.value.message.startswith("s.yaml:3: not valid YAML: ")
    assert "put the text into single quotes" in caught.value.hint
    Path("s.yaml").write_text(f"model: '{path}'\nrun: {path}\n")
    assert load_yaml(Path("s.yaml")) == {"model": path, "run": path}


@pytest.mark.parametrize("text, name", [
    (r'model: "C:\temp\new"', "model"), (r'prepare: {data: ["a.jsonl", "C:\new.jsonl"]}', "prepare.data"),
    (r'merge: {adapter: "C:\bin"}', "merge.adapter")])
def test_a_backslash_in_double_quotes_that_is_an_escape(text, name):
    [problem] = yaml_problems(text)
    assert problem.startswith(f"{name}: ") and "put the text into single quotes" in problem
    assert yaml_problems(r'chat: {system: "a\nb", sede: 1}') == ("chat.sede: unknown setting; did you mean `seed`?",)


def test_files_that_cannot_be_read(cli):
    Path("latin.yaml").write_bytes("train: {} # caf\xe9".encode("latin-1"))
    Path("folder").mkdir()
    for name, expected in (("none.yaml", "cannot read the configuration none.yaml: No such file"),
                           ("folder", "cannot read the configuration folder: Is a directory"),
                           ("latin.yaml", "latin.yaml is not UTF-8 text")):
        result = cli("prepare", "--config", name, "--json")
        assert result.code == BAD_INPUT
        assert expected in result.json["error"]["message"]
        assert result.json["error"]["hint"]


def bomb(lines: int, merged: bool) -> str:
    """Each line stands for ten times the one before."""
    first = "a0: &a0 {x: 1}" if merged else "a0: &a0 [x]"
    return "\n".join([first, *(f"a{n}: &a{n} " + ("{<<: [" + ", ".join([f"*a{n - 1}"] * 10) + "]}" if merged else
                                                  "[" + ", ".join([f"*a{n - 1}"] * 10) + "]")
                               for n in range(1, lines))])


@pytest.mark.parametrize("text, expected", [
    (bomb(12, False), r"settings.yaml:\d+: this stands for more than 10,000 values"),
    (bomb(12, True), r"settings.yaml:\d+: this stands for more than 10,000 values"),
    ("train: &t\n  rank: 4\n  more: *t", "settings.yaml:1: an alias stands for what it is in"),
    ("# " + "x" * (1 << 20), "settings.yaml has more than 1,024 KiB"),
], ids=["lists", "merged", "itself", "long"])
def test_a_file_that_stands_for_more_than_it_holds(text, expected):
    Path("settings.yaml").write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_yaml(Path("settings.yaml"))
    assert error.value.hint


def test_aliases_of_settings_are_taken():
    Path("settings.yaml").write_text("train: &t {rank: 4}\nprepare: {seed: &s 3}\neval: {questions: *s}\n"
                                     "chat:\n  <<: {seed: *s}\n")
    assert load_yaml(Path("settings.yaml")) == {"train": {"rank": 4}, "prepare": {"seed": 3}, "eval": {"questions": 3},
                                                "chat": {"seed": 3}}


def test_pipes_and_devices_as_a_file(monkeypatch):
    monkeypatch.setattr(special, "PIPE_SECONDS", 0.05)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe is a pipe into which nothing is written"):
        load_yaml(Path("pipe"))
    with pytest.raises(UserError, match="/dev/zero has more than 1,024 KiB"):
        load_yaml(Path("/dev/zero"))
    assert load_yaml(Path("/dev/null")) == {}
    for given in ("pipe", None):  # None: what a shell's <(…) is
        reading, writing = os.pipe() if given is None else (os.open("pipe", os.O_RDWR), os.open("pipe", os.O_WRONLY))
        os.write(writing, b"train: {rank: 4}")
        os.close(writing)
        if given:
            threading.Timer(0.02, os.close, [reading]).start()
        assert load_yaml(Path(given or f"/dev/fd/{reading}")) == {"train": {"rank": 4}}


@pytest.mark.parametrize("cls, name", [(TrainConfig, "batch_size"), (TrainConfig, "accumulation"),
                                       (TrainConfig, "num_processes"), (TrainConfig, "epochs"),
                                       (ChatConfig, "max_new_tokens"), (PrepareConfig, "max_length")])
def test_what_is_worked_through_one_by_one_has_a_limit(cls, name):
    with pytest.raises(UserError) as error:
        resolve(cls, {name: 10 ** 9})
    assert "is above the largest possible" in error.value.problems[0]


def test_problems_of_a_file_reach_the_command_line(cli):
    Path("s.yaml").write_text("train: {rnak: 4, epochs: 0}\n")
    result = cli("train", "--config", "s.yaml", "--json")
    assert result.code == BAD_INPUT
    assert result.json["error"]["message"] == "s.yaml: 2 settings cannot be used"
    assert "  - train.rnak: unknown setting; did you mean `rank`?" in result.err
    assert "sections: model, revision, run, prepare, train" in result.json["error"]["hint"]


# --- what --help promises

@pytest.mark.parametrize("cls, f", FIELDS)
def test_every_setting_is_explained_and_has_an_option(cls, f):
    assert re.fullmatch(r"[A-Z`].*\.", f.metadata["help"], re.DOTALL), "one or more whole sentences"
    param = PARAMS[cls.section][f.name]
    # What Rich makes of it: brackets in a help text must not be taken for its markup.
    shown = Text.from_markup(param.help).plain
    assert shown.startswith(f.metadata["help"]), f"{cls.section}.{f.name} has the help of another setting"
    assert param.default is None, "otherwise a default would look like a flag that was given"
    if (cls.section, f.name) == ("prepare", "data"):
        assert param.param_type_name == "argument"
    else:
        assert param.opts[0] == f"--{f.name.replace('_', '-')}"
    if f.metadata["choices"]:
        assert f"One of {', '.join(f.metadata['choices'])}." in shown


def shown_defaults(cli, section: str) -> dict[str, str]:
    """Option → the default that ``--help`` shows, read from the rendered page."""
    rows = re.split(r"(?m)^  (?:-\w, )?--", cli(section, "--help").out)[1:]
    texts = {re.match(r"[\w-]+", row)[0].replace("-", "_"): " ".join(row.split()) for row in rows}
    return {name: match[1] for name, text in texts.items() if (match := re.search(r"\(default: (.*?)\)", text))}


@pytest.mark.parametrize("section", CONFIGS)
def test_the_default_in_the_help_is_the_default(cli, section):
    shown = shown_defaults(cli, section)
    without = set()
    for f in dataclasses.fields(CONFIGS[section]):
        if "auto" in f.metadata:
            assert f.default in (None, ())
            assert shown[f.name] == f.metadata["auto"]
        elif isinstance(f.default, bool):
            assert shown[f.name] == ("on" if f.default else "off")
        elif isinstance(f.default, (int, float)):
            assert float(shown[f.name]) == f.default
        elif f.default not in (None, ()):
            assert shown[f.name] == f.default
        else:
            without.add(f.name)
    # Their help says in words what happens without them.
    assert without == {"prepare": {"data"}, "export-ollama": {"create"}}.get(section, set())
    begins = {"merge": "that --adapter names", "prepare": DEFAULT_MODEL, "train": DEFAULT_MODEL}  # a run
    assert shown["model"].endswith(begins.get(section, "the run's own"))


def test_every_default_is_valid():
    for cls in CONFIGS.values():
        assert resolve(cls, {}).config == cls()
        assert set(resolve(cls, {}).origins.values()) == {"default"}


def test_no_two_options_of_a_command_share_a_name():
    for name, command in COMMANDS.items():
        options = [opt for p in command.params for opt in (*p.opts, *p.secondary_opts) if opt.startswith("-")]
        assert len(options) == len(set(options)), name


def test_every_layer_can_be_asked_for_again():
    from gemma_tune.config.settings import Resolved, as_before

    named = resolve(TrainConfig, {"target_modules": "q_proj"})
    again = resolve(TrainConfig, {"target_modules": "all"})
    assert (named.config.target_modules, again.config.target_modules) == (("q_proj",), ())
    assert as_before(resolve(TrainConfig, {}), named.record()) == {"target_modules": ("q_proj",)}
    assert as_before(again, named.record()) == {}
    assert as_before(resolve(TrainConfig, {}), again.record()) == {}
    assert isinstance(again, Resolved)
    with pytest.raises(UserError) as raised:
        resolve(TrainConfig, {"target_modules": "all,q_proj"})
    assert raised.value.problems == ("target_modules: `all` stands alone, or with `experts`, or names are given",)
    both = resolve(TrainConfig, {"target_modules": "all,experts"})
    assert both.config.target_modules == ("all", "experts")
    assert as_before(resolve(TrainConfig, {}), both.record()) == {"target_modules": ("all", "experts")}


def test_programs_to_report_to():
    def named(value):
        return resolve(TrainConfig, {"report_to": value}).config.report_to

    assert (named("tensorboard, wandb"), named("none"), named(None)) == (("tensorboard", "wandb"), (), ())
    assert as_flags(TrainConfig, resolve(TrainConfig, {"report_to": "mlflow,wandb"}).config.as_dict()) == [
        "--report-to", "mlflow,wandb"]
    assert problems(TrainConfig, report_to=("none", "wandb")) == (
        "report_to: `none` stands alone, or programs are named",)


@pytest.mark.parametrize("text, expected", [
    ("valid: 0.2", "valid: it belongs below `prepare:`, indented"),
    ("seed: 1", "seed: it belongs below `prepare:` or `train:` or `chat:` or `eval:`, indented"),
    ("trian: {}", "trian: unknown section; did you mean `train`?")])
def test_a_setting_outside_its_section(text, expected):
    assert yaml_problems(text) == (expected,)


@pytest.mark.parametrize("text, hint", [
    ("train:\n  epochs: [1\n", "close the list with ]"), ("train: {epochs: 1\n", "close the braces with }"),
    ("train:\n\trank: 3\n", "indent with spaces"), ('train:\n  "rank: 3\n', "no closing quote"),
    ("train:\n  rank: 8\n epochs: 3\n", "check the indentation there")])
def test_a_half_written_file(tmp_path, text, hint):
    (tmp_path / "half.yaml").write_text(text)
    with pytest.raises(UserError, match=r"half.yaml:\d: not valid YAML") as raised:
        load_yaml(tmp_path / "half.yaml")
    assert hint in raised.value.hint


def test_values_are_told_as_options_take_them():
    assert value_in_words(("a.csv", "b.csv")) == "a.csv,b.csv" and value_in_words([]) == "none"
    assert value_in_words(None) == "not set" and value_in_words(0) == "0" and value_in_words("x") == "x"
    assert value_in_words((2e-4, 1.0)) == "0.0002,1" and value_in_words(1e300) == "1e+300"


def test_texts_with_commas_in_them_are_given_one_by_one():
    flags = as_flags(ExportConfig, {"quant": ["q8_0", "f16"], "parameter": ["stop=a,b", "temperature=0.3"]}, defaults=True)
    assert flags == ["--quant", "q8_0,f16", "--parameter", "stop=a,b", "--parameter", "temperature=0.3"]
    rewards = ["regex:a,b", "exact"]
    for cls in (TrainConfig, EvalConfig):
        flags = as_flags(cls, {"reward": rewards})
        assert flags == ["--reward", "regex:a,b", "--reward", "exact"], "or the pattern went on to the end"
        assert [*resolve(cls, {"reward": flags[1::2]}).config.reward] == rewards


@pytest.mark.parametrize("value, shown", [(400.0, "400"), (0.5, "0.5"), (1234.5678, "1234.5678")])
def test_whole_numbers_are_shown_whole(value, shown):
    flags = as_flags(TrainConfig, {"epochs": value})
    assert flags == ["--epochs", shown] and resolve(TrainConfig, {"epochs": float(flags[1])}).config.epochs == value
