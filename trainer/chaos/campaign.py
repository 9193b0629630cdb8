"""Campaign files: what is to be run, read and planned as a whole before anything starts."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from trainer import config as configs
from trainer import tomlfile
from trainer.chaos import storm
from trainer.chaos.results import Outcome, Result
from trainer.chaos.storm import Table
from trainer.config import Config, Section
from trainer.errors import ConfigError
from trainer.faults import plan
from trainer.faults.kinds import KINDS, NODES, Kind
from trainer.faults.plan import Planned

Strategy = Literal["replicate", "fsdp", "hybrid"]


class Run(Section):
    """One cell that is written out."""

    name: str = ""
    ranks: int = Field(default=0, ge=0)
    """0: as the campaign."""
    nodes: int = Field(default=0, ge=0)
    strategy: Strategy | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides of this run alone; none that decides the weights, or there would be nothing to compare with."""
    faults: list[dict[str, Any]] = Field(default_factory=list)


class Catalogue(Section):
    """Every kind once, each in a run of its own, at a moment that suits it."""

    kinds: list[str] | Literal["all"] = "all"


class Pairs(Section):
    """Two kinds at once, so many pairs drawn from all of them."""

    sample: int = Field(default=10, ge=1)
    kinds: list[str] | Literal["all"] = "all"
    """"all": those that need no second node."""


class Storm(Section):
    """Random schedules, one run for each seed."""

    mix: str | dict[str, float] = "process"
    seeds: list[int] = Field(default=[0], min_length=1)
    faults: int = Field(default=10, ge=1)
    """At most so many in a run."""
    mean_steps: float = Field(default=5.0, gt=0)
    """Between two faults. In steps, and not in seconds: so a schedule can be replayed exactly."""


class CampaignFile(Section):
    question: str = ""
    config: str
    """Path of the runs' config, relative to the campaign file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Overrides for all runs, the calm one too."""
    set_outside: dict[str, Any] = Field(default_factory=dict)
    """Overrides for runs with faults from outside, which must last long enough to be hit; none that decides the
    weights."""
    ranks: int = Field(default=2, ge=1)
    """Of all nodes together."""
    nodes: int = Field(default=1, ge=1)
    strategies: list[Strategy] = Field(default=["replicate"], min_length=1)
    repeat: int = Field(default=1, ge=1)
    seed: int = 0
    """Draws the pairs."""
    timeout_seconds: float = Field(default=300.0, gt=0)
    """For one start of a job."""
    restarts: int = Field(default=20, ge=0)
    """Of the workers in one start of a job, beyond two for each of its faults."""
    runs: list[Run] = Field(default_factory=list)
    catalogue: Catalogue | None = None
    pairs: Pairs | None = None
    storm: Storm | None = None


@dataclass(frozen=True)
class Cell:
    """One run of the campaign, planned and checked."""

    name: str
    ranks: int
    nodes: int
    strategy: str
    seed: int | None
    repeat: int
    overrides: list[str]
    """key=value, without faults."""
    faults: list[Table]
    config: Config
    planned: list[Planned]
    worker: tuple[str, ...] = ("trainer", "train")
    """The module that each rank runs, with its first arguments."""

    @property
    def slug(self) -> str:
        identity = json.dumps([self.name, self.ranks, self.nodes, self.strategy, self.faults, self.overrides])
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name}-{self.strategy}".lower()).strip("-")[:60]
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}-{self.repeat}"

    def result(self, outcome: Outcome, why: str, **more: Any) -> Result:
        kinds = [fault.kind.name for fault in self.planned]
        trees = [plan.tree(fault) for fault in self.planned]
        shape = (self.ranks, self.nodes, self.strategy, self.seed, self.repeat)
        return Result(self.name, kinds, trees, *shape, outcome, why, **more)

    def is_of(self, result: Result) -> bool:
        """Whether a stored result answers this cell."""
        mine = self.result("skipped", "")
        keys = ("name", "faults", "ranks", "nodes", "strategy", "seed", "repeat")
        return all(getattr(mine, key) == getattr(result, key) for key in keys)


