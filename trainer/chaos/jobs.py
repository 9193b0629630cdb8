"""Cases of a campaign as jobs of Slurm: each job runs one case, whole, on its node.

A case starts and breaks its own cluster on the loopback of one machine, so a node can run it as this machine would.
What a node cannot make, such as namespaces, is skipped there with its reason. A case that was broken off begins again.

    OUT/jobs/CASE/        of one job: what fleet/slurm.py puts there, and its output
    OUT/jobs/CASE/made    its result, as JSON; of the case "reference" the reference's digests

`python -m trainer.chaos.jobs CAMPAIGN OUT CASE REPEATS [NAME …]` is such a job: of the campaign's runs NAME, or of all.
"""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep as wait

from trainer import files
from trainer.chaos import plan, results, run
from trainer.chaos.plan import Campaign, Case
from trainer.chaos.results import Report, Result
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, TopropeError
from trainer.faults.checker import NOT_ASKED
from trainer.fleet.slurm import SlurmJob, SlurmJobs, Work

REFERENCE = "reference"
STARTS = 4
"""Number of jobs that a case may have, each of which ended without a result."""
POLL_SECONDS = 0.2
TAIL_LINES = 15


@dataclass
class Jobs:
    """Runs cases as jobs, so many at a time."""

    jobs: SlurmJobs
    most: int
    path: Path
    """The campaign's file, as the nodes find it."""
    only: Sequence[str] = ()
    repeat: int | None = None

    def make_reference(self, campaign: Campaign, out: Path, report: Report) -> None:
        ranks = campaign.command.ranks if campaign.command else 1
        job = _CaseJob(self, out, REFERENCE, ranks * campaign.config.numerics.threads)
        while not job.has_ended():
            wait(POLL_SECONDS)
        if job.has_failed():
            raise TopropeError(f"the job of the reference run {job.failure()}")
        report.reference |= json.loads(job.made.read_text(encoding="utf-8"))

    def run(
        self, campaign: Campaign, cases: Sequence[Case], out: Path, show: Callable[[str], None]
    ) -> Iterator[tuple[Case, Result]]:
        for case in cases:
            if case.not_applicable:
                yield case, case.make_result(NOT_ASKED, case.not_applicable)
        waiting = [case for case in cases if not case.not_applicable]
        running: dict[str, tuple[Case, _CaseJob]] = {}
        while waiting or running:
            while waiting and len(running) < self.most:
                case = waiting.pop(0)
                cpus = case.ranks * case.config.numerics.threads
                running[case.slug] = case, _CaseJob(self, out, case.slug, cpus)
                show(", ".join(case.name for case, _ in running.values()))
            for slug, (case, job) in [*running.items()]:
                if not job.has_ended():
                    continue
                del running[slug]
                if job.has_failed():
                    yield case, case.make_result("unknown", f"its job {job.failure()}")
                elif (result := results.read_result(job.made)).values() == case.values():
                    yield case, result
                else:  # of the campaign as it was before an edit
                    shutil.rmtree(job.directory)
                    waiting.append(case)
                show(", ".join(case.name for case, _ in running.values()))
            wait(POLL_SECONDS)


@dataclass
class _CaseJob:
    """The job of one case, submitted again if it was lost."""

    owner: Jobs
    out: Path
    slug: str
    cpus: int
    statuses: list[int] = field(default_factory=list)
    _job: SlurmJob | None = None

    @property
    def made(self) -> Path:
        return self.directory / "made"

    @property
    def directory(self) -> Path:
        return self.out / "jobs" / self.slug

    def has_ended(self) -> bool:
        if self.made.exists() or self.has_failed():
            return True
        if self._job is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            name, repeats = f"{self.owner.path.stem} {self.slug}", str(self.owner.repeat or 0)
            command = ["trainer.chaos.jobs", str(self.owner.path), str(self.out), self.slug, repeats, *self.owner.only]
            self._job = self.owner.jobs.start(Work(self.directory, name, command, self.cpus, self.made.exists))
        if (status := self._job.poll()) is not None:
            self._job = None
            if not self.made.exists():
                self.statuses.append(status)
        return False

    def has_failed(self) -> bool:
        """True if another job would end like the last: it left by itself, or many were lost."""
        own = bool(self.statuses) and 0 <= self.statuses[-1] != EXIT_PREEMPTED
        return not self.made.exists() and (own or len(self.statuses) >= STARTS)

    def failure(self) -> str:
        """Say how the last job ended, with the end of its output."""
        outputs = sorted(self.directory.glob("job-*.txt"), key=lambda path: path.stat().st_mtime)
        text = outputs[-1].read_text(encoding="utf-8", errors="replace") if outputs else ""
        tail = "\n".join(f"    {line}" for line in text.strip().splitlines()[-TAIL_LINES:])
        status = self.statuses[-1]
        how = f"left with {status}" if status >= 0 else f"was lost {len(self.statuses)} times"
        return f"{how} and made no result.\n  {outputs[-1] if outputs else self.directory} has its output:\n{tail}"


def main(path: str, out: str, slug: str, repeats: str, *only: str) -> int:
    """Run one case, or the reference, and write what came of it."""
    try:
        campaign, place = plan.load(Path(path), only, int(repeats) or None), Path(out)
        report = run.open_report(campaign, place)
        made = place / "jobs" / slug / "made"
        with run.interruptible():
            reference = run.reference_of(campaign, place, report)
            if slug == REFERENCE:
                files.write(made, json.dumps(report.reference))
                return EXIT_FINISHED
            case = next((case for case in campaign.cases if case.slug == slug), None)
            if case is None:
                raise TopropeError(f"{path} has no case {slug}.\n  It was edited since. Give the command again.")
            files.write(made, json.dumps(dataclasses.asdict(run.run_case(campaign, case, reference, place))))
    except KeyboardInterrupt:
        return EXIT_PREEMPTED
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    return EXIT_FINISHED


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
