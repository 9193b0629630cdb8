"""What went wrong in a run and what it cost, from its event log alone.

An incident is told of each attempt that ended before the run did, and for each save that failed, checkpoint that was
passed over, and step that was computed again because it was not finite.

A value nobody measured is None, never 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.log.events import (
    LOST_A_PEER,
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Entry,
    EvalDone,
    Event,
    Hung,
    NotFinite,
    StepDone,
    StopRequested,
    WorkersLost,
)

PROGRESS = (StepDone, EvalDone, CheckpointSaved, CheckpointFailed, NotFinite)
"""Events that show an attempt at work."""


@dataclass(frozen=True)
class Incident:
    """Something went wrong, or stopped the run, and what that cost."""

    attempt: int
    """In which it happened."""
    kind: str
    """worker_lost, hung, preempted, not_finite, save_failed or checkpoint_rejected."""
    ends_attempt: bool
    rank: int | None
    """That died, hung, or could not save; None where the run cannot know."""
    point: str | None
    """Where in the step, by the names of the points in step.py."""
    step: int | None
    """Of what failed; where an attempt ended, the last step it completed."""
    lost_steps: int | None
    """Steps whose result was lost. None until the run goes on."""
    seconds: float | None
    """Without training, to the next attempt's readiness; or waiting for a save, or computing what was thrown away."""
    detected_as: str
    """The kind of event that told of it; "silence" where none did."""
    text: str
    """One line for people."""
    time: float | None
    """Unix time when it was noted; where an attempt ended, of its last progress."""


@dataclass
class _Attempt:
    """What is known of an attempt while its events come in."""

    number: int
    pids: set[int] = field(default_factory=set)
    world_size: int | None = None
    start: Entry | None = None
    """Rank 0's, as are `last` and `end`."""
    last: Entry | None = None
    """Its last progress."""
    reached: int | None = None
    end: AttemptEnded | None = None
    failed: dict[int, str] = field(default_factory=dict)
    """Reasons by rank, the first to fail first."""
    hung: list[Entry] = field(default_factory=list)
    not_finite: NotFinite | None = None
    signal: str | None = None
    asides: set[tuple[Any, ...]] = field(default_factory=set)
    """Incidents told already: several ranks may tell of one."""


