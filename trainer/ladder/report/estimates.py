"""Estimates from a ladder's losses, as one JSON tree: fit, predictions, verdicts. A function of results alone.

Verdicts rest on the rungs. Runs at the target, if there are any, are what predictions are compared with. How long a
run took plays no part here; see execution.py.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from trainer.errors import FitError
from trainer.ladder.collect import CollectedRun
from trainer.ladder.plan.ladder import TARGET, Ladder
from trainer.ladder.report import surface
from trainer.ladder.stats import decision, downstream, planes, verdict
from trainer.ladder.stats import fit as fits
from trainer.ladder.stats.pairs import Baseline, Sizes, by_arm, can_extrapolate
from trainer.ladder.stats.planes import SurfaceBaseline
from trainer.ladder.stats.records import BASELINE, Axis, Interval, RunResult, Verdict
from trainer.ladder.stats.worth import LINE, OTHER_FLOOR

Tree = dict[str, Any]
Compared = Mapping[str, Verdict | verdict.Judgement]
GRID = 61
"""Number of amounts at which curves and their bands are given."""
MARGIN = 1.25
"""Curves extend beyond the smallest rung and the target by this factor."""
CURVE_ITSELF = 10**12
"""Number of seeds: the mean of so many has no noise, so a prediction's interval is that of the curve itself."""


class EstimatePlan:
    """The ladder as planned, as far as the estimates need it."""

    def __init__(self, ladder: Ladder, runs: Iterable[CollectedRun]) -> None:
        self.criterion, self.target = ladder.criterion, ladder.target_amount
        self.axis: Axis = ladder.axis
        self.rungs = [rung.name for rung in ladder.rungs]  # without the target
        self.seeds = {rung.name: len(rung.seeds) for rung in ladder.all_rungs}
        self.arms = [arm.name for arm in sorted(ladder.arms, key=lambda arm: arm.is_aa)]
        self.unchanged = [arm.name for arm in ladder.arms if arm.is_aa]
        # Amounts on the axis by (rung, arm), also of runs that are still to be made: predictions of them need theirs.
        self.amounts = {(run.rung, run.arm): ladder.amount(run) for run in runs} | {(TARGET, BASELINE): self.target}
        self.amounts |= {(rung.name, BASELINE): ladder.amount(rung) for rung in ladder.rungs}
        target = ladder.target
        self.target_mix = math.log(target.tokens / target.parameters) if target else None

    def judge(self, results: Sequence[RunResult], flops: float, **more: Any) -> list[Verdict]:
        return verdict.judge(results, self.criterion, flops, **self._rule, **more)

    def compare(self, results: Sequence[RunResult], flops: float) -> list[verdict.Judgement]:
        return verdict.compare(results, self.criterion, flops, **self._rule)

    @property
    def _rule(self) -> dict[str, Any]:
        return {
            "arms": self.arms, "unchanged": self.unchanged, "target_mix": self.target_mix, "axis": self.axis
        }  # fmt: skip


def estimate(results: Sequence[RunResult], plan: EstimatePlan) -> Tree:
    """Return everything that is estimated from the losses.

    `no_fit` is the reason if no curve fits the baseline; everything that rests on the curve is then empty.
    """
    results = decision.without_time(results)  # seconds would differ at every execution
    rungs, level = [result for result in results if result.rung != TARGET], plan.criterion.level
    tree: Tree = {
        "noise": _noise(results),
        "ranking": downstream.ranking(rungs),
        "differences": _differences(results, plan),
        "fit": None, "no_fit": None, "bootstrap": None, "curve": None, "verdicts": [], "lines": {},
        "predictions": _predictions(results, plan), "multiplier_predictions": [],
    }  # fmt: skip
    if plan.axis == "compute" and planes.vary_apart(rungs):
        return tree | {"predictions": []} | _on_a_surface(rungs, plan)
    try:
        fit = fits.fit_curve(rungs, level, axis=plan.axis)
    except FitError as error:
        return tree | {"no_fit": str(error)}
    verdicts, grid = plan.judge(rungs, plan.target, fit=fit), _grid(plan)
    curve = fits.Profile.from_rungs(fits.Rungs.from_results(rungs), level)
    return tree | {
        "fit": fit.to_json(),
        "bootstrap": fits.bootstrap(rungs, level).to_json(),
        "curve": {"flops": grid} | _columns([curve.prediction(flops, CURVE_ITSELF) for flops in grid]),
        "verdicts": [decision.loss_tree(found, plan.axis) for found in verdicts],
        "lines": _lines(rungs, Baseline.from_results(rungs, fit), plan),
        "multiplier_predictions": list(_multiplier_predictions(results, plan, verdicts)),
    }


