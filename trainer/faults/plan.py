"""The plan of `[[faults]]`: checked as a whole before anything starts; what has fired is recorded, so it fires once.

Steps are counted as everywhere: `at_step = 9` is while step 9 is computed, saved or scored. A fault that names no step
fires the first time that its phase is reached. RUN/events/faults.jsonl lists what has fired: no fault
fires twice on a rank, however often the rank is started again.
"""

import difflib
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults.fault import (
    AFTER_THE_UPDATE,
    IN_ISLANDS,
    IN_QUORUM,
    KINDS,
    NODES,
    OF_MAIN_MEMBER,
    WITHOUT_STEP,
    Fault,
    comes_at,
    interval,
)
from trainer.log import events
from trainer.log.events import Entry, FaultFired
from trainer.phases import Phase

RANKS = ("any", "all", "rank0", "writer")
"""Words for `rank` instead of a number."""
_now = time.time  # the real clock, also after a fault has made `time.time` jump


@dataclass(frozen=True)
class PlannedFault:
    """One fault of a config, with every random choice made."""

    index: int
    kind: Fault
    ranks: tuple[int, ...] | None  # None: all
    at_step: int | None
    at_seconds: float | None
    phase: str  # empty if it comes from outside
    attempt: int | None
    settings: dict[str, Any]
    mode: str = "restart"
    """elastic.mode. In quorum mode a rank is a launcher's place for a worker: a successor has the same one. The others
    do not wait for it, so a fault whose rank is away at its step strikes at the first later one."""
    on_main: bool = False
    """Quorum mode: it strikes whoever is the main member by then; `ranks` are all."""
    log_lags: int = 0
    """Steps by which the log may be behind training: with islands it is written where they meet."""

    @property
    def from_outside(self) -> bool:
        """True if the nemesis makes it, beside the job."""
        return not self.phase

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
        return self.settings.get("times", 2) if self.kind.repeats else 1

    def victims(self, world_size: int) -> tuple[int, ...]:
        """The ranks it hits in a world of this size, which may have changed since it was planned."""
        return tuple(range(world_size)) if self.ranks is None else tuple(sorted({r % world_size for r in self.ranks}))

    def __str__(self) -> str:
        if self.kind.on_rank:
            ranks = ("all ranks",) if self.ranks is None else (f"rank {rank}" for rank in self.ranks)
            target = "the main member" if self.on_main else ", ".join(ranks)
        else:
            node = self.settings.get("node")
            target = "" if node is None else "the last node" if node < 0 else f"node {node}"
        when = f" at step {self.at_step}" if self.at_step is not None else ""
        when += f" after {self.at_seconds:g} s" if self.at_seconds is not None else ""
        return self.kind.name + (f" on {target}" if target else "") + when + (f", {self.phase}" if self.phase else "")


# Planning


def make(
    config: Config, world_size: int, nodes: int | None = None, numbers: Sequence[int] | None = None, *,
    inside: bool = True, transport: str = "tcp",
) -> list[PlannedFault]:  # fmt: skip
    """The plan of a config's faults in a world of this size. Raises ConfigError naming every problem.

    A rank does not know on how many `nodes` it runs; the planner of a campaign does. `numbers` are the positions of
    the faults in the file, if the config holds some of them only. Without `inside` every fault is made from outside:
    the job is not a toprope run, so that no rank of it makes faults itself. `transport` of its connections is "tcp" or
    "mptcp".
    """
    problems: list[str] = []
    planned = []
    for index, entry in zip(range(len(config.faults)) if numbers is None else numbers, config.faults, strict=True):
        where, kind = f"faults[{index}]", KINDS.get(entry.kind)
        if kind is None:
            near = difflib.get_close_matches(entry.kind, KINDS, n=1, cutoff=0.5)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(KINDS)}."
            problems.append(f"{where}.kind = {entry.kind!r} is no kind of fault.\n  {hint}")
            continue
        where += f" ({kind.name})"
        if reason := kind.not_in.get(config.elastic.mode):
            problems.append(f"{where} cannot be made: {reason}.\n  Remove it, or train in the other elastic.mode.")
            continue
        outside = kind.from_outside or not inside
        phase = "" if outside or entry.at_seconds is not None else entry.phase or str(kind.phases[0])
        mode = config.elastic.mode
        found = [*_target_problems(where, entry, kind, phase, world_size, nodes, mode)]
        if refused := kind.refuses(entry, phase, config, world_size):
            found.append(f"{where}: {refused}")
        found += _moment_problems(where, entry, kind, phase, config, outside)
        found += _setting_problems(where, entry, kind, config)
        problems += found
        # An entry with problems is left out, so that those of the others are reported in the same error.
        if not found:
            shown = kind.watched(world_size) if config.sentinel.on else kind
            shown = (shown.in_quorum(phase) if mode == "quorum" else shown).over(transport)
            fault = _resolve(index, entry, shown, phase, config.seed, world_size, mode)
            planned.append(replace(fault, log_lags=config.islands.inner_steps if config.islands.count else 0))
    problems += _joint_problems(planned, world_size, nodes)
    if problems:
        raise ConfigError(problems)
    return planned


