"""The worth of each arm at the target, and the verdict: promote, reject or inconclusive.

Two error probabilities are held below the criterion's level, each by a one-sided bound: promoting an arm that is worth
less than min_gain, and rejecting an arm that is worth at least that. Both bounds are Bonferroni-corrected for the
number of arms tried and for the looks; an A/A arm is judged by the same rule and not counted. Both bounds must hold
under either form of extrapolation (trainer/ladder/stats/multiplier.py). Everything in between is inconclusive.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import records
from trainer.ladder.stats.multiplier import Estimate, ExtraRuns, Line, Noise, OtherFloor
from trainer.ladder.stats.pairs import Baseline, MatchedRung, can_extrapolate
from trainer.ladder.stats.records import Criterion, CurveFit, Interval, RunResult, Trend, Verdict
from trainer.show.units import scientific

MOST_SEEDS = 64  # Advice to add more seeds than this is not given
REACH = 10.0  # Crossings are reported from the smallest rung to this multiple of the target


def judge(
    results: Sequence[RunResult], criterion: Criterion, target_flops: float, *,
    fit: CurveFit | None = None, arms: Sequence[str] | None = None, unchanged: Collection[str] = (),
    remedies: bool = True,
) -> list[Verdict]:  # fmt: skip
    """Return one verdict for each of `arms` (default: all arms in `results`, in their order).

    `target_flops` is the baseline's compute at the target; `unchanged` names the A/A arms. Planning the remedies of
    inconclusive verdicts takes most of the time; `remedies=False` skips it. Raises FitError if the baseline has no
    curve.
    """
    fit = fit or fits.fit_curve(results, criterion.level, second_opinion=False)
    if arms is None:
        arms = list(dict.fromkeys(result.arm for result in results if result.arm != records.BASELINE))
    tried = max(sum(name not in unchanged for name in arms), 1)
    bound_level = criterion.level / tried / criterion.looks
    baseline = Baseline.from_results(results, fit)
    return [Judgement(baseline, results, arm, criterion, target_flops, bound_level).verdict(remedies) for arm in arms]


class Judgement:
    """One arm compared with the baseline."""

    def __init__(
        self, baseline: Baseline, results: Sequence[RunResult], arm: str, criterion: Criterion, target_flops: float,
        bound_level: float,
    ) -> None:  # fmt: skip
        self._baseline, self._arm, self._criterion = baseline, arm, criterion
        self._target, self._level, self._least = target_flops, bound_level, math.log(criterion.min_gain)
        arm_results = [result for result in results if result.arm == arm]
        self._diverged = [result for result in arm_results if not math.isfinite(result.loss)]
        self._rungs = list(baseline.match(results, arm))
        self._without_baseline = [
            rung for rung in dict.fromkeys(result.rung for result in arm_results) if rung not in baseline.rungs.names
        ]
        self._comparison = baseline.compare(self._rungs)
        self.line: Line | None = None
        self._other: OtherFloor | None = None
        if can_extrapolate(self._rungs):
            self.line, self._other = Line(self._comparison), OtherFloor(self._comparison, target_flops)

    # The decision

    @cached_property
    def _bounds(self) -> tuple[float, float] | None:
        """(lower, upper) bound of ln m at the target that hold under both forms."""
        if self.line is None or self._other is None:
            return None
        estimate = self.line.multiplier_at(self._target)
        lower, upper = ([form.bound(self._level, side) for form in (estimate, self._other)] for side in (-1, 1))
        return min(lower), max(upper)

    @cached_property
    def _slowdown(self) -> Estimate | None:  # ln of seconds per token, arm over baseline
        return _mean_of_rungs([rung.log_seconds(per_token=True) for rung in self._rungs])

    def _depends_on_curve(self, worth_it: bool) -> bool:
        """True if the estimate falls on the other side of min_gain for an (E, alpha) inside their interval."""
        for curve in self._baseline.extreme_curves():
            # A loss below this curve's floor has no multiplier: then anything is possible.
            if any(min(rung.base.min(), rung.arm.min()) <= curve.E for rung in self._comparison.rungs):
                return True
            line = Line(replace(self._comparison, curve=curve))
            if (line.multiplier_at(self._target).value >= self._least) != worth_it:
                return True
        return False

    def _decide(self) -> tuple[records.Decision, str]:
        """Return the decision and its reason."""
        # Too slow a step rejects an arm whatever it is worth in compute.
        slowdown = self._slowdown
        allowed = f"{self._criterion.max_slowdown:g}×"
        most = math.log(self._criterion.max_slowdown)
        if slowdown is not None and (fastest := slowdown.bound(self._level, -1)) > most:
            return "reject", (
                f"a step takes at least {_times(fastest)} as long as the baseline's, more than the {allowed} allowed."
            )
        if self._bounds is None:
            if low := [rung for rung in self._rungs if rung.pairs and not rung.usable]:
                return "inconclusive", f"at {low[0].name} {low[0].gap}, where no amount of compute compares."
            compared = len(self._comparison.rungs)
            return "inconclusive", f"it can be compared at {compared} rungs, and a trend needs three."
        lower, upper = self._bounds
        if upper < self._least and not self._depends_on_curve(worth_it=False):
            useful = f"the {self._criterion.min_gain:g}× that would be useful"
            return "reject", f"at the target it is worth at most {_times(upper)}, less than {useful}{self._ending()}."
        if lower < self._least or self._diverged or self._depends_on_curve(worth_it=True):
            return "inconclusive", self._why_inconclusive(lower, upper)
        # Worth its compute. It is promoted if its steps are known to be fast enough.
        worth = f"at the target it is worth at least {_times(lower)} the baseline's compute"
        if slowdown is None:
            return "inconclusive", f"{worth}, but how long its steps take is not known."
        if (slowest := slowdown.bound(self._level, 1)) > most:
            return "inconclusive", (
                f"{worth}, but a step may take up to {_times(slowest)} as long as the baseline's, and {allowed} is "
                "allowed."
            )
        return "promote", f"{worth}, and a step takes {_times(slowdown.value)} as long."

    def _why_inconclusive(self, lower: float, upper: float) -> str:
        if upper < self._least or (lower >= self._least and not self._diverged):
            return "the answer depends on E and alpha, which the baseline's runs do not determine well enough."
        if lower >= self._least:
            where = ", ".join(f"{run.rung} seed {run.seed}" for run in self._diverged)
            return f"the runs that finished are good enough, but its loss was not finite at {where}."
        assert self.line is not None and self._other is not None
        line = self.line.multiplier_at(self._target)
        elsewhere = "but if its loss levels off elsewhere than the baseline's it may be worth"
        if line.bound(self._level, -1) >= self._least:
            return f"as a line its gain would hold, {elsewhere} only {_times(lower)} at the target."
        if line.bound(self._level, 1) < self._least <= self._other.bound(self._level, 1):
            return f"as a line its gain falls short, {elsewhere} {_times(upper)} at the target."
        return f"at the target it may be worth anything from {_times(lower)} to {_times(upper)}{self._ending()}."

    def _ending(self) -> str:
        """Clause that says where a shrinking gain ends; "" for other trends."""
        crossing = self._crossing
        if crossing is None or crossing.value is None or self._trend not in ("shrinks", "reverses"):
            return ""
        return f"; its gain is gone at {scientific(crossing.value)} FLOPs"

    # Remedies of an inconclusive verdict

    def _remedies(self) -> list[records.Remedy]:
        if self.line is None or self._bounds is None or self._diverged:
            return []
        lower, upper = self._bounds
        seeds, sizes = int(np.median(self.line.counts)), self._further_sizes(self.line)
        # The bounds decide already. What is missing is E and alpha, which a larger rung determines, or seconds.
        if lower >= self._least or upper < self._least:
            curve = self._depends_on_curve(worth_it=lower >= self._least)
            return [records.Remedy("rung", seeds, sizes[0])] if curve and sizes else []
        remedies = []
        # Rungs that lie off the line stay there with more seeds.
        if not self.line.widened and self._settles(ExtraRuns(seeds=MOST_SEEDS)):
            fewest = next(n for n in range(1, MOST_SEEDS + 1) if self._settles(ExtraRuns(seeds=n)))
            remedies.append(records.Remedy("seeds", fewest, None))
        rungs = ((size, pairs) for pairs in (seeds, 2 * seeds, 4 * seeds) for size in sizes)
        settling = next((rung for rung in rungs if self._settles(ExtraRuns(rung=rung))), None)
        return [*remedies, records.Remedy("rung", settling[1], settling[0])] if settling else remedies

    def _further_sizes(self, line: Line) -> list[float]:
        """FLOPs of possible further rungs: the ladder's steps continued, the last one at the target."""
        x, goal, sizes = float(line.x[-1]), math.log(self._target), []
        while x < goal - 1e-9:
            x += float(np.mean(np.diff(line.x)))
            sizes.append(math.exp(x) if x < goal - 1e-9 else self._target)
        return sizes

    def _settles(self, extra: ExtraRuns) -> bool:
        """True if the bounds would decide with these runs added."""
        assert self.line is not None and self._other is not None
        line = self.line.planned(self._target, extra)
        lower, upper = (
            (line.bound(self._level, side), self._other.planned_bound(self._level, side, extra)) for side in (-1, 1)
        )
        return min(lower) >= self._least or max(upper) < self._least

    # The record

    def verdict(self, remedies: bool = True) -> Verdict:
        decision, why = self._decide()
        level, bounds, line = self._criterion.level, self._bounds, self.line
        estimates = iter(enumerate(self._comparison.rung_estimates()))
        rungs = [self._rung_multiplier(rung, *(next(estimates) if rung.usable else (0, None))) for rung in self._rungs]
        worth = _ratio_interval(line and line.multiplier_at(self._target), level)
        seconds = self._wall_clock()
        both_known = worth.value is not None and seconds.value is not None
        low, high = (line.slope.bound(level / 2, side) if line else None for side in (-1, 1))
        slope = Interval(line.slope.value if line else None, low, high, level)
        verdict = Verdict(
            arm=self._arm, decision=decision, why=why[0].upper() + why[1:], trend=self._trend,
            target_flops=self._target, multiplier=worth, other_floor=_ratio_interval(self._other, level),
            lower=_exp(bounds[0]) if bounds else None, upper=_exp(bounds[1]) if bounds else None,
            bound_level=self._level, slope=slope, crossing=self._crossing, rungs=rungs,
            slowdown=_ratio_interval(self._slowdown, level), wall_clock=seconds,
            faster_per_flop_slower_per_second=both_known and worth.value > 1 > seconds.value,  # pyright: ignore
            lack_of_fit_p=line.lack_of_fit_p if line else None, pairing=self._comparison.noise.pairing,
            remedies=self._remedies() if remedies and decision == "inconclusive" else [],
        )  # fmt: skip
        return replace(verdict, notes=list(self._notes(verdict)))

    @cached_property
    def _trend(self) -> Trend:
        if self.line is None:
            return "unknown"
        half, slope = self._criterion.level / 2, self.line.slope
        if slope.bound(half, -1) > 0:
            return "grows"
        if slope.bound(half, 1) < 0:
            first = self.line.multiplier_at(self._comparison.rungs[0].flops)
            last = self.line.multiplier_at(self._target)
            return "reverses" if first.bound(half, -1) > 0 > last.bound(half, 1) else "shrinks"
        middle = self.line.middle
        return "none" if middle.bound(half, -1) <= 0 <= middle.bound(half, 1) else "persists"

    @cached_property
    def _crossing(self) -> Interval | None:
        if self.line is None or self._trend in ("none", "persists"):
            return None
        reach = (float(self.line.x[0]), math.log(self._target * REACH))
        crossing = self.line.crossing(self._criterion.level, reach)
        if crossing is None:
            return None
        value, low, high = map(_exp, crossing)
        return Interval(value, low, high, self._criterion.level)

    def _wall_clock(self) -> Interval:
        """Multiplier in seconds, m·(C_arm / C_base) / (t_arm / t_base), with the compute ratio of the largest rung."""
        level = self._criterion.level
        seconds = _mean_of_rungs([rung.log_seconds(per_token=False) for rung in self._rungs])
        if self.line is None or seconds is None:
            return Interval(None, None, None, level)
        worth = self.line.multiplier_at(self._target)
        value = worth.value + float(self._comparison.rungs[-1].log_cost.mean()) - seconds.value
        # Losses and seconds err independently, so their half widths add in squares.
        half = math.hypot(*(estimate.bound(level / 2, 1) - estimate.value for estimate in (worth, seconds)))
        return Interval(_exp(value), _exp(value - half), _exp(value + half), level)

    def _rung_multiplier(self, rung: MatchedRung, number: int, estimate: Estimate | None) -> records.RungMultiplier:
        """`number` is the rung's place among the usable ones; `estimate` is None for a rung that is not usable."""
        losses = rung.losses() if rung.pairs else None
        seconds = _mean(rung.log_seconds(per_token=False))
        wall_clock = None
        if estimate and losses and seconds is not None:
            wall_clock = estimate.value + float(losses.log_cost.mean()) - seconds
        return records.RungMultiplier(
            rung=rung.name, flops=rung.flops, pairs=len(rung.pairs),
            multiplier=_ratio_interval(estimate, self._criterion.level),
            wall_clock=_exp(wall_clock), slowdown=_exp(_mean(rung.log_seconds(per_token=True))),
            loss_difference=float((losses.arm - losses.base).mean()) if losses else None,
            pairing=Noise.from_pairs([losses]).pairing.ratio if losses else None,
            without=_exp(self.line.without(number, self._target)) if self.line and estimate else None,
            gap=rung.gap,
        )  # fmt: skip

    def _notes(self, verdict: Verdict) -> Iterator[str]:
        for rung in self._rungs:
            if rung.gap:
                yield f"{rung.name}: {rung.gap}."
        for name in self._without_baseline:
            yield f"{name}: the baseline has no finished run there."
        for run in self._diverged:
            yield f"{run.rung} seed {run.seed}: its loss was not finite."
        if self.line and self.line.widened:
            yield "The rungs do not lie on a line within seed noise; intervals come from their scatter about it."
        if self._comparison.rungs and not self._comparison.noise.freedom:
            yield "No rung has two seeds: noise is only known from the rungs' scatter about a line."
        if not self._baseline.fit.E_determined:
            yield "The baseline's E is badly determined."
        if verdict.faster_per_flop_slower_per_second:
            yield (
                f"Better per FLOP and slower per second: {verdict.multiplier.value:.3g}× of compute is "
                f"{verdict.wall_clock.value:.3g}× of time."
            )


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_of_rungs(groups: Sequence[Sequence[float]]) -> Estimate | None:
    """Mean over rungs of the means of their pairs, with the error from the scatter between rungs.

    If only one rung has values, its pairs take the place of rungs; None with fewer than two values. The ratio is
    assumed equal at every size; if it is not, the error is larger.
    """
    known = [group for group in groups if group]
    values = [math.fsum(group) / len(group) for group in known] if len(known) > 1 else [*known[0]] if known else []
    if len(values) < 2:
        return None
    return Estimate(float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(len(values)), len(values) - 1)


def _exp(value: float | None) -> float | None:
    """exp(value); None for a value that is unknown or too large to mean anything."""
    return math.exp(value) if value is not None and value < 100 else None


def _times(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.3g}×" if log_ratio < math.log(1e4) else "more than 10,000×"


def _ratio_interval(estimate: Estimate | OtherFloor | None, level: float) -> Interval:
    """Two-sided interval of a ratio whose logarithm was estimated."""
    if estimate is None:
        return Interval(None, None, None, level)
    low, high = (estimate.bound(level / 2, side) for side in (-1, 1))
    return Interval(_exp(estimate.value), _exp(low) if low > -math.inf else None, _exp(high), level)
