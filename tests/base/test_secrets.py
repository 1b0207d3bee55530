"""Tokens and passwords: nothing that is printed or recorded shows them."""

from __future__ import annotations

import json

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.base.secrets import MARK, is_token, place_of, redact, redacted
from gemma_tune.config.settings import resolve
from gemma_tune.config.stages import ExportConfig
from support.ollama import LoopbackOllama

WORD = "s3cretW0rd"
HF = "hf_" + "Ab1" * 11
TOKENS = (HF, "hf_oauth_eyJh.bG-c_i", "ghp_" + "a1B2" * 9, "github_pat_" + "a1B2_" * 5, "glpat-" + "a1b2" * 5,
          "sk-proj-" + "a1B2" * 6, "xoxb-123456789012-abcd", "AKIA" + "A1B2" * 4, "AIza" + "a1B2c" * 7,
          "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc-DEF_1")


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_of_all_shapes(token):
    assert redact(f"there is no {token!r}.") == f"there is no '{MARK}'."
    assert is_token(f" {token}\n") and not is_token(f"models/{token}")


@pytest.mark.parametrize(("text", "shown"), [
    (f"https://me:{WORD}@host/x", f"https://{MARK}@host/x"),
    (f"https://me:{WORD}@x@host/x", f"https://{MARK}@host/x"),
    (f"http://h/x?page=2&token={WORD}&api_key={WORD}", f"http://h/x?page=2&token={MARK}&api_key={MARK}"),
    (f"http://h?X-Amz-Signature={WORD}#a", f"http://h?X-Amz-Signature={MARK}#a"),
    (f"Authorization: Bearer {WORD}", f"Authorization: Bearer {MARK}"),
])
def test_passwords_in_links_and_headers(text, shown):
    assert redact(text) == shown


@pytest.mark.parametrize("text", [
    "Bearer bonds and bearer certificates", "risk-adjusted-returns-over-the-last-10-years", "hf_hub_download of hf_xet",
    "hf://datasets/org/name@main", "hf:org/name:train@0123456789abcdef", "https://host/a@b", "what is the key? key=1",
    "sha256-" + "0f" * 32, "sk-learn"])
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_every_error_is_without_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WORD)
    error = UserError(f"a {WORD}", f"b {HF}", [f"c {HF}", "d"])
    assert (str(error), error.message, error.hint, error.problems) == (f"a {MARK}", f"a {MARK}", f"b {MARK}",
                                                                       (f"c {MARK}", "d"))
    assert redacted({"a": [HF, 1, {HF: None}]}) == {"a": [MARK, 1, {MARK: None}]}


@pytest.mark.parametrize(("address", "place"), [
    ("127.0.0.1:11434", "127.0.0.1:11434"), ("http://h:1/", "http://h:1"), ("[::1]:2/x", "[::1]:2/…"), ("", ""),
    (f"http://h/{WORD}", "http://h/…"), (f"http://h?token={WORD}", "http://h/…"), (f"u:{WORD}@h:1", "h:1"),
    (f"http://u:{WORD}@h", "http://h"), (f"http://u:pa/{WORD}@h", "http://…"), (f"ftp://u:{WORD}@h#x", "ftp://h/…")])
def test_the_place_of_an_address(address, place):
    assert place_of(address) == place
    recorded = resolve(ExportConfig, {"host": address or None}).record()["host"]["value"]
    assert (recorded or "") == place


def test_a_password_in_the_address_of_ollama_is_not_shown(cli, merged, monkeypatch):
    for host in (f"http://me:{WORD}@127.0.0.1:9", f"me:{WORD}@127.0.0.1:9", f"ftp://me:{WORD}@127.0.0.1:9",
                 f"http://127.0.0.1:9/{WORD}", f"http://127.0.0.1:9/?token={WORD}"):
        monkeypatch.setenv("OLLAMA_HOST", host)
        result = cli("export-ollama", "--create", "--json", "--debug", *(("--host", host) if "/?" in host else ()))
        assert result.code in (1, 2) and "127.0.0.1:9" in result.json["error"]["message"]
        assert WORD not in result.err + result.out


def test_the_path_of_an_address_is_used_and_neither_shown_nor_recorded(export, merged):
    with LoopbackOllama() as ollama:
        result = export("--host", f"{ollama.url}/{WORD}", "--json")
        assert ollama.requests[0].path == f"/{WORD}/api/version"
    assert result.code == 2 and f"{ollama.url}/… is not Ollama" in result.json["error"]["message"]
    assert WORD not in result.err + result.out
    assert export("--host", f"http://127.0.0.1:9/{WORD}", "--no-create").code == 0
    files = [merged / "manifest.json", *(merged / "ollama").glob("*[!f]")]
    assert len(files) > 1 and not [path for path in files if WORD.encode() in path.read_bytes()]
    assert json.loads(files[0].read_text())["stages"]["export-ollama"]["config"]["host"] == {
        "value": "http://127.0.0.1:9/…", "from": "flag"}


def test_a_token_in_the_wrong_place_is_neither_sent_nor_shown(cli, trained, monkeypatch):
    monkeypatch.setattr("httpx.Client.send", lambda *a, **k: pytest.fail("it was sent"))
    for args in (["train", "--model", HF], ["prepare", "--revision", HF], ["status", "--run", HF],
                 ["merge", "--push", HF], ["export-ollama", "--name", HF], ["prepare", HF], ["merge", "--adapter", HF],
                 ["prepare", "--columns", HF], ["train", "--rank", HF], ["train", f"--{HF}"], [HF]):
        result = cli(*args, "--json")
        assert result.code == 2 and set(result.json) == {"error"}, args
        assert HF not in result.err + result.out and "Traceback" not in result.err


def test_a_token_in_a_settings_file(cli, tmp_path):
    (tmp_path / "a.yaml").write_text(f"model: {HF}\nmerge: {{push: {HF}}}\n")
    result = cli("prepare", "--config", "a.yaml", "--json")
    assert result.json["error"]["problems"] == ["model: holds an access token, which is no name",
                                                "merge.push: holds an access token, which is no name"]


def test_notes_tables_and_commands_to_type_are_without_secrets(cli, tiny, data, tmp_path):
    run = tmp_path / f"x {HF}"
    done = cli("prepare", data, "--model", tiny, "--run", run, "--json")
    assert done.code == 0 and f"gemma-tune train --run '{tmp_path}/x {MARK}'" in done.err
    assert done.json["run"] == f"{tmp_path}/x {MARK}"
    assert HF not in done.err + done.out + cli("status", "--run", run).err
