"""The diagnosis of a hang: finds the ranks at fault from what all ranks publish about themselves. No I/O here.

A rank that waits in a collective is usually a victim. `diagnose` looks for the cause in this order: ranks that do not
answer, ranks that are stuck outside any collective, ranks that are merely slow, and, if all wait, ranks that wait for
another collective than most do.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trainer.phases import Phase

# In the order in which a rank passes them with one number of completed steps: the update makes a step complete, so what
# follows it comes before the next step's forward. Only used where the Flight Recorder is off.
PHASES = (
    Phase.STARTUP, Phase.IN_LOAD, Phase.IN_SEND, Phase.IN_RECEIVE, Phase.IN_OUTER_UPDATE,
    Phase.AFTER_UPDATE, Phase.IN_EVAL, Phase.WAITING_FOR_SAVE, Phase.AFTER_SAVE, Phase.BEFORE_END, Phase.AFTER_END,
    Phase.BEFORE_FORWARD, Phase.BEFORE_BACKWARD, Phase.BEFORE_REDUCE, Phase.AFTER_REDUCE, Phase.BEFORE_UPDATE,
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has entered and not left."""

    name: str
    sequence: int  # number of collectives on this group so far; equal on ranks that are in step
    group: str
    sizes: str  # data types and shapes of the inputs

    def __str__(self) -> str:
        return f'{self.name} #{self.sequence} of group "{self.group}", {self.sizes}'


@dataclass(frozen=True)
class RankStatus:
    """A rank's position as it published it; the last one known if the rank does not answer."""

    rank: int
    phase: str
    step: int
    idle_seconds: float  # time without progress
    answers: int  # bytes of the file of requests that it has read and answered; -1 before the first
    recorded: bool = False
    """True if the Flight Recorder was on: only then does no `pending` collective mean that the rank is in none."""
    pending: Collective | None = None
    alive: bool = True  # False if it did not answer the request for its stacks
    left_seconds: float = 0.0  # without progress, after which its own watchdog acts


def diagnose(statuses: Sequence[RankStatus], limit_seconds: float) -> list[dict[str, Any]]:
    """Return the ranks that hold up the others, each as {rank, point, step, why}; empty if unknown.

    `statuses` has every rank whose position is known; `limit_seconds` is the timeout that one of them exceeded.
    """
    living = [status for status in statuses if status.alive]
    waiting = [status for status in living if status.pending]
    outside = [status for status in living if not status.pending]
    culprits = [_silent(status, waiting) for status in statuses if not status.alive]
    if any(not status.recorded for status in outside):
        # Such a rank may be in a collective that was not recorded, so only positions can be compared.
        return culprits or _behind(living)
    meanwhile = f", while rank {waiting[0].rank} waits in {waiting[0].pending}" if waiting else ""
    for status in outside:
        # Half the limit: this rank may have got stuck somewhat later than the rank that noticed.
        if status.idle_seconds >= limit_seconds / 2:
            why = f"has made no progress for {status.idle_seconds:.1f} s and is in no collective{meanwhile}"
            culprits.append(_culprit(status, why))
    if not culprits and waiting:
        # No rank is stuck: the others wait for a rank that is slow, or that has skipped their collective.
        culprits = [_culprit(status, f"makes progress, but is not in the collective{meanwhile}") for status in outside]
    return culprits or _minority(waiting)


def patience(own: RankStatus, statuses: Sequence[RankStatus]) -> float:
    """Return for how many more seconds a rank may wait for ranks that meet only now and then; 0 if it is a hang.

    The first one may come to a meeting long before the last. While all answer and one of them makes progress, none
    hangs: a rank that is stuck outside any collective is found by its own watchdog.
    """
    others = [status for status in statuses if status.rank != own.rank]
    waits = own.pending is not None or not own.recorded
    if not waits or not all(status.alive for status in others):
        return 0.0
    return max((status.left_seconds for status in others), default=0.0)


def is_recorded(trace: dict[str, Any]) -> bool:
    """True if a Flight Recorder was on, so that no pending collective means that the rank is in none.

    Ranks that train have long been in some. A record without any is one that was off, or that of a back end they do not
    use: then everybody would look like the one that the others wait for.
    """
    return bool(trace.get("entries"))


def pending_collective(*traces: dict[str, Any]) -> Collective | None:
    """Return the oldest collective in Flight Recorder traces that has not ended.

    gloo's are entered and left by the main thread. NCCL's are put into a queue: those behind the oldest wait for it.
    """
    entries = [entry for trace in traces for entry in trace.get("entries", [])]
    pending = [entry for entry in entries if not entry["retired"] and entry["state"] != "completed"]
    if not pending:
        return None
    # Each record numbers its own.
    entry = min(pending, key=lambda entry: (entry.get("time_created_ns", 0), entry["record_id"]))
    dtypes = "+".join(entry["input_dtypes"])
    group = " ".join(part for part in entry["process_group"] if part)
    return Collective(entry["profiling_name"], entry["collective_seq_id"], group, f"{dtypes} {entry['input_sizes']}")


def _culprit(status: RankStatus, why: str) -> dict[str, Any]:
    return {"rank": status.rank, "point": status.phase, "step": status.step, "why": why}


def _silent(status: RankStatus, waiting: Sequence[RankStatus]) -> dict[str, Any]:
    """Return the entry of a rank that does not answer."""
    why = "does not answer: its process is stopped or gone"
    if not waiting:
        return _culprit(status, why)
    first = min(waiting, key=lambda status: status.step)
    # Its last published position may be some short steps old. But it has finished every collective before the one that
    # the others wait in, so it is at their step, or still at the end of the step before.
    if status.step < first.step - 1:
        why += f"; last seen at {status.phase} of step {status.step}"
        status = replace(status, phase="unknown", step=first.step)
    return _culprit(status, f"{why}, while rank {first.rank} waits in {first.pending} at {first.phase}")


def _behind(living: Sequence[RankStatus]) -> list[dict[str, Any]]:
    """Return the ranks at the earliest position; none if all are there, or if one is at an unknown phase."""
    positions = {s.rank: (s.step, PHASES.index(s.phase)) for s in living if s.phase in PHASES}
    if len(positions) < len(living) or len(set(positions.values())) < 2:
        return []
    earliest = min(positions.values())
    return [_culprit(s, "is behind the other ranks") for s in living if positions[s.rank] == earliest]


def _minority(waiting: Sequence[RankStatus]) -> list[dict[str, Any]]:
    """Return the ranks that wait for another collective than most; none if there is no majority.

    A rank that skipped a collective and a rank that did one too many look the same from here.
    """

    # The group's name does not count: in a hybrid mesh, healthy ranks wait in different groups of the same kind.
    def place(status: RankStatus) -> tuple[Any, ...]:
        pending = status.pending
        assert pending is not None
        return status.step, status.phase, pending.name, pending.sequence, pending.sizes

    counts = Counter(map(place, waiting))
    if len(counts) < 2:
        return []
    usual, votes = counts.most_common(1)[0]
    if 2 * votes <= len(waiting):
        return []
    typical = next(status for status in waiting if place(status) == usual)
    others = f"most ranks wait in {typical.pending} at {typical.phase} of step {typical.step}"
    return [_culprit(s, f"waits in {s.pending}, but {others}") for s in waiting if place(s) != usual]
