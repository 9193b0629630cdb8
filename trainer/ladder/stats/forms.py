"""Forms of the scaling law, each fitted by two estimators: Huber losses on log L, and variable projection.

All forms are L = E + Σ_k c_k · exp(−a_j(k) · v_k): power laws of variables with the logarithms v_k, where several terms
may share an exponent a_j. The logarithm of every term is linear in the parameters (log E, log c_k, a_j), so one Huber
fit in log-sum-exp form serves all of them. Variable projection is better conditioned: for fixed exponents, non-negative
least squares gives the coefficients, and only the exponents are searched.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import numpy as np
from scipy import optimize, special

from trainer.errors import FitError
from trainer.ladder.stats.records import Curve, OverTrained, SurfaceND

Array = np.ndarray
Method = Literal["varpro", "huber"]
DELTA = 1e-3  # as Hoffmann et al. 2022: errors of log L beyond it count linearly


def huber_curve(flops: Array, loss: Array) -> Curve:
    """Fit E + A·(C / scale)^−alpha by the sum of Huber losses on log L."""
    scale = float(np.exp(np.mean(np.log(flops))))
    lowest, mean = float(loss.min()), float(loss.mean())
    starts = [
        [math.log(share * lowest), math.log(max(mean - share * lowest, 1e-3)), alpha]
        for share, alpha in itertools.product((0.05, 0.3, 0.6, 0.9), (0.05, 0.15, 0.35, 0.8))
    ]
    log_E, log_A, alpha = huber(_terms([np.log(flops / scale)], [0]), loss, starts)
    return Curve(math.exp(log_E), math.exp(log_A), alpha, scale)


def fit_surface(parameters: Array, tokens: Array, loss: Array, method: Method = "huber") -> SurfaceND:
    """Fit E + A / N^alpha + B / D^beta. Raises FitError with fewer than five runs, or if N and D rise together."""
    n, d = np.log(parameters), np.log(tokens)
    if len(loss) >= 5 and np.linalg.matrix_rank(np.stack([np.ones_like(n), n, d])) < 3:
        raise FitError(
            "N and D rise together along these runs, so their effects cannot be separated.\n"
            "  Vary the tokens per parameter, or fit loss against compute."
        )
    grid = np.geomspace(0.05, 1.5, 18)
    starts = [
        [math.log(share * loss.min()), a * n.mean() - 0.5, b * d.mean() - 0.5, a, b]
        for a, b, share in itertools.product((0.15, 0.3, 0.6), (0.15, 0.3, 0.6), (0.3, 0.7))
    ]
    (alpha, beta), (E, A, B) = _fit([n, d], [0, 1], loss, method, itertools.product(grid, grid), starts)
    return SurfaceND(E, A, alpha, B, beta)


def fit_overtrained(
    parameters: Array, tokens_per_parameter: Array, loss: Array, method: Method = "huber"
) -> OverTrained:
    """Fit E + a·N^eta + b·6^(eta/2)·(M·N)^eta of Gadre et al. 2024. Raises FitError with fewer than four runs."""
    n, d = np.log(parameters), np.log(tokens_per_parameter * parameters) + math.log(6) / 2
    starts = [
        [math.log(share * loss.min()), value * n.mean(), value * d.mean(), value]
        for share, value in itertools.product((0.2, 0.5, 0.8), (0.1, 0.2, 0.3, 0.5, 0.8))
    ]
    grid = ((value,) for value in np.geomspace(0.02, 1.5, 60))
    (exponent,), (E, a, b) = _fit([n, d], [0, 0], loss, method, grid, starts)
    return OverTrained(E, a, b, -exponent)


def _fit(
    variables: Sequence[Array], exponent_of: Sequence[int], loss: Array, method: Method,
    grid: Iterable[Sequence[float]], starts: list[list[float]],
) -> tuple[tuple[float, ...], tuple[float, ...]]:  # fmt: skip
    """Return (exponents, coefficients, E first); `grid` has exponents to start varpro from, `starts` Huber's."""
    # As many runs as parameters.
    if len(loss) < (fewest := 1 + len(variables) + len(set(exponent_of))):
        raise FitError(f"{len(loss)} runs are too few for this form.\n  It needs {fewest} or more.")

    # Variables in units of the first run, so that no column is tiny.
    def columns(exponents: Sequence[float]) -> Array:
        powers = [np.exp(-exponents[j] * (v - v[0])) for v, j in zip(variables, exponent_of, strict=True)]
        return np.stack([np.ones_like(loss), *powers], axis=1)

    exponents, (E, *scaled) = varpro(columns, loss, list(grid))
    units = [math.exp(exponents[j] * v[0]) for v, j in zip(variables, exponent_of, strict=True)]
    coefficients = (E, *(c * unit for c, unit in zip(scaled, units, strict=True)))
    if method == "varpro":
        return exponents, coefficients
    starts = [*starts, [*(math.log(max(c, 1e-6)) for c in coefficients), *exponents]]
    found = huber(_terms(variables, exponent_of), loss, starts)
    return found[len(coefficients) :], tuple(math.exp(value) for value in found[: len(coefficients)])


