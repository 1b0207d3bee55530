"""Tiny random models that see, and some that hear, each with a tokenizer of its own; pictures and sounds, and what
Transformers makes of them."""

from __future__ import annotations

import base64
import io
import json
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support import gemmas, llamas
from support.gguf import SPECIAL, train_sentencepiece

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
_TOKENS = 9  # to a side of a picture in Gemma 4: llama.cpp enlarges pictures of fewer than 70
GEMMA_4 = ("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>")
MISTRAL = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
GEMMA_3 = ("<start_of_image>", "<end_of_image>", "<image_soft_token>")


@dataclass(frozen=True)
class Sense:
    """An eye or an ear.

    Args:
        samples: pictures or sounds, see `pictures` and `sounds`.
        part: a sample as a part of a message that llama.cpp takes.
        around: what llama.cpp puts before and behind its tokens.
        soft: the token that stands for a part of it.
        tokens: what stands for it whole, these and others.
        kind: what Transformers calls them in ``mm_token_type_ids``.
        inputs: what Transformers is given for a sample, beside token ids.
    """

    samples: list[np.ndarray]
    part: Callable[[np.ndarray], dict[str, Any]]
    around: tuple[str, str]
    soft: int
    tokens: list[int]
    kind: int
    inputs: Callable[[np.ndarray], dict[str, Any]]


@dataclass(frozen=True)
class Seer:
    """A model that sees: its checkpoint, the same in float32, its senses by name, and the token that ends a turn."""

    folder: Path
    network: Any
    senses: dict[str, Sense]
    done: int

    def logprobs(self, sense: Sense, before: list[int], sample: np.ndarray, behind: list[int]) -> Any:
        """Of the token after a sample between tokens, by Transformers."""
        import torch

        ids = torch.tensor([[*before, *sense.tokens, *behind]])
        kinds = (ids == sense.soft).long() * sense.kind
        with torch.no_grad():
            logits = self.network(input_ids=ids, token_type_ids=kinds, mm_token_type_ids=kinds,
                                  **sense.inputs(sample)).logits
        return logits[0, -1].log_softmax(-1)


def pictures(side: int) -> list[np.ndarray]:
    """Noise, other noise, and a white one: bytes of shape (side, side, 3)."""
    generator = np.random.default_rng(5)
    return [*generator.integers(0, 256, (2, side, side, 3), dtype=np.uint8), np.full((side, side, 3), 255, np.uint8)]


def sounds() -> list[np.ndarray]:
    """Noise, a low and a high tone of 0.6 seconds: 16 bits, 16,000 times a second."""
    noise = np.random.default_rng(7).normal(0, 0.1, 9600)
    tones = [0.3 * np.sin(np.arange(9600) * 2 * np.pi * hertz / 16_000) for hertz in (330, 2500)]
    return [(sound * 32767).astype(np.int16) for sound in (noise, *tones)]


