"""From `[[faults]]` to what fires when: checked as a whole before anything starts, and kept to one firing each.

Steps are counted as everywhere: `at_step = 9` is while step 9 is computed, saved or scored. A fault that names no step
fires at its phase when it first comes by. What has fired stands in RUN/events/faults.jsonl, so that no fault fires
twice on a rank, however often it is started again.
"""

import difflib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults.kinds import KINDS, NODES, PHASES_WITHOUT_STEP, SAVE, Kind
from trainer.log import events
from trainer.log.events import Entry, FaultFired
from trainer.phases import Phase

ROLES = ("any", "all", "rank0", "writer")
BY_SIGNAL = ("sigkill", "sigsegv", "sigabrt", "sigterm", "stopped")
"""What can hit a rank from outside, at a wall time."""
BY_WRITER = (("eio_rename", Phase.BEFORE_COMMIT), ("no_space", Phase.BEFORE_COMMIT))
"""What only rank 0 does, and so only there can fail."""
AFTER_THE_UPDATE = (Phase.AFTER_UPDATE, Phase.IN_EVAL, *SAVE)
"""Phases at which a rank's own count of completed steps is already that of the step."""


@dataclass(frozen=True)
class PlannedFault:
    """One fault, with nothing left to chance."""

    index: int
    kind: Kind
    ranks: tuple[int, ...] | None
    """None: all."""
    at_step: int | None
    at_seconds: float | None
    phase: str
    """Empty for the nemesis."""
    attempt: int | None
    settings: dict[str, Any]

    @property
    def by_nemesis(self) -> bool:
        return self.kind.hand == "nemesis" or self.at_seconds is not None

    @property
    def point_step(self) -> int | None:
        """`at_step` as the points of a rank count: completed steps."""
        late = self.at_step is None or self.phase in AFTER_THE_UPDATE
        return self.at_step if late else self.at_step - 1  # pyright: ignore[reportOptionalOperand]

    def victims(self, world_size: int) -> tuple[int, ...]:
        """The ranks it hits in a world of this size, which may have changed since it was planned."""
        return tuple(range(world_size)) if self.ranks is None else tuple(sorted({r % world_size for r in self.ranks}))

    def __str__(self) -> str:
        who = f" on {self._whom()}" if self._whom() else ""
        when = f" at step {self.at_step}" if self.at_step is not None else ""
        when += f" after {self.at_seconds:g} s" if self.at_seconds is not None else ""
        return f"{self.kind.name}{who}{when}" + (f", {self.phase}" if self.phase else "")

    def _whom(self) -> str:
        if self.kind.on_rank:
            return "all ranks" if self.ranks is None else ", ".join(f"rank {rank}" for rank in self.ranks)
        node = self.settings.get("node")
        return "" if node is None else "the last node" if node < 0 else f"node {node}"


def make(
    config: Config, world_size: int, nodes: int | None = None, numbers: Sequence[int] | None = None
) -> list[PlannedFault]:
    """The plan of a config's faults in a world of this size. Raises ConfigError naming every problem.

    A rank does not know on how many `nodes` it runs; whoever makes faults of nodes does. `numbers` are those of the
    faults where they stand written, if the config was given some of them only.
    """
    problems: list[str] = []
    planned = []
    for index, fault in zip(range(len(config.faults)) if numbers is None else numbers, config.faults, strict=True):
        found = _problems(index, fault, config, world_size, nodes)
        problems += found
        if not found:
            planned.append(_resolve(index, fault, config.seed, world_size))
    problems += _contradictions(planned) + _nobody_left(planned, world_size) + _no_node_left(planned, nodes)
    if problems:
        raise ConfigError(problems)
    return planned


def _resolve(index: int, fault: FaultEntry, seed: int, world_size: int) -> PlannedFault:
    kind = KINDS[fault.kind]
    if fault.rank == "any" and _by_writer(fault, kind):
        ranks: tuple[int, ...] | None = (0,)
    elif fault.rank == "any":
        ranks = (random.Random(f"{seed}-{index}").randrange(world_size),)
    else:
        ranks = None if fault.rank == "all" else (fault.rank if isinstance(fault.rank, int) else 0,)
    by_nemesis = kind.hand == "nemesis" or fault.at_seconds is not None
    phase = "" if by_nemesis else fault.phase or kind.phases[0]
    settings = {name: setting.default for name, setting in kind.settings.items()} | _own(fault)
    return PlannedFault(index, kind, ranks, fault.at_step, fault.at_seconds, phase, fault.attempt, settings)


def _own(fault: FaultEntry) -> dict[str, Any]:
    return fault.model_extra or {}


