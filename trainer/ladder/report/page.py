"""A ladder's report as one page: show/templates/ladder.html."""

from collections.abc import Sequence

from trainer.ladder.report.drawing import final
from trainer.ladder.report.estimates import Tree
from trainer.ladder.report.pictures import Picture
from trainer.ladder.stats.records import BASELINE
from trainer.show import page

DECISIONS = ("promote", "reject", "inconclusive")


def html(tree: Tree, pictures: Sequence[Picture]) -> str:
    """Return the whole report as one HTML document. `tree` may lack "course"; the page then says nothing of times."""
    execution = tree.get("course")
    decisions = {arm["name"]: final(tree, arm["name"]) for arm in tree["arms"]}
    timed = {
        (verdict["arm"], rung["rung"]): rung
        for verdict in (execution["verdicts"] if execution else [])
        for rung in verdict["rungs"]
    }  # fmt: skip
    decided = [verdict["decision"] for verdict in decisions.values() if verdict]
    commits = execution["commits"] if execution else []
    return page.render(
        "ladder.html",
        tree=tree,
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
