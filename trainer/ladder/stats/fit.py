"""Loss against compute along the baseline's rungs, L(C) = E + A·C^−alpha, with intervals for E, alpha, predictions.

For a fixed alpha the form is linear in (E, A), so weighted least squares gives both at once, and only alpha has to be
searched (variable projection, Golub & Pereyra 1973). The same search gives the profile likelihood: the smallest sum of
squares at each alpha. All intervals are read from it, since they stay valid where E is badly determined and the
likelihood is no parabola. forms.py fits the same form by Huber losses on log L, and forms in N and D.

Squares are of nats, not of log nats: noise between seeds is assumed equally large at every rung, as it is for the
multipliers. `unequal_noise_p` says how well the data agree with that.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats import forms, records, significance
from trainer.ladder.stats.records import SCARCE, Axis, Curve, CurveFit, Interval, RunResult

Array = np.ndarray
ALPHAS = np.geomspace(0.005, 4.0, 161)  # 4 % apart; published exponents of compute lie between 0.05 and 0.5
FEWEST_RUNGS = 3


@dataclass(frozen=True)
class Rungs:
    """The baseline's rungs, by compute."""

    names: list[str]
    flops: Array
    losses: list[Array]  # For each rung, the losses of its seeds

    @classmethod
    def from_results(cls, results: Iterable[RunResult], arm: str = records.BASELINE) -> "Rungs":
        """Group an arm's finished runs. Raises FitError unless there are three rungs, each of other compute."""
        losses: dict[str, list[float]] = {}
        flops: dict[str, list[float]] = {}
        for result in results:
            if result.arm == arm and math.isfinite(result.loss):
                losses.setdefault(result.rung, []).append(result.loss)
                flops.setdefault(result.rung, []).append(math.log(result.flops))
        log_flops = {name: math.fsum(values) / len(values) for name, values in flops.items()}
        names = sorted(losses, key=log_flops.__getitem__)
        if len({round(log_flops[name], 6) for name in names}) < max(FEWEST_RUNGS, len(names)):
            raise FitError(
                f"the baseline has finished runs at {len(names)} rungs ({', '.join(names) or 'none'}).\n"
                "  E, A and alpha need at least three, each of another compute. Run more rungs."
            )
        return cls(names, np.exp([log_flops[name] for name in names]), [np.array(losses[name]) for name in names])

    @cached_property
    def seeds(self) -> Array:  # of each rung: the weights of the rung means
        return np.array([len(losses) for losses in self.losses], dtype=float)

    @cached_property
    def loss(self) -> Array:  # mean of each rung
        return np.array([losses.mean() for losses in self.losses])

    @cached_property
    def squares(self) -> float:  # sum over runs of (loss − rung mean)²
        return math.fsum(float(((losses - losses.mean()) ** 2).sum()) for losses in self.losses)

    @property
    def variances(self) -> list[float | None]:  # over the seeds of each rung; None with one seed
        return [float(losses.var(ddof=1)) if len(losses) > 1 else None for losses in self.losses]

    @cached_property
    def scale(self) -> float:
        # The geometric mean of compute: with it as unit, the estimates of E, A and alpha are least correlated.
        return float(np.exp(np.mean(np.log(self.flops))))

    @cached_property
    def x(self) -> Array:  # ln(C / scale)
        return np.log(self.flops / self.scale)

    @property
    def seed_freedom(self) -> int:  # degrees of freedom that the seeds leave within rungs
        return int(self.seeds.sum()) - len(self.names)

    def lack_of_fit_p(self, squares: float) -> float | None:
        """p of the F test for rung means with this weighted sum of squares about a curve of three parameters."""
        return significance.lack_of_fit_p(squares, len(self.names) - 3, self.squares, self.seed_freedom)


# Variable projection


