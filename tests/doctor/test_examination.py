"""``doctor``: what is broken is found by trying it, named with what mends it, and told by the exit code."""

from __future__ import annotations

import re
import sys
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.config.stages import TrainConfig
from gemma_tune.doctor import around, compute, examination, finding, libraries, model
from gemma_tune.hub import access
from gemma_tune.models import placement
from gemma_tune.models.placement import choose_placement
from gemma_tune.models.source import locate
from gemma_tune.train import memory
from support.command import ROOT
from support.hub import LoopbackHub
from support.narrow import without_instructions
from support.ollama import LoopbackOllama

ID, GOOD, OTHER = "google/tiny-gemma", "hf_" + "G" * 34, "hf_" + "O" * 34
Usage = namedtuple("Usage", "total used free")


def by_check(result) -> dict:
    return {one["check"]: one for one in result.json["checks"]}


@pytest.fixture(scope="module")
def needs(tiny):
    return model.measured(locate(str(tiny), None, Listener()))


def test_what_works_is_said_line_by_line(cli, tiny):
    result = cli("doctor", "--model", tiny, "--json")
    assert result.code == 0, result.err
    found = by_check(result)
    assert result.json["ok"] is True
    for check in ("python", "libraries", "device", "cpu fp32", "cpu bf16", "model", "memory", "disk"):
        assert found[check]["state"] in ("ok", "look"), found[check]
        assert found[check]["found"] in result.err
    assert re.search(r"matrix product [\d,]+ GFLOP/s, right to \de-0\d; 20 training steps took the loss from 0\.\d+ to",
                     found["cpu fp32"]["found"])
    assert "gemma3_text" in found["model"]["found"]
    assert found["ollama"]["state"] == "look" and "no server answers" in found["ollama"]["found"]
    assert found["ollama"]["mend"] in result.err
    assert f"nothing that training {tiny} needs is broken" in " ".join(result.err.split())


