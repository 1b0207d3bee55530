"""Answers from a loaded model: sampling settings, batches of greedy answers, and streaming that can be stopped."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_tune.chat_format import ChatFormat, Messages
from gemma_tune.errors import UserError


@dataclass(frozen=True)
class Answer:
    """One answer. ``ended`` says that the model ended it itself; otherwise it ran into a limit or was stopped."""

    text: str
    tokens: int
    ended: bool


def sampling_arguments(model: Any, chosen: Mapping[str, float | None]) -> dict[str, Any]:
    """Arguments for ``generate``: what was chosen, else the model's own generation settings.

    Args:
        chosen: temperature, top_p, top_k, repetition_penalty; None means the model's own.
    """
    own = model.generation_config
    values = {name: getattr(own, name, None) if value is None else value for name, value in chosen.items()}
    temperature = values.pop("temperature")
    greedy = temperature == 0 or (temperature is None and not own.do_sample and chosen.get("temperature") is None)
    arguments: dict[str, Any] = {"do_sample": not greedy}
    if values.get("repetition_penalty"):
        arguments["repetition_penalty"] = values["repetition_penalty"]
    if not greedy:
        arguments["temperature"] = 1.0 if temperature is None else temperature
        arguments["top_p"] = 1.0 if values.get("top_p") is None else values["top_p"]
        arguments["top_k"] = values.get("top_k") or 0
    else:
        # Greedy ignores these; unset them so that transformers does not warn about the model's own.
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    return arguments


def room_for_answer(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """New tokens that fit into the model's context after the prompt.

    Raises:
        UserError: the prompt alone fills it.
    """
    context = model.config.get_text_config().max_position_embeddings
    if prompt_tokens >= context:
        raise UserError(f"the conversation has {prompt_tokens} tokens; the model's context ends at {context}",
                        "start a new one with /reset")
    return min(max_new_tokens, context - prompt_tokens)


def greedy_answers(model: Any, chat: ChatFormat, prompts: Sequence[Messages], max_new_tokens: int) -> list[Answer]:
    """Greedy answers to several prompts in one batch, padded on the left."""
    import torch

    encoded = [chat.prompt_ids(p) for p in prompts]
    width = max(map(len, encoded))
    pad = chat.tokenizer.pad_token_id if chat.tokenizer.pad_token_id is not None else chat.stop_ids[0]
    ids = torch.tensor([[pad] * (width - len(e)) + e for e in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded], device=model.device)
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=chat.stop_ids,
                             max_new_tokens=room_for_answer(model, width, max_new_tokens),
                             **sampling_arguments(model, {"temperature": 0.0}))
    return [_cut(chat, row[width:].tolist()) for row in out]


def _cut(chat: ChatFormat, ids: list[int]) -> Answer:
    end = next((n for n, token in enumerate(ids) if token in chat.stop_ids), None)
    kept = ids if end is None else ids[:end]
    return Answer(chat.tokenizer.decode(kept, skip_special_tokens=True).strip(), len(kept), end is not None)


class Stream:
    """An answer that is read piece by piece while it is made, and can be stopped between two tokens.

    Iterate over it once for the pieces of text, then call :meth:`finish`.
    """

    def __init__(self, model: Any, chat: ChatFormat, messages: Messages, max_new_tokens: int,
                 arguments: Mapping[str, Any]):
        from transformers import TextIteratorStreamer

        self._model, self._chat, self._arguments = model, chat, dict(arguments)
        self._ids = chat.prompt_ids(messages)
        self._limit = room_for_answer(model, len(self._ids), max_new_tokens)
        # The streamer gives out whole words only, so a character of several tokens is never cut.
        self._streamer = TextIteratorStreamer(chat.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._generate, daemon=True)
        self._failure: BaseException | None = None
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        self._thread.start()
        yield from self._streamer

    def stop(self) -> None:
        """End the answer after the current token."""
        self._stopped.set()

    def finish(self) -> Answer:
        """Wait for the end and return the whole answer.

        Raises:
            Exception: whatever went wrong while generating.
        """
        self._thread.join()
        if self._failure:
            raise self._failure
        return self._answer

    def _generate(self) -> None:
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        stopped = self._stopped

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids, scores, **kwargs):
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        ids = torch.tensor([self._ids], device=self._model.device)
        try:
            with torch.inference_mode():
                out = self._model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self._streamer,
                    max_new_tokens=self._limit, eos_token_id=self._chat.stop_ids,
                    pad_token_id=self._chat.stop_ids[0], stopping_criteria=StoppingCriteriaList([Stopped()]),
                    **self._arguments)
            self._answer = _cut(self._chat, out[0, ids.shape[1]:].tolist())
        except BaseException as e:  # noqa: BLE001 - handed to the reader of the stream
            self._failure = e
            self._streamer.end()
