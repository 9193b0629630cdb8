"""One job under failures, from event to event: between two of them its progress is a formula.

Plain Python over a heap: a failure costs some 20 microseconds, whatever the number of devices. (simpy resumes a process
for each step or timer; here nothing happens between failures that would need one.)

The wall time is shared out as in log/goodput.py: `productive` (work that survived), `save_stall`, `lost_steps`, `down`
(until a failure is known), `startup`, `preempted` (maintenance), and beside them `waiting` (for enough healthy nodes,
or for other clusters) and `reduced` (the part of the time that missing nodes would have computed).
"""

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from trainer.forecast.course import Course
from trainer.forecast.failures import Strike, Strikes
from trainer.forecast.scenario import DAY, Quorum, Scenario, load_seconds, save_interval, write_seconds

PARTS: tuple[str, ...] = (
    "productive",
    "save_stall",
    "lost_steps",
    "down",
    "startup",
    "preempted",
    "waiting",
    "reduced",
)
ORDER = ("preempted", "down", "startup")
"""Order in which the job spends what it owes."""
KEPT_INCIDENTS = 2_000
"""Incidents that a replicate keeps; a run of ten million devices has hundreds of thousands."""


@dataclass
class Replicate:
    """One simulated run."""

    wall_seconds: float
    parts: dict[str, float]
    """Seconds by part; they sum to the wall time."""
    lost_by_cause: dict[str, float]
    """Seconds of lost work, detection, restart and waiting, by the failure that began them."""
    failures: dict[str, int]
    incidents: list[dict[str, Any]] = field(default_factory=list)
    """The first of them, with the keys of log/incidents.py."""
    course: Course | None = None
    """Course of the run over time, if it was asked for."""

    @property
    def goodput(self) -> float:
        return self.parts["productive"] / self.wall_seconds


def simulate(scenario: Scenario, seed: int, keep_course: bool = False) -> Replicate:
    """Simulate one run with these random numbers. The same scenario and seed give the same replicate.

    With `keep_course` it comes with what is drawn of it.
    """
    random = np.random.default_rng([scenario.seed, seed])
    course = Course(scenario.days * DAY) if keep_course else None
    if scenario.policy.kind == "islands":
        from trainer.forecast.islands import simulate_islands

        return simulate_islands(scenario, random, course)
    return _Job(scenario, random, Strikes(scenario, random), course).run()


def replay(scenario: Scenario, schedule: Iterable[tuple[float, str]]) -> Replicate:
    """Simulate the run that was struck at these seconds, each by the failure of that name, and at no others.

    The job's own start comes first. Not for islands, whose clusters are struck separately.
    """
    job = _Job(scenario, np.random.default_rng(scenario.seed), _Schedule(scenario, schedule))
    job.start()
    return job.run()


class _Source(Protocol):
    """Failures in the order of time: `Strikes`, or a schedule."""

    @property
    def next_time(self) -> float: ...
    def pop(self) -> tuple[Strike, float]: ...


class _Schedule:
    """Failures that are given, repaired at once."""

    def __init__(self, scenario: Scenario, schedule: Iterable[tuple[float, str]]) -> None:
        causes = {failure.name: cause for cause, failure in enumerate(scenario.failure)}
        self._nodes = [scenario.cluster.nodes_of(f.takes) if f.takes != "job" else 0 for f in scenario.failure]
        self._left = sorted(((time, causes[name]) for time, name in schedule), reverse=True)

    @property
    def next_time(self) -> float:
        return self._left[-1][0] if self._left else math.inf

    def pop(self) -> tuple[Strike, float]:
        time, cause = self._left.pop()
        return Strike(time, cause, 0, self._nodes[cause]), 0.0


