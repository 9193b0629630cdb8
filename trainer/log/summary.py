"""Summary of a run, from its event log alone: the contract of `inspect --json`.

How the log is read:

- A step appears once per attempt that computed it. `train`, `eval`, `learning_rate` and `grad_norm` show the last
  attempt's value; so do steps that an earlier attempt reached and the present one has not reached. By the
  promise of exact sums all values of a step are equal; `replayed_differently` lists the steps where they were not.
- An attempt's `ended` is what its ranks wrote: "finished" as soon as rank 0 did (the weights are final then), else
  "failed" if any rank failed, else "preempted". If no rank wrote an end it is null while a process of the attempt
  lives, "died" once all are gone or a later attempt has started, and "unknown" if its processes ran on another host.
- `status` is "finished" if any attempt finished (starting a finished run again changes nothing), else the last
  attempt's end. An attempt without one is "running" while it lives, "failed" when it died. On another host silence
  decides: a live rank leaves a hung collective after elastic.step_timeout_seconds, so twice that is "failed".
- `faults` is filled in by faults/attribution.py.
- `incidents` are described in incidents.py, `nodes` in nodes.py, `goodput` in goodput.py, `code_length` in
  code_length.py.

A value that was not measured is None, never 0.
"""

import dataclasses
import math
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RunDirectoryError
from trainer.log import events, goodput, rundir
from trainer.log.code_length import CodeLength
from trainer.log.events import (
    AttemptEnded,
    AttemptStarted,
    ChangesApplied,
    ClusterAwaited,
    Entry,
    EvalDone,
    StepDone,
    Warned,
)
from trainer.log.history import Attempt, History
from trainer.log.incidents import incidents_of
from trainer.log.nodes import nodes_of


