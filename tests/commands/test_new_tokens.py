"""--new-tokens: named, learned, saved as PEFT has it, merged, exported, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.lora.fold import fold
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.train.trials import Trials
from support.command import MANIFEST_SCHEMA, write_rows
from support.llamas import TURNS, make_llama
from support.merging import merged_tensors, peft_merge
from support.models import make_model
from support.training import adapter_bytes, stop_at

NEW = ("<plan>", "<label_7>")
RUN = Path("runs/tiny-gemma")
ADAPTER, MERGED = RUN / "tiny-gemma_lora_adapter", RUN / "tiny-gemma_lora_merged"
LEARN = ("--epochs", 2, "--learning-rate", 5e-3, "--rank", 4, "--dtype", "fp32", "--json")
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
TEXT = "Say 3, <plan> or<label_7>!"


def talks(count: int = 12) -> list[dict]:
    return [{"messages": [{"role": "user", "content": f"Say {n}, <plan> please."},
                          {"role": "assistant", "content": f"<label_7> It is {n}. <plan>"}]} for n in range(count)]


@pytest.fixture(scope="session")
def unused(tmp_path_factory) -> Path:
    """A tiny Gemma with unused entries in its vocabulary."""
    return make_model(tmp_path_factory.mktemp("unused") / "tiny-gemma", more=tuple(f"<unused{n}>" for n in range(4)))


@pytest.fixture
def prepared(cli, unused, tmp_path):
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", talks()), "--model", unused, "--new-tokens", ",".join(NEW))
    assert result.code == 0, result.err
    assert "new tokens, in place of unused ones: <plan> (6), <label_7> (7)" in result.err
    return RUN


def done(cli, *args: object):
    result = cli(*args)
    assert result.code == 0, result.err
    return result


def rows_of(run: Path = RUN) -> torch.Tensor:
    return load_file(run / "tiny-gemma_lora_adapter" / "adapter_model.safetensors")[ROWS]


def test_tokens_are_learned_loaded_merged_and_exported(cli, prepared, unused):
    summary = done(cli, "train", *LEARN).json["summary"]
    base = load_file(unused / "model.safetensors")["model.embed_tokens.weight"]
    assert summary["trainable_parameters"] == sum(t.numel() for t in load_file(ADAPTER / "adapter_model.safetensors").values())
    assert summary["eval_loss_after"] < 0.9 * summary["eval_loss_before"]
    assert json.loads((ADAPTER / "adapter_config.json").read_text())["trainable_token_indices"] == {"embed_tokens": [6, 7]}
    old = AutoTokenizer.from_pretrained(unused)(NEW[0], add_special_tokens=False).input_ids
    start = base[old].float().mean(0)
    assert len(old) > 1 and 0 < (rows_of()[0] - start).norm() < (base[6].float() - start).norm()

    tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
    assert len(tokenizer) == len(base) and "<unused0>" not in tokenizer.get_vocab() and "<unused2>" in tokenizer.get_vocab()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert [ids[0].tolist().count(i) for i in (6, 7)] == [1, 1] and tokenizer.decode(ids[0], skip_special_tokens=True) == TEXT
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(unused, dtype=torch.float32), ADAPTER)
    ours = add_adapter(load_model(unused, choose_placement("fp32")), ADAPTER)
    with torch.no_grad():
        tuned = ours(input_ids=ids).logits
        torch.testing.assert_close(tuned, theirs(input_ids=ids).logits)
        with ours.disable_adapter(), theirs.disable_adapter():
            torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
        torch.testing.assert_close(ours(input_ids=ids).logits, tuned)
        folded = fold(ours)
        torch.testing.assert_close(folded(input_ids=ids).logits, tuned, atol=1e-4, rtol=1e-4)

    done(cli, "merge")
    expected = peft_merge(unused, ADAPTER)
    found = merged_tensors(RUN)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6 if "embed" in name else 4e-3)
    assert torch.equal(found["model.embed_tokens.weight"][6:8], rows_of().bfloat16())
    assert AutoTokenizer.from_pretrained(MERGED)(TEXT).input_ids == ids[0].tolist()
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(MERGED / "tokenizer.model"))
    assert [pieces.id_to_piece(i) for i in (6, 7, 8)] == [*NEW, "<unused2>"]
    jsonschema.validate(json.loads((RUN / "manifest.json").read_text()), MANIFEST_SCHEMA)

    done(cli, "eval", "--quiet")
    result = done(cli, "export-ollama", "--quant", "f16")
    assert "128/128 (100.0 %)" in result.err and "token ids of whole prompts" in result.err and "different" not in result.err
    metadata = read_gguf_metadata(RUN / "ollama" / "tiny-gemma-f16.gguf")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert [bytes(tokens[i]).decode() for i in (6, 7)] == [*NEW] and [types[i] for i in (6, 7)] == [4, 4]


def named_qwen(folder: Path) -> int:
    """A tiny Qwen with a head of its own and rows behind its last token; returns how many tokens it has."""
    _, tokenizer = make_llama("qwen2", folder)
    tokenizer.chat_template = TURNS
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def test_rows_behind_the_last_token_of_a_model_with_a_head(cli, tmp_path):
    folder = tmp_path / "qwen"
    run, count = Path("runs/qwen"), named_qwen(folder)
    data = write_rows(tmp_path / "rows.jsonl", talks())
    refused = cli("prepare", data, "--model", folder, "--new-tokens", "<a>,<b>,<c>,<d>")
    assert refused.code == 2 and "4 new tokens are named, and the model's vocabulary" in refused.err and "3 unused entries" in refused.err
    done(cli, "prepare", data, "--model", folder, "--new-tokens", ",".join(NEW))
    done(cli, "train", *LEARN)
    adapter = run / "qwen_lora_adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"] == {
        "embed_tokens": [count, count + 1], "lm_head": [count, count + 1]}
    ids = AutoTokenizer.from_pretrained(adapter)(TEXT, return_tensors="pt").input_ids
    assert {count, count + 1} < {*ids[0].tolist()}
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    ours = add_adapter(load_model(folder, choose_placement("fp32")), adapter)
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    done(cli, "merge")
    merged = run / "qwen_lora_merged"
    assert AutoTokenizer.from_pretrained(merged)(TEXT).input_ids == ids[0].tolist()
    learned, tensors = load_file(adapter / "adapter_model.safetensors"), load_file(merged / "model.safetensors")
    for name in ("model.embed_tokens", "lm_head"):
        rows = learned[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
        assert torch.equal(tensors[f"{name}.weight"][count:count + 2], rows.bfloat16())
    done(cli, "export-ollama", "--quant", "f16", "--no-measure")
    metadata = read_gguf_metadata(run / "ollama" / "qwen-f16.gguf")
    assert [bytes(metadata["tokenizer.ggml.tokens"][count + n]).decode() for n in range(2)] == [*NEW]
    assert metadata["tokenizer.ggml.token_type"][count:count + 3].tolist() == [4, 4, 5]


@pytest.mark.parametrize(("rows", "said"), [
    ({"embed_tokens": (1, 0), "lm_head": (1, 0)}, None),
    ({"embed_tokens": (0, 1)}, "it has rows of new tokens in model.embed_tokens, and the base has them in model.embed_tokens and lm_head"),
    ({"embed_tokens": (0, 1), "lm_head": (0,)}, "lm_head and model.embed_tokens have rows of different tokens")], ids=str)
def test_an_adapter_of_pefts_goes_on_with_the_rows_that_it_has(cli, tmp_path, rows, said):
    """Whatever their order."""
    folder, theirs = tmp_path / "qwen", tmp_path / "theirs"
    count = named_qwen(folder)
    done(cli, "prepare", write_rows(tmp_path / "rows.jsonl", talks()), "--model", folder, "--new-tokens", ",".join(NEW))
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices={
        name: [count + place for place in places] for name, places in rows.items()})
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.copy_(torch.tensor(rows["lm_head" if "lm_head" in name else "embed_tokens"])[:, None] + 1.0)
    tuned.save_pretrained(theirs)
    result = cli("train", "--max-steps", 1, "--learning-rate", 1e-6, "--from-adapter", theirs, "--dtype", "fp32")
    assert result.code == (2 if said else 0) and (said or "") in result.err, result.err
    if not said:
        learned = load_file(Path("runs/qwen/qwen_lora_adapter/adapter_model.safetensors"))
        for name in ("model.embed_tokens", "lm_head"):
            found = learned[f"base_model.model.{name}.token_adapter.trainable_tokens_delta"]
            torch.testing.assert_close(found, torch.tensor([[1.0], [2.0]]).expand_as(found), rtol=0, atol=1e-4)


@pytest.mark.parametrize("flags", [("--full",), ("--modules-to-save", "embed_tokens", "--rank", 4)])
def test_a_whole_embedding_begins_with_the_rows(cli, prepared, unused, flags):
    done(cli, "train", "--max-steps", 1, "--learning-rate", 1e-6, "--dtype", "fp32", *flags)
    assert json.loads((ADAPTER / "adapter_config.json").read_text())["trainable_token_indices"] is None
    tensors = load_file(ADAPTER / "adapter_model.safetensors")
    [name] = [name for name in tensors if name.endswith("embed_tokens.weight")]
    base = load_file(unused / "model.safetensors")["model.embed_tokens.weight"]
    old = AutoTokenizer.from_pretrained(unused)(NEW[1], add_special_tokens=False).input_ids
    torch.testing.assert_close(tensors[name][7].float(), base[old].float().mean(0), rtol=1e-2, atol=1e-3)
    done(cli, "merge")
    assert torch.equal(merged_tensors(RUN)["model.embed_tokens.weight"][7], tensors[name][7].bfloat16())


def test_a_training_that_was_stopped_ends_with_the_same_rows(cli, prepared, monkeypatch):
    done(cli, "train", *LEARN, "--save-steps", 2)
    whole = adapter_bytes(RUN)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert cli("train", *LEARN, "--save-steps", 2, "--force").code == 130
    done(cli, "train", *LEARN, "--save-steps", 2)
    assert adapter_bytes(RUN) == whole


def test_an_adapter_goes_on_with_its_own_tokens_alone(cli, prepared, unused, tmp_path):
    done(cli, "train", *LEARN)
    before = rows_of()
    done(cli, "train", *LEARN, "--from-adapter", ADAPTER, "--max-steps", 1, "--learning-rate", 1e-6, "--force")
    torch.testing.assert_close(rows_of(), before, rtol=0, atol=1e-4)
    other = ("--model", unused, "--run", "runs/other")
    done(cli, "prepare", tmp_path / "rows.jsonl", *other)
    refused = cli("train", *LEARN, "--run", "runs/other", "--from-adapter", ADAPTER)
    assert refused.code == 2 and "it has rows of 2 new tokens, and the run was prepared without --new-tokens" in refused.err
    done(cli, "train", *LEARN, "--run", "runs/other", "--epochs", 1)
    plain = tmp_path / "runs/other/tiny-gemma_lora_adapter"
    refused = cli("train", *LEARN, "--run", RUN, "--from-adapter", plain)
    assert refused.code == 2 and "it has no rows of new tokens" in refused.err
    done(cli, "prepare", tmp_path / "rows.jsonl", *other, "--new-tokens", "<label_7>,<plan>")
    done(cli, "prepare", tmp_path / "rows.jsonl", "--run", RUN, "--new-tokens", "<label_7>,<plan>")
    for command in (("train", *LEARN, "--run", "runs/other", "--from-adapter", ADAPTER),
                    ("tune", "--learning-rates", "5e-3,1e-3", "--run", RUN)):  # which starts from it as the last training did
        refused = cli(*command)
        assert refused.code == 2 and "its token 6 is '<plan>', and the run's is '<label_7>'" in refused.err
    done(cli, "prepare", tmp_path / "rows.jsonl", *other, "--new-tokens", "<x>,<plan>,<label_7>")
    refused = cli("train", *LEARN, "--run", "runs/other", "--from-adapter", ADAPTER)
    assert refused.code == 2 and "it has rows of 2 new tokens (6, 7), and those of the run are others" in refused.err


@pytest.mark.parametrize("flags", [("--ranks", "2,4"), ("--full",)])
def test_each_candidate_of_tune_begins_with_the_same_rows(cli, prepared, unused, flags, monkeypatch):
    plain, began = Trials._restart, []

    def restart(trials):
        plain(trials)
        weights = dict(trials._trainer.model.named_parameters())
        [rows] = [weight for name, weight in weights.items() if weight.requires_grad and (
            "embed_tokens.modules_to_save" in name or "trainable_tokens_delta" in name)]
        began.append(rows.detach()[[0, 1] if len(rows) == 2 else [6, 7]].clone())

    monkeypatch.setattr(Trials, "_restart", restart)
    done(cli, "tune", "--learning-rates", "5e-3,1e-3", *flags)
    old = AutoTokenizer.from_pretrained(unused)(NEW[0], add_special_tokens=False).input_ids
    start = load_file(unused / "model.safetensors")["model.embed_tokens.weight"][old].float().mean(0)
    assert len(began) > 1 and all(torch.equal(rows, began[0]) for rows in began)
    torch.testing.assert_close(began[0][0], start, rtol=1e-2, atol=1e-3)


def test_preferences_begin_with_the_rows_as_reference(cli, unused, tmp_path):
    pairs = [{"prompt": f"Say {n}.", "chosen": f"<plan> {n}", "rejected": f"<label_7> {n}"} for n in range(12)]
    done(cli, "prepare", write_rows(tmp_path / "pairs.jsonl", pairs), "--model", unused, "--new-tokens", ",".join(NEW))
    summary = done(cli, "train", *LEARN, "--learning-rate", 1e-3).json["summary"]
    assert summary["method"] == "dpo" and summary["eval_loss_after"] < summary["eval_loss_before"] == pytest.approx(0.693, abs=1e-3)


def test_the_reference_is_that_of_the_rows_as_they_begin(cli, unused, tmp_path):
    """Which other names have otherwise, also where the tokens are the same."""
    for names in (NEW, NEW, ("<other>", "<b>")):
        pairs = [{"prompt": f"Say {n}.", "chosen": f"{names[0]} {n}", "rejected": f"{names[1]} {n}"} for n in range(12)]
        done(cli, "prepare", write_rows(tmp_path / "pairs.jsonl", pairs), "--model", unused, "--new-tokens", ",".join(names))
        last = done(cli, "train", "--max-steps", 1, "--rank", 4, "--dtype", "fp32", "--force")
        assert ("log-probabilities of the reference: as kept" in last.err) is (names == NEW and RUN.joinpath("seen").exists())
        RUN.joinpath("seen").touch()


def test_a_run_keeps_its_tokens_until_they_are_taken_back(cli, prepared, tmp_path):
    more = write_rows(tmp_path / "more.jsonl", [row for row in talks(20) if "1" in row["messages"][0]["content"]])
    kept = done(cli, "prepare", more, "--run", RUN)
    assert "new tokens: <plan>, <label_7>, as before" in kept.err and "<plan> (6)" in kept.err
    assert "<plan> (6)" not in done(cli, "prepare", more, "--run", RUN, "--new-tokens", "none").err
    assert json.loads((RUN / "manifest.json").read_text())["stages"]["prepare"]["config"]["new_tokens"]["value"] == []
    unseen = done(cli, "prepare", more, "--run", RUN, "--new-tokens", "<plan>,<other>", "--preview", 1)
    assert "1 new token is in no training row, and will mean nothing: <other>" in unseen.err and "<plan> please" in unseen.err


@pytest.mark.parametrize(("names", "said"), [
    ("<plan>,<end_of_turn>", "'<end_of_turn>' is one token of this model already (5), which needs no new one"),
    ("<a>,<b>,<c>,<d>,<e>", "5 new tokens are named, and the model's vocabulary of"),
    ("<plan>,<a b>", "new_tokens: '<a b>' has white space in it"), ("<a>,<b>,<a>", "new_tokens: '<a>' is named 2 times"),
    ("none,<a>", "new_tokens: `none` stands alone")])
def test_names_that_cannot_be_taken_are_refused(cli, unused, tmp_path, names, said):
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", talks()), "--model", unused, "--new-tokens", names)
    assert result.code == 2 and said in result.err and "Traceback" not in result.err and not RUN.joinpath("data").exists()


def test_a_model_without_unused_entries_says_so(cli, tiny, tmp_path):
    result = cli("prepare", write_rows(tmp_path / "rows.jsonl", talks()), "--model", tiny, "--new-tokens", "<plan>")
    assert result.code == 2 and "has 0 unused entries" in result.err and "leave --new-tokens out" in result.err


def test_names_that_are_hidden_are_told_of(cli, unused, tmp_path):
    rows = json.loads(json.dumps(talks()).replace("<plan>", "<|plan|>"))
    result = done(cli, "prepare", write_rows(tmp_path / "rows.jsonl", rows), "--model", unused, "--new-tokens", "<|plan|>")
    assert "take <|plan|> for control tokens" in result.err and result.err.count("foreign") == 0


def test_a_divided_model_has_no_new_tokens(cli, prepared):
    result = cli("train", *LEARN, "--strategy", "fsdp", "--num-processes", 2, "--dry-run")
    assert result.code == 2 and "cannot be learned with --strategy fsdp" in result.err
