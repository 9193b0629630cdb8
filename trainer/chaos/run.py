"""Running a campaign: a reference run once, then every case with its faults, each compared with the reference.

    OUT/report.json, report.html     all results so far; a campaign given the same OUT goes on where it stopped
    OUT/reference/run                the run that the others are compared with
    OUT/replay.toml, shrunk/         campaigns of what did not pass, and of its smallest parts that do not
    OUT/cases/NAME/run               one run with faults
    OUT/cases/NAME/start-N           what the job printed when it was given the command for the N-th time

If a job leaves with an exit status that its faults explain, the same command is given again, as a person or a scheduler
would give it. Any other status is a failure.
"""

import contextlib
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import files, tomlfile
from trainer.chaos import replay, results, schedule
from trainer.chaos.plan import Campaign, Case
from trainer.chaos.results import Report, Result
from trainer.chaos.schedule import Table
from trainer.errors import EXIT_FINISHED, RunDirectoryError, TopropeError
from trainer.faults import checker, plan
from trainer.faults.checker import Evidence, Reference
from trainer.faults.fault import LINUX, NAMESPACES, SHAPING, Fault
from trainer.faults.plan import PlannedFault
from trainer.fleet import supervision
from trainer.launch import namespaces
from trainer.launch.cluster import Cluster
from trainer.log.timeline import read_timeline

MORE_STARTS = 3
"""Starts of a job beyond one for each of its faults."""
EXIT_INTERRUPTED = 130
TAIL_LINES = 15
FAILED = ("fail", "undetected")


# What this machine can make


def missing(kind: Fault) -> str | None:
    """Return the reason why this machine cannot make a kind of fault; None if it can."""
    return next((reason for need in kind.needs if (reason := _probe(need))), None)


def _probe(need: str) -> str | None:
    if need == LINUX and sys.platform != "linux":
        return f"needs Linux, this is {platform.system()}"
    if need == NAMESPACES:
        return namespaces.probe()
    return namespaces.shaping() if need == SHAPING else None  # nodes are the job's, not the machine's


# Running


def run(
    campaign: Campaign, out: Path, *, update: Callable[[list[Result], str], None] = lambda results, running: None,
    shrink: bool = False,
) -> Report:  # fmt: skip
    """Do what is left of a campaign, and return its report. OUT holds the report too, written after every run.

    `update` receives all results so far and the name of what runs now. SIGINT, SIGTERM and SIGHUP end all processes;
    the report then says that it was interrupted. Raises RunDirectoryError if OUT belongs to something else,
    TopropeError if the reference run fails.
    """
    report = _open_report(campaign, out)
    before, began = report.seconds, time.monotonic()

    def show(running: str) -> None:
        report.seconds = before + time.monotonic() - began
        write(out, report)
        update(report.results, running)

    try:
        with _interruptible():
            show("reference")
            reference = _reference(campaign, out, report)
            for case in campaign.cases:
                # A result of an earlier start of this campaign stands: the case is not run again.
                result = next((result for result in report.results if case.is_answered_by(result)), None)
                if result is None:
                    show(case.name)
                    result = run_case(campaign, case, reference, out)
                    report.results.append(result)
                failed = result.outcome in FAILED and bool(result.answers)
                if shrink and failed and len(result.faults) > 1 and not _shrunk_path(out, case).exists():
                    show(f"shrinking {case.name}")
                    result.why += _shrink(campaign, case, result, reference, out)
    except KeyboardInterrupt:
        report.interrupted = True
    show("")
    return report


def _open_report(campaign: Campaign, out: Path) -> Report:
    """The report in OUT, less the results that the campaign file asks for no more; a new one in an empty OUT."""
    _make_writable(out)
    fingerprint = configs.fingerprint(campaign.config)
    report = results.read(out / "report.json")
    results.rename_old_layout(out)
    if report is None:
        if any(out.iterdir()):
            raise RunDirectoryError(f"{out} holds files but no report.json.\n  Give a new or empty --out.")
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        reference: dict[str, Any] = {"fingerprint": fingerprint, "exact": campaign.config.numerics.exact}
        reference |= dict.fromkeys(("weights_sha256", "state_sha256", "steps", "seconds"))
        return Report(
            campaign.name, campaign.question, str(campaign.config_path), machine, time.time(), 0.0, reference, [], False
        )
    if (report.campaign, report.reference.get("fingerprint")) != (campaign.name, fingerprint):
        raise RunDirectoryError(
            f"{out} holds a report of campaign {report.campaign!r} on another config.\n"
            "  Results of different configs cannot stand in one report. Give another --out."
        )
    report.interrupted = False
    # The file may have been edited since: a run that it describes otherwise now is run again.
    report.results = [
        result for result in report.results if any(case.is_same_run_as(result) for case in campaign.every)
    ]
    return report


