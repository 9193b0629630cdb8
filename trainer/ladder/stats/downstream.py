"""A metric that is no loss (the accuracy of a task, its bits per byte), predicted through the loss.

Tasks are too noisy to be extrapolated by themselves, so the loss is extrapolated and the metric follows it by a link
that all runs share: a line, or for a share of right answers low + (high − low) / (1 + exp(k·(loss − middle))) (Gadre et
al. 2024, Bhagia et al. 2024). For fixed (k, middle) a link is linear in the rest, so intervals come from the profile of
the sum of squares over a grid, as those of curves and surfaces do. They contain the error of the link, that of the
loss, and how far whole arms lie off the link.

`ranking` is what simple practice would say: whoever is better at the largest size that was run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import optimize, special

from trainer.errors import FitError
from trainer.ladder.stats import significance
from trainer.ladder.stats.records import BASELINE, Interval, RunResult

Array = np.ndarray
STEEPNESS = np.array([0.3, 60.0])  # least and greatest k, in units of one over the range of losses
MIDDLES = np.array([-3.0, 2.0])  # least and greatest middle, in units of that range, from the lowest loss on
STEPS = 41  # of the grid in each direction
FEWEST = {"line": 3, "sigmoid": 6}
"""Runs of different loss that a link needs: its parameters, and a few more."""


@dataclass(frozen=True)
class Link:
    """The metric as a function of the loss, fitted to all runs."""

    loss: Array
    metric: Array
    arms: Sequence[str]  # of each run
    most: float | None  # 1 or 100 for a share of right answers, and then the link is a sigmoid; None: it is a line
    level: float = 0.05

    def __post_init__(self) -> None:
        if len(np.unique(self.loss)) < (fewest := FEWEST[self.form]):
            raise FitError(
                f"a link by a {self.form} needs {fewest} runs of different loss with the metric, and there are "
                f"{len(np.unique(self.loss))}.\n  Measure the metric of more runs."
            )

    @property
    def form(self) -> str:
        return "line" if self.most is None else "sigmoid"

    @property
    def degrees_of_freedom(self) -> int:
        return len(self.loss) - (2 if self.most is None else 4)

    def _columns(self, loss: Array, shape: tuple[Array, Array] | None = None) -> Array:
        """Columns of the two coefficients for each (k, middle) of `shape`, shape (points, losses, 2)."""
        if self.most is None:
            return np.stack([np.ones_like(loss), loss - self.loss.mean()], -1)[None]
        k, middle = self._fits[0] if shape is None else shape
        share = special.expit(-k[:, None] * (loss - middle[:, None]))
        # The coefficients are the metric at a loss far above the middle, and far below.
        return np.stack([1 - share, share], -1)

    def _solve(self, k: Array, middle: Array) -> tuple[tuple[Array, Array], Array, Array, Array]:
        """((k, middle), coefficients, inverse normal matrix, sum of squares) of each shape of the link."""
        columns = self._columns(self.loss, (k, middle))
        turned = np.swapaxes(columns, -1, -2)
        inverse = np.linalg.pinv(turned @ columns, hermitian=True)
        found = (inverse @ (turned @ self.metric)[..., None])[..., 0]
        if self.most is not None:
            # A share lies between none and all: a coefficient beyond is held there.
            held = np.clip(found, 0.0, self.most)
            for one, other in ((0, 1), (1, 0)):
                out = held[:, one] != found[:, one]
                rest = self.metric - columns[..., one] * held[:, one, None]
                size = np.maximum((columns[..., other] ** 2).sum(-1), 1e-300)
                free = np.clip((columns[..., other] * rest).sum(-1) / size, 0.0, self.most)
                held[:, other] = np.where(out, free, held[:, other])
            found = held
        squares = ((self.metric - (columns @ found[..., None])[..., 0]) ** 2).sum(-1)
        return (k, middle), found, inverse, squares

    @cached_property
    def _fits(self) -> tuple[tuple[Array, Array], Array, Array, Array]:
        """`_solve` of the shapes that the data allow, and of others near them."""
        if self.most is None:
            return self._solve(np.ones(1), np.zeros(1))
        span = float(np.ptp(self.loss))
        ends = [*np.log(STEEPNESS / span), *(self.loss.min() + MIDDLES * span)]
        found = self._solve(*_grid(ends))
        # Around the shapes that are left, finer and finer; last comes the best.
        for margin in (6.0, 4.0, 3.0, 2.5):
            (k, middle), _, _, squares = found
            inside = squares <= squares.min() * (1 + margin**2 * self._room / max(self.degrees_of_freedom, 1))
            ends = [*_wider(np.log(k), inside), *_wider(middle, inside)]
            found = self._solve(*_grid(ends))
        (k, middle), *rest = found
        first = np.array([math.log(k[rest[-1].argmin()]), middle[rest[-1].argmin()]])
        best = optimize.minimize(lambda at: float(self._solve(*_shape(at))[3][0]), first, method="Nelder-Mead").x
        (best_k, best_middle), *others = self._solve(*_shape(best))
        coefficients, inverse, squares = (np.concatenate(pair) for pair in zip(rest, others, strict=True))
        return (np.append(k, best_k), np.append(middle, best_middle)), coefficients, inverse, squares

    @property
    def _room(self) -> float:
        """Growth of the sum of squares that is allowed, in units of sd²."""
        return float(significance.student_quantile(self.level / 2, self.degrees_of_freedom)) ** 2

    @cached_property
    def _best(self) -> int:
        return int(self._fits[3].argmin())

    @cached_property
    def residuals(self) -> Array:
        return self.metric - self._columns(self.loss)[self._best] @ self._fits[1][self._best]

    @cached_property
    def sd(self) -> float:
        """Standard deviation of a run about the link."""
        return math.sqrt(float(self._fits[3][self._best]) / max(self.degrees_of_freedom, 1))

    @cached_property
    def _between(self) -> tuple[float, float, float]:
        """(sd of whole arms about the link, mean square of arms, that of runs within them)."""
        groups = [self.residuals[np.array([arm == name for arm in self.arms])] for name in dict.fromkeys(self.arms)]
        free = len(self.loss) - len(groups)
        if len(groups) < 2 or free < 1:
            return 0.0, 0.0, 0.0
        between = sum(len(group) * float(group.mean()) ** 2 for group in groups) / (len(groups) - 1)
        within = sum(float(((group - group.mean()) ** 2).sum()) for group in groups) / free
        size = len(self.loss) / len(groups)
        return math.sqrt(max(between - within, 0.0) / size), between, within

    @property
    def arms_sd(self) -> float:
        """Standard deviation of whole arms about the link, beyond that of their runs."""
        return self._between[0]

    @property
    def arms_differ_p(self) -> float | None:
        """p of the F test for arms that lie off the link; None with one arm."""
        _, between, within = self._between
        arms = len(dict.fromkeys(self.arms))
        free = len(self.loss) - arms
        return significance.lack_of_fit_p(between * (arms - 1), arms - 1, within * free, free)

    def at(self, loss: float) -> float:
        """The metric by the link."""
        return float(self._columns(np.array([loss]))[self._best, 0] @ self._fits[1][self._best])

    def predict(self, loss: Interval) -> Interval:
        """The metric of an arm whose loss is known by an interval; a mean of many runs."""
        if loss.value is None:
            return Interval(None, None, None, self.level)
        return self._interval([(+1, loss)], self.arms_sd)

    def difference(self, arm: Interval, base: float) -> Interval:
        """The same minus the metric at a certain loss: both may lie off the link."""
        if arm.value is None:
            return Interval(None, None, None, self.level)
        return self._interval([(+1, arm), (-1, Interval(base, base, base))], math.sqrt(2) * self.arms_sd)

    def _interval(self, terms: Sequence[tuple[int, Interval]], arms_sd: float) -> Interval:
        """Interval of a sum of values of the link, with a sign each."""
        values = [(sign, float(loss.value)) for sign, loss in terms]  # pyright: ignore[reportArgumentType]
        value = sum(sign * self.at(loss) for sign, loss in values)
        if self.sd == 0 or self.degrees_of_freedom < 1 or any(None in (loss.low, loss.high) for _, loss in terms):
            return Interval(value, None, None, self.level)
        _, found, inverse, squares = self._fits
        room = squares[self._best] + self._room * self.sd**2 - squares
        inside = room >= 0
        rows = np.sum([sign * self._columns(np.array([loss]))[:, 0] for sign, loss in values], axis=0)[inside]
        best = (rows * found[inside]).sum(-1)
        half = np.sqrt(room[inside] * np.einsum("ka,kab,kb->k", rows, inverse[inside], rows))
        link = float(value - (best - half).min()), float((best + half).max() - value)
        # The loss's error, by the link at the ends of its interval.
        moved = [
            sign * (self.at(float(end)) - self.at(float(loss.value)))  # pyright: ignore[reportArgumentType]
            for sign, loss in terms
            for end in (loss.low, loss.high)
        ]
        down, up = max(0.0, -min(moved)), max(0.0, *moved)
        low, high = (
            math.hypot(max(one, 0.0), other, math.sqrt(self._room) * arms_sd)
            for one, other in zip(link, (down, up), strict=True)
        )
        ends = (-math.inf, math.inf) if self.most is None else (0.0, self.most) if len(terms) == 1 else (
            -self.most, self.most
        )  # fmt: skip
        return Interval(value, max(value - low, ends[0]), min(value + high, ends[1]), self.level)


def _grid(ends: Sequence[float]) -> tuple[Array, Array]:
    """(k, middle) of a grid between these ends: of log k, then of the middle."""
    k, middle = np.meshgrid(np.linspace(ends[0], ends[1], STEPS), np.linspace(ends[2], ends[3], STEPS), indexing="ij")
    return np.exp(k.ravel()), middle.ravel()


def _shape(point: Array) -> tuple[Array, Array]:
    """The same for one point."""
    return np.exp(point[:1]), point[1:]


def _wider(values: Array, inside: Array) -> tuple[float, float]:
    """Ends of the values that are inside, with a step of the grid more, within it."""
    step, chosen = float(np.ptp(values)) / (STEPS - 1), values[inside]
    return max(float(chosen.min()) - step, float(values.min())), min(float(chosen.max()) + step, float(values.max()))


def ranking(results: Sequence[RunResult], metric: Mapping[tuple[str, str, int], float] | None = None) -> list[dict]:
    """Return the arms by their mean at the largest rung that all of them have, the best first; the baseline too.

    `metric` has a value where more is better for runs by (arm, rung, seed); without it the loss ranks.
    """
    values: dict[str, dict[str, list[float]]] = {}
    flops: dict[str, float] = {}
    for run in results:
        value = run.loss if metric is None else metric.get((run.arm, run.rung, run.seed), math.nan)
        if math.isfinite(value) and math.isfinite(run.loss):
            values.setdefault(run.rung, {}).setdefault(run.arm, []).append(value)
            if run.arm == BASELINE:
                flops[run.rung] = run.flops
    arms = {run.arm for run in results}
    whole = [rung for rung, found in values.items() if arms <= found.keys()]
    if len(arms) < 2 or BASELINE not in arms or not whole:
        return []
    rung = max(whole, key=flops.__getitem__)
    means = {arm: math.fsum(found) / len(found) for arm, found in values[rung].items()}
    ordered = sorted(means, key=lambda arm: means[arm] * (1 if metric is None else -1))
    place = ordered.index(BASELINE)
    return [
        {"arm": arm, "rung": rung, "value": means[arm],
         "says": None if arm == BASELINE else "promote" if number < place else "reject"}
        for number, arm in enumerate(ordered)
    ]  # fmt: skip
