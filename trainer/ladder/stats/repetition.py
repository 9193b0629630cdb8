"""What text is worth that is read again: the law of effective data, its fit, and the value of an epoch.

Muennighoff et al. 2023 (arXiv:2305.16264), section 3: D tokens of which U are unique count as
D' = U + U·R_D·(1 − exp(−(D/U − 1)/R_D)) tokens, and N parameters beyond the U_N that the unique text can use count
in the same way, with R_N, as N'. The loss is E + A/N'^α + B/D'^α with one exponent, as its authors have it, so that
U_N = G²·U with G^(2α) = A/B. Runs of one size say nothing about N: then E + B/D'^α is fitted, with A/N'^α in E.

The estimator is that of surfaces, Huber losses on log L, by squares that are weighted anew in some rounds. Doubt: on
the 182 published runs, with the published α, A, B and E, the sum of Huber losses is nearly flat between R_D = 15 (a
local minimum, as published) and R_D = 47 (0.1 % lower). Eight rounds stop at 36, thirty at 15.3: where many runs are
far off, R_D depends on the number of rounds.

For given α, R_D, R_N and G the law is linear in E and the other coefficient, so variable projection serves (forms.py).
The interval of a parameter is read from its profile: the smallest sum of squares with that parameter held. An end is
None where the profile stays below the limit: the data do not bound it there.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize

from trainer.errors import FitError
from trainer.ladder.stats import forms
from trainer.ladder.stats.records import Interval, JsonRecord
from trainer.ladder.stats.surfaces import HuberErrors

Array = np.ndarray
LEAST, MOST = 0.05, 1e4
"""Ends of R and of its profile: text read again is worth nothing, or as much as new text however often."""
ROUNDS = 8
FIRST_STEP = 0.05
"""Of a profile, in ln R; each step is twice the one before."""
BISECTIONS = 10
PAYS = 0.1
"""An epoch pays while a token of it is worth at least so much of a new one."""
STARTS: Mapping[str, tuple[float, ...]] = {
    "alpha": (0.15, 0.3, 0.5), "R_D": (1.0, 5.0, 25.0, 200.0), "R_N": (2.0, 20.0), "G": (0.05, 0.2, 0.8)
}  # fmt: skip


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
    sizes, known = np.ptp(np.log(parameters)) > 0.1, known or {}
    names = ["alpha", "R_D", *(["R_N", "G"] if sizes else [])]
    searched = tuple(name for name in names if name not in known)
    freedom = len(loss) - len(searched) - (0 if "E" in known else 2)
    if freedom < 0:
        raise FitError(f"{len(loss)} runs are too few for this law.\n  It needs {len(loss) - freedom} or more.")
    law = _Law(parameters, tokens, unique, loss, 1 / loss**2, searched, known)
    best, squares = law.search(), 0.0
    # Weights are those of the residuals, and residuals those of the weights.
    for _ in range(ROUNDS):
        law = replace(law, weights=HuberErrors(law.residuals(best), loss, freedom).weights)
        best, squares = law.descend(law.squares, best, times=1)
    errors, found = HuberErrors(law.residuals(best), loss, freedom), law.values(best)
    E, slope = law.linear(found)[0]

    def interval(name: str) -> Interval:
        if errors.sd is None or name not in searched:
            return Interval(found[name], None, None, level)
        return Interval(found[name], *law.ends(name, best, squares + errors.room(level)), level)

    text = slope * found["G"] ** (-2 * found["alpha"]) if sizes else slope
    return Repetition(
        float(E), float(slope) if sizes else None, float(text), found["alpha"], interval("R_D"),
        interval("R_N") if sizes else None, len(loss), errors.sd,
    )  # fmt: skip


@dataclass(frozen=True)
class _Law:
    """The law as a search: its nonlinear parameters are searched by their logarithms."""

    parameters: Array
    tokens: Array
    unique: Array
    loss: Array
    weights: Array
    names: tuple[str, ...]
    """Parameters that are searched."""
    known: Mapping[str, float]

    def values(self, logs: Array) -> dict[str, float]:
        # Where the runs look as good as on new text, R would grow without end.
        ends = [(math.log(LEAST), math.log(MOST)) if name.startswith("R_") else (-30, 30) for name in self.names]
        named = zip(self.names, logs, ends, strict=True)
        return {**self.known, **{name: math.exp(np.clip(log, *limits)) for name, log, limits in named}}

    def _term(self, values: Mapping[str, float]) -> Array:
        """What the coefficient beside E multiplies."""
        alpha = values["alpha"]
        term = effective(self.tokens, self.unique, values["R_D"]) ** -alpha
        if "G" not in values:
            return term
        usable = np.minimum(values["G"] ** 2 * self.unique, self.parameters)
        return effective(self.parameters, usable, values["R_N"]) ** -alpha + values["G"] ** (-2 * alpha) * term

    def linear(self, values: Mapping[str, float]) -> tuple[tuple[float, float], float]:
        """((E, the other coefficient), weighted sum of squares)."""
        term = self._term(values)
        if "E" in values:
            E, slope = values["E"], values["A"]
            return (E, slope), float((self.weights * (self.loss - E - slope * term) ** 2).sum())
        root, unit = np.sqrt(self.weights), float(np.median(term))
        (E, slope), squares = forms.linear(np.stack([root, root * term / unit], axis=1), root * self.loss)
        return (float(E), float(slope) / unit), squares

    def squares(self, logs: Array) -> float:
        return self.linear(self.values(logs))[1]

    def residuals(self, logs: Array) -> Array:
        """log of loss minus log of the law."""
        values = self.values(logs)
        E, slope = self.linear(values)[0]
        return np.log(self.loss / (E + slope * self._term(values)))

    def search(self) -> Array:
        """Logarithms of the best law, from the best of some starts."""
        grids = np.meshgrid(*(np.log(STARTS[name]) for name in self.names), indexing="ij")
        starts = np.stack([grid.ravel() for grid in grids], axis=-1)
        first = sorted(starts, key=self.squares)[:3]
        return min((self.descend(self.squares, start) for start in first), key=lambda it: it[1])[0]

    @staticmethod
    def descend(squares: Callable[[Array], float], start: Array, times: int = 2) -> tuple[Array, float]:
        options: dict[str, Any] = {"xatol": 1e-5, "fatol": 1e-13, "maxiter": 2000, "adaptive": True}
        for _ in range(times):  # a second simplex, as large as the first, leaves where the first has collapsed
            start = optimize.minimize(squares, start, method="Nelder-Mead", options=options).x
        return start, squares(start)

    def ends(self, name: str, best: Array, room: float) -> tuple[float | None, float | None]:
        """Ends of the interval in which the profile of a parameter stays within `room`."""
        place = self.names.index(name)
        others = np.delete(best, place)

        def profile(value: float, rest: Array) -> tuple[Array, float]:
            if not len(rest):
                return rest, self.squares(np.array([value]))
            return self.descend(lambda free: self.squares(np.insert(free, place, value)), rest, times=1)

        def side(limit: float) -> float | None:
            # Each point starts from the one before, which is near.
            rest, inside, step = others, float(best[place]), math.copysign(FIRST_STEP, math.log(limit) - best[place])
            while abs(inside - math.log(limit)) > 1e-9:
                value = inside + step
                if (value - math.log(limit)) * step > 0:
                    value = math.log(limit)
                found, squares = profile(value, rest)
                if squares > room:
                    for _ in range(BISECTIONS):  # the profile is known to some digits only, so no root finder
                        middle = (inside + value) / 2
                        inside, value = (middle, value) if profile(middle, rest)[1] <= room else (inside, middle)
                    return math.exp((inside + value) / 2)
                rest, inside, step = found, value, 2 * step
            return None

        return side(LEAST), side(MOST)
