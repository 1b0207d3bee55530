"""The merged model's card: its header as the Hub wants it, what it tells, and what it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma_tune.base.listener import Listener
from gemma_tune.config.settings import resolve
from gemma_tune.config.stages import MergeConfig
from gemma_tune.merge.card import model_card
from gemma_tune.models import licence as licences
from gemma_tune.models.licence import LICENCE_FILES, base_licence, licence_note
from gemma_tune.models.source import BaseModel
from gemma_tune.run.directory import RunDir
from gemma_tune.run.manifest import Manifest, read_manifest
from gemma_tune.run.session import Session
from support.gguf import write
from support.uploads import _validated

COMMIT = "c" * 40
CHECKS = {"merged_tensors": 14, "check_prompts": 4, "check_same_answer": True, "check_same_tokens": 0.998,
          "check_divergence": 0.00012345, "check_max_logprob_difference": 0.0351, "check_dtype": "fp32"}
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"], "use_dora": False,
           "base_model_name_or_path": "/home/somebody/secret/model"}


def base(folder: Path, source: str = "hub", **more: Any) -> BaseModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}))
    model_id = more.pop("id", "google/tiny-gemma" if source == "hub" else "tiny-gemma")
    return BaseModel(model_id, "tiny-gemma", source, folder, COMMIT if source == "hub" else None, "f" * 64, {}, **more)


def session_of(run: RunDir, model: BaseModel, manifest: Manifest, adapter: Path) -> Session:
    return Session(run, model, resolve(MergeConfig, {}), Listener(), manifest, {"adapter": adapter})


def from_elsewhere(tmp_path: Path, model: BaseModel, **changes: Any) -> Session:
    """A merge of an adapter that came from elsewhere, in a run with no other stage."""
    adapter = tmp_path / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    run = RunDir(tmp_path / "run", "tiny-gemma")
    return session_of(run, model, Manifest(model.record(run.root)), adapter)


def parts(card: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The header's values, and the table's rows by name."""
    assert _validated(card).status == 200
    header, text = re.match(r"---\n(.*?)\n---\n(.*)", card, re.DOTALL).groups()
    rows = dict(re.fullmatch(r"\| (.+?) \| (.+) \|", line).groups() for line in text.splitlines()
                if line.startswith("| ") and line != "| | |")
    return yaml.safe_load(header), rows


def test_all_that_a_run_knows(trained, tiny, tmp_path):
    manifest = read_manifest(trained)
    run = RunDir(trained, "tiny-gemma")
    card = model_card(session_of(run, base(tmp_path / "base"), manifest, run.adapter), CHECKS)
    header, rows = parts(card)
    assert header == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "base_model": "google/tiny-gemma",
        "base_model_relation": "finetune", "tags": ["gemma-tune", "sft", "lora"]}
    figures = manifest.stages["train"]["summary"]
    assert rows["Base model"] == (f"[google/tiny-gemma](https://huggingface.co/google/tiny-gemma/tree/{COMMIT}), "
                                  f"commit `{COMMIT}`")
    assert rows["Adapter"].startswith("LoRA of rank 4, alpha 32, on `down_proj`, `gate_proj`, ")
    assert rows["Data"].startswith("11 conversations, 1 more held out; ")
    assert rows["Training"] == (f"supervised, on the assistant's turns: {figures['steps']} steps, 4 conversations each, "
                                "1 epoch, learning rate 0.001, cosine, warm-up 0.05, in fp32, seed 42")
    assert rows["Loss on held-out conversations"].startswith(
        f"{figures['eval_loss_before']:.3f} before training, {figures['eval_loss_after']:.3f} after")
    assert rows["Merge"] == (
        "14 tensors, in fp32, rounded once; compared with base and adapter on 4 prompts: greedy answers all the same, "
        "99.80% of the likeliest tokens the same, divergence 0.00012 nats per token, largest difference of a "
        "log-probability 0.035")
    assert "gemma-tune 0." in rows["Versions"] and "transformers 5." in rows["Versions"]
    assert 'name = "tiny-gemma_lora_merged"' in card and "gemma-tune export-ollama" in card


@pytest.mark.parametrize("method, kind, how, data", [
    ("dpo", "pairs", "preferences, by pairs of a better and a worse answer (DPO): ", "11 pairs of answers, 1 more held out"),
    ("kto", "judged", "preferences, by answers that are good or bad (KTO): ", "11 judged answers, 1 more held out"),
    ("sft", "pairs", "supervised, on the assistant's turns: ", "11 pairs of answers, 1 more held out")])
