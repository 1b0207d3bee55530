"""Real llama.cpp on a GGUF file: the engine under Ollama, LM Studio and Jan, asked over its own HTTP interface.

It comes from the ``xllamacpp`` wheel, or is a ``llama-server`` on the PATH. Either runs in a process of its own:
llama.cpp aborts on some damaged files, and writes to the terminal from C++.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.loading import loading
from gemma_tune.base.pictures import as_text
from gemma_tune.gguf.llama_cpp import (
    INSTALL_HINT,
    apart,
    child_command,
    engine_words,
    find_engine,
    same_file,
    server_command,
)

_LIKELIEST = 10  # tokens whose log-probabilities are asked for
_processes: weakref.WeakSet[subprocess.Popen[bytes]] = weakref.WeakSet()
_starting = threading.Lock()
_over = threading.Event()  # this process ends


class EngineRefused(WorkFailed):
    """The engine works, and refuses this request: a conversation that its template engine cannot render."""


@dataclass(frozen=True)
class Completion:
    """Token ids of an answer without what ended it; ``ended`` says that the model ended it itself."""

    ids: tuple[int, ...]
    ended: bool


class Engine:
    """A GGUF file loaded into llama.cpp, on the CPU; a context manager.

    Args:
        gguf: the file.
        context: tokens of the longest prompt with its answer.
        talking: to be asked turn after turn by a person: what it read before is kept, also where a conversation is
            taken back, and Ctrl-C on the terminal, which goes to every process there, does not end it.
        projector: the file with which the model sees, as :meth:`look` needs it.

    Raises:
        UserError: llama.cpp is not installed.
        WorkFailed: it cannot load the file, or ends while it is asked something; the message has its own words.
    """

    @loading("the model into llama.cpp")
    def __init__(self, gguf: Path, context: int, *, talking: bool = False, projector: Path | None = None):
        engine = find_engine()
        if engine is None:
            raise UserError("no llama.cpp engine is installed", INSTALL_HINT)
        kind, _, server = engine.partition(" ")
        binary = kind == "llama-server"
        make = functools.partial(server_command, server) if binary else child_command
        command = make(gguf, context, talking, projector)
        self.gguf, self._log = gguf, tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        # Backtraces start a debugger where there is one, which takes long and tells people nothing.
        with _starting:
            if _over.is_set():
                raise WorkFailed("this command ends, and no engine is started any more")
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self._log,
                                             stdout=self._log if binary else subprocess.PIPE,
                                             env=os.environ | {"GGML_NO_BACKTRACE": "1"}, **apart(talking))
            _processes.add(self._process)
        try:
            address = self._answering(command[-1]) if binary else self._printed()
            # Without trust_env a proxy of the environment would be asked for this machine's own addresses.
            self._client = httpx.Client(base_url=address, timeout=None, trust_env=False)  # noqa: S113 - may take long
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()
        self._end()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            add_special: put BOS in front where the GGUF asks for it.
            parse_special: read ``<start_of_turn>`` and its kind as tokens and not as text.
        """
        return self._post("/tokenize", content=text, add_special=add_special, parse_special=parse_special)["tokens"]

    def apply_template(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """The conversation as the GGUF's chat template renders it, up to where the answer begins, less its BOS.

        Raises:
            EngineRefused: the template cannot render it.
        """
        return self._post("/apply-template", messages=list(messages), **({"tools": list(tools)} if tools else {}))[
            "prompt"]

    def complete(self, ids: Sequence[int], count: int) -> Completion:
        """The greedy answer of up to ``count`` tokens to a prompt of token ids."""
        return self._completed(list(ids), count)

    def complete_seen(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes], count: int) -> Completion:
        """The greedy answer of up to ``count`` tokens to a conversation with pictures, laid out by the GGUF's template.

        Args:
            messages: of turns with pictures the contents are parts, with ``{"type": "image"}`` in each picture's place.
            pictures: PNG or JPEG files, in order.

        Raises:
            EngineRefused: the model has no projector, or cannot take these pictures or turns.
        """
        return self._completed({"prompt_string": self.apply_template(_with_pictures(messages, pictures)),
                                "multimodal_data": [*map(as_text, pictures)]}, count)

    def _completed(self, prompt: list[int] | dict[str, Any], count: int) -> Completion:
        reply = self._post("/completion", prompt=prompt, n_predict=count, temperature=0, top_k=1, repeat_penalty=1,
                           return_tokens=True, cache_prompt=False)
        ended = reply["stop_type"] == "eos"
        return Completion(tuple(reply["tokens"][:-1] if ended else reply["tokens"]), ended)

    def look(self, picture: bytes, question: str) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens that an answer to a question about a picture can begin with.

        Args:
            picture: a PNG or JPEG file.

        Raises:
            EngineRefused: the model has no projector, or cannot take this picture.
            WorkFailed: llama.cpp breaks down.
        """
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        asked = _with_pictures([{"role": "user", "content": parts}], [picture])
        # Of a token that is a part of a character llama.cpp tells none, so another one is made to come; the
        # probabilities are those of before.
        plain = self.tokenize(question, add_special=False, parse_special=False)[-1]
        reply = self._post("/v1/chat/completions", messages=asked, max_tokens=1, temperature=0, logprobs=True,
                           top_logprobs=_LIKELIEST, cache_prompt=False, logit_bias=[[plain, 1000]])
        told = (reply["choices"][0].get("logprobs") or {}).get("content")
        if not told:
            raise EngineRefused("llama.cpp begins no answer about the picture")
        # JSON has no infinity.
        return {token["id"]: -math.inf if token["logprob"] is None else token["logprob"]
                for token in told[0]["top_logprobs"]}

    def stream(self, ids: Sequence[int], count: int, **sampling: Any) -> Iterator[tuple[str, int, bool]]:
        """An answer of up to ``count`` tokens to a prompt of token ids, as it is made; closing it ends the answer.

        Args:
            sampling: llama.cpp's own names and values.

        Yields:
            the next piece of text, the tokens of the answer so far, and whether the model has ended it. Text and not
            ids: of a character of several tokens llama.cpp sends the last one's id alone.

        Raises:
            EngineRefused: llama.cpp refuses the request.
            WorkFailed: it breaks down.
        """
        made = 0
        for part in self._parts("/completion", prompt=list(ids), n_predict=count, **sampling):
            ended = bool(part.get("stop")) and part.get("stop_type") == "eos"
            made = part.get("tokens_predicted", made + 1) - ended
            yield part.get("content") or "", made, ended
            if part.get("stop"):
                return
        raise self._failed("llama.cpp ended its answer before it was whole")

    def talk(self, messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes], count: int, **sampling: Any
             ) -> Iterator[tuple[str, int, bool, int]]:
        """The same to a conversation that the GGUF's own chat template renders, as :meth:`stream` cannot be given
        pictures.

        Args:
            messages, pictures: as of :meth:`complete_seen`.

        Yields:
            as :meth:`stream`, and the tokens of the prompt.
        """
        made = read = 0
        body = {"messages": _with_pictures(messages, pictures), "max_tokens": count,
                "timings_per_token": True, "reasoning_format": "none"}
        for part in self._parts("/v1/chat/completions", **body, **sampling):
            timings, choice = part.get("timings") or {}, (part.get("choices") or [{}])[0]
            made = timings.get("predicted_n", made)
            read = timings.get("prompt_n", 0) + timings.get("cache_n", 0) or read
            reason = choice.get("finish_reason")
            ended = reason == "stop"
            yield (choice.get("delta") or {}).get("content") or "", max(0, made - ended), ended, read
            if reason:
                return
        raise self._failed("llama.cpp ended its answer before it was whole")

    def _parts(self, endpoint: str, **body: Any) -> Iterator[dict[str, Any]]:
        """The parts of an answer as they come."""
        try:
            with self._client.stream("POST", endpoint, json=body | {"stream": True, "cache_prompt": True}) as reply:
                if reply.is_error:
                    reply.read()
                    raise _refused(reply.json(), reply.status_code)
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        part = json.loads(line.removeprefix("data: "))
                        if "error" in part:
                            raise _refused(part, 500)
                        yield part
                    elif line.startswith("error: {"):
                        raise _refused({"error": json.loads(line.removeprefix("error: "))}, 500)
        except (httpx.HTTPError, ValueError) as e:
            raise self._failed(f"llama.cpp broke down at {endpoint}") from e

    def _post(self, endpoint: str, **body: Any) -> dict[str, Any]:
        try:
            reply = self._client.post(endpoint, json=body)
            content = reply.json()
        except (httpx.HTTPError, ValueError) as e:
            raise self._failed(f"llama.cpp broke down at {endpoint}") from e
        if reply.is_error:
            raise _refused(content, reply.status_code)
        return content

    def _printed(self) -> str:
        """The address that the child process prints when the file is loaded."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)["address"]
        raise self._failed(f"llama.cpp cannot load {self.gguf}")

    def _answering(self, port: str) -> str:
        """The address of a ``llama-server``, once the file is loaded."""
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, trust_env=False) as client:
            while self._process.poll() is None:
                with contextlib.suppress(httpx.HTTPError):
                    # Another program may have taken the port: then this server ends, and the model is another one.
                    if client.get("/health").is_success and same_file(client.get("/props").json(), self.gguf):
                        return address
                time.sleep(0.1)
        raise self._failed(f"llama.cpp cannot load {self.gguf}")

    def _failed(self, what: str) -> WorkFailed:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)  # its last words are in the log when it has ended
        code = self._process.poll()
        self._log.seek(0)
        words = engine_words(self._log.read().decode(errors="replace"))
        ended = f"it ended with code {code}" if code is not None else ""
        return WorkFailed("; ".join(part for part in (what, words or ended) if part),
                          "run the same command again with --force to write the file anew; if it stays like this, "
                          "--no-verify leaves the check out")

    def _end(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # a process that has ended
            self._process.stdin.close()
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()


def end_all() -> None:
    """End the processes of all engines, those that load a file too, before this process ends without a word."""
    with _starting:
        _over.set()
        for process in _processes:
            process.kill()


def _with_pictures(messages: Sequence[Mapping[str, Any]], pictures: Sequence[bytes]) -> list[Mapping[str, Any]]:
    """Turns as llama.cpp takes them, with the pictures in their places."""
    files = map(as_text, pictures)

    def shown(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return part if part["type"] != "image" else {"type": "image_url", "image_url": {
            "url": f"data:image/png;base64,{next(files)}"}}

    return [turn if isinstance(turn["content"], str) else {**turn, "content": [*map(shown, turn["content"])]}
            for turn in messages]


def _refused(content: Any, status: int) -> EngineRefused:
    error = content.get("error", {}) if isinstance(content, dict) else {}
    if error.get("type") == "exceed_context_size_error":
        return EngineRefused(f"the conversation has {error['n_prompt_tokens']:,} tokens, and llama.cpp has room for "
                             f"{error['n_ctx']:,} here", "shorten it, or show fewer or smaller pictures")
    return EngineRefused(f"llama.cpp refuses it: {error.get('message') or status}")