def _on_a_surface(results: Sequence[RunResult], plan: EstimatePlan) -> Tree:
    """Verdicts and surfaces of a ladder whose parameters and tokens vary apart."""
    reason = "parameters and tokens vary apart, so a curve in compute cannot hold these runs; a surface can."
    base = [run for run in results if run.arm == BASELINE and math.isfinite(run.loss)]
    parameters, tokens, loss = np.array([(run.parameters, run.tokens, run.loss) for run in base], dtype=float).T
    verdicts, lines = [], {}
    try:
        if plan.arms:
            sizes = SurfaceBaseline.from_results(results, plan.target, plan.criterion.level, plan.target_mix)
            verdicts = plan.judge(results, plan.target, surface=sizes)
            lines = _lines(results, sizes, plan)
    except FitError as error:
        reason = f"{reason} Arms have no verdict: {error}"
    return {
        "no_fit": reason, "verdicts": [decision.loss_tree(found, plan.axis) for found in verdicts], "lines": lines,
        "surface": surface.fit(parameters, tokens, loss, plan.target),
    }  # fmt: skip


# --- without a curve --------------------------------------------------------------------------------------------------


def _noise(results: Sequence[RunResult]) -> list[Tree]:
    """Mean and spread over the seeds of each rung and arm."""
    groups: dict[tuple[str, str], list[float]] = {}
    for result in results:
        groups.setdefault((result.rung, result.arm), []).append(result.loss)
    found = []
    for (rung, arm), losses in groups.items():
        finite = [loss for loss in losses if math.isfinite(loss)]
        mean, sd = (statistics.fmean(finite) if finite else None), (statistics.stdev(finite) if finite[1:] else None)
        counts = {"seeds": len(finite), "diverged": len(losses) - len(finite)}
        found.append({"rung": rung, "arm": arm, **counts, "mean": mean, "sd": sd})
    return found


def _differences(results: Sequence[RunResult], plan: EstimatePlan) -> list[Tree]:
    """Mean loss of each rung and arm minus the baseline's of the same seed, with Student's interval."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    for result in results:
        if math.isfinite(result.loss):
            losses.setdefault((result.rung, result.arm), {})[result.seed] = result.loss
    found = []
    for rung in (*plan.rungs, TARGET):
        base = losses.get((rung, BASELINE), {})
        for arm in plan.arms:
            own = losses.get((rung, arm), {})
            pairs = [loss - base[seed] for seed, loss in own.items() if seed in base]
            if pairs:
                difference = _mean(pairs, plan.criterion.level).to_json()
                found.append({"rung": rung, "arm": arm, "pairs": len(pairs), "difference": difference})
    return found


def _mean(values: Sequence[float], level: float) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, None, None, level)
    half = -float(special.stdtrit(len(values) - 1, level / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, level)


# --- curves with their bands ------------------------------------------------------------------------------------------


def _grid(plan: EstimatePlan) -> list[float]:
    first = min(plan.amounts[rung, BASELINE] for rung in plan.rungs)
    return np.geomspace(first / MARGIN, plan.target * MARGIN, GRID).tolist()


def _columns(intervals: Sequence[Interval]) -> Tree:
    trees = [interval.to_json() for interval in intervals]
    return {name: [tree[name] for tree in trees] for name in ("value", "low", "high")}


def _lines(results: Sequence[RunResult], baseline: Sizes, plan: EstimatePlan) -> Tree:
    """Each arm's multiplier against compute, over all forms and by each; None if it cannot be extrapolated."""
    half, runs = plan.criterion.level / 2, by_arm(results)
    matched = [list(baseline.match(runs.get(arm, []), arm)) for arm in plan.arms]
    grid, worths = _grid(plan), baseline.compare(matched)
    found = [worths.at(math.log(flops / baseline.scale)) for flops in grid]
    fading = LINE + found[-1].excess[:, LINE:].argmin(-1)
    columns = {
        "value": [point.value for point in found],
        "low": [point.bound(half, -1) for point in found],
        "high": [point.bound(half, 1) for point in found],
        "line": [point.values[:, LINE] for point in found],
        "other_floor": [point.values[:, OTHER_FLOOR] for point in found],
        "fades": [np.take_along_axis(point.values, fading[:, None], -1)[:, 0] for point in found],
    }
    return {
        arm: {"flops": grid} | {key: [_ratio(point[number]) for point in points] for key, points in columns.items()}
        if can_extrapolate(rungs) else None
        for number, (arm, rungs) in enumerate(zip(plan.arms, matched, strict=True))
    }  # fmt: skip


