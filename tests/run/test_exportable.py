"""What cannot be exported is known before it is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gemma_tune import api
from gemma_tune.base.errors import UserError
from gemma_tune.encoding import tokenizer
from gemma_tune.gguf.reader import GgufFile
from support.command import QUICK, rows, write_rows
from support.llamas import BYTES, TURNS, make_llama
from support.modelfile import parse_modelfile

# The first turn is opened otherwise, which no TEMPLATE does.
ODD = TURNS.replace("<turn>{{", "<turn>{{ '!' if loop.first }}{{")


@pytest.fixture
def model(tmp_path):
    """A function: one of the families, with a template and changes to its configuration."""
    def make(family: str, template: str = TURNS, **changes: object) -> Path:
        folder = tmp_path / "m"
        _, tokenizer = make_llama(family, folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    return make


@pytest.fixture
def converter(tmp_path):
    """What looks like a llama.cpp checkout, and writes nothing."""
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").write_text("")
    return tmp_path / "llama.cpp"


@pytest.fixture
def with_converter(converter, tmp_path):
    """A file of settings that names it."""
    (tmp_path / "settings.yaml").write_text(json.dumps({"export-ollama": {"converter": str(converter)}}))
    return "--config", tmp_path / "settings.yaml"


@pytest.fixture
def conversations(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", rows(8))


@pytest.mark.parametrize(("family", "template", "changes", "said"), [
    ("qwen2", TURNS, {"hidden_act": "gelu"}, "hidden_act is 'gelu' and llama.cpp computes with 'silu'"),
    ("qwen2", ODD, {}, "cannot be turned into an Ollama TEMPLATE"),
    ("mistral", TURNS, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'")])
def test_it_is_told_when_data_are_prepared_and_refused_by_a_whole_run(cli, model, conversations, family, template, changes, said):
    base = model(family, template, **changes)
    prepared = cli("prepare", conversations, "--model", base)
    assert prepared.code == 0 and "for later: `export-ollama` will not take this model: " in prepared.err
    assert said in prepared.err and ".;" not in prepared.err and ".:" not in prepared.err
    whole = cli("run", conversations, "--model", base, "--run", "runs/other")
    assert whole.code == 2 and "`run` ends with an export, which will not take m: " in whole.err and said in whole.err
    assert not Path("runs/other/data").exists()
    assert "for later" not in cli("prepare", conversations).err, "nothing new"


def test_a_whole_run_looks_at_the_template_that_it_will_prepare_with(cli, model, conversations, tmp_path):
    base, mine = model("qwen2"), tmp_path / "mine.jinja"
    mine.write_text(TURNS)
    assert cli("prepare", conversations, "--model", base, "--chat-template", mine).code == 0
    mine.write_text(ODD)
    for again in ((), (conversations,)):
        whole = cli("run", *again)
        assert whole.code == 2 and "`run` ends with an export, which will not take m: " in whole.err, again
        assert ODD not in Path("runs/m/data/chat_template.jinja").read_text(), "nothing was prepared"


def test_a_tokenizer_that_no_gguf_can_hold_is_told_when_data_are_prepared(cli, tiny, model, conversations, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "mine")
    (base / "tokenizer.model").unlink()
    prepared = cli("prepare", conversations, "--model", base, "--json")
    [told] = [text for text in prepared.json["warnings"] if "export-ollama" in text]
    assert prepared.code == 0 and "for later: `export-ollama` will not take this model: " in told
    assert "tokenizer.model is missing" in told and "Copy tokenizer.model from the base model's repository" in told
    assert "export-ollama" not in " ".join(cli("prepare", "--json", "--run", "runs/mine").json["warnings"]), "nothing new"
    # What the converter could write, from any model: one of the words that llama.cpp does not cut so.
    other = model("olmo2")
    content = json.loads((other / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}, BYTES]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    prepared = cli("prepare", conversations, "--model", other)
    assert prepared.code == 0 and "takes this model with llama.cpp's converter alone (--converter PATH): " in prepared.err
    assert "llama.cpp has no pre-tokenizer that cuts as" in prepared.err


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_the_tokenizer_is_loaded_once_for_the_rows_and_the_look_at_the_export(cli, model, conversations, family, monkeypatch):
    base, loaded, load = model(family), [], tokenizer.load_tokenizer
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda checkpoint: loaded.append(checkpoint) or load(checkpoint))
    assert cli("prepare", conversations, "--model", base).code == 0 and loaded == [base]


def test_a_whole_run_loads_it_once_before_it_trains(cli, model, conversations, monkeypatch):
    base, loaded, load = model("qwen2"), [], tokenizer.load_tokenizer

    def train(session):
        raise UserError("enough")

    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda checkpoint: loaded.append(checkpoint) or load(checkpoint))
    monkeypatch.setitem(api.IN_ORDER, "train", train)
    for _ in ("prepared", "up to date"):
        loaded.clear()
        assert "enough" in cli("run", conversations, "--model", base).err and loaded == [base]


@pytest.mark.parametrize(("family", "asked", "said"), [
    ("qwen2", {"quant": ["q8_0", "mxfp4"]}, "mxfp4 is a format for mixtures of experts, and m has none"),
    ("gpt-oss", {"size": "9MB"}, "--size 9MB: what rounding costs cannot be measured: experts that add biases are not measured")])
def test_a_format_that_a_model_cannot_have_is_refused_by_a_whole_run(cli, model, conversations, tmp_path, family, asked, said):
    base = model(family)
    (tmp_path / "settings.yaml").write_text(json.dumps({"export-ollama": asked}))
    whole = cli("run", conversations, "--model", base, "--config", tmp_path / "settings.yaml")
    assert whole.code == 2 and said in whole.err
    assert not Path("runs/m/data").exists()


def test_what_llama_cpps_converter_writes_is_no_warning(cli, model, conversations):
    base = model("qwen2", model_type="stablelm", architectures=["StableLmForCausalLM"])
    result = cli("prepare", conversations, "--model", base, "--json")
    assert result.code == 0 and "takes this model with llama.cpp's converter alone (--converter PATH)" in result.err
    assert not any("export-ollama" in text for text in result.json["warnings"])


def test_a_whole_run_with_the_converter_is_not_told_to_use_it(cli, model, conversations, with_converter):
    base = model("qwen2", model_type="stablelm", architectures=["StableLmForCausalLM"])
    result = cli("run", conversations, "--model", base, *with_converter)
    assert Path("runs/m/data").exists() and "for later" not in result.err


def test_a_model_that_cannot_be_prepared_is_not_blamed_on_the_export(cli, model, conversations):
    base = model("qwen2", template="")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    result = cli("run", conversations, "--model", base, "--run", "runs/other")
    assert result.code == 2 and "has no chat template" in result.err and "ends with an export" not in result.err


def test_no_converter_helps_where_llama_cpp_computes_otherwise(cli, model, conversations, converter, with_converter):
    """It would write a file all the same, of another model."""
    base = model("qwen2", hidden_act="gelu")
    whole = cli("run", conversations, "--model", base, "--run", "runs/other", *with_converter)
    assert whole.code == 2 and "`run` ends with an export, which will not take m: " in whole.err
    assert not Path("runs/other/data").exists()
    for args in (("prepare", conversations, "--model", base), ("train", *QUICK), ("merge", "--no-check")):
        assert cli(*args).code == 0
    for more in ((), ("--converter", converter)):
        result = cli("export-ollama", *more)
        assert result.code == 2 and "would compute another model of it, whoever writes the file" in result.err
        assert "--converter" not in result.err


def test_a_bos_of_the_template_and_a_window_that_llama_cpp_does_not_know(cli, model, conversations):
    """Mistral 7B v0.1 looks back 4096 tokens, llama.cpp as far as it is told."""
    base = model("mistral", max_position_embeddings=9000, sliding_window=100)
    for args in (("prepare", conversations, "--model", base), ("train", *QUICK), ("merge", "--no-check"),
                 ("export-ollama", "--quant", "f16", "--no-measure")):
        result = cli(*args)
        assert result.code == 0, result.err
    folder = Path("runs/m/ollama")
    assert GgufFile(folder / "m-f16.gguf").metadata["tokenizer.ggml.add_bos_token"] is True
    assert parse_modelfile((folder / "Modelfile").read_text())["parameters"]["num_ctx"] == 100
    assert "prompts are not the same everywhere" not in result.err
    long = write_rows(Path("long.jsonl"), [{"messages": [{"role": "user", "content": "number " * 90},
                                                         {"role": "assistant", "content": f"the {n}"}]} for n in range(8)])
    for args in (("prepare", long), ("train", *QUICK, "--force"), ("merge", "--no-check")):
        assert cli(*args).code == 0
    assert "the context here is the 100 tokens that llama.cpp computes as in training" in cli("export-ollama", "--quant", "f16", "--no-measure").err
