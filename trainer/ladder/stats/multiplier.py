"""What an arm is worth in compute at each rung, and at a target beyond them, with its uncertainty.

At rung k and seed i, ln m = (1/alpha)·ln[(L_base − E)/(L_arm − E)] − ln(C_arm/C_base): how many times the baseline's
compute would have to grow to reach the arm's loss. If the arm changes nothing, L_base and L_arm are exchangeable, so
ln m is symmetric about 0 whatever E and alpha are: there the test of no gain is exact, also of a wrong curve.

A loss's noise moves ln m by 1 / (alpha·(L − E)), which grows with scale; with weights of that squared, noise that is
equal in nats gives a weighted regression on ln C with one variance. It is pooled over the rungs from what pairs differ
by within them and from the lack of fit of the line. The error of E and alpha is carried in by the delta method: losses
of the baseline act on the line directly and through the curve, and both are counted together, as they are one noise.

Extrapolating needs a form. `Line` has ln m linear in ln C, which is what an arm of the same floor E and another A or
alpha does. `OtherFloor` has the arm's loss linear in the baseline's, which is an arm whose own floor is higher or
lower: a fading gain then fades ever faster. A constant gain is both. Within the ladder they can seldom be told apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import special

from trainer.ladder.stats.records import Curve

Array = np.ndarray
LACK_OF_FIT = 0.05
"""Below this, rungs do not lie on a line, and only their own scatter about it says how far to trust it."""


@dataclass(frozen=True)
class Pairs:
    """Runs of baseline and arm at one rung, by seed."""

    rung: str
    flops: float
    """Of the baseline."""
    base: Array
    arm: Array
    log_cost: Array
    """ln(C_arm / C_base)."""

    def log_multipliers(self, curve: Curve) -> Array:
        return np.log((self.base - curve.E) / (self.arm - curve.E)) / curve.alpha - self.log_cost

    def above(self, floor: float) -> bool:
        """Whether all losses lie above; at the curve's floor no compute is enough, and near it noise decides."""
        return bool(min(self.base.min(), self.arm.min()) > floor)


@dataclass(frozen=True)
class Noise:
    """Covariance of baseline and arm within pairs, pooled over rungs, in nats²."""

    base: float
    arm: float
    both: float
    freedom: int

    @classmethod
    def from_pairs(cls, rungs: Sequence[Pairs]) -> "Noise":
        base, arm = (np.concatenate([getattr(one, name) - getattr(one, name).mean() for one in rungs])
                     for name in ("base", "arm"))  # fmt: skip
        freedom = len(base) - len(rungs)
        divisor = max(freedom, 1)
        return cls(float(base @ base) / divisor, float(arm @ arm) / divisor, float(base @ arm) / divisor, freedom)

    @property
    def paired(self) -> float:
        """Variance of arm minus baseline."""
        return self.base + self.arm - 2 * self.both


@dataclass(frozen=True)
class Influence:
    """How the baseline's rung means move its curve."""

    flops: Array
    seeds: Array
    derivative: Array
    """d(E, A, alpha) / d(rung means), shape (3, rungs)."""

    def columns_of(self, rungs: Sequence[Pairs]) -> list[int]:
        """The baseline's rung of each of an arm's."""
        return [int(np.abs(np.log(self.flops / one.flops)).argmin()) for one in rungs]


@dataclass(frozen=True)
class Estimate:
    """A value of ln m with its standard error."""

    value: float
    error: float
    freedom: int

    def bound(self, level: float, side: int) -> float:
        """One-sided bound (side −1: lower) that misses the truth with probability `level`."""
        return self.value + side * quantile(level, self.freedom) * self.error


def quantile(level: float, freedom: int) -> float:
    """Student's t that is exceeded with probability `level`; scipy.stats would take a tenth of a millisecond."""
    return -float(special.stdtrit(freedom, level))


