"""Synthetic ladders with a known truth, to test the ladder's statistics."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize

from trainer.errors import FitError
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import planes, significance, verdict
from trainer.ladder.stats.records import BASELINE, Criterion, Interval, Remedy, RunResult
from trainer.ladder.stats.repetition import Repetition
from trainer.ladder.stats.worth import LINE, Baselines, Worths, decisions

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


PARAMETERS = 1e9
"""Size of the models of ladders over data."""


def of_text(epochs: float, parameters: float = PARAMETERS) -> Law:
    """Loss as a function of unique text, by the law that was published for C4 (Muennighoff et al. 2023).

    Not the form that ladders fit: what more text is worth to a model of one size changes along the rungs.
    """
    law = Repetition(
        1.87, 521.0, 1488.0, 0.353, Interval(15.39, None, None), Interval(5.31, None, None), 0, None
    )  # fmt: skip
    return lambda unique: float(law.loss_at(np.array(parameters), np.array(unique * epochs), np.array(unique)))


def instead(base: Law, other: Law) -> Arm:
    """An arm with a law of its own: its worth is the amount at which the baseline has its loss, over its own."""

    def log_multiplier(amount: float) -> float:
        goal = other(amount)
        there = optimize.brentq(lambda x: base(math.exp(x)) - goal, math.log(1e2), math.log(1e24), xtol=1e-9)
        assert isinstance(there, float)
        return there - math.log(amount)

    return Arm(log_multiplier)


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


def fading(first: float, constant: float, gamma: float) -> Arm:
    """ln m fades from ln `first` at 1e12 FLOPs to ln `constant`, as compute to the power −gamma."""
    return Arm(lambda flops: math.log(constant) + math.log(first / constant) * (flops / 1e12) ** -gamma)


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
SEVEN = Design.spanning(7, 3.0)
TEXT = Design(tuple(np.geomspace(1e8, 1e10, 5)), target=3e10)
"""Tokens of unique text."""
TEXT_ARMS = {
    "A/A": UNCHANGED,
    "1.15× the text": CONSTANT,
    "1.02× the text": BARELY,
    "16 epochs, not 4": instead(of_text(4), of_text(16)),
    "1 epoch, not 4": instead(of_text(4), of_text(1)),
    "half the parameters": instead(of_text(4), of_text(4, PARAMETERS / 2)),
}


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


@dataclass(frozen=True)
class Trouble:
    """Further errors that a ladder's runs may have; sd in nats."""

    own: float = 0.0  # sd of an effect of each rung of each arm, and of the baseline
    shared: float = 0.0  # sd of an effect of each rung that all arms share
    exponent: float = 0.0  # a run's sd is proportional to compute to this power
    heavy_tails: bool = False  # Student's t with 3 degrees of freedom
    outlier: float = 0.0  # one run of the ladder is off by so many sd
    added: int = 0  # further seeds at the largest rung alone


def draw_many(
    design: Design, base: Law, arms: Mapping[str, Arm], count: int, random: np.random.Generator,
    trouble: Trouble = Trouble(),
) -> np.ndarray:  # fmt: skip
    """Losses of `count` ladders, shape (ladders, 1 + arms, rungs, seeds), the baseline's first."""
    flops, shape = np.array(design.flops), (count, 1 + len(arms), len(design.flops), design.seeds + trouble.added)
    sds = design.sd * (flops / np.exp(np.log(flops).mean())) ** trouble.exponent
    common, own = (
        random.standard_t(3, each) / math.sqrt(3) if trouble.heavy_tails else random.standard_normal(each)
        for each in ((count, 1, *shape[2:]), shape)
    )
    noise = (math.sqrt(design.correlation) * common + math.sqrt(1 - design.correlation) * own) * sds[:, None]
    noise += trouble.own * random.standard_normal((*shape[:3], 1))
    noise += trouble.shared * random.standard_normal((count, 1, shape[2], 1))
    off = noise.reshape(count, -1)
    hit = random.integers(0, off.shape[1], count)
    off[np.arange(count), hit] += trouble.outlier * design.sd * random.choice([-1, 1], count)
    noise[:, :, :-1, design.seeds :] = np.nan
    laws = [base, *(arm.law(base) for arm in arms.values())]
    return np.array([[law(point) for point in design.flops] for law in laws])[:, :, None] + noise


