"""Worth of arms in compute, at each rung and at a target beyond the rungs, with one model of the noise.

At rung k and seed i, ln m = (1/alpha)·ln[(L_base − E) / (L_arm − E)] − ln(C_arm / C_base): the baseline needs m times
its compute to reach the arm's loss. If the arm changes nothing, L_base and L_arm are exchangeable, so ln m is symmetric
about 0 for every E and alpha. There the test of no gain is exact, even with a wrong curve.

Extrapolation needs a form, and the data seldom tell which. All are ln m = c + d·z(C) with z = (1 − C^−γ) / γ. γ = 0 is
a line in ln C. Below 0 a gain fades faster and faster, as that of an arm whose loss levels off elsewhere than the
baseline's (γ = −alpha for small gains). Above 0 it fades to a constant, as that of a change which saves a fixed number
of steps (γ = 0.5). Bounds are the outermost over all γ (profile likelihood): a form counts as far as the data allow.

The noise is estimated from all arms of a ladder together. In nats, the difference of a pair has the noise of seeds,
which may grow or fall with scale, and each rung of each arm may have an effect of its own (tuning, rounding of sizes)
that more seeds do not remove. The baseline's noise moves (E, alpha) too; both paths are counted (delta method).

Every array may have leading axes (many ladders at once, as scripts/bench_ladder.py draws them), then arms, then rungs.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from scipy import special

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import significance

Array = np.ndarray
FADING = np.linspace(0.0, 0.6, 61)  # γ of the line and of gains that fade to a constant
FASTER = (
    -0.85 * np.linspace(1.0, 0.0, 7)[:-1]
)  # γ in units of alpha; the outermost contains other floors in 8 of 8 tests
LINE, OTHER_FLOOR = len(FASTER), 0
PREFERENCE = 0.15  # values shown prefer forms near the line: by a factor of e for this distance in γ
OUTLIER = 4.0  # a run further than this many sd from its rung's median counts as if it were so far
POOLED = 0.5  # weight of the other arms' noise: they share the baseline's runs, so their evidence is not independent
FORM_PARAMETERS = 2.6  # c, d, and a γ that is determined in part; measured on synthetic ladders


@dataclass(frozen=True)
class Baselines:
    """The baseline's curve with its noise; x is ln(C / scale)."""

    x: Array  # (rungs,)
    E: Array
    A: Array
    alpha: Array
    seeds: Array  # (..., rungs)
    within: Array  # (..., rungs): sum of squares about the rung's mean
    lack: Array  # sum of squares of rung means about the curve, weighted by seeds

    parameters: ClassVar[int] = 3
    """Number of the baseline's parameters."""

    @property
    def mix(self) -> Array | None:
        """(rungs,): ln(D / N) minus the target's, if it varies apart from compute."""
        return None

    @classmethod
    def fit(cls, x: Array, losses: Array, coarse: bool = False) -> "Baselines":
        """Fit a curve to losses of shape (..., rungs, seeds); NaN where a rung has fewer seeds."""
        known = np.isfinite(losses)
        seeds, means = known.sum(-1).astype(float), cls.means(losses)
        E, A, alpha, lack = fits.solve(x, means, seeds, coarse)
        return cls(x, E, A, alpha, seeds, (_away(losses, known, seeds) ** 2).sum(-1), lack)

    @staticmethod
    def means(losses: Array) -> Array:
        """Mean of each rung."""
        known = np.isfinite(losses)
        return np.where(known, losses, 0.0).sum(-1) / known.sum(-1)

    def slope(self, x: Array) -> Array:
        """−dL / d ln C at each x, shape (..., len(x)): noise in ln m is noise in nats over the slope."""
        alpha = self.alpha[..., None]
        return alpha * self.A[..., None] * np.exp(-alpha * x)

    @property
    def slopes(self) -> Array:
        """−dL / d ln C at each rung, shape (..., rungs)."""
        return self.slope(self.x)

    def equivalents(self, base: Array, arm: Array, log_cost: Array | float) -> "Equivalents":
        """Compare losses of shape (..., arms, rungs, pairs)."""
        E, alpha = (value[..., None, None, None] for value in (self.E, self.alpha))
        valid = (base > E) & (arm > E)
        above, other = np.where(valid, base - E, 1.0), np.where(valid, arm - E, 1.0)
        ratio = np.log(above / other) / alpha
        by = np.stack([np.where(valid, 1 / other - 1 / above, 0.0) / alpha, -ratio / alpha])
        return Equivalents(valid, np.where(valid, ratio - log_cost, 0.0), by)

    def influence(self) -> Array:
        """d(parameters that `equivalents` has derivatives by) / d(rung means), shape (..., parameters, rungs)."""
        return fits.sensitivity(self.x, self.seeds, self.E, self.A, self.alpha)[..., [0, 2], :]


