"""The decision about an arm, from two verdicts: one by losses alone, and one that also knows how long steps take.

The verdict by losses is the same whenever the ladder is run. Seconds differ between machines and days, so a report
keeps what rests on them apart. Where seconds are known they have the last word: an arm that is worth its compute is
still rejected if its steps are too slow.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from trainer.ladder.stats.records import SCARCE, Axis, RunResult, Verdict

Tree = dict[str, Any]
TIMED = ("slowdown", "wall_clock", "faster_per_flop_slower_per_second")
"""Fields of a verdict and of its rungs that rest on seconds."""
OVERRULED = ("decision", "why", "remedies", "notes", *TIMED)
"""Fields of the verdict by losses that the verdict by time replaces."""


def without_time(results: Iterable[RunResult]) -> list[RunResult]:
    """Return the same runs as if all computed equally fast: judge() of these gives the verdict by losses."""
    return [replace(result, seconds=float(result.tokens)) for result in results]


def loss_tree(verdict: Verdict, axis: Axis = "compute") -> Tree:
    """Return the verdict by losses as JSON, without the fields that rest on seconds."""
    tree = {key: value for key, value in verdict.to_json().items() if key not in TIMED}
    tree["rungs"] = [{key: value for key, value in rung.items() if key not in TIMED} for rung in tree["rungs"]]
    if verdict.decision == "promote":
        assert verdict.lower is not None
        tree["why"] = f"At the target it is worth at least {verdict.lower:.3g}× the baseline's {SCARCE[axis]}."
    return tree


def time_tree(verdict: Verdict) -> Tree:
    """Return what the verdict by time adds to the one by losses or overrules in it, as JSON."""
    tree = verdict.to_json()
    rungs = [{"rung": rung["rung"]} | {key: rung[key] for key in TIMED if key in rung} for rung in tree["rungs"]]
    return {"arm": verdict.arm} | {key: tree[key] for key in OVERRULED} | {"rungs": rungs}


def final_verdict(by_losses: Sequence[Tree], by_time: Sequence[Tree], arm: str) -> Tree | None:
    """Return the arm's verdict by losses with what time overrules, where seconds are known; None without a verdict.

    Takes the trees of `loss_tree` and `time_tree`, as a report keeps them under "verdicts" and "course"/"verdicts".
    """
    losses = next((verdict for verdict in by_losses if verdict["arm"] == arm), None)
    time = next((verdict for verdict in by_time if verdict["arm"] == arm), None)
    return losses | {key: time[key] for key in OVERRULED} if losses and time else losses
