"""Tokens as they are read: held against the store as it was when its checksum was verified."""

from collections.abc import Iterable

import numpy as np
import xxhash

from trainer.data.batches import windows

BLOCK_BYTES = 1 << 16


def block_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of each block of a flat array; uint64. Reads all of it."""
    flat = _bytes(tokens)
    blocks = range(0, len(flat), BLOCK_BYTES)
    return np.array([_hash(flat[start : start + BLOCK_BYTES]) for start in blocks], dtype=np.uint64)


class TokenCheck:
    """Tells which windows of `context` + 1 tokens, as they were read, are not those of the store."""

    def __init__(self, tokens: np.ndarray, context: int, hashes: np.ndarray) -> None:
        """`hashes` are those of `block_hashes`, from when the tokens were known to be right."""
        self._bytes, self._hashes = _bytes(tokens), hashes
        self._windows = windows(tokens, context)
        self._stride, self._length = context * tokens.itemsize, (context + 1) * tokens.itemsize

    def wrong(self, sample_ids: np.ndarray, rows: np.ndarray) -> list[int]:
        """Ids of the windows in `rows` that differ from the store, or where the store itself has changed."""
        return [
            int(window)
            for window, row in zip(sample_ids, rows, strict=True)
            # Read from memory that is mapped: it may change between two looks, as the copy in `rows` may have.
            if not np.array_equal(row, self._windows[window]) or not self._is_intact(int(window))
        ]

    def changed(self, sample_ids: Iterable[int]) -> bool:
        """True if the store itself has changed where one of these windows lies."""
        return not all(map(self._is_intact, sample_ids))

    def _is_intact(self, window: int) -> bool:
        first = window * self._stride
        blocks = range(first // BLOCK_BYTES, (first + self._length - 1) // BLOCK_BYTES + 1)
        return all(
            _hash(self._bytes[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]) == int(self._hashes[block])
            for block in blocks
        )


def _bytes(tokens: np.ndarray) -> np.ndarray:
    return np.asarray(tokens).view(np.uint8)


def _hash(block: np.ndarray) -> int:
    return xxhash.xxh3_64_intdigest(block.data)
