"""``gemma_tune.hub.download`` against a loopback Hub: pinning, what is downloaded, work without a Hub, every failure kind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError
from gemma_tune.hub import access as hub_access
from gemma_tune.hub import download as hub_module
from gemma_tune.hub.access import HubError, redact
from gemma_tune.hub.download import fetch_model
from support.command import ROOT
from support.hub import LoopbackHub

ID = "google/tiny-gemma"
GOOD, OTHER, BAD = "hf_" + "G" * 34, "hf_" + "O" * 34, "hf_" + "B" * 34
Fetch = Callable[..., hub_access.HubModel]


def write_model(folder: Path, *, shards: int = 2, value: float = 1.0, side: int = 16) -> Path:
    """A folder that looks like a model's repository, and holds what must not be downloaded as well."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["model.safetensors"] if shards == 1 else [f"model-{n + 1:05}-of-{shards:05}.safetensors"
                                                       for n in range(shards)]
    for number, name in enumerate(names):
        save_file({f"layer.{number}": numpy.full((side, side), value, numpy.float32)}, folder / name)
    if shards > 1:
        weight_map = {f"layer.{number}": name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "value": value}))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                 "added_tokens.json", "preprocessor_config.json", "processor_config.json"):
        (folder / name).write_text("{}")
    for name in ("tokenizer.model", "chat_template.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"):
        (folder / name).write_text(name)
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tool_use")
    for name in ("additional_chat_templates/x.py", "pytorch_model.bin", "model.pt", "x.pth", "x.ckpt", "tf_model.h5", "model.onnx", "model.gguf",
                 "modeling_gemma.py", "consolidated.00.pth", "consolidated.safetensors", "adapter_model.safetensors",
                 "vocab.bin", "training.pkl", "notes.txt", "onnx/model.safetensors", "onnx/config.json"):
        (folder / name).write_text("must stay where it is")
    return folder


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "repository")


