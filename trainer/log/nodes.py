"""The nodes of a run, from its event log alone: their ranks, how fast they compute, and how often they failed.

A node failed where one of its ranks was the first to die, hung or was wrong, and where the node is gone in the attempt
after one in which ranks only lost a peer, unless all its nodes are gone. An error that ranks of
several nodes wrote alike is nobody's.
"""

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.log.events import LOST_A_PEER, Entry, RankPace
from trainer.log.history import Attempt, History
from trainer.log.incidents import Incident, incidents_of

SLOW = 1.3
"""A node is called slow from so many times the pace of the others. Less is noise on a shared machine."""

OFTEN = 3
"""Failures of a node from which on it is told at every start."""


@dataclass(frozen=True)
class Node:
    """One node of a run."""

    name: str
    ranks: tuple[int, ...]
    """Its ranks in the last attempt; none if it takes no part."""
    seconds_per_micro_batch: float | None
    """Median over its ranks in the last attempt; None if not measured."""
    times_others: float | None
    """That, by the median of the other nodes."""
    failures: int

    @property
    def is_slow(self) -> bool:
        return self.times_others is not None and self.times_others >= SLOW


def nodes_of(history: History, running: bool = False) -> list[Node]:
    """All nodes that took part in a run, by name. Empty if the log does not name them."""
    names = {name for attempt in history.attempts for name in _names(attempt)}
    if not names:
        return []
    last = _names(history.attempts[-1])
    paces = _paces(history.attempts[-1])
    failures = _failures(history, incidents_of(history, running))
    made = []
    for name in sorted(names):
        others = [pace for other, pace in paces.items() if other != name]
        ratio = paces[name] / statistics.median(others) if name in paces and others else None
        ranks = tuple(rank for rank, node in enumerate(last) if node == name)
        made.append(Node(name, ranks, paces.get(name), ratio, failures[name]))
    return made


def failing(run: Path | str, times: int) -> list[str]:
    """Names of the nodes of a run that have failed at least so many times; none if it has no log."""
    return [node.name for node in nodes_of(History.read(Path(run))) if node.failures >= times]


def crossing(nodes: Sequence[str], shard_ranks: int) -> list[tuple[int, ...]]:
    """Groups of ranks that share a copy of the model under `hybrid`, and lie on several nodes. `nodes` are by rank."""
    groups = [tuple(range(first, first + shard_ranks)) for first in range(0, len(nodes), shard_ranks)]
    return [group for group in groups if len({nodes[rank] for rank in group}) > 1]


def warnings(earlier: Iterable[Entry], names: Sequence[str], shard_ranks: int) -> list[str]:
    """Return the warnings for the start of an attempt: nodes that fail again and again, and shards on several nodes.

    `earlier` are the events of earlier attempts, `names` those of the nodes by rank; `shard_ranks` as for `crossing`.
    """
    if len(set(names)) < 2:
        return []
    messages = [
        f"node {node.name} has failed {node.failures} times in this run. Leave it out, by hand or by `submit "
        "--exclude-after`."
        for node in nodes_of(History.from_entries(earlier))
        if node.name in names and node.failures >= OFTEN
    ]
    if groups := crossing(names, shard_ranks):
        where = " and ".join(dict.fromkeys(names[rank] for rank in groups[0]))
        messages.append(
            f"ranks {', '.join(map(str, groups[0]))} share one copy of the model and lie on nodes {where}: every pass "
            f"waits for the network. Start a multiple of parallel.shard_ranks = {shard_ranks} ranks on each node."
        )
    return messages


def _names(attempt: Attempt) -> Sequence[str]:
    """Names of nodes by rank; empty if rank 0 was never ready."""
    return attempt.start[1].nodes if attempt.start is not None else ()


def _paces(attempt: Attempt) -> dict[str, float]:
    """{node: seconds} from the newest pace of each rank."""
    newest = {entry.rank: entry.event for entry in attempt.entries if isinstance(entry.event, RankPace)}
    by_node: dict[str, list[float]] = {}
    for pace in newest.values():
        by_node.setdefault(pace.node, []).append(pace.seconds_per_micro_batch)
    return {node: statistics.median(seconds) for node, seconds in by_node.items()}


def _failures(history: History, incidents: Iterable[Incident]) -> Counter[str]:
    counted = Counter[str]()
    attempts = {attempt.number: attempt for attempt in history.attempts}
    numbers = [attempt.number for attempt in history.attempts]
    following = {number: attempts[later] for number, later in itertools.pairwise(numbers)}
    for incident in incidents:
        attempt = attempts.get(incident.attempt)
        if attempt is not None and incident.ends_attempt and incident.kind in ("worker_lost", "hung", "corrupted"):
            counted.update(_culprits(attempt, following.get(incident.attempt), incident))
    return counted


def _culprits(attempt: Attempt, following: Attempt | None, incident: Incident) -> set[str]:
    """Nodes that brought an attempt to its end, as far as the log shows."""
    names, rank = _names(attempt), incident.rank
    reason = attempt.failures.get(rank) if rank is not None else None
    if rank is not None and rank < len(names) and reason != LOST_A_PEER:
        alike = {names[other] for other, why in attempt.failures.items() if why == reason and other < len(names)}
        return {names[rank]} if len(alike | {names[rank]}) == 1 else set()
    if following is None or incident.detected_as == "silence":
        return set()  # all were ended without a word: preempted or cancelled without notice
    left = set(names) & set(_names(following))
    return set(names) - left if left else set()  # where all are gone, the job has moved
