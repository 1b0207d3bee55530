"""What Ollama is told: parameters, the context's length, the data's system prompt, the base model's licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.config.settings import resolve
from gemma_tune.config.stages import ExportConfig
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.export.files import sampling_metadata
from gemma_tune.export.target import Target, constant_system, licence_text, parse_parameters, target_for
from gemma_tune.models.source import BaseModel
from gemma_tune.run.directory import RunDir
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.session import Session
from support.command import write_rows
from support.listener import Said


def told(merged: Path, run: Path, prepared: dict[str, Any] | None = None, listener: Listener | None = None,
         known: int | None = None, **settings: Any) -> Target:
    """``target_for`` with these settings, in a run whose manifest says this of ``prepare``."""
    manifest = Manifest({"name": "tiny-gemma"}, {"prepare": prepared} if prepared else {})
    session = Session(RunDir(run, "tiny-gemma"), BaseModel("tiny", "tiny-gemma", "directory", merged, None, "", {}),
                      resolve(ExportConfig, settings), listener or Listener(), manifest)
    return target_for(session, merged, load_format(merged, "gemma3_text"), known)


@pytest.fixture
def merged(tiny, tmp_path) -> Path:
    return shutil.copytree(tiny, tmp_path / "merged")


def change(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


# --- parameters


@pytest.mark.parametrize(("room", "longest", "expected"), [
    (32768, 900, 4096),  # never less than what Ollama gives by itself
    (32768, 5000, 5000),  # as long as the longest in training
    (6000, 100_000, 6000), (2048, 100, 2048),  # no more than the model can
    (32768, None, 4096),  # not told
])  # fmt: skip
def test_the_context_fits_the_training_and_the_model(merged, tmp_path, room, longest, expected):
    change(merged / "config.json", max_position_embeddings=room)
    prepared = {"config": {}, "summary": {} if longest is None else {"longest": longest}}
    assert told(merged, tmp_path, prepared).parameters["num_ctx"] == expected


def test_the_context_of_a_model_that_sees_is_its_texts(merged, tmp_path):
    config = json.loads((merged / "config.json").read_text())
    del config["max_position_embeddings"]
    (merged / "config.json").write_text(json.dumps(config | {"text_config": {"max_position_embeddings": 3000}}))
    assert told(merged, tmp_path).parameters["num_ctx"] == 3000


def test_a_context_that_the_model_was_not_made_for_is_told(merged, tmp_path):
    change(merged / "config.json", max_position_embeddings=1024)
    for asked, warnings in ((1024, 0), (5000, 1)):
        said = Said()
        assert told(merged, tmp_path, listener=said, num_ctx=asked).parameters["num_ctx"] == asked
        assert len(said.warnings) == warnings and all("--num-ctx 5,000 is more than the 1,024 tokens" in w for w in said.warnings)


@pytest.mark.parametrize(("known", "said"), [
    (None, "rows of up to 2,048 tokens were learned, and the context here is the 1,024 tokens that the model was made for"),
    (512, "the context here is the 512 tokens that llama.cpp computes as in training")])
def test_rows_that_are_longer_than_the_context_are_told_with_the_reason(merged, tmp_path, known, said):
    change(merged / "config.json", max_position_embeddings=1024)
    prepared = {"config": {}, "summary": {"longest": 2048}}
    listener = Said()
    told(merged, tmp_path, prepared, listener, known)
    [warning] = listener.warnings
    assert said in warning and ("llama.cpp" in warning) == bool(known)


def test_given_parameters_win_over_the_models_own(merged, tmp_path):
    change(merged / "generation_config.json", do_sample=True, temperature=0.8, top_k=64)
    assert told(merged, tmp_path).parameters == {"num_ctx": 1024, "temperature": 0.8, "top_k": 64, "top_p": 1.0,
                                                 "repeat_penalty": 1.0}
    own = told(merged, tmp_path, num_ctx=512, parameter=("top_k=5", "stop=User:", "num_ctx=512")).parameters
    assert own == {"num_ctx": 512, "temperature": 0.8, "top_k": 5, "top_p": 1.0, "repeat_penalty": 1.0, "stop": ["User:"]}
    with pytest.raises(UserError, match="--num-ctx 512 and --parameter num_ctx=256 contradict"):
        told(merged, tmp_path, num_ctx=512, parameter=("num_ctx=256",))


def test_a_model_without_sampling_settings_answers_greedily(merged, tmp_path):
    (merged / "generation_config.json").unlink()
    assert told(merged, tmp_path).parameters == {"num_ctx": 1024, "temperature": 0.0, "repeat_penalty": 1.0}


def test_a_greedy_model_that_is_given_a_temperature_samples_as_in_a_chat(merged, tmp_path):
    (merged / "generation_config.json").unlink()
    assert told(merged, tmp_path, parameter=("temperature=0.7",)).parameters == {
        "num_ctx": 1024, "temperature": 0.7, "top_k": 50, "top_p": 1.0, "repeat_penalty": 1.0}
    assert told(merged, tmp_path, parameter=("top_k=5",)).parameters == {
        "num_ctx": 1024, "temperature": 1.0, "top_k": 5, "top_p": 1.0, "repeat_penalty": 1.0}
    greedy = {"num_ctx": 1024, "temperature": 0.0, "repeat_penalty": 1.0}
    assert told(merged, tmp_path, parameter=("temperature=0", "seed=5")).parameters == greedy | {"seed": 5}


def test_what_transformers_takes_for_what_is_not_said_is_said_to_ollama(merged, tmp_path):
    """Ollama's own defaults are others: top_k 40, top_p 0.9, and a penalty of 1.1 on the last 64 tokens."""
    change(merged / "generation_config.json", do_sample=True, temperature=0.6, min_p=0.05, repetition_penalty=1.2)
    assert told(merged, tmp_path).parameters == {"num_ctx": 1024, "temperature": 0.6, "top_k": 50, "top_p": 1.0, "min_p": 0.05,
                                                 "repeat_penalty": 1.2, "repeat_last_n": -1}
    change(merged / "generation_config.json", do_sample=False)
    greedy = told(merged, tmp_path).parameters
    assert greedy == {"num_ctx": 1024, "temperature": 0.0, "repeat_penalty": 1.2, "repeat_last_n": -1}
    assert sampling_metadata(greedy) == {"temperature": 0.0, "repetition_penalty": 1.2, "penalty_last_n": -1}


