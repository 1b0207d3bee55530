"""Where Ollama's server is, which version it has, and what can happen to a conversation with it over HTTP.

Sources: Ollama's `envconfig/config.go` (OLLAMA_HOST), `server/routes.go` (the check of the Host header).
"""

from __future__ import annotations

import functools
import ipaddress
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.base.secrets import place_of
from gemma_tune.base.words import first_line

PATIENCE = 600.0  # seconds without a byte: a slow disk may take minutes to hash, copy or load a large model


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
        raise UserError(f"OLLAMA_HOST={place_of(value)}: {scheme} is not http or https")
    address, _, path = rest.partition("/")
    host, port = _split_address(address, default_port)
    if not re.fullmatch(r"[\w.-]+|\[[0-9A-Fa-f:.]+\]", host) or not _is_host(host):
        raise UserError(f"OLLAMA_HOST={place_of(value)} is not an address", _NO_LOGIN if "@" in value else
                        "For example: OLLAMA_HOST=127.0.0.1:11434")
    return f"{scheme}://{host}:{port}" + (f"/{path.rstrip('/')}" if path.strip("/") else "")


def _split_address(address: str, default_port: str) -> tuple[str, str]:
    host, port = address.strip("[]"), default_port
    if match := re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*):([^:\[\]]*)", address):
        host, port = match[1].strip("[]"), match[2]
    if not re.fullmatch(r"[+-]?[0-9]+", port) or not 0 <= int(port) <= 65535:
        port = default_port
    return _connectable(host or "127.0.0.1"), str(int(port))


def _is_host(host: str) -> bool:
    """Whether a host's name can be looked up: its parts have 1 to 63 letters."""
    try:
        host.encode("idna")
        return bool(httpx.URL(f"http://{host}").host)
    except (UnicodeError, httpx.InvalidURL):
        return False


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

    @property
    def place(self) -> str:
        """Where it is, as it may be shown: the path of a URL can be a key."""
        return place_of(self.url)


def find_server(url: str, timeout: float = 3.0) -> Server | None:
    """The Ollama at this URL; None if nothing answers there (refused, unknown host, or no answer in time).

    Raises:
        UserError: something answers that isn't Ollama, or it refuses this client.
    """
    url = url.rstrip("/")
    try:
        with client_of(url, timeout) as client:
            response = client.get("/api/version")
    except httpx.RequestError as error:
        if isinstance(error, httpx.ConnectError | httpx.TimeoutException) and not _is_tls(error):
            return None
        raise UserError(f"what listens at {place_of(url)} is not Ollama ({error})", _WRONG_ADDRESS) from error
    if response.status_code == 403 and not response.content:
        raise UserError(f"Ollama at {place_of(url)} refuses the host name in this URL", _FOREIGN_HOST)
    version = json_field(response.content, "version") if response.status_code == 200 else None
    if not isinstance(version, str):
        raise UserError(
            f"what listens at {place_of(url)} is not Ollama (/api/version answers {response.status_code}, without a "
            "version)",
            _WRONG_ADDRESS,
        )
    return Server(url, version)


# The first releases that know an architecture (release notes and model pages of Ollama), and /api/create with `files`.
# Of Qwen 3.5 it is the first that runs GGUF files as llama.cpp has them (ollama#14503; with experts ollama#15499).
_FIRST_VERSION = {"gemma3": (0, 6, 0), "gemma3_text": (0, 6, 0), "qwen3": (0, 6, 6), "qwen3_moe": (0, 6, 6),
                  "gemma3n": (0, 9, 3), "gemma3n_text": (0, 9, 3), "gpt_oss": (0, 12, 0),
                  "ministral3": (0, 13, 1), "mistral3": (0, 13, 1),
                  "qwen3_5": (0, 17, 5), "qwen3_5_text": (0, 17, 5),
                  "qwen3_5_moe": (0, 30, 0), "qwen3_5_moe_text": (0, 30, 0),
                  "gemma4": (0, 20, 0), "gemma4_text": (0, 20, 0),
                  "gemma4_unified": (0, 20, 0), "gemma4_unified_text": (0, 20, 0)}
_FIRST_CREATE = (0, 5, 5)


