"""Attribution: for each fault on purpose, the incident of the log that reports it, and the seconds until it did.

The truth is RUN/events/faults.jsonl. The diagnosis is the rest of the run's log, read without knowledge of the faults.
One rule, `may_report`, serves the fault checker and `inspect`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.faults.fault import KINDS, SAVE, Fault
from trainer.faults.plan import PlannedFault
from trainer.log import rundir, summary
from trainer.log.events import (
    CheckpointFailed,
    CheckpointRejected,
    Entry,
    Event,
    FaultFired,
    Hung,
    NotFinite,
    StopRequested,
)
from trainer.log.history import History, process_start
from trainer.log.incidents import Incident, incidents_of

if TYPE_CHECKING:
    from trainer.faults.evidence import Evidence

OWN_EVENT: Mapping[str, type[Event]] = {
    "hung": Hung, "not_finite": NotFinite, "save_failed": CheckpointFailed,
    "checkpoint_rejected": CheckpointRejected, "preempted": StopRequested,
}  # fmt: skip
"""The event by which a kind of incident is noticed."""
SEEN_BY_LAUNCHER = {"worker_lost", "hung", "preempted"}
"""Incidents that end the processes: the next start, or the job's end, shows that they were noticed."""


@dataclass(frozen=True)
class Firing:
    """A fault of the plan that has fired, on however many ranks."""

    fault: PlannedFault
    time: float
    attempt: int
    first: FaultFired
    victims: set[int | None] = field(default_factory=set)

    def __str__(self) -> str:
        return str(self.fault)


@dataclass(frozen=True)
class Attribution:
    """The incident by which the run reported a fault, and how fast."""

    firing: Firing
    incident: Incident | None
    """The incident that reports it."""
    correct: bool | None
    """None if nothing had to be reported, or if it hit an attempt that another fault was ending already."""
    detect_seconds: float | None
    recover_seconds: float | None
    problem: str = ""
    """The mismatch, if it is not correct."""


def may_report(kind: Fault, attempt: int, incident: Incident) -> bool:
    """True if an incident can report a fault of this kind that fired in this attempt."""
    if incident.kind not in kind.expected_incidents:
        return False
    if incident.kind == "checkpoint_rejected":  # found by the attempt that loads next
        return incident.attempt > attempt
    # An attempt that ended before it wrote anything is reported by the one after it, as its own.
    return incident.attempt == attempt or (incident.step is None and incident.attempt == attempt + 1)


# For the checker


def attribute(evidence: "Evidence", firing: Firing, taken: set[int]) -> Attribution:
    """Find the incident that reports a fault. `taken` are the numbers of those that report earlier ones; it grows."""
    kind, incidents = firing.fault.kind, evidence.incidents
    possible = [n for n, incident in enumerate(incidents) if may_report(kind, firing.attempt, incident)]
    fresh = [n for n in possible if n not in taken and not _reports_another(evidence, firing, incidents[n])]
    # One that matches comes before one that does not.
    fresh.sort(key=lambda n: (_mismatch(firing, incidents[n]), n))
    incident, problem, correct = None, "", None
    if fresh:
        incident = incidents[fresh[0]]
        taken.add(fresh[0])
        problem = _mismatch(firing, incident)
        correct = not problem if kind.expected_incidents else None
    elif kind.expected_incidents:
        # Another fault may have ended the attempt before this one could be noticed.
        ending = next((i for i in incidents if i.ends_attempt and i.attempt == firing.attempt), None)
        alone = all(other is firing or other.attempt != firing.attempt for other in evidence.firings)
        if ending is None or alone:
            correct, problem = False, "no incident in the log reports it"
        incident = ending if not alone else None
    detected = _detect_seconds(evidence, firing, incident)
    return Attribution(firing, incident, correct, detected, _recover_seconds(evidence, firing, incident), problem)


def _reports_another(evidence: "Evidence", firing: Firing, incident: Incident) -> bool:
    """True if an incident mismatches this fault but matches a concurrent one."""
    if not _mismatch(firing, incident):
        return False
    return any(
        _is_death_after_damage(other, incident)
        or (may_report(other.fault.kind, other.attempt, incident) and not _mismatch(other, incident))
        for other in evidence.firings
        if other is not firing
    )


def _is_death_after_damage(firing: Firing, incident: Incident) -> bool:
    """True for the death that follows damage to a checkpoint: no incident has to report it."""
    damages = firing.fault.kind.damages_checkpoints
    return damages and incident.attempt == firing.attempt and incident.rank in firing.victims


