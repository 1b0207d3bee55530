"""export-ollama through the command line: files, checks, and Ollama servers of both generations."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from gemma_tune.base.errors import WorkFailed
from gemma_tune.ollama.kept import NOTE as KEPT_NOTE
from support.command import QUICK, rows, write_rows
from support.gguf import LlamaCpp
from support.modelfile import parse_modelfile
from support.ollama import LoopbackOllama, by_template


def modelfile(run: Path) -> dict:
    return parse_modelfile((run / "ollama" / "Modelfile").read_text())


@pytest.mark.parametrize("quant", ["f16", "bf16", "q8_0", "q4_k_m"])
def test_writes_gguf_and_modelfile(export, merged, quant):
    result = export("--quant", quant, "--json")
    assert result.code == 0, result.err
    gguf = merged / "ollama" / f"tiny-gemma-{quant}.gguf"
    summary = result.json["summary"]
    assert summary["gguf_bytes"] == gguf.stat().st_size
    assert 0 <= summary["check_largest_error"] <= {"f16": 1e-3, "bf16": 1e-6, "q8_0": 0.01, "q4_k_m": 0.09}[quant]
    read = modelfile(merged)
    assert read["from"] == f"./tiny-gemma-{quant}.gguf"
    assert read["parameters"]["stop"] == ["<end_of_turn>"]
    assert read["parameters"]["num_ctx"] == 1024, "the model's own context is shorter than the default"
    assert read["parameters"]["temperature"] == 0.0, "the base has no sampling settings, so transformers is greedy"
    assert "<bos>" not in read["template"] and "<start_of_turn>user" in read["template"]


def test_without_a_server_it_says_what_to_do(export, merged):
    result = export("--json")
    assert result.code == 0, result.err
    assert result.json["created"] is False
    command = "ollama create tiny-gemma-tuned -f runs/tiny-gemma/ollama/Modelfile"
    assert result.json["next"] == [command, "ollama run tiny-gemma-tuned"]
    assert "https://ollama.com/download" in result.json["advice"]
    assert "https://ollama.com/download" in result.err and command in result.err.replace("\n", "")


def test_create_without_a_server_is_an_error_before_any_work(export, merged):
    result = export("--create")
    assert result.code == 1
    assert "no Ollama server answers at http://127.0.0.1:9" in result.err
    assert not (merged / "ollama").exists()


@pytest.mark.parametrize("generation", ["0.33", "0.34.1"])
def test_creates_the_model_in_ollama(export, merged, monkeypatch, generation):
    with LoopbackOllama(generation) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        result = export("--name", "my-analyst", "--system", "Be brief. 简短。", "--num-ctx", 512, "--json")
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
        again = export("--name", "my-analyst", "--system", "Be brief. 简短。", "--num-ctx", 512, "--json")
        assert again.json["status"] == "up-to-date" and again.json["created"] is True
        assert [p for p in server.paths() if p.startswith("POST /api/blobs")] == uploads, "the blob is there already"


def test_no_create_leaves_the_server_alone(export, merged, monkeypatch):
    with LoopbackOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        assert export("--no-create", "--json").json["created"] is False
        assert server.paths() == []


def test_a_new_model_is_asked_a_held_out_prompt(export, merged, go_cache):
    """Its answer is in the result, and what is odd about it is said."""
    with LoopbackOllama(render=by_template) as server:
        result = export("--host", server.url, "--json")
        assert result.code == 0, result.err
        answer = result.json["answer"]
        assert answer["answer"] and answer["done_reason"] == "stop" and answer["prompt_as_trained"] is True
        asked = [r.body for r in server.requests if r.path == "/api/chat" and "_debug_render_only" not in r.body]
        assert asked[0]["messages"][-1]["content"].startswith("Say number")
        assert export("--host", server.url, "--system", "Be brief.", "--json").json["answer"]["prompt_as_trained"] is True
    with LoopbackOllama(faults=["chat-endless"]) as server:
        result = export("--host", server.url)
        assert result.code == 0 and "did not end its answer within 256 tokens" in result.err
    with LoopbackOllama(faults=["chat-empty"]) as server:
        result = export("--host", server.url)
        assert result.code == 1 and "answered nothing" in result.err


def test_a_server_that_lays_prompts_out_otherwise_is_told_of(export, merged):
    with LoopbackOllama(render=lambda system, messages: "something else") as server:
        result = export("--host", server.url, "--json")
        assert result.json["answer"]["prompt_as_trained"] is False
        assert "lays out a prompt for tiny-gemma-tuned otherwise than training did" in result.err


def test_a_server_that_is_too_old_is_refused_before_any_work(export, merged):
    with LoopbackOllama(version="0.5.7") as server:
        result = export("--host", server.url)
    assert result.code == 1 and "0.5.7" in result.err and "too old" in result.err
    assert not (merged / "ollama").exists()


@pytest.mark.parametrize("fault", ["create-error", "create-cut", "upload-dropped"])
def test_a_server_that_fails_is_an_error_and_the_files_stay(export, merged, fault):
    with LoopbackOllama(faults=[fault]) as server:
        result = export("--host", server.url)
        assert result.code == 1
        assert "Error:" in result.err and "Hint:" in result.err
    assert modelfile(merged)["from"] == "./tiny-gemma-q8_0.gguf"
    assert "export-ollama" in json.loads((merged / "manifest.json").read_text())["stages"]


def test_bad_names_are_refused_before_any_work(export, merged):
    result = export("--name", "no spaces please")
    assert result.code == 2 and "no spaces please" in result.err
    assert not (merged / "ollama").exists()


def test_a_gguf_that_does_not_hold_the_weights_is_noticed(export, merged, monkeypatch):
    from gemma_tune.gguf import tensors

    plain = tensors.PlannedTensor.chunks

    def wrong(self, *elements):
        for values in plain(self, *elements):
            yield values * 1.05 if self.spec.name == "blk.1.attn_q.weight" else values

    monkeypatch.setattr(tensors.PlannedTensor, "chunks", wrong)
    result = export()
    assert result.code == 1
    assert "blk.1.attn_q.weight" in result.err
    assert "export-ollama" not in json.loads((merged / "manifest.json").read_text())["stages"]


def test_what_fails_leaves_the_earlier_file(export, merged, monkeypatch):
    from gemma_tune.export import files as export_files

    assert export().code == 0
    before = {p.name: p.read_bytes() for p in (merged / "ollama").iterdir()}
    monkeypatch.setattr(export_files, "worst_error", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    assert export("--force").code == 130
    assert {p.name: p.read_bytes() for p in (merged / "ollama").iterdir()} == before
    assert export().err.count("is up to date") == 1


@pytest.mark.parametrize(("system", "said"), [('a"""\nb', 'ends in """'), ("\udcff", "not UTF-8 text")])
def test_what_a_modelfile_cannot_hold_is_refused_before_any_work(export, merged, system, said):
    result = export("--system", system)
    assert result.code == 2 and said in result.err
    assert not (merged / "ollama").exists()


def test_no_room_for_the_file_to_compare_with_is_no_failure(cli, merged, monkeypatch):
    """The export's own file is whole, and is compared without the one in f16."""
    from gemma_tune.export import checks as export_checks

    def full(*_, **__):
        raise WorkFailed("0.1 GB free")

    monkeypatch.setattr(export_checks, "write_gguf", full)
    result = cli("export-ollama", "--quant", "q8_0", "--verify", "--no-measure", "--json")
    assert result.code == 0, result.err
    assert list(result.json["summary"]["parity"]["greedy"]) == ["q8_0"]
    assert "without a file in f16: 0.1 GB free" in result.err


