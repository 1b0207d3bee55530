"""Answers whose chance is given as numbers: the same ones come of the same numbers, whatever else is in their batch.

A token is drawn by its number u, of 0 to below 1: the first one, in the order of the vocabulary, with which the
probabilities add up to more than u. So nothing depends on the random state of a library or a device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from gemma_tune.answers import decoders, decoding
from gemma_tune.answers.generation import READ_EVERY, joined, padded, room_for_answer
from gemma_tune.answers.sampling import sampling_arguments
from gemma_tune.base.finite import refuse_not_finite
from gemma_tune.encoding.chat_format import ChatFormat


def drawn_tokens(model: Any, chat: ChatFormat, encoded: Sequence[Sequence[int]], numbers: Any | None, most: int,
                 temperature: float = 1.0) -> list[list[int]]:
    """What a model that is being trained writes after prompts, as ids up to the token that ends an answer, with it.

    The distribution is the model's own, nothing is cut off, and its generation settings take no part.

    Args:
        encoded: ids of each prompt.
        numbers: (rows, ``most``) float64 on the CPU, a number for each token of each row; None takes the likeliest.
        most: tokens of an answer.
        temperature: what logits are divided by before they become probabilities.

    Raises:
        UserError: the longest prompt fills the model's context, or logits are not finite.
    """
    import torch

    ids, mask, pad = padded(model, chat, [list(e) for e in encoded])
    width = ids.shape[1]
    limit = room_for_answer(model, width, most)
    given = None if numbers is None else numbers.to(model.device, _widest(model.device))
    choose = _chooser(given, width, temperature)
    with torch.inference_mode(), _no_settings(model):
        arguments = sampling_arguments(model, {"temperature": 0.0})
        if decoding.pays(model):
            with contextlib.suppress(decoding.GaveUp):
                groups = list(decoding.decoded(model, ids, mask, stop_ids=chat.stop_ids, pad=pad, limit=limit,
                                               arguments=arguments, every=READ_EVERY, learning=True,
                                               choose=choose if numbers is not None else None))
                return [_ended(chat, row) for row in joined(groups)]
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=chat.stop_ids,
                             max_new_tokens=limit, logits_processor=_chosen(model, choose), **arguments,
                             **_read_once(model, encoded, ids, mask))
    return [_ended(chat, row[width:].tolist()) for row in out]


def _read_once(model: Any, encoded: Sequence[Sequence[int]], ids: Any, mask: Any) -> dict[str, Any]:
    """For ``generate``: keys and values of prompts that stand in several rows, for each of which they are read once.

    Args:
        ids, mask: (rows, width), padded on the left. The last token of each row is left for ``generate`` to read.
    """
    import torch
    from transformers import DynamicCache

    first: dict[tuple[int, ...], int] = {}
    for row, prompt in enumerate(encoded):
        first.setdefault(tuple(prompt), row)
    if len(first) == len(encoded) or ids.shape[1] == 1 or decoding.unknown(model):
        return {}
    rows = torch.tensor([*first.values()], device=ids.device)
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    places = (mask[rows].cumsum(1) - 1).clamp(min=0)[:, :-1]
    model(input_ids=ids[rows, :-1], attention_mask=mask[rows, :-1], position_ids=places, past_key_values=cache,
          use_cache=True, **decoders.last_position(model))
    number = {row: n for n, row in enumerate(first.values())}
    cache.reorder_cache(torch.tensor([number[first[tuple(prompt)]] for prompt in encoded], device=ids.device))
    return {"past_key_values": cache}


def _widest(device: Any) -> Any:
    """Apple's GPU has no float64."""
    import torch

    return torch.float32 if device.type == "mps" else torch.float64


def _chooser(numbers: Any | None, width: int, temperature: float) -> decoding.Chooser:
    def choose(ids: Any, logits: Any) -> Any:
        if numbers is None:
            return logits.argmax(-1)
        sums = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=numbers.dtype)
        wanted = numbers[:, ids.shape[1] - width, None] * sums[:, -1:]
        import torch

        # A number so near 1 that it is rounded up would be behind the last token.
        return torch.searchsorted(sums, wanted, right=True).clamp(max=sums.shape[-1] - 1)[:, 0]

    return choose


def _chosen(model: Any, choose: decoding.Chooser) -> Any:
    """For ``generate``: of what was chosen the likeliest is that."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Chosen(LogitsProcessor):
        def __call__(self, input_ids, scores):
            refuse_not_finite(scores, model)
            chosen = choose(input_ids, scores)[:, None]
            return scores.fill_(-float("inf")).scatter_(1, chosen, 0.0)

    return LogitsProcessorList([Chosen()])


@contextlib.contextmanager
def _no_settings(model: Any) -> Iterator[None]:
    """A model without generation settings of its own while the context lasts: what it says is trained as it says it."""
    from transformers import GenerationConfig

    base = decoding.base_of(model)
    theirs, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = theirs


def _ended(chat: ChatFormat, ids: Sequence[int]) -> list[int]:
    """The ids up to the first that ends an answer, with it."""
    end = next((n for n, token in enumerate(ids) if token in chat.stop_ids), len(ids))
    return [int(token) for token in ids[:end + 1]]
