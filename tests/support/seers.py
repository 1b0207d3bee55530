"""Random models that see, of several families, whose chat templates show pictures; and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.encoding.eye import eye_of
from gemma_tune.encoding.tokenizer import load_tokenizer
from support import towers
from support.models import make_seeing

FAMILIES = ("gemma3", "qwen3.5", "qwen3-vl", "qwen2.5-vl", "mistral3", "gemma4-small", "gemma4-large")
SIZES = ((60, 44), (30, 62), (48, 48))  # of pictures: 0.png and so on
_TEMPLATE = ("{{{{ bos_token }}}}{{% for m in messages %}}{{{{ m.role }}}}:{{% if m.content is string %}}{{{{ m.content }}}}{{% else %}}"
             "{{% for p in m.content %}}{{{{ {place!r} if p.type == 'image' else p.text }}}}{{% endfor %}}{{% endif %}}{end}{{% endfor %}}"
             "{{% if add_generation_prompt %}}assistant:{{% endif %}}")


def make(name: str, folder: Path) -> Path:
    """A bf16 checkpoint of this family, which writes a chat template's places for pictures."""
    if name == "gemma3":
        return _wandering(make_seeing(folder))
    seer = _MORE[name](folder) if name in _MORE else towers.make_seer(name, folder)
    if name.startswith("gemma4"):  # whose random tower knows no more than 40 places to a side
        path = folder / "processor_config.json"
        path.write_text(path.read_text().replace('"max_soft_tokens": 280', '"max_soft_tokens": 70'))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder)
    end = tokenizer.convert_ids_to_tokens(seer.done)
    place = eye_of(folder, tokenizer).place
    if name.startswith("qwen"):
        place = place.join(towers.QWEN[:2])
    tokenizer.chat_template = _TEMPLATE.format(place=place, end=end)
    tokenizer.save_pretrained(folder)
    return folder


def write_pictures(folder: Path) -> Path:
    """Files of large spots in ``folder``, of :data:`SIZES`."""
    from PIL import Image

    noise = np.random.default_rng(0)
    for n, (width, height) in enumerate(SIZES):
        Image.fromarray(noise.integers(0, 2, (3, 3, 3), dtype=np.uint8) * 255).resize((width, height), 0).save(folder / f"{n}.png")
    return folder


def asked(text: str, *names: str, at: int = 0) -> dict[str, Any]:
    """A question with these pictures before it, or before another of its characters."""
    shown = {"pictures": [{"at": at, "file": f"pictures/{name}"} for name in names]} if names else {}
    return {"role": "user", "content": text} | shown


def _wandering(folder: Path) -> Path:
    """The Gemma 3 with a head of its own: with tied embeddings a random model only repeats the last token."""
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config.from_pretrained(folder)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    network = Gemma3ForConditionalGeneration.from_pretrained(folder, config=config, dtype=torch.bfloat16)
    torch.manual_seed(3)
    torch.nn.init.normal_(network.lm_head.weight, std=0.5)
    network.save_pretrained(folder)
    return folder


def _qwen3_vl(folder: Path) -> Any:
    """Its tower adds to what the first layers compute."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    eye = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, out_hidden_size=64, initializer_range=0.2,
               num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    rope = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    return _with_tokenizer_of_qwen35(folder, Qwen3VLForConditionalGeneration, Qwen3VLConfig, {"head_dim": 64}, rope, eye)


def _qwen25_vl(folder: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    eye = dict(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=4, out_hidden_size=64, initializer_range=0.2,
               window_size=16, fullatt_block_indexes=[1])
    return _with_tokenizer_of_qwen35(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {}, {"mrope_section": [6, 5, 5]}, eye)


_MORE = {"qwen3-vl": _qwen3_vl, "qwen2.5-vl": _qwen25_vl}


def _with_tokenizer_of_qwen35(folder: Path, kind: Any, config: Any, text: dict[str, Any], rope: dict[str, Any], eye: dict[str, Any]) -> Any:
    import torch

    seer = towers.make_seer("qwen3.5", folder)
    before = json.loads((folder / "config.json").read_text())
    text = dict(vocab_size=before["text_config"]["vocab_size"], hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.2,
                rope_parameters={"rope_type": "default", "rope_theta": 10_000.0} | rope) | text
    ids = {name: before[name] for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")}
    torch.manual_seed(0)
    kind(config(text_config=text, vision_config=eye, **ids)).to(torch.bfloat16).save_pretrained(folder)
    return seer
