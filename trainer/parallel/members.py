"""The ranks that take part in a step.

A step is a set of micro-batches, fixed by the config; any set of ranks may compute it, with the same bits. So the
members are a value of the step and not of the job: the loop asks `Members` to have a step computed, and applies only
the result that was committed. Today there is one kind: all ranks of the job, and a rank that is lost ends the attempt.
A kind that survives a loss would call `compute` again with the ranks and micro-batches that remain.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trainer.parallel.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class StepMembers:
    """The ranks that compute a step together, and what they compute."""

    world: World
    """The members, as this rank sees them; reductions go over its group."""
    micro_batches: Sequence[int]

    def own_micro_batches(self) -> list[int | None]:
        """This rank's share, one entry a round; None where it has nothing to compute in that round."""
        rounds = self.world.assign_micro_batches(len(self.micro_batches))
        return [None if position is None else self.micro_batches[position] for position in rounds]


class Members(Protocol):
    @property
    def world(self) -> World:
        """The ranks between two steps: for decisions, evaluation and checkpoints."""
        ...

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        """Have a step computed by its members. Return the result, the same on all of them. Collective."""
        ...


@dataclass(frozen=True)
class AllRanks:
    """All ranks of the job take part in every step."""

    world: World
    micro_batches: int
    """Number of micro-batches in a step."""

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        # A lost rank makes the reductions inside `compute` raise on the others, so what returns is complete.
        return compute(StepMembers(self.world, range(self.micro_batches)))
