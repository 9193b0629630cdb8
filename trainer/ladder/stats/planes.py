"""Worth of arms where parameters and tokens vary apart: the multiplier m(N, D) by the baseline's surface.

The baseline's losses lie on L(N, D) = E + A / N^alpha + B / D^beta (surfaces.py). At each size, m is the factor by
which the baseline would need more compute *at the same tokens per parameter* to reach the arm's loss: N and D both grow
by √m. Runs are compared in pairs, and if the arm changes nothing, ln m is symmetric about 0 for every surface.

Between sizes, ln m = c + d·z(C) + b·(ln(D/N) − the target's): the forms of worth.py in compute, and a line in the mix
of tokens and parameters. Noise, bounds and verdicts are those of a ladder on one line of compute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import surfaces
from trainer.ladder.stats.pairs import MatchedRung, Sizes, runs_of
from trainer.ladder.stats.records import BASELINE, RunResult
from trainer.ladder.stats.surfaces import Surface
from trainer.ladder.stats.worth import Baselines, Equivalents, Worths

Array = np.ndarray
OFF_THE_LINE = 0.2
"""Runs are on one line of compute if ln D is a line in ln N, about which it scatters by no more than this."""
NEWTON = 30  # steps; from above the root of a convex function each is nearer
SAME_MIX = 0.05  # spread of ln(D / N) over sizes below which they have one mix


def is_surface(parameters: Array, tokens: Array) -> bool:
    """True if tokens and parameters vary apart, so that one curve in compute cannot hold all runs."""
    n, d = np.log(parameters), np.log(tokens)
    if len(n) < 5 or np.ptp(n) == 0:
        return False
    rest = d - np.polyval(np.polyfit(n, d, 1), n)
    return bool(np.sqrt(np.mean(rest**2)) > OFF_THE_LINE)


def best_size(surface: Surface, flops: float) -> tuple[float, float]:
    """(N, D) at which the surface is lowest for this compute, by C = 6·N·D."""

    def loss_at(log_n: float) -> float:
        return float(surface.loss_at(math.exp(log_n), flops / (6 * math.exp(log_n)))[0])

    middle = math.log(flops / 6) / 2
    found: Any = optimize.minimize_scalar(loss_at, bounds=(middle - 12, middle + 12), method="bounded")
    n = math.exp(found.x)
    return n, flops / (6 * n)


@dataclass(frozen=True)
class SurfaceSizes(Baselines):
    """The baseline's surface with its noise, in the place of a curve in compute."""

    surface: Surface
    log_n: Array  # (rungs,)
    log_d: Array
    log_mix: Array | None  # `mix`

    parameters = 5

    @property
    def mix(self) -> Array | None:
        return self.log_mix

    def _terms(self) -> tuple[Array, Array]:
        """A / N^alpha and B / D^beta at each size."""
        (alpha, beta), (_, A, B) = self.surface.exponents, self.surface.coefficients
        return A * np.exp(-alpha * self.log_n), B * np.exp(-beta * self.log_d)

    @property
    def slopes(self) -> Array:
        """−dL / d ln C at each size, for the same tokens per parameter."""
        (alpha, beta), (p, q) = self.surface.exponents, self._terms()
        return (alpha * p + beta * q) / 2

    def equivalents(self, base: Array, arm: Array, log_cost: Array | float) -> Equivalents:
        E = self.surface.coefficients[0]
        valid = (base > E) & (arm > E)
        (above, by_above), (other, by_other) = (self._scale(np.where(valid, side - E, 1.0)) for side in (base, arm))
        log_m = np.where(valid, other - above - log_cost, 0.0)
        return Equivalents(valid, log_m, np.where(valid, by_other - by_above, 0.0))

    def _scale(self, above: Array) -> tuple[Array, Array]:
        """ln of the compute, in units of the size's, at which a loss lies so far above E, and its derivatives.

        `above` has the shape (..., rungs, pairs); derivatives are by (log E, log A, log B, alpha, beta).
        """
        (alpha, beta), terms = self.surface.exponents, self._terms()
        p, q = (term[:, None] for term in terms)
        goal, t = np.log(above), np.zeros_like(above)
        for _ in range(NEWTON):
            now_p, now_q = p * np.exp(-alpha * t / 2), q * np.exp(-beta * t / 2)
            total = now_p + now_q
            t = t + (np.log(total) - goal) * 2 * total / (alpha * now_p + beta * now_q)
        now_p, now_q = p * np.exp(-alpha * t / 2), q * np.exp(-beta * t / 2)
        by_t = (alpha * now_p + beta * now_q) / 2
        moved = (
            np.full_like(t, self.surface.coefficients[0]), now_p, now_q, -now_p * (self.log_n[:, None] + t / 2),
            -now_q * (self.log_d[:, None] + t / 2),
        )  # fmt: skip
        return t, np.stack([each / by_t for each in moved])

    def influence(self) -> Array:
        """d(log E, log A, log B, alpha, beta) / d(mean losses of the sizes), shape (5, rungs)."""
        # The surface's runs are sorted by size.
        first = np.cumsum([0, *self.seeds[:-1]]).astype(int)
        return np.add.reduceat(self.surface.influence_of_losses(), first, axis=1)


