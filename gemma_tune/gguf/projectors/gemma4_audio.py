"""The ear of Gemma 4 E2B and E4B: a conformer, with attention to what was heard shortly before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.gguf.architectures.gemma import differing
from gemma_tune.gguf.projectors.parts import TowerTensor, add_audio, clipped, name_of, processor_settings, unusual

BINS = 128  # of a spectrum
_SUBSAMPLED = 4  # bins to one: two convolutions with a stride of two
_KERNEL = (3, 3)
_CONVOLUTION = "lconv1d.depthwise_conv1d"
_NORMS = ("feed_forward1.pre_layer_norm", "feed_forward1.post_layer_norm", "feed_forward2.pre_layer_norm",
          "feed_forward2.post_layer_norm", "lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn",
          "norm_post_attn", "norm_out")
# What llama.cpp computes a spectrum with.
_SPECTRUM = {"feature_size": BINS, "sampling_rate": 16_000, "frame_length_ms": 20.0, "hop_length_ms": 10.0,
             "min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0, "fft_overdrive": False, "dither": 0.0,
             "input_scale_factor": 1.0, "mel_floor": 0.001, "per_bin_mean": None, "per_bin_stddev": None}  # fmt: skip


def problems(audio: Any, checkpoint: Path) -> list[str]:
    """What llama.cpp would compute differently."""
    found = differing(audio, hidden_act="silu", conv_kernel_size=5, residual_weight=0.5, attention_chunk_size=12,
                      attention_context_left=13, attention_context_right=0, attention_logit_cap=50.0,
                      rms_norm_eps=1e-6)
    return [*(f"audio_config.{problem}" for problem in found),
            *unusual("feature extractor", processor_settings(checkpoint, "feature_extractor"), **_SPECTRUM)]


def add(writer: gguf.GGUFWriter, text: Any, audio: Any) -> None:
    """Write the ear's own keys."""
    writer.add_clip_audio_projector_type(gguf.VisionProjectorType.GEMMA4A)
    add_audio(writer, text, hidden=audio.hidden_size, inner=4 * audio.hidden_size, layers=audio.num_hidden_layers,
              heads=audio.num_attention_heads, bins=BINS, eps=audio.rms_norm_eps)


def tensors(audio: Any, text: Any) -> Iterator[TowerTensor]:
    """All of the ear, in the order in which they are written."""
    hidden, before = audio.hidden_size, 1
    sampler = "subsample_conv_projection"
    for i, channels in enumerate(audio.subsampling_conv_channels):
        yield _tensor(f"{sampler}.layer{i}.conv.weight", channels, before, *_KERNEL, exact=True)
        yield _tensor(f"{sampler}.layer{i}.norm.weight", channels)
        before = channels
    yield _tensor(f"{sampler}.input_proj_linear.weight", hidden, BINS // _SUBSAMPLED * before, exact=True)
    for i in range(audio.num_hidden_layers):
        yield from _layer(f"layers.{i}.", audio)
    yield _tensor("output_proj.weight", audio.output_proj_dims, hidden)
    yield _tensor("output_proj.bias", audio.output_proj_dims)
    yield TowerTensor("mm.a.input_projection.weight", "embed_audio.embedding_projection.weight",
                      (text.hidden_size, audio.output_proj_dims))


def _layer(layer: str, audio: Any) -> Iterator[TowerTensor]:
    hidden = audio.hidden_size
    for part, shape in _linear(hidden).items():
        yield from clipped(_name(layer + part), f"audio_tower.{layer}{part}", shape, audio.use_clipped_linears)
    for part in _NORMS:
        yield _tensor(f"{layer}{part}.weight", hidden)
    yield _tensor(f"{layer}self_attn.relative_k_proj.weight", hidden, hidden)
    scale = f"{layer}self_attn.per_dim_scale"
    yield TowerTensor(f"{_name(scale)}.weight", f"audio_tower.{scale}", (hidden // audio.num_attention_heads,),
                      _softplus)
    yield replace(_tensor(f"{layer}{_CONVOLUTION}.weight", hidden, 1, audio.conv_kernel_size, exact=True),
                  change=lambda values: values[:, 0])


def _tensor(part: str, *shape: int, exact: bool = False) -> TowerTensor:
    module, _, kind = part.rpartition(".")
    return TowerTensor(f"{_name(module)}.{kind}", f"audio_tower.{part}", shape, exact=exact)


def _name(module: str) -> str:
    """In the GGUF."""
    return name_of(f"conformer.{module}")


def _linear(hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        **{f"feed_forward{n}.ffw_layer_{k}": shape for n in (1, 2)
           for k, shape in ((1, (4 * hidden, hidden)), (2, (hidden, 4 * hidden)))},
        "lconv1d.linear_start": (2 * hidden, hidden), "lconv1d.linear_end": (hidden, hidden),
        **{f"self_attn.{part}": (hidden, hidden) for part in ("q_proj", "k_proj", "v_proj", "post")},
    }  # fmt: skip


def _softplus(values: np.ndarray) -> np.ndarray:
    """As the layer computes it each time: llama.cpp multiplies with what is stored."""
    return np.logaddexp(values, np.float32(0))