def _variance(
    variance: float, direct: Array, through: Array, rungs: Sequence[Pairs], influence: Influence, noise: Noise
) -> Array:
    """Covariance of estimates, shape (estimates, estimates), given the variance of a paired difference in nats².

    `direct` is their derivative by the pairs' mean losses (baseline's plus, arm's minus), shape (estimates, arm's
    rungs); `through` that by the baseline's means by way of its curve, shape (estimates, baseline's rungs).
    """
    # As the pairs show it, scaled to the variance asked for; without repeated seeds, as if uncorrelated.
    known = noise.freedom > 0 and noise.paired > 0
    base, both = (noise.base / noise.paired, noise.both / noise.paired) if known else (0.5, 0.0)
    own = direct / np.array([len(one.base) for one in rungs]) @ direct.T
    spread = np.zeros_like(through)
    spread[:, influence.columns_of(rungs)] = direct
    cross = spread / influence.seeds @ through.T
    return variance * (own + (base - both) * (cross + cross.T) + base * (through / influence.seeds) @ through.T)


def _of_rows(
    rows: Array, variance: float, rungs: Sequence[Pairs], curve: Curve, influence: Influence, noise: Noise
) -> Array:
    """Covariance of rows @ (the rungs' mean ln m)."""
    means = np.array([one.log_multipliers(curve).mean() for one in rungs])
    steepness = np.array([curve.slope(one.flops) for one in rungs])
    by_E = [float(np.mean(1 / (one.arm - curve.E) - 1 / (one.base - curve.E))) / curve.alpha for one in rungs]
    by_alpha = -(means + [float(one.log_cost.mean()) for one in rungs]) / curve.alpha
    through = np.outer(rows @ np.array(by_E), influence.derivative[0])
    through += np.outer(rows @ by_alpha, influence.derivative[2])
    return _variance(variance, rows / steepness, through, rungs, influence, noise)


def at_rungs(rungs: Sequence[Pairs], curve: Curve, influence: Influence, noise: Noise) -> list[Estimate]:
    """The rungs' own mean ln m, without any form in C; the error is infinite without repeated seeds."""
    means = [float(one.log_multipliers(curve).mean()) for one in rungs]
    if not noise.freedom or not rungs:
        return [Estimate(mean, math.inf, 1) for mean in means]
    covariance = _of_rows(np.eye(len(rungs)), noise.paired, rungs, curve, influence, noise)
    errors = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    return [Estimate(mean, float(error), noise.freedom) for mean, error in zip(means, errors, strict=True)]


@dataclass(frozen=True)
class ExtraRuns:
    """Runs that might be added: seeds at every rung, or pairs at a new one."""

    seeds: int = 0
    rung: tuple[float, int] | None = None
    """(FLOPs, pairs)"""

    def extend(self, n: Array, coordinate: Array, of: Callable[[float], float]) -> tuple[Array, Array]:
        if self.rung is None:
            return n + self.seeds, coordinate
        return np.append(n, self.rung[1]), np.append(coordinate, of(self.rung[0]))


@dataclass(frozen=True)
class RegressionDesign:
    """Where the pairs of a straight line lie, how steep (1 / noise) it is there, and where it is read."""

    n: Array
    x: Array
    steepness: Array
    at: float

    @property
    def spread(self) -> float:
        """Variance of the line's value there, in units of a pair's in nats."""
        weights = self.n * self.steepness**2
        centre = weights @ self.x / weights.sum()
        return float(1 / weights.sum() + (self.at - centre) ** 2 / (weights @ (self.x - centre) ** 2))

    def error(self, variance: float, error_before: float, before: "RegressionDesign") -> float:
        """Standard error with this layout; what the curve adds shrinks as the number of runs grows."""
        curve = max(error_before**2 - variance * before.spread, 0.0)
        return math.sqrt(variance * self.spread + curve * float(before.n.sum() / self.n.sum()))


