"""Rows of datasets on the Hugging Face Hub, through ``datasets``: ``hf:org/name[/config][:split][@revision]``.

One commit is read. A small lock file keeps which one that was: it identifies the data, and it is what counts without
a connection. ``datasets`` is imported inside functions, because it is slow to import and most people read files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gemma_tune import __version__
from gemma_tune.base.errors import UserError
from gemma_tune.base.files import os_errors, write_json
from gemma_tune.base.listener import Listener
from gemma_tune.base.secrets import redact
from gemma_tune.base.words import counted
from gemma_tune.data.reading.arrow_rows import ArrowBlock, arrow_blocks
from gemma_tune.data.reading.rows import BLOCK, HUB, Source
from gemma_tune.hub import access as hub_access

PREFIX = "hf:"
_FORM = "write it as hf:org/name[/config][:split][@revision], such as hf:tatsu-lab/alpaca:train"
_NAME = re.compile(r"hf:(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:@]+))?(?::(?P<split>[^@]+))?(?:@(?P<revision>\S+))?",
                   re.ASCII)


@dataclass(frozen=True)
class PinnedDataset:
    """What the lock file holds: which rows of which commit."""

    id: str
    config: str
    split: str
    commit: str


def find(name: str, keep: Path, listener: Listener) -> Source:
    """Resolve a dataset's name to a commit, config and split, download it, and write its lock file into ``keep``.

    Raises:
        UserError: not such a name, no such dataset, config or split, or no access; ``HubError`` where the Hub refuses.
    """
    asked = _NAME.fullmatch(name)
    if not asked or not hub_access.MODEL_ID.fullmatch(asked["id"]):
        raise UserError(f"{name!r} does not name a dataset on the Hub", _FORM)
    path = _lock_file(name, asked["id"], keep)
    request = hub_access.request_for(asked["id"], asked["revision"])
    # Datasets have their address below datasets/; so this also is what errors call it.
    request = replace(request, id=f"datasets/{request.id}")
    hub_access.require_home(request, _cache())
    known = _read(path)
    with _quiet():
        lock = _resolved(request, asked, known, listener)
        rows = _explained(request, lambda: _load(lock)).num_rows
    shown = f"{PREFIX}{lock.id}{'/' + asked['config'] if asked['config'] else ''}:{lock.split}"
    listener.note(f"{shown}: {counted(rows, 'row')} of commit {lock.commit[:12]}")
    if lock != known:
        with os_errors(keep):
            keep.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(lock))
    return Source(shown, path, HUB)


def _lock_file(name: str, id: str, keep: Path) -> Path:
    # Names that differ only in signs, such as train[:90%] and train[90%:], must not share a file: the second would be
    # taken for the first.
    more = "" if name == PREFIX + id else f"-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return keep / (re.sub(r"[^\w.-]+", "-", f"hf-{name.removeprefix(PREFIX)}", flags=re.ASCII) + f"{more}.json")


def blocks(source: Source, size: int = BLOCK) -> Iterator[ArrowBlock]:
    """All rows of the commit that the source's lock file names; from the cache where they are there.

    Raises:
        UserError: no lock file, or the commit cannot be had.
    """
    lock = _read(source.path)
    if lock is None:
        raise UserError(f"{source.path} does not name a dataset's commit", "delete it and run the same command again")
    request = replace(hub_access.request_for(lock.id, lock.commit), id=f"datasets/{lock.id}")
    with _quiet():
        table = _explained(request, lambda: _load(lock)).with_format("arrow")
    count = max(1, min(10_000, size * max(1, table.num_rows) // max(1, table.data.nbytes)))
    batches = (batch for part in table.iter(count) for batch in part.combine_chunks().to_batches())
    yield from arrow_blocks(source.name, table.num_rows, batches, size)


def _read(path: Path) -> PinnedDataset | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return PinnedDataset(**json.loads(path.read_text(encoding="utf-8")))
    return None


def _resolved(request: Any, asked: re.Match[str], known: PinnedDataset | None, listener: Listener) -> PinnedDataset:
    """Ask once which commit the revision is; without an answer, the commit of before."""
    from huggingface_hub import HfApi, constants

    try:
        if variable := hub_access.offline_wanted():
            raise _about_data(hub_access.hub_error("forbidden", request, variable))
        request = replace(request, token=hub_access.token_for(request))
        api = HfApi(endpoint=request.endpoint, library_name="gemma-tune", library_version=__version__)
        info = _explained(request, lambda: hub_access.patiently(lambda: api.dataset_info(
            asked["id"], revision=asked["revision"], timeout=constants.HF_HUB_ETAG_TIMEOUT)))
        if info.gated:  # later, datasets would hide what the Hub says
            _explained(request, lambda: hub_access.patiently(lambda: api.auth_check(asked["id"], repo_type="dataset")))
    except hub_access.HubError as failure:
        if known is None or failure.kind not in ("offline", "server"):
            raise
        listener.note(f"{failure.message}; commit {known.commit[:12]} is used, as before")
        return known
    if known is not None and known.commit == info.sha:
        return known
    return _explained(request, lambda: _chosen(asked, info.sha))


def _chosen(asked: re.Match[str], commit: str) -> PinnedDataset:
    """Config and split where none was given: what there is only one of, or the usual one."""
    import datasets

    place = f"hf://datasets/{asked['id']}"  # without the scheme, a folder of that name would be read instead
    config = datasets.load_dataset_builder(place, asked["config"], revision=commit).config.name
    splits = [str(s) for s in datasets.get_dataset_split_names(place, config, revision=commit)]
    split = asked["split"] or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    wanted = re.split(r"[\[+]", split)[0]  # datasets takes train[:10%] and train+test
    if wanted not in splits:
        what = f"has no split {wanted!r}" if wanted else "has no split `train`"
        raise UserError(f"hf:{asked['id']} {what}, only {', '.join(splits)}",
                        f"name one: hf:{asked['id']}{'/' + asked['config'] if asked['config'] else ''}:{splits[0]}")
    return PinnedDataset(asked["id"], config, split, commit)


def _load(lock: PinnedDataset) -> Any:
    """The rows as a memory-mapped ``datasets.Dataset``, without asking the Hub if this commit is in the cache."""
    import datasets

    if cached := _cached(lock):
        return cached
    table = datasets.load_dataset(f"hf://datasets/{lock.id}", lock.config, split=lock.split, revision=lock.commit)
    # Without a connection, datasets takes whatever commit it has, with a warning.
    if not all(lock.commit in file["filename"] for file in table.cache_files):
        raise ConnectionError(f"commit {lock.commit} is not in the cache")
    return table


def _cached(lock: PinnedDataset) -> Any:
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, name = lock.id.split("/")
    root = _cache() / f"{owner}___{camelcase_to_snakecase(name)}" / lock.config
    for folder in root.glob(f"*/{lock.commit}"):
        if (folder / "dataset_info.json").is_file():
            builder = Cache(repo_id=lock.id, dataset_name=name, config_name=lock.config, version=folder.parent.name,
                            hash=lock.commit)
            return builder.as_dataset(split=lock.split)
    return None


def _cache() -> Path:
    """Where datasets are kept once they are read."""
    from datasets import config

    return Path(os.path.expanduser(config.HF_DATASETS_CACHE))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log lines and progress bars of both libraries off the terminal."""
    from datasets import utils
    from datasets.utils import logging as their_logging

    before, bars = their_logging.get_verbosity(), utils.are_progress_bars_disabled()
    their_logging.set_verbosity(logging.CRITICAL)
    utils.disable_progress_bars()
    try:
        with hub_access.quietly():
            yield
    finally:
        their_logging.set_verbosity(before)
        if not bars:
            utils.enable_progress_bars()


