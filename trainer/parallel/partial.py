"""Sums of one rank over a part of a step, kept over a reduction that fails.

Exact sums do not depend on who added what. So when a rank dies in the middle of a step, the others keep what they have,
and only the micro-batches of the dead rank are computed again. A reduction overwrites its input: copies are made first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LocalSums:
    """This rank's share of a step's sums, beside the gradients and magnitudes that are added up in place."""

    losses: Tensor
    """Cross-entropy by micro-batch; 0 where this rank has not computed it."""
    digests: Tensor
    """Digest of the sample ids by micro-batch; 0 as above."""
    done: list[int] = field(default_factory=list)
    """The micro-batches that are in the sums."""


class PartialSums:
    """The first pass of a step over its micro-batches, on the committed grid; later passes are begun again instead."""

    def __init__(self) -> None:
        self._step = -1
        self._local: LocalSums | None = None
        self._copies: list[Tensor] = []
        self._reducing = False  # True once the originals may have been overwritten

    def begin(self, step: int, local: LocalSums) -> None:
        """A pass from nothing begins: `step` is the number of completed steps."""
        self._step, self._local, self._reducing = step, local, False

    def of(self, step: int) -> LocalSums | None:
        """Return the sums of this step so far; None if the pass must begin from nothing."""
        return self._local if self._step == step else None

    def done(self, step: int) -> tuple[int, ...]:
        """The micro-batches that need not be computed again."""
        local = self.of(step)
        return () if local is None else tuple(sorted(local.done))

    def forget(self) -> None:
        self._step, self._local, self._reducing = -1, None, False

    def copy(self, *sums: Tensor) -> None:
        """Before these are reduced in place."""
        self._copies = self._copies or [torch.empty_like(tensor) for tensor in sums]  # they keep their sizes
        for original, copied in zip(sums, self._copies, strict=True):
            copied.copy_(original)
        self._reducing = True

    def put_back(self, sums: Sequence[Tensor]) -> None:
        """After a reduction failed: make `sums`, in the order of `copy`, those of this rank alone."""
        if self._reducing:
            for original, copied in zip(sums, self._copies, strict=True):
                original.copy_(copied)
        self._reducing = False
