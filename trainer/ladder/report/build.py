"""A ladder's report as one JSON tree, which is also report.json; page, pictures and terminal are made from it alone.

All of it is a function of the runs' results, except the subtree "course": that describes this execution of the runs,
and would differ if they were run again or had been killed on the way (execution.py).

A ladder over data has "axis": "data". Every "flops" of its fit, curve, lines, predictions and verdicts is then an
amount of unique text, in tokens; those of rungs and runs remain FLOPs, beside their "unique_tokens".
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer import files
from trainer.errors import FitError
from trainer.fleet.run_store import RunState
from trainer.ladder import collect, preregistration, tuning
from trainer.ladder.collect import CollectedRun
from trainer.ladder.plan.ladder import FIT_RUNGS, TARGET, Ladder, PlannedRun
from trainer.ladder.report import downstream, estimates, execution
from trainer.ladder.report.estimates import EstimatePlan, Tree
from trainer.ladder.stats import overfitting, repetition
from trainer.ladder.stats.records import BASELINE, plain
from trainer.ladder.tuning import Choice
from trainer.show import units

FORMAT = 1
EPOCHS = (2, 4, 8, 16, 32)
"""Epochs whose worth a report over data shows."""
EXECUTION = "course"
"""Key of the subtree that describes the execution."""
RESULT_KEYS = (
    "arm", "rung", "seed", "rate", "key", "status", "flops", "parameters", "tokens", "steps", "loss", "digest",
    "spikes", "weights_sha256",
)  # fmt: skip
"""Fields of CollectedRun that are the same however it was executed."""


# States of a run whose learning rate is not known.
UNKNOWN_RATE = RunState("waiting", reason="its learning-rate sweep has not finished")
FAILED = RunState("missing", reason="no run of its learning-rate sweep finished")


@dataclass(frozen=True)
class CollectedLadder:
    """A ladder with everything that is known of its runs: all that a report is made from."""

    ladder: Ladder
    runs: Sequence[CollectedRun]
    """One for each run of the ladder."""
    sweep: Sequence[CollectedRun] = ()
    """Runs of the learning-rate sweeps."""
    choices: Sequence[Choice] = ()
    """Learning rates that the sweeps chose."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """ladder.json."""
    members: Sequence[CollectedRun] = ()
    """Runs of ensembles; runs that are taught, and their teachers."""

    @property
    def made(self) -> list[CollectedRun]:
        """All runs but a sweep's: what is made of several is represented by its members."""
        return [run for run in [*self.runs, *self.members] if not run.members]


def collect_ladder(ladder: Ladder, out: Path) -> CollectedLadder:
    """Read a ladder's runs from their files as they are now. Raises RunDirectoryError if OUT is another ladder's."""
    pool = preregistration.pool_of(out)
    preregistration.compare(ladder, out)
    record, chosen = preregistration.read(out), tuning.choices(ladder, pool)
    # A run whose learning rate is still being swept has no final config, so it is in no directory.
    final = tuning.final(ladder, chosen)
    known = dict(zip(map(_identity, final), collect.collect_runs(ladder, pool, final), strict=True))
    failed = {(choice.rung, choice.arm) for choice in chosen if choice.failed}
    return CollectedLadder(
        ladder,
        [
            known.get(_identity(planned))
            or CollectedRun.of(planned, FAILED if (planned.rung, planned.arm) in failed else UNKNOWN_RATE)
            for planned in ladder.runs
        ],
        collect.collect_runs(ladder, pool, ladder.sweep),
        chosen,
        record.model_dump() if record else {},
        collect.collect_runs(ladder, pool, [member for planned in final for member in planned.members]),
    )


def _identity(planned: PlannedRun) -> tuple[str, str, int]:
    return planned.rung, planned.arm, planned.seed


def build_report(collected: CollectedLadder) -> Tree:
    """Return the report as JSON values."""
    ladder = collected.ladder
    results, on_data = collect.run_results(collected.runs, ladder.axis), ladder.axis == "data"
    arms = sorted(ladder.arms, key=lambda arm: arm.is_aa)  # the noise floor comes after what is judged
    plan = EstimatePlan(ladder, collected.runs)
    tree = {
        "format": FORMAT, "name": ladder.name, "question": ladder.file.question,
        "file": short_path(ladder.path), "baseline": short_path(ladder.path.parent / ladder.file.baseline),
        "metric": ladder.file.metric, "unit": ladder.file.unit, "criterion": ladder.criterion.to_json(),
        "target": {"flops": ladder.target_flops, "rung": TARGET, "size": ladder.target and ladder.target.to_json()},
        "rungs": [rung.to_json() for rung in ladder.rungs],
        "arms": [
            {"name": arm.name, "question": arm.question, "changes": arm.settings, "combines": list(arm.combines),
             "unchanged": arm.is_aa}
            for arm in arms
        ],
        "notices": list(ladder.notices),
        "counts": dict(Counter(run.status for run in _distinct(collected.made))),
        "runs": [
            _run(run) | ({"unique_tokens": run.unique_tokens} if on_data else {})
            | ({"downstream": run.downstream} if ladder.file.downstream else {})
            for run in collected.runs
        ],
        "sweeps": [choice.to_json() for choice in collected.choices],
        "flops": _finished_flops(collected.made), "sweep_flops": _finished_flops(collected.sweep),
        **estimates.estimate(results, plan),
    }  # fmt: skip
    if on_data:
        tree["axis"] = ladder.axis
        tree["target"] |= {"flops": ladder.target_flops or None, "unique_tokens": ladder.target_unique_tokens}
        for arm in tree["arms"]:
            arm["compute"] = _compute_ratio(arm["name"], collected.runs)
        tree["repetition"] = _repetition(collected)
    if name := ladder.file.downstream:
        known = {(run.arm, run.rung, run.seed): run.downstream for run in collected.runs if run.downstream is not None}
        below = [result for result in results if result.rung != TARGET]
        tree["downstream"] = downstream.estimate(name, known, below, tree, plan.target)
        tree["notices"] += downstream.cautions(tree["downstream"])
    if len(ladder.rungs) < FIT_RUNGS and tree["no_fit"]:
        few = units.plural(len(ladder.rungs), "rung")
        tree["no_fit"] = f"the ladder has {few}, and a curve of {FIT_RUNGS} parameters needs {FIT_RUNGS}."
    verdicts = tree["verdicts"]
    described = execution.describe(
        collected.runs, collected.made, collected.sweep, results, plan, collected.record, verdicts
    )
    return tree | {EXECUTION: described}


