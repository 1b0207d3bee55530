"""``merge`` and ``export-ollama`` of runs that learned from pictures: what measures the text model leaves them out."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml

from gemma_tune.answers.sight import SEEN
from gemma_tune.base.errors import UserError
from gemma_tune.encoding.tokens import open_tokens
from gemma_tune.export import calibration, looked_at
from gemma_tune.export.sight import Sight
from gemma_tune.gguf.engine import Engine, EngineRefused
from support.command import MANIFEST_SCHEMA, copied_run
from support.ollama import LoopbackOllama
from support.seeing import show_pictures, trained_seer
from support.uploads import _validated

RUN = Path("runs/seer")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory) -> Path:
    return trained_seer("gemma3", tmp_path_factory.mktemp("exported"))


@pytest.fixture
def model(trained_once) -> Path:
    return trained_once.parents[1] / "models" / "seer"


@pytest.fixture
def run(trained_once, tmp_path, model) -> Path:
    return copied_run(trained_once, tmp_path, model)


@pytest.fixture
def calibrated(monkeypatch) -> list:
    """The rows that rounding is calibrated by."""
    found, rows_of = [], calibration.calibration_rows

    def noted(*args):
        rows, said = rows_of(*args)
        found.extend(rows)
        return rows, said

    monkeypatch.setattr(calibration, "calibration_rows", noted)
    return found


@pytest.mark.parametrize(("which", "left"), [(lambda n: n % 3, 2), (lambda n: 1, 0)], ids=["some", "all"])
def test_what_measures_text_leaves_pictures_out(cli, run, model, calibrated, which, left):
    show_pictures(run, model, which)
    merged = cli("merge", "--json")
    assert merged.code == 0, merged.err
    built_in = "compared on questions of the built-in example: those of the run have pictures"
    assert (built_in in " ".join(merged.err.split())) == (not left)
    assert merged.json["summary"]["check_prompts"] == 4 and merged.json["summary"]["check_answer_tokens"] > 0

    card = (run / "seer_lora_merged/README.md").read_text()
    assert f"| Data | 6 conversations, 6 more held out; {6 - left} of the former with pictures; " in card
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "image-text-to-text"
    assert "It was tuned on pictures as well" in card and _validated(card).status == 200

    with LoopbackOllama() as server:
        result = cli("export-ollama", "--quant", "q4_0,q8_0", "--host", server.url, "--allow-difference", "--json")
    assert result.code == 0, result.err
    said = " ".join(result.err.split())
    assert "tokens of the training rows, without pictures, and " in said
    own = [[*row["input_ids"]] for row in open_tokens(run / "data/tokens/train.arrow")]
    soft = json.loads((model / "config.json").read_text())["image_token_index"]
    assert sum(row.count(soft) for row in own) == 4 * sum(map(which, range(6)))
    taken = [row.tolist() for row in calibrated if len(row) < 90]  # the others are general text
    assert not any(soft in row for row in taken)
    assert sorted([id for id in row if id not in (soft - 2, soft - 1, soft)] for row in own) == sorted(taken), "their texts are there"

    summary = result.json["summary"]
    reason = f"the loss of the number formats on validation rows: {6 - left} of 6 have pictures, and text alone is measured"
    assert reason in summary["unchecked"] and f"- {reason}" in (run / "ollama/report.md").read_text()
    assert all(("perplexity" in quant) == bool(left) and "general_perplexity" in quant for quant in summary["quants"].values())
    cases = [prompt["name"] for prompt in summary["parity"]["prompts"]]
    assert sum(name.startswith("held-out chat") for name in cases) == (4 if left else 0) and len(cases) > 4
    assert result.json["answer"]["answer"] and result.json["picture"]["read"]
    assert cli("status").code == 0 and cli("status", "--verify").code == 0


@pytest.fixture
def looked(cli, run, model):
    """What an export finds out by showing llama.cpp pictures."""
    show_pictures(run, model, lambda n: n == 2)
    assert cli("merge", "--no-check").code == 0

    def found() -> tuple[dict, str]:
        result = cli("export-ollama", "--quant", "f16", "--no-measure", "--no-create", "--force", "--json")
        assert result.code == 0, result.err
        manifest = json.loads((run / "manifest.json").read_text())
        jsonschema.validate(manifest, MANIFEST_SCHEMA)
        return manifest["stages"]["export-ollama"]["summary"], " ".join(result.err.split())

    return found


def test_an_answer_to_a_row_is_compared_with_the_merged_model_that_looks_itself(looked, monkeypatch):
    see = looked_at.see
    summary, said = looked()
    figures = summary["projector"]
    assert figures["row_same"] == figures["row_tokens"] > 0
    assert f"the first {figures['row_same']} of {figures['row_tokens']} tokens are the merged model's" in said
    report = (RUN / "ollama/report.md").read_text()
    assert f"has {figures['row_tokens']} tokens, of which the first {figures['row_same']} are those of the merged model" in report
    monkeypatch.setattr(looked_at, "see", lambda *args: {SEEN: -5 * see(*args)[SEEN]})
    figures = looked()[0]["projector"]
    assert figures["row_same"] < figures["row_tokens"], "it looks at the picture"


def test_why_a_row_was_not_asked_about(looked, monkeypatch):
    def raises(error: Exception):
        def refuses(*_, **__):
            raise error
        return refuses

    with monkeypatch.context() as refusing:
        refusing.setattr(Engine, "complete_seen", raises(EngineRefused("llama.cpp refuses it: too large")))
        summary, said = looked()
    reason = "pictures: answers to a row with some: llama.cpp refuses it: too large"
    assert reason in summary["unchecked"] and f"not checked: {reason}" in said
    assert "row_tokens" not in summary["projector"] and "pictures_apart" in summary["projector"]
    with monkeypatch.context() as refusing:
        refusing.setattr(looked_at, "load_model", raises(UserError("out of memory", "close other programs")))
        assert "pictures: answers to a row with some: out of memory" in looked()[0]["unchecked"]
    monkeypatch.setattr(looked_at, "place", lambda parameters: (None, "it takes too much"))
    assert "pictures: answers to a row with some: it takes too much" in looked()[0]["unchecked"]


@pytest.mark.parametrize(("verify", "unchecked", "asks"), [(None, "", True), (False, "", False), (None, "no memory", False)])
def test_a_row_is_asked_about_where_pictures_were_shown_just_now(monkeypatch, verify, unchecked, asks):
    """The figures can be those of an earlier export, whose file is the same."""
    looks = []
    monkeypatch.setattr(looked_at, "_question", lambda *_: looks.append("asked"))
    found = Sight(Path("mmproj"), None, {"engine": "llama.cpp", "pictures_apart": 0.5}, unchecked)
    session = SimpleNamespace(config=SimpleNamespace(verify=verify), run=SimpleNamespace(pictures=Path("pictures")))
    source = SimpleNamespace(chat=SimpleNamespace(eye=SimpleNamespace()))
    assert looked_at.asked_about_a_row(session, source, found, []) is found and bool(looks) == asks


def test_a_damaged_picture_costs_no_file(looked, run):
    for path in (run / "data/pictures").iterdir():
        path.write_bytes(path.read_bytes()[:2000])
    assert "row_tokens" not in looked()[0]["projector"] and (RUN / "ollama/seer-f16.gguf").is_file()


def test_nothing_of_it_is_said_of_rows_of_text(cli, run):
    merged = cli("merge", "--json")
    assert merged.code == 0 and "built-in example" not in merged.err
    card = (run / "seer_lora_merged/README.md").read_text()
    assert "picture" not in card and "pipeline_tag: text-generation" in card
    result = cli("export-ollama", "--quant", "q4_0", "--no-create", "--json")
    assert result.code == 0 and "of the training rows and " in " ".join(result.err.split())
    assert not any("have pictures" in text for text in result.json["summary"].get("unchecked", ()))
    assert "pictures_apart" in result.json["summary"]["projector"] and "row_tokens" not in result.json["summary"]["projector"]
