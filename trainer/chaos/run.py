"""Running a campaign: a reference run once, then every case with its faults, each compared with the reference.

    OUT/report.json, report.html     all results so far; a campaign given the same OUT resumes where it stopped
    OUT/reference/run                the run that the others are compared with
    OUT/replay.toml, shrunk/         campaigns of the cases that did not pass, and of their smallest failing parts
    OUT/cases/NAME/run               one run with faults
    OUT/cases/NAME/record            of a job that is no toprope run: the faults that fired, its progress
    OUT/cases/NAME/start-N           output of the job's N-th start

If a job leaves with an exit status that its faults explain, the same command is given again, as a person or a scheduler
would give it. Any other status is a failure.
"""

import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from trainer import files, signals, tomlfile
from trainer.chaos import command, results, schedule
from trainer.chaos.command import CommandEvidence, CommandReference
from trainer.chaos.plan import Campaign, Case
from trainer.chaos.report import html
from trainer.chaos.results import Report, Result, Table
from trainer.errors import EXIT_FINISHED, RunDirectoryError, TopropeError, of_system
from trainer.faults import checker
from trainer.faults.checker import NOT_ASKED, Evidence, Reference
from trainer.faults.fault import LINUX, NAMESPACES, SHAPING, Fault
from trainer.fleet import supervision
from trainer.launch import namespaces, transport
from trainer.launch.cluster import ApartCluster, Cluster, QuorumCluster
from trainer.log import rundir
from trainer.log.timeline import read_timeline

MORE_STARTS = 3
"""Number of starts that a job may have beyond one for each of its faults."""
EXIT_INTERRUPTED = 130
TAIL_LINES = 15
FAILED = ("fail", "undetected")


def missing(kind: Fault) -> str | None:
    """Return the reason why this machine cannot make a kind of fault; None if it can."""
    if LINUX in kind.needs and sys.platform != "linux":
        return f"needs Linux, this is {platform.system()}"
    # The other needs are met by the job itself (two nodes), not by the machine.
    probes = {NAMESPACES: namespaces.probe, SHAPING: namespaces.shaping}
    return next((reason for need in kind.needs if need in probes and (reason := probes[need]())), None)


class Elsewhere(Protocol):
    """Place where cases are run, if it is not here."""

    def make_reference(self, campaign: Campaign, out: Path, report: Report) -> None:
        """Make OUT/reference and fill `report.reference`. Raises TopropeError if the reference run fails."""
        ...

    def run(
        self, campaign: Campaign, cases: Sequence[Case], out: Path, show: Callable[[str], None]
    ) -> Iterator[tuple[Case, Result]]:
        """Yield each case and its result, in any order; call `show` with what runs now."""
        ...


def run(
    campaign: Campaign, out: Path, *, update: Callable[[list[Result], str], None] = lambda results, running: None,
    shrink: bool = False, elsewhere: Elsewhere | None = None,
) -> Report:  # fmt: skip
    """Run the cases that have no result yet, and return the report. OUT holds the report too, written after every run.

    `update` receives all results so far and the name of the current run. SIGINT, SIGTERM and SIGHUP end all processes;
    the report then says that it was interrupted. Raises RunDirectoryError if OUT belongs to something else,
    TopropeError if the reference run fails.
    """
    report = open_report(campaign, out)
    before, began = report.seconds, time.monotonic()

    def show(running: str) -> None:
        report.seconds = before + time.monotonic() - began
        results.write(out / "report.json", report)
        files.write(out / "report.html", html(report))
        update(report.results, running)

    def shrunk(case: Case, result: Result) -> None:
        # A failure of an earlier start is shrunk too, but once: its file says that it was done.
        failed = result.outcome in FAILED and bool(result.answers)
        if shrink and failed and len(result.faults) > 1 and not _shrunk_path(out, case).exists():
            show(f"shrinking {case.name}")
            result.why += _shrink(campaign, case, result, reference, out)

    try:
        with interruptible():
            show("reference")
            if elsewhere is not None and not has_reference(report):
                elsewhere.make_reference(campaign, out, report)
            reference = reference_of(campaign, out, report)
            # A result of an earlier start of this campaign is kept: the case is not run again.
            report.results = [result for result in report.results if result.was_made]
            known = {case.slug: r for case in campaign.cases for r in report.results if r.values() == case.values()}
            for case in campaign.cases:
                if case.slug in known:
                    shrunk(case, known[case.slug])
            waiting = [case for case in campaign.cases if case.slug not in known]
            made = _here(campaign, waiting, reference, out, show)
            for case, result in made if elsewhere is None else elsewhere.run(campaign, waiting, out, show):
                report.results.append(result)
                report.results.sort(key=lambda r: _place(campaign, r))
                shrunk(case, result)
    except KeyboardInterrupt:
        report.interrupted = True  # the case that was running has no result, so it is run again
    show("")
    return report


