"""The client against the loopback server: both generations, and everything that can break."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from gemma_tune.base.errors import UserError, WorkFailed
from gemma_tune.ollama import server
from gemma_tune.ollama.client import (
    Server,
    create_model,
    default_model_name,
    find_server,
    generate_check,
    install_hint,
    manual_command,
    ollama_host,
    tagged,
    validate_model_name,
)
from gemma_tune.ollama.template import OllamaChat
from support.ollama import ANSWER, LoopbackOllama

GENERATIONS = ["0.33", "0.34.1"]
CHAT = OllamaChat("{{ range .Messages }}{{ .Content }}{{ end }}", ("<end_of_turn>",))
ASK = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def gguf(tmp_path) -> Path:
    """A file with a GGUF header, of three chunks and a bit."""
    path = tmp_path / "gemma-q8_0.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(16) + b"\x5a" * (3 << 20))
    return path


@pytest.fixture(params=GENERATIONS)
def ollama(request):
    with LoopbackOllama(request.param) as server:
        yield server


def found(server: LoopbackOllama) -> Server:
    return Server(server.url, server.version)


# --- OLLAMA_HOST: compared once with Go's own net and net/url, which give the same


@pytest.mark.parametrize(
    ("value", "url"),
    [
        (None, "http://127.0.0.1:11434"),
        ("", "http://127.0.0.1:11434"),
        ("1.2.3.4", "http://1.2.3.4:11434"),
        ("1.2.3.4:1234", "http://1.2.3.4:1234"),
        ("example.com", "http://example.com:11434"),
        ("http://1.2.3.4", "http://1.2.3.4:80"),
        ("https://example.com", "https://example.com:443"),
        ("https://example.com:1234", "https://example.com:1234"),
        (":1234", "http://127.0.0.1:1234"),
        ("localhost", "http://localhost:11434"),
        ("::1", "http://[::1]:11434"),
        ("[::1]", "http://[::1]:11434"),
        ("[2001:DB8:0::1]:8080", "http://[2001:db8::1]:8080"),
        ("::ffff:1.2.3.4", "http://1.2.3.4:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:5", "http://127.0.0.1:5"),
        ("::", "http://[::1]:11434"),
        ("[::]:99", "http://[::1]:99"),
        (" '1.2.3.4' ", "http://1.2.3.4:11434"),
        ('" 1.2.3.4:5 "', "http://1.2.3.4:5"),
        ("example.com/ollama", "http://example.com:11434/ollama"),
        ("https://example.com/a/b/", "https://example.com:443/a/b"),
        ("http://example.com/", "http://example.com:80"),
        ("ollama.com", "https://ollama.com:443"),
        ("example.com:99999", "http://example.com:11434"),
        ("http://example.com:abc", "http://example.com:80"),
        ("1.2.3.4:-1", "http://1.2.3.4:11434"),
        ("host:", "http://host:11434"),
        ("host:0", "http://host:0"),
    ],
)
def test_ollama_host(value, url):
    assert ollama_host({} if value is None else {"OLLAMA_HOST": value}) == url


@pytest.mark.parametrize("value", ["ftp://x", "a b", "1:2:3", "fe80::1%eth0", "http://user@host:1", "a..b", "..", "x" * 64, "xn--", "ä..b"])
def test_ollama_host_that_is_no_address(value):
    with pytest.raises(UserError, match="OLLAMA_HOST"):
        ollama_host({"OLLAMA_HOST": value})


# --- names

GOOD_NAMES = ["m", "gemma-3_1b.v2", "_x", "m:latest", "me/m", "host:1/me/m:7b", "a.b/c/d:e", "M" * 80, "x:cloudy"]
BAD_NAMES = ["", "-m", ".m", "m ", "a b", "me.x/m", "a//b", "/m", "m:", ":t", "m:a:b", "w/x/y/z", "é", "m" * 81, "m\n", "m@sha"]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_good_name(name):
    assert validate_model_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name(name):
    with pytest.raises(UserError, match="is not a name for an Ollama model") as raised:
        validate_model_name(name)
    assert "[host/][namespace/]model[:tag]" in raised.value.hint
    assert "a-z, A-Z, 0-9" in raised.value.hint and "no letters of other scripts" in raised.value.hint, "é is a letter, too"


@pytest.mark.parametrize("name", ["m:cloud", "m:7b-cloud", "me/m:Cloud", "m:local"])
def test_a_name_that_would_run_elsewhere(name):
    with pytest.raises(UserError, match="place where a model runs"):
        validate_model_name(name)


def test_the_servers_own_rule_agrees(ollama, gguf):
    """The double parses names in the server's way, the client by one expression."""
    for name in GOOD_NAMES + BAD_NAMES:
        connection = http.client.HTTPConnection("127.0.0.1", int(ollama.url.rsplit(":", 1)[1]))
        with closing(connection):
            connection.request("POST", "/api/create", json.dumps({"model": name}))
            words = json.load(connection.getresponse())["error"]
        assert (words == "invalid model name") == (name in BAD_NAMES), name