def test_what_was_learned_from_preferences(trained, tiny, tmp_path, method, kind, how, data):
    manifest, run = read_manifest(trained), RunDir(trained, "tiny-gemma")
    manifest.stages["prepare"]["summary"]["kind"] = kind
    train = manifest.stages["train"]
    train["config"]["method"] = {"value": method, "from": "method"}
    if method == "dpo":
        train["summary"]["eval_accuracy_after"] = 0.875
    header, rows = parts(model_card(session_of(run, base(tmp_path / "base"), manifest, run.adapter), CHECKS))
    assert header["tags"] == ["gemma-tune", method, "lora"]
    assert rows["Training"].startswith(how) and rows["Data"].startswith(data)
    assert ("4 pairs each" in rows["Training"]) == (method == "dpo") and ("4 answers each" in rows["Training"]) == (method == "kto")
    assert rows.get("Held-out pairs") == ("88% won by the chosen answer" if method == "dpo" else None)
    assert ("Loss on held-out conversations" in rows) == (method == "sft"), "another loss is not in nats per token"


@pytest.mark.parametrize(("start", "name"), [("../elsewhere/tiny-gemma_sft_adapter", "tiny-gemma_sft_adapter"), ("hf:a/b@c", "hf:a/b@c")])
def test_what_was_learned_before_is_not_kept_silent(trained, tmp_path, start, name):
    manifest, run = read_manifest(trained), RunDir(trained, "tiny-gemma")
    manifest.stages["train"]["config"]["from_adapter"] = {"value": start, "from": "flag"}
    card = model_card(session_of(run, base(tmp_path / "base"), manifest, run.adapter), CHECKS)
    _, rows = parts(card)
    assert rows["Began with"] == f"the adapter `{name}`; what it had learned is in this model, too" and "elsewhere" not in card
    manifest.stages["train"]["config"]["from_adapter"]["value"] = None
    assert "Began with" not in parts(model_card(session_of(run, base(tmp_path / "base"), manifest, run.adapter), CHECKS))[1]


def test_nothing_of_this_machine_or_of_the_data(trained, tiny, tmp_path):
    run = RunDir(trained, "tiny-gemma")
    for model in (base(tmp_path / "base"), base(tmp_path / "base", "local", origin=tmp_path / "base")):
        card = model_card(session_of(run, model, read_manifest(trained), run.adapter), CHECKS)
        assert str(tmp_path) not in card and str(tiny) not in card and str(Path.home()) not in card
        assert "The number is" not in card and "rows.jsonl" not in card


def test_data_that_was_prepared_again_is_not_what_was_learned(trained, tmp_path):
    manifest, run = read_manifest(trained), RunDir(trained, "tiny-gemma")
    manifest.stages["prepare"]["outputs"]["train_rows"]["sha256"] = "0" * 64
    _, rows = parts(model_card(session_of(run, base(tmp_path / "base"), manifest, run.adapter), CHECKS))
    assert "Data" not in rows and "Training" in rows


def test_an_adapter_from_elsewhere_is_not_said_to_be_of_the_run(trained, tmp_path):
    session = from_elsewhere(tmp_path, base(tmp_path / "base"))
    session = session_of(RunDir(trained, "tiny-gemma"), session.model, read_manifest(trained), session.inputs["adapter"])
    _, rows = parts(model_card(session, CHECKS))
    assert rows["Adapter"] == "LoRA of rank 8, alpha 16, on `q_proj`, `v_proj`"
    assert "elsewhere" in rows["Training"] and not {"Data", "Loss on held-out conversations"} & rows.keys()


def test_a_check_that_was_not_made_or_found_differences(tmp_path):
    session = from_elsewhere(tmp_path, base(tmp_path / "base"))
    _, rows = parts(model_card(session, {"merged_tensors": 1400, "check_skipped": "3.1 GB of memory are free"}))
    assert rows["Merge"] == "1,400 tensors, in fp32, rounded once; not compared with base and adapter"
    _, rows = parts(model_card(session, CHECKS | {"check_same_answer": False}))
    assert "greedy answers not all the same" in rows["Merge"]


def test_a_run_that_knows_nothing_else(tmp_path):
    card = model_card(from_elsewhere(tmp_path, base(tmp_path / "base", "gguf", id="tiny.gguf")), {})
    header, rows = parts(card)
    assert "base_model" not in header and "license" not in header
    assert rows["Base model"] == f"`tiny.gguf`, a GGUF file, dequantised, fingerprint `{'f' * 64}`"
    assert rows["Merge"] == "in fp32, rounded once; not compared with base and adapter"
    assert "was not stated" in card and "/home/somebody" not in card


@pytest.mark.parametrize(("changes", "text"), [
    ({"use_dora": True, "use_rslora": True}, "rank-stabilised DoRA of rank 8, alpha 16, on"),
    ({"rank_pattern": {"q_proj": 4}, "lora_dropout": 0.1}, "alpha 16, others for some layers, dropout 0.1, on"),
    ({"target_modules": "all-linear"}, "LoRA of rank 8, alpha 16"), ({"lora_alpha": None}, "LoRA of rank 8, alpha 8, on"),
    ({"target_modules": ["a|b`c\n"], "modules_to_save": ["embed_tokens"]}, "on `abc`, whole `embed_tokens`")])