def _resolve(
    index: int, entry: FaultEntry, kind: Fault, phase: str, seed: int, world_size: int, mode: str
) -> PlannedFault:  # fmt: skip
    by_main = phase in OF_MAIN_MEMBER and entry.rank == "any"
    has_main = phase not in ("", Phase.STARTUP, Phase.JOINING)  # else the members are not known yet
    # A second death is that of a successor or a neighbour, so the first one must be in a place that is known.
    is_single = not kind.repeats and not kind.neighbours
    on_main = mode == "quorum" and has_main and is_single and (by_main or entry.rank == "writer")
    ranks: tuple[int, ...] | None
    if on_main:
        ranks = tuple(range(world_size))
    elif entry.rank == "any" and not kind.writer_only(phase):
        # Drawn by seed and index alone: every process of the run draws the same rank.
        ranks = (random.Random(f"{seed}-{index}").randrange(world_size),)
    else:
        ranks = None if entry.rank == "all" else (entry.rank if isinstance(entry.rank, int) else 0,)
    if ranks is not None and kind.neighbours:
        ranks = tuple((ranks[0] + further) % world_size for further in range(1 + kind.neighbours))
    settings = {name: setting.default for name, setting in kind.settings.items()} | (entry.model_extra or {})
    moment = entry.at_step, entry.at_seconds, phase, entry.attempt
    return PlannedFault(index, kind, ranks, *moment, settings, mode, on_main)


# The reasons why an entry cannot fire as it stands: place in the config, fact, remedy.


def _target_problems(
    where: str, entry: FaultEntry, kind: Fault, phase: str, world_size: int, nodes: int | None, mode: str
) -> Iterator[str]:
    rank, node = entry.rank, (entry.model_extra or {}).get("node", -1)
    if not kind.on_rank:
        if rank != "any":
            yield f"{where}: rank = {rank!r}, but it does not hit a rank.\n  Remove rank."
    elif isinstance(rank, str):
        if rank not in RANKS:
            yield f"{where}: rank = {rank!r} is no rank.\n  Give a number or {', '.join(RANKS)}."
    elif not 0 <= rank < world_size:
        yield f"{where}: rank = {rank}, but the job has ranks 0 to {world_size - 1}.\n  Name one of them."
    elif rank > 0 and kind.writer_only(phase):
        yield f'{where}: rank = {rank}, but only rank 0 commits.\n  Give rank = "writer".'
    elif rank > 0 and mode == "quorum" and phase in OF_MAIN_MEMBER:
        yield f'{where}: rank = {rank}, but {phase} is passed by the main member alone.\n  Give rank = "writer".'
    if nodes is not None and NODES in kind.needs and nodes < 2:
        yield f"{where} needs two nodes, and the job has one.\n  Set nodes = 2."
    elif nodes is not None and isinstance(node, int) and node >= nodes:
        yield f"{where}: node = {node}, but the job has nodes 0 to {nodes - 1}.\n  Name one of them, or -1, the last."


def _moment_problems(
    where: str, entry: FaultEntry, kind: Fault, phase: str, config: Config, outside: bool
) -> Iterator[str]:
    step, last = entry.at_step, config.budget.steps
    if step is not None and entry.at_seconds is not None:
        yield f"{where} has both at_step and at_seconds.\n  Give one of them."
    if step is not None and step > last:
        yield (
            f"{where}: at_step = {step} is beyond the run's {last} steps.\n  It would never fire. Give an earlier step."
        )
    if outside:
        if entry.phase:
            yield f"{where}: phase = {entry.phase!r}, but it is made from outside.\n  Remove phase."
        if step is None and entry.at_seconds is None:
            yield f"{where} does not say when.\n  Give at_step or at_seconds."
    elif entry.at_seconds is not None:
        if not kind.signal_number:
            signals = ", ".join(other.name for other in KINDS.values() if other.signal_number)
            yield f"{where}: at_seconds is for what can be made from outside: {signals}.\n  Give at_step."
        if entry.phase:
            yield f"{where}: at_seconds hits at any phase.\n  Remove phase, or give at_step."
    elif phase not in kind.phases:
        yield f"{where}: phase = {phase!r} is not among {', '.join(kind.phases)}.\n  Name one of them."
    elif phase in IN_QUORUM and config.elastic.mode != "quorum":
        yield f"{where}: {phase} is passed in quorum mode alone.\n  Start it by trainer launch, or name another phase."
    elif phase in WITHOUT_STEP:
        if step is not None:
            yield f"{where}: {phase} belongs to no step.\n  Remove at_step; `attempt` selects the start."
    elif step is None:
        yield f"{where} does not say when.\n  Give at_step."
    elif phase in IN_ISLANDS and not config.islands.count:
        yield f"{where}: {phase} is passed with islands alone.\n  Set islands.count, or name another phase."
    elif not comes_at(phase, step, config):
        every, setting = interval(phase, config)
        if phase in IN_ISLANDS:
            steps = [str(later) for later in range(1, last + 1) if comes_at(phase, later, config)]
            shown = ", ".join(steps[:8]) + (", …" if steps[8:] else "")
            yield f"{where}: {phase} is not reached at step {step}.\n  Give one of the steps {shown}."
        else:
            yield (
                f"{where}: {phase} is not reached at step {step}: {setting} = {every}.\n"
                f"  Give a step that it divides, or {last}, the last."
            )


