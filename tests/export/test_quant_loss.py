"""What a format costs, against plain cross-entropy on independently decoded files; and the check after each export."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.export import quant_loss
from gemma_tune.export.quant_loss import validation_rows
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.check import MOST_OF_OUTPUT, worst_error
from gemma_tune.gguf.compensated import Rounded
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.gguf.types import QUANTS
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.measure import likelihood
from gemma_tune.measure.likelihood import wanted_of
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.run.directory import RunDir
from gemma_tune.run.manifest import Manifest
from support.gemmas import FAMILIES, make_family, write_gemma4_tokenizer
from support.gguf import LlamaCpp, make_checkpoint, train_sentencepiece
from support.llamas import EXPERTS, make_llama, save_random, tokenizer_with_turns

SIZES = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Rows of 256, so that the K types are not replaced; a head of its own, as with the embedding for a head a random
    model only repeats the last token; tensors in several files."""
    folder = tmp_path_factory.mktemp("models") / "model"
    make_checkpoint(folder, train_sentencepiece(), shard_size="300KB", tie_word_embeddings=False, **SIZES)
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def twice(tmp_path_factory) -> Path:
    """A model whose files hold a head that equals the embedding: the GGUF holds one of them."""
    folder = tmp_path_factory.mktemp("models") / "twice"
    make_checkpoint(folder, train_sentencepiece(), tie_word_embeddings=False, **SIZES)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def architecture(folder: Path):
    return architecture_of(json.loads((folder / "config.json").read_text()), folder / "config.json")


def export(folder: Path, out: Path, quant: str) -> Path:
    return write_gguf(folder, out / f"{quant}.gguf", quant, name="m", chat_template=None, eot_token_id=None).path


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("files")
    return {quant: export(checkpoint, out, quant) for quant in QUANTS}


def rows(lengths: tuple[int, ...] = (30, 12, 40)) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(2)
    found = []
    for length in lengths:
        ids = rng.integers(6, 380, length)
        labels = np.where(rng.random(length) < 0.5, ids, -100)
        labels[0] = ids[0]  # nothing predicts a row's first token
        found.append({"input_ids": ids, "labels": labels})
    return found


def measure(model, rows, files, architecture, limit: int | None = None, **settings):
    """The losses of one text."""
    return quant_loss.measure(model, {"rows": wanted_of(rows, limit)}, files, architecture, **settings).get("rows", {})


def loaded(folder: Path) -> torch.nn.Module:
    """The model in fp32, with capped logits, as Gemma 2 and 4 have them."""
    model = load_model(folder, choose_placement("fp32"))
    model.config.final_logit_softcapping = 15.0
    return model


def decoded_model(folder: Path, path: Path) -> torch.nn.Module:
    """A second model with a file's values, which the gguf package read and decoded."""
    model = loaded(folder)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, SIZES["num_hidden_layers"])
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = stored.get(names.get_name(name, (".weight",)), stored["token_embd.weight"])
            parameter.copy_(torch.from_numpy(values - 1 if name.endswith("norm.weight") else values))
    return model


