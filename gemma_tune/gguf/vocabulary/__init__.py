"""Vocabularies of every kind that a GGUF can hold, by the kind that an architecture asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFWriter

from gemma_tune.gguf.architectures.parts import Architecture
from gemma_tune.gguf.vocabulary.bpe import add_bpe_tokenizer, load_bpe_vocab
from gemma_tune.gguf.vocabulary.gemma4 import add_gemma4_tokenizer, load_gemma4_vocab
from gemma_tune.gguf.vocabulary.sentencepiece import add_tokenizer, load_llama_vocab, load_sentencepiece_vocab


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that is ready to be written.

    Args:
        tokens: the text of each token, by its id.
        add: adds the ``tokenizer.*`` keys to a writer, with the chat template and the id that ends a turn, if any.
    """

    tokens: list[str]
    add: Callable[[GGUFWriter, str | None, int | None], None]


_KINDS = {
    "sentencepiece": (load_sentencepiece_vocab, add_tokenizer),
    "sentencepiece-llama": (load_llama_vocab, add_tokenizer),
    "gemma4": (load_gemma4_vocab, add_gemma4_tokenizer),
    "bpe": (load_bpe_vocab, add_bpe_tokenizer),
}


def load_vocabulary(model: Architecture, checkpoint: Path) -> Vocabulary:
    """The vocabulary of ``checkpoint``, with one token for each row of the model's embedding.

    Raises:
        UserError: the tokenizer's files are missing, broken, or of a kind that llama.cpp doesn't know.
    """
    load, add = _KINDS[model.tokenizer]
    vocab = load(checkpoint, model.vocab_size)
    return Vocabulary(vocab.tokens, lambda writer, template, eot: add(writer, vocab, template, eot))
