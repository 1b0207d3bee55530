"""Vocabularies of every kind that a GGUF can hold, by the kind that an architecture asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.vocabulary.bpe import load_bpe_vocab
from gemma_tune.gguf.vocabulary.gemma4 import load_gemma4_vocab
from gemma_tune.gguf.vocabulary.parts import Vocabulary
from gemma_tune.gguf.vocabulary.sentencepiece import load_llama_vocab, load_sentencepiece_vocab

_FROM_FILES = {"sentencepiece": load_sentencepiece_vocab, "gemma4": load_gemma4_vocab}
_FROM_TOKENIZER = {"sentencepiece-llama": load_llama_vocab, "bpe": load_bpe_vocab}


def load_vocabulary(model: Architecture, checkpoint: Path, tokenizer: Any) -> Vocabulary:
    """The vocabulary of ``checkpoint``, with one token for each row of the model's embedding.

    Args:
        tokenizer: that of the checkpoint as Transformers loads it, where it is there already.

    Raises:
        UserError: the tokenizer's files are missing, broken, or of a kind that llama.cpp doesn't know.
    """
    if load := _FROM_FILES.get(model.tokenizer):
        return load(checkpoint, model.vocab_size)
    return _FROM_TOKENIZER[model.tokenizer](checkpoint, model.vocab_size, tokenizer)