class Story:
    """Turns a run's events into incidents as they come: those of earlier attempts first, then one by one.

    How an attempt ended is told once the next one has started: at its WorkersLost, or else at its first progress.
    """

    def __init__(self, earlier: Iterable[Entry] = ()) -> None:
        self.incidents: list[Incident] = []
        """All so far."""
        self._now: _Attempt | None = None
        self._ended: list[_Attempt] = []
        """Attempts that nothing has gone on from yet: at most the first of them has trained."""
        self._losses: list[WorkersLost] = []
        self._reached = 0
        self._finished = False
        for entry in earlier:
            self.tell(entry)

    def tell(self, entry: Entry) -> list[Incident]:
        """Take in the next entry; returns the incidents that are complete with it."""
        before = len(self.incidents)
        if self._now is None or entry.attempt != self._now.number:
            self._settle()
            if self._now is not None and not self._finished:
                self._ended.append(self._now)
            self._now = _Attempt(entry.attempt)
        if entry.rank == 0 and isinstance(entry.event, (*PROGRESS, AttemptEnded)):
            self._settle()
        self._note(entry, self._now)
        return self.incidents[before:]

    def close(self, running: bool = False) -> list[Incident]:
        """The log ends here; `running` says that its last attempt is still at work. Returns what that completes."""
        before = len(self.incidents)
        self._settle()
        if self._now is not None and not running and not self._finished:
            self._ended.append(self._now)
        self.incidents += [_ending(attempt, None, None, None) for attempt in self._ended]
        self._ended = []
        return self.incidents[before:]

    def _note(self, entry: Entry, now: _Attempt) -> None:
        event, main = entry.event, entry.rank == 0
        match event:
            case AttemptStarted():
                now.pids.add(event.pid)
                if main:
                    now.start, now.last, now.reached, now.world_size = entry, entry, event.from_step, event.world_size
            case StepDone() if main:
                now.reached = self._reached = event.step
            case AttemptEnded():
                if event.status == "failed":
                    now.failed.setdefault(entry.rank, event.reason)
                if main:
                    now.end = event
                    self._finished = self._finished or event.status == "finished"
            case Hung():
                now.hung.append(entry)
            case WorkersLost():
                self._losses.append(event)
                self._settle()
            case StopRequested():
                now.signal = event.signal
            case NotFinite() | CheckpointFailed() | CheckpointRejected():
                self._aside(entry, now)
        if main and (isinstance(event, PROGRESS) or _left(now)):
            now.last = entry

    def _aside(self, entry: Entry, now: _Attempt) -> None:
        """An incident that does not end the attempt."""
        event, rank, seconds = entry.event, None, None  # whose it was is not always known, and not who writes of it
        assert isinstance(event, NotFinite | CheckpointFailed | CheckpointRejected)
        key: tuple[Any, ...] = (event.kind, event.step)
        match event:
            case NotFinite(trial=trial):
                if trial > 0:  # the second in a row ends the attempt
                    now.not_finite = event
                    return
                kind = "not_finite"
                seconds = max(0.0, entry.time - now.last.time) if now.last is not None else None
            case CheckpointFailed(in_a_row=in_a_row):
                kind, key, rank, seconds = "save_failed", (*key, in_a_row), event.on_rank, event.stall_seconds
            case CheckpointRejected():
                kind = "checkpoint_rejected"
        if key not in now.asides:
            now.asides.add(key)
            text, step = describe(event), event.step
            self.incidents.append(
                Incident(now.number, kind, False, rank, None, step, 0, seconds, event.kind, text, entry.time)
            )

    def _settle(self) -> None:
        """Tell how the attempts before this one ended, if this one has started."""
        if self._now is None or self._now.start is None or not (self._ended or self._losses):
            return
        ended, losses, start = self._ended, self._losses, self._now.start
        self._ended, self._losses = [], []
        assert isinstance(start.event, AttemptStarted)
        lost = max(0, self._reached - start.event.from_step)
        self._reached = start.event.from_step
        for number, attempt in enumerate(ended):
            loss = next((one for one in losses if _is_of(one, attempt)), None)
            losses = [one for one in losses if one is not loss]
            # Work and time are lost once, however many starts it took to go on.
            self.incidents.append(_ending(attempt, loss, *((start, lost) if number == 0 else (None, 0))))
        self.incidents += [_before(start, loss) for loss in losses]


def incidents_of(entries: Iterable[Entry], running: bool = False) -> list[Incident]:
    """All incidents of a log in order; `running` says that its last attempt is still at work."""
    story = Story(entries)
    story.close(running)
    return story.incidents


def _left(attempt: _Attempt) -> bool:
    return attempt.end is not None and attempt.end.status in ("finished", "preempted")


def _is_of(loss: WorkersLost, attempt: _Attempt) -> bool:
    """Whether the launcher speaks of this attempt, and not of workers that died before they wrote anything."""
    pids = {failure.get("pid") for failure in loss.failures} - {None}
    return not pids or not attempt.pids or not pids.isdisjoint(attempt.pids)


def _ending(attempt: _Attempt, loss: WorkersLost | None, next_start: Entry | None, lost: int | None) -> Incident:
    kind, rank, point, detected_as, what = _cause(attempt, loss)
    step, last = attempt.reached, attempt.last
    seconds = max(0.0, next_start.time - last.time) if next_start is not None and last is not None else None
    when = " while it was starting" if step is None else f" after step {step}"
    text = (what if kind == "not_finite" else what + when) + _resumption(attempt, next_start, lost, seconds)
    time = last.time if last is not None else None
    return Incident(attempt.number, kind, True, rank, point, step, lost, seconds, detected_as, text, time)


def _before(start: Entry, loss: WorkersLost) -> Incident:
    """Workers that died on the way to `start` and left no trace of their own."""
    first = _first_to_fail(loss, {})
    text = f"{_who(first, {}) or first_line(loss.reason)} before attempt {start.attempt} started"
    return Incident(start.attempt, "worker_lost", True, _rank(first), None, None, 0, None, loss.kind, text, start.time)


