"""A ladder's report on a terminal: verdicts with their reasons, the baseline's curve, what is missing."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from trainer.ladder import terminal as tables
from trainer.ladder.report.drawing import NOISE_FLOOR, axis_of, final
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE, UNITS
from trainer.show import units

STYLES = {"promote": "bold green", "reject": "red", "inconclusive": "yellow", NOISE_FLOOR: "dim"}


def terminal(tree: Tree) -> RenderableType:
    """Return the report for a terminal: legible at 100 columns, and without colours."""
    kind = "table " if "table" in tree else "ladder "
    parts: list[Any] = [Text.assemble((kind, "dim"), (tree["name"], "bold"), f"  {tree['question']}"), Text()]
    if "table" in tree:  # what was guessed, derived or left out
        parts += [*(Text(notice, "yellow", overflow="fold") for notice in tree["notices"]), Text()]
    if tree["no_fit"] is not None:
        parts += [Text(f"no fit: {tree['no_fit']}", "yellow"), Text()]
        parts += [] if tree.get("surface") else [_means(tree), Text()]
    if verdicts := [verdict for arm in tree["arms"] if (verdict := final(tree, arm["name"]))]:
        parts += [_table(tree, verdicts), Text()]
        for verdict in verdicts:
            name, remedies = verdict["decision"], units.remedies(verdict["remedies"], UNITS[axis_of(tree)])
            why = f". {verdict['why']}{f' It may be settled by {remedies}.' if remedies else ''}"
            parts.append(Text.assemble((f"{verdict['arm']}: ", "bold"), (name, STYLES[name]), why))
        parts.append(Text())
    parts += [Text(line, "dim", overflow="fold") for line in _lines(tree)]
    parts += [
        Text.assemble((f"missing: {run['rung']} {run['arm']} seed {run['seed']}: ", "bold red"), run["reason"] or "?")
        for run in tree["runs"]
        if run["status"] == "missing"
    ]
    return Group(*parts)


def _table(tree: Tree, verdicts: list[Tree]) -> Any:
    if axis_of(tree) == "data":
        return _table_over_data(tree, verdicts)
    table = tables.empty_table("arm", "verdict", "at the target", "in time", "trend", "a step takes")
    for verdict in verdicts:
        name = verdict["decision"]
        table.add_row(
            Text(verdict["arm"]), Text(f"{units.SIGNS[name]} {name}", STYLES[name]),
            units.interval(verdict["multiplier"], units.ratio), units.ratio(verdict.get("wall_clock", {}).get("value")),
            units.TRENDS[verdict["trend"]], units.ratio(verdict.get("slowdown", {}).get("value")),
        )  # fmt: skip
    return table


def _table_over_data(tree: Tree, verdicts: list[Tree]) -> Any:
    compute = {arm["name"]: arm["compute"] for arm in tree["arms"]}
    table = tables.empty_table("arm", "verdict", "× the unique text", "trend", "compute")
    for verdict in verdicts:
        name = verdict["decision"]
        table.add_row(
            Text(verdict["arm"]), Text(f"{units.SIGNS[name]} {name}", STYLES[name]),
            units.interval(verdict["multiplier"], units.ratio), units.TRENDS[verdict["trend"]],
            units.ratio(compute[verdict["arm"]]),
        )  # fmt: skip
    return table


def _means(tree: Tree) -> Any:
    """Mean losses by rung and arm: all there is to show without a fit."""
    arms = [BASELINE, *(arm["name"] for arm in tree["arms"])]
    known = {(noise["rung"], noise["arm"]): units.mean_and_sd(noise) for noise in tree["noise"]}
    table = tables.empty_table("rung", *(Text(arm).markup for arm in arms))
    for rung in dict.fromkeys(noise["rung"] for noise in tree["noise"]):
        table.add_row(Text(rung), *(known.get((rung, arm), "–") for arm in arms))
    return table


def _lines(tree: Tree) -> Iterator[str]:
    fit, execution = tree["fit"], None if "table" in tree else tree.get("course")
    if fit is not None:
        parts = [f"E {units.interval(fit['E'], units.loss, 3)}, α {units.interval(fit['alpha'], units.loss, 3)}"]
        parts += [] if fit["seed_sd"] is None else [f"seeds' sd {units.loss(fit['seed_sd'])}"]
        p = fit["lack_of_fit_p"]
        parts += [] if p is None else [f"lack of fit p = {units.p_value(p)}"]
        yield f"baseline: {', '.join(parts)}"
    law = tree.get("repetition")
    if law and not law["refused"]:
        size = f", R_N {units.bounds(law['R_N'], units.loss, 2)}" if law["R_N"] else ""
        yield (
            f"text read again: R_D {units.bounds(law['R_D'], units.loss, 2)}{size}; an epoch pays up to number "
            f"{units.bounds(law['last_paying_epoch'], units.loss, 1)}"
        )
        if not law["penalty"]["refused"]:
            last = law["penalty"]["rungs"][-1]
            most = units.bounds(last["epochs"], units.loss, 1)
            yield f"if it can harm: the loss at {last['rung']} is lowest after {most} epochs"
    for form in tree.get("surface", {}).get("forms", ()):
        yield f"{form['name']}, {form['formula']}: {form['refused'] or _surface_form(form)}"
    if ranked := tree.get("ranking"):
        order = ", ".join(row["arm"] for row in ranked)
        yield f"by loss at {ranked[0]['rung']} alone, the best first: {order}"
    if down := tree.get("downstream"):
        yield from _downstream(down)
    for guess in tree["predictions"]:
        if guess["arm"] == BASELINE and guess["predicted"] is not None:
            observed = "not run" if guess["observed"] is None else f"observed {units.loss(guess['observed'])}"
            yield f"predicted for {guess['rung']}: {units.interval(guess['predicted'], units.loss)}, {observed}"
    counts = ", ".join(f"{number} {status}" for status, number in tree["counts"].items())
    hours = f" in {units.duration(execution['time']['busy_seconds'])}" if execution else ""
    yield f"runs: {counts or 'none'}; {units.scientific(tree['flops'] + tree['sweep_flops'])} FLOPs{hours}"
    if execution and (faults := execution["survived"]["faults"]):
        yield "faults survived: " + ", ".join(
            f"{number['survived']} of {number['made']} {kind}" for kind, number in faults.items()
        )


def _downstream(down: Tree) -> Iterator[str]:
    if down["refused"]:
        yield f"{down['column']} is not predicted: {down['refused']}"
    for row in down["predictions"]:
        gain = f"; minus the baseline's {units.interval(row['difference'], units.signed)}" if row["difference"] else ""
        yield f"{down['column']} of {row['arm']} at the target: {units.interval(row['metric'], units.loss)}{gain}"


def _surface_form(form: Tree) -> str:
    values = ", ".join(f"{name} {value:.4g}" for name, value in form["values"].items())
    held_out, target = form["held_out"], form["target"]
    return (
        f"{values}; runs lie {units.percent(form['error'])} about it; the largest run, held out: predicted "
        f"{units.loss(held_out['predicted'])}, observed {units.loss(held_out['observed'])} "
        f"({held_out['relative_error']:+.2%}); best at {units.scientific(target['flops'])} FLOPs: "
        f"{units.loss(target['predicted'])} with {units.amount(target['parameters'])} parameters and "
        f"{units.amount(target['tokens'])} tokens"
    )
