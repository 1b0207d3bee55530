"""Runs of white space: the ids of Hugging Face's tokenizer in llama.cpp and in Ollama's own engine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from gemma_tune.base.listener import Listener
from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.gguf.vocabulary.parts import Vocabulary
from gemma_tune.gguf.vocabulary.runs import merged_runs, runs_in_gguf
from gemma_tune.gguf.vocabulary.sentencepiece import load_sentencepiece_vocab, sentencepiece_model_from_gguf
from gemma_tune.gguf.writer import write_gguf
from gemma_tune.models.from_gguf import dequantised
from support.gguf import (
    CORPUS,
    RUNS,
    SPECIAL,
    LlamaCpp,
    OllamaEngine,
    train_sentencepiece,
    white_space,
    with_the_converters_runs,
)

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
             head_dim=32, query_pre_attn_scalar=32, pad_token_id=0, eos_token_id=1, bos_token_id=2)  # fmt: skip


@dataclass
class Made:
    folder: Path
    tokenizer: Any
    gguf: Path
    vocabulary: Vocabulary
    looked_for: str

    @property
    def arrays(self) -> dict[str, list[Any]]:
        return {"tokens": self.vocabulary.tokens, "token_type": self.vocabulary.types, "scores": self.vocabulary.scores}


def make(folder: Path, ordinary: tuple[str, ...] = RUNS, **config: Any) -> Any:
    """The files of a tokenizer with Gemma's runs, as Transformers makes Gemma's published ones of its tokenizer.model."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(380 + len(ordinary), ordinary=ordinary))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "unk_token": "<unk>", "add_bos_token": True, **config}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="module", params=["looked for", "merged"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Runs of line ends and tabs are looked for in the text, as in Gemma's tokenizer, or merged like spaces: Transformers
    forgets what is user-defined when it is told of special tokens."""
    folder, looked_for = tmp_path_factory.mktemp("runs") / "model", request.param == "looked for"
    tokenizer = make(folder, **({} if looked_for else {"extra_special_tokens": list(SPECIAL[4:])}))
    Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(folder)
    path = folder.with_suffix(".gguf")
    write_gguf(folder, path, "f16", name="m", chat_template=None, eot_token_id=5)
    return Made(folder, tokenizer, path, load_sentencepiece_vocab(folder, len(tokenizer)), "\n\t" if looked_for else "")


@pytest.fixture(scope="module")
def expected(made: Made) -> dict[str, list[int]]:
    around = (f"<turn>{text}<done>{text}" for text in white_space()[::7])
    texts = (*white_space(), *around, *CORPUS, Path(__file__).read_text(encoding="utf-8")[:3000])
    return {text: made.tokenizer(text, add_special_tokens=False).input_ids for text in texts}


def test_llama_cpp_cuts_runs_as_hugging_face_does(made: Made, expected: dict[str, list[int]]) -> None:
    llama_cpp = LlamaCpp(made.gguf)
    for text, ids in expected.items():
        assert llama_cpp.tokenize(text, special=True) == [2, *ids], text


def test_ollamas_engine_cuts_runs_as_hugging_face_does(made: Made, expected: dict[str, list[int]]) -> None:
    """And not with user-defined tokens: a paragraph break is two tokens then."""
    arrays, _ = with_the_converters_runs(made.arrays, made.looked_for)
    ollama, with_the_converters = OllamaEngine(*made.arrays.values()), OllamaEngine(*arrays.values())
    for text, ids in expected.items():
        if len(text) < 200:
            assert ollama.tokenize(text) == ids, text
    assert len(ollama.tokenize("a\n\nb")) == 3 and len(with_the_converters.tokenize("a\n\nb")) == 4


def test_all_of_gemmas_runs_become_pieces(made: Made) -> None:
    back, runs = with_the_converters_runs(made.arrays, made.looked_for)
    assert runs == len(RUNS) == 92
    assert [back["tokens"][i] for i, kind in enumerate(back["token_type"]) if kind == 4] == [
        text.replace("▁", " ") for text in RUNS]


# ---- vocabularies that stay as llama.cpp's converter writes them ---------------------------------------------------


def pieces(**changes: dict[str, Any]) -> tuple[list[str], list[int], list[float], dict[int, Any], list[Any]]:
    """A vocabulary with runs of up to four line ends, which are looked for, and up to three spaces, which are merged."""
    tokens = {"<s>": 3, "▁": 1, "a": 1, "▁a": 1, "\n": 4, "\n\n": 4, "\n\n\n": 4, "\n\n\n\n": 4, "  ": 4, "   ": 4}
    tokens |= changes.get("tokens", {})
    texts = list(tokens)
    added = {i: {"content": text.replace(" ", "▁"), "normalized": False} for i, text in enumerate(texts)
             if tokens[text] in (3, 4)}
    for text, entry in changes.get("added", {}).items():
        added[texts.index(text)] |= entry
    scores = [-1000.0 if kind != 1 else changes.get("scores", {}).get(text, -float(i))
              for i, (text, kind) in enumerate(tokens.items())]
    return texts, list(tokens.values()), scores, added, [["▁", "▁"], "▁▁ ▁", ["▁", "▁▁"], ["▁", "a"]]


def written(*args: Any) -> list[str]:
    return sorted(text for text, _ in merged_runs(*args).values())


LINES, SPACES = ["\n", "\n\n", "\n\n\n", "\n\n\n\n"], ["▁▁", "▁▁▁"]
CHANGED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, [*LINES, *SPACES]),
    ({"tokens": {"\n": 1}}, [*LINES[1:], *SPACES]),  # one is a learned piece
    ({"scores": {"a": 0.0}}, [*LINES, *SPACES]),
    ({"scores": {"a": 0.5}}, []),  # would come before longer runs
    ({"tokens": {"\n\n\n": 1}}, SPACES),  # a gap: the learned piece is merged by its own score
    ({"tokens": {"\n\t": 4}}, SPACES),  # looked for as well: in "\n\n\t" it begins inside a run
    ({"tokens": {"\n\n</x>": 3}}, SPACES),
    ({"tokens": {"a\n": 1}}, SPACES),  # a learned piece that Hugging Face never makes: it keeps line ends apart
    ({"tokens": {"\n": 1, "a\n": 1}}, [*LINES[1:], *SPACES]),  # of a single one it does
    ({"tokens": {"b▁▁": 1, "a b": 4}}, [*LINES, *SPACES]),  # spaces are merged like everything else
    ({"added": {"\n\n": {"rstrip": True}}}, SPACES),
    ({"added": {"\n": {"content": ""}}}, SPACES),  # one alone is not looked for
    ({"added": {"  ": {"normalized": True}}}, LINES),  # of one length looked for, of another merged
    ({"added": {"  ": {"content": "  "}, "   ": {"content": "   "}}}, [*LINES, *SPACES]),
    ({"tokens": {"a b": 4}, "added": {"  ": {"content": "  "}, "   ": {"content": "   "}}}, LINES),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "runs"), CHANGED)
def test_runs_that_would_be_cut_otherwise_stay_user_defined(changes: dict[str, Any], runs: list[str]) -> None:
    assert written(*pieces(**changes)) == sorted(runs)


@pytest.mark.parametrize("merges", [
    [], [["▁", "a"], ["▁", "▁"], ["▁▁", "▁"], ["▁", "▁▁"]], [["▁▁", "▁"], ["▁", "▁"], ["▁", "▁▁"]], [["▁", "▁"], ["▁▁", "▁"]]])
def test_spaces_that_are_merged_in_another_order_stay_user_defined(merges: list[Any]) -> None:
    """Not known, a word's first, long ones first, not from all their parts."""
    assert written(*pieces()[:4], merges) == LINES