@pytest.mark.parametrize(
    ("model_name", "expected"),
    [
        ("gemma-3-270m-it", "gemma-3-270m-it-tuned"),
        ("google/Gemma-3-1B-it", "gemma-3-1b-it-tuned"),
        ("Qwen2.5 (0.5B)", "qwen2.5-0.5b-tuned"),
        ("-.x", "x-tuned"),
        ("é", "model-tuned"),
        ("a" * 200, "a" * 74 + "-tuned"),
    ],
)
def test_the_default_name(model_name, expected):
    assert validate_model_name(default_model_name(model_name)) == expected


def test_a_number_format_as_a_tag():
    assert tagged("me/m", "q4_k_m") == "me/m:q4_k_m"
    assert tagged("host:1/me/m", "f16") == "host:1/me/m:f16"
    with pytest.raises(UserError, match="'m:v1' has a tag") as raised:
        tagged("m:v1", "q8_0")
    assert "leave :v1 out of --name" in raised.value.hint
    with pytest.raises(UserError, match="is not a name"):
        tagged("a b", "q8_0")


# --- finding the server


def test_the_server_is_found(ollama):
    assert find_server(ollama.url + "/") == Server(ollama.url, ollama.version)
    assert ollama.paths() == ["GET /api/version"]


def test_nothing_listens():
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        assert find_server(f"http://127.0.0.1:{unused.getsockname()[1]}") is None


def test_something_listens_that_never_answers():
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        assert find_server(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.2) is None


