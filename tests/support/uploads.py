"""What the loopback Hub answers to those who write: creating repositories, large files over LFS, commits.

The requests are those that huggingface_hub makes without Xet. A repository's files change by a commit alone; what was
uploaded for one stays in the storage, whether or not the commit follows, as at the real Hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from support.hub import LoopbackHub

TOKEN = "hf_" + "T" * 34  # whose owner the fixture `visit` is
LICENCES = ("apache-2.0", "gemma", "mit", "llama3.2", "other")  # some of those that the Hub knows


@dataclass(frozen=True)
class Written:
    """An answer: the status, a JSON object, and for a refusal its ``error`` and perhaps the Hub's code for it."""

    status: int
    value: dict[str, Any] = field(default_factory=dict)
    code: str | None = None


def refused(status: int, message: str, code: str | None = None, **more: Any) -> Written:
    return Written(status, {"error": message} | more, code)


@dataclass
class Uploads:
    """The storage for large files, and the requests that write."""

    hub: LoopbackHub
    stored: dict[str, bytes] = field(default_factory=dict)

    def answer(self, method: str, path: str, body: bytes, sent: str | None) -> Written | None:
        """The answer to a request that writes; None for any other one."""
        if method == "PUT" and (stored := re.fullmatch(r"/storage/([0-9a-f]{64})", path)):
            return self._store(stored[1], body)
        if method != "POST":
            return None
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._unknown(sent) or self._create(json.loads(body), sent or "")
        for pattern, act in ((r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
                             (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
                             (r"/([^/]+/[^/]+)\.git/info/lfs/objects/verify", self._verify),
                             (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit)):
            if found := re.fullmatch(pattern, path):
                return self._unknown(sent) or self._unwritable(found[1], sent or "") or act(found[1], body)
        return None

    def may_write(self, sent: str | None, repo_id: str) -> bool:
        """Whether the token may write to the repository, or to all of the account that it is named for."""
        token, account = self.hub._tokens.get(sent or ""), repo_id.split("/")[0]
        if token is None or token.role == "read":
            return False
        if token.role == "fineGrained":
            return bool({repo_id, account} & token.writes)
        return account == token.user or token.orgs.get(account, "read") != "read"

    def _unknown(self, sent: str | None) -> Written | None:
        if sent in self.hub._tokens:
            return None
        return refused(401, "Invalid credentials in Authorization header" if sent else "Invalid username or password.")

    def _unwritable(self, repo_id: str, sent: str) -> Written | None:
        repo = self.hub._repos.get(repo_id)
        if repo is None or repo.private and not (repo_id in self.hub._tokens[sent].sees or self.may_write(sent, repo_id)):
            return refused(404, "Repository not found", "RepoNotFound")
        if not self.may_write(sent, repo_id):
            return refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return None

    def _create(self, wanted: dict[str, Any], sent: str) -> Written:
        repo_id = f"{wanted['organization'] or self.hub._tokens[sent].user}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub._repos:
            return refused(409, "You already created this model repo", url=url)
        if not self.may_write(sent, repo_id.split("/")[0] + "/"):
            return refused(403, "You don't have the rights to create a model under the namespace "
                                f'"{repo_id.split("/")[0]}"')
        self.hub.create(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"},
                        private=wanted.get("visibility") == "private")
        return Written(200, {"url": url, "name": repo_id, "id": "0" * 24})

    def _preupload(self, repo_id: str, body: bytes) -> Written:
        there = self.hub.files(repo_id)
        files = [{"path": one["path"], "shouldIgnore": False,
                  "uploadMode": "lfs" if self.hub.is_large(one["path"]) else "regular"}
                 | ({"oid": self.hub.blob(one["path"], there[one["path"]])} if one["path"] in there else {})
                 for one in json.loads(body)["files"]]
        return Written(200, {"files": files})

    def _batch(self, repo_id: str, body: bytes) -> Written:
        objects = []
        for one in json.loads(body)["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.stored:
                links = {"upload": f"{self.hub.url}/storage/{one['oid']}",
                         "verify": f"{self.hub.url}/{repo_id}.git/info/lfs/objects/verify"}
                known["actions"] = {name: {"href": link} for name, link in links.items()}
            objects.append(known)
        return Written(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> Written:
        if hashlib.sha256(body).hexdigest() != oid:
            return refused(400, "BadDigest")
        self.stored[oid] = body
        return Written(200)

    def _verify(self, repo_id: str, body: bytes) -> Written:
        one = json.loads(body)
        whole = len(self.stored.get(one["oid"], b"")) == one["size"]
        return Written(200) if whole else refused(404, "Object not found")

    def _commit(self, repo_id: str, body: bytes) -> Written:
        files = dict(self.hub.files(repo_id))
        header, *operations = map(json.loads, body.splitlines())
        assert header["key"] == "header" and header["value"]["summary"]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    return refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = self.stored[value["oid"]]
            elif operation["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return refused(404, "A file with this name doesn't exist", "EntryNotFound")
        oid = self.hub.add_commit(repo_id, files)
        return Written(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})


def _validated(card: str) -> Written:
    """A model card's header, as the Hub checks it before it takes a README.md."""
    header = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    values = yaml.safe_load(header[1]) if header else {}
    errors = [f'"{name}" must be a string' for name in ("library_name", "pipeline_tag")
              if not isinstance(values.get(name, ""), str)]
    if values.get("license", "mit") not in LICENCES:
        errors.append('"license" must be one of a list of known licenses')
    if not all(re.fullmatch(r"[\w.-]+/[\w.-]+", one) for one in [values.get("base_model", "a/b")]):
        errors.append('"base_model" with value is not valid. Use a model id from https://hf.co/models.')
    if errors:
        return Written(400, {"error": "invalid", "errors": [{"message": text} for text in errors], "warnings": []})
    return Written(200, {"errors": [], "warnings": []})
