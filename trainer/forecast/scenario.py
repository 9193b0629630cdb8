"""A scenario: a cluster, what fails in it, and how the job answers. TOML, read strictly; all problems at once."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from trainer import tomlfile
from trainer.config import Section
from trainer.errors import ConfigError

DAY = 86_400.0


class Cluster(Section):
    devices: int = Field(ge=1)
    """Devices that the job computes with."""
    devices_per_node: int = Field(default=8, ge=1)
    nodes_per_rack: int = Field(default=4, ge=1)
    racks_per_pod: int = Field(default=32, ge=1)
    spare_nodes: int = Field(default=0, ge=0)
    """Nodes beyond those of the job. They fail like the others, and replace one that is out for repair."""
    min_share: float = Field(default=1.0, gt=0, le=1)
    """The job computes, more slowly, as long as this share of its nodes is healthy; below it, it waits for a repair."""

    @property
    def nodes(self) -> int:
        return math.ceil(self.devices / self.devices_per_node)

    def nodes_of(self, unit: str) -> int:
        """Number of nodes that a unit of this sort has. A device counts as its node: schedulers drain whole nodes."""
        rack = self.nodes_per_rack
        return {"device": 1, "node": 1, "rack": rack, "pod": rack * self.racks_per_pod, "job": self.nodes}[unit]


class Failure(Section):
    """One cause of failure."""

    name: str
    per_node_day: float | None = Field(default=None, ge=0)
    """Mean failures per node and day. Give this, or `per_day`."""
    per_day: float | None = Field(default=None, ge=0)
    """Mean failures of the whole cluster per day, whatever its size."""
    takes: Literal["device", "node", "rack", "pod", "job"] = "node"
    """Unit that goes down as a whole. "job" takes no node out of service: all workers start again."""
    detect_seconds: float = Field(ge=0)
    """From the failure until the job knows of it; it makes no progress meanwhile."""
    repair_hours: float = Field(default=0.0, ge=0)
    """Mean time until what went down serves again, exponential; 0: at once."""
    shape: float = Field(default=1.0, gt=0)
    """Weibull shape of the time to failure of one unit: below 1 young units fail more, 1 is exponential."""
    lemon_variance: float = Field(default=0.0, ge=0)
    """Variance over units of their failure rate relative to its mean (gamma distributed); 0: all alike."""
    silent_hours: float | None = Field(default=None, ge=0)
    """Set for silent corruption: mean time until it is noticed, exponential. The job then loads the newest state from
    before it."""


class Maintenance(Section):
    """Planned stops of the whole job; it saves before them."""

    every_days: float = Field(gt=0)
    hours: float = Field(gt=0)


class _Saving(Section):
    checkpoint_every_seconds: float | Literal["optimal"] = "optimal"
    """Work between two saves. "optimal": Daly's estimate for the scenario's mean time between failures."""
    save_stall_seconds: float = Field(ge=0)
    """Time that the loop waits for a save."""
    save_write_seconds: float = Field(default=0.0, ge=0)
    """Time beside training until a save is durable. Storage bandwidth adds to it."""
    restart_seconds: float = Field(ge=0)
    """From the detection of a failure, with enough nodes, to the first new step: relaunch, load, warm up."""


class Restart(_Saving):
    """Every failure stops all; the job loads the newest durable checkpoint. As torchrun with elastic restarts."""

    kind: Literal["restart"]


class PeerMemory(_Saving):
    """Every failure stops all; the state comes from the memory of a peer unless its holders went down together."""

    kind: Literal["peer_memory"]
    copy_every_steps: int = Field(ge=1)
    copy_cost: float = Field(ge=0, lt=1)
    """Share of a step's time that the copies cost."""


class Quorum(_Saving):
    """Survivors complete the step with the dead node's micro-batches; a "job" failure or too few nodes restart all."""

    kind: Literal["quorum"]
    regroup_seconds: float = Field(ge=0)
    """From the detection to the continued step: new process group, members agreed, lost micro-batches computed."""
    join_seconds: float = Field(ge=0)
    """Stall of the others when a repaired node or a spare joins."""
    start_seconds: float = Field(default=0.0, ge=0)
    """From a death until another worker is ready to take the place; the others go on meanwhile. 0: hot spares."""
    speed_without_one: float | None = Field(default=None, gt=0, le=1)
    """Speed of a job that misses one node, as a share of the full speed; of two, its square. None: the
    share of the nodes that are left."""