@dataclass(frozen=True)
class SurfaceBaseline(Sizes):
    """The baseline's runs at sizes that lie on a surface."""

    surface: Surface
    log_n: Array
    log_d: Array
    target_mix: float  # ln(D / N) at the target

    @classmethod
    def from_results(
        cls, results: Sequence[RunResult], target_flops: float, level: float, target_mix: float | None = None
    ) -> "SurfaceBaseline":
        """Fit the baseline's finished runs; without `target_mix`, the target's is the best, within those that were run.

        Raises FitError.
        """
        runs = runs_of(results, BASELINE)
        known = {name: [run for run in seeds.values() if math.isfinite(run.loss)] for name, seeds in runs.items()}
        known = {name: found for name, found in known.items() if found}
        names = sorted(known, key=lambda name: (known[name][0].flops, known[name][0].parameters))
        n, d, flops = (
            np.array([np.mean([math.log(getattr(run, key)) for run in known[name]]) for name in names])
            for key in ("parameters", "tokens", "flops")
        )
        losses = [np.array([run.loss for run in known[name]]) for name in names]
        ordered = [run for name in names for run in known[name]]
        columns = (np.array([float(getattr(run, key)) for run in ordered]) for key in ("parameters", "tokens", "loss"))
        surface = surfaces.hoffmann(*columns, level=level)
        if target_mix is None:
            best = best_size(surface, target_flops)
            target_mix = float(np.clip(math.log(best[1] / best[0]), (d - n).min(), (d - n).max()))
        rungs, floor, lowest = fits.Rungs(names, np.exp(flops), losses), surface.floor(), float(surface.loss.min())
        determined = (floor.low or 0.0) > 0 and floor.high is not None and floor.high < lowest
        sd = None if surface.sd is None else surface.sd * float(np.mean(surface.loss))
        return cls(rungs, runs, surface.coefficients[0], determined, sd, rungs.scale, surface, n, d, target_mix)

    def alternatives(self) -> list[tuple[float, Surface]]:
        """Surfaces with the least and the greatest of each exponent, each with the E that belongs to it."""
        return [(one.coefficients[0], one) for one in self.surface.extremes()]

    def compare(self, arms: Sequence[Sequence[MatchedRung]], form: Surface | None = None) -> Worths:
        surface, rungs = form or self.surface, self.rungs
        (E, A, B), (alpha, beta) = surface.coefficients, surface.exponents
        fitted = surface.at([self.log_n, self.log_d])
        mix = self.log_d - self.log_n - self.target_mix
        sizes = SurfaceSizes(
            np.log(rungs.flops / self.scale), np.array(E), np.array(A + B), np.array(alpha * beta / (alpha + beta)),
            rungs.seeds, self.within, rungs.seeds @ (rungs.loss - fitted) ** 2,
            surface, self.log_n, self.log_d, mix if np.ptp(mix) > SAME_MIX else None,
        )  # fmt: skip
        return Worths.from_pairs(sizes, *self.table(arms))


def vary_apart(results: Sequence[RunResult]) -> bool:
    """True if the baseline's finished runs lie on a surface rather than on one line of compute."""
    known = [run for run in results if run.arm == BASELINE and math.isfinite(run.loss)]
    sizes = np.array([(run.parameters, run.tokens) for run in known], dtype=float).reshape(-1, 2)
    # A table without parameters or tokens gives 1.
    return bool((sizes > 1).all()) and is_surface(*sizes.T)
