"""Models that PyTorch computes here: base, adapter and merged model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from gemma_tune.base.words import first_line
from gemma_tune.chat.voice import sampling_of
from gemma_tune.config.stages import ChatConfig
from gemma_tune.data.conversations.pictures import pictures_in
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import blindness, eye_of, pictures_of
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.lora.fold import fold
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.looking import Looking
from gemma_tune.models.placement import available, placed
from gemma_tune.run.session import Session


@dataclass
class LocalVoice:
    """A loaded model, see :class:`gemma_tune.chat.voice.Voice`.

    Args:
        state: in which it answers, such as without its adapter.
        seen: what looks at pictures for it; None where it takes text alone.
        blind: why that is so.
    """

    name: str
    which: str
    model: Any
    chat: ChatFormat
    state: Callable[[], Any] = contextlib.nullcontext
    kept: KeptTurns = field(default_factory=KeptTurns)
    seen: Looking | None = None
    blind: str = "the model takes text alone"

    def __post_init__(self) -> None:
        # Some of Gemma's generation settings name a kind of cache, beside which `generate` takes no other.
        self.model.generation_config.cache_implementation = None

    @property
    def context(self) -> int | None:
        return context_of(self.model)

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> Stream:
        self._find(messages)
        return Stream(self.model, self.chat, messages, config.max_new_tokens,
                      sampling_arguments(self.model, sampling_of(config)), tools, self.kept, self.state, self.seen)

    def require_sight(self) -> None:
        if self.seen is None:
            raise UserError(f"no picture can be shown, because {self.blind}", "train a model that sees, such as "
                            "google/gemma-3-4b-it, or ask without a picture")

    def _find(self, messages: Any) -> None:
        """Let the eye know where the pictures of a conversation lie.

        Raises:
            UserError: the model takes none, or not these.
        """
        for picture in pictures_in(messages):
            self.require_sight()
            eye, name = self.chat.eye, picture["file"]
            eye.elsewhere[name] = Path(picture["lies_at"])
            try:
                eye.parts(name)
            except UserError:  # about the model
                raise
            except Exception as e:  # of a shape, say, that the family's processor does not take, or gone by now
                raise UserError(f"{picture['path']} is none that the model is shown: {first_line(e)}",
                                "make another picture of it; in a conversation, /image alone takes it back") from e

    def batch(self, asked: Sequence[tuple[Any, Any]], config: ChatConfig) -> Iterator[Answer | UserError]:
        found: list[Any] = [None] * len(asked)
        encoded: dict[int, list[int]] = {}
        for number, (messages, tools) in enumerate(asked):
            try:
                self._find(messages)
                encoded[number] = prompt_ids(self.chat, messages, tools)
                room_for_answer(self.model, len(encoded[number]), config.max_new_tokens)
            except UserError as e:
                found[number] = e
        most = rows_that_fit(self.model, available(self.model.device.type))
        given = 0
        for group in by_length({n: len(ids) for n, ids in encoded.items()}, config.max_new_tokens, self.context, most):
            asked_together = [(encoded[n], pictures_of(asked[n][0])) for n in group]
            for number, answer in zip(group, self._together(asked_together, config)):
                found[number] = answer
            while given < len(found) and found[given] is not None:
                yield found[given]
                given += 1
        yield from found[given:]

    def _together(self, encoded: list[tuple[list[int], list[str]]], config: ChatConfig) -> list[Answer | UserError]:
        """One batch, of prompts with the names of their pictures; in two halves where the memory is not enough."""
        try:
            with self.state():
                return list(continuations(self.model, self.chat, [ids for ids, _ in encoded], config.max_new_tokens,
                                          sampling_arguments(self.model, sampling_of(config)), None,
                                          [names for _, names in encoded], self.seen))
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
        self.model, self.seen, self.state = None, None, contextlib.nullcontext  # the state is one of the model's
        self.kept = KeptTurns()


def open_merged(session: Session) -> LocalVoice:
    """The merged model.

    Raises:
        UserError: it cannot be loaded.
    """
    return _opened(session, "merged", f"{session.model.name}, tuned and merged", session.run.merged)


def open_base(session: Session, *, adapter: bool) -> LocalVoice:
    """The base model, with the adapter folded into its weights on a CPU, where it answers alone.

    Raises:
        UserError: it cannot be loaded.
    """
    if not adapter:
        return _opened(session, "base", _base(session), session.model.path)
    voice = _opened(session, "adapter", _tuned(session), session.model.path, session.run.adapter)
    if voice.model.device.type == "cpu" and (folded := fold(voice.model)) is not None:
        voice.model = folded
        session.listener.note("the adapter is folded into the weights in memory: a token takes less time")
    return voice


def open_pair(session: Session) -> dict[str, LocalVoice]:
    """Base and tuned model out of one loaded model, by name: its adapter is switched off and on.

    Raises:
        UserError: it cannot be loaded.
    """
    tuned = _opened(session, "adapter", _tuned(session), session.model.path, session.run.adapter,
                    called=f"{session.model.name}, base and tuned in one")
    base = replace(tuned, name="base", which=_base(session), state=tuned.model.disable_adapter, kept=KeptTurns())
    return {"adapter": tuned, "base": base}


def _opened(session: Session, name: str, which: str, checkpoint: Path, adapter: Path | None = None,
            called: str | None = None) -> LocalVoice:
    """A voice; of a model that sees what it sees with is loaded with the first picture.

    Args:
        called: what people are told in place of ``which``.
    """
    placement = placed(session.config.dtype, checkpoint)
    session.listener.note(f"{called or which}, computing in {placement.reason}")
    chat = _format(session, adapter or checkpoint)
    chat.eye = eye_of(checkpoint, chat.tokenizer)  # an adapter has none
    model = load_model(checkpoint, placement, sight="features" if chat.eye else "none").eval()
    if adapter:
        model = add_adapter(model, adapter)
    return LocalVoice(name, which, model, chat, seen=Looking(checkpoint, chat.eye, placement) if chat.eye else None,
                      blind=blindness(checkpoint, chat.tokenizer))


def _tuned(session: Session) -> str:
    return f"{session.model.name}, tuned"


def _base(session: Session) -> str:
    return f"{session.model.name}, the base model"


def _format(session: Session, checkpoint: Path) -> ChatFormat:
    named = session.chat_template() if checkpoint == session.model.path else None
    if named and (trained := session.run.adapter / named.name).is_file():  # both are asked in the same words
        named = trained
    return load_format(checkpoint, session.model.config["model_type"], template=named)