def test_parameters_have_their_types():
    texts = ["temperature=0.3", " top_k = 40 ", "min_p=1e-2", "top_p=.9", "seed=-1", "use_mmap=False", "stop= \n", "stop=a=b",
             "seed=-1", "repeat_penalty=1"]
    read = parse_parameters(texts)
    assert read == {"temperature": 0.3, "top_k": 40, "min_p": 0.01, "top_p": 0.9, "seed": -1, "use_mmap": False,
                    "stop": [" \n", "a=b"], "repeat_penalty": 1.0}
    assert [type(read[name]) for name in ("top_k", "repeat_penalty", "use_mmap")] == [int, float, bool]
    assert parse_parameters([]) == {}


def test_all_bad_parameters_are_told_together():
    bad = ["temprature=1", "top_k=4.5", "top_p=much", "temperature=nan", "min_p=1e999", "use_mmap=1", "stop=", "num_ctx",
           "typical_p=0.5", "seed=1", "seed=2", "num_predict=99999999999999999999", "=3"]
    with pytest.raises(UserError) as raised:
        parse_parameters(bad)
    problems = dict(zip((p.partition(": ")[0] for p in raised.value.problems),
                        (p.partition(": ")[2] for p in raised.value.problems), strict=True))
    assert list(problems) == [text for text in bad if text != "seed=1"]
    assert "did you mean `temperature`?" in problems["temprature=1"]
    assert problems["top_k=4.5"] == "expected a whole number" and problems["num_ctx"] == "expected NAME=VALUE"
    assert "0.34.1 and later refuse it" in problems["typical_p=0.5"] and "given twice" in problems["seed=2"]
    assert "Known: num_ctx, temperature" in raised.value.hint


