"""A Gemma that sees is tuned on text and exported: llama.cpp and Ollama's double read pictures with it as with the base."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.words import small_size
from gemma_tune.export import senses, served_sight, sight
from gemma_tune.gguf.reader import GgufFile, read_gguf_metadata
from support.command import MANIFEST_SCHEMA, QUICK, copied_run, invoke, rows, write_rows
from support.modelfile import parse_modelfile
from support.models import make_seeing
from support.ollama import LoopbackOllama

RUN = Path("runs/seeing")
PROJECTOR, Q8 = RUN / "ollama/mmproj-seeing-f16.gguf", RUN / "ollama/seeing-q8_0.gguf"


@pytest.fixture(scope="session")
def seeing_once(tmp_path_factory) -> Path:
    """A run up to the merged model, and its model beside it; copy it, do not change it."""
    place = tmp_path_factory.mktemp("seeing")
    model, run = make_seeing(place / "models" / "seeing"), place / "runs" / "seeing"
    data = write_rows(place / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", model), ("train", *QUICK), ("merge", "--no-check")):
        result = invoke(*args, "--run", run)
        assert result.code == 0, result.err
    return run


@pytest.fixture
def seeing(seeing_once, tmp_path) -> Path:
    return copied_run(seeing_once, tmp_path, seeing_once.parents[1] / "models" / "seeing")


@pytest.fixture
def quick(cli):
    """The export in one format, without anything that loads the model."""
    return lambda *args: cli("export-ollama", "--quant", "q8_0", "--no-measure", "--no-verify", "--json", *args)


def recorded() -> dict:
    manifest = json.loads((RUN / "manifest.json").read_text())
    jsonschema.validate(manifest, MANIFEST_SCHEMA)
    return manifest["stages"]["export-ollama"]


def identity(path: Path) -> tuple[int, int]:
    """Another one where a file was written anew."""
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_the_exported_model_sees(cli, seeing):
    result = cli("export-ollama", "--quant", "q8_0,q4_0", "--no-measure", "--no-create", "--json")
    assert result.code == 0, result.err
    assert result.json["artifacts"]["projector"] == str(PROJECTOR) and result.json["projector"] == str(PROJECTOR)
    figures = result.json["summary"]["projector"]
    assert figures["file"] == PROJECTOR.name and figures["bytes"] == PROJECTOR.stat().st_size and figures["senses"] == ["vision"]
    assert figures["largest_error"] < 1e-3 and set(figures["tensor_types"]) == {"F16", "F32"}
    assert figures["engine"] and figures["pictures_apart"] > 1e-4, "llama.cpp sees another picture when it is shown one"
    assert recorded()["summary"]["projector"] == figures and "text_alone" not in result.json["summary"]
    assert read_gguf_metadata(PROJECTOR)["general.type"] == "mmproj"
    for name in ("Modelfile", "Modelfile-q8_0", "Modelfile-q4_0"):
        assert parse_modelfile((RUN / "ollama" / name).read_text())["beside"] == [f"./{PROJECTOR.name}"]
    report = (RUN / "ollama/report.md").read_text()
    assert f"## Pictures\n\nWith {PROJECTOR.name} (0 MB) each of these files takes pictures, as the base model does." in report
    assert "about a red and a blue one begin differ by up to " in report and "Not checked" not in report
    main = result.json["file"]
    assert result.json["elsewhere"][:2] == [f"llama-mtmd-cli -m {main} --mmproj {PROJECTOR} --jinja",
                                            f"llama-server -m {main} --mmproj {PROJECTOR} --jinja"]
    assert result.json["elsewhere"][2:] == [f"lms import --copy --user-repo gemma-tune/seeing-tuned {path}" for path in (main, PROJECTOR)]
    said = " ".join(result.err.split())
    assert f"{PROJECTOR.name}, 0 MB: with it the exported model takes pictures, as the base model does" in said
    assert "showing llama.cpp a picture with seeing-q4_0.gguf, which can take minutes" in said
    assert f"for other programs: {main}, its chat template in it, and for pictures {PROJECTOR}" in said
    assert not list((RUN / "ollama").glob(".*")) and "earlier files stay" not in said


def test_the_file_stays_as_long_as_the_towers_do(cli, quick, seeing):
    assert quick().code == 0
    before, gguf = identity(PROJECTOR), Q8.read_bytes()
    assert quick().json["status"] == "up-to-date" and identity(PROJECTOR) == before
    assert quick("--system", "Be brief.").json["status"] == "done" and identity(PROJECTOR) == before
    for args in (("train", *QUICK[:-1], 1e-2, "--force"), ("merge", "--no-check")):
        assert cli(*args).code == 0
    again = quick()
    assert again.code == 0 and Q8.read_bytes() != gguf and identity(PROJECTOR) == before
    assert "earlier" not in again.json["summary"], "it is none of the number formats"
    assert again.json["artifacts"]["projector"] and recorded()["outputs"]["projector"]["path"] == f"ollama/{PROJECTOR.name}"
    status = cli("status", "--json").json["stages"]["export-ollama"]
    assert status["state"] == "done" and "vision: 0 MB for all of these" in cli("status").err
    whole, gguf = PROJECTOR.read_bytes(), identity(Q8)
    content = bytearray(whole)
    content[-9] ^= 64
    PROJECTOR.write_bytes(content)
    assert f"ollama/{PROJECTOR.name} was changed" in cli("status", "--verify").err
    assert quick().code == 0 and cli("status", "--verify").code == 0 and PROJECTOR.read_bytes() == whole
    PROJECTOR.unlink()
    assert quick().code == 0 and cli("status", "--verify").code == 0 and PROJECTOR.read_bytes() == whole
    assert identity(Q8) == gguf, "which takes longer to make than what it sees with"
    before = identity(PROJECTOR)
    assert quick("--force").code == 0 and identity(PROJECTOR) != before


def test_other_settings_of_the_processor_are_another_file(cli, quick, seeing_once, tmp_path):
    """With the same weights: llama.cpp has from the file what pictures are prepared with."""
    model = shutil.copytree(seeing_once.parents[1] / "models" / "seeing", tmp_path / "seeing")
    copied_run(seeing_once, tmp_path, model)
    assert quick().code == 0 and read_gguf_metadata(PROJECTOR)["clip.vision.image_mean"].tolist() == [0.5] * 3
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_mean": [0.25] * 3}))
    assert cli("merge", "--no-check", "--force").code == 0 and quick().json["status"] == "done"
    assert read_gguf_metadata(PROJECTOR)["clip.vision.image_mean"].tolist() == [0.25] * 3


def test_towers_that_an_adapter_from_elsewhere_trained(cli, quick, seeing, seeing_once, tmp_path):
    """This program trains none, and others do: the file has them as they were trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForConditionalGeneration

    assert quick().code == 0
    before = PROJECTOR.read_bytes()
    network = Gemma3ForConditionalGeneration.from_pretrained(seeing_once.parents[1] / "models" / "seeing")
    adapter = get_peft_model(network, LoraConfig(r=2, target_modules=r".*vision_tower.*\.q_proj"))
    for name, value in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(value, 0.5)
    adapter.save_pretrained(tmp_path / "adapter")
    assert cli("merge", "--adapter", tmp_path / "adapter", "--no-check").code == 0 and quick().code == 0
    assert len(PROJECTOR.read_bytes()) == len(before) and PROJECTOR.read_bytes() != before
    assert "as the base model" not in cli("status").err


