"""The worth of each arm at the target, and the verdict: promote, reject or inconclusive.

Two error probabilities are held below the criterion's level, each by a one-sided bound: promoting an arm that is worth
less than min_gain, and rejecting an arm that is worth at least that. Both bounds are Bonferroni-corrected for the
number of arms tried and for the looks; an A/A arm is judged by the same rule and not counted. Both bounds hold under
all forms of extrapolation that the data allow (trainer/ladder/stats/worth.py), and the largest rung itself must be on
the decision's side: a gain that crosses min_gain only beyond the rungs was seen by nobody. All else is inconclusive.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from trainer.errors import FitError
from trainer.ladder.stats import advice, planes, records, significance
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.advice import Situation
from trainer.ladder.stats.pairs import Baseline, MatchedRung, Sizes, by_arm, can_extrapolate, pairing
from trainer.ladder.stats.planes import SurfaceBaseline
from trainer.ladder.stats.records import SCARCE, UNITS, Axis, Criterion, CurveFit, Interval, RunResult, Trend, Verdict
from trainer.ladder.stats.worth import LINE, OTHER_FLOOR, Extrapolation, Worths
from trainer.show.units import scientific

Array = np.ndarray
ADVISED = 12  # arms for which further runs are sought: those nearest to a decision
LEAST_CHANCE = 0.1  # runs that settle the question less often are not told
REACH = 10.0  # crossings are reported from the smallest rung to this multiple of the target
CROSSING_GRID = 41
NO_NOISE = 1e-9  # an arm whose losses scatter by less than this, in nats, has no noise that could be estimated


def judge(
    results: Sequence[RunResult], criterion: Criterion, target_flops: float, *,
    fit: CurveFit | None = None, arms: Sequence[str] | None = None, unchanged: Collection[str] = (),
    remedies: bool = True, most_flops: float = math.inf, axis: Axis = "compute", target_mix: float | None = None,
    surface: SurfaceBaseline | None = None,
) -> list[Verdict]:  # fmt: skip
    """Return one verdict for each of `arms` (default: all arms in `results`, in their order).

    `target_flops` is the baseline's compute at the target; `unchanged` names the A/A arms. `remedies=False` plans none
    for inconclusive verdicts, and `most_flops` none that take more compute. On the axis "data" all FLOPs are tokens of
    unique text. Where parameters and tokens vary apart, arms are compared by a surface (planes.py), `target_mix` is
    ln(D / N) at the target (default: the best), and no remedies are planned. Raises FitError if the baseline has no
    curve, for results that cannot be, and if the target lies below the largest rung.
    """
    found = compare(
        results, criterion, target_flops, fit=fit, arms=arms, unchanged=unchanged, axis=axis, target_mix=target_mix,
        surface=surface,
    )  # fmt: skip
    verdicts = [one.verdict() for one in found]
    if not remedies or not found or not isinstance(found[0].baseline, Baseline):
        return verdicts
    undecided = [number for number, one in enumerate(verdicts) if one.decision == "inconclusive"]
    for number in sorted(undecided, key=lambda number: found[number].to_go)[:ADVISED]:
        if found[number].to_go < math.inf:
            verdicts[number] = replace(verdicts[number], remedies=found[number].remedies(most_flops))
    return verdicts


def compare(
    results: Sequence[RunResult], criterion: Criterion, target_flops: float, *, fit: CurveFit | None = None,
    arms: Sequence[str] | None = None, unchanged: Collection[str] = (), axis: Axis = "compute",
    target_mix: float | None = None, surface: SurfaceBaseline | None = None,
) -> list["Judgement"]:  # fmt: skip
    """The same comparisons before anything is decided: `judge` without the verdicts, for their intervals alone."""
    fits.check_runs(results)
    if fit is None and axis == "compute" and planes.vary_apart(results):
        baseline: Sizes = surface or SurfaceBaseline.from_results(results, target_flops, criterion.level, target_mix)
    else:
        fit = fit or fits.fit_curve(results, criterion.level, second_opinion=False, axis=axis)
        baseline = Baseline.from_results(results, fit)
    if arms is None:
        arms = list(dict.fromkeys(result.arm for result in results if result.arm != records.BASELINE))
    ladder = JudgedLadder(baseline, results, list(arms), unchanged, criterion, target_flops, axis)
    return [Judgement(ladder, number) for number in range(len(arms))]


@dataclass(frozen=True)
class JudgedLadder:
    """All arms of a ladder, estimated together; arrays have an entry for each arm."""

    baseline: Sizes
    results: Sequence[RunResult]
    arms: list[str]
    unchanged: Collection[str]
    criterion: Criterion
    target_flops: float
    axis: Axis = "compute"

    def __post_init__(self) -> None:
        if not (largest := self.baseline.rungs.flops[-1]) * 0.999 <= self.target_flops < math.inf:
            raise FitError(
                f"the target of {self.target_flops:.3g} {UNITS[self.axis]} lies below the largest rung of "
                f"{largest:.3g}.\n"
                "  A verdict extrapolates. Give a target at or above the largest rung, or leave out the rungs above it."
            )

    @cached_property
    def rungs(self) -> list[list[MatchedRung]]:
        return [list(self.baseline.match(self.by_arm.get(arm, []), arm)) for arm in self.arms]

    @cached_property
    def by_arm(self) -> dict[str, list[RunResult]]:
        return by_arm(self.results)

    @cached_property
    def timed(self) -> bool:
        """True if any run has seconds: a table without any is judged by compute alone."""
        return any(result.seconds for result in self.results)

    @cached_property
    def worths(self) -> Worths:
        return self.baseline.compare(self.rungs)

    def x(self, flops: float) -> float:
        return math.log(flops / self.baseline.scale)

    @cached_property
    def at_target(self) -> Extrapolation:
        return self.worths.at(self.x(self.target_flops))

    @cached_property
    def level(self) -> float:
        """Error probability of each bound."""
        return self.level_of(float(self.worths.counts.sum(-1).max(initial=1)))

    def level_of(self, pairs: float) -> float:
        """The same if arms had up to so many pairs."""
        tried = max(sum(name not in self.unchanged for name in self.arms), 1)
        level = self.criterion.level / tried
        if self.criterion.looks != "any":
            return level / self.criterion.looks
        return significance.anytime_level(level, max(pairs, 1.0))

    @cached_property
    def noiseless(self) -> Array:
        """True for arms whose losses show no noise at all although they differ from the baseline's."""
        return (self.worths.variance < NO_NOISE**2) & (np.abs(self.worths.means).max(-1) > 0)

    @cached_property
    def trend_p(self) -> list[float | None]:
        """p of each arm's slope, adjusted for the number of arms; None without a line."""
        slope, variance, freedom = self.worths.slope()
        known = [can_extrapolate(rungs) for rungs in self.rungs] & ~self.noiseless
        p = 2 * significance.student_tail(np.abs(slope) / np.sqrt(np.maximum(variance, 1e-300)), freedom)
        adjusted = iter(significance.false_discovery(p[known]))
        return [next(adjusted) if one else None for one in known]

    @cached_property
    def extremes(self) -> list[tuple[float, Array]]:
        """(E, ln m of each arm at the target) by the outermost forms that the baseline's runs allow."""
        forms = self.baseline.alternatives()
        return [(E, self.baseline.compare(self.rungs, one).value_at(self.x(self.target_flops))) for E, one in forms]

    @cached_property
    def crossings(self) -> tuple[Array, Array, Array, Array]:
        """(x, value, lower, upper): ln m of each arm along the reach, with its bounds."""
        half = self.criterion.level / 2
        grid = np.linspace(self.worths.x[0], self.x(self.target_flops * REACH), CROSSING_GRID)
        found = [self.worths.at(x) for x in grid]
        lower, upper = (np.stack([one.bound(half, side) for one in found]) for side in (-1, 1))
        return grid, np.stack([one.value for one in found]), lower, upper

    @cached_property
    def rung_estimates(self) -> tuple[Array, Array, Array]:
        return self.worths.rung_estimates()

    @cached_property
    def without(self) -> list[Array]:
        """ln m at the target by a line through all rungs but one."""
        return [self.worths.without(k, self.x(self.target_flops)) for k in range(len(self.worths.x))]

    def situation(self, number: int) -> Situation:
        """An arm's results, with what is needed to judge them again with more runs."""
        return Situation(
            self.worths, number, self.baseline.losses, self.baseline.table(self.rungs)[:, number],
            self.baseline.rungs.flops, self.baseline.scale, self.target_flops, self.level_of,
            math.log(self.criterion.min_gain),
        )  # fmt: skip

    @cached_property
    def further_sizes(self) -> list[float]:
        """FLOPs of possible further rungs: the ladder's steps continued, the last one at the target."""
        x, goal, sizes = float(self.worths.x[-1]), self.x(self.target_flops), []
        while x < goal - 1e-9:
            x += float(np.mean(np.diff(self.worths.x)))
            sizes.append(self.target_flops * math.exp(x - goal) if x < goal - 1e-9 else self.target_flops)
        return sizes


