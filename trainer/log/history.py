"""The attempts of a run, derived once from its event log.

Goodput, incidents, `inspect`, timelines, the fault checker and ladder results read attempts from here. Two ways in:
`History` reads a whole log; `Attempt.observe` takes one entry at a time, for readers that follow a run while it trains.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from trainer.log import events
from trainer.log.events import Entry

Start = tuple[Entry, events.AttemptStarted]
PROGRESS = (
    events.StepDone,
    events.EvalDone,
    events.CheckpointSaved,
    events.CheckpointFailed,
    events.NotFinite,
    events.Corrupted,
    events.MembersChanged,
)
"""Events that show that an attempt is at work."""


@dataclass
class Attempt:
    """One attempt of a run: from the start of its processes to their end.

    `start`, `last_progress` and `last_step` are rank 0's, whose log alone has the steps. A value that is not in the log
    (yet) is None.
    """

    number: int
    entries: list[Entry] = field(default_factory=list)
    """Entries of all ranks, by time. `History` fills it; `observe` does not: a long run would fill the memory."""
    starts: dict[int, Start] = field(default_factory=dict)  # starts by rank; the first rank to be ready comes first
    ends: dict[int, tuple[Entry, events.AttemptEnded]] = field(default_factory=dict)
    """Ends by rank; only ranks that wrote how they ended."""
    failures: dict[int, str] = field(default_factory=dict)
    """Reason by rank, of the ranks that wrote that they failed; the first to fail comes first."""
    hangs: list[tuple[Entry, events.Hung]] = field(default_factory=list)
    signal: str | None = None  # name of the signal that asked a rank to stop
    fatal_not_finite: events.NotFinite | None = None
    """The second computation of a step that was not finite, which ends the attempt."""
    fatal_corruption: events.Corrupted | None = None
    """The disagreement between ranks that ended the attempt."""
    last_progress: Entry | None = None
    """The newest of rank 0's start, PROGRESS, and its end if it finished or was preempted."""
    last_step: int | None = None
    """Steps completed: by the newest step, or by the checkpoint that the attempt started from."""

    def observe(self, entry: Entry) -> None:
        """Take in the next entry of this attempt, in order of time."""
        event, is_main = entry.event, entry.rank == 0
        match event:
            case events.AttemptStarted(from_step=step):
                self.starts.setdefault(entry.rank, (entry, event))
                if is_main:
                    self.last_progress, self.last_step = entry, step
            case events.StepDone(step=step) if is_main:
                self.last_step = step
            case events.AttemptEnded():
                self.ends[entry.rank] = (entry, event)
                if event.status == "failed":
                    self.failures.setdefault(entry.rank, event.reason)
            case events.Hung():
                self.hangs.append((entry, event))
            case events.NotFinite(trial=trial) if trial > 0:
                self.fatal_not_finite = event
            case events.Corrupted(action="stopped" | "restarted" | "quarantined"):
                self.fatal_corruption = event
            case events.StopRequested():
                self.signal = event.signal
        # Events that a rank writes after its failure are no progress.
        if is_main and (isinstance(event, PROGRESS) or self.ended_in_order):
            self.last_progress = entry

    @property
    def main_entries(self) -> list[Entry]:
        """Entries of rank 0."""
        return [entry for entry in self.entries if entry.rank == 0]

    @property
    def start(self) -> Start | None:
        """Rank 0's start."""
        return self.starts.get(0)

    @property
    def from_step(self) -> int | None:
        return next((event.from_step for _, event in self.starts.values()), None)

    @property
    def furthest_step(self) -> int | None:
        """The greatest number of completed steps that any rank wrote, else `from_step`. Needs `entries`."""
        written = (events.StepDone, events.AttemptEnded)
        return max((e.event.step for e in self.entries if isinstance(e.event, written)), default=self.from_step)

    @property
    def status(self) -> str | None:
        """finished, failed, preempted, or None if no rank wrote its end.

        Rank 0 alone can say "finished": the weights are final then. Else one rank that failed makes the attempt failed.
        """
        # Ranks may differ: one fails while another still saves and leaves on a signal.
        written = {event.status for _, event in self.ends.values() if event.status != "finished"} | {self.main_status}
        return next((status for status in ("finished", "failed", "preempted") if status in written), None)

    @property
    def main_status(self) -> str | None:
        """Status in rank 0's AttemptEnded; None if it could not write one."""
        return self.ends[0][1].status if 0 in self.ends else None

    @property
    def ended_in_order(self) -> bool:
        """True if rank 0 finished, or saved and left on a signal."""
        return self.main_status in ("finished", "preempted")


def process_start(start: Start) -> float:
    """Unix time at which the process of a rank that is now ready was started."""
    entry, event = start
    return entry.time - math.fsum(event.startup_seconds.values())


@dataclass(frozen=True)
class History:
    """All attempts of a run, in order."""

    attempts: list[Attempt]
    fired: list[Entry]  # faults made on purpose. They are kept apart: a diagnosis must not be read off the truth.

    @classmethod
    def read(cls, run: Path) -> Self:
        """Read the log of run directory `run`. Raises RunDirectoryError if the log is damaged."""
        return cls.from_entries(events.read(run))

    @classmethod
    def from_entries(cls, entries: Iterable[Entry]) -> Self:
        """Group the entries of one run, in any order."""
        attempts: dict[int, Attempt] = {}
        fired: list[Entry] = []
        for entry in sorted(entries, key=lambda entry: (entry.attempt, entry.time, entry.rank)):
            if isinstance(entry.event, events.FaultFired):
                fired.append(entry)
            else:
                attempt = attempts.setdefault(entry.attempt, Attempt(entry.attempt))
                attempt.entries.append(entry)
                attempt.observe(entry)
        return cls(list(attempts.values()), fired)

    @cached_property
    def entries(self) -> list[Entry]:
        """Entries of all attempts, by attempt and time, without `fired`."""
        return [entry for attempt in self.attempts for entry in attempt.entries]

    @cached_property
    def steps(self) -> list[tuple[Entry, events.StepDone]]:
        """Every computation of a step, replays included."""
        return events.select(self.entries, events.StepDone, rank=0)

    @cached_property
    def committed(self) -> dict[int, events.StepDone]:
        """The steps that the run's present state stands on: each as computed last, and not lost since."""
        steps: dict[int, events.StepDone] = {}
        for attempt in self.attempts:
            # Steps after the checkpoint that an attempt resumed from are lost. One that died before rank 0 was ready
            # has not resumed from any.
            if attempt.start is not None:
                while steps and (newest := next(reversed(steps))) > attempt.start[1].from_step:
                    del steps[newest]
            steps |= {event.step: event for _, event in events.select(attempt.entries, events.StepDone, rank=0)}
        return steps

    @property
    def committed_samples(self) -> dict[int, str]:
        """For each committed step, the digest of the samples that were computed for it."""
        return {step: event.samples for step, event in self.committed.items()}

    @property
    def finish(self) -> tuple[Entry, events.AttemptEnded] | None:
        """Rank 0's end in the first attempt that finished: starting a finished run again changes nothing."""
        return next((attempt.ends[0] for attempt in self.attempts if attempt.main_status == "finished"), None)