@dataclass(frozen=True)
class Campaign:
    name: str
    path: Path
    question: str
    config_path: Path
    config: Config
    """Of the calm run."""
    overrides: list[str]
    timeout_seconds: float
    restarts: int
    cells: list[Cell] = field(default_factory=list)


# Reading and planning


def load(path: Path, only: Sequence[str] = (), repeat: int | None = None) -> Campaign:
    """Read a campaign file and plan all its runs. Raises ConfigError naming every problem of file and plans."""
    file = tomlfile.read_as(path, CampaignFile, "campaign")
    config_path = path.parent / file.config
    overrides = [*_pairs(file.set), 'wandb.mode="disabled"']
    config = configs.load(config_path, overrides)
    if config.faults:
        raise ConfigError(
            [f"{config_path} has faults of its own, so there is no calm run to compare with.\n  Move them to {path}."]
        )
    limits = (file.timeout_seconds, file.restarts)
    campaign = Campaign(path.stem, path, file.question, config_path, config, overrides, *limits)
    planner = _Planner(campaign, file)
    planner.plan_all()
    cells = [cell for cell in planner.cells if not only or cell.name in only]
    unknown = [name for name in only if name not in {cell.name for cell in planner.cells}]
    problems = planner.problems + [_no_such_run(name, planner.cells) for name in unknown]
    if not planner.cells and not problems:
        problems.append(f"{path} has no runs.\n  Add [[runs]], [catalogue], [pairs] or [storm].")
    if problems:
        raise ConfigError(problems)
    for number in range(repeat or file.repeat):
        campaign.cells.extend(_repeated(cell, number) for cell in cells)
    return campaign


def _repeated(cell: Cell, number: int) -> Cell:
    return replace(cell, repeat=number)


def _no_such_run(name: str, cells: Sequence[Cell]) -> str:
    names = list(dict.fromkeys(cell.name for cell in cells))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(names[:60])}."
    return f"--only {name!r} is no run of this campaign.\n  {hint}"


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key}={tomlfile.text(value)}" for key, value in configs.flatten(table).items()]


