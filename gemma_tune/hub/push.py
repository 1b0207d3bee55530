"""Files go to the Hugging Face Hub: asked before any work whether they may, then uploaded in one commit.

Files that arrived stay at the Hub, so the same command after a failure sends what is missing. ``huggingface_hub`` is
imported inside functions, because ``gemma-tune --help`` must not pay for it.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.base.listener import Listener
from gemma_tune.base.words import counted, size_text
from gemma_tune.hub.access import DISABLED, Request, hub_error, quietly
from gemma_tune.hub.push_access import api_for, ask, missing_right, push_request, uses_xet

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo


@dataclass(frozen=True)
class Parcel:
    """What is pushed, and which repository it is for.

    Attributes:
        make: the command that makes the files, for hints.
        message: of the commit.
        files: by their names in the repository; a README.md only where ``card`` makes none.
        unfit: why a repository is no place for them, as the end of a sentence; None if it is one.
        outdated: names of a repository's files that leave it with the commit.
        card: the text of README.md for a repository; None for files alone.
    """

    make: str
    message: str
    files: Mapping[str, Path]
    unfit: Callable[[ModelInfo], str | None]
    outdated: Callable[[ModelInfo], Iterable[str]]
    card: Callable[[ModelInfo], str] | None = None


def check_push(repo_id: str, make: str, unfit: Callable[[ModelInfo], str | None], *, private: bool = False) -> None:
    """Ask the Hub whether :func:`push` could push to ``repo_id``, as far as that can be told beforehand.

    Args:
        repo_id: ``account/name``.
        make, unfit: of the :class:`Parcel` to come.
        private: refuse a repository that is there and public.

    Raises:
        HubError: no, or nobody can be asked; ``kind`` says why.
    """
    request = push_request(repo_id, make)
    with quietly():
        api = api_for(request)
        if reason := missing_right(ask(request, lambda: api.whoami()), repo_id):
            raise hub_error("scope", request, reason)
        _check_repository(request, ask(request, lambda: _existing(api, repo_id)), unfit, private)


def push(parcel: Parcel, repo_id: str, listener: Listener, *, private: bool = True) -> str:
    """Upload files in one commit on ``main``, into a repository that is created where there is none.

    What is outdated by them leaves the repository in the same commit; everything else that is in it stays, and whether
    it is private.

    Args:
        repo_id: ``account/name``.
        private: who sees a repository that is created. One that is public already is refused.

    Returns:
        The commit's address.

    Raises:
        HubError: refused, or broken off; the same call continues where it stopped.
    """
    from huggingface_hub import CommitOperationDelete

    request = push_request(repo_id, parcel.make)
    with quietly(), tempfile.TemporaryDirectory() as place:
        api = api_for(request)
        info = ask(request, lambda: _repository(api, repo_id, private))
        _check_repository(request, info, parcel.unfit, private)
        request = replace(request, id=info.id)  # an old name leads to the repository that was renamed
        files = _with_card(parcel, info, Path(place))
        size = sum(path.stat().st_size for path in files.values())
        listener.note(f"pushing {counted(len(files), 'file')}, {size_text(size)}, to {request.endpoint}/{info.id}, "
                      f"which is {'private' if info.private else 'public'}")
        outdated = sorted({*parcel.outdated(info)} - files.keys())
        if outdated:
            listener.note(f"removing what earlier pushes left there: {', '.join(outdated)}")
        if "README.md" in files:
            ask(request, lambda: _check_card(request, files["README.md"]))
        additions = _upload(api, request, files, partial(listener.progress, f"pushing to {info.id}"))
        commit = ask(request, lambda: api.create_commit(
            info.id, [*additions, *(CommitOperationDelete(name, is_folder=False) for name in outdated)],
            commit_message=parcel.message))
    return commit.commit_url


def names_in(info: ModelInfo) -> set[str]:
    """Names of a repository's files."""
    return {one.rfilename for one in info.siblings or ()}


# ---- the repository -------------------------------------------------------------------------------------------------

def _existing(api: HfApi, repo_id: str) -> ModelInfo | None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise
        return None