def _mismatch(firing: Firing, incident: Incident) -> str:
    """The difference between an incident's rank or step and the fault's; empty if they match."""
    fault = firing.fault
    if fault.kind.names_rank and None not in firing.victims and incident.rank not in firing.victims:
        victims = ", ".join(str(rank) for rank in sorted(rank for rank in firing.victims if rank is not None))
        return f"reported of rank {incident.rank}, it was {victims}"
    if fault.from_outside or fault.at_step is None or incident.step is None or incident.kind == "checkpoint_rejected":
        return ""
    if not incident.ends_attempt:
        differs = incident.step != fault.at_step
    elif fault.phase in SAVE:  # training has continued meanwhile
        differs = incident.step < fault.at_step
    else:
        # Ranks are up to a step apart when one of them dies, and rank 0's steps are those that are counted.
        assert fault.point_step is not None
        differs = incident.kind != "preempted" and abs(incident.step - fault.point_step) > 1
    return f"reported of step {incident.step}, it was in step {fault.at_step}" if differs else ""


def _detect_seconds(evidence: "Evidence", firing: Firing, incident: Incident | None) -> float | None:
    """Seconds until the run's log or the end of its processes showed that the fault was noticed."""
    if incident is None or not firing.fault.kind.expected_incidents:
        return None
    own, attempts = OWN_EVENT.get(incident.kind), evidence.history.attempts
    times = [
        entry.time
        for entry in evidence.entries
        if own is not None and isinstance(entry.event, own) and entry.attempt == incident.attempt
    ]
    if incident.kind in SEEN_BY_LAUNCHER:
        times += [process_start(attempt.start) for attempt in attempts if attempt.start is not None]
        ends = [end for attempt in attempts if attempt.number >= firing.attempt for end in attempt.ends.values()]
        times += [entry.time for entry, end in ends if end.status == "failed"]
        times += [launch["ended"] for launch in evidence.launches if launch["ended"] is not None]
    return min((time - firing.time for time in times if time >= firing.time), default=None)


def _recover_seconds(evidence: "Evidence", firing: Firing, incident: Incident | None) -> float | None:
    """Seconds until a step was done that had never been done, or until the end if no step was left."""
    if firing.fault.kind.moves_clock:
        return None  # the times in the log cannot be trusted
    lost_attempt = firing.attempt if incident is not None and incident.ends_attempt else -1
    done = [(entry, event.step) for entry, event in evidence.history.steps]
    reached = max(
        (step for entry, step in done if entry.time <= firing.time or entry.attempt <= lost_attempt), default=0
    )
    times = [entry.time for entry, step in done if step > reached and entry.time > firing.time]
    if reached == evidence.config.budget.steps:
        ends = [end for attempt in evidence.history.attempts for end in attempt.ends.values()]
        times = [entry.time for entry, end in ends if end.status == "finished" and entry.time > firing.time]
    return min(times) - firing.time if times else None


# For `inspect`


def summarise(run: Path, checkpoints: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """summary.summarise, with `faults`: [{index, kind, rank, step, fired, time, attempt, detected_as}].

    `faults` has those of the config that the run was last started with, and any others that fired: one entry for each
    rank that was hit. `detected_as` is the kind of the first incident that reports it.
    """
    run_summary = summary.summarise(run, checkpoints)
    history = History.read(run)
    incidents = incidents_of(history, run_summary["status"] == "running")
    return run_summary | {"faults": _rows(rundir.read(run)["config"].get("faults", ()), history.fired, incidents)}


def _rows(
    planned: Sequence[Mapping[str, Any]], fired: Iterable[Entry], incidents: Sequence[Incident]
) -> list[dict[str, Any]]:
    hits: dict[tuple[int, str, int | None], list[Entry]] = {}
    for entry in fired:
        if isinstance(event := entry.event, FaultFired):
            hits.setdefault((event.index, event.fault, event.victim), []).append(entry)
    rows = []
    for (index, kind, victim), entries in hits.items():  # one fault on one rank, which may have fired several times
        reports = (incident.kind for entry in entries for incident in incidents if _reports(incident, entry))
        about = {"index": index, "kind": kind, "rank": victim, "step": getattr(entries[0].event, "step")}  # noqa: B009
        when = {"fired": True, "time": entries[0].time, "attempt": entries[0].attempt}
        rows.append(about | when | {"detected_as": next(reports, None)})
    with_firings = {(index, kind) for index, kind, _ in hits}
    for index, fault in enumerate(planned):
        if (index, fault["kind"]) not in with_firings:
            row = {"index": index, "kind": fault["kind"], "rank": fault["rank"], "step": fault["at_step"]}
            rows.append(row | {"fired": False, "time": None, "attempt": None, "detected_as": None})
    return sorted(rows, key=lambda row: (row["index"], row["time"] or math.inf))


def _reports(incident: Incident, firing: Entry) -> bool:
    """True if an incident reports a fault on one rank, and names rank and step correctly where it must."""
    event = firing.event
    assert isinstance(event, FaultFired)
    kind = KINDS.get(event.fault)
    if kind is None or not may_report(kind, firing.attempt, incident):
        return False
    if kind.names_rank and incident.rank != event.victim:
        return False
    belongs_to_step = not incident.ends_attempt and incident.kind != "checkpoint_rejected"
    return not belongs_to_step or incident.step == event.step