def _picture(sample: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(sample).save(file, "PNG")
    return {"type": "image_url", "image_url": {
        "url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}}


def _sound(sample: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    with wave.open(file, "wb") as written:
        written.setparams((1, 2, 16_000, len(sample), "NONE", ""))
        written.writeframes(sample.tobytes())
    return {"type": "input_audio", "input_audio": {
        "data": base64.b64encode(file.getvalue()).decode(), "format": "wav"}}


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
        return {"pixel_values": torch.tensor(picture / 127.5 - 1).float().permute(2, 0, 1)[None]}

    eye = Sense(pictures(56), _picture, GEMMA_3[:2], soft, [soft] * 4, 1, inputs)
    return Seer(folder, network.float().eval(), {"vision": eye}, ids["<done>"])


def _gemma4_small(folder: Path) -> Seer:
    """As E2B: clipped linear layers, an ear, and a text model with per-layer embeddings."""
    text = dict(gemmas.TEXT_4, hidden_size_per_layer_input=32, num_kv_shared_layers=3,
                use_double_wide_mlp=True, layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
                use_bidirectional_attention="vision")  # as llama.cpp has it for every Gemma 4; E2B itself hasn't
    ear = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, subsampling_conv_channels=[128, 4],
               output_proj_dims=24)  # fmt: skip
    return _gemma4(folder, text, ear, use_clipped_linears=True)


def _spectrum(sound: np.ndarray) -> dict[str, Any]:
    """What Gemma 4's own feature extractor makes of a sound."""
    import torch
    from transformers import Gemma4AudioFeatureExtractor

    found = Gemma4AudioFeatureExtractor()([sound.astype(np.float32) / 32768], pad_to_multiple_of=None)
    return {"input_features": torch.tensor(np.stack(found["input_features"])),
            "input_features_mask": torch.tensor(np.stack(found["input_features_mask"]))}


def _frames(sound: np.ndarray) -> dict[str, Any]:
    """Gemma 4 12B hears a sound as it is, 640 numbers at a time."""
    import torch

    frames = torch.tensor(sound.astype(np.float32) / 32768).reshape(1, -1, 640)
    return {"input_features": frames, "input_features_mask": torch.ones(frames.shape[:2], dtype=torch.bool)}


def _gemma4_large(folder: Path) -> Seer:
    """As the 31B: it standardises what it sees."""
    text = dict(gemmas.TEXT_4, num_hidden_layers=12, hidden_size_per_layer_input=0, attention_k_eq_v=True,
                num_global_key_value_heads=1, use_bidirectional_attention="vision")
    return _gemma4(folder, text, None, standardize=True)


def _gemma4(folder: Path, text: dict[str, Any], ear: Any, **tower: Any) -> Seer:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    eye = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
               head_dim=16, position_embedding_size=40, patch_size=4, **tower)  # fmt: skip
    network, ids = _with_gemma4_tokenizer(Gemma4ForConditionalGeneration, Gemma4Config, folder, text, eye, ear)
    senses = {"vision": _eye_of_gemma4(ids, 4)}
    if ear:
        senses["audio"] = Sense(sounds(), _sound, GEMMA_4[3:5], ids["<|audio|>"], [ids["<|audio|>"]] * 15, 3, _spectrum)
    return Seer(folder, network, senses, ids["<turn|>"])


def _gemma4_unified(folder: Path) -> Seer:
    """As the 12B."""
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    eye = dict(patch_size=4, mm_embed_dim=48, output_proj_dims=48, mm_posemb_size=20)
    network, ids = _with_gemma4_tokenizer(Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedConfig, folder,
                                          dict(gemmas.TEXT_4), eye, {})
    ear = Sense(sounds(), _sound, GEMMA_4[3:5], ids["<|audio|>"], [ids["<|audio|>"]] * 15, 3, _frames)
    return Seer(folder, network, {"vision": _eye_of_gemma4(ids, 12), "audio": ear}, ids["<turn|>"])


def _eye_of_gemma4(ids: dict[str, int], patch: int) -> Sense:
    return Sense(pictures(12 * _TOKENS), _picture, GEMMA_4[:2], ids["<|image|>"],
                 [ids["<|image|>"]] * _TOKENS ** 2, 1,
                 lambda picture: _patches(picture, patch))


def _with_gemma4_tokenizer(kind: Any, config: Any, folder: Path, text: dict[str, Any], eye: dict[str, Any], ear: Any
                           ) -> tuple[Any, dict[str, int]]:
    """Save a Gemma 4; the model in float32 and the ids of its tokens."""
    used = gemmas.write_gemma4_tokenizer(folder, GEMMA_4)
    ids = {token["content"]: token["id"] for token in
           json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    size = {"vocab_size": used + 3, "vocab_size_per_layer_input": used + 3, "sliding_window": 128}
    network = kind(config(text_config=text | size, vision_config=eye,
                          audio_config=ear, image_token_id=ids["<|image|>"], audio_token_id=ids["<|audio|>"],
                          boi_token_id=ids["<|image>"], eoi_token_id=ids["<image|>"], boa_token_id=ids["<|audio>"],
                          eoa_token_index=ids["<audio|>"]))
    _save(network, folder, around_one=True)
    settings = {"image_processor": {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "do_normalize": False,
                                    "max_soft_tokens": 280, "patch_size": 4, "pooling_kernel_size": 3}}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    return network.float().eval(), ids


def _patches(picture: np.ndarray, side: int) -> dict[str, Any]:
    """A picture's patches from left to right and from top to bottom, and their positions."""
    import torch

    count = len(picture) // side
    patches = (picture / np.float32(255)).reshape(count, side, count, side, 3).transpose(0, 2, 1, 3, 4).reshape(1, count ** 2, -1)
    places = [[x, y] for y in range(count) for x in range(count)]
    return {"pixel_values": torch.tensor(patches), "image_position_ids": torch.tensor([places])}


def _qwen35(folder: Path) -> Seer:
    """As Qwen 3.5; places in a picture are told apart in all of a head's 64 numbers."""
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = llamas.byte_level_tokenizer("qwen35")
    tokenizer.add_special_tokens({"extra_special_tokens": list(QWEN)})
    tokenizer.save_pretrained(folder)
    begin, end, soft = tokenizer.convert_tokens_to_ids(QWEN)
    text = dict(vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                num_attention_heads=2, num_key_value_heads=1, head_dim=64, linear_num_key_heads=2,
                linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, max_position_embeddings=256,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0,
                                 "mrope_section": [11, 11, 10], "mrope_interleaved": True})  # fmt: skip
    eye = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, out_hidden_size=64,
               num_position_embeddings=64)  # fmt: skip
    network = Qwen3_5ForConditionalGeneration(Qwen3_5Config(
        text_config=text, vision_config=eye, image_token_id=soft, vision_start_token_id=begin,
        vision_end_token_id=end))
    _save(network, folder, around_one=False)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}))

    def inputs(picture: np.ndarray) -> dict[str, Any]:
        """Four patches that lie together follow one another, each with all of a colour before the next, twice."""
        values = torch.tensor(picture / 127.5 - 1).float().reshape(4, 2, 4, 4, 2, 4, 3).permute(0, 3, 1, 4, 6, 2, 5)
        twice = values[:, :, :, :, :, None].expand(4, 4, 2, 2, 3, 2, 4, 4)
        return {"pixel_values": twice.reshape(64, -1), "image_grid_thw": torch.tensor([[1, 8, 8]])}

    sense = Sense(pictures(32), _picture, QWEN[:2], soft, [soft] * 16, 1, inputs)
    return Seer(folder, network.float().eval(), {"vision": sense}, tokenizer.convert_tokens_to_ids("<done>"))


