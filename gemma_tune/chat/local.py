"""Models that PyTorch computes here: base, adapter and merged model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.answers.generation import (
    Answer,
    context_of,
    continuations,
    prompt_ids,
    room_for_answer,
)
from gemma_tune.answers.kept import KeptTurns
from gemma_tune.answers.lengths import by_length, rows_that_fit
from gemma_tune.answers.sampling import sampling_arguments
from gemma_tune.answers.stream import Stream
from gemma_tune.base.errors import UserError
from gemma_tune.base.machine import is_out_of_memory, no_memory
from gemma_tune.chat.voice import sampling_of
from gemma_tune.config.stages import ChatConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.lora.fold import fold
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import Placement, available, choose_placement
from gemma_tune.run.session import Session


@dataclass
class LocalVoice:
    """A loaded model, see :class:`gemma_tune.chat.voice.Voice`.

    Args:
        state: in which it answers, such as without its adapter.
    """

    name: str
    which: str
    model: Any
    chat: ChatFormat
    state: Callable[[], Any] = contextlib.nullcontext
    kept: KeptTurns = field(default_factory=KeptTurns)

    def __post_init__(self) -> None:
        # Some of Gemma's generation settings name a kind of cache, beside which `generate` takes no other.
        self.model.generation_config.cache_implementation = None

    @property
    def context(self) -> int | None:
        return context_of(self.model)

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> Stream:
        return Stream(self.model, self.chat, messages, config.max_new_tokens,
                      sampling_arguments(self.model, sampling_of(config)), tools, self.kept, self.state)

    def batch(self, asked: Sequence[tuple[Any, Any]], config: ChatConfig) -> Iterator[Answer | UserError]:
        found: list[Any] = [None] * len(asked)
        encoded: dict[int, list[int]] = {}
        for number, (messages, tools) in enumerate(asked):
            try:
                encoded[number] = prompt_ids(self.chat, messages, tools)
                room_for_answer(self.model, len(encoded[number]), config.max_new_tokens)
            except UserError as e:
                found[number] = e
        most = rows_that_fit(self.model, available(self.model.device.type))
        given = 0
        for group in by_length({n: len(ids) for n, ids in encoded.items()}, config.max_new_tokens, self.context, most):
            for number, answer in zip(group, self._together([encoded[n] for n in group], config)):
                found[number] = answer
            while given < len(found) and found[given] is not None:
                yield found[given]
                given += 1
        yield from found[given:]

    def _together(self, encoded: list[list[int]], config: ChatConfig) -> list[Answer | UserError]:
        """One batch; in two halves where the memory is not enough for it."""
        try:
            with self.state():
                return list(continuations(self.model, self.chat, encoded, config.max_new_tokens,
                                          sampling_arguments(self.model, sampling_of(config))))
        except UserError as e:
            return [e] * len(encoded)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            if len(encoded) == 1:
                return [no_memory(e, "a lower --max-new-tokens needs less")]
        half = len(encoded) // 2
        return self._together(encoded[:half], config) + self._together(encoded[half:], config)

    def seed(self, seed: int | None) -> None:
        import torch

        torch.seed() if seed is None else torch.manual_seed(seed)

    def close(self) -> None:
        self.model, self.state = None, contextlib.nullcontext  # the state is one of the model's
        self.kept = KeptTurns()


def open_merged(session: Session) -> LocalVoice:
    """The merged model.

    Raises:
        UserError: it cannot be loaded.
    """
    which = f"{session.model.name}, tuned and merged"
    placement = _placed(session, which)
    model = load_model(session.run.merged, placement).eval()
    return LocalVoice("merged", which, model, _format(session, session.run.merged))


def open_base(session: Session, *, adapter: bool) -> LocalVoice:
    """The base model, with the adapter folded into its weights on a CPU, where it answers alone.

    Raises:
        UserError: it cannot be loaded.
    """
    name, which = ("adapter", _tuned(session)) if adapter else ("base", _base(session))
    placement = _placed(session, which)
    model = load_model(session.model.path, placement).eval()
    if adapter:
        model = add_adapter(model, session.run.adapter)
        if placement.device == "cpu" and (folded := fold(model)) is not None:
            model = folded
            session.listener.note("the adapter is folded into the weights in memory: a token takes less time")
    return LocalVoice(name, which, model, _format(session, session.run.adapter if adapter else session.model.path))


def open_pair(session: Session) -> dict[str, LocalVoice]:
    """Base and tuned model out of one loaded model, by name: its adapter is switched off and on.

    Raises:
        UserError: it cannot be loaded.
    """
    placement = _placed(session, f"{session.model.name}, base and tuned in one")
    model = add_adapter(load_model(session.model.path, placement).eval(), session.run.adapter)
    chat = _format(session, session.run.adapter)
    return {"adapter": LocalVoice("adapter", _tuned(session), model, chat),
            "base": LocalVoice("base", _base(session), model, chat, model.disable_adapter)}


def _tuned(session: Session) -> str:
    return f"{session.model.name}, tuned"


def _base(session: Session) -> str:
    return f"{session.model.name}, the base model"


def _placed(session: Session, which: str) -> Placement:
    placement = choose_placement(session.config.dtype)
    session.listener.note(f"{which}, computing in {placement.reason}")
    return placement


def _format(session: Session, checkpoint: Path) -> ChatFormat:
    named = session.chat_template() if checkpoint == session.model.path else None
    if named and (trained := session.run.adapter / named.name).is_file():  # both are asked in the same words
        named = trained
    return load_format(checkpoint, session.model.config["model_type"], template=named)
