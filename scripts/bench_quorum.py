"""The figures of scripts/bench about a worker's death: quorum mode beside restart mode, torch.save and torchft.

    python -m scripts.bench_quorum [ROW …] [--minutes 25]

measures the rows that runs/bench-quorum/COMMIT/ does not have yet (the last commit of the package), saves each as soon
as it is measured, and writes BENCHMARKS.md. It begins no row when the minutes are over: the same command goes on. Let
nothing else run meanwhile.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from scripts import bench_survival as survival
from trainer.launch.agent import Agent
from trainer.launch.cluster import Cluster
from trainer.launch.processes import wait_until
from trainer.log import events
from trainer.log.events import AttemptStarted, MembersChanged, StepDone
from trainer.parallel import arbiter, elastic

ROOT = survival.ROOT
SETTINGS = [*survival.ENDLESS, f"checkpoint.every_steps={survival.EVERY}"]
MICRO_BATCHES = 8  # of configs/gpt_tiny.toml
TORCHFT = "torchft==0.2.0"
PATIENCE_SECONDS = 120.0
CALM_SECONDS = 15.0
"""Undisturbed training before the kills of a goodput figure, and again after them, by which its rate is measured."""
WINDOW_SECONDS, ROUNDS = 4.0, 10
STALL_STEPS = 2.0
"""A join may hold up the survivors for so many steps' time."""
WORKERS = (2, 3, 4)
PERIODS = (30, 10, 5)


@dataclass(frozen=True)
class Commit:
    """A step that was committed, as the job's own records tell it."""

    step: int
    time: float
    group: int
    """Changes whenever the ranks that compute together change."""
    micro_batches: float = MICRO_BATCHES


class Job(Protocol):
    """A job of one of the systems. Its records are read while it trains."""

    def __enter__(self) -> "Job": ...
    def __exit__(self, *_: object) -> None: ...
    def read(self) -> list[Commit]:
        """All commits so far."""
        ...

    def members(self) -> dict[int, int]:
        """{rank: process id} of the workers that compute now."""
        ...

    def is_whole(self) -> bool:
        """True if all workers take part, and spares are ready."""
        ...

    def send(self, pid: int, number: int) -> bool: ...
    def resumed(self, since: float) -> float | None:
        """Time at which what was lost at `since` began to be computed again; None where only the commit tells."""
        ...

    def processes(self) -> list[int]: ...


class Launched:
    """A job of `python -m trainer launch`: its launcher's part of a Job."""

    _agent: Agent

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.kill()

    def send(self, pid: int, number: int) -> bool:
        return self._agent.send(pid, number)

    def resumed(self, since: float) -> float | None:
        return None

    def processes(self) -> list[int]:
        return self._agent.processes()


class Quorum(Launched):
    """`python -m trainer launch --workers`."""

    def __init__(self, directory: Path, workers: int, spares: int = 0) -> None:
        self.run, self._workers, self._spares = directory / "run", workers, spares
        settings = [part for setting in SETTINGS for part in ("--set", setting)]
        command = ["-m", "trainer", "launch", str(survival.TINY), "--workers", str(workers), "--spares", str(spares)]
        self._agent = Agent(
            [*command, "--run", str(self.run), *settings], directory / "log.txt", launch=[sys.executable],
            environment=survival.ENVIRONMENT, directory=ROOT,
        )  # fmt: skip
        self._follower = events.Follower(self.run)
        self._commits: list[Commit] = []
        self._pids: dict[int, int] = {}
        self._members: list[int] = []
        self.changes: list[tuple[float, MembersChanged]] = []

    def read(self) -> list[Commit]:
        for entry in self._follower.poll() if events.events_directory(self.run).exists() else ():
            match entry.event:
                case AttemptStarted(pid=pid):
                    self._pids[entry.rank] = pid
                    self._members = self._members or self._first_members()
                case MembersChanged(members=members) as change:
                    self._members = members
                    self.changes.append((entry.time, change))
                case StepDone(step=step):
                    self._commits.append(Commit(step, entry.time, len(self.changes)))
                case _:
                    pass
        return self._commits

    def _first_members(self) -> list[int]:
        """Return the members of the first epoch: those workers and spares that came first."""
        told = arbiter.log_path(self.run, 0).read_text().splitlines()
        return next(json.loads(line)["epoch"]["members"] for line in told if line.startswith('{"what": "epoch"'))

    def members(self) -> dict[int, int]:
        self.read()
        # A newcomer writes that it starts once it is a member.
        return {m: self._pids[m] for m in self._members if m in self._pids and _is_running(self._pids[m])}

    def is_whole(self) -> bool:
        told = arbiter.log_path(self.run, 0).read_text()  # only counted: its last line may be torn
        connected = told.count('"what": "worker"') - told.count('"what": "lost"')
        return len(self.members()) == self._workers and connected == self._workers + self._spares

    def resumed(self, since: float) -> float | None:
        return next((at for at, change in self.changes if at > since and change.lost), None)