def test_a_tokenizer_that_cuts_at_spaces_keeps_them(tmp_path: Path) -> None:
    """Here the pre-tokenizer lets no run of spaces reach the merges."""
    folder = tmp_path / "m"
    make(folder, ("\n\n", "▁▁"))
    content = json.loads((folder / "tokenizer.json").read_text())
    types = []
    for cut in (content["pre_tokenizer"], {"type": "WhitespaceSplit"}):
        (folder / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": cut}))
        types.append(load_sentencepiece_vocab(folder, 300).types[6:8])
    assert types == [[1, 1], [1, 4]]


def test_only_runs_that_were_written_here_are_found_in_a_gguf() -> None:
    """Other vocabularies have other scores."""
    tokens, types = [b"a", b"\n\n", "▁▁".encode(), b"\t", b"\xff"], [1, 1, 1, 4, 6]
    assert runs_in_gguf(tokens, types, [0.0, 1.0, 0.998, 1.0, 1.0]) == {1: ("\n\n", True), 2: ("▁▁", False)}
    assert runs_in_gguf(tokens, types, [-1.0, -2.0, -1e9, -1000.0, 0.0]) == {}
    assert runs_in_gguf(tokens, types, [5.0, 4.0, 3.0, 2.0, 1.0]) == {}


# ---- and back ------------------------------------------------------------------------------------------------------


def test_a_base_that_was_exported_here_is_the_same_again(
    made: Made, expected: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_TUNE_CACHE", str(tmp_path))
    checkpoint = dequantised(made.gguf, "0" * 64, Listener())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text, ids in expected.items():
        if "▁▁" not in text:  # which Gemma's published files look for as it is; a GGUF doesn't say so
            assert tokenizer(text, add_special_tokens=False).input_ids == ids, text
    write_gguf(checkpoint, tmp_path / "again.gguf", "f16", name="m", chat_template=None, eot_token_id=5)
    before, after = read_gguf_metadata(made.gguf), read_gguf_metadata(tmp_path / "again.gguf")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value, err_msg=key)


def test_tokenizer_model_has_user_defined_runs_again(made: Made) -> None:
    """As from a file that llama.cpp's converter made; nothing about a GGUF's runs is known to SentencePiece."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    back, original = ModelProto(), ModelProto()
    back.ParseFromString(sentencepiece_model_from_gguf(made.gguf) or b"")
    original.ParseFromString((made.folder / "tokenizer.model").read_bytes())
    assert [piece.piece for piece in back.pieces if piece.type == piece.USER_DEFINED] == list(RUNS)
    for piece, first in zip(back.pieces, original.pieces, strict=False):
        assert piece.piece == first.piece
        if first.type in (first.NORMAL, first.USER_DEFINED):
            assert (piece.type, piece.score) == (first.type, -1000.0 if first.piece in RUNS else first.score)
