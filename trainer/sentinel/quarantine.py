"""Quarantine: a rank that is wrong twice is not computed with any more."""

import os
import socket
from collections.abc import Iterable, Sequence
from typing import NoReturn

from trainer.errors import CorruptionError, QuarantineError
from trainer.parallel.world import World


class Quarantine:
    """Counts how often each rank was wrong in this attempt, and ends the job where that was too often."""

    def __init__(self, within: int, world: World) -> None:
        self._within, self._world = within, world
        self._checked = 0  # checked steps so far
        self._wrong: dict[int, tuple[int, int]] = {}  # by rank: (checked steps then, step) of the last time

    @property
    def on(self) -> bool:
        return self._within > 0

    def count_checked_step(self) -> None:
        self._checked += 1

    def second_time(self, step: int, found: Iterable[Sequence[int]]) -> tuple[int, int] | None:
        """Note who was wrong in a step, by the ranks of each finding, of which one alone is known to be wrong.

        Returns (rank, step of the first time) of one that was wrong before, within so many checked steps.
        """
        again = None
        for rank in {ranks[0] for ranks in found if len(set(ranks)) == 1}:
            earlier = self._wrong.get(rank)
            self._wrong[rank] = self._checked, step
            # What is found twice in one step may have one cause.
            if earlier is not None and 0 < self._checked - earlier[0] < self._within:
                again = rank, earlier[1]
        return again

    def node_of(self, rank: int) -> str:
        """Name of the host of a rank. Collective."""
        return self._world.agree(socket.gethostname)[rank]

    def end(self, rank: int, node: str, fact: str) -> NoReturn:
        """Raise QuarantineError on the node of `rank`, and what asks for a restart on all others. Collective."""
        nodes = self._world.agree(lambda: os.environ.get("GROUP_RANK", "0"))  # of torchrun's agents, one on each
        if nodes[rank] == nodes[self._world.rank]:
            raise QuarantineError(
                f"{fact}. It is not applied and not saved.\n"
                f"  A rank that is wrong twice is quarantined. Take node {node} out of the job; the same command then "
                "resumes from the newest checkpoint."
            )
        raise CorruptionError(
            f"{fact}. It is not applied and not saved.\n"
            f"  Node {node} leaves the job. The others start again from the newest checkpoint, without it if torchrun "
            "may go on with fewer nodes (--nnodes=MIN:MAX).",
            restart=True,
        )
