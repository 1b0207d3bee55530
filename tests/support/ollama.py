"""A stand-in for an Ollama server on 127.0.0.1, for what cannot be had in tests: the real one, old and new.

It stores blobs by their real digest, makes models only from uploaded GGUF files, which become layers by what is in them,
refuses what the real server refuses
(`server/create.go` before and after Ollama's pull request #14969, `server/routes.go`, `types/model/name.go`), streams
NDJSON, and answers a chat with a fixed text, of which `num_predict` may cut words off. It shows the prompt that it would
make where that is asked for, and asks models that can think to do so, as the real one does. A prompt's tokens are counted
by llama.cpp in the file that was uploaded, as each generation counts them: the first ones with llama.cpp's server less
what it had cached. Faults can be switched on by name. Every request is recorded.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from gemma_tune.base.errors import UserError
from gemma_tune.gguf.reader import read_gguf_metadata
from gemma_tune.ollama import go_template
from support.gguf import LlamaCpp

ANSWER = "This is the loopback server's answer."
THOUGHT = "They want to know who I am."
# 0.30.0 counts only what it had not cached (ollama#16414), those before and after it count all.
VERSIONS = {"0.24": "0.24.0", "0.30": "0.30.0", "0.33": "0.33.0", "0.34.1": "0.34.1"}
FAULTS = frozenset(
    {
        "create-error",  # an error inside HTTP 200, after the first status
        "create-cut",  # the stream ends in order, but before "success"
        "create-dropped",  # the connection breaks in the middle of the stream
        "create-garbage",  # a line that is no JSON
        "upload-dropped",  # the connection breaks while the file is uploaded
        "upload-corrupted",  # a byte changes on the way
        "disk-full",
        "foreign-host",  # takes every Host header for a foreign one
        "chat-slow",  # answers no chat until the server is stopped
        "chat-error",
        "chat-error-inside",  # an error inside HTTP 200
        "chat-endless",  # goes on until num_predict
        "chat-empty",
        "chat-marker",  # the first stop is in the answer, which goes on after it
        "chat-new-turn",  # the answer is followed by a turn of Gemma's
        "no-render",  # as servers that do not know _debug_render_only, which answer instead
        "own-tokenizer",  # which is not llama.cpp's, as versions before 0.30 have: a paragraph break is two tokens
        "no-split-vision",  # the own engine of 2025 and early 2026, which loads no model with a projector of its own
        "picture-error",  # text is answered, and a picture ends the runner
        "picture-slow",  # answers about no picture until the server is stopped
        "no-vision-listed",  # as versions that look for an eye in the model's own file
        "no-count",  # an answer without prompt_eval_count, as versions before 0.4 gave to a prompt that they had cached
    }
)
QUANTIZE = (
    "create-time quantization is only supported for safetensors imports; quantize GGUF models with llama.cpp tools "
    "before importing"
)
TYPICAL_P = "typical_p is deprecated and cannot be set as a model parameter; pass it as a request option instead"
INTS = frozenset({"num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu"})


@dataclass
class Recorded:
    """One request: the body of a blob is only counted, any other is parsed."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict = field(default_factory=dict)
    size: int = 0


def plain_prompt(system: str, messages: list[dict]) -> str:
    """Stands in for Ollama's rendering of a model's TEMPLATE."""
    turns = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
    return "".join(f"[{turn['role']}]{turn['content']}" for turn in [*turns, *messages])


def by_template(system: str, messages: list[dict], template: str) -> str:
    """Ollama's rendering of a model's TEMPLATE, by Go's own engine."""
    key = (template, system, json.dumps(messages))
    if key not in _RENDERED:
        [_RENDERED[key]] = go_template.render(template, [messages], system or None)
    return _RENDERED[key]


_RENDERED: dict[tuple[str, str, str], str] = {}


