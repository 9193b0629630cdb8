"""What happened in a run, told from its event log alone: the contract of `inspect --json`.

How the log is read:

- A step appears once per attempt that computed it. `train`, `eval`, `learning_rate` and `grad_norm` show the last
  attempt's value; so do steps that an earlier attempt reached and the present one has not come back to. By the
  promise of exact sums all values of a step are equal; `replayed_differently` lists the steps where they were not.
- An attempt's `ended` is what its ranks wrote: "finished" as soon as rank 0 did (the weights are final then), else
  "failed" if any rank failed, else "preempted". If none wrote an end it is null while a process of the attempt lives,
  "died" once all are gone or a later attempt has started, and "unknown" where nobody can tell: its processes
  belong to another host.
- `status` is "finished" if any attempt finished (starting a finished run again changes nothing), else the last
  attempt's end. An attempt without one is "running" while it lives, "failed" when it died. On another host silence
  decides: a live rank leaves a hung collective after elastic.step_timeout_seconds, so twice that is "failed".
- `faults` is filled in by faults/attribution.py.
- `incidents` (incidents.py): what went wrong and what it cost; `goodput` (goodput.py): where the wall time went.

A value nobody measured is None, never 0.
"""

import dataclasses
import math
import os
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import RunDirectoryError
from trainer.log import events, goodput, rundir
from trainer.log.events import AttemptEnded, AttemptStarted, Entry, EvalDone, FaultFired, StepDone, Warned
from trainer.log.incidents import incidents_of