def _here(
    campaign: Campaign, cases: Sequence[Case], reference: Reference | CommandReference, out: Path,
    show: Callable[[str], None],
) -> Iterator[tuple[Case, Result]]:  # fmt: skip
    for case in cases:
        show(case.name)
        yield case, run_case(campaign, case, reference, out)


def _place(campaign: Campaign, result: Result) -> tuple[int, int]:
    """Place of a result in the order in which cases are run here."""
    return result.repeat, next(n for n, case in enumerate(campaign.every) if case.is_same_run_as(result))


def open_report(campaign: Campaign, out: Path) -> Report:
    """Return the report in OUT, without the results that the campaign no longer asks for; a new one if OUT is empty."""
    try:
        if out.exists() and not out.is_dir():
            raise RunDirectoryError(f"{out} is a file.\n  --out takes a directory: a new one, or a campaign's own.")
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        rule, remedy = "Runs and report go there.", "Give an --out that can be written."
        raise RunDirectoryError(of_system(error, f"{out} cannot be written", rule, remedy)) from None
    fingerprint = campaign.identity
    report = results.read(out / "report.json")
    results.rename_old_layout(out)
    if report is None:
        if any(out.iterdir()):
            raise RunDirectoryError(f"{out} holds files but no report.json.\n  Give a new or empty --out.")
        machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        reference: dict[str, Any] = {"fingerprint": fingerprint, "exact": campaign.config.numerics.exact}
        reference |= dict.fromkeys(("weights_sha256", "state_sha256", "steps", "seconds"))
        job = campaign.command.about if campaign.command else str(campaign.config_path)
        about = (campaign.path.stem, campaign.file.question, job, machine)
        return Report(*about, started=time.time(), seconds=0.0, reference=reference, results=[], interrupted=False)
    if (report.campaign, report.reference.get("fingerprint")) != (campaign.path.stem, fingerprint):
        raise RunDirectoryError(
            f"{out} holds a report of campaign {report.campaign!r} on another config or command.\n"
            "  One report cannot hold results of different jobs. Give another --out."
        )
    report.interrupted = False
    # The campaign file may have been edited since, so only results of cases that are still in it are kept.
    report.results = [
        result for result in report.results if any(case.is_same_run_as(result) for case in campaign.every)
    ]
    return report


def has_reference(report: Report) -> bool:
    return report.reference["weights_sha256"] is not None or "leftovers" in report.reference


def reference_of(campaign: Campaign, out: Path, report: Report) -> Reference | CommandReference:
    """Make the reference run unless the report has it already, and read it."""
    directory = out / "reference"
    if campaign.command and "leftovers" in report.reference:
        known = report.reference
        return CommandReference(known["result"], known["steps"], known["seconds"], tuple(known["leftovers"]))
    if not has_reference(report):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        ranks = campaign.command.ranks if campaign.command else 1
        nodes = campaign.file.nodes if campaign.command else 1
        # One rank, whom no launcher has to hold together, whatever the mode of the cases is.
        overrides = campaign.overrides if campaign.command else [*campaign.overrides, 'elastic.mode="restart"']
        alone = Case("reference", [], [], ranks, nodes, "", None, 0, overrides, config=campaign.config, planned=[])
        launched = _launch(campaign, overrides, directory, alone, time.time())
        if launched.status != EXIT_FINISHED:
            tail = "\n".join(f"    {line}" for line in launched.output.strip().splitlines()[-TAIL_LINES:])
            raise TopropeError(
                f"the reference run left with {launched.status}, so there is nothing to compare with.\n"
                f"  {directory / 'start-0'} has its whole output; the last lines:\n{tail}"
            )
        report.reference["seconds"] = launched.ended - launched.started
        if campaign.command:
            return _reference_of_command(campaign, directory, launched, report)
    found = checker.reference_of(directory / "run", campaign.config, report.reference["seconds"])
    report.reference |= {name: getattr(found, name) for name in ("weights_sha256", "state_sha256", "steps")}
    return found