class _Planner:
    """Cells of a campaign file; problems are collected, not raised."""

    def __init__(self, campaign: Campaign, file: CampaignFile) -> None:
        self._campaign, self._file = campaign, file
        self.cells: list[Cell] = []
        self.problems: list[str] = []

    def plan_all(self) -> None:
        file = self._file
        for number, run in enumerate(file.runs):
            name = run.name or _name_of(run.faults) or f"run {number}"
            shape = (run.ranks or file.ranks, run.nodes or file.nodes)
            for strategy in [run.strategy] if run.strategy else file.strategies:
                self._add(name, run.faults, *shape, strategy, run.set)
        for strategy in file.strategies:
            self._plan_catalogue(strategy)
            self._plan_pairs(strategy)
            self._plan_storms(strategy)
        seen: dict[tuple[str, str], int] = {}
        for cell in self.cells:
            seen[cell.name, cell.strategy] = seen.get((cell.name, cell.strategy), 0) + 1
        for (name, strategy), times in seen.items():
            if times > 1:
                self.problems.append(f"{times} runs are called {name!r} ({strategy}).\n  Give each a name of its own.")

    def _plan_catalogue(self, strategy: str) -> None:
        if self._file.catalogue is None:
            return
        for number, kind in enumerate(self._kinds("catalogue", self._file.catalogue.kinds, list(KINDS))):
            nodes = self._nodes_for(kind)
            ranks = max(self._file.ranks, nodes)
            self._add(kind.name, [storm.usual(kind, self._campaign.config, ranks, number)], ranks, nodes, strategy)

    def _plan_pairs(self, strategy: str) -> None:
        if self._file.pairs is None:
            return
        ordinary = [kind.name for kind in KINDS.values() if NODES not in kind.needs]
        kinds = self._kinds("pairs", self._file.pairs.kinds, ordinary)
        ranks = self._file.ranks
        for one, other in storm.sample_pairs(kinds, self._file.pairs.sample, self._file.seed):
            nodes = max(self._nodes_for(one), self._nodes_for(other))
            faults = storm.pair(one, other, self._campaign.config, max(ranks, nodes))
            self._add(f"pair: {one.name} + {other.name}", faults, max(ranks, nodes), nodes, strategy)

    def _plan_storms(self, strategy: str) -> None:
        drawn, file = self._file.storm, self._file
        if drawn is None:
            return
        try:
            mix = storm.weights(drawn.mix, file.nodes)
        except ConfigError as error:
            self.problems += error.problems
            return
        kinds = self._kinds("storm.mix", list(mix), [])
        if len(kinds) < len(mix) or not kinds:
            return
        name = drawn.mix if isinstance(drawn.mix, str) else "own"
        for seed in drawn.seeds:
            faults = storm.draw(
                mix, seed, faults=drawn.faults, mean_steps=drawn.mean_steps, config=self._campaign.config,
                world_size=file.ranks,
            )  # fmt: skip
            self._add(f"storm {name} seed {seed}", faults, file.ranks, file.nodes, strategy, seed=seed)

    def _kinds(self, where: str, wanted: list[str] | str, every: list[str]) -> list[Kind]:
        names = every if isinstance(wanted, str) else wanted
        for name in names:
            if name not in KINDS:
                near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(KINDS)}."
                self.problems.append(f"{where}: {name!r} is no kind of fault.\n  {hint}")
        return [KINDS[name] for name in names if name in KINDS]

    def _nodes_for(self, kind: Kind) -> int:
        return max(self._file.nodes, 2 if NODES in kind.needs else 1)

    def _add(
        self, name: str, faults: list[Table], ranks: int, nodes: int, strategy: str,
        own: Mapping[str, Any] | None = None, seed: int | None = None,
    ) -> None:  # fmt: skip
        campaign = self._campaign
        overrides = [*campaign.overrides, f"parallel.strategy={tomlfile.text(strategy)}"]
        if _from_outside(faults):
            overrides += _pairs(self._file.set_outside)
        overrides += _pairs(own or {})
        try:
            config = configs.load(campaign.config_path, [*overrides, f"faults={tomlfile.text(faults)}"])
            configs.check_world(config, ranks)
            self._check(name, config, ranks, nodes)
            planned = plan.make(config, ranks)
            self.cells.append(Cell(name, ranks, nodes, strategy, seed, 0, overrides, faults, config, planned))
        except ConfigError as error:
            self.problems += [f"{name}: {problem}" for problem in error.problems]

    def _check(self, name: str, config: Config, ranks: int, nodes: int) -> None:
        problems = []
        if ranks % nodes:
            problems.append(f"{ranks} ranks cannot be spread evenly over {nodes} nodes.\n  Give a multiple of nodes.")
        needy = [fault.kind for fault in config.faults if NODES in getattr(KINDS.get(fault.kind), "needs", ())]
        if needy and nodes < 2:
            problems.append(f"{', '.join(needy)} need two nodes.\n  Set nodes = 2.")
        if configs.fingerprint(config) != configs.fingerprint(self._campaign.config):
            old, new = configs.mathematics(self._campaign.config), configs.mathematics(config)
            changes = "; ".join(configs.differences(old, new))
            problems.append(
                f"it has other weights than the calm run ({changes}), so there is nothing to compare with.\n"
                "  Move these overrides to the campaign's own `set`."
            )
        if problems:
            raise ConfigError(problems)


def _name_of(faults: Sequence[Table]) -> str:
    return " + ".join(str(fault.get("kind", "?")) for fault in faults)


def _from_outside(faults: Sequence[Table]) -> bool:
    kinds = [(KINDS.get(str(fault.get("kind"))), fault) for fault in faults]
    return any("at_seconds" in fault or (kind is not None and kind.hand == "nemesis") for kind, fault in kinds)


def check_exact(campaign: Campaign) -> str | None:
    """What a person should know before such a campaign runs."""
    if campaign.config.numerics.exact:
        return None
    return (
        "numerics.exact = false: sums then depend on how many ranks add them, so no run can be expected to equal the "
        "calm one. That invariant will be answered with unknown."
    )
