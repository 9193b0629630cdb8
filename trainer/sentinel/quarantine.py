"""Quarantine: a rank that is wrong twice is not computed with any more."""

import os
from collections.abc import Iterable, Sequence
from typing import NoReturn

from trainer.errors import CorruptionError, QuarantineError
from trainer.parallel import elastic
from trainer.parallel.quorum import MembersChangedError, QuorumMembers
from trainer.parallel.world import Members, World


class Quarantine:
    """Counts how often each rank was wrong in this attempt, and ends the job where that was too often."""

    action, ends_job = "quarantined", True
    """Action that the log tells; `ends_job` is False if the others go on in the same attempt."""

    def __init__(self, within: int, members: Members) -> None:
        self._within, self._members = within, members
        self._checked = 0  # checked steps so far
        self._counted = -1  # the one that was counted last
        self._wrong: dict[int, tuple[int, int]] = {}  # by number: (checked steps then, step) of the last time

    @property
    def on(self) -> bool:
        return self._within > 0

    @property
    def world(self) -> World:
        return self._members.world

    @property
    def numbers(self) -> Sequence[int]:
        """By rank: what the log calls it."""
        return range(self.world.size)

    def count_checked_step(self, step: int) -> None:
        """Count a step once, also if it is computed again because the members have changed."""
        self._checked += step != self._counted
        self._counted = step

    def second_time(self, step: int, found: Iterable[Sequence[int]]) -> tuple[int, int] | None:
        """Note who was wrong in a step, by the ranks of each finding, of which one alone is known to be wrong.

        Returns (rank, step of the first time) of one that was wrong before, within so many checked steps.
        """
        again = None
        for rank in {ranks[0] for ranks in found if len(set(ranks)) == 1}:
            number = self.numbers[rank]
            earlier = self._wrong.get(number)
            self._wrong[number] = self._checked, step
            # What is found twice in one step may have one cause.
            if earlier is not None and 0 < self._checked - earlier[0] < self._within:
                again = rank, earlier[1]
        return again

    def node_of(self, rank: int) -> str:
        """Name of the node of a rank. Collective."""
        return self.world.agree(elastic.node_name)[rank]

    def end(self, rank: int, node: str, fact: str) -> NoReturn:
        """Raise QuarantineError on the node of `rank`, and what asks for a restart on all others. Collective."""
        nodes = self.world.agree(lambda: os.environ.get("GROUP_RANK", "0"))  # of torchrun's agents, one on each
        if nodes[rank] == nodes[self.world.rank]:
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


class QuorumQuarantine(Quarantine):
    """The same where members may leave alone: the others go on without the one that was wrong too often.

    A member that has joined later has not counted what was before, so the members decide together.
    """

    action, ends_job = "excluded", False

    def __init__(self, within: int, members: QuorumMembers) -> None:
        super().__init__(within, members)
        self._quorum = members

    @property
    def numbers(self) -> Sequence[int]:
        size = self._quorum.world.own.size  # a replica group is one member: all its processes have its number
        return [number for number in self._quorum.order for _ in range(size)]

    def second_time(self, step: int, found: Iterable[Sequence[int]]) -> tuple[int, int] | None:
        again = super().second_time(step, found)
        return next(filter(None, self.world.agree(lambda: again)), None)

    def end(self, rank: int, node: str, fact: str) -> NoReturn:
        """Raise QuarantineError on `rank`, and on its replica group, alone. The others meet again, without it."""
        size = self._quorum.world.own.size
        if rank // size == self.world.rank // size:
            raise QuarantineError(
                f"{fact}. It is not applied and not saved.\n"
                f"  A rank that is wrong twice is quarantined: this worker leaves, and is not started again. Test or "
                f"replace node {node}. The others go on without it."
            )
        raise MembersChangedError(f"rank {self.numbers[rank]} is quarantined")