def summarise(run: Path, checkpoints: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the state of a run directory as plain JSON values, as `inspect --json` prints them.

    `checkpoints` is passed through: [{step, intact, bytes}]. Losses are nats per token, times Unix seconds. Raises
    RunDirectoryError if `run` is no run, has no events, or its log is damaged.
    """
    identity = rundir.read(run)
    history = History.read(run)
    entries, last = history.entries, history.attempts[-1] if history.attempts else None
    if last is None:
        raise RunDirectoryError(
            f"{run} has no events.\n"
            "  A run writes its first when training begins. Start it with `python -m trainer train CONFIG "
            f"--run {run}`, or wait for it."
        )
    # Only the last attempt can still be alive: the run directory is locked.
    last_ended = last.status or _liveness(last)
    newest = max(entry.time for entry in entries)
    silent_too_long = time.time() - newest >= 2 * rundir.step_timeout(identity)
    ended = "finished" if history.finish else last_ended
    if ended is None or (ended == "unknown" and not silent_too_long):
        status = "running"
    else:
        status = "failed" if ended in ("died", "unknown") else ended
    running = status == "running"
    attempts = [_attempt(attempt, attempt.status or "died") for attempt in history.attempts[:-1]]
    attempts.append(_attempt(last, last_ended))
    steps = [event for _, event in history.steps]
    seconds = sum(event.seconds for event in steps)
    ends = [event for _, event in events.select(entries, AttemptEnded)]
    # The newest start describes the run: it may have resumed with other ranks, on another device.
    start = next((event for _, event in reversed(events.select(entries, AttemptStarted))), None)
    step = next((a.furthest_step for a in reversed(history.attempts) if a.furthest_step is not None), None)
    parent = identity.get("parent") or {"step": 0, "tokens": 0}
    return {
        "status": status,
        "step": step,
        "steps": start.steps if start else None,
        "tokens": parent["tokens"] + (step - parent["step"]) * start.tokens_per_step
        if start and step is not None
        else None,
        "weights_sha256": _hash(ends, "weights_sha256") if status == "finished" else None,
        "state_sha256": _hash(ends, "state_sha256") if status in ("finished", last_ended) else None,
        "attempts": attempts,
        "checkpoints": list(checkpoints),
        "train": _series(steps, "loss"),
        "eval": _evals(entries),
        "code_length": _code_length(history, identity["config"].get("model", {})),
        "faults": [],
        "islands": _islands(entries),
        "sentinel": _sentinel(identity["config"].get("sentinel", {}), entries),
        "incidents": [dataclasses.asdict(incident) for incident in incidents_of(history, running)],
        "goodput": goodput.account(history, now=time.time() if running else None),
        # The time between steps is not counted.
        "tokens_per_second": sum(event.tokens for event in steps) / seconds if seconds > 0 else None,
        "learning_rate": _series(steps, "learning_rate"),
        "grad_norm": _series(steps, "grad_norm"),
        **_exactness(steps),
        "fingerprint": start.fingerprint if start else identity["fingerprint"],
        "parent": identity.get("parent"),
        "teachers": _teachers(identity["config"].get("distil", {})),
        "parameters": start.parameters if start else None,
        "device": start.device if start else None,
        "strategy": start.strategy if start else None,
        "started": entries[0].time,
        "ended": None if running else newest,
        "nodes": [dataclasses.asdict(node) | {"is_slow": node.is_slow} for node in nodes_of(history, running)],
        "warnings": _warnings(history, ends, parent["step"]),
    }


def _teachers(distil: Mapping[str, Any]) -> list[dict[str, str]]:
    runs = zip(distil.get("runs", ()), distil.get("weights_sha256", ()), strict=False)
    return [{"run": run, "weights_sha256": digest} for run, digest in runs]


def _islands(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Sum what islands have exchanged, replayed rounds too; None for a run that has exchanged nothing."""
    found = [event for _, event in events.select(entries, ChangesApplied)]
    awaited = defaultdict[str, float](float)
    for _, event in events.select(entries, ClusterAwaited):
        awaited[str(event.cluster)] += event.seconds
    return {
        "exchanges": len(found),
        "bytes": sum(event.bytes for event in found),
        "waited_seconds": sum(event.waited_seconds for event in found),
        "awaited": dict(awaited),  # seconds by cluster that was late or dead, where clusters live apart
    } if found else None  # fmt: skip


def _attempt(attempt: Attempt, ended: str | None) -> dict[str, Any]:
    first = next((event for _, event in attempt.starts.values()), None)
    reasons = (event.reason for _, event in attempt.ends.values() if event.status == ended and event.reason)
    return {
        "attempt": attempt.number,
        "world_size": first.world_size if first else None,
        "from_step": attempt.from_step,
        "state_from": (first.state_from or None) if first else None,
        "to_step": attempt.furthest_step,
        "ended": ended,
        "seconds": attempt.entries[-1].time - attempt.entries[0].time,
        "started": attempt.entries[0].time,
        "reason": next(reasons, None),
        "startup_seconds": first.startup_seconds if first else None,
    }


def _liveness(attempt: Attempt) -> str | None:
    """None if a process of the attempt lives on this host, "died" if all are gone, "unknown" if none is here."""
    here = [_alive(start.pid, e.time) for e, start in attempt.starts.values() if start.host == socket.gethostname()]
    return None if any(here) else "died" if here or not attempt.starts else "unknown"


def _alive(pid: int, since: float) -> bool:
    """True if `pid` runs here and is the process that ran at Unix time `since`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's; alive
    try:  # only Linux has /proc; elsewhere the signal is all that we can ask
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = int(Path("/proc/stat").read_text().partition("btime ")[2].split()[0])
    except (OSError, IndexError):
        return True
    # A restarted container has the same host name and hands out the same small process ids.
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state != "Z" and began < since + 2.0  # btime is in whole seconds


def _hash(ends: list[AttemptEnded], name: str) -> str | None:
    return next((value for end in reversed(ends) if (value := getattr(end, name)) is not None), None)


def _series(steps: Sequence[StepDone], name: str) -> list[list[float]]:
    """[[step, value]], the last attempt's value of each step."""
    values: dict[int, Any] = {step.step: getattr(step, name) for step in steps}
    return [[step, values[step]] for step in sorted(values)]


def _evals(entries: list[Entry]) -> dict[str, list[list[float | None]]]:
    sets: dict[str, dict[int, list[float | None]]] = {}
    for _, event in events.select(entries, EvalDone):
        sets.setdefault(event.set, {})[event.step] = [event.step, event.loss, event.bits_per_byte]
    return {name: [rows[step] for step in sorted(rows)] for name, rows in sets.items()}


def _code_length(history: History, model: Mapping[str, Any]) -> dict[str, Any]:
    # Whether a class of one's own has dropout is not known.
    dropout = None if model.get("class") else model.get("dropout", 0.0) > 0
    return CodeLength.of(history).describe(max(history.committed, default=0)) | {"with_dropout": dropout}


def _exactness(steps: Sequence[StepDone]) -> dict[str, Any]:
    """`redone` and `flushed` over the run's steps, each counted once; how replays compare with what they replayed."""
    # The entries come by attempt, so a step that is seen again was replayed.
    last: dict[int, StepDone] = {}
    different = set[int]()
    for event in steps:
        before = last.setdefault(event.step, event)
        # As text, since a NaN must equal itself.
        if repr((before.loss, before.grad_norm, before.samples)) != repr((event.loss, event.grad_norm, event.samples)):
            different.add(event.step)
        last[event.step] = event
    flushed = [event.flushed for event in last.values() if event.flushed is not None]
    return {
        "redone": sum(event.redone for event in last.values()) if last else None,
        "flushed": math.fsum(flushed) / len(flushed) if flushed else None,
        "replayed": len(steps) - len(last),
        "replayed_differently": sorted(different),
    }


def _warnings(history: History, ends: list[AttemptEnded], first: int) -> list[dict[str, Any]]:
    """[{attempt, rank, message}]; attempt and rank are null for what only the whole log shows to be wrong.

    `first` is the step that the run began from.
    """
    warned = events.select(history.entries, Warned)
    warnings: list[Any] = [{"attempt": e.attempt, "rank": e.rank, "message": event.message} for e, event in warned]
    # All ranks hash the same weights, and so do attempts that end at the same step.
    for name in ("weights_sha256", "state_sha256"):
        by_step: dict[int, set[str]] = {}
        for end in ends:
            if (value := getattr(end, name)) is not None:
                by_step.setdefault(end.step, set()).add(value)
        for step, values in by_step.items():
            if len(values) > 1:
                message = f"{name} at step {step} has {len(values)} values in the log; one of them is corrupt"
                warnings.append({"attempt": None, "rank": None, "message": message})
    # A file of the log may be missing, or a checkpoint be of another run.
    if missing := sorted(set(range(first + 1, max(history.committed, default=0) + 1)) - set(history.committed)):
        how_many = f"{len(missing)} steps are missing in the log, the first is {missing[0]}"
        warnings.append({"attempt": None, "rank": None, "message": f"{how_many}; their samples cannot be checked"})
    return warnings


def _sentinel(settings: Mapping[str, Any], entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Describe the sentinel's checks, and how often it acted, by action; None where it is off."""
    if settings.get("audit", "0") == "0" and not settings.get("state_hash_every_steps"):
        return None
    return {**settings, "found": dict(Counter(event.action for _, event in events.select(entries, events.Corrupted)))}
