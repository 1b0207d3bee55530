"""Number formats that lose what was learned are marked and not proposed; what earlier exports left is named."""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gemma_tune.base.errors import UserError
from gemma_tune.chat import choice
from gemma_tune.encoding.tokens import TokenWriter
from gemma_tune.export.files import _with_template
from gemma_tune.export.quant_loss import Loss
from gemma_tune.report.page import write_report
from gemma_tune.run.directory import RunDir
from gemma_tune.run.session import open_session
from support.command import MANIFEST_SCHEMA
from support.ollama import LoopbackOllama

OLLAMA = Path("runs/tiny-gemma/ollama")


@pytest.fixture
def general() -> dict[str, float]:
    """Perplexities on general text; nothing was measured on it where there are none."""
    return {}


@pytest.fixture
def measured(cli, merged, general, monkeypatch):
    """``export-ollama`` with formats of a known loss, after a training that gained ln 4 nats."""
    from gemma_tune.export import checks

    manifest = json.loads((merged / "manifest.json").read_text())
    manifest["stages"]["train"]["summary"] |= {"eval_loss_before": math.log(40), "eval_loss_after": math.log(10)}
    (merged / "manifest.json").write_text(json.dumps(manifest))
    perplexities = {"f16": 10.0, "q8_0": 10.1, "q4_k_m": 20.0, "q4_0": 92.2}
    monkeypatch.setattr(checks, "measure", lambda model, texts, files, *args, **more: {
        text: {quant: Loss(found[quant], 0.0, 1.0, 100) for quant in ("f16", *files)}
        for text, found in (("validation", perplexities), ("general", general)) if found})
    return functools.partial(cli, "export-ollama", "--no-verify")


@pytest.mark.parametrize(("perplexity", "gain", "said"), [
    (10.4, 0.01, None), (10.6, 0.01, "loses all that was learned"), (20.0, math.log(4), "loses 50% of what was learned"),
    (13.9, math.log(4), None), (14.3, math.log(4), "loses 26% of what was learned"), (9.0, math.log(4), None),
    (92.2, 1.0, "loses all that was learned"), (12.4, None, None), (92.2, None, "predicts 822% worse than f16")])
def test_what_a_format_loses(perplexity, gain, said):
    from gemma_tune.export.worth import what_it_loses

    assert what_it_loses(Loss(perplexity, 0.0, 1.0, 100), Loss(10.0, 0.0, 1.0, 100), gain) == said


@pytest.mark.parametrize(("validation", "general", "said"), [
    (10.1, 32.9, None), (10.1, 33.4, "predicts 11% worse than f16 on general text"), (10.1, 20.0, None),
    (20.0, 30.0, "loses 50% of what was learned"),
    (20.0, 60.0, "loses 50% of what was learned and predicts 100% worse than f16 on general text")])
def test_what_is_said_of_both_texts(validation, general, said):
    from gemma_tune.export.worth import said_against

    losses = {text: {quant: Loss(perplexity, 0.0, 1.0, 100) for quant, perplexity in found.items()}
              for text, found in (("validation", {"f16": 10.0, "q4_0": validation}),
                                  ("general", {"f16": 30.0, "q4_0": general}))}
    assert said_against("q4_0", losses, math.log(4)) == said
    assert said_against("q8_0", losses, math.log(4)) is None


def test_every_format_is_in_the_summary_and_a_bad_one_is_not_proposed(measured, cli):
    result = measured("--quant", "q4_k_m,q8_0,q4_0", "--json")
    assert result.code == 0, result.err
    quants = result.json["summary"]["quants"]
    assert {quant: figures.get("loses") for quant, figures in quants.items()} == {
        "q4_k_m": "loses 50% of what was learned", "q8_0": None, "q4_0": "loses all that was learned"}
    assert result.json["next"] == [f"ollama create tiny-gemma-tuned:q8_0 -f {OLLAMA}/Modelfile",
                                   "ollama run tiny-gemma-tuned:q8_0"]
    gguf = f"{OLLAMA}/tiny-gemma-q8_0.gguf"
    assert result.json["elsewhere"] == [f"llama-cli -m {gguf}", f"llama-server -m {gguf} --jinja",
                                        f"lms import --copy {gguf}"]
    assert result.json["file"] == gguf
    assert result.json["name"] == "tiny-gemma-tuned:q8_0"
    said = " ".join(result.err.split())  # however wide the terminal is
    for line in ("q8_0 0 MB, perplexity +1.0% against f16, tiny-gemma-tuned:q8_0",
                 "q4_k_m 0 MB, perplexity +100.0% against f16, loses 50% of what was learned, tiny-gemma-tuned:q4_k_m",
                 "! q4_0 loses all that was learned: choose a format of more bits"):
        assert line in said, result.err
    assert "**q4_0 loses all that was learned**" in (OLLAMA / "report.md").read_text()
    one = " ".join(measured("--quant", "q8_0").err.split())
    assert ("q4_k_m 0 MB, perplexity +100.0% against f16, loses 50% of what was learned, from an earlier export" in one
            ), "what it was measured to lose stays known"
    again = measured("--quant", "q4_k_m,q8_0,q4_0")
    again = measured("--quant", "q4_k_m,q8_0,q4_0")
    assert "up to date" in again.err and "loses 50% of what was learned" in " ".join(again.err.split())


