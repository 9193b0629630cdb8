"""What a ladder's losses say, as one plain tree: fit, predictions, verdicts. A function of the runs' results alone.

Verdicts stand on the rungs. Runs at the target, where there are any, are what their predictions are held against. How
long a run took has no place here; course.py has what rests on that.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import special

from trainer.errors import FitError
from trainer.ladder.stats import decision, verdict
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.multiplier import Line, Noise, OtherFloor
from trainer.ladder.stats.pairs import Baseline, match
from trainer.ladder.stats.records import BASELINE, Criterion, CurveFit, Interval, RunResult, Verdict

Tree = dict[str, Any]
GRID = 61
"""Values of compute at which curves and their bands are told."""
MARGIN = 1.25
"""How far curves go on beyond the smallest rung and the target."""
CURVE_ITSELF = 10**12
"""So many seeds that only the curve's own error is left of a prediction's."""


@dataclass(frozen=True)
class Plan:
    """What the losses are of."""

    criterion: Criterion
    rungs: Sequence[str]
    """Smallest first; without the target."""
    target: str
    """The name of its runs' rung."""
    flops: Mapping[tuple[str, str], float]
    """Of a run, by (rung, arm), the baseline among the arms; also of runs that are still to be made."""
    target_flops: float
    seeds: Mapping[str, int]
    """How many are planned, by rung."""
    arms: Sequence[str]
    unchanged: Sequence[str] = ()
    """Those that are no change."""


def of(results: Sequence[RunResult], plan: Plan) -> Tree:
    """All that is estimated; `no_fit` says why there is no curve, and then nothing rests on one."""
    results = decision.without_time(results)
    rungs = [result for result in results if result.rung != plan.target]
    tree: Tree = {
        "noise": _noise(results),
        "differences": _differences(results, plan),
        "fit": None, "no_fit": None, "bootstrap": None, "curve": None, "verdicts": [], "lines": {},
        "predictions": _predictions(results, plan), "multiplier_predictions": [],
    }  # fmt: skip
    try:
        fit = fits.fit_curve(rungs, plan.criterion.level)
    except FitError as error:
        return tree | {"no_fit": str(error)}
    judged = verdict.judge(
        rungs, plan.criterion, plan.target_flops, fit=fit, arms=plan.arms, unchanged=plan.unchanged
    )  # fmt: skip
    return tree | {
        "fit": fit.to_json(),
        "bootstrap": fits.bootstrap(rungs, plan.criterion.level).to_json(),
        "curve": _curve(rungs, plan),
        "verdicts": [decision.loss_tree(one) for one in judged],
        "lines": {arm: _line(rungs, arm, fit, plan) for arm in plan.arms},
        "multiplier_predictions": list(_multiplier_predictions(results, plan, judged)),
    }


# Without a curve


def _noise(results: Sequence[RunResult]) -> list[Tree]:
    """Of each rung and arm: how its seeds differ."""
    groups: dict[tuple[str, str], list[float]] = {}
    for result in results:
        groups.setdefault((result.rung, result.arm), []).append(result.loss)
    return [
        {
            "rung": rung, "arm": arm, "seeds": len(finite), "diverged": len(losses) - len(finite),
            "mean": math.fsum(finite) / len(finite) if finite else None,
            "sd": statistics.stdev(finite) if len(finite) > 1 else None,
        }
        for (rung, arm), losses in groups.items()
        for finite in [[loss for loss in losses if math.isfinite(loss)]]
    ]  # fmt: skip


def _differences(results: Sequence[RunResult], plan: Plan) -> list[Tree]:
    """Of each rung and arm: its loss minus the baseline's of the same seed, with Student's interval."""
    known = {(p.rung, p.arm, p.seed): p.loss for p in results if math.isfinite(p.loss)}
    found = []
    for rung in (*plan.rungs, plan.target):
        for arm in plan.arms:
            pairs = [
                loss - known[rung, BASELINE, seed]
                for (where, what, seed), loss in known.items()
                if (where, what) == (rung, arm) and (rung, BASELINE, seed) in known
            ]
            if pairs:
                told = _mean(pairs, plan.criterion.level).to_json()
                found.append({"rung": rung, "arm": arm, "pairs": len(pairs), "difference": told})
    return found


