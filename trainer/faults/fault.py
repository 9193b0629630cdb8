"""The base class of every kind of fault, and the registry of kinds.

A kind is a class with everything about it: what it imitates, where it strikes, its settings, what it needs and refuses,
how it fires, and how the run must answer. It fires in one of two ways: inside a rank at a phase of its work (`fire`,
called by the injector), or from outside, beside torchrun, when the event log has reached a step or after some seconds
(`fire_from_outside`, called by the nemesis). To add a kind, write a subclass that says what it `imitates`.

Importing this module imports no torch: campaigns are planned without. What needs torch is imported where it fires.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from trainer.config import Config, FaultEntry
from trainer.islands.schedule import Schedule
from trainer.phases import Phase

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.faults.nemesis import Outside
    from trainer.faults.plan import PlannedFault
    from trainer.faults.rank import RankContext
    from trainer.launch.cluster import Agents

# Phases at which a fault can strike, in groups.
GRADIENT = (
    Phase.BEFORE_FORWARD, Phase.IN_FORWARD, Phase.BEFORE_BACKWARD, Phase.IN_BACKWARD, Phase.BEFORE_REDUCE,
    Phase.IN_REDUCE,
)  # fmt: skip
UPDATE = (Phase.AFTER_REDUCE, Phase.BEFORE_UPDATE, Phase.IN_UPDATE, Phase.AFTER_UPDATE)
SAVE = (Phase.IN_SAVE_SHARD, Phase.BEFORE_COMMIT, Phase.AFTER_COMMIT)
AROUND_SAVE = (Phase.WAITING_FOR_SAVE, Phase.AFTER_SAVE)
STEP = (*GRADIENT, *UPDATE)
IN_QUORUM = (Phase.JOINING, Phase.IN_TRANSFER)
"""Phases that are passed in quorum mode alone."""
IN_ISLANDS = (Phase.IN_SEND, Phase.IN_RECEIVE, Phase.IN_OUTER_UPDATE)
"""Phases that are passed with islands alone."""
NOT_DRAWN = (*AROUND_SAVE, *IN_QUORUM, *IN_ISLANDS, Phase.WIDENED)
"""Phases that a storm does not draw, since not every step and rank has them: a kind or a person must ask for them."""
ANYWHERE = (
    *STEP, *SAVE, Phase.STARTUP, Phase.IN_LOAD, Phase.IN_EVAL, Phase.BEFORE_END, Phase.AFTER_END, *NOT_DRAWN,
)  # fmt: skip
WITHOUT_STEP = (Phase.STARTUP, Phase.JOINING, Phase.IN_LOAD, Phase.BEFORE_END, Phase.AFTER_END)
AFTER_THE_UPDATE = (*IN_ISLANDS, Phase.AFTER_UPDATE, Phase.IN_EVAL, *SAVE, *AROUND_SAVE)
"""Phases at which the rank already counts the step as completed."""
OF_MAIN_MEMBER = (*SAVE, *AROUND_SAVE, Phase.BEFORE_END, Phase.AFTER_END)
"""Phases that in quorum mode the main member alone passes: whoever that is by then."""

OF_FIRST_CLUSTER = (Phase.IN_EVAL, *SAVE, *AROUND_SAVE)
"""Phases that the first one alone passes of clusters of islands that live apart."""

# Needs of a kind: of the machine or of the job. A campaign probes, and skips kinds whose needs are not met.
LINUX, NAMESPACES, NODES, SHAPING, SPARES = (
    "Linux",
    "network namespaces (as root, or where the system lets users make user namespaces)",
    "two nodes",
    "traffic shaping (tc netem)",
    "a spare worker",
)


@dataclass(frozen=True)
class Setting:
    """A setting that a kind has beside those of every fault."""

    default: float | int | str
    meaning: str
    least: float = 0
    most: float = math.inf
    zero: bool = False  # True if 0 is a value with an effect
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str:
        """Return what is wrong with a value from a config, and the remedy on a second line; empty if nothing is."""
        remedy = f".\n  It is {self.meaning}."
        if isinstance(self.default, str):
            return "" if value in self.choices else f"is none of its values.\n  Give {' or '.join(self.choices)}."
        if isinstance(value, bool) or not isinstance(value, int if isinstance(self.default, int) else int | float):
            return f"is no number{remedy}"
        if not math.isfinite(value):
            return f"is not finite{remedy}"
        if not self.least <= value <= self.most:
            return (f"is below {self.least:g}" if value < self.least else f"is above {self.most:g}") + remedy
        # A fault that does nothing would pass every check.
        return f"makes no fault{remedy}" if value == 0 and not self.zero else ""


class Fault:
    """A kind of fault. Instances have no state: the settings of one fault of a config are in its `PlannedFault`."""

    name: ClassVar[str]  # name in configs. By default that of the class: TruncatedShard is truncated_shard.
    group: ClassVar[Literal["process", "time", "network", "storage", "numbers", "membership", "clock", "quorum"]]
    imitates: ClassVar[str]  # the failure in the field that it imitates
    made: ClassVar[str]  # the way it is made here
    detected: ClassVar[str]
    recovered: ClassVar[str]

    phases: ClassVar[tuple[Phase, ...]] = ()
    """Phases at which it strikes inside a rank, the usual first. Empty if it comes from outside."""
    settings: ClassVar[Mapping[str, Setting]] = {}
    needs: ClassVar[tuple[str, ...]] = ()
    sets: ClassVar[Mapping[str, Any]] = {}
    """Settings without which it cannot be made, as a config has them: a campaign's catalogue and pairs set them. None
    of them is part of the fingerprint."""
    signal_number: ClassVar[int] = 0
    """The signal that makes it, or 0. Such a kind can also come from outside, at a wall time."""

    expected_incidents: ClassVar[tuple[str, ...]] = ()
    """Kinds of incident (log/incidents.py), one of which the run must report. Empty: it passes without an incident."""
    may_cause: ClassVar[tuple[str, ...]] = ()  # further kinds of incident that it may cause; they are no false alarms
    names_rank: ClassVar[bool] = True  # True if the incident must name the rank that was hit
    exits: ClassVar[tuple[int, ...]] = (0,)
    """Exit statuses of the job that it explains. After any but 0 the same command is given again."""
    silent: ClassVar[bool] = False
    """True if no check of this run notices it (see `watched`). Unequal weights at the end then count as undetected."""
    detect_seconds: ClassVar[float] = 10.0
    """Bound from firing to detection: the processes end, or the log reports it. The machine may be shared."""
    recover_seconds: ClassVar[float] = 30.0  # bound from firing to the next step that had never been computed

    # Traits that planning, firing and checking ask for.
    on_rank: ClassVar[bool] = True  # False if it hits a node, a link or the store
    hits_agent: ClassVar[bool] = False  # True if it hits the launcher of the rank, and not the rank itself
    needs_store: ClassVar[bool] = False  # True if the rendezvous store must be a process of its own
    needs_peers: ClassVar[bool] = False  # True if another rank must be left that waits and notices
    stops_rank: ClassVar[bool] = False
    """True if the rank stays stopped: if all ranks are stopped at once, none is left to notice."""
    again_at: ClassVar[tuple[Phase, ...]] = ()
    """Phases at which it fires again in the next starts, `times` times in all. Empty: it fires once."""
    again_on_main: ClassVar[bool] = False  # True if it fires again on the main member, and not on the successor
    neighbours: ClassVar[int] = 0  # further ranks that it hits in the same step: those after the one that is named
    damages_checkpoints: ClassVar[bool] = False
    damages_files: ClassVar[bool] = False
    """True if it can be made from outside in any job whose checkpoint files the campaign names."""
    damages_tokens: ClassVar[bool] = False  # True if it writes to the token store, which other runs may share
    moves_clock: ClassVar[bool] = False  # True if the run's own times cannot be trusted afterwards
    links: ClassVar[int] = 1  # links that each host must have
    unnoticed: ClassVar[bool] = False
    """True if the run must report no incident at all. Other kinds from outside may cause any."""
    node_balance: ClassVar[int] = 0  # nodes that join (1) or leave (-1) permanently
    not_in: ClassVar[Mapping[str, str]] = {}
    """{elastic.mode: the reason why it cannot be made there}."""
    in_quorum_mode: ClassVar[Mapping[str, Any]] = {}
    """Fields that have other values in quorum mode, where a death ends nobody else: `expected_incidents`, `exits`, …"""

    over_mptcp: ClassVar[Mapping[str, Any]] = {}
    """Fields that have other values where the job's connections are of Multipath TCP."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "imitates" in cls.__dict__:  # not a base of several kinds
            cls.name = cls.__dict__.get("name") or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
            KINDS[cls.name] = cls()

    @property
    def from_outside(self) -> bool:
        """True if no rank can make it itself."""
        return not self.phases

    @property
    def hits_any_job(self) -> bool:
        """True if it can be made from outside in any job, whatever program its ranks run."""
        return "restart" not in self.not_in and (self.from_outside or bool(self.signal_number) or self.damages_files)

    @property
    def repeats(self) -> bool:
        return bool(self.again_at)

    def writer_only(self, phase: str) -> bool:
        """True if only rank 0, which commits checkpoints, can be hit at this phase."""
        return False

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        """The reason why this entry of a config can never fire, and the remedy on a second line; empty if it can."""
        return ""

    def usual_step(self, every: int, steps: int) -> int:
        """A step at which it strikes for sure, in a run of `steps` steps with a checkpoint `every` so many."""
        return min(3 if self.from_outside else every // 2 + every, steps)

    def watched(self, world_size: int) -> "Fault":
        """This kind as it shows in a run with a sentinel."""
        return self

    def over(self, transport: str) -> "Fault":
        """This kind as it shows where the job's connections are "tcp" or "mptcp"."""
        if transport != "mptcp" or not self.over_mptcp:
            return self
        kind = copy.copy(self)
        vars(kind).update(self.over_mptcp)
        return kind

    def in_quorum(self, phase: str) -> "Fault":
        """This kind as it shows in quorum mode, at a phase of a rank or, if that is empty, from outside."""
        changes = dict(self.in_quorum_mode)
        # Nobody counts on a worker that has not met the others yet, and after the end there is nothing to go on with.
        if phase in (Phase.STARTUP, Phase.AFTER_END):
            changes |= {"expected_incidents": (), "may_cause": (*self.may_cause, *self.expected_incidents)}
        kind = copy.copy(self)
        vars(kind).update(changes)
        return kind

    def in_clusters_apart(self) -> "Fault":
        """This kind as it shows where clusters of islands live apart: the launcher ends a rank that stays stopped."""
        if not self.stops_rank:
            return self
        kind = copy.copy(self)
        vars(kind).update(expected_incidents=("worker_lost",))
        return kind

    # Firing. `planned` is the fault of the config, `rank` and `outside` what it can act on.

    def obstacle(self, planned: "PlannedFault", rank: "RankContext") -> str:
        """The reason why it cannot fire in this rank now; empty if it can. May wait until it can."""
        return ""

    def fire(self, planned: "PlannedFault", rank: "RankContext") -> None:
        """Act inside the rank. It is already on record."""
        raise NotImplementedError(f"{self.name} does not fire inside a rank")

    def change(self, planned: "PlannedFault", rank: "RankContext", tensor: "Tensor") -> "Tensor":
        """Fire where the rank computes `tensor`, in_forward or in_backward; returns the tensor to continue with."""
        self.fire(planned, rank)
        return tensor

    def obstacle_outside(self, planned: "PlannedFault", cluster: "Agents") -> str:
        """The reason why it cannot be made on this cluster; empty if it can."""
        if NAMESPACES in self.needs and cluster.hosts is None:
            return "its nodes are not on hosts of their own"
        if cluster.hosts is not None and cluster.hosts.links < self.links:
            return f"its hosts have fewer than {self.links} links"
        if self.needs_store and cluster.store is None:
            return "its rendezvous store is no process of its own"
        return ""

    def fire_from_outside(self, planned: "PlannedFault", outside: "Outside", victims: Mapping[int, int]) -> None:
        """Act from outside, in a thread of its own, and undo what lasts. `victims` are {rank: pid}.

        Raises OSError or ValueError where it could not be made or undone.
        """
        raise NotImplementedError(f"{self.name} does not fire from outside")


class Harmless(Fault):
    """A kind that may delay the run and must not be taken for a failure."""

    detected = "no fault: slow is not hung"
    recovered = "automatically"
    expected_incidents = ()


KINDS: dict[str, Fault] = {}
"""The catalogue: every kind by name, in the order of the modules that trainer/faults/__init__.py imports."""


def interval(phase: str, config: Config) -> tuple[int, str]:
    """(n, setting) for a phase that comes every n steps by that setting, and at the last step. 0: only at the last."""
    if phase in (*SAVE, *AROUND_SAVE):
        return config.checkpoint.every_steps, "checkpoint.every_steps"
    if phase == Phase.IN_EVAL:
        return config.eval.every_steps, "eval.every_steps"
    if phase in IN_ISLANDS:
        return config.islands.inner_steps, "islands.inner_steps"
    return 1, ""


def comes_at(phase: str, step: int, config: Config) -> bool:
    """True if a phase is passed in a step."""
    if phase in IN_ISLANDS:
        schedule = Schedule.of(config)
        if phase == Phase.IN_SEND or not schedule.overlap_steps:
            return bool(schedule.sent(step))
        return step == config.budget.steps or bool(schedule.arriving(step))
    every, _ = interval(phase, config)
    return step == config.budget.steps or (every > 0 and step % every == 0)
