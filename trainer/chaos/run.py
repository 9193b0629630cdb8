"""Running a campaign: a reference run once, then every case's run with its faults, each held against the reference.

    OUT/report.json, report.html     all results so far; a campaign given the same OUT goes on where it stopped
    OUT/reference/run                the run that the others are held against
    OUT/replay.toml, shrunk/         campaigns of what did not pass, and of its smallest parts that do not
    OUT/cases/NAME/run               one run with faults
    OUT/cases/NAME/start-N           what the job printed when it was given the command for the N-th time

Where a job leaves with a status that its faults explain, the same command is given again, as a person or a scheduler
would; everything else is a failure.
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
from trainer.faults.nemesis import Nemesis
from trainer.faults.plan import PlannedFault
from trainer.launch import namespaces

MORE_STARTS = 3
"""Starts of a job beyond one for each of its faults."""
EXIT_INTERRUPTED = 130
FAILED = ("fail", "undetected")


# What this machine can make


def missing(kind: Fault) -> str | None:
    """Why this machine cannot make a kind; None if it can."""
    for need in kind.needs:
        reason = _lacks(need)
        if reason:
            return reason
    return None


def _lacks(need: str) -> str | None:
    if need == LINUX:
        return None if sys.platform == "linux" else f"needs Linux, this is {platform.system()}"
    if need == NAMESPACES:
        return namespaces.probe()
    return namespaces.shaping() if need == SHAPING else None  # nodes are the job's, not the machine's


# Running

Update = Callable[[list[Result], str], None]


def run(
    campaign: Campaign, out: Path, *, update: Update = lambda results, running: None, shrink: bool = False
) -> Report:
    """Do what is left to do of a campaign; the report is also in OUT, and is so after every run.

    SIGINT, SIGTERM and SIGHUP end all that was started; the report then says that it was interrupted. Raises
    RunDirectoryError if OUT belongs to something else, TopropeError if the reference run fails.
    """
    report = _open(campaign, out)
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
                result = next((result for result in report.results if case.is_answered_by(result)), None)
                if result is None:
                    show(case.name)
                    result = run_case(campaign, case, reference, out)
                    report.results.append(result)
                if shrink and _can_be_shrunk(result) and not _shrunk(out, case).exists():
                    show(f"shrinking {case.name}")
                    result.why += _shrink(campaign, case, result, reference, out)
    except KeyboardInterrupt:
        report.interrupted = True
    show("")
    return report


def _open(campaign: Campaign, out: Path) -> Report:
    path = out / "report.json"
    _make(out)
    fingerprint = configs.fingerprint(campaign.config)
    report = results.read(path)
    results.rename_old_layout(out)
    if report is None:
        if any(out.iterdir()):
            raise RunDirectoryError(f"{out} holds files but no report.json.\n  Give a new or empty --out.")
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        reference: dict[str, Any] = {"fingerprint": fingerprint, "exact": campaign.config.numerics.exact}
        reference |= dict.fromkeys(("weights_sha256", "state_sha256", "steps", "seconds"))
        report = Report(
            campaign.name, campaign.question, str(campaign.config_path), machine, time.time(), 0.0, reference, [], False
        )
    elif (report.campaign, report.reference.get("fingerprint")) != (campaign.name, fingerprint):
        raise RunDirectoryError(
            f"{out} holds a report of campaign {report.campaign!r} on another config.\n"
            "  Results of different configs cannot stand in one report. Give another --out."
        )
    report.interrupted = False
    # The file may have been changed since: what it asks for now is done again, and the rest is no longer its results.
    report.results = [
        result for result in report.results if any(case.is_same_run_as(result) for case in campaign.every)
    ]
    return report


def _make(out: Path) -> None:
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
    """OUT/report.json and OUT/report.html."""
    from trainer.chaos import report as reports

    results.write(out / "report.json", report)
    files.write(out / "report.html", reports.html(report))


def _reference(campaign: Campaign, out: Path, report: Report) -> Reference:
    directory = out / "reference"
    if report.reference["weights_sha256"] is None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        launched = _launch(campaign, campaign.overrides, directory, [], ranks=1, nodes=1, started=time.time())
        if launched.status != EXIT_FINISHED:
            raise TopropeError(
                f"the reference run left with {launched.status}, so there is nothing to compare with.\n"
                f"  {directory / 'start-0'} has all it printed; the last lines:\n{_tail(launched.output)}"
            )
        seconds = launched.ended - launched.started
        found = checker.reference_of(directory / "run", campaign.config, seconds)
        report.reference |= {
            "weights_sha256": found.weights_sha256, "state_sha256": found.state_sha256, "steps": found.steps,
            "seconds": seconds,
        }  # fmt: skip
    return checker.reference_of(directory / "run", campaign.config, report.reference["seconds"])


def run_case(campaign: Campaign, case: Case, reference: Reference, out: Path) -> Result:
    """One run with its faults, from its first start to the verdict."""
    reasons = [f"{fault.kind.name}: {why}" for fault in case.planned if (why := missing(fault.kind))]
    if reasons:
        return case.make_result("skipped", "; ".join(dict.fromkeys(reasons)))
    directory, started = out / "cases" / case.slug, time.time()
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    launches, leftovers, notes = _launches(campaign, case, directory, started)
    evidence = Evidence(directory / "run", case.config, case.planned, reference, launches, leftovers, notes)
    answers = checker.check(evidence)
    outcome, why = results.outcome(answers)
    return case.make_result(
        outcome, why, answers=answers, launches=launches, measured=_measured(evidence),
        timeline=_timeline(evidence.run), run=str(evidence.run), seconds=time.time() - started,
    )  # fmt: skip


def _measured(evidence: Evidence) -> list[dict[str, Any]]:
    try:
        return checker.measure(evidence)
    except TopropeError:  # the log cannot be read, and the answers say so
        return []


def _timeline(run_directory: Path) -> dict[str, Any]:
    from trainer.log.timeline import read_timeline

    try:
        return read_timeline(run_directory)
    except TopropeError:
        return {}


def _launches(
    campaign: Campaign, case: Case, directory: Path, started: float
) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Give the command, and again while its status is one that the faults explain: (launches, leftovers, notes)."""
    overrides = [*case.overrides, f"faults={tomlfile.text(case.faults)}"]
    if any(fault.kind.damages_tokens for fault in case.planned):  # not the store that all others read
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
    started: float
    ended: float
    status: int | None
    """As a shell would say it; None if it had to be ended."""
    output: str
    leftovers: list[str]
    notes: list[str]


