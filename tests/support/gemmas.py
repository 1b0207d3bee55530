"""Tiny random Gemmas of every generation for the GGUF tests, each with a tokenizer of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.gguf import CORPUS, ORDINARY, SPECIAL, train_sentencepiece

# What Gemma 4's turns and tool calls are made of; <turn|> ends a turn.
GEMMA_4 = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", '<|"|>')
TEXT = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip
TEXT_4 = dict(TEXT, num_hidden_layers=6, head_dim=16, global_head_dim=32, sliding_window=8,
               final_logit_softcapping=30.0, rope_parameters={
                   "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
                   "full_attention": {"rope_type": "proportional", "rope_theta": 300.0, "partial_rotary_factor": 0.25},
               })  # fmt: skip
UNUSED = ("k_proj", "v_proj", "k_norm")
_TOWER = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)  # fmt: skip


def _gemma1(vocab_size: int) -> Any:
    from transformers import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(GemmaConfig(**TEXT, vocab_size=vocab_size, num_hidden_layers=4))


def _gemma2(vocab_size: int) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**TEXT, vocab_size=vocab_size, num_hidden_layers=4, sliding_window=8,
                                          query_pre_attn_scalar=32, attn_implementation="eager"))


def _gemma3(vocab_size: int) -> Any:
    """The text part of a repository with pictures, and positions stretched as in its released sizes."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = dict(TEXT, vocab_size=vocab_size, num_hidden_layers=6, sliding_window=8, query_pre_attn_scalar=32,
                rope_scaling={"rope_type": "linear", "factor": 8.0})
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=_TOWER, mm_tokens_per_image=4))


def _gemma3n(vocab_size: int) -> Any:
    """As E2B, without its eye and ear. llama.cpp fixes how many layers there are and of which kinds, and takes the
    deviation of a feed-forward part by one value less than it has, which shows where it is not wide."""
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    text = {**TEXT, "intermediate_size": 1024, "num_hidden_layers": 30, "num_kv_shared_layers": 10}
    return Gemma3nForCausalLM(Gemma3nTextConfig(
        **text, vocab_size=vocab_size, vocab_size_per_layer_input=vocab_size - 3, sliding_window=8, laurel_rank=64,
        hidden_size_per_layer_input=256, layer_types=[*["sliding_attention"] * 4, "full_attention"] * 6,
        activation_sparsity_pattern=[0.95] * 10 + [0.0] * 20))


def _gemma4_large(vocab_size: int) -> Any:
    """As the 31B: values that are keys, with fewer heads in the full layers."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM(Gemma4TextConfig(
        **TEXT_4, vocab_size=vocab_size, hidden_size_per_layer_input=0, attention_k_eq_v=True,
        num_global_key_value_heads=1))


def _gemma4_small(vocab_size: int) -> Any:
    """As E2B: per-layer embeddings, and later layers with shared keys and values and a wider feed-forward part."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    return Gemma4ForCausalLM(Gemma4TextConfig(
        **TEXT_4, vocab_size=vocab_size, hidden_size_per_layer_input=32, vocab_size_per_layer_input=vocab_size,
        num_kv_shared_layers=3, use_double_wide_mlp=True,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2))


def _gemma4_experts(vocab_size: int) -> Any:
    """As 26B-A4B: experts beside the dense feed-forward part, with pictures."""
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = dict(TEXT_4, vocab_size=vocab_size, hidden_size_per_layer_input=0, attention_k_eq_v=True,
                num_global_key_value_heads=1, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32)
    tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                 head_dim=16, position_embedding_size=16)
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=tower, audio_config=None))


