"""Planning a campaign: all its cases, checked as a whole before anything starts."""

import contextlib
import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import tomlfile
from trainer.chaos import command, schedule
from trainer.chaos.command import Command
from trainer.chaos.results import Outcome, Result, Setup, Table
from trainer.chaos.schema import CampaignFile, read
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.faults import plan
from trainer.faults.fault import IN_ISLANDS, IN_QUORUM, KINDS, NODES, OF_FIRST_CLUSTER, SPARES, Fault
from trainer.faults.plan import PlannedFault
from trainer.phases import Phase


@dataclass(kw_only=True)
class Case(Setup):
    """One run of the campaign, planned and checked."""

    config: Config
    planned: list[PlannedFault]
    worker: tuple[str, ...] = ("trainer", "train")
    """Module that each rank runs, with its first arguments."""
    not_applicable: str = ""
    """The reason why it cannot be made on this job at all; empty if it can."""

    @property
    def slug(self) -> str:
        """Name of the case's directory."""
        identity = json.dumps(
            [self.name, self.ranks, self.nodes, self.strategy, self.faults, self.overrides]
            + ([self.spares] if self.spares else [])
            + ([self.transport] if self.transport != "tcp" else [])
            + (["apart"] if self.apart else [])
        )
        words = re.sub(r"[^a-z0-9]+", "-", f"{self.name}-{self.strategy}".lower()).strip("-")[:60]
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:6]}-{self.repeat}"

    def make_result(self, outcome: Outcome, why: str, **more: Any) -> Result:
        return Result(**self.values(), outcome=outcome, why=why, **more)


@dataclass(frozen=True)
class Campaign:
    path: Path
    file: CampaignFile
    config_path: Path
    config: Config
    """Config of the reference run. For a command: the defaults, with the number of steps if the campaign knows it."""
    overrides: list[str]
    command: Command | None = None
    """The job, where it is no toprope run."""
    cases: list[Case] = field(default_factory=list)
    """Cases to run, with their repeats."""
    every: list[Case] = field(default_factory=list)
    """All cases of the file, once each, including those that `--only` leaves out."""

    @property
    def identity(self) -> str:
        """Digest of all that decides the results: reports of other results cannot be continued."""
        return self.command.identity if self.command else configs.fingerprint(self.config)

    def plan_faults(self, case: Case, faults: list[Table]) -> Case:
        """Return the case with other faults."""
        if self.command:
            config = configs.parse({"budget": self.config.budget.model_dump(), "faults": faults})
        else:
            config = configs.load(self.config_path, [*case.overrides, f"faults={tomlfile.text(faults)}"])
        planned = plan.make(
            config, case.ranks, case.nodes, inside=self.command is None, transport=case.transport
        )  # fmt: skip
        return replace(case, faults=faults, config=config, planned=_as_shown(planned, case.apart))

    def restarts_for(self, faults: int) -> int:
        """Number of restarts that the workers of a job with this number of faults may have."""
        return self.file.restarts + 2 * faults


def load(path: Path, only: Sequence[str] = (), repeat: int | None = None) -> Campaign:
    """Read a campaign file and plan all its cases. Raises ConfigError naming every problem of file and plans."""
    file, problems = read(path)
    if file is None:
        raise ConfigError(problems)
    builder = _of_command(path, file, problems) if file.command else _of_config(path, file, problems)
    builder.build_all()
    problems += builder.problems
    if builder.cases and all(case.not_applicable for case in builder.cases):
        remedy = "Give faults from outside too." if file.command else "Give faults that apply to its elastic.mode."
        problems += [f"{case.name}: {case.not_applicable}.\n  {remedy}" for case in builder.cases]
    if not problems:  # else a case may be unknown only because it could not be planned
        names = list(dict.fromkeys(case.name for case in builder.cases))
        unknown = [name for name in only if name not in names]
        problems += [f"--only {name!r} is no run of this campaign.\n  {_hint(name, names)}" for name in unknown]
    if not builder.cases and not problems:
        problems.append(f"{path} has no runs.\n  Add [[runs]], [catalogue], [phases], [pairs] or [storm].")
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    chosen = [case for case in builder.cases if not only or case.name in only]
    repeated = [replace(case, repeat=number) for number in range(repeat or file.repeat) for case in chosen]
    return replace(builder.campaign, cases=repeated, every=builder.cases)