class Restart:
    """`torchrun -m trainer train`: every death restarts every worker."""

    def __init__(self, directory: Path, workers: int) -> None:
        self.run, self._workers = directory / "run", workers
        self._cluster = Cluster(
            survival.TINY, self.run, SETTINGS, ranks=workers, restarts=10_000, directory=directory / "job",
            environment=survival.ENVIRONMENT,
        )  # fmt: skip
        self._follower = events.Follower(self.run)
        self._commits: list[Commit] = []

    def __enter__(self) -> "Restart":
        self._cluster.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._cluster.kill()

    def read(self) -> list[Commit]:
        for entry in self._follower.poll() if events.events_directory(self.run).exists() else ():
            if isinstance(entry.event, StepDone):
                self._commits.append(Commit(entry.event.step, entry.time, entry.attempt))
        return self._commits

    def members(self) -> dict[int, int]:
        return self._cluster.workers()

    def is_whole(self) -> bool:
        return len(self.members()) == self._workers

    def send(self, pid: int, number: int) -> bool:
        return self._cluster.send(pid, number)

    def resumed(self, since: float) -> float | None:
        return None

    def processes(self) -> list[int]:
        return self._cluster.processes()


class Recorded(ABC):
    """A job whose workers write a line of JSON for each commit into DIRECTORY/steps.jsonl."""

    def __init__(self, directory: Path, agent: Agent, workers: int) -> None:
        self._path, self._agent, self._workers, self._bytes = directory / "steps.jsonl", agent, workers, 0

    def __exit__(self, *_: object) -> None:
        self._agent.kill()

    def _new_lines(self) -> Iterator[Any]:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._bytes)
                *whole, _torn = file.read().split(b"\n")
            for line in whole:
                self._bytes += len(line) + 1
                with contextlib.suppress(ValueError):  # a torn line, to which the next process has added its own
                    yield json.loads(line)

    @abstractmethod
    def members(self) -> dict[int, int]: ...

    def is_whole(self) -> bool:
        return len(self.members()) == self._workers

    def send(self, pid: int, number: int) -> bool:
        return self._agent.send(pid, number)

    def resumed(self, since: float) -> float | None:
        return None

    def processes(self) -> list[int]:
        return self._agent.processes()


class Plain(Recorded):
    """torchrun with DDP and torch.save every so many steps."""

    def __init__(self, directory: Path, workers: int) -> None:
        place = directory / "plain"
        place.mkdir()
        options = ["--standalone", "--max-restarts=10000", f"--nproc-per-node={workers}", "--monitor-interval=0.1"]
        agent = Agent(
            [*options, "scripts/bench_survival.py", "--worker", "plain", str(place)], place / "log.txt",
            launch=[sys.executable, "-m", "torch.distributed.run"],
            environment=survival.ENVIRONMENT | {elastic.SHARED_STORE: "1"}, directory=ROOT,
        )  # fmt: skip
        super().__init__(place, agent, workers)
        self._commits: list[Commit] = []

    def __enter__(self) -> "Plain":
        return self

    def read(self) -> list[Commit]:
        self._commits += [Commit(step, at, pid) for step, at, pid in self._new_lines()]
        return self._commits

    def members(self) -> dict[int, int]:
        return self._agent.workers()


