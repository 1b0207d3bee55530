"""``chat``: a conversation with the tuned model, its base model or another of the run's. Nothing is printed here."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Streaming
from gemma_tune.base.errors import UserError
from gemma_tune.base.words import near
from gemma_tune.chat.ahead import Ahead
from gemma_tune.chat.pictures import Shown, as_row
from gemma_tune.chat.preferences import Opinion, is_broken, is_cut
from gemma_tune.chat.saves import Saves
from gemma_tune.chat.voice import Voice
from gemma_tune.chat.voices import Voices
from gemma_tune.config.settings import converted, types_of
from gemma_tune.config.stages import ChatConfig, SamplingConfig
from gemma_tune.data.conversations.pictures import Picture
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.run.session import Session
from gemma_tune.run.state import keep_stamps

__all__ = ["Conversation", "open_conversation"]
# What /set changes; the seed is no part of how an answer is drawn, but of which one is.
CHANGEABLE = (*(f.name for f in fields(SamplingConfig)), "seed")
_NO_TEXT = "an answer has bytes that are no characters (U+FFFD), so there is no pair to learn from"
_ROOM_TO_WARN = 0.2  # of the context: from here on it is nearly full


@dataclass
class Conversation:
    """The turns so far, and who answers them.

    Args:
        answering: who answers now, or is being loaded to.
        voices: opens others; None where there are none.

    Attributes:
        waiting: pictures that are shown with the next question.
    """

    answering: Voice | Ahead
    config: ChatConfig
    saves: Saves | None = None
    voices: Voices | None = None
    system: str | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)
    comparing: bool = False
    shown: Shown = field(default_factory=Shown)
    waiting: list[Picture] = field(default_factory=list, init=False)
    _opinions: dict[int, Opinion] = field(default_factory=dict, init=False)  # by number of the exchange

    @property
    def voice(self) -> Voice:
        """Who answers now; waits where that is still being loaded.

        Raises:
            UserError: it cannot be loaded.
        """
        if isinstance(self.answering, Ahead):
            self.answering = self.answering.wait()
        if self.voices is not None and not self.voices.has(self.answering):  # another was to take its place
            self._take(self.voices.open(self.answering.name))
        assert not isinstance(self.answering, Ahead)
        return self.answering

    @property
    def ahead(self) -> Ahead | None:
        """What is being loaded, or could not be; None since somebody answers."""
        return self.answering if isinstance(self.answering, Ahead) else None

    @property
    def which(self) -> str:
        """Who answers, in words."""
        return self.voice.which

    def ask(self, text: str, voice: Voice | None = None) -> Streaming:
        """Start the answer to ``text``; call :meth:`keep` with the result to make both part of the conversation.

        Raises:
            UserError: a conversation that cannot be rendered, or fills the context.
        """
        return (voice or self.voice).ask([*self.messages, self.question(text)], self.config)

    def show(self, path: Path) -> None:
        """Show a picture with the next question, behind those that wait for it.

        Raises:
            UserError: it is no picture, or who answers takes none.
        """
        picture = self.shown.picture(path)
        self.voice.require_sight()
        self.waiting.append(picture)

    def question(self, text: str) -> dict[str, Any]:
        """The user's next turn."""
        return {"role": "user", "content": text} | ({PICTURES: [*self.waiting]} if self.waiting else {})

    def keep(self, text: str, answer: Answer) -> bool:
        """Remember a question and its answer, if that has text. One that was cut off is nothing to learn from, should
        it be saved."""
        if not answer.text.strip():
            return False
        self.turns += [self.question(text), _turn(answer)]
        self.waiting.clear()
        return True

    def undo(self) -> str:
        """Take the last question and its answer back, with the pairs that were kept of it; returns the question.

        Raises:
            UserError: there is none, or its pairs cannot be taken out of their file; then all stays.
        """
        if not self.turns:
            raise UserError("there is nothing to take back yet", "ask something first")
        question, opinion = self.turns[-2], self._opinions.get(self._number)
        if self.saves and opinion and opinion.rows:
            self.saves.pairs.put(opinion.rows, [])
        self._opinions.pop(self._number, None)
        del self.turns[-2:]
        return question["content"]

    def last_question(self) -> str:
        """What was asked last.

        Raises:
            UserError: nothing yet.
        """
        if not self.turns:
            raise UserError("nothing was asked yet", "ask something first")
        return self.turns[-2]["content"]

    # --- which answer is better -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def again(self) -> Iterator[str]:
        """The last question, to be asked again: its answer is away meanwhile, and comes back unless another is kept.

        Raises:
            UserError: nothing was asked yet.
        """
        question, before = self.last_question(), self.turns[-2:]
        del self.turns[-2:]
        left, waiting = len(self.turns), self.waiting
        self.waiting = [*before[0].get(PICTURES, ())]
        try:
            yield question
        finally:
            self.waiting = waiting
            if len(self.turns) == left:
                self.turns += before

    def offer(self, answers: Mapping[str, Answer], number: int) -> bool:
        """Answers of several models to one question, for :meth:`better` to choose from.

        Args:
            number: of the exchange, from 0.

        Returns:
            Whether there is a choice: each has text, and they differ.
        """
        texts = [answer.text.split() for answer in answers.values()]
        if not all(texts) or texts[1:] == texts[:-1]:
            return False
        self._opinion(number).offer({name: _turn(answer) for name, answer in answers.items()})
        return True

    def answered_again(self, before: dict[str, Any]) -> str | None:
        """What :meth:`better` calls the last answer, ``before`` having been the one to the same question; None if it
        is one that is known already."""
        return self._opinion(self._number).again(before, self.turns[-1])

    def better(self, name: str) -> tuple[int, str]:
        """Let the answer of this name be the last one, and keep that it is better than the others.

        Returns:
            How many pairs are kept of it, and why there is none.

        Raises:
            UserError: there is no such answer, or the file of pairs cannot be written.
        """
        self.last_question()
        opinion = self._opinion(self._number)
        self.turns[-1] = opinion.choose(name)
        pairs = self._keep_pairs(opinion)
        if is_cut(self.turns[-1]):
            return 0, "it was cut off, so no pair is kept; /fix TEXT gives it its right text"
        return pairs, _NO_TEXT

    def correct(self, text: str) -> tuple[int, str]:
        """Put ``text`` in the place of the last answer, and keep that it is better.

        Returns:
            How many pairs are kept, and why there is none.

        Raises:
            UserError: there is no answer yet, or no text, or the file of pairs cannot be written.
        """
        if not self.turns:
            raise UserError("there is no answer to correct yet", "ask something first")
        if not text.strip():
            raise UserError("the right answer has no text", "/fix TEXT, or /fix alone for several lines")
        opinion, wrong = self._opinion(self._number), self.turns[-1]
        self.turns[-1] = {"role": "assistant", "content": text}
        differs = opinion.correct(wrong, self.turns[-1])
        pairs = self._keep_pairs(opinion)
        if not differs:
            return 0, "the same text as before but for white space, so there is no pair to learn from"
        return pairs, _NO_TEXT

    def _keep_pairs(self, opinion: Opinion) -> int:
        pairs = opinion.pairs([as_row(turn) for turn in self.messages[:-1]])
        assert self.saves is not None
        opinion.rows = self.saves.pairs.put(opinion.rows, pairs)
        return len(pairs)

    @property
    def _number(self) -> int:
        """Of the last exchange, from 0."""
        return len(self.turns) // 2 - 1

    def _opinion(self, number: int) -> Opinion:
        return self._opinions.setdefault(number, Opinion())

    # --- what becomes of it -----------------------------------------------------------------------------------------

    def save(self, name: str = "") -> tuple[Path, bool]:
        """Save the conversation so far, see :meth:`gemma_tune.chat.saves.Saves.save`.

        Raises:
            UserError: nothing to learn from yet, or a file that cannot be written.
        """
        assert self.saves is not None
        if not self.turns:
            raise UserError("there is no answer to save yet", "ask something first")
        if broken := [number for number, turn in enumerate(self.turns[1::2], start=1) if is_broken(turn)]:
            raise UserError(f"answer {broken[0]} has bytes that are no characters (U+FFFD), which `prepare` refuses",
                            "/fix TEXT gives the last answer its right text, /undo takes it back")
        if self.cut == len(self.turns) // 2:
            raise UserError("every answer was cut off, so there is nothing to learn from",
                            "/fix TEXT gives the last one its right text")
        return self.saves.save([as_row(turn) for turn in self.messages], name)

    @property
    def cut(self) -> int:
        """Number of answers that did not end by themselves."""
        return sum(map(is_cut, self.turns))

    def reset(self, system: str | None = None) -> None:
        """Forget the turns; ``system`` replaces the system prompt when it is given (empty text removes it)."""
        self.turns.clear()
        self.waiting.clear()
        self._opinions.clear()
        if self.saves:
            self.saves.forget()
        if system is not None:
            self.system = system or None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """System prompt and turns so far."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns

    # --- who answers, and how -------------------------------------------------------------------------------------

    def let_answer(self, name: str) -> None:
        """Have ``base`` or ``tuned`` answer from now on; the turns stay.

        Raises:
            UserError: it is not there, or cannot be loaded.
        """
        now = self.voice.name
        assert self.voices is not None
        name = self.voices.tuned if name == "tuned" else name
        if name != now:
            self._take(self.voices.open(name))

    def pair(self) -> tuple[Voice, Voice]:
        """Base and tuned model, out of one loaded model.

        Raises:
            UserError: there is no adapter, or they cannot be loaded.
        """
        now = self.voice.name
        assert self.voices is not None
        tuned, base = (self.voices.open(name, pair=True) for name in ("adapter", "base"))
        if now in ("base", "adapter"):  # another model in memory than it was
            self._take({"base": base, "adapter": tuned}[now])
        return base, tuned

    def set(self, name: str, value: str) -> Any:
        """Change a setting, as text; ``default`` sets it back. Returns the value.

        Raises:
            UserError: there is no such setting, or it does not take this.
        """
        if name not in CHANGEABLE:
            raise UserError(f"there is no setting {name}{near(name, CHANGEABLE)}",
                            f"/set knows {', '.join(CHANGEABLE)} and markdown")
        config = replace(self.config, **{name: _value(name, value)})
        if name == "seed":
            self.voice.seed(config.seed)
        self.config = config
        return getattr(self.config, name)

    def room(self, used: int) -> int | None:
        """Tokens that are left of the context after ``used``, where they are few; None where there is room."""
        context = self.voice.context
        if context is None or context - used > _ROOM_TO_WARN * context:
            return None
        return max(0, context - used)

    def close(self) -> None:
        """Free the models, when one that is being loaded is there, and remove copies of pictures."""
        self.shown.close()
        if self.ahead is not None:
            with contextlib.suppress(Exception):
                self.ahead.wait()
        if self.voices:
            self.voices.close()

    def _take(self, voice: Voice) -> None:
        self.answering = seeded(voice, self.config)


def seeded(voice: Voice, config: ChatConfig) -> Voice:
    """A voice that begins to answer, from the seed if there is one."""
    if config.seed is not None:
        voice.seed(config.seed)
    return voice


def _turn(answer: Answer) -> dict[str, Any]:
    """An answer as a turn; one that was cut off is nothing to learn from."""
    return {"role": "assistant", "content": answer.text} | ({} if answer.ended else {"train": False})


def _value(name: str, text: str) -> Any:
    """A setting's value from text, checked where the settings are."""
    if text == "default":
        return next(f.default for f in fields(ChatConfig) if f.name == name)
    whole = re.fullmatch(r"[+-]?[0-9]{1,18}", text)
    return converted(types_of(ChatConfig)[name], int(text) if whole else text)


def open_conversation(session: Session, *, ahead: bool = False, talking: bool = False) -> Conversation:
    """Load the model that the settings name, or what is there.

    Args:
        ahead: return at once, and load it in a thread.
        talking: with a person, for as long as they like.

    Raises:
        UserError: nothing that can answer, damaged or missing files; with ``ahead`` what is found while loading is
            raised by what needs the model.
    """
    config = session.config
    voices = Voices.of(session)
    keep_stamps(session.run, session.manifest)
    if voices.choice.reason:
        session.listener.note(voices.choice.reason)
    saves = Saves(session.run, session.settings_of("prepare"), session.manifest.kind)

    def load() -> Voice:
        return seeded(voices.open(voices.choice.name, pair=config.compare), config)

    return Conversation(Ahead(load) if ahead else load(), config, saves, voices, config.system,
                        comparing=config.compare, shown=Shown(copied=talking))
