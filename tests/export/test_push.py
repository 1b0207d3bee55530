"""``export-ollama --push`` against a loopback Hub: what others get who run it, what stays there, refusals, going on."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jsonschema import validate

from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED
from gemma_tune.export.card import Listed, card_of
from gemma_tune.export.push import name_there, push_export
from gemma_tune.export.target import Target
from gemma_tune.ollama.template import OllamaChat
from gemma_tune.run.stage import StageReport
from support.command import MANIFEST_SCHEMA, copied_run
from support.listener import Said
from support.modelfile import parse_modelfile
from support.ollama import LoopbackOllama
from support.uploads import TOKEN, _validated

ID = "tester/tiny-GGUF"
Q8, Q4, F16 = (f"tiny-gemma-{quant}.gguf" for quant in ("Q8_0", "Q4_0", "F16"))
BESIDE = {"template", "params", "Modelfile", "README.md"}


def of_git(hub, repo_id: str = ID) -> dict[str, bytes]:
    return {name: content for name, content in hub.files(repo_id).items() if name != ".gitattributes"}


def header(card: bytes) -> dict:
    assert _validated(card.decode()).status == 200
    return yaml.safe_load(re.match(rb"---\n(.*?)\n---\n", card, re.DOTALL)[1])


# ---- what arrives ----------------------------------------------------------------------------------------------------

def test_who_runs_it_from_the_hub_gets_what_the_modelfile_says(export, merged, hub, visit):
    result = export("--quant", "q8_0,q4_0", "--system", "Be brief. 简短。", "--parameter", "stop=END",
                    "--parameter", "temperature=0.3", "--push", ID, "--json")
    assert result.code == 0, result.err
    there = of_git(hub)
    assert there.keys() == BESIDE | {"system", Q8, Q4} and hub.is_private(ID)
    for quant, name in (("q8_0", Q8), ("q4_0", Q4)):
        assert there[name] == (merged / "ollama" / f"tiny-gemma-{quant}.gguf").read_bytes()
    said = parse_modelfile((merged / "ollama" / "Modelfile").read_text())
    assert there["template"].decode() == said["template"] and "<start_of_turn>user" in said["template"]
    assert there["system"].decode() == said["system"] == "Be brief. 简短。"
    assert json.loads(there["params"]) == said["parameters"] and said["parameters"]["stop"] == ["<end_of_turn>", "END"]
    assert parse_modelfile(there["Modelfile"].decode()) == {**said, "from": f"./{Q8}"}
    assert result.json["pushed"].startswith(f"{hub.url}/{ID}/commit/")
    assert f"published: {result.json['pushed']}" in result.err.splitlines(), "whole, to be opened"
    assert f"for the Hub: Modelfile, params, system, template, {Q4}, {Q8}, and a model card" in " ".join(result.err.split())
    assert "the system prompt is published, too: 'Be brief. 简短。'" in result.err and "which is private" in result.err


def test_the_card_tells_how_to_run_it_what_formats_lose_and_how_it_was_made(cli, merged, hub, visit):
    result = cli("export-ollama", "--quant", "q8_0,q4_0", "--no-verify", "--push", ID, "--json")
    assert result.code == 0, result.err
    card = of_git(hub)["README.md"]
    assert header(card)["tags"] == ["gguf", "gemma-tune", "sft", "lora"] and "library_name" not in header(card)
    text, best = card.decode(), result.json["summary"]["recommended"].upper()
    assert f"ollama run hf.co/{ID}:{best}\nllama-cli -hf {ID}:{best}\n" in text
    for quant, figures in result.json["summary"]["quants"].items():
        assert re.search(rf"\| {quant} \| .* \| {figures['perplexity']:.3f} \|", text)
        assert f"| tiny-gemma-{quant.upper()}.gguf | " in text
    assert "| Data | 11 conversations, 1 more held out; " in text and "| Adapter | LoRA of rank 4" in text
    assert text.rstrip().endswith("It was not stated where this model was made.")


def test_nothing_of_the_data_and_no_token_leaves(export, merged, hub, visit):
    result = export("--quant", "q8_0", "--push", ID)
    everything = b"".join(of_git(hub).values())
    assert b"The number is" not in everything and b"Say number" not in everything and b"rows.jsonl" not in everything
    manifest = (merged / "manifest.json").read_text()
    assert TOKEN not in manifest + result.err + result.out and TOKEN.encode() not in everything
    validate(json.loads(manifest), MANIFEST_SCHEMA)
    assert json.loads(manifest)["stages"]["export-ollama"]["config"]["push"] == {"value": ID, "from": "flag"}
    assert "pushing" not in export("--quant", "q8_0").err, "a push is for once"


def test_a_second_push_sends_nothing_again(export, merged, hub, visit):
    first = export("--quant", "q8_0", "--push", ID, "--json")
    hub.requests.clear()
    again = export("--push", ID, "--json")
    assert again.json["status"] == "up-to-date" and again.json["pushed"] == first.json["pushed"]
    assert not hub.paths("PUT") and not hub.paths("POST", "/commit/")


def test_the_licence_goes_along(cli, trained_once, tiny, export, hub, visit, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "models" / tiny.name))
    (base / "LICENSE").write_text("MIT License")
    copied_run(trained_once, tmp_path, base)
    assert cli("merge", "--no-check").code == 0
    assert export("--push", ID, "--public").code == 0
    there = of_git(hub)
    assert there["LICENSE"] == b"MIT License" and header(there["README.md"])["license"] == "mit" and not hub.is_private(ID)
    assert parse_modelfile(there["Modelfile"].decode())["license"] == ["MIT License"] and "NOTICE" not in there


@pytest.mark.parametrize("own", [None, "NOTICE.txt"])
def test_gemmas_terms_want_a_notice_beside_the_files(cli, trained_once, tiny, export, hub, visit, tmp_path, own):
    base = Path(shutil.copytree(tiny, tmp_path / "models" / tiny.name))
    (base / "README.md").write_text("---\nlicense: gemma\n---\n")
    if own:
        (base / own).write_text("Somebody's notice")
    copied_run(trained_once, tmp_path, base)
    assert cli("merge", "--no-check", "--push", "tester/tiny").code == 0 and export("--push", ID).code == 0
    for repo_id in ("tester/tiny", ID):
        there = of_git(hub, repo_id)
        assert header(there["README.md"])["license"] == "gemma"
        assert {name: text for name, text in there.items() if name.startswith("NOTICE")} == {own or "NOTICE": (
            b"Somebody's notice" if own else
            b"Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms\n")}


# ---- what is there already -------------------------------------------------------------------------------------------

def test_formats_of_this_model_stay_and_those_of_another_leave(export, merged, hub, visit):
    export("--quant", "f16,q8_0", "--system", "Count.", "--push", ID)
    export("--quant", "q4_0", "--system", "Count.", "--push", ID)
    there = of_git(hub)
    assert there.keys() == BESIDE | {"system", F16, Q8, Q4}
    assert f"| {Q8} | " in there["README.md"].decode() and f"ollama run hf.co/{ID}:Q4_0" in there["README.md"].decode()
    result = export("--quant", "q4_0", "--system", "", "--push", ID)  # Ollama is told other things of the one file now
    assert of_git(hub).keys() == BESIDE | {Q4}
    assert f"removing what earlier pushes left there: system, {F16}, {Q8}" in result.err


def test_a_file_of_another_run_leaves_though_this_one_has_such_a_file(export, merged, hub, visit):
    assert export("--quant", "f16").code == 0
    hub.create(ID, {F16: b"GGUF of another run"}, private=True)
    assert export("--quant", "q8_0", "--push", ID).code == 0
    assert of_git(hub).keys() == BESIDE | {Q8} and F16 not in of_git(hub)["README.md"].decode()


def test_a_merged_model_does_not_go_to_the_repository_of_the_gguf_files(cli, export, merged, hub, visit):
    assert export("--quant", "q8_0", "--push", ID).code == 0
    before = dict(hub.files(ID))
    result = cli("merge", "--no-check", "--push", ID)
    assert result.code == BAD_INPUT and "holds GGUF files with what Ollama is told of them" in result.err
    assert hub.files(ID) == before


def test_other_files_of_a_repository_stay(export, merged, hub, visit):
    others = {"photo.png": b"png", "mmproj-F16.gguf": b"eyes", "old/model-Q8_0.gguf": b"theirs"}
    hub.create(ID, {**others, "README.md": b"old", "template": b"old"}, private=True)
    assert export("--quant", "q8_0", "--push", ID).code == 0
    assert hub.files(ID).keys() == BESIDE | {Q8, *others} and others.items() <= hub.files(ID).items()


@pytest.mark.parametrize(("files", "said"), [
    ({"model.safetensors": b"w", "README.md": b"card"}, "holds a checkpoint or an adapter"),
    ({"adapter_config.json": b"{}"}, "holds a checkpoint or an adapter"),
    ({"other-Q8_0.gguf": b"GGUF"}, "holds GGUF files of another model (other-Q8_0.gguf)"),
    ({"tiny-gemma-7B.gguf": b"GGUF"}, "another model (tiny-gemma-7B.gguf)"),
    (None, "everybody can see it")])
def test_repositories_that_are_no_place_for_it(export, merged, hub, visit, files, said):
    hub.create(ID, files or {}, private=files is not None)
    before = dict(hub.files(ID))
    result = export("--push", ID)
    assert result.code == BAD_INPUT and said in result.err and "Hint:" in result.err and "push to another name" in result.err
    assert hub.files(ID) == before and not (merged / "ollama").exists(), "known before any work"


# ---- may it be pushed? -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("rights", "repo_id", "code", "said"), [
    ({"role": "read"}, ID, BAD_INPUT, "of type Read"),
    ({"user": "me"}, ID, BAD_INPUT, "is no member of tester"),
    ({"token": None}, ID, BAD_INPUT, "no Hugging Face token is set"),
    ({}, "tiny", BAD_INPUT, "cannot be a repository on the Hub"),
    ({"down": True}, ID, WORK_FAILED, "answered 503")])
def test_what_cannot_be_pushed_is_known_before_any_work(export, merged, hub, visit, rights, repo_id, code, said):
    if rights.pop("down", False):
        hub.fail("whoami", 503)
    visit(**rights)
    result = export("--push", repo_id)
    assert result.code == code and said in " ".join(result.err.split()) and "Hint:" in result.err
    assert "Traceback" not in result.err and TOKEN not in result.err
    assert not (merged / "ollama").exists() and not hub.paths("POST")


def test_a_settings_file_can_ask_for_it(export, merged, hub, visit, tmp_path):
    (tmp_path / "settings.yaml").write_text(f"export-ollama: {{push: {ID}, private: false, quant: q8_0}}\n")
    assert export("--config", tmp_path / "settings.yaml").code == 0
    assert Q8 in hub.files(ID) and not hub.is_private(ID)


@pytest.mark.parametrize(("settings", "said"), [
    (f"export-ollama: {{push: {ID}}}", "of type Read"), (f"merge: {{push: {ID}}}", "of type Read"),
    (f"merge: {{push: {ID}}}\nexport-ollama: {{push: {ID.upper()}}}", f"such as {ID}-GGUF")])
def test_run_asks_before_it_trains(cli, data, tiny, hub, visit, tmp_path, settings, said):
    visit(role="read")
    (tmp_path / "settings.yaml").write_text(settings)
    result = cli("run", data, "--model", tiny, "--config", tmp_path / "settings.yaml")
    assert result.code == BAD_INPUT and said in " ".join(result.err.split())
    assert not (tmp_path / "runs").exists()


def test_run_looks_for_another_models_files_before_it_trains(cli, data, tiny, hub, visit, tmp_path):
    hub.create(ID, {"other-Q8_0.gguf": b"GGUF"}, private=True)
    (tmp_path / "settings.yaml").write_text(f"export-ollama: {{push: {ID}}}")
    result = cli("run", data, "--model", tiny, "--config", tmp_path / "settings.yaml")
    assert result.code == BAD_INPUT and "GGUF files of another model (other-Q8_0.gguf)" in result.err
    assert not (tmp_path / "runs").exists()


def test_run_publishes_both(cli, data, tiny, hub, visit, tmp_path):
    (tmp_path / "settings.yaml").write_text(
        "train: {epochs: 1, rank: 4, dtype: fp32}\neval: {questions: 1, max_new_tokens: 4}\n"
        f"merge: {{push: tester/tiny, check: false}}\nexport-ollama: {{push: {ID}, quant: q8_0, verify: false, measure: false}}\n")
    result = cli("run", data, "--model", tiny, "--config", tmp_path / "settings.yaml", "--json")
    assert result.code == 0, result.err
    assert of_git(hub).keys() == BESIDE | {Q8} and "model.safetensors" in of_git(hub, "tester/tiny")
    for stage, repo_id in (("merge", "tester/tiny"), ("export-ollama", ID)):
        assert f"/{repo_id}/commit/" in result.json["stages"][stage]["summary"]["pushed"]


def test_what_ollama_refuses_is_not_published(export, merged, hub, visit):
    with LoopbackOllama(faults=["create-error"]) as server:
        assert export("--host", server.url, "--push", ID).code == WORK_FAILED
    assert not hub.paths("POST")


# ---- broken off ------------------------------------------------------------------------------------------------------

def test_a_broken_push_goes_on_where_it_stopped(export, merged, hub, visit):
    assert export("--quant", "q8_0,f16").code == 0
    files = {path: path.read_bytes() for path in (merged / "ollama").iterdir()}
    large = hashlib.sha256((merged / "ollama" / "tiny-gemma-f16.gguf").read_bytes()).hexdigest()
    hub.cut(large, after=50_000, method="PUT", times=None)
    result = export("--push", ID)
    assert result.code == WORK_FAILED and "run the same command again" in result.err
    assert not of_git(hub), "a commit names all files or none"
    assert {path: path.read_bytes() for path in (merged / "ollama").iterdir()} == files
    hub.heal()
    hub.requests.clear()
    assert export("--push", ID, "--json").json["status"] == "up-to-date"
    assert [path.rpartition("/")[2] for path in hub.paths("PUT")] == [large]
    assert of_git(hub).keys() == BESIDE | {Q8, F16}


def test_a_card_that_the_hub_does_not_take(export, merged, hub, visit, monkeypatch):
    monkeypatch.setattr("gemma_tune.export.push.card_of", lambda *_: "---\nlicense: mine\n---\n")
    result = export("--push", ID)
    assert "list of known licenses" in result.err and f"export-ollama --run runs/tiny-gemma --force --push {ID}" in result.err
    assert not hub.paths("PUT"), "known before anything large is sent"


# ---- names, and what a repository cannot say -------------------------------------------------------------------------

def test_names_by_which_ollama_and_llama_cpp_find_a_format():
    assert name_there("gemma-3-270m-it-Q4_K_M", "q8_0") == "gemma-3-270m-it-Q8_0.gguf", "of two formats llama.cpp takes any"
    assert [name_there("a.bf16", quant) for quant in ("f32", "bf16", "q4_k_m", "mxfp4", "250mb")] == [
        "a-F32.gguf", "a-BF16.gguf", "a-Q4_K_M.gguf", "a-MXFP4_MOE.gguf", "a-250MB.gguf"]
    files = [Listed("a-BF16.gguf", "BF16", 9), Listed("a-F16.gguf", "F16", 9), Listed("a-250MB.gguf", None, 9)]
    assert [file.for_ollama("x/y") for file in files] == ["hf.co/x/y:BF16", "hf.co/x/y:F16", "hf.co/x/y:a-250MB.gguf"]
    assert [file.for_llama("x/y", files) for file in files] == [
        "-hf x/y:BF16", "-hf x/y --hf-file a-F16.gguf", "-hf x/y --hf-file a-250MB.gguf"]


def test_a_renderer_of_ollamas_own_is_in_the_modelfile_alone(hub, visit, tmp_path):
    """Gemma 4 has no TEMPLATE, and a repository cannot name the renderer: people are told, here and there."""
    gguf = tmp_path / "ollama" / "m-q8_0.gguf"
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF")
    chat = OllamaChat(None, ("<turn|>",), renderer="gemma4", parser="gemma4")
    target, said = Target("m-tuned", chat, {"num_ctx": 64}, "Be brief. " * 9, None), Said()
    quants = {"q8_0": {"file": gguf.name, "bytes": 4, "ollama_name": "m-tuned"}}
    stage = StageReport("export-ollama", "done", tmp_path, {"quant": "q8_0", "quants": quants}, {}, 0.0)
    session = SimpleNamespace(run=SimpleNamespace(model_name="m", root=tmp_path, ollama=gguf.parent), listener=said,
                              manifest=None, config=SimpleNamespace(push=ID, private=True), model=SimpleNamespace(id="org/m"))
    push_export(session, stage, SimpleNamespace(target=target, merged=tmp_path))
    there = of_git(hub)
    assert there.keys() == {"params", "system", "Modelfile", "README.md", "m-Q8_0.gguf"}
    assert said.notes[0].endswith("Be brief.…'"), "more of it is published than is shown"
    assert parse_modelfile(there["Modelfile"].decode())["renderer"] == "gemma4"
    card = there["README.md"].decode()
    assert f"hf.co/{ID}" not in card and "ollama create m-tuned -f tiny-GGUF/Modelfile" in card
    assert f"| m-Q8_0.gguf | 0 MB | `-hf {ID}:Q8_0` |\n" in card
    assert "which a repository at the Hub cannot name" in said.warnings[0]


def test_a_base_at_the_hub_and_what_ollama_does_otherwise_are_in_the_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlibrary_name: transformers\nbase_model: google/x\nbase_model_relation: finetune\nlicense: gemma\ntags: [gemma-tune]\n"
        "---\n\n# x, fine-tuned\n\n## How it was made\n\nrow\n\n## Use\n\ncode\n\n## Licence\n\nTerms\n")
    target = Target("x", OllamaChat("{{ .Prompt }}", ()), {}, "Be brief.", None)
    card = card_of("a/b", tmp_path, [Listed("x-Q8_0.gguf", "Q8_0", 9)], "x-Q8_0.gguf",
                   {"quants": {"q8_0": {"bytes": 9}}, "different_in_ollama": ["tools are lost"]}, target)
    assert header(card.encode()) == {"base_model": "google/x", "base_model_relation": "finetune", "license": "gemma",
                                     "tags": ["gguf", "gemma-tune"]}
    assert "# x, fine-tuned, as GGUF" in card and "- tools are lost" in card
    assert "`system`, the system prompt" in card and "llama-cli takes a copy of it with `--system-prompt-file`" in card
    assert card.endswith("## How it was made\n\nrow\n\n## Licence\n\nTerms\n") and "\ncode\n" not in card


def test_files_of_a_model_that_learned_from_pictures_are_called_what_they_are(tmp_path):
    (tmp_path / "README.md").write_text("---\npipeline_tag: image-text-to-text\n---\n# m, fine-tuned\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3"}))
    target = Target("m", OllamaChat("{{ .Prompt }}", ()), {}, None, None)
    file = Listed("x-Q8_0.gguf", "Q8_0", 9)
    summary = {"quants": {"q8_0": {"bytes": 9}}, "projector": {"senses": ["vision"]}}
    for projector, task in ((None, "text-generation"), (Listed("mmproj-x-f16.gguf", None, 9), "image-text-to-text")):
        card = card_of("a/b", tmp_path, [file], file.name, summary, target, projector)
        assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == task


def test_a_system_prompt_of_the_chat_templates_own_is_in_the_card(tmp_path):
    """SmolLM2 and Qwen2.5 have one: it is pushed for Ollama, and llama.cpp finds it in the template."""
    target = Target("x", OllamaChat("{{ .Prompt }}", (), default_system="You are Smol."), {}, None, None)
    files, summary = [Listed("x-Q8_0.gguf", "Q8_0", 9)], {"quants": {"q8_0": {"bytes": 9}}}
    card = card_of("a/b", tmp_path, files, "x-Q8_0.gguf", summary, target)
    assert "`system`, the system prompt" in card and "--system-prompt-file" not in card
    assert "`system`" not in card_of("a/b", tmp_path, files, "x-Q8_0.gguf", summary, replace(target, system=""))