def _problems(index: int, fault: FaultEntry, config: Config, world_size: int, nodes: int | None) -> list[str]:
    where = f"faults[{index}]"
    kind = KINDS.get(fault.kind)
    if kind is None:
        near = difflib.get_close_matches(fault.kind, KINDS, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(KINDS)}."
        return [f"{where}.kind = {fault.kind!r} is no kind of fault.\n  {hint}"]
    where += f" ({kind.name})"
    return [
        *_about_rank(where, fault, kind, world_size),
        *_about_nodes(where, fault, kind, nodes),
        *_about_time(where, fault, kind, config),
        *_about_settings(where, fault, kind),
        *_about_lasting(where, fault, kind, config),
        *_about_compiling(where, kind, config),
    ]


def _by_writer(fault: FaultEntry, kind: Kind) -> bool:
    return (kind.name, fault.phase or "".join(kind.phases[:1])) in BY_WRITER


def _about_rank(where: str, fault: FaultEntry, kind: Kind, world_size: int) -> list[str]:
    if not kind.on_rank:
        said = f"{where}: rank = {fault.rank!r}, but it does not hit a rank.\n  Remove rank."
        return [] if fault.rank == "any" else [said]
    if kind.name == "skipped_collective" and (world_size == 1 or fault.rank == "all"):
        return [f"{where}: some rank must be left that waits in it.\n  Start 2 ranks or more, and name one of them."]
    if isinstance(fault.rank, str):
        known = fault.rank in ROLES
        return [] if known else [f"{where}: rank = {fault.rank!r} is no rank.\n  Give a number or {', '.join(ROLES)}."]
    if not 0 <= fault.rank < world_size:
        return [f"{where}: rank = {fault.rank}, but the job has ranks 0 to {world_size - 1}.\n  Name one of them."]
    if fault.rank > 0 and _by_writer(fault, kind):
        return [f'{where}: rank = {fault.rank}, but only rank 0 commits.\n  Give rank = "writer".']
    return []


def _about_nodes(where: str, fault: FaultEntry, kind: Kind, nodes: int | None) -> list[str]:
    if nodes is None:
        return []
    if NODES in kind.needs and nodes < 2:
        return [f"{where} needs two nodes, and the job has one.\n  Set nodes = 2."]
    node = _own(fault).get("node", -1)
    if isinstance(node, int) and node >= nodes:
        return [
            f"{where}: node = {node}, but the job has nodes 0 to {nodes - 1}.\n  Name one of them, or -1, the last."
        ]
    return []


def _about_time(where: str, fault: FaultEntry, kind: Kind, config: Config) -> list[str]:
    problems = []
    if fault.at_step is not None and fault.at_seconds is not None:
        problems.append(f"{where} has both at_step and at_seconds.\n  Give one of them.")
    if fault.at_step is not None and fault.at_step > config.budget.steps:
        problems.append(
            f"{where}: at_step = {fault.at_step} is beyond the run's {config.budget.steps} steps.\n"
            "  It would never fire. Give an earlier step."
        )
    if kind.hand == "nemesis":
        if fault.phase:
            problems.append(f"{where}: phase = {fault.phase!r}, but it is made from outside.\n  Remove phase.")
        if fault.at_step is None and fault.at_seconds is None:
            problems.append(f"{where} does not say when.\n  Give at_step or at_seconds.")
        return problems
    phase = fault.phase or kind.phases[0]
    if fault.at_seconds is not None:
        if kind.name not in BY_SIGNAL:
            problems.append(
                f"{where}: at_seconds is for what can be made from outside: {', '.join(BY_SIGNAL)}.\n  Give at_step."
            )
        if fault.phase:
            problems.append(f"{where}: at_seconds hits at any phase.\n  Remove phase, or give at_step.")
    elif phase not in kind.phases:
        problems.append(f"{where}: phase = {phase!r} is not among {', '.join(kind.phases)}.\n  Name one of them.")
    elif fault.at_step is not None and phase in PHASES_WITHOUT_STEP:
        problems.append(
            f"{where}: {phase} belongs to no step.\n  Remove at_step; `attempt` tells which start is meant."
        )
    elif fault.at_step is None and phase not in PHASES_WITHOUT_STEP:
        problems.append(f"{where} does not say when.\n  Give at_step.")
    else:
        problems += _never_comes_by(where, fault, phase, config)
    return problems