def without_execution(tree: Tree) -> Tree:
    """Return the part that is the same to the byte whenever the runs were made, and however often interrupted."""
    return {key: value for key, value in tree.items() if key != EXECUTION}


def _run(run: CollectedRun) -> Tree:
    """A run's results. A loss of None beside `diverged` was not finite."""
    diverged = run.loss is not None and not math.isfinite(run.loss)
    reason = without_home(run.reason) if run.reason else None
    return {key: plain(getattr(run, key)) for key in RESULT_KEYS} | {"diverged": diverged, "reason": reason}


def _compute_ratio(arm: str, runs: Sequence[CollectedRun]) -> float | None:
    """Compute of an arm's runs over that of the baseline's at the largest rung that both have."""
    flops = {(run.arm, run.rung): run.flops for run in runs}
    shared = [run.rung for run in runs if run.arm == arm and (BASELINE, run.rung) in flops]
    return flops[arm, shared[-1]] / flops[BASELINE, shared[-1]] if shared else None


def _repetition(collected: CollectedLadder) -> Tree:
    """Describe the worth of text read again, by the baseline's runs and those that differ in epochs or size alone."""
    alike = _alike(collected.ladder)
    runs = [run for run in collected.runs if run.arm in alike and run.loss is not None and math.isfinite(run.loss)]
    if not runs:
        return {"refused": "no run has finished."}
    columns = ("parameters", "tokens", "unique_tokens", "loss")
    level = collected.ladder.criterion.level
    try:
        values = [np.array([float(getattr(run, name)) for run in runs]) for name in columns]
        law = repetition.fit(*values, level=level)
    except FitError as error:
        return {"refused": str(error)}
    rungs = []
    for rung in collected.ladder.rungs:
        worth = law.worth_of(rung.tokens / rung.unique_tokens)
        found = {"rung": rung.name, "unique_tokens": rung.unique_tokens, "epochs": rung.tokens / rung.unique_tokens}
        missing = None if worth.value is None else rung.unique_tokens * (worth.value - 1)
        rungs.append(found | {"worth": worth.to_json(), "missing": missing})
    return law.to_json() | {
        "refused": None,
        "last_paying_epoch": law.last_paying_epoch().to_json(),
        "epochs": [{"epoch": n, "value": law.value_of_epoch(n).to_json()} for n in EPOCHS],
        "rungs": rungs,
        "penalty": _penalty(values, collected.ladder, level),
    }


def _alike(ladder: Ladder) -> set[str]:
    """The arms that one law of repeated text describes: they change epochs, size or draw alone."""
    axis = {"sizes.epochs", "sizes.run_tokens", "model.init_draw", "model.width", "model.n_layers", "model.n_heads"}
    return {BASELINE} | {arm.name for arm in ladder.arms if arm.settings.keys() <= axis}


def _penalty(values: Sequence[np.ndarray], ladder: Ladder, level: float) -> Tree:
    """The same by a law in which text that is read again can harm."""
    try:
        found = overfitting.fit(*values, level=level)
    except FitError as error:
        return {"refused": str(error)}
    best = [
        {"rung": rung.name, "epochs": found.best_epochs(rung.parameters, rung.unique_tokens).to_json()}
        for rung in ladder.rungs
    ]
    return found.law.to_json() | {"refused": None, "rungs": best}


def _distinct(runs: Sequence[CollectedRun]) -> list[CollectedRun]:
    """Each run once, however many arms it serves."""
    return list({run.key: run for run in runs}.values())


def _finished_flops(runs: Sequence[CollectedRun]) -> float:
    return math.fsum(run.flops for run in _distinct(runs) if run.status == "finished")


# A report is shown to others: no path in it may name the user's directories.


def short_path(path: Path) -> str:
    """The path relative to the working directory, else its last two parts."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return "/".join(path.resolve().parts[-2:])


def without_home(text: str) -> str:
    """The text with paths below the working directory made relative, and those below the home directory "~/…"."""
    for place, name in ((Path.cwd(), ""), (files.home(), "~/")):
        if place and str(place) != "/":
            text = text.replace(f"{place}/", name)
    return text