def _ratio(log: float) -> float | None:
    """The ratio with this logarithm; None if it is too large or too small to mean anything."""
    return math.exp(log) if abs(log) < 100 else None


# --- predictions ------------------------------------------------------------------------------------------------------


def _questions(results: Sequence[RunResult], plan: EstimatePlan) -> list[tuple[str, Sequence[str]]]:
    """Return (rung to predict, rungs to predict it by) for the largest rung, each rung not run yet, and the target.

    The largest rung is predicted although it was run: its prediction is the test of the method. Only rungs at which
    the baseline was run can be used.
    """
    ran = {result.rung for result in results if result.arm == BASELINE}
    asked = [rung for rung in plan.rungs[1:] if rung not in ran or rung == plan.rungs[-1]]
    below = {rung: plan.rungs[: plan.rungs.index(rung)] for rung in asked} | {TARGET: plan.rungs}
    return [(rung, [name for name in names if name in ran]) for rung, names in below.items()]


def _predictions(results: Sequence[RunResult], plan: EstimatePlan) -> list[Tree]:
    """Predicted losses of the baseline and each arm, each by its own curve, beside the observed ones."""
    runs = by_arm(results)
    asked = [
        (rung, arm, below)
        for rung, below in _questions(results, plan)
        for arm in (BASELINE, *plan.arms)
        if (rung, arm) in plan.amounts
    ]
    known: dict[int, fits.Rungs] = {}
    refused: dict[int, str] = {}
    for number, (_, arm, below) in enumerate(asked):
        try:
            by = [result for result in runs.get(arm, []) if result.rung in below]
            known[number] = fits.Rungs.from_results(by, arm)
        except FitError as error:
            refused[number] = str(error)
    profiles = dict(zip(known, fits.Profile.from_many(list(known.values()), plan.criterion.level), strict=True))
    found = []
    for number, (rung, arm, below) in enumerate(asked):
        losses = [run.loss for run in runs.get(arm, []) if run.rung == rung and math.isfinite(run.loss)]
        tree: Tree = {
            "rung": rung, "arm": arm, "by": list(below), "runs": len(losses), "refused": refused.get(number)
        }  # fmt: skip
        found.append(tree | _prediction(profiles.get(number), losses, rung, plan.amounts[rung, arm], plan))
    return found


def _prediction(
    profile: fits.Profile | None, losses: Sequence[float], rung: str, amount: float, plan: EstimatePlan
) -> Tree:
    if profile is None:
        observed = statistics.fmean(losses) if losses else None
        return {
            "flops": amount, "predicted": None, "seeds": len(losses), "observed": observed, "error": None,
            "relative_error": None, "inside": None,
        }  # fmt: skip
    # The interval is that of a mean of so many runs: those that there are, or else those to come.
    check = profile.check(amount, len(losses) or plan.seeds.get(rung, 0) or 1)
    return (fits.check(check, losses) if losses else check).to_json()


def _multiplier_predictions(
    results: Sequence[RunResult], plan: EstimatePlan, verdicts: Sequence[Verdict]
) -> Iterable[Tree]:  # fmt: skip
    """Yield predicted multipliers beside those that the runs there measured."""
    of_all: Compared = {found.arm: found for found in verdicts}
    rungs_of_all = {run.rung for run in results} - {TARGET}
    ran = {run.rung for run in results}
    for rung, below in _questions(results, plan):
        flops = plan.amounts[rung, BASELINE]
        # What a rung alone says does not depend on the target: where no other rung is left out, the verdicts have it.
        known = rungs_of_all == {*below, rung}
        measured = of_all if known else _compare(results, [*below, rung], plan, flops) if rung in ran else {}
        # The verdicts are already predictions of the target by all rungs.
        by = of_all if rung == TARGET else _compare(results, below, plan, flops)
        for arm in plan.arms:
            if (rung, arm) not in plan.amounts:
                continue
            rungs = measured[arm].rungs if arm in measured else []
            estimate, found = next((point for point in rungs if point.rung == rung), None), by.get(arm)
            yield {
                "rung": rung, "arm": arm, "by": list(below), "flops": flops,
                "predicted": found and found.multiplier.to_json(),
                "other_floor": found and found.other_floor.to_json(),
                "measured": estimate and estimate.multiplier.to_json(), "pairs": estimate.pairs if estimate else 0,
            }  # fmt: skip


def _compare(results: Sequence[RunResult], rungs: Sequence[str], plan: EstimatePlan, flops: float) -> Compared:
    """Comparisons by these rungs alone, by arm; empty if no curve can be fitted to them."""
    by = [result for result in results if result.rung in rungs]
    try:
        return dict(zip(plan.arms, plan.compare(by, flops), strict=True))
    except FitError:
        return {}
