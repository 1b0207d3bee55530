"""``eval`` on rows with pictures: the losses are those of the model that looks at them itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from gemma_tune.answers.generation import BROKEN
from gemma_tune.answers.sight import _TAKEN
from gemma_tune.encoding.eye import pictures_of
from gemma_tune.evaluate import sight
from gemma_tune.lora.load import add_adapter
from support.command import copied_run, write_rows
from support.seeing import Looking, format_that_sees, show_pictures, trained_seer

FP32 = ("--dtype", "fp32", "--max-new-tokens", 3)
FAMILIES = ("gemma3", "qwen3.5")


@pytest.fixture(scope="session")
def trained_seers(tmp_path_factory):
    """Runs up to the adapter, with text alone, by family."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = trained_seer(name, tmp_path_factory.mktemp("evaluated"))
        return made[name]

    return of


@pytest.fixture
def seer(trained_seers, tmp_path):
    """A copy of such a run, and its model; copied to where the test is."""
    def of(name: str) -> tuple[Path, Path]:
        once = trained_seers(name)
        model = once.parents[1] / "models" / "seer"
        return copied_run(once, tmp_path, model), model

    return of


def own_losses(model: Path, run: Path, found: list[dict]) -> list[float]:
    """Nats per learned token of base and tuned model, as transformers' own model has them of the pictures themselves."""
    chat = format_that_sees(model, run)
    base = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
    totals, count = [0.0, 0.0], 0
    tuned = add_adapter(base, run / "seer_lora_adapter")
    for row in found:
        [sequence] = chat.encode(row["messages"])
        ids, labels = torch.tensor(sequence.ids)[None].long(), torch.tensor(sequence.labels)[None]
        shown = [chat.eye.inputs(name) for name, _ in sequence.pictures]
        inputs = {key: torch.cat([one[key] for one in shown]) for key in _TAKEN if shown and key in shown[0]}
        marks = {chat.eye.marks: (ids == chat.eye.soft_id).long()} if shown else {}
        with torch.no_grad():
            for n, how in enumerate((tuned.disable_adapter, torch.no_grad)):
                with how():
                    logits = tuned(input_ids=ids, **inputs, **marks).logits
                totals[n] += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count += int((labels[0, 1:] != -100).sum())
    return [total / count for total in totals]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_model_that_looks_itself(cli, seer, family):
    run, model = seer(family)
    rows = show_pictures(run, model, lambda n: n % 3)["valid"]
    result = cli("eval", "--json", "--dtype", "fp32", "--max-new-tokens", 12)
    assert result.code == 0, result.err
    found, looking = result.json["summary"]["answers"], Looking(model, run)
    assert [answer["prompt"] for answer in found] == [row["messages"][:-1] for row in rows]
    for answer in found:
        expected = looking.answers(answer["prompt"], 12)
        assert [answer[side].rstrip(BROKEN) for side in ("base", "tuned")] == expected
    assert any(answer["base"] != answer["tuned"] for answer in found)
    shown = [answer for answer in found if pictures_of(answer["prompt"])]
    others = [[{key: value for key, value in turn.items() if key != "pictures"} | {"pictures": other["prompt"][0]["pictures"]}
               for turn in answer["prompt"]] for answer, other in zip(shown, [*shown[1:], shown[0]])]
    assert any(looking.answers(other, 12)[1] != answer["tuned"].rstrip(BROKEN) for answer, other in zip(shown, others)), "the picture matters"
    report, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    for answer in shown:
        names = pictures_of(answer["prompt"])
        said = "".join(f"> ![{name}](data/pictures/{name})\n> \n" for name in names)
        assert f"*user*\n\n{said}> {answer['prompt'][0]['content']}\n" in report and (run / "data" / "pictures" / names[0]).is_file()
        assert ", ".join(f"{name[:8]}….png" for name in names) in page
    assert "no question to ask" not in result.err and "not asked" not in result.err


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_model_that_looks_itself(cli, seer, family):
    run, model = seer(family)
    before = cli("eval", "--json", *FP32).json["summary"]["measures"]["loss"]
    shown = show_pictures(run, model, lambda n: n % 3)
    result = cli("eval", "--json", *FP32)
    assert result.code == 0, result.err
    measured = result.json["summary"]["measures"]["loss"]
    expected = own_losses(model, run, shown["valid"])
    assert np.allclose([measured["base"][0], measured["tuned"][0]], expected, rtol=1e-4)
    assert abs(expected[1] - expected[0]) > 0.1 and abs(measured["base"][0] - before["base"][0]) > 1e-3, "both matter"
    assert measured["rows"] == result.json["summary"]["rows"] == 6


