"""What the system refuses, as the libraries that save tell it: in their own words, not as OSError."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models

from gemma_tune.base import refusals
from gemma_tune.base.cache import cache_errors
from gemma_tune.base.errors import BAD_INPUT, WORK_FAILED, UserError, WorkFailed
from gemma_tune.base.files import os_errors, replacing_directory
from gemma_tune.base.refusals import require_readable

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is always full")


def full(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def said_by_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


SAVING = {
    "a small tensor": lambda: torch.save({"a": torch.zeros(1)}, "/dev/full"),
    "a large tensor": lambda: torch.save({"a": torch.zeros(1000, 1000)}, "/dev/full"),
    "a tokenizer": lambda: Tokenizer(models.BPE()).save("/dev/full"),
    "safetensors": said_by_safetensors,
}


@FULL
@pytest.mark.parametrize("saved", SAVING)
def test_a_full_disk_is_one_whatever_was_saved(tmp_path, monkeypatch, saved):
    monkeypatch.setattr(tempfile, "TemporaryFile", full)  # what torch does not say is tried
    with pytest.raises(WorkFailed, match=f"(?m)^the disk is full: {tmp_path}$") as raised, os_errors(tmp_path):
        SAVING[saved]()
    assert raised.value.exit_code == WORK_FAILED and "free some space" in raised.value.hint
    with pytest.raises(WorkFailed, match="no room in the cache"), cache_errors():
        SAVING[saved]()


@FULL
def test_what_torch_cannot_write_elsewhere_than_on_a_full_disk_is_said_with_its_words(tmp_path):
    with pytest.raises(WorkFailed, match=f"^{tmp_path} cannot be written: .*unexpected pos") as raised, os_errors(tmp_path):
        SAVING["a large tensor"]()
    assert "ulimit" in raised.value.hint


class _OfWindows(OSError):
    """An error by the rules of Windows' Python: by the system's number, where there is one, and not by C's."""

    def __init__(self, number, text, path, winerror=None):
        super().__init__({112: errno.ENOSPC, 32: errno.EACCES, 5: errno.EACCES}.get(winerror, number), text, path)
        self.winerror = winerror


@pytest.mark.parametrize(("number", "text", "said"), [
    (112, "There is not enough space on the disk.", "the disk is full: "),
    (32, "The process cannot access the file because it is being used by another process.", "is open in another program"),
    (5, "Access is denied.", "no permission to write ")])
def test_numbers_of_windows_are_read_as_such(tmp_path, monkeypatch, number, text, said):
    """Of which 112, by C's list, is a host that is down."""
    monkeypatch.setattr(refusals, "OSError", _OfWindows, raising=False)
    with pytest.raises(UserError) as raised, os_errors(tmp_path):
        raise SafetensorError(f"Error while serializing: I/O error: {text} (os error {number})")
    assert said in raised.value.message and raised.value.hint


def test_other_failures_of_libraries_are_not_disguised(tmp_path):
    for problem in (RuntimeError("shapes do not fit"), SafetensorError("header too large"),
                    UserError("it cannot be loaded: … (os error 13)")):
        with pytest.raises(type(problem)) as raised, os_errors(tmp_path):
            raise problem
        assert raised.value is problem


# --- rights

def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.skipif(os.name == "nt", reason="there are no such rights")
@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_an_artifact_have_the_rights_of_any_new_file(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        with replacing_directory(tmp_path / "artifact") as folder:
            os.close(os.open(folder / "weights", os.O_CREAT, 0o600))  # as safetensors does
            os.close(os.open(folder / "program", os.O_CREAT, 0o700))
            os.close(os.open(tmp_path / "elsewhere", os.O_CREAT, 0o600))
            (folder / "link").symlink_to(tmp_path / "elsewhere")
    finally:
        os.umask(before)
    assert mode(tmp_path / "artifact" / "weights") == expected
    assert mode(tmp_path / "artifact" / "program") == expected | 0o700
    assert mode(tmp_path / "elsewhere") == 0o600, "somebody else's"


@pytest.fixture
def closed(monkeypatch) -> set[Path]:
    """Paths that this user may not read; root may read everything, so the answer of the system is a double."""
    paths: set[Path] = set()
    plain = os.access
    double = lambda path, *args, **kwargs: Path(path) not in paths and plain(path, *args, **kwargs)  # noqa: E731
    monkeypatch.setattr(os, "access", double)
    monkeypatch.setattr(os, "supports_effective_ids", {double})
    return paths


def test_what_may_not_be_read_is_named_together(tmp_path, closed):
    for name in ("config.json", "a.safetensors", "b.safetensors"):
        (tmp_path / name).write_text("{}")
    require_readable(tmp_path)
    require_readable(tmp_path / "gone")
    closed |= {tmp_path / "a.safetensors", tmp_path / "b.safetensors"}
    with pytest.raises(UserError, match=f"(?m)^no permission to read {tmp_path}/a.safetensors$") as raised:
        require_readable(tmp_path)
    assert raised.value.exit_code == BAD_INPUT and "chmod" in raised.value.hint
    assert raised.value.problems == (f"no permission to read {tmp_path}/b.safetensors",)
    closed |= {tmp_path}
    for place in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=f"(?m)^no permission to read {tmp_path}$"):
            require_readable(place)


@pytest.mark.parametrize("which", ["lora_adapter", "tiny-gemma"])
@pytest.mark.parametrize("command", [("chat", "--prompt", "hi"), ("merge", "--no-check")])
def test_another_user_of_a_run_is_told_what_may_not_be_read(cli, trained, tiny, closed, which, command):
    adapter = trained / "tiny-gemma_lora_adapter"
    weights = adapter / "adapter_model.safetensors" if which == "lora_adapter" else tiny / "model.safetensors"
    for path in (weights, Path(os.path.relpath(weights)), trained / os.path.relpath(weights, trained)):
        closed.add(path)
    result = cli(*command, "--run", trained)
    assert result.code == BAD_INPUT
    assert "no permission to read" in result.err and weights.name in result.err and "chmod" in result.err
    assert "train" not in result.err.split("Hint:")[1]


def test_reading_that_is_refused_is_not_called_writing(tmp_path, closed):
    (tmp_path / "rows").write_text("")
    closed.add(tmp_path / "rows")
    with pytest.raises(UserError, match="no permission to read .*rows"), os_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "rows"))
