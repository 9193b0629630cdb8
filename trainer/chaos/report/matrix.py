"""The matrix fault × invariant as data, shared by page, terminal and picture."""

from collections import Counter
from collections.abc import Sequence

from trainer.chaos.results import Result
from trainer.faults.checker import NOT_ASKED, Answer
from trainer.faults.fault import KINDS
from trainer.show.units import SIGNS

OUTCOMES: Sequence[str] = ("pass", "fail", "undetected", "unknown", "skipped", NOT_ASKED)
MEANINGS = {
    "pass": "held",
    "fail": "did not hold",
    "undetected": "left a trace that no incident reports",
    "unknown": "cannot be decided",
    NOT_ASKED: "not asked, not measured",
}
"""Answers in words, in the order of a legend."""


def invariants(results: Sequence[Result]) -> list[str]:
    """Names of the invariants that were checked for any run, in the order of their first check."""
    return list(dict.fromkeys(answer.invariant for result in results for answer in result.answers))


def answers(result: Result, asked: Sequence[str]) -> list[Answer]:
    """Return an answer for each of the invariants in `asked`."""
    given = {answer.invariant: answer for answer in result.answers}
    return [given.get(name, Answer(name, NOT_ASKED)) for name in asked]


def groups(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by the part of the system that the fault breaks, in the catalogue's order."""
    names = [*(kind.group for kind in KINDS.values()), "several at once", "storms", "other"]
    found: dict[str, list[Result]] = {name: [] for name in names}
    for result in results:
        kind = KINDS.get(result.kinds[0]) if result.kinds else None
        several = len(set(result.kinds)) > 1
        alone = "several at once" if several else "other" if kind is None else kind.group
        found["storms" if result.seed is not None else alone].append(result)
    return {name: members for name, members in found.items() if members}


def counts(results: Sequence[Result]) -> dict[str, int]:
    """Number of results by outcome, without the outcomes of no result."""
    found = Counter(result.outcome for result in results)
    return {outcome: found[outcome] for outcome in OUTCOMES if found[outcome]}


def commits(results: Sequence[Result]) -> list[str]:
    """The commits of the code that the runs were made with, in words; [] if none is known.

    A campaign that is resumed keeps its results, whatever has become of the code.
    """
    ran = [result.commit for result in results if result.run]
    found = Counter(f"{commit[:10]}{' with changes' * commit.endswith('+')}" if commit else "unknown" for commit in ran)
    several = len(found) > 1
    words = ", ".join(f"{name}{f' ({number} of {len(ran)})' * several}" for name, number in found.most_common())
    return [f"commit{'s' * several} {words}"] if any(ran) else []


def world(result: Result) -> str:
    """ "4 fsdp on 2 nodes": ranks, strategy, nodes if several, mode and transport if they are not the usual ones."""
    nodes = f" on {result.nodes} nodes" if result.nodes > 1 else ""
    nodes += f" over {result.transport.upper()}" if result.transport != "tcp" else ""
    mode = f" {result.mode}" if result.mode != "restart" else ""
    return f"{result.ranks} {result.strategy}".rstrip() + mode + nodes


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
