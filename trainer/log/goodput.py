"""Where a run's wall time went, from its event log alone.

Wall time runs from the start of the first attempt's process to rank 0's last event (for a run that is going on: to
now), and ends with the first attempt that finished: starting a finished run again costs no goodput. Only rank 0's log
is read, since clocks of hosts differ. A cursor moves along its events, never back; each stretch that it passes is
shared out among the parts below, a duration that an event states being cut to the stretch. So parts are never negative
and sum to the wall time.

- `productive`: computing steps whose result survived. A step is lost when a later attempt resumes before it, so each
  step that the run stands on counts once.
- `redone`: computations of such steps that were thrown away, for a coarser grid or a value that is not finite. Those
  of one step are alike, so each is taken for an equal share of its time.
- `lost_steps`: computing steps, and evaluating them, whose result was lost.
- `evaluation`, `save_stall`: scoring held-out sets; the loop waiting for a save, where the log says how long.
- `startup`: from a process's start to its first step, by cause in `startup` beside the parts.
- `hung`: without progress until a watchdog noticed.
- `down`: from the last progress of an attempt that died or failed (its last step, evaluation or save) to the start of
  the next process: the step in progress, noticing, rendezvous, or a person who starts it again.
- `preempted`: the same after an attempt that was asked to stop, from its end.
- `shutdown`: from the last step or evaluation of an attempt that ended in order to its end, but for the stall: the last
  save, hashing.
- `other`: what is left between events: batches, logging, a save whose stall nobody recorded.

Goodput is `productive` over wall time.

A value nobody measured is None, never 0.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.log import events
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointSaved,
    Entry,
    EvalDone,
    Event,
    Hung,
    NotFinite,
    StepDone,
)
from trainer.log.incidents import PROGRESS

PARTS = (
    "productive", "redone", "lost_steps", "evaluation", "save_stall", "startup",
    "hung", "down", "preempted", "shutdown", "other",
)  # fmt: skip


def account(entries: Iterable[Entry], now: float | None = None) -> dict[str, Any]:
    """{wall_seconds, productive_seconds, ratio, parts: {name: seconds}, startup: {cause: seconds}}.

    `now` is given for a run that is going on. All is None, and there are no parts, before the first attempt's start.
    """
    attempts = _attempts_of_rank_0(entries)
    starts = [_start(attempt) for attempt in attempts]
    if not any(starts):
        return {"wall_seconds": None, "productive_seconds": None, "ratio": None, "parts": {}, "startup": {}}
    ledger = _Ledger(_process_start(*starts[0]) if starts[0] else attempts[0][0].time)
    gap, hung = "down", 0.0
    for number, (attempt, start) in enumerate(zip(attempts, starts, strict=True)):
        if start is None:  # it died while it was starting
            continue
        ledger.advance(_process_start(*start), gap, hung=hung)
        ledger.start_up(*start)
        resumed = (later[1].from_step for later in starts[number + 1 :] if later is not None)
        _spend(ledger, attempt, start[1], min(resumed, default=None))
        gap = "preempted" if _end(attempt) == "preempted" else "down"
        hung = max((entry.event.seconds for entry in attempt if isinstance(entry.event, Hung)), default=0.0)
    if now is not None:
        ledger.advance(now, "other")
    elif starts[-1] is not None and _in_order(attempts[-1]):
        ledger.advance(attempts[-1][-1].time, "shutdown")
    else:
        ledger.advance(attempts[-1][-1].time, gap, hung=hung)
    return ledger.totals()


def _attempts_of_rank_0(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Rank 0's entries by attempt, in order, up to the first attempt that finished; with everyone's Hung."""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.rank == 0 or isinstance(entry.event, Hung):
            groups.setdefault(entry.attempt, []).append(entry)
    attempts: list[list[Entry]] = []
    for group in groups.values():
        own = [entry for entry in group if entry.rank == 0]
        if own:
            newest = max(entry.time for entry in own)
            # Other ranks' reports of a hang count with their duration, not with the time of their clocks.
            foreign = [dataclasses.replace(entry, time=newest) for entry in group if entry.rank != 0]
            attempts.append(sorted(own, key=lambda entry: entry.time) + foreign)
        if _end(own) == "finished":
            break
    return attempts


def _start(attempt: Sequence[Entry]) -> tuple[Entry, AttemptStarted] | None:
    return next(((entry, entry.event) for entry in attempt if isinstance(entry.event, AttemptStarted)), None)


def _end(attempt: Sequence[Entry]) -> str | None:
    return next((e.event.status for e in reversed(attempt) if isinstance(e.event, AttemptEnded) and e.rank == 0), None)


def _in_order(attempt: Sequence[Entry]) -> bool:
    return _end(attempt) in ("finished", "preempted")


