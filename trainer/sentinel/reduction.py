"""The reduction: what is added up and received is held against the micro-batches that went into it.

Rounded gradients are multiples of their grid, so a weighted sum of their entries is exact, and that of a sum is the sum
of theirs. There is one for each row of a matrix.
"""

import torch
from torch import Tensor

from trainer.parallel.sharding import Sharding
from trainer.parallel.world import World
from trainer.sentinel.bits import differ, factors, row_sums


class ReductionCheck:
    """Weighted sums of this rank's micro-batches in the pass under way."""

    def __init__(self, sharding: Sharding, device: torch.device) -> None:
        self._sharding = sharding
        self._shapes = {name: parameter.shape for name, parameter in sharding.parameters.items()}
        self._segments: dict[str, slice] = {}  # of each parameter in `_own`: one for each row of a matrix, or one
        start = 0
        for name, shape in self._shapes.items():
            self._segments[name] = slice(start, start := start + (shape[0] if len(shape) == 2 else 1))
        self._own = torch.zeros(start, dtype=torch.float64, device=device)

    def add(self, name: str, rounded: Tensor) -> None:
        """Take in a micro-batch's gradient, on its grid and of full shape."""
        self._own[self._segments[name]] += self._sums(name, rounded, slice(0, rounded.shape[0]))

    def added_up_wrong(self) -> str | None:
        """First parameter whose gradients, as this rank has added them up, are not its micro-batches'."""
        return self._first_wrong()

    def received_wrong(self, world: World) -> str | None:
        """First parameter of which this rank has received another sum than that of all ranks. Collective."""
        world.sum(self._own)
        wrong = self._first_wrong()
        self.clear()
        return wrong

    def clear(self) -> None:
        self._own = torch.zeros_like(self._own)  # another one: a collective that was left behind may still write

    def _first_wrong(self) -> str | None:
        vectors = torch.zeros_like(self._own)
        wrong = []
        for name, gradient, rows in self._sharding.gradients():
            segments, sums = self._segments[name], self._sums(name, gradient, rows)
            if len(gradient.shape) != 2:
                vectors[segments] += sums
            elif differ(self._own[segments][rows], sums):
                wrong.append(name)
        self._sharding.sum_over_shards(vectors)
        is_vector = (name for name, shape in self._shapes.items() if len(shape) != 2)
        wrong += [n for n in is_vector if differ(self._own[self._segments[n]], vectors[self._segments[n]])]
        return next(iter(wrong), None)

    def _sums(self, name: str, gradient: Tensor, rows: slice) -> Tensor:
        """Weighted sums of these rows of a gradient, one for each row of a matrix: exact if it is on its grid."""
        shape = self._shapes[name]
        if len(shape) == 2:
            return row_sums(gradient)
        weights = factors(shape.numel(), gradient.device).view(shape)[rows]
        return (gradient.double() * weights).sum().reshape(1)
