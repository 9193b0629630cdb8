"""Pairs: runs of baseline and arm that share rung and seed, and the reasons why some are missing.

Both runs of a pair read the same data in the same order, so a part of the seed's effect is common to both.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.multiplier import Comparison, Influence, Pairs
from trainer.ladder.stats.records import BASELINE, Curve, CurveFit, RunResult

CLEAR_OF_FLOOR = 2.0  # A loss must lie this many standard deviations of a run above E, or noise decides its logarithm

Runs = dict[str, dict[int, RunResult]]  # Results by rung and seed


def _runs(results: Iterable[RunResult], arm: str) -> Runs:
    runs: Runs = {}
    for result in results:
        if result.arm == arm:
            runs.setdefault(result.rung, {})[result.seed] = result
    return runs


@dataclass(frozen=True)
class MatchedRung:
    """Runs of baseline and arm at one rung that share a seed."""

    name: str
    flops: float
    pairs: list[tuple[RunResult, RunResult]]  # (baseline, arm) by seed
    gap: str  # Reason why there is no multiplier, or why there are fewer pairs; "" if nothing is missing
    usable: bool

    def losses(self) -> Pairs:
        base, arm = (np.array([pair[side].loss for pair in self.pairs]) for side in (0, 1))
        cost = np.array([math.log(arm.flops / base.flops) for base, arm in self.pairs])
        return Pairs(self.name, self.flops, base, arm, cost)

    def log_seconds(self, per_token: bool) -> list[float]:
        """ln(arm / baseline) of training seconds, for the pairs that have both."""
        return [
            math.log(arm.seconds / base.seconds) - (math.log(arm.tokens / base.tokens) if per_token else 0.0)
            for base, arm in self.pairs
            if arm.seconds and base.seconds
        ]


@dataclass(frozen=True)
class Baseline:
    """The baseline's runs and curve, with which all arms are compared."""

    fit: CurveFit
    rungs: fits.Rungs
    influence: Influence
    runs: Runs

    @classmethod
    def from_results(cls, results: Sequence[RunResult], fit: CurveFit) -> "Baseline":
        rungs = fits.Rungs.from_results(results)
        influence = Influence(rungs.flops, rungs.seeds, fits.sensitivity(rungs, fit.curve))
        return cls(fit, rungs, influence, _runs(results, BASELINE))

    @property
    def floor(self) -> float:
        """Lowest loss that still has a multiplier."""
        return self.fit.curve.E + CLEAR_OF_FLOOR * (self.fit.sd or 0.0)

    def extreme_curves(self) -> list[Curve]:
        """The curves at both ends of alpha's interval, each with the E that belongs to it."""
        ends = ((self.fit.alpha.low, fits.ALPHAS[0]), (self.fit.alpha.high, fits.ALPHAS[-1]))
        return [fits.curve_with_alpha(self.rungs, float(edge) if end is None else end) for end, edge in ends]

    def match(self, results: Iterable[RunResult], arm: str) -> Iterator[MatchedRung]:
        """Yield the baseline's rungs, by compute, with the arm's runs there."""
        runs = _runs(results, arm)
        for name, flops in zip(self.rungs.names, self.rungs.flops, strict=True):
            base, own = self.runs.get(name, {}), runs.get(name, {})
            pairs = [
                (base[seed], own[seed])
                for seed in sorted(base.keys() & own.keys())
                if math.isfinite(base[seed].loss) and math.isfinite(own[seed].loss)
            ]
            # ln(loss − E) means nothing near E. The whole rung is marked, since dropping low losses selects by result.
            at_floor = any(min(pair[0].loss, pair[1].loss) <= self.floor for pair in pairs)
            wanted = len(base.keys() | own.keys())
            gap = "" if len(pairs) == wanted else f"{len(pairs)} pairs of {wanted}"
            if not pairs:
                gap = "no finished pair"
            elif at_floor:
                gap = f"a loss lies at the baseline's floor of {self.fit.curve.E:.4f}"
            yield MatchedRung(name, float(flops), pairs, gap, bool(pairs) and not at_floor)

    def compare(self, rungs: Sequence[MatchedRung]) -> Comparison:
        """Take the usable rungs, with the baseline's curve."""
        return Comparison([rung.losses() for rung in rungs if rung.usable], self.fit.curve, self.influence)


def can_extrapolate(rungs: Sequence[MatchedRung]) -> bool:
    """True with three rungs or more that have pairs, if all of them are usable.

    A rung whose loss is too low must not be left out: that would select rungs by their result.
    """
    known = [rung for rung in rungs if rung.pairs]
    return len(known) >= fits.FEWEST_RUNGS and all(rung.usable for rung in known)
