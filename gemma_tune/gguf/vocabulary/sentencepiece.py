"""SentencePiece vocabularies, from a GGUF into a `tokenizer.model` and from a checkpoint into GGUF's token arrays.

Why both ways: Transformers 5 saves only `tokenizer.json`, whose BPE merges llama.cpp can't use for Gemma; every
exporter wants the SentencePiece `tokenizer.model`. A base that came as a GGUF has no such file, but all it needs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import Keys, TokenType

from gemma_tune.base.errors import UserError
from gemma_tune.base.strict_json import object_in
from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.gguf.vocabulary.parts import (
    ID_KEYS,
    SPACE,
    Vocabulary,
    cuts_nothing,
    looks_special,
    refuse_duplicates,
    spells_spaces,
)
from gemma_tune.gguf.vocabulary.runs import merged_runs, runs_in_gguf

if TYPE_CHECKING:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

ADDED_TOKEN_SCORE = -1000.0  # what llama.cpp's converter gives an added token: never worth a merge
PADDING_SCORE = -10000.0  # what it gives an id that no token claims


def sentencepiece_model_from_gguf(gguf_path: Path) -> bytes | None:
    """Rebuild the SentencePiece `tokenizer.model` that a GGUF's token arrays were made from.

    Args:
        gguf_path: a GGUF file of version 2 or 3.

    Returns:
        the serialised protobuf, proven to load in SentencePiece; None when the vocabulary isn't SentencePiece's.

    Raises:
        UserError: the file isn't a whole GGUF, or its token arrays don't make a vocabulary.
    """
    wanted = {Keys.General.ARCHITECTURE, Keys.Tokenizer.MODEL, Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES,
              Keys.Tokenizer.TOKEN_TYPE, Keys.Tokenizer.ADD_PREFIX, *ID_KEYS.values()}  # fmt: skip
    metadata = read_gguf_metadata(gguf_path, wanted)
    if metadata.get(Keys.Tokenizer.MODEL) != "llama":
        return None
    model = _model_from_arrays(gguf_path, metadata).SerializeToString()
    _check_loads(model, gguf_path)
    return model


def load_sentencepiece_vocab(checkpoint: Path, vocab_size: int) -> Vocabulary:
    """Read a checkpoint's vocabulary the way llama.cpp's converter does, but for runs of white space.

    The pieces of `tokenizer.model` come first; tokens added on top of them (`added_tokens.json`, `tokenizer.json`,
    `tokenizer_config.json`, the last wins) replace or extend them: a special one is CONTROL, any other USER_DEFINED
    with real spaces. Ids that nothing claims become `[PAD<id>]`; ids from `vocab_size` on have no embedding and are
    left out (Gemma 3 1B has one such token, for images). Runs that merging cuts as Hugging Face does become NORMAL,
    see `runs`.

    Args:
        checkpoint: a Hugging Face checkpoint folder.
        vocab_size: rows of the embedding, the length of the result.

    Raises:
        UserError: `tokenizer.model` is missing or broken, or two ids have the same text (llama.cpp aborts on those).
    """
    content = _read_json(checkpoint / "tokenizer.json")
    added = _added_tokens(checkpoint, content)
    vocab = _converters_vocab(checkpoint, vocab_size, added)
    assert vocab.scores is not None
    runs = merged_runs(vocab.tokens, vocab.types, vocab.scores, added, _merges(content))
    for i, (text, score) in runs.items():
        vocab.tokens[i], vocab.types[i], vocab.scores[i] = text, int(TokenType.NORMAL), score
    return vocab


def _converters_vocab(checkpoint: Path, vocab_size: int, added_tokens: dict[int, dict[str, Any]]) -> Vocabulary:
    """The arrays that llama.cpp's converter writes."""
    path = checkpoint / "tokenizer.model"
    model = _parse_model(path)
    pieces = model.pieces[:vocab_size]
    tokens, scores, types = [p.piece for p in pieces], [p.score for p in pieces], [int(p.type) for p in pieces]
    unclaimed = range(len(pieces), vocab_size)
    tokens += [f"[PAD{i}]" for i in unclaimed]
    scores += [PADDING_SCORE] * len(unclaimed)
    types += [int(TokenType.UNUSED)] * len(unclaimed)
    # What SentencePiece alone knows to be user-defined gets the same treatment as an added token that isn't special.
    added = {i: (tokens[i], False) for i, kind in enumerate(types) if kind == TokenType.USER_DEFINED}
    added.update((i, (token["content"], bool(token.get("special")))) for i, token in added_tokens.items()
                 if i < vocab_size)
    for i, (text, special) in added.items():
        control = special or looks_special(text)
        tokens[i] = text if control else text.replace(SPACE, " ")
        scores[i] = ADDED_TOKEN_SCORE
        types[i] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    refuse_duplicates(tokens, path)
    return Vocabulary("llama", tokens, types, _special_ids(model, vocab_size), scores, pre="default", add_eos=False,
                      add_sep=False)