@dataclass(frozen=True)
class Equivalents:
    """ln m of pairs, shape (..., arms, rungs, pairs); 0 where there is none."""

    valid: Array
    log_m: Array
    by: Array  # d ln m / d(parameters of the baseline's form), with an axis for them before the others


@dataclass(frozen=True)
class Extrapolation:
    """ln m at one compute under every form: arrays of shape (..., arms, forms)."""

    values: Array
    variances: Array
    freedoms: Array
    excess: Array  # growth of the sum of squares over the best form's, in units of the noise
    gammas: Array
    _halves: dict[float, Array] = field(init=False, default_factory=dict)
    _bounds: dict[tuple[float, ...], Array] = field(init=False, default_factory=dict)

    @cached_property
    def value(self) -> Array:
        """Mean over the forms, each weighted by its likelihood."""
        return (self.weights * self.values).sum(-1)

    @property
    def weights(self) -> Array:
        """Share of each form by likelihood, with a preference for the line."""
        distance = np.abs(self.gammas) / PREFERENCE
        weights = np.exp(-self.excess / 2 - distance[..., None, :]) * np.gradient(self.gammas, axis=-1)[..., None, :]
        return weights / weights.sum(-1, keepdims=True)

    def bound(self, level: float, side: int) -> Array:
        """One-sided bound (side −1: lower) over all forms, each of which misses the truth with probability `level`."""
        if (level, side) not in self._bounds:
            self._bounds[level, side] = side * (side * self.values + self._half(level)).max(-1)
        return self._bounds[level, side]

    def bound_of(self, form: int, level: float, side: int) -> Array:
        """The same if this form were known to be true."""
        if (form, level, side) not in self._bounds:
            quantile = significance.student_quantile(level, self.freedoms[..., form])
            bound = self.values[..., form] + side * quantile * np.sqrt(self.variances[..., form])
            self._bounds[form, level, side] = bound
        return self._bounds[form, level, side]

    def limiting(self, level: float, side: int) -> Array:
        """Exponent γ of the form that gives the bound."""
        best = (side * self.values + self._half(level)).argmax(-1)
        return np.take_along_axis(np.broadcast_to(self.gammas[..., None, :], self.values.shape), best[..., None], -1)[
            ..., 0
        ]

    def _half(self, level: float) -> Array:
        if level not in self._halves:
            # The likelihood-ratio interval: a form that fits worse has less room, and none beyond the quantile.
            room = significance.student_quantile(level, self.freedoms) ** 2 - self.excess
            self._halves[level] = np.where(room >= 0, np.sqrt(np.maximum(room, 0) * self.variances), -np.inf)
        return self._halves[level]


@dataclass(frozen=True)
class Absent:
    """Evidence of the noise from arms that are not estimated along: sums over them."""

    evidence: Array  # (4,): as Worths.evidence
    squares: Array  # (2, rungs): as Worths.squares


