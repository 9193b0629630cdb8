"""Runs of baseline and arm that share rung and seed, and why some do not.

Both runs of a pair see the same data in the same order, so what the seed did to one it did in part to the other.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.multiplier import Influence, Noise, Pairs
from trainer.ladder.stats.records import BASELINE, Curve, CurveFit, Pairing, RunResult

CLEAR_OF_FLOOR = 2.0
"""Standard deviations of a run that a loss must lie above E for its logarithm to mean anything."""

Runs = dict[str, dict[int, RunResult]]
"""By rung and seed."""


def _runs(results: Iterable[RunResult], arm: str) -> Runs:
    runs: Runs = {}
    for one in results:
        if one.arm == arm:
            runs.setdefault(one.rung, {})[one.seed] = one
    return runs


@dataclass(frozen=True)
class Baseline:
    """What all arms are held against."""

    fit: CurveFit
    rungs: fits.Rungs
    influence: Influence
    runs: Runs

    @classmethod
    def from_results(cls, results: Sequence[RunResult], fit: CurveFit) -> "Baseline":
        rungs = fits.rungs_of(fits.usable(results, BASELINE))
        influence = Influence(rungs.flops, rungs.seeds, fits.sensitivity(rungs, fit.curve))
        return cls(fit, rungs, influence, _runs(results, BASELINE))

    @property
    def floor(self) -> float:
        """Losses must lie above it to have a multiplier."""
        return self.fit.curve.E + CLEAR_OF_FLOOR * (self.fit.sd or 0.0)

    def extremes(self) -> list[Curve]:
        """The curves at both ends of alpha's interval, each with the E that goes with it."""
        ends = (self.fit.alpha.low, self.fit.alpha.high)
        return [
            fits.curve_at(self.rungs, float(fits.ALPHAS[side]) if end is None else end)
            for end, side in zip(ends, (0, -1), strict=True)
        ]


@dataclass(frozen=True)
class Matched:
    """Runs of baseline and arm that share rung and seed."""

    name: str
    flops: float
    pairs: list[tuple[RunResult, RunResult]]
    gap: str
    """Why there is no multiplier, or why there are fewer pairs; "" if all is there."""
    usable: bool

    def arrays(self) -> Pairs:
        base, arm = (np.array([pair[side].loss for pair in self.pairs]) for side in (0, 1))
        cost = np.array([math.log(arm.flops / base.flops) for base, arm in self.pairs])
        return Pairs(self.name, self.flops, base, arm, cost)

    def log_seconds(self, per_token: bool) -> list[float]:
        """ln(arm / baseline) of training seconds, of the pairs that have both."""
        return [
            math.log(arm.seconds / base.seconds) - (math.log(arm.tokens / base.tokens) if per_token else 0.0)
            for base, arm in self.pairs
            if arm.seconds and base.seconds
        ]


def match(results: Iterable[RunResult], arm: str, baseline: Baseline) -> Iterator[Matched]:
    """The baseline's rungs, by compute, with what the arm has of each."""
    runs, rungs = _runs(results, arm), baseline.rungs
    for name, flops in zip(rungs.names, rungs.flops, strict=True):
        base, mine = baseline.runs.get(name, {}), runs.get(name, {})
        pairs = [
            (base[seed], mine[seed])
            for seed in sorted(base.keys() & mine.keys())
            if math.isfinite(base[seed].loss) and math.isfinite(mine[seed].loss)
        ]
        low = any(min(one.loss, other.loss) <= baseline.floor for one, other in pairs)
        wanted = len(base.keys() | mine.keys())
        gap = "" if len(pairs) == wanted else f"{len(pairs)} pairs of {wanted}"
        if not pairs:
            gap = "no finished pair"
        elif low:
            gap = f"a loss lies at the baseline's floor of {baseline.fit.curve.E:.4f}"
        yield Matched(name, float(flops), pairs, gap, bool(pairs) and not low)


def pairing_of(noise: Noise) -> Pairing:
    if not noise.freedom or min(noise.base, noise.arm, noise.paired) <= 0:
        return Pairing(None, None)
    return Pairing((noise.base + noise.arm) / noise.paired, noise.both / math.sqrt(noise.base * noise.arm))