def test_pictures_can_be_left_out_and_come_back(cli, quick, seeing):
    first = quick()
    before, gguf = identity(PROJECTOR), identity(Q8)
    without = quick("--no-vision")
    assert without.code == 0 and without.json["status"] == "done"
    assert "what is exported takes text alone, though the merged model takes pictures: --no-vision" in without.err
    assert "the GGUF stays as it is" in without.err and identity(Q8) == gguf
    assert f"earlier files stay in {RUN / 'ollama'}: {PROJECTOR.name}" in without.err
    assert "projector" not in without.json["artifacts"] and without.json["projector"] is None
    assert "beside" not in parse_modelfile((RUN / "ollama/Modelfile").read_text())
    assert "What is exported takes text alone, though the merged model takes pictures" in (RUN / "ollama/report.md").read_text()
    assert recorded()["summary"]["text_alone"] and "projector" not in recorded()["summary"]
    assert quick().json["status"] == "up-to-date", "as it was asked for before"
    assert "takes text alone, which its base model does not" in cli("status").err
    said = f"ollama/{PROJECTOR.name} ({small_size(PROJECTOR.stat().st_size)}) is what an earlier export saw with, and nothing refers"
    status = cli("status", "--json")
    assert status.json["unused_sight"] == {f"ollama/{PROJECTOR.name}": PROJECTOR.stat().st_size} and said in status.err
    (RUN / "ollama/Modelfile-q4_0").write_text(f"FROM ./seeing-q4_0.gguf\nFROM ./{PROJECTOR.name}\n")  # of an earlier export
    assert cli("status", "--json").json["unused_sight"] == {}
    (RUN / "ollama/Modelfile-q4_0").unlink()
    back = quick("--vision")
    assert "runs again: vision: False -> True" in back.err
    assert back.code == 0 and identity(Q8) == gguf and identity(PROJECTOR) != before
    assert back.json["summary"]["projector"] == first.json["summary"]["projector"]
    assert cli("status", "--json").json["unused_sight"] == {}


