"""What would be another if the same ladder were run again: seconds, attempts, faults met, machines, commits, dates.

And what rests on seconds: the final verdicts, which also ask what a step takes. If an arm's decision here differs from
that of its losses alone, time has decided.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.ladder.collect import CollectedRun
from trainer.ladder.report.estimates import Plan, Tree
from trainer.ladder.stats import decision, verdict
from trainer.ladder.stats.records import BASELINE, RunResult

AWAY = ("down", "preempted")
"""Parts of a run's time in which no process was at it: until it was started again, be it by a person the next day."""
LOST = ("lost_steps", "redone", "hung")
"""Parts in which what was computed was lost."""


def of(
    runs: Sequence[CollectedRun], sweep: Sequence[CollectedRun], results: Sequence[RunResult], plan: Plan,
    record: Mapping[str, Any], fitted: bool,
) -> Tree:  # fmt: skip
    distinct = list({one.key: one for one in [*runs, *sweep]}.values())
    return {
        "verdicts": _verdicts(results, plan) if fitted else [],
        "criterion_history": record.get("criterion_history", []),
        "first_planned": record.get("first_planned"),
        "edits": record.get("edits", []),
        "time": _time(distinct, sweep),
        "survived": _survived(distinct),
        "arms": [_arm(arm, runs) for arm in (BASELINE, *plan.arms)],
        "machines": _machines(distinct),
        "commits": sorted({one.git_commit for one in distinct if one.git_commit}),
        "runs": [_run(one) for one in distinct if one.attempts],
    }


def _verdicts(results: Sequence[RunResult], plan: Plan) -> list[Tree]:
    rungs = [result for result in results if result.rung != plan.target]
    judged = verdict.judge(rungs, plan.criterion, plan.target_flops, arms=plan.arms, unchanged=plan.unchanged)
    return [decision.time_tree(one) for one in judged]


def _time(runs: Sequence[CollectedRun], sweep: Sequence[CollectedRun]) -> Tree:
    """Seconds of runs, not of the clock: those side by side count each."""
    parts: Counter[str] = Counter()
    for one in runs:
        parts.update(one.spent)
    swept = {one.key for one in sweep}
    return {
        "training_seconds": _sum(one.seconds for one in runs),
        "busy_seconds": _sum(_busy(one) for one in runs),
        "sweep_seconds": _sum(_busy(one) for one in runs if one.key in swept),
        "lost_seconds": _sum(sum(one.spent.get(part, 0.0) for part in LOST) for one in runs if one.spent),
        "away_seconds": _sum(sum(one.spent.get(part, 0.0) for part in AWAY) for one in runs if one.spent),
        "parts": dict(parts),
    }


def _busy(one: CollectedRun) -> float | None:
    return sum(seconds for part, seconds in one.spent.items() if part not in AWAY) if one.spent else None


def _sum(values: Any) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None


def _survived(runs: Sequence[CollectedRun]) -> Tree:
    """Faults that were made in runs which then finished, and in those that did not."""
    finished = [one for one in runs if one.status == "finished"]
    made = Counter(fault["kind"] for one in runs for fault in one.faults)
    survived = Counter(fault["kind"] for one in finished for fault in one.faults)
    return {
        "faults": {kind: {"made": made[kind], "survived": survived[kind]} for kind in sorted(made)},
        "attempts": sum(one.attempts for one in runs),
        "restarts": sum(max(0, one.attempts - 1) for one in runs),
        "runs_restarted": sum(one.attempts > 1 for one in runs),
        "replayed_steps": sum(one.replayed for one in runs),
    }


def _arm(arm: str, runs: Sequence[CollectedRun]) -> Tree:
    """Instabilities of an arm's runs, and what became of them."""
    own = [one for one in runs if one.arm == arm]
    return {
        "arm": arm,
        "runs": len(own),
        "spikes": sum(len(one.spikes) for one in own),
        "redone": sum(one.redone for one in own),
        "not_finite": sum(one.not_finite for one in own),
        "diverged": sum(one.loss is not None and not math.isfinite(one.loss) for one in own),
        "faults": sum(len(one.faults) for one in own),
        "attempts": sum(one.attempts for one in own),
        "replayed": sum(one.replayed for one in own),
    }


def _machines(runs: Sequence[CollectedRun]) -> list[Tree]:
    found = Counter(one.machine for one in runs if one.attempts)
    return [
        {"host": machine[0], "device": machine[1], "ranks": machine[2], "runs": times}
        if machine
        else {"host": None, "device": None, "ranks": None, "runs": times}
        for machine, times in sorted(found.items(), key=str)
    ]


def _run(one: CollectedRun) -> Tree:
    plain = one.to_json()
    names = (
        "arm", "rung", "seed", "rate", "key", "seconds", "undisturbed_seconds",
        "wall_seconds", "attempts", "faults", "replayed", "redone",
        "not_finite", "git_commit",
    )  # fmt: skip
    return {name: plain[name] for name in names}
