"""Near-duplicates: which documents say nearly the same, by MinHash and locality-sensitive hashing.

Two documents are near-duplicates if they share at least `SIMILAR` of their shingles (Jaccard; Broder 1997): runs of
five words, without the case and punctuation of ASCII (curly quotes, dashes and É count as letters). A sketch of a
document is the smallest of its shingles' hashes under each of HASHES functions; the share of equal entries in two
sketches estimates the Jaccard similarity, with a standard deviation of 0.04. Documents meet if a band of ROWS entries
is equal (Leskovec et al. 2020, ch. 3): at a similarity of 0.8 in 99.8 % of cases, at 0.5 in 27 %, and then the
estimate decides.

Documents with fewer than FEWEST_WORDS words are not looked at: short lines of any two texts are alike by chance. A
document inside a much longer one is no near-duplicate of it either.

Everything is in numpy over a megabyte of text at a time. Per document that is kept it takes 0.3 kB of memory.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

SIMILAR = 0.8
BANDS, ROWS = 20, 6
HASHES = BANDS * ROWS
SHINGLE_WORDS = 5
FEWEST_WORDS = 20
VERSION = 1
"""Raised when the same text may give other results: it is part of the key of what is made with them."""

_BATCH_BYTES = 1 << 20
_BLOCK = 1 << 12
_PIECE_BYTES = 1 << 22
"""Longer documents are sketched in pieces, and lose the few shingles across the cuts."""


def _odd_numbers(count: int, seed: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.random.Philox(key=seed).random_raw(count).astype(dtype) | dtype(1)


_MULTIPLIERS = _odd_numbers(HASHES, 1, np.uint32)
_OFFSETS = np.random.Philox(key=2).random_raw(HASHES).astype(np.uint32)
_WORD_PLACES = _odd_numbers(SHINGLE_WORDS, 3, np.uint64)
_BAND_PLACES = _odd_numbers(ROWS, 4, np.uint64)
_BASE = 0x9E3779B97F4A7C15
_LETTERS = bytes(
    byte + 32 if 65 <= byte <= 90 else byte if byte >= 128 or chr(byte).isalnum() else 0 for byte in range(256)
)
"""Small letters, digits and all that is not ASCII make words; everything else is 0, and parts them."""


@dataclass(frozen=True)
class Sketches:
    """Sketches of some documents, in their order."""

    numbers: np.ndarray
    """int64[n]: number of each document in the order it was given."""
    values: np.ndarray
    """uint32[n, HASHES]"""

    def bands(self) -> np.ndarray:
        """uint64[n, BANDS]: equal where two sketches have an equal band."""
        rows = self.values.reshape(-1, BANDS, ROWS).astype(np.uint64)
        return _mixed((rows * _BAND_PLACES).sum(axis=2, dtype=np.uint64))


def sketch(texts: Iterable[str]) -> Iterator[Sketches]:
    """Yield the sketches of the documents that are long enough, about a megabyte of text at a time."""
    batch: list[tuple[int, bytes]] = []
    size = 0
    for number, text in enumerate(texts):
        data = text.encode()
        for start in range(0, len(data), _PIECE_BYTES):
            batch.append((number, data[start : start + _PIECE_BYTES]))
            size += len(batch[-1][1])
        # A document's pieces stay in one batch.
        if size >= _BATCH_BYTES:
            yield _sketch(batch)
            batch, size = [], 0
    if batch:
        yield _sketch(batch)


def _sketch(batch: list[tuple[int, bytes]]) -> Sketches:
    parts = []
    # As many pieces at a time as the longest may have bytes: a power of the base is needed for each byte.
    group: list[tuple[int, bytes]] = []
    size = 0
    for piece in batch:
        size += len(piece[1])
        if group and size > _PIECE_BYTES:
            parts.append(_minima(group))
            group, size = [], len(piece[1])
        group.append(piece)
    parts.append(_minima(group))
    numbers = np.concatenate([found for found, _, _ in parts])
    words = np.concatenate([count for _, count, _ in parts])
    values = np.concatenate([smallest for _, _, smallest in parts])
    if not len(numbers):
        return Sketches(numbers, values)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))  # of documents: several pieces may belong to one
    enough = np.add.reduceat(words, starts) >= FEWEST_WORDS
    return Sketches(numbers[starts][enough], np.minimum.reduceat(values, starts, axis=0)[enough])


def _minima(pieces: list[tuple[int, bytes]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (numbers, words, smallest hashes) of the pieces that have a shingle."""
    text = np.frombuffer(b"\0".join(data for _, data in pieces).translate(_LETTERS) + b"\0", dtype=np.uint8)
    lengths = np.array([len(data) + 1 for _, data in pieces])
    is_word = np.concatenate([[False], text != 0])
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])  # starts and ends of words in turn, as the text ends in 0
    starts, ends = edges[::2], edges[1::2]
    # A word's hash: its bytes as digits of a number, from prefix sums, shifted back by its place. All modulo 2^64.
    powers, inverses = _powers(len(text))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(text * powers, dtype=np.uint64)])
    words = _mixed((sums[ends] - sums[starts]) * inverses[starts])
    piece_of = np.searchsorted(np.cumsum(lengths), starts, side="right")
    last = len(words) - SHINGLE_WORDS + 1
    if last <= 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, HASHES), np.uint32)
    shingles = np.zeros(last, np.uint64)
    for place, factor in enumerate(_WORD_PLACES):
        shingles += words[place : place + last] * factor
    whole = piece_of[:last] == piece_of[SHINGLE_WORDS - 1 :]  # not across two documents
    hashes, piece_of_shingle = (_mixed(shingles[whole]) >> np.uint64(32)).astype(np.uint32), piece_of[:last][whole]
    found, first = np.unique(piece_of_shingle, return_index=True)
    smallest = np.empty((len(found), HASHES), np.uint32)
    # All hashes of some thousand shingles at a time, which stay in the processor's cache; blocks begin with a piece.
    limits = np.append(first, len(hashes))
    low = 0
    while low < len(found):
        high = max(low + 1, int(np.searchsorted(limits, limits[low] + _BLOCK, "right")) - 1)
        block = hashes[limits[low] : limits[high], None] * _MULTIPLIERS + _OFFSETS
        smallest[low:high] = np.minimum.reduceat(block, first[low:high] - first[low], axis=0)
        low = high
    counts = np.bincount(piece_of, minlength=len(pieces))[found]
    return np.array([number for number, _ in pieces], dtype=np.int64)[found], counts, smallest


