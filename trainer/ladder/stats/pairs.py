"""Pairs: runs of baseline and arm that share rung and seed, and the reasons why some are missing.

Both runs of a pair read the same data in the same order, so a part of the seed's effect is common to both. Where a rung
has no common seed (other seeds, another trainer), runs are matched in the order of their seeds: independent runs are
as far apart in any order.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.records import BASELINE, Curve, CurveFit, Pairing, RunResult
from trainer.ladder.stats.worth import Baselines, Worths

CLEAR_OF_FLOOR = 2.0
"""A loss must lie this many standard deviations of a run above E, or noise decides its logarithm."""
MIXED_UNITS = 0.05
"""If losses differ between arm and baseline by ln 2 within this share at every rung, one is in bits, one in nats."""

Runs = dict[str, dict[int, RunResult]]
"""Results by rung and seed."""


def by_arm(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """The results of each arm."""
    found: dict[str, list[RunResult]] = {}
    for result in results:
        found.setdefault(result.arm, []).append(result)
    return found


def runs_of(results: Iterable[RunResult], arm: str) -> Runs:
    runs: Runs = {}
    for result in results:
        if result.arm == arm:
            runs.setdefault(result.rung, {})[result.seed] = result
    return runs


@dataclass(frozen=True)
class MatchedRung:
    """Runs of baseline and arm at one rung that are compared."""

    name: str
    flops: float
    pairs: list[tuple[RunResult, RunResult]]  # (baseline, arm)
    paired: bool  # they share their seeds
    gap: str  # Reason why there is no multiplier, or why there are fewer pairs; "" if nothing is missing
    usable: bool

    @cached_property
    def losses(self) -> np.ndarray:
        """Losses of baseline and arm, shape (2, pairs)."""
        return np.array([[run.loss for run in pair] for pair in self.pairs]).reshape(-1, 2).T

    def log_seconds(self, per_token: bool) -> list[float]:
        """ln(arm / baseline) of training seconds, for the pairs that have both."""
        return [
            math.log(arm.seconds / base.seconds) - (math.log(arm.tokens / base.tokens) if per_token else 0.0)
            for base, arm in self.pairs
            if arm.seconds and base.seconds
        ]


def pairing(rungs: Iterable[MatchedRung]) -> Pairing:
    """Benefit of pairing, from the covariance of baseline and arm within rungs."""
    away = [rung.losses - rung.losses.mean(1, keepdims=True) for rung in rungs if rung.paired and rung.pairs]
    both_sides = np.concatenate([np.zeros((2, 0)), *away], axis=1)
    (base, both), (_, arm) = both_sides @ both_sides.T
    paired = base + arm - 2 * both
    if min(base, arm, paired) <= 0:
        return Pairing(None, None)
    return Pairing(float((base + arm) / paired), float(both / math.sqrt(base * arm)))


@dataclass(frozen=True)
class Sizes:
    """The baseline's runs by rung, with which all arms are compared. Subclasses know the form on which they lie."""

    rungs: fits.Rungs
    runs: Runs
    E: float  # loss that no amount of compute reaches
    E_determined: bool
    sd: float | None  # of a run; None if unknown
    scale: float  # FLOPs at x = 0

    @property
    def floor(self) -> float:
        """Lowest loss that still has a multiplier."""
        return self.E + CLEAR_OF_FLOOR * (self.sd or 0.0)

    def alternatives(self) -> list[tuple[float, Any]]:
        """(E, form) of the outermost forms that the baseline's runs allow."""
        raise NotImplementedError

    def compare(self, arms: Sequence[Sequence[MatchedRung]], form: Any = None) -> Worths:
        """Estimate what arms with these rungs are worth, by the baseline's form or another of `alternatives`."""
        raise NotImplementedError

    def match(self, results: Iterable[RunResult], arm: str) -> Iterator[MatchedRung]:
        """Yield the baseline's rungs, by compute, with the arm's runs there. Raises FitError if its unit differs."""
        runs, ratios = runs_of(results, arm), []
        for name, flops in zip(self.rungs.names, self.rungs.flops, strict=True):
            base, own = (
                {seed: run for seed, run in side.get(name, {}).items() if math.isfinite(run.loss)}
                for side in (self.runs, runs)
            )
            paired = bool(base.keys() & own.keys())
            pairs = [(base[seed], own[seed]) for seed in sorted(base.keys() & own.keys())]
            if not paired:
                pairs = [(base[one], own[two]) for one, two in zip(sorted(base), sorted(own), strict=False)]
            ratios += [own.loss / base.loss for base, own in pairs]
            # ln(loss − E) means nothing near E. The whole rung is marked, since dropping low losses selects by result.
            at_floor = any(min(pair[0].loss, pair[1].loss) <= self.floor for pair in pairs)
            wanted = len(self.runs.get(name, {}).keys() | runs.get(name, {}).keys())
            gap = "" if len(pairs) == wanted else f"{len(pairs)} pairs of {wanted}"
            if not pairs:
                gap = "no finished pair"
            elif not paired:
                gap = "no common seed, so its runs are compared as unpaired"
            elif at_floor:
                gap = f"a loss lies at the baseline's floor of {self.E:.4f}"
            yield MatchedRung(name, float(flops), pairs, paired, gap, bool(pairs) and not at_floor)
        logs = np.abs(np.log(ratios)) if ratios else np.zeros(1)
        if (np.abs(logs / math.log(1 / math.log(2)) - 1) < MIXED_UNITS).all():
            raise FitError(
                f"the losses of arm {arm} are {np.median(ratios):.3g} times the baseline's at every rung, as bits are "
                "to nats.\n  Losses must have one unit. Multiply bits by 0.6931 to get nats."
            )

    @property
    def losses(self) -> np.ndarray:
        """Losses of the finished runs, shape (rungs, seeds); NaN where a rung has fewer."""
        found = np.full((len(self.rungs.names), int(self.rungs.seeds.max())), np.nan)
        for row, losses in zip(found, self.rungs.losses, strict=True):
            row[: len(losses)] = losses
        return found

    def table(self, arms: Sequence[Sequence[MatchedRung]]) -> np.ndarray:
        """Losses of baseline and arm, and ln of their costs' ratio, shape (3, arms, rungs, pairs); else NaN."""
        most = max((len(rung.pairs) for rungs in arms for rung in rungs), default=1) or 1
        table = np.full((3, len(arms), len(self.rungs.names), most), np.nan)
        for number, rungs in enumerate(arms):
            for k, rung in enumerate(rungs):
                if rung.usable:
                    costs = [math.log(arm.flops / base.flops) for base, arm in rung.pairs]
                    table[:, number, k, : len(costs)] = [*rung.losses, costs]
        return table

    @property
    def within(self) -> np.ndarray:
        """Sum of squares of each rung's losses about their mean."""
        return np.array([((losses - losses.mean()) ** 2).sum() for losses in self.rungs.losses])


