"""Merge: equal to PEFT's own, reloadable by plain transformers, refusing what does not fit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.command import QUICK, write_rows
from support.listener import Said
from support.merging import merged, merged_tensors, peft_merge, remember
from support.models import make_model


@pytest.fixture
def adapter(trained):
    """The trained adapter with weights large enough that a wrong merge shows."""
    folder = trained / "tiny-gemma_lora_adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    remember(trained)
    return folder


def test_equals_pefts_merge(cli, trained, adapter, tiny):
    result = cli("merge", "--json")
    assert result.code == 0, result.err
    ours, theirs = merged_tensors(trained), peft_merge(tiny, adapter)
    base = load_file(tiny / "model.safetensors")
    assert ours.keys() == base.keys()
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name]), name
        changed += not torch.equal(tensor, base[name])
    assert changed == result.json["summary"]["merged_tensors"] == 14
    assert "adding the adapter to 14 tensors of " in result.err and "tensors merged" in result.err


def test_summary_holds_the_check(cli, trained, adapter):
    summary = cli("merge", "--json").json["summary"]
    assert summary["check_divergence"] <= 0.02
    assert summary["check_answer_tokens"] > 0
    assert isinstance(summary["check_same_answer"], bool)


def test_plain_transformers_loads_it(cli, trained, adapter, tiny):
    assert cli("merge").code == 0
    script = """
