"""Ladder files: a question, sizes and single changes, read and planned as a whole before anything starts.

`load` proves for every pair (an arm's run and the baseline's run at the same rung and seed) that the two configs differ
in what the arm declares and in nothing else.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import tomlfile
from trainer.config import Config
from trainer.errors import ConfigError, TopropeError
from trainer.faults import plan as faultplan
from trainer.faults.fault import NODES
from trainer.ladder.plan import arms as armplans
from trainer.ladder.plan import code as codearms
from trainer.ladder.plan import sizes
from trainer.ladder.plan.ladder import (
    AA,
    DISTIL,
    ENSEMBLE,
    FIT_RUNGS,
    TARGET,
    Ladder,
    PlannedArm,
    PlannedRun,
    PlannedRung,
)
from trainer.ladder.plan.schema import CODE_LENGTH, AddedRuns, LadderFile, Rung
from trainer.ladder.plan.sizes import Rules, Scale, Size
from trainer.ladder.stats.records import BASELINE, Criterion
from trainer.show.units import scientific


def load(path: Path) -> Ladder:
    """Read a ladder file and plan all its runs. Raises ConfigError naming every problem of file and plans.

    Loads torch to count parameters, and makes the tokenizer if the cache does not have it.
    """
    return _plan(tomlfile.read_as(path, LadderFile, "ladder"), path)


def extended(ladder: Ladder, added: Sequence[AddedRuns]) -> Ladder:
    """Return the ladder with runs that its file does not ask for. Raises ConfigError if they cannot be planned."""
    if not added:
        return ladder
    rungs = {rung.name: rung for rung in ladder.file.rungs}
    for addition in added:
        for name, seeds in addition.seeds.items():
            rung = rungs.get(name) or Rung(
                name=name, parameters=addition.parameters, unique_tokens=addition.unique_tokens, seeds=seeds
            )
            before = ladder.file.seeds if rung.seeds is None else rung.seeds
            rungs[name] = rung.model_copy(update={"seeds": sorted({*before, *seeds})})
    wider = _plan(ladder.file.model_copy(update={"rungs": list(rungs.values())}), ladder.path)
    # A rung's seeds are those of its arms together; each arm has only the runs that were asked for.
    wanted = {(run.rung, run.arm, run.seed) for run in ladder.runs}
    for addition in added:
        pairs = [(name, seed) for name, seeds in addition.seeds.items() for seed in seeds]
        wanted |= {(name, arm, seed) for name, seed in pairs for arm in (BASELINE, *addition.arms)}
    runs = [run for run in wider.runs if (run.rung, run.arm, run.seed) in wanted]
    return replace(wider, runs=runs, settings=ladder.settings, notices=ladder.notices)


def _plan(file: LadderFile, path: Path) -> Ladder:
    shared = configs.anchored(configs.flatten(file.set), path.parent)
    overrides = [f"{key}={tomlfile.text(value)}" for key, value in shared.items()]
    builder = _LadderBuilder(file, configs.load(path.parent / file.baseline, overrides), path)
    ladder = builder.build()
    if builder.problems:
        raise ConfigError(list(dict.fromkeys(builder.problems)))
    return ladder


def _settings(file: LadderFile) -> dict[str, Any]:
    """Contents of the file, flat. A default that was added since does not make an edit of an older file."""
    settings = configs.flatten(_keyed(file.model_dump(mode="json")))
    return {key: value for key, value in settings.items() if (key, value) != ("sizes.axis", "compute")}


def _changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the config with these settings ({"optim.beta2": 0.99}). Raises ConfigError."""
    tree = config.model_dump()
    for key, value in settings.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return configs.parse(tree)


