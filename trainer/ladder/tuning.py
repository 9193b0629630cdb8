"""The learning-rate sweep of each rung and arm: the chosen rates, and the runs that follow from them."""

import math
from dataclasses import dataclass
from pathlib import Path

from trainer.ladder import collect
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.stats.records import JsonRecord


@dataclass(frozen=True)
class Choice(JsonRecord):
    """Result of a sweep at one rung, for one arm."""

    arm: str
    rung: str
    rate: float | None
    """Best multiplier of the learning rate; None until the sweep has ended, or if all of its runs failed."""
    losses: dict[str, float | None]
    """Loss by multiplier, written as "0.5"; None: no result."""
    at_edge: bool
    """True if the best multiplier is the first or last of the range: the optimum may lie outside."""
    complete: bool
    """True if every run of the sweep has ended."""
    flops: float
    """Compute of the runs that finished."""


def choices(ladder: Ladder, pool: Path) -> list[Choice]:
    """Return a choice for each rung and arm; empty without [tuning]."""
    if ladder.tuning is None:
        return []
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in ladder.sweep:
        groups.setdefault((run.rung, run.arm), []).append(run)
    return [_choose(ladder, pool, runs, ladder.tuning.rates) for runs in groups.values()]


def _choose(ladder: Ladder, pool: Path, runs: list[PlannedRun], rates: list[float]) -> Choice:
    collected = collect.collect_runs(ladder, pool, runs)
    losses = {run.rate: run.loss for run in collected if run.loss is not None and math.isfinite(run.loss)}
    complete = all(run.status in ("finished", "missing") for run in collected)
    best = min(losses, key=lambda rate: losses[rate]) if losses and complete else None
    return Choice(
        arm=runs[0].arm, rung=runs[0].rung, rate=best, losses={f"{rate:g}": losses.get(rate) for rate in rates},
        at_edge=best in (rates[0], rates[-1]), complete=complete,
        flops=sum(run.flops for run in collected if run.status == "finished"),
    )  # fmt: skip


def final(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    """Return the ladder's runs, each at the rate of its sweep, without those whose sweep has not ended."""
    if ladder.tuning is None:
        return ladder.runs
    rates = {(choice.rung, choice.arm): choice.rate for choice in choices(ladder, pool) if choice.rate is not None}
    return [run.at_rate(rates[run.rung, run.arm]) for run in ladder.runs if (run.rung, run.arm) in rates]


def wanted(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    """Return all runs that are known by now, rung by rung, each rung's sweep first."""
    if ladder.tuning is None:
        return ladder.runs
    order = {name: number for number, name in enumerate(dict.fromkeys(run.rung for run in ladder.runs))}
    return sorted([*ladder.sweep, *final(ladder, pool)], key=lambda run: (order[run.rung], run.rate is None))


def failed(ladder: Ladder, pool: Path) -> dict[tuple[str, str], str]:
    """Return {(rung, arm): reason} of the sweeps that gave no rate, so that their runs cannot be made."""
    return {
        (choice.rung, choice.arm): "no run of its learning-rate sweep finished"
        for choice in choices(ladder, pool)
        if choice.complete and choice.rate is None
    }
