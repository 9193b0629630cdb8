"""Worth of text that is read again: the law of effective data, its fit, and the value of an epoch.

Muennighoff et al. 2023 (arXiv:2305.16264), section 3: D tokens of which U are unique count as
D' = U + U·R_D·(1 − exp(−(D/U − 1)/R_D)) tokens, and N parameters beyond the U_N that the unique text can use count
in the same way, with R_N, as N'. The loss is E + A/N'^α + B/D'^α with one exponent, as its authors have it, so that
U_N = G²·U with G^(2α) = A/B. Runs of one size say nothing about N: then E + B/D'^α is fitted, with A/N'^α in E.

The estimator is the smallest sum of Huber losses on log L, and an interval its profile (huber.py). An end is None where
the profile stays below the limit: the data do not bound it there.

The published R_D = 15.39 and R_N = 5.31 are a local minimum of that sum. Their authors take α, A, B and E from
digitised IsoFLOP dots of Hoffmann et al. 2022, hold them, and search R_D and R_N from a coarse grid on all 182 runs
(huggingface/datablations, utils/parametric_fit.ipynb); from their starts the same search ends there
(tests/test_repetition.py). Runs are 8 % off that law in the median, and so the sum is nearly flat: it is 0.1 % lower at
R_D = 47 and at R_D = 95, and the interval of R_D is open above.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats.huber import HuberFit, HuberLaw, starting_points
from trainer.ladder.stats.records import Interval, JsonRecord

Array = np.ndarray
LEAST, MOST = 0.05, 1e4
"""Ends of R and of its profile: text read again is worth nothing, or as much as new text however often."""
PAYS = 0.1
"""An epoch pays while a token of it is worth at least so much of a new one."""
STARTS: Mapping[str, tuple[float, ...]] = {
    "alpha": (0.15, 0.3, 0.5), "R_D": (1.0, 5.0, 25.0, 200.0), "R_N": (2.0, 20.0), "G": (0.05, 0.2, 0.8)
}  # fmt: skip
NAMES = ("E", "A", "alpha", "R_D", "R_N", "G")
"""Parameters of the law in the order of the search; of runs of one size only the first four, and A is then B."""


def effective(amount: Array, unique: Array, R: float) -> Array:
    """Return what `amount` counts as where `unique` of it is new and the rest repeats it."""
    repeats = np.maximum(amount / unique - 1, 0.0)
    return np.minimum(amount, unique) + unique * R * -np.expm1(-repeats / R)


@dataclass(frozen=True)
class Repetition(JsonRecord):
    """A fitted law."""

    E: float
    A: float | None
    """None: the runs have one size, and E holds what the size adds."""
    B: float
    alpha: float
    R_D: Interval
    R_N: Interval | None
    runs: int
    sd: float | None
    """Relative standard deviation of a run about the law; None without a degree of freedom."""

    def loss_at(self, parameters: Array, tokens: Array, unique: Array) -> Array:
        """Predicted loss."""
        assert self.R_D.value is not None
        loss = self.E + self.B * effective(tokens, unique, self.R_D.value) ** -self.alpha
        if self.A is None or self.R_N is None:
            return loss
        assert self.R_N.value is not None
        usable = np.minimum((self.A / self.B) ** (1 / self.alpha) * unique, parameters)
        return loss + self.A * effective(parameters, usable, self.R_N.value) ** -self.alpha

    def value_of_epoch(self, epoch: int) -> Interval:
        """Worth of the tokens of an epoch (the first is 1), as a share of as many new ones."""
        return _of(self.R_D, lambda R: worth(epoch, R) - worth(epoch - 1, R))

    def last_paying_epoch(self) -> Interval:
        """Number of epochs up to which another token is worth PAYS of a new one."""
        return _of(self.R_D, lambda R: 1 + R * math.log(1 / PAYS))

    def worth_of(self, epochs: float) -> Interval:
        """Text that, read once, would be worth as much as the unique text read so often; as a multiple of it."""
        return _of(self.R_D, lambda R: worth(epochs, R))


def worth(epochs: float, R: float) -> float:
    """D' / U after so many epochs."""
    return epochs if epochs <= 1 else float(effective(np.array(epochs), np.array(1.0), R))


def _of(found: Interval, rising: Callable[[float], float]) -> Interval:
    value, low, high = (None if end is None else rising(end) for end in (found.value, found.low, found.high))
    return Interval(value, low, high, found.level)


