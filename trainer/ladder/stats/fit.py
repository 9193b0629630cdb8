"""Loss against compute along the baseline's rungs: L(C) = E + A·C^−alpha, with E and alpha uncertain.

For fixed alpha the form is linear in (E, A), which non-negative least squares gives at once; alpha is searched for in
one dimension (variable projection, Golub & Pereyra 1973). The sum of squares along that search is also the profile
likelihood, so intervals of E, alpha and any prediction come from it: they stay honest where E is badly determined and
the curve of the likelihood is no parabola. forms.py has the same by Huber losses on log L, and forms in N and D.

Squares are of nats and not of logs: the noise of seeds is taken for equally large at every rung, as it is for the
multipliers, and `unequal_noise_p` says how well that goes with the data.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from trainer.errors import FitError
from trainer.ladder.stats import forms
from trainer.ladder.stats.records import (
    BASELINE,
    Bootstrap,
    Curve,
    CurveFit,
    Interval,
    PredictionCheck,
    RungFit,
    RunResult,
)

Array = np.ndarray
ALPHAS = np.geomspace(0.005, 4.0, 161)  # 4 % apart; published exponents of compute lie between 0.05 and 0.5
FEWEST_RUNGS = 3
LACK_OF_FIT = 0.05


@dataclass(frozen=True)
class Rungs:
    """Rung means of a baseline, by compute."""

    names: list[str]
    flops: Array
    seeds: Array
    loss: Array
    squares: float
    """Sum over runs of (loss − rung mean)²."""
    variances: list[float | None]

    @property
    def scale(self) -> float:
        """Geometric mean of compute: with it E, A and alpha are least entangled."""
        return float(np.exp(np.mean(np.log(self.flops))))

    @property
    def x(self) -> Array:
        return np.log(self.flops / self.scale)

    @property
    def spare(self) -> int:
        """Degrees of freedom that seeds leave within rungs."""
        return int(self.seeds.sum()) - len(self.names)


def usable(results: Iterable[RunResult], arm: str) -> list[RunResult]:
    return [one for one in results if one.arm == arm and math.isfinite(one.loss)]


def rungs_of(results: Sequence[RunResult]) -> Rungs:
    """Means over the seeds of each rung. Raises FitError where three rungs of different compute are not there."""
    losses: dict[str, list[float]] = {}
    flops: dict[str, list[float]] = {}
    for result in results:
        losses.setdefault(result.rung, []).append(result.loss)
        flops.setdefault(result.rung, []).append(math.log(result.flops))
    log_flops = {name: math.fsum(values) / len(values) for name, values in flops.items()}
    names = sorted(losses, key=log_flops.__getitem__)
    if len({round(log_flops[name], 6) for name in names}) < max(FEWEST_RUNGS, len(names)):
        raise FitError(
            f"the baseline has finished runs at {len(names)} rungs ({', '.join(names) or 'none'}).\n"
            "  E, A and alpha need at least three, each of another compute. Run more rungs."
        )
    groups = [np.array(losses[name]) for name in names]
    return Rungs(
        names,
        np.exp([log_flops[name] for name in names]),
        np.array([len(group) for group in groups], dtype=float),
        np.array([group.mean() for group in groups]),
        math.fsum(float(((group - group.mean()) ** 2).sum()) for group in groups),
        [float(group.var(ddof=1)) if len(group) > 1 else None for group in groups],
    )


# Variable projection


def project(alphas: Array, x: Array, loss: Array, weights: Array) -> tuple[Array, Array, Array]:
    """(E, A, weighted sum of squares) of the best curve with E, A ≥ 0, for each alpha."""
    z = np.exp(-np.outer(alphas, x))
    total = weights.sum()
    z_mean, mean = z @ weights / total, float(loss @ weights) / total
    deviation = z - z_mean[:, None]
    A = np.maximum(deviation @ (weights * loss) / (deviation**2 @ weights), 0.0)
    E = mean - A * z_mean
    negative = E < 0
    if negative.any():
        A = np.where(negative, z @ (weights * loss) / (z**2 @ weights), A)
        E = np.where(negative, 0.0, E)
    squares = (loss - E[:, None] - A[:, None] * z) ** 2 @ weights
    return E, A, squares


def solve(flops: Array, loss: Array, weights: Array) -> tuple[Curve, float]:
    """(the least-squares curve, its weighted sum of squares)."""
    scale = float(np.exp(np.mean(np.log(flops))))
    x, grid = np.log(flops / scale), ALPHAS
    for _ in range(4):  # each round narrows alpha by a factor of 20; the sum of squares has a kink where E reaches 0
        E, A, squares = project(grid, x, loss, weights)
        best = int(squares.argmin())
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
        grid = np.linspace(low, high, 41)
    E, A, squares = project(grid, x, loss, weights)
    best = int(squares.argmin())
    return Curve(float(E[best]), float(A[best]), float(grid[best]), scale), float(squares[best])


def curve_at(rungs: Rungs, alpha: float) -> Curve:
    """The best curve with this exponent."""
    E, A, _ = project(np.array([alpha]), rungs.x, rungs.loss, rungs.seeds)
    return Curve(float(E[0]), float(A[0]), alpha, rungs.scale)


def sensitivity(rungs: Rungs, curve: Curve) -> Array:
    """d(E, A, alpha) / d(rung means), shape (3, rungs): the delta method's derivative."""
    z = np.exp(-curve.alpha * rungs.x)
    jacobian = np.stack([np.ones_like(z), z, -curve.A * rungs.x * z], axis=1)
    if curve.E == 0.0:
        jacobian[:, 0] = 0.0  # at its bound, E does not move
    root = np.sqrt(rungs.seeds)
    return np.linalg.pinv(jacobian * root[:, None]) * root