import sys, json
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True)
assert not any(info.values()), info
assert "gemma_tune" not in sys.modules
print(json.dumps([text, type(model).__name__, model.generation_config.eos_token_id, str(model.dtype)]))
"""
    done = subprocess.run([sys.executable, "-c", script, trained / "tiny-gemma_lora_merged"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    text, kind, eos, dtype = json.loads(done.stdout)
    assert text == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert (kind, dtype, len(eos)) == ("Gemma3ForCausalLM", "torch.bfloat16", 2)
    files = {p.name for p in (trained / "tiny-gemma_lora_merged").iterdir()}
    assert {"tokenizer.model", "tokenizer.json", "chat_template.jinja", "generation_config.json", "config.json"} <= files
    assert not files & {"adapter_config.json", "adapter_model.safetensors", "complete.json"}
    assert (trained / "tiny-gemma_lora_merged" / "tokenizer.model").read_bytes() == (tiny / "tokenizer.model").read_bytes()


def test_shards_stay_as_they_are(trained, adapter, tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    base, out = tmp_path / "sharded", tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(base, max_shard_size="40KB")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    assert len(shards) > 2
    merged(base, adapter, out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == shards
    expected = peft_merge(tiny, adapter)
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for name, shard in index.items():
        with safe_open(out / shard, "pt") as f:
            assert torch.equal(f.get_tensor(name), expected[name])


def test_a_wrong_merge_is_noticed_and_not_kept(cli, trained, adapter, monkeypatch):
    from gemma_tune.merge import weights as merge_weights

    right = merge_weights._Change.delta
    monkeypatch.setattr(merge_weights._Change, "delta", lambda self, *rows: -right(self, *rows))
    result = cli("merge")
    assert result.code == 1
    assert "differs from base + adapter" in result.err
    assert not (trained / "tiny-gemma_lora_merged").exists()
    assert "merge" not in json.loads((trained / "manifest.json").read_text())["stages"]


@pytest.mark.parametrize(("divergence", "effect", "kept"), [
    (4e-3, 5e-4, True), (0.02, 1.0, True), (7e-3, 8e-3, False), (0.3, 1.0, False), (float("nan"), 1.0, False)])
def test_a_merge_is_not_kept_that_differs_as_much_as_the_adapter_changes(divergence, effect, kept):
    from gemma_tune.base.errors import WorkFailed
    from gemma_tune.merge.check import _judge

    figures = {"check_divergence": divergence, "check_adapter_effect": effect, "check_prompts": 3, "check_same_answers": 3}
    listener = Said()
    if kept:
        assert _judge(SimpleNamespace(listener=listener), figures) == figures
    else:
        with pytest.raises(WorkFailed, match="it was not kept"):
            _judge(SimpleNamespace(listener=listener), figures)


@pytest.mark.parametrize("ended", [True, False])
def test_what_would_come_behind_a_limit_makes_no_other_answer(ended):
    from gemma_tune.merge.check import _Reading, compare

    before = torch.full((3, 4), 0.1).fill_diagonal_(0.7).log()  # two tokens, and what follows them
    after = before.clone()
    after[2] = before[1]
    answers = [SimpleNamespace(ended=ended, tokens=2)]
    figures = compare(_Reading(answers, [before]), lambda n: after)
    assert figures["check_same_answer"] is not ended and figures["check_same_tokens"] == pytest.approx(2 / 3)
    after[1] = before[0]
    assert not compare(_Reading(answers, [before]), lambda n: after)["check_same_answer"]


@pytest.mark.parametrize(("divergence", "effect", "same", "told"), [
    (0.01, 1.0, 3, None), (4e-3, 6e-3, 3, "takes back a part of what the adapter changes"),
    (1e-5, 1.0, 2, "1 of 3 greedy answers"), (0.0, 0.0, 3, None)])
def test_what_rounding_takes_back_is_told(divergence, effect, same, told):
    from gemma_tune.merge.check import _judge

    listener = Said()
    _judge(SimpleNamespace(listener=listener), {"check_divergence": divergence, "check_adapter_effect": effect,
                                                "check_prompts": 3, "check_same_answers": same})
    assert bool(told) == bool(listener.warnings) and (told or "") in " ".join(listener.warnings)
    assert all("--dtype fp32" in text for text in listener.warnings)


def test_all_chat_templates_of_the_base_stay_where_the_adapter_has_no_tokenizer(cli, trained, tiny, tmp_path):
    from transformers import AutoTokenizer

    base = shutil.copytree(tiny, tmp_path / "base" / tiny.name)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    own = trained / "tiny-gemma_lora_adapter"
    bare = shutil.copytree(own, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    for adapter, source in ((bare, base), (own, own)):
        done = cli("merge", "--adapter", adapter, "--base", base, "--run", "other", "--no-check", "--force", "--json")
        assert done.code == 0, done.err
        [merged] = Path("other").glob("*_lora_merged")
        templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (merged, source)]
        assert templates[0] == templates[1] and ("tool_use" in templates[0]) == (adapter == bare)
        files = [path.stat().st_size for path in merged.rglob("*") if path.is_file()]
        assert done.json["summary"]["bytes"] == sum(files)


def test_a_failed_merge_leaves_the_earlier_one(cli, trained, monkeypatch):
    from gemma_tune.merge import stage as merge

    assert cli("merge").code == 0
    before = {p.name: p.read_bytes() for p in (trained / "tiny-gemma_lora_merged").iterdir()}
    manifest = (trained / "manifest.json").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device", "model.safetensors")

    monkeypatch.setattr(merge, "_copy_around", full)
    result = cli("merge", "--force")
    assert result.code == 1
    assert "the disk is full" in result.err
    assert {p.name: p.read_bytes() for p in (trained / "tiny-gemma_lora_merged").iterdir()} == before
    assert (trained / "manifest.json").read_bytes() == manifest
    assert not [p for p in trained.iterdir() if p.name.startswith((".new-", ".old-"))]


def test_an_adapter_of_another_base_model_is_refused(cli, trained, tmp_path):
    """The run names a model whose weights are others now: the adapter must not be merged into them."""
    other = make_model(tmp_path / "other" / "tiny-gemma", seed=5)
    for args in (["merge"], ["eval"], ["chat", "--prompt", "hi"]):
        result = cli(*args, "--run", trained, "--model", other)
        assert result.code == 2, args
        assert "another base model" in result.err or "belongs to" in result.err
        assert "gemma-tune train" in result.err
    assert not (trained / "tiny-gemma_lora_merged").exists()


def test_a_run_of_another_model_is_refused(cli, trained, tmp_path):
    other = make_model(tmp_path / "bigger", hidden_size=96)
    result = cli("merge", "--run", trained, "--model", other)
    assert result.code == 2
    assert "is a run of tiny-gemma, not of" in result.err
    assert "--run" in result.err


@pytest.mark.parametrize("command", ["train", "merge", "status", "export-ollama"])
def test_a_run_of_another_model_is_told_before_the_hub_is_asked(cli, trained, command, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody there
    result = cli(command, "--run", trained, "--model", "google/gemma-3-4b-it")
    assert result.code == 2
    assert f"{trained} is a run of tiny-gemma, not of google/gemma-3-4b-it" in result.err
    assert cli("status", "--run", trained, "--model", "tiny-gemma").code == 0
    assert "is a run of" not in cli("merge", "--run", trained, "--model", "https://huggingface.co/google/gemma-3-4b-it").err


@pytest.mark.parametrize("change", [{"lora_bias": True}, {"peft_type": "LOHA"},
                                    {"bias": "all"}, {"use_qalora": True}, {"layer_replication": [[0, 2]]}])
def test_kinds_that_are_not_merged_are_refused(cli, trained, change):
    path = trained / "tiny-gemma_lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    remember(trained)
    result = cli("merge")
    assert result.code == 2
    assert next(iter(change)) in result.err


def test_an_adapter_without_a_part_is_named(cli, trained):
    path = trained / "tiny-gemma_lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    remember(trained)
    result = cli("merge")
    assert result.code == 2
    assert "lacks base_model.model.model.layers.0" in result.err and "lora_magnitude_vector" in result.err


def test_a_damaged_adapter_is_named(cli, trained):
    path = trained / "tiny-gemma_lora_adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    changed = cli("merge")
    assert changed.code == 2 and "tiny-gemma_lora_adapter was changed" in changed.err
    remember(trained)
    damaged = cli("merge")
    assert damaged.code == 2 and "cannot be read" in damaged.err
    shutil.rmtree(trained / "tiny-gemma_lora_adapter")
    gone = cli("merge")
    assert gone.code == 2 and "is gone" in gone.err and "gemma-tune train" in gone.err


def test_merge_works_without_the_data(cli, trained):
    shutil.rmtree(trained / "data")
    result = cli("merge", "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["check_answer_tokens"] > 0


class Letters:
    """A chat format with one token per letter of a turn, which refuses an empty list of tools."""

    def prompt_ids(self, messages, tools=None):
        from gemma_tune.encoding.chat_format import FormatError

        if tools == ["refused"]:
            raise FormatError("no tools")
        return [ord(letter) for turn in messages for letter in turn["content"]]

    def encode_text(self, text):
        return SimpleNamespace(ids=[2, *map(ord, text), 1])


def chat_row(question: str, **more) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "a"}], **more}


@pytest.mark.parametrize(("valid", "train", "expected"), [
    ([chat_row("held out")], [chat_row("trained")], "held out"),
    ([], [chat_row("trained")], "trained"),
    ([chat_row("x" * 101), chat_row("y" * 100)], [], "y" * 100),
    ([chat_row("x" * 101)], [chat_row("trained")], "trained"),
    ([chat_row("refused", tools=["refused"]), chat_row("held out", tools=["fine"])], [], "held out"),
    ([{"text": "abcdefgh"}], [chat_row("trained")], "\2abcd"),
    ([], [], None), (None, None, None)])
def test_the_check_asks_the_first_prompt_that_fits(tmp_path, valid, train, expected):
    from gemma_tune import samples
    from gemma_tune.merge.check import ANSWER_TOKENS, _prompts

    for name, records in (("valid", valid), ("train", train)):
        if records is not None:
            write_rows(tmp_path / name, records)
    session = SimpleNamespace(run=SimpleNamespace(valid_rows=tmp_path / "valid", train_rows=tmp_path / "train", tokens=tmp_path),
                              config=SimpleNamespace(check_prompts=1), settings_of=lambda stage: {"max_length": 100},
                              model=SimpleNamespace(config={"max_position_embeddings": 300 + ANSWER_TOKENS}))
    expected = samples.heldout_questions()[0]["messages"][-1]["content"] if expected is None else expected
    [ids] = _prompts(session, Letters())
    assert "".join(map(chr, ids)).endswith(expected)
    session.settings_of, session.model.config = lambda stage: {}, {"max_position_embeddings": 100 + ANSWER_TOKENS}
    [ids] = _prompts(session, Letters())
    assert len(ids) <= 100 or valid in ([], None)


def test_a_model_of_plain_text_is_checked_too(cli, tiny, tmp_path):
    texts = [{"text": f"Box {n}: the quick brown fox jumps over the lazy dog."} for n in range(8)]
    for args in (("prepare", write_rows(tmp_path / "texts.jsonl", texts), "--model", tiny), ("train", *QUICK)):
        result = cli(*args)
        assert result.code == 0, result.err
    result = cli("merge", "--json")
    assert result.code == 0, result.err
    assert result.json["summary"]["check_answer_tokens"] > 0
    assert result.json["summary"]["check_divergence"] <= 0.02
