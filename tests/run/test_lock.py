"""Who works on a run is told as long as somebody does."""

from __future__ import annotations

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.run import lock


def test_nobody_owns_a_lock_that_could_not_be_taken_whole(tmp_path, monkeypatch):
    """A process that goes on, as one of Python's own, would be named as the run's owner for as long as it lives."""
    def refused(folder, names):
        raise PermissionError(13, "Permission denied", str(folder))

    with monkeypatch.context() as patched:
        patched.setattr(lock, "recover", refused)
        with pytest.raises(UserError, match="no permission"), lock.Lock(tmp_path, "train"):
            pass
    assert lock.Lock.owner_of(tmp_path) is None
    with lock.Lock(tmp_path, "train"):
        assert "train" in lock.Lock.owner_of(tmp_path)
    assert lock.Lock.owner_of(tmp_path) is None
