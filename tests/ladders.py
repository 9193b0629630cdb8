"""Synthetic ladders with a known truth, to test the ladder's statistics."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import verdict
from trainer.ladder.stats.records import BASELINE, Criterion, Interval, RunResult, Verdict

Law = Callable[[float], float]
"""Loss in nats as a function of compute in FLOPs."""


def power_law(E: float = 1.8, rise: float = 1.14, alpha: float = 0.15, at: float = 1e15) -> Law:
    """E + rise·(C / at)^−alpha; by default about a byte-pair model's: slope 0.48 nats at 1e12 FLOPs."""
    return lambda flops: E + rise * (flops / at) ** -alpha


def two_powers(E: float = 1.8) -> Law:
    """Two power laws, like those of parameters and tokens: no single exponent fits."""
    return lambda flops: E + 0.6 * (flops / 1e15) ** -0.08 + 0.4 * (flops / 1e15) ** -0.3


def bent(depth: float = 0.05) -> Law:
    """A power law with an added bend, which no E + A·C^−alpha has."""
    base = power_law()
    return lambda flops: base(flops) + depth * math.tanh(2 * math.log(flops / 3e13))


@dataclass(frozen=True)
class Arm:
    """A change with a known worth."""

    log_multiplier: Callable[[float], float]
    """ln m as a function of FLOPs."""

    def law(self, base: Law) -> Law:
        return lambda flops: base(flops * math.exp(self.log_multiplier(flops)))


def line(first: float, last: float) -> Arm:
    """ln m is a line in ln C, from ln `first` at 1e12 FLOPs to ln `last` at 1e16."""
    return Arm(lambda flops: math.log(first) + math.log(last / first) * math.log(flops / 1e12) / math.log(1e4))


def other_floor(first: float, last: float) -> Arm:
    """The same ends, for `power_law()`, by a loss that levels off at another E: ln m is bent in between."""
    base, E, rise, alpha = power_law(), 1.8, 1.14, 0.15
    ends = np.array([[1.0, base(1e12) - E], [1.0, base(1e16) - E]])
    shift, share = np.linalg.solve(ends, [base(first * 1e12) - E, base(last * 1e16) - E])

    def log_multiplier(flops: float) -> float:
        above = float(shift + share * (base(flops) - E))
        return math.log((rise / above) ** (1 / alpha) * 1e15 / flops)

    return Arm(log_multiplier)


UNCHANGED, CONSTANT, SHRINKING, REVERSING = line(1, 1), line(1.15, 1.15), line(1.3, 1.05), line(1.3, 0.83)
BARELY = line(1.02, 1.02)  # exactly the least useful gain: the hardest case for the level
LEVELLING = other_floor(1.3, 1.0)


@dataclass(frozen=True)
class Design:
    """Compute, seeds and noise of a ladder's runs."""

    flops: tuple[float, ...]
    seeds: int = 3
    sd: float = 0.005
    """Standard deviation of one run's loss, in nats."""
    correlation: float = 0.0
    """Correlation of baseline and arm of the same seed."""
    growth: float = 1.0
    """sd at the largest rung over that at the smallest."""
    target: float = 1e16

    @classmethod
    def spanning(cls, rungs: int, decades: float, **more: float) -> "Design":
        """Rungs evenly in ln C up to 1e15 FLOPs."""
        return cls(tuple(np.geomspace(1e15 / 10**decades, 1e15, rungs)), **more)  # pyright: ignore[reportArgumentType]


LONG = Design.spanning(5, 3.0)
SHORT = Design.spanning(4, 1.5)


