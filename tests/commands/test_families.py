"""Families that broke somewhere on the way: towers, layers of several kinds, states of another type."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gemma_tune.answers.lengths import rows_that_fit
from gemma_tune.gguf.reader import GgufFile
from gemma_tune.lora.layers import TOWERS
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import after_product, load_model
from gemma_tune.models.placement import Placement
from gemma_tune.models.towers import without_towers
from support.command import rows, write_rows
from support.gemmas import FAMILIES, make_family
from support.llamas import make_stripping_phi, pack_experts, save_random, tokenizer_with_turns
from support.models import make_tokenizer
from support.templates import GLM, GLM4, HARMONY, HUNYUAN, SEED, trl_template

TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            max_position_embeddings=512)
EYE = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64)
MIXING = dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=4, linear_num_key_heads=2,
              linear_key_head_dim=8, linear_value_head_dim=8)
GEMMA4 = dict(num_hidden_layers=4, sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2, global_head_dim=32,
              hidden_size_per_layer_input=16, num_kv_shared_layers=2)
GEMMA3N = dict(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, sliding_window=16,
               hidden_size_per_layer_input=16, laurel_rank=8, activation_sparsity_pattern=[0.9] + [0.0] * 3)
ROTATED = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
PIXTRAL = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
               patch_size=14)
TOWER = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
LLAMA4 = dict(num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=16, intermediate_size_mlp=96, no_rope_layers=[1, 0])
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
GRANITE = dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48, layer_types=["mamba", "attention"],
               mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1, mamba_chunk_size=16, logits_scaling=4.0)


def config_of(name: str, text: dict):
    """A configuration, and the class that writes the checkpoint."""
    if name == "qwen3.5 with an eye":
        return T.Qwen3_5Config(text_config=text | MIXING, vision_config=EYE), T.Qwen3_5ForConditionalGeneration
    if name == "gemma 4 with an ear":
        own = text | GEMMA4 | {"vocab_size_per_layer_input": text["vocab_size"]}
        return (T.Gemma4Config(text_config=own, vision_config=TOWER | dict(intermediate_size=32, num_key_value_heads=2, head_dim=16),
                               audio_config=TOWER), T.Gemma4ForConditionalGeneration)
    if name == "gemma 3n with an eye":  # which transformers builds of another package, that is not here
        own = text | GEMMA3N | {"vocab_size_per_layer_input": text["vocab_size"]}
        beyond = dict(vocab_size=4, vocab_offset=text["vocab_size"])
        config = T.Gemma3nConfig(text_config=own, vision_config=beyond | dict(hidden_size=8), audio_config=beyond | dict(hidden_size=8))
        return config, made_without_towers
    if name == "mistral small 3.2":
        return T.Mistral3Config(text_config=text | {"model_type": "mistral"}, vision_config=PIXTRAL), T.Mistral3ForConditionalGeneration
    if name == "qwen 2.5 with an eye":
        return (T.Qwen2_5_VLConfig(text_config=text | ROTATED, vision_config=EYE | dict(fullatt_block_indexes=[0])),
                T.Qwen2_5_VLForConditionalGeneration)
    if name == "qwen 3 with an eye":
        return T.Qwen3VLConfig(text_config=text | ROTATED, vision_config=EYE | dict(deepstack_visual_indexes=[0])), T.Qwen3VLForConditionalGeneration
    if name == "llama 4 with an eye":
        eye = TOWER | dict(intermediate_size=128, image_size=28, patch_size=14, vision_output_dim=32, projector_input_dim=32,
                           projector_output_dim=32, pixel_shuffle_ratio=0.5)
        return T.Llama4Config(text_config=text | LLAMA4, vision_config=eye), T.Llama4ForConditionalGeneration
    if name == "dense granite hybrid":
        return T.GraniteMoeHybridConfig(**text | GRANITE), T.GraniteMoeHybridForCausalLM
    if name == "qwen 3 with experts":
        return T.Qwen3MoeConfig(**text | MOE), T.Qwen3MoeForCausalLM
    # As released: without positions or attention that would end, or take room for, a conversation.
    text = {key: value for key, value in text.items() if key not in ("max_position_embeddings", "num_attention_heads", "num_key_value_heads")}
    return (T.Mamba2Config(**text | dict(num_heads=8, head_dim=16, state_size=16, n_groups=1, chunk_size=16)), T.Mamba2ForCausalLM)


def make(name: str, folder: Path) -> None:
    tokenizer = tokenizer_with_turns()
    text = TEXT | dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=0)
    config, kind = config_of(name, text)
    save_random(kind(config), tokenizer, folder)


# Families that transformers runs with their towers only.
ONLY_WHOLE = dict.fromkeys(("mistral small 3.2", "qwen 2.5 with an eye", "qwen 3 with an eye"), "AutoModelForImageTextToText")


def made_without_towers(config):
    with without_towers(config):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", ["qwen3.5 with an eye", "gemma 4 with an ear", "gemma 3n with an eye", "mistral small 3.2", "qwen 2.5 with an eye", "qwen 3 with an eye", "llama 4 with an eye", "dense granite hybrid",
                                  "mamba 2", "gemma4-small", "qwen 3 with experts"])
def test_all_stages(cli, tmp_path, name):
    """In the type by default, which can be bf16."""
    model = tmp_path / name.replace(" ", "-")
    make_family(name, model) if name in FAMILIES else make(name, model)
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", "Say number 3.", "the")))
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", model),
                 ("train", "--max-steps", 4, "--learning-rate", 1e-2, "--keep", "last", "--samples", 0),
                 ("eval", "--max-new-tokens", 3), ("chat", "--use", "adapter", "--input", "asked.jsonl", "-n", 3), ("merge",)):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
    assert ONLY_WHOLE.get(name, "AutoModelForCausalLM") in (Path(result.json["artifacts"]["merged"]) / "README.md").read_text()
    assert result.json["summary"]["check_divergence"] < 0.25 * result.json["summary"]["check_adapter_effect"] + 5e-3


@pytest.mark.parametrize("name", ["gemma 4 with an ear", "mistral small 3.2"])  # of towers PEFT cannot adapt the first, and adapts the other
def test_others_put_the_adapter_on_the_whole_model(cli, tmp_path, monkeypatch, name):
    monkeypatch.setitem(TEXT, "num_hidden_layers", 4)  # from 20 adapted layers on PEFT shortens the names of all
    make(name, tmp_path / "model")
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", tmp_path / "model"),
                 ("train", "--max-steps", 4, "--learning-rate", 1e-2, "--samples", 0, "--dtype", "fp32"), ("merge", "--no-check")):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
    merged = tmp_path / result.json["artifacts"]["merged"]
    assert "`down_proj`, `gate_proj`, `k_proj`, `o_proj`, " in (merged / "README.md").read_text()
    [adapter] = merged.parent.glob("*/adapter_config.json")
    base, whole = (T.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32) for folder in (tmp_path / "model", merged))
    ids = torch.arange(10, 50).reshape(2, 20)
    with torch.inference_mode():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, adapter.parent)
        logits = [model(input_ids=ids).logits for model in (tuned, whole)]
    ours = add_adapter(load_model(tmp_path / "model", Placement("cpu", torch.float32, "")), adapter.parent)
    assert set(tuned.base_model.targeted_module_names) == set(ours.base_model.targeted_module_names)
    torch.testing.assert_close(logits[0], ours(input_ids=ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert (logits[0] - before).norm() > 0.1 * before.norm()
    before = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(tensor, before[tensor_name]) for tensor_name, tensor in load_file(merged / "model.safetensors").items()
               if TOWERS.search(tensor_name))


@pytest.mark.parametrize("kind", ["qwen 3.5", "lfm2", "mistral small 3.2", "glm 4", "hunyuan", "seed-oss",
                                  "qwen 3 with experts", "qwen 3.5 with experts", "gemma3n", "gemma4-experts", "gpt-oss"])
def test_what_was_trained_comes_through_an_export(cli, tmp_path, monkeypatch, kind):
    """Of layers with a state or with experts, and of a text part without a class of its own: llama.cpp answers alike in each
    number format."""
    model = tmp_path / "model"
    if kind == "gemma3n":  # with a vocabulary that transformers reads as well
        make_family(kind, model, make_tokenizer)
    elif kind in FAMILIES:
        make_family(kind, model)
    else:
        make_exportable(kind, model)
    if kind == "gpt-oss":
        pack_experts(model)
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", model),
                 ("train", "--max-steps", 4, "--learning-rate", 1e-2, "--samples", 0), ("merge",),
                 ("export-ollama", *(() if kind == "gpt-oss" else ("--quant", "f16,q4_k_m")), "--no-create")):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
        if kind in ("glm 4", "hunyuan", "seed-oss"):
            assert result.json["warnings"] == [], "prepare foresees an export, whose prompts are the same everywhere"
    shown = result.json["summary"]["quants"]
    if kind == "gpt-oss":
        assert list(shown) == ["mxfp4"] and set(shown["mxfp4"]["tensor_types"]) == {"F32", "Q8_0", "MXFP4"}
        before, after = (load_file(folder / "model.safetensors") for folder in (model, Path("runs/model/model_lora_merged")))
        assert before.keys() == after.keys(), "experts stay packed"
        changed = {name.split(".", 3)[3] for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"self_attn.{part}_proj.weight" for part in "qkvo"}
        again = cli("export-ollama", "--no-create", "--no-verify", "--no-measure", "--force")
        assert "rounding is not calibrated: mxfp4 rounds each weight by itself" in again.err
        for flags, said, hint in ((("--qlora",), "experts have four bits already", "leave --qlora out"),
                                  (("--target-modules", "all,experts"), "this model (gpt_oss) keeps them in a way of its own",
                                   "leave experts out of --target-modules")):
            refused = cli("train", *flags, "--dry-run")
            assert refused.code == 2 and said in refused.err and hint in refused.err, "before anything is loaded"
        monkeypatch.setattr(T.GptOssForCausalLM, "to", lambda *_, **__: (_ for _ in ()).throw(MemoryError()))
        full = cli("train", "--force", "--max-steps", 1)
        assert full.code == 2 and "take a smaller model" in full.err and "--qlora" not in full.err
        return
    if kind == "mistral small 3.2":  # llama.cpp takes another number for its eye
        said = result.json["summary"]["text_alone"]
        assert said.startswith("what is exported takes text alone, though the merged model takes more: ") and "rms_norm_eps is" in said
        assert "gemma-tune merge" not in said, "which is the way out for a model that cannot be exported at all"
    if kind == "gemma4-experts":  # whose configuration has pictures read one way, as E2B's
        assert "the tokens of a picture see each other in llama.cpp" in Path("runs/model/ollama/report.md").read_text()
        assert "the tokens of a picture see each other in llama.cpp" in " ".join(result.err.split())
    if kind in ("qwen 3.5", "gemma4-experts"):
        assert result.json["summary"]["projector"]["pictures_apart"] > 1e-3, "llama.cpp sees with what lies beside the files"
    assert shown["f16"]["largest_error"] < 1e-3 and shown["f16"]["kl"] < 1e-5
    assert shown["q4_k_m"]["largest_error"] < 0.2
    assert kind != "glm 4" or 'PARAMETER stop """<|user|>"""' in Path("runs/model/ollama/Modelfile").read_text()
    if "experts" in kind:
        file = Path("runs/model/ollama/model-q4_k_m.gguf")
        assert shown["q4_k_m"]["calibrated_matrices"] > sum("_exps" in name for name in GgufFile(file, keys=()).tensors) > 3
        size = (file.stat().st_size + Path("runs/model/ollama/model-f16.gguf").stat().st_size) // 2
        sized = cli("export-ollama", "--size", f"{size / 1000}KB", "--no-create", "--json")
        assert sized.code == 0 and "measured to cost" in sized.err, sized.err
        assert 0 < sized.json["summary"]["gguf_bytes"] <= size
        both = cli("export-ollama", "--quant", "mxfp4,q4_0", "--no-create", "--no-verify", "--no-measure", "--json")
        assert both.code == 0 and " of general text; mxfp4 rounds each weight by itself" in both.err
        calibrated = {quant: figures["calibrated_matrices"] for quant, figures in both.json["summary"]["quants"].items()}
        assert calibrated["mxfp4"] == 0 < calibrated["q4_0"]


def make_exportable(kind, folder):
    cuts = {"qwen 3.5": "qwen35", "qwen 3.5 with experts": "qwen35", "lfm2": "llama-bpe", "glm 4": "smaug-bpe",
            "hunyuan": "qwen2", "seed-oss": "qwen2", "gpt-oss": "gpt-4o"}
    tokenizer = tokenizer_with_turns(cuts.get(kind, "tekken"))
    if kind == "glm 4":
        tokenizer.add_special_tokens({"additional_special_tokens": list(GLM)})
        tokenizer.chat_template = GLM4
    if kind == "hunyuan":
        marks = re.findall("<｜[^｜]+｜>", HUNYUAN)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(marks))})
        tokenizer.add_tokens(["</think>"])
        tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = HUNYUAN, marks[0], "<｜hy_place▁holder▁no▁2｜>"
    if kind == "seed-oss":
        tokenizer.add_special_tokens({"bos_token": "<seed:bos>", "eos_token": "<seed:eos>"})
        tokenizer.add_tokens(["<seed:think>", "</seed:think>"])
        tokenizer.chat_template = SEED
    if kind == "gpt-oss":
        tokenizer.add_special_tokens({"additional_special_tokens": [*HARMONY]})
        tokenizer.chat_template, tokenizer.eos_token = trl_template("gptoss"), "<|return|>"
    text = TEXT | dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                       pad_token_id=0, num_hidden_layers=4 if kind in ("qwen 3.5", "qwen 3.5 with experts", "lfm2") else 2)
    if kind.startswith("qwen 3.5"):
        text |= MIXING | dict(head_dim=32, layer_types=None)
    if kind == "qwen 3.5 with experts":
        own = text | MOE | dict(shared_expert_intermediate_size=32)
        network = T.Qwen3_5MoeForConditionalGeneration(T.Qwen3_5MoeConfig(text_config=own, vision_config=EYE))
    elif kind == "qwen 3.5":
        network = T.Qwen3_5ForConditionalGeneration(T.Qwen3_5Config(text_config=text, vision_config=EYE))
    elif kind == "qwen 3 with experts":
        network = T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**text | MOE))
    elif kind == "mistral small 3.2":
        network = T.Mistral3ForConditionalGeneration(T.Mistral3Config(text_config=text | {"model_type": "mistral"}, vision_config=PIXTRAL))
    elif kind == "seed-oss":
        network = T.SeedOssForCausalLM(T.SeedOssConfig(**text))
    elif kind == "gpt-oss":
        network = T.GptOssForCausalLM(T.GptOssConfig(**text | dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=32)))
    elif kind == "hunyuan":
        network = T.HunYuanDenseV1ForCausalLM(T.HunYuanDenseV1Config(**text))
    elif kind == "glm 4":
        network = T.Glm4ForCausalLM(T.Glm4Config(**text))
        network.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    else:
        network = T.Lfm2ForCausalLM(T.Lfm2Config(**text | dict(full_attn_idxs=[1, 3], block_multiple_of=32)))
    save_random(network, tokenizer, folder)
    if kind.startswith("qwen 3.5"):
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))


def test_special_tokens_that_take_white_space_with_them_are_a_known_limit(cli, tmp_path):
    """Phi-4's: of a turn without any at its edges nothing differs, and the report says where something does."""
    make_stripping_phi(tmp_path / "phi")
    for args in (("prepare", write_rows(tmp_path / "rows.jsonl", rows(12)), "--model", tmp_path / "phi"),
                 ("train", "--max-steps", 1, "--samples", 0), ("merge", "--no-check"),
                 ("export-ollama", "--quant", "f16", "--no-create", "--no-measure")):
        result = cli(*args, "--json", "--quiet")
        assert result.code == 0, (args, result.err)
    report = [line for line in Path("runs/phi/ollama/report.md").read_text().splitlines() if line.startswith("| ")]
    limits = {line.split("|")[1].strip() for line in report if "which llama.cpp keeps" in line}
    assert limits == {"padded white space", "padded system", "code", "padded wide spaces"}
    assert not any("differs" in line for line in report)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_of_layers_of_several_kinds_are_counted(family, tmp_path):
    make_family(family, tmp_path)
    fit = rows_that_fit(load_model(tmp_path, Placement("cpu", torch.float32, "")), 1 << 24)
    assert 1 <= fit(4096) <= fit(16)


def test_a_cap_of_recurrent_gemma_is_known():
    config = T.RecurrentGemmaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    lru_width=32)
    assert after_product(AutoModelForCausalLM.from_config(config))["softcap"] == config.logits_soft_cap == 30.0
