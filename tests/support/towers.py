"""Tiny random models that see, each with a tokenizer of its own, pictures, and what Transformers makes of them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support import gemmas
from support.gguf import SPECIAL, train_sentencepiece

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
GEMMA_3 = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


@dataclass(frozen=True)
class Seer:
    """A model that sees.

    Args:
        folder: its checkpoint.
        network: the same model in float32.
        side: of its pictures, in pixels.
        around: what llama.cpp puts before and behind a picture's tokens.
        soft: the token that stands for a part of a picture.
        tokens: how many of them stand for a picture.
        inputs: what Transformers is given for a picture, beside token ids: float32 of shape (side, side, 3), 0 to 1.
    """

    folder: Path
    network: Any
    side: int
    around: tuple[str, str]
    soft: int
    tokens: int
    inputs: Callable[[np.ndarray], dict[str, Any]]

    def logprobs(self, before: list[int], picture: np.ndarray, behind: list[int]) -> Any:
        """Of the token after a picture between tokens, by Transformers.

        Args:
            picture: bytes, (side, side, 3).
        """
        import torch

        ids = torch.tensor([[*before, *[self.soft] * self.tokens, *behind]])
        kinds = (ids == self.soft).long()
        with torch.no_grad():
            logits = self.network(input_ids=ids, token_type_ids=kinds, mm_token_type_ids=kinds,
                                  **self.inputs(picture.astype(np.float32) / 255)).logits
        return logits[0, -1].log_softmax(-1)


def pictures(side: int) -> list[np.ndarray]:
    """Noise, other noise, and a white one: bytes of shape (side, side, 3)."""
    generator = np.random.default_rng(5)
    return [*generator.integers(0, 256, (2, side, side, 3), dtype=np.uint8), np.full((side, side, 3), 255, np.uint8)]


def as_url(picture: np.ndarray) -> str:
    """A picture as llama.cpp's server takes it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _gemma3(folder: Path) -> Seer:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    ids = _write_gemma3_tokenizer(folder)
    begin, end, soft = (ids[text] for text in GEMMA_3)
    text = dict(gemmas.TEXT, vocab_size=383, num_hidden_layers=6, sliding_window=32, query_pre_attn_scalar=32)
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                 patch_size=14)  # fmt: skip
    network = Gemma3ForConditionalGeneration(Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, boi_token_index=begin, eoi_token_index=end,
        image_token_index=soft))
    _save(network, folder, around_one=False)
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_seq_length": 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))

    def inputs(picture: np.ndarray) -> dict[str, Any]:
        return {"pixel_values": torch.tensor((picture - 0.5) / 0.5).permute(2, 0, 1)[None]}

    return Seer(folder, network.float().eval(), 56, GEMMA_3[:2], soft, 4, inputs)


FAMILIES: dict[str, Callable[[Path], Seer]] = {"gemma3": _gemma3}


def make_seer(name: str, folder: Path) -> Seer:
    """Save a bf16 checkpoint that sees, with its tokenizer, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return FAMILIES[name](folder)


def _save(network: Any, folder: Path, around_one: bool) -> None:
    import torch

    gemmas.randomise(network, around_one)
    network.to(torch.bfloat16).save_pretrained(folder)


def _write_gemma3_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer of 380 tokens; return the ids of the special ones."""
    from sentencepiece import SentencePieceProcessor

    special = (*SPECIAL, *GEMMA_3)
    model = train_sentencepiece(special=special[4:])
    (folder / "tokenizer.model").write_bytes(model)
    pieces = SentencePieceProcessor(model_proto=model)
    ids = {text: pieces.piece_to_id(text) for text in special}
    added = {str(i): {"content": text, "special": True} for text, i in ids.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>",
        "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "added_tokens_decoder": added}))
    (folder / "tokenizer.json").write_text(json.dumps({
        "added_tokens": [{"id": int(i), **token} for i, token in added.items()]}))
    return ids
