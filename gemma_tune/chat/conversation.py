"""``chat``: a conversation with the tuned model, its base model or the merged one. Nothing is printed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemma_tune.answers.generation import Answer, Stream, sampling_arguments
from gemma_tune.base.errors import UserError
from gemma_tune.chat.saves import Saves
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.lora.load import add_adapter
from gemma_tune.models.load import load_model
from gemma_tune.models.placement import choose_placement
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session
from gemma_tune.run.stage import keep_stamps, require_output, require_unharmed, state_of


@dataclass
class Conversation:
    """A loaded model and the turns so far."""

    model: Any
    chat: ChatFormat
    which: str
    max_new_tokens: int
    arguments: dict[str, Any]
    system: str | None = None
    saves: Saves | None = None
    turns: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, text: str) -> Stream:
        """Start the answer to ``text``; call :meth:`keep` with the result to make both part of the conversation."""
        return Stream(self.model, self.chat, [*self.messages, {"role": "user", "content": text}],
                      self.max_new_tokens, self.arguments)

    def keep(self, text: str, answer: Answer) -> None:
        """Remember a question and its answer. One that was cut off is nothing to learn from, should it be saved."""
        if answer.text.strip():
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}
                           | ({} if answer.ended else {"train": False})]

    def correct(self, text: str) -> None:
        """Put ``text`` in the place of the last answer.

        Raises:
            UserError: there is no answer yet, or no text.
        """
        if not self.turns:
            raise UserError("there is no answer to correct yet", "ask something first")
        if not text.strip():
            raise UserError("the right answer has no text", "/fix TEXT, or /fix alone for several lines")
        self.turns[-1] = {"role": "assistant", "content": text}

    def save(self, name: str = "") -> tuple[Path, bool]:
        """Save the conversation so far, see :meth:`gemma_tune.chat.saves.Saves.save`.

        Raises:
            UserError: nothing to learn from yet, or a file that cannot be written.
        """
        assert self.saves is not None
        if not self.turns:
            raise UserError("there is no answer to save yet", "ask something first")
        if self.cut == len(self.turns) // 2:
            raise UserError("every answer was cut off, so there is nothing to learn from",
                            "/fix TEXT gives the last one its right text")
        return self.saves.save(self.messages, name)

    @property
    def cut(self) -> int:
        """Number of answers that did not end by themselves."""
        return sum(turn.get("train") is False for turn in self.turns)

    def reset(self, system: str | None = None) -> None:
        """Forget the turns; ``system`` replaces the system prompt when it is given (empty text removes it)."""
        self.turns.clear()
        if self.saves:
            self.saves.forget()
        if system is not None:
            self.system = system or None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """System prompt and turns so far."""
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


def open_conversation(session: Session) -> Conversation:
    """Load the model that the settings name.

    Raises:
        UserError: no adapter or merged model yet, damaged or missing files.
    """
    config = session.config
    checkpoint, adapter, which = _choose(session)
    keep_stamps(session.run, session.manifest)
    chat = load_format(adapter or checkpoint, session.model.config["model_type"])
    placement = choose_placement(config.dtype)
    session.listener.note(f"{which}, computing in {placement.reason}")
    model = load_model(checkpoint, placement).eval()
    if adapter:
        model = add_adapter(model, adapter)
    if config.seed is not None:
        import torch

        torch.manual_seed(config.seed)
    chosen = {k: v for k, v in asdict(config).items() if k in ("temperature", "top_p", "top_k", "repetition_penalty")}
    return Conversation(model, chat, which, config.max_new_tokens, sampling_arguments(model, chosen), config.system,
                        Saves(session.run, session.settings_of("prepare")))


def _choose(session: Session) -> tuple[Path, Path | None, str]:
    run, config = session.run, session.config
    if config.base and config.merged:
        raise UserError("--base and --merged exclude each other", "use one of them")
    if config.base:
        return session.model.path, None, f"{session.model.name}, the base model"
    merged = config.merged
    if not merged and "train" not in session.manifest.stages and "merge" in session.manifest.stages:
        session.listener.note("this run has no training of its own, so the merged model answers")
        merged = True
    stage, output = ("merge", "merged") if merged else ("train", "adapter")
    state = state_of(run, session.manifest, stage)
    if state.status == "missing":
        raise UserError(f"{run.root} has no {'merged model' if merged else 'trained adapter'} yet",
                        f"{command(stage, run.root)}, or chat with the base model: --base")
    require_output(run, session.manifest, "chat", stage, output)
    if not merged:  # an adapter is small; gigabytes are not read twice for a question
        require_unharmed(run, session.manifest, "chat", stage, output)
    if state.status == "stale":
        session.listener.warn(f"the result of `{stage}` is stale: {state.reason}")
    if merged:
        return run.merged, None, f"{session.model.name}, tuned and merged"
    return session.model.path, run.adapter, f"{session.model.name}, tuned"


def answers(conversation: Conversation, prompts: Iterator[str]) -> Iterator[tuple[str, Stream]]:
    """One independent answer per prompt that is not blank: each starts from the system prompt alone."""
    for prompt in (line.rstrip("\r\n") for line in prompts):
        if prompt.strip():
            conversation.reset()
            yield prompt, conversation.ask(prompt)