@dataclass(frozen=True)
class Shares:
    """Shares of ladders, for one arm."""

    truth: float  # multiplier at the target
    coverage: float
    line_coverage: float  # of the line's own interval
    promote: float
    reject: float
    shrinks: float  # called shrinking or reversing

    def wrong(self, min_gain: float) -> float:
        """Share of promotions below min_gain, or of rejections at or above it."""
        return self.reject if self.truth >= min_gain - 1e-12 else self.promote


@dataclass(frozen=True)
class Simulated:
    arms: dict[str, Shares]
    false_trends: (
        float | None
    )  # share of ladders in which any arm of constant worth has a trend; None without such arms


def simulate(
    design: Design, arms: Mapping[str, Arm], count: int, base: Law | None = None, seed: int = 0,
    trouble: Trouble = Trouble(), level: float = Criterion.level, min_gain: float = Criterion.min_gain,
) -> Simulated:  # fmt: skip
    """Draw and judge `count` ladders by losses. Each arm is judged at `level`, as if it were alone."""
    random = np.random.Generator(np.random.Philox(seed))
    losses = draw_many(design, base or power_law(), arms, count, random, trouble)
    x = np.log(design.flops) - np.log(design.flops).mean()
    target = math.log(design.target) - float(np.log(design.flops).mean())
    base_losses = np.broadcast_to(losses[:, :1], losses[:, 1:].shape)
    worths = Worths.from_pairs(Baselines.fit(x, losses[:, 0]), base_losses, losses[:, 1:])
    found = worths.at(target)
    decided = decisions(worths, target, level, math.log(min_gain))
    slope, variance, freedom = worths.slope()
    p = 2 * significance.student_tail(np.abs(slope) / np.sqrt(variance), freedom)
    called = np.array([significance.false_discovery(each) for each in p]) < level
    half, shares, constant = level / 2, {}, []
    for k, (name, arm) in enumerate(arms.items()):
        # Of this ladder: far beyond it, worths that change here may be constant.
        ends = [arm.log_multiplier(flops) for flops in (design.flops[0], design.target)]
        constant.append(abs(ends[0] - ends[1]) < 1e-9)
        truth = arm.log_multiplier(design.target)
        covered = [
            np.mean((low[:, k] <= truth + 1e-12) & (truth - 1e-12 <= high[:, k]))
            for low, high in (
                (found.bound(half, -1), found.bound(half, 1)),
                (found.bound_of(LINE, half, -1), found.bound_of(LINE, half, 1)),
            )
        ]
        shrinks = np.mean(called[:, k] & (slope[:, k] < 0))
        shares[name] = Shares(
            math.exp(truth), *map(float, (*covered, *(np.mean(decided[:, k] == way) for way in (1, -1)), shrinks))
        )
    flat = [k for k, one in enumerate(constant) if one]
    only = np.array([significance.false_discovery(each) for each in p[:, flat]]) < level if flat else None
    return Simulated(shares, None if only is None else float(only.any(-1).mean()))


# Parameters and tokens apart

Worth = Callable[[float, float], float]
"""Multiplier of an arm at N and D, at the same tokens per parameter."""
APART = [(n, ratio * n) for n in (1e7, 3e7, 1e8, 3e8, 1e9) for ratio in (5.0, 20.0, 80.0)]
APART_TARGET, APART_MIX = 1e21, math.log(20)


def surface_law(n: float, d: float) -> float:
    """Loss in nats at N and D, as of Hoffmann et al. 2022."""
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


def draw_apart(
    arms: Mapping[str, Worth], random: np.random.Generator, sd: float = 0.002, seeds: int = 1, own: float = 0.0
) -> list[RunResult]:
    """Draw the baseline and each arm at every size of APART; `own` is the sd of an effect of each size of each arm."""
    found = []
    for n, d in APART:
        for arm, worth in {BASELINE: lambda n, d: 1.0, **arms}.items():
            scale = math.sqrt(worth(n, d))
            mean = surface_law(n * scale, d * scale) + own * float(random.standard_normal())
            for seed in range(seeds):
                loss, size = mean + sd * float(random.standard_normal()), f"{n:g} × {d:g}"
                found.append(RunResult(arm, size, seed, 6 * n * d, round(n), round(d), loss, 1.0))
    return found