def test_several_formats_at_once(cli, merged):
    """Each is a file with a Modelfile and a name of its own, and the loss of each stands beside its size."""
    result = cli("export-ollama", "--quant", "q8_0,Q4_0", "--quant", "f32", "--no-verify", "--json")
    assert result.code == 0, result.err
    summary, folder = result.json["summary"], merged / "ollama"
    assert list(summary["quants"]) == ["q8_0", "q4_0", "f32"]
    losses = {name: figures["kl"] for name, figures in summary["quants"].items()}
    assert losses["f32"] < losses["q8_0"] < losses["q4_0"], losses
    assert {p.name for p in folder.iterdir()} == {
        "tiny-gemma-q8_0.gguf", "tiny-gemma-q4_0.gguf", "tiny-gemma-f32.gguf", "Modelfile", "Modelfile-q8_0", "Modelfile-q4_0",
        "Modelfile-f32", "report.md"}
    for quant, figures in summary["quants"].items():
        assert figures["bytes"] == (folder / figures["file"]).stat().st_size
        assert figures["ollama_name"] == f"tiny-gemma-tuned:{quant}"
    assert parse_modelfile((folder / "Modelfile-q4_0").read_text())["from"] == "./tiny-gemma-q4_0.gguf"
    assert summary["recommended"] == summary["quant"] == "q4_0", "so little was learned that it costs nothing"
    assert (folder / "Modelfile").read_text() == (folder / "Modelfile-q4_0").read_text()
    assert [line.split(" -f")[0] for line in result.json["next"]] == [
        "ollama create tiny-gemma-tuned:q8_0", "ollama create tiny-gemma-tuned:q4_0", "ollama create tiny-gemma-tuned:f32",
        "ollama run tiny-gemma-tuned:q4_0"]
    table = (folder / "report.md").read_text()
    for quant in losses:
        assert f"| {quant} |" in table and f"{losses[quant]:.4f}" in table
    again = cli("export-ollama", "--quant", "q8_0,q4_0,f32", "--no-verify", "--no-measure", "--json")
    assert again.json["status"] == "up-to-date" and again.json["summary"] == summary, "less is asked for than is there"
    assert "divergence" in result.err and "llama-cli -m" in result.err and "LM Studio" in result.err


