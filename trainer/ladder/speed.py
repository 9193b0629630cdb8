"""Duration of runs on this machine, on the device that they use, estimated from measured speeds.

OUT/speed.json holds the duration of a few steps, from which time left is estimated before there are runs.
"""

import math
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import PositiveFloat, PositiveInt, TypeAdapter

from trainer import files
from trainer.config import Config
from trainer.errors import UsageError
from trainer.fleet import supervision
from trainer.fleet.backend import Backend, Task
from trainer.fleet.run_store import RunState, StoredRun
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.slots import Slots

PROBE_STEPS = 6  # the first includes work that is done once; the median ignores it
PROBE_SETTINGS: dict[str, dict[str, Any]] = {
    "budget": {"steps": PROBE_STEPS}, "optim": {"warmup_steps": 0}, "checkpoint": {"every_steps": 0},
    "eval": {"every_steps": 0}, "wandb": {"mode": "disabled"},
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Seconds per training FLOP of steps, and per FLOP per token of scoring all held-out sets.

    Each by the model's FLOPs per token: larger models use the machine better.
    """

    steps: dict[PositiveInt, PositiveFloat]
    evals: dict[PositiveInt, PositiveFloat]

    def seconds(self, run: PlannedRun, from_step: int = 0) -> float | None:
        """Seconds for the rest of a run, without start-up and saves; None if nothing was measured."""
        config = run.config
        per_step = _interpolate(self.steps, run.flops_per_token)
        if per_step is None:
            return None
        total = config.budget.steps
        evals = _evals(config, total) - _evals(config, from_step)
        per_eval = _interpolate(self.evals, run.flops_per_token) or 0.0
        return (total - from_step) * per_step * run.flops / total + evals * per_eval * run.flops_per_token

    def scale_earlier(self, earlier: "Speed") -> "Speed":
        """Add the sizes that only `earlier` has, scaled to the present pace: others may share the machine."""
        scaled = []
        for now, before in ((self.steps, earlier.steps), (self.evals, earlier.evals)):
            # The median ratio over the sizes that both have says how much slower or faster the machine is now.
            paces = [
                seconds / then for size, seconds in now.items() if (then := _interpolate(before, size)) is not None
            ]
            pace = statistics.median(paces) if paces else 1.0
            scaled.append({size: seconds * pace for size, seconds in before.items()} | now)
        return Speed(*scaled)


UNKNOWN, JSON = Speed({}, {}), TypeAdapter(Speed)


def save(measured: Speed, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    files.write(out / "speed.json", JSON.dump_json(measured) + b"\n")


def load(out: Path) -> Speed:
    """Read OUT/speed.json; UNKNOWN if there is none, or if it cannot be read."""
    try:
        return JSON.validate_python(files.read_object(out / "speed.json"))
    except (OSError, ValueError):
        return UNKNOWN


def measured(runs: Iterable[PlannedRun], states: Mapping[str, RunState]) -> Speed:
    """Return the median speed of these runs for each size."""
    steps: dict[int, list[float]] = {}
    evals: dict[int, list[float]] = {}
    for run, state in ((run, states[run.key]) for run in runs if run.key in states):
        if state.seconds_per_step is not None:
            flops_per_step = run.flops / run.config.budget.steps
            steps.setdefault(run.flops_per_token, []).append(state.seconds_per_step / flops_per_step)
        if state.seconds_per_eval is not None:
            evals.setdefault(run.flops_per_token, []).append(state.seconds_per_eval / run.flops_per_token)
    return Speed(*({size: statistics.median(found) for size, found in some.items()} for some in (steps, evals)))


def _interpolate(known: Mapping[int, float], flops_per_token: int) -> float | None:
    """Interpolate linearly in logarithms; beyond the measured sizes, take the value of the nearest size."""
    if not known:
        return None
    sizes = sorted(known)
    logs = np.interp(math.log(flops_per_token), np.log(sizes), [math.log(known[size]) for size in sizes])
    return float(np.exp(logs))


def _evals(config: Config, step: int) -> int:
    """Number of evaluations up to this step, inclusive."""
    every, last = config.eval.every_steps, config.budget.steps
    times = step // every if every else 0
    return times + (step == last and (not every or last % every > 0))


def probe(ladder: Ladder, slots: Slots, backend: Backend) -> Speed:
    """Time a few steps of the smallest and the largest rung in a temporary directory.

    If a process dies by chance, the speed of its size is missing. Raises UsageError if the baseline fails.
    """
    firsts = {run.rung: run for run in reversed(ladder.runs)}
    ends = [firsts[name] for name in dict.fromkeys((ladder.rungs[0].name, ladder.rungs[-1].name))]
    runs, states = [], {}
    # Each rung is timed in all slots that have room for it at once, since runs side by side slow each other down.
    with tempfile.TemporaryDirectory(prefix="toprope-probe-", ignore_cleanup_errors=True) as directory:
        for run in ends:
            sections = {name: getattr(run.config, name).model_copy(update=new) for name, new in PROBE_SETTINGS.items()}
            if run.config.islands.count:  # a whole round, as short as the probe
                round_ = {"inner_steps": PROBE_STEPS, "fragments": 1, "overlap_steps": 0}
                sections["islands"] = run.config.islands.model_copy(update=round_)
            short = replace(run, config=run.config.model_copy(update={**sections, "faults": ()}))
            states[short.key] = _timed(ladder, short, Path(directory), slots, backend)
            runs.append(short)
    return measured(runs, states)


def _timed(ladder: Ladder, run: PlannedRun, directory: Path, slots: Slots, backend: Backend) -> RunState:
    copies = {slot: StoredRun(directory / f"{run.key}-{slot}") for slot in slots.all_for(run)}
    tasks = []
    for slot, stored in copies.items():
        stored.directory.mkdir(parents=True)
        stored.prepare(run.config, run.name)
        tasks.append(Task(stored, f"probe of {run.rung}", ladder.file.ranks, slots.devices(slot)))
    with supervision.started(backend, tasks) as processes:
        statuses = [process.wait() for process in processes]
    # Only an error of the config itself is final: a process that was killed says nothing about the ladder.
    for status, stored in zip(statuses, copies.values(), strict=True):
        output = stored.last_output()
        if status and supervision.is_final(status, output):
            raise UsageError(f"{run.rung}: the baseline fails in its first {PROBE_STEPS} steps.\n{output}")
    return copies[0].read_state(PROBE_STEPS)
