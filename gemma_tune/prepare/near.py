"""Conversations that are nearly the same as an earlier one: MinHash signatures and an index of them.

The similarity of two conversations is the Jaccard index of their word triples: how many triples they share, of all that
they have. A signature of 128 bytes estimates it with a standard error of 0.03 at 0.85.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

SIZE = 128  # minima in a signature, one byte each
SHINGLE = 3  # words that are compared together
CHUNK = 64  # signatures that are looked up together
CHAIN = 64  # entries of one bucket that are compared, newest first
LEAST_BAND = 4  # bytes; see NearIndex

# Scripts without spaces between words: each character is a word.
_ALONE = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")
_FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
_PART = 16_384  # characters that are shingled together: a text of any length takes a few megabytes


class _WordHashes(dict):
    """A hash of each word, the same in every process; common words are hashed once."""

    most = 200_000

    def __missing__(self, word: str) -> int:
        if len(self) >= self.most:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little")
        return value


_hashes = _WordHashes()


@cache
def _empty() -> Any:
    from datasketch import MinHash  # loads scipy, a third of a second: only where it is used

    return MinHash(num_perm=SIZE, seed=1, scheme="affine32", hashfunc=int)


def signature(texts: Sequence[str]) -> np.ndarray:
    """The signature of one conversation: uint8, shape (128,). Meant for worker processes.

    Upper and lower case, punctuation and white space make no difference. Triples do not reach from one text to the
    next; a text of one or two words is a shingle as a whole, and so is one without any word.
    """
    minima = _empty().copy()
    shingles: list[int] = []
    for text in texts:
        for start in range(0, len(text) or 1, _PART):
            shingles += _shingles(text[start : start + _PART])
            if len(shingles) > _PART // 8:
                minima.update_batch(shingles)
                shingles = []
    minima.update_batch(shingles)
    # One byte of each minimum. It has to come from all its bits: the high ones are zero in a minimum, and the low ones
    # of two shingles that agree in them once agree in every permutation.
    return (minima.digest() * np.uint32(0x9E3779B1) >> np.uint32(24)).astype(np.uint8)


def unlike(signature: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The signature of a conversation about some pictures: like that of no other pictures, whatever is said."""
    key = hashlib.shake_128("\0".join(names).encode()).digest(SIZE)
    return signature ^ np.frombuffer(key, np.uint8)


def words(text: str) -> list[str]:
    """What of a text is compared, in lower case."""
    return _WORD.findall(text.lower())


def _shingles(text: str) -> list[int]:
    """Hashes of a text's word triples, 32 bits each."""
    found = words(text) or [text.lower().strip()]
    hashes = np.array([_hashes[word] for word in found], dtype=np.uint64)
    size = min(SHINGLE, len(hashes))
    mixed = np.zeros(len(hashes) - size + 1, dtype=np.uint64)
    for n in range(size):
        mixed += hashes[n : n + len(mixed)] * _FACTORS[n]
    return ((mixed ^ mixed >> np.uint64(29)) * _FACTORS[0] >> np.uint64(32)).tolist()


