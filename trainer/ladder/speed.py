"""How long runs take on this machine, by what was measured on it."""

import contextlib
import math
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Self

import numpy as np

from trainer.config import Config
from trainer.errors import UsageError
from trainer.fleet import run_store as pools
from trainer.fleet.run_store import Place, State
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.worker import STOPPING, Server, Task, is_final, last_words

LEAVING_SECONDS = 10.0
PROBE_STEPS = 6  # the first pays for what is done once; the median does not see it


@dataclass(frozen=True)
class Speed:
    """Seconds per training FLOP of a step, and of scoring all held-out sets, by a model's FLOPs per token."""

    steps: Mapping[int, float]
    evals: Mapping[int, float]

    def seconds(self, run: PlannedRun, from_step: int = 0) -> float | None:
        """For the rest of a run, without start-up and saves; None where nothing was measured."""
        config = run.config
        per_step = _at(self.steps, run.flops_per_token)
        if per_step is None:
            return None
        total = config.budget.steps
        evals = _evals(config, total) - _evals(config, from_step)
        per_eval = _at(self.evals, run.flops_per_token) or 0.0
        return (total - from_step) * per_step * run.flops / total + evals * per_eval * run.flops_per_token

    def over(self, earlier: "Speed") -> "Speed":
        """With what was measured earlier of other sizes, at the pace of now: others may share the machine."""
        return Speed(_over(self.steps, earlier.steps), _over(self.evals, earlier.evals))

    def to_json(self) -> dict[str, dict[str, float]]:
        return {name: {str(size): one for size, one in getattr(self, name).items()} for name in ("steps", "evals")}

    @classmethod
    def from_json(cls, tree: Mapping[str, Mapping[str, float]]) -> Self:
        return cls(*({int(size): one for size, one in tree[name].items()} for name in ("steps", "evals")))


UNKNOWN = Speed({}, {})


def _over(now: Mapping[int, float], earlier: Mapping[int, float]) -> dict[int, float]:
    paces = [seconds / then for size, seconds in now.items() if (then := _at(earlier, size)) is not None]
    pace = statistics.median(paces) if paces else 1.0
    return {size: seconds * pace for size, seconds in earlier.items()} | dict(now)


def measured(runs: Iterable[PlannedRun], states: Mapping[str, State]) -> Speed:
    """By what these runs have taken so far."""
    steps: dict[int, list[float]] = {}
    evals: dict[int, list[float]] = {}
    for run in runs:
        state = states.get(run.key)
        if state is not None and state.seconds_per_step is not None:
            flops_per_step = run.flops / run.config.budget.steps
            steps.setdefault(run.flops_per_token, []).append(state.seconds_per_step / flops_per_step)
        if state is not None and state.seconds_per_eval is not None:
            evals.setdefault(run.flops_per_token, []).append(state.seconds_per_eval / run.flops_per_token)
    return Speed(*({size: statistics.median(found) for size, found in some.items()} for some in (steps, evals)))


def _at(known: Mapping[int, float], flops_per_token: int) -> float | None:
    """Between what was measured, a line in logs; beyond it, the nearest."""
    if not known:
        return None
    sizes = sorted(known)
    logs = np.interp(math.log(flops_per_token), np.log(sizes), [math.log(known[size]) for size in sizes])
    return float(np.exp(logs))


def _evals(config: Config, step: int) -> int:
    """How often the held-out sets have been scored when this step is done."""
    every, last = config.eval.every_steps, config.budget.steps
    times = step // every if every else 0
    return times + (step == last and (not every or last % every > 0))


def probe(ladder: Ladder, slots: int, server: Server) -> Speed:
    """A few steps of the smallest and the largest rung, in all slots at once, in a directory that is removed.

    UNKNOWN, or half of it, where a process dies by chance. Raises UsageError if the baseline cannot come so far.
    """
    firsts = {run.rung: run for run in reversed(ladder.runs)}
    ends = [firsts[name] for name in dict.fromkeys((ladder.rungs[0].name, ladder.rungs[-1].name))]
    with tempfile.TemporaryDirectory(prefix="toprope-probe-", ignore_cleanup_errors=True) as directory:
        runs = [_short(run) for run in ends]
        states = {run.key: _timed(ladder, run, Path(directory), slots, server) for run in runs}
    return measured(runs, states)


def _short(run: PlannedRun) -> PlannedRun:
    config = run.config
    update = {
        "budget": config.budget.model_copy(update={"steps": PROBE_STEPS}),
        "optim": config.optim.model_copy(update={"warmup_steps": 0}),
        "checkpoint": config.checkpoint.model_copy(update={"every_steps": 0}),
        "eval": config.eval.model_copy(update={"every_steps": 0}),
        "wandb": config.wandb.model_copy(update={"mode": "disabled"}),
        "faults": (),
    }
    return replace(run, config=config.model_copy(update=update))


def _timed(ladder: Ladder, run: PlannedRun, directory: Path, slots: int, server: Server) -> State:
    places = [Place(directory / f"{run.key}-{slot}" / run.key) for slot in range(slots)]
    with _ended_with_us() as processes:
        for slot, place in enumerate(places):
            place.directory.mkdir(parents=True)
            place.write(run)
            task = Task(place, f"probe of {run.rung}", ladder.ranks, devices_of(ladder, slot))
            with _uninterrupted():
                processes.append(server.start(task))
        for process in processes:
            process.join()
    for process, place in zip(processes, places, strict=True):
        said = last_words(place.log)
        if process.exitcode and is_final(process.exitcode, said):
            raise UsageError(f"{run.rung}: the baseline fails in its first {PROBE_STEPS} steps.\n{said}")
    return pools.state(places[0].directory.parent, run)


@contextlib.contextmanager
def _ended_with_us() -> Iterator[list[BaseProcess]]:
    """A list for processes, none of which lives on if the context is left by an exception."""
    processes: list[BaseProcess] = []
    try:
        yield processes
    except BaseException:
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(LEAVING_SECONDS)
        finally:
            for process in processes:
                process.kill()
                process.join()
        raise


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that stop a ladder are heard at the end of the context: no process is started that nobody knows of."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def slots_of(ladder: Ladder) -> int:
    """Runs side by side: as the file says, or as many as cores (GPUs) can be shared out among."""
    if ladder.slots:
        return ladder.slots
    config = ladder.runs[0].config
    if gpus := _gpus(config):
        return max(1, gpus // ladder.ranks)
    return max(1, _cores() // (config.numerics.threads * ladder.ranks))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _gpus(config: Config) -> int:
    """That runs of this config would use."""
    if config.parallel.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def devices_of(ladder: Ladder, slot: int) -> dict[str, str]:
    """Environment of a slot: its own GPUs, where there are any."""
    gpus = _gpus(ladder.runs[0].config)
    if not gpus:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(number) for number in range(gpus)]
    own = [names[(slot * ladder.ranks + rank) % gpus] for rank in range(min(ladder.ranks, gpus))]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own)}
