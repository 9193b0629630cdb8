"""What `inspect` says of faults on purpose: which were planned, which fired, and by what the run told of them.

`faults` holds those of the config that the run was last started with, and any others that fired: one entry for each
rank that was hit. `detected_as` is the kind of the first incident that may tell of it: of its attempt, or of the
loading after it, of a kind that is expected of it (kinds.py), and naming the rank if it must.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.faults.fault import KINDS, Fault
from trainer.log import rundir, summary
from trainer.log.events import Entry, FaultFired
from trainer.log.history import History
from trainer.log.incidents import Incident, incidents_of


def summarise(run: Path, checkpoints: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """summary.summarise, with `faults`: [{index, kind, rank, step, fired, time, attempt, detected_as}]."""
    seen = summary.summarise(run, checkpoints)
    history = History.read(run)
    incidents = incidents_of(history, seen["status"] == "running")
    return seen | {"faults": _faults(rundir.read(run)["config"].get("faults", ()), history.fired, incidents)}


def _faults(
    planned: Sequence[Mapping[str, Any]], entries: Iterable[Entry], incidents: Sequence[Incident]
) -> list[dict[str, Any]]:
    """[{index, kind, rank, step, fired, time, attempt, detected_as}], by index, then time."""
    hits: dict[tuple[int, str, int | None], list[Entry]] = {}
    for entry in entries:
        if isinstance(event := entry.event, FaultFired):
            hits.setdefault((event.index, event.fault, event.victim), []).append(entry)
    rows = [_hit(found, incidents) for found in hits.values()]
    seen = {(index, kind) for index, kind, _ in hits}
    for index, fault in enumerate(planned):
        if (index, fault["kind"]) not in seen:
            row = {"index": index, "kind": fault["kind"], "rank": fault["rank"], "step": fault["at_step"]}
            rows.append(row | {"fired": False, "time": None, "attempt": None, "detected_as": None})
    return sorted(rows, key=lambda row: (row["index"], row["time"] or math.inf))


def _hit(firings: Sequence[Entry], incidents: Sequence[Incident]) -> dict[str, Any]:
    """One fault on one rank, which may have come several times."""
    first = firings[0]
    assert isinstance(first.event, FaultFired)
    told = (incident.kind for entry in firings for incident in incidents if _tells(incident, entry))
    return {
        "index": first.event.index,
        "kind": first.event.fault,
        "rank": first.event.victim,
        "step": first.event.step,
        "fired": True,
        "time": first.time,
        "attempt": first.attempt,
        "detected_as": next(told, None),
    }


def _tells(incident: Incident, firing: Entry) -> bool:
    event = firing.event
    assert isinstance(event, FaultFired)
    kind = KINDS.get(event.fault)
    if kind is None or not may_tell(kind, firing.attempt, incident):
        return False
    if kind.names_rank and incident.rank != event.victim:
        return False
    of_a_step = not incident.ends_attempt and incident.kind != "checkpoint_rejected"
    return not of_a_step or incident.step == event.step


def may_tell(kind: Fault, attempt: int, incident: Incident) -> bool:
    """Whether an incident can be of a fault of this kind that fired in this attempt."""
    if incident.kind not in kind.expected_incidents:
        return False
    if incident.kind == "checkpoint_rejected":  # met by whoever loads next
        return incident.attempt > attempt
    # An attempt that ended before it wrote anything is told of by the one after it, as its own.
    return incident.attempt == attempt or (incident.step is None and incident.attempt == attempt + 1)
