"""Byte-level BPE vocabularies (SmolLM2, Llama 3, Qwen, newer Mistrals) in GGUF, and their pre-tokenizers.

A pre-tokenizer cuts text into words before merges apply. llama.cpp has a fixed set of them, and a GGUF names one. The
name is found from what the pre-tokenizer does, not from the ids of a test text: so a vocabulary with tokens of one's
own is still recognised, and one that llama.cpp doesn't have is refused instead of cutting text in another way.

What is read is the tokenizer that Transformers loads, which trained the model: some of its classes build their own
pre-tokenizer, whatever `tokenizer.json` says. One difference is left: llama.cpp doesn't compose characters (NFC) as
Qwen's tokenizer does, which shows in decomposed text only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import TokenType

from gemma_tune.base.checkpoint import read_config
from gemma_tune.base.errors import UserError
from gemma_tune.gguf.architectures.parts import CONVERTER
from gemma_tune.gguf.vocabulary.parts import ID_KEYS, Vocabulary, looks_special, refuse_duplicates

_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS % r"\p{N}{1,3}", _WORDS % _DIGIT
# Words with their accents, in Qwen 3.5 and later.
_QWEN35 = _SUFFIX + (r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
           r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_GPT4O = (rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_SUFFIX}?"
          rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_SUFFIX}?"
          r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Other spellings of the same, as newer files have them.
_SPELLINGS = {r"'(?:[sdmt]|ll|ve|re)": r"'s|'t|'re|'ve|'m|'ll|'d", r"'(?i:[sdmt]|ll|ve|re)": _SUFFIX}

# llama.cpp's name → what it cuts by, one after the other, and whether a whole word that is a token needs no merges
# (`ignore_merges`). From llama-vocab.cpp; where several names mean the same, the one that its converter writes.
_PRE_TOKENIZERS = {
    "gpt-2": ((_GPT2,), False), "smollm": ((_DIGIT, _GPT2), False), "qwen2": ((_QWEN2,), False),
    "llama-bpe": ((_LLAMA3,), True), "smaug-bpe": ((_LLAMA3,), False), "tekken": ((_TEKKEN,), True),
    "qwen35": ((_QWEN35,), False), "gpt-4o": ((_GPT4O,), False),
}  # fmt: skip
_SAME = {
    "gpt-2": ("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
              "exaone4"),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
    "smaug-bpe": ("dbrx", "glm4", "chatglm-bpe"),
    "gpt-4o": ("llama4", "kanana2"),
}


def load_bpe_vocab(checkpoint: Path, vocab_size: int, tokenizer: Any = None) -> Vocabulary:
    """Read a checkpoint's byte-level BPE vocabulary.

    Args:
        checkpoint: a Hugging Face checkpoint folder.
        vocab_size: rows of the embedding, the length of the result: ids that no token has become ``[PAD<id>]``, and
            added tokens behind the last row, which the model can't read, are left out.
        tokenizer: that of the checkpoint, where it was loaded before.

    Raises:
        UserError: no tokenizer there, or one that cuts text otherwise than llama.cpp can.
    """
    from gemma_tune.encoding.tokenizer import load_tokenizer

    tokenizer, path = tokenizer or load_tokenizer(checkpoint), checkpoint / "tokenizer.json"
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{checkpoint} has no tokenizer of the fast kind.", "Copy tokenizer.json from the base model.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    pre, ends = pre_tokenizer_name(content), _ends(tokenizer)
    problems = _differences(content, vocab_size)
    if pre is None:
        shown = json.dumps(content["pre_tokenizer"], ensure_ascii=False)
        problems.insert(0, f"llama.cpp has no pre-tokenizer that cuts as {shown}")
    if ends is None:
        problems.append("it adds other tokens to a text than BOS and EOS")
    if problems:
        raise UserError(f"{path} is a tokenizer that llama.cpp would not follow.", CONVERTER,
                        [f"{path}: {problem}" for problem in problems])
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    texts = {i: text for text, i in content["model"]["vocab"].items()} | {i: e["content"] for i, e in added.items()}
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [int(_type(i, tokens[i], added.get(i))) for i in range(vocab_size)]
    refuse_duplicates(tokens, path)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    bos, eos = ends
    return Vocabulary("gpt2", tokens, types, _special_ids(tokenizer, checkpoint, vocab_size), merges=merges, pre=pre,
                      add_bos=bos, add_eos=eos)


def pre_tokenizer_name(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a `tokenizer.json`; None where it has none that cuts in this way."""
    steps = list(_steps(content["pre_tokenizer"] or {}))
    found = (tuple(steps[:-1]), bool(content["model"].get("ignore_merges")))
    names = [name for name, does in _PRE_TOKENIZERS.items() if does == found]
    return names[0] if names and steps[-1:] == ["bytes"] else None


