"""Answers from a loaded model: sampling settings, batches of greedy answers, and streaming that can be stopped."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.answers import decoding
from gemma_tune.base.errors import UserError
from gemma_tune.base.finite import refuse_not_finite
from gemma_tune.encoding.chat_format import ChatFormat, FormatError, Messages, Tools

READ_EVERY = 8  # steps of a batch after which its tokens are looked at for ends
_BROKEN = "\ufffd"  # what the bytes of half a character decode to


@dataclass(frozen=True)
class Answer:
    """One answer, with its outer white space.

    ``ended`` says that the model ended it itself; otherwise it ran into a limit or was stopped.
    """

    text: str
    tokens: int
    ended: bool


def sampling_arguments(model: Any, chosen: Mapping[str, float | None]) -> dict[str, Any]:
    """Arguments for ``generate``: what was chosen, else the model's own generation settings.

    A model that is greedy by itself samples as soon as a temperature, top_p or top_k is chosen for it.

    Args:
        chosen: temperature, top_p, top_k, repetition_penalty; None or a missing name means the model's own.
    """
    own = model.generation_config
    values = {name: getattr(own, name, None) if chosen.get(name) is None else chosen[name]
              for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
    asked = any(chosen.get(name) is not None for name in ("temperature", "top_p", "top_k"))
    arguments: dict[str, Any] = {}
    if values["repetition_penalty"]:
        arguments["repetition_penalty"] = values["repetition_penalty"]
    if values["temperature"] == 0 or not (own.do_sample or asked):
        # Greedy ignores these; unset them so that transformers does not warn about the model's own.
        return arguments | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    return arguments | {"do_sample": True} | {name: value if values[name] is None else values[name]
                                              for name, value in neutral.items()}


def room_for_answer(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit into the model's context after the prompt.

    Raises:
        UserError: the prompt alone fills it.
    """
    context = model.config.get_text_config().max_position_embeddings
    if prompt_tokens >= context:
        raise UserError(f"the conversation has {prompt_tokens} tokens; the model's context ends at {context}",
                        "shorten it; in a conversation, /reset starts a new one")
    return min(max_new_tokens, context - prompt_tokens)


def prompt_ids(chat: ChatFormat, messages: Messages, tools: Tools = None) -> list[int]:
    """Ids of a conversation up to where the answer begins.

    Raises:
        UserError: the chat template cannot render it.
    """
    try:
        return chat.prompt_ids(messages, tools=tools)
    except FormatError as e:
        raise UserError(f"the model cannot be asked this: {e}",
                        "change the conversation; in an interactive one, /reset starts a new one") from e


def greedy_answers(model: Any, chat: ChatFormat, prompts: Sequence[Messages], max_new_tokens: int,
                   tools: Sequence[Tools] | None = None) -> list[Answer]:
    """Greedy answers to several prompts in one batch.

    Args:
        tools: for each prompt the functions on offer; None if there are none at all.

    Raises:
        UserError: a prompt that cannot be rendered, or fills the model's context.
    """
    offered = tools or [None] * len(prompts)
    encoded = [prompt_ids(chat, p, t) for p, t in zip(prompts, offered, strict=True)]
    return greedy_continuations(model, chat, encoded, max_new_tokens)


def greedy_continuations(model: Any, chat: ChatFormat, encoded: Sequence[list[int]], max_new_tokens: int,
                         seconds: float | None = None) -> list[Answer]:
    """What the model writes after token ids, greedily and in one batch, padded on the left.

    Args:
        seconds: after which an answer is cut off; then nothing is captured for it either, which would take memory.

    Raises:
        UserError: the longest fills the model's context, or the model's logits are not finite.
    """
    import torch

    width = max(map(len, encoded))
    pad = chat.tokenizer.pad_token_id if chat.tokenizer.pad_token_id is not None else chat.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device)
    limit = room_for_answer(model, width, max_new_tokens)
    arguments = sampling_arguments(model, {"temperature": 0.0})
    with torch.inference_mode():
        if seconds is None and decoding.pays(model):
            with contextlib.suppress(decoding.GaveUp):
                groups = list(decoding.decoded(model, ids, mask, stop_ids=chat.stop_ids, pad=pad, limit=limit,
                                               arguments=arguments, every=READ_EVERY))
                return [_cut(chat, list(itertools.chain.from_iterable(row))) for row in zip(*groups)]
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=chat.stop_ids,
                             max_new_tokens=limit, max_time=seconds, logits_processor=_finite_logits(model),
                             **arguments)
    return [_cut(chat, row[width:].tolist()) for row in out]