@pytest.fixture
def visit(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Become a visitor of the hub: own HF_HOME, this token or none; waiting takes no time."""
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))

    def become(token: str | None = None, home: str = "home", **more: str) -> None:
        hub.isolate(monkeypatch, tmp_path / home, token=token, **more)

    become()
    return become


def failure(model_id: str = ID, revision: str | None = None) -> HubError:
    """The error that fetching ends with, which must be fit to be shown."""
    with pytest.raises(HubError) as caught:
        fetch_model(model_id, revision)
    error = caught.value
    assert isinstance(error, UserError) and error.hint
    assert error.__cause__ is None
    shown = "".join(traceback.format_exception(error)) + f"{error.message}{error.hint}{error.detail}{error!r}"
    assert not [token for token in (GOOD, OTHER, BAD) if token in shown]
    return error


def cached_files(path: str) -> set[str]:
    return {file.relative_to(path).as_posix() for file in Path(path).rglob("*") if file.is_file()}


# ---- what is downloaded ----------------------------------------------------------------------------------------------

def test_a_public_model_is_fetched_whole_and_without_what_runs_code(hub, folder, visit):
    commit = hub.add_repo(ID, folder)
    model = fetch_model(ID)
    assert (model.id, model.revision, model.from_cache) == (ID, commit, False)
    assert cached_files(model.path) == {
        "config.json", "generation_config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
        "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "processor_config.json",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE", "NOTICE.txt", "USE_POLICY.md",
        "README.md"}
    for name in cached_files(model.path):
        assert (Path(model.path) / name).read_bytes() == (folder / name).read_bytes()


def test_every_download_names_the_commit_and_the_branch_is_asked_once(hub, folder, visit):
    commit = hub.add_repo(ID, folder)
    fetch_model(ID)
    assert all(f"/resolve/{commit}/" in path for path in hub.paths(containing="/resolve/"))
    assert len(hub.paths(containing="/api/")) == 1


def test_a_branch_that_moves_during_the_download_does_not_mix_commits(hub, folder, visit, tmp_path):
    first = hub.add_repo(ID, folder)
    newer = write_model(tmp_path / "newer", value=2.0)
    moved = threading.Event()

    def move(method: str, path: str) -> None:
        if "tokenizer.json" in path and not moved.is_set():
            moved.set()
            hub.commit(ID, newer)

    hub.on_request = move
    model = fetch_model(ID)
    assert moved.is_set() and model.revision == first
    assert json.loads((Path(model.path) / "config.json").read_text())["value"] == 1.0
    for shard in folder.glob("model-*.safetensors"):
        assert (Path(model.path) / shard.name).read_bytes() == shard.read_bytes()
    hub.on_request = None
    again = fetch_model(ID)
    assert again.revision != first and json.loads((Path(again.path) / "config.json").read_text())["value"] == 2.0


def test_branches_tags_and_commits_are_resolved(hub, folder, visit, tmp_path):
    first = hub.add_repo(ID, folder)
    hub.tag(ID, "v1", first)
    side = hub.commit(ID, write_model(tmp_path / "side", value=3.0), branch="refs/pr/1")
    assert fetch_model(ID, "v1").revision == first
    assert fetch_model(ID, "refs/pr/1").revision == side
    assert fetch_model(ID, side).revision == side


def test_a_second_call_asks_once_and_downloads_nothing(hub, folder, visit):
    hub.add_repo(ID, folder)
    first = fetch_model(ID)
    before = len(hub.requests)
    assert fetch_model(ID) == first
    assert len(hub.requests) == before + 1


def test_a_cached_commit_needs_no_request(hub, folder, visit):
    commit = hub.add_repo(ID, folder)
    fetch_model(ID)
    before = len(hub.requests)
    model = fetch_model(ID, commit)
    assert model.revision == commit and model.from_cache and len(hub.requests) == before


def test_a_renamed_repository_is_followed(hub, folder, visit):
    commit = hub.add_repo("google/old-name", folder)
    hub.rename("google/old-name", ID)
    model = fetch_model("google/old-name")
    assert (model.id, model.revision) == ("google/old-name", commit)


@pytest.fixture
def small_chunks(monkeypatch) -> int:
    """The library hands bytes on in pieces of 10 MB; smaller ones do for smaller files."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    return 4096


def test_progress_ends_with_every_file_whole_and_nothing_is_printed(hub, visit, tmp_path, capfd, small_chunks):
    hub.add_repo(ID, write_model(tmp_path / "repository", side=64))  # 16 KB a shard
    calls: list[tuple[str, int, int]] = []
    model = fetch_model(ID, on_progress=lambda *call: calls.append(call))
    last = {name: (done, total) for name, done, total in calls}
    assert last == {name: (size, size) for name in cached_files(model.path)
                    for size in [(Path(model.path) / name).stat().st_size]}
    assert all(0 <= done <= total for _, done, total in calls)
    shard = [call for call in calls if call[0] == "model-00001-of-00002.safetensors"]
    assert len(shard) > 4 and shard == sorted(shard)
    again: list[tuple[str, int, int]] = []
    fetch_model(ID, on_progress=lambda *call: again.append(call))
    assert {name: (done, total) for name, done, total in again} == last and len(again) == len(last)
    assert capfd.readouterr() == ("", "")


def test_progress_of_a_download_through_xet(capfd):
    """The loopback Hub has no Xet storage; its reporter, which drives the same class, is there to be asked."""
    from types import SimpleNamespace

    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    calls: list[tuple[str, int, int]] = []
    reporter = hub_module._reporter(hub_module._File("x", 10, None), lambda *call: calls.append(call))
    with XetDownloadProgressReporter(reconstruction_desc="x", total=10, log_level=30, tqdm_class=reporter) as bars:
        for done in (4, 10):
            bars.update_progress(SimpleNamespace(
                total_bytes=10, total_bytes_completed=done, total_transfer_bytes_completed=done // 2,
                total_bytes_completion_rate=1.0, total_transfer_bytes_completion_rate=None))
    assert calls == [("x", 4, 10), ("x", 10, 10)]
    reporter(total=10).update(11)
    assert calls[-1] == ("x", 10, 10)
    assert capfd.readouterr() == ("", "")


def test_an_interrupted_download_stops_at_once_and_the_rest_comes_later(hub, folder, visit):
    hub.add_repo(ID, folder)

    def stop(name: str, done: int, total: int) -> None:
        if name.endswith("00001-of-00002.safetensors"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_model(ID, on_progress=stop)
    assert not hub.paths(containing="00002-of-00002")
    hub.requests.clear()
    assert not hub_module._missing(Path(fetch_model(ID).path))
    assert not hub.paths(containing="config.json")


# ---- weights later ---------------------------------------------------------------------------------------------------

def test_without_weights_everything_else_comes_and_the_weights_come_later(hub, folder, visit):
    commit = hub.add_repo(ID, folder)
    light = fetch_model(ID, weights=False)
    assert (light.revision, light.from_cache) == (commit, False)
    assert {"config.json", "tokenizer.json", "tokenizer.model", "model.safetensors.index.json"} <= cached_files(light.path)
    assert not hub.paths(containing="of-00002.safetensors")
    hub.requests.clear()
    (Path(light.path) / "tokenizer_config.json").unlink()  # as after a download that stopped early
    assert not fetch_model(ID, commit, weights=False).from_cache, "what else there is, only the Hub knows"
    assert "tokenizer_config.json" in cached_files(light.path)
    assert not hub.paths(containing="of-00002.safetensors")
    hub.requests.clear()
    whole = fetch_model(ID, commit)
    assert (whole.path, whole.from_cache) == (light.path, False)
    assert {path.rsplit("/", 1)[1] for path in hub.paths(containing="/resolve/")} == {
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_a_copy_without_weights_is_whole_only_for_those_who_need_none(hub, folder, go_offline):
    commit = hub.add_repo(ID, folder)
    fetch_model(ID, weights=False)
    go_offline()
    for revision in (None, "main", commit):
        assert fetch_model(ID, revision, weights=False).revision == commit
        error = failure(revision=revision)
        assert error.kind == "offline" and "lacks model-00001-of-00002.safetensors" in error.message


def test_a_newer_commit_without_weights_does_not_take_the_place_of_a_whole_one(hub, folder, go_offline, tmp_path):
    whole = hub.add_repo(ID, folder)
    fetch_model(ID)
    newer = hub.commit(ID, write_model(tmp_path / "newer", value=2.0))
    assert fetch_model(ID, weights=False).revision == newer
    go_offline()
    for revision in (None, "main"):
        assert fetch_model(ID, revision).revision == whole
        assert fetch_model(ID, revision, weights=False).revision == whole, "later the weights will be needed"
    assert fetch_model(ID, newer, weights=False).revision == newer


def test_offline_a_whole_copy_is_preferred_to_the_branch_without_weights(hub, folder, go_offline, tmp_path):
    whole = hub.add_repo(ID, folder)
    fetch_model(ID, whole)  # by its commit, so that no branch is known to be at it
    newer = hub.commit(ID, write_model(tmp_path / "newer", value=2.0))
    assert fetch_model(ID, weights=False).revision == newer
    go_offline()
    assert fetch_model(ID).revision == fetch_model(ID, weights=False).revision == whole
    assert fetch_model(ID, "main", weights=False).revision == newer


def test_a_refused_licence_shows_without_weights_too(hub, folder, visit):
    hub.add_repo(ID, folder, gated=True)
    visit(hub.add_token(GOOD))
    with pytest.raises(HubError) as caught:
        fetch_model(ID, weights=False)
    assert caught.value.kind == "licence"


def test_a_repository_without_usable_weights_is_refused_before_they_are_needed(hub, folder, visit):
    for weights in folder.glob("model*.safetensors"):
        weights.unlink()
    hub.add_repo(ID, folder)
    with pytest.raises(HubError) as caught:
        fetch_model(ID, weights=False)
    assert caught.value.kind == "bad_repo" and "pickle" in caught.value.message


# ---- without the Hub -------------------------------------------------------------------------------------------------

@pytest.fixture(params=["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "no connection"])
def go_offline(request, hub, visit, monkeypatch) -> Callable[[], None]:
    """Take the network away in one of three ways, and fail the test when a request is made all the same."""
    def away() -> None:
        hub.requests.clear()
        if request.param == "no connection":
            monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
        else:
            visit(**{request.param: "1"})

    yield away
    assert not hub.requests


def test_a_cached_model_needs_no_hub(hub, folder, go_offline):
    commit = hub.add_repo(ID, folder)
    hub.tag(ID, "v1", commit)
    online = fetch_model(ID)
    fetch_model(ID, "v1")
    go_offline()
    for revision in (None, "main", "v1", commit):
        model = fetch_model(ID, revision)
        assert (model.revision, model.path, model.from_cache) == (commit, online.path, True)


def test_without_a_copy_the_message_says_what_to_do(hub, go_offline):
    go_offline()
    error = failure()
    assert error.kind == "offline" and error.exit_code == WORK_FAILED
    assert ID in error.message and "--model demo" in error.hint


def test_an_unknown_branch_is_not_replaced_by_another_commit(hub, folder, go_offline):
    hub.add_repo(ID, folder)
    fetch_model(ID)
    go_offline()
    assert failure(revision="v2").kind == "offline"


def test_a_missing_shard_makes_the_copy_not_whole(hub, folder, go_offline):
    commit = hub.add_repo(ID, folder)
    model = fetch_model(ID)
    shard = Path(model.path) / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()  # the blob; the link stays, as after a cleanup of blobs
    go_offline()
    for revision in (None, "main", commit):
        error = failure(revision=revision)
        assert error.kind == "offline" and "not whole" in error.message and shard.name in error.message


@pytest.mark.parametrize(("gone", "named"), [("config.json", "config.json"), ("token*", "the tokenizer"),
                                             ("model.safetensors.index.json", None)])
def test_other_gaps_in_the_copy(hub, folder, visit, gone, named):
    hub.add_repo(ID, folder)
    model = fetch_model(ID)
    for path in Path(model.path).glob(gone):
        path.unlink()
    visit(HF_HUB_OFFLINE="1")
    if named is None:  # shards without an index: nothing says that one is missing
        assert fetch_model(ID).from_cache
    else:
        assert named in failure().message


def test_a_broken_index_is_not_whole(hub, folder, visit):
    hub.add_repo(ID, folder)
    index = Path(fetch_model(ID).path) / "model.safetensors.index.json"
    index.unlink()
    index.write_text('{"weight_map": ')
    visit(HF_HUB_OFFLINE="1")
    assert "a readable model.safetensors.index.json" in failure().message


def test_online_a_gap_in_the_copy_is_filled(hub, folder, visit):
    hub.add_repo(ID, folder)
    model = fetch_model(ID)
    shard = Path(model.path) / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    hub.requests.clear()
    assert fetch_model(ID) == model
    assert shard.read_bytes() == (folder / shard.name).read_bytes()
    assert {path.rsplit("/", 1)[1] for path in hub.paths(containing="/resolve/")} == {shard.name}


def test_the_branch_stays_at_the_whole_commit_when_a_newer_one_fails_to_arrive(hub, folder, visit, tmp_path):
    first = hub.add_repo(ID, folder)
    fetch_model(ID)
    hub.commit(ID, write_model(tmp_path / "newer", value=2.0))
    hub.fail("00002-of-00002", 500, method="GET")
    assert failure().kind == "server"
    visit(HF_HUB_OFFLINE="1")
    assert fetch_model(ID).revision == first


def test_a_copy_that_only_a_commit_names_serves_a_call_without_revision(hub, folder, visit):
    commit = hub.add_repo(ID, folder)
    fetch_model(ID, commit)
    visit(HF_HUB_OFFLINE="1")
    assert fetch_model(ID).revision == commit


def test_a_whole_copy_serves_while_the_hub_is_down(hub, folder, visit):
    hub.add_repo(ID, folder)
    fetch_model(ID)
    hub.fail("/api/", 503)
    assert fetch_model(ID).from_cache


def test_the_endpoint_is_the_one_of_now_and_not_of_the_import(hub, folder, visit, monkeypatch):
    from huggingface_hub import constants

    hub.add_repo(ID, folder, gated=True)
    visit(hub.add_token(GOOD, accepted=[ID]))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/resolve/{revision}/"
                                                                  "{filename}")
    assert not fetch_model(ID).from_cache


def test_no_connection_names_the_endpoint_and_the_way_round(hub, visit, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:secret-word@127.0.0.1:9")
    error = failure()
    assert error.kind == "offline" and "127.0.0.1:9" in error.message and "HF_ENDPOINT is set" in error.hint
    assert "secret-word" not in error.message + error.hint + error.detail
    monkeypatch.delenv("HF_ENDPOINT")
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "set HF_ENDPOINT to a mirror" in failure().hint


# ---- who may ---------------------------------------------------------------------------------------------------------

def test_gated_without_a_token(hub, folder, visit):
    hub.add_repo(ID, folder, gated=True)
    error = failure()
    assert error.kind == "no_token" and error.exit_code == BAD_INPUT and "gated" in error.message
    assert "hf auth login" in error.hint and f"{hub.url}/{ID}" in error.hint
    assert not hub.paths(containing=".safetensors")


@pytest.mark.parametrize("name_missing", [False, True])
def test_an_id_that_nobody_may_see_without_a_token(folder, visit, name_missing, hub):
    hub.name_missing = name_missing
    hub.add_repo("someone/private", folder, private=True)
    for model_id in ("someone/private", "someone/nothing"):
        error = failure(model_id)
        assert error.kind == "no_token" and model_id in error.message
        assert "gated, private or misspelt" in error.message and f"{hub.url}/{model_id}" in error.hint
    assert "did you mean google/gemma-3-270m-it" in failure("google/gemma3-270m-it").hint


def test_a_gated_model_that_is_whole_in_the_cache_needs_no_token(hub, folder, visit):
    hub.add_repo(ID, folder, gated=True)
    visit(hub.add_token(GOOD, accepted=[ID]))
    model = fetch_model(ID)
    visit()
    assert fetch_model(ID) == model


def test_a_wrong_token(hub, folder, visit):
    hub.add_repo(ID, folder)
    hub.add_repo("google/gated-gemma", folder, gated=True)
    visit(BAD)
    for model_id in (ID, "google/gated-gemma", "someone/nothing"):
        error = failure(model_id)
        assert error.kind == "bad_token" and "HF_TOKEN" in error.message and "HF_TOKEN" in error.hint
        assert f"{hub.url}/settings/tokens" in error.hint


def test_a_gated_file_answers_a_wrong_token_like_none_and_whoami_decides(hub, folder, visit):
    """The metadata may come from a cache or a mirror that does not look at the token; only the file is refused."""
    hub.add_repo(ID, folder, gated=True)
    hub.add_token(GOOD)
    visit(GOOD)
    hub.on_request = lambda method, path: hub._tokens.pop(GOOD, None) if "/resolve/" in path else None
    assert failure().kind == "bad_token"
    assert hub.paths(containing="whoami")


def test_a_wrong_token_of_the_login(hub, folder, visit, tmp_path):
    hub.add_repo(ID, folder)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(BAD + "\n")
    error = failure()
    assert error.kind == "bad_token" and "the login" in error.message and "hf auth login --force" in error.hint


def test_a_token_that_no_header_can_carry(hub, folder, visit):
    hub.add_repo(ID, folder)
    for token, why in ((BAD + "…", "spaces or characters"), (BAD[:20] + " " + BAD[20:], "spaces or characters"), (f"'{BAD}'", "it stands in quotes")):
        visit(token)
        error = failure()
        assert error.kind == "bad_token" and token not in error.message + error.hint + error.detail and why in error.message
    assert not hub.requests


@pytest.mark.parametrize(("variable", "said"), [
    ("HUGGINGFACE_TOKEN", "HUGGINGFACE_TOKEN is set, and is not read: call it HF_TOKEN; "), ("HF_API_KEY", "HF_API_KEY is set"),
    ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN keeps the login from being used: unset it; ")])
def test_a_token_that_the_library_does_not_see_is_told(hub, folder, visit, monkeypatch, variable, said):
    from huggingface_hub import constants

    hub.add_repo(ID, folder, gated=True)
    hub.add_repo("someone/private", folder, private=True)
    for model_id in (ID, "someone/private"):
        assert said not in failure(model_id).hint
    visit(**{variable: GOOD})
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", "IMPLICIT" in variable)
    for model_id in (ID, "someone/private"):
        assert said in failure(model_id).hint and "hf auth login" in failure(model_id).hint


def test_the_login_is_used(hub, folder, visit, tmp_path):
    hub.add_repo(ID, folder, gated=True)
    hub.add_token(GOOD, accepted=[ID])
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text(GOOD)
    fetch_model(ID)
    assert {one.token for one in hub.requests} == {GOOD}


def test_the_licence_has_to_be_accepted(hub, folder, visit):
    hub.add_repo(ID, folder, gated=True)
    hub.add_token(GOOD, accepted=[ID])
    hub.add_token(OTHER)
    visit(OTHER)
    error = failure()
    assert error.kind == "licence" and error.exit_code == BAD_INPUT and f"{hub.url}/{ID}" in error.hint
    visit(GOOD)
    assert fetch_model(ID).id == ID


def test_a_token_without_the_right_to_gated_repositories(hub, folder, visit):
    hub.add_repo(ID, folder, gated=True)
    visit(hub.add_token(OTHER, accepted=[ID], gated_right=False))
    error = failure()
    assert error.kind == "token_scope" and "fine-grained" in error.message
    assert f"{hub.url}/settings/tokens" in error.hint


def test_not_found_with_a_token(hub, folder, visit):
    hub.add_repo("someone/private", folder, private=True)
    visit(hub.add_token(GOOD))
    for model_id in ("someone/private", "someone/nothing"):
        assert failure(model_id).kind == "not_found"
    for typo, meant in {"google/gemma-3-270-it": "google/gemma-3-270m-it", "google/gemma-3-4b": "google/gemma-3-4b-it",
                        "gemma-2-2b-it": "google/gemma-2-2b-it", "google/gemma4-E2B-it": "google/gemma-4-E2B-it",
                        "Google/Gemma-3-1B-it": "google/gemma-3-1b-it"}.items():
        error = failure(typo)
        assert error.kind == "not_found" and typo in error.message and meant in error.hint
    assert "did you mean" not in failure("someone/nothing").hint
    assert "did you mean" not in failure("google/gemma-3-1b-it").hint
    hub.add_token(GOOD, sees=["someone/private"])
    assert fetch_model("someone/private").id == "someone/private"


def test_a_name_of_ollamas_is_told_how_its_file_is_found(hub, visit):
    file = "of a model in Ollama, `ollama show --modelfile {}` names the GGUF file, which --model takes"
    for name in ("llama3.2", "phi4:14b", "gemma3:270m"):
        assert file.format(name) in failure(name).hint
    assert "an id is organisation/name" in failure("llama3.2").hint and "?;" not in failure("gemma3:270m").hint
    assert "library" not in failure("https://ollama.com/library/gemma3").hint


# ---- other failures --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model_id", ["", "a b", "a/b/c", "../x", "./runs", "/abs/path", "google/", "gemma3:270m",
                                      "a--b/c", "x" * 97, "google\\gemma", "google/gemma\n"])
def test_what_is_no_id(visit, hub, model_id):
    assert failure(model_id).kind == "bad_id"
    assert not hub.requests


def test_a_pasted_link_gives_the_id(visit):
    for link in ("https://huggingface.co/google/gemma-3-1b-it", "huggingface.co/google/gemma-3-1b-it/tree/main"):
        assert "--model google/gemma-3-1b-it`" in failure(link).hint
    for name in ("hf.co/acme/chat-GGUF:Q8_0", "hf:acme/chat-GGUF", "models--acme--chat-GGUF"):
        assert failure(name).hint == "use the id alone: `--model acme/chat-GGUF`"
    assert failure(f"{ID}@v2").hint == f"a revision is named by itself: --model {ID} --revision v2"
    assert "did you mean google/gemma-3-270m" in failure("gemma3:270m").hint
    assert "did you mean google/gemma-3-1b-" in failure("gemma3:1b").hint


def test_revisions_that_are_not_there(hub, folder, visit):
    hub.add_repo(ID, folder)
    for revision in ("v9", "0" * 40):
        error = failure(revision=revision)
        assert error.kind == "revision_not_found" and revision in error.message and ID in error.message
    requests = len(hub.requests)
    for revision in ("../../x", "", "a b", "/main"):
        assert failure(revision=revision).kind == "revision_not_found"
    assert len(hub.requests) == requests


@pytest.mark.parametrize(("names", "says"), [
    (["config.json", "pytorch_model.bin"], "pickle"),
    (["config.json", "model.gguf"], f"only GGUF files: `hf download {ID} model.gguf --local-dir .` brings one here"),
    (["adapter_config.json", "adapter_model.safetensors"], f"LoRA adapter: --model takes the model that it was made for, and `train --from-adapter {ID}`"),
    (["model.safetensors"], "config.json"),
    (["config.json", "onnx/model.safetensors"], "no safetensors"),
    ([], "no safetensors"),
])
def test_repositories_that_are_no_model(hub, visit, tmp_path, names, says):
    for name in names:
        path = tmp_path / "odd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "odd").mkdir(exist_ok=True)
    hub.add_repo(ID, tmp_path / "odd")
    error = failure()
    assert error.kind == "bad_repo" and says in error.message and error.exit_code == BAD_INPUT
    assert not hub.paths(containing="/resolve/")


def test_a_repository_without_one_of_its_shards(hub, folder, visit):
    (folder / "model-00002-of-00002.safetensors").unlink()
    hub.add_repo(ID, folder)
    error = failure()
    assert error.kind == "bad_repo" and "model-00002-of-00002.safetensors" in error.message


def test_a_disabled_repository(hub, folder, visit):
    hub.add_repo(ID, folder, disabled=True)
    error = failure()
    assert error.kind == "bad_repo" and "disabled" in error.message


@pytest.mark.parametrize(("part", "method"), [("/api/", None), ("tokenizer.json", "HEAD"),
                                              ("00001-of-00002", "GET")])
def test_a_passing_fault_of_the_server_is_survived(hub, folder, visit, part, method):
    hub.add_repo(ID, folder)
    hub.fail(part, 503, method=method, times=2)
    assert not hub_module._missing(Path(fetch_model(ID).path))


@pytest.mark.parametrize(("part", "method", "status"), [("/api/", None, 500), ("tokenizer.json", "HEAD", 503),
                                                        ("00001-of-00002", "GET", 502), ("/api/", None, 429)])
def test_a_lasting_fault_of_the_server(hub, folder, visit, part, method, status):
    hub.add_repo(ID, folder)
    hub.fail(part, status, method=method)
    error = failure()
    assert error.kind == "server" and error.exit_code == WORK_FAILED
    assert ID in error.message and hub.url in error.message
    hub.heal()
    fetch_model(ID)


def test_a_cut_connection_is_resumed(hub, visit, tmp_path, small_chunks):
    hub.add_repo(ID, write_model(tmp_path / "repository", side=64))
    hub.cut("00001-of-00002", 2 * small_chunks + 100)
    calls: list[tuple[str, int, int]] = []
    model = fetch_model(ID, on_progress=lambda *call: calls.append(call))
    name = "model-00001-of-00002.safetensors"
    assert (Path(model.path) / name).read_bytes() == (tmp_path / "repository" / name).read_bytes()
    ranges = [one.range for one in hub.requests if name in one.path and one.method == "GET"]
    assert ranges == [None, f"bytes={2 * small_chunks}-"]
    shard = [call for call in calls if call[0] == name]
    assert shard == sorted(shard) and shard[-1][1] == shard[-1][2] == (Path(model.path) / name).stat().st_size


def test_a_connection_that_is_always_cut_leaves_the_cache_consistent(hub, folder, visit, tmp_path):
    hub.add_repo(ID, folder)
    hub.cut("00002-of-00002", 0, times=None)
    error = failure()
    assert error.kind == "offline" and error.exit_code == WORK_FAILED and ID in error.message
    assert not list((tmp_path / "home").rglob("*.incomplete"))
    snapshot = next((tmp_path / "home" / "hub").glob("models--*/snapshots/*"))
    assert hub_module._missing(snapshot) == ["model-00002-of-00002.safetensors"]
    hub.heal()
    hub.requests.clear()
    assert not hub_module._missing(Path(fetch_model(ID).path))
    assert not hub.paths(containing="00001-of-00002")


def test_too_little_room_shows_before_the_weights_are_downloaded(hub, folder, visit, monkeypatch):
    hub.add_repo(ID, folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1500))
    error = failure()
    assert error.kind == "disk_full" and error.exit_code == WORK_FAILED and "HF_HOME" in error.hint
    assert not hub.paths(containing="of-00002.safetensors")


def test_cached_weights_need_no_room(hub, folder, visit, monkeypatch):
    hub.add_repo(ID, folder)
    fetch_model(ID)
    (folder / "README.md").write_text("a new commit with the same weights")
    newer = hub.commit(ID, folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1))
    assert fetch_model(ID).revision == newer


def test_a_disk_that_fills_up_while_writing(hub, folder, visit, monkeypatch):
    from huggingface_hub import file_download

    def full(url: str, temp_file, **_: object) -> None:
        if "00002-of-00002" in url:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(url, temp_file, **_)

    real = file_download.http_get
    monkeypatch.setattr(file_download, "http_get", full)
    hub.add_repo(ID, folder)
    error = failure()
    assert error.kind == "disk_full" and ID in error.message


@pytest.mark.skipif(os.name != "posix", reason="a file in the place of a folder")
def test_a_cache_that_cannot_be_written(hub, folder, visit, tmp_path):
    hub.add_repo(ID, folder)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "hub").write_text("a file where the folder should be")
    error = failure()
    assert error.kind == "cache" and "HF_HOME" in error.hint and str(tmp_path / "home" / "hub") in error.message


def test_certificates_that_cannot_be_read_are_no_matter_of_the_cache(hub, folder, visit, monkeypatch, tmp_path):
    from huggingface_hub import close_session

    hub.add_repo(ID, folder)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "nowhere.pem"))
    close_session()  # one that was opened has read them already
    error = failure()
    assert error.kind == "offline" and f"SSL_CERT_FILE={tmp_path / 'nowhere.pem'} cannot be read" in error.message
    assert "unset SSL_CERT_FILE" in error.hint and not hub.requests


