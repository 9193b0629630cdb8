"""When what fails: the events of one replicate, drawn at a cost that grows with failures and not with devices.

A unit (a node, a rack, …) fails at a Weibull time after it began to serve, with a rate of its own where units differ
(gamma frailty). Units that never fail within the horizon are never drawn: their number is binomial, the times of the
others follow the first failure's distribution cut at the horizon, and a unit's own rate is drawn once it has failed,
from what its failure says about it. Source of the frailty model: Vaupel et al. 1979.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from trainer.forecast.scenario import DAY, Failure, Scenario


@dataclass(frozen=True, order=True)
class Strike:
    """A failure of one unit."""

    time: float
    """Seconds since the start of the run."""
    cause: int
    """Index into the scenario's failures."""
    unit: int
    nodes: int
    """Nodes that go down with it."""


class Strikes:
    """The failures of one replicate in the order of time; each is followed by its unit's next one after its repair."""

    def __init__(self, scenario: Scenario, random: np.random.Generator) -> None:
        self._scenario, self._random = scenario, random
        self._horizon = scenario.days * DAY
        self._queue: list[tuple[float, int, int, float]] = []
        """(time, cause, unit, the unit's rate relative to the mean)."""
        for cause in range(len(scenario.failure)):
            self._draw_first(cause)
        heapq.heapify(self._queue)

    def __bool__(self) -> bool:
        return bool(self._queue)

    @property
    def next_time(self) -> float:
        """Time of the next failure; infinite if there is none."""
        return self._queue[0][0] if self._queue else math.inf

    def pop(self) -> tuple[Strike, float]:
        """Return (the next failure, seconds until its unit serves again)."""
        time, cause, unit, relative = heapq.heappop(self._queue)
        failure = self._scenario.failure[cause]
        repair = self._random.exponential(failure.repair_hours * 3600) if failure.repair_hours else 0.0
        again = time + repair + self._scale(cause) * (self._random.exponential() / relative) ** (1 / failure.shape)
        if again < self._horizon:
            heapq.heappush(self._queue, (again, cause, unit, relative))
        return Strike(time, cause, unit, self._nodes(failure)), repair

    def _nodes(self, failure: Failure) -> int:
        return 0 if failure.takes == "job" else self._scenario.cluster.nodes_of(failure.takes)

    def _units(self, failure: Failure) -> int:
        cluster = self._scenario.cluster
        if failure.takes == "job":
            return 1
        return max(1, (cluster.nodes + cluster.spare_nodes) // cluster.nodes_of(failure.takes))

    def _scale(self, cause: int) -> float:
        """Weibull scale in seconds, so that a unit's mean time to failure is what the rate says."""
        failure = self._scenario.failure[cause]
        rate = self._scenario.rate(failure) / self._units(failure)
        return 1 / (rate * math.gamma(1 + 1 / failure.shape)) if rate > 0 else math.inf

    def _draw_first(self, cause: int) -> None:
        """Queue the first failure of each unit that fails at all within the horizon."""
        failure, scale, random = self._scenario.failure[cause], self._scale(cause), self._random
        if math.isinf(scale):
            return
        variance = failure.lemon_variance
        hazard = (self._horizon / scale) ** failure.shape  # cumulated until the horizon, of a unit with the mean rate
        fails = -math.expm1(-hazard) if variance == 0 else 1 - (1 + variance * hazard) ** (-1 / variance)
        units = self._units(failure)
        number = int(random.binomial(units, fails))
        below = random.uniform(0, fails, number)
        if variance == 0:
            reached = -np.log1p(-below)
            relative = np.ones(number)
        else:
            reached = np.expm1(-variance * np.log1p(-below)) / variance
            # The posterior of a gamma rate with mean 1, given one failure after this much cumulated hazard.
            relative = random.gamma(1 / variance + 1, 1 / (1 / variance + reached))
        times = scale * reached ** (1 / failure.shape)
        which = random.choice(units, number, replace=False, shuffle=False)
        self._queue += zip(times.tolist(), [cause] * number, which.tolist(), relative.tolist(), strict=True)
