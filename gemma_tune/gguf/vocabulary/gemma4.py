"""Gemma 4's vocabulary in GGUF: SentencePiece's pieces, but with the order of merges written out, from
``tokenizer.json``.

llama.cpp has a kind of its own for it, ``gemma4``: spaces become "▁", the text is cut at line ends, and the pieces are
merged by rank, characters without a piece becoming bytes. A ``tokenizer.json`` that works in another way is refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from gguf import TokenType

from gemma_tune.base.errors import UserError
from gemma_tune.base.strict_json import object_in
from gemma_tune.gguf.architectures.parts import CONVERTER
from gemma_tune.gguf.vocabulary.parts import (
    ID_KEYS,
    SPACE,
    Vocabulary,
    cuts_nothing,
    halves,
    refuse_duplicates,
    spells_spaces,
)
from gemma_tune.gguf.vocabulary.sentencepiece import ADDED_TOKEN_SCORE

# llama.cpp's parser of chats looks for these in the generated text, where control tokens are not shown.
VISIBLE = {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'}
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def load_gemma4_vocab(checkpoint: Path, vocab_size: int) -> Vocabulary:
    """Read ``tokenizer.json``, and which tokens are special from ``tokenizer_config.json``.

    Args:
        checkpoint: a Hugging Face checkpoint folder.
        vocab_size: rows of the embedding, the length of the result; ids that no token has become ``[PAD<id>]``.

    Raises:
        UserError: a file is missing or broken, llama.cpp would cut text into other tokens, or two ids have one text.
    """
    path = checkpoint / "tokenizer.json"
    content = _read(path)
    if not isinstance(content.get("model"), dict):
        raise _unusable(path, "is not a tokenizer")
    _refuse_others(path, content)
    try:
        texts = {i: text for text, i in content["model"]["vocab"].items()}
        added = {entry["id"]: entry for entry in content.get("added_tokens") or ()}
        merges = [" ".join(halves(pair)) for pair in content["model"]["merges"]]
        texts.update((i, _text(entry)) for i, entry in added.items())
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} holds no whole vocabulary: {error}.", "Copy it again from the base model.") from error
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [int(_type(tokens[i], i in texts, added.get(i))) for i in range(vocab_size)]
    refuse_duplicates(tokens, path)
    scores = [ADDED_TOKEN_SCORE] * len(tokens)  # the key has to be there; merges go by rank
    return Vocabulary("gemma4", tokens, types, _special_ids(checkpoint, tokens), scores, merges)


def _read(path: Path) -> dict[str, Any]:
    try:
        return object_in(path)
    except (OSError, ValueError) as error:
        raise _unusable(path, f"can't be read: {error}") from error


def _unusable(path: Path, why: str) -> UserError:
    return UserError(f"{path} {why}.",
                     f"Copy {path.name} from the base model's repository into {path.parent}, then try again.")


def _refuse_others(path: Path, content: dict[str, Any]) -> None:
    """Refuse what cuts text otherwise than llama.cpp's ``gemma4`` does."""
    model, problems = content["model"], []
    if (model.get("type"), model.get("byte_fallback"), model.get("dropout")) != ("BPE", True, None):
        problems.append("its model isn't BPE with byte_fallback and without dropout")
    if not spells_spaces(content):
        problems.append(f"its normalizer doesn't replace each space by {SPACE} and nothing else")
    if not cuts_nothing(content):
        problems.append(f"its pre_tokenizer {content['pre_tokenizer'].get('type')} is not known")
    trimming = [entry["content"] for entry in content.get("added_tokens") or ()
                if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word")]
    if trimming:
        problems.append(f"added tokens take the white space around them: {', '.join(trimming[:10])}")
    pieces = ("".join(pair).replace(" ", "") for pair in model.get("merges") or ())
    if across := [repr(piece) for piece in pieces if "\n" in piece and piece.strip("\n")]:
        problems.append(f"pieces go across line ends, where llama.cpp cuts: {', '.join(across[:10])}")
    if problems:
        raise UserError(f"{path} is not a tokenizer as Gemma 4's: llama.cpp would cut text into other tokens.",
                        CONVERTER,
                        [f"{path}: {problem}" for problem in problems])


def _text(entry: dict[str, Any]) -> str:
    """What an added token matches. llama.cpp looks for it before spaces are replaced."""
    return entry["content"].replace(SPACE, " ") if entry.get("normalized") else entry["content"]


def _type(text: str, used: bool, added: dict[str, Any] | None) -> TokenType:
    if not used:
        return TokenType.UNUSED
    if added is not None:
        return TokenType.CONTROL if added.get("special") and text not in VISIBLE else TokenType.USER_DEFINED
    return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL


def _special_ids(checkpoint: Path, tokens: list[str]) -> dict[str, int]:
    config, ids = _read(checkpoint / "tokenizer_config.json"), {text: i for i, text in enumerate(tokens)}
    found = {}
    for name in (*ID_KEYS, "mask"):
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[name] = ids[text]
    return found
