"""An answer that is read piece by piece while it is made, and can be stopped between two tokens."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from gemma_tune.answers import decoding
from gemma_tune.answers.generation import BROKEN, Answer, finite_logits, prompt_ids, room_for_answer
from gemma_tune.answers.sight import Sights, beside, reckon_anew, told_apart
from gemma_tune.base.machine import is_out_of_memory, next_of, no_memory
from gemma_tune.encoding.chat_format import ChatFormat, Messages, Tools
from gemma_tune.encoding.eye import pictures_of


class Pieces:
    """What ``generate`` calls a streamer: takes token ids in one thread, gives text out in another.

    A character can be several tokens long, whose first ones decode to U+FFFD: it is given out when it is whole. Every
    piece is decoded together with the piece before it, as the text of a token depends on its neighbours (its space).

    Args:
        chat: None where the text of an answer comes as it is, instead of ids or what a model wrote.
    """

    def __init__(self, chat: ChatFormat | None):
        self._chat, self._begins = chat, ""  # what was written as long as it is not known to be of the answer's text
        self._stop_ids = set(chat.stop_ids if chat else ())
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

    def say(self, text: str) -> None:
        """Give out a piece of text, of so many tokens as its maker says in the end where it came as text."""
        if self._chat and not self.text:
            self._begins += text
            text = self._chat.said(self._begins, whole=False)
        if text:
            self.text += text
            self._queue.put(text)

    def end(self) -> None:
        """Nothing follows; the reader's loop ends. Half a character at the end is left out."""
        if self._chat and not self.text and (text := self._chat.said(self._begins)):
            self.text = text
            self._queue.put(text)
        self._queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return iter(lambda: next_of(self._queue), None)

    def _give(self) -> None:
        assert self._chat is not None
        known = self._chat.decoded(self._ids[self._before:self._given])
        longer = self._chat.decoded(self._ids[self._before:])
        if len(longer) <= len(known) or longer.endswith(BROKEN):
            return
        self._before, self._given = self._given, len(self._ids)
        self.say(longer[len(known):])


class Streaming:
    """An answer in the making, whoever makes it: in a thread of its own, as Python's main thread hears of Ctrl-C.

    Iterate over it once for the pieces of text, then call :meth:`finish`.

    Args:
        prompt_tokens: length of the prompt; None where only its maker will know.
    """

    def __init__(self, pieces: Pieces, prompt_tokens: int | None):
        self._pieces, self.prompt_tokens = pieces, prompt_tokens
        self.stopping = threading.Event()
        self.begun = time.perf_counter()
        self.first: float | None = None  # seconds to the first token
        self.seconds: float | None = None  # in all
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if self.first is None:
                self.first = time.perf_counter() - self.begun
            yield piece

    def stop(self) -> None:
        """End the answer after the current token."""
        self.stopping.set()

    def finish(self) -> Answer:
        """Wait for the end and return the whole answer: the pieces together.

        Raises:
            Exception: whatever went wrong while generating.
        """
        self._thread.join()
        if self._failure:
            raise self._failure
        return self.answer()

    def answer(self) -> Answer:
        """What there is of the answer."""
        return Answer(self._pieces.text, self._pieces.tokens, self._pieces.ended)

    def _make(self) -> None:
        """Write the answer into the pieces, and look now and then whether to stop."""
        raise NotImplementedError

    def _work(self) -> None:
        try:
            self._make()
        except BaseException as e:  # noqa: BLE001 - handed to the reader of the stream
            self._failure = e
        finally:
            self.seconds = time.perf_counter() - self.begun
            self._pieces.end()


class Told(Streaming):
    """An answer that another program makes and tells in pieces of text, whose tokens it counts itself."""

    def __init__(self, pieces: Pieces, prompt_tokens: int | None = None):
        self._tokens = 0
        super().__init__(pieces, prompt_tokens)

    def answer(self) -> Answer:
        return Answer(self._pieces.text, self._tokens, self._pieces.ended)

    def _make(self) -> None:
        with contextlib.closing(self._told()) as told:
            for text in told:
                if text:
                    self._pieces.say(text)
                if self.stopping.is_set():
                    break

    def _told(self) -> Generator[str, None, None]:
        """The pieces, which can be empty; beside them it keeps the count of tokens and whether the model has ended."""
        raise NotImplementedError


class Stream(Streaming):
    """An answer of a model that is loaded here.

    Args:
        kept: what the model read before; it is kept up to date.
        state: in which the model answers, such as without its adapter.
        seen: features of the pictures of the conversation, for a model that was loaded to take them.

    Raises:
        UserError: a conversation that cannot be rendered, or fills the model's context.
    """

    def __init__(self, model: Any, chat: ChatFormat, messages: Messages, max_new_tokens: int,
                 arguments: Mapping[str, Any], tools: Tools = None, kept: Any = None,
                 state: Callable[[], Any] = contextlib.nullcontext, seen: Sights | None = None):
        self._model, self._chat, self._arguments = model, chat, dict(arguments)
        self._ids, self._pictures, self._seen = prompt_ids(chat, messages, tools), pictures_of(messages), seen
        self._eye = chat.eye if self._pictures else None
        self._limit = room_for_answer(model, len(self._ids), max_new_tokens)
        self._kept, self._state = kept, state
        super().__init__(Pieces(chat), len(self._ids))

    def _make(self) -> None:
        try:
            self._answer()
            return
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            problem = no_memory(e, "a shorter conversation, or a lower --max-new-tokens, needs less")
        raise problem  # outside the handler, whose traceback keeps alive what the model was computing

    def _answer(self) -> None:
        import torch

        with torch.inference_mode(), self._state():
            ids = torch.tensor([self._ids], device=self._model.device)
            if decoding.pays(self._model) and decoding.reads(self._shown(ids)):
                with contextlib.suppress(decoding.GaveUp):
                    self._decode(ids)
                    return
            self._go_on()

    def _shown(self, ids: Any, read: int = 0) -> dict[str, Any]:
        """What the model is given beside a prompt's ids, of which it has read so many before."""
        return beside(self._seen, self._eye, ids, [self._pictures], read=read)

    def _decode(self, ids: Any) -> None:
        import torch

        groups = decoding.decoded(self._model, ids, torch.ones_like(ids), stop_ids=self._chat.stop_ids,
                                  pad=self._chat.stop_ids[0], limit=self._limit, arguments=self._arguments, every=1,
                                  beside=lambda read: self._shown(ids, read),
                                  known=told_apart(self._eye, self._ids, self._pictures))
        with contextlib.closing(groups):
            for [tokens] in groups:
                self._pieces.take(tokens)
                if self.stopping.is_set():
                    break

    def _go_on(self) -> None:
        """Continue what there is of the answer by ``generate``."""
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        stopped = self.stopping

        class Stopped(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        before = self._ids + self._pieces.ids
        known = told_apart(self._eye, before, self._pictures)
        cache = self._kept.cache_for(self._model, known) if self._kept is not None else None
        ids = torch.tensor([before], device=self._model.device)
        reckon_anew(self._model)
        written = self._model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), streamer=self._pieces,
            max_new_tokens=self._limit - self._pieces.tokens, eos_token_id=self._chat.stop_ids,
            pad_token_id=self._chat.stop_ids[0], stopping_criteria=StoppingCriteriaList([Stopped()]),
            logits_processor=finite_logits(self._model), **self._arguments,
            **self._shown(ids, 0 if cache is None else self._kept.reused),
            **({} if cache is None else {"past_key_values": cache}))
        if cache is not None:
            self._kept.keep(cache, known + written[0, len(known):].tolist())
