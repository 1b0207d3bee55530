"""What the GGUF tests share: a tiny random Gemma 3 with a SentencePiece vocabulary of its own, and real llama.cpp."""

from __future__ import annotations

import ctypes
import io
import json
import random
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

CORPUS = (
    "The quick brown fox jumps over the lazy dog while seven wizards box quietly.\n\nA second paragraph, with numbers.",
    "def add(left, right):\n    return left + right  # two  spaces",
    "今天天气很好,我们去公园散步。 Grüße aus Köln! 😀",
    "She sells sea shells on the sea shore; the shells she sells are sea shells for sure.",
)
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<done>")  # their ids are 0 to 5
ORDINARY = ("\n\n", "\u2581\u2581")  # user-defined in the SentencePiece model: a paragraph break and two spaces
RUNS = tuple(c * n for c, shortest in (("\n", 1), ("\u2581", 2), ("\t", 1)) for n in range(shortest, 32))  # Gemma's
DONE = SPECIAL.index("<done>")  # ends a turn; a name that llama.cpp doesn't know, unlike <end_of_turn>


def write(writer: Any) -> None:
    """Write what a GGUFWriter was told of, and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def white_space() -> list[str]:
    """Runs of each kind by themselves and inside a text, up to some times the longest token, and all kinds mixed."""
    picked = random.Random(15)
    between = ["the", " the", "x", "今天", "\r\n", "\r", "\u3000", "\u00a0", "▁", ",", " \n", "\t\n", "\u2028"]
    alone = [text for run in " \n\t" for length in (*range(1, 12), *range(28, 36), 40, 47, 62, 63, 64, 65, 80, 93, 97)
             for text in (run * length, f"the{run * length}seven")]
    return alone + [
        "".join(picked.choice(between) if picked.random() < 0.5 else picked.choice(" \n\t") * picked.randint(1, 80)
                for _ in range(picked.randint(2, 9))) for _ in range(60)]


def train_sentencepiece(vocab_size: int = 380, special: tuple[str, ...] = SPECIAL[4:],
                        ordinary: tuple[str, ...] = ORDINARY) -> bytes:
    """Train a BPE model with byte fallback, as Gemma's; return the serialised `tokenizer.model`."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=list(special), user_defined_symbols=list(ordinary), minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(folder: Path, model: bytes) -> int:
    """Write tokenizer.model and the added tokens of tokenizer.json; return how many ids are in use.

    Two added tokens lie behind the SentencePiece pieces: `<extra>`, ordinary, and `<unused7>`, which isn't marked
    special although it never stands for text.
    """
    from sentencepiece import SentencePieceProcessor

    size = SentencePieceProcessor(model_proto=model).vocab_size()
    added = [{"id": i, "content": text, "special": True} for i, text in enumerate(SPECIAL)]
    added += [{"id": 6 + i, "content": text, "special": False} for i, text in enumerate(ORDINARY)]
    added += [{"id": size, "content": "<extra>", "special": False}, {"id": size + 1, "content": "<unused7>"}]
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}), encoding="utf-8")
    return size + 2