def test_a_name_with_a_tag_cannot_name_several(export, merged):
    result = export("--quant", "q8_0,f16", "--name", "mine:latest")
    assert result.code == 2 and "mine:latest" in result.err
    assert not (merged / "ollama").exists()


def test_the_report_on_ids_and_answers(cli, merged, go_cache):
    """Through real llama.cpp; in the manifest, in the report, and on the screen."""
    result = cli("export-ollama", "--quant", "bf16", "--verify", "--no-measure", "--json")
    assert result.code == 0, result.err
    parity = result.json["summary"]["parity"]
    assert parity["ok"] is True
    assert json.loads((merged / "manifest.json").read_text())["stages"]["export-ollama"]["summary"]["parity"] == parity
    assert parity["greedy"]["bf16"]["answers"] > 0
    assert "| Chinese |" in (merged / "ollama" / "report.md").read_text()
    assert "Chinese" in result.err and "greedy answers" in result.err


def test_without_an_engine_it_says_so_or_refuses(cli, merged, monkeypatch):
    from gemma_tune.export import checks as export_checks

    monkeypatch.setattr(export_checks, "find_engine", lambda: None)
    result = cli("export-ollama", "--verify")
    assert result.code == 2 and "pip install xllamacpp" in result.err
    assert not (merged / "ollama").exists()
    result = cli("export-ollama", "--no-measure")
    assert result.code == 0
    assert "then repeat with --verify" in " ".join(result.err.split())
    assert "not checked: token ids and answers: no llama.cpp engine is installed" in " ".join(result.err.split())
    assert "no llama.cpp engine" in (merged / "ollama" / "report.md").read_text()


