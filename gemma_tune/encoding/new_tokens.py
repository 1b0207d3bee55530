"""New tokens: names of one's own for entries of the vocabulary that the model's makers left unused.

Gemma has ``<unused0>`` and so on, Llama 3 ``<|reserved_special_token_0|>``, and the embedding of Qwen has more rows
than its tokenizer has tokens. Where such an entry gets another name, no tensor changes its shape, and whatever reads
the model goes on reading it. They become ordinary tokens, not special ones: decoding shows them, and so does Ollama,
which keeps back what a vocabulary marks as special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.base.words import counted, shown

_RESERVED = re.compile(r"[<\[]\|?(?:unused|reserved|reserved_special_token|reserved_token|special|dummy|placeholder)"
                       r"_?\d+\|?[>\]]", re.IGNORECASE)
_ORDINARY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}


def name_tokens(tokenizer: Any, names: Sequence[str], entries: int, template: str = "") -> dict[int, list[int]]:
    """Give unused entries of a vocabulary these names: the first entries first, so that the same names lead to the same
    ids.

    Args:
        tokenizer: a fast transformers tokenizer, which is changed.
        entries: rows of the model's embedding.
        template: a chat template in the place of the tokenizer's own.

    Returns:
        By the id of each new token, in the order of the names, the ids that its text had before.

    Raises:
        UserError: names that are tokens already, or more of them than there are unused entries; all of it together.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    before = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in names}
    free = [*_unused(tokenizer, template, entries)]
    problems = [*_taken(tokenizer, before)]
    if len(names) > len(free):
        unused = counted(len(free), "unused entry", "unused entries")
        problems.append(f"{counted(len(names), 'new token')} {'is' if len(names) == 1 else 'are'} named, and the "
                        f"model's vocabulary of {entries:,} has {unused}")
    if problems:
        raise UserError("new tokens cannot be named so", "leave out, or rename, those that are told of" if free else
                        "leave --new-tokens out: such words are learned as several tokens, as any other text is; or "
                        "use a model with unused entries, such as a Gemma, a Llama 3 or a Qwen", problems)
    ids = dict(zip(names, free))
    _rename(tokenizer, content, ids)
    return {ids[name]: old for name, old in before.items()}


def _taken(tokenizer: Any, before: Mapping[str, Sequence[int]]) -> Iterator[str]:
    backend = tokenizer.backend_tokenizer
    for name, ids in before.items():
        if len(ids) == 1 or backend.token_to_id(name) is not None:
            own = ids[0] if len(ids) == 1 else backend.token_to_id(name)
            yield f"{shown(name)} is one token of this model already ({own}), which needs no new one"
        elif not ids:
            yield f"{shown(name)} is nothing to this model's tokenizer"


def _unused(tokenizer: Any, template: str, entries: int) -> Iterator[int]:
    """Ids that mean nothing: those that are called so, and of rows behind the last token. What a chat template writes
    has a meaning, whatever it is called."""
    vocab = tokenizer.get_vocab()
    written = f"{template} {tokenizer.chat_template} {tokenizer.special_tokens_map}"
    named = {i for text, i in vocab.items() if i < entries and _RESERVED.fullmatch(text) and text not in written}
    yield from sorted(named)
    yield from range(max(vocab.values()) + 1, entries)


def _rename(tokenizer: Any, content: dict[str, Any], ids: Mapping[str, int]) -> None:
    from tokenizers import Tokenizer

    names = {i: name for name, i in ids.items()}
    old = {*tokenizer.convert_ids_to_tokens([*names])}
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(i, text): i for text, i in model["vocab"].items()}
        if "merges" in model:  # that made an entry of its pieces
            model["merges"] = [pair for pair in model["merges"] if "".join(pair).replace(" ", "") not in old]
    else:  # a list of texts with their scores
        model["vocab"] = [[names.get(i, text), score] for i, (text, score) in enumerate(model["vocab"])]
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    added |= {i: {"id": i, "content": name, **_ORDINARY} for i, name in names.items()}
    content["added_tokens"] = [added[i] for i in sorted(added)]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    # Names that it was made with are saved as well, and would be added behind the last token when it is loaded.
    tokenizer.extra_special_tokens = [token for token in tokenizer.extra_special_tokens if str(token) not in old]
    made_with = tokenizer.init_kwargs
    if "extra_special_tokens" in made_with:
        made_with["extra_special_tokens"] = tokenizer.extra_special_tokens
    made_with["added_tokens_decoder"] = {
        i: token for i, token in made_with.get("added_tokens_decoder", {}).items() if int(i) not in names}