def _setting_problems(where: str, entry: FaultEntry, kind: Fault, config: Config) -> Iterator[str]:
    own, last = entry.model_extra or {}, config.budget.steps
    for name, value in own.items():
        setting = kind.settings.get(name)
        if setting is None:
            hint = f"It has {', '.join(kind.settings)}." if kind.settings else "It has none of its own."
            near = difflib.get_close_matches(name, [*FaultEntry.model_fields, *kind.settings], n=1)
            yield f"{where}: {name} is no setting of it.\n  {f'Did you mean {near[0]}?' if near else hint}"
        elif fact := setting.problem(value):
            yield f"{where}: {name} = {value!r} {fact}"
    # The default number of steps may be cut short by the run's end; a number that a person asks for may not.
    steps, default = own.get("steps"), kind.settings["steps"].default if "steps" in kind.settings else None
    if default is None or not isinstance(steps, int) or steps == default or entry.at_step is None:
        return
    if entry.at_step - 1 + steps > last:
        yield (
            f"{where}: steps = {steps} from step {entry.at_step} on is beyond the run's {last} steps.\n"
            f"  Give {max(0, last - entry.at_step + 1)} or fewer."
        )


def _joint_problems(planned: Sequence[PlannedFault], world_size: int, nodes: int | None) -> Iterator[str]:
    # Faults from outside act one after the other, whenever they are due; of two inside only the first would be seen.
    inside = [fault for fault in planned if not fault.from_outside]
    for number, fault in enumerate(inside):
        for other in inside[:number]:
            same = (fault.at_step, fault.phase, fault.attempt) == (other.at_step, other.phase, other.attempt)
            if same and (fault.ranks is None or other.ranks is None or set(fault.ranks) & set(other.ranks)):
                yield (
                    f"faults[{other.index}] ({other.kind.name}) and faults[{fault.index}] ({fault.kind.name}) hit the "
                    "same rank at the same moment.\n  Give one of them another step, phase, rank or attempt."
                )
    # A stopped process notices nothing, so a rank must be left that does.
    stopped: dict[tuple[Any, ...], set[int]] = {}
    for fault in planned:
        if fault.kind.stops_rank:
            moment = (fault.at_step, fault.at_seconds, fault.attempt)
            stopped.setdefault(moment, set()).update(fault.victims(world_size))
    everybody = "the only rank" if world_size == 1 else f"all {world_size} ranks at once"
    for victims in stopped.values():
        if len(victims) == world_size:
            yield f"faults stop {everybody}, so that none is left to notice.\n  Leave one rank alone, or start more."
    leaving = sum(fault.kind.node_balance < 0 for fault in planned)
    joining = sum(fault.kind.node_balance > 0 for fault in planned)
    if nodes is not None and leaving >= nodes + joining:
        yield f"faults take {leaving} nodes out for good, and the job has {nodes}.\n  Leave one node to continue."


def tree(planned: PlannedFault) -> dict[str, Any]:
    """A plain form for JSON and TOML, from which the same fault can be made again."""
    named = "writer" if planned.on_main else "all" if planned.ranks is None else planned.ranks[0]
    rank = {"rank": named} if planned.kind.on_rank else {}
    moment = {key: getattr(planned, key) for key in ("at_step", "at_seconds", "attempt", "phase")}
    given = {key: value for key, value in moment.items() if value not in (None, "")}
    return {"kind": planned.kind.name, **rank, **given, **planned.settings}


# The record of what has fired


def _log_path(run: Path) -> Path:
    return events.events_directory(run) / "faults.jsonl"


def record(
    run: Path, fault: PlannedFault, attempt: int, writer: int,
    *, victim: int | None, step: int | None, phase: str | None, member: int | None = None,
) -> None:  # fmt: skip
    """Note that a fault fires. `writer` is the rank that writes, or NEMESIS; `member` is the victim's number in quorum
    mode, if it has one.

    In one write, so that ranks may write at the same time, and a rank may die right after.
    """
    event = FaultFired(
        index=fault.index, fault=fault.kind.name, victim=victim, step=step, phase=phase, pid=os.getpid(),
        member=member,
    )  # fmt: skip
    line = {"event": event.kind, "attempt": attempt, "rank": writer, "time": _now()} | asdict(event)
    _log_path(run).parent.mkdir(exist_ok=True)
    with _log_path(run).open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


def fired(run: Path) -> list[tuple[Entry, FaultFired]]:
    """The faults that have fired so far, in order."""
    return events.select(events.read_file(_log_path(run)), FaultFired)