class Line:
    """ln m against ln C by weighted least squares. Needs three rungs, all of whose multipliers are known."""

    def __init__(self, rungs: Sequence[Pairs], curve: Curve, influence: Influence, noise: Noise) -> None:
        self.rungs, self.curve, self._influence, self._noise = list(rungs), curve, influence, noise
        logs = [one.log_multipliers(curve) for one in rungs]
        self.means = np.array([one.mean() for one in logs])
        self.pairs = np.array([len(one) for one in logs], dtype=float)
        self.x = np.log([one.flops for one in rungs])
        self.steepness = np.array([curve.slope(one.flops) for one in rungs])
        weights = self.pairs * self.steepness**2
        self.centre = float(weights @ self.x / weights.sum())
        away = self.x - self.centre
        # Rows give intercept (at the centre) and slope as sums over rung means.
        self._rows = np.stack([weights / weights.sum(), weights * away / (weights @ away**2)])
        self.intercept, self.slope_value = (float(value) for value in self._rows @ self.means)
        residuals = self.means - self.intercept - self.slope_value * away
        self._lack = float(weights @ residuals**2)
        self._within = math.fsum(
            float(((one - one.mean()) ** 2).sum()) * steep**2 for one, steep in zip(logs, self.steepness, strict=True)
        )
        self._spare, self._between = int(self.pairs.sum()) - len(rungs), len(rungs) - 2

    @cached_property
    def lack_of_fit_p(self) -> float | None:
        """None without repeated seeds."""
        if self._spare < 1 or self._within <= 0:
            return None
        ratio = self._lack / self._between / (self._within / self._spare)
        return float(special.fdtrc(self._between, self._spare, ratio))

    @property
    def widened(self) -> bool:
        return self.lack_of_fit_p is not None and self.lack_of_fit_p < LACK_OF_FIT

    @cached_property
    def _scatter(self) -> tuple[float, int]:
        """(variance of a paired difference in nats², its degrees of freedom)."""
        if self.widened:
            return self._lack / self._between, self._between
        freedom = self._spare + self._between
        return (self._within + self._lack) / freedom, freedom

    @property
    def freedom(self) -> int:
        return self._scatter[1]

    @cached_property
    def covariance(self) -> Array:
        """Of (intercept, slope)."""
        return _of_rows(self._rows, self._scatter[0], self.rungs, self.curve, self._influence, self._noise)

    # What is asked of it

    def multiplier_at(self, flops: float) -> Estimate:
        u = math.log(flops) - self.centre
        row = np.array([1.0, u])
        variance = float(row @ self.covariance @ row)
        return Estimate(self.intercept + u * self.slope_value, math.sqrt(max(variance, 0.0)), self.freedom)

    @property
    def slope(self) -> Estimate:
        return Estimate(self.slope_value, math.sqrt(max(self.covariance[1, 1], 0.0)), self.freedom)

    @property
    def middle(self) -> Estimate:
        """At the centre of the rungs, where it is best known."""
        return Estimate(self.intercept, math.sqrt(max(self.covariance[0, 0], 0.0)), self.freedom)

    def without(self, k: int, flops: float) -> float | None:
        """ln m at `flops` by the other rungs; None where they are fewer than two."""
        if len(self.rungs) < 3:
            return None
        weights = self.pairs * self.steepness**2 * (np.arange(len(self.rungs)) != k)
        centre = weights @ self.x / weights.sum()
        away = self.x - centre
        slope = float(weights * away @ self.means / (weights @ away**2))
        return float(weights @ self.means / weights.sum()) + slope * (math.log(flops) - centre)

    def crossing(self, level: float, reach: tuple[float, float]) -> tuple[float, float | None, float | None] | None:
        """(ln C where ln m = 0, ends of its interval or None) by Fieller's theorem; None outside of `reach` (ln C)."""
        root = self.centre - self.intercept / self.slope_value if self.slope_value else math.inf
        if not reach[0] <= root <= reach[1]:
            return None
        t = quantile(level / 2, self.freedom) ** 2
        (v00, v01), (_, v11) = self.covariance
        a = self.slope_value**2 - t * v11
        b = self.intercept * self.slope_value - t * v01
        inside = b**2 - a * (self.intercept**2 - t * v00)
        if a <= 0 or inside < 0:  # the slope is not told from 0: the line may cross anywhere
            return root, None, None
        half = math.sqrt(inside) / a
        return root, self.centre - b / a - half, self.centre - b / a + half

    def layout(self, flops: float, more: "ExtraRuns") -> "RegressionDesign":
        n, x = more.extend(self.pairs, self.x, math.log)
        steep = self.steepness if more.rung is None else np.append(self.steepness, self.curve.slope(more.rung[0]))
        return RegressionDesign(n, x, steep, math.log(flops))

    def planned(self, flops: float, more: "ExtraRuns") -> Estimate:
        """The estimate at `flops` if runs were added and nothing else changed."""
        now, before, after = self.multiplier_at(flops), self.layout(flops, ExtraRuns()), self.layout(flops, more)
        freedom = len(after.n) - 2 if self.widened else int(after.n.sum()) - 2
        return Estimate(now.value, after.error(self._scatter[0], now.error, before), freedom)