def load_llama_vocab(checkpoint: Path, vocab_size: int, tokenizer: Any = None) -> Vocabulary:
    """Read a vocabulary of Llama 2 or an early Mistral, as llama.cpp's converter does.

    Whether they add a BOS and a space is asked of the tokenizer that Transformers loads. Some add the space at the
    start of a text alone ("legacy": false), llama.cpp behind every special token or nowhere: a rendered chat starts
    with a special token, so what happens behind one decides.

    Args:
        tokenizer: that of the checkpoint, where it was loaded before.

    Raises:
        UserError: as `load_sentencepiece_vocab`, and a tokenizer that doesn't load, or has another rule for spaces.
    """
    from gemma_tune.encoding.tokenizer import load_tokenizer
    from gemma_tune.gguf.architectures.parts import CONVERTER

    added = _added_tokens(checkpoint, _read_json(checkpoint / "tokenizer.json"))
    vocab, tokenizer = _converters_vocab(checkpoint, vocab_size, added), tokenizer or load_tokenizer(checkpoint)
    ids = [tokenizer(f"{tokenizer.bos_token}{text}", add_special_tokens=False)["input_ids"] for text in ("a", " a")]
    behind = ["".join(tokenizer.convert_ids_to_tokens(some[1:])) for some in ids]
    if behind not in (["a", f"{SPACE}a"], [f"{SPACE}a", f"{SPACE}{SPACE}a"]):
        raise UserError(f"{checkpoint} has a tokenizer that puts spaces before text as llama.cpp can't.", CONVERTER)
    return replace(vocab, add_bos=tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id,
                   add_space_prefix=behind[0] != "a")


def name_pieces(checkpoint: Path, names: Collection[str], ids: Collection[int]) -> None:
    """Give new tokens their names in a checkpoint's `tokenizer.model` too, where there is one: llama.cpp's converter
    reads that, and not `tokenizer.json`, which has them.

    Args:
        names, ids: of the tokens, as far as the one or the other is known.

    Raises:
        UserError: one of the two is broken.
    """
    path = checkpoint / "tokenizer.model"
    if not (names or ids) or not path.is_file():
        return
    model = _parse_model(path)
    for i, entry in _added_tokens(checkpoint, _read_json(checkpoint / "tokenizer.json")).items():
        text = entry["content"]
        if i < len(model.pieces) and (text in names or i in ids and not entry.get("special")):
            model.pieces[i].piece, model.pieces[i].type = text, model.pieces[i].USER_DEFINED
    path.write_bytes(model.SerializeToString())


def _model_from_arrays(path: Path, metadata: dict[str, Any]) -> ModelProto:
    """Build the protobuf from GGUF metadata; `path` is for messages only."""
    # SentencePiece's own classes, which Transformers uses too: a second copy of them can't live in one process.
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    arrays = [metadata.get(key) for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.SCORES, Keys.Tokenizer.TOKEN_TYPE)]
    if any(array is None for array in arrays) or len({len(array) for array in arrays}) != 1:
        hint = "Use a GGUF made by llama.cpp's converter."
        raise UserError(f"{path} has no whole vocabulary (tokens, scores and token types of one length).", hint)
    texts = [raw.decode("utf-8", errors="replace") for raw in arrays[0]]
    types = arrays[2].tolist()
    ids = {name: metadata.get(key, -1) for name, key in ID_KEYS.items()}
    ids = {name: i if i < len(texts) else -1 for name, i in ids.items()}
    ids["unk"] = _unknown_id(path, texts, types, ids["unk"])
    scores, model = arrays[1].tolist(), ModelProto()
    for i in runs_in_gguf(arrays[0], types, scores):
        types[i], scores[i] = int(TokenType.USER_DEFINED), ADDED_TOKEN_SCORE
    for i, (text, score, kind) in enumerate(zip(texts, scores, types, strict=True)):
        kind = _piece_type(kind, is_unknown=i == ids["unk"])
        # Text is matched after its spaces became "▁", while llama.cpp matches user-defined tokens before that.
        piece = text.replace(" ", SPACE) if kind == TokenType.USER_DEFINED else text
        model.pieces.add(piece=piece, score=score, type=kind)
    _fill_specs(model, metadata, ids)
    return model


