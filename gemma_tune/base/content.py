"""What the first bytes of a file say that it is, whatever its name."""

from __future__ import annotations

import re
from pathlib import Path

GGUF = b"GGUF"
HEAD = 512  # bytes that are enough to tell
FETCH = "fetch the file itself: `git lfs pull` in its repository, or `hf download`"
_POINTER = b"version https://git-lfs.github.com/spec/"
_OLD = "GGML, which came before GGUF"
_KNOWN = {
    _POINTER: "a Git LFS pointer, which only says where the file is", GGUF: "a GGUF file", b"\x1f\x8b": "gzip data",
    b"\x28\xb5\x2f\xfd": "Zstandard data", b"PK\x03\x04": "a zip archive", b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data", b"PAR1": "a Parquet file", b"ARROW1": "an Arrow file", b"%PDF": "a PDF file",
    b"ggjt": _OLD, b"lmgg": _OLD, b"tjgg": _OLD, b"\x80\x02": "a Python pickle",
}
# How files of pictures begin: PNG, JPEG, GIF, WebP, BMP, TIFF.
_PICTURE = re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a.{0,6}\0|RIFF.{4}WEBP|BM.{4}\0{4}|II\*\0|MM\0\*", re.DOTALL)


def head_of(path: Path) -> bytes:
    """The first bytes of a file.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return file.read(HEAD)


def is_pointer(head: bytes) -> bool:
    """Whether Git left only a pointer to a large file, which a clone without Git LFS does."""
    return head.startswith(_POINTER)


def is_picture(head: bytes) -> bool:
    """Whether a file that begins like this is a picture."""
    return bool(_PICTURE.match(head))


def described(head: bytes) -> str:
    """What a file is that begins like this, as the end of a sentence."""
    if not head:
        return "an empty file"
    if known := next((what for magic, what in _KNOWN.items() if head.startswith(magic)), None):
        return known
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "a safetensors file"
    start = head.lstrip()[:9].lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "a web page, as a download that failed leaves"
    if b"\0" in head:
        return "an unknown kind of file"
    return "JSON" if start[:1] in (b"{", b"[") else "text"