# The baseline's fit


def fit_curve(results: Iterable[RunResult], level: float = 0.05, second_opinion: bool = True) -> CurveFit:
    """Fit the baseline's finished runs among `results`.

    Intervals are two-sided and cover with probability 1 − level. `second_opinion` adds the fit by Huber losses, which
    takes longer. Raises FitError with fewer than three rungs, or where loss does not fall with compute.
    """
    rungs = rungs_of(usable(results, BASELINE))
    curve, squares = solve(rungs.flops, rungs.loss, rungs.seeds)
    if curve.A <= 0 or rungs.loss[-1] >= rungs.loss[0]:
        raise FitError(
            f"the baseline's loss does not fall with compute: {rungs.loss[0]:.4f} at {rungs.names[0]}, "
            f"{rungs.loss[-1]:.4f} at {rungs.names[-1]}.\n"
            "  Without a slope there is no compute multiplier. Look at the largest rung's learning rate and tokens."
        )
    profile = Profile.from_fit(rungs, curve, squares, level)
    E, alpha = profile.floor(), profile.alpha()
    return CurveFit(
        curve, E, alpha,
        forms.huber_curve(rungs.flops, rungs.loss) if second_opinion else None,
        _rung_fits(rungs, curve),
        profile.sd, profile.degrees_of_freedom,
        math.sqrt(rungs.squares / rungs.spare) if rungs.spare else None,
        _lack_of_fit(rungs, squares), _unequal_noise(rungs),
        _determined(E, rungs),
    )  # fmt: skip


def _rung_fits(rungs: Rungs, curve: Curve) -> list[RungFit]:
    z = np.exp(-curve.alpha * rungs.x)
    jacobian = np.stack([np.ones_like(z), z, -curve.A * rungs.x * z], axis=1)
    leverage = np.einsum("kj,jk->k", jacobian, sensitivity(rungs, curve))
    fitted = curve.E + curve.A * z
    return [
        RungFit(
            name, float(rungs.flops[k]), int(rungs.seeds[k]), float(rungs.loss[k]),
            None if (variance := rungs.variances[k]) is None else math.sqrt(variance),
            float(rungs.loss[k] - fitted[k]), float(leverage[k]),
        )
        for k, name in enumerate(rungs.names)
    ]  # fmt: skip


def _lack_of_fit(rungs: Rungs, squares: float) -> float | None:
    between = len(rungs.names) - 3
    if between < 1 or not rungs.spare or rungs.squares <= 0:
        return None
    return float(special.fdtrc(between, rungs.spare, squares / between / (rungs.squares / rungs.spare)))


