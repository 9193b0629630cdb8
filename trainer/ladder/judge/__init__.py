"""A verdict on runs that were made elsewhere: a table of their results is judged as a ladder's runs are.

table.py reads the rows; meaning.py finds out what they say, and all that is wrong with them. Here they become the
records that collect.py makes of a ladder's own runs: fit, verdicts and report are the same from there on, also for runs
on no one line of compute. What was guessed, derived or left out is said in the report's notices.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from trainer import tomlfile
from trainer.errors import ConfigError
from trainer.ladder import collect
from trainer.ladder.collect import CollectedRun
from trainer.ladder.judge import meaning, table
from trainer.ladder.judge.meaning import TableRun
from trainer.ladder.judge.table import Table
from trainer.ladder.plan.ladder import Ladder, PlannedArm, PlannedRung
from trainer.ladder.plan.schema import CriterionTable, LadderFile
from trainer.ladder.plan.sizes import Shape
from trainer.ladder.report import build, downstream, surface
from trainer.ladder.report.build import CollectedLadder
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats import planes
from trainer.ladder.stats.records import BASELINE, Criterion
from trainer.ladder.stats.significance import LACK_OF_FIT
from trainer.show.units import scientific

REACH = 10.0
"""Without a target, verdicts are about this multiple of the largest rung's compute."""


def judge(
    source: str, *, columns: Mapping[str, str] | None = None, baseline: str | None = None,
    criterion: Criterion | None = None, target_flops: float | None = None, more_is_better: bool | None = None,
) -> Tree:  # fmt: skip
    """Judge a table of runs and return the report's tree.

    `columns` maps roles (ROLES) to columns; what it leaves out is guessed by name, and "" leaves a role without a
    column. `baseline` is the arm that the others are compared with. Raises ConfigError naming every fault of the table.
    """
    found, criterion = table.read(source), criterion or Criterion()
    chosen = meaning.choose_columns(found, columns or {})
    metric = chosen["loss"]
    words = set(meaning.words(metric).split("_"))
    more = bool(words & set(meaning.MORE_IS_BETTER)) if more_is_better is None else more_is_better
    notices = [meaning.describe(found, chosen, columns or {})]
    problems = list(found.problems)
    runs = meaning.read_runs(found, chosen, more, notices, problems)
    is_loss = not more and not words & {"perplexity", "ppl"}
    problems += meaning.contradictions(found, runs, "seed" in chosen, is_loss)
    if problems or not runs:
        why = " ".join(notices[1:]) or f"Every row lacks {metric}."
        raise ConfigError(problems or [f"{source} has no run with a result that can be judged.\n  {why}"])
    runs = meaning.with_baseline(found, runs, baseline, notices)
    runs = meaning.in_nats(runs, metric, more, notices)
    base = [run for run in runs if run.arm == BASELINE and run.params and run.tokens and math.isfinite(run.loss)]
    apart = planes.is_surface(*(np.array([getattr(run, name) for run in base]) for name in ("params", "tokens")))
    if apart and meaning.one_for_each_compute(runs):
        apart, runs = False, [replace(run, params=None, tokens=None) for run in runs]
        notices.append(
            "Parameters and tokens vary apart, and no arm has a size of the baseline's: "
            "runs are compared by their compute alone."
        )
    runs = meaning.with_seeds(meaning.with_rungs(runs, apart), notices)
    if crowded := meaning.crowded(found, runs):
        raise ConfigError(crowded)
    if any(run.seconds and not run.tokens for run in runs):
        notices.append("Seconds of runs without tokens are not used: steps are compared by seconds per token.")
    largest = max(run.flops for run in runs)
    if target_flops is None:
        target_flops = REACH * largest
        notices.append(f"No target was given: verdicts are about {REACH:g}× the largest run's compute.")
    elif not largest <= target_flops < math.inf:
        raise ConfigError([
            f"--target {target_flops:g} is no finite amount from the largest run's {scientific(largest)} FLOPs on.\n"
            "  A verdict is about a scale that was not run. Give a larger target, or leave out the runs above it."
        ])  # fmt: skip
    unit = "bits_per_byte" if words & {"bpb"} or "bits" in words else "nats_per_token"
    tree = _report(found, runs, notices, metric, unit, criterion, target_flops)
    shown = build.short_path(Path(source))
    tree["table"] = {"source": shown, "columns": chosen, "command": f"python -m trainer judge {shown}"}
    if "downstream" in chosen:
        results = collect.run_results([_collected(run) for run in runs])
        known = {(run.arm, run.rung, run.seed or 0): run.metric for run in runs if run.metric is not None}
        most = meaning.most_of_share(chosen["downstream"], list(known.values()))
        tree["downstream"] = downstream.estimate(chosen["downstream"], known, results, tree, target_flops, most)
    tree["notices"] += _cautions(tree)
    return tree


