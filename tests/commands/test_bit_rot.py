"""Bits that changed on the disk, with size and time stamp as they were: whoever reads the file whole notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from support.command import QUICK, invoke
from support.damage import flip_bit
from support.hub import LoopbackHub
from support.ollama import LoopbackOllama

ADAPTER, MERGED = "tiny-gemma_lora_adapter/adapter_model.safetensors", "tiny-gemma_lora_merged/model.safetensors"


def artifacts(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*")
            if path.is_file() and path.name not in ("manifest.json", ".lock")}


@pytest.mark.parametrize(("file", "command", "maker"), [
    (ADAPTER, ("merge", "--no-check"), "train"),
    (ADAPTER, ("chat", "--prompt", "Hello", "-n", 2), "train"),
    (ADAPTER, ("eval", "--questions", 1), "train"),
    ("data/valid.jsonl", ("eval", "--questions", 1), "prepare"),
    ("data/train.jsonl", ("train", *QUICK, "--force"), "prepare"),
    ("data/tokens/train.arrow", ("train", *QUICK, "--force"), "prepare"),
])
def test_a_stage_refuses_a_damaged_input(cli, trained, file, command, maker):
    flip_bit(trained / file)
    before = artifacts(trained)
    assert cli("status", "--json").json["stages"][maker]["state"] == "done", "sizes and time stamps tell nothing"
    result = cli(*command)
    assert result.code == 2, result.err
    assert f"cannot use the result of `{maker}`" in result.err and "was changed" in result.err
    assert f"gemma-tune {maker} --run runs/tiny-gemma --force" in result.err
    assert artifacts(trained) == before


def test_export_refuses_damaged_weights(export, merged):
    flip_bit(merged / MERGED)
    result = export()
    assert result.code == 2
    assert "`export-ollama` cannot use the result of `merge`: tiny-gemma_lora_merged was changed" in result.err
    assert not list(merged.glob("ollama/*"))


def test_damaged_weights_are_not_pushed(cli, merged, monkeypatch, tmp_path):
    flip_bit(merged / MERGED)
    with LoopbackHub() as hub:
        hub.add_token("hf_" + "T" * 34)
        hub.isolate(monkeypatch, tmp_path / "home", token="hf_" + "T" * 34)
        result = cli("merge", "--no-check", "--push", "tester/tiny-tuned")
        assert result.code == 2
        assert "`merge --push` cannot use the result of `merge`" in result.err
        assert not [path for path in hub.paths("POST") if "commit" in path]


def test_a_damaged_gguf_is_not_pushed(export, merged, hub, visit):
    assert export("--quant", "f16,q8_0").code == 0
    flip_bit(merged / "ollama" / "tiny-gemma-q8_0.gguf")
    result = export("--push", "tester/tiny-GGUF")
    assert result.code == 2
    assert "`export-ollama --push` cannot use the result of `export-ollama`" in result.err and "-q8_0.gguf was changed" in result.err
    assert not hub.paths("POST")


def test_a_damaged_gguf_does_not_stay_where_ollama_alone_is_told_other_things(export, merged):
    assert export("--quant", "q8_0").code == 0
    gguf = merged / "ollama" / "tiny-gemma-q8_0.gguf"
    whole = gguf.read_bytes()
    flip_bit(gguf)
    result = export("--system", "Be brief.")
    assert result.code == 0 and "the GGUF stays as it is" not in result.err
    assert gguf.read_bytes() == whole


def test_a_damaged_gguf_is_not_given_to_ollama(export, merged):
    assert export("--no-create").code == 0
    flip_bit(merged / "ollama" / "tiny-gemma-q8_0.gguf")
    with LoopbackOllama() as server:
        result = export("--host", server.url)
        assert result.code == 2
        assert "tiny-gemma-q8_0.gguf is damaged" in result.err and "export-ollama --run runs/tiny-gemma --force" in result.err
        assert not server.models
        assert not [path for path in server.paths() if path.startswith("POST /api/blobs")]


@pytest.mark.parametrize("command", [("train", *QUICK, "--force"), ("merge", "--no-check")])
def test_nothing_is_made_of_a_damaged_base(cli, trained, tiny, tmp_path, command):
    base = shutil.copytree(tiny, tmp_path / "tiny-gemma")
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["model"]["path"] = "../../tiny-gemma"
    (trained / "manifest.json").write_text(json.dumps(manifest))
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    flip_bit(base / "model.safetensors")
    before = artifacts(trained)
    assert cli("status", "--json").json["stages"]["train"]["state"] == "done"
    assert cli("status", "--verify", "--json").json["stages"]["train"]["state"] == "stale: the base model changed"
    result = cli(*command)
    assert result.code == 2, result.err
    assert "the base model in" in result.err and "is damaged" in result.err and "copy it there again" in result.err
    assert artifacts(trained) == before


@pytest.fixture(scope="module")
def from_gguf_once(trained_once, tiny, tmp_path_factory):
    """A run on a GGUF, the cache with the checkpoint that was made of it, and the file."""
    from gemma_tune.gguf.writer import write_gguf

    place = tmp_path_factory.mktemp("from-gguf")
    write_gguf(tiny, place / "small.gguf", "bf16", name="small", eot_token_id=None, chat_template=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMA_TUNE_CACHE", str(place / "cache"))
        for args in (("prepare", trained_once.parent.parent / "rows.jsonl", "--model", place / "small.gguf"),
                     ("train", *QUICK)):
            assert invoke(*args, "--run", place / "runs" / "small").code == 0
    return place


@pytest.fixture
def cached(from_gguf_once, tmp_path) -> Path:
    """The checkpoint in a cache of one's own, with its run in runs/small."""
    shutil.copytree(from_gguf_once, tmp_path, dirs_exist_ok=True)
    [checkpoint] = (tmp_path / "cache" / "checkpoints").glob("small-*[!k]")
    return checkpoint