@dataclass(frozen=True)
class Baseline(Sizes):
    """The baseline's runs and their curve in compute."""

    fit: CurveFit

    @classmethod
    def from_results(cls, results: Sequence[RunResult], fit: CurveFit) -> "Baseline":
        rungs, curve = fits.Rungs.from_results(results), fit.curve
        return cls(rungs, runs_of(results, BASELINE), curve.E, fit.E_determined, fit.sd, curve.scale, fit)

    def alternatives(self) -> list[tuple[float, Curve]]:
        """The curves at both ends of alpha's interval, each with the E that belongs to it."""
        ends = ((self.fit.alpha.low, fits.ALPHAS[0]), (self.fit.alpha.high, fits.ALPHAS[-1]))
        found = [fits.curve_with_alpha(self.rungs, float(edge) if end is None else end) for end, edge in ends]
        return [(curve.E, curve) for curve in found]

    def compare(self, arms: Sequence[Sequence[MatchedRung]], form: Curve | None = None) -> Worths:
        curve, rungs = form or self.fit.curve, self.rungs
        E, A, alpha = (np.array(value) for value in (curve.E, curve.A, curve.alpha))
        x = np.log(rungs.flops / curve.scale)
        lack = rungs.seeds @ (rungs.loss - E - A * np.exp(-alpha * x)) ** 2
        return Worths.from_pairs(Baselines(x, E, A, alpha, rungs.seeds, self.within, lack), *self.table(arms))


def can_extrapolate(rungs: Sequence[MatchedRung]) -> bool:
    """True with three rungs or more that have pairs, if all of them are usable.

    A rung whose loss is too low must not be left out: that would select rungs by their result.
    """
    known = [rung for rung in rungs if rung.pairs]
    return len(known) >= fits.FEWEST_RUNGS and all(rung.usable for rung in known)
