"""Bytes of a file become text, piece by piece: decompression, byte order marks, UTF-8 and UTF-16.

What is not text is an error that names the line and the offset in bytes, of the decompressed data where a file is
compressed.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from gemma_tune.base import shell
from gemma_tune.base.content import is_picture
from gemma_tune.base.errors import UserError
from gemma_tune.data.reading.mixed import converted_name, mixed
from gemma_tune.data.reading.rows import BLOCK, Source

COMPRESSED = {".gz": "gzip", ".zst": "Zstandard", ".zstd": "Zstandard"}
_HEAD = 4096  # a NUL byte up to here means a binary file, whatever else is wrong with it
_ZSTD_INPUT = 1 << 13  # what comes out of a step may be thirty thousand times larger: then it takes less
_ZSTD_LEAST, _ZSTD_OUTPUT = 1 << 7, 1 << 20
_UTF8_HINT = "save it as UTF-8: JSONL, JSON, CSV or TSV"
_NAME = "name its encoding to `prepare`, which seems to be --encoding {}"
_CONVERT = "iconv -f {} -t utf-8 {} > {}"
_SURE = 8  # characters of several bytes after which what is good UTF-8 is no other encoding
_SAMPLE = 4096  # bytes on both sides of the first one that is no UTF-8
_ASCII = 0.01  # of the characters of a table or of JSON, whatever the language
_NULS = 0.25  # of the bytes of UTF-16 that happens to be UTF-8, as English is
_BESIDE = 0.6  # of the bytes above 127 that have another one beside them
# Python's names of encodings, and iconv's. Traditional characters before simplified ones, whose code has all of them.
_EAST_ASIAN = {"big5": "BIG5", "gb18030": "GB18030", "cp932": "CP932", "cp949": "CP949", "euc_jp": "EUC-JP"}
_WIDE = ("utf-16-le", "utf-16-be")
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
          (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_MAGIC = {  # first bytes of what is often given by mistake, and what to do about it
    b"\x1f\x8b": "it is gzip data: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "it is Zstandard data: let its name end in .zst",
    b"PAR1": "it is a Parquet file: let its name end in .parquet",
    b"ARROW1": "it is an Arrow file: let its name end in .arrow",
    b"\xff\xff\xff\xff": "it is an Arrow stream: let its name end in .arrow",
    b"%PDF": "it is a PDF: save its text as rows in a .jsonl file",
    b"PK\x03\x04": "it is an Excel file or a zip archive: save it as CSV, or unpack it",
    b"BZh": "it is bzip2 data: unpack it first",
    b"\xfd7zXZ": "it is xz data: unpack it first",
}


def compression(path: Path) -> str | None:
    """The compression that a file's name promises: ``gzip``, ``Zstandard`` or None."""
    return COMPRESSED.get(path.suffix.lower())


class TextFile:
    """A source's text as pieces of bounded length; every iteration reads it anew.

    Attributes:
        done: share of the file's bytes that were read so far, from 0 to 1.

    Raises (while iterating):
        UserError: neither UTF-8 nor UTF-16 with a byte order mark, nor in the encoding that was named; binary, or
            damaged compressed data.
    """

    def __init__(self, source: Source, size: int = BLOCK):
        self.name, self.path, self.size, self.done = source.name, source.path, size, 0.0
        self.encoding = source.encoding

    def __iter__(self) -> Iterator[str]:
        pieces = self.bytes()
        head = b""
        for piece in pieces:
            head += piece
            if len(head) >= _HEAD:
                break
        decoder = _Decoder(self.name, head, self.encoding, self.bytes)
        for piece in itertools.chain([head], pieces):
            yield from self._cut(decoder.text(piece))
        yield from self._cut(decoder.text(b"", final=True))

    def _cut(self, text: str) -> Iterator[str]:
        for start in range(0, len(text), self.size):
            yield text[start:start + self.size]

    def bytes(self) -> Iterator[bytes]:
        """The decompressed content."""
        try:
            with open(self.path, "rb") as raw:
                total = max(1, self.path.stat().st_size)
                for piece in _decompressed(raw, compression(self.path), self.size):
                    self.done = min(1.0, raw.tell() / total)
                    yield piece
        except (EOFError, zlib.error, gzip.BadGzipFile, _Damaged) as e:
            raise UserError(f"{self.name} is damaged: {e}", "copy or download it again, or check that its name fits "
                                                            "its content; nothing was written") from e
        except OSError as e:
            raise UserError(f"{self.name} cannot be read: {e.strerror or e}", "check the file and its permissions") \
                from e