class _LadderBuilder:
    """Checks a ladder file and plans its runs. Problems are collected, so that all are reported at once."""

    def __init__(self, file: LadderFile, config: Config, path: Path) -> None:
        self._file, self._config, self._path = file, config, path
        self.problems: list[str] = []
        self._notices: list[str] = []
        self._arms = armplans.plan_arms(file, config, path.parent, self.problems)

    def build(self) -> Ladder:
        """Check the file and return the planned ladder; of use only if there are no problems."""
        self._check_file()
        self._check_seeds()
        self._check_target()
        file, rungs, target, runs = self._file, [], None, []
        # Sizes and configs of a file with problems may fail anywhere. Those problems are reported with the others.
        try:
            rungs, target, runs = self._plan_rungs()
        except TopropeError as error:
            self.problems += error.problems if isinstance(error, ConfigError) else [str(error)]
        target_flops = file.target.flops or (target.flops if target else 0.0)
        if file.sizes.axis == "data":
            target_flops = target.flops if target else 0.0
            if rungs and 0 < file.target.unique_tokens < rungs[-1].unique_tokens:
                self.problems.append(
                    f"the target has {file.target.unique_tokens:,} tokens of unique text, fewer than rung "
                    f"{rungs[-1].name!r} with {rungs[-1].unique_tokens:,}.\n"
                    "  A verdict is about an amount that was not run. Give a larger target, or leave out the rungs "
                    "above it."
                )
        elif rungs and target_flops and target_flops < rungs[-1].flops:
            self.problems.append(
                f"the target takes {scientific(target_flops)} FLOPs, less than rung {rungs[-1].name!r} with "
                f"{scientific(rungs[-1].flops)}.\n  A verdict is about a scale that was not run. Give a larger "
                "target, or leave out the rungs above it."
            )
        return Ladder(
            name=self._path.stem, path=self._path, file=file, criterion=Criterion(**file.criterion.model_dump()),
            rungs=rungs, arms=list(self._arms.values()), target_flops=target_flops, target=target, runs=runs,
            notices=list(dict.fromkeys(self._notices)),
            settings=_settings(file) | self._code_of_arms(), axis=file.sizes.axis,
            target_unique_tokens=file.target.unique_tokens,
        )  # fmt: skip

    def _code_of_arms(self) -> dict[str, str]:
        """Digests of what the arms of code make of it, so that an edited patch is an edit of the ladder."""
        return {
            f"arms.{arm.name}.code": codearms.digest_of_change(arm.tree, arm.settings)
            for arm in self._arms.values()
            if "code.change" in arm.settings
        }

    # The file

    def _check_file(self) -> None:
        file = self._file
        self.problems += file.sizes.problems()
        for rung in file.rungs:
            self.problems += rung.problems(f"rung {rung.name!r}", file.sizes.axis)
        for plural, tables, reserved in (("rungs", file.rungs, (TARGET,)), ("arms", file.arms, (BASELINE, AA))):
            for name, times in Counter(table.name for table in tables).items():
                if times > 1:
                    self.problems.append(f"{times} {plural} are called {name!r}.\n  Give each a name of its own.")
                if name in reserved or not name.strip():
                    self.problems.append(f"{plural}: {name!r} has a meaning of its own.\n  Give another name.")
        sets = self._config.eval.sets
        if file.metric == CODE_LENGTH:
            if CODE_LENGTH in sets:
                rule = "The name is that of the metric made of training losses. Give the set another one."
                self.problems.append(f"metric = {CODE_LENGTH!r}, and a held-out set is called so too.\n  {rule}")
            if self._config.model.dropout:
                self.problems.append(
                    f"metric = {CODE_LENGTH!r}, but the baseline has model.dropout.\n"
                    "  Training losses are scored with dropout on, which makes them larger: compare by a held-out set."
                )
        elif file.metric not in sets:
            self.problems.append(
                f"metric = {file.metric!r}, but the runs' eval.sets are {', '.join(map(repr, sets))}.\n"
                "  Name one of them, or add it to eval.sets in [set]."
            )
        if file.downstream and (file.downstream == file.metric or file.downstream not in sets):
            self.problems.append(
                f"downstream = {file.downstream!r}, but the runs' eval.sets are {', '.join(map(repr, sets))}, and "
                f"{file.metric!r} is the metric.\n  Name another set, or add it to eval.sets in [set]."
            )
        if file.sizes.axis == "data":
            self._check_data_axis()
        if len(file.rungs) < FIT_RUNGS:
            self._notices.append(
                f"{len(file.rungs)} rungs are too few for a fit: a curve of {FIT_RUNGS} parameters needs {FIT_RUNGS}. "
                "The runs are made, but there will be no verdict."
            )
        # Faults of the baseline's config would not be told apart from those that the ladder asks for.
        if self._config.faults:
            self.problems.append(
                f"{file.baseline} has faults of its own, which all runs would share.\n"
                "  Move them to [[faults]] of the ladder, where arm, rung and seed select their runs."
            )

    def _check_data_axis(self) -> None:
        file = self._file
        if file.metric == CODE_LENGTH and file.sizes.epochs != 1:
            self.problems.append(
                f"metric = {CODE_LENGTH!r} needs text that is read once, and these runs read it again.\n"
                "  Set sizes.epochs = 1, or compare by a held-out set."
            )
        if self._config.data.unique_tokens:
            self.problems.append(
                f"data.unique_tokens = {self._config.data.unique_tokens} is set for all runs, and rungs decide it.\n"
                "  Remove it from the baseline's config and from [set]."
            )
        if "max_slowdown" in file.criterion.model_fields_set:
            self.problems.append(
                'criterion.max_slowdown has no effect with sizes.axis = "data": text is short there, not time.\n'
                "  Remove it. The report shows what each arm takes in compute."
            )

    def _check_seeds(self) -> None:
        file = self._file
        lists = {"seeds": file.seeds, "target.seeds": file.target.seeds}
        lists |= {f"rung {rung.name!r}: seeds": rung.seeds for rung in file.rungs if rung.seeds is not None}
        # Each list is checked alone: rungs may well share seeds, and pairs need them to.
        for where, seeds in lists.items():
            self.problems += [
                f"{where} names {seed} {times} times.\n"
                "  A run is a function of its config, so the second would be the first. Give each seed once."
                for seed, times in Counter(seeds).items()
                if times > 1
            ]
        if file.tuning is None:
            return
        if any(file.tuning.seed in seeds for seeds in lists.values()):
            self.problems.append(
                f"tuning.seed = {file.tuning.seed} is also a seed of the ladder.\n"
                "  The rate that was luckiest with it would be judged by it. Give the sweep a seed of its own."
            )
        if sorted(set(file.tuning.rates)) != file.tuning.rates:
            self.problems.append(f"tuning.rates = {file.tuning.rates} is not in order.\n  List each once, rising.")

    def _check_target(self) -> None:
        target, on_data = self._file.target, self._file.sizes.axis == "data"
        if on_data:
            self.problems += target.problems("[target]", "data")
            if target.flops:
                rule = 'With sizes.axis = "data" the target is an amount of unique text. Give unique_tokens alone.'
                self.problems.append(f"[target] has flops.\n  {rule}")
        # One scale is needed, a size or its compute; runs at it need a size.
        sized = bool(target.width or target.n_layers or target.n_heads or target.parameters)
        if on_data:
            pass
        elif sized == bool(target.flops):
            self.problems.append(
                "[target] needs one scale.\n  Give a size (width and n_layers, or parameters), or flops."
            )
        elif sized:
            self.problems += target.problems("[target]")
        elif target.seeds:
            self.problems.append("target.seeds asks for runs, but [target] has no size.\n  Give a size, or no seeds.")
        if target.arms and not target.seeds:
            self.problems.append("target.arms has no effect without target.seeds.\n  Give seeds, or remove it.")
        self.problems += [
            f"target.arms: {name!r} is no arm.{armplans.near(name, self._arms)}"
            for name in target.arms
            if name not in self._arms
        ]

    # The runs

    def _plan_rungs(self) -> tuple[list[PlannedRung], PlannedRung | None, list[PlannedRun]]:
        """(rungs by size, the target, the runs of all of them)."""
        file = self._file

        def measure(size: Size) -> tuple[int, sizes.Shape]:
            vocab = sizes.vocab_of(self._config.data, self._config.eval, self._config.model.vocab_size)
            shape = sizes.shape_of(size, file.sizes, self._config, vocab)
            return sizes.counts(sizes.with_shape(self._config, shape).model, vocab)[0], shape

        # Sizes that cannot be read have been reported. The rules scale settings from the smallest of the others.
        if file.sizes.axis == "data":
            return self._plan_amounts()
        by_size = sorted(((*measure(rung), rung) for rung in file.rungs if not rung.problems("")), key=lambda it: it[0])
        for (parameters, _, first), (above, _, second) in itertools.pairwise(by_size):
            if parameters == above:
                self.problems.append(
                    f"rungs {first.name!r} and {second.name!r} have {parameters:,} parameters each.\n"
                    "  A second rung of a size says nothing about scale. Change its size, or give more seeds."
                )
        rungs, target, runs = [], None, []
        # Smallest first: this is also the order in which the runs are shown and, unless it costs time, made.
        for parameters, shape, rung in by_size:
            scale, seeds = Scale(parameters, shape, *by_size[0][:2]), rung.seeds or file.seeds
            planned = self._plan_runs(rung.name, scale, seeds, self._arms.values())
            rungs += [PlannedRung.of(run, seeds) for run in planned[:1]]
            runs += planned
        self._check_changes(runs)
        if by_size and not file.target.flops and not file.target.problems(""):
            scale = Scale(*measure(file.target), *by_size[0][:2])
            arms = [self._arms[name] for name in file.target.arms if name in self._arms]
            # Without seeds the target is only predicted. It is planned all the same, for its figures.
            planned = self._plan_runs(TARGET, scale, file.target.seeds or file.seeds[:1], arms)
            target = PlannedRung.of(planned[0], file.target.seeds) if planned else None
            runs += planned if file.target.seeds else []
        return rungs, target, self._with_faults(runs)

    def _plan_amounts(self) -> tuple[list[PlannedRung], PlannedRung | None, list[PlannedRun]]:
        """The same on the axis "data"."""
        file, config = self._file, self._config
        known = [rung for rung in file.rungs if not rung.problems("", "data")]
        if not known or file.sizes.problems():
            return [], None, []
        by_amount = sorted(known, key=lambda rung: rung.unique_tokens)
        for first, second in itertools.pairwise(by_amount):
            if first.unique_tokens == second.unique_tokens:
                self.problems.append(
                    f"rungs {first.name!r} and {second.name!r} have {first.unique_tokens:,} unique tokens each.\n"
                    "  A second rung of an amount says nothing about scale. Change it, or give more seeds."
                )
        vocab = sizes.vocab_of(config.data, config.eval, config.model.vocab_size)
        parameters, _ = sizes.counts(config.model, vocab)
        shape = sizes.Shape(config.model.width, config.model.n_layers, config.model.n_heads)
        there_are = sizes.unique_tokens_of(config.data, config.eval, config.model.context)

        def scale(size: Size) -> Scale:
            return Scale(parameters, shape, parameters, shape, size.unique_tokens, by_amount[0].unique_tokens)

        def fits(where: str, size: Size) -> bool:
            found = self._amount_problems(where, size.unique_tokens, there_are)
            self.problems += found
            return not found

        rungs, target, runs = [], None, []
        for rung in by_amount:
            if not fits(f"rung {rung.name!r}", rung):
                continue
            seeds = rung.seeds or file.seeds
            planned = self._plan_runs(rung.name, scale(rung), seeds, self._arms.values())
            rungs += [PlannedRung.of(run, seeds) for run in planned[:1]]
            runs += planned
        self._check_changes(runs)
        # A target that is only predicted may be more text than there is: that is then the question.
        if file.target.seeds and not file.target.problems("", "data") and fits("[target]", file.target):
            arms = [self._arms[name] for name in file.target.arms if name in self._arms]
            planned = self._plan_runs(TARGET, scale(file.target), file.target.seeds, arms)
            target = PlannedRung.of(planned[0], file.target.seeds) if planned else None
            runs += planned
        return rungs, target, self._with_faults(runs)

    def _amount_problems(self, where: str, unique_tokens: int, there_are: int) -> list[str]:
        """Say why runs cannot be made on so much unique text."""
        config = self._config
        if unique_tokens < config.model.context:
            return [
                f"{where} has {unique_tokens:,} unique tokens, less than one sequence of {config.model.context}.\n"
                "  Give more."
            ]
        if unique_tokens // config.model.context * config.model.context > there_are:
            return [
                f"{where} has {unique_tokens:,} unique tokens, and {config.data.source} has {there_are:,} for "
                "training.\n  What is read twice is not unique. Give more text, or smaller rungs."
            ]
        return []

    def _plan_runs(self, rung: str, scale: Scale, seeds: Sequence[int], arms: Iterable[PlannedArm]) -> list[PlannedRun]:
        """The baseline's runs and the arms' at one rung, seed by seed; none if the baseline's config is refused."""
        # The baseline's decay is used for all arms, or they would differ in it too.
        decay = sizes.inverse_steps(self._config, self._file.sizes, scale)
        planned: list[PlannedRun] = []
        for arm in (PlannedArm(BASELINE, "", {}), *arms):
            where = f"arm {arm.name!r}" if planned else rung
            # An arm whose config is refused is left out, so that the problems of the other arms are found too.
            try:
                config = self._config_of(arm, scale, decay)
                if arm.settings.get(DISTIL):  # its digests are known later, what it contradicts is known now
                    _changed(config, {"distil.runs": ["teacher"], "distil.weights_sha256": ["0" * 64]})
                configs.check_world(config, self._file.ranks)
                vocab = sizes.vocab_of(config.data, config.eval, config.model.vocab_size)
                count = sizes.counts if arm.tree is None else functools.partial(codearms.counts, arm.tree)
                counts = count(config.model, vocab)
            except ConfigError as error:
                self.problems += [f"{where}: {problem}" for problem in error.problems]
                if not planned:
                    return []
                continue
            several: dict[str, Any] = {"ensemble": arm.settings.get(ENSEMBLE, 0), "distil": arm.settings.get(DISTIL, 0)}
            run = PlannedRun(arm.name, rung, config.seed, config, *counts, tree=arm.tree, **several)
            planned.append(run)
            self.problems += [f"{where}: {problem}" for problem in armplans.prove(arm, planned[0], run)]
            trains_longer = not LENGTHS.isdisjoint(arm.settings)
            if run.config.budget != planned[0].config.budget and not trains_longer:
                self._notices.append(f"arm {arm.name!r} takes other steps, so that its tokens stay equal.")
        return [self._at_seed(run, seed) for seed in seeds for run in planned]

    def _config_of(self, arm: PlannedArm, scale: Scale, decay: float) -> Config:
        """The config of an arm at a rung, before its seed is set. The baseline is an arm without a change."""
        rules, settings = armplans.split_rules(arm.settings)
        config = _changed(self._config, configs.anchored(settings, self._path.parent))
        try:
            arm_rules = Rules.model_validate(self._file.sizes.model_dump() | rules)
        except ValueError as error:
            raise ConfigError([f"{', '.join(rules)}: {error}"]) from None
        if rules and (problems := arm_rules.problems()):
            raise ConfigError(problems)
        if arm_rules.head_width and config.model.head_width:
            raise ConfigError([
                f"sizes.head_width = {arm_rules.head_width}, and model.head_width = {config.model.head_width}.\n"
                "  Both say how wide a head is. Leave one of them out."
            ])  # fmt: skip
        if 0 < arm_rules.run_tokens < scale.unique_tokens:
            raise ConfigError([
                f"sizes.run_tokens = {arm_rules.run_tokens:,} reads {arm_rules.run_tokens / scale.unique_tokens:.2g} "
                f"epochs of {scale.unique_tokens:,} unique tokens.\n"
                "  What is never read is not the run's text. Give tokens that reach every rung, or epochs."
            ])  # fmt: skip
        # The rung gives the width. An arm with another head width divides it into other heads.
        shape = scale.shape
        if arm_rules.head_width != self._file.sizes.head_width:
            shape = replace(shape, n_heads=max(1, round(shape.width / arm_rules.head_width)))
        return _changed(config, sizes.scaled(config, arm_rules, shape, scale, decay))

    def _at_seed(self, run: PlannedRun, seed: int) -> PlannedRun:
        # W&B shows the ladder as one group. Its settings do not count for what a run is.
        wandb = run.config.wandb
        shown = {"group": wandb.group or self._path.stem, "tags": (*wandb.tags, run.rung, run.arm, f"seed {seed}")}
        update = {"seed": seed, "wandb": wandb.model_copy(update=shown)}
        return replace(run, seed=seed, config=run.config.model_copy(update=update))

    def _check_changes(self, runs: Sequence[PlannedRun]) -> None:
        """Problems of arms that change nothing: a rule may have no effect at one rung, but not at all of them."""
        base = {(run.rung, run.seed): run.key for run in runs if run.arm == BASELINE}
        for arm in self._arms.values():
            arm_runs = [run for run in runs if run.arm == arm.name]
            # Runs with one key are one run: there the arm is the baseline.
            same = list(dict.fromkeys(run.rung for run in arm_runs if run.key == base.get((run.rung, run.seed))))
            if arm_runs and len(same) == len({run.rung for run in arm_runs}):
                self.problems.append(
                    f"arm {arm.name!r} is the baseline at every rung, so it changes nothing.\n  Give another value."
                )
            elif same:
                self._notices.append(f"arm {arm.name!r} is the baseline at {', '.join(same)}: one run serves both.")

    # Faults

    def _with_faults(self, runs: Sequence[PlannedRun]) -> list[PlannedRun]:
        """Give each run the [[faults]] tables that select it by arm, rung and seed."""
        for number, table in enumerate(self._file.faults):
            if not any(_selects(table, run) for run in runs):
                where = f"faults[{number}] ({table.get('kind', '?')})"
                self.problems.append(f"{where} selects no run.\n  Check its arm, rung and seed.")
        # A fault changes no bit of a run, so runs with and without it have one key.
        planned = list(runs)
        for number, run in enumerate(runs):
            tables = [table for table in self._file.faults if _selects(table, run)]
            faults = [{key: value for key, value in table.items() if key not in SELECTORS} for table in tables]
            try:
                config = _changed(run.config, {"faults": faults}) if faults else run.config
                for fault in faultplan.make(config, self._file.ranks):
                    self._check_fault(fault)
                planned[number] = replace(run, config=config)
            except ConfigError as error:
                self.problems += [f"{run.rung}: {problem}" for problem in error.problems]
        return planned

    def _check_fault(self, fault: faultplan.PlannedFault) -> None:
        name = fault.kind.name
        if NODES in fault.kind.needs:
            self.problems.append(f"{name} needs two nodes, and a ladder's runs have one.\n  Leave it out.")
        elif fault.from_outside and self._file.ranks == 1:
            self.problems.append(
                f"{name} is made from outside, beside torchrun, and runs of one rank are started without.\n"
                "  Set ranks = 2, or give a fault that a rank makes itself, with at_step."
            )
        elif fault.kind.damages_tokens:
            self.problems.append(f"{name} would damage tokens that all runs read.\n  Leave it out.")


LENGTHS = frozenset(("sizes.epochs", "sizes.run_tokens"))
"""Settings of an arm that trains on the same text for longer, or less long."""
SELECTORS = ("arm", "rung", "seed")
"""Keys of a [[faults]] table that select runs; the other keys are the fault's."""


def _selects(table: Mapping[str, Any], run: PlannedRun) -> bool:
    wanted = {key: value if isinstance(value, list) else [value] for key, value in table.items() if key in SELECTORS}
    return all(getattr(run, key) in values for key, values in wanted.items())


def _keyed(tree: Any) -> Any:
    """Turn lists of tables into tables by name or number, without unset values, so that edits can be compared."""
    if isinstance(tree, dict):
        return {key: _keyed(value) for key, value in tree.items() if isinstance(value, bool) or value}
    if isinstance(tree, list) and all(isinstance(item, dict) for item in tree):
        keyed = {str(item.get("name", number)): item for number, item in enumerate(tree)}
        return {key: _keyed({name: item[name] for name in item if name != "name"}) for key, item in keyed.items()}
    return tree
