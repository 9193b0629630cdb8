"""Which tokens a micro-batch holds: a pure function of (seed, step, micro-batch), so there is no loader state to lose.

Axes: B sequences in a micro-batch, T tokens in a sequence.
"""

import hashlib
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
        self.micro_batches, self.sequences = micro_batches, sequences

        # A cache, not state: a step near an epoch's end needs two orders again and again.
        @lru_cache(maxsize=2)
        def order(epoch: int) -> np.ndarray:
            return permutation(seed, epoch, self.n_windows)

        self._order = order

    def for_step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of the update that follows `step` finished ones (the first is step 0)."""
        return [self.micro_batch(step, index) for index in range(self.micro_batches)]

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        assert step >= 0, step
        assert 0 <= index < self.micro_batches, index
        first = (step * self.micro_batches + index) * self.sequences
        sample_ids = self._window_ids(first)
        gathered = self._windows[sample_ids].astype(np.int64)
        return MicroBatch(sample_ids, gathered[:, :-1], gathered[:, 1:])

    def _window_ids(self, first: int) -> np.ndarray:
        """Windows at positions first … first + B − 1 of the endless sequence of epochs; int64[B]."""
        epoch, offset = divmod(first, self.n_windows)
        if offset + self.sequences <= self.n_windows:
            return self._order(epoch)[offset : offset + self.sequences]
        positions = np.arange(first, first + self.sequences)
        epochs, offsets = np.divmod(positions, self.n_windows)
        return np.concatenate([self._order(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])


class EvalWindows:
    """An evaluation set as batches of windows that do not overlap, spread evenly if there are more than wanted.

    Of a set of more than `max_tokens`, max_tokens // context windows are read (at least one). A set shorter than one
    window is read as one shorter window. `tokens` holds at least 2 token ids.
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
        """(inputs, targets), both int64[B, T]."""
        assert 0 <= index < len(self), index
        rows = self._windows[index * self._sequences : (index + 1) * self._sequences].astype(np.int64)
        return rows[:, :-1], rows[:, 1:]

    @property
    def n_tokens(self) -> int:
        """Targets that are scored."""
        return self._windows.shape[0] * (self._windows.shape[1] - 1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the window tokens as little-endian int64: which tokens a score is about."""
        return hashlib.sha256(self._windows.astype("<i8").tobytes()).hexdigest()


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """A view [N, context + 1] of the tokens: neighbours share one token, the target of one and input of the next."""
    assert len(tokens) > context, (len(tokens), context)
    view = np.lib.stride_tricks.sliding_window_view(np.asarray(tokens), context + 1)
    return view[::context]


def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which an epoch reads its n windows; int64[n].

    NumPy keeps the streams of bit generators stable between versions but not Generator.permutation, so the raw
    stream is sorted here. `seed` and `epoch` below 2^63 make the two halves of Philox's 128-bit key.
    """
    stream = np.random.Philox(key=(seed << 64) | epoch).random_raw(n)
    return np.argsort(stream, kind="stable")


def digest(sample_ids: np.ndarray) -> int:
    """48 bits of SHA-256 over sample ids as little-endian int64: few enough to pass a float64 unchanged."""
    return int.from_bytes(hashlib.sha256(sample_ids.astype("<i8").tobytes()).digest()[:6], "big")
