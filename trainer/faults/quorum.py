"""Faults of what quorum mode alone has: an arbiter, spares, joining, the hand-over of the state, a step that goes on.

Under torchrun a death restarts all ranks, so none of these can be made there.
"""

import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from trainer.config import Config, FaultEntry
from trainer.faults.fault import LINUX, SPARES, STEP, Fault, Harmless, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.process import kill_self
from trainer.faults.rank import RankContext
from trainer.phases import Phase

if TYPE_CHECKING:
    from trainer.launch.cluster import Agents

ALONE = "only `trainer launch` has {}: torchrun restarts all ranks when one dies"


class QuorumFault(Fault):
    """A fault that only a job can have in which a death ends nobody else."""

    group = "quorum"
    detected = "the arbiter sees the connection close"
    recovered = "the others compute what is missing of the step; a successor joins"


class QuorumDeath(QuorumFault):
    """A death at a point that is more delicate than others."""

    phases = STEP
    expected_incidents = ("worker_lost",)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        kill_self()


class DeathWhileJoining(QuorumDeath):
    imitates = "a replacement machine that is broken too"
    made = "kill -KILL, and again of the successor when it is in its first epoch and has not met the others yet"
    settings: ClassVar = {"times": Setting(2, "deaths in a row", 2)}
    again_at = (Phase.JOINING,)
    not_in: ClassVar = {"restart": ALONE.format("workers that join")}


class DeathInHandOver(QuorumDeath):
    imitates = "a replacement machine that breaks while it gets the state"
    made = "kill -KILL, and again of the successor when it has received the first piece of the state"
    settings: ClassVar = {"times": Setting(2, "deaths in a row", 2)}
    again_at = (Phase.IN_TRANSFER,)
    not_in: ClassVar = {"restart": ALONE.format("a hand-over of the state")}


class GiverDies(QuorumDeath):
    imitates = "the death of the machine that hands its state to a newcomer"
    made = "kill -KILL of a rank; then of the member that hands the state to the successor, after the first piece"
    settings: ClassVar = {}
    again_at = (Phase.IN_TRANSFER,)
    again_on_main = True
    not_in: ClassVar = {"restart": ALONE.format("a hand-over of the state")}

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        if entry.rank in (0, "rank0", "writer"):
            return "it is rank 0 that shall hand over the state.\n  Give another rank."
        return "one worker has nobody to hand its state to.\n  Start 2 or more." if world_size == 1 else ""


class TwoDeaths(QuorumDeath):
    imitates = "a chassis that takes two workers with it"
    made = "kill -KILL of a rank and of the next one, in the same step"
    neighbours = 1
    not_in: ClassVar = {"restart": ALONE.format("survivors")}

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        if entry.rank == "all":
            return "all ranks would die, and nobody would be left.\n  Name one rank."
        return "nobody would be left.\n  Start 3 workers or more." if world_size < 3 else ""


class DeathInSecondPass(QuorumDeath):
    imitates = "a crash while a step is computed again on a coarser grid"
    made = "kill -KILL when the grid has been widened, or after some micro-batches of the pass that follows"
    phases = (Phase.WIDENED,)
    settings: ClassVar = {"micro_batches": Setting(1, "how many of that pass it begins before it dies", zero=True)}
    not_in: ClassVar = {"restart": ALONE.format("a step that goes on")}

    def usual_step(self, every: int, steps: int) -> int:
        return 1  # the first step finds the finest grid too fine

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        left = planned.settings["micro_batches"]

        def count(phase: str, step: int) -> None:
            nonlocal left
            # A rank may have fewer of them than it shall begin.
            left -= phase == Phase.BEFORE_BACKWARD
            if not left or phase == Phase.BEFORE_REDUCE:
                kill_self()

        if left:
            rank.followers.append(count)
        else:
            kill_self()


class ArbiterFault(QuorumFault):
    detected = "every worker and the launcher see the connection close"
    recovered = "the launcher starts it again from its own log; the workers wait, come back and go on"
    needs = (LINUX,)
    on_rank = False
    names_rank = False
    not_in: ClassVar = {"restart": ALONE.format("an arbiter")}

    def obstacle_outside(self, planned: PlannedFault, cluster: "Agents") -> str:
        return "" if cluster.arbiter() else "the job has no arbiter now"


class ArbiterKilled(ArbiterFault):
    imitates = "the host of the coordinator crashes"
    made = "kill -KILL of the arbiter"

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.cluster.send(outside.arbiter(), signal.SIGKILL)


class ArbiterUnreachable(Harmless, ArbiterFault):
    imitates = "the coordinator, or the way to it, does not answer for a while"
    made = "kill -STOP of the arbiter, then -CONT; in the meantime a worker dies"
    detected = "no fault while nobody dies; a death waits for it"
    settings: ClassVar = {
        "seconds": Setting(3.0, "how long"),
        "deaths": Setting(1, "workers that die meanwhile", most=1, zero=True),
    }  # fmt: skip
    may_cause = ("worker_lost",)

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        arbiter = outside.arbiter()
        outside.cluster.send(arbiter, signal.SIGSTOP)
        try:
            workers = outside.cluster.workers()
            for rank in sorted(workers)[: planned.settings["deaths"]]:
                outside.cluster.send(workers[rank], signal.SIGKILL)
            outside.wait(planned.settings["seconds"])
        finally:
            outside.cluster.send(arbiter, signal.SIGCONT)


class SpareDies(Harmless, QuorumFault):
    imitates = "a machine that fails while it waits to be needed"
    made = "kill -KILL of a spare that is ready"
    detected = "no fault: nobody counts on it. Another spare starts"
    needs = (LINUX, SPARES)
    on_rank = False
    names_rank = False
    not_in: ClassVar = {"restart": ALONE.format("spares")}

    def obstacle_outside(self, planned: PlannedFault, cluster: "Agents") -> str:
        return "" if cluster.spares() else "the job has no spare now"

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.cluster.send(outside.cluster.spares()[0], signal.SIGKILL)
