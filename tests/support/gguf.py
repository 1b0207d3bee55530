"""What the GGUF tests share: a tiny random Gemma 3 with a SentencePiece vocabulary of its own, and real llama.cpp."""

from __future__ import annotations

import io
import json
import urllib.request
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
DONE = SPECIAL.index("<done>")  # ends a turn; a name that llama.cpp doesn't know, unlike <end_of_turn>


def train_sentencepiece(vocab_size: int = 380, special: tuple[str, ...] = SPECIAL[4:]) -> bytes:
    """Train a BPE model with byte fallback, as Gemma's; return the serialised `tokenizer.model`."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        control_symbols=list(special), user_defined_symbols=list(ORDINARY), minloglevel=2,
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


class LlamaCpp:
    """A GGUF loaded into real llama.cpp (its server, from the xllamacpp wheel), on a loopback address."""

    def __init__(self, path: Path, exact: bool = False):
        """With ``exact``, keys and values are kept in float32 and attention is computed from them."""
        import xllamacpp

        params = xllamacpp.CommonParams()
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.model.path = str(path)
        params.n_ctx, params.cpuparams.n_threads, params.warmup, params.verbosity = 256, 1, False, -1
        self._server = xllamacpp.Server(params)

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
