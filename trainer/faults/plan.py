"""The plan of `[[faults]]`: checked as a whole before anything starts; what has fired is recorded, so it fires once.

Steps are counted as everywhere: `at_step = 9` is while step 9 is computed, saved or scored. A fault that names no step
fires the first time that its phase is reached. RUN/events/faults.jsonl lists what has fired: no fault
fires twice on a rank, however often the rank is started again.
"""

import difflib
import json
import math
import os
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults.fault import AFTER_THE_UPDATE, KINDS, NODES, WITHOUT_STEP, Fault, interval
from trainer.log import events
from trainer.log.events import Entry, FaultFired

RANKS = ("any", "all", "rank0", "writer")
"""Words for `rank` instead of a number."""
_now = time.time  # the real clock, also after a fault has made `time.time` jump


@dataclass(frozen=True)
class PlannedFault:
    """One fault of a config, with every random choice made."""

    index: int
    kind: Fault
    ranks: tuple[int, ...] | None
    """None: all."""
    at_step: int | None
    at_seconds: float | None
    phase: str
    """Empty if it comes from outside."""
    attempt: int | None
    settings: dict[str, Any]

    @property
    def from_outside(self) -> bool:
        """True if the nemesis makes it, beside the job."""
        return self.kind.from_outside or self.at_seconds is not None

    @property
    def point_step(self) -> int | None:
        """`at_step` as a rank counts at its phase: in completed steps."""
        late = self.at_step is None or self.phase in AFTER_THE_UPDATE
        return self.at_step if late else self.at_step - 1  # pyright: ignore[reportOptionalOperand]

    @property
    def last_step(self) -> int:
        """Completed steps when a fault that lasts for `steps` steps ends."""
        assert self.at_step is not None
        return self.at_step - 1 + self.settings["steps"]

    @property
    def times(self) -> int:
        """Number of times it fires on a rank."""
        return self.settings["times"] if self.kind.repeats else 1

    def victims(self, world_size: int) -> tuple[int, ...]:
        """The ranks it hits in a world of this size, which may have changed since it was planned."""
        return tuple(range(world_size)) if self.ranks is None else tuple(sorted({r % world_size for r in self.ranks}))

    def __str__(self) -> str:
        target = f" on {self._target()}" if self._target() else ""
        when = f" at step {self.at_step}" if self.at_step is not None else ""
        when += f" after {self.at_seconds:g} s" if self.at_seconds is not None else ""
        return f"{self.kind.name}{target}{when}" + (f", {self.phase}" if self.phase else "")

    def _target(self) -> str:
        if self.kind.on_rank:
            return "all ranks" if self.ranks is None else ", ".join(f"rank {rank}" for rank in self.ranks)
        node = self.settings.get("node")
        return "" if node is None else "the last node" if node < 0 else f"node {node}"


# Planning


def make(
    config: Config, world_size: int, nodes: int | None = None, numbers: Sequence[int] | None = None
) -> list[PlannedFault]:
    """The plan of a config's faults in a world of this size. Raises ConfigError naming every problem.

    A rank does not know on how many `nodes` it runs; the planner of a campaign does. `numbers` are the positions of
    the faults in the file, if the config holds some of them only.
    """
    problems: list[str] = []
    planned = []
    for index, entry in zip(range(len(config.faults)) if numbers is None else numbers, config.faults, strict=True):
        found = _problems(index, entry, config, world_size, nodes)
        problems += found
        # An entry with problems is left out, so that those of the others are reported in the same error.
        if not found:
            planned.append(_resolve(index, entry, config.seed, world_size))
    problems += _contradictions(planned) + _no_rank_left(planned, world_size) + _no_node_left(planned, nodes)
    if problems:
        raise ConfigError(problems)
    return planned


