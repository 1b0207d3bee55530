"""What an architecture is described with: its sizes and tensors, and how their values differ in a GGUF."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gemma_tune.base.errors import UserError

# What every transformer here has, and what writes it.
SIZES = {
    "hidden_size": gguf.GGUFWriter.add_embedding_length,
    "num_hidden_layers": gguf.GGUFWriter.add_block_count,
    "intermediate_size": gguf.GGUFWriter.add_feed_forward_length,
    "num_attention_heads": gguf.GGUFWriter.add_head_count,
    "num_key_value_heads": gguf.GGUFWriter.add_head_count_kv,
    "rms_norm_eps": gguf.GGUFWriter.add_layer_norm_rms_eps,
}


@dataclass(frozen=True)
class Change:
    """How a tensor's values differ between checkpoint and GGUF, both ways.

    Args:
        forward: float32 (rows, columns) or (length,) as in the checkpoint → the same shape as in the GGUF.
        backward: its inverse.
        rows: rows that belong together; both functions get whole groups of them.
        one_way: whether the order of columns changes, the shape, or the inverse is inexact: a file is compared with
            values that were changed, and a matrix rounded by itself.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    rows: int = 1
    one_way: bool = False


# Gemma 1 to 3 scale by 1 + weight, llama.cpp by the stored weight.
PLUS_ONE = Change(lambda values: values + np.float32(1), lambda values: values - np.float32(1))

# The kernels of a convolution over single channels: (rows, 1, width) in the checkpoint, (rows, width) in the GGUF.
FLAT = Change(lambda values: values.reshape(len(values), -1), lambda values: values.reshape(len(values), 1, -1),
              one_way=True)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a GGUF.

    Args:
        name: in the GGUF.
        shape: as in the GGUF: (length,), (rows, columns), or (experts, rows, columns). A checkpoint can have dimensions
            of 1 in it, and a matrix for each expert.
        source: in the checkpoint; None where ``values`` are written. Of experts and their like it lacks their number.
        change: what happens to the values; None if nothing does.
        tied_to: ``source`` of the tensor that stands in when this one is absent or equal to it.
        values: float32, for what a checkpoint does not hold.
        zero_rows: how many of the rows a checkpoint does not hold, the last ones.
        optional: written where the checkpoint has it, although llama.cpp does without.
        turned: whether each expert's matrix is stored the other way round, the columns of gate and up in turns.
    """

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    change: Change | None = None
    tied_to: str | None = None
    values: np.ndarray | None = None
    zero_rows: int = 0
    optional: bool = False
    turned: bool = False

    @property
    def rows(self) -> int:
        """Of all experts; of a vector all its numbers."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def of_experts(self) -> bool:
        """Whether it has a matrix for each expert."""
        return len(self.shape) == 3 and "_exps." in self.name

    def rows_at_a_time(self, elements: int) -> int:
        """How many rows (of a vector: all its numbers) hold about ``elements`` numbers, in whole groups of rows."""
        if len(self.shape) == 1:
            return self.shape[0]
        group = self.change.rows if self.change else 1
        return max(1, elements // self.shape[-1] // group) * group


@dataclass(frozen=True)
class Architecture:
    """What the GGUF of one model holds.

    Args:
        name: ``general.architecture``.
        tensors: in the order in which they are written.
        metadata: adds the architecture's own keys to a writer.
        tokenizer: kind of vocabulary: ``sentencepiece``, ``sentencepiece-llama``, ``gemma4`` or ``bpe``.
        vocab_size: rows of the embedding.
        layers, heads, kv_heads: what llama.cpp's mixes of types go by,
        experts: and how many a layer has to choose from; 0 without any.
        experts_used: how many of them each token meets.
        tied: whether a missing output head is as it should be.
        own_head: whether llama.cpp reads an output head that isn't the embedding.
        left_out: tells the checkpoint's tensors that are no part of the text model, such as a vision tower.
        canonical: a tensor's name in the checkpoint → the ``source`` that stands for it; they differ where the text
            model is a part of a multimodal one.
        made_in: the number format that the released model's experts have, which rounds them no further.
        streams: of hidden states, side by side.
        context: tokens up to which llama.cpp computes the same, where the model's own context is longer.
    """

    name: str
    tensors: tuple[TensorSpec, ...]
    metadata: Callable[[gguf.GGUFWriter], None]
    tokenizer: str
    vocab_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True
    own_head: bool = True
    left_out: Callable[[str], bool] = lambda name: False
    canonical: Callable[[str], str] = lambda name: name
    context: int | None = None
    experts: int = 0
    made_in: str | None = None
    experts_used: int = 0
    streams: int = 1


class NotInLlamaCpp(UserError):
    """Settings for which llama.cpp has no key, so that it would compute another model from any file."""


Maker = Callable[[Mapping[str, Any], Path], Architecture]
CONVERTER = "Use llama.cpp's converter: gemma-tune export-ollama --converter PATH_TO_LLAMA_CPP"


def complete(config: Mapping[str, Any], path: Path) -> Any:
    """``config`` as Transformers' own configuration object reads it: with its defaults, and older keys made new.

    Raises:
        UserError: Transformers refuses it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} can't be expressed as a GGUF.", "Point to a whole Hugging Face checkpoint.",
                        [f"{path}: {error}"]) from error


def add_sizes(writer: gguf.GGUFWriter, config: Any, keys: Iterable[str] = SIZES) -> None:
    """Write what every transformer has, or those of the numbers that have these names in config.json."""
    for key in keys:
        SIZES[key](writer, getattr(config, key))


def not_written_here(path: Path, found: str) -> UserError:
    """The error for what only llama.cpp's converter writes; ``found``: what the configuration describes."""
    return UserError(f"{path} describes {found}, which cannot be written as GGUF here.", CONVERTER)


def refuse(path: Path, problems: list[str]) -> None:
    """Raise the problems that a configuration has, if any.

    Raises:
        NotInLlamaCpp: all of them.
    """
    if problems:
        raise NotInLlamaCpp(f"{path} can't be expressed as a GGUF.",
                            "llama.cpp, and so Ollama, would compute another model of it, whoever writes the file; "
                            "the merged model runs in transformers and vLLM: gemma-tune merge",
                            [f"{path}: {problem}" for problem in problems])