def named_columns(options: Iterable[str]) -> dict[str, str]:
    """Return {role: column} of options like "arm=recipe". Raises ConfigError."""
    wrong = [option for option in options if "=" not in option]
    if wrong:
        raise ConfigError([f"--column {option} names no column.\n  Write --column ROLE=NAME." for option in wrong])
    return {role.strip(): name.strip() for role, _, name in (option.partition("=") for option in options)}


def read_criterion(path: Path) -> Criterion:
    """Read a file with the settings of a ladder's [criterion], with or without that heading. Raises ConfigError."""
    tree = tomlfile.read(path)
    try:
        return Criterion(**CriterionTable.model_validate(tree.get("criterion", tree)).model_dump())
    except ValidationError as error:
        mistakes = tomlfile.mistakes(error, tree.get("criterion", tree))
        raise ConfigError([f"{path}: {tomlfile.explain(it, CriterionTable, 'criterion')}" for it in mistakes]) from None


# The report


def _report(
    found: Table, runs: Sequence[TableRun], notices: list[str], metric: str, unit: str, criterion: Criterion,
    target_flops: float,
) -> Tree:  # fmt: skip
    """The tree of a ladder's report, without what a table does not know of its runs."""
    rungs = []
    for name in dict.fromkeys(run.rung for run in sorted(runs, key=lambda run: (run.arm != BASELINE, run.flops))):
        at = [run for run in runs if run.rung == name]
        base = next((run for run in at if run.arm == BASELINE), at[0])
        seeds = tuple(run.seed or 0 for run in at if run.arm == base.arm)
        rungs.append(PlannedRung(name, Shape(0, 0, 0), _whole(base.params), _whole(base.tokens), base.flops, seeds))
    rungs.sort(key=lambda rung: rung.flops)
    arms = [PlannedArm(arm, "", {}) for arm in dict.fromkeys(run.arm for run in runs) if arm != BASELINE]
    name, path = Path(found.source).stem or found.source, Path(found.source)
    file = LadderFile.model_construct(
        question="What do these runs say about a larger scale?", baseline=path.name, metric=metric, unit=unit
    )
    ladder = Ladder(name, path, file, criterion, rungs, arms, target_flops, None, [], notices, {})
    tree = build.build_report(CollectedLadder(ladder, [_collected(run) for run in runs]))
    for entry, run in zip(tree["runs"], runs, strict=True):
        entry |= {"parameters": run.params, "tokens": run.tokens, "steps": None, "place": run.place}
    for rung in tree["rungs"]:
        rung |= dict.fromkeys(("width", "n_layers", "n_heads"))
    # A table knows no attempts and no faults, and without seconds the verdict by losses stands.
    timed = tree.pop(build.EXECUTION)["verdicts"]
    if any(run.seconds and run.tokens for run in runs):
        tree[build.EXECUTION] = {"verdicts": timed}
    return tree


def _whole(value: float | None) -> int:
    return 1 if value is None else round(value)


def _collected(run: TableRun) -> CollectedRun:
    # Seconds mean something only per token; a table's runs are taken as made on one machine.
    seconds = run.seconds if run.tokens else None
    return CollectedRun(
        run.arm, run.rung, run.seed or 0, None, run.place, "finished", "", run.flops, _whole(run.params),
        _whole(run.tokens), 0, 0, loss=run.loss, seconds=seconds, undisturbed_seconds=seconds, machine=("table", "", 1),
    )  # fmt: skip


def _cautions(tree: Tree) -> list[str]:
    """Return the signs that a form does not hold for these runs, and so hardly for the target."""
    found = surface.cautions(tree["surface"]) if "surface" in tree else []
    if "surface" in tree and tree["arms"]:
        found.append(
            "Arms are compared size by size: by how much more compute, at the same tokens per parameter, the baseline "
            "would need for their loss, as its surface has it."
        )
    found += downstream.cautions(tree["downstream"]) if "downstream" in tree else []
    if tree["fit"] and (tree["fit"]["lack_of_fit_p"] or 1.0) < LACK_OF_FIT:
        found.append("The curve E + A·C^−α does not fit the baseline's rungs: do not trust its target.")
    return found + [
        f"The curve fitted to the smaller rungs misses {guess['rung']} by {guess['relative_error']:+.1%}, outside its "
        "interval: do not trust its target."
        for guess in tree["predictions"]
        if guess["arm"] == BASELINE and guess["inside"] is False
    ]
