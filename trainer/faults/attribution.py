"""Attribution: for each fault on purpose, the incident of the log that reports it, and the seconds until it did.

The truth is RUN/events/faults.jsonl. The diagnosis is the rest of the run's log, read without knowledge of the faults.
One rule, `may_report`, serves the fault checker and `inspect`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.faults import plan
from trainer.faults.fault import KINDS, SAVE, Fault
from trainer.faults.plan import PlannedFault
from trainer.log import events, rundir, summary
from trainer.log.events import Entry, FaultFired
from trainer.log.history import History, process_start
from trainer.log.incidents import Incident, incidents_of

OWN_EVENT: Mapping[str, type[events.Event]] = {
    "hung": events.Hung, "not_finite": events.NotFinite, "save_failed": events.CheckpointFailed,
    "checkpoint_rejected": events.CheckpointRejected, "preempted": events.StopRequested, "corrupted": events.Corrupted,
}  # fmt: skip
"""The event by which a kind of incident is noticed."""
SEEN_BY_LAUNCHER = {"worker_lost", "hung", "preempted"}
"""Incidents that end the processes: the next start, or the job's end, shows that they were noticed."""


@dataclass(frozen=True)
class Reference:
    """Result of the run without faults."""

    weights_sha256: str | None  # None if the run did not finish, as `state_sha256`
    state_sha256: str | None
    samples: dict[int, str]  # digest of the samples by step
    steps: int
    seconds: float
    exact: bool  # True if sums do not depend on their order, so that the weights of other runs can be equal


def reference_of(run: Path, config: Config, seconds: float) -> Reference:
    """The result of the finished run in directory `run`, which took so many seconds."""
    history = History.read(run)
    hashes = (end[1].weights_sha256, end[1].state_sha256) if (end := history.finish) is not None else (None, None)
    return Reference(*hashes, history.committed_samples, config.budget.steps, seconds, config.numerics.exact)


@dataclass(frozen=True)
class Firing:
    """A fault of the plan that has fired, on however many ranks."""

    fault: PlannedFault
    time: float
    attempt: int
    first: FaultFired
    victims: set[int | None] = field(default_factory=set)
    names: set[int | None] = field(default_factory=set)
    """The victims as incidents call them: in quorum mode by a worker's number, else by rank."""

    def __str__(self) -> str:
        return str(self.fault)


@dataclass(frozen=True)
class Attribution:
    """The incident by which the run reported a fault, and how fast."""

    firing: Firing
    incident: Incident | None  # the incident that reports it
    correct: bool | None
    """None if nothing had to be reported, or if it hit an attempt that another fault was ending already."""
    detect_seconds: float | None
    recover_seconds: float | None
    problem: str = ""  # the mismatch, if it is not correct


@dataclass(frozen=True)
class Evidence:
    """A run with faults: the plan, the faults that fired, the log, and how its jobs ended."""

    run: Path
    config: Config
    planned: Sequence[PlannedFault]
    reference: Reference
    launches: Sequence[Mapping[str, Any]]
    """{started, ended, status} of each time the command was given, in Unix seconds."""
    leftovers: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Notes of the nemesis and the runner: faults that could not be made, a job that had to be ended."""

    @cached_property
    def history(self) -> History:
        return History.read(self.run)

    @property
    def entries(self) -> list[Entry]:
        """The run's own log, without the faults that fired: a diagnosis must not be read off the truth."""
        return self.history.entries

    @cached_property
    def incidents(self) -> list[Incident]:
        return incidents_of(self.history)

    @cached_property
    def firings(self) -> list[Firing]:
        """The faults that fired, in order: one entry for each fault of the plan, however many ranks it hit."""
        found: dict[int, Firing] = {}
        planned = {fault.index: fault for fault in self.planned}
        for entry, event in plan.fired(self.run):
            if event.index in planned:
                firing = found.setdefault(event.index, Firing(planned[event.index], entry.time, entry.attempt, event))
                firing.victims.add(event.victim)
                firing.names.add(event.victim if event.member is None else event.member)
        return sorted(found.values(), key=lambda firing: firing.time)

    @property
    def fired_times(self) -> Counter[int]:
        """Number of times that each fault has fired on one rank or another, by index."""
        return Counter(event.index for _, event in plan.fired(self.run))

    @cached_property
    def attributions(self) -> list[Attribution]:
        taken = set[int]()
        return [_attribute(self, firing, taken) for firing in self.firings]


