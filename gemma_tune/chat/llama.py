"""The exported GGUF file, which llama.cpp runs: on a CPU the fastest way to an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from gemma_tune.answers.generation import Answer, prompt_ids, room_in
from gemma_tune.answers.sampling import arguments_of
from gemma_tune.answers.stream import Pieces, Streaming
from gemma_tune.base.checkpoint import context_length, generation_settings, read_config
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.chat.choice import exported, without_gguf
from gemma_tune.chat.voice import one_after_another, sampling_of
from gemma_tune.config.stages import ChatConfig
from gemma_tune.encoding.chat_format import ChatFormat
from gemma_tune.encoding.tokenizer import load_format
from gemma_tune.gguf.engine import Engine, engine_name
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


class LlamaStream(Streaming):
    """An answer of llama.cpp to a prompt of token ids."""

    def __init__(self, engine: Engine, chat: ChatFormat, ids: list[int], limit: int, settings: dict[str, Any]):
        self._engine, self._ids, self._limit, self._settings = engine, ids, limit, settings
        self._tokens = 0
        super().__init__(Pieces(chat), len(ids))

    def answer(self) -> Answer:
        return Answer(self._pieces.text, self._tokens, self._pieces.ended)

    def _make(self) -> None:
        with contextlib.closing(self._engine.stream(self._ids, self._limit, **self._settings)) as parts:
            for text, self._tokens, self._pieces.ended in parts:
                if text:
                    self._pieces.say(text)
                if self.stopping.is_set():
                    break


@dataclass
class LlamaVoice:
    """See :class:`gemma_tune.chat.voice.Voice`."""

    which: str
    context: int
    engine: Engine
    chat: ChatFormat
    own: dict[str, Any]  # the model's generation settings
    name: str = "gguf"
    _seed: int | None = None

    def ask(self, messages: Any, config: ChatConfig, tools: Any = None) -> LlamaStream:
        ids = prompt_ids(self.chat, messages, tools)
        limit = room_in(self.context, len(ids), config.max_new_tokens,
                        "the room that llama.cpp has here (--use adapter has all of the model's)")
        seed, self._seed = self._seed, None if self._seed is None else self._seed + 1  # another for each answer
        return LlamaStream(self.engine, self.chat, ids, limit,
                           sampling(arguments_of(self.own, sampling_of(config)), seed))

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
    return LlamaVoice(which, context, engine, chat, generation_settings(with_format))
