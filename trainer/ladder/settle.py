"""Further runs for open verdicts, until all are settled or the hours are used.

Each round reads the verdicts (a look), chooses the runs that settle an arm most often for their time
(stats/advice.py), records them in ladder.json, and makes them. Looks inflate errors, so the criterion must have been
written for them: `looks` is their number, or "any". The hours that count are those estimated when runs were added: a
ladder that was killed continues with what is left of them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_FINISHED, ConfigError, FitError, UsageError
from trainer.ladder import collect, preregistration, run, tuning
from trainer.ladder.plan import load
from trainer.ladder.plan.ladder import TARGET, Ladder, PlannedRun
from trainer.ladder.plan.schema import AddedRuns
from trainer.ladder.run import LadderStatus
from trainer.ladder.stats import advice, decision, verdict
from trainer.ladder.stats.records import BASELINE, Remedy, RunResult, Verdict

Seconds = Callable[[Sequence[PlannedRun]], float | None]
SMALLER = 0.95  # factor of N by which a new rung is made smaller until it takes no more compute than the target


@dataclass(frozen=True)
class Choice:
    """Runs that may be added, for one arm."""

    ladder: Ladder  # with these runs
    added: AddedRuns
    probability: float
    hours: float

    def __str__(self) -> str:
        places = ", ".join(f"{name} (seeds {', '.join(map(str, seeds))})" for name, seeds in self.added.seeds.items())
        return (
            f"added for {', '.join(self.added.arms)}: {places}; settles it with probability {self.probability:.0%}, "
            f"about {self.hours:,.1f} hours"
        )


def check(ladder: Ladder, hours: float) -> None:
    """Raise UsageError unless the ladder's criterion allows further looks and the hours are some."""
    if not 0 < hours < math.inf:
        raise UsageError(f"--settle {hours:g} is no number of hours.\n  Give a positive one.")
    if ladder.criterion.looks == 1:
        raise UsageError(
            "criterion.looks = 1, and --settle reads the verdicts again after every addition.\n"
            "  More looks than a criterion was written for make wrong verdicts likelier than its level. Set looks = "
            '"any" or their number in [criterion]; the change is recorded.'
        )


def settle(ladder: Ladder, out: Path, hours: float, *, tell: Callable[[str], None], **options: Any) -> LadderStatus:
    """Do what is left of a ladder, then add runs and do them; `options` are those of run.run.

    Raises UsageError if the criterion was not written for several looks, and what run.run raises.
    """
    check(ladder, hours)
    while True:
        done = run.run(ladder, out, **options)
        if done.exit_status != EXIT_FINISHED:
            return done
        record = preregistration.read(out)
        additions = record.additions if record else []
        looks = ladder.criterion.looks
        if looks != "any" and len(additions) + 1 >= looks:
            tell(f"This was look {len(additions) + 1} of {looks}: nothing more is added.")
            return done
        results = read_results(ladder, out)
        left = hours - math.fsum(addition.hours for addition in additions)
        choice = choose(ladder, results, left, lambda runs, done=done: _seconds(runs, done))
        if isinstance(choice, str):
            tell(choice)
            return done
        preregistration.add(choice.ladder, out, choice.added, choice.probability, choice.hours)
        tell(f"Look {len(additions) + 1}: {choice}.")
        ladder = choice.ladder


def read_results(ladder: Ladder, out: Path) -> list[RunResult]:
    """Results at the rungs, without what rests on seconds."""
    pool = preregistration.pool_of(out)
    runs = tuning.final(ladder, tuning.choices(ladder, pool))
    found = collect.run_results(collect.collect_runs(ladder, pool, runs), ladder.axis)
    return decision.without_time(result for result in found if result.rung != TARGET)


def _seconds(runs: Sequence[PlannedRun], status: LadderStatus) -> float | None:
    return status.seconds_in_slots(runs)