class Torchft(Recorded):
    """torchft: a lighthouse, and replicas of one process each."""

    def __init__(self, directory: Path, workers: int) -> None:
        place = directory / "torchft"
        place.mkdir()
        agent = Agent(
            ["scripts/bench_torchft.py", "supervise", str(workers), str(place)], place / "log.txt",
            launch=[str(torchft_python())], environment=survival.ENVIRONMENT | {"RUST_LOG": "error"}, directory=ROOT,
        )  # fmt: skip
        super().__init__(place, agent, workers)
        self._share = MICRO_BATCHES / workers
        self._commits: list[Commit] = []
        self._pids: dict[int, tuple[int, int, int]] = {}

    def __enter__(self) -> "Torchft":
        return self

    def read(self) -> list[Commit]:
        for step, at, quorum, number, pid, participants in self._new_lines():
            self._pids[number] = (pid, step, participants)
            if not self._commits or step > self._commits[-1].step:  # every replica writes every step
                self._commits.append(Commit(step, at, quorum, participants * self._share))
        return self._commits

    def members(self) -> dict[int, int]:
        """Replicas that took part in the last step or the one before it."""
        commits = self.read()
        newest = commits[-1].step if commits else 0
        return {n: pid for n, (pid, step, _) in self._pids.items() if step >= newest - 1 and _is_running(pid)}


SYSTEMS: dict[str, Callable[..., Job]] = {"quorum": Quorum, "restart": Restart, "plain": Plain, "torchft": Torchft}


def _is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