def check_version(server: Server, model_type: str) -> None:
    """Whether the server knows the model's architecture; a version that cannot be read (a build of one's own) passes.

    Args:
        model_type: ``model_type`` of the model's config.json.

    Raises:
        WorkFailed: it is too old.
    """
    needed = _FIRST_VERSION.get(model_type, _FIRST_CREATE)
    found = re.match(r"v?([0-9]+)\.([0-9]+)\.([0-9]+)", server.version)
    has = tuple(int(number) for number in found.groups()) if found else needed
    if has < needed and has != (0, 0, 0):
        raise WorkFailed(f"Ollama {server.version} at {server.place} is too old for {model_type}: it takes "
                         f"{'.'.join(map(str, needed))} or later", "Update Ollama, then run the same command again.")


_NO_LOGIN = "Leave name and password out of it: Ollama has none. For example: OLLAMA_HOST=127.0.0.1:11434"
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


def client_of(url: str, timeout: float) -> httpx.Client:
    """Like Ollama's own client, no proxy for this machine, whatever HTTP_PROXY says; and there no certificates without
    https. Elsewhere a proxy may speak TLS.

    Raises:
        UserError: a proxy or certificates of the environment that cannot be used.
    """
    host = httpx.URL(url).host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    limits = httpx.Timeout(timeout, connect=min(timeout, 10.0))
    try:
        verify = False if loopback and url.startswith("http:") else _certificates()
        return httpx.Client(base_url=url, timeout=limits, trust_env=not loopback, verify=verify)
    except (OSError, ImportError, ValueError, httpx.InvalidURL) as error:
        names = ("SSL_CERT_FILE", "SSL_CERT_DIR") if isinstance(error, OSError) else (
            "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
        raise UserError(f"Ollama at {place_of(url)} cannot be asked: {first_line(error)}",
                        f"Correct or unset {', '.join(names[:-1])} or {names[-1]}.") from error


_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes longer than most requests


# --- what went wrong ------------------------------------------------------------------------------------------------

LOOK_AT_LOG = "Ollama's log says more: https://docs.ollama.com/troubleshooting"
_HINTS = (
    ("no space left", "Free disk space where Ollama keeps its models (OLLAMA_MODELS), then run the command again."),
    ("unknown model architecture", "This Ollama is too old for the model: update it, then run the command again."),
    ("unknown renderer", "This Ollama is too old for the model: update it, then run the command again."),
    ("unsupported architecture", "This Ollama is too old for the model: update it, then run the command again."),
    ("model '", "`ollama list` shows which models there are."),
)


@contextmanager
def talking_to(url: str) -> Iterator[None]:
    """Turns what can happen to a connection into WorkFailed."""
    place = place_of(url)
    again = f"See whether Ollama still runs at {place}, then run the same command again: what is uploaded stays there."
    try:
        yield
    except httpx.TimeoutException as error:
        raise WorkFailed(f"Ollama at {place} did not answer in time", again) from error
    except httpx.RequestError as error:
        raise WorkFailed(f"the connection to Ollama at {place} was lost ({error})", again) from error


def check_status(response: httpx.Response, doing: str) -> None:
    if response.status_code in (200, 201):
        return
    response.read()
    if response.status_code == 403 and not response.content:
        raise WorkFailed("Ollama refuses the host name in OLLAMA_HOST", _FOREIGN_HOST)
    raise Refused(doing, server_words(response), response.status_code)


class Refused(WorkFailed):
    """The server answers, and does not do what it was asked.

    Args:
        doing: what that was, after "Ollama could not".
        words: the server's.
        status: of HTTP; an error can come inside 200.
    """

    def __init__(self, doing: str, words: str, status: int = 200):
        hint = next((hint for mark, hint in _HINTS if mark in words.lower()), LOOK_AT_LOG)
        super().__init__(f"Ollama could not {doing}: {words}", hint)
        self.words, self.status = words, status


def server_words(response: httpx.Response) -> str:
    return str(json_field(response.content, "error") or response.text[:200].strip() or f"HTTP {response.status_code}")


def json_field(text: str | bytes, key: str) -> object:
    """A field of a JSON object; None if it isn't there, or the text is something else."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value.get(key) if isinstance(value, dict) else None
