"""Scenario values measured in runs of this trainer, from their event logs alone."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from trainer import tomlfile
from trainer.errors import UsageError
from trainer.log import events, goodput, rundir
from trainer.log.history import Attempt, History
from trainer.log.incidents import IncidentBuilder

_SAVING = ("save_stall_seconds", "save_write_seconds", "restart_seconds")
_CHANGES = ("regroup_seconds", "join_seconds", "start_seconds", "speed_without_one")


def calibrate(runs: Sequence[Path]) -> dict[str, Any]:
    """Return what the runs show, each None where they do not show it.

    Keys: step_seconds (of all devices together), save_stall_seconds, save_write_seconds (medians), restart_seconds
    (mean start-up of an attempt that resumed), detect_seconds (mean time from the last progress of an attempt that died
    to the next process), failures, wall_seconds, devices, goodput; and of a quorum regroup_seconds (mean wait of the
    others after a death), join_seconds (mean wait for a worker that joins), start_seconds (mean time from a death until
    a successor is ready to join), speed_without_one; all None if its members never changed. Raises UsageError for a
    directory that is no run.
    """
    steps, stalls, writes, starts = list[float](), list[float](), list[float](), list[float]()
    quorum = _Quorum()
    down = wall = productive = 0.0
    failures, devices = 0, set[int]()
    for run in runs:
        rundir.read(run)
        history = History.read(run)
        for attempt in history.attempts:
            quorum.observe(attempt)
        entries = [entry for attempt in history.attempts for entry in attempt.main_entries]
        for entry in entries:
            match entry.event:
                case events.CheckpointSaved(seconds=seconds, stall_seconds=stalled):
                    stalls.append(stalled)
                    writes.append(max(0.0, seconds - stalled))
                case events.AttemptStarted(startup_seconds=parts, world_size=ranks):
                    devices.add(ranks)
                    if entry.attempt > 0:
                        starts.append(math.fsum(parts.values()))
        account = goodput.account(history)
        if account["wall_seconds"] is None:
            raise UsageError(f"{run} has not trained yet.\n  Name runs that have made steps.")
        builder = IncidentBuilder(history.entries)
        builder.close()
        ended = [incident for incident in builder.incidents if incident.ends_attempt and incident.kind != "preempted"]
        failures += len(ended)
        down += account["parts"]["down"] + account["parts"]["hung"]
        wall += account["wall_seconds"]
        productive += account["productive_seconds"]
    steps, shorter = quorum.steps[0], quorum.steps[1]
    down -= math.fsum([*quorum.regroups, *quorum.restarts])  # counted apart
    starts += quorum.restarts
    return {
        "step_seconds": median(steps) if steps else None,
        "save_stall_seconds": median(stalls) if stalls else None,
        "save_write_seconds": median(writes) if writes else None,
        "restart_seconds": fmean(starts) if starts else None,
        "detect_seconds": down / failures if failures else None,
        "failures": failures + len(quorum.regroups) + len(quorum.restarts),
        "wall_seconds": wall,
        "goodput": productive / wall if wall else None,
        "devices": max(devices, default=None),
        "regroup_seconds": fmean(quorum.regroups) if quorum.regroups else None,
        "join_seconds": fmean(quorum.joins) if quorum.joins else None,
        "start_seconds": fmean(quorum.starts) if quorum.starts else None,
        "speed_without_one": min(1.0, median(steps) / median(shorter)) if steps and shorter else None,
    }


class _Quorum:
    """Seconds of a quorum's whole steps and of its changes of members. Without a quorum, `steps[0]` has all steps."""

    def __init__(self) -> None:
        self.steps = defaultdict[int, list[float]](list)
        """{members that were missing: seconds of whole steps}."""
        self.regroups, self.joins, self.starts = list[float](), list[float](), list[float]()
        self.restarts = list[float]()

    def observe(self, attempt: Attempt) -> None:
        if attempt.start is None:
            return
        size = whole = attempt.start[1].world_size
        is_whole_step, missed = True, list[float]()
        steps = list[tuple[int, float]]()
        for entry in attempt.main_entries:
            match entry.event:
                case events.StepDone(seconds=seconds, redone=0):
                    if is_whole_step:
                        steps.append((size, seconds))
                    is_whole_step = True
                case events.MembersChanged(members=members, joined=joined, lost=lost, seconds=seconds) as change:
                    size, is_whole_step = change.world_size or len(members), False
                    whole = max(whole, size)
                    began = entry.time - seconds
                    if set(joined) == set(members):  # all had died: a restart, and no join
                        self.restarts += [seconds] * bool(lost)
                        missed.clear()
                        continue
                    self.starts += [began - since for since, _ in zip(missed, joined, strict=False)]
                    del missed[: len(joined)]
                    missed += [began] * len(lost)
                    if lost:
                        self.regroups.append(seconds)
                    elif joined:
                        self.joins.append(seconds)
                case _:
                    pass
        for members, seconds in steps:
            self.steps[whole - members].append(seconds)


def to_toml(found: dict[str, Any], runs: Sequence[Path]) -> str:
    """Return a scenario with the measured values; what was not measured is a comment there, to be filled in."""

    def setting(name: str, value: Any) -> str:
        return (
            f"# {name} = ?  # not measured: no such event in these runs"
            if value is None
            else f"{name} = {tomlfile.text(value)}"
        )

    is_quorum = found["regroup_seconds"] is not None or found["join_seconds"] is not None
    rate = found["failures"] / found["wall_seconds"] * 86_400 if found["failures"] else None
    lines = [
        f"# Measured in {', '.join(str(run) for run in runs)}: {found['failures']} failures in "
        f"{found['wall_seconds']:.0f} s, goodput {found['goodput']:.3f}.",
        "days = 1.0",
        setting("step_seconds", found["step_seconds"]),
        "", "[cluster]", setting("devices", found["devices"]), "devices_per_node = 1",
        "", "[[failure]]", 'name = "measured"', setting("per_day", rate), 'takes = "node"',
        setting("detect_seconds", found["detect_seconds"]),
        "", "[policy]", f'kind = "{"quorum" if is_quorum else "restart"}"', 'checkpoint_every_seconds = "optimal"',
        *(setting(name, found[name]) for name in (*_SAVING, *_CHANGES * is_quorum)),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