def _gemma4_unified(vocab_size: int) -> Any:
    """As the 12B, with pictures; its logits are not capped here."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    tower = dict(patch_size=4, model_patch_size=8, pooling_kernel_size=2, mm_embed_dim=16, output_proj_dims=16)
    return Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(
        text_config=dict(TEXT_4, vocab_size=vocab_size, final_logit_softcapping=None), vision_config=tower,
        audio_config=None))


FAMILIES: dict[str, Callable[[int], Any]] = {
    "gemma": _gemma1, "gemma2": _gemma2, "gemma3": _gemma3, "gemma3n": _gemma3n, "gemma4-large": _gemma4_large,
    "gemma4-small": _gemma4_small, "gemma4-unified": _gemma4_unified, "gemma4-experts": _gemma4_experts,
}  # fmt: skip


def make_family(name: str, folder: Path, write_tokenizer: Callable[[Path], int] | None = None) -> Any:
    """Save the bf16 checkpoint of a family with its tokenizer into ``folder``; return the same model in float32."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    own = write_gemma4_tokenizer if name.startswith("gemma4") else _write_gemma_tokenizer
    network = FAMILIES[name]((write_tokenizer or own)(folder) + 3)
    randomise(network, around_one=name.startswith("gemma4") or name == "gemma3n")
    if name == "gemma4-experts":
        _add_positions(network.model.vision_tower.patch_embedder)
    network.to(torch.bfloat16).save_pretrained(folder)
    if name == "gemma3n":
        _add_unused(folder)
    return network.float().eval()


def _add_positions(embedder: Any) -> None:
    """As many as llama.cpp makes patches of a small picture; not at first, which would change all other random weights."""
    import torch

    embedder.position_embedding_table = torch.nn.Parameter(embedder.position_embedding_table.detach().repeat(1, 4, 1))
    embedder.config.position_embedding_size = embedder.position_embedding_size = 64


def _add_unused(folder: Path) -> None:
    """Keys and values of the layers that take an earlier one's: the released files hold them, nothing reads them."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    unused = {name.replace("layers.0.", f"layers.{n}."): value for name, value in tensors.items() for n in range(20, 30)
              if name.startswith("model.layers.0.self_attn.") and name.split(".")[-2] in UNUSED}
    save_file(tensors | {name: torch.full_like(value, 3) for name, value in unused.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def randomise(network: Any, around_one: bool) -> None:
    """Weights that make every part of the model count; ``around_one``: norms scale by the weight itself."""
    import torch

    generator = torch.Generator().manual_seed(11)
    scalars = [(name, value) for name, value in network.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *scalars]:
            size = 1.5 * value.shape[1] ** -0.5 if value.ndim == 2 else 0.25
            if "embed_tokens." in name:
                size = 0.12  # little, or a token's own embedding would decide what follows it
            value.copy_(torch.randn(value.shape, generator=generator) * size)
            if name.endswith("layer_scalar") or (around_one and "norm" in name):
                value += 0.8 if "q_norm" in name or "k_norm" in name else 1  # its attention has no scale
            if len(network.get_decoder().layers) > 20 and ".post_" in name:
                value *= 0.3  # of what each of many layers adds, or the smallest difference would grow into another answer
            if around_one and name.endswith("l.norm.weight"):  # the last one: logits large enough for a cap to show
                value += 2


def write_added_tokens(folder: Path, added: dict[str, dict[str, Any]]) -> None:
    """Write the files that say which tokens of tokenizer.model are added ones, by their ids as text."""
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>",
        "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "added_tokens_decoder": added}))
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": int(i), **token} for i, token in added.items()]}))


def _write_gemma_tokenizer(folder: Path) -> int:
    """Write the files that Gemma 1 to 3 come with; return how many ids are in use."""
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    added = {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)}
    added |= {str(len(SPECIAL) + i): {"content": text, "special": False} for i, text in enumerate(ORDINARY)}
    write_added_tokens(folder, added)
    return 380


def write_gemma4_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> int:
    """Write a tokenizer.json of the shape of Gemma 4's, with ``more`` special tokens behind the usual ones; return how
    many ids are in use."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *GEMMA_4, *more]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")  # Gemma has no piece with both
    tokenizer.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False))
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("<extra>", normalized=False)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
                            pad_token="<pad>", mask_token="<mask>",
                            extra_special_tokens=[*GEMMA_4, *more]).save_pretrained(folder)
    return tokenizer.get_vocab_size()
