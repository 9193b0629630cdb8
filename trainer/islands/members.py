"""Members of a step with islands: each cluster computes the steps of its own islands, by the loop's own means.

In between, clusters do not wait for each other: what a step has given is told to all in the next step in which they
meet anyway, and is written to the log then.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

from trainer import loop
from trainer.config import Config
from trainer.data import Batches, MicroBatch
from trainer.errors import NumericsError, TopropeError
from trainer.islands.post import Post
from trainer.islands.schedule import Schedule
from trainer.islands.state import IslandsState, config_of
from trainer.log.events import Event, StepDone
from trainer.loop import Collaborators
from trainer.parallel.world import AllRanks, StepMembers
from trainer.step import StepContext, StepResult, TrainState

T = TypeVar("T")
NOT_KNOWN = StepResult(math.nan, math.nan, "", 0, None, False)
"""In place of what a step of all islands has given, until the ranks meet."""


def ranks_meet(config: Config, step: int) -> bool:
    """True if all ranks take part in something after `step`: an exchange, an evaluation, a save."""
    saved, every = config.checkpoint, config.eval.every_steps
    due = any(loop.due(step, n, config.budget.steps) for n in (every, saved.every_steps, saved.memory_every_steps))
    return due or bool(Schedule.of(config).sent(step))


class IslandBatches(Batches):
    """An island's share of the micro-batches: of K islands, every K-th one."""

    def __init__(self, batches: Batches, island: int, islands: int) -> None:
        # Not the constructor of Batches: what is read, and faults on purpose, are those of the whole.
        self._whole, self._island, self._islands = batches, island, islands
        self.micro_batches, self.sequences = batches.micro_batches // islands, batches.sequences

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        return self._whole.micro_batch(step, self._island + index * self._islands)


@dataclass
class Told:
    """Results of the steps since the ranks met last, as this rank knows them."""

    own: list[list[StepResult]] = field(default_factory=list)
    """Results of its own islands, by step."""
    error: TopropeError | None = None
    """The error after which it computes nothing more; raised on all ranks when they meet."""
    of_all: list[StepResult] = field(default_factory=list)
    """Results of all islands, by step: known when the ranks have met."""
    unwritten: list[StepDone] = field(default_factory=list)

    def tell(self) -> list[list[StepResult]]:
        if self.error is not None:
            raise self.error
        return self.own

    def written(self, event: StepDone) -> list[StepDone]:
        """Return the events of the steps of which all is known, in order; keep `event` until then."""
        self.unwritten.append(event)
        known, self.of_all = self.of_all, []
        steps, self.unwritten[: len(known)] = self.unwritten[: len(known)], []
        return [
            replace(
                done, loss=result.loss, grad_norm=result.norm, samples=result.samples, redone=result.redone,
                flushed=result.flushed,
            )
            for done, result in zip(steps, known, strict=True)
        ]  # fmt: skip


@dataclass(frozen=True)
class IslandMembers(AllRanks):
    """All ranks take part in every step, each cluster with its own islands."""

    state: IslandsState
    islands: Sequence[tuple[int, TrainState, Collaborators]]
    """Number and state of each island of this rank's cluster, and what its step is computed with."""
    config: Config
    stop_requested: Callable[[], bool]
    told: Told

    def meet(self, state: Any) -> bool:
        if self.state.step == 0:  # weights may have been loaded since the islands were built
            self.state.exchange.begin()
        return False

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        """Have every island's step computed; `compute`, which is for one state on all ranks, is not called.

        The result is that of all islands, or NOT_KNOWN where the ranks do not meet after this step.
        """
        told, clusters = self.told, self.state.clusters
        if clusters.post is not None:
            clusters.post.at(step + 1)
        if told.error is None:
            try:
                told.own.append([self._compute(*island) for island in self.islands])
            except TopropeError as error:
                told.error = error  # the islands' state is not used again: where the ranks meet, all end
        if not ranks_meet(self.config, step + 1):
            return cast(T, NOT_KNOWN)
        found = self.world.agree(lambda: (self.stop_requested(), told.tell()))
        stop = any(stop for stop, _ in found)
        of_clusters = found[:: clusters.within.size]  # the ranks of a cluster have computed the same
        by_step = zip(*(own for _, own in of_clusters), strict=True)
        told.own, told.of_all = [], [together(list(itertools.chain(*ranks)), stop) for ranks in by_step]
        return cast(T, told.of_all[-1])

    def _compute(self, island: int, state: TrainState, collaborators: Collaborators) -> StepResult:
        members, islands = collaborators.context.members, self.config.islands.count
        try:
            return members.commit(state.step, lambda present: loop.finite_gradients(state, collaborators, present))
        except NumericsError as error:
            counted = f"Its micro-batch i is micro-batch {island} + {islands}·i of the whole step"
            raise NumericsError(f"island {island}: {error}\n  {counted}.") from None


def together(results: Sequence[StepResult], stop: bool) -> StepResult:
    """Return one result for the step of all islands, in the order of their numbers.

    The loss is the mean over islands, each with its own weights. The gradient norm is that of the loudest island.
    """
    flushed = [result.flushed for result in results if result.flushed is not None]
    samples = [result.samples for result in results]
    return replace(
        results[0],
        loss=math.fsum(result.loss for result in results) / len(results),
        norm=max(result.norm for result in results),
        samples=samples[0] if len(samples) == 1 else hashlib.sha256(repr(samples).encode()).hexdigest()[:16],
        redone=max(result.redone for result in results),
        flushed=math.fsum(flushed) / len(flushed) if flushed else None,
        stop=stop,
    )


def trained_here(state: TrainState) -> TrainState:
    """Return the state that this rank's gradients are of: that of its first island, where there are islands."""
    own = state.own if isinstance(state, IslandsState) else {}
    return next(iter(own.values()), state)


def with_islands(state: IslandsState, collaborators: Collaborators, log: Callable[[Event], None]) -> Collaborators:
    """Return collaborators for the loop that compute the islands of `state`.

    `log` takes an event that this rank alone knows.
    """
    context = collaborators.context
    config, world, batches = context.config, state.clusters.world, context.batches
    islands = []
    for k, island in state.own.items():
        own = config_of(config, k)
        present = AllRanks(state.clusters.within, own.data.micro_batches)
        of_island = StepContext(own, present, IslandBatches(batches, k, config.islands.count), context.hook)
        islands.append((k, island, replace(collaborators, context=of_island, record=log)))
    told = Told()

    def record(event: Event) -> None:
        for one in told.written(event) if isinstance(event, StepDone) else [event]:
            collaborators.record(one)

    state.exchange.report, state.exchange.hook = collaborators.record, context.hook
    members = IslandMembers(
        world, config.data.micro_batches, state, islands, config, context.stop_requested, told
    )  # fmt: skip
    given = replace(collaborators, context=replace(context, members=members), record=record)
    return given if state.clusters.post is None else _apart(given, state.clusters.post)


class ApartContext(StepContext):
    """Step context of a cluster that lives apart: it may begin when the others are many steps on, or not there."""

    def any_stop_requested(self) -> bool:
        return False  # it is heeded where the clusters meet next


def _apart(collaborators: Collaborators, post: Post) -> Collaborators:
    given = {field.name: getattr(collaborators.context, field.name) for field in fields(StepContext)}
    evaluated = collaborators.evaluate if post.cluster == 0 else lambda model, step: ()  # all have the same weights
    return replace(collaborators, context=ApartContext(**given), evaluate=evaluated)