def _unequal_noise(rungs: Rungs) -> float | None:
    """Bartlett's test on the variances, which needs no more than they and their degrees of freedom."""
    known = [(v, n - 1) for v, n in zip(rungs.variances, rungs.seeds, strict=True) if v is not None and v > 0]
    if len(known) < 2:
        return None
    variances, freedom = np.array(known).T
    pooled = float(variances @ freedom) / freedom.sum()
    statistic = freedom.sum() * math.log(pooled) - float(freedom @ np.log(variances))
    correction = 1 + (float((1 / freedom).sum()) - 1 / freedom.sum()) / (3 * (len(known) - 1))
    return float(special.chdtrc(len(known) - 1, statistic / correction))


def _determined(E: Interval, rungs: Rungs) -> bool:
    return E.low is not None and E.high is not None and E.low > 0 and E.high < float(rungs.loss.min())


@dataclass(frozen=True)
class Profile:
    """The sum of squares as a function of alpha: what lies little enough above its minimum goes with the data."""

    rungs: Rungs
    curve: Curve
    squares: float
    level: float
    alphas: Array

    @classmethod
    def from_fit(cls, rungs: Rungs, curve: Curve, squares: float, level: float) -> "Profile":
        """With a grid that is fine where the sum of squares is under the limit."""
        coarse = cls(rungs, curve, squares, level, np.sort(np.append(ALPHAS, curve.alpha)))
        if coarse.sd is None:
            return coarse
        inside = np.flatnonzero(coarse._room() >= 0)
        low, high = coarse.alphas[max(inside[0] - 1, 0)], coarse.alphas[min(inside[-1] + 1, len(ALPHAS))]
        fine = np.append(np.geomspace(low, high, 200), curve.alpha)
        return cls(rungs, curve, squares, level, np.sort(fine))

    @property
    def form_fails(self) -> bool:
        p = _lack_of_fit(self.rungs, self.squares)
        return p is not None and p < LACK_OF_FIT

    @property
    def degrees_of_freedom(self) -> int:
        return len(self.rungs.names) - 3 if self.form_fails else int(self.rungs.seeds.sum()) - 3

    @property
    def sd(self) -> float | None:
        """Seeds and lack of fit pooled; where the form fails, its failure alone says how far to trust it."""
        freedom = self.degrees_of_freedom
        total = self.squares + (0.0 if self.form_fails else self.rungs.squares)
        return math.sqrt(total / freedom) if freedom > 0 and total > 0 else None  # 0: made up, and says nothing

    @property
    def quantile(self) -> float:
        return -float(special.stdtrit(self.degrees_of_freedom, self.level / 2))

    def _room(self) -> Array:
        """How much the sum of squares may still grow at each alpha."""
        assert self.sd is not None
        squares = project(self.alphas, self.rungs.x, self.rungs.loss, self.rungs.seeds)[2]
        return self.squares + (self.quantile * self.sd) ** 2 + 1e-12 * self.squares - squares

    def alpha(self) -> Interval:
        if self.sd is None:
            return Interval(self.curve.alpha, None, None, self.level)
        inside = self.alphas[self._room() >= 0]
        low = float(inside[0]) if inside[0] > ALPHAS[0] * 1.001 else None
        high = float(inside[-1]) if inside[-1] < ALPHAS[-1] * 0.999 else None
        return Interval(self.curve.alpha, low, high, self.level)

    def floor(self) -> Interval:
        """Of E."""
        return self._of(self.curve.E, lambda z: (np.ones(len(z)), np.zeros(len(z))))

    def prediction(self, flops: float, seeds: int) -> Interval:
        """Of the mean loss of `seeds` new runs."""
        x = math.log(flops / self.curve.scale)

        def design(z: Array) -> tuple[Array, Array]:
            return np.ones(len(z)), np.exp(-self.alphas * x)

        return self._of(self.curve.loss_at(flops), design, extra=1 / seeds)

    def _of(self, value: float, design: Callable[[Array], tuple[Array, Array]], extra: float = 0.0) -> Interval:
        """Interval of u·E + v·A, (u, v) = design: its ends over all alphas, what is left of the limit spent on E, A.

        Given alpha, the sum of squares grows by (value − best)² / variance, so the ends are known in closed form.
        """
        if self.sd is None:
            return Interval(value, None, None, self.level)
        z = np.exp(-np.outer(self.alphas, self.rungs.x))
        u, v = design(z)
        weights, room = self.rungs.seeds, np.maximum(self._room(), 0.0)
        E, A, squares = project(self.alphas, self.rungs.x, self.rungs.loss, weights)
        del squares
        total, first, second = weights.sum(), z @ weights, z**2 @ weights
        determinant = total * second - first**2
        free = (u**2 * second - 2 * u * v * first + v**2 * total) / determinant
        variance = np.where(E > 0, free, np.where(v == 0, free, v**2 / second))
        best, inside = u * E + v * A, self._room() >= 0
        half = np.sqrt(room * variance)
        low, high = float((best - half)[inside].min()), float((best + half)[inside].max())
        noise = self.quantile * self.sd * math.sqrt(extra)
        low = value - math.hypot(value - low, noise)
        high = value + math.hypot(high - value, noise)
        return Interval(value, max(low, 0.0), high, self.level)


