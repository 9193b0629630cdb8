"""The tokens of a micro-batch: a pure function of (seed, step, micro-batch), so there is no loader state to lose.

Axes: B sequences in a micro-batch, T tokens in a sequence.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache

import numpy as np

_SOURCE_BITS = 32
"""Bits of an epoch's number; those above it number the source of a mixture."""
_CHOICE = 1 << 63
"""Takes the place of an epoch's number where windows are chosen: larger than any epoch."""


@dataclass(frozen=True)
class MicroBatch:
    sample_ids: np.ndarray
    """int64[B]: index of each sequence's window in the training tokens."""
    inputs: np.ndarray
    """int64[B, T]"""
    targets: np.ndarray
    """int64[B, T]: the inputs one token later."""


@dataclass(frozen=True)
class Share:
    """A source's part of a mixture."""

    name: str
    first: int
    """First of its windows; they are those that hold no token of another source."""
    count: int
    """Number of its windows."""
    weight: Fraction
    """Share of the windows that are read; those of a mixture sum to 1."""


class Turns:
    """The order in which the sources of a mixture take turns, as a function of the position.

    Of any first n positions each source has its weight times n, to less than one. The order is a cycle.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        self.shares = shares
        self._length = math.lcm(*(share.weight.denominator for share in shares))
        wanted = [int(share.weight * self._length) for share in shares]
        self._wanted, self._turns = np.array(wanted), _cycle(*wanted)
        self._before = np.zeros(self._length, dtype=np.int64)
        for number in range(len(shares)):
            mine = self._turns == number
            self._before[mine] = np.arange(mine.sum())

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (number of the source, how often it has had its turn before) of each position."""
        cycles, places = np.divmod(positions, self._length)
        sources = self._turns[places]
        return sources, cycles * self._wanted[sources] + self._before[places]

    def exhausted_at(self, number: int, epochs: int = 1) -> int:
        """Return the first position at which a source has been read so many times."""
        cycles, rest = divmod(self.shares[number].count * epochs, int(self._wanted[number]))
        return cycles * self._length + int(np.flatnonzero(self._turns == number)[rest])


