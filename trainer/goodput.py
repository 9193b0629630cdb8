"""Where a run's wall time went, and the incidents that took it: both from the event log alone.

**Accounting.** Wall time runs from the start of the first attempt's process to rank 0's last event (for a run that is
going on: to now), and ends with the first attempt that finished: starting a finished run again costs no goodput. Only
rank 0's log is read, since clocks of hosts differ. A cursor moves along its events, never back; each stretch that it
passes is shared out among the parts below, a duration that an event states being cut to the stretch. So parts are
never negative and sum to the wall time.

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
- `shutdown`: from the last progress of an attempt that ended in order to its end: the last save, hashing.
- `other`: what is left between events: batches, logging, a save whose stall nobody recorded.

Goodput is `productive` over wall time.

**Incidents.** One for each attempt that ended before the run did, and for each save that failed, checkpoint that was
passed over, and step that was computed again because it was not finite.

A value nobody measured is None, never 0.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer import events
from trainer.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Entry,
    EvalDone,
    Hung,
    NotFinite,
    StepDone,
    StopRequested,
    WorkersLost,
)

PARTS = (
    "productive", "redone", "lost_steps", "evaluation", "save_stall", "startup",
    "hung", "down", "preempted", "shutdown", "other",
)  # fmt: skip
PROGRESS = (StepDone, EvalDone, CheckpointSaved, CheckpointFailed, NotFinite)


def account(entries: Iterable[Entry], now: float | None = None) -> dict[str, Any]:
    """{wall_seconds, productive_seconds, ratio, parts: {name: seconds}, startup: {cause: seconds}}.

    `now` is given for a run that is going on. All is None, and there are no parts, before the first attempt's start.
    """
    attempts = _attempts_of_rank_0(entries)
    starts = [_start(attempt) for attempt in attempts]
    known = [(entry, event) for entry, event in filter(None, starts)]
    if not known:
        return {"wall_seconds": None, "productive_seconds": None, "ratio": None, "parts": {}, "startup": {}}
    ledger = _Ledger(_process_start(*starts[0]) if starts[0] else attempts[0][0].time)
    gap, hung = "down", 0.0
    for number, (attempt, start) in enumerate(zip(attempts, starts, strict=True)):
        if start is None:  # it died while it was starting
            continue
        ledger.advance(_process_start(*start), gap, hung=hung)
        ledger.start_up(*start)
        resumed = (later[1].from_step for later in starts[number + 1 :] if later is not None)
        in_order = _end(attempt) in ("finished", "preempted")
        _spend(ledger, attempt, start[1], min(resumed, default=None), in_order)
        gap = "preempted" if _end(attempt) == "preempted" else "down"
        hung = max((entry.event.seconds for entry in attempt if isinstance(entry.event, Hung)), default=0.0)
    last, in_order = attempts[-1], _end(attempts[-1]) in ("finished", "preempted")
    ledger.advance(last[-1].time, "shutdown" if in_order else "other" if now else "down", hung=hung)
    if now is not None:
        ledger.advance(now, "other")
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


def _process_start(entry: Entry, event: AttemptStarted) -> float:
    return entry.time - math.fsum(event.startup_seconds.values())


def _spend(
    ledger: "_Ledger", attempt: Sequence[Entry], start: AttemptStarted, resumed: int | None, in_order: bool
) -> None:
    """Share out an attempt's time from its start to its end, or to its last progress if it did not end in order.

    `resumed` is the earliest step from which a later attempt went on: what this one did after it is lost.
    """
    stalls: dict[int, float] = {}
    for event in (entry.event for entry in attempt):
        if isinstance(event, CheckpointSaved | CheckpointFailed):
            stalls[event.step] = stalls.get(event.step, 0.0) + (event.stall_seconds or 0.0)
    # A save is reported some steps later; the loop waited right after the step that was saved.
    stall = stalls.get(start.from_step, 0.0)
    for entry in attempt:
        event = entry.event
        lost = resumed is not None and isinstance(event, StepDone | EvalDone) and event.step > resumed
        rest, claims = "other", {}
        if isinstance(event, StepDone):
            kept = 1 / (1 + event.redone)
            done = {"productive": event.seconds * kept, "redone": event.seconds * (1 - kept)}
            claims = {"lost_steps": event.seconds} if lost else done
        elif isinstance(event, EvalDone):
            claims = {"lost_steps" if lost else "evaluation": event.seconds}
        elif isinstance(event, NotFinite):
            rest = "redone"
        elif isinstance(event, AttemptEnded) and in_order:
            rest = "shutdown"
        elif not isinstance(event, PROGRESS):
            continue
        taken = ledger.advance(entry.time, rest, **claims, save_stall=stall)
        stall = stalls.get(event.step, 0.0) if isinstance(event, StepDone) else stall - taken["save_stall"]


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
        assert abs(math.fsum(parts.values()) - wall) < 1e-6
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
            case StepDone() as event:
                steps[event.step] = event
    return steps


def committed_samples(run: Path) -> dict[int, str]:
    """The ledger: for each step of the committed history, the digest of the samples that were computed for it."""
    return {step: event.samples for step, event in committed(events.read(run)).items()}


@dataclass(frozen=True)
class Incident:
    """Something went wrong, or stopped the run, and what that cost."""

    attempt: int
    """In which it happened."""
    kind: str
    """worker_lost, hung, preempted, not_finite, save_failed or checkpoint_rejected."""
    rank: int | None
    point: str | None
    """Where in the step, by the names of step.py."""
    step: int | None
    """Of what failed; for an attempt's end the last step it completed."""
    lost_steps: int | None
    """Steps whose result was lost. None before the run was resumed."""
    seconds: float | None
    """Without training: from the last progress to the next attempt's readiness, or of computation thrown away."""
    detected_as: str
    """The kind of event that told of it; "silence" where none did."""
    text: str
    """One line for people."""
    time: float
    """Unix time of its first trace in the log."""