def _unknown_id(path: Path, texts: list[str], types: list[int], declared: int) -> int:
    """The one token that SentencePiece is to treat as unknown: the declared one, else the typed one, else `<unk>`."""
    if declared >= 0:
        return declared
    if int(TokenType.UNKNOWN) in types:
        return types.index(int(TokenType.UNKNOWN))
    if "<unk>" in texts:
        return texts.index("<unk>")
    raise UserError(f"{path} has no unknown token, which SentencePiece needs.", "Use the original base model instead.")


def _piece_type(kind: int, is_unknown: bool) -> int:
    """SentencePiece wants exactly one UNKNOWN piece; llama.cpp's files often have none (`<unk>` is CONTROL there)."""
    if is_unknown:
        return int(TokenType.UNKNOWN)
    if kind == TokenType.UNKNOWN:
        return int(TokenType.CONTROL)
    return kind if TokenType.NORMAL <= kind <= TokenType.BYTE else int(TokenType.NORMAL)


def _fill_specs(model: ModelProto, metadata: dict[str, Any], ids: dict[str, int]) -> None:
    """Set how the pieces are to be used: BPE, identity normalisation, ids of the special tokens (-1 where absent)."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.vocab_size = len(model.pieces)
    trainer.byte_fallback = any(p.type == p.BYTE for p in model.pieces)
    for name, i in ids.items():
        setattr(trainer, f"{name}_id", i)
        if i >= 0:  # SentencePiece finds the ids through these texts
            setattr(trainer, f"{name}_piece", model.pieces[i].piece)
    normalizer.name = "identity"
    # Without the key llama.cpp adds a space for every "llama" vocabulary; Gemma never wants it.
    gemma = str(metadata.get(Keys.General.ARCHITECTURE, "")).startswith("gemma")
    normalizer.add_dummy_prefix = bool(metadata.get(Keys.Tokenizer.ADD_PREFIX, not gemma))
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True


def _check_loads(model: bytes, path: Path) -> None:
    """SentencePiece refuses duplicates, empty pieces and a missing byte; better here than at the next export."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_proto=model)
    except (RuntimeError, OSError) as error:
        hint = "Use the original base model (a hub id or a folder) instead of the GGUF."
        raise UserError(f"The vocabulary of {path} doesn't make a SentencePiece model: {error}", hint) from error


def _parse_model(path: Path) -> ModelProto:
    """Parse `tokenizer.model`; a missing or broken file is a UserError that says where to get it."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    hint = ("Copy tokenizer.model from the base model's repository into the base model's directory; `gemma-tune merge "
            "--force` takes it along from there.")
    if not path.is_file():
        raise UserError(f"{path} is missing: without it the exported model would tokenize text wrongly.", hint)
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UserError(f"{path} is not a SentencePiece model.", hint) from error
    if not model.pieces:
        raise UserError(f"{path} holds no tokens.", hint)
    return model


def _added_tokens(checkpoint: Path, content: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Tokens that the Hugging Face files add: id → entry as in `tokenizer.json`. Missing files add nothing."""
    added = {int(i): {"content": text} for text, i in _read_json(checkpoint / "added_tokens.json").items()}
    added.update((int(entry["id"]), entry) for entry in content.get("added_tokens") or ())
    decoder = _read_json(checkpoint / "tokenizer_config.json").get("added_tokens_decoder", {})
    added.update((int(i), entry) for i, entry in decoder.items())
    return added


def _merges(content: dict[str, Any]) -> Sequence[Any]:
    """The merges of a `tokenizer.json`, where it applies them to whole texts."""
    merges = (content.get("model") or {}).get("merges") or ()
    return merges if spells_spaces(content) and cuts_nothing(content) else ()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return object_in(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as JSON: {error}.", "Copy it again from the base model.") from error


def _special_ids(model: ModelProto, vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens, from the trainer's record: fine-tuning changes tokenizer_config.json, never this."""
    spec = model.trainer_spec
    named = {name: getattr(spec, f"{name}_id") for name in ID_KEYS}
    return {name: i for name, i in named.items() if 0 <= i < vocab_size}
