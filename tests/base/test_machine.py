"""What a process may use, and how it imports large libraries."""

from __future__ import annotations

import gc
import sys

import pytest

from gemma_tune.base.machine import importing


def imported(name: str, tmp_path, monkeypatch) -> None:
    (tmp_path / f"{name}.py").write_text("import gc\nlooked_for = gc.isenabled()\nkept = [[n] for n in range(1000)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__(name)


def test_garbage_is_not_looked_for_during_an_import_and_not_among_it_afterwards(tmp_path, monkeypatch):
    before = gc.get_freeze_count()
    with importing():
        imported("a_large_library", tmp_path, monkeypatch)
    assert sys.modules["a_large_library"].looked_for is False
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + 1000


def test_where_everything_is_imported_already_garbage_stays_garbage():
    import json  # noqa: F401

    before = gc.get_freeze_count()
    with importing():
        import json  # noqa: F401, F811
    assert gc.get_freeze_count() == before


def test_a_failed_import_leaves_garbage_collection_on():
    with pytest.raises(ImportError), importing():
        import no_such_library  # noqa: F401
    assert gc.isenabled()


def test_what_was_off_stays_off():
    gc.disable()
    try:
        with importing():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