def test_pictures_are_looked_at_once(cli, seer, monkeypatch):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    loaded, load, load_towers = [], sight.load_model, sight.load_towers
    monkeypatch.setattr(sight, "load_model", lambda *args, **more: loaded.append(more.get("sight")) or load(*args, **more))
    monkeypatch.setattr(sight, "load_towers", lambda *args: loaded.append("towers") or load_towers(*args))
    first = cli("eval", "--json", *FP32)
    assert first.code == 0, first.err
    again = cli("eval", "--json", "--force", *FP32)
    assert loaded == ["towers", "features", "features"]
    assert first.json["summary"] == again.json["summary"]
    assert first.json["summary"]["questions"] == len(first.json["summary"]["answers"]) == 6
    assert len([*(run / "seen").rglob("*.safetensors")]) == 6
    assert "loss" in (run / "report.md").read_text() and (run / "report.html").is_file()
    assert cli("status").code == 0 and cli("eval", *FP32, "--json").json["status"] == "up-to-date"


def test_a_picture_that_is_gone(cli, seer):
    run, model = seer("gemma3")
    row = show_pictures(run, model, lambda n: 1)["valid"][0]
    (run / "data" / row["messages"][0]["pictures"][0]["file"]).unlink()
    result = cli("eval", *FP32)
    assert result.code == 2 and "a picture of the validation rows cannot be read" in result.err
    assert Path(row["messages"][0]["pictures"][0]["file"]).name[:20] in "".join(result.err.split())
    assert "prepare again" in result.err and "Traceback" not in result.err


def test_what_was_seen_that_is_damaged(cli, seer):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    assert cli("eval", *FP32).code == 0
    for path in (run / "seen").rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    result = cli("eval", "--force", *FP32)
    assert result.code == 2 and "what was seen in pictures cannot be read from" in result.err, result.err
    assert "seer/seen, and repeat the command: they are looked at again" in " ".join(result.err.split())
    shutil.rmtree(run / "seen")
    assert cli("eval", "--force", *FP32).code == 0


def test_a_picture_whose_size_alone_can_be_read(cli, seer):
    run, model = seer("gemma3")
    show_pictures(run, model, lambda n: 1)
    for path in (run / "data" / "pictures").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    result = cli("eval", *FP32)
    assert result.code == 2 and "a picture of the validation rows cannot be read" in result.err, result.err


def test_what_is_predicted_has_its_pictures_with_a_head_that_does_more(seer, monkeypatch, cli):
    """Where the logits are not those of decoder and head alone, each row goes through the whole model."""
    from gemma_tune.measure import likelihood

    run, model = seer("gemma3")
    shown = show_pictures(run, model, lambda n: 1)
    monkeypatch.setattr(likelihood, "_head_is_all", lambda *_: False)
    measured = cli("eval", "--json", *FP32).json["summary"]["measures"]["loss"]
    assert np.allclose([measured["base"][0], measured["tuned"][0]], own_losses(model, run, shown["valid"]), rtol=1e-4)


def test_a_question_is_shown_its_picture_where_its_answer_is_too_long_to_be_predicted(cli, seer):
    run, model = seer("gemma3")
    path = run / "data" / "valid.jsonl"
    first, *others = [json.loads(line) for line in path.read_text().splitlines()]
    first["messages"][-1]["content"] = "And so on. " * 1000
    write_rows(path, [first, *others])
    row = show_pictures(run, model, lambda n: n == 0)["valid"][0]
    result = cli("eval", "--json", "--dtype", "fp32", "--max-new-tokens", 12)
    assert result.code == 0, result.err
    first = result.json["summary"]["answers"][0]
    assert first["prompt"] == row["messages"][:-1] and result.json["summary"]["rows"] == 5
    assert [first[side].rstrip(BROKEN) for side in ("base", "tuned")] == Looking(model, run).answers(first["prompt"], 12)
