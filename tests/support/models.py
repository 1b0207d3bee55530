"""A tiny random Gemma 3 with a tokenizer trained here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TURNS = ("<start_of_turn>", "<end_of_turn>")
PICTURES = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


def make_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> int:
    """Write tokenizer.model and tokenizer.json of a small Gemma tokenizer; returns the vocabulary's size."""
    from transformers import AutoTokenizer

    from support.gguf import train_sentencepiece

    (folder / "tokenizer.model").write_bytes(train_sentencepiece(vocab_size=420, special=(*TURNS, *more)))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "extra_special_tokens": [*TURNS, *more]}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_model(folder: Path, *, seed: int = 0, more: tuple[str, ...] = (), **changes: Any) -> Path:
    """A random Gemma 3 text model of two layers as a checkpoint; ``changes`` go into its configuration, and ``more`` are
    tokens."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    size = make_tokenizer(folder, more)
    settings = dict(
        vocab_size=size, hidden_size=64, intermediate_size=128, initializer_range=0.2, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=1024,
        pad_token_id=0, eos_token_id=1, bos_token_id=2) | changes
    torch.manual_seed(seed)
    Gemma3ForCausalLM(Gemma3TextConfig(**settings)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_seeing(folder: Path, *, seed: int = 0, side: int = 56, parts: int = 4, **changes: Any) -> Path:
    """A random Gemma 3 that sees, as a checkpoint with what prepares its pictures.

    Args:
        side: pixels to a side that it sees.
        parts: tokens of a picture.
        changes: to the configuration of its text model.
    """
    import torch
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    size = make_tokenizer(folder, PICTURES)
    begin, end, soft = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(PICTURES)
    text = dict(
        vocab_size=size + 3, hidden_size=64, intermediate_size=96, initializer_range=0.2, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=64,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=1, bos_token_id=2) | changes
    tower = dict(hidden_size=32, intermediate_size=32, initializer_range=0.2, num_hidden_layers=1, num_attention_heads=2, image_size=side,
                 patch_size=14)
    torch.manual_seed(seed)
    network = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=parts,
                                                          boi_token_index=begin, eoi_token_index=end, image_token_index=soft))
    torch.nn.init.normal_(network.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # zeros by themselves
    network.to(torch.bfloat16).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": parts, "size": {"height": side, "width": side}}))
    return folder
