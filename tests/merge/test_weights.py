"""The merged model's files: bytes, shards, number types; a base that is damaged; a merge that breaks off."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.command import ROOT
from support.hub import LoopbackHub
from support.merging import merged, remember

INDEX = "model.safetensors.index.json"
MERGED = Path("runs/tiny-gemma/tiny-gemma_lora_merged")


@pytest.fixture
def adapter(trained) -> Path:
    return trained / "tiny-gemma_lora_adapter"


@pytest.fixture
def sharded(tiny, tmp_path) -> Path:
    """The tiny base in files of at most 40 KB."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="40KB")
    return base


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def raw(path: Path) -> tuple[dict, dict[str, bytes]]:
    """The header of a safetensors file, and the bytes of each tensor."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    return header, {name: data[8 + length + entry["data_offsets"][0]:8 + length + entry["data_offsets"][1]]
                    for name, entry in header.items() if name != "__metadata__"}


def test_the_files_are_the_bases_but_for_adapted_tensors(sharded, adapter, tmp_path):
    plan = merged(sharded, adapter, tmp_path / "out")
    adapted = {piece.name for piece in plan.pieces if piece.lora}
    assert len(adapted) == 14
    for path in sharded.glob("*.safetensors"):
        (header, before), (new_header, after) = raw(path), raw(tmp_path / "out" / path.name)
        assert header == new_header and list(header) == list(new_header)
        assert {name for name in before if before[name] != after[name]} == adapted & before.keys()
    assert (tmp_path / "out" / INDEX).read_bytes() == (sharded / INDEX).read_bytes()


# --- number types and sizes of files

@pytest.mark.parametrize(("dtype", "stored"), [("fp32", "float32"), ("fp16", "float16")])
def test_another_number_type(cli, trained, tiny, dtype, stored):
    result = cli("merge", "--dtype", dtype, "--json")
    assert result.code == 0, result.err
    config = json.loads((MERGED / "config.json").read_text())
    assert config["dtype"] == stored
    base = load_file(tiny / "model.safetensors")
    for name, tensor in load_file(MERGED / "model.safetensors").items():
        assert tensor.dtype == getattr(torch, stored)
        if name.endswith("norm.weight"):
            assert torch.equal(tensor, base[name].to(tensor.dtype))
    assert result.json["summary"]["check_divergence"] < 1e-3
    again = cli("merge", "--dtype", dtype, "--json")
    assert again.json["status"] == "up-to-date"


def test_whole_numbers_stay_what_they_are(tmp_path, adapter, tiny):
    base = shutil.copytree(tiny, tmp_path / "base")
    ids = torch.tensor([3, 1 << 40])
    save_file(load_file(base / "model.safetensors") | {"model.ids": ids}, base / "model.safetensors")
    plan = merged(base, adapter, tmp_path / "out", dtype="F32")
    assert [piece.copied for piece in plan.pieces if piece.name == "model.ids"] == [True]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found.pop("model.ids"), ids)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_a_number_that_is_too_large_for_the_type_is_named(tmp_path, adapter, tiny):
    from gemma_tune.base.errors import WorkFailed

    base = shutil.copytree(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(WorkFailed, match=r"model\.norm\.weight .*too large for F16") as raised:
        merged(base, adapter, tmp_path / "out", dtype="F16")
    assert "bf16" in raised.value.hint
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(WorkFailed, match=r"model\.norm\.weight .*infinities"):
        merged(base, adapter, tmp_path / "out2", dtype="F32")


def test_an_adapter_that_is_not_finite_is_not_merged(cli, trained, adapter):

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "mlp.up_proj.lora_B" in name)
    tensors[name][5, 1] = float("nan")
    save_file(tensors, path)
    remember(trained)
    result = cli("merge")
    assert result.code == 1
    assert "model.layers.0.mlp.up_proj.weight is not finite" in result.err
    assert not MERGED.exists()


def test_files_of_another_size(cli, trained, tiny):
    result = cli("merge", "--max-shard-size", "60KB", "--json")
    assert result.code == 0, result.err
    files = sorted(path.name for path in MERGED.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((MERGED / INDEX).read_text())
    total = 0
    for name in files:
        _, tensors = raw(MERGED / name)
        size = sum(map(len, tensors.values()))
        assert size <= 60_000 or len(tensors) == 1
        assert all(index["weight_map"][tensor] == name for tensor in tensors)
        total += size
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == result.json["summary"]["tensors"]
    one = cli("merge", "--max-shard-size", "1.5 GiB", "--json")
    assert one.code == 0, one.err
    assert [path.name for path in MERGED.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("1.5 kb", 1500), ("2KiB", 2048), ("7MB", 7_000_000),
                                            ("12B", 12), ("5", None), ("GB", None), ("-1GB", None), ("0B", None)])
def test_sizes(text, size):
    from gemma_tune.base.words import size_in_bytes

    assert size_in_bytes(text) == size


def test_a_size_that_is_none_is_refused(cli, trained):
    result = cli("merge", "--max-shard-size", "big")
    assert result.code == 2
    assert "max_shard_size: 'big' is no size" in result.err


# --- a base that is damaged

def lying(path: Path, name: str, **entry) -> None:
    """Write something else into a header, without moving the numbers."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    header[name] |= entry
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length:])