@pytest.mark.parametrize("platform, mends", [("linux", ""), ("win32", " --index-url https://download.pytorch.org/whl/")])
def test_a_gpu_that_pytorch_was_built_without_needs_the_build_that_has_it(monkeypatch, platform, mends):
    """Windows' build of PyPI never has it."""
    monkeypatch.setattr(compute.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(compute, "sys", SimpleNamespace(platform=platform))
    first = next(compute.devices())
    assert "built without CUDA" in first.found and first.mend.startswith(f"pip install --force-reinstall torch{mends}")
    assert ("--index-url" in first.mend) == bool(mends)


def test_what_is_broken_has_its_exit_code_and_what_mends_it(cli, monkeypatch):
    chosen = choose_placement("auto")
    monkeypatch.setattr(compute, "product", lambda place, dtype: (0.5 if dtype == chosen.dtype else 0.0, 1e9))
    for name in ("hub", "engine", "go"):  # which take their time
        monkeypatch.setattr(around, name, lambda: [])
    result = cli("doctor", "--json")
    assert result.code == 1 and result.json["ok"] is False
    broken = [one for one in result.json["checks"] if one["state"] == "broken"]
    assert [one["check"] for one in broken] == [f"{chosen.device} {chosen.short}"]
    assert "wrong by 5.0e-01" in broken[0]["found"] and "pip install --force-reinstall torch" in broken[0]["mend"]
    assert f"to mend it: {broken[0]['mend']}" in " ".join(result.err.split())


def test_a_model_that_is_not_there_is_broken_and_the_machine_is_looked_at(cli, monkeypatch):
    for name in ("hub", "engine", "go"):
        monkeypatch.setattr(around, name, lambda: [])
    result = cli("doctor", "--model", "./nowhere", "--json")
    assert result.code == 1
    assert by_check(result)["model"]["found"] == "there is no directory ./nowhere"
    assert by_check(result)["memory"]["state"] == "ok"


def test_a_name_that_is_too_long_for_a_model_is_told_as_every_command_tells_it():
    with pytest.raises(UserError, match="a{20}… is too long a name .*it has 300 characters"):
        examination._located("a" * 300, None, Listener())


def test_a_model_whose_search_fails_otherwise_is_broken_too_and_the_rest_is_told(monkeypatch):
    for name in ("hub", "ollama", "engine", "go"):
        monkeypatch.setattr(around, name, lambda *_: [])
    for name in ("arithmetic", "four_bit", "kernels"):
        monkeypatch.setattr(compute, name, lambda *_, **__: [])
    monkeypatch.setattr(examination, "locate", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(model, "places", lambda: [finding.Finding("runs", "broken", "cannot be written")])
    found = {one.check: one for one in examination.examine("some/model", None, Listener())}
    assert found["model"].state == "broken" and "ZeroDivisionError" in found["model"].found and found["model"].raised
    assert found["memory"].state == "ok" and found["runs"].state == "broken"


# --- computing

@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_a_product_is_compared_with_fp64(dtype, error):
    found, speed = compute.product("cpu", dtype)
    assert 0 < found < error and speed > 1e6


def test_a_product_that_loses_a_number_is_found(monkeypatch):
    right = torch.Tensor.__matmul__

    def wrong(a, b):
        result = right(a, b)
        if result.dtype == torch.float32:
            result = result.clone()
            result[3, 3] += 1.0
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong)
    assert compute.product("cpu", torch.float32)[0] > compute._TOLERANCE["fp32"]


def test_training_steps_learn_and_notice_what_is_not_finite():
    before, after = compute.training_steps("cpu", torch.float32)
    assert after < 0.9 * before

    class Broken(torch.nn.Module):
        def forward(self, x):
            return x * float("nan")

    with pytest.raises(ValueError, match="not finite"):
        compute.training_steps("cpu", torch.float32, Broken())


@pytest.mark.parametrize("needed, state", [(False, "look"), (True, "broken")])
def test_four_bits_are_broken_only_for_a_model_that_needs_them(monkeypatch, needed, state):
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    monkeypatch.setattr(compute, "best_device", lambda: "cpu")
    [found] = compute.four_bit(needed)
    assert (found.state, found.mend) == (state, "pip install bitsandbytes")
    monkeypatch.setattr(compute, "best_device", lambda: "mps")
    [found] = compute.four_bit(needed)
    assert found.state == state and "Apple" in found.found


def test_four_bits_compute():
    pytest.importorskip("bitsandbytes")
    [found] = compute.four_bit(True)
    assert found.state == "ok" and "a layer is off by" in found.found


# --- memory and disk

@pytest.mark.parametrize("room, state, said", [
    (64e9, "ok", "2,048 tokens at once"), (1e6, "broken", "training takes at least")])
def test_memory_is_compared_with_what_the_model_needs(needs, monkeypatch, room, state, said):
    monkeypatch.setattr(model, "available", lambda device: int(room))
    [found] = model.fits_memory(needs)
    assert found.state == state and said in found.found
    assert bool(found.mend) is (state != "ok")


def test_shorter_rows_that_fit_are_named(needs, monkeypatch):
    device = choose_placement("auto").device
    takes = {length: model.choose(needs.shape, TrainConfig(micro_batch=1, activation_checkpointing=True), length,
                                  device, 1).memory.total for length in (1024, 2048)}
    assert takes[1024] < takes[2048]
    monkeypatch.setattr(model, "available", lambda device: int((takes[1024] + takes[2048]) / 2 / model.USABLE))
    [found] = model.fits_memory(needs)
    assert found.state == "look" and "gemma-tune prepare --max-length 1024" in found.mend


def test_weights_in_bf16_are_counted_on_where_fp32_does_not_fit(needs, monkeypatch):
    without_instructions(monkeypatch)
    monkeypatch.setattr(memory, "PLACE", 1)
    wide, kept = (model.choose(replace(needs.shape, item=4, large=needs.shape.parameters, narrow=narrow), TrainConfig(micro_batch=1,
                  activation_checkpointing=True), model.LENGTHS[-1], "cpu", 1).memory.total for narrow in (False, True))
    assert kept < wide
    fp32 = model.Needs(needs.model, replace(needs.shape, item=4, large=needs.shape.parameters))
    monkeypatch.setattr(model, "available", lambda device: int((wide + kept) / 2 / model.USABLE))
    [found] = model.fits_memory(fp32)
    assert found.state == "look" and "1 x 256 tokens at once, recomputed" in found.found
    monkeypatch.setattr(placement, "bf16_instructions", lambda: None)
    monkeypatch.setattr(placement, "bf16_speed", lambda: 0.1)
    assert "training takes at least" in next(model.fits_memory(fp32)).found


def test_a_full_disk_is_broken(needs, monkeypatch):
    assert [one.state for one in model.fits_disk(needs)] == ["ok"]
    monkeypatch.setattr(model.shutil, "disk_usage", lambda place: Usage(10, 9, 1))
    [found] = model.fits_disk(needs)
    assert found.state == "broken" and "--run DIR" in found.mend


# --- the Hub

@pytest.fixture
def hub(tiny, monkeypatch, tmp_path):
    with LoopbackHub() as running:
        running.add_repo(ID, tiny, gated=True)
        running.add_token(GOOD, accepted=[ID])
        running.add_token(OTHER)
        yield running


@pytest.mark.parametrize("token, found, mend", [
    (None, "is gated", "hf auth login"), (OTHER, "needs its licence accepted", "accept the licence")])
def test_a_model_that_may_not_be_read(cli, hub, monkeypatch, tmp_path, token, found, mend):
    hub.isolate(monkeypatch, tmp_path / "home", token=token)
    for name in ("engine", "go"):
        monkeypatch.setattr(around, name, lambda: [])
    result = cli("doctor", "--model", ID, "--json")
    checks = by_check(result)
    assert result.code == 1 and checks["model"]["state"] == "broken"
    assert found in checks["model"]["found"] and mend in checks["model"]["mend"]
    assert checks["hub"]["state"] == "ok", "the Hub itself answers"
    assert ("logged in as tester" if token else "not logged in") in checks["hub"]["found"]
    assert token is None or token not in result.out + result.err


def test_a_model_that_may_be_read_is_not_downloaded(cli, hub, monkeypatch, tmp_path):
    hub.isolate(monkeypatch, tmp_path / "home", token=GOOD)
    for name in ("engine", "go"):
        monkeypatch.setattr(around, name, lambda: [])
    result = cli("doctor", "--model", ID, "--json")
    assert result.code == 0, result.err
    checks = by_check(result)
    assert "its weights are downloaded by the first command" in checks["model"]["found"]
    assert "for the download and a run" in checks["disk"]["found"]
    assert not hub.paths("GET", ".safetensors"), "no weights"


@pytest.mark.parametrize("how", ["asked", "forbidden", "fails", "by commit"])
def test_that_an_account_may_read_a_model_is_not_said_where_nobody_is_asked(hub, monkeypatch, tmp_path, how):
    hub.isolate(monkeypatch, tmp_path / "home", token=GOOD)
    monkeypatch.setattr(access, "_WAITS", ())
    monkeypatch.setattr(model, "base_licence", lambda _: {"license": "gemma"})
    commit = locate(ID, None, Listener()).revision
    if how == "forbidden":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if how == "fails":
        hub.fail("api/models", 503)
    licence = [*model.had(locate(ID, commit if how == "by commit" else None, Listener(), weights=False))][-1]
    assert licence.found == ("gemma, and this account may read it" if how == "asked" else "gemma")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    with LoopbackHub() as gone:
        gone.isolate(monkeypatch, tmp_path / "home")
    from gemma_tune.doctor.finding import LOOK, tried

    [found] = tried("hub", around.hub, LOOK)
    assert found.state == "look" and "cannot be reached" in found.found and "HF_ENDPOINT" in found.mend


# --- what else it talks to

def test_ollama_and_its_version(monkeypatch):
    from gemma_tune.doctor.finding import LOOK, tried

    with LoopbackOllama() as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        [found] = around.ollama("gemma3_text")
        assert found.state == "ok" and server.version in found.found
    with LoopbackOllama(version="0.5.6") as server:
        monkeypatch.setenv("OLLAMA_HOST", server.url)
        [found] = tried("ollama", lambda: around.ollama("gemma3_text"), LOOK)
        assert found.state == "look" and "too old for gemma3_text" in found.found and "Update Ollama" in found.mend


def test_llama_cpp_is_really_started(monkeypatch, tmp_path):
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\necho cannot find libggml.so >&2\nexit 127\n")
    server.chmod(0o755)
    monkeypatch.setattr(around, "find_engine", lambda: f"llama-server {server}")
    [found] = around.engine()
    assert found.state == "look" and "cannot find libggml.so" in found.found and found.mend
    server.write_text("#!/bin/sh\necho version 1\n")
    assert [one.state for one in around.engine()] == ["ok"]
    monkeypatch.setattr(around, "find_engine", lambda: None)
    assert [one.state for one in around.engine()] == ["look"]


def test_addresses_are_shown_without_passwords(cli, monkeypatch):
    for name in ("hub", "engine", "go", "ollama"):
        monkeypatch.setattr(around, name, lambda *_: [])
    secret = "s3cretword"
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:{secret}@proxy.example:8080/{secret}")
    monkeypatch.setenv("PIP_INDEX_URL", f"https://{secret}@mirror.example/{secret}/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"https://a.example/simple https://u:{secret}@b.example/simple")
    result = cli("doctor", "--json")
    assert result.code == 0 and secret not in result.out + result.err
    for said in ("HTTPS_PROXY=http://proxy.example:8080/…", "PIP_INDEX_URL=https://mirror.example/…",
                 "PIP_EXTRA_INDEX_URL=https://a.example/… https://b.example/…"):
        assert said in result.err


@pytest.mark.parametrize("address", ["nonsense://proxy.example:1", "http://proxy.example:port", "http://[::1"])
def test_a_proxy_that_cannot_be_used_is_broken(monkeypatch, address):
    monkeypatch.setenv("ALL_PROXY", address)
    found = [*around.network()][-1]
    assert (found.check, found.state, found.mend) == ("proxy", "broken", "correct or unset the variable")


@pytest.mark.parametrize(("name", "content"), [("nowhere.pem", None), ("empty.pem", ""), ("folder", "/")])
def test_certificates_that_cannot_be_read_are_broken_and_named(cli, monkeypatch, tmp_path, name, content):
    path = tmp_path / name
    if content == "/":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    found = [*around.network()][-1]
    assert (found.check, found.state) == ("certificates", "broken") and f"of SSL_CERT_FILE={path} cannot be read" in found.found
    assert "unset SSL_CERT_FILE" in found.mend
    for mend in (lambda: monkeypatch.delenv("SSL_CERT_FILE"), lambda: monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path))):
        mend()
        assert all(one.state == "ok" for one in around.network())