def torchft_python() -> Path:
    """Python of an environment with torchft and with this environment's torch. Raises LookupError if it can't be."""
    place = Path(os.environ.get("TOPROPE_TORCHFT", Path(tempfile.gettempdir()) / "toprope-torchft"))
    python = place / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    (packages,) = place.glob("lib/python3*/site-packages")
    if not (packages / "torchft").exists():
        (packages / "toprope.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        command = [str(python), "-m", "pip", "install", "-q", TORCHFT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LookupError(done.stderr.strip().splitlines()[-1][:200])
    return python


# From a kill to the next commit.


def kills(make: Callable[[Path], Job], workers: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Kill a random worker whenever all are there, and see when the next step is committed, and when all are back."""
    chance, rows = random.Random(seed), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as directory, make(Path(directory)) as job:
        for _ in range(repeats + 1):
            victim = _all_there(job, workers, chance)
            before = job.read()[-1]
            at = time.time()
            if not job.send(victim, signal.SIGKILL):
                raise SystemExit(f"worker {victim} ended before it was killed")
            rows.append(_recovery(job, before, at) | {"rejoined": _rejoined(job, workers, at)})
            if isinstance(job, Quorum):
                rows[-1] |= _books(job, at, workers)
        commits = job.read()
    usual = _usual(commits)
    for row in rows:
        # What was lost and is computed again is no part of the time that the machinery takes.
        row["beyond"] = row["all"] - (row["computing"] if row["computing"] is not None else (row["lost"] + 1) * usual)
        row["stall"] = None if row.get("stall") is None else row["stall"] / usual
    rows = rows[1:]  # the first one warms up
    return {"workers": workers, "step_seconds": usual, "rows": rows}


def _all_there(job: Job, workers: int, chance: random.Random) -> int:
    """Wait until all workers take part and have done some steps; return the process to kill, at a random moment."""
    since = time.time()

    def settled() -> bool:
        commits = job.read()
        new = [commit for commit in commits[-3:] if commit.time > since and commit.group == commits[-1].group]
        return len(new) == 3 and job.is_whole()

    if not wait_until(settled, PATIENCE_SECONDS):
        raise SystemExit(f"{type(job).__name__}: {workers} workers were not there within {PATIENCE_SECONDS:.0f} s")
    time.sleep(chance.random() * 0.3)
    return chance.choice(sorted(job.members().items()))[1]


def _recovery(job: Job, before: Commit, at: float) -> dict[str, Any]:
    """Seconds from a kill to the next new commit of those that go on, and the steps that were computed again."""
    found: list[Commit] = []

    def new_commit() -> bool:
        commits = job.read()
        reached = max(commit.step for commit in commits if commit.group == before.group)
        found[:] = [c for c in commits if c.time > at and c.group != before.group and c.step > reached][:1]
        return bool(found)

    if not wait_until(new_commit, PATIENCE_SECONDS):
        raise SystemExit(f"{type(job).__name__}: no new step within {PATIENCE_SECONDS:.0f} s after a kill")
    (commit,) = found
    again = [c for c in job.read() if at < c.time < commit.time and c.group == commit.group]
    resumed = job.resumed(at)
    computing = None if resumed is None else commit.time - resumed
    return {"all": commit.time - at, "lost": len(again), "computing": computing}


def _rejoined(job: Job, workers: int, at: float) -> float:
    """Seconds from a kill until all workers take part again and have committed a step."""
    since = len(job.read())

    def back() -> bool:
        return len(job.members()) == workers and len(job.read()) > since

    if not wait_until(back, PATIENCE_SECONDS):
        raise SystemExit(f"{type(job).__name__}: no {workers} workers within {PATIENCE_SECONDS:.0f} s after a kill")
    return job.read()[-1].time - at


def _books(job: Quorum, at: float, workers: int) -> dict[str, Any]:
    """Return the cost of a death: missing and kept micro-batches, and seconds for which the join held up the others."""
    changes = [(when, change) for when, change in job.changes if when > at]
    death = next(change for _, change in changes if change.lost)
    joins = [(when, change) for when, change in changes if change.joined and not change.lost]
    missing = sum(len(work) for work in death.given.values())
    kept = sum(len(work) for work in death.kept.values())
    found: dict[str, Any] = {"missing": missing, "kept": kept, "share": -(-MICRO_BATCHES // workers), "stall": None}
    if joins:
        when, _ = joins[0]
        commits = job.read()
        last = max((c.time for c in commits if c.time <= when), default=when)
        first = min((c.time for c in commits if c.time > when), default=when)
        found["stall"] = first - last - _usual(commits)
    return found


def _usual(commits: list[Commit]) -> float:
    """Median seconds of a step between two of the same group."""
    pairs = itertools.pairwise(commits)
    return statistics.median(b.time - a.time for a, b in pairs if a.group == b.group and b.step == a.step + 1)


# Goodput.


def goodput(
    make: Callable[[Path], Job], period: float, seconds: float, seed: int = 0, workers: int = 3,
    first: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Useful micro-batches a second of a time with a kill every so often, against those of calm times around it.

    The first kill comes after `first` seconds, by default after `period`.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory, make(Path(directory)) as job:
        wait_until(lambda: len(job.members()) == workers and len(job.read()) > 5, PATIENCE_SECONDS)
        calm_from = time.time()
        time.sleep(CALM_SECONDS)
        started, done, skipped = time.time(), 0, 0
        kills_from = started + (period if first is None else first)
        while (due := kills_from + (done + skipped) * period) < started + seconds:
            time.sleep(max(0.0, due - time.time()))
            members = job.members()
            # The last one is left alive: torchft would begin from nothing.
            if len(members) > 1 and job.send(chance.choice(sorted(members.items()))[1], signal.SIGKILL):
                done += 1
            else:
                skipped += 1
        time.sleep(max(0.0, started + seconds - time.time()))
        wait_until(lambda: len(job.members()) == workers, PATIENCE_SECONDS)
        back = time.time()
        time.sleep(CALM_SECONDS)
        commits = job.read()
    # A shared machine's speed drifts within minutes.
    before, after = (_useful(commits, begin, begin + CALM_SECONDS) / CALM_SECONDS for begin in (calm_from, back))
    useful, calm = _useful(commits, started, started + seconds) / seconds, (before + after) / 2
    return {
        "period": period, "seconds": seconds, "kills": done, "skipped": skipped, "calm": calm, "before": before,
        "after": after, "rate": useful, "goodput": useful / calm,
    }  # fmt: skip


def _useful(commits: list[Commit], begin: float, end: float) -> float:
    """Micro-batches of the steps that were new in this time: a step that is done again counts once."""
    before = max((c.step for c in commits if c.time <= begin), default=0)
    newest: dict[int, float] = {}
    for commit in commits:
        if begin < commit.time <= end and commit.step > before:
            newest[commit.step] = commit.micro_batches
    return sum(newest.values())


# The cost of a calm step.


def calm(seconds: float = WINDOW_SECONDS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Step time of quorum mode over that of restart mode: both jobs run, and one of them is stopped, in turns.

    Of two equal jobs the one that was started first was 2 % slower, so each is first once: the mean of both is told.
    """
    ours, theirs = [], []
    for first in (Quorum, Restart):
        found = _in_turns(first, Restart if first is Quorum else Quorum, seconds, rounds)
        ours.append(found[Quorum])
        theirs.append(found[Restart])
    ratios = [
        statistics.geometric_mean(q / r for q, r in zip(quorum, restart, strict=True))
        for quorum, restart in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    ]
    low, median, high = statistics.quantiles(ratios, n=4)
    ratio = {"median": median, "low": low, "high": high, "rounds": rounds}
    return {
        "ratio": ratio, "quorum": statistics.median(itertools.chain(*ours)),
        "restart": statistics.median(itertools.chain(*theirs)),
    }  # fmt: skip


def _in_turns(first: type[Any], second: type[Any], seconds: float, rounds: int) -> dict[type, list[float]]:
    """Return the median steps of both systems' windows, in the order of the rounds."""
    found: dict[type, list[float]] = {first: [], second: []}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        jobs: list[Any] = []
        for system in (first, second):
            jobs.append(stack.enter_context(system(_made(Path(directory) / system.__name__), 2)))
            wait_until(lambda: len(jobs[-1].read()) > 5, PATIENCE_SECONDS)
            _signal(jobs[-1], signal.SIGSTOP)
        for number in range(rounds):
            for job in jobs if number % 2 else reversed(jobs):
                found[type(job)].append(_window(job, seconds))
        for job in jobs:
            _signal(job, signal.SIGCONT)
    return found


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def _signal(job: Job, number: int) -> None:
    for pid in job.processes():
        job.send(pid, number)


def _window(job: Job, seconds: float) -> float:
    """Let a stopped job run for so long; return its median step, without the first and the last."""
    before = len(job.read())
    _signal(job, signal.SIGCONT)
    time.sleep(seconds)
    _signal(job, signal.SIGSTOP)
    times = [commit.time for commit in job.read()[before:]][1:]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


# Rows.


@dataclass(frozen=True)
class Row:
    name: str
    measure: Callable[[], dict[str, Any]] = field(repr=False)


def rows(repeats: int = 20, seconds: float = 180.0) -> list[Row]:
    """All rows, those first that the claims are about."""

    def killed(system: str, workers: int, **options: int) -> Callable[[], dict[str, Any]]:
        return lambda: kills(lambda place: SYSTEMS[system](place, workers, **options), workers, repeats)

    def harassed(system: str, period: int) -> Callable[[], dict[str, Any]]:
        return lambda: goodput(lambda place: SYSTEMS[system](place, 3), period, seconds)

    found = [Row(f"quorum-{n}", killed("quorum", n)) for n in WORKERS]
    found += [Row("spare-3", killed("quorum", 3, spares=1)), Row("calm", calm)]
    for system in ("restart", "torchft", "plain"):
        found += [Row(f"{system}-{n}", killed(system, n)) for n in WORKERS]
    for period in PERIODS:
        found += [Row(f"goodput-{s}-{period}", harassed(s, period)) for s in ("quorum", "restart", "torchft")]
    return found


def measure(names: list[str], minutes: float, repeats: int, seconds: float, out: Path) -> dict[str, Any]:
    """Measure what `out` lacks of the named rows, or of all; return all that it has then."""
    return measure_rows(rows(repeats, seconds), names, minutes, out, summary)


def measure_rows(
    wanted: Sequence[Row], names: list[str], minutes: float, out: Path, summary: Callable[[str, dict[str, Any]], str]
) -> dict[str, Any]:
    """Measure what `out` lacks of the named rows, or of all; return all that it has then."""
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    for row in wanted:
        path = out / f"{row.name}.json"
        if (names and row.name not in names) or (path.exists() and not names):
            continue
        if time.monotonic() - begun > 60 * minutes:
            print(f"{row.name}: not begun, {minutes:g} minutes are over; the same command goes on", flush=True)
            break
        print(f"{row.name} …", flush=True)
        try:
            figure = row.measure()
        except LookupError as error:
            figure = {"missing": f"{TORCHFT} cannot be installed: {error}"}
        except (SystemExit, Exception) as error:  # the other rows are measured all the same
            traceback.print_exc()
            print(f"{row.name}: failed: {error}", flush=True)
            continue
        path.write_text(json.dumps(figure) + "\n")
        print(f"{row.name}: {summary(row.name, figure)} ({time.monotonic() - begun:.0f} s so far)", flush=True)
    return {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}


def place(name: str = "bench-quorum") -> Path:
    """Return the folder of the rows of this state of the package."""
    command = ["git", "log", "-1", "--format=%h", "--", "trainer"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return ROOT / "runs" / name / commit


def figure() -> dict[str, Any]:
    """The figure of scripts/bench."""
    return {"rows": measure([], 25.0, 20, 180.0, place())}


def broken_promises(found: dict[str, Any]) -> list[str]:
    """The promises on joining that the rows do not hold."""
    return [
        f"{name}: a join holds up the others for {stall:.1f} steps' time, more than {STALL_STEPS:g}"
        for name, row in found.items()
        if name.startswith("quorum-") and (stall := _median(row, "stall")) is not None and stall > STALL_STEPS
    ]


# Tables.


def _values(row: dict[str, Any], key: str) -> list[float]:
    return [one[key] for one in row.get("rows", ()) if one.get(key) is not None]


def _median(row: dict[str, Any], key: str) -> float | None:
    values = _values(row, key)
    return statistics.median(values) if values else None


def _cell(row: dict[str, Any] | None, key: str, digits: int = 2) -> str:
    """Median (worst); empty where nothing was measured."""
    if row is None or "missing" in row:
        return "not measured" if row else ""
    values = _values(row, key)
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})" if values else ""


def summary(name: str, row: dict[str, Any]) -> str:
    """One line for people."""
    if "missing" in row:
        return row["missing"]
    if "goodput" in row:
        calm = f"{row['before']:.1f} and {row['after']:.1f}"
        return (
            f"goodput {row['goodput']:.3f} with {row['kills']} kills in {row['seconds']:g} s: {row['rate']:.1f} "
            f"micro-batches/s, in calm before and after {calm}"
        )
    if "ratio" in row:
        return f"quorum over restart {row['ratio']}"
    shown = (("all", 2), ("beyond", 2), ("rejoined", 1), ("stall", 1), ("missing", 1))
    return ", ".join(f"{key} {_cell(row, key, digits)}" for key, digits in shown if _values(row, key))


TITLES = {
    "quorum": "toprope, quorum", "restart": "toprope, restart", "plain": "torchrun and torch.save",
    "torchft": "torchft 0.2.0",
}  # fmt: skip


def table(figure: dict[str, Any]) -> list[str]:
    """The section of BENCHMARKS.md."""
    found = figure["rows"]
    kinds = list(TITLES)
    count = max((len(row.get("rows", ())) for row in found.values()), default=0)
    lines = [
        "", "## A worker dies: quorum mode, restart mode, others", "",
        f"configs/gpt_tiny.toml, workers of one thread on one machine, {count} kills (SIGKILL of a random worker at a",
        "random moment) for each figure: the median (the worst), in seconds. *Next commit*: from the kill to the next",
        "new step. *Beyond*: the same without what is computed again; target ≤ 0.5 s in quorum mode. *All back*: until",
        f"all workers take part again. Restart mode and torch.save save every {survival.EVERY} steps. torchft throws",
        "the step away and goes on with a smaller batch; its lighthouse takes a replica for dead after 1 s of silence",
        "(its default is 5 s), and a replica starts Python anew, as torch.save's workers do; toprope forks.", "",
        "| workers | figure | " + " | ".join(TITLES[kind] for kind in kinds) + " |", "|---|---|" + "---|" * len(kinds),
    ]  # fmt: skip
    for workers in WORKERS:
        for key, title in (("all", "next commit"), ("beyond", "beyond"), ("rejoined", "all back")):
            cells = [_cell(found.get(f"{kind}-{workers}"), key) for kind in kinds]
            if any(cells):
                lines.append(f"| {workers} | {title} | " + " | ".join(cells) + " |")
    lines += [*_notes(found), *_goodput_table(found)]
    return lines


def _notes(found: dict[str, Any]) -> list[str]:
    lines = [""]
    lines += [f"{row['missing']}.\n" for row in found.values() if "missing" in row][:1]
    for workers in WORKERS:
        row = found.get(f"quorum-{workers}")
        if row and (missing := _values(row, "missing")):
            lines.append(
                f"- Quorum, {workers} workers: a death left {statistics.median(missing):g} of {MICRO_BATCHES} "
                f"micro-batches to compute (median; at most {max(missing):g}; the dead worker's share is "
                f"{row['rows'][0]['share']}). A join held up the others for {_cell(row, 'stall', 1)} steps' time."
            )
    if spare := found.get("spare-3"):
        lines.append(f"- With a spare all 3 are back after {_cell(spare, 'rejoined')} s.")
    if cost := found.get("calm"):
        ratio = cost["ratio"]
        lines.append(
            f"- A calm step of quorum mode takes {ratio['median']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f}, "
            f"{ratio['rounds']} rounds) of one under torchrun, 2 workers: {1e3 * cost['quorum']:.0f} against "
            f"{1e3 * cost['restart']:.0f} ms; target ≤ 1.01."
        )
    return lines if len(lines) > 1 else []


def _calm(row: dict[str, Any]) -> str:
    """The rates before and after the kills; earlier rows have the first alone."""
    return f"{row['before']:.0f} and {row['after']:.0f}" if "before" in row else f"{row['calm']:.0f}"


def _goodput_table(found: dict[str, Any]) -> list[str]:
    kinds = ["quorum", "restart", "torchft"]
    lines = []
    for period in PERIODS:
        measured = [found.get(f"goodput-{kind}-{period}") for kind in kinds]
        cells = [
            "" if row is None else "not measured" if "missing" in row else
            f"{row['goodput']:.2f} ({row['rate']:.0f} of {_calm(row)} micro-batches/s, {row['kills']} kills)"
            for row in measured
        ]  # fmt: skip
        if any(cells):
            seconds = next(row["seconds"] for row in measured if row and "seconds" in row)
            lines.append(f"| {period} s, for {seconds:g} s | " + " | ".join(cells) + " |")
    if not lines:
        return []
    return [
        "", "Goodput of 3 workers: useful micro-batches a second with a kill every so often, against those of the same",
        "job in calm: the mean of before and after it. On 2 cores, two workers that are left are as fast as three, so",
        "that a death may cost nothing and the figure exceed 1; a machine's drift is up to 0.05.", "",
        "| a kill every | " + " | ".join(TITLES[kind] for kind in kinds) + " |", "|---|" + "---|" * len(kinds), *lines,
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="measure these rows, though they were measured before")
    parser.add_argument("--minutes", type=float, default=25.0, help="begin no further row after so long")
    parser.add_argument("--repeats", type=int, default=20, help="kills for each figure")
    parser.add_argument("--seconds", type=float, default=180.0, help="length of a goodput run")
    parser.add_argument("--trial", type=Path, help="rows go to this folder, and nothing is recorded")
    given = parser.parse_args()
    found = measure(given.rows, given.minutes, given.repeats, given.seconds, given.trial or place())
    if given.trial is None:
        from scripts.bench_tables import record

        record("quorum", {"rows": found})
    else:
        print("\n".join(table({"rows": found})))
    if broken := broken_promises(found):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    main()