def _cause(attempt: _Attempt, loss: WorkersLost | None) -> tuple[str, int | None, str | None, str, str]:
    """(kind, rank, point, detected_as, what happened)."""
    if attempt.hung:
        first = attempt.hung[0]
        assert isinstance(first.event, Hung)
        culprit = _culprit(first.event, first.rank)
        return "hung", culprit.get("rank"), culprit.get("point"), "hung", describe(first.event, first.rank)
    if attempt.not_finite is not None:
        return "not_finite", None, None, "not_finite", describe(attempt.not_finite)
    if attempt.end is not None and attempt.end.status == "preempted":
        by = attempt.signal or first_line(attempt.end.reason)
        return "preempted", None, None, "stop_requested" if attempt.signal else "attempt_ended", f"preempted ({by})"
    # Who lost a peer may leave before the peer that failed: it is still no cause.
    by_itself = [rank for rank, reason in attempt.failed.items() if reason != LOST_A_PEER]
    if loss is not None and by_itself and not any(failure.get("signal") for failure in loss.failures):
        rank = by_itself[0]
        return "worker_lost", rank, None, loss.kind, f"rank {rank} failed ({first_line(attempt.failed[rank])})"
    if loss is not None:
        first = _first_to_fail(loss, attempt.failed)
        return "worker_lost", _rank(first), None, loss.kind, _who(first, attempt.failed) or first_line(loss.reason)
    if by_itself:
        rank = by_itself[0]
        return "worker_lost", rank, None, "attempt_ended", f"rank {rank} failed ({first_line(attempt.failed[rank])})"
    if attempt.failed:
        return "worker_lost", None, None, "attempt_ended", "a peer was lost"
    return "worker_lost", None, None, "silence", "ended without a word"


def _resumption(attempt: _Attempt, next_start: Entry | None, lost: int | None, seconds: float | None) -> str:
    if next_start is None:
        return "" if lost is not None else "; nothing has resumed it"
    assert isinstance(next_start.event, AttemptStarted)
    step, size = next_start.event.from_step, next_start.event.world_size
    text = f"; resumed from step {step}" if step else "; started again from step 0"
    if attempt.world_size not in (None, size):
        text += f" on {size} rank{'s' if size > 1 else ''} instead of {attempt.world_size}"
    text += f", {lost or 'no'} step{'' if lost == 1 else 's'} to replay"
    return text if seconds is None else f"{text}; {seconds:.1f} s without training"


def _culprit(event: Hung, noticed_by: int) -> dict[str, Any]:
    return event.culprits[0] if event.culprits else {"rank": noticed_by, "point": event.point}


def _rank(failures: Sequence[dict[str, Any]]) -> int | None:
    return failures[0].get("rank") if failures else None


def _first_to_fail(loss: WorkersLost, reasons: Mapping[int, str]) -> list[dict[str, Any]]:
    """Those that a signal ended, or that wrote of no lost peer, if any: the others left because these were gone."""
    by_signal = [failure for failure in loss.failures if failure.get("signal")]
    alone = [failure for failure in loss.failures if reasons.get(failure["rank"]) != LOST_A_PEER]
    return by_signal or alone or loss.failures


def _who(failures: Sequence[dict[str, Any]], reasons: Mapping[int, str]) -> str:
    """ "rank 1 was killed (SIGKILL)"; `reasons` is what ranks wrote before they left."""
    said = []
    for failure in failures:
        rank, signal = failure.get("rank"), failure.get("signal")
        if signal:
            said.append(f"rank {rank} {'was killed' if signal == 'SIGKILL' else 'died'} ({signal})")
        elif rank is not None and rank in reasons:
            said.append(f"rank {rank} failed ({first_line(reasons[rank])})")
        else:
            said.append(f"rank {rank} left with exit status {failure.get('exitcode')}")
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "")


def describe(event: Event, rank: int = 0) -> str:
    """What one of the events below says, in one line; `rank` wrote it."""
    match event:
        case NotFinite(step=step, trial=trial):
            then = "computed again" if trial == 0 else "and not when computed again"
            values = f"loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g}"
            return f"step {step} was not finite ({values}), {then}"
        case CheckpointFailed(step=step):
            times = f", {event.in_a_row} in a row" if event.in_a_row > 1 else ""
            return f"the save of step {step} failed ({first_line(event.reason)}){times}"
        case CheckpointRejected(step=step):
            return f"the checkpoint of step {step} is damaged and was passed over ({first_line(event.reason)})"
        case Hung():
            who = _culprit(event, rank)
            why = f"; it {first_line(str(who['why']))}" if who.get("why") else ""
            return f"rank {who.get('rank')} hung at {who.get('point')} (no progress for {event.seconds:.1f} s{why})"
        case _:
            raise TypeError(f"no incident: {event!r}")


def first_line(text: str) -> str:
    """What an error says before it goes into detail."""
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
