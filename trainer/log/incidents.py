"""Incidents of a run and their cost, from its event log alone.

There is an incident for each attempt that ended before the run did, each save that failed, each checkpoint that was
passed over, and each step that was computed again because it was not finite.

A value that was not measured is None, never 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.log import events
from trainer.log.events import LOST_A_PEER, Entry, Event
from trainer.log.history import PROGRESS, Attempt, History, Start

# Events of incidents that need not end their attempt.
_InnerEvent = (
    events.NotFinite | events.CheckpointFailed | events.CheckpointRejected | events.Corrupted | events.MembersChanged
)


@dataclass(frozen=True)
class Incident:
    """Something that went wrong or stopped the run, and its cost."""

    attempt: int
    kind: str  # worker_lost, hung, preempted, not_finite, corrupted, save_failed or checkpoint_rejected
    ends_attempt: bool
    rank: int | None  # the rank that died, hung or could not save; None if the log does not show it
    point: str | None  # phase of the step (trainer/phases.py)
    step: int | None  # the step that failed; for the end of an attempt, the last step that it completed
    lost_steps: int | None  # number of steps whose result was lost; None until the run resumes
    seconds: float | None
    """Time without training, until the next attempt is ready; or the wait for a save; or computation thrown away."""
    detected_as: str  # kind of the event that shows it; "silence" if there is none
    text: str  # one line for people
    time: float | None  # Unix time when it was noted; for the end of an attempt, of its last progress
    others: tuple[int, ...] = ()  # workers of a quorum that were lost together with `rank`


class IncidentBuilder:
    """Turns a run's events into incidents as they come: those of earlier attempts first, then one by one.

    How an attempt ended is known once the next one has started. Its incident is complete at the WorkersLost of the next
    attempt or, where the launcher left none, at the next attempt's first progress.
    """

    def __init__(self, earlier: Iterable[Entry] = ()) -> None:
        self.incidents: list[Incident] = []  # all complete incidents
        self._attempt: Attempt | None = None
        self._ended: list[Attempt] = []
        """Attempts that no attempt has resumed yet: at most the first of them has trained."""
        self._losses: list[events.WorkersLost] = []
        self._reached = 0
        self._finished = False
        self._lost: set[tuple[int, int]] = set()
        """(attempt, number) of the workers of a quorum whose loss is an incident already."""
        self._reported: set[tuple[Any, ...]] = set()
        """Incidents inside attempts, each once: several ranks may write of it."""
        for entry in earlier:
            self.add(entry)

    def add(self, entry: Entry) -> list[Incident]:
        """Take in the next entry. Returns the incidents that are complete with it."""
        before = len(self.incidents)
        event, is_main = entry.event, entry.rank == 0
        if self._attempt is None or entry.attempt != self._attempt.number:
            self._complete_ends()
            # After the run has finished, an attempt that ends is no incident: there was nothing left to do.
            if self._attempt is not None and not self._finished:
                self._ended.append(self._attempt)
            self._attempt = Attempt(entry.attempt)
        # The launcher's report, WorkersLost, is written before the first progress.
        if is_main and isinstance(event, (*PROGRESS, events.AttemptEnded)):
            self._complete_ends()
        if isinstance(event, _InnerEvent):
            self._add_inner(entry, event, self._attempt)  # before the attempt's last progress moves on
        self._attempt.observe(entry)
        if isinstance(event, events.StepDone) and is_main:
            self._reached = event.step
        elif isinstance(event, events.WorkersLost):
            self._losses.append(event)
            self._complete_ends()
        self._finished = self._finished or self._attempt.main_status == "finished"
        return self.incidents[before:]

    def close(self, running: bool = False) -> list[Incident]:
        """End the log here and return all incidents. `running`: its last attempt is still at work."""
        self._complete_ends()
        if self._attempt is not None and not running and not self._finished:
            self._ended.append(self._attempt)
        return self.incidents + [_ending(attempt, None, None, None) for attempt in self._ended]

    def _add_inner(self, entry: Entry, event: _InnerEvent, attempt: Attempt) -> None:
        """Add an incident that does not end its attempt."""
        rank, seconds, which = None, None, None  # the log does not always name the rank; the writer may be another
        others: tuple[int, ...] = ()
        match event:
            case events.NotFinite(trial=trial):
                if trial > 0:  # the second in a row ends the attempt
                    return
                kind, last = "not_finite", attempt.last_progress
                seconds = max(0.0, entry.time - last.time) if last is not None else None
            case events.CheckpointFailed():
                kind, rank, seconds, which = "save_failed", event.on_rank, event.stall_seconds, event.in_a_row
            case events.CheckpointRejected():
                kind = "checkpoint_rejected"
            case events.Corrupted(action=action, culprit=rank):
                if action in ("stopped", "restarted", "quarantined"):  # it ends the attempt
                    return
                kind, which = "corrupted", (event.what, event.micro_batch)
            case events.MembersChanged(lost=lost_members):
                # A loss is told again until a step is committed after it.
                told = {member for number, member in self._lost if number == attempt.number}
                lost_members = [int(member) for member in lost_members if int(member) not in told]
                if not lost_members:
                    self._reached = min(self._reached, event.step)
                    return
                self._lost.update((attempt.number, member) for member in lost_members)
                kind, seconds, which = "worker_lost", event.seconds, event.epoch
                rank, *others_lost = lost_members
                others = tuple(others_lost)
        # Several ranks may write of one incident.
        key = (attempt.number, kind, event.step, which)
        if key not in self._reported:
            self._reported.add(key)
            lost = max(0, self._reached - event.step) if isinstance(event, events.MembersChanged) else 0
            shown = (event.step, lost, seconds, event.kind, describe(event), entry.time)
            self.incidents.append(Incident(attempt.number, kind, False, rank, None, *shown, others))
            if isinstance(event, events.MembersChanged):
                self._reached = min(self._reached, event.step)

    def _complete_ends(self) -> None:
        """Add how the attempts before this one ended, if this one has started."""
        start = self._attempt.start if self._attempt is not None else None
        if start is None or not (self._ended or self._losses):
            return
        ended, losses, from_step = self._ended, self._losses, start[1].from_step
        self._ended, self._losses = [], []
        lost = max(0, self._reached - from_step)  # not below 0 where the log lacks steps
        self._reached = from_step
        for number, attempt in enumerate(ended):
            # Others died before they wrote anything: their process ids are known, and are none of this attempt's.
            started = {event.pid for _, event in attempt.starts.values()}
            pids = [({failure.get("pid") for failure in loss.failures} - {None}, loss) for loss in losses]
            loss = next((loss for died, loss in pids if not died or not started or died & started), None)
            losses = [other for other in losses if other is not loss]
            # Work and time are lost once, however many starts it took to resume.
            self.incidents.append(_ending(attempt, loss, *((start, lost) if number == 0 else (None, 0))))
        # Losses that belong to none of these attempts: workers died before they could write anything.
        self.incidents += [_before(start[0], loss) for loss in losses]


def incidents_of(history: History, running: bool = False) -> list[Incident]:
    """All incidents of a run in order. `running`: its last attempt is still at work."""
    return IncidentBuilder(history.entries).close(running)


def _ending(attempt: Attempt, loss: events.WorkersLost | None, next_start: Start | None, lost: int | None) -> Incident:
    kind, rank, point, detected_as, cause = _cause(attempt, loss)
    step, last = attempt.last_step, attempt.last_progress
    seconds = max(0.0, next_start[0].time - last.time) if next_start is not None and last is not None else None
    starting = " while it was starting" if step is None else f" after step {step}"
    when = "" if kind in ("not_finite", "corrupted") else starting  # those two name their step
    text = f"{cause}{_on_node(attempt, rank)}{when}{_resumption(attempt, next_start, lost, seconds)}"
    return Incident(attempt.number, kind, True, rank, point, step, lost, seconds, detected_as, text, last and last.time)


def _on_node(attempt: Attempt, rank: int | None) -> str:
    """ " on n2": the node of the rank that is the cause, where there are several."""
    nodes = attempt.start[1].nodes if attempt.start is not None else ()
    if rank is None or rank >= len(nodes) or len(set(nodes)) == 1 or attempt.failures.get(rank) == LOST_A_PEER:
        return ""
    return f" on {nodes[rank]}"


def _before(start: Entry, loss: events.WorkersLost) -> Incident:
    """Incident for workers that died on the way to `start`, before they wrote anything."""
    first = _first_to_fail(loss, {})
    rank = first[0].get("rank") if first else None
    text = f"{_describe_failures(first, {}) or first_line(loss.reason)} before attempt {start.attempt} started"
    return Incident(start.attempt, "worker_lost", True, rank, None, None, 0, None, loss.kind, text, start.time)


def _cause(attempt: Attempt, loss: events.WorkersLost | None) -> tuple[str, int | None, str | None, str, str]:
    """Return (kind, rank, point, detected_as, text) of the first of these that the log shows.

    A hang comes first, since the processes that it ends look like a crash to the launcher.
    """
    if attempt.hangs:
        entry, event = attempt.hangs[0]
        culprit = _culprit(event, entry.rank)
        return "hung", culprit.get("rank"), culprit.get("point"), "hung", describe(event, entry.rank)
    if attempt.fatal_not_finite is not None:
        return "not_finite", None, None, "not_finite", describe(attempt.fatal_not_finite)
    if attempt.fatal_corruption is not None:
        return "corrupted", attempt.fatal_corruption.culprit, None, "corrupted", describe(attempt.fatal_corruption)
    if attempt.main_status == "preempted":
        by = attempt.signal or first_line(attempt.ends[0][1].reason)
        return "preempted", None, None, "stop_requested" if attempt.signal else "attempt_ended", f"preempted ({by})"
    # A rank that lost a peer may leave before the peer that failed: it is still no cause.
    failed = [(rank, first_line(reason)) for rank, reason in attempt.failures.items() if reason != LOST_A_PEER]
    detected_as = "attempt_ended" if loss is None else loss.kind
    if failed and not (loss is not None and any(failure.get("signal") for failure in loss.failures)):
        rank, reason = failed[0]
        return "worker_lost", rank, None, detected_as, f"rank {rank} failed ({reason})"
    if loss is not None:
        first = _first_to_fail(loss, attempt.failures)
        text = _describe_failures(first, attempt.failures) or first_line(loss.reason)
        return "worker_lost", first[0].get("rank") if first else None, None, detected_as, text
    if attempt.failures:
        return "worker_lost", None, None, detected_as, "a peer was lost"
    return "worker_lost", None, None, "silence", "ended without a message"


def _resumption(attempt: Attempt, next_start: Start | None, lost: int | None, seconds: float | None) -> str:
    if next_start is None:
        return "" if lost is not None else "; nothing has resumed it"
    step, size = next_start[1].from_step, next_start[1].world_size
    text = f"; resumed from step {step}" if step else "; started again from step 0"
    if attempt.start is not None and (before := attempt.start[1].world_size) != size:
        text += f" on {size} rank{'s' if size > 1 else ''} instead of {before}"
    if attempt.start is not None and (now := set(next_start[1].nodes)):
        gone = [node for node in dict.fromkeys(attempt.start[1].nodes) if node not in now]
        text += f" without {', '.join(gone)}" if gone else ""
    text += f", {lost or 'no'} step{'' if lost == 1 else 's'} to replay"
    return text if seconds is None else f"{text}; {seconds:.1f} s without training"


def _culprit(event: events.Hung, noticed_by: int) -> dict[str, Any]:
    return event.culprits[0] if event.culprits else {"rank": noticed_by, "point": event.point}


def _first_to_fail(loss: events.WorkersLost, reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    """Failures that are causes: workers that a signal ended, or else that did not write that they lost a peer.

    The others left because these were gone. All of them if there is no such worker.
    """
    by_signal = [failure for failure in loss.failures if failure.get("signal")]
    alone = [failure for failure in loss.failures if reasons.get(failure["rank"]) != LOST_A_PEER]
    return by_signal or alone or loss.failures


def _describe_failures(failures: Sequence[dict[str, Any]], reasons: Mapping[int, str]) -> str:
    """ "rank 1 was killed (SIGKILL)"; `reasons` holds what ranks wrote before they left."""
    texts = []
    for failure in failures:
        rank, signal = failure.get("rank"), failure.get("signal")
        if signal:
            texts.append(f"rank {rank} {'was killed' if signal == 'SIGKILL' else 'died'} ({signal})")
        elif rank is not None and rank in reasons:
            texts.append(f"rank {rank} failed ({first_line(reasons[rank])})")
        else:
            texts.append(f"rank {rank} left with exit status {failure.get('exitcode')}")
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


def describe(event: Event, rank: int = 0) -> str:
    """Describe one of the events below in one line. `rank` wrote it. Raises TypeError for other events."""
    match event:
        case events.NotFinite(step=step, trial=trial):
            then = "computed again" if trial == 0 else "and not when computed again"
            values = f"loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}"
            return f"step {step} was not finite ({values}), {then}"
        case events.Corrupted(step=step):
            then = {
                "repaired": "repaired", "reported": "and applied all the same", "stopped": "the run stops",
                "restarted": "it starts again, from its checkpoint or, where others go on, from their state",
                "recomputed": "computed again until two results agreed, which on one rank may both be wrong",
                "quarantined": f"the job goes on without node {event.node}, or ends until that is taken out",
                "excluded": f"its worker on node {event.node} is not started again, and the others go on without it",
            }  # fmt: skip
            return f"in step {step} {event.found}: {then[event.action]}"
        case events.MembersChanged(step=step):
            lost = " and ".join(f"worker {member} was lost ({why})" for member, why in event.lost.items())
            if set(event.members) == set(event.joined):
                went_on = f"the job went on from step {step} on disk, after {event.seconds:.2f} s"
                return f"{lost}; nobody left had the state, so {went_on}"
            count = sum(map(len, event.given.values())) if event.kept else 0
            again = (
                f", with {count} micro-batch{'' if count == 1 else 'es'} of the step to compute" if event.kept else ""
            )
            size = len(event.members)
            went_on = f"the other{'' if size == 1 else f' {size}'} went on with it"
            return f"in step {step + 1} {lost}; {went_on} after {event.seconds:.2f} s{again}"
        case events.CheckpointFailed(step=step):
            times = f", {event.in_a_row} in a row" if event.in_a_row > 1 else ""
            return f"the save of step {step} failed ({first_line(event.reason)}){times}"
        case events.CheckpointRejected(step=step):
            return f"the checkpoint of step {step} is damaged and was passed over ({first_line(event.reason)})"
        case events.Hung():
            culprit = _culprit(event, rank)
            why = f"; it {first_line(str(culprit['why']))}" if culprit.get("why") else ""
            where = f"rank {culprit.get('rank')} hung at {culprit.get('point')}"
            return f"{where} (no progress for {event.seconds:.1f} s{why})"
    raise TypeError(f"no incident: {event!r}")


def first_line(text: str) -> str:
    """First line of an error message, at most 200 characters: its fact, without rule and remedy."""
    line = next(iter(text.strip().splitlines()), "")
    return line if len(line) <= 200 else f"{line[:199]}…"