@pytest.mark.parametrize("command", [("train", *QUICK, "--force"), ("merge", "--no-check")])
def test_damaged_weights_in_the_cache_name_the_folder_to_delete(cli, cached, command):
    assert cli("status", "--verify", "--json").json["base_damage"] is None
    flip_bit(cached / "model.safetensors")
    looked = cli("status", "--verify", "--json")
    assert looked.code == 1 and "model.safetensors was changed" in looked.json["base_damage"]
    assert f"delete the folder {cached}: " in looked.err
    result = cli(*command)
    assert result.code == 2, result.err
    assert f"the base model in {cached} is damaged: model.safetensors was changed" in result.err.replace("\n", "")
    assert f"delete the folder {cached}: " in result.err and "made again from small.gguf" in result.err


def test_a_deleted_folder_of_the_cache_is_made_again(cli, cached):
    whole = (cached / "model.safetensors").read_bytes()
    shutil.rmtree(cached)
    result = cli("merge", "--no-check")
    assert result.code == 0, result.err
    assert (cached / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("spoil", [
    lambda folder: flip_bit(folder / "config.json", 40), lambda folder: flip_bit(folder / "tokenizer.json", 40),
    lambda folder: (folder / "tokenizer_config.json").unlink(),
    lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])])
def test_what_is_small_or_was_cut_in_the_cache_is_noticed_by_every_command(cli, cached, spoil):
    spoil(cached)
    result = cli("chat", "--base", "--prompt", "Hello")
    assert result.code == 2
    assert "is damaged" in result.err and f"delete the folder {cached}: " in result.err


def test_weights_in_the_cache_that_cannot_be_loaded_name_the_folder_too(cli, cached):
    flip_bit(cached / "model.safetensors", 9, 6)  # in its header
    result = cli("chat", "--base", "--prompt", "Hello")
    assert result.code == 2
    assert f"delete the folder {cached}: " in result.err


def test_a_conversion_of_an_unreadable_record_is_made_again(cli, cached):
    (cached / "complete.json").write_text("{")
    result = cli("chat", "--base", "--prompt", "Hello", "-n", 2)
    assert result.code == 0, result.err
    assert json.loads((cached / "complete.json").read_text())["files"]["model.safetensors"]["sha256"]


def test_status_reads_a_downloaded_base_too(cli, tiny, data, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_repo("google/tiny", tiny)
        hub.isolate(monkeypatch, tmp_path / "home")
        for args in (("prepare", data, "--model", "google/tiny"), ("train", *QUICK)):
            assert cli(*args).code == 0
        assert cli("status", "--verify", "--json").json["base_damage"] is None
        [weights] = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
        flip_bit(weights.resolve())
        assert "model.safetensors was changed" in cli("status", "--verify", "--json").json["base_damage"]
        result = cli("merge", "--no-check")
        assert result.code == 2 and f"cache, {weights.parents[2]}: " in result.err
