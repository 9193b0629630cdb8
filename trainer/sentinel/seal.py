"""The state: each rank hashes weights, moments and grids after an update, and again before it computes from them."""

from collections.abc import Sequence

import torch

from trainer.sentinel.bits import bits_hash, combined
from trainer.step import TrainState


class Seal:
    """Hashes of this rank's state, tensor by tensor, from when it was known."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self.hashes: dict[str, int] = {}
        """By tensor, as sealed."""
        self._step = -1
        self.first_wrong: str | None = None
        """First tensor that had changed when a part was last compared."""

    def of(self, completed: int) -> bool:
        """True if the state after so many steps is sealed."""
        return self._step == completed

    def renew(self) -> None:
        """Seal the state as it is now."""
        self.hashes, self._step = self._now(""), self._state.step

    def renew_part(self, prefix: str) -> None:
        self.hashes |= self._now(prefix)

    def forget(self) -> None:
        self._step = -1

    def whole(self) -> int:
        """One hash of the state as sealed."""
        return combined(self.hashes.values())

    def now(self, *prefixes: str) -> int:
        """One hash of a part of the state as it is now."""
        return combined(self._now(*prefixes).values())

    def compare(self, *prefixes: str) -> tuple[int, int]:
        """(hash now, as sealed) of a part of the state. Sets `first_wrong`."""
        now = self._now(*prefixes)
        self.first_wrong = next((name for name, value in now.items() if value != self.hashes[name]), None)
        return combined(now.values()), combined(self.hashes[name] for name in now)

    def _now(self, *prefixes: str) -> dict[str, int]:
        tensors = {name: t for name, t in self._state.tensors().items() if name.startswith(prefixes)}
        return dict(zip(tensors, torch.stack([bits_hash(t) for t in tensors.values()]).tolist(), strict=True))


def suspects(hashes: Sequence[tuple[int, int]], are_replicas: bool) -> tuple[int, ...] | None:
    """Ranks whose state is wrong, by (hash now, as sealed) of each; none if it is unknown; None if all agree."""
    changed = tuple(rank for rank, (now, sealed) in enumerate(hashes) if now != sealed)
    values = [now for now, _ in hashes]
    usual = max(values, key=values.count)
    if changed or not are_replicas or values.count(usual) == len(values):
        return changed or None
    majority = 2 * values.count(usual) > len(values)
    return tuple(rank for rank, value in enumerate(values) if value != usual) if majority else ()


def first_unequal(seals: Sequence[dict[str, int]]) -> str | None:
    """First tensor that is not sealed with the same hash on all ranks."""
    return next((name for name in seals[0] if len({sealed.get(name) for sealed in seals}) > 1), None)