_known_powers: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of the base and of its inverse modulo 2^64; uint64, `count` or more of each."""
    if len(_known_powers[0]) < count:
        size = 1 << (count - 1).bit_length()
        for place, base in enumerate((_BASE, pow(_BASE, -1, 2**64))):
            factors = np.full(size, base, np.uint64)
            factors[0] = 1
            _known_powers[place] = np.multiply.accumulate(factors)
    return _known_powers[0][:count], _known_powers[1]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread each number over all 64 bits (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Index:
    """Documents that others are looked up in: held-out ones. Takes 0.8 kB for each."""

    def __init__(self, texts: Iterable[str]) -> None:
        found = list(sketch(texts))
        self.numbers = np.concatenate([np.zeros(0, np.int64), *(each.numbers for each in found)])
        """Number of each document that is long enough."""
        self._values = np.concatenate([np.zeros((0, HASHES), np.uint32), *(each.values for each in found)])
        bands = Sketches(self.numbers, self._values).bands()
        self._order = np.argsort(bands, axis=0, kind="stable").T.copy()
        self._bands = np.take_along_axis(bands.T, self._order, axis=1)

    def look_up(self, sketches: Sketches) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number, numbers of its near-duplicates here) for each document that has any."""
        if not len(self.numbers) or not len(sketches.numbers):
            return
        bands = sketches.bands().T
        left = np.array([np.searchsorted(known, keys, "left") for known, keys in zip(self._bands, bands, strict=True)])
        right = np.array(
            [np.searchsorted(known, keys, "right") for known, keys in zip(self._bands, bands, strict=True)]
        )
        for place in np.flatnonzero((right > left).any(axis=0)):
            met = [self._order[band, left[band, place] : right[band, place]] for band in range(BANDS)]
            candidates = np.unique(np.concatenate(met))
            alike = (self._values[candidates] == sketches.values[place]).mean(axis=1) >= SIMILAR
            if alike.any():
                yield int(sketches.numbers[place]), self.numbers[candidates[alike]]


@dataclass
class Repetitions:
    """Finds the documents of a stream that have an earlier near-duplicate in it."""

    _numbers: list[np.ndarray] = field(default_factory=list)
    _bands: list[np.ndarray] = field(default_factory=list)
    _bytes: list[np.ndarray] = field(default_factory=list)

    def add(self, sketches: Sketches) -> None:
        self._numbers.append(sketches.numbers)
        self._bands.append((sketches.bands() >> np.uint64(32)).astype(np.uint32))
        # A byte of each entry is enough to compare: unequal ones are equal in one of 256.
        self._bytes.append(sketches.values.astype(np.uint8))

    def find(self) -> np.ndarray:
        """Return the numbers of the documents with an earlier near-duplicate, sorted; int64[n]. Only once."""
        if not self._numbers:
            return np.zeros(0, np.int64)
        numbers, sketches = np.concatenate(self._numbers), np.concatenate(self._bytes)
        self._bytes.clear()
        repeated = np.zeros(len(numbers), dtype=bool)
        limit = SIMILAR + (1 - SIMILAR) / 256  # with the entries that are equal by chance
        for band in range(BANDS):
            keys = np.concatenate([part[:, band] for part in self._bands])
            order = np.argsort(keys, kind="stable")  # stable: the earlier document first
            is_first = np.diff(keys[order], prepend=~keys[order[:1]]) != 0
            first = np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))
            # Held against the first of its group and the one before it: a group may mix several texts.
            for other in (order[first], np.concatenate([order[:1], order[:-1]])):
                chosen = np.flatnonzero(~is_first & ~repeated[order])
                for block in np.array_split(chosen, 1 + len(chosen) // 65_536):
                    mine, theirs = order[block], other[block]
                    repeated[mine[(sketches[mine] == sketches[theirs]).mean(axis=1) >= limit]] = True
        return numbers[repeated]