@dataclass(frozen=True)
class Worths:
    """Mean ln m of each rung of each arm, and what is needed to extrapolate it."""

    baselines: Baselines
    x: Array  # (rungs,): the baseline's, and a planned one
    means: Array  # (..., arms, rungs); 0 where there is no pair
    counts: Array  # number of pairs
    weights: Array  # the same, less where a rung has more than others and its own effect remains
    by: Array  # d mean / d(parameters of the baseline's form), with an axis for them before the others
    growth: Array  # (...): sd of a seed's noise is proportional to exp(growth·x)
    within: Array  # (..., arms): variance of a pair's difference in nats²; 0 if there are no seeds
    seed_freedom: Array
    squares: Array  # (2, ..., arms, rungs): squares of pairs' differences about their rung's mean, and their freedom
    evidence: Array  # (4, ..., arms): what seeds and rungs tell of the noise, as significance.share_posterior takes it
    variance: Array  # of a rung's noise, with the room that its uncertainty takes
    freedom: Array
    baseline_evidence: Array
    baseline_variance: Array  # (...): of a run of the baseline, with the effect of a rung in it
    baseline_freedom: Array
    correlation: Array  # (..., arms): between the difference of a pair and its baseline's loss
    fading: Array  # γ of the forms from the line on
    _found: dict[float, Extrapolation] = field(init=False, default_factory=dict)

    @classmethod
    def from_pairs(
        cls, baselines: Baselines, base: Array, arm: Array, log_cost: Array | float = 0.0, *,
        absent: "Absent | None" = None, fading: Array = FADING,
    ) -> "Worths":  # fmt: skip
        """Estimate from losses of shape (..., arms, rungs, pairs); NaN where there is no pair.

        For one arm of many alone, `absent` has what the others tell of the noise. `fading` has the γ of the line and
        of gains that fade to a constant.
        """
        x, slope = baselines.x, baselines.slopes[..., None, :]
        found = baselines.equivalents(base, arm, log_cost)
        valid, nats = found.valid, found.log_m * slope[..., None]
        counts = valid.sum(-1)
        base_away, arm_away = (_away(values, valid, counts) for values in (base, arm))

        # Seed noise by scale, from the pairs of all arms.
        squares = _evidence(((base_away - arm_away) ** 2).sum(-1), np.maximum(counts - 1, 0))
        of_all = squares.sum(-2)
        if absent is not None:
            there = absent.squares.shape[-1]  # a new rung has none of the others' pairs
            of_all[..., :there] += absent.squares.reshape(2, *([1] * (of_all.ndim - 2)), there)
        grows = significance.noise_growth(x, *of_all)
        spread = np.exp(grows[..., None] * x)[..., None, :]

        nats = _without_outliers(nats, valid, counts, spread)
        away = _away(nats, valid, counts)
        means = nats.sum(-1) / np.maximum(counts, 1) / slope
        pure = ((away / spread[..., None]) ** 2).sum((-1, -2))
        pure_freedom = np.maximum(counts - 1, 0).sum(-1)
        by = found.by.sum(-1) / np.maximum(counts, 1)

        # How a pair's difference goes with its baseline's loss; as of independent runs if there are no seeds.
        both = [(one * two).sum((-1, -2)) for one, two in (
            (base_away - arm_away, base_away), (base_away - arm_away, base_away - arm_away), (base_away, base_away),
        )]  # fmt: skip
        known = (both[1] > 0) & (both[2] > 0)
        correlation = np.where(known, both[0] / np.sqrt(np.where(known, both[1] * both[2], 1.0)), math.sqrt(0.5))

        within = baselines.within / spread[..., 0, :] ** 2
        free, rest = np.maximum(baselines.seeds - 1, 0).sum(-1), max(len(x) - float(baselines.parameters), 0.0)
        own = _evidence(within.sum(-1), free, baselines.lack, rest)
        worths = cls(
            baselines, x, means, counts, counts, by, grows, pure / np.maximum(pure_freedom, 1), pure_freedom,
            squares, np.zeros((4, *pure.shape)), np.ones_like(pure), np.ones_like(pure), own,
            *significance.rung_variance(own), correlation, fading,
        )  # fmt: skip
        return worths._with_noise(pure, pure_freedom, None if absent is None else absent.evidence)

    def _with_noise(self, pure: Array, pure_freedom: Array, absent: Array | None) -> "Worths":
        # Where sizes also differ in their mix of N and D, one parameter more is spent.
        rungs = (self.counts > 0).sum(-1) - (self.baselines.mix is not None)
        residual = self.residual
        lack_freedom = np.where(rungs >= 3, rungs - 3.0, 0.0)
        lack = np.where(rungs >= 3, residual.min(-1), 0.0)
        first = significance.pooled(_evidence(pure, pure_freedom, lack, lack_freedom), POOLED, absent)
        if self.weights is self.counts and (self.counts != self.counts.max(-1, keepdims=True)).any():
            weights = significance.effective_counts(self.counts, significance.mean_share(first))
            return self._with(weights=weights)._with_noise(pure, pure_freedom, absent)
        noise, _ = significance.rung_variance(first)
        # Where the data do not determine γ, the best form's residual is too small: take the mean over likely forms.
        likely = np.exp(-(residual - residual.min(-1, keepdims=True)) / (2 * np.maximum(noise, 1e-300)[..., None]))
        lack = np.where(rungs >= 3, (likely * residual).sum(-1) / likely.sum(-1), 0.0)
        lack_freedom = np.where(rungs >= 3, rungs - FORM_PARAMETERS, 0.0)
        evidence = _evidence(pure, pure_freedom, lack, lack_freedom)
        variance, freedom = significance.rung_variance(significance.pooled(evidence, POOLED, absent))
        return self._with(variance=variance, freedom=freedom, evidence=evidence)

    def _with(self, **changes: Array) -> "Worths":
        """A copy with other weights or noise that keeps what was computed and does not depend on them."""
        changed = replace(self, **changes)
        kept = ("gammas", "unit", "_z_at_rungs")
        kept += () if "weights" in changes else ("regression", "slope_rows", "residual")
        changed.__dict__.update({name: value for name, value in self.__dict__.items() if name in kept})
        return changed

    def others(self, arm: int) -> Absent:
        """Return the evidence of the noise from all arms but this one."""
        return Absent(self.evidence.sum(-1) - self.evidence[:, arm], self.squares.sum(-2) - self.squares[:, arm])

    # Regression of means on z, for every form

    @cached_property
    def gammas(self) -> Array:
        """Exponents of the forms, shape (..., forms)."""
        alpha = self.baselines.alpha[..., None]
        return np.concatenate(
            [alpha * FASTER, np.broadcast_to(self.fading, (*alpha.shape[:-1], len(self.fading)))], axis=-1
        )

    def z(self, x: Array) -> Array:
        """z relative to the largest rung, shape (..., 1, forms, len(x))."""
        away, gamma = x - self.x[-1], self.gammas[..., None, :, None]
        bent = np.where(gamma == 0, 1.0, gamma)
        return np.where(gamma == 0, away, -np.expm1(-bent * away) / bent)

    @cached_property
    def _z_at_rungs(self) -> Array:
        return self.z(self.x)

    @cached_property
    def unit(self) -> Array:
        """Noise of ln m of a pair where its noise in nats is 1 at x = 0, shape (..., 1, rungs)."""
        return (np.exp(self.growth[..., None] * self.x) / self.baselines.slopes)[..., None, :]

    @cached_property
    def regression(self) -> tuple[Array, Array, Array, Array]:
        """(weights, rows that give c from the means, z without what they explain, c of z), (..., arms, forms, rungs).

        Where sizes differ in their mix too, ln m is a line in it, and c is its value at the target's mix.
        """
        weights = (self.weights / self.unit**2)[..., None, :]
        shares = weights / np.maximum(_total(weights), 1e-300)
        mix, away = self._mix(weights), self.baselines.mix
        if mix is not None and away is not None:
            shares = shares - _total(shares * away) * mix[1]
        z = self._z_at_rungs
        return weights, shares, self._swept(z, weights), _total(shares * z)

    def _mix(self, weights: Array) -> tuple[Array, Array] | None:
        """(The mix minus its mean, rows that give its slope); None if all sizes have one."""
        if self.baselines.mix is None:
            return None
        away = self.baselines.mix - _total(weights * self.baselines.mix) / np.maximum(_total(weights), 1e-300)
        spread = _total(weights * away**2)
        return away, weights * away / np.where(spread > 0, spread, 1.0)

    def _swept(self, values: Array, weights: Array) -> Array:
        """Values at the rungs without what their mean and the mix explain."""
        shares = weights / np.maximum(_total(weights), 1e-300)
        rest, mix = values - _total(shares * values), self._mix(weights)
        return rest if mix is None else rest - _total(mix[1] * rest) * mix[0]

    @cached_property
    def slope_rows(self) -> Array:
        """Rows that give d from the means."""
        weights, _, away, _ = self.regression
        spread = _total(weights * away**2)
        return weights * away / np.where(spread > 0, spread, 1.0)

    @cached_property
    def residual(self) -> Array:
        """Weighted sum of squares of the means about each form, shape (..., arms, forms)."""
        weights, _, away, _ = self.regression
        means = self.means[..., None, :]
        slope = _total(self.slope_rows * means)
        return _total(weights * (self._swept(means, weights) - slope * away) ** 2)[..., 0]

    def _estimate(self, rows: Array) -> tuple[Array, Array, Array]:
        """(value, variance, freedom) of rows @ means; rows have the shape (..., arms, any number, rungs)."""
        value = _total(rows * self.means[..., None, :])[..., 0]
        noise = np.sqrt(self.variance)[..., None]
        direct = rows * self.unit[..., None, :]
        known = np.where(self.weights > 0, self.weights, 1.0)[..., None, :]
        pairs = _total(direct**2 / known)[..., 0] * noise**2
        through, seeds, influence = self.curve
        by_curve = np.zeros(())
        for number, by in enumerate(self.by):
            by_curve = by_curve + _total(rows * by[..., None, :]) * influence[..., number, :]
        curve = _total(by_curve**2)[..., 0] * through**2
        shared = _total(direct[..., : seeds.shape[-1]] * by_curve / np.sqrt(seeds))[..., 0]
        cross = self.correlation[..., None] * noise * through * shared
        variance = np.maximum(pairs + 2 * cross + curve, 0.0)
        # Welch and Satterthwaite: each part contributes its share of the variance.
        parts = (pairs + cross) ** 2 / self.freedom[..., None] + (curve + cross) ** 2 / self._curve_freedom
        return value, variance, np.where(parts > 0, variance**2 / np.where(parts > 0, parts, 1.0), 1.0)

    @cached_property
    def curve(self) -> tuple[Array, Array, Array]:
        """(sd of a run, seeds, d(parameters) / d(unit noise of a rung)) of the baseline, with axes for arms, rows."""
        found, x = self.baselines, self.baselines.x
        influence = found.influence()
        seeds = significance.effective_counts(found.seeds, significance.mean_share(self.baseline_evidence))
        influence = influence * (np.exp(self.growth[..., None] * x) / np.sqrt(seeds))[..., None, :]
        seeds = seeds[..., None, None, :]
        return np.sqrt(self.baseline_variance)[..., None, None], seeds, influence[..., None, None, :, :]

    @property
    def _curve_freedom(self) -> Array:
        return self.baseline_freedom[..., None, None]

    # Estimates

    def at(self, x: float) -> Extrapolation:
        """Extrapolate to ln(C / scale) = x."""
        if x in self._found:
            return self._found[x]
        self._found[x] = Extrapolation(*self._estimate(self._rows(x)), self._excess, self.gammas)
        return self._found[x]

    def value_at(self, x: float) -> Array:
        """The value that `at` gives, without what its bounds need."""
        values = _total(self._rows(x) * self.means[..., None, :])[..., 0]
        return Extrapolation(values, values, values, self._excess, self.gammas).value

    def _rows(self, x: float) -> Array:
        _, shares, _, centre = self.regression
        return shares + (self.z(np.array([x])) - centre) * self.slope_rows

    @cached_property
    def _excess(self) -> Array:
        residual, noise = self.residual, np.where(self.variance > 0, self.variance, 1.0)[..., None]
        return (residual - residual.min(-1, keepdims=True)) / noise

    def rung_estimates(self) -> tuple[Array, Array, Array]:
        """(ln m, variance, freedom) at each rung alone, shape (..., arms, rungs), without any form in C."""
        return self._estimate(np.broadcast_to(np.eye(len(self.x)), (*self.means.shape, len(self.x))))

    def slope(self) -> tuple[Array, Array, Array]:
        """(d ln m / d ln C, variance, freedom) of the line, shape (..., arms)."""
        return self._slope

    @cached_property
    def _slope(self) -> tuple[Array, Array, Array]:
        value, variance, freedom = self._estimate(self.slope_rows[..., LINE : LINE + 1, :])
        return value[..., 0], variance[..., 0], freedom[..., 0]

    def lack_of_fit_p(self, arm: int) -> float | None:
        """p of the F test for rungs off a line by more than seeds explain; None without repeated seeds."""
        freedom = int(self.seed_freedom[arm])
        lack = float(self.residual[arm, LINE])
        rungs = int((self.counts[arm] > 0).sum())
        rungs -= 2 + (self.baselines.mix is not None)
        return significance.lack_of_fit_p(lack, rungs, float(self.within[arm]) * freedom, freedom)

    def bend_p(self) -> Array:
        """p of the t test of a bend, by the scatter about it, which needs no seeds; NaN below four rungs."""
        return self._bend_p

    @cached_property
    def _bend_p(self) -> Array:
        more = [] if self.baselines.mix is None else [self.baselines.mix]
        z = np.stack([np.ones_like(self.x), self.x, self.x**2, *more], -1)
        weights = np.sqrt(self.weights) / self.unit
        design = weights[..., None] * z
        solution = np.linalg.pinv(design)
        coefficients = (solution * (weights * self.means)[..., None, :]).sum(-1)
        rest = ((weights * self.means - (design * coefficients[..., None, :]).sum(-1)) ** 2).sum(-1)
        freedom = (self.counts > 0).sum(-1) - float(z.shape[-1])
        known = (freedom > 0) & (rest > 0)
        error = np.sqrt(np.where(known, rest / np.where(known, freedom, 1), 1.0) * (solution[..., 2, :] ** 2).sum(-1))
        p = 2 * special.stdtr(np.where(known, freedom, 1.0), -np.abs(coefficients[..., 2]) / np.maximum(error, 1e-300))
        return np.where(known, p, np.nan)

    def without(self, rung: int, x: float) -> Array:
        """ln m at x by a line through the other rungs."""
        left = self._with(weights=self.weights * (np.arange(len(self.x)) != rung))
        return left.at(x).values[..., LINE]