NORM = "model.layers.1.input_layernorm.weight"
DAMAGES = {
    "a shard is missing": (lambda shard: shard.unlink(), "{shard}"),
    "it is cut short": (lambda shard: os.truncate(shard, shard.stat().st_size - 10), "{shard}"),
    "the shape lies": (lambda shard: lying(shard, NORM, shape=[63]), f"{NORM}"),
    "the place lies": (lambda shard: lying(shard, NORM, data_offsets=[0, 128]), "header puts"),
    "the header is longer than the file": (lambda shard: shard.write_bytes(b"\xff" * 7 + b"\0" + b"{}"), "{shard}"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_base_is_refused_before_anything_is_written(sharded, adapter, tmp_path, case):
    from gemma_tune.base.errors import UserError

    damage, said = DAMAGES[case]
    shard = sharded / json.loads((sharded / INDEX).read_text())["weight_map"][NORM]
    damage(shard)
    with pytest.raises(UserError) as raised:
        merged(sharded, adapter, tmp_path / "out")
    assert said.format(shard=shard.name) in " ".join([raised.value.message, *raised.value.problems])
    assert not list((tmp_path / "out").iterdir())


def test_a_base_in_few_bits_is_refused(cli, trained, tiny, tmp_path):
    base = shutil.copytree(tiny, tmp_path / "tiny-gemma-bnb-4bit")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    result = cli("merge", "--adapter", trained / "tiny-gemma_lora_adapter", "--base", base, "--run", "other")
    assert result.code == 2
    assert "tiny-gemma-bnb-4bit is quantised (bitsandbytes)" in result.err and "--base tiny-gemma" in result.err


# --- a merge that breaks off

def test_killed_while_writing(cli, trained, tiny):
    """The earlier model stays whole, and the next command removes what was left behind."""
    assert cli("merge", "--no-check").code == 0
    before, manifest = contents(MERGED), (trained / "manifest.json").read_bytes()
    script = """
import os, signal, sys
from gemma_tune.cli.commands import app
from gemma_tune.merge import weights as merge_weights
blocks = merge_weights.blocks
def broken(piece):
    for block in blocks(piece):
        yield block[:len(block) // 2]
        if piece.name.endswith("layers.1.mlp.up_proj.weight"):
            os.kill(os.getpid(), signal.SIGKILL)
merge_weights.blocks = broken
app(sys.argv[1:])
"""
    done = subprocess.run([sys.executable, "-c", script, "merge", "--no-check", "--force"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path for path in trained.iterdir() if path.name.startswith(".new-")]
    assert left and list(left[0].glob("*.safetensors"))
    assert contents(MERGED) == before and (trained / "manifest.json").read_bytes() == manifest
    again = cli("merge", "--no-check", "--json")
    assert again.json["status"] == "up-to-date"
    assert not [path for path in trained.iterdir() if path.name.startswith(".new-")]


def test_no_room_on_the_disk_is_told_before(cli, trained, monkeypatch):
    from gemma_tune.merge import weights as merge_weights

    usage = shutil.disk_usage(".")
    monkeypatch.setattr(merge_weights.shutil, "disk_usage", lambda path: usage._replace(free=100_000_000))
    result = cli("merge")
    assert result.code == 1
    assert "and 0.10 GB more for what lies beside its weights; 0.10 GB are free" in " ".join(result.err.split()) and "--run" in result.err
    assert not MERGED.exists()


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "the disk is full"), (errno.EFBIG, "--max-shard-size")])
def test_the_disk_fills_up_while_writing(cli, trained, monkeypatch, number, said):
    from gemma_tune.merge import weights as merge_weights

    assert cli("merge", "--no-check").code == 0
    before = contents(MERGED)
    blocks = merge_weights.blocks

    def full(piece):
        yield from blocks(piece)
        if "layers.1" in piece.name:
            raise OSError(number, os.strerror(number), "model.safetensors")

    monkeypatch.setattr(merge_weights, "blocks", full)
    result = cli("merge", "--no-check", "--force")
    assert result.code == 1 and said in result.err
    assert contents(MERGED) == before
    assert not [path for path in trained.iterdir() if path.name.startswith((".new-", ".old-"))]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Through the benchmark, in processes of its own: the weights are more than twice what the merge may add.

    What PyTorch takes before anything is merged is left out: with CUDA's libraries it is over 100 MB more.
    """
    script = ROOT / "tests/benchmarks/merge_export.py"
    done = subprocess.run([sys.executable, script, "merge", "--size", "0.6", "--peft-size", "0", "--json"],
                          capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    [row] = json.loads(done.stdout).values()
    assert row["weights_bytes"] > 500e6
    assert row["ours"]["peak_bytes"] - row["ours"]["imported_bytes"] < 200e6


# --- adapters from elsewhere

def test_an_adapter_from_elsewhere_needs_no_training(cli, trained, tiny, tmp_path):
    away = shutil.move(trained, tmp_path / "away") / Path("tiny-gemma_lora_adapter")
    expected = load_file(tiny / "model.safetensors")
    result = cli("merge", "--adapter", away, "--base", tiny, "--json")
    assert result.code == 0, result.err
    assert result.json["run"] == "runs/tiny-gemma"
    assert result.json["summary"]["check_divergence"] < 1e-3
    assert load_file(MERGED / "model.safetensors").keys() == expected.keys()
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md"} <= contents(MERGED).keys()
    record = json.loads(Path("runs/tiny-gemma/manifest.json").read_text())["stages"]
    assert list(record) == ["merge"]
    assert record["merge"]["inputs"]["outside_adapter"]["path"] == "../../away/tiny-gemma_lora_adapter"
    assert str(tmp_path) not in json.dumps(record)
    status = cli("status", "--json").json
    assert status["stages"]["merge"]["state"] == "done"
    assert status["next"].startswith("gemma-tune export-ollama")
    again = cli("merge", "--json")  # it is remembered
    assert again.json["status"] == "up-to-date", again.err
    before = contents(MERGED)
    refused = cli("run")  # which would train on the example
    assert refused.code == 2 and "away/tiny-gemma_lora_adapter), and `run` would train another one" in refused.err
    assert "gemma-tune export-ollama --run runs/tiny-gemma" in refused.err and contents(MERGED) == before
    path = away / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1}))
    assert cli("status", "--json").json["stages"]["merge"]["state"] == "stale: tiny-gemma_lora_adapter was changed"
    assert cli("merge", "--json", "--no-check").json["status"] == "done"
    shutil.rmtree(away)
    gone = cli("merge")
    assert gone.code == 2 and "there is no directory" in gone.err


def test_its_base_is_the_one_that_it_names(cli, trained, tiny, tmp_path):
    """And without a tokenizer in its folder, it is the base's."""
    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    for path in away.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    config = away / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tiny)}))
    result = cli("merge", "--adapter", away, "--run", "other", "--no-check")
    assert result.code == 0, result.err
    ours = Path("other/tiny-gemma_lora_merged")
    assert (ours / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    result = cli("merge", "--adapter", away, "--run", "third")
    assert result.code == 2
    assert "was trained on /gone/model, which is not here" in result.err and "--base" in result.err


def test_a_base_that_cannot_be_had_keeps_its_kind_of_error(cli, trained, tiny, tmp_path, monkeypatch):
    """What scripts go by: whether a token is missing, the licence, or the network."""
    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    config = away / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "some/model"}))
    with LoopbackHub() as hub:
        hub.add_repo("some/model", tiny, gated=True)
        hub.isolate(monkeypatch, tmp_path / "home")
        found = cli("merge", "--adapter", away, "--run", "other", "--json")
        error = found.json["error"]
        assert (error["kind"], found.code) == ("no_token", 2), error
        assert error["message"].startswith(f"the base model that the adapter {away} names: ")
        assert "hf auth login" in error["hint"] and "--base ID" in error["hint"]
        named = cli("merge", "--adapter", away, "--base", "some/model", "--run", "other", "--json").json["error"]
        assert "hf auth login" in named["hint"]
        assert not any("demo" in hint for hint in (error["hint"], named["hint"])), "it is not what the adapter is for"


