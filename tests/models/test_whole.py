"""A model in Hugging Face's cache, whose files are called by their digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemma_tune.base.errors import UserError
from gemma_tune.hub.download import fetch_model
from gemma_tune.models.whole import refuse_damaged_copy, refuse_rotten
from support.damage import flip_bit
from support.hub import LoopbackHub


@pytest.fixture
def snapshot(tiny, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        hub.add_repo("google/tiny", tiny)
        hub.isolate(monkeypatch, tmp_path / "home")
        return Path(fetch_model("google/tiny").path)


@pytest.mark.parametrize(("file", "noticed_always"), [("model.safetensors", False), ("tokenizer.model", True),
                                                      ("config.json", True)])
def test_a_damaged_download_names_the_folder_to_delete(snapshot, file, noticed_always):
    refuse_rotten(snapshot, {})
    flip_bit((snapshot / file).resolve())
    with pytest.raises(UserError, match=f"is damaged: {file} was changed") as caught:
        refuse_rotten(snapshot, {})
    assert f"delete its folder in Hugging Face's cache, {snapshot.parents[1]}: " in caught.value.hint and "downloaded again" in caught.value.hint
    if noticed_always:
        with pytest.raises(UserError, match="is damaged"):
            refuse_damaged_copy(snapshot, weights=False)
    else:
        refuse_damaged_copy(snapshot, weights=False)
