"""Checkpoints with the real shapes of released models and random weights, for measuring speed without the models."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

_GEMMA_3 = dict(head_dim=256, query_pre_attn_scalar=256, vocab_size=262_144, max_position_embeddings=32_768,
                pad_token_id=0, eos_token_id=1, bos_token_id=2, tie_word_embeddings=True)
# Every sixth layer sees all tokens, as in the library's own configuration of Gemma 3.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3-270m": dict(_GEMMA_3, hidden_size=640, num_hidden_layers=18, num_attention_heads=4, num_key_value_heads=1,
                        intermediate_size=2048, sliding_window=512),
    "gemma3-4b": dict(_GEMMA_3, hidden_size=2560, num_hidden_layers=34, num_attention_heads=8, num_key_value_heads=4,
                      intermediate_size=10_240, sliding_window=1024),
}
TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make_checkpoint(shape: str, folder: Path, tokenizer: Path | None = None, seed: int = 42) -> Path:
    """Write a bf16 checkpoint of a shape, unless it is there as a whole; made on a GPU where there is one.

    Args:
        tokenizer: a folder with a Gemma 3 tokenizer; None trains a tiny one, which makes more tokens of the same text.
    """
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    if (folder / "config.json").exists():
        return folder
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if tokenizer:
        for name in TOKENIZER:
            if (tokenizer / name).exists():
                shutil.copyfile(tokenizer / name, part / name)
    else:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from support.models import make_tokenizer

        make_tokenizer(part)
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(Gemma3TextConfig(**SHAPES[shape]), dtype=torch.bfloat16)
    model.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    return part.rename(folder)