@pytest.mark.parametrize("base", ["gone/model.gguf", "some/other"])
def test_a_hint_on_a_base_is_about_the_option_that_named_it(cli, trained, base):
    """It is told of as --model is, which was not given."""
    result = cli("merge", "--base", base)
    assert result.code == 2 and "--base" in result.err and "--model" not in result.err


@pytest.mark.parametrize(("name", "said"), [
    ("nowhere", "there is no directory"), ("file", "there is no directory"), (".", "it has no adapter_config.json")])
def test_what_is_no_adapter_is_refused(cli, tmp_path, name, said):
    (tmp_path / "file").write_text("")
    result = cli("merge", "--adapter", tmp_path / name)
    assert result.code == 2 and said in result.err


def test_a_file_of_an_adapter_is_told_with_its_directory(cli, trained, tiny):
    adapter = trained / "tiny-gemma_lora_adapter"
    for more in ((), ("--base", tiny, "--run", "other")):
        result = cli("merge", "--adapter", adapter / "adapter_model.safetensors", *more)
        assert result.code == 2 and result.err.endswith(f"Hint: name the adapter: {adapter}\n"), result.err


def test_a_run_without_data_of_its_own_asks_for_them_before_a_training(cli, trained, tiny):
    """`prepare` alone would take the built-in example."""
    assert cli("merge", "--adapter", trained / "tiny-gemma_lora_adapter", "--base", tiny, "--run", "other", "--no-check").code == 0
    result = cli("train", "--run", "other")
    assert result.code == 2 and result.err.endswith("Hint: run it first: gemma-tune prepare YOUR.jsonl --run other\n"), result.err