def _resolve(index: int, entry: FaultEntry, seed: int, world_size: int) -> PlannedFault:
    kind = KINDS[entry.kind]
    phase = _phase(entry, kind)
    if entry.rank == "any" and not kind.writer_only(phase):
        # Drawn by seed and index alone: every process of the run draws the same rank.
        ranks: tuple[int, ...] | None = (random.Random(f"{seed}-{index}").randrange(world_size),)
    else:
        ranks = None if entry.rank == "all" else (entry.rank if isinstance(entry.rank, int) else 0,)
    settings = {name: setting.default for name, setting in kind.settings.items()} | _own_settings(entry)
    return PlannedFault(index, kind, ranks, entry.at_step, entry.at_seconds, phase, entry.attempt, settings)


def _phase(entry: FaultEntry, kind: Fault) -> str:
    """The phase at which an entry fires; empty if it comes from outside."""
    return "" if kind.from_outside or entry.at_seconds is not None else entry.phase or str(kind.phases[0])


def _own_settings(entry: FaultEntry) -> dict[str, Any]:
    return entry.model_extra or {}


def _problems(index: int, entry: FaultEntry, config: Config, world_size: int, nodes: int | None) -> list[str]:
    """The reasons why an entry cannot fire as it stands: place in the config, fact, remedy."""
    where = f"faults[{index}]"
    kind = KINDS.get(entry.kind)
    if kind is None:
        near = difflib.get_close_matches(entry.kind, KINDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(KINDS)}."
        return [f"{where}.kind = {entry.kind!r} is no kind of fault.\n  {hint}"]
    where += f" ({kind.name})"
    refused = kind.refuses(entry, _phase(entry, kind), config, world_size)
    return [
        *_rank_problems(where, entry, kind, world_size),
        *([f"{where}: {refused}"] if refused else []),
        *_node_problems(where, entry, kind, nodes),
        *_time_problems(where, entry, kind, config),
        *_setting_problems(where, entry, kind),
        *_duration_problems(where, entry, kind, config),
    ]


def _rank_problems(where: str, entry: FaultEntry, kind: Fault, world_size: int) -> list[str]:
    if not kind.on_rank:
        no_rank = f"{where}: rank = {entry.rank!r}, but it does not hit a rank.\n  Remove rank."
        return [] if entry.rank == "any" else [no_rank]
    if isinstance(entry.rank, str):
        known = entry.rank in RANKS
        return [] if known else [f"{where}: rank = {entry.rank!r} is no rank.\n  Give a number or {', '.join(RANKS)}."]
    if not 0 <= entry.rank < world_size:
        return [f"{where}: rank = {entry.rank}, but the job has ranks 0 to {world_size - 1}.\n  Name one of them."]
    if entry.rank > 0 and kind.writer_only(_phase(entry, kind)):
        return [f'{where}: rank = {entry.rank}, but only rank 0 commits.\n  Give rank = "writer".']
    return []


def _node_problems(where: str, entry: FaultEntry, kind: Fault, nodes: int | None) -> list[str]:
    if nodes is None:
        return []
    if NODES in kind.needs and nodes < 2:
        return [f"{where} needs two nodes, and the job has one.\n  Set nodes = 2."]
    node = _own_settings(entry).get("node", -1)
    if isinstance(node, int) and node >= nodes:
        return [
            f"{where}: node = {node}, but the job has nodes 0 to {nodes - 1}.\n  Name one of them, or -1, the last."
        ]
    return []


