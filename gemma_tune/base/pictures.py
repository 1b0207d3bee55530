"""Small pictures to ask a model about, made here, so that none has to lie beside the program."""

from __future__ import annotations

import base64
import struct
import zlib

RED, BLUE = (220, 20, 20), (20, 20, 220)
QUESTION = "What colour is this picture?"


def square(colour: tuple[int, int, int], side: int = 96) -> bytes:
    """A PNG file: ``side`` times ``side`` pixels of one colour, which has red, green and blue from 0 to 255."""
    line = b"\0" + bytes(colour) * side  # stored as it is, without any of PNG's filters
    parts = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(line * side)),
             (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def as_text(picture: bytes) -> str:
    """A picture as JSON can hold it."""
    return base64.b64encode(picture).decode()