def _of_config(path: Path, file: CampaignFile, problems: list[str]) -> "_CaseBuilder":
    # The config of the reference run comes first: every case is compared with it.
    config_path = path.parent / file.config
    overrides = [*_override_list(file.set, path.parent), 'wandb.mode="disabled"']
    config = None
    with _collect_into(problems):
        config = configs.load(config_path, overrides)
    if config is not None and config.faults:
        fact = f"{config_path} has faults of its own, so there is no reference run to compare with."
        problems.append(f"{fact}\n  Move them to {path}.")
    if config is None or config.faults:
        raise ConfigError(problems)
    return _CaseBuilder(Campaign(path, file, config_path, config, overrides))


def _of_command(path: Path, file: CampaignFile, problems: list[str]) -> "_CaseBuilder":
    job = command.read(path, file, problems)
    if job is None:
        raise ConfigError(problems)
    steps = {"budget": {"steps": job.steps or command.STEPS_UNKNOWN}}
    campaign = Campaign(path, file.model_copy(update={"ranks": job.ranks}), path, configs.parse(steps), [], command=job)
    return _CommandCaseBuilder(campaign, job)


@contextlib.contextmanager
def _collect_into(problems: list[str]) -> Iterator[None]:
    """Add the problems of a ConfigError to the list and continue, so that all problems are reported at once."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _override_list(table: Mapping[str, Any], folder: Path) -> list[str]:
    """Return a table of settings as `--set` takes them; files of one's own code are named from `folder`."""
    settings = configs.anchored(configs.flatten(table), folder)
    return [f"{key}={tomlfile.text(value)}" for key, value in settings.items()]


def _hint(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(names[:60])}."


