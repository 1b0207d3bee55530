"""Where prepared rows come from: the file and the line of the user's data, which an error about a row can name.

``origins.npy`` lies beside the rows and not among their tokens: the same rows in a file of another name are the same
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gemma_tune.base.strict_json import object_in

NAME = "origins.npy"


def write_origins(folder: Path, source: np.ndarray, line: np.ndarray) -> None:
    """Write the origins of the training rows into their new data directory.

    Args:
        source: of each row the number of its file, among the ``files`` of report.json (rows,).
        line: its line there, from 1 (rows,).
    """
    np.save(folder / NAME, np.stack([source, line], axis=1).astype(np.int64), allow_pickle=False)


def origins_of(folder: Path, rows: Sequence[int]) -> list[str] | None:
    """``file:line`` of some lines of train.jsonl, numbered from 0; None where nothing that can be used says it.

    Args:
        folder: the data directory.
    """
    try:
        names = [item["file"] for item in object_in(folder / "report.json")["files"]]
        found = np.load(folder / NAME, mmap_mode="r", allow_pickle=False)[list(rows)]
        return [f"{names[source]}:{line}" for source, line in found.tolist()]
    except (OSError, ValueError, LookupError, TypeError, EOFError):
        return None
