"""The compute multiplier m of an arm at each rung, and at a target beyond the rungs, with its uncertainty.

At rung k and seed i, ln m = (1/alpha)·ln[(L_base − E) / (L_arm − E)] − ln(C_arm / C_base): the baseline needs m times
its compute to reach the arm's loss. If the arm changes nothing, L_base and L_arm are exchangeable, so ln m is symmetric
about 0 for every E and alpha. There the test of no gain is exact, even with a wrong curve.

Noise in a loss moves ln m by 1 / (alpha·(L − E)) per nat, which grows with scale. Weights of the inverse square turn
noise of equal size in nats into a weighted regression on ln C with one variance. That variance is pooled over the rungs
from the scatter of pairs within a rung and the lack of fit of the line. The error of E and alpha comes in by the delta
method: the baseline's losses act on the line directly and through the curve, and both paths are counted together
because they carry the same noise.

Extrapolation needs a form. `Line`: ln m is linear in ln C, as for an arm with the same floor E and another A or alpha.
`OtherFloor`: the arm's loss is linear in the baseline's, as for an arm with a higher or lower floor, so that a fading
gain fades faster and faster. A constant gain has both forms. Within the ladder the data can seldom distinguish them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from trainer.ladder.stats import significance
from trainer.ladder.stats.records import Curve, Pairing
from trainer.ladder.stats.significance import student_quantile

Array = np.ndarray


@dataclass(frozen=True)
class Pairs:
    """Losses of baseline and arm at one rung, paired by seed, in nats (or bits)."""

    rung: str
    flops: float  # Compute of the baseline's run
    base: Array
    arm: Array
    log_cost: Array  # ln(C_arm / C_base)

    def log_multipliers(self, curve: Curve) -> Array:
        """ln m of each pair."""
        return np.log((self.base - curve.E) / (self.arm - curve.E)) / curve.alpha - self.log_cost


@dataclass(frozen=True)
class Noise:
    """Covariance of baseline and arm within pairs, pooled over rungs, in nats²."""

    base: float  # Variance of the baseline's losses
    arm: float  # Variance of the arm's losses
    both: float  # Covariance of the two
    freedom: int  # Degrees of freedom; 0 without repeated seeds, and then the rest means nothing

    @classmethod
    def from_pairs(cls, rungs: Sequence[Pairs]) -> "Noise":
        if not rungs:
            return cls(0.0, 0.0, 0.0, 0)
        base = np.concatenate([rung.base - rung.base.mean() for rung in rungs])
        arm = np.concatenate([rung.arm - rung.arm.mean() for rung in rungs])
        freedom = len(base) - len(rungs)
        divisor = max(freedom, 1)
        return cls(float(base @ base) / divisor, float(arm @ arm) / divisor, float(base @ arm) / divisor, freedom)

    @property
    def paired(self) -> float:  # variance of arm minus baseline
        return self.base + self.arm - 2 * self.both

    @property
    def pairing(self) -> Pairing:
        if not self.freedom or min(self.base, self.arm, self.paired) <= 0:
            return Pairing(None, None)
        return Pairing((self.base + self.arm) / self.paired, self.both / math.sqrt(self.base * self.arm))


@dataclass(frozen=True)
class Influence:
    """Effect of the baseline's rung means on its curve."""

    flops: Array
    seeds: Array
    derivative: Array  # d(E, A, alpha) / d(rung means), shape (3, rungs)


@dataclass(frozen=True)
class Estimate:
    """A value of ln m with its standard error."""

    value: float
    error: float
    freedom: int

    def bound(self, level: float, side: int) -> float:
        """One-sided bound (side −1: lower, +1: upper) that misses the truth with probability `level`."""
        return self.value + side * student_quantile(level, self.freedom) * self.error