@dataclass
class _Attempt:
    """What is known of an attempt while its events come in."""

    number: int
    start: Entry | None = None
    last: Entry | None = None
    """Rank 0's last progress."""
    reached: int | None = None
    end: AttemptEnded | None = None
    """Rank 0's."""
    failed: list[Entry] = field(default_factory=list)
    hung: list[Entry] = field(default_factory=list)
    not_finite: NotFinite | None = None
    signal: str | None = None
    world_size: int | None = None
    pids: set[int] = field(default_factory=set)
    told: set[tuple[Any, ...]] = field(default_factory=set)
    """Incidents that several ranks tell of count once."""


class Story:
    """Turns a run's events into incidents as they come: those of earlier attempts first, then one by one.

    How an attempt ended is known once the next one has started, and told at its WorkersLost or at its first progress.
    """

    def __init__(self, earlier: Iterable[Entry] = ()) -> None:
        self._now: _Attempt | None = None
        self._ended: list[_Attempt] = []  # and not gone on with yet
        self._losses: list[WorkersLost] = []
        self._reached = 0
        self.incidents: list[Incident] = []
        """All so far."""
        for entry in earlier:
            self.tell(entry)

    def tell(self, entry: Entry) -> list[Incident]:
        """Take in the next entry; returns the incidents that it completes."""
        before = len(self.incidents)
        if self._now is None or entry.attempt != self._now.number:
            self._settle()
            if self._now is not None and not _is_finished(self._now):
                self._ended.append(self._now)
            self._now = _Attempt(entry.attempt)
        self._note(entry, self._now)
        return self.incidents[before:]

    def close(self) -> list[Incident]:
        """There is no next attempt: returns the incidents that were waiting for one."""
        before = len(self.incidents)
        self._settle()
        unresumed = [*self._ended, *([self._now] if self._now and not _is_finished(self._now) else [])]
        self.incidents += [_ending(attempt, None, None, None) for attempt in unresumed]
        return self.incidents[before:]

    def _note(self, entry: Entry, now: _Attempt) -> None:
        event = entry.event
        if entry.rank == 0 and isinstance(event, (*PROGRESS, AttemptEnded)):
            self._settle()
        match event:
            case AttemptStarted():
                now.pids.add(event.pid)
                if entry.rank == 0:
                    now.start, now.last, now.reached, now.world_size = entry, entry, event.from_step, event.world_size
            case StepDone():
                now.reached = self._reached = event.step
            case AttemptEnded():
                if event.status == "failed":
                    now.failed.append(entry)
                if entry.rank == 0:
                    now.end = event
            case Hung():
                now.hung.append(entry)
            case WorkersLost():
                self._losses.append(event)
                if now.start is not None:
                    self._settle()
            case StopRequested():
                now.signal = event.signal
            case NotFinite() | CheckpointFailed() | CheckpointRejected():
                self._aside(entry, now)
        if entry.rank == 0 and (isinstance(event, PROGRESS) or _left_in_order(event)):
            now.last = entry

    def _aside(self, entry: Entry, now: _Attempt) -> None:
        """An incident that does not end the attempt."""
        event = entry.event
        last = now.last.time if now.last is not None else None
        match event:
            case NotFinite(step=step, trial=trial):
                if trial > 0:
                    now.not_finite = event
                    return
                kind, key, seconds = "not_finite", (step, trial), None if last is None else max(0.0, entry.time - last)
            case CheckpointFailed(step=step):
                kind, key, seconds = "save_failed", (step, event.in_a_row), event.stall_seconds
            case CheckpointRejected(step=step):
                kind, key, seconds = "checkpoint_rejected", (step,), None
            case _:
                raise AssertionError(event)
        if (event.kind, *key) not in now.told:
            now.told.add((event.kind, *key))
            self.incidents.append(
                Incident(now.number, kind, entry.rank, None, step, 0, seconds, event.kind, tell(event), entry.time)
            )

    def _settle(self) -> None:
        """Tell how the attempts before this one ended, now that it has started."""
        if self._now is None or self._now.start is None or not (self._ended or self._losses):
            return
        ended, losses = self._ended, self._losses
        self._ended, self._losses = [], []
        start = self._now.start
        assert isinstance(start.event, AttemptStarted)
        lost = max(0, self._reached - start.event.from_step)
        for number, attempt in enumerate(ended):
            loss = next((one for one in losses if _is_of(one, attempt)), None)
            losses = [one for one in losses if one is not loss]
            # Work and time are lost once, however many starts it took to go on.
            self.incidents.append(_ending(attempt, loss, start if number == 0 else None, lost if number == 0 else 0))
        self.incidents += [self._lost_while_starting(loss, start) for loss in losses]
        self._reached = start.event.from_step

    def _lost_while_starting(self, loss: WorkersLost, start: Entry) -> Incident:
        text = f"{_who_died(loss)} while attempt {start.attempt} was starting"
        rank = _first_failure(loss).get("rank")
        step = self._reached or None
        return Incident(start.attempt, "worker_lost", rank, None, step, 0, None, loss.kind, text, start.time)


def incidents(entries: Iterable[Entry], running: bool = False) -> list[Incident]:
    """All incidents of a log; `running` says that its last attempt is still at work."""
    story = Story(entries)
    if not running:
        story.close()
    else:
        story.settle()
    return story.incidents