def _explained(request: Any, work: Any) -> Any:
    """Do the work and turn both libraries' exceptions into ours."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:
        failure = _explain(error, request)
    raise failure  # theirs may quote what was sent, with the token in it


def _explain(error: BaseException, request: Any) -> UserError:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError
    from datasets.inspect import SplitsNotFoundError
    from huggingface_hub import errors

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in chain:
        if isinstance(one, (errors.HTTPError, errors.HfHubHTTPError, ConnectionError, TimeoutError)) \
                or getattr(one, "errno", None) and not isinstance(one, FileNotFoundError):
            failure = hub_access.explain(one, request)
            if failure is not None:
                failure.detail = redact(f"{type(one).__name__}: {one}")
                return _about_data(failure)
    reason = hub_access.one_line(str(chain[0]) or type(chain[0]).__name__)
    name = PREFIX + request.id.removeprefix("datasets/")
    page = f"{request.endpoint}/{request.id}"
    if isinstance(error, (DataFilesNotFoundError, EmptyDatasetError, SplitsNotFoundError)):
        return UserError(f"{name} holds no data files that can be read", f"choose another dataset, or see {page}")
    if "config" in reason.lower() and isinstance(error, ValueError):
        return UserError(f"{name}: {reason}", f"name the config: {name}/CONFIG; see {page}")
    if "scripts are no longer supported" in reason:
        return UserError(f"{name} is made by a program, which gemma-tune does not run",
                         f"look for a copy as files, such as {name}@refs/convert/parquet, or see {page}")
    causes = "; ".join(dict.fromkeys(hub_access.one_line(str(e)) for e in (chain[0], chain[-1])))
    return UserError(f"{name} cannot be loaded: {causes}", f"download the files you need from {page} and name them")


def _about_data(failure: hub_access.HubError) -> hub_access.HubError:
    """The same error with hints that are about data, not about models."""
    failure.hint = re.sub(r"; `--model demo`[^;]*", "", failure.hint or "").replace("another model", "another dataset")
    return failure
