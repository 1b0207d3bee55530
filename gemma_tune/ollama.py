"""A small client for Ollama's REST interface: find the server, upload a GGUF file, make a model of it, ask it.

REST rather than `ollama create`, because it works for servers on other machines and in containers, answers with
structured errors, and loses no characters (see `modelfile.lossy_runes`). The one route that old (0.33) and new (0.34.1)
servers share: a finished GGUF as a blob, then /api/create with `files`; no adapters, no `quantize`, no `typical_p`.

Sources: Ollama's `envconfig/config.go` (OLLAMA_HOST), `types/model/name.go` and `internal/modelref` (names),
`server/create.go` and `server/routes.go` (blobs, create, the check of the Host header).
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import json
import re
import shlex
import ssl
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from gemma_tune.errors import UserError, WorkFailed
from gemma_tune.modelfile import OllamaChat, merged_parameters, system_text, unix_lines

Progress = Callable[[str, int, int], None]

DOWNLOAD_PAGE = "https://ollama.com/download"
_CHUNK = 1 << 20
_PATIENCE = 600.0  # seconds without a byte: a slow disk may take minutes to hash or copy a large model


# --- where the server is --------------------------------------------------------------------------------------------


def ollama_host(env: Mapping[str, str]) -> str:
    """The base URL that Ollama's own client would use with this environment.

    A bare host gets port 11434, `http://` 80, `https://` 443; what is no port gives way to the default; a path stays;
    an address that means "listen everywhere" (0.0.0.0, ::, or none before the port) means this machine.

    Raises:
        UserError: OLLAMA_HOST is no address.
    """
    value = env.get("OLLAMA_HOST", "").strip().strip("\"'").strip()
    scheme, separator, rest = value.partition("://")
    if not separator:
        scheme, rest = ("https", "ollama.com:443") if value == "ollama.com" else ("http", value)
    default_port = {"http": "80", "https": "443"}.get(scheme) if separator else "11434"
    if default_port is None:
        raise UserError(f"OLLAMA_HOST={value}: {scheme} is not http or https")
    address, _, path = rest.partition("/")
    host, port = _split_address(address, default_port)
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host):
        raise UserError(f"OLLAMA_HOST={value} is not an address", "For example: OLLAMA_HOST=127.0.0.1:11434")
    return f"{scheme}://{host}:{port}" + (f"/{path.rstrip('/')}" if path.strip("/") else "")


def _split_address(address: str, default_port: str) -> tuple[str, str]:
    host, port = address.strip("[]"), default_port
    if match := re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*):([^:\[\]]*)", address):
        host, port = match[1].strip("[]"), match[2]
    if not re.fullmatch(r"[+-]?[0-9]+", port) or not 0 <= int(port) <= 65535:
        port = default_port
    return _connectable(host or "127.0.0.1"), str(int(port))


def _connectable(host: str) -> str:
    """The host as it stands in a URL. One that means "listen everywhere" cannot be connected to on Windows."""
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_unspecified:
        return "127.0.0.1" if ip.version == 4 else "[::1]"
    return str(ip) if ip.version == 4 else f"[{ip}]"


@dataclass(frozen=True)
class Server:
    """A running Ollama.

    Args:
        url: its base URL, without a slash at the end.
        version: what it says of itself, such as "0.34.1".
    """

    url: str
    version: str


def find_server(url: str, timeout: float = 3.0) -> Server | None:
    """The Ollama at this URL; None if nothing answers there (refused, unknown host, or no answer in time).

    Raises:
        UserError: something answers that isn't Ollama, or it refuses this client.
    """
    url = url.rstrip("/")
    try:
        with _client(url, timeout) as client:
            response = client.get("/api/version")
    except httpx.RequestError as error:
        if isinstance(error, httpx.ConnectError | httpx.TimeoutException) and not _is_tls(error):
            return None
        raise UserError(f"what listens at {url} is not Ollama ({error})", _WRONG_ADDRESS) from error
    if response.status_code == 403 and not response.content:
        raise UserError(f"Ollama at {url} refuses the host name in this URL", _FOREIGN_HOST)
    version = _json_field(response.content, "version") if response.status_code == 200 else None
    if not isinstance(version, str):
        raise UserError(
            f"what listens at {url} is not Ollama (/api/version answers {response.status_code}, without a version)",
            _WRONG_ADDRESS,
        )
    return Server(url, version)


_WRONG_ADDRESS = "Set OLLAMA_HOST to the address of Ollama, or unset it for http://127.0.0.1:11434."
_FOREIGN_HOST = (
    "A server that listens on loopback only takes requests to localhost or an IP address (it checks the Host header). "
    "Set OLLAMA_HOST to such an address here, or let the server listen on the network: OLLAMA_HOST=0.0.0.0 there, and "
    "OLLAMA_ORIGINS for a proxy or browser in between."
)


def _is_tls(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _client(url: str, timeout: float) -> httpx.Client:
    """Like Ollama's own client, no proxy for this machine, whatever HTTP_PROXY says."""
    host = httpx.URL(url).host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    return httpx.Client(base_url=url, timeout=limits, trust_env=not loopback, verify=_certificates())


