"""The learning-rate sweep of each rung and arm: what it chose, and at what price."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.ladder import collect
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.stats.records import JsonRecord


@dataclass(frozen=True)
class Choice(JsonRecord):
    """What a sweep came to at one rung, for one arm."""

    arm: str
    rung: str
    rate: float | None
    """The best multiplier; None while the sweep goes on, or where all of it failed."""
    losses: dict[str, float | None]
    """By multiplier, as "0.5"; None: no result."""
    at_edge: bool
    """The best is the first or last of the range: the optimum may lie outside."""
    complete: bool
    """Whether every run of it has ended."""
    flops: float
    """Of the runs that finished."""


def choices(ladder: Ladder, pool: Path) -> list[Choice]:
    """One for each rung and arm; empty without [tuning]."""
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in ladder.sweep:
        groups.setdefault((run.rung, run.arm), []).append(run)
    return [_choice(ladder, pool, runs) for runs in groups.values()]


def _choice(ladder: Ladder, pool: Path, runs: list[PlannedRun]) -> Choice:
    found = collect.collect_runs(ladder, pool, runs)
    scores = {one.rate: one.loss for one in found if one.loss is not None and math.isfinite(one.loss)}
    complete = all(one.status in ("finished", "missing") for one in found)
    best = min(scores, key=lambda rate: scores[rate]) if scores and complete else None
    assert ladder.tuning is not None
    rates = ladder.tuning.rates
    return Choice(
        runs[0].arm, runs[0].rung, best, {f"{rate:g}": scores.get(rate) for rate in rates},
        best in (rates[0], rates[-1]), complete, sum(one.flops for one in found if one.status == "finished"),
    )  # fmt: skip


def final(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    """The ladder's runs as they are to be made, each at the rate of its sweep; without those whose sweep goes on."""
    if ladder.tuning is None:
        return ladder.runs
    rates = {(choice.rung, choice.arm): choice.rate for choice in choices(ladder, pool) if choice.rate is not None}
    return [run.at_rate(rates[run.rung, run.arm]) for run in ladder.runs if (run.rung, run.arm) in rates]


def wanted(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    """All runs that are known by now, rung by rung, each rung's sweep first."""
    if ladder.tuning is None:
        return ladder.runs
    order = {name: number for number, name in enumerate(dict.fromkeys(run.rung for run in ladder.runs))}
    return sorted([*ladder.sweep, *final(ladder, pool)], key=lambda run: (order[run.rung], run.rate is None))


def failed(ladder: Ladder, pool: Path) -> dict[tuple[str, str], str]:
    """{(rung, arm): why} where no rate could be chosen, so that its runs cannot be made."""
    return {
        (choice.rung, choice.arm): "no run of its learning-rate sweep finished"
        for choice in choices(ladder, pool)
        if choice.complete and choice.rate is None
    }