def test_the_smallest_format_that_keeps_both_is_recommended(measured, merged, general):
    general |= {"f16": 30.0, "q8_0": 30.3, "q4_0": 45.0}
    result = measured("--quant", "q4_0,q8_0,f16", "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert summary["recommended"] == "q8_0" and summary["f16_general_perplexity"] == 30.0
    assert summary["quants"]["q8_0"] | {"general_perplexity": 30.3, "general_tokens": 100} == summary["quants"]["q8_0"]
    assert summary["quants"]["q4_0"]["loses"] == ("loses all that was learned and predicts 50% worse than f16 on general "
                                                  "text")
    said = " ".join(result.err.split())
    sentence = "is the smallest of these formats that keeps what was learned and what the model knew before"
    assert f"q8_0 (0 MB) {sentence}" in said
    assert "perplexity +1.0% against f16, +1.0% on general text, tiny-gemma-tuned:q8_0, recommended" in said
    report = (OLLAMA / "report.md").read_text()
    assert sentence in report and "On 100 tokens of the general text that comes with gemma-tune" in report
    assert "| q4_0 | 0 MB | 45.000 | +50.00% |" in report
    jsonschema.validate(json.loads((merged / "manifest.json").read_text()), MANIFEST_SCHEMA)


def test_a_format_that_loses_general_text_alone_is_not_recommended(measured, general):
    general |= {"f16": 30.0, "q8_0": 40.0}
    result = measured("--json")
    assert result.code == 0, result.err
    assert "number format q8_0: at 0M parameters" in " ".join(result.err.split())
    assert "recommended" not in result.json["summary"]
    said = " ".join(result.err.split())
    assert "! q8_0 predicts 33% worse than f16 on general text: choose a format of more bits" in said
    assert ("q8_0 does not keep what was learned and what the model knew before; the next to try is f16: gemma-tune "
            "export-ollama --run runs/tiny-gemma --quant f16") in said
    assert result.json["next"] == ["gemma-tune export-ollama --run runs/tiny-gemma --quant f16"]


def test_without_validation_rows_general_text_is_measured(cli, merged):
    (merged / "data" / "tokens" / "valid.arrow").unlink()
    result = cli("export-ollama", "--no-verify", "--quant", "q8_0", "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    assert "the loss of the number formats on validation rows: the run has no prepared data" in summary["unchecked"]
    found = summary["quants"]["q8_0"]
    assert "perplexity" not in found and found["general_tokens"] > 1000
    assert found["general_perplexity"] / summary["f16_general_perplexity"] == pytest.approx(1, abs=0.02)
    assert summary["recommended"] == "q8_0"
    assert "keeps what the model knew before (what was learned is not measured)" in " ".join(result.err.split())
    assert "number formats, on general text" in result.err


def test_a_model_beyond_the_range_of_f16_is_exported_without_that_yardstick(cli, tiny, data, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "large")
    [file] = base.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 1e5
    save_file(tensors, file, metadata={"format": "pt"})
    for args in (("prepare", data, "--model", base, "--valid", 3), ("train", "--max-steps", 1, "--samples", 0),
                 ("merge", "--no-check")):
        assert cli(*args).code == 0
    result = cli("export-ollama", "--no-verify", "--quant", "q8_0", "--json")
    assert result.code == 0, result.err
    [said] = result.json["summary"]["unchecked"]
    assert "in f16, with which they are compared, predicts nothing finite" in said and "nan" not in result.err
    assert "loses" not in result.json["summary"] and "recommended" not in result.json["summary"]
    assert cli("status", "--json").json["stages"]["export-ollama"]["state"] == "done"


def test_figures_that_could_not_be_read_again_are_not_recorded(cli, export, merged, monkeypatch):
    """A run stays as it was, whatever goes wrong."""
    from gemma_tune.export import checks

    assert export("--quant", "q8_0").code == 0
    before = (merged / "manifest.json").read_bytes(), sorted(path.name for path in OLLAMA.iterdir())
    monkeypatch.setattr(checks, "measure", lambda *args, **more: {
        "validation": {"f16": Loss(math.nan, 0.0, 1.0, 9), "q4_0": Loss(1.0, 0.0, 1.0, 9)}})
    result = cli("export-ollama", "--no-verify", "--quant", "q4_0")
    assert result.code == 1 and "could not be read again" in result.err and "f16_perplexity: nan is no number" in result.err
    assert ((merged / "manifest.json").read_bytes(), sorted(path.name for path in OLLAMA.iterdir())) == before
    assert cli("status", "--json").json["stages"]["export-ollama"]["state"] == "done"


@pytest.mark.parametrize(("tried", "next_one"), [
    (["q4_k_m"], "q5_k_m"), (["q5_k_m", "q4_0"], "q6_k"), (["q6_k"], "q8_0"), (["q4_0"], "q8_0"), (["q5_1"], "q8_0"),
    (["q8_0", "q4_k_m"], "f16"), (["bf16"], "f16"), (["q3_k_s", "q2_k"], "q3_k_m"), (["q3_k_m"], "q4_k_m"), (["250mb"], "q8_0"),
    (["mxfp4"], "q8_0"), (["q3_k_m", "mxfp4"], "q8_0"), (["mxfp4", "q4_k_m"], "q5_k_m")])
def test_the_next_format_to_try(tried, next_one):
    from gemma_tune.export.worth import finer_than

    assert finer_than(tried) == next_one


def test_if_all_are_bad_another_is_proposed(measured):
    result = measured("--quant", "q4_0", "--json")
    assert result.json["next"] == ["gemma-tune export-ollama --run runs/tiny-gemma --quant q8_0"]
    assert result.json["elsewhere"] == [] and result.json["file"] is None
    assert "what it costs" in result.err and "loses all that was learned" in result.err
    with LoopbackOllama() as server:
        created = measured("--quant", "q4_0", "--host", server.url, "--json")
    assert created.json["created"] is True
    assert created.json["next"] == ["gemma-tune export-ollama --run runs/tiny-gemma --quant q8_0"]


def test_the_end_of_run_has_every_format(measured, cli, merged, monkeypatch):
    from gemma_tune.cli import console
    from gemma_tune.run.stage import StageReport

    summary = measured("--quant", "q8_0,q4_k_m", "--json").json["summary"]
    train = {"steps": 1, "tokens_per_second": 1.0, "dtype": "fp32", "device": "cpu", "eval_loss_before": 0.6931, "eval_loss_after": 0.1}
    evaluated = {"answers": [], "questions": 0, "measures": {"loss": {"base": [4.2, 4, 5], "tuned": [2.9, 2, 3]}}}
    reports = {name: StageReport(name, "done", merged, figures, {}, 0.0) for name, figures in (
        ("train", train), ("eval", evaluated), ("merge", {"bytes": 5}), ("export-ollama", summary))}
    with console.screen.err.capture() as captured:
        console.run_summary(reports, ())
    for text in ("GGUF: q8_0, 0 MB", "GGUF: q4_k_m, 0 MB, perplexity +100.0% against f16, loses 50%"):
        assert text in captured.get()
    said = " ".join(captured.get().split())
    assert "loss per learned token, nats 4.2000 2.9000" in said and "0.6931" not in said, "of base and tuned model, both"


def test_files_of_an_earlier_export_are_named_and_stale_when_the_model_changed(cli, export, merged):
    from gemma_tune.cli.status import describe_run

    assert export("--quant", "q8_0,q4_0").code == 0
    one = export("--quant", "q8_0", "--json")
    assert one.code == 0, one.err
    earlier = one.json["summary"]["earlier"]
    assert list(earlier) == ["q4_0"] and earlier["q4_0"]["file"] == "tiny-gemma-q4_0.gguf"
    assert earlier["q4_0"]["stale"] is False
    assert "q4_0 0 MB, from an earlier export" in " ".join(one.err.split())
    status = cli("status", "--json")
    assert status.json["earlier_exports"]["q4_0"]["stale"] is False
    assert cli("merge", "--dtype", "fp32", "--no-check").code == 0
    later = export("--quant", "q8_0", "--json")
    assert later.json["summary"]["earlier"]["q4_0"]["stale"] is True
    said = " ".join(later.err.split())
    assert "tiny-gemma-q4_0.gguf is of an earlier merged model" in said
    assert "gemma-tune export-ollama --run runs/tiny-gemma --quant q8_0,q4_0" in said
    assert f"or remove it from {OLLAMA}" in said
    assert "from an earlier export, of an earlier merged model: stale" in said
    assert "tiny-gemma-q4_0.gguf (of an earlier merged model)" in (OLLAMA / "report.md").read_text()
    [row] = [row for row in describe_run("runs/tiny-gemma", None).rows if row[0] == "export-ollama"]
    assert row[3].endswith("; from an earlier export: ollama/tiny-gemma-q4_0.gguf (stale)")
    (OLLAMA / "tiny-gemma-q4_0.gguf").unlink()
    gone = export("--quant", "q8_0", "--json")
    assert gone.json["status"] == "up-to-date" and "earlier" not in gone.json["summary"]
    assert "earlier merged model" not in gone.err


def test_a_good_file_of_an_earlier_export_stays_the_recommended_one(measured, cli, merged, monkeypatch):
    monkeypatch.setattr(choice, "find_engine", lambda: "xllamacpp 1")

    def answering(**settings) -> str:
        return choice.exported(open_session("chat", merged, **settings)).name

    first = measured("--quant", "q8_0", "--json").json["summary"]
    later = measured("--quant", "q4_0,f16", "--json")
    assert later.code == 0, later.err
    summary, said = later.json["summary"], " ".join(later.err.split())
    assert summary["earlier"]["q8_0"]["stale"] is False and summary["recommended"] == "q8_0"
    assert "q8_0 (0 MB) from an earlier export is the smallest of these formats that keeps" in said
    assert "from an earlier export, recommended" in said
    assert summary["quant"] == "f16" and summary["gguf_bytes"] == summary["quants"]["f16"]["bytes"], "q4_0 loses too much"
    assert "loses" not in summary and later.json["artifacts"]["gguf"].endswith("-f16.gguf")
    assert (OLLAMA / "Modelfile").read_text() == (OLLAMA / "Modelfile-f16").read_text()
    jsonschema.validate(json.loads((merged / "manifest.json").read_text()), MANIFEST_SCHEMA)

    assert answering() == answering(use="gguf", quant="q8_0") == "tiny-gemma-q8_0.gguf"
    assert answering(quant="f16") == "tiny-gemma-f16.gguf" and answering(quant="q4_0") == "tiny-gemma-q4_0.gguf"
    asked = open_session("chat", merged, use="ollama", quant="q8_0")
    assert choice.figures_of(asked)["ollama_name"] == first["ollama_name"] == "tiny-gemma-tuned"

    file = OLLAMA / "tiny-gemma-q8_0.gguf"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="it was changed since it was exported"):
        answering(quant="q8_0")
    file.write_bytes(whole + b" ")
    assert answering() == "tiny-gemma-f16.gguf", "of another size it is not what was exported"
    file.unlink()
    with pytest.raises(UserError, match="the last export of .* made no q8_0, but q4_0, f16"):
        answering(quant="q8_0")
    assert answering() == "tiny-gemma-f16.gguf"
    again = measured("--quant", "q4_0,f16", "--json")
    assert again.json["status"] == "up-to-date" and again.json["summary"]["recommended"] == "f16"


@pytest.mark.parametrize(("flags", "others"), [
    (("--parameter", "temperature=0.1"), True), (("--system", "Be brief."), True), (("--num-ctx", "512"), True),
    (("--name", "another"), False), (("--no-measure",), False)])
def test_a_file_of_which_ollama_was_told_other_things_is_not_of_now(measured, cli, merged, monkeypatch, flags, others):
    """Its Modelfile says them still, and the file itself the settings of sampling."""
    monkeypatch.setattr(choice, "find_engine", lambda: "xllamacpp 1")
    assert measured("--quant", "q8_0").code == 0
    later = measured("--quant", "q4_0", *flags, "--json")
    assert later.code == 0, later.err
    summary, said = later.json["summary"], " ".join(later.err.split())
    assert (summary.get("recommended") != "q8_0") == others == ("other_settings" in summary["earlier"]["q8_0"])
    assert summary["earlier"]["q8_0"]["stale"] is False
    again = "gemma-tune export-ollama --run runs/tiny-gemma --quant q4_0,q8_0"
    advice = (f"tiny-gemma-q8_0.gguf is of other settings for Ollama: make it again ({again}), or remove it "
              f"from {OLLAMA}")
    assert (advice in said) == ("from an earlier export, of other settings for Ollama: stale" in said) == others
    now = cli("status", "--json")
    assert ("ollama/tiny-gemma-q8_0.gguf (stale)" in "".join(now.err.split("\n")) or not others)
    assert (now.json["stages"]["export-ollama"]["summary"].get("recommended") != "q8_0") == others
    remark = "of other settings for Ollama" if others else "of this merged model"
    assert f"tiny-gemma-q8_0.gguf ({remark})" in (OLLAMA / "report.md").read_text()
    jsonschema.validate(json.loads((merged / "manifest.json").read_text()), MANIFEST_SCHEMA)

    # llama.cpp is asked by `chat` with its own settings.
    assert choice.exported(open_session("chat", merged, quant="q8_0")).name == "tiny-gemma-q8_0.gguf"
    if others:
        with pytest.raises(UserError, match="made no q8_0"):
            choice.figures_of(open_session("chat", merged, use="ollama", quant="q8_0"))
        assert cli(*again.split()[1:], "--no-verify").code == 0
        assert "earlier" not in json.loads((merged / "manifest.json").read_text())["stages"]["export-ollama"]["summary"]


def test_a_file_that_was_removed_is_not_recommended_and_status_says_what_makes_it_again(measured, cli, merged, monkeypatch):
    monkeypatch.setattr(choice, "find_engine", lambda: "xllamacpp 1")
    assert measured("--quant", "q8_0").code == 0 and measured("--quant", "q4_0,f16").code == 0
    before = cli("status", "--json")
    assert before.json["stages"]["export-ollama"]["summary"]["recommended"] == "q8_0" and before.json["gone_exports"] == {}
    (OLLAMA / "tiny-gemma-q8_0.gguf").unlink()
    (OLLAMA / "tiny-gemma-q5_1.gguf").symlink_to("nowhere")
    after = cli("status", "--json")
    again = "gemma-tune export-ollama --run runs/tiny-gemma --quant q4_0,f16,q8_0"
    said = " ".join(after.err.split())
    assert after.code == 0 and f"! q8_0 was recommended, and its file is gone; to make it again: {again}" in said
    assert after.json["gone_exports"] == {"q8_0": again}
    assert after.json["earlier_exports"] == {}
    summary = after.json["stages"]["export-ollama"]["summary"]
    assert summary["recommended"] == "f16" and "earlier" not in summary and "tiny-gemma-tuned:f16, recommended" in said
    assert "q8_0" not in write_report(RunDir(merged, "tiny-gemma")).read_text()
    (OLLAMA / "tiny-gemma-q5_1.gguf").unlink()
    assert cli(*again.split()[1:], "--no-verify").code == 0
    assert cli("status", "--json").json["gone_exports"] == {}


def test_a_bad_export_leads_to_the_good_file_that_is_there(measured, cli, merged):
    assert measured("--quant", "q8_0", "--json").code == 0
    bad = measured("--quant", "q4_0", "--json")
    assert bad.json["summary"]["recommended"] == "q8_0" and bad.json["summary"]["quant"] == "q4_0"
    assert bad.json["next"] == ["gemma-tune chat --run runs/tiny-gemma --use gguf --quant q8_0"]
    with pytest.raises(UserError, match="made no q8_0"):  # q4_0 has the name in Ollama by now
        choice.figures_of(open_session("chat", merged, use="ollama", quant="q8_0"))
    assert cli("merge", "--dtype", "fp32", "--no-check").code == 0
    stale = measured("--quant", "q4_0", "--json").json
    assert "recommended" not in stale["summary"]
    assert stale["next"] == ["gemma-tune export-ollama --run runs/tiny-gemma --quant q8_0"]


def test_the_recommended_format_has_the_plain_names(measured, merged):
    result = measured("--quant", "q4_0,f16,q8_0", "--json")
    assert result.json["summary"]["recommended"] == result.json["summary"]["quant"] == "q8_0"
    assert result.json["artifacts"]["gguf"].endswith("-q8_0.gguf") and result.json["artifacts"]["gguf_q4_0"]
    assert (OLLAMA / "Modelfile").read_text() == (OLLAMA / "Modelfile-q8_0").read_text()
    assert result.json["next"][-1] == "ollama run tiny-gemma-tuned:q8_0"


def test_the_first_format_of_an_earlier_export_keeps_its_modelfile(export, merged):
    assert export("--quant", "q8_0", "--no-verify").code == 0
    first = (OLLAMA / "Modelfile").read_text()
    assert export("--quant", "f16", "--no-verify").code == 0
    assert "tiny-gemma-f16.gguf" in (OLLAMA / "Modelfile").read_text()
    assert (OLLAMA / "Modelfile-q8_0").read_text() == first and "tiny-gemma-q8_0.gguf" in first


def test_a_file_that_no_export_recorded_is_called_so(cli, export, merged):
    OLLAMA.mkdir()
    (OLLAMA / "own.gguf").write_bytes(b"GGUF")
    result = export("--quant", "q8_0", "--json")
    assert result.json["summary"]["earlier"]["own"] | {"bytes": 4} == {
        "file": "own.gguf", "bytes": 4, "merged": None, "stale": None}
    assert "not recorded by any export" in result.err


@pytest.mark.parametrize(("change", "known"), [
    (lambda stages: None, True),
    (lambda stages: stages["merge"]["inputs"].update(outside_adapter={}), False),
    (lambda stages: stages["prepare"]["outputs"]["valid_rows"].update(sha256="other"), False),
    (lambda stages: stages["train"]["summary"].update(eval_loss_after=9.0), False),
    (lambda stages: stages.pop("train"), False)])
def test_what_the_training_gained(merged, change, known):
    from types import SimpleNamespace

    from gemma_tune.export.worth import gained

    stages = json.loads((merged / "manifest.json").read_text())["stages"]
    stages["train"]["summary"] |= {"eval_loss_before": 4.0, "eval_loss_after": 3.0}
    change(stages)
    session = SimpleNamespace(manifest=SimpleNamespace(stages=stages), run=SimpleNamespace(tokens=merged / "data/tokens"))
    assert gained(session) == (1.0 if known else None)


def test_what_was_gained_on_pictures_is_not_set_beside_a_loss_on_text(merged):
    from types import SimpleNamespace

    from gemma_tune.export.worth import gained

    stages = json.loads((merged / "manifest.json").read_text())["stages"]
    stages["train"]["summary"] |= {"eval_loss_before": 4.0, "eval_loss_after": 3.0}
    with TokenWriter(merged / "data/tokens/valid.arrow") as writer:
        writer.add([(np.arange(4, dtype=np.int32), np.array([2, 4], np.int32), "a.png")])
    assert gained(SimpleNamespace(manifest=SimpleNamespace(stages=stages), run=SimpleNamespace(tokens=merged / "data/tokens"))) is None


def test_the_format_for_experts_is_refused_without_any(cli, merged):
    refused = cli("export-ollama", "--quant", "q8_0,mxfp4", "--no-create")
    assert refused.code == 2 and "mxfp4 is a format for mixtures of experts" in refused.err and "q4_k_m" in refused.err
    assert not OLLAMA.exists()


@pytest.mark.parametrize("ways", [(), ("symlink",), ("symlink", "link")], ids=["all", "no symbolic links", "no links"])
def test_the_converter_sees_the_checkpoint_with_another_template(tmp_path, monkeypatch, ways):
    """Also on Windows, where few may make symbolic links, and on disks without any."""
    def refused(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    for way in ways:
        monkeypatch.setattr(f"os.{way}", refused)
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "model.safetensors").write_bytes(b"weights")
    (merged / "chat_template.jinja").write_text("old", encoding="utf-8")
    with _with_template(SimpleNamespace(merged=merged, template="new"), tmp_path) as seen:
        assert {path.name: path.read_bytes() for path in seen.iterdir()} == {
            "model.safetensors": b"weights", "chat_template.jinja": b"new"}
    assert [path.name for path in tmp_path.iterdir() if path != merged] == []
    assert (merged / "model.safetensors").read_bytes() == b"weights"
