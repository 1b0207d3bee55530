"""A Hugging Face Hub on the loopback interface, for tests that need the answers a real one gives.

It serves repositories made from local folders, and refuses like the real Hub does: the statuses, headers and texts
below are the ones on record for huggingface.co. Everything is kept in memory, so repositories should be tiny.

    with LoopbackHub() as hub:
        hub.add_repo("google/tiny-gemma", folder, gated=True)
        hub.add_token("hf_accepted", accepted=["google/tiny-gemma"])
        hub.isolate(monkeypatch, tmp_path, token="hf_accepted")          # code in this process
        subprocess.run(command, env=hub.environment(tmp_path))           # code in another one, without a token
        ...
        assert hub.paths("GET") == [...]

A repository's access:
    public      everybody reads it.
    gated=True  everybody sees its metadata; its files need a token whose account accepted the licence.
                Without a token, or with a wrong one: 401 GatedRepo. Not accepted: 403 GatedRepo. A fine-grained token
                without that right: 403 and a text about token settings.
    private=True  only tokens with ``sees=[id]`` know that it exists.
    disabled=True  metadata says so; its files are refused.
A repository that does not exist, or may not be seen: 401 without a code for nobody, 404 RepoNotFound for somebody.
A wrong token: 401 "Invalid credentials in Authorization header" everywhere else.

Datasets: a repository whose id begins with ``datasets/`` (``add_repo("datasets/org/name", folder)``), as in its address;
``datasets.load_dataset`` works with it.

Writing (``loopback_uploads``): a token writes to its account's repositories, to those of ``orgs`` where its role is not
``read``, or with ``writes`` to the named accounts and repositories alone; ``role="read"`` writes nowhere. ``files`` and
``is_private`` tell what became of it.

Revisions: ``add_repo`` makes the first commit of ``main``; ``commit`` adds one and moves a branch; ``tag`` names one.
Faults: ``fail`` answers a status, ``cut`` breaks the connection in the middle of a file, down or up, ``on_request`` runs a function
before an answer (to move a branch while something is being downloaded). Every request is kept in ``requests``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from support.uploads import Uploads

LARGE = (".safetensors", ".bin", ".gguf", "tokenizer.model")  # names that the Hub keeps in LFS


@dataclass(frozen=True)
class Request:
    """One request as it arrived, and the status that it got."""

    method: str
    path: str
    token: str | None
    range: str | None
    status: int


@dataclass
class _Repo:
    """All commits of one repository: each is a mapping of file names to contents."""

    id: str
    gated: bool
    private: bool
    disabled: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Token:
    user: str
    accepted: frozenset[str]
    sees: frozenset[str]
    gated_right: bool
    role: str
    orgs: Mapping[str, str]
    writes: frozenset[str]


@dataclass
class _Fault:
    """What goes wrong for the requests whose method and path fit, ``times`` times (None: always)."""

    method: str | None
    part: str
    times: int | None
    status: int = 0
    after: int | None = None
    message: str | None = None

    def hits(self, method: str, path: str) -> bool:
        if self.times == 0 or self.part not in path or self.method not in (None, method):
            return False
        self.times = None if self.times is None else self.times - 1
        return True


class LoopbackHub:
    """The server; a context manager that listens while it is open.

    Args:
        name_missing: send ``X-Error-Code: RepoNotFound`` with the anonymous 401 as well, as some mirrors do; the real
            Hub sends the bare 401.
    """

    def __init__(self, *, name_missing: bool = False):
        self.name_missing = name_missing
        self.requests: list[Request] = []
        self.on_request: Callable[[str, str], None] | None = None
        self._repos: dict[str, _Repo] = {}
        self._moved: dict[str, str] = {}
        self._tokens: dict[str, _Token] = {}
        self._faults: list[_Fault] = []
        self.uploads = Uploads(self)
        self._lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    @property
    def url(self) -> str:
        """The address to use as HF_ENDPOINT; valid while the server is open."""
        assert self._server is not None, "open the hub with `with`"
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    # ---- contents ----------------------------------------------------------------------------------------------------

    def add_repo(self, repo_id: str, folder: Path, *, gated: bool = False, private: bool = False,
                 disabled: bool = False) -> str:
        """Serve a copy of the folder's files under the id; returns the commit that ``main`` is at."""
        self._repos[repo_id] = _Repo(repo_id, gated, private, disabled)
        return self.commit(repo_id, folder)

    def commit(self, repo_id: str, folder: Path, *, branch: str = "main") -> str:
        """Add a commit with exactly the folder's files and move the branch to it; returns the commit."""
        files = {path.relative_to(folder).as_posix(): path.read_bytes()
                 for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        return self.add_commit(repo_id, files, branch=branch)

    def create(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository made of files in memory; returns its commit."""
        self._repos[repo_id] = _Repo(repo_id, False, private, False)
        return self.add_commit(repo_id, files)

    def add_commit(self, repo_id: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """Add a commit with exactly these files and move the branch to it; returns the commit."""
        repo = self._repos[repo_id]
        digest = hashlib.sha1(f"{repo_id} {len(repo.commits)}".encode())
        for name, content in files.items():
            digest.update(name.encode() + content)
        repo.commits[digest.hexdigest()] = files
        repo.refs[branch] = digest.hexdigest()
        return digest.hexdigest()

    def tag(self, repo_id: str, name: str, commit: str) -> None:
        """Give a commit a name that does not move."""
        self._repos[repo_id].refs[name] = commit

    def rename(self, old_id: str, new_id: str) -> None:
        """Answer the old id with 307 and the new place, as the Hub does after a rename."""
        self._repos[new_id] = self._repos.pop(old_id)
        self._repos[new_id].id = new_id
        self._moved[old_id] = new_id

    def add_token(self, token: str, *, user: str = "tester", accepted: Iterable[str] = (), sees: Iterable[str] = (),
                  gated_right: bool = True, role: str = "write", orgs: Mapping[str, str] | None = None,
                  writes: Iterable[str] | None = None) -> str:
        """Make a token valid.

        Args:
            accepted: ids of gated repositories whose licence the account accepted.
            sees: ids of private repositories that the account may read.
            gated_right: False makes a fine-grained token that may not read gated repositories.
            role: ``write`` or ``read``.
            orgs: organisations of the account, and its role in each: ``admin``, ``write``, ``contributor`` or ``read``.
            writes: makes a fine-grained token that may write to these accounts or repositories.
        """
        self._tokens[token] = _Token(user, frozenset(accepted), frozenset(sees), gated_right,
                                     role if writes is None else "fineGrained", orgs or {}, frozenset(writes or ()))
        return token

    # ---- faults ------------------------------------------------------------------------------------------------------

    def fail(self, part: str, status: int, *, method: str | None = None, times: int | None = None,
             message: str | None = None) -> None:
        """Answer requests whose path contains ``part`` with a status, the given number of times or always."""
        self._faults.append(_Fault(method, part, times, status=status, message=message))

    def cut(self, part: str, after: int, *, times: int | None = 1, method: str = "GET") -> None:
        """Break the connection after that many bytes of a file whose path contains ``part``; with PUT, of an upload."""
        self._faults.append(_Fault(method, part, times, after=after))

    def heal(self) -> None:
        """Forget all faults."""
        self._faults.clear()

    # ---- the tests' side ---------------------------------------------------------------------------------------------

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What ``main`` holds now."""
        repo = self._repos[repo_id]
        return repo.commits[repo.refs["main"]]

    def is_private(self, repo_id: str) -> bool:
        return self._repos[repo_id].private

    @staticmethod
    def is_large(name: str) -> bool:
        """Whether a file is kept in LFS."""
        return name.endswith(LARGE)

    @staticmethod
    def blob(name: str, content: bytes) -> str:
        """A file's id: its sha256 in LFS, git's own for a small one."""
        return _blob(name, content)

    def paths(self, method: str | None = None, containing: str = "") -> list[str]:
        """Paths of the requests so far, in order."""
        return [one.path for one in self.requests if method in (None, one.method) and containing in one.path]

    def environment(self, home: Path, *, token: str | None = None, **more: str) -> dict[str, str]:
        """The environment of a subprocess that talks to this hub only, with its own HF_HOME and no other token."""
        keep = {name: value for name, value in os.environ.items()
                if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_OFFLINE"))
                and not name.lower().endswith("_proxy")}
        return keep | {"HF_HOME": str(home), "HF_ENDPOINT": self.url} | ({"HF_TOKEN": token} if token else {}) | more

    def isolate(self, monkeypatch: Any, home: Path, *, token: str | None = None, **more: str) -> None:
        """The same for this process: the environment, and what huggingface_hub read from it when it was imported."""
        wanted = self.environment(home, token=token, **more)
        for name in [name for name in os.environ if name not in wanted]:
            monkeypatch.delenv(name)
        for name, value in wanted.items():
            monkeypatch.setenv(name, value)
        from huggingface_hub import close_session, constants

        close_session()  # its client may still have another environment's proxy
        for name, value in {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "ENDPOINT": self.url,
                            "HF_TOKEN_PATH": str(home / "token"), "HF_XET_CACHE": str(home / "xet"),
                            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"), "HF_HUB_OFFLINE": False,
                            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
                            }.items():
            monkeypatch.setattr(constants, name, value)

    def isolate_datasets(self, monkeypatch: Any, home: Path) -> None:
        """After ``isolate``: the same for what ``datasets`` and fsspec took from the environment at their import."""
        from datasets import config
        from huggingface_hub import HfFileSystem, constants

        HfFileSystem.clear_instance_cache()  # instances know an endpoint, and what it answered
        cache = home / "datasets"
        for name, value in {"HF_ENDPOINT": self.url, "HF_CACHE_HOME": str(home), "HF_DATASETS_CACHE": cache,
                            "DOWNLOADED_DATASETS_PATH": cache / "downloads", "EXTRACTED_DATASETS_PATH": cache / "extracted",
                            "HF_MODULES_CACHE": home / "modules", "HF_HUB_OFFLINE": False,
                            "HUB_DATASETS_URL": self.url + "/datasets/{repo_id}/resolve/{revision}/{path}"}.items():
            monkeypatch.setattr(config, name, value)
        monkeypatch.setattr("huggingface_hub.hf_file_system.constants", constants)


@dataclass(frozen=True)
class _Answer:
    """What a request gets: status, headers and body."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None


def _refusal(status: int, message: str, code: str | None = None) -> _Answer:
    headers = {"X-Error-Message": message, "Content-Type": "application/json"}
    if code:
        headers["X-Error-Code"] = code
    return _Answer(status, json.dumps({"error": message}).encode(), headers)


def _json(value: object) -> _Answer:
    return _Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})


class _Handler(BaseHTTPRequestHandler):
    """One connection; ``hub`` is set on a subclass per server."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and body are two writes; waiting for the first's ACK costs 40 ms a request

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        if self.hub.on_request is not None:
            self.hub.on_request(self.command, self.path)
        with self.hub._lock:
            fault = next((one for one in self.hub._faults if one.hits(self.command, self.path)), None)
        length = int(self.headers.get("Content-Length") or 0)
        if fault is not None and fault.after is not None and self.command != "GET":
            self.rfile.read(min(fault.after, length))
            answer = _Answer(0)
        else:
            self.body = self.rfile.read(length)
            answer = self._faulty(fault) or self._answer()
        with self.hub._lock:
            self.hub.requests.append(Request(self.command, self.path, self._token(), self.headers.get("Range"),
                                             answer.status))
        self._send(answer)

    def _send(self, answer: _Answer) -> None:
        if answer.status == 0:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(answer.status)
        for name, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):  # the client may leave
            self.wfile.write(answer.body[:answer.cut_after])
        if answer.cut_after is not None:
            self.close_connection = True

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _faulty(self, fault: _Fault | None) -> _Answer | None:
        if fault is None:
            return None
        if fault.message is not None:
            return _refusal(fault.status, fault.message)
        if fault.after is None:
            return _Answer(fault.status, b"the loopback hub was told to fail", {"Content-Type": "text/plain"})
        whole = self._answer()
        return _Answer(whole.status, whole.body, whole.headers, cut_after=fault.after)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def _answer(self) -> _Answer:
        path = urlsplit(self.path).path
        if written := self.hub.uploads.answer(self.command, unquote(path), self.body, self._token()):
            if written.status < 400:
                return _json(written.value)
            refusal = _refusal(written.status, written.value["error"], written.code)
            return _Answer(written.status, json.dumps(written.value).encode(), refusal.headers)
        if path == "/api/whoami-v2":
            return self._whoami()
        api = re.fullmatch(r"/api/(?:models/)?([^/]+(?:/[^/]+)??|datasets/[^/]+/[^/]+)"
                           r"(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if api:
            return self._visible(api[1]) or self._api(self.hub._repos[api[1]], api[2], unquote(api[3] or "main"),
                                                      unquote(api[4] or ""))
        if check := re.fullmatch(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)/auth-check", path):
            return self._visible(check[1], file=True) or _json({})
        if file := re.fullmatch(r"/([^/]+(?:/[^/]+)?|datasets/[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._visible(file[1], file=True) or self._file(self.hub._repos[file[1]], unquote(file[2]),
                                                                   unquote(file[3]))
        return _refusal(404, "Sorry, we can't find the page you are looking for.")

    def _whoami(self) -> _Answer:
        token = self.hub._tokens.get(self._token() or "")
        if token is None:
            return _refusal(401, "Invalid credentials in Authorization header" if self._token() else
                            "Invalid username or password.")
        details: dict[str, Any] = {"displayName": "a token", "role": token.role}
        if token.role == "fineGrained":
            scopes = [{"entity": {"_id": "0" * 24, "type": "model" if "/" in name else "user", "name": name},
                       "permissions": ["repo.content.read", "repo.write"]} for name in sorted(token.writes)]
            details["fineGrained"] = {"canReadGatedRepos": token.gated_right, "global": [], "scoped": scopes}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in token.orgs.items()]
        return _json({"type": "user", "name": token.user, "orgs": orgs,
                      "auth": {"type": "access_token", "accessToken": details}})

    def _visible(self, repo_id: str, *, file: bool = False) -> _Answer | None:
        """The refusal, or the redirect, that this visitor gets for a repository; None when it may go on."""
        if repo_id in self.hub._moved:
            return _Answer(307, b"", {"Location": self.path.replace(repo_id, self.hub._moved[repo_id], 1)})
        repo, sent = self.hub._repos.get(repo_id), self._token()
        token = self.hub._tokens.get(sent or "")
        if file and repo is not None and repo.gated and not repo.private and token is None:
            # On record: a file of a gated repository gets the same answer with a wrong token as with none.
            return _refusal(401, f"Access to model {repo_id} is restricted. You must have access to it and be "
                            "authenticated to access it. Please log in.", "GatedRepo")
        if sent and token is None:
            return _refusal(401, "Invalid credentials in Authorization header")
        if repo is None or repo.private and not (token and repo_id in token.sees
                                                 or self.hub.uploads.may_write(sent, repo_id)):
            if token is None:
                return _refusal(401, "Invalid username or password.",
                                "RepoNotFound" if self.hub.name_missing else None)
            return _refusal(404, "Repository not found", "RepoNotFound")
        return self._gate(repo, token) if file else None

    def _gate(self, repo: _Repo, token: _Token | None) -> _Answer | None:
        if repo.disabled:
            return _refusal(403, "Access to this resource is disabled.")
        if not repo.gated:
            return None
        if token is not None and not token.gated_right:
            return _refusal(403, "Please enable access to public gated repositories in your fine-grained token "
                            "settings to view this repository.")
        if token is None or repo.id not in token.accepted:
            return _refusal(403, f"Access to model {repo.id} is restricted and you are not in the authorized list. "
                            f"Visit {self.hub.url}/{repo.id} to ask for access.", "GatedRepo")
        return None

    def _api(self, repo: _Repo, what: str | None, revision: str, folder: str) -> _Answer:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        query = parse_qs(urlsplit(self.path).query)
        if what == "tree":
            return _json(_tree(repo.commits[commit], folder, "true" in query.get("recursive", ["false"])[0].lower()))
        if what == "paths-info":
            entries = _tree(repo.commits[commit], "", recursive=True)
            return _json([entry for entry in entries if entry["path"] in parse_qs(self.body.decode()).get("paths", [])])
        names = [_sibling(name, content, "blobs" in query) for name, content in repo.commits[commit].items()]
        return _json({"_id": "0" * 24, "id": repo.id, "modelId": repo.id, "sha": commit, "private": repo.private,
                      "gated": "manual" if repo.gated else False, "disabled": repo.disabled, "siblings": names,
                      "tags": [], "downloads": 0, "likes": 0})

    def _file(self, repo: _Repo, revision: str, name: str) -> _Answer:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return _refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        content = repo.commits[commit].get(name)
        if content is None:
            answer = _refusal(404, "Entry not found", "EntryNotFound")
            return _Answer(answer.status, answer.body, answer.headers | {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{_blob(name, content)}"',
                   "Content-Type": "application/octet-stream"}
        if name.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{_blob(name, content)}"'}
        return self._part(content, headers)

    def _part(self, content: bytes, headers: dict[str, str]) -> _Answer:
        """The whole file, or the range of it that was asked for."""
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return _Answer(200, content, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
        if start >= len(content):
            return _Answer(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
        return _Answer(206, content[start:end + 1],
                       headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"})


def _blob(name: str, content: bytes) -> str:
    """A file's name among the cache's blobs: sha256 for a large file, git's blob id for a small one."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes, metadata: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name}
    if metadata:
        entry |= {"size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"sha256": _blob(name, content), "size": len(content), "pointerSize": 134}
    return entry


def _tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
    """The listing of a folder: its files, and its folders or everything below them."""
    entries: dict[str, dict[str, Any]] = {}
    prefix = folder.rstrip("/") + "/" if folder else ""
    for name, content in files.items():
        if not name.startswith(prefix):
            continue
        parts = name[len(prefix):].split("/")
        for depth in range(1, len(parts)):
            if depth == 1 or recursive:
                path = prefix + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0,
                                 "path": path}
        if recursive or len(parts) == 1:
            entries[name] = {"type": "file", "oid": _blob(name, content)[:40], "size": len(content), "path": name}
            if name.endswith(LARGE):
                entries[name]["lfs"] = {"oid": _blob(name, content), "size": len(content), "pointerSize": 134}
    return list(entries.values())
