"""Campaigns: what is to be run, planned as a whole before anything starts."""

import contextlib
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import tomlfile
from trainer.chaos import schedule
from trainer.chaos.results import Outcome, Result
from trainer.chaos.schedule import Table
from trainer.chaos.schema import CampaignFile, read
from trainer.config import Config, FaultEntry
from trainer.errors import ConfigError
from trainer.faults import plan
from trainer.faults.fault import KINDS, NODES, Fault
from trainer.faults.plan import PlannedFault


@dataclass(frozen=True)
class Case:
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
    planned: list[PlannedFault]
    limits: dict[str, float]
    """timeout_seconds and restarts, by which a run may fail."""
    worker: tuple[str, ...] = ("trainer", "train")
    """The module that each rank runs, with its first arguments."""

    @property
    def slug(self) -> str:
        identity = json.dumps([self.name, self.ranks, self.nodes, self.strategy, self.faults, self.overrides])
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name}-{self.strategy}".lower()).strip("-")[:60]
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}-{self.repeat}"

    def make_result(self, outcome: Outcome, why: str, **more: Any) -> Result:
        kinds = [fault.kind.name for fault in self.planned]
        trees = [plan.tree(fault) for fault in self.planned]
        shape = (self.ranks, self.nodes, self.strategy, self.seed, self.repeat)
        given = {"overrides": self.overrides, "limits": self.limits}
        return Result(self.name, kinds, trees, *shape, outcome, why, **given, **more)

    def is_answered_by(self, result: Result) -> bool:
        """True if a stored result is the result of this case."""
        return self.repeat == result.repeat and self.is_same_run_as(result)

    def is_same_run_as(self, result: Result) -> bool:
        """True if a stored result came from the same run, whichever its repeat was."""
        mine = self.make_result("skipped", "")
        keys = ("name", "faults", "ranks", "nodes", "strategy", "seed", "overrides", "limits")
        return all(getattr(mine, key) == getattr(result, key) for key in keys)


@dataclass(frozen=True)
class Campaign:
    name: str
    path: Path
    question: str
    config_path: Path
    config: Config
    """Of the reference run."""
    overrides: list[str]
    timeout_seconds: float
    restarts: int
    cases: list[Case] = field(default_factory=list)
    """What is to be run."""
    every: list[Case] = field(default_factory=list)
    """All runs of the file, once each: also those that are not chosen now."""

    def restarts_for(self, faults: int) -> int:
        """How often the workers of a job with so many faults may be started again."""
        return self.restarts + 2 * faults


# Reading and planning


def load(path: Path, only: Sequence[str] = (), repeat: int | None = None) -> Campaign:
    """Read a campaign file and plan all its runs. Raises ConfigError naming every problem of file and plans."""
    file, problems = read(path)
    if file is None:
        raise ConfigError(problems)
    config_path = path.parent / file.config
    overrides = [*_pairs(file.set), 'wandb.mode="disabled"']
    config = None
    with _noting(problems):
        config = _reference_config(path, config_path, overrides)
    if config is None:
        raise ConfigError(problems)
    limits = (file.timeout_seconds, file.restarts)
    campaign = Campaign(path.stem, path, file.question, config_path, config, overrides, *limits)
    builder = _CaseBuilder(campaign, file)
    builder.build_all()
    cases = [case for case in builder.cases if not only or case.name in only]
    problems += builder.problems
    if not problems:  # else a run may be unknown only because it could not be planned
        unknown = [name for name in only if name not in {case.name for case in builder.cases}]
        problems += [_no_such_run(name, builder.cases) for name in unknown]
    if not builder.cases and not problems:
        problems.append(f"{path} has no runs.\n  Add [[runs]], [catalogue], [pairs] or [storm].")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    campaign.every.extend(builder.cases)
    for number in range(repeat or file.repeat):
        campaign.cases.extend(_repeated(case, number) for case in cases)
    return campaign


def _reference_config(path: Path, config_path: Path, overrides: Sequence[str]) -> Config:
    config = configs.load(config_path, overrides)
    if config.faults:
        problem = f"{config_path} has faults of its own, so there is no reference run to compare with."
        raise ConfigError([f"{problem}\n  Move them to {path}."])
    return config


