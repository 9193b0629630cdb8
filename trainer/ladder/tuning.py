"""The learning-rate sweep of each rung and arm: the chosen rates, and the runs that follow from them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.ladder import collect
from trainer.ladder.collect import CollectedRun
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

    @property
    def failed(self) -> bool:
        """True if no run of the sweep finished, so that its rung's runs cannot be made."""
        return self.complete and self.rate is None


def choices(ladder: Ladder, pool: Path) -> list[Choice]:
    """Return a choice for each rung and arm; empty without [tuning]."""
    groups: dict[tuple[str, str], list[CollectedRun]] = {}
    for run, result in zip(ladder.sweep, collect.collect_runs(ladder, pool, ladder.sweep), strict=True):
        groups.setdefault((run.rung, run.arm), []).append(result)
    return [_choose(arm, rung, runs) for (rung, arm), runs in groups.items()]


def _choose(arm: str, rung: str, runs: Sequence[CollectedRun]) -> Choice:
    losses = {run.rate or 0.0: run.loss for run in runs}
    known = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    # A run that is still to come may be the best, so nothing is chosen before all have ended.
    complete = all(run.status in ("finished", "missing") for run in runs)
    best = min(known, key=lambda rate: known[rate]) if known and complete else None
    return Choice(
        arm=arm, rung=rung, rate=best, losses={f"{rate:g}": known.get(rate) for rate in losses},
        at_edge=best in (runs[0].rate, runs[-1].rate), complete=complete,
        flops=sum(run.flops for run in runs if run.status == "finished"),
    )  # fmt: skip


def final(ladder: Ladder, chosen: Iterable[Choice]) -> list[PlannedRun]:
    """Return the ladder's runs, each at the rate of its sweep, without those whose sweep has not ended."""
    if ladder.file.tuning is None:
        return ladder.runs
    rates = {(choice.rung, choice.arm): choice.rate for choice in chosen if choice.rate is not None}
    return [run.at_rate(rates[run.rung, run.arm]) for run in ladder.runs if (run.rung, run.arm) in rates]


def wanted(ladder: Ladder, pool: Path) -> list[PlannedRun]:
    """Return all runs that are known by now, rung by rung, each rung's sweep first; in place of several, each."""
    order = list(dict.fromkeys(run.rung for run in ladder.runs))
    chosen = final(ladder, choices(ladder, pool))
    runs = [*ladder.sweep, *(each for run in chosen for each in (run.members or [run]))]
    return sorted(runs, key=lambda run: (order.index(run.rung), run.rate is None))