def summarise(run: Path, checkpoints: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The state of a run directory as plain JSON values: what `inspect --json` prints.

    `checkpoints` is passed through: [{step, intact, bytes}]. Raises RunDirectoryError if `run` is no run, has no
    events, or its log is damaged. Losses are nats per token, times Unix seconds.
    """
    identity = rundir.read(run)
    entries = [entry for entry in events.read(run) if not isinstance(entry.event, FaultFired)]
    if not entries:
        raise RunDirectoryError(
            f"{run} has no events.\n"
            "  A run writes its first when training begins. Start it with `python -m trainer train CONFIG "
            f"--run {run}`, or wait for it."
        )
    attempts = [_attempt(number, group) for number, group in _by_attempt(entries).items()]
    for earlier in attempts[:-1]:
        earlier["ended"] = earlier["ended"] or "died"
    status = _status(attempts, entries, 2 * identity["config"]["elastic"]["step_timeout_seconds"])
    steps = [entry for entry in entries if isinstance(entry.event, StepDone) and entry.rank == 0]
    ends = [entry.event for entry in entries if isinstance(entry.event, AttemptEnded)]
    start = next((e.event for e in reversed(entries) if isinstance(e.event, AttemptStarted)), None)
    running = status == "running"
    incidents = incidents_of(entries, running)
    step = next((a["to_step"] for a in reversed(attempts) if a["to_step"] is not None), None)
    return {
        "status": status,
        "step": step,
        "steps": start.steps if start else None,
        "tokens": step * start.tokens_per_step if start and step is not None else None,
        "weights_sha256": _hash(ends, "weights_sha256") if status == "finished" else None,
        "state_sha256": _hash(ends, "state_sha256")
        if status == attempts[-1]["ended"] or status == "finished"
        else None,
        "attempts": attempts,
        "checkpoints": list(checkpoints),
        "train": _series(steps, "loss"),
        "eval": _evals(entries),
        "faults": [],
        "incidents": [dataclasses.asdict(incident) for incident in incidents],
        "goodput": goodput.account(entries, now=time.time() if running else None),
        "tokens_per_second": _rate(steps),
        "learning_rate": _series(steps, "learning_rate"),
        "grad_norm": _series(steps, "grad_norm"),
        **_exactness(steps),
        "fingerprint": start.fingerprint if start else identity["fingerprint"],
        "parameters": start.parameters if start else None,
        "device": start.device if start else None,
        "strategy": start.strategy if start else None,
        "started": entries[0].time,
        "ended": None if running else max(entry.time for entry in entries),
        "warnings": _warnings(entries, ends) + _gaps(entries),
    }


def _by_attempt(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.attempt, []).append(entry)
    return groups


def _attempt(number: int, entries: list[Entry]) -> dict[str, Any]:
    start = next((entry.event for entry in entries if isinstance(entry.event, AttemptStarted)), None)
    reached = [e.event.step for e in entries if isinstance(e.event, StepDone | AttemptEnded)]
    ends = {e.rank: e.event for e in entries if isinstance(e.event, AttemptEnded)}
    ended = _worst(ends)
    return {
        "attempt": number,
        "world_size": start.world_size if start else None,
        "from_step": start.from_step if start else None,
        "to_step": max(reached, default=start.from_step if start else None),
        "ended": ended,
        "seconds": entries[-1].time - entries[0].time,
        "started": entries[0].time,
        "reason": next((end.reason for end in ends.values() if end.status == ended and end.reason), None),
        "startup_seconds": start.startup_seconds if start else None,
    }


def _worst(ends: dict[int, AttemptEnded]) -> str | None:
    """What the attempt came to, from what each rank wrote; rank 0 alone can say that it finished."""
    written = {end.status for end in ends.values()}
    if 0 in ends and ends[0].status == "finished":
        return "finished"
    return next((status for status in ("failed", "preempted") if status in written), None)


def _status(attempts: list[dict[str, Any]], entries: list[Entry], silence_seconds: float) -> str:
    """The run's status; fills in how the last attempt ended where its ranks left no word."""
    if any(attempt["ended"] == "finished" for attempt in attempts):
        attempts[-1]["ended"] = attempts[-1]["ended"] or _fate(entries)
        return "finished"
    last = attempts[-1]
    if last["ended"] is None:
        last["ended"] = _fate(entries)
        if last["ended"] is None:
            return "running"
    if last["ended"] == "unknown":
        newest = max(entry.time for entry in entries)
        return "running" if time.time() - newest < silence_seconds else "failed"
    return "failed" if last["ended"] == "died" else last["ended"]


def _fate(entries: list[Entry]) -> str | None:
    """None if a process of the last attempt lives on this host, "died" if all are gone, "unknown" if none is here."""
    last = [entry for entry in entries if entry.attempt == entries[-1].attempt]
    ranks = [(entry.event, entry.time) for entry in last if isinstance(entry.event, AttemptStarted)]
    here = [(start.pid, since) for start, since in ranks if start.host == socket.gethostname()]
    if any(_alive(pid, since) for pid, since in here):
        return None
    return "died" if here or not ranks else "unknown"


def _alive(pid: int, since: float) -> bool:
    """Whether `pid` runs here and is the process that ran at Unix time `since`."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's; alive
    try:  # Linux only; elsewhere the signal must do
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = int(Path("/proc/stat").read_text().partition("btime ")[2].split()[0])
    except (OSError, IndexError):
        return True
    # A restarted container has the same host name and hands out the same small process ids.
    began = booted + int(fields[18]) / os.sysconf("SC_CLK_TCK")
    return state != "Z" and began < since + 2.0  # btime is in whole seconds


def _hash(ends: list[AttemptEnded], name: str) -> str | None:
    return next((value for end in reversed(ends) if (value := getattr(end, name)) is not None), None)


def _series(steps: list[Entry], name: str) -> list[list[float]]:
    """[[step, value]], the last attempt's value of each step."""
    values: dict[int, Any] = {e.event.step: getattr(e.event, name) for e in steps if isinstance(e.event, StepDone)}
    return [[step, values[step]] for step in sorted(values)]


def _evals(entries: list[Entry]) -> dict[str, list[list[float]]]:
    sets: dict[str, dict[int, list[float]]] = {}
    for event in (entry.event for entry in entries):
        if isinstance(event, EvalDone):
            sets.setdefault(event.set, {})[event.step] = [event.step, event.loss, event.bits_per_byte]
    return {name: [rows[step] for step in sorted(rows)] for name, rows in sets.items()}


def _rate(steps: list[Entry]) -> float | None:
    """Tokens over the seconds inside steps, all attempts; what lies between steps is not counted."""
    done = [entry.event for entry in steps if isinstance(entry.event, StepDone)]
    seconds = sum(event.seconds for event in done)
    return sum(event.tokens for event in done) / seconds if seconds > 0 else None


def _exactness(steps: list[Entry]) -> dict[str, Any]:
    """redone and flushed over the run's steps, each counted once; how replays compared with what they replayed."""
    last: dict[int, StepDone] = {}
    replayed, different = 0, set[int]()
    for event in (entry.event for entry in steps):
        assert isinstance(event, StepDone)
        before = last.get(event.step)
        if before is not None:
            replayed += 1
            # As text, since a NaN must equal itself.
            if repr(_result(before)) != repr(_result(event)):
                different.add(event.step)
        last[event.step] = event
    flushed = [event.flushed for event in last.values() if event.flushed is not None]
    return {
        "redone": sum(event.redone for event in last.values()) if last else None,
        "flushed": math.fsum(flushed) / len(flushed) if flushed else None,
        "replayed": replayed,
        "replayed_differently": sorted(different),
    }


def _result(event: StepDone) -> tuple[float, float, str]:
    return event.loss, event.grad_norm, event.samples


def _warnings(entries: list[Entry], ends: list[AttemptEnded]) -> list[dict[str, Any]]:
    """[{attempt, rank, message}]; attempt and rank are null for what only the whole log shows to be wrong."""
    said = [
        {"attempt": entry.attempt, "rank": entry.rank, "message": entry.event.message}
        for entry in entries
        if isinstance(entry.event, Warned)
    ]
    for what in ("weights_sha256", "state_sha256"):
        by_step: dict[int, set[str]] = {}
        for end in ends:
            if (value := getattr(end, what)) is not None:
                by_step.setdefault(end.step, set()).add(value)
        for step, values in by_step.items():
            if len(values) > 1:
                message = f"{what} at step {step} has {len(values)} values in the log; one of them is corrupt"
                said.append({"attempt": None, "rank": None, "message": message})
    return said


def _gaps(entries: list[Entry]) -> list[dict[str, Any]]:
    """Steps that the run stands on and that no attempt has computed: a log is missing, or a checkpoint is not ours."""
    steps = goodput.committed(entries)
    missing = sorted(set(range(1, max(steps, default=0) + 1)) - set(steps))
    if not missing:
        return []
    message = f"{len(missing)} steps are missing in the log, the first is {missing[0]}; their samples cannot be checked"
    return [{"attempt": None, "rank": None, "message": message}]
