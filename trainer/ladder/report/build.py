"""A ladder's report as one plain tree, which is also report.json: all its other forms are drawn from this alone.

Everything in it is a function of what the runs came to, but for the sub-tree "course": that holds what would be another
if the same ladder were run again, or had been killed on its way (course.py).
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.ladder import collect, preregistration, run, tuning
from trainer.ladder.collect import CollectedRun
from trainer.ladder.plan.ladder import FIT_RUNGS, TARGET, Ladder, PlannedRun
from trainer.ladder.report import estimates, execution
from trainer.ladder.report.estimates import Plan, Tree
from trainer.ladder.stats.records import BASELINE
from trainer.ladder.tuning import Choice

FORMAT = 1
COURSE = "course"


@dataclass(frozen=True)
class Facts:
    """What a report is made of."""

    ladder: Ladder
    runs: Sequence[CollectedRun]
    """One for each run of the ladder."""
    sweep: Sequence[CollectedRun] = ()
    """The runs of learning-rate sweeps."""
    choices: Sequence[Choice] = ()
    """What those came to."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """ladder.json."""


def look(ladder: Ladder, out: Path) -> Facts:
    """From the files as they are now. Raises RunDirectoryError if OUT is another ladder's."""
    pool = run.pool_of(out)
    preregistration.compare(ladder, out, pool)
    final = tuning.final(ladder, pool)
    known = dict(zip(map(_place, final), collect.collect_runs(ladder, pool, final), strict=True))
    failed = tuning.failed(ladder, pool)
    return Facts(
        ladder,
        [known.get(_place(one)) or _not_begun(one, failed.get((one.rung, one.arm))) for one in ladder.runs],
        collect.collect_runs(ladder, pool, ladder.sweep),
        tuning.choices(ladder, pool),
        preregistration.read(out) or {},
    )


def _place(planned: PlannedRun) -> tuple[str, str, int]:
    return planned.rung, planned.arm, planned.seed


def _not_begun(planned: PlannedRun, failed: str | None) -> CollectedRun:
    """A run whose learning rate is not known yet, or never will be."""
    return CollectedRun(
        planned.arm, planned.rung, planned.seed, None, planned.key, "missing" if failed else "waiting",
        failed or "its learning-rate sweep goes on", planned.flops, planned.parameters, planned.tokens,
        planned.config.budget.steps, 0,
    )  # fmt: skip


def tell(facts: Facts) -> Tree:
    """The tree."""
    ladder, results = facts.ladder, collect.run_results(facts.runs)
    plan = _plan(facts)
    tree = {
        "format": FORMAT, "name": ladder.name, "question": ladder.question,
        "file": short(ladder.path), "baseline": short(ladder.baseline),
        "metric": ladder.metric, "unit": ladder.unit, "criterion": ladder.criterion.to_json(),
        "target": {"flops": ladder.target_flops, "rung": TARGET, "size": _rung(ladder.target)},
        "rungs": [_rung(rung) for rung in ladder.rungs],
        "arms": [
            {"name": arm.name, "question": arm.question, "changes": arm.settings, "combines": list(arm.combines),
             "unchanged": arm.is_aa}
            for arm in ladder.arms
        ],
        "notices": list(ladder.notices),
        "counts": dict(Counter(one.status for one in _distinct(facts.runs))),
        "runs": [_run(one) for one in facts.runs],
        "sweeps": [choice.to_json() for choice in facts.choices],
        "flops": _flops(facts.runs), "sweep_flops": _flops(facts.sweep),
        **_estimates(results, plan),
    }  # fmt: skip
    return tree | {COURSE: execution.of(facts.runs, facts.sweep, results, plan, facts.record, tree["fit"] is not None)}


def without_course(tree: Tree) -> Tree:
    """What must be the same, byte for byte, whenever and however often interrupted the ladder's runs were made."""
    return {key: value for key, value in tree.items() if key != COURSE}


def _plan(facts: Facts) -> Plan:
    ladder = facts.ladder
    flops = {(one.rung, one.arm): one.flops for one in facts.runs}
    flops |= {(rung.name, BASELINE): rung.flops for rung in ladder.rungs}
    flops[TARGET, BASELINE] = ladder.target_flops
    seeds = {rung.name: len(rung.seeds) for rung in ladder.all_rungs}
    arms = [arm.name for arm in ladder.arms]
    unchanged = [arm.name for arm in ladder.arms if arm.is_aa]
    rungs = [rung.name for rung in ladder.rungs]
    return Plan(ladder.criterion, rungs, TARGET, flops, ladder.target_flops, seeds, arms, unchanged)


def _estimates(results: Sequence[Any], plan: Plan) -> Tree:
    tree = estimates.of(results, plan)
    if len(plan.rungs) < FIT_RUNGS and tree["no_fit"]:
        few = f"{len(plan.rungs)} rung{'' if len(plan.rungs) == 1 else 's'}"
        tree["no_fit"] = f"the ladder has {few}, and a curve of {FIT_RUNGS} parameters needs {FIT_RUNGS}."
    return tree


def _rung(rung: Any) -> Tree | None:
    if rung is None:
        return None
    return {
        "name": rung.name, "width": rung.shape.width, "n_layers": rung.shape.n_layers, "n_heads": rung.shape.n_heads,
        "parameters": rung.parameters, "tokens": rung.tokens, "flops": rung.flops, "seeds": list(rung.seeds),
    }  # fmt: skip


RESULT = (
    "arm", "rung", "seed", "rate", "key", "status", "flops", "parameters", "tokens", "steps", "loss", "digest",
    "spikes", "weights_sha256",
)  # fmt: skip


def _run(one: CollectedRun) -> Tree:
    """What it came to; a loss of None beside diverged was not a number."""
    plain = one.to_json()
    told = {key: plain[key] for key in RESULT}
    diverged = one.loss is not None and not math.isfinite(one.loss)
    return told | {"diverged": diverged, "reason": private(one.reason) or None}


def _distinct(runs: Sequence[CollectedRun]) -> list[CollectedRun]:
    """Each run once, however many arms it serves."""
    return list({one.key: one for one in runs}.values())


def _flops(runs: Sequence[CollectedRun]) -> float:
    """Of the runs that finished."""
    return math.fsum(one.flops for one in _distinct(runs) if one.status == "finished")


# Nobody's directories


def short(path: Path) -> str:
    """As seen from here, else its last two parts."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return "/".join(path.resolve().parts[-2:])


def private(text: str) -> str:
    """Without the directories that this user's files happen to lie in."""
    for place, name in ((f"{Path.cwd()}/", ""), (f"{Path.home()}/", "~/")):
        text = text.replace(place, name) if len(place) > 2 else text
    return text