@pytest.mark.parametrize("command", ["chat", "eval", "export-ollama"])
def test_what_came_of_a_run_is_no_model_to_name_instead(cli, trained, command):
    adapter = trained / "tiny-gemma_lora_adapter"
    result = cli(command, "--model", adapter)
    assert result.code == 2 and f"`gemma-tune merge --run runs/{adapter.name} --adapter {adapter}`" in result.err
    assert f"Hint: name that one: --run {trained}; or, as it is an adapter: " in result.err
    merged = trained / "tiny-gemma_lora_merged"
    merged.mkdir()
    run = trained.rename("elsewhere")
    for model in (run / merged.name, run):
        result = cli(command, "--model", model)
        assert result.code == 2 and result.err.endswith(f"Hint: name that one: --run {run}\n"), result.err


def test_a_model_beside_another_programs_manifest_lies_in_no_run(cli, tiny):
    Path("models").mkdir()
    Path("models/manifest.json").write_text('{"name": "x"}')
    shutil.copytree(tiny, "models/gemma")
    result = cli("chat", "--model", "models/gemma", "--prompt", "a")
    assert result.code == 2 and result.err.endswith(
        "Hint: start it: gemma-tune prepare YOUR.jsonl --run runs/gemma --model models/gemma\n"), result.err


def test_a_run_in_the_place_of_its_adapter_is_told_with_the_adapter(cli, trained, tiny, tmp_path):
    run = trained.rename(tmp_path / "a run")
    for more in ((), ("--base", tiny, "--run", "other")):
        result = cli("merge", "--adapter", run, *more)
        assert result.code == 2 and f"name the adapter in it: '{run / 'tiny-gemma_lora_adapter'}'" in result.err, result.err


def test_without_a_chat_template_nothing_is_written(cli, trained, monkeypatch):

    from gemma_tune.encoding import chat_format
    from gemma_tune.merge import stage as merge

    (trained / "tiny-gemma_lora_adapter" / "chat_template.jinja").unlink()
    remember(trained)
    monkeypatch.setattr(chat_format, "family_template", lambda model_type: None)
    monkeypatch.setattr(merge, "write_files", lambda *args: pytest.fail("the weights were written"))
    result = cli("merge")
    assert result.code == 2 and "has no chat template" in result.err and "--no-check" in result.err