# --- the system prompt


def conversation(*system: str) -> dict[str, Any]:
    return {"messages": [*({"role": "system", "content": text} for text in system), {"role": "user", "content": "hi"},
                         {"role": "assistant", "content": "yes"}]}


@pytest.mark.parametrize(("train", "valid", "expected"), [
    ([conversation("S")] * 3, [conversation("S")], "S"),
    ([conversation("S\n 简短。")], [], "S\n 简短。"),
    ([conversation(" S"), conversation("S\n")], [conversation("S")], " S"),
    ([conversation("S")] * 3, [conversation("other")], None),
    ([conversation("S"), conversation()], [], None),
    ([conversation(), conversation("S")], [], None),
    ([conversation("")], [], None),
    ([{"text": "plain"}, conversation("S"), {"text": "plain"}], [], "S"),
    ([{"text": "plain"}], [], None),
    ([conversation()], [conversation()], None),
    ([], [], None),
])  # fmt: skip
def test_a_system_prompt_is_constant_or_it_is_none(tmp_path, train, valid, expected):
    files = (write_rows(tmp_path / "train.jsonl", train), write_rows(tmp_path / "valid.jsonl", valid))
    assert constant_system(*files, tmp_path / "missing.jsonl") == expected


def test_reading_ends_where_two_differ(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", [conversation("a"), conversation("b")])
    path.write_text(path.read_text() + "no JSON\n")
    assert constant_system(path) is None


def test_the_datas_system_prompt_becomes_system_and_is_told(merged, tmp_path):
    run = RunDir(tmp_path, "tiny-gemma")
    run.data.mkdir()
    text = "Answer as an analyst.\n" + "x" * 100
    write_rows(run.train_rows, [conversation(text)])
    target = told(merged, tmp_path)
    assert target.system == text
    [note] = target.notes
    assert note.startswith("every conversation of the data has the system prompt 'Answer as an analyst. xxx")
    assert note.endswith("…': it becomes SYSTEM") and len(note) < 160
    for given in ("mine", ""):
        target = told(merged, tmp_path, system=given)
        assert (target.system, target.notes) == (given, ())
    write_rows(run.valid_rows, [conversation()])
    target = told(merged, tmp_path)
    assert (target.system, target.notes) == (None, ())


# --- the licence


def base(path: Path) -> BaseModel:
    return BaseModel("base", "base", "directory", path, None, "", {})


@pytest.mark.parametrize(("card", "expected"), [
    ("license: gemma", "Gemma Terms of Use: https://ai.google.dev/gemma/terms\n"),
    ("license: apache-2.0", "Apache License 2.0: https://www.apache.org/licenses/LICENSE-2.0\n"),
    ("license: gemma\nlicense_link: https://ai.google.dev/gemma/docs/gemma_4_license",
     "Gemma Terms of Use: https://ai.google.dev/gemma/docs/gemma_4_license\n"),
    ("license: other\nlicense_name: qwen\nlicense_link: https://example.com/l", "qwen: https://example.com/l\n"),
    ("license: llama3.2", "llama3.2\n"),
    ("tags: [x]", None),
])
def test_the_licence_of_the_bases_card(tmp_path, card, expected):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(f"---\n{card}\n---\n# Model\n")
    assert licence_text(tmp_path, base(tmp_path / "base")) == expected


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "license.md", "LICENCE", "COPYING"])
def test_a_licence_file_comes_first(tmp_path, name):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "licenses").mkdir()
    assert licence_text(tmp_path, base(tmp_path / "base")).startswith("MIT License")
    (tmp_path / name).write_text("Do as you like.\n")
    assert licence_text(tmp_path, base(tmp_path / "base")) == "Do as you like.\n"