@lru_cache(maxsize=8)
def _cycle(*wanted: int) -> np.ndarray:
    """Return the source of each turn of a cycle in which source i has wanted[i] turns."""
    weights, length = np.array(wanted), sum(wanted)
    counts, turns = np.zeros(len(wanted), dtype=np.int64), []
    for turn in range(1, length + 1):
        # A source has a turn not before its share allows it; of those, the one whose turn is due first. So no source is
        # ever a whole turn ahead or behind (Baruah et al. 1996, proportionate progress).
        due = -(-(counts + 1) * length // weights)
        due[counts * length >= weights * turn] = np.iinfo(np.int64).max
        turns.append(int(due.argmin()))
        counts[turns[-1]] += 1
    return np.array(turns)


class Batches:
    """The training tokens as windows of `context` + 1, each read once per epoch in an order drawn for that epoch.

    `tokens` is a flat array of at least context + 1 token ids. A step may straddle two epochs. With `unique_tokens`
    only so many of them are read: windows drawn by the seed, those of a smaller number among those of a larger one.
    With `mixture` sources take turns by their weights, each read in an order of its own for each of its epochs.
    """

    def __init__(
        self, tokens: np.ndarray, *, seed: int, context: int, micro_batches: int, sequences: int,
        unique_tokens: int = 0, mixture: Sequence[Share] = (),
    ) -> None:  # fmt: skip
        self._windows = windows(tokens, context)
        self._chosen: np.ndarray | None = None
        if unique_tokens:
            count = unique_tokens // context
            assert 0 < count <= len(self._windows), (unique_tokens, len(tokens))  # `prepare` has refused others
            self._chosen = permutation(seed, _CHOICE, len(self._windows))[:count]
        self.n_windows = len(self._windows if self._chosen is None else self._chosen)
        """Number of windows that are read before any of them is read again."""
        self._turns = Turns(mixture) if mixture else None
        if self._turns is not None:
            self.n_windows = min(map(self._turns.exhausted_at, range(len(mixture))))
        self.read: Callable[[np.ndarray], np.ndarray] = lambda sample_ids: self._windows[sample_ids]
        """Copies the windows with these ids out of the store."""
        self.check: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
        """Called with the ids and what was read; returns the right windows."""
        self.micro_batches, self.sequences = micro_batches, sequences

        # A cache, not state. Two entries, because a step near an epoch's end needs both orders.
        @lru_cache(maxsize=2 * max(len(mixture), 1))
        def order(epoch: int, source: int = 0) -> np.ndarray:
            count = mixture[source].count if mixture else self.n_windows
            return permutation(seed, epoch | source << _SOURCE_BITS, count)

        self._order = order

    def for_step(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of the update that follows `step` finished ones (the first is step 0)."""
        return [self.micro_batch(step, index) for index in range(self.micro_batches)]

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """Return micro-batch `index` of the M of a step."""
        assert step >= 0, step
        assert 0 <= index < self.micro_batches, index
        # Its positions in the endless sequence of epochs; a micro-batch may straddle several.
        first = (step * self.micro_batches + index) * self.sequences
        positions = np.arange(first, first + self.sequences)
        sample_ids = self._ids(positions) if self._turns is None else self._ids_of_mixture(self._turns, positions)
        rows = self.read(sample_ids)
        if self.check is not None:
            rows = self.check(sample_ids, rows)
        gathered = rows.astype(np.int64)
        return MicroBatch(sample_ids, gathered[:, :-1], gathered[:, 1:])

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        """Windows at these positions in the endless sequence of epochs."""
        epochs, offsets = np.divmod(positions, self.n_windows)
        ids = np.concatenate([self._order(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])
        return ids if self._chosen is None else self._chosen[ids]

    def _ids_of_mixture(self, turns: Turns, positions: np.ndarray) -> np.ndarray:
        ids = np.empty_like(positions)
        for place, (source, turn) in enumerate(zip(*turns.at(positions), strict=True)):
            share = turns.shares[source]
            epoch, offset = divmod(int(turn), share.count)
            ids[place] = share.first + self._order(epoch, int(source))[offset]
        return ids


class EvalWindows:
    """An evaluation set as batches of windows that do not overlap.

    Of more than `max_tokens` tokens, max_tokens // context windows (at least one) are read, spread evenly. A set
    shorter than one window is one shorter window. `tokens` holds at least 2 token ids.
    """

    def __init__(self, tokens: np.ndarray, *, context: int, sequences: int, max_tokens: int) -> None:
        assert len(tokens) >= 2, len(tokens)
        every = windows(tokens, min(context, len(tokens) - 1))
        wanted = min(len(every), max(max_tokens // context, 1))
        self._windows = every[np.arange(wanted) * len(every) // wanted]
        self._sequences = sequences

    def __len__(self) -> int:
        """Number of batches; the last may hold fewer sequences."""
        return (len(self._windows) + self._sequences - 1) // self._sequences

    def batch(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (inputs, targets), both int64[B, T]."""
        assert 0 <= index < len(self), index
        rows = self._windows[index * self._sequences : (index + 1) * self._sequences].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]

    @property
    def n_tokens(self) -> int:
        """Number of targets that are scored."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the window tokens as little-endian int64; identifies the tokens of a score."""
        return hashlib.sha256(self._windows.astype("<i8").tobytes()).hexdigest()


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Return a view [N, context + 1]. Neighbours share a token: the last target of one, the first input of the next."""
    assert len(tokens) > context, (len(tokens), context)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context + 1)
    return view[::context]


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """Return the order in which an epoch reads its n windows; int64[n]. `seed` is below 2^63, `epoch` below 2^64."""
    # NumPy keeps the streams of bit generators stable between versions, but not Generator.permutation: so the raw
    # stream is sorted here. Seed and epoch are the two halves of Philox's 128-bit key.
    stream = np.random.Philox(key=(seed << 64) | epoch).random_raw(n)
    return np.argsort(stream, kind="stable")


def digest(sample_ids: np.ndarray) -> int:
    """Return 48 bits of SHA-256 over sample ids as little-endian int64: few enough for a float64 to hold exactly."""
    return int.from_bytes(hashlib.sha256(sample_ids.astype("<i8").tobytes()).digest()[:6], "big")
