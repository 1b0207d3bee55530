"""Answers from a loaded model, in batches; one that is read as it is made is in ``stream``."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gemma_tune.answers import decoding
from gemma_tune.answers.head import head_in_parts
from gemma_tune.answers.sampling import sampling_arguments
from gemma_tune.answers.sight import Sights, beside, told_apart
from gemma_tune.base.errors import UserError
from gemma_tune.base.finite import refuse_not_finite
from gemma_tune.encoding.chat_format import ChatFormat, FormatError, Messages, Tools

READ_EVERY = 8  # steps of a batch after which its tokens are looked at for ends
BROKEN = "\ufffd"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Answer:
    """One answer, with its outer white space.

    ``ended`` says that the model ended it itself; otherwise it ran into a limit or was stopped. ``ids`` are its tokens
    without the one that ended it, of an answer that was made in a batch.
    """

    text: str
    tokens: int
    ended: bool
    ids: Sequence[int] = field(default=(), repr=False, compare=False)


def context_of(model: Any) -> int | None:
    """Tokens of the longest conversation that a model was made for; None where its configuration says nothing, as those
    of Mamba, RecurrentGemma and BLOOM."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def room_for_answer(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit into the model's context after the prompt.

    Raises:
        UserError: the prompt alone fills it.
    """
    return room_in(context_of(model), prompt_tokens, max_new_tokens)


def room_in(context: int | None, prompt_tokens: int, max_new_tokens: int, whose: str = "the model's context") -> int:
    """The same for a context of so many tokens, or one without a known end."""
    if context is None:
        return max_new_tokens
    if prompt_tokens >= context:
        raise UserError(f"the conversation has {prompt_tokens} tokens; {whose} ends at {context}",
                        "shorten it; in a conversation, /reset starts a new one, and /undo takes a turn back")
    return min(max_new_tokens, context - prompt_tokens)


def prompt_ids(chat: ChatFormat, messages: Messages, tools: Tools = None) -> list[int]:
    """Ids of a conversation up to where the answer begins.

    Raises:
        UserError: the chat template cannot render it, or leaves something of it out.
    """
    try:
        chat.refuse_left_out(messages, tools)
        return chat.prompt_ids(messages, tools=tools)
    except FormatError as e:
        raise UserError(f"the model cannot be asked this: {e}",
                        "change the conversation; in an interactive one, /reset starts a new one") from e


def greedy_continuations(model: Any, chat: ChatFormat, encoded: Sequence[list[int]], max_new_tokens: int,
                         seconds: float | None = None, pictures: Sequence[Sequence[str]] = (),
                         seen: Sights | None = None) -> list[Answer]:
    """As :func:`continuations`, with the likeliest token each time."""
    return continuations(model, chat, encoded, max_new_tokens, sampling_arguments(model, {"temperature": 0.0}), seconds,
                         pictures, seen)


def continuations(model: Any, chat: ChatFormat, encoded: Sequence[list[int]], max_new_tokens: int,
                  arguments: Mapping[str, Any], seconds: float | None = None,
                  pictures: Sequence[Sequence[str]] = (), seen: Sights | None = None) -> list[Answer]:
    """What the model writes after token ids, in one batch, padded on the left.

    Args:
        arguments: of :func:`gemma_tune.answers.sampling.sampling_arguments`.
        seconds: after which an answer is cut off; then nothing is captured for it either, which would take memory.
        pictures: names of the pictures of each prompt, which ``chat.eye`` knows; needed where any has some.
        seen: their features by name, for a model that was loaded to take them.

    Raises:
        UserError: the longest fills the model's context, or the model's logits are not finite.
    """
    import torch

    ids, mask, pad = padded(model, chat, encoded)
    width = ids.shape[1]
    limit = room_for_answer(model, width, max_new_tokens)
    eye = chat.eye if any(pictures) else None
    look = partial(beside, seen, eye, ids, pictures, None)
    with torch.inference_mode():
        shown = look()
        if seconds is None and decoding.pays(model) and decoding.reads(shown):
            with contextlib.suppress(decoding.GaveUp):
                known = told_apart(eye, encoded[0], pictures[0]) if shown and len(encoded) == 1 else None
                groups = list(decoding.decoded(model, ids, mask, stop_ids=chat.stop_ids, pad=pad, limit=limit,
                                               arguments=arguments, every=READ_EVERY, beside=look, known=known))
                return [answer_of(chat, row) for row in joined(groups)]
        with head_in_parts(model):
            out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=chat.stop_ids,
                                 max_new_tokens=limit, max_time=seconds, logits_processor=finite_logits(model),
                                 **arguments, **shown)
    return [answer_of(chat, row[width:].tolist()) for row in out]


def padded(model: Any, chat: ChatFormat, encoded: Sequence[list[int]]) -> tuple[Any, Any, int]:
    """Prompts in one batch, padded on the left, where the model computes.

    Returns:
        Token ids (rows, width) and a mask (rows, width) that is 0 for padding, int64, and the id that fills up.
    """
    import torch

    width = max(map(len, encoded))
    pad = chat.tokenizer.pad_token_id if chat.tokenizer.pad_token_id is not None else chat.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(e)) + list(e) for e in encoded], device=model.device)
    return ids, torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device), pad


def joined(groups: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    """Tokens of each row, of groups of some steps' tokens of all rows, see :func:`decoding.decoded`."""
    return [list(itertools.chain.from_iterable(row)) for row in zip(*groups)]


def finite_logits(model: Any) -> Any:
    """For ``generate``: the likeliest of logits that are NaN would be some token, and an answer like any other."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Finite(LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            refuse_not_finite(scores, model)
            return scores

    return LogitsProcessorList([Finite()])


def answer_of(chat: ChatFormat, ids: Sequence[int]) -> Answer:
    """What these ids say up to the first token that ends an answer, if there is one."""
    end = next((n for n, token in enumerate(ids) if token in chat.stop_ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(chat.said(_whole_characters(chat, kept)), len(kept), end is not None, tuple(kept))


def _whole_characters(chat: ChatFormat, ids: list[int]) -> str:
    """Text of an answer, less a last character of which only the first of up to four bytes were made."""
    for end in range(len(ids), max(0, len(ids) - 4), -1):
        if not (text := chat.decoded(ids[:end])).endswith(BROKEN):
            return text
    return chat.decoded(ids)
