"""What there is to know of a run with faults: what fired, what the run made of it, and how fast.

The truth is the plan and RUN/events/faults.jsonl. The diagnosis is the rest of the run's log, read as if nobody knew of
the faults.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.faults import plan
from trainer.faults.attribution import may_tell
from trainer.faults.fault import SAVE
from trainer.faults.plan import PlannedFault
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointRejected,
    Entry,
    Event,
    FaultFired,
    Hung,
    NotFinite,
    StepDone,
    StopRequested,
)
from trainer.log.history import History
from trainer.log.incidents import Incident, incidents_of

OWN_EVENT: Mapping[str, type[Event]] = {
    "hung": Hung, "not_finite": NotFinite, "save_failed": CheckpointFailed,
    "checkpoint_rejected": CheckpointRejected, "preempted": StopRequested,
}  # fmt: skip
SEEN_BY_LAUNCHER = {"worker_lost", "hung", "preempted"}
"""Incidents that end the processes: the next start, or the job's end, shows that they were noticed."""


@dataclass(frozen=True)
class Reference:
    """What the run without faults came to."""

    weights_sha256: str | None
    state_sha256: str | None
    samples: dict[int, str]
    """Digest of the samples by step."""
    steps: int
    seconds: float
    exact: bool


def reference_of(run: Path, config: Config, seconds: float) -> Reference:
    history = History.read(run)
    hashes = (end[1].weights_sha256, end[1].state_sha256) if (end := history.finish) is not None else (None, None)
    return Reference(*hashes, history.committed_samples, config.budget.steps, seconds, config.numerics.exact)


def finished(entries: Iterable[Entry]) -> AttemptEnded | None:
    ends = [e.event for e in entries if isinstance(e.event, AttemptEnded) and e.rank == 0]
    return next((end for end in ends if end.status == "finished"), None)


@dataclass(frozen=True)
class Evidence:
    """All there is to know of a run with faults. `launches` are {started, ended, status}, Unix seconds."""

    run: Path
    config: Config
    planned: Sequence[PlannedFault]
    reference: Reference
    launches: Sequence[Mapping[str, Any]]
    leftovers: Sequence[str] = ()
    notes: Sequence[str] = ()
    """What whoever made the faults has to say: what could not be made, a job that had to be ended."""

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
    def firings(self) -> "list[Firing]":
        """What fired, in order: one for each fault of the plan, however many ranks it hit."""
        found: dict[int, Firing] = {}
        planned = {fault.index: fault for fault in self.planned}
        for entry in plan.fired(self.run):
            event = entry.event
            assert isinstance(event, FaultFired)
            if event.index in planned:
                firing = found.setdefault(event.index, Firing(planned[event.index], entry.time, entry.attempt, event))
                firing.victims.add(event.victim)
        return sorted(found.values(), key=lambda firing: firing.time)

    @cached_property
    def attributions(self) -> "list[Attribution]":
        taken = set[int]()
        return [_attribute(self, firing, taken) for firing in self.firings]


@dataclass(frozen=True)
class Firing:
    fault: PlannedFault
    time: float
    attempt: int
    first: FaultFired
    victims: set[int | None] = field(default_factory=set)

    def __str__(self) -> str:
        return str(self.fault)


@dataclass(frozen=True)
class Attribution:
    """What the run made of a fault."""

    firing: Firing
    incident: Incident | None
    correct: bool | None
    """None where nothing had to be told, or where it hit an attempt that another fault was ending already."""
    detect_seconds: float | None
    recover_seconds: float | None
    problem: str = ""
    """Why it was not named correct."""


def _attribute(evidence: Evidence, firing: Firing, taken: set[int]) -> Attribution:
    """The incident that tells of a fault, if one does, and how fast; `taken` are those that tell of earlier ones."""
    kind, incidents = firing.fault.kind, evidence.incidents
    possible = [n for n, incident in enumerate(incidents) if may_tell(kind, firing.attempt, incident)]
    fresh = [n for n in possible if n not in taken and not _is_of_another(evidence, firing, incidents[n])]
    fresh.sort(key=lambda n: (_misnames(firing, incidents[n]), n))
    incident, problem, correct = None, "", None
    if fresh:
        incident = incidents[fresh[0]]
        taken.add(fresh[0])
        problem = _misnames(firing, incident)
        correct = not problem if kind.expected_incidents else None
    elif kind.expected_incidents:
        hidden = next((i for i in incidents if i.ends_attempt and i.attempt == firing.attempt), None)
        alone = all(other is firing or other.attempt != firing.attempt for other in evidence.firings)
        if hidden is None or alone:
            correct, problem = False, "nothing in the log tells of it"
        incident = hidden if not alone else None
    detected = _detected(evidence, firing, incident)
    return Attribution(firing, incident, correct, detected, _recovered(evidence, firing, incident), problem)