class _CaseBuilder:
    """Makes the cases of a campaign file. Collects problems instead of raising the first."""

    def __init__(self, campaign: Campaign) -> None:
        self.campaign, self._file = campaign, campaign.file
        self.cases: list[Case] = []
        self.problems: list[str] = []
        self.strategies: list[str] = [*campaign.file.strategies]
        self._mode = campaign.config.elastic.mode

    def build_all(self) -> None:
        file = self._file
        for number, run in enumerate(file.runs):
            name = run.name or " + ".join(str(fault.get("kind", "?")) for fault in run.faults) or f"run {number}"
            for strategy in [run.strategy] if run.strategy else self.strategies:
                spares = file.spares if run.spares is None else run.spares
                ranks, nodes = run.ranks or file.ranks, run.nodes or file.nodes
                self._add(
                    name, run.faults, ranks, nodes, strategy, run.set, spares=spares, transport=run.transport,
                    apart=run.apart,
                )  # fmt: skip
        for strategy in self.strategies:
            if file.catalogue is not None:
                for number, kind in enumerate(self._kinds("catalogue", file.catalogue.kinds, list(KINDS))):
                    ranks, nodes = self._shape_for(kind)
                    faults = [self._usual(kind, ranks, number)]
                    self._add(kind.name, faults, ranks, nodes, strategy, self._needed(kind))
            if file.phases is not None:
                for kind in self._kinds("phases", file.phases.kinds, []):
                    for phase in self._phases_of(kind):
                        alone = file.apart and phase in OF_FIRST_CLUSTER
                        ranks = self.campaign.config.parallel.island_ranks if alone else file.ranks
                        faults = schedule.at_phase(kind, phase, self.campaign.config, ranks)
                        own = self._needed(kind)
                        self._add(f"{kind.name} at {phase}", faults, file.ranks, file.nodes, strategy, own)
            if file.pairs is not None:
                on_one_node = [kind.name for kind in self._makeable() if NODES not in kind.needs]
                kinds = self._kinds("pairs", file.pairs.kinds, on_one_node)
                for first, second in schedule.sample_pairs(kinds, file.pairs.sample, file.seed):
                    ranks, nodes = self._shape_for(first, second)
                    faults = self._pair(first, second, ranks)
                    own = self._needed(first, second)
                    self._add(f"pair: {first.name} + {second.name}", faults, ranks, nodes, strategy, own)
            if file.storm is not None:
                self._add_storms(strategy)
        for (name, strategy), times in Counter((case.name, case.strategy) for case in self.cases).items():
            if times > 1:
                self.problems.append(f"{times} runs are called {name!r} ({strategy}).\n  Give each a name of its own.")

    def _phases_of(self, kind: Fault) -> list[Phase]:
        never = set[Phase]() if self._mode == "quorum" else set(IN_QUORUM)
        never |= set() if self.campaign.config.islands.count else set(IN_ISLANDS)
        return [phase for phase in kind.phases if phase not in never]

    def _add_storms(self, strategy: str) -> None:
        file, storm = self._file, self._file.storm
        assert storm is not None
        mix: Mapping[str, float] = {}
        with _collect_into(self.problems):
            mix = self._weights(storm.mix)
        if len(self._kinds("storm.mix", list(mix), [])) < len(mix):
            return
        name = storm.mix if isinstance(storm.mix, str) else "own"
        for seed in storm.seeds if mix else []:
            faults = schedule.draw(
                mix, seed, faults=storm.faults, mean_steps=storm.mean_steps, config=self.campaign.config,
                world_size=file.ranks, inside=self.campaign.command is None,
            )  # fmt: skip
            self._add(f"storm {name} seed {seed}", faults, file.ranks, file.nodes, strategy, seed=seed)

    def _needed(self, *kinds: Fault) -> Table:
        """The settings that faults of these kinds need beside the campaign's own."""
        makeable = [kind for kind in kinds if not _not_in(self._mode, {"kind": kind.name})]
        return {name: value for kind in makeable for name, value in kind.sets.items()}

    def _kinds(self, where: str, wanted: list[str] | str, every: list[str]) -> list[Fault]:
        names = every if isinstance(wanted, str) else wanted
        unknown = [name for name in names if name not in KINDS]
        self.problems += [f"{where}: {name!r} is no kind of fault.\n  {_hint(name, list(KINDS))}" for name in unknown]
        return [KINDS[name] for name in names if name in KINDS]

    def _shape_for(self, *kinds: Fault) -> tuple[int, int]:
        """(ranks, nodes) of a case with these faults: the file's, but at least two nodes if a fault needs them."""
        # A quorum's workers are on one node, where such a fault does not apply.
        several = self._mode != "quorum" and any(NODES in kind.needs for kind in kinds)
        nodes = max(self._file.nodes, 2 if several else 1)
        return max(self._file.ranks, nodes), nodes

    def _add(
        self, name: str, faults: list[Table], ranks: int, nodes: int, strategy: str,
        own: Mapping[str, Any] | None = None, seed: int | None = None, spares: int | None = None,
        transport: str | None = None, apart: bool | None = None,
    ) -> None:  # fmt: skip
        """Plan one case with its own overrides, or note why it cannot be planned."""
        problems = list[str]()
        # A table that cannot be read is reported and left out, so that problems of the others are found too.
        numbers = [number for number, fault in enumerate(faults) if _is_readable(number, fault, problems)]
        spares = self._file.spares if spares is None else spares
        kinds = [KINDS.get(str(fault.get("kind"))) for fault in faults]
        if self._mode_of(own or {}) == "quorum" and any(kind is not None and SPARES in kind.needs for kind in kinds):
            spares = max(spares, 1)
        case = self._plan(
            name, faults, numbers, ranks, nodes, strategy, own or {}, seed, problems, spares,
            transport or self._file.transport, self._file.apart if apart is None else apart,
        )  # fmt: skip
        self.problems += [f"{name}: {problem}" for problem in problems]
        if case is not None and not problems:
            self.cases.append(case)

    def _plan(
        self, name: str, faults: list[Table], numbers: list[int], ranks: int, nodes: int, strategy: str,
        own: Mapping[str, Any], seed: int | None, problems: list[str], spares: int, transport: str, apart: bool,
    ) -> Case | None:  # fmt: skip
        """Return the case with those of the faults that have these numbers; adds what is wrong to the problems."""
        overrides = [*self.campaign.overrides, f"parallel.strategy={tomlfile.text(strategy)}"]
        # The nemesis needs time to strike, and a quorum's successors to join, so such a run lasts longer; its weights
        # stay the same.
        mode = self._mode_of(own)
        if any(_needs_time(fault, mode) for fault in faults):
            overrides += _override_list(self._file.set_outside, self.campaign.path.parent)
        overrides += _override_list(own, self.campaign.path.parent)
        config, planned = None, None
        reasons = [reason for number in numbers if (reason := _not_in(mode, faults[number], apart))]
        numbers = [number for number in numbers if not _not_in(mode, faults[number], apart)]
        # Each check runs on what the earlier ones left, since a user wants all problems of a case at once.
        with _collect_into(problems):
            readable = [faults[number] for number in numbers]
            config = configs.load(self.campaign.config_path, [*overrides, f"faults={tomlfile.text(readable)}"])
        if config is not None:
            with _collect_into(problems):
                configs.check_world(config, ranks)
            problems += self._misfits(config, ranks, nodes, spares, transport)
            problems += _misfits_of_clusters(config, nodes) if apart else []
            with _collect_into(problems):
                planned = _as_shown(plan.make(config, ranks, nodes, numbers, transport=transport), apart)
        if config is None or planned is None:
            return None
        limits: dict[str, float] = {"timeout_seconds": self._file.timeout_seconds, "restarts": self._file.restarts}
        trees = faults if reasons else [plan.tree(fault) for fault in planned]
        kinds = [str(fault["kind"]) for fault in trees]
        given: Any = (
            name, kinds, trees, ranks, nodes, strategy, seed, 0, overrides, limits, mode, spares, transport, apart,
        )  # fmt: skip
        why = "; ".join(dict.fromkeys(reasons))
        return Case(*given, config=config, planned=planned, not_applicable=why)

    def _usual(self, kind: Fault, ranks: int, number: int) -> Table:
        return schedule.usual(kind, self.campaign.config, ranks, number)

    def _pair(self, first: Fault, second: Fault, ranks: int) -> list[Table]:
        return schedule.pair(first, second, self.campaign.config, ranks)

    def _mode_of(self, own: Mapping[str, Any]) -> str:
        """elastic.mode of a run with these overrides of its own."""
        return str(configs.flatten(dict(own)).get("elastic.mode", self._mode))

    def _makeable(self) -> list[Fault]:
        """The kinds that can be made on this job."""
        return [kind for kind in KINDS.values() if not _not_in(self._mode, {"kind": kind.name})]

    def _weights(self, mix: str | Mapping[str, float]) -> Mapping[str, float]:
        found = schedule.weights(mix, self._file.nodes)
        away = {kind: reason for kind in found if (reason := _not_in(self._mode, {"kind": kind}))}
        if away and not isinstance(mix, str):
            facts = "; ".join(f"storm.mix.{kind}: {reason}" for kind, reason in away.items())
            raise ConfigError([f"{facts}.\n  Leave them out, or set the other elastic.mode."])
        return {kind: weight for kind, weight in found.items() if kind not in away}

    def _misfits(self, config: Config, ranks: int, nodes: int, spares: int, transport: str) -> list[str]:
        """Problems of a valid run that make it useless or impossible in this campaign."""
        problems = []
        mode = config.elastic.mode
        if spares and mode != "quorum":
            problems.append(f'spares = {spares} without a quorum.\n  Set elastic.mode = "quorum", or leave spares out.')
        if nodes > 1 and mode == "quorum":
            problems.append(f"nodes = {nodes}, but a campaign starts the workers of a quorum on one.\n  Set nodes = 1.")
        if ranks % nodes:
            problems.append(f"{ranks} ranks cannot be spread evenly over {nodes} nodes.\n  Give a multiple of nodes.")
        if transport == "mptcp" and nodes == 1:
            fact = 'transport = "mptcp" on one node, which has no links.'
            problems.append(f"{fact}\n  Set nodes = 2, or leave transport out.")
        restarts = self.campaign.restarts_for(len(config.faults))
        for fault in config.faults:
            times, kind = (fault.model_extra or {}).get("times"), KINDS.get(fault.kind)
            if kind is not None and kind.repeats and isinstance(times, int) and times > restarts:
                problems.append(
                    f"times = {times} of {fault.kind}, but a job may start again {restarts} times.\n"
                    "  Give fewer, or set the campaign's restarts."
                )
        if configs.fingerprint(config) != configs.fingerprint(self.campaign.config):
            old, new = configs.mathematics(self.campaign.config), configs.mathematics(config)
            changes = "; ".join(configs.differences(old, new))
            problems.append(
                f"it has other weights than the reference run ({changes}), so there is nothing to compare with.\n"
                "  Move these overrides to the campaign's own `set`."
            )
        return problems


