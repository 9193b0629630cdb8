"""Trust in a fitted surface L(N, D): intervals, influence, and whether its form holds.

A surface is L = E + Σ_k c_k·exp(−a_j(k)·v_k) with logarithms v_k of N and D (forms.py). For fixed exponents it is
linear in (E, c), so intervals come from the profile of the weighted sum of squares over a grid of exponents, as those
of a curve do (fit.py). Weights are those of the sum of Huber losses on log L at its minimum: errors are relative, and a
run that is far off counts less.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import special

from trainer.errors import FitError
from trainer.ladder.stats import forms, significance
from trainer.ladder.stats.records import Interval

Array = np.ndarray
WIDENED = 6  # times that a grid which cuts the interval is doubled
REACH, STEPS = 6.0, 61  # the grid spans so many standard errors of each exponent on either side
FORM_FAILS = 0.01
"""A smaller p of the test for bends that the form does not have is told."""


@dataclass(frozen=True)
class HuberErrors:
    """Errors of a fit by Huber losses on log L, as its residuals tell them."""

    residuals: Array  # log of loss minus log of the fit
    loss: Array
    freedom: int

    @cached_property
    def weights(self) -> Array:
        """Weights of squares in nats that have their minimum where the sum of Huber losses on log L has its own."""
        size = np.maximum(np.abs(self.residuals), 1e-12)
        return np.minimum(1.0, forms.DELTA / size) / self.loss**2

    @cached_property
    def sd(self) -> float | None:
        """Relative standard deviation of a run about the fit; None without a degree of freedom."""
        if self.freedom < 1:
            return None
        # From the median, which no outlying run moves; as many residuals as parameters are near 0 whatever the noise.
        left = np.sort(np.abs(self.residuals))[len(self.loss) - self.freedom :]
        return float(np.median(left)) / float(special.ndtri(0.75)) or None

    @cached_property
    def scatter(self) -> float:
        """Variance that takes the place of sd² in errors of the estimates.

        Huber's estimator with a small delta is nearly one of least absolute errors: less precise than least squares
        where errors are normal, by up to π/2 in variance (Huber 1964).
        """
        assert self.sd is not None
        k = forms.DELTA / self.sd
        inside, density = 2 * special.ndtr(k) - 1, math.exp(-(k**2) / 2) / math.sqrt(2 * math.pi)
        return self.sd**2 * float(inside - 2 * k * density + k**2 * (1 - inside)) / float(inside) ** 2

    def room(self, level: float) -> float:
        """Growth of the weighted sum of squares that an interval of this level allows."""
        quantile = significance.student_quantile(level / 2, self.freedom)
        return quantile**2 * self.scatter * float((self.weights * self.loss**2).mean())


@dataclass(frozen=True)
class Surface:
    """A fitted form with its runs."""

    variables: Sequence[Array]  # of each power law: the logarithm of its variable, for each run
    exponent_of: Sequence[int]  # number of each power law's exponent
    loss: Array
    exponents: tuple[float, ...]  # positive: loss falls
    coefficients: tuple[float, ...]  # E, then one of each power law
    level: float = 0.05
    shift: float = 0.0  # of the logarithm of tokens

    @cached_property
    def fitted(self) -> Array:
        return self.at(self.variables)

    def at(self, variables: Sequence[Array]) -> Array:
        """Loss by the fitted surface."""
        powers = [
            c * np.exp(-self.exponents[j] * np.asarray(v))
            for v, j, c in zip(variables, self.exponent_of, self.coefficients[1:], strict=True)
        ]
        return self.coefficients[0] + np.sum(powers, axis=0)

    def loss_at(self, parameters: float, tokens: float) -> Array:
        """The same at N and D, in an array of one."""
        return self.at([np.array([math.log(parameters)]), np.array([math.log(tokens) + self.shift])])

    @cached_property
    def residuals(self) -> Array:
        """log of loss minus log of the fit."""
        return np.log(self.loss / self.fitted)

    @property
    def degrees_of_freedom(self) -> int:
        return len(self.loss) - len(self.coefficients) - len(self.exponents)

    @cached_property
    def _errors(self) -> "HuberErrors":
        return HuberErrors(self.residuals, self.loss, self.degrees_of_freedom)

    @property
    def _weights(self) -> Array:
        return self._errors.weights

    @property
    def sd(self) -> float | None:
        """Relative standard deviation of a run about the surface; None without a degree of freedom."""
        return self._errors.sd

    @property
    def _scatter(self) -> float:
        return self._errors.scatter

    def _columns(self, exponents: Array, variables: Sequence[Array]) -> Array:
        """Columns of (E, c) in units of the fitted c, for each row of `exponents`; shape (rows, runs, columns)."""
        columns = [np.ones((len(exponents), len(np.atleast_1d(variables[0]))))]
        for v, middle, j in zip(variables, self.variables, self.exponent_of, strict=True):
            columns.append(np.exp(-exponents[:, j, None] * (np.atleast_1d(v) - middle.mean())))
        return np.stack(columns, axis=-1)

    @cached_property
    def _profile(self) -> tuple[Array, Array, Array, Array]:
        """(exponents, coefficients, inverse normal matrix, room) of each point of the grid in the interval."""
        assert self.sd is not None
        errors = np.sqrt(self._scatter * np.diag(np.linalg.pinv(self._jacobian.T @ self._jacobian)))
        ends = [REACH * error for error in errors[len(self.coefficients) :]]
        return self._within(ends, WIDENED)

    def _within(self, ends: Sequence[float], widen: int) -> tuple[Array, Array, Array, Array]:
        """`_allowed` on a grid that reaches `ends` beyond the exponents; doubled up to `widen` times if it cuts."""
        grids = [
            np.linspace(max(value - end, value / 10), value + end, STEPS)
            for value, end in zip(self.exponents, ends, strict=True)
        ]
        found = self._allowed(np.array([*itertools.product(*grids), self.exponents]))
        cut = [bool((found[0][:, j] == grid[-1]).any()) for j, grid in enumerate(grids)]
        if not widen or not any(cut):
            return found
        return self._within([2 * end if far else end for end, far in zip(ends, cut, strict=True)], widen - 1)

    def _allowed(self, exponents: Array) -> tuple[Array, Array, Array, Array]:
        """(exponents, coefficients, inverse normal matrix, room) of those points that are in the interval."""
        assert self.sd is not None
        columns = self._columns(exponents, self.variables)
        weighted = columns * self._weights[:, None]
        normal = np.swapaxes(weighted, -1, -2) @ columns
        inverse = np.linalg.pinv(normal, hermitian=True)
        coefficients = (inverse @ (np.swapaxes(weighted, -1, -2) @ self.loss)[..., None])[..., 0]
        rest = self.loss - (columns @ coefficients[..., None])[..., 0]
        squares = (self._weights * rest**2).sum(-1)
        room = squares.min() + self._errors.room(self.level) - squares
        allowed = (room >= 0) & (coefficients >= 0).all(-1)
        if not allowed.any():
            raise FitError("no surface of this form is near the runs.\n  Leave out runs that do not belong to it.")
        return exponents[allowed], coefficients[allowed], inverse[allowed], room[allowed]

    def exponent(self, number: int) -> Interval:
        """Interval of an exponent; the lower end is None where the data give none."""
        value = self.exponents[number]
        if self.sd is None:
            return Interval(value, None, None, self.level)
        found = self._profile[0][:, number]
        low = float(found.min())
        # At the grid's lower end the data do not bound it.
        return Interval(value, low if low > value / 9.9 else None, float(found.max()), self.level)

    def floor(self) -> Interval:
        """Interval of E."""
        return self._interval(self.coefficients[0], np.eye(len(self.coefficients))[:1], 0.0)

    def predict(self, variables: Sequence[float], runs: int = 0) -> Interval:
        """Interval of the surface at one point; with `runs`, of the mean loss of so many new runs there."""
        point = [np.array([v]) for v in variables]
        value = float(self.at(point)[0])
        noise = value * (self.sd or 0.0) / math.sqrt(runs) if runs else 0.0
        return self._interval(value, None, noise, point)

    def _interval(self, value: float, rows: Array | None, noise: float, point: Sequence[Array] = ()) -> Interval:
        if self.sd is None:
            return Interval(value, None, None, self.level)
        exponents, coefficients, inverse, room = self._profile
        v = self._columns(exponents, point)[:, 0] if rows is None else np.broadcast_to(rows, coefficients.shape)
        best = (v * coefficients).sum(-1)
        half = np.sqrt(room * np.einsum("ka,kab,kb->k", v, inverse, v))
        low, high = float((best - half).min()), float((best + half).max())
        noise *= significance.student_quantile(self.level / 2, self.degrees_of_freedom)
        low, high = value - math.hypot(min(low - value, 0.0), noise), value + math.hypot(max(high - value, 0.0), noise)
        return Interval(value, max(low, 0.0), high, self.level)

    @cached_property
    def _jacobian(self) -> Array:
        """d log L / d (log c, exponents) at each run, shape (runs, parameters)."""
        return self._slopes(self.variables)

    def _slopes(self, variables: Sequence[Array]) -> Array:
        total = self.at(variables)
        columns = [np.full_like(total, self.coefficients[0])]
        by_exponent = [np.zeros_like(total) for _ in self.exponents]
        for v, j, c in zip(variables, self.exponent_of, self.coefficients[1:], strict=True):
            term = c * np.exp(-self.exponents[j] * v)
            columns.append(term)
            by_exponent[j] = by_exponent[j] - v * term
        return np.stack([*columns, *by_exponent], axis=-1) / total[:, None]

    def influence(self, variables: Sequence[float]) -> Array:
        """Relative change of the loss at a point if each run were left out (linear approximation)."""
        weights = self._weights * self.loss**2
        root = np.sqrt(weights)[:, None]
        inverse = np.linalg.pinv(root * self._jacobian)
        leverage = np.clip((root * self._jacobian * inverse.T).sum(-1), 0.0, 0.999)
        there = self._slopes([np.array([v]) for v in variables])[0]
        return -(there @ inverse) * root[:, 0] * self.residuals / (1 - leverage)

    def influence_of_losses(self) -> Array:
        """d(log c, exponents) / d(loss of each run), as large as Huber's estimator makes their errors."""
        loss_of_precision = math.sqrt(self._scatter) / self.sd if self.sd else 1.0
        return np.linalg.pinv(self._jacobian) * loss_of_precision / self.loss

    def extremes(self) -> list["Surface"]:
        """Surfaces with the least and the greatest of each exponent in the interval."""
        if self.sd is None:
            return [self]
        exponents, coefficients, *_ = self._profile
        middles = np.array([v.mean() for v in self.variables])
        found = []
        for k in sorted({int(end) for column in exponents.T for end in (column.argmin(), column.argmax())}):
            powers = coefficients[k, 1:] * np.exp(exponents[k][list(self.exponent_of)] * middles)
            values = (float(coefficients[k, 0]), *map(float, powers))
            found.append(replace(self, exponents=tuple(map(float, exponents[k])), coefficients=values))
        return found

    def bend_p(self) -> float | None:
        """p of the F test for a bend in ln N and ln D that the form does not have; None with too few runs."""
        bends = [a * b for a, b in itertools.combinations_with_replacement([v - v.mean() for v in self.variables], 2)]
        root = np.sqrt(self._weights) * self.loss
        design, rest = root[:, None] * self._jacobian, root * self.residuals
        wider = np.concatenate([design, root[:, None] * np.stack(bends, -1)], -1)
        spent, free = (int(np.linalg.matrix_rank(each)) for each in (design, wider))
        if len(self.loss) - free < 1 or free == spent:
            return None
        left, less = (float(((rest - each @ (np.linalg.pinv(each) @ rest)) ** 2).sum()) for each in (design, wider))
        return significance.lack_of_fit_p(left - less, free - spent, less, len(self.loss) - free)


def hoffmann(parameters: Array, tokens: Array, loss: Array, level: float = 0.05) -> Surface:
    """Fit E + A / N^alpha + B / D^beta by the sum of Huber losses on log L. Raises FitError."""
    law = forms.fit_surface(parameters, tokens, loss)
    return Surface(
        [np.log(parameters), np.log(tokens)], [0, 1], loss, (law.alpha, law.beta), (law.E, law.A, law.B), level
    )  # fmt: skip


def gadre(parameters: Array, tokens: Array, loss: Array, level: float = 0.05) -> Surface:
    """Fit E + a·N^eta + b·6^(eta/2)·D^eta by the sum of Huber losses on log L. Raises FitError."""
    law = forms.fit_overtrained(parameters, tokens / parameters, loss)
    variables = [np.log(parameters), np.log(tokens) + math.log(6) / 2]
    return Surface(variables, [0, 0], loss, (-law.eta,), (law.E, law.a, law.b), level, math.log(6) / 2)
