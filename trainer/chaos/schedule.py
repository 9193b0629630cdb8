"""Random schedules of faults, and the search for the smallest part of a schedule that still fails.

Gaps between faults are exponential, so faults arrive as a Poisson process. Gaps are drawn in steps, not in seconds: a
fault then hits the same moment of the same computation on any machine, and a schedule can be replayed exactly. The same
seed draws the same schedule.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer import tomlfile
from trainer.chaos.results import Table
from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults.fault import KINDS, NODES, NOT_DRAWN, OF_MAIN_MEMBER, WITHOUT_STEP, Fault, comes_at, interval
from trainer.phases import Phase

Moment = tuple[int | None, str, int | str]
"""(step, phase or state, rank)"""


@dataclass(frozen=True)
class Cause:
    """A published cause of interruptions, and the kinds that imitate it: each gets an equal share of `count`."""

    name: str
    count: int
    kinds: tuple[str, ...]
    why: str


LINKS = ("partition", "one_way_loss", "link_flap")
# The 419 unexpected interruptions of Llama 3 405B's 54 days on 16,384 GPUs, by published cause (arXiv:2407.21783,
# table 5). 413 are mapped. Silent data corruption (6) is left out: only a sentinel finds it, and it is off by default,
# so a storm with it could not be held to equal hashes; the flip kinds of the catalogue show that openly.
# Faults that need two nodes are left out of a storm on one node: there a dead link looks like a stopped rank.
LLAMA3 = (
    Cause("faulty GPU", 148, ("sigabrt", "sigsegv", "exit", "nan_gradient"), "a driver's error ends the process"),
    Cause("GPU HBM3 memory", 72, ("sigabrt", "nan_weights"), "an uncorrectable error, or one that gets through"),
    Cause("software bug", 54, ("exception", "skipped_collective", "lock_held"), "raises, diverges or deadlocks"),
    Cause("network switch or cable", 35, (*LINKS, "stopped"), "peers that do not answer"),
    Cause("host maintenance", 32, ("sigterm",), "the scheduler gives notice"),
    Cause("GPU SRAM memory", 19, ("sigabrt", "nan_loss"), "an uncorrectable error, or one that gets through"),
    Cause("GPU system processor", 17, ("stopped", "sigkill"), "the device no longer answers"),
    Cause("NIC", 7, (*LINKS, "stopped"), "peers that do not answer"),
    Cause("NCCL watchdog timeouts", 7, ("stopped", "skipped_collective"), "a collective that does not end"),
    Cause("GPU thermal interface and sensor", 6, ("slow_rank",), "throttling"),
    Cause("SSD", 3, ("no_space", "eio_write", "eio_fsync", "short_write"), "a save that fails"),
    Cause("power supply", 3, ("node_killed",), "a machine is gone at once"),
    Cause("server chassis", 2, ("node_killed",), "a machine is gone at once"),
    Cause("IO expansion board", 2, ("node_killed",), "a machine is gone at once"),
    Cause("dependency", 2, ("exception", "stalled_data"), "a service that fails or does not answer"),
    Cause("CPU", 2, ("sigsegv",), "a wrong address"),
    Cause("system memory", 2, ("memory_kill",), "the kernel kills"),
)
PROCESS = ("sigkill", "sigsegv", "sigabrt", "exit", "exception", "memory_kill")
MIXES = ("llama3", "process")

RESTARTS = {"worker_lost", "hung"}
"""Incidents after which the workers restart and load a checkpoint."""
_TRIES = 20
"""Maximum number of draws for an arrival."""


def weights(mix: str | Mapping[str, float], nodes: int) -> dict[str, float]:
    """Return {kind: relative frequency} of a mix, without the kinds that need more nodes. Raises ConfigError."""
    if not isinstance(mix, str):
        return _check_own_mix(mix)
    if mix not in MIXES:
        raise ConfigError([f"storm.mix = {mix!r} is no mix.\n  Give {' or '.join(MIXES)}, or a table kind = weight."])
    if mix == "process":
        return dict.fromkeys(PROCESS, 1.0)
    found: dict[str, float] = {}
    for cause in LLAMA3:
        kinds = [kind for kind in cause.kinds if nodes > 1 or NODES not in KINDS[kind].needs]
        for kind in kinds:
            found[kind] = found.get(kind, 0.0) + cause.count / len(kinds)
    return found


def _check_own_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """Return the kinds of a user's mix with a weight above 0. Raises ConfigError."""
    problems = [
        f"storm.mix.{kind} = {tomlfile.text(weight)} is no weight.\n  Give how often it comes, relative to the others."
        for kind, weight in mix.items()
        if weight < 0
    ]
    if not any(mix.values()):
        problems.append(f"storm.mix = {tomlfile.text(mix)} has nothing to draw.\n  Give a kind a weight above 0.")
    if problems:
        raise ConfigError(problems)
    return {kind: weight for kind, weight in mix.items() if weight}


