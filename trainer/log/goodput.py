"""Accounts for the wall time of a run, from its event log alone.

Wall time runs from the start of the first attempt's process to rank 0's last event (for a run that still runs: to
now). It ends with the first attempt that finished: starting a finished run again costs no goodput. Only rank 0's log is
read, since clocks of hosts differ. A cursor moves along its events, never back, and each stretch that it passes is
shared out among the parts below. A duration that an event states is cut to the stretch. So parts are never negative and
sum to the wall time. Goodput is `productive` over wall time.

- `productive`: computing steps whose result survived. A step is lost when a later attempt, or a quorum whose
  members have all died, goes on from before it, so each committed step counts once.
- `redone`: computations of such steps that were thrown away, for a coarser grid or a value that is not finite. The
  computations of one step are taken to be equally long.
- `lost_steps`: computing and evaluating steps whose result was lost.
- `evaluation`, `save_stall`: scoring held-out sets; the loop waiting for a save, where the log has it.
- `startup`: from a process's start to its first step, by cause in `startup` beside the parts.
- `hung`: without progress until a watchdog noticed.
- `down`: from the last progress of an attempt that died or failed (its last step, evaluation or save) to the start of
  the next process: the step in progress, detection, rendezvous, or a person who starts it again; in quorum mode also
  from a member's death until the others go on.
- `preempted`: the same after an attempt that was asked to stop, from its end.
- `shutdown`: from the last step or evaluation of an attempt that ended in order to its end, without the stall: the last
  save, hashing.
- `other`: the rest between events: batches, logging, a save whose stall is not in the log.

A value that was not measured is None, never 0.
"""

import math
from collections import defaultdict
from typing import Any

from trainer.log import events
from trainer.log.events import Entry, Event
from trainer.log.history import PROGRESS, Attempt, History, process_start

WORK = (events.StepDone, events.EvalDone)
PARTS = (
    "productive", "redone", "lost_steps", "evaluation", "save_stall", "startup",
    "hung", "down", "preempted", "shutdown", "other",
)  # fmt: skip


def account(history: History, now: float | None = None) -> dict[str, Any]:
    """Return {wall_seconds, productive_seconds, ratio, parts: {name: seconds}, startup: {cause: seconds}}.

    `now`, a Unix time, is given for a run that still runs. Before the first attempt is ready all values are None and
    there are no parts.
    """
    final = history.finish[0].attempt if history.finish else math.inf
    attempts = [attempt for attempt in history.attempts if attempt.main_entries and attempt.number <= final]
    if not any(attempt.start for attempt in attempts):
        return {"wall_seconds": None, "productive_seconds": None, "ratio": None, "parts": {}, "startup": {}}
    first, last = attempts[0], attempts[-1]
    # The time before a start belongs to the way in which the attempt before it ended.
    ledger = _Ledger(process_start(first.start) if first.start else first.main_entries[0].time)
    gap, hung = "down", 0.0
    for number, attempt in enumerate(attempts):
        if attempt.start is None:  # it died while it was starting
            continue
        # The hang comes first in it, until the watchdog noticed.
        ledger.advance(process_start(attempt.start), gap, hung=hung)
        ledger.start_up(*attempt.start)
        # The next attempt may resume late, and one after it earlier still, from an older checkpoint.
        resumed = (later.start[1].from_step for later in attempts[number + 1 :] if later.start is not None)
        _spend(ledger, attempt, attempt.start[1].from_step, min(resumed, default=None))
        gap = "preempted" if attempt.main_status == "preempted" else "down"
        # Any rank may notice a hang. The duration counts, not the time of the report: hosts' clocks differ.
        hung = max((event.seconds for _, event in attempt.hangs), default=0.0)
    # From the last event that was accounted for to the end of the log, or to now.
    if now is not None:
        ledger.advance(now, "other")
    elif last.start is not None and last.ended_in_order:
        ledger.advance(last.main_entries[-1].time, "shutdown")
    else:
        ledger.advance(last.main_entries[-1].time, gap, hung=hung)
    return ledger.totals()