class Judgement:
    """One arm compared with the baseline."""

    def __init__(self, ladder: JudgedLadder, number: int) -> None:
        self._ladder, self._number, self._criterion = ladder, number, ladder.criterion
        self._arm, self._rungs = ladder.arms[number], ladder.rungs[number]
        self._level, self._least = ladder.level, math.log(ladder.criterion.min_gain)
        arm_results = ladder.by_arm.get(self._arm, [])
        self._diverged = [result for result in arm_results if not math.isfinite(result.loss)]
        names = dict.fromkeys(result.rung for result in arm_results)
        self._without_baseline = [name for name in names if name not in ladder.baseline.rungs.names]
        self._noiseless = bool(ladder.noiseless[number])
        self._known = can_extrapolate(self._rungs)
        self._compared = self._known and not self._noiseless
        # Seconds are asked for if anyone has them.
        self._timed = ladder.timed

    @property
    def baseline(self) -> Sizes:
        return self._ladder.baseline

    @cached_property
    def multiplier(self) -> Interval:
        """At the target, over all forms."""
        return self._interval(self._ladder.at_target)

    @cached_property
    def other_floor(self) -> Interval:
        """At the target, if the arm's loss levels off elsewhere than the baseline's."""
        return self._interval(self._ladder.at_target, OTHER_FLOOR)

    @cached_property
    def rungs(self) -> list[records.RungMultiplier]:
        """Multiplier of the arm at each rung alone."""
        return [self._rung_multiplier(k, rung) for k, rung in enumerate(self._rungs)]

    def _of(self, values: Array) -> float:
        return float(values[..., self._number])

    def _interval(self, found: Extrapolation, form: int | None = None) -> Interval:
        """Two-sided interval at the target, of one form or over all."""
        half = self._criterion.level / 2
        if not self._known:
            return Interval(None, None, None, 2 * half)
        value = self._of(found.value if form is None else found.values[..., form])
        if self._noiseless:
            return Interval(_exp(value), None, None, 2 * half)
        low, high = (
            self._of(found.bound(half, side) if form is None else found.bound_of(form, half, side)) for side in (-1, 1)
        )
        return _ratio(value, low, high, 2 * half)

    # The decision

    @cached_property
    def _bounds(self) -> tuple[float, float] | None:
        """(lower, upper) bound of ln m at the target that hold under all forms."""
        if not self._compared:
            return None
        lower, upper = (self._of(self._ladder.at_target.bound(self._level, side)) for side in (-1, 1))
        return lower, upper

    @cached_property
    def _last(self) -> tuple[str, float]:
        """(Name of the arm's largest rung, ln m there)."""
        k = max(k for k, rung in enumerate(self._rungs) if rung.usable)
        return self._rungs[k].name, float(self._ladder.worths.means[self._number, k])

    @cached_property
    def _slowdown(self) -> "Estimate | None":  # ln of seconds per token, arm over baseline
        return _mean_of_rungs([rung.log_seconds(per_token=True) for rung in self._rungs])

    def _depends_on_curve(self, worth_it: bool) -> bool:
        """True if the estimate falls on the other side of min_gain for an (E, alpha) inside their interval."""
        lowest = min(rung.losses.min() for rung in self._rungs if rung.usable)
        # A loss below this curve's floor has no multiplier: then anything is possible.
        return any(lowest <= E or (self._of(values) >= self._least) != worth_it for E, values in self._ladder.extremes)

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
            return "inconclusive", self._why_no_bounds()
        lower, upper = self._bounds
        last = self._last[1]
        if upper < self._least and last < self._least and not self._depends_on_curve(worth_it=False):
            useful = f"the {self._criterion.min_gain:g}× that would be useful"
            return "reject", f"at the target it is worth at most {_times(upper)}, less than {useful}{self._ending()}."
        promising = lower >= self._least and last >= self._least and not self._diverged
        if not promising or self._depends_on_curve(worth_it=True):
            return "inconclusive", self._why_inconclusive(lower, upper)
        # Worth its compute. It is promoted if its steps are known to be fast enough.
        worth = f"at the target it is worth at least {_times(lower)} the baseline's {SCARCE[self._ladder.axis]}"
        if not self._timed:
            return "promote", f"{worth}; seconds were not given."
        if slowdown is None:
            return "inconclusive", f"{worth}, but how long its steps take is not known."
        if (slowest := slowdown.bound(self._level, 1)) > most:
            return "inconclusive", (
                f"{worth}, but a step may take up to {_times(slowest)} as long as the baseline's, and {allowed} is "
                "allowed."
            )
        return "promote", f"{worth}, and a step takes {_times(slowdown.value)} as long."

    def _why_no_bounds(self) -> str:
        if low := [rung for rung in self._rungs if rung.pairs and not rung.usable]:
            return f"at {low[0].name} {low[0].gap}, where no amount of {SCARCE[self._ladder.axis]} compares."
        if self._noiseless:
            return "its losses show no noise at all, so nothing says how far to trust them."
        compared = sum(rung.usable for rung in self._rungs)
        return f"it can be compared at {compared} rungs, and a trend needs three."

    def _why_inconclusive(self, lower: float, upper: float) -> str:
        rung, last = self._last
        useful = f"{self._criterion.min_gain:g}×"
        if upper < self._least <= last:
            return f"its gain would fall below {useful} only beyond {rung}, where it was {_times(last)}."
        if last < self._least <= lower:
            return f"its gain would reach {useful} only beyond {rung}, where it was {_times(last)}."
        if upper < self._least or (lower >= self._least and not self._diverged):
            return "the answer depends on E and alpha, which the baseline's runs do not determine well enough."
        if lower >= self._least:
            where = ", ".join(f"{run.rung} seed {run.seed}" for run in self._diverged)
            return f"the runs that finished are good enough, but its loss was not finite at {where}."
        found = self._ladder.at_target
        for side, bound, holds in ((-1, lower, "hold"), (1, upper, "fall short")):
            if side * (self._of(found.bound_of(LINE, self._level, side)) - self._least) < 0:
                gamma = self._of(found.limiting(self._level, side))
                form = "its loss levels off elsewhere than the baseline's" if gamma < 0 else "it fades to a constant"
                only = "only " if side < 0 else ""
                worth = f"{only}{_times(bound)} at the target"
                return f"as a line its gain would {holds}, but if {form} it may be worth {worth}."
        return f"at the target it may be worth anything from {_times(lower)} to {_times(upper)}{self._ending()}."

    def _ending(self) -> str:
        """Clause that says where a shrinking gain ends; "" for other trends."""
        crossing = self._crossing
        if crossing is None or crossing.value is None or self._trend not in ("shrinks", "reverses"):
            return ""
        return f"; its gain is gone at {scientific(crossing.value)} {UNITS[self._ladder.axis]}"

    @property
    def to_go(self) -> float:
        """Distance of the nearest bound from deciding, in ln m; infinite if no runs would help."""
        if self._bounds is None or self._diverged:
            return math.inf
        return min(abs(bound - self._least) for bound in self._bounds)

    def remedies(self, most_flops: float) -> list[records.Remedy]:
        """Further runs that may settle an inconclusive verdict, the advised one first, at most one of each kind."""
        ladder, (lower, upper) = self._ladder, self._bounds or (0.0, 0.0)
        situation, names = ladder.situation(self._number), ladder.baseline.rungs.names
        # The bounds decide already. What is missing is E and alpha, which a larger rung determines, or seconds.
        worth_it = lower >= self._least
        if (worth_it and self._last[1] >= self._least) or (upper < self._least and self._last[1] < self._least):
            if not (self._depends_on_curve(worth_it) and ladder.further_sizes):
                return []
            seeds, flops = round(float(np.median(ladder.worths.counts[self._number]))), ladder.further_sizes[0]
            return [records.Remedy("rung", seeds, flops, None, None, None)]
        found = []
        for one, chance in advice.advise(situation, ladder.further_sizes, most_flops):
            if chance < LEAST_CHANCE:
                continue
            rung = names[one.rungs[0]] if len(one.rungs) == 1 else None
            what = "seeds" if one.new is None else "rung"
            found.append(records.Remedy(what, one.pairs, one.new, rung, chance, one.flops))
        return found

    # The record

    def verdict(self) -> Verdict:
        decision, why = self._decide()
        ladder, level, bounds, number = self._ladder, self._criterion.level, self._bounds, self._number
        worths, found = ladder.worths, ladder.at_target
        worth, seconds = self.multiplier, self._wall_clock()
        fading = LINE + int(found.excess[number, LINE:].argmin()) if self._known else LINE
        both_known = worth.value is not None and seconds.value is not None
        slope = Interval(None, None, None, level)
        if self._known:
            value, variance, freedom = map(self._of, worths.slope())
            half = significance.student_quantile(level / 2, freedom) * math.sqrt(variance)
            low, high = (None if self._noiseless else value + side * half for side in (-1, 1))
            slope = Interval(value, low, high, level)
        bend_p = self._of(worths.bend_p()) if self._compared else math.nan
        verdict = Verdict(
            arm=self._arm, decision=decision, why=why[0].upper() + why[1:], trend=self._trend,
            target_flops=ladder.target_flops, multiplier=worth, line=self._interval(found, LINE),
            other_floor=self.other_floor, fades=self._interval(found, fading),
            lower=_exp(bounds[0]) if bounds else None, upper=_exp(bounds[1]) if bounds else None,
            bound_level=self._level, degrees_of_freedom=self._of(worths.freedom) if self._compared else None,
            slope=slope, trend_p=ladder.trend_p[number], crossing=self._crossing,
            rungs=self.rungs,
            slowdown=_estimate_interval(self._slowdown, level), wall_clock=seconds,
            faster_per_flop_slower_per_second=both_known and worth.value > 1 > seconds.value,  # pyright: ignore
            lack_of_fit_p=worths.lack_of_fit_p(number) if self._compared else None,
            bend_p=None if math.isnan(bend_p) else bend_p, pairing=pairing(self._rungs),
        )  # fmt: skip
        return replace(verdict, notes=list(self._notes(verdict)))

    @cached_property
    def _trend(self) -> Trend:
        p = self._ladder.trend_p[self._number]
        if p is None:
            return "unknown"
        half, worths = self._criterion.level / 2, self._ladder.worths
        if p < self._criterion.level:
            if self._of(worths.slope()[0]) > 0:
                return "grows"
            first, last = worths.at(worths.x[0]), self._ladder.at_target
            return "reverses" if self._of(first.bound(half, -1)) > 0 > self._of(last.bound(half, 1)) else "shrinks"
        low, high = (self._of(worths.at(float(worths.x.mean())).bound_of(LINE, half, side)) for side in (-1, 1))
        return "none" if low <= 0 <= high else "persists"

    @cached_property
    def _crossing(self) -> Interval | None:
        """Compute at which ln m is 0, with all compute around it at which it may be; None without a trend."""
        if self._trend not in ("shrinks", "reverses", "grows"):
            return None
        x, *columns = self._ladder.crossings
        value, lower, upper = (column[:, self._number] for column in columns)
        changes = np.flatnonzero(np.diff(np.sign(value)))
        if not len(changes):
            return None
        k = int(changes[0])
        root = x[k] + (x[k + 1] - x[k]) * value[k] / (value[k] - value[k + 1])
        # One of the bounds is 0 at each end of the interval, and it ends where the data no longer bound it.
        side = 1 if value[0] > 0 else -1
        near, far = (lower, upper) if side > 0 else (upper, lower)
        before, after = np.flatnonzero(side * near[: k + 2] > 0), np.flatnonzero(side * far[k:] < 0)
        low = _zero(x, near, int(before[-1])) if len(before) else None
        high = _zero(x, far, k + int(after[0]) - 1) if len(after) else None
        scale = self._ladder.baseline.scale
        root, low, high = (None if end is None else scale * math.exp(end) for end in (root, low, high))
        return Interval(root, low, high, self._criterion.level)

    def _wall_clock(self) -> Interval:
        """Multiplier in seconds, m·(C_arm / C_base) / (t_arm / t_base), with the compute ratio of the largest rung."""
        level = self._criterion.level
        seconds = _mean_of_rungs([rung.log_seconds(per_token=False) for rung in self._rungs])
        if not self._compared or seconds is None:
            return Interval(None, None, None, level)
        found = self._ladder.at_target
        value, low, high = map(self._of, (found.value, found.bound(level / 2, -1), found.bound(level / 2, 1)))
        usable = [rung for rung in self._rungs if rung.usable]
        shift = _log_cost(usable[-1]) - seconds.value
        # Losses and seconds err independently, so their half widths add in squares.
        half = seconds.bound(level / 2, 1) - seconds.value
        return _ratio(
            value + shift, value + shift - math.hypot(value - low, half),
            value + shift + math.hypot(high - value, half), level,
        )  # fmt: skip

    def _rung_multiplier(self, k: int, rung: MatchedRung) -> records.RungMultiplier:
        level, worths = self._criterion.level, self._ladder.worths
        multiplier = Interval(None, None, None, level)
        wall_clock = None
        if rung.usable:
            value, variance, freedom = (float(each[self._number, k]) for each in self._ladder.rung_estimates)
            half = significance.student_quantile(level / 2, freedom) * math.sqrt(variance)
            known = worths.variance[self._number] > 0 and not self._noiseless and freedom > 0.5
            multiplier = _ratio(value, value - half, value + half, level) if known or value == 0 else Interval(
                _exp(value), None, None, level
            )  # fmt: skip
            seconds = _mean(rung.log_seconds(per_token=False))
            wall_clock = None if seconds is None else _exp(value + _log_cost(rung) - seconds)
        return records.RungMultiplier(
            rung=rung.name, flops=rung.flops, pairs=len(rung.pairs), multiplier=multiplier,
            wall_clock=wall_clock, slowdown=_exp(_mean(rung.log_seconds(per_token=True))),
            loss_difference=float(np.diff(rung.losses, axis=0).mean()) if rung.pairs else None,
            pairing=pairing([rung]).ratio,
            without=_exp(self._of(self._ladder.without[k])) if self._known and rung.usable else None, gap=rung.gap,
        )  # fmt: skip

    def _notes(self, verdict: Verdict) -> Iterator[str]:
        for rung in self._rungs:
            if rung.gap:
                yield f"{rung.name}: {rung.gap}."
        for name in self._without_baseline:
            yield f"{name}: the baseline has no finished run there."
        for run in self._diverged:
            yield f"{run.rung} seed {run.seed}: its loss was not finite."
        if verdict.lack_of_fit_p is not None and verdict.lack_of_fit_p < significance.LACK_OF_FIT:
            yield "The rungs do not lie on a line within seed noise."
        if verdict.bend_p is not None and verdict.bend_p < significance.LACK_OF_FIT:
            yield "Its multipliers bend: they do not lie on a line."
        if self._compared and not any(len(rung.pairs) > 1 for rung in self._rungs):
            yield "No rung has two seeds: noise is only known from the rungs' scatter about a smooth curve."
        if not self._timed:
            yield "Seconds were not given: nothing is said about the time of a step."
        if not self._ladder.baseline.E_determined:
            yield "The baseline's E is badly determined."
        if verdict.faster_per_flop_slower_per_second:
            yield (
                f"Better per FLOP and slower per second: {verdict.multiplier.value:.3g}× of compute is "
                f"{verdict.wall_clock.value:.3g}× of time."
            )