class LoopbackOllama:
    """`with LoopbackOllama("0.33", faults={"create-cut"}) as server:`, then server.url, .models, .requests.

    Args:
        version: what the server says of itself, where it is not its generation's.
        thinks: whether the template in the GGUF files is one that can think, which the server reads off.
        render: makes the prompt of a system text and messages, in the place of the server's templates; `by_template`
            also gets the model's.
    """

    def __init__(self, generation: str = "0.34.1", faults: Iterable[str] = (), *, version: str | None = None,
                 thinks: bool = False, render: Callable[[str, list[dict]], str] = plain_prompt):
        self.version, self.faults = version or VERSIONS[generation], set(faults)
        self.thinks, self.render = thinks, render
        assert self.faults <= FAULTS, self.faults - FAULTS
        self.strict = generation == "0.34.1"
        self.generation = generation
        self._engines: dict[str, LlamaCpp] = {}
        self._cached: list[int] = []  # ids of the prompt before
        self.models: dict[str, dict] = {}  # what /api/create was given, by full name (with its tag)
        self.layers: dict[str, dict[str, str]] = {}  # of each model: "model" and perhaps "projector" → digest
        self.requests: list[Recorded] = []
        self.stopped = threading.Event()

    def __enter__(self) -> LoopbackOllama:
        self._folder = tempfile.TemporaryDirectory()
        self.blobs = Path(self._folder.name)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"ollama": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    def paths(self) -> list[str]:
        """`METHOD /path` of each request, with digests shortened."""
        return [f"{r.method} {re.sub('sha256:.*', 'sha256:…', r.path)}" for r in self.requests]

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def prompt(self, model: dict, messages: list[dict]) -> str:
        more = (model["template"],) if self.render is by_template else ()
        return self.render(model.get("system", ""), messages, *more)

    def counted(self, model: dict, prompt: str) -> dict[str, int]:
        """What an answer says of the number of a prompt's tokens."""
        if "no-count" in self.faults:
            return {}
        digest = self.layers[_full_name(model["model"])]["model"]
        with open(self.blob(digest), "rb") as file:
            stands_for_a_file = b"tokenizer.ggml" not in file.read(1 << 20)
        if stands_for_a_file:
            return {"prompt_eval_count": len(prompt.split())}
        if digest not in self._engines:
            self._engines[digest] = LlamaCpp(self.blob(digest))
        ids = self._engines[digest].tokenize(prompt, special=True)
        same = next((n for n, (a, b) in enumerate(zip(ids, self._cached)) if a != b), min(len(ids), len(self._cached)))
        cached, self._cached = min(same, len(ids) - 1), ids  # the last token is always computed
        if self.generation == "0.30":
            return {"prompt_eval_count": len(ids) - cached}
        count = len(ids) + ("own-tokenizer" in self.faults) * prompt.count("\n\n")
        return {"prompt_eval_count": count} | ({"prompt_eval_cached_count": cached} if self.generation == "0.34.1" else {})


