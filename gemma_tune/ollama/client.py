"""Ollama, for those who use it: find the server, upload a GGUF file, make a model of it, ask it.

REST rather than `ollama create`, because it works for servers on other machines and in containers, answers with
structured errors, and loses no characters (see `go_text.lossy_runes`). The one route that old (0.33) and new
(0.34.1) servers share: a finished GGUF as a blob, then /api/create with `files`; no adapters, no `quantize`, no
`typical_p`. Source: Ollama's `server/create.go` and `server/routes.go`.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import httpx

from gemma_tune.base import shell
from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.ollama.ask import (
    capabilities,
    generate_check,
    picture_answer,
    prompt_tokens,
    rendered_prompt,
    thinking_of,
)
from gemma_tune.ollama.modelfile import merged_parameters, system_text, unix_lines
from gemma_tune.ollama.names import default_model_name, tagged, validate_model_name
from gemma_tune.ollama.server import (
    LOOK_AT_LOG,
    PATIENCE,
    Refused,
    Server,
    check_status,
    check_version,
    client_of,
    find_server,
    json_field,
    ollama_host,
    server_words,
    talking_to,
)
from gemma_tune.ollama.template import OllamaChat

__all__ = [
    "Refused", "Server", "capabilities", "check_version", "create_model", "default_model_name", "find_server",
    "generate_check", "install_hint", "manual_command", "ollama_host", "picture_answer", "prompt_tokens",
    "rendered_prompt", "tagged", "thinking_of", "validate_model_name",
]  # fmt: skip

Progress = Callable[[str, int, int], None]

DOWNLOAD_PAGE = "https://ollama.com/download"
_CHUNK = 1 << 20


def create_model(
    server: Server,
    name: str,
    gguf: Path,
    chat: OllamaChat,
    parameters: Mapping[str, object],
    system: str | None = None,
    license_text: str | None = None,
    on_progress: Progress = lambda status, done, total: None,
    sha256: Mapping[str, str] | None = None,
    again: str | None = None,
    projector: Path | None = None,
) -> None:
    """Uploads the files, unless the server has them, and makes a model of them under this name.

    Args:
        on_progress: gets a status, and bytes done and in all where they are known (else 0, 0).
        sha256: by name of a file, that of its content when it was written, where that is known.
        again: the command that writes them again.
        projector: the file with which the model sees; the server tells by its metadata what it is.

    Raises:
        UserError: a bad name or parameter, no such file, or one whose content has changed since.
        WorkFailed: the server refused, broke off, or ended without saying "success".
    """
    request = {"model": validate_model_name(name), "parameters": merged_parameters(chat, parameters), "stream": True}
    texts = {"template": chat.template, "renderer": chat.renderer, "parser": chat.parser}
    texts |= {"system": system_text(chat, system), "license": unix_lines(license_text or "")}
    request |= {key: text for key, text in texts.items() if text}
    files = {path: _digest(path, on_progress) for path in (gguf, *([projector] if projector else []))}
    for path, (digest, _) in files.items():
        if sha256 and digest != f"sha256:{sha256[path.name]}":
            raise UserError(f"{path} is damaged: its content is another than when it was exported",
                            f"make it again: {again}" if again else None)
    request["files"] = {re.sub(r"[\\:]", "_", path.name): digest for path, (digest, _) in files.items()}
    with client_of(server.url, PATIENCE) as client, talking_to(server.url):
        for path, (digest, size) in files.items():
            if not _has_blob(client, digest):
                _upload(client, path, digest, size, on_progress)
        with client.stream("POST", "/api/create", json=request) as response:
            check_status(response, "make the model")
            _follow(response, on_progress)


def _digest(gguf: Path, on_progress: Progress) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(gguf, "hashing", on_progress):
        digest.update(chunk)
        size += len(chunk)
    return f"sha256:{digest.hexdigest()}", size


def _chunks(gguf: Path, status: str, on_progress: Progress) -> Iterator[bytes]:
    try:
        total = gguf.stat().st_size
        file = gguf.open("rb")
    except OSError as error:
        raise UserError(f"cannot read {gguf}: {error.strerror}") from error
    done = 0
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk
            done += len(chunk)
            on_progress(status, done, total)


def _has_blob(client: httpx.Client, digest: str) -> bool:
    response = client.head(f"/api/blobs/{digest}")
    if response.status_code != 404:
        check_status(response, "look for the model file")
    return response.status_code == 200


def _upload(client: httpx.Client, gguf: Path, digest: str, size: int, on_progress: Progress) -> None:
    length = {"Content-Length": str(size)}  # so that neither side can take a part of the file for the whole
    chunks = _exactly(size, _chunks(gguf, "uploading", on_progress))
    response = client.post(f"/api/blobs/{digest}", content=chunks, headers=length)
    if response.status_code == 400 and "digest mismatch" in response.text:
        raise WorkFailed(
            f"{gguf.name} changed on its way to Ollama: {server_words(response)}",
            "Run the same command again; if it happens twice, check the disk and the network.",
        )
    check_status(response, "store the model file")


def _exactly(size: int, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The chunks, as long as they add up to the length that was announced; httpx fails obscurely otherwise."""
    left = size
    for chunk in chunks:
        left -= len(chunk)
        if left >= 0:
            yield chunk
    if left:
        raise WorkFailed("the model file changed while it was uploaded", "Let nothing else write to it, and try again.")


def _follow(response: httpx.Response, on_progress: Progress) -> None:
    """Reads the statuses. An error comes inside HTTP 200, and only "success" as the last word is success."""
    status = None
    for line in response.iter_lines():
        if not line.strip():
            continue
        if error := json_field(line, "error"):
            raise Refused("make the model", str(error))
        status = json_field(line, "status")
        if not isinstance(status, str):
            raise WorkFailed(f"Ollama answered something that is not a status: {line[:200]!r}", LOOK_AT_LOG)
        done, total = (json_field(line, key) for key in ("completed", "total"))
        on_progress(status, done or 0, total or 0)
    if status != "success":
        after = f" (last: {status})" if status else ""
        raise WorkFailed(f"Ollama stopped before the model was made{after}", LOOK_AT_LOG)


# --- what a person can do -------------------------------------------------------------------------------------------


def manual_command(modelfile: Path, name: str) -> str:
    """The command that makes the model from its Modelfile, to copy into a shell."""
    return shell.join(["ollama", "create", name, "-f", str(modelfile)])


def install_hint(platform: str = sys.platform) -> str:
    """How to get Ollama running on this platform (a value of sys.platform)."""
    ways = {
        "linux": "`curl -fsSL https://ollama.com/install.sh | sh`, then `ollama serve` if it doesn't run as a service",
        "darwin": "the app from the page (or `brew install ollama` and `ollama serve`), then start it once",
        "win32": "OllamaSetup.exe from the page (or `winget install Ollama.Ollama`), then start Ollama once",
    }
    way = ways.get(platform, "pick your system there, then run `ollama serve`")
    return f"Install Ollama from {DOWNLOAD_PAGE}: {way}."
