"""The execution of a ladder's runs: seconds, attempts, faults, machines, commits, dates. A second one would differ.

The verdicts here also know how long a step takes. If an arm's decision differs from that by its losses alone, time
has decided.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.ladder.collect import CollectedRun
from trainer.ladder.plan.ladder import TARGET
from trainer.ladder.report.estimates import EstimatePlan, Tree
from trainer.ladder.stats import decision
from trainer.ladder.stats.records import BASELINE, RunResult

AWAY = ("down", "preempted")
"""Parts of a run's time without a process: until someone, or something, started it again."""
LOST = ("lost_steps", "redone", "hung")
"""Parts whose computations were lost."""
RUN_KEYS = (
    "arm", "rung", "seed", "rate", "key", "seconds", "undisturbed_seconds", "wall_seconds", "attempts", "faults",
    "replayed", "redone", "not_finite", "git_commit",
)  # fmt: skip


def describe(
    runs: Sequence[CollectedRun], made: Sequence[CollectedRun], sweep: Sequence[CollectedRun],
    results: Sequence[RunResult], plan: EstimatePlan, record: Mapping[str, Any], by_losses: Sequence[Tree],
) -> Tree:  # fmt: skip
    """Return the report's subtree "course". `made` are the runs with an ensemble's members in its place, `record` is
    ladder.json, and `by_losses` has the verdicts by losses, if any."""
    # An arm may share runs with the baseline at a rung where it changes nothing: each counts once.
    distinct = list({run.key: run for run in [*made, *sweep]}.values())
    rungs = [result for result in results if result.rung != TARGET]
    return {
        "verdicts": _verdicts(rungs, plan, by_losses) if by_losses else [],
        "first_planned": record.get("first_planned"),
        **{key: record.get(key, []) for key in ("criterion_history", "edits", "additions")},
        "time": _time(distinct, sweep),
        "survived": _survived(distinct),
        "arms": [_arm(arm, runs) for arm in (BASELINE, *plan.arms)],
        "machines": _machines(distinct),
        "commits": sorted({run.git_commit for run in distinct if run.git_commit}),
        "runs": [{key: tree[key] for key in RUN_KEYS} for tree in (run.to_json() for run in distinct if run.attempts)],
    }


def _verdicts(rungs: Sequence[RunResult], plan: EstimatePlan, by_losses: Sequence[Tree]) -> list[Tree]:
    if plan.axis == "data":  # text is short there, not time: an arm may take as long as it likes
        return []
    found = plan.judge(rungs, plan.target, remedies=False)
    # Further runs are sought for their losses alone.
    sought = {tree["arm"]: tree["remedies"] for tree in by_losses}
    return [
        decision.time_tree(one) | {"remedies": sought[one.arm] if one.decision == "inconclusive" else []}
        for one in found
    ]


def _time(runs: Sequence[CollectedRun], sweep: Sequence[CollectedRun]) -> Tree:
    """Seconds summed over runs: two runs side by side for a minute count as two minutes."""
    parts: Counter[str] = Counter()
    for run in runs:
        parts.update(run.spent)
    swept = {run.key for run in sweep}
    accounted = [run for run in runs if run.spent]
    busy = {run.key: sum(run.spent.values()) - _seconds_in(run, AWAY) for run in accounted}
    return {
        "training_seconds": _sum(run.seconds for run in runs),
        "busy_seconds": _sum(busy.values()),
        "sweep_seconds": _sum(busy[run.key] for run in accounted if run.key in swept),
        "lost_seconds": _sum(_seconds_in(run, LOST) for run in accounted),
        "away_seconds": _sum(_seconds_in(run, AWAY) for run in accounted),
        "parts": dict(parts),
    }


def _seconds_in(run: CollectedRun, parts: Iterable[str]) -> float:
    return sum(run.spent.get(part, 0.0) for part in parts)


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _survived(runs: Sequence[CollectedRun]) -> Tree:
    """Faults by kind: all that fired, and those in runs that finished nevertheless."""
    made = Counter(fault["kind"] for run in runs for fault in run.faults)
    survived = Counter(fault["kind"] for run in runs if run.status == "finished" for fault in run.faults)
    return {
        "faults": {kind: {"made": made[kind], "survived": survived[kind]} for kind in sorted(made)},
        "attempts": sum(run.attempts for run in runs),
        "restarts": sum(max(0, run.attempts - 1) for run in runs),
        "runs_restarted": sum(run.attempts > 1 for run in runs),
        "replayed_steps": sum(run.replayed for run in runs),
    }


def _arm(arm: str, runs: Sequence[CollectedRun]) -> Tree:
    """Instabilities and interruptions of an arm's runs."""
    arm_runs = [run for run in runs if run.arm == arm]
    tree: Tree = {"arm": arm, "runs": len(arm_runs)}
    tree |= {key: sum(len(getattr(run, key)) for run in arm_runs) for key in ("spikes", "faults")}
    tree |= {
        key: sum(getattr(run, key) for run in arm_runs) for key in ("redone", "not_finite", "attempts", "replayed")
    }
    return tree | {"diverged": sum(run.loss is not None and not math.isfinite(run.loss) for run in arm_runs)}


def _machines(runs: Sequence[CollectedRun]) -> list[Tree]:
    # A run that moved between machines has none: host, device and ranks are then None.
    found = Counter(run.machine or (None, None, None) for run in runs if run.attempts)
    names = ("host", "device", "ranks")
    return [dict(zip(names, place, strict=True)) | {"runs": n} for place, n in sorted(found.items(), key=str)]