def _time_problems(where: str, entry: FaultEntry, kind: Fault, config: Config) -> list[str]:
    problems = []
    if entry.at_step is not None and entry.at_seconds is not None:
        problems.append(f"{where} has both at_step and at_seconds.\n  Give one of them.")
    if entry.at_step is not None and entry.at_step > config.budget.steps:
        problems.append(
            f"{where}: at_step = {entry.at_step} is beyond the run's {config.budget.steps} steps.\n"
            "  It would never fire. Give an earlier step."
        )
    if kind.from_outside:
        if entry.phase:
            problems.append(f"{where}: phase = {entry.phase!r}, but it is made from outside.\n  Remove phase.")
        if entry.at_step is None and entry.at_seconds is None:
            problems.append(f"{where} does not say when.\n  Give at_step or at_seconds.")
        return problems
    if entry.at_seconds is not None:
        if not kind.signal_number:
            signals = ", ".join(other.name for other in KINDS.values() if other.signal_number)
            problems.append(f"{where}: at_seconds is for what can be made from outside: {signals}.\n  Give at_step.")
        if entry.phase:
            problems.append(f"{where}: at_seconds hits at any phase.\n  Remove phase, or give at_step.")
        return problems
    return problems + _phase_problems(where, entry, kind, config)


def _phase_problems(where: str, entry: FaultEntry, kind: Fault, config: Config) -> list[str]:
    phase, step, last = _phase(entry, kind), entry.at_step, config.budget.steps
    if phase not in kind.phases:
        return [f"{where}: phase = {phase!r} is not among {', '.join(kind.phases)}.\n  Name one of them."]
    if step is not None and phase in WITHOUT_STEP:
        return [f"{where}: {phase} belongs to no step.\n  Remove at_step; `attempt` selects the start."]
    if step is None:
        return [] if phase in WITHOUT_STEP else [f"{where} does not say when.\n  Give at_step."]
    every, setting = interval(phase, config)
    if step != last and (every == 0 or step % every):
        return [
            f"{where}: {phase} is not reached at step {step}: {setting} = {every}.\n"
            f"  Give a step that it divides, or {last}, the last."
        ]
    return []


def _setting_problems(where: str, entry: FaultEntry, kind: Fault) -> list[str]:
    problems = []
    for name, value in _own_settings(entry).items():
        setting = kind.settings.get(name)
        if setting is None:
            hint = f"It has {', '.join(kind.settings)}." if kind.settings else "It has none of its own."
            near = difflib.get_close_matches(name, [*FaultEntry.model_fields, *kind.settings], n=1)
            problems.append(f"{where}: {name} is no setting of it.\n  {f'Did you mean {near[0]}?' if near else hint}")
        elif isinstance(setting.default, str):
            if value not in setting.choices:
                problems.append(
                    f"{where}: {name} = {value!r} is none of its values.\n  Give {' or '.join(setting.choices)}."
                )
        elif isinstance(value, bool) or not isinstance(value, int if isinstance(setting.default, int) else int | float):
            problems.append(f"{where}: {name} = {value!r} is no number.\n  It is {setting.meaning}.")
        elif not math.isfinite(value):
            problems.append(f"{where}: {name} = {value} is not finite.\n  It is {setting.meaning}.")
        elif not setting.least <= value <= setting.most:
            side = f"below {setting.least:g}" if value < setting.least else f"above {setting.most:g}"
            problems.append(f"{where}: {name} = {value} is {side}.\n  It is {setting.meaning}.")
        elif value == 0 and not setting.zero:  # a fault that does nothing would pass every check
            problems.append(f"{where}: {name} = {value} makes no fault.\n  It is {setting.meaning}.")
    return problems


def _duration_problems(where: str, entry: FaultEntry, kind: Fault, config: Config) -> list[str]:
    """The default number of steps may be cut short by the run's end; a number that a person asks for may not."""
    steps, last = _own_settings(entry).get("steps"), config.budget.steps
    if "steps" not in kind.settings or not isinstance(steps, int) or steps == kind.settings["steps"].default:
        return []
    if entry.at_step is None or entry.at_step - 1 + steps <= last:
        return []
    return [
        f"{where}: steps = {steps} from step {entry.at_step} on is beyond the run's {last} steps.\n"
        f"  Give {max(0, last - entry.at_step + 1)} or fewer."
    ]