def fit(
    parameters: Array, tokens: Array, unique: Array, loss: Array, level: float = 0.05,
    known: Mapping[str, float] | None = None,
) -> Repetition:  # fmt: skip
    """Fit the law. `known` are parameters that are held: alpha, G, R_D or R_N; with E and A the whole law but for R.

    Raises FitError with too few runs, and where no text was read more than once.
    """
    if (most := float((tokens / unique).max())) < 1.5:
        raise FitError(
            f"no run read its text more than {most:.2g} times, so nothing says what repeated text is worth.\n"
            "  Add runs of two epochs or more."
        )
    known = known or {}
    sizes = bool(np.ptp(np.log(parameters)) > 0.1)
    names = NAMES if sizes else NAMES[:4]
    freedom = len(loss) - sum(name not in known for name in names)
    if freedom < 0:
        raise FitError(f"{len(loss)} runs are too few for this law.\n  It needs {len(loss) - freedom} or more.")
    law = _Law(parameters, tokens, unique, sizes)
    bounds = [_bounds(name, known) for name in names]
    search = HuberLaw(law.terms, loss, bounds)
    grid = itertools.product(*([known[name]] if name in known else STARTS[name] for name in names[2:]))
    # From each R_D that is tried: local minima differ by it most.
    points = [*grid]
    starts = [
        np.array(start)
        for R_D in sorted({point[1] for point in points})
        for start in starting_points(law.columns, loss, [point for point in points if point[1] == R_D], 1)
    ]
    profiled = [names.index(name) for name in ("R_D", "R_N") if name in names]
    return _described(search.fit(starts, profiled, level), names, level)


def _bounds(name: str, known: Mapping[str, float]) -> tuple[float, float]:
    if name in known:
        return math.log(known[name]), math.log(known[name])
    # Where the runs look as good as on new text, R would grow without end.
    return (math.log(LEAST), math.log(MOST)) if name.startswith("R_") else (-30.0, 30.0)


def _described(fit: HuberFit, names: Sequence[str], level: float) -> Repetition:
    values = {name: math.exp(value) for name, value in zip(names, fit.best, strict=True)}

    def interval(name: str) -> Interval:
        low, high = fit.interval(names.index(name))
        return Interval(values[name], low, high, level)

    sizes = "G" in values
    text = values["A"] * values["G"] ** (-2 * values["alpha"]) if sizes else values["A"]
    return Repetition(
        values["E"], values["A"] if sizes else None, text, values["alpha"], interval("R_D"),
        interval("R_N") if sizes else None, len(fit.law.loss), fit.sd,
    )  # fmt: skip


@dataclass(frozen=True)
class _Law:
    """The law's terms at each run."""

    parameters: Array
    tokens: Array
    unique: Array
    sizes: bool
    """True if runs have several sizes."""

    def columns(self, point: Sequence[float]) -> Array:
        """Return the columns that E and the other coefficient multiply at (alpha, R_D, …)."""
        values = self.terms(np.log([1.0, 1.0, *point]))[0]
        return np.stack([np.exp(values[0]), np.exp(values[1:]).sum(0)], axis=1)

    def terms(self, p: Array) -> tuple[Array, Array]:
        """Logarithms of E, of the text's and of the size's part, and their slopes (huber.py)."""
        count, runs = 2 + self.sizes, len(self.tokens)
        values, slopes = np.zeros((count, runs)), np.zeros((count, runs, len(p)))
        alpha, R_D = math.exp(p[2]), math.exp(p[3])
        values[0], slopes[0, :, 0] = p[0], 1.0
        log, by_R, _ = _effective_log(self.tokens, self.unique, R_D)
        values[1], slopes[1, :, 1] = p[1] - alpha * log, 1.0
        slopes[1, :, 2], slopes[1, :, 3] = -alpha * log, -alpha * by_R
        if not self.sizes:
            return values, slopes
        R_N = math.exp(p[4])
        # B = A·G^(−2α)
        values[1] -= 2 * alpha * p[5]
        slopes[1, :, 2] -= 2 * alpha * p[5]
        slopes[1, :, 5] = -2 * alpha
        usable = math.exp(2 * p[5]) * self.unique
        log, by_R, by_usable = _effective_log(self.parameters, np.minimum(usable, self.parameters), R_N)
        values[2], slopes[2, :, 1] = p[1] - alpha * log, 1.0
        slopes[2, :, 2], slopes[2, :, 4] = -alpha * log, -alpha * by_R
        slopes[2, :, 5] = np.where(usable < self.parameters, -alpha * 2 * by_usable, 0.0)
        return values, slopes


def _effective_log(amount: Array, unique: Array, R: float) -> tuple[Array, Array, Array]:
    """log of `effective`, and its slopes in ln R and in ln unique."""
    counts = effective(amount, unique, R)
    repeats = np.maximum(amount / unique - 1, 0.0)
    fade = np.exp(-repeats / R)
    by_R = unique * R * (1 - fade * (1 + repeats / R)) / counts
    by_unique = unique * (1 + R * (1 - fade) - (1 + repeats) * fade) / counts
    return np.log(counts), by_R, by_unique
