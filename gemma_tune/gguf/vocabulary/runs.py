"""Runs of white space in a SentencePiece vocabulary, written so that every engine makes Hugging Face's ids of them.

Gemma has a token for each run of up to 31 line ends, tabs or spaces. SentencePiece calls them user-defined, and so does
llama.cpp's converter. Engines look for such tokens in the text before they merge pieces, each in its own way: llama.cpp
takes the longest, of spaces too, which Hugging Face's tokenizer merges like other pieces; Ollama's own engine, of 2025
and early 2026, takes them in the order of their ids, so two line ends are always cut in two.

As normal tokens with the highest scores they are merged before all else, which every engine does alike: the best score
first, of equal ones the leftmost. With one score for all, a run grows from the left until no token is longer, then the
next one begins: the longest match. With scores that fall with the length, ones become twos, twos become fours, as
merges by rank do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType

from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.gguf.vocabulary.parts import SPACE, halves

# Plain numbers: to look an enumeration's up for each of 262,144 tokens takes longer than all else here.
_NORMAL, _USER_DEFINED = int(TokenType.NORMAL), int(TokenType.USER_DEFINED)
FIRST = 1.0  # the score of runs that Hugging Face finds in the text; of those that it merges, 1 - length/1000
_PER_LENGTH = 1000
_TAKES_MORE = ("lstrip", "rstrip", "single_word")  # of the text around an added token


def merged_runs(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float],
                added: Mapping[int, Mapping[str, Any]], merges: Sequence[Any]) -> dict[int, tuple[str, float]]:
    """The user-defined runs of white space that merging cuts exactly as Hugging Face's tokenizer does.

    Args:
        tokens, types, scores: as a GGUF has them, user-defined tokens with real spaces.
        added: id → entry of an added token, as in ``tokenizer.json``.
        merges: as in ``tokenizer.json``, the first to merge first.

    Returns:
        id → text and score of the normal token to write instead. All runs of a character are left out where some text
        would be cut in another way: when lengths are missing, when other tokens hold the character and are looked for
        in the text, when other pieces merge first.
    """
    if any(score > 0 and kind == _NORMAL for score, kind in zip(scores, types, strict=True)):
        return {}
    found = {}
    for character, ids in _user_defined_runs(tokens, types).items():
        piece = character.replace(" ", SPACE)
        if not _complete(ids):
            continue
        entries = [added.get(i, {}) for i in ids.values()]
        in_text = {_in_text(entry) for entry in entries}
        if any(entry.get(key) for entry in entries for key in _TAKES_MORE):
            continue
        if in_text == {True} and _alone(character, ids, tokens, types):
            found.update((i, (piece * length, FIRST)) for length, i in ids.items())
        elif in_text == {False} and _shortest_first(piece, max(ids), merges):
            found.update((i, (piece * length, FIRST - length / _PER_LENGTH)) for length, i in ids.items())
    return found


def runs_in_gguf(tokens: Iterable[bytes], types: Iterable[int], scores: Iterable[float]) -> dict[int, tuple[str, bool]]:
    """The runs that `merged_runs` gave to a GGUF, found by their scores: there all other pieces have 0 or less.

    Returns:
        id → text, and whether Hugging Face finds the token in the text; else it merges it. Empty for other files.
    """
    found = {i: (raw.decode("utf-8", errors="replace"), score == FIRST)
             for i, (raw, kind, score) in enumerate(zip(tokens, types, scores, strict=True))
             if score > 0 and kind == _NORMAL}
    return found if all(_is_run(text) for text, _ in found.values()) else {}


def looks_for_spaces(gguf: Path) -> bool:
    """Whether a GGUF's SentencePiece vocabulary has user-defined runs of spaces, as from llama.cpp's converter."""
    keys = (Keys.Tokenizer.MODEL, Keys.Tokenizer.LIST, Keys.Tokenizer.TOKEN_TYPE)
    model, tokens, types = map(read_gguf_metadata(gguf, keys).get, keys)
    return model == "llama" and any(kind == _USER_DEFINED and len(text) > 1 and not text.strip(b" ")
                                    for text, kind in zip(tokens, types, strict=True))


def _is_run(text: str) -> bool:
    return len(set(text)) == 1 and (text[0].isspace() or text[0] == SPACE)


def _user_defined_runs(tokens: Sequence[str], types: Sequence[int]) -> dict[str, dict[int, int]]:
    """White space character → length of a run of it → id."""
    runs: dict[str, dict[int, int]] = defaultdict(dict)
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _USER_DEFINED and _is_run(text):
            runs[text[0]][len(text)] = i
    return runs


def _complete(ids: Mapping[int, int]) -> bool:
    """Whether each run up to the longest has a token; one character alone can be a learned piece, or bytes."""
    return 2 <= max(ids) < _PER_LENGTH and ids.keys() | {1} == set(range(1, max(ids) + 1))


def _in_text(entry: Mapping[str, Any]) -> bool:
    """Whether an added token is looked for in what a person writes; "▁" is found only once spaces were replaced."""
    text = entry.get("content", "")
    return bool(text) and (SPACE not in text or bool(entry.get("normalized")))


def _alone(character: str, ids: Mapping[int, int], tokens: Sequence[str], types: Sequence[int]) -> bool:
    """Whether no other token of the text competes for the character: one that is looked for as well could begin
    before a run or in it, and a learned piece could take a part of one that Hugging Face keeps apart."""
    piece, own = character.replace(" ", SPACE), set(ids.values())
    taken = piece * min(ids)
    holding = [i for i, text in enumerate(tokens) if piece in text or character in text]  # few of a great many
    return not any(taken in tokens[i] if types[i] == _NORMAL else character in tokens[i].replace(SPACE, " ")
                   for i in holding if i not in own)


def _shortest_first(piece: str, longest: int, merges: Sequence[Any]) -> bool:
    """Whether runs are merged from all their parts, shorter ones before longer ones, and all before other pieces."""
    inside = ("".join(halves(pair)) for pair in merges if any(piece in part for part in pair))
    expected = chain.from_iterable([piece * length] * (length - 1) for length in range(2, longest + 1))
    return all(result == next(inside, None) for result in expected)