def project(alphas: Array, x: Array, loss: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Return (E, A, weighted sum of squares) of the best curve with E, A ≥ 0, for each alpha.

    `x` is ln(C / scale), shape (rungs,). Many ladders at once: `loss` and `weights` have shape (..., rungs), and `x`
    too if their sizes differ; `alphas` (..., alphas) or (alphas,); the result has shape (..., alphas).
    """
    # Weighted regression of the loss on z = (C / scale)^−alpha: the slope is A, the intercept is E. Rungs are few and
    # alphas many, so sums over rungs are made rung by rung: numpy takes several times as long along a short axis.
    rungs = range(x.shape[-1])
    z = [np.exp(-alphas * x[..., k, None]) for k in rungs]
    w, y = ([values[..., k, None] for k in rungs] for values in (weights, loss))
    total, mean = sum(w), sum(w[k] * y[k] for k in rungs)
    z_mean, mean = sum(w[k] * z[k] for k in rungs) / total, mean / total
    away = [z[k] - z_mean for k in rungs]
    A = sum(away[k] * w[k] * y[k] for k in rungs) / sum(away[k] ** 2 * w[k] for k in rungs)
    A = np.maximum(A, 0.0)
    E = mean - A * z_mean
    # Where E would be negative, the best admissible curve has E = 0: a regression through the origin.
    negative = E < 0
    if negative.any():
        A = np.where(negative, sum(z[k] * w[k] * y[k] for k in rungs) / sum(z[k] ** 2 * w[k] for k in rungs), A)
        E = np.where(negative, 0.0, E)
    squares = sum((y[k] - E - A * z[k]) ** 2 * w[k] for k in rungs)
    return E, A, np.asarray(squares)


def solve(x: Array, loss: Array, weights: Array, coarse: bool = False) -> tuple[Array, Array, Array, Array]:
    """Return (E, A, alpha, weighted sum of squares) of the least-squares curves, each of shape (...).

    `coarse` takes a third of the time and gives alpha to 0.1 % instead of 1e-7.
    """
    grid = ALPHAS[::4] if coarse else ALPHAS
    alphas = np.broadcast_to(grid, (*loss.shape[:-1], len(grid)))
    # Some times, a 20 times finer grid around the best. No gradient: the sum of squares has a kink where E reaches 0.
    for _ in range(2 if coarse else 4):
        best = project(alphas, x, loss, weights)[2].argmin(-1)[..., None]
        ends = (np.clip(best + step, 0, alphas.shape[-1] - 1) for step in (-1, 1))
        low, high = (np.take_along_axis(alphas, end, -1)[..., 0] for end in ends)
        alphas = np.linspace(low, high, 41, axis=-1)
    E, A, squares = project(alphas, x, loss, weights)
    best = squares.argmin(-1)[..., None]
    E, A, alpha, squares = (np.take_along_axis(values, best, -1)[..., 0] for values in (E, A, alphas, squares))
    return E, A, alpha, squares


def curve_with_alpha(rungs: Rungs, alpha: float) -> Curve:
    """Return the best curve with this exponent."""
    E, A, _ = project(np.array([alpha]), rungs.x, rungs.loss, rungs.seeds)
    return Curve(float(E[0]), float(A[0]), alpha, rungs.scale)


def _jacobian(x: Array, E: Array, A: Array, alpha: Array) -> Array:
    """d(fitted values) / d(E, A, alpha), shape (..., rungs, 3)."""
    z = np.exp(-alpha[..., None] * x)
    return np.stack([np.ones_like(z), z, -A[..., None] * x * z], axis=-1)


def sensitivity(x: Array, weights: Array, E: Array, A: Array, alpha: Array) -> Array:
    """d(E, A, alpha) / d(rung means), shape (..., 3, rungs): the derivative that the delta method needs."""
    jacobian = _jacobian(x, E, A, alpha)
    jacobian[..., 0] *= (E > 0)[..., None]  # at its bound, E does not move
    root = np.sqrt(weights)
    return np.linalg.pinv(jacobian * root[..., None]) * root[..., None, :]


# The baseline's fit


def check_runs(results: Sequence[RunResult]) -> None:
    """Raise FitError for runs that are there twice, and for FLOPs, tokens or losses that no run can have."""
    counts = Counter((result.arm, result.rung, result.seed) for result in results)
    if twice := [key for key, count in counts.items() if count > 1]:
        arm, rung, seed = twice[0]
        raise FitError(
            f"there are {counts[twice[0]]} results of arm {arm}, rung {rung}, seed {seed}.\n"
            "  Each run may be given once. Remove the others, or give them other seeds."
        )
    for result in results:
        for name in ("flops", "tokens", "loss"):
            value = getattr(result, name)
            if value <= 0 or (name == "flops" and not math.isfinite(value)):
                raise FitError(
                    f"arm {result.arm}, rung {result.rung}, seed {result.seed} has {name} = {value:g}.\n"
                    "  It must be positive. Correct it, or leave the run out."
                )


def fit_curve(
    results: Iterable[RunResult], level: float = 0.05, second_opinion: bool = True, axis: Axis = "compute"
) -> CurveFit:
    """Fit the baseline's finished runs among `results`.

    Intervals are two-sided and cover the truth with probability 1 − level. `second_opinion` adds the slower fit by
    Huber losses. Raises FitError with fewer than three rungs, or if the loss does not fall with compute.
    """
    results = list(results)
    check_runs(results)
    rungs = Rungs.from_results(results)
    profile = Profile.from_rungs(rungs, level)
    curve = profile.curve
    if curve.A <= 0 or rungs.loss[-1] >= rungs.loss[0]:
        raise FitError(
            f"the baseline's loss does not fall with {SCARCE[axis]}: {rungs.loss[0]:.4f} at {rungs.names[0]}, "
            f"{rungs.loss[-1]:.4f} at {rungs.names[-1]}.\n"
            "  Without a slope there is no multiplier. Check the largest rung's learning rate and tokens."
        )
    E = profile.floor()
    return CurveFit(
        curve=curve, E=E, alpha=profile.alpha(),
        huber=forms.huber_curve(rungs.flops, rungs.loss) if second_opinion else None,
        rungs=list(_rung_fits(rungs, curve)), sd=profile.sd, degrees_of_freedom=profile.degrees_of_freedom,
        seed_sd=math.sqrt(rungs.squares / rungs.seed_freedom) if rungs.seed_freedom else None,
        lack_of_fit_p=rungs.lack_of_fit_p(profile.squares),
        unequal_noise_p=significance.unequal_variances_p(rungs.variances, rungs.seeds.tolist()),
        E_determined=E.low is not None and E.high is not None and E.low > 0 and E.high < float(rungs.loss.min()),
    )  # fmt: skip


def _rung_fits(rungs: Rungs, curve: Curve) -> Iterator[records.RungFit]:
    values = np.array([curve.E, curve.A, curve.alpha])
    jacobian = _jacobian(rungs.x, *values)
    # Diagonal of the hat matrix, d(fitted values) / d(rung means).
    leverage = np.einsum("kj,jk->k", jacobian, sensitivity(rungs.x, rungs.seeds, *values))
    residuals = rungs.loss - curve.E - curve.A * jacobian[:, 1]
    for k, (name, variance) in enumerate(zip(rungs.names, rungs.variances, strict=True)):
        sd = None if variance is None else math.sqrt(variance)
        loss, residual, own = map(float, (rungs.loss[k], residuals[k], leverage[k]))
        yield records.RungFit(name, float(rungs.flops[k]), int(rungs.seeds[k]), loss, sd, residual, own)


@dataclass(frozen=True)
class Profile:
    """The smallest sum of squares at each alpha. An alpha is in the interval if its sum is little above the minimum."""

    rungs: Rungs
    curve: Curve
    squares: float  # The minimum: the weighted sum of squares of rung means about the curve
    level: float
    alphas: Array

    @classmethod
    def from_rungs(cls, rungs: Rungs, level: float) -> "Profile":
        """Fit the curve and choose the grid of alphas."""
        return cls.from_many([rungs], level)[0]

    @classmethod
    def from_many(cls, ladders: Sequence[Rungs], level: float) -> list["Profile"]:
        """The same for many, each of its own sizes: the search takes most of the time, and they share it."""
        found: dict[int, Profile] = {}
        numbers = [len(rungs.names) for rungs in ladders]
        for number in dict.fromkeys(numbers):
            places = [place for place, rungs in enumerate(numbers) if rungs == number]
            x, loss, seeds = (
                np.stack([getattr(ladders[place], name) for place in places]) for name in ("x", "loss", "seeds")
            )
            for place, (E, A, alpha, squares) in zip(places, np.stack(solve(x, loss, seeds), -1).tolist(), strict=True):
                curve = Curve(E, A, alpha, ladders[place].scale)
                found[place] = cls._with_grid(ladders[place], curve, squares, level)
        return [found[place] for place in range(len(ladders))]

    @classmethod
    def _with_grid(cls, rungs: Rungs, curve: Curve, squares: float, level: float) -> "Profile":
        coarse = cls(rungs, curve, squares, level, np.sort(np.append(ALPHAS, curve.alpha)))
        if coarse.sd is None:
            return coarse
        # A finer grid over the interval alone, so that its ends and those of predictions are exact enough.
        inside = np.flatnonzero(coarse._room >= 0)
        low, high = coarse.alphas[max(inside[0] - 1, 0)], coarse.alphas[min(inside[-1] + 1, len(ALPHAS))]
        return replace(coarse, alphas=np.sort(np.append(np.geomspace(low, high, 200), curve.alpha)))

    @cached_property
    def form_fails(self) -> bool:
        p = self.rungs.lack_of_fit_p(self.squares)
        return p is not None and p < significance.LACK_OF_FIT

    @property
    def degrees_of_freedom(self) -> int:
        return (len(self.rungs.names) if self.form_fails else int(self.rungs.seeds.sum())) - 3

    @cached_property
    def sd(self) -> float | None:
        """Standard deviation of a run about the curve; None if unknown.

        Seeds and lack of fit pooled. If the form fails, its lack of fit alone: more seeds would not repair it.
        """
        freedom = self.degrees_of_freedom
        total = self.squares + (0.0 if self.form_fails else self.rungs.squares)
        # A total of 0 means losses without noise, which say nothing about it.
        return math.sqrt(total / freedom) if freedom > 0 and total > 0 else None

    @property
    def _quantile(self) -> float:
        return significance.student_quantile(self.level / 2, self.degrees_of_freedom)

    @cached_property
    def _projection(self) -> tuple[Array, Array, Array]:  # (E, A, sum of squares) at each alpha
        return project(self.alphas, self.rungs.x, self.rungs.loss, self.rungs.seeds)

    @cached_property
    def _moments(self) -> tuple[float, Array, Array]:
        """Weighted moments of z = (C / scale)^−alpha at each alpha, of the normal equations of (E, A)."""
        z, weights = np.exp(-np.outer(self.alphas, self.rungs.x)), self.rungs.seeds
        return float(weights.sum()), z @ weights, z**2 @ weights

    @cached_property
    def _room(self) -> Array:
        """Growth of the sum of squares that is still allowed at each alpha; negative outside of the interval."""
        assert self.sd is not None
        # The limit is minimum + (t·sd)²: the likelihood-ratio interval with Student's t in place of the normal's.
        return self.squares + (self._quantile * self.sd) ** 2 + 1e-12 * self.squares - self._projection[2]

    def alpha(self) -> Interval:
        """Interval of alpha; an end at the edge of the grid is None."""
        if self.sd is None:
            return Interval(self.curve.alpha, None, None, self.level)
        inside = self.alphas[self._room >= 0]
        low = float(inside[0]) if inside[0] > ALPHAS[0] * 1.001 else None
        high = float(inside[-1]) if inside[-1] < ALPHAS[-1] * 0.999 else None
        return Interval(self.curve.alpha, low, high, self.level)

    def floor(self) -> Interval:  # of E
        return self._interval(self.curve.E, np.zeros(len(self.alphas)))

    def prediction(self, flops: float, seeds: int) -> Interval:
        """Interval of the mean loss of `seeds` new runs of this compute."""
        x = math.log(flops / self.curve.scale)
        return self._interval(self.curve.loss_at(flops), np.exp(-self.alphas * x), extra=1 / seeds)

    def check(self, flops: float, seeds: int) -> records.PredictionCheck:
        """The same as a record to which the observed loss can be added."""
        return records.PredictionCheck(flops, self.prediction(flops, seeds), seeds)

    def _interval(self, value: float, v: Array, extra: float = 0.0) -> Interval:
        """Interval of E + v·A, where v has a value for each alpha; `extra` new noise in units of sd².

        For each alpha in the interval, E and A may move until the sum of squares reaches the limit. That sum grows by
        (E + v·A − best)² / variance, so the ends are known in closed form. The interval spans the ends over all alphas.
        """
        if self.sd is None:
            return Interval(value, None, None, self.level)
        E, A, _ = self._projection
        total, first, second = self._moments
        free = (second - 2 * v * first + v**2 * total) / (total * second - first**2)
        # Where E is held at 0, A alone is free.
        variance = np.where((E > 0) | (v == 0), free, v**2 / second)
        half = np.sqrt(np.maximum(self._room, 0.0) * variance)
        best, inside = E + v * A, self._room >= 0
        low, high = float((best - half)[inside].min()), float((best + half)[inside].max())
        # Noise of the new runs is independent of the curve's error, so the two add in squares.
        noise = self._quantile * self.sd * math.sqrt(extra)
        low = value - math.hypot(value - low, noise)
        high = value + math.hypot(high - value, noise)
        return Interval(value, max(low, 0.0), high, self.level)


# Predictions


def predict(results: Iterable[RunResult], flops: float, seeds: int = 1, level: float = 0.05) -> records.PredictionCheck:
    """Predict the mean loss of `seeds` baseline runs of this compute from the baseline's runs in `results`.

    The interval contains the curve's uncertainty and the noise of the seeds. It assumes that the form holds there.
    Raises FitError with fewer than three rungs.
    """
    return Profile.from_rungs(Rungs.from_results(results), level).check(flops, seeds)


def check(prediction: records.PredictionCheck, losses: Sequence[float]) -> records.PredictionCheck:
    """Return the prediction with the observed mean added. Raises ValueError unless there are `seeds` losses."""
    if len(losses) != prediction.seeds:
        raise ValueError(f"{len(losses)} losses for a prediction of the mean of {prediction.seeds}")
    observed = math.fsum(losses) / len(losses)
    value, low, high = prediction.predicted.value, prediction.predicted.low, prediction.predicted.high
    if value is None or not math.isfinite(observed):
        return prediction
    inside = None if low is None or high is None else low <= observed <= high
    error = observed - value
    return replace(prediction, observed=observed, error=error, relative_error=error / value, inside=inside)


def bootstrap(results: Iterable[RunResult], level: float = 0.05, draws: int = 400, seed: int = 0) -> records.Bootstrap:
    """Return percentiles of E and alpha over ladders resampled by rungs, and within rungs by seeds.

    Resampling rungs shows what depends on a single rung. With few rungs, many draws have fewer than three different
    ones and are refused. Verdicts use the profile's intervals, whose coverage is measured, not these.
    """
    rungs = Rungs.from_results(results)
    random = np.random.Generator(np.random.Philox(seed))
    means, weights = [], []
    for _ in range(draws):
        chosen, counts = np.unique(random.integers(len(rungs.names), size=len(rungs.names)), return_counts=True)
        if len(chosen) < FEWEST_RUNGS:
            continue
        # A rung that was not drawn has no weight.
        means.append(rungs.loss.copy())
        weights.append(np.zeros(len(rungs.names)))
        means[-1][chosen] = [random.choice(rungs.losses[k], len(rungs.losses[k])).mean() for k in chosen]
        weights[-1][chosen] = rungs.seeds[chosen] * counts
    E = alpha = Interval(None, None, None, level)
    curves = np.zeros((0, 2))
    if means:
        found_E, A, found_alpha, _ = solve(rungs.x, np.array(means), np.array(weights))
        curves = np.stack([found_E, found_alpha], -1)[A > 0]
    if len(curves):
        found = np.quantile(curves, [0.5, level / 2, 1 - level / 2], axis=0)
        E, alpha = (Interval(middle, low, high, level) for middle, low, high in found.T.tolist())
    return records.Bootstrap(E, alpha, draws, draws - len(curves))