def simulate_apart(
    arms: Mapping[str, Worth], count: int, seed: int = 0, sd: float = 0.003, seeds: int = 1, own: float = 0.0,
    level: float = Criterion.level, min_gain: float = Criterion.min_gain,
) -> dict[str, Shares]:  # fmt: skip
    """Draw and judge `count` ladders by losses, each arm at `level`, for the tokens per parameter of APART_MIX."""
    random, half = np.random.Generator(np.random.Philox(seed)), level / 2
    n = math.sqrt(APART_TARGET / 6 / math.exp(APART_MIX))
    truths = np.log([worth(n, n * math.exp(APART_MIX)) for worth in arms.values()])
    found = []
    for _ in range(count):
        results = draw_apart(arms, random, sd, seeds, own)
        sizes = planes.SurfaceBaseline.from_results(results, APART_TARGET, level, APART_MIX)
        worths = sizes.compare([list(sizes.match(results, arm)) for arm in arms])
        x = math.log(APART_TARGET / sizes.scale)
        at, decided = worths.at(x), decisions(worths, x, level, math.log(min_gain))
        ends = [(at.bound(half, -1), at.bound(half, 1)), (at.bound_of(LINE, half, -1), at.bound_of(LINE, half, 1))]
        covered = [(low <= truths + 1e-12) & (truths - 1e-12 <= high) for low, high in ends]
        found.append([*covered, decided == 1, decided == -1])
    covered, by_line, promote, reject = np.mean(found, axis=0)
    return {
        arm: Shares(
            math.exp(truths[k]), float(covered[k]), float(by_line[k]), float(promote[k]), float(reject[k]), math.nan
        )
        for k, arm in enumerate(arms)
    }


# Many looks

LOOKS = 12
RULES = ("at the end alone", "each at the whole level", f"looks = {LOOKS}", 'looks = "any"')


@dataclass(frozen=True)
class Looked:
    """Shares of ladders that are read after each seed until they decide."""

    promote: list[float]  # by each look
    reject: list[float]


def look_often(
    design: Design, arm: Arm, count: int, seed: int = 0, level: float = Criterion.level,
    min_gain: float = Criterion.min_gain,
) -> dict[str, Looked]:  # fmt: skip
    """Read `count` ladders after each of LOOKS seeds, by each of RULES; the first decision stands."""
    random = np.random.Generator(np.random.Philox(seed))
    losses = draw_many(replace(design, seeds=LOOKS), power_law(), {"arm": arm}, count, random)
    x = np.log(design.flops) - np.log(design.flops).mean()
    target = math.log(design.target) - float(np.log(design.flops).mean())
    first = {rule: np.zeros(count, dtype=int) for rule in RULES}
    found: dict[str, list[list[float]]] = {rule: [] for rule in RULES}
    for seeds in range(1, LOOKS + 1):
        known = losses[..., :seeds]
        worths = Worths.from_pairs(Baselines.fit(x, known[:, 0]), known[:, :1], known[:, 1:])
        levels = (level, level, level / LOOKS, significance.anytime_level(level, float(len(x) * seeds)))
        for rule, one in zip(RULES, levels, strict=True):
            if rule == RULES[0] and seeds < LOOKS:
                continue
            decided = decisions(worths, target, one, math.log(min_gain))[:, 0]
            first[rule] = np.where(first[rule] == 0, decided, first[rule])
            found[rule].append([float(np.mean(first[rule] == way)) for way in (1, -1)])
    return {rule: Looked(*map(list, zip(*shares, strict=True))) for rule, shares in found.items()}


# Further runs


@dataclass(frozen=True)
class Drawn:
    """A ladder with one arm, from which further runs can be drawn."""

    design: Design
    arm: Arm
    effects: Mapping[tuple[str, str], float]
    """Effect of each (arm, rung) on the losses of its runs, in nats."""

    def runs(self, rungs: Mapping[str, float], seeds: int, first: int, random: np.random.Generator) -> list[RunResult]:
        """Draw runs at these rungs: {name: FLOPs}."""
        found = []
        for name, flops in rungs.items():
            design = replace(self.design, flops=(flops,), seeds=seeds)
            for run in draw(design, power_law(), {"arm": self.arm}, random):
                loss = run.loss + self.effects[run.arm, name]
                found.append(replace(run, rung=name, seed=first + run.seed, loss=loss))
        return found

    def bought(self, remedy: Remedy, random: np.random.Generator) -> list[RunResult]:
        """Draw the further runs that a remedy asks for."""
        rungs = {f"r{k}": flops for k, flops in enumerate(self.design.flops) if remedy.rung in (None, f"r{k}")}
        return self.runs(rungs if remedy.flops is None else {"new": remedy.flops}, remedy.seeds, 100, random)