def _make_writable(out: Path) -> None:
    try:
        if out.exists() and not out.is_dir():
            raise RunDirectoryError(f"{out} is a file.\n  --out takes a directory: a new one, or a campaign's own.")
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json.partial").touch()
        (out / "report.json.partial").unlink()
    except OSError as error:
        raise RunDirectoryError(
            f"{out} cannot be written: {error.strerror}.\n  Runs and report go there. Give a writable --out."
        ) from None


def write(out: Path, report: Report) -> None:
    """Write OUT/report.json and OUT/report.html."""
    from trainer.chaos import report as reports

    results.write(out / "report.json", report)
    files.write(out / "report.html", reports.html(report))


def _reference(campaign: Campaign, out: Path, report: Report) -> Reference:
    """Make the reference run if the report does not know it yet, and read what the others are compared with."""
    directory = out / "reference"
    if report.reference["weights_sha256"] is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        launched = _launch(campaign, campaign.overrides, directory, [], ranks=1, nodes=1, started=time.time())
        if launched.status != EXIT_FINISHED:
            tail = "\n".join(f"    {line}" for line in launched.output.strip().splitlines()[-TAIL_LINES:])
            raise TopropeError(
                f"the reference run left with {launched.status}, so there is nothing to compare with.\n"
                f"  {directory / 'start-0'} has all it printed; the last lines:\n{tail}"
            )
        seconds = launched.ended - launched.started
        found = checker.reference_of(directory / "run", campaign.config, seconds)
        report.reference |= {
            "weights_sha256": found.weights_sha256, "state_sha256": found.state_sha256, "steps": found.steps,
            "seconds": seconds,
        }  # fmt: skip
    return checker.reference_of(directory / "run", campaign.config, report.reference["seconds"])


def run_case(campaign: Campaign, case: Case, reference: Reference, out: Path) -> Result:
    """Run one case with its faults, check every invariant, and return its result."""
    reasons = [f"{fault.kind.name}: {why}" for fault in case.planned if (why := missing(fault.kind))]
    if reasons:
        return case.make_result("skipped", "; ".join(dict.fromkeys(reasons)))
    directory, started = out / "cases" / case.slug, time.time()
    # What an interrupted start of the campaign left is no part of this run.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    launches, leftovers, notes = _launches(campaign, case, directory, started)
    evidence = Evidence(directory / "run", case.config, case.planned, reference, launches, leftovers, notes)
    answers = checker.check(evidence)
    outcome, why = results.outcome(answers)
    measured, drawn = [], {}
    with contextlib.suppress(TopropeError):  # the log cannot be read, and the answers say so
        measured = checker.measure(evidence)
        drawn = read_timeline(evidence.run)
    return case.make_result(
        outcome, why, answers=answers, launches=launches, measured=measured, timeline=drawn, run=str(evidence.run),
        seconds=time.time() - started,
    )  # fmt: skip


