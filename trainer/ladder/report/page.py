"""A ladder's report as one page (show/templates/ladder.html), and its pictures: all that the data allow.

A run that is missing leaves a gap; no line is drawn over it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.ladder.report import forest, losses, multipliers
from trainer.ladder.report.drawing import axis_of, final
from trainer.ladder.report.estimates import Tree
from trainer.ladder.stats.records import BASELINE, SCARCE, UNITS
from trainer.show import figure, page

DECISIONS = ("promote", "reject", "inconclusive")
KINDS: Sequence[tuple[str, Callable[[Tree], Any], str, str]] = (
    (
        "multiplier", multipliers.draw, "Multiplier against {scarce}",
        "How many times more {scarce} the baseline would need to reach the arm's loss. Points: each rung alone. "
        "Line and band: all rungs, extrapolated to the target over all forms that the data allow. "
        "Thin lines: three of these forms. A verdict must hold under all of them.",
    ),
    (
        "loss", losses.draw, "Loss against {scarce}",
        "Above: means over seeds, each seed faint. Below: the same minus the baseline's curve, arms side by side. A "
        "run without a result leaves a gap.",
    ),
    (
        "prediction", forest.draw_predictions, "Predictions against observations",
        "Each row was predicted from the smaller rungs alone, the target from all of them. An observation outside its "
        "interval was predicted wrongly.",
    ),
    (
        "cost", forest.draw_cost, "Worth in compute and in time",
        "What an arm is worth in compute, and in time if steps keep the duration measured here. Times are those of a "
        "run's fastest steps: sharing a machine only makes steps slower.",
    ),
)  # fmt: skip
"""(name, drawing function, which returns None if there is nothing to draw, title, caption) of each picture; "{scarce}"
stands for what the rungs are amounts of."""
NAMES = [name for name, *_ in KINDS]
MOST_DRAWN = 12
"""Arms that pictures show; nobody reads two hundred panels, and they would take a minute."""
BY_ARM = ("runs", "noise", "verdicts", "predictions", "multiplier_predictions")
"""Lists of the tree whose rows each belong to an arm."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    png: bytes
    svg: str
    """An SVG element; its ids begin with the picture's name."""


def draw(tree: Tree) -> list[Picture]:
    """Draw all pictures for which the report has something to show."""
    found, note = [], ""
    if (arms := len(tree["arms"])) > MOST_DRAWN:
        tree, note = _of_some_arms(tree), f" Of {arms} arms, the {MOST_DRAWN} that promise most; tables have all."
    scarce = SCARCE[axis_of(tree)]
    for name, make, *texts in KINDS:
        title, caption = (text.format(scarce=scarce) for text in texts)
        with figure.style():
            drawn = make(tree)
        if drawn is not None:
            svg = figure.svg(drawn, name, f"{tree['name']}: {title}")
            found.append(Picture(name, title, caption + note, figure.png(drawn), svg))
    return found


def _of_some_arms(tree: Tree) -> Tree:
    """The tree of the arms that are worth most at the target, as far as is known."""
    worth = {verdict["arm"]: verdict["multiplier"]["value"] or 0.0 for verdict in tree["verdicts"]}
    names = [arm["name"] for arm in tree["arms"]]
    kept = {BASELINE, *sorted(names, key=lambda name: -worth.get(name, 0.0))[:MOST_DRAWN]}
    found = tree | {key: [row for row in tree[key] if row["arm"] in kept] for key in BY_ARM}
    found["arms"] = [arm for arm in tree["arms"] if arm["name"] in kept]
    found["lines"] = {arm: line for arm, line in tree["lines"].items() if arm in kept}
    return found


def html(tree: Tree, pictures: Sequence[Picture]) -> str:
    """Return the whole report as one HTML document. `tree` may lack "course"; the page then says nothing of times."""
    # Of a table's runs nothing is known but what they cost.
    execution = None if "table" in tree else tree.get("course")
    decisions = {arm["name"]: final(tree, arm["name"]) for arm in tree["arms"]}
    timed = {
        (verdict["arm"], rung["rung"]): rung
        for verdict in tree.get("course", {}).get("verdicts", [])
        for rung in verdict["rungs"]
    }  # fmt: skip
    decided = [verdict["decision"] for verdict in decisions.values() if verdict]
    commits = execution["commits"] if execution else []
    return page.render(
        "ladder.html",
        tree=tree,
        scarce=SCARCE[axis_of(tree)],
        unit=UNITS[axis_of(tree)],
        on_data=axis_of(tree) == "data",
        pictures=pictures,
        execution=execution,
        baseline=BASELINE,
        decisions=decisions,
        decided={name: number for name in DECISIONS if (number := decided.count(name))},
        by_losses={verdict["arm"]: verdict["decision"] for verdict in tree["verdicts"]},
        rungs=[
            {"arm": verdict["arm"]} | rung | timed.get((verdict["arm"], rung["rung"]), {})
            for verdict in tree["verdicts"]
            for rung in verdict["rungs"]
        ],
        arms=[BASELINE, *decisions],
        noise={(noise["rung"], noise["arm"]): noise for noise in tree["noise"]},
        executions={run["key"]: run for run in (execution["runs"] if execution else [])},
        # A longer name than its 40 digits: there were local changes, and a checkout would not give them back.
        clean_commit=commits[0] if len(commits) == 1 and len(commits[0]) == 40 else None,
        changed=_changed,
        span=_span,
    )


def _changed(before: Tree, after: Tree) -> str:
    """The criterion's changed keys: "min_gain 1.02 → 1.01"."""
    return ", ".join(f"{key} {before.get(key)} → {value}" for key, value in after.items() if before.get(key) != value)


def _span(rungs: Sequence[str]) -> str:
    """Names of rungs; many are shortened to "first to last"."""
    return ", ".join(rungs) if len(rungs) <= 3 else f"{rungs[0]} to {rungs[-1]}"
