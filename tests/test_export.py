"""export-ollama through the command line: files, checks, and Ollama servers of both generations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf_support import LlamaCpp
from loopback_ollama import LoopbackOllama

from gemma_tune.modelfile import parse_modelfile


@pytest.fixture
def merged(cli, trained):
    """A run up to the merged model."""
    assert cli("merge", "--no-check", "--run", trained).code == 0
    return trained


def modelfile(run: Path) -> dict:
    return parse_modelfile((run / "ollama" / "Modelfile").read_text())


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_0"])
def test_writes_gguf_and_modelfile(cli, merged, quant):
    result = cli("export-ollama", "--quant", quant, "--json")
    assert result.code == 0, result.err
    gguf = merged / "ollama" / f"tiny-gemma-{quant}.gguf"
    summary = result.json["summary"]
    assert summary["gguf_bytes"] == gguf.stat().st_size
    assert 0 <= summary["check_largest_error"] <= {"f16": 1e-3, "bf16": 1e-6, "q8_0": 0.01, "q4_0": 0.13}[quant]
    read = modelfile(merged)
    assert read["from"] == f"./tiny-gemma-{quant}.gguf"
    assert read["parameters"]["stop"] == ["<end_of_turn>"]
    assert read["parameters"]["num_ctx"] == 1024, "the model's own context is shorter than the default"
    assert read["parameters"]["temperature"] == 0.0, "the base has no sampling settings, so transformers is greedy"
    assert "<bos>" not in read["template"] and "<start_of_turn>user" in read["template"]


def test_without_a_server_it_says_what_to_do(cli, merged):
    result = cli("export-ollama", "--json")
    assert result.code == 0, result.err
    assert result.json["created"] is False
    command = "ollama create tiny-gemma-tuned -f runs/tiny-gemma/ollama/Modelfile"
    assert result.json["next"] == [command, "ollama run tiny-gemma-tuned"]
    assert "https://ollama.com/download" in result.json["advice"]
    assert "https://ollama.com/download" in result.err and command in result.err.replace("\n", "")


def test_create_without_a_server_is_an_error_before_any_work(cli, merged):
    result = cli("export-ollama", "--create")
    assert result.code == 1
    assert "no Ollama server answers at http://127.0.0.1:9" in result.err
    assert not (merged / "ollama").exists()


@pytest.mark.parametrize("generation", ["0.33", "0.34.1"])
def test_creates_the_model_in_ollama(cli, merged, monkeypatch, generation):
    with LoopbackOllama(generation) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        result = cli("export-ollama", "--name", "my-analyst", "--system", "Be brief. 简短。", "--num-ctx", 512, "--json")
        assert result.code == 0, result.err
        assert result.json["created"] is True and result.json["next"] == ["ollama run my-analyst"]
        request = server.models["registry.ollama.ai/library/my-analyst:latest"] if (
            "registry.ollama.ai/library/my-analyst:latest" in server.models) else next(iter(server.models.values()))
        read = modelfile(merged)
        assert request["template"] == read["template"]
        assert request["system"] == read["system"] == "Be brief. 简短。"
        assert request["parameters"]["num_ctx"] == 512
        [digest] = request["files"].values()
        assert server.blob(digest).read_bytes() == (merged / "ollama" / "tiny-gemma-q8_0.gguf").read_bytes()
        uploads = [p for p in server.paths() if p.startswith("POST /api/blobs")]
        again = cli("export-ollama", "--name", "my-analyst", "--system", "Be brief. 简短。", "--num-ctx", 512, "--json")
        assert again.json["status"] == "up-to-date" and again.json["created"] is True
        assert [p for p in server.paths() if p.startswith("POST /api/blobs")] == uploads, "the blob is there already"


def test_no_create_leaves_the_server_alone(cli, merged, monkeypatch):
    with LoopbackOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert cli("export-ollama", "--no-create", "--json").json["created"] is False
        assert server.paths() == []


@pytest.mark.parametrize("fault", ["create-error", "create-cut", "upload-dropped"])
def test_a_server_that_fails_is_an_error_and_the_files_stay(cli, merged, fault):
    with LoopbackOllama(faults=[fault]) as server:
        result = cli("export-ollama", "--host", server.url)
        assert result.code == 1
        assert "Error:" in result.err and "Hint:" in result.err
    assert modelfile(merged)["from"] == "./tiny-gemma-q8_0.gguf"
    assert "export-ollama" in json.loads((merged / "manifest.json").read_text())["stages"]


def test_bad_names_are_refused_before_any_work(cli, merged):
    result = cli("export-ollama", "--name", "no spaces please")
    assert result.code == 2 and "no spaces please" in result.err
    assert not (merged / "ollama").exists()


def test_a_gguf_that_does_not_hold_the_weights_is_noticed(cli, merged, monkeypatch):
    from gemma_tune import gguf_writer

    plain = gguf_writer.PlannedTensor.chunks

    def wrong(self):
        for rows in plain(self):
            yield rows * 1.05 if self.name == "blk.1.attn_q.weight" else rows

    monkeypatch.setattr(gguf_writer.PlannedTensor, "chunks", wrong)
    result = cli("export-ollama")
    assert result.code == 1
    assert "blk.1.attn_q.weight" in result.err
    assert "export-ollama" not in json.loads((merged / "manifest.json").read_text())["stages"]


def test_missing_and_stale_stages_are_told(cli, trained):
    result = cli("export-ollama", "--run", trained)
    assert result.code == 2
    assert "needs what `merge` makes" in result.err
    assert f"gemma-tune merge --run {trained}" in result.err


def test_real_llama_cpp_reads_it_token_by_token(cli, merged):
    """Ids of the rendered prompt, the template and the end of a turn, as llama.cpp has them."""
    from gemma_tune.models import load_format

    assert cli("export-ollama", "--quant", "bf16").code == 0
    chat = load_format(merged / "tiny-gemma_lora_merged", "gemma3_text")
    engine = LlamaCpp(merged / "ollama" / "tiny-gemma-bf16.gguf")
    for messages in ([{"role": "user", "content": "The quick brown fox"}],
                     [{"role": "system", "content": "今天天气"}, {"role": "user", "content": "😀 def add(left):"},
                      {"role": "assistant", "content": "sea shells"}, {"role": "user", "content": "and?"}]):
        ids = chat.prompt_ids(messages)
        text = chat.render(messages, prompt=True).removeprefix("<bos>")
        assert engine.tokenize(text, special=True) == ids
        rendered = engine.post("/apply-template", messages=messages)["prompt"]
        assert rendered.removeprefix("<bos>") == text
