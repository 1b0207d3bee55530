"""Which rows are kept for validation: decided by what a row asks, not by where it stands."""

from __future__ import annotations

import math

import numpy as np


def choose_valid(prompt_hash: np.ndarray, valid: float) -> np.ndarray:
    """Choose the rows for validation.

    A share looks at each hash alone, so rows that are added later never move the others. Rows with the same hash, which
    ask the same, stay on one side. Where there are two different hashes and ``valid`` is above zero, no side is empty.

    Args:
        prompt_hash: uint64, shape (rows,): a hash of each row's prompt and of the seed, evenly spread over 64 bits.
        valid: a share of the rows below 1, a whole number of rows from 1 on, or 0 for none. A number is never
            exceeded, except where every prompt has more rows than that: then the prompt with the fewest is taken.

    Returns:
        bool, shape (rows,): True for validation. It depends on the hashes alone, not on the order of the rows.
    """
    hashes = np.asarray(prompt_hash, dtype=np.uint64)
    groups, sizes = np.unique(hashes, return_counts=True)
    if valid <= 0 or len(groups) < 2:
        return np.zeros(len(hashes), dtype=bool)
    chosen = _by_share(groups, valid) if valid < 1 else _by_number(sizes, int(valid))
    return chosen[np.searchsorted(groups, hashes)]


def _by_share(groups: np.ndarray, share: float) -> np.ndarray:
    """Groups below the share of the hashes' range; the first and the last stay on different sides."""
    below = math.ceil(share * 2**64)  # exact: a float times a power of two, and hashes are whole numbers
    chosen = groups < np.uint64(below)
    chosen[0], chosen[-1] = True, False
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