def may_report(kind: Fault, attempt: int, incident: Incident) -> bool:
    """True if an incident can report a fault of this kind that fired in this attempt."""
    if incident.kind not in kind.expected_incidents:
        return False
    if incident.kind == "checkpoint_rejected":  # found by the attempt that loads next
        return incident.attempt > attempt
    return _is_of(incident, attempt)


def _is_of(incident: Incident, attempt: int) -> bool:
    # An attempt that ended before it wrote anything is reported by the one after it, as its own.
    return incident.attempt == attempt or (incident.step is None and incident.attempt == attempt + 1)


# For the checker


def _attribute(evidence: Evidence, firing: Firing, taken: set[int]) -> Attribution:
    """Find the incident that reports a fault. `taken` are the numbers of those that report earlier ones; it grows."""
    kind, incidents = firing.fault.kind, evidence.incidents
    possible = [n for n, incident in enumerate(incidents) if may_report(kind, firing.attempt, incident)]
    # The loss of several workers at once is one incident, which reports each of them.
    several = {n for n in possible if incidents[n].others and firing.names & {incidents[n].rank, *incidents[n].others}}
    possible = [n for n in possible if n not in taken or n in several]
    fresh = [n for n in possible if not _reports_another(evidence, firing, incidents[n])]
    incident, problem, correct = None, "", None
    if fresh:
        # One that matches comes before one that does not.
        number = min(fresh, key=lambda n: (_mismatch(firing, incidents[n]), n))
        taken.add(number)
        incident = incidents[number]
        problem = _mismatch(firing, incident)
        correct = not problem
    elif kind.expected_incidents:
        # Another fault may have ended the attempt before this one could be noticed.
        ending = next((i for i in incidents if i.ends_attempt and _is_of(i, firing.attempt)), None)
        alone = all(other is firing or other.attempt != firing.attempt for other in evidence.firings)
        if ending is None or alone:
            correct, problem = False, "no incident in the log reports it"
        incident = ending if not alone else None
    detected = _detect_seconds(evidence, firing, incident)
    return Attribution(firing, incident, correct, detected, _recover_seconds(evidence, firing, incident), problem)


def _reports_another(evidence: Evidence, firing: Firing, incident: Incident) -> bool:
    """True if an incident mismatches this fault but matches a concurrent one."""
    if not _mismatch(firing, incident):
        return False
    for other in evidence.firings:
        kind = other.fault.kind
        # Damage to a checkpoint comes with the death of a rank, which no incident has to report.
        died = kind.damages_checkpoints and incident.attempt == other.attempt and incident.rank in other.victims
        reported = may_report(kind, other.attempt, incident) and not _mismatch(other, incident)
        if other is not firing and (died or reported):
            return True
    return False


def _mismatch(firing: Firing, incident: Incident) -> str:
    """The difference between an incident's rank or step and the fault's; empty if they match."""
    fault = firing.fault
    must_name = fault.kind.names_rank and incident.kind != "corrupted"  # that one names no rank if it is not known
    if must_name and None not in firing.names and not firing.names & {incident.rank, *incident.others}:
        names = ", ".join(str(name) for name in sorted(name for name in firing.names if name is not None))
        return f"reported of rank {incident.rank}, it was {names}"
    if incident.kind == "corrupted":
        if incident.rank is not None and incident.rank not in firing.names:
            return f"reported of rank {incident.rank}, it was {sorted(firing.names, key=str)}"
        assert fault.at_step is not None
        # An incident that ends its attempt has the last step that was completed.
        step = incident.step + 1 if incident.ends_attempt and incident.step is not None else incident.step
        noticed = step is not None and 0 <= step - fault.at_step < fault.settings.get("steps", 1)
        return "" if noticed else f"reported of step {step}, it was in step {fault.at_step}"
    if fault.from_outside or fault.at_step is None or incident.step is None or incident.kind == "checkpoint_rejected":
        return ""
    if fault.mode == "quorum":
        fired = firing.first.step  # it may have been late
        if fired is None or incident.kind == "preempted":
            return ""
        # The others may complete the step without the victim, and train on while it saves.
        late = incident.step + (incident.lost_steps or 0) - (fired - 1)
        differs = late < 0 if fault.phase in SAVE else abs(late) > 1
        return f"reported of step {incident.step}, it was in step {fired}" if differs else ""
    if not incident.ends_attempt:
        differs = incident.step != fault.at_step
    elif fault.phase in SAVE:  # training has continued meanwhile
        differs = incident.step < fault.at_step
    else:
        # Ranks are up to a step apart when one of them dies, and rank 0's steps are those that are counted.
        assert fault.point_step is not None
        behind = fault.point_step - incident.step
        differs = incident.kind != "preempted" and not -1 <= behind <= 1 + fault.log_lags
    return f"reported of step {incident.step}, it was in step {fault.at_step}" if differs else ""