def test_a_proxy_for_the_web_is_not_asked_about_this_machine(ollama, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert find_server(ollama.url) is not None
    assert find_server(ollama.url.replace("127.0.0.1", "localhost")) is not None


@pytest.fixture
def own_certificates():
    """Those that are kept are of another environment."""
    server._certificates.cache_clear()
    yield
    server._certificates.cache_clear()


def test_certificates_that_are_not_there_are_missed_where_tls_is_spoken(ollama, own_certificates, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    assert find_server(ollama.url) is not None
    for url in (ollama.url.replace("http:", "https:"), "http://192.0.2.1:11434"):  # the latter perhaps by a proxy
        with pytest.raises(UserError, match="cannot be asked: .*No such file") as raised:
            find_server(url)
        assert "SSL_CERT_FILE" in raised.value.hint


@pytest.mark.parametrize("proxy", ["ftp://proxy:21", "http://proxy:port"])
def test_a_proxy_that_is_none_is_an_error_that_names_its_variable(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(UserError, match="Ollama at http://192.0.2.1:11434 cannot be asked: ") as raised:
        find_server("http://192.0.2.1:11434")
    assert "unset HTTP_PROXY" in raised.value.hint


@pytest.mark.parametrize("answer", [b"<html>hello</html>", b'{"name": "other"}', b'{"version": 3}', b"[]", b""])
def test_another_web_server_is_not_taken_for_ollama(answer):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match="is not Ollama") as raised:
            find_server(f"http://127.0.0.1:{server.server_address[1]}")
    assert raised.value.exit_code == 2 and "OLLAMA_HOST" in raised.value.hint


def test_what_speaks_no_http_is_not_taken_for_ollama():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def greet():
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(UserError, match="is not Ollama"):
            find_server(f"http://127.0.0.1:{server.getsockname()[1]}")


def test_https_to_a_server_without_it_is_an_error_and_not_silence(ollama):
    with pytest.raises(UserError, match="is not Ollama .*SSL"):
        find_server(ollama.url.replace("http:", "https:"))


def test_a_refused_host_name_is_explained(gguf):
    with LoopbackOllama(faults={"foreign-host"}) as server:
        with pytest.raises(UserError, match="refuses the host name") as raised:
            find_server(server.url)
        assert "Host header" in raised.value.hint and "OLLAMA_ORIGINS" in raised.value.hint
        with pytest.raises(WorkFailed, match="refuses the host name"):
            create_model(found(server), "m", gguf, CHAT, {})


def test_the_double_checks_the_host_header_itself(ollama):
    port = int(ollama.url.rsplit(":", 1)[1])
    for host, status in [("localhost:1", 200), ("[::1]", 200), ("10.0.0.7", 200), ("a.internal", 200), ("evil.com", 403)]:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        with closing(connection):
            connection.request("GET", "/api/version", headers={"Host": host})
            response = connection.getresponse()
            assert (response.status, response.read() == b"") == (status, status == 403)


# --- making a model


def test_a_model_is_made_and_answers(ollama, gguf):
    seen = []
    create_model(
        found(ollama),
        "me/gemma-tuned:v1",
        gguf,
        CHAT,
        {"temperature": 1.0, "num_ctx": 2048, "stop": "<eos>"},
        system="Be\r\nkind 👩\u200d👧\u00a0.",
        license_text="Gemma Terms",
        on_progress=lambda *step: seen.append(step),
    )
    digest = "sha256:" + hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert ollama.blob(digest).read_bytes() == gguf.read_bytes()
    assert ollama.models == {
        "me/gemma-tuned:v1": {
            "model": "me/gemma-tuned:v1",
            "files": {"gemma-q8_0.gguf": digest},
            "template": CHAT.template,
            "system": "Be\nkind 👩\u200d👧\u00a0.",
            "license": "Gemma Terms",
            "parameters": {"num_ctx": 2048, "temperature": 1.0, "stop": ["<end_of_turn>", "<eos>"]},
            "stream": True,
        }
    }
    assert ollama.paths() == ["HEAD /api/blobs/sha256:…", "POST /api/blobs/sha256:…", "POST /api/create"]
    upload = ollama.requests[1]
    assert upload.size == gguf.stat().st_size and "Transfer-Encoding" not in upload.headers

    size = gguf.stat().st_size
    for status in ("hashing", "uploading"):
        steps = [(done, total) for what, done, total in seen if what == status]
        assert len(steps) == 4 and steps == sorted(steps) and steps[-1] == (size, size)
    assert [what for what, *_ in seen][-3:] == ["parsing GGUF", "writing manifest", "success"]
    assert generate_check(found(ollama), "me/gemma-tuned:v1", ASK, timeout=5)["answer"] == ANSWER


def test_what_was_stored_can_be_shown(ollama, gguf):
    create_model(found(ollama), "m", gguf, CHAT, {"top_k": 64})
    connection = http.client.HTTPConnection("127.0.0.1", int(ollama.url.rsplit(":", 1)[1]))
    with closing(connection):
        connection.request("GET", "/api/tags")
        assert json.load(connection.getresponse()) == {"models": [{"name": "m:latest", "model": "m:latest"}]}
        connection.request("POST", "/api/show", json.dumps({"model": "m"}))
        shown = json.load(connection.getresponse())
    assert shown["template"] == CHAT.template
    assert [line.split() for line in shown["parameters"].splitlines()] == [["top_k", "64"], ["stop", '"<end_of_turn>"']]


def test_gemma_4_is_made_with_renderer_and_parser(ollama, gguf):
    create_model(found(ollama), "m", gguf, OllamaChat(None, ("<turn|>",), renderer="gemma4", parser="gemma4"), {})
    made = ollama.models["m:latest"]
    assert (made["renderer"], made["parser"], made["parameters"]) == ("gemma4", "gemma4", {"stop": ["<turn|>"]})
    assert not {"template", "system", "license"} & set(made)


def test_a_file_that_is_there_is_not_uploaded_again(ollama, gguf):
    create_model(found(ollama), "one", gguf, CHAT, {})
    create_model(found(ollama), "two", gguf, OllamaChat("t", (), default_system="from the template"), {})
    assert ollama.paths()[3:] == ["HEAD /api/blobs/sha256:…", "POST /api/create"]
    assert ollama.models["two:latest"]["system"] == "from the template"


def test_a_file_name_that_the_server_refuses_is_changed(ollama, gguf):
    odd = gguf.rename(gguf.with_name("a\\b:c.gguf"))
    create_model(found(ollama), "m", odd, CHAT, {})
    assert list(ollama.models["m:latest"]["files"]) == ["a_b_c.gguf"]


def test_bad_input_is_found_before_anything_is_sent(ollama, gguf):
    for name, path, parameters, why in [
        ("a b", gguf, {}, "is not a name"),
        ("m", gguf, {"typical_p": 0.9}, "cannot be given to Ollama"),
        ("m", gguf.with_name("missing.gguf"), {}, "cannot read .*missing.gguf"),
        ("m", gguf.parent, {}, "cannot read"),
    ]:
        with pytest.raises(UserError, match=why) as raised:
            create_model(found(ollama), name, path, CHAT, parameters)
        assert raised.value.exit_code == 2
    assert ollama.requests == []


def test_a_file_that_is_no_gguf(ollama, gguf):
    gguf.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(WorkFailed, match="could not make the model: invalid file magic"):
        create_model(found(ollama), "m", gguf, CHAT, {})
    other = gguf.rename(gguf.with_name("model.bin"))
    with pytest.raises(WorkFailed, match="could not make the model: unknown type"):
        create_model(found(ollama), "m", other, CHAT, {})
    assert ollama.models == {}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(
    ("fault", "why", "hint"),
    [
        ("create-error", "could not make the model: unknown model architecture: 'gemma9'", "too old for the model"),
        ("create-cut", r"stopped before the model was made \(last: writing manifest\)", "log"),
        ("create-dropped", "connection to Ollama at http.* was lost", "run the same command again"),
        ("create-garbage", "not a status: '<html>bad gateway</html>'", None),
        ("upload-dropped", "connection to Ollama at http.* was lost", "run the same command again"),
        ("upload-corrupted", "gemma-q8_0.gguf changed on its way to Ollama: digest mismatch, expected", "same command"),
        ("disk-full", "could not store the model file: write .*no space left", "Free disk space"),
    ],
)
def test_what_breaks_is_never_success(generation, fault, why, hint, gguf):
    with LoopbackOllama(generation, faults={fault}) as server:
        with pytest.raises(WorkFailed, match=why) as raised:
            create_model(found(server), "m", gguf, CHAT, {})
        assert raised.value.exit_code == 1
        assert hint is None or hint in raised.value.hint
        if fault != "create-garbage":
            assert server.models == {}


def test_a_server_that_goes_away(gguf):
    with LoopbackOllama() as server:
        pass
    with pytest.raises(WorkFailed, match="was lost"):
        create_model(found(server), "m", gguf, CHAT, {})
    with pytest.raises(WorkFailed, match="was lost"):
        generate_check(found(server), "m", ASK, timeout=1)


@pytest.mark.parametrize("change", [-(1 << 20), 1 << 20])
def test_a_file_that_changes_while_it_is_uploaded(change, ollama, gguf):
    size = gguf.stat().st_size

    def rewrite(status, done, total):
        if status == "uploading":
            os.truncate(gguf, size + change)

    with pytest.raises(WorkFailed, match="changed while it was uploaded"):
        create_model(found(ollama), "m", gguf, CHAT, {}, on_progress=rewrite)
    assert ollama.models == {}


# --- the double refuses what the real server refuses


@pytest.mark.parametrize(
    ("change", "old", "new"),
    [
        ({}, "success", "success"),
        ({"adapters": {"a.gguf": "DIGEST"}}, "success", "400 LoRA adapters are no longer supported"),
        ({"quantize": "q4_0"}, "success", "400 create-time quantization is only supported"),
        ({"parameters": {"typical_p": 0.9}}, "success", "400 typical_p is deprecated"),
        ({"files": {"a\\b.gguf": "DIGEST"}}, "success", "400 file path must be relative: a\\b.gguf"),
        ({"files": {"c:x.gguf": "DIGEST"}}, "success", "400 file path must be relative: c:x.gguf"),
        ({"files": {"/x.gguf": "DIGEST"}}, "400 file path must be relative", "400 file path must be relative: /x.gguf"),
        ({"files": {f"{n}.gguf": "DIGEST" for n in range(1025)}}, "success", "400 too many files: 1025 exceeds"),
        ({"files": {"x.gguf": "sha256:1"}}, "400 invalid digest", "400 invalid digest"),
        ({"files": {"x.gguf": "sha256:" + "0" * 64}}, "200 open /models/blobs", "200 open /models/blobs"),
        ({"files": {"x": "sha256:" + "0" * 64}}, "400 blob not found for x", "400 blob not found for x"),
        ({"files": {}}, "400 neither 'from' or 'files'", "400 neither 'from' or 'files'"),
        ({"model": "a b"}, "400 invalid model name", "400 invalid model name"),
    ],
)
def test_the_double_is_as_strict_as_its_generation(change, old, new, gguf):
    for generation, expected in zip(GENERATIONS, (old, new), strict=True):
        with LoopbackOllama(generation) as server:
            digest = "sha256:" + hashlib.sha256(gguf.read_bytes()).hexdigest()
            server.blob(digest).write_bytes(gguf.read_bytes())
            request = {"model": "m", "files": {"x.gguf": "DIGEST"}} | change
            connection = http.client.HTTPConnection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
            with closing(connection):
                connection.request("POST", "/api/create", json.dumps(request).replace("DIGEST", digest))
                response = connection.getresponse()
                last = json.loads(response.read().splitlines()[-1])
            got = last["status"] if "status" in last else f"{response.status} {last['error']}"
            assert got.startswith(expected), generation
            assert bool(server.models) == (expected == "success")


# --- what a person can do


def test_the_command_to_copy():
    assert manual_command(Path("ollama/Modelfile"), "m:v1") == "ollama create m:v1 -f ollama/Modelfile"
    assert manual_command(Path("my runs/Modelfile"), "m") == "ollama create m -f 'my runs/Modelfile'"


@pytest.mark.parametrize(("platform", "way"), [("linux", "install.sh"), ("darwin", "brew"), ("win32", "winget"), ("x", "")])
def test_how_to_install(platform, way):
    assert "https://ollama.com/download" in install_hint(platform) and way in install_hint(platform)