def decisions(worths: Worths, x: float, level: float, least: float) -> Array:
    """+1 where an arm is worth at least `least` (in ln m) at x, −1 where it is worth less, 0 where that is open.

    Both by bounds of this level over all forms, and by the largest rung itself: what crosses `least` only beyond it is
    open.
    """
    found, last = worths.at(x), worths.means[..., -1]
    worth_it = (found.bound(level, -1) >= least) & (last >= least)
    return worth_it * 1 - ((found.bound(level, 1) < least) & (last < least)) * 1


def _evidence(*parts: Any) -> Array:
    return np.stack(np.broadcast_arrays(*(np.asarray(part, dtype=float) for part in parts)))


def _total(values: Array) -> Array:
    """Sum over the rungs, which stay as an axis of length 1; to the bit numpy's, which takes several times as long."""
    if not 0 < values.shape[-1] < 8:  # from eight numbers on numpy adds in another order
        return values.sum(-1, keepdims=True)
    total = values[..., :1].copy()
    for k in range(1, values.shape[-1]):
        total += values[..., k : k + 1]
    return total


def _away(values: Array, valid: Array, counts: Array) -> Array:
    """Deviations from the rung's mean; 0 where there is no pair."""
    values = np.where(valid, values, 0.0)
    return np.where(valid, values - (values.sum(-1) / np.maximum(counts, 1))[..., None], 0.0)