class Islands(_Saving):
    """Semi-synchronous clusters: each takes `inner_steps` alone, then they exchange. A failure stops its cluster."""

    kind: Literal["islands"]
    clusters: int = Field(ge=2)
    inner_steps: int = Field(ge=1)
    exchange_seconds: float = Field(ge=0)
    """Part of the exchange that computation does not hide, per round."""
    late: Literal["wait", "drop"]
    """A late cluster is waited for; or up to `may_miss` of them are left out of a round, and their round is lost."""
    may_miss: int = Field(default=1, ge=1)
    quorum: bool = False
    """Inside a cluster, survivors complete the step (`regroup_seconds`); else the cluster restarts."""
    regroup_seconds: float = Field(default=0.0, ge=0)


Policy = Annotated[Restart | PeerMemory | Quorum | Islands, Field(discriminator="kind")]


class Storage(Section):
    checkpoint_bytes: float = Field(gt=0)
    bytes_per_second: float = Field(gt=0)
    """Bandwidth of the storage, shared by all writers and readers."""


class Published(Section):
    """A figure from a source, to hold the simulation against."""

    source: str
    figure: str
    """In words, with its unit."""
    goodput: list[float] | None = Field(default=None, min_length=2, max_length=2)
    """The published range of productive over wall time."""
    mttf_hours: float | None = Field(default=None, gt=0)
    """The published mean time to failure of the whole job."""
    why: str = ""
    """Reason why simulation and source disagree, if it is known."""


class Scenario(Section):
    question: str = ""
    seed: int = Field(default=0, ge=0)
    replicates: int = Field(default=20, ge=2)
    days: float = Field(gt=0)
    step_seconds: float = Field(gt=0)
    """One step at full size."""
    cluster: Cluster
    failure: list[Failure] = Field(min_length=1)
    maintenance: Maintenance | None = None
    storage: Storage | None = None
    policy: Policy
    vary: dict[str, list[float]] = Field(default_factory=dict)
    """{setting: [low, high]}: drawn anew for each replicate, uniform in the logarithm. For what a source leaves open.
    A failure's setting is written failure.NAME.setting."""
    published: Published | None = None

    def rate(self, failure: Failure) -> float:
        """Failures of this cause in the whole cluster per second, spares included."""
        nodes = self.cluster.nodes + self.cluster.spare_nodes
        return (failure.per_day if failure.per_day is not None else (failure.per_node_day or 0.0) * nodes) / DAY

    @property
    def mttf_seconds(self) -> float:
        """Mean time between failures that stop the job's progress, all causes together."""
        return 1 / math.fsum(self.rate(failure) for failure in self.failure)


def load(path: Path) -> Scenario:
    """Read a scenario. Raises ConfigError with all problems."""
    tree = tomlfile.read_extended(path)
    return parse(tree, path)


def parse(tree: dict[str, Any], path: Path) -> Scenario:
    """Return a tree of settings as a scenario. Raises ConfigError with all problems; `path` is for their text."""
    try:
        scenario = Scenario.model_validate(tree)
    except ValidationError as error:
        found = tomlfile.mistakes(error, tree)
        raise ConfigError([f"{path}: {tomlfile.explain(mistake, Scenario, 'scenario')}" for mistake in found]) from None
    if problems := [f"{path}: {problem}" for problem in _contradictions(scenario)]:
        raise ConfigError(problems)
    return scenario


def with_values(scenario: Scenario, values: dict[str, float]) -> Scenario:
    """Return the scenario with other values of some settings, by their dotted names. Raises KeyError for no setting."""
    tree = scenario.model_dump()
    for name, value in values.items():
        node: Any = tree
        *sections, last = name.split(".")
        for section in sections:
            node = next(item for item in node if item["name"] == section) if isinstance(node, list) else node[section]
        if last not in node:
            raise KeyError(name)
        node[last] = round(value) if isinstance(node[last], int) and not isinstance(node[last], bool) else value
    return Scenario.model_validate(tree)


def findings(scenario: Scenario) -> list[str]:
    """Return what a reader should know before believing the result: nothing here is an error."""
    policy, found = scenario.policy, []
    write = write_seconds(scenario)
    every = policy.checkpoint_every_seconds
    if isinstance(every, float) and write > every:
        found.append(
            f"A save takes {write:.0f} s and is due every {every:.0f} s: saves run back to back, "
            "each begins when the one before it is durable."
        )
    if policy.restart_seconds > scenario.mttf_seconds and policy.kind in ("restart", "peer_memory"):
        found.append(
            f"The mean time between failures, {scenario.mttf_seconds:.0f} s, is shorter than a restart, "
            f"{policy.restart_seconds:.0f} s: most restarts are struck before they are done."
        )
    return found


