"""Answers token by token with a cache of fixed size, whose steps a GPU records once and then replays.

A GPU works less than a millisecond on a token of a small model, and Python needs twenty to tell it what to do. So one
step, from a token to the next one, is captured as a CUDA graph: each tensor that it reads or changes keeps its address.
The same loop runs without capture, which is what tests do without a GPU; there ``generate`` answers, as it is faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.answers.decoders import (
    Beside,
    Chooser,
    base_of,
    give_up,
    has_given_up,
    keep,
    layer_types,
    nothing_beside,
    state_of,
    take,
)
from gemma_tune.base.errors import UserError
from gemma_tune.base.finite import not_finite

ROOM = 256  # positions for the answer at first, as most answers are short; the cache grows where one is not

# What a model's generation_config.json may say that this loop knows, or that does not concern it.
_KNOWN = {"_from_model_config", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version",
          "cache_implementation", "use_cache", "max_length", "max_new_tokens", "output_attentions",
          "output_hidden_states", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_NEUTRAL = {"num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "typical_p"}  # at 1
# From these models reckon where tokens are, and what follows them, which is the number of the token for others.
_PLACES = ("image_grid_thw",)
_ATTENTION = {"full_attention", "sliding_attention"}


class GaveUp(Exception):
    """Something here failed; ``generate`` answers instead, from what was given out so far."""


def pays(model: Any) -> bool:
    """Whether :func:`decoded` is the faster way, and a known one, to an answer of this model."""
    return model.device.type == "cuda" and not has_given_up(model) and not unknown(model)


def reads(beside: Mapping[str, Any]) -> bool:
    """Whether :func:`decoded` knows what follows from what a model is given beside the ids."""
    return beside.keys().isdisjoint(_PLACES)


def unknown(model: Any) -> str:
    """What of a model this loop does not know; empty if it knows all of it."""
    base = base_of(model)
    if not getattr(base, "_can_compile_fullgraph", False) or base.config.is_encoder_decoder:
        return "a forward pass that cannot be captured"
    if base.config._attn_implementation not in ("sdpa", "eager"):
        return f"{base.config._attn_implementation} attention"
    if strange := beside_attention(base):
        return strange
    settings = base.generation_config.to_diff_dict().items()
    if other := {name for name, value in settings if value and not (value == 1 and name in _NEUTRAL)} - _KNOWN:
        return f"generation settings: {', '.join(sorted(other))}"
    return ""


def beside_attention(base: Any) -> str:
    """What a model has beside layers of attention, or that its configuration does not tell; empty for nothing."""
    try:
        kinds = set(layer_types(base))
    except Exception as e:  # noqa: BLE001 - a configuration of another shape
        return f"a configuration without kinds of layers ({e})"
    other = kinds - _ATTENTION - {"dummy"}
    return f"layers of {', '.join(sorted(other))}" if other else ""


def decoded(model: Any, ids: Any, mask: Any, *, stop_ids: Sequence[int], pad: int, limit: int,
            arguments: Mapping[str, Any], every: int, capture: bool | None = None,
            beside: Beside = nothing_beside, known: Sequence[int | str] | None = None, choose: Chooser | None = None,
            learning: bool = False) -> Iterator[list[list[int]]]:
    """Continue token ids, as ``generate`` does with the same arguments.

    To be used under ``torch.inference_mode()``.

    Args:
        ids: (rows, width), padded on the left; ``mask`` (rows, width) is 0 there.
        pad: what follows the end of a row while others go on.
        limit: most new tokens.
        arguments: of :func:`gemma_tune.answers.sampling.sampling_arguments`.
        every: steps after which tokens are read, which the GPU does not wait for.
        capture: None captures where the device can.
        beside: what the model is given beside the ids to read the prompts, where it has read so many tokens of a single
            one before, see ``sight.beside``.
        known: the ids of a single prompt as ``sight.told_apart`` has them, where they are not all of it.
        choose: how tokens are chosen, in place of what ``arguments`` say.
        learning: the model has other weights in the same places by the next answer, which what was read does not serve.

    Yields:
        the next up to ``every`` tokens of each row. Iterating ends when all rows have ended, or at the limit.

    Raises:
        UserError: logits that are not finite; tokens made of them are not given out.
        GaveUp: anything else; this model is not asked this way again.
    """
    capture = model.device.type == "cuda" if capture is None else capture
    try:
        choose = choose or chooser(arguments, mask)
        yield from _decoded(model, ids, mask, frozenset(stop_ids), pad, limit, choose, every, capture, beside, known,
                            learning)
    except UserError:
        raise
    except Exception as e:  # noqa: BLE001 - in as many ways as a model can differ from what is known here
        give_up(model, f"{type(e).__name__}: {e}")
        raise GaveUp from e


def _decoded(model: Any, ids: Any, mask: Any, stop_ids: frozenset[int], pad: int, limit: int, choose: Chooser | None,
             every: int, capture: bool, beside: Beside, known: Sequence[int | str] | None,
             learning: bool) -> Iterator[list[list[int]]]:
    rows, width = ids.shape
    prompt = list(known or ids[0].tolist()) if rows == 1 and not learning and bool(mask.all()) else []
    state = state_of(model)
    decoder, same = take(model, rows, width + 1, width + min(limit, ROOM), prompt, state)
    waiting: deque[tuple[Any, Any]] = deque()
    given: list[int] = []  # of a single row
    ended = [False] * rows
    begun, last = width, width + limit
    try:
        for end in range(width + 1, last + 1):
            if end > decoder.size:
                decoder = decoder.grown(model)
            if end == width + 1:
                decoder.begin(model, ids, mask, stop_ids, pad, choose, state, same, beside)
            else:
                decoder.step(model, choose, capture)
            if (end - width) % every == 0 or end == last:
                waiting.append(decoder.read(begun, end))
                begun = end
            # Where steps are replayed, the GPU makes the next group while this one is read.
            while len(waiting) > (1 if decoder.replays and end < last else 0):
                group = _on_host(waiting.popleft(), model)
                ended = [done or not stop_ids.isdisjoint(row) for done, row in zip(ended, group)]
                given += group[0]
                yield group
                if all(ended):
                    return keep(model, decoder, prompt and prompt + given)
    except GeneratorExit:  # the reader has enough
        keep(model, decoder, prompt and prompt + given)
        raise
    keep(model, decoder, prompt and prompt + given)


def _on_host(read: tuple[Any, Any], model: Any) -> list[list[int]]:
    tokens, event = read
    if event is not None:
        event.synchronize()
    group: list[list[int]] = tokens.tolist()
    if any(token < 0 for row in group for token in row):
        raise not_finite(model)
    return group


def chooser(arguments: Mapping[str, Any], mask: Any) -> Chooser | None:
    """How the next tokens (rows) are chosen from ids (rows, so far) and logits (rows, vocabulary); None: the best.

    Args:
        mask: (rows, width) of the prompts, 0 where they are padded on the left: no token was said there.
    """
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors, sample = LogitsProcessorList(), arguments["do_sample"]
    if (penalty := arguments.get("repetition_penalty") or 1.0) != 1.0:
        padding = (mask != 0).int().argmax(dim=1)
        processors.append(RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding))
    if sample:  # in the order of generate
        if (temperature := arguments["temperature"]) != 1.0:
            processors.append(TemperatureLogitsWarper(temperature))
        if top_k := arguments["top_k"]:
            processors.append(TopKLogitsWarper(top_k))
        if (top_p := arguments["top_p"]) < 1.0:
            processors.append(TopPLogitsWarper(top_p))
        if min_p := arguments.get("min_p"):
            processors.append(MinPLogitsWarper(min_p))
    elif not processors:
        return None

    def choose(ids: Any, logits: Any) -> Any:
        scores = processors(ids, logits)
        return _drawn(scores.softmax(-1)) if sample else scores.argmax(-1)

    return choose


def _drawn(weights: Any) -> Any:
    """An index of each row by chance (rows, n): the draw that ``torch.multinomial`` makes of the same random numbers,
    which looks at the weights on the host first and so has a GPU waited for."""
    return (weights / weights.new_empty(weights.shape).exponential_()).argmax(-1)
