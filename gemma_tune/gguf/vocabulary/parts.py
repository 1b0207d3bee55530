"""A vocabulary as GGUF holds it, whatever tokenizer it comes from, and the one place that writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys

from gemma_tune.base.errors import UserError

SPACE = "\u2581"  # "▁": how SentencePiece spells a space inside a piece
ID_KEYS = {
    "bos": Keys.Tokenizer.BOS_ID, "eos": Keys.Tokenizer.EOS_ID,
    "unk": Keys.Tokenizer.UNK_ID, "pad": Keys.Tokenizer.PAD_ID,
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that is ready to be written; the lists are indexed by token id and of equal length.

    Args:
        model: llama.cpp's name for the kind of tokenizer: ``llama`` (SentencePiece), ``gpt2`` (byte-level BPE) or
            ``gemma4``.
        tokens: the text of each token, unique. In SentencePiece's a space is "▁" in ordinary tokens and " " in
            user-defined ones; byte-level BPE's are in GPT-2's spelling of bytes.
        types: `gguf.TokenType` numbers (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte).
        special_ids: ids of "bos", "eos", "unk", "pad" and "mask", those that the vocabulary has.
        scores: merge priority of each token, the highest first; None where ``merges`` has the order.
        merges: pairs of pieces, a space between them, the first to merge first.
        pre: llama.cpp's name for the pre-tokenizer.
        add_bos, add_eos, add_sep: whether plain text gets one; None leaves the key out, as llama.cpp's converter does.
        add_space_prefix: whether a text, and what follows a special token, gets a space before it.
    """

    model: str
    tokens: list[str]
    types: list[int]
    special_ids: dict[str, int] = field(default_factory=dict)
    scores: list[float] | None = None
    merges: list[str] | None = None
    pre: str | None = None
    add_bos: bool = True
    add_eos: bool | None = None
    add_sep: bool | None = None
    add_space_prefix: bool = False


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, chat_template: str | None, eot: int | None) -> None:
    """Add the ``tokenizer.*`` keys to a GGUF whose header isn't written yet.

    The end of text stays what the base says (`<eos>`), and the end of a turn goes into a key of its own: llama.cpp
    stops at both (it puts the eos and eot ids into its end-of-generation set), and so does Ollama's engine. Making the
    end of a turn the eos would leave `<eos>`, which the model may still produce, without its meaning.

    Args:
        writer: a writer whose header isn't written yet.
        chat_template: Jinja text; no key is written when None.
        eot: id of the token that ends a turn; no key is written when None.

    Raises:
        UserError: nothing ends a text in byte-level BPE, where llama.cpp would take token 11.
    """
    ids = dict(vocabulary.special_ids)
    if vocabulary.model == "gpt2":
        if eot is not None:
            ids.setdefault("eos", eot)
        if "eos" not in ids:
            raise UserError("This model's tokenizer names no token that ends a text.",
                            "Set eos_token in tokenizer_config.json, as the base model's documentation says.")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    for add, value in ((writer.add_tokenizer_pre, vocabulary.pre), (writer.add_token_scores, vocabulary.scores),
                       (writer.add_token_merges, vocabulary.merges), (writer.add_add_bos_token, vocabulary.add_bos),
                       (writer.add_add_eos_token, vocabulary.add_eos), (writer.add_add_sep_token, vocabulary.add_sep),
                       (writer.add_add_space_prefix, vocabulary.add_space_prefix), (writer.add_eot_token_id, eot),
                       (writer.add_chat_template, chat_template)):
        if value is not None:
            add(value)
    for name, i in ids.items():
        writer.add_uint32({**ID_KEYS, "mask": Keys.Tokenizer.MASK_ID}[name], i)


def halves(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two pieces of a merge in ``tokenizer.json``, where older files have them in one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def spells_spaces(content: dict[str, Any]) -> bool:
    """Whether the normalizer of a ``tokenizer.json`` replaces each space by "▁", and does nothing else."""
    normalizer = content.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence" and len(normalizer["normalizers"]) == 1:
        [normalizer] = normalizer["normalizers"]
    return normalizer == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def cuts_nothing(content: dict[str, Any]) -> bool:
    """Whether its pre-tokenizer leaves a text whole. A cut at spaces finds none: the normalizer has replaced them."""
    cut = content.get("pre_tokenizer")
    return cut is None or (cut.get("type"), cut.get("pattern")) == ("Split", {"String": " "})


def looks_special(text: str) -> bool:
    """Tokens that Gemma's files list as ordinary although they never stand for text; llama.cpp's converter agrees."""
    brackets = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(start) and text.endswith(end) for start, end in brackets
    )


def refuse_duplicates(tokens: Sequence[str], path: Path) -> None:
    """llama.cpp looks tokens up by text and aborts the whole process when two ids share one."""
    if len(set(tokens)) < len(tokens):
        twice = [repr(text) for text, count in Counter(tokens).items() if count > 1]
        hint = "Give each added token its own text, or remove it from tokenizer.json."
        raise UserError(f"{path} and the added tokens give several ids the same text: {', '.join(twice[:10])}.", hint)