def write_seconds(scenario: Scenario) -> float:
    """Time beside training until a save is durable."""
    storage = scenario.storage
    return scenario.policy.save_write_seconds + (storage.checkpoint_bytes / storage.bytes_per_second if storage else 0)


def load_seconds(scenario: Scenario) -> float:
    """Time that reading a checkpoint adds to a restart."""
    return scenario.storage.checkpoint_bytes / scenario.storage.bytes_per_second if scenario.storage else 0.0


def daly_interval(stall: float, mttf: float) -> float:
    """Work between two saves that minimises the expected time, in seconds (Daly 2006, higher-order estimate).

    `stall`: time a save takes from the job; `mttf`: mean time between failures, both in seconds.
    """
    if stall >= 2 * mttf:
        return mttf
    part = stall / (2 * mttf)
    return math.sqrt(2 * stall * mttf) * (1 + math.sqrt(part) / 3 + part / 9) - stall


def daly_goodput(interval: float, stall: float, recovery: float, mttf: float) -> float:
    """Productive over wall time with blocking saves and exponential failures, which strike recoveries too (Daly 2006).

    `interval`: work between two saves; `stall`: a save; `recovery`: detection and restart; `mttf`: all in seconds.
    """
    expected = mttf * math.exp(recovery / mttf) * math.expm1((interval + stall) / mttf)
    return interval / expected


def save_interval(scenario: Scenario) -> float:
    """Work between two saves in seconds; never shorter than a save takes to become durable, nor than a step."""
    every, stall = scenario.policy.checkpoint_every_seconds, scenario.policy.save_stall_seconds
    # Of islands, a failure stops one cluster.
    mttf = scenario.mttf_seconds * (scenario.policy.clusters if scenario.policy.kind == "islands" else 1)
    wanted = daly_interval(stall, mttf) if every == "optimal" else every
    return max(wanted, write_seconds(scenario), scenario.step_seconds)


def _contradictions(scenario: Scenario) -> list[str]:
    cluster, policy, problems = scenario.cluster, scenario.policy, []
    names = [failure.name for failure in scenario.failure]
    if len(set(names)) < len(names):
        problems.append("two [[failure]] tables have the same name.\n  Each cause has a name of its own.")
    for failure in scenario.failure:
        if (failure.per_node_day is None) == (failure.per_day is None):
            problems.append(
                f"failure {failure.name!r} needs exactly one rate.\n"
                "  Give per_node_day (grows with the cluster) or per_day (does not)."
            )
    if not problems and not any(scenario.rate(failure) > 0 for failure in scenario.failure):
        problems.append("all failure rates are 0.\n  Give at least one cause a rate above 0, or there is no forecast.")
    if cluster.spare_nodes > cluster.nodes:
        problems.append(
            f"cluster.spare_nodes = {cluster.spare_nodes}, but the job has {cluster.nodes} nodes.\n"
            "  More spares than nodes are a second cluster: raise cluster.devices or lower the spares."
        )
    if policy.kind == "islands":
        if policy.clusters > cluster.nodes:
            problems.append(
                f"policy.clusters = {policy.clusters}, but there are {cluster.nodes} nodes.\n"
                f"  A cluster has at least one node: use at most {cluster.nodes}."
            )
        if policy.may_miss >= policy.clusters:
            problems.append(
                f"policy.may_miss = {policy.may_miss} of {policy.clusters} clusters leaves none.\n"
                f"  Use at most {policy.clusters - 1}."
            )
    for name, bounds in scenario.vary.items():
        if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
            problems.append(f"vary.{name} = {bounds} is no range.\n  Give [low, high] with 0 < low ≤ high.")
            continue
        try:
            for bound in bounds:
                with_values(scenario, {name: bound})
        except (KeyError, StopIteration, TypeError):
            problems.append(
                f"vary.{name}: the scenario has no such setting.\n"
                "  Name one that it sets, e.g. policy.restart_seconds or failure.NAME.detect_seconds."
            )
        except ValidationError as error:
            problems.append(f"vary.{name} = {bounds}: {error.errors()[0]['msg']}.\n  Give a range of valid values.")
    return problems