_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes longer than most requests


# --- names ----------------------------------------------------------------------------------------------------------

_NAME_RULE = (
    "A name is [host/][namespace/]model[:tag]; each part has 1 to 80 characters, starts with a letter, a digit or _, "
    "and goes on with those, - and . (no . in a namespace)."
)
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}"
_HOST, _NAMESPACE = r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}"
_NAME = re.compile(rf"(({_HOST}/)?{_NAMESPACE}/)?{_PART}(:(?P<tag>{_PART}))?")


def validate_model_name(name: str) -> str:
    """The name, if Ollama takes it.

    Raises:
        UserError: it doesn't, or would send the questions to another place (`:cloud`) or another model (`:local`).
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(f"{name!r} is not a name for an Ollama model", _NAME_RULE)
    tag = (match["tag"] or "").lower()
    if tag in ("cloud", "local") or tag.endswith("-cloud"):
        raise UserError(
            f"{name!r}: Ollama reads the tag {tag!r} as the place where a model runs", "Use another tag, or none."
        )
    return name


def default_model_name(model_name: str) -> str:
    """`<model_name>-tuned` in lower case, with what Ollama doesn't take replaced by a hyphen."""
    stem = re.sub(r"[^a-z0-9_.-]+", "-", model_name.rsplit("/", 1)[-1].lower())
    stem = stem.lstrip("-.")[: 80 - len("-tuned")].rstrip("-.")
    return f"{stem or 'model'}-tuned"


# --- making a model -------------------------------------------------------------------------------------------------


def create_model(
    server: Server,
    name: str,
    gguf: Path,
    chat: OllamaChat,
    parameters: Mapping[str, object],
    system: str | None = None,
    license_text: str | None = None,
    on_progress: Progress = lambda status, done, total: None,
) -> None:
    """Uploads the file, unless the server has it, and makes a model of it under this name.

    Args:
        on_progress: gets a status, and bytes done and in all where they are known (else 0, 0).

    Raises:
        UserError: a bad name or parameter, or no such file.
        WorkFailed: the server refused, broke off, or ended without saying "success".
    """
    request = {"model": validate_model_name(name), "parameters": merged_parameters(chat, parameters), "stream": True}
    texts = {"template": chat.template, "renderer": chat.renderer, "parser": chat.parser}
    texts |= {"system": system_text(chat, system), "license": unix_lines(license_text or "")}
    request |= {key: text for key, text in texts.items() if text}
    digest, size = _digest(gguf, on_progress)
    request["files"] = {re.sub(r"[\\:]", "_", gguf.name): digest}
    with _client(server.url, _PATIENCE) as client, _talking_to(server.url):
        if not _has_blob(client, digest):
            _upload(client, gguf, digest, size, on_progress)
        with client.stream("POST", "/api/create", json=request) as response:
            _check_status(response, "make the model")
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
        _check_status(response, "look for the model file")
    return response.status_code == 200


def _upload(client: httpx.Client, gguf: Path, digest: str, size: int, on_progress: Progress) -> None:
    length = {"Content-Length": str(size)}  # so that neither side can take a part of the file for the whole
    chunks = _exactly(size, _chunks(gguf, "uploading", on_progress))
    response = client.post(f"/api/blobs/{digest}", content=chunks, headers=length)
    if response.status_code == 400 and "digest mismatch" in response.text:
        raise WorkFailed(
            f"{gguf.name} changed on its way to Ollama: {_server_words(response)}",
            "Run the same command again; if it happens twice, check the disk and the network.",
        )
    _check_status(response, "store the model file")


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
        if error := _json_field(line, "error"):
            raise _refused("make the model", str(error))
        status = _json_field(line, "status")
        if not isinstance(status, str):
            raise WorkFailed(f"Ollama answered something that is not a status: {line[:200]!r}")
        done, total = (_json_field(line, key) for key in ("completed", "total"))
        on_progress(status, done or 0, total or 0)
    if status != "success":
        after = f" (last: {status})" if status else ""
        raise WorkFailed(f"Ollama stopped before the model was made{after}", _LOOK_AT_LOG)


