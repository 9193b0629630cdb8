"""The matrix fault × invariant as data, shared by page, terminal and picture."""

import statistics
from collections import Counter
from collections.abc import Sequence

from trainer.chaos.results import Report, Result
from trainer.faults.checker import NOT_ASKED, Answer
from trainer.faults.fault import KINDS
from trainer.show.units import SIGNS

OUTCOMES: Sequence[str] = ("pass", "fail", "undetected", "unknown", "skipped")
MEANINGS = {
    "pass": "held",
    "fail": "did not hold",
    "undetected": "left a trace that no incident reports",
    "unknown": "cannot be decided",
    "not applicable": "not asked, not measured",
}
"""Answers in words, in the order of a legend."""
SEVERAL, STORMS, OTHER = "several at once", "storms", "other"


def invariants(results: Sequence[Result]) -> list[str]:
    """Names of the invariants that were checked for any run, in the order of their first check."""
    return list(dict.fromkeys(answer.invariant for result in results for answer in result.answers))


def answers(result: Result, asked: Sequence[str]) -> list[Answer]:
    """Return an answer for each of the invariants in `asked`."""
    given = {answer.invariant: answer for answer in result.answers}
    return [given.get(name, Answer(name, NOT_ASKED)) for name in asked]


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the part of the system that the fault breaks, in the catalogue's order."""
    names = [*dict.fromkeys(kind.group for kind in KINDS.values()), SEVERAL, STORMS, OTHER]
    found = {name: [result for result in results if _group(result) == name] for name in names}
    return {name: members for name, members in found.items() if members}


def _group(result: Result) -> str:
    if result.seed is not None:
        return STORMS
    kinds = set(result.kinds)
    if len(kinds) > 1:
        return SEVERAL
    kind = KINDS.get(next(iter(kinds), ""))
    return OTHER if kind is None else kind.group


def counts(results: Sequence[Result]) -> dict[str, int]:
    """Number of results by outcome, without the outcomes of no result."""
    found = Counter(result.outcome for result in results)
    return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}


def world(result: Result) -> str:
    """ "4 fsdp on 2 nodes": ranks, strategy, nodes if several."""
    nodes = f" on {result.nodes} nodes" if result.nodes > 1 else ""
    return f"{result.ranks} {result.strategy}{nodes}"


def world_short(result: Result) -> str:
    """ "2 replicate"; "2×1 fsdp" is two nodes of one rank each."""
    nodes = f"{result.nodes}×{result.ranks // result.nodes}" if result.nodes > 1 else str(result.ranks)
    return f"{nodes} {result.strategy}"


def label(result: Result, results: Sequence[Result]) -> str:
    """A result's name, numbered if its case was run more than once."""
    alike = sum((other.name, world(other)) == (result.name, world(result)) for other in results)
    return f"{result.name} #{result.repeat}" if alike > 1 else result.name


def worst(result: Result, name: str) -> float | None:
    """The longest of these seconds over the run's faults; None if none was measured."""
    return max((fault[name] for fault in result.measured if fault.get(name) is not None), default=None)


def seconds(value: float | None) -> str:
    """ "0.02", "3.4"; a dash for seconds that were not measured."""
    return SIGNS[NOT_ASKED] if value is None else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def seconds_left(done: Sequence[Result], total: int) -> float | None:
    """Estimated seconds until all `total` runs are done, by the median run so far; None while there is none."""
    took = [result.seconds for result in done if result.outcome != "skipped"]
    return statistics.median(took) * max(0, total - len(done)) if took else None


def reference_line(report: Report) -> str:
    """One line about the run that all others are compared with."""
    if not report.reference.get("weights_sha256"):
        return "no reference run: equality is unknown"
    exact = "" if report.reference.get("exact") else "; its sums are not exact, so equality is unknown"
    steps = "?" if report.reference.get("steps") is None else report.reference["steps"]
    return f"reference run: {steps} steps, weights_sha256 {report.reference['weights_sha256']}{exact}"
