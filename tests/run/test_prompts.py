"""Held-out prompts: how long they may be, for models of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gemma_tune.answers.prompts import headline
from gemma_tune.base.checkpoint import context_length
from gemma_tune.encoding.tokens import TokenWriter
from gemma_tune.run.directory import RunDir
from gemma_tune.run.manifest import Manifest
from gemma_tune.run.prepared import rows_with_pictures
from gemma_tune.run.prompts import held_out, prompt_limit
from support.command import rows, write_rows


@pytest.mark.parametrize(("config", "tokens"), [
    ({"max_position_embeddings": 1024}, 1024), ({"n_positions": 512}, 512),
    ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 131072}, "vision_config": {}}, 131072), ({}, 0)])
def test_the_context_of_a_model(config, tokens):
    assert context_length(config) == tokens


def session(config: dict, root: Path = Path("runs/none"), **prepared: int) -> SimpleNamespace:
    return SimpleNamespace(model=SimpleNamespace(config=config), settings_of=lambda stage: prepared,
                           run=RunDir(root, "m"), manifest=Manifest({"name": "m"}))


@pytest.mark.parametrize(("config", "prepared", "answer", "limit"), [
    ({"text_config": {"max_position_embeddings": 32768}}, {"max_length": 8192}, 256, 8192),  # multimodal
    ({"max_position_embeddings": 1024}, {"max_length": 2048}, 256, 768),
    ({"max_position_embeddings": 1024}, {"max_length": 2048}, 5000, 512),
    ({"max_position_embeddings": 1024}, {}, 24, 1000), ({}, {}, 96, 4000)])
def test_prompts_are_as_long_as_in_training_with_room_for_an_answer(config, prepared, answer, limit):
    assert prompt_limit(session(config, **prepared), answer) == limit


class Words:
    """One token a word, as a chat format."""

    def prompt_ids(self, messages, tools=None):
        return [token for turn in messages for token in turn["content"].split()]


def test_a_prompt_that_a_multimodal_model_was_trained_with_is_asked(tmp_path):
    long = {"messages": [{"role": "user", "content": "word " * 5000}, {"role": "assistant", "content": "yes"}]}
    run = session({"text_config": {"max_position_embeddings": 32768}}, tmp_path, max_length=8192)
    run.run.data.mkdir()
    write_rows(run.run.valid_rows, [long, *rows(2)])
    write_rows(run.run.train_rows, rows(3))
    assert held_out(run, Words(), 1, 256)[0].messages == json.loads(json.dumps(long["messages"][:1]))
    assert len(held_out(run, Words(), 9, 256)) == 6
    assert len(held_out(run, Words(), 9, 256, most=2048)) == 5


@pytest.mark.parametrize("damage", [None, b"", b"no tokens", 200], ids=["gone", "empty", "other", "cut"])
def test_tokens_that_cannot_be_read_have_no_pictures_to_tell_of(tmp_path, damage):
    run = session({}, tmp_path)
    run.run.tokens.mkdir(parents=True)
    path = run.run.tokens / "train.arrow"
    with TokenWriter(path) as writer:
        writer.add([(np.arange(4, dtype=np.int32), np.array([2, 4], np.int32), "a.png")])
    assert rows_with_pictures(run, "train") == 1
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(whole[:damage] if isinstance(damage, int) else damage)
    assert rows_with_pictures(run, "train") == 0


def test_prompts_with_pictures_are_left_out_where_these_cannot_be_shown(tmp_path):
    """The others are asked all the same; how long one with a picture may be is for the training to say."""
    run = session({"text_config": {"max_position_embeddings": 32768}}, tmp_path)
    run.run.data.mkdir()
    shown = {"messages": [{"role": "user", "content": "What?", "pictures": [{"at": 0, "file": "pictures/a.png"}]},
                          {"role": "assistant", "content": "A cat."}]}
    write_rows(run.run.valid_rows, [shown, *rows(2)])
    write_rows(run.run.train_rows, [*rows(1), shown])
    found = held_out(run, Words(), 9, 256)
    assert len(found) == 3 and not any(prompt.pictures for prompt in found)
    found = held_out(run, Words(), 9, 256, seen={"b.png"})
    assert len(found) == 3 and not any(prompt.pictures for prompt in found)
    found = held_out(run, Words(), 9, 256, most=2, seen={"a.png", "b.png"})
    assert [prompt.pictures for prompt in found] == [("a.png",), ("a.png",)], "of three words each the others are"
    assert len(held_out(run, Words(), 9, 256, seen={"a.png"})) == 5
    with_text = {**shown, "messages": [{**shown["messages"][0], "content": "And so on. " * 2000}, shown["messages"][1]]}
    write_rows(run.run.valid_rows, [with_text])
    write_rows(run.run.train_rows, [])
    assert not held_out(session({"max_position_embeddings": 1024}, tmp_path), Words(), 9, 256, seen={"a.png"})


@pytest.mark.parametrize(("turns", "called"), [
    ([{"role": "user", "content": "\n What?\nSo", "pictures": [{"at": 0, "file": "pictures/a.png"}]}], "What?"),
    ([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "So"},
      {"role": "user", "content": "\n", "pictures": [{"at": 0, "file": "pictures/a.png"}, {"at": 1, "file": "pictures/b.png"}]}], "a.png"),
    ([{"role": "system", "content": "Be kind."}], "")])
def test_a_prompt_is_called_by_what_is_said_or_else_by_its_picture(turns, called):
    assert headline(turns) == called