def some_ladder(random: np.random.Generator, effects: bool) -> Drawn:
    """Draw a ladder such as people make: its shape, seeds and noise, and an arm of any form.

    With `effects`, seeds have a share of a rung's noise that is drawn from the prior of the noise model.
    """
    sd = float(np.exp(random.uniform(np.log(0.002), np.log(0.015))))
    design = replace(
        (LONG, SHORT, SEVEN)[random.integers(3)], seeds=int(random.integers(1, 4)), sd=sd,
        correlation=float(random.choice([0.0, 0.5])),
    )  # fmt: skip
    last, change = np.exp(random.normal(0.03, 0.12)), np.exp(random.normal(0.0, 0.15))
    first, gamma = last * change, float(random.choice([0.2, 0.3, 0.5]))
    arms = (line(last, last), line(first, last), fading(first, last, gamma), other_floor(first, last))
    share = max(float(random.beta(0.3, 0.3)), 0.02) if effects else 1.0
    own = sd * math.sqrt((1 / share - 1) * (1 - design.correlation) / design.seeds)
    names = [*(f"r{k}" for k in range(len(design.flops))), "new"]
    drawn = {(arm, name): own * float(random.standard_normal()) for arm in (BASELINE, "arm") for name in names}
    return Drawn(design, arms[random.integers(len(arms))], drawn)


@dataclass(frozen=True)
class Followed:
    """Ladders with an open verdict whose first advice was followed."""

    open: int
    advised: int
    stated: float  # mean of the probabilities that were told
    settled: float  # share that was settled
    wrong: float  # share that was then decided wrongly


def follow(count: int, effects: bool, seed: int = 0) -> Followed:
    """Draw ladders until `count` are open and have advice, follow it, and judge again."""
    random = np.random.Generator(np.random.Philox(seed))
    number, stated, settled, wrong = 0, [], [], []
    while len(stated) < count:
        drawn = some_ladder(random, effects)
        rungs = {f"r{k}": flops for k, flops in enumerate(drawn.design.flops)}
        results = drawn.runs(rungs, drawn.design.seeds, 0, random)
        with contextlib.suppress(FitError):  # a baseline whose loss does not fall
            (found,) = verdict.judge(results, Criterion(), drawn.design.target)
            if found.decision != "inconclusive":
                continue
            number += 1
            advised = next((remedy for remedy in found.remedies if remedy.probability is not None), None)
            if advised is None:
                continue
            results += drawn.bought(advised, random)
            (then,) = verdict.judge(results, Criterion(), drawn.design.target, remedies=False)
            decided = then.decision != "inconclusive"
            worth_it = drawn.arm.log_multiplier(drawn.design.target) >= math.log(Criterion.min_gain)
            stated.append(advised.probability)
            settled.append(decided)
            wrong.append(decided and (then.decision == "promote") != worth_it)
    return Followed(number, count, *(float(np.mean(values)) for values in (stated, settled, wrong)))


@dataclass(frozen=True)
class Covered:
    """Shares of ladders whose intervals held the truth, of those with a curve."""

    fits: int
    E: float
    alpha: float
    prediction: float


def simulate_fits(
    design: Design, count: int, base: Law | None = None, seed: int = 0, E: float = 1.8, alpha: float = 0.15
) -> Covered:
    """Fit `count` baselines."""
    random, base, held = np.random.Generator(np.random.Philox(seed)), base or power_law(), []
    for _ in range(count):
        results = draw(design, base, {}, random)
        outcome = base(design.target) + design.sd * float(random.standard_normal())
        with contextlib.suppress(FitError):
            fit = fits.fit_curve(results, second_opinion=False)
            predicted = fits.predict(results, design.target).predicted
            held.append([covers(fit.E, E), covers(fit.alpha, alpha), covers(predicted, outcome)])
    return Covered(len(held), *map(float, np.mean(held, axis=0)))


def covers(interval: Interval, truth: float) -> bool:
    """True if the interval contains the truth. An unknown end is infinite; without a value there is no interval."""
    low = -math.inf if interval.low is None else interval.low
    high = math.inf if interval.high is None else interval.high
    return interval.value is not None and low <= truth <= high
