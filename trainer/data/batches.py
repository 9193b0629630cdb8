"""The tokens of a micro-batch: a pure function of (seed, step, micro-batch), so there is no loader state to lose.

Axes: B sequences in a micro-batch, T tokens in a sequence.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np


@dataclass(frozen=True)
class MicroBatch:
    sample_ids: np.ndarray
    """int64[B]: index of each sequence's window in the training tokens."""
    inputs: np.ndarray
    """int64[B, T]"""
    targets: np.ndarray
    """int64[B, T]: the inputs one token later."""


class Batches:
    """The training tokens as windows of `context` + 1, each read once per epoch in an order drawn for that epoch.

    `tokens` is a flat array of at least context + 1 token ids. A step may straddle two epochs.
    """

    def __init__(self, tokens: np.ndarray, *, seed: int, context: int, micro_batches: int, sequences: int) -> None:
        self._windows = windows(tokens, context)
        self.n_windows = len(self._windows)
        self.read: Callable[[np.ndarray], np.ndarray] = lambda sample_ids: self._windows[sample_ids]
        """Copies the windows with these ids out of the store."""
        self.check: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
        """Called with the ids and what was read; returns the right windows."""
        self.micro_batches, self.sequences = micro_batches, sequences

        # A cache, not state. Two entries, because a step near an epoch's end needs both orders.
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return permutation(seed, epoch, self.n_windows)

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
        epochs, offsets = np.divmod(np.arange(first, first + self.sequences), self.n_windows)
        sample_ids = np.concatenate([self._order(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])
        rows = self.read(sample_ids)
        if self.check is not None:
            rows = self.check(sample_ids, rows)
        gathered = rows.astype(np.int64)
        return MicroBatch(sample_ids, gathered[:, :-1], gathered[:, 1:])


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
    """Return the order in which an epoch reads its n windows; int64[n]. `seed` and `epoch` are below 2^63."""
    # NumPy keeps the streams of bit generators stable between versions, but not Generator.permutation: so the raw
    # stream is sorted here. Seed and epoch are the two halves of Philox's 128-bit key.
    stream = np.random.Philox(key=(seed << 64) | epoch).random_raw(n)
    return np.argsort(stream, kind="stable")


def digest(sample_ids: np.ndarray) -> int:
    """Return 48 bits of SHA-256 over sample ids as little-endian int64: few enough for a float64 to hold exactly."""
    return int.from_bytes(hashlib.sha256(sample_ids.astype("<i8").tobytes()).digest()[:6], "big")
