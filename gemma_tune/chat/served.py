"""The model in Ollama, as whoever uses it there has it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gemma_tune.answers.generation import Answer
from gemma_tune.answers.stream import Pieces, Told
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat.choice import figures_of
from gemma_tune.chat.pictures import as_png
from gemma_tune.chat.voice import one_after_another
from gemma_tune.config.stages import ChatConfig
from gemma_tune.data.conversations.pictures import pictures_in
from gemma_tune.encoding.eye import PICTURES
from gemma_tune.encoding.thinking import choice_in
from gemma_tune.ollama.ask import capabilities
from gemma_tune.ollama.client import install_hint
from gemma_tune.ollama.names import default_model_name
from gemma_tune.ollama.server import Refused, Server, find_server, ollama_host
from gemma_tune.ollama.talk import show, talk, texts
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session

# Ollama's names of the settings, for those that were chosen; the others are the Modelfile's.
_OPTIONS = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}


class OllamaStream(Told):
    """An answer of Ollama."""

    def __init__(self, server: Server, name: str, messages: Any, options: dict[str, Any], tools: Any,
                 think: bool | None = None):
        self._asked = server, name, messages, options, tools, think
        super().__init__(Pieces(None))

    def _told(self) -> Generator[str, None, None]:
        for text, part in texts(talk(*self._asked)):
            self._tokens += bool(text)  # until the count comes
            if part.get("done"):
                self._tokens = part.get("eval_count") or self._tokens
                self.prompt_tokens = part.get("prompt_eval_count")
                self._pieces.ended = part.get("done_reason") == "stop"
            yield text


@dataclass
class OllamaVoice:
    """See :class:`gemma_tune.chat.voice.Voice`.

    Args:
        think: what requests say of thinking, so that the model is asked as in training; None for nothing.
    """

    which: str
    server: Server
    model: str
    context: int | None
    think: bool | None = None
    name: str = "ollama"
    _seed: int | None = None

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> OllamaStream:
        if any(pictures_in(messages)):
            self.require_sight()
        settings = asdict(config)
        options = {theirs: settings[ours] for ours, theirs in _OPTIONS.items() if settings[ours] is not None}
        options["num_predict"] = config.max_new_tokens
        if self._seed is not None:
            options["seed"] = self._seed
            self._seed += 1  # another for each answer
        return OllamaStream(self.server, self.model, [_sent(turn) for turn in messages], options, tools, self.think)

    def require_sight(self) -> None:
        known = capabilities(self.server, self.model)
        if known and "vision" not in known:
            raise UserError(f"no picture can be shown, because {self.which} takes text alone",
                            "gemma-tune export-ollama --create makes a model that sees of one whose base does, unless "
                            "--no-vision was said; or --use adapter")

    def batch(self, asked: Sequence[tuple[Any, Any]], config: ChatConfig) -> Iterator[Answer | UserError]:
        return one_after_another(self, asked, config)

    def seed(self, seed: int | None) -> None:
        self._seed = seed

    def close(self) -> None:
        """The model stays in Ollama, which unloads it by itself."""


def _sent(turn: Any) -> Any:
    """A turn whose pictures Ollama gets; it puts them before the text."""
    return {**turn, "images": list(map(as_png, turn[PICTURES]))} if turn.get(PICTURES) else turn


def open_ollama(session: Session) -> OllamaVoice:
    """The model that the run's export made in Ollama.

    Raises:
        UserError: the server does not have the model.
        WorkFailed: no server answers, or it fails.
    """
    name = figures_of(session).get("ollama_name") or default_model_name(session.run.model_name)
    server = find_server(ollama_host(os.environ))
    if server is None:
        raise WorkFailed("no Ollama server answers", f"start it with `ollama serve`, or name it: OLLAMA_HOST. "
                                                     f"{install_hint()}")
    try:
        shown = show(server, name)
    except Refused as e:
        if e.status != 404:
            raise
        raise UserError(f"Ollama at {server.place} has no model {name}",
                        command("export-ollama", session.run.root, "--create")) from e
    which = f"{name} in Ollama {server.version}"
    session.listener.note(which)
    return OllamaVoice(which, server, name, shown, _thinking(session, server, name))


def _thinking(session: Session, server: Server, name: str) -> bool | None:
    """The choice that the run's chat template makes, where the server would make its own otherwise."""
    run = session.run
    template = (run.merged if run.merged.is_dir() else run.adapter) / "chat_template.jinja"
    choice = choice_in(template.read_text(encoding="utf-8")) if template.is_file() else None
    return choice if choice is not None and "thinking" in capabilities(server, name) else None