class OtherFloor:
    """The arm's loss as E' + s·(the baseline's − E): its difference from the baseline's is a line in the latter.

    In nats, so its variance is the same at every rung, and no change is again a difference of 0 whatever the curve.
    """

    def __init__(self, rungs: Sequence[Pairs], curve: Curve, influence: Influence, noise: Noise, target: float) -> None:
        self._rungs, self._curve, self._target = list(rungs), curve, target
        self._pairs = np.array([len(one.base) for one in rungs], dtype=float)
        self._paid = any(one.log_cost.any() for one in rungs)
        self._paired = [one.arm - one.base for one in rungs]
        self.difference, row, line = self._solve(curve)
        scatter = math.fsum(
            float(((one - on) ** 2).sum()) for one, on in zip(self._differences(curve), line, strict=True)
        )
        self._freedom = int(self._pairs.sum()) - 2
        self._scatter = scatter / self._freedom
        through = (self._by_curve() @ influence.derivative)[None, :]
        covariance = _variance(self._scatter, -row[None, :], through, rungs, influence, noise)
        self._error = math.sqrt(max(float(covariance[0, 0]), 0.0))

    def _differences(self, curve: Curve) -> list[Array]:
        """In nats, by rung. An arm of other compute is held against the baseline's curve there."""
        if not self._paid:
            return self._paired
        return [
            paired - [curve.loss_at(one.flops * math.exp(cost)) - curve.loss_at(one.flops) for cost in one.log_cost]
            for paired, one in zip(self._paired, self._rungs, strict=True)
        ]

    def _solve(self, curve: Curve) -> tuple[float, Array, Array]:
        """(difference at the target in nats, its derivative by the rungs' differences, the line at the rungs)."""
        means = np.array([one.sum() for one in self._differences(curve)]) / self._pairs
        above = np.array([curve.above(one.flops) for one in self._rungs])
        level_row = self._pairs / self._pairs.sum()
        centre = level_row @ above
        away = above - centre
        slope_row = self._pairs * away / (self._pairs @ away**2)
        row = level_row + (curve.above(self._target) - centre) * slope_row
        return float(row @ means), row, level_row @ means + away * (slope_row @ means)

    def _worth(self, curve: Curve, difference: float) -> tuple[float, float]:
        """(ln m of a difference at the target, its derivative); infinite at or under the floor."""
        above = curve.above(self._target)
        if above + difference <= 0:
            return math.inf, -math.inf
        return math.log(above / (above + difference)) / curve.alpha, -1 / (curve.alpha * (above + difference))

    def _by_curve(self) -> Array:
        """d / d(E, A, alpha) of ln m at the target, by differences, and as a difference in nats that does the same."""
        curve, slopes = self._curve, []
        value, by_difference = self._worth(curve, self.difference)
        for name, step in (("E", 1e-6), ("A", 1e-5 * curve.A), ("alpha", 1e-5 * curve.alpha)):
            sides = []
            for sign in (-1, 1):
                moved = replace(curve, **{name: getattr(curve, name) + sign * step})
                sides.append(self._worth(moved, self._solve(moved)[0])[0])
            slopes.append((sides[1] - sides[0]) / (2 * step))
        known = math.isfinite(value) and all(math.isfinite(slope) for slope in slopes)
        return np.array(slopes) / by_difference if known else np.zeros(3)  # at the floor there is nothing to move

    @property
    def value(self) -> float:
        """ln m at the target."""
        return self._worth(self._curve, self.difference)[0]

    def bound(self, level: float, side: int) -> float:
        """One-sided bound of ln m (side −1: lower); infinite where the difference may reach the floor."""
        return self._bound(level, side, self._error, self._freedom)

    def planned_bound(self, level: float, side: int, more: ExtraRuns) -> float:
        """`bound` if runs were added and nothing else changed."""
        before, after = self._layout(ExtraRuns()), self._layout(more)
        return self._bound(level, side, after.error(self._scatter, self._error, before), int(after.n.sum()) - 2)

    def _bound(self, level: float, side: int, error: float, freedom: int) -> float:
        return self._worth(self._curve, self.difference - side * quantile(level, freedom) * error)[0]

    def _layout(self, more: ExtraRuns) -> RegressionDesign:
        above = np.array([self._curve.above(one.flops) for one in self._rungs])
        n, above = more.extend(self._pairs, above, self._curve.above)
        return RegressionDesign(n, above, np.ones_like(n), self._curve.above(self._target))