def make_checkpoint(folder: Path, model: bytes, shard_size: str = "1GB", **changes: Any) -> Any:
    """Save a random bf16 Gemma 3 of six layers (the sixth attends to everything) and its tokenizer into `folder`.

    Norm weights are far from zero, so that forgetting Gemma's `1 + weight` shows.

    Args:
        folder: created if it isn't there.
        model: the serialised `tokenizer.model`.
        shard_size: as in `save_pretrained`.
        changes: settings of `Gemma3TextConfig` to change.

    Returns:
        the model in float32, holding exactly the saved bf16 values.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    folder.mkdir(parents=True, exist_ok=True)
    used = write_tokenizer(folder, model)
    settings = dict(
        vocab_size=used + 3, hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, max_position_embeddings=256,
        pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    network = Gemma3ForCausalLM(Gemma3TextConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.25)
    network = network.to(torch.bfloat16)
    network.save_pretrained(folder, max_shard_size=shard_size)
    return network.float().eval()


def with_the_converters_runs(arrays: dict[str, list[Any]], looked_for: str = "\n\t") -> tuple[dict[str, list[Any]], int]:
    """Arrays of a GGUF as llama.cpp's converter writes them: runs of white space are user-defined tokens, not pieces.

    Args:
        arrays: ``tokens``, ``token_type`` and ``scores``.
        looked_for: the characters whose runs Hugging Face finds in the text; it merges others.

    Returns:
        the arrays, and how many runs there were; each had the score that merges it as Hugging Face does.
    """
    tokens, types, scores = (list(arrays[key]) for key in ("tokens", "token_type", "scores"))
    runs = [i for i, score in enumerate(scores) if types[i] == 1 and score > 0]
    for i in runs:
        character, length = tokens[i][0], len(tokens[i])
        assert tokens[i] == character * length and character in "\n\t\u2581"
        assert abs(scores[i] - (1 if character in looked_for else 1 - length / 1000)) < 1e-6
        tokens[i], types[i], scores[i] = tokens[i].replace("\u2581", " "), 4, -1000.0
    return {"tokens": tokens, "token_type": types, "scores": scores}, len(runs)


class OllamaEngine:
    """How Ollama's own engine (0.24 and others of its time) makes ids of SentencePiece vocabularies: it looks for
    control and user-defined tokens in the order of their ids, then merges the pair with the best score, the leftmost
    of equal ones."""

    def __init__(self, tokens: list[str], types: list[int], scores: list[float]):
        self._ids, self._scores = {text: i for i, text in enumerate(tokens)}, scores
        self._special = [text for text, kind in zip(tokens, types, strict=True) if kind in (3, 4)]

    def tokenize(self, text: str) -> list[int]:
        parts: list[str | int] = [text]
        for special in self._special:
            parts = [piece for part in parts for piece in (self._cut(part, special) if isinstance(part, str) else [part])]
        return [i for part in parts for i in (self._merge(part.replace(" ", "\u2581")) if isinstance(part, str) else [part])]

    def _cut(self, text: str, special: str) -> list[str | int]:
        between = [[piece, self._ids[special]] for piece in text.split(special)]
        return [part for pair in between for part in pair if part != ""][:-1]

    def _merge(self, text: str) -> list[int]:
        pieces = list(text)
        while True:
            pairs = ((self._ids.get(a + b), at) for at, (a, b) in enumerate(pairwise(pieces)))
            best = min(((-self._scores[i], at) for i, at in pairs if i is not None), default=None)
            if best is None:
                break
            pieces[best[1]:best[1] + 2] = ["".join(pieces[best[1]:best[1] + 2])]
        return [i for piece in pieces for i in ([self._ids[piece]] if piece in self._ids else
                                                [self._ids[f"<0x{byte:02X}>"] for byte in piece.encode()])]


class LlamaCpp:
    """A GGUF loaded into real llama.cpp (its server, from the xllamacpp wheel), on a loopback address."""

    def __init__(self, path: Path, exact: bool = False, projector: Path | None = None):
        """With ``exact``, keys and values are kept in float32 and attention is computed from them; with a projector's
        file it sees or hears."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        if projector:
            params.mmproj.path, params.mmproj_use_gpu = str(projector), False
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.model.path = str(path)
        params.n_ctx, params.cpuparams.n_threads, params.warmup, params.verbosity = 256, 1, False, -1
        self._server = xllamacpp.Server(params)
        # Never taken apart: that waits for the server's threads while it holds Python's lock, and now and then one of
        # them waits for the lock.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._server))

    def post(self, endpoint: str, **body: Any) -> dict[str, Any]:
        url, data = self._server.listening_address + endpoint, json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as reply:
            return json.load(reply)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`; with `special`, BOS is added and control tokens are recognised."""
        return self.post("/tokenize", content=text, add_special=special, parse_special=special)["tokens"]

    def complete(self, prompt: list[int], count: int, **settings: Any) -> dict[str, Any]:
        """The server's reply to a greedy completion of up to `count` tokens."""
        greedy = {"temperature": 0, "top_k": 1, "return_tokens": True, "cache_prompt": False}
        return self.post("/completion", prompt=prompt, n_predict=count, **greedy, **settings)
