"""What each arm is worth at the target, and whether to promote it.

Two errors are held under the criterion's level, each by a one-sided bound: promoting an arm that is worth less than
min_gain, and rejecting one that is worth it. Both bounds are Bonferroni-corrected for the arms that were tried and for
the looks; an arm that changes nothing on purpose is judged by the same rule and does not count. Both must hold for
either form of extrapolation (trainer/ladder/stats/multiplier.py). What is left in between is inconclusive.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.multiplier import Estimate, ExtraRuns, Line, Noise, OtherFloor, at_rungs
from trainer.ladder.stats.pairs import Baseline, match, pairing_of
from trainer.ladder.stats.records import (
    BASELINE,
    Criterion,
    Curve,
    CurveFit,
    Decision,
    Interval,
    Remedy,
    RungMultiplier,
    RunResult,
    Trend,
    Verdict,
)
from trainer.show.units import scientific

MOST_SEEDS = 64
"""ExtraRuns than so many further seeds are no advice."""
REACH = 10.0
"""Crossings are told from the smallest rung to this times the target."""


def judge(
    results: Sequence[RunResult], criterion: Criterion, target_flops: float, *,
    fit: CurveFit | None = None, arms: Sequence[str] | None = None, unchanged: Collection[str] = (),
    remedies: bool = True,
) -> list[Verdict]:  # fmt: skip
    """One verdict for each of `arms` (default: those that have results, in their order).

    `target_flops` is the baseline's compute at the target; `unchanged` names arms that are no change (A/A). Without
    `remedies`, nothing is planned for inconclusive ones, which takes most of the time. Raises FitError where the
    baseline has no curve.
    """
    fit = fit or fits.fit_curve(results, criterion.level, second_opinion=False)
    names = list(arms) if arms is not None else list(dict.fromkeys(one.arm for one in results if one.arm != BASELINE))
    tried = max(sum(name not in unchanged for name in names), 1)
    bound_level = criterion.level / tried / criterion.looks
    baseline = Baseline.from_results(results, fit)
    judgements = [Judgement(baseline, results, name, criterion, target_flops, bound_level) for name in names]
    return [one.verdict(remedies) for one in judgements]


class Judgement:
    """One arm against the baseline."""

    def __init__(
        self, baseline: Baseline, results: Sequence[RunResult], arm: str, criterion: Criterion, target_flops: float,
        bound_level: float,
    ) -> None:  # fmt: skip
        self._baseline, self._arm, self._criterion = baseline, arm, criterion
        self._target, self._level = target_flops, bound_level
        self._diverged = [one for one in results if one.arm == arm and not math.isfinite(one.loss)]
        self._rungs = list(match(results, arm, baseline))
        mine = dict.fromkeys(one.rung for one in results if one.arm == arm)
        self._alone = [rung for rung in mine if rung not in baseline.rungs.names]
        self._pairs = [one.arrays() for one in self._rungs if one.usable]
        self._noise = Noise.from_pairs(self._pairs) if self._pairs else Noise(0.0, 0.0, 0.0, 0)
        self._line = self._line_with(baseline.fit.curve)
        self._other = self._other_with(baseline.fit.curve)

    def _line_with(self, curve: Curve) -> Line | None:
        if not self._compares_at(curve):
            return None
        return Line(self._pairs, curve, self._baseline.influence, self._noise)

    def _other_with(self, curve: Curve) -> OtherFloor | None:
        if not self._compares_at(curve):
            return None
        return OtherFloor(self._pairs, curve, self._baseline.influence, self._noise, self._target)

    def _compares_at(self, curve: Curve) -> bool:
        """Whether there is something to extrapolate. To leave out a rung for its low loss would be to judge by it."""
        known = [one for one in self._rungs if one.pairs]
        enough = len(known) >= fits.FEWEST_RUNGS and all(one.usable for one in known)
        return enough and all(one.above(curve.E) for one in self._pairs)

    # What decides

    @property
    def _least(self) -> float:
        return math.log(self._criterion.min_gain)

    @cached_property
    def _bounds(self) -> tuple[float, float] | None:
        """(lower, upper) of ln m at the target that both forms grant."""
        if self._line is None or self._other is None:
            return None
        estimate = self._line.multiplier_at(self._target)
        lower, upper = ([form.bound(self._level, side) for form in (estimate, self._other)] for side in (-1, 1))
        return min(lower), max(upper)

    @cached_property
    def _slowdown(self) -> Estimate | None:
        return _mean_of_rungs([one.log_seconds(per_token=True) for one in self._rungs])

    @cached_property
    def _seconds(self) -> Estimate | None:
        return _mean_of_rungs([one.log_seconds(per_token=False) for one in self._rungs])

    def _flips(self, promote: bool) -> bool:
        """Whether the estimate changes sides of min_gain within the interval of (E, alpha)."""
        for curve in self._baseline.extremes():
            line = self._line_with(curve)
            if line is None or (line.multiplier_at(self._target).value >= self._least) != promote:
                return True
        return False

    def _decide(self) -> tuple[Decision, str]:
        most, slow = math.log(self._criterion.max_slowdown), self._slowdown
        if slow is not None and slow.bound(self._level, -1) > most:
            return "reject", (
                f"a step takes at least {_times(slow.bound(self._level, -1))} as long as the baseline's, "
                f"more than the {self._criterion.max_slowdown:g}× allowed."
            )
        bounds = self._bounds
        if bounds is None:
            return "inconclusive", self._why_no_line()
        lower, upper = bounds
        if upper < self._least and not self._flips(promote=False):
            return (
                "reject",
                f"at the target it is worth at most {_times(upper)}, less than {self._wanted}{self._story()}.",
            )
        if lower >= self._least and not self._diverged and not self._flips(promote=True):
            return self._promote(lower, slow, most)
        return "inconclusive", self._why_inconclusive(lower, upper)

    def _promote(self, lower: float, slow: Estimate | None, most: float) -> tuple[Decision, str]:
        worth = f"at the target it is worth at least {_times(lower)} the baseline's compute"
        if slow is None:
            return "inconclusive", f"{worth}, but how long its steps take is not known."
        if slow.bound(self._level, 1) > most:
            return "inconclusive", (
                f"{worth}, but a step may take up to {_times(slow.bound(self._level, 1))} as long as the baseline's, "
                f"and {self._criterion.max_slowdown:g}× is allowed."
            )
        return "promote", f"{worth}, and a step takes {_times(slow.value)} as long."

    @property
    def _wanted(self) -> str:
        return f"the {self._criterion.min_gain:g}× that would be useful"

    def _why_no_line(self) -> str:
        low = [one for one in self._rungs if one.pairs and not one.usable]
        if low:
            return f"at {low[0].name} {low[0].gap}, where no amount of compute compares."
        return f"it can be compared at {len(self._pairs)} rungs, and a trend needs three."

    def _why_inconclusive(self, lower: float, upper: float) -> str:
        if upper < self._least or (lower >= self._least and not self._diverged):
            return "the answer changes sides within what the baseline's runs leave open for E and alpha."
        if lower >= self._least:
            where = ", ".join(f"{one.rung} seed {one.seed}" for one in self._diverged)
            return f"the runs that finished are good enough, but its loss was not finite at {where}."
        assert self._line is not None and self._other is not None
        line, other = self._line.multiplier_at(self._target), self._other
        if line.bound(self._level, -1) >= self._least:
            return (
                f"as a line its gain would hold, but if its loss levels off elsewhere than the baseline's "
                f"it may be worth only {_times(lower)} at the target."
            )
        if line.bound(self._level, 1) < self._least <= other.bound(self._level, 1):
            return (
                f"as a line its gain falls short, but if its loss levels off elsewhere than the baseline's "
                f"it may be worth {_times(upper)} at the target."
            )
        return f"at the target it may be worth anything from {_times(lower)} to {_times(upper)}{self._story()}."

    def _story(self) -> str:
        crossing = self._crossing
        if crossing is None or crossing.value is None or self._trend not in ("shrinks", "reverses"):
            return ""
        return f"; what it gains is gone at {scientific(crossing.value)} FLOPs"

    # What would settle it

    def _remedies(self) -> list[Remedy]:
        bounds = self._bounds
        if self._line is None or bounds is None or self._diverged:
            return []
        seeds, sizes = int(np.median(self._line.pairs)), self._further_sizes(self._line)
        if bounds[0] >= self._least or bounds[1] < self._least:  # told already, but for E and alpha, or for time
            told = self._flips(promote=bounds[0] >= self._least)
            return [Remedy("rung", seeds, sizes[0])] if told and sizes else []
        found = []
        if not self._line.widened and self._settled(
            ExtraRuns(seeds=MOST_SEEDS)
        ):  # more seeds bring no rung to the line
            few = next(n for n in range(1, MOST_SEEDS + 1) if self._settled(ExtraRuns(seeds=n)))
            found.append(Remedy("seeds", few, None))
        rungs = ((size, pairs) for pairs in (seeds, 2 * seeds, 4 * seeds) for size in sizes)
        settling = next((rung for rung in rungs if self._settled(ExtraRuns(rung=rung))), None)
        return [*found, Remedy("rung", settling[1], settling[0])] if settling else found

    def _further_sizes(self, line: Line) -> list[float]:
        """FLOPs of possible further rungs: on in the ladder's own steps, the last one at the target."""
        x, goal, sizes = float(line.x[-1]), math.log(self._target), []
        while x < goal - 1e-9:
            x += float(np.mean(np.diff(line.x)))
            sizes.append(math.exp(x) if x < goal - 1e-9 else self._target)
        return sizes

    def _settled(self, more: ExtraRuns) -> bool:
        assert self._line is not None and self._other is not None
        line = self._line.planned(self._target, more)
        lower, upper = (
            (line.bound(self._level, side), self._other.planned_bound(self._level, side, more)) for side in (-1, 1)
        )
        return min(lower) >= self._least or max(upper) < self._least

    # What is told

    def verdict(self, remedies: bool = True) -> Verdict:
        decision, why = self._decide()
        level, bounds = self._criterion.level, self._bounds
        worth = _interval(self._line and self._line.multiplier_at(self._target), level)
        seconds = self._wall_clock()
        both_known = worth.value is not None and seconds.value is not None
        verdict = Verdict(
            arm=self._arm, decision=decision, why=why[0].upper() + why[1:], trend=self._trend,
            target_flops=self._target, multiplier=worth, other_floor=_interval(self._other, level),
            lower=_exp(bounds[0]) if bounds else None, upper=_exp(bounds[1]) if bounds else None,
            bound_level=self._level, slope=self._slope(), crossing=self._crossing, rungs=self._rung_multipliers(),
            slowdown=_interval(self._slowdown, level), wall_clock=seconds,
            faster_per_flop_slower_per_second=both_known and worth.value > 1 > seconds.value,  # pyright: ignore
            lack_of_fit_p=self._line.lack_of_fit_p if self._line else None, pairing=pairing_of(self._noise),
            remedies=self._remedies() if remedies and decision == "inconclusive" else [],
        )  # fmt: skip
        return replace(verdict, notes=list(self._notes(verdict)))

    def _slope(self) -> Interval:
        level = self._criterion.level
        if self._line is None:
            return Interval(None, None, None, level)
        slope = self._line.slope
        return Interval(slope.value, slope.bound(level / 2, -1), slope.bound(level / 2, 1), level)

    @cached_property
    def _trend(self) -> Trend:
        if self._line is None:
            return "unknown"
        half, slope = self._criterion.level / 2, self._line.slope
        if slope.bound(half, -1) > 0:
            return "grows"
        if slope.bound(half, 1) < 0:
            first, last = self._line.multiplier_at(self._pairs[0].flops), self._line.multiplier_at(self._target)
            return "reverses" if first.bound(half, -1) > 0 > last.bound(half, 1) else "shrinks"
        middle = self._line.middle
        return "none" if middle.bound(half, -1) <= 0 <= middle.bound(half, 1) else "persists"

    @cached_property
    def _crossing(self) -> Interval | None:
        if self._line is None or self._trend in ("none", "persists"):
            return None
        reach = (float(self._line.x[0]), math.log(self._target * REACH))
        found = self._line.crossing(self._criterion.level, reach)
        if found is None:
            return None
        value, low, high = (_exp(one) for one in found)
        return Interval(value, low, high, self._criterion.level)

    def _wall_clock(self) -> Interval:
        """m·(C_arm / C_base) / (seconds' ratio), compute's ratio as at the largest rung."""
        level = self._criterion.level
        if self._line is None or self._seconds is None:
            return Interval(None, None, None, level)
        worth, seconds = self._line.multiplier_at(self._target), self._seconds
        value = worth.value + float(self._pairs[-1].log_cost.mean()) - seconds.value
        half = math.hypot(*(one.bound(level / 2, 1) - one.value for one in (worth, seconds)))
        return Interval(_exp(value), _exp(value - half), _exp(value + half), level)

    def _rung_multipliers(self) -> list[RungMultiplier]:
        fit, level = self._baseline.fit, self._criterion.level
        known = at_rungs(self._pairs, fit.curve, self._baseline.influence, self._noise)
        estimates = dict(zip((one.rung for one in self._pairs), known, strict=True))
        positions = {one.rung: k for k, one in enumerate(self._pairs)}
        rows = []
        for rung in self._rungs:
            estimate, seconds = estimates.get(rung.name), _mean(rung.log_seconds(per_token=False))
            without = self._line.without(positions[rung.name], self._target) if self._line and estimate else None
            wall, arrays = None, rung.arrays() if rung.pairs else None
            if estimate and arrays and seconds is not None:
                wall = estimate.value + float(arrays.log_cost.mean()) - seconds
            rows.append(
                RungMultiplier(
                    rung.name, rung.flops, len(rung.pairs), _interval(estimate, level), _exp(wall),
                    _exp(_mean(rung.log_seconds(per_token=True))),
                    float((arrays.arm - arrays.base).mean()) if arrays else None,
                    pairing_of(Noise.from_pairs([arrays])).ratio if arrays else None, _exp(without), rung.gap,
                )
            )  # fmt: skip
        return rows

    def _notes(self, verdict: Verdict) -> Iterator[str]:
        for rung in self._rungs:
            if rung.gap:
                yield f"{rung.name}: {rung.gap}."
        for rung in self._alone:
            yield f"{rung}: the baseline has no finished run there."
        for one in self._diverged:
            yield f"{one.rung} seed {one.seed}: its loss was not finite."
        if self._line and self._line.widened:
            yield "The rungs do not lie on a line within seed noise; intervals come from their scatter about it."
        if not self._noise.freedom and self._pairs:
            yield "No rung has two seeds: noise is only known from the rungs' scatter about a line."
        if not self._baseline.fit.E_determined:
            yield "The baseline's E is badly determined."
        if verdict.faster_per_flop_slower_per_second:
            yield (
                f"Better per FLOP and slower per second: {verdict.multiplier.value:.3g}× of compute is "
                f"{verdict.wall_clock.value:.3g}× of time."
            )


# Small things


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_of_rungs(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """Their mean, by what rungs differ; by what the pairs of one differ where only one is known. None if too few.

    Taken as the same at every size: where it is not, the error is larger.
    """
    known = [group for group in groups if group]
    values = [math.fsum(group) / len(group) for group in known] if len(known) > 1 else [*known[0]] if known else []
    if len(values) < 2:
        return None
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def _exp(value: float | None) -> float | None:
    """None for what is unknown or too large to mean anything."""
    return math.exp(value) if value is not None and value < 100 else None


def _times(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.3g}×" if log_ratio < math.log(1e4) else "any number of times"


def _interval(estimate: Estimate | OtherFloor | None, level: float) -> Interval:
    """Two-sided, of a ratio whose logarithm was estimated."""
    if estimate is None:
        return Interval(None, None, None, level)
    low, high = (estimate.bound(level / 2, side) for side in (-1, 1))
    return Interval(_exp(estimate.value), _exp(low) if low > -math.inf else None, _exp(high), level)