def _terms(variables: Sequence[Array], exponent_of: Sequence[int]) -> Array:
    """Rows that give the logarithm of a term, times (log E, log c_1, …, a_1, …); shape (terms, runs, parameters)."""
    terms = np.zeros((1 + len(variables), len(variables[0]), 1 + len(variables) + len(set(exponent_of))))
    for k, term in enumerate(terms):
        term[:, k] = 1.0
        if k:
            term[:, 1 + len(variables) + exponent_of[k - 1]] = -variables[k - 1]
    return terms


# Estimators


def huber(terms: Array, loss: Array, starts: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Return the parameters p that minimise Σ Huber(log Σ_t exp(terms[t] @ p) − log L), the best of many starts.

    `terms` has shape (terms, runs, parameters). The sum over runs, not the mean: with the mean, L-BFGS reaches its
    tolerance before the minimum (Besiroglu et al. 2024, arXiv:2404.10102).
    """
    target = np.log(loss)

    def objective(p: Array) -> tuple[float, Array]:
        return huber_sum(terms @ p, terms, target)

    solutions = [optimize.minimize(objective, start, jac=True, method="L-BFGS-B") for start in starts]
    best = min(solutions, key=lambda solution: solution.fun)
    # In flat valleys L-BFGS stops early. Each restart begins with a fresh approximation of the Hessian.
    for _ in range(5):
        best = optimize.minimize(
            objective, best.x, jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 1e-15}
        )
    return tuple(float(value) for value in best.x)


def huber_sum(values: Array, slopes: Array, target: Array) -> tuple[float, Array]:
    """(Sum of Huber losses / δ² of log Σ_t exp(values[t]) − target, its gradient); slopes are (terms, runs, p)."""
    # log-sum-exp and the softmax that is its gradient; scipy's take most of a fit's time.
    highest = values.max(0)
    share = np.exp(values - highest)
    total = share.sum(0)
    share /= total
    error = np.log(total) + highest - target
    # Chain rule: Huber's slope, times the softmax, times the terms' slopes.
    slope = np.clip(error, -DELTA, DELTA)
    gradient = np.einsum("n,tn,tnp->p", slope, share, slopes)
    return float(special.huber(DELTA, error).sum()) / DELTA**2, gradient / DELTA**2


def varpro(
    columns: Callable[[Sequence[float]], Array], loss: Array, grid: Sequence[Sequence[float]]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (exponents, coefficients ≥ 0) that minimise the sum of squares in nats.

    `columns` gives the design matrix of some exponents, shape (runs, coefficients). The search starts from the best
    exponents of `grid`.
    """

    def squares(exponents: Sequence[float]) -> float:
        return linear(columns(exponents), loss)[1]

    start = min(grid, key=squares)
    options = {"xatol": 1e-10, "fatol": 1e-18, "maxiter": 4000}
    best = optimize.minimize(squares, start, method="Nelder-Mead", options=options).x
    coefficients, _ = linear(columns(best), loss)
    return tuple(float(value) for value in best), tuple(float(value) for value in coefficients)


def linear(design: Array, loss: Array) -> tuple[Array, float]:
    """Return (coefficients ≥ 0, sum of squares) of the least squares."""
    # nnls compares columns by absolute size, so all get the same length.
    length = np.linalg.norm(design, axis=0)
    scaled, rest = optimize.nnls(design / length, loss)
    return scaled / length, float(rest) ** 2