class _CommandCaseBuilder(_CaseBuilder):
    """Makes the cases for a job that is no toprope run: all faults come from outside."""

    def __init__(self, campaign: Campaign, job: Command) -> None:
        super().__init__(campaign)
        self._job, self.strategies = job, [""]

    def _plan(
        self, name: str, faults: list[Table], numbers: list[int], ranks: int, nodes: int, strategy: str,
        own: Mapping[str, Any], seed: int | None, problems: list[str], spares: int, transport: str, apart: bool,
    ) -> Case | None:  # fmt: skip
        if own or strategy or apart or transport != "tcp":
            fact = "set, strategy, apart and transport are for runs of toprope."
            problems.append(f"{fact}\n  Put options of the job into its command.")
        if ranks % nodes:
            problems.append(f"{ranks} ranks cannot be spread evenly over {nodes} nodes.\n  Give a multiple of nodes.")
        alone = self._job.ranks // self._file.nodes
        if nodes == 1 and ranks != alone:
            fact = f"ranks = {ranks}, but the command starts {alone} on one node."
            problems.append(f"{fact}\n  Leave ranks out, or change the command.")
        reasons = [reason for fault in faults if (reason := self._job.not_applicable(fault, nodes))]
        numbers = [number for number in numbers if not self._job.not_applicable(faults[number], nodes)]
        planned: list[PlannedFault] = []
        config = self.campaign.config
        with _collect_into(problems):
            tree = {"budget": config.budget.model_dump(), "faults": [faults[number] for number in numbers]}
            config = configs.parse(tree)
            planned = plan.make(config, ranks, nodes, numbers, inside=False)
        needy = [fault for fault in planned if fault.at_step is not None and not self._job.tells_steps]
        problems += [
            f"faults[{fault.index}] ({fault.kind.name}) has at_step, but the campaign does not know the job's steps.\n"
            "  Give progress.pattern, or at_seconds."
            for fault in needy
        ]
        trees = faults if reasons else [plan.tree(fault) for fault in planned]
        kinds = [str(fault["kind"]) for fault in trees] if not problems else []
        limits = {"timeout_seconds": self._file.timeout_seconds}
        given: Any = (name, kinds, trees, ranks, nodes, "", seed, 0, [], limits)
        return Case(*given, config=config, planned=planned, not_applicable="; ".join(dict.fromkeys(reasons)))

    def _needed(self, *kinds: Fault) -> Table:
        return {}  # the job has no config of ours

    def _usual(self, kind: Fault, ranks: int, number: int) -> Table:
        # In the middle of a job, if it is known where that is: there is something to lose, and something left to do.
        steps = self._job.steps
        fault = {"kind": kind.name, "at_step": 3 if steps is None else max(1, steps // 2)}
        return fault | ({"rank": number % ranks} if kind.on_rank else {})

    def _pair(self, first: Fault, second: Fault, ranks: int) -> list[Table]:
        return [self._usual(first, ranks, 0), self._usual(second, ranks, 1)]

    def _makeable(self) -> list[Fault]:
        return [kind for kind in KINDS.values() if not self._job.not_applicable({"kind": kind.name}, 1)]

    def _weights(self, mix: str | Mapping[str, float]) -> Mapping[str, float]:
        if self._job.steps is None:
            raise ConfigError(["storm has nothing to spread its faults over.\n  Give progress.pattern and .steps."])
        found = super()._weights(mix)
        inside = [kind for kind in found if self._job.not_applicable({"kind": kind}, self._file.nodes)]
        if inside and not isinstance(mix, str):
            fact = f"storm.mix has {', '.join(inside)}, which cannot be made on this job."
            raise ConfigError([f"{fact}\n  Leave them out: {self._job.not_applicable({'kind': inside[0]}, 1)}."])
        return {kind: weight for kind, weight in found.items() if kind not in inside}


def _as_shown(planned: list[PlannedFault], apart: bool) -> list[PlannedFault]:
    return [replace(fault, kind=fault.kind.in_clusters_apart()) for fault in planned] if apart else planned


def _misfits_of_clusters(config: Config, nodes: int) -> list[str]:
    """Problems of a case whose clusters of islands live apart."""
    problems = []
    if not config.islands.count:
        problems.append(
            "apart = true, and islands.count = 0: there are no clusters.\n  Set islands.count, or leave it out."
        )
    if nodes > 1:
        problems.append(f"nodes = {nodes}, but a campaign starts clusters that live apart on one.\n  Set nodes = 1.")
    for number, fault in enumerate(config.faults):
        is_of_others = isinstance(fault.rank, int) and fault.rank >= config.parallel.island_ranks
        if fault.phase in OF_FIRST_CLUSTER and is_of_others:
            problems.append(
                f"faults[{number}] ({fault.kind}): rank = {fault.rank}, but {fault.phase} is passed by the first "
                "cluster alone.\n  Give rank = 0, or another phase."
            )
    return problems


def _not_in(mode: str, fault: Table, apart: bool = False) -> str:
    """The reason why a [[faults]] table does not apply in this elastic.mode; empty if it does, or is wrong anyway.

    `apart`: the clusters of islands live apart.
    """
    kind = KINDS.get(str(fault.get("kind")))
    if kind is None:
        return ""
    if apart and (kind.from_outside or "at_seconds" in fault):
        return f"{kind.name} comes from outside, and clusters that live apart have faults made by their ranks alone"
    if mode == "quorum" and NODES in kind.needs and mode not in kind.not_in:
        return f"{kind.name} needs two nodes, and a campaign starts the workers of a quorum on one"
    return f"{kind.name}: {kind.not_in[mode]}" if mode in kind.not_in else ""


def _is_readable(number: int, fault: Table, problems: list[str]) -> bool:
    """True if a [[faults]] table can be parsed; else adds its problems to the list."""
    try:
        configs.parse({"faults": [fault]})
    except ConfigError as error:
        problems += [problem.replace("faults[0]", f"faults[{number}]") for problem in error.problems]
        return False
    return True


def _needs_time(fault: Table, mode: str) -> bool:
    kind = KINDS.get(str(fault.get("kind")))
    again = kind is not None and kind.repeats and mode == "quorum"
    return again or "at_seconds" in fault or (kind is not None and kind.from_outside)


def check_exact(campaign: Campaign) -> str | None:
    """Return a warning if the sums are not exact, so that the runs may differ; else None."""
    rule = "sums then depend on how many ranks add them, so no run can be expected to equal the reference one."
    if campaign.command:
        return None
    warning = f"numerics.exact = false: {rule} That invariant will be answered with unknown."
    return None if campaign.config.numerics.exact else warning