@contextlib.contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """Go on after a ConfigError, so that what is wrong elsewhere is said too."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _repeated(case: Case, number: int) -> Case:
    return replace(case, repeat=number)


def _no_such_run(name: str, cases: Sequence[Case]) -> str:
    names = list(dict.fromkeys(case.name for case in cases))
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(names[:60])}."
    return f"--only {name!r} is no run of this campaign.\n  {hint}"


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{key}={tomlfile.text(value)}" for key, value in configs.flatten(table).items()]


class _CaseBuilder:
    """Cases of a campaign file; problems are collected, not raised."""

    def __init__(self, campaign: Campaign, file: CampaignFile) -> None:
        self._campaign, self._file = campaign, file
        self.cases: list[Case] = []
        self.problems: list[str] = []

    def build_all(self) -> None:
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
        for case in self.cases:
            seen[case.name, case.strategy] = seen.get((case.name, case.strategy), 0) + 1
        for (name, strategy), times in seen.items():
            if times > 1:
                self.problems.append(f"{times} runs are called {name!r} ({strategy}).\n  Give each a name of its own.")

    def _plan_catalogue(self, strategy: str) -> None:
        if self._file.catalogue is None:
            return
        for number, kind in enumerate(self._kinds("catalogue", self._file.catalogue.kinds, list(KINDS))):
            nodes = self._nodes_for(kind)
            ranks = max(self._file.ranks, nodes)
            self._add(kind.name, [schedule.usual(kind, self._campaign.config, ranks, number)], ranks, nodes, strategy)

    def _plan_pairs(self, strategy: str) -> None:
        if self._file.pairs is None:
            return
        ordinary = [kind.name for kind in KINDS.values() if NODES not in kind.needs]
        kinds = self._kinds("pairs", self._file.pairs.kinds, ordinary)
        ranks = self._file.ranks
        for one, other in schedule.sample_pairs(kinds, self._file.pairs.sample, self._file.seed):
            nodes = max(self._nodes_for(one), self._nodes_for(other))
            faults = schedule.pair(one, other, self._campaign.config, max(ranks, nodes))
            self._add(f"pair: {one.name} + {other.name}", faults, max(ranks, nodes), nodes, strategy)

    def _plan_storms(self, strategy: str) -> None:
        drawn, file = self._file.storm, self._file
        if drawn is None:
            return
        try:
            mix = schedule.weights(drawn.mix, file.nodes)
        except ConfigError as error:
            self.problems += error.problems
            return
        kinds = self._kinds("storm.mix", list(mix), [])
        if len(kinds) < len(mix) or not kinds:
            return
        name = drawn.mix if isinstance(drawn.mix, str) else "own"
        for seed in drawn.seeds:
            faults = schedule.draw(
                mix, seed, faults=drawn.faults, mean_steps=drawn.mean_steps, config=self._campaign.config,
                world_size=file.ranks,
            )  # fmt: skip
            self._add(f"storm {name} seed {seed}", faults, file.ranks, file.nodes, strategy, seed=seed)

    def _kinds(self, where: str, wanted: list[str] | str, every: list[str]) -> list[Fault]:
        names = every if isinstance(wanted, str) else wanted
        for name in names:
            if name not in KINDS:
                near = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(KINDS)}."
                self.problems.append(f"{where}: {name!r} is no kind of fault.\n  {hint}")
        return [KINDS[name] for name in names if name in KINDS]

    def _nodes_for(self, kind: Fault) -> int:
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
        problems: list[str] = []
        numbers = [number for number, fault in enumerate(faults) if _is_sound(number, fault, problems)]
        config, planned = None, None
        with _noting(problems):
            sound = [faults[number] for number in numbers]
            config = configs.load(campaign.config_path, [*overrides, f"faults={tomlfile.text(sound)}"])
        if config is not None:
            with _noting(problems):
                configs.check_world(config, ranks)
            problems += self._misfits(config, ranks, nodes)
            with _noting(problems):
                planned = plan.make(config, ranks, nodes, numbers)
        self.problems += [f"{name}: {problem}" for problem in problems]
        limits = {"timeout_seconds": campaign.timeout_seconds, "restarts": campaign.restarts}
        if config is not None and planned is not None and not problems:
            self.cases.append(Case(name, ranks, nodes, strategy, seed, 0, overrides, faults, config, planned, limits))

    def _misfits(self, config: Config, ranks: int, nodes: int) -> list[str]:
        """What a run may not have in this campaign."""
        problems = []
        if ranks % nodes:
            problems.append(f"{ranks} ranks cannot be spread evenly over {nodes} nodes.\n  Give a multiple of nodes.")
        restarts = self._campaign.restarts_for(len(config.faults))
        times = max((_deaths(fault) for fault in config.faults), default=0)
        if times > restarts:
            problems.append(
                f"times = {times} of repeated_kill, but a job may start again {restarts} times.\n"
                "  Give fewer, or set the campaign's restarts."
            )
        if configs.fingerprint(config) != configs.fingerprint(self._campaign.config):
            old, new = configs.mathematics(self._campaign.config), configs.mathematics(config)
            changes = "; ".join(configs.differences(old, new))
            problems.append(
                f"it has other weights than the reference run ({changes}), so there is nothing to compare with.\n"
                "  Move these overrides to the campaign's own `set`."
            )
        return problems


def _is_sound(number: int, fault: Table, problems: list[str]) -> bool:
    """Whether one [[faults]] table can be read at all; if not, the others are planned without it."""
    try:
        configs.parse({"faults": [fault]})
    except ConfigError as error:
        problems += [problem.replace("faults[0]", f"faults[{number}]") for problem in error.problems]
        return False
    return True


def _deaths(fault: FaultEntry) -> int:
    """How many deaths in a row a fault asks for; 0 where it does not say."""
    times, kind = (fault.model_extra or {}).get("times"), KINDS.get(fault.kind)
    return times if kind is not None and kind.repeats and isinstance(times, int) else 0


def _name_of(faults: Sequence[Table]) -> str:
    return " + ".join(str(fault.get("kind", "?")) for fault in faults)


def _from_outside(faults: Sequence[Table]) -> bool:
    kinds = [(KINDS.get(str(fault.get("kind"))), fault) for fault in faults]
    return any("at_seconds" in fault or (kind is not None and kind.from_outside) for kind, fault in kinds)


def check_exact(campaign: Campaign) -> str | None:
    """What a person should know before such a campaign runs."""
    if campaign.config.numerics.exact:
        return None
    return (
        "numerics.exact = false: sums then depend on how many ranks add them, so no run can be expected to equal the "
        "reference one. That invariant will be answered with unknown."
    )