def _repository(api: HfApi, repo_id: str, private: bool) -> ModelInfo:
    """The repository to push to. One that is there stays as it is, also if it is not private or public as wanted."""
    from huggingface_hub.errors import HfHubHTTPError

    if info := _existing(api, repo_id):
        return info
    try:
        api.create_repo(repo_id, private=private)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:  # the name was taken meanwhile, or is by something that is no model
            raise
    return api.model_info(repo_id, files_metadata=True)


def _check_repository(request: Request, info: ModelInfo | None, unfit: Callable[[ModelInfo], str | None],
                      private: bool) -> None:
    if info is None:
        return
    if info.disabled:
        raise hub_error("bad repo", request, DISABLED)
    if reason := unfit(info):
        raise hub_error("bad repo", request, reason)
    if private and not info.private:
        raise hub_error("public", request)


# ---- the upload ------------------------------------------------------------------------------------------------------

def _with_card(parcel: Parcel, info: ModelInfo, folder: Path) -> dict[str, Path]:
    """What is pushed, by its name in the repository; small files first, so that a refusal shows before hours of upload.
    """
    files = dict(parcel.files)
    if parcel.card:
        files["README.md"] = folder / "README.md"
        files["README.md"].write_text(parcel.card(info), encoding="utf-8", newline="\n")
    return dict(sorted(files.items(), key=lambda item: (item[1].stat().st_size, item[0])))


def _check_card(request: Request, card: Path) -> None:
    """Have the Hub check the card's header now; else it is refused only with the commit, after hours of upload."""
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    content = {"content": card.read_text(encoding="utf-8"), "repoType": "model"}
    hf_raise_for_status(get_session().post(f"{request.endpoint}/api/validate-yaml", json=content,
                                           headers=build_hf_headers(token=request.token)))


def _upload(api: HfApi, request: Request, files: Mapping[str, Path],
            progress: Callable[[int, int], None]) -> list[CommitOperationAdd]:
    """Bring the files that git does not hold itself to the Hub's storage, for a commit to name.

    One at a time, in this thread, so that Ctrl-C stops at once; what the Hub has is not sent again.
    """
    total = sum(path.stat().st_size for path in files.values())
    furthest = before = 0

    def report(done: int) -> None:  # a file that is sent once more begins anew
        nonlocal furthest
        if furthest < min(before + done, total):
            furthest = min(before + done, total)
            progress(furthest, total)

    additions = []
    for name, path in files.items():
        addition = ask(request, lambda name=name, path=path: _addition(name, path, report))
        with _xet_reports(report):
            ask(request, lambda one=addition: api.preupload_lfs_files(request.id, [one]))
        report(path.stat().st_size)
        before += path.stat().st_size
        additions.append(addition)
    return additions


class _Watched(io.BufferedReader):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, report: Callable[[int], None]):
        super().__init__(io.FileIO(path))
        self._report = report

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._report(self.tell())
        return data


def _addition(name: str, path: Path, report: Callable[[int], None]) -> CommitOperationAdd:
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        """A file whose upload over plain HTTP is reported, instead of shown on the library's own bar."""

        @contextlib.contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            with _Watched(path, report if with_tqdm else lambda _: None) as file:
                yield file

    return Addition(name, path)


@contextlib.contextmanager
def _xet_reports(report: Callable[[int], None]) -> Iterator[None]:
    """Get the reports of an upload through Xet, which the library only gives to bars of its own; no bar is shown.

    Where a version of it has their class elsewhere, progress goes from file to file.
    """
    from huggingface_hub import utils
    from huggingface_hub.utils import _xet_progress_reporting as theirs

    class Reporter:
        def update_progress(self, group: Any, _: Any) -> None:
            report(group.total_bytes_completed)

        def close(self) -> None:
            """Nothing is open."""

    bars, off = getattr(theirs, "XetUploadProgressReporter", None), utils.are_progress_bars_disabled()
    theirs.XetUploadProgressReporter = Reporter
    (utils.enable_progress_bars if uses_xet() else utils.disable_progress_bars)()
    try:
        yield
    finally:
        theirs.XetUploadProgressReporter = bars
        (utils.disable_progress_bars if off else utils.enable_progress_bars)()