# --- asking the model -----------------------------------------------------------------------------------------------


def generate_check(server: Server, name: str, messages: Sequence[Mapping[str, str]], timeout: float) -> dict:
    """One answer of the model, to see that it loads and stops.

    Returns:
        answer, done_reason ("stop": it ended by itself; "length": it was cut), prompt_eval_count, eval_count.

    Raises:
        WorkFailed: no answer in `timeout` seconds, or an error from the server.
    """
    request = {"model": name, "messages": [dict(message) for message in messages], "stream": False}
    with _client(server.url, timeout) as client, _talking_to(server.url):
        response = client.post("/api/chat", json=request)
    _check_status(response, f"answer with {name}")
    answer = _json_field(response.content, "message")
    if not isinstance(answer, dict) or not isinstance(answer.get("content"), str):
        raise WorkFailed(f"Ollama answered something that is not a message: {response.text[:200]!r}")
    numbers = ("done_reason", "prompt_eval_count", "eval_count")
    return {"answer": answer["content"]} | {key: _json_field(response.content, key) for key in numbers}


# --- what went wrong ------------------------------------------------------------------------------------------------

_LOOK_AT_LOG = "Ollama's log says more: https://docs.ollama.com/troubleshooting"
_HINTS = (
    ("no space left", "Free disk space where Ollama keeps its models (OLLAMA_MODELS), then run the command again."),
    ("unknown model architecture", "This Ollama is too old for the model: update it, then run the command again."),
    ("unsupported architecture", "This Ollama is too old for the model: update it, then run the command again."),
    ("model '", "`ollama list` shows which models there are."),
)


@contextmanager
def _talking_to(url: str) -> Iterator[None]:
    """Turns what can happen to a connection into WorkFailed."""
    again = f"See whether Ollama still runs at {url}, then run the same command again: what is uploaded stays there."
    try:
        yield
    except httpx.TimeoutException as error:
        raise WorkFailed(f"Ollama at {url} did not answer in time", again) from error
    except httpx.RequestError as error:
        raise WorkFailed(f"the connection to Ollama at {url} was lost ({error})", again) from error


def _check_status(response: httpx.Response, doing: str) -> None:
    if response.status_code in (200, 201):
        return
    response.read()
    if response.status_code == 403 and not response.content:
        raise WorkFailed("Ollama refuses the host name in OLLAMA_HOST", _FOREIGN_HOST)
    raise _refused(doing, _server_words(response))


def _refused(doing: str, words: str) -> WorkFailed:
    hint = next((hint for mark, hint in _HINTS if mark in words.lower()), _LOOK_AT_LOG)
    return WorkFailed(f"Ollama could not {doing}: {words}", hint)


def _server_words(response: httpx.Response) -> str:
    return str(_json_field(response.content, "error") or response.text[:200].strip() or f"HTTP {response.status_code}")


def _json_field(text: str | bytes, key: str) -> object:
    """A field of a JSON object; None if it isn't there, or the text is something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value.get(key) if isinstance(value, dict) else None


# --- what a person can do -------------------------------------------------------------------------------------------


def manual_command(modelfile: Path, name: str, platform: str = sys.platform) -> str:
    """The command that makes the model from its Modelfile, to copy into a shell."""
    path = str(modelfile)
    if platform != "win32":
        return f"ollama create {shlex.quote(name)} -f {shlex.quote(path)}"
    return f"ollama create {name} -f " + (f'"{path}"' if re.search(r"[\s&()^%,;=']", path) else path)


def install_hint(platform: str = sys.platform) -> str:
    """How to get Ollama running on this platform (a value of sys.platform)."""
    ways = {
        "linux": "`curl -fsSL https://ollama.com/install.sh | sh`, then `ollama serve` if it doesn't run as a service",
        "darwin": "the app from the page (or `brew install ollama` and `ollama serve`), then start it once",
        "win32": "OllamaSetup.exe from the page (or `winget install Ollama.Ollama`), then start Ollama once",
    }
    way = ways.get(platform, "pick your system there, then run `ollama serve`")
    return f"Install Ollama from {DOWNLOAD_PAGE}: {way}."
