"""Which pictures of data/pictures the rows use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_tune.data.conversations.kept_pictures import keep_alone

_MARK = b'"pictures": ['  # in each line of a row that has some, and perhaps in a call of a tool


class UsedPictures:
    """The pictures that the rows name which are used.

    Args:
        folder: where they lie, with those of other rows.
        soft: id of the token that stands for a part of a picture; None where no row has any.
    """

    def __init__(self, folder: Path, soft: int | None):
        self._folder, self._soft = folder, soft
        self._names: dict[str, set[str]] = {}
        self._rows = self._tokens = 0

    def add(self, side: str, line: bytes, sequences: Sequence[tuple[np.ndarray, Any, Any]]) -> None:
        """One row, as it is written, and its sequences, which begin with their ids."""
        if _MARK not in line:
            return
        names = {ref["file"].rpartition("/")[2] for turn in json.loads(line)["messages"]
                 for ref in turn.get("pictures", ())}
        if not names:
            return
        self._names.setdefault(side, set()).update(names)
        self._rows += 1
        self._tokens += sum(int((ids == self._soft).sum()) for ids, *_ in sequences)

    def settled(self) -> dict[str, Any]:
        """Remove all others.

        Returns:
            Figures for data/report.json, none where no row has a picture: ``picture_rows``, which have some,
            ``pictures`` that differ, ``picture_bytes``, ``picture_tokens`` of all rows, and
            ``pictures_on_both_sides`` of the split.
        """
        used = set().union(*self._names.values())
        size = keep_alone(self._folder, used)
        if not used:
            return {}
        both = set.intersection(*self._names.values()) if len(self._names) > 1 else set()
        return {"picture_rows": self._rows, "pictures": len(used), "picture_bytes": size,
                "picture_tokens": self._tokens, "pictures_on_both_sides": len(both)}
