"""Tiny random models of the Llama type, with byte-level vocabularies that are cut as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.gguf import CORPUS

# Pre-tokenizers as the real tokenizer.json files have them.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


QWEN2 = sequence(split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST), BYTES)
LLAMA3 = sequence(split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST), BYTES)
SMOLLM2 = sequence({"type": "Digits", "individual_digits": True}, GPT2)
NEMO = sequence(split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES)  # Mistral's
QWEN35 = sequence(split(CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
                        r"|\s*[\r\n]+|\s+(?!\S)|\s+"), BYTES)
GPT4O = sequence(split("|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"])), BYTES)
# The way of cutting, and whether a word that is a token needs no merges, by llama.cpp's name.
CUTS = {"smollm": (SMOLLM2, False), "qwen2": (QWEN2, False), "llama-bpe": (LLAMA3, True),
        "smaug-bpe": (LLAMA3, False), "gpt-2": (GPT2, False), "tekken": (NEMO, True), "qwen35": (QWEN35, False), "gpt-4o": (GPT4O, False)}  # fmt: skip

TEXTS = (*CORPUS, "It was  2024, 31415926 and  7 x   12\n\n 3", "  padded  \t white \n", "a\r\nb\r\n\r\n  c",
         "👨‍👩‍👧‍👦 é", "我想在apple工作1314151天～", "I'LL we've 'tis DON'T", "x=1;\n\tif (a!=b) {\n\t\treturn 0x1F;\n\t}\n")

LLAMA_3_1 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
             "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 2.0, 2.5, 3.0], "long_factor": [1.0, 2, 3, 4, 5, 6, 7, 8]}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MINISTRAL = {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
EYE = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
       "image_size": 28, "patch_size": 14}
# model_type, settings, llama.cpp's pre-tokenizer
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "smollm2": ("llama", {"tie_word_embeddings": True}, "smollm"),
    "llama3": ("llama", {"rope_parameters": LLAMA_3_1, "head_dim": 32}, "llama-bpe"),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "smaug-bpe"),
    "mistral": ("mistral", {"sliding_window": 128, "head_dim": 24, "rope_parameters": LINEAR}, "tekken"),
    "mistral-yarn": ("mistral", {"sliding_window": None, "rope_parameters": YARN}, "gpt-2"),
    "ministral3": ("ministral3", {"head_dim": 32, "rope_parameters": MINISTRAL, "tie_word_embeddings": True}, "tekken"),
    "ministral3 with an eye": ("mistral3", {"model_type": "ministral3", "head_dim": 24, "rope_parameters": MINISTRAL}, "tekken"),
    "mistral small 3": ("mistral3", {"model_type": "mistral", "sliding_window": None, "head_dim": 24}, "tekken"),
    "qwen2": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.6}}, "qwen2"),
    "qwen3": ("qwen3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}, "head_dim": 32,
                        "tie_word_embeddings": True}, "qwen2"),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}, "llama-bpe"),
    "granite": ("granite", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
                            "logits_scaling": 2.0, "attention_bias": True}, "smollm"),
    "olmo2": ("olmo2", {}, "smaug-bpe"),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA_3_1,
                            "tie_word_embeddings": True}, "gpt-2"),
    "phi3": ("phi3", {"rope_parameters": LONG}, "smaug-bpe"),
    "phi4": ("phi3", {"rope_parameters": {**LONG, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2, 3, 4, 5],
                                          "long_factor": [2.0, 3, 4, 5, 6, 7]}, "tie_word_embeddings": True,
                      "max_position_embeddings": 1024, "sliding_window": 4096}, "gpt-4o"),
    "qwen3.5": ("qwen3_5_text", {"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
                                 "linear_key_head_dim": 16, "linear_value_head_dim": 16, "tie_word_embeddings": True}, "qwen35"),
    "qwen3.5 alike": ("qwen3_5_text", {"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                                       "linear_num_value_heads": 2, "linear_value_head_dim": 16}, "qwen35"),
    "glm": ("glm", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}},
            "smaug-bpe"),
    "glm4": ("glm4", {"head_dim": 32}, "smaug-bpe"),
    "glm4-yarn": ("glm4", {"head_dim": 16, "attention_bias": False, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
                  "smaug-bpe"),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 32, "tie_word_embeddings": True, "max_position_embeddings": 32768,
                                     "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0},
                                     "eod_token_id": 512}, "qwen2"),
    "hunyuan-plain": ("hunyuan_v1_dense", {"head_dim": 16, "eod_token_id": 512}, "qwen2"),
    "ernie": ("ernie4_5", {"head_dim": 32, "tie_word_embeddings": True}, "smaug-bpe"),
    "internlm3": ("internlm3", {"head_dim": 32, "rope_parameters": LINEAR}, "gpt-2"),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "sliding_window": 24, "rope_parameters": {
        "full_attention": {**YARN, "attention_factor": 1.138629436111989},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
        "smaug-bpe"),
    "seed-oss": ("seed_oss", {"head_dim": 32}, "qwen2"),
    "minicpm3": ("minicpm3", {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
                              "qk_rope_head_dim": 8, "v_head_dim": 16, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
                              "rope_parameters": LONG | {"short_factor": [1.0, 1.2, 1.6, 2.5],
                                                         "long_factor": [1.0, 2, 4, 8]}}, "smaug-bpe"),
    "lfm2": ("lfm2", {"num_hidden_layers": 3, "full_attn_idxs": [1], "block_multiple_of": 32}, "llama-bpe"),
}  # fmt: skip
# Likewise, of experts; checkpoints have matrices of their own for each.
EXPERTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3 with experts": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32,
                                         "norm_topk_prob": True}, "qwen2"),
    "qwen3.5 with experts": ("qwen3_5_moe_text", {"num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2,
                                                  "linear_num_value_heads": 4, "linear_key_head_dim": 16, "num_experts": 4,
                                                  "linear_value_head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                                  "shared_expert_intermediate_size": 48}, "qwen35"),
    "gpt-oss": ("gpt_oss", {"num_hidden_layers": 4, "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 24,
                            "rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}, "gpt-4o"),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}, "tekken"),
}


def byte_level_tokenizer(name: str) -> Any:
    """A small vocabulary that is cut as llama.cpp's ``name``. `<think>` is an added token, but not a special one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    cut, whole_words = CUTS[name]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(TEXTS * 6, trainers.BpeTrainer(
        vocab_size=520, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = json.loads(backend.to_str())
    content["pre_tokenizer"], content["model"]["ignore_merges"] = cut, whole_words
    # A word that no merges lead to: Llama 3 has such, and takes it all the same.
    content["model"]["vocab"]["wizards"] = len(content["model"]["vocab"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<|endoftext|>", "<turn>", "<done>"])
    backend.add_tokens(["<think>"])
    if name == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<|endoftext|>",
                                   pad_token="<|endoftext|>", unk_token="<|endoftext|>")


def make_llama(name: str, folder: Path) -> tuple[Any, Any]:
    """Save the model ``name`` of `MODELS` or `EXPERTS`, random and in bf16, with its tokenizer; three ids have no token.

    Returns:
        the model in float32, and the tokenizer, both as Transformers loads them.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    model_type, settings, cut = (MODELS | EXPERTS)[name]
    tokenizer = byte_level_tokenizer(cut)
    text = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, **settings}
    with_eye = model_type == "mistral3"
    kind = AutoModelForImageTextToText if with_eye else AutoModelForCausalLM
    network = kind.from_config(CONFIG_MAPPING[model_type](**(
        {"text_config": text, "vision_config": EYE, "tie_word_embeddings": False} if with_eye else text)))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25 + (parameter.ndim == 1))
    network.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Loaded again, as the frequencies of the rotation were rounded to bf16 too.
    return kind.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


# A chat template of turns with a beginning and an end, and a BOS before all.
TURNS = ("{{ bos_token }}{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<done>\n{% endfor %}"
         "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")


def tokenizer_with_turns(cut: str = "qwen2") -> Any:
    """A byte-level tokenizer with ``TURNS``."""
    tokenizer = byte_level_tokenizer(cut)
    tokenizer.chat_template = TURNS
    return tokenizer


def save_random(model: Any, tokenizer: Any, folder: Path | None = None) -> Any:
    """Give a model of any family weights that do something, and save it with its tokenizer where there is a folder."""
    import torch

    torch.manual_seed(1)
    model = model.float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) * 0.12)
    if folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model


def pack_experts(folder: Path) -> None:
    """Put other experts into a GPT-OSS, in MXFP4 as in the released ones; of their rows each length has to be blocks of 32."""
    import torch
    from safetensors.torch import load_file, save_file

    random, tensors = torch.Generator().manual_seed(5), load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=random, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, (experts, rows, columns // 32), generator=random, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))


def make_stripping_phi(folder: Path) -> None:
    """Save a random Phi-3 whose special tokens take the white space beside them with them, as Phi-4's can."""
    from transformers import Phi3Config, Phi3ForCausalLM

    tokenizer = tokenizer_with_turns("gpt-4o")
    tokenizer.chat_template = TURNS.replace("\n", "").replace("{{ bos_token }}", "")
    config = Phi3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        max_position_embeddings=512, vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id,
                        pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    save_random(Phi3ForCausalLM(config), tokenizer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] in ("<turn>", "<done>"):
            token |= {"lstrip": True, "rstrip": True}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def save_opt(folder: Path) -> None:
    """A tiny OPT, which looks its 64 positions up in a table."""
    from transformers import OPTConfig, OPTForCausalLM

    tokenizer = tokenizer_with_turns()
    save_random(OPTForCausalLM(OPTConfig(
        vocab_size=len(tokenizer), hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=64)), tokenizer, folder)
