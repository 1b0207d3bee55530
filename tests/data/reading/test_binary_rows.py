"""Tables that are unpacked first: what is said where there is no room for it."""

from __future__ import annotations

import errno
import gzip
import os
import tempfile
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from support.command import rows


class _Full:
    """A file on a disk without room."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def write(self, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_the_directory_of_temporary_files_is_full(cli, tiny, monkeypatch):
    parquet.write_table(pa.Table.from_pylist(rows(3)), "rows.parquet")
    Path("rows.parquet.gz").write_bytes(gzip.compress(Path("rows.parquet").read_bytes()))
    monkeypatch.setattr(tempfile, "TemporaryFile", _Full)
    monkeypatch.setattr(tempfile, "tempdir", "/a/small/place")
    result = cli("prepare", "rows.parquet.gz", "--model", tiny)
    said = " ".join(result.err.split())
    assert result.code == 1 and said.count("Error:") == 1
    assert "rows.parquet.gz cannot be unpacked in /a/small/place" in said and "No space left" in said
    assert "TMPDIR" in said and "runs/tiny-gemma" not in said.split("Error:")[1]
