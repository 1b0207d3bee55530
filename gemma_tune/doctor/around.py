"""What gemma-tune talks to: the Hub, an Ollama server, llama.cpp, Go; and the settings of the network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from gemma_tune.base.secrets import place_of
from gemma_tune.base.words import first_line
from gemma_tune.doctor.finding import BROKEN, LOOK, OK, Finding
from gemma_tune.gguf.llama_cpp import INSTALL_HINT, find_engine
from gemma_tune.hub.access import CORRECT_CERTIFICATES, account, offline_wanted, unreadable_certificates
from gemma_tune.ollama.client import install_hint
from gemma_tune.ollama.go_template import INSTALL_HINT as GO_HINT
from gemma_tune.ollama.go_template import find_go
from gemma_tune.ollama.server import check_version, find_server, ollama_host

_SECONDS = 60
# Addresses that decide where things come from; people set them and forget them.
_ADDRESSES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "HF_ENDPOINT", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL",
              "UV_INDEX_URL", "UV_DEFAULT_INDEX", "OLLAMA_HOST")
_PLAIN = ("SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HOME",
          "GEMMA_TUNE_CACHE", "GEMMA_TUNE_RUN")


def network() -> Iterator[Finding]:
    """Proxies, mirrors and other variables that are set, without names and passwords; and whether they can be used."""
    names = {name: value for variable in (*_ADDRESSES, *_PLAIN) for name in (variable, variable.lower())
             if (value := os.environ.get(name))}
    if not names:
        yield Finding("network settings", OK, "no proxy, no mirror, nothing offline")
    for name, value in names.items():
        yield Finding("network settings", OK, f"{name}={value if name.upper() in _PLAIN else _places(value)}")
    import httpx

    if unread := unreadable_certificates():
        yield Finding("certificates", BROKEN, unread, CORRECT_CERTIFICATES)
        return
    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as e:  # it needs a package more, or is no address
        socks = "socks" in str(e).lower()
        yield Finding("proxy", BROKEN, f"it cannot be used: {first_line(e)}",
                      "pip install 'httpx[socks]'" if socks else "correct or unset the variable")


def _places(value: str) -> str:
    return " ".join(map(place_of, value.split()))  # PIP_EXTRA_INDEX_URL holds several


def hub() -> Iterator[Finding]:
    """Whether the Hub answers, and whose token is sent."""
    if variable := offline_wanted():
        yield Finding("hub", LOOK, f"{variable} forbids to ask it", f"unset {variable}, unless what is needed is here")
        return
    endpoint, name = account()
    place = place_of(endpoint)
    if name:
        yield Finding("hub", OK, f"{place} answers, logged in as {name}")
    else:
        yield Finding("hub", OK, f"{place} answers; not logged in, which gated models such as Gemma's need: "
                                 "`hf auth login`")


def ollama(model_type: str | None) -> Iterator[Finding]:
    """A server, its version, and whether that knows the model's architecture."""
    url = ollama_host(os.environ)
    server = find_server(url)
    if server is None:
        started = shutil.which("ollama")
        yield Finding("ollama", LOOK, f"no server answers at {place_of(url)}; models are exported all the same",
                      "ollama serve" if started else install_hint())
        return
    if model_type:
        check_version(server, model_type)
    yield Finding("ollama", OK, f"version {server.version} at {server.place}")


def engine() -> Iterator[Finding]:
    """llama.cpp, which checks exports: it is really loaded, in a process of its own."""
    found = find_engine()
    if found is None:
        yield Finding("llama.cpp", LOOK, "not installed: exports are not compared with it", INSTALL_HINT)
        return
    kind, _, what = found.partition(" ")
    command = [what, "--version"] if kind == "llama-server" else [sys.executable, "-c", "import xllamacpp"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=_SECONDS,
                          check=False)
    if done.returncode:
        words = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        yield Finding("llama.cpp", LOOK, f"{found} does not start: {words}", INSTALL_HINT if kind == "llama-server" else
                      "pip install --force-reinstall xllamacpp")
        return
    yield Finding("llama.cpp", OK, found)


def go() -> Iterator[Finding]:
    """Go, which renders Ollama's template in the check of an export."""
    program = find_go()
    if program is None:
        yield Finding("go", LOOK, "not installed: Ollama's template is not compared in exports", GO_HINT)
        return
    done = subprocess.run([program, "version"], capture_output=True, encoding="utf-8", errors="replace",
                          timeout=_SECONDS, check=False)
    if done.returncode:
        yield Finding("go", LOOK, f"{program} does not start", GO_HINT)
    else:
        yield Finding("go", OK, done.stdout.strip().removeprefix("go version "))