@dataclass(frozen=True)
class Estimate:
    """The logarithm of a ratio of seconds, with its standard error."""

    value: float
    error: float
    freedom: int

    def bound(self, level: float, side: int) -> float:
        """One-sided bound (side −1: lower, +1: upper) that misses the truth with probability `level`."""
        return self.value + side * significance.student_quantile(level, self.freedom) * self.error


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


def _log_cost(rung: MatchedRung) -> float:
    return math.fsum(math.log(arm.flops / base.flops) for base, arm in rung.pairs) / len(rung.pairs)


def _zero(x: Array, values: Array, k: int) -> float:
    """x at which the values cross 0 between number k and the next."""
    first, second = values[k : k + 2]
    return float(x[k] + (x[k + 1] - x[k]) * first / (first - second))


def _exp(value: float | None) -> float | None:
    """exp(value); None for a value that is unknown or too large to mean anything."""
    return math.exp(value) if value is not None and value < 100 else None


def _times(log_ratio: float) -> str:
    return f"{math.exp(log_ratio):.3g}×" if log_ratio < math.log(1e4) else "any number of times"


def _ratio(value: float, low: float, high: float, level: float) -> Interval:
    """Interval of a ratio from that of its logarithm."""
    return Interval(_exp(value), _exp(low) if low > -math.inf else None, _exp(high), level)


def _estimate_interval(estimate: Estimate | None, level: float) -> Interval:
    if estimate is None:
        return Interval(None, None, None, level)
    return _ratio(estimate.value, estimate.bound(level / 2, -1), estimate.bound(level / 2, 1), level)
