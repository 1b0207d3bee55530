"""``python -m support.talking``: a chat in a terminal whose model is a stand-in that repeats the question, word by word."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import typer

from gemma_tune.answers.stream import Pieces, Streaming
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Held
from gemma_tune.base.loading import loading
from gemma_tune.chat.ahead import Ahead
from gemma_tune.chat.conversation import Conversation
from gemma_tune.chat.pictures import Shown
from gemma_tune.chat.saves import Saves
from gemma_tune.cli.chat.loop import interactive
from gemma_tune.cli.chat.typing import typist
from gemma_tune.cli.console import ConsoleListener
from gemma_tune.cli.invocation import Command, Commands
from gemma_tune.config.stages import ChatConfig
from gemma_tune.run.directory import RunDir

PAUSE = float(os.environ.get("TALKING_PAUSE", "0.01"))  # seconds a word takes
LOADS = float(os.environ.get("TALKING_LOADS", "0"))  # seconds until somebody can answer, after the prompt is there
FAILS = os.environ.get("TALKING_FAILS")  # what is wrong with the model then


class Repeats(Streaming):
    """Says what was asked, after its name."""

    def __init__(self, name: str, text: str, count: int):
        self._words = [f"{name} says", *(f" {word}" for word in text.split(" "))]
        self._made, self._count = 0, count
        super().__init__(Pieces(None), 10 * count)

    def answer(self) -> Any:
        from gemma_tune.answers.generation import Answer

        return Answer(self._pieces.text, self._made, not self.stopping.is_set())

    def _make(self) -> None:
        for word in self._words:
            if self.stopping.wait(PAUSE):
                return
            self._made += 1
            self._pieces.say(word)


class Voice:
    """A stand-in."""

    def __init__(self, name: str):
        self.name, self.which, self.context = name, f"{name} model", 100

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> Streaming:
        seen = "".join(f" and sees {Path(one['path']).name}" for one in messages[-1].get("pictures", ()))
        return Repeats(self.name, messages[-1]["content"] + seen, len(messages))

    def require_sight(self) -> None:
        pass

    def seed(self, seed: int | None) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the terminal has gone
            print("closed", file=sys.stderr)


class Voices:
    """Both of them."""

    tuned = "tuned"

    def __init__(self) -> None:
        self._voices = {"tuned": Voice("tuned"), "adapter": Voice("tuned"), "base": Voice("base")}

    def open(self, name: str, *, pair: bool = False) -> Voice:
        time.sleep(PAUSE)
        return self._voices[name]

    def has(self, voice: Voice) -> bool:
        return True

    def close(self) -> None:
        self._voices["base"].close()


def chat() -> None:
    """The command."""
    Path("run").mkdir(exist_ok=True)
    voices, said = Voices(), Held(ConsoleListener())

    def load() -> Voice:
        with loading("the weights"):
            said.note("a model of words, which computes nothing")
            time.sleep(LOADS)
        if FAILS:
            raise UserError(FAILS, "load another one")
        return voices.open("tuned")

    answering = Ahead(load) if LOADS else load()
    talk = Conversation(answering, ChatConfig(), Saves(RunDir(Path("run"), "m"), {}), voices,  # type: ignore[arg-type]
                        shown=Shown(copied=True))
    interactive(talk, typist(), said)


if __name__ == "__main__":
    app = typer.Typer(cls=Commands)
    app.callback()(lambda: None)  # with one command alone there would be no group
    app.command("chat", cls=Command)(chat)
    app(["chat"])