@dataclass(frozen=True)
class Comparison:
    """An arm's pairs and the baseline's curve: the input of every estimate."""

    rungs: list[Pairs]  # Smallest compute first
    curve: Curve
    influence: Influence

    @cached_property
    def noise(self) -> Noise:
        return Noise.from_pairs(self.rungs)

    @cached_property
    def counts(self) -> Array:  # number of pairs of each rung
        return np.array([len(rung.base) for rung in self.rungs], dtype=float)

    @cached_property
    def slopes(self) -> Array:
        """Slope of the curve at each rung, in nats per unit of ln C; noise in ln m is noise in nats over the slope."""
        return np.array([self.curve.slope(rung.flops) for rung in self.rungs])

    def covariance(self, variance: float, direct: Array, through: Array) -> Array:
        """Covariance of some estimates, shape (estimates, estimates), by the delta method.

        `variance` is that of a paired difference, in nats². `direct` holds the derivatives of the estimates by the mean
        paired difference (baseline minus arm) of each of the arm's rungs; `through` those by the baseline's rung means
        by way of its curve.
        """
        # Var(baseline) and Cov(baseline, arm) in units of `variance`: as the pairs show them, or as if uncorrelated.
        noise = self.noise
        known = noise.freedom > 0 and noise.paired > 0
        base, both = (noise.base / noise.paired, noise.both / noise.paired) if known else (0.5, 0.0)
        from_arm = direct / self.counts @ direct.T
        # Cov(baseline − arm, baseline) = base − both, at the rung of the baseline that each of the arm's belongs to.
        aligned = np.zeros_like(through)
        columns = [int(np.abs(np.log(self.influence.flops / rung.flops)).argmin()) for rung in self.rungs]
        aligned[:, columns] = direct
        cross = aligned / self.influence.seeds @ through.T
        curve = base * (through / self.influence.seeds) @ through.T
        return variance * (from_arm + (base - both) * (cross + cross.T) + curve)

    def covariance_of_means(self, rows: Array, variance: float) -> Array:
        """Covariance of rows @ (mean ln m of each rung)."""
        curve, rungs = self.curve, self.rungs
        means = np.array([rung.log_multipliers(curve).mean() for rung in rungs])
        # Derivatives of mean ln m by E and by alpha. A cancels in the formula of ln m.
        by_E = [float(np.mean(1 / (rung.arm - curve.E) - 1 / (rung.base - curve.E))) / curve.alpha for rung in rungs]
        by_alpha = -(means + [float(rung.log_cost.mean()) for rung in rungs]) / curve.alpha
        through = np.outer(rows @ np.array(by_E), self.influence.derivative[0])
        through += np.outer(rows @ by_alpha, self.influence.derivative[2])
        return self.covariance(variance, rows / self.slopes, through)

    def rung_estimates(self) -> list[Estimate]:
        """Mean ln m of each rung alone, without any form in C; the error is infinite without repeated seeds."""
        means = [float(rung.log_multipliers(self.curve).mean()) for rung in self.rungs]
        if not self.noise.freedom:
            return [Estimate(mean, math.inf, 1) for mean in means]
        variances = np.diag(self.covariance_of_means(np.eye(len(means)), self.noise.paired))
        errors = np.sqrt(np.maximum(variances, 0.0))
        return [Estimate(mean, float(error), self.noise.freedom) for mean, error in zip(means, errors, strict=True)]


@dataclass(frozen=True)
class ExtraRuns:
    """Runs that might be added: seeds at every rung, or pairs at a new rung."""

    seeds: int = 0
    rung: tuple[float, int] | None = None  # (FLOPs, pairs)

    def planned_error(
        self, error: float, variance: float, x: Callable[[float], float], steepness: Callable[[float], float],
        counts: Array, flops: Sequence[float], target: float,
    ) -> tuple[float, int]:  # fmt: skip
        """(Standard error, number of pairs) with these runs of a line read at `target`, whose error is `error` now.

        `x` and `steepness` are functions of FLOPs: the line's position, and 1 / noise of a pair, where a pair's noise
        in nats is 1; `variance` is that of a pair in nats.
        """

        def spread(n: Array, flops: Sequence[float]) -> float:
            """Variance of the line's value at the target, in units of `variance`."""
            at, weights = np.array([x(c) for c in flops]), n * np.array([steepness(c) for c in flops]) ** 2
            centre = weights @ at / weights.sum()
            # Textbook formula of weighted regression: variance of the level plus variance of the slope times distance².
            return float(1 / weights.sum() + (x(target) - centre) ** 2 / (weights @ (at - centre) ** 2))

        n, rungs = counts + self.seeds, [*flops]
        if self.rung:
            n, rungs = np.append(counts, self.rung[1]), [*flops, self.rung[0]]
        # The part of the error that the line does not explain comes from the curve, and shrinks as runs are added.
        curve = max(error**2 - variance * spread(counts, flops), 0.0)
        return math.sqrt(variance * spread(n, rungs) + curve * float(counts.sum() / n.sum())), int(n.sum())