def _no_rank_left(planned: Sequence[PlannedFault], world_size: int) -> list[str]:
    """Faults that stop every rank at once: a stopped process notices nothing, so a rank must be left."""
    stopped: dict[tuple[Any, ...], set[int]] = {}
    for fault in planned:
        if fault.kind.stops_rank:
            moment = (fault.at_step, fault.at_seconds, fault.attempt)
            stopped.setdefault(moment, set()).update(fault.victims(world_size))
    everybody = "the only rank" if world_size == 1 else f"all {world_size} ranks at once"
    return [
        f"faults stop {everybody}, so that none is left to notice.\n  Leave one rank alone, or start more."
        for victims in stopped.values()
        if len(victims) == world_size
    ]


def _no_node_left(planned: Sequence[PlannedFault], nodes: int | None) -> list[str]:
    leaving = sum(fault.kind.node_balance < 0 for fault in planned)
    joining = sum(fault.kind.node_balance > 0 for fault in planned)
    if nodes is None or leaving < nodes + joining:
        return []
    return [f"faults take {leaving} nodes out for good, and the job has {nodes}.\n  Leave one node to continue."]


def _contradictions(planned: Sequence[PlannedFault]) -> list[str]:
    """Two faults that hit the same rank at the same moment: only the first could ever be seen to act."""
    problems = []
    # Faults from outside act one after the other, whenever they are due.
    inside = [fault for fault in planned if not fault.from_outside]
    for number, fault in enumerate(inside):
        for other in inside[:number]:
            same = (fault.at_step, fault.phase, fault.attempt) == (other.at_step, other.phase, other.attempt)
            shared = fault.ranks is None or other.ranks is None or set(fault.ranks) & set(other.ranks)
            if same and shared:
                problems.append(
                    f"faults[{other.index}] ({other.kind.name}) and faults[{fault.index}] ({fault.kind.name}) hit the "
                    f"same rank at the same moment.\n  Give one of them another step, phase, rank or attempt."
                )
    return problems


def tree(planned: PlannedFault) -> dict[str, Any]:
    """A plain form for JSON and TOML, from which the same fault can be made again."""
    out: dict[str, Any] = {"kind": planned.kind.name}
    if planned.kind.on_rank:
        out["rank"] = "all" if planned.ranks is None else planned.ranks[0]
    for key in ("at_step", "at_seconds", "attempt"):
        if getattr(planned, key) is not None:
            out[key] = getattr(planned, key)
    if planned.phase:
        out["phase"] = planned.phase
    return out | planned.settings


# The record of what has fired


def log_path(run: Path) -> Path:
    return events.events_directory(run) / "faults.jsonl"


def record(
    run: Path, fault: PlannedFault, attempt: int, writer: int,
    *, victim: int | None, step: int | None, phase: str | None,
) -> None:  # fmt: skip
    """Note that a fault fires. `writer` is the rank that writes, or NEMESIS.

    In one write, so that ranks may write at the same time, and a rank may die right after.
    """
    event = FaultFired(
        index=fault.index, fault=fault.kind.name, victim=victim, step=step, phase=phase, pid=os.getpid()
    )  # fmt: skip
    line = {"event": event.kind, "attempt": attempt, "rank": writer, "time": _now()} | asdict(event)
    path = log_path(run)
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (json.dumps(line) + "\n").encode())
    finally:
        os.close(descriptor)


def fired(run: Path) -> list[Entry]:
    """The faults that have fired so far, in order."""
    return [entry for entry in events.read_file(log_path(run)) if isinstance(entry.event, FaultFired)]


def firings(run: Path) -> list[FaultFired]:
    """The events of `fired`."""
    return [entry.event for entry in fired(run) if isinstance(entry.event, FaultFired)]


def not_fired(planned: Iterable[PlannedFault], run: Path) -> list[PlannedFault]:
    """The faults of a plan that have not fired on any rank yet."""
    fired_indices = {event.index for event in firings(run)}
    return [fault for fault in planned if fault.index not in fired_indices]
