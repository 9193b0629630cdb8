"""Semi-synchronous clusters under failures: from round to round, and within one from failure to failure.

A cluster that nothing strikes ends its round at a time that is a formula, so only struck clusters are followed. Seconds
are means over clusters. Approximations: saves cost a constant share of the time between them; a cluster that computes
with a node less (quorum inside, no spare left) is not slowed down by it; the reload after silent corruption
takes no time.
"""

import heapq
import math
from typing import Any

import numpy as np

from trainer.forecast import simulator
from trainer.forecast.course import Course
from trainer.forecast.failures import Strikes
from trainer.forecast.scenario import DAY, Islands, Scenario, load_seconds, save_interval


def simulate_islands(
    scenario: Scenario, random: np.random.Generator, course: Course | None = None
) -> "simulator.Replicate":
    """Simulate one run of an `islands` policy until its horizon; a round that is under way then counts as lost."""
    return _Clusters(scenario, random, course).run()


class _Clusters:
    def __init__(self, scenario: Scenario, random: np.random.Generator, course: Course | None) -> None:
        policy = scenario.policy
        assert isinstance(policy, Islands)
        self.scenario, self.policy, self.random, self.course = scenario, policy, random, course
        self.horizon = scenario.days * DAY
        self.strikes = Strikes(scenario, random)
        self.interval = save_interval(scenario)
        self.rate = self.interval / (self.interval + policy.save_stall_seconds)  # work per second of computing
        self.restart = policy.restart_seconds + load_seconds(scenario)
        self.round_work = policy.inner_steps * scenario.step_seconds
        self.cluster_nodes = math.ceil(scenario.cluster.nodes / policy.clusters)
        self.parts = dict.fromkeys(simulator.PARTS, 0.0)
        self.by_cause = {failure.name: 0.0 for failure in scenario.failure}
        self.counts = {failure.name: 0 for failure in scenario.failure}
        self.incidents: list[dict[str, Any]] = []
        self.repairs: list[float] = []  # times at which nodes under repair serve again
        self.noticed: list[tuple[float, float, str]] = []  # (time, productive seconds before the corruption, cause)
        # Of struck clusters, in this round: the intervals (part, from, to, cause) without computation that they are in
        # or have ahead, the seconds that they spent in earlier ones by part, and the work they lost.
        self.stopped: dict[int, list[tuple[str, float, float, str]]] = {}
        self.spent: dict[int, dict[str, float]] = {}
        self.lost: dict[int, float] = {}

    def run(self) -> "simulator.Replicate":
        start, planned = 0.0, self.scenario.maintenance.every_days * DAY if self.scenario.maintenance else math.inf
        while start < self.horizon:
            if start >= planned:
                assert self.scenario.maintenance is not None
                seconds = self.scenario.maintenance.hours * 3600
                end = start + seconds
                self.parts["preempted"] += min(end, self.horizon) - start
                if self.course is not None:
                    self.course.ended(start, "preempted")
                    self.course.ready(end, self.parts["productive"])
                self._note("preempted", "maintenance", start, seconds, 0.0, ends=True)
                start, planned = end, planned + self.scenario.maintenance.every_days * DAY
                continue
            start = self._round(start)
        # Where one maintenance follows another at once, failures in the first are noted after the second.
        self.incidents.sort(key=lambda incident: incident["time"])
        return simulator.Replicate(self.horizon, self.parts, self.by_cause, self.counts, self.incidents, self.course)

    def _round(self, start: float) -> float:
        """Simulate the round that begins at `start`; returns when the next one begins."""
        finish = np.full(self.policy.clusters, start + self.round_work / self.rate)
        for cluster, intervals in self.stopped.items():  # those that are still recovering begin late
            finish[cluster] = max(start, intervals[-1][2]) + self.round_work / self.rate
        end = self._end(finish)
        while self.strikes.next_time < min(end, self.horizon):
            struck_at = self.strikes.next_time
            for cluster in self._strike(start, finish):
                # A cluster that has ended its round lies with a second holder already; it is late for the next one.
                if struck_at < finish[cluster]:
                    finish[cluster] = self._finish_of(cluster, start)
            end = self._end(finish)
        before = self.parts["productive"]
        self._account(start, min(end, self.horizon), finish, completed=end <= self.horizon)
        if self.course is not None:
            self.course.computed((start, before), (min(end, self.horizon), self.parts["productive"]))
        while self.noticed and self.noticed[0][0] <= end:
            _, before, cause = heapq.heappop(self.noticed)
            lost = self.parts["productive"] - before
            if lost > 0:
                self.parts["productive"] -= lost
                self.parts["lost_steps"] += lost
                self.by_cause[cause] += lost
        return end

    def _end(self, finish: np.ndarray) -> float:
        if self.policy.late == "wait":
            return float(finish.max()) + self.policy.exchange_seconds
        needed = self.policy.clusters - self.policy.may_miss
        return float(np.partition(finish, needed - 1)[needed - 1]) + self.policy.exchange_seconds

    def _strike(self, start: float, finish: np.ndarray) -> range:
        """Take the next failure; returns the clusters that it stops."""
        strike, repair = self.strikes.pop()
        failure, now = self.scenario.failure[strike.cause], strike.time
        self.counts[failure.name] += 1
        if failure.silent_hours is not None:
            later = now + self.random.exponential(failure.silent_hours * 3600) + failure.detect_seconds
            heapq.heappush(self.noticed, (later, self.parts["productive"], failure.name))
            return range(0)
        while self.repairs and self.repairs[0] <= now:
            heapq.heappop(self.repairs)
        waits = 0.0
        for _ in range(strike.nodes if repair else 0):
            if len(self.repairs) >= self.scenario.cluster.spare_nodes:
                waits = repair  # no spare is left: its cluster waits for the repair
            heapq.heappush(self.repairs, now + repair)
        if strike.nodes == 0:
            hit = range(self.policy.clusters)
        else:
            first = strike.unit * strike.nodes // self.cluster_nodes
            last = (strike.unit * strike.nodes + strike.nodes - 1) // self.cluster_nodes
            hit = range(first, min(last + 1, self.policy.clusters))  # beyond the last cluster: an idle spare
        keeps = self.policy.quorum and 0 < strike.nodes < self.cluster_nodes
        for cluster in hit:
            done = self._done(cluster, start, now)
            lost = 0.0 if keeps or now >= finish[cluster] else done % self.interval
            self.lost[cluster] = self.lost.get(cluster, 0.0) + lost
            self.by_cause[failure.name] += lost / self.policy.clusters
            intervals = self.stopped.setdefault(cluster, [])
            for part, since, to, cause in intervals:  # what is under way is void: detection and recovery begin again
                self._spend(cluster, part, min(to, now) - max(since, start), cause)
            intervals.clear()
            known = now + failure.detect_seconds
            enough = known + (0.0 if keeps else waits)
            back = enough + (self.policy.regroup_seconds if keeps else self.restart)
            intervals += [
                ("down", now, known, failure.name),
                ("waiting", known, enough, failure.name),
                ("startup", enough, back, failure.name),
            ]
            self._note("worker_lost", failure.name, now, back - now, lost, ends=not keeps)
        return hit

    def _note(self, kind: str, cause: str, time: float, seconds: float, lost: float, ends: bool) -> None:
        if self.course is not None:
            self.course.struck(time)
        if len(self.incidents) < simulator.KEPT_INCIDENTS:
            self.incidents.append(
                {"time": time, "kind": kind, "ends_attempt": ends, "detected_as": cause, "seconds": seconds,
                 "lost_steps": round(lost / self.scenario.step_seconds)}
            )  # fmt: skip

    def _done(self, cluster: int, start: float, now: float) -> float:
        """Work of this round that a cluster has computed and not lost, in seconds of work."""
        ahead = math.fsum(
            max(0.0, min(to, now) - max(since, start)) for _, since, to, _ in self.stopped.get(cluster, ())
        )
        idle = ahead + math.fsum(self.spent.get(cluster, {}).values())
        return max(0.0, (now - start - idle) * self.rate - self.lost.get(cluster, 0.0))

    def _finish_of(self, cluster: int, start: float) -> float:
        back = max(start, self.stopped[cluster][-1][2])  # it may have been struck during maintenance
        return back + max(0.0, self.round_work - self._done(cluster, start, back)) / self.rate

    def _spend(self, cluster: int, part: str, seconds: float, cause: str) -> None:
        if seconds > 0:
            spent = self.spent.setdefault(cluster, {})
            spent[part] = spent.get(part, 0.0) + seconds
            self.by_cause[cause] += seconds / self.policy.clusters

    def _account(self, start: float, end: float, finish: np.ndarray, completed: bool) -> None:
        """Share out the time of a round among the parts, and carry over what a cluster still owes."""
        clusters, totals = self.policy.clusters, dict.fromkeys(simulator.PARTS, 0.0)
        counted = finish + self.policy.exchange_seconds <= end + 1e-9 if completed else np.zeros(clusters, bool)
        struck = sorted(self.stopped)
        for cluster in struck:
            for part, since, to, cause in self.stopped[cluster]:
                self._spend(cluster, part, min(to, end) - max(since, start), cause)
        for cluster in [*struck, None]:  # None: each of those that nothing struck
            share = (clusters - len(struck) if cluster is None else 1) / clusters
            kept = bool(counted[cluster]) if cluster is not None else completed
            left = end - start
            for part, seconds in self.spent.get(cluster, {}).items() if cluster is not None else ():
                totals[part] += seconds * share
                left -= seconds
            lost = min(left, self.lost.get(cluster, 0.0) / self.rate) if cluster is not None else 0.0
            worked = min(left - lost, self.round_work / self.rate)
            totals["lost_steps"] += share * (lost + (0.0 if kept else worked))
            totals["productive"] += share * (worked * self.rate if kept else 0.0)
            totals["save_stall"] += share * (worked * (1 - self.rate) if kept else 0.0)
            totals["waiting"] += share * (left - lost - worked)
        for part, seconds in totals.items():
            self.parts[part] += seconds
        self.lost, self.spent = {}, {}
        self.stopped = {
            cluster: ahead
            for cluster, intervals in self.stopped.items()
            if (ahead := [interval for interval in intervals if interval[2] > end])
        }