def _mistral3(folder: Path) -> Seer:
    """As Mistral Small 3.1."""
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    tokenizer = llamas.byte_level_tokenizer("tekken")
    tokenizer.add_special_tokens({"extra_special_tokens": list(MISTRAL)})
    tokenizer.save_pretrained(folder)
    soft, end_of_row, _ = tokenizer.convert_tokens_to_ids(MISTRAL)
    text = dict(model_type="mistral", vocab_size=len(tokenizer) + 3, hidden_size=64, intermediate_size=96,
                num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=24, sliding_window=None,
                max_position_embeddings=256, rms_norm_eps=1e-5)  # fmt: skip
    eye = dict(model_type="pixtral", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
               image_size=64, patch_size=4, hidden_act="silu")  # fmt: skip
    network = Mistral3ForConditionalGeneration(Mistral3Config(
        text_config=text, vision_config=eye, image_token_index=soft, tie_word_embeddings=False))
    _save(network, folder, around_one=True)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))

    def inputs(picture: np.ndarray) -> dict[str, Any]:
        return {"pixel_values": torch.tensor(picture / 127.5 - 1).float().permute(2, 0, 1)[None],
                "image_sizes": torch.tensor([[32, 32]])}

    rows = [*[soft] * 4, end_of_row] * 4
    sense = Sense(pictures(32), _picture, ("", MISTRAL[2]), soft, rows[:-1], 1, inputs)
    return Seer(folder, network.float().eval(), {"vision": sense}, tokenizer.convert_tokens_to_ids("<done>"))


FAMILIES: dict[str, Callable[[Path], Seer]] = {"qwen3.5": _qwen35, "mistral3": _mistral3, "gemma3": _gemma3, "gemma4-small": _gemma4_small,
                                               "gemma4-large": _gemma4_large, "gemma4-unified": _gemma4_unified}


def make_seer(name: str, folder: Path) -> Seer:
    """Save a bf16 checkpoint that sees, with its tokenizer, into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    return FAMILIES[name](folder)


def _save(network: Any, folder: Path, around_one: bool) -> None:
    import torch

    gemmas.randomise(network, around_one)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "language_model" in name and name.endswith(("q_norm.weight", "q_proj.weight")):  # rounding turns it less
                value *= 0.25
            elif name.endswith("language_model.norm.weight"):
                value *= 0.5
            elif "vision_tower" in name and name.endswith("gate_proj.linear.weight"):  # each activation is another one
                value *= 3
        for name, value in network.named_buffers():  # what linear layers clip at, which does happen, and standardising
            if name.endswith(("put_min", "put_max")):
                value.fill_(1.5 if name.endswith("max") else -1.5)
            elif name.endswith(("std_bias", "std_scale")):
                value.copy_(torch.linspace(0.5, 1.5, len(value)))
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
    gemmas.write_added_tokens(folder, added)
    return ids
