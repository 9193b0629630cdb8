"""A run in wall time, as plain data: its attempts, steps, saves, evaluations, faults and incidents.

`show.timeline` draws it; campaign reports keep it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.errors import RunDirectoryError
from trainer.log import events, summary
from trainer.log.events import CheckpointSaved, Entry, EvalDone, FaultFired
from trainer.log.history import Attempt, History, process_start
from trainer.log.incidents import incidents_of

CLOCK_SLACK_SECONDS = 1.0  # NTP slews a clock a little; a larger jump means that someone set it


def read_timeline(run: Path) -> dict[str, Any]:
    """Return the timeline of a run that has ended, as JSON values. Raises RunDirectoryError if its log is damaged.

    {origin: Unix seconds, steps_budget,
     attempts: [{attempt, process_started, ready, ended, from_step, to_step, world_size, ended_as}],
     steps: [[t, step, attempt]], saves: [[t, step]], evals: [[t, step]],
     faults: [{t, kind, victim, step, phase, index, attempt}],
     incidents: [{t, kind, text, lost_steps, seconds, attempt, rank, step}]}

    Times `t` are seconds since `origin`: the start of the first process, or the first fault if that was earlier. An
    attempt's `ended` is the time of rank 0's AttemptEnded, else the last sign of life of any of its ranks. An incident
    that ended an attempt begins at the attempt's last progress and lasts until the next attempt is ready. Unknown
    values are None; a run that logged nothing has no origin and empty lists.
    """
    history = History.from_entries(_entries_on_steady_clocks(run))
    times = [entry.time for entry in (*history.entries, *history.fired)]
    times += [process_start(start) for attempt in history.attempts for start in attempt.starts.values()]
    origin = min(times, default=None)
    if origin is None:
        lists = ("attempts", "steps", "saves", "evals", "faults", "incidents")
        return {"origin": None, "steps_budget": None} | {name: [] for name in lists}
    # The sets of one step are evaluated one after the other: the last one's time stands for all of them.
    evals = {(e.attempt, event.step): e.time for e, event in events.select(history.entries, EvalDone, rank=0)}
    budgets = [event.steps for attempt in history.attempts for _, event in attempt.starts.values()]
    saves = events.select(history.entries, CheckpointSaved, rank=0)
    fired = events.select(sorted(history.fired, key=lambda entry: entry.time), FaultFired)
    try:
        ended_as = {attempt["attempt"]: attempt["ended"] for attempt in summary.summarise(run)["attempts"]}
    except RunDirectoryError:  # it has a log, but died before it wrote config.json
        ended_as = {}
    names = ("kind", "text", "lost_steps", "seconds", "attempt", "rank", "step")
    return {
        "origin": origin,
        "steps_budget": budgets[-1] if budgets else None,
        "attempts": [_attempt(a, history.fired, ended_as.get(a.number), origin) for a in history.attempts],
        "steps": [[entry.time - origin, event.step, entry.attempt] for entry, event in history.steps],
        "saves": [[entry.time - origin, event.step] for entry, event in saves],
        "evals": [[time - origin, step] for (_, step), time in evals.items()],
        "faults": [
            {"t": entry.time - origin, "kind": event.fault, "attempt": entry.attempt, "victim": event.victim,
             "step": event.step, "phase": event.phase, "index": event.index}
            for entry, event in fired
        ],
        "incidents": [
            {"t": incident.time and incident.time - origin, **{name: getattr(incident, name) for name in names}}
            for incident in incidents_of(history)
        ],
    }  # fmt: skip


def _entries_on_steady_clocks(run: Path) -> Iterator[Entry]:
    """Yield all entries of a run, with times as if no clock had been set while it ran: a jump would hide all else.

    Faults keep the time of the clock before it jumped, which is when they were written.
    """
    logs: dict[tuple[int, int], list[Entry]] = {}
    jumps: dict[tuple[int, int], list[float]] = {}
    for path in sorted(events.events_directory(run).glob("*.jsonl")):
        for entry in events.read_file(path):
            process = (entry.attempt, entry.rank)
            if not isinstance(entry.event, FaultFired):
                logs.setdefault(process, []).append(entry)
                continue
            yield entry
            if entry.event.fault == "clock_jump":
                jumps.setdefault(process, []).append(entry.time)
    for process, log in logs.items():
        yield from _steady(log, sorted(jumps.get(process, [])))


def _steady(log: Iterable[Entry], jumps: list[float]) -> Iterator[Entry]:
    """Yield the entries of one process in the order it wrote them, corrected where the clock jumped.

    `jumps` are the times at which a fault was about to set its clock. The entry after a jump was written no later than
    the duration that it states. Without that knowledge a clock set forward looks like a long wait; only one that was
    set back can be recognised.
    """
    offset, last = 0.0, -math.inf
    for entry in log:
        read = steady = entry.time + offset
        if read < last - CLOCK_SLACK_SECONDS:
            # Set back. Time continued from the jump if it is known, else from the entry before.
            steady = max(last, jumps.pop(0)) if jumps else last
        elif jumps and read > jumps[0]:
            # Set forward, if the entry lies beyond the end of what the process was doing when the clock jumped.
            latest = jumps.pop(0) + getattr(entry.event, "seconds", 0.0)
            steady = latest if read > latest + CLOCK_SLACK_SECONDS else read
        offset += steady - read
        last = max(last, steady)
        yield replace(entry, time=steady)


def _attempt(attempt: Attempt, fired: Sequence[Entry], ended_as: str | None, origin: float) -> dict[str, Any]:
    # Rank 0 may have died before it was ready; then the lowest rank that was ready stands for the attempt.
    start = attempt.starts[min(attempt.starts)] if attempt.starts else None
    # A rank that makes a fault on itself was alive then.
    alive = [*attempt.entries, *(e for e in fired if e.attempt == attempt.number and e.rank >= 0)]
    ended = attempt.ends[0][0].time if 0 in attempt.ends else max(entry.time for entry in alive)
    return {
        "attempt": attempt.number,
        "process_started": start and process_start(start) - origin,
        "ready": start and start[0].time - origin,
        "ended": ended - origin,
        "from_step": attempt.from_step,
        "to_step": attempt.furthest_step,
        "world_size": start and start[1].world_size,
        "ended_as": ended_as,
    }
