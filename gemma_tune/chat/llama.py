"""The exported GGUF file, which llama.cpp runs: on a CPU the fastest way to an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_tune.answers.generation import Answer, prompt_ids, room_in
from gemma_tune.answers.sampling import arguments_of
from gemma_tune.answers.stream import Pieces, Told
from gemma_tune.base.checkpoint import context_length, generation_settings, read_config
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat.choice import exported, without_gguf
from gemma_tune.chat.pictures import as_png
from gemma_tune.chat.voice import one_after_another, sampling_of
from gemma_tune.config.stages import ChatConfig
from gemma_tune.data.conversations.pictures import pictures_in
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.eye import with_parts
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.gguf.engine import Engine
from gemma_tune.gguf.llama_cpp import engine_name
from gemma_tune.run.directory import command
from gemma_tune.run.session import Session

CONTEXT = 8192  # tokens that llama.cpp makes room for when it loads a file; more takes memory whether used or not


def sampling(arguments: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """Arguments of ``generate`` as llama.cpp takes them: in the same order, and none of its own defaults."""
    penalty = {"repeat_penalty": arguments.get("repetition_penalty", 1.0), "repeat_last_n": CONTEXT}  # all of it
    if not arguments["do_sample"]:
        return penalty | {"temperature": 0, "top_k": 1}
    return penalty | {"temperature": arguments["temperature"], "top_k": arguments["top_k"], "top_p": arguments["top_p"],
                      "min_p": arguments.get("min_p", 0),
                      "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
                      **({} if seed is None else {"seed": seed})}


class LlamaStream(Told):
    """An answer of llama.cpp to a prompt of token ids."""

    def __init__(self, engine: Engine, chat: ChatFormat, ids: list[int], limit: int, settings: dict[str, Any]):
        self._engine, self._ids, self._limit, self._settings = engine, ids, limit, settings
        super().__init__(Pieces(chat), len(ids))

    def _told(self) -> Generator[str, None, None]:
        with contextlib.closing(self._engine.stream(self._ids, self._limit, **self._settings)) as parts:
            for text, self._tokens, self._pieces.ended in parts:
                yield text


class LlamaTalk(Told):
    """An answer of llama.cpp to a conversation with pictures, whose prompt it makes itself."""

    def __init__(self, engine: Engine, chat: ChatFormat, messages: Any, limit: int, settings: dict[str, Any]):
        self._engine, self._limit, self._settings = engine, limit, settings
        self._asked = [{"role": turn["role"], "content": turn["content"]} for turn in map(with_parts, messages)], [
            as_png(picture) for picture in pictures_in(messages)]
        super().__init__(Pieces(chat))

    def _told(self) -> Generator[str, None, None]:
        with contextlib.closing(self._engine.talk(*self._asked, self._limit, **self._settings)) as parts:
            for text, self._tokens, self._pieces.ended, read in parts:
                self.prompt_tokens = read or None
                yield text


@dataclass
class LlamaVoice:
    """See :class:`gemma_tune.chat.voice.Voice`.

    Args:
        gguf, projector: the files; the second, with which the model sees, is loaded with the first picture.
    """

    which: str
    context: int
    engine: Engine
    chat: ChatFormat
    own: dict[str, Any]  # the model's generation settings
    name: str = "gguf"
    gguf: Path | None = None
    projector: Path | None = None
    _sees: bool = False
    _seed: int | None = None

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> Told:
        if any(pictures_in(messages)):
            if tools or any("tool_calls" in turn for turn in messages):
                raise UserError("tools beside a picture are not asked through llama.cpp",
                                "ask the adapter: --use adapter")
            self._open_eyes()
            return LlamaTalk(self.engine, self.chat, messages, config.max_new_tokens, self._settings(config))
        ids = prompt_ids(self.chat, messages, tools)
        limit = room_in(self.context, len(ids), config.max_new_tokens,
                        "the room that llama.cpp has here (--use adapter has all of the model's)")
        return LlamaStream(self.engine, self.chat, ids, limit, self._settings(config))

    def _settings(self, config: ChatConfig) -> dict[str, Any]:
        seed, self._seed = self._seed, None if self._seed is None else self._seed + 1  # another for each answer
        return sampling(arguments_of(self.own, sampling_of(config)), seed)

    def require_sight(self) -> None:
        if self.projector is None:
            raise UserError("no picture can be shown, because the export has no file that the model sees with (mmproj)",
                            "export-ollama writes it for a model that sees, unless --no-vision was said; or ask the "
                            "adapter: --use adapter")

    def _open_eyes(self) -> None:
        """Load the files anew, with what the model sees with; where that fails, questions without pictures go on."""
        self.require_sight()
        if self._sees:
            return
        assert self.gguf is not None
        self.engine.__exit__(None, None, None)
        try:
            self.engine = Engine(self.gguf, self.context, talking=True, projector=self.projector)
            self._sees = True
        finally:
            if not self._sees:
                self.engine = Engine(self.gguf, self.context, talking=True)

    def batch(self, asked: Sequence[tuple[Any, Any]], config: ChatConfig) -> Iterator[Answer | UserError]:
        return one_after_another(self, asked, config)

    def seed(self, seed: int | None) -> None:
        self._seed = seed

    def close(self) -> None:
        self.engine.__exit__(None, None, None)


def open_gguf(session: Session) -> LlamaVoice:
    """Load the run's GGUF file into llama.cpp.

    Raises:
        UserError, WorkFailed: there is no engine, or it cannot load the file.
    """
    gguf, run = exported(session), session.run
    with_format = run.merged if run.merged.is_dir() else run.adapter
    config = read_config(run.merged) if run.merged.is_dir() else session.model.config
    context = min(CONTEXT, context_length(config) or CONTEXT)
    which = f"{session.model.name}, tuned, {gguf.name} in llama.cpp"
    session.listener.note(f"{which} ({engine_name()}, room for {context:,} tokens)")
    with ThreadPoolExecutor(1) as beside:  # both take seconds
        loading = beside.submit(Engine, gguf, context, talking=True)
        try:
            chat = load_format(with_format, session.model.config["model_type"])
        except BaseException:
            with contextlib.suppress(Exception):
                loading.result().__exit__(None, None, None)
            raise
        try:
            engine = loading.result()
        except WorkFailed as e:
            raise WorkFailed(e.message, f"{command('export-ollama', run.root, '--force')} writes the file anew; or "
                             f"chat without it: --use {without_gguf(session)}") from e
    sees = "projector" in session.manifest.stages["export-ollama"]["outputs"]
    return LlamaVoice(which, context, engine, chat, generation_settings(with_format), gguf=gguf,
                      projector=run.projector if sees else None)