class Line:
    """ln m against ln C by weighted least squares. Needs three rungs, and every multiplier must exist."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        logs = [rung.log_multipliers(comparison.curve) for rung in comparison.rungs]
        self.counts, self._slopes = comparison.counts, comparison.slopes
        self._means = np.array([log_m.mean() for log_m in logs])
        self.x = np.log([rung.flops for rung in comparison.rungs])
        self._weights = self.counts * self._slopes**2
        self._centre = float(self._weights @ self.x / self._weights.sum())
        away = self.x - self._centre
        # Rows give the intercept (at the centre) and the slope as weighted sums of the rung means.
        self._rows = np.stack([self._weights / self._weights.sum(), self._weights * away / (self._weights @ away**2)])
        self._intercept, self._slope = (float(value) for value in self._rows @ self._means)
        # Sums of squares in nats²: of rung means about the line, and of pairs about their rung mean.
        residuals = self._means - self._intercept - self._slope * away
        self._lack, self._lack_freedom = float(self._weights @ residuals**2), len(logs) - 2
        within = [float(((log_m - log_m.mean()) ** 2).sum()) for log_m in logs]
        self._pure = math.fsum(squares * slope**2 for squares, slope in zip(within, self._slopes, strict=True))
        self._pure_freedom = int(self.counts.sum()) - len(logs)

    @cached_property
    def lack_of_fit_p(self) -> float | None:
        """p of the F test for rungs off the line; None without repeated seeds."""
        return significance.lack_of_fit_p(self._lack, self._lack_freedom, self._pure, self._pure_freedom)

    @property
    def widened(self) -> bool:
        """True if the rungs do not lie on a line: then their scatter about it alone gives the variance."""
        return self.lack_of_fit_p is not None and self.lack_of_fit_p < significance.LACK_OF_FIT

    @cached_property
    def _scatter(self) -> tuple[float, int]:  # (variance of a paired difference in nats², its degrees of freedom)
        if self.widened:
            return self._lack / self._lack_freedom, self._lack_freedom
        freedom = self._pure_freedom + self._lack_freedom
        return (self._pure + self._lack) / freedom, freedom

    @cached_property
    def _covariance(self) -> Array:  # of (intercept, slope)
        return self._comparison.covariance_of_means(self._rows, self._scatter[0])

    def multiplier_at(self, flops: float) -> Estimate:
        """ln m at this compute."""
        u = math.log(flops) - self._centre
        row = np.array([1.0, u])
        variance = float(row @ self._covariance @ row)
        return Estimate(self._intercept + u * self._slope, math.sqrt(max(variance, 0.0)), self._scatter[1])

    @property
    def slope(self) -> Estimate:  # d ln m / d ln C
        return Estimate(self._slope, math.sqrt(max(self._covariance[1, 1], 0.0)), self._scatter[1])

    @property
    def middle(self) -> Estimate:  # ln m at the centre of the rungs, where it is best known
        return Estimate(self._intercept, math.sqrt(max(self._covariance[0, 0], 0.0)), self._scatter[1])

    def without(self, k: int, flops: float) -> float:
        """ln m at `flops` by a line through the rungs other than number `k`."""
        weights = self._weights * (np.arange(len(self.x)) != k)
        centre = weights @ self.x / weights.sum()
        away = self.x - centre
        slope = float(weights * away @ self._means / (weights @ away**2))
        return float(weights @ self._means / weights.sum()) + slope * (math.log(flops) - centre)

    def crossing(self, level: float, reach: tuple[float, float]) -> tuple[float, float | None, float | None] | None:
        """Return (ln C where ln m = 0, the ends of its interval); None if it lies outside of `reach` (in ln C).

        Method: Fieller's theorem for the ratio intercept / slope. Both ends are None if the slope may be 0.
        """
        root = self._centre - self._intercept / self._slope if self._slope else math.inf
        if not reach[0] <= root <= reach[1]:
            return None
        # u = ln C − centre is in the interval if (intercept + slope·u)² ≤ t²·Var(intercept + slope·u), that is if
        # a·u² + 2·b·u + c ≤ 0.
        t = student_quantile(level / 2, self._scatter[1]) ** 2
        (v00, v01), (_, v11) = self._covariance
        a = self._slope**2 - t * v11
        b = self._intercept * self._slope - t * v01
        discriminant = b**2 - a * (self._intercept**2 - t * v00)
        if a <= 0 or discriminant < 0:
            return root, None, None
        half = math.sqrt(discriminant) / a
        return root, self._centre - b / a - half, self._centre - b / a + half

    def planned(self, flops: float, extra: ExtraRuns) -> Estimate:
        """The estimate at `flops` if runs were added and the estimates of line and noise stayed the same."""
        now, rungs = self.multiplier_at(flops), [rung.flops for rung in self._comparison.rungs]
        error, pairs = extra.planned_error(
            now.error, self._scatter[0], math.log, self._comparison.curve.slope, self.counts, rungs, flops
        )
        # Rungs that lie off the line are the sample, whatever the number of their pairs.
        return Estimate(now.value, error, (len(rungs) + bool(extra.rung) if self.widened else pairs) - 2)


class OtherFloor:
    """The arm's loss as E' + s·(the baseline's − E): arm minus baseline is a straight line in the baseline's loss.

    It is fitted in nats, so its variance is the same at every rung, and an arm without a change again has a difference
    of 0 whatever the curve.
    """

    def __init__(self, comparison: Comparison, target: float) -> None:
        self._comparison, self._curve, self._target = comparison, comparison.curve, target
        self.difference, row, fitted = self._solve(self._curve)
        differences = self._differences(self._curve)
        squares = math.fsum(float(((each - fit) ** 2).sum()) for each, fit in zip(differences, fitted, strict=True))
        self._freedom = int(comparison.counts.sum()) - 2
        self._variance = squares / self._freedom
        through = (self._by_curve() @ comparison.influence.derivative)[None, :]
        covariance = comparison.covariance(self._variance, -row[None, :], through)
        self._error = math.sqrt(max(float(covariance[0, 0]), 0.0))

    def _differences(self, curve: Curve) -> list[Array]:
        """Arm minus baseline of each pair, by rung. An arm of other compute is compared with the baseline's curve."""
        differences = []
        for rung in self._comparison.rungs:
            difference = rung.arm - rung.base
            if rung.log_cost.any():
                here = curve.loss_at(rung.flops)
                difference = difference - [curve.loss_at(rung.flops * math.exp(c)) - here for c in rung.log_cost]
            differences.append(difference)
        return differences

    def _solve(self, curve: Curve) -> tuple[float, Array, Array]:
        """(difference at the target in nats, its derivative by the rungs' differences, the line at the rungs)."""
        counts = self._comparison.counts
        means = np.array([difference.sum() for difference in self._differences(curve)]) / counts
        # Regression of the differences on the baseline's loss above its floor, read at the target's.
        above = np.array([curve.above(rung.flops) for rung in self._comparison.rungs])
        level_row = counts / counts.sum()
        centre = level_row @ above
        away = above - centre
        slope_row = counts * away / (counts @ away**2)
        row = level_row + (curve.above(self._target) - centre) * slope_row
        return float(row @ means), row, level_row @ means + away * (slope_row @ means)

    def _log_multiplier(self, curve: Curve, difference: float) -> tuple[float, float]:
        """(ln m of a loss difference at the target, its derivative); infinite at or below the floor."""
        above = curve.above(self._target)
        if above + difference <= 0:
            return math.inf, -math.inf
        return math.log(above / (above + difference)) / curve.alpha, -1 / (curve.alpha * (above + difference))

    def _by_curve(self) -> Array:
        """d ln m / d(E, A, alpha) by finite differences, expressed as the loss difference with the same effect."""
        curve, derivatives = self._curve, []
        value, by_difference = self._log_multiplier(curve, self.difference)
        for name, step in (("E", 1e-6), ("A", 1e-5 * curve.A), ("alpha", 1e-5 * curve.alpha)):
            sides = []
            for sign in (-1, 1):
                moved = replace(curve, **{name: getattr(curve, name) + sign * step})
                sides.append(self._log_multiplier(moved, self._solve(moved)[0])[0])
            derivatives.append((sides[1] - sides[0]) / (2 * step))
        if not all(map(math.isfinite, (value, *derivatives))):
            return np.zeros(3)  # at the floor ln m is infinite and does not move
        return np.array(derivatives) / by_difference

    @property
    def value(self) -> float:  # ln m at the target
        return self._log_multiplier(self._curve, self.difference)[0]

    def bound(self, level: float, side: int) -> float:
        """One-sided bound of ln m (side −1: lower); infinite if the difference may reach the floor."""
        return self._bound(level, side, self._error, self._freedom)

    def planned_bound(self, level: float, side: int, extra: ExtraRuns) -> float:
        """`bound` if runs were added and the estimates of line and noise stayed the same."""
        rungs = [rung.flops for rung in self._comparison.rungs]
        error, pairs = extra.planned_error(
            self._error, self._variance, self._curve.above, lambda _: 1.0, self._comparison.counts, rungs, self._target
        )
        return self._bound(level, side, error, pairs - 2)

    def _bound(self, level: float, side: int, error: float, freedom: int) -> float:
        # A larger loss difference is a smaller multiplier.
        return self._log_multiplier(self._curve, self.difference - side * student_quantile(level, freedom) * error)[0]