class _Job:
    """A job that computes as one: restart, peer memory or quorum."""

    def __init__(
        self, scenario: Scenario, random: np.random.Generator, strikes: _Source, course: Course | None = None
    ) -> None:
        policy = scenario.policy
        self.scenario, self.policy, self.random = scenario, policy, random
        self.horizon = scenario.days * DAY
        self.strikes = strikes
        self.interval, self.stall, self.write = (
            save_interval(scenario),
            policy.save_stall_seconds,
            write_seconds(scenario),
        )
        self.restart = policy.restart_seconds + load_seconds(scenario)
        self.now = 0.0
        self.parts = dict.fromkeys(PARTS, 0.0)
        self.by_cause = {failure.name: 0.0 for failure in scenario.failure}
        self.counts = {failure.name: 0 for failure in scenario.failure}
        self.incidents: list[dict[str, Any]] = []
        self.course = course
        # Progress is in seconds of work at full size. `durable` is what a restart from storage begins with.
        self.progress = self.durable = self.since_save = 0.0
        self.pending: tuple[float, float] | None = None  # (time it becomes durable, progress): a save under way
        # {part: (seconds, cause)} to be spent, in this order, before the job computes again.
        self.owed: dict[str, tuple[float, str | None]] = {}
        self.restarting = False  # all workers start again; else survivors wait with their state
        self.down_nodes = 0
        self.starting = 0  # nodes that are healthy, and whose workers start while the others go on
        self.starts = 0  # counts restarts of all: a worker that was starting then is not waited for
        self.timers: list[tuple[float, int, str, Any]] = []  # repairs, silent corruption noticed, maintenance
        self._numbers = 0
        if scenario.maintenance:
            self._at(scenario.maintenance.every_days * DAY, "maintenance", None)

    def start(self) -> None:
        """Owe the first start of all workers."""
        self._restart(0.0, None)

    def run(self) -> Replicate:
        while (then := min(self.strikes.next_time, self.timers[0][0] if self.timers else math.inf)) < self.horizon:
            self.advance(then)
            if self.timers and self.timers[0][0] == then:
                _, _, what, about = heapq.heappop(self.timers)
                getattr(self, f"_on_{what}")(about)
            else:
                self._on_failure(*self.strikes.pop())
        self.advance(self.horizon)
        return Replicate(self.horizon, self.parts, self.by_cause, self.counts, self.incidents, self.course)

    def _at(self, time: float, what: str, about: Any) -> None:
        self._numbers += 1  # so that equal times never compare what they are about
        heapq.heappush(self.timers, (time, self._numbers, what, about))

    # What happens

    def _on_failure(self, strike: Strike, repair: float) -> None:
        failure = self.scenario.failure[strike.cause]
        self.counts[failure.name] += 1
        if repair and strike.nodes:
            self.down_nodes += strike.nodes
            self._at(strike.time + repair, "repair", strike.nodes)
        if failure.silent_hours is not None:
            # A state saved from now on holds the damage.
            self._at(strike.time + self.random.exponential(failure.silent_hours * 3600) + failure.detect_seconds,
                     "noticed", (failure.name, self._durable_now()))  # fmt: skip
            return
        in_service = self.healthy_share < 1 or strike.nodes == 0 or not self._hits_a_spare(strike, repair)
        if not in_service:
            return
        lost = 0.0
        keeps = isinstance(self.policy, Quorum) and strike.nodes > 0 and self._goes_on(strike.nodes)
        if isinstance(self.policy, Quorum) and keeps:
            self._owe("down", failure.detect_seconds, failure.name)
            self._owe("startup", self.policy.regroup_seconds, failure.name)
            if self.healthy_share >= 1:  # a spare, or the node itself, takes the place
                self._join(strike.nodes, failure.detect_seconds, self.policy.regroup_seconds, failure.name)
        else:
            lost = self._roll_back(self._state_after(strike), failure.name)
            self._restart(failure.detect_seconds, failure.name)
        self._note("worker_lost", failure.name, lost, ends=not keeps)

    def _on_repair(self, nodes: int) -> None:
        self.down_nodes -= nodes
        if (
            isinstance(self.policy, Quorum)
            and self.down_nodes >= self.scenario.cluster.spare_nodes
            and not self.restarting
        ):
            self._join(nodes, 0.0, 0.0, None)  # it was missed, and joins

    def _on_ready(self, about: tuple[int, int, str | None]) -> None:
        starts, nodes, cause = about
        assert isinstance(self.policy, Quorum)
        if starts == self.starts:
            self.starting -= nodes
            self._owe("startup", self.policy.join_seconds, cause)

    def _on_noticed(self, about: tuple[str, float]) -> None:
        name, safe = about
        lost = self._roll_back(min(safe, self.progress), name)
        self.durable = min(self.durable, safe)
        self._restart(0.0, name)
        self._note("corrupted", name, lost, ends=True)

    def _on_maintenance(self, _: None) -> None:
        maintenance = self.scenario.maintenance
        assert maintenance is not None
        self.durable, self.since_save, self.pending = self.progress, 0.0, None  # it saves first
        self._restart(0.0, None, "preempted")
        self._owe("preempted", maintenance.hours * 3600, None)
        self._note("preempted", "maintenance", 0.0, ends=True)
        self._at(self.now + maintenance.every_days * DAY, "maintenance", None)

    # The state

    @property
    def healthy_share(self) -> float:
        """Share of the job's nodes that can serve, spares included; at most 1."""
        cluster = self.scenario.cluster
        return min(1.0, (cluster.nodes + cluster.spare_nodes - self.down_nodes) / cluster.nodes)

    @property
    def enough(self) -> bool:
        return self.healthy_share >= self.scenario.cluster.min_share

    @property
    def speed(self) -> float:
        """Speed of the job, as a share of that with all nodes."""
        share = max(0.0, self.healthy_share - self.starting / self.scenario.cluster.nodes)
        without_one = self.policy.speed_without_one if isinstance(self.policy, Quorum) else None
        return share if without_one is None else without_one ** ((1 - share) * self.scenario.cluster.nodes)

    def _goes_on(self, lost: int) -> bool:
        """True if a quorum that has just lost these nodes has a member left."""
        absent = self.starting + (lost if self.healthy_share >= 1 else 0)  # those under repair are not healthy
        return self.enough and not self.restarting and self.healthy_share * self.scenario.cluster.nodes > absent

    def _join(self, nodes: int, detect_seconds: float, regroup_seconds: float, cause: str | None) -> None:
        """Start workers that take the place of others, beside the job; the others wait only while they join."""
        assert isinstance(self.policy, Quorum)
        if self.policy.start_seconds:
            self.starting += nodes
            ready = self.now + detect_seconds + self.policy.start_seconds
            self._at(ready, "ready", (self.starts, nodes, cause))
        else:
            self._owe("startup", regroup_seconds + self.policy.join_seconds, cause)

    def _hits_a_spare(self, strike: Strike, repair: float) -> bool:
        cluster = self.scenario.cluster
        idle = cluster.spare_nodes - (self.down_nodes - (strike.nodes if repair else 0))
        return idle > 0 and self.random.random() < idle / (cluster.nodes + idle)

    def _durable_now(self) -> float:
        if self.pending is not None and self.pending[0] <= self.now:
            self.durable, self.pending = self.pending[1], None
        return self.durable

    def _state_after(self, strike: Strike) -> float:
        """Progress that the job resumes from."""
        policy, durable = self.policy, self._durable_now()
        if policy.kind != "peer_memory" or strike.nodes != 1:
            return durable  # a rack takes both holders of some shard; a dying job takes all of them
        copied = policy.copy_every_steps * self.scenario.step_seconds
        return max(durable, self.progress - self.progress % copied)

    def _roll_back(self, to: float, cause: str) -> float:
        """Lose the work since `to`. Returns it, in seconds."""
        lost = self.progress - to
        self.parts["productive"] -= lost
        self.parts["lost_steps"] += lost
        self.by_cause[cause] += lost
        self.progress, self.since_save, self.pending = to, 0.0, None
        return lost

    def _restart(self, detect_seconds: float, cause: str | None, ended_as: str = "died") -> None:
        """Begin a restart of the whole job; one that was under way is void."""
        if self.course is not None:
            self.course.ended(self.now, ended_as)
        self.owed = {
            part: owed for part, owed in self.owed.items() if part == "preempted"
        }  # maintenance takes its time
        self.restarting = True
        self.starting, self.starts = 0, self.starts + 1
        self._owe("down", detect_seconds, cause)
        self._owe("startup", self.restart, cause)

    def _owe(self, part: str, seconds: float, cause: str | None) -> None:
        # Failures at the same time are detected and answered together: the longer wait counts, not the sum.
        if seconds > self.owed.get(part, (0.0, None))[0]:
            self.owed[part] = (seconds, cause)

    def _note(self, kind: str, cause: str, lost: float, ends: bool) -> None:
        if self.course is not None:
            self.course.struck(self.now)
        if len(self.incidents) < KEPT_INCIDENTS:
            seconds = math.fsum(owed for owed, _ in self.owed.values())
            self.incidents.append(
                {"time": self.now, "kind": kind, "ends_attempt": ends, "detected_as": cause, "seconds": seconds,
                 "lost_steps": round(lost / self.scenario.step_seconds)}
            )  # fmt: skip

    # The passing of time

    def advance(self, until: float) -> None:
        """Spend the time until then: what is owed first, then computing."""
        while self.now < until:
            if self.owed and self.enough:
                part = next(name for name in ORDER if name in self.owed)
                seconds, cause = self.owed.pop(part)
                left = until - self.now
                if self.course is not None and self.restarting and part == "startup":
                    self.course.starting(self.now)
                self._spend(part, min(seconds, left), cause)
                if seconds > left:
                    self.owed[part] = (seconds - left, cause)
                    break
                self.now += seconds
                if self.restarting and not self.owed:
                    self.restarting = False
                    if self.course is not None:
                        self.course.ready(self.now, self.progress)
            elif self.enough:
                self._compute(until - self.now)
                break
            else:  # nothing proceeds without enough nodes, a restart neither
                self._spend("waiting", until - self.now, next((cause for _, cause in self.owed.values()), None))
                break
        self.now = max(self.now, until)

    def _spend(self, part: str, seconds: float, cause: str | None) -> None:
        self.parts[part] += seconds
        if cause is not None:
            self.by_cause[cause] += seconds

    def _compute(self, seconds: float) -> None:
        """Compute for so long: cycles of `interval` seconds of work and one save."""
        speed = self.speed
        cost = self.policy.copy_cost if self.policy.kind == "peer_memory" else 0.0
        rate = speed * (1 - cost)  # work per second
        first = max(0.0, (self.interval - self.since_save) / rate)
        if seconds <= first:
            work, stalled = seconds * rate, 0.0
            self.since_save += work
        else:
            self._durable_now()
            cycle = self.stall + self.interval / rate
            full, rest = divmod(seconds - first, cycle)
            worked = max(0.0, rest - self.stall) * rate
            stalled = full * self.stall + min(rest, self.stall)
            work = first * rate + full * self.interval + worked
            # The last save that began, and the one before it, which is durable: a save is due when that is.
            begun = self.now + first + full * cycle
            at_save = self.progress + first * rate + full * self.interval
            if full:
                self.durable = at_save - self.interval
            elif self.pending is not None:
                self.durable = self.pending[1]
            self.pending = (begun + self.stall + self.write, at_save)
            self.since_save = worked
            if self.course is not None:
                self.course.saved(
                    int(full) + 1, (self.now + first, cycle), (self.progress + first * rate, self.interval)
                )
        if self.course is not None:
            self.course.computed((self.now, self.progress), (self.now + seconds, self.progress + work))
        self.progress += work
        self.parts["productive"] += work
        self.parts["save_stall"] += stalled + (seconds - stalled) * speed * cost
        self.parts["reduced"] += (seconds - stalled) * (1 - speed)
