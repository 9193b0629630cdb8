"""Audits of the update where no replica computes the same one: it is computed again from a copy of the state."""

import random
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from trainer.sentinel.bits import bits_hash
from trainer.step import TrainState

RESULTS = 3  # of so many, two that are equal are right


class UpdateAudit:
    """Computes the update of some steps again. Ranks do so in the same steps, each with its own part of the state."""

    def __init__(self, seed: int, share: Fraction) -> None:
        self._seed, self._share = seed, share
        self._before: dict[str, Tensor] | None = None

    def begin(self, state: TrainState) -> None:
        """Before the update: keep a copy of the state, if this step is one of them."""
        drawn = random.Random(f"{self._seed}-{state.step}-update").random() < self._share
        self._before = {name: tensor.clone() for name, tensor in _updated(state).items()} if drawn else None

    @property
    def under_way(self) -> bool:
        return self._before is not None

    def end(self, state: TrainState, repeat: Callable[[bool], bool]) -> str | None:
        """After the update: leave a right one in `state`. Returns the first tensor that was wrong; "" if none was.

        None if no two results agree. `repeat` tells whether any rank needs a third result: an update may be collective.
        """
        assert self._before is not None
        before, self._before = self._before, None
        seen = [_hashes(state)]
        while len(seen) < RESULTS:
            for name, tensor in _updated(state).items():
                tensor.copy_(before[name])
            state.count_steps(state.step - 1)
            for optimizer in state.optimizers:
                optimizer.step()
            seen.append(_hashes(state))
            if not repeat(seen[-1] not in seen[:-1]):
                break
        if seen[-1] not in seen[:-1]:
            return None
        return next((name for name, value in seen[-1].items() if any(value != other[name] for other in seen)), "")


def _updated(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.tensors().items() if not name.startswith("grids.")}


def _hashes(state: TrainState) -> dict[str, int]:
    hashes = torch.stack([bits_hash(tensor) for tensor in _updated(state).values()]).tolist()
    return dict(zip(_updated(state), hashes, strict=True))