def log_probabilities(model: torch.nn.Module, limit: int = 10**6) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the learned tokens, one after the other: the distributions (n, vocabulary), and the tokens (n)."""
    found, labels = [], []
    with torch.no_grad():
        for row in rows():
            ids, wanted = torch.from_numpy(row["input_ids"]), torch.from_numpy(row["labels"])[1:]
            found.append(torch.log_softmax(model(ids[None]).logits[0, :-1].double(), -1)[wanted != -100])
            labels.append(wanted[wanted != -100])
    return torch.cat(found)[:limit], torch.cat(labels)[:limit]


def test_each_format_against_plain_cross_entropy(checkpoint, files):
    wanted = {quant: files[quant] for quant in ("q8_0", "q4_k_m", "q5_1", "f16")}
    steps = []
    found = measure(loaded(checkpoint), rows(), wanted, architecture(checkpoint),
                    on_progress=lambda *at: steps.append(at))
    reference, labels = log_probabilities(decoded_model(checkpoint, files["f16"]))
    assert list(found) == ["f16", "q8_0", "q4_k_m", "q5_1"] and steps == [(n, 5) for n in range(6)]
    for quant, loss in found.items():
        theirs, _ = log_probabilities(decoded_model(checkpoint, files[quant]))
        assert loss.perplexity == pytest.approx(torch.exp(-theirs.gather(1, labels[:, None]).mean()).item(), rel=1e-4)
        divergence = (reference.exp() * (reference - theirs)).sum(1).mean().item()
        assert loss.kl == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert loss.agreement == (reference.argmax(1) == theirs.argmax(1)).double().mean().item()
        assert loss.tokens == len(labels)
    assert found["f16"].kl < 1e-6 < found["q8_0"].kl < found["q5_1"].kl < found["q4_k_m"].kl
    assert found["f16"].agreement == 1 > found["q4_k_m"].agreement


def test_several_texts_are_measured_while_a_files_weights_are_in(checkpoint, files, monkeypatch):
    put, opened = quant_loss._put, []
    monkeypatch.setattr(quant_loss, "_put", lambda weights, file, model: opened.append(file.path) or put(weights, file, model))
    texts = {"long": wanted_of(rows((50, 8))), "short": wanted_of(rows((9,))), "nothing": wanted_of([])}
    wanted = {quant: files[quant] for quant in ("q4_0", "q8_0")}
    found = quant_loss.measure(loaded(checkpoint), texts, wanted, architecture(checkpoint))
    assert opened == [*wanted.values()] and list(found) == ["long", "short"]
    for name, lengths in (("long", (50, 8)), ("short", (9,))):
        assert found[name] == measure(loaded(checkpoint), rows(lengths), wanted, architecture(checkpoint))
    assert quant_loss.measure(loaded(checkpoint), {"nothing": []}, wanted, architecture(checkpoint)) == {}


def test_what_predicts_nothing_finite_has_no_figures(checkpoint, files, tmp_path):
    """A format by itself; where it is f16, with which all are compared, none has."""
    wanted = {"q8_0": files["q8_0"]}
    texts = {"rows": wanted_of(rows())}
    broken = tmp_path / "broken.gguf"
    shutil.copyfile(wanted["q8_0"], broken)
    reader = gguf.GGUFReader(broken, "r+")
    next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight").data[:] = np.nan
    del reader
    found = quant_loss.measure(loaded(checkpoint), texts, {**wanted, "q4_0": broken}, architecture(checkpoint))
    assert list(found["rows"]) == ["f16", "q8_0"]
    model = loaded(checkpoint)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = 1e5
    assert quant_loss.measure(model, texts, wanted, architecture(checkpoint)) == {}
    assert quant_loss._perplexity(1e4) == float("inf")


def test_entries_that_are_not_kept_count_as_one(checkpoint, files, monkeypatch):
    monkeypatch.setattr(quant_loss, "_KEPT", 100)
    monkeypatch.setattr(likelihood, "_LOGITS", 383 * 5)  # five positions at a time
    found = measure(loaded(checkpoint), rows(), {"q4_0": files["q4_0"]}, architecture(checkpoint))["q4_0"].kl
    reference, theirs = (log_probabilities(decoded_model(checkpoint, files[q]))[0].exp() for q in ("f16", "q4_0"))
    kept = reference.topk(100).indices
    lumped = [torch.cat([p.gather(1, kept), 1 - p.gather(1, kept).sum(1, keepdim=True)], 1) for p in (reference, theirs)]
    whole, expected = ((p * (p / q).log()).sum(1).mean().item() for p, q in ((reference, theirs), lumped))
    assert found == pytest.approx(expected, rel=1e-3)
    assert 0.8 * whole < found < whole  # lumping entries together never adds to a divergence


@pytest.mark.parametrize("family", [*FAMILIES, "llama3", "biases", *EXPERTS])
def test_every_family_is_measured_as_it_computes(family, tmp_path):
    """Names of multimodal models, capped logits, tensors whose rows change places: a file in f16 is the model itself."""
    folder = tmp_path / family
    (make_family if family in FAMILIES else make_llama)(family, folder)
    model = load_model(folder, choose_placement("fp32"))
    expected, labels = log_probabilities(model)
    files = {quant: export(folder, tmp_path, quant) for quant in ("f16", "q4_0")}
    found = measure(model, rows(), files, architecture(folder))
    perplexity = torch.exp(-expected.gather(1, labels[:, None]).mean()).item()
    assert found["f16"].perplexity == pytest.approx(perplexity, rel=1e-2)
    assert found["f16"].kl < 1e-6 < found["q4_0"].kl and found["f16"].agreement == 1


@pytest.mark.parametrize("family", ["qwen3 with experts", "mixtral", "gemma4-experts"])
def test_each_expert_is_measured_as_the_file_has_it(family, tmp_path):
    """Of two matrices of a checkpoint, gate and up, the running model has one."""
    (make_family if family in FAMILIES else make_llama)(family, tmp_path)
    model, path = load_model(tmp_path, choose_placement("fp32")), export(tmp_path, tmp_path, "q4_0")
    measure(model, rows(), {"q4_0": path}, architecture(tmp_path))
    file = GgufFile(path, keys=())
    for n, layer in enumerate(model.get_decoder().layers):
        experts = layer.experts if family in FAMILIES else layer.mlp.experts
        joined = [part for part in ("gate_up", "gate", "up") if f"blk.{n}.ffn_{part}_exps.weight" in file.tensors]
        for own, parts in ((experts.gate_up_proj, joined), (experts.down_proj, ["down"])):
            stored = [file.rows(f"blk.{n}.ffn_{part}_exps.weight").reshape(len(own), -1, own.shape[2]) for part in parts]
            np.testing.assert_array_equal(own.detach().numpy(), np.concatenate(stored, 1))


# Rows of 256, so that the K types are not replaced.
WIDE = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
OF_KIND = {"qwen3_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True),
           "mixtral": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
           "gemma4_text": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=256, enable_moe_block=True, sliding_window=64,
                               hidden_size_per_layer_input=0, layer_types=["sliding_attention", "full_attention"])}


@pytest.mark.parametrize("kind", OF_KIND)
def test_llama_cpp_computes_with_experts_of_few_bits_as_is_measured(kind, tmp_path):
    tokenizer = tokenizer_with_turns()
    config = CONFIG_MAPPING[kind](vocab_size=600, pad_token_id=0, **WIDE, **OF_KIND[kind])
    model = save_random(AutoModelForCausalLM.from_config(config), tokenizer).eval()
    with torch.no_grad():  # so that rounding a little is no other choice of experts
        for name, parameter in model.named_parameters():
            parameter.mul_(4 if "router" in name or ".gate." in name else 0.5 if parameter.ndim > 1 else 1)
    model.save_pretrained(tmp_path)
    (write_gemma4_tokenizer if kind == "gemma4_text" else tokenizer.save_pretrained)(tmp_path)
    path = export(tmp_path, tmp_path, "q4_k_m")
    types = {name: info.type.name for name, info in GgufFile(path, keys=()).tensors.items()}
    assert [types[f"blk.{n}.ffn_down_exps.weight"] for n in range(2)] == ["Q4_K", "Q6_K"]
    assert types["blk.0.attn_k.weight"] == ("Q8_0" if kind == "mixtral" else "Q4_K")
    prompts = np.random.default_rng(3).integers(20, 400, (12, 24)).tolist()

    def predicted() -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)

    whole, llama_cpp, off = predicted(), LlamaCpp(path, exact=True), []
    measure(model, rows(), {"q4_k_m": path}, architecture(tmp_path))  # after which the model has the file's numbers
    for prompt, *expected in zip(prompts, predicted(), whole):
        for first in llama_cpp.complete(prompt, 1, n_probs=20).get("completion_probabilities", ()):
            ids, found = zip(*((top["id"], top["logprob"]) for top in first["top_logprobs"]))
            off.append([(torch.tensor(found) - some[list(ids)]).abs().mean().item() for some in expected])
    rounded, unrounded = np.median(off, 0)
    assert len(off) > 5 and rounded < unrounded / 4  # llama.cpp rounds what is multiplied with them to eight bits besides


def test_a_tensor_that_the_running_model_lacks_is_an_error(checkpoint, files):
    other = replace(architecture(checkpoint), canonical=lambda name: name.replace("mlp", "moe"))
    with pytest.raises(WorkFailed, match="no tensor for blk.0.ffn"):
        measure(loaded(checkpoint), rows(), {"f16": files["f16"]}, other)


def test_the_yardstick_is_the_merged_model_in_f16(checkpoint):
    model = loaded(checkpoint)
    matrix, norm = model.model.layers[1].mlp.up_proj.weight, model.model.norm.weight
    with torch.no_grad():
        for weight in (matrix, norm):
            weight.add_(1e-4 * np.pi)
    before = norm.clone(), matrix.clone()
    measure(model, rows(), {}, architecture(checkpoint))
    assert torch.equal(norm, before[0]) and torch.equal(matrix, before[1].half().float())
    assert not torch.equal(matrix, before[1])


def test_the_limit_counts_learned_tokens(checkpoint, files):
    model = loaded(checkpoint)
    [loss] = measure(model, rows(), {}, architecture(checkpoint), limit=20).values()
    reference, labels = log_probabilities(decoded_model(checkpoint, files["f16"]), limit=20)
    assert loss.tokens == 20
    assert loss.perplexity == pytest.approx(torch.exp(-reference.gather(1, labels[:, None]).mean()).item(), rel=1e-4)
    nothing = [{"input_ids": np.arange(6, 9), "labels": np.array([6, -100, -100])}]
    assert measure(model, nothing, {}, architecture(checkpoint)) == {}


def test_a_head_that_the_file_does_not_have_follows_the_embedding(twice, tmp_path):
    path = export(twice, tmp_path, "q4_0")
    assert "output.weight" not in [t.name for t in gguf.GGUFReader(path).tensors]
    model = loaded(twice)
    measure(model, rows(), {"q4_0": path}, architecture(twice))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, loaded(twice).lm_head.weight)
    assert worst_error(twice, path, architecture(twice))[0] < 0.15


def test_the_validation_rows_of_a_run(trained, tmp_path):
    run, record = RunDir(trained, "tiny-gemma"), json.loads((trained / "manifest.json").read_text())
    manifest = Manifest(record["model"], record["stages"])

    def session(manifest: Manifest = manifest, fingerprint: str = record["model"]["fingerprint"]) -> SimpleNamespace:
        return SimpleNamespace(run=run, manifest=manifest, model=SimpleNamespace(fingerprint=fingerprint))

    found, _ = validation_rows(session())
    assert sum((row["labels"][1:] != -100).sum() for row in found) > 0
    assert validation_rows(session(fingerprint="other")) == (None, "the run's data was prepared for another base model")
    shutil.rmtree(run.tokens)
    assert validation_rows(session()) == validation_rows(session(Manifest(record["model"]))) == (
        None, "the run has no prepared data")


def test_a_run_without_validation_rows(cli, data, tiny):
    result = cli("prepare", data, "--model", tiny, "--valid", 0)
    assert result.code == 0, result.err
    run = RunDir(Path("runs/tiny-gemma"), "tiny-gemma")
    record = json.loads(run.manifest.read_text())
    manifest, model = Manifest(record["model"], record["stages"]), SimpleNamespace(**record["model"])
    found, reason = validation_rows(SimpleNamespace(run=run, manifest=manifest, model=model))
    assert found is None and "--valid" in reason


@pytest.mark.parametrize("quant, most", [
    ("f32", 1e-6), ("bf16", 1e-6), ("f16", 1e-6), ("q8_0", 0.007), ("q6_k", 0.02), ("q5_k_m", 0.05), ("q5_1", 0.05),
    ("q5_0", 0.05), ("q4_k_m", 0.09), ("q4_1", 0.09), ("q4_0", 0.1)])
def test_each_format_holds_the_checkpoint(checkpoint, files, quant, most):
    error, tensor = worst_error(checkpoint, files[quant], architecture(checkpoint))
    assert error <= most and (error < 1e-6) == (quant in ("f32", "bf16", "f16")), (error, tensor)


def rewritten(folder: Path, source: Path, change) -> Path:
    """The checkpoint as one file with some tensors changed."""
    shutil.copytree(source, folder)
    tensors = {k: v for path in source.glob("*.safetensors") for k, v in load_file(path).items()}
    for path in folder.glob("model*"):
        path.unlink()
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def swapped_rows(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[[3, 4]] = weight[[4, 3]]


FAULTS = {
    "two rows swapped": (swapped_rows, "blk.1.ffn_up.weight: off by"),
    "a norm": (lambda t: t["model.norm.weight"].add_(0.01), "output_norm.weight: off by"),
    "NaN": (lambda t: t["model.layers.0.self_attn.q_proj.weight"][0, 0].fill_(torch.nan), "blk.0.attn_q.weight: off by"),
}


@pytest.mark.parametrize("quant", ["f16", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_of_other_weights_is_found_out(checkpoint, files, tmp_path, fault, quant):
    change, problem = FAULTS[fault]
    other = rewritten(tmp_path / "other", checkpoint, change)
    with pytest.raises(WorkFailed) as caught:
        worst_error(other, files[quant], architecture(checkpoint))
    [found] = caught.value.problems
    assert found.startswith(problem)


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_inputs_of_which_a_matrix_makes_almost_nothing_are_no_reason_to_refuse_a_file(checkpoint, files, tmp_path, quant):
    """As of the tokens that attention rests on: SmolLM2 makes an eighth of the usual values of them."""
    name = "model.layers.1.self_attn.v_proj.weight"
    weight = next(load_file(path)[name] for path in checkpoint.glob("*.safetensors") if name in load_file(path)).float()
    probes = torch.randn(32, weight.shape[1], generator=torch.Generator().manual_seed(3))
    probes[::5] -= 0.999 * probes[::5] @ (torch.linalg.pinv(weight) @ weight)
    rounded = {"blk.1.attn_v.weight": Rounded(0.0, GgufFile(files[quant], keys=()).sha256("blk.1.attn_v.weight"), probes.numpy())}
    worst_error(checkpoint, files[quant], architecture(checkpoint), rounded)

    def swapped(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][[3, 4]] = tensors[name][[4, 3]]

    other = rewritten(tmp_path / "other", checkpoint, swapped)
    with pytest.raises(WorkFailed) as caught:
        worst_error(other, files[quant], architecture(checkpoint), rounded)
    [found] = caught.value.problems
    assert found.startswith("blk.1.attn_v.weight: its output is off by")


@pytest.mark.parametrize("quant", ["q8_0", "q4_0"])
def test_uneven_inputs_for_which_any_rounding_is_far_off_are_no_reason_to_refuse_a_file(checkpoint, tmp_path, quant):
    """A column that is multiplied with all there is, beside weights that are large where nothing comes."""
    name, stored = "model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight"

    def uneven(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][:, 0] *= 1e-3

    made = rewritten(tmp_path / "uneven", checkpoint, uneven)
    path = export(made, tmp_path, quant)
    probes = np.zeros((32, GgufFile(path, keys=()).tensors[stored].shape[1]), np.float32)
    probes[:, 0] = np.random.default_rng(3).standard_normal(32)
    sound = {stored: Rounded(0.0, GgufFile(path, keys=()).sha256(stored), probes)}
    error, _ = worst_error(made, path, architecture(checkpoint), sound)
    assert error > MOST_OF_OUTPUT[GgufFile(path, keys=()).tensors[stored].type]

    def larger(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][:, 0] += 1.0

    other = rewritten(tmp_path / "other", made, larger)
    with pytest.raises(WorkFailed, match="does not hold") as caught:
        worst_error(other, path, architecture(checkpoint), sound)
    assert caught.value.problems[0].startswith(f"{stored}: its output is off by")


def test_a_head_that_is_not_the_embedding_is_missed_in_the_file(twice, tmp_path):
    path = export(twice, tmp_path, "f16")
    other = rewritten(tmp_path / "other", twice, lambda t: t.update({"lm_head.weight": t["lm_head.weight"].flip(0)}))
    with pytest.raises(WorkFailed) as caught:
        worst_error(other, path, architecture(other))
    [found] = caught.value.problems
    assert found.startswith("token_embd.weight: off by")


def test_a_file_of_another_model_is_found_out(checkpoint, files, tmp_path):
    larger = tmp_path / "larger"
    make_checkpoint(larger, train_sentencepiece(), **SIZES | {"num_hidden_layers": 3, "intermediate_size": 512})
    with pytest.raises(WorkFailed) as caught:
        worst_error(larger, files["f16"], architecture(larger))
    assert "blk.2.attn_q.weight: missing" in caught.value.problems
    assert "blk.0.ffn_up.weight: (256, 256) instead of (512, 256)" in caught.value.problems
    with pytest.raises(WorkFailed) as caught:
        worst_error(checkpoint, export(larger, tmp_path, "f16"), architecture(checkpoint))
    assert "blk.2.attn_q.weight: unknown" in caught.value.problems
    (larger / "model.safetensors").write_bytes(b"12345678 no weights")
    with pytest.raises(UserError, match="can't be read"):
        worst_error(larger, files["f16"], architecture(larger))
