"""A second law of text that is read again, by which it can harm: a penalty that is added to the loss.

L = E + A/N^α + B/D^β + P·(D/U − 1)^δ·(N/U)^κ: all tokens D count as new ones, and what repeats add to the loss is a
power law of their number and of the parameters for each unique token. After Lovelace et al. 2026 (arXiv:2605.01640),
who add such a penalty. Its letters and its exact form are ours, made from their abstract and from summaries, since
their text was not at hand. By effective data (repetition.py) another epoch is at worst worth nothing; by this law the
loss has a lowest point. It describes the 182 runs of Muennighoff et al. better: the median run is 1.7 % off, not 2.6 %
(all parameters of both laws being free), and its exponents there are those of EXPONENTS.

Runs of one size hold A/N^α in E. Exponents of the penalty need runs of several numbers of epochs and sizes: where there
are fewer they are held at EXPONENTS, and P alone is fitted.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats.huber import HuberFit, HuberLaw, starting_points
from trainer.ladder.stats.records import Interval, JsonRecord

Array = np.ndarray
EXPONENTS = {"delta": 0.35, "kappa": 0.71}
"""On the published runs (tests/test_repetition.py)."""
FEWEST_EPOCHS = 3
"""Numbers of epochs above 1 that tell of the exponent in them."""
STARTS: Mapping[str, tuple[float, ...]] = {
    "alpha": (0.2, 0.4), "beta": (0.2, 0.4), "delta": (0.3, 0.7, 1.2), "kappa": (0.3, 0.7, 1.2)
}  # fmt: skip
REACH = 2.0
"""The best number of epochs is looked for up to so many times the most that a run has read."""
NEGLIGIBLE = -50.0
"""Logarithm of a term that is zero."""


@dataclass(frozen=True)
class Overfitting(JsonRecord):
    """A fitted law."""

    E: float
    A: float | None
    """None: the runs have one size, and E holds what the size adds."""
    alpha: float | None
    B: float
    beta: float
    P: Interval
    """In nats: the penalty at two epochs and a parameter for each unique token."""
    delta: float
    kappa: float
    held: tuple[str, ...]
    """Exponents that these runs cannot tell."""
    runs: int
    sd: float | None
    """Relative standard deviation of a run about the law; None without a degree of freedom."""


@dataclass(frozen=True)
class OverfittingFit:
    """The law with the parameters that the data leave open, for what is derived from them."""

    law: Overfitting
    terms: "_Terms"
    fit: HuberFit
    level: float

    def loss_at(self, parameters: Array, tokens: Array, unique: Array) -> Array:
        """Predicted loss."""
        return self._loss(self.fit.best, parameters, tokens, unique)

    def best_epochs(self, parameters: float, unique: float) -> Interval:
        """Number of epochs at which the loss is lowest; None: more than REACH times as many as a run has read.

        The ends are those over the parameters that the profiles of P and of the exponents passed through.
        """
        if not self.fit.ends:
            return Interval(self._best(self.fit.best, parameters, unique), None, None, self.level)
        found = [self._best(p, parameters, unique) for p in self.fit.inside]
        known = [epochs for epochs in found if epochs is not None]
        return Interval(
            self._best(self.fit.best, parameters, unique), min(known, default=None),
            None if len(known) < len(found) else max(known), self.level,
        )  # fmt: skip

    def _best(self, p: Array, parameters: float, unique: float) -> float | None:
        most = REACH * float((self.terms.tokens / self.terms.unique).max())
        epochs = np.geomspace(1.0, most, 401)
        losses = self._loss(p, np.full_like(epochs, parameters), unique * epochs, np.full_like(epochs, unique))
        place = int(losses.argmin())
        return None if place == len(epochs) - 1 else float(epochs[place])

    def _loss(self, p: Array, parameters: Array, tokens: Array, unique: Array) -> Array:
        there = _Terms(parameters, tokens, unique, self.terms.sizes)
        return np.exp(there.terms(p)[0]).sum(0)


def fit(parameters: Array, tokens: Array, unique: Array, loss: Array, level: float = 0.05) -> OverfittingFit:
    """Fit the law. Raises FitError with too few runs, and where no text was read more than once."""
    repeats = tokens / unique - 1
    if repeats.max() < 0.5:
        raise FitError("no run read its text again, so nothing says what it harms.\n  Add runs of two epochs or more.")
    terms = _Terms(parameters, tokens, unique, bool(np.ptp(np.log(parameters)) > 0.1))
    held = () if terms.sizes else ("kappa",)
    # Steps are whole, so one planned number of epochs is a slightly different one at each rung.
    numbers = np.sort(np.log(repeats[repeats > 0.05]))
    if 1 + (np.diff(numbers) > 0.1).sum() < FEWEST_EPOCHS:
        held = ("delta", "kappa")
    names = terms.names
    freedom = len(loss) - len(names) + len(held)
    if freedom < 0:
        raise FitError(f"{len(loss)} runs are too few for this law.\n  It needs {len(loss) - freedom} or more.")
    known = {name: EXPONENTS[name] for name in held}
    logs = {name: math.log(value) for name, value in known.items()}
    bounds = [(logs.get(name, -30.0), logs.get(name, 30.0)) for name in names]
    grid = itertools.product(
        *([known[name]] if name in known else STARTS[name] for name in names[terms.coefficients :])
    )
    starts = [np.array(start) for start in starting_points(terms.columns, loss, [*grid], 4)]
    search = HuberLaw(terms.terms, loss, bounds)
    profiled = [names.index(name) for name in ("P", "delta", "kappa") if name not in known]
    found = search.fit(starts, profiled, level)
    values = {name: math.exp(value) for name, value in zip(names, found.best, strict=True)}
    low, high = found.interval(names.index("P"))
    law = Overfitting(
        values["E"], values.get("A"), values.get("alpha"), values["B"], values["beta"],
        Interval(values["P"], low, high, level),
        values["delta"], values["kappa"], tuple(held), len(loss), found.sd,
    )  # fmt: skip
    return OverfittingFit(law, terms, found, level)


@dataclass(frozen=True)
class _Terms:
    """The law's terms at each run."""

    parameters: Array
    tokens: Array
    unique: Array
    sizes: bool
    """True if runs have several sizes."""

    @property
    def names(self) -> tuple[str, ...]:
        size = ("A",) * self.sizes, ("alpha",) * self.sizes
        return ("E", *size[0], "B", "P", *size[1], "beta", "delta", "kappa")

    @property
    def coefficients(self) -> int:
        """Number of E, A, B and P: each multiplies a term of its own."""
        return 3 + self.sizes

    def columns(self, point: Sequence[float]) -> Array:
        """Return the column that each coefficient multiplies, at these exponents."""
        values = self.terms(np.log([*[1.0] * self.coefficients, *point]))[0]
        return np.exp(values).T

    def terms(self, p: Array) -> tuple[Array, Array]:
        """Logarithms of the terms, and their slopes (huber.py)."""
        count = self.coefficients
        values = np.repeat(p[:count, None], len(self.tokens), axis=1)
        slopes = np.zeros((*values.shape, len(p)))
        slopes[np.arange(count), :, np.arange(count)] = 1.0
        repeats = self.tokens / self.unique - 1
        logs = {"beta": -np.log(self.tokens), "kappa": np.log(self.parameters / self.unique)}
        logs |= {"alpha": -np.log(self.parameters), "delta": np.log(np.maximum(repeats, 1e-9))}
        term_of = {"alpha": 1, "beta": count - 2, "delta": count - 1, "kappa": count - 1}
        for place, name in enumerate(self.names[count:], count):
            part = math.exp(p[place]) * logs[name]
            values[term_of[name]] += part
            slopes[term_of[name], :, place] = part
        read_once = repeats <= 1e-9
        values[-1, read_once], slopes[-1, read_once] = NEGLIGIBLE, 0.0
        return values, slopes
