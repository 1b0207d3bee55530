"""What a file or a directory holds, as a digest, and as a stamp by which it need not be read again."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_tune.base.checkpoint import VOCABULARY
from gemma_tune.base.files import sha256_file

# What decides what a Hugging Face checkpoint computes; runs and other things may lie in the same directory.
CHECKPOINT_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
                    "special_tokens_map.json", "added_tokens.json", *VOCABULARY, "merges.txt", "chat_template*",
                    "additional_chat_templates/*.jinja")


def fingerprint(path: Path, known: dict[str, Any] | None = None, patterns: Sequence[str] = (),
                name: str | None = None) -> dict[str, Any]:
    """sha256, size in bytes and a stamp (names, sizes, modification times) of a file or a directory's files.

    Hidden files do not count; ``patterns`` restricts a directory to such files directly in it. With ``known``, an
    earlier result of this function, the content is read again only if the stamp differs: a fingerprint of several
    gigabytes is otherwise too slow to check before every stage.

    Args:
        name: what a file will be called, if it has another name now.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    single, members, stamp, size = _looked_at(path, patterns, name)
    if known and known.get("stamp") == stamp:
        return {"sha256": known["sha256"], "bytes": size, "stamp": stamp}
    digest = hashlib.sha256()
    for own, member, _ in members:
        digest.update(b"" if single else f"{own}\0{sha256_file(member)}\n".encode())
    sha = sha256_file(path) if single else digest.hexdigest()
    return {"sha256": sha, "bytes": size, "stamp": stamp}


def size_and_stamp(path: Path, patterns: Sequence[str], name: str | None) -> tuple[int, str]:
    """Size in bytes and stamp of a :func:`fingerprint`, for which nothing is read.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    _, _, stamp, size = _looked_at(path, patterns, name)
    return size, stamp


def _looked_at(path: Path, patterns: Sequence[str], name: str | None) -> tuple[bool, list[Any], str, int]:
    """Whether it is a file, its members with their names and what the system says of them, its stamp and its size."""
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    single = path.is_file()
    members = [(name if single and name else own, p, p.stat()) for own, p in _members(path, patterns)]
    stamp = hashlib.sha256(repr([(n, s.st_size, s.st_mtime_ns) for n, _, s in members]).encode()).hexdigest()
    return single, members, stamp, sum(s.st_size for _, _, s in members)


def _members(path: Path, patterns: Sequence[str]) -> list[tuple[str, Path]]:
    if path.is_file():
        return [(path.name, path)]
    if patterns:
        return sorted((p.name, p) for p in {p for pattern in patterns for p in path.glob(pattern)} if p.is_file())
    return sorted((p.relative_to(path).as_posix(), p) for p in path.rglob("*")
                  if p.is_file() and not p.name.startswith("."))