def _without_outliers(nats: Array, valid: Array, counts: Array, spread: Array) -> Array:
    """Pull runs that lie far from the median of their rung's to OUTLIER sd; the sd comes from all runs' median."""
    several = (counts > 2)[..., None] & valid
    if not several.any():
        return nats
    n = np.maximum(counts, 2)[..., None]
    away = np.abs(_away(nats, valid, counts)) / spread[..., None] * np.sqrt(n / (n - 1))
    known = several.reshape(*nats.shape[:-3], -1)
    # A ladder without such rungs has no sd, and needs none.
    known = known | ~known.any(-1, keepdims=True)
    sd = _median(np.where(known, away.reshape(known.shape), np.nan)) / special.ndtri(0.75)
    limit = OUTLIER * sd[..., None, None, None] * spread[..., None]
    middle = _median(np.where(several, nats, np.where(several.any(-1, keepdims=True), np.nan, 0.0)))[..., None]
    return np.where(several, middle + np.clip(nats - middle, -limit, limit), nats)


def _median(values: Array) -> Array:
    """Median of the last axis without NaN; numpy's nanmedian takes several times as long."""
    ordered, number = np.sort(values, axis=-1), np.isfinite(values).sum(-1)
    middle = [np.take_along_axis(ordered, place[..., None], -1)[..., 0] for place in ((number - 1) // 2, number // 2)]
    return (middle[0] + middle[1]) / 2
