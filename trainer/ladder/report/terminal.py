"""A ladder's report on a terminal: verdicts with their reasons, the baseline's curve, what is missing."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from trainer.ladder import terminal as tables
from trainer.ladder.report.drawing import decision
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE
from trainer.show import units

if TYPE_CHECKING:
    from rich.console import RenderableType

STYLES = {"promote": "bold green", "reject": "red", "inconclusive": "yellow"}


def terminal(tree: Tree) -> "RenderableType":
    """Legible at 100 columns, uncoloured."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text.assemble(("ladder ", "dim"), (tree["name"], "bold"), f"  {tree['question']}"), Text()]
    if tree["no_fit"] is not None:
        parts += [Text(f"no fit: {tree['no_fit']}", "yellow"), Text(), _means(tree), Text()]
    if tree["verdicts"]:
        parts += [_verdicts(tree), Text()]
        for arm in tree["arms"]:
            parts += _why(tree, arm["name"])
        parts.append(Text())
    parts += [Text(line, "dim", overflow="fold") for line in _lines(tree)]
    parts += [
        Text.assemble((f"missing: {run['rung']} {run['arm']} seed {run['seed']}: ", "bold red"), run["reason"] or "?")
        for run in tree["runs"]
        if run["status"] == "missing"
    ]
    return Group(*parts)


def _verdicts(tree: Tree) -> Any:
    from rich.text import Text

    table = tables.empty_table("arm", "verdict", "at the target", "in time", "trend", "a step takes")
    for arm in tree["arms"]:
        one = decision(tree, arm["name"])
        if one is None:
            continue
        name = one["decision"]
        table.add_row(
            Text(one["arm"]), Text(f"{units.SIGNS[name]} {name}", STYLES[name]),
            units.ratio_interval(one["multiplier"]), units.ratio(one.get("wall_clock", {}).get("value")),
            units.TRENDS[one["trend"]], units.ratio(one.get("slowdown", {}).get("value")),
        )  # fmt: skip
    return table


def _why(tree: Tree, arm: str) -> Iterator[Any]:
    from rich.text import Text

    one = decision(tree, arm)
    if one is None:
        return
    said = Text.assemble((f"{arm}: ", "bold"), (one["decision"], STYLES[one["decision"]]), f". {one['why']}")
    settle = units.remedies(one["remedies"])
    if settle:
        said.append(f" It would take {settle}.")
    yield said


def _means(tree: Tree) -> Any:
    """What there is to see without a fit."""
    from rich.text import Text

    arms = [BASELINE, *(arm["name"] for arm in tree["arms"])]
    known = {(one["rung"], one["arm"]): one for one in tree["noise"]}
    table = tables.empty_table("rung", *(Text(arm).markup for arm in arms))
    for rung in dict.fromkeys(one["rung"] for one in tree["noise"]):
        cells = [known.get((rung, arm)) for arm in arms]
        table.add_row(Text(rung), *("–" if cell is None else units.mean_and_sd(cell) for cell in cells))
    return table


def _lines(tree: Tree) -> Iterator[str]:
    fit = tree["fit"]
    if fit is not None:
        yield (
            f"baseline: E {units.loss_interval(fit['E'], 3)}, α {units.loss_interval(fit['alpha'], 3)}, "
            f"seeds' sd {units.loss(fit['seed_sd'])}, lack of fit p {units.p_value(fit['lack_of_fit_p'])}"
        )
    for one in tree["predictions"]:
        if one["arm"] == BASELINE and one["predicted"] is not None:
            came = "not run" if one["observed"] is None else f"came out {units.loss(one['observed'])}"
            yield f"predicted for {one['rung']}: {units.loss_interval(one['predicted'])}, {came}"
    course = tree.get("course")
    counts = ", ".join(f"{number} {status}" for status, number in tree["counts"].items())
    hours = f" in {units.duration(course['time']['busy_seconds'])}" if course else ""
    yield f"runs: {counts or 'none'}; {units.flops(tree['flops'] + tree['sweep_flops'])} FLOPs{hours}"
    if course and (made := course["survived"]["faults"]):
        kinds = ", ".join(f"{one['survived']} of {one['made']} {kind}" for kind, one in made.items())
        yield f"faults survived: {kinds}"