def draw(
    mix: Mapping[str, float], seed: int, *, faults: int, mean_steps: float, config: Config, world_size: int,
    inside: bool = True,
) -> list[Table]:  # fmt: skip
    """Draw a schedule of at most `faults` faults, in the order of their steps, within the steps of the run.

    `mean_steps` is the mean number of steps between two faults. A fault in a save or an evaluation is moved to the next
    one. Of the phases that belong to no step, only loading is drawn. Without `inside` every fault comes from outside.
    """
    rng = random.Random(f"storm-{seed}")
    if world_size == 1:  # these faults are detected by a peer that waits, and there is none
        mix = {kind: weight for kind, weight in mix.items() if not KINDS[kind].needs_peers}
    kinds, chances = list(mix), list(mix.values())
    schedule: list[Table] = []
    taken = set[Moment]()
    arrival = 0.0
    while len(schedule) < faults:
        arrival += rng.expovariate(1 / mean_steps)
        if arrival >= config.budget.steps - 2:  # ranks that are asked to stop need another step to agree on it
            break
        kind = KINDS[rng.choices(kinds, chances)[0]]
        # A fault that would share its moment with an earlier one is drawn again; after _TRIES draws it is left out.
        for _ in range(_TRIES):
            step = 1 + int(arrival)
            if inside:
                fault = _draw_fault(rng, kind, step, schedule, config, world_size)
            else:
                victim = {"rank": rng.randrange(world_size)} if kind.on_rank else {}
                fault = {"kind": kind.name, **victim, "at_step": step}
            if taken.isdisjoint(moments := _moments(fault)) and not _refused(kind, fault, config, world_size):
                taken |= moments
                schedule.append(fault)
                break
    return sorted(schedule, key=lambda fault: fault.get("at_step", 0))


def _draw_fault(
    rng: random.Random, kind: Fault, step: int, schedule: Sequence[Table], config: Config, world_size: int
) -> Table:
    if kind.from_outside:
        return {"kind": kind.name, "at_step": step}
    drawn = [phase for phase in kind.phases if phase not in (*WITHOUT_STEP, *NOT_DRAWN)]
    phases = drawn or list(kind.phases)
    in_quorum = config.elastic.mode == "quorum"
    # Ranks surely load after an earlier fault that restarts them, once there is a checkpoint.
    restarting = [other for other in schedule if RESTARTS & {*KINDS[other["kind"]].expected_incidents}]
    saved = 2 * config.checkpoint.every_steps
    loads = not in_quorum and any(0 < saved < other.get("at_step", 0) for other in restarting)
    if Phase.IN_LOAD in kind.phases and loads:
        phases.append(Phase.IN_LOAD)
    phase = rng.choice(phases)
    fault = {"kind": kind.name, "rank": rng.randrange(world_size), "phase": phase}
    if kind.writer_only(phase):
        fault["rank"] = 0  # the other ranks have nothing left to write by then
    if in_quorum and phase in OF_MAIN_MEMBER:
        fault["rank"] = "writer"
    return fault if phase == Phase.IN_LOAD else fault | {"at_step": due(phase, step, config)}


def _refused(kind: Fault, fault: Table, config: Config, world_size: int) -> bool:
    return bool(kind.refuses(FaultEntry(**fault), fault.get("phase", ""), config, world_size))


def due(phase: str, step: int, config: Config) -> int:
    """Return the first step, from this one on, that has a phase; the last step if there is none."""
    last = config.budget.steps
    return next((later for later in range(step, last) if comes_at(phase, later, config)), last)


def _moments(fault: Table) -> set[Moment]:
    """Return moments that two faults of a schedule may not share: a rank at a phase, and stopped ranks in one step."""
    kind = KINDS[fault["kind"]]
    if kind.from_outside:
        # At most one node leaves permanently, so that a node remains.
        return {(None, "node leaves", -1)} if kind.node_balance < 0 else set()
    moments: set[Moment] = {(fault.get("at_step"), fault.get("phase") or kind.phases[0], fault["rank"])}
    return moments | {(fault.get("at_step"), "stopped", -1)} if kind.stops_rank else moments


def usual(kind: Fault, config: Config, world_size: int, number: int = 0) -> Table:
    """Return a [[faults]] table of a kind at a moment that every run reaches; `number` spreads victims over ranks."""
    every = config.checkpoint.every_steps or config.budget.steps
    step = kind.usual_step(every, config.budget.steps)
    if kind.from_outside:
        return {"kind": kind.name, "at_step": step}
    phase = kind.phases[0]
    fault: Table = {"kind": kind.name, "rank": number % world_size, "at_step": due(phase, step, config)}
    if config.elastic.mode == "quorum" and phase in OF_MAIN_MEMBER:
        fault["rank"] = "writer"
    elif kind.writer_only(phase):
        fault["rank"] = 0
    elif _refused(kind, fault, config, world_size):
        fault["rank"] = (number + 1) % world_size
    return fault