def test_a_base_that_was_moved_is_named_once(cli, trained, tiny, tmp_path):
    base = tmp_path / "elsewhere" / "tiny-gemma"
    shutil.copytree(tiny, base)
    manifest = json.loads((trained / "manifest.json").read_text())
    manifest["model"]["path"] = "../../gone/tiny-gemma"
    (trained / "manifest.json").write_text(json.dumps(manifest))
    result = cli("merge", "--no-check")
    assert result.code == 2 and "gone/tiny-gemma" in result.err and "--model DIR/tiny-gemma" in result.err
    assert cli("merge", "--no-check", "--base", base).code == 0
    assert cli("merge", "--no-check", "--json").json["status"] == "up-to-date"


def test_a_run_that_was_moved_says_so_and_asks_for_its_base_once(cli, trained, tiny):
    """The base lies where it always was; what the record leads to is another place."""
    moved = trained.rename(trained.parent.parent.parent / "moved")
    result = cli("merge", "--no-check", "--run", moved)
    assert result.code == 2 and "one of the two was moved" in result.err
    status = cli("status", "--run", moved, "--json").json
    assert status["next"] is None and "one of the two was moved; with its place: " in status["note"]
    assert status["note"].endswith(f"gemma-tune eval --run {moved} --model DIR/tiny-gemma")
    assert cli("chat", "--prompt", "x", "-n", 1, "--run", moved, "--model", tiny).code == 0, "which keeps nothing"
    assert cli("status", "--run", moved, "--json").json["note"] == status["note"]
    assert cli("merge", "--no-check", "--run", moved, "--model", tiny).code == 0
    assert cli("merge", "--no-check", "--run", moved, "--json").json["status"] == "up-to-date"
    assert cli("status", "--run", moved, "--json").json["next"] == f"gemma-tune eval --run {moved}"


def test_licences_and_settings_of_processors_are_copied(cli, trained, tiny, tmp_path):
    base = tmp_path / "base" / "tiny-gemma"
    shutil.copytree(tiny, base)
    kept = ("LICENSE.txt", "LICENCE", "USE_POLICY.md", "NOTICE", "video_preprocessor_config.json")
    for name in kept:
        (base / name).write_text("{}")
    adapter = trained / "tiny-gemma_lora_adapter"
    result = cli("merge", "--no-check", "--adapter", adapter, "--base", base, "--run", "new")
    assert result.code == 0, result.err
    assert {*kept} <= {path.name for path in Path("new/tiny-gemma_lora_merged").iterdir()}


OLD, NEW = "1" * 40, "2" * 40
BASES = {  # what the adapter says of its base, whether it comes from elsewhere: what is said, and whether it is refused
    "another model": ({"base_model_name_or_path": "org/other"}, False, "was trained on org/other", True),
    "another model, as wanted": ({"base_model_name_or_path": "org/other"}, True, "was trained on org/other", False),
    "another commit": ({"base_model_name_or_path": "org/base", "revision": OLD}, True, f"--revision {OLD}", False),
    "the same commit": ({"base_model_name_or_path": "org/base", "revision": NEW}, True, "", False),
    "a branch": ({"base_model_name_or_path": "org/base", "revision": "main"}, False, "", False),
}


@pytest.mark.parametrize("case", BASES)
def test_the_base_that_an_adapter_names(case):
    from gemma_tune.base.errors import UserError
    from gemma_tune.lora.files import Adapter
    from gemma_tune.merge.stage import _compare_bases

    config, outside, said, refused = BASES[case]
    warnings = []
    session = SimpleNamespace(model=SimpleNamespace(source="hub", id="org/base", revision=NEW),
                              config=SimpleNamespace(adapter="there" if outside else None),
                              listener=SimpleNamespace(warn=warnings.append))
    adapter = Adapter(Path("there"), {}, {}, {}, config)
    if refused:
        with pytest.raises(UserError, match=said):
            _compare_bases(session, adapter)
        return
    _compare_bases(session, adapter)
    assert (said in warnings[0]) if said else not warnings