def _reference_of_command(campaign: Campaign, directory: Path, launched: "Launch", report: Report) -> CommandReference:
    """Read what the job without faults did. Raises TopropeError if it did not do what the campaign says."""
    assert campaign.command is not None
    result, why = command.result_of(campaign.command, directory, launched.output)
    seen = command.observed(directory)
    if campaign.file.progress is not None and not seen:
        why = "it made no progress that progress.pattern or progress.file would show"
    if why:
        raise TopropeError(
            f"the reference run finished, but {why}.\n"
            f"  Without it nothing can be compared. {directory / 'start-0'} has its output. Mend the campaign."
        )
    steps = seen[-1][1] if seen and campaign.command.tells_steps else None
    left = sorted({command.shape(leftover) for leftover in launched.leftovers} - {"process"})
    report.reference |= {"result": result, "steps": steps, "leftovers": left}
    return CommandReference(result, steps, launched.ended - launched.started, tuple(left))


def run_case(campaign: Campaign, case: Case, reference: Reference | CommandReference, out: Path) -> Result:
    """Run one case with its faults, check every invariant, and return its result."""
    if case.not_applicable:
        return case.make_result(NOT_ASKED, case.not_applicable)
    reasons = [f"{fault.kind.name}: {why}" for fault in case.planned if (why := missing(fault.kind))]
    if case.transport == "mptcp" and (why := transport.missing() or namespaces.multipath()):
        reasons.append(f"transport: {why}")
    if reasons:
        return case.make_result("skipped", "; ".join(dict.fromkeys(reasons)))
    directory, started = out / "cases" / case.slug, time.time()
    # An interrupted start of the campaign may have left half a run here.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    launched = launch_until_done(campaign, case, directory, started)
    launches = [{"started": launch.started, "ended": launch.ended, "status": launch.status} for launch in launched]
    leftovers = [leftover for launch in launched for leftover in launch.leftovers]
    notes = [note for launch in launched for note in launch.notes]
    job = (launches, leftovers, notes)
    drawn, commit = {}, ""
    if isinstance(reference, CommandReference):
        assert campaign.command is not None
        seen = CommandEvidence(command.record(directory), case.config, case.planned, reference, *job)
        answers = command.check(campaign.command, seen, launched[-1].output)
        measured = command.measure(campaign.command, seen)
    else:
        evidences = _evidences(case, directory / "run", reference, job)
        answers, measured = checker.check_clusters(evidences), []
        with contextlib.suppress(TopropeError):  # the log cannot be read, and the answers say so
            measured = [fault for evidence in evidences for fault in checker.measure(evidence)]
            drawn = read_timeline(evidences[0].run)
            commit = rundir.read(evidences[0].run).get("git_commit") or ""
    outcome, why = results.outcome(answers)
    return case.make_result(
        outcome, why, answers=answers, launches=launches, measured=measured, timeline=drawn,
        run=str(directory / "run"), seconds=time.time() - started, commit=commit,
    )  # fmt: skip