def _launches(
    campaign: Campaign, case: Case, directory: Path, started: float
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Start the job, and start it again while faults explain its exit status: (launches, leftovers, notes)."""
    overrides = [*case.overrides, f"faults={tomlfile.text(case.faults)}"]
    if any(fault.kind.damages_tokens for fault in case.planned):
        # Other runs read the shared token store, so this case gets one of its own to damage.
        overrides.append(f"data.cache_dir={tomlfile.text(str((directory / 'cache').absolute()))}")
    explained = {status for fault in case.planned for status in fault.kind.exits}
    launches, leftovers, notes = [], [], []
    for _ in range(len(case.planned) + MORE_STARTS):
        shape = (case.ranks, case.nodes)
        launched = _launch(campaign, overrides, directory, case.planned, *shape, started, case.worker)
        launches.append({"started": launched.started, "ended": launched.ended, "status": launched.status})
        leftovers += launched.leftovers
        notes += launched.notes
        if launched.status == EXIT_FINISHED or launched.status not in explained:
            break
    return launches, leftovers, notes


@dataclass(frozen=True)
class _Launched:
    """One start of a job, from command to exit."""

    started: float
    ended: float
    status: int | None
    """Exit status as a shell shows it; None if the job had to be ended."""
    output: str
    leftovers: list[str]
    notes: list[str]
    """Faults that could not be made, and other problems of the campaign itself."""


def _launch(
    campaign: Campaign, overrides: Sequence[str], directory: Path, planned: Sequence[PlannedFault], ranks: int,
    nodes: int, started: float, worker: Sequence[str] = ("trainer", "train"),
) -> _Launched:  # fmt: skip
    """Start the job once and wait for its end; no process of it lives when this returns."""
    with contextlib.ExitStack() as stack:
        hosts = None
        if any(NAMESPACES in fault.kind.needs for fault in planned):
            hosts = stack.enter_context(namespaces.Hosts(nodes))
        began = time.time()
        cluster = Cluster(
            campaign.config_path, directory / "run", overrides, ranks=ranks // nodes, nodes=nodes,
            restarts=campaign.restarts_for(len(planned)), directory=supervision.new_start_directory(directory),
            hosts=hosts, environment={"WANDB_MODE": "disabled"},
            own_store=any(fault.kind.needs_store for fault in planned), worker=worker, warm=True,
        )  # fmt: skip
        nemesis = stack.enter_context(supervision.running(cluster, planned, directory / "run", started))
        status = cluster.wait(campaign.timeout_seconds)
        ended = time.time()
        # The faults end with the job: one that fired now would hit the next start.
        nemesis.stop()  # before leftovers are counted: it undoes faults that last
        notes = list(nemesis.problems)
        if status is None:
            notes.append(f"a job did not end within {campaign.timeout_seconds:g} s")
            cluster.kill()
        return _Launched(began, ended, status, cluster.output, cluster.leftovers(), notes)


def _shrunk_path(out: Path, case: Case) -> Path:
    return out / "shrunk" / f"{case.slug}.toml"


def _shrink(campaign: Campaign, case: Case, result: Result, reference: Reference, out: Path) -> str:
    """Find the smallest part of a schedule that fails in the same way, and write it to a file. Returns a remark."""
    bad = results.worst(result.answers)
    assert bad is not None

    def fails(faults: list[Table]) -> bool:
        config = configs.load(campaign.config_path, [*case.overrides, f"faults={tomlfile.text(faults)}"])
        part = replace(case, faults=faults, config=config, planned=plan.make(config, case.ranks, case.nodes))
        answers = run_case(campaign, part, reference, out).answers
        return any((answer.invariant, answer.answer) == (bad.invariant, bad.answer) for answer in answers)

    # result.faults is fully resolved: what was drawn by a fault's index stays as it was when others are left out.
    found = schedule.shrink(fails, result.faults)
    path = _shrunk_path(out, case)
    path.parent.mkdir(exist_ok=True)
    path.write_text(replay.text(campaign, [replace(result, faults=found.faults)]), encoding="utf-8")
    sure = "" if found.smallest else ", perhaps not the smallest"
    return f" [{len(found.faults)} of {len(result.faults)} faults are enough{sure}: {path}, {found.trials} trials]"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first of these signals; ignore later ones, which would disturb the cleaning up.

    SIGHUP comes when a terminal is closed. The jobs have sessions of their own, so it does not reach them.
    """
    numbers = [*supervision.STOPPING]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup: the campaign shall go on
        numbers.append(signal.SIGHUP)

    def interrupt(_number: int, _frame: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with supervision.handle_signals(interrupt, numbers):
        yield


def keep_replay(campaign: Campaign, report: Report, out: Path) -> Path | None:
    """Write the cases that did not pass to OUT/replay.toml, a campaign that repeats them. None if there are none."""
    path, failed = out / "replay.toml", [result for result in report.results if result.outcome in FAILED]
    if failed:
        path.write_text(replay.text(campaign, failed), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
    return path if failed else None


def default_out(campaign: Campaign) -> Path:
    return Path("runs") / "chaos" / f"{campaign.name}-{time.strftime('%Y%m%d-%H%M%S')}"