def _launch(
    campaign: Campaign, overrides: Sequence[str], directory: Path, planned: Sequence[PlannedFault], ranks: int,
    nodes: int, started: float, worker: Sequence[str] = ("trainer", "train"),
) -> _Launched:  # fmt: skip
    """Give the command once and wait for its end; nothing of it lives when this returns."""
    from trainer.launch.cluster import Cluster

    scratch = directory / f"start-{len(list(directory.glob('start-*')))}"
    with contextlib.ExitStack() as stack:
        hosts = None
        if any(NAMESPACES in fault.kind.needs for fault in planned):
            hosts = stack.enter_context(namespaces.Hosts(nodes))
        began = time.time()
        cluster = stack.enter_context(
            Cluster(
                campaign.config_path, directory / "run", overrides, ranks=ranks // nodes, nodes=nodes,
                restarts=campaign.restarts_for(len(planned)), directory=scratch, hosts=hosts,
                environment={"WANDB_MODE": "disabled"}, own_store=any(fault.kind.needs_store for fault in planned),
                worker=worker, warm=True,
            )
        )  # fmt: skip
        nemesis = Nemesis(planned, directory / "run", cluster, started)
        cluster.start()
        nemesis.start()
        stack.callback(nemesis.stop)
        status = cluster.wait(campaign.timeout_seconds)
        ended = time.time()
        nemesis.stop()
        notes = list(nemesis.problems)
        if status is None:
            notes.append(f"a job did not end within {campaign.timeout_seconds:g} s")
            cluster.kill()
        return _Launched(began, ended, status, cluster.output, cluster.leftovers(), notes)


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-lines:])


def _can_be_shrunk(result: Result) -> bool:
    return result.outcome in FAILED and bool(result.answers) and len(result.faults) > 1


def _shrunk(out: Path, case: Case) -> Path:
    return out / "shrunk" / f"{case.slug}.toml"


def _shrink(campaign: Campaign, case: Case, result: Result, reference: Reference, out: Path) -> str:
    """Find the smallest part of a schedule that fails in the same way, and keep it in a file. Returns a remark."""
    bad = results.worst(result.answers)
    assert bad is not None

    def fails(faults: list[Table]) -> bool:
        config = configs.load(campaign.config_path, [*case.overrides, f"faults={tomlfile.text(faults)}"])
        part = replace(case, faults=faults, config=config, planned=plan.make(config, case.ranks, case.nodes))
        answers = run_case(campaign, part, reference, out).answers
        return any((answer.invariant, answer.answer) == (bad.invariant, bad.answer) for answer in answers)

    # What was drawn by index must stay as it was when others are left out.
    found = schedule.shrink(fails, result.faults)
    path = _shrunk(out, case)
    path.parent.mkdir(exist_ok=True)
    path.write_text(replay.text(campaign, [replace(result, faults=found.faults)]), encoding="utf-8")
    sure = "" if found.smallest else ", perhaps not the smallest"
    return f" [{len(found.faults)} of {len(result.faults)} faults are enough{sure}: {path}, {found.trials} trials]"


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first of these signals is a KeyboardInterrupt; those after it must not disturb the cleaning up.

    SIGHUP comes when a terminal is closed. The jobs have sessions of their own, so it does not reach them.
    """
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, which means it to go on
        numbers.append(signal.SIGHUP)

    def interrupt(number: int, _frame: Any) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, interrupt) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def keep_replay(campaign: Campaign, report: Report, out: Path) -> Path | None:
    """OUT/replay.toml: what did not pass, as a campaign that does exactly the same again. None if there is nothing."""
    path, failed = out / "replay.toml", [result for result in report.results if result.outcome in FAILED]
    if failed:
        path.write_text(replay.text(campaign, failed), encoding="utf-8")
    else:
        path.unlink(missing_ok=True)
    return path if failed else None


def default_out(campaign: Campaign) -> Path:
    return Path("runs") / "chaos" / f"{campaign.name}-{time.strftime('%Y%m%d-%H%M%S')}"