def test_an_adapter_is_not_merged_a_second_time_without_a_word(cli, trained, tiny):
    """Into a model of which it is a part: it fits, and its check compares with the same."""
    assert cli("merge", "--no-check").code == 0
    adapter, merged = trained / "tiny-gemma_lora_adapter", trained / "tiny-gemma_lora_merged"
    told = cli("merge", "--no-check", "--adapter", adapter, "--base", merged, "--run", "twice")
    assert told.code == 0 and "was trained on tiny-gemma; it is merged into tiny-gemma_lora_merged" in " ".join(told.err.split())
    other = cli("merge", "--no-check", "--adapter", adapter, "--base", tiny, "--run", "again", "--json")
    assert other.code == 0 and other.json["warnings"] == []


def test_the_training_of_the_run_wins_when_no_adapter_is_named(cli, trained, tmp_path):
    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    path = away / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 1}))
    assert cli("merge", "--no-check").code == 0
    own = contents(MERGED)["model.safetensors"]
    assert cli("merge", "--no-check", "--adapter", away, "--run", trained).code == 0
    assert contents(MERGED)["model.safetensors"] != own
    assert cli("merge", "--no-check").code == 0
    assert contents(MERGED)["model.safetensors"] == own


def test_an_adapter_of_the_text_part_alone(cli, trained, tiny, tmp_path):
    """Trained on a text model, merged into the multimodal repository that it is the text part of."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    away = shutil.copytree(trained / "tiny-gemma_lora_adapter", tmp_path / "away")
    generator = torch.Generator().manual_seed(1)
    save_file({name: torch.randn(tensor.shape, generator=generator) * 0.2
               for name, tensor in load_file(away / "adapter_model.safetensors").items()},
              away / "adapter_model.safetensors")
    base = tiny
    text = json.loads((base / "config.json").read_text())
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
              "patch_size": 4}
    whole = shutil.copytree(base, tmp_path / "whole")
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    weights = {name.replace("model.", "model.language_model.", 1): t
               for name, t in load_file(base / "model.safetensors").items()}
    lost = model.to(torch.bfloat16).load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys
    model.save_pretrained(whole)
    result = cli("merge", "--adapter", away, "--base", whole, "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["check_divergence"] < 1e-3
    with safe_open("runs/whole/whole_lora_merged/model.safetensors", "pt") as f:
        ours = set(f.keys())
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in ours
    assert ours == set(load_file(whole / "model.safetensors"))


# --- the check

def test_without_the_memory_the_check_is_left_out_with_its_reason(cli, trained, monkeypatch):
    from gemma_tune.models import placement

    monkeypatch.setattr(placement, "available", lambda device: 10_000_000)
    result = cli("merge", "--json")
    assert result.code == 0
    assert "was not compared" in result.err
    assert "0.01 GB are available" in result.json["summary"]["check_skipped"]
    assert "check_divergence" not in result.json["summary"]


def test_the_check_asks_as_many_prompts_as_wanted(cli, trained):
    summary = cli("merge", "--json", "--check-prompts", 3).json["summary"]
    assert summary["check_prompts"] == 3 >= summary["check_same_answers"]
    assert summary["check_divergence"] <= summary["check_max_divergence"] < 0.02
    assert 0.9 < summary["check_same_tokens"] <= 1


# --- the Hub

def test_pushed_to_the_hub(cli, trained, tmp_path, monkeypatch):
    from support.hub import LoopbackHub

    token = "hf_" + "T" * 34
    with LoopbackHub() as hub:
        hub.add_token(token)
        hub.isolate(monkeypatch, tmp_path / "home", token=token)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        refused = cli("merge", "--no-check", "--push", "someone-else/tuned")
        assert refused.code == 2 and not MERGED.exists(), "it is asked before any work"
        result = cli("merge", "--no-check", "--push", "tester/tuned", "--json")
        assert result.code == 0, result.err
        assert "tester/tuned" in result.json["pushed"]
        again = cli("merge", "--no-check", "--push", "tester/tuned", "--json")
        assert again.json["status"] == "up-to-date" and "tester/tuned" in again.json["pushed"]
    assert "pushed" not in json.loads((trained / "manifest.json").read_text())["stages"]["merge"]["summary"]
    assert "gemma-tune" in (MERGED / "README.md").read_text()
