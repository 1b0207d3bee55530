"""Which rows are kept for validation: decided by what a row asks, not by where it stands."""

from __future__ import annotations

import math

import numpy as np

FEWEST = 5  # validation rows that a share which nobody chose gives, where there are enough
_ENOUGH = 6  # times as many rows; of fewer, each is needed more for learning


def fewest_valid(rows: int) -> int:
    """How many rows are kept aside at least where nobody said how many: of a few, a share can be a single one.

    >>> fewest_valid(12), fewest_valid(20), fewest_valid(29), fewest_valid(30), fewest_valid(5000)
    (0, 3, 4, 5, 5)
    """
    return min(FEWEST, rows // _ENOUGH) if rows >= 18 else 0


def most_valid(rows: int) -> int:
    """How many rows are kept aside at most where nobody said how many: of a few, chance can take half.

    >>> most_valid(5), most_valid(17), most_valid(18), most_valid(80)
    (1, 1, 4, 16)
    """
    return max(fewest_valid(rows), -(-rows // 5)) if rows >= 18 else 1


def choose_valid(prompt_hash: np.ndarray, valid: float, fewest: int = 0, most: int | None = None) -> np.ndarray:
    """Choose the rows for validation.

    A share looks at each hash alone, so rows that are added later never move the others, but for what the fewest and
    the most ask for. Rows with the same hash, which ask the same, stay on one side. Where there are two different
    hashes and ``valid`` is above zero, no side is empty.

    Args:
        prompt_hash: uint64, shape (rows,): a hash of each row's prompt and of the seed, evenly spread over 64 bits.
        valid: a share of the rows below 1, a whole number of rows from 1 on, or 0 for none. A number is never
            exceeded, except where every prompt has more rows than that: then the prompt with the fewest is taken.
        fewest: rows that a share gives at least, by the prompts that are next in the order of their hashes; as far as
            a prompt is left for the other side.
        most: rows that a share gives at most, where a prompt has no more.

    Returns:
        bool, shape (rows,): True for validation. It depends on the hashes alone, not on the order of the rows.
    """
    hashes = np.asarray(prompt_hash, dtype=np.uint64)
    groups, sizes = np.unique(hashes, return_counts=True)
    if valid <= 0 or len(groups) < 2:
        return np.zeros(len(hashes), dtype=bool)
    chosen = _by_share(groups, sizes, valid, fewest, most) if valid < 1 else _by_number(sizes, int(valid))
    return chosen[np.searchsorted(groups, hashes)]


def _by_share(groups: np.ndarray, sizes: np.ndarray, share: float, fewest: int, most: int | None) -> np.ndarray:
    """Groups below the share of the hashes' range, and on until there are as many rows as the fewest; neither all of
    them nor none."""
    below = math.ceil(share * 2**64)  # exact: a float times a power of two, and hashes are whole numbers
    rows = np.cumsum(sizes)
    # A prompt with many rows is not taken for the sake of a few.
    chosen = (groups < np.uint64(below)) | (rows - sizes < fewest) & (rows <= 2 * fewest)
    if most is not None:
        chosen &= rows <= most
    chosen[-1] = False
    if not chosen.any():
        first = 0 if most is None or sizes[0] <= most else int(np.argmin(sizes))
        chosen[first] = True
    return chosen


def _by_number(sizes: np.ndarray, number: int) -> np.ndarray:
    """Groups in the order of their hashes while they fit; one that does not fit is passed over."""
    left = min(number, int(sizes.sum()) - 1)  # at least one row is for training
    chosen = np.zeros(len(sizes), dtype=bool)
    for n, size in enumerate(sizes.tolist()):
        if size <= left:
            chosen[n] = True
            left -= size
            if not left:
                break
    if not chosen.any():
        chosen[np.argmin(sizes)] = True
    return chosen
