"""What a run went through in wall time, as plain data: told from its event log alone.

Times are seconds since `origin`, the start of the first process or the first fault before it. Hosts' clocks are taken
as they are; a clock that was set while a process ran is put right where the log shows it, since a jump of an hour would
hide all else; faults are written down by the clock before it jumped. What nobody knows is None, never 0.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.chaos.drawing import svg
from trainer.errors import RunDirectoryError
from trainer.faults import plan
from trainer.log import events, summary
from trainer.log.events import AttemptEnded, AttemptStarted, CheckpointSaved, Entry, EvalDone, FaultFired, StepDone
from trainer.log.history import History
from trainer.log.incidents import Incident, incidents_of

__all__ = ["of", "svg"]

SLACK_SECONDS = 1.0  # clocks are slewed a little without having been set


def of(run: Path) -> dict[str, Any]:
    """The timeline of a run that has ended, as JSON values. Raises RunDirectoryError if its log is damaged.

    {origin: Unix seconds, steps_budget,
     attempts: [{attempt, process_started, ready, ended, from_step, to_step, world_size, ended_as}],
     steps: [[t, step, attempt]], saves: [[t, step]], evals: [[t, step]],
     faults: [{t, kind, victim, step, phase, index, attempt}],
     incidents: [{t, kind, text, lost_steps, seconds, attempt, rank, step}]}

    An attempt's `ended` is rank 0's word, or else the last sign of life of any of its ranks. Incidents are those of
    incidents.py, so one that ended an attempt lies where the last progress was, and lasts until the next was ready.
    A run that logged nothing has no origin and empty lists.
    """
    fired = plan.fired(run)
    entries = _entries(run, fired)
    times = [entry.time for entry in (*entries, *fired)]
    times += [_process_start(entry) for entry in entries if isinstance(entry.event, AttemptStarted)]
    origin = min(times, default=None)
    if origin is None:
        lists = ("attempts", "steps", "saves", "evals", "faults", "incidents")
        return {"origin": None, "steps_budget": None} | {name: [] for name in lists}
    main = [entry for entry in entries if entry.rank == 0]
    budgets = [entry.event.steps for entry in entries if isinstance(entry.event, AttemptStarted)]
    return {
        "origin": origin,
        "steps_budget": budgets[-1] if budgets else None,
        "attempts": _attempts(run, entries, fired, origin),
        "steps": [[e.time - origin, e.event.step, e.attempt] for e in main if isinstance(e.event, StepDone)],
        "saves": [[e.time - origin, e.event.step] for e in main if isinstance(e.event, CheckpointSaved)],
        "evals": _evals(main, origin),
        "faults": [_fault(entry, origin) for entry in sorted(fired, key=lambda entry: entry.time)],
        "incidents": [_incident(incident, origin) for incident in incidents_of(History.from_entries(entries))],
    }


def _entries(run: Path, fired: Iterable[Entry]) -> list[Entry]:
    """All that the ranks wrote, by attempt and time, on clocks that nobody set."""
    logs: dict[tuple[int, int], list[Entry]] = {}
    for path in sorted(events.events_directory(run).glob("attempt-*.jsonl")):
        for entry in events.read_file(path):
            logs.setdefault((entry.attempt, entry.rank), []).append(entry)
    jumps: dict[tuple[int, int], list[float]] = {}
    for entry in fired:
        assert isinstance(entry.event, FaultFired)
        if entry.event.fault == "clock_jump":
            jumps.setdefault((entry.attempt, entry.rank), []).append(entry.time)
    entries = [entry for key, log in logs.items() for entry in _on_one_clock(log, jumps.get(key, []))]
    return sorted(entries, key=lambda entry: (entry.attempt, entry.time, entry.rank))


def _on_one_clock(log: Sequence[Entry], jumps: Iterable[float]) -> list[Entry]:
    """One process's entries in the order it wrote them, each later than the one before.

    `jumps` are when its clock was about to be set on purpose: what it wrote next came no later than the duration that
    it states. Without that, a clock set forward looks like a long wait, and only one set back can be told.
    """
    pending, right = sorted(jumps), list[Entry]()
    offset, last = 0.0, -math.inf
    for entry in log:
        at = entry.time + offset
        jumped = bool(pending) and at > pending[0]
        if at < last - SLACK_SECONDS:
            right_time = max(last, pending.pop(0)) if pending else last
        elif jumped:
            latest = pending.pop(0) + getattr(entry.event, "seconds", 0.0)
            right_time = latest if at > latest + SLACK_SECONDS else at
        else:
            right_time = at
        offset += right_time - at
        last = max(last, right_time)
        right.append(replace(entry, time=right_time))
    return right


def _process_start(entry: Entry) -> float:
    assert isinstance(entry.event, AttemptStarted)
    return entry.time - math.fsum(entry.event.startup_seconds.values())


def _attempts(run: Path, entries: Sequence[Entry], fired: Sequence[Entry], origin: float) -> list[dict[str, Any]]:
    told, groups = _told(run), dict[int, list[Entry]]()
    for entry in entries:
        groups.setdefault(entry.attempt, []).append(entry)
    for entry in fired:
        if entry.rank >= 0 and entry.attempt in groups:
            groups[entry.attempt].append(entry)  # whoever breaks itself was alive then
    return [_attempt(number, group, told.get(number), origin) for number, group in groups.items()]


def _told(run: Path) -> dict[int, str | None]:
    """How each attempt ended, as `inspect` says."""
    try:
        return {attempt["attempt"]: attempt["ended"] for attempt in summary.summarise(run)["attempts"]}
    except RunDirectoryError:  # it has a log, but died before it wrote down what it is
        return {}


def _attempt(number: int, entries: Sequence[Entry], ended_as: str | None, origin: float) -> dict[str, Any]:
    # Rank 0's if it came that far.
    start = min((e for e in entries if isinstance(e.event, AttemptStarted)), key=lambda e: e.rank, default=None)
    began = start.event if start is not None else None
    assert isinstance(began, AttemptStarted | None)
    from_step = None if began is None else began.from_step
    reached = [e.event.step for e in entries if isinstance(e.event, StepDone | AttemptEnded)]
    ends = [entry.time for entry in entries if entry.rank == 0 and isinstance(entry.event, AttemptEnded)]
    end = ends[-1] if ends else max(entry.time for entry in entries)
    return {
        "attempt": number,
        "process_started": None if start is None else _process_start(start) - origin,
        "ready": None if start is None else start.time - origin,
        "ended": end - origin,
        "from_step": from_step,
        "to_step": max(reached, default=from_step),
        "world_size": None if began is None else began.world_size,
        "ended_as": ended_as,
    }


def _evals(main: Iterable[Entry], origin: float) -> list[list[float]]:
    """The last set's time stands for all sets of a step."""
    scored = {(e.attempt, e.event.step): e.time - origin for e in main if isinstance(e.event, EvalDone)}
    return [[at, step] for (_, step), at in scored.items()]


def _fault(entry: Entry, origin: float) -> dict[str, Any]:
    event = entry.event
    assert isinstance(event, FaultFired)
    told = {name: getattr(event, name) for name in ("victim", "step", "phase", "index")}
    return {"t": entry.time - origin, "kind": event.fault, **told, "attempt": entry.attempt}


def _incident(incident: Incident, origin: float) -> dict[str, Any]:
    told = {
        name: getattr(incident, name) for name in ("kind", "text", "lost_steps", "seconds", "attempt", "rank", "step")
    }
    return {"t": None if incident.time is None else incident.time - origin, **told}