def at_phase(kind: Fault, phase: str, config: Config, world_size: int) -> list[Table]:
    """Return [[faults]] tables of a kind at one phase, on each rank, some steps apart, and what leads to that phase."""
    in_quorum, last = config.elastic.mode == "quorum", config.budget.steps
    fault: Table = {"kind": kind.name, "phase": phase}
    # Another death makes ranks load, or hand over their state.
    trigger = {"kind": "sigkill", "rank": "all" if phase == Phase.IN_LOAD else world_size - 1, "phase": "before_update"}
    if phase == Phase.IN_TRANSFER:
        receiver, giver = ({"rank": rank, "at_step": 3} for rank in (world_size - 1, "writer"))
        return [trigger | {"at_step": 2}, fault | receiver, fault | giver | {"at_step": 4}]
    if phase in (Phase.BEFORE_END, Phase.AFTER_END):
        return [fault | {"rank": "writer"}]
    if phase in WITHOUT_STEP:
        alone = [fault | {"rank": rank} for rank in range(world_size)]
        # The save under way may not be committed yet, so there are two.
        saved = {"at_step": min(2 * config.checkpoint.every_steps + 2, last)}
        return [trigger | saved, *alone] if phase == Phase.IN_LOAD else alone
    every = interval(phase, config)[0] or last
    apart = -(-max(3, (last - 3) // world_size) // every) * every
    by_main = in_quorum and phase in OF_MAIN_MEMBER
    tables = list[Table]()
    for rank in range(1 if kind.writer_only(phase) and not in_quorum else world_size):
        step = due(phase, 2 + rank * apart, config)
        if phase == Phase.WIDENED:  # the first step has it for sure, and others wait for their next one in quorum mode
            step = 1 + rank if in_quorum else 1
        table = fault | {"rank": "writer" if by_main else rank, "at_step": step}
        is_new = not tables or tables[-1]["at_step"] < step or not by_main
        if is_new and not _refused(kind, table, config, world_size):
            tables.append(table)
    return tables


def pair(first: Fault, second: Fault, config: Config, world_size: int) -> list[Table]:
    """Return tables of two kinds in the same step on different ranks, or as close to that as the kinds allow."""
    faults = [usual(first, config, world_size, 0), usual(second, config, world_size, 1)]
    step = max(fault["at_step"] for fault in faults)
    for fault in faults:
        kind = KINDS[fault["kind"]]
        fault["at_step"] = due(kind.phases[0] if kind.phases else "", step, config)
    if _moments(faults[0]) & _moments(faults[1]):  # a single rank cannot be hit twice at once, so the second waits
        faults[1]["at_step"] = due(second.phases[0], step + 1, config)
    return faults


def sample_pairs(kinds: Sequence[Fault], sample: int, seed: int) -> list[tuple[Fault, Fault]]:
    """Draw `sample` different pairs of different kinds; all pairs if there are fewer."""
    every = list(itertools.combinations(kinds, 2))
    return random.Random(f"pairs-{seed}").sample(every, min(sample, len(every)))


class Shrunk(NamedTuple):
    faults: list[Table]
    trials: int
    smallest: bool
    """True if no fault can be left out; False if the trials were used up before that was known."""


def shrink(fails: Callable[[list[Table]], bool], faults: Sequence[Table], most_trials: int = 40) -> Shrunk:
    """Find the smallest part of a failing schedule that still fails. `fails` makes a real run for each trial.

    Source: ddmin of Zeller & Hildebrandt 2002, "Simplifying and isolating failure-inducing input".
    """
    left, pieces, trials = list(range(len(faults))), 2, 0
    while len(left) >= 2:
        # Try each piece alone, then all without each piece; when none of these fails, cut into smaller pieces.
        size = -(-len(left) // pieces)
        parts = [left[start : start + size] for start in range(0, len(left), size)]
        rests = [[n for n in left if n not in part] for part in parts] if len(parts) > 2 else []
        for trial in [*parts, *rests]:
            if trials == most_trials:
                return Shrunk([faults[n] for n in left], trials, False)
            trials += 1
            if fails([faults[n] for n in trial]):
                left, pieces = trial, 2 if trial in parts else max(2, pieces - 1)
                break
        else:
            if size == 1:
                break
            pieces = min(len(left), 2 * pieces)
    return Shrunk([faults[n] for n in left], trials, True)