def draw(design: Design, base: Law, arms: Mapping[str, Arm], random: np.random.Generator) -> list[RunResult]:
    """Draw one ladder: the baseline and each arm at every rung and seed."""
    results: list[RunResult] = []
    laws = {BASELINE: base, **{name: arm.law(base) for name, arm in arms.items()}}
    sds = design.sd * np.geomspace(design.growth**-0.5, design.growth**0.5, len(design.flops))
    own, shared = math.sqrt(1 - design.correlation), math.sqrt(design.correlation)
    for k, flops in enumerate(design.flops):
        common = random.standard_normal(design.seeds)
        for name, law in laws.items():
            noise = sds[k] * (shared * common + own * random.standard_normal(design.seeds))
            parameters = round(math.sqrt(flops / 120))
            results += [
                RunResult(name, f"r{k}", seed, flops, parameters, 20 * parameters, law(flops) + float(noise[seed]), 1.0)
                for seed in range(design.seeds)
            ]
    return results


# Many ladders


@dataclass
class Tally:
    """Counts for one arm over many ladders."""

    truth: float
    """Multiplier at the target."""
    ladders: int = 0
    known: int = 0
    """Number of ladders with an interval at the target."""
    covered: int = 0
    covered_by_other_floor: int = 0
    wrong: int = 0
    """Number of promotions below min_gain and of rejections at or above it."""
    decisions: Counter[str] = field(default_factory=Counter)
    trends: Counter[str] = field(default_factory=Counter)

    def add(self, judged: Verdict, criterion: Criterion) -> None:
        worth_it = self.truth >= criterion.min_gain - 1e-12
        self.ladders += 1
        self.known += judged.multiplier.value is not None
        self.covered += covers(judged.multiplier, self.truth)
        self.covered_by_other_floor += covers(judged.other_floor, self.truth)
        self.wrong += judged.decision == ("reject" if worth_it else "promote")
        self.decisions[judged.decision] += 1
        self.trends[judged.trend] += 1

    def share(self, name: str) -> float:
        """Share of ladders with this decision or trend."""
        return (self.decisions[name] + self.trends[name]) / self.ladders

    @property
    def coverage(self) -> float:
        return self.covered / self.known if self.known else math.nan


@dataclass
class Simulated:
    """Counts for all arms, and for the baseline's fit."""

    arms: dict[str, Tally]
    fits: int = 0
    refused: int = 0
    """Number of ladders to whose baseline no curve could be fitted."""
    E_covered: int = 0
    alpha_covered: int = 0
    prediction_covered: int = 0


def covers(interval: Interval, truth: float) -> bool:
    """True if the interval contains the truth. An unknown end is infinite; without a value there is no interval."""
    low = -math.inf if interval.low is None else interval.low
    high = math.inf if interval.high is None else interval.high
    return interval.value is not None and low <= truth <= high


def simulate(
    design: Design, arms: Mapping[str, Arm], count: int, base: Law | None = None, seed: int = 0,
    criterion: Criterion | None = None, E: float = 1.8, alpha: float = 0.15,
) -> Simulated:  # fmt: skip
    """Draw and judge `count` ladders. Arms count as unchanged, so each is judged at the criterion's own level."""
    base, criterion = base or power_law(), criterion or Criterion()
    random = np.random.Generator(np.random.Philox(seed))
    done = Simulated({name: Tally(math.exp(arm.log_multiplier(design.target))) for name, arm in arms.items()})
    for _ in range(count):
        results = draw(design, base, arms, random)
        outcome = base(design.target) + design.sd * float(random.standard_normal())
        try:
            fit = fits.fit_curve(results, criterion.level, second_opinion=False)
        except FitError:
            done.refused += 1
            continue
        done.fits += 1
        done.E_covered += covers(fit.E, E)
        done.alpha_covered += covers(fit.alpha, alpha)
        predicted = fits.predict(results, design.target, level=criterion.level).predicted
        done.prediction_covered += covers(predicted, outcome)
        verdicts = verdict.judge(
            results, criterion, design.target, fit=fit, arms=list(arms), unchanged=arms.keys(), remedies=False
        )
        for judged in verdicts:
            done.arms[judged.arm].add(judged, criterion)
    return done
