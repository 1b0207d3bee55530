"""Opening those who answer in a chat, by name."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

from gemma_tune.chat.choice import Choice, choose, require
from gemma_tune.chat.voice import Voice
from gemma_tune.run.session import Session


@dataclass
class Voices:
    """Opens voices when they are first asked for, and keeps them."""

    session: Session
    choice: Choice
    _open: dict[str, Voice] = field(default_factory=dict)
    _looked_at: set[str] = field(default_factory=set)  # what it says is said once

    @classmethod
    def of(cls, session: Session) -> Voices:
        """With the choice that settings and run make; nothing is loaded yet.

        Raises:
            UserError: what was asked for is not there.
        """
        choice = choose(session)
        return cls(session, choice, _looked_at={choice.name})

    @property
    def tuned(self) -> str:
        """Name of the one with what was learned.

        Raises:
            UserError: there is none.
        """
        name = self.choice.name
        return choose(self.session, tuned=True).name if name == "base" else name

    def open(self, name: str, *, pair: bool = False) -> Voice:
        """The voice of this name, loaded if it was not.

        Args:
            pair: base and adapter are to answer by turns, so both come out of one loaded model.

        Raises:
            UserError: it is not there, or cannot be loaded.
        """
        if name not in self._open or pair and not {"base", "adapter"} <= self._open.keys():
            if name not in self._looked_at:
                require(self.session, name)
                self._looked_at.add(name)
            self._load(name, pair)
        return self._open[name]

    def has(self, voice: Voice) -> bool:
        """Whether this one is still loaded: others can need its memory, and fail."""
        return self._open.get(voice.name) is voice

    def close(self) -> None:
        """Close all of them."""
        while self._open:
            self._open.popitem()[1].close()

    def _load(self, name: str, pair: bool) -> None:
        if name == "gguf":
            from gemma_tune.chat.llama import open_gguf

            self._open[name] = open_gguf(self.session)
        elif name == "ollama":
            from gemma_tune.chat.served import open_ollama

            self._open[name] = open_ollama(self.session)
        elif name == "merged":
            from gemma_tune.chat.local import open_merged

            self._open[name] = open_merged(self.session)
        else:
            self._load_base(name, pair)

    def _load_base(self, name: str, pair: bool) -> None:
        """Base, adapter, or both. Folded weights are no base any more, so that is loaded again beside them."""
        from gemma_tune.chat.local import open_base, open_pair

        before = [self._open.pop(one) for one in ("adapter", "base") if one in self._open]
        if pair or before:
            for voice in before:  # two models at once may be more than the memory has
                voice.close()
            gc.collect()  # a model's parts hold each other
            self._open |= open_pair(self.session)
        else:
            self._open[name] = open_base(self.session, adapter=name == "adapter")