def choose(ladder: Ladder, results: Sequence[RunResult], hours: float, seconds: Seconds) -> Choice | str:
    """Return the runs to add, or the reason why none are; `seconds` estimates how long runs take together."""
    arms, unchanged = [arm.name for arm in ladder.arms], [arm.name for arm in ladder.arms if arm.is_aa]
    amount, duration = math.fsum(map(ladder.amount, ladder.runs)), seconds(ladder.runs)
    if duration is None:
        return "How long runs take is not known, so nothing is added."
    try:
        verdicts = verdict.judge(
            results, ladder.criterion, ladder.target_amount, arms=arms, unchanged=unchanged, axis=ladder.axis,
            most_flops=max(hours, 0.0) * 3600 * amount / duration,
        )  # fmt: skip
    except FitError as error:
        return f"There is no verdict that more runs could settle: {error}"
    unsettled = [found for found in verdicts if found.decision == "inconclusive" and found.arm not in unchanged]
    if not unsettled:
        return "Every verdict is settled."
    found = [choice for one in unsettled for choice in _choices(ladder, one, seconds) if choice.hours <= hours]
    if not found:
        names = ", ".join(one.arm for one in unsettled)
        return f"Open: {names}. No further runs of {max(hours, 0):,.1f} hours or less are likely enough to settle it."
    likely = max(choice.probability for choice in found)
    # The rule of advice.advise, over all arms and by hours.
    worthwhile = [choice for choice in found if choice.probability >= advice.WORTHWHILE * likely]
    return max(worthwhile, key=lambda choice: choice.probability / choice.hours)


def _choices(ladder: Ladder, found: Verdict, seconds: Seconds) -> Iterator[Choice]:
    known = {planned.key for planned in [*ladder.runs, *ladder.sweep]}
    for remedy in found.remedies:
        if remedy.probability is None:
            continue
        try:
            wider, added = _widened(ladder, found.arm, remedy)
        except ConfigError:
            continue  # there is no size between the largest rung and this one
        new = [planned for planned in [*wider.runs, *wider.sweep] if planned.key not in known]
        duration = seconds(new)
        if new and duration is not None:
            yield Choice(wider, added, remedy.probability, duration / 3600)


def _widened(ladder: Ladder, arm: str, remedy: Remedy) -> tuple[Ladder, AddedRuns]:
    """The ladder with the runs of a remedy. Raises ConfigError if there can be none of this size."""
    if remedy.flops is None:
        names = [rung.name for rung in ladder.rungs] if remedy.rung is None else [remedy.rung]
        added = AddedRuns(arms=[arm], seeds={name: _further_seeds(ladder, arm, name, remedy.seeds) for name in names})
        return load.extended(ladder, [added]), added
    largest = ladder.rungs[-1]
    name = f"added {sum(rung.name.startswith('added ') for rung in ladder.rungs) + 1}"
    if ladder.axis == "data":
        seeds = _seeds_of_new_rung(ladder, largest.name, remedy.seeds)
        added = AddedRuns(arms=[arm], seeds={name: seeds}, unique_tokens=round(remedy.flops))
        return load.extended(ladder, [added]), added
    # Along a ladder of fixed D / N, compute grows as N².
    parameters = largest.parameters * math.sqrt(remedy.flops / largest.flops)
    seeds = _seeds_of_new_rung(ladder, largest.name, remedy.seeds)
    while True:
        added = AddedRuns(arms=[arm], seeds={name: seeds}, parameters=parameters)
        try:
            return load.extended(ladder, [added]), added
        except ConfigError:
            parameters *= SMALLER
            if parameters <= largest.parameters * 1.05:
                raise


def _seeds_of_new_rung(ladder: Ladder, largest: str, number: int) -> list[int]:
    """So many seeds: first those of the largest rung."""
    seeds = sorted({run.seed for run in ladder.runs if run.rung == largest})
    return [*seeds, *_unused_seeds(ladder, max(seeds) + 1, number)][:number]


def _further_seeds(ladder: Ladder, arm: str, rung: str, number: int) -> list[int]:
    """Seeds that the arm lacks at a rung: first those that the baseline has there."""
    seeds = {name: {run.seed for run in ladder.runs if (run.rung, run.arm) == (rung, name)} for name in (BASELINE, arm)}
    ready = sorted(seeds[BASELINE] - seeds[arm])
    return [*ready, *_unused_seeds(ladder, max(run.seed for run in ladder.runs) + 1, number)][:number]


def _unused_seeds(ladder: Ladder, first: int, number: int) -> list[int]:
    """So many seeds from `first` on, without the one that the learning rates are chosen with."""
    tuned = ladder.file.tuning.seed if ladder.file.tuning else None
    return [seed for seed in range(first, first + number + 1) if seed != tuned][:number]