def test_a_run_that_was_exported_before_gets_its_sight(quick, seeing):
    """By a version that knew of no such file, and left sight out without a word."""
    assert quick("--no-vision").code == 0
    manifest = json.loads((RUN / "manifest.json").read_text())
    record = manifest["stages"]["export-ollama"]
    del record["config"]["vision"], record["summary"]["text_alone"]
    (RUN / "manifest.json").write_text(json.dumps(manifest))
    gguf = identity(Q8)
    result = quick()
    assert result.json["status"] == "done" and result.json["artifacts"]["projector"] and identity(Q8) == gguf
    assert quick().json["status"] == "up-to-date"


@pytest.mark.parametrize("place", ["", "model."])
def test_parts_of_towers_that_no_configuration_describes_stay_in_the_merged_model_and_are_told(cli, quick, tiny, tmp_path, monkeypatch, place):
    """As where a repository's text model was made of the whole one by its config.json alone."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(tiny, tmp_path / "models/leftover")
    parts = {f"{place}{name}": torch.randn(4, 8, dtype=torch.bfloat16) for name in (
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight", "multi_modal_projector.mm_input_projection_weight")}
    save_file(load_file(model / "model.safetensors") | parts, model / "model.safetensors", {"format": "pt"})
    data = write_rows(tmp_path / "rows.jsonl", rows())
    for args in (("prepare", data, "--model", model), ("train", *QUICK), ("merge",)):
        done = cli(*args)
        assert done.code == 0, done.err
    merged = load_file("runs/leftover/leftover_lora_merged/model.safetensors")
    assert all(torch.equal(merged[name], value) for name, value in parts.items())
    result = quick()
    assert result.code == 0, result.err
    assert (f"what is exported takes text alone: 2 tensors of what sees or hears, such as {place}multi_modal_projector."
            "mm_input_projection_weight, stay in leftover_lora_merged, whose config.json describes a model of text alone") in result.err
    exported = GgufFile(Path("runs/leftover/ollama/leftover-q8_0.gguf"), keys=()).tensors
    assert "token_embd.weight" in exported and not any(name.startswith(("v.", "mm.")) for name in exported)


def test_towers_that_cannot_be_written_are_told_of(quick, seeing, monkeypatch):
    def cannot(checkpoint):
        raise UserError(f"What Others in {checkpoint} sees with cannot be written as GGUF here.", "Take another one.")

    with monkeypatch.context() as earlier:
        earlier.setattr(senses, "projector_of", cannot)
        result = quick()
        assert quick().json["status"] == "up-to-date"
    assert result.code == 0 and not PROJECTOR.exists()
    told = ("what is exported takes text alone, though the merged model takes more: What Others in seeing_lora_merged sees with "
            "cannot be written as GGUF here; Take another one")
    assert result.err.count(told) == 1 and recorded()["summary"]["text_alone"] == told
    assert f"## Pictures\n\nW{told[1:]}.\n" in (RUN / "ollama/report.md").read_text()
    gguf = identity(Q8)  # a later version can
    assert quick().json["artifacts"]["projector"] == str(PROJECTOR) and identity(Q8) == gguf and "text_alone" not in recorded()["summary"]


def test_towers_without_all_of_their_weights_can_be_left_out(cli, quick, tmp_path):
    model, data, lacking = make_seeing(tmp_path / "seeing"), write_rows(tmp_path / "rows.jsonl", rows()), "post_layernorm.bias"
    weights = load_file(model / "model.safetensors")
    save_file({name: value for name, value in weights.items() if not name.endswith(lacking)}, model / "model.safetensors",
              metadata={"format": "pt"})
    for args in (("prepare", data, "--model", model), ("train", *QUICK), ("merge", "--no-check")):
        assert cli(*args).code == 0
    result = quick()
    assert result.code == 2 and f"{lacking} is missing" in result.json["error"]["problems"][0]
    assert result.json["error"]["hint"] == "Merge again from the original base model; --no-vision leaves it out"
    assert not [*(RUN / "ollama").iterdir()] and quick("--no-vision").code == 0


@pytest.mark.parametrize(("lacking", "reason"), [
    ({"find_engine": lambda: None}, "no llama.cpp engine is installed (pip install xllamacpp, then repeat with --verify)"),
    ({"available": lambda device: 5 * 10 ** 8}, "it takes 0.70 GB of memory, and 0.50 GB are available")])
def test_what_is_not_checked_is_listed(cli, seeing, monkeypatch, lacking, reason):
    for name, without in lacking.items():
        monkeypatch.setattr(sight, name, without)
    result = cli("export-ollama", "--quant", "q8_0", "--no-measure", "--no-create", "--json")
    assert result.code == 0 and f"pictures: {reason}" in result.json["summary"]["unchecked"]
    assert f"not checked: pictures: {reason}" in result.err
    assert f"## Not checked\n\n- pictures: {reason}\n" in (RUN / "ollama/report.md").read_text()
    assert "engine" not in result.json["summary"]["projector"]


@pytest.fixture
def unknown_eye(monkeypatch):
    """What a model sees with is of a kind that llama.cpp does not know."""
    write = sight.write_projector

    def unknown(projector, checkpoint, path, **more):
        written = write(projector, checkpoint, path, **more)
        path.write_bytes(path.read_bytes().replace(b"gemma3", b"gemma9", 1))
        return written

    monkeypatch.setattr(sight, "write_projector", unknown)


def test_an_eye_that_llama_cpp_does_not_take_costs_no_file(cli, seeing, unknown_eye):
    result = cli("export-ollama", "--quant", "q8_0", "--no-measure", "--no-create", "--json")
    assert result.code == 0 and Q8.is_file() and PROJECTOR.is_file()
    refused = f"{PROJECTOR.name} beside {Q8.name}: llama.cpp cannot load"
    assert any(said.startswith(refused) and "Text is answered as checked" in said for said in result.json["warnings"])
    assert any(said.startswith(f"pictures: {refused}") for said in result.json["summary"]["unchecked"])
    assert "engine" not in result.json["summary"]["projector"]


def test_an_eye_that_llama_cpp_takes_once_it_is_newer_is_shown_pictures_then(cli, seeing, monkeypatch):
    """Nor is it said that an older one, which does not take it, was shown any."""
    look = sight._apart

    def refused(*_):
        raise WorkFailed("llama.cpp cannot load it")

    def export(apart, *args):
        monkeypatch.setattr(sight, "_apart", apart)
        result = cli("export-ollama", "--quant", "q8_0", "--no-create", "--json", *args)
        assert result.code == 0, result.err
        return result.json["warnings"], result.json["summary"]

    [warning], _ = export(refused, "--no-measure")
    assert warning.endswith("then repeat with --verify, or leave them out with --no-vision")
    warnings, summary = export(look, "--no-measure", "--verify")
    assert not warnings and "engine" in summary["projector"] and "unchecked" not in summary
    [_], summary = export(refused, "--measure")
    assert "engine" not in summary["projector"] and any("cannot load it" in said for said in summary["unchecked"])


def test_nothing_finished_is_lost_where_the_check_was_asked_for(cli, quick, seeing, request):
    assert quick().code == 0
    before = {path: path.read_bytes() for path in (RUN / "ollama").iterdir()}
    request.getfixturevalue("unknown_eye")
    result = cli("export-ollama", "--quant", "q8_0", "--no-measure", "--no-create", "--force", "--verify")
    assert result.code == 1 and f"{PROJECTOR.name} beside {Q8.name}: " in result.err and "llama.cpp cannot load" in result.err
    assert "--no-vision leaves pictures out" in result.err
    assert {path: path.read_bytes() for path in (RUN / "ollama").iterdir()} == before


def test_a_disk_that_is_too_small_for_it(quick, seeing, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=50_000))
    result = quick()
    assert result.code == 1 and "has 0.00 GB free" in result.err and not [*(RUN / "ollama").iterdir()]
    assert result.json["error"]["hint"].endswith("or another folder; --no-vision leaves it out")


# ---- the Hub ---------------------------------------------------------------------------------------------------------

def test_it_is_pushed_along_and_leaves_again(quick, seeing, hub, visit):
    repo_id, name = "tester/seeing-GGUF", "mmproj-seeing-F16.gguf"
    hub.create(repo_id, {"mmproj-other.gguf": b"of somebody"}, private=True)
    assert quick("--push", repo_id).code == 0
    there = hub.files(repo_id)
    assert there[name] == PROJECTOR.read_bytes() and there["seeing-Q8_0.gguf"] == Q8.read_bytes()
    read = parse_modelfile(there["Modelfile"].decode())
    assert (read["from"], read["beside"]) == ("./seeing-Q8_0.gguf", [f"./{name}"])
    card = there["README.md"].decode()
    assert f"`{name}` is what the model takes pictures with. Ollama and llama.cpp load it along" in card
    assert f"(`llama-mtmd-cli -hf {repo_id}:Q8_0` in a terminal)" in card and f"| {name} | 0 MB | comes with each |" in card
    result = quick("--no-vision", "--push", repo_id)
    assert result.code == 0 and f"removing what earlier pushes left there: {name}" in result.err
    assert name not in hub.files(repo_id) and "mmproj-other.gguf" in hub.files(repo_id)
    card = hub.files(repo_id)["README.md"].decode()
    assert "the files take text alone." in card and name not in card
    damaged = bytearray(PROJECTOR.read_bytes())
    assert quick("--vision").code == 0
    times = PROJECTOR.stat()
    damaged[-9] ^= 64
    PROJECTOR.write_bytes(damaged)
    os.utime(PROJECTOR, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = quick("--push", repo_id)
    assert result.code == 2 and f"ollama/{PROJECTOR.name} was changed" in result.err and name not in hub.files(repo_id)


# ---- Ollama ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("generation", ["0.33", "0.34.1"])
def test_the_model_in_ollama_sees(cli, quick, seeing, generation):
    with LoopbackOllama(generation) as server:
        result = quick("--host", server.url)
        assert result.code == 0, result.err
        layers = server.layers["seeing-tuned:latest"]
        assert server.blob(layers["model"]).read_bytes() == Q8.read_bytes()
        assert server.blob(layers["projector"]).read_bytes() == PROJECTOR.read_bytes()
        assert result.json["picture"] == {"read": True, "answer": "This is the loopback server's answer."}
        assert "seeing-tuned says about it: \"This is the loopback server's answer.\"" in result.err
        assert not [text for text in result.json["warnings"] if "lays out a prompt" not in text]
        server.requests.clear()
        assert quick("--host", server.url, "--no-vision").json["picture"] is None
        assert server.layers["seeing-tuned:latest"].keys() == {"model"}
        assert not any(turn.get("images") for request in server.requests for turn in request.body.get("messages", ()))


def test_an_older_ollama_gets_the_model_without(quick, seeing):
    with LoopbackOllama("0.24", ["no-split-vision"]) as server:
        result = quick("--host", server.url)
        assert server.layers["seeing-tuned:latest"].keys() == {"model"}
    assert result.code == 0 and result.json["created"] and result.json["answer"]["answer"]
    assert result.json["picture"]["read"] is False and "unable to load model" in result.json["picture"]["error"]
    [warning] = [text for text in result.json["warnings"] if "mmproj" in text]
    assert warning.startswith(f"Ollama 0.24.0 cannot load seeing-tuned with {PROJECTOR.name} (unable to load model: ")
    assert "it answers text, and reads no pictures. Update Ollama and run the same command again; --no-vision" in warning


def test_a_server_that_fails_at_pictures_alone_keeps_the_model(quick, seeing, monkeypatch):
    with LoopbackOllama(faults=["picture-error"]) as server:
        result = quick("--host", server.url)
        assert server.layers["seeing-tuned:latest"].keys() == {"model", "projector"}
    assert result.code == 0 and result.json["picture"] == {"read": False, "error": "model runner has unexpectedly stopped"}
    assert any("answers text in Ollama 0.34.1, and no picture: model runner" in text for text in result.json["warnings"])
    monkeypatch.setattr(served_sight, "PATIENCE", 2.0)
    with LoopbackOllama(faults=["picture-slow"]) as server:
        result = quick("--host", server.url)
    assert result.code == 0 and result.json["answer"]["answer"] and "did not answer in time" in result.json["picture"]["error"]
    with LoopbackOllama(faults=["chat-error"]) as server:  # which is not for the projector
        failed = quick("--host", server.url)
    assert failed.code == 1 and "cannot load" not in failed.err
