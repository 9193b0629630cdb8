"""The evidence of a run with faults: the plan, the faults that fired, the log, and how its jobs ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.faults import plan
from trainer.faults.attribution import Attribution, Firing, attribute
from trainer.faults.plan import PlannedFault
from trainer.log.events import Entry, FaultFired
from trainer.log.history import History
from trainer.log.incidents import Incident, incidents_of


@dataclass(frozen=True)
class Reference:
    """Result of the run without faults."""

    weights_sha256: str | None
    """None if the run did not finish, as `state_sha256`."""
    state_sha256: str | None
    samples: dict[int, str]
    """Digest of the samples by step."""
    steps: int
    seconds: float
    exact: bool
    """True if sums do not depend on their order, so that the weights of other runs can be equal."""


def reference_of(run: Path, config: Config, seconds: float) -> Reference:
    """The result of the finished run in directory `run`, which took so many seconds."""
    history = History.read(run)
    hashes = (end[1].weights_sha256, end[1].state_sha256) if (end := history.finish) is not None else (None, None)
    return Reference(*hashes, history.committed_samples, config.budget.steps, seconds, config.numerics.exact)


@dataclass(frozen=True)
class Evidence:
    """The plan of a run with faults, and its results."""

    run: Path
    config: Config
    planned: Sequence[PlannedFault]
    reference: Reference
    launches: Sequence[Mapping[str, Any]]
    """{started, ended, status} of each time the command was given, in Unix seconds."""
    leftovers: Sequence[str] = ()
    notes: Sequence[str] = ()
    """Notes of the nemesis and the runner: faults that could not be made, a job that had to be ended."""

    @cached_property
    def history(self) -> History:
        return History.read(self.run)

    @property
    def entries(self) -> list[Entry]:
        """The run's own log, without the faults that fired: a diagnosis must not be read off the truth."""
        return self.history.entries

    @cached_property
    def incidents(self) -> list[Incident]:
        return incidents_of(self.history)

    @cached_property
    def firings(self) -> list[Firing]:
        """The faults that fired, in order: one entry for each fault of the plan, however many ranks it hit."""
        found: dict[int, Firing] = {}
        planned = {fault.index: fault for fault in self.planned}
        for entry in plan.fired(self.run):
            event = entry.event
            assert isinstance(event, FaultFired)
            if event.index in planned:
                firing = found.setdefault(event.index, Firing(planned[event.index], entry.time, entry.attempt, event))
                firing.victims.add(event.victim)
        return sorted(found.values(), key=lambda firing: firing.time)

    @cached_property
    def attributions(self) -> list[Attribution]:
        taken = set[int]()
        return [attribute(self, firing, taken) for firing in self.firings]