def test_parameters_and_a_constant_system_prompt(cli, export, tiny, tmp_path):
    """Every conversation has the same system prompt, which becomes SYSTEM; --parameter wins over the base's settings."""
    talks = [{"messages": [{"role": "system", "content": "Count."}, *row["messages"]]} for row in rows()]
    for args in (("prepare", write_rows(tmp_path / "s.jsonl", talks), "--model", tiny), ("train", *QUICK), ("merge", "--no-check")):
        assert cli(*args).code == 0
    result = export("--parameter", "temperature=0.3", "--parameter", "stop=a,b")
    assert result.code == 0, result.err
    read = modelfile(tmp_path / "runs" / "tiny-gemma")
    assert read["system"] == "Count." and "it becomes SYSTEM" in result.err
    assert read["parameters"]["temperature"] == 0.3
    assert read["parameters"]["stop"] == ["<end_of_turn>", "a,b"]
    assert export("--system", "").code == 0
    assert "system" not in modelfile(tmp_path / "runs" / "tiny-gemma")
    refused = export("--parameter", "temprature=1", "--parameter", "top_k=x")
    assert refused.code == 2 and "did you mean `temperature`" in refused.err and "top_k=x" in refused.err


def test_another_architecture_needs_llama_cpps_converter(export, merged, monkeypatch):
    """With it, the file is the converter's own, and has the template of training."""
    from gemma_tune.gguf.architectures import gemma
    from gemma_tune.gguf.reader import read_gguf_metadata

    folder = merged / "tiny-gemma_lora_merged"
    monkeypatch.setattr(gemma, "MAKERS", {})  # a family that is not written by ourselves
    result = export()
    assert result.code == 2 and "--converter" in result.err
    assert "no convert_hf_to_gguf.py" in export("--converter", merged).err
    converter = Path(sys.prefix) / "llama.cpp"
    if not converter.is_dir():
        pytest.skip("llama.cpp's converter is not installed: make test does it")
    monkeypatch.setenv("PYTHONPATH", str(converter))
    result = export("--converter", converter, "--quant", "f16")
    assert result.code == 0, result.err
    metadata = read_gguf_metadata(merged / "ollama" / "tiny-gemma-f16.gguf")
    assert metadata["general.architecture"] == "gemma3"
    assert metadata["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()


@pytest.mark.parametrize("bad", ["{broken", "[1]", '{"messages": ["x"]}', '{"messages": {"a": 1}}', "[" * 100_000])
def test_rows_that_were_changed_by_hand_are_named(cli, export, merged, bad):
    """Their system prompt becomes SYSTEM, and they are prompts to compare with."""
    row = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (merged / "data/train.jsonl").write_text(f"{json.dumps(row)}\n\n{bad}\n")
    (merged / "data/valid.jsonl").write_text(f"{json.dumps(row)}\n")
    for result in (export("--quant", "f16"), cli("export-ollama", "--system", "T", "--quant", "f16")):
        assert result.code == 2 and "runs/tiny-gemma/data/train.jsonl:3 was changed" in result.err, result.err
        assert "gemma-tune prepare --run runs/tiny-gemma --force" in " ".join(result.err.split())
    assert not [*(merged / "ollama").glob("*")]


def test_missing_and_stale_stages_are_told(export, trained):
    result = export("--run", trained)
    assert result.code == 2
    assert "needs what `merge` makes" in result.err
    assert f"gemma-tune merge --run {trained}" in result.err


def test_real_llama_cpp_reads_it_token_by_token(export, merged):
    """Ids of the rendered prompt, the template and the end of a turn, as llama.cpp has them."""
    from gemma_tune.encoding.tokenizer import load_format

    assert export("--quant", "bf16").code == 0
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


def test_what_was_not_checked_is_checked_when_the_checks_are_asked_for_again(cli, merged):
    """Leaving an option out asks for its default, which can be more than an earlier command wanted."""
    assert cli("export-ollama", "--quant", "q8_0", "--no-verify", "--no-measure").code == 0
    plain = cli("export-ollama", "--quant", "q8_0", "--no-measure", "--json")
    assert plain.json["status"] == "done" and plain.json["summary"]["parity"]["ok"] is True, plain.err
    measured = cli("export-ollama", "--quant", "q8_0", "--json")
    assert measured.json["status"] == "done" and "kl" in measured.json["summary"]["quants"]["q8_0"]
    for less in ((), ("--no-verify",), ("--no-measure",), ("--no-verify", "--no-measure")):
        assert cli("export-ollama", "--quant", "q8_0", *less, "--json").json["status"] == "up-to-date", less


def test_a_cheaper_export_keeps_what_was_checked_of_the_same_files(cli, merged, monkeypatch):
    import gemma_tune.export.stage as stage

    def unasked(*args):
        raise WorkFailed("checked again")

    first = cli("export-ollama", "--quant", "q8_0", "--json")
    assert first.code == 0, first.err
    report = (merged / "ollama/report.md").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(stage, "check_files", unasked)
        for flags in (("--no-measure", "--no-verify", "--name", "zz"), ("--name", "zz")):
            again = cli("export-ollama", *flags, "--json")
            assert again.code == 0, again.err
            assert again.json["summary"]["parity"] == first.json["summary"]["parity"]
        assert again.json["status"] == "up-to-date"
    (merged / "ollama/report.md").unlink()
    again = cli("export-ollama", "--no-measure", "--no-verify", "--name", "tiny-gemma-tuned", "--json")
    assert again.code == 0 and again.json["summary"] == first.json["summary"], again.err
    assert (merged / "ollama/report.md").read_text() == report


def test_a_check_that_is_asked_for_keeps_the_other_one(cli, merged):
    one = cli("export-ollama", "--quant", "q8_0", "--no-measure", "--json").json["summary"]
    both = cli("export-ollama", "--no-verify", "--json").json["summary"]
    assert both["parity"] == one["parity"] and "kl" in both["quants"]["q8_0"]
    assert "| Chinese |" in (merged / "ollama/report.md").read_text()
    assert cli("export-ollama", "--json").json["status"] == "up-to-date"


def test_the_order_of_formats_writes_no_file_again(cli, merged):
    flags = ("--no-measure", "--no-verify", "--json")
    assert cli("export-ollama", "--quant", "q8_0,f16", *flags).json["summary"]["quant"] == "q8_0"
    before = {p.name: p.stat().st_mtime_ns for p in (merged / "ollama").glob("*.gguf")}
    turned = cli("export-ollama", "--quant", "f16,q8_0", *flags)
    assert turned.code == 0 and {p.name: p.stat().st_mtime_ns for p in (merged / "ollama").glob("*.gguf")} == before
    summary = turned.json["summary"]
    assert summary["quant"] == "f16" == next(iter(summary["quants"])) and summary["gguf_bytes"] == summary["quants"]["f16"]["bytes"]
    assert turned.json["artifacts"]["gguf"].endswith("-f16.gguf") and modelfile(merged)["from"] == "./tiny-gemma-f16.gguf"


def test_what_ollama_alone_is_told_leaves_the_files_as_they_are(cli, merged):
    """Name, system prompt, context and what no GGUF holds; a parameter of sampling stands in the file as well."""
    def files() -> dict[str, tuple[int, int]]:
        return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (merged / "ollama").glob("*.gguf")}

    first = cli("export-ollama", "--quant", "q8_0,q4_0", "--json")
    assert first.code == 0, first.err
    before = files()
    told = cli("export-ollama", "--name", "mine", "--num-ctx", "512", "--system", "Count.", "--parameter", "seed=5", "--json")
    assert told.json["status"] == "done" and "the GGUF stays as it is" in told.err, told.err
    assert files() == before and len(before) == 2
    read = modelfile(merged)
    assert (read["system"], read["parameters"]["num_ctx"], read["parameters"]["seed"]) == ("Count.", 512, 5)
    assert told.json["summary"]["quants"]["q4_0"]["ollama_name"] == "mine:q4_0"
    for quant, figures in first.json["summary"]["quants"].items():
        now, other = told.json["summary"]["quants"][quant], {"ollama_name": "", "told_sha256": ""}
        assert {**now, **other} == {**figures, **other} and now["told_sha256"] != figures["told_sha256"]
    assert told.json["summary"]["parity"] == first.json["summary"]["parity"]
    assert told.json["artifacts"].keys() == first.json["artifacts"].keys()
    assert cli("status", "--verify", "--json").json["stages"]["export-ollama"]["state"] == "done"
    assert cli("export-ollama", "--json").json["status"] == "up-to-date"

    (merged / "ollama/report.md").unlink()
    assert cli("export-ollama", "--name", "third", "--json").json["status"] == "done"
    assert (merged / "ollama/report.md").is_file()
    before = files()

    hot = cli("export-ollama", "--parameter", "temperature=0.5", "--json")
    assert hot.json["status"] == "done" and "stays as it is" not in hot.err
    assert all(files()[name] != stamp for name, stamp in before.items())
    before = files()
    assert "stays as it is" not in cli("export-ollama", "--name", "other", "--force").err and files() != before
    (merged / "ollama" / "tiny-gemma-q4_0.gguf").write_bytes(b"GGUF")  # damaged: made anew, whatever the name
    assert cli("export-ollama", "--name", "third").code == 0
    assert cli("status", "--verify", "--json").json["stages"]["export-ollama"]["state"] == "done"


