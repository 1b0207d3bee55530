"""Who can answer in a chat, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.sampling import CHOOSABLE
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.errors import UserError
from gemma_tune.config.stages import ChatConfig

Messages = Sequence[dict[str, Any]]
Tools = Sequence[dict[str, Any]] | None


class Voice(Protocol):
    """One who answers.

    Attributes:
        name: as ``--use`` has it.
        which: as people are told.
        context: tokens of the longest conversation; None where nobody says.
    """

    name: str
    which: str
    context: int | None

    def ask(self, messages: Messages, config: ChatConfig, tools: Tools = None) -> Streaming:
        """Start an answer.

        Raises:
            UserError: a conversation that cannot be rendered, or fills the context.
        """

    def batch(self, asked: Sequence[tuple[Messages, Tools]], config: ChatConfig) -> Iterator[Answer | UserError]:
        """Answers to conversations that have nothing to do with each other, in their order, each as soon as it and
        those before it are there; an error for one that cannot be answered, and the others all the same."""

    def require_sight(self) -> None:
        """Find out that it can be shown pictures.

        Raises:
            UserError: it cannot; why, and who can.
        """

    def seed(self, seed: int | None) -> None:
        """Let the sampling begin anew from a seed; without one, from nowhere that could be repeated."""

    def close(self) -> None:
        """Free what it holds."""


def sampling_of(config: ChatConfig) -> dict[str, Any]:
    """Sampling settings of a chat; None leaves one to the model."""
    return {name: getattr(config, name) for name in CHOOSABLE}


def one_after_another(voice: Voice, asked: Sequence[tuple[Messages, Tools]], config: ChatConfig
                      ) -> Iterator[Answer | UserError]:
    """As :meth:`Voice.batch`, for those who answer one question at a time."""
    for messages, tools in asked:
        try:
            stream = voice.ask(messages, config, tools)
            try:
                answer = stream.finish()
            except BaseException:
                stream.stop()
                raise
        except UserError as e:
            yield e
        else:
            yield answer