def _mean(values: Sequence[float], level: float) -> Interval:
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Interval(mean, None, None, level)
    half = -float(special.stdtrit(len(values) - 1, level / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, level)


# Curves with their bands


def _grid(plan: Plan) -> list[float]:
    first = min(plan.flops[rung, BASELINE] for rung in plan.rungs)
    return [float(one) for one in np.geomspace(first / MARGIN, plan.target_flops * MARGIN, GRID)]


def _curve(results: Sequence[RunResult], plan: Plan) -> Tree:
    """The baseline's, with the interval of the curve itself."""
    found = [fits.predict(results, flops, CURVE_ITSELF, plan.criterion.level).predicted for flops in _grid(plan)]
    return {"flops": _grid(plan), **_columns(found)}


def _columns(intervals: Sequence[Interval]) -> Tree:
    plain = [one.to_json() for one in intervals]
    return {name: [one[name] for one in plain] for name in ("value", "low", "high")}


def _line(results: Sequence[RunResult], arm: str, fit: CurveFit, plan: Plan) -> Tree | None:
    """The arm's multiplier against compute as a line, and beyond the rungs if its floor differs; None without one."""
    baseline = Baseline.from_results(results, fit)
    rungs = list(match(results, arm, baseline))
    pairs = [rung.arrays() for rung in rungs if rung.usable]
    if len(pairs) < fits.FEWEST_RUNGS or any(rung.pairs and not rung.usable for rung in rungs):
        return None
    noise, half = Noise.from_pairs(pairs), plan.criterion.level / 2
    line = Line(pairs, fit.curve, baseline.influence, noise)
    grid = _grid(plan)
    known = [line.multiplier_at(flops) for flops in grid]
    told = _columns([_ratio(one.value, one.bound(half, -1), one.bound(half, 1)) for one in known])
    others = [OtherFloor(pairs, fit.curve, baseline.influence, noise, flops).value for flops in grid]
    return {"flops": grid, **told, "other_floor": _columns([_ratio(one, one, one) for one in others])["value"]}


def _ratio(*logs: float) -> Interval:
    """Of (value, low, high) of its logarithm."""
    value, low, high = (math.exp(one) if abs(one) < 100 else None for one in logs)
    return Interval(value, low, high)


# Predictions


def _predictions(results: Sequence[RunResult], plan: Plan) -> list[Tree]:
    """Losses of the baseline and each arm: the largest rung's and those of rungs that were not run, by the rungs below;
    the target's by all rungs.
    """
    found = []
    for rung, below in _questions(results, plan):
        for arm in (BASELINE, *plan.arms):
            if (rung, arm) in plan.flops:
                found.append(_prediction(results, arm, rung, below, plan))
    return found


def _questions(results: Sequence[RunResult], plan: Plan) -> list[tuple[str, Sequence[str]]]:
    """(what is predicted, by which rungs: those that the baseline was run at)"""
    ran = {result.rung for result in results if result.arm == BASELINE}
    asked = [rung for rung in plan.rungs[1:] if rung not in ran or rung == plan.rungs[-1]]
    below = {rung: plan.rungs[: plan.rungs.index(rung)] for rung in asked} | {plan.target: plan.rungs}
    return [(rung, [name for name in names if name in ran]) for rung, names in below.items()]


def _prediction(results: Sequence[RunResult], arm: str, rung: str, below: Sequence[str], plan: Plan) -> Tree:
    own = [replace(result, arm=BASELINE) for result in results if result.arm == arm]
    losses = [result.loss for result in own if result.rung == rung and math.isfinite(result.loss)]
    told: Tree = {"rung": rung, "arm": arm, "by": list(below), "runs": len(losses), "refused": None}
    try:
        by = [result for result in own if result.rung in below]
        seeds = len(losses) or plan.seeds.get(rung, 0) or 1
        check = fits.predict(by, plan.flops[rung, arm], seeds, plan.criterion.level)
    except FitError as error:
        return told | {"refused": str(error), "flops": plan.flops[rung, arm], "predicted": None, "seeds": len(losses),
                       "observed": math.fsum(losses) / len(losses) if losses else None, "error": None,
                       "relative_error": None, "inside": None}  # fmt: skip
    return told | (fits.check(check, losses) if losses else check).to_json()


def _multiplier_predictions(results: Sequence[RunResult], plan: Plan, judged: Sequence[Verdict]) -> Iterable[Tree]:
    """Multipliers, likewise, beside what the runs there measured."""
    for rung, below in _questions(results, plan):
        measured = _judge(results, [*below, rung], plan, plan.flops[rung, BASELINE])
        by = {one.arm: one for one in judged} if rung == plan.target else _judge(
            results, below, plan, plan.flops[rung, BASELINE]
        )  # fmt: skip
        for arm in plan.arms:
            if (rung, arm) not in plan.flops:
                continue
            seen = [one for one in (measured[arm].rungs if arm in measured else []) if one.rung == rung]
            yield {
                "rung": rung, "arm": arm, "by": list(below), "flops": plan.flops[rung, BASELINE],
                "predicted": by[arm].multiplier.to_json() if arm in by else None,
                "other_floor": by[arm].other_floor.to_json() if arm in by else None,
                "measured": seen[0].multiplier.to_json() if seen else None,
                "pairs": seen[0].pairs if seen else 0,
            }  # fmt: skip


def _judge(results: Sequence[RunResult], rungs: Sequence[str], plan: Plan, flops: float) -> dict[str, Verdict]:
    """By these rungs alone; empty where no curve can be fitted to them."""
    own = [result for result in results if result.rung in rungs]
    try:
        judged = verdict.judge(
            own, plan.criterion, flops, arms=plan.arms, unchanged=plan.unchanged, remedies=False
        )  # fmt: skip
    except FitError:
        return {}
    return {one.arm: one for one in judged}