def test_files_are_checked_later_without_being_written_again(cli, merged, monkeypatch):
    assert cli("export-ollama", "--quant", "q8_0", "--no-verify", "--no-measure").code == 0
    gguf = merged / "ollama" / "tiny-gemma-q8_0.gguf"
    before = gguf.stat()
    later = cli("export-ollama", "--verify", "--measure", "--name", "mine", "--json")
    assert "what was not checked is checked now" in later.err
    assert later.json["summary"]["parity"]["ok"] is True and "kl" in later.json["summary"]["quants"]["q8_0"]
    assert later.json["summary"]["quants"]["q8_0"]["ollama_name"] == "mine"
    assert (gguf.stat().st_ino, gguf.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert "divergence" in (merged / "ollama" / "report.md").read_text()

    import gemma_tune.export.stage as stage

    def broken(*args):
        raise WorkFailed("the check broke")

    monkeypatch.setattr(stage, "check_files", broken)
    assert cli("export-ollama", "--quant", "f16", "--no-verify", "--no-measure").code == 1
    assert gguf.exists() and cli("export-ollama", "--no-verify", "--no-measure", "--json").code == 0


def test_llama_cpps_memory_counts_beside_the_models(cli, merged, monkeypatch):
    """What fits alone does not fit beside a file in llama.cpp; afterwards it does, and the loss is measured."""
    from gemma_tune.export import files as export_files

    asked, place = [], export_files.place

    def little(parameters, extra=0):
        asked.append(extra)
        return (None, "there is too little") if extra else place(parameters)

    monkeypatch.setattr(export_files, "place", little)
    result = cli("export-ollama", "--quant", "q8_0", "--verify", "--json")
    assert result.code == 0, result.err
    summary = result.json["summary"]
    weights = sum(path.stat().st_size for path in (merged / "tiny-gemma_lora_merged").glob("*.safetensors"))
    assert asked == [max(weights, summary["gguf_bytes"]), 0]
    assert "answers: there is too little" in summary["unchecked"]
    assert "not_checked" in summary["parity"]["greedy"] and summary["parity"]["ids"]["llama.cpp"]["equal"] > 0
    assert summary["quants"]["q8_0"]["kl"] < 0.1


def test_weights_that_are_overwritten_are_not_lent_again():
    from gemma_tune.export.checks import MergedModel

    model = MergedModel("weights")
    assert model.lent() == model.lent() == "weights"
    assert model.given_away() == "weights"
    for again in (model.lent, model.given_away):
        with pytest.raises(RuntimeError, match="overwritten"):
            again()


def test_everything_is_decided_once(cli, merged, monkeypatch, go_cache):
    """Configuration, vocabulary, template and data are read once, for several formats and the deployment as well."""
    from gemma_tune.export import files as export_files
    from gemma_tune.gguf import writer

    counted = {}
    for place, name in ((writer, "architecture_of"), (writer, "load_vocabulary"), (export_files, "load_format"),
                        (export_files, "target_for")):
        def once(*args, real=getattr(place, name), name=name):
            counted[name] = counted.get(name, 0) + 1
            return real(*args)

        monkeypatch.setattr(place, name, once)
    with LoopbackOllama("0.34.1", render=by_template) as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        result = cli("export-ollama", "--quant", "f16,q8_0,q4_0", "--no-measure", "--json")
        assert result.code == 0, result.err
        assert result.json["created"] is True
        assert counted == dict.fromkeys(("architecture_of", "load_vocabulary", "load_format", "target_for"), 1)
        assert cli("export-ollama", "--quant", "f16,q8_0,q4_0", "--no-measure", "--json").json["created"] is True
    assert counted == {"architecture_of": 2, "load_vocabulary": 2, "load_format": 2, "target_for": 2}, "once a command"
    assert cli("export-ollama", "--quant", "f16,q8_0,q4_0", "--no-measure", "--no-create", "--json").code == 0
    assert set(counted.values()) == {2}, "without a server nothing of it is needed"


# --- tools

# Takes tools, calls and results, with the markers that the tiny tokenizer has.
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}<start_of_turn>tools\n{{ tools | tojson }}<end_of_turn>\n{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}call {{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")
WEATHER = [{"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}}}}]


# Arguments that Ollama would not find in an answer.
SPELLED_OUT = WITH_TOOLS.replace("{{ c.function.arguments | tojson }}",
                                 "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }} {% endfor %}")


@pytest.mark.parametrize("with_tools", [True, False])
def test_tools_that_ollama_will_not_take_are_told_of(cli, export, trained, tiny, tmp_path, with_tools):
    """From the first command on: an older server answers a request with tools 400."""
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").write_text(SPELLED_OUT)
    more = [row | {"tools": WEATHER} for row in rows(2)] if with_tools else []
    data = write_rows(tmp_path / "rows.jsonl", [*rows(8), *more])
    adapter = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "adapter",
                              ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    prepared = cli("prepare", data, "--model", model)
    assert prepared.code == 0, prepared.err
    assert cli("merge", "--adapter", adapter, "--base", model, "--no-check").code == 0
    result = export("--json")
    assert result.code == 0, result.err
    assert "does not support" not in modelfile(Path("runs/model"))["template"]
    report = Path("runs/model/ollama/report.md").read_text()
    told = "2 rows have tools, and the TEMPLATE for Ollama has no place for them yet"
    for said in (prepared.err, result.err, report, *result.json["summary"].get("different_in_ollama", [""])):
        assert (told in said and 'refuses a request with tools (400 "does not support tools")' in said) == with_tools
    record = json.loads(Path("runs/model/manifest.json").read_text())["stages"]
    assert record["prepare"]["summary"]["tool_rows"] == 2 * with_tools


def test_tools_that_ollama_takes_are_in_its_template(cli, export, trained, tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    (model / "chat_template.jinja").write_text(WITH_TOOLS)
    data = write_rows(tmp_path / "rows.jsonl", [*rows(8), *(row | {"tools": WEATHER} for row in rows(2))])
    adapter = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "adapter",
                              ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    prepared = cli("prepare", data, "--model", model)
    assert prepared.code == 0 and "TEMPLATE" not in prepared.err, prepared.err
    assert cli("merge", "--adapter", adapter, "--base", model, "--no-check").code == 0
    result = export("--json")
    assert result.code == 0, result.err
    assert "{{ range $n, $_ := $.Tools }}" in modelfile(Path("runs/model"))["template"]
    assert result.json["summary"]["different_in_ollama"] == [KEPT_NOTE]


def test_a_renderer_of_ollamas_own_takes_tools():
    from gemma_tune.ollama.template import OllamaChat, tools_are_lost

    assert tools_are_lost(OllamaChat(None, (), renderer="gemma4-small"), 3) is None
    assert tools_are_lost(OllamaChat("{{ range .Tools }}{{ . }}{{ end }}", ()), 3) is None
    assert tools_are_lost(OllamaChat("{{ .Prompt }}", ()), 1).startswith("One row has tools")
    assert tools_are_lost(OllamaChat("{{ .Prompt }}", ()), 0) is None