# Predictions


def predict(results: Iterable[RunResult], flops: float, seeds: int = 1, level: float = 0.05) -> PredictionCheck:
    """The loss expected of the mean of `seeds` baseline runs of so much compute, from the baseline's runs in `results`.

    The interval holds the curve's uncertainty and the seeds' noise, and assumes that the form goes on to hold.
    """
    rungs = rungs_of(usable(results, BASELINE))
    curve, squares = solve(rungs.flops, rungs.loss, rungs.seeds)
    interval = Profile.from_fit(rungs, curve, squares, level).prediction(flops, seeds)
    return PredictionCheck(flops, interval, seeds)


def check(prediction: PredictionCheck, losses: Sequence[float]) -> PredictionCheck:
    """The prediction again with what came out; raises ValueError unless its number of losses is the predicted one."""
    if len(losses) != prediction.seeds:
        raise ValueError(f"{len(losses)} losses for a prediction of the mean of {prediction.seeds}")
    observed = math.fsum(losses) / len(losses)
    value, low, high = prediction.predicted.value, prediction.predicted.low, prediction.predicted.high
    if value is None or not math.isfinite(observed):
        return prediction
    inside = None if low is None or high is None else low <= observed <= high
    return PredictionCheck(
        prediction.flops, prediction.predicted, prediction.seeds,
        observed, observed - value, (observed - value) / value, inside,
    )  # fmt: skip


def bootstrap(results: Iterable[RunResult], level: float = 0.05, draws: int = 400, seed: int = 0) -> Bootstrap:
    """Percentiles of E and alpha over ladders resampled by rungs, and within them by seeds.

    Rungs are resampled too, so it also shows what rests on a single rung; with few rungs many draws lack three
    different ones and are refused. Coverage is measured for the profile's intervals, which verdicts stand on.
    """
    rows = usable(results, BASELINE)
    rungs = rungs_of(rows)
    by_rung = [np.array([one.loss for one in rows if one.rung == name]) for name in rungs.names]
    random = np.random.Generator(np.random.Philox(seed))
    found: list[tuple[float, float]] = []
    for _ in range(draws):
        chosen, counts = np.unique(random.integers(len(by_rung), size=len(by_rung)), return_counts=True)
        if len(chosen) < FEWEST_RUNGS:
            continue
        means = np.array([random.choice(by_rung[k], len(by_rung[k])).mean() for k in chosen])
        curve, _ = solve(rungs.flops[chosen], means, rungs.seeds[chosen] * counts)
        if curve.A > 0:
            found.append((curve.E, curve.alpha))
    E, alpha = ([one[k] for one in found] for k in (0, 1))
    return Bootstrap(_percentiles(E, level), _percentiles(alpha, level), draws, draws - len(found))


def _percentiles(values: Sequence[float], level: float) -> Interval:
    if not values:
        return Interval(None, None, None, level)
    low, middle, high = (float(q) for q in np.quantile(values, [level / 2, 0.5, 1 - level / 2]))
    return Interval(middle, low, high, level)
