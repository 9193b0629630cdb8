"""Laws whose terms are searched by the sum of Huber losses on log L, and intervals of their parameters by profile.

The sum has kinks as wide as forms.DELTA. Where runs are far off a law there are many local minima, and a search ends in
the one nearest to its start. So it begins at several, and again wherever a profile comes upon a lower sum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import optimize, special

from trainer.ladder.stats import forms, significance
from trainer.ladder.stats.surfaces import HuberErrors

Array = np.ndarray
FIRST_STEP = 0.05
"""A profile's first step, in a logarithm; each step is twice the one before."""
BISECTIONS = 10
OPTIONS: dict[str, Any] = {"maxiter": 1000, "ftol": 1e-12}
BETTER = 1e-6
"""A profile's sum that is smaller than the minimum by more than this part of it shows a better minimum."""


@dataclass(frozen=True)
class HuberLaw:
    """log L = log Σ exp(terms), with parameters that are logarithms; those whose bounds are equal are held."""

    terms: Callable[[Array], tuple[Array, Array]]
    """Parameters p to (terms, their gradient): shapes (terms, runs) and (terms, runs, p)."""
    loss: Array
    bounds: Sequence[tuple[float, float]]

    @cached_property
    def searched(self) -> int:
        """Number of parameters that are not held."""
        return sum(low < high for low, high in self.bounds)

    def objective(self, p: Array) -> tuple[float, Array]:
        """(Sum of Huber losses / δ², its gradient)."""
        return forms.huber_sum(*self.terms(p), np.log(self.loss))

    def residuals(self, p: Array) -> Array:
        """log of loss minus log of the law."""
        return np.log(self.loss) - special.logsumexp(self.terms(p)[0], axis=0)

    def descend(self, start: Array, held: tuple[int, float] | None = None, times: int = 3) -> tuple[Array, float]:
        """(Parameters, sum) of the local minimum near `start`; `held` is the place and value of one that stays."""
        bounds, least = list(self.bounds), math.inf
        if held is not None:
            bounds[held[0]] = (held[1], held[1])
        # In flat valleys L-BFGS stops early. Each restart begins with a fresh approximation of the Hessian.
        for _ in range(times):
            found = optimize.minimize(  # which moves a start into the bounds
                self.objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=OPTIONS
            )
            start, least = found.x, float(found.fun)
        return start, least

    def minimise(self, starts: Sequence[Array]) -> tuple[Array, float]:
        """The best of the local minima near the starts."""
        return min((self.descend(start) for start in starts), key=lambda one: one[1])

    def fit(self, starts: Sequence[Array], profiled: Sequence[int], level: float) -> "HuberFit":
        """Minimise, and profile the parameters at these places, until no profile finds a lower sum."""
        best, least = self.minimise(starts)
        freedom = len(self.loss) - self.searched
        for _ in range(len(self.bounds)):
            errors = HuberErrors(self.residuals(best), self.loss, freedom)
            room, fit = _room(errors, level), HuberFit(self, best, least, errors.sd, {}, [best])
            found = (fit.profile(place, room) for place in profiled) if room is not None else ()
            lower = next((one for one in found if one is not None), None)
            if lower is None:
                return fit
            best, least = self.descend(lower)
        sd = HuberErrors(self.residuals(best), self.loss, freedom).sd
        return HuberFit(self, best, least, sd, {}, [best])  # each round found a lower sum: no interval is known


def _room(errors: HuberErrors, level: float) -> float | None:
    """Growth of the sum of Huber losses / δ² that an interval allows; None where the noise is unknown.

    The likelihood-ratio test of an M-estimator: t²/2 · E[ψ²] / E[ψ'] (Ronchetti 1982), errors being normal.
    """
    if errors.sd is None:
        return None
    inside = 2 * float(special.ndtr(forms.DELTA / errors.sd)) - 1
    quantile = significance.student_quantile(level / 2, errors.freedom)
    return quantile**2 / 2 * errors.scatter * inside / forms.DELTA**2


@dataclass(frozen=True)
class HuberFit:
    """A law at its minimum."""

    law: HuberLaw
    best: Array
    least: float
    """Sum of Huber losses / δ²."""
    sd: float | None
    """Relative standard deviation of a run about the law; None without a degree of freedom."""
    ends: dict[int, tuple[float | None, float | None]]
    """Ends of the interval of each profiled parameter, as logarithms; None where its bound is inside."""
    inside: list[Array]
    """Parameters that the profiles found within the room."""

    def profile(self, place: int, room: float) -> Array | None:
        """Find the interval of one parameter; return parameters of a lower minimum if there is one."""
        found = []
        for limit in self.law.bounds[place]:
            end, lower = self._side(place, limit, room)
            if lower is not None:
                return lower
            found.append(end)
        self.ends[place] = (found[0], found[1])
        return None

    def interval(self, place: int) -> tuple[float | None, float | None]:
        """Ends of a parameter's interval; None where the data give none, or it was not profiled."""
        low, high = self.ends.get(place, (None, None))
        return None if low is None else math.exp(low), None if high is None else math.exp(high)

    def _side(self, place: int, limit: float, room: float) -> tuple[float | None, Array | None]:
        # Each point starts from the one before, which is near.
        rest, inside = self.best, float(self.best[place])
        step = math.copysign(FIRST_STEP, limit - inside)
        while abs(inside - limit) > 1e-9:
            value = inside + step
            if (value - limit) * step > 0:
                value = limit
            found, squares = self.law.descend(rest, (place, value), times=2)
            if squares < self.least * (1 - BETTER) - BETTER:
                return None, found
            if squares > self.least + room:
                for _ in range(BISECTIONS):  # the profile is known to some digits only, so no root finder
                    middle = (inside + value) / 2
                    kept, squares = self.law.descend(rest, (place, middle), times=2)
                    if squares <= self.least + room:
                        inside, rest = middle, kept
                        self.inside.append(kept)
                    else:
                        value = middle
                return (inside + value) / 2, None
            rest, inside, step = found, value, 2 * step
            self.inside.append(found)
        return None, None


def starting_points(
    columns: Callable[[Sequence[float]], Array], loss: Array, grid: Sequence[Sequence[float]], count: int
) -> list[list[float]]:
    """Logarithms of (coefficients, then the parameters) of the best points of a grid, by least squares.

    `columns` gives what each coefficient multiplies at a point, shape (runs, coefficients).
    """
    found = []
    for point in grid:
        design = columns(point)
        units = np.median(design, axis=0)
        coefficients, squares = forms.linear(design / units / loss[:, None], np.ones_like(loss))
        scaled = np.maximum(coefficients, 1e-3 * float(loss.min())) / units
        found.append((squares, [*np.log(scaled), *(math.log(value) for value in point)]))
    return [start for _, start in sorted(found, key=lambda one: one[0])[:count]]
