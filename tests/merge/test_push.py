"""``gemma_tune.merge.push`` against a loopback Hub: what is uploaded, what is left out, every refusal, and going on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError
from gemma_tune.base.listener import Listener
from gemma_tune.hub.access import HubError
from gemma_tune.hub.push import _xet_reports
from gemma_tune.merge.push import check_push, push_folder
from support.listener import Said
from support.uploads import TOKEN

ID = "tester/tiny-tuned"
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md")


def write_merged(folder: Path, *, shards: int = 1, value: float = 1.0) -> Path:
    """A merged model's folder, with weights of some blocks' length."""
    folder.mkdir(parents=True)
    for name in SMALL:
        (folder / name).write_text(json.dumps({"name": name}))
    (folder / "README.md").write_text("---\nlibrary_name: transformers\nlicense: gemma\n---\n\n# Tuned\n")
    (folder / "tokenizer.model").write_bytes(b"pieces")
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)] if shards > 1 else ["model.safetensors"]
    for number, name in enumerate(names):
        save_file({"x": numpy.full((200, 400), value + number, numpy.float32)}, folder / name)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text("{}")
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return write_merged(tmp_path / "merged")


def failure(call: Callable[[], Any]) -> HubError:
    """The error that a push or a check ends with, fit to be shown: with a hint, without the token."""
    with pytest.raises(HubError) as caught:
        call()
    error = caught.value
    assert error.hint and error.__cause__ is None
    shown = "".join(traceback.format_exception(error)) + f"{error.message}{error.hint}{error.detail}"
    assert TOKEN not in shown
    return error


# ---- the command -----------------------------------------------------------------------------------------------------

def test_merge_pushes_what_it_made_and_says_where(cli, hub, visit, trained):
    result = cli("merge", "--run", trained, "--push", ID, "--json")
    assert result.code == 0, result.err
    there, merged = hub.files(ID), trained / "tiny-gemma_lora_merged"
    assert there.pop(".gitattributes") and there == contents(merged) and hub.is_private(ID)
    assert result.json["pushed"].startswith(f"{hub.url}/{ID}/commit/")
    assert b"LoRA of rank 4" in there["README.md"] and b"11 conversations, 1 more held out" in there["README.md"]
    assert TOKEN not in (trained / "manifest.json").read_text() + result.err
    hub.requests.clear()
    again = cli("merge", "--run", trained, "--push", ID, "--json")
    assert again.json["status"] == "up-to-date" and again.json["pushed"] == result.json["pushed"]
    assert not hub.paths("PUT")


def test_a_model_that_was_merged_before_names_the_repository(cli, hub, visit, trained):
    assert cli("merge", "--run", trained, "--no-check").code == 0
    assert b'name = "tiny-gemma_lora_merged"' in (trained / "tiny-gemma_lora_merged/README.md").read_bytes()
    for repo_id in (ID, f"{ID}-2"):
        result = cli("merge", "--run", trained, "--no-check", "--push", repo_id, "--json")
        assert result.json["status"] == "up-to-date"
        assert f'name = "{repo_id}"  #'.encode() in hub.files(repo_id)["README.md"]


def test_merge_asks_before_any_work(cli, hub, visit, trained):
    visit(role="read")
    result = cli("merge", "--run", trained, "--push", ID)
    assert result.code == BAD_INPUT and "of type Read" in result.err and "Traceback" not in result.err
    assert not (trained / "tiny-gemma_lora_merged").exists()


def test_a_push_that_breaks_off_leaves_the_merged_model_and_goes_on(cli, hub, visit, trained):
    hub.fail("/commit/", 503)
    result = cli("merge", "--run", trained, "--push", ID)
    assert result.code == WORK_FAILED and "run the same command again" in result.err
    hub.heal()
    hub.requests.clear()
    assert cli("merge", "--run", trained, "--push", ID, "--json").json["status"] == "up-to-date"
    assert not hub.paths("PUT") and "model.safetensors" in hub.files(ID)


# ---- what arrives ----------------------------------------------------------------------------------------------------

def test_a_new_repository_is_private_and_holds_the_folder(hub, visit, merged, capfd):
    said = Said()
    url = push_folder(merged, ID, said)
    assert hub.is_private(ID)
    there = hub.files(ID)
    assert there.pop(".gitattributes") and there == contents(merged)
    assert url.startswith(f"{hub.url}/{ID}/commit/") and len(url.rsplit("/", 1)[1]) == 40
    assert [path for path in hub.paths("POST") if "/commit/" in path] == [f"/api/models/{ID}/commit/main"]
    assert "private" in said.notes[0] and ID in said.notes[0]
    assert capfd.readouterr() == ("", "")


def test_the_token_goes_to_the_hub_and_not_to_the_storage(hub, visit, merged):
    push_folder(merged, ID, Listener())
    assert {one.token for one in hub.requests if one.method == "PUT"} == {None}
    assert {one.token for one in hub.requests if "/api/" in one.path} == {TOKEN}


def test_progress_is_in_bytes_and_only_grows(hub, visit, merged):
    said = Said()
    push_folder(merged, ID, said)
    total = sum(map(len, contents(merged).values()))
    done = [step[1] for step in said.steps]
    assert {(task, of) for task, _, of in said.steps} == {(f"pushing to {ID}", total)}
    assert done == sorted(set(done)) and done[-1] == total
    weights = (merged / "model.safetensors").stat().st_size
    assert len([one for one in done if total - weights < one < total]) >= 3, "within a file"


def test_hidden_files_links_and_manifests_stay_here(hub, visit, merged, tmp_path):
    wanted = contents(merged)
    (tmp_path / "secret.txt").write_text("secret")
    (merged / "link.txt").symlink_to(tmp_path / "secret.txt")
    (merged / ".cache").mkdir()
    for name in (".env", ".cache/x.json", "manifest.json"):
        (merged / name).write_text("private")
    push_folder(merged, ID, Listener())
    assert set(hub.files(ID)) == {*wanted, ".gitattributes"}


def test_public_only_where_it_is_asked_for(hub, visit, merged):
    push_folder(merged, ID, Listener(), private=False)
    assert not hub.is_private(ID)


@pytest.mark.parametrize("private", [True, False])
def test_an_existing_repository_keeps_its_visibility_and_its_other_files(hub, visit, merged, private):
    hub.create(ID, {"photo.png": b"png", "README.md": b"old"}, private=private)
    push_folder(merged, ID, Listener(), private=False)
    assert hub.is_private(ID) == private and not hub.paths(containing="repos/create")
    assert hub.files(ID) == contents(merged) | {"photo.png": b"png"}


def test_a_private_push_does_not_go_to_a_public_repository(hub, visit, merged):
    hub.create(ID, {"README.md": b"old"})
    for call in (lambda: push_folder(merged, ID, Listener()), lambda: check_push(ID, private=True)):
        error = failure(call)
        assert "everybody" in error.message and "--public" in error.hint and error.exit_code == BAD_INPUT
    check_push(ID)
    assert hub.files(ID) == {"README.md": b"old"} and not hub.uploads.stored


def test_a_second_push_sends_no_file_again(hub, visit, merged, capfd):
    first = push_folder(merged, ID, Listener())
    hub.requests.clear()
    said = Said()
    assert push_folder(merged, ID, said) == first
    assert not hub.paths("PUT") and not hub.paths("POST", "/commit/")
    assert said.steps[-1][1] == said.steps[-1][2]
    assert capfd.readouterr() == ("", "")


def test_only_what_changed_is_sent(hub, visit, merged):
    push_folder(merged, ID, Listener())
    (merged / "config.json").write_text("{}")
    save_file({"x": numpy.zeros((3, 3), numpy.float32)}, merged / "model.safetensors")
    hub.requests.clear()
    push_folder(merged, ID, Listener())
    assert len(hub.paths("PUT")) == 1
    assert hub.files(ID)["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert hub.files(ID)["config.json"] == b"{}"


def test_weights_of_an_earlier_push_do_not_stay_beside_the_new_ones(hub, visit, merged, tmp_path):
    hub.create(ID, {"model.safetensors": b"old", "added_tokens.json": b"old", "old/model.safetensors": b"theirs",
                    "additional_chat_templates/old.jinja": b"old", "demo.gguf": b"theirs"}, private=True)
    sharded, said = write_merged(tmp_path / "sharded", shards=2), Said()
    push_folder(sharded, ID, said)
    assert hub.files(ID) == contents(sharded) | {"old/model.safetensors": b"theirs", "demo.gguf": b"theirs"}
    assert any("added_tokens.json, additional_chat_templates/old.jinja, model.safetensors" in note for note in said.notes)


def test_a_renamed_repository_is_found_under_its_old_name(hub, visit, merged):
    hub.create("tester/older", {"README.md": b"old"}, private=True)
    hub.rename("tester/older", ID)
    assert f"/{ID}/commit/" in push_folder(merged, "tester/older", Listener())
    assert "model.safetensors" in hub.files(ID)


def test_a_folder_without_a_model_is_not_pushed(hub, visit, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds no model"):
        push_folder(tmp_path / "merged", ID, Listener())
    assert not hub.requests


# ---- may it be pushed? -----------------------------------------------------------------------------------------------

GRANTED = {
    "one's own account": {},
    "any case": {"user": "Tester"},
    "an organisation": {"user": "me", "orgs": {"tester": "write"}},
    "a contributor": {"user": "me", "orgs": {"tester": "contributor"}},
    "fine-grained, for the account": {"writes": ["tester"]},
    "fine-grained, for the repository": {"user": "me", "writes": [ID]},
}
REFUSED = {
    "a Read token": ({"role": "read"}, "of type Read"),
    "another account": ({"user": "me", "orgs": {"ours": "admin"}}, "me, is no member of tester"),
    "a reader of the organisation": ({"user": "me", "orgs": {"tester": "read"}}, "may only read in tester"),
    "fine-grained, for another repository": ({"writes": ["tester/other"]}, "fine-grained, without that right"),
    "fine-grained, for nothing": ({"writes": []}, "fine-grained, without that right"),
}


@pytest.mark.parametrize("case", GRANTED)
def test_who_may_push(hub, visit, case):
    visit(**GRANTED[case])
    check_push(ID)
    assert hub.paths("GET", "whoami") and not hub.paths("POST")


@pytest.mark.parametrize("case", REFUSED)
def test_who_may_not_push(hub, visit, merged, case):
    rights, reason = REFUSED[case]
    visit(**rights)
    error = failure(lambda: check_push(ID))
    assert error.kind == "token_scope" and reason in error.message and "settings/tokens" in error.hint
    before = contents(merged)
    assert failure(lambda: push_folder(merged, ID, Listener())).kind == "token_scope"
    assert contents(merged) == before and not hub.uploads.stored and ID not in hub._repos


@pytest.mark.parametrize("repo_id", ["tiny", "tester/a/b", "tester/a--b", "tester/", "../x", "tester/ü", "a/" + "b" * 97,
                                     "https://huggingface.co/tester/x", "datasets/tester/x", "tester/x.git", ""])
def test_names_that_cannot_be(hub, visit, repo_id):
    error = failure(lambda: check_push(repo_id))
    assert error.kind == "bad_id" and "--push my-account/my-model" in error.hint and not hub.requests


def test_without_a_token(hub, visit):
    visit(None)
    error = failure(lambda: check_push(ID))
    assert error.kind == "no_token" and "hf auth login" in error.hint and not hub.requests


def test_with_a_token_that_is_not_valid(hub, visit):
    visit("hf_" + "B" * 34)
    error = failure(lambda: check_push(ID))
    assert error.kind == "bad_token" and "HF_TOKEN" in error.message and "B" * 34 not in f"{error} {error.hint} {error.detail}"


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "no connection"])
def test_offline(hub, visit, monkeypatch, way):
    monkeypatch.setenv(*(("HF_ENDPOINT", "http://127.0.0.1:9") if way == "no connection" else (way, "1")))
    error = failure(lambda: check_push(ID))
    assert error.kind == "offline" and error.exit_code == WORK_FAILED and not hub.requests
    assert ("127.0.0.1:9 cannot be reached" if way == "no connection" else way) in error.message


@pytest.mark.parametrize(("status", "kind", "text"), [(503, "server", "503"), (429, "server", "too many requests")])
def test_a_hub_in_trouble(hub, visit, status, kind, text):
    hub.fail("whoami", status)
    error = failure(lambda: check_push(ID))
    assert error.kind == kind and text in error.message and error.exit_code == WORK_FAILED


def test_what_is_not_a_hub(hub, visit):
    hub.fail("whoami", 200)
    assert "does not answer like a Hugging Face Hub" in failure(lambda: check_push(ID)).message


def test_repositories_that_are_no_place_for_it(hub, visit, tmp_path):
    hub.create(ID, {"adapter_config.json": b"{}"}, private=True)
    assert "holds an adapter" in failure(lambda: check_push(ID)).message
    hub.create(ID, {}, private=True)
    hub._repos[ID].disabled = True
    assert "disabled" in failure(lambda: check_push(ID)).message


def test_a_name_that_is_taken_by_something_else(hub, visit, merged):
    hub.fail("repos/create", 409, message="You already created this repo")
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert error.kind == "not_found" and f"{ID} is not a model repository" in error.message


def test_a_repository_that_somebody_makes_meanwhile(hub, visit, merged):
    hub.on_request = lambda method, path: "repos/create" in path and hub.create(ID, {"x": b"x"}, private=True)
    push_folder(merged, ID, Listener())
    assert hub.files(ID) == contents(merged) | {"x": b"x"}


# ---- broken off ------------------------------------------------------------------------------------------------------

def test_a_connection_that_breaks_for_a_moment_is_not_noticed(hub, visit, merged):
    hub.cut("/storage/", after=100_000, method="PUT")
    said = Said()
    push_folder(merged, ID, said)
    assert len(hub.paths("PUT")) == 3 and [one.status for one in hub.requests if one.method == "PUT"].count(0) == 1
    assert hub.files(ID)["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    done = [step[1] for step in said.steps]
    assert done == sorted(set(done))


def test_a_broken_push_goes_on_where_it_stopped(hub, visit, tmp_path):
    merged = write_merged(tmp_path / "merged", shards=3)
    before = contents(merged)
    hub.cut(sha256(merged / "model-00002-of-00003.safetensors"), after=100_000, method="PUT", times=None)
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert error.kind == "offline" and error.exit_code == WORK_FAILED and "run the same command again" in error.hint
    assert set(hub.files(ID)) == {".gitattributes"}, "a commit names all files or none"
    assert contents(merged) == before
    hub.heal()
    hub.requests.clear()
    push_folder(merged, ID, Listener())
    assert len(hub.paths("PUT")) == 2, "the tokenizer and the first shard are there already"
    assert contents(merged) | {".gitattributes": hub.files(ID)[".gitattributes"]} == hub.files(ID)


def test_a_full_account(hub, visit, merged):
    hub.fail("lfs/objects/batch", 403, message="Private repository storage limit reached, please upgrade your plan")
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert error.kind == "quota" and "storage limit reached" in error.message and error.exit_code == WORK_FAILED


@pytest.mark.parametrize(("part", "status", "kind"), [
    ("/commit/", 403, "token_scope"), ("/commit/", 503, "server"), ("/preupload/", 429, "server"),
    ("/storage/", 403, "server"), ("/storage/", 500, "server"), ("validate-yaml", 500, "server")])
def test_refused_on_the_way(hub, visit, merged, part, status, kind):
    hub.fail(part, status, message="no")
    before = contents(merged)
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert error.kind == kind and ID in error.message
    assert set(hub.files(ID)) == {".gitattributes"} and contents(merged) == before


def test_the_commit_is_tried_again(hub, visit, merged):
    hub.fail("/commit/", 503, times=2)
    push_folder(merged, ID, Listener())
    assert "model.safetensors" in hub.files(ID)


def test_a_card_that_the_hub_does_not_take(hub, visit, merged):
    (merged / "README.md").write_text("---\nlicense: mine\n---\n")
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert "list of known licenses" in error.message and "merge --force" in error.hint
    assert not hub.paths("PUT"), "known before anything large is sent"


def test_ctrl_c_stops_at_once(hub, visit, tmp_path):
    merged = write_merged(tmp_path / "merged", shards=2)

    class Impatient(Listener):
        def progress(self, task: str, done: int, total: int) -> None:
            if done > 200_000:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push_folder(merged, ID, Impatient())
    assert sha256(merged / "model-00002-of-00002.safetensors") not in "".join(hub.paths("PUT"))
    push_folder(merged, ID, Listener())
    assert "model-00002-of-00002.safetensors" in hub.files(ID)


# ---- Xet, and what is imported ---------------------------------------------------------------------------------------

def test_progress_of_an_upload_through_xet(monkeypatch, capfd):
    """The loopback Hub has no Xet storage; the class that the library would look up is there to be asked."""
    from huggingface_hub.utils import _xet_progress_reporting as theirs
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    before, done = theirs.XetUploadProgressReporter, []
    disable_progress_bars()
    try:
        with _xet_reports(done.append):
            assert not are_progress_bars_disabled(), "the library asks for reports only then"
            reporter = theirs.XetUploadProgressReporter()
            reporter.update_progress(SimpleNamespace(total_bytes_completed=7), {})
            reporter.close()
        assert done == [7] and theirs.XetUploadProgressReporter is before and are_progress_bars_disabled()
    finally:
        enable_progress_bars()
    assert capfd.readouterr() == ("", "")


def test_a_storage_that_xet_cannot_reach(hub, visit, merged, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    error = failure(lambda: push_folder(merged, ID, Listener()))
    assert error.exit_code == WORK_FAILED and ID in error.message and "HF_HUB_DISABLE_XET=1" in error.hint
    assert any("xet-write-token" in path for path in hub.paths("GET"))


def test_importing_it_imports_nothing_heavy():
    script = ("import sys, gemma_tune.merge.push\n"
              "assert not {'huggingface_hub', 'torch', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