def similarity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Estimated Jaccard index, 0 to 1, along the last axis of two signatures (or arrays of them)."""
    return np.count_nonzero(one == other, axis=-1) / SIZE


class NearIndex:
    """Finds an earlier conversation that is nearly the same, and remembers those that have none.

    A conversation that is nearly the same as an earlier one is not added: it is going to be dropped, and what is
    similar to a dropped row alone has to be kept.

    Two signatures that agree in a share ``threshold`` of their bytes differ in few of them. Cut into more bands than
    that, at least one band is equal, so looking up equal bands finds every such pair. This holds above a threshold of
    0.75; up to it, bands of ``LEAST_BAND`` bytes keep unrelated rows apart and miss up to 13 % of the pairs that are
    just similar enough (at 0.5). Among very many conversations with an equal band, the newest ``CHAIN`` are compared.

    Args:
        threshold: estimated similarity from which on conversations are nearly the same, above 0 to 1.

    Memory: 0.4 kB per remembered conversation at 0.85 (0.2 at 1, 0.5 at 0.5); twice that just after it has grown.
    """

    def __init__(self, threshold: float):
        self._agreeing = math.ceil(threshold * SIZE - 1e-9)
        self._width = max(LEAST_BAND, SIZE // (SIZE - self._agreeing + 1))
        self._bands = min(SIZE // self._width, SIZE - self._agreeing + 1)
        self._count = 0
        self._allocate(1024)

    def __len__(self) -> int:
        """How many conversations are remembered."""
        return self._count

    def earlier(self, keys: np.ndarray, signatures: np.ndarray) -> np.ndarray:
        """Of each conversation in a block, the key of the first remembered one that is nearly the same.

        Where there is none, which is -1, it is added. Those of the block are compared with each other, too.

        Args:
            keys: int64, shape (n,), not negative: what to call the conversations.
            signatures: uint8, shape (n, 128).

        Returns:
            int64, shape (n,): keys of earlier conversations, -1 where there is none.
        """
        chunks = [self._chunk(keys[n : n + CHUNK], signatures[n : n + CHUNK]) for n in range(0, len(keys), CHUNK)]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)

    def _chunk(self, keys: np.ndarray, signatures: np.ndarray) -> np.ndarray:
        buckets = self._buckets(signatures)
        first = self._first(signatures, buckets)
        found = np.where(first < self._count, self._keys[np.minimum(first, self._count)], -1)
        kept = first == self._count
        agree = similarity(signatures[:, np.newaxis], signatures) * SIZE >= self._agreeing
        for n in np.flatnonzero(kept & (np.tril(agree, -1).any(axis=1))):
            before = np.flatnonzero(agree[n, :n] & kept[:n])
            if len(before):
                found[n], kept[n] = keys[before[0]], False
        self._add(keys[kept], signatures[kept])
        return found

    def _buckets(self, signatures: np.ndarray) -> np.ndarray:
        """The bucket of each band: shape (n, bands)."""
        bands = signatures[:, : self._bands * self._width].reshape(len(signatures), self._bands, self._width)
        mixed = np.tile(np.arange(self._bands, dtype=np.uint64), (len(bands), 1))
        for n in range(self._width):
            mixed = (mixed ^ bands[:, :, n]) * _FACTORS[0]
            mixed ^= mixed >> np.uint64(32)
        return (mixed & np.uint64(len(self._heads) - 1)).astype(np.int64)

    def _first(self, signatures: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        """The smallest position of a remembered signature that agrees with each; the count where there is none."""
        first = np.full(len(signatures), self._count, dtype=np.int64)
        rows = np.repeat(np.arange(len(signatures)), self._bands)
        entries = self._heads[buckets.ravel()].astype(np.int64)
        for _ in range(CHAIN):
            used = entries > 0
            rows, entries = rows[used], entries[used]
            if not len(rows):
                break
            positions = (entries - 1) // self._bands
            agree = np.count_nonzero(signatures[rows] == self._signatures[positions], axis=1) >= self._agreeing
            np.minimum.at(first, rows[agree], positions[agree])
            entries = self._next[entries - 1].astype(np.int64)
        return first

    def _add(self, keys: np.ndarray, signatures: np.ndarray) -> None:
        end = self._count + len(keys)
        if end >= len(self._keys):
            self._grow()
        self._keys[self._count : end], self._signatures[self._count : end] = keys, signatures
        self._link(self._count, end)
        self._count = end

    def _link(self, start: int, end: int) -> None:
        """Put the bands of these positions in front of their buckets' chains. Entries count from 1; 0 is the end."""
        buckets = self._buckets(self._signatures[start:end]).ravel()
        order = np.argsort(buckets, kind="stable")
        entries, buckets = (order + start * self._bands + 1).astype(np.uint32), buckets[order]
        same = np.flatnonzero(buckets[1:] == buckets[:-1]) + 1  # behind another of the same bucket
        behind = self._heads[buckets]
        behind[same] = entries[same - 1]
        self._next[entries - 1] = behind
        self._heads[buckets] = entries  # the last of a bucket stays

    def _grow(self) -> None:
        keys, signatures = self._keys, self._signatures
        self._allocate(2 * len(keys))
        self._keys[: self._count], self._signatures[: self._count] = keys[: self._count], signatures[: self._count]
        for start in range(0, self._count, 8192):
            self._link(start, min(start + 8192, self._count))

    def _allocate(self, rows: int) -> None:
        self._keys = np.zeros(rows, dtype=np.int64)
        self._signatures = np.zeros((rows, SIZE), dtype=np.uint8)
        self._next = np.zeros(rows * self._bands, dtype=np.uint32)
        self._heads = np.zeros(1 << (rows * self._bands - 1).bit_length(), dtype=np.uint32)

