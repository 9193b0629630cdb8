"""Runs with faults on purpose, each of which must end with the bits of the reference run, which has none."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.support import SMOKE, Job, outcome, settings, summarise_run, trainer, with_faults, write_corpus
from trainer.errors import EXIT_FINISHED
from trainer.faults import plan
from trainer.faults.checker import strays
from trainer.log import events

E = TypeVar("E", bound=events.Event)
STEPS, EVERY = 24, 6
RESTARTS = 10
NO_FAULTS: list[dict[str, Any]] = []


def fault(kind: str, at_step: int | None = None, rank: int | str | None = None, **more: Any) -> dict[str, Any]:
    """A [[faults]] table."""
    values = {"kind": kind, "at_step": at_step, "rank": rank, **more}
    return {key: value for key, value in values.items() if value is not None}


@dataclass
class FaultyRun:
    """A run directory of one test, and the result of the reference run of the same config."""

    directory: Path
    settings: list[str]
    reference: dict[str, Any] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.directory / "run"

    def start(
        self, ranks: int, faults: list[dict[str, Any]], *overrides: str, monitor: float = 0.1,
        slow: dict[str, float] | None = None,
    ) -> Job:  # fmt: skip
        """A job with these faults. Those of earlier jobs on the run stay in its config, and have fired."""
        self.faults += faults
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={RESTARTS}"]
        chosen = [*self.settings, *with_faults(self.faults), *overrides]
        options.append(f"--monitor-interval={monitor}")
        return Job(self.directory / "jobs", SMOKE, self.run, chosen, options, slow=slow)

    def survive(
        self, ranks: int, faults: list[dict[str, Any]], *overrides: str, status: int = EXIT_FINISHED,
        slow: dict[str, float] | None = None,
    ) -> str:  # fmt: skip
        """Run a job to its end, with this status and nothing left behind. Returns its output."""
        with self.start(ranks, faults, *overrides, slow=slow) as job:
            assert job.wait() == status, job.output[-8000:]
            assert job.leftovers() == []
        return job.output

    def fired(self) -> Counter[tuple[int, int | None]]:
        """Number of firings by (index of a fault, rank)."""
        return Counter((event.index, event.victim) for _, event in plan.fired(self.run))

    def ends_as_reference(self, attempts: int | None = None, unfired: int = 0) -> dict[str, Any]:
        """The promise: same bits, losses and samples in every step, no trace on disk, and each fault fired once."""
        assert outcome(self.run) == self.reference
        run_summary = summarise_run(self.run)
        begun = [attempt for attempt in run_summary["attempts"] if attempt["world_size"] is not None]
        assert attempts in (None, len(begun)), [attempt["reason"] for attempt in run_summary["attempts"]]
        assert run_summary["checkpoints"][-1]["step"] == STEPS and all(
            saved["intact"] for saved in run_summary["checkpoints"]
        )
        assert strays(self.run) == []
        fired = self.fired()
        assert {index for index, _ in fired} == set(range(len(self.faults) - unfired)), (fired, self.faults)
        assert all(times == self.faults[index].get("times", 1) for (index, _), times in fired.items()), fired
        return run_summary

    def events(self, kind: type[E]) -> list[E]:
        """The events of this kind, in order."""
        return [event for _, event in events.select(events.read(self.run), kind)]

    def detected_as(self, *indices: int) -> list[str | None]:
        return [row["detected_as"] for row in summarise_run(self.run)["faults"] if row["index"] in indices]


def make_reference(directory: Path) -> FaultyRun:
    """One rank, no faults, less than two epochs, and little to compute: what the tests are about is beside it."""
    chosen = settings(
        data__source=write_corpus(directory / "corpus", 20), data__heldout_fraction=0.2, data__micro_batches=4,
        model__n_layers=1, budget__steps=STEPS, checkpoint__every_steps=EVERY, eval__every_steps=12,
        eval__max_tokens=320,
    )  # fmt: skip
    made = FaultyRun(directory, chosen)
    trainer("train", SMOKE, "--run", made.run, *chosen)
    made.reference = outcome(made.run)
    assert made.reference["status"] == "finished"
    assert sorted(made.reference["samples"]) == list(range(1, STEPS + 1))
    return made
