"""What a run makes can be given away: nothing in it says where it was made, or where the base model lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def exported(cli, trained) -> Path:
    for args in (("merge", "--no-check"), ("export-ollama", "--quant", "f16", "--no-verify", "--no-measure")):
        result = cli(*args)
        assert result.code == 0, result.err
    return trained


def test_no_file_of_a_run_names_a_place(exported, tmp_path_factory):
    places = [str(path).encode() for path in (tmp_path_factory.getbasetemp(), Path.home(), Path(__file__).parents[2])]
    # The reports on the data name its files as they were named to `prepare`, for their rows to be found.
    files = [path for path in exported.rglob("*") if path.is_file() and path.parent.name != "data"]
    assert {"adapter_config.json", "tokenizer_config.json", "Modelfile", "manifest.json"} <= {p.name for p in files}
    assert any("training_checkpoints" in path.parts for path in files)
    assert [path for path in files for place in places if place in path.read_bytes()] == []


def test_the_base_is_called_by_its_name(exported, tmp_path):
    for folder in (exported / "tiny-gemma_lora_adapter", *exported.glob("training_checkpoints/checkpoint-*")):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == ("tiny-gemma" if "adapter" in folder.name else "")
        assert "base_model: tiny-gemma\n" in (folder / "README.md").read_text()
        assert ".." not in (folder / "README.md").read_text()
    from gemma_tune.encoding.tokenizer import load_tokenizer

    # A tokenizer that was saved with a path by another program loses it too.
    other = shutil.copytree(exported / "tiny-gemma_lora_adapter", tmp_path / "other")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_file": "/home/somebody/tokenizer.model"}))
    load_tokenizer(other).save_pretrained(tmp_path / "saved")
    assert "somebody" not in (tmp_path / "saved/tokenizer_config.json").read_text()


def test_an_adapter_that_names_no_place_belongs_to_its_run(cli, trained, tiny, tmp_path):
    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    within = cli("merge", "--adapter", away, "--run", trained, "--no-check")
    assert within.code == 0, within.err
    checkpoint = sorted(trained.glob("training_checkpoints/checkpoint-*"))[-1]
    of_training = cli("merge", "--adapter", checkpoint, "--run", trained, "--no-check")
    assert of_training.code == 0, of_training.err
    alone = cli("merge", "--adapter", checkpoint, "--run", "other", "--no-check")
    assert alone.code == 2
    assert "does not say which model it was trained on" in alone.err and "--base ID" in alone.err
    unknown = cli("merge", "--adapter", away, "--run", "other", "--no-check")
    assert unknown.code in (1, 2)
    assert "away names:" in unknown.err and f"gemma-tune merge --run other --adapter {away} --base ID" in " ".join(unknown.err.split())