class _Refusal(Exception):
    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the acknowledgement of its own headers
    ollama: LoopbackOllama

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_GET

    def _serve(self) -> None:
        size = int(self.headers["Content-Length"] or 0)
        self.record = Recorded(self.command, self.path, dict(self.headers), size=size)
        self.ollama.requests.append(self.record)
        if self._foreign_host():
            return self._send(403, b"")
        try:
            if self.path.startswith("/api/blobs/"):
                return self._blob(self.path.removeprefix("/api/blobs/"))
            body = self.rfile.read(self.record.size)
            self.record.body = json.loads(body) if body else {}
            route = getattr(self, f"_{self.command}_{self.path.strip('/').replace('/', '_')}".lower(), None)
            route() if route else self._send(404, b"404 page not found")
        except _Refusal as refusal:
            self._json({"error": str(refusal)}, refusal.status)

    def _send(self, status: int, body: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def _json(self, value: dict, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json; charset=utf-8")

    def _drop(self) -> None:
        """Closes the connection in the middle of things."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _foreign_host(self) -> bool:
        host = re.sub(r":\d+$", "", self.headers["Host"] or "").strip("[]").lower()
        try:
            ip = ipaddress.ip_address(host)
            known = ip.is_loopback or ip.is_private or ip.is_unspecified
        except ValueError:
            known = host in ("", "localhost") or host.endswith((".localhost", ".local", ".internal"))
        return not known or "foreign-host" in self.ollama.faults

    # --- blobs

    def _blob(self, digest: str) -> None:
        if not re.fullmatch(r"sha256[:-][0-9a-fA-F]{64}", digest):
            raise _Refusal(400, "invalid digest format")
        path = self.ollama.blob(digest)
        if self.command == "HEAD":
            return self._send(200 if path.exists() else 404, b"")
        if "upload-dropped" in self.ollama.faults:
            self.rfile.read(min(self.record.size, 1000))
            return self._drop()
        content = self.rfile.read(self.record.size)
        if "upload-corrupted" in self.ollama.faults:
            content = bytes([content[0] ^ 1]) + content[1:]
        if "disk-full" in self.ollama.faults:
            raise _Refusal(500, f"write /models/blobs/{path.name}-partial: no space left on device")
        if path.exists():
            return self._send(200, b"")
        got = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if got != digest:
            raise _Refusal(400, f'digest mismatch, expected "{digest}", got "{got}"')
        path.write_bytes(content)
        self._send(201, b"")

    # --- create

    def _post_api_create(self) -> None:
        request = self.record.body
        _check_request(request, self.ollama.strict)
        lines = self._make(request)
        first = next(lines)  # what goes wrong before the first status still has its own HTTP status
        self._stream(first, lines)

    def _stream(self, first: str, lines: Iterable[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._line(first)
        try:
            for line in lines:
                self._line(line)
        except _Refusal as refusal:
            self._line(json.dumps({"error": str(refusal)}))
        if "create-dropped" in self.ollama.faults:
            return self._drop()
        self.wfile.write(b"0\r\n\r\n")

    def _line(self, text: str) -> None:
        data = text.encode() + b"\n"
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _make(self, request: dict) -> Iterator[str]:
        files, faults = request.get("files"), self.ollama.faults
        if not files and not request.get("from"):
            raise _Refusal(400, "neither 'from' or 'files' was specified")
        layers: dict[str, str] = {}
        for name, digest in sorted((files or {}).items()):
            yield from self._read_gguf(name, digest)
            layers[self._kind(digest)] = digest  # of two of a kind the last one counts
        if "create-error" in faults:
            raise _Refusal(500, "unknown model architecture: 'gemma9'")
        if "create-garbage" in faults:
            yield "<html>bad gateway</html>"
        if request.get("quantize"):
            yield json.dumps({"status": f"quantizing F16 model to {request['quantize']}"})
        yield json.dumps({"status": "writing manifest"})
        if not faults & {"create-cut", "create-dropped"}:
            self.ollama.models[_full_name(request["model"])] = request
            self.ollama.layers[_full_name(request["model"])] = layers
            yield json.dumps({"status": "success"})

    def _read_gguf(self, name: str, digest: str) -> Iterator[str]:
        blob = self.ollama.blob(digest)
        if not name.endswith(".gguf") and blob.exists() and blob.read_bytes()[:4] != b"GGUF":
            raise _Refusal(400, "unknown type")
        if not name.endswith(".gguf") and not blob.exists():
            raise _Refusal(400, f"blob not found for {name} (digest {digest})")
        yield json.dumps({"status": "parsing GGUF"})
        if not blob.exists():
            raise _Refusal(500, f"open /models/blobs/{blob.name}: no such file or directory")
        header = blob.read_bytes()[:24]
        if header[:4] != b"GGUF" or len(header) < 24 or header[4] not in (2, 3):
            raise _Refusal(500, "invalid file magic")

    def _kind(self, digest: str) -> str:
        """The layer that a GGUF file becomes."""
        found = _metadata(self.ollama.blob(digest))
        arch, kind = found.get("general.architecture"), found.get("general.type")
        alone = not found.get(f"{arch}.block_count")
        known = kind == "projector" or alone and found.get(f"{arch}.vision.block_count", 0) > 0
        if self.ollama.strict:  # since Ollama's pull request #16472
            known = known or kind == "mmproj" or alone and arch == "clip" and any(
                found.get(f"clip.has_{sense}_encoder") for sense in ("vision", "audio"))
        return "projector" if known else "model"

    # --- the rest

    def _get_(self) -> None:
        self._send(200, b"Ollama is running")

    def _get_api_version(self) -> None:
        self._json({"version": self.ollama.version})

    def _get_api_tags(self) -> None:
        self._json({"models": [{"name": name, "model": name} for name in self.ollama.models]})

    def _model(self) -> dict:
        name = self.record.body.get("model", "")
        if (model := self.ollama.models.get(_full_name(name))) is None:
            raise _Refusal(404, f"model '{name}' not found")
        return model

    def _post_api_show(self) -> None:
        model = self._model()
        parameters = [
            f"{name:<30} {json.dumps(single)}"
            for name, value in model.get("parameters", {}).items()
            for single in (value if isinstance(value, list) else [value])
        ]
        texts = {key: model[key] for key in ("template", "system", "license", "renderer", "parser") if key in model}
        self._json(texts | {"parameters": "\n".join(parameters), "capabilities": self._capabilities(model)})

    def _capabilities(self, model: dict) -> list[str]:
        thinks = self.ollama.thinks if "parser" not in model else model["parser"] == "gemma4"
        tools = "parser" in model or ".Tools" in model.get("template", "")
        sees = "projector" in self._layers(model) and "no-vision-listed" not in self.ollama.faults
        return ["completion", *(["tools"] if tools else []), *(["vision"] if sees else []), *(["thinking"] if thinks else [])]

    def _layers(self, model: dict) -> dict[str, str]:
        return self.ollama.layers.get(_full_name(model.get("model", "")), {})  # a model can be put there by hand

    def _check_pictures(self, model: dict, messages: list[dict]) -> None:
        """What goes wrong when a model is loaded, and when it is given pictures."""
        layers, faults = self._layers(model), self.ollama.faults
        blob = self.ollama.blob(layers.get("model", "none"))
        if _metadata(blob).get("general.architecture") == "clip" or "projector" in layers and "no-split-vision" in faults:
            raise _Refusal(500, f"unable to load model: {blob}")
        for picture in (picture for turn in messages for picture in turn.get("images", ())):
            if not base64.b64decode(picture, validate=True).startswith(b"\x89PNG"):
                raise _Refusal(400, "invalid image data")
            if "projector" not in layers:
                raise _Refusal(500, "this model is missing data required for image input")
            if "picture-slow" in faults:
                self.ollama.stopped.wait(30)
            if "picture-error" in faults:
                raise _Refusal(500, "model runner has unexpectedly stopped")

    def _post_api_chat(self) -> None:
        model = self._model()
        for name, value in model.get("parameters", {}).items():
            if name in INTS and not isinstance(value, int):  # only found out when the model is loaded
                raise _Refusal(400, f'option "{name}" must be of type integer')
        if "chat-error" in self.ollama.faults:
            raise _Refusal(500, "llama runner process has terminated: exit status 2")
        if "chat-slow" in self.ollama.faults:
            self.ollama.stopped.wait(30)
        asked, options = self.record.body, self.record.body.get("options", {})
        can_think = "thinking" in self._capabilities(model)
        if asked.get("tools") and "tools" not in self._capabilities(model):
            raise _Refusal(400, f"registry.ollama.ai/library/{asked['model']} does not support tools")
        if asked.get("think") and not can_think:
            raise _Refusal(400, f'"{asked["model"]}" does not support thinking')
        self._check_pictures(model, asked["messages"])
        if "chat-error-inside" in self.ollama.faults:
            return self._json({"error": "an error was encountered while running the model"})
        prompt = self.ollama.prompt(model, asked["messages"])
        if asked.get("_debug_render_only") and "no-render" not in self.ollama.faults:
            return self._json({"model": asked["model"], "_debug_info": {"rendered_template": prompt}})
        thought = THOUGHT if asked.get("think", can_think) else ""
        answer, ended = self._answer(model, thought, options.get("num_predict", -1))
        message = {"role": "assistant", "content": answer} | ({"thinking": thought} if thought else {})
        counts = {**self.ollama.counted(model, prompt), "eval_count": len(answer.split()),
                  "total_duration": 1_500_000_000, "load_duration": 250_000_000}
        last = {"done": True, "done_reason": "stop" if ended else "length"} | counts
        if asked.get("stream", True):
            return self._in_words(asked["model"], thought, answer, last)
        self._json({"model": asked["model"], "message": message} | last)

    def _in_words(self, model: str, thought: str, answer: str, last: dict) -> None:
        """Thought and answer as a stream, word by word, and an empty message with the counts."""
        def part(content: str, thinking: str = "", **more: Any) -> str:
            message = {"role": "assistant", "content": content} | ({"thinking": thinking} if thinking else {})
            return json.dumps({"model": model, "message": message, "done": False} | more)

        thoughts, words = (re.findall(r"\s*\S+|\s+$", text) for text in (thought, answer))
        first, *rest = [*(part("", word) for word in thoughts), *map(part, words)]
        self._stream(first, (*rest, part("", **last)))

    def _answer(self, model: dict, thought: str, num_predict: int) -> tuple[str, bool]:
        """What is left of the answer after so many words, thoughts included, and whether it is all."""
        faults, answer = self.ollama.faults, ANSWER
        if "chat-empty" in faults:
            answer = "\n"
        if "chat-marker" in faults:
            answer += f"{model['parameters']['stop'][0]}\nAnd on it goes."
        if "chat-new-turn" in faults:
            answer += "\n<start_of_turn>user\nAnd you?"
        if "chat-endless" in faults:
            answer = " ".join([ANSWER] * 1000)
        room = len(answer.split()) if num_predict < 0 else max(0, num_predict - len(thought.split()))
        cut = len(answer.split()) > room
        return (" ".join(answer.split()[:room]), False) if cut else (answer, True)


def _metadata(blob: Path) -> dict[str, Any]:
    """Of a GGUF file; nothing of what stands for one."""
    try:
        return read_gguf_metadata(blob)
    except UserError:
        return {}


def _full_name(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def _check_request(request: dict, strict: bool) -> None:
    """What is refused before any work starts, in the server's order."""
    parameters, files = request.get("parameters") or {}, request.get("files") or {}
    if strict and parameters.get("typical_p") is not None:
        raise _Refusal(400, TYPICAL_P)
    if strict and len(files) > 1024:
        raise _Refusal(400, f"too many files: {len(files)} exceeds maximum 1024")
    for name, digest in files.items():
        if not _relative(name) or (strict and re.search(r"[\\:]", name)):
            raise _Refusal(400, f"file path must be relative: {name}" if strict else "file path must be relative")
        if not re.fullmatch(r"sha256[:-][0-9a-fA-F]{64}", digest):
            raise _Refusal(400, "invalid digest format")
    if strict and request.get("adapters"):
        raise _Refusal(400, "LoRA adapters are no longer supported")
    if not _valid_name(request.get("model", "")):
        raise _Refusal(400, "invalid model name")
    if strict and request.get("quantize") and files:
        raise _Refusal(400, QUANTIZE)


def _relative(path: str) -> bool:
    return bool(path) and all(part not in ("", ".", "..") for part in path.split("/"))


def _valid_name(name: str) -> bool:
    """`types/model/name.go`: cut the tag, then model, namespace and host from the right."""
    rest, tag = name, "latest"
    if name.rfind(":") > name.rfind("/"):
        rest, _, tag = name.rpartition(":")
    parts = rest.split("://")[-1].rsplit("/", 2)
    start, more = "[A-Za-z0-9_]", "[A-Za-z0-9_.-]"
    rules = [rf"{start}{more}{{0,79}}", rf"{start}[A-Za-z0-9_-]{{0,79}}", rf"{start}[A-Za-z0-9_.:-]{{0,349}}"]
    fits = [re.fullmatch(rule, part) for rule, part in zip(rules, reversed(parts), strict=False)]
    return all(fits) and bool(re.fullmatch(rules[0], tag))