def test_kinds_of_adapters(tmp_path, changes, text):
    header, rows = parts(model_card(from_elsewhere(tmp_path, base(tmp_path / "base"), **changes), {}))
    assert text in rows["Adapter"] and ("dora" in header["tags"]) == ("DoRA" in text)


def test_an_adapter_that_cannot_be_read(tmp_path):
    session = from_elsewhere(tmp_path, base(tmp_path / "base"))
    (session.inputs["adapter"] / "adapter_config.json").write_text("{")
    assert "Adapter" not in parts(model_card(session, {}))[1]


# ---- the licence -----------------------------------------------------------------------------------------------------

CARDS = {
    "gemma": ("license: gemma\n", {"license": "gemma"}),
    "a link": ("license: apache-2.0\nlicense_link: https://ai.google.dev/gemma/docs/gemma_4_license\n",
               {"license": "apache-2.0", "license_link": "https://ai.google.dev/gemma/docs/gemma_4_license"}),
    "its own": ("license: other\nlicense_name: Qwen-Research\nlicense_link: LICENSE\n",
                {"license": "other", "license_name": "qwen-research",
                 "license_link": f"https://huggingface.co/google/tiny-gemma/blob/{COMMIT}/LICENSE"}),
    "dangerous": ("license: other\nlicense_name: 'a\\nb'\nlicense_link: ../../etc/passwd\n", {"license": "other"}),
    "no text": ("license: [gemma, mit]\n", {}),
    "nothing": ("tags: [x]\n", {}),
    "broken": ("license: [\n", {}),
    "a list": ("- license\n", {}),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_licence_of_the_base_models_card(tmp_path, case):
    text, expected = CARDS[case]
    model = base(tmp_path / "base")
    (model.path / "README.md").write_text(f"---\n{text}---\n# Gemma\nlicense: mit\n")
    assert base_licence(model) == expected
    header, _ = parts(model_card(from_elsewhere(tmp_path, model), {}))
    assert {name: value for name, value in header.items() if name.startswith("license")} == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("Gemma Terms of Use\n\nLast modified", {"license": "gemma"}),
    ("\n   Apache License\n   Version 2.0, January 2004", {"license": "apache-2.0"}),
    ("MIT License\n\nCopyright", {"license": "mit"}),
    ("Community licence", {"license": "other", "license_name": "base-model-license", "license_link": "LICENSE.txt"})])
def test_the_licence_of_the_text(tmp_path, text, expected):
    model = base(tmp_path / "base", "local")
    (model.path / "LICENSE.txt").write_text(text)
    (model.path / "README.md").write_text("# no header\n")
    assert base_licence(model) == expected


@pytest.mark.parametrize("name", ["LICENSE", "LICENCE", "License.md", "license.txt", "licence"])
def test_a_copied_licence_is_read_and_linked_where_it_lies(tmp_path, name):
    model = base(tmp_path / "base")
    (model.path / "LICENSES").mkdir()
    (model.path / name).write_text("Terms")
    assert base_licence(model) == {"license": "other", "license_name": "base-model-license", "license_link": name}
    (model.path / "README.md").write_text(f"---\nlicense: other\nlicense_name: x\nlicense_link: {name}\n---\n")
    assert base_licence(model)["license_link"] == name
    (model.path / "README.md").unlink()
    (model.path / name).write_text("MIT License")
    assert base_licence(model) == {"license": "mit"}
    assert name in {path.name for pattern in LICENCE_FILES for path in model.path.glob(pattern)}, "it goes along"


@pytest.mark.parametrize("source", ["gguf", "demo"])
def test_the_licence_of_a_gguf_file(tmp_path, monkeypatch, source):
    from gguf import GGUFWriter

    monkeypatch.setattr(licences, "cache_dir", lambda: tmp_path / "cache")
    path = tmp_path / "cache" / "demo" / "tiny.gguf"
    path.parent.mkdir(parents=True)
    model = base(tmp_path / "base", source, origin=path if source == "gguf" else None)
    assert base_licence(model) == {}
    writer = GGUFWriter(path, "gemma3")
    writer.add_license("gemma")
    writer.add_license_link("https://ai.google.dev/gemma/terms")
    write(writer)
    assert base_licence(model) == {"license": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
    path.write_bytes(b"GGUF")
    assert base_licence(model) == {}


def test_what_is_said_about_a_licence():
    assert "https://ai.google.dev/gemma/terms" in licence_note({"license": "gemma"})
    assert "[qwen](LICENSE)" in licence_note({"license": "other", "license_name": "qwen", "license_link": "LICENSE"})
    assert "base model: apache-2.0." in licence_note({"license": "apache-2.0"})