def _process_start(entry: Entry, event: AttemptStarted) -> float:
    return entry.time - math.fsum(event.startup_seconds.values())


def _spend(ledger: "_Ledger", attempt: Sequence[Entry], start: AttemptStarted, resumed: int | None) -> None:
    """Share out an attempt's time from its start to its end, or to its last progress if it did not end in order.

    `resumed` is the earliest step from which a later attempt went on: what this one did after it is lost.
    """
    in_order, stalls = _in_order(attempt), _stalls(attempt)
    last_work = max((n for n, entry in enumerate(attempt) if isinstance(entry.event, StepDone | EvalDone)), default=-1)
    stall = stalls.get(start.from_step, 0.0)
    for number, entry in enumerate(attempt):
        event = entry.event
        if not isinstance(event, PROGRESS) and not (in_order and isinstance(event, AttemptEnded)):
            continue
        lost = resumed is not None and isinstance(event, StepDone | EvalDone) and event.step > resumed
        rest = "shutdown" if in_order and number > last_work else "redone" if isinstance(event, NotFinite) else "other"
        taken = ledger.advance(entry.time, rest, **_claims(event, lost), save_stall=stall)
        # A save is reported some steps later; the loop waited for it right after the step that was saved.
        stall = stalls.get(event.step, 0.0) if isinstance(event, StepDone) else stall - taken["save_stall"]


def _claims(event: Event, lost: bool) -> dict[str, float]:
    """The parts that an event states its duration for."""
    match event:
        case StepDone(seconds=seconds) | EvalDone(seconds=seconds) if lost:
            return {"lost_steps": seconds}
        case StepDone(seconds=seconds, redone=redone):
            return {"productive": seconds / (1 + redone), "redone": seconds * redone / (1 + redone)}
        case EvalDone(seconds=seconds):
            return {"evaluation": seconds}
        case _:
            return {}


def _stalls(attempt: Sequence[Entry]) -> dict[int, float]:
    """How long the loop waited for the save of each step, where the log says."""
    stalls: dict[int, float] = {}
    for event in (entry.event for entry in attempt):
        if isinstance(event, CheckpointSaved | CheckpointFailed):
            stalls[event.step] = stalls.get(event.step, 0.0) + (event.stall_seconds or 0.0)
    return stalls


class _Ledger:
    """A cursor on rank 0's clock; what it passes is shared out among the parts."""

    def __init__(self, origin: float) -> None:
        self._origin = self._at = origin
        # Lists, summed once with fsum: millions of rounded additions would no longer sum to the wall time.
        self._parts: dict[str, list[float]] = {name: [] for name in PARTS}
        self._startup: dict[str, list[float]] = {}

    def advance(self, to: float, rest: str, **claims: float) -> dict[str, float]:
        """Move to Unix time `to` if that is later; claims take their seconds in turn, `rest` what they leave."""
        left = max(0.0, to - self._at)
        self._at = max(self._at, to)
        taken = {}
        for part, seconds in claims.items():
            taken[part] = min(left, max(0.0, seconds))
            left -= taken[part]
            self._parts[part].append(taken[part])
        self._parts[rest].append(left)
        return taken

    def start_up(self, entry: Entry, event: AttemptStarted) -> None:
        seconds = max(0.0, entry.time - self._at)
        stated = math.fsum(event.startup_seconds.values())
        for cause, part in event.startup_seconds.items():
            self._startup.setdefault(cause, []).append(part / stated * seconds if stated > 0 else 0.0)
        self.advance(entry.time, "startup")

    def totals(self) -> dict[str, Any]:
        wall = self._at - self._origin
        parts = {name: math.fsum(seconds) for name, seconds in self._parts.items()}
        return {
            "wall_seconds": wall,
            "productive_seconds": parts["productive"],
            "ratio": parts["productive"] / wall if wall > 0 else None,
            "parts": parts,
            "startup": {cause: math.fsum(seconds) for cause, seconds in self._startup.items()},
        }


def committed(entries: Iterable[Entry]) -> dict[int, StepDone]:
    """The steps that the run's present state stands on: each computed last, and not lost since."""
    steps: dict[int, StepDone] = {}
    for entry in entries:
        match entry.event:
            case AttemptStarted() as event if entry.rank == 0:
                while steps and (newest := next(reversed(steps))) > event.from_step:
                    del steps[newest]
            case StepDone() as event if entry.rank == 0:
                steps[event.step] = event
    return steps


def committed_samples(run: Path) -> dict[int, str]:
    """The ledger: for each step of the committed history, the digest of the samples that were computed for it."""
    return {step: event.samples for step, event in committed(events.read(run)).items()}
