"""What became of a ladder's runs, from their event logs: the points that statistics take, and what a report tells."""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import NumericsError, TopropeError
from trainer.fleet import run_store as pools
from trainer.ladder.plan.plan import Ladder, PlannedRun
from trainer.ladder.stats.records import Point, Record
from trainer.log import events, goodput, rundir
from trainer.log.events import AttemptEnded, AttemptStarted, Entry, EvalDone, FaultFired, NotFinite, StepDone
from trainer.log.history import History

FASTEST_SHARE = 200
"""One step in so many counts as the fastest, at least one."""
SPIKE_WINDOW, SPIKE_DEVIATIONS = 32, 6.0
"""A spike: a loss so many robust deviations above the median of so many steps before it."""


@dataclass(frozen=True)
class Outcome(Record):
    """One planned run as it is now."""

    arm: str
    rung: str
    seed: int
    rate: float | None
    """Of a sweep's run: multiplier of the learning rate."""
    key: str
    status: pools.Status
    reason: str
    """Why it is missing."""
    flops: float
    parameters: int
    tokens: int
    steps: int
    step: int
    loss: float | None = None
    """The ladder's metric at the last step; None while there is none. Not finite where the run diverged."""
    digest: str | None = None
    """Of the tokens that it was scored on."""
    seconds: float | None = None
    """Of the steps that the run stands on."""
    undisturbed_seconds: float | None = None
    """The same if every step took as long as the fastest few: what the computation costs. Others who share the machine
    only make steps slower; with a load of 8 on 2 cores the ratio of two equal runs had a standard deviation of 42 % by
    sums or medians, and of 9 % by the fastest step."""
    wall_seconds: float | None = None
    """From the first start to the end: with start-up, evaluation, saves, faults."""
    spent: dict[str, float] = field(default_factory=dict)
    """Where that went, in seconds: the parts of goodput.py."""
    attempts: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Made on purpose: {kind, step, attempt}."""
    replayed: int = 0
    """Steps computed again since a death had lost them."""
    redone: int = 0
    """Steps computed again on a coarser grid."""
    not_finite: int = 0
    """Computations of a step that were not finite."""
    spikes: list[int] = field(default_factory=list)
    """Steps whose loss stood out above those before it."""
    weights_sha256: str | None = None
    git_commit: str | None = None
    machine: tuple[str, str, int] | None = None
    """(host, device, ranks) of all its attempts; None where they differ."""


def outcomes(ladder: Ladder, pool: Path, runs: Sequence[PlannedRun] | None = None) -> list[Outcome]:
    """Of these runs (default: all but a sweep's), in their order.

    A run that was scored on other tokens than most is missing: the held-out set has changed since ("repo" does).
    """
    planned = ladder.runs if runs is None else runs
    return _scored_alike(planned, [outcome(run, pool, ladder.metric, ladder.unit) for run in planned])


def _scored_alike(planned: Sequence[PlannedRun], found: list[Outcome]) -> list[Outcome]:
    groups: dict[tuple[str, int, int], list[Outcome]] = {}
    for run, one in zip(planned, found, strict=True):  # an arm's tokenizer or context makes other tokens of one text
        data = run.config.data
        groups.setdefault((data.tokenizer, data.vocab_size, run.config.model.context), []).append(one)
    odd = set()
    for group in groups.values():
        digests = Counter(one.digest for one in group if one.digest is not None)
        odd |= set(digests) - {digest for digest, _ in digests.most_common(1)}
    return [_other_text(one) if one.digest in odd else one for one in found]


def _other_text(one: Outcome) -> Outcome:
    reason = (
        "It was scored on another text than most runs: the held-out set has changed since.\n"
        f"  Losses on two texts cannot be compared. Remove {one.key} from the pool, and it is run again."
    )
    return dataclasses.replace(one, status="missing", reason=reason, loss=None)


def points(ladder: Ladder, pool: Path) -> list[Point]:
    """Runs that finished, or that diverged, for fit and verdict; the target's too, with rung TARGET.

    With [tuning], at the best learning rate of each rung and arm. Seconds are those of an undisturbed run, and None for
    a run on another machine than most: they would compare machines.
    """
    from trainer.ladder import tuning

    return points_of(outcomes(ladder, pool, tuning.final(ladder, pool)))


def points_of(found: Sequence[Outcome]) -> list[Point]:
    """Of those that have a loss."""
    machines = Counter(one.machine for one in found if one.status == "finished" and one.machine is not None)
    usual = machines.most_common(1)[0][0] if machines else None
    return [_point(one, usual) for one in found if one.loss is not None]


def _point(one: Outcome, machine: tuple[str, str, int] | None) -> Point:
    assert one.loss is not None
    comparable = one.machine is not None and one.machine == machine
    seconds = one.undisturbed_seconds if comparable and math.isfinite(one.loss) else None
    return Point(one.arm, one.rung, one.seed, one.flops, one.parameters, one.tokens, one.loss, seconds)


def outcome(planned: PlannedRun, pool: Path, metric: str, unit: str) -> Outcome:
    """From the files as they are now."""
    state, place = pools.state(pool, planned), pools.place(pool, planned)
    bare = Outcome(
        planned.arm, planned.rung, planned.seed, planned.rate, planned.key, state.status, state.reason, planned.flops,
        planned.parameters, planned.tokens, planned.config.budget.steps, state.step,
    )  # fmt: skip
    try:
        entries = events.read(place.run)
        about = rundir.read(place.run) if entries else {}
    except TopropeError as error:
        return dataclasses.replace(bare, status="missing", reason=str(error))
    return dataclasses.replace(bare, **_told(entries, about, bare, metric, unit)) if entries else bare


def _told(entries: list[Entry], about: dict[str, Any], bare: Outcome, metric: str, unit: str) -> dict[str, Any]:
    own = [entry for entry in entries if entry.rank == 0 and not isinstance(entry.event, FaultFired)]
    steps = [entry.event for entry in own if isinstance(entry.event, StepDone)]
    starts = [entry.event for entry in entries if isinstance(entry.event, AttemptStarted)]
    history = History.from_entries(entries)
    kept = history.committed
    took = sorted(step.seconds / (1 + step.redone) for step in kept.values())
    fastest = took[: max(1, len(took) // FASTEST_SHARE)]
    machines = {(start.host, start.device, start.world_size) for start in starts}
    account = goodput.account(history)
    return {
        **_score(entries, bare, metric, unit),
        "seconds": math.fsum(took) if took else None,
        "undisturbed_seconds": len(took) * statistics.fmean(fastest) if took else None,
        "wall_seconds": account["wall_seconds"],
        "spent": account["parts"],
        "attempts": len({entry.attempt for entry in own}),
        "faults": [
            {"kind": entry.event.fault, "step": entry.event.step, "attempt": entry.attempt}
            for entry in entries
            if isinstance(entry.event, FaultFired)
        ],
        "replayed": len(steps) - len({step.step for step in steps}),
        "redone": sum(step.redone > 0 for step in kept.values()),
        "not_finite": sum(isinstance(entry.event, NotFinite) for entry in own),
        "spikes": spikes([kept[step].loss for step in sorted(kept)]),
        "weights_sha256": next((e.weights_sha256 for e in _ends(entries, "finished") if e.weights_sha256), None),
        "git_commit": about.get("git_commit"),
        "machine": machines.pop() if len(machines) == 1 else None,
    }


def _ends(entries: Sequence[Entry], status: str) -> list[AttemptEnded]:
    return [e.event for e in entries if isinstance(e.event, AttemptEnded) and e.event.status == status and e.rank == 0]


def _score(entries: Sequence[Entry], bare: Outcome, metric: str, unit: str) -> dict[str, Any]:
    """The metric of a finished run; of one that diverged it is not a number."""
    if bare.status != "finished":
        diverged = any(end.reason.startswith(NumericsError.__name__) for end in _ends(entries, "failed")[-1:])
        return {"loss": math.nan if diverged and bare.status == "missing" else None}
    scores = [
        entry.event
        for entry in entries
        if isinstance(entry.event, EvalDone) and (entry.event.set, entry.event.step) == (metric, bare.steps)
    ]
    if not scores:
        return {"loss": None}
    loss = scores[-1].bits_per_byte if unit == "bits_per_byte" else scores[-1].loss
    return {"loss": loss, "digest": scores[-1].digest}


def spikes(losses: Sequence[float]) -> list[int]:
    """Steps (from 1) whose loss is more than SPIKE_DEVIATIONS robust deviations above the median before it."""
    found = []
    for number in range(SPIKE_WINDOW, len(losses)):
        before = losses[number - SPIKE_WINDOW : number]
        middle = statistics.median(before)
        deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in before)  # as a normal's
        if losses[number] > middle + SPIKE_DEVIATIONS * deviation > middle:
            found.append(number + 1)
    return found
