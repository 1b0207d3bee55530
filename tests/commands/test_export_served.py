"""export-ollama beside a server: the Ollama column of the report is the server's, and a difference is an error."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import jsonschema
import pytest

from gemma_tune.export import checks
from gemma_tune.gguf.reader import read_gguf_metadata
from support.command import MANIFEST_SCHEMA
from support.ollama import LoopbackOllama, by_template

REPORT = Path("runs/tiny-gemma/ollama/report.md")


def recorded() -> dict:
    manifest = json.loads(Path("runs/tiny-gemma/manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    return manifest["stages"]["export-ollama"]


@pytest.fixture
def export(cli, merged, monkeypatch, go_cache):
    """The export without llama.cpp's own comparison, so that the report is the server's alone."""
    monkeypatch.setattr(checks, "find_engine", lambda: None)
    return lambda *args: cli("export-ollama", "--quant", "q8_0", "--no-measure", "--json", *args)


def test_the_column_is_the_servers_and_follows_it(cli, merged, go_cache, monkeypatch):
    """Without a server it is of the template alone; each server that is asked later leaves its own, with its version."""
    from gemma_tune.base.fingerprints import fingerprint

    monkeypatch.setattr(checks, "load_merged", lambda *_: (None, "answers are not the matter here"))

    def command(*args):
        return cli("export-ollama", "--quant", "bf16", "--no-measure", "--json", *args)

    without = command("--no-create")
    assert without.code == 0, without.err
    first = without.json["summary"]["parity"]
    assert first["ids"]["Ollama"]["template_only"] > 10 and first["ids"]["Ollama"]["equal"] == 0
    assert "served" not in first and "template only" in without.err
    assert "| prompt | tokens | llama.cpp | Ollama |" in REPORT.read_text()
    for generation, version in (("0.33", "0.33.0"), ("0.34.1", "0.34.1")):
        with LoopbackOllama(generation, render=by_template) as server:
            result = command("--host", server.url)
        assert result.code == 0, result.err
        assert result.json["status"] == "up-to-date" and result.json["answer"]["prompt_as_trained"] is True
        parity = result.json["summary"]["parity"]
        assert parity["served"] == {"version": version, "model": "tiny-gemma-tuned", "shows": True, "untold": ""}
        assert parity["ids"]["Ollama"]["equal"] > 10 and parity["ids"]["Ollama"]["template_only"] == 0
        for kept in ("engine", "greedy"):
            assert parity[kept] == first[kept]
        assert parity["ids"]["llama.cpp"] == first["ids"]["llama.cpp"]
        stage, text = recorded(), REPORT.read_text()
        assert stage["summary"]["parity"] == parity
        assert f"| prompt | tokens | llama.cpp | Ollama {version} |" in text and text.count("## Parity") == 1
        assert "| Chinese |" in text and "No Ollama server" not in text and text.startswith("# tiny-gemma in GGUF")
        report = stage["outputs"]["export_report"]
        assert fingerprint(REPORT)["sha256"] == report["sha256"]
        assert f"Ollama {version} reads " in result.err
    assert command("--no-create").json["summary"]["parity"] == parity, "what was found out stays"


def test_a_difference_is_an_error_and_all_stays(export):
    with LoopbackOllama("0.24", ["own-tokenizer"], render=by_template) as server:
        result = export("--host", server.url)
        assert result.code == 1
        error = result.json["error"]
        assert error["message"].startswith("Ollama 0.24.0 reads ")
        assert error["message"].endswith("for tiny-gemma-tuned otherwise than training did")
        assert any("system: differs: " in line and "a tokenizer of its own" in line for line in error["problems"])
        for part in ("update Ollama", f"gemma-tune export-ollama --run runs/tiny-gemma --allow-difference --host {server.url}", str(REPORT)):
            assert part in error["hint"]
        assert list(server.models) == ["tiny-gemma-tuned:latest"]
        assert Path("runs/tiny-gemma/ollama/tiny-gemma-q8_0.gguf").exists()
        parity = recorded()["summary"]["parity"]
        assert parity["ok"] is False and parity["served"]["version"] == "0.24.0"
        assert "| prompt | tokens | Ollama 0.24.0 |" in REPORT.read_text()
        allowed = export("--host", server.url, "--allow-difference")
    assert allowed.code == 0, allowed.err
    assert allowed.json["status"] == "up-to-date" and allowed.json["created"] is True
    assert "otherwise than training did; " in allowed.err and allowed.json["answer"]["prompt_as_trained"] is False


def test_without_comparisons_the_server_is_not_asked_to_compare(export):
    with LoopbackOllama("0.24", ["own-tokenizer"], render=by_template) as server:
        result = export("--host", server.url, "--no-verify")
        assert result.code == 0, result.err
        assert len([path for path in server.paths() if path == "POST /api/chat"]) == 2  # one is laid out, one answered
    assert "parity" not in result.json["summary"] and result.json["answer"]["prompt_as_trained"] is True


def test_ctrl_c_while_the_server_is_asked(export):
    """The model and the files stay, and the report says no more than before."""
    def interrupted(system, messages, template=None):
        if server.paths().count("POST /api/chat") == 4:
            os.kill(os.getpid(), signal.SIGINT)
            server.stopped.wait(5)
        return by_template(system, messages, server.models["tiny-gemma-tuned:latest"]["template"])

    with LoopbackOllama(render=interrupted) as server:
        result = export("--host", server.url)
        assert result.code == 130 and server.models
    assert "parity" not in recorded()["summary"]
    with LoopbackOllama(render=by_template) as server:
        again = export("--host", server.url)
    assert again.code == 0 and again.json["status"] == "up-to-date" and again.json["summary"]["parity"]["ok"] is True


def test_a_file_for_other_programs(export, merged):
    """llama.cpp and LM Studio take the same file, whose chat template is that of training. Nothing is to be installed."""
    result = export("--no-create")
    assert result.code == 0, result.err
    gguf = "runs/tiny-gemma/ollama/tiny-gemma-q8_0.gguf"
    assert result.json["file"] == gguf
    assert result.json["elsewhere"] == [f"llama-cli -m {gguf}", f"llama-server -m {gguf} --jinja", f"lms import --copy {gguf}"]
    assert result.json["lm_studio_folder"] == "~/.lmstudio/models/gemma-tune/tiny-gemma-tuned/"
    for said in (*result.json["elsewhere"], result.json["lm_studio_folder"], f"for other programs: {gguf}"):
        assert said in " ".join(result.err.split())
    assert result.json["advice"] is None
    assert not [word for word in ("nstall Ollama", "ollama.com", "ollama serve") if word in result.err + result.out]
    template = (merged / "tiny-gemma_lora_merged" / "chat_template.jinja").read_text()
    assert read_gguf_metadata(Path(result.json["file"]))["tokenizer.chat_template"] == template