def _never_comes_by(where: str, fault: FaultEntry, phase: str, config: Config) -> list[str]:
    step, last = fault.at_step, config.budget.steps
    if step is None:
        return []
    for phases, every, name in (
        (SAVE, config.checkpoint.every_steps, "checkpoint.every_steps"),
        ((Phase.IN_EVAL,), config.eval.every_steps, "eval.every_steps"),
    ):
        if phase in phases and step != last and (every == 0 or step % every):
            return [
                f"{where}: {phase} does not come by at step {step}: {name} = {every}.\n"
                f"  Give a step that it divides, or {last}, the last."
            ]
    return []


def _about_settings(where: str, fault: FaultEntry, kind: Kind) -> list[str]:
    problems = []
    for name, value in _own(fault).items():
        setting = kind.settings.get(name)
        if setting is None:
            there = f"It has {', '.join(kind.settings)}." if kind.settings else "It has none of its own."
            near = difflib.get_close_matches(name, [*FaultEntry.model_fields, *kind.settings], n=1)
            problems.append(f"{where}: {name} is no setting of it.\n  {f'Did you mean {near[0]}?' if near else there}")
        elif isinstance(setting.default, str):
            if value not in setting.choices:
                problems.append(
                    f"{where}: {name} = {value!r} is none of its values.\n  Give {' or '.join(setting.choices)}."
                )
        elif isinstance(value, bool) or not isinstance(value, int if isinstance(setting.default, int) else int | float):
            problems.append(f"{where}: {name} = {value!r} is no number.\n  It is {setting.what}.")
        elif not math.isfinite(value):
            problems.append(f"{where}: {name} = {value} is not finite.\n  It is {setting.what}.")
        elif not setting.least <= value <= setting.most:
            side = f"below {setting.least:g}" if value < setting.least else f"above {setting.most:g}"
            problems.append(f"{where}: {name} = {value} is {side}.\n  It is {setting.what}.")
        elif value == 0 and not setting.zero:
            problems.append(f"{where}: {name} = {value} makes no fault.\n  It is {setting.what}.")
    return problems


def _about_lasting(where: str, fault: FaultEntry, kind: Kind, config: Config) -> list[str]:
    """The default number of steps may be cut short by the run's end; one that somebody asks for may not."""
    steps, last = _own(fault).get("steps"), config.budget.steps
    if "steps" not in kind.settings or not isinstance(steps, int) or steps == kind.settings["steps"].default:
        return []
    if fault.at_step is None or fault.at_step - 1 + steps <= last:
        return []
    return [
        f"{where}: steps = {steps} from step {fault.at_step} on is beyond the run's {last} steps.\n"
        f"  Give {max(0, last - fault.at_step + 1)} or fewer."
    ]


def _about_compiling(where: str, kind: Kind, config: Config) -> list[str]:
    if kind.name != "wrong_operator" or not config.numerics.compile:
        return []
    return [
        f"{where}: numerics.compile fuses the operators that it replaces.\n  Set numerics.compile = false, or leave it."
    ]


def _nobody_left(planned: Sequence[PlannedFault], world_size: int) -> list[str]:
    """Stopped processes notice nothing: somebody else must."""
    stopped: dict[tuple[Any, ...], set[int]] = {}
    for fault in planned:
        if fault.kind.name == "stopped":
            moment = (fault.at_step, fault.at_seconds, fault.attempt)
            stopped.setdefault(moment, set()).update(fault.victims(world_size))
    everybody = "the only rank" if world_size == 1 else f"all {world_size} ranks at once"
    return [
        f"faults stop {everybody}, so that none is left to notice.\n  Leave one rank alone, or start more."
        for victims in stopped.values()
        if len(victims) == world_size
    ]


def _no_node_left(planned: Sequence[PlannedFault], nodes: int | None) -> list[str]:
    kinds = [fault.kind.name for fault in planned]
    left, joined = kinds.count("node_leaves"), kinds.count("node_joins")
    if nodes is None or left < nodes + joined:
        return []
    return [f"faults take {left} nodes out for good, and the job has {nodes}.\n  Leave one node to go on."]


def _contradictions(planned: Sequence[PlannedFault]) -> list[str]:
    """Two faults that want the same rank at the same moment: only the first could ever be seen to act."""
    problems = []
    inside = [fault for fault in planned if not fault.by_nemesis]
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


def log_path(run: Path) -> Path:
    return events.events_directory(run) / "faults.jsonl"


def fired(run: Path) -> list[Entry]:
    """What has fired so far, in order."""
    return [entry for entry in events.read_file(log_path(run)) if isinstance(entry.event, FaultFired)]


def not_fired(planned: Iterable[PlannedFault], entries: Iterable[Entry]) -> list[PlannedFault]:
    """Of a plan, what nobody has made yet."""
    seen = {entry.event.index for entry in entries if isinstance(entry.event, FaultFired)}
    return [fault for fault in planned if fault.index not in seen]


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