# --- libraries

def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(line.split("==") for line in (ROOT / ".ci/constraints.txt").read_text().splitlines() if "==" in line)
    assert {name: pinned[name] for name in libraries.TESTED} == libraries.TESTED


@pytest.mark.parametrize("version, state, said", [
    (None, "broken", "not installed: "), ("0.1", "broken", "torch 0.1, at least"),
    ("99.0", "look", "torch 99.0 (2.13.0)"), ("2.13.0+cpu", "ok", "the versions that were tested together")])
def test_versions_are_compared(monkeypatch, version, state, said):
    monkeypatch.setattr(libraries, "_required", lambda: {"torch": libraries.Requirement("torch>=2.13.0")})
    monkeypatch.setattr(libraries, "_version", lambda name: version if name == "torch" else libraries.TESTED.get(name))
    found = list(libraries.libraries())
    assert (found[0].state, said in found[0].found) == (state, True), found
    assert state == "ok" or "torch" in found[0].mend


def test_a_package_that_is_missing_ends_the_examination(cli, monkeypatch):
    real = libraries._version
    monkeypatch.setattr(libraries, "_version", lambda name: None if name == "peft" else real(name))
    result = cli("doctor", "--json")
    assert result.code == 1
    assert [one["check"] for one in result.json["checks"]] == ["python", "libraries"]
    assert re.search(r"pip install '?peft", result.json["checks"][1]["mend"])