def _detect_seconds(evidence: Evidence, firing: Firing, incident: Incident | None) -> float | None:
    """Seconds until the run's log or the end of its processes showed that the fault was noticed."""
    if incident is None or not firing.fault.kind.expected_incidents:
        return None
    if incident.kind == "worker_lost" and not incident.ends_attempt:  # the members that are left have said so
        assert incident.time is not None
        return max(0.0, incident.time - firing.time)
    own, attempts = OWN_EVENT.get(incident.kind, ()), evidence.history.attempts
    times = [e.time for e in evidence.entries if isinstance(e.event, own) and e.attempt == incident.attempt]
    if incident.kind in SEEN_BY_LAUNCHER:
        times += [process_start(attempt.start) for attempt in attempts if attempt.start is not None]
        ends = [end for attempt in attempts if attempt.number >= firing.attempt for end in attempt.ends.values()]
        times += [entry.time for entry, end in ends if end.status == "failed"]
        times += [launch["ended"] for launch in evidence.launches if launch["ended"] is not None]
    return min((time - firing.time for time in times if time >= firing.time), default=None)


def _recover_seconds(evidence: Evidence, firing: Firing, incident: Incident | None) -> float | None:
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
    rows: dict[tuple[int, str, int | None], dict[str, Any]] = {}
    for entry, event in events.select(fired, FaultFired):  # one fault on one rank may have fired several times
        about = {"index": event.index, "kind": event.fault, "rank": event.victim, "step": event.step}
        when = {"fired": True, "time": entry.time, "attempt": entry.attempt, "detected_as": None}
        row = rows.setdefault((event.index, event.fault, event.victim), about | when)
        reports = (incident.kind for incident in incidents if _reports(incident, entry, event))
        row["detected_as"] = row["detected_as"] or next(reports, None)
    with_firings = {(index, kind) for index, kind, _ in rows}
    unfired = {"fired": False, "time": None, "attempt": None, "detected_as": None}
    return sorted(
        [
            *rows.values(),
            *(
                {"index": index, "kind": fault["kind"], "rank": fault["rank"], "step": fault["at_step"]} | unfired
                for index, fault in enumerate(planned)
                if (index, fault["kind"]) not in with_firings
            ),
        ],
        key=lambda row: (row["index"], row["time"] or math.inf),
    )


def _reports(incident: Incident, entry: Entry, event: FaultFired) -> bool:
    """True if an incident reports a fault on one rank, and names rank and step correctly where it must."""
    kind = KINDS.get(event.fault)
    if kind is not None:
        kind = kind.watched(world_size=2)
        kind = kind if event.member is None else kind.in_quorum(event.phase or "")
    if kind is None or not may_report(kind, entry.attempt, incident):
        return False
    name = event.victim if event.member is None else event.member
    if incident.kind == "corrupted":  # a wrong operator may be noticed some steps later
        return incident.rank in (None, name)
    if kind.names_rank and name not in (incident.rank, *incident.others):
        return False
    if incident.kind == "worker_lost" and not incident.ends_attempt:
        return True  # each worker is lost once
    belongs_to_step = not incident.ends_attempt and incident.kind != "checkpoint_rejected"
    return not belongs_to_step or incident.step == event.step