def _finite_logits(model: Any) -> Any:
    """For ``generate``: the likeliest of logits that are NaN would be some token, and an answer like any other."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Finite(LogitsProcessor):
        def __call__(self, input_ids, scores):
            refuse_not_finite(scores, model)
            return scores

    return LogitsProcessorList([Finite()])


def _cut(chat: ChatFormat, ids: list[int]) -> Answer:
    end = next((n for n, token in enumerate(ids) if token in chat.stop_ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(_whole_characters(chat.tokenizer, kept), len(kept), end is not None)


def _whole_characters(tokenizer: Any, ids: list[int]) -> str:
    """Text of an answer, less a last character of which only the first of up to four bytes were made."""
    for end in range(len(ids), max(0, len(ids) - 4), -1):
        if not (text := tokenizer.decode(ids[:end], skip_special_tokens=True)).endswith(_BROKEN):
            return text
    return tokenizer.decode(ids, skip_special_tokens=True)


class _Pieces:
    """What ``generate`` calls a streamer: takes token ids in one thread, gives text out in another.

    A character can be several tokens long, whose first ones decode to U+FFFD: it is given out when it is whole. Every
    piece is decoded together with the piece before it, as the text of a token depends on its neighbours (its space).
    """

    def __init__(self, chat: ChatFormat):
        self._decode = chat.tokenizer.decode
        self._stop_ids = set(chat.stop_ids)
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._ids: list[int] = []
        self._before = self._given = 0  # where the last piece begins and ends in the ids
        self._prompt_seen = False
        self.ended = False  # by the model itself
        self.text = ""

    @property
    def tokens(self) -> int:
        """Length of the answer so far, without what ended it."""
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        """Tokens of the answer so far, without what ended it."""
        return list(self._ids)

    def put(self, ids: Any) -> None:
        """Take the prompt, which is not given out, or the next token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.take(ids.flatten().tolist())

    def take(self, ids: Sequence[int]) -> None:
        """Take the next tokens of the answer."""
        for token in ids:
            if token in self._stop_ids:
                self.ended = True
            else:
                self._ids.append(token)
        self._give()

    def end(self) -> None:
        """Nothing follows; the reader's loop ends. Half a character at the end is left out."""
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._queue.get, None)

    def _give(self) -> None:
        known = self._decode(self._ids[self._before:self._given], skip_special_tokens=True)
        longer = self._decode(self._ids[self._before:], skip_special_tokens=True)
        if len(longer) <= len(known) or longer.endswith(_BROKEN):
            return
        self._before, self._given = self._given, len(self._ids)
        self.text += longer[len(known):]
        self._queue.put(longer[len(known):])


class Stream:
    """An answer that is read piece by piece while it is made, and can be stopped between two tokens.

    Iterate over it once for the pieces of text, then call :meth:`finish`.

    Raises:
        UserError: a conversation that cannot be rendered, or fills the model's context.
    """

    def __init__(self, model: Any, chat: ChatFormat, messages: Messages, max_new_tokens: int,
                 arguments: Mapping[str, Any], tools: Tools = None):
        self._model, self._chat, self._arguments = model, chat, dict(arguments)
        self._ids = prompt_ids(chat, messages, tools)
        self._limit = room_for_answer(model, len(self._ids), max_new_tokens)
        self._pieces = _Pieces(chat)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._generate, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def stop(self) -> None:
        """End the answer after the current token."""
        self._stopped.set()

    def finish(self) -> Answer:
        """Wait for the end and return the whole answer: the pieces together.

        Raises:
            Exception: whatever went wrong while generating.
        """
        self._thread.join()
        if self._failure:
            raise self._failure
        return Answer(self._pieces.text, self._pieces.tokens, self._pieces.ended)

    def _generate(self) -> None:
        try:
            self._run_model()
        except BaseException as e:  # noqa: BLE001 - handed to the reader of the stream
            self._failure = e
            self._pieces.end()

    def _run_model(self) -> None:
        import torch

        with torch.inference_mode():
            if decoding.pays(self._model):
                with contextlib.suppress(decoding.GaveUp):
                    self._decode()
                    return
            self._go_on()

    def _decode(self) -> None:
        import torch

        ids = torch.tensor([self._ids], device=self._model.device)
        groups = decoding.decoded(self._model, ids, torch.ones_like(ids), stop_ids=self._chat.stop_ids,
                                  pad=self._chat.stop_ids[0], limit=self._limit, arguments=self._arguments, every=1)
        with contextlib.closing(groups):
            for [tokens] in groups:
                self._pieces.take(tokens)
                if self._stopped.is_set():
                    break
        self._pieces.end()

    def _go_on(self) -> None:
        """Continue what there is of the answer by ``generate``."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        stopped = self._stopped

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        ids = torch.tensor([self._ids + self._pieces.ids], device=self._model.device)
        self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self._pieces,
            max_new_tokens=self._limit - self._pieces.tokens, eos_token_id=self._chat.stop_ids,
            pad_token_id=self._chat.stop_ids[0], stopping_criteria=StoppingCriteriaList([Stopped()]),
            logits_processor=_finite_logits(self._model), **self._arguments)