def _spend(ledger: "_Ledger", attempt: Attempt, from_step: int, resumed: int | None) -> None:
    """Share out an attempt's time from its start to its end, or to its last progress if it did not end in order.

    `resumed` is the earliest step that a later attempt resumed from: the steps of this attempt after it are lost.
    """
    entries, in_order = attempt.main_entries, attempt.ended_in_order
    # Seconds that the loop waited for the save of each step, where the log has them.
    stalls: dict[int, float] = defaultdict(float)
    for event in (entry.event for entry in entries):
        if isinstance(event, events.CheckpointSaved | events.CheckpointFailed):
            stalls[event.step] += event.stall_seconds or 0.0
    # Where all members of a quorum have died, the attempt itself goes on from disk.
    undone = list[int | None]()
    for entry in reversed(entries):
        undone.append(resumed)
        event = entry.event
        if isinstance(event, events.MembersChanged) and set(event.members) == set(event.joined):
            resumed = min(event.step, event.step if resumed is None else resumed)
    undone.reverse()
    last_work = max((n for n, entry in enumerate(entries) if isinstance(entry.event, WORK)), default=-1)
    stall = stalls[from_step]
    for number, entry in enumerate(entries):
        event = entry.event
        # Other events pass no stretch of their own: events that a failing rank writes before it ends count as `down`.
        if not isinstance(event, PROGRESS) and not (in_order and isinstance(event, events.AttemptEnded)):
            continue
        back_to = undone[number]
        lost = back_to is not None and isinstance(event, WORK) and event.step > back_to
        redone = "redone" if isinstance(event, events.NotFinite) else "other"
        rest = "shutdown" if in_order and number > last_work else redone
        taken = ledger.advance(entry.time, rest, **_claims(event, lost), save_stall=stall)
        # A save is reported some steps later; the loop waited for it right after the step that was saved.
        stall = stalls[event.step] if isinstance(event, events.StepDone) else stall - taken["save_stall"]


def _claims(event: Event, lost: bool) -> dict[str, float]:
    """{part: seconds} that an event states."""
    match event:
        case events.StepDone(seconds=seconds) | events.EvalDone(seconds=seconds) if lost:
            return {"lost_steps": seconds}
        case events.StepDone(seconds=seconds, redone=redone):
            # The step took 1 + redone computations, of which the last one counts.
            return {"productive": seconds / (1 + redone), "redone": seconds * redone / (1 + redone)}
        case events.MembersChanged(seconds=seconds, lost=lost_members) if lost_members:
            return {"down": seconds}
        case events.EvalDone(seconds=seconds):
            return {"evaluation": seconds}
    return {}


class _Ledger:
    """A cursor on rank 0's clock, and the seconds of each part up to it."""

    def __init__(self, origin: float) -> None:
        self._origin = self._at = origin
        # Lists, summed once with fsum: millions of rounded additions would no longer sum to the wall time.
        self._parts: dict[str, list[float]] = {name: [] for name in PARTS}
        self._startup: dict[str, list[float]] = {}

    def advance(self, to: float, rest: str, **claims: float) -> dict[str, float]:
        """Move to Unix time `to` if that is later. `claims` take their seconds in turn, part `rest` the remainder.

        Returns the seconds that each claim got.
        """
        left = max(0.0, to - self._at)
        self._at = max(self._at, to)
        taken = {}
        for part, seconds in claims.items():
            taken[part] = min(left, max(0.0, seconds))
            left -= taken[part]
            self._parts[part].append(taken[part])
        self._parts[rest].append(left)
        return taken

    def start_up(self, entry: Entry, event: events.AttemptStarted) -> None:
        """Move to the end of a start-up, and share its time out among the causes that it states."""
        seconds = max(0.0, entry.time - self._at)
        stated = math.fsum(event.startup_seconds.values())
        for cause, part in event.startup_seconds.items():
            self._startup.setdefault(cause, []).append(part / stated * seconds if stated > 0 else 0.0)
        self.advance(entry.time, "startup")

    def totals(self) -> dict[str, Any]:
        wall = self._at - self._origin
        parts, startup = (
            {name: math.fsum(seconds) for name, seconds in of.items()} for of in (self._parts, self._startup)
        )
        productive = parts["productive"]
        ratio = productive / wall if wall > 0 else None
        return {"wall_seconds": wall, "productive_seconds": productive, "ratio": ratio, "parts": parts,
                "startup": startup}  # fmt: skip