def test_a_cache_in_a_home_that_is_not_known(hub, folder, visit, monkeypatch):
    import pwd

    from huggingface_hub import constants

    hub.add_repo(ID, folder)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    error = failure()
    assert (error.kind, error.exit_code) == ("cache", BAD_INPUT) and "set HF_HOME to a directory" in error.hint
    assert error.message == f"there is no place for {ID}: the home directory in ~/.cache/huggingface/hub is not known"
    assert not hub.requests and not Path("~").exists()


def test_an_endpoint_that_is_no_hub(hub, folder, visit, monkeypatch):
    hub.add_repo(ID, folder)
    hub.fail("/api/", 200)  # a page, as from a network that wants a login first
    assert failure().kind == "server"
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    error = failure()
    assert error.kind == "offline" and "not a web address" in error.message


def test_what_only_a_bug_explains_is_not_dressed_up(hub, folder, visit):
    hub.add_repo(ID, folder)

    def broken(name: str, done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fetch_model(ID, on_progress=broken)


# ---- what is shown ---------------------------------------------------------------------------------------------------

def test_redact(visit):
    visit("my-own-token")
    assert redact("a my-own-token b") == "a <token> b"
    assert redact(f"x {GOOD}.") == "x <token>."
    assert redact("hf_oauth_eyJh.bG-c_i and Bearer abc.d1-ef") == "<token> and Bearer <token>"
    assert redact("http://user:word@host/x") == "http://<token>@host/x"
    assert redact("hf_hub_download of hf_xet") == "hf_hub_download of hf_xet"


def test_a_text_of_the_server_is_one_line_without_tokens_and_control_characters():
    line = hub_access.one_line(f"a\n\x1b[31mred {'x' * 500}")
    assert "\n" not in line and "\x1b" not in line and len(line) <= 200
    error = HubError("server", f"said {GOOD}", f"try {BAD}", f"was {OTHER}")
    assert not [token for token in (GOOD, OTHER, BAD) if token in f"{error.message}{error.hint}{error.detail}{error}"]


def test_a_process_of_its_own_prints_nothing_and_imports_nothing_heavy(hub, folder, tmp_path):
    hub.add_repo(ID, folder, gated=True)
    hub.add_token(GOOD, accepted=[ID])
    hub.cut("tokenizer.model", 1)  # the library would log that it resumes
    script = ("import sys\nimport gemma_tune.hub.download as hub\nassert 'huggingface_hub' not in sys.modules\n"
              f"model = hub.fetch_model({ID!r})\n"
              "print(model.revision)\nassert not {'torch', 'transformers'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", script], env=hub.environment(tmp_path / "own", token=GOOD),
                          capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.strip()) == 40
    assert (tmp_path / "own" / "hub").is_dir()
    assert GOOD not in "".join(path.read_text(errors="ignore") for path in (tmp_path / "own").rglob("*")
                               if path.is_file())


def test_transformers_finds_the_fetched_files(hub, folder, visit):
    """The snapshot is the ordinary cache: huggingface_hub itself finds the branch there without a network."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    hub.add_repo(ID, folder)
    model = fetch_model(ID)
    found = try_to_load_from_cache(ID, "config.json")
    assert isinstance(found, str) and Path(found).parent == Path(model.path)
    assert Path(snapshot_download(ID, local_files_only=True)) == Path(model.path)