def set_pre_tokenizer(backend: Any, name: str) -> bool:
    """Make a tokenizer of the `tokenizers` package cut text as llama.cpp's pre-tokenizer ``name`` does.

    Returns:
        False, and nothing happens, when that is none of those that are known here.
    """
    from tokenizers import Regex, pre_tokenizers

    names = {other: known for known, others in _SAME.items() for other in others}
    if (known := names.get(name, name)) not in _PRE_TOKENIZERS:
        return False
    patterns, backend.model.ignore_merges = _PRE_TOKENIZERS[known]
    parts = [pre_tokenizers.Digits(individual_digits=True) if pattern == _DIGIT else
             pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return True


def _steps(step: dict[str, Any]) -> Iterator[str]:
    """What a pre-tokenizer cuts by, in order, then ``bytes`` where it spells bytes; anything else by its own name."""
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            for inner in steps:
                yield from _steps(inner)
        case {"type": "Digits", "individual_digits": True}:
            yield _DIGIT
        # The patterns here match all text, so that to remove the rest is to remove nothing.
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False} | {
                "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Removed", "invert": True}:
            for spelling, usual in _SPELLINGS.items():
                pattern = pattern.replace(spelling, usual)
            yield pattern
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": cuts}:
            yield from [_GPT2, "bytes"] if cuts else ["bytes"]
        case _:
            yield f"other: {step.get('type')}"


def _differences(content: dict[str, Any], vocab_size: int) -> list[str]:
    """What llama.cpp's byte-level BPE doesn't do, but for the pre-tokenizer."""
    from tokenizers.pre_tokenizers import ByteLevel

    model, normalizer = content["model"], content["normalizer"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return [f"its model is {model['type']}, not BPE on bytes"]
    found = [f"its {key} is {model[key]!r}" for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
             if model.get(key)]
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    found += [f"its normalizer is {step['type']}" for step in steps if step["type"] != "NFC"]
    lacking = set(ByteLevel.alphabet()) - model["vocab"].keys()
    if model.get("unk_token") and lacking:
        found.append(f"{len(lacking)} bytes have no token and become {model['unk_token']}, where llama.cpp drops them")
    # A special one that does so (Phi-4's) stands at the edge of a turn, where hardly any has white space; an export
    # says where that makes a difference.
    found += [f"the added token {entry['content']!r} takes the white space around it, or only whole words"
              for entry in content["added_tokens"]
              if entry["single_word"] or not entry["special"] and (entry["lstrip"] or entry["rstrip"])]
    added = {entry["id"] for entry in content["added_tokens"]}
    behind = [i for i in model["vocab"].values() if i >= vocab_size and i not in added]
    if behind:
        found.append(f"{len(behind)} tokens lie behind the last of the model's {vocab_size}")
    return found


def _ends(tokenizer: Any) -> tuple[bool, bool] | None:
    """Whether a text gets a BOS before it and an EOS behind it; None where it gets something else."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if full == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    return None


def _type(i: int, text: str, added: dict[str, Any] | None) -> TokenType:
    if added is not None:
        return TokenType.CONTROL if added["special"] or looks_special(text) else TokenType.USER_DEFINED
    return TokenType.UNUSED if text == f"[PAD{i}]" else TokenType.NORMAL


def _special_ids(tokenizer: Any, checkpoint: Path, vocab_size: int) -> dict[str, int]:
    """Ids of the special tokens: the tokenizer's, else those of config.json (Qwen's tokenizer has no BOS)."""
    config = read_config(checkpoint)
    found = {}
    for name in ID_KEYS:
        ids = [getattr(tokenizer, f"{name}_token_id"), config.get(f"{name}_token_id")]
        usable = [i for i in ids if isinstance(i, int) and 0 <= i < vocab_size]
        if usable:
            found[name] = usable[0]
    return found