def _evidences(case: Case, run: Path, reference: Reference, job: tuple[Any, ...]) -> list[Evidence]:
    """Return the evidence to judge: one run's, or that of each cluster that lives apart, with the faults to hit it."""
    if not case.apart:
        return [Evidence(run, case.config, case.planned, reference, *job)]
    ranks = case.config.parallel.island_ranks
    found = []
    for cluster in range(case.ranks // ranks):
        own = [fault for fault in case.planned if cluster in {rank // ranks for rank in fault.victims(case.ranks)}]
        found.append(Evidence(rundir.of_cluster(run, cluster), case.config, own, reference, *job))
    return found


@dataclass(frozen=True)
class Launch:
    """One start of a job, from command to exit."""

    started: float
    ended: float
    status: int | None
    """Exit status as a shell shows it; None if the job had to be ended."""
    output: str
    leftovers: list[str]
    """Processes and other traces that the job left behind."""
    notes: list[str]
    """Faults that could not be made, and other problems of the campaign itself."""


def launch_until_done(campaign: Campaign, case: Case, directory: Path, started: float) -> list[Launch]:
    """Start the job, and start it again while its faults explain its exit status."""
    overrides = [*case.overrides, f"faults={tomlfile.text(case.faults)}"]
    if any(fault.kind.damages_tokens for fault in case.planned):
        # Other runs read the shared token store, so this case gets its own store to damage.
        overrides.append(f"data.cache_dir={tomlfile.text(str((directory / 'cache').absolute()))}")
    explained = {status for fault in case.planned for status in fault.kind.exits} | {*campaign.file.again_after}
    launches: list[Launch] = []
    for _ in range(len(case.planned) + MORE_STARTS):
        launches.append(_launch(campaign, overrides, directory, case, started))
        if launches[-1].status == EXIT_FINISHED or launches[-1].status not in explained:
            break
    return launches


def _launch(
    campaign: Campaign, overrides: Sequence[str], directory: Path, case: Case, started: float
) -> Launch:  # fmt: skip
    """Start the job once and wait for its end. None of its processes is alive on return."""
    with contextlib.ExitStack() as stack:
        hosts, environment = None, {"WANDB_MODE": "disabled", transport.TRANSPORT: case.transport}
        over_mptcp = case.transport == "mptcp"
        if over_mptcp or any(NAMESPACES in fault.kind.needs for fault in case.planned):
            links = max([2 if over_mptcp else 1, *(fault.kind.links for fault in case.planned)])
            hosts = stack.enter_context(namespaces.Hosts(case.nodes, links))
            if over_mptcp:
                hosts.allow_multipath()
        began, start, run = time.time(), supervision.new_start_directory(directory), directory / "run"
        own_store = any(fault.kind.needs_store for fault in case.planned)
        watch = None
        if campaign.command:
            cluster = campaign.command.cluster(
                directory, start, ranks=case.ranks, nodes=case.nodes, hosts=hosts, own_store=own_store
            )
            run = command.record(directory)
            watch = command.Watch(campaign.command, directory, cluster, case.ranks)
        elif case.mode == "quorum":
            cluster = QuorumCluster(
                campaign.config_path, run, overrides, ranks=case.ranks, spares=case.spares, directory=start,
                environment=environment, warm=True,
            )  # fmt: skip
        elif case.apart:
            cluster = ApartCluster(
                campaign.config_path, run, overrides, ranks=case.ranks, of_cluster=case.config.parallel.island_ranks,
                directory=start, environment=environment, warm=True,
            )  # fmt: skip
        else:
            # A warm cluster forks its ranks from a process that has torch imported: that costs seconds per start.
            cluster = Cluster(
                campaign.config_path, run, overrides, ranks=case.ranks // case.nodes, nodes=case.nodes,
                restarts=campaign.restarts_for(len(case.planned)), directory=start, hosts=hosts,
                environment=environment, own_store=own_store, worker=case.worker, warm=True,
            )  # fmt: skip
        nemesis = stack.enter_context(supervision.running(cluster, case.planned, run, started, watch))
        if watch is not None:
            stack.enter_context(watch)
        status = cluster.wait(campaign.file.timeout_seconds)
        ended = time.time()
        # The faults end with the job, since one that fired now would hit the next start. Stopping also undoes lasting
        # faults, so it comes before the leftovers are counted.
        nemesis.stop()
        notes = list(nemesis.problems)
        if status is None:
            notes.append(f"a job did not end within {campaign.file.timeout_seconds:g} s")
            cluster.kill()
        return Launch(began, ended, status, cluster.output, cluster.leftovers(), notes)


def _shrunk_path(out: Path, case: Case) -> Path:
    return out / "shrunk" / f"{case.slug}.toml"


def _shrink(campaign: Campaign, case: Case, result: Result, reference: Reference | CommandReference, out: Path) -> str:
    """Find the smallest part of a schedule with the same failure, write it to a campaign file, and return a remark."""
    bad = results.worst(result.answers)
    assert bad is not None

    def fails(faults: list[Table]) -> bool:
        answers = run_case(campaign, campaign.plan_faults(case, faults), reference, out).answers
        return any((answer.invariant, answer.answer) == (bad.invariant, bad.answer) for answer in answers)

    # The faults of a result are fully resolved: values drawn by a fault's index stay the same without its neighbours.
    found = schedule.shrink(fails, result.faults)
    path = _shrunk_path(out, case)
    path.parent.mkdir(exist_ok=True)
    files.write(path, _replay(campaign, [replace(result, faults=found.faults)]))
    caveat = "" if found.smallest else ", perhaps not the smallest"
    return f" [{len(found.faults)} of {len(result.faults)} faults are enough{caveat}: {path}, {found.trials} trials]"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt at the first request to stop; ignore later ones, which would disturb the cleanup.

    The jobs have sessions of their own, so no signal of a terminal reaches them.
    """
    numbers = signals.heeded()

    def interrupt(_number: int, _frame: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with supervision.handle_signals(interrupt):
        yield


def keep_replay(campaign: Campaign, report: Report, out: Path) -> Path | None:
    """Write OUT/replay.toml, a campaign that repeats the failed cases, and return its path; None if none failed."""
    path, failed = out / "replay.toml", [result for result in report.results if result.outcome in FAILED]
    if failed:
        files.write(path, _replay(campaign, failed))
    else:
        path.unlink(missing_ok=True)
    return path if failed else None


def _replay(campaign: Campaign, failed: Iterable[Result]) -> str:
    """Return a campaign file with absolute paths that repeats results with exactly the same faults, each run once."""
    settings: dict[str, Any] = {"timeout_seconds": campaign.file.timeout_seconds}
    shared = _split(campaign.overrides)
    if campaign.command:
        lines = [*tomlfile.lines(campaign.command.settings() | settings)]
    else:
        settings |= {"config": str(campaign.config_path.absolute()), "restarts": campaign.file.restarts}
        lines = [*tomlfile.lines(settings), "", "[set]", *(f"{key} = {value}" for key, value in shared.items())]
    firsts: dict[tuple[str, str], Result] = {}
    for result in failed:
        firsts.setdefault((result.name, result.strategy), result)
    for result in firsts.values():
        run = {"name": result.name, "ranks": result.ranks, "nodes": result.nodes}
        run |= {"strategy": result.strategy} if result.strategy else {}
        run |= {"spares": result.spares} if result.spares else {}
        run |= {"transport": result.transport} if result.transport != "tcp" else {}
        run |= {"apart": True} if result.apart else {}
        lines += ["", f"# {result.outcome}: {' '.join(result.why.split())}", "[[runs]]", *tomlfile.lines(run)]
        # Its own `set` holds the settings that the campaign does not have.
        own = {key: value for key, value in _split(result.overrides).items() if shared.get(key) != value}
        lines += [f"set.{key} = {value}" for key, value in own.items() if key != "parallel.strategy"]
        for fault in result.faults:
            lines += ["", "[[runs.faults]]", *tomlfile.lines(fault)]
    return "\n".join([*lines, ""])


def _split(overrides: Iterable[str]) -> dict[str, str]:
    """Split "key=value" into {key: value as TOML}. The last value of a key counts, as with --set."""
    return {key: value for key, _, value in (override.partition("=") for override in overrides)}


def default_out(campaign: Campaign) -> Path:
    return Path("runs") / "chaos" / f"{campaign.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