def _is_of_another(evidence: Evidence, firing: Firing, incident: Incident) -> bool:
    """Whether an incident is wrong of this fault, but right of another that came with it."""
    others = [other for other in evidence.firings if other is not firing]
    return bool(_misnames(firing, incident)) and any(
        _killed(other, incident)
        or (may_tell(other.fault.kind, other.attempt, incident) and not _misnames(other, incident))
        for other in others
    )


def _killed(firing: Firing, incident: Incident) -> bool:
    """True for the death that follows damage to a checkpoint: nothing has to report it."""
    damages = firing.fault.kind.damages_checkpoints
    return damages and incident.attempt == firing.attempt and incident.rank in firing.victims


def _misnames(firing: Firing, incident: Incident) -> str:
    """What an incident says wrong of the fault that it tells of; empty if it is right."""
    fault = firing.fault
    if fault.kind.names_rank and None not in firing.victims and incident.rank not in firing.victims:
        victims = ", ".join(str(rank) for rank in sorted(rank for rank in firing.victims if rank is not None))
        return f"told of rank {incident.rank}, it was {victims}"
    if fault.from_outside or fault.at_step is None or incident.step is None or incident.kind == "checkpoint_rejected":
        return ""
    if not incident.ends_attempt:
        wrong = incident.step != fault.at_step
    elif fault.phase in SAVE:  # training has gone on meanwhile
        wrong = incident.step < fault.at_step
    else:
        # Ranks are up to a step apart when one of them dies, and rank 0's steps are those that are counted.
        assert fault.point_step is not None
        wrong = incident.kind != "preempted" and abs(incident.step - fault.point_step) > 1
    return f"told of step {incident.step}, it was in step {fault.at_step}" if wrong else ""


def _detected(evidence: Evidence, firing: Firing, incident: Incident | None) -> float | None:
    """Seconds until the run's log or the end of its processes showed that it was noticed."""
    if incident is None or not firing.fault.kind.expected_incidents:
        return None
    own = OWN_EVENT.get(incident.kind)
    times = [
        entry.time
        for entry in evidence.entries
        if own is not None and isinstance(entry.event, own) and entry.attempt == incident.attempt
    ]
    if incident.kind in SEEN_BY_LAUNCHER:
        times += _process_starts(evidence.entries)
        ends = [entry for entry in evidence.entries if isinstance(entry.event, AttemptEnded)]
        times += [e.time for e in ends if e.attempt >= firing.attempt and getattr(e.event, "status", "") == "failed"]
        times += [launch["ended"] for launch in evidence.launches if launch["ended"] is not None]
    return min((time - firing.time for time in times if time >= firing.time), default=None)


def _process_starts(entries: Iterable[Entry]) -> list[float]:
    return [
        entry.time - math.fsum(entry.event.startup_seconds.values())
        for entry in entries
        if isinstance(entry.event, AttemptStarted) and entry.rank == 0
    ]


def _recovered(evidence: Evidence, firing: Firing, incident: Incident | None) -> float | None:
    """Seconds until a step was done that had never been done, or until the end where there was none left."""
    if firing.fault.kind.moves_clock:
        return None  # what it breaks is what one would measure with
    ended = firing.attempt if incident is not None and incident.ends_attempt else -1
    done = [(entry, entry.event.step) for entry in evidence.entries if isinstance(entry.event, StepDone)]
    reached = max((step for entry, step in done if entry.time <= firing.time or entry.attempt <= ended), default=0)
    times = [entry.time for entry, step in done if step > reached and entry.time > firing.time]
    if reached == evidence.config.budget.steps:
        ends = [entry for entry in evidence.entries if isinstance(entry.event, AttemptEnded)]
        times = [e.time for e in ends if getattr(e.event, "status", "") == "finished" and e.time > firing.time]
    return min(times) - firing.time if times else None