def _is_utf8(head: bytes) -> bool:
    """Whether a text is UTF-8, whatever was said of it: in another encoding so many characters hardly ever are."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return sum(char > "\x7f" for char in text) >= _SURE


def _around(e: UnicodeDecodeError) -> bytes:
    """The lines about the first byte that is no UTF-8, as far as they are there."""
    found = e.object[max(0, e.start - _SAMPLE):e.start + _SAMPLE]
    begin, end = found.find(b"\n", 0, min(e.start, _SAMPLE)) + 1, found.rfind(b"\n", min(e.start, _SAMPLE)) + 1
    return bytes(found[begin:end or None])


def east_asian(sample: bytes) -> str | None:
    """The encoding of Chinese, Japanese or Korean text, as iconv calls it; None for what is likely to be another's.

    Two bytes above 127 stand together there, and hardly ever in the languages of Europe that use one for a letter.
    """
    high = [byte > 127 for byte in sample]
    beside = sum(own and (before or after) for before, own, after in zip([False, *high], high, [*high[1:], False]))
    if not any(high) or beside < _BESIDE * sum(high):
        return None
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=[*_EAST_ASIAN]).best()
    return _EAST_ASIAN.get(best.encoding) if best else None


def _utf16(head: bytes) -> str | None:
    """Which UTF-16 a file without a byte order mark begins with; None for what is hardly any text.

    The wrong one makes characters as well, but next to none of ASCII, which tables and JSON cannot do without. A NUL
    in what is else UTF-8 makes none of them.
    """
    with contextlib.suppress(UnicodeDecodeError):
        codecs.getincrementaldecoder("utf-8")().decode(head)
        if head.count(0) < _NULS * len(head):
            return None
    for encoding in ("utf-16-le", "utf-16-be"):
        text = codecs.getincrementaldecoder(encoding)("replace").decode(head)
        signs = sum(char.isascii() for char in text)
        if signs >= _ASCII * len(text) > 0 and all(char.isprintable() or char.isspace() for char in text):
            return encoding
    return None


class _Damaged(Exception):
    pass


def _decompressed(raw: IO[bytes], how: str | None, size: int) -> Iterator[bytes]:
    if how == "Zstandard":
        yield from _zstandard(raw)
        return
    stream = gzip.GzipFile(fileobj=raw) if how == "gzip" else raw
    while piece := stream.read(size):
        yield piece


def _zstandard(raw: IO[bytes]) -> Iterator[bytes]:
    """Frame by frame: the library's own stream reader takes a frame that was cut off for a whole one."""
    import zstandard

    frame, step = None, _ZSTD_LEAST
    try:
        while piece := raw.read(step):
            while piece:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                text = frame.decompress(piece)
                yield text
                step = max(_ZSTD_LEAST, step // 2) if len(text) > _ZSTD_OUTPUT else min(_ZSTD_INPUT, step * 2)
                piece = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as e:
        raise _Damaged(f"{e}".removeprefix("zstd decompressor error: ").removeprefix("zstd decompress error: ")) from e
    if frame is not None:
        raise _Damaged("the Zstandard data ends too early")


class _Decoder:
    """Decodes what comes in pieces and knows where in the file it is.

    Args:
        content: reads all of the file once more.
    """

    def __init__(self, name: str, head: bytes, named: str | None, content: Callable[[], Iterator[bytes]]):
        self.name, self.head, self.lines, self._content = name, head[:_HEAD], 0, content
        otherwise = "utf-8" if named is None or _is_utf8(self.head) else named
        mark, encoding = next(((m, e) for m, e in _MARKS if head.startswith(m)), (b"", otherwise))
        if encoding.startswith("utf-32"):
            raise UserError(f"{name} is UTF-32 text, not UTF-8", _UTF8_HINT)
        if encoding == "utf-8" and (at := self.head.find(0)) >= 0:
            raise self._binary(at)
        self.encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._skip = len(mark)
        self._offset = len(mark)  # of the first byte that is not decoded yet
        self._waiting = 0  # bytes of a character whose others are in the next piece

    def text(self, piece: bytes, final: bool = False) -> str:
        piece, self._skip = piece[self._skip:], 0
        try:
            text = self._decoder.decode(piece, final)
        except UnicodeDecodeError as e:
            good = e.object[:e.start].decode(self.encoding)
            raise self._nul(good) or self._undecodable(e, good) from e
        if "\0" in text:
            raise self._nul(text)
        waited, self._waiting = self._waiting, len(self._decoder.getstate()[0])
        self._offset += waited + len(piece) - self._waiting
        self.lines += text.count("\n")
        return text

    def _nul(self, text: str) -> UserError | None:
        at = text.find("\0")
        return self._binary(self._offset + len(text[:at].encode(self.encoding))) if at >= 0 else None

    def _binary(self, at: int) -> UserError:
        if wide := _utf16(self.head):
            return UserError(f"{self.name} seems to be UTF-16 text without its byte order mark",
                             f"{_NAME.format(wide)}, or save it as UTF-8")
        return UserError(f"{self.name} is a binary file (byte {at})", self._by_content() or _UTF8_HINT)

    def _undecodable(self, e: UnicodeDecodeError, good: str) -> UserError:
        label = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"}.get(self.encoding, self.encoding)
        line = self.lines + good.count("\n") + 1
        return UserError(f"{self.name}:{line}: not {label} text (byte {e.object[e.start]:#04x}) at offset "
                         f"{self._offset + e.start}", self._by_content() or self._how_to_convert(_around(e)))

    def _by_content(self) -> str | None:
        """What to do with a file that begins like this; None when nothing is known."""
        if is_picture(self.head):
            row = {"image": Path(self.name).name, "question": "…", "answer": "…"}
            return ("it is a picture: write what is asked about it into a .jsonl file beside it, a line each: "
                    f"{json.dumps(row, ensure_ascii=False)}")
        return next((hint for magic, hint in _MAGIC.items() if self.head.startswith(magic)), None)

    def _how_to_convert(self, sample: bytes) -> str:
        """The command for what Windows and Excel write in East Asia, where that can be told by a sample, else for what
        they write in Western Europe and America."""
        path, encoding = Path(self.name), east_asian(sample) or "windows-1252"
        packed, new = compression(path), converted_name(path)
        if self.encoding not in _WIDE and (apart := mixed(self._content(), east_asian)):
            return apart.hint(str(path), None if packed else str(new))
        if self.encoding != "utf-8" and self.encoding not in _WIDE:
            return "name another one with --encoding, or leave it out for UTF-8"
        if self.encoding != "utf-8" or not path.suffix:
            return _UTF8_HINT
        if packed:
            return _NAME.format(encoding.lower())
        convert = _CONVERT.format(encoding, shell.quote(str(path)), shell.quote(str(new)))
        return (f"{_NAME.format(encoding.lower())}, or save it as UTF-8 (Excel calls that `CSV UTF-8`): "
                f"{shell.of_posix(convert)}")
